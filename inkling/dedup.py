"""Documents that are equal to an earlier one, or nearly so, which --dedup drops.

Nearly equal are those that have most of their runs of SHINGLE characters in common, as estimated by
minhash (Broder 1997, "On the resemblance and containment of documents") with a single hash function
whose range is divided into BINS (Li, Owen and Zhang 2012, "One permutation hashing"; an empty bin
borrows from the next, Shrivastava and Li 2014), of which 16 bits each are kept (Li and König 2010,
"b-bit minwise hashing"). What is compared are documents that agree in one of the bands of BAND bins.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from inkling.format import counted
from inkling.runs import hash_runs
from inkling.tokenizer import code_points

SHINGLE = 8                             # characters
LEAST = 50                              # characters of a document that is compared by its shingles
BINS = 64
BAND = 4                                # bins of 16 bits, which make one number of 64
NEAR = 0.8                              # the share of equal bins from which on two documents are nearly equal
MOST = 1_000_000                        # documents that are compared by their shingles, in 128 MB
AT_ONCE = 1 << 16                       # pairs of documents
EMPTY = np.uint64(2**64 - 1)


class Sketch:
    """A document's digest and the smallest hash in each bin, from its pieces."""

    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=16)
        self.smallest = np.full(BINS, EMPTY)
        self.tail = np.empty(0, np.uint32)              # symbols that begin shingles with the next piece
        self.characters = 0

    def add(self, piece: str, raw: bytes):
        self.digest.update(raw)
        self.characters += len(piece)
        symbols = np.concatenate([self.tail, code_points(piece)])
        hashes = hash_runs(symbols, np.arange(max(0, len(symbols) - SHINGLE + 1)), SHINGLE)
        hashes ^= hashes >> np.uint64(32)               # so that all bits depend on all characters
        hashes *= np.uint64(0xD6E8FEB86659FD93)
        hashes ^= hashes >> np.uint64(32)
        np.minimum.at(self.smallest, (hashes % np.uint64(BINS)).astype(np.int64), hashes)
        self.tail = symbols[max(0, len(symbols) - SHINGLE + 1):]

    def signature(self) -> np.ndarray:
        """(BINS,) in uint16; zeros for a document that is too short."""
        filled = np.flatnonzero(self.smallest != EMPTY)
        if self.characters < LEAST or not len(filled):
            return np.zeros(BINS, np.uint16)
        source = filled[np.searchsorted(filled, np.arange(BINS)) % len(filled)]
        return (self.smallest[source] >> np.uint64(8)).astype(np.uint16)


@dataclass
class Duplicates:
    """keep: of each reader, (documents,) of bool. equal, near: documents that are dropped."""

    keep: list
    equal: int
    near: int

    @property
    def documents(self) -> int:
        return sum(map(len, self.keep))


def find_duplicates(readers: list) -> Duplicates:
    """Which documents of several readers to keep: the first, in the order of the readers, of those that
    are equal, and then each that is not nearly equal to one before it that is kept."""
    digests = bytearray()
    signatures = bytearray()
    counts = []
    for reader in readers:
        before = len(digests)
        for sketch in sketch_documents(reader):
            digests += sketch.digest.digest()
            if len(signatures) < MOST * 2 * BINS:
                signatures += sketch.signature().tobytes()
        counts.append((len(digests) - before) // 16)
    keep = find_first(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    equal = int((~keep).sum())
    drop_near(keep, np.frombuffer(signatures, np.uint16).reshape(-1, BINS))
    return Duplicates(np.split(keep, np.cumsum(counts)[:-1]), equal, int((~keep).sum()) - equal)


def sketch_documents(reader):
    """Yield a Sketch for each document of a reader."""
    sketch = None
    for _, begins, piece, raw in reader:
        if begins:
            if sketch:
                yield sketch
            sketch = Sketch()
        sketch.add(piece, raw)
    if sketch:
        yield sketch


def find_first(digests: np.ndarray) -> np.ndarray:
    """(documents,) whether no document before it has the same digest. digests: (documents, 2) in uint64."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))          # equal ones stay in their order
    repeats = (digests[order[1:]] == digests[order[:-1]]).all(1)
    keep = np.ones(len(digests), bool)
    keep[order[1:][repeats]] = False
    return keep


def drop_near(keep: np.ndarray, signatures: np.ndarray):
    """Clear `keep` (documents,) of each document that is nearly equal to one before it that is kept.
    signatures: (documents, BINS), of the first so many documents."""
    kept = np.flatnonzero(keep[:len(signatures)] & signatures.any(1))
    bands = signatures.view(np.uint64)                          # (documents, BINS / BAND)
    pairs = [find_near(signatures, kept[np.argsort(bands[kept, band], kind="stable")], bands[:, band])
             for band in range(BINS // BAND)]
    earlier, later = np.unique(np.concatenate(pairs), axis=0).T
    for place in np.argsort(later, kind="stable"):              # whether an earlier one is kept is decided by then
        if keep[earlier[place]]:
            keep[later[place]] = False


def find_near(signatures: np.ndarray, order: np.ndarray, band: np.ndarray) -> np.ndarray:
    """(pairs, 2) documents that agree in a band and are nearly equal, the earlier one first: each is
    compared with the first that has its band, and with the one just before it. order: the documents
    by their bands."""
    is_first = np.ones(len(order), bool)
    is_first[1:] = band[order[1:]] != band[order[:-1]]
    begins = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    later = np.flatnonzero(~is_first)
    pairs = np.concatenate([np.stack([order[begins[later]], order[later]], 1),
                            np.stack([order[later - 1], order[later]], 1)])
    near = [np.empty((0, 2), np.int64)]
    for first in range(0, len(pairs), AT_ONCE):
        part = pairs[first:first + AT_ONCE]
        same = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(1)
        near.append(part[same >= NEAR])
    return np.concatenate(near)


def dedup_lines(duplicates: Duplicates) -> list:
    """What prepare.py prints of them."""
    if duplicates.documents == 1:
        return ["--dedup compares documents, and this text is a single one: --separator divides it"]
    lines = [f"--dedup: of {counted(duplicates.documents, 'document')}, {duplicates.equal:,} equal to an earlier one "
             f"and {duplicates.near:,} nearly so (about {100 * NEAR:.0f}% of their runs of {SHINGLE} characters, or "
             "more, are the same) dropped; the first of each is kept"]
    if duplicates.documents > MOST:
        lines.append(f"--dedup: only the first {MOST:,} documents were compared for being nearly equal")
    return lines
