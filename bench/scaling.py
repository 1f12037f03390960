"""Several processes: what two bring here, and the arithmetic of 8 and 64 cards.

    python bench/scaling.py                         # about 3 minutes on 2 cores
    python bench/scaling.py --measure=False --peak=312 --mfu=0.4

Measured: tokens a second of train.py with config/shakespeare_char.py's model and global batch as 1
process of 1 thread, 1 of 2 threads, and 2 of 1 thread each under torchrun with gloo, in turns;
medians of the steps and of the rounds.

Computed: a step sums the gradients of all cards once, 4 bytes a parameter, however many
micro-batches it has. A ring over n members sends and receives 2 (n - 1) / n times the bytes each
(Patarasuk and Yuan 2009). Within a machine the cards' link is NVLink (450 GB/s each way); between
machines the sum of a machine is exchanged over its network, after NVLink has made it and before
NVLink spreads it. Compute is tokens / cards x operations a token / (peak x mfu). `hidden` is the
best case: gradients travel while the rest of the backward pass (two thirds of the compute) goes on,
as DistributedDataParallel does it; `exposed` is the worst, nothing hidden. Where Muon's work is
shared between the processes, its results travel too: up to half as many bytes again.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

from common import (
    ROOT,
    describe_machine,
    flags,
    flops_per_token,
    markdown_table,
    publish,
    read_options,
    run_program,
    write_random_set,
)

from inkling.cli import PositiveFloat, PositiveInt, above, at_least, run
from inkling.format import short
from inkling.plots import read_log


class Model(NamedTuple):
    n_layer: int
    n_embd: int
    parameters: int


class Cluster(NamedTuple):
    machines: int
    cards: int                          # of each machine
    network: str
    bytes_per_second: float             # of a machine's network, each way


MODELS = {
    "124M": Model(12, 768, 124_439_808),
    "350M": Model(24, 1024, 354_823_168),
    "1.5B": Model(48, 1600, 1_557_611_200),
}
NVLINK = 450e9                          # bytes a second each way, of a card
ETHERNET = 12.5e9                       # the same of 100 Gbit a machine
INFINIBAND = 50e9                       # and of 400 Gbit a card
CLUSTERS = [
    Cluster(1, 8, "NVLink alone", NVLINK),
    Cluster(8, 1, "100 Gbit Ethernet a machine", ETHERNET),
    Cluster(8, 1, "400 Gbit InfiniBand a card", INFINIBAND),
    Cluster(8, 8, "100 Gbit Ethernet a machine", ETHERNET),
    Cluster(8, 8, "400 Gbit InfiniBand a card", 8 * INFINIBAND),
]


@dataclass
class Options:
    # -- what to measure
    measure: bool = True                # run the processes; else the arithmetic alone
    rounds: PositiveInt = 3             # of the three ways in turn
    steps: Annotated[int, at_least(2)] = 6  # of a run; the first is not counted
    words: str = ""                     # more flags for train.py
    # -- what to compute
    tokens: PositiveInt = 491_520       # of a step, over all cards
    block_size: PositiveInt = 1024      # context
    peak: PositiveFloat = 989.0         # TFLOP/s of a card
    mfu: Annotated[float, above(0).at_most(1)] = 0.5    # share of it that one card alone reaches
    append: bool = False                # add the tables to bench/RESULTS.md


# -- measured ------------------------------------------------------------------------------------

def measure_rate(processes: int, threads: int, options: Options) -> float:
    """Median tokens a second of one run."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as name:
        folder = Path(name)
        write_random_set(folder / "set", 65, 100_000)
        words = flags(dataset="set", data_dir=folder, out_dir=folder / "run", device="cpu", compile=False,
                      log_interval=1, eval_iters=1, sample_tokens=0, max_iters=options.steps,
                      eval_interval=options.steps)
        config = ROOT / "config" / "shakespeare_char.py"
        run_program([*launcher, ROOT / "train.py", config, *words, *options.words.split()],
                    env={"OMP_NUM_THREADS": str(threads)})
        rows = read_log(folder / "run" / "log.csv")
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return median(rates[1:])


def measured_table(options: Options) -> str:
    rates = {(1, 1): [], (1, 2): [], (2, 1): []}                # (processes, threads): tokens a second
    for number in range(1, options.rounds + 1):
        for processes, threads in rates:
            print(f"round {number} of {options.rounds}: {processes} x {threads} threads", flush=True)
            rates[processes, threads].append(measure_rate(processes, threads, options))
    base = median(rates[1, 1])
    rows = []
    for (processes, threads), values in rates.items():
        speedup = median(values) / base
        efficiency = speedup / (processes * threads)
        rows.append([processes, threads, short(median(values)), f"{speedup:.2f}x", f"{100 * efficiency:.0f}%"])
    return markdown_table(["processes", "threads each", "tokens/s", "of one", "efficiency"], rows)


# -- computed ------------------------------------------------------------------------------------

def exchange_seconds(size: float, machines: int, cards: int, bytes_per_second: float) -> tuple:
    """Seconds that the sum of `size` bytes takes within machines of `cards` cards, and between
    them. bytes_per_second: of a machine's network."""
    within = 2 * (cards - 1) / cards * size / NVLINK
    between = 2 * (machines - 1) / machines * size / bytes_per_second
    return within, between


def computed_row(name: str, cluster: Cluster, options: Options) -> list:
    model = MODELS[name]
    cards = cluster.machines * cluster.cards
    size = 4 * model.parameters
    within, between = exchange_seconds(size, cluster.machines, cluster.cards, cluster.bytes_per_second)
    travel = within + between
    operations = flops_per_token(model.n_layer, model.n_embd, options.block_size, 50257)
    compute = options.tokens / cards * operations / (options.peak * 1e12 * options.mfu)
    hidden = max(compute, compute / 3 + travel)
    return [
        name,
        f"{cards} = {cluster.machines} x {cluster.cards}",
        cluster.network,
        f"{size / 1e9:.2f}",
        f"{1000 * compute:,.1f}",
        f"{1000 * within:,.1f}",
        f"{1000 * between:,.1f}",
        f"{100 * compute / (compute + travel):.0f}%",
        f"{100 * compute / hidden:.0f}%",
        short(options.tokens / hidden),
    ]


def computed_table(options: Options) -> str:
    rows = [computed_row(name, cluster, options) for name in MODELS for cluster in CLUSTERS]
    head = ["model", "cards = machines x cards", "network", "gradients, GB", "compute, ms", "within, ms",
            "between, ms", "efficiency, exposed", "hidden", "tokens/s, hidden"]
    return markdown_table(head, rows)


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    paragraphs = []
    if options.measure:
        paragraphs += ["Measured, config/shakespeare_char.py:", measured_table(options)]
    paragraphs += [
        f"Computed: {options.tokens:,} tokens a step, context {options.block_size:,}, {100 * options.mfu:.0f}% of "
        f"{options.peak:,.0f} TFLOP/s a card.",
        computed_table(options),
    ]
    publish("Several processes", "\n\n".join(paragraphs), describe_machine(), options.append)
    return 0


if __name__ == "__main__":
    run(main)
