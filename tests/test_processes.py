"""Processes started by torchrun share the steps of one run: the same model, and one of them writes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY, flags, log_rows, trained

from train import main

SHARED_STEP = dict(batch_size=4, gradient_accumulation_steps=4, max_iters=10, eval_interval=5, dropout=0,
                   schedule="constant", save_interval=4)
OPTIMIZERS = {"muon": dict(), "adamw": dict(optimizer="adamw", learning_rate=0.003, weight_decay=0.1)}


def torchrun(folder, data_dir, **settings):
    """train.py in two processes on this machine, in an empty folder, its run in `run`."""
    words = flags(**TOY | dict(data_dir=data_dir, out_dir="run") | settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    folder.mkdir()
    (folder / "matplotlib.py").write_text("raise ImportError")          # which takes long to import
    return subprocess.run([*launcher, str(ROOT / "train.py"), *words], cwd=folder, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)})


@pytest.fixture(scope="module", params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def runs(request, data_dir, tmp_path_factory):
    """What one process and what two left in their folders, and what the two said."""
    folder = tmp_path_factory.mktemp("processes")
    settings = SHARED_STEP | request.param
    assert trained(data_dir, folder / "one", **settings).returncode == 0
    two = torchrun(folder / "two", data_dir, **settings)
    assert two.returncode == 0, two.stderr
    return folder / "one", folder / "two" / "run", two


def numbers(folder, column: str) -> list:
    return [float(row[column]) for row in log_rows(folder) if row[column]]


def test_two_processes_train_the_model_of_one(runs):
    one, two, _ = runs
    for column in ("loss", "norm", "train_loss", "val_loss"):
        assert numbers(two, column) == pytest.approx(numbers(one, column), abs=1e-4), column
    assert len(numbers(two, "loss")) == 10
    losses = numbers(one, "val_loss")
    assert losses[-1] < losses[0] - 0.3                 # so that there was something to get wrong
    left, right = (torch.load(folder / "last.pt")["model"] for folder in (one, two))
    assert left.keys() == right.keys()                  # nothing is called module.*
    assert all(torch.allclose(left[name], right[name], rtol=0, atol=1e-3) for name in left)


def test_the_first_process_alone_speaks_and_writes(runs):
    one, two, process = runs
    lines = process.stdout.splitlines()
    steps = [line.split("|")[0] for line in lines if line.startswith("step ")]
    assert len(steps) == len(set(steps)) == 10
    assert sum(line.startswith("eval ") for line in lines) == 3
    assert sum(line.startswith("data ") for line in lines) == 1
    assert sum(line.startswith("--- sample") for line in lines) == 3
    assert [row["step"] for row in log_rows(two)] == [row["step"] for row in log_rows(one)]
    names = sorted(path.name for path in two.iterdir())
    assert names == sorted(path.name for path in one.iterdir()) == [".lock", "ckpt.pt", "last.pt", "log.csv"]


def test_another_number_of_processes_goes_on_with_the_same_tokens(runs, tmp_path):
    """Ten steps of two processes, then four of one, against fourteen of one. All other settings are stored."""
    one, two, _ = runs
    for folder in (one, two):
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "last.pt").write_bytes((folder / "last.pt").read_bytes())
        assert main([f"--out_dir={tmp_path / folder.name}", "--init_from=resume", "--max_iters=14"]) == 0
    losses = numbers(tmp_path / one.name, "loss")
    assert len(losses) == 4
    assert numbers(tmp_path / two.name, "loss") == pytest.approx(losses, abs=1e-4)


def test_a_step_that_two_processes_cannot_share_is_refused(data_dir, tmp_path):
    process = torchrun(tmp_path / "two", data_dir, batch_size=3, gradient_accumulation_steps=5)
    assert process.returncode != 0
    line, = {line for line in process.stderr.splitlines() if line.startswith("train.py: ")}     # of either
    assert all(part in line for part in ("batch_size * gradient_accumulation_steps = 15", "2 processes"))
    assert str(ROOT / "train.py") + '", line' not in process.stderr     # no traceback but torchrun's own
    assert not (tmp_path / "two" / "run").exists()
