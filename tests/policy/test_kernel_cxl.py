"""CXL regions made and destroyed: by cxl, through sysfs, and taken back at every point."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
from fake_kernel import FakeKernel, Session, refused

from pmemkit.errors import Busy, InvalidArgument, NoSpace, NotSupported, PmemError

MIB = 1 << 20
ROOT = "platform/ACPI0017:00/root0"
BRIDGE = "pci0000:0c"


class CxlKernel(FakeKernel):
    """Memory devices, one root decoder, and the order in which the kernel wants regions made."""

    version = "78"

    def __post_init__(self):
        super().__post_init__()
        (self.tree.sysfs / "devices" / BRIDGE).mkdir(parents=True)
        root = self.tree.device("cxl", ROOT)
        (root / "dport12").symlink_to(self.tree.sysfs / "devices" / BRIDGE)
        self.window = self.tree.device(
            "cxl",
            f"{ROOT}/decoder0.0",
            cap_ram=1,
            cap_pmem=1,
            target_list=12,
            interleave_ways=1,
            interleave_granularity=256,
            create_ram_region="region0",
            create_pmem_region="region0",
        )
        (self.tree.sysfs / "bus/cxl/drivers/cxl_region").mkdir(parents=True)
        self.handlers["cxl version"] = lambda words, given: self.version.encode()
        self.handlers["cxl create-region"] = self.create
        for verb in ("disable-region", "destroy-region", "enable-region"):
            self.handlers[f"cxl {verb}"] = getattr(self, verb.replace("-", "_"))
        self.handlers["ndctl disable-region"] = lambda words, given: b""

    def add_memdev(self, number, *, ram=0, pmem=0, serial=0):
        place = self.tree.device(
            "cxl",
            f"{BRIDGE}/0000:{number}/mem{number}",
            serial=hex(serial),
            ram__size=hex(ram),
            pmem__size=hex(pmem),
        )
        endpoint = f"{ROOT}/port1/endpoint{number + 2}"
        (self.tree.device("cxl", endpoint) / "uport").symlink_to(place)
        for each in range(2):
            decoder = f"{endpoint}/decoder{number + 2}.{each}"
            self.tree.device("cxl", decoder, mode="none", dpa_size="0x0")

    def decoder(self, memdev):
        number = int(memdev[3:]) + 2
        return self.tree.sysfs / "devices" / ROOT / f"port1/endpoint{number}/decoder{number}.0"

    def region(self, name="region0"):
        return self.tree.sysfs / "devices" / ROOT / "decoder0.0" / name

    def create(self, words, _given):
        def option(name):
            return words[words.index(name) + 1]

        names = words[-int(option("--ways")) :]
        size = int(option("--size"))
        self.begin("region0", option("--type"))
        region = self.region()
        self.tree.put(region / "interleave_ways", len(names))
        self.tree.put(region / "interleave_granularity", option("--granularity"))
        self.tree.put(region / "size", hex(size))
        for position, name in enumerate(names):
            self.tree.put(self.decoder(name) / "mode", option("--type"))
            self.tree.put(self.decoder(name) / "dpa_size", hex(size // len(names)))
            self.tree.put(region / f"target{position}", self.decoder(name).name)
        self.tree.put(region / "commit", 1)
        self.enable("region0")
        return json.dumps({"region": "region0"}).encode()

    def begin(self, name, kind):
        self.tree.device("cxl", f"{ROOT}/decoder0.0/{name}", mode=kind, commit=0)

    def enable(self, name):
        region = self.region(name)
        self.tree.bind("cxl", region, "cxl_region")
        if (region / "mode").read_text().strip() == "ram":
            place = f"{ROOT}/decoder0.0/{name}/dax_region0/dax0.0"
            self.dax = self.tree.device("dax", place, size=256 * MIB, target_node=1)

    def disable_region(self, words, _given):
        region = self.region(words[0])
        self.tree.bind("cxl", region, None)
        shutil.rmtree(region / "dax_region0", ignore_errors=True)
        (self.tree.sysfs / "bus/dax/devices/dax0.0").unlink(missing_ok=True)

    def enable_region(self, words, _given):
        self.enable(words[0])

    def destroy_region(self, words, _given):
        region = self.region(words[0])
        for target in region.glob("target*"):
            (place,) = (self.tree.sysfs / "bus/cxl/devices").glob(target.read_text().strip())
            self.tree.put(place / "dpa_size", "0x0")
            self.tree.put(place / "mode", "none")
        self.remove(words[0])

    def remove(self, name):
        (self.tree.sysfs / "bus/cxl/devices" / name).unlink()
        shutil.rmtree(self.region(name))

    def write(self, path, text, timeout_seconds):
        super().write(path, text, timeout_seconds)
        if path.name.startswith("create_"):
            self.begin(text, path.name.split("_")[1])
        elif path.name == "delete_region":
            self.remove(text)
        elif path.name == "bind":
            self.enable(text)


@pytest.fixture
def kernel(tmp_path):
    kernel = CxlKernel(tmp_path)
    kernel.add_memdev(0, pmem=256 * MIB, serial=0x77)
    kernel.add_memdev(1, ram=256 * MIB, serial=2)
    kernel.add_memdev(2, ram=256 * MIB, serial=3)
    return kernel


@pytest.fixture
def session(kernel):
    return Session(kernel)


def names(kernel):
    found = (kernel.tree.sysfs / "bus/cxl/devices").glob("region*")
    return sorted(each.name for each in found)


def test_a_region_of_ram_by_cxl_where_it_can(kernel, session):
    made = session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    assert made == {"dev": "region0", "type": "ram", "chardev": "dax0.0"}
    assert kernel.ran[-1] == (
        "cxl create-region --memdevs --type ram --decoder decoder0.0 --ways 1 --granularity 256 "
        f"--size {256 * MIB} mem1"
    )
    assert session.undo() == "region0 is destroyed again"
    assert names(kernel) == []
    assert "gone already" in session.undo()


@pytest.mark.parametrize("version", ["76.1", "", "odd"])
def test_a_region_of_ram_through_sysfs_where_cxl_cannot(kernel, session, version):
    kernel.version = version
    made = session.do("create-cxl-region", "cxl", type="ram", members=["mem2", "mem1"])
    assert made["chardev"] == "dax0.0"
    assert kernel.writes() == [
        "decoder0.0/create_ram_region region0",
        "region0/interleave_granularity 256",
        "region0/interleave_ways 2",
        f"region0/size {512 * MIB}",
        "decoder4.0/mode ram",
        f"decoder4.0/dpa_size {256 * MIB}",
        "region0/target0 decoder4.0",
        "decoder3.0/mode ram",
        f"decoder3.0/dpa_size {256 * MIB}",
        "region0/target1 decoder3.0",
        "region0/commit 1",
        "cxl_region/bind region0",
    ]
    (region,) = session.actions.observe().regions
    assert region.cxl.members == ("mem2", "mem1")
    assert (region.type, region.nature) == ("volatile", "memory")


def test_memory_of_a_new_region_is_not_onlined_by_the_kernel(kernel, session):
    """kmem takes it at once, and blocks in a zone of the kernel cannot be taken away again."""
    kernel.version = "76.1"
    kernel.tree.put(kernel.memory / "auto_online_blocks", "online")
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    writes = kernel.writes()
    assert writes[0] == "memory/auto_online_blocks offline"
    assert writes[-2:] == ["cxl_region/bind region0", "memory/auto_online_blocks online"]
    kernel.failing["write region0/commit 1"] = refused(errno.ENXIO)
    with pytest.raises(PmemError):
        session.do("create-cxl-region", "cxl", type="ram", members=["mem2"])
    assert kernel.policy() == "online"


def test_a_region_is_found_by_the_serial_numbers_of_its_devices(kernel, session):
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    entry = session.entries[0]
    assert len(entry.kept["serials"]) == 1
    kept = {**entry.kept, "members": ["mem9"]}
    session.entries[0] = replace(entry, kept=kept, made={**entry.made, "dev": "region7"})
    assert session.undo() == "region0 is destroyed again"


POINTS = (
    "region0/interleave_granularity .*",
    "region0/interleave_ways .*",
    "region0/size .*",
    "decoder3.0/mode ram",
    f"decoder3.0/dpa_size {256 * MIB}",
    "region0/target0 .*",
    "region0/commit 1",
    "cxl_region/bind .*",
)


@pytest.mark.parametrize("point", POINTS)
def test_a_failure_at_any_point_gives_everything_back(kernel, session, point):
    kernel.version = "76.1"
    kernel.failing[f"write {point}"] = refused(errno.ENXIO)
    with pytest.raises(PmemError):
        session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    assert names(kernel) == []
    assert int((kernel.decoder("mem1") / "dpa_size").read_text(), 0) == 0
    assert "gone already" in session.undo()


def test_a_region_that_was_only_begun_is_taken_back(kernel, session):
    kernel.failing["cxl create-region .*"] = Busy("died")
    with pytest.raises(Busy):
        session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    kernel.failing.clear()
    session.actions._live.tool(*kernel.ran[-1].split())
    assert session.undo() == "region0 is destroyed again"


def test_made_already_is_made(kernel, session):
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    count = len(kernel.ran)
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"], size=256 * MIB)
    assert len(kernel.ran) == count
    with pytest.raises(InvalidArgument, match="has 268435456 bytes already"):
        session.do("create-cxl-region", "cxl", type="ram", members=["mem1"], size=128 * MIB)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ({"type": "both", "members": ["mem1"]}, InvalidArgument, "no type of a CXL region"),
        ({"type": "ram", "members": ["mem9"]}, InvalidArgument, "no CXL memory device"),
        ({"type": "ram", "members": ["../mem1"]}, InvalidArgument, "no CXL memory device"),
        ({"type": "ram", "members": []}, InvalidArgument, "0 members"),
        ({"type": "ram", "members": ["mem1", "mem1"]}, InvalidArgument, "2 members"),
        ({"type": "ram", "members": ["mem1"], "ways": 2}, InvalidArgument, "2 ways need"),
        ({"type": "ram", "members": ["mem0"]}, NoSpace, "0 bytes of ram"),
        ({"type": "ram", "members": ["mem1"], "size": 1 << 40}, NoSpace, "cannot be had"),
        ({"type": "ram", "members": ["mem1"], "decoder": "decoder7.0"}, InvalidArgument, "cannot"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_before_anything(kernel, session, params, error, match):
    with pytest.raises(error, match=match):
        session.do("create-cxl-region", "cxl", **params)
    assert kernel.ran == []
    assert session.undo() == "no region was made"


def test_destroy_and_make_again_by_serial_numbers(kernel, session):
    session.do("create-cxl-region", "cxl", type="pmem", members=["mem0"])
    session.do("destroy-cxl-region", "region0")
    assert names(kernel) == []
    session.entries[-1].kept["members"] = ["mem5"]
    assert "of mem0 is there again, with its contents" in session.undo()
    assert session.undo() == "region0 is there"


def test_a_region_whose_memory_is_online_is_not_destroyed(kernel, session):
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    kernel.tree.bind("dax", kernel.dax, "kmem")
    kernel.tree.put(kernel.dax / "resource", hex(32 * 128 * MIB))
    kernel.tree.block(32, "online", "Normal")
    count = len(kernel.ran)
    with pytest.raises(Busy, match=r"1 memory blocks of dax0\.0 are online"):
        session.do("destroy-cxl-region", "region0")
    with pytest.raises(Busy, match="make it device DAX first"):
        session.undo(0)
    assert len(kernel.ran) == count


def test_a_region_whose_device_is_open_is_not_destroyed(kernel, session):
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    kernel.tree.process(5, "kv", opened="/dev/dax0.0")
    with pytest.raises(Busy, match=r"in use by process kv \(5\)"):
        session.do("destroy-cxl-region", "region0")


def test_a_destruction_that_fails_enables_the_region_again(kernel, session):
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    kernel.failing["cxl destroy-region .*"] = Busy("Device or resource busy")
    with pytest.raises(Busy):
        session.do("destroy-cxl-region", "region0")
    assert kernel.ran[-1] == "cxl enable-region region0"
    assert session.actions.observe().regions[0].enabled


def test_a_region_that_is_gone_is_destroyed(kernel, session):
    assert session.do("destroy-cxl-region", "region4") == {}
    assert "was not touched" in session.undo()


def test_without_cxl_the_package_is_named(kernel, session):
    kernel.failing["cxl .*"] = NotSupported("cxl is not installed; on Debian it is in …")
    with pytest.raises(NotSupported, match="cxl is not installed"):
        session.do("create-cxl-region", "cxl", type="pmem", members=["mem0"])
    session.do("create-cxl-region", "cxl", type="ram", members=["mem1"])
    assert names(kernel) == ["region0"]
