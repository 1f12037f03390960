"""All targets on one NVIDIA card, in parts of at most 10 minutes each, without a network; prints targets and figures.

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
| loop | 20 steps of 124M between two log steps | no synchronisation, no compilation |
| generate | generate.py: GPT-2 124M and XL, bfloat16 | 1,500 tokens/s; 50% of the bandwidth bound |

To be carried to a machine without a network: the repository, a nanoGPT checkout, and a folder of data sets (--data_dir)
with shakespeare_char and, for tokens_to_loss, a set of 10-50 MB in GPT-2's tokens:

    python prepare.py shakespeare_char
    python prepare.py TEXT --name=web --tokenizer=gpt2

MFU is against the card's peak for dense bfloat16 (support/report.py). What a part printed stays in bench/out/gpu/, its
figures in bench/out/*.json.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import OUT, ROOT, child, machine, nanogpt_checkout, publish, random_set, table
from time_to_loss import reached

from inkling.cli import fail, parse, run

PARTS = ("time_to_loss", "throughput", "large", "tokens_to_loss", "loop", "generate")


@dataclass
class Options:
    # -- what to run
    part: str = ""                      # parts, separated by commas; empty: all
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    data_dir: str = ""                  # folder of the data sets; empty: data/
    dataset: str = "web"                # of tokens_to_loss
    tokens: float = 5e7                 # nanoGPT's, in tokens_to_loss
    batch_size: int = 0                 # sequences a step in throughput and large; 0: the sizes' own
    minutes: float = 10.0               # limit of each part
    toy: bool = False                   # toy sizes on a CPU
    append: bool = False                # add the table to bench/RESULTS.md


def script(name: str, options: Options, *words: str) -> str:
    """What a script of bench/ printed; its failure, or more than the minutes allowed, is ours."""
    print(f"    python bench/{name} {' '.join(words)}", flush=True)
    log = OUT / "gpu" / f"{name}.{time.strftime('%H%M%S')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        try:
            process = subprocess.run([sys.executable, str(ROOT / "bench" / name), *words], cwd=ROOT, stdout=file,
                                     stderr=subprocess.STDOUT, timeout=60 * options.minutes, check=False)
        except subprocess.TimeoutExpired:
            fail(f"{name} took more than minutes={options.minutes:g}; what it printed is in {log.relative_to(ROOT)}", 1)
    printed = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        fail(f"{name} ended with {process.returncode}: {(printed.strip().splitlines() or [''])[-1][:300]}", 1)
    print(printed, flush=True)
    return printed


def figures(name: str) -> dict:
    return json.loads((OUT / f"{name}.json").read_text(encoding="utf-8"))


# Each part returns rows: work, target, measured, whether it holds.

def time_to_loss(options: Options) -> list:
    words = ["--preset=toy", "--peers=nanogpt", "--seeds=1", "--points=2", "--estimate=False"] if options.toy else \
        ["--preset=full", "--peers=nanogpt", "--seeds=1337", "--device=cuda", "--points=20"]
    script("time_to_loss.py", options, *words, f"--nanogpt={options.nanogpt}", f"--data_dir={options.data_dir}")
    found = figures(f"time_to_loss_{'toy' if options.toy else 'full'}")
    theirs, own = found["runs"]["nanogpt"][0], found["runs"]["ours"][0]
    times = [reached(one, found["target"], final)[0] + one["startup"] for one, final in ((theirs, False), (own, True))]
    if not math.isfinite(times[1]):
        said, holds = f"not reached: {own['curve'][-1][2]:.4f}", False
    elif not math.isfinite(times[0]):
        said, holds = f"{times[1]:.1f} s; nanoGPT never (best {min(point[2] for point in theirs['curve']):.4f})", True
    else:
        said, holds = f"{times[1]:.1f} s of {times[0]:.1f} s: 1/{times[0] / times[1]:.1f}", times[1] <= times[0] / 4
    return [[f"full val {found['target']:.4f}, from launch, against nanoGPT", "1/4 of its time", said, holds]]


def rates(options: Options, sizes: str, ways: str, *words: str) -> dict:
    """{(size, way): line} of bench/throughput.py."""
    where = ["--dtypes=float32", "--steps=3"] if options.toy else ["--dtypes=bfloat16", "--steps=25", "--device=cuda"]
    script("throughput.py", options, f"--sizes={'toy' if options.toy else sizes}", f"--ways={ways}", "--dropouts=0.0",
           f"--nanogpt={options.nanogpt}", f"--batch_size={options.batch_size}", *where, *words)
    return {(line["size"], line["way"]): line for line in figures("throughput")["lines"]}


def throughput(options: Options) -> list:
    own = "eager" if options.toy else "compiled"
    found = rates(options, "124M", f"{own},nanogpt", "--rounds=1" if options.toy else "--rounds=2")
    line = found["toy" if options.toy else "124M", own]
    said = f"{100 * line['share']:.1f}% ({line['tokens'] / line['step']:,.0f} tokens/s)"
    return [["124M, block 1024, MFU", "50%", said, line["share"] >= 0.5],
            ["124M, tokens/s against nanoGPT", "1.25x", f"{line['times']:.2f}x", line["times"] >= 1.25]]


def large(options: Options) -> list:
    found = rates(options, "350M,1.5B", "eager" if options.toy else "compiled", "--rounds=1", "--split=0")
    return [[f"{size}, MFU", "55%", f"{100 * line['share']:.1f}% ({line['peak'] / 1e9:.0f} GB)", line["share"] >= 0.55]
            for (size, _), line in found.items()]


def tokens_to_loss(options: Options) -> list:
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        words = [f"--data_dir={options.data_dir}", f"--dataset={options.dataset}", f"--tokens={options.tokens}",
                 "--device=cuda"]
        if options.toy:
            random_set(Path(folder) / "toy", 65, 4000)
            sizes = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=1"
            words = [f"--data_dir={folder}", "--dataset=toy", "--tokens=640", f"--peer={sizes}",
                     f"--ours={sizes} --compile=False"]
        script("time_to_loss.py", options, "--preset=web", "--peers=nanogpt", "--seeds=1337", "--points=5",
               "--share=0.6", f"--nanogpt={options.nanogpt}", *words)
    found = figures("time_to_loss_web")
    theirs, own = found["runs"]["nanogpt"][0], found["runs"]["ours"][0]
    share = own["curve"][-1][0] * own["tokens_per_step"] / (theirs["curve"][-1][0] * theirs["tokens_per_step"])
    return [["124M, nanoGPT's loss from web text", "60% of its tokens",
             f"{own['curve'][-1][2]:.4f} of {found['target']:.4f} with {100 * share:.0f}%",
             own["curve"][-1][2] <= found["target"]]]


def loop(options: Options) -> list:
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        random_set(Path(folder) / "set", 65 if options.toy else 50257, 1_000_000)
        words = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--device=cpu",
                 "--ngrams=0", "--compile=False"]
        if not options.toy:
            words = [str(ROOT / "config" / "gpt2_124m.py"), "--device=cuda", "--compile=True", "--dtype=bfloat16",
                     "--batch_size=16", "--gradient_accumulation_steps=1"]
        found = child("loop", data=str(Path(folder) / "set"), block_size=16, points=1, evaluate=False, first=5, last=25,
                      words=[*words, "--max_iters=30", f"--log_interval={10**6}"])
    count, places = sum(found["places"].values()), ", ".join(f"{at} x{n}" for at, n in found["places"].items())
    said = f"{count}{f' ({places})' if places else ''}" if found["counted"] else "not counted: no card"
    return [["20 steps between log steps: synchronisations of host and device", "0", said,
             count == 0 if found["counted"] else None],
            ["the same: graphs compiled after the first steps", "0",
             f"{found['recompilations']} (of {found['graphs']})", found["recompilations"] == 0]]


def generate(options: Options) -> list:
    words = ["--only=prompt", "--runs=1", "--compile=False", "--transformers=False"] if options.toy else \
        ["--device=cuda", "--dtype=bfloat16", "--only=gpt2,xl", "--transformers=False"]
    printed, found, title = script("generate.py", options, *words), [], ""
    for line in printed.splitlines():
        if re.match(r"GPT-2 (of 124M|XL)", line):
            title = line.split(",")[0]
        if hit := re.match(r"\| (ours, compiled) \| ([\d,]+) \| (\d+)%", line):
            rate, share = float(hit[2].replace(",", "")), int(hit[3])
            goal, holds = ("50% of the bandwidth bound", share >= 50) if "XL" in title else \
                ("1,500 tokens/s", rate >= 1500)
            found.append([f"{title}, batch 1, {hit[1]}", goal, f"{rate:,.0f} tokens/s, {share}%", holds])
    if not found and not options.toy:
        fail("bench/generate.py printed no row `ours, compiled`: see bench/out/gpu/", 1)
    return found


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    parts = [part for part in options.part.split(",") if part] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        fail(f"part={options.part}: there is no {', '.join(sorted(unknown))}, only {', '.join(PARTS)}")
    if set(parts) & {"time_to_loss", "throughput", "tokens_to_loss"}:
        options.nanogpt = nanogpt_checkout(options.nanogpt)
    device = "cpu" if options.toy else "cuda"
    about, rows = machine(device), []
    for part in parts:
        start = time.perf_counter()
        found = globals()[part](options)
        print(f"{part} took {time.perf_counter() - start:.0f} s", flush=True)
        rows += [[part, work, target, said, {True: "yes", False: "NO", None: "-"}[holds]]
                 for work, target, said, holds in found]
    publish("Targets on one card" + (" (toy, on a CPU)" if options.toy else ""),
            table(["part", "work", "target", "measured", "reached"], rows), about, options.append)
    return 0


if __name__ == "__main__":
    run(main)
