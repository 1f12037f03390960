"""Generation speed, side by side in one run and with the same weights: ours, nanoGPT's and transformers' generate.

    python bench/generate.py --nanogpt=../nanoGPT          # a checkout of github.com/karpathy/nanoGPT
    python bench/generate.py --only=small,batch --runs=5
    python bench/generate.py --device=cuda --dtype=bfloat16 --compile=True --only=gpt2,xl

Each figure is the median of the runs, after one that warms up; the ways take turns, so that a busy moment of the
machine meets all of them. The bound, measured in turn as well, is what reading the weights once a token from memory
allows; those that fit into the processor's cache may exceed it.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inkling import device as device_module
from inkling.cli import fail, parse, run
from sample import Options as Sampling
from sample import Picker
from train import GPT, Config

GPT2 = dict(positions="learned", norm="layernorm", norm_gain=True, norm_eps=1e-5, embed_norm=False, mlp="gelu_tanh",
            bias=True, tie_weights=True, qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0, init="gpt2",
            block_size=1024)
SIZES = {"small": dict(n_layer=6, n_head=6, n_embd=384), "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
         "xl": dict(n_layer=48, n_head=25, n_embd=1600)}


@dataclass
class Options:
    # -- what to measure
    only: str = "small,recipe,gpt2,batch,prompt"  # of small, recipe, gpt2, batch, prompt, xl; separated by commas
    runs: int = 3                       # runs of each way; the median counts
    nanogpt: str = ""                   # folder of a nanoGPT checkout; empty: without it
    transformers: bool = True           # measure transformers' generate too
    # -- machine
    device: str = "cpu"                 # cpu | cuda
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights
    compile: bool = True                # measure our compiled step too


def bandwidth(device: str) -> float:
    """Bytes a second of reading memory: the best of three sums over 1 GiB."""
    x, best = torch.ones(2**28, device=device), 0.0
    for _ in range(3):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, 4 * len(x) / (time.perf_counter() - start))
    return best


def ours(model: GPT, prompt, count: int, step=None):
    """Tokens a second of `count` new tokens for each row of prompt (B, T)."""
    pick = Picker(Sampling(), prompt.tolist(), list(range(len(prompt))), model.vocab_size, prompt.device)
    start = time.perf_counter()
    for token in model.generate(prompt, count, pick, step):
        token.tolist()                              # as streaming does
    return len(prompt) * count / (time.perf_counter() - start)


@torch.no_grad()
def uncached(model: GPT, prompt, count: int):
    """The same without a cache, as nanoGPT does: the whole window again for every token."""
    pick = Picker(Sampling(), prompt.tolist(), list(range(len(prompt))), model.vocab_size, prompt.device)
    start = time.perf_counter()
    for _ in range(count):
        logits = model.logits(model.trunk(prompt[:, -model.cfg.block_size:])[:, -1])
        prompt = torch.cat((prompt, pick(logits)[:, None]), 1)
    return count / (time.perf_counter() - start)


def peer_weights(model: GPT) -> dict:
    """Our weights under the names that nanoGPT and transformers share, matrices as nn.Linear has them."""
    found = {"transformer.wte.weight": model.wte.weight, "transformer.wpe.weight": model.wpe.weight,
             "transformer.ln_f.weight": model.norm.weight, "transformer.ln_f.bias": model.norm.bias,
             "lm_head.weight": model.wte.weight}
    for number, block in enumerate(model.blocks):
        for name, module in (("ln_1", block.norm1), ("ln_2", block.norm2), ("attn.c_proj", block.attn.out),
                             ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.down)):
            for part in ("weight", "bias"):
                found[f"transformer.h.{number}.{name}.{part}"] = getattr(module, part)
        for part in ("weight", "bias"):
            three = [getattr(linear, part) for linear in (block.attn.q, block.attn.k, block.attn.v)]
            found[f"transformer.h.{number}.attn.c_attn.{part}"] = torch.cat(three)
    return {name: tensor.detach() for name, tensor in found.items()}


def nanogpt_model(folder: str, model: GPT):
    if not (Path(folder) / "model.py").is_file():
        fail(f"--nanogpt={folder}: no model.py there; git clone https://github.com/karpathy/nanoGPT and name it")
    sys.path.insert(0, folder)
    import model as nanogpt

    cfg = model.cfg
    peer = nanogpt.GPT(nanogpt.GPTConfig(block_size=cfg.block_size, vocab_size=model.vocab_size, n_layer=cfg.n_layer,
                                         n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=0.0, bias=True))
    missing, unexpected = peer.load_state_dict(peer_weights(model), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("attn.bias") for name in missing), missing
    return peer.eval()


def transformers_model(model: GPT):
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = model.cfg
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=model.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
                                      n_layer=cfg.n_layer, n_head=cfg.n_head, bos_token_id=None, eos_token_id=None,
                                      pad_token_id=0))
    turned = {name: tensor.mT if tensor.dim() == 2 and ".h." in name else tensor
              for name, tensor in peer_weights(model).items()}
    peer.load_state_dict(turned)
    return peer.eval()


def timed(generate, prompt, count: int) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        out = generate(prompt)
    device_module.synchronize(str(prompt.device))
    assert out.size(1) == prompt.size(1) + count
    return len(prompt) * count / (time.perf_counter() - start)


def turns(ways: dict, runs: int, warm: dict) -> dict:
    """{way: median tokens a second}; each way runs in turn. warm: {way: a short first run}."""
    for way in warm.values():
        way()
    rates = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            rates[name].append(way())
    return {name: statistics.median(values) for name, values in rates.items()}


BOUND = "reading the weights once a token"


def table(title: str, rates: dict, rows: int):
    best = max((rate, name) for name, rate in rates.items() if name.startswith("ours"))[1]
    print(f"\n{title}\n\n| | tokens/s | of its bound | {best} is |\n|---|---|---|---|")
    for name, rate in rates.items():
        bound = rates[BOUND] * (2 if "bfloat16" in name else 1)     # whose weights have half the size
        share = f"{100 * rate / bound:.0f}%" if rows == 1 else "-"
        print(f"| {name} | {rate:,.0f} | {share} | {rates[best] / rate:.2f}x |", flush=True)


def main(argv: list) -> int:
    options = Options(**parse(Options, argv, __doc__).values)
    device, kind = options.device, getattr(torch, options.dtype)
    only = set(options.only.split(","))
    if unknown := only - {"small", "recipe", "gpt2", "batch", "prompt", "xl"}:
        fail(f"only={options.only}: there is no {', '.join(sorted(unknown))}")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {name}, {options.dtype}")

    def build(vocab_size: int, **settings) -> GPT:
        torch.manual_seed(0)
        return GPT(Config(**settings), vocab_size).eval().to(device, kind)

    def measure(title, model, count, rows=1, length=1, peers=False, compiled=options.compile, more=None):
        """A table of our ways and the peers' on a model of the same weights."""
        prompt = torch.randint(model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
        ways, warm = {"ours": lambda: ours(model, prompt, count)}, {"ours": lambda: ours(model, prompt, 8)}
        if compiled and not device_module.compiler_missing(device):
            step = device_module.compile_step(model.next_logits, device)
            start = time.perf_counter()
            ours(model, prompt, count, step)        # the size of the cache, which is compiled in, follows from count
            print(f"\n({title}: compiling and the first run took {time.perf_counter() - start:.0f} s)")
            ways["ours, compiled"] = lambda: ours(model, prompt, count, step)
            if device == "cpu" and kind == torch.float32:
                half = copy.deepcopy(model).bfloat16()
                half_step = device_module.compile_step(half.next_logits, device)
                ours(half, prompt, count, half_step)
                ways["ours, compiled, bfloat16"] = lambda: ours(half, prompt, count, half_step)
        if peers and options.nanogpt:
            nano = nanogpt_model(options.nanogpt, model).to(device, kind)
            ways["nanoGPT"] = lambda: timed(lambda p: nano.generate(p, count, 0.8, 200), prompt, count)
            warm["nanoGPT"] = lambda: nano.generate(prompt, 8)
        if peers and options.transformers:
            hf = transformers_model(model).to(device, kind)
            settings = dict(do_sample=True, temperature=0.8, top_k=200, use_cache=True, attention_mask=prompt * 0 + 1)
            ways["transformers"] = lambda: timed(
                lambda p: hf.generate(p, max_new_tokens=count, min_new_tokens=count, **settings), prompt, count)
            warm["transformers"] = lambda: hf.generate(prompt, max_new_tokens=8, **settings)
        if more:
            ways |= more(model, prompt)
        # The embedding's rows are looked up, one a token; a tied head is read whole.
        looked_up = [model.wte if not model.cfg.tie_weights else None, model.ngrams]
        size = sum(p.numel() for p in model.parameters()) - sum(z.weight.numel() for z in looked_up if z is not None)
        size -= model.wpe.weight.numel() if model.wpe is not None else 0
        size *= kind.itemsize
        ways[BOUND] = lambda: bandwidth(device) / size
        with torch.no_grad():
            rates = turns(ways, options.runs, warm)
        table(f"{title}: {size / 1e6:.1f} MB of weights, memory read at {rates[BOUND] * size / 1e9:.1f} GB/s",
              rates, rows)
        return rates["ours"]

    small = build(65, **GPT2 | SIZES["small"])
    if "small" in only:
        measure("GPT-2 of 10.65M, block 1024, 900 new tokens, batch 1", small, 900, peers=True)
    if "recipe" in only:
        measure("The model of config/shakespeare_char.py, 1,000 new tokens", build(65), 1000,
                more=lambda model, prompt: {"ours, without a cache": lambda: uncached(model, prompt, 300)})
    if "gpt2" in only:
        measure("GPT-2 of 124M, 256 new tokens, batch 1", build(50257, **GPT2 | SIZES["gpt2"]), 256, peers=True)
    if "batch" in only:
        for title, model, count in (("GPT-2 of 10.65M", small, 200),
                                    ("GPT-2 of 124M", build(50257, **GPT2 | SIZES["gpt2"]), 50)):
            one, many = (measure(f"{title}, {count} new tokens, batch {rows}", model, count, rows, compiled=False)
                         for rows in (1, 16))
            print(f"\n{title}: batch 16 makes {many / one:.1f} times the tokens a second of batch 1")
    if "prompt" in only:
        times = {}
        for length in (1, 512):
            prompt, start = torch.zeros(1, length, dtype=torch.int64, device=device), time.perf_counter()
            ours(small, prompt, 1)
            times[length] = time.perf_counter() - start
        print(f"\nGPT-2 of 10.65M: the first token after a prompt of 512 takes {1000 * times[512]:.0f} ms, after one "
              f"of 1 {1000 * times[1]:.1f} ms: {times[512] / times[1]:.0f} times as long for 512 times the tokens")
    if "xl" in only:
        measure("GPT-2 XL of 1.56B, 256 new tokens, batch 1", build(50257, **GPT2 | SIZES["xl"]), 256)
    return 0


if __name__ == "__main__":
    run(main)
