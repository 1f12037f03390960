"""Seconds of training until a loss: ours beside nanoGPT and the Hugging Face Trainer, on the same ids, in one run.

    python bench/time_to_loss.py --nanogpt=../nanoGPT                     # preset small: about 2 minutes a seed
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=full       # on a CPU nanoGPT's time is an estimate
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=fables     # another text, all for as long as ours
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=full --device=cuda --peers=nanogpt
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=web --dataset=NAME --tokens=5e7 --device=cuda

How it is measured (bench/runners.py holds the code):
- Ours is train.py, nanoGPT its own train.py, the Trainer transformers' with GPT2LMHeadModel of nanoGPT's size and
  hyper-parameters. Each run is a process of its own; within a seed they take turns.
- The loss is that of the full val split in whole windows of the preset's context, in float32, by the same code for all.
  Evaluations are not on the clock. Nor is what comes before the first step, and the compilation in it: these are in
  `s from launch` alone (not what nanoGPT compiles for its own first evaluation).
- Ours must have the target with its final weights. A peer has it where the line between its evaluations first crosses
  it, whatever follows.
- A peer that would take hours (`--estimate`; auto: preset full on a CPU) runs a few steps, and counts as the steps
  after which nanoGPT publishes the target, times its median step here; its row says so.
- Figures are medians over the seeds. Without a target of its own, a preset takes nanoGPT's best loss in this run.
- preset fables: nanoGPT's hyper-parameters get a schedule that fits the seconds which ours took (warm-up at most a
  tenth).
- preset web: 124M on a text of 10-50 MB in GPT-2's tokens; nanoGPT trains on --tokens with its default hyper-parameters
  (its schedule fitted, warm-up a tenth), ours on --share of them.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import OUT, ROOT, child, machine, middle, nanogpt_checkout, need, publish, table

from inkling import distributed as distributed_module
from inkling.cli import fail, parse, run
from inkling.format import short
from prepare import ensure_set

# nanoGPT's config/train_shakespeare_char.py, with the defaults of its train.py for what that leaves open.
NANOGPT = dict(gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384,
               dropout=0.2, bias=False, learning_rate=1e-3, weight_decay=0.1, beta2=0.99, max_iters=5000,
               lr_decay_iters=5000, min_lr=1e-4, warmup_iters=100)
# The command in its README for CPUs.
README = NANOGPT | dict(block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000,
                        lr_decay_iters=2000, dropout=0.0)
# The defaults of its train.py.
WEB = NANOGPT | dict(gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768,
                     dropout=0.0, learning_rate=6e-4, beta2=0.95, min_lr=6e-5)
TOY = NANOGPT | dict(block_size=16, batch_size=2, n_layer=1, n_head=1, n_embd=8, max_iters=6, lr_decay_iters=6)


@dataclass
class Preset:
    dataset: str
    ours: list                  # for train.py
    peer: dict                  # nanoGPT's settings
    target: float = 0.0         # nats
    published: int = 0          # steps after which nanoGPT publishes the target
    equal_time: bool = False    # the peers train for as long as ours


PRESETS = {"small": Preset("shakespeare_char", ["config/shakespeare_char_small.py"], README, 1.88),
           "full": Preset("shakespeare_char", ["config/shakespeare_char.py"], NANOGPT, 1.4697, 1750),
           "fables": Preset("fables", ["config/shakespeare_char_small.py"], README, equal_time=True),
           "web": Preset("", ["config/gpt2_124m.py"], WEB),
           "toy": Preset("fables", ["--n_layer=1", "--n_embd=16", "--n_head=1", "--block_size=16", "--batch_size=2",
                                    "--max_iters=6", "--compile=False", "--ngrams=0"], TOY, 3.0, 4)}


@dataclass
class Options:
    # -- what to measure
    preset: Literal["small", "full", "fables", "web", "toy"] = "small"  # models, text, target; toy: a check
    peers: str = "nanogpt,trainer"      # of nanogpt, trainer, separated by commas; empty: ours alone
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    seeds: str = "1337,1,2"             # one run of each for every seed
    target: float = 0.0                 # loss in nats; 0: the preset's, else nanoGPT's best in this run
    estimate: Literal["auto", True, False] = "auto"  # peers run estimate_steps steps; see above
    estimate_steps: int = 12            # steps of such a run
    equal_time: Literal["auto", True, False] = "auto"  # peers train for as long as ours; auto: as the preset says
    points: int = 12                    # evaluations of a run
    ours: str = ""                      # more flags for train.py, such as "--max_iters=200 --dropout=0.1"
    peer: str = ""                      # more settings for the peers, such as "--max_iters=1000 --dropout=0.1"
    tokens: float = 5e7                 # preset web: nanoGPT's training tokens
    share: float = 0.6                  # preset web: ours, as a share of them
    # -- data and machine
    dataset: str = ""                   # prepared set; empty: the preset's
    data_dir: str = ""                  # folder of the data sets; empty: data/
    device: str = "cpu"                 # cpu | cuda; on cuda all compile and nanoGPT and the Trainer use bfloat16
    fp32: bool = False                  # ours in float32 (on a CPU the peers always are)
    append: bool = False                # add the table to bench/RESULTS.md


def set_folder(options: Options, preset: Preset) -> Path:
    """The data set's folder; a named set is prepared on first use."""
    name = options.dataset or preset.dataset
    if not name:
        fail("preset=web needs --dataset=NAME: a set in GPT-2's tokens (python prepare.py FILE --tokenizer=gpt2)")
    return ensure_set(name, options.data_dir, distributed_module.Ranks()).resolve()


def overridden(settings: dict, flags: str) -> dict:
    """nanoGPT's settings with --key=value flags, read by the type of what they replace."""
    settings = dict(settings)
    for word in shlex.split(flags):
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals or name not in settings:
            fail(f"peer={flags}: {word} is none of --{', --'.join(settings)}")
        kind = type(settings[name])
        try:
            settings[name] = text.lower() == "true" if kind is bool else kind(float(text))
        except ValueError:
            fail(f"peer={flags}: {word} is not a number")
    return settings


def fitted(settings: dict, steps: int) -> dict:
    """The settings with a schedule of so many steps, of which at most a tenth warm up."""
    return settings | dict(max_iters=steps, lr_decay_iters=steps,
                           warmup_iters=min(settings["warmup_iters"], steps // 10))


def reached(result: dict, target: float, final: bool) -> tuple:
    """(seconds, steps) to the target; infinite if it is not reached. final: only the final weights count."""
    points = [point for point in result["curve"] if point[2] is not None]
    if final:
        points = points[-1:]
    for before, (step, seconds, loss) in zip([None, *points], points, strict=False):
        if loss <= target:
            if before is None:
                return seconds, step
            part = (before[2] - target) / (before[2] - loss)
            return before[1] + part * (seconds - before[1]), before[0] + part * (step - before[0])
    return math.inf, math.inf


def summary(name: str, results: list, target: float, base: float, published: int) -> tuple:
    """A row of the table, and the median seconds to the target. base: those of the first row, or 0 for that row itself;
    published: steps, if the results are estimates."""
    own, tokens = name == "ours", results[0]["tokens_per_step"]
    if published:
        found = [(published * one["step_seconds"], published) for one in results]
    else:
        found = [reached(one, target, own) for one in results]
    seconds, steps = (middle([pair[number] for pair in found]) for number in (0, 1))
    base = base or seconds
    launch = middle([pair[0] + one["startup"] for pair, one in zip(found, results, strict=True)])
    hits = sum(math.isfinite(pair[0]) for pair in found)
    losses = [[loss for _, _, loss in one["curve"] if loss is not None] for one in results]

    def figure(value, text="{:,.1f}"):
        return text.format(value) if math.isfinite(value) else "-"

    def loss_of(choose):
        return f"{middle([choose(some) for some in losses]):.4f}" if not published else "-"

    row = [name + (" (estimate)" if published else ""), f"{short(results[0]['parameters'])}", f"{hits} of {len(found)}",
           figure(seconds), figure(launch), figure(base / seconds if math.isfinite(seconds) else math.inf, "{:.2f}x"),
           figure(steps, "{:,.0f}"), short(steps * tokens) if math.isfinite(steps) else "-",
           f"{1000 * middle([one['mean_seconds'] for one in results]):,.1f}",
           f"{middle([one['curve'][-1][1] for one in results]):,.1f}" if not published else "-",
           loss_of(lambda some: some[-1]), loss_of(min)]
    return row, seconds


def draw(runs: dict, target: float, published: int, title: str, path: Path) -> str:
    """Loss against seconds and against tokens as a PNG; returns a line that says where. A run without losses is an
    estimate, a star where `published` steps bring it to the target."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(no picture: matplotlib is not installed)"
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, results) in enumerate(runs.items()):
        for seed, one in enumerate(results):
            curve = [point for point in one["curve"] if point[0] and point[2] is not None]  # a log scale has no step 0
            curve, mark, label = (curve, ".-", name) if curve else (
                [(published, published * one["step_seconds"], target)], "*", f"{name} (estimate)")
            for axes, xs in ((left, [seconds for _, seconds, _ in curve]),
                             (right, [step * one["tokens_per_step"] for step, _, _ in curve])):
                axes.plot(xs, [loss for _, _, loss in curve], mark, color=f"C{number}", lw=1,
                          label=None if seed else label)
    for axes, label in ((left, "seconds of training"), (right, "tokens")):
        axes.axhline(target, color="0.5", ls="--", lw=1)
        axes.set(xlabel=label, xscale="log", title=title)
        axes.grid(alpha=0.3)
    left.set_ylabel("full val loss (nats per token)")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"Picture: bench/out/{path.name}"


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    preset, cuda = PRESETS[options.preset], options.device.startswith("cuda")
    peers = [name for name in options.peers.split(",") if name]
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        fail(f"seeds={options.seeds} are not whole numbers separated by commas")
    if unknown := set(peers) - {"nanogpt", "trainer"}:
        fail(f"peers={options.peers}: there is no {', '.join(sorted(unknown))}, only nanogpt and trainer")
    checkout = nanogpt_checkout(options.nanogpt) if "nanogpt" in peers else ""
    if "trainer" in peers:
        need("transformers", "accelerate")
    target = options.target or preset.target
    if not target and "nanogpt" not in peers:
        fail(f"preset={options.preset} takes nanoGPT's best loss as its target: give one with --target, or nanogpt in "
             "--peers")
    folder, peer = set_folder(options, preset), overridden(preset.peer, options.peer)
    equal_time = preset.equal_time if options.equal_time == "auto" else options.equal_time
    estimate = (options.preset == "full" and not cuda) if options.estimate == "auto" else options.estimate
    if estimate and not preset.published:
        fail(f"preset={options.preset} has no published number of steps to estimate from: leave --estimate out")

    words = [str(ROOT / word) if word.endswith(".py") else word for word in preset.ours]
    words = [*words, f"--device={options.device}", *(["--dtype=float32"] if options.fp32 else [])]
    if options.preset == "web":
        step = math.prod(peer[name] for name in ("gradient_accumulation_steps", "batch_size", "block_size"))
        peer = fitted(peer, max(1, round(options.tokens / step)))
    if cuda:
        words.append("--compile=True")
    words += shlex.split(options.ours)
    tokens = options.share * options.tokens if options.preset == "web" else 0
    shared = dict(data=str(folder), block_size=peer["block_size"], points=options.points)
    theirs = shared | dict(device=options.device, compile=cuda, checkout=checkout)

    runs = {"ours": [], **{name: [] for name in peers}}
    for seed in seeds:
        print(f"seed {seed}: ours", flush=True)
        runs["ours"].append(child("ours", words=[*words, f"--seed={seed}"], tokens=tokens, evaluate=True, **shared))
        for name in peers:
            settings = fitted(peer, options.estimate_steps) if estimate else peer
            if equal_time and not estimate:
                probe = child(name, settings=fitted(peer, options.estimate_steps), seed=seed, evaluate=False, **theirs)
                time = runs["ours"][-1]["curve"][-1][1]
                settings = fitted(peer, max(2, round(time / probe["step_seconds"])))
            print(f"seed {seed}: {name}, {settings['max_iters']:,} steps", flush=True)
            runs[name].append(child(name, settings=settings, seed=seed, evaluate=not estimate, **theirs))

    if not target:
        target = middle([min(loss for _, _, loss in one["curve"]) for one in runs["nanogpt"]])
    rows, base = [], 0.0
    for name in [*peers, "ours"]:                       # nanoGPT first: it is what the others are compared with
        row, seconds = summary(name, runs[name], target, base, preset.published if estimate and name != "ours" else 0)
        base = base or seconds
        rows.append(row)
    head = ["", "parameters", f"reached {target:.4f}", "s to it", "s from launch", "times as fast", "steps", "tokens",
            "ms a step", "s in all", "final loss", "best loss"]
    notes = [f"Full val split of {folder.name} at context {peer['block_size']}, float32; medians of seeds "
             f"{options.seeds}. Ours: {runs['ours'][0]['dtype']}, compile {runs['ours'][0]['compile']}, "
             f"`{' '.join(word.replace(str(ROOT) + '/', '') for word in words)}`."]
    if estimate:
        notes.append(f"Estimates: {preset.published:,} published steps x the median of {options.estimate_steps} steps.")
    if equal_time and not estimate:
        notes.append("Peers: a schedule of as many steps as fit into the seconds of ours.")
    figures = dict(target=target, estimate=bool(estimate), runs=runs, rows=rows, head=head)
    picture = draw(runs, target, preset.published, options.preset, OUT / f"time_to_loss_{options.preset}.png")
    publish(f"Time to loss: {options.preset}", "\n\n".join([table(head, rows), *notes, picture]),
            machine(options.device, ("transformers",) if "trainer" in peers else ()), options.append, figures,
            f"time_to_loss_{options.preset}")
    return 0


if __name__ == "__main__":
    run(main)
