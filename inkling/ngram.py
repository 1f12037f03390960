"""An n-gram model of characters with interpolated, modified Kneser-Ney smoothing, counted by sorting.

The method is Chen and Goodman's (1998, "An Empirical Study of Smoothing Techniques for Language
Modeling", section 3): the longest order counts occurrences, each shorter one counts the different
symbols that an n-gram follows, and three discounts an order, for counts of 1, 2 and more, are
estimated from how many n-grams have a count of 1, 2, 3 and 4.
"""

from dataclasses import dataclass

import numpy as np

NONE = -1                               # the number of an n-gram that the training text lacks


@dataclass
class Order:
    """The different n-grams of one length. keys: (n-grams,) sorted, (number of the n-gram without its
    first symbol) * alphabet + first symbol. contexts: (n-grams,) the number of each n-gram's first
    n - 1 symbols. counts: (n-grams,) of occurrences, or of different symbols in front."""

    keys: np.ndarray
    contexts: np.ndarray
    counts: np.ndarray


def ngram_losses(train: np.ndarray, val: np.ndarray, order: int, alphabet: int) -> np.ndarray:
    """(n,) losses in nats of each symbol of `val`, given those before it in `val`, under the model of
    that order trained on `train`. train, val: (n,) symbols below `alphabet`."""
    p = np.full(len(val), 1 / alphabet)
    val_numbers = np.zeros(len(val), np.int32)
    val_contexts = np.zeros(len(val), np.int64)
    for length, present in enumerate(count_orders(train, order, alphabet), 1):
        if length > 1:
            val_contexts = np.concatenate([[NONE], val_numbers[:-1]])
        val_numbers = find_ngrams(present.keys, val, val_numbers, length, alphabet)
        p = interpolate(p, smooth(present), val_numbers, val_contexts)
    return -np.log(p)


def count_orders(train: np.ndarray, order: int, alphabet: int):
    """Yield the Order of each length from 1 to `order`, as Kneser and Ney count: the longest one's
    occurrences, and of the shorter ones the different symbols in front."""
    numbers = np.zeros(len(train), np.int32)                # of the n-gram that ends at each place
    below = None                                            # the Order one shorter
    for length in range(1, min(order, len(train)) + 1):
        present, numbers = lengthen(train, numbers, length, alphabet)
        if below:
            below.counts = np.bincount(present.keys // alphabet, minlength=len(below.keys))
            yield below
        below = present
    yield below


def lengthen(symbols: np.ndarray, numbers: np.ndarray, length: int, alphabet: int) -> tuple:
    """(the Order of that length, with occurrences for counts; (n,) the number of the n-gram that ends
    at each place). numbers: the same, of n-grams one shorter."""
    shorter = numbers[length - 1:].astype(np.int64)
    keys, inverse, counts, places = number_keys(shorter * alphabet + symbols[:len(shorter)])
    ends = places + length - 1
    contexts = np.zeros(len(keys), np.int64)
    if length > 1:
        contexts = numbers[ends - 1]
    longer = np.full(len(symbols), NONE, np.int32)
    longer[length - 1:] = inverse
    return Order(keys, contexts, counts), longer


def number_keys(keys: np.ndarray) -> tuple:
    """((different,) the different `keys`, rising; (n,) the number of each of them; (different,) how often
    they occur; (different,) a place of each). Like np.unique, but several times faster: what is sorted
    are numbers that hold a key and its place, where these fit into 63 bits."""
    bits = len(keys).bit_length()
    if not len(keys) or int(keys.max()).bit_length() + bits > 63:
        different, places, inverse, counts = np.unique(keys, return_index=True, return_inverse=True,
                                                       return_counts=True)
        return different, inverse, counts, places
    packed = np.sort(keys << bits | np.arange(len(keys)))
    order = packed & ((1 << bits) - 1)
    packed >>= bits                                         # the keys, sorted
    is_new = np.diff(packed, prepend=-1) != 0
    begins = np.flatnonzero(is_new)
    inverse = np.empty(len(keys), np.int64)
    inverse[order] = np.cumsum(is_new) - 1
    return packed[begins], inverse, np.diff(begins, append=len(keys)), order[begins]


def find_ngrams(keys: np.ndarray, symbols: np.ndarray, numbers: np.ndarray, length: int, alphabet: int) -> np.ndarray:
    """(n,) the number of the n-gram of that length that ends at each place, NONE where the training text,
    of which `keys` are, lacks it. numbers: the same, of n-grams one shorter."""
    found = np.full(len(symbols), NONE, np.int32)
    shorter = numbers[length - 1:].astype(np.int64)
    found[length - 1:] = number_of(keys, shorter, symbols[:len(shorter)], alphabet)
    return found


def number_of(keys: np.ndarray, shorter: np.ndarray, first: np.ndarray, alphabet: int) -> np.ndarray:
    """The number of each n-gram whose first symbol is `first`, and whose rest has the number `shorter` or
    NONE; NONE where it is not among `keys`. In the arrays' common shape."""
    wanted = shorter * alphabet + first
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((shorter != NONE) & (keys[places] == wanted), places, NONE)


@dataclass
class Smoothed:
    """One order as `interpolate` needs it. discounted: (n-grams + 1,) counts less their discounts, and a 0
    for NONE. totals, withheld: (contexts,) the counts of all that follows a context, and all that was
    taken from them."""

    discounted: np.ndarray
    totals: np.ndarray
    withheld: np.ndarray


def smooth(order: Order) -> Smoothed:
    discounts = estimate_discounts(order.counts)[np.minimum(order.counts, 3)]       # (n-grams,)
    return Smoothed(discounted=np.append(order.counts - discounts, 0.0),
                    totals=np.bincount(order.contexts, order.counts),
                    withheld=np.bincount(order.contexts, discounts))


def interpolate(p: np.ndarray, order: Smoothed, numbers: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """(n,) probabilities by one order and all shorter ones, whose probabilities are `p`. numbers,
    contexts: (n,) of the n-grams at each place, and of their contexts; NONE where not known."""
    contexts = np.where(contexts < len(order.totals), contexts, NONE)
    applies = np.append(order.totals > 0, False)[contexts]
    contexts = contexts[applies]
    interpolated = p.copy()
    of_longest = order.discounted[numbers[applies]] + order.withheld[contexts] * p[applies]
    interpolated[applies] = of_longest / order.totals[contexts]
    return interpolated


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) what is taken from counts of 0, 1, 2, and of 3 or more."""
    usual = np.array([0, 0.5, 0.5, 0.5])
    having = np.bincount(np.minimum(counts, 5), minlength=6)        # how many n-grams have a count of 0, 1, 2 ...
    if not having[1:5].all():
        return usual                                                # too few n-grams to tell
    share = having[1] / (having[1] + 2 * having[2])
    discounts = [count - (count + 1) * share * having[count + 1] / having[count] for count in (1, 2, 3)]
    if min(discounts) <= 0:
        return usual                # nothing would be left for symbols that do not follow a context in train
    return np.array([0, *discounts])


class NgramModel:
    """The probabilities of all symbols that may follow a text. It holds some 30 bytes for each different
    n-gram of each length up to `order`."""

    AT_ONCE = 2**20                     # probabilities, which bounds the memory beside what is returned

    def __init__(self, train: np.ndarray, order: int, alphabet: int):
        """train: (n,) symbols below `alphabet`, at least one."""
        self.alphabet = alphabet
        self.order = order
        self.orders = [(present.keys, smooth(present)) for present in count_orders(train, order, alphabet)]

    def predict(self, text: np.ndarray, first: int = 0) -> np.ndarray:
        """(len(text) - first, alphabet) probabilities of each symbol after each place of `text` (n,) from
        `first` on, given the text up to and including it."""
        text = text.astype(np.int64)
        rows = max(1, self.AT_ONCE // self.alphabet)
        parts = [np.empty((0, self.alphabet))]
        for begin in range(first, len(text), rows):
            reach = max(0, begin + 1 - max(1, self.order - 1))      # nothing before it matters
            part = text[reach:begin + rows]
            parts.append(self.predict_part(part, begin - reach))
        return np.concatenate(parts)

    def predict_part(self, text: np.ndarray, first: int) -> np.ndarray:
        symbols = np.arange(self.alphabet)
        ends = np.arange(first, len(text))
        p = np.full((len(ends), self.alphabet), 1 / self.alphabet)
        following = np.zeros(p.shape, np.int64)             # the n-gram that each symbol would end
        numbers = np.zeros(len(text), np.int64)             # the n-gram that ends at each place
        contexts = np.zeros(len(ends), np.int64)
        for length, (keys, smoothed) in enumerate(self.orders, 1):
            if length == 1:
                following = number_of(keys, following, symbols, self.alphabet)
            else:
                # Where that n-gram begins. Before the text there is no such context either.
                begins = np.maximum(ends - length + 2, 0)
                firsts = text[begins]
                following = number_of(keys, following, firsts[:, None], self.alphabet)
            p = interpolate(p.ravel(), smoothed, following.ravel(), np.repeat(contexts, self.alphabet)).reshape(p.shape)
            numbers = find_ngrams(keys, text, numbers, length, self.alphabet)
            contexts = numbers[ends].astype(np.int64)
        return p
