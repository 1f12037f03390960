"""A reader's folder for the commands of the READMEs: a copy of the checkout, with texts and a small GPT-2 in the cache.

Bash runs the commands as they stand. The words `python`, `torchrun`, `pip` and `hf` are stand-ins there: they send
their command line to `serve`, a process that has imported the programs and runs each command in a fork of itself, in
toy size and without a network. For POSIX systems, the only ones that fork."""

import contextlib
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("python", "torchrun", "pip", "hf")
TOY = ["--n_layer=1", "--n_head=2", "--n_kv_head=0", "--n_embd=16", "--block_size=32", "--batch_size=2",
       "--gradient_accumulation_steps=1", "--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--sample_tokens=4",
       "--device=cpu", "--dtype=float32", "--compile=False"]
GPT2 = ["--positions=learned", "--norm=layernorm", "--norm_gain=True", "--embed_norm=False", "--mlp=gelu_tanh",
        "--bias=True", "--qk_norm=False", "--logit_cap=0", "--shortcuts=False", "--ngrams=0", "--tie_weights=True",
        "--init=gpt2"]
NOT_RUN = {                             # the beginning of a command, and why it is not run
    ("pip", "install"): "needs a network; tests run where everything is installed",
    ("hf", "upload"): "needs a network and an account",
    ("python", "-m", "pytest"): "is what runs here",
}
STAND_IN = f"""#!{sys.executable} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("socket")
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    socket.send_fds(server, ["\\0".join(words).encode()], [0, 1, 2])
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


# -- the folder ------------------------------------------------------------------------------------------------------

def copy_checkout():
    """What the programs need, to the current folder."""
    for program in ROOT.glob("*.py"):
        shutil.copy(program, program.name)
    for folder in ("inkling", "config", "data/fables", "data/fables_zh"):
        shutil.copytree(ROOT / folder, folder, ignore=shutil.ignore_patterns("__pycache__", "*.bin", "*.json", ".lock"))
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, name)


def write_texts():
    """The texts that a reader is told to bring."""
    fables = Path("data/fables/input.txt").read_text(encoding="utf-8")
    every_character = "".join(sorted(set(fables)))
    Path("book.txt").write_text(fables[:20_000] + every_character, encoding="utf-8")
    Path("chapter.txt").write_text(fables[20_000:30_000], encoding="utf-8")
    with open("data/fables_zh/input.csv", encoding="utf-8", newline="") as file:
        chinese = ["".join(row) for row in csv.reader(file)]
    Path("novel.txt").write_text("\n".join(chinese), encoding="gb18030")
    Path("poems.txt").write_text("\n".join(chinese), encoding="utf-8")
    shutil.copy("data/fables_zh/input.csv", "table.csv")
    with open("poems.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(["title", "text"])
        csv.writer(file).writerows(["title", poem] for poem in chinese)


def write_stand_ins():
    Path("bin").mkdir()
    for word in WORDS:
        Path("bin", word).write_text(STAND_IN, encoding="utf-8")
        Path("bin", word).chmod(0o755)


class Reader:
    """Runs blocks of code in `folder`; use it as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(folder / "hf"),
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
            self.env.pop(name, None)

    def __enter__(self):
        with contextlib.chdir(self.folder):
            copy_checkout()
            write_texts()
            write_stand_ins()
        self.server = subprocess.Popen([sys.executable, __file__], env=self.env, cwd=self.folder,
                                       stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self.server.stdout.readline() == b"ready\n"
        self.make_gpt2()
        return self

    def __exit__(self, *error):
        self.server.kill()
        self.server.wait()
        self.server.stdout.close()

    def make_gpt2(self):
        """A small GPT-2 where `--init_from=gpt2` and `convert.py import path/to/folder` look for one."""
        done = self.run(f"""python prepare.py book.txt --name=bytes --tokenizer=gpt2
                            python train.py --dataset=bytes --out_dir=small {' '.join(GPT2)}
                            python convert.py export small/ckpt.pt --out=hf/hub/models--gpt2/snapshots/one
                            mkdir hf/hub/models--gpt2/refs && printf one > hf/hub/models--gpt2/refs/main
                            mkdir -p path/to && cp -r hf/hub/models--gpt2/snapshots/one path/to/folder""")
        assert done.returncode == 0, done.stderr

    def run(self, code: str, language: str = "sh"):
        """Run a block of shell or Python; returns the finished process, its output as text."""
        if language == "sh":
            how = dict(args=["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL)
        else:
            how = dict(args=["bin/python", "-"], input=code)
        return subprocess.run(**how, cwd=self.folder, env=self.env, capture_output=True, text=True, encoding="utf-8",
                              timeout=120)


# -- the server ------------------------------------------------------------------------------------------------------

def toy_encodings():
    """GPT-2's and GPT-4's tokenizers have a single merge."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {bytes([value]): value for value in range(256)} | {b"th": 256}
    tiktoken.get_encoding = lambda name: tiktoken.Encoding(
        name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})


def cut_the_network():
    """Every text that would be downloaded is the book, and the tokenizers are toys."""
    import prepare

    for name, settings in prepare.SETS.items():
        if settings.pop("url", None):
            settings.pop("sha256", None)
            settings.pop("val_url", None)
            Path("data", name).mkdir()
            shutil.copy("book.txt", Path("data", name, "input.txt"))
    toy_encodings()


def run_command(words: list):
    """Run one command line; returns its exit code, or what is wrong with it."""
    import convert
    import prepare
    import sample
    import train
    from inkling import cli, plots

    if any(tuple(words[:len(known)]) == known for known in NOT_RUN):
        needed = words[words.index("-r") + 1] if "-r" in words else "book.txt"
        return 0 if Path(needed).is_file() else f"no file {needed}"
    if words[0] == "torchrun":                      # several processes: tests/test_processes.py
        from torch.distributed.run import parse_args

        launch = parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if words == ["python", "-"]:
        exec(compile(sys.stdin.read(), "README.md", "exec"), {"__name__": "__main__"})
        return 0
    if words[:3] == ["python", "-m", "inkling.plots"]:
        del sys.modules["matplotlib"]
        words = ["python", "inkling.plots", *words[3:]]
    programs = {"train.py": train, "prepare.py": prepare, "sample.py": sample, "convert.py": convert,
                "inkling.plots": plots}
    if words[0] != "python" or len(words) < 2 or words[1] not in programs:
        return f"what is {' '.join(words)}?"
    program, argv = words[1], words[2:]
    if program == "train.py":
        cli.check(train.Config(**cli.parse(train.Config, argv, "").values))     # before the toy settings hide it
        argv += ["--max_iters=3"] if "--init_from=resume" in argv else TOY
    if program == "sample.py":
        argv += ["--max_new_tokens=3", "--device=cpu", "--compile=False"]
    sys.argv = [program, *argv]
    cli.run(programs[program].main)


def answer(connection: socket.socket, words: list, streams: list):
    """Run a command in this process, a fork, with the client's standard streams; never returns."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, encoding="utf-8")      # noqa: SIM115, to the end
                                         for number, mode in enumerate("rww"))
    code = 1
    try:
        code = run_command(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:          # whatever it is, the client wants to see it
        traceback.print_exc()
        code = getattr(error, "code", 1)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 2
    with contextlib.suppress(OSError):      # as in `python sample.py | head`
        sys.stdout.flush()
        sys.stderr.flush()
    connection.sendall(bytes([code or 0]))
    os._exit(0)


def serve():
    """Answer command lines that come through the socket, each in a fork, until killed."""
    import torch._dynamo  # noqa: F401, which optimizers import, slowly: once is enough

    import convert  # noqa: F401
    import sample  # noqa: F401, and with it train and prepare
    from inkling import plots  # noqa: F401

    sys.modules["matplotlib"] = None        # pictures take most of a toy run's time
    cut_the_network()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            message, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
            if os.fork() == 0:
                answer(connection, message.decode().split("\0"), streams)
            for stream in streams:
                os.close(stream)
            connection.close()


if __name__ == "__main__":
    serve()
