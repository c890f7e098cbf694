"""Suite ``dax``: direct mappings against libpmem, flushing everything, and a bare mmap.

- ``persist`` and ``copy_persist``: a mapping of ours against libpmem, as in suite ``medium``.
- ``python …``: what a call from Python costs more than the same call from Rust, as a multiple of an
  empty call of the extension.
- ``sync``: 1 GiB with 1 % of its pages dirty against writing all of it back.
- ``sparse``: a sparse image of 1 TiB of which 1,000 random pages are stored to; and the memory that
  mapping it takes of ours.
- ``faults``: of mappings that fill themselves, see :mod:`pmemkit.bench._faults`.
- ``file to region``, ``region to region``: see :mod:`pmemkit.bench._copying`.

What this does not do: judge.
"""

import argparse
import ctypes
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pmemkit
from pmemkit import _native
from pmemkit.bench._copying import copying
from pmemkit.bench._faults import measure as faults
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
_CALL_NS = 100
_PAGE = mmap.PAGESIZE
_SYNC_SIZE = 1 << 30
_DIRTY_SHARE = 100
"""One page in this many is dirty."""
_SPARSE_SIZE = 1 << 40
_TOUCHED = 1000


def _iterations(length: int, seconds: float) -> int:
    return max(64, int(seconds / (_CALL_NS * 1e-9 + length / _BYTES_A_SECOND)))


def _core(report: Report, options: Options) -> None:
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
            sides = [partial(measure, mapped=True), partial(measure, library=_LIBPMEM)]
            ours, peer = alternate(sides, options.runs)
            report.add(name, "ns", ours, peer, "libpmem", less_is_better=True)


def _python_ns(seconds: float, call: Callable[..., object], *arguments: object) -> float:
    """Nanoseconds of one call; the loop's own share is in both sides."""
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
    """Calls of 64 bytes in one place, so that both sides find the line in the same state."""
    with (
        pmemkit.open("memfd:1M", granularity="cacheline") as region,
        region.map(tracker="kernel") as mapping,
    ):
        mapping.set_persist(0, 1 << 20, 0)
        cases: dict[str, tuple[str, Callable[..., object], tuple[object, ...]]] = {
            "python copy_persist 64 B": ("copy_persist", mapping.copy_persist, (4096, bytes(64))),
            "python persist 64 B": ("persist_clean", mapping.persist, (4096, 64)),
        }
        for name, (core, call, arguments) in cases.items():
            if not options.wanted(name):
                continue
            count = _iterations(64, options.seconds)

            def extra(
                core: str = core,
                call: Callable[..., object] = call,
                arguments: tuple[object, ...] = arguments,
                count: int = count,
            ) -> float:
                ours = _python_ns(options.seconds / 4, call, *arguments)
                return ours - _native.bench.medium_ns(core, 64, count, working_set=64, mapped=True)

            sides: list[Callable[[], float]] = [
                extra,
                partial(_python_ns, options.seconds / 4, _native.nothing),
            ]
            ours, empty = alternate(sides, options.runs)
            record = report.add(name, "ns", ours, empty, "empty call", less_is_better=True)
            print(f"{'':38} {record.ours / record.peer:.1f} empty calls more than from Rust")


def _sync(report: Report, options: Options) -> None:
    name = "sync 1 GiB, 1 % dirty"
    if not options.wanted(name):
        return
    with (
        pmemkit.open(f"memfd:{_SYNC_SIZE}", granularity="cacheline") as region,
        region.map() as mapping,
    ):
        mapping.set_persist(0, _SYNC_SIZE, 1)
        mapping.sync()
        print(f"{'':38} tracker {mapping.tracker}")
        pages = random.Random(1).sample(
            range(_SYNC_SIZE // _PAGE), _SYNC_SIZE // _PAGE // _DIRTY_SHARE
        )

        def timed(call: Callable[[], object]) -> float:
            with mapping.view() as view:
                for page in pages:
                    view[page * _PAGE] ^= 1
            started = time.perf_counter_ns()
            call()
            spent = time.perf_counter_ns() - started
            mapping.sync()
            return spent / 1e6

        sides = [
            partial(timed, mapping.sync),
            partial(timed, partial(mapping.persist, 0, _SYNC_SIZE)),
        ]
        ours, peer = alternate(sides, options.runs)
        report.add(name, "ms", ours, peer, "flushing it all", less_is_better=True)


def _anonymous_bytes() -> int:
    """Resident memory of this process that no file is behind."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _sparse(report: Report, options: Options, directory: Path) -> None:
    name = "sparse 1 TiB, 1,000 pages"
    if not options.wanted(name):
        return
    places = [
        page * _PAGE for page in random.Random(2).sample(range(_SPARSE_SIZE // _PAGE), _TOUCHED)
    ]
    grown: list[float] = []

    def touch(view: memoryview) -> None:
        for place in places:
            view[place] = 1

    def timed(work: Callable[[Path], None]) -> float:
        path = directory / "sparse.img"
        with path.open("wb") as file:
            file.truncate(_SPARSE_SIZE)
        started = time.perf_counter_ns()
        work(path)
        spent = time.perf_counter_ns() - started
        path.unlink()
        return spent / 1e6

    def ours(path: Path) -> None:
        before = _anonymous_bytes()
        with pmemkit.map(path) as mapping:
            with mapping.view() as view:
                touch(view)
            grown.append(max(_anonymous_bytes() - before, 0) / 1024)

    def bare(path: Path) -> None:
        with (
            path.open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as mapping,
            memoryview(mapping) as view,
        ):
            touch(view)

    found, peer = alternate([partial(timed, ours), partial(timed, bare)], options.runs)
    report.add(name, "ms", found, peer, "bare mmap", less_is_better=True)
    limit = [1024.0] * options.runs
    kib = grown[-options.runs :]
    report.add("memory of ours for it", "KiB", kib, limit, "limit", less_is_better=True)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=Path, help="where the sparse image is made")


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, found = parse_options(
        "dax",
        arguments,
        runs=5,
        seconds=0.2,
        quick_seconds=0.02,
        more=_more,
    )
    # Read by libpmem when it is loaded, which happens at the first measurement.
    os.environ["PMEM_IS_PMEM_FORCE"] = "1"
    report = Report(options)
    _core(report, options)
    _from_python(report, options)
    _sync(report, options)
    with tempfile.TemporaryDirectory(dir=found.directory) as scratch:
        _sparse(report, options, Path(scratch))
    faults(report, options)
    copying(report, options)
    report.write([_LIBPMEM])


if __name__ == "__main__":
    sys.exit(main())
