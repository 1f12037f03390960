"""sample.py: how it chooses tokens, what it prints of them, and how it scores a text."""

import ast
import base64
import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ZYGOTE, flags, inside, one_line_error, pairwise, perturbed

import sample
from inkling.checkpoint import save_checkpoint
from inkling.cli import UserError, printable, printable_text, quoted
from inkling.tokenizer import Tokenizer, start_of_texts
from sample import Options, Picker, keep_top_p, select_top_k, token_losses
from train import GPT, Config, load

SIZE, VOCAB = 16, 50
TOY_LOGITS = torch.tensor([[4.51, .89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
CHARS = {"kind": "char", "chars": "\n !,.abcdefghijklmnopqrstuvwxyzé猫"}
BYTES = {"kind": "byte"}
EOT = 259
BPE = {"kind": "bpe", "name": "tiny", "pattern": r"\S+|\s+", "special": {"<|endoftext|>": EOT},
       "ranks": "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in
                          enumerate([*(bytes([value]) for value in range(256)), b"th", b"the", b"he"]))}


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def checkpoint(folder, stored: dict) -> str:
    """A small model with noise for weights, as a file."""
    cfg, tokenizer = Config(n_layer=2, n_head=2, n_embd=16, block_size=SIZE, init="gpt2"), Tokenizer(stored)
    torch.manual_seed(0)
    model = perturbed(GPT(cfg, tokenizer.vocab_size))
    with torch.no_grad():
        model.head.weight *= 4                          # so that some tokens are far likelier than others
    path = folder / f"{stored['kind']}.pt"
    assert save_checkpoint(dict(config=asdict(cfg), tokenizer=stored, model=model.state_dict(), step=0,
                                vocab_size=tokenizer.vocab_size), path) == ""
    return str(path)


@pytest.mark.parametrize(("text", "joiner", "start"), [
    ("one\ntwo\n\nthree", None, "\n\n"), ("one\ntwo\nthree", None, "\n"), ("one\n\ntwo", "\n", "\n"),
    ("one\r\n\r\ntwo", None, "\r\n\r\n"), ("one two", None, "\n")])
def test_an_empty_prompt_is_what_precedes_a_text_of_the_training_set(text, joiner, start):
    tokenizer = Tokenizer.build("char", text)
    tokenizer.start = start_of_texts(tokenizer, joiner, tokenizer.encode(text))
    assert tokenizer.start == start
    if "\n" in text:
        assert tokenizer.decode(tokenizer.encode_prompt("")) == start
    else:
        assert tokenizer.encode_prompt("").tolist() == [0]          # it has no line break
    assert tokenizer.decode(tokenizer.encode_prompt("one")) == "one"


def test_a_checkpoint_carries_its_start(models, tmp_path):
    content = torch.load(models["char"], weights_only=True)
    assert load(models["char"])[1].start == "\n"                    # one from before there was a start
    save_checkpoint(content | {"start": "\n\n"}, tmp_path / "ckpt.pt")
    assert load(tmp_path)[1].start == "\n\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Paths of checkpoints, one per kind of tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return {stored["kind"]: checkpoint(folder, stored) for stored in (CHARS, BYTES, BPE)}


@pytest.fixture(scope="module")
def loaded(models) -> dict:
    """(model, tokenizer) of each kind."""
    return {kind: load(path) for kind, path in models.items()}


@pytest.fixture
def run_sample(models, loaded, tmp_path, monkeypatch):
    """run_sample("--json", seed=3): sample.py with the character model, in an empty folder. The models are copied
    instead of read again, which would take longer than the short texts here."""
    monkeypatch.chdir(tmp_path)
    by_path = {path: loaded[kind] for kind, path in models.items()}

    def load_copy(path, device):
        if str(path) in by_path:
            model, tokenizer = by_path[str(path)]
            return copy.deepcopy(model), tokenizer
        return load(path, device)

    def run_sample(*words, stdin: bytes = b"", kind: str = "char", **options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        return inside(sample.main, f"--ckpt={models[kind]}", "--device=cpu", *flags(**options), *words)

    monkeypatch.setattr(sample, "load", load_copy)
    return run_sample


@pytest.fixture
def printed(run_sample):
    """What it prints, when all is well."""
    def printed(*words, **options) -> str:
        outcome = run_sample(*words, **options)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        return outcome.stdout
    return printed


@pytest.fixture
def records(printed):
    """The objects of --json, one per line."""
    def records(*words, **options) -> list:
        return [json.loads(line) for line in printed("--json", *words, **options).split("\n")[:-1]]
    return records


class Parrot(GPT):
    """Says these ids in each of its rows, again and again. `stop_at`: Ctrl-C at that call."""

    def __init__(self, ids, vocab_size: int, stop_at: int = -1):
        super().__init__(Config(n_layer=1, n_head=1, n_embd=8, block_size=SIZE), vocab_size)
        self.ids = list(ids)
        self.calls = 0
        self.stop_at = stop_at

    def next_logits(self, *inputs):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        logits = torch.full_like(super().next_logits(*inputs), -100.0)
        logits[:, self.ids[self.calls % len(self.ids)]] = 100.0
        self.calls += 1
        return logits


class Spy(io.StringIO):
    """A stdout that notes how many calls of the model came before each piece that is printed."""

    def __init__(self, model: Parrot):
        super().__init__()
        self.model = model
        self.notes = []

    def write(self, piece):
        if piece:
            self.notes.append((self.model.calls, piece))
        return super().write(piece)


@pytest.fixture
def parrot(monkeypatch):
    """parrot("text", "--stop=x"): (what is printed of a model that says this text, [(calls before, piece)])."""
    def parrot(says, *words, stored: dict = CHARS, stop_at: int = -1, code: int = 0):
        tokenizer = Tokenizer(stored)
        ids = tokenizer.encode(says) if isinstance(says, str) else says
        model = Parrot(ids, tokenizer.vocab_size, stop_at)
        monkeypatch.setattr(sample, "load", lambda path, device: (model, tokenizer))
        out = Spy(model)
        with contextlib.redirect_stdout(out):
            try:
                assert sample.main(["--ckpt=x", "--device=cpu", "--max_new_tokens=40", *words]) == code
            except KeyboardInterrupt:
                pytest.fail("Ctrl-C ends the program before it has shown its text")
        return out.getvalue(), out.notes
    return parrot


# -- the filters

def kept(logits) -> list:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_top_k_selects_the_k_largest():
    logits, ids = select_top_k(TOY_LOGITS, 3)
    assert ids.tolist() == [[0, 3, 7]]
    near(logits, torch.tensor([[4.51, 6.75, 6.28]]))
    near(logits.softmax(-1), torch.tensor([[.0615, .5775, .3610]]), atol=5e-5)


@pytest.mark.parametrize("top_k", [9, 200])
def test_a_top_k_of_the_vocabulary_or_more_is_the_same_as_0(top_k):
    logits = TOY_LOGITS.expand(200, 9)
    all_ids, same_ids = (Picker(Options(temperature=3.0, top_k=k), [PROMPT] * 200, range(200), 9, "cpu")(logits)
                         for k in (0, top_k))
    assert torch.equal(all_ids, same_ids)
    assert len(all_ids.unique()) == 9


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    logits = 3 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = []
    for p in logits.double().softmax(-1):
        nucleus, total = [], 0.0
        for token in p.argsort(descending=True).tolist():
            if total < top_p:
                nucleus.append(token)
            total += p[token]
        expected.append(sorted(nucleus))
    filtered = keep_top_p(logits, top_p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])      # unchanged


def test_a_top_p_of_1_keeps_even_what_is_lost_in_a_float32_sum(monkeypatch):
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(Picker, "random_numbers", lambda self, chooses, device: last)
    logits = torch.tensor([[0.0, -30.0]])               # the first has 1 in float32, the second 1e-13
    assert Picker(Options(temperature=1.0, top_p=1.0), [[0]], [0], 2, "cpu")(logits).item() == 1
    assert Picker(Options(temperature=1.0, top_p=0.9), [[0]], [0], 2, "cpu")(logits).item() == 0


def test_top_p_counts_the_probabilities_of_top_k(monkeypatch):
    # Of the top 3, .5775 and .3610 make .9385 > .93; of all 9 they make .9297.
    assert kept(keep_top_p(select_top_k(TOY_LOGITS, 3)[0], 0.93)) == [[1, 2]]
    assert kept(keep_top_p(TOY_LOGITS, 0.93)) == [[0, 3, 7]]
    lowest = torch.tensor([0.0], dtype=torch.float64)   # draws the first of what is kept
    monkeypatch.setattr(Picker, "random_numbers", lambda self, chooses, device: lowest)
    options = Options(temperature=1.0, top_k=3, top_p=0.93)
    assert Picker(options, [[0]], [0], 9, "cpu")(TOY_LOGITS).item() == 3


# -- fair choices

def exact(logits: list, options: Options, prompt: list) -> list:
    """The probabilities that the options promise, from their definitions."""
    seen = set(prompt)
    if options.repetition_penalty != 1:
        logits = [z if i not in seen else z / options.repetition_penalty if z > 0 else z * options.repetition_penalty
                  for i, z in enumerate(logits)]
    p = {i: math.exp(z / options.temperature) for i, z in enumerate(logits)}
    order = sorted(p, key=p.get, reverse=True)[:options.top_k or None]
    total = sum(p[i] for i in order)
    nucleus, reached = [], 0.0
    for i in order:
        if reached < options.top_p:
            nucleus.append(i)
        reached += p[i] / total
    order = [i for i in nucleus if p[i] >= options.min_p * p[nucleus[0]]]
    total = sum(p[i] for i in order)
    return [p[i] / total if i in order else 0.0 for i in range(len(logits))]


def unfair(ids: list, p: list) -> bool:
    """Whether the counts of ids differ from the probabilities by more than chance does once in 10,000."""
    counts = np.bincount(ids, minlength=len(p)).tolist()
    if any(count and not share for count, share in zip(counts, p, strict=True)):
        return True
    expected = [share * len(ids) for share in p]
    common = [i for i, n in enumerate(expected) if n >= 5]
    pairs = [(counts[i], expected[i]) for i in common]
    if (rest := len(ids) - sum(n for _, n in pairs)) > 5:       # the rare ones together
        pairs.append((len(ids) - sum(count for count, _ in pairs), rest))
    chi_square, freedom = sum((count - n) ** 2 / n for count, n in pairs), len(pairs) - 1
    if not freedom:
        return False
    return chi_square > freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


PROMPT = [3, 1, 6]                      # the likeliest of the toy logits, a middling and a negative one
CHOICES = [{}, dict(temperature=0.5), dict(temperature=2.5), dict(top_k=3), dict(top_k=6, temperature=3.0),
           dict(top_p=0.9), dict(top_p=0.9, temperature=3.0), dict(top_k=3, top_p=0.93), dict(min_p=0.1),
           dict(min_p=0.1, temperature=3.0), dict(min_p=0.05, top_p=0.9, top_k=5, temperature=2.0),
           dict(repetition_penalty=1.3), dict(repetition_penalty=0.7), dict(repetition_penalty=2.0, temperature=3.0),
           dict(repetition_penalty=1.5, temperature=2.0, top_k=6, top_p=0.95, min_p=0.02)]


@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_choices_follow_the_exact_probabilities(settings):
    options, n = Options(**dict(temperature=1.0, top_k=0) | settings), 6000
    pick = Picker(options, [PROMPT] * n, range(n), 9, "cpu")
    assert not unfair(pick(TOY_LOGITS.expand(n, 9)).tolist(), exact(TOY_LOGITS[0].tolist(), options, PROMPT))


def test_one_stream_of_random_numbers_is_fair_too():
    options = Options(temperature=2.0, top_k=0)
    pick = Picker(options, [PROMPT], [1], 9, "cpu")
    ids = [pick(TOY_LOGITS).item() for _ in range(6000)]
    assert not unfair(ids, exact(TOY_LOGITS[0].tolist(), options, PROMPT))
    pairs = [9 * one + other for one, other in zip(ids[::2], ids[1::2], strict=True)]      # and without memory
    p = exact(TOY_LOGITS[0].tolist(), options, PROMPT)
    assert not unfair(pairs, [a * b for a in p for b in p])


def test_the_seed_logits():
    n, options = 6000, Options(temperature=1.0, top_k=3)
    ids = Picker(options, [[0]] * n, range(n), 9, "cpu")(TOY_LOGITS.expand(n, 9)).tolist()
    assert not unfair(ids, [.0615, 0, 0, .5775, 0, 0, 0, .3610, 0])
    ids = Picker(Options(temperature=0.1, top_k=0), [[0]] * n, range(n), 9, "cpu")(
        TOY_LOGITS.expand(n, 9)).tolist()
    assert ids.count(3) / n == pytest.approx(.9910, abs=4 * math.sqrt(.991 * .009 / n))


@pytest.mark.parametrize("temperature", [0, 1e-50])
def test_temperature_0_takes_the_likeliest(temperature):
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(0))
    pick = Picker(Options(temperature=temperature), [[0]] * 100, range(100), VOCAB, "cpu")
    assert torch.equal(pick(logits), logits.argmax(-1))
    options = Options(temperature=temperature, repetition_penalty=2.0)
    assert Picker(options, [[3]], [0], 9, "cpu")(TOY_LOGITS).item() == 7


def test_the_penalty_counts_what_has_been_generated_and_lowers_negative_logits_too():
    pick = Picker(Options(temperature=0, repetition_penalty=4.0), [[3]], [0], 9, "cpu")
    assert [pick(TOY_LOGITS).item() for _ in range(4)] == [7, 0, 8, 3]
    pick = Picker(Options(temperature=0, repetition_penalty=4.0), [[0]], [0], 3, "cpu")
    assert pick(torch.tensor([[-1.0, -2.0, -9.0]])).item() == 1


def test_log_probabilities_are_the_models_own():
    options = Options(temperature=2.0, top_k=2, repetition_penalty=1.5, json=True)
    pick = Picker(options, [PROMPT] * 10, range(10), 9, "cpu")
    ids = pick(TOY_LOGITS.expand(10, 9))
    assert pick.logprobs == pytest.approx(TOY_LOGITS.log_softmax(-1)[0, ids].tolist())


def test_settings_at_the_edge_of_float32_choose_ids_that_there_are():
    for options in (Options(top_p=1e-300), Options(temperature=1e-320), Options(min_p=1e-320),
                    Options(temperature=1e300), Options(min_p=1.0), Options(top_p=1e-9, top_k=1),
                    Options(repetition_penalty=100.0), Options(repetition_penalty=0.01)):
        pick = Picker(options, [[0]] * 50, range(50), 9, "cpu")
        assert max(pick(TOY_LOGITS.expand(50, 9))) < 9


# -- the same text, whatever the batch

LINES = ["the fox", "a", "", "once there was a hen", "the end of the river, where the old cat slept", "é猫", "the fox"]


@pytest.mark.parametrize("settings", pairwise(
    temperature=[0, 0.8, 2.0], top_k=[0, 5], top_p=[1.0, 0.8], min_p=[0.0, 0.1], repetition_penalty=[1.0, 1.4],
    stop=["", "e"], max_new_tokens=[0, 1, 3 * SIZE]), ids=str)
def test_prompts_of_different_lengths_continue_as_they_do_alone(records, tmp_path, settings):
    (tmp_path / "lines").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    together = records(prompts="lines", seed=5, **settings)
    alone = [records(start=line, seed=5 + number, **settings)[0] for number, line in enumerate(LINES)]
    assert [record["prompt"] for record in together] == LINES
    for one, other in zip(together, alone, strict=True):
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-4)
        assert one == other


def test_a_seed_gives_one_text_whatever_the_batch(records, printed):
    settings = dict(start="the fox", temperature=1.5, top_k=0, max_new_tokens=3 * SIZE)
    five = records(seed=10, num_samples=5, **settings)
    assert [record["seed"] for record in five] == [10, 11, 12, 13, 14]
    texts = [record["text"] for record in five]
    assert len(set(texts)) == 5
    assert texts == [records(seed=seed, **settings)[0]["text"] for seed in range(10, 15)]
    for batch_size in (1, 2, 5):
        assert [r["text"] for r in records(seed=10, num_samples=5, batch_size=batch_size, **settings)] == texts
        assert printed(seed=10, num_samples=5, batch_size=batch_size, **settings) == "".join(
            f"the fox{text}\n---------------\n" for text in texts)


def test_several_samples_of_several_prompts(records, tmp_path):
    (tmp_path / "lines").write_text("the\na long way\n", encoding="utf-8")
    settings = dict(temperature=1.5, max_new_tokens=20)
    both = records(prompts="lines", num_samples=2, seed=1, batch_size=3, **settings)
    assert [(record["prompt"], record["seed"]) for record in both] == [
        ("the", 1), ("the", 2), ("a long way", 3), ("a long way", 4)]
    assert [record["text"] for record in both] == [
        records(start=record["prompt"], seed=record["seed"], **settings)[0]["text"] for record in both]


def test_a_text_is_what_the_model_gives_one_token_after_another(records, loaded):
    """The whole way, once more by hand: uncached, with the rule of the window, numpy's stream and plain sums."""
    model, tokenizer = loaded["char"]
    window, numbers, expected = tokenizer.encode("the fox").tolist(), np.random.default_rng(7), []
    for _ in range(3 * SIZE):
        with torch.no_grad():
            p = (model(torch.tensor([window]))[0][0, -1].double() / 1.5).softmax(-1)
        expected.append(int((p.cumsum(-1) <= numbers.random()).sum()))
        window.append(expected[-1])
        window = window[-SIZE // 2:] if len(window) > SIZE else window
    assert records(start="the fox", seed=7, temperature=1.5, top_k=0, max_new_tokens=3 * SIZE)[0]["tokens"] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_convert_the_weights(printed, monkeypatch, dtype):
    dtypes = []
    generate_batch = sample.generate_batch

    def note_dtypes(model, *rest):
        dtypes.append({p.dtype for p in model.parameters()})
        generate_batch(model, *rest)

    monkeypatch.setattr(sample, "generate_batch", note_dtypes)
    assert len(printed(start="the", dtype=dtype, max_new_tokens=20)) == 24
    assert dtypes == [{getattr(torch, dtype)}]


# -- the stream

def test_text_is_written_token_by_token(parrot):
    text, notes = parrot("the fox", "--start=a ", "--max_new_tokens=7")
    assert text == "a the fox\n"
    assert notes[:-1] == [(0, "a "), *((number, char) for number, char in enumerate("the fox", 1))]


@pytest.mark.parametrize("count", range(10))
def test_only_whole_characters_are_written(parrot, count):
    says = "é猫🙂".encode()
    text, notes = parrot(says, f"--max_new_tokens={count}", "--start=ü", stored=BYTES)
    assert text == "ü" + says[:count].decode(errors="ignore") + "\n"
    assert {piece for _, piece in notes} <= set("üé猫🙂\n")


def test_bytes_that_are_no_character_are_shown_as_such(parrot):
    assert parrot(b"a\xffb\xe7\x8cc", "--max_new_tokens=6", "--start=x", stored=BYTES)[0] == "xa\ufffdb\ufffdc\n"


@pytest.mark.parametrize(("says", "stops", "expected"), [
    ("one, two. three", ["."], "one, two"),
    ("one, two. three", [", t"], "one"),                        # of several tokens
    ("one, two. three", ["three", "two", "nowhere"], "one, "),  # whichever comes first
    ("xabxabxabc", ["abc"], "xabxabx"),                         # begun twice before it comes
    ("aaab", ["aab"], "a"),
    ("the end", ["the"], ""),                                   # at once
    ("a\nb\n\nc", ["\\n\\n"], "a\nb"),                          # as typed
    ("one. two", ["e. t", "."], "one"),                         # begins earlier, but ends later
    ("one. two", ["ne.", "e."], "o"),                           # both at once: the one that begins earlier
    ("one. two", ["e.", "ne."], "o"),
])
def test_a_stop_text_ends_a_text_and_nothing_of_it_is_written(parrot, says, stops, expected):
    text, notes = parrot(says, *(f"--stop={stop}" for stop in stops), "--start= ")
    assert text == f" {expected}\n"
    assert notes[-1][0] <= len(says)
    record = json.loads(parrot(says, *(f"--stop={stop}" for stop in stops), "--start= ", "--json")[0])
    assert (record["text"], record["finish"]) == (expected, "stop")


def test_the_begin_of_a_stop_text_is_held_back_until_it_is_another(parrot):
    text, notes = parrot("xabxab.", "--stop=abc", "--max_new_tokens=7", "--start= ")
    assert text == " xabxab.\n"
    assert notes[:-1] == [(0, " "), (1, "x"), (4, "abx"), (7, "ab.")]


def test_a_stop_text_that_never_completes_is_written_at_the_end(parrot):
    assert parrot("xab", "--stop=abc", "--max_new_tokens=3", "--start= ")[0] == " xab\n"
    assert parrot("xab", "--stop=abc", "--start= ", stop_at=3, code=130)[0] == " xab\n"


def test_a_stop_text_within_the_prompt_or_across_its_end_does_not_count(parrot):
    assert parrot("bcd", "--stop=ab", "--max_new_tokens=3", "--start=aba")[0] == "ababcd\n"


def test_a_stop_text_in_one_token_and_across_bytes(parrot):
    assert parrot("猫 the 猫x".encode(), "--stop=e 猫", "--start= ", stored=BYTES)[0] == " 猫 th\n"
    assert parrot([97, 257, 98], "--stop=h", "--start= ", stored=BPE)[0] == " at\n"      # 257 is "the"


def test_an_empty_stop_text_stops_nothing(parrot):
    assert parrot("ab", "--stop=", "--max_new_tokens=4", "--start= ")[0] == " abab\n"


def test_rows_end_one_by_one(records):
    """Each of a batch ends at its own stop text or length, and none of them changes the others."""
    settings = dict(start="the", temperature=2.0, num_samples=6, max_new_tokens=40)
    free, stopped = records(**settings), records("--stop=e", "--stop=.", **settings)
    for one, other in zip(free, stopped, strict=True):
        ends = [one["text"].find(stop) for stop in "e." if stop in one["text"]]
        assert other["text"] == one["text"][:min(ends, default=None)]
        assert other["finish"] == ("stop" if ends else "length")
    assert len({len(record["text"]) for record in stopped}) > 1


def test_the_end_of_text_ends_a_text(parrot):
    ids = [97, 257, EOT, 98]
    assert parrot(ids, "--start=x", stored=BPE)[0] == "xathe\n"
    record = json.loads(parrot(ids, "--start=x", "--json", stored=BPE)[0])
    assert (record["text"], record["tokens"], record["finish"]) == ("athe", [97, 257], "eot")
    assert len(record["logprobs"]) == 2
    assert parrot(ids, "--start=x", "--ignore_eot", "--max_new_tokens=4", stored=BPE)[0] == "xathe<|endoftext|>b\n"
    assert parrot([EOT], "--start=x", stored=BPE)[0] == "x\n"


def test_an_empty_prompt_is_the_start_of_a_text(parrot, records):
    assert parrot([97], "--max_new_tokens=2", stored=BPE)[0] == "aa\n"
    assert records(kind="bpe", max_new_tokens=5)[0]["prompt"] == ""


def test_text_that_looks_like_a_special_token_stays_text(records, loaded):
    tokenizer = loaded["bpe"][1]
    assert EOT not in tokenizer.encode("<|endoftext|>")
    assert records(kind="bpe", start="<|endoftext|>", max_new_tokens=5)[0]["prompt"] == "<|endoftext|>"


@pytest.mark.parametrize("json_too", [False, True])
def test_ctrl_c_ends_with_what_was_generated(parrot, json_too):
    words = ["--start=a ", "--num_samples=2", *["--json"] * json_too]
    text, _ = parrot("the fox", *words, stop_at=3, code=130)
    if not json_too:
        assert text == "a the\n---------------\na the\n---------------\n"
        return
    both = [json.loads(line) for line in text.splitlines()]
    assert [(record["text"], record["finish"], record["seed"]) for record in both] == [("the", "", 1337),
                                                                                       ("the", "", 1338)]


@pytest.fixture
def endless(models, tmp_path):
    """sample.py as a process that prints on and on, and has begun."""
    child = ZYGOTE.start("sample.py", f"--ckpt={models['char']}", "--start=the", "--device=cpu",
                         "--max_new_tokens=10000000", folder=tmp_path)
    assert os.read(child.out, 200).startswith(b"the")
    return child


def test_the_signal_itself_leaves_no_traceback(endless):
    endless.send(signal.SIGINT)
    done = endless.wait()
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.endswith("\n")


def test_a_closed_pipe_leaves_no_traceback(endless):
    os.close(endless.out)                               # as `| head` does
    endless.out = os.open(os.devnull, os.O_RDONLY)
    done = endless.wait()
    assert (done.returncode, done.stderr) == (141, "")


# -- prompts

def test_a_prompt_from_standard_input(run_sample):
    for stdin in (b"the fox", "\ufeffthe fox".encode()):
        assert run_sample("--start=-", "--max_new_tokens=5", stdin=stdin).stdout.startswith("the fox")
    assert run_sample("--start=-", "--max_new_tokens=0", stdin=b"the\r\nfox\r\n").stdout == "the\nfox\n\n"
    one_line_error(run_sample("--start=-", stdin=b"the \xff"), "--start: standard input", "not UTF-8", "offset 4")
    one_line_error(run_sample("--start=-", stdin="the ö".encode()), "--start", "'ö'")


def test_prompts_from_a_file_or_standard_input(run_sample, records, tmp_path):
    text = "\ufeffthe fox\r\n\r\na cat"                   # as an editor on Windows writes it
    (tmp_path / "lines").write_bytes(text.encode())
    expected = ["the fox", "", "a cat"]
    assert [record["prompt"] for record in records(prompts="lines", max_new_tokens=3)] == expected
    assert [record["prompt"] for record in records(prompts="-", max_new_tokens=3, stdin=text.encode())] == expected
    text = "a\u2028b\x0cc\x85\n"                           # ends of lines to Python, but not to a person
    one, = records(prompts="-", max_new_tokens=1, stdin=text.encode(), kind="byte")
    assert one["prompt"] == "a\u2028b\x0cc\x85"


@pytest.mark.parametrize(("words", "parts"), [
    (["--start=FILE:latin"], ["latin is not UTF-8", "offset 2"]),
    (["--start=FILE:nowhere"], ["nowhere", "No such file"]),
    (["--start=FILE:."], [". is a folder"]),
    (["--start=kö"], ["--start='kö'", "'ö'"]),
    (["--prompts=nowhere"], ["nowhere", "No such file"]),
    (["--prompts=latin"], ["latin is not UTF-8"]),
    (["--prompts=empty"], ["--prompts=empty", "no prompt"]),
    (["--prompts=blank"], ["--prompts=blank", "no prompt"]),
    (["--prompts=umlaut"], ["--prompts", "'ö'"]),
    (["--prompts=lines", "--interactive"], ["--prompts and --interactive"]),
    (["--score=lines", "--interactive"], ["--interactive and --score"]),
    (["--prompts=lines", "--score=lines"], ["--prompts and --score"]),
    (["--score=lines", "--stride=17"], ["stride=17", "block_size=16"]),
    (["--score=lines", "--stride=-1"], ["stride=-1"]),
    (["--score=nowhere"], ["nowhere", "No such file"]),
    (["--score=latin"], ["latin is not UTF-8"]),
    (["--score=umlaut"], ["--score=umlaut", "'ö'"]),
    (["--score=one"], ["--score=one has 1 token", "at least 2"]),
    (["--score=empty"], ["--score=empty has 0 tokens", "at least 2"]),
    (["--top_p=0"], ["top_p=0.0"]),
    (["--top_p=1.1", "--min_p=1.5", "--min_p=-1"], ["top_p=1.1", "min_p=-1.0"]),
    (["--repetition_penalty=0", "--batch_size=0"], ["repetition_penalty=0.0", "batch_size=0"]),
    (["--repetition_penalty=1e-300"], ["repetition_penalty=1e-300"]),
    (["--stride=3", "--score_tokens"], ["--stride, --score_tokens would change nothing"]),
    (["--prompts=lines", "--start=the"], ["--start would change nothing"]),
    (["--score=lines", "--start=the", "--num_samples=2"], ["--start, --num_samples would change nothing"]),
    (["--interactive", "--num_samples=2"], ["--num_samples would change nothing"]),
    (["--init_from=gpt2", "--out_dir=x"], ["--ckpt, --out_dir would change nothing"]),
])
def test_mistakes(run_sample, tmp_path, words, parts):
    for name, content in dict(latin="kö".encode("latin1") + b"\xff", empty=b"", blank=b"\n\r\n", one=b"a",
                              lines=b"the\nfox\n", umlaut="the\nkö\n".encode()).items():
        (tmp_path / name).write_bytes(content.replace(b"k\xf6", b"ab"))
    outcome = run_sample(*words)
    one_line_error(outcome, *parts)
    assert outcome.stdout == ""


@pytest.mark.parametrize(("words", "message"), [
    (["--top_p=0", "--seed=-1"], "top_p=0.0 must be above 0 and at most 1; seed=-1 must be at least 0"),
    (["--score=x", "--prompts=x"], "--prompts and --score exclude each other: choose one"),
    (["--prompts=x", "--start=x"], "--start would change nothing here"),
    (["--start=FILE:x"], "--start: cannot read x: No such file"),
    (["--out_dir=x"], f"no {Path('x', 'ckpt.pt')}: train one first"),
    (["--ckpt=x", "--start=ö"], "--start='ö': the tokenizer has no 'ö'"),
])
def test_a_mistake_is_an_exception_that_a_notebook_survives(loaded, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load", lambda path, device: loaded["char"])
    with pytest.raises(UserError, match=re.escape(message)):
        sample.main([*words, "--device=cpu"])
    assert capsys.readouterr().out == ""


# -- one JSON object per line

def test_the_objects_of_json(records, loaded):
    model, tokenizer = loaded["char"]
    settings = dict(start="the 猫", num_samples=2, temperature=2.0, top_k=9, max_new_tokens=9, seed=3)
    for number, record in enumerate(records("--stop=zz", "--repetition_penalty=1.2", **settings)):
        assert set(record) == {"prompt", "text", "tokens", "logprobs", "finish", "seed", "settings"}
        assert (record["prompt"], record["finish"], record["seed"]) == ("the 猫", "length", 3 + number)
        assert record["text"] == tokenizer.decode(record["tokens"])
        assert record["settings"] == dict(max_new_tokens=9, stop=["zz"], ignore_eot=False, temperature=2.0, top_k=9,
                                          top_p=1.0, min_p=0.0, repetition_penalty=1.2)
        ids = torch.tensor([[*tokenizer.encode("the 猫"), *record["tokens"]]])
        with torch.no_grad():
            logprobs = model(ids)[0].log_softmax(-1)[0, 4:-1].gather(1, ids[0, 5:, None])[:, 0]
        near(torch.tensor(record["logprobs"]), logprobs)


def test_json_keeps_one_line_a_text_whatever_the_text(parrot):
    text, _ = parrot('a\n"猫\u2028\\\x00'.encode(), "--json", "--max_new_tokens=11", "--num_samples=2", "--start=x",
                     stored=BYTES)
    lines = text.split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == ['a\n"猫\u2028\\\x00'] * 2
    assert "猫" in lines[0]                             # not as an escape
    assert lines[-1] == ""


# -- a conversation

def test_a_conversation_through_a_pipe(run_sample, records):
    settings = dict(temperature=1.5, max_new_tokens=3)         # so few that all of it fits into the window
    typed = ["fox", "", "ö", " a", "/new", "cat"]
    outcome = run_sample("--interactive", stdin="\n".join(typed).encode(), **settings)
    assert outcome.returncode == 0
    expected, prompts, so_far, seed = [], [], "", 1337
    for line in typed:
        if line == "/new":
            so_far = ""
        elif line != "ö":
            prompts.append(so_far + line)
            expected.append(records(start=prompts[-1], seed=seed, **settings)[0]["text"])
            so_far, seed = so_far + line + expected[-1], seed + 1
    assert outcome.stdout == "".join(f"{text}\n" for text in expected)
    again = run_sample("--interactive", "--json", stdin="\n".join(typed).encode(), **settings)
    found = [json.loads(line) for line in again.stdout.splitlines()]
    assert [record["prompt"] for record in found] == prompts
    assert [record["text"] for record in found] == expected
    notes = outcome.stderr.splitlines()
    assert len(notes) == 2
    assert "/new" in notes[0]
    assert "'ö'" in notes[1]


def test_a_conversation_begins_with_the_start_and_bears_what_is_no_text(run_sample, records):
    outcome = run_sample("--interactive", "--max_new_tokens=9", start="the", stdin=b"\xff\n fox\n")
    assert outcome.returncode == 0
    assert outcome.stdout == records(start="the fox", max_new_tokens=9)[0]["text"] + "\n"
    assert "'\ufffd'" in outcome.stderr
    assert run_sample("--interactive", stdin=b"").stdout == ""


def test_ctrl_c_stops_a_text_of_a_conversation_but_not_the_conversation(parrot, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\n"), "utf-8"))
    calls, whole = [], Parrot.next_logits

    def next_logits(model, *inputs):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(model, *inputs)

    monkeypatch.setattr(Parrot, "next_logits", next_logits)
    assert parrot("xyz", "--interactive", "--max_new_tokens=5")[0] == "xyz\nxyzxy\n"
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert parrot("xyz", "--interactive", code=130)[0] == ""


# -- scoring

def figures(line: str) -> list:
    return [float(word.replace(",", "")) for word in line.split() if word[0].isdigit()]


def test_a_text_that_fits_has_the_score_of_the_model_token_by_token(run_sample, printed, records, loaded, tmp_path):
    (tmp_path / "text").write_text("the 猫, the fox", encoding="utf-8")
    for kind, (model, tokenizer) in loaded.items():
        ids = tokenizer.encode("the 猫, the fox").astype(np.int64)
        assert len(ids) <= SIZE + 1
        with torch.no_grad():
            expected = [-model(torch.from_numpy(ids[None, :end]))[0][0, -1].log_softmax(-1)[ids[end]].item()
                        for end in range(1, len(ids))]
        found, = records("--score_tokens", score="text", kind=kind)
        size = len("the 猫, the fox".encode()) - len(tokenizer.pieces[ids[0]])
        assert [-x for x in found.pop("token_logprobs")] == pytest.approx(expected, abs=1e-5)
        assert found.pop("file") == "text"
        assert found == pytest.approx(dict(
            tokens=len(ids) - 1, bytes=size, loss=sum(expected) / (len(ids) - 1),
            perplexity=math.exp(sum(expected) / (len(ids) - 1)), bits_per_byte=sum(expected) / math.log(2) / size,
            block_size=SIZE, stride=SIZE // 2), rel=1e-5)
        assert figures(printed(score="text", kind=kind)) == pytest.approx(
            [found[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "block_size", "stride")],
            abs=6e-3)
    assert run_sample("--score=-", stdin="the 猫, the fox".encode()).stdout == printed(score="text")


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
@pytest.mark.parametrize("length", [2, SIZE, SIZE + 1, SIZE + 2, 3 * SIZE + 1, 341])
def test_windows_count_each_token_once_with_the_context_that_is_stated(loaded, stride, length):
    model, tokenizer = loaded["char"]
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, length)
    losses = token_losses(model, ids, stride)
    assert losses.shape == (length - 1,)
    some = range(1, length) if length < 60 else [1, SIZE, SIZE + 1, 100, 259, 340]
    for at in some:
        end = next((end for end in range(SIZE, length - 1, stride) if end >= at), length - 1)
        begin = max(0, end - SIZE)
        assert at - begin >= min(at, SIZE - stride + 1)
        with torch.no_grad():
            p = model(torch.from_numpy(ids[None, begin:at]))[0][0, -1].log_softmax(-1)
        assert losses[at - 1].item() == pytest.approx(-p[ids[at]].item(), abs=1e-4)


def test_the_score_of_each_token(printed, records, tmp_path):
    (tmp_path / "text").write_text("the\nfox", encoding="utf-8")
    logprobs = records("--score_tokens", score="text")[0]["token_logprobs"]
    lines = printed("--score_tokens", score="text").splitlines()
    assert lines[:-1] == ["        -  't'", *(f"{x:9.4f}  {c!r}" for x, c in zip(logprobs, "he\nfox", strict=True))]
    assert lines[-1].startswith("loss ")


def on_a_terminal(main, *words) -> str:
    """What a program in this process shows on a terminal."""
    ours, theirs = os.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):              # Linux's end of file
            while piece := os.read(ours, 1000):
                shown.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        assert main(list(words)) == 0
    reader.join(timeout=10)
    os.close(ours)
    return b"".join(shown).decode().replace("\r\n", "\n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no such terminals here")
def test_colours_are_for_a_terminal_that_wants_them(models, printed, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "text").write_text("the fox", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    plain = printed("--score_tokens", score="text")
    words = [f"--ckpt={models['char']}", "--device=cpu", "--score=text", "--score_tokens"]
    coloured = on_a_terminal(sample.main, *words)
    assert "\033" not in plain
    for line, bare in zip(coloured.splitlines()[1:-1], plain.splitlines()[1:-1], strict=True):
        loss = -float(bare.split()[0])
        assert line == f"\033[{32 if loss < 1 else 33 if loss < 4 else 31}m{bare}\033[0m"
    assert coloured.splitlines()[-1] == plain.splitlines()[-1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal(sample.main, *words) == plain


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no such terminals here")
def test_control_characters_reach_a_pipe_but_no_terminal(parrot, monkeypatch):
    says = b"a\x1b[2J\tb\rc\n\x07\r\n\r\r\nd\r"
    assert parrot(says, f"--max_new_tokens={len(says)}", "--start=\x1bx", stored=BYTES)[0] == (
        "\x1bx" + says.decode() + "\n")
    tokenizer = Tokenizer(BYTES)
    monkeypatch.setattr(sample, "load", lambda path, device: (Parrot(says, 256), tokenizer))
    assert on_a_terminal(sample.main, "--ckpt=x", "--device=cpu", "--start=\x1bx", f"--max_new_tokens={len(says)}") == (
        "\\x1bxa\\x1b[2J\tb\\rc\n\\x07\n\\r\nd\\r\n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no such terminals here")
def test_json_reaches_a_terminal_with_escapes_that_mean_the_same(parrot, monkeypatch):
    says = "a\x9b2J\u202e猫\x7f".encode()
    words = ["--ckpt=x", "--device=cpu", "--start=x", "--json", f"--max_new_tokens={len(says)}"]
    monkeypatch.setattr(sample, "load", lambda path, device: (Parrot(says, 256), Tokenizer(BYTES)))
    shown = on_a_terminal(sample.main, *words)
    assert r'"text": "a\u009b2J\u202e猫\u007f"' in shown
    assert json.loads(shown)["text"] == says.decode()
    assert says.decode() in parrot(says, *words[2:], stored=BYTES)[0]


# Texts that people write, each with a character that Python calls unprintable.
WRITTEN = {
    "Chinese": "\u3000\u3000话说天下大势，分久必合。",
    "no-break spaces": "10\u00a0km\u202f!",
    "Persian": "می\u200cخواهم",
    "Hindi": "क्\u200dष और क्\u200cष",
    "family": "👨\u200d👩\u200d👧",
    "Scotland": "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "heart": "❤\ufe0f",
    "Arabic": "\u200fعربي\u200e 3",
    "soft hyphen": "Donau\u00addampf",
    "accent": "e\u0301",
    "Thai": "ภาษา\u200bไทย",
    "Mongolian": "ᠠ\u180eᠡ",
    "word joiner": "a\u2060b\ufeff",
    "line separators": "a\u2028b\u2029c",
    "icon": "\ue0a0",                                   # of a font's own
    "new": "\U0001fae9\U0001fadf",                      # emoji that this Python may not know yet
}
HARMFUL = [*"\x00\x07\x08\x0b\x0c\r\x1b\x7f\x85\x9b\ud800\udcff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"]


@pytest.mark.parametrize("text", WRITTEN.values(), ids=list(WRITTEN))
def test_what_people_write_stays_as_it_is(text, parrot):
    assert printable_text(f"a\t{text}\nb{text}\r\n") == f"a\t{text}\nb{text}\n"
    whole = f"x{text}" * 2
    assert printable(whole) == whole.replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")
    assert quoted(whole) == f"'{printable(whole)}'"
    assert str(UserError(whole)) == whole
    assert parrot(text.encode(), f"--max_new_tokens={len(text.encode())}", "--start=x", stored=BYTES)[0] == f"x{text}\n"


@pytest.mark.parametrize("char", HARMFUL, ids=ascii)
def test_what_acts_on_a_terminal_is_escaped(char):
    escape = ascii(char)[1:-1]
    assert printable_text(f"a\n{char}b") == f"a\n{escape}b"
    assert printable(f"a{char}b") == f"a{escape}b"
    assert quoted(f"a{char}b") == f"'a{escape}b'"


@pytest.mark.parametrize("text", ["", " ", "é", "a'b", 'a"b', "a'\"b", "a\\b", "\\n", "\n", "a\n\t\rb", "\x1b",
                                  "\ud800", "\u3000", "\u200c", "\u200d\u200d", "\u0301"], ids=ascii)
def test_a_quoted_text_is_a_text_in_python(text):
    assert quoted(text) == repr(text)
    assert ast.literal_eval(quoted(f"x{text}y")) == f"x{text}y"


def test_an_error_is_one_line_and_keeps_its_spaces():
    assert str(UserError("\na file\u3000name  b\n   and more \r\n\n of it\n")) == "a file\u3000name  b and more of it"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_that_are_not_finite_are_one_line(run_sample, models, tmp_path, dtype):
    content = torch.load(models["char"])
    content["model"]["blocks.1.mlp.up.weight"][0, 0] = 1e38         # finite, but not so its square
    content["model"]["blocks.1.mlp.down.weight"] += 1.0
    content["model"]["head.weight"] += 1.0
    torch.save(content, tmp_path / "damaged.pt")
    outcome = run_sample("--ckpt=damaged.pt", f"--dtype={dtype}")
    one_line_error(outcome, "not finite")
    assert ("--dtype=float32" in outcome.stderr) == (dtype == "float16")


# -- compiling

def test_a_step_that_cannot_be_compiled_is_named_and_done_without(run_sample, printed, monkeypatch):
    monkeypatch.setattr(sample, "compiler_missing", lambda device: "there is no C++ compiler")
    outcome = run_sample("--compile", "--max_new_tokens=9")
    assert (outcome.returncode, outcome.stderr) == (0, "not compiled: there is no C++ compiler\n")
    assert outcome.stdout == printed(max_new_tokens=9)


def test_a_step_whose_compiling_fails_goes_on_without(run_sample, printed, monkeypatch):
    def compile(step, **how):
        def fail(*given):
            raise RuntimeError("no such compiler\nand more of it")
        return fail

    monkeypatch.setattr(sample, "compiler_missing", lambda device: "")
    monkeypatch.setattr(torch, "compile", compile)
    outcome = run_sample("--compile", "--max_new_tokens=9")
    assert (outcome.returncode, outcome.stderr) == (0, "not compiled: RuntimeError: no such compiler\n")
    assert outcome.stdout == printed(max_new_tokens=9)


def test_compile_hands_the_step_on(printed, monkeypatch):
    steps = []

    def compile_step(step, device):
        return lambda *inputs: steps.append(1) or step(*inputs)

    monkeypatch.setattr(sample, "compiler_missing", lambda device: "")
    monkeypatch.setattr(sample, "compile_step", compile_step)
    assert printed("--compile", "--max_new_tokens=40", start="the") == printed("--max_new_tokens=40", start="the")
    assert len(steps) > 30
