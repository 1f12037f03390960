"""Tokens a second, the parts of a step, memory and start-up of ours and nanoGPT's, on the same architecture and batch.

    python bench/throughput.py --nanogpt=../nanoGPT                 # 0.8M, 3M, 10.65M and the recipe's model
    python bench/throughput.py --nanogpt=../nanoGPT --sizes=10.65M --dropouts=0.2 --dtypes=bfloat16,float32
    python bench/throughput.py --nanogpt=../nanoGPT --sizes=124M,350M,1.5B,recipe --dtypes=bfloat16 --device=cuda

How it is measured (bench/ours.py and bench/peers.py hold the code):
- Ours are train.py's updates, eager and compiled, with the switches of
  config/shakespeare_char_nanogpt.py; nanoGPT is its own train.py (compiled too on a card). It has
  no bfloat16 on a CPU: there it is measured in float32 alone, and ours in both precisions is
  compared with that. `recipe` is config/shakespeare_char.py's own model and batch.
- Each variant is a process of its own; all take turns, `rounds` times, so that a busy moment of the
  machine meets them all. A figure is the median over the rounds of the median step (on a card of
  the mean: it does not wait for steps).
- data, forward, backward, optimizer: the same calls once more, one after the other, each waited
  for. The gradient's norm counts as optimizer.
- share: of the card's known peak rate (MFU), or else of a large matrix product's rate measured here
  in that precision; operations are 6 per weight of a matrix product and token, and attention's
  (PaLM's count).
- peak: the largest resident memory of the process, or the memory that PyTorch held on the card.
- start-up: from launch to the end of the first step, compilation included, the first evaluation and
  sets of data not.
- Ids are random: speed does not depend on them. 0.8M to 30M have a vocabulary of 65, the larger
  ones of 50,257.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from common import (
    NANOGPT,
    ROOT,
    describe_machine,
    flags,
    flops_per_token,
    markdown_table,
    median_of,
    nanogpt_checkout,
    publish,
    read_choices,
    read_numbers,
    read_options,
    run_task,
    save_figures,
    write_random_set,
)

from inkling.cli import NonNegativeInt, PositiveInt, at_least, run
from inkling.format import short


class Size(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    cpu_batch: int                      # sequences a step
    cuda_batch: int


SIZES = {
    "toy": Size(1, 2, 16, 16, 65, 2, 2),
    "0.8M": Size(4, 4, 128, 64, 65, 12, 12),
    "3M": Size(4, 4, 256, 256, 65, 32, 64),
    "10.65M": Size(6, 6, 384, 256, 65, 64, 64),
    "30M": Size(6, 10, 640, 256, 65, 16, 64),
    "124M": Size(12, 12, 768, 1024, 50257, 2, 32),
    "350M": Size(24, 16, 1024, 1024, 50257, 1, 16),
    "1.5B": Size(48, 25, 1600, 1024, 50257, 1, 8),
}
WAYS = {"eager": "ours, eager", "compiled": "ours, compiled", "nanogpt": "nanoGPT"}
PARTS = ("data", "forward", "backward", "optimizer")


@dataclass
class Options:
    # -- what to measure
    sizes: str = "0.8M,3M,10.65M,recipe"  # of 0.8M, 3M, 10.65M, 30M, 124M, 350M, 1.5B, recipe, toy
    ways: str = ""                      # of eager, compiled, nanogpt; empty: all, nanogpt if there is a checkout
    nanogpt: str = ""                   # folder of a nanoGPT checkout
    dropouts: str = "0.2,0.0"           # separated by commas; not for recipe, which has its own
    dtypes: str = "float32,bfloat16"    # separated by commas
    batch_size: NonNegativeInt = 0      # sequences a step; 0: the size's own
    steps: Annotated[int, at_least(2)] = 8  # of each run; the first is not counted
    split: NonNegativeInt = 4           # steps whose parts are measured; 0: none
    rounds: PositiveInt = 3             # runs of each variant
    # -- machine
    device: Literal["cpu", "cuda"] = "cpu"  # where
    append: bool = False                # add the table to bench/RESULTS.md

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def nanogpt_dtype(self) -> str:
        """The precision in which nanoGPT trains."""
        return "bfloat16" if self.on_cuda else "float32"


class Variant(NamedTuple):
    """What a row of the table measures."""

    size: str
    dropout: float | None               # None: the recipe's own
    dtype: str
    way: str


def list_variants(options: Options) -> list:
    sizes = read_choices("sizes", options.sizes, [*SIZES, "recipe"])
    dtypes = read_choices("dtypes", options.dtypes, ["float32", "bfloat16"])
    dropouts = read_numbers("dropouts", options.dropouts, float)
    ways = read_choices("ways", options.ways, WAYS)
    if not ways:
        ways = ["eager", "compiled"]
        if options.nanogpt:
            ways.append("nanogpt")
    variants = []
    for size in sizes:
        for dropout in [None] if size == "recipe" else dropouts:
            for dtype in dtypes:
                for way in ways:
                    if way != "nanogpt" or (size != "recipe" and dtype == options.nanogpt_dtype):
                        variants.append(Variant(size, dropout, dtype, way))
    return variants


# -- measuring -----------------------------------------------------------------------------------

def measure_variant(variant: Variant, options: Options, sets: Path, checkout: str) -> dict:
    """One run of a variant, on one of the data sets in the folder `sets`."""
    spec = {"points": 1, "evaluate": False, "split": options.split}
    words = flags(device=options.device, dtype=variant.dtype, max_iters=options.steps,
                  compile=variant.way == "compiled")
    if variant.size == "recipe":
        if options.batch_size:
            words += flags(batch_size=options.batch_size)
        config = ROOT / "config" / "shakespeare_char.py"
        return run_task("ours", data=str(sets / "65"), block_size=256, words=[str(config), *words], **spec)

    size = SIZES[variant.size]
    spec |= {"data": str(sets / str(size.vocab_size)), "block_size": size.block_size}
    settings = {
        "n_layer": size.n_layer,
        "n_head": size.n_head,
        "n_embd": size.n_embd,
        "block_size": size.block_size,
        "dropout": variant.dropout,
        "batch_size": options.batch_size or (size.cuda_batch if options.on_cuda else size.cpu_batch),
        "max_iters": options.steps,
    }
    if variant.way == "nanogpt":
        settings = NANOGPT | settings | {"lr_decay_iters": options.steps, "warmup_iters": 1}
        return run_task("nanogpt", settings=settings, device=options.device, compile=options.on_cuda, seed=1,
                        checkout=checkout, **spec)
    config = ROOT / "config" / "shakespeare_char_nanogpt.py"
    if size.vocab_size > 256:
        words += flags(pad_vocab_to=64)                 # as nanoGPT has it
    return run_task("ours", words=[str(config), *flags(**settings), *words], **spec)


def measure_all(variants: list, options: Options, checkout: str) -> tuple:
    """({variant: results of its runs},
    {precision: operations a second of a matrix product, of each round})."""
    dtypes = sorted({variant.dtype for variant in variants})
    results = {variant: [] for variant in variants}
    matmul_rates = {dtype: [] for dtype in dtypes}
    is_toy = all(variant.size == "toy" for variant in variants)
    tokens = 20_000 if is_toy else 1_000_000
    matmul_size = 8192 if options.on_cuda else 2048
    if is_toy:
        matmul_size = 256
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        sets = Path(folder)
        vocab_sizes = {SIZES[variant.size].vocab_size for variant in variants if variant.size in SIZES}
        for vocab_size in {65} | vocab_sizes:
            write_random_set(sets / str(vocab_size), vocab_size, tokens)
        for number in range(1, options.rounds + 1):
            for dtype in dtypes:
                product = run_task("matmul", device=options.device, dtype=dtype, size=matmul_size)
                matmul_rates[dtype].append(product["rate"])
            for variant in variants:
                print(f"round {number} of {options.rounds}: {', '.join(map(str, variant))}", flush=True)
                results[variant].append(measure_variant(variant, options, sets, checkout))
    return results, matmul_rates


# -- the table -----------------------------------------------------------------------------------

def step_seconds(results: list, options: Options) -> float:
    name = "mean_seconds" if options.on_cuda else "step_seconds"
    return median_of([result[name] for result in results])


def operations_per_token(variant: Variant, results: list) -> float:
    if variant.size == "recipe":
        return results[0]["flops_per_token"]
    size = SIZES[variant.size]
    return flops_per_token(size.n_layer, size.n_embd, size.block_size, size.vocab_size)


def summarize(variant: Variant, results: list, options: Options, nanogpt_seconds: float | None,
              rate: float) -> dict:
    """What the table says of a variant. nanogpt_seconds: of a step, None if it was not measured;
    rate: operations a second that the share is taken of."""
    seconds = step_seconds(results, options)
    tokens = results[0]["tokens_per_step"]
    parts = {}
    if options.split:
        parts = {name: median_of([result["parts"][name] for result in results]) for name in PARTS}
    return variant._asdict() | {
        "tokens": tokens,
        "step": seconds,
        "parts": parts,
        "times": nanogpt_seconds / seconds if nanogpt_seconds else None,
        "share": operations_per_token(variant, results) * tokens / seconds / rate,
        "peak": median_of([result["peak"] for result in results]),
        "start": median_of([result["first_step"] for result in results]),
    }


def table_row(line: dict) -> list:
    parts = ["-"] * len(PARTS)
    if line["parts"]:
        parts = [f"{1000 * line['parts'][name]:,.1f}" for name in PARTS]
    return [
        line["size"],
        "-" if line["dropout"] is None else line["dropout"],
        line["dtype"],
        WAYS[line["way"]],
        f"{line['tokens']:,}",
        f"{1000 * line['step']:,.1f}",
        short(line["tokens"] / line["step"]),
        f"{line['times']:.2f}x" if line["times"] else "-",
        *parts,
        f"{100 * line['share']:.0f}%",
        f"{line['peak'] / 1e6:,.0f}",
        f"{line['start']:.1f}",
    ]


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    variants = list_variants(options)
    checkout = ""
    if any(variant.way == "nanogpt" for variant in variants):
        checkout = nanogpt_checkout(options.nanogpt)
    peak = run_task("card", device="cuda")["peak"] if options.on_cuda else 0.0
    results, matmul_rates = measure_all(variants, options, checkout)
    matmul_rates = {dtype: median_of(rates) for dtype, rates in matmul_rates.items()}

    lines = []
    for variant in variants:
        theirs = results.get(variant._replace(dtype=options.nanogpt_dtype, way="nanogpt"))
        nanogpt_seconds = step_seconds(theirs, options) if theirs else None
        rate = matmul_rates[variant.dtype]
        if peak and variant.dtype == "bfloat16":
            rate = peak
        lines.append(summarize(variant, results[variant], options, nanogpt_seconds, rate))
    head = ["size", "dropout", "precision", "", "tokens a step", "ms a step", "tokens/s", "times nanoGPT", "data",
            "forward", "backward", "optimizer, ms", "MFU" if peak else "share of matmul", "peak, MB", "start-up, s"]
    table = markdown_table(head, [table_row(line) for line in lines])
    rates = "; ".join(f"{dtype} {rate / 1e12:.2f}" for dtype, rate in matmul_rates.items())
    note = (f"Medians of {options.rounds} rounds in turn, {options.steps} steps each. A large matrix product runs here "
            f"at (TFLOP/s) {rates}.")
    save_figures("throughput", {
        "lines": lines,
        "rates": matmul_rates,
        "results": [{"variant": variant, "runs": runs} for variant, runs in results.items()],
    })
    publish("Throughput", f"{table}\n\n{note}", describe_machine(options.device), options.append)
    return 0


if __name__ == "__main__":
    run(main)
