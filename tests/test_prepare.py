"""prepare.py turns text into token files that say the same; until they are complete, the old ones stay usable; damaged
ones are refused."""

import base64
import copy
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, SHARED, TOY, flags, inside, one_line_error, trained
from hypothesis import given, settings
from hypothesis import strategies as st

import inkling.dataset
import inkling.encode
import inkling.files
import prepare
import train
from inkling.cli import UserError, exit_code
from inkling.dataset import (
    COMMITTED,
    check_ids,
    finish_replacement,
    open_data,
    open_split,
    read_meta,
    token_dtype,
)
from inkling.files import lock_folder
from inkling.split import split_documents, survey_documents
from inkling.tokenizer import END_OF_TEXT, Tokenizer
from prepare import check_set, ensure_set, write_set

FILES = ("train.bin", "val.bin", "meta.json")
PUZZLE = f"tab\tCRLF\r\nCR\rNUL\0 é e\u0301 \ufeff\u2028 漢字 \U0001f600 \U0010ffff {END_OF_TEXT} the end\n"
same_every_time = settings(max_examples=50, deadline=None, derandomize=True, database=None)

# A byte-pair encoding small enough to read: all bytes, eight merges, special tokens behind a gap of two ids.
MERGES = [b"th", b"he", b"the", b" the", b"\xc3\xa9", b"\xf0\x9f", b"\r\n", b"<|"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([value]) for value in range(256)), *MERGES])}
TOY_BPE = tiktoken.Encoding("toy", pat_str=r" ?\w+|\r\n|\W", mergeable_ranks=RANKS,
                            special_tokens={END_OF_TEXT: len(RANKS) + 2, "<|other|>": len(RANKS) + 3})
EOT = len(RANKS) + 2


@pytest.fixture
def toy_bpe(monkeypatch):
    """tiktoken knows one encoding, `toy`, without a download."""
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["toy"])
    monkeypatch.setattr(tiktoken, "get_encoding", {"toy": TOY_BPE}.__getitem__)


@pytest.fixture
def write(tmp_path, toy_bpe):
    """Write texts (str or bytes), one file each, and prepare them; returns the set's folder."""
    def write(*texts, folder="set", tokenizer="char", **options) -> Path:
        sources = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for source, text in zip(sources, texts, strict=True):
            source.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        write_set(tmp_path / folder, sources, options=prepare.Options(tokenizer=tokenizer, **options))
        return tmp_path / folder
    return write


@pytest.fixture
def refused(capsys):
    """What a person sees of a call that must end the program."""
    def refused(call, *args) -> SimpleNamespace:
        capsys.readouterr()
        code = exit_code(lambda _: call(*args) and 0, [])
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err)
    return refused


def split_ids(folder: Path) -> list:
    """[train ids, val ids], from nothing but the folder's files."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return [np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")]


def split_texts(folder: Path) -> list:
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["tokenizer"]
    return [Tokenizer(stored).decode(ids) for ids in split_ids(folder)]


def contents(folder: Path) -> dict:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# -- tokenizers ----------------------------------------------------------------------------------------------

def tokenizer_of(kind: str, text: str) -> Tokenizer:
    """A tokenizer that has been through JSON, as in meta.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "list_encoding_names", lambda: ["toy"])
        patch.setattr(tiktoken, "get_encoding", {"toy": TOY_BPE}.__getitem__)
        return Tokenizer(json.loads(json.dumps(Tokenizer.build(kind, text).stored)))


KINDS = pytest.mark.parametrize("kind", ["char", "byte", "toy"])


@KINDS
@same_every_time
@given(text=st.text() | st.text(alphabet="the <|endoftext|>\r\né\U0001f600"))
def test_any_text_comes_back(kind, text):
    tokenizer = tokenizer_of(kind, text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == token_dtype(tokenizer.vocab_size)
    assert all(0 <= value < tokenizer.vocab_size for value in ids.tolist())


@KINDS
@same_every_time
@given(text=st.text() | st.text(alphabet="é漢\U0001f600\ufffd"))
def test_a_stream_holds_partial_characters_back_and_loses_nothing(kind, text):
    tokenizer, said = tokenizer_of(kind, text), ""
    say = tokenizer.stream()
    for value in tokenizer.encode(text):
        said += say(value)
        assert text.startswith(said)
    assert said + say(None) == text


def test_a_stream_ends_with_what_never_became_a_character():
    say = Tokenizer({"kind": "byte"}).stream()
    assert [say(value) for value in "é\U0001f600".encode()[:-1]] == ["", "é", "", "", ""]
    assert say(None) == "\ufffd"


def test_char_ids_are_the_sorted_distinct_characters():
    tokenizer = Tokenizer.build("char", "hello\n")
    assert tokenizer.stored == {"kind": "char", "chars": "\nehlo"}
    assert tokenizer.encode("hello\n").tolist() == [2, 1, 3, 3, 4, 0]
    assert (tokenizer.vocab_size, tokenizer.eot) == (5, None)


def test_byte_ids_are_the_bytes():
    tokenizer = Tokenizer.build("byte", "")
    assert tokenizer.encode("hé").tolist() == [0x68, 0xc3, 0xa9]
    assert tokenizer.decode([0xff, 0x41, 0xc3]) == "\ufffdA\ufffd"
    assert (tokenizer.vocab_size, tokenizer.eot) == (256, None)


def test_bpe_merges_like_tiktoken_and_is_stored_whole():
    tokenizer = tokenizer_of("toy", "")
    text = "the other the theée\r\n"
    assert tokenizer.encode(text).tolist() == TOY_BPE.encode_ordinary(text)
    assert len(tokenizer.encode(text)) < len(text)
    assert tokenizer.decode([RANKS[b"the"], EOT, RANKS[b"\xc3\xa9"]]) == f"the{END_OF_TEXT}é"
    assert (tokenizer.vocab_size, tokenizer.eot) == (EOT + 2, EOT)
    ranks = [line.split() for line in tokenizer.stored["ranks"].splitlines()]
    assert {base64.b64decode(token): int(rank) for token, rank in ranks} == RANKS


def test_ids_in_a_gap_of_the_vocabulary_decode_to_nothing():
    assert tokenizer_of("toy", "").decode([RANKS[b"th"], len(RANKS), len(RANKS) + 1, RANKS[b"e"]]) == "the"


def test_a_stored_tokenizer_needs_no_tiktoken_files(write, monkeypatch):
    folder = write("the other\n" * 9, tokenizer="toy")
    for name in ("get_encoding", "list_encoding_names"):
        monkeypatch.setattr(tiktoken, name, None)
    assert "".join(split_texts(folder)) == "the other\n" * 9


def test_characters_that_a_tokenizer_lacks_are_named():
    with pytest.raises(ValueError, match="no 'x' '漢'") as error:
        Tokenizer.build("char", "abc").encode("a漢bxc漢")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_lone_surrogate_is_no_text(kind):
    with pytest.raises(ValueError, match=r"\\ud800.* at 2"):
        Tokenizer.build(kind, "ab").encode("ab\ud800")


def test_an_empty_prompt_becomes_a_token():
    assert tokenizer_of("toy", "").encode_prompt("").tolist() == [EOT]
    assert Tokenizer.build("char", "b\na").encode_prompt("").tolist() == [0]
    assert Tokenizer.build("byte", "").encode_prompt("").tolist() == [10]
    assert Tokenizer.build("char", "ba").encode_prompt("").tolist() == [0]
    assert Tokenizer.build("char", "ba").encode_prompt("b").tolist() == [1]


# -- the files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"),
                                                   (65_536, "uint16"), (65_537, "uint32")])
def test_the_smallest_type_that_holds_every_id(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"),
                                                   (65_537, "uint32")])
def test_a_set_of_each_type_keeps_its_highest_id(vocab_size, dtype, write):
    points = [point for point in range(vocab_size + 2048) if not 0xD800 <= point < 0xE000]     # no surrogates
    folder = write("".join(map(chr, points[:vocab_size])), newlines="keep")
    assert (folder / "train.bin").stat().st_size == int(vocab_size * 0.9) * np.dtype(dtype).itemsize
    ids = np.concatenate(split_ids(folder))
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == list(range(vocab_size))
    check_set(folder)


@KINDS
@pytest.mark.parametrize("mark", [b"", "\ufeff".encode()], ids=["plain", "BOM"])
def test_the_files_say_exactly_what_the_text_says(kind, mark, write):
    for newlines, text in {"keep": PUZZLE, "convert": PUZZLE.replace("\r\n", "\n").replace("\r", "\n")}.items():
        folder = write(mark + PUZZLE.encode(), tokenizer=kind, val_fraction=0.25, newlines=newlines)
        assert split_texts(folder) == [text[:int(len(text) * 0.75)], text[int(len(text) * 0.75):]]


@settings(same_every_time, max_examples=25)
@given(text=st.text(min_size=1), val_fraction=st.floats(0, 0.99))
def test_any_text_and_any_fraction_make_a_whole_set(text, val_fraction, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / "text").write_bytes(b"\n" + text.encode())        # or a U+FEFF in front would be a mark
    write_set(folder, [folder / "text"], options=prepare.Options(val_fraction=val_fraction, newlines="keep"))
    check_set(folder)
    assert "".join(split_texts(folder)) == "\n" + text


def test_meta_says_what_is_in_the_files(write, tmp_path):
    text = "Zoé's 9 €\n" * 3                            # 30 characters; é has two bytes, € three
    meta = json.loads((write(text, val_fraction=0.4) / "meta.json").read_text(encoding="utf-8"))
    halves = {"train": text[:18], "val": text[18:]}
    chars = "".join(sorted(set(text)))
    assert meta.pop("anchors")["uniform"] > 0           # tests/test_anchors.py
    assert meta == {
        "format": 1, "dtype": "uint8", "vocab_size": 9, "val_fraction": 0.4,
        "splits": {split: {"tokens": len(half), "characters": len(half), "bytes": len(half.encode()),
                           "sha256": hashlib.sha256(bytes(chars.index(char) for char in half)).hexdigest()}
                   for split, half in halves.items()},
        "tokenizer": {"kind": "char", "chars": chars},
        "sources": [{"file": "0.txt", "bytes": 39, "sha256": hashlib.sha256(text.encode()).hexdigest()}]}
    assert meta.items() <= read_meta(tmp_path / "set").items()


def test_meta_counts_tokens_characters_and_bytes_apart(write):
    meta = read_meta(write("thethe é", "the", tokenizer="toy", val_fraction=0))
    assert meta["vocab_size"] == EOT + 2
    assert meta["dtype"] == "uint16"
    counts = {key: meta["splits"]["train"][key] for key in ("tokens", "characters", "bytes")}
    assert counts == {"tokens": 6, "characters": 11, "bytes": 12}   # the, the, space, é, end of text, the
    assert [source["file"] for source in meta["sources"]] == ["0.txt", "1.txt"]


def test_twice_the_same_command_twice_the_same_bytes(run, tmp_path):
    (tmp_path / "note.txt").write_text(PUZZLE * 20, encoding="utf-8", newline="")
    for number in "12":                                 # the seed decides the order of sets of strings
        done = run("prepare.py", "note.txt", f"--data_dir={number}", env={"PYTHONHASHSEED": number})
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1" / "note") == contents(tmp_path / "2" / "note")
    assert set(contents(tmp_path / "1" / "note")) == set(FILES)


def test_prepare_never_imports_torch(tmp_path):
    code = ("import sys, prepare; prepare.main(['fables', *sys.argv[1:]]); "
            "prepare.main(['--check', 'fables', *sys.argv[1:]]); assert 'torch' not in sys.modules")
    argv = [sys.executable, "-c", code, f"--data_dir={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val.bin" in done.stdout


# -- the split -----------------------------------------------------------------------------------------------

def test_no_token_spans_both_sides(write):
    text = "the" * 10
    assert TOY_BPE.encode_ordinary("the") == [RANKS[b"the"]]
    train, val = split_texts(write(text, tokenizer="toy", val_fraction=0.05))
    assert (train, val) == ("the" * 9 + "t", "he")      # 28 characters, within the last token


def test_the_text_is_cut_between_characters_not_bytes(write):
    folder = write("\U0001f600" * 10, tokenizer="byte", val_fraction=0.15)      # in bytes, 34 of 40
    assert split_texts(folder) == ["\U0001f600" * 8, "\U0001f600" * 2]


def test_a_fraction_of_zero_keeps_all_for_training(write):
    folder = write("abc" * 10, val_fraction=0)
    assert split_texts(folder) == ["abc" * 10, ""]
    check_set(folder)


def divided(documents: list, val_fraction: float, seed: int = 0) -> tuple:
    """([train parts], [val parts]), each with the number of its document, of texts that are not empty."""
    reader = [(number, True, text, text.encode()) for number, text in enumerate(documents)]
    parts = {"train": [], "val": []}
    for split, number, text in split_documents(reader, survey_documents(reader, seed), val_fraction, seed):
        parts[split].append((number, text))
    return parts["train"], parts["val"]


@same_every_time
@given(documents=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=30),
       val_fraction=st.floats(0, 0.99))
def test_the_split_of_documents_loses_nothing(documents, val_fraction):
    train, val = divided(documents, val_fraction)
    if len(documents) > 1 and len(documents) * val_fraction >= 1:       # enough for whole ones on either side
        assert sorted(train + val) == list(enumerate(documents))
        assert train
        assert len(val) <= max(1, int(len(documents) * val_fraction))
        if len(set(documents)) == len(documents):
            assert len(val) == int(len(documents) * val_fraction)
        assert not {text for _, text in train} & {text for _, text in val}
    else:
        heads, tails = dict(train), dict(val)
        assert [heads.get(n, "") + tails.get(n, "") for n in range(len(documents))] == documents
        assert [len(heads.get(n, "")) for n in range(len(documents))] == [int(len(text) * (1 - val_fraction))
                                                                          for text in documents]


def test_a_seeded_hash_of_the_text_picks_the_documents_for_val():
    documents = [f"document {number}" for number in range(1, 51)]
    val = [text for _, text in divided(documents, 0.1)[1]]
    assert len(val) == 5
    assert sorted(text for _, text in divided(documents[::-1], 0.1)[1]) == sorted(val)     # wherever they stand
    assert [text for _, text in divided(documents, 0.1, seed=1)[1]] != val
    assert val != documents[-5:]


def test_equal_documents_go_the_same_way_and_the_share_is_kept_with_others():
    documents = [f"document {number % 40}" for number in range(200)]
    for seed in range(9):
        train, val = ({text for _, text in part} for part in divided(documents, 0.11, seed))
        assert not train & val
        assert len(val) == 4                            # of five copies each: 20 of 22
    train, val = divided(["the same"] * 100 + [f"another {number}" for number in range(10)], 0.1)
    assert "the same" not in [text for _, text in val]
    assert len(val) == 10                               # 11 are allowed, 100 equal ones do not fit
    assert divided(["the same"] * 100, 0.1)[1] == []


def test_of_very_many_documents_those_with_equal_text_go_the_same_way():
    documents = [f"document {number % 6000}" for number in range(12_000)]
    train, val = ({text for _, text in part} for part in divided(documents, 0.1))
    assert not train & val
    assert 500 < len(val) < 700
    assert len(train) + len(val) == 6000


def test_a_fraction_of_zero_keeps_very_many_documents_for_training():
    train, val = divided([f"document {number}" for number in range(12_000)], 0.0)
    assert len(train) == 12_000
    assert val == []


def test_end_of_text_stands_between_documents_and_nowhere_else(write):
    documents = [f"the {letter}" for letter in "abcdefghij"]
    train, val = split_ids(write(*documents, tokenizer="toy"))
    assert val.size == len("the a") - 2                 # one document of ten
    expected = []
    for text in documents:
        if (ids := TOY_BPE.encode_ordinary(text)) != val.tolist():
            expected += [*ids, EOT]
    assert train.tolist() == expected[:-1]
    assert train.tolist().count(EOT) == 8


def test_empty_documents_are_passed_over(write):
    train, val = split_ids(write("", "the", "", "he", "", tokenizer="toy", val_fraction=0))
    assert train.tolist() == [RANKS[b"the"], EOT, RANKS[b"he"]]
    assert val.size == 0


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_line_break_stands_between_documents_without_end_of_text(kind, write):
    folder = write("abc", "é", "ba", val_fraction=0, tokenizer=kind)
    assert split_texts(folder) == ["abc\né\nba", ""]
    entry = read_meta(folder)["splits"]["train"]        # bits per byte are those of the documents
    assert (entry["characters"], entry["bytes"], entry["joiners"]) == (6, 7, 2)
    check_set(folder)
    if kind == "char":
        assert read_meta(folder)["tokenizer"]["chars"] == "\nabcé"


def test_a_single_text_needs_no_joiner(write):
    meta = read_meta(write("abc" * 9))
    assert meta["tokenizer"]["chars"] == "abc"
    assert not {"joiner", "whole_documents"} & meta.keys()


@pytest.mark.parametrize(("joiner", "between"), [("", ""), (" ", " "), (r"\n--\n", "\n--\n"), ("漢", "漢")])
@pytest.mark.parametrize("kind", ["char", "byte", "toy"])
def test_another_joiner(kind, joiner, between, write):
    options = dict(min_count=2) if kind == "char" else {}
    folder = write("the", "he", "hé", val_fraction=0, tokenizer=kind, joiner=joiner, eot=False, **options)
    assert split_texts(folder)[0] == f"the{between}he{between}hé"
    check_set(folder)


def test_a_joiner_stands_in_each_split_and_in_no_document(write):
    documents = [f"<{number}>" for number in range(100, 200)]
    folder = write(*documents, val_fraction=0.2)
    train, val = split_texts(folder)
    assert sorted(train.split("\n") + val.split("\n")) == documents
    assert len(val.split("\n")) == 20
    check_set(folder)


def test_a_tokenizer_that_lacks_the_joiner_is_one_line(write, tmp_path, refused):
    write("abc" * 9)
    other = [tmp_path / "0.txt", tmp_path / "b.txt"]
    other[1].write_text("cba")
    options = prepare.Options(tokenizer=str(tmp_path / "set" / "meta.json"))
    one_line_error(refused(lambda: write_set(tmp_path / "t", other, options=options)), r"'\n'", "--joiner")
    options.joiner = ""
    write_set(tmp_path / "t", other, options=options)


def test_text_that_looks_like_a_special_token_stays_text(write):
    text = f"the{END_OF_TEXT}end <|other|> " * 3
    folder = write(text, text, tokenizer="toy", val_fraction=0)
    ids = split_ids(folder)[0].tolist()
    assert ids.count(EOT) == 1                          # the one between the documents
    assert EOT + 1 not in ids
    assert split_texts(folder)[0] == text + END_OF_TEXT + text


if (SHARED / "data").is_dir():                          # the figures in DESIGN.md, on the texts it names
    @pytest.mark.parametrize(("text", "tokenizer", "tokens"), [
        ("the-verdict.txt", "gpt2", (4_612, 534)),
        ("tinyshakespeare.txt", "gpt2", (301_966, 36_059)),
        ("tinyshakespeare.txt", "char", (1_003_854, 111_540))])
    def test_the_published_token_counts(text, tokenizer, tokens, tmp_path):
        write_set(tmp_path, [SHARED / "data" / text], tokenizer, 0.1)
        assert tuple(ids.size for ids in split_ids(tmp_path)) == tokens
        assert "".join(split_texts(tmp_path)) == (SHARED / "data" / text).read_bytes().decode()

    def test_the_named_set_verdict(tmp_path):
        (tmp_path / "verdict").mkdir()
        shutil.copy(SHARED / "data" / "the-verdict.txt", tmp_path / "verdict" / "input.txt")
        prepare.main(["verdict", f"--data_dir={tmp_path}"])
        assert [ids.size for ids in split_ids(tmp_path / "verdict")] == [4_612, 534]

    @pytest.mark.parametrize(("name", "vocab_size"), [("gpt2", 50_257), ("cl100k_base", 100_277)])
    def test_named_encodings_are_stored_whole(name, vocab_size):
        original = tiktoken.get_encoding(name)
        restored = Tokenizer(json.loads(json.dumps(Tokenizer.build(name, "").stored)))
        assert restored.encode(PUZZLE).tolist() == original.encode_ordinary(PUZZLE)
        assert restored.decode(restored.encode(PUZZLE)) == PUZZLE
        assert restored.vocab_size == original.n_vocab == vocab_size
        assert restored.eot == original.eot_token


if (ROOT / "data" / "fables_zh" / "input.csv").is_file():
    def test_the_chinese_fables_are_taken_as_a_whole_table(tmp_path):
        prepare.main(["fables_zh", "--tokenizer=byte", f"--data_dir={tmp_path}"])
        text = (ROOT / "data" / "fables_zh" / "input.csv").read_bytes().decode("utf-8-sig")
        assert "".join(split_texts(tmp_path / "fables_zh")) == text


# -- the old set or the new one --------------------------------------------------------------------------------

OLD, NEW = "an old text\n" * 9, "the new text, which is longer\n" * 9


@pytest.fixture
def state(tmp_path_factory):
    """Which set a folder holds for whoever opens it next. A mixture of two fails here, and so would it in
    training."""
    numbers = count(1)
    base = tmp_path_factory.mktemp("copies")

    def state(folder: Path, old: dict, new: dict) -> str:
        copy = base / str(next(numbers))
        shutil.copytree(folder, copy)
        read_meta(copy)
        found = contents(copy)
        if not is_under_way(folder):
            found = {name: content for name, content in found.items() if not name.endswith(".tmp")}
        shutil.rmtree(copy)
        assert found in (old, new)
        return "old" if found == old else "new"

    def is_under_way(folder: Path) -> bool:
        return (folder / COMMITTED).exists()

    return state


@pytest.fixture
def old_and_new(write):
    """(folder with the old set, in shards, its files, the new set's files, a function that writes the new set
    there)"""
    new = contents(write(NEW, folder="new"))
    folder = write(OLD, shard_tokens=40)
    source = folder.parent / "next.txt"
    source.write_text(NEW, newline="")
    shutil.copy(source, folder.parent / "0.txt")        # meta.json names its source
    return folder, contents(folder), new, lambda: write_set(folder, [folder.parent / "0.txt"], "char", 0.1)


def put_back(folder: Path, files: dict):
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def fail_at(monkeypatch, operation: str, number: int, error: BaseException):
    """Make the `number`-th call of a file operation raise; the others work."""
    calls = count(1)

    def call_or_raise(call, *args, **options):
        if next(calls) == number:
            raise error
        return call(*args, **options)

    class File(io.BufferedWriter):
        def write(self, data):
            return call_or_raise(super().write, data) if operation == "write" else super().write(data)

        def flush(self):
            return call_or_raise(super().flush) if operation == "flush" else super().flush()

    def open_file(path, mode="r", *args, **options):
        if "w" not in mode:
            return open(path, mode, *args, **options)
        file = File(io.FileIO(path, "w")) if operation != "open" else call_or_raise(open, path, mode)
        return file

    for module in (inkling.files, inkling.encode):
        monkeypatch.setattr(module, "open", open_file, raising=False)
    if hasattr(os, operation) and operation not in ("open", "write"):
        original = getattr(os, operation)
        monkeypatch.setattr(os, operation, lambda *args, **options: call_or_raise(original, *args, **options))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(),
                                   UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")],
                         ids=["full disk", "Ctrl-C", "encoding"])
@pytest.mark.parametrize(("operation", "calls"), [("open", 3), ("write", 3), ("flush", 3), ("fsync", 6),
                                                  ("replace", 4), ("unlink", 3)])
def test_whatever_fails_leaves_the_old_set_or_the_new_one(operation, calls, error, old_and_new, state):
    folder, old, new, write_new = old_and_new
    states = []
    for number in count(1):
        put_back(folder, old)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, operation, number, error)
            try:
                write_new()
                break                                   # every one of the calls has failed once
            except (type(error), UserError):
                states.append(state(folder, old, new))
                assert (folder / COMMITTED).exists() or not list(folder.glob("*.tmp"))
        write_new()                                     # the next command finishes, or does it again
        assert contents(folder) == new
    assert len(states) >= calls
    assert states == sorted(states, key=["old", "new"].index)
    assert contents(folder) == new


def test_a_kill_at_any_line_leaves_the_old_set_or_the_new_one(old_and_new, state):
    """What is on the disk at each line that touches files is what a kill there would leave."""
    writing = {"write_set", "write_token_files", "open_shard", "write", "write_ids", "finish", "entry",
               "commit_replacement", "finish_replacement", "remove_unfinished", "atomic_write", "sync_folder"}
    files = (prepare.__file__, inkling.encode.__file__, inkling.files.__file__, inkling.dataset.__file__)
    folder, old, new, write_new = old_and_new
    states = []

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files or frame.f_code.co_name not in writing:
            return None
        if event == "line":
            sys.settrace(None)
            states.append(state(folder, old, new))
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write_new()
    finally:
        sys.settrace(before)
    states.append(state(folder, old, new))
    assert len(states) > 100
    assert states == sorted(states, key=["old", "new"].index)
    assert set(states) == {"old", "new"}


def end_at(when: str, number: int):
    """This process is gone at the `number`-th call of a function of os."""
    calls, original = count(1), getattr(os, when)

    def call_or_end(*args, **named):
        if next(calls) == number:
            os._exit(9)
        return original(*args, **named)
    setattr(os, when, call_or_end)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.parametrize("when", ["fsync", "unlink", "replace"])
def test_a_process_killed_at_any_call_leaves_the_old_set_or_the_new_one(when, old_and_new, state):
    """A child is gone at the n-th call, for every n, without a flush and without cleaning up."""
    folder, old, new, write_new = old_and_new
    states = []
    for number in count(1):
        put_back(folder, old)
        child = os.fork()
        if child == 0:
            end_at(when, number)
            write_new()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        states.append(state(folder, old, new))
        if code == 0:
            break
        assert code == 9
        write_new()
        assert contents(folder) == new
    assert number > 3
    assert states[-1] == "new"
    assert states == sorted(states, key=["old", "new"].index)


@pytest.mark.parametrize("operation", ["open", "write", "fsync"])
def test_a_third_set_that_fails_harms_none_that_was_committed(operation, old_and_new, state, write):
    """Its first files would take the places of those that wait to be renamed."""
    folder, old, new, write_new = old_and_new
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "replace", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write_new()
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, operation, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write("a third text " * 20)
    assert state(folder, old, new) == "new"


def test_whoever_opens_a_set_waits_for_the_one_that_is_finishing_it(old_and_new, monkeypatch):
    """The new set is committed, and its files are half renamed, by a process that still runs."""
    folder, _, new, write_new = old_and_new
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "replace", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write_new()
    assert (folder / COMMITTED).exists()
    held = lock_folder(folder)

    def finish():
        time.sleep(0.3)
        finish_replacement(folder)
        held.close()

    thread = threading.Thread(target=finish)
    thread.start()
    assert read_meta(folder) == json.loads(new["meta.json"])
    thread.join()
    assert contents(folder) == new


def test_a_first_set_that_was_committed_and_not_finished_is_there(write, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "replace", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write("a first text " * 9, folder="first")
    assert not (tmp_path / "first" / "meta.json").exists()
    assert ensure_set("first", str(tmp_path), Rank()) == tmp_path / "first"
    data, _ = open_data(tmp_path / "first", 8)
    assert len(data["train"]) == 105


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these systems have no such names")
def test_a_name_that_is_not_utf8_is_kept_and_known_again(tmp_path, capsys):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("a note\n" * 9)
    for _ in range(2):
        write_set(tmp_path / "s", [path], "char", 0.1)
    assert "nothing has changed" in capsys.readouterr().out
    check_set(tmp_path / "s")
    one_line_error(inside(prepare.main, path), "$'", "caf\\xe9.txt' --name=caf")


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such words")
@pytest.mark.parametrize("flag", ["text_column", "delimiter", "separator", "joiner", "pattern", "name"])
def test_a_flag_that_is_not_utf8_is_one_line_at_the_start(flag, in_folder, refused):
    one_line_error(refused(prepared, "note.txt", os.fsdecode(b"--" + flag.encode() + b"=\xe9")), flag[:4], r"\udce9")
    assert not list(Path("data").rglob("*"))


@pytest.mark.parametrize("later", ["xyz" * 30, "the new text, which is longer\n" * 9], ids=["as long", "longer"])
def test_a_set_that_is_replaced_while_it_is_opened_is_opened_again(later, write, monkeypatch):
    """The old meta.json would read the new token files as other characters."""
    folder = write("abc" * 30)
    original, opened = open_split, []

    def open_later(*args):
        opened.append(args)
        if len(opened) == 1:
            write(later)
        return original(*args)
    monkeypatch.setattr(inkling.dataset, "open_split", open_later)
    data, meta = open_data(folder, 8)
    assert Tokenizer(meta["tokenizer"]).decode(data["train"]) == later[:int(len(later) * 0.9)]


def test_writing_and_flushing_precede_the_rename(old_and_new, monkeypatch):
    """Without fsync a rename can reach the disk before the content does."""
    *_, write_new = old_and_new
    synced, fsync, replace = set(), os.fsync, os.replace

    def note_fsync(descriptor):
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def check_replace(source, target):
        assert (os.stat(source).st_ino, os.stat(source).st_size) in synced
        replace(source, target)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    write_new()
    assert len(synced) >= 3


# -- damage is noticed ---------------------------------------------------------------------------------------

@pytest.fixture
def good_set(write) -> Path:
    return write("the quick brown fox jumps over the lazy dog\n" * 20)


def test_check_passes_a_good_set(good_set, capsys):
    prepare.main(["--check", "set", f"--data_dir={good_set.parent}"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert "train.bin: 792 tokens of uint8" in lines[0]
    assert "the quick brown" in lines[0]
    assert "val.bin: 88 tokens of uint8" in lines[1]


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path):
    path.unlink()


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                     # another character: only the checksum can tell
    path.write_bytes(content)


def swap_tokens(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[1::-1] + content[2:])


def wrong_id(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] = 28                                    # the text has 28 characters
    path.write_bytes(content)


def wider_type(path: Path):
    path.write_bytes(np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16).tobytes())


@pytest.mark.parametrize("split", ["train.bin", "val.bin"])
@pytest.mark.parametrize("damage", [truncate, lengthen, remove, flip_a_bit, swap_tokens, wrong_id,
                                    wider_type])
def test_check_finds_damage(damage, split, good_set, refused):
    damage(good_set / split)
    argv = ["--check", "set", f"--data_dir={good_set.parent}"]
    one_line_error(refused(prepare.main, argv), split, "prepare")


@pytest.mark.parametrize("what", ["characters", "bytes"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_check_counts_the_text_itself(what, split, good_set, refused):
    """Every figure in bits per byte depends on it."""
    meta = read_meta(good_set)
    meta["splits"][split][what] -= 1
    (good_set / "meta.json").write_text(json.dumps(meta))
    one_line_error(refused(prepare.main, ["--check", "set", f"--data_dir={good_set.parent}"]), what, split)


def test_check_reads_every_id_itself(good_set, refused):
    """A checksum made after the damage proves nothing."""
    wrong_id(good_set / "train.bin")
    meta = read_meta(good_set)
    meta["splits"]["train"]["sha256"] = hashlib.sha256((good_set / "train.bin").read_bytes()).hexdigest()
    (good_set / "meta.json").write_text(json.dumps(meta))
    one_line_error(refused(check_set, good_set), "train.bin", "id 28", "vocab_size=28")


@pytest.mark.parametrize("damage", [truncate, lengthen, remove, wider_type])
@pytest.mark.parametrize("split", ["train", "val"])
def test_training_opens_no_file_of_another_size(damage, split, good_set, refused):
    damage(good_set / f"{split}.bin")
    one_line_error(refused(open_data, good_set, 8), f"{split}.bin", "python prepare.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_uses_no_id_beyond_the_vocabulary(split, good_set, refused):
    wrong_id(good_set / f"{split}.bin")
    data, meta = open_data(good_set, 8)
    starts = np.array([0, len(data[split]) - 9])
    one_line_error(refused(train.get_batch, data[split], starts, 8, meta["vocab_size"], split, "cpu"),
                   f"{split}.bin", "id 28", "vocab_size=28", "--check")


def test_ids_are_checked_against_the_vocabulary_exactly(refused):
    check_ids(np.array([0, 27], np.uint8), 28, "val")
    check_ids(np.empty(0, np.uint8), 28, "val")
    for ids, vocab_size in ([[1, 2], [28, 3]], 28), ([[70_000]], 65_537):
        one_line_error(refused(check_ids, np.array(ids, np.uint32), vocab_size, "val"), "val.bin",
                       f"id {max(map(max, ids)):,}", f"vocab_size={vocab_size:,}")


@pytest.mark.parametrize(("val_fraction", "short", "way_out"), [(0.25, "val", "--val_fraction"),
                                                               (0.75, "train", "more text")])
def test_a_split_shorter_than_a_window_is_refused_with_figures(val_fraction, short, way_out, write, refused):
    folder = write("abcdefgh" * 5, val_fraction=val_fraction)
    one_line_error(refused(open_data, folder, 10), f"{short} has 10 tokens; block_size=10 needs 11",
                   "--block_size", way_out)
    data, _ = open_data(folder, 9)
    assert sorted(map(len, data.values())) == [10, 30]


def test_an_empty_split_can_be_opened(write):
    folder = write("abc", val_fraction=0)
    assert open_split(folder, read_meta(folder), "val").size == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000,
                                     b'{"format": 1}'])
def test_a_meta_json_that_is_none_is_refused(content, good_set, refused):
    (good_set / "meta.json").write_bytes(content)
    one_line_error(refused(read_meta, good_set), "meta.json", "python prepare.py")


def test_a_missing_set_is_refused(tmp_path, refused):
    one_line_error(refused(read_meta, tmp_path / "nothing"), "nothing", "python prepare.py")


@pytest.mark.parametrize("change", [dict(format=2), dict(dtype="uint16"), dict(dtype="float32"),
                                    dict(vocab_size=300), dict(vocab_size="28"), dict(splits={}),
                                    dict(tokenizer="char")], ids=str)
def test_a_meta_json_that_contradicts_itself_is_refused(change, good_set, refused):
    meta = read_meta(good_set)
    (good_set / "meta.json").write_text(json.dumps(meta | change))
    one_line_error(refused(read_meta, good_set), "meta.json", "python prepare.py")


def test_check_finds_a_vocabulary_that_is_not_the_tokenizers(good_set, refused):
    """A model with more ids than its tokenizer would sample what nothing can decode."""
    meta = read_meta(good_set)
    (good_set / "meta.json").write_text(json.dumps(meta | {"vocab_size": 100}))
    one_line_error(refused(check_set, good_set), "meta.json", "100", "28")


def places(node, path=()) -> list:
    """The path of every entry in nested dicts and lists."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path + (key,) for key, _ in entries] + [deeper for key, value in entries
                                                    for deeper in places(value, path + (key,))]


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, 10**30, float("inf"), "x", "3", [], {},
                                   "missing"],
                         ids=str)
def test_any_damaged_entry_of_meta_json_is_harmless_or_one_line(value, good_set):
    """One entry at a time; whatever is wrong with it, nothing but a refusal may come of it."""
    meta = read_meta(good_set)
    wrong = []
    for *path, last in places(meta):
        damaged = copy.deepcopy(meta)
        entry = damaged
        for key in path:
            entry = entry[key]
        entry[last] = value
        if value == "missing":
            del entry[last]
        (good_set / "meta.json").write_text(json.dumps(damaged))
        for use in (check_set, lambda folder: open_data(folder, 8)):
            try:
                use(good_set)
            except UserError:
                pass
            except Exception as error:
                wrong.append(f"{'.'.join(map(str, [*path, last]))}: {error!r}")
    assert wrong == []


@pytest.mark.parametrize("tokenizer", [{}, {"kind": "morse"}, {"kind": "char"},
                                       {"kind": "char", "chars": "ab"},
                                       {"kind": "bpe", "ranks": "dGhl zero"}], ids=str)
def test_training_refuses_a_damaged_tokenizer(tokenizer, data_dir, tmp_path, refused, monkeypatch):
    shutil.copytree(data_dir / "toy", tmp_path / "toy")
    meta = read_meta(tmp_path / "toy")
    (tmp_path / "toy" / "meta.json").write_text(json.dumps(meta | {"tokenizer": tokenizer}))
    monkeypatch.chdir(tmp_path)
    argv = flags(**TOY | {"max_iters": 1}, data_dir=tmp_path)
    one_line_error(refused(train.main, argv), "prepare")


# -- bad input -----------------------------------------------------------------------------------------------

@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty working folder with one good text, note.txt."""
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("a short note\n")
    return tmp_path


def prepared(*argv):
    prepare.main([*argv, "--data_dir=data"])


@pytest.mark.parametrize(("content", "parts"), [
    (b"", ["no text"]),
    (b"\xef\xbb\xbf", ["no text"]),
    (b"caf\xe9", ["not UTF-8", "0xe9", "offset 3"]),
    (b"\xef\xbb\xbfcaf\xe9", ["not UTF-8", "0xe9", "offset 6"]),           # in the file, its mark included
    (b"x" * 1234567 + b"\xff", ["not UTF-8", "0xff", "offset 1,234,567"]),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["odd.txt is a PNG picture"]),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", ["damaged", "too early"]),
    ("a note".encode("utf-16-le"), ["NUL", "--encoding=utf-16-le"]),
    (b"lone \xed\xa0\x80", ["not UTF-8", "0xed", "offset 5"]),
    (b"cut \xf0\x9f\x98", ["not UTF-8", "0xf0", "offset 4"]),
], ids=["empty", "BOM only", "latin-1", "latin-1 after BOM", "late", "PNG", "gzip", "UTF-16", "surrogate",
        "cut"])
def test_a_file_that_is_no_text_is_named_with_its_byte_offset(content, parts, in_folder, refused):
    Path("odd.txt").write_bytes(content)
    one_line_error(refused(prepared, "odd.txt"), "odd.txt", *parts)
    assert not list(Path("data").rglob("*"))


@pytest.mark.parametrize("text", ["x", "\0\0\0", "\U0001f600", "a" * 1_000_000],
                         ids=["one character", "NUL", "astral", "a million"])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_odd_texts_that_work(text, tokenizer, in_folder):
    Path("odd.txt").write_text(text, encoding="utf-8")
    prepared("odd.txt", f"--tokenizer={tokenizer}")
    prepared("--check", "odd")
    assert "".join(split_texts(Path("data/odd"))) == text


def test_check_lets_no_text_act_on_the_terminal(in_folder, capsys):
    Path("odd.txt").write_text("\x1b[2J\a\n" * 50)
    prepared("odd.txt")
    prepared("--check", "odd")
    assert set(capsys.readouterr().out) <= {"\n", *map(chr, range(32, 127))}


@pytest.mark.parametrize(("argv", "parts"), [
    ([], ["shakespeare_char", "--help"]),
    (["nowhere.txt"], ["nowhere.txt", "fables"]),
    (["note.txt", "nowhere.txt", "--name=two"], ["nowhere.txt"]),
    (["fabels"], ["fabels", "fables"]),
    (["n" * 300], ["n" * 300]),
    (["."], ["."]),
    (["folder"], ["folder"]),
    (["note.txt", "--tokenizer=gpt5"], ["gpt5", "char", "byte"]),
    (["fables", "--tokenizer=Char"], ["Char", "char", "byte"]),
    (["note.txt", "note.txt"], ["--name="]),
    (["my note.txt"], ["--name="]),
    (["fables.txt"], ["--name="]),
    *[(["note.txt", f"--name={name}"], [name.strip()])
      for name in ("../up", "a/b", ".hidden", "-x", "a b", "é/", "..", "/tmp/x", "a:b", "n" * 300)],
    *[(["note.txt", f"--name={name}"], [name]) for name in ("fables", "shakespeare", "shakespeare_char", "verdict")],
    (["fables", "--name=shakespeare"], ["shakespeare"]),
    *[(["note.txt", f"--val_fraction={value}"], ["val_fraction=" + value])
      for value in ("-0.1", "1", "1.5", "nan", "inf", "x", "")],
    (["--check", "nowhere"], ["nowhere"]),
    (["--check", "../note"], ["../note"]),
], ids=lambda value: " ".join(value)[:40])
def test_a_bad_request_is_one_line_and_writes_nothing(argv, parts, in_folder, refused, toy_bpe):
    Path("folder").mkdir()
    Path("my note.txt").write_text("a note")
    Path("fables.txt").write_text("a note")
    one_line_error(refused(prepared, *argv), *parts)
    assert not list(Path("data").rglob("*"))


def test_an_unreadable_file_is_one_line(in_folder, refused, monkeypatch):
    def no(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr("inkling.inputs.open", no, raising=False)      # root, who may run the tests, reads everything
    one_line_error(refused(prepared, "note.txt"), "note.txt", "Permission denied")


def test_a_data_folder_that_cannot_be_made_is_one_line(in_folder, refused):
    one_line_error(refused(prepare.main, ["note.txt", "--data_dir=note.txt"]), "note.txt")


def test_a_full_disk_is_one_line_and_the_old_set_stays(in_folder, refused, monkeypatch):
    prepared("note.txt")
    before = contents(Path("data/note"))
    Path("note.txt").write_text("a longer note\n" * 9)
    fail_at(monkeypatch, "write", 1, OSError(errno.ENOSPC, "No space left on device"))
    one_line_error(refused(prepared, "note.txt"), "No space left on device")
    assert contents(Path("data/note")) == before


def test_two_processes_that_prepare_one_set_wait_for_each_other(in_folder, capsys):
    """The second would delete the first one's unfinished files; it finds the set made instead."""
    Path("book.txt").write_text("it was a dark and stormy night\n" * 20_000)
    said = [subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), "book.txt", "--data_dir=data"],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in said]
    assert sum("nothing has changed" in text for text in said) == 2, said
    assert sum("train.bin 558,000 tokens" in text for text in said) == 1, said
    check_set(Path("data/book"))


def test_the_tokenizer_of_another_set_or_of_a_checkpoint(in_folder, data_dir, tmp_path, capsys):
    trained(data_dir, tmp_path / "run", max_iters=0)
    Path("note.txt").write_text("The hen said so. " * 9)
    theirs = read_meta(data_dir / "toy")["tokenizer"]
    for path in (tmp_path / "run" / "ckpt.pt", data_dir / "toy" / "meta.json"):
        prepared("note.txt", "--name=note", f"--tokenizer={path}", "--force")
        assert (f" --init_from={path}\n" in capsys.readouterr().out) == (path.suffix == ".pt")
        assert read_meta(Path("data/note"))["tokenizer"] == theirs
        assert "".join(split_texts(Path("data/note"))) == "The hen said so. " * 9
    Path("other.txt").write_text("The hen said so: ¥ 9. " * 9)
    outcome = inside(prepare.main, "other.txt", "--name=other", f"--tokenizer={data_dir / 'toy' / 'meta.json'}")
    one_line_error(outcome, "the tokenizer has no '9' '¥'", "--tokenizer=byte")
    prepared("note.txt", "--name=note", "--tokenizer=char")             # another one of the same kind
    assert read_meta(Path("data/note"))["tokenizer"]["chars"] == " .Tadehinos"


# -- the set that training asks for --------------------------------------------------------------------------

class Rank:
    """One of several processes, as ensure_set sees it: at each meeting the first tells, others hear it."""

    def __init__(self, hears: "Rank | None" = None):
        self.first, self.hears, self.told = hears is None, hears, []

    def broadcast(self, value):
        self.told.append(value if self.first else self.hears.told[len(self.told)])
        return self.told[-1]


def test_a_missing_named_set_is_prepared_once(tmp_path, monkeypatch):
    folder = ensure_set("fables", str(tmp_path), Rank())
    check_set(folder)
    monkeypatch.setattr(prepare, "write_set", None)
    assert ensure_set("fables", str(tmp_path), Rank()) == folder == tmp_path / "fables"


def test_what_prevents_it_is_one_line(tmp_path, refused, monkeypatch):
    (tmp_path / "a.txt").write_text("no folder")
    one_line_error(refused(ensure_set, "fables", str(tmp_path / "a.txt"), Rank()), "a.txt")
    fail_at(monkeypatch, "write", 1, OSError(errno.ENOSPC, "No space left on device"))
    one_line_error(refused(ensure_set, "fables", str(tmp_path), Rank()), "fables", "No space left on device")


def test_only_the_first_rank_prepares(tmp_path):
    first = Rank()
    ensure_set("fables", str(tmp_path / "here"), first)
    ensure_set("fables", str(tmp_path / "there"), Rank(hears=first))
    assert not (tmp_path / "there").exists()


def test_a_late_rank_meets_the_others_as_often_as_the_first(tmp_path):
    """One that comes when the set is there already must not leave the first one alone in its broadcast."""
    first = Rank()
    ensure_set("fables", str(tmp_path), first)
    late = Rank(hears=first)
    ensure_set("fables", str(tmp_path), late)
    assert late.told == first.told


def test_a_missing_set_of_ones_own_is_one_line(tmp_path, refused):
    one_line_error(refused(ensure_set, "mine", str(tmp_path), Rank()), str(tmp_path / "mine"),
                   "python prepare.py", "--name=mine")


def test_decoding_needs_no_tiktoken_and_encoding_says_that_it_does(monkeypatch):
    ranks = "\n".join(f"{base64.b64encode(bytes([value])).decode()} {value}" for value in range(256))
    tokenizer = Tokenizer({"kind": "bpe", "name": "bytes", "pattern": r"[\s\S]", "ranks": ranks, "special": {}})
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert tokenizer.decode(b"cat") == "cat"
    with pytest.raises(UserError, match="pip install tiktoken"):
        tokenizer.encode("cat")
