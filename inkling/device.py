"""Device, precision, compiling: what is chosen, and why."""

import contextlib
import copy
import os
import shutil
import sys
import time
from itertools import chain

import torch

from inkling.cli import UserError


def choose_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, whichever is there first; a named device is checked."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "meta": False}
    if device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    try:
        kind = torch.device(device).type
        if not have.get(kind, True):
            raise UserError(f"device={device}: PyTorch sees no {kind} device here; use --device=auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:    # all that PyTorch raises of other devices
        reason = str(error).splitlines()[0]             # PyTorch lists twenty kinds where it knows none
        raise UserError(f"device={device}: {'no such device' if reason.startswith('Expected one of') else reason}; "
             "use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_dtype(device: str, dtype: str) -> str:
    """`auto` becomes bfloat16 (on older NVIDIA cards float16) where a matrix product really is faster with it: some
    processors and cards accept it and emulate it. Takes a few milliseconds."""
    if dtype != "auto":
        return dtype
    kind = torch.device(device).type
    if kind == "mps":
        return "float32"                # autocast on MPS gains little and has known errors
    half = "bfloat16"
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = "float16"                # with a GradScaler

    def seconds(kind_of_number) -> float:
        a = torch.ones(512, 512, device=device, dtype=kind_of_number)
        fastest = float("inf")
        for _ in range(6):              # the first ones warm up
            start = time.perf_counter()
            for _ in range(4):
                b = a @ a
            b[0, 0].item()              # waits for the device
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    return half if seconds(getattr(torch, half)) < 0.7 * seconds(torch.float32) else "float32"


def autocast(device: str, dtype: str):
    """A context in which matrix products run in `dtype`, while weights and sums stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def synchronize(device: str):
    """Until the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
COMPILE_PAYS_AFTER = 100        # seconds of eager training left; compiling takes 20-75 s the first time, later about
                                # 4, and saves a fifth to a half of a step of the recipe's models


def compiler_missing(device: str) -> str:
    """Why torch.compile cannot work here, or ""."""
    kind = device.split(":")[0]
    if kind == "cpu" and not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "cl")))):
        return "there is no C++ compiler"
    if kind == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return "" if kind in ("cpu", "cuda") else f"it is not ready for {kind}"


def compile_pays(choice, model, run_once, passes: int, device: str, ranks, deadline) -> bool:
    """Resolve compile=auto, for all ranks: whether torch.compile would pay over `passes` forward and backward passes,
    or as many as end before the deadline. `run_once(model)` is one of them, of which nothing remains."""
    if choice != "auto" or passes <= 0:
        return choice is True and passes > 0
    if ranks.tell(compiler_missing(device)):
        return False
    times = []
    for _ in range(3):              # the first ones warm up
        start = time.perf_counter()
        run_once(model)
        synchronize(device)
        times.append(ranks.tell(time.perf_counter() - start))       # several must all go on, or all stop
        if times[-1] * passes > 10 * COMPILE_PAYS_AFTER:
            break
    return ranks.tell(min(min(times) * passes, deadline.left()) > COMPILE_PAYS_AFTER)


def compile_model(wanted: bool, model, run_once, device: str):
    """Compile `model` and run it once, so that a failure shows before the run. Returns (what to train with, whether it
    is compiled, a note for the banner)."""
    if not wanted:
        return model, False, "off"
    if why := compiler_missing(device):
        return model, False, f"off: {why}"
    start = time.perf_counter()
    try:
        compiled = torch.compile(model, dynamic=False)
        run_once(compiled)
        synchronize(device)
    except Exception as error:      # a failure to compile, whatever it is, must not end a run
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return model, False, f"failed, so it trains without ({type(error).__name__}: {reason})"
    return compiled, True, f"on, took {time.perf_counter() - start:.0f} s"


def compile_step(step, device: str):
    """`step` compiled for shapes that stay the same: what generates one token after another is a small matter for a
    processor, and the way there from Python most of its time. Replayed as a CUDA graph on an NVIDIA card. Where
    compiling fails, which shows at the first call, it goes on uncompiled and says so on stderr."""
    cuda = torch.device(device).type == "cuda"
    how = dict(mode="reduce-overhead") if cuda else dict(options={"cpp_wrapper": True})
    chosen = torch.compile(step, dynamic=False, **how)

    def run(idx, cache, at):
        nonlocal chosen
        if cuda and not getattr(cache.tensors[0][0], "_dynamo_static_input_type", None):
            for tensor in chain(*cache.tensors):        # or no graph may write to them (as in transformers' caches)
                torch._dynamo.mark_static_address(tensor, guard=False)
        try:
            return chosen(idx, cache, at)
        except Exception as error:      # a failure to compile, whatever it is, must not end a text
            if chosen is step:
                raise
            chosen, reason = step, (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            print(f"not compiled: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        return run(idx, cache, at)
    return run


def compare_with_cpu(model, x, y, device: str):
    """Warn when loss or gradient norm of a batch differ from the CPU's by more than a thousandth: back ends other than
    CUDA had operations that were silently wrong. The weights compared are a copy with noise, since many start at 0."""
    reference = copy.deepcopy(model).float().to("cpu").train(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    figures = []
    for candidate, place in ((copy.deepcopy(reference).to(device), device), (reference, "cpu")):
        loss = candidate(x[:4].to(place), y[:4].to(place))[1]           # four windows
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in candidate.parameters() if p.grad is not None])
        figures.append((loss.item(), norm.item()))
    here, cpu = figures
    if not all(abs(a - b) <= 0.001 * abs(b) for a, b in zip(here, cpu, strict=True)):
        print(f"warning  {device} computes something wrong: loss {here[0]:.4f} and gradient norm {here[1]:.4f} of one "
              f"batch, where the CPU has {cpu[0]:.4f} and {cpu[1]:.4f}; --device=cpu is right, and slower", flush=True)
