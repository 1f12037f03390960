"""Text out of files, a piece at a time: decoded, and divided into documents."""

import codecs
import io
import re
import sys
from itertools import chain

from inkling.archives import Part, open_parts, suffix_of
from inkling.cli import UserError
from inkling.inputs import ARCHIVES, KINDS, KNOWN, wanted_suffixes
from inkling.progress import Progress
from inkling.records import read_json_lines, read_json_values, read_parquet, read_table
from inkling.remarks import Remarks
from inkling.sniff import (
    HEAD,
    PARQUET,
    encoding_with_escapes,
    encoding_with_nuls,
    is_utf8_beyond_ascii,
    marked_encoding,
    markup_of,
    not_text,
    suggest_encoding,
)

PIECE = 1 << 20                         # most characters handed on at a time


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


# -- text ------------------------------------------------------------------------------------------

def decode_part(part: Part, encoding: str, remarks: Remarks):
    """Yield the content of a part as text that is not empty, exactly (line ends too) except for a
    byte order mark."""
    named = codecs.lookup(encoding).name
    marked = marked_encoding(part.head)
    if marked and not named.startswith(marked):
        remarks.notice(part.name, f"{marked.upper()}, by the byte order mark", f"read as that, not as {encoding}")
        encoding = marked
    elif named == "utf-8":                              # as which these would pass
        if wide := encoding_with_nuls(part.head):
            raise UserError(f"{part.name} has a NUL beside nearly every letter: name its encoding (--encoding={wide})")
        if switching := encoding_with_escapes(part.head):
            raise UserError(f"{part.name} has escape sequences of another encoding: name it (--encoding={switching})")
    elif not marked and is_utf8_beyond_ascii(part.head):
        remarks.notice(part.name, "begins as valid UTF-8", f"read as {encoding} all the same: if that gives wrong "
                       "letters, omit --encoding")
    yield from decode_blocks(part, encoding, remarks)


def decode_blocks(part: Part, encoding: str, remarks: Remarks):
    decoder = codecs.getincrementaldecoder(encoding)(remarks.decoding)
    name = codecs.lookup(encoding).name.upper()
    decoded = 0                                         # bytes before this block
    at_start = True
    for block in chain(part.blocks, [b""]):             # a decoder must be told of the end
        try:
            held_back = len(decoder.getstate()[0])      # bytes of a character begun before it
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = f"{decoded - held_back + error.start:,}"
            if part.is_packed:
                offset += " of its unpacked content"
            byte = f"{error.object[error.start]:#04x}"
            raise UserError(f"{part.name} is not {name} text: byte {byte} at offset {offset}; "
                            f"{suggest_encoding(part.head, error.object, error.start, name)}, or give --errors=replace "
                            "if only a few bytes are wrong")
        except ValueError as error:                     # utf-16 without a mark, for one, is no UnicodeDecodeError
            raise UserError(f"{part.name} is not {name} text ({error}): {suggest_encoding(part.head, block, 0, name)}")
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


def kind_of(part: Part, options) -> str:
    """text, csv, tsv, json, jsonl or parquet: what `format` says, or else the suffix (before .gz and
    the like)."""
    if options.format != "auto":
        return options.format
    if part.head.startswith(PARQUET):
        return "parquet"
    kind = KINDS.get(suffix_of(part.name), "text")
    if kind in ("csv", "tsv") and not options.text_column:
        return "text"                   # a table, read as it is
    return kind


def open_documents(part: Part, options, line_ends: LineEnds, remarks: Remarks, progress: Progress):
    """The reader of a part's documents, by its kind."""
    kind = kind_of(part, options)
    form = not_text(part.head)
    if form and not (form.is_readable and options.format == "text"):
        part.refuse(form)
    if options.separator and kind != "text":
        raise UserError(f"--separator splits plain text, {part.name} is read as {kind}: omit it, or "
                        "give --format=text")
    if options.text_column and kind == "text":
        raise UserError(f"--text_column={options.text_column} needs a table or JSON, {part.name} is read as plain "
                        "text: omit it, or give --format=")
    if options.delimiter and kind not in ("csv", "tsv"):
        raise UserError(f"--delimiter belongs to a table with --text_column, {part.name} is read as {kind}: omit it, "
                        "or give --format=csv")
    if kind == "text":
        blocks = notice_markup(decode_part(part, options.encoding, remarks), part.name, remarks)
        return read_text(line_ends.blocks(blocks), options, line_ends)
    # The line ends of a table or of JSON end rows. Those within a value are text, and JSON spells them "\r\n".
    rows = open_rows(kind, part, options, remarks, progress)
    return ((begins, line_ends.whole(text)) for begins, text in rows)


def notice_markup(blocks, name: str, remarks: Remarks):
    """Yield the blocks of a text, and remark that it holds more than prose, if it does."""
    for number, block in enumerate(blocks):
        if number == 0 and (markup := markup_of(block[:HEAD])):
            what, aside = markup
            remarks.notice(name, what, f"{aside} are part of the text")
        yield block


def read_text(blocks, options, line_ends: LineEnds):
    """A plain text: one document, or several between separators."""
    if not options.separator:
        return read_plain(blocks)
    separator = options.separator if line_ends.keep else to_newlines(options.separator)
    return read_separated(blocks, separator)


def open_rows(kind: str, part: Part, options, remarks: Remarks, progress: Progress):
    """The reader of a table or of JSON: a document per row or value."""
    if kind == "parquet":
        return read_parquet(part, progress, options.text_column, remarks)
    blocks = decode_part(part, options.encoding, remarks)
    if kind == "json":
        return read_json_values(blocks, part.name, options.text_column, remarks)
    if kind == "jsonl":
        return read_json_lines(blocks, part.name, options.text_column, remarks)
    return read_table(blocks, part.name, options, remarks, quoting=kind == "csv")


class Reader:
    """The documents of several files, in order, up to `limit` bytes of text in all. Iterating
    yields (the document's number, whether it begins here, a piece of it, that piece in UTF-8).
    Empty documents are passed over and counted in `empty`; line ends that became \\n are counted in
    `line_ends`, what else there is to say is in `remarks`. It can be iterated any number of times;
    `doing` is what its progress line says. keep: (documents,) which of them to read, as if there were no
    others; None: all."""

    def __init__(self, paths: list, options, doing: str = "reading"):
        self.paths = paths
        self.options = options
        self.doing = doing
        self.empty = 0
        self.keep = None
        self.line_ends = LineEnds(options.newlines == "keep")
        self.remarks = Remarks(options.errors)

    def pieces(self, progress: Progress):
        """Yield (whether a document begins here, a piece of it with at most PIECE characters, the
        name of its file)."""
        suffixes = wanted_suffixes(self.options.suffix)
        wanted = tuple(suffix for suffix in suffixes if suffix not in ARCHIVES) or KNOWN       # of an archive's members
        for path in self.paths:
            for part in open_parts(path, progress, wanted, self.remarks):
                documents = open_documents(part, self.options, self.line_ends, self.remarks, progress)
                for begins, text in documents:
                    for piece in cut_pieces(text, PIECE):
                        yield begins, piece, part.name
                        begins = False

    def __iter__(self):
        if self.keep is None:
            yield from self.all_documents()
            return
        kept = -1
        for number, begins, piece, raw in self.all_documents():
            if self.keep[number]:
                kept += begins
                yield kept, begins, piece, raw

    def all_documents(self):
        """What iterating yields without `keep`."""
        room = self.options.limit or sys.maxsize        # bytes
        number = -1                                     # of the last document that was not empty
        begun = True                                    # the present document has had a piece
        self.empty = 0
        self.line_ends.changed = 0
        self.remarks.clear()
        progress = Progress(self.doing, min(room, sum(path.stat().st_size for path in self.paths)))
        for begins, piece, name in self.pieces(progress):
            if begins:
                if not begun:
                    self.empty += 1
                begun = False
            piece = self.remarks.whole(piece, f"{name}: document {number + 1 if begun else number + 2:,}")
            if not piece:
                continue
            first = not begun
            if first:
                number += 1
                begun = True
            raw = piece.encode("utf-8")
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
