"""Suite ``cache``: what a hit costs, what is kept, and how many writes the media are spared.

Hits of 4 KiB are timed against a plain copy between a random block of as much populated memory and
a hot buffer, in the one loop of the core. Hit ratios come from the cache's own replacement, run
without bytes, against LRU, ARC and S3-FIFO of ``libcachesim`` at the same size. Media writes are
counted below a real device that replays the trace, against a write-back LRU of the same size and
flush age.

The trace is ``--trace FILE`` or ``PMEMKIT_TRACE``: cloudPhysicsIO.csv of libCacheSim. Without it,
or without libcachesim, those cases are left out.

What this does not do: take clients into account; suite ``nbd`` has them.
"""

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pmemkit import _native
from pmemkit.bench._blocks import BLOCK, add_trace_option, read_csv, synthetic
from pmemkit.bench._runner import (
    Options,
    Report,
    alternate,
    parse_options,
    suite,
)
from pmemkit.units import format_size

__all__ = ["main"]

_POOL_SIZE = 256 << 20
_NS_GUESS = 700
"""Of one operation; it only decides how many a run has."""
_PEERS = ("LRU", "ARC", "S3FIFO")
_SHARES = (0.001, 0.01, 0.1)
_SIZES = (4 << 20, 64 << 20, 256 << 20)
_AGES = (None, 30)
_SYNTHETIC_BLOCKS = 100_000
_SYNTHETIC_USES = 1_000_000


# --- what a hit costs -----------------------------------------------------------------------------


def _hits(report: Report, options: Options) -> None:
    """All blocks are in RAM and dirty; nothing is written back meanwhile."""
    names = [f"{op} hit 4K threads {threads}" for op in ("read", "write") for threads in (1, 2)]
    if not any(options.wanted(name) for name in names):
        return
    raw = _native.block.raw(_native.media.map_anonymous(_POOL_SIZE))
    # Room beyond the pool, because hashing does not fill all shards alike.
    cache = _native.block.cache(
        raw,
        size=_POOL_SIZE * 5 // 4,
        flush_age=None,
        dirty_background=100,
        dirty_most=100,
        heed_pressure=False,
    )
    channel = cache.device.channel()
    for offset in range(0, _POOL_SIZE, 1 << 20):
        channel.write(offset, b"\x5a" * (1 << 20))
    ours = _native.bench.Sectors.channel(channel, BLOCK)
    floor = _native.bench.Sectors.plain_copy(_POOL_SIZE)
    count = max(1000, int(options.seconds * 1e9 / _NS_GUESS))
    for name in names:
        if options.wanted(name):
            op, threads = name.split()[0], int(name.split()[-1])
            sides: list[Callable[[], float]] = [
                partial(each.ns, op, threads, count) for each in (ours, floor)
            ]
            mine, other = alternate(sides, options.runs)
            report.add(name, "ns", mine, other, "plain copy", less_is_better=True)
    if cache.stats()["read_misses"] or cache.stats()["evictions"]:
        raise AssertionError("not every use was a hit")


# --- what is kept ---------------------------------------------------------------------------------


def _peer_hit_ratio(simulator: Any, name: str, trace: Any, slots: int) -> float:
    """Percent of the uses that libcachesim's cache of this kind hits."""
    cache = getattr(simulator, name)(cache_size=slots)
    request = simulator.Request()
    request.obj_size = 1
    hits = 0
    for block in trace["block"].tolist():
        request.obj_id = block
        hits += cache.get(request)
    return 100 * hits / len(trace)


def _ratios(report: Report, options: Options, traces: dict[str, Any]) -> None:
    try:
        libcachesim = importlib.import_module("libcachesim")
    except ImportError as missing:
        print(f"left out: hit ratios: {missing} (pip install libcachesim)")
        return
    for trace_name, trace in traces.items():
        footprint = len(set(trace["block"].tolist()))
        for share in _SHARES:
            name = f"hits {trace_name} {100 * share:g}%"
            if not options.wanted(name):
                continue
            slots = max(1, int(footprint * share))
            uses, hits, _ = _native.bench.cache_simulate(trace.tobytes(), slots)
            for peer in _PEERS:
                theirs = _peer_hit_ratio(libcachesim, peer, trace, slots)
                report.add(f"{name} {peer}", "%", [100 * hits / uses], [theirs], peer)


# --- what the media are spared --------------------------------------------------------------------


def _lru_writes(trace: Any, slots: int, age: int | None) -> int:
    """Blocks written by an LRU of reads and writes that writes back what it evicts and, each
    second, what has been dirty for longer than ``age``; what is dirty at the end counts, too."""
    blocks: OrderedDict[int, None] = OrderedDict()
    dirty: OrderedDict[int, int] = OrderedDict()
    written = 0
    for block, second, write in trace.tolist():
        while age is not None and dirty and next(iter(dirty.values())) < second - age:
            dirty.popitem(last=False)
            written += 1
        if block in blocks:
            blocks.move_to_end(block)
        else:
            blocks[block] = None
            if len(blocks) > slots:
                gone, _ = blocks.popitem(last=False)
                written += dirty.pop(gone, None) is not None
        if write:
            dirty.setdefault(block, second)
    return written + len(dirty)


def _device_writes(trace: Any, size: int) -> int:
    """Blocks that a real device with a cache writes to media, replaying the trace block by block
    over sparse memory; nothing is written back by age."""
    import numpy as np

    # Footprint only: far apart blocks move together, in their order.
    names, places = np.unique(trace["block"], return_inverse=True)
    medium = _native.media.map_anonymous(len(names) * BLOCK)
    cache = _native.block.cache(
        _native.block.raw(medium), size=size, flush_age=None, read_ahead=0, heed_pressure=False
    )
    channel = cache.device.channel()
    target, source = bytearray(BLOCK), b"\x5a" * BLOCK
    for place, write in zip(places.tolist(), trace["write"].tolist(), strict=True):
        if write:
            channel.write(place * BLOCK, source)
        else:
            channel.readinto(place * BLOCK, target)
    cache.drain()
    return cache.stats()["blocks_written"]


def _media_writes(report: Report, options: Options, trace: Any) -> None:
    uncached = int((trace["write"] != 0).sum())
    for size in _SIZES:
        slots = size // BLOCK
        for age in _AGES:
            timed = "" if age is None else f" age {age} s"
            name = f"media writes {format_size(size)}{timed}"
            if options.wanted(name):
                _, _, ours = _native.bench.cache_simulate(trace.tobytes(), slots, flush_age=age)
                lru = _lru_writes(trace, slots, age)
                report.add(name, "blocks", [ours], [lru], "LRU", less_is_better=True)
                report.add(name, "blocks", [ours], [uncached], "uncached", less_is_better=True)
        name = f"media writes {format_size(size)} device"
        if options.wanted(name):
            ours = _device_writes(trace, size)
            lru = _lru_writes(trace, slots, None)
            report.add(name, "blocks", [ours], [lru], "LRU", less_is_better=True)
            report.add(name, "blocks", [ours], [uncached], "uncached", less_is_better=True)


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, found = parse_options("cache", arguments, runs=9, seconds=0.3, more=add_trace_option)
    traces = {
        name: synthetic(name, _SYNTHETIC_BLOCKS, _SYNTHETIC_USES)
        for name in ("zipf", "scan", "loop")
    }
    report = Report(options)
    _hits(report, options)
    if found.trace is None:
        print("left out: cases with a recorded trace: name one with --trace or PMEMKIT_TRACE")
    else:
        traces = {"cloudphysics": read_csv(found.trace), **traces}
    _ratios(report, options, traces)
    if found.trace is not None:
        _media_writes(report, options, traces["cloudphysics"])
    report.write(["libcachesim"])


if __name__ == "__main__":
    sys.exit(main())
