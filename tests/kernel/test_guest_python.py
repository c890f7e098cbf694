"""pmemkit inside the guest; NVDIMMs on NUMA nodes of their own; CXL devices; two boots."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools.guest import CxlDevice, Dimm, Guest, GuestError, GuestUnavailableError, Result
from tools.guest_machine import Machine

from tools import guest_packages, guest_python

MIB = 1 << 20
LABEL_SIZE = 128 << 10
PATTERN = bytes(range(256)) * 64
PATTERN_SUM = hashlib.sha256(PATTERN).hexdigest()

FUNCTIONS = """
number() {  # of the region whose memory is on node $1
    for each in /sys/bus/nd/devices/region*; do
        if [ "$(cat $each/target_node)" = "$1" ]; then echo "${each##*region}"; fi
    done
}
memdev() {  # with the serial number $1
    cxl list -M -s "$1" | grep -o 'mem[0-9]*"' | tr -d '"'
}
"""


def _steps(**steps: str) -> dict[str, str]:
    return {name.replace("_", " "): FUNCTIONS + script for name, script in steps.items()}


# --- Python and NUMA nodes: two boots ------------------------------------------------------------

FIRST = _steps(
    version="pmem --version",
    list="pmem list -BR",
    nodes="cat /sys/devices/system/node/possible; cat /sys/devices/system/node/online",
    e820="pmem explain region$(number 0)",
    dimm="pmem explain region$(number 1)",
    python="""
        python3 - <<'END'
import ctypes, hashlib, json, rich, ssl, sys
import pmemkit
print(json.dumps([sys.version, pmemkit.__version__, pmemkit.__file__]))
END""",
    traceback="python3 -c 'import pmemkit; pmemkit.open(\"/dev/none\")'",
    storage="""
        n=$(number 1)
        ndctl create-namespace -f -e namespace$n.0 -m sector > /dev/null
        pmem copy /in/pattern /dev/pmem${n}s""",
    memory="""
        n=$(number 2)
        ndctl create-namespace -f -e namespace$n.0 -m devdax > /dev/null
        daxctl reconfigure-device -m system-ram dax$n.0""",
    used="""
        numactl -H | grep '^available'
        free() { grep MemFree /sys/devices/system/node/node2/meminfo | tr -dc 0-9\\\\n; }
        before=$(free)
        numactl --membind=2 dd if=/dev/zero of=/run/held bs=1M count=16 2> /dev/null
        echo $((before - $(free)))
        rm /run/held""",
    back="""
        n=$(number 2)
        daxctl reconfigure-device -m devdax -f dax$n.0
        cat /sys/devices/system/node/online >&2""",
)
SECOND = _steps(
    storage=f"""
        n=$(number 1)
        pmem copy /dev/pmem${{n}}s /tmp/whole
        head -c {len(PATTERN)} /tmp/whole | sha256sum""",
    memory="ndctl list -r region$(number 2) -N",
    list="pmem list -N",
)


@pytest.fixture(scope="module")
def nodes_machine(tmp_path_factory: pytest.TempPathFactory) -> list[Dimm]:
    directory = tmp_path_factory.mktemp("nodes")
    dimms = []
    for node, size_mib in ((1, 64), (2, 512)):
        path = directory / f"{node}.img"
        with path.open("wb") as image:
            image.truncate(size_mib * MIB + LABEL_SIZE)
        dimms.append(Dimm(path, label_size_bytes=LABEL_SIZE, node=node))
    return dimms


@pytest.fixture(scope="module")
def first(guest: Guest, python_layers: None, nodes_machine: list[Dimm]) -> Result:
    return guest.run(
        nodes_machine,
        FIRST,
        python=True,
        nodes=("3G", "0", "0"),
        kernel_arguments="memmap=64M!2G",
        files={"pattern": PATTERN},
        timeout_seconds=240,
    )


@pytest.fixture(scope="module")
def second(guest: Guest, first: Result, nodes_machine: list[Dimm]) -> Result:
    return guest.run(nodes_machine, SECOND, python=True, timeout_seconds=240)


def test_pmem_runs_in_the_guest(first):
    assert re.fullmatch(r"pmem \d+\.\d+\.\d+\n", first["version"].check().text)
    version, package, file = json.loads(first["python"].check().text)
    assert version == sys.version
    assert first["version"].text.split()[1] == package
    assert file == f"/python/lib/python3.{sys.version_info[1]}/pmemkit/__init__.py"
    assert first["traceback"].status == 1
    assert "raise failure_of(cause" in first["traceback"].errors


def test_pmem_sees_the_live_machine(first):
    buses = {bus["provider"]: bus for bus in first["list"].json()}
    assert buses.keys() == {"ACPI.NFIT", "e820"}
    assert [region["size"] for region in buses["e820"]["regions"]] == [64 * MIB]
    sizes = {region["size"] for region in buses["ACPI.NFIT"]["regions"]}
    assert sizes == {64 * MIB, 512 * MIB}
    assert "e820" in first["e820"].check().text
    assert "NFIT" in first["dimm"].check().text


def test_each_dimm_is_on_its_own_node(first):
    assert first["nodes"].check().text.split() == ["0-2", "0"]
    (device,) = first["memory"].json()
    assert (device["mode"], device["target_node"]) == ("system-ram", 2)
    nodes, used_kib = first["used"].check().text.splitlines()
    assert nodes == "available: 2 nodes (0,2)"
    assert int(used_kib) >= 15 << 10
    (device,) = first["back"].check().json()
    assert device["mode"] == "devdax"
    assert first["back"].errors.splitlines()[-1] == "0"


def test_the_next_boot_finds_what_pmem_wrote(first, second):
    first["storage"].check()
    assert second["storage"].check().text.split()[0] == PATTERN_SUM
    (namespace,) = second["memory"].json()
    assert namespace["mode"] == "devdax"
    assert {each["mode"] for each in second["list"].json()} == {"sector", "devdax"}


# --- CXL: two boots ------------------------------------------------------------------------------

CXL_FIRST = _steps(
    devices="cxl list -M",
    windows="cxl list -D -d root",
    policy="cat /sys/devices/system/memory/auto_online_blocks",
    pmem="cxl create-region -d decoder0.0 -t pmem -m $(memdev 0x77)",
    namespace="""
        ndctl disable-region all; ndctl init-labels -f nmem0; ndctl enable-region all
        ndctl create-namespace -r region0 -m fsdax -n mine
        pmem copy /in/pattern /dev/pmem0 >&2""",
    list="pmem list -BRN",
    ram="cxl-create-ram-region $(memdev 1)",
    region="cxl list -R",
    dax="daxctl list -D -i",
    kmem="modprobe kmem; daxctl list -D -i; cat /sys/devices/system/node/online >&2",
    online="""
        daxctl online-memory dax1.0 >&2
        numactl --membind=1 dd if=/dev/zero of=/run/held bs=64K count=1 2> /dev/null
        rm /run/held
        daxctl list -D""",
    back="daxctl reconfigure-device -m devdax -f dax1.0",
    destroy="cxl disable-region region1; cxl destroy-region -f region1; cxl list -R",
)
CXL_SECOND = _steps(
    before="cxl list -R",
    again="cxl create-region -d decoder0.0 -t pmem -m $(memdev 0x77)",
    namespace="ndctl list -N",
    content=f"head -c {len(PATTERN)} /dev/pmem0 | sha256sum",
    auto="cat /sys/devices/system/memory/auto_online_blocks",
    ram="cxl-create-ram-region $(memdev 1); daxctl list -D",
)


@pytest.fixture(scope="module")
def cxl_machine(tmp_path_factory: pytest.TempPathFactory) -> list[CxlDevice]:
    directory = tmp_path_factory.mktemp("cxl")
    for name, size in (("pmem", 256 * MIB), ("lsa", 256 << 10)):
        with (directory / name).open("wb") as image:
            image.truncate(size)
    return [
        CxlDevice(volatile=256 * MIB),
        CxlDevice(persistent=directory / "pmem", lsa=directory / "lsa", serial=0x77),
    ]


@pytest.fixture(scope="module")
def cxl_first(cxl_guest: Guest, python_layers: None, cxl_machine: list[CxlDevice]) -> Result:
    return cxl_guest.run(
        [],
        CXL_FIRST,
        cxl=cxl_machine,
        python=True,
        files={"pattern": PATTERN},
        kernel_arguments="memhp_default_state=offline",
        timeout_seconds=240,
    )


@pytest.fixture(scope="module")
def cxl_second(cxl_guest: Guest, cxl_first: Result, cxl_machine: list[CxlDevice]) -> Result:
    modules = ("cxl_acpi", "cxl_pci", "cxl_mem", "cxl_pmem", "dax_cxl", "kmem")
    return cxl_guest.run([], CXL_SECOND, cxl=cxl_machine, modules=modules, timeout_seconds=240)


def test_cxl_devices_and_their_window(cxl_first):
    devices = {each["serial"]: each for each in cxl_first["devices"].json()}
    assert devices[1]["ram_size"] == devices[0x77]["pmem_size"] == 256 * MIB
    assert devices.keys() == {1, 0x77}
    (window,) = cxl_first["windows"].json()
    assert window["pmem_capable"] and window["volatile_capable"]
    assert window["size"] >= 512 * MIB


def test_a_persistent_cxl_region_is_a_region_with_namespaces(cxl_first):
    region = cxl_first["pmem"].json()
    assert (region["size"], region["decode_state"]) == (256 * MIB, "commit")
    assert '"mode":"fsdax"' in cxl_first["namespace"].check().text
    (bus,) = cxl_first["list"].json()
    assert bus["provider"] == "CXL"
    assert bus["regions"][0]["namespaces"][0]["name"] == "mine"


def test_a_volatile_cxl_region_is_memory_on_the_node_of_its_window(cxl_first):
    assert cxl_first["policy"].check().text == "offline\n"
    assert cxl_first["ram"].check().text == "region1\n"
    assert {each["region"] for each in cxl_first["region"].json()} == {"region0", "region1"}
    (device,) = cxl_first["dax"].json()
    # No driver takes it but kmem, which is not loaded yet.
    assert (device["target_node"], device["state"]) == (1, "disabled")
    (device,) = cxl_first["kmem"].json()
    assert (device["mode"], device["online_memblocks"]) == ("system-ram", 0)
    (device,) = cxl_first["online"].json()
    assert device["online_memblocks"] == device["total_memblocks"] == 2
    (device,) = cxl_first["back"].json()
    assert device["mode"] == "devdax"
    assert [each["region"] for each in cxl_first["destroy"].json()] == ["region0"]


def test_a_persistent_cxl_region_is_made_again_and_has_its_content(cxl_second):
    assert cxl_second["before"].json() == []
    cxl_second["again"].check()
    (namespace,) = cxl_second["namespace"].json()
    assert (namespace["mode"], namespace["name"]) == ("fsdax", "mine")
    assert cxl_second["content"].check().text.split()[0] == PATTERN_SUM


def test_with_kmem_a_volatile_region_is_used_at_once(cxl_second):
    """What a distribution does: udev loads kmem, and this kernel onlines whatever is added."""
    assert cxl_second["auto"].check().text == "online\n"
    name, listed = cxl_second["ram"].check().text.split("\n", 1)
    (device,) = json.loads(listed)
    assert name == "region1" and device["mode"] == "system-ram"
    assert device["online_memblocks"] == device["total_memblocks"]
    assert device["movable"] is False


# --- without a boot ------------------------------------------------------------------------------


def _image(path: Path, size_bytes: int = MIB) -> Path:
    with path.open("wb") as image:
        image.truncate(size_bytes)
    return path


def test_a_machine_has_the_nodes_that_its_dimms_name(tmp_path):
    image = _image(tmp_path / "a.img", 64 * MIB)
    words = Machine([Dimm(image), Dimm(image, node=2)], memory="1G", cpus=2).arguments()
    numa = [words[at + 1] for at, word in enumerate(words) if word == "-numa"]
    assert numa == ["node,nodeid=0,cpus=0-1,memdev=node0", "node,nodeid=1", "node,nodeid=2"]
    assert "nvdimm,id=nv1,memdev=mem1,node=2" in words
    assert words[words.index("-m") + 1] == "1024M,slots=2,maxmem=5120M"
    assert "-numa" not in Machine([Dimm(image)]).arguments()
    given = Machine(nodes=("512M", "1G")).arguments()
    assert given[given.index("-m") + 1] == "1536M"


def test_cxl_devices_of_the_command_line(tmp_path):
    image, lsa = _image(tmp_path / "p", 256 * MIB), _image(tmp_path / "l")
    assert CxlDevice.parse("volatile=256M,serial=0x77") == CxlDevice(256 * MIB, serial=0x77)
    device = CxlDevice.parse(f"persistent={image},lsa={lsa},volatile={image}")
    assert device == CxlDevice(image, image, lsa)
    assert device.size_bytes == 512 * MIB
    words = device.arguments(0)
    assert words[-1] == (
        "cxl-type3,bus=cxl0-port,id=cxl0,sn=1,"
        "volatile-memdev=cxl0-ram,persistent-memdev=cxl0-pmem,lsa=cxl0-lsa"
    )
    for wrong, message in (
        ("colour=red", "no option colour"),
        ("persistent=/no/such", "there is no image /no/such"),
        ("volatile=/no/such", "is not a size"),
    ):
        with pytest.raises(GuestError, match=message):
            CxlDevice.parse(wrong)
    for bad, message in (
        (CxlDevice(), "not a multiple of 256 MiB"),
        (CxlDevice(volatile=64 * MIB), "not a multiple of 256 MiB"),
        (CxlDevice(persistent=image), "with a label area, or neither"),
    ):
        with pytest.raises(GuestError, match=message):
            Machine(cxl=[bad]).arguments()


def test_pmemkit_that_is_not_built_is_a_reason(tmp_path):
    with pytest.raises(GuestUnavailableError, match=r"_native\.abi3\.so is not built"):
        guest_python.layers(tmp_path, tmp_path)


def test_a_change_of_pmemkit_makes_one_small_layer(tmp_path, need, python_layers):
    package = tmp_path / "pmemkit"
    package.mkdir()
    shutil.copy(guest_python.PACKAGE / guest_python.NATIVE, package)
    (package / "one.py").write_text("ONE = 1\n")
    (package / "wrong.py").write_text("this is no Python\n")
    base, before = guest_python.layers(tmp_path / "cache", package)
    assert guest_python.layers(tmp_path / "cache", package) == [base, before]
    (package / "one.py").write_text("ONE = 2\n")
    again, after = guest_python.layers(tmp_path / "cache", package)
    assert again == base and after != before
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for layer in (base, after):
        command = [need("busybox"), "cpio", "-idmu"]
        done = subprocess.run(command, input=layer.read_bytes(), cwd=unpacked, check=False)
        assert done.returncode == 0
    library = unpacked / f"python/lib/python3.{sys.version_info[1]}"
    assert (library / "os.pyc").is_file() and not (library / "os.py").exists()
    assert (library / "rich/console.pyc").is_file() and not (library / "tkinter").exists()
    assert (library / "pmemkit/one.py").read_text() == "ONE = 2\n"
    assert [path.name for path in (library / "pmemkit/__pycache__").iterdir()] == [
        f"one.{sys.implementation.cache_tag}.pyc"
    ]


def test_an_old_qemu_is_no_cxl_machine(tmp_path, monkeypatch):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n")
    program.chmod(0o755)
    monkeypatch.setenv("PMEMKIT_GUEST_QEMU", str(program))
    assert guest_packages.Qemu.find().version == (7, 2)
    with pytest.raises(GuestUnavailableError, match=r"older than QEMU 8\.1"):
        guest_packages.Qemu.find(cxl=True)
    program.write_text("#!/bin/sh\necho QEMU emulator version 10.0.2\n")
    assert guest_packages.Qemu.find(cxl=True).command == (str(program),)


def test_backports_are_asked_of_the_mirror_that_the_machine_uses(tmp_path, monkeypatch):
    entry = tmp_path / "debian.sources"
    entry.write_text("Types: deb\nSigned-By: /usr/share/keyrings/own.gpg\n")
    targets = f"some-security http://m/s/ {entry}:1\nsome http://m/debian/ {entry}:1\n"
    monkeypatch.setattr(guest_packages, "_codename", lambda: "some")
    monkeypatch.setattr(guest_packages, "output", lambda *_: targets)
    line = "deb [signed-by=/usr/share/keyrings/own.gpg] http://m/debian/ some-backports main\n"
    assert guest_packages._backports_line() == line
    monkeypatch.setattr(guest_packages, "_codename", lambda: "other")
    with pytest.raises(GuestUnavailableError, match="no source of other"):
        guest_packages._backports_line()
