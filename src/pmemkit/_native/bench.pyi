"""Timing loops that must not run in Python. Used by ``pmem bench``; refuse debug builds there."""

import os
from typing import final

from .block import Channel

@final
class Sectors:
    """Sectors to be read and written at random by the loop that is the same for all of them."""

    @staticmethod
    def channel(channel: Channel) -> Sectors:
        """A device of ours."""

    @staticmethod
    def floor(length: int, size: int) -> Sectors:
        """Populated private memory: a write is one copy around the cache and three times store,
        write-back and fence; a read is a plain copy."""

    @staticmethod
    def pmemblk(library: str, path: str | os.PathLike[str], size: int, length: int) -> Sectors:
        """A new pool of PMDK's libpmemblk, every block of it written once."""

    @property
    def count(self) -> int:
        """How many sectors there are."""

    def ns(self, op: str, threads: int, iterations: int) -> float:
        """Nanoseconds of one ``read`` or ``write``, while so many threads each do ``iterations``."""

def medium_ns(
    call: str,
    length: int,
    iterations: int,
    *,
    library: str | None = None,
    working_set: int = 1 << 26,
) -> float:
    """Median-of-batches nanoseconds of one call over populated memory, walking a working set.

    ``call``: ``copy_persist`` (copy and make durable, cache-line granularity), ``persist`` (dirty
    one byte a line, then write back and fence). With ``library`` (a path or soname of libpmem) the
    loop calls ``pmem_memcpy_persist`` / ``pmem_persist`` of that library instead of ours."""
