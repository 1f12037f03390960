"""Files that are complete or absent: atomic writing, checksums, and the lock of a folder."""

import contextlib
import errno
import hashlib
import os
import re
import time
import weakref
from pathlib import Path

import filelock

from inkling.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
LOCK = ".lock"                          # in every folder that a process may hold; empty
HOLDER = ".lock_holder"                 # names the process that holds the lock
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without locks answers


# -- writing ---------------------------------------------------------------------------------------

def sync_folder(folder: Path):
    """Make a rename in `folder` durable. Windows offers no handle on a folder and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path, temporary: Path | None = None):
    """A binary file that takes the place of `path` only when the block succeeds: it is written
    beside it (as `temporary`, or under the name with .tmp), flushed to the disk and renamed. After
    any error the old file is unchanged and nothing else is left. One writer at a time."""
    path = Path(path)
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the lock of a folder --------------------------------------------------------------------------

class FolderLock:
    """A folder that this process holds until `close()` or its end, however that comes. Forked
    children do not share it."""

    def __init__(self, lock: filelock.BaseFileLock, holder_file: Path):
        self.close = weakref.finalize(self, release_folder, lock, holder_file, os.getpid())


def release_folder(lock: filelock.BaseFileLock, holder_file: Path, pid: int):
    if os.getpid() != pid:              # a forked child ends; its parent still holds the folder
        return
    with contextlib.suppress(OSError):
        holder_file.unlink()
    lock.release()


def lock_folder(folder: Path, wait: bool = False) -> FolderLock:
    """Hold `folder` for this process, and create it if need be. If another process holds it, raise
    a UserError that names that process or, with wait=True, wait until it lets go. The lock dies
    with its process. Where the file system has no locks, a note says so, and nothing is held."""
    lock = filelock.FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    announced = False
    while not try_lock(lock, folder):
        holder = read_holder(folder / HOLDER)
        if not wait:
            raise UserError(f"{folder} is in use by {holder}: wait for it, or give another --out_dir")
        if not announced:
            print(f"waiting  for {holder}, which uses {folder}", flush=True)
        announced = True
    holder_file = (folder / HOLDER).absolute()
    write_holder(holder_file)
    return FolderLock(lock, holder_file)


def try_lock(lock: filelock.BaseFileLock, folder: Path) -> bool:
    """Whether this process may use `folder` now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)       # whoever has just taken it needs a moment to write its name
    except filelock.Timeout:
        return False
    except FileNotFoundError:           # its last holder has just removed the empty folder
        return try_lock(lock, folder)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise UserError(f"cannot use the folder {folder}: {error.strerror or error}: name another")
        print(f"note     {folder} lies on a file system without locks: let no second process use it "
              "meanwhile", flush=True)
    return True


def write_holder(path: Path):
    name = f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with contextlib.suppress(OSError):      # a full disk: the folder is held all the same
        path.write_text(name, encoding="utf-8")


def read_holder(path: Path) -> str:
    """The name of the process that holds a lock. A process that was killed leaves its name behind,
    so the name counts only while that process lives."""
    try:
        name = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "another process"
    pid = re.match(r"process (\d+), started ", name)
    if pid and is_running(int(pid[1])):
        return name.strip()
    return "another process"


def is_running(pid: int) -> bool:
    """Whether this machine runs that process. Always True on Windows, where this would be a real
    signal."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def hold_folder(folder: Path):
    """Hold the folder of a data set: another process that prepares the same set waits. A folder
    that is still empty at the end is removed."""
    lock = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        unused = {path.name for path in folder.iterdir()} <= {LOCK, HOLDER}
        if unused:
            with contextlib.suppress(OSError):      # Windows removes it when the lock is closed
                (folder / LOCK).unlink()
        lock.close()
        if unused:
            with contextlib.suppress(OSError):      # another process has taken the folder
                folder.rmdir()
