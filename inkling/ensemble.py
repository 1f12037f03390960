"""Several models that predict as one: the mean of their probabilities."""

import math
import os
from dataclasses import replace

import torch
import torch.nn as nn

from inkling.cli import UserError
from train import GPT


class Ensemble(nn.Module):
    """Predicts with the mean of the probabilities of `models`, GPTs of one vocabulary. It is used as one
    of them: its logits are the logarithms of that mean, and its context is the shortest of theirs.

    (The mean of experts' probabilities is older than neural networks; that of the same network trained
    from several seeds: Hansen and Salamon 1990, "Neural network ensembles".)"""

    def __init__(self, models: list):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.vocab_size = models[0].vocab_size
        block_size = min(model.cfg.block_size for model in models)
        self.cfg = replace(models[0].cfg, block_size=block_size)

    def forward(self, ids):
        """Return (logits (B, T, vocab_size), None) for ids (B, T), as a GPT does without targets."""
        return log_of_mean([model(ids)[0] for model in self.models]), None

    # -- generation: as one GPT's, with a cache of each model

    generate = GPT.generate

    def new_cache(self, batch_size: int, size: int):
        """Caches that are empty, for `size` tokens of each of batch_size texts."""
        return Caches([model.new_cache(batch_size, size) for model in self.models])

    def next_logits(self, ids, caches):
        """Return the logits (B, vocab_size) for the token after ids (B, T)."""
        return log_of_mean([model.next_logits(ids, cache)
                            for model, cache in zip(self.models, caches.caches, strict=True)])


def log_of_mean(logits: list):
    """The logarithm of the mean of the probabilities that the logits (..., vocab_size) of each model stand
    for, in their shape."""
    log_probabilities = torch.stack([each.log_softmax(-1) for each in logits])      # (models, ..., vocab_size)
    return log_probabilities.logsumexp(0) - math.log(len(logits))


class Caches:
    """A Cache of each model, all moved together."""

    def __init__(self, caches: list):
        self.caches = caches

    @property
    def length(self) -> int:
        return self.caches[0].length

    def clear(self):
        for cache in self.caches:
            cache.clear()

    def advance(self, count: int, fixed_shape: bool = False):
        for cache in self.caches:
            cache.advance(count, fixed_shape)

    def tensors(self) -> list:
        return [tensor for cache in self.caches for tensor in cache.tensors()]


def split_names(names: str) -> list:
    """The names that a text with commas holds; a file or folder of the whole name comes first. Raises
    UserError."""
    if os.path.exists(names):
        return [names]
    parts = names.split(",")
    if not all(parts):
        raise UserError(f"--ckpt={names}: there is no name before or after a comma")
    return parts


def combine(names: list, loaded: list) -> tuple:
    """(the model, its tokenizer) that predicts as all of `loaded`, pairs of a model and a tokenizer, from the
    checkpoints `names`. Raises UserError if they do not share a tokenizer."""
    models = [model for model, _ in loaded]
    tokenizers = [tokenizer for _, tokenizer in loaded]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        if tokenizer.stored != tokenizers[0].stored:
            raise UserError(f"--ckpt: {names[0]} and {name} have different tokenizers, so their probabilities are not "
                            "of the same tokens; name checkpoints of one data set")
    if len(models) == 1:
        return loaded[0]
    return Ensemble(models), tokenizers[0]
