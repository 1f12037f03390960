"""Whether llama.cpp says what Inkling says: a checkpoint's GGUF file in llama.cpp itself, through llama-cpp-python
(`pip install llama-cpp-python` builds it from source, which takes minutes).

    python bench/exported.py out/portable/ckpt.pt               # convert, then compare
    python bench/exported.py out/portable/ckpt.pt --type=q8_0 --text=book.txt

Prompts and the start of a text are continued greedily by both, with a cache of 32-bit numbers in llama.cpp. They must
agree up to the first token where our two best logits are nearer than 0.01 to each other (with --type=q8_0 they need
not: it says what eight bits cost). The ids of the text, the bytes of these ids and the mean loss, which must agree to
0.01, are compared, too; and each end-of-text token must end a text in llama.cpp.
"""

import ctypes
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT
from imported import agreeing, continue_ours

import convert
from inkling.cli import PositiveInt, UserError, parse, run
from train import load

PROMPTS = ("Once upon a time", "The ", "Said the fox", "1, 2, 3, 4,", "Dear Sir or Madam,\n\n",
           " two spaces  and a dot.", "caf\u00e9 \u72d0\u72f8 \U0001f98a", "It's 1234567.\n\n \t x  ")
TIE = 0.01                              # logits nearer than this are a tie


@dataclass
class Options:
    type: Literal["f32", "f16", "q8_0"] = "f32"     # of the weights in the GGUF file
    tokens: PositiveInt = 100           # length of each continuation
    text: str = "data/fables/input.txt"     # whose loss and ids are compared, its last 20,000 characters


def import_llama_cpp():
    try:
        import llama_cpp
    except ImportError:
        raise UserError("the comparison needs llama.cpp: pip install llama-cpp-python")
    return llama_cpp


def open_theirs(path: str, context: int):
    """The model in llama.cpp, whose eval keeps the logits of every token."""
    llama_cpp = import_llama_cpp()
    return llama_cpp.Llama(path, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, verbose=False,
                           type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)


def logits_of(theirs, ids: list) -> torch.Tensor:
    """llama.cpp's logits (tokens, vocab_size) of a text."""
    theirs.reset()
    theirs.eval(ids)
    return torch.from_numpy(np.array(theirs.scores[:len(ids)], np.float32))


def bytes_of(theirs, ids: list) -> bytes:
    """llama.cpp's text of ordinary tokens, one by one. (Llama.detokenize has room for 32 bytes of a token.)"""
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(theirs.model)
    buffer = ctypes.create_string_buffer(4096)
    pieces = []
    for token in ids:
        size = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
        pieces.append(buffer.raw[:size])
    return b"".join(pieces)


def ends_theirs(theirs, token: int) -> bool:
    """Whether llama.cpp stops at a token."""
    llama_cpp = import_llama_cpp()
    return llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(theirs.model), token)


def continue_theirs(theirs, prompt: list, tokens: int, stops: frozenset) -> list:
    """The likeliest ids, up to an end-of-text token, which is the last."""
    theirs.reset()
    theirs.eval(prompt)
    ids = []
    while len(ids) < tokens:
        ids.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        if ids[-1] in stops:
            break
        theirs.eval(ids[-1:])
    return ids


@torch.no_grad()
def gap(ours, ids: list) -> float:
    """How far our best logit after `ids` is from the second."""
    best, second = ours(torch.tensor([ids]))[0][0, -1].topk(2).values.tolist()
    return best - second


@torch.no_grad()
def losses(ours, theirs, ids: list, window: int) -> tuple:
    """The mean losses of a text in nats per token, here and there, over windows of `window` tokens."""
    totals = [0.0, 0.0]
    count = 0
    for start in range(0, len(ids) - window, window):
        piece = ids[start:start + window]
        targets = torch.tensor(ids[start + 1:start + window + 1])
        for number, logits in enumerate((ours(torch.tensor([piece]))[0][0], logits_of(theirs, piece))):
            totals[number] += F.cross_entropy(logits, targets, reduction="sum").item()
        count += window
    return totals[0] / count, totals[1] / count


def compare(ckpt: str, gguf: str, options: Options) -> int:
    """How many comparisons failed."""
    ours, tokenizer = load(ckpt)
    context = ours.cfg.block_size
    theirs = open_theirs(gguf, context)
    failed = 0
    text = Path(ROOT, options.text).read_text(encoding="utf-8")[-20_000:].strip()
    for prompt in (*PROMPTS, text[:40]):
        if tokenizer.fallback is None and tokenizer.count_unknown(prompt):
            continue
        ids = tokenizer.encode_prompt(prompt).tolist()
        same_prompt = ids == theirs.tokenize(prompt.encode(), add_bos=True, special=False)
        length = min(options.tokens, context - len(ids))
        one = continue_ours(ours, tokenizer, ids, length)
        other = continue_theirs(theirs, ids, length, tokenizer.stops)
        same = agreeing(one, other)
        verdict = "same"
        if one != other:
            distance = gap(ours, ids + one[:same])
            verdict = f"a tie ({distance:.4f})" if distance < TIE else f"DIFFERENT ({distance:.4f})"
        if not same_prompt:
            verdict = "DIFFERENT ids of the prompt"
        failed += verdict.startswith("DIFFERENT") and options.type != "q8_0"
        print(f"{verdict}  {same} of {len(one)} tokens after {prompt!r}: "
              f"{tokenizer.decode(one, begins=False)[:50]!r}", flush=True)
    ids = tokenizer.encode(text).tolist()
    same_ids = ids == theirs.tokenize(text.encode(), add_bos=False, special=False)
    print(f"{'same' if same_ids else 'DIFFERENT'}  {len(ids):,} ids of the end of {options.text}")
    same_bytes = bytes_of(theirs, ids) == text.encode()
    print(f"{'same' if same_bytes else 'DIFFERENT'}  {len(text.encode()):,} bytes of these ids")
    missing = [token for token in sorted(tokenizer.stops) if not ends_theirs(theirs, token)]
    print(f"{'DIFFERENT' if missing else 'same'}  {len(tokenizer.stops)} end-of-text tokens")
    here, there = losses(ours, theirs, ids, context)
    is_near = abs(here - there) < 0.01
    print(f"{'same' if is_near else 'DIFFERENT'}  loss {here:.6f} here, {there:.6f} in llama.cpp, at context {context}")
    return failed + (not same_ids) + (not same_bytes) + bool(missing) + (not is_near)


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    if len(parsed.words) != 1:
        raise UserError("name one checkpoint: python bench/exported.py out/portable/ckpt.pt")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.gguf"))
        convert.main(["gguf", parsed.words[0], f"--out={path}", f"--type={options.type}"])
        return 1 if compare(parsed.words[0], path, options) else 0


if __name__ == "__main__":
    run(main)
