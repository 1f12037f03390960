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
    numbers = np.zeros(len(train), np.int32)                # of the n-gram that ends at each place
    val_numbers = np.zeros(len(val), np.int32)
    val_contexts = np.zeros(len(val), np.int64)
    below = None                                            # the Order one shorter
    for length in range(1, min(order, len(train)) + 1):
        present, numbers = lengthen(train, numbers, length, alphabet)
        if below:
            below.counts = np.bincount(present.keys // alphabet, minlength=len(below.keys))
            p = interpolate(p, below, val_numbers, val_contexts)
        if length > 1:
            val_contexts = np.concatenate([[NONE], val_numbers[:-1]])
        val_numbers = find_ngrams(present, val, val_numbers, length, alphabet)
        below = present
    return -np.log(interpolate(p, below, val_numbers, val_contexts))


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


def find_ngrams(present: Order, symbols: np.ndarray, numbers: np.ndarray, length: int, alphabet: int) -> np.ndarray:
    """(n,) the number of the n-gram that ends at each place, NONE where the training text lacks it."""
    found = np.full(len(symbols), NONE, np.int32)
    shorter = numbers[length - 1:].astype(np.int64)
    keys = shorter * alphabet + symbols[:len(shorter)]
    places = np.minimum(np.searchsorted(present.keys, keys), len(present.keys) - 1)
    known = (shorter != NONE) & (present.keys[places] == keys)
    found[length - 1:] = np.where(known, places, NONE)
    return found


def interpolate(p: np.ndarray, order: Order, numbers: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """(n,) probabilities by one order and all shorter ones, whose probabilities are `p`. numbers,
    contexts: (n,) of the n-grams at each place, and of their contexts; NONE where not known."""
    discounts = estimate_discounts(order.counts)[np.minimum(order.counts, 3)]       # (n-grams,)
    totals = np.bincount(order.contexts, order.counts)                              # (contexts,)
    withheld = np.bincount(order.contexts, discounts)
    discounted = np.append(order.counts - discounts, 0.0)                           # the last one is NONE's
    contexts = np.where(contexts < len(totals), contexts, NONE)
    applies = np.append(totals > 0, False)[contexts]
    contexts = contexts[applies]
    interpolated = p.copy()
    interpolated[applies] = (discounted[numbers[applies]] + withheld[contexts] * p[applies]) / totals[contexts]
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
