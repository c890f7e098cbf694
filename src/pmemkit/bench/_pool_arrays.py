"""NumPy arrays of a pool against NumPy on memory that was mapped plainly; what moving them costs.

Peers are shared memory in pages of 4 KiB and hugetlb. Each pool is made of memory of the same kind.
Huge pages are set aside for the time of the measurement where this process may do that, and are the
machine's own (``vm.nr_hugepages``) where it may not. The copy that migration is compared with is
one between two ranges of shared memory, beside the same four writers, in the chunks in which
migration copies.

What this does not do: place writers on CPUs.
"""

import contextlib
import functools
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmemkit.bench._runner import Report, alternate
from pmemkit.memory import MemoryPool, RegionSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["measure"]

_MIB = 1 << 20
_CHUNK = 2 * _MIB
_WRITERS = 4
_HUGETLB = 0x40000
_NR_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def measure(report: Report) -> None:
    """Adds the records of arrays and of migration."""
    size = (32 if report.options.quick else 128) * _MIB
    if report.options.wanted("arrays 4 KiB"):
        _arrays(report, "4 KiB", size)
    if report.options.wanted("arrays hugetlb"):
        # The pool's region and three arrays of the peer.
        count = 7 * size // _CHUNK
        with _huge_pages(count) as there:
            if there:
                _arrays(report, "hugetlb", size)
            else:
                print(f"left out: hugetlb: vm.nr_hugepages has no {count} free pages")
    if report.options.wanted("migration"):
        _migration(report, size)


@contextlib.contextmanager
def _huge_pages(count: int) -> Iterator[bool]:
    """Inside, so many huge pages are free, if it says so; there are as many as before after it."""
    try:
        before = _NR_HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        # A kernel without them.
        yield False
        return
    with contextlib.suppress(OSError):
        _NR_HUGE_PAGES.write_text(f"{int(before) + count}\n", encoding="ascii")
    try:
        yield _are_free(count)
    finally:
        with contextlib.suppress(OSError):
            _NR_HUGE_PAGES.write_text(before, encoding="ascii")


def _are_free(count: int) -> bool:
    try:
        mmap.mmap(-1, count * _CHUNK, mmap.MAP_SHARED | _HUGETLB).close()
    except OSError:
        return False
    return True


def _plain(kind: str, size: int) -> "Array":
    """Memory of this kind without a pool."""
    import numpy as np

    flags = mmap.MAP_SHARED | (_HUGETLB if kind == "hugetlb" else 0)
    return np.frombuffer(mmap.mmap(-1, size, flags), "f8")


def _arrays(report: Report, kind: str, size: int) -> None:
    import numpy as np

    spec = f"{'hugetlb' if kind == 'hugetlb' else 'anonymous'}:{4 * size}"
    runs = report.options.runs
    where = np.random.default_rng(1).integers(0, size // 8, size // 64)

    def first_touch_of_pool() -> float:
        with MemoryPool([spec], block_size=size) as pool:
            return _rate(size, pool.empty(size // 8).fill, 1.0)

    ours, peer = alternate(
        [first_touch_of_pool, lambda: _rate(size, _plain(kind, size).fill, 1.0)], runs
    )
    report.add(f"arrays {kind} first touch", "GB/s", ours, peer, "mmap")
    with MemoryPool([spec], block_size=size) as pool:
        sides = [
            [pool.full(size // 8, value) for value in (1.0, 2.0, 0.0)],
            [_plain(kind, size) for _ in range(3)],
        ]
        for value, array in enumerate(sides[1]):
            array.fill(value)
        out = np.empty(len(where))

        def stream(arrays: "list[Array]") -> float:
            return _rate(3 * size, np.add, arrays[0], arrays[1], arrays[2])

        def gather(arrays: "list[Array]") -> float:
            return _rate(len(where), np.take, arrays[0], where, None, out, "clip") * 1e3

        for name, unit, work in (("stream", "GB/s", stream), ("gather", "M/s", gather)):
            ours, peer = alternate([functools.partial(work, each) for each in sides], runs)
            report.add(f"arrays {kind} {name}", unit, ours, peer, "mmap")
        sides.clear()


def _rate(amount: int, work: Callable[..., object], *arguments: object) -> float:
    """Billions a second."""
    started = time.perf_counter()
    work(*arguments)
    return amount / (time.perf_counter() - started) / 1e9


@contextlib.contextmanager
def _writers(arrays: "list[Array]") -> Iterator[None]:
    """Threads that store to these arrays all the time."""
    import numpy as np

    stop = threading.Event()

    def write(first: int) -> None:
        one = np.uint64(1)
        while not stop.is_set():
            for array in arrays[first::_WRITERS]:
                np.add(array, one, out=array)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(_WRITERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _migration(report: Report, size: int) -> None:
    """A region leaves and comes back; 70 % of both are arrays that threads store to."""
    import numpy as np

    small = RegionSpec(f"anonymous:{size}", "small")
    with MemoryPool([small, f"anonymous:{4 * size}"], block_size=size // 2) as pool:
        large = pool.regions()[1]
        count = size * 7 // 10 // (4 * _MIB)
        moving = [pool.zeros(4 * _MIB // 8, "u8", region="small") for _ in range(count)]
        others = [pool.zeros(4 * _MIB // 8, "u8", region=large) for _ in range(3 * count)]
        source, target = (_plain("4 KiB", count * 4 * _MIB).view("u1") for _ in range(2))

        def leave() -> float:
            rate = pool.remove("small").bytes_per_second
            pool.add(small)
            pool.migrate(moving, "small")
            return rate / 1e9

        def copy() -> float:
            started = time.perf_counter()
            for at in range(0, len(source), _CHUNK):
                np.copyto(target[at : at + _CHUNK], source[at : at + _CHUNK])
            return len(source) / (time.perf_counter() - started) / 1e9

        for array in (source, target):
            array.fill(1)
        with _writers([*moving, *others]):
            ours, peer = alternate([leave, copy], max(report.options.runs, 5))
        report.add("migration beside 4 writers", "GB/s", ours, peer, "copy beside them")
        ours, peer = alternate([leave, copy], max(report.options.runs, 5))
        report.add("migration alone", "GB/s", ours, peer, "copy alone")
        waited = [pool.stat()["hold_ns_peak"] / 1e6]
        report.add("migration longest wait", "ms", waited, [0.0], "none", less_is_better=True)
