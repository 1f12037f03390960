"""All targets on one NVIDIA card, in parts of at most 10 minutes each, without a network.

    python bench/gpu.py --nanogpt=nanoGPT --part=time_to_loss --data_dir=data
    python bench/gpu.py --nanogpt=nanoGPT --part=throughput,loop
    python bench/gpu.py --nanogpt=nanoGPT --part=tokens_to_loss --data_dir=data --dataset=web
    python bench/gpu.py --part=large
    python bench/gpu.py --part=generate
    python bench/gpu.py --nanogpt=nanoGPT --toy         # every part in toy size on a CPU: a check of this script

| part | what runs | targets |
|---|---|---|
| time_to_loss | time_to_loss.py --preset=full, both whole, compiled | 1.4697 from launch in 1/4 of nanoGPT's time |
| throughput | throughput.py: 124M, block 1024, bfloat16, compiled, ours and nanoGPT | 50% MFU, 1.25x nanoGPT |
| large | the same, ours alone, 350M and 1.5B | 55% MFU |
| tokens_to_loss | time_to_loss.py --preset=web: 124M on --dataset | nanoGPT's loss with 60% of its tokens |
| loop | 20 steps of 124M between two log steps | no synchronization, no compilation |
| generate | generate.py: GPT-2 124M and XL, bfloat16 | 1,500 tokens/s; 50% of the bandwidth bound |

To be carried to a machine without a network: the repository, a nanoGPT checkout, and a folder of
data sets (--data_dir) with shakespeare_char and, for tokens_to_loss, a set of 10-50 MB in GPT-2's
tokens:

    python prepare.py shakespeare_char
    python prepare.py TEXT --name=web --tokenizer=gpt2

MFU is against the card's peak for dense bfloat16 (inkling/report.py). What a part printed stays in
bench/out/gpu/, its figures in bench/out/*.json.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common import (
    OUT,
    ROOT,
    describe_machine,
    flags,
    markdown_table,
    nanogpt_checkout,
    publish,
    read_choices,
    read_options,
    run_task,
    write_random_set,
)
from time_to_loss import reached

from inkling.cli import NonNegativeInt, PositiveFloat, UserError, run


@dataclass
class Options:
    # -- what to run
    part: str = ""                      # parts, separated by commas; empty: all
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    data_dir: str = ""                  # folder of the data sets; empty: data/
    dataset: str = "web"                # of tokens_to_loss
    tokens: PositiveFloat = 5e7         # nanoGPT's, in tokens_to_loss
    batch_size: NonNegativeInt = 0      # sequences a step in throughput and large; 0: the sizes' own
    minutes: PositiveFloat = 10.0       # limit of each part
    toy: bool = False                   # toy sizes on a CPU
    append: bool = False                # add the table to bench/RESULTS.md


class Target(NamedTuple):
    """A row of the table."""

    work: str
    target: str
    measured: str
    reached: bool | None                # None: cannot be measured here


def run_script(name: str, options: Options, *words: str) -> str:
    """What a script of bench/ printed. Raises UserError if it fails or takes more than
    options.minutes."""
    print(f"    python bench/{name} {' '.join(words)}", flush=True)
    log = OUT / "gpu" / f"{name}.{time.strftime('%H%M%S')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "bench" / name), *words]
    with open(log, "w", encoding="utf-8") as file:
        try:
            process = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                     timeout=60 * options.minutes, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"{name} took more than minutes={options.minutes:g}; what it printed is in {log}", 1)
    printed = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        last_line = printed.strip().rpartition("\n")[2][:300]
        raise UserError(f"{name} ended with code {process.returncode}: {last_line}", 1)
    print(printed, flush=True)
    return printed


def read_figures(name: str) -> dict:
    return json.loads((OUT / f"{name}.json").read_text(encoding="utf-8"))


# -- the parts: each returns its targets -----------------------------------------------------------

def time_to_loss(options: Options) -> list:
    preset = "full"
    words = flags(preset="full", peers="nanogpt", seeds=1337, points=20, device="cuda")
    if options.toy:
        preset = "toy"
        words = flags(preset="toy", peers="nanogpt", seeds=1, points=2, estimate=False)
    words += flags(nanogpt=options.nanogpt, data_dir=options.data_dir)
    run_script("time_to_loss.py", options, *words)
    figures = read_figures(f"time_to_loss_{preset}")
    nanogpt, = figures["runs"]["nanogpt"]
    ours, = figures["runs"]["ours"]
    nanogpt_seconds = reached(nanogpt, figures["target"], final=False)[0] + nanogpt["startup"]
    our_seconds = reached(ours, figures["target"], final=True)[0] + ours["startup"]
    if not math.isfinite(our_seconds):
        measured = f"not reached: {ours['curve'][-1][2]:.4f}"
    elif not math.isfinite(nanogpt_seconds):
        best = min(loss for _, _, loss in nanogpt["curve"])
        measured = f"{our_seconds:.1f} s; nanoGPT never (best {best:.4f})"
    else:
        measured = f"{our_seconds:.1f} s of {nanogpt_seconds:.1f} s: 1/{nanogpt_seconds / our_seconds:.1f}"
    is_reached = math.isfinite(our_seconds) and our_seconds <= nanogpt_seconds / 4
    return [Target(f"full val {figures['target']:.4f}, from launch, against nanoGPT", "1/4 of its time", measured,
                   is_reached)]


def measure_rates(options: Options, sizes: str, ways: str, **more) -> dict:
    """{(size, way): line} of bench/throughput.py."""
    words = flags(sizes=sizes, dtypes="bfloat16", steps=25, device="cuda")
    if options.toy:
        words = flags(sizes="toy", dtypes="float32", steps=3)
    words += flags(ways=ways, dropouts=0.0, nanogpt=options.nanogpt, batch_size=options.batch_size, **more)
    run_script("throughput.py", options, *words)
    return {(line["size"], line["way"]): line for line in read_figures("throughput")["lines"]}


def throughput(options: Options) -> list:
    size = "toy" if options.toy else "124M"
    way = "eager" if options.toy else "compiled"
    lines = measure_rates(options, size, f"{way},nanogpt", rounds=1 if options.toy else 2)
    line = lines[size, way]
    rate = line["tokens"] / line["step"]
    return [
        Target("124M, block 1024, MFU", "50%", f"{100 * line['share']:.1f}% ({rate:,.0f} tokens/s)",
               line["share"] >= 0.5),
        Target("124M, tokens/s against nanoGPT", "1.25x", f"{line['times']:.2f}x", line["times"] >= 1.25),
    ]


def large(options: Options) -> list:
    way = "eager" if options.toy else "compiled"
    lines = measure_rates(options, "350M,1.5B", way, rounds=1, split=0)
    targets = []
    for (size, _), line in lines.items():
        measured = f"{100 * line['share']:.1f}% ({line['peak'] / 1e9:.0f} GB)"
        targets.append(Target(f"{size}, MFU", "55%", measured, line["share"] >= 0.55))
    return targets


def tokens_to_loss(options: Options) -> list:
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        words = flags(data_dir=options.data_dir, dataset=options.dataset, tokens=options.tokens, device="cuda")
        if options.toy:
            write_random_set(Path(folder) / "toy", 65, 4000)
            sizes = " ".join(flags(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2,
                                   gradient_accumulation_steps=1))
            words = flags(data_dir=folder, dataset="toy", tokens=640, peer=sizes, ours=f"{sizes} --compile=False")
        run_script("time_to_loss.py", options, *words, *flags(preset="web", peers="nanogpt", seeds=1337, points=5,
                                                              share=0.6, nanogpt=options.nanogpt))
    figures = read_figures("time_to_loss_web")
    nanogpt, = figures["runs"]["nanogpt"]
    ours, = figures["runs"]["ours"]
    step, _, loss = ours["curve"][-1]
    nanogpt_step = nanogpt["curve"][-1][0]
    share = step * ours["tokens_per_step"] / (nanogpt_step * nanogpt["tokens_per_step"])
    measured = f"{loss:.4f} of {figures['target']:.4f} with {100 * share:.0f}%"
    return [Target("124M, nanoGPT's loss from web text", "60% of its tokens", measured, loss <= figures["target"])]


def loop(options: Options) -> list:
    words = [str(ROOT / "config" / "gpt2_124m.py"), *flags(device="cuda", compile=True, dtype="bfloat16",
                                                           batch_size=16, gradient_accumulation_steps=1)]
    vocab_size = 50257
    if options.toy:
        words = flags(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, device="cpu", ngrams=0,
                      compile=False)
        vocab_size = 65
    words += flags(max_iters=30, eval_interval=30, eval_iters=1, sample_tokens=0, log_interval=10**6)
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        data = Path(folder) / "set"
        write_random_set(data, vocab_size, 1_000_000)
        figures = run_task("loop", data=str(data), words=words, first=5, last=25)
    count = sum(figures["places"].values())
    measured = f"{count}"
    if figures["places"]:
        places = ", ".join(f"{place} x{times}" for place, times in figures["places"].items())
        measured = f"{count} ({places})"
    is_reached = count == 0
    if not figures["counted"]:
        measured = "not counted: no card"
        is_reached = None
    return [
        Target("20 steps between log steps: synchronizations of host and device", "0", measured, is_reached),
        Target("the same: graphs compiled after the first steps", "0",
               f"{figures['recompilations']} (of {figures['graphs']})", figures["recompilations"] == 0),
    ]


def generate(options: Options) -> list:
    words = flags(device="cuda", dtype="bfloat16", only="gpt2,xl", transformers=False)
    if options.toy:
        words = flags(only="toy", runs=1, compile=False, transformers=False)
    printed = run_script("generate.py", options, *words)
    targets = []
    title = ""
    for line in printed.splitlines():
        if re.match(r"GPT-2 (of 124M|XL)", line):
            title = line.split(",")[0]
        row = re.match(r"\| (ours, compiled) \| ([\d,]+) \| (\d+)%", line)
        if row is None:
            continue
        rate = float(row[2].replace(",", ""))
        share = int(row[3])
        target = "1,500 tokens/s"
        is_reached = rate >= 1500
        if "XL" in title:
            target = "50% of the bandwidth bound"
            is_reached = share >= 50
        targets.append(Target(f"{title}, batch 1, {row[1]}", target, f"{rate:,.0f} tokens/s, {share}%", is_reached))
    if not targets and not options.toy:
        raise UserError("bench/generate.py printed no row `ours, compiled`: see bench/out/gpu/", 1)
    return targets


PARTS = {
    "time_to_loss": time_to_loss,
    "throughput": throughput,
    "large": large,
    "tokens_to_loss": tokens_to_loss,
    "loop": loop,
    "generate": generate,
}


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    parts = read_choices("part", options.part, PARTS) or list(PARTS)
    if set(parts) & {"time_to_loss", "throughput", "tokens_to_loss"}:
        options = replace(options, nanogpt=nanogpt_checkout(options.nanogpt))
    machine = describe_machine("cpu" if options.toy else "cuda")
    rows = []
    for part in parts:
        began = time.perf_counter()
        targets = PARTS[part](options)
        print(f"{part} took {time.perf_counter() - began:.0f} s", flush=True)
        for target in targets:
            verdict = {True: "yes", False: "NO", None: "-"}[target.reached]
            rows.append([part, target.work, target.target, target.measured, verdict])
    title = "Targets on one card"
    if options.toy:
        title += " (toy, on a CPU)"
    table = markdown_table(["part", "work", "target", "measured", "reached"], rows)
    publish(title, table, machine, options.append)
    return 0


if __name__ == "__main__":
    run(main)
