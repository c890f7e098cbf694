"""PFN (fsdax) and DAX (devdax) info blocks: where the page map ends and the data begin.

The block lies at byte 4096 of the namespace; its first 8 KiB belong to it and to nobody else:

    start_pad | 8 KiB reserved (the block in it) | page map, if map=dev | data | end_trunc

Invariants:
1. ``dataoff`` counts from the namespace plus ``start_pad``; ``npfns`` counts 4 KiB pages of data.
2. Alignment is that of physical addresses, so a block is valid only for the address where the
   namespace is plugged. An address that is a multiple of 2 MiB (1 GiB for 1 GiB alignment) will do
   for every multiple of it.
3. The kernel takes a block whose ``parent_uuid`` is *exactly* that of the label; all zero for a
   namespace without a label.

Source: the kernel's ``drivers/nvdimm/pfn.h`` and ``pfn_devs.c`` (read, not copied); checked against
blocks that ``ndctl write-infoblock`` made.

What this does not do: I/O; kernels with pages other than 4 KiB, except that their blocks are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Literal
from uuid import UUID

from pmemkit.errors import InvalidArgument
from pmemkit.formats.layout import Fault, Layout, at
from pmemkit.units import format_size

__all__ = [
    "ALIGNMENTS",
    "DESCRIPTOR_SIZE",
    "INFO_OFFSET",
    "PAGE_SIZE",
    "RESERVED_SIZE",
    "SUBSECTION_SIZE",
    "DaxInfo",
    "Info",
    "PfnInfo",
    "Probe",
    "Shape",
    "probe",
    "shape",
]

INFO_OFFSET: Final = 4096
"""Of the block, in bytes from the start of the namespace."""
RESERVED_SIZE: Final = 8192
"""Bytes in front of the page map that the kernel keeps for the block."""
PAGE_SIZE: Final = 4096
DESCRIPTOR_SIZE: Final = 64
"""Bytes of Linux's ``struct page``."""
SUBSECTION_SIZE: Final = 2 << 20
"""What Linux hot-plugs memory in, on x86 and arm64: start and end of a page-mapped range."""
ALIGNMENTS: Final = (4096, 2 << 20, 1 << 30)
_MODES: Final[dict[str, int]] = {"none": 0, "mem": 1, "dev": 2}


@dataclass(frozen=True, kw_only=True)
class _Info(Layout):
    """What both blocks are made of."""

    SIZE: ClassVar[int] = 4096
    SIGNATURE: ClassVar[bytes] = b""

    signature: bytes = at(0, 16, "bytes", wrong=(b"NVDIMM_PFN_INFX\0", b""))
    uuid: UUID = at(16, 16, "uuid")
    parent_uuid: UUID = at(
        32, 16, "uuid", rule="the uuid of the label; zero without one", wrong=(UUID(int=1),)
    )
    flags: int = at(48, 4, default=0)
    major: int = at(52, 2, default=1)
    minor: int = at(54, 2, default=4)
    dataoff: int = at(
        56,
        8,
        rule="a multiple of 4096 within the namespace that the alignment allows",
        wrong=(1, 0x1001, 1 << 62, (1 << 64) - 4096),
    )
    npfns: int = at(64, 8, rule="fits behind dataoff", wrong=((1 << 64) - 1, 1 << 52))
    mode: int = at(72, 4, rule="1 (mem) or 2 (dev)", wrong=(0, 3, (1 << 32) - 1))
    start_pad: int = at(76, 4, default=0, rule="keeps the start aligned", wrong=(4096, 1))
    end_trunc: int = at(80, 4, default=0, rule="keeps the end aligned", wrong=(4096, 1))
    align: int = at(
        84, 4, rule="a power of two, 4096 to 1 GiB", wrong=(0, 4097, 2048, 1 << 31, (1 << 32) - 1)
    )
    page_size: int = at(88, 4, default=PAGE_SIZE, rule="at most 4096 for map=dev", wrong=(1 << 16,))
    page_struct_size: int = at(
        92, 2, default=DESCRIPTOR_SIZE, rule="at least 64 for map=dev", wrong=(0, 32)
    )
    padding: bytes = at(94, 3994, "zero")
    checksum: int = at(4088, 8, "checksum", rule="fletcher64 over the block", wrong=(0,))

    @property
    def map(self) -> Literal["none", "mem", "dev", "unknown"]:
        """Where the page map lives."""
        match self.mode:
            case 0:
                return "none"
            case 1:
                return "mem"
            case 2:
                return "dev"
            case _:
                return "unknown"

    @property
    def alignment(self) -> int:
        """``align``, or what it was before version 1.2: the largest power of two in dataoff."""
        if self.minor < 2:
            return 1 << max(0, self.dataoff.bit_length() - 1)
        return self.align

    @property
    def pads(self) -> tuple[int, int]:
        """``start_pad`` and ``end_trunc``; before version 1.1 there were none."""
        return (self.start_pad, self.end_trunc) if self.minor >= 1 else (0, 0)

    def data_range(self, size: int) -> tuple[int, int]:
        """Offset and length of the data in a namespace of ``size`` bytes, for a valid block."""
        start_pad, end_trunc = self.pads
        start = start_pad + self.dataoff
        return start, size - start - end_trunc


@dataclass(frozen=True, kw_only=True)
class PfnInfo(_Info):
    """The info block of mode fsdax."""

    TITLE: ClassVar[str] = "PFN info block"
    SIGNATURE: ClassVar[bytes] = b"NVDIMM_PFN_INFO\0"


@dataclass(frozen=True, kw_only=True)
class DaxInfo(_Info):
    """The info block of mode devdax."""

    TITLE: ClassVar[str] = "DAX info block"
    SIGNATURE: ClassVar[bytes] = b"NVDIMM_DAX_INFO\0"


Info = PfnInfo | DaxInfo


@dataclass(frozen=True, slots=True)
class Shape:
    """How a namespace of mode fsdax or devdax is divided. Bytes, except ``npfns``."""

    dataoff: int
    npfns: int
    start_pad: int
    end_trunc: int

    @property
    def data_size(self) -> int:
        """Bytes that a user gets."""
        return self.npfns * PAGE_SIZE


def shape(
    size: int, *, map: Literal["mem", "dev"], align: int, start: int = 0, pad: bool = False
) -> Shape:
    """The division that today's kernel makes of ``size`` bytes at physical address ``start``.

    A start that is no multiple of 2 MiB is refused, as the kernel does; with ``pad`` the block
    skips to the next multiple of the alignment, 2 MiB at least, as ``ndctl write-infoblock`` does.
    Raises :class:`InvalidArgument`.
    """
    if align not in ALIGNMENTS:
        choices = ", ".join(format_size(each) for each in ALIGNMENTS)
        raise InvalidArgument(f"an alignment of {align} bytes is not one of {choices}", op="create")
    unit = max(align, SUBSECTION_SIZE)
    start_pad = -start % (unit if pad else SUBSECTION_SIZE)
    if start_pad and not pad:
        text = (
            f"the namespace would start at physical address {start:#x}, which is no multiple of "
            f"{format_size(SUBSECTION_SIZE)}; {start + start_pad:#x} is the next one"
        )
        raise InvalidArgument(text, op="create")
    end_trunc = (start + size) % unit
    pages = max(0, size - RESERVED_SIZE) // PAGE_SIZE
    descriptors = DESCRIPTOR_SIZE * pages if map == "dev" else 0
    dataoff = -(-(start + RESERVED_SIZE + descriptors) // unit) * unit - start
    data = size - start_pad - end_trunc - dataoff
    if data <= 0:
        text = (
            f"{format_size(size)} at {start:#x} leave no room for data aligned to "
            f"{format_size(unit)}: the data would begin {format_size(start_pad + dataoff)} in and "
            f"{format_size(end_trunc)} at the end are cut off"
        )
        raise InvalidArgument(text, op="create")
    return Shape(dataoff, data // PAGE_SIZE, start_pad, end_trunc)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a block is for one namespace.

    ``absent``: there is no block of this kind and the kernel goes on as if it was blank;
    ``valid``: the kernel takes it; ``unusable``: the kernel leaves the namespace disabled.
    """

    verdict: Literal["absent", "valid", "unusable"]
    info: Info | None
    faults: tuple[Fault, ...]


def probe(
    block: bytes, layout: type[PfnInfo] | type[DaxInfo], *, size: int, start: int, parent: UUID
) -> Probe:
    """Judges the 4096 bytes at :data:`INFO_OFFSET` of a namespace of ``size`` bytes at physical
    address ``start``, whose label has the uuid ``parent`` (zero without one)."""
    info = layout.unpack(block)
    faults = list(_presence_faults(info, block, parent))
    if faults:
        return Probe("absent", None, tuple(faults))
    faults = list(_use_faults(info, size, start))
    return Probe("unusable" if faults else "valid", info, tuple(faults))


def _presence_faults(info: Info, block: bytes, parent: UUID) -> Iterator[Fault]:
    if info.signature != info.SIGNATURE:
        yield info.fault("signature", f"is {info.signature!r}, expected {info.SIGNATURE!r}")
        signed = info.SIGNATURE + block[len(info.SIGNATURE) :]
        if any(info.signature[:8]) and not info.basic_faults(signed):
            # Who removes a block zeroes this word first; anything else is damage.
            yield info.fault(
                "checksum", "would be right under that signature: the block is damaged"
            )
        return
    yield from info.basic_faults(block)
    if info.parent_uuid != parent:
        yield info.fault("parent_uuid", f"is {info.parent_uuid}, the namespace has {parent}")


def _use_faults(info: Info, size: int, start: int) -> Iterator[Fault]:
    fault = info.fault
    if info.mode not in (1, 2):
        yield fault("mode", f"is {info.mode}, expected 1 (mem) or 2 (dev)")
    if info.mode == _MODES["dev"] and info.minor >= 4:
        if info.page_size > PAGE_SIZE:
            yield fault("page_size", f"is {info.page_size}, more than {PAGE_SIZE}")
        if info.page_struct_size < DESCRIPTOR_SIZE:
            yield fault("page_struct_size", f"is {info.page_struct_size}, below {DESCRIPTOR_SIZE}")
    align = info.alignment
    if align & (align - 1) or not PAGE_SIZE <= align <= ALIGNMENTS[-1]:
        yield fault("align", f"is {align}, no power of two from {PAGE_SIZE} to {ALIGNMENTS[-1]}")
        return
    start_pad, end_trunc = info.pads
    if (start + start_pad) % SUBSECTION_SIZE:
        yield fault("start_pad", f"is {start_pad}: {start + start_pad:#x} is no multiple of 2 MiB")
    if (start + size - end_trunc) % SUBSECTION_SIZE:
        end = start + size - end_trunc
        yield fault("end_trunc", f"is {end_trunc}: the end {end:#x} is no multiple of 2 MiB")
    yield from _range_faults(info, size, start_pad + end_trunc)
    if align > size:
        yield fault("align", f"is {align}, more than the {size} bytes of the namespace")
    if (start + start_pad + info.dataoff) % align or info.dataoff % PAGE_SIZE:
        at_address = f"address {start + start_pad + info.dataoff:#x}"
        yield fault("dataoff", f"is {info.dataoff}: {at_address} is no multiple of {align}")


def _range_faults(info: Info, size: int, cut: int) -> Iterator[Fault]:
    if info.dataoff < RESERVED_SIZE or info.dataoff >= size - cut:
        yield info.fault(
            "dataoff", f"is {info.dataoff}, expected {RESERVED_SIZE} to {size - cut} (excluded)"
        )
        return
    room = (size - cut - info.dataoff) // PAGE_SIZE
    if info.npfns > room:
        yield info.fault("npfns", f"is {info.npfns}; {room} pages fit behind dataoff")
