"""Device DAX instances, as sysfs has them under ``/sys/bus/dax/devices``.

An instance belongs to a devdax namespace, to a CXL region of RAM, or to a range that the firmware
set aside (``hmem``). Which driver has it says what it is: ``device_dax`` gives a character device,
``kmem`` has made memory of it.

What this does not do: reconfigure anything.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmemkit.bus.memory import Block, Range, blocks_of
from pmemkit.bus.sysfs import Node, devices
from pmemkit.errors import InvalidArgument

__all__ = ["DaxDevice", "dax_device", "dax_devices"]

_RANGES = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DaxDevice:
    """One instance. Sizes are bytes."""

    dev: str
    place: Path
    size: int
    mode: Literal["devdax", "system-ram", "disabled"]
    driver: str | None = None
    align: int | None = None
    target_node: int | None = None
    ranges: tuple[Range, ...] = ()
    """Physical; empty where the kernel does not tell us."""
    owner: str = ""
    """The namespace's or region's: ``namespace1.0``, ``region0`` of CXL, or the device that has
    it."""
    kind: Literal["namespace", "cxl", "hmem"] = "hmem"

    def blocks(self, sysfs: str | Path = "/sys") -> list[Block]:
        """The memory blocks that it became."""
        return blocks_of(self.ranges, sysfs) if self.mode == "system-ram" else []


def dax_devices(sysfs: str | Path = "/sys") -> list[DaxDevice]:
    """Every instance that has bytes, in the kernel's order."""
    nodes = devices(sysfs, "dax", r"dax\d+\.\d+")
    return [device for node in nodes if (device := _device(node)).size > 0]


def dax_device(dev: str, sysfs: str | Path = "/sys") -> DaxDevice:
    """The instance of this name; raises :class:`InvalidArgument` where there is none."""
    place = Path(sysfs) / "bus" / "dax" / "devices" / dev
    if re.fullmatch(r"dax\d+\.\d+", dev) is None or not place.exists():
        raise InvalidArgument(f"{dev!r} is no DAX device of this machine")
    return _device(Node(dev, place.resolve()))


def _device(node: Node) -> DaxDevice:
    driver = node.driver()
    modes: dict[str | None, Literal["devdax", "system-ram"]] = {
        "device_dax": "devdax",
        "kmem": "system-ram",
    }
    owner, kind = _owner(node)
    return DaxDevice(
        dev=node.name,
        place=node.place,
        size=node.size("size"),
        mode=modes.get(driver, "disabled"),
        driver=driver,
        align=node.size("align") or None,
        target_node=node.node("target_node"),
        ranges=_ranges(node),
        owner=owner,
        kind=kind,
    )


def _owner(node: Node) -> tuple[str, Literal["namespace", "cxl", "hmem"]]:
    parent = Node(node.place.parent.name, node.place.parent)
    namespace = parent.text("namespace")
    if namespace is not None and re.fullmatch(r"namespace\d+\.\d+", namespace):
        return namespace, "namespace"
    region = node.above(r"region\d+")
    if re.fullmatch(r"dax_region\d+", parent.name) and region is not None:
        return region.name, "cxl"
    return parent.name, "hmem"


def _ranges(node: Node) -> tuple[Range, ...]:
    """Where its bytes are: the mappings, or, in kernels without them, resource and size."""
    mappings = node.below(r"mapping\d+")[:_RANGES]
    pairs = [(each.number("start"), each.number("end")) for each in mappings]
    ranges = [
        (start, end + 1)
        for start, end in pairs
        if start is not None and end is not None and 0 <= start < end
    ]
    resource, size = node.number("resource"), node.size("size")
    if not ranges and resource is not None and resource > 0 and size:
        ranges = [(resource, resource + size)]
    return tuple(sorted(ranges))
