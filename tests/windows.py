"""As much of Windows as can be put over another system, for a child that is to run a program: modules and names that
only POSIX has are hidden, locks are as Windows has them, open files can be neither renamed nor removed, folders not
opened."""

import importlib
import mmap
import os
import shutil
import signal
import sys
import types

import filelock

MODULES = ["fcntl", "resource", "termios", "tty", "pty", "readline", "pwd", "grp", "curses", "syslog", "posix"]
OURS = ("train", "sample", "prepare", "convert", "inkling")
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
OS = """chown chroot confstr ctermid fchdir fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid getgid
    getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid getxattr initgroups killpg lchown lockf
    major makedev memfd_create minor mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate
    posix_spawn pread preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield
    sendfile seteuid setgid setpgid setpriority setsid setuid statvfs sync sysconf tcgetpgrp uname wait wait3 wait4
    waitid writev WNOHANG WUNTRACED O_ACCMODE O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY
    O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE"""
SIGNAL = "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait"
NAMES = {
    os: OS.split(),
    signal: SIGNAL.split() + [name for name in dir(signal) if name.startswith("SIG") and "_" not in name and
                              name not in SIGNALS],
    mmap: [name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))],
}


def in_use(path: str) -> bool:
    """Whether this process has that file open or mapped, or one below that folder. Knows it on Linux alone."""
    path, held = os.path.abspath(path), []
    if os.path.isdir("/proc/self/fd"):
        for number in os.listdir("/proc/self/fd"):
            try:
                held.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue                # the folder itself, closed by now
        with open("/proc/self/maps") as file:
            held += [line.split(maxsplit=5)[-1].strip() for line in file]
    return any(name == path or name.startswith(path + os.sep) for name in held)


def refuse(event: str, args: tuple):
    """An audit hook with what Windows does not allow."""
    if event == "open" and isinstance(args[0], str) and not args[0].startswith("/proc/"):
        if os.path.isdir(args[0]):
            raise PermissionError(13, "Permission denied", args[0])
        if set(os.path.basename(args[0])) & set('<>:"|?*\\'):
            raise OSError(22, "Invalid argument", args[0])
    if event in ("os.rename", "os.remove", "os.rmdir"):
        for path in args[:2]:
            if isinstance(path, (str, os.PathLike)) and in_use(os.fspath(path)):
                raise PermissionError(13, "The process cannot access the file because it is being used", str(path))


def windows_lock() -> type:
    """filelock.FileLock as it is on Windows, over the system's own locks: while it is held its file is open, so that
    the folder cannot be renamed; then the file is removed."""
    import fcntl

    class WindowsLock:
        def __init__(self, path, **_):
            self.path, self.descriptor = path, None

        def acquire(self, timeout: float):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                raise filelock.Timeout(str(self.path))
            self.descriptor = descriptor

        def release(self):
            os.close(self.descriptor)
            os.unlink(self.path)

    return WindowsLock


def become(program: str):
    """Put Windows on, import `program` and all of ours afresh, and return its main."""
    sys.argv[0] = f"{program}.py"
    filelock.FileLock = windows_lock()
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        if name != "inkling.cli":       # the child's `run` comes from it and must know the programs' UserError
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(MODULES))          # importing them is an error now
    for owner, names in NAMES.items():
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    shutil._use_fd_functions = False
    module = importlib.import_module(program)
    sys.addaudithook(refuse)
    windows = types.SimpleNamespace(**vars(os) | dict(name="nt"))       # pathlib and others must not believe it
    for ours in [name for name in sys.modules if name.split(".")[0] in OURS]:
        if hasattr(sys.modules[ours], "os"):
            sys.modules[ours].os = windows
    return module.main


def train(argv):
    return become("train")(argv)


def prepare(argv):
    return become("prepare")(argv)


def sample(argv):
    return become("sample")(argv)


def convert(argv):
    return become("convert")(argv)
