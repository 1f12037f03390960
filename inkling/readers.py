"""Text out of files, folders, tables and archives."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import zlib
from itertools import chain
from pathlib import Path

from inkling.cli import UserError
from inkling.download import BLOCK
from inkling.files import Progress

PIECE = 1 << 20                         # characters handed on at a time, at most
RECORD = 1 << 25                        # characters of one row or JSON value, which is held whole, at most
KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")      # what a folder is searched for, and KINDS
PACKED = (".gz", ".zst")


class Metered(io.FileIO):
    """A file that tells `progress` what is read from it."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.progress.advance(count or 0)
        return count


def kind_of(path: Path, options) -> str:
    """text, csv, tsv, json, jsonl or parquet: what `format` says, or else the suffix (before .gz and .zst)."""
    if options.format != "auto":
        return options.format
    kind = KINDS.get(_suffix(path), "text")
    return "text" if kind in ("csv", "tsv") and not options.text_column else kind      # a table, read as it is


def plain_name(word: str) -> str:
    """book of texts/book.txt.gz: a name for a set."""
    path = Path(word)
    while path.suffix.lower() in (*PACKED, *PLAIN, *KINDS):
        path = path.with_suffix("")
    return path.name if path.suffix else path.stem


def _suffix(path: Path) -> str:
    parts = [part.lower() for part in path.suffixes]
    return ([""] + [part for part in parts if part not in PACKED])[-1]


def expand(words: list, options) -> list:
    """The files that the words name, in a stable order: a folder means the files under it with a known suffix, sorted
    by name; a glob what it matches. Each file once."""
    wanted = tuple("." + part.strip().lstrip(".").lower() for part in options.suffix.split(",") if part.strip())
    files = []
    for word in words:
        if os.path.isdir(word):
            below = sorted(path for path in Path(word).rglob("*") if path.is_file()
                           and not any(part.startswith(".") for part in path.relative_to(word).parts))
            taken = [path for path in below if _suffix(path) in (wanted or (*PLAIN, *KINDS))]
            others = sorted({_suffix(path) or "no suffix" for path in below} - {_suffix(path) for path in taken})
            if not taken:
                raise UserError(f"{word} is a folder without text files" + (f" ({', '.join(others)} only; --suffix=.py,.html "
                                                                 "names what to take)" if others else ""))
            if others:
                print(f"note     {word}: {len(below) - len(taken):,} files passed over ({', '.join(others[:8])}); "
                      "--suffix= names what to take")
            files += taken
        elif os.path.exists(word):
            files.append(Path(word))
        elif glob.has_magic(word) and (found := sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))):
            files += map(Path, found)
        else:
            raise UserError(f"no file {word}")
    once = {}
    for path in files:
        if once.setdefault(path.resolve(), path) is not path:
            print(f"note     {path} is named twice and read once")
    return list(once.values())


def spool(folder: Path) -> Path:
    """Standard input as a file in `folder`, since a text is read more than once. The caller removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, progress = folder / "stdin.tmp", Progress("reading standard input")
    try:
        with open(path, "wb") as file:
            while block := sys.stdin.buffer.read(BLOCK):
                file.write(block)
                progress.advance(len(block))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    progress.end()
    return path


def describe_source(path: Path, limit: int) -> dict:
    """The file's name, size and SHA-256 (of its first `limit` bytes, when there is a limit)."""
    digest, left = hashlib.sha256(), limit or sys.maxsize
    try:
        size = path.stat().st_size
        progress = Progress("checksum of", min(size, left))
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(BLOCK, left))):
                digest.update(block)
                left -= len(block)
                progress.advance(len(block))
        progress.end()
        return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")
# Every pattern that tiktoken's encodings use ends a token after a word that white space or one of these marks follows,
# whatever stands farther left or right. (An apostrophe is missing: it may belong to the word.)
MARKS = " \n\t\r.,;:!?()\"“”、。，；：！？「」"
WORD_END = re.compile(rf"[^\W\d_](?=[{MARKS}])")


def border(text: str, start: int, most: int) -> int:
    """Where to end a piece of `text` that begins at `start` and has at most `most` characters: the last end of a word,
    where tokens surely end as well; if there is none, after `most`, where tokens may differ from the whole text's."""
    end = start + most
    for first in (max(start, end - 100), start):        # nearly always there is one close to the end
        if found := [match.end() for match in WORD_END.finditer(text, first, end)]:
            return found[-1]
        if not any(text.find(mark, start, end) >= 0 for mark in MARKS):     # one long run: no need to search it
            break
    return end


def pieces(text: str, most: int):
    """`text` in pieces of at most `most` characters, cut at the ends of words."""
    start = 0
    while len(text) - start > most:
        end = border(text, start, most)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def unpacked(path: Path, progress: Progress):
    """The file's content in blocks of bytes, decompressed."""
    packed = path.suffix.lower()
    try:
        with io.BufferedReader(Metered(path, progress), BLOCK) as raw:
            if packed == ".zst":
                yield from _zstd(raw, path)
                return
            file = gzip.GzipFile(fileobj=raw) if packed == ".gz" else raw
            while block := file.read(BLOCK):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or no {packed} file ({error})")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")


def _zstd(raw, path: Path):
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs zstandard to unpack it: pip install zstandard")
    try:
        frame = None
        while block := raw.read(4096):                  # small: a block may hold thirty thousand times its size
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
                if content := frame.decompress(block):
                    yield content
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged or no .zst file ({error})")
    if frame:
        raise UserError(f"{path} is damaged: it ends too early")


def decoded(blocks, path: Path, encoding: str):
    """Blocks of bytes as blocks of text, exactly (line endings too) but for a byte order mark."""
    decoder, fed, first = codecs.getincrementaldecoder(encoding)(), 0, True
    for block in chain(blocks, [b""]):                  # a decoder must hear that nothing follows
        kept = len(decoder.getstate()[0])               # bytes of a character that the last block began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at, byte = fed - kept + error.start, error.object[error.start]
            name = codecs.lookup(encoding).name.upper()
            raise UserError(f"{path} is not {name} text: byte {byte:#04x} at offset {at:,}"
                 + (" of its unpacked content" if path.suffix.lower() in PACKED else "")
                 + "; name its encoding (--encoding=utf-16, gb18030, latin-1 ...)")
        fed += len(block)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def lines(blocks, path: Path):
    """Blocks of text as lines, with their ends."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n")
        for line in whole:
            yield line + "\n"
        if len(rest) > RECORD:
            raise UserError(f"{path} has a line of more than {RECORD:,} characters; --format=text reads it as plain text")
    if rest:
        yield rest


def plain(blocks, separator: str):
    """A plain file: one document, or those between the separators, without the white space around them."""
    text, new, cut_off = "", True, (lambda part, _: part)
    if separator:
        def cut_off(part, begins):
            return part.lstrip() if begins else part
    for block in blocks:
        text += block
        if separator:
            *whole, text = text.split(separator)
            for document in whole:
                yield new, cut_off(document, new).rstrip()
                new = True
        while len(text) > 2 * PIECE:                    # a separator that has only begun to appear stays uncut
            end = border(text, 0, PIECE)
            yield new, cut_off(text[:end], new)
            text, new = text[end:], False
    if text.strip() or not separator:
        yield new, cut_off(text, new).rstrip() if separator else text


def table(blocks, path: Path, column: str, delimiter: str):
    """A row, a document: the field under `column`."""
    csv.field_size_limit(RECORD)                        # an unclosed quote would swallow the rest of the file
    rows = csv.reader(lines(blocks, path), delimiter=delimiter)
    try:
        names = next(rows, [])
        if column not in names:
            raise UserError(f"{path} has no column {column!r}; its first line names {', '.join(names)[:300]}")
        at = names.index(column)
        for row in rows:
            if row and len(row) <= at:
                raise UserError(f"{path}, line {rows.line_num:,}: {len(row)} fields, {column} is number {at + 1}")
            if row:
                yield True, row[at]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num:,}: {error}")
OPENING = re.compile(r"\s*\[?\s*")
BETWEEN = re.compile(r"[\s,]*")


def json_lines(blocks, path: Path, column: str):
    """A line, a document: a JSON text, or an object's field `column`."""
    for number, line in enumerate(lines(blocks, path), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number:,} is no JSON: {error}")
            yield True, _field(value, f"{path}, line {number:,}", column)


def json_values(blocks, path: Path, column: str):
    """JSON values, one document each, one after another or in one list; the list is never held whole."""
    decoder, text, at, number, want = json.JSONDecoder(), "", 0, 0, 0
    for block in chain(blocks, [""]):
        text, at = text[at:] + block, 0
        while len(text) >= want or not block:
            at = BETWEEN.match(text, at).end() if number else OPENING.match(text).end()
            if at == len(text) or text[at] == "]":
                if text[at + 1:].strip():
                    raise UserError(f"{path}: more follows the end of the list; a value a line is --format=jsonl")
                break
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not block or len(text) > RECORD or isinstance(error, RecursionError):
                    raise UserError(f"{path}: value {number + 1:,} is no JSON, or longer than {RECORD:,} characters ({error})")
                want = 2 * (len(text) - at)             # not whole yet; trying again at every block would take long
                break
            number, want = number + 1, 0
            yield True, _field(value, f"{path}, value {number:,}", column)


def _field(value, where: str, column: str) -> str:
    column = column or "text"
    if isinstance(value, dict):
        if column not in value:
            raise UserError(f"{where} has no {column!r}; it has {', '.join(map(str, value))[:300]} (--text_column=)")
        value = value[column]
    if value is None:                                   # a document without a text
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} is {type(value).__name__}, not text")
    return value


def parquet(path: Path, progress: Progress, column: str):
    """A row, a document: the column `column`, read a few hundred rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow to read it: pip install pyarrow")
    column = column or "text"
    packed = path.suffix.lower() in PACKED
    try:
        with (tempfile.TemporaryFile() if packed else io.BufferedReader(Metered(path, progress), BLOCK)) as raw:
            for block in unpacked(path, progress) if packed else ():    # its end must be read before its beginning
                raw.write(block)
            file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False)
            if column not in file.schema_arrow.names:
                raise UserError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)[:300]} "
                     "(--text_column=)")
            for number, batch in enumerate(file.iter_batches(256, columns=[column], use_threads=False)):
                for row, value in enumerate(batch.column(0).to_pylist(), 256 * number + 1):
                    yield True, _field(value, f"{path}, row {row:,}", column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}")


def documents(path: Path, options, progress: Progress):
    """(whether a document begins, a piece of at most PIECE characters) of one file."""
    kind = kind_of(path, options)
    if options.separator and kind != "text":
        raise UserError(f"--separator splits plain text, {path} is read as {kind}: leave it out, or give --format=text")
    if options.text_column and kind == "text":
        raise UserError(f"--text_column={options.text_column} needs a table or JSON, {path} is read as plain text: leave it out, "
             "or give --format=")
    if kind == "parquet":
        found = parquet(path, progress, options.text_column)
    else:
        text = decoded(unpacked(path, progress), path, options.encoding)
        found = (plain(text, options.separator) if kind == "text" else
                 json_lines(text, path, options.text_column) if kind == "jsonl" else
                 json_values(text, path, options.text_column) if kind == "json" else
                 table(text, path, options.text_column or "text", "\t" if kind == "tsv" else ","))
    for new, text in found:
        for piece in pieces(text, PIECE) if len(text) > PIECE else (text,):
            yield new, piece
            new = False


class Reader:
    """The documents of several files, in order, up to `limit` bytes of text in all. Iterating yields
    (the document's number, whether it begins here, a piece of it, the piece in UTF-8); empty ones are passed over and
    counted in `empty`."""

    def __init__(self, paths: list, options, what: str = "reading"):
        self.paths, self.options, self.what, self.empty = paths, options, what, 0

    def __iter__(self):
        left, number, begun, self.empty = self.options.limit or sys.maxsize, -1, True, 0
        progress = Progress(self.what, min(left, sum(path.stat().st_size for path in self.paths)))
        for path in self.paths:
            for new, piece in documents(path, self.options, progress):
                if new:
                    self.empty += not begun
                    begun = False
                if not piece:
                    continue
                try:
                    raw = piece.encode("utf-8")
                except UnicodeEncodeError as error:     # "\ud800" in JSON
                    raise UserError(f"{path}: document {number + 2 - begun:,} holds {piece[error.start]!r}, half of a surrogate "
                         "pair, which is no character")
                if len(raw) > left:
                    piece = raw[:left].decode("utf-8", "ignore")        # a character that does not fit is left out
                    raw = piece.encode("utf-8")
                    left = 0
                left -= len(raw)
                number += not begun
                if piece:
                    yield number, not begun, piece, raw
                begun = True
                if left <= 0:
                    progress.end()
                    return
        self.empty += not begun
        progress.end()
