"""How far a long reading or download has come."""

import sys
import time

TERMINAL_SECONDS = 0.2                  # between two states of the line on a terminal
LOG_SECONDS = 30                        # between two lines in a log


class Progress:
    """Says on stderr how many of `total` bytes are done and how long the rest takes: on a terminal
    in one line that is redrawn, elsewhere in a line every half minute. What takes less than two
    seconds says nothing."""

    def __init__(self, what: str, total: int = 0):
        self.what = what
        self.total = total              # 0: not known
        self.done = 0
        self.shown = False              # a line stands on the terminal
        self.on_terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + (2 if self.on_terminal else LOG_SECONDS)

    def advance(self, count: int):
        """`count` more bytes are done."""
        self.done += count
        now = time.monotonic()
        if now < self.next:
            return
        line = self.line(now - self.start)
        if self.on_terminal:
            self.next = now + TERMINAL_SECONDS
            self.shown = True
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        else:
            self.next = now + LOG_SECONDS
            print(line, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        rate = self.done / seconds
        done = f"{self.done / 1e6:,.0f}"
        if not self.total:
            return f"{self.what} {done} MB, {rate / 1e6:,.1f} MB/s"
        line = f"{self.what} {done} of {self.total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
        if rate:
            line += f", {max(0, self.total - self.done) / rate:,.0f} s left"
        return line

    def end(self):
        """Clear the line."""
        if self.shown:
            self.shown = False
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
