"""The nature of regions from trees like the kernel's: NFIT, e820, virtio-pmem, CXL, hmem.

``tests/kernel/test_explain_guest.py`` shows that real kernels have such trees.
"""

import random
import struct

import pytest
from test_cxl import ROOT, add_memdev, add_region

from pmemkit.bus.declarations import DECLARATIONS, parse_declarations
from pmemkit.bus.evidence_health import Health
from pmemkit.bus.evidence_kernel import (
    find_region,
    kernel_evidence,
    region_names,
    region_of_device,
    verdict_of,
)
from pmemkit.bus.nature import judge
from pmemkit.bus.verdicts import machine_verdicts
from pmemkit.errors import InvalidArgument, NotSupported
from pmemkit.testing.sysfs_tree import Tree

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    tree.put(tree.proc / "iomem", "100000000-103ffffff : Persistent Memory")
    return tree


def add_bus(tree, number, *, provider, driver, bus="platform"):
    place = f"{driver}.{number}"
    tree.device(bus, place, driver=driver)
    tree.device("nd", f"{place}/ndbus{number}", provider=provider)
    return f"{place}/ndbus{number}"


def add_nd_region(tree, bus, name, kind="nd_pmem", **attributes):
    values = {"size": 64 * MIB, "mappings": 0, "persistence_domain": "memory_controller"}
    tree.device("nd", f"{bus}/{name}", uevent=f"DEVTYPE={kind}", **{**values, **attributes})


def add_dimm(tree, bus, number, **attributes):
    """As QEMU has it."""
    serial = f"{0x56 + number:02x}341200"
    values = {
        "nfit__id": f"8680-{serial}",
        "nfit__serial": f"0x{serial}",
        "nfit__handle": hex(number + 1),
        "nfit__format": "0x0301",
    }
    tree.device("nd", f"{bus}/nmem{number}", **{**values, **attributes})


@pytest.fixture
def nfit(tree):
    """Two dimms with a region each, and one region of both."""
    bus = add_bus(tree, 0, provider="ACPI.NFIT", driver="nfit", bus="acpi")
    for number in (0, 1):
        add_dimm(tree, bus, number)
        mapping = f"nmem{number},0,{64 * MIB},0"
        add_nd_region(tree, bus, f"region{number}", mappings=1, mapping0=mapping)
    both = {f"mapping{n}": f"nmem{n},{64 * MIB},{64 * MIB},{n}" for n in (0, 1)}
    add_nd_region(tree, bus, "region2", mappings=2, target_node=3, **both)
    return tree


def verdict(tree, name, text="", health=None):
    declared = parse_declarations(text, "m.toml") if text else ()
    return verdict_of(name, tree.sysfs, tree.proc, declared, health)


def shown(found):
    return {each.source: each.value for each in found.evidence}


# --- the nvdimm bus -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "driver", "kind", "nature", "because"),
    [
        ("ACPI.NFIT", "nfit", "nd_pmem", "storage", "firmware (NFIT) says a persistent range"),
        ("ACPI.NFIT", "nfit", "nd_volatile", "memory", "firmware (NFIT) says a volatile range"),
        ("of_pmem", "of_pmem", "nd_pmem", "storage", "firmware (device tree) says a persistent"),
        ("of_pmem", "of_pmem", "nd_volatile", "memory", "firmware (device tree) says a volatile"),
        ("ibm,pmem", "papr_scm", "nd_pmem", "storage", "firmware (PAPR) says a persistent range"),
        ("virtio-pmem", "virtio_pmem", "nd_pmem", "storage", "region0 says virtio-pmem: a file"),
        ("e820", "e820_pmem", "nd_pmem", "storage", "its nature is not known"),
        ("nfit_test.0", "nfit_test", "nd_pmem", "storage", "its nature is not known"),
        ("ramdax", "ramdax", "nd_pmem", "storage", "its nature is not known"),
        ("new", "new", "nd_pmem", "storage", "its nature is not known"),
        ("new", "new", "nd_volatile", "memory", "type of region0 says a volatile range"),
    ],
)
def test_what_each_bus_says(tree, provider, driver, kind, nature, because):
    bus = add_bus(tree, 0, provider=provider, driver=driver)
    add_nd_region(tree, bus, "region0", kind)
    found = verdict(tree, "region0")
    assert found.nature == nature
    assert because in found.because
    assert provider in shown(found)["provider of region0"] or "virtio" in provider


def test_a_region_whose_bus_cannot_be_read_is_storage(tree):
    tree.device("nd", "odd/region0")
    found = verdict(tree, "region0")
    assert (found.nature, shown(found)) == ("storage", {"provider of region0": "unknown"})


def test_legacy_persistent_memory_may_be_ram_and_says_what_would_show_it(tree):
    bus = add_bus(tree, 0, provider="e820", driver="e820_pmem")
    add_nd_region(tree, bus, "region0", resource=hex(2 * GIB))
    tree.put(tree.proc / "cmdline", "quiet memmap=64M!2G")
    found = verdict(tree, "region0")
    assert "whatever is behind it" in shown(found)["firmware (e820)"]
    assert "emulated in RAM" in shown(found)["kernel command line"]
    assert found.would_change == (
        f'nature = "memory" in {DECLARATIONS} ([[dimm]] region = "region0")',
        "no memmap=64M!2G on the kernel command line: it is ordinary RAM then",
    )


def test_what_else_the_kernel_knows_is_shown_and_decides_nothing(nfit):
    region = nfit.sysfs / "bus/nd/devices/region0"
    nfit.put(region / "read_only", 1)
    nfit.put(region / "resource", hex(4 * GIB))
    nfit.put(region / "target_node", 3)
    dimm = nfit.sysfs / "bus/nd/devices/nmem0"
    nfit.put(dimm / "nfit/flags", "not_armed smart_notify save_fail")
    nfit.put(dimm / "nfit/dirty_shutdown", 7)
    found = shown(verdict(nfit, "region0"))
    assert found["persistence domain of region0"] == "memory_controller"
    assert found["region0"] == "the kernel has it read-only"
    assert found["/proc/iomem"] == "Persistent Memory"
    assert found["SRAT and SLIT"] == "target node 3, without memory so far"
    assert found["flags of nmem0"] == (
        "not_armed: what is written would not survive, so it is read-only; "
        "save_fail: its last content was not saved"
    )
    assert found["format of nmem0"].startswith("interface 0x0301: byte-addressable, persistent")
    assert found["nmem0"] == "7 dirty shutdowns"
    deciding = [each for each in verdict(nfit, "region0").evidence if each.says is not None]
    assert [each.source for each in deciding] == ["firmware (NFIT)"]


def test_dram_with_a_battery_is_storage_as_long_as_the_firmware_says_so(nfit):
    nfit.put(nfit.sysfs / "bus/nd/devices/nmem0/nfit/format", "0x0101")
    found = verdict(nfit, "region0")
    assert "DRAM by its make" in shown(found)["format of nmem0"]
    assert found.nature == "storage"


def test_a_declaration_is_named_so_that_it_fits_after_the_next_boot(nfit):
    assert 'id = "8680-56341200"' in verdict(nfit, "region0").would_change[0]
    # No name of a dimm would be of the whole set.
    assert 'region = "region2"' in verdict(nfit, "region2").would_change[0]


def test_declarations_and_health_of_its_dimms_reach_a_region(nfit):
    text = "".join(f'[[dimm]]\nhandle = {n}\nnature = "memory"\n' for n in (1, 2))
    worn = {"nmem1": Health(dev="nmem1", source="ndctl, nmem1", life_used=110)}
    found = verdict(nfit, "region2", text, worn)
    assert (found.nature, found.wears, found.life_used) == ("memory", True, 110)
    assert found.evidence[2].value == "110 % of its life is used, more than it was rated for"
    assert not verdict(nfit, "region0", text, worn).wears
    assert verdict(nfit, "region2", "", worn).because.startswith("ndctl, nmem1 says 110 %")


# --- CXL ------------------------------------------------------------------------------------------


def take(tree, memdev, mode, start):
    """What a region does to the first decoder of a device."""
    place = tree.sysfs / "devices" / ROOT / f"port1/endpoint{memdev + 2}/decoder{memdev + 2}.0"
    for name, value in (("mode", mode), ("dpa_resource", hex(start)), ("dpa_size", hex(256 * MIB))):
        tree.put(place / name, value)


def add_cdat(tree, memdev, *, persistent):
    flags = 4 if persistent else 0
    body = struct.pack("<BxHBBxxQQ", 0, 24, 0, flags, 0, 256 * MIB)
    head = struct.pack("<IBB6xI", 40, 2, 0, 0)
    head = struct.pack("<IBB6xI", 40, 2, -sum(head + body) % 256, 0)
    place = tree.sysfs / "devices" / ROOT / f"port1/endpoint{memdev + 2}"
    (place / "CDAT").write_bytes(head + body)


@pytest.fixture
def cxl(tree):
    """Two devices, mem0 with a region of its persistent, mem1 with one of its volatile part."""
    tree.device("cxl", ROOT)
    tree.device("cxl", f"{ROOT}/decoder0.0", cap_ram=1, cap_pmem=1)
    add_memdev(tree, 0, pmem=256 * MIB, serial="0x77")
    add_memdev(tree, 1, ram=256 * MIB, serial="0x1")
    take(tree, 0, "pmem", 0)
    take(tree, 1, "ram", 0)
    add_region(tree, "region0", mode="pmem", target0="decoder2.0")
    add_region(tree, "region1", mode="ram", target0="decoder3.0", resource=hex(8 * GIB))
    bus = add_bus(tree, 0, provider="CXL", driver="cxl_nvdimm_bridge", bus="cxl")
    tree.device("nd", f"{bus}/nmem0", cxl__id=119)
    add_nd_region(tree, bus, "region0", mappings=1, mapping0=f"nmem0,0,{256 * MIB},0")
    place = f"{ROOT}/decoder0.0/region1/dax_region1/dax1.0"
    tree.device("dax", place, size=256 * MIB, target_node=1)
    return tree


def test_a_cxl_region_of_type_pmem_is_storage(cxl):
    found = verdict(cxl, "region0")
    assert (found.nature, found.because) == ("storage", "CXL region0 says mode pmem")
    assert shown(found)["CXL mem0"] == "pmem partition of 256 MiB"
    assert shown(found)["provider of region0"] == "CXL (driver cxl_nvdimm_bridge)"
    assert found.would_change == (
        f'nature = "memory" in {DECLARATIONS} ([[dimm]] serial = 0x77)',
        "a volatile part of mem0 (cxl set-partition), and a CXL region of ram there",
    )


def test_a_device_with_a_volatile_part_says_that_it_has_one(cxl):
    cxl.put(cxl.sysfs / "bus/cxl/devices/mem0/ram/size", hex(512 * MIB))
    assert verdict(cxl, "region0").would_change[1] == (
        "a CXL region of type ram on the volatile 512 MiB of mem0"
    )


def test_a_cxl_region_of_type_ram_is_memory(cxl):
    cxl.put(cxl.sysfs / "bus/cxl/devices/mem1/ram/qos_class", 42)
    found = verdict(cxl, "region1")
    assert (found.nature, found.because) == ("memory", "CXL region1 says mode ram")
    assert shown(found)["CXL mem1"] == "ram partition of 256 MiB, QoS class 42"
    assert shown(found)["SRAT and SLIT"] == "target node 1, without memory so far"
    assert found.would_change[0].endswith("([[dimm]] serial = 0x1)")


def test_a_table_of_the_device_agrees_or_makes_it_storage(cxl):
    add_cdat(cxl, 1, persistent=False)
    found = verdict(cxl, "region1")
    assert found.nature == "memory"
    assert found.because.startswith("CDAT of mem1 says volatile")
    add_cdat(cxl, 1, persistent=True)
    found = verdict(cxl, "region1")
    assert found.nature == "storage"
    assert found.because.endswith("(CXL region1: memory, but of equals storage wins)")


def test_the_table_does_not_decide_where_the_part_of_the_device_is_not_known(cxl):
    add_cdat(cxl, 1, persistent=True)
    decoder = cxl.sysfs / "devices" / ROOT / "port1/endpoint3/decoder3.0"
    cxl.put(decoder / "dpa_resource", "odd")
    assert verdict(cxl, "region1").nature == "memory"


def test_wear_and_declarations_of_memory_devices(cxl):
    worn = {"mem1": Health(dev="mem1", source="cxl, mem1", life_used=3)}
    found = verdict(cxl, "region1", health=worn)
    assert (found.nature, found.wears, found.life_used) == ("storage", True, 3)
    assert found.would_change[1] == "no word of it from cxl, mem1 (then CXL region1 says mode ram)"
    text = '[[dimm]]\nserial = 1\nnature = "memory"\n'
    assert verdict(cxl, "region1", text, worn).nature == "memory"
    # The region of persistent memory is found by the same number, though its dimm is nmem0.
    text = '[[dimm]]\nserial = 0x77\nnature = "memory"\nendurance = "1P"\n'
    found = verdict(cxl, "region0", text)
    assert (found.nature, found.wears, found.endurance) == ("memory", True, 1 << 50)


def test_a_region_over_two_devices_names_both(cxl):
    attributes = {"interleave_ways": 2, "target0": "decoder2.0", "target1": "decoder3.0"}
    add_region(cxl, "region5", mode="ram", **attributes)
    found = verdict(cxl, "region5", '[[dimm]]\nserial = 1\nnature = "memory"\n')
    assert "but nothing is said of 1 of 2 dimms" in found.evidence[0].value
    assert {"CXL mem0", "CXL mem1"} <= shown(found).keys()
    assert 'region = "region5"' in found.would_change[0]


@pytest.mark.parametrize("mode", ["none", "mixed", ""])
def test_a_cxl_region_of_no_known_mode_is_storage(cxl, mode):
    add_region(cxl, "region5", mode=mode)
    found = verdict(cxl, "region5")
    assert (found.nature, shown(found)) == ("storage", {"region5": "of no known mode"})


# --- what firmware set aside ----------------------------------------------------------------------


@pytest.fixture
def hmem(tree):
    tree.device("dax", "platform/hmem.0/dax0.0", size=GIB, target_node=2, driver="device_dax")
    mapping = tree.sysfs / "bus/dax/devices/dax0.0/mapping0"
    tree.put(mapping / "start", hex(4 * GIB))
    tree.put(mapping / "end", hex(5 * GIB - 1))
    return tree


def test_memory_for_a_specific_purpose_is_memory(hmem):
    found = verdict(hmem, "hmem.0")
    assert found.nature == "memory"
    assert "firmware (EFI) says a range set aside" in found.because
    assert shown(found)["DAX device dax0.0"] == "devdax, driver device_dax"
    assert shown(found)["/proc/iomem"] == "Persistent Memory"
    assert shown(found)["SRAT and SLIT"] == "target node 2, without memory so far"
    text = '[[dimm]]\nregion = "hmem.0"\nnature = "storage"\n'
    assert verdict(hmem, "hmem.0", text).nature == "storage"


# --- which regions there are, and their other names -----------------------------------------------


def test_a_region_of_two_buses_is_one(cxl, hmem):
    assert region_names(cxl.sysfs) == ["region0", "region1", "hmem.0"]
    assert (find_region("region0", cxl.sysfs).nd is None) is False
    assert find_region("region0", cxl.sysfs).cxl.kind == "pmem"


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("dax1.0", "region1"),
        ("dax_region1", "region1"),
        ("dax0.0", "hmem.0"),
        ("region1", "region1"),
        ("dax7.0", "region7"),
    ],
)
def test_a_dax_device_stands_for_its_region(cxl, hmem, name, region):
    bus = "cxl_nvdimm_bridge.0/ndbus0"
    add_nd_region(cxl, bus, "region7")
    place = f"{bus}/region7/dax7.0"
    cxl.device("nd", place, namespace="namespace7.0")
    cxl.device("dax", f"{place}/dax7.0", size=MIB)
    assert find_region(name, cxl.sysfs).dev == region


@pytest.mark.parametrize("name", ["region9", "dax9.9", "mem0", "decoder0.0", "..", "", "a/b", "*"])
def test_what_is_no_region_is_refused_with_those_that_are(cxl, name):
    with pytest.raises(InvalidArgument, match="is no region of this machine; there is region0, "):
        kernel_evidence(name, cxl.sysfs, cxl.proc)


def test_a_machine_without_regions(tree):
    assert region_names(tree.sysfs) == []
    with pytest.raises(InvalidArgument, match="there is none"):
        find_region("region0", tree.sysfs)


def test_the_region_of_a_device_file(cxl):
    """By its number: /dev/null is 1:3."""
    link = cxl.sysfs / "dev/char/1:3"
    link.parent.mkdir(parents=True)
    link.symlink_to(cxl.sysfs / "bus/dax/devices/dax1.0")
    assert region_of_device("/dev/null", cxl.sysfs) == "region1"
    link.unlink()
    disk = cxl.sysfs / "devices/cxl_nvdimm_bridge.0/ndbus0/region0/namespace0.0/block/pmem0"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    assert region_of_device("/dev/null", cxl.sysfs) == "region0"
    link.unlink()
    assert region_of_device("/dev/null", cxl.sysfs) is None
    assert region_of_device("/dev/null/no", cxl.sysfs) is None
    assert region_of_device(__file__, cxl.sysfs) is None


def test_odd_values_say_nothing_and_end_nothing(nfit, cxl, hmem, scale):
    """Attributes are exchanged for nonsense, some at a time; a region that is left has evidence."""
    chance = random.Random(5)
    files = [path for path in nfit.sysfs.rglob("*") if path.is_file() and not path.is_symlink()]
    odd = [b"", b"\xff\xfe", b"-1", b"99999999999999999999999", b"x" * 5000, b"decoder2.0", b"0x"]
    for _ in range(scale(60, 2000)):
        chosen = chance.sample(files, 4)
        kept = [(path, path.read_bytes()) for path in chosen]
        for path in chosen:
            path.write_bytes(chance.choice(odd))
        for name in region_names(nfit.sysfs):
            found = kernel_evidence(name, nfit.sysfs, nfit.proc)
            assert found
            assert judge(found).nature in ("storage", "memory")
        for path, content in kept:
            path.write_bytes(content)


# --- all of them ----------------------------------------------------------------------------------


def run_nothing(argv, *, timeout_seconds=60, given=b""):
    raise NotSupported(f"{argv[0]} is not installed")


def test_every_region_of_the_machine(cxl, hmem):
    verdicts, notes = machine_verdicts(
        declarations=(), sysfs=cxl.sysfs, proc=cxl.proc, run=run_nothing
    )
    natures = {dev: each.nature for dev, each in verdicts.items()}
    assert natures == {"region0": "storage", "region1": "memory", "hmem.0": "memory"}
    assert notes == [f"health of devices: {name} is not installed" for name in ("ndctl", "cxl")]


def test_devices_are_asked_once_and_only_those_of_the_region(nfit):
    ran = []

    def run(argv, *, timeout_seconds=60, given=b""):
        ran.append(argv)
        return b'[{"dev":"nmem0","health":{"life_used_percentage":9}}]'

    verdicts, notes = machine_verdicts(
        ["region0", "region2"], declarations=(), sysfs=nfit.sysfs, proc=nfit.proc, run=run
    )
    assert {dev: each.life_used for dev, each in verdicts.items()} == {"region0": 9, "region2": 9}
    assert (ran, notes) == ([("ndctl", "list", "-DH")], [])


def test_a_region_that_goes_away_while_all_are_looked_at_is_left_out(nfit, monkeypatch):
    names = ["region0", "region8", "region1"]
    monkeypatch.setattr("pmemkit.bus.verdicts.region_names", lambda sysfs: names)
    options = {"declarations": (), "sysfs": nfit.sysfs, "proc": nfit.proc, "run": run_nothing}
    assert list(machine_verdicts(**options)[0]) == ["region0", "region1"]
    with pytest.raises(InvalidArgument, match="'region8' is no region"):
        machine_verdicts(names, **options)
