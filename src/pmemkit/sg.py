"""Scatter-gather across regions: bytes of regions and buffers go to others in one pass.

    from pmemkit import sg

    sg.copy([(pool, 0, 4096), (pool, 1 << 20, 512)], [(storage, 8192, 4608)], durable=True)
    sg.copy([(storage, 8192, 4608)], [(buffer, 0, 4608)])

Memory to storage, DAX to DAX, a region of another process, a device to a buffer; whether there is a
page map for the memory makes no difference. No buffer stands in between unless both sides are
regions without addresses here (two remote ones, say).

Rules:
1. Both lists have the same length in sum. Bytes go in the order of the lists.
2. A range that is written overlaps no other range of the copy. Ranges that are read may overlap
   each other. Two regions opened over the same bytes are not noticed.
3. What can be refused is refused before a byte moves: then the error's ``moved`` is ``None``. Later
   failures say there how many bytes from the start were stored.
4. ``durable`` returns when what was written is; without it a :meth:`BlockDevice.flush` or
   :func:`copy` that is durable, of the same region, makes it so.

What this does not do: mode sector and regions with a cache, which have a write path of their own.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from pmemkit.errors import PmemError
from pmemkit.storage.region import Region

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Segment", "copy"]

Segment: TypeAlias = "tuple[Region | Buffer, int, int]"
"""A region or a buffer, an offset and a length in bytes."""


def copy(sources: Iterable[Segment], targets: Iterable[Segment], *, durable: bool = False) -> int:
    """Copies the bytes of ``sources`` to the ranges of ``targets``; gives how many."""
    from pmemkit._native import sg

    reads, writes = list(sources), list(targets)
    try:
        return sg.copy(
            [_lent(part, write=False) for part in reads],
            [_lent(part, write=True) for part in writes],
            durable=durable,
        )
    except PmemError as error:
        if error.moved is not None:
            total = sum(length for _, _, length in reads)
            error.message = f"{error.message}; {error.moved} of {total} bytes were copied"
        raise


def _lent(part: Segment, *, write: bool) -> "tuple[int | Buffer, int, int]":
    place, offset, length = part
    if isinstance(place, Region):
        return place.lend("copy", write=write), offset, length
    return place, offset, length
