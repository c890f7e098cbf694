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
from pmemkit.media.badblocks import BadRun

__all__ = ["bus_record", "image_bus", "namespace_record"]


def image_bus(
    paths: Sequence[str | os.PathLike[str]], *, idle: bool = False, verbose: bool = False
) -> Bus:
    """A bus with these images as its dimms, numbered in this order, or with those of a machine
    file."""
    return bus_record(observe(machine_of(paths)), idle=idle, verbose=verbose)


def bus_record(
    bus: ImageBus, *, idle: bool = False, verbose: bool = False, media_errors: bool = False
) -> Bus:
    """The bus with its dimms, regions and namespaces; with ``idle`` also what is disabled or
    empty, such as the seed that follows the namespaces of a labelled region; with ``verbose`` what
    ``ndctl list -v`` adds; with ``media_errors`` where bad blocks are, and not only how many."""
    return Bus(
        provider="image",
        dev="ndbus0",
        dimms=tuple(_dimm(dimm) for dimm in bus.dimms),
        regions=tuple(_region(region, idle, verbose, media_errors) for region in bus.regions),
    )


def _dimm(dimm: ImageDimm) -> Dimm:
    return Dimm(
        dev=dimm.name,
        id=dimm.spec.id,
        handle=dimm.spec.handle,
        phys_id=0,
        path=dimm.spec.path,
    )


def _region(region: ImageRegion, idle: bool, verbose: bool, media_errors: bool) -> Region:
    unit = region.span.align
    busy = 0
    if region.scan is not None:
        for offset, length in region.scan.busy:
            busy += -(-(offset + length) // unit) * unit - offset // unit * unit
    if region.scan is not None:
        available = max(0, region.size - busy) // unit * unit
        largest = max((length for _, length in region.free()), default=0)
    else:
        available, largest = 0, 0
    node = region.dimms[0].spec.numa_node if verbose else None
    every = [
        namespace_record(each, verbose=verbose, media_errors=media_errors)
        for each in region.namespaces
    ]
    bad = region.bad(0, region.size)
    shown = [each for each in every if idle or each.state != "disabled"]
    if idle and region.labelled:
        shown.append(_seed(region, node))
    return Region(
        dev=region.dev,
        size=region.size,
        align=unit,
        available_size=available,
        max_available_extent=largest,
        numa_node=node,
        target_node=node,
        iset_id=region.span.cookie if region.labelled else None,
        badblock_count=sum(run.length for run in bad) or None,
        badblocks=_listed(region, bad) if media_errors else None,
        persistence_domain="unknown",
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


def _seed(region: ImageRegion, node: int | None) -> Namespace:
    number = len(region.namespaces)
    return Namespace(
        dev=f"namespace{region.span.index}.{number}",
        mode="raw",
        size=0,
        uuid=str(UUID(int=0)),
        sector_size=512,
        state="disabled",
        numa_node=node,
        target_node=node,
    )


def _listed(region: ImageRegion, bad: tuple[BadRun, ...]) -> list[dict[str, object]] | None:
    names = [dimm.name for dimm in region.dimms]
    return [{**run._asdict(), "dimms": names} for run in bad] or None


def namespace_record(
    here: ImageNamespace, *, verbose: bool = False, media_errors: bool = False
) -> Namespace:
    """One namespace. Where the bad blocks of mode sector are is not said, as sectors move."""
    claim = here.claim
    index = here.region.span.index
    uuid = claim.uuid if claim.uuid is not None and claim.enabled else None
    if uuid is None and here.found is not None:
        uuid = here.uuid
    node = here.region.dimms[0].spec.numa_node if verbose else None
    used = claim.enabled and claim.size is not None
    size = claim.size if used and claim.size is not None else here.size
    dax = claim.mode == "devdax"
    sector_size: int | None = (here.found.lbasize if here.found is not None else 0) or 512
    if claim.mode == "sector":
        sector_size = claim.sector_size
    blockdev = f"pmem{index}" + (f".{here.number}" if here.number else "")
    blockdev += "s" if claim.mode == "sector" else ""
    chardev = f"dax{index}.{here.number}"
    # Of mode sector the raw blocks count, with those of its metadata.
    data = (claim.offset, size) if used and claim.mode != "sector" else (0, here.size)
    bad = here.region.bad(here.offset + data[0], data[1])
    raw_uuid = verbose and here.found is not None and used
    return Namespace(
        dev=here.dev,
        mode=claim.mode,
        map=claim.map,
        size=size,
        uuid=None if uuid is None else str(uuid),
        raw_uuid=str(here.uuid) if raw_uuid else None,
        daxregion=_daxregion(here, chardev) if dax and verbose else None,
        sector_size=None if dax else sector_size,
        align=claim.align,
        blockdev=blockdev if claim.enabled and not dax else None,
        chardev=chardev if dax and not verbose else None,
        name=here.name or None,
        numa_node=node,
        target_node=node,
        badblock_count=sum(run.length for run in bad) or None,
        badblocks=_listed(here.region, bad) if media_errors and claim.mode != "sector" else None,
        state=None if claim.enabled else "disabled",
        path=here.region.path,
    )


def _daxregion(here: ImageNamespace, chardev: str) -> dict[str, object]:
    size, align = here.claim.size, here.claim.align
    node = here.region.dimms[0].spec.numa_node
    device = {
        "chardev": chardev,
        "size": size,
        "target_node": node,
        "align": align,
        "mode": "devdax",
    }
    return {"id": here.region.span.index, "size": size, "align": align, "devices": [device]}
