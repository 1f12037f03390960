"""What the benchmarks share: options, child processes, random data sets, tables, RESULTS.md.

Nothing here imports torch: the parent of the measured processes stays small and runs no thread of
its own.
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
from inkling.cli import UserError, check, parse
from inkling.dataset import token_dtype
from inkling.files import ROOT

OUT = ROOT / "bench" / "out"            # pictures and figures; ignored by git
RESULTS = ROOT / "bench" / "RESULTS.md"

# nanoGPT's config/train_shakespeare_char.py, with the defaults of its train.py for what that leaves open.
NANOGPT = {
    "gradient_accumulation_steps": 1,
    "batch_size": 64,
    "block_size": 256,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.2,
    "bias": False,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "beta2": 0.99,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "min_lr": 1e-4,
    "warmup_iters": 100,
}


# -- options -------------------------------------------------------------------------------------

def read_options(options_class: type, argv: list, doc: str):
    """The options on a command line, checked. Raises UserError."""
    options = options_class(**parse(options_class, argv, doc).values)
    check(options)
    return options


def read_choices(name: str, text: str, known) -> list:
    """The words of a flag that takes some of `known`, separated by commas. Raises UserError."""
    words = [word for word in text.split(",") if word]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UserError(f"{name}={text}: there is no {', '.join(unknown)}, only {', '.join(known)}")
    return words


def read_numbers(name: str, text: str, kind: type) -> list:
    """The numbers of a flag that takes several, separated by commas. Raises UserError."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{name}={text} are not numbers separated by commas")


def flags(**settings) -> list:
    return [f"--{name}={value}" for name, value in settings.items()]


# -- peers ---------------------------------------------------------------------------------------

def nanogpt_checkout(folder: str) -> str:
    """The absolute path of a nanoGPT checkout. Raises UserError, which says how to get one."""
    way_out = "git clone https://github.com/karpathy/nanoGPT and name it, or leave this peer out"
    if not folder:
        raise UserError(f"--nanogpt= names no folder: {way_out}")
    for name in ("train.py", "model.py", "configurator.py"):
        if not Path(folder, name).is_file():
            raise UserError(f"--nanogpt={folder}: no {name} there; {way_out}")
    return str(Path(folder).resolve())


def need_packages(*packages: str):
    """Raise UserError unless the packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed, and the Hugging Face Trainer needs it: pip install "
                            f"{' '.join(packages)}, or leave this peer out")


# -- child processes -----------------------------------------------------------------------------

def run_task(task: str, env: dict | None = None, **spec) -> dict:
    """The result of a task of runners.py, in a process of its own and a temporary folder. Raises
    UserError if it fails. env: more environment variables."""
    with tempfile.TemporaryDirectory(prefix="inkling-bench-") as folder:
        result = Path(folder, "result.json")
        log = Path(folder, "log.txt")
        spec |= {"folder": folder, "launched": time.time()}
        code = launch_runner([task, json.dumps(spec), str(result)], log, env or {})
        if code or not result.is_file():
            output = log.read_text(encoding="utf-8", errors="replace").strip()
            if os.environ.get("BENCH_VERBOSE"):
                print(output, file=sys.stderr)
            last_line = output.rpartition("\n")[2][:300] or "it printed nothing"
            raise UserError(f"{task} ended with code {code}: {last_line} (BENCH_VERBOSE=1 shows all of its output)", 1)
        return json.loads(result.read_text(encoding="utf-8"))


def launch_runner(words: list, log: Path, env: dict) -> int:
    """Run runners.py with its output in the file `log`; returns its exit code."""
    runner = str(ROOT / "bench" / "runners.py")
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.run([sys.executable, runner, *words], stdout=file,
                                 stderr=subprocess.STDOUT, env=os.environ | env, check=False)
    return process.returncode


def run_program(words: list, env: dict | None = None, cwd: Path | None = None) -> str:
    """What a Python program prints. Raises UserError if it fails."""
    words = [str(word) for word in words]
    process = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                             encoding="utf-8", cwd=cwd, env=os.environ | (env or {}), check=False)
    if process.returncode:
        raise UserError(f"{' '.join(words[:2])} ended with code {process.returncode}: "
                        f"{process.stderr.strip()[-400:]}", 1)
    return process.stdout


# -- data sets -----------------------------------------------------------------------------------

def write_random_set(folder: Path, vocab_size: int, tokens: int):
    """Write a data set of random ids, `tokens` for training and a tenth as many for validation:
    speed does not depend on them. Its tokenizer is one of made-up characters."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", tokens), ("val", tokens // 10)):
        ids = rng.integers(0, vocab_size, count).astype(dtype)
        ids.tofile(folder / f"{split}.bin")
        splits[split] = {"tokens": count, "characters": count, "bytes": 4 * count, "sha256": ""}
    characters = "".join(chr(0x10000 + number) for number in range(vocab_size))
    meta = {
        "format": 1,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "splits": splits,
        "tokenizer": {"kind": "char", "chars": characters},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


# -- arithmetic ----------------------------------------------------------------------------------

def flops_per_token(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> float:
    """Operations to train GPT-2's architecture on one token: 6 for each weight of a matrix product,
    and attention's (PaLM's count, arXiv 2204.02311, appendix B)."""
    weights = 12 * n_layer * n_embd ** 2 + n_embd * vocab_size
    return 6 * weights + 12 * n_layer * block_size * n_embd


def median_of(values) -> float:
    """The median; infinity stands for a target that was not reached, and for no values."""
    return median(values) if values else math.inf


# -- reports -------------------------------------------------------------------------------------

def markdown_table(head: list, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_processor() -> str:
    """The processor's name and the number of its cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")                     # Linux has it
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8")
        if entry := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            name = entry[1]
        if "amx_bf16" in text:
            name += " with AMX"
    description = f"{name}, {cores()} cores"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        description += f", OMP_NUM_THREADS={threads}"
    return description


def describe_machine(device: str = "cpu", packages: tuple = ()) -> str:
    """One line: processor or card, versions of Python, torch and more `packages`, date."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    card = ""
    if device.startswith("cuda"):
        card = run_task("card", device=device)["name"] + "; "
    return f"{card}{describe_processor()}; {', '.join(versions)}; {time.strftime('%Y-%m-%d')}"


def command_line() -> str:
    """This script's command line, without the folders of the machine it ran on."""
    words = []
    for word in sys.argv[1:]:
        if word.startswith("--nanogpt="):
            word = "--nanogpt=../nanoGPT"
        words.append(re.sub(r"(^|=)/.*/(?=[^/])", r"\1", word))
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


def publish(title: str, text: str, machine: str, append: bool):
    """Print a result; with `append`, add it to RESULTS.md."""
    section = f"## {title}\n\n{machine}\n\n    {command_line()}\n\n{text}\n"
    print(f"\n{section}", flush=True)
    if append:
        before = "# Results\n\nNewest last.\n"
        if RESULTS.is_file():
            before = RESULTS.read_text(encoding="utf-8")
        RESULTS.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")


def save_figures(name: str, figures):
    """Write a result's figures to bench/out/NAME.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
