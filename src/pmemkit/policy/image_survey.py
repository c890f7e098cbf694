"""A machine file as the planner sees it: regions, namespaces, what is on them and who uses them.

Nothing is written and nothing is locked. Users of an image are found by what the kernel shows: the
shared mappings of processes (a server of ours, a QEMU that runs with the image) and the backing
files of loop devices.

What this does not do: change images (:mod:`pmemkit.policy.image_actions`), or look into regions
that are interleaved over several dimms; they are there and :attr:`RegionState.fixed`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pmemkit.bus.image import ImageBus, ImageNamespace, ImageRegion
from pmemkit.bus.nature import image_evidence, judge
from pmemkit.errors import PmemError
from pmemkit.formats import guids
from pmemkit.namespace.advice import require_sound, require_start
from pmemkit.policy.model import (
    Content,
    DaxState,
    DimmState,
    MachineState,
    NamespaceState,
    RegionState,
    Verb,
)
from pmemkit.storage.signatures import contents_of

__all__ = ["IMAGE_VERBS", "machine_state", "users_of"]

IMAGE_VERBS: Final[frozenset[Verb]] = frozenset(
    {"init-labels", "create-namespace", "destroy-namespace", "reconfigure-namespace"}
)
"""What can be done to an image; the rest needs a running kernel."""
_PROCESSES: Final = Path("/proc")
_LOOPS: Final = Path("/sys/block")

_User = tuple[int, int | None, str]
"""First byte, first byte behind it (``None``: the end of the file), and who."""


def machine_state(bus: ImageBus, name: str) -> MachineState:
    """What the images of a machine hold, for the planner."""
    users = users_of(dimm.spec.path for dimm in bus.dimms)
    return MachineState(
        bus="image",
        name=name,
        regions=tuple(_region(each, users) for each in bus.regions),
        verbs=frozenset(IMAGE_VERBS),
    )


def _region(region: ImageRegion, users: Mapping[str, list[_User]]) -> RegionState:
    specs = [dimm.spec for dimm in region.dimms]
    verdict = judge(image_evidence(region))
    free = region.free()
    node = specs[0].numa_node
    return RegionState(
        dev=region.dev,
        size=region.size,
        type="pmem",
        nature=verdict.nature,
        because=verdict.because,
        endurance=verdict.endurance,
        wears=verdict.wears,
        life_used=verdict.life_used,
        align=region.span.align,
        labelled=region.labelled,
        label_room=all(each.label_size for each in specs),
        available=sum(length for _, length in free),
        largest=max((length for _, length in free), default=0),
        node=node,
        target_node=node,
        persistence="unknown",
        dimms=tuple(
            DimmState(dev=d.name, id=d.spec.id, serial=d.spec.serial_number, handle=d.spec.handle)
            for d in region.dimms
        ),
        namespaces=tuple(_namespace(each, users) for each in region.namespaces),
        fixed=_fixed(region),
        unmappable=_said(lambda: require_start(region, region.start, force=False)),
    )


def _fixed(region: ImageRegion) -> str | None:
    if region.span.ways > 1:
        return f"it is interleaved over {region.span.ways} dimms; such images are not changed"
    if any(dimm.spec.unarmed for dimm in region.dimms):
        return "its dimm is unarmed: it is read-only to a kernel"
    return _said(lambda: require_sound(region, "plan"))


def _said(check: Callable[[], object]) -> str | None:
    """What a check complains about."""
    try:
        check()
    except PmemError as complaint:
        return complaint.message
    return None


def _namespace(here: ImageNamespace, users: Mapping[str, list[_User]]) -> NamespaceState:
    claim, found = here.claim, here.found
    index = here.region.span.index
    sector_size: int | None = (found.lbasize if found is not None else 0) or 512
    if claim.mode == "sector":
        sector_size = claim.sector_size
    dax = None
    if claim.mode == "devdax" and claim.enabled:
        dax = DaxState(
            dev=f"dax{index}.{here.number}",
            size=claim.size or 0,
            mode="devdax",
            target_node=here.region.dimms[0].spec.numa_node,
            align=claim.align,
        )
    uuid = here.uuid if found is not None else claim.uuid
    blockdev = f"pmem{index}" + (f".{here.number}" if here.number else "")
    blockdev += "s" if claim.mode == "sector" else ""
    return NamespaceState(
        dev=here.dev,
        mode=claim.mode,
        size=here.size,
        offset=here.offset,
        capacity=claim.size if claim.size is not None else here.size,
        uuid=None if uuid is None else str(uuid),
        name=here.name or None,
        map=claim.map,
        align=claim.align,
        sector_size=None if claim.mode == "devdax" else sector_size,
        enabled=claim.enabled,
        blockdev=blockdev if claim.enabled and claim.mode != "devdax" else None,
        content=_content(here),
        holders=_holders(here, users),
        dax=dax,
        damaged=_damage(here),
    )


def _content(here: ImageNamespace) -> Content | None:
    found = contents_of(here)
    if found is None:
        return None
    return Content(kind=found.kind, name=found.name, label=found.label, uuid=found.uuid)


def _damage(here: ImageNamespace) -> str | None:
    """Why its info block is not valid. What an earlier namespace left is no damage of this one."""
    faults = here.claim.faults
    if here.found is None or here.found.claim in (None, guids.NULL):
        faults = tuple(each for each in faults if each.field != "parent_uuid")
    return str(faults[0]) if faults else None


def _holders(here: ImageNamespace, users: Mapping[str, list[_User]]) -> tuple[str, ...]:
    """Who uses a range of the images that this namespace lies in."""
    found = []
    for dimm in here.region.dimms:
        start = dimm.spec.dpa + (here.offset if here.region.span.ways == 1 else 0)
        end = start + here.size
        for first, behind, who in users.get(dimm.spec.path, ()):
            if first < end and (behind is None or behind > start) and who not in found:
                found.append(who)
    return tuple(found)


# --- users of files -------------------------------------------------------------------------------


def users_of(paths: Iterable[str]) -> dict[str, list[_User]]:
    """Processes that have files mapped, and loop devices over them, as far as the kernel lets us
    see. Our own process does not count."""
    places = {}
    for path in paths:
        status = os.stat(path)  # noqa: PTH116 - what the machine file calls it
        places[status.st_dev, status.st_ino] = path
    found: dict[str, list[_User]] = {path: [] for path in places.values()}
    for place, user in (*_mapped(places), *_loops(places)):
        if user not in found[places[place]]:
            found[places[place]].append(user)
    return found


def _mapped(places: Mapping[tuple[int, int], str]) -> Iterator[tuple[tuple[int, int], _User]]:
    """Processes that have a file mapped shared, as a virtual machine has its nvdimm."""
    for process in _PROCESSES.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            lines = (process / "maps").read_text("utf-8", "replace").splitlines()
            name = (process / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue
        for line in lines:
            # 7f00-7f01 rw-s 00000000 fe:01 131 /path
            fields = line.split(maxsplit=5)
            if len(fields) < 6 or fields[1][3] != "s":
                continue
            major, _, minor = fields[3].partition(":")
            place = os.makedev(int(major, 16), int(minor, 16)), int(fields[4])
            if place in places:
                start, _, end = fields[0].partition("-")
                offset = int(fields[2], 16)
                behind = offset + int(end, 16) - int(start, 16)
                yield place, (offset, behind, f"process {process.name} ({name})")


def _loops(places: Mapping[tuple[int, int], str]) -> Iterator[tuple[tuple[int, int], _User]]:
    for backing in _LOOPS.glob("loop*/loop/backing_file"):
        try:
            status = os.stat(backing.read_text("utf-8", "replace").rstrip("\n"))  # noqa: PTH116
        except (OSError, ValueError):
            continue
        place = status.st_dev, status.st_ino
        if place in places:
            yield place, (0, None, backing.parents[1].name)
