"""The live machine as policy looks at it: sysfs, procfs and the first bytes of devices, read only.

Invariants:
1. Nothing is changed: devices are opened for reading, no driver is bound, no module loaded.
2. What sysfs and procfs say is untrusted text. A value that is missing or senseless becomes
   "unknown", or its region is shown with what is left; it never ends the survey.
3. A namespace whose bytes cannot be looked at is reported as such, never as empty.

What this does not do: need root, though without it most of the above is unknown.
"""

import json
import mmap
import os
import platform
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pmemkit.bus.cxl import CxlRegion, cxl_memdevs, cxl_regions
from pmemkit.bus.dax import DaxDevice, dax_devices
from pmemkit.bus.declarations import Declaration
from pmemkit.bus.evidence_health import Health, health_of_machine
from pmemkit.bus.evidence_kernel import verdict_of
from pmemkit.bus.holders import Holders
from pmemkit.bus.kernel import kernel_bus
from pmemkit.bus.memory import auto_online, block_size, dram_of, zone_of
from pmemkit.bus.model import Bus, Namespace, Region
from pmemkit.bus.nature import judge
from pmemkit.bus.programs import Run, in_child
from pmemkit.bus.sysfs import Node
from pmemkit.errors import PmemError
from pmemkit.policy.model import (
    VERBS,
    Content,
    CxlState,
    DaxState,
    DimmState,
    MachineState,
    MemdevState,
    Mode,
    NamespaceState,
    RegionState,
)
from pmemkit.storage.signatures import identify

__all__ = ["survey"]

_CLAIMS: dict[str, Mode] = {"btt": "sector", "btt2": "sector", "pfn": "fsdax", "dax": "devdax"}
_READ_SECONDS = 10.0
_ALIGN = 16 << 20
_PAGE_ALIGN = 2 << 20


@dataclass(frozen=True, slots=True)
class _Look:
    """Where to look, and what was found for all regions at once."""

    sysfs: Path
    proc: Path
    dev: Path
    holders: Holders
    dax: tuple[DaxDevice, ...]
    declarations: tuple[Declaration, ...]
    health: Mapping[str, Health]


def survey(
    sysfs: str | Path = "/sys",
    proc: str | Path = "/proc",
    dev: str | Path = "/dev",
    declarations: Iterable[Declaration] = (),
    run: Run | None = None,
) -> MachineState:
    """Everything that the planner looks at. ``run`` asks devices for their health; ``None``: they
    are not asked."""
    buses = kernel_bus(sysfs)
    dax = tuple(dax_devices(sysfs))
    names = {
        name
        for bus in buses
        for region in bus.regions
        for each in region.namespaces
        for name in (each.blockdev, each.chardev)
        if name is not None
    } | {device.dev for device in dax}
    holders = Holders.look([f"/dev/{each}" for each in sorted(names)], sysfs, proc)
    memdevs = _memdevs(sysfs)
    asked = [each.dev for bus in buses for each in bus.dimms] + [each.dev for each in memdevs]
    health = health_of_machine(asked, run)[0] if run is not None else {}
    look = _Look(Path(sysfs), Path(proc), Path(dev), holders, dax, tuple(declarations), health)
    cxl = cxl_regions(sysfs)
    regions = [_nd_region(look, bus, region, cxl) for bus in buses for region in bus.regions]
    known = {region.dev for region in regions}
    regions += [_cxl_region(look, region) for region in cxl if region.dev not in known]
    regions += _hmem_regions(look)
    lent = [each for device in dax if device.mode == "system-ram" for each in device.ranges]
    total, free = dram_of(lent, sysfs)
    return MachineState(
        bus="kernel",
        name=platform.node() or "this machine",
        regions=tuple(regions),
        memdevs=tuple(memdevs),
        dram=total,
        dram_free=free,
        block_size=block_size(sysfs),
        auto_online=auto_online(sysfs),
        verbs=frozenset(VERBS),
    )


def _memdevs(sysfs: str | Path) -> list[MemdevState]:
    return [
        MemdevState(
            dev=each.dev,
            serial=each.serial,
            node=each.node,
            ram_size=each.ram_size,
            pmem_size=each.pmem_size,
            ram_free=each.ram_free,
            pmem_free=each.pmem_free,
            decoders=each.decoders,
        )
        for each in cxl_memdevs(sysfs)
    ]


# --- regions of the nvdimm bus -------------------------------------------------------------------


def _nd_region(look: _Look, bus: Bus, region: Region, cxl: Iterable[CxlRegion]) -> RegionState:
    node = Node(region.dev, (look.sysfs / "bus/nd/devices" / region.dev).resolve())
    dimms = tuple(_dimm(look, each.dimm) for each in region.mappings)
    volatile = region.type == "volatile"
    # 5: namespaces come from labels; 4: the region is one namespace.
    labelled = node.number("nstype") == 5
    room = bool(dimms) and all(_has_label_area(look, each.dev) for each in dimms)
    of_cxl = next((each for each in cxl if each.dev == region.dev), None)
    state = RegionState(
        dev=region.dev,
        size=region.size,
        type="volatile" if volatile else "pmem",
        align=node.number("align") or _ALIGN,
        labelled=labelled,
        label_room=room,
        available=region.available_size if labelled else 0,
        largest=_largest(region) if labelled else 0,
        node=region.numa_node,
        target_node=node.node("target_node"),
        persistence=region.persistence_domain,
        dimms=dimms,
        namespaces=tuple(_namespace(look, each) for each in region.namespaces),
        cxl=_cxl_state(of_cxl) if of_cxl is not None else None,
        enabled=region.state is None,
        fixed=_fixed(node, volatile),
    )
    return _judged(look, state)


def _largest(region: Region) -> int:
    if region.max_available_extent is None:
        return region.available_size
    return region.max_available_extent


def _fixed(node: Node, volatile: bool) -> str | None:
    if node.number("read_only") == 1:
        return "the kernel has it read-only"
    if volatile and not node.below(r"namespace\d+\.\d+"):
        return "the firmware describes it as volatile, and the kernel makes no namespace of it"
    return None


def _has_label_area(look: _Look, dimm: str) -> bool:
    if re.fullmatch(r"nmem\d{1,9}", dimm) is None:
        return False
    node = Node(dimm, look.sysfs / "bus/nd/devices" / dimm)
    commands = (node.text("commands") or "").split()
    return "label" in (node.text("flags") or "").split() or "set_data" in commands


def _dimm(look: _Look, dev: str) -> DimmState:
    if re.fullmatch(r"nmem\d{1,9}", dev) is None:
        return DimmState(dev=dev[:64])
    node = Node(dev, (look.sysfs / "bus/nd/devices" / dev).resolve())
    cxl_id = node.text("cxl/id")
    serial = node.number("nfit/serial", 16) if cxl_id is None else _number(cxl_id)
    return DimmState(
        dev=dev,
        id=node.text("nfit/id") or cxl_id,
        serial=serial,
        handle=node.number("nfit/handle"),
    )


def _number(text: str) -> int | None:
    try:
        return int(text, 0) if len(text) <= 24 else None
    except ValueError:
        return None


def _judged(look: _Look, state: RegionState) -> RegionState:
    """With the verdict of ``pmem explain``."""
    try:
        verdict = verdict_of(state.dev, look.sysfs, look.proc, look.declarations, look.health)
    except PmemError:  # It went away while it was looked at.
        verdict = judge(())
    return replace(
        state,
        nature=verdict.nature,
        because=verdict.because,
        endurance=verdict.endurance,
        wears=verdict.wears,
        life_used=verdict.life_used,
    )


# --- namespaces ----------------------------------------------------------------------------------


def _namespace(look: _Look, namespace: Namespace) -> NamespaceState:
    node = Node(namespace.dev, (look.sysfs / "bus/nd/devices" / namespace.dev).resolve())
    holder_name = node.text("holder") or ""
    if re.fullmatch(r"(btt|pfn|dax)\d{1,9}\.\d{1,9}", holder_name) is None:
        holder_name = ""
    holder = Node(holder_name, (look.sysfs / "bus/nd/devices" / holder_name).resolve())
    enabled = namespace.state is None
    mode: Mode = namespace.mode if namespace.mode != "system-ram" else "devdax"
    claim = node.text("holder_class") or ""
    damaged = None
    if not enabled:
        mode = _CLAIMS.get(claim, mode)
        damaged = "it is disabled, so that what is on it cannot be read"
    elif claim in _CLAIMS and not holder_name:
        mode = _CLAIMS[claim]
        damaged = f"its label says {mode}, but it has no valid info block"
    device = next((each for each in look.dax if each.owner == namespace.dev), None)
    content: Content | None = None
    if enabled and damaged is None and (device is None or device.mode == "devdax"):
        content, damaged = _content(look, namespace.blockdev, device)
    disk = namespace.blockdev
    return NamespaceState(
        dev=namespace.dev,
        mode=mode,
        size=node.size("size") or namespace.size,
        capacity=namespace.size,
        uuid=namespace.uuid or namespace.raw_uuid,
        name=namespace.name,
        map=namespace.map if namespace.map in ("mem", "dev") else None,
        align=holder.number("align") if holder_name else None,
        sector_size=namespace.sector_size if mode == "sector" else None,
        enabled=enabled,
        blockdev=disk,
        content=content,
        mounts=look.holders.mounts(disk) if disk else (),
        holders=_holders(look, disk, device),
        dax=_dax(look, device) if device is not None else None,
        damaged=damaged,
    )


def _holders(look: _Look, disk: str | None, device: DaxDevice | None) -> tuple[str, ...]:
    found = look.holders.of_disk(disk) if disk else ()
    return (*found, *look.holders.of_path(f"/dev/{device.dev}")) if device else found


def _content(
    look: _Look, disk: str | None, device: DaxDevice | None
) -> tuple[Content | None, str | None]:
    """What is on a device, or why that is not known."""
    name = disk or (device.dev if device else None)
    if name is None:
        return None, "it has no device to read it from"
    path, mapped = look.dev / name, device.size if device and not disk else None

    def call() -> bytes:
        return _identify(path, mapped)

    try:
        found = in_child(call, _READ_SECONDS, f"reading {path}")
        fields = json.loads(found) if found else None
        return (Content(**fields) if fields else None), None
    except PmemError as failure:
        return None, f"it cannot be read: {failure.message}"
    except OSError as failure:
        return None, f"it cannot be read: {failure.strerror}"


def _identify(path: Path, mapped: int | None) -> bytes:
    """Runs in a child, which a poisoned line of a mapping may end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if mapped is None:
        if not stat.S_ISBLK(os.fstat(descriptor).st_mode) and not path.is_file():
            return b""
        size = os.lseek(descriptor, 0, os.SEEK_END)
        found = identify(lambda offset, length: os.pread(descriptor, length, offset), size)
    else:
        view = mmap.mmap(descriptor, mapped, mmap.MAP_SHARED, mmap.PROT_READ)
        found = identify(lambda offset, length: view[offset : offset + length], mapped)
    if found is None:
        return b""
    fields = ("kind", "name", "label", "uuid")
    return json.dumps({field: getattr(found, field) for field in fields}).encode()


# --- DAX devices and regions of memory -----------------------------------------------------------


def _dax(look: _Look, device: DaxDevice) -> DaxState:
    blocks = device.blocks(look.sysfs)
    return DaxState(
        dev=device.dev,
        size=device.size,
        mode=device.mode,
        target_node=device.target_node,
        align=device.align,
        blocks=len(blocks),
        online=sum(1 for block in blocks if block.online),
        zone=zone_of(blocks),
    )


def _cxl_state(region: CxlRegion) -> CxlState:
    return CxlState(
        dev=region.dev,
        type=region.kind,
        ways=region.ways,
        granularity=region.granularity,
        decoder=region.decoder,
        members=region.members,
    )


def _cxl_region(look: _Look, region: CxlRegion) -> RegionState:
    """A region that the nvdimm bus does not have: of RAM, or of a pmem region that is down."""
    devices = [each for each in look.dax if each.kind == "cxl" and each.owner == region.dev]
    memdevs = {each.dev: each for each in _memdevs(look.sysfs)}
    members = tuple(
        DimmState(dev=each, serial=memdevs[each].serial if each in memdevs else None)
        for each in region.members
    )
    return _judged(
        look,
        RegionState(
            dev=region.dev,
            size=region.size,
            type="volatile" if region.kind == "ram" else "pmem",
            align=devices[0].align or _PAGE_ALIGN if devices else _PAGE_ALIGN,
            labelled=False,
            label_room=False,
            node=Node(region.dev, region.place).node(),
            target_node=devices[0].target_node if devices else None,
            dimms=members,
            devices=tuple(_dax(look, each) for each in devices),
            cxl=_cxl_state(region),
            enabled=region.enabled,
        ),
    )


def _hmem_regions(look: _Look) -> list[RegionState]:
    """Ranges that firmware set aside (EFI's specific purpose memory), one device each."""
    found = []
    for owner in dict.fromkeys(each.owner for each in look.dax if each.kind == "hmem"):
        devices = [each for each in look.dax if each.kind == "hmem" and each.owner == owner]
        node = Node(owner, devices[0].place.parent)
        found.append(
            _judged(
                look,
                RegionState(
                    dev=owner,
                    size=node.size("dax_region/size") or sum(each.size for each in devices),
                    type="volatile",
                    align=node.size("dax_region/align") or devices[0].align or _PAGE_ALIGN,
                    labelled=False,
                    label_room=False,
                    node=devices[0].target_node,
                    target_node=devices[0].target_node,
                    devices=tuple(_dax(look, each) for each in devices),
                ),
            )
        )
    return found
