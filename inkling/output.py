"""Standard output of a program, in UTF-8, and what happens when it goes away: a pipe that nobody
reads, a full disk, a closed terminal, or none from the start.

A program whose product is its output, such as sample.py, ends there: with the code of SIGPIPE if
nobody is reading any more, otherwise with a line on stderr and 1. One that makes something else,
such as train.py, calls `outlive_output` and continues without.
"""

import errno
import io
import os
import select
import sys

NOBODY_READS = 128 + 13                 # what a shell expects of a program that SIGPIPE has ended
CANNOT_WRITE = 1


class Output(io.RawIOBase):
    """What a text stream writes to. No error of the file or pipe below ever reaches the caller as
    an OSError, which it would take for one of its own files."""

    def __init__(self, stream, name: str, needed: bool):
        self.stream = stream            # Python's own, which must live as long; None: there is none
        self.name = name                # of the program
        self.needed = needed            # the program ends without it
        self.is_lost = False            # a write has failed

    @property
    def raw(self):
        """What is below the stream's buffer; python -u has no buffer between."""
        return getattr(self.stream.buffer, "raw", self.stream.buffer)

    def write(self, data) -> int:
        try:
            return self.write_some(data)
        except OSError as error:        # next time there may be room on the disk
            was_lost = self.is_lost
            self.is_lost = True
            if not was_lost:            # later ones are what is left in the buffer
                self.lose(error)
            return len(data)

    def write_some(self, data) -> int:
        if self.stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while (count := self.raw.write(data)) is None:
            select.select([], [self.raw], [])   # another program has made the pipe non-blocking
        return count

    def lose(self, error: OSError):
        """The first write has failed."""
        reason = error.strerror or error
        if not self.needed:
            print(f"{self.name}: its output is lost ({reason}); it continues without", file=sys.stderr, flush=True)
        elif isinstance(error, BrokenPipeError):
            raise SystemExit(NOBODY_READS)
        else:
            print(f"{self.name}: cannot write its output: {reason}", file=sys.stderr, flush=True)
            raise SystemExit(CANNOT_WRITE)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return super().fileno() if self.stream is None else self.raw.fileno()

    def isatty(self) -> bool:
        return self.stream is not None and self.raw.isatty()


class Messages(Output):
    """The same for stderr: what cannot be said there is not said."""

    def lose(self, error: OSError):
        pass


def open_streams(name: str):
    """Make stdout and stderr of the program `name` safe. Call it once, before anything is
    printed."""
    fill_closed_descriptors()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")      # noqa: SIM115, open to the end
    sys.stderr = text_stream(sys.stderr, Messages, name, needed=False)
    sys.stdout = text_stream(sys.stdout, Output, name, needed=True)


def fill_closed_descriptors():
    """Open the null device as each of the descriptors 0, 1 and 2 that is closed: otherwise the next
    file that is opened would be one of them, and what a library prints would end up in it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def text_stream(stream, kind: type, name: str, needed: bool):
    """A text stream in UTF-8 to where `stream`, of Python's own making, writes."""
    buffer = io.BufferedWriter(kind(stream, name, needed))
    line_buffering = stream is not None and stream.line_buffering
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="replace", line_buffering=line_buffering)


def outlive_output():
    """From now on the program continues if its output goes away. It does nothing to a stdout that
    `open_streams` did not make, as in a notebook."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Output):
        raw.needed = False
