"""Anchors: what a model has to beat, measured by simple means and said in bits per byte."""

import json
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import ROOT, SHARED, prepared, refused

from inkling.anchors import ORDER, judge, measure_anchors, strongest, token_bits, xz_size
from inkling.dataset import open_split, read_meta
from inkling.ngram import NgramModel, estimate_discounts, ngram_losses, number_keys
from inkling.texts import decode_ids, sample_ids, to_symbols
from inkling.tokenizer import Tokenizer, stored_tokenizer

FABLES = ROOT / "data" / "fables" / "input.txt"


# -- the n-gram model, against a slow count in dictionaries

class SlowKneserNey:
    """Interpolated modified Kneser-Ney as the paper writes it: {n-gram: count} for each length."""

    def __init__(self, train: list, order: int, alphabet: int):
        self.alphabet = alphabet
        occurs = {n: Counter(tuple(train[i:i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)}
        self.counts = {order: occurs[order]}
        for n in range(1, order):
            self.counts[n] = Counter(gram[1:] for gram in occurs[n + 1])
        self.discounts = {n: self.discounts_of(counts) for n, counts in self.counts.items()}
        self.follow = {n: defaultdict(list) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.follow[n][gram[:-1]].append(count)

    def discounts_of(self, counts: Counter) -> list:
        n1, n2, n3, n4 = (sum(count == n for count in counts.values()) for n in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return [0, 0.5, 0.5, 0.5]
        y = n1 / (n1 + 2 * n2)
        discounts = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return [0, *discounts] if min(discounts) > 0 else [0, 0.5, 0.5, 0.5]

    def p(self, symbol: int, past: tuple, n: int) -> float:
        if n == 0:
            return 1 / self.alphabet
        if len(past) < n - 1:
            return self.p(symbol, past, n - 1)
        context = past[len(past) - n + 1:]
        following = self.follow[n][context]
        lower = self.p(symbol, past, n - 1)
        if not following:
            return lower
        discounts = self.discounts[n]
        count = self.counts[n][*context, symbol]
        withheld = sum(discounts[min(3, c)] for c in following)
        return (count - discounts[min(3, count)] + withheld * lower) / sum(following)


def drawn_text(length: int, alphabet: int = 6, seed: int = 0) -> np.ndarray:
    """(length,) symbols of which each depends on the one before it; the last of the alphabet never occurs."""
    rng = np.random.default_rng(seed)
    symbols = [0]
    while len(symbols) < length:
        symbols.append(int(rng.choice([(symbols[-1] + 1) % (alphabet - 1), rng.integers(alphabet - 1)])))
    return np.array(symbols)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_n_gram_model_is_that_of_a_slow_count(order):
    train = drawn_text(700)
    val = np.append(drawn_text(80, seed=1), [5, 0, 1])              # and a symbol that train lacks
    slow = SlowKneserNey(train.tolist(), order, 6)
    past = val.tolist()
    expected = [-math.log(slow.p(symbol, tuple(past[:i]), order)) for i, symbol in enumerate(past)]
    assert ngram_losses(train, val, order, 6) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("train_length", [3, 60, 2000])
def test_probabilities_sum_to_one_after_any_past(train_length):
    train = drawn_text(train_length)
    for past in ([], [0], [5], [1, 2, 3, 4, 0, 1, 2, 3], [5, 5, 0, 1], drawn_text(20, seed=2).tolist()):
        p = [math.exp(-ngram_losses(train, np.array([*past, symbol]), 8, 6)[-1]) for symbol in range(6)]
        assert sum(p) == pytest.approx(1, abs=1e-9)
        assert min(p) > 0


@pytest.mark.parametrize("order", [1, 2, 5, 9])
def test_a_model_in_memory_predicts_what_the_losses_say(order, monkeypatch):
    rng = np.random.default_rng(order)
    train, val = rng.integers(6, size=400), rng.integers(7, size=60)        # 6 is not in train
    val[30:50] = train[100:120]
    expected = np.exp(-ngram_losses(train, val, order, 7))
    model = NgramModel(train, order, 7)
    p = model.predict(val)
    assert p.shape == (60, 7)
    assert p.sum(1) == pytest.approx(np.ones(60))
    assert p[np.arange(59), val[1:]] == pytest.approx(expected[1:], abs=1e-12)
    assert model.predict(val, 57) == pytest.approx(p[57:], abs=1e-12)
    monkeypatch.setattr(NgramModel, "AT_ONCE", 4 * 7)                       # four places at a time
    assert model.predict(val, 3) == pytest.approx(p[3:], abs=1e-12)


@pytest.mark.parametrize("largest", [3, 300, 2**62])           # the last one leaves no room for places
@pytest.mark.parametrize("count", [0, 1, 500])
def test_keys_are_numbered_in_their_order(largest, count):
    keys = np.random.default_rng(0).integers(0, largest, count)
    different, numbers, counts, places = number_keys(keys)
    assert different.tolist() == sorted(set(keys.tolist()))
    assert (different[numbers] == keys).all()
    assert (keys[places] == different).all()
    assert counts.tolist() == [int((keys == key).sum()) for key in different]


def test_discounts_lie_between_nothing_and_the_count():
    for counts in ([1] * 3 + [2] * 90 + [3] * 2 + [4] * 80, [1, 1, 2, 3, 4], [1, 1, 1], [7]):
        discounts = estimate_discounts(np.array(counts))
        assert (discounts[1:] > 0).all()
        assert (discounts <= [0, 1, 2, 3]).all()


@pytest.mark.skipif(not (SHARED / "data" / "tinyshakespeare.txt").is_file(), reason="needs tinyshakespeare")
def test_tinyshakespeare_has_its_known_loss():
    symbols = to_symbols((SHARED / "data" / "tinyshakespeare.txt").read_bytes())
    alphabet, symbols = np.unique(symbols, return_inverse=True)
    cut = int(0.9 * len(symbols))
    assert ngram_losses(symbols[:cut], symbols[cut:], 8, len(alphabet)).mean() == pytest.approx(1.519, abs=0.01)


# -- the other anchors

def test_single_tokens_count_one_more_than_they_occur():
    assert token_bits(np.array([0, 0, 0, 1]), np.array([0, 1, 2]), 4) == pytest.approx(
        -(math.log2(4 / 8) + math.log2(2 / 8) + math.log2(1 / 8)) / 3)


def test_xz_comes_near_the_program_of_that_name():
    text = FABLES.read_bytes()
    assert xz_size(text) == pytest.approx(len(lzma.compress(text)), rel=0.01)


def test_a_sample_is_spread_evenly_and_a_short_text_is_whole():
    ids = np.arange(100_000)
    assert (sample_ids(ids, 100_000) == ids).all()
    sample = sample_ids(ids, 6400)
    assert len(sample) == 6400
    assert sample[0] == 0
    assert sample[-1] == 99_999
    assert sample.mean() == pytest.approx(50_000, rel=0.01)


def test_text_of_a_sample_drops_half_characters():
    tokenizer = Tokenizer.build("byte")
    text = decode_ids(tokenizer, np.frombuffer("é狐".encode()[1:-1], np.uint8))
    assert to_symbols(text).size == 0
    assert to_symbols(text, in_bytes=True).size == 3


# -- in a prepared set

@pytest.fixture
def fables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text(FABLES.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return prepared("some.txt")


def test_preparing_keeps_anchors_and_says_them_in_columns(fables, tmp_path):
    meta = read_meta(tmp_path / "sets" / "some")
    anchors = meta["anchors"]
    assert anchors["uniform"] == pytest.approx(math.log2(meta["vocab_size"]), abs=1e-4)
    assert anchors["uniform"] > anchors["tokens"] > anchors["xz"] > anchors["ngram"] > 1
    assert anchors["order"] == ORDER
    assert "sampled" not in anchors
    lines = [line for line in fables.splitlines() if line.startswith(("  uniform", "  single", "  xz", "  8-gram"))]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    prepared("--check", "some")


def test_an_older_set_stays_as_it_is_and_gets_anchors_when_asked(fables, tmp_path):
    path = tmp_path / "sets" / "some" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    anchors = meta.pop("anchors")
    path.write_text(json.dumps(meta), encoding="utf-8")
    before = {file.name: file.read_bytes() for file in path.parent.glob("*.bin")}
    assert "nothing has changed" in prepared("some.txt")
    assert "anchors" not in read_meta(path.parent)
    assert "8-gram" in prepared("--anchors", "some")
    assert read_meta(path.parent) == meta | {"anchors": anchors}
    assert {file.name: file.read_bytes() for file in path.parent.glob("*.bin")} == before


def test_a_set_without_val_has_no_anchors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("The fox. " * 100, encoding="utf-8")
    assert "anchors" not in prepared("some.txt", "--val_fraction=0")
    assert "raise --val_fraction" in refused("--anchors", "some").stderr
    assert refused("--anchors", "nothere").returncode == 2
    assert not (tmp_path / "sets" / "nothere").exists()


def test_a_larger_text_is_sampled_and_says_so(fables, tmp_path, monkeypatch):
    monkeypatch.setattr("inkling.anchors.MOST", {"train": 6400, "val": 64_000})
    folder = tmp_path / "sets" / "some"
    meta = read_meta(folder)
    data = {split: open_split(folder, meta, split) for split in ("train", "val")}
    assert measure_anchors(data, meta, stored_tokenizer(folder, meta))["sampled"] == {"train": 6400}
    assert "from an even sample: 6,400 characters of train" in prepared("--anchors", "some")


def test_xz_reads_less_of_a_larger_text_and_says_so(fables, tmp_path, monkeypatch):
    whole = read_meta(tmp_path / "sets" / "some")["anchors"]
    monkeypatch.setattr("inkling.anchors.MOST_XZ", {"train": 6400, "val": 10**6})
    assert "from an even sample: 6,400 bytes of train for xz" in prepared("--anchors", "some")
    anchors = read_meta(tmp_path / "sets" / "some")["anchors"]
    assert anchors.pop("sampled") == {"xz_train": 6400}
    assert anchors["xz"] > whole["xz"] + 0.1
    assert anchors | {"xz": 0} == whole | {"xz": 0}


# -- in words

ANCHORS = {"uniform": 6.0, "tokens": 4.8, "xz": 2.75, "ngram": 2.19}


@pytest.mark.parametrize(("bits", "said"), [
    (2.06, "6% less than the 8-gram (2.19)"), (2.5, "better than xz (2.75)"),
    (3.5, "better than the frequencies of single tokens (4.80)"), (5.0, "no better than the frequencies")])
def test_a_loss_is_judged_by_what_it_beats(bits, said):
    assert said in judge(bits, ANCHORS)


def test_a_set_without_anchors_is_not_judged():
    assert judge(2.0, {}) == strongest({}) == ""
    assert strongest(ANCHORS) == "8-gram 2.19, xz 2.75"
