"""From ``IMAGE:namespaceR.N`` to the bytes that a user of the namespace sees.

What this does not do: open anything for I/O.
"""

import os
import re
from dataclasses import dataclass
from typing import Final

from pmemkit.bus.image import ImageNamespace, machine_of, observe
from pmemkit.errors import InvalidArgument, NotSupported

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

    @property
    def mode(self) -> str:
        """The mode of the namespace."""
        return self.namespace.claim.mode


def split_namespace(text: str) -> tuple[str, str] | None:
    """Path and namespace of ``PATH:namespaceR.N``; ``None`` for anything else."""
    match = _NAMED.fullmatch(text)
    return (match["path"], match["name"]) if match else None


def locate(path: str, name: str) -> Place:
    """The bytes of a namespace of an image or machine file.

    Of modes fsdax and devdax these are the data, behind info block and page map; of the others all
    of the namespace. Raises :class:`InvalidArgument` where there is no such namespace and
    :class:`NotSupported` where a kernel would not enable it either, or it spans several dimms.
    """
    here = observe(machine_of([path])).namespace(name)
    region = here.region
    if region.span.ways > 1:
        text = f"{here.dev} spans {region.span.ways} dimms and cannot be opened"
        raise NotSupported(text, op="open", path=path)
    if not here.claim.enabled:
        text = f"{here.dev} cannot be enabled: {'; '.join(map(str, here.claim.faults))}"
        raise NotSupported(text, op="open", path=path)
    start = region.dimms[0].spec.dpa + here.offset
    if here.claim.mode in ("fsdax", "devdax"):
        assert here.claim.size is not None
        return Place(region.path, start + here.claim.offset, here.claim.size, here)
    return Place(region.path, start, here.size, here)


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
