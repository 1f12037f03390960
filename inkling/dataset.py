"""A prepared data set: its meta.json and token files, checked, memory-mapped, and replaced as a whole;
a permutation that needs no memory."""

import contextlib
import json
import mmap
import os
import re
from pathlib import Path

import numpy as np

from inkling.cli import UserError
from inkling.files import ROOT, atomic_write, lock_folder, sync_folder
from inkling.hints import fits_set_name, set_name_like, sets_in, there_is

SPLITS = ("train", "val")
LARGEST_ARRAY = 1 << 22                 # elements up to which a permutation is an array
MOST_LOGITS = 1 << 27                   # that an evaluation holds at a time: half a GB in float32


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    if vocab_size <= 2**8:
        return np.dtype("uint8")
    if vocab_size <= 2**16:
        return np.dtype("uint16")
    return np.dtype("uint32")


def is_set_name(name: str) -> bool:
    """Whether a data set may have this name: letters of any script, digits and . _ -, with a letter or
    a digit first."""
    return name[:1].isalnum() and all(map(fits_set_name, name))


def data_folder(dataset: str, data_dir: str = "") -> Path:
    """data/NAME beside the programs, or `data_dir`/NAME; relative to the current folder where it
    lies below it."""
    sets = Path(data_dir or ROOT / "data")
    if not is_set_name(dataset):
        path = Path(dataset.replace("\\", "/"))           # data\book, as Windows writes it
        name = path.parent.name if path.suffix in (".bin", ".json") else path.name
        is_path = is_set_name(name) and has_set(sets / name)
        way_out = f" (its name alone: {name})" if is_path else f", but {set_name_like(name)} is"
        raise UserError(f"{dataset!r} is not a valid data set name{way_out}: use letters, digits and . _ -, "
                        f"starting with a letter or digit{there_is(name, sets_in(sets))}")
    folder = sets / dataset
    if folder.is_relative_to(Path.cwd()):
        return folder.relative_to(Path.cwd())       # short in messages
    return folder


# -- meta.json -------------------------------------------------------------------------------------

def again(folder: Path) -> str:
    """The way out of a damaged set."""
    return f"run python prepare.py again for {folder.name}"


def read_meta(folder: Path) -> dict:
    """The content of meta.json, checked. Raises UserError on anything that prepare.py did not
    write."""
    if (folder / COMMITTED).exists():
        lock = lock_folder(folder, wait=True)           # another process may be at it
        try:
            finish_replacement(folder)
        finally:
            lock.close()
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != 1:
            raise UserError(f"{path} has format {meta['format']}, this version reads 1: "
                            f"{again(folder)}")
        if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
            raise UserError(f"{path}: dtype={meta['dtype']} does not fit "
                            f"vocab_size={meta['vocab_size']}: {again(folder)}")
        for split in SPLITS:
            check_entry(meta["splits"][split])
        if not isinstance(meta["tokenizer"], dict):
            raise ValueError("no tokenizer")
        if not isinstance(meta.get("joiner", ""), str):
            raise ValueError("its joiner is not text")
    except FileNotFoundError:
        raise UserError(f"no data set in {folder}, as {path} is missing: python prepare.py "
                        f"YOUR_TEXT_FILE --name={folder.name} makes one{there_is(folder.name, sets_in(folder.parent))}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}: {again(folder)}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): {again(folder)}")
    return meta


def check_entry(entry: dict):
    """Raise ValueError, KeyError or TypeError unless `entry` describes a split of a set."""
    for key in ("tokens", "characters", "bytes", "joiners"):
        count = entry.get(key, 0) if key == "joiners" else entry[key]
        if type(count) is not int or count < 0:
            raise ValueError(f"{key} is not a count")
    if not isinstance(entry["sha256"], str):
        raise ValueError("no checksum")
    if "shards" not in entry:
        return
    shards = entry["shards"]
    if not shards:
        raise ValueError("an empty list of shards")
    for shard in shards:
        counted = type(shard["tokens"]) is int and shard["tokens"] > 0
        if not counted or not isinstance(shard["sha256"], str):
            raise ValueError("a shard without its count or checksum")
    if sum(shard["tokens"] for shard in shards) != entry["tokens"]:
        raise ValueError("the tokens of the shards do not add up")


def encode_meta(meta: dict) -> bytes:
    """The content of meta.json. Half a surrogate in a file's name (a byte that is not UTF-8) is written
    as JSON's \\ud800."""
    return json.dumps(meta, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")


def write_meta(folder: Path, meta: dict):
    """Replace meta.json alone. Only by a process that holds the folder."""
    with atomic_write(folder / "meta.json") as file:
        file.write(encode_meta(meta))


def split_files(meta: dict, split: str) -> list:
    """[(name, tokens, SHA-256)] of the files of a split: one, or its shards in order."""
    entry = meta["splits"][split]
    if "shards" not in entry:
        return [(f"{split}.bin", entry["tokens"], entry["sha256"])]
    return [(f"{split}_{number:03}.bin", shard["tokens"], shard["sha256"])
            for number, shard in enumerate(entry["shards"])]


# -- replacing a set as a whole --------------------------------------------------------------------

# New token files are written beside the old ones, as NAME.bin.tmp, and synced. Then one rename makes the
# new meta.json, under this name, the set's: from there on the new set is the one that counts. What is left
# are renames, which whoever opens the set finishes if the first process could not.
COMMITTED = "meta.json.new"
OWN_FILE = re.compile(r"(meta\.json|(train|val)(_\d+)?\.bin)(\.tmp|\.new)?")


def has_set(folder: Path) -> bool:
    return os.path.isfile(folder / "meta.json") or os.path.isfile(folder / COMMITTED)


def is_part_of_set(path: Path) -> bool:
    """Whether a file is a prepared set's own, and no text. A meta.json without token files is any
    file of that name."""
    if not OWN_FILE.fullmatch(path.name) or not has_set(path.parent):
        return False
    return any((path.parent / name).exists() for name in ("train.bin", "train_000.bin", "train.bin.tmp"))


def remove_unfinished(folder: Path):
    """Remove the new token files of a replacement that was never committed."""
    if (folder / COMMITTED).exists():
        return
    for path in [*folder.glob("*.bin.tmp"), *folder.glob("meta.json.tmp")]:
        with contextlib.suppress(OSError):
            path.unlink()


def commit_replacement(folder: Path, meta: dict):
    """Make the set that `meta` describes, whose token files are there as NAME.bin.tmp and synced, the
    one in `folder`."""
    sync_folder(folder)
    with atomic_write(folder / COMMITTED, temporary=folder / "meta.json.tmp") as file:
        file.write(encode_meta(meta))
    finish_replacement(folder)


def finish_replacement(folder: Path):
    """Finish a replacement that was committed, if there is one. Only by a process that holds the
    folder."""
    committed = folder / COMMITTED
    if not committed.exists():
        return
    try:
        meta = json.loads(committed.read_text(encoding="utf-8"))
        names = {name for split in SPLITS for name, _, _ in split_files(meta, split)}
        for name in sorted(names):
            with contextlib.suppress(FileNotFoundError):        # renamed already
                os.replace(folder / f"{name}.tmp", folder / name)
        for path in [path for split in SPLITS for path in folder.glob(f"{split}*.bin")]:
            if OWN_FILE.fullmatch(path.name) and path.name not in names:
                path.unlink()                           # of the old set
        sync_folder(folder)
        os.replace(committed, folder / "meta.json")
        sync_folder(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{committed} is damaged ({type(error).__name__}: {error}): remove it, and {again(folder)}")
    except OSError as error:
        raise UserError(f"{folder}: the new set is complete, but its files could not be renamed "
                        f"({error.strerror or error}): whatever opens the set next does that")


# -- token files -----------------------------------------------------------------------------------

class Shards:
    """The ids of several mapped files as one array. It has a length, slices, and can be indexed by
    an array of positions."""

    def __init__(self, arrays: list):
        self.arrays = arrays
        self.dtype = arrays[0].dtype
        self.ends = np.cumsum([len(array) for array in arrays])     # of each shard, in the whole

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"positions {index.min()} to {index.max()} of {len(self)}")
        ids = np.empty(index.shape, self.dtype)
        shard_of = np.searchsorted(self.ends, index, side="right")
        for number in np.unique(shard_of):
            array = self.arrays[number]
            here = shard_of == number
            ids[here] = array[index[here] - (self.ends[number] - len(array))]
        return ids


def map_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    """The ids in a file that is not empty, memory-mapped. Access is random, so read-ahead is turned
    off."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)


def read_chunks(path: Path, dtype: str):
    """Yield the ids of a .bin file, a few megabytes at a time."""
    with open(path, "rb") as file:
        while (ids := np.fromfile(file, dtype, 1 << 20)).size:
            yield ids


def open_split(folder: Path, meta: dict, split: str, suffix: str = "") -> "np.ndarray | Shards":
    """The token ids (tokens,) of a split, memory-mapped. The size of each file is checked against
    `meta`. suffix: what follows the files' names, .tmp for a set that is not committed yet."""
    dtype = np.dtype(meta["dtype"])
    arrays = []
    for name, count, _ in split_files(meta, split):
        path = folder / f"{name}{suffix}"
        if not path.is_file():
            raise UserError(f"{path} is missing: {again(folder)}")
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(f"{path} has {size:,} bytes; meta.json says {count:,} tokens of "
                            f"{dtype}, {count * dtype.itemsize:,} bytes: {again(folder)}")
        arrays.append(map_ids(path, dtype) if count else np.empty(0, dtype))
    return arrays[0] if len(arrays) == 1 else Shards(arrays)


def open_splits(folder: Path) -> tuple:
    """({"train": ids, "val": ids}, meta) of one set, though another may take its place meanwhile."""
    while True:
        meta = read_meta(folder)
        try:
            data = {split: open_split(folder, meta, split) for split in SPLITS}
        except UserError:
            if read_meta(folder) == meta:
                raise
            continue
        if read_meta(folder) == meta:
            return data, meta


def open_data(folder: Path, block_size: int) -> tuple:
    """({"train": ids, "val": ids}, meta). Raises UserError if a split is too short for one window
    of `block_size` tokens and the target after it."""
    data, meta = open_splits(folder)
    ways_out = {"train": "bring more text", "val": "raise prepare.py's --val_fraction"}
    for split, way_out in ways_out.items():
        if len(data[split]) <= block_size:
            raise UserError(f"{split} has {len(data[split]):,} tokens; block_size={block_size} "
                            f"needs {block_size + 1}: lower --block_size or {way_out}")
    return data, meta


def check_ids(ids: np.ndarray, vocab_size: int, split: str):
    """Refuse ids that the model has no row for."""
    if ids.size and int(ids.max()) >= vocab_size:
        raise UserError(f"{split}.bin holds token id {int(ids.max()):,}, but "
                        f"vocab_size={vocab_size:,}: check the set with python prepare.py --check "
                        "NAME, or prepare it again")


def windows_at_once(block_size: int, vocab_size: int) -> int:
    """How many windows an evaluation computes at a time: 16, or fewer where their logits would
    exceed half a GB."""
    return min(16, max(1, MOST_LOGITS // (block_size * vocab_size)))


# -- a random order --------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15             # Knuth's multiplicative hash
WORD = (1 << 64) - 1


def mix(value: int) -> int:
    """24 bits that depend on all bits of `value`: the hash is applied twice."""
    value = value * GOLDEN & WORD
    value = (value ^ value >> 32) * GOLDEN & WORD
    return value >> 40


class Shuffle:
    """A permutation of range(n) that takes no memory: a Feistel network over the smallest even
    number of bits that holds n. A result of n or more goes through it again until one is below n
    (Black and Rogaway 2002)."""

    def __init__(self, rng: np.random.Generator, n: int):
        self.n = n
        self.half_bits = ((n - 1).bit_length() + 1) // 2
        self.keys = [int(key) for key in rng.integers(2**63, size=4)]

    def __getitem__(self, position: int) -> int:
        while True:
            position = self.permute(position)
            if position < self.n:
                return position

    def permute(self, value: int) -> int:
        """A permutation of the numbers of 2 * half_bits bits."""
        mask = (1 << self.half_bits) - 1
        left = value >> self.half_bits
        right = value & mask
        for key in self.keys:
            left, right = right, left ^ mix(right + key) & mask
        return left << self.half_bits | right


def random_order(rng: np.random.Generator, n: int) -> "np.ndarray | Shuffle":
    """A random permutation of range(n), to be indexed: an array, or a Shuffle where the array would
    be large."""
    if n <= LARGEST_ARRAY:
        return rng.permutation(n)
    return Shuffle(rng, n)
