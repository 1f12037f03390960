"""What a person sees of a run: banner, progress, log.csv and loggers."""

import contextlib
import csv
import io
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from inkling.checkpoint import OPEN
from inkling.cli import UserError, printable
from inkling.dataset import windows_at_once
from inkling.device import synchronize
from inkling.distributed import Ranks
from inkling.files import atomic_write
from inkling.format import aligned, columns, duration, fitted, short, size
from inkling.plots import plot_run, read_log

COLUMNS = ["step", "tokens", "loss", "lr", "norm", "train_loss", "val_loss", "val_bits_per_byte",
           "ms", "tokens_per_second", "seconds"]
TIMINGS = COLUMNS[-3:]                  # what differs between two runs of the same command
# Peak dense bfloat16 or float16 rates in TFLOP/s, from the makers' data sheets, by part of the card's name.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165, "3090": 71,
         "V100": 125}














def peak_memory(device: str) -> int:
    """The most bytes this process has held so far: on an NVIDIA GPU those of its tensors, else its resident memory.
    0 where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                 # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: str) -> int:
    """Bytes that the device could give this process in all; 0 where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    found = 0
    with contextlib.suppress(OSError):
        for path, name in (("/proc/meminfo", "MemAvailable"), ("/proc/self/status", "VmRSS")):  # with what it holds now
            found += 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path(path).read_text(encoding="utf-8"))[1])
    return found


def saved_tensors(run_once, model, logits: int) -> tuple:
    """Bytes of (activations, logits, the largest activation) that autograd keeps in a forward pass for the backward
    pass: each storage once, without the weights. `logits`: how many numbers make the logits of a micro-batch."""
    sharded = any(hasattr(p, "to_local") for p in model.parameters())
    weights = set() if sharded else {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes, found = {tuple(sorted(p.shape)) for p in model.parameters()} if sharded else set(), {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # Of a sharded model the weights are put together for each block, and let go.
        if storage.data_ptr() not in weights and tuple(sorted(tensor.shape)) not in shapes:
            is_logits = tensor.numel() == logits and tensor.shape[-1] == model.vocab_size
            found[storage.data_ptr()] = (is_logits, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_once()
    parts = [[size for is_logits, size in found.values() if is_logits == wanted] for wanted in (False, True)]
    return sum(parts[0]), sum(parts[1]), max(parts[0], default=0)


def model_table(model) -> list:
    """Lines of a table of all parameters; those of the blocks that share name and shape are one row."""
    rows, tied = {}, {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for name, p in model.named_parameters(remove_duplicate=False):
        shape = " x ".join(map(str, p.shape))
        if tied[id(p)] != name:
            name, number = f"{name} = {tied[id(p)]}", 0
        else:
            name, number = re.sub(r"^blocks\.\d+", "blocks.*", name), p.numel()
        times, count = rows.get((name, shape), (0, 0))
        rows[name, shape] = times + 1, count + number
    table = [(name, shape, str(times), f"{count:,}") for (name, shape), (times, count) in rows.items()]
    total = sum(count for _, count in rows.values())
    return aligned([("parameter", "shape", "times", "numbers"), *table, ("total", "", "", f"{total:,}")])


def evaluations_left(cfg, step: int, evaluated: int) -> int:
    """How many evaluations a run at `step`, the last of them at `evaluated` (-1: none), has still before it."""
    if evaluated >= cfg.max_iters:
        return 0
    return -(-cfg.max_iters // cfg.eval_interval) - -(-max(step, evaluated + 1) // cfg.eval_interval) + 1


def doubts(cfg, tokens: dict, parameters: int, vocab_size: int, device: str) -> list:
    """What in the settings is allowed and yet rarely meant, in a sentence each. tokens: of the splits, and those that
    the run reads, "read"."""
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
    epochs, windows, decays = tokens["read"] / tokens["train"], (tokens["val"] - 1) // cfg.block_size, cfg.decay_lr
    rows = cfg.pad_vocab_to * math.ceil(vocab_size / cfg.pad_vocab_to)
    rules = [
        (windows < 16, f"val holds {windows} windows of {cfg.block_size} tokens: so few make a rough val loss; bring "
         "more text, raise prepare.py's --val_fraction or lower --block_size"),
        (tokens["train"] < 0.02 * parameters, f"{parameters / tokens['train']:,.0f} parameters for each token of "
         "train: it will be learned by heart; take a smaller model or more text, and look at the val loss"),
        (epochs > 10 and not cfg.dropout, f"{epochs:,.0f} epochs without dropout: the model may learn its text by "
         "heart; try --dropout=0.1, fewer steps or --patience=3"),
        (per_step > tokens["train"], f"a step of {per_step:,} tokens is more than an epoch, so that it sees windows "
         "several times: lower --batch_size or --gradient_accumulation_steps"),
        (decays and cfg.schedule != "constant" and cfg.lr_decay_iters not in (0, cfg.max_iters),
         f"lr_decay_iters={cfg.lr_decay_iters:,} is not max_iters={cfg.max_iters:,}: the learning rate "
         + ("stays at its lowest from there on" if cfg.lr_decay_iters < cfg.max_iters else "will not have come down")
         + "; --lr_decay_iters=0 fits them"),
        (cfg.min_lr and not (decays and cfg.schedule != "constant"), f"min_lr={cfg.min_lr} is not used: "
         + (f"schedule={cfg.schedule}" if decays else "decay_lr=False")),
        (decays and cfg.warmup_iters >= cfg.max_iters > 0, f"warmup_iters={cfg.warmup_iters:,} is not below "
         f"max_iters={cfg.max_iters:,}: the full learning rate is never reached"),
        (cfg.eval_interval > cfg.max_iters > 0, f"eval_interval={cfg.eval_interval:,} is above max_iters="
         f"{cfg.max_iters:,}: it is evaluated at its two ends only, and ckpt.pt is the better of those"),
        (cfg.patience * cfg.eval_interval >= cfg.max_iters > 0 and cfg.patience, f"patience={cfg.patience} evaluations "
         f"of {cfg.eval_interval:,} steps are the whole run: it will not stop early"),
        (device.startswith("cuda") and rows % 64, f"the vocabulary of {vocab_size:,} makes slow matrix products on a "
         "GPU: --pad_vocab_to=64"),
    ]
    return [sentence for holds, sentence in rules if holds]


def held(tensor) -> int:
    """The bytes of a tensor, or of this process's share of it."""
    return tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes


class Report:
    """The run's face and its stopwatch, which stands still while `paused()`."""

    def __init__(self, cfg, out_dir: Path, first: bool, model, meta: dict, state: dict, device: str):
        self.cfg, self.out_dir, self.first, self.state, self.device = cfg, out_dir, first, state, device
        self.model, self.meta = model, meta
        self.writes = first and not (cfg.eval_only or cfg.dry_run)
        self.tokens_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
        self.tokens_per_epoch = meta["splits"]["train"]["tokens"] // cfg.block_size * cfg.block_size
        val = meta["splits"]["val"]
        self.to_bits_per_byte = val["tokens"] / max(1, val["bytes"]) / math.log(2)
        self.first_step = self.last_step = state["step"]
        self.bar, self.loggers, self.closers = None, [], []
        self.before, self.running_since = state["seconds"], None
        self.last_seconds = self.before
        self.began = time.perf_counter()
        self.standing, self.evaluations = 0.0, 0        # seconds paused by this process, and what for
        self.evaluated = state["evaluated"]             # before it began
        self.found = {}                                 # what a dry run measures
        if first:
            self.flops_per_token, self.peak = self.flops(model), self.peak_flops()
            self.width = len(f"{math.log(meta['vocab_size']):.3f}")     # of the largest loss to expect
            if not cfg.eval_only:
                self.need_loggers()
            self.banner()

    def need_loggers(self):
        """The packages that flags ask for, or one line on how to get them: before anything that takes long."""
        if self.cfg.tensorboard:
            try:
                from torch.utils import tensorboard
            except ImportError:
                raise UserError("tensorboard=True needs the package: pip install tensorboard")
            self.tensorboard = tensorboard
        if self.cfg.wandb_log:
            try:
                import wandb
            except ImportError:
                raise UserError("wandb_log=True needs the package: pip install wandb")
            self.wandb = wandb

    def compiling(self, wanted: bool) -> bool:
        """Say that compiling begins, if it is `wanted`, since it takes long; returns `wanted`."""
        self.began_compiling = time.perf_counter()
        if wanted:
            self.label("compile", "takes up to a minute on two cores, more at the first step, less if done before ...")
        return wanted

    def begin(self, compile_note: str, optimizers: list, run_once):
        """Start the stopwatch and whatever is written. Returns the settings to train with: those of the run, or for a
        dry run those of three steps and two short evaluations. run_once: a forward and a backward pass."""
        cfg = self.cfg
        if self.first:
            kind = torch.device(self.device).type
            name = {"cuda": lambda: f", {torch.cuda.get_device_name(self.device)}",
                    "cpu": lambda: f", {torch.get_num_threads()} threads"}.get(kind, str)()
            self.label("machine", f"{self.device}{name}; {cfg.dtype}; compile {compile_note}")
        if self.writes:
            self.open_log()
            self.open_loggers()
        if cfg.dry_run:
            compiling = time.perf_counter() - self.began_compiling if cfg.compile else 0.0
            self.found |= dict(optimizers=optimizers, compile=compiling)
            _, micro = self.share = Ranks().share(cfg.batch_size * cfg.gradient_accumulation_steps,
                                                          cfg.batch_size)
            logits = self.share[0] // micro * cfg.block_size * self.model.vocab_size
            if self.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(self.device)
            self.found["saved"] = saved_tensors(run_once, self.model, logits)
            cfg = replace(cfg, max_iters=min(cfg.max_iters, self.first_step + 3), eval_iters=1, log_interval=1,
                          eval_interval=2**31, sample_interval=0, save_interval=0, patience=0)
        elif self.first and sys.stdout.isatty() and not cfg.eval_only:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=cfg.max_iters, initial=self.first_step, file=sys.stdout, dynamic_ncols=True,
                                leave=False, desc="step", bar_format="{desc} |{bar}|")
        self.running_since = time.perf_counter()
        return cfg

    # -- time

    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of the run included; evaluation and saving are not training."""
        return self.before + (time.perf_counter() - self.running_since if self.running_since else 0)

    @contextlib.contextmanager
    def paused(self):
        synchronize(self.device)
        self.before, self.running_since = self.seconds(), None
        self.paused_since = time.perf_counter()
        try:
            yield
        finally:
            self.running_since = time.perf_counter()
            self.standing += self.running_since - self.paused_since

    def pause(self) -> float:
        """Seconds that an evaluation takes, with its saves and sample."""
        return self.standing / max(1, self.evaluations)

    def left(self, step: int, each: float) -> str:
        """The time from `step` to the end at `each` seconds a step, with evaluations like those so far."""
        if self.cfg.max_iters == OPEN:
            return f"{self.cfg.max_minutes:g} min"
        to_come = evaluations_left(self.cfg, step, self.state["evaluated"])
        return duration(each * (self.cfg.max_iters - step) + self.pause() * to_come)

    def place(self, step: int) -> str:
        """`step/max_iters`, as wide at every step."""
        count = str(self.cfg.max_iters) if self.cfg.max_iters < OPEN else "?"
        return f"{step:{len(count)}}/{count}"

    # -- lines

    def say(self, line: str):
        if self.first:
            if self.bar:
                self.bar.write(line)
            else:
                print(line, flush=True)

    def label(self, name: str, text: str):
        """A line of the banner or the summary; on a terminal as many as it is narrow."""
        wrapped = textwrap.wrap(printable(text), max(30, columns() - 10), break_long_words=False,
                                break_on_hyphens=False)
        self.say("\n".join(f"{'' if number else name:<8} {line}" for number, line in enumerate(wrapped)))

    def banner(self):
        cfg, splits, vocab_size = self.cfg, self.meta["splits"], self.meta["vocab_size"]
        parameters, ngrams = self.parameters()
        per_epoch = self.tokens_per_epoch / self.tokens_per_step
        changed = [f"{f.name}={getattr(cfg, f.name)}" for f in fields(cfg)
                   if getattr(cfg, f.name) not in (f.default, OPEN)
                   and f.name not in ("out_dir", "dtype", "compile", "dry_run")]
        self.label("data", f"{cfg.dataset}: {splits['train']['tokens']:,} train and {splits['val']['tokens']:,} val "
                   f"tokens, vocabulary {vocab_size:,}")
        table = f"; {short(ngrams)} of them are n-gram vectors" if ngrams else ""
        self.label("model", f"{short(parameters)} parameters ({parameters:,}): {cfg.n_layer} layers, {cfg.n_head} "
                   f"heads, {cfg.n_embd} wide, context {cfg.block_size}{table}")
        known = cfg.init_from in ("scratch", "auto") and not self.first_step and cfg.init in ("zero", "gpt2")
        first = f"; the first loss should be near ln {vocab_size} = {math.log(vocab_size):.3f}"
        count = f"{cfg.max_iters:,}" if cfg.max_iters < OPEN else f"as many as {cfg.max_minutes:g} min allow,"
        self.label("steps", f"{count} of {self.tokens_per_step:,} tokens, {per_epoch:.1f} to an epoch"
                   f"{first if known else ''}")
        if changed:
            self.label("settings", f"{', '.join(changed)} (the rest as --help says)")
        if self.writes:
            going_on = f", going on at step {self.first_step:,}" if self.first_step else ""
            self.label("writes", f"{self.out_dir}/{going_on}")

    def parameters(self) -> tuple:
        """How many numbers the model learns, and how many of them are n-gram vectors, of which a token reads few."""
        table = self.model.ngrams
        return sum(p.numel() for p in self.model.parameters()), 0 if table is None else table.weight.numel()

    def flops(self, model) -> float:
        """Floating-point operations of training on one token: 6 for each weight of a matrix product, and attention's
        (PaLM's count, arXiv 2204.02311, appendix B)."""
        matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) + model.head.weight.numel()
        return 6 * matrices + 12 * self.cfg.n_layer * self.cfg.block_size * self.cfg.n_embd

    def peak_flops(self) -> float:
        """The device's peak rate, where it is known; else 0."""
        if torch.device(self.device).type != "cuda" or self.cfg.dtype == "float32":
            return 0
        words = re.findall(r"\w+", torch.cuda.get_device_name(self.device))
        return next((rate * 1e12 for card, rate in PEAKS.items() if card in words), 0) * Ranks().world

    def update(self, step: int, loss: float, norm: float, lr: float):
        """A line for update number `step`."""
        if not self.first:
            return
        seconds = self.seconds()
        each = max(1e-9, (seconds - self.last_seconds) / max(1, step - self.last_step))
        rate = self.tokens_per_step / each
        self.last_seconds, self.last_step = seconds, step
        if self.cfg.dry_run:
            self.found.setdefault("steps", []).append(each)
            return
        parts = dict(step=f"step {self.place(step)}", loss=f"loss {loss:{self.width}.3f}", lr=f"lr {lr:.1e}",
                     norm=f"norm {norm:5.2f}", ms=f"{1000 * each:5.{1 if each < 0.1 else 0}f} ms",
                     rate=f"{short(rate):>5} tok/s", left=f"{self.left(step, each)} left",
                     mfu=f"{100 * rate * self.flops_per_token / self.peak:.0f}% MFU" if self.peak else "")
        if self.bar:
            self.bar.n, self.bar.total = step, self.cfg.max_iters
            self.bar.set_description_str(fitted(parts, columns() - 10))
        else:
            self.say(fitted(parts, columns()))
        self.log(step, loss=loss, norm=norm, lr=lr, ms=1000 * each, tokens_per_second=rate)

    def evaluation(self, step: int, losses: dict, best: bool):
        self.evaluations += 1
        if not self.first:
            return
        if self.cfg.dry_run:
            self.found["evaluation"] = time.perf_counter() - self.paused_since
            return
        bits = losses["val"] * self.to_bits_per_byte
        best_of_all = f"best {self.state['best_val_loss']:.4f} at step {self.state['best_step']}"
        wide = self.width + 1
        parts = dict(step=f"eval {self.place(step)}", train=f"train {losses['train']:{wide}.4f}",
                     val=f"val {losses['val']:{wide}.4f}", bits=f"{bits:.3f} bits per byte",
                     best="best so far" if best else best_of_all)
        self.say(fitted(parts, columns()))
        self.log(step, train_loss=losses["train"], val_loss=losses["val"], val_bits_per_byte=bits)
        # At step 0 the first update need not wait for a picture of one point, unless its time is to be known.
        if self.writes and (step or self.cfg.max_minutes):
            try:
                plot_run(read_log(self.out_dir / "log.csv"), self.out_dir / "loss.png",
                     f"{self.out_dir}", self.tokens_per_step, self.tokens_per_epoch)
            except ImportError:
                pass                    # the table is there all the same
            except OSError as error:
                self.say(f"could not write {self.out_dir / 'loss.png'}: {error.strerror or error}")

    def sample(self, step: int, make_text):
        began = time.perf_counter()
        text = "\n".join(printable(line) for line in make_text().strip().split("\n"))
        self.found["sample"] = time.perf_counter() - began
        if not self.cfg.dry_run:
            self.say(f"--- sample at step {step}\n{text}\n---")

    # -- files

    def open_log(self):
        """log.csv, without the rows that the resumed run will write again."""
        path = self.out_dir / "log.csv"
        kept = []
        if self.first_step and path.exists():
            kept = [row for row in read_log(path) if row["step"] <=
                    (self.state["evaluated"] if "val_loss" in row else self.first_step)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows({key: int(value) if key in ("step", "tokens") else value for key, value in row.items()}
                         for row in kept)
        try:
            with atomic_write(path) as file:
                file.write(text.getvalue().encode())
            self.file = open(path, "a", newline="", encoding="utf-8")   # noqa: SIM115, open for the whole run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}")

    def open_loggers(self):
        cfg = self.cfg
        if cfg.tensorboard:
            board = self.tensorboard.SummaryWriter(str(self.out_dir))
            self.loggers.append(lambda step, row: [board.add_scalar(key, value, step) for key, value in row.items()])
            self.closers.append(board.close)
        if cfg.wandb_log:
            logged = self.wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or self.out_dir.name,
                                     config=vars(cfg))
            self.loggers.append(lambda step, row: logged.log(row, step=step))
            self.closers.append(logged.finish)

    def log(self, step: int, **row):
        """A row of log.csv, and the same figures to TensorBoard and W&B. A full disk costs the row, not the run."""
        if not self.writes:
            return
        row |= dict(tokens=step * self.tokens_per_step, seconds=round(self.seconds(), 3))
        try:
            csv.DictWriter(self.file, COLUMNS).writerow({"step": step, **row})
            self.file.flush()
        except OSError as error:
            self.say(f"could not write log.csv: {error.strerror or error}")
        for logger in self.loggers:
            logger(step, row)

    # -- a dry run

    def memory(self) -> dict:
        """Bytes by part; `phases`: what is held at once as the backward pass begins, in the update, in an evaluation
        of so many `windows`. The parts add up to none of them, since they are not all there at the same time."""
        cfg, (rows, micro), world = self.cfg, self.share, Ranks().world
        optimizers = self.found["optimizers"]
        weights = sum(held(tensor) for tensor in [*self.model.parameters(), *self.model.buffers()])
        gradients = sum(held(p) for p in self.model.parameters()) * (2 if world > 1 and not cfg.shard else 1)  # DDP's
        state = sum(held(tensor) for optimizer in optimizers for entry in optimizer.state.values()
                    for tensor in entry.values() if hasattr(tensor, "nbytes"))
        activations, saved_logits, widest = self.found["saved"]
        position = 4 * self.model.vocab_size                            # bytes of its logits
        logits = saved_logits + 2 * rows // micro * cfg.block_size * position       # and two of their gradients
        # Muon stacks the matrices of a shape, and holds up to nine tensors of that size while it works on them.
        work = max((9 * sum(p.nbytes for p in group["params"]) for optimizer in optimizers
                    for group in optimizer.param_groups if "momentum" in group), default=0)
        # An evaluation keeps no activations, but takes some windows at once, with their logits.
        at_once = windows_at_once(cfg.block_size, self.model.vocab_size)
        windows = max(min(at_once, (self.meta["splits"][name]["tokens"] - 1) // cfg.block_size)
                      for name in ("train", "val"))
        wide = 4 * 17 * cfg.n_embd + (4 if cfg.logit_cap else 2) * position
        # As the backward pass begins, all of it is there, and some three tensors between two layers.
        phases = dict(backward=activations + logits + 3 * widest + gradients * (micro > 1), update=gradients + work,
                      evaluation=windows * cfg.block_size * wide)
        phases = {name: weights + state + more for name, more in phases.items()}
        return dict(weights=weights, gradients=gradients, optimizer=state, work=work, activations=activations,
                    logits=logits, windows=windows, phases=phases)

    def plan(self):
        """Say what the run would be."""
        cfg, found, splits = self.cfg, self.found, self.meta["splits"]
        trial = found.get("steps", [0.0])
        each = min(trial)               # the first step compiles the optimizer, and warms up
        if cfg.max_iters == OPEN:               # about; evaluations take their part
            cfg = replace(cfg, max_iters=max(1, int(60 * cfg.max_minutes / max(each, 1e-9))))
        parameters, ngrams = self.parameters()
        parameters -= ngrams            # most of which fade, since few runs of tokens come often
        tokens = {split: splits[split]["tokens"] for split in ("train", "val")}
        steps = 0 if cfg.eval_only else max(0, cfg.max_iters - self.first_step)
        tokens["read"] = cfg.max_iters * self.tokens_per_step
        self.say("")
        for line in model_table(self.model):
            self.say(line)
        self.say("")
        table = " but for the n-grams" if ngrams else ""
        self.label("data", f"{tokens['train'] / parameters:.3g} train tokens to a parameter{table}; the run reads "
                   f"{short(tokens['read'])} tokens, {tokens['read'] / self.tokens_per_epoch:.3g} epochs")
        if self.first_step:
            self.label("resumes", f"at step {self.first_step:,}: {steps:,} of {cfg.max_iters:,} steps remain, "
                       f"{short(steps * self.tokens_per_step)} tokens")

        memory = self.memory()
        most = max(memory["phases"], key=memory["phases"].get)
        notes = dict(optimizer=f"and {size(memory['work'])} while it works" if memory["work"] else "",
                     activations=f"kept for the backward pass of {self.share[0] // self.share[1]} sequences",
                     logits="and their gradients")
        rows = [(name, size(memory[name])) for name in ("weights", "gradients", "optimizer", "activations", "logits")]
        for number, ((name, _), line) in enumerate(zip(rows, aligned(rows), strict=True)):
            self.say(f"{'' if number else 'memory':<8} {line}  {notes.get(name, '')}".rstrip())
        peak, held, free = memory["phases"][most], peak_memory(self.device), free_memory(self.device)
        where = dict(backward="as the backward pass begins", update="in the optimizer's update",
                     evaluation=f"in an evaluation, {memory['windows']} windows together")[most]
        self.label("", f"about {size(peak)} of tensors at once: {where}")
        whole = "" if self.device.startswith("cuda") else ", Python, PyTorch and the allocator's gaps with it"
        self.label("", (f"measured {size(held)}{whole}" if held else "") + (f"; {size(free)} are free" if free else ""))

        warnings = doubts(cfg, tokens, parameters, self.meta["vocab_size"], self.device)
        if free and max(peak, held) > 0.9 * free:
            warnings.append(f"it needs about {size(max(peak, held))} of {size(free)} of memory: halve --batch_size "
                            "and double --gradient_accumulation_steps, or lower --block_size")
        evaluations = 1 if cfg.eval_only else evaluations_left(cfg, self.first_step, self.evaluated)
        whole = {split: (tokens[split] - 1) // cfg.block_size for split in ("train", "val")}
        most_windows = 16 * cfg.eval_iters or whole["val"]
        # The trial took 16 windows of each split or all there are, on one process.
        rounds = [max(1, min(count, most_windows) / min(count, 16) / Ranks().world) for count in whole.values()]
        evaluation = found.get("evaluation", 0) * sum(rounds) / len(rounds)
        samples = steps // cfg.sample_interval if cfg.sample_interval else evaluations
        parts = {f"{steps:,} steps of {1000 * each:,.{1 if each < 0.1 else 0}f} ms": steps * each,
                 f"{evaluations:,} evaluations of {evaluation:,.2g} s": evaluations * evaluation,
                 f"{samples:,} samples of {found.get('sample', 0):,.2g} s": samples * found.get("sample", 0),
                 "compiling": found["compile"] + (trial[0] - each if cfg.compile else 0)}
        total = sum(parts.values())
        self.label("time", ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items() if seconds)
                   + f": about {duration(total)} in all" if total else "nothing remains to be done")
        if evaluations * evaluation > 0.5 * total > 30:
            warnings.append(f"evaluations take {100 * evaluations * evaluation / total:.0f}% of the time: a larger "
                            "--eval_interval or a smaller --eval_iters shortens them")

        path = self.out_dir.absolute()
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        disk, files = shutil.disk_usage(place).free, 2 * (2 * memory["weights"] + memory["optimizer"])
        self.label("files", f"{self.out_dir}/: last.pt of {size(memory['weights'] + memory['optimizer'])}, ckpt.pt of "
                   f"{size(memory['weights'])}; {size(disk)} are free")
        if files > disk:
            warnings.append(f"the checkpoints and their replacements may take {size(files)}, {size(disk)} are free")
        if not os.access(place, os.W_OK):
            warnings.append(f"{place} cannot be written to: name another --out_dir")
        if self.evaluated < 0 and not self.first_step and (self.out_dir / "last.pt").exists():
            warnings.append(f"{self.out_dir} holds a run, which would be moved to {self.out_dir}.1, or the next number")
        for warning in warnings:
            self.label("warning", warning)
        self.label("dry run", "nothing was written; the same command without --dry_run does it")

    # -- the end

    def not_finite(self, step: int) -> int:
        """Say that update number `step` was stopped; returns the exit code."""
        self.close()
        if self.first:
            late = "" if self.device == "cpu" else f" (seen there; it may be up to {self.cfg.log_interval} steps older)"
            kept = f" {self.out_dir}/last.pt holds the run as it was at its last save." if self.writes else ""
            print(f"stopped: the loss or gradient of step {step}{late} is not finite, and was not applied."
                  f"{kept} Try a lower --learning_rate, --grad_clip=1.0, more --warmup_iters or --dtype=float32",
                  file=sys.stderr, flush=True)
        return 3

    def close(self):
        if self.bar:
            self.bar.close()
            self.bar = None
        for close in self.closers:
            close()

    def finish(self, stop, unsaved: dict) -> int:
        """Say how the run ended; returns the exit code. unsaved: what went wrong in the last save of each file."""
        self.close()
        problems = list(filter(None, unsaved.values()))
        for problem in problems:
            self.label("unsaved", problem)
        code = stop.exit_code if stop.signal else 4 if problems else 0
        cfg, state, step = self.cfg, self.state, self.state["step"]
        if self.first and cfg.dry_run and not stop.signal:
            self.plan()
        if not self.writes:
            return code
        if stop.asked and state["evaluated"] < step:
            rest = "makes up for its last evaluation" if step == cfg.max_iters else "goes on"
            last = shlex.quote(str(self.out_dir / "last.pt"))
            why = "" if stop.signal else f" (max_minutes={cfg.max_minutes:g} are over)"
            place = self.place(step).strip().replace("/", " of ")
            self.label("stopped", f"at step {place}{why}: the same command with --init_from=resume {rest}; "
                       f"python sample.py --ckpt={last} samples from the weights of now")
            return code
        why = f"max_minutes={cfg.max_minutes:g} are over; --init_from=resume goes on" if stop.asked else \
            f"patience={cfg.patience}"
        early = f" of {cfg.max_iters:,} ({why})" if step < cfg.max_iters else ""
        if step == self.first_step == cfg.max_iters:
            self.label("note", "there was nothing left to do: a larger --max_iters goes on")
        self.label("done", f"{step:,} steps{early} in {duration(self.seconds())} of training; best val loss "
                   f"{state['best_val_loss']:.4f} at step {state['best_step']}")
        tokens, peak = step * self.tokens_per_step, peak_memory(self.device)
        rate = f" at {short(tokens / self.seconds())} a second" if tokens else ""
        self.label("figures", f"{short(tokens)} tokens{rate}; this process took "
                   f"{duration(time.perf_counter() - self.began)}" + (f" and {size(peak)} of memory" if peak else ""))
        if state["losses"] and state["losses"]["val"] > state["best_val_loss"] + 0.01:
            self.label("note", f"the val loss has risen to {state['losses']['val']:.4f} since: the model learns its "
                       "training text by heart. Try --patience=3, fewer steps, more --dropout or a smaller model")
        purposes = {"ckpt.pt": "best weights", "last.pt": "to go on", "log.csv": "figures", "loss.png": "picture"}
        there = [f"{name} ({purpose})" for name, purpose in purposes.items() if (self.out_dir / name).exists()]
        self.label("files", f"{self.out_dir}/: {', '.join(there)}")
        self.say(f"next     python sample.py --out_dir={shlex.quote(str(self.out_dir))}")
        return code
