"""What counting costs: 4 KiB writes of mode sector with and without it.

What this does not do: judge what is counted; tests do.
"""

from functools import partial
from typing import TYPE_CHECKING

from pmemkit import _native
from pmemkit.bench._arena import sector_pool
from pmemkit.bench._runner import Report, alternate
from pmemkit.media.wear import EVERY_STORES

if TYPE_CHECKING:
    from pmemkit._native.media import Medium

__all__ = ["counting_cases"]

_POOL_SIZE = 256 << 20
_SECTOR_SIZE = 4096
_BLOCK_SIZES = {1: 4096, EVERY_STORES: 16 << 10}
"""Those that an image of this size has when every store is counted, and when some are."""
_THREADS = (1, 2)
_NS_GUESS = 1000
"""Of one write; it only decides how many a run has."""


def counting_cases(report: Report) -> None:
    """By cause alone, and by block too, against writes that are not counted."""
    options = report.options
    for how, every in (("causes", 0), ("sampled", EVERY_STORES), ("exact", 1)):
        for threads in _THREADS:
            name = f"write 4096 threads {threads} counting {how}"
            if not options.wanted(name):
                continue
            medium, channel = sector_pool(_POOL_SIZE, _SECTOR_SIZE)
            if every:
                medium.count_blocks(_BLOCK_SIZES[every], every=every)
            sectors = _native.bench.Sectors.channel(channel)
            count = max(1000, int(options.seconds * 1e9 / _NS_GUESS))
            run = partial(sectors.ns, "write", threads, count)
            sides = [partial(_counted, medium, on, run) for on in (True, False)]
            mine, other = alternate(sides, options.runs)
            report.add(name, "ns", mine, other, "not counted", less_is_better=True)


def _counted(medium: "Medium", on: bool, run: "partial[float]") -> float:
    medium.set_counting(on)
    return run()
