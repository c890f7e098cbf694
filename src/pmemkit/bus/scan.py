"""From labels to namespaces, by the kernel's rules.

Invariants:
1. A label counts when its slot is in use, it says which slot it is in, and its checksum is right;
   everything else about it is judged here, with the region that it claims to belong to.
2. A set of labels is a namespace when each position 0 … n-1 has exactly one label of the same uuid,
   cookie and number of dimms. A set that lacks one stops the scan of its region, in the kernel too:
   then no namespace is shown and the fault says why.
3. Namespaces are numbered as the kernel numbers them: by their physical start, compared byte by
   byte as it lies in memory on a little-endian machine, lowest byte first. Within 4 GiB that is the
   order on media; beyond, it is not. One empty seed follows them.

Source: ``scan_labels`` and ``create_namespace_pmem`` of the kernel (read, not copied).

What this does not do: I/O, info blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final
from uuid import UUID

from pmemkit.formats import guids
from pmemkit.formats.cookie import Cookies, cookies
from pmemkit.formats.labels import Label, LabelArea, LabelV2

from .machine import DimmSpec

__all__ = ["REGION_ALIGN", "FoundNamespace", "RegionScan", "RegionSpan", "Span", "scan"]

REGION_ALIGN: Final = 16 << 20
"""What Linux allocates namespaces in, in regions that are at least as large."""
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """What one dimm lends to a region."""

    name: str
    spec: DimmSpec
    size: int
    """Bytes; they begin at ``spec.dpa``."""
    area: LabelArea | None
    """``None``: the dimm has no label storage."""


@dataclass(frozen=True, slots=True)
class RegionSpan:
    """A region before its labels are looked at."""

    index: int
    start: int
    """Physical address."""
    spans: tuple[Span, ...]

    @property
    def ways(self) -> int:
        """Dimms of the set."""
        return len(self.spans)

    @property
    def size(self) -> int:
        """Bytes of the region."""
        return min(span.size for span in self.spans) * self.ways

    @property
    def cookies(self) -> Cookies:
        """The interleave-set cookies."""
        return cookies([span.spec.identity() for span in self.spans])

    @property
    def labelled(self) -> bool:
        """True when the kernel makes namespaces from labels here: each dimm has an index block."""
        return all(span.area is not None and span.area.current is not None for span in self.spans)

    @property
    def version(self) -> tuple[int, int] | None:
        """The version of the index blocks, ``None`` where they differ or are missing."""
        found = set()
        for span in self.spans:
            current = span.area.current if span.area is not None else None
            found.add((current.header.major, current.header.minor) if current else None)
        return found.pop() if len(found) == 1 else None

    @property
    def cookie(self) -> int:
        """The cookie that labels of this region carry; also what ``iset_id`` shows."""
        if all(span.area is None for span in self.spans):
            return self.cookies.v1
        return self.cookies.of_version(*(self.version or (1, 2)))

    @property
    def align(self) -> int:
        """What sizes and starts of namespaces are multiples of, in bytes of the region."""
        if self.size < REGION_ALIGN:
            return _PAGE
        return REGION_ALIGN if REGION_ALIGN % self.ways == 0 else REGION_ALIGN * self.ways


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNamespace:
    """A namespace as its labels describe it. Bytes."""

    uuid: UUID
    name: str
    offset: int
    """In the region."""
    size: int
    lbasize: int
    flags: int
    claim: UUID | None
    """The abstraction GUID; ``None`` under version 1.1, which has none."""
    labels: tuple[Label, ...]
    """By position."""


@dataclass(frozen=True, slots=True)
class RegionScan:
    """What the labels of a region say."""

    namespaces: tuple[FoundNamespace, ...]
    busy: tuple[tuple[int, int], ...]
    """``(offset, length)`` in the region of everything that labels reserve, sorted."""
    faults: tuple[str, ...]
    """What keeps labels, or the whole region, from being used."""
    damage: tuple[str, ...] = ()
    """Those of :attr:`faults` that no label of another set of dimms explains."""
    blocked: bool = False
    """True when the kernel gives up on the region."""
    foreign: tuple[Label, ...] = field(default=())
    """Labels of another set of dimms: their cookie differs."""


def scan(region: RegionSpan) -> RegionScan:
    """Finds the namespaces of a labelled region."""
    faults: list[str] = []
    foreign: list[Label] = []
    skipped: set[str] = set()
    busy: set[tuple[int, int]] = set()
    sets: dict[UUID, dict[int, Label]] = {}
    blocked = False
    for span in region.spans:
        labels = span.area.labels if span.area is not None else ()
        overlap = _overlap(labels)
        if overlap is not None:
            faults.append(f"{span.name}: {overlap}; the kernel refuses the dimm")
            blocked = True
        seen: set[UUID] = set()
        for label in labels:
            wrong = _refusal(region, span, label)
            reserved = _extent(region, span, label)
            if reserved is not None:
                busy.add(reserved)
            if wrong is not None:
                faults.append(f"{span.name}: slot {label.slot}: {wrong}")
                if not region.cookies.accepts(label.isetcookie, *(region.version or (1, 2))):
                    foreign.append(label)
                    skipped.add(faults[-1])
                continue
            if label.uuid in seen:
                faults.append(f"{span.name}: slot {label.slot}: uuid {label.uuid} is there twice")
                blocked = True
            seen.add(label.uuid)
            members = sets.setdefault(label.uuid, {})
            if label.position in members:
                faults.append(f"namespace {label.uuid} has two labels for {label.position}")
                blocked = True
            members[label.position] = label
    found = []
    for uuid, members in sets.items():
        lacking = [place for place in range(region.ways) if place not in members]
        if lacking:
            faults.append(f"namespace {uuid} has no label for position {lacking[0]}")
            blocked = True
            continue
        found.append(_namespace(region, [members[place] for place in range(region.ways)]))
    found.sort(key=lambda each: (region.start + each.offset).to_bytes(8, "little"))
    namespaces = () if blocked else tuple(found)
    damage = tuple(fault for fault in faults if fault not in skipped)
    return RegionScan(
        namespaces, tuple(sorted(busy)), tuple(faults), damage, blocked, tuple(foreign)
    )


def _extent(region: RegionSpan, span: Span, label: Label) -> tuple[int, int] | None:
    """Offset and length in the region of the part of the dimm that a label names, if there is."""
    start = max(label.dpa - span.spec.dpa, 0)
    end = min(label.dpa - span.spec.dpa + label.rawsize, span.size)
    return (start * region.ways, (end - start) * region.ways) if start < end else None


def _overlap(labels: Sequence[Label]) -> str | None:
    """The first two labels of a dimm that claim the same bytes."""
    ordered = sorted((each for each in labels if each.rawsize), key=lambda each: each.dpa)
    for first, second in pairwise(ordered):
        if first.dpa + first.rawsize > second.dpa:
            return (
                f"slots {first.slot} and {second.slot} overlap: {first.dpa:#x}+{first.rawsize:#x} "
                f"and {second.dpa:#x}+{second.rawsize:#x}"
            )
    return None


def _refusal(region: RegionSpan, span: Span, label: Label) -> str | None:
    """Why a label is no part of a namespace of this region."""
    version = region.version or (1, 2)
    if not region.cookies.accepts(label.isetcookie, *version):
        return (
            f"isetcookie is {label.isetcookie:#018x}, that of other dimms; these have "
            f"{region.cookies.of_version(*version):#018x} (pmem recookie adopts the labels)"
        )
    if label.nlabel != region.ways:
        return f"nlabel is {label.nlabel}, the region has {region.ways} dimms"
    if label.position >= label.nlabel:
        return f"position is {label.position} of {label.nlabel}"
    if label.dpa % _PAGE:
        return f"dpa is {label.dpa:#x}, no multiple of {_PAGE}"
    if label.rawsize % _PAGE or not label.rawsize:
        return f"rawsize is {label.rawsize:#x}, no positive multiple of {_PAGE}"
    first, behind = span.spec.dpa, span.spec.dpa + span.size
    if not first <= label.dpa < behind:
        return f"dpa is {label.dpa:#x}, expected {first:#x} to {behind:#x} (excluded)"
    if label.dpa + label.rawsize > behind:
        return f"rawsize is {label.rawsize:#x}: from {label.dpa:#x} on it ends behind {behind:#x}"
    if isinstance(label, LabelV2) and label.type_guid != guids.PERSISTENT_MEMORY:
        return f"type_guid is {label.type_guid}, expected {guids.PERSISTENT_MEMORY}"
    return None


def _namespace(region: RegionSpan, labels: list[Label]) -> FoundNamespace:
    first = labels[0]
    return FoundNamespace(
        uuid=first.uuid,
        name=first.name.split(b"\0", 1)[0].decode("utf-8", "replace"),
        offset=(first.dpa - region.spans[0].spec.dpa) * region.ways,
        size=sum(label.rawsize for label in labels),
        lbasize=first.lbasize,
        flags=first.flags,
        claim=first.abstraction_guid if isinstance(first, LabelV2) else None,
        labels=tuple(labels),
    )
