"""What a person sees of a run: the banner, aligned lines, log.csv, loss.png, loggers and the closing summary."""

import contextlib
import math
import os
import re
import struct
import sys
import threading
import types

import pytest
from conftest import TOY, flags, inside, one_line_error, trained

from inkling.format import duration, fitted, short
from inkling.plots import main as compare_main
from inkling.plots import plot_comparison as compare
from inkling.plots import plot_run as draw
from inkling.plots import read_log
from inkling.report import COLUMNS, Report
from train import GPT, Config, main


def run_with_picture(data_dir, out, **settings):
    return inside(main, *flags(**TOY | dict(data_dir=data_dir, out_dir=out) | settings))


def test_lines_tell_what_was_asked_and_what_came_of_it(data_dir, tmp_path):
    said = trained(data_dir, tmp_path / "run", learning_rate=0.005).stdout
    lines = said.splitlines()
    assert "settings dataset=toy" in said
    assert "learning_rate=0.005" in said
    vocabulary = int(lines[0].rpartition(" ")[2])
    assert f"ln {vocabulary} = {math.log(vocabulary):.3f}" in said
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{n}/6" for n in range(1, 7)]
    assert [line.split()[1] for line in lines if line.startswith("eval ")] == ["0/6", "3/6", "6/6"]
    assert said.count("--- sample at step") == 3
    assert len({line.index("| lr") for line in lines if line.startswith("step ")}) == 1      # aligned
    assert f"python sample.py --out_dir={tmp_path / 'run'}" in lines[-1]


def test_the_log_holds_every_figure(data_dir, tmp_path):
    trained(data_dir, tmp_path / "run")
    rows = read_log(tmp_path / "run" / "log.csv")
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(row["tokens"] == row["step"] * 4 * 32 for row in rows)
    for row in evaluations:             # one token is one character is one byte in this set
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(",".join(COLUMNS) + "\n1,128,4.1,0.01,0.5,,,,20,6400,0.1\n2,256,4.0,0.0", encoding="utf-8")
    assert [row["step"] for row in read_log(path)] == [1]


def test_the_picture_is_a_png_and_is_drawn_anew_at_each_evaluation_but_the_first(data_dir, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("inkling.report.plot_run", lambda rows, *rest: drawn.append(len(rows)) or draw(rows, *rest))
    run_with_picture(data_dir, tmp_path / "run")
    assert drawn == [5, 9]              # after the rows of 3 and of 6 updates; one point needs no picture
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_overfitting_is_said_at_the_end(data_dir, tmp_path):
    said = trained(data_dir, tmp_path / "run", max_iters=12, eval_interval=2, learning_rate=2, head_lr=3,
                   schedule="constant").stdout
    rose = read_log(tmp_path / "run" / "log.csv")
    losses = [row["val_loss"] for row in rose if "val_loss" in row]
    assert ("the val loss has risen" in said) == (losses[-1] > min(losses) + 0.01)
    assert losses[-1] > min(losses) + 0.01, "the settings of this test should make the loss rise"


def test_wandb_and_tensorboard_get_the_figures_of_the_log(data_dir, tmp_path, monkeypatch):
    logged, scalars, begun = [], [], {}
    closed = []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: closed.append("wandb"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: begun.update(how) or run))
    board = types.SimpleNamespace(
        SummaryWriter=lambda folder: types.SimpleNamespace(add_scalar=lambda *row: scalars.append(row),
                                                          close=lambda: closed.append("tensorboard")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    trained(data_dir, tmp_path / "run", wandb_log=True, wandb_project="tests", wandb_run_name="one", tensorboard=True)
    rows = read_log(tmp_path / "run" / "log.csv")
    assert (begun["project"], begun["name"]) == ("tests", "one")
    assert begun["config"]["n_layer"] == 2
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    for key in ("loss", "val_loss"):
        assert [row[key] for _, row in logged if key in row] == [row[key] for row in rows if key in row]
    assert len(scalars) == sum(len(row) - 1 for row in rows)
    assert sorted(closed) == ["tensorboard", "wandb"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named(data_dir, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flag = {"wandb": "wandb_log", "tensorboard": "tensorboard"}[package]
    one_line_error(trained(data_dir, tmp_path / "run", **{flag: True}), f"pip install {package}")


def test_evaluation_and_saving_do_not_count_as_training(data_dir, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("inkling.report.time.perf_counter", lambda: now[0])
    meta = {"splits": dict.fromkeys(("train", "val"), {"tokens": 1, "bytes": 1})}
    report = Report(Config(), tmp_path, False, None, meta,
                    dict(step=0, seconds=7.0, evaluated=-1), "cpu")
    report.begin("off", [], None)
    now[0] += 2
    with report.paused():
        now[0] += 50
    now[0] += 1
    assert report.seconds() == 10.0


def test_ranks_other_than_the_first_say_and_write_nothing(tmp_path, capsys):
    meta = {"splits": dict.fromkeys(("train", "val"), {"tokens": 1, "bytes": 1})}
    report = Report(Config(), tmp_path, False, None, meta,
                    dict(step=0, seconds=0.0, evaluated=-1), "cpu")
    report.compiling(True)
    report.begin("off", [], None)
    report.update(1, 2.0, 0.5, 0.01)
    report.evaluation(1, {"train": 2.0, "val": 2.0}, True)
    report.sample(1, lambda: "a text")
    report.finish(types.SimpleNamespace(signal=0, asked=False), {})
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3600, "1h00m"),
                                               (86_400, "24h00m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1000, "1k"), (10_745_088, "10.7M"),
                                              (1_557_611_200, "1.56B")])
def test_short_numbers(number, text):
    assert short(number) == text


@pytest.fixture
def made(tmp_path):
    """made(max_iters=9)(step=4): a report on a run of toy settings that stands there, with nothing begun."""
    def made(**settings):
        def at(**stands):
            state = dict(step=0, evaluated=-1, best_step=0, best_val_loss=math.inf, losses={}, seconds=0.0) | stands
            splits = dict.fromkeys(("train", "val"), dict(tokens=1000, bytes=1000))
            cfg = Config(**TOY | dict(out_dir=str(tmp_path)) | settings)
            return Report(cfg, tmp_path, True, GPT(cfg, 20), dict(splits=splits, vocab_size=20), state, "cpu")
        return at
    return made


def test_the_banner_comes_before_compiling_which_is_announced(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "compiler_missing", lambda device: "")
    monkeypatch.setattr(runtime, "compile", lambda wanted, model, *rest: print("NOW") or (model, False, "tried"))
    for wanted in (True, False):
        said = trained(data_dir, tmp_path / f"{wanted}", compile=wanted).stdout.splitlines()
        labels = [line.split()[0] for line in said[:said.index("NOW")]]
        assert labels == ["data", "model", "steps", "settings", "writes"] + ["compile"] * wanted
        assert said[said.index("NOW") + 1] == "machine  cpu, 1 threads; float32; compile tried"


def test_the_time_left_counts_the_evaluations_to_come(made, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("inkling.report.time.perf_counter", lambda: now[0])
    report = made(max_iters=100, eval_interval=10)(evaluated=0)
    report.begin("off", [], None)
    for _ in range(2):                                  # two evaluations of 100 s
        with report.paused():
            now[0] += 100
            report.evaluation(0, dict(train=1.0, val=1.0), True)
    now[0] += 10
    report.update(5, 1.0, 1.0, 0.1)                     # 2 s a step; evaluations at 10, 20, ..., 100 remain
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{duration(95 * 2 + 10 * 100)} left")


@pytest.mark.parametrize(("stands", "said"), [
    (dict(step=4, evaluated=3), "at step 4 of 6: the same command with --init_from=resume goes on;"),
    (dict(step=6, evaluated=3), "at step 6 of 6: the same command with --init_from=resume makes up for its last eval")])
def test_a_stopped_run_says_what_resuming_does(made, capsys, stands, said):
    report = made()(**stands)
    assert report.finish(types.SimpleNamespace(signal=15, asked=True, exit_code=143), {}) == 143
    out = capsys.readouterr().out
    assert f"stopped  {said}" in out
    assert "done " not in out


def test_a_run_that_was_complete_when_it_was_stopped_says_so(made, capsys):
    report = made()(step=6, evaluated=6, best_val_loss=2.5, best_step=6, losses=dict(val=2.5), seconds=3.0)
    assert report.finish(types.SimpleNamespace(signal=15, asked=True, exit_code=143), {}) == 143
    out = capsys.readouterr().out
    assert "done     6 steps in 3s of training; best val loss 2.5000 at step 6" in out
    assert "figures  768 tokens at 256 a second; this process took 0s and " in out
    assert "stopped" not in out


def test_the_next_command_can_be_typed_whatever_the_folder_is_called(data_dir, tmp_path):
    said = trained(data_dir, tmp_path / "my run").stdout
    assert said.splitlines()[-1] == f"next     python sample.py --out_dir='{tmp_path / 'my run'}'"


@pytest.fixture
def terminal(data_dir, tmp_path, monkeypatch):
    """terminal(80): the lines that a toy run draws on a terminal so wide; a carriage return ends one too."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))

    def terminal(width: int, **settings):
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
            code = main(flags(**TOY | dict(data_dir=data_dir, out_dir=tmp_path / "run") | settings))
            monkeypatch.undo()
        reader.join()
        os.close(shown)
        assert code == 0
        return re.split(r"[\r\n]+", b"".join(parts).decode())
    return terminal


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_shows_one_line_that_fits(terminal, data_dir, tmp_path, monkeypatch, width, bar):
    if bar:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    drawn = terminal(width, dataset="toy")
    paths = str(tmp_path), str(data_dir)                # a word that is too long stays whole
    assert not [line for line in drawn if len(line) > width and not any(path in line for path in paths)]
    assert not [line for line in drawn if "\x1b" in line]                                   # no colours, NO_COLOR or no
    last = [line for line in drawn if line.startswith("step 6/6 | loss ")]
    assert last
    assert all(line.endswith("|") == bar for line in last)
    parts = {40: [], 80: ["tok/s", "left"], 200: ["lr ", "norm ", "ms", "tok/s", "left"]}[width]
    assert all(part in last[0] for part in parts)
    assert any(line.startswith("eval 6/6 | ") and "best" in line for line in drawn)


def test_what_matters_least_is_left_out_first():
    parts = dict(step="step 1/2", loss="loss 1.0", lr="lr 1e-3", norm="norm 1", mfu="", left="1s left")
    assert fitted(parts, 100) == "step 1/2 | loss 1.0 | lr 1e-3 | norm 1 | 1s left"
    assert fitted(parts, 47) == "step 1/2 | loss 1.0 | lr 1e-3 | 1s left"
    assert fitted(parts, 30) == "step 1/2 | loss 1.0 | 1s left"
    assert fitted(parts, 5) == "step 1/2 | loss 1.0"


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn from now on."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("inkling.plots.save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def rows(losses: list, every: int = 10, rate: float = 1000.0) -> list:
    return [dict(step=every * n, tokens=every * n * 100, seconds=every * n * 100 / rate, train_loss=loss - 0.1,
                 val_loss=loss) for n, loss in enumerate(losses)]


@pytest.mark.parametrize("losses", [[4.0], [4.0, 2.0, 3.0]], ids=str)
def test_the_picture_marks_the_best_and_never_shows_a_fraction_of_a_step(figures, tmp_path, losses):
    draw(rows(losses), tmp_path / "loss.png", "a run", 100, 5000)
    axes = figures[0].axes[0]
    star = next(line for line in axes.lines if line.get_label().startswith("best val"))
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (10 * losses.index(min(losses)), min(losses))
    left, right = axes.get_xlim()
    assert left < 0
    assert max(1, 10 * (len(losses) - 1)) < right < 1.1 * max(1, 10 * (len(losses) - 1))
    figures[0].canvas.draw()
    assert all(float(tick.get_text().replace("−", "-")) % 1 == 0 for tick in axes.get_xticklabels())
    assert {child.get_xlabel() for child in axes.child_axes} == {"tokens seen", "epochs"}


@pytest.mark.parametrize(("by", "place"), [("steps", 20), ("tokens", 2000), ("time", 2000 / 500 / 60)])
def test_runs_are_drawn_over_one_another(figures, tmp_path, by, place):
    compare({"a": rows([4.0, 3.0, 2.0]), "b": rows([4.0, 3.5, 3.0], rate=500.0)}, by, tmp_path / "compare.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert list(lines["b"].get_ydata()) == [4.0, 3.5, 3.0]
    assert lines["b"].get_xdata()[-1] == pytest.approx(place)
    trains = [line for line in figures[0].axes[0].lines if list(line.get_ydata()) == [3.9, 3.4, 2.9]]
    assert trains[0].get_linewidth() < lines["b"].get_linewidth()
    assert trains[0].get_color() == lines["b"].get_color() != lines["a"].get_color()


def test_compare_as_it_is_typed(run, data_dir, tmp_path):
    for name, settings in (("a", {}), ("b", dict(max_iters=4, learning_rate=0.02))):
        assert trained(data_dir, tmp_path / "out" / name, **settings).returncode == 0
    done = run("inkling/report.py", "out/a", "out/b/", "--by=tokens", "--out=both.png")
    assert done.returncode == 0, done.stderr
    head, *table = done.stdout.splitlines()[:3]
    assert head.split()[:3] == ["run", "best", "val"]
    for line, name, steps in zip(table, ("a", "b"), (6, 4), strict=True):
        best = min((row for row in read_log(tmp_path / "out" / name / "log.csv") if "val_loss" in row),
                   key=lambda row: row["val_loss"])
        assert line.split()[:3] == [f"out/{name}", f"{best['val_loss']:.4f}", f"{best['step']:.0f}"]
        assert line.split()[4:6] == [str(steps), f"{steps * 128}"]
    if "no picture" not in done.stdout:
        assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_in_one_line_what_it_cannot_do(tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "log.csv").write_text(",".join(COLUMNS) + "\n")
    one_line_error(inside(compare_main, "none"), "none holds no run", "none/log.csv")
    one_line_error(inside(compare_main, "empty"), "empty holds no run")
    one_line_error(inside(compare_main, "begun"), "no evaluation yet")
    one_line_error(inside(compare_main), "name the folders")
    one_line_error(inside(compare_main, "begun", "--by=epochs"), "steps, tokens, time")
    assert inside(compare_main, "--help").stdout.count("--") >= 2
    trained(data_dir, tmp_path / "run")
    done = inside(compare_main, "run")
    assert done.returncode == 0
    assert "pip install matplotlib" in done.stdout
