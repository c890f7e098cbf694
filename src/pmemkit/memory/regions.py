"""What a pool can be made of: files, devices, namespaces of images, and memory of this process.

What this does not do: map anything for the pool (the core does), choose where extents go.
"""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pmemkit.bus.attributes import Attributes
from pmemkit.bus.locate import Place, locate, require_whole, split_namespace
from pmemkit.errors import Closed, InvalidArgument
from pmemkit.formats.pool import Directory
from pmemkit.media.provider import OpenedMedium, memory_spec, open_medium
from pmemkit.memory.page_map import MapPlacement, area_of

if TYPE_CHECKING:
    from pmemkit._native.media import Medium

__all__ = ["Opened", "RegionSpec", "open_region_of"]

_MODES = ("raw", "fsdax", "devdax")


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """A region and how a pool is to use it."""

    path: str | os.PathLike[str]
    """A file, a device DAX, ``IMAGE:namespaceR.N``, or memory: ``memfd:1G``, ``anonymous:1G``,
    ``hugetlb:1G``."""
    name: str | None = None
    """What it is called in the pool; the path where nothing is said."""
    rank: int | None = None
    """Regions of a smaller rank are filled first; by default what latency or distance say."""
    weight: int | None = None
    """Its share of what is interleaved; by default what the bandwidth says."""
    names: bool = False
    """It has named arrays: a directory at its start, made where there is none yet."""
    large_pages: bool = True
    """Ask the kernel for large pages."""
    latency_ns: float | None = None
    """Nanoseconds of a load; what the bus says where nothing is given, as the next two."""
    bandwidth: float | None = None
    """Bytes a second."""
    distance: int | None = None
    """As the SLIT has it: 10 is local."""
    map: MapPlacement | None = None
    """Where the page map is: ``mem``, in DRAM, or ``dev``, in the namespace in front of its data.
    What the info block of the namespace says where nothing is said, and DRAM without one."""


@dataclass(slots=True)
class Opened:
    """An open region. Bytes."""

    spec: RegionSpec
    name: str
    opened: OpenedMedium | None
    start: int
    """Where it starts in its file."""
    size: int
    sealed: bool
    """Nobody else can change its length."""
    map_area: tuple[int, int] | None = None
    """Bytes of its file that a page map in the namespace may take: offset and length."""
    place: Place | None = None
    """The namespace of an image that it is."""
    attributes: Attributes = field(default_factory=dict)
    """What is known of its speed."""
    node: int | None = None
    """The NUMA node that its media are on; ``None`` for ordinary memory."""
    directory: Directory | None = None
    id: int = -1
    """The number the core gave it."""

    @property
    def medium(self) -> "Medium":
        """Its bytes; offsets are those of the region."""
        if self.opened is None:
            raise Closed("the region is closed", op="open", path=self.name)
        return self.opened.medium

    @property
    def fd(self) -> int:
        """The descriptor of its file."""
        if self.opened is None or self.opened.file is None:
            raise Closed("the region is closed", op="open", path=self.name)
        return self.opened.file.fileno()

    def close(self) -> None:
        """Lets the file and its lock go, as soon as nothing of it is mapped any more."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None


def open_region_of(
    spec: RegionSpec | str | os.PathLike[str], *, read_only: bool = False, locking: bool = True
) -> Opened:
    """Opens what a specification names.

    Raises :class:`InvalidArgument` for a namespace of a mode that has no bytes of its own to lend.
    """
    if not isinstance(spec, RegionSpec):
        spec = RegionSpec(spec)
    path = os.fspath(spec.path)
    memory = memory_spec(path)
    if memory is not None and memory[0] == "anonymous":
        # What has no file could not be mapped in two places; a memfd nobody else has is the same.
        path = f"memfd:{memory[1]}"
    if memory is not None and spec.names:
        text = "named arrays survive the process, its own memory does not: name a file or device"
        raise InvalidArgument(text, op="add", path=path)
    target, part, place = _range_of(path)
    area = area_of(spec.map, place, path)
    opened = open_medium(target, read_only=read_only, locking="on" if locking else "off", part=part)
    start, size = part or (0, len(opened.medium))
    name = spec.name or os.fspath(spec.path)
    return Opened(
        spec, name, opened, start, size, sealed=memory is not None, map_area=area, place=place
    )


def _range_of(path: str) -> tuple[str, tuple[int, int] | None, Place | None]:
    """The file of a path, the part of it that is meant, and the namespace that this is."""
    named = split_namespace(path)
    if named is not None and not os.path.lexists(path):
        place = locate(*named)
        if place.mode not in _MODES:
            text = f"a namespace of mode {place.mode} is storage; memory takes {', '.join(_MODES)}"
            raise InvalidArgument(text, op="add", path=path)
        return place.path, (place.offset, place.length), place
    if memory_spec(path) is not None:
        return path, None, None
    if os.path.isfile(path):  # noqa: PTH113 - a path as it was given
        require_whole(path)
        return path, (0, os.stat(path).st_size), None  # noqa: PTH116 - the same
    return path, None, None
