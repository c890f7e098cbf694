"""The label storage area of a dimm: two index blocks and the slots of namespace labels.

    0                index block 0
    index_size       index block 1
    2 * index_size   slot 0, slot 1, …      128 bytes each (version 1.1) or 256 (1.2)

Invariants:
1. A change writes labels into slots that the current index block calls free, and then the *other*
   index block with the next sequence number, whole. A torn write leaves the current block current.
2. Of two valid blocks the later one in the cycle 1, 2, 3, 1 is current; when both have the same
   number, block 1 is: the kernel's own first update of a fresh area makes such a pair.
3. A block that is not valid is zeroed before it is written. What a torn write left, and the next
   write torn elsewhere, could make up the block of the change that never happened.
4. A reader takes the number of slots from media (older kernels counted fewer) and checks that it
   fits; everything else it computes.

Sources: the kernel's ``drivers/nvdimm/label.[ch]``, EDK2's ``NvdimmLabel.h`` (read, not copied).

What this does not do: I/O, or deciding which labels make a namespace (:mod:`pmemkit.bus`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import ClassVar, Final
from uuid import UUID

from pmemkit.errors import InvalidArgument, NoSpace
from pmemkit.formats.layout import Fault, Layout, at

__all__ = [
    "AREA_SIZE_MIN",
    "LABELS",
    "SIGNATURE",
    "Index",
    "IndexHeader",
    "Label",
    "LabelArea",
    "LabelFlag",
    "LabelV1",
    "LabelV2",
    "Sizing",
    "Write",
    "apply",
    "erase",
    "initialise",
    "label_class",
    "next_sequence",
    "read_area",
    "sizing",
]

SIGNATURE: Final = b"NAMESPACE_INDEX\0"
AREA_SIZE_MIN: Final = 1024
"""Bytes of the smallest area that has room for two labels."""
_INDEX_ALIGN: Final = 256
_SLOTS_MIN: Final = 2

Write = tuple[int, bytes]
"""An offset in the area, in bytes, and what goes there."""


class LabelFlag(IntFlag):
    """Flags of a label."""

    READ_ONLY = 1
    LOCAL = 2
    BTT = 4
    UPDATING = 8
    """Set by kernels while they write a set of labels. Readers ignore it; old kernels left it."""


@dataclass(frozen=True, kw_only=True)
class IndexHeader(Layout):
    """The first 72 bytes of an index block; the bitmap of free slots follows."""

    TITLE: ClassVar[str] = "namespace index block"
    SIZE: ClassVar[int] = 72

    sig: bytes = at(0, 16, "bytes", rule="NAMESPACE_INDEX", wrong=(b"NAMESPACE_INDEY\0", b""))
    flags: bytes = at(16, 3, "bytes", default=bytes(3))
    labelsize: int = at(
        19, 1, rule="label size >> 8: 0 under version 1.1, 1 under 1.2", wrong=(2, 255)
    )
    seq: int = at(20, 4, rule="1, 2 or 3 in the low two bits", wrong=(0, 4))
    myoff: int = at(24, 8, rule="block number times index size", wrong=(1, 1 << 63))
    mysize: int = at(
        32, 8, rule="at least 72, at most the index size", wrong=(0, 71, 1 << 32, (1 << 64) - 1)
    )
    otheroff: int = at(40, 8, rule="offset of the other block", wrong=(1, 1 << 63))
    labeloff: int = at(48, 8, rule="twice the index size", wrong=(0, 1, 1 << 63))
    nslot: int = at(
        56, 4, rule="slots and both blocks fit into the area", wrong=(0, 1 << 20, (1 << 32) - 1)
    )
    major: int = at(60, 2, rule="1", wrong=(0, 2, 65535))
    minor: int = at(62, 2, rule="1 (128-byte labels) or 2 (256-byte labels)", wrong=(0, 65535))
    checksum: int = at(64, 8, "checksum", rule="fletcher64 over the whole block", wrong=(0,))


@dataclass(frozen=True, kw_only=True)
class _LabelStart(Layout):
    """What labels of both versions begin with."""

    uuid: UUID = at(0, 16, "uuid")
    name: bytes = at(16, 64, "text", default=b"")
    flags: int = at(80, 4, default=0)
    nlabel: int = at(84, 2, rule="number of dimms in the set", wrong=(0, 65535))
    position: int = at(86, 2, rule="below nlabel", wrong=(65535,))
    isetcookie: int = at(88, 8, rule="the cookie of the region", wrong=(0, 1))
    lbasize: int = at(96, 8, default=0)
    dpa: int = at(104, 8, rule="within the dimm, a multiple of 4096", wrong=(1 << 63, 1))
    rawsize: int = at(
        112, 8, rule="ends within the dimm, a multiple of 4096", wrong=(0, 1 << 63, 1)
    )
    slot: int = at(120, 4, rule="the number of its slot", wrong=((1 << 32) - 1,))


@dataclass(frozen=True, kw_only=True)
class LabelV1(_LabelStart):
    """A namespace label under index version 1.1. It has no checksum."""

    TITLE: ClassVar[str] = "namespace label 1.1"
    SIZE: ClassVar[int] = 128

    unused: bytes = at(124, 4, "zero")


@dataclass(frozen=True, kw_only=True)
class LabelV2(_LabelStart):
    """A namespace label under index version 1.2."""

    TITLE: ClassVar[str] = "namespace label 1.2"
    SIZE: ClassVar[int] = 256

    align: int = at(124, 1, default=0)
    reserved: bytes = at(125, 3, "zero")
    type_guid: UUID = at(
        128, 16, "guid", rule="the type of the region's range", wrong=(UUID(int=1),)
    )
    abstraction_guid: UUID = at(
        144, 16, "guid", rule="none, btt, btt2, pfn or dax", wrong=(UUID(int=1),)
    )
    reserved2: bytes = at(160, 88, "zero")
    checksum: int = at(248, 8, "checksum", rule="fletcher64 over the label", wrong=(0,))


Label = LabelV1 | LabelV2
LABELS: Final[dict[tuple[int, int], type[LabelV1] | type[LabelV2]]] = {
    (1, 1): LabelV1,
    (1, 2): LabelV2,
}


def label_class(major: int, minor: int) -> type[LabelV1] | type[LabelV2]:
    """The label format of an index version."""
    return LabelV1 if (major, minor) < (1, 2) else LabelV2


@dataclass(frozen=True, slots=True)
class Sizing:
    """How an area of ``area_size`` bytes is divided."""

    area_size: int
    label_size: int
    slot_count: int
    index_size: int

    def slot_offset(self, slot: int) -> int:
        """Where a slot begins, in bytes from the start of the area."""
        return 2 * self.index_size + slot * self.label_size


def _index_size(slots: int) -> int:
    bytes_used = IndexHeader.SIZE + -(-slots // 8)
    return -(-bytes_used // _INDEX_ALIGN) * _INDEX_ALIGN


def sizing(area_size: int, label_size: int) -> Sizing:
    """The division that today's kernel and ndctl compute.

    Raises :class:`InvalidArgument` where not even two labels fit.
    """
    reserve = 2 * _index_size(area_size // label_size)
    slots = max(0, area_size - reserve) // label_size
    index_size = _index_size(slots)
    if slots < _SLOTS_MIN or 2 * index_size + slots * label_size > area_size:
        text = (
            f"a label area of {area_size} bytes is too small for {_SLOTS_MIN} labels of "
            f"{label_size} bytes; {AREA_SIZE_MIN} bytes are the least, QEMU wants 128 KiB"
        )
        raise InvalidArgument(text, op="labels")
    return Sizing(area_size, label_size, slots, index_size)


def next_sequence(seq: int) -> int:
    """The number after this one: 1, 2, 3, 1."""
    return (0, 2, 3, 1)[seq & 3]


@dataclass(frozen=True, slots=True)
class Index:
    """A valid index block."""

    number: int
    """Which of the two."""
    header: IndexHeader
    free: int
    """The bitmap of free slots: bit n is slot n. Bits from ``nslot`` on mean nothing."""

    def is_free(self, slot: int) -> bool:
        """True when a label may be written there."""
        return bool(self.free >> slot & 1)

    @property
    def free_count(self) -> int:
        """Free slots."""
        return (self.free & ((1 << self.header.nslot) - 1)).bit_count()


@dataclass(frozen=True, slots=True)
class LabelArea:
    """A label storage area as it was read. ``current`` is ``None`` for one without labels."""

    sizing: Sizing
    indexes: tuple[Index | None, Index | None]
    current: Index | None
    faults: tuple[Fault, ...]
    """Of both index blocks and of the labels that are in use."""
    labels: tuple[Label, ...]
    """The valid labels in use, by slot."""
    stored: tuple[Label, ...] = ()
    """Every label whose slot number fits, freed ones too: what ``ndctl read-labels`` shows."""
    headers: tuple[IndexHeader, ...] = ()
    """Of both index blocks as they are, valid or not."""

    def update(self, *, add: Sequence[Label] = (), remove: Sequence[int] = ()) -> list[list[Write]]:
        """The writes of one atomic change, in groups; each is durable before the next begins.

        ``remove`` names slots; ``slot`` of the labels in ``add`` is chosen here. Raises
        :class:`NoSpace` when the slots do not suffice.
        """
        if self.current is None:
            raise InvalidArgument("the label area is not initialised", op="labels")
        header, free = self.current.header, self.current.free
        open_slots = [slot for slot in range(header.nslot) if self.current.is_free(slot)]
        if len(add) > len(open_slots):
            text = (
                f"{len(open_slots)} of {header.nslot} label slots are free, {len(add)} are needed"
            )
            raise NoSpace(text, op="labels")
        writes = []
        for label, slot in zip(add, open_slots, strict=False):
            writes.append((self.sizing.slot_offset(slot), replace(label, slot=slot).sealed()))
            free &= ~(1 << slot)
        for slot in remove:
            free |= 1 << slot
        other = 1 - self.current.number
        if self.indexes[other] is None:
            size = self.sizing.index_size
            writes.append((other * size, bytes(size)))
        index = replace(
            header,
            seq=next_sequence(header.seq),
            myoff=other * self.sizing.index_size,
            otheroff=self.current.number * self.sizing.index_size,
        )
        block = (other * self.sizing.index_size, _pack_index(index, free, self.sizing.index_size))
        return [group for group in (writes, [block]) if group]


def initialise(area: bytes, major: int = 1, minor: int = 1) -> list[list[Write]]:
    """The writes that make an area hold no labels, in the given version, in groups; each is durable
    before the next begins. Only index blocks are written, as ndctl does. Afterwards block 0, with
    sequence number 3, is current.

    At every moment in between a reader finds the labels that were there, or none.
    """
    if (major, minor) not in LABELS:
        raise InvalidArgument(f"label version {major}.{minor} is neither 1.1 nor 1.2", op="labels")
    division = sizing(len(area), LABELS[major, minor].SIZE)
    size = division.index_size
    groups = _release(area)
    if not groups:
        places = max(_index_places(len(area)))
        groups += [[(0, bytes(2 * places))]] if any(area[: 2 * places]) else []
    for number, seq in ((1, 2), (0, 3)):
        header = IndexHeader(
            sig=SIGNATURE,
            labelsize=division.label_size >> 8,
            seq=seq,
            myoff=number * size,
            mysize=size,
            otheroff=(1 - number) * size,
            labeloff=2 * size,
            nslot=division.slot_count,
            major=major,
            minor=minor,
        )
        free = (1 << division.slot_count) - 1
        groups.append([(number * size, _pack_index(header, free, size))])
    # Index blocks of the other version may lie elsewhere; one that stayed would be believed.
    for place in _index_places(len(area)) - {0, size}:
        if place >= 2 * size:
            groups.append([(place, bytes(IndexHeader.SIZE))])
    return groups


def erase(area: bytes, start: int = 0, length: int | None = None) -> list[list[Write]]:
    """The writes that zero an area, or a part of it: afterwards the dimm is label-less.

    The whole area goes from its labels to no labels to label-less; for a part nothing is promised.
    """
    length = len(area) - start if length is None else length
    if start < 0 or length < 0 or start + length > len(area):
        text = f"{length} bytes at {start} are not within the label area of {len(area)} bytes"
        raise InvalidArgument(text, op="zero-labels")
    whole = (start, length) == (0, len(area))
    groups = _release(area) if whole else []
    return [*groups, [(start, bytes(length))]] if length else groups


def _release(area: bytes) -> list[list[Write]]:
    """Frees every label, in both index blocks: the older one must not come back when the newer one
    is overwritten."""
    groups: list[list[Write]] = []
    for _ in range(2):
        found = read_area(area)
        if found.current is None:
            break
        nslot = found.current.header.nslot
        step = found.update(remove=range(nslot))
        area = apply(area, step)
        groups += step
    return groups


def apply(area: bytes, groups: Sequence[Sequence[Write]]) -> bytes:
    """The area after these writes."""
    changed = bytearray(area)
    for group in groups:
        for offset, data in group:
            changed[offset : offset + len(data)] = data
    return bytes(changed)


def _index_places(area_size: int) -> set[int]:
    """Where index blocks of any version may begin."""
    sizes = {sizing(area_size, label_size).index_size for label_size in (128, 256)}
    return {0, *sizes}


def _pack_index(header: IndexHeader, free: int, size: int) -> bytes:
    bitmap = (free & ((1 << header.nslot) - 1)).to_bytes(-(-header.nslot // 8), "little")
    return IndexHeader.seal((header.pack() + bitmap).ljust(size, b"\0"))


def read_area(area: bytes) -> LabelArea:
    """Reads an area as the kernel does: version 1.1 is tried first, then 1.2.

    Damage is reported, not raised. ``InvalidArgument`` for an area too small to hold any label.
    """
    tellings: list[list[Fault]] = []
    for label_size in (LabelV1.SIZE, LabelV2.SIZE):
        division = sizing(len(area), label_size)
        blocks = (_read_index(area, division, 0), _read_index(area, division, 1))
        found = [block for block in blocks if isinstance(block, Index)]
        faults = [fault for block in blocks if isinstance(block, list) for fault in block]
        if found:
            current = _choose(found)
            labels = tuple(_labels(area, division, current, faults))
            pair = (_only_index(blocks[0]), _only_index(blocks[1]))
            layout = label_class(current.header.major, current.header.minor)
            stored = tuple(_stored(area, division, layout, current.header.nslot))
            heads = _headers(area, division)
            return LabelArea(division, pair, current, tuple(faults), labels, stored, heads)
        tellings.append(faults)
    # Where it is more than a blank place, the version that the blocks were made for tells why.
    most = max(tellings, key=lambda told: sum(fault.field != "sig" for fault in told))
    division = sizing(len(area), LabelV1.SIZE)
    stored = tuple(_stored(area, division, LabelV1, division.slot_count))
    heads = _headers(area, division)
    wide = sizing(len(area), LabelV2.SIZE)
    return LabelArea(wide, (None, None), None, tuple(most), (), stored, heads)


def _headers(area: bytes, division: Sizing) -> tuple[IndexHeader, ...]:
    return tuple(IndexHeader.unpack(area[at:]) for at in (0, division.index_size))


def _only_index(block: Index | list[Fault]) -> Index | None:
    return block if isinstance(block, Index) else None


def _choose(found: list[Index]) -> Index:
    if len(found) == 1:
        return found[0]
    first, second = found
    newest_is_first = next_sequence(second.header.seq) == first.header.seq & 3
    same = first.header.seq & 3 == second.header.seq & 3
    return first if newest_is_first and not same else second


def _read_index(area: bytes, division: Sizing, number: int) -> Index | list[Fault]:
    """The block, or everything that is wrong with it: nothing for one of the other version."""
    size = division.index_size
    block = area[number * size : (number + 1) * size]
    header = IndexHeader.unpack(block)
    faults = list(_version_faults(header))
    if not faults and division.label_size != LABELS[header.major, header.minor].SIZE:
        return []
    faults = faults or list(_index_faults(header, block, division, number))
    if faults:
        name = f"{IndexHeader.TITLE} {number}"
        return [replace(fault, structure=name) for fault in faults]
    bitmap = block[IndexHeader.SIZE : IndexHeader.SIZE + -(-header.nslot // 8)]
    return Index(number, header, int.from_bytes(bitmap, "little"))


def _version_faults(header: IndexHeader) -> Iterator[Fault]:
    """What makes it no index block that can be read any further."""
    fault = IndexHeader.fault
    if header.sig != SIGNATURE:
        yield fault("sig", f"is {header.sig!r}, expected {SIGNATURE!r}")
    elif header.major != 1:
        yield fault("major", f"makes version {header.major}.{header.minor}, expected 1.1 or 1.2")
    elif header.minor not in (1, 2):
        yield fault("minor", f"makes version 1.{header.minor}, expected 1.1 or 1.2")
    elif header.labelsize != header.minor - 1:
        expected = f"version 1.{header.minor} has {header.minor - 1}"
        yield fault("labelsize", f"is {header.labelsize}, {expected}")


def _index_faults(
    header: IndexHeader, block: bytes, division: Sizing, number: int
) -> Iterator[Fault]:
    """The other rules of the kernel, in its order; stricter where a version is not known to us."""
    fault, size = IndexHeader.fault, division.index_size
    yield from IndexHeader.basic_faults(block)
    if not header.seq & 3:
        yield fault("seq", f"is {header.seq}, whose low two bits are 0; expected 1, 2 or 3")
    for name, expected in (
        ("myoff", number * size),
        ("otheroff", (1 - number) * size),
        ("labeloff", 2 * size),
    ):
        if getattr(header, name) != expected:
            yield fault(name, f"is {getattr(header, name)}, expected {expected}")
    if not IndexHeader.SIZE <= header.mysize <= size:
        yield fault("mysize", f"is {header.mysize}, expected {IndexHeader.SIZE} to {size}")
    # The bitmap ends with the block too: there may be room for a label more than it has bits.
    room = (division.area_size - 2 * size) // division.label_size
    room = min(room, 8 * (size - IndexHeader.SIZE))
    if not 0 < header.nslot <= room:
        yield fault("nslot", f"is {header.nslot}; {room} labels fit into the area")


def _labels(area: bytes, division: Sizing, index: Index, faults: list[Fault]) -> Iterator[Label]:
    layout = label_class(index.header.major, index.header.minor)
    for slot in range(index.header.nslot):
        if index.is_free(slot):
            continue
        start = division.slot_offset(slot)
        block = area[start : start + division.label_size]
        label = layout.unpack(block)
        wrong = list(_label_faults(label, block, slot))
        faults += wrong
        if not wrong:
            yield label


def _label_faults(label: Label, block: bytes, slot: int) -> Iterator[Fault]:
    """What makes the kernel ignore a label."""
    if label.slot != slot:
        yield label.fault("slot", f"is {label.slot} in slot {slot}")
    for fault in label.basic_faults(block):
        yield replace(fault, message=f"{fault.message} (slot {slot})")


def _stored(
    area: bytes, division: Sizing, layout: type[LabelV1] | type[LabelV2], slots: int
) -> Iterator[Label]:
    row = layout.field("slot")
    for slot in range(slots):
        start = 2 * division.index_size + slot * layout.SIZE
        raw = area[start + row.offset : start + row.end]
        if int.from_bytes(raw, "little") == slot:
            yield layout.unpack(area[start : start + layout.SIZE])
