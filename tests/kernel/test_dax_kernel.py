"""Direct mappings on a real kernel: a device DAX, files on ext4 and xfs with -o dax; one boot."""

import random
from pathlib import Path

import pytest
from dax_driver import LOG, PLACES
from tools.guest import Dimm, Guest, Result

import pmemkit
from pmemkit.bus import machine_of, observe

MIB = 1 << 20
LABEL_SIZE = 128 << 10
DRIVER = Path(__file__).with_name("dax_driver.py")
PATTERN = random.Random(8).randbytes(MIB + 8192)
COPIED_TO = 8 * MIB

STEPS = {
    "make": """
        ndctl disable-region all
        ndctl init-labels -V 1.2 nmem0
        ndctl enable-region all
        ndctl create-namespace -m devdax -s 16M
        ndctl create-namespace -m fsdax -s 64M
        ndctl create-namespace -m fsdax -s 320M
        ndctl create-namespace -m raw -s 32M
        ls /dev/dax0.* /dev/pmem0*""",
    "mounts": """
        mkfs.ext4 -q -b 4096 /dev/pmem0.1
        mkfs.xfs -q -m reflink=0 /dev/pmem0.2
        mkdir /run/ext4 /run/xfs
        mount -o dax -t ext4 /dev/pmem0.1 /run/ext4
        mount -o dax -t xfs /dev/pmem0.2 /run/xfs
        grep -c dax=always /proc/mounts""",
    "maps": "python3 /in/dax_driver.py /dev/dax0.0 /run/ext4/pool /run/xfs/pool",
    "unmount": "umount /run/ext4 /run/xfs",
    "plain": """
        mkdir /run/plain
        mount -t ext4 /dev/pmem0.1 /run/plain
        cp /in/pattern /run/plain/pattern
        sync""",
    "to_dax": f"pmem copy /run/plain/pattern /dev/dax0.0 --seek {COPIED_TO} --direct on --json",
    "from_dax": f"""
        pmem copy --input /dev/dax0.0 --skip {COPIED_TO} --len {len(PATTERN)} \\
            --output /run/plain/back --direct on --json""",
    "same": "cmp /in/pattern /run/plain/back",
    "to_pmem": "pmem copy /run/plain/pattern /dev/pmem0.3 --direct on --json",
    "from_pmem": f"""
        pmem copy --input /dev/pmem0.3 --len {len(PATTERN)} --output - | cmp /in/pattern -
        umount /run/plain""",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dax") / "a.img"
    with path.open("wb") as file:
        file.truncate(448 * MIB + LABEL_SIZE)
    return path


@pytest.fixture(scope="module")
def booted(guest: Guest, python_layers: None, image: Path) -> Result:
    return guest.run(
        [Dimm(image, label_size_bytes=LABEL_SIZE)],
        STEPS,
        python=True,
        memory="2G",
        files={"dax_driver.py": DRIVER.read_bytes(), "pattern": PATTERN},
        timeout_seconds=240,
    )


@pytest.fixture(scope="module")
def maps(booted: Result) -> dict:
    booted["make"].check()
    booted["mounts"].check()
    return booted["maps"].json()


def _namespace(image: Path, mode: str, size_least: int) -> str:
    bus = observe(machine_of([image], label_size=LABEL_SIZE))
    names = [
        each.dev
        for region in bus.regions
        for each in region.namespaces
        if each.claim.mode == mode and each.size >= size_least
    ]
    return f"{image}:{names[0]}"


def test_a_device_dax_is_mapped_strictly_and_by_cache_line(maps):
    found = maps["device"]
    assert (found["granularity"], found["map_sync"], found["unit"]) == ("cacheline", True, 2 * MIB)
    assert found["domain"] in ("memory_controller", "unknown")
    assert found["length"] % (2 * MIB) == 0
    for what in ("odd_offset", "odd_length"):
        kind, text = found[what]
        assert kind == "InvalidArgument" and f"multiples of {2 * MIB}" in text
    assert found["coarse"][0] == "NotSupported" and "byte is required" in found["coarse"][1]
    assert found["busy"][0] == "Busy" and "1 views of the mapping are alive" in found["busy"][1]
    # Nobody knows what a view stored to: all of its range is written back.
    assert (found["tracker"], found["synced"]) == ("explicit", found["length"])
    assert (found["copy"], found["recovered"]) == ("stored device", 0)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_map_sync_is_granted_for_files_on_dax_mounts_and_reported(booted, maps, kind):
    assert booted["mounts"].text == "2\n"
    found = maps[kind]
    assert (found["granularity"], found["map_sync"]) == ("cacheline", True)
    assert (found["tracker"], found["length"]) == ("kernel", 8 * MIB)
    assert found["copy"] == f"stored {kind}"
    booted["unmount"].check()


def test_memory_is_tracked_by_write_protection(maps):
    found = maps["memory"]
    assert found["tracker"] in ("write-protect", "write-protect-async")
    assert (found["sees_stores"], found["synced"], found["copy"]) == (True, [2 * 4096, 0], 1)


def test_what_was_persisted_is_in_the_image_and_the_same_when_mapped_offline(maps, image):
    texts = {
        PLACES["copied"]: b"copied device",
        PLACES["stored"]: b"stored device",
        PLACES["set"]: b"\x55" * 100,
        PLACES["both"]: b"both 1 device",
        PLACES["both"] + 4096: b"both 2 device",
    }
    with pmemkit.open(_namespace(image, "devdax", 0)) as region:
        place, mapping = region.place, region.map()
        assert place is not None
        with mapping, image.open("rb") as raw:
            assert len(mapping) == maps["device"]["length"]
            for at, text in texts.items():
                assert mapping.read(at, len(text)) == text
                raw.seek(place.offset + at)
                assert raw.read(len(text)) == text
            assert mapping.log(*LOG).recovered == 0


@pytest.mark.parametrize(("kind", "size"), [("ext4", 0), ("xfs", 200 * MIB)])
def test_files_on_dax_mounts_left_their_bytes_in_the_namespace(maps, image, kind, size):
    assert maps[kind]["length"] == 8 * MIB
    with pmemkit.map(_namespace(image, "fsdax", size), read_only=True) as mapping:
        data = bytes(mapping)
    for text in (f"copied {kind}", f"stored {kind}", f"both 1 {kind}", f"both 2 {kind}"):
        assert text.encode() in data, text


def test_copies_to_and_from_device_dax_go_around_the_page_cache(booted, image):
    booted["plain"].check()
    for step in ("to_dax", "from_dax"):
        report = booted[step].check().json()
        assert report["engine"] in ("io_uring", "threads"), report
        assert (report["direct_bytes"], report["buffered_bytes"]) == (len(PATTERN), 0), report
    booted["same"].check()
    with pmemkit.map(_namespace(image, "devdax", 0), read_only=True) as mapping:
        assert mapping.read(COPIED_TO, len(PATTERN)) == PATTERN


def test_copies_to_a_block_device_are_in_its_namespace(booted, image):
    report = booted["to_pmem"].check().json()
    assert report["direct_bytes"] == len(PATTERN), report
    booted["from_pmem"].check()
    with pmemkit.map(_namespace(image, "raw", 0), read_only=True) as mapping:
        assert mapping.read(0, len(PATTERN)) == PATTERN
