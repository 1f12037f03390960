"""Sets of any size: written in bounded memory, in shards that training reads as one, and read in bounded memory."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, inside, one_line_error, prepared, refused, trained

import prepare
from inkling.dataset import LARGEST_ARRAY, Shuffle, open_data, open_split, random_order, read_meta
from inkling.tokenizer import Tokenizer
from prepare import Options, write_set
from train import Config, get_batch, window_starts

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
counts_memory = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts memory so")
FABLES = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(FABLES[:20_000], encoding="utf-8", newline="")
    return tmp_path


@pytest.fixture
def both(here) -> tuple:
    """(folder of a set in one file per split, folder of the same in shards of 999 tokens)"""
    prepared("a.txt", "--name=one")
    prepared("a.txt", "--name=many", "--shard_tokens=999")
    return here / "sets" / "one", here / "sets" / "many"


# -- shards ----------------------------------------------------------------------------------------------------------

def test_shards_are_the_same_ids_in_more_files(both):
    one, many = both
    for split, shards in (("train", 19), ("val", 3)):
        parts = [many / f"{split}_{number:03}.bin" for number in range(shards)]
        assert [part.stat().st_size for part in parts[:-1]] == [999] * (shards - 1)
        assert b"".join(part.read_bytes() for part in parts) == (one / f"{split}.bin").read_bytes()
        entry = read_meta(many)["splits"][split]
        assert [shard["sha256"] for shard in entry["shards"]] == [hashlib.sha256(part.read_bytes()).hexdigest()
                                                                  for part in parts]
        assert {key: entry[key] for key in entry if key != "shards"} == read_meta(one)["splits"][split]
    assert len(list(many.glob("*.*"))) == 19 + 3 + 1 + 1                  # meta.json and the lock


def test_shards_are_indexed_as_one_array(both):
    one, many = (open_split(folder, read_meta(folder), "train") for folder in both)
    rng = np.random.default_rng(0)
    assert len(one) == len(many) == 18_000
    assert many.dtype == one.dtype
    for at in (rng.integers(18_000, size=(7, 50)), np.arange(990, 1010), np.array([0, 998, 999, 17_999]), slice(5),
               slice(990, 2005), slice(17_990, 99_999), slice(0, 0), np.empty((0, 3), int)):
        assert many[at].shape == one[at].shape
        assert (many[at] == one[at]).all()
    with pytest.raises(IndexError):
        many[np.array([18_000])]
    with pytest.raises(IndexError):
        many[np.array([-1])]


def test_training_sees_no_difference(both):
    logs = []
    for folder in both:
        done = trained(folder.parent, folder.parent.parent / f"run_{folder.name}", dataset=folder.name)
        assert done.returncode == 0, done.stderr
        logs.append([line for line in done.stdout.splitlines() if line.startswith("eval")])
    assert logs[0] == logs[1]


def test_changing_between_one_file_and_shards_leaves_nothing_over(here):
    names = {"train.bin", "val.bin", "meta.json"}
    (here / "sets" / "a").mkdir(parents=True)
    (here / "sets" / "a" / "train_007.bin.tmp").touch()                 # of a prepare that was killed
    (here / "sets" / "a" / "training_notes.bin").touch()                # not ours
    for words in ([], ["--shard_tokens=5000"], ["--shard_tokens=900"], []):
        prepared("a.txt", *words)
        prepared("--check", "a")
        found = {path.name for path in (here / "sets" / "a").iterdir()} - {"training_notes.bin", ".lock"}
        assert (found == names) is (not words)
        assert len(found) == len(read_meta(here / "sets" / "a")["splits"]["train"].get("shards", "1")) + len(
            read_meta(here / "sets" / "a")["splits"]["val"].get("shards", "1")) + 1
    assert (here / "sets" / "a" / "training_notes.bin").exists()


@pytest.mark.parametrize("damage", ["remove", "truncate", "flip", "swap"])
def test_a_damaged_shard_is_named(damage, both):
    shard, other = both[1] / "train_004.bin", both[1] / "train_005.bin"
    content = shard.read_bytes()
    if damage == "remove":
        shard.unlink()
    elif damage == "swap":
        shard.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        shard.write_bytes(content[:-1] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    one_line_error(refused("--check", "many"), "train_004.bin", "prepare")


def test_too_many_shards_are_refused_and_leave_nothing(here):
    one_line_error(refused("a.txt", "--shard_tokens=30"), "shard_tokens=30", "500")
    assert not list((here / "sets").rglob("*.bin*"))


@needs_fork
def test_a_kill_between_shards_leaves_the_old_set_or_the_new_one(here):
    """The process is gone at the n-th rename, for every n."""
    replace = os.replace
    for number in range(20):
        prepared("a.txt", "--force")
        old = read_meta(here / "sets/a")
        renames = count(0)

        def replace_or_end(*args, renames=renames, number=number):
            if next(renames) == number:
                os._exit(9)
            replace(*args)

        child = os.fork()
        if child == 0:
            os.replace = replace_or_end
            prepared("a.txt", "--force", "--shard_tokens=6000")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        prepared("--check", "a")
        assert (read_meta(here / "sets/a") != old) is (number > 1)      # the second rename commits
        if code == 0:
            break
    assert number == 7          # the first shard's name, the commit, three shards, val, meta.json


# -- what is there -----------------------------------------------------------------------------------------------------

def test_decode_into_a_closed_pipe_says_nothing(here):
    (here / "b.txt").write_text(FABLES * 5, encoding="utf-8")
    prepared("b.txt", "--tokenizer=byte")
    with subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), "--decode", "b", "--data_dir=sets"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(10) == FABLES[:10].encode()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 141)               # 0: all was in the pipe before it was closed


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:400"])
def test_decode_writes_the_text_back(tokenizer, here):
    text = FABLES[:5000] + "\n漢字 \0 <|endoftext|> \U0001f600 e\u0301"
    (here / "b.txt").write_text(text, encoding="utf-8", newline="\r\n")
    prepared("b.txt", f"--tokenizer={tokenizer}", "--newlines=keep")
    assert prepared("--decode", "b") == text.replace("\n", "\r\n")
    for more in ([], ["--shard_tokens=1234"], ["--limit=4000"]):
        prepared("b.txt", f"--tokenizer={tokenizer}", "--val_fraction=0.3", *more)
        assert prepared("--decode", "b") == (text[:4000] if "--limit=4000" in more else text)


def test_a_nanogpt_folder_is_taken_over_as_it_is(here):
    prepared("a.txt", "--tokenizer=bpe:400", "--name=s")
    theirs = here / "theirs"
    theirs.mkdir()
    for split in ("train", "val"):
        (theirs / f"{split}.bin").write_bytes((here / f"sets/s/{split}.bin").read_bytes())
    words = ["--adopt", "theirs", "--tokenizer=sets/s/meta.json"]
    assert "--dataset=theirs" in prepared(*words)
    ours, meta = read_meta(here / "sets/s"), read_meta(theirs)
    assert meta["splits"] == ours["splits"]             # counts of characters and bytes too
    assert meta["tokenizer"] == ours["tokenizer"]
    assert inside(prepare.main, "--check", "theirs", "--data_dir=.").returncode == 0
    assert trained(here, here / "run", dataset="theirs", max_iters=1).returncode == 0
    one_line_error(refused(*words), "theirs has a meta.json already", "--force")
    prepared(*words, "--force")


def test_end_of_text_tokens_of_a_folder_taken_over_are_no_characters(here):
    prepared("a.txt", "--tokenizer=bpe:400", "--name=s")
    eot = Tokenizer(read_meta(here / "sets/s")["tokenizer"]).eot
    ids = np.fromfile(here / "sets/s/val.bin", np.uint16)
    for split in ("train", "val"):
        np.concatenate([ids, [eot], ids]).astype(np.uint16).tofile(here / f"{split}.bin")
    prepared("--adopt", ".", "--tokenizer=sets/s/meta.json")
    entry, one = read_meta(here)["splits"]["val"], read_meta(here / "sets/s")["splits"]["val"]
    assert (entry["characters"], entry["bytes"]) == (2 * one["characters"], 2 * one["bytes"])
    assert entry["tokens"] == 2 * one["tokens"] + 1


@pytest.mark.parametrize(("words", "parts"), [
    (["--tokenizer=char"], ["tokenizer=char", "--tokenizer=gpt2"]),
    ([], ["--tokenizer=gpt2"]),
    (["--tokenizer=byte"], ["byte", "uint8", "uint16"]),
    (["--tokenizer=sets/s/meta.json"], ["train.bin holds token id 400", "400"]),
])
def test_what_cannot_be_taken_over_is_one_line(words, parts, here):
    prepared("a.txt", "--tokenizer=bpe:400", "--name=s")
    for split in ("train", "val"):
        np.array([1, 2, 400], np.uint16).tofile(here / f"{split}.bin")
    one_line_error(refused("--adopt", ".", *words), *parts)
    one_line_error(refused("--adopt", "nowhere", "--tokenizer=sets/s/meta.json"), "no folder nowhere")
    assert not (here / "meta.json").exists()


# -- memory and time -------------------------------------------------------------------------------------------------

def peak(*words) -> float:
    """Megabytes that prepare.py had resident at most, in a process of its own, as Linux counts them."""
    code = ("import sys, prepare\nprepare.main(sys.argv[1:])\n"
            "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    done = subprocess.run([sys.executable, "-c", code, *words, "--data_dir=sets"], check=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=120)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


@counts_memory
def test_preparing_a_larger_text_takes_no_more_memory(here):
    rng = random.Random(0)
    words = "".join(rng.choices("abcdefgh ", k=200_000)) + "\n"
    # 1.4 and 24 MB: both more than the sample that the anchors are measured on.
    for name, times in (("small", 7), ("large", 120)):
        with open(f"{name}.txt", "w") as file:
            for _ in range(times):
                file.write(words)
    for options in (["--tokenizer=char"], ["--tokenizer=byte", "--shard_tokens=10000000"]):
        small, large = (peak(f"{name}.txt", "--workers=2", *options) for name in ("small", "large"))
        assert large < small + 30
        assert large < 200                              # Python and numpy alone take about 40


@counts_memory
def test_one_long_line_takes_no_more_memory(here):
    Path("line.txt").write_text("a" * 25_000_000)
    assert peak("line.txt", "--tokenizer=byte", "--workers=2") < 200


def anonymous() -> int:
    """Bytes of this process's memory that no file backs. The pages of a mapped file are counted as resident too, but
    they are the system's cache: it takes them back when anything else needs the room."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def big_set(folder: Path, tokens: int, shards: int = 1) -> dict:
    """A set of `tokens` times the token 0 in sparse files: large to read and small on the disk."""
    folder.mkdir()
    sizes = [tokens // shards] * shards
    entry = dict(tokens=sum(sizes), characters=1, bytes=1, sha256="")
    for number, size in enumerate(sizes):
        with open(folder / ("train.bin" if shards == 1 else f"train_{number:03}.bin"), "wb") as file:
            file.truncate(2 * size)
    (folder / "val.bin").write_bytes(bytes(2000))
    train = entry | ({"shards": [{"tokens": size, "sha256": ""} for size in sizes]} if shards > 1 else {})
    chars = "".join(map(chr, range(1000, 1300)))
    (folder / "meta.json").write_text(json.dumps(
        {"format": 1, "dtype": "uint16", "vocab_size": 300, "splits": {"train": train, "val": entry | {"tokens": 1000}},
         "tokenizer": {"kind": "char", "chars": chars}}))
    return open_data(folder, 64)[0]


@counts_memory
@pytest.mark.parametrize("sampling", ["random", "epoch"])
@pytest.mark.parametrize("shards", [1, 4])
def test_windows_of_a_huge_set_cost_no_memory_and_no_time(sampling, shards, here):
    """Twenty billion tokens against two million: as fast, and 400 batches leave the memory where it was."""
    cfg, seconds = Config(**TOY | dict(sampling=sampling, block_size=64, batch_size=16)), {}
    sets = {name: big_set(here / name, tokens, shards) for name, tokens in (("small", 2_000_000),
                                                                            ("huge", 20_000_000_000))}

    def batches(data, steps):
        for step in steps:
            get_batch(data, window_starts(step, cfg, len(data)), 64, 300, "train", "cpu")

    for name, data in sets.items():
        batches(data["train"], range(20))
        before, start = anonymous(), time.monotonic()
        batches(data["train"], range(20, 420))
        seconds[name] = time.monotonic() - start
        assert anonymous() < before + 5_000_000
    assert seconds["huge"] < 5 * seconds["small"] + 0.5


@counts_memory
def test_a_long_training_run_on_a_big_set_keeps_its_memory(here):
    """Anonymous memory at step 50 and step 199 of one run, seen through the batches that it asks for."""
    big_set(here / "big", 4_000_000_000, 2)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        def measured(step, *rest):
            seen[step] = anonymous()
            return window_starts(step, *rest)
        patch.setattr("train.window_starts", measured)
        done = trained(here, here / "run", dataset="big", n_layer=1, max_iters=200, eval_interval=200,
                       log_interval=200, sample_tokens=0, sampling="epoch")
    assert done.returncode == 0, done.stderr
    assert seen[199] < seen[50] + 10_000_000


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 17_000])
def test_a_shuffle_is_a_permutation(n):
    order = [Shuffle(np.random.default_rng(0), n)[place] for place in range(n)]
    assert sorted(order) == list(range(n))
    if n > 100:
        assert order != [Shuffle(np.random.default_rng(1), n)[place] for place in range(n)]
        moved = np.array(order)
        assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.1
        assert abs(np.corrcoef(moved, np.arange(n))[0, 1]) < 0.1
        assert np.histogram(moved[:n // 4], 4, (0, n))[0].min() > n / 16 * 0.7


def test_small_epochs_are_drawn_as_before():
    order = np.random.default_rng([5, 1, 0]).permutation(1000)
    assert (random_order(np.random.default_rng([5, 1, 0]), 1000) == order).all()
    assert isinstance(random_order(np.random.default_rng(0), LARGEST_ARRAY + 1), Shuffle)


def test_an_epoch_of_a_large_set_visits_every_window_once(monkeypatch):
    """With the large sets' permutation, on a small one."""
    monkeypatch.setattr("inkling.dataset.LARGEST_ARRAY", 1)
    cfg = Config(**TOY | dict(sampling="epoch", seed=99, block_size=32, batch_size=4))
    starts = np.concatenate([window_starts(step, cfg, 3203) for step in range(25)])
    assert len(set(starts)) == 100
    assert len({(start - starts[0]) % 3203 // 32 for start in starts}) >= 99
    covered = np.concatenate([(start + np.arange(32)) % 3203 for start in starts])
    assert len(set(covered.tolist())) == 3200           # no token twice


def test_workers_change_nothing(here):
    for workers in (1, 3):
        write_set(here / str(workers), [here / "a.txt"], options=Options(tokenizer="bpe:300", workers=workers))
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (here / "1" / name).read_bytes() == (here / "3" / name).read_bytes()
