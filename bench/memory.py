"""How near the memory that `train.py --dry_run` expects comes to what a run takes, on this machine's CPU.

    python bench/memory.py [--sizes=default,gpt2_30m,gpt2_124m]

For each size it runs the dry run, then three steps and two evaluations in a fresh process, uncompiled, in float32.
- tensors: what the dry run adds up, against the peak of resident memory above what was held before the model was made.
  There glibc is told to give back every block at once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator nearly does.
- process: what the dry run measures of itself, against the peak of a process that does nothing unusual. The difference
  to the former is Python, PyTorch's libraries and the gaps in glibc's heap, which can be as large as all tensors.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from inkling.cli import fail, parse, run  # noqa: E402

GPT2 = ("--dataset=gpt2_fables --positions=learned --norm=layernorm --norm_gain --embed_norm=False --mlp=gelu --bias "
        "--tie_weights --qk_norm=False --logit_cap=0 --shortcuts=False --ngrams=0 --init=gpt2 --optimizer=adamw "
        "--learning_rate=1e-4 --dropout=0 --adam_eps=1e-8 --weight_decay=0.1")
SIZES = {
    "default": "--dataset=char_fables",
    "gpt2_30m": f"{GPT2} --n_layer=6 --n_head=6 --n_embd=384 --batch_size=4 --block_size=256",
    "gpt2_124m": f"{GPT2} --n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 --block_size=128",
    "muon_124m": "--dataset=gpt2_fables --n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 --block_size=128",
}
COMMON = "--max_iters=3 --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32 --compile=False"
# A run that says its peak: `begun` is what was resident when the model was about to be made.
RUN = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
sys.modules["matplotlib"] = None                # a picture is no part of it
import torch
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()      # so that the libraries it imports are there
import train
made, begun = train.GPT, []
def GPT(*some):
    with open("/proc/self/statm") as file:
        begun.append(int(file.read().split()[1]) * resource.getpagesize())
    return made(*some)
train.GPT = GPT
train.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("peak", peak, peak - begun[0])
"""


@dataclass
class Options:
    # -- what to measure
    sizes: str = "default,gpt2_30m,gpt2_124m"   # of SIZES in this file


def output(*words, **env) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        fail(f"{' '.join(map(str, words[:2]))} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def main(argv: list):
    names = parse(Options, argv, __doc__, takes="words").values.get("sizes", Options.sizes).split(",")
    if unknown := [name for name in names if name not in SIZES]:
        fail(f"no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if not os.path.exists("/proc/self/statm"):
        fail("this needs Linux's /proc")
    print(f"{'MB':<12} {'tensors':>8} {'measured':>8} {'ratio':>6} {'process':>8} {'measured':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in (("char_fables", "char"), ("gpt2_fables", "gpt2")):
            output(ROOT / "prepare.py", ROOT / "data/fables/input.txt", f"--name={name}", f"--tokenizer={tokenizer}",
                   f"--data_dir={folder}")
        for name in names:
            flags = [*SIZES[name].split(), *COMMON.split(), f"--data_dir={folder}", f"--out_dir={folder}/{name}"]
            said = output(ROOT / "train.py", *flags, "--dry_run")
            expected = [float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit] for number, unit in
                        re.findall(r"(?:about|measured) ([\d.,]+) (GB|MB)(?: of tensors at once|, Python)", said)]
            runs = [output("-c", RUN, ROOT, *flags, **env) for env in (dict(MALLOC_MMAP_THRESHOLD_="65536"), {})]
            peaks = [[int(number) for number in re.search(r"peak (\d+) (\d+)", text).groups()] for text in runs]
            figures = []
            for guess, measured in zip(expected, (peaks[0][1], peaks[1][0]), strict=True):
                figures.append(f"{guess / 1e6:>8,.0f} {measured / 1e6:>8,.0f} {guess / measured:>6.2f}")
            print(f"{name:<12} {' '.join(figures)}", flush=True)


if __name__ == "__main__":
    run(main)
