"""CXL memory, from trees like the kernel's (Linux 6.12)."""

import pytest

from pmemkit.bus.cxl import cxl_memdevs, cxl_regions, endpoint_of, root_decoders
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
ROOT = "platform/ACPI0017:00/root0"
BRIDGE = "pci0000:0c"


def add_memdev(tree, number, *, ram=0, pmem=0, serial="0x77"):
    """A memory device with its endpoint and four decoders, as cxl_port makes them."""
    place = tree.device(
        "cxl",
        f"{BRIDGE}/0000:0{number}:00.0/mem{number}",
        serial=serial,
        numa_node=0,
        ram__size=hex(ram),
        pmem__size=hex(pmem),
    )
    endpoint = f"{ROOT}/port1/endpoint{number + 2}"
    (tree.device("cxl", endpoint) / "uport").symlink_to(place)
    for each in range(4):
        decoder = f"{endpoint}/decoder{number + 2}.{each}"
        tree.device("cxl", decoder, mode="none", dpa_size="0x0000000000000000")
    return place


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    bridge = tree.sysfs / "devices" / BRIDGE
    bridge.mkdir(parents=True)
    tree.device("cxl", ROOT)
    (tree.sysfs / "devices" / ROOT / "dport12").symlink_to(bridge)
    tree.device(
        "cxl",
        f"{ROOT}/decoder0.0",
        size="0x80000000",
        cap_ram=1,
        cap_pmem=1,
        target_list="12",
        interleave_ways=1,
        interleave_granularity=256,
    )
    add_memdev(tree, 0, pmem=256 * MIB)
    add_memdev(tree, 1, ram=256 * MIB, serial="2")
    return tree


def take(tree, memdev, mode, size):
    """What a region does to the first decoder of a device."""
    place = tree.sysfs / "devices" / ROOT / f"port1/endpoint{memdev + 2}/decoder{memdev + 2}.0"
    tree.put(place / "mode", mode)
    tree.put(place / "dpa_size", f"{size:#018x}")


def add_region(tree, name, **attributes):
    values = {
        "mode": "ram",
        "size": hex(256 * MIB),
        "interleave_ways": 1,
        "interleave_granularity": 256,
        "target0": "decoder3.0",
        "commit": 1,
    }
    place = f"{ROOT}/decoder0.0/{name}"
    return tree.device("cxl", place, driver="cxl_region", **{**values, **attributes})


def test_memory_devices_and_what_is_free_of_them(tree):
    take(tree, 1, "ram", 64 * MIB)
    first, second = cxl_memdevs(tree.sysfs)
    assert (first.dev, first.serial, first.pmem_size, first.pmem_free) == (
        "mem0",
        0x77,
        256 * MIB,
        256 * MIB,
    )
    assert (second.serial, second.ram_size, second.ram_free) == (2, 256 * MIB, 192 * MIB)
    assert first.decoders == second.decoders == ("decoder0.0",)


def test_a_decoder_of_another_bridge_does_not_reach_them(tree):
    other = tree.sysfs / "devices" / "pci0000:0d"
    other.mkdir()
    (tree.sysfs / "devices" / ROOT / "dport13").symlink_to(other)
    tree.device("cxl", f"{ROOT}/decoder0.1", cap_ram=1, target_list="13")
    assert [each.dev for each in root_decoders(tree.sysfs)] == ["decoder0.0", "decoder0.1"]
    assert {each.decoders for each in cxl_memdevs(tree.sysfs)} == {("decoder0.0",)}


def test_regions_and_their_members(tree):
    add_region(tree, "region0")
    add_region(tree, "region1", mode="pmem", target0="decoder2.0", commit=0)
    first, second = cxl_regions(tree.sysfs)
    assert (first.dev, first.kind, first.members) == ("region0", "ram", ("mem1",))
    assert (first.decoder, first.size, first.committed) == ("decoder0.0", 256 * MIB, True)
    assert (second.kind, second.members, second.committed) == ("pmem", ("mem0",), False)


@pytest.mark.parametrize("value", ["", "zebra", "-1", "9" * 300, "0x"])
def test_odd_values_do_not_end_the_survey(tree, value):
    add_region(
        tree,
        "region0",
        size=value,
        interleave_ways=value,
        interleave_granularity=value,
        target0=value,
        commit=value,
    )
    add_region(tree, "region1", mode=value)
    (region,) = cxl_regions(tree.sysfs)
    assert (region.size, region.members, region.committed) == (0, (), False)
    for name in ("serial", "numa_node", "ram/size", "pmem/size"):
        tree.put(tree.sysfs / "bus/cxl/devices/mem0" / name, value)
    tree.put(tree.sysfs / "bus/cxl/devices/decoder0.0/target_list", value)
    memdev = cxl_memdevs(tree.sysfs)[0]
    assert (memdev.ram_size, memdev.pmem_size, memdev.decoders) == (0, 0, ())


def test_a_machine_without_cxl(tmp_path):
    tree = Tree(tmp_path)
    assert cxl_memdevs(tree.sysfs) == []
    assert cxl_regions(tree.sysfs) == []
    assert root_decoders(tree.sysfs) == []


def test_the_endpoint_is_found_by_its_port(tree):
    memdev = (tree.sysfs / "bus/cxl/devices/mem1").resolve()
    endpoint = endpoint_of(memdev, tree.sysfs)
    assert endpoint is not None
    assert endpoint.name == "endpoint3"
    assert endpoint_of(memdev.parent, tree.sysfs) is None
