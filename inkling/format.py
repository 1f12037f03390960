"""Numbers, durations and tables as text."""

import shutil
import sys


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 1000 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """12345678 bytes as 12.3 MB."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def columns() -> int:
    """The width of the terminal; none, when the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def fitted(parts: dict, room: int) -> str:
    """The parts as one line of at most `room` columns: what matters least is left out first."""
    for name in ("", "norm", "lr", "mfu", "ms", "rate", "bits", "left", "train"):
        parts = {key: part for key, part in parts.items() if key != name and part}
        if len(line := " | ".join(parts.values())) <= room:
            break
    return line


def aligned(rows: list) -> list:
    """Rows of texts as lines, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
