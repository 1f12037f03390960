"""prepare.py reads text in every form that it names, in pieces, and says in one line what it cannot read."""

import bz2
import csv
import encodings.aliases
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT, one_line_error, prepared, refused, serving, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import inkling.archives
import inkling.records
import prepare
from inkling.archives import Part
from inkling.cli import UserError
from inkling.progress import Progress
from inkling.readers import cut_pieces, decode_part
from inkling.remarks import Remarks
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
                   "--encoding")
    (here / "b.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    one_line_error(refused("b.txt.gz"), "b.txt.gz", "0xe9", "offset 3", "unpacked")
    one_line_error(refused("a.txt", "--encoding=base64"), "encoding=base64", "utf-8")


ENCODINGS = sorted({*encodings.aliases.aliases.values(), "cp720", "utf_8_sig"})
ODD_BYTES = [b"", b"a", b"\xff", b"\xff\xfe", b"\xfe\xff\0", b"\0\0\0", b"abc\x80\x81", b"+AA", b"+2AAA-", b"~{", b"~",
             b"\x1b$B", b"\x1b", b"\\ud800\\N{x}\\x", b"\xed\xa0\x80", bytes(range(256)), b"\r\n\x85",
             "漢字".encode("utf-16"), "漢字".encode("gb18030") + b"\x81", random.Random(0).randbytes(99)]


@pytest.mark.parametrize("errors", ["strict", "skip", "replace"])
def test_every_codec_of_python_reads_odd_bytes_or_refuses_them_in_a_line(errors):
    """Plain UnicodeErrors, which UTF-16 without a mark raises, end in one line as well."""
    accepted = [name for name in ENCODINGS if name in prepare.TextEncodings()]
    assert len(accepted) > 90
    wrong = []
    for name, raw, size in itertools.product(accepted, ODD_BYTES, (1, 100)):
        blocks = (raw[start:start + size] for start in range(0, len(raw), size))
        try:
            for text in decode_part(Part("a.txt", blocks, raw), name, Remarks(errors)):
                assert text
        except UserError:
            pass
        except Exception as error:
            wrong.append(f"{name} {raw} {error!r}")
    assert wrong == []


def test_utf16_without_a_mark_is_one_line(here):
    (here / "a.txt").write_bytes(b"abc")
    one_line_error(refused("a.txt", "--encoding=utf-16"), "a.txt is not UTF-16", "omit --encoding")
    (here / "b.txt").write_bytes("A note.\n".encode("utf-16-be") * 9)
    one_line_error(refused("b.txt", "--encoding=utf-16"), "b.txt is not UTF-16", "--encoding=utf-16-be")
    (here / "c.txt").write_text("漢字, a note", encoding="utf-8")
    one_line_error(refused("c.txt", "--encoding=ascii"), "c.txt is not ASCII", "omit --encoding")
    for name in ("idna", "punycode", "rot13", "undefined", "é", ""):
        one_line_error(refused("a.txt", f"--encoding={name}"), f"encoding={name} must be a text encoding")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-le"])
def test_a_byte_order_mark_names_its_encoding(encoding, here):
    text = "Bär, 漢字 and \U0001f600.\n" * 99
    mark = b"" if encoding in ("utf-16", "utf-32") else "\ufeff".encode(encoding)
    (here / "a.txt").write_bytes(mark + text.encode(encoding))
    for words in ([], ["--encoding=gb18030"]):
        said = prepared("a.txt", "--val_fraction=0", *words)
        assert f"a.txt: {encoding[:6].upper()}, by the byte order mark" in said
        assert texts("a")[0] == text
    (here / "b.txt").write_text(text, encoding="utf-8-sig")
    assert "note" not in prepared("b.txt", "--val_fraction=0.1")
    assert "UTF-8, by the byte order mark" in prepared("b.txt", "--val_fraction=0", "--encoding=gb18030")
    assert texts("b")[0] == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_nul_beside_every_letter_names_its_encoding(encoding, here):
    """It is valid UTF-8, and would become a set with a NUL between the letters."""
    (here / "a.txt").write_bytes(("Once there was a hen.\n" * 9).encode(encoding))
    one_line_error(refused("a.txt"), "a.txt", "NUL", f"--encoding={encoding}")
    prepared("a.txt", f"--encoding={encoding}", "--val_fraction=0")
    assert texts("a")[0] == "Once there was a hen.\n" * 9


@pytest.mark.parametrize(("text", "encoding"), [("狐は月に。\n", "iso2022_jp"), ("여우와 달.\n", "iso2022_kr")])
def test_escapes_of_another_encoding_name_it(text, encoding, here):
    """They are valid ASCII."""
    (here / "a.txt").write_bytes((text * 9).encode(encoding))
    one_line_error(refused("a.txt"), "a.txt has escape sequences", f"--encoding={encoding}")
    prepared("a.txt", f"--encoding={encoding}", "--val_fraction=0")
    assert texts("a")[0] == text * 9


@pytest.mark.parametrize(("text", "encoding"), [
    ("He said “so” – well.\n", "cp1252"), ("Bär und Fuß.\n", "latin-1"), ("小狐狸对月亮说晚安。\n", "gb18030"),
    ("狐。\n", "utf-16-le"),
    ("Лиса сказала луне: спокойной ночи.\n", "cp1251"), ("狐は月におやすみと言いました。\n", "shift_jis")])
def test_the_encoding_that_is_suggested_works(text, encoding, here):
    (here / "a.txt").write_bytes((text * 9).encode(encoding))
    said = refused("a.txt")
    one_line_error(said, "not UTF-8", encoding)
    assert said.stderr.partition("--encoding=")[2].startswith(encoding) or encoding in ("shift_jis", "cp1251")
    prepared("a.txt", f"--encoding={encoding}", "--val_fraction=0")
    assert texts("a")[0] == text * 9


# -- what a file is ----------------------------------------------------------------------------------------------------

def zipped(**members: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), text)
    return file.getvalue()


def tarred(mode: str, members: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def arrow(new) -> bytes:
    file = io.BytesIO()
    rows = pyarrow.table({"text": TEXTS})
    with new(file, rows.schema) as writer:
        writer.write_table(rows)
    return file.getvalue()


@pytest.mark.parametrize("name", ["odd", "odd.txt", "odd.jsonl", "odd.csv"])
@pytest.mark.parametrize(("content", "parts"), [
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["a PDF", "pdftotext odd"]),
    (rb"{\rtf1\ansi A note.}", ["an RTF document", "--format=text"]),
    (zipped(mimetype="epub+zip", **{"META-INF__container_dot_xml": "<container/>"}), ["an EPUB", "pandoc odd"]),
    (zipped(**{"word__document_dot_xml": "<w/>"}), ["a DOCX", "txt odd"]),
    (zipped(**{"xl__workbook_dot_xml": "<w/>"}), ["an XLSX", "csv odd"]),
    (zipped(mimetype="application/vnd.oasis.opendocument.text", **{"content_dot_xml": "<o/>"}), ["ODT", "txt odd"]),
    (zipped(**{"a_dot_png": "picture"}), ["an archive without text files", ".png", "--suffix="]),
    (tarred("w:gz", {"a.png": b"picture"}), ["an archive without text files", ".png", "--suffix="]),
    (b"7z\xbc\xaf\x27\x1c\0\4", ["a 7z archive", "7z x odd"]),
    (b"Rar!\x1a\x07\1\0", ["a RAR archive", "unrar x odd"]),
    (arrow(pyarrow.ipc.new_file), ["an Arrow file", ".parquet"]),
    (arrow(pyarrow.ipc.new_stream), ["a stream of Arrow", ".parquet"]),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", ["a Git LFS pointer", "git lfs pull"]),
    (b"SQLite format 3\0\x10\0", ["an SQLite database", ".csv"]),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", ["an old Office document", "libreoffice"]),
    (b"\xff\xd8\xff\xe0\0\x10JFIF", ["a JPEG picture"]),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_is_no_text_is_named_with_the_way_out(content, parts, name, here):
    (here / name).write_bytes(content)
    said = refused(name, "--name=s")
    one_line_error(said, name, *parts)
    assert "encoding" not in said.stderr
    assert not list((here / "sets").rglob("*.bin"))


@pytest.mark.parametrize("content", ["%PDF is a format", "PK", "GIF89", "7z", "BZh9 is how it begins", "MZ", "{\\rt"])
def test_a_text_that_begins_like_something_else_is_a_text(content, here):
    (here / "a.txt").write_text(content)
    prepared("a.txt", "--val_fraction=0")
    assert texts("a")[0] == content


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl"])
def test_what_is_packed_is_unpacked_whatever_it_is_called(name, suffix, here):
    half = len(FORMS[name]) // 2
    content = packed(FORMS[name], suffix)
    if name == "a.txt":                                 # several frames, and padding
        content = packed(FORMS[name][:half], suffix) + packed(FORMS[name][half:], suffix) + b"\0" * 512
    (here / name).write_bytes(content)
    prepared(name, "--name=s", "--tokenizer=byte", "--val_fraction=0")
    assert texts("s")[0] == PLAIN


MEMBERS = {"docs/b.txt": b"second", "docs/a.jsonl": b'"first"\n{"text": "again"}', "c.txt.gz": gzip.compress(b"third"),
           "x.png": b"picture", "docs/.hidden.txt": b"hidden", "a.parquet": FORMS["a.parquet"]}


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2", "tgz"])
def test_the_members_of_an_archive_are_read_by_their_suffix(form, here):
    if form == "zip":
        with zipfile.ZipFile(here / "a.zip", "w") as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
    else:
        mode = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}[form]
        (here / f"a.{form}").write_bytes(tarred(mode, MEMBERS))
    said = prepared(f"a.{form}", "--val_fraction=0", "--tokenizer=byte")
    assert texts("a")[0] == "\n".join(["second", "first", "again", "third", *TEXTS])
    assert f"a.{form}: 2 members passed over" in said
    prepared(f"a.{form}", "--val_fraction=0", "--suffix=png")
    assert texts("a")[0] == "picture"
    (here / "folder").mkdir()
    (here / f"a.{form}").rename(here / "folder" / f"a.{form}")
    one_line_error(refused("folder"), "--suffix=")
    if form in ("zip", "tar", "tar.gz"):                # which the line says
        prepared("folder", "--val_fraction=0", f"--suffix={form.partition('.')[0]}")
        assert texts("folder")[0] == "\n".join(["second", "first", "again", "third", *TEXTS])


def test_archives_that_cannot_be_read_are_one_line(here):
    whole = zipped(**{"a_dot_txt": "a note, " * 99})
    (here / "a.zip").write_bytes(whole[:60])
    one_line_error(refused("a.zip"), "a.zip is a damaged zip archive")
    (here / "a.tar").write_bytes(tarred("w", {"a.txt": b"a note" * 999})[:2000])
    one_line_error(refused("a.tar"), "a.tar is a damaged tar archive")
    secret = bytearray(whole)
    secret[6] |= 1                                      # encrypted, say both headers
    secret[whole.index(b"PK\1\2") + 8] |= 1
    (here / "b.zip").write_bytes(secret)
    one_line_error(refused("b.zip"), "b.zip", "password", "unpack it first")


@pytest.mark.parametrize(("text", "note"), [
    ("<!DOCTYPE html>\n<html><p>A note.</p></html>", "HTML; tags are part of the text"),
    ("<?xml version='1.0'?><TEI>A note.</TEI>", "XML; tags are part of the text"),
    ("1\n00:00:01,000 --> 00:00:02,500\nA note.\n", "subtitles; numbers and times are part of the text"),
    ("WEBVTT\n\n00:01.000 --> 00:02.000\nA note.\n", "subtitles; numbers and times are part of the text"),
])
def test_a_text_that_is_more_than_prose_is_taken_and_said(text, note, here):
    (here / "a.txt").write_text(text)
    assert f"a.txt: {note}" in prepared("a.txt", "--val_fraction=0")
    assert texts("a")[0] == text
    for number in range(9):
        (here / f"b{number}.txt").write_text(text)
    assert f"b0.txt, b1.txt, b2.txt and 6 more: {note}" in prepared("b*.txt", "--name=b")
    (here / "c.txt").write_text("1 < 2\n00:00\n<3")
    assert "note" not in prepared("c.txt", "--val_fraction=0.3")


def test_rtf_is_taken_where_that_is_insisted_on(here):
    (here / "a.rtf").write_text(r"{\rtf1\ansi A note.}")
    assert "RTF; control words are part of the text" in prepared("a.rtf", "--name=a", "--format=text")


# -- tables ------------------------------------------------------------------------------------------------------------

def rows(name: str, content: str, *words: str) -> list:
    """The documents of a table."""
    Path(name).write_text(content, encoding="utf-8", newline="")
    prepared(name, "--name=rows", "--text_column=text", "--tokenizer=byte", "--val_fraction=0", "--joiner=|", "--force",
             *words)
    return texts("rows")[0].split("|")


def test_a_tsv_has_no_quoting(here):
    table = 'id\ttext\n1\t"Hi," said Tom.\n2\t"Wait!\n3\tThree.\n4\t"all of it"\n'
    assert rows("a.tsv", table) == ['"Hi," said Tom.', '"Wait!', "Three.", '"all of it"']
    said = prepared("a.tsv", "--name=s", "--text_column=text")
    assert "a.tsv: 1 field in quotes" in said
    assert r'--format=csv --delimiter="\t"' in said
    assert rows("a.tsv", 'id\ttext\n4\t"all\nof ""it"""\n', "--format=csv", r"--delimiter=\t") == ['all\nof "it"']


@pytest.mark.parametrize(("encoding", "noticed"), [("latin-1", True), ("utf-8", False)])
def test_utf8_that_is_read_as_something_else_is_noticed(encoding, noticed, here):
    (here / "a.txt").write_text("Köln, Düren, Jülich, Höxter\n" * 20, encoding="utf-8")
    said = prepared("a.txt", f"--encoding={encoding}", "--name=a")
    assert ("begins as valid UTF-8; read as latin-1 all the same" in said) == noticed


def test_latin_1_that_is_read_as_latin_1_is_not_noticed(here):
    (here / "a.txt").write_text("Köln, Düren, Jülich, Höxter\n" * 20, encoding="latin-1")
    assert "UTF-8" not in prepared("a.txt", "--encoding=latin-1")


@pytest.mark.parametrize(("name", "content", "parts"), [
    ("a.csv", 'id,text\n1,one\n2,"Wait!\n3,three\n', ["a.csv, line 3", "quote", "--format=tsv --delimiter=','"]),
    ("a.csv", 'id,text\n1,"Hi," said Tom.\n', ["a.csv, line 2", "--format=tsv"]),
    ("a.csv", "id,text\n1,Well, I never\n", ["a.csv, line 2: 3 fields, the first line has 2", "--errors=skip"]),
    ("a.csv", 'id,text\n"1\n1",one\n2\n', ["a.csv, line 4: 1 fields"]),
    ("a.tsv", "id\ttext\n1\tone\n2\ttwo\tmore\n", ["a.tsv, line 3: 3 fields, the first line has 2"]),
    ("a.csv", "text,id,text\none,1,two\n", ["a.csv", "2 columns 'text'"]),
    ("a.csv", "id,body\n1,one\n", ["a.csv has no column 'text'", "id, body (--text_column=)"]),
    ("a.csv", "id,body,txt\n1,one,two\n", ["its first line names txt, body, id (--text_column=txt)"]),
    ("a.csv", "", ["a.csv", "empty"]),
])
def test_a_table_that_does_not_fit_names_file_and_line(name, content, parts, here):
    (here / name).write_text(content)
    one_line_error(refused(name, "--text_column=text"), *parts)


def test_quotes_that_csv_refuses_can_be_taken_as_text(here):
    assert rows("a.csv", 'id,text\n1,"Hi" said Tom.\n', "--format=tsv", "--delimiter=,") == ['"Hi" said Tom.']


def test_delimiters(here):
    for mark in ",;\t|":
        assert rows("a.csv", f"id{mark}text\n1{mark}one: two\n") == ["one: two"]
    assert rows("a.csv", "id;text\n1;one, two\n") == ["one, two"]
    assert rows("a.csv", "id:text\n1:one, two\n", "--delimiter=:") == ["one, two"]
    assert rows("a.csv", "sep=:\r\nid:text\r\n1:one, two\r\n") == ["one, two"]       # as Excel may write it
    assert rows("a.tsv", "id;text\n1;one\ttwo\n", "--delimiter=;") == ["one\ttwo"]
    for mark in ("ab", '"', r"\n"):
        one_line_error(refused("a.csv", f"--delimiter={mark}", "--text_column=text"), "delimiter=", "single character")
    (here / "a.txt").write_text("a note")
    one_line_error(refused("a.txt", "--delimiter=;"), "--delimiter", "a.txt")


def test_a_table_without_a_header_has_numbers_for_columns(here):
    (here / "a.csv").write_text("1;one\n2;two\n")
    assert "its first line is a row" in prepared("a.csv", "--text_column=2", "--val_fraction=0")
    assert texts("a")[0] == "one\ntwo"
    one_line_error(refused("a.csv", "--text_column=3"), "a.csv has no column '3'", "1;one")
    one_line_error(refused("a.csv", "--text_column=0"), "a.csv has no column '0'")
    (here / "b.csv").write_text("2,id\none,1\n")        # a name first of all
    prepared("b.csv", "--text_column=2", "--val_fraction=0")
    assert texts("b")[0] == "one"
    (here / "c.csv").write_text("1;one, two\n")
    one_line_error(refused("c.csv", "--text_column=2"), "c.csv", "',' and ';'", "--delimiter=")


# -- values ------------------------------------------------------------------------------------------------------------

CHATS = [{"messages": [{"role": "user", "text": "Hi"}, {"role": "hen", "text": "Ho"}], "a.b": "dotted"},
         {"messages": [{"role": "user", "text": ["see ", {"type": "link", "text": "this"}, "!"]}], "a.b": "too"}]


@pytest.mark.parametrize(("column", "expected"), [
    ("messages.text", ["Hi\nHo", NotImplemented]), ("messages.role", ["user\nhen", "user"]), ("a.b", ["dotted", "too"]),
    ("messages.text.text", ["Hi\nHo", "see this!"])])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_path_of_fields_leads_to_the_text(name, column, expected, here):
    content = "\n".join(map(json.dumps, CHATS)) if name == "a.jsonl" else json.dumps(CHATS)
    (here / name).write_text(content)
    if NotImplemented in expected:                      # the message says the way
        one_line_error(refused(name, f"--text_column={column}"), "2 holds several fields in 'messages.text'",
                       "messages.text.text, messages.text.type")
        return
    prepared(name, f"--text_column={column}", "--joiner=|", "--val_fraction=0")
    assert texts("a")[0] == "|".join(expected)


def test_a_path_of_fields_leads_into_a_parquet_struct(here):
    rows = [{"en": "one", "fr": ["un", "une"]}, {"en": "two", "fr": ["deux"]}]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "a.b": ["x", "y"]}), here / "a.parquet")
    one_line_error(refused("a.parquet"), "a.parquet, row 1 holds several fields", "text.en, text.fr")
    for column, expected in {"text.en": "one\ntwo", "text.fr": "un\nune\ndeux", "a.b": "x\ny"}.items():
        prepared("a.parquet", f"--text_column={column}", "--val_fraction=0")
        assert texts("a")[0] == expected
    one_line_error(refused("a.parquet", "--text_column=text.de"), "row 1 has no 'text.de'", "text.en, text.fr")
    one_line_error(refused("a.parquet", "--text_column=en"), "no column 'en'", "text, a.b")


# -- what cannot be read may be left out -------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "content", "skipped", "replaced", "note"), [
    ("a.jsonl", b'"one"\n{"text": 7}\n"two"\n{"tex', "one|two", "one|two", "2 rows left out"),
    ("a.csv", b"id,text\n1,one\n2,a,b\n3,two\n", "one|two", "one|two", "1 row left out"),
    ("a.jsonl", b'"half \\ud800 pair"\n"two"', "half  pair|two", "half \ufffd pair|two", "1 place"),
    ("a.txt", b"caf\xe9 and \xff\xfe", "caf and ", "caf\ufffd and \ufffd\ufffd", "3 places"),
    ("a.txt.gz", gzip.compress(b"caf\xe9 and"), "caf and", "caf\ufffd and", "1 place"),
    ("a.jsonl", b'"one \xff"\n"two"\n', "one |two", "one \ufffd|two", "1 place"),
], ids=["JSON lines", "table", "half a surrogate", "bytes", "unpacked bytes", "bytes in JSON"])
def test_errors_are_left_out_or_replaced_and_counted(name, content, skipped, replaced, note, here):
    (here / name).write_bytes(content)
    words = [name, *(["--text_column=text"] if "csv" in name else []), "--name=s", "--val_fraction=0", "--joiner=|"]
    assert refused(*words).returncode == 2              # unless it is asked for
    for errors, expected in {"skip": skipped, "replace": replaced}.items():
        assert note in prepared(*words, f"--errors={errors}")
        assert texts("s")[0] == expected
        assert "nothing has changed" in prepared(*words, f"--errors={errors}")


def test_a_bad_string_in_parquet_is_one_line_and_may_be_left_out(here):
    column = pyarrow.StringArray.from_buffers(3, *pyarrow.array([b"one", b"caf\xe9", b"two"]).buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), here / "a.parquet")
    one_line_error(refused("a.parquet"), "a.parquet, row 2 is not UTF-8", "--errors=skip")
    assert "1 row left out" in prepared("a.parquet", "--errors=skip", "--val_fraction=0")
    assert texts("a")[0] == "one\ntwo"
    assert "1 place" in prepared("a.parquet", "--errors=replace", "--val_fraction=0")
    assert texts("a")[0] == "one\ncaf\ufffd\ntwo"


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


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_linked_folders_are_followed_once_and_what_is_left_out_is_named(here, monkeypatch):
    (here / "texts/deep").mkdir(parents=True)
    (here / "elsewhere/more").mkdir(parents=True)
    (here / "texts/a.txt").write_text("one")
    (here / "elsewhere/more/b.txt").write_text("two")
    (here / "texts/link").symlink_to(here / "elsewhere")
    (here / "texts/deep/up").symlink_to(here / "texts")              # a loop
    (here / "elsewhere/more/back").symlink_to(here / "texts/deep")    # another
    (here / "texts/gone.txt").symlink_to(here / "nowhere.txt")
    (here / "texts/.git").mkdir()
    (here / "texts/closed").mkdir()
    os.mkfifo(here / "texts/pipe.txt")
    listdir = os.listdir

    def closed(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)
    monkeypatch.setattr(os, "listdir", closed)          # root, who may run the tests, opens everything
    said = prepared("texts", "--val_fraction=0")
    assert texts("texts")[0] == "one\ntwo"
    for part in ("2 files taken", "1 broken link (texts/gone.txt)", "1 folder that cannot be read (texts/closed)",
                 "1 hidden", "1 pipe"):
        assert part in said
    assert "2 documents of 2 files" in said
    one_line_error(refused("texts/gone.txt"), "texts/gone.txt is a broken link", "nowhere.txt")
    one_line_error(refused("texts/closed", "--name=c"), "texts/closed", "cannot be read")
    assert "gone.txt is a broken link and passed over" in prepared("texts/[ag]*.txt", "--name=g", "--val_fraction=0")


def test_a_glob_takes_folders_as_the_shell_would_give_them(here):
    for name in ("texts/a.txt", "texts/b/c.txt", "texts/b/d.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    prepared("texts/*", "--name=s", "--val_fraction=0")
    assert texts("s")[0].split() == ["texts/a.txt", "texts/b/c.txt", "texts/b/d.txt"]
    prepared("texts/**/*.txt", "--name=t", "--val_fraction=0")
    assert texts("t")[0].split() == ["texts/a.txt", "texts/b/c.txt", "texts/b/d.txt"]


def test_the_files_of_a_set_are_no_documents(here):
    """A text may be kept beside its set, as nanoGPT does."""
    (here / "sets/x").mkdir(parents=True)
    (here / "sets/x/input.txt").write_text("a note\n" * 9)
    prepared("sets/x", "--name=x")
    assert "nothing has changed" in prepared("sets/x", "--name=x")
    for words in (["sets/x/*"], [str(path) for path in sorted((here / "sets/x").glob("*.*"))],
                  ["sets", "--suffix=txt,json,bin"]):
        assert "3 files of a prepared set passed over" in prepared(*words, "--name=x", "--force")
        assert "".join(texts("x")) == "a note\n" * 9
    one_line_error(refused("sets/x/meta.json", "--name=y"), "meta.json", "prepared set")
    (here / "data").mkdir()
    (here / "data/meta.json").write_text('{"text": "mine"}')         # of that name, and no set's
    prepared("data", "--name=d", "--val_fraction=0")
    assert texts("d")[0] == "mine"


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")


def feed(path: Path, content: bytes) -> threading.Thread:
    """A pipe that somebody writes into, once."""
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(content,))
    thread.start()
    return thread


@needs_pipes
@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.jsonl.gz", "pipe.parquet"])
def test_a_pipe_is_read_once_and_taken_by_its_suffix(name, here):
    content = gzip.compress(FORMS["a.jsonl"]) if name.endswith(".gz") else FORMS["a" + Path(name).suffix]
    for said in ("30 documents", "nothing has changed"):
        writer = feed(here / name, content)
        assert said in prepared(name, "--name=s", "--tokenizer=byte", "--val_fraction=0")
        writer.join()
        (here / name).unlink()
    assert texts("s")[0] == PLAIN
    assert {path.name for path in (here / "sets" / "s").iterdir()} == {"train.bin", "val.bin", "meta.json", ".lock"}
    one_line_error(refused(name), "no file")


@needs_pipes
def test_pipes_for_both_texts_as_bash_makes_them(here):
    (here / "a.txt").write_text("to learn from")
    (here / "b.txt").write_text("to measure with")
    program = f"{sys.executable} {ROOT}/prepare.py --data_dir=sets"
    script = f"cat a.txt | {program} /dev/stdin --val=<(cat b.txt) --name=s"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert texts("s") == ["to learn from", "to measure with"]
    done = subprocess.run(["bash", "-c", f"{program} <(cat a.txt)"], capture_output=True, text=True, timeout=60)
    one_line_error(done, "--name=NAME")


def test_what_stands_between_documents_is_said_and_decoded(here):
    (here / "a.jsonl").write_text('"one"\n"two"\n"three"\n')
    said = prepared("a.jsonl", "--val_fraction=0.4")
    assert r"3 documents of 1 file: 2 in train, 1 in val by a seeded hash; between them stands '\n'" in said
    assert sorted(prepared("--decode", "a").split("\n")) == ["one", "three", "two"]
    prepared("--check", "a")
    assert "the end of each in val" in prepared("a.jsonl", "--val_fraction=0.2", "--force")
    assert "stands nothing" in prepared("a.jsonl", "--joiner=", "--val_fraction=0")
    assert prepared("--decode", "a") == "onetwothree"
    assert "stands <|endoftext|>" in prepared("a.jsonl", "--tokenizer=bpe:260", "--val_fraction=0.4")
    assert sorted(prepared("--decode", "a").split("<|endoftext|>")) == ["one", "three", "two"]
    (here / "b.jsonl").write_text('"the same"\n' * 200)
    said = prepared("b.jsonl")
    assert "200 documents of 1 file: 200 in train, 0 in val" in said
    assert "val is empty" in said


def test_a_set_from_before_the_joiner_is_unchanged_and_decodes_as_before(here):
    (here / "a.jsonl").write_text('"one"\n"two"\n"three"\n')
    prepared("a.jsonl", "--val_fraction=0.4", "--joiner=")
    folder = here / "sets/a"
    meta = json.loads((folder / "meta.json").read_text())
    for key in ("joiner", "whole_documents", "options"):
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "nothing has changed" in prepared("a.jsonl", "--val_fraction=0.4")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert sorted(prepared("--decode", "a")) == sorted("onetwothree")
    prepared("--check", "a")


@pytest.mark.parametrize("name", ["红楼梦", "été", "किताब", "Книга_1", "本.v2"])
def test_a_set_may_have_a_name_in_any_script(name, here):
    (here / f"{name}.txt").write_text("a note " * 9, encoding="utf-8")
    prepared(f"{name}.txt", "--val_fraction=0")
    prepared("--check", name)
    assert texts(name)[0] == "a note " * 9


def test_a_suggested_command_can_be_pasted(here):
    for name in ("my note.txt", "it's.txt", "a&b.txt", "two\nlines.txt"):
        (here / name).write_text("a note")
        said = refused(name)
        one_line_error(said, "give the set a name: python prepare.py ")
        command = said.stderr.strip().partition("python prepare.py ")[2]
        words = subprocess.run(["bash", "-c", f"printf '%s|' {command}"], capture_output=True, text=True).stdout
        assert words == f"{name}|--name=NAME|"


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
    ("a.txt.gz", b"no gzip", ["a.txt.gz", "damaged", "remove the last suffix"]),
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
    """fables_zh and fables_zh_cl100k, on a file of two rows."""
    (here / "data" / "tales").mkdir(parents=True)
    (here / "data" / "tales" / "input.csv").write_text("title,text,moral\n狐,\"狐, 曰\n\",善\n", encoding="utf-8")
    monkeypatch.setattr(prepare, "ROOT", here)
    monkeypatch.setitem(prepare.SETS, "tales", dict(tokenizer="byte", file="tales/input.csv"))
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
