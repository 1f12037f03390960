"""--tokenizer=auto: what it takes for a text, also without rustbpe, and what is said to those who gave no tokenizer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import prepared

from inkling import tokenizer_choice
from inkling.tokenizer_choice import BPE, bytes_of, choose_tokenizer

ENGLISH = "the quick brown fox jumps over a lazy dog. "
HINDI = "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e "
KOREAN = "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 "
POEMS = "\u5e8a\u524d\u660e\u6708\u5149\u7591\u662f\u5730\u4e0a\u971c"
MANY = "".join(map(chr, range(0x4E00, 0x4E00 + 9000)))


def counts_of(text: str, times: int = 1) -> np.ndarray:
    return times * np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32), minlength=0x110000)


@pytest.mark.parametrize("text", ["", "a", "\u00e9", "\u20ac", "\U0001f600", ENGLISH + POEMS])
def test_bytes_are_those_of_utf_8(text):
    assert bytes_of(counts_of(text)) == len(text.encode())


@pytest.mark.parametrize(("text", "times", "expected"), [
    (ENGLISH, 1000, "char"), (ENGLISH, 100_000, BPE), (HINDI, 100_000, BPE), (POEMS, 1000, "char"),
    (POEMS, 100_000, "char"), (KOREAN, 100_000, "char"), (MANY, 3, BPE)],
    ids=["short", "long", "Hindi", "few poems", "many poems", "Korean", "many different characters"])
def test_by_script_and_size(text, times, expected):
    pytest.importorskip("rustbpe")
    name, reason = choose_tokenizer(counts_of(text, times))
    assert name == expected
    assert reason


@pytest.fixture
def without_rustbpe(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)


@pytest.mark.parametrize(("text", "times", "expected"), [(ENGLISH, 100_000, "char"), (MANY, 3, "byte")])
def test_without_rustbpe_it_says_so(without_rustbpe, text, times, expected):
    name, reason = choose_tokenizer(counts_of(text, times))
    assert name == expected
    assert "pip install rustbpe" in reason


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_choice, "BPE", "bpe:300")
    (tmp_path / "book.txt").write_text(ENGLISH * 100)


def kind() -> str:
    return json.loads(Path("sets/book/meta.json").read_text(encoding="utf-8"))["tokenizer"]["kind"]


def test_prepare_takes_it_and_says_why(book, monkeypatch):
    assert "--tokenizer=auto takes char: " in prepared("book.txt", "--name=book", "--tokenizer=auto")
    assert kind() == "char"
    monkeypatch.setattr(tokenizer_choice, "BPE_FROM", 1000)
    pytest.importorskip("rustbpe")
    assert "takes bpe:300: " in prepared("book.txt", "--name=book", "--tokenizer=auto", "--force")
    assert kind() == "bpe"


def test_an_existing_set_keeps_its_own(book):
    prepared("book.txt", "--name=book", "--tokenizer=byte")
    assert "nothing has changed" in prepared("book.txt", "--name=book", "--tokenizer=auto")
    assert kind() == "byte"


def test_many_characters_without_rustbpe_are_bytes(book, without_rustbpe, tmp_path):
    (tmp_path / "book.txt").write_text(MANY, encoding="utf-8")
    assert "takes byte: " in prepared("book.txt", "--name=book", "--tokenizer=auto")
    assert kind() == "byte"


def test_those_who_gave_none_are_told(book, monkeypatch):
    assert "auto" not in prepared("book.txt", "--name=book")
    monkeypatch.setattr(tokenizer_choice, "BPE_FROM", 1000)
    said = prepared("book.txt", "--name=book", "--force")
    assert said.count("--tokenizer=auto would take") == 1
    assert kind() == "char"
    assert "auto" not in prepared("book.txt", "--name=book", "--tokenizer=char", "--force")


def test_they_are_told_without_rustbpe_too(book, without_rustbpe, monkeypatch):
    monkeypatch.setattr(tokenizer_choice, "BPE_FROM", 1000)
    assert "--tokenizer=auto would take bpe:300" in prepared("book.txt", "--name=book")
