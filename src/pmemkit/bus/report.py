"""Records as the JSON that ``ndctl list`` prints.

One kind of thing is a list; several are an object, where things stand inside what they belong to:
namespaces inside regions, both inside buses. Regions show their mappings where dimms are asked for
too. Fields without a value are left out.

What this does not do: serialise; the caller has ``json`` for that.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pmemkit.bus.model import Bus, Dimm, Mapping, Namespace, Region

__all__ = ["as_json", "human_hex", "human_size", "listing"]

_HEXADECIMAL = {"iset_id", "handle", "phys_id", "offset", "length"}
_SIZES = {"size", "available_size", "max_available_extent"}
_PLAIN_BELOW = 5000 << 10
_BINARY = ("MiB", 20), ("GiB", 30), ("TiB", 40)
_DECIMAL = ("MB", 6), ("GB", 9), ("TB", 12)


def listing(
    found: Iterable[Bus],
    *,
    buses: bool = False,
    dimms: bool = False,
    regions: bool = False,
    namespaces: bool = False,
    human: bool = False,
) -> Any:
    """What is asked for; namespaces if nothing is. ``human``: sizes and numbers for people."""
    if not (buses or dimms or regions or namespaces):
        namespaces = True
    parts = [_parts(bus, dimms, regions, namespaces, human) for bus in found]
    if buses:
        return parts
    asked = {"dimms": dimms, "regions": regions, "namespaces": namespaces and not regions}
    joined = {
        key: [each for part in parts for each in part[key]]
        for key, wanted in asked.items()
        if wanted
    }
    return next(iter(joined.values())) if dimms + regions + namespaces == 1 else joined


def _parts(bus: Bus, dimms: bool, regions: bool, namespaces: bool, human: bool) -> dict[str, Any]:
    """A bus with what is asked for inside it."""
    record = as_json(bus, human)
    if dimms:
        record["dimms"] = [as_json(dimm, human) for dimm in bus.dimms]
    if regions:
        record["regions"] = [_region(each, dimms, namespaces, human) for each in bus.regions]
    elif namespaces:
        record["namespaces"] = [
            as_json(each, human) for region in bus.regions for each in region.namespaces
        ]
    return record


def _region(region: Region, mappings: bool, namespaces: bool, human: bool) -> dict[str, Any]:
    record = as_json(region, human)
    if mappings and region.mappings:
        record["mappings"] = [as_json(each, human) for each in region.mappings]
    if namespaces and region.namespaces:
        record["namespaces"] = [as_json(each, human) for each in region.namespaces]
    return record


def as_json(
    thing: Bus | Namespace | Region | Dimm | Mapping, human: bool = False
) -> dict[str, Any]:
    """The fields of one record that have a value, without what stands inside it."""
    record: dict[str, Any] = {}
    for each in fields(thing):
        value = getattr(thing, each.name)
        if value is None or isinstance(value, tuple):
            continue
        if human and (each.name in _SIZES or (isinstance(thing, Region) and each.name == "align")):
            value = human_size(value)
        elif human and each.name in _HEXADECIMAL:
            value = human_hex(value)
        record[each.name] = value
    return record


def human_size(size: int) -> int | str:
    """A size as ndctl prints it for people: ``64.00 MiB (67.11 MB)``; small ones as they are."""
    if size < _PLAIN_BELOW:
        return size
    binary, shift = next((u for u in _BINARY if size < 2048 << u[1]), _BINARY[-1])
    decimal, power = next((u for u in _DECIMAL if size < 2000 * 10 ** u[1]), _DECIMAL[-1])
    return f"{size / (1 << shift):.2f} {binary} ({size / 10**power:.2f} {decimal})"


def human_hex(value: int) -> str:
    """A number as ndctl prints it for people."""
    return f"{value:#x}" if value else "0"
