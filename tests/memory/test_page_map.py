"""The page map of a pool: in DRAM or in the namespace, what it costs, what happens to its area."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from pmemkit import MemoryPool, RegionSpec
from pmemkit._native import frames
from pmemkit.bus.locate import locate
from pmemkit.errors import Busy, InvalidArgument, Truncated

MIB = 1 << 20
FRAME = 4096


def pmem(*words: str) -> str:
    command = [sys.executable, "-m", "pmemkit", *words]
    return subprocess.run(command, check=True, capture_output=True, timeout=60, text=True).stdout


@pytest.fixture
def namespace(tmp_path):
    """``namespace("devdax", "dev")``: a namespace of 64 MiB of an image."""

    def make(mode: str, *more: str) -> str:
        image = tmp_path / f"{mode}.img"
        pmem("create-image", str(image), "--size", "96M", "--label-size", "128K")
        pmem("create-namespace", str(image), "--mode", mode, "--size", "64M", *more)
        return f"{image}:namespace0.0"

    return make


def open_pool(path: str, **more) -> MemoryPool:
    return MemoryPool([RegionSpec(path, "ns", names=True, **more)], block_size="8M")


def area(path: str) -> tuple[str, int, int]:
    """Image, start and end of what lies between info block and data."""
    image, name = path.rsplit(":", 1)
    place = locate(image, name)
    dataoff = place.namespace.claim.info.dataoff
    return place.path, place.offset - dataoff + 8192, place.offset


def bytes_at(image: str, start: int, end: int) -> bytes:
    with open(image, "rb") as file:  # noqa: PTH123 - a path of a pool
        file.seek(start)
        return file.read(end - start)


def overwrite(image: str, start: int, content: bytes) -> None:
    with open(image, "r+b") as file:  # noqa: PTH123 - a path of a pool
        file.seek(start)
        file.write(content)


def bill(pool: MemoryPool) -> dict:
    return pool.stat()["regions"][0]["page_map"]


@pytest.mark.parametrize("mode", ["fsdax", "devdax"])
def test_the_map_is_where_the_info_block_says_unless_somebody_asks(mode, namespace):
    path = namespace(mode, "--map", "dev")
    image, start, end = area(path)
    reserved = bytes_at(image, start - 8192, start)
    for wish, placement in ((None, "dev"), ("dev", "dev"), ("mem", "mem")):
        overwrite(image, start, bytes(end - start))
        with open_pool(path, map=wish) as pool:
            assert bill(pool)["placement"] == placement
            held = pool.full(64 * FRAME, 1, "u1")
            now = bytes_at(image, start, end)
            # A page for a header, then a byte a frame: one of them says that there is an array.
            assert sum(byte != 0 for byte in now) == (placement == "dev")
            assert not any(now[:FRAME])
            del held
            assert pool.validate() == []
    assert bytes_at(image, start - 8192, start) == reserved


def test_what_overwrites_the_area_between_two_opens_loses_nothing(namespace):
    path = namespace("devdax", "--map", "dev")
    image, start, end = area(path)
    noise = random.Random(7)
    for round_ in range(3):
        with open_pool(path) as pool:
            for earlier in range(round_):
                assert (pool[f"a{earlier}"] == earlier + 1).all()
            kept = pool.create(f"a{round_}", (round_ + 1) * 3000, "u8")
            kept[:] = round_ + 1
            pool.persist(f"a{round_}")
            del kept
            assert pool.validate() == []
        overwrite(image, start, noise.randbytes(end - start))
    with open_pool(path) as pool:
        assert sorted(pool) == ["a0", "a1", "a2"]
        assert (pool["a2"] == 3).all()
        assert pool.validate() == []


def test_arrays_move_in_and_out_of_a_region_with_its_map_inside(namespace):
    path = namespace("devdax", "--map", "dev")
    spec = RegionSpec(path, "ns")
    with MemoryPool([spec, "anonymous:64M"], block_size="8M") as pool:
        arrays = [pool.full(MIB // 2, n, "u1", region="ns") for n in range(40)]
        for _ in range(3):
            pool.remove("ns")
            assert pool.validate() == []
            pool.add(spec)
            pool.migrate(arrays, "ns")
        assert [int(array[-1]) for array in arrays] == list(range(40))
        assert all((array == array[0]).all() for array in arrays)
        assert pool.validate() == []


def test_the_area_of_the_map_is_locked_with_the_data(namespace):
    path = namespace("devdax", "--map", "dev")
    with open_pool(path), pytest.raises(Busy), open_pool(path):
        pass
    with open_pool(path) as pool:
        pool.remove("ns")
        pool.add(RegionSpec(path, "again"))


def test_what_has_no_area_for_a_map_is_refused_by_name(namespace, tmp_path):
    plain = tmp_path / "plain"
    with plain.open("wb") as file:
        file.truncate(16 * MIB)
    raw = namespace("raw")
    for path, what in ((raw, "mode raw"), (str(plain), "no namespace"), ("memfd:16M", "no namesp")):
        with pytest.raises(InvalidArgument, match=what):
            MemoryPool([RegionSpec(path, map="dev")], block_size="8M")
        with MemoryPool([RegionSpec(path, map="mem")], block_size="8M") as pool:
            assert bill(pool)["placement"] == "mem"
    with pytest.raises(InvalidArgument, match="map is mem or dev, not 'disk'"):
        MemoryPool([RegionSpec(raw, map="disk")], block_size="8M")  # type: ignore[arg-type]


def test_an_area_that_is_too_small_is_refused_with_both_sizes(tmp_path):
    image = tmp_path / "big.img"
    # Without a map in it, 2 MiB lie in front of the data: a map of 8 GiB needs more than that.
    pmem("create-image", str(image), "--size", "9G", "--label-size", "128K")
    pmem("create-namespace", str(image), "--mode", "devdax", "--map", "mem")
    path = f"{image}:namespace0.0"
    _, start, end = area(path)
    needed = frames.Allocator.map_size((9 << 30) // FRAME)
    assert end - start < needed
    with pytest.raises(InvalidArgument, match=rf"region ns: .* and between .* are {end - start};"):
        MemoryPool([RegionSpec(path, "ns", map="dev")])
    with MemoryPool([RegionSpec(path, "ns")]) as pool:
        assert bill(pool)["placement"] == "mem"


def test_stores_to_a_map_in_the_namespace_are_counted(namespace):
    path = namespace("devdax", "--map", "dev")
    with open_pool(path) as pool:
        start = bill(pool)["media_stores"]
        array = pool.empty(64 * FRAME, "u1")
        taken = bill(pool)["media_stores"]
        assert taken > start
        del array
        assert bill(pool)["media_stores"] > taken
        assert bill(pool)["bytes"] * FRAME == pool.stat()["regions"][0]["size"]
        assert bill(pool)["media_flushes"] == 0
    with open_pool(path, map="mem") as pool:
        array = pool.empty(64 * FRAME, "u1")
        assert array.nbytes == 64 * FRAME
        found = bill(pool)
        assert (found["media_stores"], found["media_bytes_at_open"]) == (0, 0)


def test_info_prints_the_bill(namespace):
    path = namespace("devdax", "--map", "dev")
    found = json.loads(pmem("info", path, "--json"))
    size = found["namespace"]["data_size"]
    ours = found["pool_map"]
    assert ours["bytes"] == size // FRAME
    assert ours["linux_bytes"] == found["page_map_bytes"] == 64 * ours["bytes"]
    assert (ours["percent"], ours["linux_percent"]) == (100 / 4096, 100 / 64)
    assert ours["media_bytes_at_open"] == ours["bytes"]
    text = pmem("info", path)
    assert f"a pool {ours['bytes']} bytes, 0.024 % of the data (1 a frame)" in text
    assert "1.56 % (64 a frame)" in text
    raw = namespace("raw")
    assert json.loads(pmem("info", raw, "--json"))["pool_map"] is None
    assert "none; storage never has one" in pmem("info", raw)


def test_a_region_that_vanishes_takes_its_map_with_it_and_nothing_else(namespace):
    path = namespace("devdax", "--map", "dev")
    image, start, _ = area(path)
    with MemoryPool([RegionSpec(path, "ns"), "anonymous:16M"], block_size="8M") as pool:
        lost = pool.empty(MIB, "u1", region="ns")
        assert lost.nbytes == MIB
        os.truncate(image, start)
        with pytest.raises(Truncated, match="region ns vanished"):
            pool.empty(MIB, "u1", region="ns")
        # What gives memory back meets a map that is no longer there.
        del lost
        assert any("page map vanished" in each for each in pool.validate())
        pool.remove("ns", timeout=10)
        assert pool.regions() == ["anonymous:16M"]
        assert (pool.full(1000, 5, "u8") == 5).all()
        assert np.count_nonzero(pool.zeros(1000)) == 0
        assert pool.validate() == []
