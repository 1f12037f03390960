"""What a person sees of a run: banner, progress, log.csv, loss.png, TensorBoard and W&B. It changes no weight, no batch
and no random number; ranks other than the first print and write nothing."""

import contextlib
import csv
import io
import math
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

from support import runtime
from support.cli import fail, printable

COLUMNS = ["step", "tokens", "loss", "lr", "norm", "train_loss", "val_loss", "val_bits_per_byte",
           "ms", "tokens_per_second", "seconds"]
TIMINGS = COLUMNS[-3:]                  # what differs between two runs of the same command

# Peak dense bfloat16 or float16 rates in TFLOP/s, from the makers' data sheets, by part of the card's name.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165, "3090": 71,
         "V100": 125}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 1000 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def read_log(path: Path) -> list:
    """The rows of a log.csv as dicts of numbers (empty cells left out). A row that a kill cut short is dropped."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError):
                if row["seconds"]:                      # the last column: without it the row is not whole
                    rows.append({key: float(value) for key, value in row.items() if value})
    return rows


def draw(rows: list, path: Path, title: str, tokens_per_step: int, tokens_per_epoch: int):
    """Loss against steps, epochs and tokens as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="0.75", lw=1, label="batch")
    for name, color in (("train", "tab:blue"), ("val", "tab:orange")):
        axes.plot([row["step"] for row in evaluations], [row[f"{name}_loss"] for row in evaluations], ".-", color=color,
                  label=name)
    if evaluations:
        best = min(evaluations, key=lambda row: row["val_loss"])
        axes.plot(best["step"], best["val_loss"], "*", color="tab:red", ms=14,
                  label=f"best val {best['val_loss']:.4f} at step {best['step']:.0f}")
    axes.set(title=title, xlabel="steps", ylabel="loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    above, below = (axes.secondary_xaxis(place, functions=(lambda s, f=factor: s * f, lambda x, f=factor: x / f))
                    for place, factor in (("top", tokens_per_step), (-0.15, tokens_per_step / tokens_per_epoch)))
    above.set_xlabel("tokens seen")
    below.set_xlabel("epochs")
    above.xaxis.set_major_formatter(lambda tokens, _: short(tokens) if tokens >= 1 else "0")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with runtime.written(path) as file:
        file.write(image.getvalue())


class Report:
    """The run's face and its stopwatch, which stands still while `paused()`."""

    def __init__(self, cfg, out_dir: Path, first: bool, model, meta: dict, state: dict, device: str, compile_note: str):
        self.cfg, self.out_dir, self.first, self.state, self.device = cfg, out_dir, first, state, device
        self.writes = first and not cfg.eval_only
        self.tokens_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size
        self.tokens_per_epoch = meta["splits"]["train"]["tokens"] // cfg.block_size * cfg.block_size
        val = meta["splits"]["val"]
        self.to_bits_per_byte = val["tokens"] / max(1, val["bytes"]) / math.log(2)
        self.first_step = self.last_step = state["step"]
        self.bar, self.loggers, self.closers = None, [], []
        self.before, self.running_since = state["seconds"], time.perf_counter()
        self.stood_still = 0.0          # seconds of evaluations, saves and samples since the start
        self.last_seconds = self.before
        if not first:
            return
        self.flops_per_token, self.peak = self.flops(model), self.peak_flops()
        if self.writes:
            self.open_log()
            self.open_loggers()
        self.banner(model, meta, compile_note)
        if sys.stdout.isatty() and not cfg.eval_only:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=cfg.max_iters, initial=self.first_step, unit="step", dynamic_ncols=True,
                                leave=False)

    # -- time

    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of the run included; evaluation and saving are not training."""
        return self.before + (time.perf_counter() - self.running_since if self.running_since else 0)

    @contextlib.contextmanager
    def paused(self):
        runtime.wait(self.device)
        self.before, self.running_since = self.seconds(), None
        start = time.perf_counter()
        try:
            yield
        finally:
            self.running_since = time.perf_counter()
            self.stood_still += self.running_since - start

    # -- lines

    def say(self, line: str):
        if self.first:
            if self.bar:
                self.bar.write(line)
            else:
                print(line, flush=True)

    def banner(self, model, meta: dict, compile_note: str):
        import torch

        cfg, splits = self.cfg, meta["splits"]
        parameters = sum(p.numel() for p in model.parameters())
        kind = torch.device(self.device).type
        name = torch.cuda.get_device_name(self.device) if kind == "cuda" else f"{torch.get_num_threads()} threads" \
            if kind == "cpu" else ""
        per_epoch = self.tokens_per_epoch / self.tokens_per_step
        changed = [f"{f.name}={getattr(cfg, f.name)}" for f in fields(cfg)
                   if getattr(cfg, f.name) not in (f.default, runtime.OPEN)
                   and f.name not in ("out_dir", "dtype", "compile")]
        self.say(f"data     {cfg.dataset}: {splits['train']['tokens']:,} train and {splits['val']['tokens']:,} val "
                 f"tokens, vocabulary {meta['vocab_size']:,}")
        self.say(f"model    {short(parameters)} parameters ({parameters:,}): {cfg.n_layer} layers, {cfg.n_head} heads, "
                 f"{cfg.n_embd} wide, context {cfg.block_size}")
        self.say(f"machine  {self.device}{', ' + name if name else ''}; {cfg.dtype}; compile {compile_note}")
        first = f"; the first loss should be near ln {meta['vocab_size']} = {math.log(meta['vocab_size']):.3f}"
        count = f"{cfg.max_iters:,}" if cfg.max_iters < runtime.OPEN else f"as many as {cfg.max_minutes:g} min allow,"
        self.say(f"steps    {count} of {self.tokens_per_step:,} tokens, {per_epoch:.1f} to an epoch"
                 f"{first if cfg.init_from == 'scratch' else ''}")
        if changed:
            self.say(f"settings {printable(', '.join(changed))} (the rest as --help says)")
        if self.writes:
            going_on = f", going on at step {self.first_step:,}" if self.first_step else ""
            self.say(f"writes   {self.out_dir}/{going_on}")

    def flops(self, model) -> float:
        """Floating-point operations of training on one token: 6 for each weight of a matrix product, and attention's
        (PaLM's count, arXiv 2204.02311, appendix B)."""
        matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) + model.head.weight.numel()
        return 6 * matrices + 12 * self.cfg.n_layer * self.cfg.block_size * self.cfg.n_embd

    def peak_flops(self) -> float:
        """The device's peak rate, where it is known; else 0."""
        import torch

        if torch.device(self.device).type != "cuda" or self.cfg.dtype == "float32":
            return 0
        words = re.findall(r"\w+", torch.cuda.get_device_name(self.device))
        return next((rate * 1e12 for card, rate in PEAKS.items() if card in words), 0) * runtime.Ranks().world

    def place(self, step: int) -> str:
        """`step/max_iters`, as wide at every step."""
        count = str(self.cfg.max_iters) if self.cfg.max_iters < runtime.OPEN else "?"
        return f"{step:{len(count)}}/{count}"

    def update(self, step: int, loss: float, norm: float, lr: float):
        """A line for update number `step`."""
        if not self.first:
            return
        seconds = self.seconds()
        each = max(1e-9, (seconds - self.last_seconds) / max(1, step - self.last_step))
        rate = self.tokens_per_step / each
        self.last_seconds, self.last_step = seconds, step
        mfu = f" | {100 * rate * self.flops_per_token / self.peak:.0f}% MFU" if self.peak else ""
        left = duration(each * (self.cfg.max_iters - step)) if self.cfg.max_iters < runtime.OPEN else "?"
        line = (f"loss {loss:.3f} | lr {lr:.1e} | norm {norm:.2f} | {1000 * each:3.0f} ms | {short(rate)} tok/s{mfu}")
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(line)
        else:
            self.say(f"step {self.place(step)} | {line} | {left} left")
        self.log(step, loss=loss, norm=norm, lr=lr, ms=1000 * each, tokens_per_second=rate)

    def evaluation(self, step: int, losses: dict, best: bool):
        if not self.first:
            return
        bits = losses["val"] * self.to_bits_per_byte
        note = "best so far" if best else f"best {self.state['best_val_loss']:.4f} at step {self.state['best_step']}"
        self.say(f"eval {self.place(step)} | train {losses['train']:.4f} | val {losses['val']:.4f} | "
                 f"{bits:.3f} bits per byte | {note}")
        self.log(step, train_loss=losses["train"], val_loss=losses["val"], val_bits_per_byte=bits)
        if self.writes:
            try:
                draw(read_log(self.out_dir / "log.csv"), self.out_dir / "loss.png",
                     f"{self.out_dir}", self.tokens_per_step, self.tokens_per_epoch)
            except ImportError:
                pass                    # the table is there all the same
            except OSError as error:
                self.say(f"could not write {self.out_dir / 'loss.png'}: {error.strerror or error}")

    def sample(self, step: int, text: str):
        if self.first:
            text = "\n".join(printable(line) for line in text.strip().split("\n"))
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
            with runtime.written(path) as file:
                file.write(text.getvalue().encode())
            self.file = open(path, "a", newline="", encoding="utf-8")   # noqa: SIM115, open for the whole run
        except OSError as error:
            fail(f"cannot write {path}: {error.strerror or error}")

    def open_loggers(self):
        cfg = self.cfg
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("tensorboard=True needs the package: pip install tensorboard")
            board = SummaryWriter(str(self.out_dir))
            self.loggers.append(lambda step, row: [board.add_scalar(key, value, step) for key, value in row.items()])
            self.closers.append(board.close)
        if cfg.wandb_log:
            try:
                import wandb
            except ImportError:
                fail("wandb_log=True needs the package: pip install wandb")
            run = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or self.out_dir.name, config=vars(cfg))
            self.loggers.append(lambda step, row: run.log(row, step=step))
            self.closers.append(run.finish)

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

    # -- the end

    def not_finite(self, step: int) -> int:
        """Say that update number `step` was stopped; returns the exit code."""
        self.close()
        if self.first:
            late = "" if self.device == "cpu" else f" (seen there; it may be up to {self.cfg.log_interval} steps older)"
            print(f"stopped: the loss or gradient of step {step}{late} is not finite; no update was made with it. "
                  f"{self.out_dir}/last.pt "
                  "holds the run as it was at its last save. Try a lower --learning_rate, --grad_clip=1.0, more "
                  "--warmup_iters or --dtype=float32", file=sys.stderr, flush=True)
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
            self.say(f"unsaved  {problem}")
        code = stop.exit_code if stop.signal else 4 if problems else 0
        if not self.writes:
            return code
        cfg, state = self.cfg, self.state
        if stop.signal:
            self.say(f"stopped  at step {state['step']} of {cfg.max_iters}: the same command with --init_from=resume "
                     f"goes on; python sample.py --ckpt={self.out_dir / 'last.pt'} samples from the weights of now")
            return code
        why = f"patience={cfg.patience}" if not stop.asked else f"max_minutes={cfg.max_minutes:g} are over: " \
            "--init_from=resume goes on"
        early = f" of {cfg.max_iters:,} ({why})" if state["step"] < cfg.max_iters else ""
        self.say(f"done     {state['step']:,} steps{early} in {duration(self.seconds())} of training; best val loss "
                 f"{state['best_val_loss']:.4f} at step {state['best_step']}")
        if state["losses"] and state["losses"]["val"] > state["best_val_loss"] + 0.01:
            self.say(f"note     the val loss has risen to {state['losses']['val']:.4f} since: the model learns its "
                     "training text by heart. Try --patience=3, fewer steps, more --dropout or a smaller model")
        purposes = {"ckpt.pt": "best weights", "last.pt": "to go on", "log.csv": "figures", "loss.png": "picture"}
        there = [f"{name} ({purpose})" for name, purpose in purposes.items() if (self.out_dir / name).exists()]
        self.say(f"files    {self.out_dir}/: {', '.join(there)}")
        self.say(f"next     python sample.py --out_dir={self.out_dir}")
        return code
