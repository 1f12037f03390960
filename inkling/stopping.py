"""What ends a run early: signals, non-finite numbers, running out of memory, lost processes."""

import contextlib
import os
import signal
from pathlib import Path

import torch

from inkling.cli import UserError
from inkling.device import device_type
from inkling.distributed import Ranks

SIGHUP = getattr(signal, "SIGHUP", None)        # the terminal is gone; Windows has none
# The signals that end a run, the most important first.
SIGNALS = [number for number in (signal.SIGTERM, SIGHUP, signal.SIGINT) if number is not None]


class NotFinite(Exception):
    """A loss, or a gradient, that is not a finite number. The message says which, and of which
    step."""


class Guard:
    """Keeps losses and gradients that are not finite out of the weights, on every rank at the same
    step.

    On a GPU the verdict stays on the device, as the optimizers' `found_inf`, which turns this
    update and all later ones into no-ops; the host reads it in `verify`, since reading it earlier
    would hold up the next step.
    """

    def __init__(self, ranks: Ranks, optimizers: list, scaler, device: str, dtype: str):
        self.ranks = ranks
        self.optimizers = optimizers
        self.scaler = scaler
        self.has_scaler = dtype == "float16"
        # float16's GradScaler reads from the device at every step anyway; only fused AdamW and ours
        # know found_inf.
        self.immediate = self.has_scaler or device_type(device) != "cuda"
        self.found_inf = torch.zeros((), device=device)

    def check(self, loss, norm, step: int) -> bool:
        """Whether to apply the update with this loss and gradient norm (0-d tensors). False:
        float16 gradients have overflowed, which is normal: the GradScaler lowers its scale, and
        every optimizer skips this step.

        Raises NotFinite, or on a GPU makes the update a no-op and lets `verify` raise it."""
        norm_is_finite = torch.isfinite(norm)
        # A scale below 1 means that halving it did not help: then it is no overflow.
        may_overflow = self.has_scaler and self.scaler.get_scale() >= 1
        finite = torch.isfinite(loss) & (norm_is_finite | may_overflow)
        bad_ranks = self.ranks.all_reduce(1 - finite.to(self.found_inf.dtype))
        self.found_inf = torch.maximum(self.found_inf, bad_ranks.clamp(max=1))
        if not self.immediate:
            for optimizer in self.optimizers:
                optimizer.found_inf = self.found_inf
            return True
        self.verify(step)
        return not self.has_scaler or norm_is_finite.item()

    def verify(self, step: int):
        """Read the verdict of all updates so far from the device; `step` is the last one's number.
        Raises NotFinite."""
        if self.found_inf.item() > 0:
            late = "" if self.immediate else ", or of a step shortly before it,"
            raise NotFinite(f"the loss or gradient of step {step}{late} is not finite; its update was not applied")


class Stop:
    """A request to stop after the step in progress: SIGINT, SIGTERM or SIGHUP. A second SIGINT stops
    at once. A signal that was ignored before is no request, as SIGHUP under
    nohup.

    asked: whether this process has noticed a reason. agreed: whether all processes have agreed on
    it. Several processes do so about once a second.
    """

    def __init__(self):
        self.signal = 0
        self.interrupts = 0                             # SIGINTs that this process has received
        self.agreed = False
        self.handlers_before = {}

    def __enter__(self):
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue                                # SIGHUP under nohup, SIGINT in the background
            with contextlib.suppress(ValueError):       # not the main thread, when used as a library
                self.handlers_before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1:
                os._exit(130)           # every file on the disk is whole at every moment
        self.signal = number

    @property
    def asked(self) -> bool:
        return self.signal != 0

    def agree(self, ranks: Ranks):
        """Take over the reasons of all ranks, so that all stop at the same step and with the same
        exit code. All ranks must call it."""
        received = [self.signal == number for number in SIGNALS]
        if ranks.world > 1:
            counts = torch.tensor(received, dtype=torch.float32, device=ranks.device)
            received = [count > 0 for count in ranks.all_reduce(counts).tolist()]
        if any(received):               # the same one on all ranks
            self.signal = SIGNALS[received.index(True)]
        self.agreed = any(received)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended; 0 without one."""
        return 128 + self.signal if self.signal else 0


@contextlib.contextmanager
def explain_failures(out_dir: Path):
    """Turn a lack of memory, and the loss of another process, into a UserError of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error).strip() or "MemoryError"
        reason = text.splitlines()[0][:120]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            kept = ""
            if os.path.exists(out_dir / "last.pt"):
                kept = f"; what {out_dir} holds is kept, and --init_from=resume resumes from it"
            raise UserError("out of memory: halve batch_size and double gradient_accumulation_steps (the same "
                            f"training), or lower block_size{kept} ({reason})")
        if isinstance(error, torch.distributed.DistError) or "Connection " in text:
            kept = ""
            if os.path.exists(out_dir / "last.pt"):
                kept = f": {out_dir}/last.pt holds the last save, and --init_from=resume resumes from it"
            raise UserError(f"another process of this run is gone{kept} ({reason})", code=1)
        raise
