"""A tokenizer.json of Hugging Face, kept whole and used through the package tokenizers: its ids, and
the bytes that each id stands for."""

import copy
import json
import re
from contextlib import contextmanager

from inkling.cli import UserError

# What shows how a tokenizer puts a text together: words, digits, spaces in every place, both forms
# of an accent, letters of other scripts.
SPACE_MARK = "\u2581"                   # what SentencePiece writes for a space
SAMPLES = ("The Quick brown fox, it's 1234 years old.", " two  spaces\tand a tab\n\n  indented (x) {y}",
           "na\u00efve cafe\u0301 \u72d0\u72f8 \ud55c\uae00 \U0001f98a ...")


# -- byte-level vocabularies -----------------------------------------------------------------------

def byte_letters() -> list:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's
    encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]


LETTERS = byte_letters()
BYTES = {letter: value for value, letter in enumerate(LETTERS)}


def to_letters(token: bytes) -> str:
    return "".join(LETTERS[value] for value in token)


def to_bytes(letters: str) -> bytes:
    return bytes(BYTES[letter] for letter in letters)


# -- the content of a tokenizer.json ---------------------------------------------------------------

def steps(part: dict | None) -> list:
    """The steps of a normalizer, pre_tokenizer, post_processor or decoder."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for entry in inner for step in steps(entry)]


def without_prefix(content: dict) -> dict:
    """The tokenizer of a text's later pieces: it puts no space before them, as it does before the
    first."""
    content = copy.deepcopy(content)
    for step in [*steps(content.get("normalizer")), *steps(content.get("pre_tokenizer"))]:
        if step["type"] == "Prepend":
            step["prepend"] = ""
        if step["type"] in ("Metaspace", "ByteLevel"):
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return content


@contextmanager
def package_errors(message: str):
    """Turn what the package tokenizers raises into a ValueError: bare Exceptions, and panics, which are
    not even Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):
        raise
    except BaseException as error:
        raise ValueError(f"{message}: {str(error)[:150]}") from None


def make_backend(content: dict):
    """The tokenizers.Tokenizer of a tokenizer.json's content, which takes special tokens in a text
    for ordinary text. Raises ValueError for content that it cannot use, and UserError without the
    package."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("this model's tokenizer.json needs the package tokenizers: pip install tokenizers")
    content = content | {"truncation": None, "padding": None}
    with package_errors("the package tokenizers cannot read it"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    if content["model"].get("dropout"):
        backend.model.dropout = None    # of merges, in training
    return backend


def encode_plainly(backend, text: str) -> list | None:
    """The ids of a text without special tokens; None where the vocabulary lacks something and has no
    token for that."""
    try:
        with package_errors("the package tokenizers cannot encode it"):
            return backend.encode(text, add_special_tokens=False).ids
    except ValueError:
        return None


def piece_of(token: str, decoder, types: set) -> bytes:
    """The bytes that a token stands for in the middle of a text."""
    if "ByteLevel" in types:
        return to_bytes(token) if BYTES.keys() >= set(token) else token.encode("utf-8")
    if "ByteFallback" in types and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    with package_errors("the package tokenizers cannot decode it"):
        text = decoder.decode(["a", token]) if decoder else f"a {token}"
    return text.removeprefix("a").encode("utf-8")


WORD_BEFORE_SPACE = re.compile(r"\w(?= \w)")


def find_space(text: str, start: int, most: int) -> int:
    """Where to end a piece of `text` that begins at `start`: before the last space between two words,
    since tokens may join a word with anything else."""
    end = start + most
    if end >= len(text):
        return len(text)
    for first in (max(start, end - 200), start):
        word_ends = [match.end() for match in WORD_BEFORE_SPACE.finditer(text, first, end)]
        if word_ends:
            return word_ends[-1]
    return end


def is_text(piece: bytes) -> bool:
    """Whether these bytes are whole characters."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# -- the tokenizer ---------------------------------------------------------------------------------

class JsonTokenizer:
    """What Tokenizer asks of a tokenizer.json. Raises ValueError for one that it cannot use.

    pieces: the bytes of each id. prefix: whether decoding drops a space before the first word, which
    encoding puts there. exact: whether the pieces of a text's ids are that text.
    """

    def __init__(self, text: str, most_tokens: int):
        content = json.loads(text)
        self.first = make_backend(content)
        rest = without_prefix(content)
        self.rest = self.first if rest == content else make_backend(rest)
        self.vocab = self.first.get_vocab(with_added_tokens=True)
        if not self.vocab or max(self.vocab.values()) >= most_tokens:
            raise ValueError(f"its ids are not numbers below {most_tokens:,}")
        types = {step["type"] for step in steps(content.get("decoder"))}
        self.is_byte_level = "ByteLevel" in types
        self.pieces = [b""] * (1 + max(self.vocab.values()))
        for token, value in self.vocab.items():
            self.pieces[value] = piece_of(token, self.first.decoder, types)
        for value, token in self.first.get_added_tokens_decoder().items():
            self.pieces[value] = token.content.encode("utf-8")
        self.unknown = self.unknown_id(content["model"])
        self.prefix = False
        self.lossless = False
        self.exact = False
        self.examine()

    def unknown_id(self, model: dict) -> int | None:
        """The id that stands for what the vocabulary lacks."""
        if model.get("type") == "Unigram":
            return model.get("unk_id")
        return self.vocab.get(model.get("unk_token"))

    def examine(self):
        """Find out from SAMPLES whether the tokenizer keeps a text as it is. Raises ValueError where
        its decoder does more than put pieces together."""
        kept = []
        for sample in SAMPLES:
            text = self.normalize("".join(char for char in sample if not self.lacks(char)))
            ids = encode_plainly(self.first, text) or []
            self.compare_decoders(ids)
            kept.append((text, self.join(ids)))
        whole = [value for value, piece in enumerate(self.pieces) if piece and is_text(piece)]
        spread = whole[::max(1, len(whole) // 50)]
        for pair in zip(spread, spread[1:], strict=False):
            self.compare_decoders(pair)
        is_known = any(text.strip() for text, _ in kept)        # else it knows only whole words
        self.lossless = is_known and all(ours in (text, f" {text}") for text, ours in kept)
        unchanged = all(self.normalize(sample) == sample for sample in SAMPLES)
        self.exact = is_known and unchanged and all(ours == text for text, ours in kept)

    def compare_decoders(self, ids):
        """Find out whether decoding drops a space before the first word. Raises ValueError where it is
        not the pieces that are put together."""
        ours = self.join(ids)
        with package_errors("the package tokenizers cannot decode it"):
            theirs = self.first.decode(list(ids), skip_special_tokens=False)
        if ours == f" {theirs}":
            self.prefix = True
        elif ours != theirs:
            raise ValueError("its decoder does more than put the pieces of a text together")

    def normalize(self, text: str) -> str:
        """What the pieces of a text's ids have to spell, if nothing is lost."""
        if not self.is_byte_level:
            return text.replace(SPACE_MARK, " ")
        normalizer = self.rest.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def lacks(self, char: str) -> bool:
        """Whether the tokenizer has no ids for a character, or not for all of its bytes."""
        ids = encode_plainly(self.rest, f"a{char}a")
        if ids is None:
            return True
        around = self.join(ids).strip()
        is_dropped = around == "aa" and (self.is_byte_level or not char.isspace())
        return self.unknown in ids or is_dropped or ("\ufffd" in around and char != "\ufffd")

    def join(self, ids) -> str:
        return b"".join(self.pieces[value] for value in ids).decode("utf-8", "replace")

    def encode(self, text: str, begins: bool, most: int) -> list:
        """The ids of a text, of at most `most` characters at once; begins: it is the beginning of a
        whole text. Raises ValueError that names the characters which the tokenizer lacks."""
        ids = []
        start = 0
        while start == 0 or start < len(text):
            end = find_space(text, start, most)
            ids += self.encode_piece(text[start:end], begins and start == 0)
            start = max(end, 1)
        return ids

    def encode_piece(self, text: str, begins: bool) -> list:
        backend = self.first if begins else self.rest
        ids = encode_plainly(backend, text)
        if ids is None or self.unknown in ids:
            self.refuse(text)
        if self.lossless:
            size = sum(len(self.pieces[value]) for value in ids)
            added = size - len(self.normalize(text).encode("utf-8"))
            if added != 0 and not (begins and added == 1):      # 1: the space before the first word
                self.refuse(text)
        return ids

    def refuse(self, text: str):
        """Raise ValueError for a text that would not come back whole."""
        lacking = [char for char in sorted(set(text)) if self.lacks(char)]
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        named = " ".join(map(repr, lacking[:10])) or "tokens for all of the text"
        raise ValueError(f"the tokenizer has no {named}{more}")
