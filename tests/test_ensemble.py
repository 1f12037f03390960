"""sample.py --ckpt=a,b: the mean of the probabilities of several checkpoints, for sampling and for scoring; and
--ngram: an n-gram model as one of them."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside, one_line_error, perturbed

import inkling.ensemble
import sample
from inkling.checkpoint import save_checkpoint
from inkling.dataset import read_meta
from inkling.ensemble import Ensemble
from inkling.ngram import NgramModel
from inkling.tokenizer import Tokenizer
from prepare import write_set
from sample import adaptive_losses
from train import GPT, Config, draw, load

CHARS = {"kind": "char", "chars": "\n abcdefghijklmnopqrstuvwxyz"}
MODELS = {"a": dict(n_layer=2, n_head=2, n_embd=16, block_size=16, ngram_rows=64),
          "b": dict(n_layer=1, n_head=1, n_embd=8, block_size=12, ngrams=0, positions="learned"),
          "c": dict(n_layer=1, n_head=2, n_embd=16, block_size=20, ngram_rows=32)}
TEXT = "the fox saw the hen and the dog " * 2


def save(path: str, seed: int, stored: dict = CHARS, **settings):
    cfg, tokenizer = Config(**settings, init="gpt2"), Tokenizer(stored)
    torch.manual_seed(seed)
    model = perturbed(GPT(cfg, tokenizer.vocab_size), seed)
    with torch.no_grad():
        model.head.weight *= 4
    assert save_checkpoint(dict(config=asdict(cfg), tokenizer=stored, model=model.state_dict(), step=0,
                                vocab_size=tokenizer.vocab_size), path) == ""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, settings) in enumerate(MODELS.items()):
        save(f"{name}.pt", seed, **settings)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")


def sampled(*words):
    return inside(sample.main, "--device=cpu", *words)


def records(*words) -> list:
    outcome = sampled("--json", *words)
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def models_of(names: str) -> list:
    return [load(f"{name}.pt")[0] for name in names]


@torch.no_grad()
def mean_probabilities(models: list, ids: list):
    """(T, V) by each model alone, without caches."""
    return sum(model(torch.tensor([ids]))[0][0].softmax(-1) for model in models) / len(models)


@pytest.mark.parametrize("names", ["ab", "abc", "ba"])
def test_the_probabilities_are_the_mean_of_the_models(names):
    score, = records("--score=text", "--score_tokens", "--stride=7", "--ckpt=" + ",".join(f"{x}.pt" for x in names))
    assert score["block_size"] == 12                                # the shortest
    ids = Tokenizer(CHARS).encode(TEXT).tolist()
    found = score["token_logprobs"]
    for end in [12, 19, 26]:                                        # the ends of windows
        p = mean_probabilities(models_of(names), ids[end - 12:end])
        new = range(0 if end == 12 else 5, 12)
        assert [found[end - 12 + at] for at in new] == pytest.approx(
            [p[at, ids[end - 12 + at + 1]].log().item() for at in new], abs=1e-4)


def test_generation_with_caches_is_generation_without():
    """Beyond the context, too, which all models leave together."""
    models = models_of("abc")
    ensemble = Ensemble(models)
    prompt = Tokenizer(CHARS).encode("the fox").tolist()
    window, expected = prompt, []
    for _ in range(30):
        if len(window) > 12:
            window = window[-6:]
        expected.append(mean_probabilities(models, window)[-1].argmax().item())
        window = [*window, expected[-1]]
    found = [ids.item() for ids in ensemble.generate(torch.tensor([prompt]), 30, lambda logits: draw(logits, 0))]
    assert found == expected
    text, = records("--ckpt=a.pt,b.pt,c.pt", "--start=the fox", "--temperature=0", "--max_new_tokens=30")
    assert text["tokens"] == expected


def test_several_texts_at_once_and_their_probabilities():
    words = ["--ckpt=a.pt,c.pt", "--start=fox", "--max_new_tokens=8"]
    batch = records(*words, "--num_samples=3")
    assert batch[2]["tokens"] == records(*words, "--seed=1339")[0]["tokens"]
    ids = [*Tokenizer(CHARS).encode("fox").tolist(), *batch[0]["tokens"]]
    p = mean_probabilities(models_of("ac"), ids)
    expected = [p[at - 1, ids[at]].log().item() for at in range(3, len(ids))]
    assert batch[0]["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_twice_is_itself():
    once, = records("--ckpt=a.pt", "--score=text", "--score_tokens")
    twice, = records("--ckpt=a.pt,a.pt", "--score=text", "--score_tokens")
    assert twice["token_logprobs"] == pytest.approx(once["token_logprobs"], abs=1e-5)


def test_the_mean_adapts_as_one_model():
    ids = Tokenizer(CHARS).encode(TEXT)
    ensemble = Ensemble(models_of("ab"))
    score, = records("--ckpt=a.pt,b.pt", "--score=text", "--score_tokens", "--adapt=1e-3")
    expected = adaptive_losses(ensemble, np.array(ids), 6, 1e-3)
    assert [-x for x in score["adaptive"]["token_logprobs"]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert score["adaptive"]["loss"] < score["loss"] - 0.05
    before = [dict(model.named_parameters()) for model in models_of("ab")]
    for model, weights in zip(ensemble.models, before, strict=True):        # each of them learns
        moved = {name: (p - weights[name]).abs().max().item() for name, p in model.named_parameters()}
        assert all(moved.values()), moved
        assert moved["wte.weight"] > 5 * moved["blocks.0.mlp.up.weight"]


def test_a_file_of_the_whole_name_comes_first():
    shutil.copy("c.pt", "a.pt,b.pt")
    assert records("--ckpt=a.pt,b.pt", "--score=text") == records("--ckpt=c.pt", "--score=text")
    os.makedirs("run,1")
    shutil.copy("a.pt", "run,1/ckpt.pt")
    assert records("--ckpt=run,1", "--score=text") == records("--ckpt=a.pt", "--score=text")


@pytest.mark.parametrize(("ckpt", "parts"), [
    ("a.pt,", ["--ckpt=a.pt,", "comma"]), (",a.pt", ["comma"]), ("a.pt,,b.pt", ["comma"]),
    ("a.pt,gone.pt", ["no checkpoint gone.pt"]),
    ("a.pt,b.pt,other.pt", ["a.pt and other.pt have different tokenizers"]),
])
def test_mistakes(ckpt, parts):
    save("other.pt", 0, {"kind": "byte"}, **MODELS["a"])
    for words in (["--score=text"], ["--start=fox"]):
        outcome = sampled(f"--ckpt={ckpt}", *words)
        one_line_error(outcome, *parts)
        assert outcome.stdout == ""


# -- n-grams

SHARE = 0.3
TRAIN_TEXT = "the dog and the hen saw a fox in the den, and the fox saw the hen " * 3


@pytest.fixture
def counted(folder, tmp_path, monkeypatch):
    """A checkpoint of a prepared set, its path, and the n-gram model of that set."""
    (tmp_path / "book.txt").write_text(TRAIN_TEXT, encoding="utf-8")
    monkeypatch.setattr("inkling.novelty.data_folder", lambda name: tmp_path / "data" / name)
    with contextlib.redirect_stdout(io.StringIO()):
        write_set(tmp_path / "data" / "book", [tmp_path / "book.txt"], "char", 0.1)
    meta = read_meta(tmp_path / "data" / "book")
    save("book.pt", 5, meta["tokenizer"], **MODELS["a"], dataset="book")
    content = torch.load("book.pt", weights_only=True)
    torch.save(content | {"text": meta["splits"]["train"]["sha256"]}, "book.pt")
    train = np.fromfile(tmp_path / "data" / "book" / "train.bin", np.uint8).astype(np.int64)
    return NgramModel(train, 8, meta["vocab_size"])


@torch.no_grad()
def mixed_probabilities(counted, ids: list):
    """(T, V), by the definition."""
    p = load("book.pt")[0](torch.tensor([ids]))[0][0].softmax(-1)
    return (1 - SHARE) * p + SHARE * torch.from_numpy(counted.predict(np.array(ids))).float()


def test_an_ngram_model_has_its_share_in_each_probability(counted):
    text = "the hen and the dog"
    Path("text").write_text(text, encoding="utf-8")
    score, = records("--ckpt=book.pt", "--score=text", "--score_tokens", f"--ngram={SHARE}", "--stride=16")
    ids = load("book.pt")[1].encode(text).tolist()
    p = mixed_probabilities(counted, ids[:16])
    expected = [p[at, ids[at + 1]].log().item() for at in range(15)]
    assert score["token_logprobs"][:15] == pytest.approx(expected, abs=1e-4)
    alone, = records("--ckpt=book.pt", "--score=text")
    assert score["loss"] < alone["loss"] - 0.1          # a text that is like the one that was counted
    assert records("--ckpt=book.pt", "--score=text", "--ngram=0") == [alone]


def test_generation_with_ngrams_is_generation_without_a_cache(counted):
    """This includes the tokens that come after the context is full."""
    prompt = load("book.pt")[1].encode("the fox").tolist()
    window, expected = prompt, []
    for _ in range(30):
        if len(window) > 16:
            window = window[-8:]
        expected.append(mixed_probabilities(counted, window)[-1].argmax().item())
        window = [*window, expected[-1]]
    words = ["--ckpt=book.pt", "--start=the fox", "--temperature=0", "--max_new_tokens=30", f"--ngram={SHARE}"]
    text, = records(*words)
    assert text["tokens"] == expected
    assert [each["tokens"] for each in records(*words, "--num_samples=2")] == [expected, expected]


def test_with_ngrams_the_model_learns_as_it_scores(counted):
    score, = records("--ckpt=book.pt", "--score=text", "--ngram=0.3", "--adapt=1e-2")
    assert score["adaptive"]["loss"] < score["loss"] - 0.02
    twice, = records("--ckpt=book.pt,book.pt", "--score=text", "--ngram=0.3")
    assert twice["loss"] == pytest.approx(score["loss"], abs=1e-5)


def test_what_is_scored_is_counted_before_the_next_window(counted, monkeypatch):
    """With a rate at which the weights stay as they are, all that learns is the counted model."""
    monkeypatch.setattr(inkling.ensemble, "NEW_TOKENS", 10)
    text = "a fox sits in the weed, " * 3
    Path("text").write_text(text, encoding="utf-8")
    words = ["--ckpt=book.pt", "--score=text", "--score_tokens", f"--ngram={SHARE}", "--stride=8"]
    score, = records(*words, "--adapt=1e-30")
    model, tokenizer = load("book.pt")
    ids = tokenizer.encode(text).astype(np.int64)
    train = np.fromfile(Path("data", "book", "train.bin"), np.uint8).astype(np.int64)
    expected = []
    recounts = []                       # the tokens of the text that are counted
    for end in [16, *range(24, len(ids) - 1, 8), len(ids) - 1]:
        first = max(0, end - 16)
        p = model(torch.from_numpy(ids[None, first:end]))[0][0].softmax(-1).detach()
        p = (1 - SHARE) * p + SHARE * torch.from_numpy(counted.predict(ids[first:end])).float()
        expected += [-p[at - first, ids[at + 1]].log().item() for at in range(len(expected), end)]
        if end + 1 - (recounts[-1] if recounts else 0) >= 10:
            recounts.append(end + 1)
            counted = NgramModel(np.concatenate([train, ids[:end + 1]]), 8, model.vocab_size)
    assert [-x for x in score["adaptive"]["token_logprobs"]] == pytest.approx(expected, abs=1e-4)
    assert len(recounts) >= 3
    assert score["adaptive"]["loss"] < score["loss"] - 0.1


def test_of_a_long_text_a_part_is_counted(counted, monkeypatch):
    monkeypatch.setattr(inkling.ensemble, "NGRAM_TOKENS", 60)
    monkeypatch.setattr(inkling.ensemble, "NGRAM_PIECES", 3)
    read = []
    monkeypatch.setattr(inkling.ensemble, "NgramModel", lambda train, *rest: read.append(train) or counted)
    outcome = sampled("--ckpt=book.pt", "--score=text", "--ngram=0.3")
    assert outcome.returncode == 0, outcome.stderr
    assert "60 of 178 tokens" in outcome.stderr
    train = np.fromfile(Path("data", "book", "train.bin"), np.uint8)
    assert read[0].tolist() == [*train[:20], *train[79:99], *train[-20:]]      # evenly


@pytest.mark.parametrize(("words", "parts"), [
    (["--ckpt=a.pt", "--ngram=0.3"], ["--ngram", "does not say what it was trained on", "leave --ngram out"]),
    (["--ckpt=book.pt", "--ngram=1"], ["ngram=1", "less than 1"]),
    (["--ckpt=book.pt", "--ngram=1.5"], ["ngram=1.5"]),
    (["--ckpt=book.pt", "--ngram=0.3", "--compile"], ["--compile", "--ngram"]),
])
def test_mistakes_with_ngrams(counted, words, parts):
    one_line_error(sampled(*words, "--start=the"), *parts)


def test_a_set_that_has_changed_is_not_counted(counted, tmp_path):
    content = torch.load("book.pt", weights_only=True)
    torch.save(content | {"text": "0" * 64}, "book.pt")
    one_line_error(sampled("--ckpt=book.pt", "--ngram=0.3"), "--ngram", "does not hold the text", "prepare")
    shutil.rmtree(tmp_path / "data" / "book")
    one_line_error(sampled("--ckpt=book.pt", "--ngram=0.3"), "--ngram", "is not there", "prepare")
