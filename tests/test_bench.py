"""The benchmarks: every script says what it is for, the toy runs measure what they say, a missing peer is one line."""

import importlib
import importlib.util
import json
import math
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, one_line_error

BENCH = ROOT / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in ("common", "runners"))

# A peer with nanoGPT's outside: what runners.py touches of it, and no more. Its steps, batches and evaluations sleep.
PEER = {
    "configurator.py": "",
    "model.py": """
        from dataclasses import dataclass
        import torch

        @dataclass
        class GPTConfig:
            n_layer: int = 0
            n_head: int = 0
            n_embd: int = 0
            block_size: int = 0
            dropout: float = 0.0
            bias: bool = False
            vocab_size: int = 0

        class GPT(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
                self.table.weight.data.zero_()

            def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
                return torch.optim.AdamW(self.parameters(), learning_rate, betas)

            def forward(self, idx, targets):
                logits = self.table(idx)
                return logits, torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
    """,
    "train.py": """
        import contextlib, os, pickle, sys, time
        import numpy as np
        import torch
        from model import GPT, GPTConfig

        flags = dict(word[2:].split("=") for word in sys.argv[1:])
        max_iters, eval_interval = int(flags["max_iters"]), int(flags["eval_interval"])
        batch_size, block_size = int(flags["batch_size"]), int(flags["block_size"])
        data_dir = os.path.join("data", flags["dataset"])
        torch.manual_seed(1337)
        ctx = contextlib.nullcontext()

        def get_batch(split):
            time.sleep(0.02)
            data = np.memmap(os.path.join(data_dir, f"{split}.bin"), dtype=np.uint16, mode="r")
            at = torch.randint(len(data) - block_size, (batch_size,))
            x, y = (torch.stack([torch.from_numpy(data[i + k:i + k + block_size].astype(np.int64)) for i in at])
                    for k in (0, 1))
            return x, y

        vocab_size = pickle.load(open(os.path.join(data_dir, "meta.pkl"), "rb"))["vocab_size"]
        model = GPT(GPTConfig(vocab_size=vocab_size))
        optimizer = model.configure_optimizers(0.1, float(flags["learning_rate"]), (0.9, 0.99), "cpu")
        iter_num, spent = 0, 0.0
        while iter_num <= max_iters:
            if iter_num % eval_interval == 0:
                model.eval()
                time.sleep(0.5)
                model.train()
                if iter_num > 0:
                    torch.save({"iter_num": iter_num}, os.path.join(flags["out_dir"], "ckpt.pt"))
                    open(os.environ["PEER_SECONDS"], "w").write(str(spent))
            start = time.perf_counter()
            loss = model(*get_batch("train"))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            iter_num, spent = iter_num + 1, spent + time.perf_counter() - start
    """}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load("gpu"): a script of bench/ as a module, which writes its results to an empty folder."""
    monkeypatch.syspath_prepend(BENCH)
    for name in ("OUT", "RESULTS"):
        monkeypatch.setattr(importlib.import_module("common"), name, tmp_path / name)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(importlib.import_module("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def peer(tmp_path, monkeypatch):
    monkeypatch.setenv("PEER_SECONDS", str(tmp_path / "seconds"))
    folder = tmp_path / "peer"
    folder.mkdir()
    for name, text in PEER.items():
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_is_for_and_refuses_what_it_does_not_know(name, load):
    script = load(name)
    process = inside(script.main, "--help")
    assert process.returncode == 0
    assert script.__doc__.splitlines()[0] in " ".join(process.stdout.split())      # it is wrapped
    assert f"python bench/{name}.py" in process.stdout
    one_line_error(inside(script.main, "--no_such_flag=1"), "no_such_flag")


def test_time_to_loss_measures_training_alone_and_evaluates_all_in_the_same_way(load, peer, data_dir, start, tmp_path):
    words = ["--preset=toy", "--peers=nanogpt", f"--nanogpt={peer}", "--dataset=toy", f"--data_dir={data_dir}",
             "--seeds=1", "--points=2", "--fp32", "--target=4", "--estimate=False",
             "--peer=--learning_rate=0.1 --max_iters=8", "--append"]
    process = inside(load("time_to_loss").main, *words)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "OUT" / "time_to_loss_toy.json").read_text(encoding="utf-8"))
    theirs, own = found["runs"]["nanogpt"][0], found["runs"]["ours"][0]
    # What the peer takes for its steps by its own watch; three evaluations of half a second are not counted.
    assert [step for step, _, _ in theirs["curve"]] == [4, 8]
    spent = float((tmp_path / "seconds").read_text(encoding="utf-8"))
    assert spent <= theirs["curve"][-1][1] < spent + 0.3
    assert 0.02 <= theirs["step_seconds"] <= spent
    # The peer starts from equal probabilities and learns which characters are frequent.
    assert theirs["curve"][-1][2] < theirs["curve"][0][2] < math.log(theirs["parameters"] ** 0.5)
    # Ours is the run that train.py makes with these flags, and the common evaluation finds its loss.
    again = start("again", seed=1, n_layer=1, n_embd=16, n_head=1, block_size=16, batch_size=2, max_iters=6, ngrams=0,
                  eval_iters=0, eval_interval=6, sample_tokens=0)
    assert again.returncode == 0, again.stderr
    losses = torch.load(tmp_path / "again" / "last.pt", weights_only=True)["losses"]
    assert own["curve"][-1][2] == pytest.approx(losses["val"], abs=1e-5)
    assert own["steps"] == own["curve"][-1][0] == 6
    assert (tmp_path / "OUT" / "time_to_loss_toy.png").stat().st_size > 1000
    table = (tmp_path / "RESULTS").read_text(encoding="utf-8")
    assert "| nanogpt |" in table
    assert "| ours |" in table
    assert "torch" in table


def test_throughput_times_the_parts_of_a_step(load, peer, tmp_path):
    words = ["--sizes=toy", "--ways=eager,nanogpt", f"--nanogpt={peer}", "--dropouts=0.0", "--dtypes=float32",
             "--rounds=1", "--steps=4", "--split=2"]
    process = inside(load("throughput").main, *words)
    assert process.returncode == 0, process.stderr
    lines = json.loads((tmp_path / "OUT" / "throughput.json").read_text(encoding="utf-8"))["lines"]
    own, theirs = ({line["way"]: line for line in lines}[way] for way in ("eager", "nanogpt"))
    assert theirs["parts"]["data"] >= 0.02 > min(theirs["parts"].values())
    assert theirs["step"] >= 0.02
    assert theirs["times"] == 1
    assert own["times"] == pytest.approx(theirs["step"] / own["step"])
    assert own["tokens"] == theirs["tokens"] == 32
    assert all(0 < line["start"] < 100 and line["peak"] > 50e6 and 0 < line["share"] < 1 for line in lines)
    assert min(own["parts"].values()) > 0


def test_a_missing_peer_is_one_line(load, monkeypatch, tmp_path):
    main = load("time_to_loss").main
    one_line_error(inside(main, "--peers=nanogpt"), "--nanogpt=", "git clone")
    one_line_error(inside(main, "--peers=nanogpt", f"--nanogpt={tmp_path}"), "train.py", "git clone")
    one_line_error(inside(load("throughput").main, "--ways=nanogpt"), "git clone")
    one_line_error(inside(load("gpu").main, "--part=throughput", "--toy"), "git clone")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one_line_error(inside(main, "--peers=trainer"), "pip install transformers accelerate")


def test_a_peer_has_the_target_where_its_curve_crosses_it_and_ours_only_at_the_end(load):
    reached = load("time_to_loss").reached
    falls = dict(curve=[(0, 0.0, 4.0), (10, 2.0, 3.0), (20, 4.0, 1.0), (30, 6.0, 2.5)])
    assert reached(falls, 2.0, final=False) == (3.0, 15)
    assert reached(falls, 4.5, final=False) == (0.0, 0)
    assert reached(falls, 2.0, final=True) == (math.inf, math.inf)
    assert reached(falls, 2.5, final=True) == (6.0, 30)
    assert reached(falls, 0.5, final=False) == (math.inf, math.inf)


def test_gpu_judges_each_target_by_its_figures(load, monkeypatch):
    gpu = load("gpu")
    run = dict(curve=[(100, 10.0, 1.4)], startup=2.0, tokens_per_step=10)
    line = dict(size="124M", way="compiled", tokens=1000, step=0.1, share=0.51, times=1.3, peak=1e9)
    printed = ("GPT-2 of 124M, 256 new tokens: 249 MB\n| ours, compiled | 1,499 | 80% | 1x |\n"
               "GPT-2 XL of 1.56B, 256 new\n| ours | 9 | 9% | 1x |\n| ours, compiled | 700 | 51% | 1x |")
    monkeypatch.setattr(gpu, "script", lambda *_: printed)

    def judged(part: str, **figures) -> list:
        monkeypatch.setattr(gpu, "figures", lambda name: figures)
        return [row[-1] for row in getattr(gpu, part)(gpu.Options())]

    def runs(theirs: float, own_loss: float = 1.4) -> dict:
        return dict(target=1.45, runs=dict(nanogpt=[run | dict(curve=[(100, theirs, 1.4)])],
                                           ours=[run | dict(curve=[(60, 10.0, own_loss)])]))
    assert judged("time_to_loss", **runs(46.0)) == [True]
    assert judged("time_to_loss", **runs(45.9)) == [False]
    assert judged("time_to_loss", **runs(46.0, 1.46)) == [False]
    assert judged("tokens_to_loss", **runs(1.0)) == [True]
    assert judged("tokens_to_loss", **runs(1.0, 1.46)) == [False]
    assert judged("throughput", lines=[line]) == [True, True]
    assert judged("throughput", lines=[line | dict(share=0.49, times=1.2)]) == [False, False]
    assert judged("large", lines=[line, line | dict(size="350M", share=0.6)]) == [False, True]
    assert judged("generate") == [False, True]


def test_checkpoint_and_scaling_add_up(load, tmp_path):
    process = inside(load("checkpoint").main, "--sizes=toy", "--saves=2", "--optimizers=adamw", "--step_seconds=0.01",
                     f"--folder={tmp_path}")
    assert process.returncode == 0, process.stderr
    cells = process.stdout.strip().splitlines()[-3].split(" | ")
    assert cells[:3] == ["| toy", "16,450", "adamw"]
    last, ckpt, pause, share = (float(cells[at].rstrip("%| ")) for at in (4, 7, 8, 10))
    assert pause == pytest.approx(last + ckpt, abs=0.002)
    assert share == pytest.approx(100 * pause / (25 * 0.01), rel=0.15, abs=0.2)
    scaling = load("scaling")
    within, between = scaling.exchange(8e9, 8, 8, 1e9)
    assert within == pytest.approx(14 / 8 * 8e9 / 450e9)
    assert between == pytest.approx(14.0)
    assert scaling.exchange(8e9, 1, 1, 1.0) == (0, 0)
    assert inside(scaling.main, "--measure=False").returncode == 0


def test_the_command_in_the_results_names_no_folder_of_this_machine(load, monkeypatch):
    load("scaling")
    words = ["/home/me/bench/scaling.py", "--nanogpt=/home/me/peer", "--data_dir=/home/me/sets", "--ours=--a=1 --b"]
    monkeypatch.setattr("sys.argv", words)
    assert importlib.import_module("common").command() == \
        "python bench/scaling.py --nanogpt=../nanoGPT --data_dir=sets '--ours=--a=1 --b'"


def test_random_sets_fit_the_programs(load, tmp_path):
    from prepare import ensure_set, stored_tokenizer
    from support import runtime

    importlib.import_module("common").random_set(tmp_path / "set", 300, 5000)
    folder = ensure_set("set", str(tmp_path), runtime.Ranks())
    data, meta = runtime.open_data(folder, 16)
    assert stored_tokenizer(folder, meta).vocab_size == 300
    assert len(data["train"]) == 5000
    assert len(np.unique(data["train"])) == 300
