"""Layers as people write them: ``fault=ops=read,nth=3,offset=1M``, ``delay=seconds=0.01``.

One table, :data:`LAYERS`, says which layers there are, which options each takes and what they mean;
parsing and the help are made from it. Several ops are joined by ``+``: ``ops=read+write``.

What this does not do: hold a stack (:mod:`pmemkit.storage.device` does).
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmemkit.errors import InvalidArgument
from pmemkit.units import parse_size

if TYPE_CHECKING:
    from pmemkit._native.block import Device, Trace

__all__ = ["LAYERS", "Layer", "LayerKind", "LayerOption", "layer_help", "parse_layer"]

_OPS = ("read", "write", "flush", "discard", "zero", "cache")


def _ops(text: str) -> str:
    names = text.split("+")
    unknown = [name for name in names if name not in _OPS]
    if unknown:
        raise InvalidArgument(f"{unknown[0]!r} is not an op; ops are {'+'.join(_OPS)}")
    return ",".join(names)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"{text!r} is not a count")
    return int(text)


def _errno(text: str) -> int:
    number = getattr(errno, text.upper(), None) if text[:1].isalpha() else _count(text)
    if not isinstance(number, int) or number not in errno.errorcode:
        raise InvalidArgument(f"{text!r} is not an errno; say EIO or 5")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidArgument(f"{text!r} is not a time in seconds")
    return seconds


def _path(text: str) -> str:
    if not text:
        raise InvalidArgument("a path is missing")
    return text


@dataclass(frozen=True, slots=True)
class LayerOption:
    """One ``name=value`` of a layer."""

    parse: Callable[[str], Any]
    what: str
    needed: bool = False


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A kind of layer: what it does, its options, and the native function that adds it."""

    what: str
    options: Mapping[str, LayerOption]


LAYERS: Mapping[str, LayerKind] = {
    "fault": LayerKind(
        "fails requests",
        {
            "ops": LayerOption(_ops, "which ops, joined by + (read+write)"),
            "nth": LayerOption(_count, "the first matching one that fails, from 1 (1)"),
            "count": LayerOption(_count, "how many fail from then on; 0 is all (1)"),
            "offset": LayerOption(parse_size, "start of the range that matches (0)"),
            "length": LayerOption(parse_size, "length of that range (to the end)"),
            "errno": LayerOption(_errno, "the error, as EIO or 5 (EIO)"),
        },
    ),
    "delay": LayerKind(
        "waits before requests",
        {
            "ops": LayerOption(_ops, "which ops, joined by + (read+write)"),
            "seconds": LayerOption(_seconds, "how long", needed=True),
        },
    ),
    "trace": LayerKind(
        "remembers requests and writes them out when the device is closed",
        {
            "capacity": LayerOption(_count, "how many; older ones are dropped (65536)"),
            "file": LayerOption(_path, "where to (standard error)"),
        },
    ),
    "bounce": LayerKind("hides that the bytes are mapped: transfers go through a buffer", {}),
    "noop": LayerKind("changes nothing", {}),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that was asked for, checked and ready to be added to a stack."""

    name: str
    options: Mapping[str, Any]

    def add_to(self, below: "Device") -> "tuple[Device, Trace | None]":
        """The stack with this layer on top, and what it traces into."""
        from pmemkit._native import block

        if self.name == "trace":
            sink = block.Trace(self.options.get("capacity", 65536))
            return block.trace(below, sink), sink
        add: Callable[..., Device] = getattr(block, self.name)
        return add(below, **self.options), None


def parse_layer(text: str) -> Layer:
    """Reads ``NAME`` or ``NAME=OPTION=VALUE,OPTION=VALUE``."""
    name, _, rest = text.partition("=")
    kind = LAYERS.get(name)
    if kind is None:
        raise InvalidArgument(f"{name!r} is not a layer; layers are {', '.join(LAYERS)}")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        option = kind.options.get(key)
        if option is None or not equals:
            known = ", ".join(f"{each}=" for each in kind.options) or "nothing"
            raise InvalidArgument(f"layer {name}: {part!r} is not an option; it takes {known}")
        if key in options:
            raise InvalidArgument(f"layer {name}: {key} is given twice")
        try:
            options[key] = option.parse(value)
        except InvalidArgument as refusal:
            raise InvalidArgument(f"layer {name}: {key}: {refusal.message}") from None
    missing = [key for key, option in kind.options.items() if option.needed and key not in options]
    if missing:
        raise InvalidArgument(f"layer {name}: {missing[0]}= is missing")
    return Layer(name, options)


def layer_help() -> str:
    """The table as text."""
    lines = []
    for name, kind in LAYERS.items():
        lines.append(f"  {name:8} {kind.what}")
        lines += [f"    {key + '=':10} {option.what}" for key, option in kind.options.items()]
    return "\n".join(lines)
