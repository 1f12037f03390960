"""Programs in children of a process that has imported torch and computed nothing: a trial costs milliseconds, not the
seconds of an import. For POSIX systems, the only ones that fork."""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path

try:
    import resource
except ImportError:                     # Windows, where nothing here is called
    resource = None

from inkling.cli import run


def begin(program: str, words: list, folder: str, seconds: int, memory: int | None, room: int | None):
    """Become `program` in `folder`; never returns."""
    code = 1
    try:
        os.chdir(folder)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")    # noqa: SIM115, to the end
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)        # which the tests' own nohup has ignored
        signal.alarm(seconds)           # whoever hangs dies of SIGALRM
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory,) * 2)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        sys.modules["matplotlib"] = None        # pictures take most of a toy run's time
        sys.argv = [program, *words]
        module, _, name = program.removesuffix(".py").partition(":")
        run(getattr(importlib.import_module(module), name or "main"))
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:           # before the program has begun
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def audited(argv: list):
    """Run the program argv[0] with the words that follow; tell on stderr of every file it opens."""
    sys.addaudithook(lambda event, args: event == "open" and os.write(2, f"opened {args[0]}\n".encode()))
    return importlib.import_module(argv[0]).main(argv[1:])


# What one of a series leaves must not hide a fault of a later one:
# - memory: the limit is of the child and never raised, so what is left, or was never given back, counts against a later
#   one; a child that has grown by GROWTH ends;
# - what is opened, started or set and not undone (`left`): the child ends, and a new one takes the next;
# - warnings that are shown once: catch_warnings makes Python forget what it has shown, set_warn_always torch;
# - torch's flags and random numbers, and what functions keep in caches: back to the first, before each;
# - modules: an import stays, which the programs' own code does and no file can ask for; a name put in sys.modules
#   for one that was there ends the child.
GROWTH = 200 << 20


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def left() -> tuple:
    """What is the same before and after a program that cleans up behind itself."""
    import torch
    numbers = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
    return (sorted(os.listdir("/proc/self/fd"), key=int), threading.enumerate(), dict(os.environ), list(sys.path),
            {number: signal.getsignal(number) for number in numbers}, sys.getrecursionlimit(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), sys.excepthook)


def series(argv: list):
    """Run the programs that the file argv[0] lists, from the one numbered argv[1], in turn in this process; each says
    what it says into files beside. The file argv[0].ends gets a line with its exit code as each ends. The process dies
    of what kills one of them, and ends early where one has left something behind."""
    import torch
    path, first, seconds = argv[0], int(argv[1]), int(argv[2])
    streams = [sys.stdout, sys.stderr]      # which, forgotten, would close what becomes the cases' own
    ends = os.open(f"{path}.ends", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    cases = json.loads(Path(path).read_text())
    torch.set_warn_always(True)
    flags = torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()
    filled, chance, size = torch.utils.deterministic.fill_uninitialized_memory, torch.get_rng_state(), address_space()
    gc.freeze()                             # what is there stays in pages shared with the parent
    for number, (program, words, folder) in enumerate(cases[first:], first):
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(f"{path}.{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
        os.chdir(folder)
        sys.argv = [program, *words]
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)       # noqa: SIM115
        torch.set_deterministic_debug_mode(flags[0])
        torch.set_float32_matmul_precision(flags[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_rng_state(chance)
        modules = dict(sys.modules)
        for name, module in modules.items():
            if name.split(".")[0] in ("inkling", "train", "sample", "prepare"):
                for function in vars(module).values():
                    if hasattr(function, "cache_clear"):
                        function.cache_clear()
        before, code = left(), 1
        signal.alarm(seconds)
        try:
            with warnings.catch_warnings():
                run(importlib.import_module(program.removesuffix(".py")).main)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        signal.alarm(0)
        after = left()
        os.write(ends, f"{code}\n".encode())
        replaced = [name for name, module in modules.items() if sys.modules.get(name) is not module]
        if before != after or replaced or address_space() > size + GROWTH:
            break
    streams.clear()
    os._exit(0)


class Zygote:
    """The process that forks. Make it before anything has been computed."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        if os.fork() == 0:
            self.socket.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is pytest's
            self.serve(theirs)
        theirs.close()

    @staticmethod
    def serve(asked):
        while True:
            message, pipes, _, _ = socket.recv_fds(asked, 1 << 20, 2)
            if not message:
                os._exit(0)             # whoever asked is gone
            request = json.loads(message)
            importlib.import_module("torch._dynamo")            # which optimizers import in 2 s, at the first request
            if "wait" in request:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            else:
                answer = os.fork()
                if answer == 0:
                    asked.close()
                    os.dup2(pipes[0], 1)
                    os.dup2(pipes[1], 2)
                    os.closerange(3, max(pipes) + 1)
                    begin(**request)
                for pipe in pipes:
                    os.close(pipe)
            asked.sendall(json.dumps(answer).encode())

    def ask(self, request: dict, pipes=()):
        socket.send_fds(self.socket, [json.dumps(request).encode()], pipes)
        return json.loads(self.socket.recv(100))

    def start(self, program: str, *words, folder, seconds: int = 60, memory: int | None = None,
              room: int | None = None, out: int | None = None):
        """`program` (train.py, or module:function) with these words in a child, as inkling.cli.run runs it. seconds:
        until it is killed by SIGALRM; memory: bytes of address space beyond what importing took; room: no file grows
        beyond so many bytes, as on a full disk; out: the descriptor to take as stdout, instead of a pipe."""
        return Child(self, program, list(map(str, words)), str(folder), seconds, memory, room, out)

    def run(self, program: str, *words, **limits) -> subprocess.CompletedProcess:
        return self.start(program, *words, **limits).wait()


class Child:
    def __init__(self, zygote: Zygote, program: str, words: list, folder: str, seconds, memory, room,
                 stdout: int | None):
        self.zygote, self.words, (self.out, out), (self.err, err) = zygote, words, os.pipe(), os.pipe()
        self.pid = zygote.ask(dict(program=program, words=words, folder=folder, seconds=seconds, memory=memory,
                                   room=room), (out if stdout is None else stdout, err))
        os.close(out)
        os.close(err)

    def send(self, number: int):
        os.kill(self.pid, number)       # it stays there, be it a zombie, until wait()

    def wait(self) -> subprocess.CompletedProcess:
        """How it ended and what it said."""
        said = []
        for pipe in (self.out, self.err):
            with open(pipe, encoding="utf-8", errors="replace", newline="") as file:
                said.append(file.read())
        return subprocess.CompletedProcess(self.words, self.zygote.ask(dict(wait=self.pid)), *said)
