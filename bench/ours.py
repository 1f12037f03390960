"""train.py, as tasks of runners.py.

- ours: its `start`, `compile_and_wrap` and `update`, in a loop that evaluates as the peers are
  evaluated.
- loop, memory: the whole program.
"""

import os
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from timing import StepTimer, count_parameters, full_loss, time_parts
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from inkling.cli import UserError, exit_code, parse
from inkling.device import autocast
from inkling.report import flops_per_token, peak_memory

# -- its steps -----------------------------------------------------------------------------------


def ours(spec: dict) -> dict:
    """Train as the command line spec["words"] says, for as many steps as spec["tokens"] make if
    that is given."""
    run = start_run(spec)
    train.compile_and_wrap(run)
    if run.cfg.compile is True and not run.plan.compile:
        raise UserError("compile=True, but compiling failed; python train.py with the same settings says why", 1)
    steps = run.plan.max_iters
    interval = max(1, steps // spec["points"])
    ids = run.data["val"]

    def val_loss():
        return full_loss(run.model, lambda x, y: run.model(x)[0], ids, run.cfg.block_size, run.plan.device)

    timer = StepTimer(run.plan.device, spec["launched"])
    timer.start()
    for step in range(steps):
        if spec["evaluate"] and step % interval == 0:
            timer.evaluate(step, val_loss)
        train.update(run, step)
        timer.end_step()
    run.guard.verify(steps)
    if spec["evaluate"]:
        timer.evaluate(steps, val_loss)
    figures = timer.figures(
        compiled=bool(run.plan.compile),
        parameters=count_parameters(run.model),
        flops_per_token=flops_per_token(run.cfg, run.model),
        dtype=run.plan.dtype,
        compile=bool(run.plan.compile),
        tokens_per_step=run.tokens_per_step,
    )
    if spec.get("split"):
        figures["parts"] = step_parts(run, spec["split"])
    return figures


def start_run(spec: dict) -> train.Run:
    parsed = parse(train.Config, spec["words"], "")
    cfg = train.Config(**parsed.values)
    if cfg.max_minutes:
        raise UserError(f"max_minutes={cfg.max_minutes:g} does not say how many steps to measure: give --max_iters")
    if "max_iters" in parsed.typed and "max_epochs" not in parsed.typed:
        cfg = replace(cfg, max_epochs=0.0)
    if spec.get("tokens"):
        tokens_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
        cfg = replace(cfg, max_epochs=0.0, max_iters=max(1, round(spec["tokens"] / tokens_per_step)))
    data = Path(spec["data"])
    cfg = replace(cfg, dataset=data.name, data_dir=str(data.parent))
    cfg, origin = train.find_origin(cfg, parsed, Path(spec["folder"], "run"))
    return train.start(cfg, origin)


def step_parts(run: train.Run, steps: int) -> dict:
    """Seconds of the parts of a step: its calls, one after the other, on one micro-batch."""
    current = {}                        # what one part hands to the next

    def fetch(step):
        current["batch"] = next(run.batches(step))

    def forward(step):
        with autocast(run.plan.device, run.plan.dtype):
            current["loss"] = run.step_model(*current["batch"])[1]

    def backward(step):
        current["loss"].backward()

    def optimize(step):
        train.clip_gradients(run)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    parts = {"data": fetch, "forward": forward, "backward": backward, "optimizer": optimize}
    return time_parts(parts, steps, run.plan.device)


# -- the whole program ---------------------------------------------------------------------------

def loop(spec: dict) -> dict:
    """Run train.py with spec["words"] and count what happens from the update of step spec["first"]
    to that of spec["last"]: synchronizations of host and device, as PyTorch's debug mode sees them
    (by place), and graphs compiled."""
    from torch._dynamo.utils import counters

    places = Counter()
    graphs = []
    updates = 0
    on_cuda = torch.cuda.is_available()

    def before_step(optimizer, *_):
        nonlocal updates
        if not isinstance(optimizer, torch.optim.AdamW):        # of which every run has one
            return
        if updates in (spec["first"], spec["last"]):
            graphs.append(counters["stats"]["unique_graphs"])
            if on_cuda:
                torch.cuda.set_sync_debug_mode("warn" if updates == spec["first"] else "default")
        updates += 1

    def note(message, category, filename, lineno, *_):
        if "called a synchronizing" in str(message):
            places[f"{Path(filename).name}:{lineno}"] += 1

    data = Path(spec["data"])
    words = [*spec["words"], f"--dataset={data.name}", f"--data_dir={data.parent}",
             f"--out_dir={spec['folder']}/run"]
    register_optimizer_step_pre_hook(before_step)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        run_train(words)
    first_graphs, last_graphs = graphs
    return {
        "places": places,
        "graphs": last_graphs,
        "recompilations": last_graphs - first_graphs,
        "counted": on_cuda,                     # whether synchronizations were
    }


def memory(spec: dict) -> dict:
    """Run train.py with spec["words"]: the peak of resident memory, and what was resident before. A
    tiny run comes first, so that libraries, data and tokenizer are there already."""
    sys.modules["matplotlib"] = None    # a picture is no part of it
    tiny = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=1", "--ngrams=0"]
    run_train([*spec["words"], *tiny, f"--out_dir={spec['folder']}/tiny"])
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    run_train([*spec["words"], f"--out_dir={spec['folder']}/run"])
    return {"peak": peak_memory("cpu"), "before": resident_pages * os.sysconf("SC_PAGE_SIZE")}


def run_train(words: list):
    if code := exit_code(train.main, words):
        raise SystemExit(code)
