"""What compiling a model costs: an expectation, or what it took the last time on this machine.

The memory is one file beside the compiler's own cache, so that the two vanish together.
"""

import contextlib
import getpass
import hashlib
import json
import os
import tempfile
from pathlib import Path

from inkling.files import atomic_write

# On two cores, of the models in config/ (bench/RESULTS.md): before the first step, and in it for the optimizer.
EXPECTED_SECONDS = 75
# When the compiler finds all in its cache: 4 s of 73 (a default model, avx512_bf16), 10 of 78 (shakespeare_char, AVX2).
SHARE_WHEN_CACHED = 0.15
# Steps of an uncompiled run to those of a compiled one, in the same time.
EXPECTED_GAIN = 1.4


def memory_path() -> Path:
    """The file that remembers. Where the compiler's cache is, PyTorch documents under
    TORCHINDUCTOR_CACHE_DIR; asking it would import the compiler."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        folder = Path(tempfile.gettempdir(), "torchinductor_" + getpass.getuser())
    return Path(folder, "inkling_compile_seconds.json")


def key_of(*what) -> str:
    """The name under which the cost of compiling is remembered: `what` is everything that the compiled
    code depends on."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def read_memory() -> dict:
    """{key: [seconds, whether the compiler's cache held it already]}; empty if there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError, KeyError):     # getpass: a KeyError of a user without a name
        memory = json.loads(memory_path().read_text(encoding="utf-8"))
        if isinstance(memory, dict):
            return memory
    return {}


def expected_seconds(key: str) -> float:
    """How long compiling will take."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        seconds, was_cached = read_memory()[key]
        return float(seconds) * (1 if was_cached else SHARE_WHEN_CACHED)
    return EXPECTED_SECONDS


def remember(key: str, seconds: float):
    """Remember that compiling took so long. What cannot be written is not remembered."""
    memory = read_memory()
    memory[key] = [round(seconds, 1), key in memory]
    with contextlib.suppress(OSError, KeyError):
        path = memory_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, path.with_name(f"{path.name}.{os.getpid()}.tmp")) as file:
            file.write(json.dumps(memory).encode())


def pays(seconds_left: float, compile_seconds: float) -> bool:
    """Whether a run makes more steps in the time that its uncompiled steps would take if it spends a part
    of it on compiling."""
    return compile_seconds < seconds_left * (1 - 1 / EXPECTED_GAIN)     # of an infinite time, too
