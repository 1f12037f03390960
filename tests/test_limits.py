"""Limits on a run: minutes, numbered checkpoints, memory, and a device that computes something wrong."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, inside, log_rows, one_line_error

import train
from inkling import cli, compile_cost
from inkling.clock import Deadline
from inkling.device import compare_with_cpu, compile_pays, seconds_of_a_pass
from inkling.distributed import Ranks
from train import GPT


def last_step(folder) -> int:
    return int(log_rows(folder)[-1]["step"])


def last(folder) -> dict:
    """The content of last.pt."""
    return torch.load(folder / "last.pt", weights_only=True)


MINUTES = dict(max_minutes=2, max_iters=None, eval_interval=20)


# ---- minutes

def rates(folder) -> list:
    return [float(row["lr"]) for row in log_rows(folder) if row["lr"]]


@pytest.mark.parametrize(("slow", "fast"), [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (0.5, 3.0)])
def test_a_run_by_the_clock_ends_on_time_and_cooled_down(start, paced, tmp_path, slow, fast):
    """Also when its pace halves or doubles on the way."""
    began = paced.now
    paced.seconds_of_step = lambda step: slow if paced.now - began < 60 else fast
    done = start("run", **MINUTES)
    assert done.returncode == 0, done.stderr
    assert 120 * 0.9 < paced.now - began <= 120 * 1.03
    plan = last(tmp_path / "run")["plan"]
    assert last_step(tmp_path / "run") == plan["breakpoints"][-1][1]
    moved = [line for line in done.stdout.splitlines() if re.match(r"time     at step", line)]
    assert len(moved) == len(plan["breakpoints"]) - 1
    lrs = rates(tmp_path / "run")
    assert lrs[0] == max(lrs)
    assert lrs[-1] < 0.15 * lrs[0]
    losses = [row for row in log_rows(tmp_path / "run") if row["val_loss"]]
    assert int(losses[-1]["step"]) == last_step(tmp_path / "run")       # the last evaluation always happens


def test_the_printed_command_repeats_a_run_by_the_clock(start, paced, tmp_path, data_dir):
    paced.seconds_of_step = lambda step: 1.0 if step < 30 else 2.0
    done = start("run", **MINUTES)
    command, = [line for line in done.stdout.splitlines() if line.startswith("repeat ")]
    typed = shlex.split(command)[3:]
    assert any("breakpoints=0:" in word and "," in word for word in typed)
    again = inside(train.main, *typed, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    first = last(tmp_path / "run")["model"]
    second = last(tmp_path / "again")["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_a_cut_run_with_breakpoints_resumes_to_the_same_bits(start, paced, tmp_path, where):
    """Cut before, between and behind the steps at which its end moved."""
    paced.seconds_of_step = lambda step: 1.0 if step < 30 else 2.0
    assert start("whole", **MINUTES).returncode == 0
    breakpoints = last(tmp_path / "whole")["plan"]["breakpoints"]
    end = breakpoints[-1][1]
    assert 5 < breakpoints[1][0] < 33 < breakpoints[-1][0] < end - 2
    cut_at = {"before": 5, "between": 33, "behind": end - 2}[where]
    exactly = dict(breakpoints=",".join(f"{step}:{end}" for step, end in breakpoints), max_iters=None)

    def seconds_of_step(step):
        if step == cut_at:
            raise KeyboardInterrupt
        return 1.0
    paced.seconds_of_step = seconds_of_step
    assert start("cut", **exactly, eval_interval=20, save_interval=1).returncode == 130
    assert last(tmp_path / "cut")["step"] == cut_at
    paced.seconds_of_step = lambda step: 1.0
    assert start("cut", init_from="resume", max_iters=None, eval_interval=20).returncode == 0
    whole = last(tmp_path / "whole")["model"]
    resumed = last(tmp_path / "cut")["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupt_after(paced, seconds: float):
    """Ctrl-C, twice, as it were: no step begins after so many seconds."""
    end = paced.now + seconds

    def seconds_of_step(_):
        if paced.now > end:
            raise KeyboardInterrupt
        return 1.0
    paced.seconds_of_step = seconds_of_step


@pytest.mark.parametrize("seconds", [19, 40, 80])
def test_a_run_that_was_cut_gets_the_time_that_was_left(start, paced, tmp_path, seconds):
    interrupt_after(paced, seconds)
    assert start("cut", **MINUTES, save_interval=1).returncode == 130
    saved = last(tmp_path / "cut")
    paced.seconds_of_step = lambda step: 1.0
    began = paced.now
    done = start("cut", init_from="resume", max_iters=None, eval_interval=20)
    assert done.returncode == 0, done.stderr
    left = 120 - saved["clock_seconds"]
    assert left * 0.85 < paced.now - began <= left + 3
    resumed = last(tmp_path / "cut")["plan"]["breakpoints"]
    assert resumed[:len(saved["plan"]["breakpoints"])] == saved["plan"]["breakpoints"]
    assert rates(tmp_path / "cut")[-1] < 0.1 * rates(tmp_path / "cut")[0]


def test_a_finished_run_with_new_minutes_gets_a_new_schedule(start, paced, tmp_path):
    assert start("run", **MINUTES).returncode == 0
    steps = last_step(tmp_path / "run")
    assert start("run", **MINUTES | {"max_minutes": 1}, init_from="resume").returncode == 0
    assert last_step(tmp_path / "run") > steps + 20
    assert rates(tmp_path / "run")[steps + 5] > 0.1 * rates(tmp_path / "run")[0]
    assert rates(tmp_path / "run")[-1] < 0.1 * rates(tmp_path / "run")[0]


def test_typed_max_iters_stand_and_the_time_only_stops(start, paced, tmp_path):
    done = start("run", max_minutes=5, max_iters=7)
    assert last_step(tmp_path / "run") == 7
    assert "time     at step" not in done.stdout
    began = paced.now
    assert start("long", max_minutes=2, max_iters=1000, eval_interval=1000).returncode == 0
    assert paced.now - began < 130
    end = last(tmp_path / "long")["plan"]["breakpoints"][-1][1]
    assert end == last_step(tmp_path / "long") < 1000
    assert [row["step"] for row in log_rows(tmp_path / "long") if row["val_loss"]] == ["0", str(end)]


def test_a_step_longer_than_the_whole_time_is_made_once(start, paced, tmp_path):
    paced.seconds_of_step = lambda step: 50.0
    assert start("run", max_minutes=1, max_iters=None).returncode == 0
    assert last(tmp_path / "run")["step"] in (1, 2)


def test_a_time_in_which_no_step_fits_is_refused_with_how_long_one_takes(start, clock, monkeypatch, tmp_path):
    forward = GPT.forward

    def slow(*args):
        clock.now += 30
        return forward(*args)
    monkeypatch.setattr(GPT, "forward", slow)
    one_line_error(start("run", max_minutes=1, max_iters=None), "max_minutes=1", "a step takes about 2m00s")
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(("words", "expected"), [
    (["--max_minutes=2"], {"max_minutes": 2.0, "max_epochs": 0.0}),
    (["--max_iters=7"], {"max_minutes": 0.0, "max_epochs": 0.0, "max_iters": 7}),
    (["--max_epochs=2"], {"max_minutes": 0.0, "max_epochs": 2.0}),
    (["--max_iters=7", "--max_minutes=2"], {"max_minutes": 2.0, "max_iters": 7})])
@pytest.mark.parametrize("in_file", ["max_epochs = 3", "max_minutes = 9", "max_iters = 5"])
def test_a_typed_length_wins_over_that_of_a_file(words, expected, in_file, tmp_path):
    (tmp_path / "lengths.py").write_text(in_file)
    parsed = cli.parse(train.Config, [str(tmp_path / "lengths.py"), *words], train.__doc__)
    cfg = train.choose_length(train.Config(**parsed.values), parsed.typed)
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert not cli.problems(cfg)


@pytest.mark.parametrize("text", ["", "0:5", "0:5,3:9"])
def test_breakpoints_are_read(text):
    assert not cli.problems(train.Config(breakpoints=text))


@pytest.mark.parametrize("text", ["5", "1:5", "0:5,0:6", "0:5,9:3,4:2", "0:x", "0:5,"])
def test_breakpoints_of_another_form_are_refused(text):
    assert "breakpoints" in cli.problems(train.Config(breakpoints=text))[0]


def test_the_clock_of_a_program_begins_when_its_process_does():
    began = time.monotonic()
    program = ("import time; time.sleep(0.5); from inkling.clock import process_start; import torch; "
               "print(time.monotonic() - process_start())")
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    age = float(output.stdout)
    assert 0.5 < age <= time.monotonic() - began + 0.02


def test_two_lengths_are_refused(start):
    one_line_error(start("run", max_minutes=1, max_epochs=1), "max_epochs", "max_minutes")


def test_max_iters_without_end_is_refused(start):
    one_line_error(start("run", max_iters=2**31), "max_iters=2147483648")


@pytest.mark.parametrize(("minutes", "pays"), [(0, True), (1, False), (30, True)])
def test_compiling_must_pay_within_the_minutes(minutes, pays):
    assert compile_pays(Deadline(minutes).seconds_left(), 75, Ranks()) == pays


@pytest.fixture
def compiler_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_compiling_took_is_remembered_beside_the_compilers_cache(compiler_cache):
    key = compile_cost.key_of("model", 1)
    other = compile_cost.key_of("model", 2)
    assert compile_cost.expected_seconds(key) == compile_cost.EXPECTED_SECONDS
    compile_cost.remember(key, 100)                     # anew: the next time the cache holds it
    assert compile_cost.expected_seconds(key) == pytest.approx(15)
    compile_cost.remember(key, 12)
    assert compile_cost.expected_seconds(key) == 12
    assert compile_cost.expected_seconds(other) == compile_cost.EXPECTED_SECONDS
    shutil.rmtree(compiler_cache)
    assert compile_cost.expected_seconds(key) == compile_cost.EXPECTED_SECONDS


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"KEY": 3}', '{"KEY": ["x", true]}'])
def test_a_damaged_memory_of_compiling_is_none(compiler_cache, content):
    key = compile_cost.key_of("model")
    compiler_cache.mkdir()
    compile_cost.memory_path().write_text(content.replace("KEY", key))
    assert compile_cost.expected_seconds(key) == compile_cost.EXPECTED_SECONDS


def test_a_short_run_compiles_once_that_is_known_to_be_cheap(compiler_cache, data_dir, toy, monkeypatch):
    """Here it takes no time at all."""
    monkeypatch.setattr(train, "compile_model", lambda model, forward_backward, device: (model, True, "on"))
    monkeypatch.setattr(train, "compile_function", lambda function, **how: function)
    monkeypatch.setattr("inkling.device.compiler_missing", lambda device: "")
    decided = []
    for _ in range(2):
        run = train.start(toy(compile="auto"))
        train.compile_and_wrap(run, seconds_per_step=5.0)     # 30 seconds of training
        decided.append(run.plan.compile)
        compile_cost.remember(train.compile_key(run), 1.0)
    assert decided == [False, True]


@pytest.mark.parametrize(("seconds", "passes"), [(0.01, [1, 1, 8, 8]), (1.0, [1, 1, 2]), (9.0, [1, 1]), (40.0, [1])])
def test_a_pass_that_takes_long_is_timed_in_part(clock, seconds, passes):
    calls = []

    def forward_backward(windows):
        calls.append(windows)
        clock.now += seconds * windows
    assert seconds_of_a_pass(forward_backward, 8, Ranks()) == pytest.approx(8 * seconds)
    assert calls == passes


def test_a_first_pass_that_takes_long_to_warm_up_does_not_count(clock):
    """On a busy machine, 64 windows would otherwise seem to take 64 times as long as it."""
    calls = []

    def forward_backward(windows):
        calls.append(windows)
        clock.now += 0.25 * windows + (12 if len(calls) == 1 else 0)
    assert seconds_of_a_pass(forward_backward, 64, Ranks()) == pytest.approx(64 * 0.25)


def test_what_holds_up_one_pass_is_not_counted_for_each_window(clock):
    def forward_backward(windows):
        clock.now += 1.0 * windows + (3 if windows > 1 else 0)
    assert seconds_of_a_pass(forward_backward, 24, Ranks()) == pytest.approx(24)


# ---- numbered checkpoints

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
        monkeypatch.setattr(os, "link", link)
    start("run", max_iters=8, eval_interval=2, keep=9)
    end = torch.load(tmp_path / "run" / "last.pt")["model"]
    (tmp_path / "run" / "last.pt").write_bytes((tmp_path / "run" / "last-4.pt").read_bytes())
    done = start("run", "--init_from=resume", max_iters=8, eval_interval=2)
    assert "resuming at step 4" in done.stdout
    again = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(again[name], end[name]) for name in end)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_disk_too_full_for_a_numbered_checkpoint_is_said(start, monkeypatch, tmp_path):
    def no_room(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "link", no_room)
    monkeypatch.setattr(shutil, "copyfileobj", no_room)
    done = start("run", keep=2)
    assert "No space left on device" in done.stdout
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 6


# ---- memory

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_and_keeps_the_last_checkpoint(start, monkeypatch, tmp_path, error):
    forward, calls = GPT.forward, []

    def full(model, *args):
        calls.append(model.training)
        if sum(calls) > 8:
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


# ---- a device that computes something wrong

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
    compare_with_cpu(model, x, x.flip(1), "cpu")
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


def test_a_best_checkpoint_that_was_lost_is_said_again_after_a_resume(start, tmp_path):
    """A folder stands where its temporary file should be."""
    obstacle = tmp_path / "run" / "ckpt.pt.tmp"
    obstacle.mkdir(parents=True)
    assert start("run").returncode == 4
    obstacle.rmdir()
    done = start("run", init_from="resume")
    assert done.returncode == 4
    assert "ckpt.pt: Is a directory" in done.stdout
