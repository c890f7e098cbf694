"""The records of a bus. Field names are those of ``ndctl list``; ``None`` is left out there.

What this does not do: find anything, or print it (:mod:`pmemkit.bus.report` does).
"""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Bus", "Dimm", "Map", "Mapping", "Mode", "Namespace", "Region"]

Mode = Literal["raw", "sector", "fsdax", "devdax", "system-ram", "unknown"]
Map = Literal["none", "mem", "dev"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A part of a region with a mode. Sizes are bytes."""

    dev: str
    mode: Mode
    map: Map | None = None
    size: int
    uuid: str | None = None
    raw_uuid: str | None = None
    daxregion: dict[str, object] | None = None
    sector_size: int | None = None
    align: int | None = None
    blockdev: str | None = None
    chardev: str | None = None
    name: str | None = None
    numa_node: int | None = None
    target_node: int | None = None
    badblock_count: int | None = None
    """Blocks of 512 bytes that cannot be read; ``None`` for nought."""
    badblocks: list[dict[str, object]] | None = None
    """``offset``, ``length`` and ``dimms`` of each run, if they were asked for."""
    state: Literal["disabled"] | None = None
    path: str | None = None
    """The image, on an image bus. ndctl has no such field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """The part of a dimm that a region takes its bytes from."""

    dimm: str
    offset: int
    length: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A range of bytes that dimms, or an image, lend. Sizes are bytes."""

    dev: str
    size: int
    align: int | None = None
    available_size: int = 0
    max_available_extent: int | None = None
    type: str = "pmem"
    numa_node: int | None = None
    target_node: int | None = None
    iset_id: int | None = None
    mappings: tuple[Mapping, ...] = ()
    state: Literal["disabled"] | None = None
    badblock_count: int | None = None
    """Blocks of 512 bytes that cannot be read; ``None`` for nought."""
    badblocks: list[dict[str, object]] | None = None
    """``offset``, ``length`` and ``dimms`` of each run, if they were asked for."""
    persistence_domain: str | None = None
    path: str | None = None
    """The image, on an image bus. ndctl has no such field."""
    namespaces: tuple[Namespace, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimm:
    """One memory device."""

    dev: str
    id: str | None = None
    handle: int | None = None
    phys_id: int | None = None
    state: Literal["disabled"] | None = None
    path: str | None = None
    """The image, on an image bus. ndctl has no such field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """What dimms and regions hang on."""

    provider: str
    dev: str
    dimms: tuple[Dimm, ...] = ()
    regions: tuple[Region, ...] = ()
