"""Continue a prompt with a trained model; the text appears as it is generated.

    python sample.py --start="The fox"          # the model trained last
    python sample.py --out_dir=out/fables --num_samples=3 --temperature=0.7
    python sample.py --ckpt=ckpt.pt --start=FILE:prompt.txt --stop="\\n\\n"
    python sample.py --prompts=lines.txt --json > samples.jsonl
    python sample.py --interactive              # type, read, type again
    python sample.py --score=chapter.txt        # the loss of this text
    python sample.py --score=chapter.txt --adapt=1e-4   # it learns meanwhile
    python sample.py --num_samples=5 --novelty  # what of a sample is copied
    python sample.py --ckpt=a.pt,b.pt           # the mean of two models

A checkpoint holds the model, its settings and its tokenizer: one file is all you need to copy.
"""

import contextlib
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

# As in train.py, where it is explained: threads that wait sleep sooner, so other programs slow this one less.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F

from inkling.checkpoint import newest_checkpoint
from inkling.cli import (
    UNSAFE,
    AutoPath,
    FilePath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Texts,
    UserError,
    above,
    at_least,
    check,
    expand_home,
    parse,
    printable,
    printable_text,
    quoted,
    run,
    unescape,
)
from inkling.device import choose_device, choose_dtype, compile_step, compiler_missing
from inkling.ensemble import Counted, add_ngrams, combine, find_ngram_set, split_names
from inkling.hints import checkpoints_like, command_for_sampling, files_near, there_is
from inkling.huggingface import NAMES
from inkling.novelty import AUTO, TrainingText, compare, find_training_text, novelty_lines, novelty_record
from inkling.readers import to_newlines
from inkling.sniff import marked_encoding
from inkling.tokenizer import prompt_ids
from train import GPT, AdamW, draw, load, read_checkpoint

TopP = Annotated[float, above(0).at_most(1)]
Penalty = Annotated[float, at_least(0.01).at_most(100)]
AnySeed = Annotated[int, at_least(0)]


@dataclass
class Options:
    # -- which model
    ckpt: FilePath = ""                 # checkpoint or folder of a run; several with commas between
                                        # them (a,b): the mean of their probabilities; empty: ckpt.pt
                                        # of out_dir
    out_dir: FilePath = ""              # folder of the run; empty: the latest one under out/
    init_from: FilePath = "resume"      # resume: your own model; gpt2, gpt2-medium, gpt2-large,
                                        # gpt2-xl: OpenAI's weights, from the Hugging Face cache or
                                        # downloaded to it; or a Hugging Face folder, or a
                                        # checkpoint
    # -- prompts
    start: str = ""                     # the prompt, in quotes: --start="The fox"; where \n, \t, \r and \\ are read; or
                                        # FILE:path, or - for standard input, taken as they stand;
                                        # empty: a text begins, as in the training set
    prompts: FilePath = ""              # file with one prompt per line, taken as it stands, instead
                                        # of start
    interactive: bool = False           # read a line, continue it, read the next
    newlines: Literal["convert", "keep"] = "convert"    # line ends of prompts, stop texts and the
                                        # text to score: convert them to the model's (\n, unless its
                                        # text was prepared with others), or take exactly these
    # -- what to generate
    num_samples: PositiveInt = 1        # texts for each prompt
    batch_size: PositiveInt = 64        # texts generated together, at most
    max_new_tokens: NonNegativeInt = 500    # length of each text, in tokens
    stop: Texts = ()                    # end before this text, with the same escapes as start; may
                                        # be given several times
    ignore_eot: bool = False            # continue after the end-of-text token
    json: bool = False                  # print each text as a JSON object on a line, with tokens
                                        # and log-probabilities
    # -- how to choose each token
    temperature: NonNegativeFloat = 0.8     # below 1 more careful, above 1 more daring, 0 greedy
    top_k: NonNegativeInt = 200         # only the k likeliest; 0: all
    top_p: TopP = 1.0                   # only the likeliest that together have this probability;
                                        # 1: all
    min_p: Fraction = 0.0               # only those with this fraction of the likeliest one's
                                        # probability; 0: all
    repetition_penalty: Penalty = 1.0   # above 1: tokens that have occurred become less likely;
                                        # 1: off
    seed: AnySeed = 1337                # random seed of the first text; each further text takes the
                                        # next one
    # -- counting
    ngram: Fraction = 0.0               # the share of a counted n-gram model in each probability, such as
                                        # 0.3; it is counted from the set in data/ that the model was
                                        # trained on; 0: none
    # -- copying
    novelty: AutoPath = ""              # show how much of each text is copied: its longest run of
                                        # characters that stands in the training text, and where.
                                        # bare: the set in data/ that the model was trained on; or a
                                        # text file, or the folder of a set
    # -- scoring
    score: FilePath = ""                # file (or -) whose loss to report, instead of generating
    stride: NonNegativeInt = 0          # with score: tokens by which the windows advance; 0: half of
                                        # block_size
    score_tokens: bool = False          # with score: print each token with its log-probability
    adapt: NonNegativeFloat = 0.0       # with score: score the text again with a copy of the weights that
                                        # learns: after each window is scored, one step of Adam on it,
                                        # with this learning rate and 30 times it for the embeddings
                                        # and n-gram vectors; 0: off
    # -- machine
    device: str = "auto"                # cpu | cuda | cuda:N | mps; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the weights; auto:
                                        # float32 on a CPU
    compile: bool = False               # torch.compile the step; takes 10-30 s, for long texts

    def rules(self) -> dict:
        modes = [name for name in ("prompts", "interactive", "score") if getattr(self, name)]
        return {
            f"--{' and --'.join(modes)} exclude each other: choose one": len(modes) <= 1,
            "ngram=1 would leave nothing of the model: choose less than 1": self.ngram < 1,
            "--compile cannot count n-grams: leave out --compile or --ngram": not (self.compile and self.ngram),
        }


FIRST_IN_HELP = ("start", "out_dir", "ckpt", "max_new_tokens", "num_samples", "temperature", "interactive", "score")


# -- choosing tokens -------------------------------------------------------------------------------

def select_top_k(logits, k: int):
    """The k largest of logits (B, vocab_size) and their ids, both (B, k), in the order of ids."""
    ids = logits.topk(k).indices.sort().values
    return logits.gather(-1, ids), ids


def keep_top_p(logits, top_p: float):
    """Nucleus sampling (arXiv 1904.09751): keep the smallest set of largest logits (B, V) whose
    probabilities reach top_p > 0. All others become -inf."""
    ordered, places = logits.sort(descending=True)
    p = ordered.softmax(-1)
    reached_before = p.cumsum(-1) - p
    is_tail = reached_before >= top_p
    is_tail[:, 0] = False                       # float32 takes a top_p below 1e-45 for 0
    return logits.masked_fill(is_tail.scatter(-1, places, is_tail), -torch.inf)


def keep_min_p(logits, min_p: float):
    """Keep the logits (B, V) with at least min_p > 0 of the largest probability (arXiv 2407.01082).
    All others become -inf."""
    threshold = logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < threshold, -torch.inf)


def penalize(logits, seen, penalty: float):
    """Divide the logits of the ids in `seen`, a mask (B, vocab_size), by `penalty` (arXiv
    1909.05858). Negative ones are multiplied, so that they fall as well."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


class Picker:
    """Picks the next id of each row: called with logits (B, vocab_size), it returns ids (B,).

    Generation starts where the shortest of `prompts` (the ids of each row's prompt) ends; a row
    with a longer prompt gets the rest of it first, and only then chooses. Each row draws from a
    random stream of its own, one number for each id it chooses, so its text does not depend on the
    other rows.

    `logprobs`: of the ids picked last, as the model itself has them (temperature 1, all tokens);
    with --json only."""

    def __init__(self, options: Options, prompts: list, seeds: list, vocab_size: int, device):
        self.options = options
        self.vocab_size = vocab_size
        self.device = device
        self.random_streams = [np.random.default_rng(seed) for seed in seeds]
        self.steps = 0
        self.logprobs = None
        shortest = min(len(prompt) for prompt in prompts)
        self.waits = [len(prompt) - shortest for prompt in prompts]     # steps until a row chooses
        self.prompt_rests = torch.zeros(max(self.waits), len(prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.prompt_rests[:self.waits[row], row] = torch.as_tensor(prompt[shortest:])
        self.prompt_rests = self.prompt_rests.to(device)
        self.seen = None                            # (B, vocab_size): which ids have occurred
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.as_tensor(prompt)] = True
            self.seen = self.seen.to(device)

    def __call__(self, logits):
        chooses = [self.steps >= wait for wait in self.waits]
        ids = self.choose_ids(logits, chooses)
        if not all(chooses):
            mask = torch.tensor(chooses, device=self.device)
            ids = torch.where(mask, ids, self.prompt_rests[self.steps])
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.options.json:
            self.logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
        self.steps += 1
        return ids

    def choose_ids(self, logits, chooses: list):
        """Sample an id for each row, as the options say; where the logits are NaN, vocab_size."""
        options = self.options
        if self.seen is not None:
            logits = penalize(logits, self.seen, options.repetition_penalty)
        if options.temperature < 1e-30:             # 0, or what float32 takes for 0
            return draw(logits, 0)
        uniform = self.random_numbers(chooses, logits.device)
        candidates = None                           # (B, top_k) ids; None: all of them
        if 0 < options.top_k < logits.size(-1):
            logits, candidates = select_top_k(logits, options.top_k)
        # The temperature comes first: top_p and min_p count the probabilities that are drawn from.
        logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
        if options.top_p < 1:
            logits = keep_top_p(logits, options.top_p)
        if options.min_p > 0:
            logits = keep_min_p(logits, options.min_p)
        ids = draw(logits, 1.0, uniform)
        if candidates is None:
            return ids
        # From NaN, draw returns top_k, one past the last candidate: that becomes vocab_size.
        return F.pad(candidates, (0, 1), value=self.vocab_size).gather(-1, ids[:, None])[:, 0]

    def random_numbers(self, chooses: list, device):
        """A number in [0, 1) for each row that chooses, from its own stream; 0 for the others."""
        numbers = [stream.random() if row_chooses else 0.0
                   for stream, row_chooses in zip(self.random_streams, chooses, strict=True)]
        uniform = torch.tensor(numbers, dtype=torch.float64)
        if device.type == "mps":            # has no float64, and nothing may be rounded up to 1
            uniform = uniform.float().clamp(max=1 - 2**-24)
        return uniform.to(device, non_blocking=True)


# -- texts as they grow ----------------------------------------------------------------------------

RECORDED_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                     "max_new_tokens", "stop", "ignore_eot")


class Sample:
    """The continuation of one prompt, as it grows.

    ids, logprobs: the new tokens; text: what they say, up to a stop text; finish: why it has ended
    ("length", "stop" or "eot"), "" while it grows."""

    def __init__(self, tokenizer, options: Options, prompt: str, prompt_tokens: list, seed: int):
        self.tokenizer = tokenizer
        self.options = options
        self.prompt = prompt
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self.decode_next = tokenizer.stream()
        self.stops = [Stop(tokenizer.fit_form(unescape(stop)), options.newlines == "keep")
                      for stop in options.stop if stop]
        self.ids = []
        self.logprobs = []
        self.text = ""
        self.finish = "" if options.max_new_tokens else "length"

    def add(self, token: int, logprob: float | None = None):
        """Append a token, with its log-probability where that is recorded."""
        if token in self.tokenizer.stops and not self.options.ignore_eot:
            self.finish = "eot"
            return
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        searched = len(self.text)
        self.text += self.decode_next(token)
        places = [place for stop in self.stops if (place := stop.find(self.text, searched)) is not None]
        if places:
            self.text = self.text[:min(places)]
            self.finish = "stop"
        elif len(self.ids) == self.options.max_new_tokens:
            self.finish = "length"

    def settled_length(self) -> int:
        """How many characters can be shown: what may turn out to begin a stop text has to wait."""
        if self.finish:
            return len(self.text)
        return min((stop.begins_at(self.text) for stop in self.stops), default=len(self.text))

    def record(self) -> dict:
        """The object that --json prints."""
        options = asdict(self.options)
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.ids,
            "logprobs": self.logprobs,
            "finish": self.finish,
            "seed": self.seed,
            "settings": {name: options[name] for name in options if name in RECORDED_SETTINGS},
        }


class Stop:
    """A text before which samples end. Unless `exact`, its line breaks are met by any line end, \\n,
    \\r\\n or \\r, since the model writes those of the text that it was trained on."""

    def __init__(self, text: str, exact: bool):
        self.exact = exact
        self.text = text if exact else to_newlines(text)
        self.longest = len(self.text)
        self.pattern = re.compile(re.escape(self.text))
        if not exact:
            self.longest += self.text.count("\n")       # each may be \r\n
            lines = map(re.escape, self.text.split("\n"))
            self.pattern = re.compile(r"(?>\r\n|\r|\n)".join(lines))

    def find(self, text: str, searched: int) -> int | None:
        """Where it begins in `text`, of which the first `searched` characters do not contain it."""
        match = self.pattern.search(text, max(0, searched - self.longest))
        return match.start() if match else None

    def begins_at(self, text: str) -> int:
        """Where an end of `text` begins that may turn out to begin this; len(text) if there is none."""
        for start in range(max(0, len(text) - self.longest), len(text)):
            end = text[start:] if self.exact else to_newlines(text[start:])
            if self.text.startswith(end):
                return start
        return len(text)


class Printer:
    """Prints samples in order: the first unfinished one as it grows, the others in their turn."""

    def __init__(self, options: Options, several: bool):
        self.options = options
        self.several = several
        self.waiting = []
        self.printed = 0        # characters of the first one's prompt and text
        self.escapes = sys.stdout.isatty()

    def add(self, samples: list):
        self.waiting += samples
        self.update()

    def update(self, interrupted: bool = False):
        """Print what is settled by now; all there is if generation was interrupted."""
        while self.waiting:
            sample = self.waiting[0]
            complete = interrupted or bool(sample.finish)
            if not self.options.json:
                self.print_text(sample, complete)
            elif complete:
                self.print_record(sample.record())
            sys.stdout.flush()
            if not complete:
                return
            self.waiting.pop(0)
            self.printed = 0

    def print_record(self, record: dict):
        line = json.dumps(record, ensure_ascii=False)
        if self.escapes:                    # as JSON does it
            line = UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], line)
        print(line)

    def print_text(self, sample: Sample, complete: bool):
        text = sample.text if complete else sample.text[:sample.settled_length()]
        if not self.options.interactive:
            text = sample.prompt + text
        if self.escapes and not complete:
            text = text.removesuffix("\r")              # it may become a \r\n
        new = text[self.printed:]
        sys.stdout.write(printable_text(new) if self.escapes else new)
        self.printed = len(text)
        if complete:
            print("\n---------------" if self.several else "")


# -- generation ------------------------------------------------------------------------------------

def generate_batch(model, batch: list, options: Options, step, printer: Printer):
    """Generate the samples of `batch` together until all have ended."""
    weight = next(model.parameters())
    prompts = [sample.prompt_tokens[-model.cfg.block_size:] for sample in batch]
    seeds = [sample.seed for sample in batch]
    pick = Picker(options, prompts, seeds, model.vocab_size, weight.device)
    shortest = min(len(prompt) for prompt in prompts)
    idx = torch.tensor([prompt[:shortest] for prompt in prompts], device=weight.device)     # (B, T)
    count = max(pick.waits) + options.max_new_tokens
    printer.add(batch)
    for position, ids in enumerate(model.generate(idx, count, pick, step)):
        ids = ids.tolist()
        if max(ids) >= model.vocab_size:
            advice = "" if weight.dtype == torch.float32 else "; try --dtype=float32"
            raise UserError(f"the model's logits are not finite numbers{advice}")
        for row, sample in enumerate(batch):
            if position >= pick.waits[row] and not sample.finish:
                sample.add(ids[row], pick.logprobs[row] if options.json else None)
        printer.update()
        if all(sample.finish for sample in batch):
            break


def generate(model, tokenizer, options: Options, prompts: list, step, training_text: TrainingText | None) -> int:
    """Generate num_samples texts for each prompt, in batches of batch_size. training_text: to compare them
    with, for --novelty."""
    flag = "--prompts" if options.prompts else "--start"
    prompts = fit_texts(tokenizer, prompts, options, flag)
    note_stops_never_met(tokenizer, options)
    samples = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, flag).tolist()
        for _ in range(options.num_samples):
            seed = options.seed + len(samples)
            samples.append(Sample(tokenizer, options, prompt, ids, seed))
    printer = Printer(options, several=len(samples) > 1)
    try:
        for first in range(0, len(samples), options.batch_size):
            generate_batch(model, samples[first:first + options.batch_size], options, step, printer)
    except KeyboardInterrupt:
        printer.update(interrupted=True)
        return 130
    if training_text:
        report_novelty(samples, options, training_text)
    return 0


def report_novelty(samples: list, options: Options, training_text: TrainingText):
    """--novelty: print what of each sample, without its prompt, stands in the training text."""
    texts = [sample.text for sample in samples]
    if options.newlines == "convert" and training_text.is_file:
        texts = list(map(to_newlines, texts))
    copies, val = compare(texts, training_text)
    if options.json:
        print(json.dumps(novelty_record(copies, val, training_text.name), ensure_ascii=False), flush=True)
        return
    print("\n".join(novelty_lines(copies, val, training_text.name)), flush=True)


def converse(model, tokenizer, options: Options, start: str, step) -> int:
    """--interactive: add each line typed to the text so far and let the model continue it."""
    with contextlib.suppress(ImportError):      # not there on Windows
        import readline  # noqa: F401, gives input() a history and editing
    print("Type text and press Enter to have it continued; Enter alone continues, "
          "/new starts over, Ctrl-C stops a text, Ctrl-D exits.", file=sys.stderr, flush=True)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    so_far, = fit_texts(tokenizer, [start], options, "--start")
    note_stops_never_met(tokenizer, options)
    seed = options.seed
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
        prompt = so_far + tokenizer.fit_form(line)
        try:
            ids = tokenizer.encode_prompt(prompt).tolist()
        except ValueError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        sample = Sample(tokenizer, options, prompt, ids, seed)
        printer = Printer(options, several=False)
        try:
            generate_batch(model, [sample], options, step, printer)
        except KeyboardInterrupt:
            printer.update(interrupted=True)
        so_far = prompt + sample.text
        seed += 1


# -- scoring ---------------------------------------------------------------------------------------

def window_ends(count: int, size: int, stride: int) -> list:
    """Where the windows of at most `size` tokens end that score `count` tokens."""
    return [*range(min(size, count), count, stride), count]


@torch.no_grad()
def token_losses(model, ids: np.ndarray, stride: int) -> torch.Tensor:
    """Losses (len(ids) - 1,) in nats of every id but the first, given those before it.

    Windows of block_size advance by `stride`, and each counts what the one before it did not reach:
    after the first window, every id has at least block_size - stride others before it."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(ids.astype(np.int64))
    count = len(ids) - 1
    size = min(model.cfg.block_size, count)
    ends = window_ends(count, size, stride)
    batch_size = max(1, min(16, 2**26 // (size * model.vocab_size)))    # bounds the logits' memory
    losses = torch.empty(count)
    reached = 0
    for first in range(0, len(ends), batch_size):
        batch_ends = ends[first:first + batch_size]
        windows = torch.stack([ids[end - size:end + 1] for end in batch_ends])  # (B, size + 1)
        windows = windows.to(device)
        logits = model(windows[:, :-1])[0]                                      # (B, size, V)
        batch_losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
        for end, window_losses in zip(batch_ends, batch_losses.cpu(), strict=True):
            losses[reached:end] = window_losses[size - (end - reached):]
            reached = end
    return losses


ADAPT_TABLES = 30       # times the learning rate: an embedding moves only when its token or n-gram is met


def adaptive_losses(model, ids: np.ndarray, stride: int, rate: float) -> torch.Tensor:
    """Losses (len(ids) - 1,) in nats as token_losses gives, by a model that learns from the text as it reads:
    each window is scored first, and then a step is made on the mean loss of what it scored. So every
    token's loss is that of a model which has seen only those before it. Changes the model's weights, and what a
    counted member of it has counted.

    This is dynamic evaluation (Krause et al. 2018, arXiv 1709.07432), which scales its steps by the
    root mean square of the gradients; so does Adam, here without momentum. Raises UserError where a
    loss is not finite."""
    params = list(model.parameters())
    # In 16 bits most steps would be lost in rounding, so they are made on a copy. In float32 these are
    # the weights themselves.
    masters = {p: p.detach().float() for p in params}
    optimizer = make_adapter(model, masters, rate)
    counted_members = [member for member in model.modules() if isinstance(member, Counted)]
    text = ids
    ids = torch.from_numpy(text.astype(np.int64)).to(params[0].device)
    losses = []
    reached = 0
    for end in window_ends(len(ids) - 1, model.cfg.block_size, stride):
        first = max(0, end - model.cfg.block_size)
        logits = model(ids[None, first:end])[0][0]                              # (size, V)
        window_losses = F.cross_entropy(logits[reached - first:], ids[reached + 1:end + 1], reduction="none")
        if not window_losses.isfinite().all():
            raise UserError(f"--adapt={rate:g}: the loss is not a finite number after {reached:,} tokens; lower it")
        losses.append(window_losses.detach().float().cpu())
        reached = end
        window_losses.mean().backward()
        for p, master in masters.items():
            master.grad = None if p.grad is None else p.grad.float()
            p.grad = None
        optimizer.step()
        for p, master in masters.items():
            if p.dtype != master.dtype:
                p.data.copy_(master)
        if end < len(text) - 1:         # there is more to score
            for counted in counted_members:
                counted.learn(text[:end + 1])
    return torch.cat(losses)


def make_adapter(model, masters: dict, rate: float) -> AdamW:
    """The optimizer of adaptive_losses, for the float32 copies `masters` of a model's parameters. A table
    that is also the output layer moves as a whole at every step, so it takes the rate of a matrix."""
    tables = set()
    for gpt in model.modules():
        if not isinstance(gpt, GPT):
            continue
        if not gpt.cfg.tie_weights:
            tables.add(gpt.wte.weight)
        if gpt.ngrams is not None:
            tables.add(gpt.ngrams.weight)
    groups = [dict(params=[master for p, master in masters.items() if p in tables], lr=ADAPT_TABLES * rate),
              dict(params=[master for p, master in masters.items() if p not in tables], lr=rate)]
    groups = [group for group in groups if group["params"]]
    fused = next(iter(masters)).device.type in ("cpu", "cuda")
    return AdamW(groups, betas=(0.0, 0.99), weight_decay=0.0, fused=fused)


def summarize(losses: torch.Tensor, size: int) -> dict:
    """Loss, perplexity and bits per byte of a text of `size` bytes with these losses (tokens,) in nats."""
    total = losses.double().sum().item()
    loss = total / len(losses)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),         # above 700 it would overflow
        "bits_per_byte": total / math.log(2) / size,
    }


def report_score(model, tokenizer, options: Options) -> int:
    """--score: print loss, perplexity and bits per byte of a text under the model."""
    block_size = model.cfg.block_size
    if options.stride > block_size:
        raise UserError(f"stride={options.stride} must be at most the model's "
                        f"block_size={block_size}")
    stride = options.stride or max(1, block_size // 2)
    ids = encode_scored(tokenizer, options)
    losses = token_losses(model, ids, stride)
    size = sum(len(tokenizer.pieces[token]) for token in ids[1:])
    score = {"file": options.score, "tokens": len(losses), "bytes": size, **summarize(losses, size),
             "block_size": block_size, "stride": stride}
    if not options.json:
        if options.score_tokens:
            print_token_scores(tokenizer, ids, losses.tolist())
        print(f"loss {figures_line(score)} | {len(losses):,} tokens, {size:,} bytes | context {block_size}, "
              f"stride {stride}", flush=True)
    if options.score_tokens:
        score["token_logprobs"] = (-losses).tolist()
    if options.adapt:
        losses = adaptive_losses(model, ids, stride, options.adapt)
        adaptive = summarize(losses, size)
        if options.score_tokens:
            adaptive["token_logprobs"] = (-losses).tolist()
        score["adaptive"] = {"rate": options.adapt, **adaptive}
        how = f"learning from the text as it goes, rate {options.adapt:g}"
        if len(losses) <= block_size:
            how = "nothing learned: the text fits into one context, which is scored before it is learned from"
        if not options.json:
            print(f"adaptive {figures_line(adaptive)} | {how}")
    if options.json:
        print(json.dumps(score))
    return 0


def figures_line(score: dict) -> str:
    return (f"{score['loss']:.4f} nats per token | perplexity {score['perplexity']:.2f} | "
            f"{score['bits_per_byte']:.4f} bits per byte")


def encode_scored(tokenizer, options: Options) -> np.ndarray:
    """The ids of the text to score: at least two, or there would be nothing to predict."""
    name = options.score
    text, = fit_texts(tokenizer, [read_text(name, "--score")], options, f"--score={name}")
    try:
        ids = tokenizer.encode_document(text)
    except ValueError as error:
        raise UserError(f"--score={name}: {error}")
    if len(ids) < 2:
        raise UserError(f"--score={name} has {len(ids)} tokens; a loss needs at least 2")
    return ids


def colour_of(loss: float) -> int:
    """The terminal's code for a token of this loss."""
    if loss < 1:
        return 32                       # green: expected
    if loss < 4:
        return 33                       # yellow
    return 31                           # red: a surprise


def print_token_scores(tokenizer, ids, losses: list):
    """--score_tokens: a line per token with its log-probability, in colour on a terminal."""
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"{'-':>9}  {quoted(tokenizer.decode(ids[:1]))}")
    for token, loss in zip(ids[1:], losses, strict=True):
        line = f"{-loss:9.4f}  {quoted(tokenizer.decode([token]))}"
        if in_colour:
            line = f"\033[{colour_of(loss)}m{line}\033[0m"
        print(line)


# -- the program -----------------------------------------------------------------------------------

def refuse_unused(options: Options, typed: set):
    """Raise UserError if a flag was typed that has no effect in this mode."""
    unused = []
    if options.prompts or options.score:
        unused += ["start"]
    if options.interactive or options.score:
        unused += ["num_samples"]
    if not options.score:
        unused += ["stride", "score_tokens", "adapt"]
    if options.interactive or options.score:
        unused += ["novelty"]
    if options.init_from != "resume":
        unused += ["ckpt", "out_dir"]
    flags = [f"--{name}" for name in unused if name in typed]
    if "adapt" in typed and options.score and not options.adapt:
        raise UserError("--adapt=0 would learn nothing: give a learning rate above 0, such as 1e-4, or leave it out")
    if flags:
        way_out = "leave it out"
        if not options.score and typed & {"stride", "score_tokens", "adapt"}:
            way_out = "add --score=FILE, or leave it out"
        raise UserError(f"{', '.join(flags)} would change nothing here (see --help): {way_out}")


def read_text(name: str, flag: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, as PowerShell writes
    it; of standard input if `name` is -."""
    source = "standard input" if name == "-" else name
    encoding = "utf-8"
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        encoding = marked_encoding(content) or encoding
        return content.decode(encoding).removeprefix("\ufeff")
    except IsADirectoryError:
        raise UserError(f"{flag}: {source} is a folder; name a text file")
    except OSError as error:
        near = "" if name == "-" else there_is(name, files_near(name))
        raise UserError(f"{flag}: cannot read {source}: {error.strerror or error}{near}")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{flag}: {source} is not {encoding.upper()} text: byte {byte:#04x} at offset "
                        f"{error.start:,}")


def read_start(start: str) -> str:
    """The prompt, given as itself, as FILE:path or as - (standard input). Only what was typed is
    searched for escapes."""
    if start == "-":
        return read_text(start, "--start")
    if start.startswith("FILE:"):
        return read_text(expand_home(start.removeprefix("FILE:")), "--start")
    return unescape(start)


def fit_texts(tokenizer, texts: list, options: Options, flag: str) -> list:
    """Prompts or a text to score, spelled as in the text that the tokenizer was made from: with its
    line ends, unless they are kept, and in its Unicode form, where the tokenizer lacks characters of
    theirs. Says on stderr what that changes."""
    fitted = texts
    if options.newlines == "convert":
        fitted = list(map(tokenizer.fit_line_ends, texts))
    is_certain = tokenizer.kind == "char" and tokenizer.line_break == "\n"      # it knows no \r
    if fitted != texts and (options.score or not is_certain):
        print(f"{flag}: line ends become {tokenizer.line_break!r} (--newlines=keep leaves them)", file=sys.stderr,
              flush=True)
    normalized = list(map(tokenizer.fit_form, fitted))
    if normalized != fitted:
        print(f"{flag}: converted to the Unicode form (NFC or NFD) of the model's text", file=sys.stderr,
              flush=True)
    return normalized


def note_stops_never_met(tokenizer, options: Options):
    """Say which stop texts hold a character that the model cannot write."""
    for stop in options.stop:
        text = tokenizer.fit_form(unescape(stop))
        if options.newlines == "convert":
            text = tokenizer.fit_line_ends(text)
        if tokenizer.fallback is None and tokenizer.count_unknown(text):
            print(f"--stop={printable(stop)} is never met: the model's tokenizer lacks a character of it",
                  file=sys.stderr, flush=True)


def read_prompts(options: Options) -> list:
    """The lines of --prompts, or the one prompt of --start."""
    if not options.prompts:
        return [read_start(options.start)]
    text = to_newlines(read_text(options.prompts, "--prompts"))
    prompts = text.removesuffix("\n").split("\n")       # not splitlines: U+2028 is part of a prompt
    if not any(prompts):
        raise UserError(f"--prompts={options.prompts} holds no prompt: one per line")
    return prompts


def find_checkpoints(options: Options) -> list:
    """What to load: checkpoints, by default the latest one, or the name of OpenAI's weights."""
    if options.init_from != "resume":
        if options.init_from not in NAMES and not os.path.exists(options.init_from):
            raise UserError(f"--init_from={options.init_from} is neither {', '.join(NAMES)} nor a folder or "
                             f"checkpoint that is there{checkpoints_like(options.init_from)}")
        return [options.init_from]
    if options.ckpt:
        return [Path(name) for name in split_names(options.ckpt)]
    path = Path(options.out_dir) / "ckpt.pt" if options.out_dir else newest_checkpoint()
    if os.path.isfile(path.with_name("config.json")) and not os.path.isfile(path):
        return [path.parent]            # a Hugging Face folder
    if not os.path.isfile(path):        # Path.is_file raises on a name that is too long
        last = path.with_name("last.pt")
        if os.path.isfile(last):
            raise UserError(f"no {path}, but {last} is there: --ckpt={last}")
        there = checkpoints_like(str(path))
        raise UserError(f"no {path}{there}" if there else f"no {path}: train one first with python train.py")
    purpose = "scoring with" if options.score else "sampling from"
    print(f"{purpose} {path}", file=sys.stderr, flush=True)
    return [path]


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` becomes float32, except on CUDA. On a CPU, float32 is as fast for a single text and
    gives the same text in any batch."""
    if dtype == "auto" and torch.device(device).type != "cuda":
        return "float32"
    return choose_dtype(device, dtype)


def compile_if_asked(model, options: Options, device: str):
    """The compiled step for --compile; None: generate uncompiled."""
    if not options.compile:
        return None
    if reason := compiler_missing(device):
        print(f"not compiled: {reason}", file=sys.stderr, flush=True)
        return None
    return compile_step(model.next_logits, device)


def main(argv: list) -> int:
    parsed = parse(Options, argv, __doc__, hint=command_for_sampling, first=FIRST_IN_HELP)
    options = Options(**parsed.values)
    check(options)
    refuse_unused(options, parsed.typed)
    prompts = read_prompts(options)

    sources = find_checkpoints(options)
    device = choose_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    training_text = None
    if options.novelty:                 # before anything is generated, to say what is wrong with it
        content = read_checkpoint(sources[0]) if options.novelty == AUTO else {}
        training_text = find_training_text(options.novelty, content, options.newlines == "keep")
    ngram_set = find_ngram_set(sources[0]) if options.ngram else None
    model, tokenizer = combine(sources, [load(source, device) for source in sources])
    model.to(getattr(torch, dtype))
    if options.ngram:
        model = add_ngrams(model, ngram_set, options.ngram)

    if options.score:
        return report_score(model, tokenizer, options)
    step = compile_if_asked(model, options, device)
    if options.interactive:
        return converse(model, tokenizer, options, prompts[0], step)
    return generate(model, tokenizer, options, prompts, step, training_text)


if __name__ == "__main__":
    run(main)
