"""Promotion and demotion: chunks that are used much go to the fast regions of a pool.

    with pool.tiering(rate="512M"):
        work()

A thread looks at a few chunks of 2 MiB at a time, how many of their pages are used within a window
(:mod:`pmemkit.memory.tier_policy` decides from that what moves), and moves them behind their
addresses. Tiers are the regions of one rank; a smaller rank is faster.

Invariants:
1. No access fails and no address changes: what is moved is moved as :meth:`MemoryPool.remove` does.
2. What a program asks for comes first: its migrations wait for one batch of ours, never fail for
   it, and none of ours begins while one of its is under way.
3. What is pinned, fixed or named stays.

What this does not do: see what other processes or devices use, look at providers.
"""

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pmemkit.errors import Busy, Closed, InvalidArgument, NoSpace, PmemError
from pmemkit.memory.tier_policy import Chunk, Move, plan
from pmemkit.units import parse_size

if TYPE_CHECKING:
    from pmemkit.memory.pool import MemoryPool

__all__ = ["Heat", "Tiering"]

Heat = Literal["accesses", "writes"]
_FRAME = 4096
_PLAN_EVERY = 1.0
_WINDOW_MIN = 0.001
_FEW, _MANY = 0.1, 0.5
"""Shares of the pages looked at that should be found in use: between these a window tells hot from
warm; in a longer one everything was used, in a shorter one nothing."""


@dataclass(slots=True)
class _Seen:
    """What the samples of a chunk showed."""

    size: int
    """Bytes in use there."""
    score: float
    region: int
    """Where most of it is."""
    movable: bool
    sweep: int
    """The last that found it."""


class Tiering:
    """Moves what is used much to the fast regions of a pool until it is stopped."""

    def __init__(
        self,
        pool: "MemoryPool",
        *,
        heat: Heat = "accesses",
        interval: float = 0.1,
        chunks: int = 32,
        rate: int | str = 256 << 20,
        decay: float = 0.9,
        hysteresis: float = 0.5,
    ) -> None:
        """``heat``: what counts, all ``accesses`` or ``writes`` only. Every ``interval`` seconds
        ``chunks`` more chunks are looked at. ``rate``: bytes a second that may move. ``decay``: the
        share of its old score that a chunk keeps when it is looked at again. ``hysteresis``: by
        which share a chunk must be hotter than those that make room for it.

        Raises :class:`InvalidArgument` where all regions of the pool have one rank, or for options
        that say nothing, and :class:`NotSupported` where the kernel cannot say what is used.
        """
        if heat not in ("accesses", "writes"):
            raise InvalidArgument(f"heat {heat!r} is none of accesses, writes", op="tiering")
        rate = parse_size(rate) if isinstance(rate, str) else rate
        for name, value, most in (
            ("interval", interval, 3600),
            ("chunks", chunks, 1 << 20),
            ("rate", rate, 1 << 50),
            ("decay", decay, 1),
            ("hysteresis", hysteresis, 1 << 20),
        ):
            if not (0 < value <= most or (value == 0 and name in ("decay", "hysteresis"))):
                raise InvalidArgument(f"{name}={value} is none to tier by", op="tiering")
        self._pool = weakref.ref(pool)
        self.heat, self.interval, self.chunks, self.rate = heat, interval, chunks, rate
        self.decay, self.hysteresis = decay, hysteresis
        self.window = interval / 4
        """Seconds for which a chunk is looked at; found out while it goes."""
        self._known: dict[int, _Seen] = {}
        self._cursor = 0
        self._sweep = 0
        self._began = 0.0
        self._planned = time.monotonic()
        self._counts = dict.fromkeys(
            ("samples", "promoted", "demoted", "refused", "sampling_ns", "moving_ns"), 0
        )
        self._reason: str | None = None
        self._turn = threading.Lock()
        self._paused = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if len(_tiers(self._core.regions())) < 2:
            text = "all regions of the pool have one rank: say latency_ns, distance or rank of each"
            raise InvalidArgument(text, op="tiering", path=", ".join(pool.regions()))
        # What the kernel refuses is heard here and not in a thread.
        self._core.sample_begin(0, 1, heat)
        self._core.sample_end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- the thread -------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begins to work in a thread of its own."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, daemon=True, name="pmemkit tiering")
            self._thread.start()
        return self

    def stop(self) -> None:
        """Ends that; what is moving arrives first."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def running(self) -> bool:
        """True from :meth:`start` to :meth:`stop`, or the end of the pool."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set() and self._pool() is not None:
            try:
                self.begin()
                self._stop.wait(self.window)
                self.end()
                if time.monotonic() - self._planned >= _PLAN_EVERY:
                    self.move()
            except Closed:
                return
            except PmemError as error:
                self._reason = str(error)
            self._stop.wait(max(self.interval - self.window, _WINDOW_MIN))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is moved: waits for what is."""
        with self._turn:
            self._paused += 1
        try:
            yield
        finally:
            with self._turn:
                self._paused -= 1

    # --- looking ----------------------------------------------------------------------------------

    def begin(self) -> int:
        """Begins to look at the next chunks; gives how many."""
        started = time.perf_counter_ns()
        count: int
        count, after = self._core.sample_begin(self._cursor, self.chunks, self.heat)
        if after <= self._cursor or count < self.chunks:
            self._sweep += 1
            self._forget()
        self._cursor = after
        self._counts["sampling_ns"] += time.perf_counter_ns() - started
        self._began = time.monotonic()
        return count

    def end(self) -> None:
        """Ends what :meth:`begin` began, and remembers what it showed."""
        started = time.perf_counter_ns()
        window = max(time.monotonic() - self._began, 1e-6)
        looked = used = 0
        for address, frames, touched, places, held in self._core.sample_end():
            looked, used = looked + frames, used + touched
            before = self._known.get(address)
            kept = self.decay * before.score if before is not None else 0.0
            share = 1.0 if before is None else 1 - self.decay
            score = kept + share * touched / window
            region = max(places, key=lambda place: place[1])[0]
            self._known[address] = _Seen(frames * _FRAME, score, region, not held, self._sweep)
            self._counts["samples"] += 1
        if looked and used < looked * _FEW:
            self.window = min(self.window * 2, self.interval)
        elif used > looked * _MANY:
            self.window = max(self.window / 2, _WINDOW_MIN)
        self._counts["sampling_ns"] += time.perf_counter_ns() - started

    def _forget(self) -> None:
        """Chunks that two sweeps did not find any more."""
        for address in [at for at, each in self._known.items() if each.sweep < self._sweep - 2]:
            del self._known[address]

    # --- moving -----------------------------------------------------------------------------------

    def step(self) -> int:
        """Looks at the next chunks for one window, then moves what is to move; gives the bytes.

        For programs that keep the time themselves, instead of :meth:`start`.
        """
        self.begin()
        time.sleep(self.window)
        self.end()
        return self.move()

    def move(self) -> int:
        """Moves what the samples so far say, as far as the rate allows since the last time; gives
        the bytes. What stands in the way is in :meth:`stat`, and tried again the next time."""
        pool = self._require_pool()
        now = time.monotonic()
        budget = int(self.rate * max(now - self._planned, 1.0))
        self._planned = now
        self._reason = None
        moved = 0
        with self._turn:
            if self._paused:
                return 0
            started = time.perf_counter_ns()
            try:
                tiers = _tiers(self._core.regions())
                for fast, slow in itertools.pairwise(tiers):
                    moved += self._move_between(pool, fast, slow, budget - moved)
            except (NoSpace, Busy) as error:
                self._counts["refused"] += 1
                self._reason = str(error)
            self._counts["moving_ns"] += time.perf_counter_ns() - started
        return moved

    def _move_between(self, pool: "MemoryPool", fast: set[int], slow: set[int], budget: int) -> int:
        chunks = [
            Chunk(address, each.size, each.score, each.region in fast, each.movable)
            for address, each in self._known.items()
            if each.region in fast or each.region in slow
        ]
        free_slow = sum(self._room(slow).values())
        moves = plan(
            chunks,
            free_fast=sum(self._room(fast).values()),
            free_slow=free_slow,
            budget=budget,
            hysteresis=self.hysteresis,
        )
        moved = 0
        for batch in _batches(moves, free_slow):
            regions, count = (fast, "promoted") if batch[0].to_fast else (slow, "demoted")
            moved += self._carry_out(pool, batch, regions, count)
        return moved

    def _room(self, regions: set[int]) -> dict[int, int]:
        return {each["id"]: each["free"] for each in self._core.regions() if each["id"] in regions}

    def _carry_out(
        self, pool: "MemoryPool", batch: list[Move], regions: set[int], count: str
    ) -> int:
        """Moves a batch into the regions of a tier, the emptiest first."""
        moved = 0
        while batch:
            room = self._room(regions)
            into = max(room, key=lambda each: room[each], default=-1)
            part: list[Move] = []
            left = room.get(into, 0)
            while batch and batch[0].size <= left:
                part.append(batch.pop(0))
                left -= part[-1].size
            if not part:
                raise NoSpace(f"no room for {batch[0].size} bytes", op="tiering")
            ranges = [(each.address, each.address + _chunk_size()) for each in part]
            done = pool._move_ranges(ranges, into)
            for each in part:
                self._known[each.address].region = into
            self._counts[count] += done.bytes
            moved += done.bytes
        return moved

    # --- what is there ----------------------------------------------------------------------------

    def stat(self) -> dict[str, Any]:
        """What it did so far; plain data. Bytes, and nanoseconds in names that end in ``ns``."""
        return {
            "running": self.running,
            "heat": self.heat,
            "window_ns": round(self.window * 1e9),
            "chunks_known": len(self._known),
            "sweeps": self._sweep,
            **self._counts,
            "reason": self._reason,
        }

    def _require_pool(self) -> "MemoryPool":
        pool = self._pool()
        if pool is None:
            raise Closed("the pool is gone", op="tiering")
        return pool

    @property
    def _core(self) -> Any:
        return self._require_pool()._core


def _chunk_size() -> int:
    from pmemkit._native import memory

    return memory.SAMPLE_CHUNK


def _tiers(regions: list[dict[str, Any]]) -> list[set[int]]:
    """Regions by rank, the fastest first."""
    by_rank: dict[int, set[int]] = {}
    for region in regions:
        by_rank.setdefault(region["rank"], set()).add(region["id"])
    return [by_rank[rank] for rank in sorted(by_rank)]


def _batches(moves: list[Move], free_slow: int) -> Iterator[list[Move]]:
    """Moves of one direction each. All that goes down goes first where there is room for it."""
    down = [each for each in moves if not each.to_fast]
    if sum(each.size for each in down) <= free_slow:
        moves = down + [each for each in moves if each.to_fast]
    batch: list[Move] = []
    for each in moves:
        if batch and batch[0].to_fast != each.to_fast:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch
