"""What the tests share: a tiny data set, toy settings, and the programs as subprocesses in an empty folder."""

import contextlib
import csv
import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"                 # larger texts, where a developer has them; no test depends on it
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
torch.set_num_threads(1)                        # toy sizes run faster so, and results do not depend on the machine

# Who starts pytest in the background of a script has it ignore SIGINT, and all that it starts; the programs leave an
# ignored signal ignored, as they should.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

import prepare  # noqa: E402
import sample  # noqa: E402, F401, for the children
import train  # noqa: E402
from inkling.cli import exit_code  # noqa: E402
from inkling.dataset import read_meta  # noqa: E402
from inkling.report import TIMINGS  # noqa: E402
from inkling.tokenizer import Tokenizer  # noqa: E402
from prepare import write_set  # noqa: E402
from train import GPT, Config, main  # noqa: E402

if hasattr(os, "fork"):
    from forks import Zygote

    ZYGOTE = Zygote()                           # now, while nothing has been computed
else:
    class NoZygote:
        """On Windows, which has no fork: the tests that need a forked child are skipped there."""

        def start(self, *program, **limits):
            pytest.skip("needs fork")

        run = start

    ZYGOTE = NoZygote()

TOY = dict(dataset="toy", n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, ngrams=3, ngram_rows=97,
           max_iters=6, eval_interval=3, eval_iters=1, log_interval=1, sample_tokens=8, device="cpu", dtype="float32",
           compile=False)


def pytest_xdist_auto_num_workers(config) -> int:
    """One process more than cores: a third of the time goes into waiting, for children and for the disk."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def flags(**settings) -> list:
    """None leaves a flag out."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder with one set, `toy`: the first 20,000 characters of the embedded fables, one token per character."""
    folder = tmp_path_factory.mktemp("data")
    text = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "toy.txt").write_text(text, encoding="utf-8")
    write_set(folder / "toy", [folder / "toy.txt"], "char", 0.1)
    return folder


@pytest.fixture
def toy(data_dir, tmp_path):
    """Make a toy Config: toy(n_layer=3)."""
    return lambda **changes: Config(**TOY | dict(data_dir=str(data_dir), out_dir=str(tmp_path / "run")) | changes)


@pytest.fixture
def run(tmp_path, data_dir):
    """Run a program in an empty folder: run("train.py", "--max_iters=3", toy=True) returns the finished process, its
    output as text. toy=True puts the toy settings first."""
    def run(program: str, *words, toy: bool = False, timeout: float = 120, env: dict | None = None, **options):
        first = flags(**TOY, data_dir=data_dir) if toy else []
        return subprocess.run([sys.executable, str(ROOT / program), *first, *map(str, words)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, encoding="utf-8",
                              env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **options)
    return run


def inside(main, *words):
    """What `run` returns, of a program's main in this process and folder: no wait for the import of torch."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = exit_code(main, list(map(str, words)))
        except SystemExit as stop:
            code = stop.code
    said = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]
    return subprocess.CompletedProcess(words, code, *said)


def trained(data_dir: Path, out, /, *words, **settings):
    """train.py with the toy settings and these, `inside`. Without pictures, which take most of a toy run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        return inside(main, *flags(**TOY | dict(data_dir=data_dir, out_dir=out) | settings), *words)


@pytest.fixture
def start(tmp_path, data_dir, monkeypatch):
    """start("run", max_iters=3): `trained` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(trained, data_dir)


def prepared(*words) -> str:
    """What prepare.py says, with the sets in ./sets; it must succeed."""
    done = refused(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*words):
    """The same, but it may fail."""
    return inside(prepare.main, *words, "--data_dir=sets")


def texts(name: str) -> list:
    """[train text, val text] of a set in ./sets."""
    folder = Path("sets", name)
    meta = read_meta(folder)
    return [Tokenizer(meta["tokenizer"]).decode(np.fromfile(folder / f"{split}.bin", meta["dtype"]))
            for split in ("train", "val")]


def serving(server):
    """Yield an HTTP server while it answers in a thread; for fixtures."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def log_rows(folder: Path) -> list:
    """The rows of a run's log.csv as dicts of texts, without the timings, which differ from run to run."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{key: text for key, text in row.items() if key not in TIMINGS}
                for row in csv.DictReader(file)]


def contents(path) -> dict:
    """What a checkpoint holds, by its place, and tensors as bytes, so that equal is identical."""
    def flat(value, place):
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flat(inner, f"{place}.{key}").items()}
        if isinstance(value, (list, tuple)):
            return flat(dict(enumerate(value)), place)
        if isinstance(value, torch.Tensor):
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            value = (str(value.dtype), tuple(value.shape), raw)
        return {place: value}

    # What differs without mattering: the time, the place, how often it was resumed, and the rates, which each step
    # computes anew.
    ignored = re.compile(r"\.seconds|\.pause|\.clock_seconds|\.plan\.resumed_at|\.config\.out_dir|"
                         r".*\.param_groups\.\d+\.(lr|momentum)")
    found = flat(torch.load(path, weights_only=True), "")
    return {place: value for place, value in found.items() if not ignored.fullmatch(place)}


def same_runs(one, other):
    """The two folders hold the same run, to the last bit."""
    assert log_rows(one) == log_rows(other)
    for name in ("last.pt", "ckpt.pt"):
        left, right = contents(one / name), contents(other / name)
        assert left.keys() == right.keys()
        assert [place for place in left if left[place] != right[place]] == []


def one_line_error(process, *parts: str, without: str = ""):
    """The process left with 2 and one line on stderr that names every one of `parts`, and not `without`."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    for part in parts:
        assert part in lines[0], lines[0]
    assert not without or without not in lines[0], lines[0]


@torch.no_grad()
def perturbed(model: GPT, seed: int = 0) -> GPT:
    """The model with noise on every weight: zero-initialised projections would hide what lies behind them."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def convert_ok(*words):
    """convert.py in this process, which must succeed."""
    import convert  # only these tests need it
    outcome = inside(convert.main, *words)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def expect_refusal(*words, parts=()):
    """convert.py must leave with one line, and nothing written but what was there."""
    import convert  # only these tests need it
    before = {path for path in Path().rglob("*") if path.name != ".lock"}
    one_line_error(inside(convert.main, *words), *parts)
    assert {path for path in Path().rglob("*") if path.name != ".lock"} == before


def pairwise(**switches) -> list:
    """Settings (dicts) such that any two values of any two switches meet in at least one of them."""
    def pairs(row: dict) -> set:
        return set(itertools.combinations(row.items(), 2))

    rng, chosen = random.Random(0), []
    missing = {((a, x), (b, y)) for (a, some), (b, others) in itertools.combinations(switches.items(), 2)
               for x in some for y in others}
    while missing:
        rows = [{name: rng.choice(values) for name, values in switches.items()} for _ in range(100)]
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


class Clock:
    """Stands in for the time module's clocks: nothing passes but what a test adds."""

    def __init__(self):
        self.now = 1000.0
        self.seconds_of_step = lambda step: 1.0     # but for the first, which takes 10, as if it compiled

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.read)
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock


@pytest.fixture
def paced(clock, monkeypatch):
    """The clock of a machine on which an evaluation takes 5 seconds, and a step what clock.seconds_of_step says."""
    update, estimate_loss = train.update, train.estimate_loss

    def timed_update(run, step):
        clock.now += 10 if step == 0 else clock.seconds_of_step(step)
        return update(run, step)

    def timed_estimate_loss(*args, **settings):
        clock.now += 5
        return estimate_loss(*args, **settings)

    monkeypatch.setattr(train, "update", timed_update)
    monkeypatch.setattr(train, "estimate_loss", timed_estimate_loss)
    return clock
