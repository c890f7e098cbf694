"""CXL as sysfs has it in ``/sys/bus/cxl/devices``: memory devices, root decoders, regions.

A memory device hangs on an endpoint port, whose decoders say which of its bytes are whose. A root
decoder is a window of physical addresses; a region is a part of a window that decoders of one or
several devices serve in turn.

What this does not do: make or destroy a region.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmemkit.bus.memory import Range
from pmemkit.bus.sysfs import Node, devices

__all__ = [
    "CxlDecoder",
    "CxlMemdev",
    "CxlRegion",
    "cxl_memdevs",
    "cxl_regions",
    "device_ranges",
    "endpoint_of",
    "root_decoders",
]

_Kind = Literal["ram", "pmem"]
_WAYS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlMemdev:
    """A memory device. Sizes are bytes."""

    dev: str
    place: Path
    serial: int | None = None
    node: int | None = None
    ram_size: int = 0
    pmem_size: int = 0
    ram_free: int = 0
    pmem_free: int = 0
    decoders: tuple[str, ...] = ()
    """Root decoders that reach it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlDecoder:
    """A root decoder."""

    dev: str
    place: Path
    size: int = 0
    ways: int = 1
    granularity: int = 256
    kinds: frozenset[_Kind] = frozenset()
    """What its window can hold."""
    bridges: tuple[Path, ...] = ()
    """The host bridges it goes to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CxlRegion:
    """A region."""

    dev: str
    place: Path
    kind: _Kind
    size: int = 0
    ways: int = 1
    granularity: int = 256
    uuid: str | None = None
    decoder: str = ""
    members: tuple[str, ...] = ()
    """Memory devices in the order of their positions."""
    committed: bool = False
    enabled: bool = False


def root_decoders(sysfs: str | Path = "/sys") -> list[CxlDecoder]:
    """Every root decoder, in the kernel's order."""
    found = []
    for node in devices(sysfs, "cxl", r"decoder\d+\.\d+"):
        root = node.place.parent
        if not re.fullmatch(r"root\d+", root.name):
            continue
        kinds: set[_Kind] = set()
        if node.number("cap_ram") == 1:
            kinds.add("ram")
        if node.number("cap_pmem") == 1:
            kinds.add("pmem")
        ids = re.findall(r"\b\d{1,9}\b", node.text("target_list") or "")
        bridges = [root / f"dport{each}" for each in ids]
        found.append(
            CxlDecoder(
                dev=node.name,
                place=node.place,
                size=node.size("size"),
                ways=node.number("interleave_ways") or 1,
                granularity=node.number("interleave_granularity") or 256,
                kinds=frozenset(kinds),
                bridges=tuple(bridge.resolve() for bridge in bridges if bridge.exists()),
            )
        )
    return found


def endpoint_of(memdev: Path, sysfs: str | Path = "/sys") -> Node | None:
    """The endpoint port of a memory device."""
    for node in devices(sysfs, "cxl", r"endpoint\d+"):
        if (node.place / "uport").resolve() == memdev:
            return node
    return None


def cxl_memdevs(sysfs: str | Path = "/sys") -> list[CxlMemdev]:
    """Every memory device, in the kernel's order."""
    roots = root_decoders(sysfs)
    found = []
    for node in devices(sysfs, "cxl", r"mem\d+"):
        sizes = {kind: node.size(f"{kind}/size") for kind in ("ram", "pmem")}
        used = {"ram": 0, "pmem": 0}
        endpoint = endpoint_of(node.place, sysfs)
        for decoder in endpoint.below(r"decoder\d+\.\d+") if endpoint else []:
            mode = decoder.text("mode")
            if mode in used:
                used[mode] += decoder.size("dpa_size")
        reached = [root.dev for root in roots if set(root.bridges) & set(node.place.parents)]
        found.append(
            CxlMemdev(
                dev=node.name,
                place=node.place,
                serial=node.number("serial"),
                node=node.node(),
                ram_size=sizes["ram"],
                pmem_size=sizes["pmem"],
                ram_free=max(0, sizes["ram"] - used["ram"]),
                pmem_free=max(0, sizes["pmem"] - used["pmem"]),
                decoders=tuple(reached),
            )
        )
    return found


def cxl_regions(sysfs: str | Path = "/sys") -> list[CxlRegion]:
    """Every region, in the kernel's order; one whose kind cannot be read is left out."""
    owners = _owners(sysfs)
    found = []
    for node in devices(sysfs, "cxl", r"region\d+"):
        mode = node.text("mode")
        kind: _Kind
        if mode == "ram":
            kind = "ram"
        elif mode == "pmem":
            kind = "pmem"
        else:
            continue
        ways = min(max(1, node.number("interleave_ways") or 1), _WAYS)
        targets = [node.text(f"target{index}") or "" for index in range(ways)]
        found.append(
            CxlRegion(
                dev=node.name,
                place=node.place,
                kind=kind,
                size=node.size("size"),
                ways=ways,
                granularity=node.number("interleave_granularity") or 256,
                uuid=node.text("uuid"),
                decoder=node.place.parent.name,
                members=tuple(owners[each] for each in targets if each in owners),
                committed=node.number("commit") == 1,
                enabled=node.state() is None,
            )
        )
    return found


def device_ranges(region: CxlRegion, memdev: str, sysfs: str | Path = "/sys") -> tuple[Range, ...]:
    """The addresses, the device's own, that a region takes of a memory device."""
    node, found = Node(region.dev, region.place), []
    for index in range(region.ways):
        decoder = next(
            iter(devices(sysfs, "cxl", re.escape(node.text(f"target{index}") or "-"))), None
        )
        if decoder is None or (decoder.place.parent / "uport").resolve().name != memdev:
            continue
        start, size = decoder.number("dpa_resource"), decoder.size("dpa_size")
        if start is not None and start >= 0 and size:
            found.append((start, start + size))
    return tuple(found)


def _owners(sysfs: str | Path) -> dict[str, str]:
    """The memory device of each endpoint decoder."""
    return {
        decoder.name: (endpoint.place / "uport").resolve().name
        for endpoint in devices(sysfs, "cxl", r"endpoint\d+")
        for decoder in endpoint.below(r"decoder\d+\.\d+")
    }
