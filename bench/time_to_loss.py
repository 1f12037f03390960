"""Seconds of training until a loss: ours beside nanoGPT and the Hugging Face Trainer, on the same ids, in one run.

    python bench/time_to_loss.py --nanogpt=../nanoGPT                     # preset small: about 2 minutes a seed
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=full       # on a CPU nanoGPT's time is an estimate
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=fables     # another text, all for as long as ours
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=full --device=cuda --peers=nanogpt
    python bench/time_to_loss.py --nanogpt=../nanoGPT --preset=web --dataset=NAME --tokens=5e7 --device=cuda

How it is measured (bench/ours.py and bench/peers.py hold the code):
- Ours are train.py's updates, nanoGPT its own train.py, the Trainer transformers' with
  GPT2LMHeadModel of nanoGPT's size and hyper-parameters. Each run is a process of its own; within a
  seed they take turns.
- The loss is that of the full val split in whole windows of the preset's context, in float32, by
  the same code for all. Evaluations are not on the clock. Nor is what comes before the first step,
  and the compilation in it: these are in `s from launch` alone.
- Ours must have the target with its final weights. A peer has it where the line between its
  evaluations first crosses it, whatever follows.
- A peer that would take hours (`--estimate`; auto: preset full on a CPU) runs a few steps, and
  counts as the steps after which nanoGPT publishes the target, times its median step here; its row
  says so.
- Figures are medians over the seeds. Without a target of its own, a preset takes nanoGPT's best
  loss in this run.
- preset fables: nanoGPT's hyper-parameters get a schedule that fits the seconds which ours took
  (warm-up at most a tenth).
- preset web: 124M on a text of 10-50 MB in GPT-2's tokens; nanoGPT trains on --tokens with its
  default hyper-parameters (its schedule fitted, warm-up a tenth), ours on --share of them.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common import (
    NANOGPT,
    OUT,
    ROOT,
    describe_machine,
    flags,
    markdown_table,
    median_of,
    nanogpt_checkout,
    need_packages,
    publish,
    read_choices,
    read_numbers,
    read_options,
    run_task,
    save_figures,
)

from inkling.cli import NonNegativeFloat, PositiveFloat, PositiveInt, UserError, above, run
from inkling.distributed import Ranks
from inkling.format import short
from prepare import ensure_set

# The command in nanoGPT's README for CPUs.
README = NANOGPT | {
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
}
# The defaults of its train.py.
WEB = NANOGPT | {
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "learning_rate": 6e-4,
    "beta2": 0.95,
    "min_lr": 6e-5,
}
TOY = NANOGPT | {
    "block_size": 16,
    "batch_size": 2,
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 8,
    "max_iters": 6,
    "lr_decay_iters": 6,
}


@dataclass
class Preset:
    dataset: str
    ours: list                  # words for train.py
    peer: dict                  # nanoGPT's settings
    target: float = 0.0         # nats
    published: int = 0          # steps after which nanoGPT publishes the target
    equal_time: bool = False    # the peers train for as long as ours


PRESETS = {
    "small": Preset("shakespeare_char", ["config/shakespeare_char_small.py"], README, 1.88),
    "full": Preset("shakespeare_char", ["config/shakespeare_char.py"], NANOGPT, 1.4697, published=1750),
    "fables": Preset("fables", ["config/shakespeare_char_small.py"], README, equal_time=True),
    "web": Preset("", ["config/gpt2_124m.py"], WEB),
    "toy": Preset("fables", flags(n_layer=1, n_embd=16, n_head=1, block_size=16, batch_size=2, max_iters=6,
                                  compile=False, ngrams=0), TOY, 3.0, published=4),
}


@dataclass
class Options:
    # -- what to measure
    preset: Literal["small", "full", "fables", "web", "toy"] = "small"  # models, text, target; toy: a check
    peers: str = "nanogpt,trainer"      # of nanogpt, trainer, separated by commas; empty: ours alone
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    seeds: str = "1337,1,2"             # one run of each for every seed
    target: NonNegativeFloat = 0.0      # loss in nats; 0: the preset's, else nanoGPT's best in this run
    estimate: Literal["auto", True, False] = "auto"  # peers run estimate_steps steps; see above
    estimate_steps: PositiveInt = 12    # steps of such a run
    equal_time: Literal["auto", True, False] = "auto"  # peers train for as long as ours; auto: as the preset says
    points: PositiveInt = 12            # evaluations of a run
    ours: str = ""                      # more flags for train.py, such as "--max_iters=200 --dropout=0.1"
    peer: str = ""                      # more settings for the peers, such as "--max_iters=1000 --dropout=0.1"
    tokens: Annotated[float, above(0)] = 5e7  # preset web: nanoGPT's training tokens
    share: PositiveFloat = 0.6          # preset web: ours, as a share of them
    # -- data and machine
    dataset: str = ""                   # prepared set; empty: the preset's
    data_dir: str = ""                  # folder of the data sets; empty: data/
    device: str = "cpu"                 # cpu | cuda; on cuda all compile and nanoGPT and the Trainer use bfloat16
    fp32: bool = False                  # ours in float32 (on a CPU the peers always are)
    append: bool = False                # add the table to bench/RESULTS.md

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


# -- what to run ---------------------------------------------------------------------------------

@dataclass
class Plan:
    """What the options come to."""

    peers: list
    seeds: list
    target: float               # 0: nanoGPT's best loss
    estimate: bool
    equal_time: bool
    published: int              # steps that an estimate counts; 0: none is one
    folder: Path                # of the data set
    ours: list                  # words for train.py
    our_tokens: float           # that ours trains on; 0: as the words say
    settings: dict              # nanoGPT's
    checkout: str


def make_plan(options: Options) -> Plan:
    """Raises UserError."""
    preset = PRESETS[options.preset]
    peers = read_choices("peers", options.peers, ["nanogpt", "trainer"])
    seeds = read_numbers("seeds", options.seeds, int)
    checkout = nanogpt_checkout(options.nanogpt) if "nanogpt" in peers else ""
    if "trainer" in peers:
        need_packages("transformers", "accelerate")
    target = options.target or preset.target
    if not target and "nanogpt" not in peers:
        raise UserError(f"preset={options.preset} takes nanoGPT's best loss as its target: give one with --target, or "
                        "nanogpt in --peers")
    estimate = options.preset == "full" and not options.on_cuda
    if options.estimate != "auto":
        estimate = options.estimate
    if estimate and not preset.published:
        raise UserError(f"preset={options.preset} has no published number of steps to estimate from: leave "
                        "--estimate out")
    equal_time = preset.equal_time
    if options.equal_time != "auto":
        equal_time = options.equal_time
    settings = override(preset.peer, options.peer)
    our_tokens = 0.0
    if options.preset == "web":
        step = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
        settings = fit_schedule(settings, max(1, round(options.tokens / step)))
        our_tokens = options.share * options.tokens
    return Plan(
        peers=peers,
        seeds=seeds,
        target=target,
        estimate=estimate,
        equal_time=equal_time and not estimate,
        published=preset.published if estimate else 0,
        folder=find_set(options, preset),
        ours=our_words(options, preset),
        our_tokens=our_tokens,
        settings=settings,
        checkout=checkout,
    )


def find_set(options: Options, preset: Preset) -> Path:
    """The data set's folder; a built-in set is prepared on first use."""
    name = options.dataset or preset.dataset
    if not name:
        raise UserError("preset=web needs --dataset=NAME: a set in GPT-2's tokens (python prepare.py FILE "
                        "--tokenizer=gpt2)")
    return ensure_set(name, options.data_dir, Ranks()).resolve()


def our_words(options: Options, preset: Preset) -> list:
    words = []
    for word in preset.ours:
        words.append(str(ROOT / word) if word.endswith(".py") else word)
    words += flags(device=options.device)
    if options.fp32:
        words += flags(dtype="float32")
    if options.on_cuda:
        words += flags(compile=True)
    return words + shlex.split(options.ours)


def override(settings: dict, words: str) -> dict:
    """nanoGPT's settings with --key=value flags, read by the type of what they replace."""
    settings = dict(settings)
    for word in shlex.split(words):
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals or name not in settings:
            raise UserError(f"peer={words}: {word} is none of --{', --'.join(settings)}")
        kind = type(settings[name])
        try:
            settings[name] = text.lower() == "true" if kind is bool else kind(float(text))
        except ValueError:
            raise UserError(f"peer={words}: {word} is not a number")
    return settings


def fit_schedule(settings: dict, steps: int) -> dict:
    """The settings with a schedule of `steps` steps, of which at most a tenth warm up."""
    return settings | {
        "max_iters": steps,
        "lr_decay_iters": steps,
        "warmup_iters": min(settings["warmup_iters"], steps // 10),
    }


# -- running it ----------------------------------------------------------------------------------

def run_all(plan: Plan, options: Options) -> dict:
    """The results of every run, {"ours": [...], peer: [...]}; within a seed they take turns."""
    spec = {"data": str(plan.folder), "block_size": plan.settings["block_size"], "points": options.points}
    results = {"ours": []}
    for peer in plan.peers:
        results[peer] = []
    for seed in plan.seeds:
        print(f"seed {seed}: ours", flush=True)
        words = [*plan.ours, f"--seed={seed}"]
        ours = run_task("ours", words=words, tokens=plan.our_tokens, evaluate=True, **spec)
        results["ours"].append(ours)
        peer_spec = spec | {"device": options.device, "compile": options.on_cuda, "checkout": plan.checkout,
                            "seed": seed}
        for peer in plan.peers:
            settings = plan.settings
            if plan.estimate:
                settings = fit_schedule(settings, options.estimate_steps)
            elif plan.equal_time:
                trial = run_task(peer, settings=fit_schedule(settings, options.estimate_steps), evaluate=False,
                                 **peer_spec)
                seconds = ours["curve"][-1][1]
                settings = fit_schedule(settings, max(2, round(seconds / trial["step_seconds"])))
            print(f"seed {seed}: {peer}, {settings['max_iters']:,} steps", flush=True)
            results[peer].append(run_task(peer, settings=settings, evaluate=not plan.estimate, **peer_spec))
    return results


# -- the table -----------------------------------------------------------------------------------

def reached(result: dict, target: float, final: bool) -> tuple:
    """(seconds, steps) to the target; infinite if it is not reached. final: only the final weights
    count."""
    points = [point for point in result["curve"] if point[2] is not None]
    if final:
        points = points[-1:]
    before = None
    for point in points:
        step, seconds, loss = point
        if loss <= target:
            if before is None:
                return seconds, step
            step_before, seconds_before, loss_before = before
            fraction = (loss_before - target) / (loss_before - loss)
            return (seconds_before + fraction * (seconds - seconds_before),
                    step_before + fraction * (step - step_before))
        before = point
    return math.inf, math.inf


def time_to_target(name: str, result: dict, plan: Plan, target: float) -> tuple:
    """(seconds, steps) of a run to the target, or their estimate."""
    if plan.estimate and name != "ours":
        return plan.published * result["step_seconds"], plan.published
    return reached(result, target, final=name == "ours")


def summarize(name: str, results: list, plan: Plan, target: float) -> dict:
    """The figures of a row: medians over the seeds."""
    times = [time_to_target(name, result, plan, target) for result in results]
    from_launch = []
    for (seconds, _), result in zip(times, results, strict=True):
        from_launch.append(seconds + result["startup"])
    figures = {
        "parameters": results[0]["parameters"],
        "reached": sum(math.isfinite(seconds) for seconds, _ in times),
        "seconds": median_of([seconds for seconds, _ in times]),
        "from_launch": median_of(from_launch),
        "steps": median_of([steps for _, steps in times]),
        "tokens_per_step": results[0]["tokens_per_step"],
        "step_seconds": median_of([result["mean_seconds"] for result in results]),
    }
    if not plan.estimate or name == "ours":
        losses = [[loss for _, _, loss in result["curve"] if loss is not None] for result in results]
        figures["all_seconds"] = median_of([result["curve"][-1][1] for result in results])
        figures["final_loss"] = median_of([run_losses[-1] for run_losses in losses])
        figures["best_loss"] = median_of([min(run_losses) for run_losses in losses])
    return figures


def text_of(value: float | None, form: str) -> str:
    """A figure in a cell; - for what there is none of, and for a target that was not reached."""
    if value is None or not math.isfinite(value):
        return "-"
    return form.format(value)


def table_row(name: str, figures: dict, plan: Plan, base_seconds: float) -> list:
    """base_seconds: to the target, of the first row."""
    seconds = figures["seconds"]
    steps = figures["steps"]
    return [
        name + (" (estimate)" if plan.estimate and name != "ours" else ""),
        short(figures["parameters"]),
        f"{figures['reached']} of {len(plan.seeds)}",
        text_of(seconds, "{:,.1f}"),
        text_of(figures["from_launch"], "{:,.1f}"),
        text_of(base_seconds / seconds if math.isfinite(seconds) else None, "{:.2f}x"),
        text_of(steps, "{:,.0f}"),
        short(steps * figures["tokens_per_step"]) if math.isfinite(steps) else "-",
        f"{1000 * figures['step_seconds']:,.1f}",
        text_of(figures.get("all_seconds"), "{:,.1f}"),
        text_of(figures.get("final_loss"), "{:.4f}"),
        text_of(figures.get("best_loss"), "{:.4f}"),
    ]


def make_notes(results: dict, plan: Plan, options: Options) -> list:
    words = " ".join(plan.ours).replace(f"{ROOT}/", "")
    ours = results["ours"][0]
    notes = [f"Full val split of {plan.folder.name} at context {plan.settings['block_size']}, float32; medians of "
             f"seeds {options.seeds}. Ours: {ours['dtype']}, compile {ours['compile']}, `{words}`."]
    if plan.estimate:
        notes.append(f"Estimates: {plan.published:,} published steps x the median of {options.estimate_steps} steps.")
    if plan.equal_time:
        notes.append("Peers: a schedule of as many steps as fit into the seconds of ours.")
    return notes


# -- the picture ---------------------------------------------------------------------------------

def draw_curves(results: dict, target: float, published: int, title: str, path: Path) -> str:
    """Draw loss against seconds and against tokens as a PNG; returns a line that says where it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(no picture: matplotlib is not installed)"
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(results.items()):
        for result in runs:
            label = name if result is runs[0] else None
            draw_run(left, right, result, target, published, label, f"C{number}")
    for axes, label in ((left, "seconds of training"), (right, "tokens")):
        axes.axhline(target, color="0.5", ls="--", lw=1)
        axes.set(xlabel=label, xscale="log", title=title)
        axes.grid(alpha=0.3)
    left.set_ylabel("full val loss (nats per token)")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return f"Picture: bench/out/{path.name}"


def draw_run(left, right, result: dict, target: float, published: int, label: str | None, color: str):
    """A run's curve. One without losses is an estimate: a star where `published` steps bring it to
    the target."""
    # A log scale has no step 0.
    curve = [point for point in result["curve"] if point[0] and point[2] is not None]
    mark = ".-"
    if not curve:
        curve = [(published, published * result["step_seconds"], target)]
        mark = "*"
        label = label and f"{label} (estimate)"
    losses = [loss for _, _, loss in curve]
    seconds = [seconds for _, seconds, _ in curve]
    tokens = [step * result["tokens_per_step"] for step, _, _ in curve]
    left.plot(seconds, losses, mark, color=color, lw=1, label=label)
    right.plot(tokens, losses, mark, color=color, lw=1, label=label)


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    plan = make_plan(options)
    results = run_all(plan, options)
    target = plan.target
    if not target:
        target = median_of([min(loss for _, _, loss in result["curve"]) for result in results["nanogpt"]])

    rows = []
    base_seconds = 0.0
    for name in [*plan.peers, "ours"]:          # nanoGPT first: the others are compared with it
        figures = summarize(name, results[name], plan, target)
        base_seconds = base_seconds or figures["seconds"]
        rows.append(table_row(name, figures, plan, base_seconds))
    head = ["", "parameters", f"reached {target:.4f}", "s to it", "s from launch", "times as fast",
            "steps", "tokens", "ms a step", "s in all", "final loss", "best loss"]
    name = f"time_to_loss_{options.preset}"
    save_figures(name, {"target": target, "estimate": plan.estimate, "runs": results, "rows": rows,
                        "head": head})
    picture = draw_curves(results, target, plan.published, options.preset, OUT / f"{name}.png")
    text = "\n\n".join([markdown_table(head, rows), *make_notes(results, plan, options), picture])
    packages = ("transformers",) if "trainer" in plan.peers else ()
    publish(f"Time to loss: {options.preset}", text, describe_machine(options.device, packages), options.append)
    return 0


if __name__ == "__main__":
    run(main)
