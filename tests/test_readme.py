"""README.md and README.zh.md say the same and say it right: equal code, links that lead somewhere, and every block of
shell and Python runs, in toy size.

Bash runs the shell blocks as they stand, one after another in a folder of their own. The words `python`, `torchrun`,
`pip` and `hf` are stand-ins there, which hand their command line to `serve`, a process that has imported the programs
and runs each command in a fork of itself: with toy settings after those typed, without a network."""

import contextlib
import csv
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flags

PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", "bench/RESULTS.md"]
TOY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=1, max_iters=2,
           eval_interval=2, eval_iters=1, sample_tokens=4, device="cpu", dtype="float32", compile=False)
NOT_RUN = {                             # the beginning of a command, and why it is not run
    ("pip", "install"): "needs a network; tests run where all is installed",
    ("hf", "upload"): "needs a network and an account",
    ("python", "-m", "pytest"): "is what runs here",
}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list:
    """[(language, code)] of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page(name), re.M | re.S)


# -- the pages -------------------------------------------------------------------------------------------------------

def test_both_languages_have_the_same_code_and_sections():
    assert blocks("README.md") == blocks("README.zh.md")
    shapes = [re.findall(r"^(?:#+ |\| *(?=`)|!\[)", re.sub(r"^```.*?^```$", "", page(name), flags=re.M | re.S), re.M)
              for name in PAGES[:2]]
    assert shapes[0] == shapes[1]                       # headings, rows of tables that begin with code, pictures


def test_the_first_commands_are_alone_in_their_blocks():
    """The second is also what .ci/run looks for."""
    first, second = blocks("README.md")[:2]
    assert first == ("sh", 'pip install -r requirements.txt && python train.py && python sample.py --start="The fox"\n')
    assert second == ("sh", "pip install -r requirements-dev.txt && python -m pytest\n")
    assert "pip install -r requirements-dev.txt" not in page("README.md").split(second[1])[0]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.+)", file.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]


def test_the_picture_is_light():
    pictures = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", page("README.md") + page("README.zh.md")))
    assert pictures
    assert all((ROOT / picture).stat().st_size < 100_000 for picture in pictures)


def test_every_config_is_named():
    for config in (ROOT / "config").glob("*.py"):
        family = re.sub(r"_(medium|large|xl)$", "*", config.stem).replace("gpt2*", "gpt2")
        assert f"config/{family}" in page("README.md"), config.name


def test_the_losses_of_the_table_are_those_measured():
    """In both languages the same figures, each in bench/RESULTS.md, which says where it comes from."""
    rows = [[re.findall(r"\d[\d.]*", "|".join(line.split("|")[3:])) for line in page(name).splitlines()
             if line.startswith("|") and line.count("|") == 5] for name in PAGES[:2]]
    assert rows[0] == rows[1]
    losses = {figure for row in rows[0] for figure in row if re.fullmatch(r"\d\.\d+", figure)}
    assert len(losses) > 10
    assert not [figure for figure in losses if figure not in page("bench/RESULTS.md")]


# -- their code ------------------------------------------------------------------------------------------------------

def serve():
    """Run command lines that come through the socket, each in a fork, with its standard streams, until killed."""
    import signal

    import tiktoken
    import torch._dynamo  # noqa: F401, which optimizers import, slowly: once is enough

    import convert
    import prepare
    import sample
    import train
    from inkling.huggingface import GPT2_PATTERN
    from support import cli, report, runtime, sources

    programs = {"train.py": train, "prepare.py": prepare, "sample.py": sample, "convert.py": convert,
                "inkling/report.py": report}
    here, text = Path.cwd(), Path("book.txt").resolve()
    ROOT = runtime.ROOT = here                  # where data/ is
    sys.modules["matplotlib"] = None                    # pictures take most of a toy run's time
    for settings in prepare.SETS.values():              # every text that would be downloaded is the book
        if "sha256" in settings:
            settings["sha256"] = runtime.sha256(text)
    sources.download = lambda url, path, sha256="": (path.parent.mkdir(parents=True, exist_ok=True),
                                                     shutil.copy(text, path)) and ("", "")
    # GPT-2's and GPT-4's tokenizers with a single merge, instead of those that tiktoken downloads.
    ranks = {bytes([value]): value for value in range(256)} | {b"th": 256}
    tiktoken.get_encoding = lambda name: tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 257})

    def command(words: list):
        if any(tuple(words[:len(known)]) == known for known in NOT_RUN):
            needed = words[words.index("-r") + 1] if "-r" in words else "book.txt"
            return 0 if Path(needed).is_file() else f"no file {needed}"
        if words[0] == "torchrun":                      # several processes: tests/test_processes.py
            from torch.distributed.run import parse_args

            started = parse_args(words[1:])
            words = ["python", started.training_script, *started.training_script_args]
        if words == ["python", "-"]:
            exec(compile(sys.stdin.read(), "README.md", "exec"), {"__name__": "__main__"})
            return 0
        if words[0] != "python" or words[1:2] == [] or words[1] not in programs:
            return f"what is {' '.join(words)}?"
        program, argv = programs[words[1]], words[2:]
        if program is train:                            # rules that the toy settings would hide
            if problems := train.Config(**cli.parse(train.Config, argv, "").values).problems():
                return "; ".join(problems)
            argv += flags(max_iters=3) if "--init_from=resume" in argv else flags(**TOY)
        if program is sample:
            argv += ["--max_new_tokens=3", "--device=cpu", "--compile=False"]
        if program is report:                           # draws, or does nothing
            del sys.modules["matplotlib"]
        sys.argv = [words[1], *argv]
        cli.run(program.main)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            message, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
            if os.fork():
                for stream in streams:
                    os.close(stream)
                connection.close()
                continue
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            sys.stdin, sys.stdout, sys.stderr = (open(number, mode, encoding="utf-8")      # noqa: SIM115, to the end
                                                 for number, mode in enumerate("rww"))
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    code = command(message.decode().split("\0"))
                except SystemExit as left:
                    code = left.code
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                if isinstance(code, str):
                    print(code, file=sys.stderr)
                    code = 2
                sys.stdout.flush()
            connection.sendall(bytes([code or 0]))
            os._exit(0)


STAND_IN = f"""#!{sys.executable} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("socket")
    socket.send_fds(server, ["\\0".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode()], [0, 1, 2])
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Run a block in a folder that holds what a reader has: the checkout, texts, and a small GPT-2 in the cache."""
    folder = tmp_path_factory.mktemp("reader")
    with contextlib.chdir(folder):
        yield from in_folder(folder)


def in_folder(folder: Path):
    shutil.copytree(ROOT / "config", "config")
    for name in ("data/fables/input.txt", "data/fables_zh/input.csv", "requirements.txt", "requirements-dev.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, name)
    fables = Path("data/fables/input.txt").read_text(encoding="utf-8")
    Path("book.txt").write_text(fables[:20_000] + "".join(sorted(set(fables))), encoding="utf-8")
    Path("chapter.txt").write_text(fables[20_000:30_000], encoding="utf-8")
    with open("data/fables_zh/input.csv", encoding="utf-8", newline="") as file:
        chinese = ["".join(row) for row in csv.reader(file)]
    Path("novel.txt").write_text("\n".join(chinese), encoding="gb18030")
    Path("poems.txt").write_text("\n".join(chinese), encoding="utf-8")
    with open("poems.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["title", "text"], *(["title", poem] for poem in chinese)])
    Path("bin").mkdir()
    for name in ("python", "torchrun", "pip", "hf"):
        Path("bin", name).write_text(STAND_IN, encoding="utf-8")
        Path("bin", name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(folder / "hf"),
           "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        env.pop(name, None)
    server = subprocess.Popen([sys.executable, "-c", "import test_readme; test_readme.serve()"], env=env,
                              stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert server.stdout.readline() == b"ready\n"

        def bash(code: str, language: str = "sh"):
            script = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else ["bin/python", "-"]
            return subprocess.run(script, env=env, capture_output=True, text=True, encoding="utf-8", timeout=120,
                                  **({"stdin": subprocess.DEVNULL} if language == "sh" else {"input": code}))

        gpt2 = [f"--{name}={value}" for name, value in dict(
            positions="learned", norm="layernorm", norm_gain=True, embed_norm=False, mlp="gelu_tanh", bias=True,
            qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0, tie_weights=True, init="gpt2").items()]
        made = bash(f"""python prepare.py book.txt --name=bytes --tokenizer=gpt2
                        python train.py --dataset=bytes --out_dir=small {' '.join(gpt2)}
                        python convert.py export small/ckpt.pt --out=hf/hub/models--gpt2/snapshots/one
                        mkdir hf/hub/models--gpt2/refs && printf one > hf/hub/models--gpt2/refs/main
                        mkdir -p path/to && cp -r hf/hub/models--gpt2/snapshots/one path/to/folder""")
        assert made.returncode == 0, made.stderr
        yield bash
    finally:
        server.kill()
        server.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the stand-ins need fork and Unix sockets")
def test_every_command_works_as_typed(bash):
    for name in ("README.md", "bench/RESULTS.md"):
        for language, code in blocks(name):
            if language:
                done = bash(code, language)
                assert done.returncode == 0, f"{name}:\n{code}\n{done.stdout[-500:]}{done.stderr}"
                assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the stand-ins need fork and Unix sockets")
def test_a_wrong_command_would_be_noticed(bash):
    for code in ("python trian.py", "python train.py --n_layers=3", "python train.py --n_embd=255",
                 "python sample.py --ckpt=none",
                 "python prepare.py nowhere.txt", "pip install -r require.txt", "python train.py config/nothing.py",
                 "torchrun --standalone --nproc_per_nodes=4 train.py", "false | cat", "python sample.py --help=3",
                 "hf download x", "python prepare.py fables && python train.py --dataset=fable",
                 "python support/report.py out/none"):
        assert bash(code).returncode, code
    assert bash("import nothing", "python").returncode
