"""A file's content in blocks of bytes: decompressed, and member by member for archives."""

import bz2
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

from inkling.cli import UserError
from inkling.download import BLOCK
from inkling.format import shell_word
from inkling.progress import Progress
from inkling.sniff import HEAD, ZIP_FORMS, Form, is_tar, is_zip, packed_form

# The forms that are unpacked, by their suffix.
PACKED = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}


STEPS = {"gzip": 1 << 14}  # bytes unpacked at a time: gzip's may hold a thousand times their size, others' more


class Metered(io.FileIO):
    """A file that tells `progress` what is read from it."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.progress.advance(count or 0)
        return count


@dataclass
class Part:
    """A file, or a member of an archive."""

    name: str                           # as a message calls it: a.txt; a.zip/b.txt
    blocks: Iterator[bytes]             # its content
    head: bytes = b""                   # the beginning of its content
    is_packed: bool = False             # offsets in messages count unpacked bytes
    path: Path | None = None            # of a file that is what it holds: neither packed nor a member

    def refuse(self, form: Form):
        raise UserError(f"{self.name} is {form.name}, not text: {form.way_out.replace('FILE', shell_word(self.name))}")


def suffixes_of(name: str) -> list:
    """The suffixes of a file's name in lower case, those of packing aside."""
    return [suffix.lower() for suffix in PurePath(name).suffixes if suffix.lower() not in PACKED]


def suffix_of(name: str) -> str:
    """The last of them; "" if there is none."""
    return (suffixes_of(name) or [""])[-1]


def open_part(name: str, blocks, path: Path | None = None) -> Part:
    """A part with its head known and its content unpacked."""
    expected = PACKED.get(PurePath(name).suffix.lower(), "")
    head, blocks = peek(blocks)
    form = packed_form(head)
    if expected and form != expected:
        raise UserError(f"{name} is damaged or not {expected}: it begins with {head[:12]!r}; if that is its text, "
                        "remove the last suffix of its name")
    if not form:
        return Part(name, blocks, head, path=path)
    head, blocks = peek(unpack(blocks, form, name))
    return Part(name, blocks, head, is_packed=True)


def peek(blocks) -> tuple:
    """(the first HEAD bytes, all blocks)"""
    blocks = iter(blocks)
    first = []
    size = 0
    for block in blocks:
        first.append(block)
        size += len(block)
        if size >= HEAD:
            break
    return b"".join(first)[:HEAD], chain(first, blocks)


def open_parts(path: Path, progress: Progress, wanted: tuple, remarks):
    """Yield the Parts of a file: itself, or the members of an archive that have one of the suffixes
    `wanted`. Raises UserError for what holds no text. remarks: is told of members passed over."""
    whole = open_part(str(path), read_file(path, progress), path)
    if is_zip(whole.head):
        members = zip_members(whole, progress, wanted, remarks)
    elif is_tar(whole.head):
        members = tar_members(whole, wanted, remarks)
    else:
        yield whole
        return
    yield from members


def read_file(path: Path, progress: Progress):
    """Yield a file in blocks of bytes."""
    try:
        with io.BufferedReader(Metered(path, progress), BLOCK) as raw:
            while block := raw.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")


def spooled(part: Part):
    """A temporary file with a part's content, for what is read from its end. The caller closes
    it."""
    file = tempfile.TemporaryFile()     # noqa: SIM115
    for block in part.blocks:
        file.write(block)
    file.seek(0)
    return file


# -- compressed files ------------------------------------------------------------------------------

def zstd_decompressor(name: str):
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name} needs zstandard to be unpacked: pip install zstandard")
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()


def decompressor(form: str, name: str):
    """A new decompressor of a form, which reads one of the frames that a file may have."""
    if form == "gzip":
        return zlib.decompressobj(wbits=31)
    if form == "bzip2":
        return bz2.BZ2Decompressor()
    if form == "xz":
        return lzma.LZMADecompressor(memlimit=1 << 28)
    return zstd_decompressor(name)


def decompression_errors(form: str) -> tuple:
    errors = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if form == "zstd":
        import zstandard

        errors += (zstandard.ZstdError,)
    return errors


def unpack(blocks, form: str, name: str):
    """Yield the content of a compressed file, which consists of one frame or several."""
    frame = decompressor(form, name)
    errors = decompression_errors(form)
    is_open = False                                     # a frame has begun and not ended
    step = STEPS.get(form, 4096)
    for block in blocks:
        for start in range(0, len(block), step):
            rest = block[start:start + step]
            while rest:
                if not is_open:
                    rest = rest.lstrip(b"\0")           # padding
                    if not rest:
                        break
                    is_open = True
                try:
                    content = frame.decompress(rest)
                except errors as error:
                    raise UserError(f"{name} is damaged: as {form}, it cannot be unpacked ({error})")
                if content:
                    yield content
                rest = b""
                if frame.eof:
                    rest = frame.unused_data
                    frame = decompressor(form, name)
                    is_open = False
    if is_open:
        raise UserError(f"{name} is damaged: it ends too early")


# -- archives --------------------------------------------------------------------------------------

def is_wanted(member: str, wanted: tuple) -> bool:
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in PurePath(member).parts)
    return not is_hidden and suffix_of(member) in wanted


def zip_members(archive: Part, progress: Progress, wanted: tuple, remarks):
    """Yield the members of a zip archive. An Office file or a book, which is one too, is
    refused."""
    if archive.path is None:
        raise UserError(f"{archive.name} holds a zip archive inside another form: unpack it first")
    try:
        with Metered(archive.path, progress) as raw, zipfile.ZipFile(raw) as file:
            names = [info.filename for info in file.infolist() if not info.is_dir()]
            for name, form in ZIP_FORMS.items():
                if name in names:
                    archive.refuse(form)
            chosen = choose_members(archive.name, names, wanted, remarks)
            for name in chosen:
                with file.open(name) as member:
                    yield open_part(f"{archive.name}/{name}", iter(lambda m=member: m.read(BLOCK), b""))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{archive.name} is a damaged zip archive ({error})")
    except (RuntimeError, NotImplementedError) as error:     # a password, an unknown compression
        raise UserError(f"{archive.name} cannot be unpacked ({error}): unpack it first")
    except OSError as error:
        raise UserError(f"cannot read {archive.name}: {error.strerror or error}")


def choose_members(archive: str, names: list, wanted: tuple, remarks) -> list:
    chosen = [name for name in names if is_wanted(name, wanted)]
    if not chosen:
        suffixes = sorted({suffix_of(name) or "no suffix" for name in names})
        raise UserError(f"{archive} is an archive without text files ({', '.join(suffixes)[:100] or 'it is empty'}; "
                        "--suffix=.py,.html selects others)")
    if len(names) > len(chosen):
        remarks.pass_over(archive, len(names) - len(chosen))
    return chosen


class BlockFile(io.RawIOBase):
    """An iterator of blocks as a file that can only be read forwards."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self.rest:
            self.rest = next(self.blocks, b"")
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


def tar_members(archive: Part, wanted: tuple, remarks):
    """Yield the members of a tar archive, in its order."""
    taken = 0
    names = []
    try:
        with tarfile.open(fileobj=io.BufferedReader(BlockFile(archive.blocks)), mode="r|") as file:
            for member in file:
                if member.isdir():
                    continue
                names.append(member.name)
                if member.isfile() and is_wanted(member.name, wanted):
                    taken += 1
                    content = file.extractfile(member)
                    yield open_part(f"{archive.name}/{member.name}", iter(lambda c=content: c.read(BLOCK), b""))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{archive.name} is a damaged tar archive ({error})")
    if not taken:
        choose_members(archive.name, names, (), remarks)
    elif len(names) > taken:
        remarks.pass_over(archive.name, len(names) - taken)
