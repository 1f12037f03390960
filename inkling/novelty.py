"""How much of what a model writes stands in its training text: the longest run of characters, its place,
and the share of the runs of 20.

The text is read in pieces, once or twice, whatever its size. Beside it stands the same of pieces of the
val text, which the model has not seen: what any such text has in common with the training text.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from inkling.cli import UserError, quoted
from inkling.dataset import data_folder, has_set, is_set_name, open_split, read_meta
from inkling.format import align_columns, counted
from inkling.runs import Runs, overlapping
from inkling.sniff import HEAD, marked_encoding
from inkling.texts import cut_evenly, decode_symbols, read_symbols
from inkling.tokenizer import code_points, stored_tokenizer

RUN = 20                                # characters of the runs whose share is counted
VAL_PIECES = 64                         # of the val text, at most
READ = 1 << 20                          # characters of a file that are read at a time
EXCERPT = 50                            # characters of a run that are shown
AUTO = "auto"                           # look for the training text by the checkpoint's data set
LINE_BREAK = ord("\n")


# -- finding copies --------------------------------------------------------------------------------

@dataclass
class Copied:
    """What of a text stands in the training text. run: its longest run of characters that does, the first
    of several. offset: characters before it there; line and column: its place there, from 1. share: of
    the text's runs of RUN characters, those that stand there; None: it is too short for one."""

    run: str = ""
    offset: int = 0
    line: int = 0
    column: int = 0
    share: float | None = None


@dataclass
class Chunk:
    """A piece of the training text. offset, lines: characters and line breaks before it. line_start:
    offset of the line in which it begins."""

    symbols: np.ndarray
    offset: int
    lines: int
    line_start: int

    def text(self, start: int, length: int) -> str:
        symbols = self.symbols[start:start + length]
        return symbols.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def advance(self, symbols: np.ndarray, offset: int) -> "Chunk":
        """The chunk of `symbols` that begins at `offset`, in this one or at its end."""
        _, line, column = self.place(offset - self.offset)
        return Chunk(symbols, offset, line - 1, offset - column + 1)

    def place(self, index: int) -> tuple:
        """(offset, line, column) of a symbol of it."""
        breaks = np.flatnonzero(self.symbols[:index] == LINE_BREAK)
        line_start = self.line_start
        if len(breaks):
            line_start = self.offset + int(breaks[-1]) + 1
        offset = self.offset + index
        return offset, self.lines + len(breaks) + 1, offset - line_start + 1


def find_copies(texts: list, read: Callable) -> list:
    """A Copied for each of `texts`. read(): the training text from its beginning, as code points in
    consecutive pieces, (n,) in uint32 each; called again where a text has no run of RUN characters."""
    search = Search(texts)
    runs = Runs([code_points(text) for text in texts], RUN)
    found = np.zeros(len(runs.hashes), bool)
    for chunk in search.chunks(read()):
        places, numbers = runs.find(chunk.symbols)
        found[numbers] = True
        search.look_along(chunk, runs, places, numbers)
    for text, copied in enumerate(search.copies):
        own = runs.numbers[runs.text_of == text]
        if len(own):
            copied.share = float(found[own].mean())
    if search.numbers_below(RUN):
        for chunk in search.chunks(read()):
            search.look_for_shorter(chunk)
    return search.copies


class Search:
    """The longest runs so far, `copies`, of each of `texts`."""

    def __init__(self, texts: list):
        self.texts = texts
        self.copies = [Copied() for _ in texts]

    def chunks(self, pieces):
        """Yield consecutive Chunks, which overlap so far that each run of a text is whole in one of them."""
        longest = max(map(len, self.texts), default=1)
        chunk = Chunk(np.empty(0, np.uint32), 0, 0, 0)
        for offset, symbols in overlapping(pieces, max(0, longest - 1)):
            chunk = chunk.advance(symbols, offset)
            yield chunk

    def numbers_below(self, length: int) -> list:
        """The texts whose longest run is shorter than that, and not all of them."""
        return [number for number, copied in enumerate(self.copies)
                if len(copied.run) < min(length, len(self.texts[number]))]

    def improve(self, number: int, chunk: Chunk, start: int, length: int):
        """Take the longest run that a text shares with `length` symbols of the chunk from `start` on, if
        it is longer than the one that is known."""
        text = self.texts[number]
        copied = self.copies[number]
        passage = chunk.text(start, length)
        first = 0
        while first + len(copied.run) < len(passage):
            end = first + len(copied.run) + 1
            if passage[first:end] in text:
                while end < len(passage) and passage[first:end + 1] in text:
                    end += 1
                copied.run = passage[first:end]
                copied.offset, copied.line, copied.column = chunk.place(start + first)
            first += 1

    def look_along(self, chunk: Chunk, runs: Runs, places: np.ndarray, numbers: np.ndarray):
        """Look where in the chunk several runs follow one another. places, numbers: what runs.find has
        found in it."""
        if not len(places):
            return
        begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        counts = np.diff(begins, append=len(places))            # of runs that follow one another
        known = np.array([len(copied.run) for copied in self.copies])
        least = np.full(len(runs.hashes), np.iinfo(np.int64).max)
        np.minimum.at(least, runs.numbers, known[runs.text_of])         # of the texts that have a run
        least = np.minimum.reduceat(least[numbers], begins)
        for stretch in np.flatnonzero(counts + RUN - 1 > least):
            first = begins[stretch]
            count = counts[stretch]
            for text in runs.texts_with(numbers[first:first + count]):
                self.improve(text, chunk, int(places[first]), int(count) + RUN - 1)

    def look_for_shorter(self, chunk: Chunk):
        """Look for runs of less than RUN characters."""
        for length in range(1, RUN):
            shorter = self.numbers_below(length)
            if not shorter:
                continue
            runs = Runs([code_points(self.texts[number]) for number in shorter], length)
            places, numbers = runs.find(chunk.symbols)
            end = len(chunk.symbols)                    # stands for: nowhere
            first = np.full(len(runs.hashes), end)
            np.minimum.at(first, numbers, places)
            earliest = np.full(len(shorter), end)       # where a run of each text begins
            np.minimum.at(earliest, runs.text_of, first[runs.numbers])
            for number, place in zip(shorter, earliest.tolist(), strict=True):
                if place < end:
                    self.improve(number, chunk, place, length)


# -- the training text -----------------------------------------------------------------------------

@dataclass
class TrainingText:
    """name: of the text, in words. read(): it, as `find_copies` takes it. val_pieces(length): a list of
    pieces of its val text, of that many characters each; empty where there is none. is_file: it is no
    prepared set but a file, whose line ends are converted unless they are kept."""

    name: str
    read: Callable
    val_pieces: Callable = lambda length: []
    is_file: bool = False


def find_training_text(named: str, content: dict, keep_line_ends: bool = False) -> TrainingText:
    """The training text of a model: the file or the folder of a prepared set that the user has `named`,
    or, for AUTO, the set of the name that the checkpoint's `content` has, in data/ beside the programs,
    if its train split has the checksum that it has. Raises UserError. No path in `content` is opened."""
    if named != AUTO:
        if has_set(Path(named)):
            return text_of_set(Path(named))
        return text_of_file(Path(named), keep_line_ends)
    way_out = "name its training text, or the folder of the prepared set: --novelty=FILE"
    return text_of_set(find_training_set(content, "--novelty", way_out))


def find_training_set(content: dict, flag: str, way_out: str) -> Path:
    """The folder in data/ beside the programs of the set that a checkpoint's `content` names, if its train
    split has the checksum that is there. Raises UserError, which names the `flag` and the `way_out`."""
    name = content.get("config", {}).get("dataset", "")
    checksum = content.get("text")
    if not (isinstance(name, str) and is_set_name(name)) or not checksum:
        raise UserError(f"{flag}: the checkpoint does not say what it was trained on: {way_out}")
    folder = data_folder(name)
    if not has_set(folder):
        raise UserError(f"{flag}: {folder}, on which the model was trained, is not there: {way_out}")
    if read_meta(folder)["splits"]["train"]["sha256"] != checksum:
        raise UserError(f"{flag}: {folder} does not hold the text that the model was trained on: {way_out}")
    return folder


def text_of_set(folder: Path) -> TrainingText:
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    open_split(folder, meta, "train")                   # checks the files' sizes

    def val_pieces(length: int) -> list:
        entry = meta["splits"]["val"]
        if not entry["characters"] or not length:
            return []
        tokens = -(-length * entry["tokens"] // entry["characters"])
        count = min(VAL_PIECES, entry["tokens"] // tokens)
        pieces = cut_evenly(open_split(folder, meta, "val"), count, tokens)
        symbols = [decode_symbols(tokenizer, ids)[:length] for ids in pieces]
        return [piece.astype("<u4").tobytes().decode("utf-32-le") for piece in symbols]

    return TrainingText(f"train of {folder}", lambda: read_symbols(folder, meta, "train", tokenizer), val_pieces)


def text_of_file(path: Path, keep_line_ends: bool) -> TrainingText:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark."""
    try:
        with open(path, "rb") as file:
            encoding = marked_encoding(file.read(HEAD)) or "utf-8"
    except OSError as error:
        raise UserError(f"--novelty: cannot read {path}: {error.strerror or error}")

    def read():
        try:
            with open(path, encoding=encoding, newline="" if keep_line_ends else None) as file:
                text = file.read(READ).removeprefix("\ufeff")
                while text:
                    yield code_points(text)
                    text = file.read(READ)
        except (OSError, UnicodeError) as error:
            raise UserError(f"--novelty: cannot read {path} as {encoding.upper()} text: "
                            f"{getattr(error, 'strerror', None) or error}")

    return TrainingText(str(path), read, is_file=True)


# -- in words --------------------------------------------------------------------------------------

def compare(samples: list, training_text: TrainingText) -> tuple:
    """(a Copied of each of the `samples`, texts; those of pieces of val that are about as long)."""
    length = int(np.median([len(text) for text in samples]))
    copies = find_copies([*samples, *training_text.val_pieces(length)], training_text.read)
    return copies[:len(samples)], copies[len(samples):]


def novelty_lines(samples: list, val: list, name: str) -> list:
    """What sample.py prints of two lists of Copied."""
    rows = []
    remarks = []
    for number, copied in enumerate(samples, 1):
        rows.append((f"  sample {number}", counted(len(copied.run), "character"), share_in_words(copied.share)))
        more = "..." if len(copied.run) > EXCERPT else ""
        place = f"line {copied.line:,}, column {copied.column:,}: {quoted(copied.run[:EXCERPT])}{more}"
        remarks.append(place if copied.run else "")
    if val:
        lengths = [len(copied.run) for copied in val]
        shares = [copied.share for copied in val if copied.share is not None]
        rows.append(("  val", counted(int(np.median(lengths)), "character"),
                     share_in_words(np.mean(shares) if shares else None)))
        remarks.append(f"for comparison, {counted(len(val), 'piece')} about as long: the median run (of "
                       f"{min(lengths):,} to {max(lengths):,}), the mean share")
    table = [f"{line}  {remark}".rstrip() for line, remark in zip(align_columns(rows), remarks, strict=True)]
    return [f"novelty  the longest run that also stands in {name}, and the share of all runs of {RUN} characters "
            "that do:", *table]


def share_in_words(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def novelty_record(samples: list, val: list, name: str) -> dict:
    """The same as an object for --json."""
    return {"novelty": {"text": name, "run": RUN, "samples": list(map(asdict, samples)),
                        "val": list(map(asdict, val))}}
