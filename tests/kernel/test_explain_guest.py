"""The nature of regions on real kernels: NVDIMMs, e820, virtio-pmem, CXL; two boots."""

import json
from pathlib import Path

import pytest
from tools.guest import CxlDevice, Dimm, Guest, Result

MIB = 1 << 20
LABEL_SIZE = 128 << 10
DECLARED = b"""\
[[dimm]]
serial = 0x123456
nature = "memory"

[[dimm]]
id = "8680-57341200"
nature = "storage"
endurance = "20P"
"""
CXL_DECLARED = b"""\
[[dimm]]
serial = 0x77
nature = "memory"
"""

STEPS = {
    "explain": "modprobe virtio_pmem; pmem explain --json",
    "declared": """
        mkdir /etc/pmemkit
        cp /in/machine.toml /etc/pmemkit
        pmem explain --json""",
    "list": "pmem list -Rv",
    "info": "pmem info /dev/pmem0 --json",
    "writable": "chmod 666 /etc/pmemkit/machine.toml; pmem explain region1",
}
POOL = """
import json
from pmemkit import MemoryPool
with MemoryPool(["/dev/dax1.0"], block_size="8M") as pool:
    print(json.dumps(pool.stat()["regions"][0]))
"""
CXL_STEPS = {
    "regions": """
        memdev() { cxl list -M -s "$1" | grep -o 'mem[0-9]*"' | tr -d '"'; }
        cxl create-region -d decoder0.0 -t pmem -m $(memdev 0x77) > /dev/null
        cxl-create-ram-region $(memdev 1)""",
    "explain": "pmem explain --json",
    "dax": "pmem explain dax1.0",
    "pool": f"""
        modprobe device_dax
        echo dax1.0 > /sys/bus/dax/drivers/device_dax/new_id
        python3 -c '{POOL}'""",
    "declared": "pmem explain region0 --declare /in/machine.toml --json",
}


def _image(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as image:
        image.truncate(size_bytes)
    return path


def _verdicts(text: str) -> dict[str, dict]:
    return {each["dev"]: each for each in json.loads(text)}


def _shown(verdict: dict) -> dict[str, str]:
    return {each["source"]: each["value"] for each in verdict["evidence"]}


# --- NVDIMMs, e820 and virtio-pmem ----------------------------------------------------------------


@pytest.fixture(scope="module")
def booted(guest: Guest, python_layers: None, tmp_path_factory: pytest.TempPathFactory) -> Result:
    directory = tmp_path_factory.mktemp("explain")
    size = 64 * MIB
    images = [_image(directory / name, size + LABEL_SIZE) for name in ("a", "b")]
    backend = f"memory-backend-file,id=virtio,share=on,mem-path={_image(directory / 'v', size)}"
    return guest.run(
        [Dimm(path, label_size_bytes=LABEL_SIZE, node=n) for n, path in enumerate(images, 1)],
        STEPS,
        python=True,
        nodes=("3G", "0", "0"),
        kernel_arguments="memmap=64M!2G",
        qemu_arguments=[
            *("-object", f"{backend},size={size}"),
            *("-device", "virtio-pmem-pci,memdev=virtio"),
        ],
        files={"machine.toml": DECLARED},
        timeout_seconds=240,
    )


def test_each_nvdimm_is_storage_by_its_nfit_and_on_its_node(booted):
    verdicts = _verdicts(booted["explain"].check().text)
    assert list(verdicts) == ["region0", "region1", "region2", "region3"]
    for number in (1, 2):
        verdict = verdicts[f"region{number}"]
        assert verdict["nature"] == "storage"
        assert verdict["because"] == "firmware (NFIT) says a persistent range"
        shown = _shown(verdict)
        assert shown["SRAT and SLIT"] == f"target node {number}, without memory so far"
        assert shown["/proc/iomem"] == "Persistent Memory"
        assert shown[f"format of nmem{number - 1}"].startswith("interface 0x0301")
        assert shown[f"provider of region{number}"] == "ACPI.NFIT (driver nfit)"
    assert 'id = "8680-56341200"' in verdicts["region1"]["would_change"][0]


def test_an_e820_region_is_storage_because_nothing_is_known(booted):
    verdict = _verdicts(booted["explain"].text)["region0"]
    assert (verdict["nature"], verdict["wears"]) == ("storage", False)
    assert verdict["because"] == "its nature is not known, so it is taken for storage"
    shown = _shown(verdict)
    assert shown["/proc/iomem"] == "Persistent Memory (legacy)"
    assert "memmap=64M!2G takes 64 MiB of it at 0x80000000" in shown["kernel command line"]
    assert "emulated in RAM" in shown["memory map of the firmware"]
    assert "whatever is behind it" in shown["firmware (e820)"]
    assert shown["memory tier"].startswith("memory_tier")
    assert {each["says"] for each in verdict["evidence"]} == {None}


def test_virtio_pmem_is_storage(booted):
    verdict = _verdicts(booted["explain"].text)["region3"]
    assert verdict["nature"] == "storage"
    assert "says virtio-pmem: a file of the host" in verdict["because"]


def test_the_owners_word_is_the_last(booted):
    verdicts = _verdicts(booted["declared"].check().text)
    natures = [verdicts[f"region{n}"]["nature"] for n in range(4)]
    assert natures == ["storage", "memory", "storage", "storage"]
    memory, worn = verdicts["region1"], verdicts["region2"]
    assert memory["because"] == "/etc/pmemkit/machine.toml:1 says nature memory"
    assert memory["would_change"][1].endswith("(then firmware (NFIT) says a persistent range)")
    assert worn["because"] == "/etc/pmemkit/machine.toml:5 says nature storage"
    assert (worn["wears"], worn["endurance"]) == (True, 20 << 50)
    assert {each["dev"]: each["nature"] for each in booted["list"].json()} == {
        dev: verdict["nature"] for dev, verdict in verdicts.items()
    }
    assert booted["info"].json()["nature_because"] == verdicts["region0"]["because"]


def test_root_does_not_follow_declarations_that_others_can_write(booted):
    assert (booted["writable"].status, booted["writable"].text) == (2, "")
    assert "chmod go-w /etc/pmemkit/machine.toml" in booted["writable"].errors


# --- CXL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cxl_booted(
    cxl_guest: Guest, python_layers: None, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    directory = tmp_path_factory.mktemp("explain-cxl")
    persistent, lsa = _image(directory / "p", 256 * MIB), _image(directory / "l", 256 << 10)
    devices = [
        CxlDevice(volatile=256 * MIB),
        CxlDevice(persistent=persistent, lsa=lsa, serial=0x77),
    ]
    return cxl_guest.run(
        [],
        CXL_STEPS,
        cxl=devices,
        python=True,
        files={"machine.toml": CXL_DECLARED},
        timeout_seconds=240,
    )


def test_a_persistent_cxl_region_is_storage_by_its_mode_and_cdat(cxl_booted):
    cxl_booted["regions"].check()
    verdict = _verdicts(cxl_booted["explain"].check().text)["region0"]
    assert verdict["nature"] == "storage"
    assert "CXL region0 says mode pmem" in verdict["because"]
    deciding = {each["value"] for each in verdict["evidence"] if each["strength"] == "firmware"}
    assert deciding == {"mode pmem", "persistent (256 MiB at 0x0)"}
    shown = _shown(verdict)
    assert shown["provider of region0"].startswith("CXL ")
    assert shown["/proc/iomem"] == "CXL Window 0, Persistent Memory"
    assert shown["SRAT and SLIT"] == "target node 1, without memory so far"
    assert "([[dimm]] serial = 0x77)" in verdict["would_change"][0]


def test_a_volatile_cxl_region_is_memory_on_the_node_of_its_window(cxl_booted):
    verdict = _verdicts(cxl_booted["explain"].text)["region1"]
    assert verdict["nature"] == "memory"
    assert "CXL region1 says mode ram" in verdict["because"]
    (latency,) = (
        each["value"] for each in verdict["evidence"] if each["value"].startswith("read latency")
    )
    assert latency.startswith("read latency 150 ns, write latency 250 ns, read bandwidth 16000 MB")
    assert _shown(verdict)["SRAT and SLIT"] == "target node 1, without memory so far"
    assert cxl_booted["dax"].check().text.startswith(f"region1: memory: {verdict['because']}\n")


def test_a_pool_over_cxl_memory_knows_how_fast_it_is(cxl_booted):
    """As its node is not online, only the CDAT of the device, or what the kernel made of it."""
    region = json.loads(cxl_booted["pool"].check().text)
    origins = {"latency_ns": "cdat", "bandwidth": "cdat", "distance": None}
    assert region["attributes_from"] == origins
    assert region["latency_ns"] >= 150
    assert region["bandwidth"] == 16e9
    assert region["rank"] == region["latency_ns"] - 100
    assert region["weight"] == 1, "ordinary memory has no bandwidth here"


def test_a_cxl_device_is_declared_by_its_serial_number(cxl_booted):
    verdict = _verdicts(cxl_booted["declared"].check().text)["region0"]
    assert verdict["nature"] == "memory"
    assert verdict["because"] == "/in/machine.toml:1 says nature memory"
