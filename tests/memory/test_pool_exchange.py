"""A pool's memory in the hands of Arrow, DLPack and PyTorch: not copied, and kept while in use."""

import gc

import numpy as np
import pytest

from pmemkit import MemoryPool
from pmemkit.errors import InvalidArgument

MIB = 1 << 20


@pytest.fixture
def pool():
    with MemoryPool(["anonymous:16M"], block_size="8M") as made:
        yield made
        assert made.validate() == []
        assert used(made) == 0


@pytest.fixture
def arrow():
    # It is of the dev extra: where it cannot be imported something is wrong, and it says so.
    import pyarrow

    return pyarrow


def used(pool: MemoryPool) -> int:
    gc.collect()
    return pool.stat()["used"]


# --- Arrow ----------------------------------------------------------------------------------------


def test_an_arrow_buffer_is_the_pools_memory_and_keeps_it(pool, arrow):
    buffer = pool.alloc(2 * MIB)
    address = buffer.address
    held = arrow.py_buffer(buffer)
    assert (held.address, held.size, held.is_mutable) == (address, 2 * MIB, True)
    memoryview(buffer)[:8] = np.arange(1, 2).tobytes()
    del buffer
    part = held.slice(0, 8)
    del held
    assert used(pool) == 2 * MIB
    assert part.address == address
    assert part.to_pybytes() == np.arange(1, 2).tobytes()
    del part


def test_a_foreign_buffer_keeps_its_base(pool, arrow):
    buffer = pool.alloc(MIB)
    held = arrow.foreign_buffer(buffer.address, MIB, base=buffer)
    memoryview(buffer)[:] = b"\x05" * MIB
    assert held.address == buffer.address
    del buffer
    assert used(pool) == MIB
    assert held.to_pybytes() == b"\x05" * MIB
    del held


def test_an_arrow_array_over_a_numpy_array_of_the_pool(pool, arrow):
    numbers = pool.array(np.arange(100_000, dtype="i8"))
    address = numbers.ctypes.data
    column = arrow.Array.from_buffers(arrow.int64(), len(numbers), [None, arrow.py_buffer(numbers)])
    del numbers
    assert column.buffers()[1].address == address
    back = column.to_numpy(zero_copy_only=True)
    assert back.ctypes.data == address
    del column
    assert used(pool) > 0
    assert back.sum() == 100_000 * 99_999 // 2
    del back


def test_arrow_goes_on_while_its_bytes_move(pool, arrow):
    held = arrow.py_buffer(pool.array(np.arange(1 << 17, dtype="i8")))
    address, before = held.address, held.to_pybytes()
    pool.add("memfd:16M")
    assert pool.remove("anonymous:16M").bytes == MIB
    assert (held.address, held.to_pybytes()) == (address, before)
    del held


# --- DLPack ---------------------------------------------------------------------------------------


def test_dlpack_is_the_pools_memory_and_keeps_it(pool):
    source = pool.array(np.arange(1 << 17, dtype="f4").reshape(256, 512))
    address = source.ctypes.data
    assert source.__dlpack_device__() == (1, 0)
    taken = np.from_dlpack(source)
    assert (taken.ctypes.data, taken.shape, taken.dtype) == (address, (256, 512), np.float32)
    source[3, 4] = -1
    assert taken[3, 4] == -1
    del source
    assert used(pool) == MIB // 2
    del taken


def test_a_capsule_that_nobody_takes_gives_the_memory_back(pool):
    capsule = pool.zeros(MIB, "u1").__dlpack__()
    assert used(pool) == MIB
    del capsule


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed; no extra asks for it")


def test_a_tensor_by_dlpack(pool, torch):
    source = pool.zeros((64, 4096), "f4")
    address = source.ctypes.data
    tensor = torch.from_dlpack(source)
    assert (tensor.data_ptr(), tuple(tensor.shape)) == (address, (64, 4096))
    tensor[2, 3] = 9
    assert source[2, 3] == 9
    del source
    assert used(pool) == MIB
    assert tensor.sum().item() == 9
    del tensor


def test_a_tensor_over_a_buffer(pool, torch):
    buffer = pool.alloc(MIB, zero=True)
    tensor = torch.frombuffer(buffer, dtype=torch.int32)
    assert (tensor.data_ptr(), tensor.numel()) == (buffer.address, MIB // 4)
    tensor += 3
    assert bytes(memoryview(buffer)[:4]) == b"\3\0\0\0"
    del buffer
    assert used(pool) == MIB
    assert tensor.sum().item() == 3 * MIB // 4
    del tensor


# --- what is another pool's -----------------------------------------------------------------------


def test_a_region_or_an_array_of_another_pool_is_refused_and_both_are_as_they_were(pool):
    with MemoryPool(["memfd:16M"], block_size="8M") as other:
        mine, theirs = pool.full(MIB, 1, "u1"), other.full(MIB, 2, "u1")
        before = pool.map(), other.map()
        with pytest.raises(InvalidArgument, match="'memfd:16M' is not in this pool; there is anon"):
            pool.remove("memfd:16M")
        with pytest.raises(InvalidArgument, match="'memfd:16M' is not in this pool"):
            pool.offline("memfd:16M")
        with pytest.raises(InvalidArgument, match="no extent of this pool"):
            pool.migrate([theirs], "anonymous:16M")
        assert (pool.map(), other.map()) == before
        assert (pool.regions(), other.regions()) == (["anonymous:16M"], ["memfd:16M"])
        assert (mine == 1).all()
        assert (theirs == 2).all()
        assert other.validate() == []
        # Of the same name each pool has its own.
        pool.add("memfd:16M")
        assert pool.remove("memfd:16M").bytes == 0
        assert other.regions() == ["memfd:16M"]
        del mine, theirs
