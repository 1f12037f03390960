"""Which runs of characters of some texts stand in another, however long that is: found by hashes, and
compared character by character.

A run is hashed as a polynomial (Karp and Rabin 1987, "Efficient randomized pattern-matching
algorithms"). Of the long text only every few characters a short block is hashed, and whole runs only
around the blocks that the texts have too.
"""

from functools import cached_property

import numpy as np

BASE = 0x9E3779B97F4A7C15               # of the polynomials, modulo 2**64; odd
LARGEST_FILTER = 24                     # bits of a hash that a filter looks at


def hash_runs(symbols: np.ndarray, starts: np.ndarray, length: int, base: int = BASE) -> np.ndarray:
    """(starts,) in uint64: hashes of the runs of `length` symbols that begin at `starts`. symbols: (n,)
    in uint32."""
    hashes = np.zeros(len(starts), np.uint64)
    for place in range(length):
        hashes *= np.uint64(base)
        hashes += symbols[place:][starts]
    return hashes


class Filter:
    """Which hashes may be among some others: never no for one that is, seldom yes for one that is not."""

    def __init__(self, hashes: np.ndarray):
        bits = min(LARGEST_FILTER, len(hashes).bit_length() + 4)
        self.shift = np.uint64(64 - bits)
        self.present = np.zeros(1 << bits, bool)
        self.present[hashes >> self.shift] = True

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        return self.present[hashes >> self.shift]


class Runs:
    """The different runs of `length` symbols in some texts, numbered, to be looked up in another text.

    texts: arrays (n,) of uint32. symbols: all of them in one array; no run is of two texts. starts:
    (places,) where runs begin in `symbols`; text_of: (places,) the text of each; numbers: (places,) the
    run of each. hashes: (runs,) rising; first: (runs,) where each begins first."""

    def __init__(self, texts: list, length: int):
        self.length = length
        self.symbols = np.concatenate([*texts, np.empty(0, np.uint32)])
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        counts = [max(0, len(text) - length + 1) for text in texts]
        begins = [np.arange(count) + end - len(text) for text, count, end in zip(texts, counts, ends, strict=True)]
        self.starts = np.concatenate([*begins, np.empty(0, np.int64)])
        self.text_of = np.repeat(np.arange(len(texts)), counts)
        self.base = BASE
        while self.number_runs():
            self.base += 2                              # two different runs have the same hash
        # Any `length` characters in a row contain a whole block, if blocks follow one another.
        self.block = max(1, (length + 1) // 2)
        places = np.arange(max(0, len(self.symbols) - self.block + 1))
        self.blocks = Filter(hash_runs(self.symbols, places, self.block, self.base))

    def number_runs(self) -> bool:
        """Number the runs by their hashes; whether two different ones have the same."""
        hashes = hash_runs(self.symbols, self.starts, self.length, self.base)
        self.hashes, first, self.numbers = np.unique(hashes, return_index=True, return_inverse=True)
        self.first = self.starts[first]
        self.filter = Filter(self.hashes)
        repeated = np.flatnonzero(self.first[self.numbers] != self.starts)
        same = self.same_runs(self.symbols, self.starts[repeated], self.numbers[repeated])
        return not same.all()

    def same_runs(self, symbols: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(places,) whether the run of that number begins at each place in `symbols`."""
        same = np.ones(len(places), bool)
        for offset in range(self.length):
            same &= symbols[offset:][places] == self.symbols[offset:][self.first[numbers]]
        return same

    @cached_property
    def by_number(self) -> tuple:
        """((places,) the text of each place, by the number of its run; (runs + 1,) where the places of each
        run begin among them)."""
        order = np.argsort(self.numbers, kind="stable")
        return self.text_of[order], np.searchsorted(self.numbers[order], np.arange(len(self.hashes) + 1))

    def texts_with(self, numbers) -> list:
        """The texts in which runs of these numbers stand, rising."""
        text_of, bounds = self.by_number
        texts = set()
        for number in set(numbers):
            texts.update(text_of[bounds[number]:bounds[number + 1]].tolist())
        return sorted(texts)

    def find(self, symbols: np.ndarray, wanted: np.ndarray | None = None) -> tuple:
        """(places, numbers), (found,) each: where runs begin in `symbols`, rising, and which they are.
        wanted: (runs,) which ones to look for; None: all."""
        places = self.candidates(symbols)
        hashes = hash_runs(symbols, places, self.length, self.base)
        known = self.filter(hashes)
        places = places[known]
        hashes = hashes[known]
        if not len(places) or not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        numbers = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        likely = self.hashes[numbers] == hashes
        if wanted is not None:
            likely &= wanted[numbers]
        places = places[likely]
        numbers = numbers[likely]
        same = self.same_runs(symbols, places, numbers)
        return places[same], numbers[same]

    def candidates(self, symbols: np.ndarray) -> np.ndarray:
        """Where in `symbols` a run may begin, rising: around the blocks that the texts have too."""
        begins = np.arange(0, len(symbols) - self.block + 1, self.block)
        begins = begins[self.blocks(hash_runs(symbols, begins, self.block, self.base))]
        reach = self.length - self.block                # of the runs that hold a block, the first begins so far before
        is_candidate = np.zeros(len(symbols) + reach, bool)         # shifted by `reach`
        for offset in range(reach + 1):
            is_candidate[begins + offset] = True
        return np.flatnonzero(is_candidate[reach:max(reach, len(symbols) + reach - self.length + 1)])


def overlapping(chunks, overlap: int):
    """Yield (place of its first symbol in the whole text, symbols) for each of the consecutive `chunks`
    (n,) of a text, with the last `overlap` symbols of those before it in front."""
    tail = np.empty(0, np.uint32)
    end = 0
    for chunk in chunks:
        symbols = np.concatenate([tail, chunk])
        end += len(chunk)
        yield end - len(symbols), symbols
        tail = symbols[len(symbols) - min(overlap, len(symbols)):]
