"""What a person sees of a run: the banner, aligned lines, log.csv, loss.png, loggers and the closing summary."""

import contextlib
import math
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from conftest import ROOT, TOY, inside, one_line_error, trained

from inkling import plots
from inkling.cli import UserError
from inkling.format import duration, fit_line, milliseconds, short
from inkling.plots import plot_comparison, plot_run, read_log
from inkling.report import COLUMNS, LogFile, Report, check_loggers, count_parameters, evaluations_left
from train import GPT, Config, load

NOT_STOPPED = SimpleNamespace(signal=0)
TERMINATED = SimpleNamespace(signal=15)


class FakeStopwatch:
    """Shows what a test sets."""

    def __init__(self):
        self.now = 0.0
        self.pause = 0.0

    def seconds(self) -> float:
        return self.now

    def pause_seconds(self) -> float:
        return self.pause


@pytest.fixture
def make_run(tmp_path):
    """make_run(max_iters=9, state={"step": 4}): what a Report sees of a run: toy settings, 128 tokens per step."""
    def make_run(state=None, plan=None, first=True, **settings):
        cfg = Config(**TOY | {"out_dir": str(tmp_path)} | settings)
        state = {"step": 0, "evaluated": None, "best_step": 0, "best_val_loss": math.inf, "losses": {}} | (state or {})
        state.setdefault("tokens", 128 * state["step"])
        plan = {"device": "cpu", "dtype": "float32", "compile": False, "max_iters": cfg.max_iters,
                "breakpoints": [[0, cfg.max_iters]], "eval_interval": cfg.eval_interval,
                "evaluations": {"interval": cfg.eval_interval, "windows": 16, "at_the_end": 0},
                "expected": [], "ngram_decay": 2.5, "most_steps": 0, "resumed_at": 0} | (plan or {})
        split = {"tokens": 1001, "bytes": 2002}
        return SimpleNamespace(
            cfg=cfg, state=SimpleNamespace(**state), plan=SimpleNamespace(**plan),
            ranks=SimpleNamespace(rank=0, world=1, first=first), model=GPT(cfg, 20),
            meta={"splits": {"train": split, "val": split}, "vocab_size": 20}, stopwatch=FakeStopwatch(),
            tokens_per_step=128, tokens_per_epoch=992, first_step=state["step"], choice=None, given={})
    return make_run


@pytest.fixture(scope="module")
def toy_run(data_dir, tmp_path_factory):
    """(folder, finished process) of one toy run, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("out") / "my run"
    return folder, trained(data_dir, folder, learning_rate=0.005)


# -- a whole run --------------------------------------------------------------------------------------

def test_lines_tell_what_was_asked_and_what_came_of_it(toy_run):
    folder, process = toy_run
    assert process.returncode == 0, process.stderr
    said = process.stdout
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["data", "model", "steps", "settings", "writes", "pace"]
    assert "settings dataset=toy" in said
    assert "learning_rate=0.005" in said
    vocabulary = int(lines[0].rpartition(" ")[2])
    assert f"ln {vocabulary} = {math.log(vocabulary):.3f}" in said
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{n}/6" for n in range(1, 7)]
    assert [line.split()[1] for line in lines if line.startswith("eval ")] == ["0/6", "3/6", "6/6"]
    assert said.count("--- sample at step") == 3
    assert len({line.index("| lr") for line in lines if line.startswith("step ")}) == 1      # aligned
    assert lines[-1] == f"next     python sample.py --out_dir='{folder}'"       # can be typed as it is


def test_the_log_holds_every_figure(toy_run):
    folder, _ = toy_run
    rows = read_log(folder / "log.csv")
    assert (folder / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(row["tokens"] == row["step"] * 4 * 32 for row in rows)
    for row in evaluations:             # one token is one character is one byte in this set
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_columns_keep_their_order():
    """Old log.csv files and other programs' scripts have it."""
    assert COLUMNS == ["step", "tokens", "loss", "lr", "norm", "train_loss", "val_loss", "val_bits_per_byte",
                       "ms", "tokens_per_second", "seconds"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_logger_is_named_before_an_old_run_is_moved(data_dir, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("an old run")
    flag = {"wandb": "wandb_log", "tensorboard": "tensorboard"}[package]
    one_line_error(trained(data_dir, tmp_path / "run", **{flag: True}), f"pip install {package}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_broken_logger_is_named_before_an_old_run_is_moved(data_dir, tmp_path, monkeypatch, package):
    """Packages that do not fit each other raise anything when they are imported."""
    (tmp_path / "stubs" / package).mkdir(parents=True)
    (tmp_path / "stubs" / package / "__init__.py").write_text("raise AttributeError('numpy has no bool8')")
    monkeypatch.syspath_prepend(tmp_path / "stubs")
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("an old run")
    flag = {"wandb": "wandb_log", "tensorboard": "tensorboard"}[package]
    one_line_error(trained(data_dir, tmp_path / "run", **{flag: True}), f"{flag}=True", "numpy has no bool8")
    assert not (tmp_path / "run.1").exists()


class Unreliable:
    """A logger that fails in the method `fails`."""

    name = "Unreliable"
    fails = ""
    calls: ClassVar = []

    def __init__(self, *_):
        self.call("start")

    def log(self, step, row):
        self.call("log")

    def close(self):
        self.call("close")

    def call(self, method: str):
        self.calls.append(method)
        if method == self.fails:
            raise RuntimeError("the server is gone")


@pytest.mark.parametrize(("fails", "calls"), [("start", ["start"]), ("log", ["start", "log"]), ("close", None)])
@pytest.mark.parametrize("logger", ["TensorBoard", "WeightsAndBiases"])
def test_a_logger_that_fails_logs_no_more_and_ends_nothing(start, monkeypatch, logger, fails, calls):
    monkeypatch.setattr("inkling.report.check_loggers", lambda cfg: None)
    monkeypatch.setattr("train.check_loggers", lambda cfg: None)
    monkeypatch.setattr(f"inkling.report.{logger}", Unreliable)
    monkeypatch.setattr(Unreliable, "fails", fails)
    monkeypatch.setattr(Unreliable, "calls", [])
    done = start("run", **{"tensorboard" if logger == "TensorBoard" else "wandb_log": True})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("the server is gone") == 1
    assert "warning  Unreliable" in done.stdout
    assert calls is None or Unreliable.calls == calls

@pytest.mark.parametrize(("settings", "said"), [
    ({}, True), (dict(ngram_decay=1.0), False), (dict(optimizer="adamw"), False), (dict(ngrams=0), False)])
def test_the_banner_says_what_decay_was_chosen(make_run, tmp_path, capsys, settings, said):
    Report(make_run(**settings), tmp_path).banner()
    assert ("with ngram_decay=2.5" in " ".join(capsys.readouterr().out.split())) == said



# -- the banner ---------------------------------------------------------------------------------------

def test_the_banner_of_a_resumed_run_names_its_step_and_no_first_loss(make_run, tmp_path, capsys):
    Report(make_run(max_iters=6000, state={"step": 1200}), tmp_path).banner()
    out = capsys.readouterr().out
    assert f"writes   {tmp_path}/, resuming at step 1,200\n" in out
    assert "steps    6,000 of 128 tokens, 7.8 to an epoch\n" in out


@pytest.mark.parametrize("settings", [{"init": "torch"}, {"init_from": "gpt2"}], ids=str)
def test_the_first_loss_is_promised_only_where_it_is_known(make_run, tmp_path, capsys, settings):
    Report(make_run(**settings), tmp_path).banner()
    assert "first loss" not in capsys.readouterr().out


def test_the_settings_are_those_the_user_changed(make_run, tmp_path, capsys):
    run = make_run()
    run.cfg = Config(dataset="toy", n_layer=3, out_dir="somewhere", dry_run=True)
    Report(run, tmp_path).banner()
    assert "settings dataset=toy, n_layer=3 (all others at their defaults)\n" in capsys.readouterr().out
    run.cfg = Config()
    Report(run, tmp_path).banner()
    assert "settings " not in capsys.readouterr().out


def test_a_run_by_the_clock_says_where_its_end_moves(make_run, tmp_path, capsys):
    run = make_run(plan={"max_iters": None, "breakpoints": []}, max_minutes=5.0)
    report = Report(run, tmp_path)
    report.banner()
    assert "steps    as many as 5 min allow, of 128 tokens" in capsys.readouterr().out
    report.end_moved(12, 340)
    assert capsys.readouterr().out == "time     at step 12: the time is enough for 340 steps in all\n"


def test_a_run_by_the_clock_ends_with_the_command_that_repeats_it(make_run, tmp_path, capsys):
    plan = {"max_iters": 6, "breakpoints": [[0, 9], [4, 6]]}
    said = finished(make_run(state=DONE, plan=plan, max_minutes=5.0), tmp_path, capsys)
    command, = [line for line in said.splitlines() if line.startswith("repeat ")]
    words = shlex.split(command)[1:]
    assert words[:2] == ["python", "train.py"]
    expected = {"--max_iters=6", "--breakpoints=0:9,4:6", "--dtype=float32", "--compile=False", "--block_size=32"}
    assert expected <= {*words}
    assert not any("max_minutes" in word for word in words)


@pytest.mark.parametrize(("seconds", "said"), [
    (40, "pace     about 40 seconds of training"), (600, "pace     about 10 minutes"),
    (64_800, "warning  about 18 hours of training on this machine, uncompiled: 6 steps of 2,000 ms.")])
def test_how_long_it_takes_is_said_first(make_run, tmp_path, capsys, seconds, said):
    Report(make_run(), tmp_path).estimate(seconds, 2.0)
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert ("--max_minutes=60" in out) == (seconds > 3600)


def test_compiling_is_announced_before_the_machine_is_described(make_run, tmp_path, capsys):
    run = make_run(plan={"dtype": "bfloat16"})
    report = Report(run, tmp_path)
    report.compiling(75)
    report.machine("on, took 9 s")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("compile  about 75 seconds")
    assert second == "machine  cpu, 1 threads; bfloat16; compile on, took 9 s"


# -- lines while it trains ----------------------------------------------------------------------------

def test_a_line_of_progress(make_run, tmp_path, capsys):
    run = make_run(max_iters=100, eval_interval=10, state={"evaluated": 0})
    report = Report(run, tmp_path)
    run.stopwatch.now = 10.0
    run.stopwatch.pause = 100.0
    report.step(5, 1.0, 1.0, 0.1)               # 2 s a step; evaluations at 10, 20, ..., 100 remain
    time_left = duration(95 * 2 + 10 * 100)
    assert capsys.readouterr().out == ("step   5/100 | loss 1.000 | lr 1.0e-01 | norm  1.00 | 2,000 ms |    64 tok/s | "
                                       f"{time_left} left\n")
    run.stopwatch.now = 11.0
    report.step(9, 1.0, 1.0, 0.1)               # 4 steps in 1 s
    assert "|   250 ms |   512 tok/s |" in capsys.readouterr().out


def test_an_evaluation_says_what_is_best(make_run, tmp_path, capsys):
    run = make_run(state={"best_val_loss": 1.25, "best_step": 3})
    report = Report(run, tmp_path)
    report.evaluation(3, {"train": 1.0, "val": 1.25}, True)
    report.evaluation(6, {"train": 1.0, "val": 1.5}, False)
    assert capsys.readouterr().out.splitlines() == [
        "eval 3/6 | train 1.0000 | val 1.2500 | 0.902 bits per byte | best so far",     # 1.25 / ln 2 * 1001 / 2002
        "eval 6/6 | train 1.0000 | val 1.5000 | 1.082 bits per byte | best 1.2500 at step 3"]


def test_a_sample_cannot_act_on_the_terminal(make_run, tmp_path, capsys):
    Report(make_run(), tmp_path).sample(3, "\n one\x1b[2J\ntwo\n")
    assert capsys.readouterr().out == "--- sample at step 3\none\\x1b[2J\ntwo\n---\n"


def test_a_sample_shows_the_characters_of_its_text(make_run, tmp_path, capsys):
    Report(make_run(), tmp_path).sample(3, "\u3000\u3000话说\r\n\tمی\u200cخواهم\r\n👩\u200d💻\u00a0!\r")
    assert capsys.readouterr().out == (
        "--- sample at step 3\n\u3000\u3000话说\n\tمی\u200cخواهم\n👩\u200d💻\u00a0!\n---\n")


@pytest.mark.parametrize("interval", [1, 3, 4, 10, 50])
@pytest.mark.parametrize("max_iters", [0, 1, 9, 10, 12])
def test_the_evaluations_left_are_those_of_the_loop(interval, max_iters):
    evaluated = None
    evaluations = 0
    so_far = {}
    for step in range(max_iters + 1):
        so_far[step, evaluated] = evaluations
        if step == max_iters or step % interval == 0:       # as in train()
            evaluated = step
            evaluations += 1
            so_far[step, evaluated] = evaluations
    for (step, evaluated), done in so_far.items():
        assert evaluations_left(max_iters, interval, step, evaluated) == evaluations - done, (step, evaluated)


def test_ranks_other_than_the_first_say_and_write_nothing(make_run, tmp_path, capsys):
    run = make_run(first=False)
    report = Report(run, tmp_path)
    report.banner()
    report.compiling(75)
    report.machine("off")
    report.open()
    report.step(1, 2.0, 0.5, 0.01)
    report.evaluation(1, {"train": 2.0, "val": 2.0}, True)
    report.sample(1, "a text")
    report.warn("a warning")
    report.not_finite(ValueError("bad"))
    report.finish(NOT_STOPPED, {"ckpt.pt": "could not write"})
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# -- log.csv, loss.png and loggers --------------------------------------------------------------------

HEAD = ",".join(COLUMNS)


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"{HEAD}\n1,128,4.1,0.01,0.5,,,,20,6400,0.1\n2,256,4.0,0.0", encoding="utf-8")
    assert [row["step"] for row in read_log(path)] == [1]


@pytest.mark.parametrize(("first_step", "evaluated", "kept"), [
    (0, None, []), (2, None, ["1", "2"]), (4, 3, ["1", "2", "3", "eval 3", "4"]), (3, 0, ["1", "2", "3"]),
    (9, 3, ["1", "2", "3", "eval 3", "4"])])
def test_a_resumed_log_loses_the_rows_that_will_be_written_again(tmp_path, first_step, evaluated, kept):
    rows = [f"{step},{128 * step},4.1,0.01,0.5,,,,20.0,6400.0,{step}.0" for step in (1, 2, 3, 4)]
    rows.insert(3, "3,384,,,,4.2,4.3,6.2,,,3.0")
    path = tmp_path / "log.csv"
    path.write_text("\n".join([HEAD, *rows, "5,640,4"]), encoding="utf-8")
    log_file = LogFile(path, first_step, evaluated)
    log_file.write({"step": 7, "seconds": 1})
    log_file.close()
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    assert head == HEAD
    assert lines.pop() == "7,,,,,,,,,,1"
    assert lines == [row for row in rows if ("eval " * (",4.3," in row) + row.partition(",")[0]) in kept]


@pytest.mark.parametrize("first_step", [0, 3])
def test_a_log_that_cannot_be_written_is_a_users_mistake(tmp_path, first_step):
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*log\.csv"):
        LogFile(tmp_path / "log.csv", first_step, None)


def test_a_damaged_log_is_resumed_without_the_damaged_rows(tmp_path):
    """A power cut leaves zeros, people leave columns and comments of their own, in any encoding."""
    good = "1,128,4.1,0.01,0.5,,,,20.0,6400.0,0.1"
    damaged = [b"2,256,4.1\0\0\0", b"\0" * 600, b"caf\xe9",
               b"x,256,4.0,0.01,0.5,,,,20,6400,0.2", b"3,384,4,,,,,,,,1,2,3",
               b",512,4.0,0.01,0.5,,,,20,6400,0.2", b'"4,512']
    path = tmp_path / "log.csv"
    path.write_bytes(b"\n".join([HEAD.encode() + b",mine", good.encode() + b",7", *damaged]))
    LogFile(path, 9, None).close()
    assert path.read_text().splitlines() == [HEAD, good]


def test_a_full_disk_costs_the_row_and_not_the_run(make_run, tmp_path, capsys):
    class FullDisk:
        def write(self, row):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    report = Report(make_run(), tmp_path)
    report.log_file = FullDisk()
    logged = []
    report.loggers = [SimpleNamespace(log=lambda step, row: logged.append(step))]
    report.step(1, 2.0, 0.5, 0.01)
    assert "could not write log.csv: No space left on device" in capsys.readouterr().out
    assert logged == [1]


def test_the_picture_is_a_png_and_is_drawn_where_that_costs_little_and_at_the_end(make_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows_drawn = []

    def draw(rows, *arguments):
        rows_drawn.append(len(rows))
        plot_run(rows, *arguments)

    monkeypatch.setattr("inkling.report.plot_run", draw)
    losses = {"train": 2.0, "val": 2.0}
    report = Report(make_run(), tmp_path)
    report.open()
    report.evaluation(0, losses, True)                  # one point needs no picture
    report.step(1, 2.0, 0.5, 0.01)
    assert rows_drawn == []
    report.evaluation(1, losses, True)
    assert rows_drawn == [3]
    report.evaluation(2, losses, True)                  # so soon afterwards it would cost too much
    report.evaluation(3, losses, True)
    assert rows_drawn == [3]
    report.close()
    assert rows_drawn == [3, 5]
    report.close()
    assert rows_drawn == [3, 5]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("error", "said"), [
    (ImportError("matplotlib"), ""), (PermissionError(13, "Permission denied"), "loss.png: Permission denied\n")])
def test_a_run_never_ends_for_want_of_a_picture(make_run, tmp_path, monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    report = Report(make_run(), tmp_path)
    report.open()
    monkeypatch.setattr("inkling.report.plot_run", fail)
    report.evaluation(3, {"train": 2.0, "val": 2.0}, True)
    report.close()
    after_the_line = capsys.readouterr().out.partition("\n")[2]
    assert after_the_line.endswith(said)
    assert bool(after_the_line) == bool(said)


def test_wandb_and_tensorboard_get_the_figures_of_the_log(make_run, tmp_path, monkeypatch):
    logged = []
    scalars = []
    begun = {}
    closed = []
    wandb_run = SimpleNamespace(log=lambda row, step: logged.append((step, row)),
                                finish=lambda: closed.append("wandb"))
    wandb = SimpleNamespace(init=lambda **how: begun.update(how) or wandb_run)
    writer = SimpleNamespace(add_scalar=lambda *row: scalars.append(row), close=lambda: closed.append("tensorboard"))
    board = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run(wandb_log=True, wandb_project="tests", wandb_run_name="one", tensorboard=True, dtype="auto")
    check_loggers(run.cfg)
    report = Report(run, tmp_path)
    report.open()
    report.step(1, 2.0, 0.5, 0.01)
    report.evaluation(1, {"train": 2.0, "val": 1.5}, True)
    report.finish(NOT_STOPPED, {})
    rows = read_log(tmp_path / "log.csv")
    assert (begun["project"], begun["name"]) == ("tests", "one")
    assert begun["config"]["n_layer"] == 2
    assert begun["config"]["dtype"] == "float32"        # what "auto" came to
    assert [step for step, _ in logged] == [row["step"] for row in rows] == [1, 1]
    for key in ("loss", "val_loss", "tokens"):
        assert [row[key] for _, row in logged if key in row] == [row[key] for row in rows if key in row]
    assert len(scalars) == sum(len(row) - 1 for row in rows)
    assert sorted(closed) == ["tensorboard", "wandb"]


def test_an_evaluation_alone_needs_no_logger(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_loggers(Config(wandb_log=True, eval_only=True))
    check_loggers(Config())
    with pytest.raises(UserError, match="pip install wandb"):
        check_loggers(Config(wandb_log=True, dry_run=True))


# -- the end ------------------------------------------------------------------------------------------

def finished(run, out_dir, capsys, stop=NOT_STOPPED, unsaved=None) -> str:
    assert Report(run, out_dir).finish(stop, unsaved or {}) is None
    return capsys.readouterr().out


DONE = {"step": 6, "evaluated": 6, "best_val_loss": 2.5, "best_step": 6, "losses": {"train": 2.0, "val": 2.5}}


def test_a_finished_run_says_what_came_of_it(make_run, tmp_path, capsys):
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "last.pt").touch()
    run = make_run(state=DONE)
    run.first_step = 0
    run.stopwatch.now = 3.0
    lines = finished(run, tmp_path, capsys).splitlines()
    assert lines[0] == "done     6 steps in 3s of training; best val loss 2.5000 at step 6"
    assert re.fullmatch(r"speed    768 tokens at 256 tok/s; whole process 0s(, [\d.]+ [GM]B of memory)?", lines[1])
    assert lines[2:] == [f"files    {tmp_path}/: ckpt.pt (best weights), last.pt (to resume); 0.0 MB",
                         f"next     python sample.py --out_dir={tmp_path}"]


@pytest.mark.parametrize(("last", "overfits"), [(2.505, False), (2.515, True)])
def test_overfitting_is_said_at_the_end(make_run, tmp_path, capsys, last, overfits):
    state = DONE | {"losses": {"train": 1.0, "val": last}, "best_step": 3}
    said = finished(make_run(state=state), tmp_path, capsys)
    assert (f"the val loss has risen to {last:.4f} since then: the model is overfitting" in said) == overfits


@pytest.mark.parametrize(("train_loss", "said"), [
    (0.5, "the model is overfitting (train 1.0000 -> 0.5000)"),
    (1.5, "and so has the train loss (1.0000 -> 1.5000): lower --learning_rate")])
def test_the_train_loss_tells_overfitting_from_too_high_a_rate(make_run, tmp_path, capsys, train_loss, said):
    (tmp_path / "log.csv").write_text("step,tokens,train_loss,val_loss,seconds\n3,9,1.0,2.5,1\n",
                                      encoding="utf-8")
    state = DONE | {"losses": {"train": train_loss, "val": 3.0}, "best_step": 3}
    assert said in " ".join(finished(make_run(state=state), tmp_path, capsys).split())


@pytest.mark.parametrize(("best_step", "said"), [(0, True), (3, False)])
def test_a_run_that_improved_on_nothing_says_so(make_run, tmp_path, capsys, best_step, said):
    state = DONE | {"losses": {"train": 1.0, "val": 3.0}, "best_step": best_step}
    out = " ".join(finished(make_run(state=state), tmp_path, capsys).split())
    assert ("no evaluation was better than that before the first step" in out) == said
    assert ("the val loss has risen" in out) != said


def test_a_plan_that_ends_early_says_the_most_steps(make_run, tmp_path):
    plan = {"max_iters": None, "breakpoints": [], "most_steps": 1169}
    report = Report(make_run(plan=plan, max_minutes=5.0), tmp_path)
    assert report.describe_steps().startswith("at most 1,169, or as many as 5 min allow, of 128 tokens")


@pytest.mark.parametrize(("state", "stop", "said"), [
    ({"step": 4, "evaluated": 3}, TERMINATED, "step 4 of 6: COMMAND continues; "),
    ({"step": 4, "evaluated": None}, TERMINATED, "step 4 of 6: COMMAND"),
    ({"step": 6, "evaluated": 3}, TERMINATED, "step 6 of 6: COMMAND runs its last evaluation; ")])
def test_a_stopped_run_says_what_resuming_does(make_run, tmp_path, capsys, state, stop, said):
    out = finished(make_run(state=state, max_minutes=5.0), tmp_path, capsys, stop)
    command = f"python train.py --init_from=resume --out_dir={tmp_path}"
    assert out.startswith(f"stopped  at {said.replace('COMMAND', command)}")
    assert out.endswith(f"; python sample.py --ckpt={tmp_path}/last.pt samples from the current weights\n")
    assert out.count("\n") == 1


def test_a_run_that_was_complete_when_it_was_stopped_says_so(make_run, tmp_path, capsys):
    out = finished(make_run(state=DONE), tmp_path, capsys, TERMINATED)
    assert "done     6 steps in" in out
    assert "stopped" not in out


def test_a_run_that_patience_ended_says_so(make_run, tmp_path, capsys):
    said = finished(make_run(state=DONE, max_iters=1000, patience=2), tmp_path, capsys)
    assert "done     6 steps of 1,000 (patience=2) in 0s" in said


def test_a_finished_run_that_is_resumed_has_nothing_to_do(make_run, tmp_path, capsys):
    run = make_run(state=DONE)
    assert "note     nothing was left to do: a larger --max_iters" in finished(run, tmp_path, capsys)
    run.first_step = 3
    assert "nothing was left to do" not in finished(run, tmp_path, capsys)


def test_a_finished_run_that_is_resumed_to_fewer_steps_has_nothing_to_do(make_run, tmp_path, capsys):
    said = finished(make_run(state=DONE, max_iters=3), tmp_path, capsys)
    assert "note     nothing was left to do: a larger --max_iters" in said
    assert "done     6 steps in" in said


def test_what_could_not_be_saved_is_said_at_the_end(make_run, tmp_path, capsys):
    problems = {"ckpt.pt": "", "last.pt": "could not write last.pt: No space left on device"}
    out = finished(make_run(state=DONE), tmp_path, capsys, unsaved=problems)
    assert out.startswith("unsaved  could not write last.pt: No space left on device\n")
    assert out.count("unsaved") == 1


@pytest.mark.parametrize("settings", [{}, {"eval_only": True}], ids=str)
def test_what_is_not_finite_is_said_in_one_line(make_run, tmp_path, capsys, settings):
    report = Report(make_run(**settings), tmp_path)
    report.not_finite(ArithmeticError("the val loss of step 3 is not finite"))
    out, err = capsys.readouterr()
    kept = "" if settings else f"{tmp_path}/last.pt holds the run as of its last save. "
    assert out == ""
    assert err == (f"stopped: the val loss of step 3 is not finite. {kept}Try a lower --learning_rate, "
                   "--grad_clip=1.0, more --warmup_iters or --dtype=float32\n")


# -- numbers as text ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3600, "1h00m"),
                                               (86_400, "24h00m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.01234, "12.3"), (0.1, "100"), (2, "2,000")])
def test_milliseconds(seconds, text):
    assert milliseconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1000, "1k"), (10_745_088, "10.7M"), (999_900, "1000k"),
                                              (1_557_611_200, "1.56B"), (3e12, "3000B")])
def test_short_numbers(number, text):
    assert short(number) == text


# -- on a terminal ------------------------------------------------------------------------------------

def test_what_matters_least_is_left_out_first():
    parts = {"step": "step 1/2", "loss": "loss 1.0", "lr": "lr 1e-3", "norm": "norm 1", "mfu": "", "left": "1s left"}
    assert fit_line(parts, 100) == "step 1/2 | loss 1.0 | lr 1e-3 | norm 1 | 1s left"
    assert fit_line(parts, 47) == "step 1/2 | loss 1.0 | lr 1e-3 | 1s left"
    assert fit_line(parts, 30) == "step 1/2 | loss 1.0 | 1s left"
    assert fit_line(parts, 5) == "step 1/2 | loss 1.0"


@pytest.fixture
def terminal(make_run, tmp_path, monkeypatch):
    """terminal(80): the lines that a run draws on a terminal so wide; a carriage return ends one too."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))

    def draw_run():
        run = make_run(max_iters=600, dataset="a_set")
        report = Report(run, tmp_path)
        report.banner()
        report.machine("off")
        report.open()
        report.evaluation(0, {"train": 3.0, "val": 3.0}, True)
        for step in (10, 20, 600):
            run.stopwatch.now += 0.5
            report.advance(step)
            report.step(step, 2.0, 0.5, 0.01)
            if step == 20:
                report.evaluation(20, {"train": 2.5, "val": 2.5}, True)
        run.state.step = 600
        run.state.best_val_loss = 2.0
        report.evaluation(600, {"train": 2.0, "val": 2.0}, True)
        report.finish(NOT_STOPPED, {})

    def terminal(width: int) -> list:
        monkeypatch.delenv("COLUMNS", raising=False)
        shown, seen = pty.openpty()
        fcntl.ioctl(seen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        parts = []

        def read():
            with contextlib.suppress(OSError):          # what Linux says when the other end is closed
                while part := os.read(shown, 1 << 16):
                    parts.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        with open(seen, "w", encoding="utf-8") as screen:
            monkeypatch.setattr(sys, "stdout", screen)
            monkeypatch.setattr(sys, "__stdout__", screen)              # whose width shutil asks for
            monkeypatch.setitem(sys.modules, "matplotlib", None)
            draw_run()
            monkeypatch.undo()
        reader.join()
        os.close(shown)
        return re.split(r"[\r\n]+", b"".join(parts).decode())
    return terminal


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_shows_one_line_that_fits(terminal, tmp_path, monkeypatch, width, bar):
    if bar:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    drawn = terminal(width)
    # A word that is too long stays whole.
    assert not [line for line in drawn if len(line) > width and str(tmp_path) not in line]
    assert not [line for line in drawn if "\x1b" in line]               # no colours, NO_COLOR or no
    last = [line for line in drawn if line.startswith("step 600/600 | loss ")]
    assert [line for line in last if not line.endswith("|")]            # it stays, without a bar
    assert any(line.endswith("|") for line in last) == bar
    parts = {40: [], 80: ["tok/s"], 200: ["lr ", "norm ", "ms", "tok/s", "then evaluates"]}[width]
    assert all(part in last[0] for part in parts)
    assert any(line.startswith("eval 600/600 | ") and "best" in line for line in drawn)


def test_no_line_falls_back_to_a_step_before_an_evaluation(terminal):
    pytest.importorskip("tqdm")
    drawn = terminal(200)
    [place] = [number for number, line in enumerate(drawn) if line.startswith("eval  20/600")]
    kept = [line for line in drawn[:place] if line.startswith("step  20/600 | loss ") and not line.endswith("|")]
    assert kept
    assert not [line for line in drawn[place:] if line.startswith(("step  10/600", "step  20/600"))]


class FakeBar:
    def __init__(self):
        self.n = 0

    def update(self, steps: int):
        self.n += steps


def test_the_bar_moves_at_every_step(make_run, tmp_path):
    report = Report(make_run(), tmp_path)
    report.bar = FakeBar()
    moved = []
    for step in (1, 2, 3):
        report.advance(step)
        moved.append(report.bar.n)
    assert moved == [1, 2, 3]


@pytest.mark.parametrize(("seconds", "effect"), [(50.0, "saved about 40 seconds"), (120.0, "cost about 30 seconds")])
def test_the_end_says_what_compiling_was_worth(make_run, tmp_path, capsys, seconds, effect):
    """100 steps, 1 s each uncompiled, 10 s of compiling."""
    run = make_run(max_iters=100, plan={"compile": True})
    run.compile_seconds = 10.0
    report = Report(run, tmp_path)
    report.estimate(100.0, 1.0)
    run.stopwatch.now += seconds
    run.state.step = 100
    report.say_whether_compiling_paid()
    assert effect in capsys.readouterr().out


# -- pictures -----------------------------------------------------------------------------------------

@pytest.fixture
def figures(monkeypatch):
    """The figures drawn from now on."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("inkling.plots.save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def log_of(losses: list, every: int = 10, rate: float = 1000.0) -> list:
    rows = []
    for number, loss in enumerate(losses):
        step = every * number
        rows.append({"step": step, "tokens": 100 * step, "seconds": 100 * step / rate, "train_loss": loss - 0.1,
                     "val_loss": loss})
    return rows


@pytest.mark.parametrize("losses", [[4.0], [4.0, 2.0, 3.0]], ids=str)
def test_the_picture_marks_the_best_and_never_shows_a_fraction_of_a_step(figures, tmp_path, losses):
    plot_run(log_of(losses), tmp_path / "loss.png", "a run", 100, 5000)
    axes = figures[0].axes[0]
    star = next(line for line in axes.lines if line.get_label().startswith("best val"))
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (10 * losses.index(min(losses)), min(losses))
    left, right = axes.get_xlim()
    assert left < 0
    assert max(1, 10 * (len(losses) - 1)) < right < 1.1 * max(1, 10 * (len(losses) - 1))
    figures[0].draw_without_rendering()
    assert all(float(tick.get_text().replace("−", "-")) % 1 == 0 for tick in axes.get_xticklabels())
    above, below = axes.child_axes
    assert (above.get_xlabel(), below.get_xlabel()) == ("tokens seen", "epochs")
    assert above.get_xlim()[1] == pytest.approx(right * 100)
    assert below.get_xlim()[1] == pytest.approx(right * 100 / 5000)


def test_the_tokens_follow_a_change_of_the_batch_size(figures, tmp_path):
    """10 steps of 100 tokens, then 10 of 300."""
    rows = [{"step": step, "tokens": 100 * step + 200 * max(0, step - 10), "loss": 2.0} for step in range(1, 21)]
    plot_run(rows, tmp_path / "loss.png", "a run", 300, 1000)
    axes = figures[0].axes[0]
    figures[0].draw_without_rendering()
    tokens, epochs = axes.child_axes
    right = axes.get_xlim()[1]
    assert tokens.get_xlim()[1] == pytest.approx(4000 + 300 * (right - 20))
    assert epochs.get_xlim() == pytest.approx([limit / 1000 for limit in tokens.get_xlim()])
    steps, seen = plots.tokens_by_step(rows, 300)
    assert np.interp([-1, 0, 5, 10, 15, 20, 21], steps, seen) == pytest.approx([-100, 0, 500, 1000, 2500, 4000, 4300])


def test_tokens_that_fall_in_an_old_log_are_drawn(tmp_path):
    """Earlier versions multiplied the step by the batch size of the moment."""
    pytest.importorskip("matplotlib")
    rows = [{"step": 10, "tokens": 4000, "loss": 2.0}, {"step": 11, "tokens": 1100, "loss": 2.0}]
    plot_run(rows, tmp_path / "loss.png", "a run", 100, 1000)
    assert (tmp_path / "loss.png").exists()


TITLES = ["cost_$x^2$ and $5", r"$\frac$", "caf\udce9", "红楼梦 🐱", "a\nb\tc", "_begins", "100 % {x} \\", "\0",
          "$" * 99]


@pytest.mark.parametrize("title", TITLES, ids=ascii)
def test_any_name_of_a_folder_can_be_drawn(tmp_path, title):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_run(log_of([4.0, 3.0]), tmp_path / "loss.png", title, 100, 5000)
        plot_comparison({title: log_of([4.0, 3.0])}, "steps", tmp_path / "compare.png")
    for name in ("loss.png", "compare.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_as_they_are(figures, tmp_path):
    plot_comparison({name: log_of([4.0]) for name in ("$a$", "_b")}, "steps", tmp_path / "compare.png")
    texts = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["$a$", "./_b", "train"]
    assert not any(text.get_parse_math() for text in texts)
    plot_run(log_of([4.0]), tmp_path / "loss.png", "$a$", 100, 5000)
    assert figures[1].axes[0].title.get_text() == "$a$"
    assert not figures[1].axes[0].title.get_parse_math()


@pytest.mark.parametrize("error", [RuntimeError("no\nfont"), MemoryError(), RecursionError("deep"), KeyError("tokens")],
                         ids=repr)
def test_whatever_matplotlib_raises_is_said_once_and_ends_nothing(start, monkeypatch, tmp_path, error):
    def fail(*_):
        raise error
    monkeypatch.setattr("inkling.report.plot_run", fail)
    done = start("run")
    assert (done.returncode, done.stderr) == (0, "")
    warnings_said = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings_said) == 1
    assert warnings_said[0].startswith("warning  cannot draw run/loss.png: ")
    write_log(tmp_path / "other", [4.0])
    monkeypatch.setattr(plots, "plot_comparison", fail)
    one_line_error(inside(plots.main, "other"), "cannot draw compare.png")


@pytest.mark.parametrize(("by", "place"), [("steps", 20), ("tokens", 2000), ("time", 2000 / 500 / 60)])
def test_runs_are_drawn_over_one_another(figures, tmp_path, by, place):
    runs = {"a": log_of([4.0, 3.0, 2.0]), "b": log_of([4.0, 3.5, 3.0], rate=500.0)}
    plot_comparison(runs, by, tmp_path / "compare.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert list(lines["b"].get_ydata()) == [4.0, 3.5, 3.0]
    assert lines["b"].get_xdata()[-1] == pytest.approx(place)
    trains = [line for line in figures[0].axes[0].lines if list(line.get_ydata()) == [3.9, 3.4, 2.9]]
    assert trains[0].get_linewidth() < lines["b"].get_linewidth()
    assert trains[0].get_color() == lines["b"].get_color() != lines["a"].get_color()


@pytest.mark.parametrize(("bytes_per_token", "unit", "best"), [(2, "bits per byte", 3 / math.log(2) / 2),
                                                               (1, "nats per token", 3.0)])
def test_two_tokenizers_are_compared_in_bits_per_byte(figures, tmp_path, monkeypatch, bytes_per_token, unit, best):
    monkeypatch.chdir(tmp_path)
    for name, size in (("chars", 1), ("words", bytes_per_token)):
        (tmp_path / name).mkdir()
        log_file = LogFile(tmp_path / name / "log.csv", 0, None)
        for row in log_of([4.0, 3.0]):
            log_file.write(row | {"val_bits_per_byte": row["val_loss"] / math.log(2) / size})
        log_file.close()
    done = inside(plots.main, "chars", "words")
    assert done.returncode == 0
    words = next(line.split() for line in done.stdout.splitlines() if line.startswith("words"))
    assert words[1:3] == [f"{3 / math.log(2) / bytes_per_token:.4f}", "3.0000"]
    axes = figures[0].axes[0]
    assert axes.get_ylabel() == f"loss ({unit})"
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["words"].get_ydata()[-1] == pytest.approx(best)
    assert ("compare their bits per byte" in done.stdout) == (unit == "bits per byte")


def test_old_logs_without_bits_are_compared_in_nats(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "old", [4.0, 3.0])
    assert inside(plots.main, "old").returncode == 0
    assert figures[0].axes[0].get_ylabel() == "loss (nats per token)"


def write_log(folder, losses: list):
    folder.mkdir(parents=True)
    log_file = LogFile(folder / "log.csv", 0, None)
    for row in log_of(losses):
        log_file.write(row)
    log_file.close()


def test_a_comparison_as_it_is_typed(tmp_path, monkeypatch):
    write_log(tmp_path / "out" / "a", [4.0, 3.0, 2.0])
    write_log(tmp_path / "out" / "b", [4.0, 3.5, 3.75, 3.625])
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-m", "inkling.plots", "out/a", "out/b/", "--by=tokens", "--out=both.png"],
                          text=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    head, *table = done.stdout.splitlines()[:3]
    assert len({len(line) for line in (head, *table)}) == 1
    assert re.split("  +", head) == ["run", "bits per byte", "val loss", "at step", "last", "parameters", "of n-grams",
                                     "steps", "tokens", "time", "tokens/s"]
    # These logs are from before bits per byte, and no checkpoint lies beside them.
    assert table[0].split() == ["out/a", "-", "2.0000", "20", "2.0000", "-", "-", "20", "2k", "2s", "1k"]
    assert table[1].split() == ["out/b", "-", "3.5000", "10", "3.6250", "-", "-", "30", "3k", "3s", "1k"]
    if "no picture" not in done.stdout:
        assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tied", [True, False])
def test_a_comparison_counts_the_parameters_of_the_checkpoint(start, tied):
    start("run", tie_weights=tied, init="gpt2")
    model, _ = load("run")
    total, of_ngrams = count_parameters(model)
    done = inside(plots.main, "run")
    assert done.stdout.splitlines()[1].split()[5:7] == [short(total), short(of_ngrams)]
    assert of_ngrams
    Path("run", "ckpt.pt").write_bytes(b"damaged")
    assert inside(plots.main, "run").stdout.splitlines()[1].split()[5:7] == ["-", "-"]


def test_the_old_command_says_the_new_one():
    done = subprocess.run([sys.executable, ROOT / "support" / "report.py", "out/a", "out/my run", "--by=time"],
                          text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "support/report.py has moved: python -m inkling.plots out/a 'out/my run' --by=time\n"


def test_a_comparison_says_in_one_line_what_it_cannot_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "log.csv").write_text(HEAD + "\n")
    one_line_error(inside(plots.main, "none"), "none holds no run", "none/log.csv")
    one_line_error(inside(plots.main, "empty"), "empty holds no run")
    one_line_error(inside(plots.main, "begun"), "no evaluation yet")
    one_line_error(inside(plots.main), "name the folders")
    one_line_error(inside(plots.main, "begun", "--by=epochs"), "steps, tokens, time")
    assert inside(plots.main, "--help").stdout.count("--") >= 2
    write_log(tmp_path / "run", [4.0, 3.0])
    done = inside(plots.main, "run")
    assert done.returncode == 0
    assert "pip install matplotlib" in done.stdout


def test_a_comparison_that_cannot_be_written_is_a_users_mistake(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "run", [4.0, 3.0])
    one_line_error(inside(plots.main, "run", "--out=missing/compare.png"), "cannot write missing/compare.png")


# -- anchors and memorizing

ANCHORS = {"uniform": 6.0, "tokens": 4.8, "xz": 2.75, "ngram": 2.19}


def test_an_evaluation_and_the_summary_say_where_the_model_stands(make_run, tmp_path, capsys):
    run = make_run(state=DONE)
    run.meta["anchors"] = ANCHORS
    report = Report(run, tmp_path)
    report.open()
    report.evaluation(3, {"train": 1.0, "val": 1.25}, True)
    report.finish(None, {})
    said = capsys.readouterr().out
    assert "bits per byte | 8-gram 2.19, xz 2.75 | best so far" in said
    assert "less than the 8-gram (2.19)" in " ".join(said.split())


@pytest.mark.parametrize(("expected", "place"), [((2.0, 3.0), "within"), ((0.1, 0.2), "above"), ((8.0, 9.0), "below")])
def test_the_summary_says_whether_the_loss_was_expected(make_run, tmp_path, capsys, expected, place):
    run = make_run(state=DONE)
    run.meta["anchors"] = ANCHORS
    run.plan.expected = list(expected)
    run.state.best_val_loss = 2.5 / Report(run, tmp_path).bits_per_byte
    report = Report(run, tmp_path)
    report.finish(None, {})
    assert f"; {place} the {expected[0]:.2f} to {expected[1]:.2f} that the plan expected" in " ".join(
        capsys.readouterr().out.split())


def test_the_summary_compares_the_loss_on_all_of_val_where_it_is_known(make_run, tmp_path, capsys):
    run = make_run(state=DONE)
    run.meta["anchors"] = ANCHORS
    run.data = {"val": range(10_000)}
    report = Report(run, tmp_path)
    report.best(2.5 / report.bits_per_byte, windows=100)
    report.finish(None, {})
    assert "compared 2.50 bits per byte" in capsys.readouterr().out


def test_memorizing_is_said_once_with_figures_and_ways_out(make_run, tmp_path, capsys):
    run = make_run(dropout=0.1)
    report = Report(run, tmp_path)
    report.open()
    run.state.best_step, run.state.best_val_loss = 3, 1.5
    report.evaluation(3, {"train": 1.4, "val": 1.5}, True)
    report.evaluation(4, {"train": 1.5, "val": 1.6}, False)      # both have risen: not that
    run.state.tokens = 991                                      # not yet an epoch
    report.evaluation(5, {"train": 1.1, "val": 1.6}, False)
    assert "memorizing" not in capsys.readouterr().out
    run.state.tokens = 992
    for step in (5, 6):
        report.evaluation(step, {"train": 1.1, "val": 1.6}, False)
    said = " ".join(capsys.readouterr().out.split())
    report.close()
    assert said.count("memorizing since step 3: train 1.4000 -> 1.1000, val 1.5000 -> 1.6000") == 1
    assert "--patience=3" in said
    assert "--dropout=0.2 (now 0.1)" in said


def test_the_picture_shows_the_losses_after_the_first_tenth_and_the_anchors_near_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("inkling.plots.save_figure", lambda figure, path: drawn.append(figure))
    steps = range(0, 101, 5)
    rows = [{"step": step, "tokens": 100 * step, "train_loss": 1 + 3 * 0.8**step, "val_loss": 1.1 + 3 * 0.8**step}
            for step in steps]
    plot_run(rows, tmp_path / "loss.png", "a run", 100, 5000, {"uniform": 4.1, "8-gram": 1.3})
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert low < 1.0
    assert 1.3 < high < 2
    val, = [line for line in axes.get_lines() if line.get_label() == "val, evaluated"]
    assert min(val.get_xdata()) == 10                                   # no line comes down from far above
    words = " ".join(text.get_text() for text in axes.texts)
    assert "8-gram 1.300" in words
    assert "left out: uniform 4.100" in words
    assert "left out above: step 0 to 5, loss 4.100 at first" in words
