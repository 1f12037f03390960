"""A run's folder: claimed, saved to, loaded and restored from."""

import contextlib
import math
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from inkling.cli import UserError
from inkling.files import atomic_write, lock_folder

CHECKPOINT_FORMAT = 1
OPEN = 2**31            # max_iters of a run whose max_minutes have not yet told how many steps they allow
KINDS = {"config": dict, "tokenizer": dict, "model": dict, "vocab_size": int, "step": int}      # in every checkpoint
RESUME_KINDS = {"evaluated": int, "best_step": int, "best_val_loss": float, "losses": dict, "seconds": float,
                  "optimizers": list, "scaler": dict}


def set_aside(folder: Path) -> Path:
    """Rename `folder` to the next free NAME.1, NAME.2, ... and return the new path."""
    if not folder.name:
        raise UserError(f"{folder} holds a run and cannot be renamed: name a folder with --out_dir, or --init_from=resume")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def file_stamp(path: Path) -> tuple:
    """What changes when a file is written anew; () of no file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def claim_folder(out_dir: Path, resuming: bool, expected: tuple | None = None):
    """Lock `out_dir` for a run. A new run first moves an old one there to NAME.1 (the next free number): nothing is
    lost. expected: the stamp of last.pt when it was looked at; another process may have gone on with the run since.
    Returns the lock, to be kept while the process lives."""
    held = lock_folder(out_dir)
    if expected is not None and file_stamp(out_dir / "last.pt") != expected:
        raise UserError(f"{out_dir}/last.pt has changed since this process looked at it: another one has gone on with the run; "
             "the same command again goes on from there")
    for left in out_dir.glob("*.tmp"):  # by a process that was killed while it wrote
        with contextlib.suppress(OSError):
            left.unlink()
    if resuming or not any((out_dir / name).exists() for name in ("last.pt", "ckpt.pt", "log.csv")):
        return held
    held.close()                        # Windows renames no folder with an open file
    print(f"{out_dir} holds a run: moved to {set_aside(out_dir)} (to go on with it instead: --init_from=resume, "
          f"with --out_dir naming it)", flush=True)
    return lock_folder(out_dir)


def save_checkpoint(content: dict, path: Path, step: int = 0, keep: int = 0) -> str:
    """Write a checkpoint atomically, and keep the latest `keep` as NAME-STEP.pt besides. Returns "" or, when the disk
    refuses, what went wrong: the old file is whole."""
    if not all(tensor.isfinite().all() for tensor in content["model"].values()):
        return f"did not write {path}: the weights are not finite numbers"
    try:
        with atomic_write(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
        if keep:
            keep_numbered(path, step, keep)
        return ""
    except (OSError, RuntimeError) as error:        # torch.save answers some failed writes with a RuntimeError
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or str(error)
        return f"could not write {path}: {reason.splitlines()[0]}"


def keep_numbered(path: Path, step: int, keep: int):
    """Give the file another name, NAME-STEP.pt, which stays when a new file takes its place, and delete all but the
    latest `keep` of those. A second name for the same content takes neither time nor space, where links exist."""
    numbered = path.with_name(f"{path.stem}-{step}.pt")
    numbered.unlink(missing_ok=True)
    try:
        os.link(path, numbered)
    except OSError:                                 # as on FAT; a copy is whole or absent, too
        with open(path, "rb") as source, atomic_write(numbered) as target:
            shutil.copyfileobj(source, target)
    every = [old for old in path.parent.glob(f"{path.stem}-*.pt") if old.stem.rpartition("-")[2].isdigit()]
    # By time and not by step: a run may have been taken back, and gone on from there in another way.
    for old in sorted(every, key=lambda old: old.stat().st_mtime_ns)[:-keep]:
        old.unlink()


def load_checkpoint(path: Path, resumable: bool = False) -> dict:
    """The content of a checkpoint, on the CPU; `resumable`: of a last.pt. `fail`s in one line on a file that is
    damaged, hostile or not ours."""
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
        raise UserError(f"no checkpoint {path}" + (": there is no run to go on with; leave --init_from out to start one"
                                        if resumable else ": python train.py writes one"))
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the checkpoint file in it, such as {path / 'ckpt.pt'}")
    except MemoryError:
        raise UserError(f"{path} does not fit into this machine's memory")
    except Exception as error:          # a damaged file can fail anywhere in zipfile or torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} is damaged or no checkpoint of Inkling ({reason}); nothing was loaded: name a ckpt.pt")
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT or any(
            not isinstance(content.get(key), kind) for key, kind in KINDS.items()):
        raise UserError(f"{path} holds no Inkling checkpoint (format {CHECKPOINT_FORMAT}); "
             "python train.py writes them")
    content["config"].setdefault("ngrams", 0)       # as before there were any
    if resumable and (lacking := [key for key in RESUME_KINDS if key not in content]):
        raise UserError(f"{path} cannot be resumed, it lacks {', '.join(lacking)}: start from its weights with --init_from={path}")
    kinds = RESUME_KINDS | {"threads": int, "text": str, "lost": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key, kind()), kind)]
    if wrong or content["step"] < 0 or not math.isfinite(content.get("seconds", 0)) or not all(
            isinstance(loss, float) for loss in content.get("losses", {}).values()):
        raise UserError(f"{path}: {', '.join(wrong) or 'step, seconds or losses'} cannot be what train.py wrote: use another copy")
    return content


def build_model(build, stored: dict, n_layer: int):
    """The model of n_layer blocks that `build()` makes, with the weights `stored`. Raises ValueError where these do not
    fit. A file may claim any size: no memory is taken before what is really there has been counted."""
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
        raise UserError(f"no ckpt.pt under {folder}/: train one with python train.py, or name one with --ckpt=PATH")
    return found[-1]


def check_moments(optimizer):
    """Raise ValueError unless each parameter has no state or all of AdamW's or Muon's, finite and in its shape (Muon's
    in that of its group, stacked): load_state_dict does not look."""
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
        raise UserError(f"the checkpoint's optimizer state does not fit this run ({type(error).__name__}: {error})")
