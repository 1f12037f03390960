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
from inkling.files import atomic_write
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
    """The ids of some consecutive text of a split, and how much text they stand for."""

    split: str
    ids: np.ndarray                     # (tokens,)
    characters: int
    bytes: int


def encode_pieces(split_pieces, tokenizer: Tokenizer, eot: bool, workers: int):
    """Yield Encoded texts in order, computed by `workers` threads: tiktoken and numpy release the
    interpreter's lock. Only a few jobs are held at a time.

    split_pieces: (split, document, piece), in order.
    eot: put the end-of-text token between documents."""
    if tokenizer.kind == "bpe":
        tokenizer.encode("a")           # what it creates on first use is created once
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in make_jobs(split_pieces, eot):
            waiting.append(pool.submit(encode_job, tokenizer, job))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def make_jobs(split_pieces, eot: bool):
    """Yield lists of (split, whether the end-of-text token comes first, whether a document begins,
    piece), of about JOB characters each."""
    job = []
    size = 0
    last = {}                                           # document of each split
    for split, number, piece in split_pieces:
        for part in cut_pieces(piece, JOB):
            begins = last.get(split) != number
            eot_first = eot and begins and split in last
            job.append((split, eot_first, begins and (eot_first or split not in last), part))
            last[split] = number
            size += len(part)
            if size >= JOB:
                yield job
                job = []
                size = 0
    if job:
        yield job


def encode_job(tokenizer: Tokenizer, job: list) -> list:
    """A thread's share: one Encoded text of each split that occurs in it."""
    results = []
    for split in dict.fromkeys(split for split, *_ in job):
        texts = [(eot_first, piece) for name, eot_first, _, piece in job if name == split]
        begins = [begins for name, _, begins, _ in job if name == split]
        ids = tokenizer.encode_joined(texts, begins)
        characters = sum(len(piece) for _, piece in texts)
        size = sum(utf8_size(piece) for _, piece in texts)
        results.append(Encoded(split, ids, characters, size))
    return results


# -- writing ---------------------------------------------------------------------------------------

@dataclass
class Shard:
    tokens: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class SplitWriter:
    """Writes the ids of one split as they come to SPLIT.bin and, when that is full, to
    SPLIT_001.bin and so on; keeps the counts and checksums for meta.json. `files` is an ExitStack
    that publishes all of them when it closes."""

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
        self.open_shard(f"{split}.bin")

    def open_shard(self, name: str):
        self.open_files.append(self.files.enter_context(atomic_write(self.folder / name)))
        self.shards.append(Shard())

    def write(self, encoded: Encoded):
        self.characters += encoded.characters
        self.bytes += encoded.bytes
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

    def sync(self):
        """Flush all files to the disk."""
        for file in self.open_files:
            file.flush()
            os.fsync(file.fileno())

    def entry(self) -> dict:
        """What meta.json says of the split."""
        entry = {"tokens": self.whole.tokens, "characters": self.characters, "bytes": self.bytes,
                 "sha256": self.whole.digest.hexdigest()}
        if len(self.shards) > 1:
            entry["shards"] = [{"tokens": shard.tokens, "sha256": shard.digest.hexdigest()}
                               for shard in self.shards]
        return entry
