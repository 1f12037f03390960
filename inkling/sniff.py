"""What a file is, by its first bytes: text in some encoding, something to unpack, or no text at all."""

import codecs
import re
from dataclasses import dataclass

HEAD = 4096                             # first bytes that are looked at
# Compressed forms, by the bytes that each begins with.
PACKED_FORMS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
PARQUET = b"PAR1\x15"
OFFICE = "libreoffice --headless --convert-to"


@dataclass(frozen=True)
class Form:
    """A kind of file that holds no plain text. In `way_out`, FILE stands for its name."""

    name: str
    way_out: str
    start: bytes = b""
    offset: int = 0
    is_readable: bool = False           # as text, when --format=text insists on it


NOT_TEXT = [
    Form("a PDF", "take its text out first, such as with pdftotext FILE", b"%PDF-"),
    Form("an RTF document", f"save it as plain text, such as with {OFFICE} txt FILE (--format=text takes it as it "
         "is, control words and all)", rb"{\rtf", is_readable=True),
    Form("a Git LFS pointer", "fetch the file that it stands for, with git lfs pull",
         b"version https://git-lfs.github.com/spec/"),
    Form("a 7z archive", "unpack it first, such as with 7z x FILE", b"7z\xbc\xaf\x27\x1c"),
    Form("a RAR archive", "unpack it first, such as with unrar x FILE", b"Rar!\x1a\x07"),
    Form("an Arrow file", "write it as .parquet, such as with to_parquet of datasets", b"ARROW1\0\0"),
    Form("a stream of Arrow", "write it as .parquet, such as with to_parquet of datasets", b"\xff\xff\xff\xff"),
    Form("an old Office document", f"save it as text, or a table as .csv, such as with {OFFICE} txt FILE",
         b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    Form("an SQLite database", "export the column as .csv, such as with sqlite3 -csv", b"SQLite format 3\0"),
    Form("a Kindle book", "convert it to text first, such as with ebook-convert FILE book.txt", b"BOOKMOBI", 60),
    Form("a DjVu book", "take its text out first, such as with djvutxt FILE", b"AT&TFORM"),
    Form("a PNG picture", "give a text", b"\x89PNG\r\n\x1a\n"),
    Form("a JPEG picture", "give a text", b"\xff\xd8\xff"),
    Form("a GIF picture", "give a text", b"GIF89a"),
    Form("a program", "give a text", b"\x7fELF"),
    Form("a NumPy array", "give a text; token ids are taken over by --adopt", b"\x93NUMPY"),
    Form("a GGUF model", "give a text", b"GGUF"),
]

# What a zip archive is, by one of its members.
ZIP_FORMS = {
    "word/document.xml": Form("a DOCX document", f"save it as plain text, such as with {OFFICE} txt FILE"),
    "xl/workbook.xml": Form("an XLSX table", f"save it as .csv, such as with {OFFICE} csv FILE"),
    "ppt/presentation.xml": Form("a PPTX presentation", "save its text first"),
    "META-INF/container.xml": Form("an EPUB book",
                                   "convert it to text first, such as with pandoc FILE -t plain -o book.txt"),
    "content.xml": Form("an OpenDocument file (ODT, ODS)",
                        f"save it as plain text, or a table as .csv, such as with {OFFICE} txt FILE"),
}


def packed_form(head: bytes) -> str:
    """gzip, zstd, xz or bzip2, or "" for anything else."""
    for start, name in PACKED_FORMS.items():
        if head.startswith(start) and (name != "bzip2" or head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")):
            return name
    return ""


def is_zip(head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def not_text(head: bytes) -> Form | None:
    """What a file is that cannot be read as text; None if it may be text."""
    for form in NOT_TEXT:
        if head[form.offset:].startswith(form.start):
            return form
    return None


# -- what a text is --------------------------------------------------------------------------------

MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def marked_encoding(head: bytes) -> str:
    """utf-8, utf-32 or utf-16, if the text begins with their byte order mark; else ""."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    return ""


# Which of four bytes in a row are NULs in plain letters of each encoding.
NULS = {"utf-16-le": (1, 3), "utf-16-be": (0, 2), "utf-32-le": (1, 2, 3), "utf-32-be": (0, 1, 2)}


def encoding_with_nuls(head: bytes) -> str:
    """The encoding of a text that has a NUL, or three, beside nearly every letter; else ""."""
    lanes = [head[lane:len(head) // 4 * 4:4] for lane in range(4)]
    size = len(lanes[0])
    if size < 3:
        return ""
    share = [lane.count(0) / size for lane in lanes]
    for encoding, nuls in NULS.items():
        if all(share[lane] > 0.9 if lane in nuls else share[lane] < 0.1 for lane in range(4)):
            return encoding
    return ""


ESCAPES = {b"\x1b$B": "iso2022_jp", b"\x1b$@": "iso2022_jp", b"\x1b$)C": "iso2022_kr"}


def encoding_with_escapes(head: bytes) -> str:
    """The encoding of a text that switches alphabets by escape sequences; else ""."""
    for escape, encoding in ESCAPES.items():
        if escape in head:
            return encoding
    return ""


def likely_encodings(raw: bytes, position: int) -> str:
    """What a text that is not UTF-8 may be in, the likeliest first. position: of a byte in `raw` that
    is not UTF-8."""
    near = raw[max(0, position - 1000):position + 1000]
    if encoding := encoding_with_nuls(near):
        return encoding
    if b"\0" in near:                   # line breaks and spaces among letters beyond ASCII
        return "utf-16-le, utf-16-be ..."
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", near)]
    if sum(runs) >= 3 * len(runs):      # long runs of letters beyond ASCII
        fitting = [name for name in ("gb18030", "big5", "shift_jis", "euc_kr") if decodes(raw, position, name)]
        return ", ".join([*fitting, "cp1251 ..."])
    if re.search(rb"[\x80-\x9f]", near):    # quotes and dashes there; control characters in Latin-1
        return "cp1252, gb18030 ..."
    return "latin-1, cp1252, gb18030 ..."


def suggest_encoding(head: bytes, raw: bytes, position: int, encoding: str) -> str:
    """What to do about a text that is not in the encoding that was named: its byte `position` of `raw`
    is wrong."""
    if encoding != "UTF-8" and decodes(head, 0, "utf-8") and b"\0" not in head:
        return "it begins as UTF-8 does: omit --encoding"
    return f"name its encoding (--encoding={likely_encodings(raw, position)})"


def is_utf8_beyond_ascii(head: bytes) -> bool:
    """Whether the beginning of a text is UTF-8 with letters beyond ASCII, as other encodings' texts hardly ever
    are by chance: three or more of them."""
    return len(re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", head)) >= 3 and decodes(head, 0, "utf-8")


def decodes(raw: bytes, position: int, encoding: str) -> bool:
    """Whether the bytes from the first letter beyond ASCII around `position` on are text in an encoding."""
    start = len(raw[:position].rstrip(bytes(range(128, 256))))
    try:
        codecs.getincrementaldecoder(encoding)().decode(raw[start:start + 2000])
    except UnicodeError:
        return False
    return True


SUBTITLE = re.compile(r"\s*(?:WEBVTT|\d+\s*\n\s*\d+:\d\d:\d\d[,.]\d+ *-->)")
MARKUP = re.compile(r"\s*(?:<!--.*?-->\s*)?<(!doctype html|html|head|body|\?xml|!doctype|svg|rss|feed|TEI|mediawiki)\b",
                    re.IGNORECASE | re.DOTALL)


def markup_of(beginning: str) -> tuple | None:
    """(HTML, XML or subtitles; what in it is no prose) of a text that holds more than prose."""
    if match := MARKUP.match(beginning):
        return ("HTML" if match[1].lower() in ("!doctype html", "html", "head", "body") else "XML"), "tags"
    if SUBTITLE.match(beginning):
        return "subtitles", "numbers and times"
    if beginning.startswith(r"{\rtf"):
        return "RTF", "control words"
    return None
