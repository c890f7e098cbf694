"""The image bus: files as the regions of a machine.

A label-less image is one region with one namespace over all of it, of mode ``raw``, as the kernel
treats an nvdimm without labels.

What this does not do: open, lock or map an image, read labels or info blocks.
"""

import os
import stat
from collections.abc import Iterable

from pmemkit.bus.model import Bus, Namespace, Region
from pmemkit.errors import NotSupported
from pmemkit.media.provider import failure_of

__all__ = ["SECTOR_SIZE", "image_bus"]

SECTOR_SIZE = 512
"""Of a raw namespace, as the kernel has it."""


def image_bus(paths: Iterable[str | os.PathLike[str]]) -> Bus:
    """A bus with one region for each image, numbered in this order."""
    regions = tuple(_region(index, os.fspath(path)) for index, path in enumerate(paths))
    return Bus(provider="image", dev="ndbus0", regions=regions)


def _region(index: int, path: str) -> Region:
    size = _size_of(path)
    namespace = Namespace(
        dev=f"namespace{index}.0",
        mode="raw",
        size=size,
        sector_size=SECTOR_SIZE,
        path=path,
    )
    return Region(
        dev=f"region{index}",
        size=size,
        max_available_extent=0,
        path=path,
        namespaces=(namespace,),
    )


def _size_of(path: str) -> int:
    try:
        status = os.stat(path)  # noqa: PTH116 - a path as the user wrote it
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        if not stat.S_ISBLK(status.st_mode):
            raise NotSupported("is neither a file nor a block device", op="list", path=path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as cause:
        raise failure_of(cause, "list", path) from cause
