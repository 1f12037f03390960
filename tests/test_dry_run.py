"""--dry_run says what a run would be, from three real steps, and writes nothing."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY, flags, log_rows, one_line_error

import train
from inkling import format as format_module
from inkling import report as report_module
from inkling.report import doubts, evaluations_left, model_table, saved_tensors
from train import GPT, Config


def lines(said: str, label: str) -> list:
    """The texts of all lines under a label, those that go on without one included."""
    found, current = [], ""
    for line in said.splitlines():
        current = line[:8].strip() or current
        if current == label:
            found.append(line[9:])
    return found


def seconds(text: str) -> int:
    hours, minutes, rest = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text).groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(rest or 0)


def test_it_tells_data_model_memory_time_and_files_and_writes_nothing(start, tmp_path, data_dir):
    before = sorted(tmp_path.iterdir())
    done = start("run", "--dry_run", max_iters=100, gradient_accumulation_steps=2)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    said = done.stdout
    labels = [line.split()[0] for line in said.splitlines() if line[:1].isalpha()]
    order = ["data", "model", "steps", "settings", "machine", "parameter", "total", "data", "memory", "time", "files"]
    assert [label for label in labels if label in order] == order
    assert "step 1" not in said                 # the trial itself is not a run
    assert "eval " not in said
    assert "sample at" not in said
    train_tokens = (data_dir / "toy" / "train.bin").stat().st_size          # one byte each
    parameters = int(re.search(r"total +([\d,]+)", said)[1].replace(",", ""))
    assert f"({parameters:,})" in lines(said, "model")[0]
    per_parameter, epochs = re.match(r"(\S+) train tokens to a parameter but for the n-grams; the run reads "
                                     r"25.6k tokens, (\S+) epochs", lines(said, "data")[1]).groups()
    assert float(per_parameter) == pytest.approx(train_tokens / (parameters - 97 * 32), rel=0.01)
    assert float(epochs) == pytest.approx(100 * 8 * 32 / train_tokens, rel=0.02)
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert re.search(rf"^.{{9}}{part} +[\d.]+ MB", said, re.M), part
    assert "100 steps of" in lines(said, "time")[0]
    assert "35 evaluations of" in lines(said, "time")[0]
    assert said.splitlines()[-1] == "dry run  nothing was written; the same command without --dry_run does it"


def test_it_leaves_a_finished_run_as_it_was_and_says_what_remains(start, tmp_path):
    assert start("run").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = start("run", "--dry_run")
    assert any("run holds a run" in line for line in lines(again.stdout, "warning"))
    going_on = start("run", "--dry_run", "--init_from=resume", max_iters=10)
    assert going_on.returncode == 0, going_on.stderr
    assert lines(going_on.stdout, "resumes") == ["at step 6: 4 of 10 steps remain, 512 tokens"]
    assert "4 steps of" in lines(going_on.stdout, "time")[0]
    assert "2 evaluations of" in lines(going_on.stdout, "time")[0]          # at 9 and at 10
    assert "first loss" not in going_on.stdout
    assert not any("holds a run" in line for line in lines(going_on.stdout, "warning"))
    over = start("run", "--dry_run", "--init_from=resume")
    assert lines(over.stdout, "time") == ["nothing remains to be done"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_it_takes_three_steps_and_two_small_evaluations(start, monkeypatch):
    updates, windows, update, get_batch = [], [], report_module.Report.update, train.get_batch
    monkeypatch.setattr(report_module.Report, "update", lambda self, *some: updates.append(some[0]) or update(self, *some))
    monkeypatch.setattr(train, "get_batch", lambda data, starts, *rest: windows.append((rest[2], len(starts)))
                        or get_batch(data, starts, *rest))
    assert start("run", "--dry_run", max_iters=1000, eval_iters=0, log_interval=7, save_interval=1).returncode == 0
    assert updates == [1, 2, 3]
    assert sum(count for split, count in windows if split == "val") == 2 * 16
    assert max(count for _, count in windows) == 16


@pytest.mark.parametrize("settings", [
    dict(max_iters=0), dict(max_iters=2), dict(eval_only=True), dict(eval_iters=0), dict(optimizer="adamw"),
    dict(dtype="bfloat16"), dict(sample_interval=2)], ids=str)
def test_it_works_with(start, tmp_path, settings):
    done = start("run", "--dry_run", **settings)
    assert done.returncode == 0, done.stderr
    assert "about" in lines(done.stdout, "time")[0]
    assert not (tmp_path / "run").exists()


def test_the_time_adds_up(start, monkeypatch):
    """On a clock on which a training step takes 2 s, the first 9, and an evaluation of 16 windows of both splits 4."""
    now, trained, get_batch = [0.0], [], train.get_batch
    monkeypatch.setattr("inkling.report.time.perf_counter", lambda: now[0])

    def slow(data, starts, *rest):
        trained.append(len(starts) == 4)                # of the trace and of the three steps
        now[0] += 9 if trained[-1] and sum(trained) == 2 else 2
        return get_batch(data, starts, *rest)

    monkeypatch.setattr(train, "get_batch", slow)
    done = start("run", "--dry_run", max_iters=100, eval_interval=50, eval_iters=2, sample_tokens=0)
    text, = lines(done.stdout, "time")
    assert text == "100 steps of 2,000 ms 3m20s, 3 evaluations of 8 s 24s: about 3m44s in all"


def test_of_eval_only_it_tells_the_one_evaluation(start, tmp_path):
    text, = lines(start("run", "--dry_run", eval_only=True, sample_tokens=0).stdout, "time")
    assert text.startswith("1 evaluations of")


def test_what_is_wrong_is_refused_as_without_it(start, tmp_path, monkeypatch):
    one_line_error(start("run", "--dry_run", block_size=8000), "block_size=8000")
    one_line_error(start("run", "--dry_run", n_head=3), "n_head=3")
    monkeypatch.setitem(sys.modules, "wandb", None)
    one_line_error(start("run", "--dry_run", wandb_log=True), "pip install wandb")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_in_these_steps_is_found(start, tmp_path, monkeypatch):
    logits = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, x: logits(self, x) * (math.nan if self.training else 1))
    done = start("run", "--dry_run")
    assert done.returncode == 3
    assert "step 1 is not finite" in done.stderr
    assert "last.pt" not in done.stderr
    assert "nothing was written" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_missing_named_set_is_prepared(start, tmp_path):
    done = start("run", "--dry_run", dataset="fables", data_dir=tmp_path / "sets")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sets" / "fables" / "meta.json").exists()
    assert not (tmp_path / "run").exists()


def test_two_processes_share_it_and_one_speaks(data_dir, tmp_path):
    words = flags(**TOY | dict(data_dir=data_dir, out_dir="run"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run([*launcher, str(ROOT / "train.py"), *words, "--dry_run"], cwd=tmp_path, text=True,
                             capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("nothing was written") == 1
    assert "backward pass of 2 sequences" in process.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, dict(shortcuts=False), dict(tie_weights=True, init="gpt2"),
                                     dict(mlp="swiglu", bias=True, norm_gain=True, positions="learned")], ids=str)
def test_the_table_of_the_model_adds_up(toy, changes):
    model = GPT(toy(n_layer=3, **changes), 50)
    head, *rows, total = model_table(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert total.split() == ["total", f"{parameters:,}"]
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == parameters
    assert len({len(row) for row in (head, *rows, total)}) == 1             # aligned
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for row in rows:
        name, shape, times, count = re.fullmatch(r"(\S+(?: = \S+)?) +(.+?)  +(\d+) +([\d,]+)", row).groups()
        fits = [name.replace("*", str(layer)) for layer in range(3) if name.replace("*", str(layer)) in shapes]
        if " = " in name:
            assert (name, count) == ("head.weight = wte.weight", "0")
            continue
        assert " x ".join(map(str, shapes[fits[0]])) == shape
        assert len(set(fits)) == int(times)


def test_saved_tensors_are_counted_once_and_without_weights():
    """Of h = x @ w1, y = exp(h), z = y @ w2, the logits' log_softmax: autograd keeps x, y and the log-probabilities."""
    class Model(torch.nn.Module):
        vocab_size = 11

        def __init__(self):
            super().__init__()
            self.w1, self.w2 = (torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (5, 11)))

        def forward(self, x):
            return torch.nn.functional.log_softmax((x @ self.w1).exp() @ self.w2, -1)

    model, x = Model(), torch.randn(3, 7)
    found = saved_tensors(lambda: model(x).sum().backward(), model, 3 * 11)
    assert found == (4 * (3 * 7 + 3 * 5), 4 * 3 * 11, 4 * 3 * 7)


def test_it_counts_the_optimizers_state_and_what_a_larger_batch_takes(start):
    def parts(**settings) -> dict:
        said = start("run", "--dry_run", n_embd=128, **settings).stdout
        return {name: float(number) for name, number in re.findall(r"^.{9}(\w+) +([\d.]+) MB", said, re.M)}

    adamw, muon, more = parts(optimizer="adamw"), parts(), parts(batch_size=8)
    assert adamw["optimizer"] == pytest.approx(2 * adamw["weights"], rel=0.1)       # two moments
    assert muon["optimizer"] == pytest.approx(1.1 * muon["weights"], rel=0.1)       # one, of all but the embeddings
    assert adamw["gradients"] == pytest.approx(adamw["weights"], rel=0.1)
    assert more["activations"] == pytest.approx(2 * muon["activations"], rel=0.1)


@pytest.mark.parametrize(("settings", "parts", "where"), [
    (dict(batch_size=256), ["weights", "optimizer", "activations", "logits"], "as the backward pass begins"),
    (dict(batch_size=1, block_size=4, n_embd=256), ["weights", "gradients", "optimizer", "work"],
     "in the optimizer's update"),
    (dict(batch_size=1, block_size=256, n_layer=1), ["weights", "optimizer"],
     "in an evaluation, 16 windows together")], ids=["backward", "update", "evaluation"])
def test_the_peak_is_where_most_is_held_at_once(start, monkeypatch, settings, parts, where):
    found, memory = {}, report_module.Report.memory
    monkeypatch.setattr(report_module.Report, "memory", lambda self: found.update(
        memory(self), widest=self.found["saved"][2], vocab_size=self.model.vocab_size) or memory(self))
    said = start("run", "--dry_run", **settings).stdout
    text, = re.findall(r"about (.+)", said)[:1]
    assert text.endswith(f" of tensors at once: {where}")
    known = sum(found[name] for name in parts)
    evaluation = 16 * 256 * (4 * 17 * 32 + 16 * found["vocab_size"])
    more = {"backward": 3 * found["widest"], "update": 0, "evaluation": evaluation}
    peak = max(found["phases"].values())
    phase, = [name for name, bytes_held in found["phases"].items() if bytes_held == peak]
    assert peak == known + more[phase]
    assert text.startswith(format_module.size(peak))


SOUND = dict(max_iters=100, eval_interval=50)
TOKENS = dict(train=100_000, val=10_000, read=100_000)


@pytest.mark.parametrize(("settings", "tokens", "said"), [
    (dict(), dict(val=2000), "val holds 7 windows of 256"),
    (dict(lr_decay_iters=50), {}, "stays at its lowest"), (dict(lr_decay_iters=500), {}, "will not have come down"),
    (dict(dropout=0.0), dict(read=1_100_000), "11 epochs without dropout"),
    (dict(), dict(train=1000), "learned by heart"), (dict(batch_size=400), {}, "more than an epoch"),
    (dict(min_lr=0.001, schedule="constant"), {}, "min_lr=0.001 is not used: schedule=constant"),
    (dict(min_lr=0.001, decay_lr=False), {}, "min_lr=0.001 is not used: decay_lr=False"),
    (dict(warmup_iters=100), {}, "the full learning rate is never reached"),
    (dict(eval_interval=200), {}, "at its two ends only"), (dict(patience=2), {}, "will not stop early")], ids=str)
def test_what_is_rarely_meant_is_warned_of(settings, tokens, said):
    assert doubts(Config(**SOUND), TOKENS, 100_000, 65, "cpu") == []
    found = doubts(Config(**SOUND | settings), TOKENS | tokens, 100_000, 65, "cpu")
    assert any(said in warning for warning in found), found


def test_a_vocabulary_that_is_slow_on_a_gpu_is_warned_of_there():
    assert any("pad_vocab_to" in warning for warning in doubts(Config(**SOUND), TOKENS, 100_000, 65, "cuda:1"))
    assert not doubts(Config(**SOUND, pad_vocab_to=64), TOKENS, 100_000, 65, "cuda")


@pytest.mark.parametrize("interval", [1, 3, 4, 10, 50])
@pytest.mark.parametrize("most", [0, 1, 9, 10, 12])
def test_the_evaluations_to_come_are_those_of_the_loop(interval, most):
    cfg = Config(max_iters=most, eval_interval=interval)
    evaluated, steps = -1, []
    left = {}
    for step in range(most + 1):
        left[step, evaluated] = len(steps)
        if step > evaluated and (step == most or step % interval == 0):     # as in train()
            evaluated = step
            steps.append(step)
            left[step, evaluated] = len(steps)
    for (step, done), so_far in left.items():
        assert evaluations_left(cfg, step, done) == len(steps) - so_far, (step, done)


def test_a_resumed_run_is_as_if_there_had_been_no_dry_run(start, tmp_path):
    for out in ("plain", "tried"):
        assert start(out, dropout=0.2).returncode == 0
        if out == "tried":
            assert start(out, "--init_from=resume", "--dry_run", max_iters=9).returncode == 0
        assert start(out, "--init_from=resume", max_iters=9).returncode == 0
    assert log_rows(tmp_path / "plain") == log_rows(tmp_path / "tried")
