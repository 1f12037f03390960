"""What earlier versions wrote still works: data sets, ckpt.pt, last.pt and log.csv, made by the code of commit c4323b8.

tests/legacy/ holds what these commands left (one thread, PyTorch 2.13 on a CPU; text.txt is the first 9,000
characters of the embedded fables). With dropout, so that a resumed run has to find the same random numbers:

    python prepare.py text.txt --name=char      # and rare --min_count=8, sharded --shard_tokens=3000,
                                                # bpe --tokenizer=bpe:300
    python train.py --dataset=char --n_layer=2 --n_head=2 --n_embd=16 --ffn_dim=32 --block_size=32 --batch_size=4
        --ngrams=3 --ngram_rows=97 --max_iters=12 --eval_interval=4 --eval_iters=1 --log_interval=1 --sample_tokens=0
        --device=cpu --dtype=float32 --compile=False --dropout=0.1      # muon; the others add what RUNS says

Each run was stopped by SIGTERM after 6 of its 12 steps (minutes after 2, before max_minutes had set its max_iters).
expected.json: what the same code made of each when it resumed it to step 12 (minutes with --max_iters=12 typed): the
rows of log.csv without their timings, the last evaluation, and the SHA-256 of the weights' bytes, in the order of
their names.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, inside, log_rows

import prepare
import sample
import train
from inkling.checkpoint import load_checkpoint
from inkling.dataset import open_data
from inkling.tokenizer import Tokenizer

LEGACY = ROOT / "tests" / "legacy"
EXPECTED = json.loads((LEGACY / "expected.json").read_text(encoding="utf-8"))
RUNS = {
    "muon": "",
    "adamw": "--optimizer=adamw --learning_rate=0.003 --weight_decay=0.1 --gradient_accumulation_steps=2 "
             "--save_interval=2",
    "gpt2": "--positions=learned --norm=layernorm --norm_gain --bias --init=gpt2 --mlp=gelu --embed_norm=False "
            "--tie_weights --qk_norm=False --logit_cap=0 --shortcuts=False --attn_dropout --ngrams=0 "
            "--optimizer=adamw --learning_rate=0.003 --schedule=cosine --warmup_iters=3 --min_lr=0.0003 --grad_clip=1 "
            "--sampling=random",
    "minutes": "--max_minutes=5",
    "auto": "--dtype=auto --compile=auto --dataset=sharded",        # stored as bfloat16 and False
}
NOT_KNOWN = 2**31                       # a run by the clock stored this max_iters until its pace had set one
TYPED = {"minutes": ["--max_iters=12"]}
SETS = ["char", "rare", "sharded", "bpe"]


@pytest.fixture
def folder(tmp_path):
    """Copies, since resuming writes: of the sets in data/, and of each run."""
    shutil.copytree(LEGACY, tmp_path / "legacy")
    return tmp_path / "legacy"


def resume(folder, name: str, *words):
    done = inside(train.main, *flags(init_from="resume", data_dir=folder / "data", out_dir=folder / name), *words)
    assert done.returncode == 0, done.stderr
    return done


def stored(path) -> dict:
    return torch.load(path, weights_only=True)


# -- data sets ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SETS)
def test_a_data_set_opens_and_decodes_to_its_text(name):
    text = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:9000]
    data, meta = open_data(LEGACY / "data" / name, 32)
    tokenizer = Tokenizer(meta["tokenizer"])
    decoded = [tokenizer.decode(np.array(data[split][:len(data[split])])) for split in ("train", "val")]
    assert decoded == [text[:8100], text[8100:]]


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_passes_the_check(folder, name):
    done = inside(prepare.main, "--check", name, f"--data_dir={folder / 'data'}")
    assert done.returncode == 0, done.stderr


# -- runs --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_losses_of_the_code_that_made_it(folder, name):
    """Within the digits that another order of additions changes."""
    before = log_rows(folder / name)
    resume(folder, name, *TYPED.get(name, []))
    expected, rows = EXPECTED[name], log_rows(folder / name)
    assert rows[:len(before)] == before                 # the old log is continued
    assert len(rows) == len(expected["rows"])
    tolerance = 0.02 if name == "auto" else 1e-4        # bfloat16
    for row, figures in zip(rows, expected["rows"], strict=True):
        found = {column: float(text) for column, text in row.items() if text}
        assert found == pytest.approx(figures, abs=tolerance)
    last = stored(folder / name / "last.pt")
    assert last["step"] == last["evaluated"] == 12
    assert last["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert last["best_step"] == expected["best_step"]


@pytest.mark.parametrize("name", RUNS)
def test_its_settings_are_those_it_was_started_with(folder, name):
    """A resume needs no flag but those that say where things are; dtype=auto was stored as what it had come to."""
    old = stored(folder / name / "last.pt")["config"]
    typed = {word[2:].partition("=")[0] for word in RUNS[name].split()}
    assert typed <= old.keys()
    resume(folder, name, *TYPED.get(name, []))
    new = stored(folder / name / "last.pt")["config"]
    ignored = {"out_dir", "data_dir", "init_from"} | ({"max_iters", "max_minutes"} if name == "minutes" else set())
    assert {key: new[key] for key in old.keys() - ignored} == {key: old[key] for key in old.keys() - ignored}


def test_a_run_whose_dtype_was_resolved_measures_nothing(folder, monkeypatch):
    """Its last.pt holds no plan, but dtype=bfloat16 and compile=False where auto was typed."""
    assert (stored(folder / "auto" / "last.pt")["config"]["dtype"],
            stored(folder / "auto" / "last.pt")["config"]["compile"]) == ("bfloat16", False)
    assert "cpu, 1 threads; bfloat16; compile off" in resume(folder, "auto").stdout


@pytest.mark.parametrize("words", [["--max_minutes=0.01"], ["--dry_run"]], ids=lambda words: words[0])
def test_max_iters_of_2_to_the_31_means_not_known(folder, words):
    """Resumed, the run sets its length by its pace, as it would have done."""
    assert stored(folder / "minutes" / "last.pt")["config"]["max_iters"] == NOT_KNOWN
    done = resume(folder, "minutes", *words)
    assert str(NOT_KNOWN) not in done.stdout
    assert f"{NOT_KNOWN:,}" not in done.stdout
    assert (stored(folder / "minutes" / "last.pt")["step"] > 2) == (words != ["--dry_run"])


@pytest.mark.parametrize("name", RUNS)
def test_its_weights_load_and_write(folder, name):
    path = folder / name / "last.pt"
    model, tokenizer = train.load(path)
    assert model.cfg.n_embd == 16
    assert model.vocab_size == tokenizer.vocab_size
    done = inside(sample.main, *flags(ckpt=path, start="The", max_new_tokens=20, temperature=0, device="cpu"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


@pytest.mark.parametrize("name", ["muon", "gpt2"])
def test_a_new_run_starts_from_an_old_ckpt(folder, tmp_path, name):
    settings = dict(dataset="char", data_dir=folder / "data", out_dir=tmp_path / "new", max_iters=1, sample_tokens=0)
    done = inside(train.main, *flags(init_from=folder / name / "ckpt.pt", device="cpu", compile=False, **settings))
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "new" / "last.pt")["config"]["n_embd"] == 16


def test_evaluated_of_minus_1_means_not_yet(folder):
    """In a last.pt that was saved before its run's first evaluation had ended."""
    path = folder / "minutes" / "last.pt"
    torch.save(stored(path) | dict(evaluated=-1, losses={}), path)
    assert load_checkpoint(path, resumable=True)["evaluated"] is None
    resume(folder, "minutes", *TYPED["minutes"])
    assert stored(path)["evaluated"] == 12


def test_a_config_from_before_there_were_n_grams_means_none(folder):
    path = folder / "gpt2" / "ckpt.pt"
    content = stored(path)
    for field in ("ngrams", "ngram_rows", "ngram_decay"):
        del content["config"][field]
    torch.save(content, path)
    model, _ = train.load(path)
    assert model.ngrams is None
    assert model.cfg.ngrams == 0
