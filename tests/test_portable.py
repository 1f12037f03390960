"""The programs need nothing that only POSIX has: they run in children where that is hidden (windows.py)."""

import ast
import signal
import time

import pytest
from conftest import ROOT, TOY, ZYGOTE, flags, one_line_error
from windows import MODULES, NAMES

PROGRAMS = sorted([*ROOT.glob("*.py"), *ROOT.glob("inkling/*.py")])
TEXT = "The cat sat on the mat, and the dog looked on.\n" * 200


@pytest.fixture
def windows(tmp_path):
    """windows("train", "--max_iters=3"): a program where POSIX is hidden, in an empty folder."""
    (tmp_path / "cats.txt").write_text(TEXT, encoding="utf-8")
    return lambda program, *words: ZYGOTE.run(f"windows:{program}", *words, folder=tmp_path)


def test_the_three_commands_run(windows, tmp_path):
    train = ["train", *flags(**TOY | dict(dataset="cats", data_dir="sets"))]
    for words in (["prepare", "cats.txt", "--data_dir=sets"], ["prepare", "cats.txt", "--data_dir=sets", "--force"],
                  ["prepare", "--check", "cats", "--data_dir=sets"], train, [*train, "--seed=2"],
                  [*train, "--init_from=resume", "--max_iters=8"],
                  [*train, "--out_dir=tuned", "--init_from=out/cats/ckpt.pt"],
                  ["sample", "--start=The", "--max_new_tokens=9", "--device=cpu"],
                  ["sample", "--interactive", "--device=cpu"], ["sample", "--score=cats.txt", "--device=cpu"]):
        done = windows(*words)
        assert done.returncode == 0, (words, done.stderr)
        assert "could not write" not in done.stdout, (words, done.stdout)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cats", "cats.1"}
    done = windows("prepare", "--decode", "cats", "--data_dir=sets")
    assert done.stdout == TEXT
    one_line_error(windows("prepare", str(ROOT), "--name=x", "--suffix=.none", "--data_dir=sets"), "no")
    assert {path.name for path in (tmp_path / "sets").iterdir()} == {"cats"}        # and removed its empty folder


def test_the_lock_is_windows_own(windows, tmp_path):
    words = flags(**TOY | dict(dataset="cats", data_dir="sets", out_dir="run"))
    assert windows("prepare", "cats.txt", "--data_dir=sets").returncode == 0
    first = ZYGOTE.start("windows:train", *words, "--max_iters=100000", folder=tmp_path)
    until = time.monotonic() + 30
    while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    first.send(signal.SIGSTOP)                          # it keeps its lock, and writes no more
    time.sleep(0.1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for init_from in ("scratch", "resume", "auto"):
        one_line_error(windows("train", *words, f"--init_from={init_from}"), "run is in use by", f"process {first.pid}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    first.send(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    done = windows("train", *words, "--init_from=resume", "--max_iters=1")
    assert (done.returncode, done.stderr) == (0, "")    # the lock has died with its process


def guarded(tree, kinds, names) -> set:
    """The nodes that lie within a `try` or a `with suppress(...)` that names one of these."""
    return {inner for node in ast.walk(tree) if isinstance(node, kinds)
            and any(name in ast.unparse(part) for name in names
                    for part in [*getattr(node, "handlers", []), *getattr(node, "items", [])])
            for inner in ast.walk(node)}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_what_only_posix_has_is_asked_for_before_it_is_used(path):
    """Everywhere in the source, be it run above or not; and a text file's encoding is said, which Windows has another
    idea of."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    spared = guarded(tree, (ast.Try, ast.With), ["ImportError"])
    hidden = {owner.__name__: set(names) for owner, names in NAMES.items()}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in spared:
            imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not imported & set(MODULES), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and node.attr in hidden.get(ast.unparse(node.value), ()):
            assert f'hasattr({ast.unparse(node.value)}, "{node.attr}")' in text, ast.unparse(node)
        elif isinstance(node, ast.Call):
            called, said = ast.unparse(node.func), {word.arg for word in node.keywords}
            text_mode = called == "open" and "b'" not in "".join(map(ast.unparse, node.args[1:2]))
            if text_mode or called.endswith((".read_text", ".write_text")):
                assert "encoding" in said, ast.unparse(node)
