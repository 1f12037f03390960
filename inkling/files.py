"""Files that are whole or not there: atomic writing, checksums, the lock of a folder."""

import contextlib
import hashlib
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from inkling.cli import UserError

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:                     # everything else
    msvcrt = None

ROOT = Path(__file__).resolve().parent.parent


def sync_folder(folder: Path):
    """Make a rename in `folder` durable. Windows offers no handle on a folder and needs none."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file that takes `path`'s place only when the block ends well: written beside it, flushed to the disk,
    renamed. On any error the old file stays as it is and nothing else is left. One writer at a time."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder: Path, wait: bool = False):
    """Hold `folder` for this process, or fail naming the process that does (wait: until it lets go). The lock dies
    with its process, however it ends. Returns the open file; keep it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")     # noqa: SIM115, held open on purpose
    except OSError as error:
        raise UserError(f"cannot use the folder {folder}: {error.strerror or error}: name another")
    told = False
    while True:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                file.seek(1 << 20)      # a byte past the text, so that others can still read who holds it
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            break
        except OSError as error:
            if fcntl and not isinstance(error, BlockingIOError):
                break                   # a file system that knows no locks
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise UserError(f"{folder} is in use by {holder}: wait for it, or give another --out_dir")
            if not told:
                print(f"waiting  for {holder}, which uses {folder}", flush=True)
            told = True
            time.sleep(0.2)
    with contextlib.suppress(OSError):          # a full disk: the folder is held all the same
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
    return file


class Progress:
    """How much of `total` bytes is done and how long the rest takes, on stderr: one line that is redrawn on a
    terminal, elsewhere a line every half minute. Nothing for what takes less than two seconds."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.done = what, total, 0
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + (2 if self.terminal else 30)

    def advance(self, count: int):
        self.done += count
        if (now := time.monotonic()) < self.next:
            return
        self.next = now + (0.2 if self.terminal else 30)
        rate = self.done / (now - self.start)
        left = f", {max(0, self.total - self.done) / rate:,.0f} s left" if self.total and rate else ""
        of = f" of {self.total / 1e6:,.0f}" if self.total else ""
        line = f"{self.what} {self.done / 1e6:,.0f}{of} MB, {rate / 1e6:,.1f} MB/s{left}"
        print(*(("\r", f"{line:<78}") if self.terminal else (line, "\n")), sep="", end="", file=sys.stderr, flush=True)

    def end(self):
        if self.terminal and self.next > self.start + 2:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)


@contextmanager
def hold_folder(folder: Path):
    """Hold a set's folder: another process that prepares the same set waits. A folder that stays empty goes again."""
    held = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        held.close()
        if os.listdir(folder) == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)
