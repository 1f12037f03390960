"""Device, precision and compiling: what is chosen, and why."""

import contextlib
import copy
import math
import os
import shutil
import sys
import time

import torch

from inkling import compile_cost
from inkling.cli import UserError


def device_type(device: str) -> str:
    """cuda of cuda:1."""
    return torch.device(device).type


def synchronize(device: str):
    """Wait until the device has done what it was asked to do."""
    kind = device_type(device)
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def first_line(error: Exception) -> str:
    """What an exception says, in one short line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# -- device ------------------------------------------------------------------------------------------------------------

def choose_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, whichever is there first; a named device is checked. Raises
    UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, is_there in available.items() if is_there)
    try:
        kind = device_type(device)
        if kind == "meta" or not available.get(kind, True):
            raise UserError(f"device={device}: PyTorch sees no {kind} device here; use --device=auto")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:    # all that PyTorch raises for other devices
        reason = first_line(error)
        if reason.startswith("Expected one of"):        # a list of the twenty kinds that PyTorch knows
            reason = "no such device"
        raise UserError(f"device={device}: {reason}; use auto, cpu, cuda, cuda:N or mps")
    return device


def compare_with_cpu(model, x, y, device: str):
    """Warn when loss or gradient norm of a batch differ from the CPU's by more than a thousandth:
    back ends other than CUDA had operations that were silently wrong. The weights compared are a
    copy with noise, since many start at 0."""
    reference = copy.deepcopy(model).float().to("cpu").train(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    candidate = copy.deepcopy(reference).to(device)
    loss, norm = loss_and_norm(candidate, x, y, device)
    cpu_loss, cpu_norm = loss_and_norm(reference, x, y, "cpu")
    if not (math.isclose(loss, cpu_loss, rel_tol=0.001) and math.isclose(norm, cpu_norm, rel_tol=0.001)):
        print(f"warning  {device} computes something wrong: loss {loss:.4f} and gradient norm {norm:.4f} of one batch, "
              f"where the CPU has {cpu_loss:.4f} and {cpu_norm:.4f}; --device=cpu is right, and slower", flush=True)


def loss_and_norm(model, x, y, device: str) -> tuple:
    """Loss and gradient norm of the first four windows of a batch."""
    loss = model(x[:4].to(device), y[:4].to(device))[1]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item(), norm.item()


# -- precision ---------------------------------------------------------------------------------------------------------

def choose_dtype(device: str, dtype: str) -> str:
    """`auto` becomes bfloat16 (on older NVIDIA cards float16) where a matrix product is really
    faster with it: some processors and cards accept it and emulate it. Takes less than a tenth of a second."""
    if dtype != "auto":
        return dtype
    kind = device_type(device)
    if kind == "mps":
        return "float32"                # autocast on MPS gains little and has known errors
    half = "bfloat16"
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = "float16"                # with a GradScaler
    # A small product shows what is emulated: large ones take up to a hundred times as long then, seconds in all.
    for size, most in ((128, 3), (512, 0.7)):
        if matmul_seconds(device, getattr(torch, half), size) > most * matmul_seconds(device, torch.float32, size):
            return "float32"
    return half


def matmul_seconds(device: str, dtype: torch.dtype, size: int) -> float:
    """The fastest of six times that four products of `size` x `size` matrices take."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(6):                  # the first ones warm up
        began = time.perf_counter()
        for _ in range(4):
            b = a @ a
        b[0, 0].item()                  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def autocast(device: str, dtype: str):
    """A context in which matrix products run in `dtype`, while weights and sums stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type(device), dtype=getattr(torch, dtype))


# -- compiling ---------------------------------------------------------------------------------------------------------

def compiler_missing(device: str) -> str:
    """Why torch.compile cannot work here, or an empty text."""
    kind = device_type(device)
    if kind == "cpu":
        compilers = map(shutil.which, ("g++", "clang++", "cl"))
        return "" if os.environ.get("CXX") or any(compilers) else "there is no C++ compiler"
    if kind == "cuda":
        try:
            import triton  # noqa: F401, brought by PyTorch's CUDA builds
        except ImportError:
            return "triton is not installed"
        return ""
    return f"it is not ready for {kind}"


def seconds_of_a_pass(forward_backward, windows: int, ranks) -> float:
    """About how long a forward and backward pass over `windows` windows takes, the same on all ranks.
    forward_backward(windows=N): does one over N of them.

    One window is tried first. Unless that takes long already, as many are tried then as should take a
    second or two, and the time of all follows from those of one and of several: a part of it is the same
    for any number. Of two tries the shorter counts, since the first warms up; of one that takes 5 seconds, too:
    on a busy machine the first may take twenty times as long as the others."""
    def seconds_of(count: int) -> float:
        began = time.perf_counter()
        forward_backward(windows=count)
        synchronize(ranks.device)
        return ranks.broadcast(time.perf_counter() - began)         # so that all ranks do the same passes

    of_one = seconds_of(1)
    if windows == 1 or of_one > 30:
        return of_one * windows
    of_one = min(of_one, seconds_of(1))
    if of_one > 5:
        return of_one * windows
    several = min(windows, max(2, int(2 / max(1e-3, of_one))))
    of_several = seconds_of(several)
    if of_several < 1:
        of_several = min(of_several, seconds_of(several))
    of_several = min(of_several, several * of_one)          # more, and something else held the machine up
    of_each_more = max(0.0, of_several - of_one) / (several - 1)
    return of_several + of_each_more * (windows - several)


def compile_pays(seconds_left: float, compile_seconds: float, ranks) -> bool:
    """Resolve compile=auto, the same on all ranks: whether torch.compile saves more of the seconds
    that the run would still take uncompiled than the `compile_seconds` that it takes itself."""
    if compiler_missing(ranks.device):
        return ranks.broadcast(False)
    return ranks.broadcast(compile_cost.pays(seconds_left, compile_seconds))


def compile_model(model, forward_backward, device: str) -> tuple:
    """(model to train with, whether it is compiled, a note for the banner). The compiled model runs
    once, forward_backward(model), so that a failure shows before training; then the uncompiled
    model is returned."""
    if why := compiler_missing(device):
        return model, False, f"off: {why}"
    began = time.perf_counter()
    try:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())    # the compiler, too
        compiled = torch.compile(model, dynamic=False)
        forward_backward(compiled)
        synchronize(device)
    except Exception as error:          # a failure to compile, whatever it is, must not end a run
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        return model, False, f"failed, so it trains without ({type(error).__name__}: {first_line(error)})"
    return compiled, True, f"on, took {time.perf_counter() - began:.0f} s"


def compile_function(function, **how):
    """`function`, compiled when it is called. If that fails, it continues uncompiled and says so on stderr.
    how: what else to tell torch.compile."""
    current = torch.compile(function, dynamic=False, **how)

    def call(*arguments):
        nonlocal current
        try:
            return current(*arguments)
        except Exception as error:      # a failure to compile, whatever it is, must not end a run or a text
            if current is function:
                raise
            current = function
            print(f"not compiled: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        return function(*arguments)
    return call


def compile_step(step, device: str):
    """`step(ids, cache)`, which generates one token, compiled: the computation is small, and the
    way to it through Python takes most of the time. On an NVIDIA card it is replayed as a CUDA
    graph."""
    if device_type(device) != "cuda":
        return compile_function(step, options={"cpp_wrapper": True})
    compiled = compile_function(step, mode="reduce-overhead")

    def run_step(ids, cache):
        mark_static(cache)
        return compiled(ids, cache)
    return run_step


def mark_static(cache):
    """Tell CUDA graphs that the cache's tensors stay where they are, or no graph may write to them
    (as transformers does for its static caches)."""
    for tensor in cache.tensors():
        if not getattr(tensor, "_dynamo_static_input_type", None):
            torch._dynamo.mark_static_address(tensor, guard=False)
