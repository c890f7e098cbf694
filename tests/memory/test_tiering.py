"""Promotion and demotion by sampled use: what is hot goes up, bytes and addresses stay."""

import os
import threading
import time

import numpy as np
import pytest

from pmemkit import MemoryPool, RegionSpec
from pmemkit.errors import InvalidArgument, NotSupported

MIB = 1 << 20
FAST = RegionSpec("anonymous:16M", "fast", latency_ns=100)
SLOW = RegionSpec("anonymous:64M", "slow", latency_ns=400)


def make_pool() -> MemoryPool:
    return MemoryPool([FAST, SLOW], block_size="8M")


def fast_chunks(pool: MemoryPool, array: np.ndarray) -> set[int]:
    """Which chunks of 2 MiB of an array lie in the fast region."""
    found: set[int] = set()
    for extent in pool.map():
        if extent["address"] != array.ctypes.data:
            continue
        at = 0
        for piece in extent["pieces"]:
            end = at + piece["frames"] * 4096
            if piece["region"] == "fast":
                found |= set(range(at // (2 * MIB), -(-end // (2 * MIB))))
            at = end
    return found


def use(part: np.ndarray, seconds: float, *, write: bool) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if write:
            part[::4096] += 1
        else:
            part[::4096].sum()


def drive(tiering, part: np.ndarray, *, write: bool, until, most: float = 20) -> None:
    """Uses a part in one thread while this one samples and moves."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            use(part, 0.02, write=write)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        end = time.monotonic() + most
        while not until() and time.monotonic() < end:
            tiering.step()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("heat", ["accesses", "writes"])
def test_what_is_used_takes_the_place_of_what_is_not(heat):
    with make_pool() as pool:
        cold, data = pool.empty(15 * MIB, "u1"), pool.empty(40 * MIB, "u1")
        cold[:], data[:] = 7, 9
        before = data.ctypes.data
        assert len(fast_chunks(pool, cold)) == 8
        try:
            tiering = pool.tiering(heat=heat, interval=0.02, chunks=64)
        except NotSupported as missing:
            pytest.skip(str(missing))
        hot = data[20 * MIB : 28 * MIB]
        wanted = {10, 11, 12, 13}
        drive(tiering, hot, write=heat == "writes", until=lambda: wanted <= fast_chunks(pool, data))
        assert wanted <= fast_chunks(pool, data)
        assert len(fast_chunks(pool, cold)) < 8
        assert data.ctypes.data == before
        assert (cold == 7).all()
        assert (data[: 20 * MIB] == 9).all()
        shown = pool.stat()["tiering"]
        assert shown["promoted"] >= 8 * MIB
        assert shown["demoted"] > 0
        assert not shown["running"]
        assert pool.validate() == []
        tiering.stop()


def test_nothing_is_lost_under_writers_and_a_program_comes_first():
    with make_pool() as pool:
        arrays = [pool.zeros(2 * MIB // 8, "u8") for _ in range(20)]
        stop = threading.Event()
        written = [0] * 2

        def write(which: int) -> None:
            while not stop.is_set():
                for each in arrays[which::2]:
                    each += 1
                written[which] += 1

        threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        try:
            with pool.tiering(interval=0.01, chunks=64, hysteresis=0) as tiering:
                end = time.monotonic() + 4
                while time.monotonic() < end:
                    pool.migrate([arrays[0]], "slow", timeout=30)
                    time.sleep(0.05)
                assert tiering.running
            assert not tiering.running
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for which in range(2):
            assert all((each == written[which]).all() for each in arrays[which::2])
        assert pool.stat()["tiering"]["samples"] > 0
        assert pool.validate() == []


def test_what_is_pinned_or_fixed_stays():
    with make_pool() as pool:
        fixed = pool.alloc(15 * MIB, movable=False)
        data = pool.zeros(8 * MIB, "u1")
        tiering = pool.tiering(interval=0.02, chunks=64)
        with pool.pin(data):
            drive(tiering, data, write=True, until=lambda: False, most=3)
        counts = tiering.stat()
        assert counts["samples"] > 0
        assert counts["promoted"] == counts["demoted"] == 0
        del fixed


def test_after_a_fork_nothing_moves_until_the_children_are_forgotten():
    with make_pool() as pool:
        filler, data = pool.zeros(15 * MIB, "u1"), pool.zeros(8 * MIB, "u1")
        tiering = pool.tiering(interval=0.02, chunks=64)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            drive(tiering, data, write=True, until=lambda: tiering.stat()["refused"] > 0, most=20)
            assert "forget_children" in tiering.stat()["reason"]
            assert tiering.stat()["promoted"] == 0
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
        pool.forget_children()
        drive(tiering, data, write=True, until=lambda: tiering.stat()["promoted"] > 0)
        assert tiering.stat()["promoted"] > 0
        assert (filler == 0).all()


def test_options_that_say_nothing_and_pools_of_one_tier_are_refused():
    with MemoryPool(["anonymous:8M", "anonymous:8M"], block_size="8M") as flat:
        with pytest.raises(InvalidArgument, match="one rank"):
            flat.tiering()
        assert flat.stat()["tiering"] is None
    with make_pool() as pool:
        for wrong in (
            {"heat": "warmth"},
            {"interval": 0},
            {"chunks": -1},
            {"rate": 0},
            {"decay": 1.5},
            {"hysteresis": float("nan")},
        ):
            with pytest.raises(InvalidArgument, match=next(iter(wrong))):
                pool.tiering(**wrong)
