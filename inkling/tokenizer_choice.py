"""Which tokenizer serves a text best: what --tokenizer=auto takes, and what is said to those who gave none.

Measured at equal training time, in bits per byte (bench/RESULTS.md, "The plan"): a byte-pair encoding is worth its
larger vocabulary on alphabetic texts of megabytes. A shorter text, and one in Chinese, Japanese or Korean, whose
characters say much each, is learned better a character at a time.
"""

import numpy as np

BPE = "bpe:4096"
BPE_FROM = 2_000_000                    # bytes of an alphabetic text
MANY_CHARACTERS = 8_000                 # different ones are a vocabulary of mostly rare tokens
SYLLABIC = 0.3                          # share of words and syllables among the characters, in a text of such
# Kana; Chinese characters; Korean syllables; Chinese characters beyond 16 bits.
WORDS_AND_SYLLABLES = ((0x3040, 0x3100), (0x3400, 0xA000), (0xAC00, 0xD7A4), (0x20000, 0x32000))


def bytes_of(counts: np.ndarray) -> int:
    """The length in UTF-8 of a text, by how often each code point occurs in it."""
    lengths = np.ones(counts.size, np.int64)
    for first_of_longer in (0x80, 0x800, 0x10000):
        lengths[first_of_longer:] += 1
    return int(lengths @ counts)


def best_tokenizer(counts: np.ndarray) -> tuple:
    """(the name of the tokenizer that serves a text best, why). counts: of each code point of the text."""
    characters = max(1, int(counts.sum()))
    size = bytes_of(counts)
    distinct = np.count_nonzero(counts)
    if distinct > MANY_CHARACTERS:
        return BPE, f"its {distinct:,} different characters are mostly rare"
    if sum(int(counts[first:last].sum()) for first, last in WORDS_AND_SYLLABLES) > SYLLABIC * characters:
        return "char", "its characters are words or syllables already"
    if size < BPE_FROM:
        return "char", f"a text of less than {BPE_FROM // 10**6} MB is learned best a character at a time"
    return BPE, f"in {size / 1e6:.0f} MB, parts of words are seen often enough to be learned"


def choose_tokenizer(counts: np.ndarray) -> tuple:
    """The same for what is installed: without rustbpe, which trains a BPE, another one, and the reason says so."""
    name, reason = best_tokenizer(counts)
    if name != BPE:
        return name, reason
    try:
        import rustbpe  # noqa: F401, optional
    except ImportError:
        instead = "byte" if np.count_nonzero(counts) > MANY_CHARACTERS else "char"
        return instead, f"{BPE} would serve it better ({reason}), but needs a package: pip install rustbpe"
    return name, reason
