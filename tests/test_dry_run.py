"""--dry_run says what a run would take, from three real steps, and writes nothing."""

import math
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY, log_rows, one_line_error
from test_processes import together

import train
from inkling.dry_run import (
    Memory,
    Times,
    Trial,
    Work,
    dry_run,
    estimate_evaluation,
    estimate_memory,
    file_doubts,
    measure,
    measure_saved_tensors,
    memory_doubts,
    parameter_table,
    remaining_work,
    setting_doubts,
    time_doubts,
)
from inkling.evaluation import plan_evaluations
from inkling.format import size
from inkling.report import Report
from train import GPT, AdamW, Config

VOCAB_SIZE = 50


class GreedyAdamW(AdamW):
    """AdamW that says it needs a lot of memory for each update."""

    def working_bytes(self) -> int:
        return 7_000_000


@pytest.fixture
def make_run(tmp_path):
    """make_run(state={"step": 4}, n_embd=64): what dry_run sees of a run, on random tokens, with toy settings."""
    def make_run(state=None, plan=None, tokens=None, world=1, rank=0, optimizer=AdamW, **settings):
        cfg = Config(**TOY | {"out_dir": str(tmp_path / "run")} | settings)
        state = {"step": 0, "evaluated": None, "best_step": 0, "best_val_loss": math.inf, "losses": {}} | (state or {})
        state.setdefault("tokens", state["step"] * cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size)
        plan = {"device": "cpu", "dtype": "float32", "compile": False, "max_iters": cfg.max_iters,
                "evaluations": asdict(plan_evaluations(cfg.max_iters, cfg.batch_size, 62, cfg.eval_interval,
                                                       cfg.eval_iters)),
                "eval_interval": cfg.eval_interval,
                "sequences": cfg.batch_size * cfg.gradient_accumulation_steps // world,
                "micro_batches": cfg.gradient_accumulation_steps} | (plan or {})
        tokens = {"train": 18_000, "val": 2_000} | (tokens or {})
        model = GPT(cfg, VOCAB_SIZE)
        micro_batch = plan["sequences"] // plan["micro_batches"]
        x = torch.randint(VOCAB_SIZE, (micro_batch, cfg.block_size))

        def forward_backward():
            model(x, x)[1].backward()
            model.zero_grad(set_to_none=True)

        return SimpleNamespace(
            cfg=cfg, state=SimpleNamespace(**state), plan=SimpleNamespace(**plan),
            ranks=SimpleNamespace(rank=rank, world=world, first=rank == 0), model=model, x=x,
            optimizers=[optimizer(model.parameters())], forward_backward=forward_backward,
            meta={"splits": {split: {"tokens": count, "bytes": count} for split, count in tokens.items()},
                  "vocab_size": VOCAB_SIZE},
            stopwatch=SimpleNamespace(seconds=lambda: 0.0), guard=SimpleNamespace(verify=nothing),
            compile_seconds=0.0, first_step=state["step"],
            tokens_per_step=cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size,
            tokens_per_epoch=tokens["train"] // cfg.block_size * cfg.block_size)
    return make_run


def update(run, step: int):
    run.model(run.x, run.x)[1].backward()
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def nothing(*_):
    pass


def lines(said: str, label: str) -> list:
    """The texts of all lines under a label, those without a label of their own included."""
    texts = []
    current = ""
    for line in said.splitlines():
        current = line[:8].strip() or current
        if current == label:
            texts.append(line[9:])
    return texts


# -- whole runs of train.py ---------------------------------------------------------------------------

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
    per_parameter, epochs = re.match(r"(\S+) train tokens per parameter \(n-grams not counted\); the run reads "
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
    resumed = start("run", "--dry_run", "--init_from=resume", max_iters=10)
    assert resumed.returncode == 0, resumed.stderr
    assert lines(resumed.stdout, "resumes") == ["at step 6: 4 of 10 steps remain, 512 tokens"]
    assert "4 steps of" in lines(resumed.stdout, "time")[0]
    assert "2 evaluations of" in lines(resumed.stdout, "time")[0]           # at 9 and at 10
    assert "first loss" not in resumed.stdout
    assert not any("holds a run" in line for line in lines(resumed.stdout, "warning"))
    complete = start("run", "--dry_run", "--init_from=resume")
    assert lines(complete.stdout, "time") == ["nothing remains to be done"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_its_evaluation_is_a_small_one(start, monkeypatch):
    windows = []
    get_batch = train.get_batch

    def count(data, starts, block_size, vocab_size, split, device):
        windows.append((split, len(starts)))
        return get_batch(data, starts, block_size, vocab_size, split, device)

    monkeypatch.setattr(train, "get_batch", count)
    assert start("run", "--dry_run", max_iters=1000, eval_iters=0, log_interval=7, save_interval=1).returncode == 0
    assert [count for split, count in windows if split == "val"] == [16]
    trial = 4 + 3 * 4 + 16                              # trace, steps, evaluation
    assert sum(count for split, count in windows if split == "train") == 4 * 4 + trial      # the pace, from four passes


@pytest.mark.parametrize("settings", [
    {"max_iters": 0}, {"eval_only": True}, {"optimizer": "adamw"}, {"dtype": "bfloat16"},
    {"max_iters": None, "max_minutes": 1.0}], ids=str)
def test_it_works_with(start, tmp_path, settings):
    done = start("run", "--dry_run", **settings)
    assert done.returncode == 0, done.stderr
    assert "about" in lines(done.stdout, "time")[0]
    assert not (tmp_path / "run").exists()


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
    assert together(data_dir, tmp_path / "run", 2, dry_run=True) == [0, 0]
    first, second = ((tmp_path / f"run-{rank}.txt").read_text() for rank in (0, 1))
    assert first.count("nothing was written") == 1
    assert "backward pass of 2 sequences" in first
    assert second == ""
    assert not (tmp_path / "run").exists()


def test_it_counts_the_optimizers_state_and_what_a_larger_batch_takes(start):
    def parts(**settings) -> dict:
        said = start("run", "--dry_run", n_embd=128, **settings).stdout
        return {name: float(number) for name, number in re.findall(r"^.{9}(\w+) +([\d.]+) MB", said, re.M)}

    adamw = parts(optimizer="adamw")
    muon = parts()
    larger = parts(batch_size=8)
    assert adamw["optimizer"] == pytest.approx(2 * adamw["weights"], rel=0.1)       # two moments
    assert muon["optimizer"] == pytest.approx(1.1 * muon["weights"], rel=0.1)       # one, of all but the embeddings
    assert adamw["gradients"] == pytest.approx(adamw["weights"], rel=0.1)
    assert larger["activations"] == pytest.approx(2 * muon["activations"], rel=0.1)


def test_a_resumed_run_is_as_if_there_had_been_no_dry_run(start, tmp_path):
    for out in ("plain", "tried"):
        assert start(out, dropout=0.2).returncode == 0
        if out == "tried":
            assert start(out, "--init_from=resume", "--dry_run", max_iters=9).returncode == 0
        assert start(out, "--init_from=resume", max_iters=9).returncode == 0
    assert log_rows(tmp_path / "plain") == log_rows(tmp_path / "tried")


# -- the trial ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "calls"), [
    ({"max_iters": 1000}, [0, 1, 2, "evaluate", "sample"]),
    ({"max_iters": 2, "sample_tokens": 0}, [0, 1, "evaluate"]),
    ({"max_iters": 0}, ["evaluate", "sample"]),
    ({"eval_only": True}, ["evaluate", "sample"]),
    ({"max_iters": 7, "state": {"step": 6, "evaluated": 6}}, [6, "evaluate", "sample"]),
    ({"max_iters": 6, "state": {"step": 6, "evaluated": 3}}, ["evaluate", "sample"]),
    ({"max_iters": 6, "state": {"step": 6, "evaluated": 6}}, []),
    ({"max_iters": 1, "world": 2, "rank": 1}, [0, "evaluate"]),
    ({"max_iters": 1, "world": 2, "rank": 1, "shard": True}, [0, "evaluate", "sample"])],
    ids=str)
def test_it_takes_three_steps_an_evaluation_and_a_sample_or_what_remains(make_run, settings, calls):
    called = []
    measure(make_run(**settings), lambda run, step: called.append(step), lambda: called.append("evaluate"),
            lambda: called.append("sample"))
    assert called == calls


def test_processes_other_than_the_first_say_nothing(make_run, tmp_path, capsys):
    run = make_run(world=2, rank=1)
    dry_run(run, Report(run, tmp_path), tmp_path, update, nothing, nothing)
    assert capsys.readouterr() == ("", "")


def test_saved_tensors_are_counted_once_and_without_weights():
    """Of h = x @ w1, y = exp(h), z = y @ w2, the logits' log_softmax: autograd keeps x, y and the log-probabilities."""
    class Model(torch.nn.Module):
        vocab_size = 11

        def __init__(self):
            super().__init__()
            self.w1 = torch.nn.Parameter(torch.randn(7, 5))
            self.w2 = torch.nn.Parameter(torch.randn(5, 11))

        def forward(self, x):
            return torch.nn.functional.log_softmax((x @ self.w1).exp() @ self.w2, -1)

    model = Model()
    x = torch.randn(3, 7)
    run = SimpleNamespace(model=model, cfg=SimpleNamespace(block_size=3),
                          plan=SimpleNamespace(sequences=2, micro_batches=2),
                          forward_backward=lambda: model(x).sum().backward())
    saved = measure_saved_tensors(run)
    assert saved.activations == 4 * (3 * 7 + 3 * 5)
    assert saved.logits == 4 * 3 * 11
    assert saved.largest == 4 * 3 * 7


@pytest.mark.parametrize("changes", [{}, dict(shortcuts=False), dict(tie_weights=True, init="gpt2"),
                                     dict(mlp="swiglu", bias=True, norm_gain=True, positions="learned")], ids=str)
def test_the_table_of_the_parameters_adds_up(toy, changes):
    model = GPT(toy(n_layer=3, **changes), 50)
    head, *rows, total = parameter_table(model)
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


# -- memory -------------------------------------------------------------------------------------------

def test_memory_by_part(make_run):
    run = make_run(optimizer=GreedyAdamW, n_layer=1)
    memory = estimate_memory(run, measure(run, update, nothing, nothing))
    parameters = sum(p.numel() for p in run.model.parameters())
    assert memory.gradients == 4 * parameters
    assert memory.weights == 4 * (parameters + 2 * 32 * 8)          # with RoPE's two tables: 32 places, 8 pairs
    assert memory.optimizer == pytest.approx(8 * parameters, rel=0.01)
    assert memory.working == 7_000_000
    assert memory.eval_windows == 16
    assert estimate_memory(make_run(world=2), Trial(measure_saved_tensors(run))).gradients == \
        2 * estimate_memory(make_run(), Trial(measure_saved_tensors(run))).gradients


@pytest.mark.parametrize(("settings", "moment", "where"), [
    ({"batch_size": 256}, "backward", "as the backward pass begins"),
    ({"batch_size": 1, "block_size": 4, "optimizer": GreedyAdamW}, "update", "in the optimizer's update"),
    ({"batch_size": 1, "block_size": 256, "n_layer": 1, "tokens": {"val": 40_000}}, "evaluation",
     "in an evaluation, 16 windows together")], ids=["backward", "update", "evaluation"])
def test_the_peak_is_where_most_is_held_at_once(make_run, tmp_path, capsys, settings, moment, where):
    run = make_run(**settings)
    dry_run(run, Report(run, tmp_path), tmp_path, update, nothing, nothing)
    said = capsys.readouterr().out
    trial = Trial(measure_saved_tensors(run))
    memory = estimate_memory(run, trial)
    held = memory.weights + memory.optimizer
    held += {
        "backward": memory.activations + memory.logits + 3 * trial.saved.largest,
        "update": memory.gradients + memory.working,
        "evaluation": 16 * 256 * (4 * 17 * 32 + 16 * VOCAB_SIZE),
    }[moment]
    assert f"about {size(held)} of tensors at once: {where}\n" in said
    assert max(memory.peaks, key=memory.peaks.get) == moment


def test_gradients_of_earlier_micro_batches_are_there_in_the_backward_pass(make_run):
    one = make_run()
    several = make_run(gradient_accumulation_steps=2)
    trial = Trial(measure_saved_tensors(one))
    with_one = estimate_memory(one, trial)
    with_several = estimate_memory(several, trial)
    assert with_several.peaks["backward"] - with_one.peaks["backward"] == with_one.gradients
    assert with_several.peaks["update"] == with_one.peaks["update"]


# -- time ---------------------------------------------------------------------------------------------

def test_the_time_adds_up(make_run, tmp_path, capsys, monkeypatch):
    """On a clock on which a step takes 2 s, the first 9, a sample 0.5, and an evaluation of 16 windows a split 4."""
    now = [0.0]
    monkeypatch.setattr("inkling.dry_run.time.perf_counter", lambda: now[0])

    def advance(seconds: float):
        now[0] += seconds

    def text(run) -> str:
        dry_run(run, Report(run, tmp_path), tmp_path, lambda run, step: advance(2 if step else 9), lambda: advance(4),
                lambda: advance(0.5))
        only, = lines(capsys.readouterr().out, "time")
        return only

    settings = {"max_iters": 100, "eval_interval": 50, "eval_iters": 2}
    assert text(make_run(**settings, sample_tokens=0)) == \
        "100 steps of 2,000 ms 3m20s, 3 evaluations of 8 s 24s: about 3m44s in all"
    compiled = make_run(**settings, plan={"compile": True})
    compiled.compile_seconds = 30.0
    assert text(compiled) == (
        "100 steps of 2,000 ms 3m20s, 3 evaluations of 8 s 24s, 3 samples of 0.5 s 2s, compiling 37s: "
        "about 4m23s in all")
    assert text(make_run(**settings, eval_only=True)) == \
        "1 evaluations of 8 s 8s, 1 samples of 0.5 s 1s: about 9s in all"
    assert text(make_run(state={"step": 6, "evaluated": 6})) == "nothing remains to be done"


def test_what_remains_of_a_run(make_run):
    run = make_run(max_iters=100, eval_interval=30, state={"step": 40, "evaluated": 30})
    assert remaining_work(run) == Work(100, steps=60, evaluations=3, samples=3)
    run.cfg.sample_interval = 25
    assert remaining_work(run) == Work(100, steps=60, evaluations=3, samples=2)
    run.cfg.eval_only = True
    assert remaining_work(run) == Work(100, steps=0, evaluations=1, samples=0)


@pytest.mark.parametrize(("eval_iters", "world", "seconds"), [
    (0, 1, 4 * (160 / 16 + 160 / 16) / 2),      # of both splits as many windows as val has
    (3, 1, 4 * (48 / 16 + 48 / 16) / 2),
    (0, 2, 4 * (5 + 5) / 2), (1, 2, 4)])        # 16 windows go to one process
def test_an_evaluation_takes_as_long_as_its_windows(make_run, eval_iters, world, seconds):
    windows = min(160, 16 * eval_iters or 160)
    run = make_run(plan={"evaluations": {"windows": windows}}, world=world,
                   tokens={"train": 500 * 32 + 1, "val": 160 * 32 + 1})
    assert estimate_evaluation(run, Trial(None, evaluation_seconds=4.0)) == pytest.approx(seconds)


# -- doubts -------------------------------------------------------------------------------------------

SOUND = {"max_iters": 100, "eval_interval": 50, "n_layer": 1, "n_embd": 16, "batch_size": 8}
TOKENS = {"train": 100_000, "val": 10_000}


def doubts_about(make_run, tokens=None, plan=None, **settings) -> list:
    run = make_run(tokens=TOKENS | (tokens or {}), plan=plan, **SOUND | settings)
    return setting_doubts(run, remaining_work(run))


def test_sound_settings_raise_no_doubts(make_run):
    assert doubts_about(make_run) == []
    assert doubts_about(make_run, ngram_rows=400_000) == []     # most n-gram vectors are never learned


@pytest.mark.parametrize(("settings", "tokens", "said"), [
    ({}, {"val": 250}, "val holds 7 windows of 32 tokens, too few"),
    ({"lr_decay_iters": 50}, {}, "stays at its lowest"), ({"lr_decay_iters": 500}, {}, "does not come down"),
    ({"max_iters": 4300}, {}, "11 epochs without dropout: it may overfit"),
    ({"n_embd": 64}, {"train": 100}, "parameters for each train token: the model will overfit (memorize it)"),
    ({"batch_size": 4000}, {}, "a step of 128,000 tokens is more than an epoch, so it repeats windows"),
    ({"min_lr": 0.001, "schedule": "constant"}, {}, "min_lr=0.001 is not used: schedule=constant"),
    ({"min_lr": 0.001, "decay_lr": False}, {}, "min_lr=0.001 is not used: decay_lr=False"),
    ({"warmup_iters": 100}, {}, "the full learning rate is never reached"),
    ({"eval_interval": 200}, {}, "only the first and the last step are evaluated; ckpt.pt is the better one"),
    ({"patience": 2}, {}, "patience=2 covers the whole run, so early stopping never happens")], ids=str)
def test_what_is_rarely_meant_is_warned_of(make_run, settings, tokens, said):
    doubts = doubts_about(make_run, tokens, **settings)
    assert any(said in doubt for doubt in doubts), doubts


def test_the_steps_that_count_are_those_of_the_plan(make_run):
    """Not cfg.max_iters: max_epochs or max_minutes may set the length."""
    assert any("never reached" in doubt for doubt in doubts_about(make_run, plan={"max_iters": 10}, warmup_iters=20))


def test_a_vocabulary_that_is_slow_on_a_gpu_is_warned_of_there(make_run):
    assert any("pad_vocab_to=64" in doubt for doubt in doubts_about(make_run, plan={"device": "cuda:1"}))
    assert doubts_about(make_run, plan={"device": "cuda"}, pad_vocab_to=64) == []


def make_memory(**parts) -> Memory:
    return Memory(**{"weights": 0, "gradients": 0, "optimizer": 0, "working": 0, "activations": 0, "logits": 0,
                     "evaluation": 0, "eval_windows": 16, "peaks": {"update": 0}} | parts)


def test_too_little_memory_is_warned_of(make_run, monkeypatch):
    monkeypatch.setattr("inkling.dry_run.free_memory", lambda device: 10**10)
    monkeypatch.setattr("inkling.dry_run.peak_memory", lambda device: 10**9)
    run = make_run()
    assert memory_doubts(run, make_memory(peaks={"backward": 5 * 10**9, "update": 8 * 10**9})) == []
    said, = memory_doubts(run, make_memory(peaks={"backward": 5 * 10**9, "update": 95 * 10**8}))
    assert said.startswith("it needs about 9.50 GB of 10.00 GB of memory: halve --batch_size and double ")
    monkeypatch.setattr("inkling.dry_run.free_memory", lambda device: 0)        # not known
    assert memory_doubts(run, make_memory(peaks={"backward": 10**12})) == []


def test_long_evaluations_are_warned_of():
    def doubts(steps: float, evaluations: float) -> list:
        return time_doubts(Times(0, 0, 0, steps=steps, evaluations=evaluations, samples=0, compiling=0))

    assert doubts(60, 40) == []
    assert doubts(5, 40) == []                          # a short run
    assert doubts(40, 60) == ["evaluations take 60% of the time: --eval_interval=auto --eval_iters=auto bounds them"]


def test_files_that_cannot_be_written_are_warned_of(make_run, tmp_path, monkeypatch):
    run = make_run()
    out_dir = tmp_path / "run" / "deep"
    assert file_doubts(run, out_dir, make_memory()) == []
    said, = file_doubts(run, out_dir, make_memory(weights=10**18))
    assert said.startswith("the checkpoints and their replacements may take 4,000,000,000.00 GB")
    monkeypatch.setattr("inkling.dry_run.os.access", lambda folder, mode: False)
    assert file_doubts(run, out_dir, make_memory()) == [f"{tmp_path} cannot be written to: name another --out_dir"]
