"""The step to a CXL region that there has to be.

Invariants:
1. A pure function, as the whole of the plan.
2. A region of the same type over the same devices is the one that is wanted, whatever its name and
   the order of its members; nothing of it is changed.

What this does not do: destroy a region that has the devices, or plan what becomes of the new one.
"""

from typing import Final

from pmemkit.policy.bills import step_seconds
from pmemkit.policy.match import members_of
from pmemkit.policy.model import (
    CxlWant,
    MachineState,
    MemdevState,
    Refusal,
    RegionState,
    Step,
    Verb,
)
from pmemkit.units import format_size

__all__ = ["cxl_step"]

_VERB: Final[Verb] = "create-cxl-region"
_GRANULARITY: Final = 256
_UNIT: Final = 256 << 20
"""What a device gives to a region is a multiple of it."""


def cxl_step(machine: MachineState, wish: CxlWant) -> Step | Refusal | str | None:
    """The step (its number is to be set), why there is none, what is put off, or ``None`` where
    the region is there."""
    # "all" are those that have such a part.
    having = [each for each in machine.memdevs if _part(each, wish)[0]]
    members = members_of(wish.members, having)
    if not members:
        named = ", ".join(wish.members)
        return _refusal(wish, f"no CXL memory device with {wish.type} in it is {named}")
    here = [region for region in machine.regions if region.cxl is not None]
    if any(_is_it(region, wish, {each.dev for each in members}) for region in here):
        return None
    ways = wish.ways or len(members)
    if ways != len(members):
        return _refusal(wish, f"{len(members)} devices are named for {ways} ways")
    room = min(_part(each, wish)[1] for each in members) // _UNIT * _UNIT * ways
    size = wish.size or room
    if size == 0 or size > room:
        return _refusal(wish, _no_room(size or _UNIT * ways, room, here, members))
    common = set.intersection(*(set(each.decoders) for each in members))
    decoder = wish.decoder or min(common, default=None)
    if decoder is None:
        return _refusal(wish, "no root decoder reaches all of its members")
    if _VERB not in machine.verbs:
        return f"{wish.name}: the CXL region is made on the running machine"
    return Step(
        number=0,
        verb=_VERB,
        target=decoder,
        region=wish.name,
        why=f"cxl {wish.name!r} wants a region of {wish.type}",
        params={
            "type": wish.type,
            "members": [each.dev for each in members],
            "ways": ways,
            "granularity": wish.granularity or _GRANULARITY,
            "decoder": decoder,
            "size": size,
        },
        seconds=step_seconds(_VERB, size),
    )


def _part(memdev: MemdevState, wish: CxlWant) -> tuple[int, int]:
    """Bytes of the part of a device that the region is to be of, and how many are free."""
    if wish.type == "ram":
        return memdev.ram_size, memdev.ram_free
    return memdev.pmem_size, memdev.pmem_free


def _is_it(region: RegionState, wish: CxlWant, names: set[str]) -> bool:
    cxl = region.cxl
    return (
        cxl is not None
        and cxl.type == wish.type
        and set(cxl.members) == names
        and wish.ways in (None, cxl.ways)
        and wish.granularity in (None, cxl.granularity)
    )


def _no_room(
    needed: int, room: int, here: list[RegionState], members: tuple[MemdevState, ...]
) -> str:
    names = {each.dev for each in members}
    taken = [r.dev for r in here if r.cxl is not None and names & set(r.cxl.members)]
    held = f"; {', '.join(taken)} has it: destroy it first" if taken else ""
    return f"{format_size(needed)} are needed, {format_size(room)} are free{held}"


def _refusal(wish: CxlWant, why: str) -> Refusal:
    return Refusal(region=wish.name, why=why, rule=wish.name)
