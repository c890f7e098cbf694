"""Where the attributes of a pool's regions come from, and what that changes."""

import pytest

from pmemkit import MemoryPool, RegionSpec
from pmemkit.cli import main
from pmemkit.errors import NoSpace
from pmemkit.memory import attributes, local
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
NOTHING = {"latency_ns": None, "bandwidth": None, "distance": None}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Threads run on node 0. A firmware's region on node 2 is what ``memfd:…`` maps; its pool
    believes it to be media, as of a device DAX."""
    tree = Tree(tmp_path / "machine")
    tree.put(tree.node(0) / "cpulist", "0-3")
    tree.put(tree.node(0) / "distance", "10 28")
    tree.put(tree.node(2) / "distance", "28 10")
    tree.device(
        "dax", "hmem.0/dax0.0", driver="device_dax", size=16 * MIB, target_node=2, numa_node=0
    )
    monkeypatch.setattr(attributes, "SYSFS", tree.sysfs)
    monkeypatch.setattr(attributes, "thread_node", lambda sysfs: 0)
    monkeypatch.setattr(attributes, "load_declarations", lambda: ())
    media = {"memfd:16M": "hmem.0"}
    monkeypatch.setattr(attributes, "_region_of", lambda m: media.get(m.opened.path))
    return tree


def hmat(tree, node, latency, bandwidth):
    place = tree.node(node) / "access0/initiators"
    tree.put(place / "read_latency", latency)
    tree.put(place / "read_bandwidth", bandwidth)


def shown(*regions, **options):
    with MemoryPool(regions, block_size="8M", **options) as pool:
        return {each["name"]: each for each in pool.stat()["regions"]}


def test_nothing_is_known_where_nothing_says_anything(tree):
    (tree.sysfs / "devices/system/node/node0/distance").unlink()
    region = shown("memfd:8M")["memfd:8M"]
    assert {name: region[name] for name in NOTHING} == NOTHING
    assert (region["attributes_from"], region["node"], region["rank"]) == (NOTHING, None, 0)


def test_the_bus_ranks_a_region_that_its_user_says_nothing_of(tree):
    region = shown("memfd:16M")["memfd:16M"]
    assert (region["rank"], region["node"], region["distance"]) == (180, 2, 28)
    assert region["attributes_from"]["distance"] == "slit"
    hmat(tree, 2, 250, 4000)
    region = shown("memfd:16M")["memfd:16M"]
    assert (region["rank"], region["latency_ns"]) == (150, 250)
    assert region["attributes_from"]["latency_ns"] == "hmat"


def test_memory_of_the_process_is_that_of_the_threads_node(tree):
    hmat(tree, 0, 110, 20000)
    region = shown("memfd:8M")["memfd:8M"]
    assert (region["rank"], region["weight"], region["node"]) == (10, 21, None)
    assert region["attributes_from"]["bandwidth"] == "hmat"


def test_what_the_user_says_is_what_counts(tree):
    hmat(tree, 2, 250, 4000)
    region = shown(RegionSpec("memfd:16M", "r", latency_ns=700))["r"]
    assert (region["rank"], region["latency_ns"]) == (600, 700)
    assert region["attributes_from"] == {
        "latency_ns": "user",
        "bandwidth": "hmat",
        "distance": "slit",
    }
    # A distance that was given is not outranked by a latency that was found.
    region = shown(RegionSpec("memfd:16M", "r", distance=20))["r"]
    assert (region["rank"], region["latency_ns"], region["distance"]) == (100, 250, 20)
    assert shown(RegionSpec("memfd:16M", "r", rank=3))["r"]["rank"] == 3


def test_a_bandwidth_that_was_found_is_a_share_only_beside_that_of_ordinary_memory(tree):
    hmat(tree, 2, 250, 4000)
    found = shown("memfd:16M", "memfd:8M", placement="interleave")
    assert [each["weight"] for each in found.values()] == [1, 1]
    hmat(tree, 0, 90, 20000)
    found = shown("memfd:16M", "memfd:8M", placement="interleave")
    assert [each["weight"] for each in found.values()] == [4, 21]


def test_an_image_has_what_its_machine_file_says(tree, tmp_path):
    image, machine = tmp_path / "a.img", tmp_path / "vm.toml"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    machine.write_text('[[dimm]]\npath = "a.img"\nlatency_ns = 400\nbandwidth = "3G"\n')
    region = shown(RegionSpec(f"{machine}:namespace0.0", "image"))["image"]
    assert (region["rank"], region["weight"]) == (300, 3)
    assert region["attributes_from"] == {**NOTHING, "latency_ns": "machine", "bandwidth": "machine"}


def test_stat_prints_who_says_it(tree, tmp_path, capsys):
    hmat(tree, 2, 250, 4000)
    socket = str(tmp_path / "pool.sock")
    with MemoryPool([RegionSpec("memfd:16M", bandwidth=1 << 30)], block_size="8M") as pool:
        pool.publish(socket)
        assert main(["memory", "stat", socket]) == 0
    told = capsys.readouterr().out
    assert "    250 ns (hmat), 1 GiB/s (user), distance 28 (slit), node 2\n" in told


def test_a_file_is_of_a_region_only_where_the_media_are_mapped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MIB))
    with MemoryPool([path], block_size="8M") as pool:
        assert pool.stat()["regions"][0]["node"] is None


# --- placement local ------------------------------------------------------------------------------


@pytest.fixture
def nodes(tree, monkeypatch):
    """Three nodes with a region each: 0 and 1 have processors, 2 is far from 0 and nearer to 1.
    Gives what makes a thread one of a node."""
    rows = {0: "10 21 31", 1: "21 10 17", 2: "31 17 10"}
    for node, row in rows.items():
        tree.put(tree.node(node) / "distance", row)
        (tree.sysfs / f"devices/system/cpu/cpu{node}/node{node}").mkdir(parents=True)
        tree.device("dax", f"hmem.{node + 5}/dax{node + 5}.0", size=16 * MIB, target_node=node)
    tree.put(tree.node(1) / "cpulist", "1")
    media = {f"memfd:{size}M": f"hmem.{node + 5}" for node, size in enumerate((32, 40, 48))}
    monkeypatch.setattr(attributes, "_region_of", lambda m: media.get(m.opened.path))
    cpu = [0]
    monkeypatch.setattr(local, "this_cpu", lambda: cpu[0])
    return lambda node: cpu.__setitem__(0, node)


def regions(**of_far):
    return [
        RegionSpec("memfd:48M", "far", **of_far),
        RegionSpec("memfd:40M", "one"),
        RegionSpec("memfd:32M", "zero"),
    ]


def where(pool, *arrays):
    places = {each["address"]: each["pieces"][0]["region"] for each in pool.map()}
    return [places[each.ctypes.data] for each in arrays]


def test_extents_go_to_the_threads_node_and_then_to_the_nearest(nodes):
    with MemoryPool(regions(), block_size="8M", placement="local") as pool:
        nodes(1)
        ones = [pool.empty(38 * MIB, "u1") for _ in range(2)]
        assert where(pool, *ones) == ["one", "far"]
        nodes(0)
        zeros = [pool.full(30 * MIB, 7, "u1"), pool.empty(MIB, "u1"), pool.empty(2 * MIB, "u1")]
        assert where(pool, *zeros) == ["zero", "zero", "one"]
        assert pool.stat()["refused"] == 0
        with pytest.raises(NoSpace):
            pool.empty(64 * MIB, "u1")
        assert pool.stat()["refused"] == 1
        assert pool.validate() == []


def test_preferred_goes_by_rank_on_whatever_node(nodes):
    with MemoryPool(regions(), block_size="8M", placement="preferred") as pool:
        nodes(1)
        first = pool.empty(MIB, "u1")
        assert where(pool, first) == ["one"]
        nodes(0)
        assert where(pool, pool.empty(MIB, "u1", region="far"), pool.empty(MIB, "u1")) == [
            "far",
            "one",
        ]


@pytest.mark.parametrize("said", [{"rank": 0}, {"latency_ns": 50}, {"distance": 10}])
def test_what_the_user_says_is_so_for_every_thread(nodes, said):
    with MemoryPool(regions(**said), block_size="8M") as pool:
        nodes(0)
        pool.remove("zero")
        assert where(pool, pool.empty(MIB, "u1")) == ["far"]


def test_a_region_that_left_is_not_asked(nodes):
    with MemoryPool(regions(), block_size="8M") as pool:
        nodes(0)
        pool.remove("zero")
        assert where(pool, pool.empty(MIB, "u1")) == ["one"]
        pool.add(RegionSpec("memfd:32M", "back"))
        assert where(pool, pool.empty(MIB, "u1")) == ["back"]


def test_a_thread_of_no_known_node_goes_by_rank(nodes):
    with MemoryPool(regions(), block_size="8M") as pool:
        nodes(77)
        assert where(pool, pool.empty(MIB, "u1")) == ["one"]
