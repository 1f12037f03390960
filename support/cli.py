"""Config files and --key=value flags for any dataclass, `--help` from its comments, and errors of one line.

A program declares its settings once, as a flat dataclass with a default and a comment per field:

    @dataclass
    class Options:
        # -- sampling
        temperature: float = 0.8            # 0 is greedy

and calls `parse(Options, argv, doc)`. A field's declared type (bool, int, float, str, Literal[...], or
tuple[str, ...] for a flag that may be given several times) decides how its text is read; nothing is ever
evaluated. Only a config file named by the user is run as Python.
"""

import difflib
import inspect
import math
import os
import re
import reprlib
import runpy
import shutil
import sys
import textwrap
import time
import traceback
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

TEXTS = tuple[str, ...]                 # a flag that may be given several times
LARGEST_INT = 2**62                     # larger integers overflow in numpy and torch


class BadValue(ValueError):
    """A value that its field's declared type does not admit; the message says what was expected."""


@dataclass
class Parsed:
    """What a command line said: `values` for every field it set, `typed` the names given as flags (not in files)."""

    values: dict = field(default_factory=dict)
    typed: set = field(default_factory=set)
    files: list = field(default_factory=list)          # config files, in order
    words: list = field(default_factory=list)          # other words without dashes, when the program takes them


def program() -> str:
    return Path(sys.argv[0]).name or "inkling"


def printable(text: str) -> str:
    """`text` with control characters and unpaired surrogates escaped, so that it cannot act on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def fail(message: str, code: int = 2) -> NoReturn:
    """Say in one line what is wrong and how to go on, then leave with `code` (2: the user's input). What is wrong with
    the input all of several processes find: those but the first wait to be ended by torchrun, which it does to all when
    one has failed, before they say it too."""
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)
    print(f"{program()}: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run(main) -> NoReturn:
    """Run a program: UTF-8 wherever it prints, and no traceback for Ctrl-C or a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:                 # the reader has enough, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def nearest(name: str, known) -> str:
    """`; did you mean --x?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean --{close[0]}?" if close else ""


def nearest_config(word: str) -> str:
    """`; did you mean config/NAME.py?` for the config file whose name comes closest, or nothing."""
    known = {path.name: path for path in sorted(Path("config").glob("*.py"))}
    close = difflib.get_close_matches(os.path.basename(word), known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else ""


def expected(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(kind, "text")


def convert(value, kind):
    """Read `value`, a flag's text or an object from a config file, as `kind`. Raises BadValue."""
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if type(value) is type(choice) and value == choice:
                return choice
            if isinstance(value, str) and value.strip().lower() == str(choice).lower():
                return choice
        raise BadValue(expected(kind))
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.strip().lower() in ("true", "1", "yes")
        raise BadValue(expected(kind))
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise BadValue(expected(kind))
        try:
            if kind is int and not isinstance(value, float):
                try:
                    number = int(value)
                except ValueError:
                    number = float(value)       # so that 1e3 is a whole number
            else:
                number = float(value)
        except (ValueError, OverflowError):
            raise BadValue(expected(kind)) from None
        if isinstance(number, float) and not math.isfinite(number):
            raise BadValue(f"{expected(kind)} that is finite")
        if kind is int:
            if number != int(number):
                raise BadValue(expected(kind))
            if abs(number) > LARGEST_INT:
                raise BadValue(f"a whole number of at most {LARGEST_INT:,}")
            return int(number)
        return number
    if kind == TEXTS and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if not isinstance(value, str):
        raise BadValue(expected(kind))
    return (value,) if kind == TEXTS else value


def read_config_file(path: str, kinds: dict) -> dict:
    """The fields that a Python config file assigns. Names that start with `_` and imported modules are its own."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        fail(f"cannot read the config file {path}: {error.strerror or error}")
    except SystemExit:
        fail(f"{path} tried to exit; a config file holds plain assignments")
    except BaseException as error:      # whatever the file raises is the user's to see, in one line
        if isinstance(error, KeyboardInterrupt):
            raise
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == path else line
        fail(f"{path}, line {line or '?'}: {type(error).__name__}: {error}")
    values = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if name not in kinds:
            fail(f"{path} sets {name}, which is no field{nearest(name, kinds)} "
                 "(start a name with _ to keep it to the file)")
        try:
            values[name] = convert(value, kinds[name])
        except BadValue as problem:
            fail(f"{path}: {name}={value!r} is not {problem}")
    return values


def parse(options: type, argv: list, doc: str, takes: str = "config files") -> Parsed:
    """Read `argv`: config files in order, then flags; later ones win. Unless takes="config files", words without dashes
    are returned as they are. `--help` prints `doc` and the fields, and leaves with 0."""
    kinds = typing.get_type_hints(options)
    parsed = Parsed()
    for word in argv:
        if word in ("-h", "--help"):
            print(help_text(options, doc))
            raise SystemExit(0)
        if not word.startswith("--"):
            if takes != "config files":
                if word.startswith("-") and word != "-":
                    fail(f"unknown flag {word}; flags look like --key=value, see --help")
                parsed.words.append(word)
                continue
            if not word.endswith(".py"):
                fail(f"{word!r} is neither a config file (NAME.py) nor a flag (--key=value)"
                     f"{nearest_config(word) or '; see --help'}")
            if not os.path.isfile(word):         # Path.is_file raises on a name that is too long
                fail(f"no config file {word}{nearest_config(word)}")
            values = read_config_file(word, kinds)
            parsed.values.update((name, value) for name, value in values.items() if name not in parsed.typed)
            parsed.files.append(Path(word))
            continue
        key, equals, text = word[2:].partition("=")
        name = key.replace("-", "_")
        if name not in kinds:
            fail(f"unknown flag --{key}{nearest(name, kinds) or '; see --help'}")
        if not equals:
            if kinds[name] is not bool and True not in typing.get_args(kinds[name]):
                fail(f"--{key} needs a value: --{key}={expected(kinds[name]).upper().replace(' ', '_')}")
            text = "True"
        try:
            value = convert(text, kinds[name])
        except BadValue as problem:
            fail(f"--{key}={text} is not {problem}")
        if kinds[name] == TEXTS and name in parsed.typed:
            value = parsed.values[name] + value
        parsed.values[name] = value
        parsed.typed.add(name)
    return parsed


def from_dict(options: type, stored: dict, source) -> dict:
    """Checked field values of `options` from a plain dict that was stored, such as a checkpoint's config."""
    kinds, values = typing.get_type_hints(options), {}
    for name, value in stored.items():
        if name not in kinds:
            fail(f"{source}: its config has a field {name!r}, which this version does not know")
        try:
            values[name] = convert(value, kinds[name])
        except BadValue as problem:
            fail(f"{source}: its config has {name}={reprlib.repr(value)}, which is not {problem}")
    return values


def merge(options: type, stored: dict, parsed: Parsed, fixed: set, source, lower: Iterable = ()) -> dict:
    """The stored settings, then the flags typed now; what a config file says changes nothing, unless it lowers one of
    `lower`. A typed change of a `fixed` field is refused (unless it lowers one of those), any other is printed."""
    values = {field.name: field.default for field in fields(options)} | from_dict(options, stored, source)
    given = parsed.typed | {name for name in lower if name in parsed.values and parsed.values[name] < values[name]}
    changed = {name: parsed.values[name] for name in sorted(given)
               if parsed.values[name] != values[name] and name not in ("init_from", "out_dir")}
    if refused := [f"{name}={value} (it has {values[name]})" for name, value in changed.items()
                   if name in fixed and not (name in lower and value < values[name])]:
        fail(f"{source} cannot go on with {', '.join(refused)}: leave the flag out, or start from scratch")
    if changed and os.environ.get("RANK", "0") == "0":          # torchrun's first process speaks for all
        changes = [f"{name} {values[name]} -> {value}" for name, value in changed.items()]
        print(f"changed  since the run was saved: {printable(', '.join(changes))}", flush=True)
    return values | changed


def comments(options: type) -> list:
    """[(group, field name, comment)] in the order of the class's source, which is the one place they are written."""
    group, rows = "", []
    for line in inspect.getsource(options).splitlines():
        if heading := re.match(r"\s+# -- (.+)", line):
            group = heading[1].strip(" -")
        elif entry := re.match(r"\s+(\w+): .*?\s# (.+)", line):
            rows.append([group, entry[1], entry[2]])
        elif rows and (more := re.match(r"\s{20,}# (.+)", line)):
            rows[-1][2] += " " + more[1]
    return rows


def help_text(options: type, doc: str, width: int = 0) -> str:
    """What --help prints: the prose of `doc`, the fields in their groups, and last the examples, which are the indented
    paragraphs of `doc`. width: columns to wrap at; 0: those of the terminal, 80 in a pipe."""
    width = width or min(120, max(50, shutil.get_terminal_size().columns))
    column = 36 if width >= 100 else 30                 # where the comments begin
    kinds, defaults = typing.get_type_hints(options), {f.name: f for f in fields(options)}
    parts = re.split(r"\n\n+", doc.strip("\n"))
    examples = [part for part in parts if part.startswith("    ")]
    lines, group = [], None
    for part in parts:
        if part not in examples:
            lines += [*textwrap.wrap(part, width - 1, break_on_hyphens=False), ""]
    lines += ["Flags and their defaults (a bare --flag means --flag=True):"]
    for heading, name, comment in comments(options):
        if heading != group:
            group = heading
            lines += ["", f"{heading}:"]
        default = defaults[name].default if kinds[name] != TEXTS else ""
        if typing.get_origin(kinds[name]) is typing.Literal:
            comment += " [" + " | ".join(map(str, typing.get_args(kinds[name]))) + "]"
        entry, indent = f"  --{name}={default}", " " * column
        if len(entry) > column - 2:                     # no room: the comment goes below
            lines.append(entry)
            entry = ""
        lines += textwrap.wrap(comment, width - 1, initial_indent=entry.ljust(column), subsequent_indent=indent,
                               break_on_hyphens=False)
    return "\n".join([*lines, "", "examples:", *examples] if examples else lines)
