"""Pools and the kernel: it takes the area of a page map for its own, and a device backs a pool.

One boot: two namespaces with map=dev that had pools on them; Linux enables both, which overwrites
the areas, and a pool inside the guest has one of them as ``/dev/dax``. NumPy is not in the guest:
there are buffers there, and named arrays where the host opens the image again.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tools.guest import Dimm, Guest, Result

from pmemkit import MemoryPool, RegionSpec
from pmemkit.bus import machine_of
from pmemkit.bus.locate import locate
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels

MIB = 1 << 20
LABEL_SIZE = 128 << 10
SIZE = 512 * MIB
"""Of a namespace. Of 64 MiB Linux 6.1 left the area alone, of 512 MiB it did not."""
MODES = ("fsdax", "devdax")
BLOCK = "8M"
LOCAL = "hmat-lb,initiator=0,target=0,hierarchy=memory"

PROGRAM = """
import json, sys
from pmemkit import MemoryPool, RegionSpec
from pmemkit.errors import InvalidArgument, NotSupported

MIB = 1 << 20
device = sys.argv[1]
try:
    MemoryPool([RegionSpec(device, map="dev")], block_size="8M")
    refused = ""
except InvalidArgument as error:
    refused = str(error)
spec = RegionSpec(device, "dax", names=True)
with MemoryPool([spec], block_size="8M") as pool:
    region = pool.stat()["regions"][0]
    names = sorted(pool)
with MemoryPool([spec, "anonymous:64M"], block_size="8M") as pool:
    regions = pool.stat()["regions"]
    speeds = [each["attributes_from"] | {"rank": each["rank"]} for each in regions]
    held = [pool.alloc(2 * MIB, region="dax") for _ in range(4)]
    for number, buffer in enumerate(held):
        memoryview(buffer)[:] = bytes([number + 1]) * len(buffer)
    addresses = [buffer.address for buffer in held]
    moved = []
    for _ in range(3):
        moved.append(pool.remove("dax", timeout=20).bytes)
        pool.add(spec)
        pool.migrate(held, "dax")
    whole = all(
        bytes(memoryview(buffer)) == bytes([number + 1]) * len(buffer)
        for number, buffer in enumerate(held)
    )
    print(json.dumps({
        "names": names, "writers": region["writers"], "unit": region["unit"],
        "bill": region["page_map"], "speeds": speeds, "refused": refused, "moved": moved,
        "whole": whole,
        "same": addresses == [buffer.address for buffer in held], "wrong": pool.validate(),
    }))
"""

HMAT = (
    *("-machine", "hmat=on"),
    *("-numa", f"{LOCAL},data-type=access-latency,latency=130"),
    *("-numa", f"{LOCAL},data-type=access-bandwidth,bandwidth=20G"),
)
"""What QEMU's firmware says of ordinary memory."""

STEPS = {
    "list": "ndctl list -N",
    "pool": "python3 /in/program /dev/dax*.*",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pools") / "dimm.img"
    with path.open("wb") as file:
        file.truncate(2 * SIZE + LABEL_SIZE)
    with open_images(machine_of([path], label_size=LABEL_SIZE)) as images:
        init_labels(images, 0)
        for mode in MODES:
            create(images, None, Wish(mode=mode, size=SIZE, map="dev", align=2 * MIB))
    for number, mode in enumerate(MODES):
        with open_pool(path, number) as pool:
            pool.create(mode, 100_000, "u4")[:] = np.arange(100_000) * (number + 3)
            pool.persist(mode)
            assert pool.stat()["regions"][0]["page_map"]["placement"] == "dev"
    return path


@pytest.fixture(scope="module")
def areas(image: Path) -> list[bytes]:
    """What pools left between info block and data, before the boot."""
    return [area_of(image, number) for number in range(len(MODES))]


@pytest.fixture(scope="module")
def booted(guest: Guest, python_layers: None, image: Path, areas: list[bytes]) -> Result:
    return guest.run(
        [Dimm(image, label_size_bytes=LABEL_SIZE, align="2M")],
        STEPS,
        python=True,
        files={"program": PROGRAM.encode()},
        timeout_seconds=240,
        nodes=("1G",),
        qemu_arguments=HMAT,
    )


def open_pool(image: Path, number: int) -> MemoryPool:
    spec = RegionSpec(f"{image}:namespace0.{number}", "ns", names=True)
    return MemoryPool([spec], block_size=BLOCK)


def area_of(image: Path, number: int) -> bytes:
    place = locate(str(image), f"namespace0.{number}")
    info = place.namespace.claim.info
    assert info is not None
    with image.open("rb") as file:
        file.seek(place.offset - info.dataoff + 8192)
        return file.read(info.dataoff - 8192)


def test_the_kernel_enables_both_namespaces(booted):
    listed = {each["mode"]: each for each in booted["list"].json()}
    assert set(listed) == set(MODES)
    assert all(each["map"] == "dev" for each in listed.values())
    assert all(each.get("state") != "disabled" for each in listed.values())
    assert listed["fsdax"]["blockdev"] == "pmem0"


def test_a_device_backs_a_pool_in_the_guest(booted):
    found = json.loads(booted["pool"].check().text)
    assert found["names"] == ["devdax"]
    assert (found["unit"], found["bill"]["placement"]) == (2 * MIB, "mem")
    assert found["moved"] == [8 * MIB] * 3
    assert (found["whole"], found["same"], found["wrong"]) == (True, True, [])
    assert "no namespace has no info block" in found["refused"]


def test_ordinary_memory_of_the_guest_has_the_hmat_of_its_node(booted):
    _, ordinary = json.loads(booted["pool"].check().text)["speeds"]
    assert ordinary == {
        "latency_ns": "hmat",
        "bandwidth": "hmat",
        "distance": "slit",
        "rank": 30,
    }


def test_what_pools_had_is_found_after_the_kernel_was_there(booted, image, areas):
    booted["pool"].check()
    for number, mode in enumerate(MODES):
        assert area_of(image, number) != areas[number]
        with open_pool(image, number) as pool:
            assert list(pool) == [mode]
            assert (pool[mode] == np.arange(100_000) * (number + 3)).all()
            assert pool.validate() == []
            assert pool.stat()["regions"][0]["page_map"]["placement"] == "dev"
