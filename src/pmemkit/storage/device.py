"""A block device: bytes at offsets, with flush, discard, zero and extents.

Invariants:
1. Every method may be called from any thread; calls that copy more than a page or may wait let
   other threads run meanwhile.
2. What was written before a :meth:`BlockDevice.flush` that succeeded is durable, as far as the
   region's granularity and volatility promise; with ``fua`` it is when the write returns.
3. After a failed write, discard, zero or flush the device is read-only until its region is reopened
   (:class:`Latched`); a failed read fails alone.
4. After :meth:`BlockDevice.close` every method but ``close`` raises :class:`Closed`.
5. Reads and writes may begin and end inside a sector. Such a sector is read, changed and written
   whole, one after the other among the callers of one object; who writes the same sector through
   another object or a server at that moment may lose.

6. Over a cache, close writes back and flushes, and says what fails.

What this does not do: buffer; mode ``raw`` promises 8 bytes, mode ``sector`` sectors.
"""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple

from pmemkit.errors import Closed, PmemError, ReadOnly
from pmemkit.storage.layers import Layer

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pmemkit._native.block import Cache, Channel, Device, Trace

__all__ = ["BlockDevice", "Extent"]


class Extent(NamedTuple):
    """A run of bytes: data, or a hole that takes no room and reads as zeroes."""

    offset: int
    length: int
    kind: Literal["data", "hole"]


class BlockDevice:
    """A block device over a region. Made by :meth:`Region.device`."""

    def __init__(
        self,
        bottom: "Device",
        path: str,
        *,
        layers: Sequence[Layer] = (),
        read_only: bool = False,
        read_only_because: str | None = None,
        cache: "Cache | None" = None,
    ) -> None:
        """``layers``: the first is nearest the client. ``cache``: the one below them all."""
        self._cache = cache
        self._last_stats: dict[str, int] | None = None
        self._path = path
        self._read_only = read_only
        self._read_only_because = read_only_because
        self._traces: list[tuple[str | None, Trace]] = []
        for layer in reversed(layers):
            bottom, sink = layer.add_to(bottom)
            if sink is not None:
                self._traces.append((layer.options.get("file"), sink))
        self._device: Device | None = bottom
        self._channel: Channel | None = bottom.channel(read_only=read_only)
        self._size = self._channel.size
        self._unit = self._channel.block_size_min
        self._partial = threading.Lock()
        self._capabilities = self._channel.caps

    def __enter__(self) -> "BlockDevice":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._channel is None else f"{self._size} bytes"
        return f"<BlockDevice of {self._path}: {state}>"

    @property
    def path(self) -> str:
        """What it was opened from."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes, fixed when the device was made."""
        return self._size

    @property
    def capabilities(self) -> frozenset[str]:
        """Of ``write flush fua discard zero fast_zero cache extents map map_write multi_conn``;
        frozen."""
        return self._capabilities

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._channel is None

    @property
    def latched(self) -> str | None:
        """Why the device is read-only until its region is reopened, if it is."""
        return self._stack("latched").latched()

    @property
    def traces(self) -> "tuple[Trace, ...]":
        """What its trace layers saw, the one nearest the media first."""
        return tuple(sink for _, sink in self._traces)

    @property
    def cache_stats(self) -> dict[str, int] | None:
        """What its region's cache did and holds, if there is one: see ``Cache.stats`` of the core.
        After :meth:`close` it is what it was then."""
        return self._last_stats if self._cache is None else self._cache.stats()

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        channel = self._open("read")
        try:
            if (offset | length) % self._unit and 0 <= offset <= offset + length <= self._size:
                start = offset // self._unit * self._unit
                whole = channel.read(start, self._up(offset + length) - start)
                return whole[offset - start :][:length]
            return channel.read(offset, length)
        except PmemError as error:
            raise self._named(error) from None

    def readinto(self, offset: int, buffer: "Buffer") -> int:
        """Fills a writable buffer from ``offset``; gives its length."""
        channel = self._open("read")
        try:
            view = memoryview(buffer).cast("B")
            if (offset | view.nbytes) % self._unit:
                view[:] = self.read(offset, view.nbytes)
                return view.nbytes
            return channel.readinto(offset, buffer)
        except PmemError as error:
            raise self._named(error) from None

    def write(self, offset: int, data: "Buffer", *, fua: bool = False) -> int:
        """Writes all of ``data``; gives its length. With ``fua`` it is durable at return."""
        channel = self._open("write")
        try:
            view = memoryview(data).cast("B")
            end = offset + view.nbytes
            if (offset | view.nbytes) % self._unit and 0 <= offset <= end <= self._size:
                return self._write_partly(channel, offset, view, fua=fua)
            return channel.write(offset, data, fua=fua)
        except PmemError as error:
            raise self._named(error) from None

    def _up(self, offset: int) -> int:
        return -(-offset // self._unit) * self._unit

    def _write_partly(self, channel: "Channel", offset: int, data: memoryview, *, fua: bool) -> int:
        """A write that begins or ends inside a sector."""
        end = offset + data.nbytes
        inner, last = self._up(offset), end // self._unit * self._unit
        with self._partial:
            if offset < inner or inner > last:
                start = inner - self._unit if offset < inner else inner
                part = min(inner if offset < inner else inner + self._unit, end)
                sector = bytearray(channel.read(start, self._unit))
                sector[offset - start : part - start] = data[: part - offset]
                channel.write(start, sector, fua=fua)
            if last > inner:
                channel.write(inner, data[inner - offset : last - offset], fua=fua)
            if last >= inner and end > last:
                sector = bytearray(channel.read(last, self._unit))
                sector[: end - last] = data[last - offset :]
                channel.write(last, sector, fua=fua)
        return data.nbytes

    def flush(self) -> None:
        """Makes every write that returned before this call durable."""
        channel = self._open("flush")
        try:
            channel.flush()
        except PmemError as error:
            raise self._named(error) from None

    def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Gives the room of a range back; what it reads as afterwards is undefined."""
        channel = self._open("discard")
        try:
            channel.discard(offset, length, fua=fua)
        except PmemError as error:
            raise self._named(error) from None

    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Makes a range read as zeroes: as a hole where the backing can and ``no_hole`` is not
        set. With ``fast`` it is :class:`NotSupported` unless quicker than writing."""
        channel = self._open("zero")
        try:
            channel.zero(offset, length, fua=fua, no_hole=no_hole, fast=fast)
        except PmemError as error:
            raise self._named(error) from None

    def extents(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Data and holes of a range in order, without gaps; to the end by default."""
        channel = self._open("extents")
        if length is None:
            length = max(self._size - offset, 0)
        try:
            runs = channel.extents(offset, length)
        except PmemError as error:
            raise self._named(error) from None
        extents = []
        for run, hole in runs:
            extents.append(Extent(offset, run, "hole" if hole else "data"))
            offset += run
        return extents

    def channel(self, *, read_only: bool = False) -> "Channel":
        """A handle of the core for I/O only, as servers use it; it outlives this object."""
        return self._stack("channel").channel(read_only=read_only or self._read_only)

    def close(self) -> None:
        """Lets the region go, flushes its cache if it has one, and writes traces out. May be called
        again."""
        if self._channel is None:
            return
        self._channel = self._device = None
        try:
            if self._cache is not None:
                self._cache.drain()
        except PmemError as error:
            raise self._named(error) from None
        finally:
            self._last_stats, self._cache = self.cache_stats, None
            for place, sink in self._traces:
                _write_trace(place, sink)

    def _open(self, op: str) -> "Channel":
        if self._channel is None:
            raise Closed("the device is closed", op=op, path=self._path)
        return self._channel

    def _stack(self, op: str) -> "Device":
        if self._device is None:
            raise Closed("the device is closed", op=op, path=self._path)
        return self._device

    def _named(self, error: PmemError) -> PmemError:
        error.path = error.path or self._path
        if isinstance(error, ReadOnly) and self._read_only_because is not None:
            error.message += f": {self._read_only_because}"
        return error


def _write_trace(place: str | None, sink: "Trace") -> None:
    lines = [
        f"{op} offset={offset} length={length} flags={flags} {outcome}\n"
        for op, offset, length, flags, outcome in sink.entries()
    ]
    if sink.dropped():
        lines.insert(0, f"({sink.dropped()} older entries were dropped)\n")
    if place is None:
        sys.stderr.writelines(lines)
    else:
        Path(place).write_text("".join(lines), encoding="utf-8")
