"""Leaks: prepare.py says what of val stands in train in long runs, and which passages."""

import random
from pathlib import Path

import pytest
from conftest import ROOT, prepared, texts

from inkling import leaks
from inkling.dataset import read_meta
from inkling.leaks import find_leaks, mark_leaks
from inkling.tokenizer import code_points, stored_tokenizer

FABLES = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")
LICENSE = "Permission is hereby granted, free of charge, to any person who obtains a copy of this text, to sell it.\n"


@pytest.mark.parametrize("alphabet", ["abcd", "ab狐\n"])
def test_leaks_are_those_of_a_slow_search(monkeypatch, alphabet):
    monkeypatch.setattr(leaks, "RUN", 6)
    rng = random.Random(0)
    for _ in range(60):
        train, *val = ("".join(rng.choice(alphabet) for _ in range(rng.randint(0, most))) for most in (500, 60, 60))
        size = rng.randint(1, 99)
        pieces = (code_points(train[first:first + size]) for first in range(0, len(train), size))
        for text, marks in zip(val, mark_leaks(list(map(code_points, val)), pieces), strict=True):
            known = [text[i:i + 6] in train for i in range(len(text) - 5)]
            assert marks.tolist() == [any(known[max(0, i - 5):i + 1]) for i in range(len(text))]


@pytest.fixture
def leaky(tmp_path, monkeypatch):
    """A folder of 20 files that end with the same license."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(20):
        Path("texts", f"{number}.txt").write_text(FABLES[900 * number:900 * (number + 1)] + "\n" + LICENSE,
                                                  encoding="utf-8")
    return prepared("texts", "--name=set")


def test_preparing_says_how_much_of_val_stands_in_train_and_the_longest_passages(leaky):
    _, val = texts("set")
    place = next(number for number, line in enumerate(leaky.splitlines()) if line.startswith("leaks"))
    head, passage, *rest = leaky.splitlines()[place:]
    # Both licenses in val, and perhaps the line break before or after one.
    share = 2 * len(LICENSE) / len(val)
    assert float(head.split()[1].rstrip("%")) == pytest.approx(100 * share, rel=0.05)
    assert "in runs of 50 characters and more; the longest:" in head
    assert "Permission is hereby granted" in passage
    assert int(passage.split()[0]) == pytest.approx(len(LICENSE), abs=3)
    assert any("--dedup" in line for line in rest)
    assert leaky.splitlines()[-1].startswith("next     python train.py")


def test_an_older_set_is_looked_at_when_asked(leaky):
    lines = [line for line in leaky.splitlines() if "leak" in line or "Permission" in line]
    again = prepared("--anchors", "set")
    assert len(lines) >= 2
    assert all(line in again for line in lines)


def test_a_large_val_is_sampled_and_says_so(leaky, monkeypatch):
    folder = Path("sets", "set")
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    assert find_leaks(folder, meta, tokenizer).sampled == 0
    monkeypatch.setattr(leaks, "MOST_VAL", 1000)
    assert find_leaks(folder, meta, tokenizer).sampled == 64 * (1000 // 64)
    assert "(of 960 characters of it, evenly spread)" in prepared("--anchors", "set")


def test_a_passage_that_comes_again_is_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(FABLES[:3000] + LICENSE, encoding="utf-8")
    Path("val.txt").write_text("".join(f"{number} {LICENSE}" for number in range(3)), encoding="utf-8")
    said = prepared("train.txt", "--val=val.txt", "--name=set")
    assert said.count("Permission") == 1
    assert "3 times" in said


def test_a_text_without_leaks_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text(FABLES[:20_000], encoding="utf-8")
    assert "leaks    none: no 50 characters of val in a row stand in train\n" in prepared("one.txt")
    assert "leaks" not in prepared("one.txt", "--name=other", "--val_fraction=0")


def test_the_longest_passages_come_first_and_not_all_are_shown():
    sizes = [51, 90, 60, 70, 55, 80, 52]
    text = code_points("".join(chr(97 + number) * size + "-" for number, size in enumerate(sizes)))
    passages = leaks.longest_passages([text], [text != ord("-")])
    assert [len(passage) for passage, _ in passages] == sorted(sizes, reverse=True)[:leaks.SHOWN]
