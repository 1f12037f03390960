"""A text arrives whole or not at all: three tries that go on where the last was cut off, a SHA-256 where one is known,
and one line that says what to do.

The network is a server on 127.0.0.1 that lives as long as its test."""

import hashlib
import os
import sys
import threading
import urllib.request
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from conftest import one_line_error

import prepare
from inkling.cli import exit_code
from inkling.tokenizer import cached_files

TEXT = b"The hen said good night to the moon.\r\nThe moon said it back.\n" * 20
READ = TEXT.replace(b"\r\n", b"\n")     # with the line ends that it has in a set


# -- what a server can answer --------------------------------------------------------------------------------

def good(answer, length=True, shift=0, most=None):
    """What is asked for: the text, or the rest of it if it has not changed since. At most so many bytes arrive."""
    start = int((answer.headers["Range"] or "bytes=0-")[6:-1])
    if start and parsedate_to_datetime(answer.headers["If-Unmodified-Since"]).year < answer.server.changed:
        return answer.send_error(412)
    if start >= len(TEXT):
        return answer.send_error(416)
    answer.send_response(206 if start else 200)
    if start:
        answer.send_header("Content-Range", f"bytes {start + shift}-{len(TEXT) - 1}/{len(TEXT)}")
    if length:
        answer.send_header("Content-Length", str(len(TEXT) - start - shift))
    answer.end_headers()
    answer.wfile.write(TEXT[start + shift:][:most])
    return None


def unannounced(answer):
    good(answer, length=False)


def elsewhere(answer):
    good(answer, shift=7)


def all_again(answer):
    del answer.headers["Range"]
    good(answer)


def sent_on(answer):
    """Hugging Face's first answer."""
    answer.send_response(302)
    answer.send_header("X-Linked-Etag", f'"{hashlib.sha256(TEXT).hexdigest()}"')
    answer.send_header("Location", "/bytes")
    answer.end_headers()


def not_found(answer):
    answer.send_error(404)


def other_text(answer):
    answer.send_response(200)
    answer.end_headers()
    answer.wfile.write(TEXT.replace(b"moon", b"noon"))


def cut_short(answer):
    good(answer, most=100)


def hang_up(answer):
    answer.close_connection = True


def no_http(answer):
    answer.wfile.write(b"What do you want?\r\n")


def silent(answer):
    answer.server.closing.wait(30)


def silent_midway(answer):
    cut_short(answer)
    answer.server.closing.wait(30)


FAULTS = [not_found, other_text, cut_short, hang_up, no_http, silent, silent_midway]
KEEPING = [cut_short, silent_midway]                # leave 100 bytes more to go on from


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        self.server.paths.append(self.path)
        self.server.answer()(self)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server that gives `answers`, one per request (the last one again and again). prepare.py knows three sets by its
    text: `tale`, `tale_bytes`, and `news`, whose SHA-256 it does not know. `tries` lists the time-out of each request,
    `ranges` what part of the text it asks for. The text was `changed` in that year."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.url = f"http://127.0.0.1:{server.server_port}/tale.txt"
    server.answers, server.tries, server.ranges, server.closing = [good], [], [], threading.Event()
    server.paths = []
    server.changed = 0
    server.answer = lambda: server.answers[min(len(server.tries), len(server.answers)) - 1]
    source = dict(url=server.url, sha256=hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(prepare, "SETS", {"tale": dict(tokenizer="char", **source),
                                          "tale_bytes": dict(tokenizer="byte", **source),
                                          "news": dict(tokenizer="char", url=server.url)})

    urlopen = urllib.request.OpenerDirector.open

    def impatient(self, request, data=None, *, timeout):
        server.tries.append(timeout)
        return urlopen(self, request, timeout=0.1 if server.answer() in (silent, silent_midway) else timeout)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", impatient)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "*")

    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def prepared(tmp_path):
    """Run prepare.py on a data folder of its own."""
    return lambda *argv: prepare.main([*map(str, argv), f"--data_dir={tmp_path}"])


@pytest.fixture
def refused(prepared, capsys):
    """What a person sees of a prepare.py that must end early."""
    def refused(*argv):
        code = exit_code(lambda _: prepared(*argv), [])
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err)
    return refused


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# -- built-in sets ----------------------------------------------------------------------------------------------

def test_the_text_is_downloaded_once_and_kept_exactly(site, prepared, tmp_path):
    prepared("tale")
    prepared("tale")
    assert len(site.tries) == 1
    assert (tmp_path / "tale" / "input.txt").read_bytes() == TEXT
    assert (tmp_path / "tale" / "train.bin").stat().st_size == int(len(READ) * 0.9)
    prepared("--check", "tale")


def test_a_twin_set_uses_the_text_that_is_already_there(site, prepared, tmp_path):
    prepared("tale")
    prepared("tale_bytes")
    assert len(site.tries) == 1
    ids = [np.fromfile(tmp_path / "tale_bytes" / f"{split}.bin", np.uint8) for split in ("train", "val")]
    assert np.concatenate(ids).tobytes() == READ


def test_a_file_put_there_by_hand_needs_no_network(site, prepared, tmp_path):
    (tmp_path / "tale").mkdir()
    (tmp_path / "tale" / "input.txt").write_bytes(TEXT)
    prepared("tale")
    assert site.tries == []
    assert (tmp_path / "tale" / "meta.json").is_file()


@pytest.mark.parametrize("owner", ["tale", "tale_bytes"])
def test_a_wrong_file_there_is_named_and_left_alone(owner, site, refused, tmp_path):
    wrong = tmp_path / owner / "input.txt"
    wrong.parent.mkdir()
    wrong.write_bytes(b"my own notes")
    one_line_error(refused("tale"), str(wrong), "SHA-256", "--name=")
    assert site.tries == []
    assert files(tmp_path) == {"input.txt": b"my own notes"}


@pytest.mark.parametrize("fault", FAULTS)
def test_three_tries_then_one_line_and_no_text(fault, site, refused, tmp_path):
    site.answers = [fault]
    by_hand = f"put that file at {tmp_path / 'tale' / 'input.txt'}"
    one_line_error(refused("tale"), site.url, by_hand, "python train.py", "no network")
    assert len(site.tries) == 3
    assert files(tmp_path) == ({"input.txt.part": TEXT[:300]} if fault in KEEPING else {})


@pytest.mark.parametrize("last", [good, all_again, unannounced])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_later_try_succeeds(fault, last, site, prepared, tmp_path):
    site.answers = [fault, fault, last]
    prepared("tale")
    assert len(site.tries) == 3
    assert site.ranges == [None, *(["bytes=100-", "bytes=200-"] if fault in KEEPING else [None, None])]
    assert set(files(tmp_path)) == {"input.txt", "train.bin", "val.bin", "meta.json"}
    assert files(tmp_path)["input.txt"] == TEXT


@pytest.mark.parametrize("way", ["pinned", "unpinned", "address"])
def test_the_next_command_goes_on_with_what_has_arrived(way, site, prepared, refused, tmp_path):
    words = {"pinned": ["tale"], "unpinned": ["news"], "address": [site.url, "--name=own"]}[way]
    site.answers = [cut_short]
    one_line_error(refused(*words), site.url, "300 of 1,220 bytes", "by hand")
    (name, part), = files(tmp_path).items()
    assert name.endswith("t.txt.part" if way == "pinned" else "tale.txt.part")
    assert part == TEXT[:300]
    site.answers, site.ranges[:] = [good], []
    prepared(*words)
    assert site.ranges == ["bytes=300-"]
    assert set(files(tmp_path)) == {name[:-5], "train.bin", "val.bin", "meta.json"}
    assert files(tmp_path)[name[:-5]] == TEXT


@pytest.mark.parametrize(("held", "changed", "afresh"), [(TEXT[:4], 2019, []), (b"Then", 2021, [None]),
                                                          (TEXT + b"The end.", 2019, [None])])
def test_a_part_of_a_text_that_has_changed_is_dropped(held, changed, afresh, site, prepared, tmp_path):
    (tmp_path / "news").mkdir()
    part = tmp_path / "news" / "tale.txt.part"
    part.write_bytes(held)
    os.utime(part, (1.59e9, 1.59e9))                    # in 2020
    site.changed = changed
    prepared("news")
    assert site.ranges == [f"bytes={len(held)}-", *afresh]
    assert files(tmp_path)["tale.txt"] == TEXT


def test_other_bytes_than_those_asked_for_are_not_added(site, prepared, tmp_path):
    site.answers = [cut_short, elsewhere, good]
    prepared("news")
    assert site.ranges == [None, "bytes=100-", None]
    assert files(tmp_path)["tale.txt"] == TEXT


def test_a_checksum_that_the_server_tells_is_checked(site, prepared, refused, tmp_path, capsys):
    site.answers = [sent_on, other_text] * 3
    one_line_error(refused("news"), site.url, "another SHA-256", "by hand")
    assert files(tmp_path) == {}
    site.answers = [sent_on, other_text, sent_on, cut_short, sent_on, good]
    site.tries, site.ranges[:] = [], []
    prepared("news")
    assert site.ranges == [None] * 4 + ["bytes=100-"] * 2
    assert files(tmp_path)["tale.txt"] == TEXT
    assert "no SHA-256" not in capsys.readouterr().out


@pytest.mark.parametrize("way", ["unpinned", "address"])
def test_hf_endpoint_serves_every_address_of_the_hub(way, site, prepared, tmp_path, monkeypatch):
    hub = "https://huggingface.co/datasets/tales/resolve/main/tale.txt"
    monkeypatch.setitem(prepare.SETS, "news", prepare.SETS["news"] | {"url": hub})
    monkeypatch.setenv("HF_ENDPOINT", site.url.removesuffix("tale.txt"))
    prepared(*(["news"] if way == "unpinned" else [hub, "--name=own"]))
    assert site.paths == ["/datasets/tales/resolve/main/tale.txt"]
    assert TEXT in files(tmp_path).values()
    prepared(site.url, "--name=other")                  # another server's address stays as it is
    assert site.paths[1:] == ["/tale.txt"]


def test_no_server_at_all(site, refused, tmp_path, monkeypatch):
    closed = "http://127.0.0.1:1/tale.txt"              # a port that nothing listens on
    monkeypatch.setitem(prepare.SETS, "tale", prepare.SETS["tale"] | {"url": closed})
    one_line_error(refused("tale"), closed, str(tmp_path / "tale" / "input.txt"))
    assert len(site.tries) == 3
    assert files(tmp_path) == {}


def test_every_try_has_a_time_out(site, refused):
    site.answers = [not_found]
    refused("tale")
    assert [0 < seconds <= 60 for seconds in site.tries] == [True] * 3


def test_a_prepared_set_outlives_a_failed_download(site, prepared, refused, tmp_path):
    prepared("tale")
    (tmp_path / "tale" / "input.txt").unlink()
    before = files(tmp_path)
    site.answers = [good, other_text]
    one_line_error(refused("tale"), site.url)
    assert files(tmp_path) == before


def test_the_embedded_set_needs_no_network(prepared, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("asked the network")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", no_network)
    prepared("fables")
    assert set(files(tmp_path)) == {"train.bin", "val.bin", "meta.json"}


def test_the_real_addresses_are_pinned():
    sources = [source for source in prepare.SETS.values() if "url" in source]
    assert len(sources) == 4
    for source in sources:
        assert source["url"].startswith("https://")
    unpinned = {name for name, source in prepare.SETS.items() if "url" in source and "sha256" not in source}
    assert unpinned == {"tinystories"}                  # its size is checked, and what SHA-256 its server tells
    assert all(len(bytes.fromhex(source["sha256"])) == 32 for source in sources if "sha256" in source)


# -- tiktoken, which downloads its encodings itself ----------------------------------------------------------

@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("a short note\n")
    return path


def test_without_tiktoken_one_line_says_how_to_get_it(note, prepared, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    one_line_error(refused(note, "--tokenizer=gpt2"), "gpt2", "pip install tiktoken", "char", "byte")
    assert set(files(tmp_path)) == {"note.txt"}
    for tokenizer in ("char", "byte"):                  # which the line offers
        prepared(note, f"--tokenizer={tokenizer}")


@pytest.mark.parametrize("raised", [OSError("no route\nto host"), ValueError("bad hash"), KeyError("x")])
def test_an_encoding_that_cannot_be_downloaded_is_one_line(raised, note, refused, tmp_path, monkeypatch):
    def refuse(name):
        raise raised
    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    one_line_error(refused(note, "--tokenizer=gpt2"), "gpt2", "TIKTOKEN_CACHE_DIR", "char or byte",
                   "vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                   "encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    one_line_error(refused(note, "--tokenizer=cl100k_base"), "--tokenizer=PATH/cl100k_base.tiktoken",
                   "cl100k_base.tiktoken as 9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    assert set(files(tmp_path)) == {"note.txt"}


def test_the_names_in_tiktokens_cache_are_those_it_looks_for(tmp_path, monkeypatch):
    """Every encoding that tiktoken knows, from a cache of empty files: what it asks for is what the message says."""
    asked = []

    def note(path, *_):
        asked.append(hashlib.sha1(path.encode()).hexdigest())
        raise OSError("enough")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", note)
    for name in tiktoken.list_encoding_names():
        asked.clear()
        with pytest.raises(OSError, match="enough"):
            tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
        assert asked[0] in cached_files(name)
