"""Token files and their meta.json: checked, mapped, sharded; a permutation without memory."""

import json
import mmap
import re
from pathlib import Path

import numpy as np

from inkling.cli import UserError
from inkling.files import ROOT

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return np.dtype("uint8" if vocab_size <= 256 else "uint16" if vocab_size <= 65_536 else "uint32")


def data_folder(dataset: str, data_dir: str = "") -> Path:
    """data/NAME beside the programs, or under `data_dir`."""
    if not NAME.fullmatch(dataset):
        raise UserError(f"{dataset!r} is no name of a data set: letters, digits and . _ - after a first letter or digit")
    folder = Path(data_dir or ROOT / "data") / dataset
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder     # short in messages


def read_meta(folder: Path) -> dict:
    """The checked content of meta.json. `fail`s in one line on anything that prepare.py did not write."""
    again = f"run python prepare.py again for {folder.name}"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != 1:
            raise UserError(f"{folder / 'meta.json'} has format {meta['format']}, this version reads 1: {again}")
        if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
            raise UserError(f"{folder / 'meta.json'}: dtype={meta['dtype']} does not fit vocab_size={meta['vocab_size']}: {again}")
        for split in ("train", "val"):
            counts = [meta["splits"][split][key] for key in ("tokens", "characters", "bytes")]
            if any(type(count) is not int or count < 0 for count in counts):
                raise ValueError("a count is no whole number")
            if not isinstance(meta["splits"][split]["sha256"], str):
                raise ValueError("no checksum")
            shards = meta["splits"][split].get("shards", [{**meta["splits"][split]}])
            if not shards or any(type(shard["tokens"]) is not int or shard["tokens"] < 1 or
                                 not isinstance(shard["sha256"], str) for shard in shards[1:]):
                raise ValueError("a shard without its count or checksum")
            if sum(shard["tokens"] for shard in shards) != counts[0]:
                raise ValueError("the shards' tokens do not add up")
        if not isinstance(meta["tokenizer"], dict):
            raise ValueError("no tokenizer")
        return meta
    except FileNotFoundError:
        raise UserError(f"no data set in {folder}, as {folder / 'meta.json'} is missing: python prepare.py YOUR_TEXT_FILE "
             f"--name={folder.name} makes one")
    except OSError as error:
        raise UserError(f"cannot read {folder / 'meta.json'}: {error.strerror or error}: {again}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): {again}")


def split_files(meta: dict, split: str) -> list:
    """[(name, tokens, SHA-256)] of a split's files: one, or its shards in order."""
    entry = meta["splits"][split]
    if "shards" not in entry:
        return [(f"{split}.bin", entry["tokens"], entry["sha256"])]
    return [(f"{split}_{number:03}.bin", shard["tokens"], shard["sha256"])
            for number, shard in enumerate(entry["shards"])]


class Shards:
    """The ids of several mapped files as one array: its length, slices, and indexing by an array of places."""

    def __init__(self, parts: list):
        self.parts, self.dtype = parts, parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at):
        at = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"places {at.min()} to {at.max()} of {len(self)}")
        which, ids = np.searchsorted(self.ends, at, side="right"), np.empty(at.shape, self.dtype)
        for number in np.unique(which):
            here = which == number
            ids[here] = self.parts[number][at[here] - (self.ends[number] - len(self.parts[number]))]
        return ids


def map_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    """The numbers in a file that is not empty, mapped. They are read in small windows all over the file: what a system
    reads ahead, megabytes often, would cost a hundred times what is asked for."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)


def open_split(folder: Path, meta: dict, split: str):
    """The token ids of a split, mapped and not read (an array, or Shards); their count is checked against `meta`."""
    dtype, parts, again = np.dtype(meta["dtype"]), [], f"run python prepare.py again for {folder.name}"
    for name, count, _ in split_files(meta, split):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: {again}")
        if path.stat().st_size != count * dtype.itemsize:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; meta.json says {count:,} tokens of {dtype}, "
                 f"{count * dtype.itemsize:,} bytes: {again}")
        parts.append(map_ids(path, dtype) if count else np.empty(0, dtype))
    return parts[0] if len(parts) == 1 else Shards(parts)


def open_data(folder: Path, block_size: int) -> tuple:
    """({"train": ids, "val": ids}, meta), or one line that says which split is too short for a window."""
    meta = read_meta(folder)
    data = {split: open_split(folder, meta, split) for split in ("train", "val")}
    for split, more in (("train", "bring more text"), ("val", "raise prepare.py's --val_fraction")):
        if len(data[split]) <= block_size:
            raise UserError(f"{split} has {len(data[split]):,} tokens; block_size={block_size} needs {block_size + 1}: "
                 f"lower --block_size or {more}")
    return data, meta


class Shuffle:
    """A permutation of range(n) that takes no memory: a Feistel network over the least even number of bits that holds
    n, whose results from n on are put through it again until one lies below (Black and Rogaway 2002)."""

    def __init__(self, rng, n: int):
        self.n, self.half = n, ((n - 1).bit_length() + 1) // 2
        self.keys = [int(key) for key in rng.integers(2**63, size=4)]

    def __getitem__(self, place: int) -> int:
        mask = (1 << self.half) - 1
        while True:
            left, right = place >> self.half, place & mask
            for key in self.keys:
                mixed = (right + key) * 0x9E3779B97F4A7C15 & (1 << 64) - 1      # Knuth's multiplicative hash,
                mixed = (mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 & (1 << 64) - 1  # twice, so that all bits mix
                left, right = right, left ^ (mixed >> 40) & mask
            place = left << self.half | right
            if place < self.n:
                return place


def random_order(rng, n: int):
    """A random permutation of range(n), to be indexed: an array, or a Shuffle when the array would be a large one."""
    return rng.permutation(n) if n <= 1 << 22 else Shuffle(rng, n)


def windows_at_once(block_size: int, vocab_size: int) -> int:
    """How many windows an evaluation computes together: 16, or fewer where their logits would be over half a GB."""
    return min(16, max(1, 2**27 // (block_size * vocab_size)))


def check_ids(ids: np.ndarray, vocab_size: int, split: str):
    """Refuse ids that the model has no row for."""
    if ids.size and int(ids.max()) >= vocab_size:
        raise UserError(f"{split}.bin holds token id {int(ids.max()):,}, but vocab_size={vocab_size:,}: "
             "check the set with python prepare.py --check NAME, or prepare it again")
