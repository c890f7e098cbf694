"""Tiers: what attributes of regions say about where a pool puts extents."""

import pytest

from pmemkit import MemoryPool, RegionSpec
from pmemkit.errors import InvalidArgument, NoSpace
from pmemkit.memory.tiers import rank_of, weight_of

MIB = 1 << 20


def homes(pool: MemoryPool, *arrays) -> list[str]:
    places = {each["address"]: each["pieces"][0]["region"] for each in pool.map()}
    return [places[each.ctypes.data] for each in arrays]


@pytest.mark.parametrize(
    ("attributes", "rank"),
    [
        ({}, 0),
        ({"bandwidth": 1e9}, 0),
        ({"latency_ns": 80}, 0),
        ({"latency_ns": 350}, 250),
        ({"distance": 10}, 0),
        ({"distance": 17}, 70),
        ({"latency_ns": 350, "distance": 17}, 250),
        ({"latency_ns": 350, "rank": 3}, 3),
        ({"latency_ns": 350, "rank": 0}, 0),
    ],
)
def test_ranks_follow_from_latency_then_distance(attributes, rank):
    assert rank_of(RegionSpec("x", **attributes)) == rank


@pytest.mark.parametrize(
    ("attributes", "weight"),
    [
        ({}, 1),
        ({"bandwidth": 3e8}, 1),
        ({"bandwidth": 2e10}, 20),
        ({"bandwidth": 2e10, "weight": 5}, 5),
    ],
)
def test_weights_follow_from_bandwidth(attributes, weight):
    assert weight_of(RegionSpec("x", **attributes)) == weight


@pytest.mark.parametrize("name", ["latency_ns", "bandwidth", "distance"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_attributes_that_say_nothing_are_refused(name, value):
    with pytest.raises(InvalidArgument, match=name):
        MemoryPool([RegionSpec("anonymous:8M", **{name: value})], block_size="8M")


@pytest.mark.parametrize("placement", ["local", "preferred"])
def test_the_faster_region_is_filled_first_and_spills(placement):
    slow = RegionSpec("anonymous:8M", "slow", latency_ns=400)
    fast = RegionSpec("anonymous:8M", "fast", latency_ns=120)
    with MemoryPool([slow, fast], block_size="8M", placement=placement) as pool:
        first, second = pool.empty(5 * MIB, "u1"), pool.empty(5 * MIB, "u1")
        assert homes(pool, first, second) == ["fast", "slow"]
        shown = {each["name"]: each for each in pool.stat()["regions"]}
        assert (shown["fast"]["rank"], shown["slow"]["rank"]) == (20, 300)
        assert (shown["slow"]["latency_ns"], shown["slow"]["bandwidth"]) == (400, None)


def test_a_region_that_is_named_is_taken_and_does_not_spill():
    slow = RegionSpec("anonymous:8M", "slow", distance=20)
    with MemoryPool([RegionSpec("anonymous:8M", "fast"), slow], block_size="8M") as pool:
        first = pool.empty(5 * MIB, "u1", region="slow")
        assert homes(pool, first) == ["slow"]
        with pytest.raises(NoSpace):
            pool.empty(5 * MIB, "u1", region="slow")


def test_bandwidth_is_the_share_of_what_is_interleaved():
    regions = [
        RegionSpec("anonymous:32M", "wide", bandwidth=3e9),
        RegionSpec("anonymous:32M", "narrow", bandwidth=1e9),
    ]
    with MemoryPool(regions, block_size="8M", placement="interleave", granule="1M") as pool:
        array = pool.zeros(8 * MIB, "u1")
        (entry,) = pool.map()
        shares = [(piece["region"], piece["frames"] * 4096 // MIB) for piece in entry["pieces"]]
        assert shares == [("wide", 3), ("narrow", 1)] * 2
        assert not array.any()
