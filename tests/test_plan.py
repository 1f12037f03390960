"""The plan of a run by the clock: what is chosen for a text, a machine and a time, and what is left as given."""

import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY, inside, one_line_error

import train
from inkling import cli, plan
from inkling.plan import SETTINGS, SHAPES, Text, choose
from train import Config, Ranks

GB = 10**9
BOOK = Text(train_tokens=900_000, val_tokens=100_000, vocab_size=80)


def machine(flops: float):
    """A machine's seconds_per_step: so many operations a second, and as long as 10**9 of them for each step."""
    def seconds_per_step(settings: dict) -> float:
        shape = plan.Shape(settings["n_layer"], settings["n_embd"], settings["n_head"])
        tokens = plan.tokens_per_step({"block_size": 256} | settings)
        return 1e9 / flops + 6 * shape.parameters * tokens / flops
    return seconds_per_step


def chosen(text=BOOK, minutes=4.0, memory=8 * GB, flops=1e11, processes=1, **given) -> plan.Choice:
    seconds = plan.seconds_of_training(60 * minutes, compiled=False)
    return choose(text, seconds, memory, given, machine(flops), processes)


def parameters(choice: plan.Choice) -> int:
    return choice.settings["n_layer"] * choice.settings["n_embd"]**2


def test_more_time_never_makes_a_smaller_model_nor_a_smaller_batch():
    choices = [chosen(minutes=minutes) for minutes in (0.1, 0.5, 1, 2, 4, 10, 30, 60, 600)]
    sizes = [parameters(choice) for choice in choices]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    of_one_shape = [choice for choice in choices if parameters(choice) == sizes[-1]]
    batches = [plan.tokens_per_step(choice.settings) for choice in of_one_shape]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1]


def test_a_faster_machine_trains_a_larger_model():
    assert parameters(chosen(flops=1e10)) < parameters(chosen(flops=1e13))


def test_the_model_reads_as_many_tokens_as_the_rule_says_and_a_larger_one_would_not():
    seconds = plan.seconds_of_training(240, compiled=False)
    for flops in (1e10, 1e11, 1e12):
        settings = chosen(flops=flops).settings
        rung, = [number for number, shape in enumerate(SHAPES) if shape.settings().items() <= settings.items()]
        for shape, is_enough in ((SHAPES[rung], True), (SHAPES[rung + 1], False)):
            trial = settings | shape.settings() | plan.choose_batch(BOOK, plan.BATCH_RUN_TOKENS, 256, 1)
            tokens = seconds / machine(flops)(trial) * plan.tokens_per_step(trial)
            assert (tokens >= plan.TOKENS_PER_PARAMETER * shape.parameters) == is_enough


def test_a_short_text_and_little_memory_bound_the_model():
    rich = dict(flops=1e15, minutes=60, memory=100 * GB)
    assert parameters(chosen(Text(20_000, 2_000, 60), **rich)) < parameters(chosen(BOOK, **rich))
    assert parameters(chosen(BOOK, **rich)) < parameters(chosen(Text(10**9, 10**7, 80), **rich))
    long = Text(10**9, 10**7, 80)
    assert parameters(chosen(long, **rich | {"memory": GB})) < parameters(chosen(long, **rich))
    not_known = chosen(long, **rich | {"memory": 0})
    assert parameters(not_known) == parameters(chosen(long, **rich))


@pytest.mark.parametrize("text", [
    Text(18_000, 2_000, 60), Text(900_000, 100_000, 1), Text(90_000, 10_000, 50_257), Text(10**8, 10**7, 8192),
    Text(300, 40, 20)], ids=str)
@pytest.mark.parametrize("minutes", [0.1, 1.0, 15.0])
@pytest.mark.parametrize("flops", [1e9, 1e11, 1e14])
def test_every_plan_is_a_run_that_can_begin(text, minutes, flops):
    choice = chosen(text, minutes, flops=flops)
    assert set(choice.settings) <= {*SETTINGS, "max_iters"}
    cfg = Config(**choice.settings)
    assert not cli.problems(cfg)
    assert cfg.block_size < min(text.train_tokens, text.val_tokens)
    assert cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size <= text.train_tokens
    assert choice.steps >= 1


def test_what_is_given_stays():
    for name, value in dict(block_size=100, batch_size=5, dropout=0.3, weight_decay=9.0).items():
        asked = []
        choice = choose(BOOK, 200, 0, {name: value}, lambda settings, asked=asked: asked.append(settings) or 0.1)
        assert name not in choice.settings
        assert all(settings.get(name, value) == value for settings in asked)
    assert chosen(block_size=100).settings["batch_size"] > chosen(block_size=500).settings["batch_size"]


@pytest.mark.parametrize("given", [dict(n_embd=100), dict(n_head=4), dict(n_layer=5), dict(n_kv_head=2)], ids=str)
def test_a_shape_of_which_a_part_is_given_is_left_as_it_is(given):
    asked = []
    choice = choose(BOOK, 200, 0, given, lambda settings: asked.append(settings) or 0.1)
    assert not choice.settings.keys() & plan.SHAPE_SETTINGS
    assert len(asked) == 1
    assert not asked[0].keys() & plan.SHAPE_SETTINGS


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_a_step_equally(processes):
    settings = chosen(processes=processes, flops=1e13, minutes=30).settings
    assert settings["gradient_accumulation_steps"] % processes == 0
    assert settings["batch_size"] <= plan.MOST_AT_ONCE


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_no_process_computes_too_much_at_once(processes):
    batch = plan.choose_batch(Text(10**12, 10**9, 80), 1e12, 256, processes)
    assert batch["batch_size"] <= plan.MOST_AT_ONCE
    assert batch["batch_size"] * batch["gradient_accumulation_steps"] >= 512

def noting(tried: list, pace):
    """`pace`, which notes the width of what it is asked about."""
    def seconds_per_step(settings: dict) -> float:
        tried.append(settings["n_embd"])
        return pace(settings)
    return seconds_per_step


def test_few_shapes_are_tried():
    for flops in (1e9, 1e11, 1e13, 1e15):
        tried = []
        choose(Text(10**8, 10**7, 80), 200, 0, {}, noting(tried, machine(flops)))
        assert len(tried) == len(set(tried)) <= len(SHAPES) - plan.FIRST_TRIED + 1


def test_a_text_that_is_read_more_often_is_regularized_more():
    rare = plan.choose_regularization(BOOK, 0.5 * BOOK.train_tokens)
    often = plan.choose_regularization(BOOK, 50 * BOOK.train_tokens)
    assert often["dropout"] > rare["dropout"]
    assert often["weight_decay"] > rare["weight_decay"] == Config.weight_decay


def test_a_short_text_ends_a_long_run_before_its_time():
    short = Text(200_000, 20_000, 60)
    by_the_clock = chosen(short, minutes=0.2)
    assert "max_iters" not in by_the_clock.settings
    early = chosen(short, minutes=60)
    assert "max_minutes" not in early.settings          # which stay the most that it takes
    read = early.settings["max_iters"] * plan.tokens_per_step(early.settings)
    assert read == pytest.approx(max(plan.MOST_EPOCHS.values()) * short.train_tokens, rel=0.15)
    assert any("before the time is over" in reason for reason in early.reasons)


def test_what_is_expected_lies_about_the_ngrams_and_falls_with_what_is_read():
    text = Text(1_000_000, 100_000, 65, ngram_bits=2.0)
    bands = [plan.expected_bits(text, tokens) for tokens in (5e5, 2e6, 1e7)]
    assert all(least < most for least, most in bands)
    assert bands == sorted(bands, reverse=True)
    assert bands[0][0] > 2.0 > bands[2][0]
    assert plan.expected_bits(text, 1e5) == ()              # of a text that is hardly read
    assert plan.expected_bits(BOOK, 2e6) == ()              # of a set without anchors
    assert plan.expected_bits(replace(text, train_tokens=20_000), 2e6) == ()


def test_the_text_of_a_set_knows_its_ngrams_if_they_have_counted_all_of_it():
    splits = {split: {"tokens": 500, "characters": 1000, "bytes": 1000} for split in ("train", "val")}
    meta = {"splits": splits, "vocab_size": 65, "anchors": {"ngram": 2.5, "sampled": {"xz_train": 250}}}
    assert Text.of(meta) == Text(500, 500, 65, 2.5)
    assert Text.of(meta | {"anchors": {"ngram": 2.5, "sampled": {"train": 250}}}).ngram_bits == 0
    assert Text.of(meta | {"anchors": "damaged"}).ngram_bits == Text.of(meta | {"anchors": None}).ngram_bits == 0


# -- in train.py --------------------------------------------------------------------------------------

PLANNED = dict.fromkeys(("n_layer", "n_head", "n_embd", "ngrams", "ngram_rows", "block_size", "batch_size",
                         "max_iters"))


@pytest.fixture
def few_shapes(monkeypatch):
    """Toy shapes and a toy table, so that trying and training them takes no time."""
    monkeypatch.setattr(plan, "SHAPES", [plan.Shape(1, 16, 1), plan.Shape(1, 32, 1), plan.Shape(2, 32, 1)])
    monkeypatch.setattr(plan, "FIRST_TRIED", 1)
    monkeypatch.setattr(plan, "BATCH_TOKENS", 256)


def planned_words(output: str) -> list:
    line, = [line for line in output.splitlines() if line.startswith("plan ")]
    return shlex.split(line)[3:]


def stored(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def test_a_run_by_the_clock_is_planned_and_can_be_repeated(start, few_shapes, paced, tmp_path):
    done = start("run", **PLANNED, max_minutes=2)
    assert done.returncode == 0, done.stderr
    config = stored(tmp_path / "run")["config"]
    words = planned_words(done.stdout)
    for name in ("n_layer", "n_embd", "n_head", "batch_size", "block_size", "dropout", "weight_decay"):
        assert f"--{name}={config[name]}" in words
    assert (config["n_layer"], config["n_embd"], config["n_head"]) in [(1, 16, 1), (1, 32, 1), (2, 32, 1)]

    command, = [line for line in done.stdout.splitlines() if line.startswith("repeat ")]
    again = inside(train.main, *shlex.split(command)[3:], f"--out_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert "plan " not in again.stdout
    first, second = (stored(tmp_path / name)["model"] for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("seconds_of_a_trial", "sizes"), [(1.0, [32, 16]), (50.0, [32])])
def test_a_plan_leaves_time_for_the_run(start, few_shapes, clock, monkeypatch, seconds_of_a_trial, sizes):
    """On a busy machine, trials may take as long as the run."""
    tried = []

    def slow_step(run, most_seconds):
        tried.append(run.cfg.n_embd)
        clock.now += seconds_of_a_trial
        return 60.0
    monkeypatch.setattr(train, "time_a_step", slow_step)
    done = start("run", **PLANNED, max_minutes=2, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert tried == sizes
    assert "--n_embd=16" in planned_words(done.stdout)


@pytest.mark.parametrize(("seconds", "made", "expected"), [
    ([0.05] * 8 + [0.02, 0.05, 0.01], 10, 0.02),        # short ones vary, so many are made
    ([0.9, 0.05, 0.04, 0.03, 0.01], 4, 0.03),
    ([0.5, 0.6, 0.4, 0.1], 3, 0.4),                     # the first warms up
    ([6.0, 0.1], 1, 6.0),
])
def test_the_pace_is_that_of_the_shortest_of_several_steps(monkeypatch, seconds, made, expected):
    now = 0.0
    steps = []

    def update(run, step):
        nonlocal now
        now += seconds[step]
        steps.append(step)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    found = train.time_a_step(SimpleNamespace(plan=SimpleNamespace(device="cpu"), ranks=Ranks()), 1.0)
    monkeypatch.undo()
    assert found == pytest.approx(expected)
    assert steps == list(range(made))


def test_a_plan_without_time_for_a_larger_model_keeps_the_one_it_has_tried(clock):
    def step(settings):
        clock.now += 10
        return 0.01
    as_tried = train.try_within(5, step, Ranks())
    assert as_tried({"n_layer": 2, "n_embd": 32}) == 0.01
    assert as_tried({"n_layer": 1, "n_embd": 32}) == 0.01
    assert as_tried({"n_layer": 3, "n_embd": 32}) == math.inf


def test_a_dry_run_shows_the_plan_and_writes_nothing(start, few_shapes, tmp_path):
    done = start("run", **PLANNED, max_minutes=1, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert planned_words(done.stdout)
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_before_its_time_makes_the_steps_of_its_plan(start, few_shapes, paced, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_EPOCHS", {1: 0.2})
    done = start("run", **PLANNED, max_minutes=10)
    assert done.returncode == 0, done.stderr
    content = stored(tmp_path / "run")
    most_steps = content["config"]["max_iters"]
    assert content["step"] == content["plan"]["breakpoints"][-1][1] == content["plan"]["most_steps"] == most_steps < 100
    assert "before the time is over" in done.stdout
    again = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume")
    assert "nothing was left to do" in again.stdout
    more = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_minutes=10")
    assert more.returncode == 0, more.stderr
    assert stored(tmp_path / "run")["step"] > most_steps            # a new schedule was asked for


def test_a_run_that_ends_before_its_time_is_fitted_to_a_slow_machine(start, few_shapes, paced, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_EPOCHS", {1: 0.2})
    paced.seconds_of_step = lambda step: 60             # six times as long as in the trial
    began = paced.now
    done = start("run", **PLANNED, max_minutes=10)
    assert done.returncode == 0, done.stderr
    assert 540 <= paced.now - began <= 630
    content = stored(tmp_path / "run")
    assert 5 <= content["step"] < content["config"]["max_iters"]
    last_factor = train.lr_factor(content["step"] - 1, Config(**content["config"]), content["plan"]["breakpoints"])
    assert last_factor < 0.3                            # it has cooled down


def test_what_a_plan_expects_is_stored_and_forgotten_with_its_length(start, few_shapes, paced, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "expected_bits", lambda text, tokens: (1.0, 1.5))
    done = start("run", **PLANNED | dict(ngrams=None), max_minutes=2)
    assert "above the 1.00 to 1.50 that the plan expected" in " ".join(done.stdout.split())
    assert stored(tmp_path / "run")["plan"]["expected"] == [1.0, 1.5]
    steps = stored(tmp_path / "run")["step"]
    for name, length in (("same", steps), ("longer", steps + 2)):
        again = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume",
                       *([f"--max_iters={length}"] if name == "longer" else []))
        assert again.returncode == 0, again.stderr
        assert stored(tmp_path / "run")["plan"]["expected"] == ([] if name == "longer" else [1.0, 1.5])


def test_a_run_that_was_resumed_with_other_settings_names_no_command_for_it(start, few_shapes, paced, tmp_path):
    done = start("run", **PLANNED, max_minutes=2)
    assert "repeat   python train.py" in done.stdout
    again = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_minutes=2")
    assert again.returncode == 0, again.stderr
    assert "not by one command: it was resumed at step" in again.stdout
    assert "repeat   python" not in again.stdout


def test_minutes_that_only_limit_a_run_do_so_after_a_resume(start, paced, tmp_path):
    done = start("run", max_iters=4, max_minutes=10)
    assert done.returncode == 0, done.stderr
    content = stored(tmp_path / "run")
    content["plan"]["breakpoints"] = [[0, 9]]           # as if it had been stopped
    torch.save(content, tmp_path / "run" / "last.pt")
    done = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume")
    assert done.returncode == 0, done.stderr
    content = stored(tmp_path / "run")
    assert content["step"] == 9
    assert content["plan"]["breakpoints"] == [[0, 9]]
    again = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_minutes=10")
    assert again.returncode == 0, again.stderr
    assert stored(tmp_path / "run")["step"] > 9         # typed, they set the length


def test_a_plan_that_leaves_nothing_open_measures_nothing(start, few_shapes, paced, monkeypatch):
    given = dict(n_layer=1, n_head=1, n_embd=16, batch_size=2, dropout=0.0, weight_decay=0.4)
    monkeypatch.setattr(train, "time_a_step", lambda *_: pytest.fail("measured"))
    assert start("run", **PLANNED | given, max_minutes=2).returncode == 0


def test_typed_settings_are_in_the_printed_command_even_at_their_defaults(start, few_shapes, paced):
    done = start("run", **PLANNED | dict(dropout=0.0), max_minutes=2, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert "--dropout=0.0" in planned_words(done.stdout)


@pytest.mark.parametrize(("given", "is_known"), [
    ({}, True), (dict(ngrams=0), False), (dict(dropout=0.3), False), (dict(ngram_decay=2.0), False)])
def test_what_is_known_of_planned_models_is_expected_of_no_other(start, few_shapes, paced, monkeypatch, given,
                                                                 is_known):
    monkeypatch.setattr(plan, "expected_bits", lambda text, tokens: (1.0, 1.5) if text.ngram_bits else ())
    done = start("run", **PLANNED | dict(ngrams=None) | given, max_minutes=2, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert ("expect " in done.stdout) == is_known


def test_the_decay_of_another_optimizer_is_not_planned(start, few_shapes, paced):
    done = start("run", **PLANNED | dict(optimizer="adamw", learning_rate=0.003), max_minutes=2, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert not [word for word in planned_words(done.stdout) if word.startswith("--weight_decay")]


@pytest.mark.parametrize("without", [dict(ngrams=0), dict(ngram_optimizer="adamw"), dict(optimizer="adamw")])
def test_a_rate_without_effect_is_not_planned_from_a_checkpoint(start, tmp_path, paced, without):
    assert start("first", max_iters=1, **without).returncode == 0
    done = start("run", init_from=tmp_path / "first", max_minutes=2, **PLANNED | without, dry_run=True)
    assert done.returncode == 0, done.stderr
    names = {word.partition("=")[0] for word in planned_words(done.stdout)}
    assert "--learning_rate" in names
    assert "--ngram_lr" not in names


def test_a_loss_that_is_not_finite_in_a_trial_is_one_line(start, few_shapes, paced):
    done = start("run", **PLANNED, optimizer="adamw", learning_rate=2e9, max_minutes=2)
    assert done.returncode == 3
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--learning_rate" in done.stderr


def test_settings_that_do_not_fit_a_trial_are_one_line(start, few_shapes, paced):
    one_line_error(start("run", **PLANNED, n_kv_head=2, head_dim=7, max_minutes=2), "must be even")


def test_a_resumed_run_keeps_its_plan(start, few_shapes, paced, tmp_path, monkeypatch):
    assert start("run", **PLANNED, max_minutes=2).returncode == 0
    before = stored(tmp_path / "run")["config"]
    monkeypatch.setattr(train, "time_a_step", lambda *_: pytest.fail("planned again"))
    done = inside(train.main, f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_minutes=2")
    assert done.returncode == 0, done.stderr
    after = stored(tmp_path / "run")["config"]
    assert {name: after[name] for name in SETTINGS} == {name: before[name] for name in SETTINGS}


def test_a_checkpoint_keeps_its_model_and_starts_at_lower_rates(start, few_shapes, paced, tmp_path, monkeypatch):
    assert start("base").returncode == 0
    monkeypatch.setattr(plan, "CHECKPOINT_EPOCHS", 0.2)
    done = start("tuned", **PLANNED, max_minutes=2, init_from=str(tmp_path / "base" / "ckpt.pt"), head_lr=0.5)
    assert done.returncode == 0, done.stderr
    assert "before the time is over" in done.stdout
    content = stored(tmp_path / "tuned")
    config = content["config"]
    tokens_of_step = config["batch_size"] * config["block_size"]
    assert 0.15 < config["max_iters"] * tokens_of_step / 18_000 <= 0.2
    assert config["n_embd"] == TOY["n_embd"]
    assert config["learning_rate"] == pytest.approx(plan.CHECKPOINT_RATES * Config.learning_rate)
    assert config["head_lr"] == 0.5


@pytest.mark.parametrize(("words", "minutes"), [
    (["--dataset=book"], train.MINUTES_UNLESS_SAID),
    (["--dataset=book", "--device=cpu", "--out_dir=x", "--seed=3", "--learning_rate=0.01"], train.MINUTES_UNLESS_SAID),
    ([], 0), (["--dataset=fables"], 0), (["config/portable.py", "--dataset=book"], 0),
    (["--dataset=book", "--n_layer=3"], 0), (["--dataset=book", "--max_iters=300"], 0),
    (["--dataset=book", "--max_epochs=2"], 0), (["--dataset=book", "--max_minutes=3"], 3.0),
    (["--dataset=book", "--eval_only"], 0)], ids=str)
def test_a_text_without_a_length_gets_ten_minutes(words, minutes, monkeypatch):
    monkeypatch.chdir(train.cli.__file__.rsplit("inkling", 1)[0])
    parsed = cli.parse(Config, words, train.__doc__)
    cfg = train.give_length(train.choose_length(Config(**parsed.values), parsed.typed), parsed)
    assert math.isclose(cfg.max_minutes, minutes)


def test_ten_minutes_are_announced_and_how_to_change_them(start, few_shapes, paced):
    done = start("run", **PLANNED)
    assert done.returncode == 0, done.stderr
    before, _, _ = done.stdout.partition("\nplan ")
    assert "--max_minutes=" in before
    assert before.splitlines()[-1].startswith(("trying ", "data "))
    assert "\ntrying   a few steps, to choose" in before
    assert re.search(r"^model .*: (1 layer|\d+ layers), 1 head, ", done.stdout, re.M)


def test_a_time_for_no_step_is_one_line(start, few_shapes, monkeypatch):
    monkeypatch.setattr(train, "time_a_step", lambda *_: 60.0)
    monkeypatch.setattr(train, "seconds_of_a_pass", lambda *args: 60.0)
    one_line_error(start("run", **PLANNED, max_minutes=0.05), "max_minutes=0.05", "a step takes about")
