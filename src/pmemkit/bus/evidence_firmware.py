"""What firmware and kernel say of a range of physical addresses and of the node that it is on.

Memory maps: ``/proc/iomem`` as the kernel uses it, ``/sys/firmware/memmap`` as the firmware gave
it, and the kernel's command line, which can make persistent memory of RAM (``memmap=SIZE!START``).
Performance: HMAT through ``access0/initiators`` of a node, CDAT through the endpoint of a CXL
device, memory tiers, distances.

Invariants:
1. Performance decides nothing: it is shown, because fast storage and slow memory both exist.
2. Without root the maps show no addresses; then they say nothing, and nothing fails.
3. A CDAT is a table that a device made: every length in it is checked before it is used.

What this does not do: read tables of ACPI, which kernels show to root alone and as they were before
hot-plug.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pmemkit.bus.memory import Range
from pmemkit.bus.nature import Evidence, Nature
from pmemkit.bus.sysfs import Node, devices
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size, parse_size

__all__ = [
    "Cdat",
    "CdatFigure",
    "CdatRange",
    "cdat_of",
    "map_evidence",
    "node_evidence",
    "parse_cdat",
]

_LIMIT: Final = 1 << 20
_KINDS: Final = (
    "Persistent Memory",
    "Persistent Memory (legacy)",
    "Soft Reserved",
    "System RAM",
)


def _read(path: Path, limit: int = _LIMIT) -> bytes:
    """The first bytes of a file that may not be there, or not be ours to read."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError:
        return b""


# --- memory maps ---------------------------------------------------------------------------------


def map_evidence(ranges: tuple[Range, ...], sysfs: Path, proc: Path) -> list[Evidence]:
    """What memory maps say of ranges of physical addresses."""
    found = []
    kinds = _overlapping(_iomem(proc), ranges)
    if kinds:
        found.append(Evidence("/proc/iomem", ", ".join(kinds), None, "hint"))
    firmware = _overlapping(_firmware_map(sysfs), ranges)
    if firmware:
        text = ", ".join(firmware)
        if firmware == ["System RAM"] and any(each.startswith("Persistent") for each in kinds):
            text += ": what the kernel calls persistent is emulated in RAM"
        found.append(Evidence("memory map of the firmware", text, None, "hint"))
    for argument, start, size in _emulated(proc):
        if any(start < end and begin < start + size for begin, end in ranges):
            value = (
                f"emulated in RAM: {argument} takes {format_size(size)} of it at {start:#x}; "
                "it is lost at power-off"
            )
            change = f"no {argument} on the kernel command line: it is ordinary RAM then"
            found.append(Evidence("kernel command line", value, None, "hint", change))
    return found


def _overlapping(entries: list[tuple[int, int, str]], ranges: tuple[Range, ...]) -> list[str]:
    """The kinds of entries that overlap any of the ranges, each once."""
    kinds = [
        kind
        for start, end, kind in entries
        if any(start < behind and begin < end for begin, behind in ranges)
    ]
    return list(dict.fromkeys(kinds))


def _iomem(proc: Path) -> list[tuple[int, int, str]]:
    """Entries of ``/proc/iomem`` that name a kind of memory. A kernel shows addresses to root
    only; others see zeros, which overlap nothing."""
    text = _read(proc / "iomem").decode("utf-8", "replace")
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r" *([0-9a-f]{1,16})-([0-9a-f]{1,16}) : (.*)", line)
        if match is None:
            continue
        start, end, kind = int(match[1], 16), int(match[2], 16) + 1, match[3]
        known = kind in _KINDS or kind.startswith(("System RAM (", "CXL Window "))
        if known and end - start > 1:
            found.append((start, end, kind))
    return found


def _firmware_map(sysfs: Path) -> list[tuple[int, int, str]]:
    """The map that the firmware gave, before the command line changed it."""
    found = []
    for node in Node("memmap", sysfs / "firmware" / "memmap").below(r"\d+"):
        start, end, kind = node.number("start"), node.number("end"), node.text("type")
        if start is not None and end is not None and kind in _KINDS and 0 <= start < end:
            found.append((start, end + 1, kind))
    return found


def _emulated(proc: Path) -> list[tuple[str, int, int]]:
    """Argument, start and size of each ``memmap=SIZE!START``."""
    words = _read(proc / "cmdline").decode("utf-8", "replace").split()
    found = []
    for word in words:
        if not word.startswith("memmap="):
            continue
        for part in word.removeprefix("memmap=").split(","):
            size, mark, start = part.partition("!")
            try:
                if mark:
                    found.append((f"memmap={part}", _address(start), _address(size)))
            except InvalidArgument:
                continue
    return found


def _address(text: str) -> int:
    """A number as the kernel parses one: hexadecimal with 0x, with a unit of a letter."""
    match = re.fullmatch(r"0x([0-9a-f]{1,16})([kmgtpe]?)", text.lower())
    if match is None:
        return parse_size(text)
    return int(match[1], 16) << (10 * " kmgtpe".index(match[2] or " "))


# --- nodes ---------------------------------------------------------------------------------------

_HMAT: Final = (
    ("read_latency", "read latency", "ns"),
    ("write_latency", "write latency", "ns"),
    ("read_bandwidth", "read bandwidth", "MiB/s"),
    ("write_bandwidth", "write bandwidth", "MiB/s"),
)


def node_evidence(number: int | None, sysfs: Path) -> list[Evidence]:
    """What is known of the node that a region's memory would be on."""
    if number is None or number < 0:
        return []
    node = Node(f"node{number}", sysfs / "devices/system/node" / f"node{number}")
    found = []
    access = Node("initiators", node.place / "access0/initiators")
    told = [
        f"{words} {value} {unit}"
        for name, words, unit in _HMAT
        if (value := access.number(name)) is not None and value > 0
    ]
    if told:
        found.append(Evidence(f"HMAT of node {number}", ", ".join(told), None, "hint"))
    place = [f"target node {number}"]
    if node.place.exists():
        place.append("with processors" if node.text("cpulist") else "without processors")
        distances = (node.text("distance") or "").split()[:64]
        if len(distances) > 1:
            place.append(f"distances {' '.join(distances)}")
    else:
        place.append("without memory so far")
    found.append(Evidence("SRAT and SLIT", ", ".join(place), None, "hint"))
    tier = _tier(number, sysfs)
    if tier is not None:
        found.append(Evidence("memory tier", tier, None, "hint"))
    return found


def _tier(number: int, sysfs: Path) -> str | None:
    """The tier that the kernel has put a node in; only a node with memory is in one."""
    tiers = Node("memory_tiering", sysfs / "devices/virtual/memory_tiering")
    for tier in tiers.below(r"memory_tier\d+"):
        nodes = tier.text("nodelist") or tier.text("nodes") or ""
        for part in nodes.split(","):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
            if match is not None and int(match[1]) <= number <= int(match[2] or match[1]):
                return tier.name
    return None


# --- CDAT ----------------------------------------------------------------------------------------

_HEADER: Final = struct.Struct("<IBB6xI")
_RECORD: Final = struct.Struct("<BxH")
_DSMAS: Final = struct.Struct("<BxHBBxxQQ")
_DSLBIS: Final = struct.Struct("<BxHBBBxQ3H2x")
_DSEMTS: Final = struct.Struct("<BxHBBxxQQ")
_NON_VOLATILE: Final = 1 << 2
_FIGURES: Final = ("latency", "read latency", "write latency")
_RATES: Final = ("bandwidth", "read bandwidth", "write bandwidth")
_EFI: Final = ("conventional memory", "conventional memory for a specific purpose", "reserved")
_NO_VALUE: Final = (0, 0xFFFF)


class CdatFigure(NamedTuple):
    """A latency in nanoseconds or a bandwidth in MB/s, by its name in the table."""

    name: str
    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.15g} {self.unit}"


@dataclass(frozen=True, slots=True)
class CdatRange:
    """A range of a device's own addresses (DSMAS), with what other records say of it."""

    handle: int
    start: int
    length: int
    persistent: bool
    performance: tuple[CdatFigure, ...] = ()
    """Latency and bandwidth (DSLBIS)."""
    efi: str | None = None
    """The type that it would have in EFI's memory map (DSEMTS)."""

    def overlaps(self, spans: tuple[Range, ...]) -> bool:
        """True where it has bytes of any of these; with none, of whatever is asked for."""
        end = self.start + self.length
        return not spans or any(start < end and self.start < behind for start, behind in spans)


@dataclass(frozen=True, slots=True)
class Cdat:
    """A Coherent Device Attribute Table."""

    ranges: tuple[CdatRange, ...] = ()

    def evidence(self, dev: str, spans: tuple[Range, ...]) -> list[Evidence]:
        """What it says of ranges of the device's addresses; all of it where none are known."""
        found = []
        for each in self.ranges:
            if not each.overlaps(spans):
                continue
            kind = "persistent" if each.persistent else "volatile"
            says: Nature = "storage" if each.persistent else "memory"
            source = f"CDAT of {dev}"
            where = f"{format_size(each.length)} at {each.start:#x}"
            # What cannot be told to be of this region does not decide over it.
            decides = bool(spans)
            found.append(
                Evidence(
                    source,
                    f"{kind} ({where})",
                    says if decides else None,
                    "firmware" if decides else "hint",
                )
            )
            more = [*map(str, each.performance), *([f"EFI: {each.efi}"] if each.efi else [])]
            if more:
                found.append(Evidence(source, f"{', '.join(more)} ({where})", None, "hint"))
        return found


def parse_cdat(table: bytes) -> Cdat | None:
    """The table, or ``None`` for what is none: too short, of a wrong length or checksum."""
    if len(table) < _HEADER.size:
        return None
    length, _, _, _ = _HEADER.unpack_from(table)
    if not _HEADER.size <= length <= len(table) or sum(table[:length]) % 256:
        return None
    records, place = [], _HEADER.size
    while place < length:
        if length - place < _RECORD.size:
            return None
        kind, size = _RECORD.unpack_from(table, place)
        if size < _RECORD.size or size > length - place:
            return None
        records.append((kind, table[place : place + size]))
        place += size
    return Cdat(tuple(_ranges(records)))


def _ranges(records: list[tuple[int, bytes]]) -> list[CdatRange]:
    found = []
    for body in (body for kind, body in records if kind == 0 and len(body) == _DSMAS.size):
        _, _, handle, flags, start, length = _DSMAS.unpack(body)
        found.append(
            CdatRange(
                handle,
                start,
                length,
                bool(flags & _NON_VOLATILE),
                tuple(_performance(handle, records)),
                _efi_type(handle, records),
            )
        )
    return found


def _performance(handle: int, records: list[tuple[int, bytes]]) -> list[CdatFigure]:
    """Latencies, which come in picoseconds, and bandwidths, in MB/s, both times a base unit."""
    found = []
    for body in (body for kind, body in records if kind == 1 and len(body) == _DSLBIS.size):
        _, _, owner, flags, what, unit, value, _, _ = _DSLBIS.unpack(body)
        # The low bits of the flags are the level of the memory; 0 is the memory itself.
        if owner != handle or flags & 0xF or value in _NO_VALUE:
            continue
        if what < len(_FIGURES):
            found.append(CdatFigure(_FIGURES[what], value * unit / 1000, "ns"))
        elif what < len(_FIGURES) + len(_RATES):
            name = _RATES[what - len(_FIGURES)]
            found.append(CdatFigure(name, value * unit, "MB/s"))
    return list(dict.fromkeys(found))


def _efi_type(handle: int, records: list[tuple[int, bytes]]) -> str | None:
    for body in (body for kind, body in records if kind == 4 and len(body) == _DSEMTS.size):
        _, _, owner, efi, _, _ = _DSEMTS.unpack(body)
        if owner == handle and efi < len(_EFI):
            return _EFI[efi]
    return None


def cdat_of(memdev: str, sysfs: Path) -> Cdat | None:
    """The table of a CXL memory device, where the kernel has read it."""
    for node in devices(sysfs, "cxl", r"endpoint\d+"):
        if (node.place / "uport").resolve().name == memdev:
            return parse_cdat(_read(node.place / "CDAT"))
    return None
