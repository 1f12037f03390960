"""Peak memory of prepare.py on a text that is larger than it may ever hold.

    python bench/prepare_memory.py [--gigabytes=2] [--tokenizers=char,gpt2,bpe:32000] [--workers=2]

Makes a text of made-up words (three in four from 50,000 that recur, the others new), prepares it in a process of its
own per tokenizer, and prints the peak of its resident memory, which counts pages of files too, with the time it took.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from inkling.cli import parse, run  # noqa: E402


@dataclass
class Options:
    # -- what to measure
    gigabytes: float = 2.0              # size of the text
    tokenizers: str = "char,gpt2,bpe:32000"  # one after another
    workers: int = 2                    # threads that tokenize


def write_text(path: Path, size: int):
    """A text of at least `size` bytes in lines and paragraphs, the same every time."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"

    def word() -> str:
        return "".join(letters[min(25, int(rng.expovariate(0.15)))] for _ in range(rng.randint(2, 9)))

    known, written = [word() for _ in range(50_000)], 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        while written < size:
            base = [rng.choice(known) if rng.random() < 0.75 else word() for _ in range(20_000)]
            # One block of words in fifty orders: making random words is slow, reading them is what is measured.
            for _ in range(50):
                rng.shuffle(base)
                text = "\n".join(" ".join(base[at:at + 12]) + (".\n" if at % 60 == 0 else ",")
                                 for at in range(0, len(base), 12))
                written += file.write(text)


def main(argv: list):
    options = Options(**parse(Options, argv, __doc__, takes="words").values)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, int(options.gigabytes * 1e9))
        print(f"{text.stat().st_size:,} bytes of text, {options.workers} workers")
        for name in options.tokenizers.split(","):
            start = time.perf_counter()
            child = subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), str(text), f"--tokenizer={name}",
                                      f"--workers={options.workers}", f"--data_dir={folder}", "--force"],
                                     stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            _, status, usage = os.wait4(child.pid, 0)
            taken = time.perf_counter() - start
            print(f"  {name:<12} peak {usage.ru_maxrss * 1024 / 1e6:5.0f} MB, {taken:5.0f} s, exit {status}",
                  flush=True)


if __name__ == "__main__":
    run(main)
