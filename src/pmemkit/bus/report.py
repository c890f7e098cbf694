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
from pmemkit.units import format_size

__all__ = ["as_json", "listing"]

_HEXADECIMAL = {"iset_id", "handle", "phys_id", "offset", "length"}
_SIZES = {"size", "available_size", "max_available_extent"}


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
        if human and each.name in _SIZES:
            value = f"{format_size(value)} ({value / 1e6:.2f} MB)"
        elif human and each.name in _HEXADECIMAL:
            value = hex(value)
        record[each.name] = value
    return record
