"""What a person sees of a run and what is recorded of it: the banner, a line per step and
evaluation, log.csv, other loggers, the closing summary.

A Report reads the Run that train.py built and changes nothing in it. It prints and records; it
decides nothing.
"""

import contextlib
import csv
import io
import math
import re
import shlex
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import torch

from inkling.anchors import in_nats, judge, strongest, usable_anchors
from inkling.cli import UserError, printable, printable_text
from inkling.device import device_type
from inkling.evaluation import BATCH, Evaluations, cost_of
from inkling.files import atomic_write
from inkling.format import counted, duration, fit_line, milliseconds, rough_duration, short, size, terminal_width
from inkling.plots import plot_run, read_log, why

TIMINGS = ["ms", "tokens_per_second", "seconds"]        # what differs between two runs of the same command
COLUMNS = ["step", "tokens", "loss", "lr", "norm", "train_loss", "val_loss", "val_bits_per_byte", *TIMINGS]

# Peak rates of dense bfloat16 or float16 in TFLOP/s, from the makers' data sheets. The keys are
# words of the cards' names.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165, "3090": 71,
         "V100": 125}

PURPOSES = {"ckpt.pt": "best weights", "last.pt": "to resume", "log.csv": "metrics", "loss.png": "loss curve"}


# -- facts about a run -----------------------------------------------------------------------------

def count_parameters(model) -> tuple:
    """(all parameters of the model, those of its n-gram table)."""
    total = sum(p.numel() for p in model.parameters())
    if model.ngrams is None:
        return total, 0
    return total, model.ngrams.weight.numel()


def flops_per_token(cfg, model) -> float:
    """Floating-point operations to train on one token: 6 for each weight of a matrix product, and
    attention's (PaLM's count, arXiv 2204.02311, appendix B)."""
    weights = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    weights += model.head.weight.numel()
    width = cfg.n_head * (cfg.head_dim or cfg.n_embd // cfg.n_head)
    return 6 * weights + 12 * cfg.n_layer * cfg.block_size * width


def peak_flops(device: str, dtype: str) -> float:
    """The card's peak rate in operations per second; 0 where it is not known."""
    if device_type(device) != "cuda" or dtype == "float32":
        return 0
    words = re.findall(r"\w+", torch.cuda.get_device_name(device))
    for card, teraflops in PEAKS.items():
        if card in words:
            return teraflops * 1e12
    return 0


def peak_memory(device: str) -> int:
    """The most bytes this process has held so far: on an NVIDIA GPU those of its tensors, elsewhere
    its resident memory. 0 where the system does not tell."""
    if device_type(device) == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                     # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak        # macOS counts bytes, Linux kilobytes


def describe_machine(device: str) -> str:
    kind = device_type(device)
    if kind == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    if kind == "cpu":
        return f"{device}, {torch.get_num_threads()} threads"
    return device


def changed_settings(cfg) -> list:
    """NAME=VALUE of every setting that differs from its default, in the order of --help: those of
    the class itself come before those of its parents."""
    own = type(cfg).__annotations__
    changed = []
    for field in sorted(fields(cfg), key=lambda field: field.name not in own):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in ("out_dir", "dry_run"):
            changed.append(f"{field.name}={value}")
    return changed


def evaluations_left(max_iters: int, eval_interval: int, step: int, evaluated: int | None) -> int:
    """How many evaluations a run at `step` still has to do. They are at multiples of eval_interval
    and at max_iters; `evaluated` is the step of the last one, None before the first."""
    next_step = step
    if evaluated is not None:
        if evaluated >= max_iters:
            return 0
        next_step = max(step, evaluated + 1)
    multiples_before = math.ceil(next_step / eval_interval)             # those below next_step
    multiples = math.ceil(max_iters / eval_interval)                    # those below max_iters
    return multiples - multiples_before + 1


def memorizing(cfg, state, train_then: float, losses: dict) -> str:
    """What the note says when train and val have parted. train_then: the train loss at the best
    evaluation."""
    remedies = []
    if not cfg.patience:
        remedies.append("--patience=3 ends a run that gets no better")
    remedies += [
        f"--dropout={min(0.5, cfg.dropout + 0.1):.2g} (now {cfg.dropout:g})",
        f"--weight_decay={2 * cfg.weight_decay or 0.1:.2g} (now {cfg.weight_decay:g})",
    ]
    return (f"memorizing since step {state.best_step:,}: train {train_then:.4f} -> {losses['train']:.4f}, val "
            f"{state.best_val_loss:.4f} -> {losses['val']:.4f}. More text helps most, then {', '.join(remedies)}")


# -- loggers ---------------------------------------------------------------------------------------

class TensorBoard:
    name = "TensorBoard"

    def __init__(self, out_dir: Path):
        from torch.utils.tensorboard import SummaryWriter  # optional

        self.writer = SummaryWriter(str(out_dir))

    def log(self, step: int, row: dict):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    name = "Weights & Biases"

    def __init__(self, run, out_dir: Path):
        import wandb  # optional

        cfg = run.cfg
        name = cfg.wandb_run_name or out_dir.name
        self.logged_run = wandb.init(project=cfg.wandb_project, name=name, config=vars(cfg) | vars(run.plan))

    def log(self, step: int, row: dict):
        self.logged_run.log(row, step=step)

    def close(self):
        self.logged_run.finish()


def check_loggers(cfg):
    """Raise UserError if the package of a logger that cfg asks for is missing or broken."""
    if cfg.eval_only:                       # logs nothing
        return
    setting = package = ""
    try:
        if cfg.tensorboard:
            setting, package = "tensorboard", "tensorboard"
            from torch.utils import tensorboard  # noqa: F401
        if cfg.wandb_log:
            setting, package = "wandb_log", "wandb"
            import wandb  # noqa: F401
    except ImportError:
        raise UserError(f"{setting}=True needs a package that is not installed: pip install {package}")
    except Exception as error:              # a package that does not fit another one may raise anything
        raise UserError(f"{setting}=True: the package {package} cannot be imported ({why(error)}): install it anew, "
                        f"or leave {setting} out")


# -- log.csv ---------------------------------------------------------------------------------------

class LogFile:
    """log.csv of a run that begins at `first_step`, after an evaluation at step `evaluated`: the
    rows that this run will write again are cut off."""

    def __init__(self, path: Path, first_step: int, evaluated: int | None):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        try:
            rows = read_log(path) if first_step and path.exists() else []
            for row in rows:
                if is_settled(row, first_step, evaluated):
                    writer.writerow(row | {"step": int(row["step"]), "tokens": int(row["tokens"])})
            with atomic_write(path) as file:
                file.write(text.getvalue().encode())
            self.file = open(path, "a", newline="", encoding="utf-8")   # noqa: SIM115, open for the whole run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}")

    def write(self, row: dict):
        csv.DictWriter(self.file, COLUMNS).writerow(row)
        self.file.flush()

    def close(self):
        with contextlib.suppress(OSError):      # of a full disk, which `write` has reported
            self.file.close()


def is_settled(row: dict, first_step: int, evaluated: int | None) -> bool:
    """Whether a row of log.csv belongs to the part of the run that the checkpoint holds."""
    if "val_loss" in row:
        return evaluated is not None and row["step"] <= evaluated
    return row["step"] <= first_step


# -- the report ------------------------------------------------------------------------------------

PICTURES_SHARE = 0.02                   # of the time, at most, goes into drawing loss.png


class Report:
    """Prints and records what a run does; in processes other than the first, nothing."""

    def __init__(self, run, out_dir: Path, began: float | None = None):
        """began: when the process began, by time.monotonic; None: now."""
        self.run = run
        self.out_dir = out_dir
        self.speaks = run.ranks.first
        self.writes = self.speaks and not (run.cfg.eval_only or run.cfg.dry_run)
        self.bar = None
        self.log_file = None
        self.loggers = []
        self.step_line = ""                 # the latest line of a step; it stands in front of the bar
        self.uncompiled_seconds_per_step = None     # as estimated before compiling; None: not known
        self.draws_fail = False             # and it has been said
        self.picture_is_old = False         # log.csv knows more than loss.png shows
        self.next_picture = 0.0             # by time.monotonic
        self.began = time.monotonic() if began is None else began
        self.last_step = run.first_step
        self.last_seconds = run.stopwatch.seconds()
        self.first_seconds = self.last_seconds
        self.loss_width = len(f"{math.log(run.meta['vocab_size']):.3f}")        # of the largest loss to expect
        val = run.meta["splits"]["val"]
        self.anchors = usable_anchors(run.meta)
        self.parting_said = False           # that the run memorizes
        self.best_on_all: float | None = None       # the loss of ckpt.pt that `best` has said
        self.bits_per_byte = val["tokens"] / max(1, val["bytes"]) / math.log(2)     # at a loss of 1 nat per token

    # -- plain lines

    def say(self, line: str):
        if not self.speaks:
            return
        if self.bar:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def label(self, name: str, text: str):
        """A labelled line; several on a narrow terminal."""
        width = max(39, terminal_width() - 1)
        lines = textwrap.wrap(printable(text), width, initial_indent=f"{name:<8} ", subsequent_indent=9 * " ",
                              break_long_words=False, break_on_hyphens=False)
        self.say("\n".join(lines))

    def warn(self, text: str):
        self.label("warning", text)

    # -- before the first step

    def banner(self):
        if not self.speaks:
            return
        cfg = self.run.cfg
        vocab_size = self.run.meta["vocab_size"]
        splits = self.run.meta["splits"]
        self.label("data", f"{cfg.dataset}: {splits['train']['tokens']:,} train and {splits['val']['tokens']:,} val "
                           f"tokens, vocabulary {vocab_size:,}")
        self.plan()
        self.label("model", self.describe_model())
        self.label("steps", self.describe_steps())
        if changed := changed_settings(cfg):
            self.label("settings", f"{', '.join(changed)} (all others at their defaults)")
        if self.writes and self.run.first_step:
            self.label("writes", f"{self.out_dir}/, resuming at step {self.run.first_step:,}")
        elif self.writes:
            self.label("writes", f"{self.out_dir}/")

    def plan(self):
        """Say what was chosen for the run, as a command, and why."""
        choice = self.run.choice
        if not (choice and choice.reasons):
            return
        settings = dict(setting.split("=", 1) for setting in changed_settings(self.run.cfg))
        settings |= self.run.given | choice.settings
        words = [f"--{name}={value}" for name, value in settings.items()]
        self.say(f"plan     {shlex.join(['python', 'train.py', *words])}")
        for reason in choice.reasons:
            self.label("", reason)

    def describe_model(self) -> str:
        cfg = self.run.cfg
        parameters, ngrams = count_parameters(self.run.model)
        text = (f"{short(parameters)} parameters ({parameters:,}): {counted(cfg.n_layer, 'layer')}, "
                f"{counted(cfg.n_head, 'head')}, {cfg.n_embd} wide, context {cfg.block_size}")
        if ngrams:
            text += (f"; {short(ngrams)} of them are n-gram vectors, a table looked up by the last 2 to {cfg.ngrams} "
                     "tokens")
        if ngrams and cfg.ngram_decay == "auto" and cfg.optimizer == "muon":
            text += f", with ngram_decay={self.run.plan.ngram_decay:g}"
        return text

    def describe_steps(self) -> str:
        run = self.run
        count = f"as many as {run.cfg.max_minutes:g} min allow,"
        if run.plan.most_steps:
            count = f"at most {run.plan.most_steps:,}, or {count}"
        if run.plan.max_iters is not None:
            count = f"{run.plan.max_iters:,}"
        steps_per_epoch = run.tokens_per_epoch / run.tokens_per_step
        text = f"{count} of {run.tokens_per_step:,} tokens, {steps_per_epoch:.1f} to an epoch"
        # Neither trained weights nor the other kinds of init begin at equal probabilities.
        from_scratch = run.cfg.init_from in ("scratch", "auto") and not run.first_step
        if from_scratch and run.cfg.init in ("zero", "gpt2"):
            vocab_size = run.meta["vocab_size"]
            text += f"; the first loss should be near ln {vocab_size} = {math.log(vocab_size):.3f}"
        return text

    def estimate(self, seconds: float, seconds_per_step: float):
        """Say about how long the run takes, before anything else does; above an hour, what would take
        less."""
        steps = f"{self.run.plan.max_iters - self.run.state.step:,} steps of {milliseconds(seconds_per_step)} ms"
        self.uncompiled_seconds_per_step = seconds_per_step
        text = f"about {rough_duration(seconds)} of training on this machine, uncompiled: {steps}"
        if seconds > 3600:
            self.warn(f"{text}. For less: --max_minutes=60 makes as many steps as fit; a smaller --n_layer, --n_embd "
                      "or --batch_size makes each of them faster")
        else:
            self.label("pace", text)

    def evaluations(self):
        """Say how often the run evaluates, and on how much; and if the user's settings make that
        expensive."""
        run = self.run
        if run.cfg.eval_only:
            return
        evaluations = Evaluations(**run.plan.evaluations)
        of_val = (len(run.data["val"]) - 1) // run.cfg.block_size
        windows = "all" if evaluations.windows == of_val else f"{evaluations.windows:,} of"
        text = f"every {evaluations.interval:,} steps, on {windows} {of_val:,} windows of val and as many of train"
        if evaluations.at_the_end:
            last = "all" if evaluations.at_the_end == of_val else f"{evaluations.at_the_end:,}"
            text += f"; at the end on {last} of val"
        step_windows = run.cfg.batch_size * run.cfg.gradient_accumulation_steps
        share = cost_of(evaluations, run.plan.max_iters, step_windows)
        if share > 0.2 and (run.cfg.eval_interval != "auto" or run.cfg.eval_iters != "auto"):
            text += (f"; that costs {100 * share:.0f}% of what training does: --eval_iters=auto "
                     "--eval_interval=auto bound it at 8%")
        if run.state.evaluated is not None and run.state.best_val_loss == math.inf:
            text += "; the windows are others than before, so the best is chosen anew"
        self.label("evaluate", text)

    def end_moved(self, step: int, end: int):
        """The clock has moved the end of the run."""
        self.label("time", f"at step {step:,}: the time is enough for {end:,} steps in all")

    def best(self, loss: float, windows: int):
        """The loss of the weights in ckpt.pt on more windows than the evaluations so far read."""
        self.best_on_all = loss
        of_val = (len(self.run.data["val"]) - 1) // self.run.cfg.block_size
        read = "all" if windows == of_val else f"{windows:,} of"
        self.label("final", f"val {loss:.4f} on {read} {of_val:,} windows, {loss * self.bits_per_byte:.3f} bits per "
                            f"byte: the weights of ckpt.pt, of step {self.run.state.best_step:,}")

    def compiling(self, expected_seconds: float):
        self.label("compile", f"about {rough_duration(expected_seconds)}; less once it is cached ...")

    def machine(self, compile_note: str):
        plan = self.run.plan
        if self.speaks:
            self.label("machine", f"{describe_machine(plan.device)}; {plan.dtype}; compile {compile_note}")

    def open(self):
        """Open log.csv, the other loggers and, on a terminal, the progress bar."""
        run = self.run
        if not self.writes:
            return
        self.log_file = LogFile(self.out_dir / "log.csv", run.first_step, run.state.evaluated)
        if run.cfg.tensorboard:
            self.add_logger(TensorBoard, self.out_dir)
        if run.cfg.wandb_log:
            self.add_logger(WeightsAndBiases, run, self.out_dir)
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm  # optional

                self.bar = tqdm(total=run.plan.max_iters, initial=run.first_step, file=sys.stdout,
                                dynamic_ncols=True, leave=False, desc="step", bar_format="{desc} |{bar}|")

    def add_logger(self, logger: type, *arguments):
        try:
            self.loggers.append(logger(*arguments))
        except Exception as error:              # a logger raises whatever it likes, and ends no run
            self.warn(f"{logger.name} cannot start and logs nothing: {why(error)}")

    def call_loggers(self, action):
        """action(logger) for each; one that fails logs no more."""
        for logger in list(self.loggers):
            try:
                action(logger)
            except Exception as error:          # as above
                self.loggers.remove(logger)
                self.warn(f"{logger.name} has failed and logs no more: {why(error)}")

    # -- while it trains

    def step(self, step: int, loss: float, norm: float, lr: float):
        """Print and record the update that led to `step`."""
        if not self.speaks:
            return
        seconds = self.run.stopwatch.seconds()
        seconds_per_step = max(1e-9, (seconds - self.last_seconds) / max(1, step - self.last_step))
        tokens_per_second = self.run.tokens_per_step / seconds_per_step
        self.last_step = step
        self.last_seconds = seconds
        self.progress({
            "step": f"step {self.place(step)}",
            "loss": f"loss {loss:{self.loss_width}.3f}",
            "lr": f"lr {lr:.1e}",
            "norm": f"norm {norm:5.2f}",
            "ms": f"{milliseconds(seconds_per_step):>5} ms",
            "rate": f"{short(tokens_per_second):>5} tok/s",
            "left": self.time_left(step, seconds_per_step),
            "mfu": self.utilization(tokens_per_second),
        })
        self.log(step, loss=loss, norm=norm, lr=lr, ms=1000 * seconds_per_step, tokens_per_second=tokens_per_second)

    def progress(self, parts: dict):
        """Print a line, or renew the one in front of the progress bar."""
        if self.bar:
            self.step_line = fit_line(parts, terminal_width() - 10)
            self.bar.n = self.last_step
            self.bar.total = self.run.plan.max_iters
            self.bar.set_description_str(self.step_line)
        else:
            self.say(fit_line(parts, terminal_width()))

    def advance(self, step: int):
        """Move the progress bar to `step`, also at steps that print nothing."""
        if self.bar:
            self.bar.update(step - self.bar.n)

    def keep_step_line(self):
        """Print the line in front of the progress bar above it, where it stays: what follows is newer."""
        if self.bar and self.step_line:
            self.bar.set_description_str("step", refresh=False)
            self.bar.write(self.step_line)
            self.step_line = ""

    def place(self, step: int) -> str:
        """STEP/MAX_ITERS, equally wide at every step."""
        max_iters = self.run.plan.max_iters
        return f"{step:{len(str(max_iters))}}/{max_iters}"

    def time_left(self, step: int, seconds_per_step: float) -> str:
        """How long the rest of the run takes if its steps and evaluations keep this pace, in words."""
        run = self.run
        max_iters = run.plan.max_iters
        if step == max_iters:
            return "then evaluates"
        evaluations = evaluations_left(max_iters, run.plan.eval_interval, step, run.state.evaluated)
        left = seconds_per_step * (max_iters - step) + run.stopwatch.pause_seconds() * evaluations
        return f"{duration(left)} left"

    def utilization(self, tokens_per_second: float) -> str:
        """Model FLOPs utilization, the share of the cards' peak rate; "" where it is not known."""
        run = self.run
        peak = run.ranks.world * peak_flops(run.plan.device, run.plan.dtype)
        if not peak:
            return ""
        return f"{100 * tokens_per_second * flops_per_token(run.cfg, run.model) / peak:.0f}% MFU"

    def evaluation(self, step: int, losses: dict, is_best: bool):
        """Print and record an evaluation, and draw loss.png if that costs little by now."""
        if not self.speaks:
            return
        state = self.run.state
        bits_per_byte = losses["val"] * self.bits_per_byte
        best = "best so far"
        if not is_best:
            best = f"best {state.best_val_loss:.4f} at step {state.best_step}"
        width = self.loss_width + 1
        self.keep_step_line()
        self.say(fit_line({
            "step": f"eval {self.place(step)}",
            "train": f"train {losses['train']:{width}.4f}",
            "val": f"val {losses['val']:{width}.4f}",
            "bits": f"{bits_per_byte:.3f} bits per byte",
            "anchors": strongest(self.anchors),
            "best": best,
        }, terminal_width()))
        self.log(step, train_loss=losses["train"], val_loss=losses["val"], val_bits_per_byte=bits_per_byte)
        self.say_parting(losses)
        self.picture_is_old = step > 0      # at step 0 it would be a picture of one point
        if time.monotonic() >= self.next_picture:
            self.draw_losses()

    def say_parting(self, losses: dict):
        """Say, once, that train and val have parted since the best evaluation, and what helps."""
        state = self.run.state
        if self.parting_said or not self.log_file or losses["val"] < state.best_val_loss + 0.01:
            return
        train_then = self.train_loss_at_best()
        if train_then is None or losses["train"] > train_then - 0.01:
            return
        if state.tokens < self.run.tokens_per_epoch:        # little of the text was read twice
            return
        self.parting_said = True
        self.label("note", memorizing(self.run.cfg, state, train_then, losses))

    def draw_losses(self):
        """Draw loss.png, if it is not up to date; a run never ends for want of a picture."""
        if not (self.log_file and self.picture_is_old):
            return
        self.picture_is_old = False
        path = self.out_dir / "loss.png"
        began = time.monotonic()
        try:
            plot_run(read_log(self.out_dir / "log.csv"), path, str(self.out_dir),
                     self.run.tokens_per_step, self.run.tokens_per_epoch, in_nats(self.anchors, self.bits_per_byte))
        except ImportError:                     # no matplotlib: the figures are in log.csv
            pass
        except OSError as error:
            self.say(f"could not write {path}: {error.strerror or error}")
        except Exception as error:              # matplotlib raises whatever it likes
            if not self.draws_fail:
                self.warn(f"cannot draw {path}: {why(error)}")
            self.draws_fail = True
        now = time.monotonic()
        self.next_picture = now + (now - began) / PICTURES_SHARE

    def sample(self, step: int, text: str):
        shown = printable_text(text.strip(" \t\r\n"))
        self.say(f"--- sample at step {step}\n{shown}\n---")

    def log(self, step: int, **row):
        """Write a row to log.csv and the other loggers. A full disk costs the row, not the run."""
        if not self.log_file:
            return
        row["tokens"] = self.run.state.tokens
        row["seconds"] = round(self.run.stopwatch.seconds(), 3)
        try:
            self.log_file.write({"step": step, **row})
        except OSError as error:
            self.say(f"could not write log.csv: {error.strerror or error}")
        self.call_loggers(lambda logger: logger.log(step, row))

    # -- the end

    def close(self):
        """Close what `open` opened, with a last picture; may be called again."""
        self.keep_step_line()
        self.draw_losses()
        if self.bar:
            self.bar.close()
        if self.log_file:
            self.log_file.close()
        self.call_loggers(lambda logger: logger.close())
        self.bar = None
        self.log_file = None
        self.loggers = []

    def not_finite(self, error: Exception):
        """Say on stderr what `error` says, what is kept on disk, and what to try."""
        self.close()
        if not self.speaks:
            return
        kept = ""
        if self.writes:
            kept = f"{self.out_dir}/last.pt holds the run as of its last save. "
        print(f"stopped: {error}. {kept}Try a lower --learning_rate, --grad_clip=1.0, more --warmup_iters or "
              "--dtype=float32", file=sys.stderr, flush=True)

    def finish(self, stop, unsaved: dict):
        """Say how the run ended. unsaved: {file: what went wrong in its last save, or ""}."""
        self.close()
        for problem in unsaved.values():
            if problem:
                self.label("unsaved", problem)
        if not self.writes:
            return
        if self.run.state.evaluated == self.run.state.step:
            self.say_done()
        else:
            self.say_stopped(stop)

    def say_stopped(self, stop):
        """The run ended between two evaluations."""
        step = self.run.state.step
        max_iters = self.run.plan.max_iters
        place = f"step {step} of {max_iters}"
        rest = "continues"
        if step == max_iters:
            rest = "runs its last evaluation"
        last = shlex.quote(str(self.out_dir / "last.pt"))
        command = "the same command with --init_from=resume"
        if self.run.ranks.world == 1:           # otherwise torchrun's flags belong to it
            command = f"python train.py --init_from=resume --out_dir={shlex.quote(str(self.out_dir))}"
        self.label("stopped", f"at {place}: {command} {rest}; "
                              f"python sample.py --ckpt={last} samples from the current weights")

    def say_done(self):
        """The run ended after an evaluation, the last of its schedule or of its patience."""
        run = self.run
        state = run.state
        seconds = run.stopwatch.seconds()
        if run.first_step == state.step >= run.plan.max_iters:
            self.label("note", "nothing was left to do: a larger --max_iters trains longer, and the learning rate "
                               "rises again for it")
        self.label("done", f"{state.step:,} steps{self.cut_short()} in {duration(seconds)} of training; "
                           f"best val loss {state.best_val_loss:.4f} at step {state.best_step}")
        bits = (self.best_on_all or state.best_val_loss) * self.bits_per_byte
        if words := judge(bits, self.anchors):
            self.label("compared", words + self.compare_with_expectation(bits))
        self.label("speed", self.describe_speed(state.tokens, seconds))
        self.say_whether_compiling_paid()
        if state.best_step == 0 < state.step:
            self.label("note", "no evaluation was better than that before the first step: ckpt.pt holds the weights "
                               "with which the run began. Fewer steps, lower rates or more text may help")
        elif state.losses.get("val", -math.inf) > state.best_val_loss + 0.01:
            self.label("note", self.why_val_has_risen())
        files = [f"{name} ({purpose})" for name, purpose in PURPOSES.items() if (self.out_dir / name).exists()]
        used = sum((self.out_dir / name).stat().st_size for name in PURPOSES if (self.out_dir / name).exists())
        self.label("files", f"{self.out_dir}/: {', '.join(files)}; {size(used)}")
        if len(run.plan.breakpoints) > 1 or run.cfg.max_minutes:
            if run.plan.resumed_at:
                self.label("repeat", f"not by one command: it was resumed at step {run.plan.resumed_at:,} with other "
                                     "settings")
            else:
                self.say(f"repeat   {self.repeat_command()}")
        self.say(f"next     python sample.py --out_dir={shlex.quote(str(self.out_dir))}")     # whole, to be copied

    def train_loss_at_best(self) -> float | None:
        """The train loss of the best evaluation; None if log.csv does not have it."""
        best_step = self.run.state.best_step
        path = self.out_dir / "log.csv"
        rows = read_log(path) if path.exists() else []
        losses = [row["train_loss"] for row in rows if row["step"] == best_step and "train_loss" in row]
        return losses[-1] if losses else None

    def why_val_has_risen(self) -> str:
        losses = self.run.state.losses
        risen = f"the val loss has risen to {losses['val']:.4f} since then"
        remedies = "try --patience=3, fewer steps, more --dropout, a smaller model or more text"
        train_then = self.train_loss_at_best()
        if train_then is None:
            return (f"{risen}: the model is overfitting, if the train loss has fallen; {remedies}. If the train loss "
                    "has risen, too, lower --learning_rate")
        change = f"{train_then:.4f} -> {losses['train']:.4f}"
        if losses["train"] < train_then:
            return f"{risen}: the model is overfitting (train {change}); {remedies}"
        return f"{risen}, and so has the train loss ({change}): lower --learning_rate"

    def compare_with_expectation(self, bits: float) -> str:
        """What to add about the bits per byte that the plan expected, if there was one."""
        if not self.run.plan.expected:
            return ""
        least, most = self.run.plan.expected
        place = "within"
        if bits < least:
            place = "below"
        elif bits > most:
            place = "above"
        return f"; {place} the {least:.2f} to {most:.2f} that the plan expected"

    def say_whether_compiling_paid(self):
        """Compare the steps of this process with the estimate of uncompiled ones."""
        run = self.run
        steps = run.state.step - run.first_step
        before = self.uncompiled_seconds_per_step
        if not (run.plan.compile and run.compile_seconds and before and steps):
            return
        now = (run.stopwatch.seconds() - self.first_seconds) / steps
        gain = (before - now) * steps - run.compile_seconds
        effect = "saved" if gain > 0 else "cost"
        self.label("compile", f"took {duration(run.compile_seconds)}; steps of {milliseconds(now)} ms instead of about "
                              f"{milliseconds(before)} ms: {effect} about {rough_duration(abs(gain))} in this run")

    def repeat_command(self) -> str:
        """The command that makes the same steps again, whatever the clock says."""
        run = self.run
        plan = run.plan
        decided = {
            "max_iters": plan.max_iters,
            "breakpoints": ",".join(f"{step}:{end}" for step, end in plan.breakpoints),
            "dtype": plan.dtype,
            "compile": plan.compile,
            "eval_interval": plan.eval_interval,
        }
        windows = plan.evaluations["windows"]
        if windows % BATCH == 0:
            decided["eval_iters"] = windows // BATCH
        words = [f"--{name}={value}" for name, value in decided.items()]
        for setting in changed_settings(run.cfg):
            name = setting.partition("=")[0]
            begins_anew = name == "init_from" and run.cfg.init_from in ("scratch", "auto", "resume")
            if name not in decided and name != "max_minutes" and not begins_anew:
                words.append(f"--{setting}")
        return shlex.join(["python", "train.py", *words])

    def cut_short(self) -> str:
        """Of how many steps, if patience ended the run before all of them."""
        max_iters = self.run.plan.max_iters
        if self.run.state.step >= max_iters:
            return ""
        reason = f"patience={self.run.cfg.patience}"
        return f" of {max_iters:,} ({reason})"

    def describe_speed(self, tokens: int, seconds: float) -> str:
        rate = f" at {short(tokens / seconds)} tok/s" if tokens and seconds else ""
        text = f"{short(tokens)} tokens{rate}; whole process {duration(time.monotonic() - self.began)}"
        if peak := peak_memory(self.run.plan.device):
            text += f", {size(peak)} of memory"
        return text
