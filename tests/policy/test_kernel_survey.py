"""The survey: trees like the kernel's become regions, namespaces and devices; odd ones, too."""

import json
import os
import random
import shutil

import pytest
from fake_kernel import BLOCK, FakeKernel

from pmemkit.bus.declarations import parse_declarations
from pmemkit.policy.kernel_actions import KernelActions
from pmemkit.policy.kernel_survey import survey
from pmemkit.policy.model import VERBS, Content, as_plain
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20


BUS = "platform/ndbus0"


@pytest.fixture
def tree(tmp_path):
    """Region 0 with a file system on fsdax, region 1 with device DAX that is system RAM."""
    kernel = FakeKernel(tmp_path)
    add_regions(kernel.tree, BUS)
    add_fsdax(kernel.tree, BUS)
    add_memory(kernel, kernel.tree, BUS)
    return kernel.tree


def add_regions(tree, bus):
    tree.device("nd", bus, provider="ACPI.NFIT")
    for number in (0, 1):
        tree.device(
            "nd",
            f"{bus}/nmem{number}",
            flags="label",
            commands="get_size get_data set_data",
            nfit__id=f"8680-{number}",
            nfit__serial=f"0x{number + 1}",
            nfit__handle=f"0x{number + 1}",
        )
        tree.device(
            "nd",
            f"{bus}/region{number}",
            driver="nd_region",
            uevent="DEVTYPE=nd_pmem",
            size=512 * MIB,
            available_size=64 * MIB,
            max_available_extent=32 * MIB,
            align="0x1000000",
            nstype=5,
            mappings=1,
            mapping0=f"nmem{number},0,{512 * MIB},0",
            numa_node=0,
            target_node=number + 1,
            persistence_domain="memory_controller",
        )


def add_fsdax(tree, bus):
    tree.device(
        "nd",
        f"{bus}/region0/namespace0.0",
        size=128 * MIB,
        mode="memory",
        holder="pfn0.0",
        holder_class="pfn",
        alt_name="data",
        uuid="11111111-1111-1111-1111-111111111111",
        resource="0x100000000",
    )
    tree.device(
        "nd",
        f"{bus}/region0/pfn0.0",
        driver="nd_pmem",
        size=126 * MIB,
        mode="pmem",
        align=2 * MIB,
        uuid="22222222-2222-2222-2222-222222222222",
        block__pmem0__size=1,
    )
    disk = bytearray(MIB)
    disk[0x438:0x43A] = b"\x53\xef"
    (tree.dev / "pmem0").write_bytes(disk)
    tree.disk("pmem0", "259:0")
    tree.put(tree.proc / "self/mountinfo", "30 1 259:0 / /data rw - ext4 /dev/pmem0 rw")


def add_memory(kernel, tree, bus):
    tree.device(
        "nd",
        f"{bus}/region1/namespace1.0",
        size=512 * MIB,
        mode="dax",
        holder="dax1.0",
        holder_class="dax",
    )
    tree.device("nd", f"{bus}/region1/dax1.0", driver="dax_pmem", size=3 * BLOCK, mode="pmem")
    kernel.add_dax()
    shutil.move(tree.sysfs / "devices/platform/ndbus0/region1/dax1.0/dax1.0/mapping0", tree.root)
    tree.put(kernel.dax / "resource", hex(32 * BLOCK))
    kernel.become_memory()
    for number in range(8):
        tree.block(number, "online", "Normal", node=0)
    tree.node(0, MemTotal=8 * BLOCK >> 10, MemFree=4096)
    tree.node(2, MemTotal=3 * BLOCK >> 10, MemFree=4096)
    tree.put(kernel.memory / "auto_online_blocks", "online")


def observe(tree):
    return survey(tree.sysfs, tree.proc, tree.dev)


def test_a_region_with_a_file_system(tree):
    machine = observe(tree)
    region = machine.region("region0")
    assert (region.size, region.available, region.largest) == (512 * MIB, 64 * MIB, 32 * MIB)
    assert (region.align, region.labelled, region.label_room) == (16 * MIB, True, True)
    assert (region.node, region.target_node) == (0, 1)
    assert (region.persistence, region.nature) == ("memory_controller", "storage")
    (dimm,) = region.dimms
    assert (dimm.dev, dimm.id, dimm.serial, dimm.handle) == ("nmem0", "8680-0", 1, 1)
    (namespace,) = region.namespaces
    assert (namespace.mode, namespace.map, namespace.name) == ("fsdax", "dev", "data")
    assert (namespace.size, namespace.capacity) == (128 * MIB, 126 * MIB)
    assert (namespace.align, namespace.uuid) == (2 * MIB, "22222222-2222-2222-2222-222222222222")
    assert namespace.content == Content(kind="filesystem", name="ext2")
    assert namespace.mounts == ("/data",)
    assert namespace.damaged is None


def test_a_region_that_is_memory(tree):
    (namespace,) = observe(tree).region("region1").namespaces
    assert namespace.mode == "devdax"
    assert (namespace.dax.mode, namespace.dax.blocks, namespace.dax.online) == ("system-ram", 3, 3)
    assert (namespace.dax.zone, namespace.dax.target_node) == ("movable", 2)
    assert namespace.content is None
    assert namespace.damaged is None


def test_the_machine(tree):
    machine = observe(tree)
    assert machine.bus == "kernel"
    assert (machine.dram, machine.dram_free) == (8 * BLOCK, 4096 << 10)
    assert (machine.block_size, machine.auto_online) == (BLOCK, "online")
    assert machine.verbs == frozenset(VERBS)
    assert json.loads(json.dumps(as_plain(machine)))["bus"] == "kernel"


def test_who_has_a_device_open(tree):
    tree.process(120, "fio", opened="/dev/pmem0")
    (namespace,) = observe(tree).region("region0").namespaces
    assert namespace.holders == ("process fio (120)",)


def test_a_disabled_namespace_is_not_taken_for_an_empty_one(tree):
    tree.bind("nd", tree.sysfs / "bus/nd/devices/pfn0.0", None)
    (namespace,) = observe(tree).region("region0").namespaces
    assert (namespace.enabled, namespace.content) == (False, None)
    assert namespace.damaged == "it is disabled, so that what is on it cannot be read"


def test_a_namespace_whose_info_block_is_gone(tree):
    place = tree.sysfs / "devices/platform/ndbus0/region0/namespace0.0"
    tree.put(place / "holder", "")
    tree.put(place / "mode", "raw")
    tree.put(place / "block/pmem0/size", 1)
    tree.bind("nd", place, "nd_pmem")
    (namespace,) = observe(tree).region("region0").namespaces
    assert namespace.mode == "fsdax"
    assert namespace.damaged == "its label says fsdax, but it has no valid info block"


def test_a_device_that_cannot_be_read_is_not_taken_for_an_empty_one(tree):
    (tree.dev / "pmem0").unlink()
    (namespace,) = observe(tree).region("region0").namespaces
    assert namespace.content is None
    assert namespace.damaged.startswith("it cannot be read: ")


def test_regions_without_labels(tree):
    place = tree.sysfs / "devices/platform/ndbus0/region0"
    tree.put(place / "nstype", 4)
    region = observe(tree).region("region0")
    assert (region.labelled, region.label_room) == (False, True)
    assert (region.available, region.largest) == (0, 0)
    tree.put(place / "mappings", 0)
    region = observe(tree).region("region0")
    assert (region.dimms, region.label_room) == ((), False)


def test_read_only_regions_are_fixed(tree):
    tree.put(tree.sysfs / "devices/platform/ndbus0/region0/read_only", 1)
    assert observe(tree).region("region0").fixed == "the kernel has it read-only"


def test_what_the_owner_declares(tree):
    text = '[[dimm]]\nregion = "region1"\nnature = "memory"\nendurance = "1P"\n'
    declarations = parse_declarations(text, "machine.toml")
    machine = survey(tree.sysfs, tree.proc, tree.dev, declarations)
    region = machine.region("region1")
    assert (region.nature, region.wears, region.endurance) == ("memory", True, 1 << 50)
    assert not machine.region("region0").wears


def test_what_devices_report_of_their_health(tree):
    def run(argv, *, timeout_seconds, given=b""):
        assert argv[0] == "ndctl"
        return b'[{"dev": "nmem0", "health": {"life_used_percentage": 7}}]'

    machine = survey(tree.sysfs, tree.proc, tree.dev, run=run)
    region = machine.region("region0")
    assert (region.nature, region.wears, region.life_used) == ("storage", True, 7)


def test_a_range_that_firmware_set_aside(tree):
    tree.device("dax", "platform/hmem.4/dax4.0", size=BLOCK, align=2 * MIB, target_node=3)
    region = observe(tree).region("hmem.4")
    assert (region.type, region.nature, region.size) == ("volatile", "memory", BLOCK)
    assert region.devices[0].mode == "disabled"


def test_nothing_there(tmp_path):
    machine = observe(Tree(tmp_path))
    assert machine.regions == ()
    assert machine.dram is None


def test_nothing_is_changed(tree):
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in tree.root.rglob("*"))
    observe(tree)
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tree.root.rglob("*")) == before


VALUES = (
    "",
    "zebra",
    "-1",
    "0x",
    "9" * 400,
    "\x00",
    "../../../etc/passwd",
    "\xff\xfe",
    "a" * 70000,
)


def test_odd_values_never_end_the_survey(tree, scale):
    """Any attribute, any of the odd values; several of them at once, too."""
    choose = random.Random("odd sysfs")
    files = sorted(
        path
        for path in (tree.root / "sys").rglob("*")
        if path.is_file() and not path.is_symlink() and "/block/" not in str(path)
    )
    for _ in range(scale(150, 3000)):
        changed = {path: path.read_bytes() for path in choose.sample(files, choose.choice((1, 4)))}
        for path in changed:
            path.write_bytes(choose.choice(VALUES).encode("latin-1"))
        try:
            machine = observe(tree)
        except BaseException:
            print({str(path): path.read_bytes()[:40] for path in changed})
            raise
        assert json.dumps(as_plain(machine))
        for path, data in changed.items():
            path.write_bytes(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_this_machine_can_be_looked_at():
    assert KernelActions().observe().bus == "kernel"
