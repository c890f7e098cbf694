"""Wear levelling of mode sector: how long the media last, and what it costs.

Lifetimes come from the engine itself on media that have counters in place of bytes: how much is
written until the first block has reached its rating, as a share of what all blocks take (the
ideal). A rating of ten periods is a hard case: what levelling leaves uneven is about a period, and
real media are rated at 10 thousand writes and more. Lines of the metadata are counted beside it:
log and map have their place, whatever the blocks do.

The trace is that of suite ``cache``. Its blocks move together in their order, so that the arena
has room for what the trace touches, and no more.

What this does not do: bytes, several writers, wear of the media's own levelling.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pmemkit import _native
from pmemkit.bench._arena import NOBODY, sector_pool
from pmemkit.bench._blocks import BLOCK, read_csv
from pmemkit.bench._runner import Options, Report, alternate
from pmemkit.formats import btt
from pmemkit.storage.levelling import LEVELLING_PERIOD, LEVELLINGS, Levelling
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit._native.block import Channel
    from pmemkit._native.media import Medium
    from pmemkit.storage.sector import Sectors as Opened

__all__ = ["Lifetime", "arenas_for", "levelling_cases", "lifetime"]

RATING = 10 * LEVELLING_PERIOD
_HAMMERED = 7
_SEED = 1
_ARENAS = (16 << 20, 64 << 20, 256 << 20)
_POOL_SIZE = 256 << 20
_NS_GUESS = 1500
"""Of one write; it only decides how many a run has."""
_LOG_WRITES, _MAP_WRITES = 2, 1
"""Lines of the log and of the map that a write makes durable: both words of a log entry, and the
map entry."""

Numbers = tuple[int, int, int, int, int, int, int, int, int, bool]


class Lifetime(NamedTuple):
    """What became of media."""

    writes: int
    ideal: int
    relocations: int
    limits: dict[tuple[int, str], int | None]
    """Writes until the first line of so many bytes of ``map`` or ``log`` was worn out."""

    @property
    def share(self) -> float:
        """Percent of the ideal."""
        return 100 * self.writes / self.ideal

    @property
    def extra(self) -> float:
        """Percent of the writes that levelling added."""
        return 100 * self.relocations / self.writes

    def first_line(self, size: int, *areas: str) -> float:
        """Percent of the ideal until the first line of this size was worn out."""
        reached = [self.limits[size, area] for area in areas]
        return 100 * min(self.writes if each is None else each for each in reached) / self.ideal


def arenas_for(sectors: int, size: int | None = None) -> list[Numbers]:
    """Arenas of 4 KiB sectors, all of ``size`` bytes or one that has just room."""
    if size is None:
        size = (sectors + btt.LANES) * (BLOCK + 4) + (1 << 20)
        size = max(-(-size // BLOCK) * BLOCK, btt.ARENA_SIZE_MIN)
    (arena,) = btt.arenas(size, BLOCK, "2.0")
    found = []
    for number in range(-(-sectors // arena.external_nlba)):
        places = (arena.dataoff, arena.mapoff, arena.logoff, False)
        sizes = (BLOCK, arena.external_nlba, BLOCK, arena.internal_nlba, btt.LANES)
        found.append((number * size, *sizes, *places))
    return found


def lifetime(
    arenas: Sequence[Numbers],
    workload: Sequence[int],
    levelling: Levelling,
    *,
    rating: int = RATING,
    period: int = LEVELLING_PERIOD,
) -> Lifetime:
    """Writes the sectors of a workload again and again until a block has reached its rating."""
    import numpy as np

    writes, ideal, moved, worn_out, limits, _ = _native.bench.lifetime(
        arenas,
        np.asarray(workload, "<u4").tobytes(),
        rating,
        levelling=None if levelling == "off" else (levelling, period, _SEED),
    )
    if not worn_out:
        raise AssertionError("the workload came to an end")
    return Lifetime(writes, ideal, moved, {(size, area): at for size, area, at in limits})


# --- lifetimes ------------------------------------------------------------------------------------


def _lives(report: Report, name: str, arenas: Sequence[Numbers], workload: Sequence[int]) -> None:
    """Unlevelled, and both ways of levelling."""
    if not report.options.wanted(f"lifetime {name}"):
        return
    plain = lifetime(arenas, workload, "off")
    levelled = {victim: lifetime(arenas, workload, victim) for victim in LEVELLINGS[1:]}
    for victim, lived in levelled.items():
        title = f"lifetime {name} {victim}"
        report.add(title, "% of ideal", [lived.share], [plain.share], "unlevelled")
        budget = [100 / LEVELLING_PERIOD]
        extra = f"extra writes {name} {victim}"
        report.add(extra, "%", [lived.extra], budget, "budget", less_is_better=True)
    lived = levelled["least-worn"]
    blocks = lived.ideal / RATING
    for size in (64, 256):
        lines = len(arenas) * btt.LANES * btt.LOG_GROUP_SIZE / size
        perfect = 100 * lines / _LOG_WRITES / blocks
        first = f"first log line {size} B {name}"
        report.add(first, "% of ideal", [lived.first_line(size, "log")], [perfect], "even lanes")
        first, both = f"first line {size} B {name}", ("map", "log")
        least = plain.first_line(size, *both)
        report.add(first, "% of ideal", [lived.first_line(size, *both)], [least], "unlevelled")


def _small_arenas(report: Report, workload: Sequence[int]) -> None:
    """What smaller arenas do to data and log: more logs, and nobody levels across arenas."""
    sectors = max(workload) + 1
    for size in _ARENAS:
        name = f"trace in arenas of {format_size(size)}"
        if report.options.wanted(name):
            lived = lifetime(arenas_for(sectors, size), workload, "least-worn")
            log = lived.first_line(64, "log")
            report.add(name, "% of ideal", [lived.share], [log], "first log line 64 B")


def _log_limit(report: Report) -> None:
    """Where the log, evenly used, lasts as long as the data: worked out, not measured."""
    for size in (64, 256):
        lines = btt.LANES * btt.LOG_GROUP_SIZE // size
        arena = lines // _LOG_WRITES * BLOCK / (1 << 20)
        name = f"log lasts as the data {size} B"
        report.add(name, "MiB arena", [arena], [btt.ARENA_SIZE_MIN / (1 << 20)], "least arena")
        # Below media that spread all lines evenly, each write costs its data and these lines.
        spread = 100 * BLOCK / (BLOCK + (_LOG_WRITES + _MAP_WRITES) * size)
        name = f"levelling media {size} B"
        report.add(name, "% of ideal", [spread], [100.0], "no metadata")


# --- throughput -----------------------------------------------------------------------------------


def _opened(medium: "Medium", levelling: Levelling) -> "tuple[Opened, Channel]":
    from pmemkit.storage.sector import open_sectors

    opened = open_sectors(medium, version=(2, 0), parent_uuid=NOBODY, levelling=levelling)
    return opened, opened.device().channel()


def _throughput(report: Report, options: Options) -> None:
    """On the same memory, opened anew for each run: elsewhere it might be slower or faster. Random
    writes wear evenly, so that least-worn moves nothing there and shows what counting costs; what
    was moved is a record of its own."""
    count = max(1000, int(options.seconds * 1e9 / _NS_GUESS))
    names = {
        f"write 4096 {victim} threads {threads}": (victim, threads)
        for victim in LEVELLINGS[1:]
        for threads in (1, 2)
    }
    wanted = {name: case for name, case in names.items() if options.wanted(name)}
    medium = sector_pool(_POOL_SIZE, BLOCK)[0] if wanted else None
    for name, (victim, threads) in wanted.items():
        moved: list[float] = []

        def timed(
            levelling: Levelling, threads: int = threads, moved: list[float] = moved
        ) -> float:
            assert medium is not None
            opened, channel = _opened(medium, levelling)
            ns = _native.bench.Sectors.channel(channel).ns("write", threads, count)
            if levelling != "off":
                moved.append(100 * opened.relocations() / (threads * count))
            return ns

        ours, other = alternate([partial(timed, victim), partial(timed, "off")], options.runs)
        report.add(name, "ns", ours, other, "unlevelled", less_is_better=True)
        budget = [100 / LEVELLING_PERIOD]
        report.add(f"moved in {name}", "%", moved, budget, "budget", less_is_better=True)


def levelling_cases(report: Report, trace: Path | None) -> None:
    """Every case; those of a recorded trace only with one."""
    _lives(report, "hammer", arenas_for(1, btt.ARENA_SIZE_MIN), [_HAMMERED])
    _log_limit(report)
    if trace is None:
        print("left out: lifetimes on a recorded trace: name one with --trace or PMEMKIT_TRACE")
    else:
        import numpy as np

        uses = read_csv(trace)
        names, places = np.unique(uses["block"], return_inverse=True)
        writes = places[uses["write"] != 0]
        _lives(report, "trace", arenas_for(len(names)), writes)
        _small_arenas(report, writes)
    _throughput(report, report.options)
