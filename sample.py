"""Continue a prompt with a trained model; the text appears as it is generated.

    python sample.py --start="Once there was a hen"                # the model trained last
    python sample.py --out_dir=out/shakespeare_char --num_samples=3 --temperature=0.7
    python sample.py --ckpt=/anywhere/ckpt.pt --start=FILE:prompt.txt --temperature=0

A checkpoint is the whole model: it holds its settings and its tokenizer, so that one file is all there is to copy.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from prepare import prompt_ids
from support import runtime
from support.cli import fail, parse, printable, run
from train import draw, load, restore


@dataclass
class Options:
    # -- which model
    ckpt: str = ""                      # checkpoint file; empty: ckpt.pt of out_dir
    out_dir: str = ""                   # folder of the run; empty: the most recently written one under out/
    init_from: Literal["resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "resume"  # resume: a model of
                                        # ours; else OpenAI's weights, from the Hugging Face cache or downloaded to it
    # -- what to write
    start: str = ""                     # the prompt, or FILE:path of it; empty: the start of a text
    num_samples: int = 1                # texts, one after another
    max_new_tokens: int = 500           # length of each, in tokens
    # -- how to choose each token
    temperature: float = 0.8            # below 1 more careful, above 1 more daring, 0 always the likeliest
    top_k: int = 200                    # only the k likeliest; 0: all
    top_p: float = 1.0                  # only the likeliest that together have this probability; 1: all
    seed: int = 1337                    # the same seed gives the same text
    # -- machine
    device: str = "auto"                # auto | cpu | cuda | cuda:N | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU, bfloat16 on a GPU
    compile: bool = False               # torch.compile the model


def filtered(logits, top_k: int = 0, top_p: float = 1.0):
    """Logits (B, vocab_size) with the unlikely ones at -inf: those below the top_k-th largest (0: none), all but the
    smallest set of largest ones whose probabilities reach top_p > 0 (nucleus sampling, arXiv 1904.09751)."""
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, at = logits.sort(descending=True)
        p = ordered.softmax(-1)
        tail = p.cumsum(-1) - p >= top_p            # what is reached without this one
        logits = logits.masked_fill(tail.scatter(-1, at, tail), -torch.inf)
    return logits


def picker(options: Options, seed: int, device: str):
    """A function from logits (1, vocab_size) to one id (1,), with a stream of random numbers of its own."""
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits):
        if options.temperature == 0:
            return draw(logits, 0)
        # Temperature first, as everywhere: top_p counts the probabilities that are drawn from.
        top = logits.amax(-1, keepdim=True)
        return draw(filtered((logits - top) / options.temperature, options.top_k, options.top_p), 1.0, generator)

    return pick


def shown(text: str) -> str:
    """Generated text for a terminal: control characters escaped, line breaks and tabs kept."""
    return "".join(c if c in "\n\t" else printable(c) for c in text) if sys.stdout.isatty() else text


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__)
    options = Options(**parsed.values)
    rules = {"num_samples": options.num_samples >= 1, "max_new_tokens": options.max_new_tokens >= 0,
             "temperature": options.temperature >= 0, "top_k": options.top_k >= 0, "top_p": 0 < options.top_p <= 1,
             "seed": options.seed >= 0}
    if broken := [f"{name}={getattr(options, name)}" for name, holds in rules.items() if not holds]:
        fail(f"out of range: {', '.join(broken)} (see --help)")
    pretrained = "" if options.init_from == "resume" else options.init_from
    path = Path(pretrained or options.ckpt or (Path(options.out_dir) / "ckpt.pt" if options.out_dir
                                                else runtime.newest_checkpoint()))
    if not (pretrained or options.ckpt):
        if not os.path.isfile(path):
            other = path.with_name("last.pt")
            fail(f"no {path}" + (f", but {other} is there: --ckpt={other}" if os.path.isfile(other)
                                 else ": train one first with python train.py"))
        print(f"sampling from {path}", file=sys.stderr, flush=True)
    start = options.start
    if start.startswith("FILE:"):
        try:
            start = Path(start[5:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read the prompt from {start[5:]}: {getattr(error, 'strerror', None) or error}")
    device = runtime.choose_device(options.device)
    dtype = options.dtype
    if dtype == "auto":                 # for one token at a time, casting costs a CPU more than it saves
        dtype = runtime.choose_dtype(device, "auto") if torch.device(device).type == "cuda" else "float32"
    if pretrained:
        from convert import imported  # for the weights of OpenAI alone
        model, tokenizer = restore(imported(pretrained), pretrained)
        model.to(device).eval()
    else:
        model, tokenizer = load(path, device)
    prompt = torch.from_numpy(prompt_ids(tokenizer, start, "--start"))[None].to(device)             # (1, T)
    if options.compile and (why := runtime.compiler_missing(device)):
        print(f"not compiled: {why}", file=sys.stderr, flush=True)
    elif options.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)
    for number in range(options.num_samples):
        pick, text = picker(options, options.seed + number, device), tokenizer.stream()
        sys.stdout.write(shown(start))
        try:
            with runtime.autocast(device, dtype):
                for token in model.generate(prompt, options.max_new_tokens, pick):
                    sys.stdout.write(shown(text(token.item())))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            print(shown(text(None)))
            return 130
        print(shown(text(None)) + ("\n---------------" if options.num_samples > 1 else ""), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
