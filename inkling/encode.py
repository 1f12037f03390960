"""Text to token files: tokenized in threads, written a split at a time."""

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from inkling.cli import UserError
from inkling.readers import cut_pieces
from inkling.tokenizer import Tokenizer, utf8_size

JOB = 1 << 18                           # characters that a thread encodes at once
MOST_SHARDS = 500                       # files of a split, all open while they are written


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- tokenizing ------------------------------------------------------------------------------------

@dataclass
class Encoded:
    """The ids of some consecutive text of a split, and how much text of the documents they stand
    for."""

    split: str
    ids: np.ndarray                     # (tokens,)
    characters: int
    bytes: int
    documents: int                      # that begin here
    joiners: int                        # texts between documents, which are none of theirs


def encode_pieces(split_pieces, tokenizer: Tokenizer, joiner: str | None, workers: int):
    """Yield Encoded texts in order, computed by `workers` threads: tiktoken and numpy release the
    interpreter's lock. Only a few jobs are held at a time.

    split_pieces: (split, document, piece), in order.
    joiner: the text between documents, which may be empty; None: the end-of-text token."""
    if tokenizer.kind == "bpe":
        tokenizer.encode("a")           # what it creates on first use is created once
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in make_jobs(split_pieces):
            waiting.append(pool.submit(encode_job, tokenizer, job, joiner))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def make_jobs(split_pieces):
    """Yield lists of (split, place of the piece, piece), of about JOB characters each. A piece is
    "first" in its split, "next" if it begins a later document, "same" if it continues one."""
    job = []
    size = 0
    last = {}                                           # document of each split
    for split, number, piece in split_pieces:
        for part in cut_pieces(piece, JOB):
            place = "first"
            if split in last:
                place = "same" if last[split] == number else "next"
            job.append((split, place, part))
            last[split] = number
            size += len(part)
            if size >= JOB:
                yield job
                job = []
                size = 0
    if job:
        yield job


def encode_job(tokenizer: Tokenizer, job: list, joiner: str | None) -> list:
    """A thread's share: one Encoded text of each split that occurs in it."""
    results = []
    for split in dict.fromkeys(split for split, _, _ in job):
        texts = [(place, piece) for name, place, piece in job if name == split]
        places = [place for place, _ in texts]
        results.append(Encoded(
            split,
            encode_texts(tokenizer, texts, joiner),
            characters=sum(len(piece) for _, piece in texts),
            bytes=sum(utf8_size(piece) for _, piece in texts),
            documents=places.count("first") + places.count("next"),
            joiners=places.count("next") if joiner else 0,
        ))
    return results


def encode_texts(tokenizer: Tokenizer, texts: list, joiner: str | None) -> np.ndarray:
    """Ids (tokens,) of [(place, text)] with `joiner`, or the end-of-text token, before each later
    document. No token spans two documents."""
    if joiner is None:
        return tokenizer.encode_joined([(place == "next", text) for place, text in texts],
                                       [place != "same" for place, _ in texts])
    if tokenizer.kind in ("char", "byte"):              # an id per character or byte: one call is faster
        return tokenizer.encode("".join(joiner + text if place == "next" else text for place, text in texts))
    between = tokenizer.encode(joiner, begins=False)
    parts = []
    for place, text in texts:
        if place == "next" and joiner:
            parts.append(between)
        parts.append(tokenizer.encode_joined([(False, text)], [place == "first"]))
    return np.concatenate(parts)


# -- writing ---------------------------------------------------------------------------------------

@dataclass
class Shard:
    tokens: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class SplitWriter:
    """Writes the ids of one split as they come to SPLIT.bin.tmp and, when that is full, to
    SPLIT_001.bin.tmp and so on; keeps the counts and checksums for meta.json. `files` is an
    ExitStack that closes all of them."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, files: ExitStack):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.files = files
        self.whole = Shard()            # counts all shards
        self.shards = []
        self.open_files = []
        self.characters = 0
        self.bytes = 0
        self.documents = 0
        self.joiners = 0
        self.open_shard(f"{split}.bin")

    def open_shard(self, name: str):
        self.open_files.append(self.files.enter_context(open(self.folder / f"{name}.tmp", "wb")))  # noqa: SIM115
        self.shards.append(Shard())

    def write(self, encoded: Encoded):
        self.characters += encoded.characters
        self.bytes += encoded.bytes
        self.documents += encoded.documents
        self.joiners += encoded.joiners
        ids = encoded.ids
        while ids.size:
            room = self.shard_tokens - self.shards[-1].tokens
            if room == 0:
                self.open_next_shard()
                continue
            self.write_ids(ids[:room])
            ids = ids[room:]

    def open_next_shard(self):
        if len(self.shards) == MOST_SHARDS:
            raise UserError(f"shard_tokens={self.shard_tokens} makes more than {MOST_SHARDS} files "
                            f"of {self.split}: raise it")
        self.open_shard(f"{self.split}_{len(self.shards):03}.bin")

    def write_ids(self, ids: np.ndarray):
        self.open_files[-1].write(ids)
        for count in (self.whole, self.shards[-1]):
            count.digest.update(ids)
            count.tokens += ids.size

    def finish(self):
        """Flush all files to the disk, and close them; the first of several shards gets its number."""
        for file in self.open_files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if len(self.shards) > 1:
            os.replace(self.folder / f"{self.split}.bin.tmp", self.folder / f"{self.split}_000.bin.tmp")

    def entry(self) -> dict:
        """What meta.json says of the split."""
        entry = {"tokens": self.whole.tokens, "characters": self.characters, "bytes": self.bytes,
                 "sha256": self.whole.digest.hexdigest()}
        if self.joiners:
            entry["joiners"] = self.joiners
        if len(self.shards) > 1:
            entry["shards"] = [{"tokens": shard.tokens, "sha256": shard.digest.hexdigest()}
                               for shard in self.shards]
        return entry
