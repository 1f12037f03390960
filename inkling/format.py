"""Numbers, durations, lines and tables as text."""

import os
import re
import shlex
import shutil
import sys

LEAST_IMPORTANT_FIRST = ("norm", "lr", "mfu", "ms", "rate", "anchors", "bits", "left", "train")


def duration(seconds: float) -> str:
    """3723 seconds as 1h02m."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m{seconds:02}s"
    return f"{seconds}s"


def brief_seconds(seconds: float) -> str:
    """0.21 s, 6.2 s, 10m30s."""
    return f"{seconds:.2g} s" if seconds < 99 else duration(seconds)


def rough_duration(seconds: float) -> str:
    """64800 seconds as 18 hours: one unit, for an estimate."""
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}s"
    return counted(max(1, round(seconds)), "second")


def milliseconds(seconds: float) -> str:
    """0.0123 seconds as 12.3; no decimals from 100 ms on."""
    if seconds < 0.1:
        return f"{1000 * seconds:,.1f}"
    return f"{1000 * seconds:,.0f}"


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 999.5 * unit:
            return f"{number / unit:.0f}{letter}"
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """12345678 bytes as 12.3 MB."""
    if number >= 1e9:
        return f"{number / 1e9:,.2f} GB"
    return f"{number / 1e6:,.1f} MB"


def counted(number: int, noun: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shell_word(word) -> str:
    """A word as it can be pasted into a shell: quoted where it must be; bytes that are not UTF-8 and
    control characters in the form that bash reads."""
    word = str(word)
    if word.isprintable():
        return shlex.quote(word)

    def spelled(match) -> str:
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(match[0]))
    inside = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + re.sub(r"[^ -~\u00a0-\ud7ff\ue000-\U0010ffff]", spelled, inside) + "'"


def terminal_width() -> int:
    """The columns of the terminal; without limit when the output goes elsewhere."""
    if not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def fit_line(parts: dict, width: int) -> str:
    """The parts, {name: text}, as one line of at most `width` columns: the least important ones are
    dropped."""
    parts = {name: text for name, text in parts.items() if text}
    for name in LEAST_IMPORTANT_FIRST:
        if len(" | ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return " | ".join(parts.values())


def align_columns(rows: list) -> list:
    """Rows of texts as lines: the first column flush left, the others flush right."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines
