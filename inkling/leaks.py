"""What of the val text stands in the training text, in long runs: licenses, headers, duplicates. A model
that has memorized them looks better on val than it is."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inkling.cli import quoted
from inkling.dataset import SPLITS, open_split
from inkling.format import align_columns, counted
from inkling.runs import Runs, overlapping
from inkling.texts import PIECES, cut_evenly, decode_symbols, read_symbols
from inkling.tokenizer import Tokenizer

RUN = 50                                # characters in a row that make a leak
MOST_VAL = 500_000                      # characters of val that are looked for
SHOWN = 5                               # passages
EXCERPT = 60                            # characters of a passage that are shown
MANY = 0.01                             # the share of val from which on there is advice


@dataclass
class Leaks:
    """share: of the characters of val that stand in train in runs of RUN and more. passages: [(text, how
    often it stands in val)] of the longest passages all of whose runs of RUN stand in train. sampled:
    characters of val that were looked for, if not all; else 0."""

    share: float
    passages: list
    sampled: int


def find_leaks(folder: Path, meta: dict, tokenizer: Tokenizer, suffix: str = "") -> Leaks | None:
    """The leaks of the set in `folder`, which `meta` describes: all of train is read, a piece at a time.
    None if a split is empty. suffix: as `open_split` takes it."""
    entry = meta["splits"]["val"]
    if not all(meta["splits"][split]["characters"] for split in SPLITS):
        return None
    ids = open_split(folder, meta, "val", suffix)
    pieces = [ids[0:len(ids)]]
    if entry["characters"] > MOST_VAL:
        tokens = MOST_VAL * entry["tokens"] // entry["characters"]
        pieces = cut_evenly(ids, PIECES, max(1, tokens // PIECES))
    texts = [decode_symbols(tokenizer, piece) for piece in pieces]
    is_leaked = mark_leaks(texts, read_symbols(folder, meta, "train", tokenizer, suffix))
    size = sum(map(len, texts))
    return Leaks(sum(int(marks.sum()) for marks in is_leaked) / max(1, size), longest_passages(texts, is_leaked),
                 size if len(pieces) > 1 else 0)


def mark_leaks(texts: list, train) -> list:
    """For each of `texts`, code points (n,), which of its characters belong to a run of RUN that stands in
    train: (n,) of bool. train: code points in consecutive pieces."""
    runs = Runs(texts, RUN)
    wanted = np.ones(len(runs.hashes), bool)            # not yet found
    for _, symbols in overlapping(train, RUN - 1):
        _, numbers = runs.find(symbols, wanted)
        wanted[numbers] = False
    is_leaked = np.zeros(len(runs.symbols), bool)
    begins = runs.starts[~wanted[runs.numbers]]
    for offset in range(RUN):
        is_leaked[begins + offset] = True
    return np.split(is_leaked, np.cumsum([len(text) for text in texts])[:-1])


def longest_passages(texts: list, is_leaked: list) -> list:
    """[(passage, how often it occurs)], the SHOWN longest passages of leaked characters."""
    passages = Counter()
    for text, marks in zip(texts, is_leaked, strict=True):
        edges = np.flatnonzero(np.diff(marks, prepend=False, append=False))
        for begin, end in edges.reshape(-1, 2):
            passages[text[begin:end].astype("<u4").tobytes()] += 1
    longest = sorted(passages.items(), key=lambda item: -len(item[0]))[:SHOWN]
    return [(passage.decode("utf-32-le", "surrogatepass"), count) for passage, count in longest]


# -- in words --------------------------------------------------------------------------------------

def leak_lines(leaks: Leaks, can_dedup: bool) -> list:
    """What prepare.py prints of them. can_dedup: --dedup would compare documents that are whole in train or in
    val, and has not been given."""
    sampled = f" (of {leaks.sampled:,} characters of it, evenly spread)" if leaks.sampled else ""
    if not leaks.passages:
        return [f"leaks    none: no {RUN} characters of val in a row stand in train{sampled}"]
    share = f"{100 * leaks.share:{'.1f' if leaks.share >= MANY else '.2g'}}%"
    lines = [f"leaks    {share} of val stands in train, in runs of {RUN} characters and more{sampled}; the longest:"]
    rows = [("", f"{len(text):,} characters", times_in_words(count)) for text, count in leaks.passages]
    excerpts = [quoted(text[:EXCERPT]) + ("..." if len(text) > EXCERPT else "") for text, _ in leaks.passages]
    lines += [f"{line}  {excerpt}" for line, excerpt in zip(align_columns(rows), excerpts, strict=True)]
    if leaks.share >= MANY and can_dedup:
        lines.append("  the val loss is the better for it; --dedup drops documents that are equal or nearly so")
    return lines


def times_in_words(count: int) -> str:
    return "once" if count == 1 else counted(count, "time")
