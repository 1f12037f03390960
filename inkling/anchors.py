"""Anchors: how well simple means predict the val text of a set, in bits per byte, to compare a model with.

Four of them: all tokens alike, the frequencies of tokens, xz (how many bytes the val text adds to the
compressed train text), and an n-gram model of characters. Larger texts are sampled, evenly, so that a
machine half as fast as ours (bench/RESULTS.md) measures them in 5 seconds.
"""

import numpy as np

from inkling.dataset import SPLITS
from inkling.format import align_columns
from inkling.ngram import ngram_losses
from inkling.texts import decode_ids, sample_ids, to_symbols
from inkling.tokenizer import Tokenizer

try:
    import lzma
except ImportError:                     # a Python built without it
    lzma = None

ORDER = 8                               # of the n-gram model
MOST = {"train": 1_010_000, "val": 112_000}     # characters; all of tinyshakespeare
MOST_XZ = {"train": 500_000, "val": 112_000}     # bytes; xz takes the longest, as it reads train twice
MOST_TOKENS = 1 << 20                   # whose frequencies are counted
XZ_DICTIONARY = 1 << 22                 # bytes of the past that xz searches; it takes twelve times as much memory
NAMES = {"uniform": "uniform", "tokens": "single tokens", "xz": "xz", "ngram": f"{ORDER}-gram"}


def measure_anchors(data: dict, meta: dict, tokenizer: Tokenizer) -> dict:
    """The anchors of a set in bits per byte of val, as meta.json keeps them: {name of NAMES: bits}, the
    order of the n-grams, and under "sampled" how many characters of a split were read, if not all, and
    how many bytes for xz. data: {split: ids (tokens,)}. Empty if a split is."""
    entries = meta["splits"]
    if not all(entries[split]["tokens"] and entries[split]["bytes"] for split in SPLITS):
        return {}
    ids, sampled = sample_splits(data, entries, MOST, "characters")
    tokens_per_byte = entries["val"]["tokens"] / entries["val"]["bytes"]
    frequent = sample_ids(data["train"], MOST_TOKENS)
    texts = [decode_ids(tokenizer, ids[split]) for split in SPLITS]
    anchors = {
        "uniform": float(np.log2(meta["vocab_size"])) * tokens_per_byte,
        "tokens": token_bits(frequent, ids["val"], meta["vocab_size"]) * tokens_per_byte,
        "ngram": text_bits(*texts, tokenizer.kind == "byte"),
    }
    # xz comes after the n-grams, or their memory would add up.
    ids, sampled_for_xz = sample_splits(data, entries, MOST_XZ, "bytes")
    anchors["xz"] = xz_bits(*(decode_ids(tokenizer, ids[split]) for split in SPLITS))
    sampled |= {f"xz_{split}": count for split, count in sampled_for_xz.items()}
    measured = {name: round(anchors[name], 4) for name in NAMES if anchors[name] is not None}
    measured["order"] = ORDER
    if sampled:
        measured["sampled"] = sampled
    return measured


def sample_splits(data: dict, entries: dict, most: dict, unit: str) -> tuple:
    """({split: ids (tokens,)}, {split: how many were read, if not all}): of each split at most so many
    characters or bytes, whatever the `unit`."""
    ids = {}
    sampled = {}
    for split in SPLITS:
        per_token = max(1, entries[split][unit]) / entries[split]["tokens"]
        ids[split] = sample_ids(data[split], int(most[split] / per_token))
        if len(ids[split]) < entries[split]["tokens"]:
            sampled[split] = int(len(ids[split]) * per_token)
    return ids, sampled


def token_bits(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Bits per token of val by the frequencies in train, where each token counts once more than it
    occurs. train, val: ids (tokens,)."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(np.mean(np.log2(counts.sum()) - np.log2(counts[val])))


def text_bits(train: bytes, val: bytes, in_bytes: bool) -> float:
    """Bits per byte of val under an n-gram model of train's characters, or bytes. Its alphabet are
    those of both."""
    splits = [to_symbols(text, in_bytes) for text in (train, val)]
    alphabet, symbols = np.unique(np.concatenate(splits), return_inverse=True)
    losses = ngram_losses(symbols[:len(splits[0])], symbols[len(splits[0]):], ORDER, len(alphabet))
    return float(losses.sum() / np.log(2) / len(val))


def xz_bits(train: bytes, val: bytes) -> float | None:
    """Bits that a byte of val adds to the compressed train; None without xz."""
    if lzma is None:
        return None
    return 8 * (xz_size(train + val) - xz_size(train)) / len(val)


def xz_size(text: bytes) -> int:
    """Bytes of a text that xz's method has compressed."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": XZ_DICTIONARY}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    return len(compressor.compress(text)) + len(compressor.flush())


# -- in words --------------------------------------------------------------------------------------

def usable_anchors(meta: dict) -> dict:
    """{name of NAMES: bits per byte} in meta.json; empty for a set from before there were any. What
    is no such number is left out: a run does not end for want of an anchor."""
    anchors = meta.get("anchors")
    if not isinstance(anchors, dict):
        return {}
    return {name: anchors[name] for name in NAMES if is_rate(anchors.get(name))}


def is_rate(value) -> bool:
    """Whether it is a number of bits per byte."""
    return type(value) in (int, float) and 0 < value < 1000


def anchor_lines(anchors: dict) -> list:
    """What prepare.py prints of them."""
    rows = [(f"  {NAMES[name]}", f"{anchors[name]:.3f}") for name in NAMES if name in anchors]
    lines = ["anchors in bits per byte of val, for a model to beat:", *align_columns(rows)]
    sampled = anchors.get("sampled", {})
    counts = [f"{sampled[split]:,} characters of {split}" for split in SPLITS if split in sampled]
    counts += [f"{sampled[f'xz_{split}']:,} bytes of {split} for xz" for split in SPLITS if f"xz_{split}" in sampled]
    if counts:
        lines.append(f"  from an even sample: {', '.join(counts)}")
    return lines


def strongest(anchors: dict) -> str:
    """The two that ask the most of a model, for a line of an evaluation."""
    return ", ".join(f"{NAMES[name]} {anchors[name]:.2f}" for name in ("ngram", "xz") if name in anchors)


def in_nats(anchors: dict, bits_per_nat: float) -> dict:
    """{label: loss in nats per token}, for a picture of losses. bits_per_nat: bits per byte at a loss of
    1 nat per token."""
    if not bits_per_nat:
        return {}
    return {NAMES[name]: bits / bits_per_nat for name, bits in anchors.items()}


def judge(bits: float, anchors: dict) -> str:
    """What a model's bits per byte mean beside the anchors, in words; "" without anchors."""
    if "ngram" not in anchors or "tokens" not in anchors:
        return ""
    place = f"{bits:.2f} bits per byte"
    ngram = f"{NAMES['ngram']} ({anchors['ngram']:.2f})"
    if bits < anchors["ngram"]:
        saved = 100 * (1 - bits / anchors["ngram"])
        return (f"{place}, {saved:.0f}% less than the {ngram}: the model has learned more than which characters often "
                "follow the last few")
    if bits < anchors.get("xz", 0):
        return (f"{place}, better than xz ({anchors['xz']:.2f}), which finds repetitions, and not yet as good as the "
                f"{ngram}, which counts what follows the last characters")
    if bits < anchors["tokens"]:
        return (f"{place}, better than the frequencies of single tokens ({anchors['tokens']:.2f}), and not yet as good "
                f"as the {ngram}, which counts what follows the last characters")
    return f"{place}, no better than the frequencies of single tokens ({anchors['tokens']:.2f}): it has learned no text"
