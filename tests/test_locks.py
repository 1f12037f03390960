"""One process at a time uses a folder, whoever else wants it is told who does, and no lock outlives its process."""

import errno
import gc
import os
import subprocess
import sys

import filelock
import pytest
from conftest import ROOT

import inkling.files
from inkling.cli import UserError
from inkling.files import HOLDER, LOCK, hold_folder, lock_folder

SELF = f"process {os.getpid()}, started 20"


@pytest.fixture
def other(tmp_path):
    """Another process that runs some code, where `folder` is tmp_path/"run", and says when it is ready."""
    started = []

    def other(code: str) -> subprocess.Popen:
        lines = ["import os, sys, time", f"sys.path.insert(0, {str(ROOT)!r})", "from pathlib import Path",
                 "from inkling.files import lock_folder", f"folder = Path({str(tmp_path / 'run')!r})", code]
        process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield other
    for process in started:
        process.kill()
        process.communicate()


WAITS = "print('ready', flush=True); sys.stdin.read()"
HOLDS = "lock = lock_folder(folder)\n" + WAITS


def test_a_second_one_is_told_who_holds_the_folder(tmp_path):
    lock = lock_folder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run is in use by {SELF}.*: wait for it, or give another --out_dir"):
        lock_folder(tmp_path / "run")
    lock.close()
    lock_folder(tmp_path / "run").close()
    assert not (tmp_path / "run" / HOLDER).exists()


def test_a_lock_that_nobody_keeps_is_released(tmp_path):
    lock = lock_folder(tmp_path)
    del lock
    gc.collect()
    lock_folder(tmp_path).close()


def test_a_killed_process_holds_nothing(other, tmp_path):
    process = other(HOLDS)
    with pytest.raises(UserError, match=f"process {process.pid}, started"):
        lock_folder(tmp_path / "run")
    process.kill()
    process.wait()
    lock_folder(tmp_path / "run").close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_killed_process_holds_nothing_although_its_forked_child_lives(other, tmp_path):
    process = other(f"lock = lock_folder(folder)\nif os.fork() == 0: os.close(1); time.sleep(9); os._exit(0)\n{WAITS}")
    with pytest.raises(UserError, match=f"process {process.pid}, started"):
        lock_folder(tmp_path / "run")
    process.kill()
    process.wait()
    lock_folder(tmp_path / "run").close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_the_end_of_a_forked_child_releases_nothing(other, tmp_path):
    process = other(f"lock = lock_folder(folder)\nif os.fork() == 0: lock.close(); sys.exit()\nos.wait()\n{WAITS}")
    with pytest.raises(UserError, match=f"process {process.pid}, started"):
        lock_folder(tmp_path / "run")


# Windows tells nobody whether a process lives: there a moment's patience must do.
LEFT = ["", "nonsense", None, *(["process {dead}, started 2026-01-02 03:04:05"] if os.name == "posix" else [])]


@pytest.mark.parametrize("name", LEFT)
def test_the_name_of_a_process_that_has_gone_is_not_shown(name, tmp_path):
    """It was killed, and the one that holds the folder now has not written its own name."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = filelock.FileLock(tmp_path / LOCK, thread_local=False)
    with lock.acquire():
        if name is not None:
            (tmp_path / HOLDER).write_text(name.format(dead=dead.pid))
        with pytest.raises(UserError, match="is in use by another process: wait"):
            lock_folder(tmp_path)


def test_waiting_says_for_whom_once(other, tmp_path, capsys):
    process = other(HOLDS.replace("sys.stdin.read()", "time.sleep(0.7)"))
    lock_folder(tmp_path / "run", wait=True).close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"waiting  for process {process.pid}, started ")
    assert lines[0].endswith(f", which uses {tmp_path / 'run'}")
    process.wait()
    lock_folder(tmp_path / "run", wait=True).close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "Function not implemented"),
                                   OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_is_named_and_used(error, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    lock = lock_folder(tmp_path / "run")
    assert "run lies on a file system without locks" in capsys.readouterr().out
    lock.close()


def test_no_fallback_outlives_its_process(tmp_path, monkeypatch):
    """filelock's own answer to such a file system is a file that a killed process would leave behind."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    first = lock_folder(tmp_path)
    lock_folder(tmp_path).close()
    first.close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot use the folder .*file.*: name another"):
        lock_folder(tmp_path / "file")


def test_an_empty_folder_goes_again_and_a_used_one_stays(tmp_path):
    with hold_folder(tmp_path / "sets" / "one"):
        assert (tmp_path / "sets" / "one").is_dir()
    assert not (tmp_path / "sets" / "one").exists()
    with hold_folder(tmp_path / "two"):
        (tmp_path / "two" / "train.bin").touch()
    assert (tmp_path / "two" / "train.bin").exists()


def test_a_folder_that_another_takes_at_that_moment_stays(tmp_path, monkeypatch):
    release = inkling.files.release_folder
    others = []

    def release_and_take(*args):
        release(*args)
        monkeypatch.undo()
        others.append(lock_folder(tmp_path / "sets"))

    monkeypatch.setattr(inkling.files, "release_folder", release_and_take)
    with hold_folder(tmp_path / "sets"):
        pass
    assert (tmp_path / "sets").is_dir()
    with pytest.raises(UserError, match=SELF):          # its lock is on the file that everybody sees
        lock_folder(tmp_path / "sets")
    others[0].close()
