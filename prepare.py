"""Turn raw text into the token files that train.py reads.

    python prepare.py fables                                # embedded in this repository: needs no network
    python prepare.py shakespeare_char                      # tinyshakespeare, one token per character
    python prepare.py shakespeare                           # the same text in GPT-2's tokens
    python prepare.py book.txt --name=book --tokenizer=gpt2 # your own text
    python prepare.py --check book                          # verify a prepared set from end to end

Writes data/NAME/train.bin and val.bin, raw arrays of token ids without a header (uint8 up to 256 different tokens,
uint16 up to 65,536, else uint32), and meta.json with the tokenizer, counts and checksums. The text is split first
and tokenized afterwards, so that no token spans both sides. Files are replaced only when the new ones are complete.
"""

import base64
import codecs
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from support.cli import fail, parse, run
from support.runtime import NAME, ROOT, check_ids, data_folder, open_split, read_meta, sha256, token_dtype, written

END_OF_TEXT = "<|endoftext|>"
SHAKESPEARE = dict(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
SETS = {                                # named sets; one without an address is part of the repository
    "fables": dict(tokenizer="char"),
    "shakespeare_char": dict(tokenizer="char", **SHAKESPEARE),
    "shakespeare": dict(tokenizer="gpt2", **SHAKESPEARE),
}


@dataclass
class Options:
    # -- what to prepare
    name: str = ""                      # name of the set, a folder under data/; empty: the set's or the file's own name
    tokenizer: str = ""                 # char | byte | gpt2 | cl100k_base | o200k_base | any other name that tiktoken
                                        # knows; empty: the named set's own, char for a file
    val_fraction: float = 0.1           # share of the text's characters kept for validation, from its end
    data_dir: str = ""                  # folder that holds the sets; empty: data/ beside this file
    check: bool = False                 # verify the named sets instead: counts, types, checksums and every id


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
            self.ids = np.full(sys.maxunicode + 1, -1, np.int32)
            self.ids[_code_points(stored["chars"])] = np.arange(len(self.pieces))
        elif self.kind == "bpe":
            ranks = {base64.b64decode(token): int(rank) for token, rank in
                     (line.split() for line in stored["ranks"].splitlines())}
            special = {text: int(value) for text, value in stored["special"].items()}
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
    def build(cls, name: str, text: str) -> "Tokenizer":
        """char: the sorted distinct characters of `text`; byte: the 256 bytes; else the name of a tiktoken encoding."""
        if name == "char":
            return cls({"kind": "char", "chars": "".join(map(chr, np.unique(_code_points(text))))})
        if name == "byte":
            return cls({"kind": "byte"})
        try:
            import tiktoken
        except ImportError:
            fail(f"tokenizer={name} needs tiktoken (pip install tiktoken); char and byte need nothing")
        if name not in tiktoken.list_encoding_names():
            fail(f"tokenizer={name!r} is none of: char, byte, {', '.join(tiktoken.list_encoding_names())}")
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:      # whatever its download raises
            fail(f"tiktoken could not load {name} ({type(error).__name__}), which it downloads once: try again with a "
                 "network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=char or byte")
        ranks = "\n".join(f"{base64.b64encode(token).decode()} {rank}"
                          for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))
        return cls({"kind": "bpe", "name": name, "pattern": encoding._pat_str, "ranks": ranks,
                    "special": dict(encoding._special_tokens)})

    @cached_property
    def encoding(self):
        """tiktoken's encoder, made when there is something to encode: decoding needs no tiktoken."""
        try:
            import tiktoken
        except ImportError:
            fail(f"the tokenizer {self.bpe['name']} needs tiktoken to read text: pip install tiktoken")
        return tiktoken.Encoding(**self.bpe)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, in the smallest type that holds the vocabulary. Text that looks like a special token stays
        text. Raises ValueError naming the characters that the tokenizer lacks."""
        try:
            if self.kind == "byte":
                return np.frombuffer(text.encode("utf-8"), np.uint8)
            if self.kind == "bpe":
                return np.array(self.encoding.encode_ordinary(text), token_dtype(self.vocab_size))
            ids = self.ids[_code_points(text)]
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {text[error.start]!r} at {error.start}") from None
        if ids.size and ids.min() < 0:
            unknown = sorted({char for char, known in zip(text, ids >= 0, strict=True) if not known})
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise ValueError(f"the tokenizer has no {' '.join(map(repr, unknown[:10]))}{more}; it was built from a "
                             f"text with {self.vocab_size} different characters")
        return ids.astype(token_dtype(self.vocab_size))

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


# -- text ----------------------------------------------------------------------------------------------------------

def read_text(path: Path) -> str:
    """The file's text, exactly (line endings too) but for a byte order mark."""
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        fail(f"{path} is a folder; name the text files in it")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror or error}")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start:,}; convert it first "
             "(for example: iconv -f LATIN1 -t UTF-8)")


def fetch(name: str, folder: Path) -> Path:
    """The raw text of a named set: embedded, already there (under this set or another with the same text), or
    downloaded with a time-out, three tries and a pinned SHA-256."""
    source = SETS[name]
    if "url" not in source:
        return ROOT / "data" / name / "input.txt"
    twins = [folder.parent / other for other in SETS if SETS[other].get("url") == source["url"]]
    for path in (twin / "input.txt" for twin in [folder, *twins]):
        if path.is_file():
            if (found := sha256(path)) != source["sha256"]:
                fail(f"{path} has SHA-256 {found[:12]}..., the text of {name} has {source['sha256'][:12]}...: remove "
                     f"it, or prepare your own text with python prepare.py {path} --name=NAME")
            return path
    print(f"downloading {source['url']}", flush=True)
    for attempt in range(3):
        try:
            with urllib.request.urlopen(source["url"], timeout=30) as answer:
                content = answer.read()
            if hashlib.sha256(content).hexdigest() == source["sha256"]:
                folder.mkdir(parents=True, exist_ok=True)
                with written(folder / "input.txt") as file:
                    file.write(content)
                return folder / "input.txt"
            reason = f"{len(content):,} bytes with another SHA-256 arrived"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        time.sleep(1 + attempt)
    folder.mkdir(parents=True, exist_ok=True)       # so that the file can be put there
    fail(f"could not download {source['url']} ({reason}); put that file at {folder / 'input.txt'} by hand and try "
         "again; python train.py, which trains on the embedded fables, needs no network")


def split_documents(documents: list, val_fraction: float) -> tuple:
    """(train documents, val documents). A single text is cut near its end, at a character; so is each of a few. With
    at least 1/val_fraction documents whole ones go to either side, every (1/val_fraction)-th to val."""
    if val_fraction and len(documents) >= max(2, 1 / val_fraction):
        is_val = [int((i + 1) * val_fraction) > int(i * val_fraction) for i in range(len(documents))]
        return ([text for text, val in zip(documents, is_val, strict=True) if not val],
                [text for text, val in zip(documents, is_val, strict=True) if val])
    cuts = [int(len(text) * (1 - val_fraction)) for text in documents]
    return ([text[:cut] for text, cut in zip(documents, cuts, strict=True)],
            [text[cut:] for text, cut in zip(documents, cuts, strict=True)])


# -- writing -------------------------------------------------------------------------------------------------------

def write_set(folder: Path, sources: list, tokenizer_name: str, val_fraction: float) -> dict:
    """Tokenize the files `sources` into `folder`; returns what meta.json says. Each file is one document; documents
    are joined by the end-of-text token where the tokenizer has one."""
    documents = [read_text(path) for path in sources]
    if not any(documents):
        fail(f"{', '.join(map(str, sources))}: no text in there")
    tokenizer = Tokenizer.build(tokenizer_name, "".join(documents))
    dtype = token_dtype(tokenizer.vocab_size)
    join = [] if tokenizer.eot is None else [np.array([tokenizer.eot], dtype)]
    ids, splits = {}, {}
    for split, texts in zip(("train", "val"), split_documents(documents, val_fraction), strict=True):
        parts = [part for text in texts if text for part in (join + [tokenizer.encode(text)])][len(join):]
        ids[split] = np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
        splits[split] = {"tokens": int(ids[split].size), "characters": sum(map(len, texts)),
                         "bytes": sum(len(text.encode("utf-8")) for text in texts),
                         "sha256": hashlib.sha256(ids[split]).hexdigest()}
    meta = {"format": 1, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "val_fraction": val_fraction,
            "splits": splits, "tokenizer": tokenizer.stored,
            "sources": [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in sources]}

    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / "train.bin") as train, written(folder / "val.bin") as val:
        for file, split in ((train, "train"), (val, "val")):
            file.write(ids[split])
            file.flush()
            os.fsync(file.fileno())
        # Both new files are complete on the disk from here on. Without meta.json there is no set, so a kill between
        # the renames leaves none rather than a mixture.
        (folder / "meta.json").unlink(missing_ok=True)
    with written(folder / "meta.json") as file:
        file.write(json.dumps(meta, ensure_ascii=False, indent=1).encode("utf-8"))
    characters = sum(split["characters"] for split in splits.values())
    tokens = sum(split["tokens"] for split in splits.values())
    print(f"{folder}: {characters:,} characters, {len(set().union(*documents)):,} distinct\n"
          f"  train.bin {splits['train']['tokens']:,} tokens, val.bin {splits['val']['tokens']:,} tokens, "
          f"{dtype.name}\n"
          f"  tokenizer {tokenizer_name}: {tokenizer.vocab_size:,} tokens in the vocabulary, "
          f"{sum(split['bytes'] for split in splits.values()) / tokens:.2f} bytes per token", flush=True)
    return meta


def prepare_named(name: str, data_dir: str = "", out: str = "", tokenizer: str = "", val_fraction: float = 0.1):
    """Prepare one of SETS, as data/`out` (default: its own name) and with its own tokenizer unless another is given."""
    if out in SETS and out != name:
        fail(f"name={out} belongs to a named set; choose another")
    text = fetch(name, data_folder(name, data_dir))
    write_set(data_folder(out or name, data_dir), [text], tokenizer or SETS[name]["tokenizer"], val_fraction)


def ensure_set(name: str, data_dir: str, ranks) -> Path:
    """The folder of a prepared set. The first of `ranks` prepares a named one that is missing, the others wait."""
    folder = data_folder(name, data_dir)
    if ranks.tell(not os.path.isfile(folder / "meta.json")):
        if name not in SETS:
            fail(f"no data set in {folder}: python prepare.py YOUR_TEXT_FILE --name={name}")
        if ranks.first:
            prepare_named(name, data_dir)
        ranks.tell(None)
    return folder


def stored_tokenizer(folder: Path, meta: dict) -> Tokenizer:
    """The tokenizer in a set's meta.json, or one line."""
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, vocab_size={meta['vocab_size']}")
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fail(f"{folder / 'meta.json'} holds no usable tokenizer ({type(error).__name__}: {error}): "
             f"prepare {folder.name} again")


def check_set(folder: Path):
    """Read a whole set and compare it with its meta.json."""
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    for split in ("train", "val"):
        ids = open_split(folder, meta, split)
        check_ids(ids, meta["vocab_size"], split)
        if hashlib.sha256(ids).hexdigest() != meta["splits"][split]["sha256"]:
            fail(f"{folder / (split + '.bin')} differs from its checksum in meta.json: prepare {folder.name} again")
        print(f"{folder}/{split}.bin: {ids.size:,} tokens of {meta['dtype']}, as meta.json says; "
              f"it begins {tokenizer.decode(ids[:30])[:60]!r}")


def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words")
    try:
        prepare_or_check(parsed)
    except OSError as error:            # a full disk, a name too long, a file where a folder should be
        fail(f"{error.filename or 'could not write'}: {error.strerror or error}")


def prepare_or_check(parsed):
    options = Options(**parsed.values)
    if not 0 <= options.val_fraction < 1:
        fail(f"val_fraction={options.val_fraction} must be at least 0 and below 1")
    if not parsed.words:
        fail(f"name a set ({', '.join(SETS)}) or text files; see --help")
    if options.check:
        for name in parsed.words:
            check_set(data_folder(name, options.data_dir))
        return
    first = parsed.words[0]
    if len(parsed.words) == 1 and first in SETS and not Path(first).is_file():
        prepare_named(first, options.data_dir, options.name, options.tokenizer, options.val_fraction)
        return
    for word in parsed.words:
        if not Path(word).exists():
            fail(f"no file {word}; the named sets are {', '.join(SETS)}")
    name = options.name or Path(first).stem
    if not options.name and (len(parsed.words) > 1 or not NAME.fullmatch(name) or name in SETS):
        fail(f"give the set a name: python prepare.py {' '.join(parsed.words)} --name=NAME")
    if name in SETS:
        fail(f"name={name} belongs to a named set; choose another")
    write_set(data_folder(name, options.data_dir), [Path(word) for word in parsed.words],
              options.tokenizer or "char", options.val_fraction)


if __name__ == "__main__":
    run(main)
