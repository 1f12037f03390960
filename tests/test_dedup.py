"""--dedup drops documents that are equal to an earlier one, or nearly so, and says how many."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, prepared, texts

from inkling import dedup
from inkling.dedup import BINS, SHINGLE, Sketch, drop_near, find_duplicates

WORDS = sorted({word for word in (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8").split()})


class Documents:
    """What a Reader yields of some texts, a piece of 1,000 characters at a time."""

    def __init__(self, texts: list, piece: int = 1000):
        self.texts = texts
        self.piece = piece

    def __iter__(self):
        for number, text in enumerate(self.texts):
            for first in range(0, len(text), self.piece):
                piece = text[first:first + self.piece]
                yield number, first == 0, piece, piece.encode()


def draw_document(rng: random.Random, words: int = 400) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def change(text: str, rng: random.Random, share: float) -> str:
    """`text` with a share of its words replaced, in one place."""
    words = text.split(" ")
    count = int(share * len(words))
    first = rng.randrange(len(words) - count)
    words[first:first + count] = [rng.choice(WORDS) for _ in range(count)]
    return " ".join(words)


def similarity(one: str, other: str) -> float:
    """The share of runs of SHINGLE characters that two texts have in common (Jaccard)."""
    one, other = ({text[i:i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(one & other) / len(one | other)


def estimate(one: str, other: str, piece: int = 1000) -> float:
    signatures = []
    for text in (one, other):
        sketch = Sketch()
        for _, _, part, raw in Documents([text], piece):
            sketch.add(part, raw)
        signatures.append(sketch.signature())
    return float((signatures[0] == signatures[1]).mean())


@pytest.mark.parametrize("share", [0, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("words", [40, 400])
def test_the_estimate_is_near_the_share_of_common_runs(share, words):
    rng = random.Random(0)
    errors = []
    for _ in range(30):
        text = draw_document(rng, words)
        other = change(text, rng, share)
        errors.append(estimate(text, other, rng.choice([7, 100, 1000])) - similarity(text, other))
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 1.3 * 0.5 / BINS**0.5


def test_pieces_do_not_matter():
    text = draw_document(random.Random(0))
    assert estimate(text, text, 5) == 1
    sketches = []
    for piece in (3, 8, 1000):
        sketch = Sketch()
        for _, _, part, raw in Documents([text], piece):
            sketch.add(part, raw)
        sketches.append(sketch)
    assert len({sketch.digest.digest() for sketch in sketches}) == 1
    assert all((sketch.smallest == sketches[0].smallest).all() for sketch in sketches)


def test_the_first_of_equal_and_of_nearly_equal_documents_is_kept():
    rng = random.Random(0)
    originals = [draw_document(rng) for _ in range(60)]
    documents = []
    expected = []
    equal = near = 0
    for number in range(300):
        if number < len(originals):
            documents.append(originals[number])
            expected.append(True)
            continue
        text = rng.choice(originals)
        way = rng.randrange(3)
        if way == 0:                                    # the same again
            equal += text in documents
            documents.append(text)
        elif way == 1:                                  # nearly the same
            near += 1
            documents.append(change(text, rng, 0.02))
        else:                                           # a good part of it
            documents.append(change(text, rng, 0.6))
        expected.append(way == 2)
    found = find_duplicates([Documents(documents)])
    assert found.keep[0].tolist() == expected
    assert (found.equal, found.near) == (equal, near)


def test_a_chain_is_cut_where_the_kept_document_is_no_longer_near():
    """B is near A and C near B, but C is not near A: B is dropped, C kept."""
    values = np.arange(1, BINS + 1, dtype=np.uint16)
    chain = np.stack([values, values, values])
    chain[1, :10] += 1000
    chain[2, :20] += 1000
    keep = np.ones(3, bool)
    drop_near(keep, chain)
    assert keep.tolist() == [True, False, True]


def test_short_documents_are_dropped_only_if_they_are_equal():
    documents = ["The fox sat.", "The fox sat!", "The fox sat.", "", "x", "x"]
    found = find_duplicates([Documents(documents)])
    assert found.keep[0].tolist() == [True, True, False, True, False]       # the empty one was never yielded
    assert (found.equal, found.near) == (2, 0)


def test_documents_above_the_limit_are_compared_for_equality(monkeypatch):
    monkeypatch.setattr(dedup, "MOST", 2)
    rng = random.Random(0)
    text = draw_document(rng)
    found = find_duplicates([Documents([text, "a", change(text, rng, 0.02), text])])
    assert found.keep[0].tolist() == [True, True, True, False]
    assert "only the first 2 documents" in dedup.dedup_lines(found)[1]


# -- the command

@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    documents = [draw_document(rng, 60) for _ in range(30)]
    copies = [documents[3], documents[7] + " ", documents[7]]
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents + copies),
                                  encoding="utf-8")
    return documents


def test_preparing_drops_them_and_says_how_many(rows):
    said = prepared("rows.jsonl", "--dedup", "--name=set")
    assert "note     --dedup: of 33 documents, 2 equal to an earlier one and 1 nearly so" in said
    assert "30 documents of 1 file: 27 in train, 3 in val" in said
    assert "nothing has changed" in prepared("rows.jsonl", "--dedup", "--name=set")
    prepared("--check", "set")
    split = "\n".join(texts("set")).split("\n")
    assert sorted(split) == sorted(rows)
    assert "nothing has changed" not in prepared("rows.jsonl", "--name=set")
    assert len("\n".join(texts("set")).split("\n")) == 33


def test_what_val_has_is_dropped_from_train(rows):
    Path("val.jsonl").write_text(json.dumps({"text": rows[5]}) + "\n", encoding="utf-8")
    assert "of 34 documents, 3 equal" in prepared("rows.jsonl", "--val=val.jsonl", "--dedup", "--name=set")
    train, val = texts("set")
    assert val == rows[5]
    assert train.split("\n") == rows[:5] + rows[6:]


def test_a_single_text_has_nothing_to_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("The fox. " * 50, encoding="utf-8")
    assert "this text is a single one: --separator divides it" in prepared("one.txt", "--dedup")
    Path("same.txt").write_bytes(Path("one.txt").read_bytes())
    said = prepared("one.txt", "same.txt", "--dedup", "--name=two")
    assert "2 documents, 1 equal" in said
    assert "both are taken" not in said
