"""Who uses devices and memory, from trees like the kernel's."""

import pytest

from pmemkit.bus.holders import Holders, holders_of_node, hugetlb_of_node
from pmemkit.testing.sysfs_tree import Tree

KIB = 1 << 10


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    tree.disk("pmem0", "259:0")
    return tree


def mountinfo(tree, *lines):
    tree.put(tree.proc / "self" / "mountinfo", "\n".join(lines))


def look(tree, *paths):
    return Holders.look(paths, tree.sysfs, tree.proc)


def test_mounts_are_found_by_number_and_by_source(tree):
    mountinfo(
        tree,
        "22 1 0:20 / /proc rw,relatime - proc proc rw",
        "30 1 259:0 / /mnt/with\\040blank rw,noatime shared:1 - ext4 /dev/pmem0 rw",
        "31 1 0:44 / /mnt/btrfs rw - btrfs /dev/pmem0 rw",
        "32 1 259:1 / /other rw - xfs /dev/pmem1 rw",
        "rubbish",
        "",
    )
    assert look(tree).mounts("pmem0") == ("/mnt/with blank", "/mnt/btrfs")
    assert look(tree).mounts("pmem7") == ()


def test_partitions_count(tree):
    tree.put(tree.sysfs / "block/pmem0/pmem0p1/dev", "259:7")
    mountinfo(tree, "30 1 259:7 / /part rw - ext4 /dev/pmem0p1 rw")
    assert look(tree).mounts("pmem0") == ("/part",)


def test_stacked_devices_loops_and_swap(tree):
    (tree.sysfs / "block/pmem0/holders/dm-3").mkdir()
    tree.disk("loop4", "7:4")
    tree.put(tree.sysfs / "block/loop4/loop/backing_file", "/dev/pmem0")
    tree.disk("loop5", "7:5")
    tree.put(tree.sysfs / "block/loop5/loop/backing_file", "/other")
    tree.put(tree.proc / "swaps", "Filename Type Size Used Priority\n/dev/pmem0 partition 1 0 -2")
    assert look(tree).of_disk("pmem0") == ("dm-3", "loop4", "swap")


def test_processes_that_have_a_device_open_or_mapped(tree):
    tree.process(120, "fio", opened="/dev/pmem0")
    tree.process(121, "bad\x07name", opened="/dev/null")
    maps = "7f00-7f01 rw-s 0 00:05 12   /dev/dax1.0\n7f02-7f03 r-xp 0 08:01 9 /bin/sh\nodd"
    tree.process(9, "server", maps=maps)
    found = look(tree, "/dev/pmem0", "/dev/dax1.0")
    assert found.of_disk("pmem0") == ("process fio (120)",)
    assert found.of_path("/dev/dax1.0") == ("process server (9)",)
    assert found.of_path("/dev/pmem9") == ()


def test_nobody_is_asked_without_a_device(tree):
    tree.process(120, "fio", opened="/dev/pmem0")
    assert look(tree).opened == {}


def test_a_process_may_end_while_it_is_looked_at(tree):
    place = tree.process(120, "fio", opened="/dev/pmem0")
    (place / "comm").unlink()
    assert look(tree, "/dev/pmem0").of_disk("pmem0") == ("process ? (120)",)
    (place / "fd" / "3").unlink()
    (place / "fd").rmdir()
    assert look(tree, "/dev/pmem0").of_disk("pmem0") == ()


def test_pages_on_a_node_sorted_by_size(tree):
    line = "7f00 bind:2 anon={0} dirty={0} active=0 N{1}={0} kernelpagesize_kB={2}"
    tree.process(10, "small", numa_maps=line.format(16, 2, 4))
    tree.process(11, "huge", numa_maps=line.format(3, 2, 2048), status="VmLck:\t    64 kB")
    tree.process(12, "elsewhere", numa_maps=line.format(1000, 0, 4))
    tree.process(13, "twentieth", numa_maps=line.format(1000, 20, 4))
    tree.process(14, "odd", numa_maps="N2=\nN2=zebra\n\nN2=" + "9" * 400)
    first, second = holders_of_node(2, tree.proc)
    assert (first.name, first.pid, first.bytes_held, first.locked) == ("huge", 11, 6 << 20, True)
    assert (second.name, second.bytes_held, second.locked) == ("small", 64 * KIB, False)
    assert str(first) == "huge (11): 6 MiB, locked"
    assert str(second) == "small (10): 64 KiB"


def test_pools_of_huge_pages(tree):
    node = tree.node(2)
    tree.put(node / "hugepages/hugepages-2048kB/nr_hugepages", "3")
    tree.put(node / "hugepages/hugepages-1048576kB/nr_hugepages", "odd")
    assert hugetlb_of_node(2, tree.sysfs) == 6 << 20
    assert hugetlb_of_node(5, tree.sysfs) == 0
