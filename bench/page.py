"""A checkpoint's web page in headless Chromium: what it weighs, how fast it writes, whether it computes what
Python computes, and what rounding to 8 bits costs.

    python bench/page.py out/fables/ckpt.pt
    python bench/page.py out/fables/ckpt.pt --pictures=pictures     # and screenshots of it
    python bench/page.py --switches                                 # the logits of small models alone

The loss is that of the whole val split of the checkpoint's data set, in windows of its context that
do not overlap. Needs Chromium (apt install chromium; fonts-wqy-microhei for Chinese pictures).
"""

import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import ROOT
from headless import Chromium

from inkling.cli import FilePath, PositiveInt, UserError, parse, run
from inkling.dataset import data_folder, read_meta
from inkling.format import size
from inkling.web_page import build_page, quantize
from sample import token_losses
from train import GPT, Config, read_checkpoint, restore_model

READY = "!document.getElementById('write').disabled"
DONE = "!document.body.classList.contains('writing')"
SMALL = dict(n_layer=3, n_head=4, n_embd=48, block_size=32, ngram_rows=997, init="gpt2", rope_context=16)
PLAIN = dict(embed_norm=False, qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0, norm_gain=True)
MODELS = {
    "the default": {},
    "n-grams that reach before the text, GQA": dict(ngram_edges=True, ngrams=9, n_kv_head=2, ngram_rows=65_536),
    "GPT-2": PLAIN | dict(positions="learned", norm="layernorm", mlp="gelu_tanh", bias=True, tie_weights=True),
    "exact gelu, untied": PLAIN | dict(positions="learned", norm="layernorm", mlp="gelu", head_bias=True),
    "Llama 3": PLAIN | dict(rope_fraction=1.0, mlp="swiglu", n_kv_head=1, rope_scaling="llama3", head_dim=10),
    "relu, linear scaling, padded": PLAIN | dict(mlp="relu", rope_scaling="linear", pad_vocab_to=64, qkv_bias=True),
}
PICTURES = {                            # of the page, and what `Chromium.open` is told
    "desktop": dict(width=1280, height=860),
    "dark": dict(width=1280, height=860, dark=True),
    "chinese": dict(width=1280, height=860, language="zh-CN"),
    "phone": dict(width=390, height=844),
    "phone-dark-chinese": dict(width=390, height=844, dark=True, language="zh-CN"),
}


@dataclass
class Options:
    tokens: PositiveInt = 500           # of a text whose speed is measured
    repeats: PositiveInt = 3            # texts
    prompt: str = "The fox"
    pictures: FilePath = ""             # folder for screenshots; empty: none
    switches: bool = False              # only the logits of small models


# -- logits ----------------------------------------------------------------------------------------

def small_model(settings: dict) -> dict:
    """A checkpoint's content with random weights."""
    torch.manual_seed(0)
    chars = "".join(map(chr, range(32, 82)))
    cfg = Config(**SMALL | settings)
    model = GPT(cfg, len(chars))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return {"config": vars(cfg), "tokenizer": {"kind": "char", "chars": chars}, "vocab_size": len(chars),
            "model": dict(model.state_dict()), "step": 0}


def element(page: str, name: str) -> str:
    return re.search(rf'<script id="{name}" type="[^"]*">(.*?)</script>', page, re.DOTALL)[1]


def logits_in_browser(browser: Chromium, page: str, ids: list) -> torch.Tensor:
    """The logits (tokens, vocab_size) that the code of a page computes."""
    questions = (ROOT / "bench" / "page.js").read_text(encoding="utf-8")
    words = [element(page, "model"), json.dumps(element(page, "weights")), json.dumps(ids)]
    return torch.tensor(browser.evaluate(f"""(() => {{
        let onmessage = null;
        {element(page, "worker")}
        {questions}
        return new Answers({{Writer, Cache, draw, uniform}}, {words[0]}, {words[1]}).logits({words[2]});
    }})()"""))


@torch.no_grad()
def compare_logits(browser: Chromium):
    for name, settings in MODELS.items():
        content = small_model(settings)
        ids = torch.randint(content["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(1))
        expected = restore_model(content, name)[0].eval()(ids)[0][0]
        logits = logits_in_browser(browser, build_page(content, name, 32), ids[0].tolist())
        difference = (logits - expected).abs().max().item()
        print(f"logits     {difference:.1e} from Python's at most: {name}", flush=True)


# -- loss ------------------------------------------------------------------------------------------

def rounded(model, bits: int):
    """The model with its weights as a page has them, in place."""
    for p in model.parameters():
        if p.dim() == 2:
            integers, scales = quantize(p.data, bits)
            p.data = integers * scales[:, None]
    return model


def report_loss(content: dict, source: str):
    dataset = content["config"]["dataset"]
    folder = data_folder(dataset, content["config"].get("data_dir", ""))
    if not (folder / "val.bin").is_file():
        print(f"loss       not measured: no data set {folder} (python prepare.py {dataset})")
        return
    ids = np.fromfile(folder / "val.bin", read_meta(folder)["dtype"])
    model = restore_model(content, source)[0].eval()
    full = token_losses(model, ids, model.cfg.block_size).double().mean().item()
    print(f"loss       {full:.5f} nats in full, of {len(ids):,} val tokens")
    for bits in (16, 8):
        model = rounded(restore_model(content, source)[0].eval(), bits)
        loss = token_losses(model, ids, model.cfg.block_size).double().mean().item()
        print(f"loss       {loss:.5f} nats in {bits} bits: {loss - full:+.5f}", flush=True)


# -- the page --------------------------------------------------------------------------------------

def write_text(browser: Chromium, prompt: str, tokens: int):
    browser.evaluate(f"""document.getElementById("prompt").value = {json.dumps(prompt)};
                         document.getElementById("length").value = {tokens};
                         document.getElementById("write").click()""")
    browser.wait_until(DONE, 300)


def report_page(browser: Chromium, path: Path, options: Options):
    start = time.perf_counter()
    browser.open(path)
    browser.wait_until(READY)
    print(f"opened     {time.perf_counter() - start:.1f} s until one can write")
    speeds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        write_text(browser, options.prompt, options.tokens)
        speeds.append(options.tokens / (time.perf_counter() - start))
    print(f"speed      {median(speeds):.0f} tokens per second (median of {options.repeats}), shown as it is written")
    others = [address for address in browser.requests if not address.startswith(("file:", "blob:"))]
    print(f"network    {len(others)} requests; {len(browser.errors)} errors of JavaScript", flush=True)


def text_of(browser: Chromium) -> str:
    return browser.evaluate("document.getElementById('text').textContent")


def press(browser: Chromium, key: str, place: str = "text"):
    browser.evaluate(f"""document.getElementById("{place}").dispatchEvent(
                             new KeyboardEvent("keydown", {{key: "{key}", bubbles: true, cancelable: true}}))""")


def check_use(browser: Chromium, path: Path, prompt: str):
    """Raise AssertionError unless a person can do what the page says."""
    browser.open(path)
    browser.wait_until(READY)
    write_text(browser, prompt, 100)
    first = text_of(browser)
    write_text(browser, prompt, 100)
    assert text_of(browser) == first, "a seed repeats"

    browser.evaluate("document.querySelectorAll('#text span')[20].click()")
    browser.evaluate("document.querySelectorAll('#likeliest button')[4].click()")
    browser.wait_until(DONE)
    assert browser.evaluate("tokens[20].name") == browser.evaluate("tokens[20].likeliest[4].name")
    assert text_of(browser)[:18] == first[:18], "what was before a replaced token stays"
    assert text_of(browser) != first

    press(browser, "End")
    press(browser, "ArrowLeft")
    assert browser.evaluate("selected === tokens.length - 2"), "arrows choose a token"
    press(browser, "3")
    browser.wait_until(DONE)
    assert browser.evaluate("tokens[tokens.length - 101].rank") == 3, "a digit takes a token"

    before = browser.evaluate("tokens.length")
    browser.evaluate("document.getElementById('length').value = 100000; document.getElementById('continue').click()")
    browser.wait_until(f"tokens.length > {before + 20}")
    press(browser, "Escape")
    browser.wait_until(DONE)
    stopped = browser.evaluate("tokens.length")
    time.sleep(0.3)
    assert browser.evaluate("tokens.length") == stopped, "Esc stops"
    assert not browser.errors, browser.errors
    print("use        a seed repeats; clicks, keys, Continue and Esc do what they say", flush=True)


HOSTILE = "</script><img src=x onerror=hacked=1>{{weights}}<!--"


def check_hostile(browser: Chromium, folder: Path):
    """Raise AssertionError unless hostile text stays text: as a name, a prompt, a token."""
    content = small_model({})
    content["tokenizer"] = {"kind": "char", "chars": "".join(sorted(set(HOSTILE)))}
    content["vocab_size"] = len(content["tokenizer"]["chars"])
    model = GPT(Config(**SMALL), content["vocab_size"])
    content |= {"model": dict(model.state_dict()), "config": content["config"] | {"dataset": HOSTILE}}
    path = folder / "hostile.html"
    path.write_text(build_page(content, "hostile.pt", 8), encoding="utf-8")
    browser.open(path)
    browser.wait_until(READY)
    write_text(browser, HOSTILE, 50)
    assert text_of(browser).startswith(HOSTILE)
    for place in ("document.title", "document.getElementById('name').textContent"):
        assert browser.evaluate(place) == HOSTILE
    assert browser.evaluate("document.images.length === 0 && typeof hacked === 'undefined'")
    write_text(browser, "\u72d0", 5)
    assert "\u72d0" in browser.evaluate("document.getElementById('status').textContent"), "names unknown characters"
    print("hostile    a name, a prompt and tokens full of HTML stay text", flush=True)


def take_pictures(browser: Chromium, path: Path, options: Options):
    folder = Path(options.pictures)
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in PICTURES.items():
        browser.open(path, **settings)
        browser.wait_until(READY)
        write_text(browser, options.prompt, 300)
        browser.picture(folder / f"{name}.png")
        browser.evaluate("select(40)")
        browser.picture(folder / f"{name}-token.png")
        browser.picture(folder / f"{name}-whole.png", whole=True)
    print(f"pictures   {folder}/")


def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    if len(parsed.words) != (0 if options.switches else 1):
        raise UserError("name one checkpoint: python bench/page.py out/fables/ckpt.pt; or --switches")
    with Chromium() as browser, tempfile.TemporaryDirectory() as folder:
        print(f"browser    {browser.call('Browser.getVersion')['product']}")
        compare_logits(browser)
        if options.switches:
            return
        source = parsed.words[0]
        content = read_checkpoint(source)
        path = Path(folder, "page.html")
        path.write_text(build_page(content, source, 8), encoding="utf-8")
        print(f"page       {size(path.stat().st_size)}")
        report_page(browser, path, options)
        check_use(browser, path, options.prompt)
        check_hostile(browser, Path(folder))
        if options.pictures:
            take_pictures(browser, path, options)
    report_loss(content, source)


if __name__ == "__main__":
    run(main)
