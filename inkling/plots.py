"""Pictures of one run, and of several over one another."""

import contextlib
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inkling.cli import UserError, parse
from inkling.files import atomic_write
from inkling.format import aligned, duration, short


def read_log(path: Path) -> list:
    """The rows of a log.csv as dicts of numbers (empty cells left out). A row that a kill cut short is dropped."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError):
                if row["seconds"]:                      # the last column: without it the row is not whole
                    rows.append({key: float(value) for key, value in row.items() if value})
    return rows


def plot_run(rows: list, path: Path, title: str, tokens_per_step: int, tokens_per_epoch: int):
    """Loss against steps, epochs and tokens as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="0.75", lw=1,
              label="one step's batch")
    for name, color in (("train", "tab:blue"), ("val", "tab:orange")):
        axes.plot([row["step"] for row in evaluations], [row[f"{name}_loss"] for row in evaluations],
                  ".-" if len(evaluations) <= 50 else "-", color=color, label=f"{name}, evaluated")
    if evaluations:
        best = min(evaluations, key=lambda row: row["val_loss"])
        axes.plot(best["step"], best["val_loss"], "*", color="tab:red", ms=12, zorder=5,
                  label=f"best val {best['val_loss']:.4f} at step {best['step']:,.0f}")
    end = max([1, *(row["step"] for row in rows)])
    axes.set(title=title, xlabel="steps", ylabel="loss (nats per token)", xlim=(-0.03 * end, 1.03 * end))
    axes.xaxis.get_major_locator().set_params(integer=True)
    above, below = (axes.secondary_xaxis(place, functions=(lambda s, f=factor: s * f, lambda x, f=factor: x / f))
                    for place, factor in (("top", tokens_per_step), (-0.15, tokens_per_step / tokens_per_epoch)))
    above.set_xlabel("tokens seen")
    below.set_xlabel("epochs")
    above.xaxis.set_major_formatter(lambda tokens, _: short(tokens) if tokens >= 1 else "0")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def save_figure(figure, path: Path):
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with atomic_write(path) as file:
        file.write(image.getvalue())


@dataclass
class Options:
    # -- what is drawn
    by: Literal["steps", "tokens", "time"] = "steps"    # the horizontal axis; time: of training
    out: str = "compare.png"            # the picture


def plot_comparison(runs: dict, by: str, path: Path):
    """The val losses of {name: rows of its log} over one another, the train losses thinner, as a PNG. Needs
    matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    column, unit, label = {"steps": ("step", 1, "steps"), "tokens": ("tokens", 1, "tokens seen"),
                           "time": ("seconds", 60, "minutes of training")}[by]
    for number, (name, rows) in enumerate(runs.items()):
        evaluations = [row for row in rows if "val_loss" in row]
        places = [row[column] / unit for row in evaluations]
        color = f"C{number % 10}"
        axes.plot(places, [row["train_loss"] for row in evaluations], "--", color=color, lw=0.8, alpha=0.7)
        axes.plot(places, [row["val_loss"] for row in evaluations], ".-" if len(places) <= 50 else "-", color=color,
                  lw=1.6, label=name)
    axes.plot([], [], "--", color="0.5", lw=0.8, label="train")
    axes.set(title="val loss of several runs", xlabel=label, ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 1000 else f"{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="runs")
    options = Options(**parsed.values)
    if not parsed.words:
        raise UserError("name the folders of runs to compare, such as out/a out/b")
    runs, table = {}, [("run", "best val", "at step", "last val", "steps", "tokens", "training", "tokens/s")]
    for word in parsed.words:
        path = Path(word) / "log.csv"
        try:
            rows = read_log(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{word} holds no run: cannot read {path}: {getattr(error, 'strerror', None) or error}")
        evaluations = [row for row in rows if {"train_loss", "val_loss"} <= row.keys()]
        if not evaluations:
            raise UserError(f"{path} holds no evaluation yet")
        runs[word.rstrip("/")] = rows
        best, last = min(evaluations, key=lambda row: row["val_loss"]), rows[-1]
        rate = short(last["tokens"] / last["seconds"]) if last["seconds"] and last["tokens"] else "-"
        table.append((word.rstrip("/"), f"{best['val_loss']:.4f}", f"{best['step']:,.0f}",
                      f"{evaluations[-1]['val_loss']:.4f}", f"{last['step']:,.0f}", short(last["tokens"]),
                      duration(last["seconds"]), rate))
    for line in aligned(table):
        print(line)
    try:
        plot_comparison(runs, options.by, Path(options.out))
        print(f"\n{options.out}: val losses by {options.by}")
    except ImportError:
        print("\nno picture: pip install matplotlib")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {options.out}: {getattr(error, 'strerror', None) or error}")
    return 0
