"""The directory of named arrays at the start of a memory region's data area.

Two slots of equal size lie one behind the other, then the frames:

    slot 0: header | entries …   slot 1: header | entries …   frame 0 | frame 1 | …

A slot is the whole directory. A change writes the slot that is not current, makes it durable, and
is done: the slot with the higher sequence number whose checksums are right is the current one. A
failure at any moment leaves the directory before the change or the one after it, because the slot
that was current is not touched.

Invariants:
1. The frames of an array are durable zeroes before the entry that names them is, and are given to
   nobody else before the entry is durably gone.
2. Entries name disjoint runs of frames inside the area; names are unique.
3. A reader needs no lock for the directory: a slot that is overwritten meanwhile has a wrong
   checksum, and the reader looks again.

What this does not do: I/O; say anything of what is in an array.
"""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Final
from uuid import UUID

from pmemkit.formats.checksum import fletcher64
from pmemkit.formats.layout import Fault, Layout, at

__all__ = [
    "DIMENSIONS_MAX",
    "FRAME_SIZE",
    "NAME_MAX",
    "SIGNATURE",
    "SLOT_SIZE",
    "Directory",
    "PoolEntry",
    "PoolHeader",
    "entries_max",
    "pack_directory",
    "read_directory",
    "read_slot",
]

FRAME_SIZE: Final = 4096
SLOT_SIZE: Final = 1 << 20
"""Bytes of a slot, unless the header says otherwise."""
SIGNATURE: Final = b"PMEMKIT_POOL"
NAME_MAX: Final = 255
"""Bytes of a name in UTF-8."""
DIMENSIONS_MAX: Final = 8
_SLOT_MAX: Final = 1 << 30

_Reader = Callable[[int, int], bytes]
"""``(offset, length)`` from the start of the region."""


@dataclass(frozen=True, kw_only=True)
class PoolHeader(Layout):
    """The start of a slot."""

    TITLE: ClassVar[str] = "pool directory header"
    SIZE: ClassVar[int] = 256

    signature: bytes = at(0, 16, "bytes", rule="PMEMKIT_POOL and zeroes", wrong=(b"PMEMKIT_POLO",))
    uuid: UUID = at(16, 16, "uuid")
    major: int = at(32, 2, rule="1", wrong=(0, 2))
    minor: int = at(34, 2)
    entry_size: int = at(36, 4, rule="512", wrong=(0, 511, 513))
    sequence: int = at(40, 8, rule="not 0; the higher one is current", wrong=(0,))
    slot_size: int = at(
        48, 8, rule="a multiple of 4096, 4096 to 2^30", wrong=(0, 4095, 4097, 1 << 31)
    )
    frames: int = at(56, 8, rule="frames behind both slots; no more than the region has")
    entry_count: int = at(64, 4, rule="as many as fit into the slot", wrong=(0xFFFFFFFF,))
    reserved: bytes = at(68, 4, "zero")
    entries_checksum: int = at(72, 8, rule="Fletcher-64 of all entries")
    reserved_2: bytes = at(80, 168, "zero")
    checksum: int = at(248, 8, "checksum")


@dataclass(frozen=True, kw_only=True)
class PoolEntry(Layout):
    """One named array."""

    TITLE: ClassVar[str] = "pool directory entry"
    SIZE: ClassVar[int] = 512

    name: bytes = at(0, 256, "bytes", rule="UTF-8, zero-padded, not empty", wrong=(b"", b"\xff"))
    uuid: UUID = at(256, 16, "uuid")
    first: int = at(272, 8, rule="the first frame", wrong=(1 << 62,))
    frames: int = at(280, 8, rule="not 0; the run ends inside the area", wrong=(0, 1 << 62))
    nbytes: int = at(288, 8, rule="no more than the frames hold", wrong=(1 << 62,))
    ndim: int = at(296, 1, rule="0 to 8", wrong=(9,))
    order: bytes = at(297, 1, "bytes", rule="C or F", wrong=(b"X",))
    reserved: bytes = at(298, 6, "zero")
    shape: bytes = at(304, 64, "bytes", rule="eight lengths of 8 bytes; unused ones are 0")
    dtype: bytes = at(368, 128, "bytes", rule="ASCII: the dtype, as JSON of NumPy's descr")
    reserved_2: bytes = at(496, 16, "zero")

    @property
    def text(self) -> str:
        """The name."""
        return self.name.rstrip(b"\0").decode()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The shape."""
        return struct.unpack("<8Q", self.shape)[: self.ndim]

    @property
    def end(self) -> int:
        """The first frame behind it."""
        return self.first + self.frames


def entries_max(slot_size: int) -> int:
    """Entries that fit into a slot."""
    return (slot_size - PoolHeader.SIZE) // PoolEntry.SIZE


@dataclass(frozen=True)
class Directory:
    """What the current slot says."""

    uuid: UUID
    sequence: int
    slot: int
    """0 or 1."""
    slot_size: int
    frames: int
    entries: tuple[PoolEntry, ...]

    @property
    def data_offset(self) -> int:
        """Where frame 0 lies, in bytes from the start of the region."""
        return 2 * self.slot_size


def _header_faults(header: PoolHeader, block: bytes, size: int) -> list[Fault]:
    fault = PoolHeader.fault
    if header.signature.rstrip(b"\0") != SIGNATURE:
        return [fault("signature", f"is {header.signature!r}")]
    faults = PoolHeader.basic_faults(block)
    if header.major != 1:
        return [fault("major", f"is {header.major}, this reader knows 1")]
    if header.entry_size != PoolEntry.SIZE:
        faults.append(fault("entry_size", f"is {header.entry_size}"))
    if header.sequence == 0:
        faults.append(fault("sequence", "is 0"))
    slot_size = header.slot_size
    if slot_size % FRAME_SIZE or not FRAME_SIZE <= slot_size <= _SLOT_MAX:
        return [*faults, fault("slot_size", f"is {slot_size}")]
    if 2 * slot_size + header.frames * FRAME_SIZE > size:
        faults.append(fault("frames", f"is {header.frames}, more than {size} bytes have"))
    if header.entry_count > entries_max(slot_size):
        faults.append(fault("entry_count", f"is {header.entry_count}"))
    for name in ("reserved", "reserved_2"):
        if any(getattr(header, name)):
            faults.append(fault(name, "is not zero"))
    return faults


def _entry_faults(entry: PoolEntry, frames: int) -> list[Fault]:
    fault, faults = PoolEntry.fault, []
    try:
        if not entry.text or "\0" in entry.text:
            faults.append(fault("name", f"is {entry.text!r}"))
    except UnicodeDecodeError:
        faults.append(fault("name", "is not UTF-8"))
    if entry.frames == 0 or entry.end > frames:
        text = f"is {entry.frames} from {entry.first} on; the area has {frames}"
        faults.append(fault("frames", text))
    if entry.nbytes > entry.frames * FRAME_SIZE:
        faults.append(fault("nbytes", f"is {entry.nbytes}, in {entry.frames} frames"))
    if entry.ndim > DIMENSIONS_MAX:
        return [*faults, fault("ndim", f"is {entry.ndim}")]
    if entry.order not in (b"C", b"F"):
        faults.append(fault("order", f"is {entry.order!r}"))
    if any(struct.unpack("<8Q", entry.shape)[entry.ndim :]):
        faults.append(fault("shape", f"has lengths behind the {entry.ndim} that count"))
    try:
        json.loads(entry.dtype.rstrip(b"\0").decode("ascii"))
    except ValueError:
        faults.append(fault("dtype", f"is {entry.dtype!r}"))
    for name in ("reserved", "reserved_2"):
        if any(getattr(entry, name)):
            faults.append(fault(name, "is not zero"))
    return faults


def read_slot(
    read: _Reader, size: int, slot: int, slot_size: int
) -> tuple[Directory | None, list[Fault]]:
    """One slot, and what is wrong with it."""
    base = slot * slot_size
    if base + PoolHeader.SIZE > size:
        return None, [PoolHeader.fault("signature", "lies behind the end of the region")]
    block = read(base, PoolHeader.SIZE)
    header = PoolHeader.unpack(block)
    faults = _header_faults(header, block, size)
    if faults:
        return None, faults
    if header.slot_size != slot_size:
        return None, [PoolHeader.fault("slot_size", f"is {header.slot_size}, not {slot_size}")]
    raw = read(base + PoolHeader.SIZE, header.entry_count * PoolEntry.SIZE)
    total = fletcher64(raw)
    if total != header.entries_checksum:
        text = f"is {header.entries_checksum:#018x}, the entries give {total:#018x}"
        return None, [PoolHeader.fault("entries_checksum", text)]
    starts = range(0, len(raw), PoolEntry.SIZE)
    entries = tuple(PoolEntry.unpack(raw[at : at + PoolEntry.SIZE]) for at in starts)
    faults = [fault for entry in entries for fault in _entry_faults(entry, header.frames)]
    faults = faults or _common_faults(entries)
    if faults:
        return None, faults
    found = Directory(header.uuid, header.sequence, slot, slot_size, header.frames, entries)
    return found, []


def _common_faults(entries: Iterable[PoolEntry]) -> list[Fault]:
    """What no entry can have alone: overlaps and names used twice."""
    faults, end, names = [], 0, set()
    for entry in sorted(entries, key=lambda each: each.first):
        if entry.first < end:
            faults.append(PoolEntry.fault("first", f"is {entry.first}, inside another array"))
        if entry.name in names:
            faults.append(PoolEntry.fault("name", f"{entry.text!r} is there twice"))
        names.add(entry.name)
        end = max(end, entry.end)
    return faults


def read_directory(read: _Reader, size: int) -> tuple[Directory | None, list[Fault]]:
    """The current directory of a region, or what is wrong with both slots."""
    first, faults = read_slot(read, size, 0, _slot_size(read, size))
    second, more = read_slot(read, size, 1, _slot_size(read, size))
    found = [each for each in (first, second) if each is not None]
    if not found:
        return None, [*faults, *more]
    return max(found, key=lambda each: each.sequence), []


def _slot_size(read: _Reader, size: int) -> int:
    """The size that header 0 says, or the one that a search for header 1 finds."""
    if size < PoolHeader.SIZE:
        return SLOT_SIZE
    block = read(0, PoolHeader.SIZE)
    header = PoolHeader.unpack(block)
    if not _header_faults(header, block, size):
        return header.slot_size
    candidate = FRAME_SIZE
    while candidate <= min(_SLOT_MAX, size - PoolHeader.SIZE):
        block = read(candidate, PoolHeader.SIZE)
        header = PoolHeader.unpack(block)
        if not _header_faults(header, block, size) and header.slot_size == candidate:
            return candidate
        candidate *= 2
    return SLOT_SIZE


def pack_directory(directory: Directory) -> bytes:
    """The bytes of a slot, as many as are in use."""
    raw = b"".join(entry.pack() for entry in directory.entries)
    header = PoolHeader(
        signature=SIGNATURE,
        uuid=directory.uuid,
        major=1,
        minor=0,
        entry_size=PoolEntry.SIZE,
        sequence=directory.sequence,
        slot_size=directory.slot_size,
        frames=directory.frames,
        entry_count=len(directory.entries),
        entries_checksum=fletcher64(raw),
    )
    return header.sealed() + raw
