"""A BPE trained on the text itself, tokenizers from files, and rare characters: all stored whole, all exact."""

import base64
import json
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, SHARED, one_line_error, prepared, refused, texts, trained
from hypothesis import given, settings
from hypothesis import strategies as st

import inkling.tokenizer
from inkling.readers import WORD_END, find_cut
from inkling.tokenizer import BOUNDED, END_OF_TEXT, PATTERN, Tokenizer, train_bpe
from inkling.tokenizer_choice import MANY_CHARACTERS
from prepare import Options, sample_training_text, write_set

FABLES = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
same_every_time = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """500 tokens of the fables, through JSON as in meta.json."""
    return Tokenizer(json.loads(json.dumps(train_bpe("bpe:500", [FABLES], PATTERN).stored)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(FABLES[:30_000], encoding="utf-8", newline="")
    return tmp_path


def meta_of(name: str) -> dict:
    return json.loads(Path("sets", name, "meta.json").read_text(encoding="utf-8"))


# -- trained ---------------------------------------------------------------------------------------------------------

def test_the_vocabulary_counts_the_end_of_text_token(bpe):
    assert bpe.vocab_size == 500
    assert bpe.eot == 499
    assert bpe.pieces[499] == END_OF_TEXT.encode()
    assert sorted(bpe.pieces[:256]) == [bytes([value]) for value in range(256)]
    assert b" the" in bpe.pieces


def test_it_is_stored_as_tiktoken_ranks(bpe):
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, bpe.stored["ranks"].splitlines())}
    theirs = tiktoken.Encoding("x", pat_str=bpe.stored["pattern"], mergeable_ranks=ranks, special_tokens={})
    assert bpe.encode(FABLES[:5000]).tolist() == theirs.encode_ordinary(FABLES[:5000])
    assert len(bpe.encode(FABLES)) < 0.5 * len(FABLES)


@same_every_time
@given(text=st.text() | st.text(alphabet="the <|endoftext|>\r\né\U0001f600"))
def test_any_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.eot not in bpe.encode(text)


def test_it_learns_from_the_training_text_alone_and_trains_the_same_twice(here):
    (here / "v.txt").write_text("qqzzqq " * 500)
    for name in "st":
        prepared("a.txt", f"--name={name}", "--val=v.txt", "--tokenizer=bpe:300")
    assert not [piece for piece in Tokenizer(meta_of("s")["tokenizer"]).pieces if b"qq" in piece]
    assert meta_of("s") == meta_of("t")
    assert "".join(texts("s")) == FABLES[:30_000] + "qqzzqq " * 500


def test_training_and_sampling_need_neither_rustbpe_nor_a_network(here, monkeypatch):
    prepared("a.txt", "--tokenizer=bpe:300")
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    done = trained(here / "sets", here / "run", dataset="a", max_iters=2)
    assert done.returncode == 0, done.stderr
    from train import load
    _, tokenizer = load(here / "run")
    assert tokenizer.decode(tokenizer.encode("Once 漢")) == "Once 漢"


def test_without_rustbpe_one_line(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    one_line_error(refused("a.txt", "--tokenizer=bpe:300"), "bpe:300", "pip install rustbpe")


def test_a_text_that_offers_fewer_merges_says_so(here):
    (here / "b.txt").write_text("abcab " * 50)
    assert "not 4,096" in prepared("b.txt", "--tokenizer=bpe:4096", "--val_fraction=0")
    assert meta_of("b")["vocab_size"] < 270
    assert texts("b")[0] == "abcab " * 50


@pytest.mark.parametrize("name", ["bpe:", "bpe:256", "bpe:x", "bpe:-5", "bpe:2000000", "bpe:²"])
def test_an_impossible_vocabulary_is_one_line(name, here):
    one_line_error(refused("a.txt", f"--tokenizer={name}"), name, "257")


def test_a_pattern_of_ones_own(here):
    prepared("a.txt", "--tokenizer=bpe:400", r"--pattern=\s+|\S+")
    pieces = Tokenizer(meta_of("a")["tokenizer"]).pieces[256:-1]
    assert not [piece for piece in pieces if piece.strip() and piece.strip() != piece]      # no space before a word
    assert "".join(texts("a")) == FABLES[:30_000]
    one_line_error(refused("a.txt", "--tokenizer=bpe:400", "--pattern=("), "pattern=(", "not a regular expression")
    one_line_error(refused("a.txt", "--tokenizer=bpe:400", r"--pattern=\w+"), "skips some", "a.txt")


def test_the_sample_is_bounded_and_evenly_spread():
    pieces = [("train" if n % 5 else "val", n, f"{n:05}" * 100) for n in range(1000)]
    taken = list(sample_training_text(pieces, 0.1))
    assert 39_000 < sum(map(len, taken)) < 41_000       # a tenth of the 400,000 characters of train
    numbers = [int(text[:5]) for text in taken]
    assert not [n for n in numbers if n % 5 == 0]
    assert max(np.diff([0, *numbers, 999])) < 20


# -- pieces of a long text -------------------------------------------------------------------------------------------

LONG = {"English": FABLES * 2, "Chinese": "漢字。我們的，春眠不覺曉！處處聞啼鳥\n" * 9000,
        "code": "def f(x):\n    return x_1+'é'\n" * 9000,
        "no spaces": "abc,DEF.ghi;" * 20_000, "blank lines": "one \n\n two\r\n\r\n" * 12_000}


build_once = cache(Tokenizer.build)

if (SHARED / "tiktoken_cache").is_dir():                # OpenAI's own ranks
    @pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
    @pytest.mark.parametrize("kind", LONG)
    def test_named_encodings_give_the_ids_of_the_whole_text(kind, name, monkeypatch):
        tokenizer = build_once(name)
        monkeypatch.setattr(inkling.tokenizer, "BOUNDED", 999)
        assert tokenizer.encode(LONG[kind]).tolist() == tiktoken.get_encoding(name).encode_ordinary(LONG[kind])


@pytest.mark.parametrize("pattern", [PATTERN, GPT2], ids=["GPT-4", "GPT-2"])
@pytest.mark.parametrize("kind", LONG)
def test_pieces_give_the_ids_of_the_whole_text(kind, pattern, bpe, monkeypatch):
    assert len(LONG[kind]) > 2 * BOUNDED
    bpe = Tokenizer(bpe.stored | {"pattern": pattern})
    for bounded in (97, 1000, 1 << 16):
        monkeypatch.setattr(inkling.tokenizer, "BOUNDED", bounded)
        assert bpe.encode(LONG[kind]).tolist() == bpe.encoding.encode_ordinary(LONG[kind])


@same_every_time
@given(text=st.text(alphabet="ab é漢'’s.,\n \t\r9½(\"", min_size=20, max_size=200))
def test_pieces_of_any_text_that_end_where_words_do_keep_its_ids(bpe, text):
    end = find_cut(text, 0, 20)
    if WORD_END.match(text, end - 1):
        parts = [*bpe.encoding.encode_ordinary(text[:end]), *bpe.encoding.encode_ordinary(text[end:])]
        assert parts == bpe.encoding.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", " ", "漢"])
def test_megabytes_of_one_character_do_not_stall(unit, bpe):
    text, start = unit * (3_000_000 // len(unit.encode())), time.monotonic()
    ids = bpe.encode(text)
    assert time.monotonic() - start < 9
    assert b"".join(bpe.pieces[value] for value in ids.tolist()) == text.encode()


def test_many_short_documents_in_one_call_are_what_each_one_is(bpe):
    documents = ["", "The hen", " the fox\n", f"a {END_OF_TEXT} b", "é", "x" * 70_000]
    for some in (documents[:3], documents[1:3], documents):
        expected = [value for text in some for value in (bpe.eot, *bpe.encode(text).tolist())][1:]
        assert bpe.encode_joined([(number > 0, text) for number, text in enumerate(some)]).tolist() == expected
        assert bpe.encode_joined([(True, text) for text in some]).tolist() == [bpe.eot, *expected]


# -- from files ------------------------------------------------------------------------------------------------------

def test_a_tiktoken_file_and_another_sets_tokenizer(here, bpe):
    (here / "my.tiktoken").write_text(bpe.stored["ranks"])
    (here / "b.txt").write_text("two", newline="")
    prepared("a.txt", "b.txt", "--name=s", "--tokenizer=my.tiktoken", "--val_fraction=0")
    assert texts("s")[0] == FABLES[:30_000] + END_OF_TEXT + "two"
    assert meta_of("s")["tokenizer"] == bpe.stored | {"name": "my"}
    assert "nothing has changed" in prepared("a.txt", "b.txt", "--name=s", "--tokenizer=my.tiktoken",
                                             "--val_fraction=0")
    prepared("b.txt", "--name=t", "--tokenizer=sets/s/meta.json", "--val_fraction=0")
    assert meta_of("t")["tokenizer"] == meta_of("s")["tokenizer"]
    assert texts("t")[0] == "two"


def test_another_sets_characters_may_not_be_enough(here):
    prepared("a.txt")
    (here / "b.txt").write_text("a 漢字", encoding="utf-8")
    one_line_error(refused("b.txt", "--tokenizer=sets/a/meta.json"), "b.txt", "no '漢'")
    assert not Path("sets/b/train.bin.tmp").exists()


@pytest.mark.parametrize("content", [b"", b"no file of ranks", b"YQ== 0\nYQ== x", b"YQ== 0\n", b"\xff\xfe"], ids=str)
def test_a_file_that_holds_no_ranks_is_one_line(content, here):
    (here / "x.tiktoken").write_bytes(content)
    one_line_error(refused("a.txt", "--tokenizer=x.tiktoken"), "x.tiktoken is not a tiktoken file")
    one_line_error(refused("a.txt", "--tokenizer=y.tiktoken"), "y.tiktoken")
    one_line_error(refused("a.txt", "--tokenizer=nowhere/meta.json"), "nowhere/meta.json")


def test_the_end_of_text_token_may_be_left_out(here):
    (here / "b.txt").write_text("two", newline="")
    prepared("a.txt", "b.txt", "--name=s", "--tokenizer=bpe:300", "--val_fraction=0", "--eot=False")
    assert texts("s")[0] == FABLES[:30_000] + "\ntwo"


# -- rare characters -------------------------------------------------------------------------------------------------

@same_every_time
@given(text=st.text())
def test_rare_characters_spelled_in_bytes_come_back(text):
    tokenizer = Tokenizer(json.loads(json.dumps({"kind": "char", "chars": "aeé ", "bytes": True})))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a漢").tolist() == [0, *(4 + byte for byte in "漢".encode())]
    assert tokenizer.vocab_size == 260


def test_rare_characters_are_spelled_or_refused(here):
    (here / "b.txt").write_text("aaabbb漢漢漢字", encoding="utf-8")
    said = prepared("b.txt", "--min_count=3", "--val_fraction=0")
    assert "1 rare characters (1 times in all) are spelled in bytes: '字'" in said
    assert meta_of("b")["tokenizer"] == {"kind": "char", "chars": "ab漢", "bytes": True}
    assert texts("b")[0] == "aaabbb漢漢漢字"
    assert meta_of("b")["splits"]["train"]["tokens"] == 12
    one_line_error(refused("b.txt", "--min_count=3", "--rare=refuse"), "'字'", "min_count=3", "--rare=bytes")
    prepared("b.txt", "--min_count=1", "--rare=refuse")


def test_thousands_of_characters_bring_a_hint(here):
    """Not below the size of the vocabulary that it recommends."""
    for name, count in (("many", MANY_CHARACTERS + 1), ("few", MANY_CHARACTERS)):
        (here / f"{name}.txt").write_text("".join(map(chr, range(0x4e00, 0x4e00 + count))), encoding="utf-8")
    assert "8,001 different characters" in prepared("many.txt")
    assert "bpe:" not in prepared("few.txt")


def test_the_compression_and_the_share_of_the_vocabulary_are_said(here):
    (here / "b.txt").write_text("abab" * 50)
    assert "256 tokens in the vocabulary, 0.8% of them used, 1.00 bytes per token" in prepared("b.txt",
                                                                                                "--tokenizer=byte")
    write_set(here / "c", [here / "b.txt"], options=Options(tokenizer="bpe:258", val_fraction=0))
    assert json.loads((here / "c/meta.json").read_text())["splits"]["train"]["tokens"] < 200
