"""From ``IMAGE:namespaceR.N`` to the bytes that a user of the namespace sees.

What this does not do: open anything for I/O.
"""

import os
import re
from dataclasses import dataclass
from typing import Final

from pmemkit.bus.image import ImageNamespace, machine_of, observe, open_reader
from pmemkit.errors import Corrupt, InvalidArgument, NotSupported
from pmemkit.formats import guids
from pmemkit.formats.btt import INITIAL_OFFSET, BttInfo, Version, find_copy

__all__ = ["Place", "locate", "require_whole", "split_namespace"]

_NAMED: Final = re.compile(r"(?P<path>.+):(?P<name>namespace\d+\.\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a namespace lie. Bytes."""

    path: str
    """Of the image."""
    offset: int
    length: int
    namespace: ImageNamespace
    backup_version: Version | None = None
    """Of mode sector, read by the copies of its bad info blocks."""

    @property
    def mode(self) -> str:
        """The mode of the namespace."""
        return self.namespace.claim.mode if self.backup_version is None else "sector"

    @property
    def btt_version(self) -> tuple[int, int] | None:
        """The version of the layout of mode sector."""
        if self.backup_version is not None:
            return (1, 1) if self.backup_version == "1.1" else (2, 0)
        return self.namespace.claim.version


def split_namespace(text: str) -> tuple[str, str] | None:
    """Path and namespace of ``PATH:namespaceR.N``; ``None`` for anything else."""
    match = _NAMED.fullmatch(text)
    return (match["path"], match["name"]) if match else None


def locate(path: str, name: str, *, backup_info_block: bool = False) -> Place:
    """The bytes of a namespace of an image or machine file.

    Of modes fsdax and devdax these are the data, behind info block and page map; of the others all
    of the namespace. Raises :class:`InvalidArgument` where there is no such namespace,
    :class:`NotSupported` where a kernel would not enable it either, or it spans several dimms, and
    :class:`Corrupt` for one of mode sector whose info block is bad, unless it is to be read by the
    copy of that.
    """
    here = observe(machine_of([path])).namespace(name)
    region = here.region
    if region.span.ways > 1:
        text = f"{here.dev} spans {region.span.ways} dimms and cannot be opened"
        raise NotSupported(text, op="open", path=path)
    start = region.dimms[0].spec.dpa + here.offset
    if backup_info_block:
        return Place(region.path, start, here.size, here, _backup_version(here, path))
    _refuse_lost_sectors(here, path)
    if not here.claim.enabled:
        text = f"{here.dev} cannot be enabled: {'; '.join(map(str, here.claim.faults))}"
        raise NotSupported(text, op="open", path=path)
    if here.claim.mode in ("fsdax", "devdax"):
        assert here.claim.size is not None
        return Place(region.path, start + here.claim.offset, here.claim.size, here)
    return Place(region.path, start, here.size, here)


def _versions(here: ImageNamespace) -> tuple[Version, ...]:
    """What layouts of mode sector there may be: that of the label, or the one for others."""
    claim = here.found.claim if here.found is not None else None
    if claim == guids.BTT2:
        return ("2.0",)
    return ("1.1",) if claim in (None, guids.NULL, guids.BTT) else ()


def _copy_of(here: ImageNamespace) -> tuple[Version, int] | None:
    """The version and place of the copy of the first info block."""
    base = here.region.dimms[0].spec.dpa + here.offset
    # What was observed was read through a file that is closed by now.
    read, _, close = open_reader(here.region.path)
    try:
        for version in _versions(here):
            start = INITIAL_OFFSET[version]
            copy = find_copy(
                lambda at, length: read(base + at, length),
                start=start,
                size=here.size,
                version=version,
                parent=here.uuid,
            )
            if copy is not None:
                return version, copy[0]
    finally:
        close()
    return None


def _backup_version(here: ImageNamespace, path: str) -> Version:
    if here.claim.mode == "sector":
        return "1.1" if here.claim.version == (1, 1) else "2.0"
    copy = _copy_of(here)
    if copy is None:
        text = f"{here.dev} has no copy of an info block of mode sector"
        raise Corrupt(text, op="open", path=path)
    return copy[0]


def _refuse_lost_sectors(here: ImageNamespace, path: str) -> None:
    """Where Linux would take the namespace for a raw one, and lay a new BTT over the old one.

    The label says that there is a BTT, or a block looks like one and is damaged. A block that was
    made for another namespace is what an earlier one left."""
    labelled = here.found is not None and here.found.claim in (guids.BTT, guids.BTT2)
    faults = [each for each in here.claim.faults if each.structure == BttInfo.TITLE]
    damaged = any(each.field not in ("signature", "parent_uuid") for each in faults)
    if here.claim.mode == "sector" or not (labelled or damaged):
        return
    said = "; ".join(map(str, faults)) or "there is none"
    copy = _copy_of(here)
    advice = f"and there is no copy of it: pmem check-namespace {path} {here.dev} says more"
    if copy is not None:
        advice = (
            f"its copy at byte {copy[1]} is good: pmem check-namespace {path} {here.dev} --repair "
            "restores it, --read-only --backup-info-block reads by it"
        )
    text = f"{here.dev} is of mode sector and its info block is bad ({said}); {advice}"
    raise Corrupt(text, op="open", path=path)


def require_whole(path: str | os.PathLike[str]) -> None:
    """Refuses to take an image for one raw namespace when it holds something else."""
    bus = observe(machine_of([path]))
    every = [each for region in bus.regions for each in region.namespaces]
    labelled = any(region.labelled for region in bus.regions)
    if not labelled and len(every) == 1 and every[0].claim.info is None:
        return
    names = ", ".join(f"{each.dev} ({each.claim.mode})" for each in every) or "no namespace yet"
    what = "has labels" if labelled else "is label-less and carries an info block"
    if len(bus.dimms) > 1:
        what = "describes a machine"
    text = f"{what}: say PATH:namespace; there is {names}"
    raise InvalidArgument(text, op="open", path=os.fspath(path))
