"""Inkling: train a GPT from raw text. The whole model and the whole training loop, to be read from
top to bottom.

    python train.py                                         # bundled fables
    python train.py config/shakespeare_char.py              # a config file
    python train.py config/shakespeare_char.py --n_layer=8  # flags override it
    python train.py config/shakespeare_char.py --init_from=resume
    torchrun --standalone --nproc_per_node=4 train.py       # four processes

Writes to out/NAME: ckpt.pt, the weights with the best validation loss, for sample.py; last.pt,
everything needed to resume; log.csv and loss.png. Ctrl-C finishes the step, saves last.pt and
exits; so do SIGTERM and a terminal that is closed (not under nohup). A run continues without an
output that goes away. Exit codes: 0 done, 2 wrong input, 3 a loss that is not finite, 4 the last
save failed, 129, 130 and 143 stopped. README.zh.md: 中文说明
"""

import inspect
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

# How often a thread that waits for others looks for work before it sleeps. GNU's OpenMP, which reads this while
# torch is imported, looks 30 times as often: beside one other busy program, a step of the default model on two cores
# then takes 1 s instead of 0.38; on idle cores it takes at most 5% less.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from inkling import cli, compile_cost, cpu
from inkling import plan as planning
from inkling.checkpoint import (
    ForeignCheckpoint,
    RunFolder,
    build_model,
    file_stamp,
    load_checkpoint,
    restore_optimizers,
)
from inkling.cli import (
    AutoOrNonNegativeFloat,
    AutoOrNonNegativeInt,
    AutoOrPositiveInt,
    FilePath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UserError,
    at_least,
)
from inkling.clock import Deadline, StepFitter, Stopwatch, process_start
from inkling.dataset import check_ids, data_folder, has_set, open_data, random_order, read_meta, windows_at_once
from inkling.device import (
    autocast,
    choose_device,
    choose_dtype,
    compare_with_cpu,
    compile_function,
    compile_model,
    compile_pays,
    compiler_missing,
    device_type,
    seconds_of_a_pass,
    synchronize,
)
from inkling.distributed import Ranks, gradient_sync
from inkling.dry_run import TRIAL_WINDOWS, dry_run, free_memory
from inkling.evaluation import choose_interval, plan_evaluations
from inkling.format import brief_seconds, rough_duration
from inkling.hints import closest, command_for_training, sets_in
from inkling.output import outlive_output
from inkling.report import Report, check_loggers
from inkling.stopping import Guard, NotFinite, Stop, explain_failures
from inkling.tokenizer import Tokenizer, prompt_ids, start_of_texts, stored_tokenizer, typed_prompt
from prepare import SETS, ensure_set

# --------------------------------------------------------------------------------------------------
# Settings. `python train.py --help` prints these lines; config files and --key=value set them.

BelowOne = Annotated[float, at_least(0).below(1)]


@dataclass
class ModelConfig:
    """The settings that the weights depend on. A run that starts from a checkpoint takes these from it."""

    # -- model
    block_size: Annotated[int, at_least(1).at_most(2**20)] = 256  # context: how many tokens predict the next, at most
    n_layer: PositiveInt = 2            # number of transformer blocks
    n_head: PositiveInt = 2             # number of attention heads (of queries)
    n_kv_head: NonNegativeInt = 0       # key-value heads, shared by groups of queries (GQA); 0: n_head
    n_embd: PositiveInt = 128           # width: embedding size
    head_dim: NonNegativeInt = 0        # width of each attention head; 0: n_embd / n_head
    ffn_dim: NonNegativeInt = 0         # width inside the MLP; 0: 4 n_embd (swiglu: 8/3, rounded up to 128)
    positions: Literal["rope", "learned"] = "rope"  # position encoding: rotary (arXiv 2104.09864) or learned
    rope_theta: PositiveFloat = 1024.0  # base of the rotary wavelengths
    rope_fraction: Fraction = 0.5       # fraction of each head's dimensions that is rotated
    rope_scaling: Literal["none", "linear", "llama3"] = "none"  # slower rotation, for a context longer than the
                                        # one first trained on: all of it, or as Llama 3 does (scale_frequency)
    rope_factor: Annotated[float, at_least(1).at_most(10**6)] = 8.0  # with rope_scaling: how many times slower
    rope_low_freq: PositiveFloat = 1.0  # llama3: dimensions that turn fewer times than this within rope_context are
                                        # slowed down by rope_factor
    rope_high_freq: PositiveFloat = 4.0  # llama3: those that turn more times than this are not; those between, in part
    rope_context: PositiveInt = 8192    # llama3: the context that the model was first trained on
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # kind of norm before attention, before the MLP and at the
                                        # end
    norm_gain: bool = False             # the norms have a learned gain
    norm_eps: NonNegativeFloat = 1e-6   # the norms' epsilon
    embed_norm: bool = True             # a norm after the embedding
    mlp: Literal["relu2", "relu", "gelu", "gelu_tanh", "swiglu"] = "relu2"  # relu2: squared, arXiv 2109.08668
    bias: bool = False                  # biases in linear layers, and in layernorms with a gain
    qkv_bias: Literal["auto", True, False] = "auto"  # biases of queries, keys and values; auto: as bias
    head_bias: bool = False             # bias of the output layer
    tie_weights: bool = False           # the output layer shares the embedding's weights
    qk_norm: bool = True                # RMS norm of queries and keys (arXiv 2302.05442)
    qk_norm_gain: bool = False          # the norms of queries and keys have a learned gain each, as in Qwen3
    logit_cap: NonNegativeFloat = 15.0  # bound on the logits: cap z / sqrt(z^2 + cap^2); 0: none
    shortcuts: bool = True              # learned mixing of the embedding into each block, and of the first block's
                                        # values into later ones (value residual, arXiv 2410.17897)
    ngrams: Annotated[int, at_least(0).at_most(16)] = 5  # N: n-grams of 2 to N tokens add vectors to the embedding; 0:
                                        # off
    ngram_rows: PositiveInt = 65536     # rows of the hashed n-gram table
    ngram_edges: bool = False           # n-grams that reach before the first token of a context add a vector, too
    pad_vocab_to: PositiveInt = 1       # round the embedding's rows up to a multiple; 64 is faster on a GPU


@dataclass
class Config(ModelConfig):
    """All settings of a run, as the user gave them. What they leave open is decided in a Plan."""

    # -- the run
    dataset: str = "fables"             # folder under data/; a built-in data set is prepared on first use
    data_dir: FilePath = ""             # folder that holds the data sets; empty: data/ beside this file
    out_dir: FilePath = ""              # folder of the run; empty: out/<config file's name>, or out/<dataset>
    init_from: FilePath = "scratch"     # scratch | resume | auto: resume if it can | PATH.pt |
                                        # gpt2[-medium|-large|-xl]
    seed: NonNegativeInt = 1337         # for the initial weights, the batches and dropout
    max_iters: Annotated[int, at_least(0).below(2**31)] = 300  # optimizer steps to train for
    max_epochs: NonNegativeFloat = 0.0  # passes over the training tokens; above 0 it sets max_iters
    max_minutes: NonNegativeFloat = 0.0  # wall-clock limit in minutes; plans max_iters and whatever else is not
                                        # set, such as the model's size; 0: no limit and no plan
    breakpoints: str = ""               # STEP:END,...: from each STEP on, the run ends at step END; the line `repeat`
                                        # of a run with max_minutes gives them
    dry_run: bool = False               # estimate memory, time and files from three real steps; write nothing
    # -- evaluation and reports
    eval_interval: AutoOrPositiveInt = "auto"  # steps between evaluations, the first before any training;
                                        # auto: ten to twenty-five evaluations
    eval_iters: AutoOrNonNegativeInt = "auto"  # N: N batches of 16 windows, spread evenly; 0: all of the val split;
                                        # auto: as many as cost at most 8% of the training, and all at the end
    eval_only: bool = False             # evaluate once and exit; writes nothing
    log_interval: PositiveInt = 10      # steps between lines of progress
    patience: NonNegativeInt = 0        # early stopping: stop after N evaluations in a row without a better val loss;
                                        # 0: never
    save_interval: NonNegativeInt = 0   # steps between saves of last.pt; 0: at every evaluation
    keep: NonNegativeInt = 0            # keep the last.pt of the latest N evaluations as last-STEP.pt
    always_save_checkpoint: bool = False  # write ckpt.pt at every evaluation, not only at the best so far
    sample_interval: NonNegativeInt = 0  # steps between samples of text; 0: at every evaluation
    sample_tokens: NonNegativeInt = 150  # length of these samples in tokens; 0: none
    sample_start: str = ""              # prompt of these samples (\n, \t, \r and \\ are read as in sample.py's
                                        # start); empty: a text begins, as in the training set
    sample_temperature: NonNegativeFloat = 0.8  # randomness of these samples; 0: greedy
    tensorboard: bool = False           # also write TensorBoard files to out_dir
    wandb_log: bool = False             # also log to Weights & Biases
    wandb_project: str = "inkling"      # name of the project in Weights & Biases
    wandb_run_name: str = ""            # name of the run in Weights & Biases; empty: that of out_dir
    # -- batches
    batch_size: PositiveInt = 12        # sequences per micro-batch
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per step, divided among the processes
    sampling: Literal["epoch", "fixed", "random"] = "epoch"  # epoch: each window once, shifted every epoch; fixed: the
                                        # same windows every epoch; random: random places
    # -- regularization and initial weights
    dropout: Annotated[float, at_least(0).at_most(0.99)] = 0.0  # dropout rate of the embedding and of the outputs
                                        # of attention and MLP
    attn_dropout: bool = False          # apply the same rate to the attention weights, too
    init: Literal["zero", "gpt2", "torch", "kaiming"] = "zero"  # initial weights; zero: outputs start at 0
    # -- optimizer
    optimizer: str = "muon"             # muon (it trains the blocks' matrices, RowAdam the n-gram vectors, and AdamW
                                        # all else) | adamw
    ngram_optimizer: Literal["rowadam", "adamw"] = "rowadam"  # with muon: what trains the n-gram vectors; adamw: with
                                        # the rate of the embeddings
    learning_rate: NonNegativeFloat = 0.02  # with muon: the rate of the blocks' matrices; with adamw: of everything
    embed_lr: NonNegativeFloat = 0.1    # with muon: AdamW's learning rate for the embeddings
    ngram_lr: NonNegativeFloat = 0.05   # with muon: RowAdam's learning rate for the n-gram vectors
    ngram_decay: AutoOrNonNegativeFloat = "auto"  # with muon: weight decay of the n-gram vectors; auto: larger for a
                                        # short text, whose passages come back sooner
    head_lr: NonNegativeFloat = 0.008   # with muon: AdamW's learning rate for the output layer
    scalar_lr: NonNegativeFloat = 0.02  # with muon: AdamW's learning rate for gains, biases and mixing weights
    weight_decay: NonNegativeFloat = 0.4  # of the blocks' matrices (muon) or of all matrices (adamw); a step shrinks
                                        # them by this times the learning rate
    cautious: bool = True               # muon decays only where decay and update agree (arXiv 2411.16085)
    decay_all: bool = False             # also decay the parameters that otherwise would not, such as biases
    momentum: BelowOne = 0.95           # muon: it rises from 0.85 to this over the first 100 steps
    beta1: BelowOne = 0.8               # AdamW: decay rate of its average of gradients
    beta2: BelowOne = 0.95              # AdamW and RowAdam: the same for their squares
    adam_eps: Annotated[float, at_least(1e-30).at_most(1)] = 1e-10  # AdamW's and RowAdam's epsilon
    grad_clip: NonNegativeFloat = 0.0   # bound on the norm of the gradient; 0: none
    # -- learning rate over time: one factor for every rate above
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear: flat, then straight down
    decay_lr: bool = True               # False: the full rate at every step
    warmup_iters: NonNegativeInt = 0    # steps of linear warm-up
    lr_decay_iters: NonNegativeInt = 0  # step at which min_lr is reached; 0: max_iters
    cooldown: Fraction = 0.8            # linear: fraction of lr_decay_iters spent decaying
    min_lr: NonNegativeFloat = 0.0      # what learning_rate ends at; the other rates shrink in proportion
    # -- machine
    device: str = "auto"                # cpu | cuda | cuda:N | mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 (float16 on older cards) where
                                        # a short measurement shows that it is faster
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: when it pays within the run
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # how processes communicate; auto: nccl on GPUs, else gloo
    shard: bool = False                 # shard weights, gradients and optimizer state across processes (FSDP)
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def rules(self) -> dict:
        """The rules between settings: each one in words, and whether it holds."""
        head_dim = self.head_dim or self.n_embd / max(1, self.n_head)
        return {
            f"n_head={self.n_head} must divide n_embd={self.n_embd}, or head_dim be set": head_dim % 1 == 0,
            f"{'head_dim' if self.head_dim else 'n_embd / n_head'} = {head_dim:g} must be even for rope":
                self.positions != "rope" or head_dim % 2 != 1,
            f"rope_low_freq={self.rope_low_freq} must be below rope_high_freq={self.rope_high_freq}":
                self.rope_scaling != "llama3" or self.rope_low_freq < self.rope_high_freq,
            f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}":
                self.n_head % (self.n_kv_head or 1) == 0,
            "tie_weights=True needs an init other than zero":
                not self.tie_weights or self.init != "zero",
            "max_epochs and max_minutes both set the length: leave one out":
                not (self.max_epochs and self.max_minutes),
            f"breakpoints={self.breakpoints} must be STEP:END,STEP:END with rising steps, the first of them 0":
                not self.breakpoints or read_breakpoints(self.breakpoints) is not None,
            f"optimizer={self.optimizer} must be one of {', '.join(OPTIMIZERS)}":
                self.optimizer in OPTIMIZERS,
            "shard=True splits matrices that muon needs whole: use optimizer=adamw and its learning_rate":
                not self.shard or self.optimizer != "muon",
            "shard=True does not support dtype=float16: use bfloat16 or float32":
                not self.shard or self.dtype != "float16",
            f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}":
                not self.decay_lr or self.min_lr <= self.learning_rate,
        }


def read_breakpoints(text: str) -> list | None:
    """Return the setting `breakpoints` as [[step, end], ...], or None if it is not of that form."""
    if not re.fullmatch(r"\d{1,10}:\d{1,10}(,\d{1,10}:\d{1,10})*", text):
        return None
    pairs = [[int(number) for number in pair.split(":")] for pair in text.split(",")]
    steps = [step for step, _ in pairs]
    if steps[0] != 0 or steps != sorted(set(steps)):
        return None
    return pairs


# The settings that most people want first.
FIRST_IN_HELP = ("dataset", "out_dir", "init_from", "max_iters", "max_minutes", "n_layer", "n_embd", "dry_run")
MODEL_FIELDS = {model_field.name for model_field in fields(ModelConfig)}
COMPUTE_NOTHING = {"eval_interval", "eval_iters", "log_interval", "save_interval", "keep", "always_save_checkpoint",
                   "sample_interval", "sample_tokens", "sample_start", "sample_temperature", "tensorboard",
                   "wandb_log", "wandb_project", "wandb_run_name"}      # settings without effect on the weights
SAY_HOW_LONG = MODEL_FIELDS | {"max_iters", "max_epochs", "max_minutes", "breakpoints", "lr_decay_iters"}
SECONDS_OF_A_TRIAL = 1.0                # in which the trial steps of one model begin, unless three take longer
TRIALS_OF_THE_TIME = 0.2                # share of a run's time after which its plan tries no model more
NGRAM_FORGETTING = 12.5                 # see choose_ngram_decay; both were measured on four texts (bench/RESULTS.md)
LEAST_FORGETTING = 0.05                 # the share of a vector that a step takes at least
MINUTES_UNLESS_SAID = 10.0              # of a run on a text of the user's own; see give_length
STARTS = ("scratch", "resume", "auto", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")    # init_from without a file
FIXED_FIELDS = MODEL_FIELDS | {"dataset", "optimizer", "ngram_optimizer"}   # what a resumed run cannot change

# --------------------------------------------------------------------------------------------------
# The model. Shapes: B sequences, T tokens, C = n_embd.

LOGITS_AT_ONCE = 2**21                  # of a batch with more, the loss is computed in pieces:
PIECE_ON_CPU = 8_000_000                # logits each, little enough to be kept by the allocator; see cpu.py
PIECE_ON_GPU = 200_000_000

def make_norm(cfg: Config):
    """Return a LayerNorm (arXiv 1607.06450) or an RMSNorm (arXiv 1910.07467)."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, cfg.norm_eps, cfg.norm_gain, cfg.bias)
    return nn.RMSNorm(cfg.n_embd, cfg.norm_eps, cfg.norm_gain)


def head_width(cfg: Config) -> int:
    """Return the number of dimensions of an attention head."""
    return cfg.head_dim or cfg.n_embd // cfg.n_head


def scale_frequency(cfg: Config, frequency):
    """Return the rotary frequencies after rope_scaling. llama3: where a pair turns seldom within
    rope_context, it is slowed down; where it turns often, it stays; between, in proportion."""
    if cfg.rope_scaling == "none":
        return frequency
    slowed = frequency / cfg.rope_factor
    if cfg.rope_scaling == "linear":
        return slowed
    turns = cfg.rope_context * frequency / (2 * math.pi)
    kept = (turns - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)
    return slowed.lerp(frequency, kept.clamp(0, 1))


def rotation_table(cfg: Config):
    """Return the cos and sin, (block_size, head_dim / 2) each, of the angle by which a position
    rotates a pair of dimensions. Pairs beyond rope_fraction are not rotated."""
    pairs = head_width(cfg) // 2
    turning = round(cfg.rope_fraction * pairs)
    frequency = torch.zeros(pairs)
    frequency[:turning] = cfg.rope_theta ** (-torch.arange(turning) / max(1, turning))
    frequency = scale_frequency(cfg, frequency)
    angle = torch.outer(torch.arange(cfg.block_size), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + head_dim / 2) of x (B, T, heads, head_dim) by the angles of their
    positions. cos and sin: (T, head_dim / 2)."""
    cos = cos[:, None]                  # (T, 1, head_dim / 2): the same for all heads
    sin = sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class NGrams(nn.Embedding):
    """Vectors for the n-grams of 2 to `longest` tokens that end at each token. Short n-grams say a
    lot about the next token, and attention takes long to learn them. They all share one table, and
    the hash of an n-gram picks its row. (Bigrams: record 62 of modded-nanogpt; longer n-grams: arXiv
    2501.16975.)

    Example: the ids 5, 7, 9. The 9 receives the sum of two rows of the table,
        row key2 % rows for the pair (7, 9), where key2 = 9 * FACTOR + (7 + 1), and
        row key3 % rows for the triple (5, 7, 9), where key3 = key2 * FACTOR + (5 + 1),
    with both keys modulo PRIME. The 1 is added so that 0 can stand for "before the context".

    The 5 is the first token, so it receives nothing, and the 7 only the row of (5, 7): n-grams that
    reach before the first token would be too rare in training to be learned. edges: they count, too,
    as in models from before this was so.
    """

    FACTOR = 1_540_483_477              # of a polynomial hash, as in Rabin and Karp's string search
    PRIME = 2**31 - 1

    def __init__(self, rows: int, width: int, longest: int, edges: bool = False):
        super().__init__(rows, width)
        self.longest = longest
        self.edges = edges

    def forward(self, ids, positions):
        """Return the summed vectors (B, T, C) of the n-grams that end at `positions` (T,) of ids
        (B, S)."""
        key = ids[:, positions].long()
        keys = []
        counts = []
        for distance in range(1, self.longest):
            earlier = positions - distance
            is_inside = earlier >= 0
            id_before = (ids[:, earlier.clamp(min=0)] + 1) * is_inside      # 0 before the context
            key = (key * self.FACTOR + id_before) % self.PRIME
            keys.append(key)
            counts.append(is_inside | self.edges)
        rows = torch.stack(keys, dim=2) % self.num_embeddings       # (B, T, longest - 1)
        weights = torch.stack(counts, dim=1).to(self.weight.dtype).expand(rows.shape)
        # The sum of the rows in one operation: they are never held side by side.
        x = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum",
                            per_sample_weights=weights.flatten(0, 1))
        return x.view(*rows.shape[:2], -1)


class Attention(nn.Module):
    """Causal self-attention. With n_kv_head < n_head, groups of queries share their keys and values
    (GQA, arXiv 2305.13245)."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head or cfg.n_head
        self.head_dim = head_width(cfg)
        self.qk_norm = cfg.qk_norm
        has_gain = cfg.qk_norm and cfg.qk_norm_gain
        self.q_gain = nn.Parameter(torch.ones(self.head_dim)) if has_gain else None      # the same for all heads
        self.k_gain = nn.Parameter(torch.ones(self.head_dim)) if has_gain else None
        self.norm_eps = cfg.norm_eps
        self.dropout = cfg.dropout if cfg.attn_dropout else 0.0
        bias = cfg.bias if cfg.qkv_bias == "auto" else cfg.qkv_bias
        self.q = nn.Linear(cfg.n_embd, self.n_head * self.head_dim, bias=bias)
        self.k = nn.Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.v = nn.Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.out = nn.Linear(self.n_head * self.head_dim, cfg.n_embd, bias=cfg.bias)
        mixes_values = cfg.shortcuts and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes_values else None

    def forward(self, x, rotation, v_first, cache=None):
        """Map x (B, T, C), already normed, to the output (B, T, C). Returns it and this block's
        values (B, T, n_kv_head, head_dim). v_first: the values of the first block."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim)        # (B, T, n_head, head_dim)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim)     # (B, T, n_kv_head, head_dim)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim)     # (B, T, n_kv_head, head_dim)
        if self.value_mix is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * v + mix[1] * v_first
        if self.qk_norm:
            q = self.normalize(q, self.q_gain)
            k = self.normalize(k, self.k_gain)
        if rotation is not None:
            q = rotate(q, *rotation)
            k = rotate(k, *rotation)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache)
        y = y.transpose(1, 2).reshape(B, T, -1)                     # the heads side by side
        return self.out(y), v

    def normalize(self, x, gain):
        """Return the RMS norm of each head of x (..., head_dim), times a gain (head_dim,) if there is one."""
        gain = None if gain is None else gain.to(x.dtype)
        return F.rms_norm(x, (self.head_dim,), gain, self.norm_eps)

    def attend(self, q, k, v, cache):
        """Return softmax(q k^T / sqrt(head_dim)) v, where each query sees the keys up to its own
        position. q and the result: (B, n_head, T, head_dim); k and v: (B, n_kv_head, T, head_dim)."""
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            mask = cache.mask()
        is_causal = mask is None and q.size(2) > 1
        dropout_p = self.dropout if self.training else 0.0
        if q.device.type == "cpu":      # the same sum, in causal blocks where a CPU is faster so
            return cpu.attention(q, k, v, mask, is_causal, dropout_p)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, enable_gqa=self.n_kv_head != self.n_head)


def relu_squared(x):
    return F.relu(x).square()


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them, or the three of SwiGLU (arXiv 2002.05202)."""

    activations = {"relu2": relu_squared, "relu": F.relu, "gelu": F.gelu,
                   "gelu_tanh": partial(F.gelu, approximate="tanh"), "swiglu": F.silu}

    def __init__(self, cfg: Config):
        super().__init__()
        gated = cfg.mlp == "swiglu"
        default_width = 128 * math.ceil(8 * cfg.n_embd / 3 / 128) if gated else 4 * cfg.n_embd
        width = cfg.ffn_dim or default_width
        self.activation = self.activations[cfg.mlp]
        self.up = nn.Linear(cfg.n_embd, width, bias=cfg.bias)
        self.gate = nn.Linear(cfg.n_embd, width, bias=cfg.bias) if gated else None
        self.down = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then an MLP. Each reads the residual stream through a norm and adds to it."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attn = Attention(cfg, layer)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.embed_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if cfg.shortcuts else None

    def forward(self, x, x_first, rotation, v_first, cache=None):
        """Map the stream x (B, T, C) to the next x. Returns it and this block's values. x_first: the
        stream as it entered the first block; v_first: that block's values."""
        if self.embed_mix is not None:
            mix = self.embed_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x_first
        y, v = self.attn(self.norm1(x), rotation, v_first, cache)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x, v


class CrossEntropyInPieces(torch.autograd.Function):
    """The mean cross-entropy of softmax(cap(x weight^T + bias)), some rows of x at a time. With a large
    vocabulary, the logits of a whole batch would be the largest tensors of a step by far.

    A piece's gradients are computed right after its loss, in the forward pass: to compute its logits
    again in the backward pass would cost a third more. (As in Liger Kernel, arXiv 2410.10989.)
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, vocab_size, cap, rows, needs_gradient):
        """x: (N, C). weight: (V, C), of which the rows from vocab_size on are padding. bias: (V,) or
        None. targets: (N,). cap: bound on the logits, 0 for none. rows: how many at a time."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        used_weight = weight[:vocab_size].to(dtype)
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if needs_gradient else None
        grad_weight = torch.zeros_like(weight) if needs_gradient else None
        grad_bias = torch.zeros_like(bias) if needs_gradient and bias is not None else None
        for first in range(0, len(x), rows):
            piece = slice(first, first + rows)
            x_piece = x[piece].to(dtype)
            targets_piece = targets[piece, None]                    # (rows, 1)
            z = (x_piece @ used_weight.mT).float()                  # (rows, vocab_size)
            if bias is not None:
                z += bias[:vocab_size]
            if cap:
                # cap z / sqrt(z^2 + cap^2) = z scale; its derivative is scale^3
                scale = torch.addcmul(torch.ones((), device=x.device), z, z, value=cap**-2).rsqrt_()
                z *= scale
            p = F.softmax(z, dim=-1)
            # The logarithm of the sum of exp(z), from the likeliest token, whose p is never 0. To take
            # p from a log_softmax instead would be four times as slow.
            log_sum = z.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
            loss += (log_sum - z.gather(1, targets_piece)).sum()
            if not needs_gradient:
                continue
            grad_z = p                                              # softmax - one-hot
            grad_z.scatter_add_(1, targets_piece, p.new_full(targets_piece.shape, -1))
            if cap:
                grad_z *= scale.pow_(3)
            if bias is not None:
                grad_bias[:vocab_size] += grad_z.sum(0)
            grad_z = grad_z.to(dtype)
            grad_x[piece] = grad_z @ used_weight
            if dtype == torch.float32:
                grad_weight[:vocab_size].addmm_(grad_z.mT, x_piece)
            else:
                grad_weight[:vocab_size] += grad_z.mT @ x_piece
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.count = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad_loss):
        share = grad_loss / ctx.count
        gradients = [None if gradient is None else gradient.mul_(share) for gradient in ctx.saved_tensors]
        return *gradients, None, None, None, None, None


class GPT(nn.Module):
    """A decoder-only transformer. Its switches span GPT-2 (OpenAI, 2019), Llama (arXiv 2302.13971)
    and the fast recipe of the modded-nanogpt speedruns (github.com/KellerJordan/modded-nanogpt)."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.cfg = cfg
        self.vocab_size = vocab_size
        rows = cfg.pad_vocab_to * math.ceil(vocab_size / cfg.pad_vocab_to)
        self.wte = nn.Embedding(rows, cfg.n_embd)
        self.ngrams = NGrams(cfg.ngram_rows, cfg.n_embd, cfg.ngrams, cfg.ngram_edges) if cfg.ngrams > 1 else None
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.positions == "learned" else None
        self.embed_norm = make_norm(cfg) if cfg.embed_norm else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.n_embd, rows, bias=cfg.head_bias)
        if cfg.tie_weights:
            self.head.weight = self.wte.weight
        cos, sin = rotation_table(cfg) if cfg.positions == "rope" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw the initial weights as cfg.init says. N-gram vectors always start at 0."""
        stream_outputs = set()
        for block in self.blocks:
            stream_outputs |= {block.attn.out, block.mlp.down}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and self.cfg.init != "torch":
                self.initialize_module(module, adds_to_stream=module in stream_outputs)
        if self.ngrams is not None:
            nn.init.zeros_(self.ngrams.weight)

    def initialize_module(self, module, adds_to_stream: bool):
        """Draw the weights of a linear layer or an embedding.

        gpt2: normal with std 0.02, and less where the output is added to the stream. kaiming: uniform
        (arXiv 1502.01852). zero: matrices whose output is added to the stream, and the head, start
        at 0; other matrices are normal, and embeddings keep PyTorch's std of 1."""
        init = self.cfg.init
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if init == "gpt2":
            std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if adds_to_stream else 0.02
            nn.init.normal_(module.weight, std=std)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        elif adds_to_stream or module is self.head:
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(0.33 / module.in_features))

    def forward(self, ids, targets=None):
        """Return (logits (B, T, vocab_size), None) for ids (B, T), or, if there are targets (B, T),
        (None, their mean cross-entropy in nats). T is at most block_size."""
        T = ids.size(1)
        if ids.size(1) > self.cfg.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.cfg.block_size}")
        positions = torch.arange(T, device=ids.device)
        x = self.embed(ids, ids, positions)
        x = self.transform(x, self.rotation(slice(T)))
        if targets is None:
            return self.logits(x), None
        return None, self.loss(x.flatten(0, 1), targets.flatten())

    def embed(self, ids, context, positions):
        """Return the residual stream (B, T, C) of ids (B, T) as it enters the first block. They stand
        at `positions` (T,) of the context, ids (B, S)."""
        x = self.wte(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(context, positions)
        kind = ids.device.type
        if torch.is_autocast_enabled(kind):
            # A stream in 16 bits halves the element-wise traffic.
            x = x.to(torch.get_autocast_dtype(kind))
        if self.wpe is not None:
            x = x + self.wpe(positions).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.dropout(x)

    def rotation(self, positions):
        """Return cos and sin (T, head_dim / 2) of `positions`, a slice or a tensor (T,); without rope,
        None."""
        if self.cos is None:
            return None
        return self.cos[positions], self.sin[positions]

    def transform(self, x, rotation, cache=None):
        """Pass the stream x (B, T, C) through all blocks and the last norm."""
        if rotation is not None:
            rotation = [table.to(x.dtype) for table in rotation]
        x_first = x
        v_first = None
        recompute = self.training and self.cfg.activation_checkpointing
        for block in self.blocks:
            if recompute:
                x, v = checkpoint(block, x, x_first, rotation, v_first, use_reentrant=False)
            else:
                x, v = block(x, x_first, rotation, v_first, cache)
            if v_first is None:
                v_first = v
        return self.norm(x)

    def logits(self, x):
        """Return float32 logits (..., vocab_size) for x (..., C), without the padding of the vocabulary."""
        z = self.head(x)[..., :self.vocab_size].float()
        cap = self.cfg.logit_cap
        if cap:
            z = z * cap * torch.rsqrt(z * z + cap * cap)
        return z

    def loss(self, x, targets):
        """Return the mean cross-entropy in nats of x (N, C) and targets (N,)."""
        if len(x) * self.vocab_size <= LOGITS_AT_ONCE:
            return F.cross_entropy(self.logits(x), targets)
        return self.loss_in_pieces(x, targets)

    # Not to be compiled: that would take minutes for its many pieces. This is torch.compiler.disable,
    # except that it does not import the compiler (1.5 s) until the first call.
    @torch._disable_dynamo
    def loss_in_pieces(self, x, targets):
        logits = PIECE_ON_CPU if x.device.type == "cpu" else PIECE_ON_GPU
        rows = max(1, logits // self.vocab_size)
        return CrossEntropyInPieces.apply(x, self.head.weight, self.head.bias, targets, self.vocab_size,
                                          self.cfg.logit_cap, rows, torch.is_grad_enabled())

    # -- Generation. Keys and values are cached, so that each token is computed once.

    def next_logits(self, ids, cache):
        """Return the logits (B, vocab_size) for the token after ids (B, T). `cache.advance(T)` comes
        before every call: it says where in the text these tokens stand."""
        context = cache.add_ids(ids)
        x = self.embed(ids, context, cache.positions)
        x = self.transform(x, self.rotation(cache.positions), cache)
        return self.logits(x[:, -1])

    def new_cache(self, batch_size: int, size: int):
        """Return an empty cache for `size` tokens of each of batch_size texts."""
        weight = self.wte.weight
        return Cache(self.cfg, batch_size, size, weight.device, weight.dtype)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens: int, pick, step=None):
        """Continue the prompts ids (B, T >= 1), and yield the ids (B,) of one new position at a time.

        pick: a function from logits (B, vocab_size) to ids (B,). step: next_logits, compiled for one
        token at a time; it is recompiled for every cache size, so sizes are rounded up to 128.

        When the context is full, the last half of the window is kept, and its keys and values are
        recomputed in one pass. In a rolling cache they would still depend on dropped tokens."""
        block_size = self.cfg.block_size
        window = new = ids[:, -block_size:]
        size = min(block_size, 128 * math.ceil((window.size(1) + max_new_tokens) / 128))
        cache = self.new_cache(len(ids), size)
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > block_size:
                window = new = window[:, -max(1, block_size // 2):]
                cache.clear()
            compiled = step is not None and new.size(1) == 1 and cache.length > 0
            cache.advance(new.size(1), fixed_shape=compiled)
            logits = step(new, cache) if compiled else self.next_logits(new, cache)
            token = pick(logits)
            yield token
            new = token[:, None]
            window = torch.cat((window, new), dim=1)


class Cache:
    """The keys and values of the tokens so far, two tensors (B, n_kv_head, size, head_dim) per block,
    and the tokens themselves, ids (B, size), for the n-grams.

    positions (T,): where the tokens stand that the model is computing now.
    length: the number of tokens up to and including these.
    """

    def __init__(self, cfg: Config, batch_size: int, size: int, device, dtype):
        shape = (batch_size, cfg.n_kv_head or cfg.n_head, size, head_width(cfg))
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layer)]
        self.ids = torch.zeros(batch_size, size, device=device, dtype=torch.int64)
        self.size = size
        self.clear()

    def clear(self):
        self.length = 0
        self.visible = 0
        self.positions = None
        self.fixed_shape = False

    def advance(self, count: int, fixed_shape: bool = False):
        """Move on to the next `count` tokens.

        fixed_shape: attention looks at all places of the cache, through a mask, and not only at those
        in use, because compiled code needs shapes that do not change."""
        self.positions = torch.arange(self.length, self.length + count, device=self.ids.device)
        self.length += count
        self.fixed_shape = fixed_shape
        self.visible = self.size if fixed_shape else self.length

    def add_ids(self, ids):
        """Store ids (B, T) at the positions, and return the ids of all visible places."""
        self.ids.index_copy_(1, self.positions, ids.long())
        return self.ids[:, :self.visible]

    def extend(self, layer: int, keys, values):
        """Store keys and values (B, n_kv_head, T, head_dim) at the positions, and return those of all
        visible places."""
        self.keys[layer].index_copy_(2, self.positions, keys)
        self.values[layer].index_copy_(2, self.positions, values)
        return self.keys[layer][:, :, :self.visible], self.values[layer][:, :, :self.visible]

    def mask(self):
        """Return which visible places each position may see, (T, visible), or None where no mask is
        needed: a single token sees all places in use, and the first tokens of a text are causal."""
        count = len(self.positions)
        if not self.fixed_shape and count in (1, self.visible):
            return None
        return torch.arange(self.visible, device=self.positions.device) <= self.positions[:, None]

    def tensors(self) -> list:
        return [*self.keys, *self.values, self.ids]


def draw(logits, temperature: float, uniform=None):
    """Draw ids (B,) from softmax(logits (B, vocab_size) / temperature); at temperature 0, take the
    most likely ones. uniform (B,): the random numbers in [0, 1) to draw with: the id is the first one
    at which the cumulative probability exceeds the number."""
    if temperature < 1e-30:                             # so close to 0 that it is greedy anyway
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)     # so that no temperature makes them infinite
    p = torch.softmax(logits / temperature, -1)
    # In float32 the many small probabilities of a large vocabulary would be lost in their sum.
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    sums = p.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = torch.rand(len(p), dtype=dtype, device=p.device)
    threshold = uniform.to(sums)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, threshold, right=True)[:, 0]


# --------------------------------------------------------------------------------------------------
# Optimizers and the learning rate


class ScheduledOptimizer:
    """What training needs from an optimizer besides PyTorch's own methods. Each parameter group has a
    base_lr, which the schedule scales.

    found_inf: on a GPU, the tensor in which Guard says that a loss or gradient was not finite. While
    it is 1, step() must change nothing, as PyTorch's fused optimizers do.
    """

    found_inf = None

    # PyTorch's own, without their decorator, which would import the compiler: 1.5 s, even where nothing
    # is compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def set_rates(self, factor: float, step: int):
        """Set what changes over time, for update number `step`: scale every base_lr by `factor`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def state_shapes(self, p, group: dict) -> dict:
        """Return the names and shapes of the tensors that the optimizer keeps for parameter p of a
        group; a checkpoint that holds anything else is refused."""
        raise TypeError(f"{type(self).__name__} does not say what its state looks like")

    def compile_update(self):
        """Compile the parts of the update that gain from it. Called when the model is compiled."""

    def working_bytes(self) -> int:
        """Return the temporary memory that step() needs, for --dry_run."""
        return 0


class AdamW(ScheduledOptimizer, torch.optim.AdamW):
    """PyTorch's AdamW (arXiv 1711.05101), with the methods that training needs."""

    def state_shapes(self, p, group):
        return {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}

    @torch.no_grad()
    def step(self):
        inspect.unwrap(torch.optim.AdamW.step)(self)        # as above: it would import the compiler


def orthogonalize(m, steps: int = 5):
    """Bring the singular values of each matrix of m (n, rows, cols) near 1, to 0.65-1.2, by a
    quintic Newton-Schulz iteration in m's precision. Coefficients: Keller Jordan,
    kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = m.size(1) > m.size(2)
    x = m.mT if is_tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if is_tall else x


def nesterov(grad, average, momentum, dtype):
    """Update the average of the gradients (n, rows, cols) in place; return Nesterov's momentum."""
    average.lerp_(grad, 1 - momentum)
    return grad.lerp(average, momentum).to(dtype)


def apply_update(w, update, lr, decay, cautious: bool):
    """Return the matrices w (n, rows, cols) after a step along `update`, with weight decay. cautious:
    decay only the weights that the update shrinks anyway (arXiv 2411.16085)."""
    update = update.float() * max(1, w.size(1) / w.size(2)) ** 0.5
    decayed = w * (update * w > 0) if cautious else w
    return w - lr * (update + decay * decayed)


class Muon(ScheduledOptimizer, torch.optim.Optimizer):
    """Orthogonalized momentum for the blocks' matrices (Jordan et al. 2024). Matrices of equal shape
    are stacked, so that orthogonalizing is a few batched products. map_stacked: applies a function to
    a stack; with it, the processes of a run divide the work."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float, cautious: bool,
                 dtype: torch.dtype = torch.float32, map_stacked=None):
        by_shape = {}
        for p in params:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        groups = [{"params": matrices} for matrices in by_shape.values()]
        super().__init__(groups, dict(
            lr=lr, base_lr=lr, weight_decay=weight_decay, momentum=momentum, cautious=cautious))
        self.full_momentum = momentum
        self.dtype = dtype
        self.map_stacked = map_stacked
        self.nesterov = nesterov
        self.orthogonalize = orthogonalize
        self.apply_update = apply_update

    def set_rates(self, factor: float, step: int):
        """Also raise the momentum from 0.85 to its full value over the first 100 steps."""
        super().set_rates(factor, step)
        missing = max(0, 1 - step / 100) * max(0, self.full_momentum - 0.85)
        for group in self.param_groups:
            group["momentum"] = self.full_momentum - missing

    def state_shapes(self, p, group):
        # The first matrix of a group keeps the average of all.
        return {"average": (len(group["params"]), *p.shape)}

    def compile_update(self):
        self.nesterov = compile_function(nesterov)
        self.orthogonalize = compile_function(orthogonalize)
        self.apply_update = compile_function(apply_update)

    def working_bytes(self):
        # Up to nine tensors of the size of a group's matrices.
        return max(9 * sum(p.nbytes for p in group["params"]) for group in self.param_groups)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            w = torch.stack(params)                                 # (n, rows, cols)
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["average"] = torch.zeros_like(w)
            # As tensors: torch.compile would recompile for every new value of a Python number.
            lr = torch.full((), group["lr"], device=w.device)
            decay = torch.full((), group["weight_decay"], device=w.device)
            momentum = torch.full((), group["momentum"], device=w.device)
            if self.found_inf is not None:
                is_bad = self.found_inf > 0
                grad = grad.masked_fill(is_bad, 0)
                lr = lr.masked_fill(is_bad, 0)
                momentum = momentum.masked_fill(is_bad, 1)
            update = self.nesterov(grad, state["average"], momentum, self.dtype)
            if self.map_stacked is None:
                update = self.orthogonalize(update)
            else:
                update = self.map_stacked(self.orthogonalize, update)
            w = self.apply_update(w, update, lr, decay, group["cautious"])
            torch._foreach_copy_(params, list(w.unbind()))


class RowAdam(ScheduledOptimizer, torch.optim.Optimizer):
    """For a table of which a batch reads only some rows: Adam (arXiv 1412.6980) without momentum, so that a row moves
    only in a step that reads it, and with one mean square for each row instead of one for each number, as in FBGEMM's
    row-wise Adam. All rows decay. Its state is one number a row, where AdamW keeps two tables."""

    def __init__(self, table, lr: float, weight_decay: float, beta2: float, eps: float):
        """table: a parameter (rows, width)."""
        super().__init__([table], dict(lr=lr, base_lr=lr, weight_decay=weight_decay, beta2=beta2, eps=eps))

    def state_shapes(self, p, group):
        return {"steps": (), "mean_square": (len(p), 1)}

    def working_bytes(self):
        table, = self.param_groups[0]["params"]
        return table.nbytes if table.is_cuda else 0     # there, a copy of the gradient without what is not finite

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            table, = group["params"]
            state = self.state[table]
            if not state:
                state["steps"] = torch.zeros((), device=table.device)
                state["mean_square"] = torch.zeros(len(table), 1, device=table.device)
            grad = table.grad
            lr = torch.full((), group["lr"], device=table.device)
            newness = torch.full((), 1 - group["beta2"], device=table.device)
            counts = torch.ones((), device=table.device)
            if self.found_inf is not None:
                is_bad = self.found_inf > 0
                grad = grad.masked_fill(is_bad, 0)
                lr, newness, counts = (number.masked_fill(is_bad, 0) for number in (lr, newness, counts))
            state["steps"] += counts
            square = torch.linalg.vector_norm(grad, dim=1, keepdim=True).square() / table.size(1)
            state["mean_square"].lerp_(square, newness)
            # At first the mean still holds much of the 0 that it began with; this is the share that it does not.
            share = (1 - group["beta2"] ** state["steps"]).clamp(min=1e-30)
            size = (state["mean_square"] / share).sqrt()
            table.mul_(1 - lr * group["weight_decay"])
            table.addcmul_(grad, -lr / (size + group["eps"]))


def adamw_from_table(table: list, cfg: Config, device: str) -> AdamW:
    """Return AdamW with a group for each row (parameters, learning rate, weight decay) of a table."""
    groups = []
    for params, lr, decay in table:
        if cfg.decay_all and not decay:
            decay = cfg.weight_decay
        if params:
            groups.append(dict(params=params, lr=lr, base_lr=lr, weight_decay=decay))
    fused = device_type(device) in ("cpu", "cuda")
    return AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=fused)


def make_adamw(model: GPT, cfg: Config, device: str, dtype: str, map_stacked) -> list:
    """AdamW for everything; gains, biases and mixing weights do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    small = [p for p in model.parameters() if p.dim() < 2]
    table = [
        (matrices, cfg.learning_rate, cfg.weight_decay),
        (small, cfg.learning_rate, 0.0),
    ]
    return [adamw_from_table(table, cfg, device)]


def make_muon(model: GPT, cfg: Config, device: str, dtype: str, map_stacked) -> list:
    """Muon for the blocks' matrices, RowAdam for the n-gram vectors, AdamW for all else."""
    embeddings = [module.weight for module in (model.wte, model.wpe) if module is not None]
    ngrams = [] if model.ngrams is None else [model.ngrams.weight]
    row_adam = []
    if ngrams and cfg.ngram_optimizer == "rowadam":
        row_adam = [RowAdam(*ngrams, cfg.ngram_lr, cfg.ngram_decay, cfg.beta2, cfg.adam_eps)]
        ngrams = []
    head = [] if cfg.tie_weights else [model.head.weight]
    small = [p for p in model.parameters() if p.dim() < 2]
    table = [
        (embeddings, cfg.embed_lr, 0.0),
        (ngrams, cfg.embed_lr, cfg.ngram_decay),
        (head, cfg.head_lr, 0.0),
        (small, cfg.scalar_lr, 0.0),
    ]
    muon = Muon(
        [p for p in model.blocks.parameters() if p.dim() == 2],
        lr=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        cautious=cfg.cautious,
        dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        map_stacked=map_stacked)
    return [adamw_from_table(table, cfg, device), muon, *row_adam]


# By the name that cfg.optimizer gives. Each function returns the ScheduledOptimizers in which every
# parameter of the model is exactly once. dtype: the run's precision; map_stacked: see Muon.
OPTIMIZERS = {"muon": make_muon, "adamw": make_adamw}


def make_optimizers(model: GPT, cfg: Config, device: str, dtype="float32", map_stacked=None) -> list:
    """Return the optimizers of cfg.optimizer, after a look at whether they hold every parameter once:
    one that is left out would never train."""
    optimizers = OPTIMIZERS[cfg.optimizer](model, cfg, device, dtype, map_stacked)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for name, p in model.named_parameters():
        count = sum(p is q for group in groups for q in group["params"])
        assert count == 1, f"{name} is in {count} parameter groups"
    return optimizers


def lr_factor(step: int, cfg: Config, breakpoints: list) -> float:
    """Return the factor that scales every learning rate at update number `step` (from 0): it rises
    over the warm-up, then falls from 1 to min_lr / learning_rate as cfg.schedule says.

    breakpoints: [(0, end of the run), (step, its end as seen from that step), ...]. A run of known
    length has one; a run by the clock moves its end as its pace changes. The factor is a continuous
    function of the step all the same.
    """
    if not cfg.decay_lr:
        return 1.0
    lowest = cfg.min_lr / cfg.learning_rate if cfg.learning_rate else 0.0
    factor = lowest + (1 - lowest) * schedule_height(step, cfg, breakpoints)
    if step < cfg.warmup_iters:
        factor = min(factor, (step + 1) / (cfg.warmup_iters + 1))
    return factor


def schedule_height(step: int, cfg: Config, breakpoints: list) -> float:
    """Return how far the schedule still has to fall: 1 at first, 0 from the end on.

    After a breakpoint, the schedule is the one with the new end, scaled so that it begins at the height
    that the old one had reached."""
    if cfg.lr_decay_iters:
        return height_of_one(step, cfg, cfg.lr_decay_iters)
    scale = 1.0
    end = breakpoints[0][1]
    for moved_at, new_end in breakpoints[1:]:
        if step <= moved_at:
            break
        reached = scale * height_of_one(moved_at, cfg, end)
        begins_at = height_of_one(moved_at, cfg, new_end)
        scale = reached / begins_at if begins_at else 0.0
        end = new_end
    return scale * height_of_one(step, cfg, end)


def height_of_one(step: int, cfg: Config, end: int) -> float:
    """Return schedule_height for a schedule whose end does not move."""
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress)))
    if cfg.schedule == "linear":
        steps_left = max(0.0, end - step)
        return min(1.0, steps_left / max(1e-9, cfg.cooldown * end))
    return 1.0


# --------------------------------------------------------------------------------------------------
# Batches


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, windows: int, tokens: int):
    """Return the order of an epoch's windows, and the token at which its first window starts."""
    rng = np.random.default_rng([seed, 1, epoch])
    return random_order(rng, windows), int(rng.integers(tokens))


def window_starts(step: int, cfg: Config, tokens: int):
    """Return where the windows of update number `step` start: batch_size *
    gradient_accumulation_steps places. They depend on the seed, the step and the number of tokens
    alone, so a resumed run needs no saved position.

    An epoch visits floor(tokens / block_size) windows that do not overlap. The text is a circle that
    starts at a random token in every epoch (with sampling=fixed, at its beginning)."""
    count = cfg.batch_size * cfg.gradient_accumulation_steps
    if cfg.sampling == "random":
        rng = np.random.default_rng([cfg.seed, 0, step])
        return rng.integers(0, tokens - cfg.block_size, count)
    windows = tokens // cfg.block_size
    starts = []
    for number in range(step * count, (step + 1) * count):
        order, offset = epoch_order(cfg.seed, number // windows, windows, tokens)
        if cfg.sampling == "fixed":
            offset = 0
        starts.append((offset + order[number % windows] * cfg.block_size) % tokens)
    return np.array(starts)


def get_batch(data, starts, block_size: int, vocab_size: int, split: str, device: str):
    """Return inputs and targets, (len(starts), block_size) each: windows of the memory-mapped ids
    `data`, and the same windows one token ahead. Raises UserError for ids beyond the vocabulary."""
    places = starts[:, None] + np.arange(block_size + 1)            # (windows, block_size + 1)
    ids = data[places % len(data)]
    check_ids(ids, vocab_size, split)
    ids = torch.from_numpy(ids.astype(np.int64))
    if device.startswith("cuda"):
        ids = ids.pin_memory()          # so that the copy runs while the GPU computes
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


# --------------------------------------------------------------------------------------------------
# A run, and what one step needs


@dataclass
class Origin:
    """What a run starts from; by default, from scratch.

    checkpoint: the content of last.pt when resuming, or of the checkpoint whose weights to take.
    stored_plan: the entries of that run's Plan that still hold.
    fit_to_time: max_minutes decides the number of steps.
    seconds_used: those of max_minutes that earlier processes of the run have taken.
    stamp: last.pt's file stamp when it was read; None if it does not matter.
    given: of a new run by the clock, the settings that the user has given; a plan chooses others.
        None: nothing is chosen.
    deadline: the end of that run's time; None: max_minutes begin with the plan.
    most_steps: after which it ends even if there is time left; 0: none.
    """

    checkpoint: dict | None = None
    resuming: bool = False
    stored_plan: dict = field(default_factory=dict)
    fit_to_time: bool = False
    seconds_used: float = 0.0
    stamp: tuple | None = None
    given: dict | None = None
    deadline: Deadline | None = None
    most_steps: int = 0


@dataclass
class Plan:
    """What the settings left open, decided for this machine. It is stored in last.pt, so a resumed
    run does not measure precision and compiling again. Compiling is decided a little later than the rest,
    and, if max_minutes sets the length, so are the end and the evaluations."""

    device: str
    dtype: str                          # float32, bfloat16 or float16
    compile: Literal["auto", True, False]   # auto: not decided yet
    breakpoints: list                   # [[0, steps of the run], ...], see lr_factor; empty: not known yet
    sequences: int                      # of a step, for this process
    micro_batches: int                  # of a step, for this process
    evaluations: dict                   # see inkling/evaluation.py; empty: not known yet
    ngram_decay: float                  # weight decay of the n-gram vectors
    fit_to_time: bool = False           # max_minutes decides the number of steps; else it can only end the run earlier
    most_steps: int = 0                 # with fit_to_time: that number is at most this; 0: any
    resumed_at: int = 0                 # the latest step at which a resume changed what the run computes; 0: none
    expected: list = field(default_factory=list)    # the least and the most bits per byte of val at the end; empty:
                                        # not known

    @property
    def max_iters(self) -> int | None:
        """The steps of the whole run; None: not known yet."""
        return self.breakpoints[-1][1] if self.breakpoints else None

    @property
    def eval_interval(self) -> int:
        return self.evaluations["interval"]


@dataclass
class State:
    """Where a run stands. It is part of every checkpoint; only the loop (see `train`) changes it."""

    step: int = 0                       # updates made or, in float16, skipped
    tokens: int = 0                     # seen in them: a resumed run may have another batch_size
    evaluated: int | None = None        # step of the latest evaluation; None: there was none
    best_step: int = 0                  # step of the best evaluation
    best_val_loss: float = math.inf
    losses: dict = field(default_factory=dict)      # of the latest evaluation, train and val


@dataclass
class Run:
    """Everything that a training step needs. `start` builds it."""

    cfg: Config
    plan: Plan
    state: State
    ranks: Ranks
    data: dict                          # token ids, train and val
    meta: dict                          # what meta.json says of them
    tokenizer: Tokenizer
    model: GPT
    step_model: nn.Module               # the model as it trains: compiled, or wrapped by DDP
    optimizers: list
    scaler: torch.amp.GradScaler        # of float16; otherwise it does nothing
    guard: Guard
    stopwatch: Stopwatch
    first_step: int                     # the step at which this process began
    folder: RunFolder | None = None     # where it is saved; None: nowhere
    compile_seconds: float = 0.0
    deadline: Deadline = field(default_factory=partial(Deadline, 0))
    seconds_per_window: float = 0.0     # of an evaluation
    steps_per_look: int = 1             # how often several processes look together at signals and the clock
    choice: planning.Choice | None = None   # the settings that were chosen for it, and why
    given: dict = field(default_factory=dict)   # those that could have been chosen, but were given

    @property
    def tokens_per_step(self) -> int:
        """The tokens that all processes together read in one step."""
        return self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.cfg.block_size

    @property
    def tokens_per_epoch(self) -> int:
        """The tokens of the whole windows of the train split."""
        return len(self.data["train"]) // self.cfg.block_size * self.cfg.block_size

    def batches(self, step: int):
        """Yield this process's micro-batches of update number `step`: pairs (x, y), each of shape
        (sequences / micro_batches, block_size)."""
        starts = window_starts(step, self.cfg, len(self.data["train"]))
        begin = self.ranks.rank * self.plan.sequences
        mine = starts[begin:begin + self.plan.sequences]
        for micro_starts in mine.reshape(self.plan.micro_batches, -1):
            yield self.windows("train", micro_starts)

    def windows(self, split: str, starts):
        """Return the windows of a split that begin at `starts`, as get_batch does."""
        return get_batch(self.data[split], starts, self.cfg.block_size, self.model.vocab_size, split,
                         self.plan.device)

    def forward_backward(self, model=None, windows: int | None = None):
        """Run one forward and backward pass over the first micro-batch, or over its first `windows`, and
        discard the gradients."""
        if model is None:
            model = self.step_model
        x, y = next(self.batches(0))
        x = x[:windows]
        y = y[:windows]
        with autocast(self.plan.device, self.plan.dtype):
            loss = model(x, y)[1]
        loss.backward()
        self.model.zero_grad(set_to_none=True)


def start(cfg: Config, origin: Origin | None = None) -> Run:
    """Build a run that is ready for its next update: data, plan, model, optimizers and state.

    Nothing is compiled, and nothing is written, except that a missing built-in data set is prepared.
    Raises UserError."""
    cli.check(cfg)
    origin = origin or Origin()
    ranks = Ranks()
    device = ranks.join(cfg.backend, choose_device(cfg.device))
    configure_torch(device)
    folder = ensure_set(cfg.dataset, cfg.data_dir, ranks)
    choice = choose_settings(cfg, origin, ranks, device, folder)
    given = {name: getattr(cfg, name) for name in planning.SETTINGS if name in (origin.given or {})}
    cfg = replace(cfg, **choice.settings)
    # Only a plan that ends before the time is over chooses it.
    origin = replace(origin, most_steps=choice.settings.get("max_iters", 0))
    run = build_run(cfg, origin, ranks, device, folder)
    run.choice = choice
    run.given = given
    if choice.expected:
        run.plan.expected = list(choice.expected)
    return run


def build_run(cfg: Config, origin: Origin, ranks: Ranks, device: str, folder: Path) -> Run:
    """Build a run on the data set in `folder`, whose settings have been chosen. Raises UserError."""
    data, meta = open_data(folder, cfg.block_size)
    tokenizer = stored_tokenizer(folder, meta)
    if tokenizer.eot is None:
        tokenizer.start = start_of_texts(tokenizer, meta.get("joiner"), data["train"])
    check_origin(origin, cfg, tokenizer, meta)
    sample_prompt(cfg, tokenizer)       # a wrong prompt fails now, not later
    plan = make_plan(cfg, ranks, device, len(data["train"]), origin)

    torch.manual_seed(cfg.seed)
    if origin.checkpoint:
        model, _ = restore_model(origin.checkpoint, "the checkpoint", cfg)
    else:
        model = GPT(cfg, meta["vocab_size"])
    model = ranks.fully_shard(model.train()) if cfg.shard else model.train().to(device)
    if device_type(device) == "cpu":
        cpu.accelerate(model)
    decided = replace(cfg, ngram_decay=plan.ngram_decay)
    optimizers = make_optimizers(model, decided, device, plan.dtype, map_stacked=ranks.map_stacked)
    scaler = torch.amp.GradScaler(device_type(device), enabled=plan.dtype == "float16")
    state = State()
    seconds = 0.0
    pause = 0.0
    if origin.resuming:
        state = State(**{name: origin.checkpoint[name] for name in asdict(state)})
        seconds = origin.checkpoint["seconds"]
        pause = origin.checkpoint.get("pause", 0.0)
        restore_optimizers(optimizers, scaler, origin.checkpoint)
    run = Run(cfg, plan, state, ranks, data, meta, tokenizer, model, step_model=model,
              optimizers=optimizers, scaler=scaler, first_step=state.step,
              guard=Guard(ranks, optimizers, scaler, device, plan.dtype),
              stopwatch=Stopwatch(device, seconds, pause))
    if plan.breakpoints and not plan.evaluations:
        decide_evaluations(run)
    if device_type(device) not in ("cpu", "cuda") and ranks.first:
        compare_with_cpu(model, *next(run.batches(0)), device)
    return run


def choose_settings(cfg: Config, origin: Origin, ranks: Ranks, device: str, folder: Path) -> planning.Choice:
    """Choose, for a new run by the clock, the settings that the user has not given: see inkling/plan.py. For any
    other run, choose nothing."""
    if origin.given is None:
        return planning.Choice({})
    given = origin.given | without_effect(cfg)
    text = planning.Text.of(read_meta(folder))
    if given.keys() & {*MODEL_FIELDS, *planning.SETTINGS, "optimizer", "ngram_decay"}:
        text = replace(text, ngram_bits=0.0)        # what to expect is known of planned models only
    seconds_left = ranks.broadcast(origin.deadline.seconds_left() if origin.deadline else 60 * cfg.max_minutes)
    may_compile = cfg.compile in (True, "auto") and not compiler_missing(device)
    seconds = planning.seconds_of_training(max(0.1, seconds_left), may_compile)
    dtype = ranks.broadcast(choose_dtype(device, cfg.dtype))
    trial_origin = Origin(stored_plan={"device": device, "dtype": dtype, "compile": False})

    def seconds_per_step(settings: dict) -> float:
        trial = replace(cfg, max_minutes=0.0, **settings)
        cli.check(trial)
        most_seconds = min(SECONDS_OF_A_TRIAL, 0.05 * seconds_left)
        return time_a_step(build_run(trial, trial_origin, ranks, device, folder), most_seconds)

    memory = free_memory(device)
    if device_type(device) == "cpu":    # which the processes of a machine share
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if origin.checkpoint:
        names = (*planning.RATES, "block_size", *planning.BATCH_SETTINGS)
        defaults = {name: getattr(cfg, name) for name in names}
        return planning.choose_for_checkpoint(text, seconds, given, defaults, seconds_per_step, ranks.world)
    tried = try_within(TRIALS_OF_THE_TIME * seconds_left, seconds_per_step, ranks)
    return planning.choose(text, seconds, ranks.broadcast(memory), given, tried, ranks.world)


def try_within(seconds: float, seconds_per_step, ranks: Ranks):
    """Return seconds_per_step(settings) that tries no model more once the trials have taken so many seconds, as on a
    busy machine: a smaller one then counts as slow as the last that was tried, and a larger one as too slow."""
    began = time.monotonic()
    trials = []                         # (settings, seconds per step)

    def size(settings: dict) -> int:
        return settings["n_layer"] * settings["n_embd"]

    def seconds_as_tried(settings: dict) -> float:
        if not trials and ranks.first:
            print("trying   a few steps, to choose what fits into the time ...", flush=True)
        if not trials or ranks.broadcast(time.monotonic() - began) < seconds:
            trials.append((settings, seconds_per_step(settings)))
            return trials[-1][1]
        last, seconds_of_last = trials[-1]
        return seconds_of_last if size(settings) < size(last) else math.inf
    return seconds_as_tried


def without_effect(cfg: Config) -> dict:
    """Return the settings that a plan could choose, but that have no effect with the others, or another one, as they
    are."""
    names = set()
    if cfg.ngrams < 2 or cfg.ngram_optimizer != "rowadam":
        names.add("ngram_lr")
    if cfg.optimizer != "muon":
        names |= set(planning.RATES) - {"learning_rate"}
        names.add("weight_decay")       # of all matrices, at another rate
    return {name: getattr(cfg, name) for name in names}


def time_a_step(run: Run, most_seconds: float) -> float:
    """Return about how many seconds a step takes, the same on all ranks: the shortest of three, or of as many more, up
    to ten, as begin within most_seconds; a first one of over 5 s stands alone. This trains the run's model a little.
    Raises UserError if a loss is not finite."""
    seconds = []
    while len(seconds) < 3 or (len(seconds) < 10 and sum(seconds) < most_seconds):
        began = time.perf_counter()
        try:
            update(run, len(seconds))
        except NotFinite as error:
            raise UserError(f"while the run was planned, {error}: try a lower --learning_rate", 3)
        synchronize(run.plan.device)
        seconds.append(run.ranks.broadcast(time.perf_counter() - began))
        if seconds[0] > 5:              # long enough to be exact
            break
    return min(seconds)


def configure_torch(device: str):
    """Set PyTorch's switches for the whole process."""
    torch.set_float32_matmul_precision("high")          # TF32, for what stays in float32 on a GPU
    # On a CPU only. Without it, threads add up the gradients of embeddings in random order.
    # (use_deterministic_algorithms would import the compiler for its sake; compile_model calls it.)
    torch.set_deterministic_debug_mode("error" if device_type(device) == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device_type(device) == "cpu":
        cpu.keep_freed_memory()


def check_origin(origin: Origin, cfg: Config, tokenizer: Tokenizer, meta: dict):
    """Raise UserError if the checkpoint that a run starts from belongs to other data."""
    if origin.checkpoint and origin.checkpoint["tokenizer"] != tokenizer.stored:
        raise UserError(
            f"data set {cfg.dataset} has another tokenizer than the checkpoint: prepare it with the checkpoint's "
            f"own (prepare.py --tokenizer={own_tokenizer(cfg)})")
    text = text_checksum(meta)
    if origin.resuming and origin.checkpoint.get("text", text) != text:
        raise UserError(
            f"data set {cfg.dataset} has changed since the run began: restore it, or start from scratch")


def own_tokenizer(cfg: Config) -> str:
    """Return what to say to prepare.py for the tokenizer of the checkpoint that a run starts from."""
    if cfg.init_from in ("resume", "auto"):
        return f"{cfg.out_dir}/last.pt"
    if os.path.isfile(Path(cfg.init_from, "ckpt.pt")):
        return f"{cfg.init_from}/ckpt.pt"
    return cfg.init_from if os.path.exists(cfg.init_from) else "gpt2"


def text_checksum(meta: dict) -> str:
    """Return the checksum by which a resumed run recognizes its training text."""
    return meta["splits"]["train"]["sha256"]


def make_plan(cfg: Config, ranks: Ranks, device: str, tokens: int, origin: Origin) -> Plan:
    """Decide what the settings leave open, unless the run that is resumed has decided it already."""
    sequences_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
    sequences, micro_batches = ranks.share(sequences_per_step, cfg.batch_size)
    stored = origin.stored_plan
    if device_type(stored.get("device", device)) != device_type(device):
        stored = {}                     # what was measured on another kind of device is of no use here
    dtype = choose_dtype(device, stored.get("dtype", cfg.dtype))
    if cfg.shard and dtype == "float16":    # which a sharded run does not support
        dtype = "float32"
    return Plan(
        device=device,
        dtype=ranks.broadcast(dtype),
        compile=stored.get("compile", cfg.compile),
        breakpoints=choose_breakpoints(cfg, tokens, origin),
        sequences=sequences,
        micro_batches=micro_batches,
        evaluations=origin.stored_plan.get("evaluations", {}),
        ngram_decay=choose_ngram_decay(cfg, tokens, origin),
        fit_to_time=origin.fit_to_time,
        most_steps=origin.stored_plan.get("most_steps", origin.most_steps),
        resumed_at=origin.stored_plan.get("resumed_at", 0),
        expected=origin.stored_plan.get("expected", []))


def choose_ngram_decay(cfg: Config, tokens: int, origin: Origin) -> float:
    """Return the weight decay of the n-gram vectors, for a train split of so many tokens. A vector of a rare n-gram
    that still holds what followed it when a step reads the same place again makes the loss look solved, and nothing
    else learns there. With auto, the steps of one epoch shrink what is not read in them to e^-NGRAM_FORGETTING; in a
    long text that would be too slow, and a step takes at least LEAST_FORGETTING."""
    if cfg.ngram_decay != "auto":
        return float(cfg.ngram_decay)
    if "ngram_decay" in origin.stored_plan:
        return origin.stored_plan["ngram_decay"]
    name = "ngram_lr" if cfg.ngram_optimizer == "rowadam" else "embed_lr"
    rate = getattr(cfg, name)
    if not rate:
        return 0.0
    if origin.checkpoint and not origin.resuming:           # at a lower rate, trained vectors are forgotten more slowly
        rate = max(rate, getattr(Config, name))
    steps_per_epoch = tokens / (cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size)
    shrinks_by = max(LEAST_FORGETTING, 1 - math.exp(-NGRAM_FORGETTING / steps_per_epoch))  # a step at the full rate
    rounded = float(f"{shrinks_by / rate:.2g}")
    return min(rounded, 1 / rate, 2.0**31)      # a step does not turn a vector round


def choose_breakpoints(cfg: Config, tokens: int, origin: Origin) -> list:
    """Return the breakpoints that are known before the run: none, if max_minutes will set the length
    of a new one."""
    if "breakpoints" in origin.stored_plan:
        return [list(pair) for pair in origin.stored_plan["breakpoints"]]
    if origin.fit_to_time:
        return []
    if cfg.breakpoints:
        return read_breakpoints(cfg.breakpoints)
    if cfg.max_epochs:
        windows = tokens // cfg.block_size
        windows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
        return [[0, max(1, int(cfg.max_epochs * windows / windows_per_step))]]
    return [[0, cfg.max_iters]]


def decide_evaluations(run: Run):
    """Decide how often the run evaluates, and on how many windows; see inkling/evaluation.py."""
    cfg = run.cfg
    eval_iters = cfg.eval_iters
    if cfg.eval_only and eval_iters == "auto":
        eval_iters = 0
    evaluations = plan_evaluations(
        steps=run.plan.max_iters,
        step_windows=cfg.batch_size * cfg.gradient_accumulation_steps,
        val_windows=(len(run.data["val"]) - 1) // cfg.block_size,
        eval_interval=cfg.eval_interval,
        eval_iters=eval_iters)
    run.plan.evaluations = asdict(evaluations)


def estimate_pace(run: Run, report: Report) -> float:
    """Return about how many seconds a step takes uncompiled, and report how long that makes the run:
    before anything that takes long itself, such as compiling."""
    if not passes_to_come(run):
        return 0.0
    if run.state.step and run.stopwatch.seconds():      # a resumed run knows it
        seconds_per_step = run.ranks.broadcast(run.stopwatch.seconds() / run.state.step)
    else:
        windows = run.plan.sequences // run.plan.micro_batches
        pass_seconds = seconds_of_a_pass(run.forward_backward, windows, run.ranks)
        seconds_per_step = pass_seconds * run.plan.micro_batches
    if run.plan.max_iters is not None:
        report.estimate(seconds_per_step * (run.plan.max_iters - run.state.step), seconds_per_step)
    return seconds_per_step


def compile_and_wrap(run: Run, report: Report | None = None, seconds_per_step: float | None = None):
    """Compile the model where torch.compile pays, and wrap it for several processes.
    seconds_per_step: see estimate_pace."""
    plan = run.plan
    note = "off"
    cost_key = compile_key(run)
    expected_seconds = compile_cost.expected_seconds(cost_key)
    if plan.compile == "auto":
        seconds_left = run.deadline.seconds_left()
        if plan.max_iters is not None and seconds_per_step is not None:
            seconds_left = min(seconds_left, seconds_per_step * (plan.max_iters - run.state.step))
        plan.compile = compile_pays(seconds_left, expected_seconds, run.ranks)
        if not plan.compile:
            too_long = f"it takes about {rough_duration(expected_seconds)} and would save less"
            note = f"off: {compiler_missing(plan.device) or too_long}"
    if not passes_to_come(run):
        plan.compile = False
    if plan.compile:
        if report:
            report.compiling(expected_seconds)
        began = time.perf_counter()
        compiled_model, compiled, note = compile_model(run.model, run.forward_backward, plan.device)
        run.compile_seconds = time.perf_counter() - began
        plan.compile = run.ranks.all_true(compiled)
        if plan.compile:
            run.step_model = compiled_model
            if run.ranks.first:
                compile_cost.remember(cost_key, run.compile_seconds)
    if plan.compile:
        for optimizer in run.optimizers:
            optimizer.compile_update()
    if not run.cfg.shard:
        run.step_model = run.ranks.wrap_ddp(run.step_model)
    if report:
        report.machine(note)


def compile_key(run: Run) -> str:
    """Return the name under which it is remembered how long compiling this run's model takes."""
    plan = run.plan
    settings = [getattr(run.cfg, name) for name in sorted(MODEL_FIELDS | {"optimizer", "activation_checkpointing"})]
    return compile_cost.key_of(settings, run.model.vocab_size, plan.sequences // plan.micro_batches, plan.dtype,
                               device_type(plan.device), torch.__version__)


def decide_length(run: Run, report: Report, seconds_per_step: float):
    """If max_minutes sets the length of a new run, make a first guess at it, which the training loop
    refines, and decide on the evaluations. Raises UserError if not one step fits."""
    seconds_left = run.ranks.broadcast(run.deadline.seconds_left())
    if run.cfg.max_minutes and not run.plan.breakpoints:
        # The estimate may be far off on a machine that is busy with other programs.
        if seconds_left <= 0 or seconds_per_step > 3 * seconds_left:
            smaller = ", a smaller --batch_size or a smaller model" if seconds_left > 0 else ""
            raise UserError(
                f"max_minutes={run.cfg.max_minutes:g} leaves {max(0, seconds_left):.1f} s for training after the "
                f"start, and a step takes about {brief_seconds(seconds_per_step)}: give more minutes{smaller}")
        # The optimizer, evaluations and saves take the rest. The first fit must come before the end.
        steps = max(StepFitter.WARM_UP + StepFitter.STEPS_MEASURED + 1,
                    int(0.7 * seconds_left / max(1e-3, seconds_per_step)))
        if run.plan.most_steps:
            steps = min(steps, run.plan.most_steps)
        run.plan.breakpoints = [[0, run.state.step + steps]]
        decide_evaluations(run)
    report.evaluations()


def passes_to_come(run: Run) -> bool:
    """Return whether any forward and backward pass is still to be done."""
    if run.cfg.eval_only:
        return False
    return run.plan.max_iters is None or run.plan.max_iters > run.state.step


# --------------------------------------------------------------------------------------------------
# One step, and the evaluation of the model


def update(run: Run, step: int) -> tuple:
    """Make one optimizer step: forward and backward over this process's micro-batches, clip, update.

    Returns (mean loss, gradient norm), two 0-d tensors on the device. On a GPU nothing here waits for
    the device. If the loss or the gradient is not finite, no weight changes, and this raises NotFinite;
    on an NVIDIA GPU the optimizers find out by themselves, and `report_and_save` raises it later.
    """
    plan = run.plan
    torch.manual_seed(dropout_seed(run.cfg.seed, step, run.ranks.rank))
    factor = lr_factor(step, run.cfg, plan.breakpoints)
    for optimizer in run.optimizers:
        optimizer.set_rates(factor, step)
    loss = torch.zeros((), device=plan.device)
    for number, (x, y) in enumerate(run.batches(step), 1):
        # Processes average their gradients once a step, after the last micro-batch.
        with gradient_sync(run.step_model, last=number == plan.micro_batches):
            with autocast(plan.device, plan.dtype):
                micro_loss = run.step_model(x, y)[1] / plan.micro_batches
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    norm = clip_gradients(run)
    # False: float16 gradients overflowed, which is normal. The scaler lowers its scale.
    apply_step = run.guard.check(loss, norm, step + 1)
    for optimizer in run.optimizers:
        if apply_step:
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return loss, norm


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout. It depends on nothing else, so a resumed run needs no
    stored random state."""
    return np.random.SeedSequence([seed, 2, step, rank]).generate_state(1).item()


def clip_gradients(run: Run):
    """Scale the gradient down to the norm grad_clip if it is larger (0: never). Returns its norm before
    that, as PyTorch's clip_grad_norm_ does."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    if run.cfg.grad_clip:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), run.cfg.grad_clip, norm)
    return norm.full_tensor() if run.cfg.shard and run.ranks.world > 1 else norm


def eval_windows(tokens: int, cfg: Config, most: int):
    """Return the starts of the evaluation windows: all whole windows of a split, or `most` of them,
    evenly spaced."""
    windows = (tokens - 1) // cfg.block_size
    count = min(windows, most)
    return np.arange(count) * windows // count * cfg.block_size


@torch.no_grad()
def estimate_loss(run: Run, stop: Stop | None = None, windows: int | None = None) -> dict | None:
    """Return the mean loss of both splits in nats per token, {"train": ..., "val": ...}, or None if
    `stop` asks to stop.

    It is taken over fixed windows, which the processes share: `windows` of each split, or as many as the
    plan says.
    """
    if windows is None:
        windows = run.plan.evaluations["windows"]
    losses = {}
    run.model.eval()
    for split in ("train", "val"):
        starts = eval_windows(len(run.data[split]), run.cfg, windows)
        losses[split] = mean_loss(run, split, starts, stop)
    run.model.train()
    return None if None in losses.values() else losses


def mean_loss(run: Run, split: str, starts, stop: Stop | None) -> float | None:
    """Return the mean loss over the windows at `starts`, or None if `stop` asks to stop."""
    size = windows_at_once(run.cfg.block_size, run.model.vocab_size)
    total = torch.zeros(2)              # the sum of the windows' losses, and their number
    for done in range(0, len(starts), size * run.ranks.world):
        if stop and stop.asked:
            return None
        mine = starts[done + size * run.ranks.rank:][:size]
        # A process with no window left computes one anyway: sharded, the others need its weights.
        x, y = run.windows(split, mine if len(mine) else starts[:1])
        with autocast(run.plan.device, run.plan.dtype):
            loss = run.model(x, y)[1].item()
        total += torch.tensor([loss, 1.0]) * len(mine)
    total = run.ranks.all_reduce(total.to(run.plan.device))
    return (total[0] / total[1]).item()


def sample_prompt(cfg: Config, tokenizer: Tokenizer) -> tuple:
    """(the prompt of samples, its ids (T,))."""
    prompt = typed_prompt(tokenizer, cfg.sample_start)
    return prompt, torch.from_numpy(prompt_ids(tokenizer, prompt, "--sample_start"))


def sample_text(run: Run) -> str:
    """Return a short continuation of sample_start by the current weights."""
    cfg = run.cfg
    device = run.plan.device
    prompt, prompt_tokens = sample_prompt(cfg, run.tokenizer)
    generator = torch.Generator().manual_seed(cfg.seed + run.state.step)
    uniform = iter(torch.rand(cfg.sample_tokens, 1, generator=generator))

    def pick(logits):
        return draw(logits, cfg.sample_temperature, next(uniform).to(device))

    run.model.eval()
    tokens = run.model.generate(prompt_tokens[None].to(device), cfg.sample_tokens, pick)
    ids = [token.item() for token in tokens]
    run.model.train()
    return prompt + run.tokenizer.decode(ids, begins=False)


# --------------------------------------------------------------------------------------------------
# The run


def train(cfg: Config, out_dir: Path, origin: Origin | None = None, began: float | None = None) -> int:
    """Train, evaluate, sample and save to out_dir, as cfg says. began: when max_minutes began, by
    time.monotonic; None: now. Returns the exit code."""
    origin = origin or Origin()
    deadline = Deadline(0 if cfg.eval_only else cfg.max_minutes, began, origin.seconds_used)
    check_loggers(cfg)
    run = start(cfg, replace(origin, deadline=deadline))
    run.deadline = deadline
    report = Report(run, out_dir, deadline.began)
    check_ranks_agree(run, origin)
    try:
        claim_folder(run, out_dir, origin)
        report.banner()
        if origin.resuming:
            note_threads(report, origin.checkpoint.get("threads"))
            note_step_size(run, report, origin.checkpoint["config"])
        seconds_per_step = estimate_pace(run, report)
        compile_and_wrap(run, report, seconds_per_step)
        decide_length(run, report, seconds_per_step)
        if cfg.dry_run:
            evaluate = partial(estimate_loss, run, windows=TRIAL_WINDOWS)
            dry_run(run, report, out_dir, update, evaluate, partial(sample_text, run))
            code = 0
        else:
            if not origin.resuming:
                move_old_run(run)
            fitter = StepFitter(deadline, run.stopwatch, run.first_step, only_cuts=not run.plan.fit_to_time,
                                most_steps=run.plan.most_steps)
            code = train_until_stopped(run, report, fitter)
    except NotFinite as error:
        report.not_finite(error)
        code = 3
    finally:
        report.close()
        if run.folder:
            run.folder.release()
    run.step_model = None               # it keeps the process group and its threads alive
    run.ranks.leave()
    return code


def train_until_stopped(run: Run, report: Report, fitter: StepFitter) -> int:
    """The training loop. Returns the exit code; raises NotFinite."""
    open_report(run, report)
    run.stopwatch.start()
    with Stop() as stop:
        while True:
            fit_steps_to_time(run, report, fitter)
            evaluate_and_save(run, report, stop)
            if stop.agreed or is_finished(run):
                break
            loss, norm = update(run, run.state.step)
            run.state.step += 1
            run.state.tokens += run.tokens_per_step
            report_and_save(run, report, loss, norm, stop)
            if stop.agreed:
                break
        if not stop.agreed:
            evaluate_best(run, report, stop)
    unsaved = run.folder.unsaved if run.folder else {}
    report.finish(stop, unsaved)
    code = 4 if any(unsaved.values()) else 0
    if stop.signal:
        code = stop.exit_code
    return run.ranks.broadcast(code)


def check_ranks_agree(run: Run, origin: Origin):
    """Raise UserError unless all processes start from the same step: each reads last.pt by itself, and
    a network folder may show them different files."""
    start_of_this_rank = (origin.resuming, run.state.step)
    start_of_the_first = run.ranks.broadcast(start_of_this_rank)
    if start_of_this_rank != start_of_the_first:
        raise UserError(f"process {run.ranks.rank} found another last.pt than the first process: wait until all "
                        "machines see the same out_dir, and start again")


def claim_folder(run: Run, out_dir: Path, origin: Origin):
    """Claim out_dir for this run, unless the run writes nothing."""
    if run.cfg.eval_only or run.cfg.dry_run:
        return
    run.folder = RunFolder(out_dir)
    if not run.ranks.first:
        return
    run.folder.claim(origin.stamp)
    if origin.resuming:                 # best weights that could not be saved are still missing
        run.folder.unsaved["ckpt.pt"] = origin.checkpoint.get("lost", "")


def move_old_run(run: Run):
    """Rename out_dir if it holds an old run: only now, since a command that fails must not have done
    so. What has not been tried yet is the memory of a step and of an evaluation."""
    if not run.ranks.broadcast(bool(run.folder and run.folder.holds_a_run())):
        return
    states = [torch.empty_like(p) for p in run.model.parameters()]      # about what an optimizer keeps
    run.forward_backward()
    del states
    estimate_loss(run, windows=1)
    if run.ranks.first:
        run.folder.move_old_run()


def open_report(run: Run, report: Report):
    """Open log.csv and the loggers. If that fails, nothing has been saved yet, and an old run gets its name
    back."""
    try:
        report.open()
    except UserError:
        if run.folder:
            run.folder.take_back()
        raise


def note_step_size(run: Run, report: Report, config: dict):
    """Say so if the resumed run, with the settings `config`, made steps of another size: a step's batch is
    found by its number (see window_starts)."""
    cfg = run.cfg
    before = config["batch_size"] * config["gradient_accumulation_steps"]
    now = cfg.batch_size * cfg.gradient_accumulation_steps
    if now != before and cfg.sampling != "random":
        report.label("note", f"a step reads {now:,} windows, before it read {before:,}: the run continues at another "
                             "place of the text, so this epoch reads some of it twice, or not at all")


def note_threads(report: Report, saved_by: int | None):
    """Say so if a process with another number of threads saved the run: a CPU's sums depend on it."""
    threads = torch.get_num_threads()
    if saved_by not in (threads, None):
        report.label("note", f"the run was saved by a process of {saved_by} threads, this one has {threads}: on a "
                             "CPU, results will differ in their last digits")


def fit_steps_to_time(run: Run, report: Report, fitter: StepFitter):
    """If max_minutes decides the number of steps, move the end of the run where its pace has shown
    that it needs to be; all processes move it to the same step."""
    step = run.state.step
    if not run.cfg.max_minutes or is_last_step(run) or step % run.steps_per_look:
        return
    if not run.ranks.broadcast(fitter.is_due(step)):
        return
    last_pass_seconds = run.plan.evaluations["at_the_end"] * run.seconds_per_window
    # The first guess may have been far off, so the first fit also sets the steps between evaluations.
    is_first = len(run.plan.breakpoints) == 1 and run.cfg.eval_interval == "auto"

    def interval_for(steps, times):
        return choose_interval(steps, times) if is_first else run.plan.eval_interval

    end, interval = run.ranks.broadcast(fitter.fit(step, interval_for, last_pass_seconds))
    if end == run.plan.max_iters:
        return
    run.plan.evaluations["interval"] = interval
    run.plan.breakpoints.append([step, end])
    report.end_moved(step, end)


def is_finished(run: Run) -> bool:
    """Return whether to end: after the last step, after `patience` evaluations without a better val
    loss, or after eval_only's evaluation."""
    cfg, state = run.cfg, run.state
    if cfg.eval_only or is_last_step(run):
        return True
    if not cfg.patience or state.evaluated is None:
        return False
    return state.evaluated - state.best_step >= cfg.patience * run.plan.eval_interval


def is_last_step(run: Run) -> bool:
    return run.plan.max_iters is not None and run.state.step >= run.plan.max_iters


def evaluation_is_due(run: Run) -> bool:
    """Return whether this step has an evaluation to come: one every eval_interval steps and at the
    last step, once each."""
    cfg, state = run.cfg, run.state
    if cfg.eval_only:
        return True
    if state.evaluated is not None and state.step <= state.evaluated:
        return False
    return is_last_step(run) or state.step % run.plan.eval_interval == 0


def evaluate_and_save(run: Run, report: Report, stop: Stop):
    """Evaluate, sample and save, if this step is due for it; the stopwatch is paused meanwhile. Raises
    NotFinite if the val loss is not finite."""
    cfg, state = run.cfg, run.state
    evaluating = evaluation_is_due(run)
    sampling = state.step % cfg.sample_interval == 0 if cfg.sample_interval else evaluating
    if not (evaluating or sampling):
        return
    with run.stopwatch.paused():
        if evaluating:
            # Before, since an evaluation can take long, and be interrupted.
            save(run, report, "last.pt", keep=cfg.keep)
            began = time.perf_counter()
            # Several processes must stop together, so they evaluate to the end.
            losses = estimate_loss(run, stop if run.ranks.world == 1 else None)
            if losses is None:
                stop.agree(run.ranks)
                return
            run.seconds_per_window = (time.perf_counter() - began) / (2 * run.plan.evaluations["windows"])
            record_evaluation(run, report, losses)
        if evaluating and is_finished(run):
            save(run, report, "last.pt")
        if sampling and cfg.sample_tokens and (run.ranks.first or cfg.shard):
            report.sample(state.step, sample_text(run))


def record_evaluation(run: Run, report: Report, losses: dict):
    """Record the losses of the current step, and save ckpt.pt if the val loss is the best so far."""
    state = run.state
    if not math.isfinite(losses["val"]):
        raise NotFinite(f"the val loss at step {state.step} is not finite")
    is_best = losses["val"] < state.best_val_loss
    state.evaluated = state.step
    state.losses = losses
    if is_best:
        state.best_step = state.step
        state.best_val_loss = losses["val"]
    run.stopwatch.evaluations += 1
    report.evaluation(state.step, losses, is_best)
    if is_best or run.cfg.always_save_checkpoint:
        save(run, report, "ckpt.pt")


def evaluate_best(run: Run, report: Report, stop: Stop):
    """If the evaluations of the run have read only a part of the val split, evaluate the weights of
    ckpt.pt on all of it, or on as much as the plan allows."""
    cfg = run.cfg
    state = run.state
    windows = run.plan.evaluations["at_the_end"]
    if not windows or cfg.eval_only or run.first_step == state.step:
        return
    if state.best_step != state.step and not load_best(run):
        return
    run.model.eval()
    with torch.no_grad():
        loss = mean_loss(run, "val", eval_windows(len(run.data["val"]), cfg, windows),
                         stop if run.ranks.world == 1 else None)
    if loss is not None:
        report.best(loss, windows)


def load_best(run: Run) -> bool:
    """Load the weights of ckpt.pt into the model; the run is over. Return whether that could be done."""
    if run.cfg.shard:
        return False
    try:
        content = load_checkpoint(run.folder.path / "ckpt.pt")
        loaded = content["step"] == run.state.best_step
    except UserError:                   # it could not be saved, for want of disk space
        loaded = False
    if not run.ranks.all_true(loaded):
        return False
    run.model.load_state_dict(content["model"])
    return True


def look_at_signals(run: Run, stop: Stop, wait_now: bool):
    """Find out whether to stop: at every step, or, since several processes have to agree on it, about
    once a second and where they wait anyway."""
    if run.ranks.world == 1:
        stop.agree(run.ranks)
    elif wait_now or run.state.step % run.steps_per_look == 0:
        stop.agree(run.ranks)
        seconds_per_step = run.stopwatch.seconds() / run.state.step
        run.steps_per_look = run.ranks.broadcast(max(1, round(1 / max(1e-3, seconds_per_step))))


def report_and_save(run: Run, report: Report, loss, norm, stop: Stop):
    """After an update: check for bad numbers and for reasons to stop, log, and save last.pt.

    Between evaluations, this is the only place that waits for a GPU, and it does so only at the steps
    that log, save or evaluate. Raises NotFinite."""
    cfg, step = run.cfg, run.state.step
    log_now = step % cfg.log_interval == 0 or is_last_step(run)
    save_now = cfg.save_interval > 0 and step % cfg.save_interval == 0
    wait_now = log_now or save_now or step % run.plan.eval_interval == 0 or run.guard.immediate
    look_at_signals(run, stop, wait_now)
    if wait_now or stop.agreed:         # nothing is saved before this look
        run.guard.verify(step)
    report.advance(step)
    if log_now:
        mean = run.ranks.all_reduce(loss).item() / run.ranks.world
        lr = cfg.learning_rate * lr_factor(step - 1, cfg, run.plan.breakpoints)
        report.step(step, mean, norm.item(), lr)
    if save_now or stop.agreed:
        with run.stopwatch.paused():
            save(run, report, "last.pt")


def save(run: Run, report: Report, name: str, keep: int = 0):
    """Save last.pt or ckpt.pt. If that fails, say so and continue."""
    if run.folder is None or not (run.ranks.first or run.cfg.shard):
        return
    content = checkpoint_content(run)
    if name == "last.pt":
        content |= resume_content(run)
    if run.cfg.shard:                   # with a part from each process
        content = run.ranks.gather(content)
    if run.ranks.first:
        problem = run.folder.save(content, name, keep)
        if problem:
            again = "the next save" if name == "last.pt" else "the next better evaluation"
            report.say(f"{problem}; {again} tries again")


def checkpoint_content(run: Run) -> dict:
    """Return what every checkpoint holds: weights, settings, tokenizer, and where the run stands."""
    return asdict(run.state) | {
        "config": asdict(run.cfg),
        "tokenizer": run.tokenizer.stored,
        "start": run.tokenizer.start,
        "vocab_size": run.model.vocab_size,
        "text": text_checksum(run.meta),
        "model": dict(run.model.state_dict()),
        "seconds": run.stopwatch.seconds(),
    }


def resume_content(run: Run) -> dict:
    """Return what a resumed run needs in addition."""
    return {
        "plan": asdict(run.plan),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "scaler": run.scaler.state_dict(),
        "threads": torch.get_num_threads(),
        "pause": run.stopwatch.pause_seconds(),
        "clock_seconds": run.deadline.seconds_used(),
        "lost": run.folder.unsaved["ckpt.pt"],
    }


# --------------------------------------------------------------------------------------------------
# Models from checkpoints, and the command line


def load(path, device: str = "cpu") -> tuple:
    """Return (model, tokenizer) for use from Python, the model in eval mode. path: a checkpoint, a
    run's folder, or what else read_checkpoint takes. Raises UserError.

    `for ids in model.generate(prompt, 100, lambda logits: draw(logits, 0.8))` continues a prompt, ids
    (B, T)."""
    path = cli.expand_home(os.fspath(path))
    model, tokenizer = restore_model(read_checkpoint(path), path)
    model = model.to(device).eval()
    if device_type(device) == "cpu":
        cpu.accelerate(model)
    return model, tokenizer


def read_checkpoint(source) -> dict:
    """Return the content of a checkpoint, given its path or a run's folder; or of a model that
    convert.py can take over: one of OpenAI's by its name, a Hugging Face directory, nanoGPT's
    ckpt.pt."""
    in_folder = Path(source, "ckpt.pt")
    if os.path.isfile(in_folder):
        source = in_folder
    is_name = str(source).startswith("gpt2") and not os.path.isfile(source)
    if not is_name and not os.path.isfile(Path(source, "config.json")):
        try:
            return load_checkpoint(Path(source))
        except ForeignCheckpoint as error:
            foreign = error
    import convert  # only needed here
    if os.path.isfile(source):
        return convert.import_nanogpt(source, foreign.content)
    return convert.import_model(source)


def restore_model(content: dict, source, cfg: Config | None = None) -> tuple:
    """Return (model, tokenizer) of a checkpoint's content, on the CPU in float32. cfg: replaces the
    checkpoint's settings. Raises UserError, which names the `source`, if its parts do not fit
    together."""
    cfg = cfg or Config(**cli.from_dict(Config, content["config"], source))
    try:
        if broken_rules := cli.problems(cfg):
            raise ValueError("; ".join(broken_rules))
        tokenizer = Tokenizer(content["tokenizer"])
        tokenizer.start = content.get("start", tokenizer.start)
        vocab_size = content["vocab_size"]
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, not {vocab_size}")
        weights = dict(content["model"])
        if cfg.positions == "learned":  # block_size may have been lowered
            weights["wpe.weight"] = weights["wpe.weight"][:cfg.block_size]
        model = build_model(lambda: GPT(cfg, vocab_size), weights, cfg.n_layer)
    # A damaged or hostile file may hold anything anywhere.
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: its parts do not fit together: {str(error)[:400]}")
    return model, tokenizer


def find_origin(cfg: Config, parsed: cli.Parsed, out_dir: Path) -> tuple:
    """Return (cfg, Origin) for what init_from asks. The settings of a checkpoint take precedence over
    config files where the run is resumed, and for the model."""
    last = out_dir / "last.pt"
    stamp = file_stamp(last) if cfg.init_from in ("auto", "resume") else None
    if cfg.init_from == "resume" or (cfg.init_from == "auto" and stamp):
        return resume_from(last, stamp, parsed)
    fit_to_time = cfg.max_minutes > 0 and "max_iters" not in parsed.typed and not cfg.eval_only
    given = parsed.values if fit_to_time else None
    if cfg.init_from in ("scratch", "auto"):
        return replace(cfg, init_from="scratch"), Origin(fit_to_time=fit_to_time, stamp=stamp, given=given)
    check_start(cfg.init_from)
    content = read_checkpoint(cfg.init_from)
    typed = replace(parsed, typed=parsed.typed & MODEL_FIELDS)
    values, changed = cli.merge(
        Config, content["config"], typed, MODEL_FIELDS, cfg.init_from, lower={"block_size"})
    cli.print_changes(changed)
    cli.print_overruled(values, parsed, MODEL_FIELDS, MODEL_FIELDS, cfg.init_from)
    model_settings = {name: values[name] for name in MODEL_FIELDS | {"init"}}
    return replace(cfg, **model_settings), Origin(content, fit_to_time=fit_to_time, given=given)


def check_start(init_from: str):
    """Raise a UserError for a misspelled value of init_from, such as resum or gpt2-small."""
    if init_from in STARTS or os.path.exists(init_from) or not re.fullmatch(r"[\w-]+", init_from):
        return
    if init_from.startswith("gpt"):
        raise UserError(f"init_from={init_from}: no such model; there is {', '.join(STARTS[3:])}")
    if meant := closest(init_from, STARTS[:3]):
        raise UserError(f"init_from={init_from}: no such checkpoint; did you mean --init_from={meant}?")


def resume_from(last: Path, stamp: tuple, parsed: cli.Parsed) -> tuple:
    """Return (cfg, Origin) of a run that resumes from last.pt: the stored settings with the flags
    typed now, and what of the stored plan these leave as it is."""
    content = load_checkpoint(last, resumable=True)
    values, changed = cli.merge(Config, content["config"], parsed, FIXED_FIELDS, last)
    cli.print_changes(changed)
    cli.print_overruled(values, parsed, values.keys() - {"init_from", "out_dir"}, FIXED_FIELDS, last)
    cfg = Config(**values)
    decided_anew = parsed.typed & {"dtype", "compile", "ngram_decay"}
    if parsed.typed & {"max_iters", "max_epochs", "breakpoints"}:
        decided_anew.add("breakpoints")
    if changed.keys() & {"ngram_lr", "embed_lr"}:           # decay goes with the rate
        decided_anew.add("ngram_decay")
    if parsed.typed & {"max_iters", "max_epochs", "max_minutes", "ngram_decay", *planning.SETTINGS}:
        decided_anew.add("expected")
    fit_to_time = cfg.max_minutes > 0 and not parsed.typed & {"max_iters", "max_epochs"}
    if "max_minutes" not in parsed.typed:
        fit_to_time = fit_to_time and content["plan"].get("fit_to_time", True)
    seconds_used = content.get("clock_seconds", 0.0)
    if "max_minutes" in parsed.typed:
        seconds_used = 0.0
        ends = [end for _, end in content["plan"].get("breakpoints", [])]
        if ends and content["step"] >= ends[-1]:            # it was finished: a new schedule
            decided_anew |= {"breakpoints", "most_steps"}
    evaluations = content["plan"].get("evaluations")
    if "eval_iters" in changed:
        decided_anew.add("evaluations")
        content["best_val_loss"] = math.inf                 # of other windows
    elif evaluations and "eval_interval" in changed and cfg.eval_interval != "auto":
        evaluations["interval"] = cfg.eval_interval
    plan = {name: value for name, value in content["plan"].items() if name not in decided_anew}
    if (changed.keys() - COMPUTE_NOTHING) or "max_minutes" in parsed.typed:
        plan["resumed_at"] = content["step"]
    return cfg, Origin(content, True, plan, fit_to_time, seconds_used, stamp)


def give_length(cfg: Config, parsed: cli.Parsed) -> Config:
    """Return cfg with ten minutes to plan for, if the command names a data set of the user's own, and neither a
    config file nor a setting that says how long to train or how large the model is."""
    said = parsed.values.keys()
    unplanned = parsed.files or cfg.dataset == Config.dataset or cfg.eval_only or said & SAY_HOW_LONG
    if unplanned:
        return cfg
    return replace(cfg, max_minutes=MINUTES_UNLESS_SAID)


def choose_length(cfg: Config, typed: set) -> Config:
    """Return cfg with one length of the run: what was typed takes precedence over a config file and
    the checkpoint, and max_iters over the others. (Typed with max_iters, max_minutes is a limit.)"""
    if "max_iters" in typed:
        unwanted = {"max_epochs", "max_minutes"} - typed
    elif "max_epochs" in typed:
        unwanted = {"max_minutes"} - typed
    elif "max_minutes" in typed:
        unwanted = {"max_epochs"}
    else:
        unwanted = set()
    return replace(cfg, **dict.fromkeys(unwanted, 0.0))


def note_length(cfg: Config, origin: Origin, parsed: cli.Parsed):
    """Say so if a new run is planned for a time that the command does not name, on a data set that is there or can
    be prepared."""
    if origin.given is None or "max_minutes" in parsed.values or not is_first_process():
        return
    if cfg.dataset in SETS or has_set(data_folder(cfg.dataset, cfg.data_dir)):
        print(f"note     no length was given, so this run is planned for {MINUTES_UNLESS_SAID:g} minutes; "
              "--max_minutes=M plans for M, and --max_iters=300 trains for 300 steps without a plan", flush=True)


def is_first_process() -> bool:
    """Return whether this is the process that speaks, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def note_own_sets(cfg: Config, origin: Origin, parsed: cli.Parsed):
    """Say which data sets of the user's own are there, if the command of a new run names none."""
    if parsed.files or "dataset" in parsed.values or origin.checkpoint or not is_first_process():
        return
    folder = data_folder(cfg.dataset, cfg.data_dir).parent
    if own := sorted(set(sets_in(folder)) - set(SETS)):
        names = ", ".join(f"--dataset={name}" for name in own[:4])
        print(f"note     this trains on {cfg.dataset}; your own in {folder}/: {names}", flush=True)


def main(argv: list, began: float | None = None) -> int:
    """Train as a command line says. began: see `train`. Returns the exit code."""
    parsed = cli.parse(Config, argv, __doc__, hint=partial(command_for_training, built_in=SETS), first=FIRST_IN_HELP)
    cfg = give_length(choose_length(Config(**parsed.values), parsed.typed), parsed)
    if not (cfg.eval_only or cfg.dry_run):
        outlive_output()
    name = parsed.files[-1].stem if parsed.files else cfg.dataset
    out_dir = Path(cfg.out_dir or Path("out") / name)
    cfg, origin = find_origin(cfg, parsed, out_dir)
    cfg = replace(choose_length(cfg, parsed.typed), out_dir=str(out_dir))
    cli.check(cfg)
    note_own_sets(cfg, origin, parsed)
    note_length(cfg, origin, parsed)
    with explain_failures(out_dir):
        return train(cfg, out_dir, origin, began)


if __name__ == "__main__":
    cli.run(partial(main, began=process_start()))
