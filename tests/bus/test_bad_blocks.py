"""The kernel's bad blocks, as ``ndctl list`` shows them."""

import pytest

from pmemkit.bus import kernel_bus, listing
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
START = 4 << 30


@pytest.fixture
def machine(tmp_path):
    tree = Tree(tmp_path)
    tree.device("nd", "ndbus0", provider="ACPI.NFIT")
    region = "8 2\n65546 1\nnonsense\n98304 4"
    tree.device("nd", "ndbus0/region0", size=64 * MIB, resource=hex(START), badblocks=region)
    for number, mode in enumerate(("raw", "safe", "memory")):
        place, start = f"ndbus0/region0/namespace0.{number}", START + 16 * MIB * number
        holder = {"raw": "", "safe": "btt0.0", "memory": "pfn0.0"}[mode]
        name = f"namespace0.{number}"
        tree.device(
            "nd", place, size=16 * MIB, mode=mode, resource=hex(start), holder=holder, alt_name=name
        )
    tree.device("nd", "ndbus0/region0/btt0.0", size=15 * MIB)
    # 32 MiB and the 5120 bytes before the data: block 65546 is the first of namespace0.2's data.
    data = hex(START + 32 * MIB + 5120)
    tree.device("nd", "ndbus0/region0/pfn0.0", size=10 * MIB, resource=data, mode="pmem")
    return tree


def shown(machine, **options):
    (region,) = listing(kernel_bus(machine.sysfs, **options), regions=True, namespaces=True)[
        "regions"
    ]
    return region, {each["dev"]: each for each in region["namespaces"]}


def test_counts_are_shown_and_places_where_they_are_asked_for(machine):
    region, namespaces = shown(machine)
    assert region["badblock_count"] == 7
    assert "badblocks" not in region
    counts = [each.get("badblock_count") for each in namespaces.values()]
    assert counts == [2, None, 1]
    region, namespaces = shown(machine, media_errors=True)
    assert region["badblocks"] == [
        {"offset": 8, "length": 2},
        {"offset": 65546, "length": 1},
        {"offset": 98304, "length": 4},
    ]
    assert namespaces["namespace0.0"]["badblocks"] == [{"offset": 8, "length": 2}]
    assert namespaces["namespace0.2"]["badblocks"] == [{"offset": 0, "length": 1}]


def test_of_mode_sector_only_the_count_is_shown(machine):
    machine.put(machine.sysfs / "devices/ndbus0/region0/badblocks", "32768 3")
    _, namespaces = shown(machine, media_errors=True)
    assert namespaces["namespace0.1"]["badblock_count"] == 3
    assert "badblocks" not in namespaces["namespace0.1"]


def test_without_addresses_only_the_region_has_them(machine):
    machine.put(machine.sysfs / "devices/ndbus0/region0/resource", "0x0")
    region, namespaces = shown(machine, media_errors=True)
    assert region["badblock_count"] == 7
    assert not any("badblock_count" in each for each in namespaces.values())
