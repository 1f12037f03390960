"""sample.py --score --adapt: each window is scored by a model that has learned from those before it, and from nothing
else."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import inside, one_line_error, perturbed

import convert
import sample
from inkling.checkpoint import save_checkpoint
from inkling.tokenizer import Tokenizer
from sample import adaptive_losses, token_losses
from train import GPT, Config, load

SIZE = 16
CHARS = {"kind": "char", "chars": "\n abcdefghijklmnopqrstuvwxyzé"}
TEXT = "the fox and the hen and the dog saw the fox " * 3
PLAIN = dict(n_layer=2, n_head=2, n_embd=16, block_size=SIZE, init="gpt2")
BARE = PLAIN | dict(embed_norm=False, qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0)
MODELS = {
    "ours": PLAIN | dict(ngram_rows=64),
    "ours without n-grams, tied": PLAIN | dict(ngrams=0, tie_weights=True),
    "ours padded": PLAIN | dict(ngram_rows=64, pad_vocab_to=64, head_bias=True),
    "GPT-2": BARE | dict(positions="learned", norm="layernorm", norm_gain=True, mlp="gelu_tanh", bias=True,
                         tie_weights=True),
    "Llama": BARE | dict(norm_gain=True, mlp="swiglu", rope_fraction=1.0, n_kv_head=1),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")


def saved(path: str = "ckpt.pt", kind: str = "ours") -> str:
    """A small model with noise for weights, as a file."""
    cfg, tokenizer = Config(**MODELS[kind]), Tokenizer(CHARS)
    torch.manual_seed(0)
    model = perturbed(GPT(cfg, tokenizer.vocab_size))
    assert save_checkpoint(dict(config=asdict(cfg), tokenizer=CHARS, model=model.state_dict(), step=0,
                                vocab_size=tokenizer.vocab_size), path) == ""
    return path


def scored(*words) -> dict:
    outcome = inside(sample.main, "--score=text", "--score_tokens", "--json", "--device=cpu", *words)
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


def slow_losses(model, ids, stride: int, rate: float) -> list:
    """The same by hand: one token's loss after another, Adam written out, float32 weights beside the model's own."""
    weights = dict(model.named_parameters())
    exact = {name: p.detach().float().clone() for name, p in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in exact.items()}
    losses, steps = [], 0
    while len(losses) < len(ids) - 1:
        begin = len(losses)
        end = min(len(ids) - 1, begin + (stride if begin else SIZE))
        scores = model(torch.tensor([ids[max(0, end - SIZE):end]]))[0][0].log_softmax(-1)
        new = [-scores[at - end][ids[at + 1]] for at in range(begin, end)]
        losses += [loss.item() for loss in new]
        model.zero_grad()
        (sum(new) / len(new)).backward()
        steps += 1
        for name, p in weights.items():
            is_table = name == "ngrams.weight" or (name == "wte.weight" and not model.cfg.tie_weights)
            grad = p.grad.float()
            squares[name] = 0.99 * squares[name] + 0.01 * grad**2
            root = (squares[name] / (1 - 0.99**steps)).sqrt()
            exact[name] -= (30 * rate if is_table else rate) * grad / (root + 1e-8)
            p.data = exact[name].to(p.dtype)
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_adaptive_losses_are_those_of_a_slow_loop(kind, dtype):
    path = saved(kind=kind)
    model, tokenizer = load(path)
    model.to(getattr(torch, dtype))
    expected = slow_losses(model, tokenizer.encode(TEXT).tolist(), 5, 1e-3)
    score = scored(f"--ckpt={path}", "--stride=5", "--adapt=1e-3", f"--dtype={dtype}")
    found = [-logprob for logprob in score["adaptive"]["token_logprobs"]]
    tolerance = 2e-3 if dtype == "float32" else 0.1         # gradients near 0 have an uncertain sign
    assert found == pytest.approx(expected, abs=tolerance)
    assert score["adaptive"]["loss"] == pytest.approx(sum(expected) / len(expected), abs=tolerance / 10)
    assert score["adaptive"]["loss"] < score["loss"] - 0.1


def test_a_window_is_scored_before_it_is_learned_from():
    path = saved()
    ids = np.random.default_rng(0).integers(0, len(CHARS["chars"]), 60)
    plain = token_losses(load(path)[0], ids, 4)
    adaptive = adaptive_losses(load(path)[0], ids, 4, 1e-2)
    torch.testing.assert_close(adaptive[:SIZE], plain[:SIZE])       # nothing learned yet
    assert (adaptive[SIZE:] - plain[SIZE:]).abs().max() > 0.1
    changed = ids.copy()
    changed[41:] = (ids[41:] + 1) % len(CHARS["chars"])             # the loss at 40 is that of token 41
    assert torch.equal(adaptive_losses(load(path)[0], changed, 4, 1e-2)[:40], adaptive[:40])


@pytest.mark.parametrize(("text", "learns"), [(TEXT[:SIZE + 2], True), (TEXT[:SIZE + 1], False)])
def test_a_text_of_one_context_says_that_nothing_was_learned(tmp_path, text, learns):
    saved()
    (tmp_path / "text").write_text(text, encoding="utf-8")
    outcome = inside(sample.main, "--ckpt=ckpt.pt", "--score=text", "--adapt=0.01", "--device=cpu")
    assert outcome.returncode == 0, outcome.stderr
    assert ("nothing learned" in outcome.stdout) != learns


def test_both_figures_are_printed_and_the_checkpoint_stays_as_it_is():
    path = saved()
    with open(path, "rb") as file:
        before = file.read()
    outcome = inside(sample.main, f"--ckpt={path}", "--score=text", "--adapt=1e-3", "--device=cpu")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    plain, adaptive = outcome.stdout.splitlines()
    score = scored(f"--ckpt={path}", "--adapt=1e-3")
    assert plain.startswith(f"loss {score['loss']:.4f} nats per token | ")
    assert adaptive.startswith(f"adaptive {score['adaptive']['loss']:.4f} nats per token | ")
    for line, figures in ((plain, score), (adaptive, score["adaptive"])):
        mean = -sum(figures["token_logprobs"]) / score["tokens"]
        assert figures["loss"] == pytest.approx(mean)
        assert figures["bits_per_byte"] == pytest.approx(mean / math.log(2))        # of ASCII text
        assert f"{figures['bits_per_byte']:.4f} bits per byte" in line
    assert "loss" not in adaptive
    assert score == scored(f"--ckpt={path}", "--adapt=1e-3")
    alone = scored(f"--ckpt={path}")
    assert "adaptive" not in alone
    assert alone.items() <= score.items()
    with open(path, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_an_imported_model_adapts_as_the_one_it_came_from(kind):
    tokenizer = Tokenizer({"kind": "byte"})
    cfg = Config(**MODELS[kind])
    torch.manual_seed(0)
    model = perturbed(GPT(cfg, tokenizer.vocab_size))
    assert save_checkpoint(dict(config=asdict(cfg), tokenizer={"kind": "byte"}, model=model.state_dict(), step=0,
                                vocab_size=tokenizer.vocab_size), "bytes.pt") == ""
    outcome = inside(convert.main, "export", "bytes.pt", "--out=theirs")
    assert outcome.returncode == 0, outcome.stderr
    ours = scored("--ckpt=bytes.pt", "--adapt=1e-3")
    theirs = scored("--init_from=theirs", "--adapt=1e-3")
    assert theirs["adaptive"]["loss"] == pytest.approx(ours["adaptive"]["loss"], abs=1e-3)
    assert theirs["adaptive"]["loss"] < theirs["loss"] - 0.1


@pytest.mark.parametrize(("words", "parts"), [
    (["--score=text", "--adapt=0"], ["--adapt=0 would learn nothing"]),
    (["--score=text", "--adapt=-1e-4"], ["adapt=-0.0001 must be"]),
    (["--score=text", "--adapt=nan"], ["adapt", "nan", "finite"]),
    (["--score=text", "--adapt=inf"], ["adapt", "inf", "finite"]),
    (["--score=text", "--adapt=fast"], ["adapt", "fast"]),
    (["--adapt=1e-4"], ["--adapt would change nothing"]),
])
def test_mistakes(words, parts):
    outcome = inside(sample.main, f"--ckpt={saved()}", "--device=cpu", *words)
    one_line_error(outcome, *parts)
    assert outcome.stdout == ""


def test_a_rate_that_breaks_the_model_is_one_line():
    outcome = inside(sample.main, f"--ckpt={saved(kind='Llama')}", "--device=cpu", "--score=text", "--adapt=1e9",
                     "--json")
    one_line_error(outcome, "--adapt=1e+09", "the loss is not a finite number after", "lower it")
    assert outcome.stdout == ""
