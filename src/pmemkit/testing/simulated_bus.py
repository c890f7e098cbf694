"""A machine that exists only as records: every verb of policy and its reverse, with physics' rules.

It refuses what a kernel refuses (to destroy what is mounted, to create where there is no room, to
make memory of what is in use), so that a plan that is carried out here to the end could be carried
out. Undo puts back what the journal kept of each step, a verb at a time, never a copy of the whole.

Invariants:
1. Namespaces of a region do not overlap; what is available is what none of them has.
2. A step that is interrupted leaves its first half; performing or reversing it again is right.
3. Whoever lets it stop (:attr:`SimulatedBus.stop_at`) may do so at every point between two changes.

What this does not do: hold bytes. What is on a namespace is the name of a filesystem, and
:attr:`SimulatedBus.written` says which namespaces somebody wrote to.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace
from pmemkit.policy.model import (
    VERBS,
    Actions,
    Content,
    CxlState,
    DaxState,
    Entry,
    Keep,
    MachineState,
    NamespaceState,
    RegionState,
    Step,
    as_plain,
)
from pmemkit.policy.plain import from_plain

__all__ = ["SimulatedBus"]

_Made = Mapping[int, Mapping[str, Any]]
_BLOCK: Final = 128 << 20


class SimulatedBus(Actions):
    """A machine of records as an :class:`~pmemkit.policy.model.Actions`."""

    def __init__(self, machine: MachineState) -> None:
        self.machine = replace(machine, verbs=frozenset(VERBS))
        self.places: dict[str, int] = {}
        """Where in its region a namespace begins."""
        for region in machine.regions:
            at = 0
            for each in region.namespaces:
                self.places[each.dev] = at
                at += each.size
            self._put(region)
        self.written: set[str] = set()
        """Namespaces, by uuid, that were written to."""
        self.points = 0
        """How many points were passed at which it could have stopped."""
        self.stop_at: int | None = None
        self.stop: Callable[[], BaseException] = KeyboardInterrupt
        self._names = 100

    def observe(self) -> MachineState:
        """The machine as it is. What is on a disabled namespace cannot be read."""
        regions = [
            replace(region, namespaces=tuple(self._seen(each) for each in region.namespaces))
            for region in self.machine.regions
        ]
        return replace(self.machine, regions=tuple(regions))

    def _seen(self, namespace: NamespaceState) -> NamespaceState:
        seen = replace(namespace, offset=self.places[namespace.dev])
        if seen.enabled:
            return seen
        return replace(seen, content=None, dax=None, damaged="it is disabled")

    def remove_region(self, dev: str) -> None:
        """A region goes away, as when somebody pulls a device."""
        regions = tuple(each for each in self.machine.regions if each.dev != dev)
        self.machine = replace(self.machine, regions=regions)

    def _point(self) -> None:
        self.points += 1
        if self.points == self.stop_at:
            raise self.stop()

    # --- records ----------------------------------------------------------------------------------

    def _region(self, dev: str) -> RegionState:
        found = self.machine.region(dev)
        if found is None:
            raise InvalidArgument(f"{dev} is not there any more", op="simulate")
        return found

    def _put(self, region: RegionState) -> None:
        """Takes a region back in, with what is available in it."""
        taken = sorted((self.places[each.dev], each.size) for each in region.namespaces)
        edges = [0, *(edge for at, size in taken for edge in (at, at + size)), region.size]
        free = [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]
        if region.type == "volatile" or not region.labelled:
            free = [0]
        assert min(free) >= 0, f"namespaces of {region.dev} overlap: {taken}"
        region = replace(region, available=sum(free), largest=max(free))
        regions = [each for each in self.machine.regions if each.dev != region.dev]
        regions.append(region)
        order = {each.dev: number for number, each in enumerate(self.machine.regions)}
        regions.sort(key=lambda each: order.get(each.dev, len(order)))
        self.machine = replace(self.machine, regions=tuple(regions))

    def _change(self, region: RegionState, dev: str, now: NamespaceState | None) -> None:
        """Puts a namespace in the place of one of this name, adds it, or takes it out."""
        spaces = [each for each in region.namespaces if each.dev != dev]
        if now is not None:
            spaces.append(now)
            spaces.sort(key=lambda each: self.places[each.dev])
        self._put(replace(region, namespaces=tuple(spaces)))

    def _find(self, step: Step, made: _Made) -> tuple[RegionState, NamespaceState]:
        dev = step.target
        if dev.startswith("@"):
            dev = made[int(dev[1:])]["dev"]
        region = self._region(step.region)
        for each in region.namespaces:
            if dev in (each.dev, None if each.dax is None else each.dax.dev):
                return region, each
        raise InvalidArgument(f"{dev} is not in {region.dev} any more", op=step.verb)

    def _name(self, region: RegionState) -> str:
        self._names += 1
        return f"namespace{region.dev.removeprefix('region')}.{self._names}"

    # --- forth ------------------------------------------------------------------------------------

    def perform(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        """Carries a step out in the records."""
        self._point()
        name = "_" + step.verb.replace("-", "_")
        done: dict[str, Any] = getattr(self, name)(step, keep, made)
        self._point()
        return done

    def _init_labels(self, step: Step, keep: Keep, _made: _Made) -> dict[str, Any]:
        region = self._region(step.region)
        if not region.label_room:
            raise InvalidArgument(f"{region.dev} has no label area", op=step.verb)
        for each in region.namespaces:
            _require_idle(each)
        keep({"was": [as_plain(each) for each in region.namespaces]})
        self._point()
        self._put(replace(region, labelled=True, namespaces=()))
        return {}

    def _create_namespace(self, step: Step, keep: Keep, _made: _Made) -> dict[str, Any]:
        region, params = self._region(step.region), step.params
        size = params["size"]
        if not region.labelled:
            raise InvalidArgument(f"{region.dev} is one namespace already", op=step.verb)
        if size > region.largest:
            raise NoSpace(f"{size} bytes asked for, {region.largest} are free", op=step.verb)
        dev = self._name(region)
        keep({"dev": dev})
        self._point()
        self.places[dev] = _first_fit(region, self.places, size)
        self._change(region, dev, _made_of(params, dev, size, f"uuid-{dev}"))
        return {"dev": dev, "uuid": f"uuid-{dev}"}

    def _destroy_namespace(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        _require_idle(here)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        self._point()
        self._change(region, here.dev, None)
        return {}

    def _reconfigure_namespace(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        _require_idle(here)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        self._point()
        half = replace(here, mode="unknown", content=None, dax=None, damaged="half made")
        self._change(region, here.dev, half)
        self._point()
        now = _made_of(step.params, here.dev, here.size, f"{here.uuid}+", here.name)
        self._change(self._region(step.region), here.dev, now)
        return {"dev": here.dev, "uuid": now.uuid}

    def _enable_namespace(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        self._change(region, here.dev, replace(here, enabled=True))
        return {"dev": here.dev}

    def _mkfs(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        _require_idle(here)
        if here.mode == "devdax":
            raise InvalidArgument(f"{here.dev} is no block device", op=step.verb)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        self._point()
        content = Content(kind="filesystem", name=step.params["filesystem"])
        self._change(region, here.dev, replace(here, content=content))
        return {"dev": here.dev}

    def _mount(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        if here.content is None or here.content.name != step.params["filesystem"]:
            raise InvalidArgument(f"{here.dev} holds {here.content}", op=step.verb)
        taken = [m for r in self.machine.regions for n in r.namespaces for m in n.mounts]
        if step.params["path"] in taken:
            raise Busy(f"{step.params['path']} is a mount point already", op=step.verb)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        self._change(region, here.dev, replace(here, mounts=(*here.mounts, step.params["path"])))
        return {"dev": here.dev}

    def _umount(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        region, here = self._find(step, made)
        keep({"was": as_plain(here), "at": self.places[here.dev]})
        mounts = tuple(each for each in here.mounts if each != step.params["path"])
        self._change(region, here.dev, replace(here, mounts=mounts))
        return {"dev": here.dev}

    # --- DAX devices ------------------------------------------------------------------------------

    def _device(self, step: Step, made: _Made) -> DaxState:
        dev = step.target
        if dev.startswith("@"):
            dev = made[int(dev[1:])]["dev"]
        region = self._region(step.region)
        for each in region.devices:
            if each.dev == dev:
                return each
        for space in region.namespaces:
            if space.dax is not None and dev in (space.dev, space.dax.dev):
                return space.dax
        raise InvalidArgument(f"{dev} is no DAX device", op=step.verb)

    def _put_device(self, region: RegionState, now: DaxState) -> None:
        devices = tuple(now if each.dev == now.dev else each for each in region.devices)
        spaces = tuple(
            replace(each, dax=now) if each.dax is not None and each.dax.dev == now.dev else each
            for each in region.namespaces
        )
        self._put(replace(region, devices=devices, namespaces=spaces))

    def _set_device(
        self, step: Step, keep: Keep, was: DaxState, half: DaxState, now: DaxState
    ) -> dict[str, Any]:
        keep({"device": as_plain(was)})
        self._point()
        self._put_device(self._region(step.region), half)
        self._point()
        self._put_device(self._region(step.region), now)
        return {"dev": was.dev}

    def _reconfigure_device(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        was = self._device(step, made)
        for each in self._region(step.region).namespaces:
            if each.dax is not None and each.dax.dev == was.dev and each.holders:
                raise Busy(f"{each.dev} is in use: {each.holders[0]}", op=step.verb)
        if step.params["mode"] == "devdax":
            half = replace(was, online=was.online // 2)
            now = replace(was, mode="devdax", blocks=0, online=0, zone=None)
            return self._set_device(step, keep, was, half, now)
        blocks = was.size // _BLOCK
        zone = step.params["online"]
        half = replace(was, mode="system-ram", blocks=blocks, online=0, zone=None)
        now = half
        if zone != "no" and blocks:
            now = replace(half, online=blocks, zone=zone)
        return self._set_device(step, keep, was, half, now)

    def _online_memory(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        was = self._device(step, made)
        wanted: Literal["movable", "kernel"] = step.params["zone"]
        zone: Literal["movable", "kernel", "mixed"]
        zone = wanted if was.zone in (None, wanted) else "mixed"
        now = replace(was, online=was.blocks, zone=zone)
        return self._set_device(step, keep, was, was, now)

    def _offline_memory(self, step: Step, keep: Keep, made: _Made) -> dict[str, Any]:
        was = self._device(step, made)
        half = replace(was, online=was.online // 2, zone=was.zone if was.online > 1 else None)
        return self._set_device(step, keep, was, half, replace(was, online=0, zone=None))

    # --- CXL --------------------------------------------------------------------------------------

    def _create_cxl_region(self, step: Step, keep: Keep, _made: _Made) -> dict[str, Any]:
        params, size = step.params, step.params["size"]
        self._names += 1
        dev = f"region{self._names}"
        keep({"dev": dev, **params})
        self._point()
        self._take(params["members"], params["type"], -(size // params["ways"]))
        cxl = CxlState(
            dev=dev,
            type=params["type"],
            ways=params["ways"],
            granularity=params["granularity"],
            decoder=params["decoder"],
            members=tuple(params["members"]),
        )
        if params["type"] == "ram":
            device = DaxState(
                dev=f"dax{self._names}.0", size=size, mode="system-ram", blocks=size // _BLOCK
            )
            self._put(
                RegionState(
                    dev=dev,
                    size=size,
                    type="volatile",
                    nature="memory",
                    devices=(device,),
                    cxl=cxl,
                )
            )
            return {"dev": device.dev, "region": dev}
        self._put(RegionState(dev=dev, size=size, cxl=cxl))
        return {"region": dev}

    def _take(self, members: list[str], kind: str, amount: int) -> None:
        """Gives bytes back to memory devices, or takes them."""
        after = []
        for each in self.machine.memdevs:
            ram = amount if kind == "ram" and each.dev in members else 0
            pmem = amount if kind == "pmem" and each.dev in members else 0
            now = replace(each, ram_free=each.ram_free + ram, pmem_free=each.pmem_free + pmem)
            if min(now.ram_free, now.pmem_free) < 0:
                raise NoSpace(f"{each.dev} has not {-amount} bytes", op="create-cxl-region")
            after.append(now)
        self.machine = replace(self.machine, memdevs=tuple(after))

    # --- back -------------------------------------------------------------------------------------

    def reverse(self, entry: Entry, *, force: bool = False) -> str:
        """Takes a step back in the records."""
        self._point()
        step, kept = entry.step, entry.kept
        if not kept:
            return "nothing had been changed"
        match step.verb:
            case "init-labels":
                self._unlabel(step, kept)
            case "create-namespace":
                self._uncreate(step, kept)
            case "create-cxl-region":
                self._unmake(kept)
            case "reconfigure-device" | "online-memory" | "offline-memory":
                was = from_plain(DaxState, kept["device"])
                self._put_device(self._region(step.region), was)
            case _:
                self._bring_back(step, kept, force)
        self._point()
        return f"{step.verb} of {step.target} is undone"

    def _unlabel(self, step: Step, kept: Mapping[str, Any]) -> None:
        region = self._region(step.region)
        if not region.labelled:
            return
        if region.namespaces:
            raise Busy(f"{region.namespaces[0].dev} would be lost", op="undo")
        spaces = tuple(from_plain(NamespaceState, each) for each in kept["was"])
        self._put(replace(region, labelled=False, namespaces=spaces))

    def _uncreate(self, step: Step, kept: Mapping[str, Any]) -> None:
        region = self._region(step.region)
        for each in region.namespaces:
            if each.dev == kept["dev"]:
                _require_idle(each)
                self._change(region, each.dev, None)

    def _unmake(self, kept: Mapping[str, Any]) -> None:
        region = self.machine.region(kept["dev"])
        if region is None:
            return
        if region.namespaces or any(each.online for each in region.devices):
            raise Busy(f"{region.dev} is in use", op="undo")
        self.remove_region(region.dev)
        self._take(kept["members"], kept["type"], kept["size"] // kept["ways"])

    def _bring_back(self, step: Step, kept: Mapping[str, Any], force: bool) -> None:
        was = from_plain(NamespaceState, kept["was"])
        region = self._region(step.region)
        here = next((each for each in region.namespaces if each.dev == was.dev), None)
        if step.verb in ("mkfs", "reconfigure-namespace") and here is not None:
            _require_idle(here)
            if here.uuid in self.written and not force:
                raise Corrupt(f"{here.dev} was written to since", op="undo")
        if here is None:
            end = kept["at"] + was.size
            for each in region.namespaces:
                start = self.places[each.dev]
                if start < end and kept["at"] < start + each.size:
                    raise Corrupt(f"{each.dev} has taken its space", op="undo")
            self.places[was.dev] = kept["at"]
        self._change(region, was.dev, was)


def _require_idle(namespace: NamespaceState) -> None:
    """Refuses what is in use."""
    dax = namespace.dax
    uses = [*namespace.mounts, *namespace.holders]
    if dax is not None and dax.mode == "system-ram":
        uses.append("it is system RAM")
    if uses:
        raise Busy(f"{namespace.dev} is in use: {uses[0]}", op="simulate")


def _first_fit(region: RegionState, places: Mapping[str, int], size: int) -> int:
    at = 0
    for each in region.namespaces:
        if places[each.dev] - at >= size:
            return at
        at = places[each.dev] + each.size
    return at


def _made_of(
    params: Mapping[str, Any], dev: str, size: int, uuid: str, name: str | None = None
) -> NamespaceState:
    """The namespace that the parameters ask for."""
    mode = params["mode"]
    paged = mode in ("fsdax", "devdax")
    dax = None
    if mode == "devdax":
        dax = DaxState(dev=dev.replace("namespace", "dax"), size=size, mode="devdax")
    sector_size = params.get("sector_size") or 4096
    return NamespaceState(
        dev=dev,
        mode=mode,
        size=size,
        capacity=size,
        uuid=uuid,
        name=params.get("name") or name,
        map=(params.get("map") or "mem") if paged else None,
        align=(params.get("align") or 2 << 20) if paged else None,
        sector_size=sector_size if mode == "sector" else None,
        blockdev=None if mode == "devdax" else dev.replace("namespace", "pmem"),
        dax=dax,
    )
