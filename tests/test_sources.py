"""prepare.py reads text in every form that it names, in pieces, and says in one line what it cannot read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import one_line_error, prepared, refused, serving, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import inkling.archives
import inkling.records
import prepare
from inkling.progress import Progress
from inkling.readers import cut_pieces
from inkling.tokenizer import END_OF_TEXT

ROWS = [{"title": f"fable {n}", "text": f"The {n}. hen, said \"é漢\"\nand went.\n"} for n in range(30)]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(content: bytes, suffix: str) -> bytes:
    return {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
            ".zst": zstandard.ZstdCompressor().compress}[suffix](content)


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["title", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"title": [row["title"] for row in ROWS], "text": TEXTS}), file,
                                row_group_size=7)
    return file.getvalue()


PLAIN = "\n".join(TEXTS)
FORMS = {"a.txt": PLAIN.encode(), "a.md": PLAIN.encode(),
         "a.csv": table(","), "b.csv": table(";"), "c.csv": table("\t"),
         "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(), "a.json": json.dumps(ROWS, indent=1).encode(),
         "bare.jsonl": "\n".join(map(json.dumps, TEXTS)).encode(),
         "in_a_row.json": "".join(map(json.dumps, TEXTS)).encode(),
         "a.parquet": parquet()}


# -- forms -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_packed_or_not_gives_the_same_text(name, suffix, here):
    (here / (name + suffix)).write_bytes(packed(FORMS[name], suffix))
    prepared(name + suffix, "--name=s", "--tokenizer=byte", "--val_fraction=0",
             *(["--text_column=text"] if ".csv" in name else []))
    assert texts("s")[0] == PLAIN


def test_a_table_without_a_column_is_taken_as_it_is(here):
    (here / "a.csv").write_bytes(FORMS["a.csv"])
    prepared("a.csv", "--tokenizer=byte")
    expected = FORMS["a.csv"].decode().replace("\r\n", "\n")
    assert "".join(texts("a")) == expected
    assert texts("a")[1] == expected[-len(texts("a")[1]):]      # one text, cut near its end


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_another_column_and_its_absence(name, here):
    (here / name).write_bytes(FORMS[name])
    prepared(name, "--name=s", "--text_column=title", "--tokenizer=byte", "--val_fraction=0")
    assert texts("s")[0] == "\n".join(row["title"] for row in ROWS)
    one_line_error(refused(name, "--name=t", "--text_column=author"), name, "'author'", "title, text")


def test_pieces_of_a_stream_may_break_anywhere(here, monkeypatch):
    """Blocks of seven bytes break characters, lines, JSON values, separators and marks."""
    monkeypatch.setattr(inkling.archives, "BLOCK", 7)
    monkeypatch.setattr(inkling.archives, "HEAD", 20)
    for name, content in FORMS.items():
        if "parquet" not in name:
            (here / name).write_bytes(b"\xef\xbb\xbf" * (name == "a.txt") + content)
            prepared(name, "--name=s", "--tokenizer=byte", "--val_fraction=0", "--force",
                     *(["--text_column=text"] if ".csv" in name else []))
            assert texts("s")[0] == PLAIN
    (here / "s.txt").write_text(" <|sep|>\n".join(TEXTS), newline="")
    prepared("s.txt", "--name=t", "--tokenizer=byte", "--val_fraction=0", "--separator=<|sep|>")
    assert texts("t")[0] == "\n".join(map(str.strip, TEXTS))


def test_a_separator_makes_documents_without_the_space_around_them(here):
    (here / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n", newline="")
    said = prepared("a.txt", "--tokenizer=bpe:300", "--separator=<|endoftext|>")
    assert "30 documents" in said
    train, val = (text.split("<|endoftext|>") for text in texts("a"))
    assert (len(train), len(val)) == (27, 3)
    assert sorted(train + val) == sorted(map(str.strip, TEXTS))


def test_escapes_in_a_separator(here):
    (here / "a.txt").write_text("one\n\ntwo\n\nthree")
    assert "3 documents" in prepared("a.txt", r"--separator=\n\n", "--val_fraction=0.4")
    assert sorted("\n".join(texts("a")).split("\n")) == ["one", "three", "two"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030", "cp1252", "utf-8"])
def test_other_encodings(encoding, here):
    text = "Bär und Fuß.\n" * 9
    (here / "a.txt").write_bytes(text.encode(encoding))
    prepared("a.txt", f"--encoding={encoding}", "--val_fraction=0")
    assert texts("a")[0] == text


def test_what_does_not_decode_is_named_with_its_offset(here):
    (here / "a.txt").write_bytes(b"x" * 2_000_000 + "漢".encode("gb18030") + b"\xff")
    one_line_error(refused("a.txt", "--encoding=gb18030"), "a.txt is not GB18030", "0xff", "offset 2,000,002",
                   "--encoding=")
    (here / "b.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    one_line_error(refused("b.txt.gz"), "b.txt.gz", "0xe9", "offset 3", "unpacked")
    one_line_error(refused("a.txt", "--encoding=base64"), "encoding=base64", "utf-8")


# -- many inputs -----------------------------------------------------------------------------------------------------

def test_a_folder_is_read_in_a_stable_order_by_suffix(here):
    for name, text in {"b/2.txt": "two ", "b/10.md": "ten ", "a.txt": "a ", "c.png": "picture", ".git/x.txt": "hidden",
                       "b/.x.txt": "hidden", "a.txt.gz.part": "half", "z.jsonl": '"last"\n'}.items():
        path = here / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    said = prepared("texts", "--tokenizer=byte", "--val_fraction=0")
    assert texts("texts")[0] == "a \nten \ntwo \nlast"
    assert ".png" in said
    prepared("texts", "--name=p", "--suffix=png", "--val_fraction=0")
    assert texts("p")[0] == "picture"
    prepared("texts/b/*", "texts/a.txt", "--name=g", "--val_fraction=0")
    assert texts("g")[0] == "ten \ntwo \na "


def test_an_input_twice_is_said_and_read_once(here):
    (here / "a.txt").write_text("a note")
    (here / "b.txt").write_text("a note")
    said = prepared("a.txt", "./a.txt", "b.txt", "--name=s", "--val_fraction=0")
    assert "a.txt is named twice" in said
    assert "same content" in said
    assert texts("s")[0] == "a note\na note"


def test_empty_documents_and_an_empty_val_are_said(here):
    (here / "a.jsonl").write_text('"one"\n""\n{"text": null}\n"two"\n')
    said = prepared("a.jsonl", "--val_fraction=0")
    assert "2 empty documents" in said
    assert "val is empty" in said
    (here / "b.jsonl").write_text('""\n')
    one_line_error(refused("b.jsonl"), "b.jsonl", "no text")


def test_standard_input(here, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(FORMS["a.jsonl"]))
    monkeypatch.setattr(sys, "stdin", stdin)
    prepared("-", "--name=s", "--format=jsonl", "--tokenizer=byte", "--val_fraction=0")
    assert texts("s")[0] == PLAIN
    assert {path.name for path in (here / "sets" / "s").iterdir()} == {
        "train.bin", "val.bin", "meta.json", ".lock"}
    one_line_error(refused("-"), "--name=")


def test_a_text_for_validation_of_its_own(here):
    (here / "a.txt").write_text("to learn from " * 9)
    (here / "b.txt").write_text("to measure with")
    prepared("a.txt", "--val=b.txt")
    assert texts("a") == ["to learn from " * 9, "to measure with"]
    meta = json.loads((here / "sets/a/meta.json").read_text())
    assert [source["file"] for source in meta["sources"] + meta["val_sources"]] == ["a.txt", "b.txt"]
    one_line_error(refused("a.txt", "--val=nowhere.txt", "--force"), "nowhere.txt")


@pytest.mark.parametrize("limit", [1, 5, 6, 7, 100, 10_000])
def test_a_limit_takes_the_first_bytes_and_no_part_of_a_character(limit, here):
    text = "ab漢字" * 100                                 # eight bytes each time
    (here / "a.txt").write_text(text[:200], encoding="utf-8")
    (here / "b.txt").write_text(text[200:], encoding="utf-8")
    prepared("a.txt", "b.txt", "--name=s", f"--limit={limit}", "--val_fraction=0", "--joiner=")
    assert texts("s")[0] == text.encode()[:limit].decode(errors="ignore")


def test_the_second_run_says_that_nothing_changed(here):
    (here / "a.txt").write_text("a note\n" * 9)
    prepared("a.txt")
    before = (here / "sets/a/train.bin").stat()
    assert "nothing has changed" in prepared("a.txt")
    assert (here / "sets/a/train.bin").stat().st_mtime_ns == before.st_mtime_ns
    for again in (["--force"], ["--val_fraction=0.2"], ["--tokenizer=byte"], ["--min_count=2"], ["--limit=20"]):
        prepared("a.txt")                               # one thing changes at a time
        assert "nothing has changed" not in prepared("a.txt", *again), again
        if again != ["--force"]:
            assert "nothing has changed" in prepared("a.txt", *again), again
    prepared("a.txt")
    (here / "sets/a/train.bin").write_bytes(b"")
    assert "nothing has changed" not in prepared("a.txt")
    (here / "a.txt").write_text("a Note\n" * 9)          # as long as before
    assert "nothing has changed" not in prepared("a.txt")


# -- what cannot be read ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "content", "parts"), [
    ("a.txt.gz", b"no gzip", ["a.txt.gz", "damaged"]),
    ("a.txt.gz", gzip.compress(b"a note" * 99, mtime=0)[:-9], ["a.txt.gz", "damaged"]),
    ("a.txt.zst", b"no zstd", ["a.txt.zst", "damaged"]),
    ("a.txt.zst", packed(random.Random(0).randbytes(9999).hex().encode(), ".zst")[:-9], ["a.txt.zst", "too early"]),
    ("a.parquet", b"no parquet", ["a.parquet"]),
    ("a.parquet", parquet()[:-9], ["a.parquet"]),
    ("a.jsonl", b'"one"\n{"text": 7}\n', ["a.jsonl, line 2", "int"]),
    ("a.jsonl", b'"one"\n{"text": \n', ["a.jsonl, line 2", "not JSON"]),
    ("a.jsonl", b'["one"]\n', ["a.jsonl, line 1", "list"]),
    ("a.jsonl", b"[" * 100_000, ["a.jsonl", "line 1"]),
    ("a.jsonl", b'"half \\ud800"\n', ["a.jsonl: document 1", "surrogate"]),
    ("a.json", b'["one", {"body": "x"}]', ["a.json, value 2", "'text'", "body"]),
    ("a.json", b'["one", "two', ["a.json: value 2", "not JSON"]),
    ("a.json", b'["one", "two"', ["a.json is cut", "after value 2"]),
    ("a.json", b'["one", "two",', ["a.json: value 3", "not JSON"]),
    ("a.json", b'["one", "two",]', ["a.json: value 3", "not JSON"]),
    ("a.json", b'["one" "two"]', ["a.json: value 1 of its list", "comma"]),
    ("a.json", b'["one",, "two"]', ["a.json: value 2", "not JSON"]),
    ("a.json", b'[', ["a.json is cut", "after value 0"]),
    ("a.json", b'"one"]', ["a.json: value 2", "not JSON"]),
    ("a.json", b'["one", "two"]\n["three"]', ["a.json", "end of the list"]),
    ("a.json", b'["one", "two"]' + b" " * 3_000_000 + b"x", ["a.json", "end of the list"]),
], ids=lambda value: str(value)[:30])
def test_a_damaged_input_is_one_line(name, content, parts, here):
    (here / name).write_bytes(content)
    one_line_error(refused(name, "--name=s"), *parts)
    assert not list((here / "sets").rglob("*.bin"))


def test_a_table_that_swallows_itself_is_one_line(here, monkeypatch):
    monkeypatch.setattr(inkling.records, "RECORD", 1000)
    (here / "a.csv").write_text('text\n"unclosed\n' + "and so on\n" * 500)
    one_line_error(refused("a.csv", "--text_column=text"), "a.csv, line 2", "limit", "quote")
    (here / "b.csv").write_text("title,text\none,1\ntwo\n")
    one_line_error(refused("b.csv", "--text_column=text"), "b.csv, line 3", "1 fields")
    (here / "c.jsonl").write_text('"' + "x" * 3_000_000)
    one_line_error(refused("c.jsonl"), "c.jsonl", "line")


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_a_missing_package_is_one_line(package, name, here, monkeypatch):
    (here / name).write_bytes(packed(b"x", ".zst" if "zst" in name else ""))
    monkeypatch.setitem(sys.modules, package, None)
    one_line_error(refused(name, "--name=s"), name, f"pip install {package}")


@pytest.mark.parametrize(("words", "parts"), [
    (["a.txt", "--text_column=x"], ["--text_column=x", "a.txt"]),
    (["a.jsonl", "--separator=x"], ["--separator", "a.jsonl", "jsonl"]),
    (["*.nothing", "--name=s"], ["*.nothing"]),
    (["a.txt", "--limit=-1"], ["limit=-1"]),
    (["a.txt", "--shard_tokens=0", "--min_count=0"], ["shard_tokens=0", "min_count=0"]),
    (["a.txt", "--tokenizer=byte", "--min_count=3"], ["min_count=3", "char"]),
    (["a.txt", "--pattern=x"], ["pattern=x", "bpe:VOCAB"]),
    (["-", "--val=-", "--name=s"], ["--val"]),
    (["fables", "--val=https://host/val.txt"], ["val=https://host/val.txt"]),
    (["a.txt", "--val_fractoin=0.2"], ["did you mean --val_fraction"]),
])
def test_settings_that_do_not_fit_are_one_line(words, parts, here):
    (here / "a.txt").write_text("a note")
    (here / "a.jsonl").write_text('"a note"')
    one_line_error(refused(*words), *parts)


# -- addresses -------------------------------------------------------------------------------------------------------

@pytest.fixture
def site(monkeypatch):
    """A server of `pages` {path: (bytes, announced length or None)}, with the paths that were asked for."""
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path not in server.pages:
                return self.send_error(404)
            content, announced = server.pages[self.path]
            self.send_response(200)
            if announced is not None:
                self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.pages, server.asked, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "*")
    yield from serving(server)


def test_an_address_is_fetched_once_and_kept_beside_the_set(site, here):
    site.pages["/x/a.jsonl.gz"] = (gzip.compress(FORMS["a.jsonl"]), None)
    words = [f"{site.url}/x/a.jsonl.gz?raw=1", "--name=s", "--tokenizer=byte", "--val_fraction=0"]
    site.pages["/x/a.jsonl.gz?raw=1"] = site.pages["/x/a.jsonl.gz"]
    prepared(*words)
    assert texts("s")[0] == PLAIN
    assert "nothing has changed" in prepared(*words)
    assert len(site.asked) == 1
    prepared(*words, "--force")
    assert len(site.asked) == 2


def test_an_address_that_fails_is_tried_three_times_and_leaves_nothing(site, here):
    one_line_error(refused(f"{site.url}/a.txt", "--name=s"), f"{site.url}/a.txt", "by hand")
    assert len(site.asked) == 3
    assert not list((here / "sets").rglob("*"))


def test_a_set_without_a_pinned_text(site, here, monkeypatch):
    """tinystories: its length is checked, its documents split, its tokenizer trained, its val file taken."""
    stories = "\n<|endoftext|>\n".join(TEXTS).encode()
    site.pages = {"/train.txt": (stories, len(stories)), "/valid.txt": (b"The end.\n<|endoftext|>\n", None)}
    monkeypatch.setitem(prepare.SETS, "tales", dict(
        tokenizer="bpe:280", separator=END_OF_TEXT, url=f"{site.url}/train.txt",
        val_url=f"{site.url}/valid.txt"))
    said = prepared("tales")
    assert f"{len(stories):,} bytes, as announced" in said
    assert "the server did not say how many to expect" in said
    train, val = texts("tales")
    assert train.split(END_OF_TEXT) == list(map(str.strip, TEXTS))
    assert val == "The end."
    assert site.asked == ["/train.txt", "/valid.txt"]
    prepared("tales", "--force")
    assert site.asked == ["/train.txt", "/valid.txt"] * 2

    (here / "sets/tales/train.txt").unlink()
    site.pages["/train.txt"] = (stories[:100], len(stories))
    one_line_error(refused("tales", "--name=other"), "/train.txt", "100 of", "by hand",
                   "prepare.py TEXT --name=tales")
    (here / "mine.txt").write_text("one<|endoftext|>two<|endoftext|>three", newline="")
    prepared("mine.txt", "--name=tales", "--val_fraction=0")        # a text of one's own takes the set's place
    assert texts("tales")[0].split(END_OF_TEXT) == ["one", "two", "three"]


def test_an_embedded_table_is_taken_as_a_whole(here, monkeypatch):
    """fables_zh, on a file of two rows."""
    (here / "data" / "tales").mkdir(parents=True)
    (here / "data" / "tales" / "input.csv").write_text("title,text,moral\n狐,\"狐, 曰\n\",善\n", encoding="utf-8")
    monkeypatch.setattr(prepare, "ROOT", here)
    monkeypatch.setitem(prepare.SETS, "tales", dict(tokenizer="byte", file="input.csv"))
    prepared("tales", "--val_fraction=0")
    assert texts("tales")[0] == (here / "data" / "tales" / "input.csv").read_text(encoding="utf-8")
    prepared("tales", "--val_fraction=0", "--text_column=text", "--name=column")
    assert texts("column")[0] == "狐, 曰\n"


# -- pieces ----------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=st.text(alphabet="ab é漢'’s.,\n \t\u0301\x1c9½"), most=st.integers(1, 30))
def test_pieces_make_the_text_again(text, most):
    parts = list(cut_pieces(text, most))
    assert "".join(parts) == text
    assert all(0 < len(part) <= most for part in parts) or text == ""


def test_one_long_line_in_a_small_gzip_does_not_stall(here):
    start = time.monotonic()
    (here / "a.txt.gz").write_bytes(gzip.compress(b"a" * 10_000_000))
    prepared("a.txt.gz", "--tokenizer=byte", "--val_fraction=0", "--limit=9999999")
    assert (here / "sets/a/train.bin").stat().st_size == 9_999_999
    assert time.monotonic() - start < 10                # a search for a border at every letter takes longer


def test_progress_is_a_line_in_bytes_with_time_left(capsys, monkeypatch):
    now = iter([0.0, 1.0, 31.0, 32.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress("reading", 93_000_000)
    for _ in range(3):
        progress.advance(31_000_000)
    assert capsys.readouterr().err == "reading 62 of 93 MB, 2.0 MB/s, 16 s left\n"


def test_words_are_shuffled_into_documents_of_any_size(here):
    """Documents longer than a piece keep their order and their borders."""
    rng = random.Random(0)
    long = [" ".join(rng.choices(["one", "two", "three"], k=n)) for n in (10, 500_000, 3, 400_000)]
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, long)))
    prepared("a.jsonl", "--tokenizer=bpe:270", "--val_fraction=0", "--bpe_sample=10000")
    assert texts("a")[0].split(END_OF_TEXT) == long
