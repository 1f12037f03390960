"""Line ends mean the same everywhere: in texts that are prepared, in prompts, in stop texts and in scores."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import inside, prepared, refused, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import inkling.archives
import sample
from inkling.dataset import read_meta
from inkling.readers import LineEnds
from inkling.records import split_lines
from inkling.tokenizer import Tokenizer
from train import GPT, Config, sample_prompt

TEXT = "The hen said,\n\"Good night!\"\n\nThe moon\tsaid it back.\n"
ENDS = {"unix": "\n", "windows": "\r\n", "mac": "\r"}
STORED = {"char": {"kind": "char", "chars": "\n\r abcdeé"}, "unix": {"kind": "char", "chars": "\n abcdeé"},
          "mac": {"kind": "char", "chars": "\r abcdeé"}, "byte": {"kind": "byte"}}
same_every_time = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_reads(text: str) -> str:
    """What Python's text files make of the line ends."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8").read()


# -- reading -----------------------------------------------------------------------------------------------------------

@same_every_time
@given(pieces=st.lists(st.text(alphabet="a\r\n\x85\u2028", max_size=4), max_size=8))
def test_blocks_become_what_python_reads_wherever_they_end(pieces):
    text = "".join(pieces)
    line_ends = LineEnds()
    assert "".join(line_ends.blocks(piece for piece in pieces if piece)) == python_reads(text)
    assert line_ends.changed == text.count("\r")
    assert line_ends.whole(text) == python_reads(text)
    keeping = LineEnds(keep=True)
    assert "".join(keeping.blocks(pieces)) == keeping.whole(text) == text
    assert keeping.changed == 0


@same_every_time
@given(pieces=st.lists(st.text(alphabet="a\r\n", min_size=1, max_size=4), max_size=8))
def test_lines_end_as_the_first_one_does(pieces):
    """A \\r within lines that end with \\n is for the reader of the row to judge."""
    text = "".join(pieces)
    first = re.match(r"[^\r\n]*(\r\n|\n|\r(?=.))", text, re.DOTALL)
    end = first[1][-1] if first else "\n"
    assert list(split_lines(pieces, None)) == [line for line in re.split(f"(?<={end})", text) if line]


@pytest.mark.parametrize("block", [3, 7, 1 << 22])
@pytest.mark.parametrize("system", ENDS)
def test_a_text_of_any_system_is_read_with_line_breaks(system, block, here, monkeypatch):
    monkeypatch.setattr(inkling.archives, "BLOCK", block)
    (here / "a.txt").write_text(TEXT, encoding="utf-8", newline=ENDS[system])
    said = prepared("a.txt", "--val_fraction=0", "--tokenizer=byte")
    assert texts("a")[0] == TEXT
    assert ("4 line ends" in said) == (system != "unix")
    assert ("--newlines=keep" in said) == (system != "unix")
    assert prepared("--decode", "a") == TEXT
    prepared("--check", "a")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "gb18030"])
def test_line_ends_of_other_encodings(encoding, here):
    (here / "a.txt").write_bytes("漢\r\n字\r\n".encode(encoding))
    prepared("a.txt", f"--encoding={encoding}", "--val_fraction=0")
    assert texts("a")[0] == "漢\n字\n"


def test_a_text_keeps_its_line_ends_where_that_is_asked_for(here):
    (here / "a.txt").write_text(TEXT, encoding="utf-8", newline="\r\n")
    said = prepared("a.txt", "--val_fraction=0", "--newlines=keep")
    assert "line ends" not in said
    assert texts("a")[0] == TEXT.replace("\n", "\r\n")
    assert read_meta(here / "sets" / "a")["options"] == {"newlines": "keep"}
    assert "nothing has changed" in prepared("a.txt", "--val_fraction=0", "--newlines=keep")
    assert "4 line ends" in prepared("a.txt", "--val_fraction=0")       # another wish: prepared again
    assert "nothing has changed" in prepared("a.txt", "--val_fraction=0")
    assert "nothing" not in prepared("a.txt", "--val_fraction=0", "--newlines=keep")


def test_a_set_from_before_stays_as_it_is_and_says_so(here):
    (here / "a.txt").write_text(TEXT, encoding="utf-8", newline="\r\n")
    prepared("a.txt", "--val_fraction=0", "--newlines=keep")
    meta = read_meta(here / "sets" / "a")
    del meta["options"]                                 # as the versions before --newlines wrote it
    (here / "sets" / "a" / "meta.json").write_text(json.dumps(meta))
    before = {path: path.read_bytes() for path in (here / "sets" / "a").iterdir()}
    said = prepared("a.txt", "--val_fraction=0")
    assert "nothing has changed" in said
    assert r"line ends '\r\n'" in said
    assert "--force" in said
    said = prepared("a.txt", "--val_fraction=0", "--newlines=keep")
    assert "nothing has changed" in said
    assert "line ends" not in said
    assert before == {path: path.read_bytes() for path in (here / "sets" / "a").iterdir()}
    assert "4 line ends" in prepared("a.txt", "--val_fraction=0", "--force")
    assert texts("a")[0] == TEXT


ROWS = ["one\r\ntwo\r\n", "three\rfour", "five\n"]


def rows_file(form: str, end: str) -> bytes:
    if form == "csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["text"], *([row] for row in ROWS)])
        return file.getvalue().encode()
    if form == "jsonl":
        return end.join(json.dumps({"text": row}) for row in ROWS).encode()
    return json.dumps(ROWS, indent=1).replace("\n", end).encode()


@pytest.mark.parametrize("block", [3, 1 << 22])
@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_values_of_rows_are_texts_too(form, end, block, here, monkeypatch):
    """The line ends that end rows are not counted: they are no text."""
    monkeypatch.setattr(inkling.archives, "BLOCK", block)
    (here / f"a.{form}").write_bytes(rows_file(form, end))
    words = [f"a.{form}", "--text_column=text", "--tokenizer=byte", "--val_fraction=0"]
    said = prepared(*words)
    assert "3 line ends" in said
    assert python_reads("".join(ROWS)).replace("\n", "") == texts("a")[0].replace("\n", "")
    assert "\r" not in texts("a")[0]
    prepared(*words, "--newlines=keep")
    assert texts("a")[0].count("\r") == 3


def test_a_separator_is_met_whatever_ends_the_lines(here):
    (here / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\nthree")
    for separator in (r"\n\n", r"\r\n\r\n"):
        assert "3 documents" in prepared("a.txt", f"--separator={separator}", "--val_fraction=0.4", "--force")
    assert "3 documents" in prepared("a.txt", r"--separator=\r\n\r\n", "--newlines=keep", "--val_fraction=0.4")
    (here / "b.txt").write_text(r"one\two\three", encoding="utf-8")
    assert "3 documents" in prepared("b.txt", r"--separator=\\", "--val_fraction=0.4")


def test_with_a_limit_no_count_is_said_that_may_be_wrong(here):
    (here / "a.txt").write_bytes(b"a\r\n" * 1000)
    said = prepared("a.txt", "--limit=10", "--val_fraction=0", "--tokenizer=byte")
    assert texts("a")[0] == "a\na\na\na\na\n"
    assert "the line ends" in said


def test_an_unknown_way_is_refused(here):
    (here / "a.txt").write_text("a")
    assert "newlines=windows is not one of convert, keep" in refused("a.txt", "--newlines=windows").stderr


# -- the model's own line ends -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tokenizer", "newlines", "expected"), [
    ("char", "keep", "\r\n"), ("char", "convert", "\n"), ("bpe:300", "keep", "\r\n"), ("bpe:300", "convert", "\n"),
    ("byte", "keep", "\n")])                            # bytes show nothing
def test_a_tokenizer_shows_the_line_ends_of_its_text(tokenizer, newlines, expected, here):
    (here / "a.txt").write_text(TEXT * 50, encoding="utf-8", newline="\r\n")
    prepared("a.txt", f"--tokenizer={tokenizer}", f"--newlines={newlines}")
    assert Tokenizer(read_meta(here / "sets" / "a")["tokenizer"]).line_break == expected


def test_encodings_that_know_both_show_nothing():
    pytest.importorskip("tiktoken")
    ranks = [bytes([value]) for value in range(256)] + [b"\r\n"]
    import base64
    stored = {"kind": "bpe", "name": "cl100k_base", "pattern": r"[\s\S]", "special": {},
              "ranks": "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))}
    assert Tokenizer(stored).line_break == "\n"
    assert Tokenizer(stored | {"name": "bpe:257"}).line_break == "\r\n"
    assert Tokenizer(stored | {"name": "bpe:"}).line_break == "\r\n"


class Parrot(GPT):
    """Says these ids again and again."""

    def __init__(self, ids, vocab_size: int):
        super().__init__(Config(n_layer=1, n_head=1, n_embd=8, block_size=16), vocab_size)
        self.ids = list(ids)
        self.calls = 0

    def next_logits(self, *inputs):
        logits = torch.full_like(super().next_logits(*inputs), -100.0)
        logits[:, self.ids[self.calls % len(self.ids)]] = 100.0
        self.calls += 1
        return logits


@pytest.fixture
def say(here, monkeypatch):
    """say("char", "text", "--stop=x"): what sample.py prints and notes of a model that says this text."""
    def say(kind: str, text: str, *words, length: int = 20, stdin: bytes = b""):
        tokenizer = Tokenizer(STORED[kind])
        model = Parrot(tokenizer.encode(text), tokenizer.vocab_size)
        monkeypatch.setattr(sample, "load", lambda path, device: (model, tokenizer))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        done = inside(sample.main, "--ckpt=x", "--device=cpu", f"--max_new_tokens={length}", *words)
        assert done.returncode == 0, done.stderr
        return done
    return say


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("stop", [r"\n\n", r"\r\n\r\n", r"\r\r", "\n\n", "\r\n\r\n"])
def test_a_stop_text_meets_the_line_ends_that_the_model_writes(say, stop, end):
    kind = {"\n": "unix", "\r\n": "char", "\r": "mac"}[end]
    said = f"ab{end}cd{end}{end}e"
    assert say(kind, said, f"--stop={stop}", "--start=a").stdout == f"aab{end}cd\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("stop", "kept"), [(r"\nb", "a|cd|"), (r"d\n", "a|c"), (r"\n", "a"), (r"d\n\nb", "a|c")])
def test_a_stop_text_is_cut_off_with_its_whole_line_end(say, stop, kept, end):
    said = f"a{end}cd{end}{end}bb"
    record = json.loads(say("byte", said, f"--stop={stop}", "--start=a", "--json").stdout)
    assert (record["text"], record["finish"]) == (kept.replace("|", end), "stop")


def test_an_exact_stop_text(say):
    said = "a\nb\r\nc\rd"
    for stop, kept in {r"\r\n": "a\nb", r"\n": "a", r"\rd": "a\nb\r\nc", r"\r": "a\nb"}.items():
        assert say("byte", said, f"--stop={stop}", "--start=x", "--newlines=keep").stdout == f"x{kept}\n"


@same_every_time
@given(text=st.text(alphabet="ab\r\n", max_size=12), stop=st.text(alphabet="ab\r\n", min_size=1, max_size=4))
def test_a_stop_text_is_found_where_the_text_with_plain_line_breaks_has_it(text, stop):
    """And what is shown before it comes is never more than what stays."""
    tokenizer = Tokenizer({"kind": "char", "chars": "\n\rab"})
    grown = sample.Sample(tokenizer, sample.Options(stop=(stop,), max_new_tokens=20), "", [0], 0)
    shown = []
    for token in tokenizer.encode(text).tolist():
        if not grown.finish:
            grown.add(token)
            shown.append(grown.text[:grown.settled_length()])
    place = python_reads(text).find(python_reads(stop))
    assert (grown.finish == "stop") == (place >= 0)
    assert python_reads(grown.text) == (python_reads(text) if place < 0 else python_reads(text)[:place])
    assert all(grown.text.startswith(piece) for piece in shown)


# -- prompts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "expected"), [("unix", "a\nb\n"), ("char", "a\r\nb\r\n"), ("mac", "a\rb\r"),
                                                ("byte", "a\nb\n")])
def test_a_prompt_gets_the_line_ends_of_the_models_text(say, here, kind, expected):
    for end in ENDS.values():
        (here / "prompt").write_bytes(f"a{end}b{end}".encode())
        typed = f"a{end}b{end}"
        for word, stdin in {"--start=FILE:prompt": b"", f"--start={typed}": b"", "--start=-": typed.encode(),
                            f"--start={typed!r}".replace("'", ""): b""}.items():
            done = say(kind, "a", word, "--json", length=1, stdin=stdin)
            assert json.loads(done.stdout)["prompt"] == expected
            is_changed = expected != f"a{end}b{end}"
            assert ("--newlines=keep" in done.stderr) == (kind != "unix" and is_changed)


def test_a_prompt_keeps_its_line_ends_where_that_is_asked_for(say):
    for end in ENDS.values():
        done = say("byte", "a", f"--start=a{end}b", "--json", "--newlines=keep", length=1)
        assert json.loads(done.stdout)["prompt"] == f"a{end}b"


def test_escapes_are_read_where_a_person_types_and_nowhere_else(say, here):
    for typed, meant in {r"a\nb": "a\nb", r"a\tb": "a\tb", r"a\\nb": r"a\nb", r"\alpha\\": "\\alpha\\",
                         r"a\x41\0": r"a\x41\0", "\\\\\\n": "\\\n", "a\\": "a\\"}.items():
        done = say("byte", "a", f"--start={typed}", "--json", length=1)
        assert json.loads(done.stdout)["prompt"] == meant
        (here / "prompt").write_text(typed)
        for words in (["--start=FILE:prompt"], ["--prompts=prompt"]):
            assert json.loads(say("byte", "a", *words, "--json", length=1).stdout)["prompt"] == typed
    assert say("byte", r"a\alphab", r"--stop=\alpha", "--start=x").stdout == "xa\n"
    assert say("byte", "a\\nb", r"--stop=\\n", "--start=x").stdout == "xa\n"
    done = say("byte", r"a\n", "--interactive", "--json", length=1, stdin=b"a\\nb\n")
    assert json.loads(done.stdout)["prompt"] == r"a\nb"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_with_a_byte_order_mark_is_a_text(encoding, say, here):
    """PowerShell writes UTF-16 by default."""
    (here / "prompt").write_bytes("é\r\nb\r\n".encode(encoding))
    assert json.loads(say("unix", "a", "--start=FILE:prompt", "--json", length=1).stdout)["prompt"] == "é\nb\n"
    lines = say("unix", "a", "--prompts=prompt", "--json", length=1).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["é", "b"]
    assert json.loads(say("unix", "a", "--score=prompt", "--json").stdout)["bytes"] == 3
    (here / "prompt").write_bytes("é".encode(encoding) + b"\xff")
    done = inside(sample.main, "--ckpt=x", "--device=cpu", "--start=FILE:prompt")
    assert f"not {encoding[:6].strip('-').upper()} text" in done.stderr


def test_the_lines_of_a_file_of_prompts(say, here):
    for end in ENDS.values():
        (here / "lines").write_bytes(f"a{end}b{end}".encode())
        done = say("char", "a", "--prompts=lines", "--json", length=1)
        assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["a", "b"]
        assert done.stderr == ""


def test_the_prompt_of_a_runs_samples_is_read_in_the_same_way():
    cfg = Config(sample_start=r"a\nb\tc\\n")
    tokenizer = Tokenizer({"kind": "char", "chars": "\t\n\r\\abcn"})
    prompt, ids = sample_prompt(cfg, tokenizer)
    assert prompt == "a\r\nb\tc\\n"
    assert tokenizer.decode(ids.tolist()) == prompt
    assert sample_prompt(cfg, Tokenizer({"kind": "byte"}))[0] == "a\nb\tc\\n"


# -- scores ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "end"), [("unix", "\n"), ("char", "\r\n"), ("mac", "\r"), ("byte", "\n")])
def test_a_score_does_not_depend_on_the_system_that_wrote_the_text(say, here, kind, end):
    scores = {}
    for name, other in ENDS.items():
        (here / name).write_bytes(f"ab{other}cd{other}{other}".encode())
        done = say(kind, "a", f"--score={name}", "--json")
        scores[name] = json.loads(done.stdout)
        assert scores[name].pop("file") == name
        assert ("--newlines=keep" in done.stderr) == (other != end)
    assert scores["unix"] == scores["windows"] == scores["mac"]
    assert scores["unix"]["bytes"] == 3 + 3 * len(end)
    if kind == "byte":
        assert json.loads(say(kind, "a", "--score=windows", "--json", "--newlines=keep").stdout)["bytes"] == 9


# -- Unicode's forms ---------------------------------------------------------------------------------------------------

FORMS = {"composed": "Köln é 한국 ô", "apart": "Ko\u0308ln e\u0301 \u1112\u1161\u11ab\u1100\u116e\u11a8 o\u0302"}


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_in_the_other_unicode_form_is_found(form, say, monkeypatch, here):
    text = FORMS[form]
    monkeypatch.setitem(STORED, "mine", {"kind": "char", "chars": "".join(sorted(set(text + "\n")))})
    for other, prompt in FORMS.items():
        done = say("mine", "K", f"--start={prompt}", "--json", length=1)
        assert json.loads(done.stdout)["prompt"] == text
        assert ("Unicode form" in done.stderr) == (other != form)
        (here / "scored").write_text(prompt, encoding="utf-8")
        done = say("mine", "K", "--score=scored", "--json")
        assert json.loads(done.stdout)["tokens"] == len(text) - 1
        assert ("Unicode form" in done.stderr) == (other != form)
        done = say("mine", text, f"--stop={prompt[-2:]}", "--start=K", "--json", length=40)
        assert json.loads(done.stdout)["finish"] == "stop"
        assert "never met" not in done.stderr
        typed = say("mine", "K", "--interactive", "--json", length=1, stdin=prompt.encode())
        assert json.loads(typed.stdout)["prompt"] == text


def test_a_character_that_is_missing_in_either_form_is_named_alone(monkeypatch, here):
    tokenizer = Tokenizer({"kind": "char", "chars": "K ölné"})
    assert tokenizer.fit_form("Ko\u0308ln 漢") == "Köln 漢"
    monkeypatch.setattr(sample, "load", lambda path, device: (Parrot([0], 7), tokenizer))
    done = inside(sample.main, "--ckpt=x", "--device=cpu", "--start=Ko\u0308ln 漢")
    assert done.returncode == 2
    assert "has no '漢';" in done.stderr
    rare = Tokenizer({"kind": "char", "chars": "K öln", "bytes": True})
    assert rare.fit_form("Ko\u0308ln 漢") == "Köln 漢"   # the bytes of the accent mean nothing to it
    assert rare.fit_form("漢") == "漢"
    assert Tokenizer({"kind": "byte"}).fit_form("Ko\u0308ln") == "Ko\u0308ln"


def test_a_prompt_that_is_no_text_is_refused_in_one_line(monkeypatch, here):
    """As a shell hands over a name that is not UTF-8."""
    for stored in STORED.values():
        tokenizer = Tokenizer(stored)
        monkeypatch.setattr(sample, "load", lambda path, device, tokenizer=tokenizer: (
            Parrot([0], tokenizer.vocab_size), tokenizer))
        for words in (["--start=a\udce9"], ["--start=a\udce9", "--interactive"]):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n"), "utf-8"))
            done = inside(sample.main, "--ckpt=x", "--device=cpu", *words)
            assert "not valid Unicode" in done.stderr
        done = inside(sample.main, "--ckpt=x", "--device=cpu", "--start=a", "--stop=\udce9", "--max_new_tokens=1")
        assert done.returncode == 0, done.stderr


def test_a_text_in_the_other_form_is_told_the_way_out(here):
    (here / "a.txt").write_text(FORMS["apart"] * 9, encoding="utf-8")
    (here / "b.txt").write_text(FORMS["composed"] * 9, encoding="utf-8")
    prepared("a.txt")
    done = refused("b.txt", "--tokenizer=sets/a/meta.json")
    assert done.returncode == 2
    assert 'unicodedata.normalize("NFD", text)' in done.stderr
    assert np.unique([len(line) for line in done.stderr.splitlines()]).size == 1


def test_a_stop_text_that_cannot_be_met_is_named(say):
    assert "--stop=猫 is never met" in say("unix", "ab", "--stop=猫", "--start=a").stderr
    for stop in ("b", r"\n", r"\r\n"):
        assert say("unix", "ab", f"--stop={stop}", "--start=a").stderr == ""
    assert r"--stop=\r" in say("unix", "ab", r"--stop=\r", "--start=a", "--newlines=keep").stderr
    assert say("byte", "ab", "--stop=猫", "--start=a").stderr == ""
