"""The runs from which the constants of inkling/plan.py are chosen, and how well they choose.

    python bench/plan.py measure                        # runs that bench/plan.csv does not hold yet
    python bench/plan.py measure --texts=fables --minutes=1
    python bench/plan.py fit                            # what the constants cost, from bench/plan.csv

A row of bench/plan.csv is a run: a text, seconds of training and the settings that were tried, and the val loss of
the final weights. Its number of steps is that of the time at the pace of a step on the whole machine, uncompiled, which
is measured first, alone. The runs themselves are counted in steps, so a few may go side by side, a thread each: the
loss does not depend on the pace. The cheapest come first, a row is written as soon as it is known, and a run that is
cut goes on where it was. Texts are data sets: prepare those that you want to be measured, and name them.

`fit` shows, for values of TOKENS_PER_PARAMETER, how much worse (in bits per byte) the shape that the rule takes is
than the best that was tried on a text in a time, and which settings were best for each. The other constants were read
off that table by hand.
"""

import csv
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from statistics import mean

from common import ROOT, cores, describe_processor, markdown_table, read_choices, read_numbers

from inkling import plan
from inkling.cli import FilePath, UserError, check, parse, run
from inkling.dataset import data_folder, read_meta

CSV = ROOT / "bench" / "plan.csv"
OVERHEAD = 0.25                         # the share of the time that is not training ("By the clock" in RESULTS.md)
SECONDS_OF_A_PACE = 1.0                 # in which its steps begin, three at least
EVALUATION_WINDOWS = 600                # of a longer val split, spread evenly
CANDIDATES = [0.5, 1, 1.5, 2, 3, 4, 6, 10, 20]


@dataclass
class Options:
    texts: str = "fables"               # data sets, separated by commas
    minutes: str = "1,4"                # of the runs, separated by commas
    data_dir: FilePath = ""             # folder that holds the data sets; empty: data/
    side_by_side: int = 0               # runs at a time, a thread each; 0: as many as there are cores


@dataclass(frozen=True)
class Trial:
    """A run to be measured: the first columns of the table."""

    text: str
    seconds: float                      # of training
    n_layer: int
    n_embd: int
    n_head: int
    batch_size: int
    dropout: float
    block_size: int = plan.BLOCK_SIZE

    def settings(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name not in ("text", "seconds")}


COLUMNS = [column.name for column in fields(Trial)] + ["seconds_per_step", "steps", "epochs", "train_loss", "val_loss",
                                                       "bits_per_byte", "windows", "machine"]


def trials_of(text: str, seconds: float) -> list:
    """The runs of a text: three shapes, and of the one in the middle two batches, with dropout and without."""
    of_a_minute = seconds < 90
    small, middle, large = plan.SHAPES[1:4] if of_a_minute else plan.SHAPES[2:5]
    tried = [(small, 24, 0.0), (middle, 24, 0.0), (middle, 48, 0.0), (middle, 24, 0.1), (middle, 48, 0.1),
             (large, 24, 0.0)]
    return [Trial(text, seconds, shape.n_layer, shape.n_embd, shape.n_head, batch_size, dropout)
            for shape, batch_size, dropout in tried]


# -- measuring ------------------------------------------------------------------------------------

def read_rows() -> list:
    """The rows of bench/plan.csv, as dicts of text."""
    if not CSV.is_file():
        return []
    with open(CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(row: dict):
    is_new = not CSV.is_file()
    with open(CSV, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def trial_of(row: dict) -> Trial:
    return Trial(**{column.name: column.type(row[column.name]) for column in fields(Trial)})


def measure(options: Options):
    texts = [text for text in options.texts.split(",") if text]
    for text in texts:
        read_meta(data_folder(text, options.data_dir))          # a text that is missing fails now
    done = {trial_of(row) for row in read_rows()}
    trials = [trial for minutes in sorted(read_numbers("minutes", options.minutes, float)) for text in texts
              for trial in trials_of(text, 60 * minutes * (1 - OVERHEAD)) if trial not in done]
    paces = {}
    for trial in trials:
        paces[trial] = ask("pace", trial, options, threads=cores())
        print(f"{1000 * paces[trial]:7.1f} ms  {trial}", flush=True)
    running = {}
    while trials or running:
        while trials and len(running) < (options.side_by_side or cores()):
            trial = trials.pop(0)
            steps = max(1, int(trial.seconds / paces[trial]))
            running[trial] = steps, start_child("loss", trial, options, 1, steps)
        time.sleep(0.2)
        for trial, (steps, child) in list(running.items()):
            if child.poll() is None:
                continue
            del running[trial]
            row = asdict(trial) | {"seconds_per_step": round(paces[trial], 4), "steps": steps,
                                   "machine": describe_processor()} | result_of(child, trial)
            append_row(row)
            print(f"{row['bits_per_byte']:.4f} bits per byte  {trial}", flush=True)


def ask(task: str, trial: Trial, options: Options, threads: int, steps: int = 0):
    return result_of(start_child(task, trial, options, threads, steps), trial)


def start_child(task: str, trial: Trial, options: Options, threads: int, steps: int) -> subprocess.Popen:
    spec = {"task": task, "threads": threads, "steps": steps, "data_dir": options.data_dir, "trial": asdict(trial)}
    return subprocess.Popen([sys.executable, __file__, "child", json.dumps(spec)], stdout=subprocess.PIPE, text=True)


def result_of(child: subprocess.Popen, trial: Trial):
    output, _ = child.communicate()
    if child.returncode:
        raise UserError(f"{trial} ended with code {child.returncode}", 1)
    return json.loads(output.splitlines()[-1])


def child(spec: dict):
    """A pace, in seconds a step, or what a run gives, as JSON."""
    import torch
    torch.set_num_threads(spec["threads"])
    from train import Config, estimate_loss, start, time_a_step, update

    trial = Trial(**spec["trial"])
    cfg = Config(dataset=trial.text, data_dir=spec["data_dir"], max_iters=spec["steps"] or 1000, device="cpu",
                 compile=False, **trial.settings())
    run = start(cfg)
    if spec["task"] == "pace":
        print(json.dumps(time_a_step(run, SECONDS_OF_A_PACE)))
        return
    for step in range(spec["steps"]):
        update(run, step)
    windows = min((len(run.data["val"]) - 1) // cfg.block_size, EVALUATION_WINDOWS)
    losses = estimate_loss(run, windows=windows)
    val = run.meta["splits"]["val"]
    print(json.dumps({
        "epochs": round(spec["steps"] * run.tokens_per_step / len(run.data["train"]), 2),
        "train_loss": round(losses["train"], 4),
        "val_loss": round(losses["val"], 4),
        "bits_per_byte": round(losses["val"] * val["tokens"] / val["bytes"] / math.log(2), 4),
        "windows": windows}))


# -- fitting --------------------------------------------------------------------------------------

def parameters_of(row: dict) -> int:
    return plan.Shape(int(row["n_layer"]), int(row["n_embd"]), int(row["n_head"])).parameters


def tokens_of(row: dict) -> float:
    return int(row["steps"]) * int(row["batch_size"]) * int(row["block_size"])


def loss_of(row: dict) -> float:
    return float(row["bits_per_byte"])


def shape_by_rule(rows: list, tokens_per_parameter: float) -> list:
    """The rows of the largest shape that reads enough tokens; of the smallest if none does."""
    of_shape = {}
    for row in rows:
        of_shape.setdefault(parameters_of(row), []).append(row)
    enough = [size for size, its in of_shape.items() if max(map(tokens_of, its)) >= tokens_per_parameter * size]
    return of_shape[max(enough, default=min(of_shape))]


def fit(options: Options):
    groups = {}
    for row in read_rows():
        groups.setdefault((row["text"], float(row["seconds"])), []).append(row)
    if not groups:
        raise UserError(f"{CSV} holds no rows: python bench/plan.py measure makes some")
    table = []
    for constant in CANDIDATES:
        losses = [min(map(loss_of, shape_by_rule(rows, constant))) / min(map(loss_of, rows)) - 1
                  for rows in groups.values()]
        table.append([f"{constant:g}", f"{100 * mean(losses):.2f}%", f"{100 * max(losses):.2f}%"])
    print(markdown_table(["tokens per parameter", "worse than the best, on average", "at most"], table), "\n")
    table = []
    for (text, seconds), rows in groups.items():
        best = min(rows, key=loss_of)
        table.append([text, f"{seconds:g}", len(rows), f"{best['n_layer']} x {best['n_embd']}", best["batch_size"],
                      best["dropout"], best["epochs"], best["val_loss"], best["bits_per_byte"]])
    print(markdown_table(["text", "seconds", "runs", "best shape", "batch", "dropout", "epochs", "val",
                          "bits per byte"], table))


TASKS = {"measure": measure, "fit": fit}


def main(argv: list) -> int:
    if argv[:1] == ["child"]:
        child(json.loads(argv[1]))
        return 0
    task = next((word for word in argv if not word.startswith("-")), "")
    if task:
        read_choices("task", task, TASKS)
    options = Options(**parse(Options, [word for word in argv if word != task], __doc__).values)
    check(options)
    if not task:
        raise UserError(f"say what to do: {' or '.join(TASKS)}")
    TASKS[task](options)
    return 0


if __name__ == "__main__":
    run(main)
