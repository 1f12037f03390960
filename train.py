"""Inkling: train a GPT from raw text. The whole model and the whole loop, in one file that reads top to bottom.

    python train.py                                 # the embedded fables: prepares them, trains, shows samples
    python train.py config/shakespeare_char.py      # a config file
    python train.py config/shakespeare_char.py --n_layer=8 --max_iters=2000      # later ones win
    python train.py config/shakespeare_char.py --init_from=resume                # go on after a stop
    torchrun --standalone --nproc_per_node=4 train.py config/shakespeare_char.py # four processes, the same model

What remains: out/NAME/ckpt.pt, the weights with the best validation loss, for sample.py; out/NAME/last.pt, all that is
needed to go on; log.csv and loss.png. Ctrl-C finishes the step, saves last.pt and leaves.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import SETS, Tokenizer, prepare_named
from support import runtime
from support.cli import fail, from_dict, parse
from support.report import Report

# ------------------------------------------------------------------------------------------------------------------
# Settings. `python train.py --help` prints these lines; config files and --key=value flags set them.


@dataclass
class Config:
    # -- the run
    dataset: str = "fables"             # folder under data/ that prepare.py wrote; named sets are prepared when missing
    data_dir: str = ""                  # folder that holds the data sets; empty: data/ beside this file
    out_dir: str = ""                   # folder of the run; empty: out/<config file's name>, or out/<dataset>
    init_from: str = "scratch"          # scratch | resume | auto (resume when there is something) | PATH of a ckpt.pt
    seed: int = 1337                    # of the initial weights, the batches and dropout
    max_iters: int = 500                # optimizer steps
    max_epochs: float = 0.0             # passes over the training tokens; above 0 it sets max_iters
    # -- evaluation and reports
    eval_interval: int = 100            # steps between evaluations; also before the first step and after the last
    eval_iters: int = 0                 # 0: every whole window of the val split; N: N batches of 16 spread evenly
    eval_only: bool = False             # evaluate once, write nothing, leave
    log_interval: int = 10              # steps between lines of progress
    save_interval: int = 0              # steps between saves of last.pt; 0: at every evaluation
    always_save_checkpoint: bool = False  # write ckpt.pt at every evaluation, not only at the best so far
    sample_interval: int = 0            # steps between samples of text; 0: at every evaluation
    sample_tokens: int = 150            # length of these samples; 0: none
    sample_start: str = ""              # their prompt; empty: the start of a text
    sample_temperature: float = 0.8     # 0: greedy
    tensorboard: bool = False           # write TensorBoard files to out_dir as well
    wandb_log: bool = False             # log to Weights & Biases as well
    wandb_project: str = "inkling"      # its project
    wandb_run_name: str = ""            # its run; empty: the name of out_dir
    # -- batches
    batch_size: int = 32                # sequences per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step, shared by all processes
    block_size: int = 256               # tokens of context
    sampling: Literal["epoch", "random"] = "epoch"  # each window once an epoch, or random windows
    # -- model
    n_layer: int = 4                    # blocks
    n_head: int = 2                     # attention heads (queries)
    n_kv_head: int = 0                  # heads of keys and values, shared by groups of queries; 0: n_head
    n_embd: int = 256                   # width
    ffn_dim: int = 0                    # width inside the MLP; 0: 4 n_embd, or 8/3 n_embd rounded up to 128 for swiglu
    dropout: float = 0.1                # on the embedding and on what each half-block adds
    attn_dropout: bool = False          # dropout on the attention weights, too
    positions: Literal["rope", "learned"] = "rope"  # rotary (arXiv 2104.09864), or a learned vector per position
    rope_theta: float = 1024.0          # base of the rotary wavelengths
    rope_fraction: float = 0.5          # share of each head's dimensions that is rotated
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # before each half-block and at the end
    norm_gain: bool = False             # the norms have a learned gain
    norm_eps: float = 1e-6              # the norms' epsilon
    embed_norm: bool = True             # a norm after the embedding
    mlp: Literal["relu2", "relu", "gelu", "gelu_tanh", "swiglu"] = "relu2"  # relu2 is ReLU squared (arXiv 2109.08668)
    bias: bool = False                  # biases in linear layers and layernorms
    qkv_bias: Literal["auto", True, False] = "auto"  # biases of queries, keys and values; auto: as bias
    head_bias: bool = False             # bias of the output layer
    tie_weights: bool = False           # the output layer is the embedding
    qk_norm: bool = True                # RMS-norm of queries and keys (arXiv 2302.05442)
    logit_cap: float = 15.0             # bound on the logits: cap z / sqrt(z^2 + cap^2); 0: none
    shortcuts: bool = True              # learned mixing of the embedding into each block and of the first block's
                                        # values into later ones (value residual, arXiv 2410.17897)
    init: Literal["zero", "gpt2", "torch", "kaiming"] = "zero"  # initial weights; zero: output projections at 0
    pad_vocab_to: int = 1               # rows of embedding and head are a multiple of this; 64 is faster on a GPU
    # -- optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the blocks' matrices, with AdamW for all else
    learning_rate: float = 0.012        # of the blocks' matrices under muon, of everything under adamw
    embed_lr: float = 0.1               # AdamW's for the embeddings, under muon
    head_lr: float = 0.004              # AdamW's for the output layer, under muon
    scalar_lr: float = 0.02             # AdamW's for gains, biases and mixing weights, under muon
    weight_decay: float = 0.8           # of the blocks' matrices under muon, of all matrices under adamw
    cautious: bool = True               # muon decays only where decay and update agree (arXiv 2411.16085)
    decay_all: bool = False             # weight decay on every parameter
    momentum: float = 0.95              # muon's; reached from 0.85 in 100 steps
    beta1: float = 0.8                  # AdamW's
    beta2: float = 0.95                 # AdamW's
    adam_eps: float = 1e-10             # AdamW's epsilon
    grad_clip: float = 0.0              # bound on the norm of the gradient; 0: none
    # -- learning rate over time, one factor for every rate above
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear: flat, then straight down at the end
    decay_lr: bool = True               # False: the full rate at every step
    warmup_iters: int = 0               # steps of linear warm-up
    lr_decay_iters: int = 0             # step at which min_lr is reached; 0: max_iters
    cooldown: float = 0.8               # share of lr_decay_iters over which `linear` comes down
    min_lr: float = 0.0                 # learning_rate at the end
    # -- machine
    device: str = "auto"                # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest that trains safely, measured
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: when it pays within the run
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on GPUs

    def problems(self) -> list:
        """Every broken rule, with its values, so that all can be mended at once."""
        least = dict(max_iters=0, eval_interval=1, log_interval=1, batch_size=1, gradient_accumulation_steps=1,
                     block_size=1, n_layer=1, n_head=1, n_embd=1, pad_vocab_to=1, rope_theta=1.0)
        below = dict(dropout=1.0, momentum=1.0, beta1=1.0, beta2=1.0)
        found = [f"{name}={getattr(self, name)} must be at least {bound}" for name, bound in least.items()
                 if getattr(self, name) < bound]
        found += [f"{field.name}={getattr(self, field.name)} must not be negative" for field in fields(self)
                  if field.name not in least and field.type in (int, float) and getattr(self, field.name) < 0]
        found += [f"{name}={getattr(self, name)} must be below {bound}" for name, bound in below.items()
                  if getattr(self, name) >= bound]
        found += [f"{name}={getattr(self, name):,} must be at most 2^31" for name in get_type_hints(Config)
                  if isinstance(getattr(self, name), int) and getattr(self, name) > 2**31]
        if found:
            return found
        if self.n_embd % self.n_head:
            found.append(f"n_head={self.n_head} must divide n_embd={self.n_embd}")
        elif self.positions == "rope" and (self.n_embd // self.n_head) % 2:
            found.append(f"n_embd / n_head = {self.n_embd // self.n_head} must be even for positions=rope")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            found.append(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.rope_fraction > 1:
            found.append(f"rope_fraction={self.rope_fraction} must be at most 1")
        if self.tie_weights and self.init == "zero":
            found.append("tie_weights=True needs an init other than zero, which would zero the embedding")
        if self.cooldown > 1:
            found.append(f"cooldown={self.cooldown} must be at most 1")
        if self.decay_lr and self.min_lr > self.learning_rate:
            found.append(f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}")
        if self.schedule == "cosine" and self.decay_lr and 0 < self.lr_decay_iters <= self.warmup_iters:
            found.append(f"lr_decay_iters={self.lr_decay_iters} must be above warmup_iters={self.warmup_iters}")
        return found


# What a checkpoint's weights and batches depend on, which a resumed run cannot change.
MODEL_FIELDS = {name for name in Config.__dataclass_fields__ if name in (
    "n_layer n_head n_kv_head n_embd ffn_dim positions rope_theta rope_fraction norm norm_gain norm_eps embed_norm mlp "
    "bias qkv_bias head_bias tie_weights qk_norm logit_cap shortcuts pad_vocab_to block_size").split()}
FIXED_FIELDS = MODEL_FIELDS | {"dataset", "optimizer", "init"}

# ------------------------------------------------------------------------------------------------------------------
# The model. Shapes: B sequences, T tokens, C = n_embd.


def dropout(x, p: float):
    """Zero each element with probability p (in steps of 1/256) and scale the others up.

    A CPU draws F.dropout's numbers one by one; eight to a 64-bit integer are about 3 times faster there."""
    zeroed = round(256 * p)
    if zeroed == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    numbers = torch.randint(-2**63, 2**63 - 1, ((x.numel() + 7) // 8,), dtype=torch.int64).view(torch.uint8)
    return x * (numbers[:x.numel()].view(x.shape) >= zeroed) * (256 / (256 - zeroed))


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), with or without a learned gain and bias."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.layernorm, self.eps, self.shape = cfg.norm == "layernorm", cfg.norm_eps, (cfg.n_embd,)
        self.gain = nn.Parameter(torch.ones(cfg.n_embd)) if cfg.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(cfg.n_embd)) if cfg.bias and self.layernorm else None

    def forward(self, x):
        if self.layernorm:
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.gain, self.eps)


class Cache:
    """Keys and values of the tokens seen so far: for each block two tensors (B, n_kv_head, block_size, head_dim)."""

    def __init__(self, model: "GPT", batch: int):
        shape = (batch, model.cfg.n_kv_head or model.cfg.n_head, model.cfg.block_size, model.cfg.n_embd // model.cfg.n_head)
        device = model.wte.weight.device
        self.length, self.tensors = 0, [None] * model.cfg.n_layer
        self.new = lambda dtype: (torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def extend(self, layer: int, k, v):
        """Add keys and values (B, n_kv_head, T, head_dim) of new tokens; returns those of all tokens so far."""
        if self.tensors[layer] is None:
            self.tensors[layer] = self.new(k.dtype)
        end = self.length + k.size(2)
        for stored, new in zip(self.tensors[layer], (k, v), strict=True):
            stored[:, :, self.length:end] = new
        return [stored[:, :, :end] for stored in self.tensors[layer]]


class Attention(nn.Module):
    """Causal self-attention, with grouped keys and values (arXiv 2305.13245) when n_kv_head < n_head."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, cfg.n_head, cfg.n_kv_head or cfg.n_head
        self.head_dim = cfg.n_embd // cfg.n_head
        bias = cfg.bias if cfg.qkv_bias == "auto" else cfg.qkv_bias
        self.q = nn.Linear(cfg.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k = nn.Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.v = nn.Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.qk_norm, self.norm_eps = cfg.qk_norm, cfg.norm_eps
        self.dropout = cfg.dropout if cfg.attn_dropout else 0.0
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if cfg.shortcuts and layer else None

    def forward(self, x, rotation, v_first, cache):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.value_mix is not None:
            v = self.value_mix[0] * v + self.value_mix[1] * v_first
            v = v.to(q.dtype)                                       # the mixing weights are float32
        if self.qk_norm:
            q, k = (F.rms_norm(z, (self.head_dim,), eps=self.norm_eps) for z in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        v_new = v
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, heads, T, head_dim)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
        # Query t may look at keys 0 .. past + t. A single new token may look at all of them.
        mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0 and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0,
                                           enable_gqa=self.n_kv_head != self.n_head)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), v_new


def rotation_table(cfg: Config):
    """cos and sin (block_size, head_dim / 2) by which rotary positions turn each pair of dimensions; pairs past
    rope_fraction do not turn."""
    pairs = cfg.n_embd // cfg.n_head // 2
    turning = max(1, round(cfg.rope_fraction * pairs))
    frequency = torch.zeros(pairs)
    frequency[:turning] = cfg.rope_theta ** (-torch.arange(turning) / turning)
    angle = torch.outer(torch.arange(cfg.block_size), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn dimensions i and i + head_dim/2 of x (B, T, heads, head_dim) as Llama does; cos and sin are (T, 1, head_dim/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between, or the gated three of SwiGLU (arXiv 2002.05202)."""

    activations = {"relu2": lambda x: F.relu(x).square(), "relu": F.relu, "gelu": F.gelu, "swiglu": F.silu,
                   "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}

    def __init__(self, cfg: Config):
        super().__init__()
        gated = cfg.mlp == "swiglu"
        width = cfg.ffn_dim or (128 * math.ceil(8 * cfg.n_embd / 3 / 128) if gated else 4 * cfg.n_embd)
        self.activation = self.activations[cfg.mlp]
        self.up = nn.Linear(cfg.n_embd, width, bias=cfg.bias)
        self.gate = nn.Linear(cfg.n_embd, width, bias=cfg.bias) if gated else None
        self.down = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added to the stream x (pre-norm, as in GPT-2)."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.norm1, self.attn = Norm(cfg), Attention(cfg, layer)
        self.norm2, self.mlp = Norm(cfg), MLP(cfg)
        self.dropout = cfg.dropout
        self.embed_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if cfg.shortcuts else None

    def forward(self, x, x_first, rotation, v_first, cache):
        p = self.dropout if self.training else 0.0
        if self.embed_mix is not None:
            mix = self.embed_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x_first
        y, v = self.attn(self.norm1(x), rotation, v_first, cache)
        x = x + dropout(y, p)
        return x + dropout(self.mlp(self.norm2(x)), p), v


class GPT(nn.Module):
    """A decoder-only transformer. Every `Config` of the model group is one of its family: GPT-2 (OpenAI, 2019), Llama
    (arXiv 2302.13971), and the fast recipe of the modded-nanogpt speedruns (github.com/KellerJordan/modded-nanogpt)."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        rows = cfg.pad_vocab_to * math.ceil(vocab_size / cfg.pad_vocab_to)
        self.wte = nn.Embedding(rows, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.positions == "learned" else None
        self.embed_norm = Norm(cfg) if cfg.embed_norm else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = Norm(cfg)
        self.head = nn.Linear(cfg.n_embd, rows, bias=cfg.head_bias)
        if cfg.tie_weights:
            self.head.weight = self.wte.weight
        for name, table in zip(("cos", "sin"), rotation_table(cfg) if cfg.positions == "rope" else (None, None), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """gpt2: normal, std 0.02, narrower for the 2 n_layer matrices that add to the stream. torch: PyTorch's own.
        kaiming: uniform of He et al. (arXiv 1502.01852). zero: matrices that add to the stream, and the head, at 0."""
        kind, adding = self.cfg.init, {m for block in self.blocks for m in (block.attn.out, block.mlp.down)}
        for module in self.modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) or kind == "torch":
                continue
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if kind == "gpt2":
                nn.init.normal_(module.weight, std=0.02 / (math.sqrt(2 * self.cfg.n_layer) if module in adding else 1))
            elif kind == "kaiming":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            elif module in adding or module is self.head:
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(0.33 / module.in_features))

    def trunk(self, idx, cache: Cache | None = None):
        """Token ids (B, T) to features (B, T, C). With a cache, idx holds only the tokens that follow those in it."""
        past, T = (cache.length if cache else 0), idx.size(1)
        x = self.wte(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))       # halves the traffic of the element-wise operations
        rotation = None
        if self.wpe is not None:
            x = x + self.wpe.weight[past:past + T].to(x.dtype)
        else:
            rotation = [table[past:past + T, None].to(x.dtype) for table in (self.cos, self.sin)]
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = dropout(x, self.cfg.dropout if self.training else 0.0)
        x_first, v_first = x, None
        for block in self.blocks:
            x, v = block(x, x_first, rotation, v_first, cache)
            v_first = v if v_first is None else v_first
        if cache:
            cache.length += T
        return self.norm(x)

    def logits(self, features):
        """Features (..., C) to float32 logits (..., vocab_size); rows that only pad the vocabulary are left out."""
        z = self.head(features)[..., :self.vocab_size].float()
        cap = self.cfg.logit_cap
        return z * cap * torch.rsqrt(z * z + cap * cap) if cap else z

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) and, given targets (B, T), their mean cross-entropy in nats, else None."""
        logits = self.logits(self.trunk(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, pick):
        """Continue the prompts idx (B, T >= 1), yielding the new ids (B,) of one position at a time.
        pick: logits (B, vocab_size) -> ids (B,).

        Past block_size the last half of the window is kept and its keys and values are computed afresh, in one pass: a
        cache that rolls would keep values that had seen tokens which are gone."""
        window = new = idx[:, -self.cfg.block_size:]
        cache = Cache(self, idx.size(0))
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > self.cfg.block_size:
                window = new = window[:, -max(1, self.cfg.block_size // 2):]
                cache.length = 0
            token = pick(self.logits(self.trunk(new, cache)[:, -1]))
            yield token
            new = token[:, None]
            window = torch.cat((window, new), dim=1)


def draw(logits, temperature: float, generator=None):
    """Ids (B,) drawn from softmax(logits / temperature), logits (B, vocab_size); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)   # no overflow near temperature 0
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# ------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule


def orthogonalize(m, steps: int = 5):
    """Bring the singular values of each matrix of m (n, rows, cols) near 1 (0.7 to 1.2) by a quintic Newton-Schulz
    iteration, in the precision of m. Coefficients: Keller Jordan, kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.size(1) > m.size(2)
    x = m.mT if tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


def muon_update(w, grad, momentum_buffer, momentum, lr, decay, cautious: bool, dtype):
    """One Muon step on the stacked matrices w (n, rows, cols); momentum_buffer is changed in place, the new w returned."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalize(grad.lerp(momentum_buffer, momentum).to(dtype)).float()      # Nesterov
    update = update * max(1, w.size(1) / w.size(2)) ** 0.5
    shrink = w * (update * w > 0) if cautious else w
    return w - lr * (update + decay * shrink)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for the matrices of the blocks (Jordan et al. 2024). Matrices of one shape are stacked,
    so that each product of the iteration is one batched product. `found_inf`, when set, turns steps into no-ops."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float, cautious: bool, dtype: torch.dtype, compiled: bool):
        shapes = {}
        for p in params:
            shapes.setdefault(tuple(p.shape), []).append(p)
        super().__init__([{"params": same} for same in shapes.values()],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum, cautious=cautious))
        self.dtype, self.found_inf = dtype, None
        self.update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            w, grad = torch.stack(params), torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(w)
            # Numbers that change from step to step are tensors, or a compiled update would be compiled again.
            momentum, lr, decay = (torch.tensor(group[key], device=w.device) for key in ("momentum", "lr", "weight_decay"))
            if self.found_inf is not None:
                grad, lr = torch.where(self.found_inf > 0, 0, grad), lr * (1 - self.found_inf)
            new = self.update(w, grad, state["momentum_buffer"], momentum, lr, decay, group["cautious"], self.dtype)
            torch._foreach_copy_(params, list(new.unbind()))


def make_optimizers(model: GPT, cfg: Config, device: str, compiled: bool) -> list:
    """AdamW alone, or Muon for the blocks' matrices and AdamW for the rest. Every parameter is in exactly one group."""
    params = list(model.parameters())                   # a tied head appears once
    if cfg.optimizer == "adamw":
        groups = [dict(params=[p for p in params if p.dim() >= 2], lr=cfg.learning_rate, weight_decay=cfg.weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], lr=cfg.learning_rate)]
    else:
        embeddings = [m.weight for m in (model.wte, model.wpe) if m is not None]
        head = [] if cfg.tie_weights else [model.head.weight]
        groups = [dict(params=embeddings, lr=cfg.embed_lr), dict(params=head, lr=cfg.head_lr),
                  dict(params=[p for p in params if p.dim() < 2], lr=cfg.scalar_lr)]
    for group in groups:
        group.setdefault("weight_decay", cfg.weight_decay if cfg.decay_all else 0.0)
    fused = torch.device(device).type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW([group for group in groups if group["params"]], betas=(cfg.beta1, cfg.beta2),
                                    eps=cfg.adam_eps, fused=fused)]
    if cfg.optimizer == "muon":
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        precision = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        optimizers.append(Muon(matrices, cfg.learning_rate, cfg.weight_decay, cfg.momentum, cfg.cautious, precision, compiled))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, cfg: Config) -> float:
    """The share of the full learning rates that update number `step` (from 0) uses: 1 down to min_lr / learning_rate."""
    if not cfg.decay_lr:
        return 1.0
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    if cfg.schedule == "constant":
        height = 1.0
    elif cfg.schedule == "cosine":
        height = 0.5 + 0.5 * math.cos(math.pi * min(1, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters)))
    else:
        height = min(1.0, max(0.0, (end - step) / max(1e-9, cfg.cooldown * end)))
    least = cfg.min_lr / cfg.learning_rate if cfg.learning_rate else 0.0
    return least + (1 - least) * height


# ------------------------------------------------------------------------------------------------------------------
# Batches and evaluation


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, windows: int, tokens: int):
    """The order of an epoch's windows, and the token at which the first one starts."""
    rng = np.random.default_rng([seed, 1, epoch])
    return rng.permutation(windows), int(rng.integers(tokens))


def window_starts(step: int, cfg: Config, tokens: int):
    """Where the windows of update number `step` start: batch_size * gradient_accumulation_steps positions, a pure
    function of (seed, step) and the number of tokens. An epoch takes the text as a circle, from a place of its own, and
    visits floor(tokens / block_size) windows that do not overlap; the stream of windows runs on from epoch to epoch."""
    count = cfg.batch_size * cfg.gradient_accumulation_steps
    if cfg.sampling == "random":
        return np.random.default_rng([cfg.seed, 0, step]).integers(0, tokens - cfg.block_size, count)
    windows, starts = tokens // cfg.block_size, []
    for number in range(step * count, (step + 1) * count):
        order, offset = permutation(cfg.seed, number // windows, windows, tokens)
        starts.append((offset + order[number % windows] * cfg.block_size) % tokens)
    return np.array(starts)


def get_batch(data, starts, block_size: int, vocab_size: int, split: str, device: str):
    """Inputs and targets (len(starts), block_size): the same windows, one token apart. data: token ids, mapped."""
    at = (starts[:, None] + np.arange(block_size + 1)) % len(data)
    ids = data[at]
    runtime.check_ids(ids, vocab_size, split)
    ids = torch.from_numpy(ids.astype(np.int64))
    if device.startswith("cuda"):
        ids = ids.pin_memory().to(device, non_blocking=True)        # copied while the GPU computes
    else:
        ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


def eval_windows(tokens: int, cfg: Config, most: int):
    """Starts of the evaluation windows: every whole one, or `most` of them, evenly spaced."""
    whole = (tokens - 1) // cfg.block_size
    count = min(whole, most)
    return np.arange(count) * whole // count * cfg.block_size


@torch.no_grad()
def estimate_loss(model: GPT, data: dict, cfg: Config, ranks, device: str, autocast, stop=None) -> dict:
    """Mean loss in nats of both splits over fixed windows: all of val's (eval_iters=0) and as many of train's, or 16
    eval_iters of each, evenly spaced. Processes share the windows. None when `stop` asks for an end meanwhile."""
    model.eval()
    losses, most = {}, 16 * cfg.eval_iters or (len(data["val"]) - 1) // cfg.block_size
    for split in ("train", "val"):
        starts = eval_windows(len(data[split]), cfg, most)
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(16 * ranks.rank, len(starts), 16 * ranks.world):
            if stop and stop.signal and ranks.world == 1:
                model.train()
                return None
            x, y = get_batch(data[split], starts[first:first + 16], cfg.block_size, model.vocab_size, split, device)
            with autocast():
                loss = model(x, y)[1]
            total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64)
        ranks.total(total)
        losses[split] = (total[0] / total[1]).item()
    model.train()
    return losses


# ------------------------------------------------------------------------------------------------------------------
# The run


def restore(checkpoint: dict, source) -> tuple:
    """(model, tokenizer) of a loaded checkpoint, on the CPU and in float32."""
    cfg = Config(**from_dict(Config, checkpoint["config"], source))
    try:
        if problems := cfg.problems():
            raise ValueError("; ".join(problems))
        tokenizer, model = Tokenizer(checkpoint["tokenizer"]), GPT(cfg, checkpoint["vocab_size"])
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fail(f"{source}: its parts do not fit together: {str(error)[:400]}")
    return model, tokenizer


def load(path, device: str = "cpu") -> tuple:
    """(model, tokenizer) for use from Python, the model in eval mode. path: a checkpoint, or the folder of a run.
    `for ids in model.generate(prompt, 100, lambda logits: draw(logits, 0.8)): ...` continues prompt (B, T)."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    model, tokenizer = restore(runtime.load_checkpoint(path), path)
    return model.to(device).eval(), tokenizer


def open_data(cfg: Config, ranks) -> tuple:
    """({"train": ids, "val": ids}, meta) of the data set; rank 0 prepares a named one that is missing."""
    folder = runtime.data_folder(cfg.dataset, cfg.data_dir)
    if not (folder / "meta.json").is_file():
        if cfg.dataset not in SETS:
            fail(f"no data set in {folder}: python prepare.py YOUR_TEXT_FILE --name={cfg.dataset}")
        if ranks.first:
            prepare_named(cfg.dataset, cfg.data_dir)
        ranks.tell(None)                                # the others wait for it
    meta = runtime.read_meta(folder)
    data = {split: runtime.open_split(folder, meta, split) for split in ("train", "val")}
    for split, more in (("train", "bring more text"), ("val", "raise prepare.py's --val_fraction")):
        if len(data[split]) <= cfg.block_size:
            fail(f"{split} has {len(data[split]):,} tokens; block_size={cfg.block_size} needs {cfg.block_size + 1}: "
                 f"lower --block_size or {more}")
    return data, meta


def sample_text(model: GPT, tokenizer, cfg: Config, step: int, device: str) -> str:
    """A short continuation of sample_start by the current weights."""
    model.eval()
    generator = torch.Generator(device).manual_seed(cfg.seed + step)
    prompt = torch.from_numpy(tokenizer.encode_prompt(cfg.sample_start).astype(np.int64))[None].to(device)
    ids = [token.item() for token in
           model.generate(prompt, cfg.sample_tokens, lambda logits: draw(logits, cfg.sample_temperature, generator))]
    model.train()
    return cfg.sample_start + tokenizer.decode(ids)


def train(cfg: Config, out_dir: Path, resumed: dict | None = None, weights: dict | None = None) -> int:
    """Train as cfg says; returns the exit code. resumed: the content of last.pt to go on from; weights: a checkpoint
    to start from, with a new schedule."""
    # The machine, the data, the model
    ranks = runtime.Ranks()
    device = ranks.join(cfg.backend, runtime.choose_device(cfg.device))
    data, meta = open_data(cfg, ranks)
    tokenizer = Tokenizer(meta["tokenizer"])
    source = resumed or weights
    if source and source["tokenizer"] != tokenizer.stored:
        fail(f"the data set {cfg.dataset} and the checkpoint have different tokenizers: prepare the set as it was")
    try:
        tokenizer.encode_prompt(cfg.sample_start)
    except ValueError as error:
        fail(f"sample_start={cfg.sample_start!r}: {error}")
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps     # sequences, over all processes
    if per_step % ranks.world:
        fail(f"batch_size * gradient_accumulation_steps = {per_step} must divide by the {ranks.world} processes")
    if cfg.max_epochs:
        cfg.max_iters = max(1, int(cfg.max_epochs * (len(data["train"]) // cfg.block_size) / per_step))
    rows = per_step // ranks.world                      # of this process, in equal micro-batches of batch_size or less
    micro = next(n for n in range(math.ceil(rows / cfg.batch_size), rows + 1) if rows % n == 0)
    cfg.dtype = ranks.tell(runtime.choose_dtype(device, cfg.dtype))
    torch.set_float32_matmul_precision("high")          # TF32 for what stays in float32 on a GPU
    torch.manual_seed(cfg.seed)
    model = restore(source, "checkpoint")[0] if source else GPT(cfg, meta["vocab_size"])
    model.cfg = cfg
    model.to(device).train()
    kind = torch.device(device).type
    half = cfg.dtype != "float32"

    def autocast():
        return torch.autocast(kind, dtype=getattr(torch, cfg.dtype)) if half else nullcontext()

    def batches(step):
        """This process's micro-batches of update number `step`."""
        starts = window_starts(step, cfg, len(data["train"]))[ranks.rank * rows:(ranks.rank + 1) * rows]
        for part in starts.reshape(micro, -1):
            yield get_batch(data["train"], part, cfg.block_size, model.vocab_size, "train", device)

    def run_once(candidate):
        x, y = next(batches(0))
        with autocast():
            loss = candidate(x, y)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    state = dict(step=0, evaluated=-1, best_step=0, best_val_loss=math.inf, losses={}, seconds=0.0)
    state |= {name: resumed[name] for name in state} if resumed else {}
    lock = None
    if ranks.first and not cfg.eval_only:
        lock = runtime.lock(out_dir)                    # kept until the process ends
        if not resumed and any((out_dir / name).exists() for name in ("last.pt", "ckpt.pt", "log.csv")):
            lock.close()
            print(f"{out_dir} holds a run: moved to {runtime.set_aside(out_dir)}"
                  f" (to go on with it instead: --init_from=resume)", flush=True)
            lock = runtime.lock(out_dir)
    left = (cfg.max_iters - state["step"]) * micro
    cfg.compile = ranks.tell(runtime.compile_pays(cfg.compile, model, run_once, left, device))
    step_model, cfg.compile, compile_note = runtime.compile(cfg.compile, model, run_once, device)
    if ranks.world > 1:
        step_model = nn.parallel.DistributedDataParallel(step_model, [device] if kind == "cuda" else None)
    optimizers = make_optimizers(model, cfg, device, cfg.compile)
    scaler = torch.amp.GradScaler(kind, enabled=cfg.dtype == "float16")
    if resumed:
        runtime.restore_optimizers(optimizers, scaler, resumed)
    report = Report(cfg, out_dir, ranks.first, model, meta, state, device, compile_note)

    def save(name: str) -> str:
        content = dict(state, config=asdict(cfg), tokenizer=tokenizer.stored, vocab_size=model.vocab_size,
                       model=dict(model.state_dict()))
        if name == "last.pt":
            content |= dict(optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict(),
                            threads=torch.get_num_threads(), seconds=report.seconds())
        problem = runtime.save_checkpoint(content, out_dir / name) if ranks.first else ""
        if problem:
            report.say(f"{problem}; the next save tries again")
        return problem

    # The loop: evaluate, update, report, until max_iters updates are done
    first_step, bad, unsaved = state["step"], torch.zeros((), device=device), ""
    with runtime.Stop() as stop:
        while True:
            step = state["step"]
            last = step == cfg.max_iters
            due = (step % cfg.eval_interval == 0 or last) and step > state["evaluated"]
            with report.paused():
                if due and step > first_step and not cfg.eval_only:
                    unsaved = save("last.pt")           # an evaluation can take long, and be cut off
                losses = estimate_loss(model, data, cfg, ranks, device, autocast, stop) if due else None
                if losses:
                    best = losses["val"] < state["best_val_loss"]
                    state |= dict(evaluated=step, losses=losses)
                    if best:
                        state |= dict(best_step=step, best_val_loss=losses["val"])
                    report.evaluation(step, losses, best)
                    if (best or cfg.always_save_checkpoint) and not cfg.eval_only:
                        unsaved = save("ckpt.pt")
                    if last and not cfg.eval_only:
                        unsaved = save("last.pt") or unsaved
                if cfg.sample_tokens and ranks.first and not stop.signal and (
                        step % cfg.sample_interval == 0 if cfg.sample_interval else due):
                    report.sample(step, sample_text(model, tokenizer, cfg, step, device))
            if last or cfg.eval_only or stop.signal and ranks.world == 1:
                break

            # One update. Its random numbers come from (seed, step, rank) alone, so nothing needs to be restored.
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, 2, step, ranks.rank]).generate_state(1)[0]))
            factor = lr_factor(step, cfg)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["base_lr"] * factor
                if "momentum" in group:
                    group["momentum"] = cfg.momentum - max(0, 1 - step / 100) * max(0, cfg.momentum - 0.85)
            loss = torch.zeros((), device=device)
            for number, (x, y) in enumerate(batches(step), 1):
                # Processes add up their gradients once, after the last micro-batch.
                with step_model.no_sync() if ranks.world > 1 and number < micro else nullcontext():
                    with autocast():
                        part = step_model(x, y)[1] / micro
                    scaler.scale(part).backward()
                loss += part.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if cfg.grad_clip:
                nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)

            # A loss or gradient that is not finite must not reach the weights. On a GPU the check stays there: `bad`
            # turns this update and all later ones into no-ops, and the host looks at it only now and then.
            finite = torch.isfinite(loss) & (torch.isfinite(norm) | (cfg.dtype == "float16"))   # fp16 may overflow
            flags = ranks.total(torch.stack((1 - finite.float(), torch.tensor(float(stop.signal > 0), device=device))))
            bad = torch.maximum(bad, flags[0].clamp(max=1))
            step = state["step"] = step + 1
            save_now = cfg.save_interval and step % cfg.save_interval == 0
            log_now = step % cfg.log_interval == 0 or step == cfg.max_iters
            stopping = False
            if kind == "cpu" or cfg.dtype == "float16" or log_now or save_now or step % cfg.eval_interval == 0:
                if bad.item():
                    return report.not_finite(step)
                stopping = flags[1].item() > 0
            for optimizer in optimizers:
                if kind != "cpu" and cfg.dtype != "float16":
                    optimizer.found_inf = bad
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            if log_now:
                report.update(step, ranks.total(loss).item() / ranks.world, norm.item(), cfg.learning_rate * factor)
            if save_now or stopping:
                with report.paused():
                    unsaved = save("last.pt")
            if stopping:
                break
    report.finish(stop.signal, unsaved)
    ranks.leave()
    return stop.exit_code if stop.signal else 4 if unsaved else 0


def main(argv: list) -> int:
    parsed = parse(Config, argv, __doc__)
    cfg = Config(**parsed.values)
    out_dir = Path(cfg.out_dir or Path("out") / (parsed.files[-1].stem if parsed.files else cfg.dataset))
    resumed = weights = None
    if cfg.init_from == "auto":
        cfg.init_from = "resume" if (out_dir / "last.pt").is_file() else "scratch"
    if cfg.init_from != "scratch":
        path = out_dir / "last.pt" if cfg.init_from == "resume" else Path(cfg.init_from)
        content = runtime.load_checkpoint(path)
        stored = from_dict(Config, content["config"], path)
        fixed = FIXED_FIELDS if cfg.init_from == "resume" else MODEL_FIELDS
        if changed := [f"{name}={getattr(cfg, name)} (stored: {stored[name]})" for name in sorted(parsed.typed & fixed)
                       if getattr(cfg, name) != stored[name]]:
            fail(f"{path} cannot go on with another {', '.join(changed)}")
        if cfg.init_from == "resume":
            resumed, typed = content, {name: parsed.values[name] for name in parsed.typed - {"init_from", "out_dir"}}
            for name, value in typed.items():
                if stored[name] != value:
                    print(f"changed on resume: {name} {stored[name]} -> {value}", flush=True)
            cfg = Config(**stored | typed)
        else:
            weights = content
            cfg = Config(**asdict(cfg) | {name: stored[name] for name in MODEL_FIELDS})
    if problems := cfg.problems():
        fail("; ".join(problems))
    cfg.out_dir = str(out_dir)
    return train(cfg, out_dir, resumed, weights)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
