"""Tokens a second, the parts of a step, memory and start-up of ours and nanoGPT's, on the same architecture and batch.

    python bench/throughput.py --nanogpt=../nanoGPT                 # 0.8M, 3M, 10.65M and the recipe's model
    python bench/throughput.py --nanogpt=../nanoGPT --sizes=10.65M --dropouts=0.2 --dtypes=bfloat16,float32
    python bench/throughput.py --nanogpt=../nanoGPT --sizes=124M,350M,1.5B,recipe --dtypes=bfloat16 --device=cuda

How it is measured (bench/runners.py holds the code):
- Ours is train.py, eager and compiled, with the switches of config/shakespeare_char_nanogpt.py; nanoGPT is its own
  train.py (compiled too on a card). It has no bfloat16 on a CPU: there it is measured in float32 alone, and ours in
  both precisions is compared with that. `recipe` is config/shakespeare_char.py's own model and batch.
- Each variant is a process of its own; all take turns, `rounds` times, so that a busy moment of the machine meets them
  all. A figure is the median over the rounds of the median step (on a card of the mean: it does not wait for steps).
- data, forward, backward, optimizer: the same calls once more, one after the other, each waited for. The gradient's
  norm counts as optimizer.
- share: of the card's known peak rate (MFU), or else of a large matrix product's rate measured here in that precision;
  operations are 6 per weight of a matrix product and token, and attention's (PaLM's count).
- peak: the largest resident memory of the process, or the memory that PyTorch held on the card.
- start-up: from launch to the end of the first step, compilation included, the first evaluation and sets of data not.
- Ids are random: speed does not depend on them. 0.8M to 30M have a vocabulary of 65, the larger ones of 50,257.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import ROOT, child, flops_per_token, machine, middle, nanogpt_checkout, publish, random_set, table
from time_to_loss import NANOGPT

from inkling.cli import fail, parse, run
from inkling.format import short

# n_layer, n_head, n_embd, block_size, vocabulary, sequences a step on a CPU and on a card.
SIZES = {"toy": (1, 2, 16, 16, 65, 2, 2), "0.8M": (4, 4, 128, 64, 65, 12, 12), "3M": (4, 4, 256, 256, 65, 32, 64),
         "10.65M": (6, 6, 384, 256, 65, 64, 64), "30M": (6, 10, 640, 256, 65, 16, 64),
         "124M": (12, 12, 768, 1024, 50257, 2, 32), "350M": (24, 16, 1024, 1024, 50257, 1, 16),
         "1.5B": (48, 25, 1600, 1024, 50257, 1, 8)}
WAYS = ("eager", "compiled", "nanogpt")


@dataclass
class Options:
    # -- what to measure
    sizes: str = "0.8M,3M,10.65M,recipe"  # of 0.8M, 3M, 10.65M, 30M, 124M, 350M, 1.5B, recipe, toy
    ways: str = ""                      # of eager, compiled, nanogpt; empty: all, nanogpt if there is a checkout
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    dropouts: str = "0.2,0.0"           # separated by commas; not for recipe, which has its own
    dtypes: str = "float32,bfloat16"    # separated by commas
    batch_size: int = 0                 # sequences a step; 0: the size's own
    steps: int = 8                      # of each run; the first is not counted
    split: int = 4                      # steps whose parts are measured; 0: none
    rounds: int = 3                     # runs of each variant
    # -- machine
    device: Literal["cpu", "cuda"] = "cpu"  # where
    append: bool = False                # add the table to bench/RESULTS.md


def variants(options: Options) -> list:
    """(size, dropout, dtype, way) of each row."""
    sizes, dtypes = options.sizes.split(","), options.dtypes.split(",")
    ways = options.ways.split(",") if options.ways else [*WAYS[:2], *(["nanogpt"] if options.nanogpt else [])]
    for given, known in ((sizes, [*SIZES, "recipe"]), (dtypes, ["float32", "bfloat16"]), (ways, WAYS)):
        if unknown := set(given) - set(known):
            fail(f"there is no {', '.join(sorted(unknown))}, only {', '.join(known)}")
    try:
        dropouts = [float(text) for text in options.dropouts.split(",")]
    except ValueError:
        fail(f"dropouts={options.dropouts} are not numbers separated by commas")
    found = []
    for size in sizes:
        for dropout in [None] if size == "recipe" else dropouts:
            for dtype in dtypes:
                for way in ways:
                    impossible = way == "nanogpt" and (size == "recipe" or
                                                       dtype != ("float32" if options.device == "cpu" else "bfloat16"))
                    if not impossible:
                        found.append((size, dropout, dtype, way))
    return found


def measure(variant: tuple, options: Options, sets: Path, checkout: str) -> dict:
    """One run of a variant."""
    size, dropout, dtype, way = variant
    cuda = options.device == "cuda"
    common = dict(points=1, evaluate=False, split=options.split)
    log = 10**6 if cuda else 1          # on a card a line of progress waits for the device
    words = [f"--device={options.device}", f"--dtype={dtype}", f"--max_iters={options.steps}", f"--log_interval={log}",
             f"--compile={way == 'compiled'}"]
    if size == "recipe":
        if options.batch_size:
            words.append(f"--batch_size={options.batch_size}")
        return child("ours", data=str(sets / "65"), block_size=256,
                     words=[str(ROOT / "config" / "shakespeare_char.py"), *words], **common)
    n_layer, n_head, n_embd, block_size, vocabulary, *batches = SIZES[size]
    settings = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, dropout=dropout,
                    batch_size=options.batch_size or batches[cuda], max_iters=options.steps)
    common |= dict(data=str(sets / str(vocabulary)), block_size=block_size)
    if way == "nanogpt":
        return child("nanogpt", settings=NANOGPT | settings | dict(lr_decay_iters=options.steps, warmup_iters=1),
                     device=options.device, compile=cuda, seed=1, checkout=checkout, **common)
    config = ROOT / "config" / "shakespeare_char_nanogpt.py"
    padded = ["--pad_vocab_to=64"] if vocabulary > 256 else []          # as nanoGPT has it
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return child("ours", words=[str(config), *flags, *padded, *words], **common)


def seconds(results: list, cuda: bool) -> float:
    """A step's seconds."""
    return middle([one["mean_seconds" if cuda else "step_seconds"] for one in results])


def numbers(variant: tuple, results: list, rate: float, base: float | None, operations: float, cuda: bool) -> dict:
    """What the table says of a variant. rate: peak or matmul operations a second; base: nanoGPT's seconds a step;
    operations: of a token."""
    step, tokens = seconds(results, cuda), results[0]["tokens_per_step"]
    parts = {name: middle([one["parts"][name] for one in results]) for name in results[0].get("parts", {})}
    return dict(zip(("size", "dropout", "dtype", "way"), variant, strict=True), tokens=tokens, step=step, parts=parts,
                times=base / step if base else None, share=operations * tokens / step / rate,
                peak=middle([one["peak"] for one in results]), start=middle([one["first_step"] for one in results]))


def row(found: dict) -> list:
    """A line of the table."""
    parts = [f"{1000 * found['parts'][name]:,.1f}" if found["parts"] else "-"
             for name in ("data", "forward", "backward", "optimizer")]
    return [found["size"], "-" if found["dropout"] is None else found["dropout"], found["dtype"],
            "nanoGPT" if found["way"] == "nanogpt" else f"ours, {found['way']}", f"{found['tokens']:,}",
            f"{1000 * found['step']:,.1f}", short(found["tokens"] / found["step"]),
            f"{found['times']:.2f}x" if found["times"] else "-", *parts, f"{100 * found['share']:.0f}%",
            f"{found['peak'] / 1e6:,.0f}", f"{found['start']:.1f}"]


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    todo, cuda = variants(options), options.device == "cuda"
    if options.steps < 2:
        fail(f"steps={options.steps} must be at least 2: the first is not counted")
    checkout = nanogpt_checkout(options.nanogpt) if any(variant[3] == "nanogpt" for variant in todo) else ""
    dtypes = sorted({variant[2] for variant in todo})
    results, rates = {variant: [] for variant in todo}, {dtype: [] for dtype in dtypes}
    peak = child("card", device="cuda")["peak"] if cuda else 0.0
    toy = {variant[0] for variant in todo} == {"toy"}
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        sets = Path(folder)
        for vocabulary in {65} | {SIZES[variant[0]][4] for variant in todo if variant[0] in SIZES}:
            random_set(sets / str(vocabulary), vocabulary, 20_000 if toy else 1_000_000)
        for number in range(options.rounds):
            for dtype in dtypes:
                rates[dtype].append(child("matmul", device=options.device, dtype=dtype,
                                          size=256 if toy else 8192 if cuda else 2048)["rate"])
            for variant in todo:
                print(f"round {number + 1} of {options.rounds}: {', '.join(map(str, variant))}", flush=True)
                results[variant].append(measure(variant, options, sets, checkout))

    lines = []
    for variant in todo:
        size, dropout, dtype, _ = variant
        theirs = results.get((size, dropout, "float32" if not cuda else "bfloat16", "nanogpt"))
        base = seconds(theirs, cuda) if theirs else None
        if size == "recipe":
            operations = results[variant][0]["flops_per_token"]
        else:
            n_layer, _, n_embd, block_size, vocabulary, *_ = SIZES[size]
            operations = flops_per_token(n_layer, n_embd, block_size, vocabulary)
        rate = peak if peak and dtype == "bfloat16" else middle(rates[dtype])
        lines.append(numbers(variant, results[variant], rate, base, operations, cuda))
    head = ["size", "dropout", "precision", "", "tokens a step", "ms a step", "tokens/s", "times nanoGPT", "data",
            "forward", "backward", "optimizer, ms", "MFU" if peak else "share of matmul", "peak, MB", "start-up, s"]
    measured = "; ".join(f"{dtype} {middle(values) / 1e12:.2f}" for dtype, values in rates.items())
    note = (f"Medians of {options.rounds} rounds in turn, {options.steps} steps each. A large matrix product runs here "
            f"at (TFLOP/s) {measured}.")
    figures = dict(lines=lines, rates={dtype: middle(values) for dtype, values in rates.items()},
                   results=[dict(variant=variant, runs=runs) for variant, runs in results.items()])
    publish("Throughput", f"{table(head, map(row, lines))}\n\n{note}", machine(options.device), options.append, figures,
            "throughput")
    return 0


if __name__ == "__main__":
    run(main)
