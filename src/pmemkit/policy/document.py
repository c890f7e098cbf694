"""A TOML document as tables that know their lines and collect what is wrong with them.

    document = read_document(text, name)      # TOML, or one refusal with the line
    table = document.table("guards", …)       # keys that do not belong here are problems
    table.flag("keep_if_mounted", True)       # so are values of a wrong type
    document.problems.raise_if_any()          # one line each: name:line: what is wrong

Invariants:
1. Whatever the text says, what comes out is values or :class:`InvalidArgument`; a reader that gives
   ``None`` for a key that is there has added a problem.
2. A message is one line of bounded length, however long or odd the value is.

What this does not do: know what a policy is.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from pmemkit.errors import InvalidArgument
from pmemkit.policy.positions import Place, TooDeep, positions
from pmemkit.units import parse_size

__all__ = ["LIST_MOST", "TEXT_SIZE_MOST", "Problems", "Table", "read_document", "refusal", "shown"]

TEXT_SIZE_MOST: Final = 1 << 20
"""Bytes of a file."""
LIST_MOST: Final = 1024
"""Elements of a list of values."""
_PROBLEMS_MOST: Final = 100
_SHOWN_MOST: Final = 60
_NUMBER_BITS_MOST: Final = 128
_AT: Final = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)
_DIGITS: Final = re.compile(r"[0-9_]{4300,}")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_TYPES: Final = ((bool, "a boolean"), (int, "a number"), (float, "a float"), (str, "a string"))

_T = TypeVar("_T")


def refusal(name: str, line: int, text: str) -> InvalidArgument:
    """One problem, as an error."""
    return InvalidArgument(f"{name}:{line}: {text}", op="policy")


def read_document(text: str, name: str, keys: Mapping[str, Sequence[str]], word: str) -> "Table":
    """The top table of a TOML text. ``keys`` has those of every word, ``word`` is that of the top.

    Raises :class:`InvalidArgument` for what is no TOML, or more than a policy ever is.
    """
    _check_text(text, name)
    try:
        lines = positions(text)
        values = tomllib.loads(text)
    except TooDeep as cause:
        raise refusal(name, cause.line, str(cause)) from None
    except tomllib.TOMLDecodeError as cause:
        raise _syntax_error(text, name, str(cause)) from None
    except (ValueError, RecursionError):
        # Python does not convert a decimal number of thousands of digits.
        match = _DIGITS.search(text)
        line = text.count("\n", 0, match.start()) + 1 if match else 1
        raise refusal(name, line, "is not read: a number of thousands of digits") from None
    return Table(Problems(name, lines), (), values, word, keys)


def _check_text(text: str, name: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as cause:
        line = text.count("\n", 0, cause.start) + 1
        raise refusal(name, line, f"character {text[cause.start]!a} is no Unicode text") from None
    if size > TEXT_SIZE_MOST:
        text = f"is longer than {TEXT_SIZE_MOST} bytes; a policy never is"
        raise refusal(name, 1, text)
    if text.startswith("\ufeff"):
        raise refusal(name, 1, "starts with a byte order mark; save it as UTF-8 without one")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise refusal(name, line, "a NUL byte: this is no text")


def _syntax_error(text: str, name: str, message: str) -> InvalidArgument:
    """What ``tomllib`` says, with its line where ours stand."""
    match = _AT.fullmatch(message)
    if match is None:
        line = text.rstrip("\n").count("\n") + 1
        return refusal(name, line, f"is no TOML: {_lowered(message)}")
    said, line, column = match.group(1), int(match.group(2)), match.group(3)
    return refusal(name, line, f"is no TOML: {_lowered(said)}, at column {column}")


def _lowered(sentence: str) -> str:
    # Keys come as the tuple that they are in there.
    sentence = re.sub(r"\('.*\) ", "a table ", sentence, flags=re.DOTALL)
    return _cut(sentence[:1].lower() + sentence[1:])


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_MOST else text[: _SHOWN_MOST - 1] + "…"


def shown(value: Any) -> str:
    """A value as the file has it, on one line and not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        bits = value.bit_length()
        return str(value) if bits <= _NUMBER_BITS_MOST else f"(a number of {bits} bits)"
    if isinstance(value, str):
        # Cut first: escapes of a cut text are whole. Not only ASCII, but nothing unprintable.
        quoted = json.dumps(_cut(value), ensure_ascii=False)
        return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in quoted)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]" if len(value) < 4 and _flat(value) else "[…]"
    return "{…}" if isinstance(value, dict) else str(value)


def _flat(values: list[Any]) -> bool:
    return not any(isinstance(each, (list, dict)) for each in values)


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return next((word for type_, word in _TYPES if isinstance(value, type_)), "a date or time")


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) and len(key) <= _SHOWN_MOST else shown(key)


class Problems:
    """What is wrong with a document, each with the line it concerns."""

    def __init__(self, name: str, lines: Mapping[Place, int]) -> None:
        self.name = name
        self._lines = lines
        self._found: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    def line(self, place: Place) -> int:
        """Where something stands; of what is not there, where it would."""
        while place not in self._lines:
            place = place[:-1]
        return self._lines[place]

    def add(self, place: Place, text: str) -> None:
        """Notes a problem."""
        self._found.append((self.line(place), text))

    def raise_if_any(self) -> None:
        """Raises :class:`InvalidArgument` with a line for each problem, in the file's order."""
        if not self._found:
            return
        found = sorted(self._found, key=lambda each: each[0])
        lines = [f"{self.name}:{line}: {text}" for line, text in found[:_PROBLEMS_MOST]]
        if len(found) > _PROBLEMS_MOST:
            lines.append(f"{self.name}: and {len(found) - _PROBLEMS_MOST} problems more")
        raise InvalidArgument("\n".join(lines), op="policy")


class Table:
    """A table of the document. ``word`` says which of the known ones it is."""

    def __init__(
        self,
        problems: Problems,
        place: Place,
        values: Mapping[str, Any],
        word: str,
        keys: Mapping[str, Sequence[str]],
    ) -> None:
        self.problems = problems
        self.place = place
        self.values = values
        self.word = word
        self._keys = keys

    @property
    def line(self) -> int:
        """Where the table begins."""
        return self.problems.line(self.place)

    def wrong(self, key: str | None, text: str) -> None:
        """Notes a problem with a key, or with the table."""
        self.problems.add(self.place if key is None else (*self.place, key), text)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def unknown(self) -> Iterator[str]:
        """Keys that are none of this table's."""
        known = self._keys[self.word]
        return (key for key in self.values if key not in known)

    def refuse_key(self, key: str, instead: str | None = None) -> None:
        """A key that is none of this table's, with what was meant as far as that is known."""
        hint = f"; {instead}" if instead else self._hint(key)
        self.wrong(key, f"{_key(key)} is no key of {self.word}{hint}")

    def _hint(self, key: str) -> str:
        known = self._keys[self.word]
        homes = [word for word, keys in self._keys.items() if key in keys]
        if homes:
            return f"; it belongs into {' or '.join(homes)}"
        close = get_close_matches(key[:_SHOWN_MOST], known, n=1)
        return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"

    def table(self, key: str, word: str) -> "Table | None":
        """A table within this one, its keys looked at."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            say = f"write [{key}] once" if not self.place else f"write {key} = {{…}}"
            self.wrong(key, f"{key} is one table and not {_type_of(value)}; {say}")
            return None
        return Table(self.problems, (*self.place, key), value, word, self._keys)

    def tables(self, key: str, word: str, most: int) -> "list[Table]":
        """The tables of a list of at most so many."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            text = f"{key} is a list of tables and not {_type_of(value)}; write {word}"
            self.wrong(key, text)
            return []
        if len(value) > most:
            text = f"{len(value)} {word} are too many; {most} are the most"
            self.problems.add((*self.place, key, most), text)
            return []
        found = []
        for index, each in enumerate(value):
            place = (*self.place, key, index)
            if isinstance(each, dict):
                found.append(Table(self.problems, place, each, word, self._keys))
            else:
                self.problems.add(place, f"{key} has tables and not {shown(each)}; write {word}")
        return found

    def one(self, key: str, type_: type[_T], hint: str) -> _T | None:
        """A value of exactly this type."""
        value = self.values.get(key)
        if value is None or type(value) is type_:
            return value
        self.wrong(key, f"{key} = {shown(value)} is {_type_of(value)}; write {hint}")
        return None

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.one(key, bool, "true or false")
        return default if value is None else value

    def choice(self, key: str, choices: Sequence[str]) -> Any:
        """One of some words."""
        hint = " or ".join(f'"{each}"' for each in choices)
        value = self.one(key, str, hint)
        if value is None or value in choices:
            return value
        close = get_close_matches(value[:_SHOWN_MOST], choices, n=1)
        more = f'; did you mean "{close[0]}"?' if close else ""
        self.wrong(key, f"{key} = {shown(value)} is none of {', '.join(choices)}{more}")
        return None

    def text(self, key: str, hint: str) -> str | None:
        """Printable text that is not empty."""
        value = self.one(key, str, hint)
        if value is None:
            return None
        if not value.strip():
            self.wrong(key, f"{key} = {shown(value)} is empty; write {hint}")
        elif not value.isprintable():
            self.wrong(key, f"{key} = {shown(value)} has line breaks or what cannot be printed")
        else:
            return value
        return None

    def name(self, key: str, size_most: int) -> str | None:
        """Text that fits where a name goes."""
        value = self.text(key, 'a name, such as "db"')
        size = len(value.encode()) if value is not None else 0
        if size > size_most:
            self.wrong(key, f"{key} = {shown(value)} has {size} bytes; {size_most} are the most")
            return None
        return value

    def size(self, key: str, hint: str = '"16G" or a number of bytes') -> int | None:
        """Bytes, more than none."""
        value = self.values.get(key)
        if type(value) is int:
            return self._positive(key, value)
        text = self.one(key, str, hint)
        return None if text is None else self.size_of(key, text)

    def size_of(self, key: str, text: str, wrong: str | None = None) -> int | None:
        """Bytes of a size within a value; ``wrong`` is said of the value where it is none."""
        try:
            return self._positive(key, parse_size(text))
        except InvalidArgument as cause:
            # It begins with the text, which may be longer than a message should be.
            said = wrong or cause.message.removeprefix(f"{text!r} ")
            self.wrong(key, f"{key} = {shown(self.values[key])} {said}")
            return None

    def _positive(self, key: str, size: int) -> int | None:
        if 0 < size < 1 << 63:
            return size
        text = f"{key} = {shown(self.values[key])}: a size is from 1 byte to 2^63 - 1"
        self.wrong(key, text)
        return None

    def several(self, key: str, take: Callable[[Any], _T], hint: str) -> tuple[_T, ...] | None:
        """One value or a list of them. ``take`` gives what a value means, or raises
        :class:`ValueError` with what is wrong."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, list) and not value:
            self.wrong(key, f"{key} = [] matches nothing; leave it out, or write {hint}")
            return None
        if isinstance(value, list) and len(value) > LIST_MOST:
            text = f"{key} has {len(value)} elements; {LIST_MOST} are the most"
            self.wrong(key, text)
            return None
        found: list[Any] = []
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            place = (*self.place, key, *([index] if isinstance(value, list) else []))
            try:
                found.append(take(each))
            except ValueError as cause:
                self.problems.add(place, f"{key} = {shown(each)} {cause}; write {hint}")
        return tuple(found)
