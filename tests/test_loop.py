"""A run that is built and trained from outside, as a notebook or a benchmark does: start, update, estimate_loss; the
plan that a resume takes; a third optimizer added as CONTRIBUTING.md says."""

import math
import os
import re
import signal
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, TOY, log_rows, one_line_error, same_runs, trained

import train
from inkling import device
from inkling.cli import UserError
from inkling.stopping import NotFinite
from train import Config, Origin, State, estimate_loss, load, start, update


def last(folder) -> dict:
    """The content of last.pt."""
    return torch.load(folder / "last.pt", weights_only=True)


def weights(run) -> dict:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def changed(run, before: dict) -> set:
    """The names of the weights that are not what they were."""
    return {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}


def spoil(parameter, factor: float):
    """Multiply the gradients of a parameter; returns a handle whose remove() ends it."""
    return parameter.register_hook(lambda gradient: gradient * factor)


# ---- one step

@pytest.mark.parametrize("settings", [
    dict(), dict(optimizer="adamw", gradient_accumulation_steps=3, grad_clip=0.5), dict(dtype="bfloat16")], ids=str)
def test_update_is_what_the_loop_does(data_dir, toy, tmp_path, settings):
    """Losses, gradient norms and weights, to the last bit; with dropout, which is drawn by seed and step."""
    assert trained(data_dir, tmp_path / "run", dropout=0.2, **settings).returncode == 0
    run = start(toy(dropout=0.2, **settings))
    rows = [row for row in log_rows(tmp_path / "run") if row["loss"]]
    for step, row in enumerate(rows):
        loss, norm = update(run, step)
        assert (repr(loss.item()), repr(norm.item())) == (row["loss"], row["norm"])
    stored = last(tmp_path / "run")
    assert changed(run, stored["model"]) == set()
    losses = estimate_loss(run)
    assert losses == stored["losses"]


def test_a_new_run_has_made_no_step_and_no_evaluation(toy, tmp_path):
    run = start(toy())
    assert run.state == State(step=0, evaluated=None, best_step=0, best_val_loss=math.inf, losses={})
    assert run.tokens_per_step == 4 * 32
    assert run.tokens_per_epoch == 18_000 // 32 * 32
    before = weights(run)
    assert estimate_loss(run).keys() == {"train", "val"}
    assert run.state == State()
    assert changed(run, before) == set()
    assert list(tmp_path.iterdir()) == []               # and has written nothing


def test_an_evaluation_that_was_cut_off_is_not_counted(data_dir, monkeypatch, tmp_path):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return estimate_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "estimate_loss", signalled)
        assert trained(data_dir, tmp_path / "run").returncode == 143
    assert last(tmp_path / "run")["evaluated"] is None
    assert trained(data_dir, tmp_path / "run", init_from="resume").returncode == 0
    assert trained(data_dir, tmp_path / "whole").returncode == 0
    same_runs(tmp_path / "run", tmp_path / "whole")


# ---- settings and plan

@pytest.mark.parametrize("changes", [
    dict(dtype="auto", compile="auto", device="auto"), dict(max_epochs=0.01), dict(max_minutes=0.01), dict(keep=1)],
    ids=str)
def test_a_run_changes_no_setting(toy, tmp_path, changes):
    cfg = toy(**changes)
    before = asdict(cfg)
    assert train.train(cfg, tmp_path / "run") == 0
    assert asdict(cfg) == before
    assert last(tmp_path / "run")["config"] == before


def fast_bfloat16(_, dtype, size) -> float:
    return 0.1 if dtype == torch.bfloat16 else 1.0


def never(*_, **__):
    raise AssertionError("measured again")


def test_an_emulated_precision_is_found_out_by_a_small_product(monkeypatch):
    """On a processor with AVX2 alone, large ones took five seconds of every start."""
    def seconds(_, dtype, size):
        assert size <= 128, "a large product"
        return 50.0 if dtype == torch.bfloat16 else 1.0
    monkeypatch.setattr(device, "matmul_seconds", seconds)
    assert device.choose_dtype("cpu", "auto") == "float32"


AUTO = dict(dtype="auto", compile="auto")


@pytest.fixture
def measured(data_dir, monkeypatch, tmp_path):
    """The folder of a run that has chosen bfloat16 and not to compile, in a process that cannot measure again."""
    with monkeypatch.context() as patch:
        patch.setattr(device, "matmul_seconds", fast_bfloat16)
        assert trained(data_dir, tmp_path / "run", **AUTO).returncode == 0
    monkeypatch.setattr(device, "matmul_seconds", never)
    monkeypatch.setattr(train.Run, "forward_backward", never)
    return tmp_path / "run"


def test_the_plan_is_stored_beside_the_settings(measured):
    content = last(measured)
    assert content["plan"] == dict(device="cpu", dtype="bfloat16", compile=False, breakpoints=[[0, 6]], sequences=4,
                                   micro_batches=1, evaluations=dict(interval=3, windows=16, at_the_end=0),
                                   ngram_decay=1.7, fit_to_time=False, most_steps=0, resumed_at=0, expected=[])
    assert (content["config"]["dtype"], content["config"]["compile"]) == ("auto", "auto")


def test_a_resume_takes_the_plan(measured, data_dir):
    """Not even the flags of the first command change it."""
    done = trained(data_dir, measured, init_from="resume", max_iters=8, dtype=None, compile=None)
    assert done.returncode == 0, done.stderr
    assert "cpu, 1 threads; bfloat16; compile off" in done.stdout
    plan = last(measured)["plan"]
    assert (plan["device"], plan["dtype"], plan["compile"]) == ("cpu", "bfloat16", False)
    assert plan["breakpoints"] == [[0, 8]]


def test_what_is_typed_at_a_resume_wins_over_the_plan(measured, data_dir, monkeypatch):
    done = trained(data_dir, measured, init_from="resume", max_iters=8, dtype="float32", compile=None)
    assert done.returncode == 0, done.stderr
    assert "cpu, 1 threads; float32; compile off" in done.stdout
    assert last(measured)["plan"]["dtype"] == "float32"
    with pytest.raises(AssertionError, match="measured again"):
        trained(data_dir, measured, init_from="resume", max_iters=10, dtype="auto", compile=None)
    monkeypatch.setattr(train, "compile_pays", never)
    with pytest.raises(AssertionError, match="measured again"):
        trained(data_dir, measured, init_from="resume", max_iters=10, dtype=None, compile="auto")


# ---- numbers that are not finite

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_update_that_is_not_finite_is_not_applied_and_says_so(toy, optimizer):
    run = start(toy(optimizer=optimizer))
    update(run, 0)
    before = weights(run)
    spoil(run.model.wte.weight, math.nan)
    with pytest.raises(NotFinite, match="gradient of step 2 is not finite; its update was not applied"):
        update(run, 1)
    assert changed(run, before) == set()


def test_a_val_loss_that_is_not_finite_says_so_and_speaks_of_no_update(data_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "estimate_loss", lambda run, stop=None: dict(
        train=1.0, val=math.nan if run.state.step == 3 else 2.0))
    done = trained(data_dir, tmp_path / "run")
    assert done.returncode == 3
    message, = done.stderr.splitlines()
    assert "the val loss at step 3 is not finite" in message
    assert "applied" not in message
    assert last(tmp_path / "run")["step"] == 3
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize("spoiled", ["head.weight", "blocks.1.mlp.up.weight"])
def test_an_overflow_in_float16_skips_every_optimizer(toy, spoiled):
    """Also the one whose own gradients have not overflowed."""
    run = start(toy(dtype="float16", init="gpt2"))
    update(run, 0)
    before, scale = weights(run), run.scaler.get_scale()
    hook = spoil(run.model.get_parameter(spoiled), math.inf)
    update(run, 1)
    assert changed(run, before) == set()
    assert run.scaler.get_scale() == scale / 2
    hook.remove()
    update(run, 2)
    assert changed(run, before) == set(before)


def test_on_a_gpu_the_verdict_waits_on_the_device_and_nothing_is_updated_after_it(toy):
    """The way of a GPU, taken by a CPU: no update raises, verify does."""
    run = start(toy())
    run.guard.immediate = False
    update(run, 0)
    run.guard.verify(1)
    before = weights(run)
    hook = spoil(run.model.wte.weight, math.nan)
    update(run, 1)
    hook.remove()
    update(run, 2)
    assert changed(run, before) == set()
    with pytest.raises(NotFinite, match=r"step 3, or of a step shortly before it, is not finite"):
        run.guard.verify(3)


# ---- mistakes of a caller in Python

def test_a_mistake_raises_an_exception_with_the_whole_message(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint nowhere: python train.py writes one"):
        load("nowhere")
    with pytest.raises(UserError, match="no data set in .*nowhere.*python prepare.py YOUR_TEXT_FILE"):
        start(toy(dataset="nowhere"))
    with pytest.raises(UserError, match="n_layer=0 must be from 1 .*; .*n_head=3 must divide n_embd=32"):
        start(toy(n_layer=0, n_head=3))
    with pytest.raises(UserError, match="device=cuda:99"):
        start(toy(device="cuda:99"))
    with pytest.raises(UserError, match="val has 2,000 tokens; block_size=5000 needs 5001"):
        start(toy(block_size=5000))
    with pytest.raises(UserError, match="another tokenizer than the checkpoint"):
        start(toy(), Origin(dict(tokenizer=dict(kind="byte"))))
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="broken.pt is damaged"):
        load("broken.pt")
    assert start(toy()).model.cfg.n_layer == 2          # and life goes on


# ---- a third optimizer, added as CONTRIBUTING.md says

def recipe() -> str:
    """The code of CONTRIBUTING.md's section on optimizers."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("\n## An optimizer\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.+?)```", section, re.DOTALL)[1]


@pytest.fixture
def third(monkeypatch):
    """The name of the recipe's optimizer, as if its code stood in train.py."""
    monkeypatch.setattr(train, "OPTIMIZERS", dict(train.OPTIMIZERS))
    known = set(train.OPTIMIZERS)
    exec(recipe(), vars(train))
    name, = set(train.OPTIMIZERS) - known
    yield name
    for defined in re.findall(r"^(?:class|def) (\w+)", recipe(), re.MULTILINE):
        delattr(train, defined)


SGD = dict(learning_rate=0.05, momentum=0.9, weight_decay=0.0, dropout=0.2, init="gpt2", max_iters=12)


def test_the_recipes_optimizer_trains(data_dir, tmp_path, third):
    done = trained(data_dir, tmp_path / "run", optimizer=third, **SGD | dict(max_iters=30))
    assert done.returncode == 0, done.stderr
    losses = [float(row["val_loss"]) for row in log_rows(tmp_path / "run") if row["val_loss"]]
    assert losses[-1] < losses[0] - 0.1


def test_it_is_killed_and_resumes_bit_for_bit(data_dir, tmp_path, third, monkeypatch):
    settings = SGD | dict(optimizer=third, save_interval=2)
    assert trained(data_dir, tmp_path / "whole", **settings).returncode == 0
    child = os.fork()
    if child == 0:
        def killed_update(run, step, update=train.update):
            if step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(run, step)
        train.update = killed_update
        trained(data_dir, tmp_path / "run", **settings)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert last(tmp_path / "run")["step"] == 6
    assert trained(data_dir, tmp_path / "run", init_from="resume", **settings).returncode == 0
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_its_state_is_checked_when_it_is_read(data_dir, tmp_path, third):
    settings = SGD | dict(optimizer=third)
    assert trained(data_dir, tmp_path / "run", **settings).returncode == 0
    content = last(tmp_path / "run")
    state = content["optimizers"][0]["state"][0]
    state["momentum_buffer"] = state["momentum_buffer"][:-1]
    torch.save(content, tmp_path / "run" / "last.pt")
    one_line_error(trained(data_dir, tmp_path / "run", init_from="resume", **settings), "optimizer state does not fit",
                   "momentum_buffer")


def test_an_optimizer_that_does_not_say_what_its_state_looks_like_cannot_resume(data_dir, tmp_path, third, monkeypatch):
    """The mistake of leaving state_shapes out shows at the first resume, in words."""
    monkeypatch.delattr(train.SGD, "state_shapes")
    assert trained(data_dir, tmp_path / "run", optimizer=third, **SGD).returncode == 0
    done = trained(data_dir, tmp_path / "run", init_from="resume", optimizer=third, **SGD)
    one_line_error(done, "SGD does not say what its state looks like")


def test_an_unknown_optimizer_is_refused_with_the_known_ones(data_dir, tmp_path):
    one_line_error(trained(data_dir, tmp_path / "run", optimizer="adam"), "optimizer=adam", "muon, adamw")
    assert "sgd" not in train.OPTIMIZERS                # the tests above have left nothing
    assert TOY.keys() <= Config.__dataclass_fields__.keys()
