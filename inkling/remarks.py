"""What reading texts left out, replaced or noticed: counted during each read, and reported once."""

import codecs
import re
from collections import Counter
from pathlib import PurePath

from inkling.cli import UserError
from inkling.format import counted

SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


class Remarks:
    """errors: "strict", which refuses what cannot be read; "skip", which leaves it out; or
    "replace", which puts U+FFFD for bytes and half surrogates that are no characters, and leaves
    out rows."""

    def __init__(self, errors: str = "strict"):
        self.errors = errors
        self.decoding = "strict"        # the handler of a decoder's errors
        if errors != "strict":
            self.decoding = f"inkling-{id(self)}"
            codecs.register_error(self.decoding, self._replace)
        self.clear()

    def clear(self):
        """A new reading begins."""
        self.rows = 0                   # left out
        self.first_row = ""             # what was wrong with the first
        self.characters = 0             # left out or replaced
        self.members = Counter()        # of archives, passed over
        self.quoted = Counter()         # fields of a .tsv in quotes
        self.seen = {}                  # (what a text is, what of it is no prose): files

    def refuse_row(self, message: str, way_out: str = ""):
        """A row that cannot be read: raises UserError, or counts it."""
        if self.errors == "strict":
            raise UserError(f"{message}{way_out}; --errors=skip leaves such rows out")
        self.first_row = self.first_row or message
        self.rows += 1

    def whole(self, text: str, where: str) -> str:
        """A text without half surrogate pairs ("\\ud800" in JSON)."""
        match = SURROGATES.search(text)
        if not match:
            return text
        if self.errors == "strict":
            raise UserError(f"{where} holds {match[0]!r}, half of a surrogate pair, which is not a character; "
                            "--errors=replace puts U+FFFD instead")
        text, count = SURROGATES.subn(REPLACEMENT if self.errors == "replace" else "", text)
        self.characters += count
        return text

    def _replace(self, error: UnicodeError) -> tuple:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.characters += 1
        return (REPLACEMENT if self.errors == "replace" else ""), error.end

    def pass_over(self, archive: str, members: int):
        self.members[archive] = members

    def notice(self, file: str, what: str, aside: str):
        self.seen.setdefault((what, aside), {})[file] = None

    def lines(self) -> list:
        """What there is to say, a sentence each."""
        said = []
        for (what, aside), files in self.seen.items():
            said.append(f"{name_some(list(files))}: {what}; {aside}")
        for table, count in self.quoted.items():
            said.append(f"{table}: {counted(count, 'field')} in quotes, which a .tsv keeps as text "
                        r'(--format=csv --delimiter="\t" takes them off)')
        for archive, count in self.members.items():
            said.append(f"{archive}: {counted(count, 'member')} passed over; --suffix= selects others")
        if self.rows:
            said.append(f"{counted(self.rows, 'row')} left out that cannot be read; the first: {self.first_row}")
        if self.characters:
            done = "replaced by U+FFFD" if self.errors == "replace" else "left out"
            said.append(f"{counted(self.characters, 'place')} without a valid character {done}")
        return said


def name_some(files: list) -> str:
    """a.html, b.html and 98 more."""
    names = [PurePath(file).name for file in files] if len(files) > 1 else files
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return ", ".join(names[:3]) + more
