"""Suite ``btt``: sectors that are old or new, against libpmemblk and against the floor.

Random sectors in a populated pool, written and read by one thread and by two, in the one loop of
the core. Both engines flush cache lines of a file in shared memory (``PMEM_IS_PMEM_FORCE=1`` for
libpmemblk, ``granularity="cacheline"`` for ours). The floor of a write is a copy around the cache
and three times store, write-back, fence; that of a read a copy of a random block.

What this does not do: NBD; suite ``nbd`` has sector mode among its cases.
"""

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pmemkit import _native
from pmemkit.bench._arena import NOBODY, full_arena, sector_pool
from pmemkit.bench._runner import (
    Options,
    Report,
    alternate,
    parse_options,
    suite,
)
from pmemkit.formats import btt

if TYPE_CHECKING:
    from pmemkit._native.bench import Sectors

__all__ = ["main"]

_LIBPMEMBLK = "libpmemblk.so.1"
_SHARED_MEMORY = "/dev/shm"
_POOL_SIZE = 512 << 20
_SECTOR_SIZES = (4096, 512)
_THREADS = (1, 2)
_OPS = ("write", "read")
_NS_GUESS = 1500
"""Of one operation; it only decides how many a run has."""


def _ours(sector_size: int) -> "Sectors":
    """A namespace of mode sector in shared memory, every sector written once."""
    _, channel = sector_pool(_POOL_SIZE, sector_size)
    return _native.bench.Sectors.channel(channel)


@contextmanager
def _libpmemblk(sector_size: int) -> "Iterator[Sectors]":
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY) as directory:
        pool = Path(directory) / "pool"
        yield _native.bench.Sectors.pmemblk(_LIBPMEMBLK, pool, sector_size, _POOL_SIZE)


def _measure(report: Report, options: Options, sector_size: int, peer: bool) -> None:
    floor = _native.bench.Sectors.floor(_POOL_SIZE, sector_size)
    _cases(report, options, sector_size, _ours(sector_size), floor, "floor")
    del floor
    if peer:
        with _libpmemblk(sector_size) as theirs:
            _cases(report, options, sector_size, _ours(sector_size), theirs, "libpmemblk")


def _cases(
    report: Report,
    options: Options,
    sector_size: int,
    ours: "Sectors",
    peer: "Sectors",
    peer_name: str,
) -> None:
    for op in _OPS:
        for threads in _THREADS:
            name = f"{op} {sector_size} threads {threads} against {peer_name}"
            if not options.wanted(name):
                continue
            count = max(1000, int(options.seconds * 1e9 / _NS_GUESS))
            sides: list[Callable[[], float]] = [
                partial(each.ns, op, threads, count) for each in (ours, peer)
            ]
            mine, other = alternate(sides, options.runs)
            report.add(name, "ns", mine, other, peer_name, less_is_better=True)


def _opening(report: Report) -> None:
    """From a mapped arena of 512 GiB to the first sector written. The floor reads the same bytes,
    in as few calls as there are ranges, and does nothing with them."""
    names = ("open 512 GiB and write", "open 512 GiB, bytes read")
    if not any(report.options.wanted(name) for name in names):
        return
    from pmemkit.storage.btt_reader import read_infos
    from pmemkit.storage.sector import open_sectors

    sector = b"\x5a" * 4096
    with full_arena(4096) as (medium, arena, _):
        ranges: list[tuple[int, int]] = []

        def noted(offset: int, length: int) -> bytes:
            ranges.append((offset, length))
            return medium.read(offset, length)

        read_infos(noted, len(medium), version=(2, 0), parent_uuid=NOBODY)
        # The log, and of each lane the map entry that its newest entry speaks of.
        ranges.append((arena.logoff, btt.LANES * btt.LOG_GROUP_SIZE))
        ranges += [(arena.mapoff + 8 * lane, 8) for lane in range(btt.LANES)]

        def ours() -> float:
            start = time.perf_counter()
            engine = open_sectors(medium, version=(2, 0), parent_uuid=NOBODY)
            engine.device().channel().write(0, sector)
            return (time.perf_counter() - start) * 1e6

        def floor() -> float:
            start = time.perf_counter()
            for offset, length in ranges:
                medium.read(offset, length)
            return (time.perf_counter() - start) * 1e6

        mine, other = alternate([ours, floor], report.options.runs)
        report.add(names[0], "us", mine, other, "reading the same bytes", less_is_better=True)
        read, map_size = sum(length for _, length in ranges), 4 * arena.external_nlba
        report.add(
            names[1], "bytes", [float(read)], [float(map_size)], "the map", less_is_better=True
        )


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, _ = parse_options("btt", arguments, runs=7, seconds=0.5, quick_seconds=0.05)
    # Read by libpmemblk when it is loaded, which happens at the first measurement.
    os.environ["PMEM_IS_PMEM_FORCE"] = "1"
    try:
        ctypes.CDLL(_LIBPMEMBLK)
        peer = True
    except OSError as missing:
        print(f"left out: the comparison with libpmemblk: {missing}")
        peer = False
    report = Report(options)
    for sector_size in _SECTOR_SIZES:
        _measure(report, options, sector_size, peer)
    _opening(report)
    report.write([_LIBPMEMBLK])


if __name__ == "__main__":
    sys.exit(main())
