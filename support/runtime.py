"""Devices, precision, processes, signals, locks, files: what a run needs from the machine, and nothing of the model.

torch is imported inside the functions that need it, so that prepare.py, which shares the file functions, never does.
"""

import contextlib
import copy
import gc
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np

from support.cli import fail

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:                     # everything else
    msvcrt = None

# A norm's gain stays in float32 in autocast; and a block returns its values, a view, which nothing changes in place.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
# The newer name of that argument of DistributedDataParallel is unknown to PyTorch 2.11.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CHECKPOINT_FORMAT = 1
OPEN = 2**31            # max_iters of a run whose max_minutes have not yet told how many steps they allow
KINDS = {"config": dict, "tokenizer": dict, "model": dict, "vocab_size": int, "step": int}      # in every checkpoint
KINDS_TO_GO_ON = {"evaluated": int, "best_step": int, "best_val_loss": float, "losses": dict, "seconds": float,
                  "optimizers": list, "scaler": dict}


# -- files ---------------------------------------------------------------------------------------------------------

def sync_folder(folder: Path):
    """Make a rename in `folder` durable. Windows offers no handle on a folder and needs none."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def written(path: Path):
    """A binary file that takes `path`'s place only when the block ends well: written beside it, flushed to the disk,
    renamed. On any error the old file stays as it is and nothing else is left. One writer at a time."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(folder: Path, wait: bool = False):
    """Hold `folder` for this process, or fail naming the process that does (wait: until it lets go). The lock dies
    with its process, however it ends. Returns the open file; keep it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")     # noqa: SIM115, held open on purpose
    except OSError as error:
        fail(f"cannot use the folder {folder}: {error.strerror or error}: name another")
    told = False
    while True:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                file.seek(1 << 20)      # a byte past the text, so that others can still read who holds it
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            break
        except OSError as error:
            if fcntl and not isinstance(error, BlockingIOError):
                break                   # a file system that knows no locks
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                fail(f"{folder} is in use by {holder}: wait for it, or give another --out_dir")
            if not told:
                print(f"waiting  for {holder}, which uses {folder}", flush=True)
            told = True
            time.sleep(0.2)
    with contextlib.suppress(OSError):          # a full disk: the folder is held all the same
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
    return file


def set_aside(folder: Path) -> Path:
    """Rename `folder` to the next free NAME.1, NAME.2, ... and return the new path."""
    if not folder.name:
        fail(f"{folder} holds a run and cannot be renamed: name a folder with --out_dir, or --init_from=resume")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def stamp(path: Path) -> tuple:
    """What changes when a file is written anew; () of no file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def claim(out_dir: Path, resuming: bool, expected: tuple | None = None):
    """Lock `out_dir` for a run. A new run first moves an old one there to NAME.1 (the next free number): nothing is
    lost. expected: the stamp of last.pt when it was looked at; another process may have gone on with the run since.
    Returns the lock, to be kept while the process lives."""
    held = lock(out_dir)
    if expected is not None and stamp(out_dir / "last.pt") != expected:
        fail(f"{out_dir}/last.pt has changed since this process looked at it: another one has gone on with the run; "
             "the same command again goes on from there")
    for left in out_dir.glob("*.tmp"):  # by a process that was killed while it wrote
        with contextlib.suppress(OSError):
            left.unlink()
    if resuming or not any((out_dir / name).exists() for name in ("last.pt", "ckpt.pt", "log.csv")):
        return held
    held.close()                        # Windows renames no folder with an open file
    print(f"{out_dir} holds a run: moved to {set_aside(out_dir)} (to go on with it instead: --init_from=resume, "
          f"with --out_dir naming it)", flush=True)
    return lock(out_dir)


# -- data ----------------------------------------------------------------------------------------------------------

def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return np.dtype("uint8" if vocab_size <= 256 else "uint16" if vocab_size <= 65_536 else "uint32")


def data_folder(dataset: str, data_dir: str = "") -> Path:
    """data/NAME beside the programs, or under `data_dir`."""
    if not NAME.fullmatch(dataset):
        fail(f"{dataset!r} is no name of a data set: letters, digits and . _ - after a first letter or digit")
    folder = Path(data_dir or ROOT / "data") / dataset
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder     # short in messages


def read_meta(folder: Path) -> dict:
    """The checked content of meta.json. `fail`s in one line on anything that prepare.py did not write."""
    again = f"run python prepare.py again for {folder.name}"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != 1:
            fail(f"{folder / 'meta.json'} has format {meta['format']}, this version reads 1: {again}")
        if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
            fail(f"{folder / 'meta.json'}: dtype={meta['dtype']} does not fit vocab_size={meta['vocab_size']}: {again}")
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
        fail(f"no data set in {folder}, as {folder / 'meta.json'} is missing: python prepare.py YOUR_TEXT_FILE "
             f"--name={folder.name} makes one")
    except OSError as error:
        fail(f"cannot read {folder / 'meta.json'}: {error.strerror or error}: {again}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): {again}")


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


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
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
            fail(f"{path} is missing: {again}")
        if path.stat().st_size != count * dtype.itemsize:
            fail(f"{path} has {path.stat().st_size:,} bytes; meta.json says {count:,} tokens of {dtype}, "
                 f"{count * dtype.itemsize:,} bytes: {again}")
        parts.append(mapped(path, dtype) if count else np.empty(0, dtype))
    return parts[0] if len(parts) == 1 else Shards(parts)


def open_data(folder: Path, block_size: int) -> tuple:
    """({"train": ids, "val": ids}, meta), or one line that says which split is too short for a window."""
    meta = read_meta(folder)
    data = {split: open_split(folder, meta, split) for split in ("train", "val")}
    for split, more in (("train", "bring more text"), ("val", "raise prepare.py's --val_fraction")):
        if len(data[split]) <= block_size:
            fail(f"{split} has {len(data[split]):,} tokens; block_size={block_size} needs {block_size + 1}: "
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


def shuffled(rng, n: int):
    """A random permutation of range(n), to be indexed: an array, or a Shuffle when the array would be a large one."""
    return rng.permutation(n) if n <= 1 << 22 else Shuffle(rng, n)


def windows_at_once(block_size: int, vocab_size: int) -> int:
    """How many windows an evaluation computes together: 16, or fewer where their logits would be over half a GB."""
    return min(16, max(1, 2**27 // (block_size * vocab_size)))


def check_ids(ids: np.ndarray, vocab_size: int, split: str):
    """Refuse ids that the model has no row for."""
    if ids.size and int(ids.max()) >= vocab_size:
        fail(f"{split}.bin holds token id {int(ids.max()):,}, but vocab_size={vocab_size:,}: "
             "check the set with python prepare.py --check NAME, or prepare it again")


# -- checkpoints ---------------------------------------------------------------------------------------------------

def save_checkpoint(content: dict, path: Path, step: int = 0, keep: int = 0) -> str:
    """Write a checkpoint atomically, and keep the latest `keep` as NAME-STEP.pt besides. Returns "" or, when the disk
    refuses, what went wrong: the old file is whole."""
    import torch

    if not all(tensor.isfinite().all() for tensor in content["model"].values()):
        return f"did not write {path}: the weights are not finite numbers"
    try:
        with written(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
        if keep:
            number(path, step, keep)
        return ""
    except (OSError, RuntimeError) as error:        # torch.save answers some failed writes with a RuntimeError
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or str(error)
        return f"could not write {path}: {reason.splitlines()[0]}"


def number(path: Path, step: int, keep: int):
    """Give the file another name, NAME-STEP.pt, which stays when a new file takes its place, and delete all but the
    latest `keep` of those. A second name for the same content takes neither time nor space, where links exist."""
    numbered = path.with_name(f"{path.stem}-{step}.pt")
    numbered.unlink(missing_ok=True)
    try:
        os.link(path, numbered)
    except OSError:                                 # as on FAT; a copy is whole or absent, too
        with open(path, "rb") as source, written(numbered) as target:
            shutil.copyfileobj(source, target)
    every = [old for old in path.parent.glob(f"{path.stem}-*.pt") if old.stem.rpartition("-")[2].isdigit()]
    # By time and not by step: a run may have been taken back, and gone on from there in another way.
    for old in sorted(every, key=lambda old: old.stat().st_mtime_ns)[:-keep]:
        old.unlink()


def load_checkpoint(path: Path, resumable: bool = False) -> dict:
    """The content of a checkpoint, on the CPU; `resumable`: of a last.pt. `fail`s in one line on a file that is
    damaged, hostile or not ours."""
    import torch

    path = Path(path)
    try:
        # torch.load does not check the zip's CRCs, so a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed entries, which torch.save never writes")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its entries are larger than the file")
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} does not match")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint {path}" + (": there is no run to go on with; leave --init_from out to start one"
                                        if resumable else ": python train.py writes one"))
    except IsADirectoryError:
        fail(f"{path} is a folder; name the checkpoint file in it, such as {path / 'ckpt.pt'}")
    except MemoryError:
        fail(f"{path} does not fit into this machine's memory")
    except Exception as error:          # a damaged file can fail anywhere in zipfile or torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        fail(f"{path} is damaged or no checkpoint of Inkling ({reason}); nothing was loaded: name a ckpt.pt")
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT or any(
            not isinstance(content.get(key), kind) for key, kind in KINDS.items()):
        fail(f"{path} holds no Inkling checkpoint (format {CHECKPOINT_FORMAT}); "
             "python train.py writes them")
    content["config"].setdefault("ngrams", 0)       # as before there were any
    if resumable and (lacking := [key for key in KINDS_TO_GO_ON if key not in content]):
        fail(f"{path} cannot be resumed, it lacks {', '.join(lacking)}: start from its weights with --init_from={path}")
    kinds = KINDS_TO_GO_ON | {"threads": int, "text": str, "lost": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key, kind()), kind)]
    if wrong or content["step"] < 0 or not math.isfinite(content.get("seconds", 0)) or not all(
            isinstance(loss, float) for loss in content.get("losses", {}).values()):
        fail(f"{path}: {', '.join(wrong) or 'step, seconds or losses'} cannot be what train.py wrote: use another copy")
    return content


def filled(build, stored: dict, n_layer: int):
    """The model of n_layer blocks that `build()` makes, with the weights `stored`. Raises ValueError where these do not
    fit. A file may claim any size: no memory is taken before what is really there has been counted."""
    import torch

    if n_layer > len(stored):
        raise ValueError(f"n_layer={n_layer}, but there are {len(stored)} tensors")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    if lacking := wanted.keys() - stored.keys():
        raise ValueError(f"{min(lacking)} is missing")
    for name, tensor in stored.items():
        if name not in wanted:
            raise ValueError(f"{name!r:.80} is no part of this model")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu" or \
                not tensor.is_floating_point():
            raise ValueError(f"{name} is no tensor of floating-point numbers")
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {wanted[name]}")
    storages = [tensor.untyped_storage() for tensor in stored.values()]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    if sum(tensor.nbytes for tensor in stored.values()) > 2 * sum(held.values()):       # tied weights count twice
        raise ValueError("its tensors claim more numbers than it holds")
    if broken := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} holds numbers that are not finite")
    model = build()
    model.load_state_dict(stored)
    return model


def newest_checkpoint(folder: Path = Path("out")) -> Path:
    """The most recently written ckpt.pt under `folder`."""
    found = sorted(folder.glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        fail(f"no ckpt.pt under {folder}/: train one with python train.py, or name one with --ckpt=PATH")
    return found[-1]


# -- device and precision ------------------------------------------------------------------------------------------

def choose_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, whichever is there first; a named device is checked."""
    import torch

    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "meta": False}
    if device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    try:
        kind = torch.device(device).type
        if not have.get(kind, True):
            fail(f"device={device}: PyTorch sees no {kind} device here; use --device=auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:    # all that PyTorch raises of other devices
        reason = str(error).splitlines()[0]             # PyTorch lists twenty kinds where it knows none
        fail(f"device={device}: {'no such device' if reason.startswith('Expected one of') else reason}; "
             "use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_dtype(device: str, dtype: str) -> str:
    """`auto` becomes bfloat16 (on older NVIDIA cards float16) where a matrix product really is faster with it: some
    processors and cards accept it and emulate it. Takes a few milliseconds."""
    import torch

    if dtype != "auto":
        return dtype
    kind = torch.device(device).type
    if kind == "mps":
        return "float32"                # autocast on MPS gains little and has known errors
    half = "bfloat16"
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = "float16"                # with a GradScaler

    def seconds(kind_of_number) -> float:
        a = torch.ones(512, 512, device=device, dtype=kind_of_number)
        fastest = float("inf")
        for _ in range(6):              # the first ones warm up
            start = time.perf_counter()
            for _ in range(4):
                b = a @ a
            b[0, 0].item()              # waits for the device
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    return half if seconds(getattr(torch, half)) < 0.7 * seconds(torch.float32) else "float32"


def autocast(device: str, dtype: str):
    """A context in which matrix products run in `dtype`, while weights and sums stay in float32."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def wait(device: str):
    """Until the device has done what was asked of it."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


# -- compiling -----------------------------------------------------------------------------------------------------

COMPILE_PAYS_AFTER = 100        # seconds of eager training left; compiling takes 20-75 s the first time, later about
                                # 4, and saves a fifth to a half of a step of the recipe's models


def compiler_missing(device: str) -> str:
    """Why torch.compile cannot work here, or ""."""
    kind = device.split(":")[0]
    if kind == "cpu" and not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "cl")))):
        return "there is no C++ compiler"
    if kind == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return "" if kind in ("cpu", "cuda") else f"it is not ready for {kind}"


def compile_pays(choice, model, run_once, passes: int, device: str, ranks, deadline) -> bool:
    """Resolve compile=auto, for all ranks: whether torch.compile would pay over `passes` forward and backward passes,
    or as many as end before the deadline. `run_once(model)` is one of them, of which nothing remains."""
    if choice != "auto" or passes <= 0:
        return choice is True and passes > 0
    if ranks.tell(compiler_missing(device)):
        return False
    times = []
    for _ in range(3):              # the first ones warm up
        start = time.perf_counter()
        run_once(model)
        wait(device)
        times.append(ranks.tell(time.perf_counter() - start))       # several must all go on, or all stop
        if times[-1] * passes > 10 * COMPILE_PAYS_AFTER:
            break
    return ranks.tell(min(min(times) * passes, deadline.left()) > COMPILE_PAYS_AFTER)


def compile(wanted: bool, model, run_once, device: str):
    """Compile `model` and run it once, so that a failure shows before the run. Returns (what to train with, whether it
    is compiled, a note for the banner)."""
    import torch

    if not wanted:
        return model, False, "off"
    if why := compiler_missing(device):
        return model, False, f"off: {why}"
    start = time.perf_counter()
    try:
        compiled = torch.compile(model, dynamic=False)
        run_once(compiled)
        wait(device)
    except Exception as error:      # a failure to compile, whatever it is, must not end a run
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return model, False, f"failed, so it trains without ({type(error).__name__}: {reason})"
    return compiled, True, f"on, took {time.perf_counter() - start:.0f} s"


def compile_step(step, device: str):
    """`step` compiled for shapes that stay the same: what generates one token after another is a small matter for a
    processor, and the way there from Python most of its time. Replayed as a CUDA graph on an NVIDIA card. Where
    compiling fails, which shows at the first call, it goes on uncompiled and says so on stderr."""
    import torch

    cuda = torch.device(device).type == "cuda"
    how = dict(mode="reduce-overhead") if cuda else dict(options={"cpp_wrapper": True})
    chosen = torch.compile(step, dynamic=False, **how)

    def run(idx, cache, at):
        nonlocal chosen
        if cuda and not getattr(cache.tensors[0][0], "_dynamo_static_input_type", None):
            for tensor in chain(*cache.tensors):        # or no graph may write to them (as in transformers' caches)
                torch._dynamo.mark_static_address(tensor, guard=False)
        try:
            return chosen(idx, cache, at)
        except Exception as error:      # a failure to compile, whatever it is, must not end a text
            if chosen is step:
                raise
            chosen, reason = step, (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            print(f"not compiled: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        return run(idx, cache, at)
    return run


def compare_with_cpu(model, x, y, device: str):
    """Warn when loss or gradient norm of a batch differ from the CPU's by more than a thousandth: back ends other than
    CUDA had operations that were silently wrong. The weights compared are a copy with noise, since many start at 0."""
    import torch

    reference = copy.deepcopy(model).float().to("cpu").train(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    figures = []
    for candidate, place in ((copy.deepcopy(reference).to(device), device), (reference, "cpu")):
        loss = candidate(x[:4].to(place), y[:4].to(place))[1]           # four windows
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in candidate.parameters() if p.grad is not None])
        figures.append((loss.item(), norm.item()))
    here, cpu = figures
    if not all(abs(a - b) <= 0.001 * abs(b) for a, b in zip(here, cpu, strict=True)):
        print(f"warning  {device} computes something wrong: loss {here[0]:.4f} and gradient norm {here[1]:.4f} of one "
              f"batch, where the CPU has {cpu[0]:.4f} and {cpu[1]:.4f}; --device=cpu is right, and slower", flush=True)


def check_moments(optimizer):
    """Raise ValueError unless each parameter has no state or all of AdamW's or Muon's, finite and in its shape (Muon's
    in that of its group, stacked): load_state_dict does not look."""
    import torch

    for group in optimizer.param_groups:
        for p in group["params"]:
            shapes = {"average": (len(group["params"]), *p.shape)} if "momentum" in group else \
                {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
            state = optimizer.state.get(p)
            if state and (state.keys() != shapes.keys() or any(
                    not isinstance(value, torch.Tensor) or tuple(value.shape) != shapes[name] or
                    value.layout != torch.strided or not value.isfinite().all() for name, value in state.items())):
                raise ValueError(f"the moments of a parameter of shape {tuple(p.shape)}")


def restore_optimizers(optimizers: list, scaler, stored: dict, first: bool):
    """Put back the optimizers' state, but keep today's settings: load_state_dict would bring back the stored learning
    rates, betas and decays along with the moments."""
    import torch

    threads = torch.get_num_threads()
    if first and stored.get("threads") != threads:
        print(f"note     the run was saved by a process of {stored.get('threads')} threads, this one has {threads}: on "
              "a CPU the figures will differ in their last digits", flush=True)
    try:
        for optimizer, content in zip(optimizers, stored["optimizers"], strict=True):
            settings = [{key: value for key, value in group.items() if key != "params"}
                        for group in optimizer.param_groups]
            optimizer.load_state_dict(content)
            for group, kept in zip(optimizer.param_groups, settings, strict=True):
                group.update(kept)
            check_moments(optimizer)
            for p, values in optimizer.state.items():
                for key, value in values.items() if hasattr(p, "placements") else ():
                    if value.shape == p.shape:          # each process takes its share
                        values[key] = torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements)
        if not all(isinstance(value, (int, float)) for value in stored["scaler"].values()):
            raise ValueError("the GradScaler's state holds something else than numbers")
        scaler.load_state_dict(stored["scaler"])
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        fail(f"the checkpoint's optimizer state does not fit this run ({type(error).__name__}: {error})")


# -- processes and signals -----------------------------------------------------------------------------------------

class Ranks:
    """This process's place among those that torchrun started; one of one otherwise."""

    def __init__(self):
        try:
            self.rank, self.world, self.local = (int(os.environ.get(name, default)) for name, default in
                                                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        except ValueError as error:
            fail(f"RANK, WORLD_SIZE or LOCAL_RANK is set to something that torchrun never sets: {error}")
        self.first = self.rank == 0

    def join(self, backend: str, device: str) -> str:
        """Meet the other processes; returns the device of this one."""
        if self.world == 1:
            return device
        import torch

        if torch.device(device).type == "cuda":
            device = f"cuda:{self.local}"
            torch.cuda.set_device(device)
        if backend == "auto":
            backend = "nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend)
        return device

    def tell(self, value):
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, tensor):
        """The sum over ranks, in place."""
        if self.world > 1:
            import torch

            torch.distributed.all_reduce(tensor)
        return tensor

    def share(self, count: int, batch_size: int) -> tuple:
        """(sequences, micro-batches): this process's equal share of the `count` sequences of a step, and the number
        of equal micro-batches of at most batch_size that it makes."""
        if count % self.world:
            fail(f"batch_size * gradient_accumulation_steps = {count} must divide by the {self.world} processes")
        rows = count // self.world
        return rows, next(n for n in range(-(-rows // batch_size), rows + 1) if rows % n == 0)

    def copies(self, step_model, device: str):
        """The model for training: each process has a copy, and their gradients are averaged."""
        if self.world == 1:
            return step_model
        import torch

        return torch.nn.parallel.DistributedDataParallel(           # whose buffers are constants
            step_model, [device] if device.startswith("cuda") else None, broadcast_buffers=False)

    def shard(self, model, device: str):
        """The model, of whose weights, gradients and optimizer state each process holds its share, and a block's
        weights as a whole only while it is at work (PyTorch's fully_shard; arXiv 2304.11277)."""
        if self.world == 1:
            return model.to(device)
        import torch
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = torch.distributed.init_device_mesh(torch.device(device).type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "next_logits")      # generate's way in
        return model.to(device)         # what was not cut, such as buffers

    def adding_up(self, step_model, last: bool):
        """A context for one micro-batch: gradients are averaged over the processes once a step, in its last one."""
        if hasattr(step_model, "set_requires_gradient_sync"):
            step_model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return step_model.no_sync()
        return contextlib.nullcontext()

    def whole(self, value):
        """Dicts and lists with every sharded tensor in them put together, for the first rank (None for the others); all
        ranks must ask."""
        if isinstance(value, dict):
            return {key: self.whole(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.whole(part) for part in value]
        if not hasattr(value, "full_tensor"):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if self.first else None

    def spreading(self) -> dict:
        """How Muon shares its work: each process treats an equal part of the stacked matrices (n, rows, cols)."""
        if self.world == 1:
            return {}
        import torch

        def spread(function, stacked):
            each = -(-len(stacked) // self.world)
            mine = torch.zeros(each, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
            part = stacked[self.rank * each:(self.rank + 1) * each]
            mine[:len(part)] = part
            every = torch.empty(each * self.world, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
            torch.distributed.all_gather(list(every.split(each)), function(mine))
            return every[:len(stacked)]
        return dict(spread=spread)

    def leave(self):
        if self.world > 1:
            import torch

            gc.collect()
            torch.distributed.destroy_process_group()


class Deadline:
    """The end of a run's `minutes` on the clock (0: never), and the number of steps that fit before it."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.first = None               # (step, seconds of training) after the steps that warm up

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def steps(self, step: int, report, eval_interval: int) -> int:
        """The steps of the whole run, from the pace of ten of them (or fewer, if these take a twentieth of the time)
        and of the evaluations so far; OPEN before. A thirtieth of the time is kept back."""
        wait(report.device)
        seconds = report.seconds()
        if step < 3:
            return OPEN
        if self.first is None:
            self.first = step, seconds
        done, took = step - self.first[0], seconds - self.first[1]
        if not done or (done < 10 and took < self.left() / 20):
            return OPEN
        each, pause = took / done, report.pause()
        count = step + max(1, int((self.left() * 29 / 30 - pause) / (each + pause / eval_interval)))
        report.say(f"time     for {count:,} steps of {1000 * each:.0f} ms: max_iters={count}")
        return count


@contextlib.contextmanager
def explained(out_dir: Path):
    """Turn what can go wrong with a machine in a run into one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            fail("out of memory: halve batch_size and double gradient_accumulation_steps (the same training), or lower "
                 f"block_size; what {out_dir} holds stays, and --init_from=resume goes on from it "
                 f"({text.strip().splitlines()[0][:120] if text else 'MemoryError'})")
        if not isinstance(error, torch.distributed.DistError) and "Connection " not in text:
            raise
        fail(f"another process of this run has gone: {out_dir}/last.pt holds the last save, --init_from=resume goes on "
             f"({text.strip().splitlines()[0][:120]})", code=1)


class Stop:
    """SIGINT and SIGTERM ask for a stop after the step in progress; a second SIGINT stops at once. So does the end of
    the time that was given."""

    def __init__(self, deadline: Deadline):
        self.deadline, self.signal, self.over = deadline, 0, False
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):       # not the main thread, when used as a library
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(130)               # what is on the disk is whole at every moment
        self.signal = number

    def reasons(self) -> list:
        """Whether this process has run out of time, got SIGINT, got SIGTERM."""
        return [self.over or self.deadline.left() < 0, self.signal == signal.SIGINT, self.signal == signal.SIGTERM]

    def agree(self, counts: list):
        """Take over what any of the processes has, so that all leave in the same way; counts: of their `reasons`."""
        over, interrupted, terminated = counts
        self.over = over > 0
        self.signal = self.signal or (signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0)

    @property
    def asked(self) -> bool:
        return any(self.reasons())

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.signal


class Watch:
    """Notices a loss or gradient that is not finite, and requests to stop, before an update is made; every rank sees
    the same at the same step. On a GPU the verdict stays there, as `found_inf`, which turns this update and all later
    ones into no-ops, and the host reads it only when asked to: reading it would hold up the next step."""

    def __init__(self, ranks: Ranks, stop: Stop, optimizers: list, scaler, device: str, dtype: str):
        import torch

        self.ranks, self.stop, self.optimizers, self.scaler = ranks, stop, optimizers, scaler
        self.scaled = dtype == "float16"        # its gradients may overflow; the GradScaler skips those steps
        self.immediate = self.scaled or torch.device(device).type != "cuda"     # only fused AdamW knows found_inf
        self.bad = torch.zeros((), device=device)

    def check(self, loss, norm, look: bool) -> tuple:
        """(not finite, asked to stop), as far as the host knows. look: read the device's verdict now."""
        import torch

        # A scale below 1 means that halving it did not help: no overflow, then.
        overflow = self.scaled and self.scaler.get_scale() >= 1
        finite = torch.isfinite(loss) & (torch.isfinite(norm) | overflow)
        asked = [torch.full_like(self.bad, reason) for reason in self.stop.reasons()]
        flags = self.ranks.total(torch.stack((1 - finite.to(self.bad.dtype), *asked)))
        self.bad = torch.maximum(self.bad, flags[0].clamp(max=1))
        if not self.immediate:
            for optimizer in self.optimizers:
                optimizer.found_inf = self.bad
        if not (look or self.immediate):
            return False, False
        _, *counts = flags.tolist()
        self.stop.agree(counts)
        return self.bad.item() > 0, any(counts)
