"""Where the page map of a region of a pool is, and what it costs.

In the namespace it lies where Linux has its own: behind the 8 KiB of the info block, in front of
the data. Linux writes all of that area when it enables a namespace with ``map=dev``, so nothing in
it is kept: the map is made anew whenever a pool opens the region, from the directory of named
arrays, which is in the data.

What this does not do: survive (what must is in the data), count what the CPU writes back: stores
are counted, and how many reach the media as one line is the cache's to say.
"""

from typing import TYPE_CHECKING, Any, Final, Literal

from pmemkit._native import frames as core
from pmemkit.errors import InvalidArgument
from pmemkit.formats.btt import BttInfo
from pmemkit.formats.infoblock import DESCRIPTOR_SIZE, PAGE_SIZE, RESERVED_SIZE
from pmemkit.media.provider import open_medium

if TYPE_CHECKING:
    from pmemkit._native.media import Medium
    from pmemkit.bus.locate import Place
    from pmemkit.memory.regions import Opened

__all__ = ["FRAME_BYTES", "MapPlacement", "area_of", "bill", "bill_of", "open_map"]

MapPlacement = Literal["mem", "dev"]

FRAME_BYTES: Final = 1
"""Of a descriptor."""


def area_of(wish: MapPlacement | None, place: "Place | None", path: str) -> tuple[int, int] | None:
    """Offset and length in the file of the area for a map in the namespace; ``None`` for a map in
    DRAM. Raises :class:`InvalidArgument` for ``dev`` where there is no such area."""
    if wish not in (None, "mem", "dev"):
        raise InvalidArgument(f"map is mem or dev, not {wish!r}", op="add", path=path)
    info = None if place is None else place.namespace.claim.info
    if place is None or info is None or isinstance(info, BttInfo):
        if wish != "dev":
            return None
        what = "a namespace of mode raw" if place is not None else "what is no namespace"
        text = f"{what} has no info block, and no area for a page map: map=mem, or mode devdax"
        raise InvalidArgument(text, op="add", path=path)
    if (wish or info.map) != "dev":
        return None
    start = place.offset - info.dataoff + RESERVED_SIZE
    return start, info.dataoff - RESERVED_SIZE


def open_map(member: "Opened", size: int, block_size: int) -> "tuple[Medium, int] | None":
    """The bytes for the map of a member that brings ``size`` bytes, and where they end in its file;
    ``None`` for a map in DRAM. Raises :class:`InvalidArgument` where they are too few."""
    if member.map_area is None or member.opened is None:
        return None
    start, room = member.map_area
    frames = size // block_size * block_size // PAGE_SIZE
    needed = core.Allocator.map_size(frames)
    if needed > room:
        text = (
            f"region {member.name}: the page map of {frames} frames takes {needed} bytes, and "
            f"between info block and data are {room}; map=mem, or a namespace made with --map=dev"
        )
        raise InvalidArgument(text, op="add", path=member.name)
    opened = open_medium(
        member.opened.path, locking="on" if member.opened.locked else "off", part=(start, room)
    )
    # The medium has the file and its lock.
    opened.close()
    return opened.medium, start + room


def bill(size: int, placement: str, *, stores: int | None = None) -> dict[str, Any]:
    """What the page map of ``size`` bytes costs, ours and Linux's. ``stores``: those to a map in
    the namespace so far, a byte each; ``None`` where no pool has the region open."""
    frames = size // PAGE_SIZE
    return {
        "placement": placement,
        "frame_bytes": FRAME_BYTES,
        "bytes": frames * FRAME_BYTES,
        "percent": 100 * FRAME_BYTES / PAGE_SIZE,
        "linux_frame_bytes": DESCRIPTOR_SIZE,
        "linux_bytes": frames * DESCRIPTOR_SIZE,
        "linux_percent": 100 * DESCRIPTOR_SIZE / PAGE_SIZE,
        "media_bytes_at_open": frames * FRAME_BYTES if placement == "dev" else 0,
        "media_stores": stores if placement == "dev" else 0,
        "media_flushes": 0,
    }


def bill_of(region: dict[str, Any]) -> dict[str, Any]:
    """The bill of a region of a pool; takes what the core said of its map out of the region."""
    placement, stores = region.pop("map"), region.pop("map_stores")
    return bill(region.pop("map_bytes") * PAGE_SIZE, placement, stores=stores)
