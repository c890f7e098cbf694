"""Plain values back into the records of :mod:`pmemkit.policy.model`, checked.

    from_plain(Plan, as_plain(plan)) == plan

Invariants:
1. Whatever the values are, what comes out is a record, or :class:`InvalidArgument` that names the
   place and the value.
2. Fields that are not there get their defaults; fields that are not known are refused.

What this does not do: judge what the records say.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pmemkit.errors import InvalidArgument

__all__ = ["from_plain"]

_T = TypeVar("_T")
_SHOWN_MOST: Final = 60
_DEEPEST: Final = 32


@lru_cache(maxsize=64)
def _hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Type of each field, and whether it must be there."""
    hints = get_type_hints(cls)
    return {
        each.name: (
            hints[each.name],
            each.default is MISSING and each.default_factory is MISSING,
        )
        for each in fields(cls)
        if each.init
    }


def from_plain(cls: type[_T], value: Any, where: str = "") -> _T:
    """The record that plain values stand for."""
    return _record(cls, value, where or cls.__name__, 0)  # type: ignore[no-any-return]


def _refuse(where: str, value: Any, wanted: str) -> InvalidArgument:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN_MOST else shown[:_SHOWN_MOST] + "…"
    return InvalidArgument(f"{where} is {shown}, expected {wanted}", op="read")


def _record(cls: type, value: Any, where: str, depth: int) -> Any:
    if not isinstance(value, Mapping):
        raise _refuse(where, value, f"the fields of a {cls.__name__}")
    if depth > _DEEPEST:
        raise _refuse(where, value, "something less deep")
    known = _hints(cls)
    unknown = [key for key in value if key not in known]
    if unknown:
        raise _refuse(f"{where}.{unknown[0]}", value[unknown[0]], "no such field")
    found = {}
    for name, (hint, required) in known.items():
        if name in value:
            found[name] = _value(hint, value[name], f"{where}.{name}", depth + 1)
        elif required:
            raise _refuse(f"{where}.{name}", None, "a value")
    return cls(**found)


def _value(hint: Any, value: Any, where: str, depth: int) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise _refuse(where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin in (Union, types.UnionType):
        return _any_of(arguments, value, where, depth)
    if origin is tuple or origin is frozenset:
        if not isinstance(value, (list, tuple)):
            raise _refuse(where, value, "a list")
        items = [
            _value(arguments[0], each, f"{where}[{place}]", depth + 1)
            for place, each in enumerate(value)
        ]
        return tuple(items) if origin is tuple else frozenset(items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _refuse(where, value, "a table")
        return dict(value)
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(hint, value, where, depth)
    if hint is Fraction:
        return _share(value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _refuse(where, value, f"a {hint.__name__}")
    return value


def _any_of(choices: tuple[Any, ...], value: Any, where: str, depth: int) -> Any:
    if value is None and type(None) in choices:
        return None
    rest = [each for each in choices if each is not type(None)]
    for number, each in enumerate(rest):
        try:
            return _value(each, value, where, depth)
        except InvalidArgument:
            if number == len(rest) - 1:
                raise
    raise _refuse(where, value, "no value")


def _share(value: Any, where: str) -> Fraction:
    """``60%`` as a fraction."""
    if isinstance(value, str) and value.endswith("%"):
        try:
            return Fraction(value[:-1]) / 100
        except (ValueError, ZeroDivisionError):
            pass
    raise _refuse(where, value, "a share such as 60%")
