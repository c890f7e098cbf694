"""Latency, bandwidth and distance of a region, and who says so.

Asked in this order, and the first that says a thing is believed: the owner's machine file; what the
kernel worked out of CDAT and the links of a CXL region (``access0`` of it, Linux 6.10); HMAT, as
``access0`` of its node; the CDAT of its devices, which knows no link; the SLIT for the distance.
A node is in HMAT and SLIT as sysfs has them only once memory of it is online; until then, and where
the firmware gives a region and ordinary memory one node, they cannot tell the region from that.

Invariants:
1. Attributes are those of loads, in nanoseconds and bytes a second, as the nearest processors see
   them.
2. What a table says senselessly it does not say; nothing is guessed or measured.
3. Of a region of several devices the slowest gives the latency and all of them the bandwidth; where
   one of them says nothing, the region has none.

What this does not do: choose where memory goes (:mod:`pmemkit.memory.tiers`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pmemkit.bus.cxl import device_ranges
from pmemkit.bus.declarations import Declaration
from pmemkit.bus.evidence_firmware import CdatRange, cdat_of
from pmemkit.bus.evidence_kernel import KernelRegion, find_region
from pmemkit.bus.machine import DimmSpec
from pmemkit.bus.nodes import distance_to_processors, is_online
from pmemkit.bus.sysfs import Node

__all__ = [
    "ATTRIBUTES",
    "Attribute",
    "Attributes",
    "Origin",
    "home_node",
    "node_attributes",
    "region_attributes",
    "stated_attributes",
]

Origin = Literal["user", "machine", "cdat", "hmat", "slit"]
ATTRIBUTES: Final = ("latency_ns", "bandwidth", "distance")


class Attribute(NamedTuple):
    """A value and who says it."""

    value: float
    origin: Origin


Attributes = Mapping[str, Attribute]
"""By name, one of :data:`ATTRIBUTES`."""

_MOST: Final = {"latency_ns": 10**9, "bandwidth": 10**15, "distance": 254}
_MEGA: Final = 10**6
_MEBI: Final = 1 << 20


def region_attributes(
    region: str | KernelRegion,
    sysfs: str | Path = "/sys",
    declarations: Iterable[Declaration] = (),
) -> Attributes:
    """What is known of a region of this machine. Raises :class:`InvalidArgument` for a name of
    none."""
    found = find_region(region, sysfs) if isinstance(region, str) else region
    declared = tuple(declarations)
    whole = [each for each in declared if each.fits(found, None)]
    dimms = [[each for each in declared if each.fits(found, dimm)] for dimm in found.dimms]
    # The nearest node is another's memory, which says nothing of this.
    node = found.target_node if is_online(found.target_node, sysfs) else None
    return _first(
        _combined([whole], "machine"),
        _combined(dimms, "machine"),
        _of_path(found, sysfs),
        node_attributes(node, sysfs) if node is not None else {},
        _of_devices(found, sysfs),
    )


def stated_attributes(dimm: DimmSpec) -> Attributes:
    """What the machine file of an image says of a dimm."""
    return _combined([[dimm]], "machine")


def node_attributes(number: int, sysfs: str | Path = "/sys") -> Attributes:
    """What HMAT and SLIT say of the memory of a node."""
    node = Path(sysfs) / "devices" / "system" / "node" / f"node{number}"
    access = Node("initiators", node / "access0" / "initiators")
    found = _sound("hmat", access.number("read_latency"), access.number("read_bandwidth"), _MEBI)
    distance = distance_to_processors(number, sysfs)
    slit = {} if distance is None else {"distance": Attribute(distance, "slit")}
    return _first(found, slit)


def home_node(region: KernelRegion, sysfs: str | Path = "/sys") -> int | None:
    """The node that a region's memory is on, or, as long as that is none of the kernel's, the
    nearest to it."""
    if is_online(region.target_node, sysfs):
        return region.target_node
    places = [region.nd] if region.nd else [Node(each.dev, each.place) for each in region.dax]
    near = [place.node() for place in places]
    return next((each for each in near if is_online(each, sysfs)), None)


def _first(*sources: Attributes) -> Attributes:
    """Of each attribute what the first source says that says any."""
    found: dict[str, Attribute] = {}
    for each in reversed(sources):
        found |= each
    return found


def _sound(
    origin: Origin, latency: float | None, rate: float | None, unit: int = 1
) -> dict[str, Attribute]:
    told = {"latency_ns": latency, "bandwidth": None if rate is None else rate * unit}
    return {
        name: Attribute(value, origin)
        for name, value in told.items()
        if value is not None and 0 < value <= _MOST[name]
    }


# --- the owner -----------------------------------------------------------------------------------


def _combined(
    dimms: Sequence[Sequence[Declaration] | Sequence[DimmSpec]], origin: Origin
) -> dict[str, Attribute]:
    """What is said of dimms, as that of all of them together: the first word on each counts."""
    found = {}
    for name in ATTRIBUTES:
        said = [
            next((value for each in dimm if (value := getattr(each, name)) is not None), None)
            for dimm in dimms
        ]
        known = [value for value in said if value is not None]
        if known and len(known) == len(said):
            value = sum(known) if name == "bandwidth" else max(known)
            found[name] = Attribute(value, origin)
    return found


# --- CXL -----------------------------------------------------------------------------------------


def _of_path(region: KernelRegion, sysfs: str | Path) -> Attributes:
    """What the kernel says of a CXL region as a whole, links and switches included."""
    if region.cxl is None:
        return {}
    access = Node("access0", region.cxl.place / "access0")
    return _sound("cdat", access.number("read_latency"), access.number("read_bandwidth"), _MEGA)


def _of_devices(region: KernelRegion, sysfs: str | Path) -> Attributes:
    """What the tables of a CXL region's devices say of the parts that it takes of them."""
    if region.cxl is None or not region.memdevs:
        return {}
    latencies, rates = [], []
    for each in region.memdevs:
        table = cdat_of(each.dev, Path(sysfs))
        spans = device_ranges(region.cxl, each.dev, sysfs)
        wanted = [part for part in table.ranges if part.overlaps(spans)] if table else []
        if not spans:
            wanted = [part for part in wanted if part.persistent == (region.cxl.kind == "pmem")]
        latencies += [_figure(part, "latency") for part in wanted] or [None]
        least = [_figure(part, "bandwidth") for part in wanted]
        known = [rate for rate in least if rate is not None]
        rates.append(min(known) if known and len(known) == len(least) else None)
    slow = [each for each in latencies if each is not None]
    wide = [each for each in rates if each is not None]
    return _sound(
        "cdat",
        max(slow) if len(slow) == len(latencies) else None,
        sum(wide) if len(wide) == len(rates) else None,
        _MEGA,
    )


def _figure(part: CdatRange, name: str) -> float | None:
    """Of reads, or of reads and writes alike."""
    told = {each.name: each.value for each in part.performance}
    return told.get(f"read {name}", told.get(name))
