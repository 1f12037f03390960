"""What a person sees of a run: the banner, aligned lines, log.csv, loss.png, loggers and the closing summary."""

import math
import sys
import types

import pytest
from conftest import flags, inside, one_line_error, trained

from support.report import COLUMNS, Report, draw, duration, read_log, short
from train import Config, main


def run_with_picture(data_dir, out, **settings):
    from conftest import TOY
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


def test_the_picture_is_a_png_and_is_drawn_anew_at_each_evaluation(data_dir, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("support.report.draw", lambda rows, *rest: drawn.append(len(rows)) or draw(rows, *rest))
    run_with_picture(data_dir, tmp_path / "run")
    assert drawn == [1, 5, 9]           # after the rows of 0, of 3 and of 6 updates
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
    monkeypatch.setattr("support.report.time.perf_counter", lambda: now[0])
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
    report.sample(1, lambda: 1 / 0)
    report.finish(types.SimpleNamespace(signal=0), {})
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
