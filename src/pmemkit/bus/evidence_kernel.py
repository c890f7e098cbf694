"""What a running kernel says of the nature of a region, read from sysfs and procfs.

A region is one of three: of the nvdimm bus (``region0`` with namespaces), of CXL (``region1`` with
memory devices), or a range that the firmware set aside for a purpose of its own (``hmem.0``), which
has DAX devices only. A DAX device (``dax1.0``) stands for the region that it is of.

Invariants:
1. Nothing is changed and nothing is started; health is handed in by who asked the devices.
2. What is missing or senseless says nothing: a region that is there always has evidence.
3. What decides names its source: the table of the firmware, or the mode of the CXL region.

What this does not do: weigh anything (:mod:`pmemkit.bus.nature`).
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pmemkit.bus.cxl import (
    CxlMemdev,
    CxlRegion,
    cxl_memdevs,
    cxl_regions,
    device_ranges,
)
from pmemkit.bus.dax import DaxDevice, dax_devices
from pmemkit.bus.declarations import DECLARATIONS, Declaration, declared_evidence
from pmemkit.bus.evidence_firmware import cdat_of, map_evidence, node_evidence
from pmemkit.bus.evidence_health import Health, health_evidence
from pmemkit.bus.memory import Range
from pmemkit.bus.nature import Evidence, Verdict, judge
from pmemkit.bus.sysfs import Node, devices
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size

__all__ = [
    "KernelDimm",
    "KernelRegion",
    "find_region",
    "kernel_evidence",
    "region_names",
    "region_of_device",
    "region_under",
    "verdict_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDimm:
    """A dimm, or a CXL memory device, that a region takes bytes from."""

    dev: str
    id: str | None = None
    serial: int | None = None
    handle: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRegion:
    """A region, wherever it was found."""

    dev: str
    nd: Node | None = None
    cxl: CxlRegion | None = None
    dax: tuple[DaxDevice, ...] = ()
    """Its DAX devices, where it is not of the nvdimm bus."""
    dimms: tuple[KernelDimm, ...] = ()
    memdevs: tuple[CxlMemdev, ...] = ()

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Its physical addresses; nothing where the kernel does not tell us."""
        for node in (self.nd, Node(self.dev, self.cxl.place) if self.cxl else None):
            start = node.number("resource") if node is not None else None
            size = node.size("size") if node is not None else 0
            if start is not None and start > 0 and size:
                return ((start, start + size),)
        return tuple(each for device in self.dax for each in device.ranges)

    @property
    def target_node(self) -> int | None:
        """The node that its memory would be on."""
        if self.nd is not None:
            return self.nd.node("target_node")
        nodes = [each.target_node for each in self.dax if each.target_node is not None]
        return nodes[0] if nodes else None


# --- which regions there are ---------------------------------------------------------------------


def region_names(sysfs: str | Path = "/sys") -> list[str]:
    """Every region of the machine: of the nvdimm bus, of CXL, and what firmware set aside."""
    names = [node.name for node in devices(sysfs, "nd", r"region\d+")]
    names += [node.name for node in devices(sysfs, "cxl", r"region\d+")]
    names += [each.owner for each in dax_devices(sysfs) if each.kind == "hmem"]
    return list(dict.fromkeys(names))


def find_region(name: str, sysfs: str | Path = "/sys") -> KernelRegion:
    """The region of this name, or that the DAX device of this name is of. Raises
    :class:`InvalidArgument` where there is none."""
    root = Path(sysfs)
    dax = dax_devices(root)
    name = _owner(name, dax, root)
    nd = next(iter(devices(root, "nd", re.escape(name))), None)
    cxl = next((each for each in cxl_regions(root) if each.dev == name), None)
    of_cxl = devices(root, "cxl", re.escape(name))
    own = tuple(each for each in dax if each.owner == name and each.kind != "namespace")
    if not re.fullmatch(r"region\d+", name) or (nd is None and not of_cxl):
        if not own or own[0].kind != "hmem":
            known = ", ".join(region_names(root)) or "none"
            text = f"{name!r} is no region of this machine; there is {known}"
            raise InvalidArgument(text, op="explain")
        return KernelRegion(dev=name, dax=own)
    members = cxl.members if cxl is not None else ()
    memdevs = tuple(each for each in cxl_memdevs(root) if each.dev in members)
    dimms = tuple(_dimms(nd, root)) if nd is not None else ()
    return KernelRegion(
        dev=name,
        nd=nd,
        cxl=cxl,
        dax=own if nd is None else (),
        dimms=dimms or tuple(KernelDimm(dev=each.dev, serial=each.serial) for each in memdevs),
        memdevs=memdevs,
    )


def region_of_device(path: str, sysfs: str | Path = "/sys") -> str | None:
    """The region of this machine that a block device or a DAX device is of."""
    try:
        status = os.stat(path)  # noqa: PTH116 - what the caller calls it
    except (OSError, ValueError):
        return None
    kinds = {stat.S_IFBLK: "block", stat.S_IFCHR: "char"}
    kind = kinds.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    return _region_of(kind, status.st_rdev, Path(sysfs))


def region_under(file: int, sysfs: str | Path = "/sys") -> str | None:
    """The region of this machine that the file system of an open file is on."""
    return _region_of("block", os.fstat(file).st_dev, Path(sysfs))


def _region_of(kind: str, device: int, sysfs: Path) -> str | None:
    place = (sysfs / "dev" / kind / f"{os.major(device)}:{os.minor(device)}").resolve()
    if re.fullmatch(r"dax\d+\.\d+", place.name):
        # Where dax is a class, what it is of stands above it.
        dax = next((each for each in place.parents if each.name == place.name), place)
        name = _owner(place.name, dax_devices(sysfs), sysfs)
        region = Node(dax.name, dax).above(r"region\d+") if name == place.name else None
        return region.name if region is not None else name
    region = Node(place.name, place).above(r"region\d+")
    return region.name if region is not None and region.above(r"ndbus\d+") else None


def _owner(name: str, dax: Iterable[DaxDevice], sysfs: Path) -> str:
    """The region that a DAX device, or a ``dax_region``, is of; any other name as it is."""
    for each in dax:
        if name in (each.dev, each.place.parent.name) and each.kind != "hmem":
            if each.kind == "cxl":
                return each.owner
            number = re.match(r"namespace(\d+)\.", each.owner)
            return f"region{number[1]}" if number is not None else name
        if name == each.dev:
            return each.owner
    return name


def _dimms(region: Node, sysfs: Path) -> Iterable[KernelDimm]:
    for index in range(min(region.size("mappings"), 64)):
        dev = (region.text(f"mapping{index}") or "").partition(",")[0]
        if re.fullmatch(r"nmem\d+", dev) is None:
            continue
        node = Node(dev, sysfs / "bus/nd/devices" / dev)
        cxl_id = node.text("cxl/id")
        yield KernelDimm(
            dev=dev,
            id=node.text("nfit/id") or cxl_id,
            serial=node.number("nfit/serial") if cxl_id is None else node.number("cxl/id"),
            handle=node.number("nfit/handle"),
        )


# --- evidence ------------------------------------------------------------------------------------


def kernel_evidence(
    region: str,
    sysfs: str | Path = "/sys",
    proc: str | Path = "/proc",
    health: Mapping[str, Health] | None = None,
) -> list[Evidence]:
    """Everything that the kernel says of a region. ``health``: what devices report, by name.

    Raises :class:`InvalidArgument` where there is no such region.
    """
    return _evidence(find_region(region, sysfs), Path(sysfs), Path(proc), health or {})


def verdict_of(
    region: str | KernelRegion,
    sysfs: str | Path = "/sys",
    proc: str | Path = "/proc",
    declarations: Iterable[Declaration] = (),
    health: Mapping[str, Health] | None = None,
) -> Verdict:
    """What a region of this machine is by nature. Raises as :func:`kernel_evidence` does for a
    name of none."""
    found = find_region(region, sysfs) if isinstance(region, str) else region
    evidence = _evidence(found, Path(sysfs), Path(proc), health or {})
    return judge(
        [*declared_evidence(declarations, found), *evidence],
        declare=f"{DECLARATIONS} ([[dimm]] {_key(found)})",
    )


def _key(region: KernelRegion) -> str:
    """How a declaration names a region so that it still fits after the next boot."""
    if len(region.dimms) == 1:
        dimm = region.dimms[0]
        if dimm.id is not None and dimm.serial is not None and not region.memdevs:
            return f'id = "{dimm.id}"'
        if dimm.serial is not None:
            return f"serial = {dimm.serial:#x}"
    return f'region = "{region.dev}"'


def _evidence(
    region: KernelRegion, sysfs: Path, proc: Path, health: Mapping[str, Health]
) -> list[Evidence]:
    found = []
    if region.nd is not None:
        found += _of_bus(region.nd)
    if region.cxl is not None:
        found += _of_cxl(region.cxl, region.memdevs, sysfs)
    elif region.nd is None:
        found += _of_dax(region)
    found += map_evidence(region.ranges, sysfs, proc)
    found += node_evidence(region.target_node, sysfs)
    for dimm in region.dimms:
        found += _of_dimm(Node(dimm.dev, sysfs / "bus/nd/devices" / dimm.dev))
    for dev in dict.fromkeys([*(d.dev for d in region.dimms), *(m.dev for m in region.memdevs)]):
        if dev in health:
            found += health_evidence(health[dev])
    return found


# --- the nvdimm bus ------------------------------------------------------------------------------

_TABLES: Final = {
    "ACPI.NFIT": "NFIT",
    "nfit": "NFIT",
    "of_pmem": "device tree",
    "papr_scm": "PAPR",
    "ibm,persistent-memory": "PAPR",
}
_RAM: Final = ("ramdax", "nfit_test")


def _of_bus(region: Node) -> list[Evidence]:
    """What the bus of a region is, and what it says the region is."""
    bus = region.above(r"ndbus\d+")
    provider = (bus.text("provider") if bus is not None else None) or "unknown"
    driver = Node("", bus.place.parent).driver() if bus is not None else None
    names = (provider, driver or "", provider.partition(".")[0])
    source = f"provider of {region.name}"
    shown = provider if driver in (None, provider) else f"{provider} (driver {driver})"
    found = [Evidence(source, shown, None, "hint")]
    table = next((_TABLES[name] for name in names if name in _TABLES), None)
    if "DEVTYPE=nd_volatile" in (region.text("uevent") or "").splitlines():
        place = f"firmware ({table})" if table else f"type of {region.name}"
        found.append(Evidence(place, "a volatile range", "memory", "firmware"))
    elif table is not None:
        change = f"a firmware whose {table} calls the range volatile"
        found.append(
            Evidence(f"firmware ({table})", "a persistent range", "storage", "firmware", change)
        )
    elif {"virtio-pmem", "virtio_pmem"} & {*names}:
        change = "ordinary or volatile CXL memory from the hypervisor in place of virtio-pmem"
        value = "virtio-pmem: a file of the host, which a flush writes back"
        found.append(Evidence(source, value, "storage", "firmware", change))
    elif {"e820", "e820_pmem"} & {*names}:
        value = "persistent memory (legacy) of the memory map, whatever is behind it"
        found.append(Evidence("firmware (e820)", value, None, "hint"))
    elif {*names} & {*_RAM}:
        value = f"{provider}: RAM that stands in for persistent memory"
        found.append(Evidence(source, value, None, "hint"))
    domain = region.text("persistence_domain")
    if domain is not None:
        found.append(Evidence(f"persistence domain of {region.name}", domain, None, "hint"))
    if region.number("read_only") == 1:
        found.append(Evidence(region.name, "the kernel has it read-only", None, "hint"))
    return found


_FORMATS: Final = {
    0x101: "byte-addressable, kept by stored energy: DRAM by its make",
    0x201: "block-addressable",
    0x301: "byte-addressable, persistent by its make",
}
_FLAGS: Final = {
    "not_armed": "not_armed: what is written would not survive, so it is read-only",
    "save_fail": "save_fail: its last content was not saved",
    "restore_fail": "restore_fail: its last content was not restored",
    "flush_fail": "flush_fail: the last flush before power-off failed",
    "map_fail": "map_fail: firmware could not map it",
    "smart_event": "smart_event: it reported a failing health",
}


def _of_dimm(node: Node) -> list[Evidence]:
    """Flags and format of a dimm."""
    found = []
    for family in ("nfit", "papr"):
        flags = (node.text(f"{family}/flags") or "").split()
        told = [_FLAGS[each] for each in flags if each in _FLAGS]
        if told:
            found.append(Evidence(f"flags of {node.name}", "; ".join(told), None, "hint"))
    code = node.number("nfit/format")
    if code in _FORMATS:
        text = f"interface {code:#06x}: {_FORMATS[code]}"
        found.append(Evidence(f"format of {node.name}", text, None, "hint"))
    shutdowns = node.number("nfit/dirty_shutdown")
    if shutdowns is not None and shutdowns > 0:
        found.append(Evidence(node.name, f"{shutdowns} dirty shutdowns", None, "hint"))
    return found


# --- CXL and DAX ---------------------------------------------------------------------------------


def _of_cxl(region: CxlRegion, memdevs: Iterable[CxlMemdev], sysfs: Path) -> list[Evidence]:
    members = tuple(memdevs)
    source = f"CXL {region.dev}"
    if region.kind == "ram":
        found = [Evidence(source, "mode ram", "memory", "firmware")]
    else:
        names = " and ".join(each.dev for each in members) or "its devices"
        bytes_of = sum(each.ram_size for each in members)
        change = f"a CXL region of type ram on the volatile {format_size(bytes_of)} of {names}"
        if not bytes_of:
            change = (
                f"a volatile part of {names} (cxl set-partition), and a CXL region of ram there"
            )
        found = [Evidence(source, "mode pmem", "storage", "firmware", change)]
    for each in members:
        size = each.ram_size if region.kind == "ram" else each.pmem_size
        text = f"{region.kind} partition of {format_size(size)}"
        qos = Node(each.dev, each.place).number(f"{region.kind}/qos_class")
        if qos is not None:
            text += f", QoS class {qos}"
        found.append(Evidence(f"CXL {each.dev}", text, None, "hint"))
        cdat = cdat_of(each.dev, sysfs)
        if cdat is not None:
            found += cdat.evidence(each.dev, device_ranges(region, each.dev, sysfs))
    return found


def _of_dax(region: KernelRegion) -> list[Evidence]:
    """A region that neither bus has: its DAX devices, or a CXL region of no known mode."""
    found = []
    if re.fullmatch(r"hmem(_platform)?(\.\d+)?", region.dev):
        value = "a range set aside for a specific purpose, which is volatile"
        found.append(Evidence("firmware (EFI)", value, "memory", "firmware"))
    found += [
        Evidence(f"DAX device {each.dev}", f"{each.mode}, driver {each.driver}", None, "hint")
        for each in region.dax
    ]
    return found or [Evidence(region.dev, "of no known mode", None, "hint")]
