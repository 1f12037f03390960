"""Config files and --key=value flags: read by declared type, checked by rules, never evaluated, refused in one line."""

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import TOY, flags, inside, one_line_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
import prepare
import sample
import train
from inkling import cli, plots
from inkling.cli import (
    AutoPath,
    FilePath,
    Fraction,
    PositiveInt,
    Texts,
    UserError,
    above,
    at_least,
    check,
    comments,
    exit_code,
    from_dict,
    help_text,
    parse,
    printable,
    problems,
)
from train import Config, load

PROGRAMS = {"train": (train.main, Config), "prepare": (prepare.main, prepare.Options),
            "sample": (sample.main, sample.Options), "convert": (convert.main, convert.Options)}


def choices(kind) -> tuple:
    return get_args(kind) if get_origin(kind) is Literal else ()


def read(*words) -> dict:
    return parse(Config, list(words), "").values


def train_with(*words):
    """train.py up to its search for a data set, which there is not."""
    return inside(train.main, *words, "--dataset=nowhere")


@pytest.fixture
def config(tmp_path):
    """Write a config file; returns its path."""
    def write(text: str, name: str = "mine.py") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


# -- flags

@pytest.mark.parametrize(("flag", "value"), [
    ("--max_iters=2000", 2000), ("--max_iters=1e3", 1000), ("--max_iters=0", 0), ("--seed=-1", -1),
    ("--learning_rate=1", 1.0), ("--learning_rate=1e-4", 1e-4), ("--min_lr=6E-4", 6e-4), ("--dropout=0", 0.0),
    ("--bias=true", True), ("--bias=False", False), ("--bias=1", True), ("--bias=0", False), ("--bias", True),
    ("--compile=auto", "auto"), ("--compile=false", False), ("--compile=True", True), ("--compile", True),
    ("--qkv_bias=FALSE", False), ("--dtype=float32", "float32"), ("--batch-size=8", 8),
    ("--out_dir=1", "1"), ("--out_dir=None", "None"), ("--out_dir=", ""), ("--sample_start=a=b", "a=b"),
    ("--sample_start=--x=y", "--x=y"), ("--sample_start= Größe 猫\n", " Größe 猫\n"), ("--dataset=0", "0"),
])
def test_a_flag_is_read_by_the_declared_type_of_its_field(flag, value):
    parsed, = read(flag).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("flag", "expected"), [
    ("--n_layer=six", "a whole number"), ("--n_layer=1.5", "a whole number"), ("--n_layer=", "whole number"),
    ("--ngram_decay=much", "auto or a number"), ("--ngram_decay=1,5", "write --ngram_decay=1.5"),
    ("--eval_iters=few", "auto or a whole number"),
    ("--n_layer=True", "a whole number"), ("--n_layer=2*3", "a whole number"), ("--n_layer", "--n_layer="),
    ("--learning_rate=fast", "a number"), ("--learning_rate=", "a number"), ("--dropout=1,5", "a number"),
    ("--bias=maybe", "True or False"), ("--bias=2", "True or False"), ("--bias=", "True or False"),
    ("--compile=perhaps", "auto, True, False"), ("--schedule=cos", "linear, cosine, constant"),
    ("--schedule", "--schedule=linear or --schedule=cosine or"), ("--out_dir", "--out_dir=PATH"),
])
def test_a_value_of_another_type_is_refused_and_says_what_was_expected(flag, expected):
    one_line_error(train_with(flag), flag, expected)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "NaN", "Infinity", "1e999", "9" * 30, "9" * 5000])
@pytest.mark.parametrize("name", ["n_layer", "learning_rate"])
def test_numbers_that_are_not_finite_or_beyond_any_use_are_refused(name, text):
    one_line_error(train_with(f"--{name}={text}"), f"{name}=", without="write")


def test_integers_that_torch_cannot_hold_are_refused():
    one_line_error(inside(sample.main, f"--seed={2**63}"), f"seed={2**63}", "a whole number of at most")


def test_of_a_flag_given_twice_the_last_one_wins():
    assert read("--n_layer=3", "--n_layer=5")["n_layer"] == 5


@pytest.mark.parametrize(("program", "flag", "meant"), [
    ("train", "--learning_rat=1", "--learning_rate"), ("train", "--n_layers=3", "--n_layer"),
    ("train", "--batchsize", "--batch_size"), ("prepare", "--val-fracton=0.2", "--val_fraction"),
    ("sample", "--temprature=1", "--temperature"),
])
def test_an_unknown_flag_suggests_the_nearest(program, flag, meant):
    one_line_error(inside(PROGRAMS[program][0], flag), flag.split("=")[0], f"did you mean {meant}?")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flag", ["--zzz=1", "--", "--=1", "--__class__=1", "-z"])
def test_a_flag_like_no_other_points_to_the_help(program, flag):
    one_line_error(inside(PROGRAMS[program][0], flag), flag.split("=")[0], "see --help")


def test_a_word_that_is_neither_flag_nor_config_file_is_refused():
    one_line_error(train_with("n_layer=3"), "n_layer=3", "--key=value")
    one_line_error(inside(sample.main, "ROMEO:"), "ROMEO:", "--key=value", "python sample.py --start=ROMEO:")


# -- ~ in a path

PATHS = {
    "train": {"data_dir", "out_dir", "init_from"},
    "prepare": {"tokenizer", "val", "data_dir"},
    "sample": {"ckpt", "out_dir", "init_from", "prompts", "novelty", "score"},
    "convert": {"out", "tokenizer"},
    "plots": {"out"},
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, in the folder where the programs run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))      # on Windows
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("program", PATHS)
def test_every_path_setting_knows_the_home_folder(home, config, program):
    options = plots.Options if program == "plots" else PROGRAMS[program][1]
    kinds = get_type_hints(options)
    assert {name for name in kinds if kinds[name] in (FilePath, AutoPath)} == PATHS[program]
    for name in PATHS[program]:
        assert parse(options, [f"--{name}=~/x y"], "").values[name] == f"{home}/x y"
        assert parse(options, [config(f"{name} = '~/x y'")], "").values[name] == f"{home}/x y"
        for other in ("a~b", "./~", "-", "", "~no-such-user/x", "https://a/~b", "gpt2"):
            assert parse(options, [f"--{name}={other}"], "").values[name] == other


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_setting_that_is_called_a_file_or_a_folder_is_missing(program):
    options = PROGRAMS[program][1]
    kinds = get_type_hints(options)
    others = {"dataset", "name", "suffix", "start", "format", "text_column", "encoding", "pattern"}
    for _, name, comment in comments(options):
        if kinds[name] is str and name not in others:
            assert not re.search(r"\b(file|folder|path|PATH|checkpoint|directory)\b", comment), name


def test_a_bare_flag_of_a_path_that_can_be_found_means_auto():
    for words, value in (["--novelty"], "auto"), (["--novelty=a b"], "a b"), (["--novelty="], ""), ([], None):
        assert parse(sample.Options, words, "").values.get("novelty") == value
    one_line_error(inside(sample.main, "--ckpt"), "--ckpt needs a value")


def test_words_that_are_paths_know_the_home_folder(home):
    for takes in ("words", "runs"):
        assert parse(plots.Options, ["~/a", "b~"], "", takes=takes).words == [f"{home}/a", "b~"]
    (home / "mine.py").write_text("n_layer = 5", encoding="utf-8")
    parsed = parse(Config, ["~/mine.py"], "")
    assert (parsed.values, parsed.files) == ({"n_layer": 5}, [home / "mine.py"])


def test_texts_that_are_no_paths_stay_as_they_are(home):
    assert read("--sample_start=~/x", "--dataset=~")["sample_start"] == "~/x"
    assert parse(sample.Options, ["--start=~/x", "--stop=~"], "").values == {"start": "~/x", "stop": ("~",)}


@pytest.mark.parametrize("name", ["~a\0b", "~\ud800", "~" + "x" * 5000], ids=["zero", "surrogate", "long"])
def test_a_home_that_no_user_can_have_stays_as_it_is(name):
    assert cli.expand_home(name) == name


def test_a_run_in_the_home_folder(home, data_dir):
    words = [*flags(**TOY | dict(max_iters=1)), f"--data_dir={data_dir}", "--out_dir=~/runs/a"]
    assert inside(train.main, *words).returncode == 0
    assert {path.name for path in home.parent.iterdir()} == {"home"}
    (home / "prompt.txt").write_text("The fox", encoding="utf-8")
    for words in (["--out_dir=~/runs/a", "--start=FILE:~/prompt.txt"], ["--ckpt=~/runs/a/ckpt.pt", "--start=The fox"],
                  ["--ckpt=~/runs/a", "--prompts=~/prompt.txt"]):
        done = inside(sample.main, *words, "--max_new_tokens=5")
        assert done.stdout.startswith("The fox"), done.stderr
    assert inside(sample.main, "--ckpt=~/runs/a", "--score=~/prompt.txt").returncode == 0
    assert load("~/runs/a")[0].cfg.n_layer == 2


# -- flags that may be given several times

@pytest.mark.parametrize(("words", "stop"), [
    (["--stop=a"], ("a",)), (["--stop=a", "--stop=b", "--stop=a"], ("a", "b", "a")), (["--stop=a=b"], ("a=b",)),
    (["--stop="], ("",)), (["--stop=", "--seed=1", "--stop= "], ("", " ")), (["--stop=a,b"], ("a,b",)),
    (["--stop=('a', 'b')"], ("('a', 'b')",)), (["--stop=--stop=x"], ("--stop=x",)), ([], ()),
])
def test_each_one_adds_a_text(words, stop):
    assert sample.Options(**parse(sample.Options, words, "").values).stop == stop


def test_one_without_a_value_is_refused():
    one_line_error(inside(sample.main, "--stop"), "--stop needs a value", "--stop=TEXT")


@pytest.mark.parametrize(("line", "stop"), [
    ("stop = ['a', 'b']", ("a", "b")), ("stop = ('a', 'b')", ("a", "b")), ("stop = 'ab'", ("ab",)), ("stop = ()", ())])
def test_a_config_file_sets_them_all_and_flags_replace_them(config, line, stop):
    path = config(line)
    assert parse(sample.Options, [path], "").values["stop"] == stop
    assert parse(sample.Options, [path, "--stop=x", "--stop=y"], "").values["stop"] == ("x", "y")
    assert parse(sample.Options, ["--stop=x", path, "--stop=y"], "").values["stop"] == ("x", "y")


@pytest.mark.parametrize("line", ["stop = 5", "stop = ['a', 5]", "stop = None", "stop = {'a': 1}", "stop = b'a'"])
def test_a_config_file_that_sets_no_texts_is_refused(config, line):
    one_line_error(inside(sample.main, config(line)), "mine.py: stop=", "text")


def test_a_stored_value_may_be_as_odd_as_it_likes():
    value = 5
    for _ in range(100_000):
        value = [value]
    outcome = inside(lambda _: from_dict(Config, {"n_layer": value}, "x.pt") and 0)
    one_line_error(outcome, "x.pt", "n_layer=[[", "whole number")


def test_they_come_back_from_where_they_were_stored():
    for texts in ((), ("a",), ("a", "", "猫\n")):
        stored = asdict(sample.Options(stop=texts))
        assert from_dict(sample.Options, stored, "here") == stored
        assert from_dict(sample.Options, json.loads(json.dumps(stored)), "here") == stored      # as a list
    outcome = inside(lambda argv: from_dict(sample.Options, {"stop": [1]}, "here") and 0)
    one_line_error(outcome, "here: its config has stop=[1]", "text")


# -- rules

@pytest.mark.parametrize(("interval", "text", "members", "others"), [
    (at_least(0), "at least 0", [0, 0.5, 10**30], [-1, -1e-300]),
    (above(0), "above 0", [1e-300, 7], [0, -1]),
    (at_least(1).at_most(9), "from 1 to 9", [1, 9], [0, 10, 9.001]),
    (at_least(0).below(2**63), f"at least 0 and below {2**63}", [0, 2**63 - 1], [-1, 2**63]),
    (above(0).at_most(1), "above 0 and at most 1", [1e-9, 1], [0, 1.001]),
    (above(0.5).below(1), "above 0.5 and below 1", [0.6, 0.999], [0.5, 1]),
])
def test_a_range_says_what_it_holds(interval, text, members, others):
    assert str(interval) == text
    assert all(number in interval for number in members)
    assert not any(number in interval for number in others)
    assert float("nan") not in interval


@dataclass
class Soil:
    # -- ground
    depth: PositiveInt = 2              # in spades
    wet: Fraction = 0.5                 # share of it that is water


@dataclass
class Bed(Soil):
    # -- plants
    roses: Annotated[int, at_least(0), at_least(-5).below(7)] = 3       # how many
    name: str = "rosarium"              # on the gate

    def rules(self) -> dict:
        return {f"roses={self.roses} need depth={self.depth} above 1": not self.roses or self.depth > 1,
                f"name={self.name} must begin with r": self.name.startswith("r")}


def test_all_broken_rules_are_named_those_of_parents_and_between_fields_too():
    assert problems(Soil()) == problems(Bed()) == []
    assert set(problems(Bed(roses=8, depth=0, wet=1.5, name="x"))) == {
        f"depth=0 must be from 1 to {2**31}", "wet=1.5 must be from 0 to 1",
        "roses=8 must be at least -5 and below 7", "roses=8 need depth=0 above 1", "name=x must begin with r"}
    assert problems(Bed(depth=1)) == ["roses=3 need depth=1 above 1"]
    assert problems(Bed(roses=-6)) == ["roses=-6 must be at least 0", "roses=-6 must be at least -5 and below 7"]


def test_check_raises_one_error_with_all_of_them():
    check(Bed())
    with pytest.raises(UserError) as caught:
        check(Bed(roses=-1, wet=-0.5))
    assert set(str(caught.value).split("; ")) == {"roses=-1 must be at least 0", "wet=-0.5 must be from 0 to 1"}
    assert caught.value.code == 2


@pytest.mark.parametrize("program", ["train", "prepare", "sample"])
def test_the_defaults_break_no_rule(program):
    options = PROGRAMS[program][1]
    check(options())


@pytest.mark.parametrize("value", [-1, 10**12])
def test_every_number_of_a_run_has_bounds(value):
    kinds = get_type_hints(Config)
    numbers = [name for name in kinds if kinds[name] in (int, float)]
    assert len(numbers) > 30
    for name in numbers:
        one_line_error(train_with(f"--{name}={value}"), f" {name}={kinds[name](value)} must be ")


@pytest.mark.parametrize(("program", "words", "broken"), [
    ("train", ["--n_layer=0", "--batch_size=0", "--dropout=1.5", "--seed=-1"],
     ["n_layer=0", "batch_size=0", "dropout=1.5", "seed=-1"]),
    ("train", ["--n_embd=400", "--n_head=6", "--n_kv_head=4", "--learning_rate=1", "--min_lr=2"],
     ["n_head=6 must divide n_embd=400", "n_kv_head=4 must divide n_head=6", "min_lr=2", "learning_rate=1"]),
    ("train", ["--n_embd=400", "--n_head=6", "--dropout=1.5"],          # a range and a rule between fields
     ["n_head=6 must divide n_embd=400", "dropout=1.5"]),
    ("prepare", ["x.txt", "--val_fraction=1", "--limit=-1", "--seed=-2", "--workers=-3", "--bpe_sample=0",
                 "--min_count=0", "--shard_tokens=0", "--encoding=klingon", "--pattern=x"],
     ["val_fraction=1.0", "limit=-1", "seed=-2", "workers=-3", "bpe_sample=0", "min_count=0", "shard_tokens=0",
      "encoding=klingon", "pattern=x"]),
    ("sample", ["--num_samples=0", "--batch_size=0", "--max_new_tokens=-1", "--temperature=-0.5", "--top_k=-1",
                "--top_p=0.0", "--min_p=2", "--repetition_penalty=0", "--seed=-3", "--stride=-1", "--score=x",
                "--interactive"],
     ["num_samples=0", "batch_size=0", "max_new_tokens=-1", "temperature=-0.5", "top_k=-1", "top_p=0.0", "min_p=2.0",
      "repetition_penalty=0.0", "seed=-3", "stride=-1", "--interactive and --score exclude each other"]),
])
def test_a_program_reports_all_broken_rules_at_once(program, words, broken):
    outcome = inside(PROGRAMS[program][0], *words, *["--dataset=nowhere"] * (program == "train"))
    one_line_error(outcome, *broken)
    assert outcome.stdout == ""


# -- errors

def test_a_notebook_survives_a_mistake_and_sees_the_whole_message(capsys):
    with pytest.raises(UserError, match="no checkpoint nowhere.*train.py") as caught:
        load("nowhere")
    assert isinstance(caught.value, Exception)          # `except Exception` catches it, which SystemExit escapes
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="n_layer=six"):
        train.main(["--n_layer=six"])
    with pytest.raises(UserError, match="n_layer=0 must be"):
        train.main(["--n_layer=0"])


def test_an_errors_message_is_one_line():
    assert str(UserError("a\n  b\tc ")) == "a b\tc"


def failing(error):
    """A main that raises this."""
    def main(argv):
        raise error
    return main


def test_exit_codes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    assert exit_code(lambda argv: None, []) == 0
    assert exit_code(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert exit_code(failing(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "")
    assert exit_code(failing(UserError("a \x1b[2J b")), []) == 2
    assert exit_code(failing(UserError("full", code=4)), []) == 4
    assert capsys.readouterr() == ("", "train.py: a \\x1b[2J b\ntrain.py: full\n")
    with pytest.raises(ZeroDivisionError):              # a bug is no user's mistake: it keeps its traceback
        exit_code(failing(ZeroDivisionError()), [])


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(failing(UserError("wrong")), []) == 2
    assert waits == []
    assert "wrong" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")               # torchrun ends it while it waits
    assert exit_code(failing(UserError("wrong")), []) == 2
    assert waits == [(3, "")]


# -- config files

def test_config_files_in_order_then_flags_and_the_last_one_wins(config):
    one = config("n_layer = 1\nn_head = 1\nn_embd = 8\n", "one.py")
    two = config("n_layer = 2\nn_head = 2\n", "two.py")
    assert read(one, two, "--n_layer=3") == dict(n_layer=3, n_head=2, n_embd=8)
    assert read(two, one, "--n_layer=3") == dict(n_layer=3, n_head=1, n_embd=8)


def test_a_config_file_is_read_by_declared_type_too(config):
    values = read(config("max_iters = 1e3\nlearning_rate = 1\ncompile = True\nqkv_bias = 'auto'\n"
                         "out_dir = 'a=b ü'\n"))
    assert values == dict(max_iters=1000, learning_rate=1.0, compile=True, qkv_bias="auto", out_dir="a=b ü")
    assert [type(value) for value in values.values()] == [int, float, bool, str, str]


def test_underscored_names_and_imports_are_the_files_own(config):
    path = config("import math\nfrom os import path as _path\n_width = 4\nn_embd = int(math.sqrt(_width))\n"
                  "def _twice(x):\n    return 2 * x\nn_layer = _twice(3)\n")
    assert read(path) == dict(n_embd=2, n_layer=6)


@pytest.mark.parametrize(("text", "parts"), [
    ("learning_rat = 1\n", ["learning_rat", "did you mean --learning_rate?"]),
    ("width = 1\n", ["sets width", "_"]),
    ("def n_layer():\n    return 1\n", ["n_layer", "a whole number"]),
    ("n_layer = 'six'\n", ["n_layer='six'", "a whole number"]),
    ("n_layer = True\n", ["n_layer=True", "a whole number"]),
    ("n_layer = None\n", ["n_layer=None", "a whole number"]),
    ("learning_rate = float('nan')\n", ["learning_rate=nan", "finite"]),
    ("dataset = 5\n", ["dataset=5", "text"]),
    ("bias = 'perhaps'\n", ["bias='perhaps'", "True or False"]),
    ("dtype = 'float64'\n", ["dtype='float64'", "float32"]),
    ("n_head = 6\nn_embd = 400\n", ["n_head=6 must divide n_embd=400"]),
])
def test_a_config_file_that_sets_something_wrong_is_refused(config, text, parts):
    one_line_error(train_with(config(text)), *parts)


@pytest.mark.parametrize(("text", "parts"), [
    ("n_layer = 2\nn_head = = 3\n", ["line 2", "SyntaxError"]),
    ("n_layer = 2\n\nn_head = 1 / 0\n", ["line 3", "ZeroDivisionError"]),
    ("_x = 1\ndef _f():\n    return _y\n_f()\n", ["line 3", "NameError", "_y"]),
    ("import json\n_x = json.loads('[')\n", ["line 2", "JSONDecodeError"]),      # which has a line of its own
    ("import nowhere_to_be_found\n", ["line 1", "nowhere_to_be_found"]),
    ("import sys\nsys.exit()\n", ["exit"]),
    ("n_layer = 1\0\n", []),
])
def test_an_error_in_a_config_file_names_file_and_line(config, text, parts):
    one_line_error(train_with(config(text)), "mine.py", *parts)


def test_a_config_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.py").write_bytes(bytes(range(256)))
    one_line_error(train_with(tmp_path / "mine.py"), "mine.py")


def test_a_missing_config_file_suggests_the_nearest(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    config("", "config/shakespeare.py")
    one_line_error(train_with("config/shakspeare.py"), "no config file config/shakspeare.py",
                   "did you mean config/shakespeare.py?")
    config("", "config/poe.py")
    for word in ("poe", "poe.py"):                      # as people type it first
        one_line_error(train_with(word), word, "config file", "did you mean config/poe.py?")
    one_line_error(train_with("verse"), "verse", "see --help")
    one_line_error(train_with("x" * 300 + ".py"), "xxx.py")          # longer than any file's name may be


# -- nothing is evaluated

@pytest.mark.parametrize("program", PROGRAMS)
def test_no_value_is_ever_evaluated(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = PROGRAMS[program][1]
    for code in ("__import__('os').system('touch ran')", "open('ran', 'w')", "$(touch ran)", "`touch ran`"):
        for name, kind in get_type_hints(options).items():
            outcome = inside(lambda argv: parse(options, argv, "") and 0, f"--{name}={code}")
            assert outcome.returncode == (0 if kind in (str, FilePath, AutoPath, Texts) else 2), name
    assert not list(tmp_path.iterdir())


# -- help

@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_field_with_its_default_and_comment(program, monkeypatch):
    main, options = PROGRAMS[program]
    monkeypatch.setenv("COLUMNS", "80")
    outcome = inside(main, "--help")
    assert outcome.returncode == 0
    assert outcome.stderr == ""
    defaults = {field.name: field.default for field in fields(options)}
    kinds = get_type_hints(options)
    assert sorted(name for _, name, _ in comments(options)) == sorted(defaults)     # none without a comment
    assert max(map(len, outcome.stdout.splitlines())) < 80          # the examples, too
    unwrapped = "".join(outcome.stdout.split())                     # lines break anywhere
    for _, name, comment in comments(options):
        default = "" if kinds[name] == Texts else defaults[name]
        assert "".join(f"--{name}={default} {comment}".split()) in unwrapped
        for choice in choices(kinds[name]):
            assert str(choice) in outcome.stdout


def test_the_help_of_prepare_names_every_set():
    assert all(re.search(rf"\b{name}\b", prepare.__doc__) for name in prepare.SETS)


@dataclass
class Garden:
    # -- plants
    trees: int = 3                      # how many; with # in it
    shade: float = 0.5                  # its share of the ground, which is explained
                                        # in a second line
    # -- tools
    hose: bool = False                  # lay one
    name: str = ""                      # on the gate


def test_the_help_is_the_comments_of_the_source():
    lines = help_text(Garden, "A garden.\n\n    python garden.py\n\nGreen.\n", 100).splitlines()
    assert lines[:7] == ["A garden.", "", "examples:", "    python garden.py", "", "Green.", ""]
    assert [" ".join(line.split()) for line in lines[9:]] == [
        "plants:", "--trees=3 how many; with # in it",
        "--shade=0.5 its share of the ground, which is explained in a second line", "",
        "tools:", "--hose=False lay one", "--name= on the gate"]


def test_the_flags_used_most_come_first_in_the_help_and_only_there():
    lines = help_text(Garden, "A garden.", 100, first=("hose", "trees")).splitlines()
    assert [" ".join(line.split()) for line in lines[3:]] == [
        "", "most used:", "--hose=False lay one", "--trees=3 how many; with # in it", "",
        "plants:", "--shade=0.5 its share of the ground, which is explained in a second line", "",
        "tools:", "--name= on the gate"]


@pytest.mark.parametrize(("program", "names"), [
    (train, train.FIRST_IN_HELP), (sample, sample.FIRST_IN_HELP), (prepare, prepare.FIRST_IN_HELP)])
def test_every_program_names_eight_flags_first(program, names):
    before, _, after = inside(program.main, "--help").stdout.partition("most used:")
    assert "examples:" in before
    assert re.findall(r"^  --(\w+)=", after, re.M)[:8] == list(names)
    assert len(set(names)) == 8


@pytest.mark.parametrize(("program", "names"), [
    (convert, ["out", "bits", "type", "tokenizer"]), (plots, ["out", "by"])])
def test_the_other_programs_begin_with_examples_too(program, names):
    before, _, after = inside(program.main, "--help").stdout.partition("most used:")
    assert "examples:" in before
    assert re.findall(r"^  --(\w+)=", after, re.M) == names


def test_all_wrong_flags_are_reported_at_once():
    one_line_error(train_with("--lr=1", "--zzz=2", "--dataset", "book", "--n_layer=six"), "--learning_rate", "--zzz",
                   "write --dataset=book", "n_layer=six")


@pytest.mark.parametrize(("program", "flag", "meant"), [
    (train, "lr", "learning_rate"), (train, "steps", "max_iters"), (train, "epochs", "max_epochs"),
    (train, "prompt", "sample_start"), (sample, "prompt", "start"), (sample, "temp", "temperature"),
    (sample, "length", "max_new_tokens"), (sample, "n", "num_samples"), (train, "resume", "init_from=resume"),
    (train, "continue", "init_from=resume"), (train, "start", "sample_start"), (train, "name", "dataset"),
    (train, "gpu", "device=cuda"), (train, "hidden", "n_embd"), (sample, "num", "num_samples")])
def test_the_names_of_other_programs_lead_to_the_flag(program, flag, meant):
    one_line_error(inside(program.main, f"--{flag}=1"), f"did you mean --{meant}?")


@pytest.mark.parametrize(("words", "meant"), [
    (["-dataset=book"], "write --dataset=book"), (["dataset=book"], "write --dataset=book"),
    (["－－dataset=book"], "write --dataset=book"), (["——dataset＝my book"], "write --dataset='my book'"),
    (["–dataset=book"], "write --dataset=book"), (["--dataset＝book"], "write --dataset=book"),
    (["--dataset：book"], "write --dataset=book"), (["--dataset:book"], "write --dataset=book"),
    (["“--dataset=book”"], "write --dataset=book"), (["/max_minutes=5"], "write --max_minutes=5"),
    (["-datset=book"], "write --dataset=book"), (["-help"], "write --help"), (["－－help"], "write --help"),
    (["--dataset", "=", "book"], "write --dataset=book"), (["--dataset", "=book"], "write --dataset=book"),
    (["--dataset=", "book"], "write --dataset=book"), (["--max_minutes", "=", "2"], "write --max_minutes=2"),
    (["--minute", "3"], "write --max_minutes=3"), (["-dataset", "book"], "write --dataset=book"),
    (["--dataset=book\u3000--max_minutes=2"], "write a space, and nothing else, before --max_minutes=2"),
    (["--dataset=book，--max_minutes=2"], "write a space, and nothing else, before --max_minutes=2")])
def test_a_flag_that_is_spelled_in_another_way_leads_to_its_right_spelling(words, meant):
    outcome = train_with(*words)
    one_line_error(outcome, words[0])
    assert outcome.stderr.endswith(f"{meant}\n")


def test_a_prompt_in_quotes_of_a_word_processor_is_put_into_those_of_a_shell():
    one_line_error(inside(sample.main, "--start=“The", "fox”"), "in quotes, --start='The fox'")
    one_line_error(inside(sample.main, "-o", "out/a"), "write --out_dir=out/a")


@pytest.mark.parametrize(("flag", "meant"), [
    ("max_iters=1,000", "1000"), ("max_iters=10k", "10000"), ("max_iters=500 steps", "500"), ("max_iters=100。", "100"),
    ("max_minutes=5min", "5"), ("max_minutes=30s", "0.5"), ("max_minutes=2h", "120"),
    ("max_minutes=5分钟", "5"), ("max_minutes=0,5", "0.5"), ("learning_rate=0。01", "0.01"),
    ("learning_rate=1e-3，", "1e-3"), ("dropout=10%", "0.1"), ("max_iters=2.5k", "2500")])
def test_a_number_that_is_spelled_in_another_way_leads_to_its_right_spelling(flag, meant):
    name = flag.split("=")[0]
    outcome = train_with(f"--{flag}")
    one_line_error(outcome, f"--{flag} is not a")
    assert outcome.stderr.endswith(f"; write --{name}={meant}\n")
    one_line_error(train_with(f"--{name}={meant}", "--dataset=nowhere"), "no data set in")


def test_a_time_is_no_number_of_steps():
    for word in ("--max_iters=1m", "--max_iters=30s", "--max_iters=2 hours"):
        outcome = train_with(word)
        one_line_error(outcome, word, "is not a whole number")
        assert "write" not in outcome.stderr


@pytest.mark.parametrize("word", ["--sample_start=He typed a,--seed=3", "--wandb_run_name=a;--seed"])
def test_free_text_may_hold_dashes_after_a_comma(word):
    name, value = parse(Config, [word], "").values.popitem()
    assert f"--{name}={value}" == word


@pytest.mark.parametrize("value", ["six", "1.5", "-", "", "5 apples", "1,5"])
def test_what_spells_no_number_comes_without_one(value):
    one_line_error(train_with(f"--max_iters={value}"), "is not a whole number", without="write")


def test_the_help_has_the_comments_of_a_parent_after_those_of_the_class():
    assert comments(Bed) == [["plants", "roses", "how many"], ["plants", "name", "on the gate"],
                             ["ground", "depth", "in spades"], ["ground", "wet", "share of it that is water"]]
    lines = [" ".join(line.split()) for line in help_text(Bed, "A bed.\n", 100).splitlines()]
    assert lines[3:] == ["", "plants:", "--roses=3 how many", "--name=rosarium on the gate", "",
                         "ground:", "--depth=2 in spades", "--wet=0.5 share of it that is water"]


def test_the_help_is_wrapped_to_the_terminal(monkeypatch):
    comment, = (comment for _, name, comment in comments(Config) if name == "gradient_accumulation_steps")
    for columns in (60, 80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = help_text(Config, train.__doc__).partition("Flags and their defaults")[2].splitlines()
        assert columns - 12 < max(map(len, lines)) < columns
        if columns < 100:                               # no room beside the flag: the comment goes below
            below = lines[lines.index("  --gradient_accumulation_steps=1") + 1]
            assert below.startswith(" " * 30)
            assert comment.startswith(below.strip())


# -- any command line at all

known = [field.name for _, options in PROGRAMS.values() for field in fields(options)]
text = st.text(st.characters(), max_size=12)            # lone surrogates too, as undecodable bytes arrive
names = st.one_of(st.sampled_from(known), text)
values = st.one_of(text, st.integers().map(str), st.floats().map(str),
                   st.sampled_from(["", "True", "auto", "a=b", "1e3", "1e400", "9" * 400, "0x10", "\0",
                                    "open('ran', 'w')", "../..", "--n_layer=3"]))
words = st.one_of(st.tuples(names, values).map("--{0[0]}={0[1]}".format), names.map("--{}".format), values,
                  values.map("{}.py".format), st.sampled_from(["-h", "--help", "-", "--"]))


@settings(max_examples=500, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.sampled_from(sorted(PROGRAMS)), line=st.lists(words, max_size=5))
def test_any_command_line_is_understood_or_refused_in_one_line(program, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                     # empty: there is no data set, no text and no checkpoint
    main, options = PROGRAMS[program]
    values = {}
    inside(lambda argv: values.update(parse(options, argv, "", "words").values), *line)
    for name, value in values.items():
        kind = get_type_hints(options)[name]
        kind = str if kind in (FilePath, AutoPath) else kind
        assert value in choices(kind) if choices(kind) else type(value) is (get_origin(kind) or kind)
    outcome = inside(main, *line, *["--dataset=nowhere"] * (program == "train"))
    if outcome.returncode == 0:
        assert {"-h", "--help"} & set(line)
        assert outcome.stderr == ""
    else:
        one_line_error(outcome)
        assert outcome.stderr == printable(outcome.stderr.rstrip("\n")) + "\n"      # nothing acts on a terminal
    assert not list(tmp_path.iterdir())             # no code has run


# -- nanoGPT's own command lines

LAPTOP = """--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12
    --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"""
TRAINING = """--out_dir=out --eval_interval=2000 --log_interval=1 --eval_iters=200 --eval_only=False
    --always_save_checkpoint=True --init_from=scratch --wandb_log=False --wandb_project=owt
    --wandb_run_name=gpt2 --dataset=openwebtext --gradient_accumulation_steps=40 --batch_size=12
    --block_size=1024 --n_layer=12 --n_head=12 --n_embd=768 --dropout=0.0 --bias=False --learning_rate=6e-4
    --max_iters=600000 --weight_decay=1e-1 --beta1=0.9 --beta2=0.95 --grad_clip=1.0 --decay_lr=True
    --warmup_iters=2000 --lr_decay_iters=600000 --min_lr=6e-5 --backend=nccl --device=cuda --dtype=bfloat16
    --compile=True"""
SAMPLING = """--init_from=resume --out_dir=out --start=The --num_samples=10 --max_new_tokens=500
    --temperature=0.8 --top_k=200 --seed=1337 --device=cuda --dtype=bfloat16 --compile=False"""


def test_nanogpts_laptop_command_line_is_accepted():
    values = read(*LAPTOP.split())
    assert values == dict(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64,
                          batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000,
                          dropout=0.0)
    one_line_error(train_with(*LAPTOP.split()), "no data set in")        # all else is right


def test_every_setting_of_nanogpts_training_is_accepted():
    values = read(*TRAINING.split())
    assert len(values) == 33
    check(Config(**values))
    one_line_error(train_with(*TRAINING.split(), "--device=cpu"), "no data set in")


def test_every_setting_of_nanogpts_sampling_is_accepted():
    values = parse(sample.Options, SAMPLING.split(), "").values
    assert values == dict(init_from="resume", out_dir="out", start="The", num_samples=10, max_new_tokens=500,
                          temperature=0.8, top_k=200, seed=1337, device="cuda", dtype="bfloat16",
                          compile=False)
