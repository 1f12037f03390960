"""Text out of files, folders, tables, JSON, archives and standard input, a piece at a time."""

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
from inkling.progress import Progress

PIECE = 1 << 20                         # most characters handed on at a time
RECORD = 1 << 25  # most characters of one row or JSON value, which is held whole
KINDS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
         ".parquet": "parquet"}
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
KNOWN = (*PLAIN, *KINDS)                # what a folder is searched for
PACKED = (".gz", ".zst")


# -- which files -----------------------------------------------------------------------------------

def kind_of(path: Path, options) -> str:
    """text, csv, tsv, json, jsonl or parquet: what `format` says, or else the suffix (before .gz
    and .zst)."""
    if options.format != "auto":
        return options.format
    kind = KINDS.get(suffix_of(path), "text")
    if kind in ("csv", "tsv") and not options.text_column:
        return "text"                   # a table, read as it is
    return kind


def plain_name(word: str) -> str:
    """book for texts/book.txt.gz: a name for a set."""
    path = Path(word)
    while path.suffix.lower() in (*PACKED, *KNOWN):
        path = path.with_suffix("")
    return path.name


def suffix_of(path: Path) -> str:
    """The last suffix in lower case, .gz and .zst aside; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
    return suffixes[-1] if suffixes else ""


def expand(words: list, options) -> list:
    """The files that the words name, in a stable order: a folder stands for the files below it with
    a known suffix, sorted by name, a glob for what it matches. Each file occurs once."""
    paths = []
    for word in words:
        paths += files_of(word, wanted_suffixes(options.suffix))
    once = {}
    for path in paths:
        if once.setdefault(path.resolve(), path) is not path:
            print(f"note     {path} is named twice and read once")
    return list(once.values())


def wanted_suffixes(suffix: str) -> tuple:
    """(".py", ".c") for py,.c; () for an empty text."""
    parts = [part.strip().lstrip(".").lower() for part in suffix.split(",")]
    return tuple("." + part for part in parts if part)


def files_of(word: str, suffixes: tuple) -> list:
    """The files that a word names, which may be a folder, a file or a glob."""
    if os.path.isdir(word):
        return files_below(Path(word), suffixes)
    if os.path.exists(word):
        return [Path(word)]
    matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
    files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:
        raise UserError(f"no file {word}")
    return files


def files_below(folder: Path, suffixes: tuple) -> list:
    """The files below a folder that have one of the suffixes, or any known one; what is passed over
    is said."""
    visible = [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_hidden(path, folder)]
    taken = [path for path in visible if suffix_of(path) in (suffixes or KNOWN)]
    taken_suffixes = {suffix_of(path) for path in taken}
    others = sorted({suffix_of(path) or "no suffix" for path in visible} - taken_suffixes)
    if not taken and others:
        raise UserError(f"{folder} is a folder without text files ({', '.join(others)} only; --suffix=.py,.html "
                        "selects others)")
    if not taken:
        raise UserError(f"{folder} is a folder without text files")
    if others:
        print(f"note     {folder}: {len(visible) - len(taken):,} files passed over "
              f"({', '.join(others[:8])}); --suffix= selects others")
    return taken


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether the file, or a folder between `folder` and it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def spool_stdin(folder: Path) -> Path:
    """Standard input as a file in `folder`, since a text is read more than once. The caller removes
    it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stdin.tmp"
    progress = Progress("reading standard input")
    try:
        with open(path, "wb") as file:
            while block := sys.stdin.buffer.read(BLOCK):
                file.write(block)
                progress.advance(len(block))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        progress.end()
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


# -- cutting a text where its tokens end -----------------------------------------------------------

# Every pattern that tiktoken's encodings use ends a token after a word that white space or one of these
# marks follows, whatever stands farther left or right. (An apostrophe may belong to the word.)
MARKS = " \n\t\r.,;:!?()\"“”、。，；：！？「」"
WORD_END = re.compile(rf"[^\W\d_](?=[{MARKS}])")


def find_cut(text: str, start: int, most: int) -> int:
    """Where to end a piece of `text` that begins at `start` and has at most `most` characters: at
    the last end of a word, where a token certainly ends as well; if there is none, after `most`,
    where tokens may differ from the whole text's."""
    end = start + most
    for first in (max(start, end - 100), start):  # nearly always there is one close to the end
        word_ends = [match.end() for match in WORD_END.finditer(text, first, end)]
        if word_ends:
            return word_ends[-1]
        if not any(text.find(mark, start, end) >= 0 for mark in MARKS):
            break                                       # one long run: no need to search it
    return end


def cut_pieces(text: str, most: int):
    """Yield `text` in pieces of at most `most` characters, cut at the ends of words. An empty text
    is one piece."""
    start = 0
    while len(text) - start > most:
        end = find_cut(text, start, most)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


# -- bytes of a file, unpacked ---------------------------------------------------------------------

class Metered(io.FileIO):
    """A file that tells `progress` what is read from it."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.progress.advance(count or 0)
        return count


def read_blocks(path: Path, progress: Progress):
    """Yield the content of a file in blocks of bytes, decompressed."""
    packed = path.suffix.lower()
    try:
        with io.BufferedReader(Metered(path, progress), BLOCK) as raw:
            if packed == ".zst":
                yield from unpack_zstd(raw, path)
                return
            file = gzip.GzipFile(fileobj=raw) if packed == ".gz" else raw
            while block := file.read(BLOCK):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or not a {packed} file ({error})")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}")


def unpack_zstd(raw, path: Path):
    """Yield the content of a .zst file, which consists of one frame or several."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs zstandard to be unpacked: pip install zstandard")
    frame = None                                        # the one that is being read
    try:
        while block := raw.read(4096):  # small: it may hold thirty thousand times its size
            while block:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
                content = frame.decompress(block)
                if content:
                    yield content
                block = b""
                if frame.eof:
                    block = frame.unused_data
                    frame = None
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged or not a .zst file ({error})")
    if frame is not None:
        raise UserError(f"{path} is damaged: it ends too early")


# -- text ------------------------------------------------------------------------------------------

def decode_blocks(blocks, path: Path, encoding: str):
    """Yield blocks of bytes as text that is not empty, exactly (line ends too) except for a byte
    order mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    decoded = 0                                         # bytes before this block
    at_start = True
    for block in chain(blocks, [b""]):                  # a decoder must be told of the end
        held_back = len(decoder.getstate()[0])          # bytes of a character begun before it
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = decoded - held_back + error.start
            raise UserError(f"{path} is not {codecs.lookup(encoding).name.upper()} text: byte "
                            f"{error.object[error.start]:#04x} at offset {offset:,}"
                            + (" of its unpacked content" if path.suffix.lower() in PACKED else "")
                            + "; name its encoding (--encoding=utf-16, gb18030, latin-1 ...)")
        decoded += len(block)
        if not text:
            continue
        if at_start:
            text = text.removeprefix("\ufeff")
            at_start = False
        if text:
            yield text


def to_newlines(text: str) -> str:
    """`text` with each line end of Windows (\\r\\n) or of old Macs (\\r) as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


class LineEnds:
    """Makes the line ends of the texts that are read \\n, and counts those it changes; with `keep`,
    all stay as they are."""

    def __init__(self, keep: bool = False):
        self.keep = keep
        self.changed = 0

    def whole(self, text: str) -> str:
        """A text that is there in full, such as a row's."""
        count = 0 if self.keep else text.count("\r")      # one in \r\n, one in \r
        if not count:
            return text
        self.changed += count
        return to_newlines(text)

    def blocks(self, blocks):
        """Yield blocks of a text. A \\r that ends one waits for the next, which may begin with \\n."""
        if self.keep:
            yield from blocks
            return
        decoder = io.IncrementalNewlineDecoder(None, translate=True)
        for block in chain(blocks, [""]):
            self.changed += block.count("\r")
            text = decoder.decode(block, final=not block)
            if text:
                yield text


FIRST_LINE_END = re.compile(r"\r?\n|\r(?=[^\n])")


def split_lines(blocks, path: Path):
    """Yield blocks of text as lines, with their ends: \\n, \\r\\n or, if the first line has that, \\r."""
    line_end = ""
    rest = ""
    for block in blocks:
        rest += block
        if not line_end and (first := FIRST_LINE_END.search(rest)):
            line_end = first[0][-1]
        if line_end:
            *lines, rest = rest.split(line_end)
            for line in lines:
                yield line + line_end
        if len(rest) > RECORD:
            raise UserError(f"{path} has a line of more than {RECORD:,} characters; --format=text "
                            "reads it as plain text")
    if rest:
        yield rest


# -- documents: each reader yields (whether a document begins here, text) --------------------------

def read_plain(blocks):
    """A plain text, one document."""
    text = ""
    begins = True
    for block in blocks:
        text += block
        while len(text) > 2 * PIECE:
            end = find_cut(text, 0, PIECE)
            yield begins, text[:end]
            text = text[end:]
            begins = False
    yield begins, text


def read_separated(blocks, separator: str):
    """A plain text whose documents stand between separators; white space around them is dropped."""
    text = ""
    begins = True

    def piece(text: str) -> str:
        return text.lstrip() if begins else text

    for block in blocks:
        *documents, text = (text + block).split(separator)
        for document in documents:
            yield begins, piece(document).rstrip()
            begins = True
        while len(text) > 2 * PIECE:  # a separator that has only begun to appear stays uncut
            end = find_cut(text, 0, PIECE)
            yield begins, piece(text[:end])
            text = text[end:]
            begins = False
    if text.strip():
        yield begins, piece(text).rstrip()


def read_table(blocks, path: Path, column: str, delimiter: str):
    """A table, a document per row: its field in `column`."""
    csv.field_size_limit(RECORD)  # an unclosed quote would swallow the rest of the file
    rows = csv.reader(split_lines(blocks, path), delimiter=delimiter)
    try:
        names = next(rows, [])
        if column not in names:
            raise UserError(f"{path} has no column {column!r}; its first line names "
                            f"{', '.join(names)[:300]}")
        index = names.index(column)
        for row in rows:
            if not row:
                continue
            if len(row) <= index:
                raise UserError(f"{path}, line {rows.line_num:,}: {len(row)} fields, {column} is "
                                f"number {index + 1}")
            yield True, row[index]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num:,}: {error}")


def read_json_lines(blocks, path: Path, column: str):
    """A document per line: a JSON text, or the field `column` of an object."""
    for number, line in enumerate(split_lines(blocks, path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number:,} is not JSON: {error}")
        yield True, text_of(value, f"{path}, line {number:,}", column)


OPENING = re.compile(r"\s*\[?\s*")
BETWEEN = re.compile(r"[\s,]*")


def read_json_values(blocks, path: Path, column: str):
    """A document per JSON value. The values follow one another or stand in one list, which is never
    held whole."""
    decoder = json.JSONDecoder()
    text = ""
    position = 0
    number = 0                                          # values read so far
    enough = 0                                          # characters to have before the next try
    for block in chain(blocks, [""]):
        text = text[position:] + block
        position = 0
        at_end = not block
        while len(text) >= enough or at_end:
            before = BETWEEN if number else OPENING
            position = before.match(text, position).end()
            if position == len(text) or text[position] == "]":
                if text[position + 1:].strip():
                    raise UserError(f"{path}: more follows the end of the list; use --format=jsonl "
                                    "for one value per line")
                break
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if at_end or len(text) > RECORD or isinstance(error, RecursionError):
                    raise UserError(f"{path}: value {number + 1:,} is not JSON, or longer than "
                                    f"{RECORD:,} characters ({error})")
                # It is incomplete. Trying again at every block would take long.
                enough = 2 * (len(text) - position)
                break
            number += 1
            enough = 0
            yield True, text_of(value, f"{path}, value {number:,}", column)


def text_of(value, where: str, column: str) -> str:
    """The text of a JSON value or a field of a table. `where` begins the message if it has none."""
    column = column or "text"
    if isinstance(value, dict):
        if column not in value:
            raise UserError(f"{where} has no {column!r}; it has {', '.join(map(str, value))[:300]} "
                            "(--text_column=)")
        value = value[column]
    if value is None:                                   # a document without text
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} is {type(value).__name__}, not text")
    return value


def read_parquet(path: Path, progress: Progress, column: str):
    """A document per row: its field in `column`. A few hundred rows are read at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow")
    column = column or "text"
    try:
        with open_parquet(path, progress) as raw:
            file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False)
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)[:300]} "
                                "(--text_column=)")
            number = 0
            for batch in file.iter_batches(256, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield True, text_of(value, f"{path}, row {number:,}", column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}")


def open_parquet(path: Path, progress: Progress):
    """The file, open; a compressed one is unpacked to a temporary file first, since its end is read
    before its beginning."""
    if path.suffix.lower() not in PACKED:
        return io.BufferedReader(Metered(path, progress), BLOCK)
    file = tempfile.TemporaryFile()     # noqa: SIM115, the caller closes it
    for block in read_blocks(path, progress):
        file.write(block)
    return file


def open_documents(path: Path, options, progress: Progress, line_ends: LineEnds):
    """The reader of a file's documents, by its kind."""
    kind = kind_of(path, options)
    column = options.text_column
    if options.separator and kind != "text":
        raise UserError(f"--separator splits plain text, {path} is read as {kind}: omit it, or "
                        "give --format=text")
    if column and kind == "text":
        raise UserError(f"--text_column={column} needs a table or JSON, {path} is read as plain "
                        "text: omit it, or give --format=")
    if kind == "text":
        blocks = decode_blocks(read_blocks(path, progress), path, options.encoding)
        return read_text(line_ends.blocks(blocks), options, line_ends)
    # The line ends of a table or of JSON end rows. Those within a value are text, and JSON spells them "\r\n".
    rows = open_rows(kind, path, options, progress)
    return ((begins, line_ends.whole(text)) for begins, text in rows)


def read_text(blocks, options, line_ends: LineEnds):
    """A plain text: one document, or several between separators."""
    if not options.separator:
        return read_plain(blocks)
    separator = options.separator if line_ends.keep else to_newlines(options.separator)
    return read_separated(blocks, separator)


def open_rows(kind: str, path: Path, options, progress: Progress):
    """The reader of a table or of JSON: a document per row or value."""
    column = options.text_column
    if kind == "parquet":
        return read_parquet(path, progress, column)
    blocks = decode_blocks(read_blocks(path, progress), path, options.encoding)
    if kind == "json":
        return read_json_values(blocks, path, column)
    if kind == "jsonl":
        return read_json_lines(blocks, path, column)
    return read_table(blocks, path, column or "text", "\t" if kind == "tsv" else ",")


def read_documents(path: Path, options, progress: Progress, line_ends: LineEnds):
    """Yield (whether a document begins here, a piece of it with at most PIECE characters) of one
    file."""
    for begins, text in open_documents(path, options, progress, line_ends):
        for piece in cut_pieces(text, PIECE):
            yield begins, piece
            begins = False


class Reader:
    """The documents of several files, in order, up to `limit` bytes of text in all. Iterating
    yields (the document's number, whether it begins here, a piece of it, that piece in UTF-8).
    Empty documents are passed over and counted in `empty`; line ends that became \\n are counted in
    `line_ends`. It can be iterated any number of times; `doing` is what its progress line says."""

    def __init__(self, paths: list, options, doing: str = "reading"):
        self.paths = paths
        self.options = options
        self.doing = doing
        self.empty = 0
        self.line_ends = LineEnds(options.newlines == "keep")

    def __iter__(self):
        room = self.options.limit or sys.maxsize        # bytes
        number = -1                                     # of the last document that was not empty
        begun = True                                    # the present document has had a piece
        self.empty = 0
        self.line_ends.changed = 0
        progress = Progress(self.doing, min(room, sum(path.stat().st_size for path in self.paths)))
        for path in self.paths:
            for begins, piece in read_documents(path, self.options, progress, self.line_ends):
                if begins:
                    if not begun:
                        self.empty += 1
                    begun = False
                if not piece:
                    continue
                first = not begun
                if first:
                    number += 1
                    begun = True
                raw = encode_utf8(piece, f"{path}: document {number + 1:,}")
                is_last = len(raw) >= room
                if len(raw) > room:
                    piece = raw[:room].decode("utf-8", "ignore")    # a character that does not fit is omitted
                    raw = piece.encode("utf-8")
                room -= len(raw)
                if piece:
                    yield number, first, piece, raw
                if is_last:
                    progress.end()
                    return
        if not begun:
            self.empty += 1
        progress.end()


def encode_utf8(piece: str, where: str) -> bytes:
    try:
        return piece.encode("utf-8")
    except UnicodeEncodeError as error:                 # "\ud800" in JSON
        raise UserError(f"{where} holds {piece[error.start]!r}, half of a surrogate pair, which is "
                        "not a character")
