"""Memory maps, nodes, tiers and CDAT; what a table or a file says wrongly says nothing."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.bus.evidence_firmware import (
    CdatFigure,
    CdatRange,
    cdat_of,
    map_evidence,
    node_evidence,
    parse_cdat,
)
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
GIB = 1 << 30

# Of guests in QEMU: 6.1 with `memmap=64M!2G` and two NVDIMMs, 6.12 with CXL regions; shortened.
IOMEM = """\
00001000-0009fbff : System RAM
00100000-7fffffff : System RAM
  01000000-01e01d31 : Kernel code
80000000-83ffffff : Persistent Memory (legacy)
  80000000-83ffffff : namespace0.0
84000000-bffdefff : System RAM
100000000-103ffffff : Persistent Memory
  100000000-103ffffff : namespace1.0
110000000-18fffffff : CXL Window 0
  110000000-11fffffff : Persistent Memory
    110000000-11fffffff : region0
  120000000-12fffffff : region1
    120000000-12fffffff : dax1.0
      120000000-12fffffff : System RAM (kmem)
200000000-23fffffff : Soft Reserved
"""


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    (tree.proc / "iomem").write_text(IOMEM)
    return tree


def shown(found):
    assert all((each.says, each.strength) == (None, "hint") for each in found)
    return {each.source: each.value for each in found}


def maps(tree, start, size):
    return shown(map_evidence(((start, start + size),), tree.sysfs, tree.proc))


# --- memory maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "kinds"),
    [
        (2 * GIB, "Persistent Memory (legacy)"),
        (4 * GIB, "Persistent Memory"),
        (0x110000000, "CXL Window 0, Persistent Memory"),
        (0x120000000, "CXL Window 0, System RAM (kmem)"),
        (8 * GIB, "Soft Reserved"),
        (0x84000000, "System RAM"),
    ],
)
def test_what_the_kernel_uses_a_range_as(tree, start, kinds):
    assert maps(tree, start, 64 * MIB) == {"/proc/iomem": kinds}


def test_ranges_beside_it_do_not_count(tree):
    assert maps(tree, 0x83FFFFFF, 1) == {"/proc/iomem": "Persistent Memory (legacy)"}
    assert maps(tree, 0x7FFFFFFF, 1) == {"/proc/iomem": "System RAM"}
    assert maps(tree, 0x190000000, GIB) == {}


def test_without_root_addresses_are_zeros_and_say_nothing(tree):
    lines = (f"00000000-00000000 : {line.partition(' : ')[2]}" for line in IOMEM.splitlines())
    (tree.proc / "iomem").write_text("\n".join(lines))
    assert maps(tree, 0, 4 * GIB) == {}


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b"5-4 : System RAM\n", b"x-y : System RAM\n"])
def test_an_odd_map_says_nothing(tree, text):
    (tree.proc / "iomem").write_bytes(text)
    assert maps(tree, 0, 4 * GIB) == {}
    (tree.proc / "iomem").unlink()
    assert maps(tree, 0, 4 * GIB) == {}


def add_firmware_map(tree, number, start, end, kind):
    place = tree.sysfs / "firmware/memmap" / str(number)
    for name, value in (("start", hex(start)), ("end", hex(end)), ("type", kind)):
        tree.put(place / name, value)


def test_ram_that_the_kernel_calls_persistent_is_emulated(tree):
    add_firmware_map(tree, 0, 0x100000, 0xBFFDEFFF, "System RAM")
    add_firmware_map(tree, 1, 4 * GIB, 5 * GIB - 1, "Persistent Memory")
    add_firmware_map(tree, 2, 8 * GIB, 7 * GIB, "System RAM")
    assert maps(tree, 2 * GIB, 64 * MIB)["memory map of the firmware"] == (
        "System RAM: what the kernel calls persistent is emulated in RAM"
    )
    assert maps(tree, 4 * GIB, 64 * MIB)["memory map of the firmware"] == "Persistent Memory"
    # What hides in RAM but is not called persistent is not emulated.
    assert maps(tree, 0x84000000, MIB)["memory map of the firmware"] == "System RAM"


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("memmap=64M!2G", "memmap=64M!2G"),
        ("memmap=0x4000000!0x80000000", "memmap=0x4000000!0x80000000"),
        ("memmap=1G!8G,64M!2G", "memmap=64M!2G"),
        ("memmap=exactmap,0x40m!0x2g", "memmap=0x40m!0x2g"),
    ],
)
def test_the_command_line_can_make_persistent_memory_of_ram(tree, argument, part):
    (tree.proc / "cmdline").write_text(f"root=/dev/sda1 {argument} quiet\n")
    (found,) = (
        each
        for each in map_evidence(((2 * GIB, 2 * GIB + MIB),), tree.sysfs, tree.proc)
        if each.source == "kernel command line"
    )
    assert found.value == (
        f"emulated in RAM: {part} takes 64 MiB of it at 0x80000000; it is lost at power-off"
    )
    assert found.otherwise == f"no {part} on the kernel command line: it is ordinary RAM then"


@pytest.mark.parametrize(
    "argument",
    ["memmap=64M@2G", "memmap=64M$2G", "memmap=!", "memmap=64M!", "memmap=x!y", "xmemmap=64M!2G"],
)
def test_other_arguments_emulate_nothing(tree, argument):
    (tree.proc / "cmdline").write_text(argument)
    assert "kernel command line" not in maps(tree, 2 * GIB, MIB)


# --- nodes ----------------------------------------------------------------------------------------


def test_hmat_and_place_of_a_node(tree):
    node = tree.node(2, MemTotal=4096)
    tree.put(node / "cpulist", "")
    tree.put(node / "distance", "20 30 10")
    for name, value in (
        ("read_latency", 170),
        ("write_latency", 0),
        ("read_bandwidth", 20000),
        ("write_bandwidth", "odd"),
    ):
        tree.put(node / "access0/initiators" / name, value)
    tiers = tree.sysfs / "devices/virtual/memory_tiering"
    tree.put(tiers / "memory_tier4/nodelist", "0-1")
    tree.put(tiers / "memory_tier22/nodelist", "2,5-7")
    assert shown(node_evidence(2, tree.sysfs)) == {
        "HMAT of node 2": "read latency 170 ns, read bandwidth 20000 MiB/s",
        "SRAT and SLIT": "target node 2, without processors, distances 20 30 10",
        "memory tier": "memory_tier22",
    }
    assert shown(node_evidence(1, tree.sysfs))["memory tier"] == "memory_tier4"
    assert shown(node_evidence(6, tree.sysfs))["memory tier"] == "memory_tier22"
    assert "memory tier" not in shown(node_evidence(4, tree.sysfs))


def test_the_older_name_of_a_tiers_nodes(tree):
    tree.put(tree.sysfs / "devices/virtual/memory_tiering/memory_tier4/nodes", "3")
    assert shown(node_evidence(3, tree.sysfs))["memory tier"] == "memory_tier4"


def test_a_node_that_memory_would_make(tree):
    assert shown(node_evidence(1, tree.sysfs)) == {
        "SRAT and SLIT": "target node 1, without memory so far"
    }
    tree.put(tree.node(0) / "cpulist", "0-3")
    assert shown(node_evidence(0, tree.sysfs)) == {
        "SRAT and SLIT": "target node 0, with processors"
    }


@pytest.mark.parametrize("number", [None, -1])
def test_no_node_says_nothing(tree, number):
    assert node_evidence(number, tree.sysfs) == []


# --- CDAT -----------------------------------------------------------------------------------------

# As Linux 6.12 has it in sysfs of a device that QEMU 10.0 emulates: 256 MiB volatile at 0, and
# 256 MiB persistent behind them; with four DSLBIS and one DSEMTS each.
QEMU = bytes.fromhex("""
    30 01 00 00 02 10 00 00 00 00 00 00 00 00 00 00
    00 00 18 00 00 00 00 00 00 00 00 00 00 00 00 00
    00 00 00 10 00 00 00 00 01 00 18 00 00 00 01 00
    10 27 00 00 00 00 00 00 0f 00 00 00 00 00 00 00
    01 00 18 00 00 00 02 00 10 27 00 00 00 00 00 00
    19 00 00 00 00 00 00 00 01 00 18 00 00 00 04 00
    e8 03 00 00 00 00 00 00 10 00 00 00 00 00 00 00
    01 00 18 00 00 00 05 00 e8 03 00 00 00 00 00 00
    10 00 00 00 00 00 00 00 04 00 18 00 00 01 00 00
    00 00 00 00 00 00 00 00 00 00 00 10 00 00 00 00
    00 00 18 00 01 04 00 00 00 00 00 10 00 00 00 00
    00 00 00 10 00 00 00 00 01 00 18 00 01 00 01 00
    10 27 00 00 00 00 00 00 0f 00 00 00 00 00 00 00
    01 00 18 00 01 00 02 00 10 27 00 00 00 00 00 00
    19 00 00 00 00 00 00 00 01 00 18 00 01 00 04 00
    e8 03 00 00 00 00 00 00 10 00 00 00 00 00 00 00
    01 00 18 00 01 00 05 00 e8 03 00 00 00 00 00 00
    10 00 00 00 00 00 00 00 04 00 18 00 01 02 00 00
    00 00 00 00 00 00 00 00 00 00 00 10 00 00 00 00
""")
PERFORMANCE = (
    CdatFigure("read latency", 150, "ns"),
    CdatFigure("write latency", 250, "ns"),
    CdatFigure("read bandwidth", 16000, "MB/s"),
    CdatFigure("write bandwidth", 16000, "MB/s"),
)
PURPOSE = "conventional memory for a specific purpose"


def test_the_table_of_a_device_with_two_parts():
    table = parse_cdat(QEMU)
    assert table is not None
    assert table.ranges == (
        CdatRange(0, 0, 256 * MIB, False, PERFORMANCE, PURPOSE),
        CdatRange(1, 256 * MIB, 256 * MIB, True, PERFORMANCE, "reserved"),
    )


def test_of_a_region_only_its_own_range_speaks():
    table = parse_cdat(QEMU)
    (volatile, more) = table.evidence("mem0", ((0, 256 * MIB),))
    assert (volatile.says, volatile.strength) == ("memory", "firmware")
    assert (volatile.source, volatile.value) == ("CDAT of mem0", "volatile (256 MiB at 0x0)")
    assert (more.says, more.strength) == (None, "hint")
    assert more.value == (
        "read latency 150 ns, write latency 250 ns, read bandwidth 16000 MB/s, "
        f"write bandwidth 16000 MB/s, EFI: {PURPOSE} (256 MiB at 0x0)"
    )
    (persistent, _) = table.evidence("mem0", ((256 * MIB, 257 * MIB),))
    assert (persistent.says, persistent.strength) == ("storage", "firmware")
    both = table.evidence("mem0", ((255 * MIB, 257 * MIB),))
    assert {each.says for each in both} == {"memory", "storage", None}
    assert table.evidence("mem0", ((512 * MIB, GIB),)) == []


def test_where_the_range_is_not_known_no_range_decides():
    found = parse_cdat(QEMU).evidence("mem0", ())
    assert len(found) == 4
    assert all((each.says, each.strength) == (None, "hint") for each in found)


def test_the_table_of_a_device_is_found_by_its_endpoint(tree):
    for number in (0, 1):
        place = tree.device("cxl", f"pci0000:0c/mem{number}")
        endpoint = tree.device("cxl", f"root0/port1/endpoint{number + 2}")
        (endpoint / "uport").symlink_to(place)
    (tree.sysfs / "bus/cxl/devices/endpoint3/CDAT").write_bytes(QEMU)
    assert cdat_of("mem1", tree.sysfs) == parse_cdat(QEMU)
    assert cdat_of("mem0", tree.sysfs) is None
    assert cdat_of("mem7", tree.sysfs) is None


def sealed(*records, length=None, revision=2):
    """A table with a checksum that is right."""
    body = b"".join(records)
    length = 16 + len(body) if length is None else length
    head = struct.pack("<IBB6xI", length, revision, 0, 0)
    return struct.pack("<IBB6xI", length, revision, -sum(head + body) % 256, 0) + body


def dsmas(handle, flags, start, length):
    return struct.pack("<BxHBBxxQQ", 0, 24, handle, flags, start, length)


def dslbis(handle, what, unit, value, flags=0):
    return struct.pack("<BxHBBBxQ3H2x", 1, 24, handle, flags, what, unit, value, 0, 0)


def performance(*records):
    (only,) = parse_cdat(sealed(dsmas(1, 0, 0, MIB), *records)).ranges
    return tuple(map(str, only.performance))


def test_latency_and_bandwidth_in_their_units():
    assert performance(dslbis(1, 0, 1, 500)) == ("latency 0.5 ns",)
    assert performance(dslbis(1, 3, 1024, 2)) == ("bandwidth 2048 MB/s",)


def test_figures_of_others_or_of_none_are_left_out():
    assert performance(dslbis(2, 1, 1000, 100)) == ()
    assert performance(dslbis(1, 1, 1000, 0), dslbis(1, 2, 1000, 0xFFFF)) == ()
    assert performance(dslbis(1, 99, 1000, 1)) == ()
    # Of a cache in front of the memory.
    assert performance(dslbis(1, 1, 1000, 100, flags=1)) == ()


@pytest.mark.parametrize(
    "table",
    [
        b"",
        QEMU[:15],
        QEMU[:-1],
        QEMU[:5] + b"\0" + QEMU[6:],
        sealed(length=8),
        sealed(b"\0\0"),
        sealed(struct.pack("<BxH", 0, 3)),
        sealed(struct.pack("<BxH", 0, 0)),
        sealed(struct.pack("<BxH", 0, 24)),
    ],
)
def test_what_is_no_table(table):
    assert parse_cdat(table) is None


def test_bytes_behind_the_table_and_records_of_other_kinds_or_lengths_do_not_matter():
    assert parse_cdat(QEMU + b"\xff" * 7) == parse_cdat(QEMU)
    short = struct.pack("<BxHI", 0, 8, 0)
    other = struct.pack("<BxH20x", 200, 24)
    assert parse_cdat(sealed(short, other)).ranges == ()


@given(st.binary(max_size=80), st.lists(st.tuples(st.integers(0, 303), st.integers(0, 255))))
def test_any_bytes_are_a_table_or_none(noise, changes):
    parse_cdat(noise)
    table = bytearray(QEMU)
    for place, value in changes:
        table[place] = value
    table[5] = 0
    table[5] = -sum(table[: int.from_bytes(table[:4], "little")]) % 256
    found = parse_cdat(bytes(table))
    if found is not None:
        found.evidence("mem0", ())
