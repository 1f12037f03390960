"""--dry_run: what a run would take in memory, time and disk space, estimated from three real steps,
and settings that are probably mistakes. Nothing is written.

`dry_run` measures (`measure`), estimates (`remaining_work`, `estimate_memory`, `estimate_time`) and
prints.
"""

import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from inkling.dataset import windows_at_once
from inkling.device import device_type, synchronize
from inkling.distributed import is_sharded
from inkling.format import align_columns, brief_seconds, duration, milliseconds, short, size
from inkling.report import count_parameters, evaluations_left, peak_memory

TRIAL_STEPS = 3
TRIAL_WINDOWS = 16              # of each split, in the trial's evaluation


def dry_run(run, report, out_dir: Path, update, evaluate, sample):
    """Print what `run` would take. update(run, step) makes a step, evaluate() evaluates
    TRIAL_WINDOWS windows of each split, sample() generates a text. Every process of a run calls it;
    the first prints. Raises NotFinite if the loss of a step is not."""
    trial = measure(run, update, evaluate, sample)
    if not run.ranks.first:
        return
    work = remaining_work(run)
    memory = estimate_memory(run, trial)
    times = estimate_time(run, trial, work)
    print_parameters(report, run.model)
    print_data(report, run, work)
    print_memory(report, run, memory)
    print_time(report, work, times)
    print_files(report, out_dir, memory)
    warnings = [
        *setting_doubts(run, work),
        *memory_doubts(run, memory),
        *time_doubts(times),
        *file_doubts(run, out_dir, memory),
    ]
    for warning in warnings:
        report.warn(warning)
    report.label("dry run", "nothing was written; the same command without --dry_run does it")


# -- the trial -------------------------------------------------------------------------------------

@dataclass
class SavedTensors:
    """Bytes that autograd keeps in a forward pass for the backward pass."""

    activations: int
    logits: int
    largest: int                # activation


@dataclass
class Trial:
    """What was measured; 0 or empty where there was nothing to measure."""

    saved: SavedTensors
    step_seconds: list = field(default_factory=list)
    evaluation_seconds: float = 0.0
    sample_seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        return min(self.step_seconds, default=0.0)      # the first one warms up, and compiles the optimizer


def measure(run, update, evaluate, sample) -> Trial:
    """Take TRIAL_STEPS steps, an evaluation and a sample, or what remains of the run if it is
    less."""
    device = run.plan.device
    if device_type(device) == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trial = Trial(measure_saved_tensors(run))
    for step in range(run.first_step, run.first_step + trial_steps(run)):
        trial.step_seconds.append(seconds_of(device, update, run, step))
        run.guard.verify(step + 1)
    if not is_complete(run):
        trial.evaluation_seconds = seconds_of(device, evaluate)
        # With sharding the processes generate together: each holds a part of the weights.
        if run.cfg.sample_tokens and (run.ranks.first or run.cfg.shard):
            trial.sample_seconds = seconds_of(device, sample)
    return trial


def trial_steps(run) -> int:
    if run.cfg.eval_only:
        return 0
    return max(0, min(TRIAL_STEPS, run.plan.max_iters - run.first_step))


def is_complete(run) -> bool:
    """Whether nothing remains to be done, not even the last evaluation."""
    if run.cfg.eval_only or run.state.evaluated is None:
        return False
    return run.state.evaluated >= run.plan.max_iters


def seconds_of(device: str, function, *arguments) -> float:
    """How long a call takes, with what it leaves for the device to do."""
    synchronize(device)
    began = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - began


def measure_saved_tensors(run) -> SavedTensors:
    """What autograd keeps of one micro-batch: every storage once, and no weights."""
    model = run.model
    logits_numel = micro_batch_size(run) * run.cfg.block_size * model.vocab_size
    weights = set()
    gathered_shapes = set()
    for p in model.parameters():
        if is_sharded(p):
            # These are gathered for each block and released after it: of other storages every time.
            gathered_shapes.add(tuple(sorted(p.shape)))
        else:
            weights.add(p.untyped_storage().data_ptr())
    activation_bytes = {}
    logits_bytes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in weights or tuple(sorted(tensor.shape)) in gathered_shapes:
            return tensor
        is_logits = tensor.numel() == logits_numel and tensor.shape[-1] == model.vocab_size
        noted = logits_bytes if is_logits else activation_bytes
        noted[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run.forward_backward()
    return SavedTensors(sum(activation_bytes.values()), sum(logits_bytes.values()),
                        max(activation_bytes.values(), default=0))


def micro_batch_size(run) -> int:
    """Sequences that a process computes at once."""
    return run.plan.sequences // run.plan.micro_batches


def local_bytes(tensor) -> int:
    """The bytes of a tensor, or of this process's share of it."""
    if is_sharded(tensor):
        return tensor.to_local().nbytes
    return tensor.nbytes


# -- what is left to do ----------------------------------------------------------------------------

@dataclass
class Work:
    max_iters: int              # of the whole run, earlier parts of it included
    steps: int                  # still to come, as the others
    evaluations: int
    samples: int


def remaining_work(run) -> Work:
    cfg = run.cfg
    max_iters = run.plan.max_iters
    if cfg.eval_only:
        steps = 0
        evaluations = 1
    else:
        steps = max(0, max_iters - run.first_step)
        evaluations = evaluations_left(max_iters, run.plan.eval_interval, run.first_step, run.state.evaluated)
    samples = evaluations
    if cfg.sample_interval:
        samples = steps // cfg.sample_interval
    return Work(max_iters, steps, evaluations, samples)


# -- the model and the data ------------------------------------------------------------------------

def print_parameters(report, model):
    report.say("")
    for line in parameter_table(model):
        report.say(line)
    report.say("")


def parameter_table(model) -> list:
    """The lines of a table of all parameters. Those that all blocks have are one row."""
    names = {}                  # of each parameter, the first: a tied one has two
    rows = {}                   # (name, shape): [times, numbers]
    for name, p in model.named_parameters(remove_duplicate=False):
        shape = " x ".join(str(length) for length in p.shape)
        tied_to = names.setdefault(id(p), name)
        if tied_to == name:
            row = rows.setdefault((re.sub(r"^blocks\.\d+", "blocks.*", name), shape), [0, 0])
            row[1] += p.numel()
        else:
            row = rows.setdefault((f"{name} = {tied_to}", shape), [0, 0])
        row[0] += 1
    table = [("parameter", "shape", "times", "numbers")]
    for (name, shape), (times, numbers) in rows.items():
        table.append((name, shape, str(times), f"{numbers:,}"))
    total = sum(numbers for _, numbers in rows.values())
    return align_columns([*table, ("total", "", "", f"{total:,}")])


def print_data(report, run, work: Work):
    parameters, ngrams = count_parameters(run.model)
    tokens_per_parameter = run.meta["splits"]["train"]["tokens"] / (parameters - ngrams)
    table = " (n-grams not counted)" if ngrams else ""
    tokens = run.state.tokens + work.steps * run.tokens_per_step
    report.label("data", f"{tokens_per_parameter:.3g} train tokens per parameter{table}; the run reads "
                         f"{short(tokens)} tokens, {tokens / run.tokens_per_epoch:.3g} epochs")
    if run.first_step:
        report.label("resumes", f"at step {run.first_step:,}: {work.steps:,} of {work.max_iters:,} steps remain, "
                                f"{short(work.steps * run.tokens_per_step)} tokens")


# -- memory ----------------------------------------------------------------------------------------

@dataclass
class Memory:
    """Bytes by part. They do not add up to a peak, since they are not all there at the same
    time."""

    weights: int
    gradients: int
    optimizer: int              # its state
    working: int                # what the optimizer takes besides while it computes an update
    activations: int
    logits: int                 # with their gradients
    evaluation: int             # what an evaluation takes besides weights and state
    eval_windows: int           # that an evaluation computes at once
    peaks: dict                 # what is held at once, by when


def estimate_memory(run, trial: Trial) -> Memory:
    cfg = run.cfg
    parameters = sum(local_bytes(p) for p in run.model.parameters())
    weights = parameters + sum(local_bytes(buffer) for buffer in run.model.buffers())
    gradients = parameters
    if run.ranks.world > 1 and not cfg.shard:
        gradients *= 2                                  # DistributedDataParallel gathers them in buckets
    state = optimizer_bytes(run.optimizers)
    working = max(optimizer.working_bytes() for optimizer in run.optimizers)
    position_logits = 4 * run.model.vocab_size          # bytes of the logits of one position
    gradients_of_logits = 2 * micro_batch_size(run) * cfg.block_size * position_logits

    # An evaluation keeps no activations, but computes several windows at once, with their logits.
    eval_windows = max(windows_evaluated_at_once(run, split) for split in ("train", "val"))
    logit_copies = 4 if cfg.logit_cap else 2
    evaluation = eval_windows * cfg.block_size * (4 * 17 * cfg.n_embd + logit_copies * position_logits)

    # As the backward pass begins, all it needs is there, and about three tensors between two
    # layers.
    logits = trial.saved.logits + gradients_of_logits
    backward = trial.saved.activations + logits + 3 * trial.saved.largest
    if run.plan.micro_batches > 1:
        backward += gradients                           # of the micro-batches before
    peaks = {
        "backward": weights + state + backward,
        "update": weights + state + gradients + working,
        "evaluation": weights + state + evaluation,
    }
    return Memory(weights, gradients, state, working, trial.saved.activations, logits, evaluation, eval_windows, peaks)


def optimizer_bytes(optimizers: list) -> int:
    """The bytes of the optimizers' state."""
    values = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(local_bytes(value) for value in values if isinstance(value, torch.Tensor))


def windows_evaluated_at_once(run, split: str) -> int:
    return min(count_windows(run, split), windows_at_once(run.cfg.block_size, run.model.vocab_size))


def count_windows(run, split: str) -> int:
    """The whole windows of a split."""
    return (run.meta["splits"][split]["tokens"] - 1) // run.cfg.block_size


def print_memory(report, run, memory: Memory):
    device = run.plan.device
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    notes = {
        "optimizer": f"and {size(memory.working)} while it works" if memory.working else "",
        "activations": f"kept for the backward pass of {micro_batch_size(run)} sequences",
        "logits": "and their gradients",
    }
    table = align_columns([(part, size(getattr(memory, part))) for part in parts])
    for part, line in zip(parts, table, strict=True):
        label = "memory" if part == parts[0] else ""
        report.say(f"{label:<8} {line}  {notes.get(part, '')}".rstrip())
    moments = {
        "backward": "as the backward pass begins",
        "update": "in the optimizer's update",
        "evaluation": f"in an evaluation, {memory.eval_windows} windows together",
    }
    highest = max(memory.peaks, key=memory.peaks.get)
    report.label("", f"about {size(memory.peaks[highest])} of tensors at once: {moments[highest]}")
    facts = []
    if measured := peak_memory(device):
        with_what = "" if device_type(device) == "cuda" else ", Python, PyTorch and the allocator's gaps included"
        facts.append(f"measured {size(measured)}{with_what}")
    if free := free_memory(device):
        facts.append(f"{size(free)} are free")
    report.label("", "; ".join(facts))


def free_memory(device: str) -> int:
    """The bytes that this process can hold in all on the device; 0 where that is not known."""
    if device_type(device) == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return proc_bytes("/proc/meminfo", "MemAvailable") + proc_bytes("/proc/self/status", "VmRSS")


def proc_bytes(path: str, name: str) -> int:
    """A figure of a file of Linux's /proc; 0 elsewhere."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return 0
    entry = re.search(rf"{name}:\s+(\d+) kB", text)
    return 1024 * int(entry[1]) if entry else 0


# -- time ------------------------------------------------------------------------------------------

@dataclass
class Times:
    """Seconds."""

    per_step: float
    per_evaluation: float
    per_sample: float
    steps: float
    evaluations: float
    samples: float
    compiling: float

    @property
    def total(self) -> float:
        return self.steps + self.evaluations + self.samples + self.compiling


def estimate_time(run, trial: Trial, work: Work) -> Times:
    per_step = trial.seconds_per_step
    per_evaluation = estimate_evaluation(run, trial)
    compiling = run.compile_seconds
    if run.plan.compile and trial.step_seconds:         # the optimizer compiles at its first step
        compiling += trial.step_seconds[0] - per_step
    return Times(per_step, per_evaluation, trial.sample_seconds, steps=work.steps * per_step,
                 evaluations=work.evaluations * per_evaluation, samples=work.samples * trial.sample_seconds,
                 compiling=compiling)


def estimate_evaluation(run, trial: Trial) -> float:
    """Seconds of one evaluation of the run. In the trial's, one process computed TRIAL_WINDOWS of
    each split, or all there are."""
    evaluated = run.plan.evaluations["windows"]         # of either split
    factors = []
    for split in ("train", "val"):
        windows = count_windows(run, split)
        factor = min(windows, evaluated) / min(windows, TRIAL_WINDOWS) / run.ranks.world
        factors.append(max(1, factor))
    return trial.evaluation_seconds * sum(factors) / len(factors)


def print_time(report, work: Work, times: Times):
    if not times.total:
        report.label("time", "nothing remains to be done")
        return
    parts = {
        f"{work.steps:,} steps of {milliseconds(times.per_step)} ms": times.steps,
        f"{work.evaluations:,} evaluations of {brief_seconds(times.per_evaluation)}": times.evaluations,
        f"{work.samples:,} samples of {brief_seconds(times.per_sample)}": times.samples,
        "compiling": times.compiling,
    }
    text = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    report.label("time", f"{text}: about {duration(times.total)} in all")


# -- files -----------------------------------------------------------------------------------------

def print_files(report, out_dir: Path, memory: Memory):
    last = memory.weights + memory.optimizer
    report.label("files", f"{out_dir}/: last.pt of {size(last)}, ckpt.pt of {size(memory.weights)}; "
                          f"{size(free_disk(out_dir))} are free")


def existing_folder(out_dir: Path) -> Path:
    """`out_dir`, or the nearest of its parents that is there."""
    path = out_dir.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_disk(out_dir: Path) -> int:
    return shutil.disk_usage(existing_folder(out_dir)).free


# -- doubts: what is allowed and yet rarely meant, in a sentence each ------------------------------

def setting_doubts(run, work: Work) -> list:
    cfg = run.cfg
    max_iters = work.max_iters
    return [
        *data_doubts(run),
        *length_doubts(run, max_iters),
        *schedule_doubts(cfg, max_iters),
        *evaluation_doubts(cfg, run.plan.eval_interval, max_iters),
        *vocabulary_doubts(cfg, run.model.vocab_size, run.plan.device),
    ]


def data_doubts(run) -> list:
    doubts = []
    windows = count_windows(run, "val")
    if windows < 16:
        doubts.append(f"val holds {windows} windows of {run.cfg.block_size} tokens, too few for a precise val loss: "
                      "bring more text, raise prepare.py's --val_fraction or lower --block_size")
    parameters, ngrams = count_parameters(run.model)
    parameters -= ngrams                # most of them stay near 0, since few n-grams are frequent
    tokens = run.meta["splits"]["train"]["tokens"]
    if tokens < 0.02 * parameters:
        doubts.append(f"{parameters / tokens:,.0f} parameters for each train token: the model will overfit "
                      "(memorize it); take a smaller model or more text, and watch the val loss")
    return doubts


def length_doubts(run, max_iters: int) -> list:
    doubts = []
    tokens = run.meta["splits"]["train"]["tokens"]
    epochs = max_iters * run.tokens_per_step / tokens
    if epochs > 10 and not run.cfg.dropout:
        doubts.append(f"{epochs:,.0f} epochs without dropout: it may overfit; try --dropout=0.1, fewer steps or "
                      "--patience=3")
    if run.tokens_per_step > tokens:
        doubts.append(f"a step of {run.tokens_per_step:,} tokens is more than an epoch, so it repeats windows: lower "
                      "--batch_size or --gradient_accumulation_steps")
    return doubts


def schedule_doubts(cfg, max_iters: int) -> list:
    doubts = []
    decays = cfg.decay_lr and cfg.schedule != "constant"
    if decays and cfg.lr_decay_iters not in (0, max_iters):
        outcome = "does not come down to its end"
        if cfg.lr_decay_iters < max_iters:
            outcome = "stays at its lowest from there on"
        doubts.append(f"lr_decay_iters={cfg.lr_decay_iters:,} is not max_iters={max_iters:,}: the learning rate "
                      f"{outcome}; --lr_decay_iters=0 makes them equal")
    if cfg.min_lr and not decays:
        reason = f"schedule={cfg.schedule}" if cfg.decay_lr else "decay_lr=False"
        doubts.append(f"min_lr={cfg.min_lr} is not used: {reason}")
    if cfg.decay_lr and cfg.warmup_iters >= max_iters > 0:
        doubts.append(f"warmup_iters={cfg.warmup_iters:,} is not below max_iters={max_iters:,}: the full learning rate "
                      "is never reached")
    return doubts


def evaluation_doubts(cfg, eval_interval: int, max_iters: int) -> list:
    doubts = []
    if eval_interval > max_iters > 0:
        doubts.append(f"eval_interval={eval_interval:,} is above max_iters={max_iters:,}: only the first and the "
                      "last step are evaluated; ckpt.pt is the better one")
    if cfg.patience and cfg.patience * eval_interval >= max_iters > 0:
        doubts.append(f"patience={cfg.patience} covers the whole run, so early stopping never happens")
    return doubts


def vocabulary_doubts(cfg, vocab_size: int, device: str) -> list:
    rows = vocab_size + -vocab_size % cfg.pad_vocab_to
    if device_type(device) != "cuda" or rows % 64 == 0:
        return []
    return [f"a vocabulary of {vocab_size:,} makes slow matrix products on a GPU: --pad_vocab_to=64"]


def memory_doubts(run, memory: Memory) -> list:
    free = free_memory(run.plan.device)
    needed = max(peak_memory(run.plan.device), *memory.peaks.values())
    if not free or needed <= 0.9 * free:
        return []
    return [f"it needs about {size(needed)} of {size(free)} of memory: halve --batch_size and double "
            "--gradient_accumulation_steps, or lower --block_size"]


def time_doubts(times: Times) -> list:
    if times.evaluations <= 0.5 * times.total or times.total <= 60:
        return []
    share = 100 * times.evaluations / times.total
    return [f"evaluations take {share:.0f}% of the time: --eval_interval=auto --eval_iters=auto bounds them"]


def file_doubts(run, out_dir: Path, memory: Memory) -> list:
    doubts = []
    needed = 2 * (2 * memory.weights + memory.optimizer)        # last.pt, ckpt.pt, and what replaces them
    free = free_disk(out_dir)
    if needed > free:
        doubts.append(f"the checkpoints and their replacements may take {size(needed)}, {size(free)} are free")
    folder = existing_folder(out_dir)
    if not os.access(folder, os.W_OK):
        doubts.append(f"{folder} cannot be written to: name another --out_dir")
    starts_anew = run.state.evaluated is None and not run.first_step
    if starts_anew and (out_dir / "last.pt").exists():
        doubts.append(f"{out_dir} holds a run, which would be moved to {out_dir}.1, or the next number")
    return doubts
