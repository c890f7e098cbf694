"""What the images hold, as the records that ``ndctl list`` has.

Names of devices are those the kernel would give when it boots with exactly these dimms.

What this does not do: look at images, print.
"""

import os
from collections.abc import Sequence
from uuid import UUID

from pmemkit.bus.image import (
    ImageBus,
    ImageDimm,
    ImageNamespace,
    ImageRegion,
    machine_of,
    observe,
)
from pmemkit.bus.model import Bus, Dimm, Mapping, Namespace, Region

__all__ = ["bus_record", "image_bus", "namespace_record"]


def image_bus(paths: Sequence[str | os.PathLike[str]], *, idle: bool = False) -> Bus:
    """A bus with these images as its dimms, numbered in this order, or with those of a machine
    file."""
    return bus_record(observe(machine_of(paths)), idle=idle)


def bus_record(bus: ImageBus, *, idle: bool = False) -> Bus:
    """The bus with its dimms, regions and namespaces; with ``idle`` also what is disabled or
    empty, such as the seed that follows the namespaces of a labelled region."""
    return Bus(
        provider="image",
        dev="ndbus0",
        dimms=tuple(_dimm(dimm) for dimm in bus.dimms),
        regions=tuple(_region(region, idle) for region in bus.regions),
    )


def _dimm(dimm: ImageDimm) -> Dimm:
    return Dimm(
        dev=dimm.name,
        id=dimm.spec.id,
        handle=dimm.spec.handle,
        phys_id=0,
        state=None if dimm.spec.label_size else "disabled",
        path=dimm.spec.path,
    )


def _region(region: ImageRegion, idle: bool) -> Region:
    unit = region.span.align
    busy = 0
    if region.scan is not None:
        for offset, length in region.scan.busy:
            busy += -(-(offset + length) // unit) * unit - offset // unit * unit
    capable = all(dimm.spec.label_size for dimm in region.dimms)
    if region.scan is not None:
        available = max(0, region.size - busy) // unit * unit
        largest = max((length for _, length in region.free()), default=0)
    else:
        available, largest = 0, 0
    every = [namespace_record(each) for each in region.namespaces]
    shown = [each for each in every if idle or each.state != "disabled"]
    if idle and region.labelled:
        shown.append(_seed(region))
    return Region(
        dev=region.dev,
        size=region.size,
        align=unit if capable or region.labelled else None,
        available_size=available,
        max_available_extent=largest,
        numa_node=region.dimms[0].spec.numa_node,
        iset_id=region.span.cookie,
        mappings=tuple(
            Mapping(
                dimm=dimm.name,
                offset=dimm.spec.dpa,
                length=region.size // region.span.ways,
                position=place,
            )
            for place, dimm in enumerate(region.dimms)
        ),
        path=region.path,
        namespaces=tuple(shown),
    )


def _seed(region: ImageRegion) -> Namespace:
    number = len(region.namespaces)
    return Namespace(
        dev=f"namespace{region.span.index}.{number}",
        mode="raw",
        size=0,
        uuid=str(UUID(int=0)),
        sector_size=512,
        state="disabled",
    )


def namespace_record(here: ImageNamespace) -> Namespace:
    """One namespace."""
    claim = here.claim
    labelled = here.found is not None
    suffix = f"{here.region.span.index}" + (f".{here.number}" if here.number else "")
    uuid = str(claim.uuid) if claim.uuid is not None and claim.enabled else None
    if uuid is None and labelled:
        uuid = str(here.uuid)
    sector_size: int | None = (here.found.lbasize if here.found is not None else 0) or 512
    if claim.mode == "sector":
        sector_size = claim.sector_size
    chardev = blockdev = None
    if claim.mode == "devdax":
        chardev = f"dax{here.region.span.index}.{here.number}"
    else:
        blockdev = f"pmem{suffix}" + ("s" if claim.mode == "sector" else "")
    return Namespace(
        dev=here.dev,
        mode=claim.mode,
        map=claim.map,
        size=here.size if claim.size is None or not claim.enabled else claim.size,
        uuid=uuid,
        raw_uuid=str(here.uuid) if labelled and claim.uuid is not None else None,
        sector_size=None if claim.mode == "devdax" else sector_size,
        align=claim.align,
        blockdev=blockdev if claim.enabled else None,
        chardev=chardev,
        name=here.name or None,
        numa_node=here.region.dimms[0].spec.numa_node,
        state=None if claim.enabled else "disabled",
        path=here.region.path,
    )
