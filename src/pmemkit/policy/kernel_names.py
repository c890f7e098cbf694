"""Names that the kernel gives anew at each boot, and what stays the same.

Regions and dimms are numbered as they are found, and namespaces, DAX devices and disks after their
region: after a boot ``region0`` may be another one. An entry of the journal may be older than the
boot. So it keeps by what its region is told from all others: which bytes of which dimms it has, or
its address where it has no dimms. Before the entry is taken back, every name in it becomes the one
of now. (The cookie of an interleave set changes when its dimms get labels.)

What this does not do: CXL regions, which are found by the serial numbers of their devices.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pmemkit.bus.dax import dax_devices
from pmemkit.bus.sysfs import Node, devices
from pmemkit.errors import InvalidArgument
from pmemkit.policy.kernel_live import Live, Made
from pmemkit.policy.model import Entry, Step

__all__ = ["names_of", "with_names_of_now"]

_NUMBERED: Final = re.compile(r"(region|namespace|dax|pmem|btt|pfn)(\d{1,9})((?:\.\d{1,9})?s?)")
_DIMM: Final = re.compile(r"nmem\d{1,9}")
_KEY: Final = "names"


def names_of(live: Live, step: Step, made: Made) -> dict[str, Any]:
    """What an entry has to keep to find its region again; nothing where that is not known."""
    region = _region_of(live, step, made)
    if region is None:
        return {}
    dimms = {dev: _id_of(live, dev) for dev, _ in _mappings(region)}
    known = {dev: text for dev, text in dimms.items() if text is not None}
    return {_KEY: {"region": region.name, "is": _what(live, region), "dimms": known}}


def _region_of(live: Live, step: Step, made: Made) -> Node | None:
    """The region of the nvdimm bus that a step is about."""
    target = step.target
    if target.startswith("@"):
        facts = made.get(int(target[1:])) or {}
        target = str(facts.get("dev"))
    if target.startswith("dax"):
        device = next((e for e in dax_devices(live.sysfs) if e.dev == target), None)
        target = device.owner if device is not None and device.kind == "namespace" else ""
    found = re.fullmatch(r"(?:region|namespace)(\d{1,9})(?:\.\d{1,9})?", target)
    if found is None:
        return None
    here = devices(live.sysfs, "nd", f"region{found[1]}")
    return here[0] if here and _what(live, here[0]) is not None else None


def _what(live: Live, region: Node) -> str | None:
    """What a region is, in words that stay true over a boot."""
    mappings = _mappings(region)
    parts = [(_id_of(live, dev), place) for dev, place in mappings]
    if parts and all(known is not None for known, _ in parts):
        return "; ".join(f"dimm {known}, {place}" for known, place in parts)
    start = region.number("resource")
    return f"address {start:#x}" if start and not parts else None


def _mappings(region: Node) -> list[tuple[str, str]]:
    """The dimms of a region with the bytes that it has of each."""
    count = min(region.size("mappings"), 64)
    texts = [(region.text(f"mapping{index}") or "").partition(",") for index in range(count)]
    return [(dev, place) for dev, _, place in texts if _DIMM.fullmatch(dev)]


def _id_of(live: Live, dimm: str) -> str | None:
    node = Node(dimm, live.sysfs / "bus" / "nd" / "devices" / dimm)
    return node.text("nfit/id") or node.text("cxl/id")


def with_names_of_now(live: Live, entry: Entry) -> Entry:
    """The entry with every name as it is now. Raises :class:`InvalidArgument` where its region is
    not there."""
    kept = dict(entry.kept)
    names: Mapping[str, Any] | None = kept.pop(_KEY, None)
    if not names:
        return entry
    regions = devices(live.sysfs, "nd", r"region\d+")
    region = next((each for each in regions if _what(live, each) == names["is"]), None)
    if region is None:
        text = f"{names['region']}, which was {names['is']}, is not there any more"
        raise InvalidArgument(text, op="undo")
    now = {_id_of(live, dev): dev for dev, _ in _mappings(region)}
    dimms = {dev: now[known] for dev, known in names["dimms"].items()}
    numbers = (names["region"].removeprefix("region"), region.name.removeprefix("region"))
    step = replace(entry.step, target=_renamed(entry.step.target, numbers, dimms))
    return replace(
        entry,
        step=step,
        kept=_renamed(kept, numbers, dimms),
        made=_renamed(entry.made, numbers, dimms),
    )


def _renamed(thing: Any, numbers: tuple[str, str], dimms: Mapping[str, str]) -> Any:
    """Plain values with the names in them changed; bytes and other texts stay."""
    if isinstance(thing, Mapping):
        return {
            _renamed(key, numbers, dimms): _renamed(value, numbers, dimms)
            for key, value in thing.items()
        }
    if isinstance(thing, list | tuple):
        return [_renamed(each, numbers, dimms) for each in thing]
    if not isinstance(thing, str):
        return thing
    found = _NUMBERED.fullmatch(thing)
    if found is not None and found[2] == numbers[0]:
        return f"{found[1]}{numbers[1]}{found[3]}"
    return dimms.get(thing, thing)
