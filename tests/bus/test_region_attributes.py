"""Latency, bandwidth and distance of regions: who is believed, and what says nothing."""

import struct

import pytest
from test_cxl import ROOT, add_memdev, add_region
from test_evidence_firmware import QEMU, dslbis, dsmas, sealed

from pmemkit.bus.attributes import (
    Attribute,
    home_node,
    node_attributes,
    region_attributes,
    stated_attributes,
)
from pmemkit.bus.declarations import parse_declarations
from pmemkit.bus.evidence_kernel import find_region
from pmemkit.bus.machine import DimmSpec, load_machine
from pmemkit.bus.nodes import distance_to_processors, is_online, node_distances, thread_node
from pmemkit.errors import InvalidArgument
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
GIB = 1 << 30


def add_node(tree, number, distances="", processors="", **access):
    place = tree.node(number, MemTotal=4096)
    tree.put(place / "cpulist", processors)
    tree.put(place / "distance", distances)
    for name, value in access.items():
        tree.put(place / "access0/initiators" / name, value)
    return place


@pytest.fixture
def nodes(tmp_path):
    """Two nodes with processors and, as node 4, one without; between them nodes are missing."""
    tree = Tree(tmp_path)
    add_node(tree, 0, "10 21 31", "0-1", read_latency=90, read_bandwidth=10000)
    add_node(tree, 1, "21 10 17", "2-3")
    add_node(tree, 4, "31 17 10", read_latency=170, write_latency=500, read_bandwidth=2000)
    return tree


@pytest.fixture
def cxl(nodes):
    """A region of RAM of mem1, 16 MiB into the device, that is on node 4."""
    (nodes.sysfs / "devices/pci0000:0c").mkdir(parents=True)
    nodes.device("cxl", ROOT)
    nodes.device("cxl", f"{ROOT}/decoder0.0", cap_ram=1, target_list="12")
    add_memdev(nodes, 0, ram=256 * MIB, serial=5)
    add_memdev(nodes, 1, ram=256 * MIB, serial=6)
    add_region(nodes, "region1")
    span(nodes, 1, 16 * MIB, 32 * MIB)
    nodes.device(
        "dax",
        f"{ROOT}/decoder0.0/region1/dax_region1/dax1.0",
        driver="device_dax",
        size=32 * MIB,
        target_node=9,
        numa_node=1,
    )
    return nodes


def decoder(tree, memdev, number=0):
    end = memdev + 2
    return tree.sysfs / f"devices/{ROOT}/port1/endpoint{end}/decoder{end}.{number}"


def span(tree, memdev, start, size):
    tree.put(decoder(tree, memdev) / "dpa_resource", hex(start))
    tree.put(decoder(tree, memdev) / "dpa_size", hex(size))


def put_cdat(tree, memdev, table):
    (tree.sysfs / f"bus/cxl/devices/endpoint{memdev + 2}/CDAT").write_bytes(table)


def known(tree, text="", region="region1"):
    declared = parse_declarations(text, "m.toml") if text else ()
    found = region_attributes(region, tree.sysfs, declared)
    return {name: tuple(each) for name, each in found.items()}


# --- nodes ----------------------------------------------------------------------------------------


def test_columns_of_distances_are_the_nodes_that_are_online(nodes):
    assert node_distances(0, nodes.sysfs) == {0: 10, 1: 21, 4: 31}
    assert distance_to_processors(4, nodes.sysfs) == 17
    assert distance_to_processors(1, nodes.sysfs) == 10
    assert [is_online(each, nodes.sysfs) for each in (None, 0, 3, 4)] == [False, True, False, True]


@pytest.mark.parametrize("row", ["", "10", "10 21", "10 21 x", "10 21 \u0663\u0661", "10 21 255"])
def test_a_row_that_makes_no_sense_says_nothing_of_the_node(nodes, row):
    add_node(nodes, 0, row, "0-1")
    assert 4 not in node_distances(0, nodes.sysfs)
    assert distance_to_processors(7, nodes.sysfs) is None


def test_the_node_of_the_calling_thread(nodes, monkeypatch):
    assert thread_node(nodes.sysfs) is None
    for cpu in (nodes.sysfs / "devices/system/cpu" / f"cpu{number}" for number in range(4096)):
        cpu.mkdir(parents=True)
        (cpu / "node4").symlink_to(nodes.sysfs / "devices/system/node/node4")
    assert thread_node(nodes.sysfs) == 4


def test_hmat_and_slit_of_a_node(nodes):
    assert node_attributes(4, nodes.sysfs) == {
        "latency_ns": Attribute(170, "hmat"),
        "bandwidth": Attribute(2000 * MIB, "hmat"),
        "distance": Attribute(17, "slit"),
    }
    assert node_attributes(1, nodes.sysfs) == {"distance": Attribute(10, "slit")}
    assert node_attributes(3, nodes.sysfs) == {}


@pytest.mark.parametrize("value", [0, -1, "", "zebra", "9" * 39])
def test_what_hmat_says_senselessly_is_left_out(nodes, value):
    add_node(nodes, 4, "31 17 10", read_latency=value, read_bandwidth=value)
    assert set(node_attributes(4, nodes.sysfs)) == {"distance"}


# --- who is believed ------------------------------------------------------------------------------


def test_a_node_of_the_kernels_is_where_a_region_is_and_else_the_nearest(cxl):
    region = find_region("region1", cxl.sysfs)
    assert home_node(region, cxl.sysfs) == 1
    add_node(cxl, 9)
    assert home_node(region, cxl.sysfs) == 9


def test_the_table_of_the_device_knows_the_part_that_the_region_takes(cxl):
    slow = dsmas(1, 0, 32 * MIB, 64 * MIB), dslbis(1, 1, 1000, 300), dslbis(1, 4, 1, 9000)
    quick = dsmas(2, 0, 0, 32 * MIB), dslbis(2, 0, 1000, 200), dslbis(2, 3, 1000, 8)
    other = dsmas(3, 0, 128 * MIB, MIB), dslbis(3, 1, 1000, 900)
    put_cdat(cxl, 1, sealed(*slow, *quick, *other))
    assert known(cxl) == {"latency_ns": (300, "cdat"), "bandwidth": (8e9, "cdat")}
    span(cxl, 1, 0, 16 * MIB)
    assert known(cxl)["latency_ns"] == (200, "cdat")


def test_without_the_decoder_the_kind_says_which_part(cxl):
    (decoder(cxl, 1) / "dpa_resource").unlink()
    put_cdat(cxl, 1, sealed(dsmas(1, 4, 0, MIB), dslbis(1, 1, 1000, 900), dsmas(2, 0, MIB, MIB)))
    assert "latency_ns" not in known(cxl)
    put_cdat(cxl, 1, QEMU)
    assert known(cxl)["latency_ns"] == (150, "cdat")


def test_hmat_of_the_node_is_believed_before_the_table_and_the_path_before_both(cxl):
    put_cdat(cxl, 1, QEMU)
    add_node(cxl, 1, "21 10 17", "2-3", read_latency=80)
    assert known(cxl)["latency_ns"] == (150, "cdat"), "node 1 is only near"
    add_node(cxl, 9, "40 26 30 10", read_latency=180)
    assert known(cxl)["distance"] == (26, "slit")
    assert known(cxl)["latency_ns"] == (180, "hmat")
    assert known(cxl)["bandwidth"] == (16e9, "cdat")
    place = cxl.sysfs / "bus/cxl/devices/region1/access0"
    cxl.put(place / "read_latency", 260)
    cxl.put(place / "read_bandwidth", 7000)
    assert known(cxl)["latency_ns"] == (260, "cdat")
    assert known(cxl)["bandwidth"] == (7e9, "cdat")
    text = '[[dimm]]\nserial = 6\nlatency_ns = 400\nbandwidth = "1G"\n'
    assert known(cxl, text) == {
        "latency_ns": (400, "machine"),
        "bandwidth": (GIB, "machine"),
        "distance": (26, "slit"),
    }
    whole = '[[dimm]]\nregion = "region1"\nlatency_ns = 350\ndistance = 40\n'
    assert known(cxl, text + whole)["latency_ns"] == (350, "machine")
    assert known(cxl, text + whole)["distance"] == (40, "machine")
    assert known(cxl, text + whole)["bandwidth"] == (GIB, "machine")


def two_devices(tree):
    """Makes the region one of both devices."""
    tree.put(tree.sysfs / "bus/cxl/devices/region1/interleave_ways", 2)
    tree.put(tree.sysfs / "bus/cxl/devices/region1/target1", "decoder2.0")
    span(tree, 0, 0, MIB)


def test_of_several_devices_the_slowest_and_all_of_them(cxl):
    two_devices(cxl)
    put_cdat(cxl, 0, sealed(dsmas(1, 0, 0, MIB), dslbis(1, 0, 1000, 500), dslbis(1, 3, 1000, 4)))
    assert known(cxl) == {}, "mem1 says nothing"
    put_cdat(cxl, 1, QEMU)
    assert known(cxl)["latency_ns"] == (500, "cdat")
    assert known(cxl)["bandwidth"] == (20e9, "cdat")
    one = "[[dimm]]\nserial = 5\nlatency_ns = 700\nbandwidth = 1000\n"
    assert known(cxl, one)["latency_ns"] == (500, "cdat")
    both = one + "[[dimm]]\nserial = 6\nlatency_ns = 600\nbandwidth = 1000\n"
    assert known(cxl, both)["latency_ns"] == (700, "machine")
    assert known(cxl, both)["bandwidth"] == (2000, "machine")


@pytest.mark.parametrize(
    "table",
    [
        b"",
        QEMU[:40],
        QEMU[:5] + b"\0" + QEMU[6:],
        QEMU[:100] + b"\x55" + QEMU[101:],
        sealed(dsmas(1, 0, 0, 256 * MIB), struct.pack("<BxHI", 1, 8, 0)),
        sealed(dsmas(1, 0, 0, 256 * MIB), struct.pack("<BxH", 1, 24)),
        sealed(dsmas(1, 0, 0, 256 * MIB), dslbis(1, 1, 1000, 5), length=48),
        sealed(dsmas(1, 0, 0, 256 * MIB), dslbis(1, 1, (1 << 64) - 1, 0xFFFE)),
        sealed(dsmas(1, 0, 0, 256 * MIB), dslbis(1, 4, (1 << 64) - 1, 0xFFFE)),
        sealed(dsmas(1, 0, 0, 256 * MIB), dslbis(1, 1, 0, 5)),
        sealed(dsmas(1, 0, 0, 0), dslbis(1, 1, 1000, 5)),
        sealed(dslbis(1, 1, 1000, 5)),
    ],
)
def test_a_table_that_is_bad_or_senseless_says_nothing(cxl, table):
    put_cdat(cxl, 1, table)
    assert known(cxl) == {}


# --- the machine file -----------------------------------------------------------------------------


def test_a_machine_file_states_the_speed_of_an_image(tmp_path):
    path = tmp_path / "vm.toml"
    path.write_text('[[dimm]]\npath = "a"\nlatency_ns = 300\nbandwidth = "2G"\ndistance = 17\n')
    assert stated_attributes(load_machine(path).dimms[0]) == {
        "latency_ns": Attribute(300, "machine"),
        "bandwidth": Attribute(2 * GIB, "machine"),
        "distance": Attribute(17, "machine"),
    }
    assert stated_attributes(DimmSpec(path="a")) == {}


@pytest.mark.parametrize("key", ["latency_ns", "bandwidth", "distance"])
@pytest.mark.parametrize("value", ["0", "-1", "true", '"x"', "1.5", f"{1 << 64}"])
def test_a_speed_that_is_none_is_refused(tmp_path, key, value):
    with pytest.raises(InvalidArgument, match=key):
        parse_declarations(f"[[dimm]]\nhandle = 1\n{key} = {value}\n", "m.toml")
    path = tmp_path / "vm.toml"
    path.write_text(f'[[dimm]]\npath = "a"\n{key} = {value}\n')
    with pytest.raises(InvalidArgument, match=f"{key}|is not a size"):
        load_machine(path)
