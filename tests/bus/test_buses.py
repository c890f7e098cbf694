"""What regions and namespaces there are: images, and a machine made of files."""

import os

import pytest

from pmemkit.bus import Bus, Namespace, Region, image_bus, kernel_bus, listing
from pmemkit.bus.evidence_kernel import kernel_evidence
from pmemkit.bus.nature import judge
from pmemkit.errors import InvalidArgument, NotSupported, SystemFailure

MIB = 1 << 20
UUID = "11111111-2222-3333-4444-555555555555"
BTT_UUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.img"
    path.touch()
    os.truncate(path, 64 * MIB)
    return str(path)


# --- images ---------------------------------------------------------------------------------------


def test_an_image_without_labels_is_one_raw_namespace(image):
    assert listing([image_bus([image])]) == [
        {
            "dev": "namespace0.0",
            "mode": "raw",
            "size": 64 * MIB,
            "sector_size": 512,
            "blockdev": "pmem0",
            "path": image,
        }
    ]


def test_each_image_is_a_region_of_its_own(image):
    bus = image_bus([image, image])
    assert [region.dev for region in bus.regions] == ["region0", "region1"]
    assert [each.namespaces[0].dev for each in bus.regions] == ["namespace0.0", "namespace1.0"]
    found = listing([bus], regions=True)
    assert [(row["dev"], row["size"], row["type"]) for row in found] == [
        ("region0", 64 * MIB, "pmem"),
        ("region1", 64 * MIB, "pmem"),
    ]
    assert all("namespaces" not in row for row in found)


def test_regions_with_their_namespaces_are_an_object(image):
    found = listing([image_bus([image])], regions=True, namespaces=True)
    assert list(found) == ["regions"]
    (region,) = found["regions"]
    assert [each["dev"] for each in region["namespaces"]] == ["namespace0.0"]


def test_sizes_for_people(image):
    (row,) = listing([image_bus([image])], human=True)
    assert row["size"] == "64.00 MiB (67.11 MB)"


def test_what_is_no_image(tmp_path):
    with pytest.raises(SystemFailure, match="No such file"):
        image_bus([str(tmp_path / "nothing")])
    with pytest.raises(NotSupported, match="neither a file nor"):
        image_bus([str(tmp_path)])


def test_records_are_frozen():
    namespace = Namespace(dev="namespace0.0", mode="raw", size=1)
    with pytest.raises(AttributeError):
        namespace.size = 2
    assert Region(dev="region0", size=1) == Region(dev="region0", size=1)


# --- the kernel -----------------------------------------------------------------------------------


class Machine:
    """A sysfs tree as the nd bus makes it: directories below their parents, links on the bus."""

    def __init__(self, root):
        self.root = root
        self.devices = root / "devices" / "platform" / "nfit"
        self.links = root / "bus" / "nd" / "devices"
        self.links.mkdir(parents=True)

    def add(self, place, driver=True, **attributes):
        path = self.devices / place
        path.mkdir(parents=True)
        if driver:
            (path / "driver").mkdir()
        for name, value in attributes.items():
            attribute = path / name.replace("__", "/")
            attribute.parent.mkdir(exist_ok=True)
            attribute.write_text(f"{value}\n")
        (self.links / path.name).symlink_to(path)
        return path


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path / "sys")
    machine.add("ndbus0", provider="ACPI.NFIT")
    machine.add("ndbus0/nmem0", nfit__id="8680-56341200", nfit__handle="0x1", nfit__phys_id="0x0")
    machine.add("ndbus0/nmem10", driver=False, nfit__handle="0xb")
    machine.add(
        "ndbus0/region0",
        size=64 * MIB,
        available_size=0,
        max_available_extent=0,
        mappings=1,
        mapping0=f"nmem0,0,{64 * MIB},0",
        numa_node=-1,
        set_cookie="0xdeadbeef",
        persistence_domain="memory_controller",
        uevent="DEVTYPE=nd_pmem\nDRIVER=nd_region",
    )
    return machine


def only_namespace(machine):
    (bus,) = kernel_bus(machine.root)
    (region,) = bus.regions
    (namespace,) = region.namespaces
    return namespace


def test_a_machine_without_nvdimms_has_no_bus(tmp_path):
    assert kernel_bus(tmp_path) == ()
    assert listing([]) == []
    assert listing([], regions=True, namespaces=True) == {"regions": []}


def test_a_raw_namespace(machine):
    place = machine.add(
        "ndbus0/region0/namespace0.0", size=64 * MIB, mode="raw", sector_size="", numa_node=1
    )
    (place / "block" / "pmem0").mkdir(parents=True)
    assert listing(kernel_bus(machine.root)) == [
        {
            "dev": "namespace0.0",
            "mode": "raw",
            "size": 64 * MIB,
            "sector_size": 512,
            "blockdev": "pmem0",
            "numa_node": 1,
        }
    ]


def test_a_region_with_its_mappings(machine):
    (region,) = listing(kernel_bus(machine.root), dimms=True, regions=True)["regions"]
    assert region == {
        "dev": "region0",
        "size": 64 * MIB,
        "available_size": 0,
        "max_available_extent": 0,
        "type": "pmem",
        "iset_id": 0xDEADBEEF,
        "persistence_domain": "memory_controller",
        "mappings": [{"dimm": "nmem0", "offset": 0, "length": 64 * MIB, "position": 0}],
    }


def test_dimms_are_ordered_by_number(machine):
    assert listing(kernel_bus(machine.root), dimms=True) == [
        {"dev": "nmem0", "id": "8680-56341200", "handle": 1, "phys_id": 0},
        {"dev": "nmem10", "handle": 11, "state": "disabled"},
    ]
    (first, _) = listing(kernel_bus(machine.root), dimms=True, human=True)
    assert (first["handle"], first["phys_id"]) == ("0x1", "0")


def test_a_sector_namespace_has_the_size_and_disk_of_its_btt(machine):
    machine.add(
        "ndbus0/region0/namespace0.0",
        size=64 * MIB,
        mode="safe",
        holder="btt0.0",
        uuid=UUID,
        alt_name="data",
    )
    place = machine.add("ndbus0/region0/btt0.0", size=60 * MIB, sector_size=4096, uuid=BTT_UUID)
    (place / "block" / "pmem0s").mkdir(parents=True)
    namespace = only_namespace(machine)
    assert (namespace.mode, namespace.map, namespace.size) == ("sector", None, 60 * MIB)
    assert (namespace.uuid, namespace.raw_uuid) == (BTT_UUID, UUID)
    assert (namespace.sector_size, namespace.blockdev) == (4096, "pmem0s")
    assert namespace.name == "data"


@pytest.mark.parametrize(
    ("where", "map_place"), [("ram", "mem"), ("pmem", "dev"), ("none", "none")]
)
def test_an_fsdax_namespace_says_where_its_page_map_is(machine, where, map_place):
    machine.add("ndbus0/region0/namespace0.0", size=64 * MIB, mode="memory", holder="pfn0.0")
    machine.add("ndbus0/region0/pfn0.0", size=63 * MIB, mode=where)
    namespace = only_namespace(machine)
    assert (namespace.mode, namespace.map, namespace.size) == ("fsdax", map_place, 63 * MIB)


def test_legacy_memory_is_fsdax_without_an_info_block(machine):
    machine.add("ndbus0/region0/namespace0.0", size=64 * MIB, mode="memory", holder="")
    namespace = only_namespace(machine)
    assert (namespace.mode, namespace.map) == ("fsdax", "mem")


@pytest.mark.parametrize("below", ["dax/dax0.0", "dax0.0"])
def test_a_devdax_namespace_has_a_character_device(machine, below):
    machine.add("ndbus0/region0/namespace0.0", size=64 * MIB, mode="dax", holder="dax0.1")
    place = machine.add("ndbus0/region0/dax0.1", size=62 * MIB, mode="pmem")
    (place / below).mkdir(parents=True)
    namespace = only_namespace(machine)
    assert (namespace.mode, namespace.chardev) == ("devdax", "dax0.0")
    assert (namespace.sector_size, namespace.blockdev) == (None, None)


def test_seeds_are_no_namespaces(machine):
    machine.add("ndbus0/region0/namespace0.0", size=0, mode="raw")
    (bus,) = kernel_bus(machine.root)
    assert bus.regions[0].namespaces == ()


def test_what_no_driver_has_is_disabled(machine):
    machine.add("ndbus0/region0/namespace0.0", driver=False, size=64 * MIB, mode="raw")
    assert only_namespace(machine).state == "disabled"


def test_attributes_that_do_not_read_are_left_out(machine):
    region = machine.devices / "ndbus0" / "region0"
    (region / "size").write_text("many\n")
    (region / "mapping0").write_text("nmem0,x\n")
    (region / "persistence_domain").write_bytes(b"\xff\xfe")
    (bus,) = kernel_bus(machine.root)
    (found,) = bus.regions
    assert (found.size, found.mappings, found.persistence_domain) == (0, (), "unknown")


def test_two_buses_keep_their_own(machine):
    machine.add("ndbus1", provider="e820")
    machine.add("ndbus1/region1", size=MIB, uevent="DEVTYPE=nd_volatile")
    first, second = kernel_bus(machine.root)
    assert [each.dev for each in first.regions] == ["region0"]
    assert [(each.dev, each.type) for each in second.regions] == [("region1", "volatile")]
    assert isinstance(second, Bus)
    assert second.provider == "e820"


# --- nature of the machine's regions --------------------------------------------------------------


def test_a_persistent_nfit_range_is_storage(machine):
    verdict = judge(kernel_evidence("region0", machine.root))
    assert (verdict.nature, verdict.because) == (
        "storage",
        "firmware (NFIT) says a persistent range",
    )
    assert "memory_controller" in {each.value for each in verdict.evidence}


def test_a_volatile_range_is_memory(machine):
    machine.add("ndbus0/region1", uevent="DEVTYPE=nd_volatile", size=MIB)
    assert judge(kernel_evidence("region1", machine.root)).nature == "memory"


def test_what_firmware_only_reserves_is_storage_because_nothing_is_known(machine):
    machine.add("ndbus1", provider="e820")
    machine.add("ndbus1/region2", uevent="DEVTYPE=nd_pmem", size=MIB)
    verdict = judge(kernel_evidence("region2", machine.root))
    assert verdict.nature == "storage"
    assert "taken for storage" in verdict.because


def test_hmat_is_shown_and_decides_nothing(machine):
    machine.add("ndbus0/region3", uevent="DEVTYPE=nd_pmem", size=MIB, target_node=2)
    access = machine.root / "devices/system/node/node2/access0/initiators"
    access.mkdir(parents=True)
    (access / "read_latency").write_text("250\n")
    (access / "write_bandwidth").write_text("4000\n")
    shown = [each for each in kernel_evidence("region3", machine.root) if "HMAT" in each.source]
    assert [(each.value, each.says) for each in shown] == [
        ("read latency 250 ns, write bandwidth 4000 MiB/s", None)
    ]


def test_a_region_that_is_not_there(machine):
    with pytest.raises(InvalidArgument, match="'region9' is no region"):
        kernel_evidence("region9", machine.root)
