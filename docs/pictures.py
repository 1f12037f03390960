"""The pictures of the tour (docs/tour.md): everything in them is computed by train.py's own functions.

    python docs/pictures.py                 # writes docs/tour_*.png; trains two small models, a minute
    python docs/pictures.py --out_dir=FOLDER --steps=10     # a trial

Needs matplotlib. Words in the pictures are code, numbers or the text itself, so that one picture serves
both languages.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare  # noqa: E402
from inkling.cli import FilePath, PositiveInt, parse, run  # noqa: E402
from inkling.files import atomic_write  # noqa: E402
from train import Config, draw, estimate_loss, get_batch, lr_factor, start, update, window_starts  # noqa: E402

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#c8560a", "#2a7d2e", "#b3202a", "#666666"
TOY_LOGITS = [4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]
# The model of the tour's chapter 5.
SMALL = dict(n_embd=64, ngrams=0, device="cpu", dtype="float32", compile=False)


@dataclass
class Options:
    # -- the pictures
    out_dir: FilePath = ""              # folder for the pictures; empty: the one of this file
    data_dir: FilePath = ""             # folder that holds the data sets; empty: data/
    steps: PositiveInt = 600            # updates of the model that overfits; half of them of the other


def visible(character: str) -> str:
    """A character as it can be drawn in a cell: a space and a line break have no shape of their own."""
    return {" ": "·", "\n": "↵"}.get(character, character)


def new_figure(height: float):
    """A figure 800 pixels wide."""
    return Figure(figsize=(8, height), dpi=100, layout="constrained", facecolor="white")


def save(figure, path: Path):
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with atomic_write(path) as file:
        file.write(image.getvalue())
    print(f"{path}: {path.stat().st_size:,} bytes")


# -- batches ---------------------------------------------------------------------------------------

def draw_windows(path: Path, data_dir: str):
    """Where the windows of an epoch lie in a text of 96 tokens, for each way of sampling."""
    tokens, block_size = 96, 16
    small = start_small("fables", data_dir, block_size)
    figure = new_figure(3.6)
    axes = figure.subplots()
    for place, token in enumerate(small.data["train"][:tokens].tolist()):
        axes.text(place + 0.5, 0.45, visible(small.tokenizer.decode([token])), ha="center", va="center",
                  family="monospace", fontsize=7.5)
    top = 1.1
    for sampling, epoch, label in [("epoch", 0, "epoch 0"), ("epoch", 1, "epoch 1"), ("fixed", 0, "fixed"),
                                   ("random", 0, "random")]:
        cfg = Config(batch_size=1, block_size=block_size, sampling=sampling)
        windows = range(tokens // block_size)
        begins = [window_starts(epoch * len(windows) + order, cfg, tokens).item() for order in windows]
        lanes = choose_lanes(begins, block_size, tokens)
        height = 0.76 if max(lanes) == 0 else 0.5
        for order, (begin, lane) in enumerate(zip(begins, lanes, strict=True), 1):
            draw_window(axes, begin, begin + block_size, top + lane * height, height, str(order), tokens)
        bottom = top + (max(lanes) + 1) * height
        axes.text(-1, (top + bottom) / 2, label, ha="right", va="center", family="monospace", fontsize=10)
        top = bottom + 0.24
    axes.set(xlim=(0, tokens), ylim=(top, 0), yticks=[], xticks=range(0, tokens + 1, block_size))
    axes.spines[["left", "right", "top"]].set_visible(False)
    save(figure, path)


def choose_lanes(begins: list, block_size: int, tokens: int) -> list:
    """The lane of each window, from 0: the first in which it overlaps none of the windows before it. The text is a
    circle."""
    lanes = []
    for number, begin in enumerate(begins):
        taken = {lanes[other] for other in range(number)
                 if min((begin - begins[other]) % tokens, (begins[other] - begin) % tokens) < block_size}
        lanes.append(min(set(range(number + 1)) - taken))
    return lanes


def draw_window(axes, begin: int, end: int, top: float, height: float, label: str, tokens: int):
    """One window as a box; the text is a circle, so a window that reaches beyond its end has two parts."""
    parts = [(begin, min(end, tokens))]
    if end > tokens:
        parts.append((0, end - tokens))
    for left, right in parts:
        axes.add_patch(Rectangle((left, top), right - left, height, facecolor=BLUE, alpha=0.25))
        axes.add_patch(Rectangle((left, top), right - left, height, fill=False, edgecolor=BLUE, clip_on=False))
    left, right = max(parts, key=lambda part: part[1] - part[0])
    axes.text((left + right) / 2, top + height / 2, label, ha="center", va="center", color=BLUE, fontsize=10)


def draw_batch(path: Path, data_dir: str):
    """A batch: inputs x, and targets y, which are x one token later."""
    cfg = Config(batch_size=4, block_size=16)
    small = start_small("fables", data_dir, cfg.block_size)
    data = small.data["train"]
    x, y = get_batch(data, window_starts(0, cfg, len(data)), cfg.block_size, small.model.vocab_size, "train", "cpu")
    seen = 6
    figure = new_figure(3.6)
    for axes, ids, name in zip(figure.subplots(2, 1), (x, y), "xy", strict=True):
        for row, column in np.ndindex(*ids.shape):
            is_context = name == "x" and row == 0 and column < seen
            is_target = name == "y" and row == 0 and column == seen - 1
            colour = BLUE if is_context else ORANGE if is_target else "white"
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="#999999", lw=0.6,
                                     clip_on=False))
            axes.text(column + 0.5, row + 0.5, visible(small.tokenizer.decode([ids[row, column].item()])),
                      ha="center", va="center", family="monospace", fontsize=13,
                      color="white" if colour != "white" else "black")
        axes.set(xlim=(0, ids.size(1)), ylim=(ids.size(0), 0), xticks=np.arange(ids.size(1)) + 0.5,
                 yticks=np.arange(ids.size(0)) + 0.5, xticklabels=range(ids.size(1)), yticklabels=range(ids.size(0)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, fontsize=16, labelpad=14, va="center", family="monospace")
    save(figure, path)


# -- two small models ------------------------------------------------------------------------------

def start_small(dataset: str, data_dir: str, block_size: int, **settings):
    return start(Config(dataset=dataset, data_dir=data_dir, block_size=block_size, **SMALL | settings))


def attention_maps(model, ids) -> list:
    """The attention weights (n_head, T, T) of each block for ids (1, T)."""
    maps = []

    def attend(q, k, v, cache):
        T = q.size(2)
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = q @ k.mT / q.size(-1) ** 0.5
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)     # (1, n_head, T, T)
        maps.append(weights[0])
        return weights @ v

    for block in model.blocks:
        block.attn.attend = attend
    with torch.no_grad():
        model(ids)
    for block in model.blocks:
        del block.attn.attend
    return maps


def draw_attention(path: Path, data_dir: str, steps: int):
    """What the heads of a trained model look at: in each block, the head that looks most at the token before
    and the one that looks farthest back."""
    trained = start_small("fables", data_dir, 64, max_iters=steps)
    for step in range(steps):
        update(trained, step)
    trained.model.eval()
    text = "The fox and the crow. The fox"
    ids = torch.from_numpy(trained.tokenizer.encode(text).astype(np.int64))[None]
    weights = torch.cat(attention_maps(trained.model, ids))             # (n_layer * n_head, T, T)
    T = ids.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    previous = (weights * (distance == 1)).sum((1, 2))
    farthest = (weights * distance.clamp(min=0)).sum((1, 2))
    farthest[previous.argmax()] = -1
    figure = new_figure(4.3)
    for axes, head in zip(figure.subplots(1, 2), (previous.argmax().item(), farthest.argmax().item()), strict=True):
        axes.imshow(weights[head], cmap="Blues", vmin=0, vmax=weights[head, 1:].max())
        labels = [visible(character) for character in text]
        axes.set_xticks(range(T), labels, family="monospace", fontsize=8)
        axes.set_yticks(range(T), labels, family="monospace", fontsize=8)
        axes.tick_params(length=0)
        layer, head = divmod(head, trained.cfg.n_head)
        axes.set_title(f"blocks[{layer}], head {head}", family="monospace", fontsize=11)
    save(figure, path)


def draw_overfitting(path: Path, data_dir: str, steps: int):
    """Train and val loss of a model on 20,479 characters, as in the tour's chapter 5."""
    short = start_small("short", data_dir, 64, max_iters=steps)
    every = max(1, steps // 12)
    evaluated, losses = [], []
    for step in range(steps + 1):
        if step % every == 0:
            evaluated.append(step)
            losses.append(estimate_loss(short))
        if step < steps:
            update(short, step)
    val = [loss["val"] for loss in losses]
    best = int(np.argmin(val))
    figure = new_figure(3.8)
    axes = figure.subplots()
    axes.plot(evaluated, [loss["train"] for loss in losses], ".-", color=BLUE)
    axes.plot(evaluated, val, ".-", color=ORANGE)
    axes.plot(evaluated[best], val[best], "*", color=RED, ms=14, zorder=3)
    axes.annotate(f"{val[best]:.2f}", (evaluated[best], val[best]), xytext=(0, -18), textcoords="offset points",
                  ha="center", color=RED)
    axes.annotate("train", (evaluated[-1], losses[-1]["train"]), xytext=(8, 0), textcoords="offset points", color=BLUE,
                  va="center")
    axes.annotate("val", (evaluated[-1], val[-1]), xytext=(8, 0), textcoords="offset points", color=ORANGE, va="center")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, 1.08 * steps))
    axes.grid(alpha=0.3)
    save(figure, path)


def make_short(data_dir: str):
    """The data set `short`: the first 20,479 characters of the fables, as long as the tutorial's story."""
    words = ["fables", "--name=short", "--limit=20479"]
    if data_dir:
        words.append(f"--data_dir={data_dir}")
    prepare.main(words)


# -- rates and probabilities -----------------------------------------------------------------------

def draw_rates(path: Path):
    """lr_factor over 300 steps, under four settings."""
    known_end = [[0, 300]]
    rates = [
        ("schedule=constant", Config(schedule="constant"), known_end, GREY, ":"),
        ("schedule=linear", Config(), known_end, BLUE, "-"),
        ("schedule=cosine, warmup_iters=30, min_lr=0.1*learning_rate",
         Config(schedule="cosine", warmup_iters=30, min_lr=0.1 * Config.learning_rate), known_end, ORANGE, "--"),
        ("breakpoints=0:200,100:300", Config(), [[0, 200], [100, 300]], GREEN, "-."),
    ]
    figure = new_figure(3.8)
    axes = figure.subplots()
    for label, cfg, breakpoints, colour, style in rates:
        axes.plot([lr_factor(step, cfg, breakpoints) for step in range(301)], style, color=colour, label=label)
    axes.set(xlabel="step", ylabel="lr_factor", ylim=(0, 1.6))
    axes.legend(prop=dict(family="monospace", size=9), loc="upper right")
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_temperatures(path: Path):
    """The probabilities of nine toy tokens at three temperatures, and how often `draw` takes each."""
    logits = torch.tensor([TOY_LOGITS])
    temperatures = [(0.1, GREEN), (1.0, BLUE), (5.0, ORANGE)]
    figure = new_figure(3.8)
    axes = figure.subplots()
    torch.manual_seed(0)
    for number, (temperature, colour) in enumerate(temperatures):
        p = torch.softmax(logits[0] / temperature, -1)
        drawn = draw(logits.expand(1000, -1), temperature).bincount(minlength=9) / 1000
        places = np.arange(9) + 0.28 * (number - 1)
        axes.bar(places, p, 0.26, color=colour, label=f"softmax(logits / {temperature:g})")
        axes.plot(places, drawn, "k_", ms=8, label="draw, 1000x" if number == 2 else None)
    axes.set(xlabel="logit", ylabel="p", xticks=range(9))
    axes.set_xticklabels([f"{number}\n{logit:.2f}" for number, logit in enumerate(TOY_LOGITS)])
    axes.legend(prop=dict(family="monospace", size=9))
    axes.grid(alpha=0.3, axis="y")
    save(figure, path)


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    folder = Path(options.out_dir) if options.out_dir else Path(__file__).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    make_short(options.data_dir)
    draw_windows(folder / "tour_windows.png", options.data_dir)
    draw_batch(folder / "tour_batch.png", options.data_dir)
    draw_rates(folder / "tour_rates.png")
    draw_temperatures(folder / "tour_temperatures.png")
    draw_overfitting(folder / "tour_overfitting.png", options.data_dir, options.steps)
    draw_attention(folder / "tour_attention.png", options.data_dir, max(1, options.steps // 2))
    return 0


if __name__ == "__main__":
    run(main)
