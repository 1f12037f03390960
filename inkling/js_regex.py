"""The pattern of a byte-pair encoding, which tiktoken reads in Rust's syntax, as a regular expression of
JavaScript that matches the same.

Every browser understands what comes out (flag u). What JavaScript lacks is spelled in other ways: a
possessive quantifier X++ is a lookahead, which never gives back what it has matched, and a reference
to that, (?=(?<p1>X+))\\k<p1>; letters under (?i:...) become sets of their cases. Rust's syntax:
docs.rs/regex, docs.rs/fancy-regex.
"""

import re
import sys
from functools import cache

SYNTAX = set("^$\\.*+?()[]{}|/")        # what JavaScript allows to be escaped
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}
# Classes that mean something else in JavaScript, or only ASCII. They also work inside a set.
CLASSES = {"s": r"\p{White_Space}", "S": r"\P{White_Space}", "d": r"\p{Nd}", "D": r"\P{Nd}"}
WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}"
CATEGORIES = {"L", "Lu", "Ll", "Lt", "LC", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd",
              "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "C", "Cc", "Cf", "Co",
              "Cn", "Letter", "Mark", "Number", "Punctuation", "Symbol", "Separator", "Alphabetic", "White_Space",
              "Uppercase", "Lowercase", "Emoji", "ASCII", "Any"}
OF_CASE = {"Lu", "Ll", "Lt", "LC", "Uppercase", "Lowercase"}
SCRIPTS = {"Han", "Hiragana", "Katakana", "Hangul", "Bopomofo", "Latin", "Greek", "Cyrillic", "Arabic", "Hebrew",
           "Thai", "Devanagari", "Bengali", "Tamil", "Georgian", "Armenian", "Common"}
LARGEST_RANGE = 1000                    # under (?i:...), where each character is looked up


def to_javascript(pattern: str) -> str:
    """The pattern for new RegExp(..., "u"). Raises ValueError that names what JavaScript cannot
    express, or what is no pattern at all."""
    return Translator(pattern).translate()


@cache
def folded() -> dict:
    """{case-folded character: all characters that fold to it}, for those of several cases."""
    cases = {}
    for value in range(sys.maxunicode + 1):
        char = chr(value)
        fold = char.casefold()
        if len(fold) == 1 and fold != char:
            cases.setdefault(fold, {fold}).add(char)
    return cases


def cases_of(char: str) -> list:
    return sorted(folded().get(char.casefold(), {char}))


def escape(char: str) -> str:
    """One character that stands for itself."""
    if char in SYNTAX:
        return f"\\{char}"
    is_plain = char.isprintable() and char != "-"       # which means a range within [...]
    return char if is_plain else f"\\u{{{ord(char):x}}}"


class Translator:
    """Reads a pattern once from left to right, a method for each kind of part. A method begins at the
    part's first character and returns the part as JavaScript."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.place = 0
        self.possessive = 0             # groups so far that stand for possessive parts
        self.lookbehinds = 0            # those around this place

    def translate(self) -> str:
        translated = self.alternatives(ignores_case=False)
        if self.place < len(self.pattern):
            raise ValueError(f"a ) too many at {self.place}")
        return translated

    def next(self, count: int = 1) -> str:
        """The next characters, which are passed over."""
        text = self.pattern[self.place:self.place + count]
        if len(text) < count:
            raise ValueError("it ends too early")
        self.place += count
        return text

    def skip(self, text: str) -> bool:
        """Whether `text` comes next; then it is passed over."""
        if not self.pattern.startswith(text, self.place):
            return False
        self.place += len(text)
        return True

    def match(self, expression: str) -> re.Match | None:
        """What of this expression of Python's comes next; it is passed over."""
        match = re.compile(expression).match(self.pattern, self.place)
        if match:
            self.place = match.end()
        return match

    def alternatives(self, ignores_case: bool) -> str:
        """Everything up to the group's end."""
        parts = []
        while self.place < len(self.pattern) and self.pattern[self.place] != ")":
            if self.skip("|"):
                parts.append("|")
            elif self.skip("(?i)"):
                ignores_case = True
            else:
                parts.append(self.quantified(ignores_case))
        return "".join(parts)

    def quantified(self, ignores_case: bool) -> str:
        part = self.atom(ignores_case)
        quantifier = self.match(r"[*+?]|\{\d+(,\d*)?\}")
        if not quantifier:
            return part
        part += quantifier[0]
        if self.skip("?"):
            return f"{part}?"
        return self.without_giving_back(part) if self.skip("+") else part

    def without_giving_back(self, part: str) -> str:
        if self.lookbehinds:
            raise ValueError("a possessive part in a lookbehind")
        self.possessive += 1
        name = f"p{self.possessive}"
        return rf"(?:(?=(?<{name}>{part}))\k<{name}>)"

    def atom(self, ignores_case: bool) -> str:
        char = self.next()
        if char == "(":
            return self.group(ignores_case)
        if char == "[":
            return self.set(ignores_case)
        if char == "\\":
            return self.escaped(ignores_case)
        if char == ".":
            return r"[^\n]"
        if char in "^$":
            return char
        if char in "*+?{}":
            raise ValueError(f"a {char} that repeats nothing, at {self.place - 1}")
        return self.literal(char, ignores_case)

    def literal(self, char: str, ignores_case: bool) -> str:
        cases = cases_of(char) if ignores_case else [char]
        spelled = "".join(map(escape, cases))
        return spelled if len(cases) == 1 else f"[{spelled}]"

    def group(self, ignores_case: bool) -> str:
        kind = self.match(r"\?(?:[:=!>]|<[=!]|i:|-i:|P?<\w+>)")
        kind = kind[0] if kind else ""
        if not kind and self.pattern.startswith("?", self.place):
            raise ValueError(f"the group ({self.pattern[self.place:self.place + 4]}")
        if kind in ("?i:", "?-i:"):
            ignores_case = kind == "?i:"
        is_lookbehind = kind in ("?<=", "?<!")
        self.lookbehinds += is_lookbehind
        inside = self.alternatives(ignores_case)
        if not self.skip(")"):
            raise ValueError("a ( without its )")
        self.lookbehinds -= is_lookbehind
        if kind == "?>":
            return self.without_giving_back(inside)
        opening = kind if kind in ("?=", "?!", "?<=", "?<!") else "?:"
        return f"({opening}{inside})"

    def set(self, ignores_case: bool) -> str:
        """[...], whose first character may be a ] that stands for itself."""
        negation = "^" if self.skip("^") else ""
        parts = [r"\]"] if self.skip("]") else []
        while not self.skip("]"):
            parts.append(self.member(ignores_case))
        return f"[{negation}{''.join(parts)}]"

    def member(self, ignores_case: bool) -> str:
        """A class, a character or a range of characters."""
        for operation in ("[", "&&", "--", "~~"):
            if self.skip(operation):
                raise ValueError(f"{operation} within [...]")
        first = self.member_end()
        if len(first) > 1:              # a class
            return self.check_case(first, ignores_case)
        last = first
        if self.match(r"-(?!\])"):
            last = self.member_end()
            if len(last) > 1 or last < first:
                raise ValueError(f"no range: {first}-{last}")
        if not ignores_case:
            return escape(first) if first == last else f"{escape(first)}-{escape(last)}"
        if ord(last) - ord(first) > LARGEST_RANGE:
            raise ValueError(f"the range {first}-{last} under (?i:...)")
        chars = map(chr, range(ord(first), ord(last) + 1))
        return "".join(escape(case) for char in chars for case in cases_of(char))

    def member_end(self) -> str:
        """A character, as itself, or a class, as JavaScript has it."""
        char = self.next()
        return self.escape_sequence(in_set=True) if char == "\\" else char

    def escaped(self, ignores_case: bool) -> str:
        sequence = self.escape_sequence(in_set=False)
        if len(sequence) == 1:
            return self.literal(sequence, ignores_case)
        return self.check_case(sequence, ignores_case)

    def check_case(self, part: str, ignores_case: bool) -> str:
        if ignores_case and part[3:-1] in OF_CASE:
            raise ValueError(f"{part} under (?i:...)")
        return part

    def escape_sequence(self, in_set: bool) -> str:
        r"""What follows a \: one character, or a class of more letters."""
        if code := self.match(r"x([0-9A-Fa-f]{2})|[xu]\{([0-9A-Fa-f]+)\}|u([0-9A-Fa-f]{4})"):
            return chr(int(next(filter(None, code.groups())), 16))
        if name := self.match(r"([pP])(?:\{(\^?)(\w+)\}|(\w))"):
            return self.property(name)
        char = self.next()
        if char in CLASSES:
            return CLASSES[char]
        if char == "w" or (char == "W" and not in_set):
            return WORD if in_set else f"[{'^' if char == 'W' else ''}{WORD}]"
        if char == "z" and not in_set:
            return "(?![^])"
        if char == "A" and not in_set:
            return "(?<![^])"
        if char in CONTROLS:
            return CONTROLS[char]
        if char.isalnum():
            raise ValueError(f"\\{char}")
        return char

    def property(self, match: re.Match) -> str:
        letter = match[1]
        if match[2]:                    # \p{^L} is \P{L}
            letter = "P" if letter == "p" else "p"
        name = match[3] or match[4]
        if name in CATEGORIES:
            return f"\\{letter}{{{name}}}"
        if name in SCRIPTS:
            return f"\\{letter}{{Script={name}}}"
        raise ValueError(f"\\p{{{name}}}")
