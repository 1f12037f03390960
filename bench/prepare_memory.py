"""Peak memory of prepare.py on a text that is larger than it may ever hold.

    python bench/prepare_memory.py
    python bench/prepare_memory.py --gigabytes=2 --tokenizers=char,gpt2,bpe:32000 --workers=2

Makes a text of made-up words (three in four from 50,000 that recur, the others new), prepares it in
a process of its own per tokenizer, and prints the peak of its resident memory, which counts pages
of files too, with the time it took.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, flags, read_options

from inkling.cli import PositiveFloat, PositiveInt, run

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # the frequent ones first


@dataclass
class Options:
    # -- what to measure
    gigabytes: PositiveFloat = 2.0      # size of the text
    tokenizers: str = "char,gpt2,bpe:32000"  # one after another
    workers: PositiveInt = 2            # threads that tokenize


def make_word(rng) -> str:
    letters = []
    for _ in range(rng.randint(2, 9)):
        letters.append(LETTERS[min(25, int(rng.expovariate(0.15)))])
    return "".join(letters)


def join_words(words: list) -> str:
    """The words in lines of twelve, every fifth of which ends a sentence."""
    lines = []
    for first in range(0, len(words), 12):
        end = ".\n" if first % 60 == 0 else ","
        lines.append(" ".join(words[first:first + 12]) + end)
    return "\n".join(lines)


def write_text(path: Path, size: int):
    """Write a text of at least `size` bytes in lines and paragraphs, the same every time."""
    rng = random.Random(0)
    recurring = [make_word(rng) for _ in range(50_000)]
    written = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        while written < size:
            words = []
            for _ in range(20_000):
                words.append(rng.choice(recurring) if rng.random() < 0.75 else make_word(rng))
            # One block of words in fifty orders: making random words is slow, reading them is what is measured.
            for _ in range(50):
                rng.shuffle(words)
                written += file.write(join_words(words))


def measure(text: Path, tokenizer: str, options: Options) -> tuple:
    """(peak bytes, seconds, exit code) of prepare.py."""
    words = [text, *flags(tokenizer=tokenizer, workers=options.workers, data_dir=text.parent), "--force"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), *map(str, words)],
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    return 1024 * usage.ru_maxrss, time.perf_counter() - began, os.waitstatus_to_exitcode(status)


def main(argv: list):
    options = read_options(Options, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, int(options.gigabytes * 1e9))
        print(f"{text.stat().st_size:,} bytes of text, {options.workers} workers")
        for tokenizer in options.tokenizers.split(","):
            peak, seconds, code = measure(text, tokenizer, options)
            print(f"  {tokenizer:<12} peak {peak / 1e6:5.0f} MB, {seconds:5.0f} s, exit {code}", flush=True)


if __name__ == "__main__":
    run(main)
