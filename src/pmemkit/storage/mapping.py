"""Mapping by path: opens a region, maps it, and closes it again. The mapping keeps the lock.

What this does not do: decide anything; :mod:`pmemkit.dax` does.
"""

import os
from typing import TYPE_CHECKING

from pmemkit.media.provider import Locking
from pmemkit.storage.region import open_region

if TYPE_CHECKING:
    from pmemkit.dax import Mapping

__all__ = ["map_path"]


def map_path(
    path: str | os.PathLike[str],
    offset: int = 0,
    length: int | None = None,
    *,
    read_only: bool = False,
    granularity: str | None = None,
    huge: bool | None = None,
    tracker: str = "automatic",
    create_size: int | str | None = None,
    locking: Locking = "on",
) -> "Mapping":
    """Maps a file, a device, memory or a namespace of an image (``IMAGE:namespace0.0``).

    Opening is as in :func:`pmemkit.open`, mapping as in :meth:`Region.map`: ``granularity`` is what
    is required.
    """
    how = open_region(path, read_only=read_only, create_size=create_size, locking=locking)
    with how as region:
        mapping = region.map(
            offset, length, read_only=read_only, granularity=granularity, huge=huge, tracker=tracker
        )
        region.let_go(mapping)
    return mapping
