"""The benchmarks: every script says what it is for, the toy runs measure what they say, a missing peer is one line."""

import importlib
import importlib.util
import json
import math
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, ZYGOTE, flags, inside, one_line_error

from inkling.cli import UserError
from inkling.dataset import open_data
from inkling.distributed import Ranks
from inkling.tokenizer import stored_tokenizer
from prepare import ensure_set

BENCH = ROOT / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "\n    run(main)\n" in path.read_text(encoding="utf-8"))
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 16, "batch_size": 2, "ngrams": 0}

# A peer with nanoGPT's outside: what peers.py touches of it, and no more. Its batches and evaluations sleep.
PEER = {
    "configurator.py": "",
    "model.py": """
        import time
        import torch

        class GPT(torch.nn.Module):
            def __init__(self, vocab_size):
                super().__init__()
                self.table = torch.nn.Embedding(vocab_size, vocab_size)
                self.table.weight.data.zero_()

            def forward(self, idx, targets):
                if not self.training:
                    time.sleep(0.05)
                logits = self.table(idx)
                return logits, torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
    """,
    "train.py": """
        import contextlib, os, pickle, sys, time
        import numpy as np
        import torch
        from model import GPT

        flags = dict(word[2:].split("=") for word in sys.argv[1:])
        max_iters, eval_interval = int(flags["max_iters"]), int(flags["eval_interval"])
        batch_size, block_size = int(flags["batch_size"]), int(flags["block_size"])
        data_dir = os.path.join("data", flags["dataset"])
        torch.manual_seed(1337 + 0)
        ctx = contextlib.nullcontext()

        def get_batch(split):
            time.sleep(0.02)
            data = np.memmap(os.path.join(data_dir, f"{split}.bin"), dtype=np.uint16, mode="r")
            starts = torch.randint(len(data) - block_size, (batch_size,))
            windows = [data[i:i + block_size + 1].astype(np.int64) for i in starts]
            windows = torch.from_numpy(np.stack(windows))
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

        with open(os.path.join(data_dir, "meta.pkl"), "rb") as file:
            model = GPT(pickle.load(file)["vocab_size"])
        optimizer = torch.optim.AdamW(model.parameters(), float(flags["learning_rate"]))
        x, y = get_batch("train")
        iter_num = 0
        spent = 0.0
        while True:
            if iter_num % eval_interval == 0:
                model.eval()
                for _ in range(int(flags["eval_iters"])):
                    model(*get_batch("val"))
                model.train()
            began = time.perf_counter()
            loss = model(x, y)[1]
            x, y = get_batch("train")
            loss.backward()
            spent += time.perf_counter() - began
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            iter_num += 1
            if iter_num > max_iters:
                break
        with open("REPORT", "w") as file:
            file.write(f"{spent} {torch.initial_seed()}")
    """}

# A checkout of Inkling of some age, whose steps take MS milliseconds after the first three: what pace.py touches of it.
CHECKOUT = """
    import sys
    from pathlib import Path

    flags = dict(word[2:].split("=") for word in sys.argv[2:])
    out_dir = Path(flags["out_dir"])
    turns = Path(sys.argv[0]).resolve().parent.parent / "turns.txt"
    with open(turns, "a") as file:
        print(Path(sys.argv[0]).parent.name, flags["compile"], flags["batch_size"], file=file)
    rows = ["step,tokens,val_loss,ms,tokens_per_second,seconds", "0,0,4.0,,,0"]
    for step in range(1, int(flags["max_iters"]) + 1):
        ms = 1000 if step <= 3 else MS
        rows.append(f"{step},{step},,{ms},{1e6 / ms},{step}")
    (out_dir / "log.csv").write_text("\\n".join(rows) + "\\n")
    print("machine  cpu; bfloat16; compile COMPILED")
"""


def write_program(folder, files: dict):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def fork_runner(words: list, log, env: dict) -> int:
    """What common.launch_runner does, in a child that has imported torch."""
    process = ZYGOTE.run("bench.runners:main", *words, folder=log.parent)
    log.write_text(process.stdout + process.stderr, encoding="utf-8")
    return process.returncode


@pytest.fixture
def common(monkeypatch, tmp_path):
    """bench/common.py; results go to an empty folder, tasks to forked children."""
    monkeypatch.syspath_prepend(BENCH)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "OUT", tmp_path / "OUT")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS")
    if sys.platform != "win32":
        monkeypatch.setattr(common, "launch_runner", fork_runner)
    return common


@pytest.fixture
def load(common, monkeypatch):
    """load("gpu"): a script of bench/ as a module."""
    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def peer(tmp_path):
    """A checkout of the peer, which writes to tmp_path/report what its steps took, and its seed."""
    files = {name: text.replace("REPORT", str(tmp_path / "report")) for name, text in PEER.items()}
    return write_program(tmp_path / "peer", files)


def run_script(script, *words) -> str:
    """What a script prints; it must succeed."""
    process = inside(script.main, *words)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_is_for_and_refuses_what_it_does_not_know(name, load):
    script = load(name)
    printed = run_script(script, "--help")
    assert script.__doc__.splitlines()[0] in " ".join(printed.split())      # it is wrapped
    assert f"python bench/{name}.py" in printed
    one_line_error(inside(script.main, "--no_such_flag=1"), "no_such_flag")


def test_no_script_assigns_to_a_name_of_a_program():
    programs = ("train", "sample", "prepare", "convert", "inkling")
    for path in BENCH.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"^\s*({'|'.join(programs)})(\.\w+)+\s*(,[^=]*)?=[^=]", text, re.M), path


# -- training ------------------------------------------------------------------------------------------------------

def test_time_to_loss_measures_training_alone_and_evaluates_all_in_the_same_way(load, peer, data_dir, start, tmp_path):
    run_script(load("time_to_loss"), "--preset=toy", "--peers=nanogpt", f"--nanogpt={peer}", "--dataset=toy",
               f"--data_dir={data_dir}", "--seeds=1", "--points=2", "--fp32", "--target=4", "--estimate=False",
               "--peer=--learning_rate=0.1 --max_iters=8", "--append")
    figures = json.loads((tmp_path / "OUT" / "time_to_loss_toy.json").read_text(encoding="utf-8"))
    nanogpt, = figures["runs"]["nanogpt"]
    ours, = figures["runs"]["ours"]
    # What the peer takes for its steps by its own clock; two evaluations of 0.4 seconds are not counted.
    assert nanogpt["steps"] == 8
    assert [step for step, _, _ in nanogpt["curve"]] == [4, 8]
    spent, seed = (tmp_path / "report").read_text(encoding="utf-8").split()
    assert float(spent) <= nanogpt["curve"][-1][1] < float(spent) + 0.3
    assert 0.02 <= nanogpt["step_seconds"] <= float(spent)
    assert seed == "1"
    # The peer starts from equal probabilities and learns which characters are frequent.
    assert nanogpt["curve"][-1][2] < nanogpt["curve"][0][2] < math.log(nanogpt["parameters"] ** 0.5)
    # Ours is the run that train.py makes with these flags, and the common evaluation finds its loss.
    again = start("again", seed=1, **TINY | {"max_iters": 6, "eval_iters": 0, "eval_interval": 6, "sample_tokens": 0})
    assert again.returncode == 0, again.stderr
    losses = torch.load(tmp_path / "again" / "last.pt", weights_only=True)["losses"]
    assert ours["curve"][-1][2] == pytest.approx(losses["val"], abs=1e-5)
    assert [step for step, _, _ in ours["curve"]] == [0, 3, 6]
    assert ours["steps"] == 6
    assert (tmp_path / "OUT" / "time_to_loss_toy.png").stat().st_size > 1000
    results = (tmp_path / "RESULTS").read_text(encoding="utf-8")
    assert "| nanogpt |" in results
    assert "| ours |" in results
    assert "torch" in results


def test_throughput_times_the_parts_of_a_step(load, peer, tmp_path):
    run_script(load("throughput"), "--sizes=toy", "--ways=eager,nanogpt", f"--nanogpt={peer}", "--dropouts=0.0",
               "--dtypes=float32", "--rounds=1", "--steps=4", "--split=2")
    lines = json.loads((tmp_path / "OUT" / "throughput.json").read_text(encoding="utf-8"))["lines"]
    eager, nanogpt = lines
    assert (eager["way"], nanogpt["way"]) == ("eager", "nanogpt")
    assert nanogpt["parts"]["data"] >= 0.02 > min(nanogpt["parts"].values())
    assert nanogpt["step"] >= 0.02
    assert nanogpt["times"] == 1
    assert eager["times"] == pytest.approx(nanogpt["step"] / eager["step"])
    assert eager["tokens"] == nanogpt["tokens"] == 32
    assert min(eager["parts"].values()) > 0
    for line in lines:
        assert 0 < line["start"] < 100
        assert line["peak"] > 50e6
        assert 0 < line["share"] < 1


def test_a_run_that_was_to_be_compiled_and_is_not_has_no_figure(common, data_dir, monkeypatch, tmp_path):
    words = flags(**TINY | {"max_iters": 2, "device": "cpu", "compile": True})
    spec = {"data": str(data_dir / "toy"), "points": 1, "evaluate": False, "words": words}
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("PATH", "")      # where a compiler might be
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="compile=True, but compiling failed"):
        importlib.import_module("ours").ours(spec | {"folder": str(tmp_path), "launched": 0})


def test_loop_counts_graphs_between_two_steps(common, data_dir):
    words = flags(**TINY | {"max_iters": 8, "eval_interval": 8, "eval_iters": 1, "sample_tokens": 0, "device": "cpu",
                            "compile": False})
    figures = common.run_task("loop", data=str(data_dir / "toy"), words=words, first=2, last=6)
    assert figures["graphs"] == figures["recompilations"] == 0
    assert figures["counted"] == torch.cuda.is_available()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_run_above_what_was_there(common, data_dir):
    wide = TINY | {"n_embd": 512, "batch_size": 8, "max_iters": 2, "eval_iters": 1, "sample_tokens": 0,
                   "device": "cpu", "dtype": "float32", "compile": False, "data_dir": data_dir, "dataset": "toy"}
    figures = common.run_task("memory", words=flags(**wide))
    parameters = 12 * 512**2 + 2 * 512 * 60
    taken = figures["peak"] - figures["before"]
    assert 4 * 4 * parameters < taken < 12 * 4 * parameters     # weights, gradients, the optimizer's state, its work


def test_pace_compares_two_checkouts_in_turn(load, tmp_path):
    for name, ms, compiled in (("before", "50", "on"), ("after", "40", "on"), ("broken", "40", "failed, so it trains")):
        write_program(tmp_path / name, {"train.py": CHECKOUT.replace("MS", ms).replace("COMPILED", compiled)})
    words = ["--config=config/lecture.py", "--steps=6", "--rounds=2", "--words=--batch_size=2"]
    pace = load("pace")
    printed = run_script(pace, tmp_path / "before", tmp_path / "after", *words)
    printed = re.sub(r", [\d.]+ GB", "", printed)       # of memory
    assert "| lecture | uncompiled | 20k (20k-20k), 50.0 ms | 25k (25k-25k), 40.0 ms | 1.250 |" in printed
    assert "| lecture | compiled | 20k (20k-20k), 50.0 ms | 25k (25k-25k), 40.0 ms | 1.250 |" in printed
    turns = (tmp_path / "turns.txt").read_text(encoding="utf-8").split("\n")
    assert turns[:4] == ["before False 2", "after False 2"] * 2
    assert turns[4:8] == ["before True 2", "after True 2"] * 2
    process = inside(pace.main, tmp_path / "before", tmp_path / "broken", *words, "--compile=True")
    assert process.returncode == 1
    assert "broken did not compile: compile failed, so it trains" in process.stderr
    one_line_error(inside(pace.main, tmp_path / "before"), "two checkouts")
    one_line_error(inside(pace.main, tmp_path / "before", tmp_path, *words), "no train.py")
    one_line_error(inside(pace.main, tmp_path / "before", tmp_path / "after", "--steps=3"), "warm_up=3", "steps=3")


def test_pace_runs_todays_train_py(load, tmp_path):
    write_program(tmp_path / "other", {"train.py": CHECKOUT.replace("MS", "50").replace("COMPILED", "off")})
    printed = run_script(load("pace"), tmp_path / "other", ROOT, "--config=config/shakespeare_char.py", "--steps=4",
                         "--rounds=1", "--compile=False", "--dtype=float32", "--device=cpu",
                         "--words=" + " ".join(flags(**TINY)))
    assert re.search(r"\| shakespeare_char \| uncompiled \| 20k .* GB \| [\d.]+k? .* GB \| [\d.]+ \|", printed)


# -- the rest ------------------------------------------------------------------------------------------------------

def test_a_missing_peer_is_one_line(load, monkeypatch, tmp_path):
    main = load("time_to_loss").main
    one_line_error(inside(main, "--peers=nanogpt"), "--nanogpt=", "git clone")
    one_line_error(inside(main, "--peers=nanogpt", f"--nanogpt={tmp_path}"), "train.py", "git clone")
    one_line_error(inside(load("throughput").main, "--ways=nanogpt"), "git clone")
    one_line_error(inside(load("gpu").main, "--part=throughput", "--toy"), "git clone")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one_line_error(inside(main, "--peers=trainer"), "pip install transformers accelerate")


def test_a_task_that_fails_says_its_last_line(common, monkeypatch):
    monkeypatch.undo()                  # the launcher itself
    monkeypatch.syspath_prepend(BENCH)
    with pytest.raises(UserError, match=r"matmul ended with code 1: KeyError: 'device' \(BENCH_VERBOSE=1"):
        common.run_task("matmul", size=2)


def test_a_peer_has_the_target_where_its_curve_crosses_it_and_ours_only_at_the_end(load):
    reached = load("time_to_loss").reached
    falls = {"curve": [(0, 0.0, 4.0), (10, 2.0, 3.0), (20, 4.0, 1.0), (30, 6.0, 2.5)]}
    assert reached(falls, 2.0, final=False) == (3.0, 15)
    assert reached(falls, 4.5, final=False) == (0.0, 0)
    assert reached(falls, 2.0, final=True) == (math.inf, math.inf)
    assert reached(falls, 2.5, final=True) == (6.0, 30)
    assert reached(falls, 0.5, final=False) == (math.inf, math.inf)


def test_gpu_judges_each_target_by_its_figures(load, monkeypatch):
    gpu = load("gpu")
    run = {"curve": [(100, 10.0, 1.4)], "startup": 2.0, "tokens_per_step": 10}
    line = {"size": "124M", "way": "compiled", "tokens": 1000, "step": 0.1, "share": 0.51, "times": 1.3, "peak": 1e9}
    printed = ("GPT-2 of 124M, 256 new tokens: 249 MB\n| ours, compiled | 1,499 | 80% | 1x |\n"
               "GPT-2 XL of 1.56B, 256 new\n| ours | 9 | 9% | 1x |\n| ours, compiled | 700 | 51% | 1x |")
    monkeypatch.setattr(gpu, "run_script", lambda *_: printed)

    def judge(part: str, **figures) -> list:
        monkeypatch.setattr(gpu, "read_figures", lambda name: figures)
        return [target.reached for target in gpu.PARTS[part](gpu.Options())]

    def runs(nanogpt_seconds: float, our_loss: float = 1.4) -> dict:
        nanogpt = run | {"curve": [(100, nanogpt_seconds, 1.4)]}
        ours = run | {"curve": [(60, 10.0, our_loss)]}
        return {"target": 1.45, "runs": {"nanogpt": [nanogpt], "ours": [ours]}}

    assert judge("time_to_loss", **runs(46.0)) == [True]
    assert judge("time_to_loss", **runs(45.9)) == [False]
    assert judge("time_to_loss", **runs(46.0, 1.46)) == [False]
    assert judge("tokens_to_loss", **runs(1.0)) == [True]
    assert judge("tokens_to_loss", **runs(1.0, 1.46)) == [False]
    assert judge("throughput", lines=[line]) == [True, True]
    assert judge("throughput", lines=[line | {"share": 0.49, "times": 1.2}]) == [False, False]
    assert judge("large", lines=[line, line | {"size": "350M", "share": 0.6}]) == [False, True]
    assert judge("generate") == [False, True]


def test_checkpoint_saves_a_run_and_its_pauses_add_up(load, tmp_path):
    printed = run_script(load("checkpoint"), "--sizes=toy", "--saves=2", "--optimizers=adamw", "--step_seconds=0.01",
                         f"--folder={tmp_path}")
    cells = printed.strip().splitlines()[-3].split(" | ")
    assert cells[:3] == ["| toy", "16,450", "adamw"]
    last, ckpt, pause, share = (float(cells[column].rstrip("%| ")) for column in (4, 7, 8, 10))
    assert pause == pytest.approx(last + ckpt, abs=0.002)
    assert share == pytest.approx(100 * pause / (25 * 0.01), rel=0.15, abs=0.2)


def test_scaling_adds_up(load):
    scaling = load("scaling")
    within, between = scaling.exchange_seconds(8e9, 8, 8, 1e9)
    assert within == pytest.approx(14 / 8 * 8e9 / 450e9)
    assert between == pytest.approx(14.0)
    assert scaling.exchange_seconds(8e9, 1, 1, 1.0) == (0, 0)
    assert "| 1.5B | 64 = 8 x 8 |" in run_script(scaling, "--measure=False")


def test_generate_gives_a_peer_our_weights(load):
    pytest.importorskip("transformers")
    generate = load("generate")
    model = generate.build_model("toy", generate.Options())
    ids = torch.randint(65, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = generate.transformers_model(model)(input_ids=ids).logits
        torch.testing.assert_close(logits, model(ids)[0])
    assert generate.our_rate(model, ids, 3) > 0
    assert generate.uncached_rate(model, ids, 3) > 0


def test_seeds_knows_gpt2s_sizes_and_its_decoding(load):
    printed = run_script(load("seeds"), "gpt2")
    assert "| parameters of gpt2-xl | 1,557,611,200 | 1,557,611,200 | ok |" in printed
    assert "all as expected" in printed


@pytest.mark.skipif(sys.platform == "win32", reason="needs wait4")
def test_prepare_memory_prepares_a_text(load):
    printed = run_script(load("prepare_memory"), "--gigabytes=1e-6", "--tokenizers=char", "--workers=1")
    peak = re.search(r"char +peak +(\d+) MB, +\d+ s, exit 0", printed)
    assert 10 < int(peak[1]) < 2000     # a forked child counts what its worker has loaded


def test_the_command_in_the_results_names_no_folder_of_this_machine(common, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/bench/scaling.py", "/home/me/before", "--nanogpt=/home/me/peer",
                                     "--data_dir=/home/me/sets", "--ours=--a=1 --b"])
    assert common.command_line() == \
        "python bench/scaling.py before --nanogpt=../nanoGPT --data_dir=sets '--ours=--a=1 --b'"


def test_random_sets_fit_the_programs(common, tmp_path):
    common.write_random_set(tmp_path / "set", 300, 5000)
    folder = ensure_set("set", str(tmp_path), Ranks())
    data, meta = open_data(folder, 16)
    assert stored_tokenizer(folder, meta).vocab_size == 300
    assert len(data["train"]) == 5000
    assert len(np.unique(data["train"])) == 300


def test_the_runs_of_the_plan_are_measured_once_and_fitted(load, data_dir, tmp_path, monkeypatch):
    module = load("plan")
    trials = [module.Trial("toy", 0.05, n_layer=1, n_embd=width, n_head=1, batch_size=2, dropout=0.0, block_size=32)
              for width in (16, 32)]
    monkeypatch.setattr(module, "CSV", tmp_path / "plan.csv")
    monkeypatch.setattr(module, "trials_of", lambda text, seconds: trials)
    words = ["measure", "--texts=toy", f"--data_dir={data_dir}", "--minutes=1", "--side_by_side=2"]
    run_script(module, *words)
    rows = module.read_rows()
    assert {module.trial_of(row) for row in rows} == {*trials}
    assert all(int(row["steps"]) > 0 and 1 < float(row["bits_per_byte"]) < 7 for row in rows)
    run_script(module, *words)
    assert module.read_rows() == rows
    assert "| toy | 0.05 | 2 |" in run_script(module, "fit")
