"""A run's folder and its checkpoints: claimed, saved atomically, loaded without running code,
restored.

ckpt.pt holds weights, settings and the tokenizer; last.pt the optimizers' state and the plan as
well, to resume from.
"""

import contextlib
import math
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from inkling.cli import UserError
from inkling.files import HOLDER, LOCK, atomic_write, lock_folder
from inkling.format import counted, shell_word, size
from inkling.hints import checkpoints_like, paths_in

CHECKPOINT_FORMAT = 1
NOT_KNOWN = 2**31               # max_iters in a last.pt from before plans, where max_minutes had not measured the pace
# The entries of every checkpoint, of those that can be resumed, and those that newer ones have,
# with their types.
ENTRIES = {"config": dict, "tokenizer": dict, "model": dict, "vocab_size": int, "step": int}
RESUME_ENTRIES = {"evaluated": int | None, "best_step": int, "best_val_loss": float, "losses": dict, "seconds": float,
                  "optimizers": list, "scaler": dict}
LATER_ENTRIES = {"tokens": int, "threads": int, "text": str, "lost": str, "plan": dict,
                 "start": str, "pause": float, "clock_seconds": float}
PLAN_ENTRIES = {"device": str, "dtype": str, "compile": bool | str, "sequences": int, "micro_batches": int}
LATER_PLAN_ENTRIES = {"breakpoints": list, "evaluations": dict, "fit_to_time": bool, "most_steps": int,
                      "ngram_decay": float, "expected": list, "resumed_at": int}
PLAN_CHOICES = {"dtype": ("float32", "bfloat16", "float16"), "compile": (True, False, "auto")}


# -- the folder --------------------------------------------------------------------------------------------------------

class RunFolder:
    """A run's folder, which this process holds from `claim` to `release`.

    unsaved: what went wrong in the latest save of each file; empty when it is on the disk.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.unsaved = {"last.pt": "", "ckpt.pt": ""}
        self.lock = None
        self.moved_to: Path | None = None       # where `move_old_run` has put an old run

    def claim(self, expected: tuple | None = None):
        """Lock the folder, and write into it for a trial.

        expected: the stamp of last.pt when it was read, or None if it does not matter; another
        process may have resumed the run since. Raises UserError."""
        self.lock = lock_folder(self.path)
        if expected is not None and file_stamp(self.path / "last.pt") != expected:
            raise UserError(f"{self.path}/last.pt has changed since this process read it, because another one has "
                            "written it: the same command again resumes from there")
        for pattern in ("last*.pt.tmp", "ckpt.pt.tmp", "log.csv.tmp", "loss.png.tmp"):
            for leftover in self.path.glob(pattern):    # of a process that was killed while it wrote
                with contextlib.suppress(OSError):
                    leftover.unlink()
        try_writing(self.path / "log.csv")

    def holds_a_run(self) -> bool:
        return any((self.path / name).exists() for name in ("last.pt", "ckpt.pt", "log.csv"))

    def move_old_run(self):
        """If there is an old run in the folder, rename the folder to NAME.1, or the next free number,
        so nothing is lost. Call it once everything that can fail has been tried. Raises UserError."""
        if not self.holds_a_run():
            return
        if os.name == "nt":
            self.release()                          # Windows renames no folder with an open file
        self.moved_to = set_aside(self.path)
        self.release()
        (self.moved_to / HOLDER).unlink(missing_ok=True)
        try:
            self.lock = lock_folder(self.path)
        except UserError as error:
            if self.path.exists():                  # another process has taken it
                raise UserError(f"{error}; the old run is now in {self.moved_to}")
            os.rename(self.moved_to, self.path)
            raise
        print(f"{self.path} holds a run: moved to {self.moved_to} (to resume it instead: "
              "--init_from=resume, with --out_dir naming it)", flush=True)
        aside = folders_aside(self.path)
        used = sum(file.stat().st_size for folder in aside for file in folder.glob("*") if file.is_file())
        print(f"disk     old runs are never deleted; {counted(len(aside), 'old run')} of this name "
              f"{'takes' if len(aside) == 1 else 'take'} {size(used)}; to delete what you do not need: "
              f"rm -r {' '.join(map(shell_word, aside))}", flush=True)

    def take_back(self):
        """Undo `move_old_run`, if nothing has been saved since."""
        holds_the_folder = self.lock is not None
        self.release()
        if self.moved_to and holds_the_folder:
            with contextlib.suppress(OSError):      # another process has taken the folder
                if self.path.exists():
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()
                os.rename(self.moved_to, self.path)

    def save(self, content: dict, name: str, keep: int = 0) -> str:
        """Save a checkpoint as `name`, and with `keep` also as NAME-STEP.pt, of which the latest
        `keep` stay. Returns an empty text, or what went wrong: the old file is whole then."""
        self.unsaved[name] = save_checkpoint(content, self.path / name, content["step"], keep)
        return self.unsaved[name]

    def release(self):
        if self.lock:
            self.lock.close()
            self.lock = None


def folders_aside(folder: Path) -> list:
    """The folders NAME.1, NAME.2, ... that `set_aside` has made of `folder`, those that still exist."""
    numbered = []
    for path in folder.parent.iterdir():
        name, _, number = path.name.rpartition(".")
        if name == folder.name and number.isdecimal() and path.is_dir():
            numbered.append((int(number), path))
    return [path for _, path in sorted(numbered)]


def set_aside(folder: Path) -> Path:
    """Rename `folder` to the next free NAME.1, NAME.2, ... and return the new path."""
    if not folder.name:
        raise UserError(f"{folder} holds a run and cannot be renamed: name a folder with --out_dir, or use "
                        "--init_from=resume")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise UserError(f"{folder} holds a run and cannot be renamed ({error.strerror or error}): name another folder "
                        "with --out_dir, or use --init_from=resume")
    return aside


def try_writing(path: Path):
    """Raise UserError if there is no room for a new file beside `path`, or no permission."""
    try:
        with atomic_write(path.with_name(".trial")) as file:
            file.write(bytes(4096))
        path.with_name(".trial").unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}")


def file_stamp(path: Path) -> tuple:
    """What changes when a file is replaced; empty if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def newest_checkpoint(folder: Path = Path("out")) -> Path:
    """The most recently written ckpt.pt under `folder`. Raises UserError if there is none."""
    paths = sorted(folder.glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"no ckpt.pt under {folder}/: train one with python train.py, or name one with --ckpt=PATH")
    return paths[-1]


# -- saving ------------------------------------------------------------------------------------------------------------

def save_checkpoint(content: dict, path: Path, step: int = 0, keep: int = 0) -> str:
    """Write a checkpoint atomically; see RunFolder.save."""
    if not all(tensor.isfinite().all() for tensor in content["model"].values()):
        return f"did not write {path}: the weights are not finite numbers"
    try:
        with atomic_write(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:        # torch.save answers some failed writes with a RuntimeError
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or str(error)
        return f"could not write {path}: {reason.splitlines()[0]}"
    try:
        if keep:
            keep_numbered(path, step, keep)
    except OSError as error:
        return f"could not keep {path} as step {step}: {error.strerror or error}"
    return ""


def keep_numbered(path: Path, step: int, keep: int):
    """Give the file a second name, NAME-STEP.pt, which stays when a new file takes its place, and
    delete all but the latest `keep` of those. Where links exist, a second name for the same content
    takes neither time nor space."""
    numbered = path.with_name(f"{path.stem}-{step}.pt")
    numbered.unlink(missing_ok=True)
    try:
        os.link(path, numbered)
    except OSError:                                 # as on FAT; a copy is whole or absent, too
        with open(path, "rb") as source, atomic_write(numbered) as target:
            shutil.copyfileobj(source, target)
    copies = [other for other in path.parent.glob(f"{path.stem}-*.pt") if other.stem.rpartition("-")[2].isdigit()]
    # By time and not by step: a run may have been resumed from an older checkpoint.
    copies.sort(key=lambda copy: copy.stat().st_mtime_ns)
    for outdated in copies[:-keep]:
        outdated.unlink()


# -- loading -----------------------------------------------------------------------------------------------------------

class ForeignCheckpoint(UserError):
    """A checkpoint of nanoGPT; convert.py can take its `content` over."""

    def __init__(self, message: str, content: dict):
        super().__init__(message)
        self.content = content


def load_checkpoint(path: Path, resumable: bool = False) -> dict:
    """The content of a checkpoint, on the CPU; `resumable`: of a last.pt. Raises UserError for a
    file that is damaged, hostile or not ours; nothing in it is ever run."""
    path = Path(path)
    content = read_zip_of_tensors(path, resumable)
    if isinstance(content, dict) and "model_args" in content and "model" in content:
        raise ForeignCheckpoint(f"{path} is a checkpoint of nanoGPT: python convert.py import {path} takes it over",
                                content)
    whole = isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT
    if not whole or wrong_types(content, ENTRIES):
        raise UserError(f"{path} is not an Inkling checkpoint (format {CHECKPOINT_FORMAT}); python train.py "
                        "writes them")
    content["config"].setdefault("ngrams", 0)       # a checkpoint from before n-grams has none
    content["config"].setdefault("ngram_edges", True)       # once, all of them counted
    content["config"].setdefault("ngram_optimizer", "adamw")    # once, it trained all embeddings
    lacking = [name for name in RESUME_ENTRIES if name not in content]
    if resumable and lacking:
        raise UserError(f"{path} cannot be resumed, it lacks {', '.join(lacking)}: start from its weights with "
                        f"--init_from={path}")
    upgrade_plan(content)
    if reason := why_implausible(content):
        raise UserError(f"{path}: {reason} cannot be what train.py wrote: use another copy")
    upgrade(content)
    return content


def read_zip_of_tensors(path: Path, resumable: bool):
    """What torch.save wrote to `path`, after a look at the checksums. Raises UserError."""
    try:
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        way_out = f"python train.py writes one{checkpoints_like(str(path))}"
        if resumable:
            way_out = "there is no run to resume; leave --init_from out to start one"
            way_out += checkpoints_like(str(path), "last.pt")
        raise UserError(f"no checkpoint {path}: {way_out}")
    except IsADirectoryError:
        if inside := sorted(map(str, paths_in(path, "*.pt"))):
            raise UserError(f"{path} is a folder; name a checkpoint in it: {', '.join(inside[:4])}")
        raise UserError(f"{path} is a folder without a checkpoint (ckpt.pt){checkpoints_like(str(path))}")
    except MemoryError:
        raise UserError(f"{path} does not fit into this machine's memory")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")
    except Exception as error:          # a damaged file can fail anywhere in zipfile or torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} is damaged or not a checkpoint of Inkling ({reason}); nothing was loaded: name a "
                        "ckpt.pt")


def check_zip(path: Path):
    """Raise ValueError for an archive that torch.save did not write or that is damaged: torch.load
    does not look at the checksums, so a flipped bit would go unnoticed."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} does not match")


def wrong_types(content: dict, entries: dict) -> list:
    """The names among `entries` whose value in `content` has another type."""
    return [name for name, kind in entries.items() if not isinstance(content.get(name), kind)]


def why_implausible(content: dict) -> str:
    """What in a checkpoint cannot be what train.py wrote, or an empty text."""
    entries = {name: kind for name, kind in (RESUME_ENTRIES | LATER_ENTRIES).items() if name in content}
    if wrong := wrong_types(content, entries):
        return ", ".join(wrong)
    if wrong := wrong_in_plan(content.get("plan", {})):
        return f"plan.{', plan.'.join(wrong)}"
    losses = content.get("losses", {}).values()
    if content["step"] < 0 or content.get("tokens", 0) < 0 or not math.isfinite(content.get("seconds", 0)):
        return "step, tokens or seconds"
    return "" if all(isinstance(loss, float) for loss in losses) else "losses"


def wrong_in_plan(plan: dict) -> list:
    """The names of a plan's entries that train.py cannot have written."""
    if not plan:
        return []
    entries = dict(PLAN_ENTRIES)
    for name in LATER_PLAN_ENTRIES.keys() & plan.keys():
        entries[name] = LATER_PLAN_ENTRIES[name]
    if wrong := wrong_types(plan, entries):
        return wrong
    wrong = [name for name, choices in PLAN_CHOICES.items() if plan[name] not in choices]
    if "breakpoints" in plan and not are_breakpoints(plan["breakpoints"]):
        wrong.append("breakpoints")
    if plan.get("evaluations") and not are_evaluations(plan["evaluations"]):
        wrong.append("evaluations")
    if not 0 <= plan.get("ngram_decay", 0.0) <= 2**31:
        wrong.append("ngram_decay")
    if not are_bits(plan.get("expected", [])):
        wrong.append("expected")
    try:
        torch.device(plan["device"])
    except RuntimeError:
        wrong.append("device")
    return wrong


def are_bits(value: list) -> bool:
    """Whether it is [] or [least, most]."""
    return not value or (len(value) == 2 and all(isinstance(bits, float) and math.isfinite(bits) for bits in value))


def are_breakpoints(value: list) -> bool:
    """Whether it is [[step, end], ...], with rising steps from 0 on."""
    pairs = all(isinstance(pair, list) and [type(number) for number in pair] == [int, int] for pair in value)
    if not value or not pairs:
        return False
    steps = [step for step, _ in value]
    return steps[0] == 0 and steps == sorted(set(steps)) and all(0 <= end < 2**31 for _, end in value)


def are_evaluations(value: dict) -> bool:
    least = {"interval": 1, "windows": 1, "at_the_end": 0}
    return value.keys() == least.keys() and all(
        type(number) is int and least[name] <= number <= 2**31 for name, number in value.items())


def upgrade_plan(content: dict):
    """Plans once had the number of steps in place of breakpoints."""
    plan = content.get("plan")
    if not isinstance(plan, dict) or "max_iters" not in plan:
        return
    max_iters = plan.pop("max_iters")
    if max_iters is not None:
        plan["breakpoints"] = [[0, max_iters]]


def upgrade(content: dict):
    """Bring what earlier versions wrote to today's form, in place."""
    if content.get("evaluated") == -1:
        content["evaluated"] = None                 # not evaluated yet
    if "tokens" not in content:
        content["tokens"] = content["step"] * tokens_per_step(content["config"])
    if "plan" not in content and "optimizers" in content:
        # Before there were plans, the resolved values took the place of the settings.
        config = content["config"]
        max_iters = config.get("max_iters")
        content["plan"] = {"dtype": config.get("dtype"), "compile": config.get("compile")}
        if max_iters == NOT_KNOWN:
            del config["max_iters"]
        else:
            content["plan"]["breakpoints"] = [[0, max_iters]]


def tokens_per_step(config: dict) -> int:
    """Of a run with this config; 0 if it does not say."""
    sizes = [config.get(name) for name in ("batch_size", "gradient_accumulation_steps", "block_size")]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 0


# -- restoring ---------------------------------------------------------------------------------------------------------

def build_model(build, stored: dict, n_layer: int):
    """The model of n_layer blocks that `build()` makes, with the weights `stored`. Raises
    ValueError if they do not fit. A file may claim any size: no memory is taken before what is
    really there has been counted."""
    if n_layer > len(stored):
        raise ValueError(f"n_layer={n_layer}, but there are {len(stored)} tensors")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    if lacking := shapes.keys() - stored.keys():
        raise ValueError(f"{min(lacking)} is missing")
    for name, tensor in stored.items():
        if name not in shapes:
            raise ValueError(f"{name!r:.80} is no part of this model")
        check_weight(name, tensor, shapes[name])
    storages = [tensor.untyped_storage() for tensor in stored.values()]
    bytes_held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in stored.values()) > 2 * bytes_held:           # tied weights count twice
        raise ValueError("its tensors claim more numbers than it holds")
    for name, tensor in stored.items():             # after that count, since this takes memory
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    model = build()
    model.load_state_dict(stored)
    return model


def check_weight(name: str, tensor, shape: tuple):
    """Raise ValueError unless `tensor` is a plain CPU tensor of floating-point numbers in this
    shape."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.is_floating_point():
        raise ValueError(f"{name} is no tensor of floating-point numbers")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")


def restore_optimizers(optimizers: list, scaler, stored: dict):
    """Load the optimizers' and the GradScaler's state from a last.pt's content, but keep today's
    settings. Raises UserError if it does not fit."""
    try:
        for optimizer, content in zip(optimizers, stored["optimizers"], strict=True):
            restore_optimizer(optimizer, content)
        if not all(isinstance(value, (int, float)) for value in stored["scaler"].values()):
            raise ValueError("the GradScaler's state holds something other than numbers")
        if stored["scaler"]:            # empty, where the run was not in float16
            scaler.load_state_dict(stored["scaler"])
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"the checkpoint's optimizer state does not fit this run ({type(error).__name__}: {error})")


def restore_optimizer(optimizer, content: dict):
    """load_state_dict, which would also bring back the stored learning rates, betas and decays;
    these stay as they are. Every rank of a sharded run takes its share."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(content)
    for group, todays in zip(optimizer.param_groups, settings, strict=True):
        group.update(todays)
    check_optimizer_state(optimizer)
    for p, values in optimizer.state.items():
        if not hasattr(p, "placements"):            # not sharded
            continue
        for name, value in values.items():
            if value.shape == p.shape:
                values[name] = torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements)


def check_optimizer_state(optimizer):
    """Raise ValueError unless every parameter has no state yet, or exactly what
    optimizer.state_shapes says, in finite numbers: load_state_dict does not look."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state:
                continue
            shapes = optimizer.state_shapes(p, group)
            if state.keys() != shapes.keys():
                raise ValueError(f"the state of a parameter of shape {tuple(p.shape)} is {', '.join(map(str, state))}")
            for name, value in state.items():
                plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
                if not plain or tuple(value.shape) != tuple(shapes[name]) or not value.isfinite().all():
                    raise ValueError(f"{name} of a parameter of shape {tuple(p.shape)}")
