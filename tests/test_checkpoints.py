"""A run that was stopped, killed or short of disk resumes as if nothing had happened; a damaged file is refused."""

import csv
import errno
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOY, ZYGOTE, contents, flags, inside, log_rows, one_line_error, same_runs, trained

import convert
import sample
import train
from inkling import checkpoint, files
from inkling.checkpoint import load_checkpoint, save_checkpoint
from inkling.cli import UserError
from inkling.device import compiler_missing
from inkling.files import sha256
from inkling.report import COLUMNS, Report
from prepare import write_set

SETTINGS = {
    "muon": dict(),
    "adamw": dict(optimizer="adamw", learning_rate=0.003, weight_decay=0.1),
    "accumulation": dict(batch_size=2, gradient_accumulation_steps=3),
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16"),
    "random": dict(sampling="random"),
    "epochs": dict(batch_size=120),                     # 562 windows to an epoch: it ends in update 5
    "warmup": dict(schedule="cosine", warmup_iters=3, min_lr=0.001, grad_clip=0.5),
    "gpt2": dict(positions="learned", norm="layernorm", norm_gain=True, bias=True, init="gpt2", mlp="gelu",
                 tie_weights=True, qk_norm=False, logit_cap=0, shortcuts=False, attn_dropout=True),
    "seldom": dict(eval_interval=4, log_interval=2),
}


@pytest.fixture
def dropped_out(start):
    """`start`, with dropout, whose random numbers a resumed run has to find again."""
    return partial(start, dropout=0.2)


@pytest.fixture
def interrupted(dropped_out, monkeypatch):
    """interrupted("run", at=4): a run to which SIGTERM comes during update 4, counted from 0."""
    def interrupted(out, at, **settings):
        def signalled_update(run, step):
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(run, step)

        update = train.update
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", signalled_update)
            return dropped_out(out, **settings)
    return interrupted


def step_of(path) -> int:
    return torch.load(path, weights_only=True)["step"]


def unfinished(folder) -> list:
    return [path.name for path in folder.glob("*.tmp")]


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    """A run with dropout that nothing disturbs."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert trained(data_dir, out, dropout=0.2).returncode == 0
    return out


# -- stopping and resuming ---------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_stopped_at_every_update_ends_as_an_unbroken_one(dropped_out, interrupted, tmp_path, settings):
    assert dropped_out("whole", **settings).returncode == 0
    for at in range(TOY["max_iters"]):
        assert interrupted("run", at=at, init_from="auto", **settings).returncode == 143
        assert step_of(tmp_path / "run" / "last.pt") == at + 1          # it finished the step
    assert dropped_out("run", init_from="auto", **settings).returncode == 0
    same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def compiled(data_dir, tmp_path_factory):
    """The folder and the output of a run that is compiled in earnest, model and Muon, and of the same run resumed."""
    if why := compiler_missing("cpu"):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("compiled")
    settings = TOY | dict(n_layer=1, n_embd=64, ffn_dim=64, block_size=128, batch_size=16,
                          gradient_accumulation_steps=2, dropout=0.2, dtype="bfloat16", compile=True)
    done = ZYGOTE.run("compiled", *flags(**settings, data_dir=data_dir), folder=folder, seconds=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_compiled_run_on_two_threads_resumes_as_an_unbroken_one(compiled):
    """The threads compute steps 4 to 6 twice: they would add up the gradient of an embedding's rows in the order in
    which they come."""
    folder, said = compiled
    assert said.count("2 threads; bfloat16; compile on") == 2
    assert "resuming at step 3" in said
    same_runs(folder / "run", folder / "whole")


def test_a_compiled_run_compiles_in_its_first_step_alone(compiled):
    """It compiles before and in that step, and not again, whatever changes later: rate, momentum, micro-batch,
    evaluations and samples between."""
    _, said = compiled
    first, *later = map(int, re.search("graphs (.+)", said)[1].split())
    assert 0 < first < later[0]
    assert len(set(later)) == 1


def test_a_run_from_before_there_were_ngrams_resumes_without_them(start, tmp_path):
    assert start("run", ngrams=0).returncode == 0
    for name in ("ckpt.pt", "last.pt"):
        content = torch.load(tmp_path / "run" / name, weights_only=True)
        content["config"] = {key: value for key, value in content["config"].items() if not key.startswith("ngram")}
        torch.save(content, tmp_path / "run" / name)
    result = start("run", init_from="resume", max_iters=8, ngrams=None, ngram_rows=None)
    assert result.returncode == 0, result.stderr
    assert train.load(tmp_path / "run")[0].ngrams is None


@pytest.mark.parametrize("at", range(TOY["max_iters"]))
def test_resuming_from_any_one_step_gives_the_unbroken_run(dropped_out, interrupted, unbroken, tmp_path, at):
    result = interrupted("run", at=at)
    assert result.returncode == 143
    assert "--init_from=resume" in result.stdout
    assert dropped_out("run", init_from="resume").returncode == 0
    same_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize("moment", ["an evaluation", "a sample", "a report", "a save"])
@pytest.mark.parametrize("occasion", [1, 2, 3])
def test_a_signal_between_updates_loses_nothing(dropped_out, unbroken, monkeypatch, tmp_path, moment, occasion):
    owner, name = {"an evaluation": (train, "estimate_loss"), "a sample": (train, "sample_text"),
                   "a report": (Report, "step"), "a save": (checkpoint, "save_checkpoint")}[moment]
    real, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == occasion:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert dropped_out("run").returncode == 143
    assert dropped_out("run", init_from="resume").returncode == 0
    same_runs(tmp_path / "run", unbroken)


def test_a_finished_run_has_nothing_left_to_do(dropped_out, tmp_path):
    assert dropped_out("run").returncode == 0
    assert torch.load(tmp_path / "run" / "last.pt")["evaluated"] == 6
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    assert dropped_out("run", init_from="resume").returncode == 0
    same_runs(tmp_path / "run", tmp_path / "before")


def test_rows_beyond_the_checkpoint_are_cut_from_the_log(dropped_out, interrupted, unbroken, tmp_path):
    """As a kill leaves it: rows of steps that were not saved, the last one broken off."""
    assert interrupted("run", at=3).returncode == 143
    with open(tmp_path / "run" / "log.csv", "a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerows({key: 1000 + step for key in COLUMNS} | dict(step=step)
                                                for step in (5, 6))
        file.write("7,896,3.1")
    assert dropped_out("run", init_from="resume").returncode == 0
    same_runs(tmp_path / "run", unbroken)


# -- real processes --------------------------------------------------------------------------------------

@contextmanager
def process(tmp_path, data_dir, **settings):
    """train.py in a process of its own, its output a pipe; without matplotlib, which takes long to import."""
    (tmp_path / "without").mkdir(exist_ok=True)
    (tmp_path / "without" / "matplotlib.py").write_text("raise ImportError")
    words = flags(**TOY | dict(data_dir=data_dir, out_dir="run", dropout=0.2, sample_tokens=0) | settings)
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
                                 **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "without")})
    with child:
        yield child
        child.kill()


def wait_for(child, start: str, count: int = 1) -> str:
    """Read the child's output up to its `count`-th line that begins with `start`, and return that line."""
    said = []
    for line in child.stdout:
        said.append(line)
        count -= line.startswith(start)
        if count == 0:
            return line
    raise AssertionError("".join(said))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, data_dir, number, code):
    with process(tmp_path, data_dir, max_iters=100_000, eval_interval=100_000) as child:
        wait_for(child, "step", 2)
        child.send_signal(number)
        rest = child.stdout.read()
        assert child.wait() == code
    stopped = int(re.search(r"stopped +at step (\d+)", rest)[1])
    assert stopped >= 2
    assert step_of(tmp_path / "run" / "last.pt") == stopped


def test_a_second_interrupt_stops_in_the_middle_of_a_step(tmp_path, data_dir):
    """A step of 20,000 micro-batches, which no machine finishes before the second signal."""
    with process(tmp_path, data_dir, gradient_accumulation_steps=20_000) as child:
        wait_for(child, "eval ")
        sent = 0
        while child.poll() is None:                     # a busy machine may merge two signals into one
            child.send_signal(signal.SIGINT)
            sent += 1
            time.sleep(0.3)
        assert sent >= 2                                # the first one waits for the step to end
        assert child.returncode == 130
    assert step_of(tmp_path / "run" / "last.pt") == 0


# -- saving ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moment", ["writing", "flushing", "renaming", "flushing the folder"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_file(monkeypatch, tmp_path, moment):
    path, content = tmp_path / "last.pt", dict(config={}, tokenizer={}, vocab_size=1, model={})
    assert save_checkpoint(content | dict(step=1), path) == ""
    child = os.fork()
    if child == 0:                                      # dies by its own hand, without a word to pytest
        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        def write_half(content, file):
            file.write(path.read_bytes()[:500])
            file.flush()
            die()

        owner, name, fatal = {"writing": (torch, "save", write_half), "flushing": (os, "fsync", die),
                              "renaming": (os, "replace", die),
                              "flushing the folder": (files, "sync_folder", die)}[moment]
        monkeypatch.setattr(owner, name, fatal)
        save_checkpoint(content | dict(step=2), path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(path)["step"] == (2 if moment == "flushing the folder" else 1)
    assert save_checkpoint(content | dict(step=3), path) == ""  # what the kill left is no hindrance
    assert load_checkpoint(path)["step"] == 3
    assert unfinished(tmp_path) == []


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed\n...")]


@pytest.fixture
def failing_saves(monkeypatch):
    """failing_saves({2, 3}, error): from now on the second and third torch.save break off with `error`."""
    def failing_saves(which, error):
        def save(content, file):
            calls.append(content["step"])
            if len(calls) in which:
                file.write(b"half of it")
                raise error
            return real(content, file)

        real, calls = torch.save, []
        monkeypatch.setattr(torch, "save", save)
    return failing_saves


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_failed_save_is_tried_again_and_the_run_continues(start, failing_saves, tmp_path, error):
    assert start("whole", save_interval=1).returncode == 0
    failing_saves({4, 5}, error)
    result = start("run", save_interval=1)
    assert result.returncode == 0                       # later saves succeeded
    said = [line for line in result.stdout.splitlines() if line.startswith("could not write")]
    assert len(said) == 2
    assert all("last.pt" in line and "tries again" in line for line in said)
    same_runs(tmp_path / "run", tmp_path / "whole")
    assert unfinished(tmp_path / "run") == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_run_whose_last_save_failed_leaves_with_4(start, failing_saves, tmp_path, error):
    assert start("run", max_iters=3).returncode == 0
    before = {name: sha256(tmp_path / "run" / name) for name in ("last.pt", "ckpt.pt")}
    failing_saves(range(1, 100), error)
    result = start("run", init_from="resume", max_iters=9, save_interval=1)
    assert result.returncode == 4
    assert "step 9/9" in result.stdout                  # it trained to its end
    assert {name: sha256(tmp_path / "run" / name) for name in before} == before
    assert unfinished(tmp_path / "run") == []


def test_a_best_checkpoint_that_was_not_written_is_not_forgotten(start, failing_saves, evaluations, tmp_path):
    """The only save that fails is that of the best weights, and no better ones follow."""
    evaluations(3.0, 2.0, 2.5)
    failing_saves({4}, ERRORS[0])                       # steps 0 and 3 each save last.pt, then ckpt.pt
    result = start("run")
    assert "ckpt.pt" in result.stdout.split("could not write ")[1].splitlines()[0]
    best = torch.load(tmp_path / "run" / "last.pt")["best_step"]
    assert result.returncode == 4 or step_of(tmp_path / "run" / "ckpt.pt") == best


# -- what is saved ---------------------------------------------------------------------------------------

@pytest.fixture
def evaluations(monkeypatch):
    """evaluations(3.0, 2.0): the val losses that the next evaluations find."""
    def evaluations(*losses):
        found = iter(losses)
        monkeypatch.setattr(train, "estimate_loss", lambda *_, **__: dict(train=1.0, val=next(found)))
    return evaluations


def test_ckpt_holds_the_best_weights_and_last_the_latest(dropped_out, interrupted, evaluations, tmp_path):
    evaluations(3.0, 2.0, 2.5)
    assert dropped_out("run").returncode == 0
    best, last = (torch.load(tmp_path / "run" / name) for name in ("ckpt.pt", "last.pt"))
    assert (best["step"], best["best_step"], best["best_val_loss"]) == (3, 3, 2.0)
    assert (last["step"], last["best_step"], last["best_val_loss"]) == (6, 3, 2.0)
    evaluations(3.0)
    assert interrupted("half", at=2).returncode == 143
    half = torch.load(tmp_path / "half" / "last.pt")    # the weights after 3 updates
    assert all(torch.equal(best["model"][name], half["model"][name]) for name in half["model"])
    assert not all(torch.equal(last["model"][name], half["model"][name]) for name in half["model"])


def test_always_save_checkpoint_keeps_ckpt_at_the_latest_evaluation(start, evaluations, tmp_path):
    evaluations(3.0, 2.0, 2.5)
    assert start("run", always_save_checkpoint=True).returncode == 0
    assert step_of(tmp_path / "run" / "ckpt.pt") == 6
    assert torch.load(tmp_path / "run" / "ckpt.pt")["best_step"] == 3


def test_a_resumed_run_remembers_the_best(start, interrupted, evaluations, tmp_path):
    evaluations(3.0, 2.0)
    assert interrupted("run", at=4).returncode == 143
    best = sha256(tmp_path / "run" / "ckpt.pt")
    evaluations(2.5)
    assert start("run", init_from="resume").returncode == 0
    assert sha256(tmp_path / "run" / "ckpt.pt") == best
    assert torch.load(tmp_path / "run" / "last.pt")["best_val_loss"] == 2.0


def test_both_files_are_plain_and_load_with_weights_only(start, tmp_path):
    assert start("run").returncode == 0

    def check(value):
        if type(value) is dict:
            value = list(value.values())
        if type(value) in (list, tuple):
            return [check(inner) for inner in value]
        assert type(value) in (torch.Tensor, int, float, str, bool, type(None))

    for name in ("last.pt", "ckpt.pt"):
        content = torch.load(tmp_path / "run" / name, weights_only=True)
        check(content)
        assert content["config"]["n_layer"] == 2
        assert content["tokenizer"]["kind"] == "char"
        assert content["losses"].keys() == {"train", "val"}


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_saved_under_their_own_names(start, monkeypatch, toy, tmp_path, compiled):
    """torch.compile wraps the model, whatever its backend; this one needs neither time nor a C++ compiler."""
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    result = start("run", compile=compiled, max_iters=2)
    assert result.returncode == 0
    assert ("compile on" in result.stdout) == compiled
    for name in ("last.pt", "ckpt.pt"):
        content = torch.load(tmp_path / "run" / name)
        assert content["model"].keys() == train.GPT(toy(), content["vocab_size"]).state_dict().keys()
    assert train.load(tmp_path / "run")[0].cfg.n_layer == 2
    assert start("run", compile=compiled, init_from="resume", max_iters=3).returncode == 0


# -- a command that fails ---------------------------------------------------------------------------------

@pytest.fixture
def old_run(start, tmp_path):
    """Its folder. `unmoved(old_run)` is true as long as nothing has happened to it."""
    assert start("run", max_iters=2).returncode == 0
    (tmp_path / "run" / "fingerprint").write_text(repr(fingerprint(tmp_path / "run")))
    return tmp_path / "run"


def fingerprint(folder) -> dict:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())
            if not path.name.startswith(".") and path.name != "fingerprint"}


def unmoved(old_run) -> bool:
    as_it_was = (old_run / "fingerprint").read_text() == repr(fingerprint(old_run))
    return as_it_was and [path.name for path in old_run.parent.glob("run*")] == ["run"]


def fail_with(error):
    def fail(*_, **__):
        raise error
    return fail


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("training", [True, False], ids=["a step", "an evaluation"])
def test_memory_is_tried_before_an_old_run_is_moved(start, monkeypatch, old_run, training):
    forward = train.GPT.forward

    def full(model, *arguments):
        if model.training == training:
            raise NO_MEMORY
        return forward(model, *arguments)
    monkeypatch.setattr(train.GPT, "forward", full)
    one_line_error(start("run"), "out of memory", "what run holds is kept")
    assert unmoved(old_run)


def test_a_batch_beyond_the_memory_has_moved_nothing(data_dir, old_run):
    settings = TOY | dict(data_dir=data_dir, out_dir="run", batch_size=20_000)
    done = ZYGOTE.run("train.py", *flags(**settings), folder=old_run.parent, memory=300_000_000)
    one_line_error(done, "out of memory", "batch_size")
    assert unmoved(old_run)


def test_the_way_out_of_a_lack_of_memory_works(start, monkeypatch, tmp_path):
    """Where nothing was saved there is nothing to resume."""
    monkeypatch.setattr(train.GPT, "forward", fail_with(NO_MEMORY))
    done = start("run", eval_only=True)
    one_line_error(done, "out of memory", "batch_size")
    assert "resume" not in done.stderr


@pytest.mark.parametrize("settings", [
    dict(sample_start="§"), dict(dataset="nowhere"), dict(device="cuda:77"), dict(n_head=3), dict(batch_size=0),
    dict(init_from="nowhere.pt"), dict(max_epochs=1.0, max_minutes=1.0)], ids=str)
def test_a_wrong_setting_has_moved_nothing(start, old_run, settings):
    one_line_error(start("run", **settings))
    assert unmoved(old_run)


def test_a_disk_without_room_has_moved_nothing(data_dir, old_run):
    done = ZYGOTE.run("train.py", *flags(**TOY, data_dir=data_dir, out_dir="run"), folder=old_run.parent, room=0)
    one_line_error(done, "cannot write run/log.csv", "File too large")
    assert unmoved(old_run)
    assert not (old_run / ".trial").exists()


def test_a_folder_that_cannot_be_renamed_stays(start, monkeypatch, old_run):
    monkeypatch.setattr(os, "rename", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    one_line_error(start("run"), "run holds a run and cannot be renamed (Permission denied)", "--out_dir")
    assert unmoved(old_run)


def test_a_new_folder_that_cannot_be_made_brings_the_old_one_back(start, monkeypatch, old_run):
    lock_folder, calls = files.lock_folder, []

    def second_fails(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise UserError("cannot use the folder run: Disk quota exceeded: name another")
        return lock_folder(folder)
    monkeypatch.setattr(checkpoint, "lock_folder", second_fails)
    one_line_error(start("run"), "Disk quota exceeded")
    assert unmoved(old_run)


def test_a_log_that_cannot_be_opened_brings_the_old_run_back(start, monkeypatch, old_run):
    monkeypatch.setattr(train.Report, "open", fail_with(UserError("cannot write run/log.csv: Disk quota exceeded")))
    one_line_error(start("run"), "Disk quota exceeded")
    assert unmoved(old_run)


def test_a_folder_that_another_process_takes_meanwhile_is_its_own(start, monkeypatch, old_run):
    lock_folder, calls = files.lock_folder, []

    def another_was_faster(folder):
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir()
            raise UserError("run is in use by another process: wait for it")
        return lock_folder(folder)
    monkeypatch.setattr(checkpoint, "lock_folder", another_was_faster)
    one_line_error(start("run"), "in use", "the old run is now in run.1")
    assert list(old_run.iterdir()) == []


def test_ctrl_c_while_it_is_tried_has_moved_nothing(start, monkeypatch, old_run):
    monkeypatch.setattr(train, "estimate_loss", fail_with(KeyboardInterrupt))
    assert start("run").returncode == 130
    assert unmoved(old_run)


def test_what_was_tried_leaves_no_trace_in_the_run(start, old_run, tmp_path):
    moved = start("run", dropout=0.2)
    assert "run holds a run: moved to run.1" in moved.stdout
    assert "disk     old runs are never deleted; 1 old run of this name takes" in moved.stdout
    assert "rm -r run.1\n" in moved.stdout
    assert start("fresh", dropout=0.2).returncode == 0
    same_runs(tmp_path / "run", tmp_path / "fresh")


def test_an_import_that_cannot_be_saved_brings_the_old_run_back(monkeypatch, old_run):
    content = load_checkpoint(old_run / "ckpt.pt")
    monkeypatch.setattr(convert, "import_model", lambda *_: content)
    monkeypatch.setattr(torch, "save", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    one_line_error(inside(convert.main, "import", "there", "--out=run"), "No space left on device")
    assert unmoved(old_run)


# -- resuming with other settings ------------------------------------------------------------------------

@pytest.fixture
def stopped(interrupted, tmp_path):
    """The folder of a run that was stopped after 4 of its 6 steps."""
    assert interrupted("run", at=3).returncode == 143
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "value", "old"), [
    ("n_layer", 3, 2), ("n_head", 4, 2), ("n_embd", 64, 32), ("block_size", 16, 32), ("mlp", "gelu", "relu2"),
    ("tie_weights", True, False), ("optimizer", "adamw", "muon"), ("dataset", "other", "toy")])
def test_a_changed_model_or_data_field_is_refused(start, stopped, name, value, old):
    before = sha256(stopped / "last.pt")
    result = start("run", **dict(init_from="resume", init="gpt2") | {name: value})
    one_line_error(result, f"{name}={value}", str(old), "last.pt")
    assert sha256(stopped / "last.pt") == before


def test_another_batch_size_keeps_the_count_of_tokens(start, stopped):
    """4 steps of 4 sequences, then 2 of 16."""
    result = start("run", init_from="resume", batch_size=8, gradient_accumulation_steps=2)
    assert result.returncode == 0
    tokens = {int(row["step"]): int(row["tokens"]) for row in log_rows(stopped)}
    assert tokens == {0: 0, 1: 128, 2: 256, 3: 384, 4: 512, 5: 1024, 6: 1536}
    for name in ("last.pt", "ckpt.pt"):
        content = load_checkpoint(stopped / name)
        assert content["tokens"] == tokens[content["step"]]
    assert "speed    1.54k tokens" in result.stdout
    assert "note     a step reads 16 windows, before it read 4" in result.stdout


def test_a_checkpoint_from_before_tokens_were_counted_gets_those_of_its_own_batch(start, stopped):
    for name in ("last.pt", "ckpt.pt"):
        content = torch.load(stopped / name)
        del content["tokens"]
        torch.save(content, stopped / name)
        assert load_checkpoint(stopped / name)["tokens"] == 128 * content["step"]
    assert start("run", init_from="resume", batch_size=8).returncode == 0
    assert [int(row["tokens"]) for row in log_rows(stopped)][-1] == 4 * 128 + 2 * 256


@pytest.mark.parametrize("tokens", [-1, "512", 1.5, None], ids=str)
def test_a_count_of_tokens_that_is_none_is_refused(stopped, tokens):
    content = torch.load(stopped / "last.pt") | {"tokens": tokens}
    torch.save(content, stopped / "last.pt")
    with pytest.raises(UserError, match="tokens"):
        load_checkpoint(stopped / "last.pt", resumable=True)


@pytest.fixture
def resume_with_file(start, tmp_path):
    """resume_with_file("n_layer = 3"): stdout of a resumed run with this config file, up to its banner."""
    def resume(lines: str, *words, **settings):
        (tmp_path / "mine.py").write_text(lines, encoding="utf-8")
        values = dict.fromkeys(TOY, None) | dict(init_from="resume", device="cpu") | settings
        done = start("run", "mine.py", *words, **values)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("data  ")[0]
    return resume


def test_a_config_file_that_was_edited_is_not_ignored_without_a_word(resume_with_file, stopped):
    said = resume_with_file("learning_rate = 0.01\nmomentum = 0.95\nbatch_size = 4\nout_dir = 'elsewhere'")
    assert said == ("kept     from run/last.pt, not from mine.py: learning_rate=0.02 (not 0.01); "
                    "a flag changes learning_rate\n")


def test_a_config_file_cannot_change_the_model_of_a_run(resume_with_file, stopped):
    said = resume_with_file("learning_rate = 0.01\nn_layer = 3\ndataset = 'other'")
    assert said == ("kept     from run/last.pt, not from mine.py: dataset=toy (not other), "
                    "learning_rate=0.02 (not 0.01), n_layer=2 (not 3); a flag changes learning_rate; "
                    "only a run from scratch has another dataset or n_layer\n")


def test_a_flag_beats_the_file_and_says_what_it_changes(resume_with_file, stopped):
    said = resume_with_file("learning_rate = 0.01", learning_rate=0.01)
    assert said == "changed  since the run was saved: learning_rate 0.02 -> 0.01\n"
    assert resume_with_file("learning_rate = 0.01") == ""


def test_a_config_file_cannot_change_the_model_it_starts_from(resume_with_file, stopped):
    said = resume_with_file("n_layer = 3\nlearning_rate = 0.01", init_from="run/ckpt.pt", out_dir="tuned", **{
        name: value for name, value in TOY.items() if name not in ("n_layer", "device")})
    assert said == ("kept     from run/ckpt.pt, not from mine.py: n_layer=2 (not 3); only a run from scratch has "
                    "another n_layer\n")


def test_a_changed_learning_rate_is_accepted_printed_and_used(start, stopped):
    result = start("run", init_from="resume", learning_rate=0.003)
    assert result.returncode == 0
    changed, = [line for line in result.stdout.splitlines() if "0.02 -> 0.003" in line]
    assert "learning_rate" in changed
    rates = {row["step"]: float(row["lr"]) for row in log_rows(stopped) if row["lr"]}
    cfg = train.Config()
    assert rates["4"] == pytest.approx(0.02 * train.lr_factor(3, cfg, [[0, 6]]))
    assert rates["5"] == pytest.approx(0.003 * train.lr_factor(4, cfg, [[0, 6]]))


def test_rates_of_zero_on_resume_leave_the_weights_where_they_are(start, stopped):
    """The optimizers' own state also holds the old rates, which must not come back with it."""
    before = torch.load(stopped / "last.pt")["model"]
    rates = dict(learning_rate=0, embed_lr=0, ngram_lr=0, head_lr=0, scalar_lr=0)
    assert start("run", init_from="resume", **rates).returncode == 0
    after = torch.load(stopped / "last.pt")
    assert after["step"] == 6
    assert all(torch.equal(before[name], after["model"][name]) for name in before)


def test_other_optimizer_settings_are_used_on_resume(start, stopped):
    settings = dict(weight_decay=0.25, momentum=0.5, beta1=0.75, beta2=0.875)
    assert start("run", init_from="resume", **settings).returncode == 0
    adamw, muon, row_adam = (stored["param_groups"] for stored in torch.load(stopped / "last.pt")["optimizers"])
    assert all(tuple(group["betas"]) == (0.75, 0.875) for group in adamw)
    assert all((group["weight_decay"], group["momentum"]) == (0.25, 0.5) for group in muon)
    assert [group["beta2"] for group in row_adam] == [0.875]


def test_the_decay_of_the_ngrams_stays_as_it_was_decided_unless_it_is_typed(start, stopped):
    def decay() -> float:
        *_, row_adam = torch.load(stopped / "last.pt")["optimizers"]
        return row_adam["param_groups"][0]["weight_decay"]

    decided = decay()
    assert start("run", init_from="resume", batch_size=8).returncode == 0
    assert decay() == decided
    assert start("run", init_from="resume", max_iters=8, batch_size=8, ngram_decay="auto").returncode == 0
    assert decay() == pytest.approx(2 * decided, rel=0.1)
    assert start("run", init_from="resume", max_iters=9, batch_size=8, ngram_lr=0.005).returncode == 0
    assert decay() == pytest.approx(20 * decided, rel=0.1)
    assert start("run", init_from="resume", max_iters=10, ngram_decay=0.5).returncode == 0
    assert decay() == 0.5


def test_a_config_file_changes_nothing_that_is_stored(stopped, unbroken, tmp_path):
    (tmp_path / "other.py").write_text("seed = 5\nn_layer = 3\nlearning_rate = 9.0\n")
    assert train.main(["other.py", "--init_from=resume", "--out_dir=run"]) == 0
    same_runs(stopped, unbroken)


def test_more_steps_than_before_are_made(start, stopped):
    assert start("run", init_from="resume", max_iters=9).returncode == 0
    assert step_of(stopped / "last.pt") == 9


def test_another_number_of_threads_is_said(start, stopped):
    """A CPU's sums depend on it, so that the run will not be the same to the last bit."""
    content = torch.load(stopped / "last.pt")
    torch.save(content | dict(threads=77), stopped / "last.pt")
    result = start("run", init_from="resume")
    assert result.returncode == 0
    assert any("77" in line and "threads" in line for line in result.stdout.splitlines())


def test_epochs_set_the_number_of_steps(start, tmp_path):
    """562 windows of 32 in 18,000 tokens, 8 to a step."""
    settings = dict(max_iters=999, gradient_accumulation_steps=2, eval_interval=100, sample_tokens=0)
    assert start("run", max_epochs=0.1, **settings).returncode == 0
    assert step_of(tmp_path / "run" / "last.pt") == 7
    assert start("run", max_epochs=0.2, init_from="resume", **settings).returncode == 0
    assert step_of(tmp_path / "run" / "last.pt") == 14
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run") if row["lr"]]
    assert rates[-1] < 0.3 * rates[7]                   # the schedule ends there, too


# -- damaged and hostile files ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def healthy(data_dir, tmp_path_factory):
    """A finished run, whose files are copied before they are damaged."""
    out = tmp_path_factory.mktemp("healthy") / "run"
    assert trained(data_dir, out, max_iters=2, sample_tokens=0).returncode == 0
    return out


def refused(start, out, *parts: str):
    """The file is refused wherever one can be given: to go on with, to start from, to sample from."""
    for name in ("last.pt", "ckpt.pt"):
        shutil.copy(out / "damaged", out / name)
    for init_from in ("resume", "auto", out / "damaged"):
        one_line_error(start(out, init_from=init_from), *parts)
    done = inside(sample.main, f"--out_dir={out}", "--device=cpu")
    assert done.returncode == 2
    assert done.stdout == ""
    _, message = done.stderr.splitlines()               # after the line that names the checkpoint
    assert all(part in message for part in parts)


@pytest.fixture
def damaged(start, tmp_path):
    """damaged(content): a file with this content, be it bytes or something to save, is refused."""
    (tmp_path / "run").mkdir()

    def damaged(content, *parts):
        path = tmp_path / "run" / "damaged"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(start, tmp_path / "run", *parts)
    return damaged


@pytest.mark.parametrize("part", range(100))
def test_a_truncated_checkpoint_is_refused(healthy, damaged, part):
    whole = (healthy / "last.pt").read_bytes()
    damaged(whole[:random.Random(part).randrange(len(whole))] if part else b"", "damaged")


def payload(path) -> list:
    """The offsets of a checkpoint's bytes that hold its content, and not the zip's own structure."""
    raw, offsets = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name, extra = (int.from_bytes(raw[entry.header_offset + at:][:2], "little") for at in (26, 28))
            first = entry.header_offset + 30 + name + extra
            offsets += range(first, first + entry.file_size)
    return offsets


@pytest.mark.parametrize("part", range(20))
def test_a_flipped_bit_is_refused_everywhere(healthy, damaged, part):
    chance, raw = random.Random(part), bytearray((healthy / "last.pt").read_bytes())
    raw[chance.choice(payload(healthy / "last.pt"))] ^= 1 << chance.randrange(8)
    damaged(bytes(raw), "damaged")


def test_500_flipped_bytes_are_noticed(healthy, tmp_path):
    chance, whole, path = random.Random(0), (healthy / "last.pt").read_bytes(), tmp_path / "flipped.pt"
    for place in chance.sample(payload(healthy / "last.pt"), 500):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ chance.randrange(1, 256)]) + whole[place + 1:])
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)


def test_a_bit_flipped_anywhere_is_refused_or_without_effect(healthy, tmp_path):
    """Outside the content, in the zip's padding for example, a bit may mean nothing."""
    chance, good = random.Random(0), contents(healthy / "ckpt.pt")
    noticed = 0
    for _ in range(60):
        raw = bytearray((healthy / "ckpt.pt").read_bytes())
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(raw)
        try:
            load_checkpoint(tmp_path / "flipped.pt")
        except UserError:
            noticed += 1
        else:
            assert contents(tmp_path / "flipped.pt") == good
    assert noticed > 30


class Evil:
    """Unpickled, it makes a file named `ran`."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("shape", ["zip", "plain pickle", "inside a checkpoint", "as weights"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(healthy, damaged, tmp_path, shape):
    good = torch.load(healthy / "last.pt")
    damaged({"zip": Evil(), "plain pickle": pickle.dumps(Evil()), "as weights": good | dict(model=Evil()),
             "inside a checkpoint": good | dict(losses=Evil())}[shape])
    assert list(tmp_path.rglob("ran")) == []
    pickle.loads(pickle.dumps(Evil())).close()          # with pickle alone it would have
    assert (tmp_path / "ran").exists()


def test_a_compressed_archive_is_refused(healthy, damaged, tmp_path):
    """torch.save never compresses; a file of a few kB could otherwise fill the memory."""
    with zipfile.ZipFile(healthy / "last.pt") as old, \
            zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    damaged((tmp_path / "small").read_bytes(), "compressed")


def test_an_archive_that_lists_its_entries_again_and_again_is_refused(healthy, damaged, tmp_path):
    """To check them all would take hours."""
    shutil.copy(healthy / "last.pt", tmp_path / "again")
    with zipfile.ZipFile(tmp_path / "again", "a") as archive:
        archive.filelist.extend(1000 * [archive.filelist[0]])
        archive._didModify = True                       # so that its list is written anew
    damaged((tmp_path / "again").read_bytes(), "larger than the file")


NO_CHECKPOINTS = {
    "nothing": {}, "a tensor": torch.zeros(3), "a list": [1, 2], "a number": 1, "a text": "weights",
    "bare weights": {"wte.weight": torch.zeros(3, 2)},
    "another format": dict(format=99, config={}, tokenizer={}, model={}, vocab_size=3, step=1),
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_something_else_that_torch_saved_is_refused(damaged, content):
    damaged(content, "not an Inkling checkpoint")


def test_a_checkpoint_of_nanogpt_cannot_be_resumed_and_convert_is_named(damaged, start, tmp_path):
    content = dict(model={}, optimizer={}, model_args=dict(n_layer=2), iter_num=5, config={})
    damaged(content, "nanoGPT")
    shutil.copy(tmp_path / "run" / "damaged", tmp_path / "run" / "last.pt")
    one_line_error(start("run", init_from="resume"), "python convert.py import", "last.pt")


def test_files_that_are_no_archives_are_refused(damaged):
    for content in (bytes(1000), b"# Inkling\n", b"PK\x03\x04" + bytes(100), random.Random(0).randbytes(50)):
        damaged(content, "not a checkpoint")


@pytest.mark.parametrize("changes", [
    dict(config=dict(n_layer=3)), dict(config=dict(n_embd=64)), dict(config=dict(bias=True)),
    dict(config=dict(n_head=3)), dict(config=dict(n_head=0)), dict(config=dict(n_layer="two")),
    dict(config=dict(n_layers=2)), dict(vocab_size=60), dict(tokenizer=dict(kind="byte")),
    dict(tokenizer=dict(kind="runes")), dict(tokenizer=dict(kind="char", chars=7)),
    dict(model={}), dict(model={"wte.weight": 1}), dict(model={"wte.weight": torch.zeros(2, 2)})], ids=str)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(healthy, damaged, changes):
    content = torch.load(healthy / "last.pt")
    for key, value in changes.items():
        content[key] = content[key] | value if key == "config" else value
    damaged(content)


@pytest.mark.parametrize("key", ["format", "config", "tokenizer", "vocab_size", "step", "model"])
def test_a_checkpoint_without_a_part_is_refused(healthy, damaged, key):
    content = torch.load(healthy / "last.pt")
    del content[key]
    damaged(content)


@pytest.mark.parametrize("key", ["evaluated", "best_step", "best_val_loss", "losses", "optimizers", "scaler"])
def test_a_run_resumes_only_with_all_that_it_needs(start, healthy, tmp_path, key):
    """ckpt.pt, which holds no optimizer state, is one of these; it is for sampling and for new runs."""
    content = torch.load(healthy / "last.pt")
    del content[key]
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    one_line_error(start("run", init_from="resume"))


@pytest.mark.parametrize("field", ["n_layer", "block_size"])
@pytest.mark.parametrize("init_from", ["resume", "run/last.pt"])
def test_a_config_without_a_field_of_the_model_is_refused(start, healthy, tmp_path, field, init_from):
    content = torch.load(healthy / "last.pt")
    del content["config"][field]
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    result = start("run" if init_from == "resume" else "new", init_from=init_from)
    assert (result.returncode, len(result.stderr.splitlines())) in [(2, 1), (0, 0)]


def test_a_missing_checkpoint_is_named(start, tmp_path):
    one_line_error(start("run", init_from="resume"), "run/last.pt")
    one_line_error(start("run", init_from="no/such.pt"), "no/such.pt")
    one_line_error(start("run", init_from=tmp_path), str(tmp_path))


# -- numbers that are not finite -------------------------------------------------------------------------

def bad_gradient(factor: float):
    def spoil(loss):
        loss.register_hook(lambda gradient: gradient * factor)
        return loss
    return spoil


@pytest.fixture
def spoiled(monkeypatch):
    """spoiled(4, change): the fourth micro-batch's loss goes through `change`. Returns the runs that begin."""
    def spoiled(which, change):
        real, calls = F.cross_entropy, []
        start, runs = train.start, []
        update, updates = train.update, []

        def noted_update(*args):
            updates.append(args)
            return update(*args)

        def cross_entropy(*args, **kwargs):
            loss = real(*args, **kwargs)
            if not (updates and torch.is_grad_enabled()):       # the pace is measured, or an evaluation
                return loss
            calls.append(which)
            return change(loss) if len(calls) == which else loss

        def noted_start(*args):
            runs.append(start(*args))
            return runs[-1]

        monkeypatch.setattr(F, "cross_entropy", cross_entropy)
        monkeypatch.setattr(train, "start", noted_start)
        monkeypatch.setattr(train, "update", noted_update)
        return runs
    return spoiled


@pytest.mark.parametrize("settings", [
    dict(), dict(optimizer="adamw"), dict(grad_clip=1.0), dict(dtype="bfloat16")], ids=str)
@pytest.mark.parametrize("change", [lambda loss: loss * math.nan, lambda loss: loss * math.inf,
                                    bad_gradient(math.nan), bad_gradient(math.inf)],
                         ids=["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_what_is_not_finite_stops_the_run_before_the_update(start, spoiled, tmp_path, change, settings):
    runs = spoiled(5, change)
    result = start("run", save_interval=1, **settings)
    assert result.returncode == 3
    message, = result.stderr.splitlines()
    assert "step 5" in message
    assert "--learning_rate" in message
    last, ckpt = (torch.load(tmp_path / "run" / name) for name in ("last.pt", "ckpt.pt"))
    assert (last["step"], ckpt["step"]) == (4, 3)
    held = runs[0].model.state_dict()
    assert all(torch.equal(held[name], last["model"][name]) for name in held)       # no update was made
    for place, value in contents(tmp_path / "run" / "last.pt").items():
        assert not isinstance(value, float) or math.isfinite(value), place
    for stored in (last["model"], ckpt["model"], *last["optimizers"][0]["state"].values()):
        assert all(torch.isfinite(value).all() for value in stored.values())


def test_weights_that_are_not_finite_are_never_written(start, spoiled, tmp_path, monkeypatch):
    """As an update with finite gradients might make them: the run stops at its next look, the old file stays."""
    def step(optimizer):
        real(optimizer)
        optimizer.param_groups[0]["params"][0].data[0] = math.nan

    real = train.Muon.step
    with monkeypatch.context() as patch:
        patch.setattr(train.Muon, "step", step)
        result = start("run", max_iters=2, eval_interval=1, save_interval=1)
    assert result.returncode == 3
    assert "did not write run/last.pt: the weights are not finite" in result.stdout
    assert (step_of(tmp_path / "run" / "last.pt"), step_of(tmp_path / "run" / "ckpt.pt")) == (0, 0)
    assert start("run", init_from="resume", max_iters=2).returncode == 0


def test_one_bad_micro_batch_is_enough(start, spoiled, tmp_path):
    spoiled(6, lambda loss: loss * math.nan)
    assert start("run", gradient_accumulation_steps=4, save_interval=1).returncode == 3
    assert step_of(tmp_path / "run" / "last.pt") == 1


def test_a_stopped_run_resumes_where_it_was(start, spoiled, tmp_path):
    assert start("whole").returncode == 0
    spoiled(5, bad_gradient(math.nan))                  # the fifth in all, so that the resumed run is spared
    assert start("run").returncode == 3
    assert start("run", init_from="resume").returncode == 0
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_an_overflow_in_float16_is_skipped(start, spoiled, tmp_path):
    """The GradScaler makes gradients as large as it can. It costs a step left out and half the scale."""
    spoiled(5, bad_gradient(math.inf))
    assert start("run", dtype="float16").returncode == 0
    last = torch.load(tmp_path / "run" / "last.pt")
    assert last["step"] == 6
    assert last["scaler"]["scale"] == 2**15             # it starts at 2^16
    assert all(torch.isfinite(value).all() for value in last["model"].values())


def test_gradients_that_are_never_finite_are_no_overflow(start, monkeypatch, tmp_path):
    """Halving the scale does not help: the run must not go on for ever without learning."""
    change, real = bad_gradient(math.nan), F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy",
                        lambda *args: change(real(*args)) if torch.is_grad_enabled() else real(*args))
    done = start("run", dtype="float16", max_iters=40, eval_interval=40)
    assert done.returncode == 3
    assert 15 <= len([row for row in log_rows(tmp_path / "run") if row["loss"]]) <= 18     # from 2^16 to below 1


def test_a_loss_of_nan_stops_in_float16_too(start, spoiled):
    spoiled(5, lambda loss: loss * math.nan)
    assert start("run", dtype="float16").returncode == 3


def test_a_data_set_that_has_changed_under_a_run_is_refused(start, tmp_path):
    text = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:20_000]
    for name in ("one", "two"):
        (tmp_path / "text.txt").write_text(text if name == "one" else text[::-1], encoding="utf-8")
        write_set(tmp_path / "data" / "mine", [tmp_path / "text.txt"], "char", 0.1)
        settings = dict(dataset="mine", data_dir=tmp_path / "data")
        if name == "one":
            assert start("run", **settings).returncode == 0
    one_line_error(start("run", init_from="resume", max_iters=8, **settings), "mine has changed since the run began")


def test_typed_max_iters_win_over_stored_max_epochs(start, tmp_path):
    assert start("run", max_epochs=0.05).returncode == 0
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert start("run", "--init_from=resume", f"--max_iters={stored['step'] + 2}").returncode == 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == stored["step"] + 2
