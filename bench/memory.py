"""How near the memory that `train.py --dry_run` expects comes to what a run takes, on a CPU.

    python bench/memory.py
    python bench/memory.py --sizes=default,gpt2_30m

For each size it runs the dry run, then three steps and two evaluations in a fresh process,
uncompiled, in float32.
- tensors: what the dry run adds up, against the peak of resident memory above what was held before,
  with libraries, data and tokenizer already there. There glibc is told to give back every block at
  once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator nearly does.
- process: what the dry run measures of itself, against the peak of a process that does nothing
  unusual. The difference to the former is Python, PyTorch's libraries and the gaps in glibc's heap,
  which can be as large as all tensors.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, flags, read_choices, read_options, run_program, run_task

from inkling.cli import UserError, run

GPT2 = ("--dataset=gpt2_fables --positions=learned --norm=layernorm --norm_gain --embed_norm=False --mlp=gelu --bias "
        "--tie_weights --qk_norm=False --logit_cap=0 --shortcuts=False --ngrams=0 --init=gpt2 --optimizer=adamw "
        "--learning_rate=1e-4 --dropout=0 --adam_eps=1e-8 --weight_decay=0.1")
SIZES = {
    "toy": "--dataset=char_fables --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --ngrams=0",
    "default": "--dataset=char_fables",
    "gpt2_30m": f"{GPT2} --n_layer=6 --n_head=6 --n_embd=384 --batch_size=4 --block_size=256",
    "gpt2_124m": f"{GPT2} --n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 --block_size=128",
    "muon_124m": "--dataset=gpt2_fables --n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 --block_size=128",
}
COMMON = flags(max_iters=3, eval_iters=1, sample_tokens=0, device="cpu", dtype="float32", compile=False)
UNITS = {"GB": 1e9, "MB": 1e6}


@dataclass
class Options:
    # -- what to measure
    sizes: str = "default,gpt2_30m,gpt2_124m"   # of default, gpt2_30m, gpt2_124m, muon_124m, toy


def expected_bytes(words: list) -> tuple:
    """(bytes of tensors, bytes of the process) that the dry run names."""
    text = run_program([ROOT / "train.py", *words, "--dry_run"])
    number = r"([\d.,]+) (GB|MB)"
    tensors = re.search(rf"about {number} of tensors at once", text)
    process = re.search(rf"measured {number}, Python", text)
    return tuple(float(match[1].replace(",", "")) * UNITS[match[2]] for match in (tensors, process))


def measured_bytes(words: list) -> tuple:
    """The same of a run."""
    returning_blocks = run_task("memory", env={"MALLOC_MMAP_THRESHOLD_": "65536"}, words=words)
    ordinary = run_task("memory", words=words)
    return returning_blocks["peak"] - returning_blocks["before"], ordinary["peak"]


def main(argv: list):
    options = read_options(Options, argv, __doc__)
    names = read_choices("sizes", options.sizes, SIZES)
    if not os.path.exists("/proc/self/statm"):
        raise UserError("this needs Linux's /proc")
    print(f"{'MB':<12} {'tensors':>8} {'measured':>8} {'ratio':>6} {'process':>8} {'measured':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in ("char", "gpt2"):
            run_program([ROOT / "prepare.py", ROOT / "data" / "fables" / "input.txt",
                         *flags(name=f"{tokenizer}_fables", tokenizer=tokenizer, data_dir=folder)])
        for name in names:
            words = [*SIZES[name].split(), *COMMON, *flags(data_dir=folder)]
            dry_run_words = [*words, *flags(out_dir=Path(folder, name))]
            cells = []
            for guess, measured in zip(expected_bytes(dry_run_words), measured_bytes(words), strict=True):
                cells.append(f"{guess / 1e6:>8,.0f} {measured / 1e6:>8,.0f} {guess / measured:>6.2f}")
            print(f"{name:<12} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    run(main)
