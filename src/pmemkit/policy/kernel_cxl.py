"""CXL regions on the live machine: made and destroyed, by ``cxl`` where it can, else through sysfs.

``cxl`` makes regions of RAM from version 77 on; before that the attributes of the kernel are
written in the order that it documents: interleaving, size, a decoder of each member, commit.

Invariants:
1. A region whose memory is online, or whose namespaces are in use, is not destroyed: the kernel
   would let it happen, and could not take the memory away until the next reboot.
2. What a failed creation had set up is given back: the region and the decoders.
3. Memory of a new region is offline until a step onlines it, whatever the kernel's policy is.

What this does not do: keep contents of RAM; a persistent region has its contents again when it is
made of the same devices in the same order.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal
from uuid import uuid4

from pmemkit.bus.cxl import CxlMemdev, CxlRegion, cxl_memdevs, cxl_regions, endpoint_of
from pmemkit.bus.cxl import root_decoders as decoders_of
from pmemkit.bus.dax import DaxDevice, dax_devices
from pmemkit.bus.holders import Holders
from pmemkit.bus.sysfs import Node
from pmemkit.errors import Busy, InvalidArgument, NoSpace, NotSupported, PmemError, SystemFailure
from pmemkit.policy.kernel_live import Live, Made
from pmemkit.policy.kernel_memory import quiet_auto_online
from pmemkit.policy.model import Entry, Keep, Step

__all__ = ["create_region", "destroy_region", "reverse_create_region", "reverse_destroy_region"]

_RAM_SINCE: Final = 77
"""The first version of ``cxl`` that makes regions of RAM."""
_WAIT_SECONDS: Final = 10.0
_WAYS: Final = (1, 2, 3, 4, 6, 8, 12, 16)

_Kind = Literal["ram", "pmem"]


def create_region(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """Makes a region, and waits for its DAX device or its region on the nvdimm bus."""
    wanted = step.params
    kind = _kind(wanted["type"])
    members = _members(live, wanted["members"])
    names = tuple(each.dev for each in members)
    before = cxl_regions(live.sysfs)
    for region in before:
        if region.kind == kind and region.members == names and region.enabled:
            if wanted.get("size") in (None, region.size):
                return _facts(live, region)
            text = f"{region.dev} of {', '.join(names)} has {region.size} bytes already"
            raise InvalidArgument(text, op="create-cxl-region")
    spec = _spec(live, wanted, kind, members)
    keep({**spec, "before": sorted(each.dev for each in before)})
    return _facts(live, _make(live, spec))


def _kind(text: object) -> _Kind:
    if text == "ram":
        return "ram"
    if text == "pmem":
        return "pmem"
    raise InvalidArgument(f"{text!r} is no type of a CXL region: ram or pmem")


def _members(live: Live, names: Sequence[str]) -> list[CxlMemdev]:
    known = {each.dev: each for each in cxl_memdevs(live.sysfs)}
    for name in names:
        if name not in known:
            raise InvalidArgument(f"{str(name)[:80]!r} is no CXL memory device, or no longer")
    if len(set(names)) != len(names) or len(names) not in _WAYS:
        raise InvalidArgument(f"{len(names)} members cannot make a region: {', '.join(names)}")
    return [known[name] for name in names]


def _spec(
    live: Live, wanted: Mapping[str, Any], kind: _Kind, members: Sequence[CxlMemdev]
) -> dict[str, Any]:
    """What is to be made, with what the policy leaves open filled in."""
    ways = wanted.get("ways") or len(members)
    if ways != len(members):
        raise InvalidArgument(f"{ways} ways need {ways} members, not {len(members)}")
    free = min(each.ram_free if kind == "ram" else each.pmem_free for each in members)
    size = wanted.get("size") or free * ways
    if size <= 0 or size > free * ways or size % ways:
        text = f"{size} bytes of {kind} cannot be had from {len(members)} devices with {free} each"
        raise NoSpace(text, op="create-cxl-region")
    decoder = wanted.get("decoder")
    fitting = [
        each
        for each in decoders_of(live.sysfs)
        if kind in each.kinds and all(each.dev in member.decoders for member in members)
    ]
    chosen = next((each for each in fitting if decoder in (None, each.dev)), None)
    if chosen is None:
        what = f"{decoder} cannot" if decoder else "no root decoder can"
        names = ", ".join(each.dev for each in members)
        raise InvalidArgument(f"{what} hold a region of {kind} on {names}")
    return {
        "type": kind,
        "members": [each.dev for each in members],
        "serials": [each.serial if each.serial is not None else -1 for each in members],
        "ways": ways,
        "granularity": wanted.get("granularity") or chosen.granularity or 256,
        "decoder": chosen.dev,
        "size": size,
    }


def _facts(live: Live, region: CxlRegion) -> dict[str, Any]:
    facts: dict[str, Any] = {"dev": region.dev, "type": region.kind}
    if region.kind == "ram":
        devices = live.wait_for(lambda: _devices(live, region.dev), _WAIT_SECONDS)
        if devices:
            facts["chardev"] = devices[0].dev
    else:
        place = live.sysfs / "bus" / "nd" / "devices" / region.dev
        live.wait_for(place.exists, _WAIT_SECONDS)
    return facts


def _devices(live: Live, region: str) -> list[DaxDevice]:
    return [e for e in dax_devices(live.sysfs) if (e.kind, e.owner) == ("cxl", region)]


# --- making --------------------------------------------------------------------------------------


def _make(live: Live, spec: Mapping[str, Any]) -> CxlRegion:
    """Makes a region. Memory of it stays offline: where kmem is loaded, it takes the new device at
    once, and the kernel would put its blocks where they cannot be taken away again."""
    with quiet_auto_online(live):
        _commit(live, spec)
        members = tuple(spec["members"])
        new = [e for e in cxl_regions(live.sysfs) if e.members == members and e.enabled]
        if not new:
            text = f"no region of {', '.join(members)} came up"
            raise SystemFailure(text, op="create-cxl-region")
        if new[-1].kind == "ram":
            live.wait_for(lambda: _devices(live, new[-1].dev), _WAIT_SECONDS)
        return new[-1]


def _commit(live: Live, spec: Mapping[str, Any]) -> None:
    if spec["type"] == "ram" and _version(live) < _RAM_SINCE:
        _make_by_sysfs(live, spec)
        return
    words = ["cxl", "create-region", "--memdevs", "--type", spec["type"]]
    words += ["--decoder", spec["decoder"], "--ways", str(spec["ways"])]
    words += ["--granularity", str(spec["granularity"]), "--size", str(spec["size"])]
    live.tool(*words, *spec["members"], timeout_seconds=120)


def _version(live: Live) -> int:
    """The major version of cxl; 0 where it is not there, or says something else."""
    try:
        said = live.run(["cxl", "version"], timeout_seconds=30, given=b"")
    except NotSupported:
        return 0
    found = re.match(rb"\s*(\d{1,6})", said)
    return int(found[1]) if found else 0


def _make_by_sysfs(live: Live, spec: Mapping[str, Any]) -> None:
    root = live.cxl("decoder", spec["decoder"])
    attribute = f"create_{spec['type']}_region"
    name = live.name_of("region", root.text(attribute))
    live.put(root.place / attribute, name, f"a region in {root.name}")
    used: list[Node] = []
    try:
        region = live.wait_for(lambda: _appeared(live, name))
        if region is None:
            raise SystemFailure(f"{name} was made in {root.name} and did not appear")
        _set(live, region, "interleave_granularity", spec["granularity"])
        _set(live, region, "interleave_ways", spec["ways"])
        if spec["type"] == "pmem":
            _set(live, region, "uuid", uuid4())
        _set(live, region, "size", spec["size"])
        for position, memdev in enumerate(spec["members"]):
            decoder = _free_decoder(live, memdev)
            used.append(decoder)
            _set(live, decoder, "mode", spec["type"])
            _set(live, decoder, "dpa_size", spec["size"] // spec["ways"])
            _set(live, region, f"target{position}", decoder.name)
        _set(live, region, "commit", 1)
        drivers = live.sysfs / "bus" / "cxl" / "drivers" / "cxl_region"
        live.put(drivers / "bind", name, f"the driver of {name}")
    except PmemError:
        _unmake(live, root, name, used)
        raise


def _appeared(live: Live, name: str) -> Node | None:
    try:
        return live.cxl("region", name)
    except InvalidArgument:
        return None


def _set(live: Live, node: Node, attribute: str, value: object) -> None:
    live.put(node.place / attribute, str(value), f"{attribute} {value} of {node.name}")


def _free_decoder(live: Live, memdev: str) -> Node:
    """The first decoder of a device that serves nothing; they have to be taken in order."""
    endpoint = endpoint_of(live.cxl("memdev", memdev).place, live.sysfs)
    for decoder in endpoint.below(r"decoder\d+\.\d+") if endpoint is not None else []:
        if decoder.size("dpa_size") == 0:
            return decoder
    raise NoSpace(f"{memdev} has no decoder left", op="create-cxl-region")


def _unmake(live: Live, root: Node, name: str, used: Sequence[Node]) -> None:
    """Gives back what a creation had taken, as far as it came."""
    region = _appeared(live, name)
    if region is not None and region.number("commit") == 1:
        with suppress(PmemError):
            _set(live, region, "commit", 0)
    with suppress(PmemError):
        _set(live, root, "delete_region", name)
    for decoder in used:
        with suppress(PmemError):
            _set(live, decoder, "dpa_size", 0)


# --- destroying ----------------------------------------------------------------------------------


def destroy_region(live: Live, step: Step, keep: Keep, _made: Made) -> dict[str, Any]:
    """``cxl disable-region`` and ``destroy-region``, of one that nobody uses."""
    name = live.name_of("region", step.target)
    region = next((each for each in cxl_regions(live.sysfs) if each.dev == name), None)
    if region is None:
        return {}
    _require_unused(live, region)
    serials = {each.dev: each.serial for each in cxl_memdevs(live.sysfs)}
    found = [serials.get(each) for each in region.members]
    keep(
        {
            "type": region.kind,
            "members": list(region.members),
            "serials": [-1 if each is None else each for each in found],
            "ways": region.ways,
            "granularity": region.granularity,
            "decoder": region.decoder,
            "size": region.size,
        }
    )
    _destroy(live, region)
    return {}


def _require_unused(live: Live, region: CxlRegion) -> None:
    for device in _devices(live, region.dev):
        online = [each for each in device.blocks(live.sysfs) if each.online]
        if online:
            text = (
                f"{region.dev} cannot be destroyed: {len(online)} memory blocks of {device.dev} "
                "are online; make it device DAX first"
            )
            raise Busy(text, op="destroy-cxl-region")
        path = f"/dev/{device.dev}"
        users = Holders.look([path], live.sysfs, live.proc).of_path(path)
        if users:
            text = f"{region.dev} cannot be destroyed: {device.dev} is in use by {', '.join(users)}"
            raise Busy(text, op="destroy-cxl-region")
    if region.kind == "pmem" and (live.sysfs / "bus" / "nd" / "devices" / region.dev).exists():
        for namespace in live.namespaces(region.dev).values():
            live.require_unused(namespace, "disabled")


def _destroy(live: Live, region: CxlRegion) -> None:
    enabled = region.enabled
    if region.kind == "pmem" and (live.sysfs / "bus" / "nd" / "devices" / region.dev).exists():
        live.run(["ndctl", "disable-region", region.dev], timeout_seconds=60, given=b"")
    try:
        if enabled:
            live.run(["cxl", "disable-region", region.dev], timeout_seconds=60, given=b"")
        live.run(["cxl", "destroy-region", region.dev], timeout_seconds=60, given=b"")
    except PmemError:
        if enabled:
            with suppress(PmemError):
                live.run(["cxl", "enable-region", region.dev], timeout_seconds=60, given=b"")
        raise


def reverse_create_region(live: Live, entry: Entry, _force: bool) -> str:
    """Destroys the region that was made."""
    kept = entry.kept
    if "before" not in kept:
        return "no region was made"
    members = _members_now(live, kept)
    here = cxl_regions(live.sysfs)
    if entry.state == "started":
        new = [region for region in here if region.dev not in kept["before"]]
        ours = [region for region in new if set(region.members) <= set(members)]
    else:
        shape = (kept["type"], members, kept["size"])
        ours = [each for each in here if (each.kind, each.members, each.size) == shape]
        # Its name tells it from another of the same shape, unless there was a boot since.
        ours.sort(key=lambda region: region.dev != entry.made.get("dev"))
    if not ours:
        return "the region that was made is gone already"
    _require_unused(live, ours[0])
    _destroy(live, ours[0])
    return f"{ours[0].dev} is destroyed again"


def _members_now(live: Live, kept: Mapping[str, Any]) -> tuple[str, ...]:
    """The devices of a region, found by their serial numbers: names are given anew at each boot."""
    by_serial = {each.serial: each.dev for each in cxl_memdevs(live.sysfs)}
    pairs = zip(kept["serials"], kept["members"], strict=False)
    return tuple(by_serial.get(serial, name) for serial, name in pairs)


def reverse_destroy_region(live: Live, entry: Entry, _force: bool) -> str:
    """Makes the region again, of the same devices."""
    kept = dict(entry.kept)
    if "members" not in kept:
        return f"{entry.step.target} was not touched"
    members = kept["members"] = _members_now(live, kept)
    for region in cxl_regions(live.sysfs):
        if region.members == members and region.kind == kept["type"] and region.enabled:
            return f"{region.dev} is there"
    kind = _kind(kept["type"])
    spec = _spec(live, kept, kind, _members(live, members))
    _make(live, spec)
    what = "without its contents" if kind == "ram" else "with its contents"
    return f"the region of {', '.join(members)} is there again, {what}"
