"""Several processes: what two bring here, and the arithmetic of 8 and 64 cards.

    python bench/scaling.py                         # about 3 minutes on 2 cores
    python bench/scaling.py --measure=False --peak=312 --mfu=0.4

Measured: tokens a second of train.py with config/shakespeare_char.py's model and global batch as 1 process of 1 thread,
1 of 2 threads, and 2 of 1 thread each under torchrun with gloo, in turns; medians of the steps and of the rounds.

Computed: a step sums the gradients of all cards once, 4 bytes a parameter, however many micro-batches it has. A ring
over n members sends and receives 2 (n - 1) / n times the bytes each (Patarasuk and Yuan 2009). Within a machine the
cards' link is NVLink (450 GB/s each way); between machines the sum of a machine is exchanged over its network, after
NVLink has made it and before NVLink spreads it. Compute is tokens / cards x operations a token / (peak x mfu). `hidden`
is the best case: gradients travel while the rest of the backward pass (two thirds of the compute) goes on, as
DistributedDataParallel does it; `exposed` is the worst, nothing hidden. Where Muon's work is shared between the
processes, its results travel too: up to half as many bytes again.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common import ROOT, flops_per_token, machine, publish, random_set, table

from inkling.cli import fail, parse, run
from inkling.format import short
from inkling.plots import read_log

# name: n_layer, n_embd, parameters
MODELS = {"124M": (12, 768, 124_439_808), "350M": (24, 1024, 354_823_168), "1.5B": (48, 1600, 1_557_611_200)}
NVLINK = 450e9                          # bytes a second each way, of a card
NETWORKS = {"100 Gbit Ethernet a machine": 12.5e9, "400 Gbit InfiniBand a card": 50e9}    # bytes a second each way


@dataclass
class Options:
    # -- what to measure
    measure: bool = True                # run the processes; else the arithmetic alone
    rounds: int = 3                     # of the three ways in turn
    steps: int = 6                      # of a run; the first is not counted
    words: str = ""                     # more flags for train.py
    # -- what to compute
    tokens: int = 491_520               # of a step, over all cards
    block_size: int = 1024              # context
    peak: float = 989.0                 # TFLOP/s of a card
    mfu: float = 0.5                    # share of it that one card alone reaches
    append: bool = False                # add the tables to bench/RESULTS.md


def rate(processes: int, threads: int, options: Options, folder: Path) -> float:
    """Median tokens a second of one run."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    out = folder / f"run{processes}{threads}"
    words = [str(ROOT / "config" / "shakespeare_char.py"), "--dataset=set", f"--data_dir={folder}", f"--out_dir={out}",
             "--device=cpu", "--compile=False", "--log_interval=1", "--eval_iters=1", "--sample_tokens=0",
             f"--max_iters={options.steps}", f"--eval_interval={options.steps}", *options.words.split()]
    process = subprocess.run([sys.executable, *launch, str(ROOT / "train.py"), *words], capture_output=True, text=True,
                             encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False)
    if process.returncode:
        fail(f"{processes} processes ended with {process.returncode}: {process.stderr.strip()[-300:]}", 1)
    rates = [row["tokens_per_second"] for row in read_log(out / "log.csv") if "tokens_per_second" in row]
    return median(rates[1:])


def measured(options: Options) -> str:
    ways = {(1, 1): [], (1, 2): [], (2, 1): []}
    for number in range(options.rounds):
        for (processes, threads), rates in ways.items():
            print(f"round {number + 1} of {options.rounds}: {processes} x {threads} threads", flush=True)
            with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
                random_set(Path(folder) / "set", 65, 100_000)
                rates.append(rate(processes, threads, options, Path(folder)))
    one = median(ways[1, 1])
    rows = []
    for (processes, threads), rates in ways.items():
        times = median(rates) / one
        rows.append([processes, threads, short(median(rates)), f"{times:.2f}x",
                     f"{100 * times / (processes * threads):.0f}%"])
    return table(["processes", "threads each", "tokens/s", "of one", "efficiency"], rows)


def exchange(size: float, machines: int, cards: int, network: float) -> tuple:
    """Seconds that the sum of `size` bytes takes within machines of so many cards, and between them. network: bytes a
    second of a machine."""
    return 2 * (cards - 1) / cards * size / NVLINK, 2 * (machines - 1) / machines * size / network


def computed(options: Options) -> str:
    rows = []
    for name, (n_layer, n_embd, parameters) in MODELS.items():
        operations = flops_per_token(n_layer, n_embd, options.block_size, 50257)
        for machines, cards, network in ((1, 8, ""), *((count, each, name) for count, each in ((8, 1), (8, 8))
                                                       for name in NETWORKS)):
            total = machines * cards
            of_machine = NETWORKS[network] * (cards if network.endswith("card") else 1) if network else 1.0
            within, between = exchange(4 * parameters, machines, cards, of_machine)
            compute = options.tokens / total * operations / (options.peak * 1e12 * options.mfu)
            travel = within + between
            hidden = max(compute, compute / 3 + travel)
            rows.append([name, f"{total} = {machines} x {cards}", network or "NVLink alone",
                         f"{4 * parameters / 1e9:.2f}",
                         *(f"{1000 * value:,.1f}" for value in (compute, within, between)),
                         f"{100 * compute / (compute + travel):.0f}%", f"{100 * compute / hidden:.0f}%",
                         short(options.tokens / hidden)])
    return table(["model", "cards = machines x cards", "network", "gradients, GB", "compute, ms", "within, ms",
                  "between, ms", "efficiency, exposed", "hidden", "tokens/s, hidden"], rows)


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    if options.steps < 2 or options.rounds < 1:
        fail(f"steps={options.steps} and rounds={options.rounds} must be at least 2 and 1")
    if not 0 < options.mfu <= 1 or options.peak <= 0:
        fail(f"mfu={options.mfu} must be above 0 and at most 1, peak={options.peak} above 0")
    if options.tokens < 1 or options.block_size < 1:
        fail(f"tokens={options.tokens} and block_size={options.block_size} must be at least 1")
    parts = ["Measured, config/shakespeare_char.py:", measured(options)] if options.measure else []
    parts += [f"Computed: {options.tokens:,} tokens a step, context {options.block_size:,}, {100 * options.mfu:.0f}% "
              f"of {options.peak:,.0f} TFLOP/s a card.", computed(options)]
    publish("Several processes", "\n\n".join(parts), machine(), options.append)
    return 0


if __name__ == "__main__":
    run(main)
