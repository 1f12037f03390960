"""A checkpoint as one web page, which runs the model by itself: the files of inkling/page/, the weights in 8
or 16 bits, the tokenizer, and what is known of the training.

Weights are stored row by row: a row's scale is its largest magnitude divided by the largest integer,
and the weights are rounded to multiples of it. Everything else in the page is JSON or text, in which
nothing that a checkpoint holds can become HTML.
"""

import base64
import html
import json
import math
import os
import re
import time
from dataclasses import asdict
from pathlib import Path

import torch

from inkling.cli import UserError, from_dict
from inkling.files import atomic_write
from inkling.format import shell_word, short, size
from inkling.js_regex import to_javascript
from inkling.report import changed_settings, count_parameters
from inkling.tokenizer import Tokenizer
from train import MODEL_FIELDS, Config, read_checkpoint, restore_model

PARTS = Path(__file__).parent / "page"
LARGEST_PAGE = 200_000_000              # bytes; browsers take time and memory for more, or refuse
INTEGERS = {8: torch.int8, 16: torch.int16}
WEIGHTS = "weights"                     # the id of the element that holds them, the page's last


# -- weights ---------------------------------------------------------------------------------------

def quantize(matrix: torch.Tensor, bits: int) -> tuple:
    """(integers (rows, columns), scales (rows,) in float32) of a matrix (rows, columns), whose weights
    are near integers * scales."""
    largest = torch.iinfo(INTEGERS[bits]).max
    scales = matrix.abs().amax(1) / largest
    divisors = torch.where(scales > 0, scales, torch.ones(()))      # a row of zeros stays one
    integers = (matrix / divisors[:, None]).round().clamp(-largest, largest)
    return integers.to(INTEGERS[bits]), scales


def page_weights(model) -> dict:
    """The tensors that a page holds, by their names in a checkpoint: without the rows that pad the
    vocabulary, and without a head that is the embedding."""
    weights = dict(model.state_dict())
    for name in ("wte.weight", "head.weight", "head.bias"):
        if name in weights:
            weights[name] = weights[name][:model.vocab_size]
    if model.cfg.tie_weights:
        del weights["head.weight"]
    return weights


def packed_size(tensor: torch.Tensor, bits: int) -> int:
    """Bytes of a tensor in a page, up to the next multiple of 4."""
    if tensor.dim() == 1:
        return 4 * tensor.numel()
    scales = 4 * len(tensor) if bits < 32 else 0
    return scales + 4 * -(-tensor.numel() * bits // 32)


def pack(weights: dict, bits: int) -> tuple:
    """(list of {name, shape, bits, offset}, their bytes). A matrix is its scales and then its integers;
    with 32 bits, and for whatever has one dimension, float32 numbers alone. All are little-endian, and
    each begins at a multiple of 4."""
    tensors = []
    parts = []
    offset = 0
    for name, tensor in weights.items():
        is_exact = bits == 32 or tensor.dim() == 1
        tensors.append({"name": name, "shape": list(tensor.shape), "bits": 32 if is_exact else bits, "offset": offset})
        if is_exact:
            packed = little_endian(tensor.float())
        else:
            integers, scales = quantize(tensor.float(), bits)
            packed = little_endian(scales) + little_endian(integers)
        packed += bytes(-len(packed) % 4)
        parts.append(packed)
        offset += len(packed)
    return tensors, b"".join(parts)


def little_endian(tensor: torch.Tensor) -> bytes:
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


# -- tokenizer -------------------------------------------------------------------------------------

def page_tokenizer(tokenizer: Tokenizer) -> dict:
    """What tokenizer.js needs. Raises ValueError for a tokenizer that it cannot be."""
    if tokenizer.kind not in ("char", "byte", "bpe"):
        raise ValueError("a page has no counterpart of its tokenizer.json, which needs the package tokenizers; one of "
                         "the kinds char, byte and bpe can be in a page (python prepare.py --help)")
    stored = {
        "kind": tokenizer.kind,
        "bos": tokenizer.bos,
        "stops": sorted(tokenizer.stops),
        "lineBreak": tokenizer.line_break,
        "emptyPrompt": tokenizer.encode_prompt("").tolist(),
        "fallback": tokenizer.fallback,
    }
    if tokenizer.kind == "char":
        stored["chars"] = tokenizer.stored["chars"]
    if tokenizer.kind == "bpe":
        stored |= {name: tokenizer.stored[name] for name in ("ranks", "special")}
        stored["pattern"] = page_pattern(tokenizer.stored["pattern"])
    return stored


def page_pattern(pattern: str) -> str:
    try:
        return to_javascript(pattern)
    except ValueError as error:
        raise ValueError(f"the pattern of its tokenizer cannot be spelled in JavaScript ({error}): {pattern[:200]}")


# -- what is known of the model --------------------------------------------------------------------

def model_card(content: dict, model, tokenizer: Tokenizer, source: str, bits: int) -> dict:
    """What the page says about the model; None: not known. content: of the checkpoint."""
    stored = content["config"]
    parameters, of_ngrams = count_parameters(model)
    val_loss = content.get("losses", {}).get("val")
    path = Path(source)
    return {
        "name": stored.get("dataset") or model_name(path),
        "parameters": parameters,
        "ngram_parameters": of_ngrams,
        "vocab_size": model.vocab_size,
        "tokenizer": str(tokenizer.stored.get("name") or tokenizer.kind),
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
        "step": content["step"],
        "tokens": content.get("tokens"),
        "seconds": content.get("seconds"),
        "date": time.strftime("%Y-%m-%d", time.localtime(os.stat(path).st_mtime)) if path.is_file() else None,
        "command": training_command(stored, source),
        "bits": bits,
    }


def training_command(stored: dict, source: str) -> str | None:
    """The command that trained a model with these settings, but for what names places on this machine,
    since a page is given away. None: it was not trained here."""
    if "dataset" not in stored:
        return None
    words = ["python train.py"]
    for setting in changed_settings(Config(**from_dict(Config, stored, source))):
        name, _, value = setting.partition("=")
        is_place = name == "data_dir" or (name == "init_from" and re.search(r"[/\\]", value))
        if not is_place and not name.startswith("wandb_"):
            words.append(f"--{name}={shell_word(value)}")
    return " ".join(words)


def model_name(path: Path) -> str:
    """Of a model that was not trained here: that of its folder, or its own."""
    return path.resolve().parent.name if path.is_file() else path.name


# -- the page --------------------------------------------------------------------------------------

def to_json(value) -> str:
    """JSON that can stand in a <script> element: no < in it can begin a tag or a comment."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def build_page(content: dict, source: str, bits: int) -> str:
    """The HTML of a checkpoint's content. bits: 8, 16 or, for tests, 32. Raises UserError for what no page
    can hold."""
    model, tokenizer = restore_model(content, source)
    weights = page_weights(model)
    check_size(weights, source, bits)
    try:
        stored_tokenizer = page_tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"{source}: {error}")
    tensors, packed = pack(weights, bits)
    config = asdict(model.cfg)
    card = model_card(content, model, tokenizer, source, bits)
    parts = {
        "title": html.escape(card["name"]),
        "style": read_part("page.css"),
        "worker": "\n".join(map(read_part, ("tokenizer.js", "tensors.js", "model.js", "worker.js"))),
        "page": "\n".join(map(read_part, ("texts.js", "page.js"))),
        "model": to_json({"config": {name: config[name] for name in sorted(MODEL_FIELDS)}, "tensors": tensors,
                          "tokenizer": stored_tokenizer, "card": card}),
        WEIGHTS: base64.b64encode(packed).decode(),
    }
    # In one pass: what a part holds is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read_part("page.html"))


def read_part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def check_size(weights: dict, source: str, bits: int):
    """Raise UserError if the page would be too large, before any work is done for it."""
    expected = page_size(weights, bits)
    if expected <= LARGEST_PAGE:
        return
    way_out = "python sample.py runs it without a page; lower --n_layer, --n_embd or --ngram_rows for a smaller one"
    if bits > 8 and page_size(weights, 8) <= LARGEST_PAGE:
        way_out = "leave --bits out"
    raise UserError(f"{source}: a page of its {short(sum(tensor.numel() for tensor in weights.values()))} parameters "
                    f"in {bits} bits would have {size(expected)}, and {size(LARGEST_PAGE)} is what browsers can be "
                    f"expected to open: {way_out}")


def page_size(weights: dict, bits: int) -> int:
    """Bytes of the weights in base64; the rest of a page is small."""
    return sum(packed_size(tensor, bits) for tensor in weights.values()) * 4 // 3


def write_page(source: str, out: str, bits: int):
    """The command: a checkpoint, or whatever read_checkpoint takes, to a page. Prints what it wrote."""
    path = Path(out)
    page = build_page(read_checkpoint(source), source, bits).encode("utf-8")
    try:
        with atomic_write(path) as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}")
    print(f"{path}: {size(len(page))}, weights in {bits} bits")
    print(f"next     open {path} in a browser; it needs no server and no network", flush=True)
