"""What the benchmarks share: child processes that return JSON, data sets of random tokens, tables and RESULTS.md.

Nothing here imports torch: the parent of the measured processes stays small and runs no thread of its own.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inkling import dataset as dataset_module
from inkling.cli import fail
from inkling.files import ROOT

OUT = ROOT / "bench" / "out"            # pictures and figures; ignored by git
RESULTS = ROOT / "bench" / "RESULTS.md"


# -- peers ---------------------------------------------------------------------------------------------------------

def nanogpt_checkout(folder: str) -> str:
    """The absolute path of a nanoGPT checkout, or one line that says how to get one."""
    missing = [name for name in ("train.py", "model.py", "configurator.py") if not (Path(folder) / name).is_file()]
    if not folder or missing:
        fail(f"--nanogpt={folder}: no {missing[0] if folder else 'folder'} there; git clone "
             "https://github.com/karpathy/nanoGPT and name it, or leave this peer out")
    return str(Path(folder).resolve())


def need(*packages: str):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            fail(f"{package} is not installed, and the Hugging Face Trainer needs it: pip install "
                 f"{' '.join(packages)}, or leave this peer out")


# -- children ------------------------------------------------------------------------------------------------------

def child(task: str, **spec) -> dict:
    """What runners.py finds out about `task`, in a process of its own and a temporary folder. Its failure is ours."""
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        with open(log, "w", encoding="utf-8") as out:
            process = subprocess.run(
                [sys.executable, str(ROOT / "bench" / "runners.py"), task,
                 json.dumps(spec | dict(folder=folder, launched=time.time())), str(result)],
                stdout=out, stderr=subprocess.STDOUT, check=False)
        if process.returncode or not result.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            if os.environ.get("BENCH_VERBOSE"):
                print("\n".join(lines), file=sys.stderr)
            fail(f"{task} ended with code {process.returncode}: {lines[-1][:300]} (BENCH_VERBOSE=1 shows all it said)",
                 1)
        return json.loads(result.read_text(encoding="utf-8"))


def random_set(folder: Path, vocab_size: int, tokens: int):
    """A data set of random ids, `tokens` for training and a tenth as many for validation: speed does not depend on
    them. Its tokenizer is one of made-up characters."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype, rng, splits = dataset_module.token_dtype(vocab_size), np.random.default_rng(0), {}
    for split, count in (("train", tokens), ("val", tokens // 10)):
        rng.integers(0, vocab_size, count).astype(dtype).tofile(folder / f"{split}.bin")
        splits[split] = dict(tokens=count, characters=count, bytes=4 * count, sha256="")
    chars = "".join(chr(0x10000 + number) for number in range(vocab_size))
    meta = dict(format=1, dtype=dtype.name, vocab_size=vocab_size, splits=splits,
                tokenizer=dict(kind="char", chars=chars))
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


# -- arithmetic ----------------------------------------------------------------------------------------------------

def flops_per_token(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> float:
    """Operations of training GPT-2's architecture on one token: 6 for each weight of a matrix product, and attention's
    (PaLM's count, arXiv 2204.02311, appendix B)."""
    return 6 * (12 * n_layer * n_embd ** 2 + n_embd * vocab_size) + 12 * n_layer * block_size * n_embd


def middle(values) -> float:
    """The median; infinity stands for a target that was not reached."""
    return median(values) if values else math.inf


# -- reports -------------------------------------------------------------------------------------------------------

def table(head: list, rows: list) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def processor() -> str:
    """The processor's name and the number of its cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        if any(line.startswith("flags") and "amx_bf16" in line for line in lines):
            name += " with AMX"
    except OSError:
        pass                            # another system than Linux
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"{name}, {cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")


def machine(device: str = "cpu", more: tuple = ()) -> str:
    """One line: processor or card, versions of Python, torch and `more` packages, date."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", *more):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    card = ""
    if device.startswith("cuda"):
        card = child("card", device=device)["name"] + "; "
    return f"{card}{processor()}; {', '.join(versions)}; {time.strftime('%Y-%m-%d')}"


def command() -> str:
    """This script's command line, without the folders of the machine it ran on."""
    words = ["--nanogpt=../nanoGPT" if word.startswith("--nanogpt=") else re.sub(r"=/.*/(?=[^/])", "=", word)
             for word in sys.argv[1:]]
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


def publish(title: str, text: str, about: str, append: bool, figures=None, name: str = ""):
    """Print a result; with `append` add it to RESULTS.md; leave `figures` as bench/out/NAME.json."""
    section = f"## {title}\n\n{about}\n\n    {command()}\n\n{text}\n"
    print(f"\n{section}", flush=True)
    if name:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"{name}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if append:
        before = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "# Results\n\nNewest last.\n"
        RESULTS.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")
