"""Records as the JSON that ``ndctl list`` prints.

One kind of thing is a list; several are an object, where namespaces stand inside their regions.
Fields without a value are left out.

What this does not do: serialise; the caller has ``json`` for that.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pmemkit.bus.model import Bus, Dimm, Mapping, Namespace, Region
from pmemkit.units import format_size

__all__ = ["listing"]

_HEXADECIMAL = {"iset_id", "handle", "phys_id", "offset", "length"}
_SIZES = {"size", "available_size", "max_available_extent"}


def listing(
    buses: Iterable[Bus],
    *,
    regions: bool = False,
    namespaces: bool = False,
    dimms: bool = False,
    human: bool = False,
) -> Any:
    """What is asked for; namespaces if nothing is. ``human``: sizes and numbers for people."""
    if not (regions or namespaces or dimms):
        namespaces = True
    found = list(buses)
    every = [region for bus in found for region in bus.regions]
    parts: dict[str, list[Any]] = {}
    if dimms:
        parts["dimms"] = [_record(dimm, human) for bus in found for dimm in bus.dimms]
    if regions:
        parts["regions"] = [_region(region, namespaces, human) for region in every]
    elif namespaces:
        parts["namespaces"] = [
            _record(each, human) for region in every for each in region.namespaces
        ]
    if len(parts) == 1 and not (regions and namespaces):
        return next(iter(parts.values()))
    return parts


def _region(region: Region, namespaces: bool, human: bool) -> dict[str, Any]:
    record = _record(region, human)
    if region.mappings:
        record["mappings"] = [_record(each, human) for each in region.mappings]
    if namespaces and region.namespaces:
        record["namespaces"] = [_record(each, human) for each in region.namespaces]
    return record


def _record(thing: Namespace | Region | Dimm | Mapping, human: bool) -> dict[str, Any]:
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
