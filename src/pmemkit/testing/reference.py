"""A slow, obvious block device in Python: what every other one is compared with.

It keeps one ``bytearray`` and one flag a byte that says whether the byte is backed. There is no
cleverness to get wrong: nothing is shared, split, mapped or cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange, ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CAPS", "ReferenceDevice"]

CAPS = frozenset(
    {"write", "flush", "fua", "discard", "zero", "fast_zero", "cache", "extents", "multi_conn"}
)
"""Everything that a device in memory can offer."""

_CHANGES = frozenset({"write", "fua", "flush", "discard", "zero", "fast_zero"})


class ReferenceDevice:
    """A device and its channel in one, with the checks and errors of the real door.

    Offsets and lengths are bytes. A number that no unsigned 64-bit integer can hold is
    :class:`OutOfRange`, as any other that lies outside the device.
    """

    block_size_preferred = 4096
    payload_size_max = 32 << 20

    def __init__(
        self,
        size: int,
        *,
        caps: Iterable[str] = CAPS,
        block_size_min: int = 1,
        read_only: bool = False,
    ) -> None:
        self._data = bytearray(size)
        self._backed = bytearray(size)
        self._caps = frozenset(caps) - (_CHANGES if read_only else frozenset())
        self._lock = threading.Lock()
        self.block_size_min = block_size_min

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return len(self._data)

    @property
    def caps(self) -> frozenset[str]:
        """What the device offers."""
        return self._caps

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        self._check("read", offset, length)
        with self._lock:
            return bytes(self._data[offset : offset + length])

    def readinto(self, offset: int, target: Buffer) -> int:
        """Fills ``target`` and returns its length in bytes."""
        view = _bytes_of(target)
        if view.readonly:
            raise InvalidArgument("the buffer is read-only", op="buffer")
        view[:] = self.read(offset, len(view))
        return len(view)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> int:
        """Writes all of ``data`` and returns its length in bytes."""
        view = _bytes_of(data)
        self._check("write", offset, len(view), fua=fua)
        self._store(offset, bytes(view), backed=True)
        return len(view)

    def flush(self) -> None:
        """Memory has nothing to flush."""
        self._check("flush", 0, 0)

    def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Gives the range back. Here it reads as zeroes afterwards; nobody may rely on it."""
        self._check("discard", offset, length, fua=fua)
        self._store(offset, bytes(length), backed=False)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Makes a range read as zeroes."""
        self._check("zero", offset, length, fua=fua, fast=fast)
        self._store(offset, bytes(length), backed=no_hole)

    def cache(self, offset: int, length: int) -> None:
        """Memory is as near as it gets."""
        self._check("cache", offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """``(length, hole)`` runs that add up to exactly ``length``."""
        self._check("extents", offset, length)
        if "extents" not in self._caps:
            return [(length, False)]
        with self._lock:
            flags = self._backed[offset : offset + length]
        return [(sum(1 for _ in run), not backed) for backed, run in groupby(flags)]

    def peek(self, offset: int, length: int) -> bytes:
        """The back door of the suite."""
        return bytes(self._data[offset : offset + length])

    def poke(self, offset: int, data: bytes) -> None:
        """The back door of the suite."""
        self._store(offset, data, backed=True)

    def _store(self, offset: int, data: bytes, *, backed: bool) -> None:
        with self._lock:
            self._data[offset : offset + len(data)] = data
            self._backed[offset : offset + len(data)] = bytes([backed]) * len(data)

    def _check(
        self, op: str, offset: int, length: int, *, fua: bool = False, fast: bool = False
    ) -> None:
        for number in (offset, length):
            if not 0 <= number < 1 << 64:
                raise OutOfRange(f"{number} is not between 0 and 2^64 - 1", op=op)
        if op in ("write", "discard", "zero") and "write" not in self._caps:
            raise ReadOnly("the device is read-only", op=op, offset=offset)
        if op not in ("read", "extents") and op not in self._caps:
            raise NotSupported("the device does not offer this", op=op, offset=offset)
        if (fua and "fua" not in self._caps) or (fast and "fast_zero" not in self._caps):
            raise NotSupported("a flag was not offered", op=op, offset=offset)
        if offset + length > self.size:
            text = f"{length} bytes do not fit: the end is at byte {self.size}"
            raise OutOfRange(text, op=op, offset=offset)
        block = self.block_size_min
        if op != "extents" and (offset % block or length % block):
            text = f"{length} bytes: not in whole blocks of {block} bytes"
            raise InvalidArgument(text, op=op, offset=offset)


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise InvalidArgument("the buffer is not contiguous", op="buffer")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
