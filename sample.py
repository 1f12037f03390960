"""Continue a prompt with a trained model; the text appears as it is generated.

    python sample.py --start="The fox"          # the model trained last
    python sample.py --out_dir=out/fables --num_samples=3 --temperature=0.7
    python sample.py --ckpt=ckpt.pt --start=FILE:prompt.txt --stop="\\n\\n"
    python sample.py --prompts=lines.txt --json > samples.jsonl
    python sample.py --interactive              # type, read on, type again
    python sample.py --score=chapter.txt        # how well it knows this text

A checkpoint is the whole model: it holds its settings and its tokenizer, so that one file is all there is to copy.
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from inkling.checkpoint import newest_checkpoint
from inkling.cli import UserError, parse, printable, run
from inkling.device import choose_device, choose_dtype, compile_step, compiler_missing
from inkling.tokenizer import prompt_ids
from train import draw, load


@dataclass
class Options:
    # -- which model
    ckpt: str = ""                      # checkpoint file, or the folder of a run; empty: ckpt.pt of out_dir
    out_dir: str = ""                   # folder of the run; empty: the most recently written one under out/
    init_from: Literal["resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "resume"  # resume: a model of
                                        # ours; else OpenAI's weights, from the Hugging Face cache or downloaded to it
    # -- prompts
    start: str = ""                     # the prompt, FILE:path, or - for standard input; empty: the start of a text
    prompts: str = ""                   # file with one prompt a line, instead of start
    interactive: bool = False           # ask for text, continue it, ask again
    # -- what to write
    num_samples: int = 1                # texts for each prompt
    batch_size: int = 64                # texts generated together, at most
    max_new_tokens: int = 500           # length of each, in tokens
    stop: tuple[str, ...] = ()          # end before this text (\n: a line break); may be given several times
    ignore_eot: bool = False            # go on after the end-of-text token
    json: bool = False                  # one JSON object a line for each text, with tokens and log-probabilities
    # -- how to choose each token
    temperature: float = 0.8            # below 1 more careful, above 1 more daring, 0 always the likeliest
    top_k: int = 200                    # only the k likeliest; 0: all
    top_p: float = 1.0                  # only the likeliest that together have this probability; 1: all
    min_p: float = 0.0                  # only those with this share of the likeliest one's probability; 0: all
    repetition_penalty: float = 1.0     # above 1: what has occurred becomes less likely; 1: no change; 0.01 to 100
    seed: int = 1337                    # of the first text, the next has the next one; the same seed, the same text
    # -- scoring
    score: str = ""                     # file (or -) whose loss to report, instead of writing
    stride: int = 0                     # tokens by which its windows advance; 0: half of block_size
    score_tokens: bool = False          # print each of its tokens with its log-probability
    # -- machine
    device: str = "auto"                # cpu | cuda | cuda:N | mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: float32 on a CPU
    compile: bool = False               # torch.compile the step; takes 10-30 s, for long texts


# -- choosing tokens -----------------------------------------------------------------------------------------------

def filtered(logits, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """Logits (B, vocab_size) with the unlikely ones at -inf: those below the top_k-th largest (0: none), all but the
    smallest set of largest ones whose probabilities reach top_p > 0 (nucleus sampling, arXiv 1904.09751), and those
    with less than min_p of the largest probability (arXiv 2407.01082); one after the other."""
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, at = logits.sort(descending=True)
        p = ordered.softmax(-1)
        tail = p.cumsum(-1) - p >= top_p            # what is reached without this one
        tail[:, 0] = False                          # float32 takes a top_p below 1e-45 for 0
        logits = logits.masked_fill(tail.scatter(-1, at, tail), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


class Picker:
    """Chooses the next id of each row: called with logits (B, vocab_size), returns ids (B,).

    prompts: ids of each row's prompt. Generation starts where the shortest ends; the others' next ids are what their
    prompts say, until they end, too. seeds: of each row's own stream of random numbers, of which every id that the
    row chooses takes one, so that a row's text does not depend on the others. `logprobs` (B,): of the ids chosen
    last, under the model itself (temperature 1, nothing filtered), when Options ask for them."""

    def __init__(self, options: Options, prompts: list, seeds: list, vocab_size: int, device):
        self.options, self.size, self.device, self.logprobs = options, vocab_size, device, None
        self.numbers = [np.random.default_rng(seed) for seed in seeds]
        shortest = min(map(len, prompts))
        self.waits = [len(prompt) - shortest for prompt in prompts]     # steps until a row chooses for itself
        self.dictated = torch.zeros(max(self.waits), len(prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.dictated[:self.waits[row], row] = torch.as_tensor(prompt[shortest:])
        self.dictated, self.steps = self.dictated.to(device), 0
        self.seen = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.as_tensor(prompt)] = True
            self.seen = self.seen.to(device)

    def __call__(self, logits):
        options, choosing = self.options, [self.steps >= wait for wait in self.waits]
        ids = self.choose(logits, choosing)
        if not all(choosing):
            mine = torch.tensor(choosing, device=self.device)
            ids = torch.where(mine, ids, self.dictated[self.steps])
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if options.json:
            self.logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
        self.steps += 1
        return ids

    def choose(self, logits, choosing: list):
        options = self.options
        if self.seen is not None:       # arXiv 1909.05858; negative logits are multiplied, so that they fall as well
            penalty = options.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if options.temperature < 1e-30:
            return draw(logits, 0)
        uniform = torch.tensor([numbers.random() if mine else 0.0
                                for numbers, mine in zip(self.numbers, choosing, strict=True)], dtype=torch.float64)
        if logits.device.type == "mps":                 # knows no float64; and nothing may be rounded up to 1
            uniform = uniform.float().clamp(max=1 - 2**-24)
        likely = None
        if 0 < options.top_k < logits.size(-1):         # what follows need not look at the others; in the ids' order
            likely = logits.topk(options.top_k).indices.sort().values
            logits = logits.gather(-1, likely)
        # Temperature next, as everywhere: top_p and min_p count the probabilities that are drawn from.
        logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
        logits = filtered(logits, 0, options.top_p, options.min_p)
        ids = draw(logits, 1.0, uniform.to(self.device, non_blocking=True))
        # A draw from NaN is past the end: it shall be so of the whole vocabulary, where `write` notices.
        return ids if likely is None else F.pad(likely, (0, 1), value=self.size).gather(-1, ids[:, None])[:, 0]


# -- texts as they grow --------------------------------------------------------------------------------------------

class Sample:
    """One text as it grows. `prompt` and `ids`: the prompt's ids and the new ones; `text`: what the new ones say;
    `finish`: why it has ended (length, stop or eot), "" while it grows."""

    def __init__(self, tokenizer, options: Options, start: str, prompt: list, seed: int):
        self.tokenizer, self.options, self.start, self.prompt, self.seed = tokenizer, options, start, prompt, seed
        self.decoded, self.stops = tokenizer.stream(), [text for text in map(unescaped, options.stop) if text]
        self.ids, self.logprobs, self.text, self.finish = [], [], "", "" if options.max_new_tokens else "length"

    def add(self, token: int, logprob=None):
        """The next id, and its log-probability if it is to be kept."""
        if token == self.tokenizer.eot and not self.options.ignore_eot:
            self.finish = "eot"
            return
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        known = len(self.text)
        self.text += self.decoded(token)
        found = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stops]
        if ends := [at for at in found if at >= 0]:
            self.text, self.finish = self.text[:min(ends)], "stop"
        if not self.finish and len(self.ids) == self.options.max_new_tokens:
            self.finish = "length"

    def certain(self) -> int:
        """How many characters of the text are there to stay: its end might turn out to begin a stop text."""
        if self.finish:
            return len(self.text)
        ends = (len(self.text) - n for stop in self.stops for n in range(min(len(stop) - 1, len(self.text)), 0, -1)
                if self.text.endswith(stop[:n]))
        return min(ends, default=len(self.text))

    def record(self) -> dict:
        keep = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop", "ignore_eot")
        settings = {name: value for name, value in asdict(self.options).items() if name in keep}
        return dict(prompt=self.start, text=self.text, tokens=self.ids, logprobs=self.logprobs, finish=self.finish,
                    seed=self.seed, settings=settings)


class Printer:
    """Writes texts in their order: the first that has not ended as it grows, the others when it is their turn."""

    def __init__(self, options: Options, several: bool):
        self.options, self.several, self.waiting, self.written = options, several, [], None

    def show(self, ending: bool = False):
        """Write what is certain by now. ending: write the unfinished ones, too."""
        while self.waiting:
            sample = self.waiting[0]
            over = bool(sample.finish) or ending
            if not self.options.json:
                if self.written is None:
                    sys.stdout.write("" if self.options.interactive else shown(sample.start))
                    self.written = 0
                certain = len(sample.text) if over else sample.certain()
                sys.stdout.write(shown(sample.text[self.written:certain]))
                self.written = certain
            elif over:
                print(json.dumps(sample.record(), ensure_ascii=False))
            if over and not self.options.json:
                print("\n---------------" if self.several else "")
            sys.stdout.flush()
            if not over:
                return
            self.waiting.pop(0)
            self.written = None


def unescaped(text: str) -> str:
    """A stop text as typed, with line breaks and tabs for \\n and \\t, which few shells can type."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def shown(text: str) -> str:
    """Generated text for a terminal: control characters escaped, line breaks and tabs kept."""
    return "".join(c if c in "\n\t" else printable(c) for c in text) if sys.stdout.isatty() else text


def write(model, batch: list, options: Options, step, printer: Printer):
    """Let the samples of `batch` grow together until all have ended. Prompts of different lengths start where the
    shortest ends."""
    prompts = [sample.prompt[-model.cfg.block_size:] for sample in batch]
    device, width = model.wte.weight.device, min(map(len, prompts))
    pick = Picker(options, prompts, [sample.seed for sample in batch], model.vocab_size, device)
    idx = torch.tensor([prompt[:width] for prompt in prompts], device=device)
    printer.waiting += batch
    printer.show()
    for number, ids in enumerate(model.generate(idx, max(pick.waits) + options.max_new_tokens, pick, step)):
        ids = ids.tolist()
        if max(ids) >= model.vocab_size:                # what a draw from NaN gives
            raise UserError("the model's logits are not finite numbers" + (
                "" if model.wte.weight.dtype == torch.float32 else "; try --dtype=float32"))
        for row, token in enumerate(ids):
            if number >= pick.waits[row] and not batch[row].finish:
                batch[row].add(token, pick.logprobs and pick.logprobs[row])
        printer.show()
        if all(sample.finish for sample in batch):
            break


def converse(model, tokenizer, options: Options, step) -> int:
    """--interactive: each line typed is added to the text so far, and the model goes on from there."""
    with contextlib.suppress(ImportError):      # not there on Windows
        import readline  # noqa: F401, gives input() a history and editing
    print("Type text and Enter to have it continued; Enter alone goes on, /new starts afresh, Ctrl-C stops a text, "
          "Ctrl-D ends.", file=sys.stderr, flush=True)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    so_far, seed = options.start, options.seed
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            return 130
        if line == "/new":
            so_far = ""
            continue
        try:
            prompt = tokenizer.encode_prompt(so_far + line).tolist()
        except ValueError as error:
            print(f"{error}", file=sys.stderr, flush=True)
            continue
        sample = Sample(tokenizer, options, so_far + line, prompt, seed)
        printer = Printer(options, several=False)
        try:
            write(model, [sample], options, step, printer)
        except KeyboardInterrupt:
            printer.show(ending=True)
        so_far, seed = so_far + line + sample.text, seed + 1


# -- scoring -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def token_losses(model, ids: np.ndarray, stride: int) -> torch.Tensor:
    """Losses (len(ids) - 1,) in nats of every id but the first, given those before it: windows of block_size advance
    by `stride`, and each counts what the one before it did not reach, so that all but the first window's ids have at
    least block_size - stride before them."""
    ids = torch.from_numpy(ids.astype(np.int64))
    count, device = len(ids) - 1, model.wte.weight.device
    size = min(model.cfg.block_size, count)
    ends = [*range(size, count, stride), count]
    rows = max(1, min(16, 2**26 // (size * model.vocab_size)))      # bounds the memory of the logits
    losses = torch.empty(count)
    for first in range(0, len(ends), rows):
        some = ends[first:first + rows]
        windows = torch.stack([ids[end - size:end + 1] for end in some]).to(device)
        found = F.cross_entropy(model(windows[:, :-1])[0].transpose(1, 2), windows[:, 1:], reduction="none").cpu()
        for reached, end, row in zip([0, *ends][first:], some, found, strict=False):
            losses[reached:end] = row[size - (end - reached):]
    return losses


def report_score(model, tokenizer, options: Options) -> int:
    """--score: loss, perplexity and bits per byte of a text under the model."""
    text, stride = read_start(f"FILE:{options.score}" if options.score != "-" else "-", "--score"), options.stride
    stride = stride or max(1, model.cfg.block_size // 2)
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"--score={options.score}: {error}")
    if len(ids) < 2:
        raise UserError(f"--score={options.score} has {len(ids)} tokens; a loss needs at least 2")
    losses = token_losses(model, ids, stride)
    total, size = losses.double().sum().item(), sum(len(tokenizer.pieces[value]) for value in ids[1:])
    loss = total / len(losses)
    found = dict(file=options.score, tokens=len(losses), bytes=size, loss=loss, perplexity=math.exp(min(loss, 700)),
                 bits_per_byte=total / math.log(2) / size, block_size=model.cfg.block_size, stride=stride)
    if options.json:
        print(json.dumps(found | ({"token_logprobs": [-x for x in losses.tolist()]} if options.score_tokens else {})))
        return 0
    if options.score_tokens:
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"{'-':>9}  {tokenizer.decode(ids[:1])!r}")
        for value, one in zip(ids[1:], losses.tolist(), strict=True):
            colour = 32 if one < 1 else 33 if one < 4 else 31           # green: expected, red: a surprise
            line = f"{-one:9.4f}  {tokenizer.decode([value])!r}"
            print(f"\033[{colour}m{line}\033[0m" if colours else line)
    print(f"loss {loss:.4f} nats per token | perplexity {found['perplexity']:.2f} | "
          f"{found['bits_per_byte']:.4f} bits per byte | {len(losses):,} tokens, {size:,} bytes | "
          f"context {model.cfg.block_size}, stride {stride}")
    return 0


# -- the program ---------------------------------------------------------------------------------------------------

def read_start(start: str, flag: str) -> str:
    """A text given as itself, as FILE:path or as - (standard input)."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    name = "standard input" if start == "-" else start[5:]
    try:
        return (sys.stdin.buffer.read() if start == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{flag}: {name} is a folder; name a text file")
    except OSError as error:
        raise UserError(f"{flag}: cannot read {name}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {name} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset "
             f"{error.start:,}")


def find_checkpoint(options: Options) -> Path:
    if options.ckpt:
        return Path(options.ckpt)
    path = Path(options.out_dir) / "ckpt.pt" if options.out_dir else newest_checkpoint()
    if not os.path.isfile(path):
        other = path.with_name("last.pt")
        raise UserError(f"no {path}" + (f", but {other} is there: --ckpt={other}" if os.path.isfile(other)
                             else ": train one first with python train.py"))
    print(f"{'scoring with' if options.score else 'sampling from'} {path}", file=sys.stderr, flush=True)
    return path


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__)
    options = Options(**parsed.values)
    rules = {"at least 0": (("max_new_tokens", "temperature", "top_k", "seed", "stride"), lambda x: x >= 0),
             "at least 1": (("num_samples", "batch_size"), lambda x: x >= 1),
             "above 0 and at most 1": (("top_p",), lambda x: 0 < x <= 1),
             "from 0 to 1": (("min_p",), lambda x: 0 <= x <= 1),
             "from 0.01 to 100": (("repetition_penalty",), lambda x: 0.01 <= x <= 100)}
    if broken := [f"{name}={getattr(options, name)} must be {rule}" for rule, (names, holds) in rules.items()
                  for name in names if not holds(getattr(options, name))]:
        raise UserError("; ".join(broken))
    modes = [name for name in ("prompts", "interactive", "score") if getattr(options, name)]
    if len(modes) > 1:
        raise UserError(f"--{' and --'.join(modes)} exclude each other: choose one")
    idle = {("start",): options.prompts or options.score, ("num_samples",): options.interactive or options.score,
            ("stride", "score_tokens"): not options.score, ("ckpt", "out_dir"): options.init_from != "resume"}
    if unused := [f"--{name}" for names, nothing in idle.items() if nothing for name in names if name in parsed.typed]:
        raise UserError(f"{', '.join(unused)} would change nothing here (see --help): leave it out")
    starts = [read_start(options.start, "--start").replace("\r\n", "\n")]     # as editors on Windows write it
    if options.prompts:
        text = read_start(f"FILE:{options.prompts}" if options.prompts != "-" else "-", "--prompts")
        starts = text.replace("\r\n", "\n").removesuffix("\n").split("\n")        # no other ends: U+2028 is text
        if not any(starts):
            raise UserError(f"--prompts={options.prompts} holds no prompt: one a line")
    options.start = starts[0]

    path = find_checkpoint(options) if options.init_from == "resume" else options.init_from
    device = choose_device(options.device)
    dtype = options.dtype
    if dtype == "auto":                 # on a CPU float32 is as fast for one text, and the same in any batch
        dtype = choose_dtype(device, "auto") if torch.device(device).type == "cuda" else "float32"
    model, tokenizer = load(path, device)
    model.to(getattr(torch, dtype))
    if options.stride > model.cfg.block_size:
        raise UserError(f"stride={options.stride} must be at most the model's block_size={model.cfg.block_size}")
    if options.score:
        return report_score(model, tokenizer, options)
    step = None
    if options.compile and (why := compiler_missing(device)):
        print(f"not compiled: {why}", file=sys.stderr, flush=True)
    elif options.compile:
        step = compile_step(model.next_logits, device)
    if options.interactive:
        return converse(model, tokenizer, options, step)

    flag = "--prompts" if options.prompts else "--start"
    prompts = [prompt_ids(tokenizer, start, flag).tolist() for start in starts]
    pairs = [pair for pair in zip(starts, prompts, strict=True) for _ in range(options.num_samples)]
    samples = [Sample(tokenizer, options, *pair, options.seed + number) for number, pair in enumerate(pairs)]
    printer = Printer(options, several=len(samples) > 1)
    try:
        for first in range(0, len(samples), options.batch_size):
            write(model, samples[first:first + options.batch_size], options, step, printer)
    except KeyboardInterrupt:
        printer.show(ending=True)
        return 130
    return 0


if __name__ == "__main__":
    run(main)
