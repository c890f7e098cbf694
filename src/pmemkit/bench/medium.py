"""Suite ``medium``: copy and persist against libpmem, and what a call from Python costs.

Both sides run the same loop of the core over the same kind of memory, populated, walking a working
set larger than the cache; only the call in the middle differs. libpmem is told that the memory is
persistent (``PMEM_IS_PMEM_FORCE=1``), so that it flushes cache lines as we do.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from pmemkit import _native
from pmemkit.bench._runner import (
    Options,
    Report,
    alternate,
    parse_options,
    suite,
)
from pmemkit.units import format_size

__all__ = ["main"]

_LIBPMEM = "libpmem.so.1"
_SIZES = (64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
_BYTES_A_SECOND = 2 << 30
"""A guess of the speed of the memory; it only decides how many calls a run has."""
_CALL_NS = 100


def _iterations(length: int, seconds: float) -> int:
    call_seconds = _CALL_NS * 1e-9 + length / _BYTES_A_SECOND
    return max(64, int(seconds / call_seconds))


def _core(report: Report, options: Options) -> None:
    """Our loop against libpmem's, for every call and size."""
    try:
        ctypes.CDLL(_LIBPMEM)
    except OSError as missing:
        print(f"left out: the comparison with libpmem: {missing}")
        return
    for call in ("copy_persist", "persist"):
        for length in _SIZES:
            name = f"{call} {format_size(length)}"
            if not options.wanted(name):
                continue
            count = _iterations(length, options.seconds)
            measure = partial(_native.bench.medium_ns, call, length, count)
            sides = [measure, partial(measure, library=_LIBPMEM)]
            ours, peer = alternate(sides, options.runs)
            report.add(name, "ns", ours, peer, "libpmem", less_is_better=True)


def _python_ns(seconds: float, call: Callable[..., object], *arguments: object) -> float:
    """Nanoseconds of one call, the loop's own share included on both sides."""
    count = 1000
    while True:
        started = time.perf_counter_ns()
        for _ in range(count):
            call(*arguments)
        spent = time.perf_counter_ns() - started
        if spent >= seconds * 1e9:
            return spent / count
        count *= 2


def _from_python(report: Report, options: Options) -> None:
    """Calls of 64 bytes on cache-line media, as a multiple of an empty call of the extension."""
    fd = _native.media.memfd("pmemkit-bench")
    try:
        os.ftruncate(fd, 1 << 20)
        medium = _native.media.map_file(fd, 1 << 20, granularity="cacheline")
    finally:
        os.close(fd)
    medium.zero(0, 1 << 20)
    calls: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
        "python write 64 B": (medium.write, (4096, bytes(64))),
        "python persist 64 B": (medium.persist, (4096, 64)),
        "python load_u64": (medium.load_u64, (4096,)),
    }
    for name, (call, arguments) in calls.items():
        if not options.wanted(name):
            continue
        measure = partial(_python_ns, options.seconds / 4)
        sides = [partial(measure, call, *arguments), partial(measure, _native.nothing)]
        ours, empty = alternate(sides, options.runs)
        record = report.add(name, "ns", ours, empty, "empty call", less_is_better=True)
        print(f"{'':38} {record.ours / record.peer:.1f} empty calls")


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, _ = parse_options("medium", arguments, runs=5, seconds=0.2, quick_seconds=0.02)
    # Read by libpmem when it is loaded, which happens at the first measurement.
    os.environ["PMEM_IS_PMEM_FORCE"] = "1"
    report = Report(options)
    _core(report, options)
    _from_python(report, options)
    report.write([_LIBPMEM])


if __name__ == "__main__":
    sys.exit(main())
