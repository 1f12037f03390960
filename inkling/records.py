"""Documents out of tables, JSON and parquet: a row or a value each."""

import csv
import io
import json
import re
from itertools import chain

from inkling.archives import Metered, Part, spooled
from inkling.cli import UserError, quoted
from inkling.download import BLOCK
from inkling.hints import column_hint
from inkling.remarks import REPLACEMENT, Remarks

RECORD = 1 << 25  # most characters of one row or JSON value, which is held whole
DELIMITERS = ",;\t|"
EXCEL = re.compile(r"sep=(.)\r?\n")   # a line before the header that tells Excel the delimiter


FIRST_LINE_END = re.compile(r"\r?\n|\r(?=[^\n])")


def split_lines(blocks, name: str):
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
            raise UserError(f"{name} has a line of more than {RECORD:,} characters; --format=text "
                            "reads it as plain text")
    if rest:
        yield rest


# -- tables ----------------------------------------------------------------------------------------

def read_table(blocks, name: str, options, remarks: Remarks, quoting: bool):
    """A table, a document per row: its field in the column that is named, or that has the number in a
    table without a header.

    quoting: whether quotes enclose fields, as in .csv; a .tsv has none."""
    column = options.text_column or "text"
    lines = split_lines(blocks, name)
    first = next(lines, "")
    delimiter = options.delimiter
    if told := EXCEL.fullmatch(first):
        delimiter = delimiter or told[1]
        first = next(lines, "")
    lines = chain([first], lines)
    if not delimiter:
        delimiter = find_delimiter(first, column, name) if quoting else "\t"
    rows = csv_rows(lines, name, delimiter) if quoting else plain_rows(lines, delimiter)
    header = next(rows, (1, []))
    index = find_column(header[1], column, name)
    if index is None:
        index = int(column) - 1
        rows = chain([header], rows)
        remarks.notice(name, f"column {column} of a table without a header", "its first line is a row")
    width = len(header[1])
    for number, fields in rows:
        if not fields:
            continue
        if len(fields) != width:
            remarks.refuse_row(f"{name}, line {number:,}: {len(fields)} fields, the first line has {width}",
                               width_hint(quoting, delimiter))
            continue
        text = fields[index]
        if not quoting and len(text) > 1 and text[0] == text[-1] == '"':
            remarks.quoted[name] += 1
        yield True, text


def width_hint(quoting: bool, delimiter: str) -> str:
    if quoting:
        return f" ({quoted(delimiter)} within a text needs quotes around it)"
    return r' (--format=csv --delimiter="\t" reads fields in quotes)' if delimiter == "\t" else ""


def find_delimiter(first: str, column: str, name: str) -> str:
    """What stands between the fields of a table whose first line this is: a comma, unless only another
    mark makes the column appear in it."""
    fitting = []
    for delimiter in DELIMITERS:
        names = next(csv.reader([first], delimiter=delimiter), [])
        if column in names:
            return delimiter
        if column.isdecimal() and len(names) >= max(2, int(column)):
            fitting.append(delimiter)
    if len(fitting) > 1:
        raise UserError(f"{name}: its first line has {' and '.join(map(quoted, fitting))}; say which of them "
                        f"stands between fields, such as --delimiter={quoted(fitting[0])}")
    return (fitting or [","])[0]


def find_column(names: list, column: str, name: str) -> int | None:
    """The place of a column; None if it is a number and the table has no header that names it."""
    times = names.count(column)
    if times > 1:
        raise UserError(f"{name}: its first line names {times} columns {column!r}: give them different names")
    if times == 1:
        return names.index(column)
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return None
    known = f"its first line names {column_hint(column, names)}" if names else "it is empty"
    raise UserError(f"{name} has no column {column!r}; {known}; a table without a header takes a number, such as "
                    "--text_column=1; --delimiter= says what stands between fields")


def plain_rows(lines, delimiter: str):
    """Yield (number of the line, fields) of a table without quoting."""
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, line.split(delimiter) if line else []


def csv_rows(lines, name: str, delimiter: str):
    """Yield (number of the line where it begins, fields) of a table with quoting, strictly."""
    csv.field_size_limit(RECORD)  # an unclosed quote would swallow the rest of the file
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 1
    try:
        for fields in rows:
            yield number, fields
            number = rows.line_num + 1
    except csv.Error as error:
        said = str(error)
        if "end of data" in said or "field limit" in said:
            said = f"a quote is opened and not closed ({said})"
        plain = "--format=tsv" + ("" if delimiter == "\t" else f" --delimiter={quoted(delimiter)}")
        raise UserError(f"{name}, line {number:,}: {said}; within quotes, a quote is written twice; {plain} takes all "
                        "quotes as text")


# -- JSON ------------------------------------------------------------------------------------------

def read_json_lines(blocks, name: str, column: str, remarks: Remarks):
    """A document per line: a JSON text, or the field `column` of an object."""
    for number, line in enumerate(split_lines(blocks, name), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number:,}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            remarks.refuse_row(f"{where} is not JSON: {error}")
            continue
        yield from document(value, where, column, remarks)


SPACE = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s,]*")
COMMA = re.compile(r",\s*")


def read_json_values(blocks, name: str, column: str, remarks: Remarks):
    """A document per JSON value. The values follow one another or stand in one list, which is never
    held whole."""
    decoder = json.JSONDecoder()
    text = ""
    position = 0
    number = 0                                          # values read so far
    enough = 0                                          # characters to have before the next try
    state = "before"                                    # then "in a list" and "after it", or "in a row"
    for block in chain(blocks, [""]):
        text = text[position:] + block
        position = 0
        at_end = not block
        while len(text) >= enough or at_end:
            before = BETWEEN if state == "in a row" else SPACE
            position = before.match(text, position).end()
            if position == len(text):
                break
            if state == "before":
                state = "in a list" if text[position] == "[" else "in a row"
                if state == "in a list":
                    position += 1
                continue
            if state == "after it":
                raise UserError(f"{name}: more follows the end of the list; use --format=jsonl for one value per line")
            if state == "in a list" and text[position] == "]":
                state = "after it"
                position += 1
                continue
            start = position
            if state == "in a list" and number:
                start = after_comma(text, position, f"{name}: value {number:,} of its list")
            try:
                value, position = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if at_end or len(text) > RECORD or isinstance(error, RecursionError):
                    raise UserError(f"{name}: value {number + 1:,} is not JSON, or longer than "
                                    f"{RECORD:,} characters ({error})")
                # It is incomplete. Trying again at every block would take long.
                enough = 2 * (len(text) - position)
                break
            number += 1
            enough = 0
            yield from document(value, f"{name}, value {number:,}", column, remarks)
    if state == "in a list":
        raise UserError(f"{name} is cut: its list does not end after value {number:,}")


def after_comma(text: str, position: int, where: str) -> int:
    """Where the next value of a list begins."""
    comma = COMMA.match(text, position)
    if not comma:
        raise UserError(f"{where} is followed by {text[position]!r}, not by a comma")
    return comma.end()


# -- the text of a value ---------------------------------------------------------------------------

class NoText(ValueError):
    """A value without the text that was asked for; the message says what there is."""


def document(value, where: str, column: str, remarks: Remarks):
    """Yield the document that a value or row holds, if it can be read."""
    try:
        yield True, text_of(value, column)
    except NoText as error:
        remarks.refuse_row(f"{where} {error}")


def text_of(value, column: str) -> str:
    """The text of a JSON value or row, or of its field `column`, which may be a path of fields
    (messages.text). A list on the way stands for all its items, whose texts become lines."""
    column = column or "text"
    if isinstance(value, dict) and column in value:     # a name with dots, or without
        return "\n".join(texts_at(value[column], [], column))
    return "\n".join(texts_at(value, column.split("."), ""))


def texts_at(value, fields: list, path: str):
    """Yield every text that the fields lead to. path: of the fields that were followed."""
    if value is None:                                   # a document without text
        yield ""
    elif isinstance(value, str):
        yield value
    elif isinstance(value, list) and path:
        texts = [text for item in value for text in texts_at(item, fields, path)]
        if {str, dict} <= set(map(type, value)):        # one text in fragments, some of them with a link
            texts = ["".join(texts)]
        yield from texts
    elif isinstance(value, dict) and fields:
        name = fields[0]
        if name not in value:
            raise NoText(f"has no {join(path, name)!r}; it has {column_hint(join(path, name), paths_of(value, path))}")
        yield from texts_at(value[name], fields[1:], join(path, name))
    elif isinstance(value, dict):
        raise NoText(f"holds several fields in {path!r}: {column_hint(path, paths_of(value, path))}")
    else:
        raise NoText(f"holds no text: {path or 'it'} is {type(value).__name__}")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def paths_of(value: dict, path: str) -> list:
    return [join(path, str(name)) for name in value]


# -- parquet ---------------------------------------------------------------------------------------

def read_parquet(part: Part, progress, column: str, remarks: Remarks):
    """A document per row: its field in `column`. A few hundred rows are read at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{part.name} needs pyarrow to be read: pip install pyarrow")
    column = column or "text"
    try:
        # Its end is read before its beginning.
        with io.BufferedReader(Metered(part.path, progress), BLOCK) if part.path else spooled(part) as raw:
            file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False)
            names = file.schema_arrow.names
            top = column if column in names else column.partition(".")[0]
            if top not in names:
                raise UserError(f"{part.name} has no column {column!r}; it has {column_hint(column, names)}")
            if names.count(top) > 1:
                raise UserError(f"{part.name} has {names.count(top)} columns {top!r}: give them different names")
            number = 0
            for batch in file.iter_batches(256, columns=[top], use_threads=False):
                for value in values_of(batch.column(0), remarks):
                    number += 1
                    where = f"{part.name}, row {number:,}"
                    if isinstance(value, UnicodeDecodeError):
                        remarks.refuse_row(f"{where} is not UTF-8 text: {value}")
                        continue
                    yield from document({top: value}, where, column, remarks)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {part.name}: {str(error).splitlines()[0]}")


def values_of(column, remarks: Remarks):
    """Yield the values of a column; a UnicodeDecodeError for one that is not UTF-8."""
    try:
        yield from column.to_pylist()
        return
    except UnicodeDecodeError:
        pass                                            # one of them: find out which
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            if remarks.errors != "replace" or not hasattr(value, "as_buffer"):
                yield error
                continue
            text = value.as_buffer().to_pybytes().decode("utf-8", "replace")
            remarks.characters += text.count(REPLACEMENT)
            yield text
