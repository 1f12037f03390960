"""The three programs as a person meets them: from a text to a model to new text; answers to mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, ZYGOTE, flags, inside, one_line_error

import convert
import prepare
import sample
import train
from inkling import plots

TEXT = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:8000]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)        # they take most of a toy run's time


def process(folder: Path, program: str, *words, **env):
    env = os.environ | dict(OMP_NUM_THREADS="1") | env
    return subprocess.run([sys.executable, str(ROOT / program), *words], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=120, encoding="utf-8", errors="replace")


def contents(folder: Path) -> dict:
    """Every file under `folder`; not the lock, which names the process that held it last."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A folder where a person has prepared, trained and sampled, a process each; and what these said."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    said = [process(folder, "prepare.py", "book.txt", "--data_dir=sets"),
            process(folder, "train.py", *flags(**TOY | dict(dataset="book")), "--data_dir=sets"),
            process(folder, "sample.py", "--start=The fox", "--max_new_tokens=20", "--device=cpu")]
    return folder, said


@pytest.fixture
def alone(book, tmp_path, monkeypatch):
    """An empty folder to stand in, with nothing but a copy of the book's ckpt.pt."""
    shutil.copy(book[0] / "out" / "book" / "ckpt.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(data_dir, tmp_path, monkeypatch):
    """start(max_iters=3): train.py in this process and an empty folder, with the toy settings and these."""
    monkeypatch.chdir(tmp_path)
    return lambda *words, **changes: inside(
        train.main, *flags(**TOY | dict(data_dir=data_dir, max_iters=2, sample_tokens=0) | changes), *words)


def write(*words):
    """sample.py in this process."""
    return inside(sample.main, "--device=cpu", "--max_new_tokens=20", *words)


# -- from a text to a text

def test_prepare_train_sample(book):
    folder, said = book
    assert [(done.returncode, done.stderr) for done in said[:2]] == [(0, ""), (0, "")]
    assert said[0].stdout.startswith(f"sets/book: {len(TEXT):,} characters")
    assert set(contents(folder / "sets" / "book")) == {"train.bin", "val.bin", "meta.json"}
    assert set(contents(folder / "out" / "book")) >= {"ckpt.pt", "last.pt", "log.csv"}
    assert said[1].stdout.splitlines()[-1] == "next     python sample.py --out_dir=out/book"
    assert said[2].returncode == 0
    assert said[2].stderr == f"sampling from {Path('out/book/ckpt.pt')}\n"
    assert said[2].stdout.startswith("The fox")
    assert len(said[2].stdout) == len("The fox") + 20 + 1           # characters, and the end of the line


def test_the_laptop_command_line_of_nanogpt_trains(start):
    line = """--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12
        --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"""
    outcome = start(*line.split(), "--max_iters=1", "--eval_iters=1")       # a moment of it
    assert outcome.returncode == 0
    assert "4 layers, 4 heads, 128 wide, context 64" in outcome.stdout


def test_a_run_is_named_for_its_config_file_or_else_its_data_set(start):
    Path("small.py").write_text("weight_decay = 0.5\n")
    assert start("small.py").returncode == 0
    assert start().returncode == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["small", "toy"]
    assert torch.load("out/small/last.pt")["config"]["weight_decay"] == 0.5


# -- runs after runs

def test_eval_only_evaluates_and_writes_nothing(start, tmp_path):
    outcome = start(eval_only=True, sample_tokens=8)
    assert outcome.returncode == 0
    assert "eval " in outcome.stdout
    assert list(tmp_path.iterdir()) == []


def test_eval_only_tells_the_loss_of_a_finished_run_and_leaves_it_as_it_was(start):
    start()
    before, loss = contents(Path("out")), torch.load("out/toy/last.pt")["losses"]["val"]
    outcome = start("--init_from=resume", eval_only=True)
    assert outcome.returncode == 0
    assert contents(Path("out")) == before
    assert f"val {loss:.4f}" in outcome.stdout


def test_resuming_after_the_end_changes_nothing(start):
    start()
    before = contents(Path("out"))
    outcome = start("--init_from=resume")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert contents(Path("out")) == before


def test_a_resumed_run_is_not_told_of_the_set_that_it_trains_on(book, monkeypatch):
    monkeypatch.chdir(book[0])
    outcome = inside(train.main, "--init_from=resume", "--out_dir=out/book", "--eval_only=True")
    assert outcome.returncode == 0, outcome.stderr
    assert "your own in" not in outcome.stdout


def test_resuming_with_more_steps_goes_on(start):
    start()
    assert start("--init_from=resume", max_iters=3).returncode == 0
    assert torch.load("out/toy/last.pt")["step"] == 3


def test_a_config_file_changes_nothing_on_resume(start):
    start()
    Path("other.py").write_text("weight_decay = 0.5\nbias = True\n")
    assert start("other.py", "--init_from=resume", "--out_dir=out/toy", max_iters=3).returncode == 0
    config = torch.load("out/toy/last.pt")["config"]
    assert (config["weight_decay"], config["bias"]) == (train.Config.weight_decay, train.Config.bias)


def test_auto_starts_and_then_goes_on(start):
    for steps in (1, 2):
        assert start("--init_from=auto", max_iters=steps).returncode == 0
    assert torch.load("out/toy/last.pt")["step"] == 2
    assert [path.name for path in Path("out").iterdir()] == ["toy"]


def test_resuming_with_another_model_is_refused(start):
    start()
    before = contents(Path("out"))
    outcome = start("--init_from=resume", n_layer=3, block_size=16)
    one_line_error(outcome, "out/toy/last.pt", "n_layer=3 (the run has 2)", "block_size=16 (the run has 32)")
    assert contents(Path("out")) == before


def test_a_path_fine_tunes_the_weights_with_a_schedule_of_its_own(start):
    start(n_layer=1)
    outcome = start("--init_from=out/toy/ckpt.pt", "--out_dir=tuned", n_layer=1, max_iters=0)
    assert outcome.returncode == 0
    given, tuned = torch.load("out/toy/ckpt.pt"), torch.load("tuned/ckpt.pt")
    assert tuned["step"] == 0
    assert all(torch.equal(given["model"][name], tuned["model"][name]) for name in given["model"])
    assert start("--init_from=out/toy/ckpt.pt", "--out_dir=tuned", n_layer=1, max_iters=3).returncode == 0
    assert torch.load("tuned/last.pt")["step"] == 3
    one_line_error(start("--init_from=out/toy/ckpt.pt", "--out_dir=tuned", n_layer=2), "n_layer=2", "1")


@pytest.mark.parametrize(("size", "kept"), [(16, 16), (64, 32)])
def test_a_file_may_crop_the_context_but_not_stretch_it(start, data_dir, size, kept):
    start()
    Path("tune.py").write_text(f"block_size = {size}\n")
    words = [word for word in flags(**TOY, data_dir=data_dir) if not word.startswith("--block_size")]
    outcome = inside(train.main, *words, "tune.py", "--init_from=out/toy/ckpt.pt")
    assert outcome.returncode == 0, outcome.stderr
    assert torch.load("out/tune/ckpt.pt")["config"]["block_size"] == kept


def test_a_folder_called_gpt2_is_a_run_only_if_it_holds_one(start, monkeypatch):
    start("--out_dir=gpt2")
    assert train.load("gpt2")[0].cfg.n_layer == 2
    Path("gpt2/ckpt.pt").unlink()
    asked = []
    monkeypatch.setattr("convert.import_model", lambda name: asked.append(name) or torch.load("out/toy/ckpt.pt"))
    start()
    train.load("gpt2")
    assert asked == ["gpt2"]                            # OpenAI's, whatever else may lie in that folder


def test_fine_tuning_brings_the_model_of_its_checkpoint(start):
    start(n_layer=1)
    Path("tune.py").write_text("bias = True\n")         # a file's settings yield to the checkpoint's
    assert start("tune.py", "--init_from=out/toy/ckpt.pt", n_layer=1).returncode == 0
    assert torch.load("out/tune/ckpt.pt")["config"]["bias"] is False
    one_line_error(start("--bias", "--init_from=out/toy/ckpt.pt", n_layer=1), "bias=True (the run has False)")


def test_a_data_set_with_another_tokenizer_is_refused(start, book):
    start()
    other = ["--dataset=book", f"--data_dir={book[0] / 'sets'}", "--out_dir=tuned"]
    one_line_error(start("--init_from=out/toy/ckpt.pt", *other), "book", "tokenizer")
    assert not Path("tuned").exists()


def test_a_new_run_in_a_used_folder_moves_the_old_one_aside_whole(start):
    kept = []
    for number in range(3):
        outcome = start("--out_dir=run", seed=number)
        assert outcome.returncode == 0
        said = [line for line in outcome.stdout.splitlines() if "moved to" in line]
        assert len(said) == (number > 0)
        assert all(f"moved to run.{number}" in line and "--init_from=resume" in line for line in said)
        kept.append(contents(Path("run")))
    assert [contents(Path(name)) for name in ("run.1", "run.2", "run")] == kept


def test_a_second_run_on_one_folder_touches_nothing_and_names_the_first(start, data_dir):
    first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags(**TOY | dict(max_iters=10**6)),
                              f"--data_dir={data_dir}"], stdout=subprocess.DEVNULL)
    try:
        while not Path("out/toy/last.pt").exists():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)               # it keeps the folder, and writes no more
        os.waitpid(first.pid, os.WUNTRACED)
        before = contents(Path("out"))
        for how in ("scratch", "resume", "auto"):
            one_line_error(start(f"--init_from={how}"), "toy is in use by", f"process {first.pid}")
        assert contents(Path("out")) == before
        assert [path.name for path in Path("out").iterdir()] == ["toy"]
    finally:
        first.kill()
        first.wait()
    assert start("--init_from=resume", max_iters=0).returncode != 2       # the lock has died with its process


# -- sampling

def test_the_newest_checkpoint_is_taken_and_named(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("a", 30), ("b", 10), ("c/d", 20)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        shutil.copy(book[0] / "out" / "book" / "ckpt.pt", folder)
        os.utime(folder / "ckpt.pt", (10**9 - age, 10**9 - age))
    assert write().stderr == f"sampling from {Path('out/b/ckpt.pt')}\n"
    os.utime("out/c/d/ckpt.pt")
    assert write().stderr == f"sampling from {Path('out/c/d/ckpt.pt')}\n"
    assert write("--out_dir=out/a").stderr == f"sampling from {Path('out/a/ckpt.pt')}\n"


@pytest.mark.parametrize("how", [[], ["--temperature=0"], ["--top_k=0", "--top_p=0.5"], ["--compile=False"]])
def test_one_file_is_the_whole_model(alone, how):
    outcome = write("--ckpt=ckpt.pt", "--start=The", *how)          # no data set and no run lie here
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("The")
    assert len(outcome.stdout) == len("The") + 20 + 1
    assert [path.name for path in alone.iterdir()] == ["ckpt.pt"]


def test_last_pt_can_be_sampled_from(book):
    outcome = write(f"--ckpt={book[0] / 'out' / 'book' / 'last.pt'}")
    assert outcome.returncode == 0
    assert len(outcome.stdout) == 20 + 1


def test_a_prompt_from_a_file(alone):
    (alone / "prompt.txt").write_bytes("\ufeffThe fox\r\n".encode())      # as an editor on Windows writes it
    outcome = write("--ckpt=ckpt.pt", "--start=FILE:prompt.txt")
    assert outcome.returncode == 0
    assert outcome.stdout.startswith("The fox\n")


@pytest.mark.parametrize("prompt", ["", "a", "the tortoise and the hare " * 10])      # the book's context: 32
def test_prompts_of_any_length(alone, prompt):
    outcome = write("--ckpt=ckpt.pt", f"--start={prompt}")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith(prompt)
    assert len(outcome.stdout) == len(prompt) + 20 + 1


def test_the_same_seed_gives_the_same_text(alone):
    texts = [write("--ckpt=ckpt.pt", f"--seed={seed}", "--temperature=2").stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_of_several_samples_the_second_is_what_the_next_seed_gives(alone):
    both = write("--ckpt=ckpt.pt", "--seed=1", "--num_samples=2").stdout
    assert both.startswith(write("--ckpt=ckpt.pt", "--seed=1").stdout)
    assert write("--ckpt=ckpt.pt", "--seed=2").stdout in both


# -- mistakes: one line, exit code 2, nothing written

@pytest.mark.parametrize(("program", "words", "parts"), [
    ("prepare.py", ["missing.txt"], ["no file missing.txt", "fables"]),
    ("train.py", ["--learning_rat=1"], ["--learning_rat", "did you mean --learning_rate?"]),
    ("sample.py", [], ["no ckpt.pt under out", "python train.py", "--ckpt="]),
])
def test_a_mistake_ends_the_process_with_two_and_one_line(tmp_path, program, words, parts):
    outcome = ZYGOTE.run(program, *words, folder=tmp_path)
    one_line_error(outcome, f"{program}: ", *parts)
    assert outcome.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "parts"), [
    (["--n_layer=six"], ["n_layer=six", "a whole number"]),
    (["--n_head=6", "--n_embd=400"], ["n_head=6 must divide n_embd=400"]),
    (["--tie_weights", "--init=zero"], ["tie_weights=True", "init"]),
    (["nowhere.py"], ["no config file nowhere.py"]),
    (["nowhere"], ["nowhere", "--key=value"]),
    (["--dataset=nowhere"], ["nowhere", "python prepare.py", "--name=nowhere"]),
    (["--data_dir=nowhere"], ["nowhere/toy", "python prepare.py"]),
    (["--block_size=5000"], ["val has 2,000 tokens", "block_size=5000 needs 5001", "lower --block_size",
                             "val_fraction"]),
    (["--sample_start=ℵ"], ["sample_start='ℵ'", "the tokenizer has no 'ℵ'"]),
    (["--device=tpu"], ["device=tpu: no such device; use auto, cpu"]),
    (["--device=meta"], ["device=meta", "auto"]),
    (["--device=cuda:99"], ["device=cuda:99", "auto"]),
    (["--init_from=resume"], ["no checkpoint", "out/toy/last.pt"]),
    (["--init_from=resume", "--out_dir=elsewhere"], ["no checkpoint", "elsewhere/last.pt"]),
    (["--init_from=nowhere.pt"], ["no checkpoint nowhere.pt"]),
    (["--init_from=."], [". is a folder", "ckpt.pt"]),
    (["--dataset=" + "x" * 300], ["xxx"]),               # longer than a file system takes
    (["--data_dir=" + "x" * 300], ["xxx"]),
])
def test_mistakes_in_training(start, tmp_path, words, parts):
    one_line_error(start(*words), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "..", "../toy", "a/b", "/etc", ".x", "_x", "a b", "a\n", "ä/", "a\\"])
def test_names_of_data_sets_are_plain(start, tmp_path, name):
    (tmp_path / "text").write_text(TEXT)
    for outcome in (start(f"--dataset={name}"), start("--dataset="),
                    inside(prepare.main, "text", f"--name={name}"), inside(prepare.main, "--check", name)):
        one_line_error(outcome, "is not a valid data set name", "letters, digits")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_what_is_not_found_comes_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    one_line_error(inside(prepare.main, "bok.txt"), "no file bok.txt; there is book.txt")
    outcome = inside(prepare.main, "book.txt", "--data_dir=sets")
    assert outcome.stdout.splitlines()[-1].startswith("next     python train.py --dataset=book --data_dir=")
    one_line_error(inside(train.main, "--dataset=bok", "--data_dir=sets"), "did you mean --dataset=book?",
                   "there is book, ")
    one_line_error(inside(train.main, "--dataset=Book", "--data_dir=sets"), "did you mean --dataset=book?")
    one_line_error(inside(train.main, "--dataset=book.txt", "--data_dir=sets"),
                   "python prepare.py book.txt --name=book && python train.py --dataset=book")
    one_line_error(inside(train.main, "--dataset=my book", "--data_dir=sets"), "but my_book is:", "there is book")
    for word in ("--check", "--decode", "--anchors"):
        one_line_error(inside(prepare.main, word, "bok", "--data_dir=sets"), "no data set in sets/bok", "there is book")
        one_line_error(inside(prepare.main, word, "sets/book", "--data_dir=sets"), "its name alone: book")
    one_line_error(inside(train.main, "--dataset=sets/book", "--data_dir=sets"), "its name alone: book")
    for name in ("poem", "book"):
        Path("out", name).mkdir(parents=True)
        Path("out", name, "ckpt.pt").touch()
    both = "there is out/book/ckpt.pt, out/poem/ckpt.pt"
    one_line_error(inside(sample.main, "--out_dir=book"), f"no book/ckpt.pt; {both}")
    for source in ("bok", "out/bok", "out/bok/ckpt.pt", "elsewhere/book/ckpt.pt"):
        one_line_error(inside(sample.main, f"--ckpt={source}"), f"no checkpoint {source}", both)
        one_line_error(inside(sample.main, f"--init_from={source}"), both)
        one_line_error(inside(train.main, f"--init_from={source}"), f"no checkpoint {source}", both)
        one_line_error(inside(convert.main, "page", source, "--out=a.html"), f"no checkpoint {source}", both)
    one_line_error(inside(sample.main, "--ckpt=out"), "out is a folder without a checkpoint", "out/book/ckpt.pt")
    resumed = inside(train.main, "--init_from=resume", "--out_dir=bok")
    one_line_error(resumed, "no run to resume", without="there is out")
    Path("out/poem/last.pt").touch()
    one_line_error(inside(train.main, "--init_from=resume", "--out_dir=bok"), "; there is out/poem/last.pt")
    one_line_error(inside(plots.main, "bok"), "bok holds no run", without="there is")
    Path("out/book/log.csv").touch()
    one_line_error(inside(plots.main, "bok"), "; there is out/book")


@pytest.mark.parametrize(("program", "words", "command"), [
    (sample, ["The fox"], "python sample.py --start='The fox'"),
    (sample, ["The", "fox", "ran"], "python sample.py --start='The fox ran'"),
    (sample, ["--start=The", "fox", "--seed=1"], "in quotes, --start='The fox'"),
    (sample, ["--start", "The", "fox"], "write --start='The fox'"),
    (sample, ["--seed", "1"], "write --seed=1"),
    (sample, ["out/book"], "python sample.py --out_dir=out/book"),
    (sample, ["out/bok"], "python sample.py --out_dir=out/book"),
    (sample, ["book"], "python sample.py --out_dir=out/book"),
    (sample, ["story.txt"], "python sample.py --start=FILE:story.txt"),
    (train, ["--dataset", "book"], "write --dataset=book"),
    (train, ["--dataset=my", "book"], "in quotes, --dataset='my book'"),
    (train, ["story.txt"], "python prepare.py story.txt --name=story && python train.py --dataset=story"),
    (train, ["stroy.txt"], "python prepare.py story.txt --name=story && python train.py --dataset=story"),
    (train, ["我的 小说.txt"], "--name=我的_小说 && "),
    (train, ["book"], "python train.py --dataset=book"),
    (train, ["bok"], "python train.py --dataset=book"),
    (train, ["fables"], "python train.py --dataset=fables"),
    (train, ["out/book"], "python train.py --init_from=out/book --dataset=NAME"),
    (train, ["config"], "; there is config/mine.py"),
    (convert, ["pag", "out/book"], "did you mean page?"),
    (convert, ["import", "out/book"], "python sample.py --out_dir=out/book"),
    (convert, ["import", "out/bok"], "; there is out/book"),
    (convert, ["import", "gpt2-medum"], "nor one of gpt2-medium, "),
    (prepare, ["my book.txt"], "python prepare.py 'my book.txt' --name=my_book"),
    (prepare, ["story.txt", "--name=my story"], "python prepare.py story.txt --name=my_story"),
    (prepare, ["stor"], "; there is story.txt"),
    (prepare, ["fabels"], "the built-in sets are fables, "),
    (prepare, ["story.txt", "--val=stroy.txt"], "no file stroy.txt; there is story.txt"),
    (prepare, ["*.doc"], "no file *.doc"),
    (prepare, ["--adopt", "dta", "--tokenizer=byte"], "no folder dta; there is data"),
    (sample, ["--start=FILE:stroy.txt"], "; there is story.txt"),
    (sample, ["--prompts=stroy.txt"], "; there is story.txt"),
    (sample, ["out/poem"], "you may want: python sample.py --out_dir=out/book"),
    (sample, ["out\\book"], "you may want: python sample.py --out_dir=out/book"),
    (sample, ["--score_tokens"], "add --score=FILE, or leave it out"),
    (sample, ["--score"], "--score needs a value: --score=PATH"),
    (train, ["config/mine"], "did you mean config/mine.py?"),
    (train, ["config\\mine"], "did you mean config/mine.py?"),
    (train, ["resume"], "the same command with --init_from=resume"),
    (train, ["--dataset=data\\book", "--data_dir=data"], "its name alone: book"),
    (train, ["--dataset=data/book/train.bin", "--data_dir=data"], "its name alone: book"),
    (train, ["--init_from=resum"], "did you mean --init_from=resume?"),
    (train, ["--init_from=gpt2-small"], "there is gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
    (train, ["--dataset=boook"], "no data set in"),
    (prepare, ["my", "book.txt"], "in quotes: python prepare.py 'my book.txt' --name=my_book"),
    (prepare, ["name=a", "story.txt"], "as a flag, write --name=a"),
    (prepare, ["story.txt", "－－name=a"], "as a flag, write --name=a"),
    (prepare, ["story.txt", "--nmae", "a"], "write --name=a"),
    (prepare, ["--check=book"], "write --check book"),
    (prepare, ["C:\\books\\story.txt"], "; there is story.txt"),
    (convert, ["page", "book"], "python convert.py page out/book --out=NAME.html"),
])
def test_a_command_that_is_nearly_right_leads_to_the_right_one(tmp_path, monkeypatch, program, words, command):
    monkeypatch.chdir(tmp_path)
    texts = ("story.txt", "my book.txt", "我的 小说.txt")
    for name in (*texts, "data/book/meta.json", "out/book/ckpt.pt", "config/mine.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    outcome = inside(program.main, *words)
    one_line_error(outcome, command)
    assert outcome.stdout == ""             # such as a note on the length of a run that does not begin


def test_the_name_of_a_set_with_a_config_leads_to_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line_error(inside(train.main, "fables"), "python train.py --dataset=fables")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "fables.py").write_text("")
    one_line_error(inside(train.main, "fables"), "python train.py config/fables.py")


@pytest.mark.parametrize(("name", "meant"), [
    ("gpt-2", "gpt2"), ("gpt4", "cl100k_base"), ("gpt-4", "cl100k_base"), ("cl100k", "cl100k_base"),
    ("CL100K_BASE", "cl100k_base"),
    ("bpe2048", "bpe:2048"), ("bpe-4096", "bpe:4096"), ("chars", "char"), ("out/book", "out/book/ckpt.pt"),
    ("book", "out/book/ckpt.pt"), ("data/poem", "data/poem/meta.json"), ("poem", "data/poem/meta.json"),
])
def test_a_tokenizer_that_is_nearly_right_leads_to_the_right_one(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    for path in ("out/book/ckpt.pt", "data/poem/meta.json"):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    Path("text").write_text(TEXT)
    outcome = inside(prepare.main, "text", f"--tokenizer={name}", "--data_dir=sets")
    one_line_error(outcome, "is none of: char, byte", f"did you mean --tokenizer={meant}?")


@pytest.mark.parametrize("out", ["used", "used/run", ".", "x" * 300])
def test_a_folder_that_cannot_be_is_refused(start, tmp_path, out):
    (tmp_path / "used").write_text("a file")
    (tmp_path / "log.csv").write_text("a run that lies where the person stands")
    before = contents(tmp_path)
    one_line_error(start(f"--out_dir={out}"), out[:200])
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("words", "parts"), [
    (["--ckpt=nowhere.pt"], ["no checkpoint nowhere.pt", "python train.py"]),
    (["--ckpt=half"], ["half is a folder"]),
    (["--ckpt=text"], ["text", "nothing was loaded"]),
    (["--out_dir=nowhere"], ["no nowhere/ckpt.pt", "train.py"]),
    (["--out_dir=half"], ["no half/ckpt.pt", "--ckpt=half/last.pt"]),
    (["--ckpt=ckpt.pt", "--start=Köln 猫"], ["--start", "'ö'", "'猫'"]),
    (["--ckpt=ckpt.pt", "--start=FILE:nowhere.txt"], ["nowhere.txt", "No such file"]),
    (["--ckpt=ckpt.pt", "--start=FILE:."], [". is a folder"]),
    (["--ckpt=ckpt.pt", "--start=FILE:ckpt.pt"], ["ckpt.pt is not UTF-8 text", "offset"]),
    (["--ckpt=ckpt.pt", "--top_p=0"], ["top_p=0.0"]),
    (["--ckpt=ckpt.pt", "--device=tpu"], ["device=tpu"]),
    (["--ckpt=" + "x" * 300], ["xxx"]),
    (["--out_dir=" + "x" * 300], ["xxx"]),
])
def test_mistakes_in_sampling(alone, words, parts):
    (alone / "text").write_text(TEXT)
    (alone / "half").mkdir()
    shutil.copy("ckpt.pt", "half/last.pt")
    outcome = write(*words)
    one_line_error(outcome, *parts)
    assert outcome.stdout == ""


@pytest.mark.parametrize(("words", "parts"), [
    ([], ["fables", "text files"]),
    (["nowhere.txt"], ["no file nowhere.txt"]),
    (["text", "text"], ["--name=NAME"]),
    (["text", "--name=fables"], ["name=fables belongs to a built-in set"]),
    (["text", "--tokenizer=chars"], ["tokenizer='chars'", "char, byte"]),
    (["text", "--val_fraction=1"], ["val_fraction=1.0", "below 1"]),
    (["text", "--val_fraction=-0.1"], ["val_fraction=-0.1", "at least 0"]),
    (["text", "--val_fraction=half"], ["val_fraction=half", "a number"]),
    (["text", "-n=x"], ["unknown flag -n=x"]),
    (["latin"], ["latin is not UTF-8", "0xe4", "offset 5"]),
    (["empty"], ["empty", "no text"]),
    (["folder", "--name=x"], ["folder is a folder without text files"]),
    (["nowhere", "--check"], ["no data set in", "python prepare.py YOUR_TEXT_FILE --name=nowhere"]),
    (["text", "--data_dir=empty"], ["empty"]),                      # a file, where a folder should be
    (["x" * 300], ["xxx"]),
])
def test_mistakes_in_preparing(tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "latin").write_bytes("Der Bär".encode("latin1"))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    one_line_error(inside(prepare.main, "--data_dir=sets", *words), *parts)
    assert contents(tmp_path) == before


def truncated(folder: Path):
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-1])


def of_another_type(folder: Path):
    rewrite(folder, lambda meta: meta.update(dtype="uint16"))


def too_short(folder: Path):
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:32])
    rewrite(folder, lambda meta: meta["splits"]["val"].update(tokens=32))


def with_unknown_ids(folder: Path):
    np.full(2000, 255, np.uint8).tofile(folder / "val.bin")


def of_the_future(folder: Path):
    rewrite(folder, lambda meta: meta.update(format=2))


def without_counts(folder: Path):
    rewrite(folder, lambda meta: meta.pop("splits"))


def rewrite(folder: Path, change):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize(("damage", "parts"), [
    (truncated, ["val.bin has 1,999 bytes", "2,000 tokens of uint8", "python prepare.py"]),
    (of_another_type, ["meta.json", "dtype=uint16", "python prepare.py"]),
    (too_short, ["val has 32 tokens", "block_size=32 needs 33", "lower --block_size", "--val_fraction"]),
    (with_unknown_ids, ["val.bin holds token id 255", "vocab_size=", "python prepare.py"]),
    (of_the_future, ["meta.json has format 2", "python prepare.py"]),
    (without_counts, ["meta.json is damaged", "splits", "python prepare.py"]),
    (lambda folder: (folder / "meta.json").write_text("{"), ["meta.json is damaged", "python prepare.py"]),
    (lambda folder: (folder / "val.bin").unlink(), ["val.bin is missing", "python prepare.py"]),
])
def test_damaged_data_is_refused_before_the_first_step(start, data_dir, tmp_path, damage, parts):
    shutil.copytree(data_dir / "toy", tmp_path / "sets" / "toy")
    damage(tmp_path / "sets" / "toy")
    outcome = start(data_dir=tmp_path / "sets")
    one_line_error(outcome, *parts)
    assert "step " not in outcome.stdout
    assert not Path("out/toy/ckpt.pt").exists()


def test_an_id_that_evaluation_does_not_meet_is_refused_at_the_batch_that_does(start, data_dir, tmp_path):
    shutil.copytree(data_dir / "toy", tmp_path / "sets" / "toy")
    ids = np.fromfile(tmp_path / "sets" / "toy" / "train.bin", np.uint8)
    cfg = train.Config(**TOY)
    read_before = [*train.eval_windows(len(ids), cfg, 16), *train.window_starts(0, cfg, len(ids))]
    places = {start + offset for start in read_before for offset in range(cfg.block_size + 1)}
    window = train.window_starts(1, cfg, len(ids))[0] + np.arange(cfg.block_size)
    ids[[place for place in window if place not in places]] = 255      # what the second update is the first to read
    ids.tofile(tmp_path / "sets" / "toy" / "train.bin")
    outcome = start(data_dir=tmp_path / "sets")
    one_line_error(outcome, "train.bin holds token id 255", "--check")
    assert "eval 0/2" in outcome.stdout
    assert "step 1/2" in outcome.stdout
    assert "step 2/2" not in outcome.stdout
    one_line_error(inside(prepare.main, "--check", "toy", "--data_dir=sets"), "token id 255")


# -- the other way to end

def test_a_loss_that_is_not_finite_ends_the_process_with_three(data_dir, tmp_path, monkeypatch):
    # A decay so strong that every weight's sign turns and its size explodes: not finite after a few steps.
    monkeypatch.chdir(tmp_path)
    settings = TOY | dict(optimizer="adamw", weight_decay=1e9, learning_rate=1e9, max_iters=50)
    outcome = ZYGOTE.run("train.py", *flags(**settings, data_dir=data_dir), folder=tmp_path)
    assert outcome.returncode == 3
    assert len(outcome.stderr.splitlines()) == 1
    assert "not finite" in outcome.stderr
    assert "--learning_rate" in outcome.stderr
    assert all(tensor.isfinite().all() for tensor in torch.load("out/toy/last.pt")["model"].values())


# -- consoles

def test_a_console_that_lacks_a_character_does_not_end_a_run(tmp_path):
    # As on Windows, where output that goes to a file or a pipe is in the ANSI code page.
    (tmp_path / "cats.txt").write_text("Katze 猫 " * 500, encoding="utf-8")
    prepare.write_set(tmp_path / "cats", [tmp_path / "cats.txt"], "char", 0.1)
    settings = TOY | dict(dataset="cats", max_iters=1, sample_start="猫", data_dir=tmp_path)
    outcome = process(tmp_path, "train.py", *flags(**settings), PYTHONIOENCODING="cp1252")
    assert outcome.returncode == 0
    assert "sample at step 1" in outcome.stdout
