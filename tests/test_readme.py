"""README.md and README.zh.md say the same and say it right: equal code, links that lead somewhere, messages that the
programs really print, and every block of shell and Python runs, in toy size (tests/reader.py)."""

import ast
import os
import re

import pytest
from conftest import ROOT, log_rows, same_runs
from reader import Reader

import train

READMES = ["README.md", "README.zh.md"]
PAGES = [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md", "docs/tour.md", "docs/tour.zh.md"]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("inkling/*.py")]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list:
    """[(language, code)] of a page's fenced blocks."""
    return FENCED.findall(page(name))


def without_comments(name: str) -> list:
    return [(language, re.sub(r"(?m)\s+#.*$", "", code)) for language, code in blocks(name)]


def prose(name: str) -> str:
    return FENCED.sub("", page(name))


def table(name: str) -> list:
    """The cells of the READMEs' table of configs, row by row."""
    rows = [line.split("|")[1:-1] for line in prose(name).splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == 5]


# -- the pages -------------------------------------------------------------------------------------------------------

def test_both_languages_have_the_same_code():
    english, chinese = map(without_comments, READMES)
    assert english == chinese
    assert len(english) > 10


def test_the_chinese_page_translates_the_comments():
    for language, code in blocks("README.zh.md"):
        for comment in re.findall(r"\s# (.*)", code) if language else []:
            assert re.search(r"[\u4e00-\u9fff]", comment) or comment == "(1, T)"


@pytest.mark.parametrize("name", PAGES)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(name):
    for lines in re.findall(r"(?:^\|.*\n)+", prose(name) + "\n", re.M):
        rows = re.sub(r"`[^`\n]*`|\\\|", "", lines).splitlines()
        assert {row.count("|") for row in rows} == {rows[0].count("|")}, lines
        assert all(row.endswith("|") for row in rows), lines


@pytest.mark.parametrize(("name", "time"), [("README.md", "seconds|minute|hour"), ("README.zh.md", "秒|分钟|小时")])
def test_every_command_that_trains_says_how_long_it_takes(name, time):
    """The quick start says it in the paragraph below it, torchrun depends on the machines."""
    lines = [line for language, code in blocks(name)[2:] if language == "sh" for line in code.splitlines()]
    training = [line for line in lines if line.startswith("python train.py")]
    assert len(training) > 20
    for line in training:
        assert re.search(f"# .*({time}|half a day|the same|半天|同上)", line), line


def test_both_languages_have_the_same_sections():
    def shape(name: str) -> list:
        """Headings, rows of tables that begin with code, pictures."""
        return re.findall(r"^(?:#+ |\| *(?=`)|!\[)", prose(name), re.M)

    assert shape("README.md") == shape("README.zh.md")


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
        if anchor:
            titles = re.findall(r"^#+ (.+)", file.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_picture_is_light():
    pictures = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", page("README.md") + page("README.zh.md")))
    assert pictures
    assert all((ROOT / picture).stat().st_size < 100_000 for picture in pictures)


def test_every_config_is_named():
    for config in (ROOT / "config").glob("*.py"):
        family = re.sub(r"_(medium|large|xl)$", "*", config.stem).replace("gpt2*", "gpt2")
        assert f"config/{family}" in page("README.md"), config.name


def test_the_figures_of_the_table_are_those_measured():
    """In both languages the same figures, each loss in bench/RESULTS.md, which says where it comes from."""
    english, chinese = ([re.findall(r"\d[\d.]*", "|".join(row[2:])) for row in table(name)] for name in READMES)
    english[0] = chinese[0] = []            # the head, with the names of processors
    assert english == chinese
    losses = {figure for row in english for figure in row if re.fullmatch(r"\d\.\d+", figure)}
    assert len(losses) > 10
    assert not [figure for figure in losses if figure not in page("bench/RESULTS.md")]


def test_the_headline_is_the_mean_of_its_seeds():
    seeds = re.search(r"three seeds \((.*?)\)", page("README.md").replace("\n", " "))[1].split(", ")
    mean = f"{sum(map(float, seeds)) / 3:.3f}"
    for name in READMES:
        assert all(figure in page(name) for figure in (mean, *seeds))
    assert all(seed in page("bench/RESULTS.md") for seed in seeds)


def test_contributing_lists_every_module_in_the_words_of_its_docstring():
    listed = re.findall(r"^- `(\w+\.py)`: (.*(?:\n  .*)*)", page("CONTRIBUTING.md"), re.M)
    modules = {}
    for path in (ROOT / "inkling").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if docstring:                           # __init__.py has none
            modules[path.name] = " ".join(docstring.partition("\n\n")[0].split())
    assert {name: " ".join(text.split()) for name, text in listed if name in modules} == modules
    names = [name for name, _ in listed if name in modules]
    assert names == sorted(names)


def program_texts() -> str:
    """Every text of the programs, one a line, with {} for what is filled in."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split()))
    return "\n".join(found)


@pytest.mark.parametrize("name", READMES)
def test_the_messages_under_troubleshooting_are_those_of_the_programs(name):
    """Whoever searches the page for what the screen says finds it."""
    texts = program_texts()
    headings = re.findall(r"^- \*\*(.*?)\*\*", prose(name), re.M)
    messages = [message for heading in headings for message in re.findall(r"[\"“](.*?)[\"”]", heading)]
    assert len(messages) > 10
    missing = []
    put_together_when_printed = {"�", "compile off"}
    for message in set(messages) - put_together_when_printed:
        filled_in = re.sub(r"\bval(?= has)|\d+", "{}", message)
        if message not in texts and filled_in not in texts:
            missing.append(message)
    assert missing == []


def test_the_optimizer_of_contributing_trains_and_resumes(start, toy, tmp_path, monkeypatch):
    """It is all that a third optimizer needs, last.pt and resuming included."""
    [code] = [code for language, code in blocks("CONTRIBUTING.md") if language == "python"]
    monkeypatch.setattr(train, "OPTIMIZERS", dict(train.OPTIMIZERS))
    exec(compile(code, "CONTRIBUTING.md", "exec"), dict(vars(train)))
    settings = dict(optimizer="sgd", learning_rate=0.1, weight_decay=0.0)
    for words in (dict(out="whole"), dict(out="parts", max_iters=3), dict(out="parts", init_from="resume")):
        done = start(words.pop("out"), **settings | words | dict(decay_lr=False))
        assert done.returncode == 0, done.stderr
    losses = [float(row["val_loss"]) for row in log_rows(tmp_path / "whole") if row["val_loss"]]
    assert losses[-1] < losses[0]
    same_runs(tmp_path / "whole", tmp_path / "parts")


# -- their code ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("the stand-ins need fork and Unix sockets")
    with Reader(tmp_path_factory.mktemp("reader")) as reader:
        yield reader


def test_every_command_works_as_typed(reader):
    for name in ("README.md", "bench/RESULTS.md"):
        for language, code in blocks(name):
            if language:
                done = reader.run(code, language)
                assert done.returncode == 0, f"{name}:\n{code}\n{done.stdout[-500:]}{done.stderr}"
                assert "Traceback" not in done.stderr
    assert "compile off" in reader.run("python train.py").stdout


@pytest.mark.parametrize("code", [
    "python trian.py", "python train.py --n_layers=3", "python train.py --n_embd=255", "python sample.py --ckpt=none",
    "python prepare.py nowhere.txt", "pip install -r require.txt", "python train.py config/nothing.py",
    "torchrun --standalone --nproc_per_nodes=4 train.py", "false | cat", "python sample.py --help=3", "hf download x",
    "python prepare.py fables && python train.py --dataset=fable", "python -m inkling.plots out/none"])
def test_a_wrong_command_would_be_noticed(reader, code):
    assert reader.run(code).returncode != 0


def test_wrong_python_would_be_noticed(reader):
    assert reader.run("import nothing", "python").returncode != 0
