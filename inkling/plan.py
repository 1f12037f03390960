"""The settings that fit a text, a machine and a time: what --max_minutes plans where nothing else was said.

Of a ladder of shapes, take the largest that still reads enough tokens in the time: a larger model learns more from a
token, but reads fewer of them, and a small text does not fill it. The batch grows with the tokens read, and the
regularization with the number of times that each of them is read. The constants were chosen from runs on one text
after another (bench/plan.csv, by bench/plan.py); the form of the rules is that of the scaling laws (arXiv 2203.15556,
and for the batch arXiv 2410.21676), for models, texts and times a thousandth of theirs.

Nothing here knows torch or a clock: how long a step takes is asked of `seconds_per_step`.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from inkling import compile_cost
from inkling.anchors import usable_anchors
from inkling.format import counted, rough_duration, short


@dataclass(frozen=True)
class Shape:
    """A rung of the ladder."""

    n_layer: int
    n_embd: int
    n_head: int

    @property
    def parameters(self) -> int:
        """Those of the blocks' matrices."""
        return self.n_layer * 12 * self.n_embd**2

    def settings(self) -> dict:
        return {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}


SHAPES = [Shape(1, 64, 1), Shape(2, 96, 1), Shape(2, 128, 2), Shape(3, 192, 2), Shape(4, 256, 2), Shape(6, 384, 3),
          Shape(8, 512, 4), Shape(12, 768, 6)]
FIRST_TRIED = 2                         # a rung that two slow cores train in a minute
LARGEST_MEASURED = SHAPES[4]            # in bench/plan.csv: above it, the rules extrapolate

TOKENS_PER_PARAMETER = 3.0              # at least, of those read in the time
TEXT_PER_PARAMETER = 0.05               # at least, of the different tokens of the text
BATCH_TOKENS = 6144                     # of a step, in a run that reads
BATCH_RUN_TOKENS = 2.5e6                # so many in all; with more, it grows by
BATCH_EXPONENT = 0.4                    # this power
FEWEST_STEPS = 50                       # that a batch leaves
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MOST_AT_ONCE = 64                       # sequences of a micro-batch
NGRAM_DECAY = {2.5: 1.0, 5: 3.0}        # by how often a run reads each token; between them by the logarithm
DROPOUT = {5: 0.0, 10: 0.1, 40: 0.2}    # the same
# What a planned model reaches, as a share of the bits per byte of the set's n-gram model, by how often it reads each
# token; and how far runs lay from that.
SHARE_OF_NGRAM = {0.4: 1.10, 0.8: 1.06, 2.5: 0.95, 11: 0.93}
BAND = 0.04
BLOCK_SIZE = 256
FEWEST_WINDOWS = 4                      # of the val split; a short one gets a shorter context
NGRAM_ROWS = 65536
OF_THE_TIME = 0.9                       # what is training, of a long run
STARTING = 10                           # seconds that a run takes before its first step, at most
FEW_SECONDS = 15                        # a shorter run tries the smallest shape first
BYTES_PER_PARAMETER = 16                # weights, gradients and AdamW's two averages, in float32
BYTES_PER_ACTIVATION = 160              # of a token, for each layer and each dimension of its width
MEMORY_SHARE = 0.5                      # of what is free, that a run may take by this estimate
CHECKPOINT_RATES = 0.3                  # times the usual rates, for weights that are trained already

RATES = ("learning_rate", "embed_lr", "head_lr", "scalar_lr")
MODEL_SETTINGS = ("n_layer", "n_embd", "n_head", "block_size", "ngram_rows")
BATCH_SETTINGS = {"batch_size", "gradient_accumulation_steps"}
NEED_PACE = {"n_layer", "n_embd", "n_head", "ngram_decay", "dropout"}   # and the batch: all else can be chosen without
# All that a plan may choose, if the user has not.
SETTINGS = (*MODEL_SETTINGS, "batch_size", "gradient_accumulation_steps", "ngram_decay", "dropout", *RATES)


@dataclass(frozen=True)
class Text:
    """What a plan asks of a data set: its numbers of tokens, and, where it is known, how well an n-gram model does
    (inkling/anchors.py)."""

    train_tokens: int
    val_tokens: int
    vocab_size: int
    ngram_bits: float = 0.0             # per byte of val; 0: not known of all of the text

    @classmethod
    def of(cls, meta: dict):
        """That of the set which a meta.json describes."""
        splits = meta["splits"]
        ngram_bits = usable_anchors(meta).get("ngram", 0.0)
        if ngram_bits and "train" in meta["anchors"].get("sampled", {}):     # which a model reading all leaves behind
            ngram_bits = 0.0
        return cls(splits["train"]["tokens"], splits["val"]["tokens"], meta["vocab_size"], ngram_bits)


@dataclass
class Choice:
    """A plan: the settings that it chooses, about how many steps will fit, the reasons, a line each, and the least and
    the most bits per byte of val to be expected at the end."""

    settings: dict
    steps: int = 0                      # 0: not known
    expected: tuple = ()                # empty: not known
    reasons: list = field(default_factory=list)


def choose(text: Text, seconds: float, memory: int, given: dict, seconds_per_step, processes: int = 1) -> Choice:
    """The plan of a model from scratch.

    seconds: of training. memory: bytes that are free; 0: not known. given: the settings that are not to be chosen,
    with their values. seconds_per_step(settings): how long a step takes with these. processes: that share a step."""
    given = {name: value for name, value in given.items() if name in SETTINGS}
    block_size = given.get("block_size", choose_block_size(text))
    if given.keys() >= NEED_PACE and given.keys() & BATCH_SETTINGS:
        free = {"block_size": block_size, "ngram_rows": NGRAM_ROWS}
        return Choice({name: value for name, value in free.items() if name not in given})

    def tokens_in_time(shape: dict) -> float:
        """How many tokens a model of that shape reads."""
        trial = {**shape, "block_size": block_size, "ngram_rows": NGRAM_ROWS,
                 **choose_batch(text, BATCH_RUN_TOKENS, block_size, processes, given)} | given
        return seconds / seconds_per_step(trial) * tokens_per_step(trial)

    shape, tokens, reason = choose_shape(text, seconds, memory, block_size, given, tokens_in_time)
    chosen = {**shape, "block_size": block_size, "ngram_rows": NGRAM_ROWS,
              **choose_batch(text, tokens, block_size, processes, given),
              **choose_regularization(tokens / text.train_tokens)} | given
    steps = max(1, int(tokens / tokens_per_step(chosen)))
    settings = {name: chosen[name] for name in SETTINGS if name in chosen and name not in given}
    if given.keys() & BATCH_SETTINGS:   # one of the two says it all
        settings = {name: value for name, value in settings.items() if name not in BATCH_SETTINGS}
    reasons = [reason, describe_batch(chosen, steps), describe_epochs(text, tokens, chosen)]
    expected = expected_bits(text, tokens)
    if expected:
        reasons.append(f"expect   {expected[0]:.2f} to {expected[1]:.2f} bits per byte at the end (8-gram "
                       f"{text.ngram_bits:.2f})")
    return Choice(settings, steps, expected, reasons)


def seconds_of_training(minutes: float, compiled: bool) -> float:
    """About how many seconds a run of so many minutes trains, in seconds of uncompiled training: starting, evaluating
    and saving take the rest. compiled: whether it may be compiled, where that pays."""
    seconds = 60 * minutes
    training = OF_THE_TIME * seconds - min(STARTING, 0.2 * seconds)
    if compiled and compile_cost.pays(training, compile_cost.EXPECTED_SECONDS):
        return (training - compile_cost.EXPECTED_SECONDS) * compile_cost.EXPECTED_GAIN
    return training


def choose_for_checkpoint(given: dict, defaults: dict) -> Choice:
    """The plan of a run that starts from a checkpoint's weights: the peak rates alone, below the `defaults`."""
    settings = {name: defaults[name] * CHECKPOINT_RATES for name in RATES if name not in given}
    reason = f"rates    {CHECKPOINT_RATES:g} of those from scratch, as the weights are trained already"
    return Choice(settings, reasons=[reason] if settings else [])


# -- the context and the shape -------------------------------------------------------------------------

def choose_block_size(text: Text) -> int:
    """BLOCK_SIZE, or for a short text a power of two of which the val split has FEWEST_WINDOWS."""
    most = max(8, min(text.val_tokens, text.train_tokens) // (FEWEST_WINDOWS + 1))
    return min(BLOCK_SIZE, 2 ** int(math.log2(most)))


def choose_shape(text: Text, seconds: float, memory: int, block_size: int, given: dict, tokens_in_time) -> tuple:
    """(the settings of the shape, the tokens that it reads in the time, a line that says why)."""
    if any(name in given for name in ("n_layer", "n_embd", "n_head")):
        shape = shape_around(given)
        return shape, tokens_in_time(shape), "model    as given"
    shapes = shapes_that_fit(text, memory, block_size)
    rung = 0 if seconds < FEW_SECONDS else min(FIRST_TRIED, len(shapes) - 1)
    read = {rung: tokens_in_time(shapes[rung].settings())}
    while rung and read[rung] < TOKENS_PER_PARAMETER * shapes[rung].parameters:
        rung -= 1
        read[rung] = tokens_in_time(shapes[rung].settings())
    while rung + 1 < len(shapes):
        enough = TOKENS_PER_PARAMETER * shapes[rung + 1].parameters
        if read[rung] < enough:         # a larger one reads still less
            break
        if rung + 1 not in read:
            read[rung + 1] = tokens_in_time(shapes[rung + 1].settings())
        if read[rung + 1] < enough:
            break
        rung += 1
    shape = shapes[rung]
    larger = shapes[rung + 1] if rung + 1 < len(shapes) else None
    return shape.settings(), read[rung], describe_shape(shape, larger, read[rung], seconds)


def shape_around(given: dict) -> dict:
    """A shape with what is given of it."""
    n_embd = given.get("n_embd", SHAPES[FIRST_TRIED].n_embd)
    n_layer = given.get("n_layer", SHAPES[FIRST_TRIED].n_layer)
    if "n_head" in given and "n_embd" not in given:
        n_embd = 64 * given["n_head"]
    heads = [count for count in range(1, n_embd // 64 + 1) if n_embd % count == 0 and n_embd // count % 2 == 0]
    n_head = given.get("n_head", max(heads, default=1))
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}


def shapes_that_fit(text: Text, memory: int, block_size: int) -> list:
    """The rungs that the text can fill and the memory can hold; the smallest always."""
    fitting = [shape for shape in SHAPES[1:]
               if shape.parameters * TEXT_PER_PARAMETER <= text.train_tokens
               and (not memory or needed_memory(shape, text, block_size) <= MEMORY_SHARE * memory)]
    return [SHAPES[0], *fitting]


def needed_memory(shape: Shape, text: Text, block_size: int) -> int:
    """About how many bytes a run takes beside what Python and PyTorch do."""
    parameters = shape.parameters + (NGRAM_ROWS + 2 * text.vocab_size) * shape.n_embd
    at_once = min(MOST_AT_ONCE * block_size, 2 * BATCH_TOKENS)
    return BYTES_PER_PARAMETER * parameters + BYTES_PER_ACTIVATION * at_once * shape.n_layer * shape.n_embd


# -- the batch and the regularization ---------------------------------------------------------------------

def choose_batch(text: Text, tokens: float, block_size: int, processes: int, given: dict) -> dict:
    """The batch of a run that reads so many tokens."""
    if given.keys() & BATCH_SETTINGS:
        return {"batch_size": 12, "gradient_accumulation_steps": 1} | {
            name: given[name] for name in BATCH_SETTINGS & given.keys()}
    wanted = BATCH_TOKENS * (tokens / BATCH_RUN_TOKENS)**BATCH_EXPONENT / block_size
    most = min(tokens / FEWEST_STEPS, text.train_tokens / 4) / block_size
    sequences = max((size for size in BATCH_SIZES if size <= 1.2 * min(wanted, most)), default=1)
    sequences = processes * max(1, round(sequences / processes))
    micro_batches = math.ceil(sequences / (MOST_AT_ONCE * processes))
    while sequences % (micro_batches * processes):
        micro_batches += 1
    return {"batch_size": sequences // micro_batches, "gradient_accumulation_steps": micro_batches}


def tokens_per_step(settings: dict) -> int:
    return settings["batch_size"] * settings["gradient_accumulation_steps"] * settings["block_size"]


def choose_regularization(epochs: float) -> dict:
    """What keeps a model from memorizing a text that it reads so often."""
    return {"ngram_decay": round(by_count(NGRAM_DECAY, epochs), 1), "dropout": round(by_count(DROPOUT, epochs), 2)}


def by_count(table: dict, count: float) -> float:
    """The value of a table {count: value} at any count: between its counts by their logarithms, outside as at the
    nearest."""
    return float(np.interp(math.log(count), [math.log(known) for known in table], list(table.values())))


def expected_bits(text: Text, tokens: float) -> tuple:
    """(least, most) bits per byte of val of a planned model that reads so many tokens; empty where it is not known."""
    epochs = tokens / text.train_tokens
    if not text.ngram_bits or epochs < min(SHARE_OF_NGRAM):
        return ()
    middle = text.ngram_bits * by_count(SHARE_OF_NGRAM, epochs)
    return middle * (1 - BAND), middle * (1 + BAND)


# -- in words -----------------------------------------------------------------------------------------

def describe_shape(shape: Shape, larger: Shape | None, tokens: float, seconds: float) -> str:
    """larger: the next rung, which reads too little; None: text or memory end the ladder here."""
    reason = (f"model    {counted(shape.n_layer, 'layer')}, {shape.n_embd} wide: it reads {short(tokens)} tokens in "
              f"{rough_duration(seconds)}, {tokens / shape.parameters:.1f} for each of the {short(shape.parameters)} "
              f"weights of its blocks; ")
    if larger:
        reason += f"one of {larger.n_layer} layers, {larger.n_embd} wide would read less than {TOKENS_PER_PARAMETER:g}"
    elif shape == SHAPES[-1]:
        reason += "the plan knows no larger one"
    else:
        reason += "a larger one would take more text, or more memory"
    if shape.parameters > LARGEST_MEASURED.parameters:
        reason += ". The rule was measured on smaller models"
    return reason


def describe_batch(settings: dict, steps: int) -> str:
    sequences = settings["batch_size"] * settings["gradient_accumulation_steps"]
    return (f"batch    {counted(sequences, 'sequence')} of {settings['block_size']:,} tokens, which leaves about "
            f"{counted(steps, 'step')}")


def describe_epochs(text: Text, tokens: float, settings: dict) -> str:
    return (f"text     {short(text.train_tokens)} tokens, each read {tokens / text.train_tokens:.1f} times: "
            f"ngram_decay={settings['ngram_decay']:g}, dropout={settings['dropout']:g}")
