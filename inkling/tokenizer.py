"""Text to token ids and back."""

import base64
import codecs
import os
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

from inkling.cli import UserError
from inkling.dataset import read_meta, token_dtype
from inkling.readers import pieces

END_OF_TEXT = "<|endoftext|>"
# The pattern of GPT-4's cl100k_base in plain form: contractions, words with what precedes them, numbers of up to three
# digits, punctuation, white space. Tokens are merged within its matches only.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")
BOUNDED = 1 << 16                       # characters that a BPE encodes at once: unbroken runs cost more than their size
MOST_TOKENS = 1 << 24                   # in a vocabulary; what a damaged file says shall not fill the memory


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
            self.ids[code_points(stored["chars"])] = np.arange(len(stored["chars"]))
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
            return cls({"kind": "char", "chars": "".join(map(chr, np.unique(code_points(text))))})
        if name == "byte":
            return cls({"kind": "byte"})
        if os.path.basename(name) == "meta.json":
            return stored_tokenizer(Path(name).parent, read_meta(Path(name).parent))
        if name.endswith(".pt"):
            from inkling.checkpoint import load_checkpoint  # imports torch, which nothing else here needs

            return cls(load_checkpoint(Path(name))["tokenizer"])
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"tokenizer={name} needs tiktoken (pip install tiktoken); char and byte need nothing")
        if name.endswith(".tiktoken"):
            return cls(read_tiktoken_file(Path(name), pattern or PATTERN))
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"tokenizer={name!r} is none of: char, byte, bpe:VOCAB, FILE.tiktoken, FOLDER/meta.json, ckpt.pt, "
                 f"{', '.join(tiktoken.list_encoding_names())}")
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:      # whatever its download raises
            raise UserError(f"tiktoken could not load {name} ({type(error).__name__}), which it downloads once: try again with a "
                 "network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=char or byte")
        return cls({"kind": "bpe", "name": name, "pattern": encoding._pat_str,
                    "ranks": rank_lines(encoding._mergeable_ranks), "special": dict(encoding._special_tokens)})

    @cached_property
    def encoding(self):
        """tiktoken's encoder, made when there is something to encode: decoding needs no tiktoken."""
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"the tokenizer {self.bpe['name']} needs tiktoken to read text: pip install tiktoken")
        # tiktoken panics where a pattern matches the empty text, unless that is a token; _complete refuses it.
        ranks = self.bpe["mergeable_ranks"] | {b"": self.vocab_size}
        try:
            return tiktoken.Encoding(**self.bpe | dict(mergeable_ranks=ranks))
        except ValueError as error:
            raise UserError(f"pattern={self.bpe['pat_str']} is no regular expression: {error}")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each id's text."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, in the smallest type that holds the vocabulary. Text that looks like a special token stays
        text. A BPE sees at most 65,536 characters at once, cut where a word ends (border); only a longer run
        without such a place gives other ids than the whole would. Raises ValueError naming the characters that the
        tokenizer lacks."""
        dtype = token_dtype(self.vocab_size)
        try:
            raw = text.encode("utf-8")
            if self.kind == "byte":
                return np.frombuffer(raw, np.uint8)
            if self.kind == "bpe":
                parts = [self.encoding.encode_to_numpy(piece, disallowed_special=())
                         for piece in pieces(text, BOUNDED)]
                ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
                return self._complete(ids, text)
            points = np.frombuffer(raw, np.uint8) if len(raw) == len(text) else code_points(text)
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
        raise UserError(f"{flag}={text!r}: {error}" if len(text) < 40 else f"{flag}: {error}")


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def rank_lines(ranks: dict) -> str:
    """tiktoken's own form: a line per token, its bytes in base64 and its rank."""
    return "\n".join(f"{base64.b64encode(token).decode()} {rank}"
                     for token, rank in sorted(ranks.items(), key=lambda item: item[1]))


def read_tiktoken_file(path: Path, pattern: str) -> dict:
    """What Tokenizer stores, from a file of ranks; the end-of-text token takes the next id."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")
    except ValueError as error:
        raise UserError(f"{path} is no tiktoken file, whose lines hold a token in base64 and its rank: {error}")
    if len(set(ranks.values())) < len(ranks) or any(bytes([value]) not in ranks for value in range(256)):
        raise UserError(f"{path} is no tiktoken file: two tokens have one rank, or a single byte has none")
    return {"kind": "bpe", "name": path.stem, "pattern": pattern, "ranks": rank_lines(ranks),
            "special": {END_OF_TEXT: max(ranks.values()) + 1}}


def bpe_size(tokenizer: str) -> int:
    """VOCAB of bpe:VOCAB, or 0."""
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe":
        return 0
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 20:
        raise UserError(f"tokenizer={tokenizer} must be bpe:VOCAB with a VOCAB from 257 (the bytes and the end-of-text token) to "
             "1,048,576")
    return int(size)


def train_bpe(name: str, texts, pattern: str) -> Tokenizer:
    """A byte-pair encoding (Sennrich et al. 2016) trained on `texts` by rustbpe: VOCAB - 1 tokens, or fewer when the
    text offers no more pairs, and the end-of-text token."""
    try:
        import rustbpe
    except ImportError:
        raise UserError(f"tokenizer={name} needs rustbpe to be trained: pip install rustbpe (the set then needs it no more)")
    trainer, size = rustbpe.Tokenizer(), bpe_size(name)
    try:
        # Its buffer counts texts; those here have up to 65,536 characters each.
        trainer.train_from_iterator(texts, size - 1, buffer_size=64, pattern=pattern)
    except ValueError as error:
        raise UserError(f"pattern={pattern} is no regular expression: {error}")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        print(f"note     the text offers {len(ranks) - 256:,} merges: the vocabulary has {len(ranks) + 1:,} tokens, "
              f"not {size:,}")
    return Tokenizer({"kind": "bpe", "name": name, "pattern": pattern, "ranks": rank_lines(ranks),
                      "special": {END_OF_TEXT: len(ranks)}})


def stored_tokenizer(folder: Path, meta: dict) -> Tokenizer:
    """The tokenizer in a set's meta.json, or one line."""
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, vocab_size={meta['vocab_size']}")
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{folder / 'meta.json'} holds no usable tokenizer ({type(error).__name__}: {error}): "
             f"prepare {folder.name} again")
