"""How long training stands still for a checkpoint: checkpoint_module.save_checkpoint with what train.py saves.

    python bench/checkpoint.py                              # 14M, 124M, 350M; up to 4.3 GB on disk, 8 GB of memory
    python bench/checkpoint.py --sizes=14M --saves=20

For each size a model and its optimizers, with a state as after one step, are saved `saves` times over the same file, as
in a run: last.pt (weights, optimizer state) and ckpt.pt (weights). The medians are printed, beside writing and flushing
as many bytes alone. By default a run saves at every evaluation, once last.pt and, when the loss is the best so far,
ckpt.pt: `pause` is both. Its share of the interval is that of eval_interval steps of the size's config, whose time is
measured here: one micro-batch forward and backward, times their number, and the optimizer. On a slow machine the share
is small for that reason alone; --step_seconds gives another machine's.
"""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from common import ROOT, machine, publish, table

sys.path.insert(0, str(ROOT))
import train
from inkling import checkpoint as checkpoint_module
from inkling import device as device_module
from inkling import files as files_module
from inkling.cli import fail, parse, run

# size: (config file, flags, vocabulary)
SIZES = {"toy": ("", ["--n_layer=1", "--n_embd=32", "--n_head=1", "--block_size=16", "--batch_size=2",
                "--ngrams=0"], 65),
         "14M": ("shakespeare_char", [], 65),
         "124M": ("gpt2_124m", [], 50257),
         "350M": ("gpt2_124m", ["--n_layer=24", "--n_head=8", "--n_embd=1024"], 50257)}


@dataclass
class Options:
    # -- what to measure
    sizes: str = "14M,124M,350M"        # of 14M, 124M, 350M, toy, separated by commas
    optimizers: str = "muon,adamw"      # separated by commas
    saves: int = 5                      # of each file; the median counts
    step_seconds: float = 0.0           # time of a step, for the share; 0: measured
    rows: int = 0                       # sequences of the micro-batch that is timed; 0: at most 2,048 tokens
    folder: str = ""                    # where to write: on the disk to be measured; empty: a temporary folder
    # -- machine
    device: Literal["cpu", "cuda"] = "cpu"  # where the model is
    append: bool = False                # add the table to bench/RESULTS.md


def config_of(size: str, optimizer: str, device: str) -> train.Config:
    name, words, _ = SIZES[size]
    config = [str(ROOT / "config" / f"{name}.py")] if name else []
    values = parse(train.Config, [*config, *words, f"--optimizer={optimizer}", f"--device={device}"], "").values
    cfg = train.Config(**values)
    cfg.dtype = device_module.choose_dtype(device, cfg.dtype)
    return cfg


def timed(work, times: int, device: str) -> float:
    """Median seconds of `times` calls."""
    seconds = []
    for _ in range(times):
        device_module.synchronize(device)
        start = time.perf_counter()
        work()
        device_module.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def written_bytes(path: Path, size: int):
    """Write and flush `size` bytes as a checkpoint is, without torch."""
    block = os.urandom(1 << 20)
    with files_module.atomic_write(path) as file:
        for _ in range(size >> 20):
            file.write(block)
        file.write(block[:size & (1 << 20) - 1])


def measure(size: str, optimizer: str, options: Options, folder: Path) -> list:
    """A row of the table."""
    cfg, device = config_of(size, optimizer, options.device), options.device
    torch.manual_seed(0)
    model = train.GPT(cfg, SIZES[size][2]).to(device).train()
    optimizers = train.make_optimizers(model, cfg, device, False)
    rows = options.rows or max(1, min(cfg.batch_size, 2048 // cfg.block_size))
    x = torch.randint(SIZES[size][2], (rows, cfg.block_size), device=device)

    def forward_backward():
        with device_module.autocast(device, cfg.dtype):
            loss = model(x, x)[1]
        loss.backward()

    def update():
        for one in optimizers:
            one.step()

    forward_backward()                      # warms up, and leaves gradients
    update()                                # makes the optimizers' state
    step = options.step_seconds
    if not step:
        sequences = cfg.batch_size * cfg.gradient_accumulation_steps
        step = timed(forward_backward, 3, device) * sequences / rows + timed(update, 2, device)
    model.zero_grad(set_to_none=True)
    content = dict(step=1, evaluated=1, best_step=1, best_val_loss=1.0, losses=dict(train=1.0, val=1.0), seconds=1.0,
                   config=asdict(cfg), tokenizer=dict(kind="byte"), vocab_size=SIZES[size][2], text="",
                   model=dict(model.state_dict()))
    contents = {"ckpt.pt": content,
                "last.pt": content | dict(optimizers=[one.state_dict() for one in optimizers], scaler={}, threads=1)}
    seconds, sizes = {}, {}
    for name, what in contents.items():
        def save(name=name, what=what):
            if problem := checkpoint_module.save_checkpoint(what, folder / name):
                fail(problem)
        seconds[name] = timed(save, options.saves, device)
        sizes[name] = (folder / name).stat().st_size
    alone = timed(lambda: written_bytes(folder / "alone", sizes["last.pt"]), min(3, options.saves), device)
    for path in folder.iterdir():
        path.unlink()
    pause, interval = sum(seconds.values()), cfg.eval_interval * step
    count = sum(p.numel() for p in model.parameters())
    return [size, f"{count:,}", optimizer, f"{sizes['last.pt'] / 1e6:,.0f}", f"{seconds['last.pt']:.3f}",
            f"{sizes['last.pt'] / 1e6 / seconds['last.pt']:,.0f}", f"{sizes['last.pt'] / 1e6 / alone:,.0f}",
            f"{seconds['ckpt.pt']:.3f}", f"{pause:.3f}", f"{cfg.eval_interval:,} x {step:.3f} s",
            f"{100 * pause / interval:.2f}%"]


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    sizes, optimizers = options.sizes.split(","), options.optimizers.split(",")
    for given, known in ((sizes, SIZES), (optimizers, ("muon", "adamw"))):
        if unknown := set(given) - set(known):
            fail(f"there is no {', '.join(sorted(unknown))}, only {', '.join(known)}")
    if options.folder and not Path(options.folder).is_dir():
        fail(f"folder={options.folder} is no folder")
    rows = []
    for size in sizes:
        for optimizer in optimizers:
            with tempfile.TemporaryDirectory(dir=options.folder or None, prefix="inkling-bench-") as folder:
                rows.append(measure(size, optimizer, options, Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    head = ["size", "parameters", "optimizer", "last.pt, MB", "s", "MB/s", "bytes alone, MB/s", "ckpt.pt, s",
            "pause, s", "interval", "share"]
    publish("Checkpoints", f"{table(head, rows)}\n\nMedians of {options.saves} saves.", machine(options.device),
            options.append)
    return 0


if __name__ == "__main__":
    run(main)
