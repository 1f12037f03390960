"""Turn raw text into the token files that train.py reads.

    python prepare.py shakespeare_char          # a named set, downloaded once
    python prepare.py book.txt --name=book      # a token per character
    python prepare.py book.txt --name=words --tokenizer=bpe:4096
    python prepare.py texts/ more.jsonl.gz https://host/a.txt --name=all
    python prepare.py --check book              # every count, checksum and id
    python prepare.py --decode book > book.txt  # its text, train and then val
    python prepare.py --adopt FOLDER --tokenizer=gpt2   # nanoGPT's .bin files

The named sets are fables (embedded), fables_zh, shakespeare_char, shakespeare, verdict and tinystories. Any other input
is a file, a folder, a glob, an address or - for standard input: plain text, .csv, .tsv, .json, .jsonl or .parquet, each
also as .gz or .zst.

Writes data/NAME/train.bin and val.bin, raw arrays of token ids without a header (uint8 up to 256 different tokens,
uint16 up to 65,536, else uint32), and meta.json with the tokenizer, counts and checksums. The text is split first and
tokenized afterwards, so that no token spans both sides. Everything is read and written in pieces; files are replaced
only when the new ones are complete.
"""

import hashlib
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from inkling.cli import UserError, parse, run
from inkling.dataset import NAME, check_ids, data_folder, open_split, read_meta, split_files, token_dtype
from inkling.download import download, fetch_address, is_address
from inkling.files import ROOT, atomic_write, hold_folder, sha256
from inkling.readers import Reader, describe_source, expand, pieces, plain_name, spool
from inkling.tokenizer import (
    BOUNDED,
    END_OF_TEXT,
    PATTERN,
    Tokenizer,
    bpe_size,
    code_points,
    stored_tokenizer,
    train_bpe,
)

SPLITS = ("train", "val")
SHAKESPEARE = dict(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
SETS = {                                # named sets; one without an address is part of the repository
    "fables": dict(tokenizer="char"),
    "fables_zh": dict(tokenizer="cl100k_base", file="input.csv"),
    "shakespeare_char": dict(tokenizer="char", **SHAKESPEARE),
    "shakespeare": dict(tokenizer="gpt2", **SHAKESPEARE),
    "verdict": dict(
        tokenizer="gpt2",
        url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
    # Of these texts no SHA-256 is known here. Stories of one's own may take their place: prepare.py TEXT --name=...
    "tinystories": dict(tokenizer="bpe:32000", separator=END_OF_TEXT, url=f"{STORIES}train.txt",
                        val_url=f"{STORIES}valid.txt"),
}
JOB = 1 << 18                           # characters that a worker encodes at once
MANY = 10_000                           # documents up to which the share that goes to val is exact
MOST_SHARDS = 500                       # files of a split, all open while they are written


@dataclass
class Options:
    # -- what to prepare
    name: str = ""                      # name of the set, a folder under data/; empty: the set's or the file's own name
    tokenizer: str = ""                 # char | byte | gpt2 | cl100k_base | o200k_base | any other name that tiktoken
                                        # knows | bpe:VOCAB, trained on this text | a .tiktoken file | another set's
                                        # meta.json | a ckpt.pt; empty: the named set's own, char for a file
    val_fraction: float = 0.1           # share kept for validation: of a single text's characters, from its end; of
                                        # the documents, by a seeded hash of their text
    val: str = ""                       # a text for validation of its own, which val_fraction then leaves alone
    limit: int = 0                      # take only the first so many bytes of text, for a trial; 0: all
    seed: int = 0                       # of the hash that picks documents for validation
    data_dir: str = ""                  # folder that holds the sets; empty: data/ beside this file
    force: bool = False                 # prepare again although nothing has changed, download again what is there
    # -- how to read it
    format: Literal["auto", "text", "csv", "tsv", "json", "jsonl", "parquet"] = "auto"  # auto: by the file's suffix
    text_column: str = ""               # column or field that holds the text, a document per row; empty: the whole
                                        # table as it is, and `text` of .json, .jsonl and .parquet
    separator: str = ""                 # splits a plain text into documents, white space around them goes; \n, \t work
    encoding: str = "utf-8"             # of the text files
    suffix: str = ""                    # of the files to take from a folder, such as .py,.c; empty: all known formats
    # -- tokenizers
    pattern: str = ""                   # regular expression for a trained BPE or a .tiktoken file, within whose matches
                                        # tokens stay; empty: GPT-4's
    bpe_sample: int = 30_000_000        # characters of the training text to train a BPE on, evenly spread over it
    min_count: int = 1                  # char: characters seen less often are rare
    rare: Literal["bytes", "refuse"] = "bytes"  # rare characters become the bytes of their UTF-8, or are refused
    eot: bool = True                    # put the end-of-text token between documents, where the tokenizer has one
    # -- how to write it
    shard_tokens: int = 1_000_000_000   # a longer split becomes several files of so many tokens, train_000.bin ...
    workers: int = 0                    # threads that tokenize; 0: one per core
    # -- something else instead
    check: bool = False                 # verify the named sets: counts, types, checksums and every id
    decode: bool = False                # write the named sets' text to standard output
    adopt: bool = False                 # take over folders with a train.bin and val.bin of uint16 ids but no meta.json

    def problems(self) -> list:
        """What is out of range, each with its value and the rule."""
        rules = {"val_fraction": (0 <= self.val_fraction < 1, "at least 0 and below 1"),
                 **{name: (getattr(self, name) >= 0, "at least 0") for name in ("limit", "seed", "workers")},
                 **{name: (getattr(self, name) >= 1, "at least 1")
                    for name in ("bpe_sample", "min_count", "shard_tokens")},
                 "encoding": (_is_encoding(self.encoding), "a text encoding, such as utf-8, latin-1 or gb18030"),
                 "seed ": (self.seed < 2**63, "below 2**63"),
                 "min_count ": (self.min_count == 1 or self.tokenizer in ("char", ""), "1 unless tokenizer=char"),
                 "pattern": (not self.pattern or self.tokenizer.startswith("bpe:") or
                             self.tokenizer.endswith(".tiktoken"), "given for bpe:VOCAB or a .tiktoken file only")}
        return [f"{name.strip()}={getattr(self, name.strip())} must be {rule}"
                for name, (holds, rule) in rules.items() if not holds]

    def remembered(self) -> dict:
        """What meta.json keeps beside the tokenizer and val_fraction: settings that shape the result."""
        names = ("limit", "seed", "format", "text_column", "separator", "encoding", "pattern", "bpe_sample",
                 "min_count", "rare", "eot", "shard_tokens")
        names += ("tokenizer",) if self.tokenizer.endswith(("meta.json", ".pt")) else ()     # it may share its name
        return {field.name: getattr(self, field.name) for field in fields(self)
                if field.name in names and getattr(self, field.name) != field.default}


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)                 # refuses the codecs that make no text
        return True
    except (LookupError, ValueError):
        return False


# -- tokenizers ----------------------------------------------------------------------------------------------------















# -- named sets ----------------------------------------------------------------------------------------------------

def fetch(name: str, folder: Path, again: bool = False) -> Path:
    """The raw text of a named set: embedded, already there (under this set or another with the same text), or
    downloaded with a time-out, three tries and, where it is known, a pinned SHA-256."""
    source = SETS[name]
    if "url" not in source:
        return ROOT / "data" / name / source.get("file", "input.txt")
    if "sha256" not in source:
        return fetch_unpinned(name, folder, source["url"], again)
    twins = [folder.parent / other for other in SETS if SETS[other].get("url") == source["url"]]
    for path in (twin / "input.txt" for twin in [folder, *twins]):
        if path.is_file():
            if (found := sha256(path)) != source["sha256"]:
                raise UserError(f"{path} has SHA-256 {found[:12]}..., the text of {name} has {source['sha256'][:12]}...: remove "
                     f"it, or prepare your own text with python prepare.py {path} --name=NAME")
            return path
    if reason := download(source["url"], folder / "input.txt", source["sha256"])[0]:
        raise UserError(f"could not download {source['url']} ({reason}); put that file at {folder / 'input.txt'} by hand and try "
             "again; python train.py, which trains on the embedded fables, needs no network")
    return folder / "input.txt"


def fetch_unpinned(name: str, folder: Path, url: str, again: bool = False) -> Path:
    path = folder / url.rpartition("/")[2]
    if path.is_file() and not again:
        print(f"note     {path} is there, {path.stat().st_size:,} bytes; no SHA-256 of it is known to compare with")
    elif reason := download(url, path)[0]:
        raise UserError(f"could not download {url} ({reason}); put that file at {path} by hand and try again, or take a text of "
             f"your own instead: python prepare.py TEXT --name={name}")
    return path


def prepare_named(name: str, /, data_dir: str = "", **typed):
    """Prepare one of SETS, with its own settings unless others are `typed` (fields of Options)."""
    out = typed.get("name") or name
    if out in SETS and out != name:
        raise UserError(f"name={out} belongs to a named set; choose another")
    settings = {key: value for key, value in SETS[name].items() if key in Options.__dataclass_fields__}
    options = Options(**settings | {key: value for key, value in typed.items() if value != ""} | {"data_dir": data_dir})
    if problems := options.problems():
        raise UserError("; ".join(problems))
    if options.val == "-" or is_address(options.val):
        raise UserError(f"val={options.val}: a named set takes a file")
    folder = data_folder(name, data_dir)
    with hold_folder(folder):
        text = fetch(name, folder, options.force)
        val = expand([options.val], options) if options.val else (
            [fetch_unpinned(name, folder, SETS[name]["val_url"], options.force)] if "val_url" in SETS[name] else [])
    with hold_folder(data_folder(out, data_dir)):
        write_set(data_folder(out, data_dir), [text], options=options, val_sources=val)


def ensure_set(name: str, data_dir: str, ranks) -> Path:
    """The folder of a prepared set. The first of `ranks` prepares a named one that is missing, the others wait."""
    folder = data_folder(name, data_dir)
    if ranks.broadcast(not os.path.isfile(folder / "meta.json")):
        if name not in SETS:
            raise UserError(f"no data set in {folder}: python prepare.py YOUR_TEXT_FILE --name={name} makes it; the named sets "
                 f"are {', '.join(SETS)}")
        if ranks.first:
            try:
                prepare_named(name, data_dir)
            except OSError as error:
                raise UserError(f"could not prepare {name} in {folder}: {error.strerror or error}")
        ranks.broadcast(None)
    return folder


# -- the split -----------------------------------------------------------------------------------------------------

class Survey:
    """What a first reading of the documents finds out: how many there are, how often each character occurs (when
    `counting`), and of the first MANY their characters (lengths) and seeded hashes, which decide the split."""

    def __init__(self, reader, seed: int = 0, counting: bool = True):
        self.documents = self.characters = self.bytes = 0
        self.counts = np.zeros(sys.maxunicode + 1, np.int64)
        self.lengths, self.hashes = [], []
        for number, begins, piece, raw in reader:
            if begins:
                self.documents += 1
                if number < MANY:
                    self.lengths.append(0)
                    self.hashes.append(seeded_hash(raw, seed))
            if number < MANY:
                self.lengths[number] += len(piece)
            self.characters += len(piece)
            self.bytes += len(raw)
            if not counting:
                continue
            found = np.bincount(np.frombuffer(raw, np.uint8) if len(raw) == len(piece) else code_points(piece))
            self.counts[:found.size] += found

    def seen(self, least: int = 1) -> str:
        """The characters that occur at least so many times, sorted."""
        return "".join(map(chr, np.flatnonzero(self.counts >= least)))


def seeded_hash(text: bytes, seed: int) -> int:
    """A number below 2**64 that depends on the text alone, so that a document that occurs twice is not learned in train
    and met again in val."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def split_documents(reader, survey: Survey, val_fraction: float, seed: int = 0):
    """Yield (split, the document's number, piece) for the reader's pieces. A single text is cut near its end, at
    character int(characters * (1 - val_fraction)); so is each of a few. With at least 1/val_fraction documents whole
    ones go to either side: the lowest of their seeded hashes to val, int(documents * val_fraction) of up to MANY (fewer
    if equal texts do not fit in), and of more those below val_fraction of the hashes' range."""
    many = survey.documents > MANY
    whole = val_fraction and survey.documents >= max(2, 1 / val_fraction)
    val, room, same = set(), max(1, int(survey.documents * val_fraction)), {}
    for number, found in enumerate(survey.hashes if whole and not many else ()):
        same.setdefault(found, []).append(number)
    for found in sorted(same):                          # equal texts go to the same side, if there is room for all
        if len(same[found]) <= room:
            room -= len(same[found])
            val.update(same[found])
    at, split = 0, "train"
    for number, begins, piece, raw in reader:
        if whole:
            if begins:
                is_val = seeded_hash(raw, seed) < val_fraction * 2**64 if many else number in val
                split = "val" if is_val else "train"
            yield split, number, piece
            continue
        at = 0 if begins else at
        # Beyond the lengths only with val_fraction=0.
        cut = int(survey.lengths[number] * (1 - val_fraction)) - at if number < len(survey.lengths) else len(piece)
        at += len(piece)
        for split, part in (("train", piece[:max(0, cut)]), ("val", piece[max(0, cut):])):
            if part:
                yield split, number, part


# -- writing -------------------------------------------------------------------------------------------------------



class Bin:
    """The ids of one split, written as they come to SPLIT.bin and, when that is full, to SPLIT_001.bin and so on; with
    the counts and checksums for meta.json. `files` is an ExitStack that publishes them when it closes."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, files: ExitStack):
        self.folder, self.split, self.room, self.files = folder, split, shard_tokens, files
        self.file = files.enter_context(atomic_write(folder / f"{split}.bin"))
        self.open, self.shards = [self.file], [(0, hashlib.sha256())]
        self.tokens = self.characters = self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, ids: np.ndarray):
        while ids.size:
            count, digest = self.shards[-1]
            if count == self.room:
                if len(self.shards) == MOST_SHARDS:
                    raise UserError(f"shard_tokens={self.room} makes more than {MOST_SHARDS} files of {self.split}: raise it")
                self.file = self.files.enter_context(
                    atomic_write(self.folder / f"{self.split}_{len(self.shards):03}.bin"))
                self.open.append(self.file)
                self.shards.append((0, hashlib.sha256()))
                continue
            now, ids = ids[:self.room - count], ids[self.room - count:]
            self.file.write(now)
            digest.update(now)
            self.digest.update(now)
            self.shards[-1] = (count + now.size, digest)
            self.tokens += now.size

    def entry(self) -> dict:
        """What meta.json says of the split."""
        entry = {"tokens": self.tokens, "characters": self.characters, "bytes": self.bytes,
                 "sha256": self.digest.hexdigest()}
        return entry | ({"shards": [{"tokens": count, "sha256": digest.hexdigest()} for count, digest in self.shards]}
                        if len(self.shards) > 1 else {})


def encode_job(tokenizer: Tokenizer, job: list) -> dict:
    """{split: (ids, characters, bytes)} of a worker's share: [(split, end-of-text first, piece)]."""
    done = {}
    for split in dict.fromkeys(split for split, _, _ in job):
        mine = [(joined, piece) for name, joined, piece in job if name == split]
        texts = [piece for _, piece in mine]
        done[split] = (tokenizer.encode_joined(mine), sum(map(len, texts)),
                       sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts))
    return done


def encoded(split_pieces, tokenizer: Tokenizer, eot: bool, workers: int):
    """encode_job's results in order, worked out by threads: tiktoken and numpy let go of the interpreter's lock.
    split_pieces: (split, document, piece). Only a few jobs are held at a time."""
    def jobs():
        job, size, last = [], 0, {}
        for split, number, piece in split_pieces:
            for part in pieces(piece, JOB):
                job.append((split, eot and last.get(split, number) != number, part))
                last[split] = number
                size += len(part)
                if size >= JOB:
                    yield job
                    job, size = [], 0
        if job:
            yield job

    tokenizer.encode("a" if tokenizer.kind == "bpe" else "")       # what it makes on first use is made once
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs():
            waiting.append(pool.submit(encode_job, tokenizer, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sampled(split_pieces, share: float):
    """An evenly spread share of the training text's characters."""
    seen = taken = 0
    for split, _, piece in split_pieces:
        for text in pieces(piece, BOUNDED) if split == "train" else ():
            if taken <= seen * share:
                taken += len(text)
                yield text
            seen += len(text)


def char_tokenizer(survey: Survey, options: Options) -> Tokenizer:
    """The tokenizer of the characters that occur often enough; what becomes of the rare ones is said."""
    tokenizer = Tokenizer.build("char", survey.seen(options.min_count))
    rare = sorted(set(survey.seen()) - set(survey.seen(options.min_count)))
    if rare:
        times = int(survey.counts[list(map(ord, rare))].sum())
        some = " ".join(map(repr, rare[:10])) + (" ..." if len(rare) > 10 else "")
        if options.rare == "refuse":
            raise UserError(f"{len(rare):,} characters occur less than min_count={options.min_count} times ({some}): remove them, "
                 "lower --min_count, or let --rare=bytes spell them in bytes")
        print(f"note     {len(rare):,} rare characters ({times:,} times in all) are spelled in bytes: {some}")
        tokenizer = Tokenizer(tokenizer.stored | {"bytes": True})
    if len(tokenizer.stored["chars"]) > 1000:
        print(f"note     {len(tokenizer.stored['chars']):,} different characters are a large vocabulary of mostly "
              "rare tokens: --tokenizer=bpe:4096 learns a smaller one from this text"
              + (", --min_count=5 spells rare characters in bytes" if options.min_count == 1 else ""))
    return tokenizer


def unchanged(folder: Path, wanted: dict, tokenizer_name: str, tokenizer: Tokenizer | None) -> bool:
    """Whether `folder` holds a whole set made of the same inputs in the same way."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        stored, size = meta["tokenizer"], np.dtype(meta["dtype"]).itemsize
        same = stored == tokenizer.stored if tokenizer else tokenizer_name == stored.get("name", stored["kind"])
        return same and all(meta.get(key) == value for key, value in wanted.items()) and all(
            (folder / name).stat().st_size == tokens * size
            for split in SPLITS for name, tokens, _ in split_files(meta, split))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_set(folder: Path, paths: list, tokenizer_name: str = "", val_fraction: float = 0.1,
              options: Options | None = None, val_sources: list = ()) -> dict:
    """Tokenize the files `paths` into `folder`; returns what meta.json says. Each file is one document, or as many as
    its rows or separators make; documents are joined by the end-of-text token where the tokenizer has one. options
    replaces tokenizer_name and val_fraction; val_sources: files for validation alone."""
    options = options or Options(tokenizer=tokenizer_name, val_fraction=val_fraction)
    name = options.tokenizer or "char"
    tokenizer = None if name == "char" or bpe_size(name) else Tokenizer.build(name, "", options.pattern)
    wanted = {"val_fraction": options.val_fraction,
              "sources": [describe_source(path, options.limit) for path in paths],
              "val_sources": [describe_source(path, options.limit) for path in val_sources] or None,
              "options": options.remembered() or None}
    if not options.force and unchanged(folder, wanted, name, tokenizer):
        print(f"{folder}: nothing has changed since it was prepared (--force prepares it again)", flush=True)
        return read_meta(folder)
    twice = {}
    for path, source in zip([*paths, *val_sources], wanted["sources"] + (wanted["val_sources"] or []), strict=True):
        if source["bytes"] and (other := twice.setdefault(source["sha256"], path)) is not path:
            print(f"note     {path} and {other} have the same content; both are taken")

    reader, val_reader = Reader(paths, options), Reader(val_sources, options)
    survey = Survey(reader, options.seed, name == "char")
    texts = Survey(val_reader, options.seed, name == "char") if val_sources else None
    for kind, found in (("text", survey), ("validation text", texts)):
        if found and not found.characters:
            raise UserError(f"{', '.join(map(str, paths if kind == 'text' else val_sources))}: no {kind} in there")
    if empty := reader.empty + val_reader.empty:
        print(f"note     {empty:,} empty documents are passed over")
    fraction = 0 if val_sources else options.val_fraction

    def split():
        """The pieces once more, from the files."""
        yield from split_documents(reader, survey, fraction, options.seed)
        yield from (("val", number, piece) for number, _, piece, _ in val_reader)

    if texts:
        survey.counts += texts.counts
    if name == "char":
        tokenizer = char_tokenizer(survey, options)
    elif tokenizer is None:
        reader.what = "training the tokenizer on"
        tokenizer = train_bpe(name, sampled(split(), options.bpe_sample / survey.characters),
                                options.pattern or PATTERN)
    reader.what = val_reader.what = "tokenizing"
    dtype, used = token_dtype(tokenizer.vocab_size), np.zeros(tokenizer.vocab_size, bool)

    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.bin.tmp"):               # by a prepare that was killed
        left.unlink()
    with ExitStack() as files:
        bins = {split: Bin(folder, split, options.shard_tokens, files) for split in SPLITS}
        try:
            joined = options.eot and tokenizer.eot is not None
            for done in encoded(split(), tokenizer, joined, options.workers or cores()):
                for part, (ids, characters, size) in done.items():
                    bins[part].write(ids)
                    bins[part].characters += characters
                    bins[part].bytes += size
                    used[ids] = True
        except ValueError as error:
            raise UserError(f"{', '.join(map(str, paths))}: {error}")
        splits = {split: bins[split].entry() for split in SPLITS}
        for file in [file for split in SPLITS for file in bins[split].open]:
            file.flush()
            os.fsync(file.fileno())
        # All new files are complete on the disk from here on. Without meta.json there is no set, so a kill between
        # the renames leaves none rather than a mixture.
        (folder / "meta.json").unlink(missing_ok=True)
    meta = {"format": 1, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "val_fraction": options.val_fraction,
            "splits": splits, "tokenizer": tokenizer.stored,
            **{key: value for key, value in wanted.items() if key != "val_fraction" and value is not None}}
    publish(folder, meta)
    report(folder, meta, name, len(survey.seen()), float(used.mean()))
    if not val_sources and survey.documents >= max(2, 1 / (fraction or 1)) and fraction:
        print(f"  {survey.documents:,} documents, {fraction:.1%} of them in val by a seeded hash")
    return meta


def publish(folder: Path, meta: dict):
    """Make the .bin files in `folder` the set that `meta` describes."""
    names = [name for split in SPLITS for name, _, _ in split_files(meta, split)]
    for split in SPLITS:
        if f"{split}_000.bin" in names:
            os.replace(folder / f"{split}.bin", folder / f"{split}_000.bin")
        for path in folder.glob(f"{split}*.bin"):       # shards of an older set
            if path.name not in names and path.name[len(split):-4].removeprefix("_").isdecimal() | (
                    path.name == f"{split}.bin"):
                path.unlink()
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, ensure_ascii=False, indent=1).encode("utf-8"))


def report(folder: Path, meta: dict, tokenizer_name: str, distinct: int, used: float):
    """Say what was written."""
    splits = meta["splits"]
    characters, size, tokens = (sum(splits[split][key] for split in SPLITS)
                                for key in ("characters", "bytes", "tokens"))
    files = {split: f"{split}.bin" if "shards" not in splits[split] else
             f"{split}_000.bin to _{len(splits[split]['shards']) - 1:03}.bin" for split in SPLITS}
    print(f"{folder}: {characters:,} characters" + (f", {distinct:,} distinct" if distinct else "") + "\n  " +
          ", ".join(f"{files[split]} {splits[split]['tokens']:,} tokens" for split in SPLITS) + f", {meta['dtype']}\n"
          f"  tokenizer {tokenizer_name}: {meta['vocab_size']:,} tokens in the vocabulary, {used:.1%} of them used, "
          f"{size / tokens:.2f} bytes per token", flush=True)
    for split, way_out in (("train", "bring more text"), ("val", "raise --val_fraction or give --val")):
        if not splits[split]["tokens"]:
            print(f"note     {split} is empty, and train.py needs both: {way_out}")


# -- sets that are there ---------------------------------------------------------------------------------------------



def chunks(path: Path, dtype: str):
    """A .bin file's ids, a few megabytes at a time."""
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, dtype, 1 << 20)).size:
            yield ids


def text_sizes(tokenizer: Tokenizer) -> dict:
    """How many characters and bytes of the text each id stands for; end-of-text stands for none."""
    text = np.arange(tokenizer.vocab_size) != (-1 if tokenizer.eot is None else tokenizer.eot)
    begin = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokenizer.pieces])    # characters
    return {"characters": begin * text, "bytes": tokenizer.lengths * text}


def check_set(folder: Path):
    """Read a whole set and compare it with its meta.json."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    sizes = text_sizes(tokenizer)
    for split in SPLITS:
        open_split(folder, meta, split)                 # checks the files' sizes
        counted = dict.fromkeys(sizes, 0)
        for name, tokens, expected in split_files(meta, split):
            digest, first = hashlib.sha256(), ()
            for ids in chunks(folder / name, meta["dtype"]):
                check_ids(ids, meta["vocab_size"], split)
                digest.update(ids)
                first = first if len(first) else ids[:30]
                for what, size in sizes.items():
                    counted[what] += int(size[ids].sum())
            if digest.hexdigest() != expected:
                raise UserError(f"{folder / name} differs from its checksum in meta.json: prepare {folder.name} again")
            print(f"{folder}/{name}: {tokens:,} tokens of {meta['dtype']}, as meta.json says; "
                  f"it begins {tokenizer.decode(first)[:60]!r}")
        for what, count in counted.items():
            if count != (said := meta["splits"][split].get(what)):
                raise UserError(f"{folder / 'meta.json'} says {said} {what} of {split}, its ids stand for {count:,}: prepare "
                     f"{folder.name} again")


def decode_set(folder: Path):
    """Write a set's text, train and then val, to standard output as the bytes that were read."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    for split in SPLITS:
        open_split(folder, meta, split)
        for name, _, _ in split_files(meta, split):
            for ids in chunks(folder / name, meta["dtype"]):
                check_ids(ids, meta["vocab_size"], split)
                sys.stdout.buffer.write(b"".join(map(tokenizer.pieces.__getitem__, ids.tolist())))
    sys.stdout.buffer.flush()


def adopt_set(folder: Path, options: Options):
    """Write the meta.json of a folder that holds nanoGPT's train.bin and val.bin (uint16, without a header)."""
    if (folder / "meta.json").is_file() and not options.force:
        raise UserError(f"{folder} has a meta.json already: python prepare.py --check {folder.resolve().name} "
             f"--data_dir={folder.resolve().parent} (--force writes it again)")
    if options.tokenizer in ("", "char") or bpe_size(options.tokenizer):
        raise UserError(f"tokenizer={options.tokenizer}: name the one that made the ids, such as --tokenizer=gpt2; ids of "
             "characters or of a BPE trained elsewhere say nothing without it (prepare the text again)")
    tokenizer = Tokenizer.build(options.tokenizer, "", options.pattern)
    if token_dtype(tokenizer.vocab_size) != np.uint16:
        raise UserError(f"nanoGPT's ids are uint16, those of {options.tokenizer} are {token_dtype(tokenizer.vocab_size)}: prepare "
             "the text again")
    sizes, splits, used = text_sizes(tokenizer), {}, np.zeros(tokenizer.vocab_size, bool)
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size % 2:
            raise UserError(f"{path} is missing, or no array of uint16")
        entry, digest = dict(tokens=path.stat().st_size // 2, characters=0, bytes=0), hashlib.sha256()
        for chunk in chunks(path, "uint16"):
            check_ids(chunk, tokenizer.vocab_size, split)
            for what, size in sizes.items():
                entry[what] += int(size[chunk].sum())
            digest.update(chunk)
            used[chunk] = True
        splits[split] = entry | {"sha256": digest.hexdigest()}
    total = sum(entry["tokens"] for entry in splits.values())
    if not total:
        raise UserError(f"{folder}: no tokens in there")
    meta = {"format": 1, "dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": splits,
            "val_fraction": splits["val"]["tokens"] / total, "tokenizer": tokenizer.stored, "sources": []}
    publish(folder, meta)
    report(folder, meta, options.tokenizer, 0, float(used.mean()))
    begins = tokenizer.decode(np.fromfile(folder / "train.bin", np.uint16, 30))[:60]
    print(f"  it begins {begins!r}: if that is no text, the ids are another tokenizer's\n"
          f"  python train.py --dataset={folder.resolve().name} --data_dir={folder.resolve().parent}")


# -- the command -----------------------------------------------------------------------------------------------------

def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words")
    try:
        prepare_or_check(parsed)
    except BrokenPipeError:             # run's matter: whoever read the text has seen enough
        raise
    except OSError as error:            # a full disk, a name too long, a file where a folder should be
        raise UserError(f"{error.filename or 'could not write'}: {error.strerror or error}")


def prepare_or_check(parsed):
    options = Options(**parsed.values)
    options.separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    if problems := options.problems():
        raise UserError("; ".join(problems))
    if not parsed.words:
        raise UserError(f"name a set ({', '.join(SETS)}) or text files; see --help")
    for word in parsed.words if options.check or options.decode or options.adopt else ():
        if options.adopt:
            adopt_set(Path(word), options)
        elif options.check:
            check_set(data_folder(word, options.data_dir))
        else:
            decode_set(data_folder(word, options.data_dir))
    if options.check or options.decode or options.adopt:
        return
    first, words = parsed.words[0], parsed.words
    typed = {name: getattr(options, name) for name in parsed.values}
    if len(words) == 1 and first in SETS and not Path(first).is_file():
        prepare_named(first, **typed)
        return
    if "-" in words and options.val == "-":
        raise UserError("standard input is one text: INPUT or --val, not both")
    for word in words:
        if not (word == "-" or is_address(word) or os.path.exists(word) or set("*?[") & set(word)):
            raise UserError(f"no file {word}; the named sets are {', '.join(SETS)}")
    name = options.name or plain_name(first)
    if not options.name and (len(words) > 1 or not NAME.fullmatch(name) or name in SETS):
        raise UserError(f"give the set a name: python prepare.py {' '.join(words)} --name=NAME")
    if name in SETS and ("url" not in SETS[name] or "sha256" in SETS[name]):
        raise UserError(f"name={name} belongs to a named set; choose another")
    if name in SETS:                    # a set without a text of its own that is known byte for byte
        options = Options(**{key: value for key, value in SETS[name].items() if key in Options.__dataclass_fields__}
                          | typed)
    folder = data_folder(name, options.data_dir)
    with ExitStack() as spooled:
        def files(words: list) -> list:
            found = []
            for word in words:
                if word == "-":
                    found.append(spool(folder))
                    spooled.callback(found[-1].unlink, missing_ok=True)
                else:
                    found.append(fetch_address(word, folder, options.force) if is_address(word) else word)
            return expand(found, options)

        spooled.enter_context(hold_folder(folder))
        write_set(folder, files(words), options=options, val_sources=files([options.val] if options.val else []))


if __name__ == "__main__":
    run(main)
