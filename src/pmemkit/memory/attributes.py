"""How fast a region of a pool is: what its user says, and where that is nothing, the bus.

A device DAX, and a file on a file system that maps the media itself, have the attributes of their
region; a namespace of an image has those of its machine file. Everything else is ordinary memory,
of this process or the page cache, and has those of the node that the calling thread runs on.

What this does not do: measure.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pmemkit.bus.attributes import (
    ATTRIBUTES,
    Attribute,
    Attributes,
    home_node,
    node_attributes,
    region_attributes,
    stated_attributes,
)
from pmemkit.bus.declarations import load_declarations
from pmemkit.bus.evidence_kernel import find_region, region_of_device, region_under
from pmemkit.bus.nodes import thread_node

if TYPE_CHECKING:
    from pmemkit.memory.regions import Opened

__all__ = ["SYSFS", "complete", "shown"]

SYSFS = Path("/sys")
"""Where the kernel says what there is."""


def complete(member: "Opened") -> None:
    """Fills in what its user does not say of a region that joins a pool.

    Raises :class:`InvalidArgument` where the machine file is not understood.
    """
    said = {
        name: Attribute(value, "user")
        for name in ATTRIBUTES
        if (value := getattr(member.spec, name)) is not None
    }
    here = thread_node(SYSFS)
    local = {} if here is None else node_attributes(here, SYSFS)
    found = _found(member, local)
    member.attributes = {**found, **said}
    counted = {name: each.value for name, each in found.items() if name not in said}
    if "distance" in said:
        # A latency would outrank it.
        counted.pop("latency_ns", None)
    if "bandwidth" not in local and "bandwidth" in found and found["bandwidth"].origin != "machine":
        # Shares compare only where that of ordinary memory is known as well.
        counted.pop("bandwidth", None)
    distance = counted.get("distance")
    member.spec = replace(
        member.spec,
        latency_ns=counted.get("latency_ns", member.spec.latency_ns),
        bandwidth=counted.get("bandwidth", member.spec.bandwidth),
        distance=member.spec.distance if distance is None else int(distance),
    )


def _found(member: "Opened", local: Attributes) -> Attributes:
    if member.place is not None:
        stated = stated_attributes(member.place.namespace.region.dimms[0].spec)
        if stated:
            return stated
    region = _region_of(member)
    if region is None:
        return local
    found = find_region(region, SYSFS)
    member.node = home_node(found, SYSFS)
    return region_attributes(found, SYSFS, load_declarations())


def _region_of(member: "Opened") -> str | None:
    """The region of this machine whose media the pool maps, if there is one."""
    opened = member.opened
    if opened is None or opened.file is None:
        return None
    if opened.backing == "device dax":
        return region_of_device(opened.path, SYSFS)
    return region_under(member.fd, SYSFS) if opened.decision.map_sync else None


def shown(member: "Opened | None") -> dict[str, object]:
    """The attributes of a region as plain data, who says them, and its node."""
    known = member.attributes if member is not None else {}
    values = {name: known[name].value if name in known else None for name in ATTRIBUTES}
    origins = {name: known[name].origin if name in known else None for name in ATTRIBUTES}
    return {
        **values,
        "attributes_from": origins,
        "node": member.node if member is not None else None,
    }
