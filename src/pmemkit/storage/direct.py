"""Copies that bypass the buffer of :mod:`pmemkit.storage.copying`: the kernel reads a file straight
into a mapping or writes it straight from there, around the page cache, and mappings are copied from
one to the other.

A carrier moves ranges between two regions; :func:`carrier_for` says which one there is, or why
there is none.

Invariants:
1. Only bytes that are taken as they are go this way: no layers, no mode sector, no cache.
2. A file with bad blocks is not read or written past their list.

What this does not do: holes, ends, durability; the copy around it does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from pmemkit.errors import PmemError
from pmemkit.storage.copying import CopyFailed, CopyReport, DeviceSource, DeviceTarget
from pmemkit.storage.region import Region

if TYPE_CHECKING:
    from pmemkit._native.direct import Copier

__all__ = [
    "AROUND",
    "Around",
    "Between",
    "Carrier",
    "FromFile",
    "IntoFile",
    "carrier_for",
    "copy_carried",
]

Around = Literal["auto", "on", "off"]
AROUND: tuple[Around, ...] = get_args(Around)
"""``auto``: around the page cache unless it has half of the bytes or more already."""

_STEP_SIZE = 64 << 20
"""Bytes between two looks at signals and the progress."""


class Carrier(Protocol):
    """Moves bytes of a source region to a target region."""

    def move(self, source_offset: int, target_offset: int, length: int) -> None:
        """Moves a range; an error's ``moved`` says how far it came."""

    def describe(self) -> dict[str, object]:
        """What it did, for a report."""


@dataclass(slots=True)
class _OfFile:
    """What the two carriers with a file have in common."""

    copier: "Copier"
    file_start: int
    region: Region

    def describe(self) -> dict[str, object]:
        """What it did, for a report."""
        totals = self.copier.totals()
        return {
            "engine": self.copier.engine,
            "direct_bytes": totals["direct"],
            "buffered_bytes": totals["buffered"],
            "notice": self.copier.notice,
        }


@dataclass(slots=True)
class FromFile(_OfFile):
    """The kernel reads the file into the target's mapping."""

    def move(self, source_offset: int, target_offset: int, length: int) -> None:
        """Moves a range; an error's ``moved`` says how far it came."""
        start = self.file_start + source_offset
        self.copier.transfer(self.region.medium, start, target_offset, length)


@dataclass(slots=True)
class IntoFile(_OfFile):
    """The kernel writes the file from the source's mapping."""

    def move(self, source_offset: int, target_offset: int, length: int) -> None:
        """Moves a range; an error's ``moved`` says how far it came."""
        start = self.file_start + target_offset
        self.copier.transfer(self.region.medium, start, source_offset, length)


@dataclass(slots=True)
class Between:
    """Both are mapped: one copy, from the one to the other."""

    source: int
    target: int

    def move(self, source_offset: int, target_offset: int, length: int) -> None:
        """Moves a range; an error's ``moved`` says how far it came."""
        from pmemkit._native import sg

        sg.copy([(self.source, source_offset, length)], [(self.target, target_offset, length)])

    def describe(self) -> dict[str, object]:
        """What it did, for a report."""
        return {"engine": "mapped", "direct_bytes": 0, "buffered_bytes": 0, "notice": None}


def carrier_for(
    source: Region, target: Region, *, around: Around = "auto", depth: int = 8, ring: bool = True
) -> Carrier:
    """The quickest way from one to the other. :class:`NotSupported`, :class:`Busy` or
    :class:`ReadOnly` say why there is none."""
    from pmemkit._native import direct

    numbers = source.lend("copy", write=False), target.lend("copy", write=True)
    for way, file_side, other in (("in", source, target), ("out", target, source)):
        opened = file_side.opened
        medium = opened.medium
        # A file behind a page cache that has no bad blocks: it is asked for bytes, not its mapping.
        behind_cache = medium.loads_by_mapping and not medium.stores_by_mapping
        if opened.file is None or not behind_cache:
            continue
        fd = opened.file.fileno()
        copier = direct.Copier(fd, way, around=around, depth=depth, ring=ring)
        start = opened.part[0] if opened.part is not None else 0
        return (FromFile if way == "in" else IntoFile)(copier, start, other)
    return Between(*numbers)


def copy_carried(
    source: DeviceSource,
    target: DeviceTarget,
    carrier: Carrier,
    *,
    progress: Callable[[int], None] = lambda copied: None,
) -> CopyReport:
    """As :func:`pmemkit.storage.copying.copy`, with a carrier between the regions of both devices,
    which have no layers."""
    target.check_room(source.size)
    report = CopyReport()
    try:
        for offset, length, hole in source.runs():
            if hole:
                target.zero(offset, length)
                report.zero_bytes += length
                progress(report.size)
                continue
            for at in range(offset, offset + length, _STEP_SIZE):
                step = min(_STEP_SIZE, offset + length - at)
                carrier.move(source.start + at, target.start + at, step)
                report.data_bytes += step
                progress(report.size)
        target.finish(report.size)
    except PmemError as cause:
        report.data_bytes += cause.moved or 0
        raise CopyFailed(report, cause) from cause
    except (OSError, KeyboardInterrupt) as cause:
        raise CopyFailed(report, cause) from cause
    return report
