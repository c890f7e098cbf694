"""From the machine as it is and the policy to the steps between the two.

    machine ─┐
             ├─▶ first rule of each region ─▶ shares and their sizes ─▶ what fits already
    policy ──┘                                        │
                 steps ◀── refused as a whole ◀── guards, physics ◀── what has to go

Invariants:
1. A pure function: no I/O, no clock, no chance. The same machine and policy give the same plan, and
   a region's steps do not depend on other regions, but for their numbers, the share of the DRAM
   that page maps have taken, and mount points.
2. A region is planned as a whole: where one thing of it is refused, nothing of it is changed.
3. Nothing that a guard protects is destroyed: whatever loses data passes :meth:`_Region.doom`.
4. Where every share is there already, there is no step; what nobody asked for is left alone unless
   its room is needed.
5. Further than the nature allows goes only a rule with ``override_nature``.

What this does not do: look into a region made by a CXL step of the same plan: whoever applies it
plans again until nothing is to be done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

from pmemkit.policy.bills import map_size, step_seconds, wear_forecast
from pmemkit.policy.cxl_step import cxl_step
from pmemkit.policy.match import any_glob, rule_finder
from pmemkit.policy.model import (
    CxlWant,
    DaxState,
    MachineState,
    NamespaceState,
    PageMap,
    Plan,
    Policy,
    Refusal,
    RegionState,
    Rule,
    Share,
    Step,
    Verb,
    Want,
)
from pmemkit.units import format_size

__all__ = ["plan"]

_SIZE_LEAST: Final = 16 << 20
"""Of a namespace with an info block."""
_DEFAULT_ALIGN: Final = 2 << 20
_PAGED: Final = ("fsdax", "devdax", "system-ram")
"""The modes that have a page map."""


class _Refused(Exception):
    """Why a region stays as it is."""


@dataclass
class _Budget:
    """What is shared by all regions of a plan."""

    maps: int | None
    """Bytes that page maps may still take from the DRAM; ``None``: nobody knows."""
    mounts: dict[str, str] = field(default_factory=dict)
    """Mount points, and the namespaces or regions that have them."""
    steps: list[Step] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def copy(self) -> "_Budget":
        """What a region may spend of, to be thrown away when it is refused."""
        return _Budget(self.maps, dict(self.mounts), list(self.steps))


def plan(machine: MachineState, policy: Policy) -> Plan:
    """The steps that make the machine what the policy wants it to be."""
    mounts = {m: n.dev for r in machine.regions for n in r.namespaces for m in n.mounts}
    budget = _Budget(_map_budget(machine, policy), mounts)
    for wish in policy.cxl:
        _take_cxl(budget, cxl_step(machine, wish), wish)
    rule_of = rule_finder(policy)
    for region in machine.regions:
        rule = rule_of(region)
        if rule is None:
            budget.notes.append(f"{region.dev}: no rule is for it, so it is left alone")
            continue
        budget.notes.append(f"{region.dev} ({region.nature}): rule {rule.name!r}")
        planner = _Region(machine, policy, region, rule, budget.copy())
        try:
            planner.run()
        except _Refused as refusal:
            budget.refused.append(Refusal(region=region.dev, why=str(refusal), rule=rule.name))
            continue
        _take_over(budget, planner.budget)
    return Plan(
        steps=tuple(budget.steps),
        refused=tuple(budget.refused),
        deferred=tuple(budget.deferred),
        notes=tuple(budget.notes),
    )


def _take_over(budget: _Budget, tried: _Budget) -> None:
    budget.maps, budget.mounts, budget.steps = tried.maps, tried.mounts, tried.steps
    budget.deferred += tried.deferred
    budget.notes += tried.notes


def _take_cxl(budget: _Budget, found: Step | Refusal | str | None, wish: CxlWant) -> None:
    if isinstance(found, Step):
        budget.steps.append(replace(found, number=len(budget.steps) + 1))
        text = f"{wish.name}: what becomes of the new region is planned when it is there"
        budget.notes.append(text)
    elif isinstance(found, Refusal):
        budget.refused.append(found)
    elif found is not None:
        budget.deferred.append(found)


def _map_budget(machine: MachineState, policy: Policy) -> int | None:
    if machine.dram is None:
        return None
    taken = sum(
        map_size(each.capacity)
        for region in machine.regions
        for each in region.namespaces
        if each.map == "mem"
    )
    return int(machine.dram * (1 - policy.guards.dram_share)) - taken


# --- one region -----------------------------------------------------------------------------------


@dataclass
class _Slot:
    """A share with its size, and the namespace that is it, or becomes it."""

    share: Share
    size: int
    have: NamespaceState | None = None
    changes: bool = False
    """True where :attr:`have` has the size and not the rest."""


@dataclass
class _Region:
    machine: MachineState
    policy: Policy
    region: RegionState
    rule: Rule
    budget: _Budget

    # Helpers

    def refuse(self, why: str) -> _Refused:
        return _Refused(why)

    def step(self, verb: Verb, target: str, why: str, **more: Any) -> str:
        """Adds a step; gives what later steps call its result."""
        params: Mapping[str, Any] = {
            key: value for key, value in more.pop("params", {}).items() if value is not None
        }
        size = more.pop("size", self.region.size)
        mode = params.get("mode")
        number = len(self.budget.steps) + 1
        self.budget.steps.append(
            Step(
                number=number,
                verb=verb,
                target=target,
                region=self.region.dev,
                why=why,
                params=params,
                seconds=step_seconds(verb, size, mode=mode, block_size=self.machine.block_size),
                **more,
            )
        )
        return f"@{number}"

    def can(self, verb: Verb, what: str) -> bool:
        """Whether this bus does it; otherwise it is put off, in words."""
        if verb in self.machine.verbs:
            return True
        text = f"{self.region.dev}: {what}, on the running machine"
        if text not in self.budget.deferred:
            self.budget.deferred.append(text)
        return False

    # The region as a whole

    def run(self) -> None:
        for share in self.rule.shares:
            self.require_nature(share.want)
        if self.region.type == "volatile":
            self.run_volatile()
        else:
            self.run_namespaces()

    def require_nature(self, want: Want) -> None:
        """How far policy may lean."""
        region = self.region
        if self.rule.override_nature is not None:
            return
        if want.personality == "memory" and (region.nature == "storage" or region.wears):
            why = "it wears out" if region.wears else "it is storage by nature"
            raise self.refuse(
                f"it is to be memory, but {why} ({region.because or 'nothing says otherwise'}); "
                'override_nature = "reason" in the rule says that this is meant'
            )
        if want.map == "dev" and region.wears:
            raise self.refuse(
                "its page map is to be in the region, which wears it out; "
                'override_nature = "reason" in the rule says that this is meant'
            )

    def wear(self, want: Want, place: str | None = None) -> str | None:
        leans = want.personality == "memory" or place == "dev"
        worn = self.region.wears or self.region.nature == "storage"
        if leans and worn and self.rule.override_nature is not None:
            return f"{wear_forecast(self.region)}; overridden: {self.rule.override_nature}"
        return None

    # Volatile regions have DAX devices and no namespaces

    def run_volatile(self) -> None:
        share, region = self.rule.shares[0], self.region
        if len(self.rule.shares) > 1 or share.size not in (None, region.size, Fraction(1)):
            raise self.refuse("a volatile region is one DAX device and cannot be divided")
        if share.want.personality == "storage" or share.want.mode == "fsdax":
            raise self.refuse(
                f"mode {share.want.mode} needs a block device, and the kernel makes none of a "
                "volatile region; devdax is the most it allows"
            )
        if not region.devices:
            raise self.refuse("it has no DAX device")
        for device in region.devices:
            self.device(device.dev, device, share.want)

    def is_as_wanted(self, now: DaxState | None, want: Want) -> bool:
        """Whether :meth:`device` has nothing to do."""
        before = len(self.budget.steps)
        self.device("", now, want)
        changed = len(self.budget.steps) > before
        del self.budget.steps[before:]
        return not changed

    def device(self, target: str, now: DaxState | None, want: Want) -> None:
        """Makes a DAX device what it is to be; ``now``: what it is, if it is there yet."""
        if want.personality == "memory":
            self.to_memory(target, now, want.online or "movable", want)
        elif now is not None and now.mode != "devdax":
            self.to_devdax(target, now, "the policy wants a device, not memory")

    def to_memory(self, target: str, now: DaxState | None, online: str, want: Want) -> None:
        size = now.size if now is not None else self.region.size
        if now is None or now.mode != "system-ram":
            if self.can("reconfigure-device", f"{self.region.dev} becomes system RAM"):
                self.step(
                    "reconfigure-device",
                    target,
                    "the policy wants memory",
                    params={"mode": "system-ram", "online": online},
                    size=size,
                    wear=self.wear(want),
                )
            return
        if online == "no" or not now.blocks:
            return
        if now.online and now.zone is not None and now.zone != online:
            why = f"it is online as {now.zone}, the policy wants {online}"
            self.step("offline-memory", target, why, size=size)
            self.step("online-memory", target, why, params={"zone": online}, size=size)
        elif now.online < now.blocks:
            why = f"{now.online} of {now.blocks} memory blocks are online"
            self.step("online-memory", target, why, params={"zone": online}, size=size)

    def to_devdax(self, target: str, now: DaxState, why: str) -> None:
        if self.can("reconfigure-device", f"{target} stops being system RAM"):
            self.step("reconfigure-device", target, why, params={"mode": "devdax"}, size=now.size)

    # Persistent regions have namespaces

    def run_namespaces(self) -> None:
        slots = self.lay_out()
        self.find(slots)
        missing = [slot for slot in slots if slot.have is None]
        mine = {slot.have.dev for slot in slots if slot.have is not None}
        others = [each for each in self.region.namespaces if each.dev not in mine]
        changing = [slot for slot in slots if slot.have is None or slot.changes]
        if changing and self.region.fixed is not None:
            raise self.refuse(f"it cannot be changed: {self.region.fixed}")
        paged = [slot.share.want.mode for slot in changing if slot.share.want.mode in _PAGED]
        if paged and self.region.unmappable is not None:
            raise self.refuse(f"it cannot be {paged[0]}: {self.region.unmappable}")
        whole = not self.region.labelled and not self.needs_labels(slots)
        if missing and not whole and not self.region.labelled:
            self.make_labels()
        elif missing and not whole:
            others = self.make_room(slots, others)
        if others and self.region.labelled:
            names = ", ".join(each.dev for each in others)
            self.budget.notes.append(
                f"{self.region.dev}: {names} not in the policy and not in the way"
            )
        for slot in slots:
            self.settle(slot)

    def needs_labels(self, slots: list[_Slot]) -> bool:
        """What a label-less region, which is one namespace without a name, cannot be."""
        return len(slots) > 1 or any(
            slot.share.name is not None or slot.size != self.region.size for slot in slots
        )

    def lay_out(self) -> list[_Slot]:
        """The shares with their sizes, rounded down to what is legal."""
        region = self.region
        sizes: list[int | None] = []
        whole = len(self.rule.shares) == 1 and self.rule.shares[0].size in (None, Fraction(1))
        if whole and not region.labelled and self.rule.shares[0].name is None:
            return [_Slot(self.rule.shares[0], region.size)]
        taken = 0
        for share in self.rule.shares:
            if share.size is None:
                sizes.append(None)
                continue
            wanted = share.size
            asked = int(region.size * wanted) if isinstance(wanted, Fraction) else wanted
            size = self.legal(share, asked)
            sizes.append(size)
            taken += size
        rest = region.size - taken
        if rest < 0:
            raise self.refuse(
                f"its shares come to {format_size(taken)}, {format_size(-rest)} more than it has"
            )
        return [
            _Slot(share, self.legal(share, rest) if size is None else size)
            for share, size in zip(self.rule.shares, sizes, strict=True)
        ]

    def legal(self, share: Share, size: int) -> int:
        want = share.want
        paged = want.mode in _PAGED
        unit = max(self.region.align, (want.align or _DEFAULT_ALIGN) if paged else 0)
        legal = size // unit * unit
        least = max(unit, 0 if want.mode == "raw" else _SIZE_LEAST)
        if legal < least:
            raise self.refuse(
                f"a share of {format_size(size)} is too small for mode {want.mode}: "
                f"{format_size(least)} are the least here"
            )
        return legal

    def find(self, slots: list[_Slot]) -> None:
        """Gives each share the namespace that is it already, or only has to change its mode."""
        left = list(self.region.namespaces)
        for exact in (True, False):
            for slot in slots:
                if slot.have is not None:
                    continue
                for each in left:
                    fits = self.is_it(each, slot) if exact else self.may_become(each, slot)
                    if fits:
                        slot.have, slot.changes = each, not exact
                        left.remove(each)
                        break

    def is_it(self, namespace: NamespaceState, slot: _Slot) -> bool:
        want = slot.share.want
        mode = "devdax" if want.mode == "system-ram" else want.mode
        asked = (
            (want.sector_size, namespace.sector_size),
            (want.map, namespace.map),
            (want.align, namespace.align),
            (slot.share.name, namespace.name),
        )
        return (
            namespace.mode == mode
            and namespace.size == slot.size
            # What is on a disabled one is not known; it is enabled first, and looked at again.
            and (namespace.damaged is None or not namespace.enabled)
            and all(wanted is None or wanted == has for wanted, has in asked)
        )

    def may_become(self, namespace: NamespaceState, slot: _Slot) -> bool:
        if not self.region.labelled and self.needs_labels([slot]):
            return False
        named = slot.share.name in (None, namespace.name) or namespace.name is None
        return namespace.size == slot.size and named

    def make_labels(self) -> None:
        """Labels for a region without; what was on it goes."""
        if not self.region.label_room:
            raise self.refuse(
                "it has no label area: it is one namespace, which cannot be divided or named"
            )
        lost = [
            text
            for each in self.region.namespaces
            for text in self.doom(each, "the region gets labels", destroy=False)
        ]
        why = "only labels divide a region or name a part of it"
        self.step("init-labels", self.region.dev, why, destroys=tuple(lost), reverse="contents")

    def make_room(self, slots: list[_Slot], others: list[NamespaceState]) -> list[NamespaceState]:
        """Room for what is missing: no more is destroyed than it takes, and what a guard protects
        comes last. Gives those of the others that stay."""
        stay = sorted(others, key=self.worth, reverse=True)
        gone: list[NamespaceState] = []
        while not self.fits(slots, stay, gone):
            changing = next((slot for slot in slots if slot.changes), None)
            if stay:
                gone.append(stay.pop())
            elif changing is not None:
                # Its contents were to be lost anyhow; made anew it may lie where it leaves room.
                assert changing.have is not None
                gone.append(changing.have)
                changing.have, changing.changes = None, False
            else:
                needed = sum(slot.size for slot in slots if slot.have is None)
                can_be = self.region.available + sum(each.size for each in gone)
                raise self.refuse(
                    f"{format_size(needed)} are needed; {format_size(can_be)} can be had, but not "
                    "in one piece between the namespaces that are as wanted"
                )
        for each in gone:
            self.doom(each, "its room is needed")
        return stay

    def worth(self, namespace: NamespaceState) -> tuple[bool, bool]:
        """What is destroyed last."""
        try:
            self.require_unprotected(namespace)
        except _Refused:
            return True, True
        return False, namespace.content is not None

    def fits(
        self, slots: list[_Slot], stay: list[NamespaceState], gone: list[NamespaceState]
    ) -> bool:
        """Whether what is missing has room, whichever free piece is taken first."""
        sizes = [slot.size for slot in slots if slot.have is None]
        kept = stay + [slot.have for slot in slots if slot.have is not None]
        if any(each.offset is None for each in kept):
            room = self.region.available + sum(each.size for each in gone)
            return sum(sizes) <= (room if gone else self.region.largest)
        gaps = _gaps(self.region, [(each.offset or 0, each.size) for each in kept])
        return _packs(gaps, sizes, largest=False) and _packs(gaps, sizes, largest=True)

    def doom(self, namespace: NamespaceState, why: str, *, destroy: bool = True) -> list[str]:
        """Plans the end of a namespace, if no guard protects it. Gives what is lost, in words."""
        self.require_unprotected(namespace)
        if namespace.map == "mem" and self.budget.maps is not None:
            self.budget.maps += map_size(namespace.capacity)
        for path in namespace.mounts:
            self.step("umount", namespace.dev, why, params={"path": path}, size=namespace.size)
            self.budget.mounts.pop(path, None)
        if namespace.dax is not None and namespace.dax.mode == "system-ram":
            self.to_devdax(namespace.dax.dev, namespace.dax, why)
        lost = [self.loss(namespace)]
        if destroy:
            self.step(
                "destroy-namespace",
                namespace.dev,
                why,
                params={"uuid": namespace.uuid},
                destroys=tuple(lost),
                reverse="contents",
                size=namespace.size,
            )
        return lost

    def loss(self, namespace: NamespaceState) -> str:
        content = namespace.content
        if content is None:
            what = (namespace.damaged and f"damaged: {namespace.damaged}") or "no known signature"
        else:
            label = f" {content.label!r}" if content.label else ""
            what = f"{content.name}{label} ({content.kind})"
        return f"{namespace.dev}, {format_size(namespace.size)}, {namespace.mode}: {what}"

    def require_unprotected(self, namespace: NamespaceState) -> None:
        guards, dev = self.policy.guards, namespace.dev
        if any_glob(guards.protect, (dev, namespace.uuid, namespace.name)):
            raise self.refuse(f"{dev} would have to go, and the guards protect it by name")
        if namespace.holders:
            raise self.refuse(f"{dev} would have to go, and is in use: {namespace.holders[0]}")
        if guards.keep_if_mounted and namespace.mounts:
            raise self.refuse(f"{dev} would have to go, and is mounted at {namespace.mounts[0]}")
        if guards.keep_signatures and namespace.content is not None:
            raise self.refuse(f"{dev} would have to go, and carries {namespace.content.name}")
        if guards.keep_signatures and namespace.damaged is not None:
            raise self.refuse(
                f"{dev} would have to go, and cannot be read ({namespace.damaged}); "
                "pmem check-namespace may repair it"
            )

    def settle(self, slot: _Slot) -> None:
        """Makes a share what it is to be, on the namespace it has or on a new one."""
        want, have = slot.share.want, slot.have
        if have is None:
            target = self.make(slot)
        elif slot.changes:
            target = self.change(slot, have)
        elif not have.enabled:
            self.claim_mount(want.mount, have)
            if self.can("enable-namespace", f"{have.dev} is enabled"):
                why = "it is there, and disabled; what is on it is seen when it is enabled"
                self.step("enable-namespace", have.dev, why, size=have.size)
            return
        else:
            target = have.dev
        kept = None if slot.changes else have
        if want.mode in ("devdax", "system-ram"):
            dax = None if kept is None else kept.dax
            if kept is not None and kept.holders and not self.is_as_wanted(dax, want):
                raise self.refuse(f"{kept.dev} is in use: {kept.holders[0]}")
            self.device(dax.dev if dax is not None else target, dax, want)
        elif want.filesystem is not None:
            self.files(slot, target, kept)

    def params(self, slot: _Slot, place: str | None) -> dict[str, Any]:
        want = slot.share.want
        mode = "devdax" if want.mode == "system-ram" else want.mode
        return {
            "mode": mode,
            "sector_size": want.sector_size,
            "map": place,
            "align": want.align,
            "name": slot.share.name,
        }

    def bill(self, slot: _Slot) -> PageMap | None:
        """Where the page map of a new namespace goes, and what it takes."""
        want = slot.share.want
        if want.mode not in _PAGED:
            return None
        size = map_size(slot.size)
        place = want.map or "mem"
        budget = self.budget.maps
        if want.map is None and budget is not None and size > budget:
            may = not self.region.wears or self.rule.override_nature is not None
            if may and want.mode != "system-ram":
                place = "dev"
            else:
                self.budget.notes.append(
                    f"{self.region.dev}: its page map of {format_size(size)} leaves less DRAM than "
                    "the guard wants; in the region it would wear it out or be of no use"
                )
        if place == "mem" and budget is not None:
            self.budget.maps = budget - size
        return PageMap(size=size, place=place)

    def make(self, slot: _Slot) -> str:
        bill = self.bill(slot)
        place = None if bill is None else bill.place
        params = {"size": slot.size, **self.params(slot, place)}
        if not self.region.labelled and not self.needs_labels([slot]):
            params["size"] = None
        return self.step(
            "create-namespace",
            self.region.dev,
            f"rule {self.rule.name!r} wants {slot.share.want.mode}",
            params=params,
            page_map=bill,
            wear=self.wear(slot.share.want, place),
            size=slot.size,
        )

    def change(self, slot: _Slot, have: NamespaceState) -> str:
        why = f"rule {self.rule.name!r} wants {slot.share.want.mode}, it is {have.mode}"
        lost = self.doom(have, why, destroy=False)
        bill = self.bill(slot)
        place = None if bill is None else bill.place
        return self.step(
            "reconfigure-namespace",
            have.dev,
            why,
            params={"uuid": have.uuid, **self.params(slot, place)},
            destroys=tuple(lost),
            reverse="contents",
            page_map=bill,
            wear=self.wear(slot.share.want, place),
            size=slot.size,
        )

    def claim_mount(self, path: str | None, have: NamespaceState | None) -> None:
        """Takes a mount point for this region, if nobody else has it."""
        if path is None:
            return
        other = self.budget.mounts.get(path)
        if other is not None and (have is None or other != have.dev):
            raise self.refuse(f"{path} is the mount point of {other} already")
        self.budget.mounts[path] = have.dev if have is not None else self.region.dev

    def files(self, slot: _Slot, target: str, have: NamespaceState | None) -> None:
        """File system and mount."""
        want = slot.share.want
        kind, path = want.filesystem, want.mount
        content = None if have is None else have.content
        self.claim_mount(path, have)
        if content is None or content.name != kind:
            why = f"rule {self.rule.name!r} wants {kind}"
            lost = [] if have is None else self.doom(have, why, destroy=False)
            if not self.can("mkfs", f"{kind} is made"):
                return
            self.step(
                "mkfs",
                target,
                why,
                params={"filesystem": kind},
                destroys=tuple(lost) if content is not None else (),
                reverse="state",
                size=slot.size,
            )
        if path is None or (have is not None and path in have.mounts):
            return
        if have is not None and have.holders:
            raise self.refuse(f"{have.dev} is in use: {have.holders[0]}")
        if self.can("mount", f"it is mounted at {path}"):
            params = {"filesystem": kind, "path": path, "options": want.mount_options}
            self.step("mount", target, "the policy wants it there", params=params, size=slot.size)


def _gaps(region: RegionState, taken: list[tuple[int, int]]) -> list[int]:
    """Sizes of the free pieces between what is taken, in their order."""
    gaps, at, unit = [], 0, region.align
    for start, size in [*sorted(taken), (region.size, 0)]:
        gaps.append(max(0, start // unit * unit - -(-at // unit) * unit))
        at = max(at, start + size)
    return gaps


def _packs(gaps: list[int], sizes: list[int], *, largest: bool) -> bool:
    """Whether pieces of these sizes have room one after the other, each in the first gap that holds
    it, or in the largest."""
    left = list(gaps)
    for size in sizes:
        fitting = [place for place, gap in enumerate(left) if gap >= size]
        if not fitting:
            return False
        left[max(fitting, key=left.__getitem__) if largest else fitting[0]] -= size
    return True
