"""Arenas to be measured: one in shared memory, populated, and the largest one there is, full.

What this does not do: populate the data of the largest one; its map alone has half a gigabyte.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from pmemkit._native import media
from pmemkit.formats import btt
from pmemkit.formats.layout import Clear

if TYPE_CHECKING:
    from pmemkit._native.block import Channel
    from pmemkit._native.media import Medium

__all__ = ["NOBODY", "full_arena", "sector_pool"]

NOBODY: Final = UUID(int=0)
"""The parent of an arena without a label."""


def sector_pool(size: int, sector_size: int) -> "tuple[Medium, Channel]":
    """A namespace of mode sector in shared memory of granularity ``cacheline``, each sector written
    once."""
    from pmemkit.storage.sector import open_sectors

    fd = media.memfd("pmemkit-bench")
    try:
        os.ftruncate(fd, size)
        medium = media.map_file(fd, size, granularity="cacheline")
    finally:
        os.close(fd)
    for group in btt.fresh_layout(
        size, sector_size, version="2.0", uuid=UUID(int=1), parent_uuid=NOBODY
    ):
        for write in group:
            if not isinstance(write, Clear):
                medium.write(*write)
    engine = open_sectors(medium, version=(2, 0), parent_uuid=NOBODY)
    channel = engine.device().channel()
    once = b"\x5a" * (1 << 20)
    for offset in range(0, channel.size, len(once)):
        channel.write(offset, once[: channel.size - offset])
    return medium, channel


@contextmanager
def full_arena(sector_size: int) -> "Iterator[tuple[Medium, btt.Arena, Any]]":
    """The medium, the arena on it, and its map entries as a NumPy array. Every sector was written
    once, in a random order."""
    import numpy as np

    size = btt.ARENA_SIZE_MAX
    (arena,) = btt.arenas(size, sector_size, "2.0")
    fd = media.memfd("pmemkit-bench")
    try:
        os.ftruncate(fd, size)
        medium = media.map_file(fd, size, granularity="byte")
        order = np.random.default_rng(1).permutation(arena.internal_nlba).astype("<u4")
        entries = order[: arena.external_nlba] | np.uint32(btt.NORMAL)
        for group in btt.fresh_layout(
            size, sector_size, version="2.0", uuid=UUID(int=1), parent_uuid=NOBODY
        ):
            for each in group:
                if isinstance(each, tuple):
                    medium.write(*each)
        medium.write(arena.mapoff, entries.tobytes())
        for lane, block in enumerate(order[arena.external_nlba :].tolist()):
            entry = btt.LogEntry(lba=lane, old_map=block, new_map=block, seq=1)
            medium.write(arena.logoff + lane * btt.LOG_GROUP_SIZE, entry.pack())
        yield medium, arena, entries
    finally:
        os.close(fd)
