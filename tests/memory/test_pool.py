"""Pools: what is handed out, by which rules, and that all of it comes back."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from pmemkit import MemoryPool, RegionSpec
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    NoSpace,
    OutOfRange,
    SystemFailure,
    Truncated,
)

MIB = 1 << 20


@pytest.fixture
def pool():
    with MemoryPool(["anonymous:32M"], block_size="8M") as made:
        yield made
        assert made.validate() == []


def used(pool: MemoryPool) -> int:
    gc.collect()
    return pool.stat()["used"]


def test_a_buffer_is_memory_and_goes_back(pool):
    buffer = pool.alloc(3 * MIB)
    view = memoryview(buffer)
    view[:5] = b"hello"
    assert (bytes(view[:5]), len(view), buffer.nbytes) == (b"hello", 3 * MIB, 3 * MIB)
    assert used(pool) == 3 * MIB
    del buffer
    assert used(pool) == 3 * MIB
    del view
    assert used(pool) == 0


def test_arrays_live_as_long_as_any_view_of_them(pool):
    table = pool.zeros((256, 1024), "f8")
    table[:] = 7
    column = table[:, 3]
    del table
    assert (column == 7).all()
    assert used(pool) == 2 * MIB
    del column
    assert used(pool) == 0


def test_what_arrays_there_are(pool):
    assert pool.full((3, 2), 5).tolist() == [[5, 5]] * 3
    assert pool.array([[1, 2], [3, 4]], "i2").dtype == np.int16
    fortran = pool.empty((100, 50), "f4", order="F")
    assert fortran.flags.f_contiguous
    assert fortran.shape == (100, 50)
    assert pool.zeros((0, 4)).shape == (0, 4)
    assert pool.zeros(()).shape == ()
    record = pool.zeros(10, [("a", "i4"), ("b", "f8")])
    record["b"] = 1.5
    assert record["b"].sum() == 15
    for each in (fortran, record):
        assert pool.owns(each)
    assert not pool.owns(np.zeros(5))


def test_objects_and_wrong_shapes_are_refused(pool):
    with pytest.raises(InvalidArgument, match="references to Python objects"):
        pool.empty(3, object)
    with pytest.raises(InvalidArgument, match="not a shape"):
        pool.empty((3, -1))


@pytest.mark.parametrize("zeroing", ["asked", "allocate", "free"])
def test_zeroing(zeroing):
    with MemoryPool(["anonymous:8M"], block_size="8M", zeroing=zeroing) as pool:
        dirty = pool.full(8 * MIB, 0xAA, "u1")
        del dirty
        again = pool.empty(8 * MIB, "u1")
        assert again.any() == (zeroing == "asked")
        del again
        assert not pool.zeros(8 * MIB, "u1").any()


def test_small_objects_share_slabs(pool):
    buffers = [pool.alloc(size) for size in range(1, 3000, 7)]
    for index, buffer in enumerate(buffers):
        memoryview(buffer)[:] = bytes([index % 256]) * len(buffer)
    for index, buffer in enumerate(buffers):
        assert bytes(buffer) == bytes([index % 256]) * len(buffer)
    stat = pool.stat()
    assert stat["small_objects"] == len(buffers)
    assert stat["slabs"] < len(buffers) / 4
    assert pool.validate() == []
    del buffers, buffer
    assert pool.stat()["small_objects"] == 0
    assert used(pool) <= 64 * 1024 * stat["slabs"]


def test_numpys_own_memory_comes_from_the_pool(pool):
    before = np.zeros(1 << 17)
    with pool.numpy():
        inside = np.arange(1 << 17, dtype="f8")
        small = np.arange(10)
        grown = np.zeros(8)
        grown.resize(1 << 17, refcheck=False)
        total = inside + before
    outside = np.zeros(1 << 17)
    assert all(pool.owns(each) for each in (inside, small, grown, total))
    assert not pool.owns(outside)
    assert total.sum() == inside.sum()
    assert not grown.any()
    del inside, small, grown, total
    assert pool.stat()["small_objects"] == 0


def test_the_handler_is_that_of_the_thread_that_set_it(pool):
    found = []
    with pool.numpy():
        thread = threading.Thread(target=lambda: found.append(pool.owns(np.zeros(1 << 16))))
        thread.start()
        thread.join()
        assert pool.owns(np.zeros(1 << 16))
    assert found == [False]


def test_numpy_says_when_there_is_no_room(pool):
    with pool.numpy(), pytest.raises(MemoryError):
        np.zeros(64 * MIB, "u1")


def test_no_room_says_how_much_there_is(pool):
    kept = pool.empty(20 * MIB, "u1")
    with pytest.raises(NoSpace, match=f"{12 * MIB} bytes are free"):
        pool.empty(20 * MIB, "u1")
    assert kept.nbytes == 20 * MIB
    assert pool.stat()["refused"] == 1


def test_a_limit():
    with MemoryPool(["anonymous:32M"], block_size="8M", limit="4M") as pool:
        kept = pool.empty(3 * MIB, "u1")
        with pytest.raises(NoSpace, match="limit"):
            pool.empty(2 * MIB, "u1")
        del kept
        pool.empty(4 * MIB, "u1")


def test_pressure_is_told_once_and_before_a_failure(pool):
    told, kept = [], []
    pool.on_pressure(0.5, lambda nbytes: (told.append(nbytes), kept.clear()))
    kept.append(pool.empty(14 * MIB, "u1"))
    assert told == []
    more = pool.empty(4 * MIB, "u1")
    assert told == [4 * MIB]
    assert kept == []
    kept.append(pool.empty(20 * MIB, "u1"))
    big = pool.empty(24 * MIB, "u1")
    assert told[-1] == 24 * MIB
    assert (big.nbytes, more.nbytes) == (24 * MIB, 4 * MIB)


def test_scattered_frames_make_one_array(pool):
    pieces = [pool.empty(MIB, "u1") for _ in range(32)]
    del pieces[::2]
    array = pool.empty(12 * MIB, "u1")
    array[:] = np.arange(12 * MIB, dtype=np.uint64).astype("u1")
    assert (array == np.arange(12 * MIB, dtype=np.uint64).astype("u1")).all()
    assert len(pool.map()) == 17
    entry = next(each for each in pool.map() if each["address"] == array.ctypes.data)
    assert len(entry["pieces"]) > 1
    assert pool.validate() == []


def test_large_arrays_are_interleaved_by_weight():
    regions = [RegionSpec("anonymous:32M", "a", weight=3), RegionSpec("anonymous:32M", "b")]
    with MemoryPool(regions, block_size="8M", placement="interleave", granule="1M") as pool:
        array = pool.zeros(8 * MIB, "u1")
        (entry,) = pool.map()
        shares = [(piece["region"], piece["frames"] * 4096 // MIB) for piece in entry["pieces"]]
        assert shares == [("a", 3), ("b", 1), ("a", 3), ("b", 1)]
        array[:] = 9
        assert array.sum() == 9 * 8 * MIB


def test_ranks_say_what_is_filled_first():
    regions = [RegionSpec("anonymous:8M", "far", rank=2), RegionSpec("anonymous:8M", "near")]
    with MemoryPool(regions, block_size="8M") as pool:
        first, second = pool.empty(5 * MIB, "u1"), pool.empty(5 * MIB, "u1")
        places = {e["address"]: e["pieces"][0]["region"] for e in pool.map()}
        assert [places[a.ctypes.data] for a in (first, second)] == ["near", "far"]


def test_threads_get_memory_of_their_own(pool):
    def churn(seed: int) -> None:
        choose = np.random.default_rng(seed)
        kept = []
        for _ in range(300):
            array = pool.empty(int(choose.integers(1, 60000)), "u1")
            array[:] = seed
            kept.append(array)
            if len(kept) > 20:
                gone = kept.pop(int(choose.integers(len(kept))))
                assert (gone == seed).all()
        assert all((each == seed).all() for each in kept)

    failed = []

    def run(seed: int) -> None:
        try:
            churn(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert pool.stat()["small_objects"] == 0


# --- errors ---------------------------------------------------------------------------------------


def test_regions_that_are_refused(pool, tmp_path):
    path = tmp_path / "region"
    path.write_bytes(bytes(4 * MIB))
    with pytest.raises(InvalidArgument, match="less than a block"):
        pool.add(path)
    path.write_bytes(bytes(16 * MIB))
    pool.add(path)
    with pytest.raises(Busy, match="in the pool already"):
        pool.add(path)
    with pytest.raises(InvalidArgument, match="'nothing' is not in this pool"):
        pool.remove("nothing")
    with pytest.raises(OutOfRange, match="the region has 4"):
        pool.offline("anonymous:32M", 3, 2)
    with pytest.raises(SystemFailure, match="No such file"):
        pool.add(tmp_path / "none")


def test_regions_that_overlap(pool, tmp_path):
    path = tmp_path / "region"
    path.write_bytes(bytes(32 * MIB))
    core = pool._core
    with path.open("r+b") as file:
        core.add(file.fileno(), "low", offset=0, length=16 * MIB)
        with pytest.raises(Busy, match=r"overlaps region low, bytes 0 to 16777216"):
            core.add(file.fileno(), "middle", offset=8 * MIB, length=16 * MIB)
        with pytest.raises(Busy, match="region low is in the pool already"):
            core.add(file.fileno(), "low", offset=0, length=16 * MIB)
        with pytest.raises(OutOfRange, match="ends behind"):
            core.add(file.fileno(), "high", offset=24 * MIB, length=16 * MIB)
        with pytest.raises(InvalidArgument, match="multiple"):
            core.add(file.fileno(), "odd", offset=100, length=8 * MIB)


def test_a_region_that_vanishes(tmp_path):
    path = tmp_path / "region"
    path.write_bytes(bytes(16 * MIB))
    with MemoryPool([path], block_size="8M") as pool:
        os.truncate(path, 4 * MIB)
        with pytest.raises(Truncated, match="vanished: its file has 4194304 bytes left"):
            pool.empty(MIB, "u1")
        assert pool.stat()["regions"][0]["truncated"]
        # Another region goes on.
        pool.add("anonymous:8M")
        assert pool.zeros(MIB, "u1").sum() == 0


def test_a_region_that_vanishes_under_arrays_cannot_leave(tmp_path):
    path = tmp_path / "region"
    path.write_bytes(bytes(16 * MIB))
    with MemoryPool([path], block_size="8M") as pool:
        arrays = [pool.full(2 * MIB, index, "u1") for index in range(4)]
        pool.add("anonymous:32M")
        os.truncate(path, 4 * MIB)
        with pytest.raises(Truncated):
            pool.remove(str(path), timeout=10)
        assert (arrays[0] == 0).all()
        assert (arrays[1] == 1).all()
        assert pool.validate() == []
        os.truncate(path, 16 * MIB)
        pool.remove(str(path), timeout=10)
        assert (arrays[1] == 1).all()


def test_a_closed_pool_hands_nothing_out_and_keeps_what_is_in_use():
    pool = MemoryPool(["anonymous:8M"], block_size="8M")
    array = pool.full(1000, 3)
    pool.close()
    with pytest.raises(Closed):
        pool.alloc(1)
    assert (array == 3).all()


# --- the end of a process, and forks --------------------------------------------------------------


def run_python(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.parametrize("first", ["pool", "array", "view", "nothing"])
def test_objects_may_die_in_any_order_and_with_the_interpreter(first):
    text = f"""
import numpy as np
from pmemkit import MemoryPool
pool = MemoryPool(["anonymous:8M"], block_size="8M")
array = pool.full(100000, 2.0)
view = array[5:]
with pool.numpy():
    own = np.ones(5000)
class Cycle: pass
cycle = Cycle()
cycle.me, cycle.pool, cycle.array = cycle, pool, array
globals().pop({first!r}, None)
print(view.sum() if {first!r} != "view" else array.sum(), own.sum())
"""
    assert run_python(text).split() in (["199990.0", "5000.0"], ["200000.0", "5000.0"])


def test_a_forked_child_shares_the_bytes_and_changes_nothing_else():
    text = """
import os, gc, sys
import numpy as np
from pmemkit import MemoryPool
from pmemkit.errors import Busy, NotSupported
pool = MemoryPool(["anonymous:8M", "memfd:16M"], block_size="8M")
array = pool.full(100000, 2.0)
with pool.numpy():
    own = np.ones(50000)
used = pool.stat()["used"]
child = os.fork()
if child == 0:
    assert (array == 2.0).all()
    array[0] = 5.0
    try:
        pool.alloc(10)
    except NotSupported as refused:
        assert "child" in str(refused)
    else:
        os._exit(1)
    with pool.numpy():
        mine = np.ones(1000)
    assert not pool.owns(mine)
    del array, own, mine
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert array[0] == 5.0 and pool.stat()["used"] == used
try:
    pool.remove("anonymous:8M")
except Busy as refused:
    assert "forked" in str(refused)
else:
    sys.exit("migrated under a child")
pool.forget_children()
pool.remove("anonymous:8M")
assert array[0] == 5.0 and (array[1:] == 2.0).all() and (own == 1).all()
print("good")
"""
    assert run_python(text) == "good\n"


def test_memory_that_children_do_not_get():
    text = """
import os, signal
from pmemkit import MemoryPool
pool = MemoryPool(["anonymous:8M", "memfd:8M"], block_size="8M", share_with_children=False)
array = pool.full(100000, 2.0)
child = os.fork()
if child == 0:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    import faulthandler
    faulthandler.disable()
    array[0]
    os._exit(0)
assert os.waitpid(child, 0)[1] & 127 == signal.SIGSEGV
pool.remove("anonymous:8M")
assert (array == 2.0).all()
print("good")
"""
    assert run_python(text) == "good\n"
