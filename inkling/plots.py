"""Compare runs: a table of their losses, sizes and times, and their loss curves in one picture.

    python -m inkling.plots out/a out/b                     # compare.png
    python -m inkling.plots out/a out/b --by=time --out=losses.png

Runs whose tokens hold different numbers of bytes, such as those of two tokenizers, are compared in
bits per byte. train.py draws the loss.png of a single run with `plot_run`. Pictures need matplotlib.
"""

import contextlib
import csv
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from inkling.checkpoint import load_checkpoint
from inkling.cli import FilePath, UserError, parse, printable, run
from inkling.files import atomic_write
from inkling.format import align_columns, duration, short
from inkling.hints import runs_like

# Fonts with letters that matplotlib's own lacks, such as Chinese, on Linux, macOS and Windows.
MORE_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Source Han Sans SC", "PingFang SC",
              "Hiragino Sans GB", "Arial Unicode MS", "Microsoft YaHei", "SimHei", "Segoe UI", "Noto Sans"]

# What losses are counted in.
NATS = "nats per token"
BITS = "bits per byte"


@dataclass
class Options:
    # -- the picture
    by: Literal["steps", "tokens", "time"] = "steps"    # the horizontal axis; time: minutes of training
    out: FilePath = "compare.png"       # the file to write


FIRST_IN_HELP = ("out", "by")


def read_log(path: Path) -> list:
    """The rows of a log.csv as dicts of numbers, without empty cells and without a row that a kill or
    a power cut has damaged."""
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(line.replace("\0", "") for line in file)
        for row in reader:
            if not all(row.get(name) for name in ("step", "tokens", "seconds")):    # seconds stands last
                continue
            with contextlib.suppress(ValueError, TypeError):
                rows.append({key: float(value) for key, value in row.items() if value})
    return rows


# -- one run ---------------------------------------------------------------------------------------

def plot_run(rows: list, path: Path, title: str, tokens_per_step: int, tokens_per_epoch: int,
             anchors: dict | None = None):
    """Draw the losses in a log's rows against steps, tokens and epochs as a PNG. tokens_per_step: of the
    steps to come. anchors: {label: loss}, drawn as lines. Raises ImportError without matplotlib."""
    figure, axes = new_figure(title)
    updates = [row for row in rows if "loss" in row]
    axes.plot([row["step"] for row in updates], [row["loss"] for row in updates],
              color="0.75", lw=1, label="one step's batch")
    set_losses_in_view(axes, rows, anchors or {})
    # A straight line from a loss far above to the next evaluation would hide how the loss fell.
    top = axes.get_ylim()[1]
    plot_evaluations(axes, [row for row in rows if "val_loss" in row and not row["val_loss"] > top])
    last_step = max([1, *(row["step"] for row in rows)])
    axes.set(xlabel="steps", xlim=(-0.03 * last_step, 1.03 * last_step))
    axes.xaxis.get_major_locator().set_params(integer=True)
    steps, tokens = tokens_by_step(rows, tokens_per_step)
    tokens_axis = add_axis(axes, "top", steps, tokens)
    tokens_axis.set_xlabel("tokens seen")
    tokens_axis.xaxis.set_major_formatter(lambda tokens, _: short(tokens) if tokens >= 1 else "0")
    epochs_axis = add_axis(axes, -0.15, steps, tokens / tokens_per_epoch)
    epochs_axis.set_xlabel("epochs")
    axes.legend(loc="upper right")
    save_figure(figure, path)


def set_losses_in_view(axes, rows: list, anchors: dict):
    """Let the vertical axis show what happens after the first tenth of the run, and the anchors near
    that. What it leaves out is written into the picture."""
    low, high = losses_after_a_tenth(rows)
    if low is None:
        return
    shown = {}
    span = max(high - low, 0.05 * high)
    for label, loss in sorted(anchors.items(), key=lambda anchor: abs(anchor[1] - high)):
        if low - span <= loss <= high + span:
            shown[label] = loss
    low = min([low, *shown.values()])
    high = max([high, *shown.values()])
    margin = 0.06 * max(high - low, span)
    axes.set_ylim(low - margin, high + margin)
    for label, loss in shown.items():
        axes.axhline(loss, color="tab:green", ls=":", lw=1.2)
        axes.annotate(f"{label} {loss:.3f}", (0.01, loss), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", color="tab:green", fontsize=9)
    if notes := outside(rows, anchors, low - margin, high + margin):
        axes.text(0.01, 0.015, "\n".join(notes), transform=axes.transAxes, fontsize=8, color="0.35")


def losses_after_a_tenth(rows: list) -> tuple:
    """(lowest, highest) finite loss after the first tenth of the steps so far; None where there is
    none."""
    begin = 0.1 * max([0, *(row["step"] for row in rows)])
    losses = [row[name] for row in rows for name in ("loss", "train_loss", "val_loss")
              if name in row and row["step"] >= begin and np.isfinite(row[name])]
    if not losses:
        return None, None
    return min(losses), max(losses)


def outside(rows: list, anchors: dict, low: float, high: float) -> list:
    """Lines that say which losses and anchors lie outside the vertical axis."""
    notes = []
    above = [row for row in rows if max(row.get("loss", low), row.get("val_loss", low)) > high]
    if above:
        loss = above[0].get("loss", above[0].get("val_loss"))
        until = f" to {above[-1]['step']:,.0f}" if len(above) > 1 else ""
        notes.append(f"left out above: step {above[0]['step']:,.0f}{until}, loss {loss:.3f} at first")
    others = [f"{label} {loss:.3f}" for label, loss in anchors.items() if not low <= loss <= high]
    if others:
        notes.append(f"left out: {', '.join(others)}")
    return notes


def plot_evaluations(axes, evaluations: list):
    """The train and val losses of all evaluations, and a star at the best."""
    if not evaluations:
        return
    steps = [row["step"] for row in evaluations]
    for split, color in (("train", "tab:blue"), ("val", "tab:orange")):
        axes.plot(steps, [row[f"{split}_loss"] for row in evaluations], line_style(evaluations),
                  color=color, label=f"{split}, evaluated")
    best = min(evaluations, key=lambda row: row["val_loss"])
    axes.plot(best["step"], best["val_loss"], "*", color="tab:red", ms=12, zorder=5,
              label=f"best val {best['val_loss']:.4f} at step {best['step']:,.0f}")


def tokens_by_step(rows: list, tokens_per_step: int) -> tuple:
    """Arrays of steps and of the tokens seen by then, both rising, which reach beyond the rows on
    both sides. The line between them bends where a run was resumed with another batch size."""
    seen = {0: 0} | {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    steps = np.array(sorted(seen))
    # A log from before tokens were counted may fall where the batch size does.
    tokens = np.maximum.accumulate([seen[step] for step in steps])
    first_pace = tokens_per_step
    if len(steps) > 1 and tokens[1] > 0:
        first_pace = tokens[1] / steps[1]
    margin = 2 + steps[-1]
    steps = np.array([-margin, *steps, steps[-1] + margin])
    tokens = np.array([-margin * first_pace, *tokens, tokens[-1] + margin * tokens_per_step])
    return steps, tokens


def add_axis(axes, location, steps, units):
    """A second horizontal axis, which counts something else than steps: `units` at `steps`."""
    def from_steps(x):
        return np.interp(x, steps, units)

    def to_steps(x):
        return np.interp(x, units, steps)

    return axes.secondary_xaxis(location, functions=(from_steps, to_steps))


# -- several runs ----------------------------------------------------------------------------------

def bits_per_nat(rows: list) -> float | None:
    """What one nat per token is in bits per byte, by the last evaluation that tells; None if none does,
    since logs of long ago have no bits per byte."""
    for row in reversed(rows):
        if row.get("val_loss") and row.get("val_bits_per_byte"):
            return row["val_bits_per_byte"] / row["val_loss"]
    return None


def need_bits(runs: dict) -> bool:
    """Whether to compare runs, {name: rows of its log}, in bits per byte: a nat per token does not mean
    the same in all of them, and all of them tell what it means."""
    factors = [bits_per_nat(rows) for rows in runs.values()]
    if None in factors:
        return False
    return max(factors) > 1.001 * min(factors)          # the logs are rounded


def in_bits(rows: list) -> list:
    """The rows of a log with their losses in bits per byte. The bytes per token are those of val, also
    for the train loss."""
    factor = bits_per_nat(rows)
    converted = []
    for row in rows:
        losses = {name: factor * row[name] for name in ("loss", "train_loss", "val_loss") if name in row}
        converted.append(row | losses)
    return converted


def plot_comparison(runs: dict, by: str, path: Path, loss_unit: str = NATS):
    """Draw the val losses of several runs, {name: rows of its log}, in one PNG, and the train
    losses thinner. Raises ImportError without matplotlib."""
    column, unit, label = {
        "steps": ("step", 1, "steps"),
        "tokens": ("tokens", 1, "tokens seen"),
        "time": ("seconds", 60, "minutes of training"),
    }[by]
    figure, axes = new_figure("train and val loss of several runs")
    for number, (folder, rows) in enumerate(runs.items()):
        name = plain_text(folder)
        if name.startswith("_"):            # a legend leaves such names out
            name = f"./{name}"
        evaluations = [row for row in rows if "val_loss" in row]
        places = [row[column] / unit for row in evaluations]
        color = f"C{number % 10}"
        axes.plot(places, [row["train_loss"] for row in evaluations], "--", color=color, lw=0.8, alpha=0.7)
        axes.plot(places, [row["val_loss"] for row in evaluations], line_style(evaluations),
                  color=color, lw=1.6, label=name)
    axes.plot([], [], "--", color="0.5", lw=0.8, label="train")
    axes.set(xlabel=label, ylabel=f"loss ({loss_unit})")
    axes.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 1000 else f"{x:g}")
    for text in axes.legend().get_texts():
        text.set(parse_math=False, fontfamily=font_families())
    save_figure(figure, path)


def read_evaluated_run(folder: str) -> list:
    """The rows of a run's log; at least one of them is an evaluation."""
    path = Path(folder) / "log.csv"
    try:
        rows = read_log(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        runs = ", ".join(runs_like(str(folder), "log.csv")[:6])
        there = f"; there is {runs}" if runs else ""
        raise UserError(f"{folder} holds no run: cannot read {path}: {reason}{there}")
    if not any({"train_loss", "val_loss"} <= row.keys() for row in rows):
        raise UserError(f"{path} holds no evaluation yet")
    return rows


HEAD = ("run", BITS, "val loss", "at step", "last", "parameters", "of n-grams", "steps", "tokens", "time", "tokens/s")


def table_row(name: str, rows: list) -> tuple:
    """One run in the table of `main`: its best evaluation, its last loss, its size and what it took."""
    evaluations = [row for row in rows if "val_loss" in row]
    best = min(evaluations, key=lambda row: row["val_loss"])
    last = rows[-1]
    factor = bits_per_nat(rows)
    bits = "-"
    if factor:
        bits = f"{factor * best['val_loss']:.4f}"
    rate = "-"
    if last["seconds"] and last["tokens"]:
        rate = short(last["tokens"] / last["seconds"])
    return (name, bits, f"{best['val_loss']:.4f}", f"{best['step']:,.0f}", f"{evaluations[-1]['val_loss']:.4f}",
            *count_stored(Path(name)), f"{last['step']:,.0f}", short(last["tokens"]), duration(last["seconds"]), rate)


def count_stored(folder: Path) -> tuple:
    """(all parameters in a run's ckpt.pt, those of its n-gram table) in words; "-" without a readable one."""
    try:
        weights = load_checkpoint(folder / "ckpt.pt")["model"]
    except UserError:
        return "-", "-"
    shared = {tensor.data_ptr(): tensor.numel() for tensor in weights.values()}     # one tensor may have two names
    of_ngrams = weights["ngrams.weight"].numel() if "ngrams.weight" in weights else 0
    return short(sum(shared.values())), short(of_ngrams)


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="runs", first=FIRST_IN_HELP)
    options = Options(**parsed.values)
    if not parsed.words:
        raise UserError("name the folders of runs to compare, such as out/a out/b")
    runs = {folder.rstrip("/"): read_evaluated_run(folder) for folder in parsed.words}
    for line in align_columns([HEAD, *(table_row(name, rows) for name, rows in runs.items())]):
        print(line)
    unit = NATS
    if need_bits(runs):
        unit = BITS
        runs = {name: in_bits(rows) for name, rows in runs.items()}
        print(f"\na token does not hold the same number of bytes in all of these runs: compare their {BITS}, as the "
              f"picture does; the losses are {NATS}")
    try:
        plot_comparison(runs, options.by, Path(options.out), unit)
    except ImportError:
        print("\nno picture: pip install matplotlib")
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror or error}")
    except Exception as error:              # matplotlib raises whatever it likes
        raise UserError(f"cannot draw {options.out}: {why(error)}")
    else:
        print(f"\n{options.out}: val losses by {options.by}")
    return 0


def why(error: Exception) -> str:
    """What went wrong with a picture, in one line."""
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(reason.split())[:200]


# -- both ------------------------------------------------------------------------------------------

def new_figure(title: str) -> tuple:
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(plain_text(title), parse_math=False, fontfamily=font_families())
    axes.set(ylabel=f"loss ({NATS})")
    axes.grid(alpha=0.3)
    return figure, axes


def plain_text(path: str) -> str:
    """A path as text that can be drawn: a name on the disk may hold anything."""
    return printable(path)


def font_families() -> list:
    """matplotlib's font, then those of MORE_FONTS that are installed: letters that one lacks are
    taken from the next."""
    from matplotlib import font_manager, rcParams

    installed = set(font_manager.get_font_names())
    return [*rcParams["font.family"], *(name for name in MORE_FONTS if name in installed)]


def line_style(evaluations: list) -> str:
    """Dots on the line, unless there are too many of them."""
    return ".-" if len(evaluations) <= 50 else "-"


def save_figure(figure, path: Path):
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # a warning for every letter that no font has
        figure.savefig(image, format="png")
    with atomic_write(path) as file:
        file.write(image.getvalue())


if __name__ == "__main__":
    run(main)
