"""Exports: devices under names, and what clients are told of them.

Capabilities are asked once, when the export is made, and frozen. A client that merely asks does not
open anything: its channel is opened when it has chosen the export.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pmemkit.errors import InvalidArgument
from pmemkit.serve.nbd_protocol import TransmissionFlag, check_name

__all__ = ["DeviceInfo", "Export", "ExportSource", "Exports"]

_BLOCK_SIZE_LIMIT = 64 << 10
_FLAG_OF_CAP = {
    "flush": TransmissionFlag.SEND_FLUSH,
    "fua": TransmissionFlag.SEND_FUA,
    "discard": TransmissionFlag.SEND_TRIM,
    "zero": TransmissionFlag.SEND_WRITE_ZEROES,
    "cache": TransmissionFlag.SEND_CACHE,
    "multi_conn": TransmissionFlag.CAN_MULTI_CONN,
}


class ExportSource(Protocol):
    """What can be exported: :class:`pmemkit._native.block.Device`, or anything of its shape."""

    def channel(self, *, read_only: bool = False) -> Any:
        """A new handle for I/O with ``size``, ``caps`` and the block sizes."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a channel offers. Sizes are bytes."""

    size: int
    block_size_min: int
    block_size_preferred: int
    payload_size_max: int
    caps: frozenset[str]

    @classmethod
    def of(cls, channel: Any) -> "DeviceInfo":
        """Asks a channel once."""
        info = cls(
            channel.size,
            channel.block_size_min,
            channel.block_size_preferred,
            channel.payload_size_max,
            frozenset(channel.caps),
        )
        least, preferred = info.block_size_min, info.block_size_preferred
        if not 0 < least <= _BLOCK_SIZE_LIMIT or least & (least - 1):
            raise InvalidArgument(f"NBD cannot carry a least block size of {least} bytes")
        if preferred < max(least, 512) or preferred & (preferred - 1):
            raise InvalidArgument(f"NBD cannot carry a preferred block size of {preferred} bytes")
        return info


@dataclass(frozen=True, slots=True)
class Export:
    """A device under a name. ``source.channel(read_only=...)`` is called once for each client."""

    name: str
    source: ExportSource
    description: str = ""
    read_only: bool = False
    info: DeviceInfo = field(init=False)

    def __post_init__(self) -> None:
        check_name(self.name, "the export name")
        check_name(self.description, "the description")
        info = DeviceInfo.of(self.source.channel(read_only=self.read_only))
        object.__setattr__(self, "info", info)

    def open(self) -> Any:
        """A channel for one connection."""
        return self.source.channel(read_only=self.read_only)

    def transmission_flags(self, *, structured: bool) -> TransmissionFlag:
        """The 16 bits for a client that did, or did not, agree on structured replies."""
        caps = self.info.caps
        flags = TransmissionFlag.HAS_FLAGS
        for cap, flag in _FLAG_OF_CAP.items():
            if cap in caps:
                flags |= flag
        if "zero" in caps and "fast_zero" in caps:
            flags |= TransmissionFlag.SEND_FAST_ZERO
        if self.read_only or "write" not in caps:
            flags |= TransmissionFlag.READ_ONLY
        if structured:
            flags |= TransmissionFlag.SEND_DF
        return flags


class Exports:
    """Exports by name, and the one that the empty name stands for. Frozen."""

    def __init__(self, exports: Iterable[Export], default: str | None = None) -> None:
        self._by_name: dict[str, Export] = {}
        for export in exports:
            if export.name in self._by_name:
                raise InvalidArgument(f"two exports are named {export.name!r}")
            self._by_name[export.name] = export
        if default is not None and default not in self._by_name:
            raise InvalidArgument(f"the default export {default!r} is not among the exports")
        self.default = default

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Export]:
        return iter(self._by_name.values())

    def find(self, name: str) -> Export | None:
        """The export a client means. The empty name is the export of that name, else the default
        one, else the first."""
        if name in self._by_name:
            return self._by_name[name]
        if name:
            return None
        if self.default is not None:
            return self._by_name[self.default]
        return next(iter(self._by_name.values()), None)

    def with_export(self, export: Export) -> "Exports":
        """These and one more."""
        return Exports([*self, export], self.default)

    def without(self, name: str) -> "Exports":
        """These but one; it is :class:`InvalidArgument` when there is none of that name."""
        if name not in self._by_name:
            raise InvalidArgument(f"there is no export named {name!r}")
        rest = (export for export in self if export.name != name)
        return Exports(rest, None if self.default == name else self.default)
