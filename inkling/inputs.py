"""Which files the inputs name: files, folders, globs; a source that can be read only once is copied
to a file."""

import glob
import hashlib
import os
import re
import stat
import sys
from pathlib import Path

from inkling.archives import PACKED, suffix_of
from inkling.cli import UserError
from inkling.dataset import is_part_of_set
from inkling.download import BLOCK
from inkling.files import HOLDER, LOCK
from inkling.format import counted
from inkling.hints import files_near, there_is
from inkling.progress import Progress

KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
         ".parquet": "parquet"}
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
KNOWN = (*PLAIN, *KINDS)                # what a folder is searched for
ARCHIVES = (".zip", ".tar")             # read when they are named, or --suffix asks for them


def plain_name(word: str) -> str:
    """book for texts/book.txt.gz: a name for a set."""
    path = Path(word)
    while path.suffix.lower() in (*PACKED, *KNOWN, *ARCHIVES):
        path = path.with_suffix("")
    return path.name


def expand(words: list, options) -> list:
    """The files that the words name, in a stable order: a folder stands for the files below it with
    a known suffix, sorted by name, a glob for what it matches. Each file occurs once, and those of
    a prepared set do not."""
    paths = []
    for word in words:
        paths += files_of(word, wanted_suffixes(options.suffix))
    own = [path for path in paths if is_part_of_set(path)]
    if own:
        print(f"note     {counted(len(own), 'file')} of a prepared set passed over ({own[0]} ...)")
    once = {}
    for path in paths:
        if path not in own and once.setdefault(path.resolve(), path) is not path:
            print(f"note     {path} is named twice and read once")
    if own and not once:
        raise UserError(f"{', '.join(words)}: no text in there, only the files of a prepared set")
    return list(once.values())


def wanted_suffixes(suffix: str) -> tuple:
    """(".py", ".c") for py,.c; () for an empty text."""
    parts = [part.strip().lstrip(".").lower() for part in suffix.split(",")]
    return tuple("." + part for part in parts if part)


def files_of(word: str, suffixes: tuple) -> list:
    """The files that a word names, which may be a folder, a file or a glob."""
    if os.path.isdir(word):
        return Folder(Path(word)).files(suffixes)
    if os.path.exists(word):
        return [Path(word)]
    if os.path.islink(word):
        raise UserError(f"{word} is a broken link: nothing is at {os.readlink(word)}")
    matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
    files = []
    for match in matches:
        if os.path.isfile(match):
            files.append(Path(match))
        elif os.path.isdir(match) and "**" not in word:         # which names the files below by itself
            files += Folder(Path(match)).files(suffixes)
        elif not os.path.exists(match):
            print(f"note     {match} is a broken link and passed over")
    if not files:
        raise UserError(f"no file {word}{there_is(word, files_near(word))}")
    return files


class Folder:
    """The files below a folder, through links too, and what is passed over."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found = []
        self.broken_links = []
        self.unreadable = []            # folders
        self.hidden = 0                 # files and folders whose names begin with a dot
        self.special = 0                # pipes, sockets and devices
        self.entered = set()            # folders, as the system knows them: a link may lead back up
        self.search(folder)

    def search(self, folder: Path):
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(folder)
                entries = sorted(os.listdir(folder))
            except OSError:
                self.unreadable.append(folder)
                continue
            if (status.st_dev, status.st_ino) in self.entered:
                continue
            self.entered.add((status.st_dev, status.st_ino))
            for name in entries:
                path = folder / name
                if name in (LOCK, HOLDER):
                    pass                                # of the set that is prepared, in its own folder
                elif name.startswith("."):
                    self.hidden += 1
                elif os.path.isdir(path):
                    waiting.append(path)
                elif os.path.isfile(path):
                    self.found.append(path)
                elif os.path.islink(path):
                    self.broken_links.append(path)
                elif not os.path.lexists(path):         # nothing may be known of what is in there
                    self.unreadable.append(path)
                else:
                    self.special += 1
        self.found.sort()

    def files(self, suffixes: tuple) -> list:
        """Those that have one of the suffixes, or any known one; what is passed over is said."""
        taken = [path for path in self.found if suffix_of(path.name) in (suffixes or KNOWN)]
        taken_suffixes = {suffix_of(path.name) for path in taken}
        others = sorted({suffix_of(path.name) or "no suffix" for path in self.found} - taken_suffixes)
        left_out = self.left_out(len(self.found) - len(taken), others)
        if not taken and others:
            raise UserError(f"{self.folder} is a folder without text files ({', '.join(others)} only; "
                            "--suffix=.py,.html selects others)")
        if not taken:
            raise UserError(f"{self.folder} is a folder without text files" + "".join(f"; {text}" for text in left_out))
        if left_out:
            print(f"note     {self.folder}: {counted(len(taken), 'file')} taken; passed over: {', '.join(left_out)}")
        return taken

    def left_out(self, others: int, suffixes: list) -> list:
        """What is passed over, with counts."""
        parts = []
        if others:
            parts.append(f"{counted(others, 'file')} ({', '.join(suffixes[:8])}; --suffix= selects others)")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden")
        if self.special:
            parts.append(f"{counted(self.special, 'pipe')} or other special file")
        if self.broken_links:
            parts.append(f"{counted(len(self.broken_links), 'broken link')} ({named(self.broken_links)})")
        if self.unreadable:
            parts.append(f"{counted(len(self.unreadable), 'folder')} that cannot be read ({named(self.unreadable)})")
        return parts


def named(paths: list) -> str:
    return ", ".join(map(str, paths[:3])) + (" ..." if len(paths) > 3 else "")


# -- what can be read only once --------------------------------------------------------------------

def is_stream(word: str) -> bool:
    """Whether the word names standard input, a pipe or a device, such as <(command) does."""
    if word == "-":
        return True
    try:
        mode = os.stat(word).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def spool(word: str, folder: Path) -> Path:
    """Standard input (-) or a pipe as a file in `folder`, since a text is read more than once. The
    caller removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stdin.tmp"
    if word != "-":
        key = hashlib.sha256(os.fsencode(word)).hexdigest()[:8]     # two may be called alike
        path = folder / f"pipe_{key}.tmp{''.join(re.findall(r'[.][A-Za-z0-9]+', Path(word).name))}"
    progress = Progress("reading standard input" if word == "-" else f"reading {word}")
    source = None
    try:
        source = sys.stdin.buffer if word == "-" else open(word, "rb")  # noqa: SIM115, closed below
        with open(path, "wb") as file:
            while block := source.read(BLOCK):
                file.write(block)
                progress.advance(len(block))
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and source is None:
            raise UserError(f"cannot read {word}: {error.strerror or error}")
        raise
    finally:
        progress.end()
        if source and word != "-":
            source.close()
    return path


def describe_source(path: Path, limit: int) -> dict:
    """The file's name, size and SHA-256 (of its first `limit` bytes, if there is a limit)."""
    digest = hashlib.sha256()
    remaining = limit or sys.maxsize
    try:
        size = path.stat().st_size
        progress = Progress("checksum of", min(size, remaining))
        with open(path, "rb") as file:
            while block := file.read(min(BLOCK, remaining)):
                digest.update(block)
                remaining -= len(block)
                progress.advance(len(block))
        progress.end()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}
