"""A batch depends on the seed, the step and nothing else; an epoch shows every token once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import log_rows

import train
from inkling.cli import UserError
from inkling.distributed import Ranks
from train import get_batch, window_starts


def stream(cfg, tokens: int, windows: int) -> np.ndarray:
    """The first `windows` window starts of a run."""
    steps = -(-windows // (cfg.batch_size * cfg.gradient_accumulation_steps))
    return np.concatenate([window_starts(step, cfg, tokens) for step in range(steps)])[:windows]


def visits(starts, block_size: int, tokens: int) -> np.ndarray:
    """How often each token is an input of the windows at `starts`."""
    return np.bincount(((starts[:, None] + np.arange(block_size)) % tokens).ravel(), minlength=tokens)


@pytest.mark.parametrize("sampling", ["epoch", "fixed", "random"])
def test_a_batch_is_a_pure_function_of_seed_and_step(toy, sampling):
    cfg = toy(sampling=sampling)
    first = [window_starts(step, cfg, 18_000) for step in range(200)]
    np.random.seed(1)
    torch.manual_seed(1)
    again = {step: window_starts(step, cfg, 18_000) for step in np.random.permutation(200)}
    assert all((first[step] == again[step]).all() for step in range(200))

    elsewhere = toy(sampling=sampling, max_iters=9, eval_interval=1, learning_rate=1.0, dropout=0.9)
    assert (window_starts(7, elsewhere, 18_000) == first[7]).all()
    assert (window_starts(7, toy(sampling=sampling, seed=2), 18_000) != first[7]).any()
    assert len({tuple(starts) for starts in first}) == 200


@pytest.mark.parametrize("sampling", ["epoch", "fixed", "random"])
def test_micro_batches_divide_the_same_batch(toy, sampling):
    whole, halves, quarters = (toy(sampling=sampling, batch_size=size, gradient_accumulation_steps=4 // size)
                               for size in (4, 2, 1))
    for step in range(5):
        assert len(window_starts(step, whole, 18_000)) == 4
        assert (window_starts(step, whole, 18_000) == window_starts(step, halves, 18_000)).all()
        assert (window_starts(step, whole, 18_000) == window_starts(step, quarters, 18_000)).all()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_trains_the_same_model(start, tmp_path, optimizer):
    """In another order the sums of float32 change the gradients by about 1e-10, on every CPU in another way. Near 0,
    Adam makes of that learning_rate / adam_eps times as much: a whole step with its usual adam_eps, 5e-9 with this."""
    results = []
    for size in (4, 2, 1):
        folder = f"{optimizer}{size}"
        assert start(folder, batch_size=size, gradient_accumulation_steps=4 // size, dropout=0, max_iters=4,
                     optimizer=optimizer, learning_rate=0.005, adam_eps=1e-4).returncode == 0
        losses = [float(row["loss"]) for row in log_rows(tmp_path / folder) if row["loss"]]
        results.append((losses, torch.load(tmp_path / folder / "last.pt")["model"]))
    (losses, weights), *others = results
    assert losses[-1] < losses[0] - 0.01                # it has learned, so the weights have moved
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        for name in weights:
            assert torch.allclose(weights[name], other_weights[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(("world", "size", "steps"), [(1, 2, 3), (2, 4, 1), (2, 4, 3), (3, 2, 3), (4, 1, 4)])
def test_the_slices_of_all_processes_are_the_global_batch(toy, monkeypatch, world, size, steps):
    """Each process in turn, alone: a batch needs nothing of the others."""
    whole = train.start(toy(batch_size=size, gradient_accumulation_steps=steps))
    expected = torch.cat([x for x, _ in whole.batches(7)])
    slices = []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        ranks = Ranks()
        sequences, micro_batches = ranks.share(size * steps, size)
        plan = replace(whole.plan, sequences=sequences, micro_batches=micro_batches)
        run = replace(whole, ranks=ranks, plan=plan)
        inputs = [x for x, _ in run.batches(7)]
        assert len(inputs) == micro_batches
        slices += inputs
    assert torch.equal(torch.cat(slices), expected)
    lengths = {len(x) for x in slices}
    assert len(lengths) == 1            # equal shares, so that a mean of means is the mean
    assert max(lengths) <= size         # no micro-batch is larger than asked for


@pytest.mark.parametrize("tokens", [320, 321, 351, 100_000], ids=lambda n: f"{n} tokens")
def test_an_epoch_shows_every_token_once(toy, tokens):
    cfg = toy(block_size=32, batch_size=3)
    windows = tokens // 32
    starts = stream(cfg, tokens, 3 * windows).reshape(3, windows)
    for epoch in starts:
        counts = visits(epoch, 32, tokens)
        assert counts.max() == 1
        assert counts.sum() == windows * 32             # all, but for those at the end that fill no window
    if tokens % 32:
        left_out = [set(np.flatnonzero(visits(epoch, 32, tokens) == 0)) for epoch in starts]
        assert left_out[0] != left_out[1]               # other tokens in every epoch


def test_epochs_and_seeds_have_their_own_order(toy):
    def epochs(seed):
        """The order of three epochs, wherever in the text their first windows are."""
        starts = stream(toy(seed=seed, block_size=32), 3_200, 300).reshape(3, 100)
        return [tuple((epoch - epoch[0]) % 3_200) for epoch in starts]

    assert len({*epochs(1), *epochs(2)}) == 6
    assert tuple(range(0, 3_200, 32)) not in epochs(1)


def test_a_batch_may_straddle_epochs(toy):
    """10 windows to an epoch: batches of 3 or 4 cut the same stream, and lose nothing at its seams."""
    by_three, by_four, by_ten = (stream(toy(batch_size=size), 320, 60) for size in (3, 4, 10))
    assert (by_three == by_four).all()
    assert (by_three == by_ten).all()
    assert all((visits(epoch, 32, 320) == 1).all() for epoch in by_three.reshape(6, 10))


def test_an_epoch_larger_than_the_text_repeats_it(toy):
    """A batch may be larger than an epoch."""
    starts = window_starts(0, toy(batch_size=7), 70)    # 2 windows to an epoch
    assert len(starts) == 7
    assert all(visits(starts[first:first + 2], 32, 70).max() == 1 for first in (0, 2, 4))


def test_fixed_windows_are_the_same_in_every_epoch_in_another_order(toy):
    cfg = toy(sampling="fixed", batch_size=5)           # block_size 32
    epochs = stream(cfg, 32 * 25 + 9, 25 * 6).reshape(6, 25)
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(0, 32 * 25, 32))}
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_random_windows_stay_inside_and_reach_both_ends(toy):
    starts = stream(toy(sampling="random", batch_size=4), 40, 400)
    assert set(starts) == set(range(8))                 # the last has its last target at token 39


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_targets_are_the_inputs_one_token_on(dtype):
    data = np.random.default_rng(0).integers(0, 200, 50).astype(dtype)
    starts = np.array([0, 41, 17, 49])                  # 49 goes round the end of the text
    x, y = get_batch(data, starts, 8, 200, "train", "cpu")
    assert x.shape == y.shape == (4, 8)
    assert x.dtype == y.dtype == torch.int64
    for row, first in enumerate(starts):
        assert x[row].tolist() == [data[(first + i) % 50] for i in range(8)]
        assert y[row].tolist() == [data[(first + i + 1) % 50] for i in range(8)]


@pytest.mark.parametrize("place", [3, 11], ids=["an input", "the last target"])
def test_ids_beyond_the_vocabulary_are_refused(place):
    data = np.zeros(40, np.uint16)
    data[place] = 59
    get_batch(data, np.array([3]), 8, 60, "train", "cpu")               # 59 is the last id of 60
    with pytest.raises(UserError, match=r"train\.bin holds token id 59, .*--check"):
        get_batch(data, np.array([3]), 8, 59, "train", "cpu")


def test_a_run_stops_at_the_batch_that_holds_a_bad_id(start, data_dir, tmp_path):
    """The toy settings evaluate 16 of the windows; a bad id beyond them is met while training."""
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        (folder / name).write_bytes((data_dir / "toy" / name).read_bytes())
    ids = np.fromfile(folder / "train.bin", np.uint8)
    ids[40:1_000] = 255                                 # between the first two evaluation windows
    ids.tofile(folder / "train.bin")
    result = start("run", data_dir=folder.parent, max_iters=200, eval_interval=200)
    assert result.returncode == 2
    assert "token id 255" in result.stderr
    assert "step   1/200" in result.stdout
