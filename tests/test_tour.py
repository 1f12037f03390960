"""docs/tour.md and docs/tour.zh.md say the same and say it right: equal code and outputs, names that exist, every
command and every line of Python runs, in toy size, as in a notebook, and what needs no training prints what the pages
show."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys

import pytest
from conftest import ROOT, inside
from reader import Reader

import sample
import train
from inkling import tokenizer

PAGES = ["docs/tour.md", "docs/tour.zh.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HEAVY = re.compile(r"update\(|backward\(|load\(|model\(|model = GPT\(Config\(n_layer=1")     # run in toy size
DOWNLOADS = re.compile(r"gpt2\b.*encod|build\(\"(gpt2|cl100k_base)\"\)|gpt2\.encode")       # another tokenizer here


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list:
    """[(language, code)] of a page's fenced blocks; text: the output of the block before."""
    return FENCED.findall(page(name))


def prose(name: str) -> str:
    return FENCED.sub("", page(name))


# -- the pages -------------------------------------------------------------------------------------------------------

def test_both_languages_have_the_same_code_and_outputs():
    english, chinese = map(blocks, PAGES)
    assert english == chinese
    assert {language for language, _ in english} == {"sh", "python", "text"}
    assert len(english) > 50


def test_both_languages_have_the_same_chapters():
    def shape(name: str) -> list:
        """Headings with their numbers, rows of tables that begin with code or a link, and pictures with their files."""
        without_descriptions = re.sub(r"(?<=!)\[[^]]*\]", "[]", prose(name))
        return re.findall(r"^(?:#+ \d*|\| *(?=[`[])|!\[\]\(.*\))", without_descriptions, re.M)

    assert shape(PAGES[0]) == shape(PAGES[1])
    assert shape(PAGES[0]).count("## 1") == 1


def test_both_languages_give_the_same_figures():
    def figures(name: str) -> list:
        """Numbers with a point or a comma; those in millions are written otherwise in Chinese."""
        text = re.sub(r"[\d.,]+(M| 万| 亿)", "", prose(name))
        return sorted(set(re.findall(r"\d+\.\d+|\d{1,3}(?:,\d{3})+", text)))

    english, chinese = map(figures, PAGES)
    assert english == chinese
    known = {"10.82", "10.98", "10.99", "20,479", "5,145", "50,257", "19,532,032", "209,729", "100,276", "65,535"}
    assert known <= set(english)


@pytest.mark.parametrize("name", PAGES)
def test_every_chapter_says_what_to_read_and_what_to_change(name):
    chapters = re.split(r"^## ", page(name), flags=re.M)[1:]
    assert len(chapters) == 14
    for chapter in chapters[:-1]:
        assert re.search(r"^\*\*(To read|读代码)", chapter, re.M), chapter[:30]
        assert re.search(r"^\*\*(To change|改一改)", chapter, re.M), chapter[:30]


@pytest.mark.parametrize("name", PAGES)
def test_the_names_to_read_exist(name):
    """Every name in the paragraphs `To read` and in the last table, such as GPT.forward."""
    paragraphs = re.findall(r"^\*\*(?:To read:|读代码：)\*\*.*?(?=\n\n)", page(name), re.M | re.S)
    paragraphs += re.findall(r"^\| `[A-Za-z_]+.*", page(name), re.M)
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", "\n".join(paragraphs)))
    assert len(names) > 30
    for name in names:
        if re.search(r"\.py$", name):
            assert list(ROOT.glob(f"**/{name}")), name
            continue
        found = []
        for module in (train, sample, tokenizer):
            value = module
            for part in name.split("."):
                value = getattr(value, part, None)
            found.append(value)
        assert any(value is not None for value in found), name


def test_the_pictures_are_light_and_used_in_both():
    made = {path.name for path in (ROOT / "docs").glob("tour_*.png")}
    for name in PAGES:
        assert set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", page(name))) == made
    assert len(made) == 6
    for name in made:
        content = (ROOT / "docs" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 60_000
        assert struct.unpack(">I", content[16:20])[0] == 800        # pixels wide


def test_the_script_makes_the_pictures_of_the_tour(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = pictures              # which dataclasses look for
    spec.loader.exec_module(pictures)
    done = inside(pictures.main, f"--out_dir={tmp_path}", f"--data_dir={tmp_path / 'data'}", "--steps=2")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in (ROOT / "docs").glob("tour_*.png")}


# -- their code ------------------------------------------------------------------------------------------------------

NOTEBOOK = """
import contextlib, io, json, sys, traceback
import reader
sys.path[0] = ""
from train import Config
reader.toy_encodings()
TOY = dict(n_layer=1, n_head=2, n_kv_head=0, n_embd=16, block_size=16, batch_size=2, ngram_rows=97, max_iters=2)

def toy_config(**settings):
    return Config(**settings | {name: TOY[name] for name in settings.keys() & TOY.keys()})

cells = {"__name__": "__main__", "toy_config": toy_config}
for line in sys.stdin:
    cell = json.loads(line)
    if cell["toy"]:
        cell["code"] = cell["code"].replace("Config(", "toy_config(")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(cell["code"], "tour", "exec"), cells)
        print(json.dumps(dict(said=said.getvalue(), error="")), flush=True)
    except Exception:
        print(json.dumps(dict(said="", error=traceback.format_exc())), flush=True)
"""


class Notebook:
    """One Python process in a reader's folder, which runs cells in one namespace; a context manager."""

    def __init__(self, reader: Reader):
        env = {**reader.env, "PYTHONPATH": os.pathsep.join([reader.env["PYTHONPATH"], str(ROOT / "tests")])}
        self.process = subprocess.Popen([sys.executable, "-c", NOTEBOOK], cwd=reader.folder, env=env, text=True,
                                        encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def run(self, code: str, toy: bool) -> dict:
        """What a cell says, and its error."""
        self.process.stdin.write(json.dumps(dict(code=code, toy=toy)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("the stand-ins need fork and Unix sockets")
    with Reader(tmp_path_factory.mktemp("tour")) as reader:
        yield reader


def outputs() -> dict:
    """{code of a block: the output below it}."""
    found = blocks(PAGES[0])
    return {code: said for (_, code), (language, said) in zip(found, found[1:], strict=False) if language == "text"}


def test_every_block_runs_in_its_order(reader):
    """As a reader types and pastes them, from the first to the last; what neither trains nor downloads runs in full
    size, and prints what the page shows."""
    shown = outputs()
    compared = 0
    with Notebook(reader) as notebook:
        for language, code in blocks(PAGES[0]):
            if language == "sh":
                done = reader.run(code)
                assert done.returncode == 0, f"{code}\n{done.stdout[-500:]}{done.stderr}"
                assert "Traceback" not in done.stderr
            elif language == "python":
                heavy = bool(HEAVY.search(code))
                done = notebook.run(code, toy=heavy)
                assert not done["error"], f"{code}\n{done['error']}"
                if not heavy and not DOWNLOADS.search(code):
                    assert done["said"] == shown[code]
                    compared += 1
    assert compared >= 11


def test_a_wrong_cell_would_be_noticed(reader):
    with Notebook(reader) as notebook:
        assert "NameError" in notebook.run("nothing", toy=False)["error"]
        assert notebook.run("from train import Config\nprint(Config(n_layer=9).n_layer)", toy=True)["said"] == "1\n"
        assert notebook.run("from train import Config\nprint(Config(n_layer=9).n_layer)", toy=False)["said"] == "9\n"
