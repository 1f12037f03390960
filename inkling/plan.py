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
from inkling.format import counted, short


@dataclass(frozen=True)
class Shape:
    """A rung of the ladder."""

    n_layer: int
    n_embd: int
    n_head: int

    @property
    def parameters(self) -> int:
        """The number of weights in the blocks' matrices."""
        return self.n_layer * 12 * self.n_embd**2

    def settings(self) -> dict:
        return {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}


SHAPES = [Shape(1, 64, 1), Shape(2, 96, 1), Shape(2, 128, 2), Shape(3, 192, 2), Shape(4, 256, 2), Shape(6, 384, 3),
          Shape(8, 512, 4), Shape(12, 768, 6)]
FIRST_TRIED = 2                         # a rung that two slow cores train in a minute
LARGEST_MEASURED = SHAPES[4]            # in bench/plan.csv: above it, the rules extrapolate

TOKENS_PER_PARAMETER = 2.0              # tokens read in the time for each weight of the blocks, at least
TEXT_PER_PARAMETER = 0.05               # tokens of the text for each of them, at least
BATCH_TOKENS = 6144                     # tokens of a step in a run that reads BATCH_RUN_TOKENS
BATCH_RUN_TOKENS = 2.5e6
BATCH_EXPONENT = 0.4                    # the power with which the first grows with the second
FEWEST_STEPS = 50                       # a batch leaves at least so many
FEWEST_STEPS_OF_AN_EPOCH = 16           # and so many to an epoch
ROUNDED_UP = 1.2                        # how much larger than wanted a batch may be, to be one of BATCH_SIZES
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MOST_AT_ONCE = 64                       # sequences of a micro-batch
DROPOUT = {4: 0.0, 8: 0.1}              # by how often a run reads each token; between them by the logarithm
WEIGHT_DECAY = {2.5: 0.4, 8: 1.2}       # in the same way; of Muon, for the blocks' matrices
MOST_EPOCHS = {55: 5, 3800: 12}         # by how often an entry of the vocabulary occurs, on average, in the same way:
                                        # a run ends then, as reading a text more often memorizes it
# What a planned model reaches, as a share of the bits per byte of the set's n-gram model, by how often it reads each
# token; and how far runs lay from that.
SHARE_OF_NGRAM = {0.4: 1.10, 0.8: 1.06, 2.5: 0.95, 11: 0.93}
BAND = 0.04
SHORTEST_MEASURED = 100_000             # tokens of a text of which that is known
BLOCK_SIZE = 256
FEWEST_WINDOWS = 4                      # of the val split; a short one gets a shorter context
OF_THE_TIME = 0.92                      # the share that is training, of what is left of a long run when it is planned
AROUND = 8                              # seconds before the first step and after the last, at most,
AROUND_SHORT = 0.15                     # and the share of a short run that they take
FEW_SECONDS = 15                        # a shorter run tries the smallest shape first
NGRAM_ROWS = 65536                      # of the default recipe
BYTES_PER_PARAMETER = 16                # weights, gradients and AdamW's two averages, in float32
BYTES_PER_TABLE_NUMBER = 12             # weights, gradients and a copy of them, as RowAdam keeps next to nothing
BYTES_PER_ACTIVATION = 160              # of a token, for each layer and each dimension of its width
MEMORY_SHARE = 0.5                      # of what is free, that a run may take by this estimate
EARLY_END = "end      before the time is over: to read so short a text more often would only memorize it"
CHECKPOINT_EPOCHS = 4                   # that a run from trained weights makes at most
CHECKPOINT_RATES = 0.5                  # times the usual rates, for weights that are trained already

RATES = ("learning_rate", "embed_lr", "ngram_lr", "head_lr", "scalar_lr")
SHAPE_SETTINGS = {"n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "ffn_dim"}    # one of them says: my own shape
BATCH_SETTINGS = {"batch_size", "gradient_accumulation_steps"}                          # and one of these: my own batch
# All that a plan may choose, if the user has not.
SETTINGS = ("n_layer", "n_embd", "n_head", "block_size", "batch_size", "gradient_accumulation_steps", "dropout",
            "weight_decay", *RATES)


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
        if ngram_bits and "train" in meta["anchors"].get("sampled", {}):     # a model that reads all is far better
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
    own_batch = {name: given[name] for name in BATCH_SETTINGS & given.keys()}
    if given.keys() & SHAPE_SETTINGS and own_batch and given.keys() >= {"dropout", "weight_decay"}:
        return Choice({})               # the pace would decide nothing
    block_size = given.get("block_size", choose_block_size(text))

    most_tokens = text.train_tokens * by_count(MOST_EPOCHS, text.train_tokens / text.vocab_size)

    def tokens_in_time(shape: dict) -> float:
        """How many tokens a model of that shape reads."""
        batch = own_batch or choose_batch(text, BATCH_RUN_TOKENS, block_size, processes)
        trial = {**shape, "block_size": block_size, **batch}
        tokens = seconds / seconds_per_step(without(trial, given)) * tokens_per_step(trial)
        return min(tokens, most_tokens)

    shape, tokens, reason = choose_shape(text, seconds, memory, block_size, given, tokens_in_time)
    ends_early = tokens == most_tokens
    batch = own_batch or choose_batch(text, tokens, block_size, processes)
    settings = without({**shape, "block_size": block_size, **batch, **choose_regularization(text, tokens)}, given)
    steps = max(1, int(tokens / tokens_per_step({"block_size": block_size, **batch})))
    reasons = [reason, describe_batch(batch, block_size, steps, ends_early), describe_epochs(text, tokens)]
    if ends_early:
        settings["max_iters"] = steps   # and the minutes stay the most that it takes
        reasons.append(EARLY_END)
    expected = expected_bits(text, tokens)
    if expected:
        reasons.append(f"expect   {expected[0]:.2f} to {expected[1]:.2f} bits per byte at the end; less is better, and "
                       f"the 8-gram, which only counts, has {text.ngram_bits:.2f}")
    return Choice(settings, steps, expected, reasons)


def without(settings: dict, given: dict) -> dict:
    """The settings that are not given."""
    return {name: value for name, value in settings.items() if name not in given}


def seconds_of_training(seconds_left: float, compiled: bool) -> float:
    """About how much of the time that is left is training, in seconds of uncompiled training: starting, evaluating and
    saving take the rest. compiled: whether the run may be compiled, where that pays."""
    training = OF_THE_TIME * seconds_left - min(AROUND, AROUND_SHORT * seconds_left)
    if compiled and compile_cost.pays(training, compile_cost.EXPECTED_SECONDS):
        return (training - compile_cost.EXPECTED_SECONDS) * compile_cost.EXPECTED_GAIN
    return training


def choose_for_checkpoint(text: Text, seconds: float, given: dict, defaults: dict, seconds_per_step,
                          processes: int = 1) -> Choice:
    """The plan of a run that starts from a checkpoint's weights, with the arguments of `choose`: nothing of the model,
    but rates below the `defaults`, and for a text that is soon read an early end and a smaller batch.

    defaults: {setting: value} of the rates, the batch and the context, where they are not given."""
    settings = without({name: defaults[name] * CHECKPOINT_RATES for name in RATES}, given)
    reasons = []
    if settings:
        reasons.append(f"rates    {CHECKPOINT_RATES:g} of those from scratch, as the weights are trained already")
    usual = {name: given.get(name, defaults[name]) for name in ("block_size", *sorted(BATCH_SETTINGS))}
    tokens = seconds / seconds_per_step({}) * tokens_per_step(usual)
    most_tokens = CHECKPOINT_EPOCHS * text.train_tokens
    ends_early = tokens > most_tokens
    tokens = min(tokens, most_tokens)
    batch = {name: usual[name] for name in BATCH_SETTINGS}
    smaller = choose_batch(text, tokens, usual["block_size"], processes)
    if not given.keys() & BATCH_SETTINGS and tokens_per_step(usual | smaller) < tokens_per_step(usual):
        batch = smaller
        settings |= smaller
    settings |= without(choose_regularization(text, tokens), given)
    steps = max(1, int(tokens / tokens_per_step(usual | batch)))
    reasons += [describe_batch(batch, usual["block_size"], steps, ends_early), describe_epochs(text, tokens)]
    if ends_early:
        settings["max_iters"] = steps
        reasons.append(EARLY_END)
    return Choice(settings, steps, reasons=reasons)


# -- the context and the shape -------------------------------------------------------------------------

def choose_block_size(text: Text) -> int:
    """BLOCK_SIZE, or for a short text a power of two of which the val split has FEWEST_WINDOWS."""
    most = max(8, min(text.val_tokens, text.train_tokens) // (FEWEST_WINDOWS + 1))
    return min(BLOCK_SIZE, 2 ** int(math.log2(most)))


def choose_shape(text: Text, seconds: float, memory: int, block_size: int, given: dict, tokens_in_time) -> tuple:
    """(the settings of the shape, the tokens that it reads in the time, a line that says why)."""
    if given.keys() & SHAPE_SETTINGS:
        return {}, tokens_in_time({}), "model    of the shape that was given"
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
    larger = shapes[rung + 1] if rung + 1 < len(shapes) else None
    return shapes[rung].settings(), read[rung], describe_shape(shapes[rung], larger, read[rung])


def shapes_that_fit(text: Text, memory: int, block_size: int) -> list:
    """The rungs that the text can fill and the memory can hold; the smallest always."""
    fitting = [shape for shape in SHAPES[1:]
               if shape.parameters * TEXT_PER_PARAMETER <= text.train_tokens
               and (not memory or needed_memory(shape, text, block_size) <= MEMORY_SHARE * memory)]
    return [SHAPES[0], *fitting]


def needed_memory(shape: Shape, text: Text, block_size: int) -> int:
    """About how many bytes a run takes beside what Python and PyTorch do."""
    parameters = shape.parameters + 2 * text.vocab_size * shape.n_embd
    table = NGRAM_ROWS * shape.n_embd
    at_once = MOST_AT_ONCE * block_size
    weights = BYTES_PER_PARAMETER * parameters + BYTES_PER_TABLE_NUMBER * table
    return weights + BYTES_PER_ACTIVATION * at_once * shape.n_layer * shape.n_embd


# -- the batch and the regularization ---------------------------------------------------------------------

def choose_batch(text: Text, tokens: float, block_size: int, processes: int) -> dict:
    """The batch of a run that reads so many tokens: of at most MOST_AT_ONCE sequences at once in each process."""
    wanted = BATCH_TOKENS * (tokens / BATCH_RUN_TOKENS)**BATCH_EXPONENT / block_size
    most = min(tokens / FEWEST_STEPS, text.train_tokens / FEWEST_STEPS_OF_AN_EPOCH) / block_size
    sequences = max((size for size in BATCH_SIZES if size <= ROUNDED_UP * min(wanted, most)), default=1)
    of_a_process = max(1, round(sequences / processes))
    micro_batches = math.ceil(of_a_process / MOST_AT_ONCE)
    return {"batch_size": math.ceil(of_a_process / micro_batches),
            "gradient_accumulation_steps": micro_batches * processes}


def tokens_per_step(settings: dict) -> int:
    """Where one of the two settings of the batch is not there, it is the default's."""
    sequences = settings.get("batch_size", 12) * settings.get("gradient_accumulation_steps", 1)
    return sequences * settings["block_size"]


def choose_regularization(text: Text, tokens: float) -> dict:
    """What keeps a model that reads so many tokens from memorizing the text."""
    epochs = tokens / text.train_tokens
    return {"dropout": round(by_count(DROPOUT, epochs), 2), "weight_decay": round(by_count(WEIGHT_DECAY, epochs), 1)}


def by_count(table: dict, count: float) -> float:
    """The value of a table {count: value} at any count: between its counts by their logarithms, outside as at the
    nearest."""
    return float(np.interp(math.log(count), [math.log(known) for known in table], list(table.values())))


def expected_bits(text: Text, tokens: float) -> tuple:
    """(least, most) bits per byte of val of a planned model that reads so many tokens; empty where it is not known."""
    epochs = tokens / text.train_tokens
    if not text.ngram_bits or text.train_tokens < SHORTEST_MEASURED or epochs < min(SHARE_OF_NGRAM):
        return ()
    middle = text.ngram_bits * by_count(SHARE_OF_NGRAM, epochs)
    return middle * (1 - BAND), middle * (1 + BAND)


# -- in words -----------------------------------------------------------------------------------------

def describe_shape(shape: Shape, larger: Shape | None, tokens: float) -> str:
    """larger: the next rung, which reads too little; None: text or memory end the ladder here."""
    reason = (f"model    {counted(shape.n_layer, 'layer')}, {shape.n_embd} wide: it reads {short(tokens)} tokens in "
              f"the time, {tokens / shape.parameters:.1f} for each of the {short(shape.parameters)} weights of its "
              "blocks; ")
    if larger:
        reason += (f"one of {larger.n_layer} layers, {larger.n_embd} wide would read fewer than "
                   f"{TOKENS_PER_PARAMETER:g} tokens for each weight, too few to learn from")
    elif shape == SHAPES[-1]:
        reason += "the plan knows no larger one"
    else:
        reason += "for a larger one, the text is too short or the memory too small"
    if shape.parameters > LARGEST_MEASURED.parameters:
        reason += ". The rule was measured on smaller models"
    return reason


def describe_batch(batch: dict, block_size: int, steps: int, ends_early: bool) -> str:
    sequences = tokens_per_step(batch | {"block_size": 1})
    how_many = f"at most {steps:,} are made" if ends_early else f"about {steps:,} fit into the time"
    return f"batch    {counted(sequences, 'sequence')} of {block_size:,} tokens in each step, of which {how_many}"


def describe_epochs(text: Text, tokens: float) -> str:
    return (f"text     {short(text.train_tokens)} tokens, each read {tokens / text.train_tokens:.1f} times: more often "
            "means more dropout and weight_decay, against memorizing it")
