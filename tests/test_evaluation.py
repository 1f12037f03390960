"""An evaluation measures fixed windows, the same in every run, and leaves no mark on the weights."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import log_rows, trained

import train
from prepare import write_set
from train import get_batch, load


@pytest.fixture(scope="module")
def checkpoint(data_dir, tmp_path_factory):
    """Weights whose loss differs from window to window, as that of new ones does not."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert trained(data_dir, out, max_iters=20, eval_interval=20, sample_tokens=0).returncode == 0
    return out / "ckpt.pt"


@pytest.fixture
def evaluate(start, checkpoint, tmp_path):
    """evaluate("name", batch_size=2): the losses of `checkpoint`, as a run that starts from it logs them."""
    def evaluate(out, **settings):
        result = start(out, init_from=checkpoint, max_iters=0, **settings)
        assert result.returncode == 0, result.stderr
        row, = log_rows(tmp_path / out)
        return {key: float(row[key]) for key in ("train_loss", "val_loss", "val_bits_per_byte")}
    return evaluate


@pytest.fixture
def windows(monkeypatch):
    """The window starts that are read from now on, by split."""
    seen = {"train": [], "val": []}

    def recorded(data, starts, block_size, vocab_size, split, device):
        seen[split] += starts.tolist()
        return get_batch(data, starts, block_size, vocab_size, split, device)

    monkeypatch.setattr(train, "get_batch", recorded)
    return seen


def plain_loss(checkpoint, ids, starts) -> float:
    """The mean loss of the windows of `ids` at `starts`, one at a time."""
    model, _ = load(checkpoint)
    losses = []
    for first in starts:
        window = torch.from_numpy(ids[first:first + 33].astype(np.int64))
        with torch.no_grad():
            losses.append(model(window[None, :-1], window[None, 1:])[1].item())
    assert np.std(losses) > 0.01                        # so that it matters which windows are taken
    return float(np.mean(losses))


@pytest.mark.parametrize("settings", [
    dict(batch_size=1), dict(batch_size=7), dict(gradient_accumulation_steps=5), dict(seed=1),
    dict(dropout=0.5, attn_dropout=True), dict(sampling="random"), dict(optimizer="adamw")], ids=str)
@pytest.mark.parametrize("eval_iters", [0, 2])
def test_the_training_settings_do_not_change_it(evaluate, eval_iters, settings):
    assert evaluate("other", eval_iters=eval_iters, **settings) == evaluate("usual", eval_iters=eval_iters)


def test_it_is_the_same_at_every_step(start, tmp_path, windows):
    assert start("run", max_iters=3, eval_interval=1, eval_iters=1, batch_size=1).returncode == 0
    assert len(windows["val"]) == 4 * 16
    assert windows["val"] == 4 * windows["val"][:16]


def test_eval_iters_0_covers_every_whole_window_of_val_once(evaluate, windows, checkpoint, data_dir):
    losses = evaluate("run", eval_iters=0)
    ids = np.fromfile(data_dir / "toy" / "val.bin", np.uint8)
    whole = (len(ids) - 1) // 32                        # a window of 32 inputs has a target more
    assert windows["val"] == list(range(0, whole * 32, 32))
    assert losses["val_loss"] == pytest.approx(plain_loss(checkpoint, ids, windows["val"]), abs=1e-5)
    assert len(windows["train"]) == whole               # as many of train's


@pytest.mark.parametrize("eval_iters", [1, 3])
def test_n_covers_16_n_windows_spread_evenly(evaluate, windows, checkpoint, data_dir, eval_iters):
    losses = evaluate("run", eval_iters=eval_iters)
    for split in ("train", "val"):
        ids, starts = np.fromfile(data_dir / "toy" / f"{split}.bin", np.uint8), windows[split]
        assert len(starts) == 16 * eval_iters
        gaps = [after - before for before, after in pairwise(starts)]
        assert starts[0] == 0
        assert min(gaps) >= 32                          # none overlap
        assert max(gaps) - min(gaps) <= 32
        assert len(ids) - 33 - max(gaps) <= starts[-1] <= len(ids) - 33     # up to the end
        assert losses[f"{split}_loss"] == pytest.approx(plain_loss(checkpoint, ids, starts), abs=1e-5)


def test_n_beyond_the_split_covers_it_once(evaluate):
    assert evaluate("many", eval_iters=1_000)["val_loss"] == evaluate("all", eval_iters=0)["val_loss"]


def test_it_uses_no_dropout(start, tmp_path, checkpoint):
    """Twice the same weights, twice the same loss, although dropout would take half of them away."""
    rates = dict(learning_rate=0, embed_lr=0, ngram_lr=0, head_lr=0, scalar_lr=0)
    assert start("run", init_from=checkpoint, max_iters=1, eval_interval=1, dropout=0.5, **rates).returncode == 0
    before, after = (row["val_loss"] for row in log_rows(tmp_path / "run") if row["val_loss"])
    assert before == after


def test_bits_per_byte_count_the_bytes_of_the_text(start, tmp_path):
    """In a text of 2-byte and 1-byte characters a token is more than a byte."""
    text = "Ärger, Öl und Übermut: drei Rätsel für große Mäuse.\n" * 60
    (tmp_path / "umlauts.txt").write_text(text, encoding="utf-8")
    write_set(tmp_path / "umlauts", [tmp_path / "umlauts.txt"], "char", 0.2)
    assert start("run", dataset="umlauts", data_dir=tmp_path, init="gpt2", max_iters=2).returncode == 0
    val = text[int(len(text) * 0.8):]
    per_byte = len(val) / len(val.encode("utf-8"))
    assert per_byte < 0.95
    rows = [row for row in log_rows(tmp_path / "run") if row["val_loss"]]
    for row in rows:
        expected = float(row["val_loss"]) / math.log(2) * per_byte
        assert float(row["val_bits_per_byte"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("max_iters", "steps"), [(0, [0]), (2, [0, 2]), (6, [0, 3, 6]), (7, [0, 3, 6, 7])])
def test_it_comes_first_at_every_interval_and_last(start, tmp_path, max_iters, steps):
    assert start("run", max_iters=max_iters).returncode == 0
    rows = log_rows(tmp_path / "run")
    assert [int(row["step"]) for row in rows if row["val_loss"]] == steps
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, max_iters + 1))


def test_eval_only_evaluates_and_writes_nothing(start, evaluate, checkpoint, tmp_path):
    result = start("none", init_from=checkpoint, eval_only=True)
    assert result.returncode == 0
    assert not (tmp_path / "none").exists()
    train_loss, val_loss = re.search(r"train (\S+) \| val (\S+)", result.stdout).groups()
    usual = evaluate("usual")
    assert [train_loss, val_loss] == [f"{usual[key]:.4f}" for key in ("train_loss", "val_loss")]


@pytest.fixture(scope="module")
def usual(data_dir, tmp_path_factory) -> dict:
    """The weights of a run with dropout, so that a random number drawn by an evaluation or a sample would show."""
    out = tmp_path_factory.mktemp("usual") / "run"
    assert trained(data_dir, out, dropout=0.2).returncode == 0
    return torch.load(out / "last.pt")["model"]


@pytest.mark.parametrize("settings", [
    dict(eval_interval=1), dict(eval_interval=1_000), dict(eval_iters=0), dict(log_interval=4),
    dict(sample_interval=1), dict(sample_tokens=0), dict(sample_tokens=90, sample_temperature=0),
    dict(save_interval=1), dict(always_save_checkpoint=True)], ids=str)
def test_looking_on_does_not_change_the_weights(start, usual, tmp_path, settings):
    assert start("run", dropout=0.2, **settings).returncode == 0
    weights = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert usual.keys() == weights.keys()
    assert all(torch.equal(usual[name], weights[name]) for name in usual)


def test_pictures_do_not_change_the_weights_either(run, usual, tmp_path):
    """A whole process, with matplotlib where it is installed, against one without."""
    process = run("train.py", "--out_dir=run", "--dropout=0.2", toy=True)
    assert process.returncode == 0, process.stderr
    weights = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(usual[name], weights[name]) for name in usual)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bfloat16_learns_as_float32_does(start, tmp_path, optimizer):
    """The loss curves are within 0.02 of one another at steps 40 and 60."""
    rates = dict(learning_rate=0.01) if optimizer == "adamw" else {}
    curves = []
    for dtype in ("float32", "bfloat16"):
        settings = rates | dict(optimizer=optimizer, dtype=dtype, max_iters=60, eval_interval=20, sample_tokens=0)
        assert start(dtype, **settings).returncode == 0
        curves.append([float(row["val_loss"]) for row in log_rows(tmp_path / dtype) if row["val_loss"]])
    assert curves[0] != curves[1]
    assert curves[0][-1] < curves[0][0] - 0.5           # it has learned something
    assert curves[1][2:] == pytest.approx(curves[0][2:], abs=0.02)
