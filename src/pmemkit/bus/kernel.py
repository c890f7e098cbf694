"""The kernel bus: what sysfs says under ``/sys/bus/nd/devices``.

The kernel's words become ndctl's: a namespace claimed by a ``btt`` device is ``sector``, by ``pfn``
``fsdax``, by ``dax`` ``devdax``; its size is then that of the claiming device. What an attribute
does not say is left out; nothing is guessed. A machine without nvdimms has no bus.

What this does not do: open device nodes, load modules, need root.
"""

import re
from dataclasses import replace
from pathlib import Path

from pmemkit.bus.model import Bus, Dimm, Map, Mapping, Mode, Namespace, Region
from pmemkit.bus.sysfs import Node, devices
from pmemkit.media.badblocks import BAD_BLOCK_SIZE, BadRun, clip

__all__ = ["kernel_bus"]

_MODES: dict[str, Mode] = {
    "raw": "raw",
    "safe": "sector",
    "memory": "fsdax",
    "dax": "devdax",
}
_MAPS: dict[str, Map] = {"none": "none", "ram": "mem", "pmem": "dev"}
_NO_UUID = "00000000-0000-0000-0000-000000000000"


def kernel_bus(sysfs: str | Path = "/sys", *, media_errors: bool = False) -> tuple[Bus, ...]:
    """Every bus of the machine, in the kernel's order; with ``media_errors`` where bad blocks are,
    and not only how many."""
    nodes = devices(sysfs, "nd")
    buses = []
    for node in nodes:
        if not re.fullmatch(r"ndbus\d+", node.name):
            continue
        below = [each for each in nodes if node.place in each.place.parents]
        buses.append(
            Bus(
                provider=node.text("provider") or "unknown",
                dev=node.name,
                dimms=tuple(_dimm(each) for each in _of(below, r"nmem\d+")),
                regions=tuple(
                    _region(each, below, media_errors) for each in _of(below, r"region\d+")
                ),
            )
        )
    return tuple(buses)


def _of(nodes: list[Node], pattern: str) -> list[Node]:
    return [node for node in nodes if re.fullmatch(pattern, node.name)]


def _dimm(node: Node) -> Dimm:
    return Dimm(
        dev=node.name,
        id=node.text("nfit/id"),
        handle=node.number("nfit/handle"),
        phys_id=node.number("nfit/phys_id"),
        state=node.state(),
    )


def _region(node: Node, nodes: list[Node], media_errors: bool) -> Region:
    number = node.name.removeprefix("region")
    inside = [each for each in nodes if node.place in each.place.parents]
    bad = _bad_blocks(node)
    namespaces = tuple(
        _with_bad_blocks(namespace, node, each, inside, media_errors) if bad else namespace
        for each in _of(inside, rf"namespace{number}\.\d+")
        if (namespace := _namespace(each, inside)).size > 0
    )
    return Region(
        dev=node.name,
        size=node.number("size") or 0,
        available_size=node.number("available_size") or 0,
        max_available_extent=node.number("max_available_extent"),
        type="volatile" if "DEVTYPE=nd_volatile" in (node.text("uevent") or "") else "pmem",
        numa_node=node.node(),
        iset_id=node.number("set_cookie") or None,
        badblock_count=sum(run.length for run in bad) or None,
        badblocks=[dict(run._asdict()) for run in bad] if bad and media_errors else None,
        mappings=_mappings(node),
        state=node.state(),
        persistence_domain=node.text("persistence_domain") or "unknown",
        namespaces=namespaces,
    )


def _bad_blocks(node: Node) -> tuple[BadRun, ...]:
    """The kernel's list of a region: first block and count a line."""
    lines = (node.text("badblocks") or "").splitlines()
    found = (re.fullmatch(r"(\d{1,18}) (\d{1,18})", line) for line in lines)
    return tuple(BadRun(int(each[1]), int(each[2])) for each in found if each)


def _with_bad_blocks(
    namespace: Namespace, region: Node, node: Node, nodes: list[Node], media_errors: bool
) -> Namespace:
    """The bad blocks of a region that lie in a namespace, as far as addresses may be read."""
    holder = next((each for each in nodes if each.name == node.text("holder")), None)
    # Of mode sector the raw blocks count, with those of its metadata.
    place = node if holder is None or namespace.mode == "sector" else holder
    base, start, size = region.number("resource"), place.number("resource"), place.size("size")
    if not base or not start or start < base or (start - base) % BAD_BLOCK_SIZE:
        return namespace
    bad = clip(_bad_blocks(region), start - base, size)
    listed = [dict(run._asdict()) for run in bad] if media_errors else None
    return replace(
        namespace,
        badblock_count=sum(run.length for run in bad) or None,
        badblocks=listed or None if namespace.mode != "sector" else None,
    )


def _mappings(node: Node) -> tuple[Mapping, ...]:
    mappings = []
    for index in range(node.number("mappings") or 0):
        fields = (node.text(f"mapping{index}") or "").split(",")
        if len(fields) < 3:
            continue
        try:
            offset, length = int(fields[1], 0), int(fields[2], 0)
            position = int(fields[3], 0) if len(fields) > 3 else index
        except ValueError:
            continue
        mapping = Mapping(dimm=fields[0], offset=offset, length=length, position=position)
        mappings.append(mapping)
    return tuple(mappings)


def _namespace(node: Node, nodes: list[Node]) -> Namespace:
    holder_name = node.text("holder")
    holder = next((each for each in nodes if each.name == holder_name), None)
    claim = holder or node
    mode = _MODES.get(node.text("mode") or "raw", "unknown")
    raw_uuid = node.text("uuid")
    uuid = holder.text("uuid") if holder is not None else raw_uuid
    sector_size = claim.chosen("sector_size") or (512 if mode != "devdax" else None)
    disk = next((claim.place / "block").glob("*"), None)
    # The second place is that of kernels where dax is a bus and no class.
    characters = [*claim.place.glob("dax/dax*"), *claim.place.glob("dax[0-9]*")]
    return Namespace(
        dev=node.name,
        mode=mode,
        map=_map_of(mode, holder),
        size=claim.number("size") or node.number("size") or 0,
        uuid=uuid if uuid != _NO_UUID else None,
        raw_uuid=raw_uuid if holder is not None and raw_uuid != _NO_UUID else None,
        sector_size=sector_size,
        blockdev=disk.name if disk is not None else None,
        chardev=characters[0].name if mode == "devdax" and characters else None,
        name=node.text("alt_name"),
        numa_node=node.node(),
        state=claim.state(),
    )


def _map_of(mode: Mode, holder: Node | None) -> Map | None:
    """Where the page map is. fsdax without an info block has it in memory; storage has none, and
    ndctl does not say so."""
    if mode in ("raw", "sector"):
        return None
    if holder is None:
        return "mem"
    return _MAPS.get(holder.text("mode") or "")
