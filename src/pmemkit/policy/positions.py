"""Where each key of a TOML text stands, which ``tomllib`` does not tell.

The text is walked once, token by token; values are stepped over, not understood:

    [[rule]]                      ("rule", 0)                      line 1
    want.mode = "fsdax"           ("rule", 0, "want", "mode")      line 2
    match = { node = [0,          ("rule", 0, "match", "node", 0)  line 3
                      1] }        ("rule", 0, "match", "node", 1)  line 4

Invariants:
1. In a text that ``tomllib`` reads, every table, list and value has its line: of the header or of
   the first part of the key, and of each element of a list.
2. In any other text the walk ends quietly where it understands no more, and has the lines before.
3. Nothing nests deeper than :data:`DEPTH_MOST`: what does is refused before ``tomllib``, whose time
   and stack grow with it, sees the text.

What this does not do: check TOML. ``tomllib`` has the say on what is valid.
"""

import re
import tomllib
from bisect import bisect_left
from contextlib import suppress
from typing import Final

__all__ = ["DEPTH_MOST", "Place", "TooDeep", "positions"]

Place = tuple[str | int, ...]
"""The way from the top of a document to a value: keys, and numbers of elements from 0 on."""

DEPTH_MOST: Final = 32
"""Parts of a key with its header, and brackets within brackets."""

_BLANK: Final = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")
_SPACE: Final = re.compile(r"[ \t]*+")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]++")
_STRING: Final = re.compile(
    r'"""(?:[^"\\]++|\\[\s\S]|"{1,2}(?!"))*+"{3,5}'
    r"|'''(?:[^']++|'{1,2}(?!'))*+'{3,5}"
    r'|"(?!"")(?:[^"\\\n]++|\\.)*+"'
    r"|'(?!'')[^'\n]*+'"
)
_SCALAR: Final = re.compile(r"[^\s,\[\]{}#\"'=][^,\[\]{}#\n]*+")
"""A number, a date or a boolean, up to what may come behind it."""


class TooDeep(ValueError):
    """The text nests deeper than a policy ever needs. ``line`` says where."""

    def __init__(self, line: int) -> None:
        super().__init__(f"more than {DEPTH_MOST} tables or lists lie within one another")
        self.line = line


class _NotUnderstood(Exception):
    """The text goes on in a way that is not TOML."""


def positions(text: str) -> dict[Place, int]:
    """The line, from 1 on, of everything in a TOML text. Raises :class:`TooDeep`."""
    walk = _Walk(text)
    with suppress(_NotUnderstood):
        walk.document()
    return walk.lines


class _Walk:
    """A walk over a text. ``at`` is behind everything understood so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Place, int] = {(): 1}
        self.counts: dict[Place, int] = {}
        """Lists that ``[[headers]]`` make, and how many tables each has so far."""
        self.ends = [match.start() for match in re.finditer("\n", text)]

    def line(self) -> int:
        return bisect_left(self.ends, self.at) + 1

    def document(self) -> None:
        table: Place = ()
        while self.skip(_BLANK) < len(self.text):
            if self.text.startswith("[", self.at):
                table = self.header()
            else:
                self.pair(table, 0)

    def header(self) -> Place:
        """``[a.b]`` or ``[[a.b]]``; gives the table that it opens."""
        line = self.line()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        self.skip(_SPACE)
        keys = self.key()
        self.expect("]" * brackets)
        place: Place = ()
        for key in keys[:-1]:
            place = self.entered((*place, key), line)
        place = (*place, keys[-1])
        self.lines.setdefault(place, line)
        if brackets == 2:
            self.counts[place] = self.counts.get(place, 0) + 1
            place = self.entered(place, line)
        self.lines[place] = line
        return place

    def entered(self, place: Place, line: int) -> Place:
        """The table of this name, or the last one of the list of this name."""
        self.lines.setdefault(place, line)
        if place in self.counts:
            place = (*place, self.counts[place] - 1)
            self.lines.setdefault(place, line)
        return place

    def pair(self, table: Place, depth: int) -> None:
        """``key = value`` in a table."""
        line = self.line()
        keys = self.key()
        if len(table) + len(keys) > DEPTH_MOST:
            raise TooDeep(line)
        self.expect("=")
        self.skip(_SPACE)
        for count in range(1, len(keys) + 1):
            self.lines.setdefault((*table, *keys[:count]), line)
        self.value((*table, *keys), depth)

    def key(self) -> list[str]:
        """The parts of a key, and the blanks behind it."""
        keys = [self.key_part()]
        while self.skip(_SPACE) < len(self.text) and self.text[self.at] == ".":
            self.at += 1
            self.skip(_SPACE)
            keys.append(self.key_part())
            if len(keys) > DEPTH_MOST:
                raise TooDeep(self.line())
        return keys

    def key_part(self) -> str:
        if not self.text.startswith(("'", '"'), self.at):
            return self.take(_BARE_KEY)
        literal = self.take(_STRING)
        if "\\" not in literal:
            return literal[1:-1]
        try:
            return str(tomllib.loads(f"key = {literal}")["key"])
        except ValueError:
            raise _NotUnderstood from None

    def value(self, place: Place, depth: int) -> None:
        letter = self.text[self.at : self.at + 1]
        if letter in ("[", "{") and depth + 1 > DEPTH_MOST:
            raise TooDeep(self.line())
        if letter == "[":
            self.elements(place, depth + 1)
        elif letter == "{":
            self.pairs(place, depth + 1)
        else:
            self.take(_STRING if letter in ('"', "'") else _SCALAR)

    def elements(self, place: Place, depth: int) -> None:
        """``[value, value]``, over as many lines as it likes."""
        self.at += 1
        index = 0
        while self.skip(_BLANK) < len(self.text) and self.text[self.at] != "]":
            self.lines[(*place, index)] = self.line()
            self.value((*place, index), depth)
            self.skip(_BLANK)
            index += 1
            if not self.text.startswith("]", self.at):
                self.expect(",")
        self.expect("]")

    def pairs(self, place: Place, depth: int) -> None:
        """``{ key = value, key = value }``."""
        self.at += 1
        while self.skip(_BLANK) < len(self.text) and self.text[self.at] != "}":
            self.pair(place, depth)
            self.skip(_BLANK)
            if not self.text.startswith("}", self.at):
                self.expect(",")
        self.expect("}")

    def skip(self, pattern: re.Pattern[str]) -> int:
        """Steps over what may be there; gives the position behind it."""
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.at

    def take(self, pattern: re.Pattern[str]) -> str:
        """Steps over what has to be there."""
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _NotUnderstood
        self.at = match.end()
        return match.group()

    def expect(self, mark: str) -> None:
        if not self.text.startswith(mark, self.at):
            raise _NotUnderstood
        self.at += len(mark)
