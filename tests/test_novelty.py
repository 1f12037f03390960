"""Copying: what of a text stands in another, found by hashes, is what a slow search finds; and `sample.py --novelty`
says it of samples, beside the val text."""

import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, inside, one_line_error, prepared, trained

import sample
from inkling import runs
from inkling.dataset import open_split, read_meta
from inkling.novelty import RUN, find_copies, find_training_text
from inkling.runs import Runs, overlapping
from inkling.texts import decode_symbols, read_symbols
from inkling.tokenizer import Tokenizer, code_points, stored_tokenizer

FABLES = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")


def draw_text(rng: random.Random, most: int, alphabet: str) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, most)))


def in_pieces(text: str, size: int):
    return (code_points(text[first:first + size]) for first in range(0, len(text), size))


# -- runs of a given length

@pytest.mark.parametrize("base", [runs.BASE, 1])        # 1: all anagrams have the same hash
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_runs_are_found_where_a_slow_search_finds_them(monkeypatch, base, length):
    monkeypatch.setattr(runs, "BASE", base)
    rng = random.Random(length)
    for _ in range(40):
        alphabet = rng.choice(["ab", "a狐é😀\n"])
        texts = [draw_text(rng, 40, alphabet) for _ in range(rng.randint(0, 4))]
        other = draw_text(rng, 120, alphabet)
        known = {text[i:i + length] for text in texts for i in range(len(text) - length + 1)}
        found = Runs(list(map(code_points, texts)), length)
        places, numbers = found.find(code_points(other))
        assert len(found.hashes) == len(known)
        assert places.tolist() == [i for i in range(len(other) - length + 1) if other[i:i + length] in known]
        for place, number in zip(places, numbers, strict=True):
            run = other[place:place + length]
            assert found.texts_with([number]) == [i for i, text in enumerate(texts) if run in text]


@pytest.mark.parametrize("overlap", [0, 1, 7, 50])
def test_pieces_overlap_and_know_their_place(overlap):
    text = FABLES[:500]
    for offset, symbols in overlapping(in_pieces(text, 30), overlap):
        assert symbols.tolist() == code_points(text[offset:offset + len(symbols)]).tolist()
        assert len(symbols) >= min(overlap, offset)
    assert offset + len(symbols) == len(text)


# -- the longest run

def slow_copy(text: str, train: str) -> tuple:
    """(longest run, offset, line, column, share) by trying all runs, the longest first."""
    windows = [text[i:i + RUN] for i in range(len(text) - RUN + 1)]
    share = sum(window in train for window in windows) / len(windows) if windows else None
    for length in range(len(text), 0, -1):
        places = [train.find(text[i:i + length]) for i in range(len(text) - length + 1)]
        if found := [place for place in places if place >= 0]:
            before = train[:min(found)]
            line_start = before.rfind("\n") + 1
            return train[len(before):len(before) + length], len(before), before.count("\n") + 1, \
                len(before) - line_start + 1, share
    return "", 0, 0, 0, share


@pytest.mark.parametrize("alphabet", ["ab\n", "abcdefghijklmnop狐\n"])
def test_the_longest_run_and_its_place_are_those_of_a_slow_search(alphabet):
    rng = random.Random(0)
    for _ in range(25):
        train = draw_text(rng, 600, alphabet)
        texts = []
        for _ in range(rng.randint(1, 3)):
            text = draw_text(rng, 40, alphabet)
            for _ in range(rng.randint(0, 2)):
                start = rng.randint(0, len(train))
                text += train[start:start + rng.randint(0, 60)] + draw_text(rng, 5, alphabet)
            texts.append(text)
        size = rng.randint(1, 200)
        for text, copied in zip(texts, find_copies(texts, partial(in_pieces, train, size)), strict=True):
            found = (copied.run, copied.offset, copied.line, copied.column, copied.share)
            assert found == pytest.approx(slow_copy(text, train))


# -- the text of a set, a piece at a time

@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "char --min_count=20"])
def test_a_split_is_read_as_it_was_written(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("inkling.texts.PART", 100)
    (tmp_path / "a.txt").write_text(FABLES[:3000] + "狐狸é" * 100, encoding="utf-8")
    (tmp_path / "b.txt").write_text(FABLES[3000:5000], encoding="utf-8")
    try:
        prepared("a.txt", "b.txt", "--name=set", f"--tokenizer={tokenizer.split()[0]}", *tokenizer.split()[1:],
                 "--shard_tokens=701", "--val_fraction=0.01")
    except AssertionError as error:
        if "tiktoken" in str(error):
            pytest.skip("needs tiktoken's files")
        raise
    folder = Path("sets", "set")
    meta = read_meta(folder)
    tokenizer = stored_tokenizer(folder, meta)
    for split in ("train", "val"):
        ids = open_split(folder, meta, split)
        text = tokenizer.decode(ids[0:len(ids)].tolist())
        assert "".join(map(chr, decode_symbols(tokenizer, ids[0:len(ids)]))) == text
        pieces = list(read_symbols(folder, meta, split, tokenizer))
        assert "".join(chr(symbol) for piece in pieces for symbol in piece) == text


# -- the command

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with data/toy, as if the programs lay beside it, and with a checkpoint of that set."""
    folder = tmp_path_factory.mktemp("novelty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "toy.txt").write_text(FABLES[:20_000], encoding="utf-8")
        prepared("toy.txt", "--name=toy")
        (folder / "sets").rename(folder / "data")
        done = trained(folder / "data", folder / "run", max_iters=30, learning_rate=0.01)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def beside(model, monkeypatch):
    monkeypatch.chdir(model)
    monkeypatch.setattr("inkling.dataset.ROOT", model)
    return model


def sampled(*words):
    return inside(sample.main, "--ckpt=run/ckpt.pt", "--num_samples=2", "--max_new_tokens=120", "--temperature=0.5",
                  "--start=The", *words)


def test_samples_are_compared_with_the_set_of_the_checkpoint(beside):
    done = sampled("--novelty", "--json")
    assert done.returncode == 0, done.stderr
    *records, last = map(json.loads, done.stdout.splitlines())
    novelty = last["novelty"]
    train, val = Path("data/toy/train.bin"), Path("data/toy/val.bin")
    tokenizer = Tokenizer(read_meta(train.parent)["tokenizer"])
    text = tokenizer.decode(train.read_bytes())
    assert len(novelty["samples"]) == 2
    for record, copied in zip(records, novelty["samples"], strict=True):
        assert list(copied.values()) == pytest.approx(slow_copy(record["text"], text))
    assert len(novelty["val"]) == len(val.read_bytes()) // 120
    first = tokenizer.decode(val.read_bytes()[:120])
    assert list(novelty["val"][0].values()) == pytest.approx(slow_copy(first, text))


def test_novelty_is_said_after_the_samples(beside):
    done = sampled("--novelty")
    head, *lines = done.stdout.splitlines()[-4:]
    assert head.startswith("novelty  the longest run that also stands in train of data/toy")
    for number, line in enumerate(lines[:2], 1):
        said = re.fullmatch(rf"  sample {number} +(\d+) characters? +\d+\.\d%  line (\d+), column (\d+): (.+)", line)
        assert said, line
    assert re.fullmatch(r"  val +\d+ characters .*16 pieces about as long.*", lines[2]), lines[2]
    assert sampled().stdout == done.stdout[:done.stdout.index("novelty")]


def test_a_named_file_or_set_is_the_text(beside):
    Path("copy.txt").write_bytes(b"\xef\xbb\xbf" + FABLES[:18_000].replace("\n", "\r\n").encode())
    copies = [json.loads(sampled(f"--novelty={text}", "--json").stdout.splitlines()[-1])["novelty"]["samples"]
              for text in ("copy.txt", "data/toy", "auto")]
    assert copies[0] == copies[1] == copies[2]
    Path("other.txt").write_text("zzzz", encoding="utf-8")
    last = sampled("--novelty=other.txt").stdout.splitlines()[-1]
    assert last.startswith("  sample 2")                # no val, and there may be no run


def test_what_is_not_the_models_text_is_refused_before_anything_is_generated(beside):
    one_line_error(sampled("--novelty=missing.txt"), "missing.txt", "No such file")
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert "UTF-8" in sampled("--novelty=latin.txt").stderr
    one_line_error(inside(sample.main, "--ckpt=run/ckpt.pt", "--score=toy.txt", "--novelty"), "--novelty", "change")
    meta = Path("data/toy/meta.json")
    before = meta.read_bytes()
    changed = json.loads(before)
    changed["splits"]["train"]["sha256"] = "0" * 64
    try:
        meta.write_text(json.dumps(changed), encoding="utf-8")
        done = sampled("--novelty")
        one_line_error(done, "data/toy does not hold the text", "--novelty=FILE")
        assert not done.stdout
    finally:
        meta.write_bytes(before)


@pytest.mark.parametrize("name", ["../data/toy", "/etc", "toy/../toy", "", 7, None])
def test_no_path_that_a_checkpoint_names_is_opened(beside, name):
    with pytest.raises(Exception, match="does not say what it was trained on"):
        find_training_text("auto", {"config": {"dataset": name, "data_dir": str(beside)}, "text": "0" * 64})
    with pytest.raises(Exception, match="is not there"):
        find_training_text("auto", {"config": {"dataset": "set", "data_dir": str(beside / "data")}, "text": "0" * 64})
