"""What makes a size, a start or an alignment legal, and the nearest legal ones.

Everything here is asked before anything is written. A refusal names the value, the rule, and what
would be accepted; a note is for what works here and fails elsewhere.

What this does not do: I/O.
"""

from itertools import pairwise
from typing import Final

from pmemkit.bus.image import ImageBus, ImageRegion
from pmemkit.bus.scan import REGION_ALIGN
from pmemkit.errors import Corrupt, InvalidArgument, NoSpace
from pmemkit.formats.labels import IndexHeader
from pmemkit.units import format_size

__all__ = ["SIZE_MIN", "legal_size", "notes", "placement_notes", "require_sound", "require_start"]

SIZE_MIN: Final = 16 << 20
"""Bytes of the smallest namespace that may have an info block."""
_SECTION: Final = 128 << 20
_SUBSECTION: Final = 2 << 20


def legal_size(region: ImageRegion, size: int | None, align: int, *, raw: bool) -> int:
    """The size a new namespace gets: ``size`` if it is legal, the largest extent if it is ``None``.

    Raises :class:`InvalidArgument` with the nearest legal sizes, or :class:`NoSpace`.
    """
    unit = max(region.span.align, align)
    gaps = [length for _, length in region.free()]
    largest = max(gaps, default=0)
    if size is None:
        size = largest // unit * unit
        if size == 0:
            raise NoSpace(_full(region, largest, unit), op="create", path=region.path)
    if size <= 0 or size % unit:
        below, above = size // unit * unit, -(-max(size, 1) // unit) * unit
        nearest = [each for each in (below, above) if 0 < each <= largest]
        hint = " or ".join(f"{each} ({format_size(each)})" for each in nearest) or "none fits"
        text = (
            f"a size of {size} bytes is no positive multiple of {format_size(unit)}, what "
            f"{region.dev} allocates in; the nearest legal size is {hint}"
        )
        raise InvalidArgument(text, op="create", path=region.path)
    if not raw and size < SIZE_MIN:
        text = f"{format_size(size)} are too small: only raw namespaces may be below 16 MiB"
        raise InvalidArgument(text, op="create", path=region.path)
    if size > largest:
        text = (
            f"{format_size(size)} are more than the largest free extent of {region.dev}, "
            f"{format_size(largest)} ({largest} bytes)"
        )
        raise NoSpace(text, op="create", path=region.path)
    return size


def _full(region: ImageRegion, largest: int, unit: int) -> str:
    if largest:
        return (
            f"the largest free extent of {region.dev} is {format_size(largest)}, less than the "
            f"{format_size(unit)} that the alignment needs"
        )
    return f"{region.dev} has no free extent of {format_size(unit)}"


def require_start(region: ImageRegion, start: int, *, force: bool) -> None:
    """Refuses a physical start that Linux cannot give a page map.

    ndctl wants 16 MiB; the kernel 2 MiB, which is what ``force`` leaves.
    """
    unit = _SUBSECTION if force else min(REGION_ALIGN, region.span.align)
    unit = max(unit, _SUBSECTION)
    if start % unit:
        text = (
            f"the namespace would start at physical address {start:#x}, no multiple of "
            f"{format_size(unit)}: {region.dev} itself starts at {region.start:#x}. "
            + (
                "Give the dimm before it a size that is a multiple of 16 MiB plus its label area, "
                "and every dimm align = 2M"
                if region.start % unit
                else "Use an offset that is a multiple of it"
            )
        )
        raise InvalidArgument(text, op="create", path=region.path)


def require_sound(region: ImageRegion, op: str) -> None:
    """Refuses to change a region whose labels are damaged: one that cannot be read may own any
    space. Raises :class:`Corrupt`.

    One index block of the two may be: that is what a power failure in the middle of a change
    leaves. The other one is what holds, and the next change makes the damaged one whole.
    """
    for dimm in region.dimms:
        area = dimm.span.area
        if area is None:
            continue
        if area.current is None:
            if any(dimm.read(dimm.label_offset, dimm.spec.label_size)):
                text = (
                    f"{dimm.name} has a label area that is not blank and no valid index block "
                    f"({area.faults[0]}); zero-labels or init-labels --force drops what is there"
                )
                raise Corrupt(text, op=op, path=dimm.spec.path, offset=dimm.label_offset)
            continue
        for fault in area.faults:
            if not fault.structure.startswith(IndexHeader.TITLE):
                raise Corrupt(f"{dimm.name}: {fault}", op=op, path=dimm.spec.path)
    if region.scan is not None and region.scan.damage:
        raise Corrupt(region.scan.damage[0], op=op, path=region.path)


def notes(bus: ImageBus) -> list[str]:
    """What is damaged on these images, or made for another place."""
    found = []
    for region in bus.regions:
        if region.scan is not None:
            found += [f"{region.dev}: {fault}" for fault in region.scan.faults]
        for each in region.namespaces:
            found += [f"{each.dev}: {fault}" for fault in each.claim.faults]
    for dimm in bus.dimms:
        area = dimm.span.area
        blank = area is None or all(fault.field == "sig" for fault in area.faults)
        if area is not None and (area.current is not None or not blank):
            found += [f"{dimm.name}: {fault}" for fault in area.faults]
    return found


def placement_notes(bus: ImageBus) -> list[str]:
    """What users of QEMU and Linux stumble over when they plug dimms of these sizes."""
    found = []
    for dimm in bus.dimms:
        usable = dimm.file_size - dimm.spec.label_size
        if usable % _SUBSECTION:
            found.append(
                f"{dimm.name} ({dimm.spec.path}): {usable} bytes in front of the label area are no "
                f"multiple of 2 MiB; without align=2M the next dimm starts misaligned, and fsdax "
                f"and devdax are refused there. Grow the file by {-usable % _SUBSECTION} bytes"
            )
        if 0 < dimm.spec.label_size < 128 << 10:
            found.append(
                f"{dimm.name}: a label area of {format_size(dimm.spec.label_size)} is less than "
                "the 128 KiB that QEMU accepts"
            )
    for before, region in pairwise(bus.regions):
        end = before.start + before.size
        if before.start < region.start and (end - 1) // _SECTION == region.start // _SECTION:
            found.append(
                f"{before.dev} and {region.dev} share the 128 MiB memory section at "
                f"{region.start // _SECTION * _SECTION:#x}: kernels before 5.3 can give only one "
                "of them a page map"
            )
    return found
