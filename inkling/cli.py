"""Settings of a program: a dataclass filled from config files and --key=value flags, its rules, and
`--help`.

A program declares its settings once, as a dataclass with a type, a default and a comment per field:

    @dataclass
    class Options:
        # -- sampling
        temperature: NonNegativeFloat = 0.8     # 0 is greedy
        top_p: Annotated[float, above(0).at_most(1)] = 1.0   # 1: all

        def rules(self) -> dict:
            return {"temperature=0 ignores top_p": self.temperature or self.top_p == 1}

and calls `parse(Options, argv, doc)`. The declared type (bool, int, float, str, FilePath,
Literal[...], or Texts for a flag that may be repeated) decides how a value is read; nothing is
evaluated.
Only a config file named by the user runs as Python. `check` reports every broken rule at once.

A user's mistake raises UserError. The programs print it in one line and exit with code 2; a library
caller can catch it.
"""

import difflib
import inspect
import math
import os
import re
import reprlib
import runpy
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from inkling.hints import QUOTES, flag_meant, nearest_flag, number_meant, there_is
from inkling.output import open_streams

Texts = tuple[str, ...]                 # a flag that may be given several times
FilePath = typing.NewType("FilePath", str)      # a path, or a text that may be one; ~ is the home folder
AutoPath = typing.NewType("AutoPath", str)      # the same, or auto, which a bare flag means
LARGEST_INT = 2**62                     # larger integers overflow in numpy and torch


class UserError(Exception):
    """A mistake in what the user gave. The message names the value, the rule and the way out;
    `code` is the exit code of a program that it ends."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", str(message).strip()))
        self.code = code


# -- rules: the values a number may have, beside its field ----------------------------------------------------------

@dataclass(frozen=True)
class Range:
    """An interval of numbers. `str` completes "must be"."""

    low: float
    low_is_open: bool = False
    high: float | None = None
    high_is_open: bool = False

    def at_most(self, high: float) -> "Range":
        return replace(self, high=high)

    def below(self, high: float) -> "Range":
        return replace(self, high=high, high_is_open=True)

    def __contains__(self, value) -> bool:
        above_low = value > self.low if self.low_is_open else value >= self.low
        if self.high is None:
            return above_low
        return above_low and (value < self.high if self.high_is_open else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.low_is_open else 'at least'} {self.low}"
        if self.high is None:
            return low
        if not self.low_is_open and not self.high_is_open:
            return f"from {self.low} to {self.high}"
        return f"{low} and {'below' if self.high_is_open else 'at most'} {self.high}"


def at_least(low: float) -> Range:
    return Range(low)


def above(low: float) -> Range:
    return Range(low, low_is_open=True)


@dataclass(frozen=True)
class AutoOr:
    """The rule of a setting that is `auto` or a number in a range."""

    range: Range

    def __contains__(self, value) -> bool:
        return value == "auto" or value in self.range

    def __str__(self) -> str:
        return f"auto or {self.range}"


PositiveInt = Annotated[int, at_least(1).at_most(2**31)]
NonNegativeInt = Annotated[int, at_least(0).at_most(2**31)]
AutoOrPositiveInt = Annotated[Literal["auto"] | int, AutoOr(at_least(1).at_most(2**31))]
AutoOrNonNegativeInt = Annotated[Literal["auto"] | int, AutoOr(at_least(0).at_most(2**31))]
AutoOrNonNegativeFloat = Annotated[Literal["auto"] | float, AutoOr(at_least(0).at_most(2**31))]
PositiveFloat = Annotated[float, above(0).at_most(2**31)]
NonNegativeFloat = Annotated[float, at_least(0).at_most(2**31)]
Fraction = Annotated[float, at_least(0).at_most(1)]
Seed = Annotated[int, at_least(0).below(2**31)]


def problems(settings) -> list:
    """Every rule that the dataclass `settings` breaks, in a sentence each with the values: the
    ranges beside its fields, then its own `rules()`, a dict from sentence to whether it holds."""
    found = []
    for name, annotation in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for rule in getattr(annotation, "__metadata__", ()):
            if value not in rule:
                found.append(f"{name}={value} must be {rule}")
    rules = settings.rules() if hasattr(settings, "rules") else {}
    return found + [sentence for sentence, holds in rules.items() if not holds]


def check(settings):
    """Raise one UserError that names every rule the settings break."""
    if found := problems(settings):
        raise UserError("; ".join(found))


# -- programs --------------------------------------------------------------------------------------------------------

def program() -> str:
    return Path(sys.argv[0]).name or "inkling"


# What acts on a terminal: control characters except line breaks and tabs, unpaired surrogates, and
# the marks that reorder everything shown after them. Other invisible characters belong to the text
# and stay: ideographic and no-break spaces, the joiners of Persian, Hindi and emoji, soft hyphens,
# U+2028 and U+2029.
ACTS_ON_TERMINAL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069"
UNSAFE = re.compile(f"[{ACTS_ON_TERMINAL}]")
UNSAFE_IN_A_LINE = re.compile(f"[{ACTS_ON_TERMINAL}\\t\\n\\u2028\\u2029]")


def escape_match(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


def printable(text: str) -> str:
    """`text` in one line, with what would act on a terminal or end the line escaped."""
    return UNSAFE_IN_A_LINE.sub(escape_match, str(text))


def printable_text(text: str) -> str:
    """`text`, of any number of lines, with what would act on a terminal escaped; \\r\\n is a line
    break."""
    return UNSAFE.sub(escape_match, text.replace("\r\n", "\n"))


def quoted(text: str) -> str:
    """`text` in quotes and in one line: like repr, but a visible text keeps its invisible
    characters where they do no harm."""
    if not any(char.isprintable() and not char.isspace() for char in text):
        return repr(text)
    quote = '"' if "'" in text and '"' not in text else "'"
    escaped = text.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
    return quote + printable(escaped.replace(quote, "\\" + quote)) + quote


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str) -> str:
    """A text typed on the command line, with a line break, a tab, a carriage return and a backslash
    in place of \\n, \\t, \\r and \\\\. Any other backslash stays."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def exit_code(main, argv: list) -> int:
    """Call a program's main and return its exit code; a UserError is printed to stderr in one
    line."""
    try:
        return main(argv) or 0
    except UserError as error:
        # A wrong setting stops all processes of a run. torchrun ends the others as soon as one has
        # failed, so they wait for that instead of repeating the message.
        if error.code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)
        print(f"{program()}: {printable(error)}", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        return 130


def run(main) -> NoReturn:
    """Run a program: UTF-8 wherever it prints, and no traceback for a user's mistake, Ctrl-C or an
    output that goes away."""
    open_streams(program())
    try:
        code = exit_code(main, sys.argv[1:])
    finally:
        sys.stdout.flush()
    sys.exit(code)


# -- reading values by their declared type ---------------------------------------------------------------------------

class BadValue(ValueError):
    """A value that its field's declared type does not admit; the message says what was expected."""


@dataclass
class Parsed:
    """A command line: `values` of every field it sets, `typed` the names given as flags and not in
    files."""

    values: dict = field(default_factory=dict)
    typed: set = field(default_factory=set)
    files: list = field(default_factory=list)          # config files, in order
    words: list = field(default_factory=list)          # other words without dashes, when the program takes them


def field_types(options: type) -> dict:
    """The declared type of each field, without its rules."""
    return typing.get_type_hints(options)


def nearest(name: str, known) -> str:
    """`; did you mean --x?` for the closest known name, or an empty text."""
    meant = nearest_flag(name, known)
    return f"; did you mean --{meant}?" if meant else ""


def nearest_config(word: str) -> str:
    """`; did you mean config/NAME.py?` for the config file whose name comes closest, or an empty
    text."""
    known = {path.name: path for path in sorted(Path("config").glob("*.py"))}
    close = difflib.get_close_matches(os.path.basename(word), known, n=1)
    if close:
        return f"; did you mean {known[close[0]]}?"
    lists_them = word.endswith(".py") or os.path.isdir(word)
    return there_is(word, [str(path) for path in known.values()]) if lists_them else ""


def expected(kind) -> str:
    """What a value of this type looks like, in words."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if is_auto_or_number(kind):
        return f"auto or {expected(number_of(kind))}"
    words = {bool: "True or False", int: "a whole number", float: "a number", FilePath: "path"}
    return words.get(kind, "text")


def example_of_a_flag(key: str, kind) -> str:
    """--key=A_NUMBER, or --key=A or --key=B where these are all."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"--{key}={choice}" for choice in typing.get_args(kind))
    return f"--{key}={expected(kind).upper().replace(' ', '_')}"


def is_auto_or_number(kind) -> bool:
    """Whether it is Literal["auto"] | int or | float."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def number_of(kind) -> type:
    """The int or float in Literal["auto"] | int or | float."""
    _, number = typing.get_args(kind)
    return number


def convert(value, kind):
    """Read `value`, a flag's text or an object from a config file, as `kind`. Raises BadValue."""
    if typing.get_origin(kind) is typing.Literal:
        return convert_choice(value, kind)
    if is_auto_or_number(kind):
        if isinstance(value, str) and value.strip().lower() == "auto":
            return "auto"
        try:
            return convert_number(value, number_of(kind))
        except BadValue as problem:
            raise BadValue(f"auto or {problem}")
    if kind is bool:
        return convert_bool(value)
    if kind in (int, float):
        return convert_number(value, kind)
    if kind == Texts and isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        return tuple(value)
    if not isinstance(value, str):
        raise BadValue(expected(kind))
    if kind in (FilePath, AutoPath):
        return expand_home(value)
    return (value,) if kind == Texts else value


def expand_home(path: str) -> str:
    """The path with ~ or ~NAME at its beginning replaced by the home folder: no shell does it
    behind the = of a flag. Unchanged where there is no such user."""
    try:
        return os.path.expanduser(path)
    except ValueError:                      # characters that no user's name has
        return path


def convert_choice(value, kind):
    """One of the choices of a Literal, by itself or by its text in any case."""
    for choice in typing.get_args(kind):
        if type(value) is type(choice) and value == choice:
            return choice
        if isinstance(value, str) and value.strip().lower() == str(choice).lower():
            return choice
    raise BadValue(expected(kind))


def convert_bool(value) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in ("true", "false", "1", "0", "yes", "no"):
        raise BadValue(expected(bool))
    return word in ("true", "1", "yes")


def convert_number(value, kind):
    """A finite int or float; a whole number may be written as 1e3."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BadValue(expected(kind))
    try:
        number = read_int(value) if kind is int else float(value)
    except (ValueError, OverflowError):
        raise BadValue(expected(kind)) from None
    if isinstance(number, float) and not math.isfinite(number):
        raise BadValue(f"{expected(kind)} that is finite")
    if kind is float:
        return number
    if number != int(number):
        raise BadValue(expected(kind))
    if abs(number) > LARGEST_INT:
        raise BadValue(f"a whole number of at most {LARGEST_INT:,}")
    return int(number)


def read_int(value) -> int | float:
    """An int where `value` spells one; a float for 1e3."""
    if isinstance(value, float):
        return value
    try:
        return int(value)
    except ValueError:
        return float(value)


# -- config files and flags --------------------------------------------------------------------------------------------

def read_config_file(path: str, kinds: dict) -> dict:
    """The fields that a Python config file assigns. Names that start with `_` and imported modules
    are its own."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}")
    except SystemExit:
        raise UserError(f"{path} tried to exit; a config file holds plain assignments")
    except KeyboardInterrupt:
        raise
    except BaseException as error:      # whatever the file raises is for the user to see, in one line
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                line = frame.lineno
        raise UserError(f"{path}, line {line or '?'}: {type(error).__name__}: {error}")
    values = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if name not in kinds:
            raise UserError(f"{path} sets {name}, which is not a setting{nearest(name, kinds)} "
                            "(start a name with _ to keep it to the file)")
        try:
            values[name] = convert(value, kinds[name])
        except BadValue as problem:
            raise UserError(f"{path}: {name}={value!r} is not {problem}")
    return values


def read_flag(word: str, kinds: dict, takes: str) -> tuple:
    """(name, value) of --name=value; a bare --name means True. takes: as in `parse`."""
    key, equals, text = word[2:].partition("=")
    name = key.replace("-", "_")
    if name not in kinds:
        raise UserError(f"unknown flag --{key}{way_to_a_flag(word, kinds)}")
    if not equals and kinds[name] is AutoPath:
        return name, "auto"
    if not equals:
        if needs_value(word, kinds):
            raise UserError(f"--{key} needs a value: {example_of_a_flag(key, kinds[name])}")
        text = "True"
    glued = re.search(r"[\u3000\xa0\uff0c\u3001\uff1b,;]+(--(\w+).*)", text)      # where no shell splits
    is_free_text = kinds[name] in (str, Texts) and text.isascii()        # where a comma may stand before dashes
    if glued and glued[2] in kinds and not is_free_text:
        raise UserError(f"--{key}={text}: write a space, and nothing else, before {glued[1]}")
    try:
        return name, convert(text, kinds[name])
    except BadValue as problem:
        kind = number_of(kinds[name]) if is_auto_or_number(kinds[name]) else kinds[name]
        meant = number_meant(text, kind is int, name) if kind in (int, float) else ""
        way_out = f"; write --{key}={meant}" if meant else ""
        if kinds[name] is bool and takes == "words" and text:           # --check=book
            way_out = f"; write --{key} {shlex.quote(text)}"
        raise UserError(f"--{key}={text} is not {problem}{way_out}")


def way_to_a_flag(word: str, kinds: dict) -> str:
    """What to write instead of a word that begins with -- and is no flag."""
    meant = flag_meant(word, kinds)
    name, equals, _ = word[2:].partition("=")
    if meant and (not equals or not re.fullmatch(r"[\w-]+", name)):
        return f"; write {meant}" if ":" in word or not name.isascii() or meant == "--help" else nearest(name, kinds)
    return nearest(name.replace("-", "_"), kinds) or "; see --help"


def needs_value(word: str, kinds: dict) -> bool:
    """Whether a word is a known flag without the value that it needs."""
    name = word[2:].replace("-", "_")
    return word.startswith("--") and name in kinds and kinds[name] not in (bool, AutoPath) \
        and True not in typing.get_args(kinds[name])


def join_values(argv: list, kinds: dict) -> tuple:
    """(the words, mistakes): `--key value`, written with a space, is a mistake, and both of its words are
    left out."""
    words = []
    mistakes = []
    place = 0
    while place < len(argv):
        word = argv[place]
        place += 1
        loose = loose_words(argv, place)
        meant = flag_meant(word, kinds) if word.startswith("-") and word[2:].replace("-", "_") not in kinds else ""
        if loose and not os.path.exists(loose[0]) and needs_value(meant, kinds):        # --minute 3, -o out/a
            mistakes.append(f"{word} {loose[0]}: write {meant}={shlex.quote(loose[0])}")
            place += 1
            continue
        if not loose or loose[0].startswith("-") or not needs_value(word, kinds):
            words.append(word)
            continue
        if loose[0] == "=" and len(loose) > 1:          # --dataset = book
            mistakes.append(f"{word} = {loose[1]}: write {word}={shlex.quote(loose[1])}")
            place += 2
            continue
        if kinds[word[2:].replace("-", "_")] not in (str, Texts) or os.path.exists(loose[0]):
            loose = loose[:1]                           # the others are words by themselves
        value = " ".join(loose).removeprefix("=")
        mistakes.append(f"{' '.join([word, *loose])}: write {word}={shlex.quote(value)}")
        place += len(loose)
    return words, mistakes


def parse(options: type, argv: list, doc: str, takes: str = "config files", hint=None, first: tuple = ()) -> Parsed:
    """Read `argv`, config files and flags: a flag overrides every file, later files and flags
    override earlier ones. Unless takes="config files", words without dashes are returned as they
    are, but for a ~ at their beginning. hint: from a word that is no config file to the command
    that may be meant, or an empty text. first: the flags that `--help` lists before all others.
    `--help` prints `doc` and the fields and exits with 0. All wrong flags are reported in one UserError."""
    kinds = field_types(options)
    parsed = Parsed()
    if "-h" in argv or "--help" in argv:
        print(help_text(options, doc, first=first), flush=True)
        raise SystemExit(0)
    words, mistakes = join_values(argv, kinds)
    for place, word in enumerate(words):
        if word.startswith("--"):
            try:
                name, value = read_flag(word, kinds, takes)
            except UserError as mistake:
                mistakes.append(str(mistake))
                continue
            if kinds[name] == Texts and name in parsed.typed:
                value = parsed.values[name] + value
            parsed.values[name] = value
            parsed.typed.add(name)
        elif takes == "config files":
            if flag := flag_meant(word, kinds):
                raise UserError(f"{word!r} is not a flag (--key=value); write {flag}")
            if words[place - 1].endswith("=") and place and words[place - 1].startswith("--"):
                raise UserError(f"{words[place - 1]} {word}: write {words[place - 1]}{shlex.quote(word)}")
            if flag := flag_in_quotes(words, place, kinds):
                raise UserError(f"{word!r} stands apart from {words[place - 1]}: a text with spaces goes in quotes, "
                                f"{flag}")
            word = expand_home(word)
            phrase = " ".join(loose_words(words, place))
            for name, value in read_config_file(find_config_file(word, hint, phrase), kinds).items():
                if name not in parsed.typed:
                    parsed.values[name] = value
            parsed.files.append(Path(word))
        elif word.startswith("-") and word != "-":
            meant = flag_meant(word, kinds)
            raise UserError(f"unknown flag {word}; " + (f"write {meant}" if meant else
                                                        "flags look like --key=value, see --help"))
        else:
            parsed.words.append(expand_home(word))
    if mistakes:
        raise UserError("; ".join(mistakes))
    return parsed


def loose_words(words: list, place: int) -> list:
    """The words from `place` on, up to the next flag or config file: a text may have been typed without quotes."""
    following = words[place:]
    ends = [number for number, word in enumerate(following) if word.startswith("--") or word.endswith(".py")]
    return following[:ends[0]] if ends else following


def flag_in_quotes(words: list, place: int, kinds: dict) -> str:
    """The flag before `place` with the words that follow it, as --start='The fox' for --start=The fox; empty if
    that flag takes no text or no loose word follows."""
    name, equals, _ = words[place - 1].removeprefix("--").partition("=") if place else ("", "", "")
    loose = loose_words(words, place)
    takes_text = kinds.get(name.replace("-", "_")) in (str, Texts)
    if not equals or not loose or not takes_text or os.path.exists(loose[0]):
        return ""
    _, _, text = " ".join([words[place - 1], *loose]).partition("=")
    return f"--{name}={shlex.quote(text.strip(QUOTES))}"


def find_config_file(word: str, hint=None, phrase: str = "") -> str:
    """`word`, if it names a config file that is there. phrase: it and the loose words after it."""
    if not word.endswith(".py"):
        config = f"{word}.py".replace("\\", "/")
        if "/" in config and os.path.isfile(config):
            raise UserError(f"{word!r} is neither a config file (NAME.py) nor a flag (--key=value); "
                            f"did you mean {config}?")
        if command := hint(word if os.path.exists(word) else phrase or word) if hint else "":
            raise UserError(f"{word!r} is neither a config file (NAME.py) nor a flag (--key=value); "
                            f"you may want: {command}")
        raise UserError(f"{word!r} is neither a config file (NAME.py) nor a flag (--key=value)"
                        f"{nearest_config(word) or '; see --help'}")
    if not os.path.isfile(word):            # Path.is_file raises on a name that is too long
        raise UserError(f"no config file {word}{nearest_config(word)}")
    return word


# -- stored settings ---------------------------------------------------------------------------------------------------

def from_dict(options: type, stored: dict, source) -> dict:
    """Checked field values of `options` from a plain dict that was stored, such as a checkpoint's
    config."""
    kinds = field_types(options)
    values = {}
    for name, value in stored.items():
        if name not in kinds:
            raise UserError(f"{source}: its config has a field {name!r}, which this version does not know")
        try:
            values[name] = convert(value, kinds[name])
        except BadValue as problem:
            raise UserError(f"{source}: its config has {name}={reprlib.repr(value)}, which is not {problem}")
    return values


def merge(options: type, stored: dict, parsed: Parsed, fixed: set, source, lower: Iterable = ()) -> tuple:
    """(values, changed): the stored settings with the flags typed now, and what these change. A
    config file changes nothing, unless it lowers one of `lower`. Changing a `fixed` field raises
    UserError, unless it lowers one of those."""
    values = {field.name: field.default for field in fields(options)} | from_dict(options, stored, source)
    lowered = {name for name in lower if name in parsed.values and parsed.values[name] < values[name]}
    changed = {name: parsed.values[name] for name in sorted(parsed.typed | lowered)
               if parsed.values[name] != values[name] and name not in ("init_from", "out_dir")}
    refused = [f"{name}={value} (the run has {values[name]})" for name, value in changed.items()
               if name in fixed and name not in lowered]
    if refused:
        raise UserError(f"{source} cannot resume with {', '.join(refused)}: leave the flag out, or start from scratch")
    return values | changed, {name: (values[name], value) for name, value in changed.items()}


def print_changes(changed: dict):
    """Print which stored settings the flags change. Of several processes, only the first prints."""
    if changed and os.environ.get("RANK", "0") == "0":
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        print(f"changed  since the run was saved: {printable(changes)}", flush=True)


def print_overruled(values: dict, parsed: Parsed, names: Iterable, fixed: set, source):
    """Print which settings of the config files, among `names`, a checkpoint overrules with its own
    `values`. Of several processes, only the first prints."""
    overruled = [name for name in sorted(names) if name in parsed.values and name not in parsed.typed
                 and parsed.values[name] != values[name]]
    if not overruled or os.environ.get("RANK", "0") != "0":
        return
    files = " and ".join(str(path) for path in parsed.files)
    kept = ", ".join(f"{name}={values[name]} (not {parsed.values[name]})" for name in overruled)
    ways_out = []
    if changeable := [name for name in overruled if name not in fixed]:
        ways_out.append(f"a flag changes {' or '.join(changeable)}")
    if unchangeable := [name for name in overruled if name in fixed]:
        ways_out.append(f"only a run from scratch has another {' or '.join(unchangeable)}")
    text = f"from {source}, not from {files}: {kept}; {'; '.join(ways_out)}"
    print(f"kept     {printable(text)}", flush=True)


# -- --help ------------------------------------------------------------------------------------------------------------

def comments(options: type) -> list:
    """[(group, field name, comment)] in the order of the class's source, then of its parents': the
    comments are the one place where fields are described."""
    rows = []
    for owner in options.__mro__:
        if "__dataclass_fields__" not in vars(owner):
            continue
        group = ""
        for line in inspect.getsource(owner).splitlines():
            if heading := re.match(r"\s+# -- (.+)", line):
                group = heading[1].strip(" -")
            elif entry := re.match(r"\s+(\w+): .*?\s# (.+)", line):
                rows.append([group, entry[1], entry[2]])
            elif rows and (more := re.match(r"\s{20,}# (.+)", line)):
                rows[-1][2] += " " + more[1]
    return rows


def help_entry(name: str, default, kind, comment: str, width: int) -> list:
    """The lines of one flag: its name and default, and what it does."""
    column = 36 if width >= 100 else 30                 # where the comments begin
    if typing.get_origin(kind) is typing.Literal:
        comment += " [" + " | ".join(map(str, typing.get_args(kind))) + "]"
    lines = []
    entry = f"  --{name}={'' if kind == Texts else default}"
    if len(entry) > column - 2:                         # no room: the comment goes below
        lines.append(entry)
        entry = ""
    return lines + textwrap.wrap(comment, width - 1, initial_indent=entry.ljust(column),
                                 subsequent_indent=" " * column, break_on_hyphens=False)


def help_text(options: type, doc: str, width: int = 0, first: tuple = ()) -> str:
    """What --help prints: the first paragraph of `doc`, the examples, which are its indented paragraphs,
    its other prose, the flags named in `first`, and the other fields in their groups. width: columns to
    wrap at; 0: those of the terminal, 80 in a pipe."""
    width = width or min(120, max(50, shutil.get_terminal_size().columns))
    kinds = field_types(options)
    defaults = {field.name: field.default for field in fields(options)}
    paragraphs = re.split(r"\n\n+", doc.strip("\n"))
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("    ")]
    prose = [paragraph for paragraph in paragraphs if paragraph not in examples]
    lines = [*textwrap.wrap(prose[0], width - 1, break_on_hyphens=False), ""]
    if examples:
        lines += ["examples:", *examples, ""]
    for paragraph in prose[1:]:
        lines += [*textwrap.wrap(paragraph, width - 1, break_on_hyphens=False), ""]
    lines.append("Flags and their defaults (a bare --flag means --flag=True):")
    rows = comments(options)
    by_name = {name: comment for _, name, comment in rows}
    if first:
        lines += ["", "most used:"]
        for name in first:
            lines += help_entry(name, defaults[name], kinds[name], by_name[name], width)
    group = None
    for heading, name, comment in rows:
        if name in first:
            continue
        if heading != group:
            group = heading
            lines += ["", f"{heading}:"]
        lines += help_entry(name, defaults[name], kinds[name], comment, width)
    return "\n".join(lines)
