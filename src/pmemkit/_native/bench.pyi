"""Timing loops that must not run in Python. Used by ``pmem bench``; refuse debug builds there."""

import os
from collections.abc import Sequence
from typing import final

from typing_extensions import Buffer

from .block import Channel

@final
class Sectors:
    """Sectors to be read and written at random by the loop that is the same for all of them."""

    @staticmethod
    def channel(channel: Channel, size: int | None = None) -> Sectors:
        """A device of ours, used ``size`` bytes at a time; by default in its smallest blocks."""

    @staticmethod
    def plain_copy(length: int) -> Sectors:
        """Populated memory of the kind that a cache has: a read or write is one plain copy of 4096
        bytes."""

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

def cache_simulate(
    trace: Buffer, slots: int, *, flush_age: int | None = None
) -> tuple[int, int, int]:
    """Runs a trace through the cache's own replacement, without bytes: uses, hits, blocks written to
    media. A use has 16 bytes, little-endian: block (8), second (4), nonzero for a write (4)."""

def lifetime(
    arenas: Sequence[tuple[int, int, int, int, int, int, int, int, int, bool]],
    workload: Buffer,
    rating: int,
    *,
    rounds: int = ...,
    levelling: tuple[str, int, int] | None = None,
) -> tuple[int, int, int, bool, list[tuple[int, str, int | None]], list[int]]:
    """Writes the sectors of a workload (4 bytes each, little-endian), again and again or ``rounds``
    times, with the engine of mode sector on media that have counters in place of bytes, until a
    block was written ``rating`` times. Arenas as for ``btt.Engine``, all of one size.

    Gives the writes until then; those until all blocks are worn out if they are at once; the
    sectors that levelling moved; whether a block wore out; for each kind of line of the metadata
    ``(bytes, "map" or "log", writes until the first wore out)``; and how often each block was
    written."""

def faults_ns(handlers: str, threads: int, pages: int, *, looking: bool) -> float:
    """Nanoseconds a fault; ``handlers`` are ``ours``, ``bare`` (the shortest loop around
    userfaultfd that works) or ``kernel`` (its own faults of zeroes). They go on ``looking`` for the
    next fault, or sleep until it comes."""

def frames_ns(
    pattern: str,
    order: int,
    threads: int,
    count: int,
    *,
    library: str | None = None,
    magazines: bool = True,
    persistent: bool = False,
) -> tuple[float, float]:
    """Nanoseconds of one get and one put of ``2**order`` frames, while so many threads each do
    ``count``.

    ``pattern``: ``bulk`` (all are taken, then all put in the same order), ``random`` (put in a
    random order), ``pair`` (each is put at once; the pair's time is told as that of the get). With
    ``library`` (a path or soname) ``malloc`` and ``free`` of that library do it instead of ours. With
    ``persistent`` the page map is one that a power failure does not take; it is not flushed."""

def medium_ns(
    call: str,
    length: int,
    iterations: int,
    *,
    library: str | None = None,
    working_set: int = 1 << 26,
    mapped: bool = False,
) -> float:
    """Median-of-batches nanoseconds of one call over populated memory, walking a working set.

    ``call``: ``copy_persist`` (copy and make durable, cache-line granularity), ``persist`` (dirty
    one byte a line, then write back and fence), ``persist_clean`` (the same of clean lines). With
    ``mapped`` it is a call of a mapping and not of its medium. With ``library`` (a path or soname of libpmem) the
    loop calls ``pmem_memcpy_persist`` / ``pmem_persist`` of that library instead of ours."""
