"""Generation speed of ours, nanoGPT's and transformers', with the same weights, in one run.

    python bench/generate.py --nanogpt=../nanoGPT          # a checkout of github.com/karpathy/nanoGPT
    python bench/generate.py --only=small,batch --runs=5
    python bench/generate.py --device=cuda --dtype=bfloat16 --compile=True --only=gpt2,xl

Each figure is the median of the runs, after one that warms up; the ways take turns, so that a busy
moment of the machine meets all of them. The bound, measured in turn as well, is what reading the
weights once a token from memory allows; those that fit into the processor's cache may exceed it.
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from common import read_choices, read_options

from inkling import cpu
from inkling.cli import PositiveInt, UserError, run
from inkling.device import compile_step, compiler_missing, synchronize
from sample import Options as SampleOptions
from sample import Picker
from train import GPT, Config

GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "norm_gain": True,
    "norm_eps": 1e-5,
    "embed_norm": False,
    "mlp": "gelu_tanh",
    "bias": True,
    "tie_weights": True,
    "qk_norm": False,
    "logit_cap": 0.0,
    "shortcuts": False,
    "ngrams": 0,
    "init": "gpt2",
    "block_size": 1024,
}
SETTINGS = {
    "toy": GPT2 | {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 128},
    "small": GPT2 | {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "recipe": {},
    "gpt2": GPT2 | {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "xl": GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
VOCAB_SIZES = {"toy": 65, "small": 65, "recipe": 65, "gpt2": 50257, "xl": 50257}
BOUND = "reading the weights once a token"


@dataclass
class Options:
    # -- what to measure
    only: str = "small,recipe,gpt2,batch,prompt"  # of these, xl and toy; separated by commas
    runs: PositiveInt = 3               # runs of each way; the median counts
    nanogpt: str = ""                   # folder of a nanoGPT checkout; empty: without it
    transformers: bool = True           # measure transformers' generate too
    # -- machine
    device: str = "cpu"                 # cpu | cuda
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights
    compile: bool = True                # measure our compiled step too

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


# -- ours ----------------------------------------------------------------------------------------

def build_model(size: str, options: Options) -> GPT:
    """A model with random weights, as train.py's `load` returns one."""
    torch.manual_seed(0)
    model = GPT(Config(**SETTINGS[size]), VOCAB_SIZES[size]).eval().to(options.device, options.torch_dtype)
    if options.device == "cpu":
        cpu.accelerate(model)
    return model


def make_picker(model: GPT, prompt) -> Picker:
    seeds = list(range(len(prompt)))
    return Picker(SampleOptions(), prompt.tolist(), seeds, model.vocab_size, prompt.device)


def our_rate(model: GPT, prompt, count: int, step=None) -> float:
    """Tokens a second of `count` new tokens for each row of prompt (B, T)."""
    pick = make_picker(model, prompt)
    began = time.perf_counter()
    for ids in model.generate(prompt, count, pick, step):
        ids.tolist()                                # as streaming does
    return len(prompt) * count / (time.perf_counter() - began)


@torch.no_grad()
def uncached_rate(model: GPT, prompt, count: int) -> float:
    """The same without a cache, as nanoGPT does: the whole window again for every token."""
    pick = make_picker(model, prompt)
    began = time.perf_counter()
    for _ in range(count):
        logits, _ = model(prompt[:, -model.cfg.block_size:])
        prompt = torch.cat((prompt, pick(logits[:, -1])[:, None]), dim=1)
    return len(prompt) * count / (time.perf_counter() - began)


# -- the peers -----------------------------------------------------------------------------------

def peer_weights(model: GPT) -> dict:
    """Our weights under the names that nanoGPT and transformers share, matrices as nn.Linear has
    them."""
    weights = {
        "transformer.wte.weight": model.wte.weight,
        "transformer.wpe.weight": model.wpe.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "transformer.ln_f.bias": model.norm.bias,
        "lm_head.weight": model.wte.weight,
    }
    for number, block in enumerate(model.blocks):
        modules = {
            "ln_1": block.norm1,
            "ln_2": block.norm2,
            "attn.c_proj": block.attn.out,
            "mlp.c_fc": block.mlp.up,
            "mlp.c_proj": block.mlp.down,
        }
        for part in ("weight", "bias"):
            for name, module in modules.items():
                weights[f"transformer.h.{number}.{name}.{part}"] = getattr(module, part)
            qkv = [getattr(linear, part) for linear in (block.attn.q, block.attn.k, block.attn.v)]
            weights[f"transformer.h.{number}.attn.c_attn.{part}"] = torch.cat(qkv)
    return {name: tensor.detach() for name, tensor in weights.items()}


def nanogpt_model(folder: str, model: GPT):
    if not Path(folder, "model.py").is_file():
        raise UserError(f"--nanogpt={folder}: no model.py there; git clone https://github.com/karpathy/nanoGPT and "
                        "name it")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import model as nanogpt

    cfg = model.cfg
    config = nanogpt.GPTConfig(block_size=cfg.block_size, vocab_size=model.vocab_size, n_layer=cfg.n_layer,
                               n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=0.0, bias=True)
    peer = nanogpt.GPT(config)
    missing, unexpected = peer.load_state_dict(peer_weights(model), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("attn.bias") for name in missing), missing
    return peer.eval()


def transformers_model(model: GPT):
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = model.cfg
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=cfg.block_size,
        n_embd=cfg.n_embd,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    ))
    weights = peer_weights(model)
    for name, tensor in weights.items():
        if ".h." in name and tensor.dim() == 2:     # its Conv1D holds the transposed matrix
            weights[name] = tensor.mT
    peer.load_state_dict(weights)
    return peer.eval()


def peer_rate(generate, prompt, count: int) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        ids = generate(prompt)
    synchronize(str(prompt.device))
    assert ids.size(1) == prompt.size(1) + count
    return len(prompt) * count / (time.perf_counter() - began)


# -- the bound -----------------------------------------------------------------------------------

def bandwidth(device: str) -> float:
    """Bytes a second of reading memory: the best of three sums over 1 GiB."""
    x = torch.ones(2**28, device=device)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        x.sum().item()
        best = max(best, 4 * len(x) / (time.perf_counter() - began))
    return best


def bytes_per_token(model: GPT) -> int:
    """The bytes of the weights that a token reads: all but embeddings, of which it reads a row."""
    numbers = sum(p.numel() for p in model.parameters())
    embeddings = [model.ngrams, model.wpe]
    if not model.cfg.tie_weights:                   # a tied head is read whole
        embeddings.append(model.wte)
    for embedding in embeddings:
        if embedding is not None:
            numbers -= embedding.weight.numel()
    return numbers * model.wte.weight.itemsize


# -- works ---------------------------------------------------------------------------------------

@dataclass
class Ways:
    """Ways to generate the same text: functions that return tokens a second."""

    ways: dict = field(default_factory=dict)        # {name: function}
    warm_ups: list = field(default_factory=list)    # called once before the runs

    def add(self, name: str, way, warm_up=None):
        self.ways[name] = way
        if warm_up:
            self.warm_ups.append(warm_up)

    @torch.no_grad()
    def median_rates(self, runs: int) -> dict:
        """{name: median tokens a second}; the ways take turns."""
        for warm_up in self.warm_ups:
            warm_up()
        rates = {name: [] for name in self.ways}
        for _ in range(runs):
            for name, way in self.ways.items():
                rates[name].append(way())
        return {name: median(values) for name, values in rates.items()}


def make_prompt(model: GPT, rows: int, length: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (rows, length), generator=generator).to(model.wte.weight.device)


def add_compiled(ways: Ways, title: str, model: GPT, prompt, count: int, options: Options):
    """Our compiled step and, on a CPU, the same with weights in bfloat16. The size of the cache is
    compiled in, and follows from the count, so that a whole run warms up."""
    step = compile_step(model.next_logits, options.device)
    began = time.perf_counter()
    our_rate(model, prompt, count, step)
    print(f"\n({title}: compiling and the first run took {time.perf_counter() - began:.0f} s)")
    ways.add("ours, compiled", lambda: our_rate(model, prompt, count, step))
    if options.device == "cpu" and options.dtype == "float32":
        half = copy.deepcopy(model).bfloat16()
        half_step = compile_step(half.next_logits, options.device)
        our_rate(half, prompt, count, half_step)
        ways.add("ours, compiled, bfloat16", lambda: our_rate(half, prompt, count, half_step))


def add_peers(ways: Ways, model: GPT, prompt, count: int, options: Options):
    if options.nanogpt:
        nanogpt = nanogpt_model(options.nanogpt, model).to(options.device, options.torch_dtype)
        ways.add(
            "nanoGPT",
            lambda: peer_rate(lambda ids: nanogpt.generate(ids, count, 0.8, 200), prompt, count),
            warm_up=lambda: nanogpt.generate(prompt, 8),
        )
    if options.transformers:
        peer = transformers_model(model).to(options.device, options.torch_dtype)
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 200, "use_cache": True,
                    "attention_mask": torch.ones_like(prompt)}
        exactly = {"max_new_tokens": count, "min_new_tokens": count}
        ways.add(
            "transformers",
            lambda: peer_rate(lambda ids: peer.generate(ids, **exactly, **settings), prompt, count),
            warm_up=lambda: peer.generate(prompt, max_new_tokens=8, **settings),
        )


def measure(title: str, model: GPT, count: int, options: Options, rows: int = 1, peers: bool = False,
            compiled: bool = True, uncached: int = 0) -> float:
    """Print a table of ways to generate `count` tokens; returns our uncompiled rate. peers: with
    the peers' ways. uncached: the number of tokens to generate without a cache, too; 0: none."""
    prompt = make_prompt(model, rows, 1)
    ways = Ways()
    ways.add(
        "ours",
        lambda: our_rate(model, prompt, count),
        warm_up=lambda: our_rate(model, prompt, 8),
    )
    if compiled and options.compile and not compiler_missing(options.device):
        add_compiled(ways, title, model, prompt, count, options)
    if peers:
        add_peers(ways, model, prompt, count, options)
    if uncached:
        ways.add("ours, without a cache", lambda: uncached_rate(model, prompt, uncached))
    size = bytes_per_token(model)
    ways.add(BOUND, lambda: bandwidth(options.device) / size)
    rates = ways.median_rates(options.runs)
    print_table(f"{title}: {size / 1e6:.1f} MB of weights, memory read at {rates[BOUND] * size / 1e9:.1f} GB/s",
                rates, rows)
    return rates["ours"]


def print_table(title: str, rates: dict, rows: int):
    fastest = max((name for name in rates if name.startswith("ours")), key=rates.get)
    print(f"\n{title}\n\n| | tokens/s | of its bound | {fastest} is |\n|---|---|---|---|")
    for name, rate in rates.items():
        bound = rates[BOUND]
        if "bfloat16" in name:                      # its weights have half the size
            bound *= 2
        share = f"{100 * rate / bound:.0f}%" if rows == 1 else "-"
        print(f"| {name} | {rate:,.0f} | {share} | {rates[fastest] / rate:.2f}x |", flush=True)


def measure_toy(options: Options):
    measure("A toy, 16 new tokens, batch 1", build_model("toy", options), 16, options, peers=True, uncached=16)


def measure_small(options: Options):
    model = build_model("small", options)
    measure("GPT-2 of 10.65M, block 1024, 900 new tokens, batch 1", model, 900, options, peers=True)


def measure_recipe(options: Options):
    model = build_model("recipe", options)
    measure("The model of config/shakespeare_char.py, 1,000 new tokens", model, 1000, options, uncached=300)


def measure_gpt2(options: Options):
    measure("GPT-2 of 124M, 256 new tokens, batch 1", build_model("gpt2", options), 256, options, peers=True)


def measure_xl(options: Options):
    measure("GPT-2 XL of 1.56B, 256 new tokens, batch 1", build_model("xl", options), 256, options)


def measure_batch(options: Options):
    """Tokens a second of 1 text and of 16 at once."""
    for title, size, count in (("GPT-2 of 10.65M", "small", 200), ("GPT-2 of 124M", "gpt2", 50)):
        model = build_model(size, options)
        rates = {}
        for rows in (1, 16):
            rates[rows] = measure(f"{title}, {count} new tokens, batch {rows}", model, count, options, rows,
                                  compiled=False)
        print(f"\n{title}: batch 16 makes {rates[16] / rates[1]:.1f} times the tokens a second of batch 1")


def measure_prompt(options: Options):
    """The time to the first token after a short and a long prompt."""
    model = build_model("small", options)
    seconds = {}
    for length in (1, 512):
        prompt = make_prompt(model, 1, length)
        seconds[length] = 1 / our_rate(model, prompt, 1)
    print(f"\nGPT-2 of 10.65M: the first token after a prompt of 512 takes {1000 * seconds[512]:.0f} ms, after one "
          f"of 1 {1000 * seconds[1]:.1f} ms: {seconds[512] / seconds[1]:.0f} times as long for 512 times the tokens")


WORKS = {
    "toy": measure_toy,
    "small": measure_small,
    "recipe": measure_recipe,
    "gpt2": measure_gpt2,
    "batch": measure_batch,
    "prompt": measure_prompt,
    "xl": measure_xl,
}


def main(argv: list) -> int:
    options = read_options(Options, argv, __doc__)
    works = read_choices("only", options.only, WORKS)
    machine = f"{torch.get_num_threads()} threads"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {options.device}, {machine}, {options.dtype}")
    for work in works:
        WORKS[work](options)
    return 0


if __name__ == "__main__":
    run(main)
