"""How long training stands still for a checkpoint: train.py's `save`, of a run after an update.

    python bench/checkpoint.py                              # 14M, 124M, 350M; up to 4.3 GB on disk, 8 GB of memory
    python bench/checkpoint.py --sizes=14M --saves=20

For each size last.pt (weights, optimizer state) and ckpt.pt (weights) of a run are saved `saves`
times over the same files. The medians are printed, beside writing and flushing as many bytes alone.
By default a run saves at every evaluation, once last.pt and, when the loss is the best so far,
ckpt.pt: `pause` is both. Its share of the interval is that of the steps between evaluations in the
size's config, whose time is measured here: one micro-batch forward and backward, times their number, and
the rest of an update. On a slow machine the share is small for that reason alone; --step_seconds
gives another machine's.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from common import (
    ROOT,
    describe_machine,
    flags,
    markdown_table,
    publish,
    read_choices,
    read_options,
    write_random_set,
)
from timing import count_parameters

from inkling.cli import NonNegativeFloat, NonNegativeInt, PositiveInt, UserError, parse, run
from inkling.dry_run import seconds_of
from inkling.files import atomic_write
from inkling.report import Report
from train import Config, Origin, claim_folder, save, start, update


@dataclass
class Size:
    words: list                         # for train.py
    vocab_size: int


GPT2_CONFIG = str(ROOT / "config" / "gpt2_124m.py")
SIZES = {
    "toy": Size(flags(n_layer=1, n_embd=32, n_head=1, block_size=16, batch_size=2, ngrams=0, eval_interval=25), 65),
    "14M": Size([str(ROOT / "config" / "shakespeare_char.py")], 65),
    "124M": Size([GPT2_CONFIG], 50257),
    "350M": Size([GPT2_CONFIG, *flags(n_layer=24, n_head=8, n_embd=1024)], 50257),
}
OPTIMIZERS = {
    "muon": flags(optimizer="muon"),
    "adamw": flags(optimizer="adamw", learning_rate=0.001),
}


@dataclass
class Options:
    # -- what to measure
    sizes: str = "14M,124M,350M"        # of 14M, 124M, 350M, toy, separated by commas
    optimizers: str = "muon,adamw"      # separated by commas
    saves: PositiveInt = 5              # of each file; the median counts
    step_seconds: NonNegativeFloat = 0.0  # time of a step, for the share; 0: measured
    rows: NonNegativeInt = 0            # sequences of the micro-batch that is timed; 0: at most 2,048 tokens
    folder: str = ""                    # where to write: on the disk to be measured; empty: a temporary folder
    # -- machine
    device: Literal["cpu", "cuda"] = "cpu"  # where the model is
    append: bool = False                # add the table to bench/RESULTS.md


def start_run(cfg: Config, size: Size, folder: Path):
    """A run on random ids that saves to `folder`."""
    write_random_set(folder / "set", size.vocab_size, 200_000)
    measured_run = start(replace(cfg, dataset="set", data_dir=str(folder)))
    claim_folder(measured_run, folder / "run", Origin())
    return measured_run


def median_seconds(times: int, device: str, function, *arguments) -> float:
    return median(seconds_of(device, function, *arguments) for _ in range(times))


def measure_step(measured_run, cfg: Config) -> float:
    """Seconds of a step with all of cfg's sequences, from those of a run whose step is one
    micro-batch."""
    device = measured_run.plan.device
    passes = median_seconds(3, device, measured_run.forward_backward)
    whole_update = median_seconds(2, device, update, measured_run, 1)
    sequences = cfg.batch_size * cfg.gradient_accumulation_steps
    return passes * sequences / measured_run.plan.sequences + max(0.0, whole_update - passes)


def measure_save(measured_run, report: Report, name: str, saves: int) -> tuple:
    """(seconds, bytes) of a checkpoint."""
    seconds = median_seconds(saves, measured_run.plan.device, save, measured_run, report, name)
    if problem := measured_run.folder.unsaved[name]:
        raise UserError(problem)
    return seconds, (measured_run.folder.path / name).stat().st_size


def write_bytes(path: Path, size: int):
    """Write and flush `size` bytes as a checkpoint is, without torch."""
    block = os.urandom(1 << 20)
    with atomic_write(path) as file:
        for first in range(0, size, len(block)):
            file.write(block[:size - first])


def measure(size_name: str, optimizer: str, options: Options, folder: Path) -> list:
    """A row of the table."""
    size = SIZES[size_name]
    words = [*size.words, *OPTIMIZERS[optimizer], *flags(device=options.device, compile=False)]
    cfg = Config(**parse(Config, words, "").values)
    rows = options.rows or max(1, min(cfg.batch_size, 2048 // cfg.block_size))
    measured_run = start_run(replace(cfg, batch_size=rows, gradient_accumulation_steps=1), size, folder)
    device = measured_run.plan.device
    update(measured_run, 0)             # makes the optimizers' state
    step = options.step_seconds or measure_step(measured_run, cfg)

    report = Report(measured_run, folder / "run")
    ckpt_seconds, _ = measure_save(measured_run, report, "ckpt.pt", options.saves)
    last_seconds, last_size = measure_save(measured_run, report, "last.pt", options.saves)
    bytes_seconds = median_seconds(min(3, options.saves), device, write_bytes, folder / "bytes", last_size)
    measured_run.folder.release()
    pause = last_seconds + ckpt_seconds
    megabytes = last_size / 1e6
    return [
        size_name,
        f"{count_parameters(measured_run.model):,}",
        optimizer,
        f"{megabytes:,.0f}",
        f"{last_seconds:.3f}",
        f"{megabytes / last_seconds:,.0f}",
        f"{megabytes / bytes_seconds:,.0f}",
        f"{ckpt_seconds:.3f}",
        f"{pause:.3f}",
        f"{measured_run.plan.eval_interval:,} x {step:.3f} s",
        f"{100 * pause / (measured_run.plan.eval_interval * step):.2f}%",
    ]


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    sizes = read_choices("sizes", options.sizes, SIZES)
    optimizers = read_choices("optimizers", options.optimizers, OPTIMIZERS)
    if options.folder and not Path(options.folder).is_dir():
        raise UserError(f"folder={options.folder} is no folder")
    rows = []
    for size in sizes:
        for optimizer in optimizers:
            with tempfile.TemporaryDirectory(dir=options.folder or None, prefix="inkling-bench-") as folder:
                rows.append(measure(size, optimizer, options, Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    head = ["size", "parameters", "optimizer", "last.pt, MB", "s", "MB/s", "bytes alone, MB/s", "ckpt.pt, s",
            "pause, s", "interval", "share"]
    text = f"{markdown_table(head, rows)}\n\nMedians of {options.saves} saves."
    publish("Checkpoints", text, describe_machine(options.device), options.append)
    return 0


if __name__ == "__main__":
    run(main)
