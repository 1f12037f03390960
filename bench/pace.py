"""Tokens a second of two checkouts of Inkling, side by side.

    python bench/pace.py ../before .
    python bench/pace.py ../before . --config=config/shakespeare_char.py --steps=12 --rounds=3
    python bench/pace.py ../before . --compile=False --dtype=float32 --words="--batch_size=8"
    python bench/pace.py ../before . --vocab=8192 --dtype=float32

Each run is a checkout's train.py as a whole, in a process of its own, so that a checkout may be of
any age. They take turns: the first checkout, the second, the first again, ... A run's figure is the
median of its ms a step in log.csv after the first rows, which warm up and compile; evaluations are
not on that clock. The table has the medians over the rounds, the lowest and highest run, and the
ratio of the medians, and the peak memory of a run. Both checkouts read the same config files and the
same random ids: speed hardly depends on them.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, NamedTuple

from common import (
    ROOT,
    describe_machine,
    flags,
    markdown_table,
    publish,
    run_program,
    save_figures,
    write_random_set,
)

from inkling.cli import PositiveInt, UserError, at_least, check, parse, run
from inkling.format import short
from inkling.plots import read_log


@dataclass
class Options:
    # -- what to measure
    config: str = "config/shakespeare_char.py,config/shakespeare_char_nanogpt.py"  # separated by commas
    compile: Literal["both", True, False] = "both"  # both: each way
    steps: PositiveInt = 12             # of a run
    warm_up: Annotated[int, at_least(1)] = 3  # of them, not counted
    rounds: PositiveInt = 3             # runs of each checkout
    vocab: PositiveInt = 65             # different ids
    words: str = ""                     # more flags for train.py
    # -- machine
    device: str = "auto"                # auto | cpu | cuda
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"  # the same for both
    append: bool = False                # add the table to bench/RESULTS.md

    def rules(self) -> dict:
        return {f"warm_up={self.warm_up} must be below steps={self.steps}": self.warm_up < self.steps}


class Work(NamedTuple):
    config: Path
    compile: bool


class Pace(NamedTuple):
    seconds: float                      # of a step
    tokens_per_second: float
    peak_bytes: int


# Runs a program and prints the most memory that it held, in KB.
WITH_PEAK = """
import atexit, os, resource, runpy, sys
atexit.register(lambda: print("peak KB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_checkouts(words: list) -> list:
    """Raises UserError."""
    if len(words) != 2:
        raise UserError("name two checkouts of Inkling: python bench/pace.py ../before .")
    for word in words:
        if not Path(word, "train.py").is_file():
            raise UserError(f"{word} is no checkout of Inkling: there is no train.py")
    return [Path(word).resolve() for word in words]


def find_configs(text: str) -> list:
    """The config files, from here or from the repository. Raises UserError."""
    configs = []
    for word in text.split(","):
        path = Path(word)
        if not path.is_file():
            path = ROOT / word
        if not path.is_file():
            raise UserError(f"no config file {word}")
        configs.append(path.resolve())
    return configs


def measure_pace(checkout: Path, work: Work, options: Options, folder: Path) -> Pace:
    """One run of a checkout, with the data set `set` in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        words = flags(
            dataset="set",
            data_dir=folder,
            out_dir=out_dir,
            compile=work.compile,
            device=options.device,
            dtype=options.dtype,
            max_iters=options.steps,
            eval_interval=options.steps,
            log_interval=1,
            eval_iters=1,
            sample_tokens=0,
        )
        output = run_program(["-c", WITH_PEAK, checkout / "train.py", work.config, *words, *options.words.split()])
        if work.compile and "compile on" not in output:
            machine = re.search("compile (?:off|failed).*", output)
            raise UserError(f"{checkout} did not compile: {machine[0] if machine else output[-300:]}", 1)
        rows = [row for row in read_log(Path(out_dir, "log.csv")) if "ms" in row]
    measured = rows[options.warm_up:]
    seconds = median(row["ms"] for row in measured) / 1000
    peak_bytes = 1024 * int(re.search(r"peak KB (\d+)", output)[1])
    return Pace(seconds, median(row["tokens_per_second"] for row in measured), peak_bytes)


def measure_work(checkouts: list, work: Work, options: Options, folder: Path) -> list:
    """[paces of the first checkout, paces of the second], a pace for each round."""
    paces = [[], []]
    for number in range(1, options.rounds + 1):
        for checkout, runs in zip(checkouts, paces, strict=True):
            runs.append(measure_pace(checkout, work, options, folder))
            print(f"round {number} of {options.rounds}: {work.config.stem}, compile {work.compile}, "
                  f"{checkout.name}: {1000 * runs[-1].seconds:,.1f} ms a step", flush=True)
    return paces


def table_row(work: Work, paces: list) -> list:
    cells = []
    medians = []
    for runs in paces:
        rates = [pace.tokens_per_second for pace in runs]
        milliseconds = 1000 * median(pace.seconds for pace in runs)
        medians.append(median(rates))
        lowest_to_highest = f"{short(min(rates))}-{short(max(rates))}"
        peak = max(pace.peak_bytes for pace in runs) / 1e9
        cells.append(f"{short(medians[-1])} ({lowest_to_highest}), {milliseconds:,.1f} ms, {peak:.2f} GB")
    before, after = medians
    way = "compiled" if work.compile else "uncompiled"
    return [work.config.stem, way, *cells, f"{after / before:.3f}"]


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    check(options)
    checkouts = find_checkouts(parsed.words)
    compile_values = [False, True] if options.compile == "both" else [options.compile]
    works = []
    for config in find_configs(options.config):
        works += [Work(config, compiled) for compiled in compile_values]

    rows = []
    figures = []
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as name:
        folder = Path(name)
        write_random_set(folder / "set", options.vocab, 1_000_000)
        for work in works:
            paces = measure_work(checkouts, work, options, folder)
            rows.append(table_row(work, paces))
            figures.append({"config": work.config.stem, "compile": work.compile, "paces": paces})
    names = [checkout.name for checkout in checkouts]
    head = ["config", "", *(f"{name}, tokens/s" for name in names), "ratio of the second to the first"]
    counted = options.steps - options.warm_up
    note = (f"Medians of {options.rounds} rounds in turn (lowest-highest), {counted} steps each, "
            f"{options.dtype}.")
    save_figures("pace", figures)
    text = f"{markdown_table(head, rows)}\n\n{note}"
    publish("Pace of two checkouts", text, describe_machine(), options.append)
    return 0


if __name__ == "__main__":
    run(main)
