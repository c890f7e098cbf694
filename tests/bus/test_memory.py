"""Memory blocks, zones and ordinary memory, from trees like the kernel's."""

import pytest

from pmemkit.bus.memory import auto_online, block_size, blocks_of, dram_of, node_bytes, zone_of
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
BLOCK = 128 * MIB
KIB_OF_BLOCK = BLOCK >> 10


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    memory = tree.sysfs / "devices/system/memory"
    tree.put(memory / "block_size_bytes", "8000000")
    tree.put(memory / "auto_online_blocks", "offline")
    return tree


def test_the_block_size_is_hexadecimal(tree):
    assert block_size(tree.sysfs) == BLOCK
    assert auto_online(tree.sysfs) == "offline"


@pytest.mark.parametrize("text", ["", "zebra", "-8000000", "0", "\xff" * 50, "9" * 5000])
def test_an_odd_block_size_is_the_usual_one(tree, text):
    tree.put(tree.sysfs / "devices/system/memory/block_size_bytes", text)
    assert block_size(tree.sysfs) == BLOCK


def test_a_machine_without_hotplug_has_no_blocks(tmp_path):
    tree = Tree(tmp_path)
    assert blocks_of([(0, 1 << 40)], tree.sysfs) == []
    assert auto_online(tree.sysfs) is None
    assert dram_of([], tree.sysfs) == (None, None)


def test_blocks_are_those_wholly_inside_a_range(tree):
    for number in range(30, 40):
        tree.block(number, "offline", "Normal Movable")
    start, end = 31 * BLOCK + 10 * MIB, 35 * BLOCK + 1
    assert [each.number for each in blocks_of([(start, end)], tree.sysfs)] == [32, 33, 34]
    assert blocks_of([(0, BLOCK - 1)], tree.sysfs) == []
    every = blocks_of([(0, 1 << 80)], tree.sysfs)
    assert len(every) == 10


def test_zones_are_of_blocks_that_are_online(tree):
    tree.block(32, "online", "Movable")
    tree.block(33, "offline", "Normal Movable")
    tree.block(34, "online", "Normal")
    first, second, third = blocks_of([(0, 1 << 60)], tree.sysfs)
    assert (first.zone, second.zone, third.zone) == ("movable", None, "kernel")
    assert zone_of([first, second]) == "movable"
    assert zone_of([first, third]) == "mixed"
    assert zone_of([second]) is None


def test_lent_memory_is_no_ordinary_memory(tree):
    for number in range(8):
        tree.block(number, "online", "Normal", node=0)
    for number in (32, 33, 34):
        tree.block(number, "online", "Movable", node=2)
    tree.node(0, MemTotal=8 * KIB_OF_BLOCK, MemFree=1000, **{"Active(file)": 24})
    tree.node(2, MemTotal=3 * KIB_OF_BLOCK, MemFree=3 * KIB_OF_BLOCK)
    lent = [(32 * BLOCK, 35 * BLOCK)]
    assert dram_of(lent, tree.sysfs) == (8 * BLOCK, 1024 << 10)
    total, _ = dram_of([], tree.sysfs)
    assert total == 11 * BLOCK


def test_a_node_with_both_counts_its_own_part(tree):
    for number in range(4):
        tree.block(number, "online", "Normal", node=0)
    tree.block(32, "online", "Movable", node=0)
    tree.block(33, "offline", "Normal Movable", node=0)
    tree.node(0, MemTotal=5 * KIB_OF_BLOCK, MemFree=0)
    assert dram_of([(32 * BLOCK, 34 * BLOCK)], tree.sysfs) == (4 * BLOCK, 0)


def test_meminfo_of_a_node_may_be_odd(tree):
    tree.put(tree.node(1) / "meminfo", "Node 1 MemTotal: many kB\nNode 1 MemFree: 12 kB\nrubbish")
    assert node_bytes(1, tree.sysfs) == {"MemFree": 12 << 10}
    assert node_bytes(9, tree.sysfs) == {}
