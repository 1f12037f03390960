"""The text of a prepared set, decoded from its token files: whole, or pieces spread evenly over it."""

import numpy as np

from inkling.tokenizer import Tokenizer, code_points

PIECES = 64                             # of which a sample consists
PART = 1 << 16                          # ids that are decoded at once
END = "\0"                              # stands for an end-of-text token


def sample_ids(ids, most: int) -> np.ndarray:
    """A copy of all `ids` (tokens,), or, where there are more than `most`, PIECES pieces spread evenly
    over them, about `most` ids in all."""
    if len(ids) <= most:
        return np.array(ids[0:len(ids)])
    length = max(1, most // PIECES)
    starts = np.linspace(0, len(ids) - length, PIECES).astype(np.int64)
    return np.concatenate([ids[int(start):int(start) + length] for start in starts])


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
