"""Several processes share the steps of one run: the same model, one of them writes, and when one goes, all go."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, TOY, flags, log_rows, trained

import train
from inkling import plan
from inkling.distributed import Ranks
from train import main

SHARED_STEP = dict(batch_size=4, gradient_accumulation_steps=4, max_iters=30, eval_interval=15, dropout=0,
                   schedule="constant", save_interval=4, eval_iters=2, log_interval=1)
ADAMW = dict(optimizer="adamw", learning_rate=0.003, weight_decay=0.1)
# At higher rates the order of the sums tells within 30 steps.
OPTIMIZERS = {"muon": dict(learning_rate=0.01, head_lr=0.004), "adamw": ADAMW}


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return any_port.getsockname()[1]


def together(data_dir, folder, count: int, before=lambda rank: None, **settings) -> list:
    """train.py in `count` forked processes, with what torchrun would tell them; their exit codes. `before(rank)` is
    called in each, to spoil something. What they print goes to folder-RANK.txt."""
    import torch._dynamo  # noqa: F401, which takes 2 s: once, rather than in every child

    place = dict(WORLD_SIZE=count, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    children = []
    for rank in range(count):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 99
        gc.freeze()                                     # what pytest has made is not searched, nor copied for it
        signal.alarm(150)                               # rather a red test than one that waits for ever
        try:
            os.environ.update({key: str(value) for key, value in dict(RANK=rank, LOCAL_RANK=rank, **place).items()})
            before(rank)
            done = trained(data_dir, folder, **settings)
            folder.with_name(f"{folder.name}-{rank}.txt").write_text(done.stdout + done.stderr)
            code = done.returncode
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def numbers(folder, column: str) -> list:
    return [float(row[column]) for row in log_rows(folder) if row[column]]


def same_run(a, b, columns=("loss", "norm", "train_loss", "val_loss")):
    for column in columns:
        assert numbers(a, column) == pytest.approx(numbers(b, column), abs=1e-4), column
    left, right = (torch.load(folder / "last.pt")["model"] for folder in (a, b))
    assert left.keys() == right.keys()                  # nothing is called module.*
    far = {name: (left[name] - right[name]).norm() / (right[name].norm() + 1e-3) for name in left}
    assert max(far.values()) < 0.01, far                # some weights hardly matter to the loss: their noise grows


@pytest.fixture(scope="module", params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def runs(request, data_dir, tmp_path_factory):
    """The folders of one process with 4 micro-batches a step, two with 2 and four with 1."""
    folder, settings = tmp_path_factory.mktemp("processes"), SHARED_STEP | request.param
    assert trained(data_dir, folder / "1", **settings).returncode == 0
    for count in (2, 4):
        assert together(data_dir, folder / str(count), count, **settings) == [0] * count
    return folder


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_the_model_of_one(runs, count):
    same_run(runs / str(count), runs / "1")
    assert len(numbers(runs / str(count), "loss")) == 30
    losses = numbers(runs / "1", "val_loss")
    assert losses[-1] < losses[0] - 0.5                 # so that there was something to get wrong


def test_evaluation_shared_by_processes_is_that_of_one(runs, data_dir, tmp_path):
    """Of the trained model, all windows of the val split, a number of them that nobody can share evenly."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((runs / "1" / "last.pt").read_bytes())

    def before(rank):
        def noted(run, *rest, evaluate=train.estimate_loss):
            losses = evaluate(run, *rest)
            (tmp_path / f"{run.ranks.world}-{rank}").write_text(f"{losses['train']!r} {losses['val']!r}")
            return losses
        train.estimate_loss = noted

    figures = {}
    for count in (1, 2, 4):
        settings = SHARED_STEP | dict(eval_only=True, init_from="resume", eval_iters=0)
        assert together(data_dir, tmp_path / "run", count, before, **settings) == [0] * count
        figures |= {(count, rank): [float(number) for number in (tmp_path / f"{count}-{rank}").read_text().split()]
                    for rank in range(count)}
    for found in figures.values():
        assert found == pytest.approx(figures[1, 0], abs=1e-5)


def test_processes_whose_clocks_and_paces_differ_agree_on_the_moving_end(data_dir, tmp_path):
    """Two minutes of a clock on which nothing passes but a step's seconds; in half of them the pace doubles."""
    def before(rank):
        now = 1000.0 * (rank + 1)
        began = now
        update, fit_steps_to_time = train.update, train.fit_steps_to_time

        def timed_update(run, step):
            nonlocal now
            pace = 1.0 if now - began < 60 else 2.0
            now += pace * (1 + rank / 4)
            return update(run, step)

        def noted_fit(run, *rest):
            fit_steps_to_time(run, *rest)
            (tmp_path / f"breakpoints-{rank}").write_text(repr(run.plan.breakpoints))

        time.monotonic = time.perf_counter = lambda: now
        train.update, train.fit_steps_to_time = timed_update, noted_fit

    settings = SHARED_STEP | dict(max_minutes=2, max_iters=None, eval_interval=50, save_interval=0)
    assert together(data_dir, tmp_path / "run", 2, before, **settings) == [0, 0]
    agreed = (tmp_path / "breakpoints-0").read_text()
    assert agreed == (tmp_path / "breakpoints-1").read_text()
    plan = torch.load(tmp_path / "run" / "last.pt")["plan"]
    assert agreed == repr(plan["breakpoints"])
    assert len(plan["breakpoints"]) > 2
    assert log_rows(tmp_path / "run")[-1]["step"] == str(plan["breakpoints"][-1][1])


def test_processes_of_different_paces_and_memories_agree_on_one_plan(tmp_path, data_dir):
    def before(rank):
        plan.SHAPES = [plan.Shape(1, 16, 1), plan.Shape(1, 32, 1), plan.Shape(2, 32, 1), plan.Shape(3, 32, 1)]
        plan.NGRAM_ROWS, plan.BATCH_TOKENS = 97, 256
        train.free_memory = lambda device: 10**9 // (1 + 10**6 * rank)
        time_of, choose_settings = time.perf_counter, train.choose_settings
        time.perf_counter = lambda: (1 + 99 * rank) * time_of()

        def noted_choice(*arguments):
            choice = choose_settings(*arguments)
            (tmp_path / f"settings-{rank}").write_text(repr(choice.settings))
            return choice
        train.choose_settings = noted_choice

    settings = dict.fromkeys(("n_layer", "n_head", "n_embd", "ngrams", "ngram_rows", "block_size", "batch_size"))
    settings |= dict(max_iters=None, max_minutes=5, dry_run=True)
    assert together(data_dir, tmp_path / "run", 2, before, **settings) == [0, 0]
    assert (tmp_path / "settings-0").read_text() == (tmp_path / "settings-1").read_text() != "{}"


def test_the_first_process_alone_speaks_and_writes(runs):
    said = [(runs / f"2-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[1] == ""
    lines = said[0].splitlines()
    steps = [line.split("|")[0] for line in lines if line.startswith("step ")]
    assert len(steps) == len(set(steps)) == 30
    assert sum(line.startswith("eval ") for line in lines) == 3
    assert sum(line.startswith("data ") for line in lines) == 1
    assert sum(line.startswith("--- sample") for line in lines) == 3
    assert [row["step"] for row in log_rows(runs / "2")] == [row["step"] for row in log_rows(runs / "1")]
    names = sorted(path.name for path in (runs / "2").iterdir())
    assert names == sorted(path.name for path in (runs / "1").iterdir()) == [".lock", "ckpt.pt", "last.pt", "log.csv"]


def test_another_number_of_processes_resumes_with_the_same_tokens(runs, tmp_path, data_dir):
    """30 steps of two processes, then four of one, and of four; against 34 of one. All other settings are stored."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").write_bytes((runs / name / "last.pt").read_bytes())
        assert main([f"--out_dir={tmp_path / name}", "--init_from=resume", "--max_iters=34"]) == 0
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "last.pt").write_bytes((runs / "2" / "last.pt").read_bytes())
    assert together(data_dir, tmp_path / "4", 4, init_from="resume", max_iters=34) == [0] * 4
    losses = numbers(tmp_path / "1", "loss")
    assert len(losses) == 4
    for name in ("2", "4"):
        assert numbers(tmp_path / name, "loss") == pytest.approx(losses, abs=1e-4)


SHORT = SHARED_STEP | dict(max_iters=4, eval_interval=2)


def test_gradients_are_averaged_once_a_step_and_muons_matrices_shared(tmp_path, data_dir):
    def before(rank):
        seen = open(tmp_path / f"seen-{rank}", "a", buffering=1)        # noqa: SIM115, as long as the process
        original, no_sync = train.orthogonalize, torch.nn.parallel.DistributedDataParallel.no_sync
        train.orthogonalize = lambda m: print("matrices", len(m), file=seen) or original(m)
        torch.nn.parallel.DistributedDataParallel.no_sync = lambda model: print("kept", file=seen) or no_sync(model)

    assert together(data_dir, tmp_path / "run", 2, before, **SHORT) == [0, 0]
    for rank in (0, 1):
        seen = (tmp_path / f"seen-{rank}").read_text().split("\n")
        assert seen.count("kept") == 4                  # one of two micro-batches in each of four steps
        # Two blocks: eight matrices of one shape, two of each of two others; half of each for this process.
        assert sorted(seen).count("matrices 4") == 4
        assert sorted(seen).count("matrices 1") == 8


def test_matrices_that_do_not_divide_are_shared_too(monkeypatch):
    """Each of three processes in turn treats its part of seven matrices; the others' parts are lent by `every`."""
    stacked = torch.randn(7, 3, 2)
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        every = torch.cat((stacked, torch.zeros(2, 3, 2))).mul(2).split(3)

        def gather(places, part, every=every, rank=rank):
            assert torch.equal(part, every[rank])
            for place, content in zip(places, every, strict=True):
                place.copy_(content)
        monkeypatch.setattr(torch.distributed, "all_gather", gather)
        assert torch.equal(Ranks().map_stacked(lambda m: 2 * m, stacked), 2 * stacked)


# Sharded: each process holds its share of weights and optimizer.

SHARDED = SHORT | ADAMW | dict(max_iters=8, eval_interval=3, n_layer=3)


@pytest.mark.parametrize("changes", [
    dict(), dict(activation_checkpointing=True, grad_clip=0.5), dict(tie_weights=True, init="gpt2", eval_iters=3)],
    ids=["plain", "clipped, activations computed again", "tied"])
def test_a_sharded_run_trains_the_model_of_one_process(tmp_path, data_dir, changes):
    """Its checkpoints are whole: each kind of run resumes from the other's."""
    settings = SHARDED | changes
    assert together(data_dir, tmp_path / "sharded", 2, shard=True, **settings) == [0, 0]
    alone = trained(data_dir, tmp_path / "one", **settings)
    assert alone.returncode == 0
    same_run(tmp_path / "sharded", tmp_path / "one")
    assert (tmp_path / "sharded-1.txt").read_text() == ""
    samples = [re.findall("--- sample at step 0\n.*", text) for text in
               ((tmp_path / "sharded-0.txt").read_text(), alone.stdout)]
    assert len(samples[0]) == 1
    assert samples[0] == samples[1]
    one, two = ((tmp_path / name / "last.pt").read_bytes() for name in ("one", "sharded"))
    (tmp_path / "one" / "last.pt").write_bytes(two)
    (tmp_path / "sharded" / "last.pt").write_bytes(one)
    more = settings | dict(init_from="resume", max_iters=12)
    assert together(data_dir, tmp_path / "sharded", 2, shard=True, **more) == [0, 0]
    assert trained(data_dir, tmp_path / "one", **more | dict(shard=False)).returncode == 0
    same_run(tmp_path / "sharded", tmp_path / "one")
    assert len(numbers(tmp_path / "one", "loss")) == 12


def test_a_sharded_process_holds_its_share_only(tmp_path, data_dir):
    def before(rank):
        def noted(cfg, *rest, start=train.start):
            run = start(cfg, *rest)
            local = sum(p.to_local().numel() for p in run.model.parameters())
            (tmp_path / f"local-{rank}").write_text(f"{local} {sum(p.numel() for p in run.model.parameters())}")
            return run
        train.start = noted

    assert together(data_dir, tmp_path / "run", 2, before, shard=True, **SHARDED) == [0, 0]
    for rank in (0, 1):
        local, parameters = map(int, (tmp_path / f"local-{rank}").read_text().split())
        assert local == pytest.approx(parameters / 2, rel=0.02)


@pytest.mark.parametrize(("changes", "words"), [(dict(), ("muon", "optimizer=adamw")),
                                                (ADAMW | dict(dtype="float16"), ("float16", "bfloat16"))])
def test_what_cannot_be_sharded_is_refused(data_dir, tmp_path, changes, words):
    done = trained(data_dir, tmp_path / "run", shard=True, **changes)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words)
    assert len(done.stderr.splitlines()) == 1


# When one goes, all go.

@pytest.mark.parametrize("settings", [dict(), ADAMW, ADAMW | dict(shard=True)], ids=["muon", "adamw", "sharded"])
def test_a_loss_of_nan_in_one_process_stops_all_before_the_update(tmp_path, data_dir, settings):
    def before(rank):
        forward, update, steps = train.GPT.forward, train.update, []

        def noted_update(run, step):
            steps.append(step)
            return update(run, step)

        def spoiled(model, *args):
            logits, loss = forward(model, *args)
            return logits, loss * (float("nan") if rank == 1 and 2 in steps else 1)
        train.GPT.forward = spoiled
        train.update = noted_update

    assert together(data_dir, tmp_path / "run", 2, before, **SHORT | settings) == [3, 3]
    assert numbers(tmp_path / "run", "loss") == pytest.approx(numbers(tmp_path / "run", "loss"))    # none is NaN
    assert len(numbers(tmp_path / "run", "loss")) == 2
    for name in ("last.pt", "ckpt.pt"):
        checkpoint = torch.load(tmp_path / "run" / name)
        assert checkpoint["step"] == 2
        assert all(weights.isfinite().all() for weights in checkpoint["model"].values())


def torchrun(folder, data_dir, *words, out_dir="run", **settings):
    """Start train.py in two processes by torchrun, in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "matplotlib.py").write_text("raise ImportError")          # which takes long to import
    words = words or ("--standalone", "--nproc_per_node=2")
    # Without the last one, torchrun (PyTorch 2.13) waits in vain for the address of a second meeting.
    env = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(folder), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, str(ROOT / "train.py"),
         *flags(**TOY | dict(data_dir=data_dir, out_dir=out_dir) | settings)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env})


LONG = SHORT | dict(max_iters=150, eval_interval=150, save_interval=10)


def steps_done(folder) -> int:
    return len(log_rows(folder)) if (folder / "log.csv").exists() else 0


def wait_for(condition, seconds: float = 60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def children(pid: int) -> list:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.fixture(scope="module")
def long_run(data_dir, tmp_path_factory):
    """The uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("long") / "run"
    assert together(data_dir, folder, 2, **LONG) == [0, 0]
    return folder


@pytest.mark.parametrize("writes", [True, False], ids=["the one that writes", "another"])
def test_a_killed_process_ends_all_within_a_minute_and_the_run_resumes(tmp_path, data_dir, long_run, writes):
    with torchrun(tmp_path / "two", data_dir, **LONG) as process:
        run = tmp_path / "two" / "run"
        wait_for(lambda: steps_done(run) > 25)
        writer = int(re.search(r"process (\d+)", (run / ".lock_holder").read_text())[1])
        workers = children(process.pid)
        assert writer in workers
        assert len(workers) == 2
        os.kill(writer if writes else (set(workers) - {writer}).pop(), signal.SIGKILL)
        start = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 60
        assert process.returncode != 0
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 5)
    if writes:
        line, = (line for line in err.splitlines() if line.startswith("train.py: "))
        assert "another process of this run is gone" in line
        assert "--init_from=resume" in line
    assert 20 <= torch.load(run / "last.pt")["step"] < 150
    assert together(data_dir, run, 2, init_from="resume", **LONG) == [0, 0]
    assert log_rows(run) == log_rows(long_run)
    one, two = (torch.load(folder / "last.pt")["model"] for folder in (run, long_run))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sigterm_to_torchrun_saves_once(tmp_path, data_dir, long_run):
    with torchrun(tmp_path / "two", data_dir, **LONG | dict(save_interval=0)) as process:
        run = tmp_path / "two" / "run"
        wait_for(lambda: steps_done(run) > 25)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(re.findall("stopped  at step", out)) == 1
    step = torch.load(run / "last.pt")["step"]
    assert step >= 25
    assert step == int(log_rows(run)[-1]["step"])       # the step in progress was finished, and saved
    assert together(data_dir, run, 2, init_from="resume", **LONG) == [0, 0]
    assert log_rows(run) == log_rows(long_run)


def test_two_launchers_resume_after_one_was_killed(tmp_path, data_dir, long_run):
    """As on two machines: each has a torchrun of one process. One machine dies and comes back; the other one's
    torchrun waits for it, and both resume from the last save."""
    port = free_port()
    words = ("--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=test",
             f"--rdzv_endpoint=localhost:{port}")
    settings = LONG | dict(init_from="auto", out_dir=str(tmp_path / "run"))
    first = torchrun(tmp_path / "first", data_dir, *words, **settings)
    wait_for(partial(answers, port))                    # it holds the meeting place, so it must stay
    second = torchrun(tmp_path / "second", data_dir, *words, **settings)
    try:
        wait_for(lambda: steps_done(tmp_path / "run") > 25)
        for pid in [*children(second.pid), second.pid]:
            os.kill(pid, signal.SIGKILL)
        second.communicate()
        second = torchrun(tmp_path / "second", data_dir, *words, **settings)
        said = [process.communicate(timeout=150) for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], said
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert any("resuming at step" in out for out, _ in said)
    assert log_rows(tmp_path / "run") == log_rows(long_run)


def test_a_step_that_two_processes_cannot_share_is_refused(data_dir, tmp_path):
    with torchrun(tmp_path / "two", data_dir, batch_size=3, gradient_accumulation_steps=5) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    line, = (line for line in err.splitlines() if line.startswith("train.py: "))        # the first one's
    assert "batch_size * gradient_accumulation_steps = 15 must be divisible by the number of processes, 2" in line
    assert str(ROOT / "train.py") + '", line' not in err        # no traceback but torchrun's own
    assert not (tmp_path / "two" / "run").exists()


def test_a_signal_to_one_process_stops_all_with_its_code(tmp_path, data_dir):
    """As when one of several machines is taken away: not one of them may think that the run is done."""
    def before(rank):
        def signalled(run, step, update=train.update):
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(run, step)
        train.update = signalled

    assert together(data_dir, tmp_path / "run", 2, before, **SHORT) == [143, 143]
    assert "stopped  at step 3 of 4" in (tmp_path / "run-0.txt").read_text()
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 3


def test_a_sharded_dry_run_says_what_a_process_holds(tmp_path, data_dir):
    assert together(data_dir, tmp_path / "run", 2, shard=True, dry_run=True, **SHARDED) == [0, 0]
    assert "nothing was written" in (tmp_path / "run-0.txt").read_text()
    assert not (tmp_path / "run").exists()
