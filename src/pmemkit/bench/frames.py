"""Suite ``frames``: taking page frames and putting them back, against ``malloc`` of the same sizes.

The one loop of the core calls our allocator, or ``malloc`` and ``free`` of jemalloc, mimalloc and
glibc; nobody touches the memory. Three patterns: ``pair`` (each is put at once), ``bulk`` (all are
taken, then all put), ``random`` (put in a random order). A figure is that of a get and a put
together. LLFree's published figures come from a machine of its own (Xeon Gold 5320, 2.2 GHz, bulk)
and are stated beside ours, not measured.

What this does not do: fill the memory; ``_pool_arrays`` measures arrays, where it is there.
"""

import importlib
import importlib.util
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pmemkit import _native
from pmemkit.bench._runner import (
    Options,
    Report,
    alternate,
    parse_options,
    suite,
)
from pmemkit.errors import NotSupported

if TYPE_CHECKING:
    from pmemkit._native.frames import Allocator
    from pmemkit._native.media import Medium

__all__ = ["main"]

_LIBRARIES = {
    "jemalloc": "libjemalloc.so.2",
    "mimalloc": "libmimalloc.so.2",
    "glibc": "libc.so.6",
}
_COUNTS = {0: 200_000, 9: 2_000}
"""Of runs of each order that a thread takes at once."""
_PAIRS = {0: 2_000_000, 9: 100_000}
_THREADS = (1, 2)
_LLFREE_NS = {0: 48.0 + 41.0, 9: 45.0 + 30.0}
"""Get and put in bulk, as published."""
_TERABYTE = 1 << 40
_LINUX_BYTES = 64.0
"""Of ``struct page``."""
_TUNABLE = "glibc.rtld.optional_static_tls=16384"
_ARRAYS = "pmemkit.bench._pool_arrays"


def _reload_with_room(arguments: Sequence[str]) -> None:
    """Starts this suite again where a library that uses static TLS could not be loaded into it."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables:
        environment = {**os.environ, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, _TUNABLE)))}
        command = [sys.executable, "-m", "pmemkit.bench.frames", *arguments]
        os.execve(sys.executable, command, environment)


def _peers() -> dict[str, str]:
    found = {}
    for name, library in _LIBRARIES.items():
        try:
            _native.bench.frames_ns("pair", 0, 1, 1, library=library)
            found[name] = library
        except NotSupported as missing:
            print(f"left out: the comparison with {name}: {missing}")
    return found


def _side(
    pattern: str,
    order: int,
    threads: int,
    count: int,
    *,
    library: str | None = None,
    magazines: bool = True,
    persistent: bool = False,
) -> float:
    get, put = _native.bench.frames_ns(
        pattern,
        order,
        threads,
        count,
        library=library,
        magazines=magazines,
        persistent=persistent,
    )
    return get + put


def _patterns(report: Report, options: Options, peers: dict[str, str]) -> None:
    for order, count in _COUNTS.items():
        for threads in _THREADS:
            for pattern in ("pair", "bulk", "random"):
                name = f"{pattern} order {order} threads {threads}"
                if options.wanted(name):
                    each = _PAIRS[order] if pattern == "pair" else count
                    each = each // 10 if options.quick else each
                    _case(report, name, (pattern, order, threads, each), peers)


def _case(
    report: Report, name: str, what: tuple[str, int, int, int], peers: dict[str, str]
) -> None:
    pattern, order, threads, _ = what
    ours: dict[str, dict[str, Any]] = {
        name: {},
        f"{name}, no magazines": {"magazines": False},
        f"{name}, persistent": {"persistent": True},
    }
    sides: list[Callable[[], float]] = [partial(_side, *what, **each) for each in ours.values()]
    sides += [partial(_side, *what, library=each) for each in peers.values()]
    samples = alternate(sides, report.options.runs)
    theirs = dict(zip(peers, samples[len(ours) :], strict=True))
    for peer, figures in theirs.items():
        report.add(name, "ns", samples[0], figures, peer, less_is_better=True)
    if theirs:
        best = min(theirs, key=lambda peer: statistics.median(theirs[peer]))
        for mine, figures in list(zip(ours, samples, strict=False))[1:]:
            report.add(mine, "ns", figures, theirs[best], best, less_is_better=True)
    if pattern == "bulk" and threads == 1:
        published = [_LLFREE_NS[order]]
        for mine, figures in zip(ours, samples, strict=False):
            report.add(mine, "ns", figures, published, "LLFree, published", less_is_better=True)


def _opening(report: Report) -> None:
    """A sparse region of 1 TiB to the first frame, against 5 times an ``mmap`` of it plus one pass
    over its table of huge frames (2 bytes each)."""
    name = "1 TiB sparse, first frame"
    if not report.options.wanted(name):
        return
    fd = _native.media.memfd("pmemkit-bench")
    os.ftruncate(fd, _TERABYTE)
    table = bytes(2 * (_TERABYTE >> 21))

    def ours() -> float:
        start = time.perf_counter()
        medium = _native.media.map_file(fd, _TERABYTE, granularity="byte")
        allocator = _native.frames.Allocator(_TERABYTE >> 12)
        allocator.get(0)
        took = time.perf_counter() - start
        del medium
        return took * 1e6

    def limit() -> float:
        start = time.perf_counter()
        mapping = mmap.mmap(fd, _TERABYTE)
        mapped = time.perf_counter()
        table.count(b"\1")
        took = 5 * (mapped - start) + time.perf_counter() - mapped
        mapping.close()
        return took * 1e6

    try:
        mine, other = alternate([ours, limit], report.options.runs)
    finally:
        os.close(fd)
    report.add(name, "us", mine, other, "5 x mmap and a pass", less_is_better=True)


def _flush_us(allocator: "Allocator", count: int) -> float:
    taken = [allocator.get(6) for _ in range(count)]
    start = time.perf_counter()
    allocator.flush()
    took = time.perf_counter() - start
    for frame in taken:
        allocator.put(frame, 6)
    allocator.flush()
    return took * 1e6


def _write_back_us(medium: "Medium", size: int, count: int) -> float:
    start = time.perf_counter()
    for line in range(count):
        medium.flush(size - 64 * (line + 1), 64)
    medium.fence()
    return (time.perf_counter() - start) * 1e6


def _flushing(report: Report) -> None:
    """One flush of a persistent map that 1000 scattered gets changed, and of one that one did."""
    frames = 1 << 20
    size = _native.frames.Allocator.map_size(frames)
    for count in (1, 1000):
        name = f"flush after {count} gets"
        if not report.options.wanted(name):
            continue
        fd = _native.media.memfd("pmemkit-bench")
        try:
            os.ftruncate(fd, size)
            medium = _native.media.map_file(fd, size, granularity="cacheline")
        finally:
            os.close(fd)
        allocator = _native.frames.Allocator.over(medium, 0, size, frames, persistent=True)

        flush = partial(_flush_us, allocator, count)
        floor = partial(_write_back_us, medium, size, count)
        mine, other = alternate([flush, floor], report.options.runs)
        report.add(name, "us", mine, other, "write-back, called a line", less_is_better=True)


def _bill(report: Report) -> None:
    if not report.options.wanted("metadata"):
        return
    frames = _TERABYTE >> 12
    allocator = _native.frames.Allocator(frames)
    each = float(allocator.bytes_a_frame)
    whole = allocator.metadata_bytes / frames
    linux = [_LINUX_BYTES]
    report.add("metadata, descriptor", "bytes/frame", [each], linux, "Linux", less_is_better=True)
    report.add("metadata, all", "bytes/frame", [whole], linux, "Linux", less_is_better=True)


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, _ = parse_options("frames", arguments, runs=7, seconds=0.5)
    report = Report(options)
    _reload_with_room(arguments)
    peers = _peers()
    _patterns(report, options, peers)
    _opening(report)
    _flushing(report)
    _bill(report)
    if importlib.util.find_spec(_ARRAYS):
        importlib.import_module(_ARRAYS).measure(report)
    report.write(peers.values())


if __name__ == "__main__":
    sys.exit(main())
