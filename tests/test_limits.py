"""Limits on a run: minutes, numbered checkpoints, memory, and a device that computes something wrong."""

import re
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import log_rows, one_line_error

import train
from inkling import checkpoint as checkpoint_module
from inkling import device as device_module
from inkling import distributed as distributed_module
from inkling import stopping as stopping_module
from train import GPT


class Clock:
    """Stands in for the time module: nothing passes but what a test adds."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(runtime.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(runtime.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def paced(clock, monkeypatch):
    """Evaluations take 5 seconds, and steps as long as paced.step says: 10 for the first, which compiles, then 1."""
    pace = types.SimpleNamespace(step=lambda step: 1.0)
    original, evaluate = train.window_starts, train.estimate_loss

    def starts(step, *rest):
        clock.now += 10 if step == 0 else pace.step(step)
        return original(step, *rest)

    def estimate(*args):
        clock.now += 5
        return evaluate(*args)
    monkeypatch.setattr(train, "window_starts", starts)
    monkeypatch.setattr(train, "estimate_loss", estimate)
    return pace


def last_step(folder) -> int:
    return int(log_rows(folder)[-1]["step"])


# Minutes

def test_max_minutes_fit_the_steps_to_the_time_once(start, clock, paced, tmp_path):
    begin = clock.now
    done = start("run", max_minutes=5, max_iters=None, eval_interval=20)
    assert done.returncode == 0, done.stderr
    count = int(re.search(r"max_iters=(\d+)", done.stdout[done.stdout.index("time "):])[1])
    assert last_step(tmp_path / "run") == count == torch.load(tmp_path / "run" / "last.pt")["config"]["max_iters"]
    assert 300 * 0.9 < clock.now - begin <= 300
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run") if row["lr"]]
    assert rates[0] == rates[count // 10] == max(rates)     # flat, then down to nearly nothing: fitted to the count
    assert rates[-1] < 0.02 * rates[0]
    assert f"{count}/{count}" in done.stdout
    assert str(checkpoint_module.OPEN) not in done.stdout


def test_a_run_fitted_to_minutes_goes_on_as_an_ordinary_one(start, clock, paced, tmp_path):
    """Cut before its length is known, or after, a run of the same pace comes to the same steps and weights."""
    assert start("whole", max_minutes=5, max_iters=None, eval_interval=20).returncode == 0
    whole = torch.load(tmp_path / "whole" / "last.pt")
    for cut in (60, 130):
        until = clock.now + cut

        def step(_, until=until):
            if clock.now > until:
                raise KeyboardInterrupt
            return 1.0
        paced.step = step
        with pytest.raises(KeyboardInterrupt):
            start(f"cut{cut}", max_minutes=5, max_iters=None, eval_interval=20, save_interval=10)
        paced.step = lambda step: 1.0
        done = start(f"cut{cut}", "--init_from=resume", max_iters=None, eval_interval=20)
        assert done.returncode == 0, done.stderr
        resumed = torch.load(tmp_path / f"cut{cut}" / "last.pt")
        assert "time     for" not in done.stdout
        assert resumed["config"]["max_iters"] == whole["config"]["max_iters"] == resumed["step"]
        assert all(torch.equal(resumed["model"][name], whole["model"][name]) for name in whole["model"])


def test_a_run_that_slows_down_is_stopped_when_its_time_is_over(start, clock, paced, tmp_path):
    begin = clock.now
    paced.step = lambda step: 1.0 if step < 50 else 4.0
    done = start("run", max_minutes=5, max_iters=None, eval_interval=20)
    assert done.returncode == 0
    assert 300 <= clock.now - begin < 310
    saved = torch.load(tmp_path / "run" / "last.pt")
    assert saved["step"] == last_step(tmp_path / "run") < saved["config"]["max_iters"]
    assert "max_minutes=5 are over" in done.stdout
    assert "--init_from=resume" in done.stdout
    paced.step = lambda step: 1.0
    assert start("run", "--init_from=resume", max_iters=None, eval_interval=20).returncode == 0
    assert last_step(tmp_path / "run") == saved["config"]["max_iters"]


def test_typed_max_iters_stand_and_the_time_only_stops(start, clock, paced, tmp_path):
    done = start("run", max_minutes=5, max_iters=7)
    assert last_step(tmp_path / "run") == 7
    assert "time     for" not in done.stdout
    begin = clock.now
    assert start("long", max_minutes=2, max_iters=1000, eval_interval=1000).returncode == 0
    assert clock.now - begin < 130
    assert torch.load(tmp_path / "long" / "last.pt")["config"]["max_iters"] == 1000


def test_the_time_may_end_before_the_pace_is_known(start, clock, paced, tmp_path):
    paced.step = lambda step: 50.0
    assert start("run", max_minutes=1, max_iters=None).returncode == 0
    assert torch.load(tmp_path / "run" / "last.pt")["step"] >= 1


def test_two_lengths_are_refused(start):
    one_line_error(start("run", max_minutes=1, max_epochs=1), "max_epochs", "max_minutes")


def test_compiling_must_pay_within_the_minutes(clock):
    def run_once(_):
        clock.now += 1
    ranks = distributed_module.Ranks()
    pays = [device_module.compile_pays("auto", None, run_once, 1000, "cpu", ranks, stopping_module.Deadline(minutes))
            for minutes in (0, 1, 30)]
    assert pays == [True, False, True]


# Numbered checkpoints

def test_keep_leaves_the_checkpoints_of_the_latest_evaluations(start, tmp_path):
    start("run", max_iters=8, eval_interval=2, save_interval=1, keep=2)
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pt"))
    assert names == ["ckpt.pt", "last-6.pt", "last-8.pt", "last.pt"]
    for step in (6, 8):
        assert torch.load(tmp_path / "run" / f"last-{step}.pt")["step"] == step
    start("all", max_iters=12, eval_interval=2, keep=100)
    assert len(list((tmp_path / "all").glob("last-*.pt"))) == 7


@pytest.mark.parametrize("links", [True, False])
def test_one_can_go_back_to_a_numbered_checkpoint(start, monkeypatch, tmp_path, links):
    if not links:                                       # as on a file system of a memory card
        def link(*_):
            raise PermissionError("no links here")
        monkeypatch.setattr(runtime.os, "link", link)
    start("run", max_iters=8, eval_interval=2, keep=9)
    end = torch.load(tmp_path / "run" / "last.pt")["model"]
    (tmp_path / "run" / "last.pt").write_bytes((tmp_path / "run" / "last-4.pt").read_bytes())
    done = start("run", "--init_from=resume", max_iters=8, eval_interval=2)
    assert "going on at step 4" in done.stdout
    again = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(again[name], end[name]) for name in end)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_disk_too_full_for_a_numbered_checkpoint_is_said(start, monkeypatch, tmp_path):
    def no_room(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(runtime.os, "link", no_room)
    monkeypatch.setattr(runtime.shutil, "copyfileobj", no_room)
    done = start("run", keep=2)
    assert "No space left on device" in done.stdout
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 6


# Memory

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_and_keeps_the_last_checkpoint(start, monkeypatch, tmp_path, error):
    forward, calls = GPT.forward, []

    def full(model, *args):
        calls.append(model.training)
        if sum(calls) > 4:
            raise type(error)(*error.args)
        return forward(model, *args)
    monkeypatch.setattr(GPT, "forward", full)
    one_line_error(start("run"), "out of memory", "batch_size", "block_size", "gradient_accumulation_steps")
    monkeypatch.setattr(GPT, "forward", forward)
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 3
    assert "done     6 steps" in start("run", "--init_from=resume").stdout


def test_other_errors_are_not_taken_for_a_lack_of_memory(start, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        start("run")


# A device that computes something wrong

@pytest.mark.parametrize("wrong", ["nothing", "the loss", "a gradient"])
def test_a_device_that_differs_from_the_cpu_is_named(toy, monkeypatch, capsys, wrong):
    """The comparison runs the first copy as the device's: here a norm goes wrong in it."""
    model, calls, original = GPT(toy(), 59), [], F.rms_norm
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.2 * grad

    def rms_norm(x, *args, **options):
        calls.append(1)
        y = original(x, *args, **options)
        if len(calls) == 3 and wrong == "the loss":
            return 0.5 * y
        return WrongGradient.apply(y) if len(calls) == 3 and wrong == "a gradient" else y
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    x = torch.arange(64).view(2, 32) % 59
    device_module.compare_with_cpu(model, x, x.flip(1), "cpu")
    said = capsys.readouterr().out
    assert calls
    assert ("computes something wrong" in said) == (wrong != "nothing"), said
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_activation_checkpointing_computes_blocks_again_to_the_same_gradients(toy):
    """Dropout included: its random numbers are drawn again as they were."""
    gradients, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = GPT(toy(activation_checkpointing=again, dropout=0.3, init="gpt2"), 59)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, again=again: calls.append(again))
        x = torch.arange(64).view(2, 32) % 59
        model(x, x.flip(1))[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls.count(False) == 2
    assert calls.count(True) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_a_killed_process_left_half_written_goes_at_the_next_start(start, tmp_path):
    start("run")
    for name in ("last.pt.tmp", "ckpt.pt.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    assert start("run", "--init_from=resume").returncode == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_going_back_keeps_the_newer_checkpoints_whatever_their_steps(start, tmp_path):
    run = tmp_path / "run"
    start("run", max_iters=8, eval_interval=2, keep=4)
    (run / "last.pt").write_bytes((run / "last-2.pt").read_bytes())
    start("run", "--init_from=resume", "--keep=2", max_iters=6, eval_interval=2, learning_rate=0.001)
    assert sorted(path.name for path in run.glob("last-*.pt")) == ["last-4.pt", "last-6.pt"]


def test_a_run_that_another_process_has_gone_on_with_is_left_alone(start, monkeypatch, tmp_path):
    start("run", max_iters=3)
    ensure = train.ensure_set

    def meanwhile(*args):                               # after this process has read last.pt
        monkeypatch.setattr(train, "ensure_set", ensure)
        assert start("run", "--init_from=resume", max_iters=6).returncode == 0
        return ensure(*args)
    monkeypatch.setattr(train, "ensure_set", meanwhile)
    one_line_error(start("run", "--init_from=auto", max_iters=4), "has changed since")
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 6


def test_a_best_checkpoint_that_was_lost_is_said_again_after_a_resume(start, monkeypatch, tmp_path):
    save = checkpoint_module.save_checkpoint

    def failing(content, path, *rest):
        return "could not write ckpt.pt: No space left on device" if path.name == "ckpt.pt" and content["step"] else \
            save(content, path, *rest)
    monkeypatch.setattr(runtime, "save_checkpoint", failing)
    assert start("run").returncode == 4
    monkeypatch.setattr(runtime, "save_checkpoint", save)
    done = start("run", "--init_from=resume")
    assert done.returncode == 4
    assert "ckpt.pt: No space left" in done.stdout


def test_max_iters_of_no_end_is_refused(start):
    one_line_error(start("run", max_iters=checkpoint_module.OPEN), "max_iters")


def test_time_that_ends_between_evaluations_names_the_weights_of_now(start, clock, paced):
    done = start("run", max_minutes=2, max_iters=1000, eval_interval=1000)
    assert "max_minutes=2 are over" in done.stdout
    assert "last.pt" in done.stdout[done.stdout.index("stopped "):]
