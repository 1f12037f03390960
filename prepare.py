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

import base64
import codecs
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from support import runtime, sources
from support.cli import fail, parse, run
from support.runtime import NAME, ROOT, check_ids, data_folder, open_split, read_meta, sha256, token_dtype, written

END_OF_TEXT = "<|endoftext|>"
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
# The pattern of GPT-4's cl100k_base in plain form: contractions, words with what precedes them, numbers of up to three
# digits, punctuation, white space. Tokens are merged within its matches only.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")
BOUNDED = 1 << 16                       # characters that a BPE encodes at once: unbroken runs cost more than their size
JOB = 1 << 18                           # characters that a worker encodes at once
MANY = 10_000                           # documents up to which the share that goes to val is exact
MOST_TOKENS = 1 << 24                   # in a vocabulary; what a damaged file says shall not fill the memory
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

class Tokenizer:
    """Text to token ids and back. `Tokenizer.build(name, text)` makes one, `Tokenizer(stored)` restores it from the
    plain dict `stored`, which meta.json and every checkpoint carry, so that no file or network is needed to decode.

    vocab_size: number of ids, special tokens included. eot: the end-of-text id, or None.
    """

    def __init__(self, stored: dict):
        self.stored, self.kind, self.eot = stored, stored.get("kind"), None
        if self.kind == "byte":
            self.pieces = [bytes([value]) for value in range(256)]
        elif self.kind == "char":
            self.pieces = [char.encode("utf-8") for char in stored["chars"]]
            self.fallback = len(self.pieces) if stored.get("bytes") else None      # id of byte 0
            if self.fallback is not None:
                self.pieces += [bytes([value]) for value in range(256)]
            self.ids = np.full(sys.maxunicode + 1, -1, np.int32)
            self.ids[_code_points(stored["chars"])] = np.arange(len(stored["chars"]))
        elif self.kind == "bpe":
            ranks = {base64.b64decode(token): int(rank) for token, rank in
                     (line.split() for line in stored["ranks"].splitlines())}
            special = {text: int(value) for text, value in stored["special"].items()}
            ids = [*ranks.values(), *special.values()]
            if not all(isinstance(stored[key], str) for key in ("name", "pattern")):
                raise TypeError("its name or pattern is no text")
            if len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < MOST_TOKENS:
                raise ValueError(f"its ids are not different numbers below {MOST_TOKENS:,}")
            if any(bytes([value]) not in ranks for value in range(256)):
                raise ValueError("a single byte has no id")
            self.bpe = dict(name=stored["name"], pat_str=stored["pattern"], mergeable_ranks=ranks,
                            special_tokens=special)
            self.eot = special.get(END_OF_TEXT)
            self.pieces = [b""] * (1 + max([*ranks.values(), *special.values()]))   # unused ids decode to nothing
            for token, rank in [*ranks.items(), *((text.encode(), value) for text, value in special.items())]:
                self.pieces[rank] = token
        else:
            raise ValueError(f"unknown tokenizer kind {self.kind!r}")
        self.vocab_size = len(self.pieces)

    @classmethod
    def build(cls, name: str, text: str = "", pattern: str = "") -> "Tokenizer":
        """char: the sorted distinct characters of `text`; byte: the 256 bytes; else the name of a tiktoken encoding, a
        .tiktoken file, or a meta.json or checkpoint (.pt) whose tokenizer is taken."""
        if name == "char":
            return cls({"kind": "char", "chars": "".join(map(chr, np.unique(_code_points(text))))})
        if name == "byte":
            return cls({"kind": "byte"})
        if os.path.basename(name) == "meta.json":
            return stored_tokenizer(Path(name).parent, read_meta(Path(name).parent))
        if name.endswith(".pt"):
            return cls(runtime.load_checkpoint(Path(name))["tokenizer"])
        try:
            import tiktoken
        except ImportError:
            fail(f"tokenizer={name} needs tiktoken (pip install tiktoken); char and byte need nothing")
        if name.endswith(".tiktoken"):
            return cls(_tiktoken_file(Path(name), pattern or PATTERN))
        if name not in tiktoken.list_encoding_names():
            fail(f"tokenizer={name!r} is none of: char, byte, bpe:VOCAB, FILE.tiktoken, FOLDER/meta.json, ckpt.pt, "
                 f"{', '.join(tiktoken.list_encoding_names())}")
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:      # whatever its download raises
            fail(f"tiktoken could not load {name} ({type(error).__name__}), which it downloads once: try again with a "
                 "network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=char or byte")
        return cls({"kind": "bpe", "name": name, "pattern": encoding._pat_str,
                    "ranks": _rank_lines(encoding._mergeable_ranks), "special": dict(encoding._special_tokens)})

    @cached_property
    def encoding(self):
        """tiktoken's encoder, made when there is something to encode: decoding needs no tiktoken."""
        try:
            import tiktoken
        except ImportError:
            fail(f"the tokenizer {self.bpe['name']} needs tiktoken to read text: pip install tiktoken")
        # tiktoken panics where a pattern matches the empty text, unless that is a token; _complete refuses it.
        ranks = self.bpe["mergeable_ranks"] | {b"": self.vocab_size}
        try:
            return tiktoken.Encoding(**self.bpe | dict(mergeable_ranks=ranks))
        except ValueError as error:
            fail(f"pattern={self.bpe['pat_str']} is no regular expression: {error}")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each id's text."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, in the smallest type that holds the vocabulary. Text that looks like a special token stays
        text. A BPE sees at most 65,536 characters at once, cut where a word ends (sources.border); only a longer run
        without such a place gives other ids than the whole would. Raises ValueError naming the characters that the
        tokenizer lacks."""
        dtype = token_dtype(self.vocab_size)
        try:
            raw = text.encode("utf-8")
            if self.kind == "byte":
                return np.frombuffer(raw, np.uint8)
            if self.kind == "bpe":
                parts = [self.encoding.encode_to_numpy(piece, disallowed_special=())
                         for piece in sources.pieces(text, BOUNDED)]
                ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
                return self._complete(ids, text)
            points = np.frombuffer(raw, np.uint8) if len(raw) == len(text) else _code_points(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {text[error.start]!r} at {error.start}") from None
        ids = self.ids[points]
        if not ids.size or ids.min() >= 0:
            return ids.astype(dtype)
        if self.fallback is not None:
            return self._with_bytes(ids, text).astype(dtype)
        unknown = sorted({char for char, known in zip(text, ids >= 0, strict=True) if not known})
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"the tokenizer has no {' '.join(map(repr, unknown[:10]))}{more}; it was built from a "
                         f"text with {self.vocab_size} different characters")

    def encode_joined(self, texts: list) -> np.ndarray:
        """Ids of [(whether the end-of-text token comes first, text)], one after another."""
        dtype = token_dtype(self.vocab_size)
        joined = "".join(END_OF_TEXT * first + text for first, text in texts)
        if len(texts) > 1 and self.eot is not None and all(first for first, _ in texts[1:]) and not any(
                END_OF_TEXT in text or len(text) > BOUNDED for _, text in texts):
            # One call for many short documents: each return from tiktoken waits for the interpreter's lock.
            ids = self.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
            return self._complete(ids, joined)
        eot = np.array([self.eot or 0], dtype)
        return np.concatenate([part for first, text in texts
                               for part in ((eot, self.encode(text)) if first else (self.encode(text),))])

    def _complete(self, ids: np.ndarray, text: str) -> np.ndarray:
        """`ids` in the smallest type, if they spell all of `text`."""
        if ids.size and int(ids.max()) == self.vocab_size:
            raise ValueError(f"the pattern of the tokenizer {self.bpe['name']} matches the empty text")
        if int(self.lengths[ids].sum()) != (len(text) if text.isascii() else len(text.encode("utf-8"))):
            raise ValueError(f"the pattern of the tokenizer {self.bpe['name']} leaves out some of the text: "
                             r"let it end with |[\s\S]")
        return ids.astype(token_dtype(self.vocab_size))

    def _with_bytes(self, ids: np.ndarray, text: str) -> np.ndarray:
        """`ids` with each -1 replaced by the ids of the bytes of that character."""
        rare = np.flatnonzero(ids < 0)
        spelled = [np.frombuffer(text[at].encode("utf-8"), np.uint8) + np.int32(self.fallback) for at in rare]
        sizes = np.ones(ids.size, np.int64)
        sizes[rare] = [part.size for part in spelled]
        spread = np.repeat(ids, sizes)
        spread[spread < 0] = np.concatenate(spelled)
        return spread

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like encode, but never empty: an empty prompt becomes the end-of-text token, a line break, or id 0."""
        if text:
            return self.encode(text)
        if self.eot is not None:
            return np.array([self.eot], token_dtype(self.vocab_size))
        newline = self.pieces.index(b"\n") if b"\n" in self.pieces else 0
        return np.array([newline], token_dtype(self.vocab_size))

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that form no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[value] for value in ids).decode("utf-8", "replace")

    def stream(self):
        """A function from one id to the text that it completes: a character spread over several tokens is held back
        until it is whole. Called with None it gives what is left."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda value: decoder.decode(b"" if value is None else self.pieces[value], final=value is None)


def prompt_ids(tokenizer: Tokenizer, text: str, flag: str) -> np.ndarray:
    """Ids (T,) in int64 of the prompt that the user gave with `flag`, or one line that says what is wrong with it."""
    try:
        return tokenizer.encode_prompt(text).astype(np.int64)
    except ValueError as error:
        fail(f"{flag}={text!r}: {error}" if len(text) < 40 else f"{flag}: {error}")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _rank_lines(ranks: dict) -> str:
    """tiktoken's own form: a line per token, its bytes in base64 and its rank."""
    return "\n".join(f"{base64.b64encode(token).decode()} {rank}"
                     for token, rank in sorted(ranks.items(), key=lambda item: item[1]))


def _tiktoken_file(path: Path, pattern: str) -> dict:
    """What Tokenizer stores, from a file of ranks; the end-of-text token takes the next id."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror or error}")
    except ValueError as error:
        fail(f"{path} is no tiktoken file, whose lines hold a token in base64 and its rank: {error}")
    if len(set(ranks.values())) < len(ranks) or any(bytes([value]) not in ranks for value in range(256)):
        fail(f"{path} is no tiktoken file: two tokens have one rank, or a single byte has none")
    return {"kind": "bpe", "name": path.stem, "pattern": pattern, "ranks": _rank_lines(ranks),
            "special": {END_OF_TEXT: max(ranks.values()) + 1}}


def vocabulary(tokenizer: str) -> int:
    """VOCAB of bpe:VOCAB, or 0."""
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe":
        return 0
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 20:
        fail(f"tokenizer={tokenizer} must be bpe:VOCAB with a VOCAB from 257 (the bytes and the end-of-text token) to "
             "1,048,576")
    return int(size)


def trained_bpe(name: str, texts, pattern: str) -> Tokenizer:
    """A byte-pair encoding (Sennrich et al. 2016) trained on `texts` by rustbpe: VOCAB - 1 tokens, or fewer when the
    text offers no more pairs, and the end-of-text token."""
    try:
        import rustbpe
    except ImportError:
        fail(f"tokenizer={name} needs rustbpe to be trained: pip install rustbpe (the set then needs it no more)")
    trainer, size = rustbpe.Tokenizer(), vocabulary(name)
    try:
        # Its buffer counts texts; those here have up to 65,536 characters each.
        trainer.train_from_iterator(texts, size - 1, buffer_size=64, pattern=pattern)
    except ValueError as error:
        fail(f"pattern={pattern} is no regular expression: {error}")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        print(f"note     the text offers {len(ranks) - 256:,} merges: the vocabulary has {len(ranks) + 1:,} tokens, "
              f"not {size:,}")
    return Tokenizer({"kind": "bpe", "name": name, "pattern": pattern, "ranks": _rank_lines(ranks),
                      "special": {END_OF_TEXT: len(ranks)}})


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
                fail(f"{path} has SHA-256 {found[:12]}..., the text of {name} has {source['sha256'][:12]}...: remove "
                     f"it, or prepare your own text with python prepare.py {path} --name=NAME")
            return path
    if reason := sources.download(source["url"], folder / "input.txt", source["sha256"])[0]:
        fail(f"could not download {source['url']} ({reason}); put that file at {folder / 'input.txt'} by hand and try "
             "again; python train.py, which trains on the embedded fables, needs no network")
    return folder / "input.txt"


def fetch_unpinned(name: str, folder: Path, url: str, again: bool = False) -> Path:
    path = folder / url.rpartition("/")[2]
    if path.is_file() and not again:
        print(f"note     {path} is there, {path.stat().st_size:,} bytes; no SHA-256 of it is known to compare with")
    elif reason := sources.download(url, path)[0]:
        fail(f"could not download {url} ({reason}); put that file at {path} by hand and try again, or take a text of "
             f"your own instead: python prepare.py TEXT --name={name}")
    return path


def prepare_named(name: str, /, data_dir: str = "", **typed):
    """Prepare one of SETS, with its own settings unless others are `typed` (fields of Options)."""
    out = typed.get("name") or name
    if out in SETS and out != name:
        fail(f"name={out} belongs to a named set; choose another")
    settings = {key: value for key, value in SETS[name].items() if key in Options.__dataclass_fields__}
    options = Options(**settings | {key: value for key, value in typed.items() if value != ""} | {"data_dir": data_dir})
    if problems := options.problems():
        fail("; ".join(problems))
    if options.val == "-" or sources.is_address(options.val):
        fail(f"val={options.val}: a named set takes a file")
    folder = data_folder(name, data_dir)
    with alone(folder):
        text = fetch(name, folder, options.force)
        val = sources.expand([options.val], options) if options.val else (
            [fetch_unpinned(name, folder, SETS[name]["val_url"], options.force)] if "val_url" in SETS[name] else [])
    with alone(data_folder(out, data_dir)):
        write_set(data_folder(out, data_dir), [text], options=options, val_sources=val)


def ensure_set(name: str, data_dir: str, ranks) -> Path:
    """The folder of a prepared set. The first of `ranks` prepares a named one that is missing, the others wait."""
    folder = data_folder(name, data_dir)
    if ranks.tell(not os.path.isfile(folder / "meta.json")):
        if name not in SETS:
            fail(f"no data set in {folder}: python prepare.py YOUR_TEXT_FILE --name={name} makes it; the named sets "
                 f"are {', '.join(SETS)}")
        if ranks.first:
            try:
                prepare_named(name, data_dir)
            except OSError as error:
                fail(f"could not prepare {name} in {folder}: {error.strerror or error}")
        ranks.tell(None)
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
            found = np.bincount(np.frombuffer(raw, np.uint8) if len(raw) == len(piece) else _code_points(piece))
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

@contextmanager
def alone(folder: Path):
    """Hold a set's folder: another process that prepares the same set waits. A folder that stays empty goes again."""
    held = runtime.lock(folder, wait=True)
    try:
        yield
    finally:
        held.close()
        if os.listdir(folder) == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)


class Bin:
    """The ids of one split, written as they come to SPLIT.bin and, when that is full, to SPLIT_001.bin and so on; with
    the counts and checksums for meta.json. `files` is an ExitStack that publishes them when it closes."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, files: ExitStack):
        self.folder, self.split, self.room, self.files = folder, split, shard_tokens, files
        self.file = files.enter_context(written(folder / f"{split}.bin"))
        self.open, self.shards = [self.file], [(0, hashlib.sha256())]
        self.tokens = self.characters = self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, ids: np.ndarray):
        while ids.size:
            count, digest = self.shards[-1]
            if count == self.room:
                if len(self.shards) == MOST_SHARDS:
                    fail(f"shard_tokens={self.room} makes more than {MOST_SHARDS} files of {self.split}: raise it")
                self.file = self.files.enter_context(
                    written(self.folder / f"{self.split}_{len(self.shards):03}.bin"))
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


def encoded(pieces, tokenizer: Tokenizer, eot: bool, workers: int):
    """encode_job's results in order, worked out by threads: tiktoken and numpy let go of the interpreter's lock.
    pieces: (split, document, piece). Only a few jobs are held at a time."""
    def jobs():
        job, size, last = [], 0, {}
        for split, number, piece in pieces:
            for part in sources.pieces(piece, JOB):
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


def sampled(pieces, share: float):
    """An evenly spread share of the training text's characters."""
    seen = taken = 0
    for split, _, piece in pieces:
        for text in sources.pieces(piece, BOUNDED) if split == "train" else ():
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
            fail(f"{len(rare):,} characters occur less than min_count={options.min_count} times ({some}): remove them, "
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
            for split in SPLITS for name, tokens, _ in runtime.split_files(meta, split))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_set(folder: Path, paths: list, tokenizer_name: str = "", val_fraction: float = 0.1,
              options: Options | None = None, val_sources: list = ()) -> dict:
    """Tokenize the files `paths` into `folder`; returns what meta.json says. Each file is one document, or as many as
    its rows or separators make; documents are joined by the end-of-text token where the tokenizer has one. options
    replaces tokenizer_name and val_fraction; val_sources: files for validation alone."""
    options = options or Options(tokenizer=tokenizer_name, val_fraction=val_fraction)
    name = options.tokenizer or "char"
    tokenizer = None if name == "char" or vocabulary(name) else Tokenizer.build(name, "", options.pattern)
    wanted = {"val_fraction": options.val_fraction,
              "sources": [sources.described(path, options.limit) for path in paths],
              "val_sources": [sources.described(path, options.limit) for path in val_sources] or None,
              "options": options.remembered() or None}
    if not options.force and unchanged(folder, wanted, name, tokenizer):
        print(f"{folder}: nothing has changed since it was prepared (--force prepares it again)", flush=True)
        return read_meta(folder)
    twice = {}
    for path, source in zip([*paths, *val_sources], wanted["sources"] + (wanted["val_sources"] or []), strict=True):
        if source["bytes"] and (other := twice.setdefault(source["sha256"], path)) is not path:
            print(f"note     {path} and {other} have the same content; both are taken")

    reader, val_reader = sources.Reader(paths, options), sources.Reader(val_sources, options)
    survey = Survey(reader, options.seed, name == "char")
    texts = Survey(val_reader, options.seed, name == "char") if val_sources else None
    for kind, found in (("text", survey), ("validation text", texts)):
        if found and not found.characters:
            fail(f"{', '.join(map(str, paths if kind == 'text' else val_sources))}: no {kind} in there")
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
        tokenizer = trained_bpe(name, sampled(split(), options.bpe_sample / survey.characters),
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
            fail(f"{', '.join(map(str, paths))}: {error}")
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
    names = [name for split in SPLITS for name, _, _ in runtime.split_files(meta, split)]
    for split in SPLITS:
        if f"{split}_000.bin" in names:
            os.replace(folder / f"{split}.bin", folder / f"{split}_000.bin")
        for path in folder.glob(f"{split}*.bin"):       # shards of an older set
            if path.name not in names and path.name[len(split):-4].removeprefix("_").isdecimal() | (
                    path.name == f"{split}.bin"):
                path.unlink()
    with written(folder / "meta.json") as file:
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

def stored_tokenizer(folder: Path, meta: dict) -> Tokenizer:
    """The tokenizer in a set's meta.json, or one line."""
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, vocab_size={meta['vocab_size']}")
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        fail(f"{folder / 'meta.json'} holds no usable tokenizer ({type(error).__name__}: {error}): "
             f"prepare {folder.name} again")


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
        for name, tokens, expected in runtime.split_files(meta, split):
            digest, first = hashlib.sha256(), ()
            for ids in chunks(folder / name, meta["dtype"]):
                check_ids(ids, meta["vocab_size"], split)
                digest.update(ids)
                first = first if len(first) else ids[:30]
                for what, size in sizes.items():
                    counted[what] += int(size[ids].sum())
            if digest.hexdigest() != expected:
                fail(f"{folder / name} differs from its checksum in meta.json: prepare {folder.name} again")
            print(f"{folder}/{name}: {tokens:,} tokens of {meta['dtype']}, as meta.json says; "
                  f"it begins {tokenizer.decode(first)[:60]!r}")
        for what, count in counted.items():
            if count != (said := meta["splits"][split].get(what)):
                fail(f"{folder / 'meta.json'} says {said} {what} of {split}, its ids stand for {count:,}: prepare "
                     f"{folder.name} again")


def decode_set(folder: Path):
    """Write a set's text, train and then val, to standard output as the bytes that were read."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    for split in SPLITS:
        open_split(folder, meta, split)
        for name, _, _ in runtime.split_files(meta, split):
            for ids in chunks(folder / name, meta["dtype"]):
                check_ids(ids, meta["vocab_size"], split)
                sys.stdout.buffer.write(b"".join(map(tokenizer.pieces.__getitem__, ids.tolist())))
    sys.stdout.buffer.flush()


def adopt_set(folder: Path, options: Options):
    """Write the meta.json of a folder that holds nanoGPT's train.bin and val.bin (uint16, without a header)."""
    if (folder / "meta.json").is_file() and not options.force:
        fail(f"{folder} has a meta.json already: python prepare.py --check {folder.resolve().name} "
             f"--data_dir={folder.resolve().parent} (--force writes it again)")
    if options.tokenizer in ("", "char") or vocabulary(options.tokenizer):
        fail(f"tokenizer={options.tokenizer}: name the one that made the ids, such as --tokenizer=gpt2; ids of "
             "characters or of a BPE trained elsewhere say nothing without it (prepare the text again)")
    tokenizer = Tokenizer.build(options.tokenizer, "", options.pattern)
    if token_dtype(tokenizer.vocab_size) != np.uint16:
        fail(f"nanoGPT's ids are uint16, those of {options.tokenizer} are {token_dtype(tokenizer.vocab_size)}: prepare "
             "the text again")
    sizes, splits, used = text_sizes(tokenizer), {}, np.zeros(tokenizer.vocab_size, bool)
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size % 2:
            fail(f"{path} is missing, or no array of uint16")
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
        fail(f"{folder}: no tokens in there")
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
        fail(f"{error.filename or 'could not write'}: {error.strerror or error}")


def prepare_or_check(parsed):
    options = Options(**parsed.values)
    options.separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    if problems := options.problems():
        fail("; ".join(problems))
    if not parsed.words:
        fail(f"name a set ({', '.join(SETS)}) or text files; see --help")
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
        fail("standard input is one text: INPUT or --val, not both")
    for word in words:
        if not (word == "-" or sources.is_address(word) or os.path.exists(word) or set("*?[") & set(word)):
            fail(f"no file {word}; the named sets are {', '.join(SETS)}")
    name = options.name or sources.plain_name(first)
    if not options.name and (len(words) > 1 or not NAME.fullmatch(name) or name in SETS):
        fail(f"give the set a name: python prepare.py {' '.join(words)} --name=NAME")
    if name in SETS and ("url" not in SETS[name] or "sha256" in SETS[name]):
        fail(f"name={name} belongs to a named set; choose another")
    if name in SETS:                    # a set without a text of its own that is known byte for byte
        options = Options(**{key: value for key, value in SETS[name].items() if key in Options.__dataclass_fields__}
                          | typed)
    folder = data_folder(name, options.data_dir)
    with ExitStack() as spooled:
        def files(words: list) -> list:
            found = []
            for word in words:
                if word == "-":
                    found.append(sources.spool(folder))
                    spooled.callback(found[-1].unlink, missing_ok=True)
                else:
                    found.append(sources.fetched(word, folder, options.force) if sources.is_address(word) else word)
            return sources.expand(found, options)

        spooled.enter_context(alone(folder))
        write_set(folder, files(words), options=options, val_sources=files([options.val] if options.val else []))


if __name__ == "__main__":
    run(main)
