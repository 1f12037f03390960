"""Inkling: train a GPT from raw text. The whole model and the whole loop, in one file, from top to bottom.

    python train.py                                         # the embedded text
    python train.py config/shakespeare_char.py              # a config file
    python train.py config/shakespeare_char.py --n_layer=8  # later ones win
    python train.py config/shakespeare_char.py --init_from=resume   # go on
    torchrun --standalone --nproc_per_node=4 train.py       # four processes

What remains in out/NAME: ckpt.pt, the weights with the best validation loss, for sample.py; last.pt, all that
is needed to go on; log.csv and loss.png. Ctrl-C finishes the step, saves last.pt and leaves.
Exit codes: 0 done, 2 wrong input, 3 a loss that is not finite, 4 the last save failed, 130 and 143 stopped.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from inkling.checkpoint import (
    OPEN,
    build_model,
    claim_folder,
    file_stamp,
    load_checkpoint,
    restore_optimizers,
    save_checkpoint,
)
from inkling.cli import UserError, from_dict, merge, parse, run
from inkling.cpu import Linear, attention, dropout
from inkling.dataset import check_ids, open_data, random_order, windows_at_once
from inkling.device import autocast, choose_device, choose_dtype, compare_with_cpu, compile_model, compile_pays
from inkling.distributed import Ranks
from inkling.report import Report
from inkling.stopping import Deadline, Guard, Stop, explain_failures
from inkling.tokenizer import Tokenizer, prompt_ids, stored_tokenizer
from prepare import ensure_set

# -----------------------------------------------------------------------------------------------------------
# Settings. `python train.py --help` prints these lines; config files and --key=value flags set them.


@dataclass
class Config:
    # -- the run
    dataset: str = "fables"             # folder under data/; prepare.py writes it, a named set on first use
    data_dir: str = ""                  # folder that holds the data sets; empty: data/ beside this file
    out_dir: str = ""                   # folder of the run; empty: out/<config file's name>, or out/<dataset>
    init_from: str = "scratch"          # scratch | resume | auto: either | PATH.pt | gpt2[-medium|-large|-xl]
    seed: int = 1337                    # of the initial weights, the batches and dropout
    max_iters: int = 150                # optimizer steps
    max_epochs: float = 0.0             # passes over the training tokens; above 0 it sets max_iters
    max_minutes: float = 0.0            # stop after so many on the clock; a new run's max_iters fit them
    dry_run: bool = False               # say what the run would take, from three real steps; write nothing
    # -- evaluation and reports
    eval_interval: int = 25             # steps between evaluations; one comes before the first step
    eval_iters: int = 0                 # N: N batches of 16 windows spread evenly; 0: all of the val split
    eval_only: bool = False             # evaluate once, write nothing, leave
    log_interval: int = 10              # steps between lines of progress
    patience: int = 0                   # stop after so many evaluations without a better val loss; 0: never
    save_interval: int = 0              # steps between saves of last.pt; 0: at every evaluation
    keep: int = 0                       # keep the last.pt of the latest N evaluations as last-STEP.pt
    always_save_checkpoint: bool = False  # write ckpt.pt at every evaluation, not only at the best so far
    sample_interval: int = 0            # steps between samples of text; 0: at every evaluation
    sample_tokens: int = 150            # length of these samples; 0: none
    sample_start: str = ""              # their prompt; empty: the start of a text
    sample_temperature: float = 0.8     # randomness of these samples; 0: greedy
    tensorboard: bool = False           # write TensorBoard files to out_dir as well
    wandb_log: bool = False             # log to Weights & Biases as well
    wandb_project: str = "inkling"      # its project
    wandb_run_name: str = ""            # its run; empty: the name of out_dir
    # -- batches
    batch_size: int = 24                # sequences per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step, shared by all processes
    block_size: int = 256               # tokens of context
    sampling: Literal["epoch", "fixed", "random"] = "epoch"  # windows: each once an epoch, at other places in
                                        # every epoch or at the same ones, or random ones
    # -- model
    n_layer: int = 3                    # blocks
    n_head: int = 2                     # attention heads (queries)
    n_kv_head: int = 0                  # heads of keys and values, shared by groups of queries; 0: n_head
    n_embd: int = 192                   # width: numbers per token
    ffn_dim: int = 0                    # width inside the MLP; 0: 4 n_embd (swiglu: 8/3, rounded up to 128)
    dropout: float = 0.0                # share dropped of the embedding and of what each half-block adds
    attn_dropout: bool = False          # drop as large a share of the attention weights, too
    positions: Literal["rope", "learned"] = "rope"  # rotary (arXiv 2104.09864) or vectors
    rope_theta: float = 1024.0          # base of the rotary wavelengths
    rope_fraction: float = 0.5          # share of each head's dimensions that is rotated
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before each half-block and at the end
    norm_gain: bool = False             # the norms have a learned gain
    norm_eps: float = 1e-6              # the norms' epsilon
    embed_norm: bool = True             # a norm after the embedding
    mlp: Literal["relu2", "relu", "gelu", "gelu_tanh", "swiglu"] = "relu2"  # relu2: squared, arXiv 2109.08668
    bias: bool = False                  # biases in linear layers, and in layernorms with a gain
    qkv_bias: Literal["auto", True, False] = "auto"  # biases of queries, keys and values; auto: as bias
    head_bias: bool = False             # bias of the output layer
    tie_weights: bool = False           # the output layer is the embedding
    qk_norm: bool = True                # RMS-norm of queries and keys (arXiv 2302.05442)
    logit_cap: float = 15.0             # bound on the logits: cap z / sqrt(z^2 + cap^2); 0: none
    shortcuts: bool = True              # learned mixing of the embedding into each block, and of the first
                                        # block's values into later ones (value residual, arXiv 2410.17897)
    ngrams: int = 5                     # N: runs of 2 to N tokens add vectors to the embedding; 0: none
    ngram_rows: int = 65536             # rows of the table of these vectors, which runs of tokens share
    pad_vocab_to: int = 1               # the embedding's rows are a multiple of this; 64 is faster on a GPU
    init: Literal["zero", "gpt2", "torch", "kaiming"] = "zero"  # initial weights; zero: outputs start at 0
    # -- optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the blocks' matrices, with AdamW for all else
    learning_rate: float = 0.02         # of the blocks' matrices under muon, of everything under adamw
    embed_lr: float = 0.1               # AdamW's for the embeddings, under muon
    ngram_decay: float = 2.0            # of n-gram vectors, under muon, times their rate; small texts: more
    head_lr: float = 0.008              # AdamW's for the output layer, under muon
    scalar_lr: float = 0.02             # AdamW's for gains, biases and mixing weights, under muon
    weight_decay: float = 0.4           # times the rate; of the blocks' matrices (muon) or of all (adamw)
    cautious: bool = True               # muon decays only where decay and update agree (arXiv 2411.16085)
    decay_all: bool = False             # weight decay on every parameter
    momentum: float = 0.95              # muon's; reached from 0.85 in 100 steps
    beta1: float = 0.8                  # AdamW's averaging of gradients, share kept per step
    beta2: float = 0.95                 # the same for their squares
    adam_eps: float = 1e-10             # AdamW's epsilon
    grad_clip: float = 0.0              # bound on the norm of the gradient; 0: none
    # -- learning rate over time, one factor for every rate above
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear: flat, then down
    decay_lr: bool = True               # False: the full rate at every step
    warmup_iters: int = 0               # steps of linear warm-up
    lr_decay_iters: int = 0             # step at which min_lr is reached; 0: max_iters
    cooldown: float = 0.8               # share of lr_decay_iters over which `linear` comes down
    min_lr: float = 0.0                 # learning_rate at the end
    # -- machine
    device: str = "auto"                # cpu | cuda | cuda:N | mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the faster, measured
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: when it pays within the run
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on GPUs
    shard: bool = False                 # each of several processes holds its share of weights and optimizer
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory

    def problems(self) -> list:
        """Every broken rule, with its values, so that all can be mended at once."""
        counts = "eval_interval log_interval batch_size gradient_accumulation_steps block_size n_layer n_head"
        above_0 = [*counts.split(), "n_embd", "rope_theta", "ngram_rows", "pad_vocab_to"]
        limits = dict.fromkeys(above_0, (1, 2**31)) | dict(ngrams=(0, 16))
        limits |= dict.fromkeys(("momentum", "beta1", "beta2"), (0, 0.99999)) | dict(block_size=(1, 2**20))
        limits |= dict(dropout=(0, 0.99), rope_fraction=(0, 1), cooldown=(0, 1), adam_eps=(1e-30, 1))
        limits |= dict(max_iters=(0, OPEN - (not self.max_minutes)))
        found = []
        for name, value in asdict(self).items():
            low, high = limits.get(name, (0, 2**31))
            if type(value) in (int, float) and not low <= value <= high:
                found.append(f"{name}={value} must be from {low} to {high}")
        head_dim = self.n_embd / (self.n_head or 1)
        rules = {f"n_head={self.n_head} must divide n_embd={self.n_embd}": head_dim % 1 == 0,
                 f"n_embd / n_head = {head_dim:g} must be even for rope":
                     self.positions != "rope" or head_dim % 2 != 1,
                 f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}":
                     self.n_head % (self.n_kv_head or 1) == 0,
                 "tie_weights=True needs another init than zero": not self.tie_weights or self.init != "zero",
                 "max_epochs and max_minutes both set the length: leave one out":
                     not (self.max_epochs and self.max_minutes),
                 "shard=True cuts matrices that muon needs whole: use optimizer=adamw and its learning_rate":
                     not self.shard or self.optimizer == "adamw",
                 "shard=True knows no dtype=float16: use bfloat16 or float32":
                     not self.shard or self.dtype != "float16",
                 f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}":
                     not self.decay_lr or self.min_lr <= self.learning_rate}
        return found + [rule for rule, holds in rules.items() if not holds]


# What a checkpoint's weights depend on, from n_layer to pad_vocab_to, and what a resumed run cannot change.
_ALL = list(Config.__dataclass_fields__)
MODEL_FIELDS = {"block_size", *_ALL[_ALL.index("n_layer"):_ALL.index("init")]} - {"dropout", "attn_dropout"}
FIXED_FIELDS = MODEL_FIELDS | {"dataset", "optimizer"}

# -----------------------------------------------------------------------------------------------------------
# The model. Shapes: B sequences, T tokens, C = n_embd.


def make_norm(cfg: Config):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), with or without a learned gain."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, cfg.norm_eps, elementwise_affine=cfg.norm_gain, bias=cfg.bias)
    return nn.RMSNorm(cfg.n_embd, cfg.norm_eps, elementwise_affine=cfg.norm_gain)


def rotation_table(cfg: Config):
    """cos and sin (block_size, head_dim/2) of the angles by which positions turn pairs of dimensions.
    Those past rope_fraction do not turn."""
    pairs = cfg.n_embd // cfg.n_head // 2
    turning = round(cfg.rope_fraction * pairs)
    frequency = torch.zeros(pairs)
    frequency[:turning] = cfg.rope_theta ** (-torch.arange(turning) / max(1, turning))
    angle = torch.outer(torch.arange(cfg.block_size), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn pairs (i, i + head_dim/2) of x (B, T, heads, head_dim) by angles (T, 1, head_dim/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Cache:
    """Keys and values of the tokens so far, two tensors (B, n_kv_head, size, head_dim) a block; last, for
    n-grams, the tokens themselves, (B, 1, size, 1)."""

    def __init__(self, cfg: Config, size: int):
        self.length, self.size, self.tensors, self.at = 0, size, [None] * cfg.n_layer, slice(0)
        self.tensors += [None] * (cfg.ngrams > 1)

    def extend(self, layer: int, *new):
        """Put the keys and values (B, n_kv_head, T, head_dim) of new tokens at their places. Returns those of
        all tokens so far; of all places, if `at` is a tensor, since compiled code wants shapes that stay."""
        if self.tensors[layer] is None:
            self.tensors[layer] = [z.new_zeros(*z.shape[:2], self.size, z.size(3)) for z in new]
        for stored, z in zip(self.tensors[layer], new, strict=True):
            stored[:, :, self.at] = z
        return [stored[:, :, :getattr(self.at, "stop", None)] for stored in self.tensors[layer]]


class NGrams(nn.Embedding):
    """Vectors of the last 2, 3, ... tokens, in one table at the rows to which their hashes point: such short
    runs say much about the next token, and attention needs long to learn them. Bigrams: record 62 of
    modded-nanogpt; longer runs: arXiv 2501.16975."""

    def forward(self, ids, at, longest: int):
        """The sum (B, T, C) of the vectors for 2 to `longest` tokens up to places `at` (T,) of ids (B, S)."""
        keys = [ids[:, at].long()]
        for back in range(1, longest):
            before = (ids[:, (at - back).clamp(min=0)] + 1) * (at >= back)      # 0 before the first one
            keys.append((keys[-1] * 1_540_483_477 + before) % (2**31 - 1))      # Rabin and Karp's hash
        return super().forward(torch.stack(keys[1:], 2) % self.num_embeddings).sum(2)


class Attention(nn.Module):
    """Causal self-attention, with keys and values shared by groups of queries (arXiv 2305.13245) when
    n_kv_head < n_head."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.cfg, self.layer, self.head_dim = cfg, layer, cfg.n_embd // cfg.n_head
        self.n_kv_head = cfg.n_kv_head or cfg.n_head
        bias = cfg.bias if cfg.qkv_bias == "auto" else cfg.qkv_bias
        self.q = Linear(cfg.n_embd, cfg.n_head * self.head_dim, bias=bias)
        self.k = Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.v = Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.out = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if cfg.shortcuts and layer else None

    def forward(self, x, rotation, v_first, cache, mask):
        """x (B, T, C), normed, and the first block's values; returns the output and this block's values."""
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.value_mix is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * v + mix[1] * v_first
        if self.cfg.qk_norm:
            q, k = (F.rms_norm(z, (self.head_dim,), eps=self.cfg.norm_eps) for z in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)         # (B, n_kv_head, T, head_dim)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        p = self.cfg.dropout if self.cfg.attn_dropout and self.training else 0.0
        y = attention(q.transpose(1, 2), keys, values, mask, mask is None and T > 1, p)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), v      # from (B, n_head, T, head_dim)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between, or the three of SwiGLU (arXiv 2002.05202)."""

    activations = {"relu2": lambda x: F.relu(x).square(), "relu": F.relu, "gelu": F.gelu, "swiglu": F.silu,
                   "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}

    def __init__(self, cfg: Config):
        super().__init__()
        gated = cfg.mlp == "swiglu"
        width = cfg.ffn_dim or (128 * math.ceil(8 * cfg.n_embd / 3 / 128) if gated else 4 * cfg.n_embd)
        self.activation = self.activations[cfg.mlp]
        self.up = Linear(cfg.n_embd, width, bias=cfg.bias)
        self.gate = Linear(cfg.n_embd, width, bias=cfg.bias) if gated else None
        self.down = Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then an MLP; each reads the stream x through a norm and adds to it, as in GPT-2."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.dropout = cfg.dropout
        self.norm1, self.attn = make_norm(cfg), Attention(cfg, layer)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)
        self.embed_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if cfg.shortcuts else None

    def forward(self, x, x_first, rotation, v_first, cache, mask):
        p = self.dropout if self.training else 0.0
        if self.embed_mix is not None:
            mix = self.embed_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x_first
        y, v = self.attn(self.norm1(x), rotation, v_first, cache, mask)
        x = x + dropout(y, p)
        return x + dropout(self.mlp(self.norm2(x)), p), v


class GPT(nn.Module):
    """A decoder-only transformer. The switches span GPT-2 (OpenAI, 2019), Llama (arXiv 2302.13971) and the
    fast recipe of the modded-nanogpt speedruns (github.com/KellerJordan/modded-nanogpt)."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        rows = cfg.pad_vocab_to * math.ceil(vocab_size / cfg.pad_vocab_to)
        self.wte = nn.Embedding(rows, cfg.n_embd)
        self.ngrams = NGrams(cfg.ngram_rows, cfg.n_embd) if cfg.ngrams > 1 else None
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.positions == "learned" else None
        self.embed_norm = make_norm(cfg) if cfg.embed_norm else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = Linear(cfg.n_embd, rows, bias=cfg.head_bias)
        if cfg.tie_weights:
            self.head.weight = self.wte.weight
        cos, sin = rotation_table(cfg) if cfg.positions == "rope" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize(cfg.init)

    @torch.no_grad()
    def initialize(self, init: str):
        """gpt2: normal, std 0.02, less for the matrices that add to the stream. torch: PyTorch's defaults.
        kaiming: uniform (arXiv 1502.01852). zero: those matrices and the head at 0, the others normal.
        N-gram vectors begin at 0 in each."""
        adding = {linear for block in self.blocks for linear in (block.attn.out, block.mlp.down)}
        for module in self.modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or init == "torch":
                continue
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if init == "gpt2":
                narrower = math.sqrt(2 * self.cfg.n_layer) if module in adding else 1
                nn.init.normal_(module.weight, std=0.02 / narrower)
            elif init == "kaiming":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            elif module in adding or module is self.head:
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):         # an embedding keeps PyTorch's std of 1
                nn.init.normal_(module.weight, std=math.sqrt(0.33 / module.in_features))
        if self.ngrams is not None:
            nn.init.zeros_(self.ngrams.weight)

    def trunk(self, idx, cache: Cache | None = None, at=None):
        """Token ids (B, T) to features (B, T, C). With a cache, idx holds the tokens after those in it; `at`
        (T,) gives their positions as a tensor, for a compiled step that does not know how many there are."""
        kind, T, fixed, mask = idx.device.type, idx.size(1), at is not None, None
        past = cache.length if cache and not fixed else 0
        at = at if fixed else slice(past, past + T)
        if cache:
            cache.at = at
        # Query t sees keys 0 to past + t: all when it is alone, the usual triangle when nothing is past.
        if fixed:
            mask = torch.arange(cache.size, device=at.device) <= at[:, None]        # (T, size)
        elif past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        x = self.wte(idx)
        if self.ngrams is not None:
            ids = cache.extend(-1, idx[:, None, :, None])[0][:, 0, :, 0] if cache else idx
            x = x + self.ngrams(ids, at if fixed else torch.arange(past, past + T, device=idx.device),
                                self.cfg.ngrams)
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))    # a stream in 16 bits halves the element-wise traffic
        if self.wpe is not None:
            x = x + self.wpe.weight[at].to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = dropout(x, self.cfg.dropout if self.training else 0.0)
        rotation = None
        if self.cos is not None:
            rotation = [table[at, None].to(x.dtype) for table in (self.cos, self.sin)]
        x_first, v_first = x, None
        again = self.training and self.cfg.activation_checkpointing
        for block in self.blocks:
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x, v = call(x, x_first, rotation, v_first, cache, mask)
            v_first = v if v_first is None else v_first
        if cache and not fixed:
            cache.length += T
        return self.norm(x)

    def logits(self, features):
        """Features (..., C) to float32 logits (..., vocab_size), without the rows that pad the vocabulary."""
        z, cap = self.head(features)[..., :self.vocab_size].float(), self.cfg.logit_cap
        return z * cap * torch.rsqrt(z * z + cap * cap) if cap else z

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) and, given targets (B, T), the mean cross-entropy in nats, else None."""
        logits = self.logits(self.trunk(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def next_logits(self, idx, cache: Cache, at=None):
        """Logits (B, vocab_size) of the token after idx (B, T); see trunk."""
        return self.logits(self.trunk(idx, cache, at)[:, -1])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, pick, step=None):
        """Continue the prompts idx (B, T >= 1), yielding the ids (B,) of one new position at a time.
        pick: logits (B, vocab_size) -> ids (B,). step: next_logits, compiled, for one token at a time; again
        for each size of the cache, hence few sizes. Past block_size the last half of the window is kept, and
        its keys and values are computed afresh in one pass: a cache that rolled on would hold values which
        had seen tokens that are gone."""
        size = self.cfg.block_size
        window = new = idx[:, -size:]
        cache = Cache(self.cfg, min(size, 128 * math.ceil((window.size(1) + max_new_tokens) / 128)))
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > size:
                window = new = window[:, -max(1, size // 2):]
                cache.length = 0
            if step and new.size(1) == 1 and cache.length:
                logits = step(new, cache, torch.full((1,), cache.length, device=idx.device))
                cache.length += 1
            else:
                logits = self.next_logits(new, cache)
            token = pick(logits)
            yield token
            new = token[:, None]
            window = torch.cat((window, new), dim=1)


def draw(logits, temperature: float, uniform=None):
    """Ids (B,) drawn from softmax(logits (B, vocab_size) / temperature); at 0 the likeliest.
    uniform (B,): numbers in [0, 1) to draw with: where the sums of the probabilities first exceed them."""
    if temperature < 1e-30:                             # 0, or what float32 takes for 0
        return logits.argmax(-1)
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)   # safe near temperature 0
    # In float32 the many small probabilities of a large vocabulary would be lost in their sum.
    sums = p.cumsum(-1, dtype=torch.float32 if p.device.type == "mps" else torch.float64)
    uniform = torch.rand(len(p), dtype=sums.dtype, device=p.device) if uniform is None else uniform
    return torch.searchsorted(sums, uniform.to(sums)[:, None] * sums[:, -1:], right=True)[:, 0]


# -----------------------------------------------------------------------------------------------------------
# Optimizers and schedule


def orthogonalize(m, steps: int = 5):
    """Bring the singular values of each matrix of m (n, rows, cols) near 1, to 0.65-1.2, by a quintic
    Newton-Schulz iteration in m's precision. Figures: Keller Jordan, kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.size(1) > m.size(2)
    x = m.mT if tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


def nesterov(grad, average, momentum, dtype):
    """Nesterov's momentum of the gradients (n, rows, cols); `average` is updated in place."""
    average.lerp_(grad, 1 - momentum)
    return grad.lerp(average, momentum).to(dtype)


def moved(w, update, lr, decay, cautious: bool):
    """The matrices w (n, rows, cols) after a step along `update`, with decay."""
    update = update.float() * max(1, w.size(1) / w.size(2)) ** 0.5
    return w - lr * (update + decay * (w * (update * w > 0) if cautious else w))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for the blocks' matrices (Jordan et al. 2024). Those of a shape are stacked,
    so that the iteration is a few batched products, which the processes of a run share among them (`spread`).
    A tensor `found_inf` of 1 turns a step into a no-op."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float, cautious: bool,
                 dtype: torch.dtype = torch.float32, compiled: bool = False, spread=lambda f, m: f(m)):
        shapes = {}
        for p in params:
            shapes.setdefault(tuple(p.shape), []).append(p)
        super().__init__([{"params": same} for same in shapes.values()],
                         dict(lr=lr, base_lr=lr, weight_decay=weight_decay, momentum=momentum,
                              cautious=cautious))
        self.dtype, self.found_inf, self.spread = dtype, None, spread
        self.nesterov, self.orthogonalize, self.moved = (
            torch.compile(f, dynamic=False) if compiled else f for f in (nesterov, orthogonalize, moved))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            w, grad = torch.stack(params), torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["average"] = torch.zeros_like(w)
            # Tensors, since a compiled function is compiled again for every new value of a plain number.
            momentum, lr, decay = (torch.full((), group[key], device=w.device)
                                   for key in ("momentum", "lr", "weight_decay"))
            if self.found_inf is not None:
                bad = self.found_inf > 0
                grad, lr = grad.masked_fill(bad, 0), lr.masked_fill(bad, 0)
                momentum = momentum.masked_fill(bad, 1)
            update = self.nesterov(grad, state["average"], momentum, self.dtype)
            w = self.moved(w, self.spread(self.orthogonalize, update), lr, decay, group["cautious"])
            torch._foreach_copy_(params, list(w.unbind()))


def make_optimizers(model: GPT, cfg: Config, device: str, compiled: bool, **options) -> list:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest. Every parameter is in
    one group; `base_lr` is the rate that lr_factor scales. options: of Muon."""
    muon = cfg.optimizer == "muon"
    small = [p for p in model.parameters() if p.dim() < 2]          # gains, biases, mixing weights
    if muon:
        embeddings, ngrams = ([module.weight for module in some if module is not None]
                              for some in ((model.wte, model.wpe), [model.ngrams]))
        head = [] if cfg.tie_weights else [model.head.weight]
        groups = [(embeddings, cfg.embed_lr, 0.0), (ngrams, cfg.embed_lr, cfg.ngram_decay),
                  (head, cfg.head_lr, 0.0), (small, cfg.scalar_lr, 0.0)]
    else:
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        groups = [(matrices, cfg.learning_rate, cfg.weight_decay), (small, cfg.learning_rate, 0.0)]
    groups = [dict(params=some, lr=lr, base_lr=lr, weight_decay=cfg.weight_decay if cfg.decay_all else decay)
              for some, lr, decay in groups if some]
    optimizers = [torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                    fused=torch.device(device).type in ("cpu", "cuda"))]
    if muon:
        optimizers.append(Muon([p for p in model.blocks.parameters() if p.dim() == 2], cfg.learning_rate,
                               cfg.weight_decay, cfg.momentum, cfg.cautious,
                               torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32, compiled,
                               **options))
    return optimizers


def lr_factor(step: int, cfg: Config) -> float:
    """The share of the full rates that update number `step` (from 0) uses, down to min_lr / learning_rate."""
    if not cfg.decay_lr:
        return 1.0
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    end, height = cfg.lr_decay_iters or cfg.max_iters, 1.0
    if cfg.schedule == "cosine":
        done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
        height = 0.5 + 0.5 * math.cos(math.pi * done)
    elif cfg.schedule == "linear":
        height = min(1.0, max(0.0, end - step) / max(1e-9, cfg.cooldown * end))
    least = cfg.min_lr / cfg.learning_rate if cfg.learning_rate else 0.0
    return least + (1 - least) * height


# -----------------------------------------------------------------------------------------------------------
# Batches and evaluation


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, windows: int, tokens: int):
    """The order of an epoch's windows, and the token at which the first one starts."""
    rng = np.random.default_rng([seed, 1, epoch])
    return random_order(rng, windows), int(rng.integers(tokens))


def window_starts(step: int, cfg: Config, tokens: int):
    """Where the windows of update number `step` start: batch_size * gradient_accumulation_steps places, a
    pure function of seed, step and the number of tokens. An epoch visits floor(tokens / block_size) windows
    that do not overlap, in the text taken as a circle from a place of its own (`fixed`: its beginning)."""
    count = cfg.batch_size * cfg.gradient_accumulation_steps
    if cfg.sampling == "random":
        return np.random.default_rng([cfg.seed, 0, step]).integers(0, tokens - cfg.block_size, count)
    windows, starts = tokens // cfg.block_size, []
    for number in range(step * count, (step + 1) * count):
        order, offset = permutation(cfg.seed, number // windows, windows, tokens)
        offset *= cfg.sampling == "epoch"
        starts.append((offset + order[number % windows] * cfg.block_size) % tokens)
    return np.array(starts)


def get_batch(data, starts, block_size: int, vocab_size: int, split: str, device: str):
    """Inputs and targets (len(starts), block_size): windows of the mapped ids `data`, one token apart."""
    ids = data[(starts[:, None] + np.arange(block_size + 1)) % len(data)]
    check_ids(ids, vocab_size, split)
    ids = torch.from_numpy(ids.astype(np.int64))
    if device.startswith("cuda"):
        ids = ids.pin_memory()                          # so that the copy runs while the GPU computes
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


def eval_windows(tokens: int, cfg: Config, most: int):
    """Starts of the evaluation windows: every whole one of the split, or `most` of them, evenly spaced."""
    whole = (tokens - 1) // cfg.block_size
    count = min(whole, most)
    return np.arange(count) * whole // count * cfg.block_size


@torch.no_grad()
def estimate_loss(model: GPT, data: dict, cfg: Config, ranks, device: str, stop=None) -> dict | None:
    """Mean loss in nats per token of both splits, over fixed windows that the processes share: all of val's
    and as many of train's (eval_iters=0), or 16 eval_iters of each. None if `stop` asks for an end."""
    losses, most = {}, 16 * cfg.eval_iters or (len(data["val"]) - 1) // cfg.block_size
    size = windows_at_once(cfg.block_size, model.vocab_size)
    model.eval()
    for split in ("train", "val"):
        starts = eval_windows(len(data[split]), cfg, most)
        total = torch.zeros(2)                          # sum of the windows' losses, number of windows
        for first in range(0, len(starts), size * ranks.world):
            if stop and stop.asked:
                model.train()
                return None
            some = starts[first + size * ranks.rank:][:size]
            # A process with no window left takes part all the same: it may hold a share of the weights.
            x, y = get_batch(data[split], some if len(some) else starts[:1], cfg.block_size, model.vocab_size,
                             split, device)
            with autocast(device, cfg.dtype):
                total += torch.tensor([model(x, y)[1].item(), 1.0]) * len(some)
        total = ranks.total(total.to(device))
        losses[split] = (total[0] / total[1]).item()
    model.train()
    return losses


# -----------------------------------------------------------------------------------------------------------
# The run


def restore(checkpoint: dict, source, cfg: Config | None = None) -> tuple:
    """(model, tokenizer) of a loaded checkpoint, on the CPU in float32. cfg: settings, if not its own."""
    cfg = cfg or Config(**from_dict(Config, checkpoint["config"], source))
    try:
        if problems := cfg.problems():
            raise ValueError("; ".join(problems))
        tokenizer, size = Tokenizer(checkpoint["tokenizer"]), checkpoint["vocab_size"]
        if tokenizer.vocab_size != size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}")
        if cfg.positions == "learned":                  # block_size may have been lowered
            checkpoint["model"]["wpe.weight"] = checkpoint["model"]["wpe.weight"][:cfg.block_size]
        model = build_model(lambda: GPT(cfg, size), checkpoint["model"], cfg.n_layer)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: its parts do not fit together: {str(error)[:400]}")
    return model, tokenizer


def read_weights(source) -> dict:
    """A checkpoint's content, from its path or, for OpenAI's weights, their name."""
    if str(source).startswith("gpt2") and not os.path.isfile(source):
        import convert  # for these alone
        return convert.imported(source)
    return load_checkpoint(Path(source))


def load(path, device: str = "cpu") -> tuple:
    """(model, tokenizer) for use from Python, in eval mode. path: a checkpoint, a run's folder, gpt2, ...
    `for ids in model.generate(prompt, 100, lambda logits: draw(logits, 0.8))` continues a prompt (B, T)."""
    path = Path(path, "ckpt.pt") if os.path.isfile(Path(path, "ckpt.pt")) else path
    model, tokenizer = restore(read_weights(path), path)
    return model.to(device).eval(), tokenizer


def sample_text(model: GPT, tokenizer, cfg: Config, step: int, device: str) -> str:
    """A short continuation of sample_start by the current weights."""
    prompt = torch.from_numpy(prompt_ids(tokenizer, cfg.sample_start, "--sample_start"))[None].to(device)
    numbers = iter(torch.rand(cfg.sample_tokens, 1, generator=torch.Generator().manual_seed(cfg.seed + step)))
    model.eval()
    ids = [token.item() for token in model.generate(
        prompt, cfg.sample_tokens, lambda z: draw(z, cfg.sample_temperature, next(numbers).to(device)))]
    model.train()
    return cfg.sample_start + tokenizer.decode(ids)


def train(cfg: Config, out_dir: Path, resumed: dict | None = None, weights: dict | None = None,
          seen: tuple | None = None) -> int:
    """Train as cfg says; returns the exit code. resumed: the content of last.pt, to go on from; weights: a
    checkpoint to start from, with a new schedule; seen: last.pt's stamp, when it matters."""
    ranks, deadline = Ranks(), Deadline(0 if cfg.dry_run else cfg.max_minutes)
    device = ranks.join(cfg.backend, choose_device(cfg.device))
    kind = torch.device(device).type
    folder = ensure_set(cfg.dataset, cfg.data_dir, ranks)
    data, meta = open_data(folder, cfg.block_size)
    tokenizer, source = stored_tokenizer(folder, meta), resumed or weights
    if source and source["tokenizer"] != tokenizer.stored:
        raise UserError(f"data set {cfg.dataset} has another tokenizer than the checkpoint: prepare it with its "
             "own (prepare.py --tokenizer=PATH/ckpt.pt; gpt2 and byte fit every text)")
    text = meta["splits"]["train"]["sha256"]
    if resumed and resumed.get("text", text) != text:
        raise UserError(f"data set {cfg.dataset} has changed since the run began: restore it, or start from scratch")
    prompt_ids(tokenizer, cfg.sample_start, "--sample_start")   # a wrong one should fail now, not later
    count = cfg.batch_size * cfg.gradient_accumulation_steps    # sequences a step
    rows, micro = ranks.share(count, cfg.batch_size)            # of them for this process, in so many batches
    if cfg.max_epochs:
        cfg.max_iters = max(1, int(cfg.max_epochs * (len(data["train"]) // cfg.block_size) / count))

    cfg.dtype = ranks.tell(choose_dtype(device, cfg.dtype))
    torch.set_float32_matmul_precision("high")          # TF32, for what stays in float32 on a GPU
    torch.use_deterministic_algorithms(kind == "cpu")   # else threads race to add up embeddings' gradients
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(cfg.seed)
    model = restore(source, "the checkpoint", cfg)[0] if source else GPT(cfg, meta["vocab_size"])
    model = ranks.shard(model.train(), device) if cfg.shard else model.train().to(device)

    def batches(step):
        """The micro-batches of this process for update number `step`."""
        starts = window_starts(step, cfg, len(data["train"]))[ranks.rank * rows:(ranks.rank + 1) * rows]
        for part in starts.reshape(micro, -1):
            yield get_batch(data["train"], part, cfg.block_size, model.vocab_size, "train", device)

    if kind not in ("cpu", "cuda") and ranks.first:
        compare_with_cpu(model, *next(batches(0)), device)

    def run_once(candidate):
        """A forward and a backward pass of which nothing remains, for measuring and compiling."""
        x, y = next(batches(0))
        with autocast(device, cfg.dtype):
            loss = candidate(x, y)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    state = dict(step=0, evaluated=-1, best_step=0, best_val_loss=math.inf, losses={}, seconds=0.0)
    state |= {name: resumed[name] for name in state} if resumed else {}
    writes = ranks.first and not (cfg.eval_only or cfg.dry_run)
    lock = claim_folder(out_dir, bool(resumed), seen) if writes else None
    report = Report(cfg, out_dir, ranks.first, model, meta, state, device)
    passes = 0 if cfg.eval_only else (cfg.max_iters - state["step"]) * micro
    wanted = compile_pays(cfg.compile, model, run_once, passes, device, ranks, deadline)
    step_model, compiled, note = compile_model(report.compiling(wanted), model, run_once, device)
    cfg.compile = compiled if passes > 0 else cfg.compile
    step_model = step_model if cfg.shard else ranks.copies(step_model, device)
    optimizers = make_optimizers(model, cfg, device, compiled, **ranks.spreading())
    scaler = torch.amp.GradScaler(kind, enabled=cfg.dtype == "float16")
    if resumed:
        restore_optimizers(optimizers, scaler, resumed, ranks.first)
    cfg = report.begin(note, optimizers, partial(run_once, step_model))     # a short one, if it is dry

    # What went wrong in the latest save of each file; a best one that was lost stays so over a resume.
    unsaved, bad = {"ckpt.pt": resumed.get("lost", "") if resumed else ""}, False

    def save(name: str, number: bool = False):
        """Write a checkpoint, and note in `unsaved` what went wrong. number: keep it under its step, too."""
        if cfg.eval_only or cfg.dry_run or not (ranks.first or cfg.shard):
            return
        content = state | dict(config=asdict(cfg), tokenizer=tokenizer.stored, vocab_size=model.vocab_size,
                               text=text, model=dict(model.state_dict()), seconds=report.seconds())
        if name == "last.pt":
            content |= dict(optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
                            threads=torch.get_num_threads(), lost=unsaved["ckpt.pt"])
        content = ranks.whole(content) if cfg.shard else content        # with a part from each process
        if not ranks.first:
            return
        unsaved[name] = save_checkpoint(content, out_dir / name, state["step"], cfg.keep * number)
        if unsaved[name]:
            report.say(f"{unsaved[name]}; the next save tries again")

    with Stop(deadline) as stop:
        watch = Guard(ranks, stop, optimizers, scaler, device, cfg.dtype)
        while True:
            step = state["step"]
            if cfg.max_iters == OPEN:           # max_minutes: until its own pace is known
                cfg.max_iters = ranks.tell(deadline.steps(step, report, cfg.eval_interval))
            last = step >= cfg.max_iters
            due = cfg.eval_only or (step > state["evaluated"] and (last or step % cfg.eval_interval == 0))
            show = cfg.sample_tokens and (step % cfg.sample_interval == 0 if cfg.sample_interval else due)
            with report.paused() if due or show else nullcontext():     # the stopwatch counts training only
                if due:
                    save("last.pt", number=True)        # an evaluation can take long, and be cut off
                    alone = stop if ranks.world == 1 else None      # several must all go on, or all stop
                    losses = estimate_loss(model, data, cfg, ranks, device, alone)
                    bad = losses is not None and not math.isfinite(losses["val"])
                    if losses is None or bad:
                        break
                    best = losses["val"] < state["best_val_loss"]
                    state |= dict(evaluated=step, losses=losses)
                    state |= dict(best_step=step, best_val_loss=losses["val"]) if best else {}
                    report.evaluation(step, losses, best)
                    if best or cfg.always_save_checkpoint:
                        save("ckpt.pt")
                stale = 0 < cfg.patience * cfg.eval_interval <= state["evaluated"] - state["best_step"]
                if due and (last or stale):
                    save("last.pt")
                if show and (ranks.first or cfg.shard):
                    report.sample(step, partial(sample_text, model, tokenizer, cfg, step, device))
            if last or stale or cfg.eval_only:
                break

            # One update. Its random numbers come from (seed, step, rank) alone, so none need to be restored.
            numbers = np.random.SeedSequence([cfg.seed, 2, step, ranks.rank])
            torch.manual_seed(numbers.generate_state(1).item())
            factor = lr_factor(step, cfg)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["base_lr"] * factor
                if "momentum" in group:                 # Muon's: from 0.85 up to its full value in 100 steps
                    group["momentum"] = cfg.momentum - max(0, 1 - step / 100) * max(0, cfg.momentum - 0.85)
            loss = torch.zeros((), device=device)
            for number, (x, y) in enumerate(batches(step), 1):
                # Processes add up their gradients once a step, after the last micro-batch.
                with ranks.adding_up(step_model, number == micro):
                    with autocast(device, cfg.dtype):
                        part = step_model(x, y)[1] / micro
                    scaler.scale(part).backward()
                loss += part.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if cfg.grad_clip:
                nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm     # of a sharded model
            step += 1
            log_now = step % cfg.log_interval == 0 or step == cfg.max_iters
            save_now = cfg.save_interval > 0 and step % cfg.save_interval == 0
            look = log_now or save_now or step % cfg.eval_interval == 0
            bad, stopping = watch.check(loss, norm, look)
            if bad:
                break
            overflow = cfg.dtype == "float16" and not norm.isfinite()   # the scaler lowers its scale
            for optimizer in optimizers:
                if not overflow:
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            state["step"] = step
            if log_now:
                mean = ranks.total(loss).item() / ranks.world
                report.update(step, mean, norm.item(), cfg.learning_rate * factor)
            if save_now or stopping:
                with report.paused():
                    save("last.pt")
            if stopping:
                break
    code = report.not_finite(step) if bad else report.finish(stop, unsaved)
    del step_model                                      # it keeps the process group and its threads alive
    ranks.leave()
    if lock:
        lock.close()
    return code


def main(argv: list) -> int:
    parsed = parse(Config, argv, __doc__)
    cfg = Config(**parsed.values)
    out_dir = Path(cfg.out_dir or Path("out") / (parsed.files[-1].stem if parsed.files else cfg.dataset))
    seen = file_stamp(out_dir / "last.pt") if cfg.init_from in ("auto", "resume") else None
    if cfg.init_from == "auto":
        cfg.init_from = "resume" if seen else "scratch"
    resumed = weights = None
    if cfg.init_from == "resume":
        resumed = load_checkpoint(out_dir / "last.pt", resumable=True)
        cfg = Config(**merge(Config, resumed["config"], parsed, FIXED_FIELDS, out_dir / "last.pt")[0])
    elif cfg.init_from != "scratch":
        weights = read_weights(cfg.init_from)
        # The model comes from the checkpoint, everything else from the files and flags given now.
        typed = replace(parsed, typed=parsed.typed & MODEL_FIELDS)
        stored = merge(Config, weights["config"], typed, MODEL_FIELDS, cfg.init_from, lower={"block_size"})[0]
        cfg = Config(**asdict(cfg) | {name: stored[name] for name in MODEL_FIELDS | {"init"}})
    if "max_iters" in parsed.typed and "max_epochs" not in parsed.typed:
        cfg.max_epochs = 0.0                            # what is typed wins over what a file or the run says
    if cfg.max_minutes and not resumed and "max_iters" not in parsed.typed:
        cfg.max_iters = OPEN
    if problems := cfg.problems():
        raise UserError("; ".join(problems))
    cfg.out_dir = str(out_dir)
    with explain_failures(out_dir):
        return train(cfg, out_dir, resumed, weights, seen)


if __name__ == "__main__":
    run(main)
