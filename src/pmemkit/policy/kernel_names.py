"""Names that the kernel gives anew at each boot, and what stays the same.

Regions and dimms are numbered as they are found, and namespaces, DAX devices and disks after their
region: after a boot ``region0`` may be another one. An entry of the journal may be older than the
boot. So it keeps by what its region is told from all others: which bytes of which dimms it has, the
serial numbers of its CXL devices, or else its address. Before the entry is taken back, every name
in it becomes the one of now. (The cookie of an interleave set would not do: it changes when the
dimms get labels.)

What this does not do: steps that make or destroy CXL regions, which keep serial numbers themselves.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pmemkit.bus.cxl import cxl_memdevs, cxl_regions
from pmemkit.bus.dax import dax_devices
from pmemkit.bus.sysfs import Node, devices
from pmemkit.errors import InvalidArgument
from pmemkit.policy.kernel_live import Live, Made
from pmemkit.policy.model import Entry, Step

__all__ = ["names_of", "range_of", "with_names_of_now"]

_NUMBERED: Final = re.compile(r"(region|namespace|dax|pmem|btt|pfn)(\d{1,9})((?:\.\d{1,9})?s?)")
_DIMM: Final = re.compile(r"nmem\d{1,9}")
_KEY: Final = "names"


@dataclass(frozen=True, slots=True)
class _Known:
    """A region as it is now."""

    region: str
    what: str
    """What it is, in words that stay true over a boot."""
    dimms: Mapping[str, str]
    """Names of its dimms by their ids."""
    dax: tuple[str, ...] = ()
    """DAX devices that are not numbered after it."""


def names_of(live: Live, step: Step, made: Made) -> dict[str, Any]:
    """What an entry has to keep to find its region again; nothing where that is not known."""
    target = step.target
    if target.startswith("@"):
        facts = made.get(int(target[1:])) or {}
        target = str(facts.get("chardev") or facts.get("dev"))
    number = re.fullmatch(r"(?:region|namespace|dax)(\d{1,9})(?:\.\d{1,9})?", target)
    for each in _all(live):
        if target in each.dax or (
            not each.dax and number is not None and each.region == f"region{number[1]}"
        ):
            dimms = {dev: known for known, dev in each.dimms.items()}
            names = {"region": each.region, "is": each.what, "dimms": dimms, "dax": [*each.dax]}
            return {_KEY: names}
    return {}


def range_of(live: Live, namespace: str) -> list[Any] | None:
    """Where a namespace lies, in words that stay true over a boot: of what region, from which byte
    of it to which. ``None``: that is not known."""
    region = f"region{namespace.removeprefix('namespace').split('.')[0]}"
    what = next((each.what for each in _all(live) if each.region == region), None)
    place = live.sysfs / "bus" / "nd" / "devices"
    base = Node(region, place / region).number("resource")
    node = Node(namespace, place / namespace)
    start = node.number("resource")
    if what is None or not base or not start or start < base:
        return None
    return [what, start - base, start - base + node.size("size")]


def _all(live: Live) -> Iterator[_Known]:
    """Every region that can be told from the others; those with DAX devices of their own first,
    because such a device may be numbered as if it were of another region."""
    serials = {each.dev: each.serial for each in cxl_memdevs(live.sysfs)}
    dax = dax_devices(live.sysfs)
    for region in cxl_regions(live.sysfs):
        members = [serials.get(each) for each in region.members]
        own = tuple(each.dev for each in dax if (each.kind, each.owner) == ("cxl", region.dev))
        if own and members and None not in members:
            numbers = ", ".join(f"{each:#x}" for each in members if each is not None)
            yield _Known(region.dev, f"{region.kind} of CXL {numbers}", {}, own)
    for device in dax:
        if device.kind == "hmem" and device.ranges:
            yield _Known(device.owner, f"address {device.ranges[0][0]:#x}", {}, (device.dev,))
    for node in devices(live.sysfs, "nd", r"region\d+"):
        mappings = _mappings(node)
        ids = {dev: _id_of(live, dev) for dev, _ in mappings}
        start = node.number("resource")
        if mappings and None not in ids.values():
            what = "; ".join(f"{place} of dimm {ids[dev]}" for dev, place in mappings)
        elif start and not mappings:
            what = f"address {start:#x}"
        else:
            continue
        yield _Known(node.name, what, {known: dev for dev, known in ids.items() if known})


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
    now = next((each for each in _all(live) if each.what == names["is"]), None)
    if now is None:
        raise InvalidArgument(f"{names['region']} ({names['is']}) is not there now", op="undo")
    pairs = [*zip(names["dax"], now.dax, strict=False)]
    exact = {dev: now.dimms[known] for dev, known in names["dimms"].items()} | dict(pairs)
    numbers = None
    if not names["dax"]:
        numbers = (names["region"].removeprefix("region"), now.region.removeprefix("region"))
    return replace(
        entry,
        step=replace(entry.step, target=_renamed(entry.step.target, numbers, exact)),
        kept=_renamed(kept, numbers, exact),
        made=_renamed(entry.made, numbers, exact),
    )


def _renamed(thing: Any, numbers: tuple[str, str] | None, exact: Mapping[str, str]) -> Any:
    """Plain values with the names in them changed; bytes and other texts stay."""
    if isinstance(thing, Mapping):
        return {
            _renamed(key, numbers, exact): _renamed(value, numbers, exact)
            for key, value in thing.items()
        }
    if isinstance(thing, list | tuple):
        return [_renamed(each, numbers, exact) for each in thing]
    if not isinstance(thing, str):
        return thing
    found = _NUMBERED.fullmatch(thing)
    if numbers is not None and found is not None and found[2] == numbers[0]:
        return f"{found[1]}{numbers[1]}{found[3]}"
    return exact.get(thing, thing)
