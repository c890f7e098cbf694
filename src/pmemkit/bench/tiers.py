"""Suite ``tiers``: what promotion and demotion by sampled use are worth, and what sampling costs.

A stream of accesses to pages is replayed at 100,000 a second over an array of which a tenth fits
the fast region. A figure is the share of the accesses of the last part that found their page there;
the peer is an oracle that knew that part and put its most used chunks there for all of it. The cost
is that of sampling alone, on reads as fast as NumPy makes them.

The trace is ``--trace FILE`` or ``PMEMKIT_TRACE``: cloudPhysicsIO.csv of libCacheSim. Without it,
only the synthetic stream is replayed.

What this does not do: have a slow region; both are the same memory here.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from pmemkit.bench._blocks import add_trace_option, read_csv, synthetic
from pmemkit.bench._runner import Options, Report, alternate, parse_options, suite
from pmemkit.memory import MemoryPool, RegionSpec

__all__ = ["main"]

_PAGE = 4096
_CHUNK = 2 << 20
_PAGES = _CHUNK // _PAGE
_BLOCK = 8 << 20
_BATCH = 500
_RATE = 100_000
"""Accesses a second."""
_FAST_SHARE = 0.1
_COUNTED = 1 / 3
"""The last part of a run, in which hits are counted."""


def _dense(blocks: Any) -> Any:
    """The same uses with the chunks that nobody uses left out."""
    import numpy as np

    _, chunk = np.unique(blocks // _PAGES, return_inverse=True)
    return chunk * _PAGES + (blocks % _PAGES).astype(int)


def _zipf() -> Any:
    """Skewed over chunks, even within each."""
    import numpy as np

    chunk = synthetic("zipf", 256, 200_000)["block"]
    return chunk.astype(int) * _PAGES + np.random.default_rng(1).integers(0, _PAGES, len(chunk))


def _pool(chunks: int, fast: int) -> MemoryPool:
    def size(count: int) -> str:
        return f"anonymous:{-(-count * _CHUNK // _BLOCK) * _BLOCK}"

    regions = [
        RegionSpec(size(fast), "fast", latency_ns=100, large_pages=False),
        RegionSpec(size(chunks + 8), "slow", latency_ns=300, large_pages=False),
    ]
    return MemoryPool(regions, block_size=_BLOCK)


def _in_fast(pool: MemoryPool, chunks: int) -> Any:
    """Of each chunk of the one extent, whether it is in the fast region."""
    import numpy as np

    there = np.zeros(chunks, bool)
    at = 0
    for piece in max(pool.map(), key=lambda extent: extent["length"])["pieces"]:
        end = at + piece["frames"]
        if piece["region"] == "fast":
            there[at // _PAGES : -(-end // _PAGES)] = True
        at = end
    return there


def _shares(pages: Any, seconds: float) -> tuple[float, float]:
    """Ours and the oracle's share of accesses that hit the fast region."""
    import numpy as np

    chunks = int(pages.max()) // _PAGES + 1
    fast = max(8, int(chunks * _FAST_SHARE))
    hits = uses = 0
    counted = np.zeros(chunks, int)
    with _pool(chunks, fast) as pool:
        capacity = pool.stat()["regions"][0]["size"] // _CHUNK
        array = pool.empty(chunks * _CHUNK, "u1")
        array[np.unique(pages) * _PAGE] = 1
        started = time.monotonic()
        done = 0
        with pool.tiering(interval=0.05, chunks=128, rate="1G"):
            while (elapsed := time.monotonic() - started) < seconds:
                if done > elapsed * _RATE:
                    time.sleep(0.001)
                    continue
                at = done % len(pages)
                batch = pages[at : at + _BATCH]
                array.take(batch * _PAGE)
                done += len(batch)
                if elapsed < seconds * (1 - _COUNTED):
                    continue
                if done // _BATCH % 20 == 0 or uses == 0:
                    there = _in_fast(pool, chunks)
                hits += int(there[batch // _PAGES].sum())
                uses += len(batch)
                np.add.at(counted, batch // _PAGES, 1)
    return hits / uses, np.sort(counted)[-capacity:].sum() / uses


def _streams(report: Report, options: Options, streams: dict[str, Any]) -> None:
    for name, pages in streams.items():
        case = f"hits of a tenth, {name}"
        if options.wanted(case):
            rounds = [_shares(pages, 15 * options.seconds) for _ in range(options.runs)]
            ours, oracle = ([each[side] * 100 for each in rounds] for side in (0, 1))
            report.add(case, "% of accesses", ours, oracle, "oracle")


def _reads(array: Any, offsets: Any, seconds: float) -> float:
    """Pages a second that are read at these offsets."""
    started, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        at = done % len(offsets)
        done += len(array.take(offsets[at : at + _BATCH]))
    return done / elapsed


def _cost(report: Report, options: Options, pages: Any) -> None:
    if not options.wanted("reads while sampling"):
        return
    chunks = int(pages.max()) // _PAGES + 1
    with _pool(chunks, 8) as pool:
        array = pool.empty(chunks * _CHUNK, "u1")
        array[::_PAGE] = 1
        offsets = pages * _PAGE

        def plain() -> float:
            return _reads(array, offsets, options.seconds)

        # A byte a second moves nothing: what is left is sampling.
        tiering = pool.tiering(rate=1)

        def sampled() -> float:
            with tiering:
                return plain()

        ours, peer = alternate([sampled, plain], options.runs)
        report.add("reads while sampling", "pages/s", ours, peer, "without")


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, found = parse_options("tiers", arguments, runs=5, seconds=1.0, more=add_trace_option)
    report = Report(options)
    zipf = _zipf()
    streams = {"zipf": zipf}
    if found.trace is not None:
        streams["trace"] = _dense(read_csv(found.trace)["block"])
    _streams(report, options, streams)
    _cost(report, options, zipf)
    report.write()


if __name__ == "__main__":
    sys.exit(main())
