"""Namespace operations on huge images, and the check of a full map against NumPy.

An operation must not cost more on a bigger image than what the format demands: the peer of each is
the same operation on an image of 1 GiB, so a ratio of 1 means "does not grow". The check of a
512 GiB arena is compared with the NumPy scatter that only marks which blocks are used.

What this does not do: judge; docs/evidence does.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmemkit.bench._arena import NOBODY, full_arena
from pmemkit.bench._runner import Report, alternate, parse_options, suite
from pmemkit.bus import bus_record, listing, machine_of, observe
from pmemkit.namespace.check_btt import check_btt
from pmemkit.namespace.create import Wish, create, destroy
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels, labels_listing

__all__ = ["main"]

_GIB = 1 << 30
_LABEL_SIZE = 128 << 10
_SMALL, _BIG = _GIB, 1024 * _GIB
_OPERATIONS = ("create", "list", "read-labels", "destroy", "bytes written", "bytes allocated")
_SECTOR = 4096


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, _ = parse_options("formats", arguments, runs=5, seconds=1.0)
    report = Report(options)
    with tempfile.TemporaryDirectory(prefix="pmemkit-bench-") as scratch:
        if any(options.wanted(f"{name} 1 TiB") for name in _OPERATIONS):
            _operations(report, Path(scratch))
    if options.wanted("check 512 GiB"):
        _check(report)
    report.write()


# --- operations ----------------------------------------------------------------------------------


def _operations(report: Report, scratch: Path) -> None:
    def side(size: int) -> Callable[[], dict[str, float]]:
        return lambda: _life(scratch / f"{size}.img", size)

    big, small = alternate([side(_BIG), side(_SMALL)], report.options.runs)
    for name in _OPERATIONS:
        unit = "bytes" if name.startswith("bytes") else "ms"
        report.add(
            f"{name} 1 TiB",
            unit,
            [each[name] for each in big],
            [each[name] for each in small],
            "the same on 1 GiB",
            less_is_better=True,
        )


def _life(path: Path, size: int) -> dict[str, float]:
    """Makes, lists and destroys a sector namespace over all of a sparse image."""
    with path.open("wb") as image:
        image.truncate(size + _LABEL_SIZE)
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        found[name] = (time.perf_counter() - start) * 1e3
        return result

    def make() -> int:
        with open_images(machine_of([path])) as images:
            create(images, None, Wish(mode="sector"))
            return images.medium(0).stats()["bytes_stored"]

    def remove() -> None:
        with open_images(machine_of([path])) as images:
            destroy(images, "namespace0.0")

    with open_images(machine_of([path], label_size=_LABEL_SIZE)) as images:
        init_labels(images, 0, version=(1, 2))
    found["bytes written"] = timed("create", make)
    timed("list", lambda: listing([bus_record(observe(machine_of([path])))], namespaces=True))
    timed("read-labels", lambda: labels_listing(observe(machine_of([path])).dimms))
    found["bytes allocated"] = path.stat().st_blocks * 512
    timed("destroy", remove)
    path.unlink()
    return found


# --- check ---------------------------------------------------------------------------------------


def _check(report: Report) -> None:
    """A full, randomly permuted map of the largest arena; everything populated before timing."""
    import numpy as np

    with full_arena(_SECTOR) as (medium, arena, entries):

        def ours() -> float:
            start = time.perf_counter()
            found = check_btt(medium, 0, len(medium), parent_uuid=NOBODY, version="2.0")
            elapsed = time.perf_counter() - start
            if found.findings:
                raise AssertionError(f"a good map has findings: {found.findings[0].message}")
            return elapsed

        def scatter() -> float:
            seen = np.zeros(arena.internal_nlba, dtype=bool)
            seen.fill(False)
            start = time.perf_counter()
            seen[entries & 0x3FFFFFFF] = True
            elapsed = time.perf_counter() - start
            if int(seen.sum()) != arena.external_nlba:
                raise AssertionError("the peer marked another number of blocks")
            return elapsed

        mine, peer = alternate([ours, scatter], report.options.runs)
    report.add("check 512 GiB", "s", mine, peer, "NumPy scatter", less_is_better=True)


if __name__ == "__main__":
    raise SystemExit(main())
