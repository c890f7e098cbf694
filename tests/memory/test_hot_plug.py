"""Regions come and go under live arrays: nothing is lost, torn or elsewhere."""

import errno
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pool_fire import Fire

from pmemkit import MemoryPool, RegionSpec
from pmemkit.errors import Busy, NoSpace

MIB = 1 << 20


def addresses(arrays) -> list[int]:
    return [array.ctypes.data for array in arrays]


def regions_of(pool: MemoryPool, array) -> set[str]:
    entry = next(each for each in pool.map() if each["address"] == array.ctypes.data)
    return {piece["region"] for piece in entry["pieces"]}


def spec(kind: str, name: str, size: int, folder) -> RegionSpec:
    if kind != "file":
        return RegionSpec(f"anonymous:{size}", name)
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return RegionSpec(path, name)


@pytest.mark.parametrize("kind", ["userfaultfd", "signal", "file"])
def test_hot_remove_under_fire(kind, tmp_path, scale):
    small, large = (spec(kind, name, size * MIB, tmp_path) for name, size in (("a", 32), ("b", 96)))
    catch = "signal" if kind == "signal" else "best"
    with MemoryPool([small, large], block_size="8M", catch_with=catch) as pool:
        writers = {region["writers"] for region in pool.stat()["regions"]}
        assert writers <= ({"signal"} if kind != "userfaultfd" else {"userfaultfd", "signal"})
        in_small = [pool.empty(size, "u8", region="a") for size in (MIB // 8, 3 * MIB // 8) * 5]
        in_small += [pool.empty(256 * 1024, "u8", region="a")]
        in_large = [pool.empty(MIB // 2 + 511, "u8", region="b") for _ in range(16)]
        arrays = in_small + in_large
        used = {
            region["name"]: region["size"] - region["free"] for region in pool.stat()["regions"]
        }
        assert used["a"] >= 0.6 * 32 * MIB
        assert used["b"] >= 0.65 * 96 * MIB
        before = addresses(arrays)
        with Fire(arrays) as fire:
            for _ in range(scale(3, 20)):
                assert pool.remove("a").bytes >= used["a"]
                assert pool.regions() == ["b"]
                assert pool.add(small) == "a"
                assert pool.migrate(in_small, "a").extents == len(in_small)
                assert addresses(arrays) == before
                assert pool.validate() == []
        assert all(regions_of(pool, each) == {"a"} for each in in_small)
        assert fire.rounds > 0
        del in_small, in_large, arrays, fire
        assert pool.stat()["used"] == 0
        assert pool.stat()["ghost_windows"] == 0


def test_kernel_stores_are_caught_too_where_it_says_so(tmp_path):
    """read(2) into an array that moves: userfaultfd makes it wait, in the gate nothing moves."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 * MIB))
    wanted = np.frombuffer(path.read_bytes(), "u1")
    for catch in ("best", "signal"):
        regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
        with MemoryPool(regions, block_size="8M", catch_with=catch) as pool:
            array = pool.zeros(4 * MIB, "u1", region="a")
            gated = pool.stat()["regions"][0]["writers"] != "userfaultfd"
            failed, stop = [], threading.Event()

            def read(array=array, gated=gated, pool=pool, failed=failed, stop=stop) -> None:
                with path.open("rb", buffering=0) as file:
                    while not stop.is_set():
                        file.seek(0)
                        array[:] = 0
                        if gated:
                            with pool.writing():
                                count = file.readinto(memoryview(array))
                        else:
                            count = file.readinto(memoryview(array))
                        if count != 4 * MIB or not (array == wanted).all():
                            failed.append(count)
                            return

            reader = threading.Thread(target=read)
            reader.start()
            for target in ("b", "a") * 4:
                pool.migrate([array], target)
            stop.set()
            reader.join()
            assert failed == []


def test_a_timeout_and_a_closed_gate_leave_everything_as_it_was():
    regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        array = pool.full(MIB, 7, "u1", region="a")
        with pool.writing():
            with pytest.raises(Busy, match="inside the gate") as refused:
                pool.remove("a", timeout=0.1)
            assert refused.value.errno == errno.ETIMEDOUT
        with pytest.raises(Busy, match="time is over"):
            pool.remove("a", timeout=0)
        assert_as_before(pool, [array], "a")
        pool.remove("a", timeout=30)
        assert (array == 7).all()


def assert_as_before(pool: MemoryPool, arrays, region: str) -> None:
    assert all(regions_of(pool, each) == {region} for each in arrays)
    assert all(b["state"] == "online" for r in pool.stat()["regions"] for b in r["blocks"])
    assert pool.validate() == []
    assert pool.migrations() == {}


@pytest.mark.parametrize("stop_at", [0, 1, 5, 9])
def test_a_cancelled_removal_puts_everything_back(stop_at):
    regions = [RegionSpec("anonymous:32M", "a"), RegionSpec("anonymous:64M", "b")]
    with MemoryPool(regions, block_size="8M", progress_every=0) as pool:
        arrays = [pool.empty(3 * MIB // 8, "u8", region="a") for _ in range(9)]
        free = pool.stat()["regions"][1]["free"]
        told = []

        def progress(moved: int, total: int) -> bool:
            told.append((moved, total))
            return moved < stop_at * 3 * MIB

        with Fire(arrays, 2):
            with pytest.raises(Busy, match="cancelled") as refused:
                pool.remove("a", progress=progress)
            assert refused.value.errno == errno.ECANCELED
            assert_as_before(pool, arrays, "a")
            assert pool.stat()["regions"][1]["free"] == free
        assert told[0] == (0, 27 * MIB)
        assert stop_at * 3 * MIB <= told[-1][0] < (stop_at + 1) * 3 * MIB


def test_a_removal_can_be_cancelled_from_elsewhere_and_by_an_exception():
    regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        array = pool.full(MIB, 7, "u1", region="a")
        with pytest.raises(Busy, match="cancelled"):
            pool.remove("a", progress=lambda *_: pool.cancel("a"))

        def raises(*_: int) -> None:
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            pool.remove("a", progress=raises)
        assert_as_before(pool, [array], "a")


def test_removals_that_cannot_succeed_say_why_in_bounded_time():
    regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        arrays = [pool.empty(MIB // 8, "u8", region="a") for _ in range(12)]
        filler = pool.empty(10 * MIB, "u1", region="b")
        with Fire(arrays, 2):
            started = time.monotonic()
            with pytest.raises(NoSpace, match="no room: 12582912 bytes would have to move"):
                pool.remove("a", timeout=20)
            assert_as_before(pool, arrays, "a")
            del filler
            with pool.pin(arrays[3]), pytest.raises(Busy, match="pinned"):
                pool.remove("a", timeout=20)
            assert_as_before(pool, arrays, "a")
            assert time.monotonic() - started < 20
        fixed = pool.zeros(10, region="a", movable=False)
        with pytest.raises(Busy, match=r"1 extents cannot move: .*is fixed"):
            pool.remove("a", timeout=20)
        del fixed
        pool.remove("a", timeout=60)


def test_a_pinned_extent_moves_when_it_is_let_go():
    regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        array = pool.full(MIB, 7, "u1", region="a")
        with pool.pin(array, array[5:]), pytest.raises(Busy, match="pinned"):
            pool.migrate([array], "b")
        pool.migrate([array], "b")
        assert regions_of(pool, array) == {"b"}


def test_arrays_that_die_while_they_move():
    regions = [RegionSpec("anonymous:32M", "a"), RegionSpec("anonymous:64M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        kept = pool.full(3 * MIB, 5, "u1", region="a")
        arrays = [pool.empty(3 * MIB, "u1", region="a") for _ in range(9)]
        pool.remove("a", progress=lambda *_: arrays.clear())
        assert (kept == 5).all()
        assert pool.stat()["used"] == 3 * MIB
        assert pool.validate() == []
        del kept
        assert pool.stat()["ghost_windows"] == 0


def test_blocks_go_offline_and_online():
    with MemoryPool(["anonymous:32M"], block_size="8M") as pool:
        (region,) = pool.regions()
        arrays = [pool.full(3 * MIB, index, "u1") for index in range(5)]
        pool.offline(region, 0, 2)
        blocks = pool.stat()["regions"][0]["blocks"]
        assert [block["state"] for block in blocks] == ["offline"] * 2 + ["online"] * 2
        assert [block["used"] for block in blocks[:2]] == [0, 0]
        assert all((array == index).all() for index, array in enumerate(arrays))
        with pytest.raises(NoSpace):
            pool.empty(4 * MIB, "u1")
        with pytest.raises(NoSpace, match="no room"):
            pool.offline(region, 2, 1)
        pool.online(region, 0, 2)
        assert pool.stat()["regions"][0]["free"] == 17 * MIB
        more = pool.full(12 * MIB, 9, "u1")
        assert all((array == index).all() for index, array in enumerate(arrays))
        assert (more == 9).all()
        del arrays[1::2]
        pool.offline(region, 0)
        assert all((array == 2 * index).all() for index, array in enumerate(arrays))
        assert pool.validate() == []


def test_small_objects_and_numpys_own_memory_move_as_well():
    regions = [RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:16M", "b")]
    with MemoryPool(regions, block_size="8M") as pool:
        with pool.numpy():
            small = [np.full(size, size, "u2") for size in range(1, 2000, 13)]
        pool.remove("a")
        assert all((array == len(array)).all() for array in small)
        with pool.numpy():
            small += [np.full(size, size, "u2") for size in range(1, 2000, 13)]
        assert all((array == len(array)).all() for array in small)
        assert pool.validate() == []
        del small
        assert pool.stat()["small_objects"] == 0


def test_an_array_may_visit_every_region_and_come_back():
    names = ["a", "b", "c"]
    pool = MemoryPool([RegionSpec("anonymous:16M", name) for name in names], block_size="8M")
    rng = np.random.default_rng(7)
    arrays = {index: pool.full(MIB // 2, index, "u2") for index in range(12)}
    for _ in range(120):
        index = int(rng.integers(12))
        match rng.integers(4):
            case 0 if index in arrays:
                del arrays[index]
            case 0 | 1:
                arrays[index] = pool.full(int(rng.integers(10000, MIB)), index, "u2")
            case _ if index in arrays:
                pool.migrate([arrays[index]], names[int(rng.integers(3))])
        assert all((array == index).all() for index, array in arrays.items())
        assert pool.validate() == []
    arrays.clear()
    assert (pool.stat()["used"], pool.stat()["ghost_windows"]) == (0, 0)
    pool.close()


def test_the_limit_of_mappings_is_told_and_leaves_everything_as_it_was():
    text = """
import ctypes, mmap, sys
import numpy as np
from pmemkit import MemoryPool, RegionSpec
from pmemkit._native import memory
from pmemkit.errors import NoSpace
pool = MemoryPool([RegionSpec("anonymous:16M", "a"), RegionSpec("anonymous:64M", "b")],
                  block_size="8M")
arrays = [pool.full(1 << 20, index, "u1", region="a") for index in range(12)]
limit = memory.mapping_counts()[1]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# Pages that are protected in turns are mappings of their own.
base = libc.mmap(None, 4096 * 2 * limit, 0, 0x22, -1, 0)
at = base
while libc.mprotect(at, 4096, 1) == 0:
    at += 8192
try:
    pool.remove("a", timeout=20)
except NoSpace as refused:
    assert "mapping-count limit" in str(refused), refused
    assert str(limit) in str(refused)
else:
    sys.exit("removed in spite of it")
assert pool.validate() == []
assert all((array == index).all() for index, array in enumerate(arrays))
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munmap(base, 4096 * 2 * limit)
pool.remove("a", timeout=20)
assert all((array == index).all() for index, array in enumerate(arrays))
print("good")
"""
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.stdout, done.returncode) == ("good\n", 0), done.stderr


def test_large_pages_of_the_kernel(huge_pages):
    huge_pages(2)
    with MemoryPool([RegionSpec("hugetlb:2M", "huge")], block_size="2M") as pool:
        array = pool.full(MIB, 3, "u1")
        pool.add(RegionSpec("anonymous:4M", "small"))
        pool.remove("huge")
        assert (array == 3).all()
