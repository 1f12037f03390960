"""The text of a prepared set, decoded from its token files: whole, a piece at a time, or pieces spread
evenly over it."""

import codecs
from pathlib import Path

import numpy as np

from inkling.dataset import check_ids, read_chunks, split_files
from inkling.tokenizer import Tokenizer, code_points

PIECES = 64                             # of which a sample consists
PART = 1 << 16                          # ids that are decoded at once
END = "\0"                              # stands for an end-of-text token


def sample_ids(ids, most: int) -> np.ndarray:
    """A copy of all `ids` (tokens,), or, where there are more than `most`, PIECES pieces spread evenly
    over them, about `most` ids in all."""
    if len(ids) <= most:
        return np.array(ids[0:len(ids)])
    return np.concatenate(cut_evenly(ids, PIECES, max(1, most // PIECES)))


def cut_evenly(ids, count: int, length: int) -> list:
    """`count` copies of `length` ids in a row, spread evenly over `ids` (tokens,), which has that many."""
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return [np.array(ids[int(start):int(start) + length]) for start in starts]


def decode_ids(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    """The text of `ids` (tokens,) in UTF-8, with END for each end-of-text token."""
    pieces = list(tokenizer.pieces)
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = END.encode()
    text = bytearray()
    for first in range(0, len(ids), PART):      # bytes.join takes 80 bytes of memory for each of what it joins
        text += b"".join(map(pieces.__getitem__, ids[first:first + PART].tolist()))
    return bytes(text)


def to_symbols(text: bytes, in_bytes: bool = False) -> np.ndarray:
    """(n,) in uint32: the characters of a text as code points, or its bytes. Half a character, as at
    the edges of a sample, is left out."""
    if in_bytes:
        return np.frombuffer(text, np.uint8).astype(np.uint32)
    return code_points(text.decode("utf-8", "ignore"))


def read_symbols(folder: Path, meta: dict, split: str, tokenizer: Tokenizer, suffix: str = ""):
    """Yield the code points of a whole split in pieces, (characters,) in uint32 each, as `prepare.py
    --decode` writes them. suffix: as `open_split` takes it."""
    return stream_symbols(tokenizer, read_split(folder, meta, split, suffix))


def read_split(folder: Path, meta: dict, split: str, suffix: str):
    """Yield the ids of a split in pieces, read and not mapped: what is mapped counts as memory."""
    for name, _, _ in split_files(meta, split):
        for ids in read_chunks(folder / f"{name}{suffix}", meta["dtype"]):
            check_ids(ids, meta["vocab_size"], split)
            yield ids


def decode_symbols(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The same of some `ids` (tokens,): (characters,) in uint32."""
    return np.concatenate([*stream_symbols(tokenizer, [ids]), np.empty(0, np.uint32)])


def stream_symbols(tokenizer: Tokenizer, chunks):
    """Yield the code points of consecutive ids. Bytes that form no character are U+FFFD, as in what is
    generated."""
    if tokenizer.kind == "char" and tokenizer.fallback is None:
        chars = code_points(tokenizer.stored["chars"])
        for ids in chunks:
            yield chars[ids]
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    previous = None
    for ids in chunks:
        if tokenizer.kind == "byte":
            yield code_points(decoder.decode(ids.tobytes()))
            continue
        for first in range(0, len(ids), PART):
            part = ids[first:first + PART].tolist()
            yield code_points(decoder.decode(tokenizer.document_bytes(part, previous)))
            previous = part[-1]
    yield code_points(decoder.decode(b"", final=True))
