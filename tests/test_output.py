"""A run outlives its output: a pipe whose reader has left, a full disk, a closed terminal, none from the start. A
program whose output is what it makes ends with one line, and never with 0."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY, ZYGOTE, flags, log_rows, same_runs

from inkling import output, stopping
from inkling.checkpoint import load_checkpoint
from inkling.output import Messages, Output, outlive_output
from inkling.plots import read_log
from inkling.stopping import SIGNALS, Stop

with contextlib.suppress(ImportError):      # on Windows
    import fcntl
    import termios

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these devices nor SIGHUP")
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
LONG = TOY | dict(max_iters=10**6, eval_interval=500, save_interval=0, sample_tokens=0)


@pytest.fixture
def program(data_dir, tmp_path):
    """program("train.py", "--max_iters=3", redirect=">&-"): the program in a shell, in an empty folder, with toy
    settings if it is train.py."""
    def start(name: str, *words, redirect: str = ""):
        words = [*flags(**TOY, data_dir=data_dir, out_dir="run"), *words] if name == "train.py" else words
        return subprocess.run(["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, str(ROOT / name), *words],
                              cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    return start


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The folder of a toy run that nothing disturbs."""
    out = tmp_path_factory.mktemp("out") / "whole"
    done = ZYGOTE.run("train.py", *flags(**TOY, data_dir=data_dir, out_dir=out), folder=out.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return out


# -- a run continues without its output

@full
def test_a_run_is_the_same_on_a_full_device(data_dir, whole, tmp_path):
    with open("/dev/full", "wb") as device:
        done = ZYGOTE.run("train.py", *flags(**TOY, data_dir=data_dir, out_dir="run"), folder=tmp_path,
                          out=device.fileno())
    assert (done.returncode, done.stderr.splitlines()) == (
        0, ["train.py: its output is lost (No space left on device); it continues without"])
    same_runs(tmp_path / "run", whole)


@posix
def test_a_run_with_no_streams_at_all_writes_into_none_of_its_files(program, whole, tmp_path):
    done = program("train.py", redirect="<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same_runs(tmp_path / "run", whole)


def test_a_reader_that_leaves_in_the_middle_changes_nothing(data_dir, whole, tmp_path):
    """As `| head -3`."""
    child = ZYGOTE.start("train.py", *flags(**TOY, data_dir=data_dir, out_dir="run"), folder=tmp_path)
    with open(child.out, encoding="utf-8") as reader:
        assert [reader.readline().split()[0] for _ in range(3)] == ["data", "model", "steps"]
    child.out = os.open(os.devnull, os.O_RDONLY)
    done = child.wait()
    assert (done.returncode, done.stderr.splitlines()) == (
        0, ["train.py: its output is lost (Broken pipe); it continues without"])
    same_runs(tmp_path / "run", whole)


def test_a_full_disk_under_the_output_costs_lines_and_nothing_else(data_dir, whole, tmp_path):
    """What fits again is written again."""
    raw = FakeRaw(room=100)
    stream = io.TextIOWrapper(io.BufferedWriter(Output(stream_on(raw), "train.py", needed=False)), "utf-8")
    for number in range(40):
        if number == 30:
            raw.room = 10**6
        print(f"line {number}", file=stream, flush=True)
    lines = b"".join(raw.written).decode().splitlines()
    assert lines[:5] == [f"line {number}" for number in range(5)]
    assert lines[-9:] == [f"line {number}" for number in range(31, 40)]
    assert len(lines) < 40


@full
@pytest.mark.parametrize("words", [
    ["prepare.py", "DATA/toy.txt", "--data_dir=sets"], ["convert.py", "export", "WHOLE/ckpt.pt", "--out=sets/toy"]],
    ids=lambda words: words[0])
def test_what_makes_files_makes_them_without_its_output(data_dir, exportable, tmp_path, words):
    name, *words = [word.replace("WHOLE", str(exportable)).replace("DATA", str(data_dir)) for word in words]
    with open("/dev/full", "wb") as device:
        done = ZYGOTE.run(name, *words, folder=tmp_path, out=device.fileno())
    assert (done.returncode, done.stderr.splitlines()) == (
        0, [f"{name}: its output is lost (No space left on device); it continues without"])
    made = {path.name for path in (tmp_path / "sets" / "toy").iterdir()}
    assert made >= ({"meta.json", "train.bin", "val.bin"} if name == "prepare.py" else {"config.json"})


@pytest.fixture(scope="module")
def exportable(data_dir, tmp_path_factory):
    """The folder of a run that Hugging Face's format can express."""
    out = tmp_path_factory.mktemp("out") / "llama"
    done = ZYGOTE.run("train.py", *flags(**TOY | dict(
        data_dir=data_dir, out_dir=out, max_iters=0, embed_norm=False, qk_norm=False, logit_cap=0, shortcuts=False,
        ngrams=0, rope_fraction=1, mlp="swiglu", norm_gain=True)), folder=out.parent)
    assert done.returncode == 0, done.stderr
    return out


# -- SIGHUP

def wait_for(holds, seconds: float = 60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_training(out) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any("loss" in row for row in read_log(out / "log.csv"))
    return False


def test_sighup_saves_and_ends_with_129(data_dir, tmp_path):
    child = ZYGOTE.start("train.py", *flags(**LONG, data_dir=data_dir, out_dir="run"), folder=tmp_path)
    wait_for(partial(is_training, tmp_path / "run"))
    child.send(signal.SIGHUP)
    child.send(signal.SIGHUP)               # the kernel sends one, and the shell another
    done = child.wait()
    assert (done.returncode, done.stderr) == (129, "")
    step = load_checkpoint(tmp_path / "run" / "last.pt", resumable=True)["step"]
    assert step == int(log_rows(tmp_path / "run")[-1]["step"]) > 0
    assert f"stopped  at step {step} of 1000000" in done.stdout


@posix
@pytest.mark.parametrize(("mine", "others", "code"), [
    (0, signal.SIGHUP, 129), (0, signal.SIGTERM, 143), (signal.SIGHUP, signal.SIGINT, 129), (0, 0, 0)])
def test_all_processes_end_for_the_signal_of_one(mine, others, code):
    def add_the_others(reasons):
        return reasons + torch.tensor([float(number == others) for number in SIGNALS])

    stop = Stop()
    stop.signal = mine
    stop.agree(SimpleNamespace(world=2, device="cpu", all_reduce=add_the_others))
    assert stop.agreed == bool(code)
    assert stop.exit_code == code


@posix
def test_sighup_is_taken_only_where_it_was_not_ignored(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            with Stop() as stop:
                assert (signal.getsignal(signal.SIGHUP) == stop.receive) == (handler == signal.SIG_DFL)
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_windows_has_no_sighup(monkeypatch):
    monkeypatch.setattr(stopping, "SIGHUP", None)
    monkeypatch.setattr(stopping, "SIGNALS", [signal.SIGTERM, signal.SIGINT])
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    stop.agree(SimpleNamespace(world=1))
    assert stop.exit_code == 143


class Terminal:
    """A process in a terminal of its own, which `close` closes, as one closes a window."""

    def __init__(self, command: list, folder):
        self.screen, keyboard = os.openpty()
        termios.tcsetwinsize(keyboard, (24, 100))
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=keyboard, stdout=keyboard, stderr=keyboard, start_new_session=True,
            preexec_fn=partial(take_terminal, keyboard), env=os.environ | {"OMP_NUM_THREADS": "1"})
        os.close(keyboard)
        self.shown = b""
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        with contextlib.suppress(OSError):          # it is closed
            while piece := os.read(self.screen, 1 << 16):
                self.shown += piece

    def close(self):
        os.close(self.screen)


def take_terminal(descriptor: int):
    """Make the terminal the one that sends this process its SIGHUP, which it does not ignore, even if pytest does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@posix
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_with_a_bar(data_dir, tmp_path, ignored):
    """The run saves and ends; where SIGHUP is ignored, as nohup does, it continues, here for 1,000 steps."""
    code = 0 if ignored else 129
    steps = 1000 if ignored else 10**6
    settings = LONG | dict(max_iters=steps, data_dir=data_dir, out_dir="run")
    trap = "trap '' HUP; " if ignored else ""
    command = ["sh", "-c", f'{trap}exec "$@"', "sh", sys.executable, str(ROOT / "train.py"), *flags(**settings)]
    terminal = Terminal(command, tmp_path)
    try:
        wait_for(partial(is_training, tmp_path / "run"))
        wait_for(lambda: b"step |" in terminal.shown or b"tok/s" in terminal.shown)
        assert terminal.process.poll() is None
        terminal.close()
        assert terminal.process.wait(timeout=60) == code
    finally:
        terminal.process.kill()
    step = load_checkpoint(tmp_path / "run" / "last.pt", resumable=True)["step"]
    assert step == int(log_rows(tmp_path / "run")[-1]["step"]) > 0
    assert step == steps or code


# -- a program whose output is what it makes

@full
@pytest.mark.parametrize("words", [
    ["train.py", "--help"], ["sample.py", "--help"], ["prepare.py", "--help"], ["convert.py", "--help"],
    ["train.py", "--dry_run"], ["train.py", "--eval_only"], ["sample.py", "--out_dir=WHOLE"],
    ["sample.py", "--out_dir=WHOLE", "--json"], ["sample.py", "--out_dir=WHOLE", "--score=DATA/toy.txt"],
    ["prepare.py", "--decode", "toy"], ["prepare.py", "--check", "toy"], ["inkling/plots.py", "WHOLE"]],
    ids=lambda words: " ".join(words))
def test_on_a_full_device_it_ends_with_a_line(data_dir, whole, tmp_path, words):
    name, *words = [word.replace("WHOLE", str(whole)).replace("DATA", str(data_dir)) for word in words]
    if name == "prepare.py" and words != ["--help"]:
        words.append(f"--data_dir={data_dir}")
    if name == "train.py":
        words = [*flags(**TOY, data_dir=data_dir, out_dir="run"), *words]
    with open("/dev/full", "wb") as device:
        child = ZYGOTE.start(name.replace("/", "."), *words, folder=tmp_path, out=device.fileno())
        done = child.wait()
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("sampling from ", "scoring with "))]
    assert lines == [f"{name.replace('/', '.')}: cannot write its output: No space left on device"]
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()


@posix
def test_sampling_without_a_stdout_is_refused(program, whole):
    """And without a stdin, which is an empty one."""
    done = program("sample.py", f"--ckpt={whole}/ckpt.pt", "--start=-", redirect="<&- >&-")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["sample.py: cannot write its output: Bad file descriptor"]


def test_a_reader_who_has_enough_ends_it_as_sigpipe_would(whole, tmp_path):
    child = ZYGOTE.start("sample.py", f"--ckpt={whole}/ckpt.pt", "--num_samples=300", folder=tmp_path)
    with open(child.out, encoding="utf-8") as reader:
        reader.readline()
    child.out = os.open(os.devnull, os.O_RDONLY)
    done = child.wait()
    assert (done.returncode, done.stderr.splitlines()[1:]) == (141, [])


# -- the stream itself

def stream_on(raw):
    """What sys.stdout is, as far as Output looks at it."""
    return SimpleNamespace(buffer=SimpleNamespace(raw=raw))


class FakeRaw:
    """Takes `room` bytes, and raises `error` then."""

    def __init__(self, room: int, error: int = errno.ENOSPC):
        self.room = room
        self.error = error
        self.written = []

    def write(self, data) -> int:
        if not self.room:
            raise OSError(self.error, os.strerror(self.error))
        piece = bytes(data[:self.room])
        self.room -= len(piece)
        self.written.append(piece)
        return len(piece)


@pytest.mark.parametrize(("error", "code", "said"), [
    (errno.ENOSPC, 1, "p.py: cannot write its output: No space left on device\n"),
    (errno.EIO, 1, "p.py: cannot write its output: Input/output error\n"),
    (errno.EPIPE, 141, "")])
@posix
def test_what_is_left_in_a_buffer_does_not_fail_again(capsys, error, code, said):
    stream = io.TextIOWrapper(io.BufferedWriter(Output(stream_on(FakeRaw(3, error)), "p.py", needed=True)))
    stream.write("abcdef")
    with pytest.raises(SystemExit) as stop:
        stream.flush()
    assert stop.value.code == code
    stream.flush()
    stream.close()
    assert capsys.readouterr().err == said


def test_a_message_that_cannot_be_said_is_dropped(capsys):
    stream = io.TextIOWrapper(io.BufferedWriter(Messages(stream_on(FakeRaw(0)), "p.py", needed=False)))
    print("abc", file=stream, flush=True)
    assert capsys.readouterr().err == ""


@posix
def test_a_pipe_that_another_program_made_non_blocking_is_waited_for():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    received = []

    def read():
        time.sleep(0.2)
        while piece := os.read(reading, 1 << 16):
            received.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with open(writing, "wb", buffering=0) as raw:
        stream = io.TextIOWrapper(io.BufferedWriter(Output(stream_on(raw), "p.py", needed=True)))
        stream.write("x" * 10**6)
        stream.flush()
    reader.join()
    os.close(reading)
    assert b"".join(received) == b"x" * 10**6


def test_outliving_leaves_a_stdout_of_others_alone(capsys):
    outlive_output()
    print("as before")
    assert capsys.readouterr().out == "as before\n"


def test_a_free_descriptor_of_the_three_is_filled(monkeypatch):
    opened = iter([1, 2, 7])
    closed = []
    monkeypatch.setattr(os, "open", lambda *_: next(opened))
    monkeypatch.setattr(os, "close", closed.append)
    output.fill_closed_descriptors()
    assert closed == [7]

