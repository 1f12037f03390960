"""The house of CONTRIBUTING.md: imports go one way, optional packages are optional, and nothing runs a file's code."""

import ast
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, TOY, flags

PATHS = {}                              # module name: path, of the programs and the package
for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("inkling/*.py"))]:
    if path.name != "__init__.py":
        PATHS[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path

# A module imports only from those before it. The first ones need no torch.
WITHOUT_TORCH = ["inkling.output", "inkling.hints", "inkling.cli", "inkling.format", "inkling.progress",
                 "inkling.files", "inkling.dataset", "inkling.sniff", "inkling.remarks", "inkling.download",
                 "inkling.archives", "inkling.inputs", "inkling.records", "inkling.readers", "inkling.tokenizer_json",
                 "inkling.tokenizer", "inkling.tokenizer_choice", "inkling.split", "inkling.encode", "inkling.texts",
                 "inkling.ngram", "inkling.anchors", "inkling.runs", "inkling.novelty", "inkling.leaks",
                 "inkling.dedup", "prepare"]
ORDER = [*WITHOUT_TORCH, "inkling.compile_cost", "inkling.plan", "inkling.device", "inkling.cpu", "inkling.clock",
         "inkling.evaluation", "inkling.checkpoint", "inkling.distributed", "inkling.stopping",
         "inkling.plots", "inkling.report", "inkling.dry_run", "inkling.huggingface", "inkling.gguf",
         "inkling.js_regex", "convert", "train", "inkling.web_page", "inkling.ensemble", "sample"]
# A checkpoint's tokenizer is read with torch, a Hugging Face folder's by what makes Tokenizers of it; a page is made of
# a model of train.py, which itself may need convert.py: the ways back, inside functions.
WAYS_BACK = {("inkling.tokenizer", "inkling.checkpoint"), ("inkling.tokenizer", "inkling.huggingface"),
             ("convert", "inkling.web_page")}


@cache
def trees() -> dict:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def imported(node) -> set:
    """The names that an import statement may mean: `from inkling import files` is inkling or inkling.files."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(tree, inside_functions: bool = True) -> set:
    """Every module that a file imports; or only what importing it imports."""
    found = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        found |= imported(node)
        if inside_functions or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found


def packages(modules: set) -> set:
    return {module.split(".")[0] for module in modules}


# -- one way

def test_every_module_has_its_place_in_the_order():
    assert set(PATHS) <= set(ORDER)


@pytest.mark.parametrize("name", PATHS)
def test_a_module_imports_only_from_those_before_it(name):
    tree = trees()[name]
    later = set(ORDER[ORDER.index(name):])
    assert {(name, module) for module in imports(tree) & later} <= WAYS_BACK
    assert not imports(tree, inside_functions=False) & later


@pytest.mark.parametrize("name", [name for name in PATHS if name in WITHOUT_TORCH])
def test_what_prepares_data_imports_no_torch(name):
    assert "torch" not in packages(imports(trees()[name]))


@pytest.mark.parametrize("name", [name for name in PATHS if name not in WITHOUT_TORCH])
def test_elsewhere_torch_is_imported_at_the_top_and_nowhere_else(name):
    """But for parts of it that a plain run does not need, such as torch.utils.tensorboard."""
    functions = [node for node in ast.walk(trees()[name]) if isinstance(node, ast.FunctionDef)]
    assert "torch" not in set().union(*map(imports, functions))


def test_preparing_and_its_help_load_no_torch():
    """As it is run, not as it is written."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.stdout == "False\n", process.stderr


def test_convert_is_imported_when_pretrained_weights_are_asked_for_and_not_before():
    for name in ("train", "sample"):
        tree = trees()[name]
        assert "convert" not in imports(tree, inside_functions=False)
    assert "convert" in imports(trees()["train"])


# -- nothing runs what a file holds

RUNS_CODE = {"eval", "exec", "__import__", "os.system", "os.popen", "os.startfile", "torch.hub", "np.load",
             "torch.jit.load", "torch.package", "torch.serialization", "builtins"}
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
STARTS_PROGRAMS = {"subprocess", "pty", "code", "importlib"}


@pytest.mark.parametrize("name", PATHS)
def test_nothing_runs_what_is_not_the_users_own_config(name):
    """No pickle, no shell, no eval or exec, under whatever name; torch.load always with weights_only=True."""
    tree = trees()[name]
    modules = imports(tree)
    assert not packages(modules) & (UNPICKLES | STARTS_PROGRAMS)
    assert not modules & {"torch.load", "os.system", "os.popen"}
    assert "runpy" not in modules or name == "inkling.cli"      # the user's own config file
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for call in calls:
        for word in call.keywords:
            assert word.arg not in ("shell", "allow_pickle", "trust_remote_code"), ast.unparse(word)
    safe = [call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)):         # called or not
            said = ast.unparse(node)
            assert said not in RUNS_CODE
            assert not said.startswith(("os.exec", "os.spawn", "os.posix_spawn")), said
            assert said != "torch.load" or node in safe


# -- what must be installed

# Only when asked for, or PyTorch brings it.
OPTIONAL = {"wandb", "tensorboard", "triton", "rustbpe", "pyarrow", "zstandard", "tokenizers", "transformers", "gguf"}
# Required, and yet everything else runs without them, in plain lines.
FOR_PEOPLE = {"tqdm", "matplotlib", "safetensors", "huggingface_hub"}


def required() -> set:
    return set(re.findall(r"^([a-z_]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))


def test_requirements_hold_what_the_programs_import():
    own = packages(set(ORDER))
    used = set().union(*(packages(imports(tree)) for tree in trees().values()))
    assert used - own - set(sys.stdlib_module_names) - OPTIONAL <= required()


def test_the_three_programs_run_without_optional_packages_and_those_for_people(tmp_path):
    """The three programs in one process that can import torch, numpy and tiktoken, and not the others."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for package in (OPTIONAL - {"triton"}) | FOR_PEOPLE:
        (hidden / f"{package}.py").write_text(f"raise ImportError('{package} is hidden')\n", encoding="utf-8")
    (tmp_path / "cats.txt").write_text("The cat sat on the mat. " * 200, encoding="utf-8")
    words = {
        "prepare": ["cats.txt", "--data_dir=sets"],
        "train": [*flags(**TOY | dict(dataset="cats")), "--data_dir=sets"],
        "sample": ["--start=The", "--max_new_tokens=5", "--device=cpu"],
    }
    code = "\n".join(["import sys", f"sys.path[:0] = [{str(hidden)!r}, {str(ROOT)!r}]",
                      *(f"import {name}; assert not {name}.main({given})" for name, given in words.items())])
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("The")
    assert {path.name for path in (tmp_path / "out" / "cats").iterdir()} >= {"ckpt.pt", "last.pt", "log.csv"}
    assert not (tmp_path / "out" / "cats" / "loss.png").exists()


# -- how a program ends

@pytest.mark.parametrize(("body", "code", "said"), [
    ("raise KeyboardInterrupt", 130, ""), ("print('é'); return 7", 7, "é\n"),
    ("raise UserError('n=3 must be 4')", 2, "program.py: n=3 must be 4\n"),
    ("raise UserError('gone', code=1)", 1, "program.py: gone\n")])
def test_a_program_ends_without_a_traceback(tmp_path, body, code, said):
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom inkling.cli import UserError, run\n"
                       f"def main(argv):\n    {body}\nrun(main)\n", encoding="utf-8")
    process = subprocess.run([sys.executable, program], capture_output=True, encoding="utf-8", timeout=60,
                             env={"PYTHONIOENCODING": "ascii"})
    assert (process.returncode, process.stdout + process.stderr) == (code, said)


WATCH = """
import os, sys
class Watch:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch)
__import__(sys.argv[1])
"""


@pytest.mark.parametrize("program", ["train", "sample"])
@pytest.mark.parametrize("given", [None, "7"])
def test_threads_are_told_how_long_to_look_for_work_before_torch_is_imported(program, given):
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if given:
        env["GOMP_SPINCOUNT"] = given
    done = subprocess.run([sys.executable, "-c", WATCH, program], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.stdout.split() == [given or "10000"], done.stderr[-2000:]


def test_who_says_how_threads_wait_is_obeyed():
    env = os.environ | {"OMP_WAIT_POLICY": "active"}
    env.pop("GOMP_SPINCOUNT", None)
    done = subprocess.run([sys.executable, "-c", WATCH, "train"], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.stdout.split() == ["None"], done.stderr[-2000:]
