"""Text to token ids and back: characters, bytes, tiktoken's encodings, or a byte-pair encoding trained
on the text itself."""

import base64
import codecs
import contextlib
import hashlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from inkling.cli import UserError, quoted, unescape
from inkling.dataset import read_meta, token_dtype
from inkling.hints import files_near, there_is, tokenizer_meant
from inkling.readers import cut_pieces, to_newlines
from inkling.tokenizer_json import JsonTokenizer

END_OF_TEXT = "<|endoftext|>"
# The pattern of GPT-4's cl100k_base in plain form: contractions, words with what precedes them, numbers
# of up to three digits, punctuation, white space. Tokens are merged within its matches only.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
BOUNDED = 1 << 16  # characters that a BPE encodes at once: time grows faster than an unbroken run
MOST_TOKENS = 1 << 24  # in a vocabulary, so that a damaged file cannot fill the memory
FORMS = ("NFC", "NFD")                  # of Unicode: accents composed with their letters, or apart
HUGGING_FACE_FILES = ("tokenizer.json", "vocab.json", "config.json", "tokenizer.model")
SINGLE_BYTES = [bytes([value]) for value in range(256)]


class Tokenizer:
    """Text to token ids and back.

    `Tokenizer.build(name, text)` makes a tokenizer; `Tokenizer(stored)` restores one from the plain
    dict `stored`, which meta.json and every checkpoint carry, so that decoding needs neither a file
    nor a network. It raises ValueError, KeyError or TypeError if `stored` is damaged.

    kind: "char", "byte", "bpe" or, for a tokenizer.json that is none of these, "json".
    vocab_size: number of ids, special tokens included.
    pieces: the bytes of each id; an unused id has none.
    eot: id of the end-of-text token, which separates documents, or None. stops: the ids that end a
    text; an imported model may have several.
    bos: id of the token that an imported model was trained to see before every text, or None.
    exact: whether the pieces of a text's ids are that text.
    fallback: char: id of byte 0, if rare characters are spelled in bytes; else None.
    bpe: the arguments of tiktoken.Encoding; None for other kinds. backend: likewise, of json.
    """

    def __init__(self, stored: dict):
        self.stored = stored
        self.kind = stored.get("kind")
        self.eot = None
        self.fallback = None
        self.bpe = None
        self.backend = None
        self.exact = True
        if self.kind == "byte":
            self.pieces = list(SINGLE_BYTES)
        elif self.kind == "char":
            self._restore_char(stored)
        elif self.kind == "bpe":
            self._restore_bpe(stored)
        elif self.kind == "json":
            self.backend = JsonTokenizer(stored["json"], MOST_TOKENS)
            self.pieces = self.backend.pieces
            self.exact = self.backend.exact
        else:
            raise ValueError(f"unknown tokenizer kind {self.kind!r}")
        self.vocab_size = len(self.pieces)
        self.start = "\n"               # what precedes a text where there is no end-of-text token
        self._restore_ends(stored)

    def _restore_ends(self, stored: dict):
        """What an imported model says of its own tokens."""
        ends = stored.get("eot", [] if self.eot is None else [self.eot])
        self.bos = stored.get("bos")
        for value in [*ends, *([] if self.bos is None else [self.bos])]:
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(f"{value!r} is none of its {self.vocab_size:,} ids")
        self.eot = ends[0] if ends else None
        self.stops = frozenset(ends)
        special = self.bpe["special_tokens"] if self.bpe else {}
        self.eot_text = {value: text for text, value in special.items()}.get(self.eot)

    def _restore_char(self, stored: dict):
        chars = stored["chars"]
        self.pieces = [char.encode("utf-8") for char in chars]
        if stored.get("bytes"):
            self.fallback = len(chars)
            self.pieces += SINGLE_BYTES
        self.ids = np.full(sys.maxunicode + 1, -1, np.int32)  # of every code point; -1: unknown
        self.ids[code_points(chars)] = np.arange(len(chars))

    def _restore_bpe(self, stored: dict):
        for key in ("name", "pattern"):
            if not isinstance(stored[key], str):
                raise TypeError(f"its {key} is not text")
        ranks = {}
        for line in stored["ranks"].splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        special = {text: int(value) for text, value in stored["special"].items()}
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < MOST_TOKENS:
            raise ValueError(f"its ids are not distinct numbers below {MOST_TOKENS:,}")
        if any(byte not in ranks for byte in SINGLE_BYTES):
            raise ValueError("a single byte has no id")
        self.pieces = [b""] * (1 + max(ids))
        for token, rank in ranks.items():
            self.pieces[rank] = token
        for text, value in special.items():
            self.pieces[value] = text.encode()
        self.eot = special.get(END_OF_TEXT)
        self.bpe = {"name": stored["name"], "pat_str": stored["pattern"], "mergeable_ranks": ranks,
                    "special_tokens": special}

    @classmethod
    def build(cls, name: str, text: str = "", pattern: str = "") -> "Tokenizer":
        """char: the sorted distinct characters of `text`. byte: the 256 bytes. Else the name of a tiktoken
        encoding, a .tiktoken file (`pattern` replaces PATTERN), or a meta.json, a checkpoint (.pt) or a
        Hugging Face directory whose tokenizer is taken. Raises UserError if there is no such tokenizer."""
        if name == "char":
            return cls({"kind": "char", "chars": "".join(map(chr, np.unique(code_points(text))))})
        if name == "byte":
            return cls({"kind": "byte"})
        if os.path.basename(name) == "meta.json":
            folder = Path(name).parent
            return stored_tokenizer(folder, read_meta(folder))
        if name.endswith(".pt"):
            from inkling.checkpoint import load_checkpoint  # imports torch: only where it is needed

            return cls(load_checkpoint(Path(name))["tokenizer"])
        folder = Path(name).parent if os.path.basename(name) == "tokenizer.json" else Path(name)
        if any(os.path.isfile(folder / file) for file in HUGGING_FACE_FILES):
            from inkling.huggingface import load_tokenizer  # imports this module

            return load_tokenizer(folder)
        tiktoken = import_tiktoken(f"tokenizer={name} needs tiktoken (pip install tiktoken); char "
                                   "and byte need nothing")
        if name.endswith(".tiktoken"):
            return cls(read_tiktoken_file(Path(name), pattern or PATTERN))
        known = tiktoken.list_encoding_names()
        if name not in known:
            meant = tokenizer_meant(name, known, tiktoken.model.MODEL_TO_ENCODING)
            hint = f"; did you mean --tokenizer={meant}?" if meant else ""
            raise UserError(f"tokenizer={name!r} is none of: char, byte, bpe:VOCAB, FILE.tiktoken, "
                            f"FOLDER/meta.json, ckpt.pt, a Hugging Face folder, {', '.join(known)}{hint}")
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:      # whatever its download raises
            raise UserError(f"tiktoken could not load {name} ({type(error).__name__}), which it downloads once: try "
                            f"again with a network, set TIKTOKEN_CACHE_DIR to a folder that holds {cached_files(name)}"
                            ", or use --tokenizer=char or byte")
        return cls({"kind": "bpe", "name": name, "pattern": encoding._pat_str,
                    "ranks": rank_lines(encoding._mergeable_ranks),
                    "special": dict(encoding._special_tokens)})

    @cached_property
    def encoding(self):
        """tiktoken's encoder, made when there is something to encode: decoding needs no
        tiktoken."""
        tiktoken = import_tiktoken(f"the tokenizer {self.bpe['name']} needs tiktoken to read text: "
                                   "pip install tiktoken")
        # tiktoken panics where a pattern matches the empty text, unless that is a token. _check_whole
        # refuses that token.
        ranks = self.bpe["mergeable_ranks"] | {b"": self.vocab_size}
        try:
            return tiktoken.Encoding(**self.bpe | {"mergeable_ranks": ranks})
        except ValueError as error:
            raise UserError(f"pattern={self.bpe['pat_str']} is not a regular expression: {error}")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each id, (vocab_size,)."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    # -- text to ids -------------------------------------------------------------------------------

    def encode(self, text: str, begins: bool = True) -> np.ndarray:
        """Ids (tokens,) of `text`, in the smallest type that holds the vocabulary. Text that looks
        like a special token is ordinary text. begins: it is the beginning of a text, where some
        tokenizers put a space. A BPE sees at most 65,536 characters at once, cut
        where a word ends (find_cut); only a longer run without such a place gives other ids than
        the whole would. Raises ValueError that names the characters which the tokenizer lacks."""
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {text[error.start]!r} at "
                             f"{error.start}") from None
        if self.kind == "byte":
            return np.frombuffer(raw, np.uint8)
        if self.kind == "json":
            return self._encode_json(text, begins)
        ids = self._encode_char(text, raw) if self.kind == "char" else self._encode_bpe(text)
        return ids.astype(token_dtype(self.vocab_size))

    def _encode_json(self, text: str, begins: bool) -> np.ndarray:
        return np.array(self.backend.encode(text, begins, BOUNDED), token_dtype(self.vocab_size))

    def _encode_bpe(self, text: str) -> np.ndarray:
        parts = [self.encoding.encode_to_numpy(piece, disallowed_special=())
                 for piece in cut_pieces(text, BOUNDED)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._check_whole(ids, text)
        return ids

    def _encode_char(self, text: str, raw: bytes) -> np.ndarray:
        is_ascii = len(raw) == len(text)
        ids = self.ids[np.frombuffer(raw, np.uint8) if is_ascii else code_points(text)]
        if not ids.size or ids.min() >= 0:
            return ids
        if self.fallback is not None:
            return self._spell_rare(ids, text)
        unknown = sorted({text[position] for position in np.flatnonzero(ids < 0)})
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"the tokenizer has no {' '.join(map(repr, unknown[:10]))}{more}; it was "
                         f"built from a text with {self.vocab_size} different characters"
                         f"{self._hint_of_other_form(text)}")

    def count_unknown(self, text: str) -> int:
        """How many characters of `text` the tokenizer lacks; only a char tokenizer lacks any."""
        if self.kind != "char":
            return 0
        return int((self.ids[code_points(text)] < 0).sum())

    def _hint_of_other_form(self, text: str) -> str:
        for form in FORMS:
            if not self.count_unknown(unicodedata.normalize(form, text)):
                return (f"; it has all of this text in Unicode's form {form}: convert it, in Python by "
                        f'unicodedata.normalize("{form}", text)')
        return ""

    def _spell_rare(self, ids: np.ndarray, text: str) -> np.ndarray:
        """`ids` with each -1 replaced by the ids of the bytes of that character."""
        rare = np.flatnonzero(ids < 0)
        spelled = [np.frombuffer(text[position].encode("utf-8"), np.uint8) + np.int32(self.fallback)
                   for position in rare]
        counts = np.ones(ids.size, np.int64)
        counts[rare] = [len(byte_ids) for byte_ids in spelled]
        ids = np.repeat(ids, counts)
        ids[ids < 0] = np.concatenate(spelled)
        return ids

    def _check_whole(self, ids: np.ndarray, text: str):
        """Raise ValueError unless `ids` spell all of `text`, which depends on the pattern."""
        name = self.bpe["name"]
        if ids.size and int(ids.max()) == self.vocab_size:
            raise ValueError(f"the pattern of the tokenizer {name} matches the empty text")
        if int(self.lengths[ids].sum()) != utf8_size(text):
            raise ValueError(f"the pattern of the tokenizer {name} skips some of the text: "
                             r"let it end with |[\s\S]")

    def encode_joined(self, texts: list, begins: list | None = None) -> np.ndarray:
        """Ids (tokens,) of [(whether the end-of-text token comes first, text)], one after another.
        begins: of each, whether it begins a document; by default, where that token comes first."""
        if self._can_be_joined(texts):
            # One call for many documents: each return from tiktoken waits for the interpreter's lock.
            joined = "".join(self.eot_text + text if eot_first else text for eot_first, text in texts)
            ids = self.encoding.encode_to_numpy(joined, allowed_special={self.eot_text},
                                                disallowed_special=())
            self._check_whole(ids, joined)
            return ids.astype(token_dtype(self.vocab_size))
        begins = begins or [eot_first for eot_first, _ in texts]
        parts = []
        for (eot_first, text), is_first in zip(texts, begins, strict=True):
            marks = [self.eot or 0] if eot_first else []
            if is_first and self.bos is not None and self.bos not in marks:
                marks.append(self.bos)
            parts.append(np.array(marks, token_dtype(self.vocab_size)))
            parts.append(self.encode(text, is_first))
        return np.concatenate(parts)

    def _can_be_joined(self, texts: list) -> bool:
        """Whether the texts are several whole, short documents, none of which contains the text of
        the special token."""
        if len(texts) < 2 or self.eot_text is None or self.bos is not None:
            return False
        if not all(eot_first for eot_first, _ in texts[1:]):
            return False
        return not any(self.eot_text in text or len(text) > BOUNDED for _, text in texts)

    def encode_document(self, text: str) -> np.ndarray:
        """Ids of a whole text, after the token that the model was trained to see first."""
        ids = self.encode(text)
        return ids if self.bos is None else np.concatenate((np.array([self.bos], ids.dtype), ids))

    @cached_property
    def line_break(self) -> str:
        """How the text that the tokenizer was made from ended its lines, as far as the vocabulary shows
        it: \\n, unless that text was read with its \\r. It was if a char tokenizer has \\r, or a BPE
        trained here has merged \\r\\n."""
        if self.kind == "char" and "\r" in self.stored["chars"]:
            return "\r\n" if "\n" in self.stored["chars"] else "\r"
        if self.kind == "bpe" and self.bpe["name"].startswith("bpe:") and b"\r\n" in self.pieces:
            return "\r\n"
        return "\n"

    def fit_line_ends(self, text: str) -> str:
        """`text` with the line ends that the tokenizer's own text has."""
        return to_newlines(text).replace("\n", self.line_break)

    def fit_form(self, text: str) -> str:
        """`text`, normalized to NFC or NFD if a char tokenizer lacks fewer of its characters then: é is
        one character, or e and an accent."""
        if not self.count_unknown(text):
            return text
        forms = [text, *(unicodedata.normalize(form, text) for form in FORMS)]
        return min(forms, key=self.count_unknown)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like encode_document, but never empty: an empty prompt becomes the end-of-text token; where
        there is none, `start`; and where that cannot be encoded, id 0."""
        if text or self.bos is not None:
            return self.encode_document(text)
        if self.eot is not None:
            return np.array([self.eot], token_dtype(self.vocab_size))
        with contextlib.suppress(ValueError):
            ids = self.encode(self.start)
            if ids.size:
                return ids
        return np.zeros(1, token_dtype(self.vocab_size))

    # -- ids to text -------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], begins: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. begins: they are the beginning of a
        text, where some tokenizers put a space, which is dropped."""
        text = b"".join(self.pieces[value] for value in ids).decode("utf-8", "replace")
        if begins and self.backend and self.backend.prefix:
            text = text.removeprefix(" ")
        return text

    def document_bytes(self, ids: list, previous: int | None = None) -> bytes:
        """The bytes of a data set's `ids`, which follow the id `previous`; None: they are its first.
        What an imported model has before every document, its first token or a space, is left out."""
        has_space = self.backend is not None and self.backend.prefix
        if self.bos is None and not has_space:
            return b"".join(self.pieces[value] for value in ids)
        marks = {None, self.eot, self.bos}
        parts = []
        for value in ids:
            piece = self.pieces[value]
            if value == self.bos and value != self.eot:
                piece = b""
            elif has_space and previous in marks:
                piece = piece.removeprefix(b" ")
            parts.append(piece)
            previous = value
        return b"".join(parts)

    def stream(self) -> Callable[[int | None], str]:
        """A function from one id to the text that it completes, in the middle of a text: a character
        spread over several tokens is held back until it is whole. Called with None it returns what
        is held back."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def push(value: int | None) -> str:
            if value is None:
                return decoder.decode(b"", final=True)
            return decoder.decode(self.pieces[value])

        return push


def stored_tokenizer(folder: Path, meta: dict) -> Tokenizer:
    """The tokenizer in a set's meta.json. Raises UserError if it is damaged."""
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, "
                             f"vocab_size={meta['vocab_size']}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{folder / 'meta.json'} holds no usable tokenizer "
                        f"({type(error).__name__}: {error}): prepare {folder.name} again")
    return tokenizer


def start_of_texts(tokenizer: Tokenizer, joiner: str | None, ids: np.ndarray) -> str:
    """What stands before each text of a training set where no end-of-text token does, for
    `Tokenizer.start`: the joiner of its documents; of a single text, a blank line if it has any, and
    else a line break. ids: the split, of which the first 100,000 are looked at; wrong ones are for
    whoever reads them in training to refuse."""
    if joiner:
        return joiner
    first = ids[:10**5]
    text = tokenizer.decode(first[first < tokenizer.vocab_size].tolist())
    blank_line = tokenizer.fit_line_ends("\n\n")
    return blank_line if blank_line in text else "\n"


def typed_prompt(tokenizer: Tokenizer, text: str) -> str:
    """The prompt that a setting spells, as the tokenizer's own text would have it."""
    return tokenizer.fit_form(tokenizer.fit_line_ends(unescape(text)))


def prompt_ids(tokenizer: Tokenizer, text: str, flag: str) -> np.ndarray:
    """Ids (T,) in int64 of the prompt that the user gave with `flag`. Raises UserError if it cannot
    be encoded."""
    try:
        return tokenizer.encode_prompt(text).astype(np.int64)
    except ValueError as error:
        prompt = f"{flag}={quoted(text)}" if len(text) < 40 else flag
        raise UserError(f"{prompt}: {error}; leave such characters out, or prepare the text with --tokenizer=byte, "
                        "which knows all of them, and train again")


def code_points(text: str) -> np.ndarray:
    """The number of each character, (characters,) in uint32. Half a surrogate pair, which is none,
    has one too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def utf8_size(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


# -- byte-pair encodings ---------------------------------------------------------------------------

def import_tiktoken(message: str):
    """tiktoken, or a UserError with this message."""
    try:
        import tiktoken
    except ImportError:
        raise UserError(message)
    return tiktoken


ENCODINGS = "https://openaipublic.blob.core.windows.net/"
ENCODING_FILES = {"gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
                  "p50k_edit": ("encodings/p50k_base.tiktoken",), "o200k_harmony": ("encodings/o200k_base.tiktoken",)}


def cached_files(name: str) -> str:
    """The files of an encoding as tiktoken looks for them in its cache: under the SHA-1 of their
    addresses."""
    files = ENCODING_FILES.get(name, (f"encodings/{name}.tiktoken",))
    keys = [hashlib.sha1((ENCODINGS + file).encode()).hexdigest() for file in files]
    said = " and ".join(f"{Path(file).name} as {key}" for file, key in zip(files, keys, strict=True))
    if files[0].endswith(".tiktoken"):
        said += f", give the file itself (--tokenizer=PATH/{Path(files[0]).name})"
    return said


def rank_lines(ranks: dict) -> str:
    """tiktoken's own form: a line per token, its bytes in base64 and its rank."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in by_rank)


def read_tiktoken_file(path: Path, pattern: str) -> dict:
    """What Tokenizer stores, from a file of ranks; the end-of-text token gets the next id."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        near = there_is(str(path), files_near(str(path)))
        raise UserError(f"cannot read {path}: {error.strerror or error}{near}")
    except ValueError as error:
        raise UserError(f"{path} is not a tiktoken file, whose lines hold a token in base64 and "
                        f"its rank: {error}")
    if len(set(ranks.values())) < len(ranks) or any(byte not in ranks for byte in SINGLE_BYTES):
        raise UserError(f"{path} is not a tiktoken file: two tokens have the same rank, or a "
                        "single byte has none")
    return {"kind": "bpe", "name": path.stem, "pattern": pattern, "ranks": rank_lines(ranks),
            "special": {END_OF_TEXT: max(ranks.values()) + 1}}


def bpe_size(tokenizer: str) -> int:
    """VOCAB of bpe:VOCAB; 0 for another tokenizer."""
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe":
        return 0
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 20:
        raise UserError(f"tokenizer={tokenizer} must be bpe:VOCAB with a VOCAB from 257 (the bytes "
                        "and the end-of-text token) to 1,048,576, such as bpe:4096")
    return int(size)


def train_bpe(name: str, texts: Iterable[str], pattern: str) -> Tokenizer:
    """A byte-pair encoding (Sennrich et al. 2016) trained on `texts` by rustbpe. Of bpe:VOCAB,
    VOCAB - 1 tokens come from the text, or fewer if it has no more pairs to merge; the last is the
    end-of-text token."""
    try:
        import rustbpe
    except ImportError:
        raise UserError(f"tokenizer={name} needs rustbpe for its training: pip install rustbpe "
                        "(only to train it; the data set does not need it)")
    size = bpe_size(name)
    trainer = rustbpe.Tokenizer()
    try:
        # buffer_size counts texts, and each has up to 65,536 characters here.
        trainer.train_from_iterator(texts, size - 1, buffer_size=64, pattern=pattern)
    except ValueError as error:
        raise UserError(f"pattern={pattern} is not a regular expression: {error}")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        print(f"note     the text offers {len(ranks) - 256:,} merges: the vocabulary has "
              f"{len(ranks) + 1:,} tokens, not {size:,}")
    return Tokenizer({"kind": "bpe", "name": name, "pattern": pattern, "ranks": rank_lines(ranks),
                      "special": {END_OF_TEXT: len(ranks)}})
