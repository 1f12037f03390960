"""Real processes that are killed, stopped or short of disk at moments nobody chose lose nothing. tests/soak.py is the
long form; test_checkpoints.py has the moments that are chosen one by one."""

import itertools
import random
import signal
import time
from functools import partial

import pytest
from conftest import TOY, ZYGOTE, flags, one_line_error, same_runs

from inkling.checkpoint import load_checkpoint
from inkling.files import sha256
from inkling.plots import read_log

RUN = TOY | dict(dropout=0.2, sample_tokens=0, max_iters=60, eval_interval=20, save_interval=3)
SETTINGS = {
    "muon": dict(),
    "adamw": dict(optimizer="adamw", learning_rate=0.003, save_interval=1),
    "bfloat16": dict(dtype="bfloat16", schedule="cosine", warmup_iters=5),
    "accumulation": dict(batch_size=2, gradient_accumulation_steps=3, sampling="random", save_interval=7),
}


@pytest.fixture
def start(data_dir, tmp_path):
    """start("run", max_iters=3): train.py in a child."""
    return lambda out, limits=None, **settings: ZYGOTE.start(
        "train.py", *flags(**RUN | dict(data_dir=data_dir, out_dir=out) | settings), folder=tmp_path, **limits or {})


@pytest.fixture
def whole(start, tmp_path):
    """whole(max_iters=3): the folder of a run with these settings that nothing disturbs."""
    def whole(**settings):
        done = start("whole", **settings).wait()
        assert (done.returncode, done.stderr) == (0, "")
        return tmp_path / "whole"
    return whole


def disturbed(start, whole, times: int, disturb):
    """Runs that resume where the one before was cut short. Yields (process, folder) of each of the `times` that
    `disturb(child)` ended; whenever one comes to its end it has to be as `whole`, and so does the last one."""
    names = (whole.with_name(f"run{number}") for number in itertools.count())
    out = next(names)
    while True:
        child = start(out.name, init_from="auto")
        if times:
            disturb(child)
        done = child.wait()
        if done.returncode == 0:
            same_runs(out, whole)
            assert list(out.glob("*.tmp")) == []
            if not times:
                return
            out = next(names)
        else:
            times -= 1
            yield done, out


def saved(out) -> int:
    """The step of last.pt, 0 without one. What there is of checkpoints is whole."""
    steps = {name: load_checkpoint(out / name)["step"] for name in ("last.pt", "ckpt.pt")
             if (out / name).exists()}
    return steps.get("last.pt", 0)


def logged(out) -> int:
    """The last step in the log."""
    return max((int(row["step"]) for row in read_log(out / "log.csv")), default=0) if (out / "log.csv").exists() else 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_25_kills_of_each_kind_of_run_lose_a_save_interval_at_most(start, whole, settings):
    def kill(child):
        time.sleep(chance.uniform(0, 0.4))
        child.send(signal.SIGKILL)

    chance = random.Random(str(settings))
    for done, out in disturbed(partial(start, **settings), whole(**settings), 25, kill):
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert 0 <= logged(out) - saved(out) <= (RUN | settings)["save_interval"]


def test_20_signals_lose_nothing(start, whole):
    def ask(child):
        time.sleep(chance.uniform(0.1, 0.4))
        child.send(chance.choice([signal.SIGTERM, signal.SIGINT]))

    chance, codes = random.Random(0), []
    for done, out in disturbed(start, whole(), 20, ask):
        codes.append(done.returncode)
        if "stopped" in done.stdout:                    # it was past its beginnings
            assert done.returncode in (143, 130)
            assert saved(out) == logged(out)
            assert f"stopped  at step {saved(out)} of 60" in done.stdout
        assert done.returncode in (143, 130, -signal.SIGTERM), done.stderr
        assert done.stderr == ""
    assert {143, 130} <= set(codes)


@pytest.mark.parametrize("tenths", range(10))
def test_a_full_disk_costs_nothing_but_the_saves(start, data_dir, tmp_path, tenths):
    """A run resumes with room for so many tenths of last.pt, and once more with room enough."""
    settings = dict(max_iters=12, eval_interval=4, eval_iters=2)
    assert start("whole", **settings).wait().returncode == 0
    assert start("run", **settings | dict(max_iters=4), lr_decay_iters=12).wait().returncode == 0
    run = tmp_path / "run"
    before = {name: sha256(run / name) for name in ("last.pt", "ckpt.pt", "log.csv")}
    last, ckpt = ((run / name).stat().st_size for name in ("last.pt", "ckpt.pt"))
    room = last * tenths // 10
    done = start("run", dict(room=room), **settings, lr_decay_iters=0, init_from="resume").wait()
    assert list(run.glob("*.tmp")) == []
    assert sha256(run / "last.pt") == before["last.pt"]
    assert room > ckpt or sha256(run / "ckpt.pt") == before["ckpt.pt"]
    if tenths == 0:                                     # not even the log can be written
        one_line_error(done, "log.csv", "File too large")
        assert sha256(run / "log.csv") == before["log.csv"]
    else:
        assert (done.returncode, done.stderr) == (4, "")
        said = [line for line in done.stdout.splitlines() if line.startswith("could not write")]
        assert len([line for line in said if "last.pt" in line and "the next save tries again" in line]) > 2
        assert "unsaved  could not write run/last.pt: File too large" in done.stdout.splitlines()
        assert logged(run) == 12                        # it trained to its end
    assert start("run", **settings, lr_decay_iters=0, init_from="resume").wait().returncode == 0
    same_runs(run, tmp_path / "whole")


@pytest.mark.long
def test_five_minutes_of_random_faults():
    import soak

    assert soak.main(["--minutes=5"]) == 0
