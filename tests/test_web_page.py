"""A checkpoint becomes one web page that computes what Python computes, in which nothing turns into HTML, and what no
page can hold is refused. What runs JavaScript needs node; bench/page.py asks the same in Chromium."""

import base64
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, one_line_error, pairwise, perturbed

import convert
from inkling import web_page
from inkling.checkpoint import save_checkpoint
from inkling.cli import UserError, parse
from inkling.js_regex import to_javascript
from inkling.tokenizer import END_OF_TEXT, PATTERN, SINGLE_BYTES, Tokenizer, rank_lines
from inkling.web_page import build_page, pack, packed_size, page_weights, quantize
from train import GPT, MODEL_FIELDS, Config

node = pytest.mark.skipif(not shutil.which("node"), reason="needs node, which runs the page's JavaScript")
TINY = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, ngrams=3, ngram_rows=97, rope_factor=3.0, rope_context=256)
SWITCHES = pairwise(
    positions=["rope", "learned"], rope_fraction=[0.25, 0.5, 1.0], norm=["rmsnorm", "layernorm"],
    norm_gain=[False, True], embed_norm=[False, True], mlp=["relu2", "relu", "gelu", "gelu_tanh", "swiglu"],
    bias=[False, True], qkv_bias=["auto", False, True], head_bias=[False, True], tie_weights=[False, True],
    qk_norm=[False, True], qk_norm_gain=[False, True], logit_cap=[0.0, 15.0], shortcuts=[False, True],
    n_kv_head=[0, 1, 2], pad_vocab_to=[1, 64], ngrams=[0, 2, 5], ngram_edges=[False, True],
    ngram_rows=[97, 65_536], head_dim=[0, 12], ffn_dim=[0, 50], rope_scaling=["none", "linear", "llama3"],
    norm_eps=[1e-6, 1e-2])
CONFIGS = sorted((ROOT / "config").glob("*.py"))
CHARS = {"kind": "char", "chars": "\n ,.abcdefghijklmnopqrstuvwxyz\u00e9\u72d0"}
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>{{weights}}\u2028"


def content_of(tokenizer: dict | None = None, dataset: str = "toy", seed: int = 0, **settings) -> dict:
    """A checkpoint's content with noise for weights."""
    tokenizer = Tokenizer(tokenizer or CHARS)
    cfg = Config(**TINY | dict(init="gpt2", dataset=dataset) | settings)
    torch.manual_seed(seed)
    model = perturbed(GPT(cfg, tokenizer.vocab_size), seed)
    return {"format": 1, "config": asdict(cfg), "tokenizer": tokenizer.stored, "vocab_size": tokenizer.vocab_size,
            "model": dict(model.state_dict()), "step": 3, "tokens": 99, "seconds": 61.5, "start": "\n",
            "losses": {"train": 1.0, "val": 1.25}}


def model_of(content: dict) -> GPT:
    model = GPT(Config(**content["config"]), content["vocab_size"]).eval()
    model.load_state_dict(content["model"])
    return model


def element(page: str, name: str) -> str:
    return re.search(rf'<script id="{name}" type="[^"]*">(.*?)</script>', page, re.DOTALL)[1]


def ask(tmp_path, *pages) -> list:
    """The answers of bench/page.js to [(page, [[name of a question, its words], ...]), ...], in one process."""
    asked = []
    for number, (page, questions) in enumerate(pages):
        path = tmp_path / f"{number}.html"
        path.write_text(page, encoding="utf-8")
        asked.append({"path": str(path), "questions": questions})
    done = subprocess.run(["node", ROOT / "bench" / "page.js"], input=json.dumps({"pages": asked}), text=True,
                          capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def ask_one(tmp_path, content: dict, *questions, bits: int = 32) -> list:
    return ask(tmp_path, (build_page(content, "toy.pt", bits), questions))[0]


# -- what is in the page

def test_the_command_writes_one_file_that_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(content_of(), tmp_path / "ckpt.pt")
    done = inside(convert.main, "page", "ckpt.pt", "--out=toy.html")
    assert done.returncode == 0, done.stderr
    assert "toy.html" in done.stdout
    page = (tmp_path / "toy.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|importScripts|fetch\(|XMLHttp|WebSocket", page)
    assert "default-src 'none'" in page
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "toy.html"}
    sizes = [(tmp_path / "toy.html").stat().st_size]
    assert inside(convert.main, "page", "ckpt.pt", "--out=toy.html", "--bits=16").returncode == 0
    sizes.append((tmp_path / "toy.html").stat().st_size)
    parameters = sum(tensor.numel() for tensor in model_of(content_of()).parameters())
    assert sizes[1] - sizes[0] == pytest.approx(parameters * 4 / 3, rel=0.02)      # a byte more for each


def test_the_page_says_what_is_known_of_the_model():
    places = dict(data_dir="/home/me/data", init_from="/home/me/ckpt.pt", out_dir="/home/me/out")
    page = build_page(content_of(dataset="my-book", n_layer=1, sample_start="a b", **places), "toy.pt", 8)
    assert "/home/me" not in page
    model = json.loads(element(page, "model"))
    card = model["card"]
    assert (card["name"], card["val_loss"], card["step"], card["tokens"], card["seconds"]) == ("my-book", 1.25, 3, 99,
                                                                                               61.5)
    assert card["parameters"] == sum(p.numel() for p in model_of(content_of(n_layer=1)).parameters())
    assert card["ngram_parameters"] == 97 * 32
    assert "--n_layer=1 " in card["command"]
    assert "--sample_start='a b'" in card["command"]
    assert "<title>my-book</title>" in page
    assert set(model["config"]) == MODEL_FIELDS


def test_numbers_that_json_lacks_are_left_out_of_the_card():
    content = content_of() | {"losses": {"val": math.nan}, "seconds": 0.0}
    card = json.loads(element(build_page(content, "toy.pt", 8), "model"))["card"]
    assert card["val_loss"] is None


# What a switch does is seen from the weights that there are.
SEEN_IN_WEIGHTS = {"norm_gain", "qk_norm_gain", "bias", "qkv_bias", "head_bias", "shortcuts", "ffn_dim", "ngram_rows",
                   "pad_vocab_to"}


def test_the_page_knows_every_switch_of_the_model():
    code = (ROOT / "inkling" / "page" / "model.js").read_text(encoding="utf-8")
    code += (ROOT / "inkling" / "page" / "worker.js").read_text(encoding="utf-8")
    used = set(re.findall(r"\bcfg\.(\w+)", code))
    assert used == MODEL_FIELDS - SEEN_IN_WEIGHTS


# -- weights

def test_weights_are_rounded_to_the_nearest_multiple_of_their_rows_scale():
    matrix = torch.randn(50, 31, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    matrix[7] = 0
    for bits, largest in ((8, 127), (16, 32767)):
        integers, scales = quantize(matrix, bits)
        assert integers.abs().max() == largest
        error = (integers * scales[:, None] - matrix).abs()
        assert (error <= scales[:, None] * 0.501).all()
        torch.testing.assert_close(scales, matrix.abs().amax(1) / largest)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_packed_weights_are_where_the_page_says(bits):
    content = content_of(bias=True, norm_gain=True, pad_vocab_to=64, head_bias=True, n_embd=30, n_head=3, ffn_dim=33)
    weights = page_weights(model_of(content))
    tensors, packed = pack(weights, bits)
    assert len(packed) == sum(packed_size(tensor, bits) for tensor in weights.values())
    for entry in tensors:
        tensor = weights[entry["name"]]
        assert entry["shape"] == list(tensor.shape)
        assert entry["offset"] % 4 == 0
        place = entry["offset"]
        if tensor.dim() == 1 or bits == 32:
            assert entry["bits"] == 32
            found = np.frombuffer(packed, "<f4", tensor.numel(), place).reshape(tensor.shape)
            assert (found == tensor.numpy()).all()
            continue
        scales = np.frombuffer(packed, "<f4", len(tensor), place)
        integers = np.frombuffer(packed, f"<i{bits // 8}", tensor.numel(), place + 4 * len(tensor))
        expected, expected_scales = quantize(tensor, bits)
        assert (scales == expected_scales.numpy()).all()
        assert (integers.reshape(tensor.shape) == expected.numpy()).all()
    assert len(weights["wte.weight"]) == content["vocab_size"]
    assert len(base64.b64decode(element(build_page(content, "toy.pt", bits), "weights"))) == len(packed)


def test_a_tied_head_is_stored_once():
    assert "head.weight" not in page_weights(model_of(content_of(tie_weights=True)))


# -- text stays text

class Tags(HTMLParser):
    """Every element of a page with its attributes, and the text of its title."""

    def __init__(self, page: str):
        super().__init__()
        self.tags = []
        self.title = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "title":
            self.title += data


def test_nothing_that_a_checkpoint_holds_becomes_html():
    harmless = Tags(build_page(content_of(), "toy.pt", 8))
    tokenizer = {"kind": "char", "chars": "".join(sorted(set(HOSTILE + "<>&\"'\u2029")))}
    content = content_of(tokenizer, dataset=HOSTILE) | {"start": HOSTILE}
    page = build_page(content, "toy.pt", 8)
    tags = Tags(page)
    assert tags.tags == harmless.tags
    assert tags.title.rstrip("\n") == HOSTILE
    model = json.loads(element(page, "model"))
    assert model["card"]["name"] == HOSTILE
    assert model["tokenizer"]["chars"] == tokenizer["chars"]
    assert len(page) < 2 * len(build_page(content_of(), "toy.pt", 8))       # {{weights}} in a name is no placeholder


def test_the_scripts_of_the_page_set_text_and_no_html():
    for path in (ROOT / "inkling" / "page").glob("*.js"):
        code = path.read_text(encoding="utf-8")
        assert "</script" not in code
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code)


def test_every_text_is_there_in_both_languages():
    code = (ROOT / "inkling" / "page" / "texts.js").read_text(encoding="utf-8")
    english, chinese = code.split("  zh: {")
    names = re.compile(r"(?:^    |(?<=\", )|(?<=：\", )|(?<=, ))(\w+): (?=[\"(])", re.MULTILINE)
    assert set(names.findall(english)) == set(names.findall(chinese))
    page = (ROOT / "inkling" / "page" / "page.html").read_text(encoding="utf-8")
    said = set(re.findall(r'data-(?:text|label)="(\w+)"', page))
    said |= set(re.findall(r"\bSAY\.(\w+)", (ROOT / "inkling" / "page" / "page.js").read_text(encoding="utf-8")))
    assert said <= set(names.findall(english))


# -- what no page can hold

def test_what_no_page_can_hold_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    save_checkpoint(content_of(), path)
    for words, parts in ((["page", path], ["--out="]), (["page", path, "--out=x.html", "--bits=32"], ["bits", "8"]),
                         (["page", tmp_path / "none.pt", "--out=x.html"], ["none.pt"]),
                         (["page", path, "--out=no/x.html"], ["no/x.html"]),
                         (["import", path, "--bits=16"], ["--bits"])):
        one_line_error(inside(convert.main, *words), *parts)
    monkeypatch.setattr(web_page, "LARGEST_PAGE", 10_000)
    one_line_error(inside(convert.main, "page", path, "--out=x.html"), "8 bits", "MB", "smaller")
    monkeypatch.setattr(web_page, "LARGEST_PAGE", 50_000)
    one_line_error(inside(convert.main, "page", path, "--out=x.html", "--bits=16"), "16 bits", "leave --bits out")
    assert {found.name for found in tmp_path.iterdir()} == {"ckpt.pt"}


def test_a_tokenizer_that_a_page_cannot_be_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    content = content_of({"kind": "json", "json": words.to_str()})
    with pytest.raises(UserError, match=r"toy.pt: .*tokenizer\.json.*char, byte and bpe"):
        build_page(content, "toy.pt", 8)
    content = content_of(bpe(r"\b\w+|\W"))
    with pytest.raises(UserError, match=r"pattern of its tokenizer .*\\b"):
        build_page(content, "toy.pt", 8)


# -- patterns

@pytest.mark.parametrize("pattern", [
    r"\bx", r"(?m:^x)", r"(?x) a", r"[a-z&&[^b]]", r"[[:alpha:]]", r"\p{Tangut}", r"(a)\1", r"a{2", r"*a", "(a", "a)",
    "[a", r"(?i:\p{Lu})", r"(?<=a++)b", r"[z-a]", r"\h", "a\\"])
def test_a_pattern_that_javascript_cannot_match_is_refused(pattern):
    with pytest.raises(ValueError):     # noqa: PT011, each names another construct
        to_javascript(pattern)


@pytest.mark.parametrize(("rust", "javascript"), [
    (r"\s+(?!\S)|\d{1,3}", r"\p{White_Space}+(?!\P{White_Space})|\p{Nd}{1,3}"),
    (r"a++b", r"(?:(?=(?<p1>a+))\k<p1>)b"), (r"(?>a|b)", r"(?:(?=(?<p1>a|b))\k<p1>)"),
    (r"(?i:k9)|k", "(?:[Kk\u212a]9)|k"), (r"(?i)s(?-i:s)s", "[Ss\u017f](?:s)[Ss\u017f]"),
    (r"[^]a-c\-\]]", r"[^\]a-c\u{2d}\]]"),
    (r"\p{Han}\PL\p{^N}", r"\p{Script=Han}\P{L}\P{N}"), (r"\x41\x{1F600}\u00e9.", "A\U0001f600\u00e9[^\\n]"),
    (r"(a|(?P<x>b))*?", "(?:a|(?:b))*?")])
def test_a_pattern_is_spelled_for_javascript(rust, javascript):
    assert to_javascript(rust) == javascript


def bpe(pattern: str = PATTERN) -> dict:
    """A byte-pair encoding of some merges."""
    merges = ["th", "the", " t", " the", "an", "and", "in", "ing", "  ", "\n\n", "12", "'s", "'S", " a", " an", " and",
              "\u72d0", "\u00e9", "it", "'ll", "\u017f"]
    tokens = [*SINGLE_BYTES, *(part.encode() for part in merges), "\u72d0".encode()[:2]]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    return {"kind": "bpe", "name": "toy", "pattern": pattern, "ranks": rank_lines(ranks),
            "special": {END_OF_TEXT: len(ranks)}}


# -- in node: the model

def switches_of(config: Path) -> dict:
    """A config file's settings of the model, in small sizes."""
    values = parse(Config, [str(config)], "").values
    switches = {name: value for name, value in values.items() if name in MODEL_FIELDS - TINY.keys() - {"ffn_dim"}}
    return switches | {"n_kv_head": min(switches.get("n_kv_head", 0), 2)}


@node
def test_logits_are_pythons_whatever_the_switches(tmp_path):
    """On each pair of values of all switches and on those of each config file, with weights in 32 bits."""
    ids = [3, 0, 29, 5, 5, 7, 3, 0, 29, 5, 11, 2]
    all_switches = [*SWITCHES, *map(switches_of, CONFIGS)]
    contents = [content_of(seed=seed, **switches) for seed, switches in enumerate(all_switches)]
    answers = ask(tmp_path, *((build_page(content, "toy.pt", 32), [["logits", ids]]) for content in contents))
    assert len(SWITCHES) > 20
    for content, switches, (logits,) in zip(contents, all_switches, answers, strict=True):
        with torch.no_grad():
            expected = model_of(content)(torch.tensor([ids]))[0][0]
        assert expected.std() > 0.05
        difference = (torch.tensor(logits) - expected).abs().max().item()
        assert difference < 1e-4, switches


@node
@pytest.mark.parametrize("bits", [8, 16])
def test_logits_of_rounded_weights_are_those_of_the_rounded_model(tmp_path, bits):
    content = content_of(norm_gain=True, bias=True)
    logits, = ask_one(tmp_path, content, ["logits", [1, 2, 3, 4]], bits=bits)
    for name, tensor in content["model"].items():
        if tensor.dim() == 2:
            integers, scales = quantize(tensor, bits)
            content["model"][name] = integers * scales[:, None]
    with torch.no_grad():
        expected = model_of(content)(torch.tensor([[1, 2, 3, 4]]))[0][0]
    assert (torch.tensor(logits) - expected).abs().max() < 1e-4


ORDER = dict(text="abc", length=40, temperature=0.8, topK=0, seed=5)


@node
def test_greedy_text_is_pythons_beyond_the_context(tmp_path):
    content = content_of()
    tokens, = ask_one(tmp_path, content, ["write", ORDER | dict(temperature=0)])
    ids = [token["id"] for token in tokens]
    prompt = Tokenizer(CHARS).encode("abc").tolist()
    expected = model_of(content).generate(torch.tensor([prompt]), 40, lambda logits: logits.argmax(-1))
    assert ids == prompt + [token.item() for token in expected]
    assert [token["isNew"] for token in tokens] == [False] * 3 + [True] * 40


@node
def test_a_seed_repeats_and_a_text_continues_from_any_token(tmp_path):
    content = content_of()
    page = build_page(content, "toy.pt", 32)
    whole = ["write", ORDER]
    other = ["write", ORDER | dict(seed=6)]
    (first, again, different), = ask(tmp_path, (page, [whole, whole, other]))
    assert first == again
    ids = [token["id"] for token in first]
    assert ids != [token["id"] for token in different]
    # After another text, from the middle: the cache must not matter.
    rest = ["write", ORDER | dict(ids=ids[:25], known=24, length=18)]
    (_, tail), = ask(tmp_path, (page, [other, rest]))
    assert tail == [first[24] | {"isNew": False}, *first[25:]]


@node
def test_each_token_comes_with_its_probability_and_the_ten_likeliest(tmp_path):
    content = content_of()
    tokens, = ask_one(tmp_path, content, ["write", ORDER | dict(length=5)])
    ids = [token["id"] for token in tokens]
    with torch.no_grad():
        p = model_of(content)(torch.tensor([ids]))[0][0].softmax(-1)
    assert tokens[0]["p"] is None
    for place, token in enumerate(tokens[1:]):
        assert token["p"] == pytest.approx(p[place, token["id"]].item(), abs=1e-5)
        likeliest = p[place].topk(10)
        assert [other["id"] for other in token["likeliest"]] == likeliest.indices.tolist()
        assert [other["p"] for other in token["likeliest"]] == pytest.approx(likeliest.values.tolist(), abs=1e-5)
        assert token["rank"] == 1 + (p[place] > p[place, token["id"]]).sum().item()


@node
def test_tokens_are_drawn_with_their_probabilities(tmp_path):
    logits = [0.0, 2.0, -1.0, 1.0, 0.5]
    count = 20_000
    cold, top, greedy = ask_one(tmp_path, content_of(), ["draws", logits, 0.5, 0, count],
                                ["draws", logits, 1, 2, count], ["draws", logits, 0, 0, 10])
    expected = (torch.tensor(logits) / 0.5).softmax(0) * count
    for drawn, mean in zip(cold, expected.tolist(), strict=True):
        assert abs(drawn - mean) < 5 * math.sqrt(mean) + 1
    assert [drawn > 0 for drawn in top] == [False, True, False, True, False]
    assert top[1] / count == pytest.approx(math.e / (math.e + 1), abs=0.02)
    assert greedy == [0, 10, 0, 0, 0]


@node
def test_a_text_ends_at_its_end_of_text_token(tmp_path):
    content = content_of(bpe())
    eot = content["vocab_size"] - 1
    content["model"]["wte.weight"][eot] = 0
    content["config"]["head_bias"] = True
    content["model"]["head.bias"] = torch.zeros(eot + 1).index_fill(0, torch.tensor([eot]), 100.0)
    tokens, = ask_one(tmp_path, content, ["write", ORDER | dict(text="the")])
    assert [token["id"] for token in tokens[-1:]] == [eot]
    assert [token["isEnd"] for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert tokens[-1]["isNew"]


# -- in node: the tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                  r"|\s*[\r\n]|\s+(?!\S)|\s")
O200K_PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
HAN_PATTERN = r"[\p{Han}]{1,2}+|(?>\w+)|.|\s"
ALPHABET = [*"aAzZsSkK'1239 \t\n\r.,!-_/<|>", "\x85", "\u00a0", "\u2028", "\ufeff", "\u3000", "\u017f", "\u212a",
            "\u00e9", "e\u0301", "\u01c5", "\u0130", "\u0661", "\u2167", "\u00bd", "\u72d0\u72f8", "\ud55c",
            "\u0e01\u0e33", "\U0001f98a", "\U0001d7d9", "\u200d", "'S", "'LL", "'\u017f", " the", "ing", "\r\n", "  ",
            "   ", END_OF_TEXT]


def hard_texts(count: int) -> list:
    rng = random.Random(0)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 14))) for _ in range(count)]


def as_typed(tokenizer: Tokenizer, text: str) -> list | None:
    try:
        return tokenizer.encode_prompt(tokenizer.fit_form(tokenizer.fit_line_ends(text))).tolist()
    except ValueError:
        return None


@node
@pytest.mark.parametrize("stored", [
    CHARS, CHARS | {"bytes": True}, {"kind": "char", "chars": "\r\nae\u0301"}, {"kind": "byte"}, bpe(),
    bpe(GPT2_PATTERN), bpe(CL100K_PATTERN), bpe(O200K_PATTERN), bpe(HAN_PATTERN), bpe() | {"bos": 3, "eot": [5, 4]}],
    ids=["char", "char with bytes", "char with line ends", "byte", "trained", "gpt2", "cl100k", "o200k", "han", "bos"])
def test_the_ids_of_a_text_are_pythons(tmp_path, stored):
    tokenizer = Tokenizer(stored)
    texts = ["", "The fox's and the 12345 things, it'LL  go\n\n on.", "a fox", "r\u00e9e", "re\u0301e\r\nx"]
    texts += hard_texts(400)
    content = content_of(stored, ngrams=0)
    answers = ask_one(tmp_path, content, *(["encode", text] for text in texts))
    for text, answer in zip(texts, answers, strict=True):
        expected = as_typed(tokenizer, text)
        if expected is None:
            assert set(answer["unknown"].split()) <= set(text) | set(tokenizer.fit_form(text)), text
        else:
            assert answer == expected, text


@node
def test_a_character_of_several_tokens_comes_when_it_is_whole(tmp_path):
    tokenizer = Tokenizer(bpe())
    ids = [*tokenizer.encode("a\u72f8\U0001f98ab"), 0xff, *tokenizer.encode("\u72d0!")]
    answer, = ask_one(tmp_path, content_of(bpe(), ngrams=0), ["decode", list(map(int, ids))])
    complete = tokenizer.stream()
    assert answer["texts"] == [complete(value) for value in ids]
    assert "".join(answer["texts"]) == "a\u72f8\U0001f98ab\ufffd\u72d0!"
    assert answer["names"][1] == "\\xe7\\x8b"
    assert "\u72d0" in answer["names"]
