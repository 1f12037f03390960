"""Faster ways for a CPU than PyTorch's: `accelerate` puts them into a model; attention; memory that
is kept.

Figures: bench/RESULTS.md. Elsewhere, and where it would not be faster, everything is PyTorch's.
"""

import contextlib
import ctypes
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


def accelerate(model: nn.Module) -> nn.Module:
    """Give the linear layers and dropouts of a model on a CPU their faster ways, in place. Weights
    and their names stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.Dropout:
            module.__class__ = Dropout
    return model


def keep_freed_memory():
    """Let the C library keep what a step has freed for the next step. By default glibc gives it
    back to the system and asks for it again, page by page: without that, a step of the default
    model is 1.2 times as fast on two cores. Blocks of 32 MB and more still go back at once.
    Elsewhere, nothing."""
    if sys.platform != "linux":
        return
    trim_threshold = -1                 # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)


def runs_compiled_for_one_token(x, rows: int) -> bool:
    """Whether x holds one token's features in compiled code without gradient: a loop that the
    compiler writes over a matrix reads it at the memory's pace, in 16 bits too, where the
    libraries' routines are made for many rows."""
    return (rows == 1 and x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu"))


# -- linear layers -----------------------------------------------------------------------------------------------------

AS_COLUMNS_FROM = 2**20                 # weights: of 384 x 1,536 both ways take as long (bench/RESULTS.md)


class Linear(nn.Linear):
    """nn.Linear with ways of its own for few rows without gradient, as in generation."""

    def forward(self, x):
        rows = x.numel() // self.in_features
        if runs_compiled_for_one_token(x, rows):
            return self.one_row(x)
        if self.pays_as_columns(x, rows):
            return self.as_columns(x, rows)
        return super().forward(x)

    def one_row(self, x):
        """A product and a sum, which the compiler turns into one loop over the weights."""
        y = (self.weight.float() * x.reshape(1, -1).float()).sum(-1)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def pays_as_columns(self, x, rows: int) -> bool:
        return (rows <= 16 and self.out_features >= 4 and self.weight.numel() >= AS_COLUMNS_FROM
                and x.device.type == "cpu" and x.dtype == torch.float32
                and not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled())

    def as_columns(self, x, rows: int):
        """Up to 16 rows in float32 go as columns through a large matrix, taken as a batch of four: that
        reads it at the memory's pace, where BLAS's usual way may reach a third of it. For a small one
        the detour costs more than it saves."""
        in_four = self.out_features // 4 * 4
        columns = x.reshape(rows, -1).mT                                            # (in_features, rows)
        quarters = self.weight[:in_four].view(4, -1, self.in_features)
        y = torch.bmm(quarters, columns.expand(4, -1, -1)).view(-1, rows)           # (in_four, rows)
        if in_four < self.out_features:
            y = torch.cat((y, self.weight[in_four:] @ columns))
        y = y.mT if self.bias is None else y.mT + self.bias
        return y.reshape(*x.shape[:-1], -1)


# -- dropout -----------------------------------------------------------------------------------------------------------

class Dropout(nn.Dropout):
    """nn.Dropout with faster random numbers."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def dropout(x, p: float):
    """Zero each element with probability p, in steps of 1/256, and scale the others up.

    A CPU draws F.dropout's numbers one by one; eight of them out of one 64-bit integer are about 3
    times faster."""
    zeroed = round(256 * p)
    if zeroed == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    integers = torch.randint(-2**63, 2**63 - 1, (x.numel() // 8 + 1,), dtype=torch.int64)
    random_bytes = integers.view(torch.uint8)[:x.numel()].view(x.shape)
    return x * (random_bytes >= zeroed) * (256 / (256 - zeroed))


# -- attention ---------------------------------------------------------------------------------------------------------

def attention(q, keys, values, mask, is_causal: bool, dropout_p: float):
    """F.scaled_dot_product_attention of q (B, n_head, T, head_dim) with keys and values (B,
    n_kv_head, S, head_dim); mask (T, S) or None. Written out in 16 bits, with dropout, and for the
    single query of compiled generation."""
    B, n_head, T, _ = q.shape
    n_kv_head = keys.size(1)
    whole_sequence = is_causal and keys.size(2) == T and n_kv_head == n_head
    if whole_sequence and (dropout_p or torch.is_autocast_enabled("cpu")):
        return in_blocks(q, keys, values, dropout_p)
    if mask is not None and runs_compiled_for_one_token(q, B * T):
        return one_query(q, keys, values, mask)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p,
                                          enable_gqa=n_kv_head != n_head)


def in_blocks(q, keys, values, dropout_p: float = 0.0):
    """Causal attention of q, keys and values (B, n_head, T, head_dim) in blocks of queries, each
    with the keys that it may see.

    In 16 bits it is faster than PyTorch's flash path for CPUs: 1.3 times at (32, 2, 256, 128),
    forward and backward, and 2.1 times at (48, 2, 64, 64); compiled 1.7 and 2.7 times (without
    AMX). In float32 it is not. With dropout, which takes PyTorch off that path, it is 2 times
    faster in float32 and 3 in bfloat16 at (32, 6, 256, 64)."""
    T = q.size(2)
    q = q * q.size(3)**-0.5             # before the product, which might overflow float16
    size = max(64, -(-T // 8))          # at most eight blocks, since each is compiled
    outputs = []
    for first in range(0, T, size):
        last = min(T, first + size)
        scores = (q[:, :, first:last] @ keys[:, :, :last].mT).float()           # (B, n_head, last - first, last)
        visible = torch.ones(last - first, last, dtype=torch.bool).tril(first)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(values.dtype)
        outputs.append(dropout(weights, dropout_p) @ values[:, :, :last])
    return torch.cat(outputs, dim=2)


def one_query(q, keys, values, mask):
    """Attention of a single query q (1, n_head, 1, head_dim) with keys and values (1, n_kv_head, S,
    head_dim), as products and sums that the compiler turns into loops; mask (1, S)."""
    _, n_head, _, head_dim = q.shape
    n_kv_head = keys.size(1)
    grouped = q.view(n_kv_head, n_head // n_kv_head, 1, head_dim).float()       # queries that share keys
    scores = (grouped * keys[0, :, None].float()).sum(-1) * head_dim**-0.5      # (n_kv_head, group, S)
    p = scores.masked_fill(~mask[0], -torch.inf).softmax(-1)
    y = (p[..., None] * values[0, :, None].float()).sum(-2)                     # (n_kv_head, group, head_dim)
    return y.to(q.dtype).view(q.shape)
