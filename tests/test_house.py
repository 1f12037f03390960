"""The house of DESIGN.md: what imports what, what runs without the optional packages, and what stays readable."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TOY, flags

PROGRAMS = sorted(str(path.relative_to(ROOT)) for folder in (".", "inkling") for path in ROOT.glob(f"{folder}/*.py"))


def imports(name: str) -> set:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_points_back():
    assert "sample" not in imports("train.py")
    assert not imports("prepare.py") & {"train", "sample", "convert", "torch"}
    assert not imports("convert.py") & {"train", "sample"}
    for name in (name for name in PROGRAMS if name.startswith("inkling/")):
        assert not imports(name) & {"train", "sample", "prepare", "convert"}, name
    assert not any(module.split(".")[0] == "torch" for module in imports("inkling/sources.py"))
    assert not any(module.split(".")[0] == "torch" for module in imports("inkling/cli.py"))


def test_convert_is_imported_when_pretrained_weights_are_asked_for_and_not_before():
    for program in ("train", "sample"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {program}; print('convert' in sys.modules)"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert process.stdout == "False\n", process.stderr


RUNS_CODE = {"eval", "exec", "__import__", "os.system", "os.popen", "os.startfile", "torch.hub", "np.load",
             "torch.jit.load", "torch.package", "torch.serialization", "builtins"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_runs_what_is_not_the_users_own_config(name):
    """No pickle, no shell, no eval or exec, under whatever name; torch.load always with weights_only=True."""
    assert not {module.split(".")[0] for module in imports(name)} & {
        "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty", "code", "importlib"}
    assert not imports(name) & {"torch.load", "os.system", "os.popen"}
    assert "runpy" not in imports(name) or name == "inkling/cli.py"      # the user's own config file
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for word in (word for call in calls for word in call.keywords):
        assert word.arg not in ("shell", "allow_pickle", "trust_remote_code"), ast.unparse(word)
    safe = [call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)):                 # called or not
            said = ast.unparse(node)
            assert said not in RUNS_CODE
            assert not said.startswith(("os.exec", "os.spawn", "os.posix_spawn")), said
            assert said != "torch.load" or node in safe


def test_train_py_can_be_read_in_one_sitting():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 858
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 110]


def test_requirements_hold_what_the_programs_import():
    named = set(re.findall(r"^([a-z_]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    optional = {"wandb", "triton", "rustbpe", "pyarrow", "zstandard"}   # only when asked for, or PyTorch brings it
    own = {"train", "prepare", "sample", "convert", "inkling"}
    third_party = {module.split(".")[0] for name in PROGRAMS for module in imports(name)} - set(sys.stdlib_module_names)
    assert third_party - own - optional <= named


def test_without_tqdm_matplotlib_and_safetensors_everything_still_runs(run, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for package in ("tqdm", "matplotlib", "safetensors"):
        (hidden / f"{package}.py").write_text(f"raise ImportError('{package} is hidden')\n", encoding="utf-8")
    env = {"PYTHONPATH": str(hidden)}
    (tmp_path / "cats.txt").write_text("The cat sat on the mat. " * 200, encoding="utf-8")
    data = tmp_path / "data"
    for process in (run("prepare.py", "cats.txt", f"--data_dir={data}", env=env),
                    run("train.py", *flags(**TOY | dict(dataset="cats")), f"--data_dir={data}", env=env),
                    run("sample.py", "--start=The", "--max_new_tokens=5", env=env)):
        assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("The")
    assert {path.name for path in (tmp_path / "out" / "cats").iterdir()} == {".lock", "ckpt.pt", "last.pt", "log.csv"}


def test_a_closed_pipe_and_ctrl_c_leave_no_traceback(run, tmp_path):
    program = tmp_path / "program.py"
    for body, code in (("raise KeyboardInterrupt", 130), ("raise BrokenPipeError", 0), ("print('é'); return 7", 7)):
        program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom inkling.cli import run\n"
                           f"def main(argv):\n    {body}\nrun(main)\n", encoding="utf-8")
        process = run(program, env={"PYTHONIOENCODING": "ascii"})
        assert (process.returncode, process.stderr) == (code, "")
    assert process.stdout == "é\n"
