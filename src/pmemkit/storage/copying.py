"""Copying between regions and streams, sparse and with proof.

A source is a block device or a stream; so is a target. Bytes go through one buffer that is used
again. Holes of the source become zeroes of the target, without room where it can.

Invariants:
1. A target that is known to be too small is refused before anything is written.
2. When :func:`copy` returns, the target was flushed.
3. When it fails, :class:`CopyFailed` says how many bytes from the start were copied, and holds the
   cause; nothing is said about bytes behind them.
4. Verification compares the target with digests of what was read, not with the source read again:
   a source that changed meanwhile is no mismatch.

What this does not do: open or create anything, show progress (a callback hears of it).
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from pmemkit.errors import InvalidArgument, MediaError, NoSpace
from pmemkit.storage.device import BlockDevice
from pmemkit.storage.layers import Layer
from pmemkit.storage.region import Region

__all__ = [
    "BUFFER_SIZE",
    "ZERO_BLOCK_SIZE",
    "CopyFailed",
    "CopyReport",
    "DeviceSource",
    "DeviceTarget",
    "GrowingTarget",
    "Piece",
    "Source",
    "StreamSource",
    "StreamTarget",
    "Target",
    "ZeroSource",
    "copy",
    "verify",
]

BUFFER_SIZE = 4 << 20
ZERO_BLOCK_SIZE = 64 << 10
"""Zeroes are looked for in blocks of this many bytes."""

_WINDOW_SIZE = 1 << 32
"""Extents are asked for in ranges of this many bytes, so that their list stays small."""
_DIGEST_SIZE = 16
_GROWTH_SIZE = 64 << 20
_ZEROES = bytes(ZERO_BLOCK_SIZE)


@dataclass(slots=True)
class Piece:
    """A part of the source: ``length`` bytes are in the buffer, unless it is a hole."""

    offset: int
    length: int
    hole: bool


class Source(Protocol):
    """Where bytes come from."""

    @property
    def size(self) -> int | None:
        """Bytes, where that is known beforehand."""

    def pieces(self, buffer: bytearray) -> Iterator[Piece]:
        """The parts in order; data is in the buffer until the next one is asked for."""


class Target(Protocol):
    """Where bytes go to."""

    @property
    def size(self) -> int | None:
        """Room in bytes, where there is an end."""

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes."""

    def zero(self, offset: int, length: int) -> None:
        """Makes a range read as zeroes."""

    def finish(self, size: int) -> None:
        """Makes what was written durable; ``size`` bytes were."""


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """A block device, or ``length`` bytes of it from ``start``. Its holes are not read."""

    device: BlockDevice
    start: int = 0
    length: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the range."""
        return self.device.size - self.start if self.length is None else self.length

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """Offset in the range, length, and whether it is a hole, in order."""
        for at in range(self.start, self.start + self.size, _WINDOW_SIZE):
            length = min(_WINDOW_SIZE, self.start + self.size - at)
            for extent in self.device.extents(at, length):
                yield extent.offset - self.start, extent.length, extent.kind == "hole"

    def pieces(self, buffer: bytearray) -> Iterator[Piece]:
        """The extents in order, data in parts that fit the buffer."""
        view = memoryview(buffer)
        for start, length, hole in self.runs():
            if hole:
                yield Piece(start, length, True)
                continue
            for offset in range(start, start + length, len(buffer)):
                part = min(len(buffer), start + length - offset)
                self.device.readinto(self.start + offset, view[:part])
                yield Piece(offset, part, False)


@dataclass(frozen=True, slots=True)
class ZeroSource:
    """Zeroes without end, cut to a size."""

    size: int

    def pieces(self, buffer: bytearray) -> Iterator[Piece]:
        """Holes."""
        for start in range(0, self.size, _GROWTH_SIZE):
            yield Piece(start, min(_GROWTH_SIZE, self.size - start), True)


@dataclass(frozen=True, slots=True)
class StreamSource:
    """A descriptor that is read to its end, or for ``length`` bytes, without the first ``skip``."""

    fd: int
    skip: int = 0
    length: int | None = None

    @property
    def size(self) -> None:
        """Nobody knows."""
        return

    def pieces(self, buffer: bytearray) -> Iterator[Piece]:
        """Buffers as full as the stream makes them."""
        view = memoryview(buffer)
        left = self.skip
        while left:
            filled = self._fill(view[:left])
            left -= filled
            if filled == 0:
                return
        offset = 0
        while self.length is None or offset < self.length:
            room = view if self.length is None else view[: self.length - offset]
            filled = self._fill(room)
            if filled:
                yield Piece(offset, filled, False)
                offset += filled
            if filled < len(room):
                return

    def _fill(self, view: memoryview) -> int:
        """As many bytes as the stream has, up to the length of the view."""
        filled = 0
        while filled < len(view):
            count = os.readv(self.fd, [view[filled:]])
            if count == 0:
                break
            filled += count
        return filled


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """A block device from ``start`` on. ``fresh``: it was just made and reads as zeroes already."""

    device: BlockDevice
    fresh: bool = False
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes from the start to the end of the device."""
        return max(self.device.size - self.start, 0)

    def check_room(self, size: int) -> None:
        """Refuses what does not fit, before anything is written."""
        _check_room(size, self.size)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes."""
        self.device.write(self.start + offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Punches a hole, or writes zeroes."""
        if not self.fresh:
            self.device.zero(self.start + offset, length)

    def finish(self, size: int) -> None:
        """Flushes."""
        self.device.flush()


class GrowingTarget:
    """A new file that grows with what arrives, from byte ``start`` on. It is cut to its size at the
    end."""

    def __init__(
        self, region: Region, layers: Sequence[str | Layer] = (), *, start: int = 0
    ) -> None:
        self.start = start
        self._region = region
        self._layers = layers
        self.device = region.device(layers=layers)

    def __enter__(self) -> "GrowingTarget":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.device.close()

    @property
    def size(self) -> None:
        """It grows."""
        return

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes, after making room for them."""
        end = self.start + offset + len(data)
        if end > self.device.size:
            # Doubling keeps the number of mappings that were outgrown small.
            self._resize(max(end, 2 * self.device.size, _GROWTH_SIZE))
        self.device.write(self.start + offset, data)

    def zero(self, offset: int, length: int) -> None:
        """A new file is zeroes already."""

    def finish(self, size: int) -> None:
        """Cuts the file to what arrived and makes it durable."""
        self._resize(self.start + size)
        self.device.flush()

    def _resize(self, size: int) -> None:
        self.device.close()
        self._region.resize(size)
        self.device = self._region.device(layers=self._layers)


@dataclass(slots=True)
class StreamTarget:
    """A descriptor that is written in order; holes are written as zeroes."""

    fd: int

    @property
    def size(self) -> None:
        """It has no end."""
        return

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes; they come in order."""
        while data:
            data = data[os.write(self.fd, data) :]

    def zero(self, offset: int, length: int) -> None:
        """Writes zeroes."""
        zeroes = memoryview(bytes(min(length, BUFFER_SIZE)))
        while length:
            part = min(length, len(zeroes))
            self.write(offset, zeroes[:part])
            length -= part

    def finish(self, size: int) -> None:
        """Makes it durable where it is a file."""
        try:
            os.fdatasync(self.fd)
        except OSError:
            # A pipe, a terminal or a socket has nothing to make durable.
            if stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise


@dataclass(slots=True)
class CopyReport:
    """What was copied: ``data_bytes + zero_bytes == size``."""

    data_bytes: int = 0
    zero_bytes: int = 0
    digests: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    """``(offset, length, digest)``; no digest is a range of zeroes."""

    @property
    def size(self) -> int:
        """Bytes from the start of the source."""
        return self.data_bytes + self.zero_bytes


class CopyFailed(Exception):
    """A copy stopped. ``report`` says how far it came; ``cause`` is what stopped it."""

    def __init__(self, report: CopyReport, cause: BaseException) -> None:
        super().__init__(f"after {report.size} bytes: {cause}")
        self.report = report
        self.cause = cause


def copy(
    source: Source,
    target: Target,
    *,
    detect_zeroes: bool = False,
    digests: bool = False,
    progress: Callable[[int], None] = lambda copied: None,
    buffer_size: int = BUFFER_SIZE,
) -> CopyReport:
    """Copies all of ``source`` to the start of ``target``.

    ``detect_zeroes`` turns blocks of zeroes into holes. ``digests`` keeps what :func:`verify`
    compares. ``progress`` is called with the bytes copied so far.
    """
    if buffer_size < 1:
        raise InvalidArgument(f"a buffer of {buffer_size} bytes holds nothing")
    if source.size is not None and target.size is not None:
        _check_room(source.size, target.size)
    report = CopyReport()
    try:
        buffer = bytearray(buffer_size)
        for piece in source.pieces(buffer):
            end = piece.offset + piece.length
            if target.size is not None and end > target.size:
                text = f"the source goes on behind the target's {target.size} bytes"
                raise NoSpace(text, op="copy")
            for part in _parts(piece, buffer, detect_zeroes):
                _carry(part, piece.offset, buffer, target, report, digests)
            progress(report.size)
        target.finish(report.size)
    except (OSError, KeyboardInterrupt) as cause:
        raise CopyFailed(report, cause) from cause
    return report


def _check_room(size: int, room: int) -> None:
    if size > room:
        text = f"the target has room for {room} bytes only, the source has {size}"
        raise NoSpace(f"{text}; nothing was written", op="copy")


def _parts(piece: Piece, buffer: bytearray, detect_zeroes: bool) -> Iterator[Piece]:
    """The piece, cut where its data turns from zeroes to others and back."""
    if piece.hole or not detect_zeroes:
        yield piece
        return
    start, hole = 0, False
    for offset in range(0, piece.length, ZERO_BLOCK_SIZE):
        length = min(ZERO_BLOCK_SIZE, piece.length - offset)
        zero = buffer.startswith(_ZEROES[:length], offset)
        if zero != hole and offset > start:
            yield Piece(piece.offset + start, offset - start, hole)
            start = offset
        hole = zero
    yield Piece(piece.offset + start, piece.length - start, hole)


def _carry(
    part: Piece, base: int, buffer: bytearray, target: Target, report: CopyReport, digests: bool
) -> None:
    """Brings one part to the target; ``base`` is where the buffer's first byte belongs."""
    if part.hole:
        target.zero(part.offset, part.length)
        report.zero_bytes += part.length
        if digests:
            report.digests.append((part.offset, part.length, None))
        return
    start = part.offset - base
    data = memoryview(buffer)[start : start + part.length]
    target.write(part.offset, data)
    report.data_bytes += part.length
    if digests:
        report.digests.append((part.offset, part.length, _digest(data)))


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest()


def verify(
    report: CopyReport,
    device: BlockDevice,
    *,
    start: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Reads the target back, which began at byte ``start``; :class:`MediaError` names the first
    range that differs."""
    buffer = bytearray(max([BUFFER_SIZE, *(each[1] for each in report.digests if each[2])]))
    view = memoryview(buffer)
    done = 0
    for copied, length, digest in report.digests:
        offset = start + copied
        if digest is None:
            _verify_zeroes(device, offset, length, buffer)
        else:
            device.readinto(offset, view[:length])
            if _digest(view[:length]) != digest:
                raise _mismatch(device, offset, length)
        done += length
        progress(done)


def _verify_zeroes(device: BlockDevice, offset: int, length: int, buffer: bytearray) -> None:
    """Holes need no reading; what holds data must read as zeroes."""
    view = memoryview(buffer)
    for start in range(offset, offset + length, _WINDOW_SIZE):
        window = min(_WINDOW_SIZE, offset + length - start)
        for extent in device.extents(start, window):
            if extent.kind == "hole":
                continue
            end = extent.offset + extent.length
            for at in range(extent.offset, end, len(buffer)):
                part = min(len(buffer), end - at)
                device.readinto(at, view[:part])
                if not _is_zero(buffer, part):
                    raise _mismatch(device, at, part)


def _is_zero(buffer: bytearray, length: int) -> bool:
    return all(
        buffer.startswith(_ZEROES[: min(ZERO_BLOCK_SIZE, length - at)], at)
        for at in range(0, length, ZERO_BLOCK_SIZE)
    )


def _mismatch(device: BlockDevice, offset: int, length: int) -> MediaError:
    text = f"the {length} bytes from byte {offset} are not what was written"
    return MediaError(text, op="verify", offset=offset, path=device.path)
