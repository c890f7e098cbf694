"""Device DAX instances, from trees like the kernel's."""

import pytest

from pmemkit.bus.dax import dax_device, dax_devices
from pmemkit.errors import InvalidArgument
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
BLOCK = 128 * MIB


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def namespace_device(tree, driver="device_dax", **more):
    place = "platform/ndbus0/region1/dax1.0"
    tree.device("nd", place, namespace="namespace1.0")
    values = {
        "size": 502 * MIB,
        "align": 4096,
        "target_node": 2,
        "resource": hex(32 * BLOCK + 10 * MIB),
        "mapping0__start": hex(32 * BLOCK + 10 * MIB),
        "mapping0__end": hex(36 * BLOCK - 1),
    }
    return tree.device("dax", f"{place}/dax1.0", driver=driver, **{**values, **more})


def test_the_device_of_a_namespace(tree):
    namespace_device(tree)
    (device,) = dax_devices(tree.sysfs)
    assert (device.dev, device.mode, device.owner) == ("dax1.0", "devdax", "namespace1.0")
    assert device.kind == "namespace"
    assert (device.size, device.align, device.target_node) == (502 * MIB, 4096, 2)
    assert device.ranges == ((32 * BLOCK + 10 * MIB, 36 * BLOCK),)
    assert device.blocks(tree.sysfs) == []


def test_memory_has_the_blocks_inside_it(tree):
    namespace_device(tree, driver="kmem")
    for number in range(31, 38):
        tree.block(number, "online", "Movable")
    device = dax_device("dax1.0", tree.sysfs)
    assert device.mode == "system-ram"
    assert [each.number for each in device.blocks(tree.sysfs)] == [33, 34, 35]


def test_the_device_of_a_cxl_region_has_no_driver_at_first(tree):
    place = "platform/root0/decoder0.0/region0/dax_region0/dax0.0"
    tree.device("dax", place, size=256 * MIB, resource="0x110000000", target_node=1)
    (device,) = dax_devices(tree.sysfs)
    assert (device.mode, device.kind, device.owner) == ("disabled", "cxl", "region0")
    assert device.ranges == ((0x110000000, 0x120000000),)


def test_the_device_of_a_range_that_firmware_set_aside(tree):
    tree.device("dax", "platform/hmem.0/dax3.0", size=MIB, driver="device_dax")
    (device,) = dax_devices(tree.sysfs)
    assert (device.kind, device.owner) == ("hmem", "hmem.0")
    assert device.ranges == ()


def test_seeds_are_left_out_and_numbers_are_sorted(tree):
    for number in (10, 2, 1):
        tree.device("dax", f"platform/hmem.{number}/dax{number}.0", size=MIB)
    tree.device("dax", "platform/hmem.1/dax1.1", size=0)
    assert [each.dev for each in dax_devices(tree.sysfs)] == ["dax1.0", "dax2.0", "dax10.0"]


@pytest.mark.parametrize("value", ["", "zebra", "-5", "0x", "9" * 500, "\x00"])
def test_odd_values_are_unknown(tree, value):
    namespace_device(
        tree, align=value, target_node=value, resource=value, mapping0__start=value, driver="odd"
    )
    (device,) = dax_devices(tree.sysfs)
    assert (device.mode, device.driver) == ("disabled", "odd")
    assert device.align is None
    assert device.target_node is None
    assert device.ranges == ()
    namespace_device(tree, size=value)
    assert dax_devices(tree.sysfs) == []


def test_several_mappings_are_several_ranges(tree):
    namespace_device(tree, mapping1__start="0x1000", mapping1__end="0x1fff")
    device = dax_device("dax1.0", tree.sysfs)
    assert device.ranges[0] == (0x1000, 0x2000)
    assert len(device.ranges) == 2


@pytest.mark.parametrize("name", ["dax9.0", "../../..", "dax1.0/../dax1.0", "", "pmem0"])
def test_a_name_is_checked(tree, name):
    namespace_device(tree)
    with pytest.raises(InvalidArgument, match="is no DAX device of this machine"):
        dax_device(name, tree.sysfs)
