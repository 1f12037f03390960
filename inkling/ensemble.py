"""Several models that predict as one: a mean of their probabilities. One of them may be a counted n-gram
model."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from inkling.cli import UserError
from inkling.dataset import open_split, read_meta
from inkling.ngram import NgramModel
from inkling.novelty import find_training_set
from inkling.texts import cut_evenly
from train import GPT, Cache, read_checkpoint

NGRAM_ORDER = 8
NGRAM_TOKENS = 2_000_000                # of a longer text so many are counted, which bounds the memory
NGRAM_PIECES = 100
# A text that is learned from is counted anew once so many tokens of it are new, and such a share of what was counted.
NEW_TOKENS = 1024
NEW_SHARE = 1 / 50


class Ensemble(nn.Module):
    """Predicts with a mean of the probabilities of `models` of one vocabulary, the first of them a GPT. It is
    used as a GPT: its logits are the logarithms of that mean, and its context is the shortest of theirs.
    shares: the weight of each in the mean, together 1; None: all the same.

    (The mean of experts' probabilities is older than neural networks; that of the same network trained
    from several seeds: Hansen and Salamon 1990, "Neural network ensembles".)"""

    def __init__(self, models: list, shares: list | None = None):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.shares = shares or [1 / len(models)] * len(models)
        self.vocab_size = models[0].vocab_size
        block_size = min(model.cfg.block_size for model in models)
        self.cfg = replace(models[0].cfg, block_size=block_size)

    def forward(self, ids):
        """Return (logits (B, T, vocab_size), None) for ids (B, T), as a GPT does without targets."""
        return log_of_mean([model(ids)[0] for model in self.models], self.shares), None

    # -- generation: as one GPT's, with a cache of each model

    generate = GPT.generate

    def new_cache(self, batch_size: int, size: int):
        """Caches that are empty, for `size` tokens of each of batch_size texts."""
        return Caches([model.new_cache(batch_size, size) for model in self.models])

    def next_logits(self, ids, caches):
        """Return the logits (B, vocab_size) for the token after ids (B, T)."""
        return log_of_mean([model.next_logits(ids, cache)
                            for model, cache in zip(self.models, caches.caches, strict=True)], self.shares)


def log_of_mean(logits: list, shares: list):
    """The logarithm of the mean of the probabilities that the logits (..., vocab_size) of each model stand
    for, in their shape. shares: the weight of each."""
    weighted = [each.log_softmax(-1) + math.log(share) for each, share in zip(logits, shares, strict=True)]
    return torch.stack(weighted).logsumexp(0)


class Counted(nn.Module):
    """An n-gram model, counted from `train` (n,), as a member of an Ensemble beside a GPT with the settings `cfg`."""

    def __init__(self, train: np.ndarray, vocab_size: int, cfg):
        super().__init__()
        self.train_ids = train
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.learned = 0                # tokens of the text that it was counted from, too
        self.ngrams = NgramModel(train, NGRAM_ORDER, vocab_size)

    def learn(self, text: np.ndarray):
        """Count `text` (n,) as well, which grows from call to call; not every time, as it means to count all of train
        again."""
        if len(text) - self.learned >= max(NEW_TOKENS, NEW_SHARE * self.learned):
            self.ngrams = NgramModel(np.concatenate([self.train_ids, text]), NGRAM_ORDER, self.vocab_size)
            self.learned = len(text)

    def forward(self, ids):
        """Return (logits (B, T, vocab_size), None) for ids (B, T)."""
        p = np.stack([self.ngrams.predict(text) for text in ids.cpu().numpy()])
        return torch.from_numpy(np.log(p)).float().to(ids.device), None

    def new_cache(self, batch_size: int, size: int):
        """A Cache of the ids alone."""
        return Cache(replace(self.cfg, n_layer=0), batch_size, size, "cpu", torch.float32)

    def next_logits(self, ids, cache):
        """Return the logits (B, vocab_size) for the token after ids (B, T)."""
        texts = cache.add_ids(ids.cpu()).numpy()
        p = np.concatenate([self.ngrams.predict(text, len(text) - 1) for text in texts])
        return torch.from_numpy(np.log(p)).float().to(ids.device)


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


def find_ngram_set(source) -> Path:
    """The folder of the set that the checkpoint `source` was trained on. Raises UserError if it is not there."""
    content = read_checkpoint(source) if os.path.isfile(source) else {}
    return find_training_set(content, "--ngram", "prepare that text again under this name, or leave --ngram out")


def add_ngrams(model, folder: Path, share: float) -> Ensemble:
    """The model with an n-gram model of the set in `folder`, which has that share in each probability."""
    train = open_split(folder, read_meta(folder), "train")
    tokens = f"{len(train):,} tokens"
    if len(train) > NGRAM_TOKENS:
        train = np.concatenate(cut_evenly(train, NGRAM_PIECES, NGRAM_TOKENS // NGRAM_PIECES))
        tokens = f"{len(train):,} of {tokens}"
    print(f"counting n-grams of up to {NGRAM_ORDER} in {tokens} of {folder}", file=sys.stderr, flush=True)
    counted = Counted(np.asarray(train[:], np.int64), model.vocab_size, model.cfg)
    return Ensemble([model, counted], [1 - share, share])
