"""Which tokenizer serves a text best: what --tokenizer=auto takes, and what is said to those who gave none.

Measured at equal training time, in bits per byte (bench/RESULTS.md, "Tokenizers"): a byte-pair encoding is worth its
larger vocabulary on alphabetic texts of megabytes; a shorter text, and one of ideographs, which are short already, is
read better a character at a time.
"""

import numpy as np

BPE = "bpe:4096"
BPE_FROM = 2_000_000                    # bytes of an alphabetic text
IDEOGRAPHIC = 2.0                       # bytes per character in UTF-8: above it, most characters are words or syllables
MANY_CHARACTERS = 8_000                 # different ones are a vocabulary of mostly rare tokens


def bytes_of(counts: np.ndarray) -> int:
    """The length in UTF-8 of a text, by how often each code point occurs in it."""
    lengths = np.ones(counts.size, np.int64)
    for first_of_longer in (0x80, 0x800, 0x10000):
        lengths[first_of_longer:] += 1
    return int(lengths @ counts)


def choose_tokenizer(counts: np.ndarray) -> tuple:
    """(the name of the tokenizer for a text, why). counts: of each code point of the text."""
    characters = max(1, int(counts.sum()))
    size = bytes_of(counts)
    distinct = np.count_nonzero(counts)
    if distinct > MANY_CHARACTERS:
        wanted = BPE, f"its {distinct:,} different characters are mostly rare"
    elif size / characters > IDEOGRAPHIC:
        return "char", f"at {size / characters:.1f} bytes, its characters are long tokens already"
    elif size < BPE_FROM:
        return "char", f"a text of less than {BPE_FROM // 10**6} MB is learned best a character at a time"
    else:
        wanted = BPE, f"in {size / 1e6:.0f} MB, parts of words are seen often enough to be learned"
    try:
        import rustbpe  # noqa: F401, only to train it: optional
    except ImportError:
        pass
    else:
        return wanted
    instead = "byte" if distinct > MANY_CHARACTERS else "char"
    return instead, f"{BPE} would serve it better ({wanted[1]}), but needs a package: pip install rustbpe"
