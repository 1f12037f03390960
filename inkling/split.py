"""Which documents, or which parts of them, are kept for validation."""

import hashlib
import sys
from dataclasses import dataclass, field

import numpy as np

from inkling.tokenizer import code_points

MANY = 10_000                           # documents up to which the share that goes to val is exact


def no_counts() -> np.ndarray:
    return np.zeros(sys.maxunicode + 1, np.int64)


@dataclass
class Survey:
    """What the first reading of the documents finds out."""

    documents: int = 0
    characters: int = 0
    lengths: list = field(default_factory=list)  # characters of each of the first MANY documents
    hashes: list = field(default_factory=list)  # their seeded hashes, which decide the split
    counts: np.ndarray = field(default_factory=no_counts)       # of each character

    def characters_seen(self, times: int = 1) -> str:
        """The characters that occur at least that many times, sorted."""
        return "".join(map(chr, np.flatnonzero(self.counts >= times)))


def survey_documents(reader, seed: int = 0, count_characters: bool = True) -> Survey:
    """Read all documents once. reader: yields (document, whether it begins here, piece, piece in
    UTF-8)."""
    survey = Survey()
    for number, begins, piece, raw in reader:
        if begins:
            survey.documents += 1
        if begins and number < MANY:
            survey.lengths.append(0)
            survey.hashes.append(seeded_hash(raw, seed))
        if number < MANY:
            survey.lengths[number] += len(piece)
        survey.characters += len(piece)
        if count_characters:
            is_ascii = len(raw) == len(piece)
            counts = np.bincount(np.frombuffer(raw, np.uint8) if is_ascii else code_points(piece))
            survey.counts[:counts.size] += counts
    return survey


def seeded_hash(text: bytes, seed: int) -> int:
    """A number below 2**64 that depends on the text alone, so that a document which occurs twice is
    not trained on and met again in val."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def keeps_documents_whole(documents: int, val_fraction: float) -> bool:
    """Whether there are enough documents to put each on one side: 1/val_fraction, and at least
    two."""
    return val_fraction > 0 and documents >= max(2, 1 / val_fraction)


def split_documents(reader, survey: Survey, val_fraction: float, seed: int = 0):
    """Yield (split, document, piece) for the pieces of `reader`. Few documents, and a single one,
    are each cut near their end; enough of them go whole to one side or the other."""
    if keeps_documents_whole(survey.documents, val_fraction):
        return assign_documents(reader, survey, val_fraction, seed)
    return cut_documents(reader, survey, val_fraction)


def assign_documents(reader, survey: Survey, val_fraction: float, seed: int):
    """Whole documents. Of up to MANY, int(documents * val_fraction) go to val (fewer if equal texts
    do not fit in): those with the lowest hashes. Of more, those whose hash is below that fraction
    of its range."""
    exact = survey.documents <= MANY
    chosen = choose_lowest(survey.hashes, int(survey.documents * val_fraction)) if exact else set()
    split = "train"
    for number, begins, piece, raw in reader:
        if begins:
            is_val = number in chosen if exact else seeded_hash(raw, seed) < val_fraction * 2**64
            split = "val" if is_val else "train"
        yield split, number, piece


def choose_lowest(hashes: list, count: int) -> set:
    """The numbers of `count` documents, at least of one. Equal texts stay together: they are chosen
    where there is room for all of them."""
    equal = {}
    for number, value in enumerate(hashes):
        equal.setdefault(value, []).append(number)
    room = max(1, count)
    chosen = set()
    for value in sorted(equal):
        if len(equal[value]) <= room:
            room -= len(equal[value])
            chosen.update(equal[value])
    return chosen


def cut_documents(reader, survey: Survey, val_fraction: float):
    """Each document in two parts, cut at character int(characters * (1 - val_fraction))."""
    position = 0                                        # of the piece in its document
    for number, begins, piece, _ in reader:
        if begins:
            position = 0
        cut = len(piece)
        if number < len(survey.lengths):                # there are more only if nothing goes to val
            cut = max(0, int(survey.lengths[number] * (1 - val_fraction)) - position)
        position += len(piece)
        if piece[:cut]:
            yield "train", number, piece[:cut]
        if piece[cut:]:
            yield "val", number, piece[cut:]
