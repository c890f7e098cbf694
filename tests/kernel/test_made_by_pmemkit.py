"""Namespaces that pmemkit made on blank images, as a real kernel sees and uses them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from agreement import differences, kernels, ours
from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.bus.machine import DimmSpec, Machine, to_toml
from pmemkit.formats.btt import SECTOR_SIZES
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels, recookie
from pmemkit.storage.region import open_region

MIB = 1 << 20
GIB = 1 << 30
LABEL_SIZE = 128 << 10

LIST = "ndctl list -DRNi"

# Writes a pattern of its own at the start and the end of every namespace, through its device.
WRITE = r"""
ndctl list -N | tr -d ' ",' | awk -F: '
    $1 == "dev" { dev = $2 } $1 == "blockdev" { print dev, "block", $2 }
    $1 == "chardev" { print dev, "char", $2 }' | while read dev kind name; do
    (echo "$dev"; cat /in/pattern) | head -c 65536 > /tmp/pattern
    if [ $kind = block ]; then
        size=$(blockdev --getsize64 /dev/$name)
        dd if=/tmp/pattern of=/dev/$name bs=65536 conv=fsync 2> /dev/null
        dd if=/tmp/pattern of=/dev/$name bs=4096 seek=$(((size - 65536) / 4096)) conv=fsync \
            2> /dev/null
    elif command -v daxcopy > /dev/null; then
        daxcopy write /dev/$name 0 < /tmp/pattern
    fi
    echo "$dev $kind $name"
done
"""

MKFS = r"""
mkdir -p /mnt
for fs in ext4 xfs; do
    for name in $(cat /in/$fs); do
        [ $fs = ext4 ] && size="-b 4096" || size=""
        mkfs.$fs -q $size /dev/$name > /dev/null
        mount -t $fs -o dax /dev/$name /mnt
        grep -q " /mnt $fs .*dax" /proc/mounts
        cp /in/pattern /mnt/file
        sync
        umount /mnt
        mount -t $fs -o dax /dev/$name /mnt
        cmp /in/pattern /mnt/file
        umount /mnt
        sync
        echo "$name $(sha256sum < /dev/$name | cut -d ' ' -f 1)"
    done
done
"""


def wishes() -> list[Wish]:
    """Every mode, map, alignment and sector size that the kernel supports."""
    found = [Wish(mode="raw", size=32 * MIB, sector_size=size) for size in (512, 4096)]
    found += [Wish(mode="sector", size=32 * MIB, sector_size=size) for size in SECTOR_SIZES]
    for mode in ("fsdax", "devdax"):
        for where in ("mem", "dev"):
            for align, size in ((4096, 64 * MIB), (2 * MIB, 64 * MIB), (GIB, 2 * GIB)):
                sizes = (512, 4096) if mode == "fsdax" else (512,)
                found += [
                    Wish(mode=mode, size=size, map=where, align=align, sector_size=each)
                    for each in sizes
                ]
    return [replace(wish, name=f"n{number}") for number, wish in enumerate(found)]


def make(path: Path, version: tuple[int, int], slot: int, wanted: list[Wish]) -> None:
    """A labelled image with these namespaces, biggest first so that 1 GiB stays aligned."""
    machine = machine_of([path], label_size=LABEL_SIZE, slot=slot)
    with open_images(machine) as images:
        init_labels(images, 0, version=version)
        for wish in sorted(wanted, key=lambda wish: -(wish.size or 0)):
            create(images, None, wish)


@pytest.fixture(scope="module")
def shown(guest: Guest, tmp_path_factory):
    """One boot with everything: both label versions, and label-less images of each mode."""
    directory = tmp_path_factory.mktemp("made")
    size = sum(wish.size or 0 for wish in wishes())
    room = -(-size // GIB) * GIB
    paths = []
    for slot, version in enumerate(((1, 2), (1, 1))):
        path = directory / f"v{version[1]}.img"
        with path.open("wb") as image:
            image.truncate(room + LABEL_SIZE)
        make(path, version, slot, wishes())
        paths.append(path)
    for slot, wish in enumerate(
        (Wish(mode="fsdax"), Wish(mode="sector"), Wish(mode="devdax", map="mem")), start=2
    ):
        path = directory / f"{wish.mode}.img"
        with path.open("wb") as image:
            image.truncate(512 * MIB)
        with open_images(machine_of([path], slot=slot)) as images:
            create(images, None, wish)
        paths.append(path)
    names = [str(path) for path in paths]
    before = ours(names)
    big = [
        each["blockdev"]
        for region in before.values()
        for each in region["namespaces"].values()
        if each["mode"] == "fsdax"
    ]
    dimms = [Dimm(path, label_size_bytes=LABEL_SIZE, align="2M") for path in paths[:2]]
    dimms += [Dimm(path, align="2M") for path in paths[2:]]
    result = guest.run(
        dimms,
        {"list": LIST, "write": WRITE, "list again": LIST},
        timeout_seconds=300,
        files={"pattern": PATTERN},
    )
    return names, before, result, big


PATTERN = hashlib.shake_256(b"pmemkit").digest(65536)


def test_everything_is_enumerated_with_the_same_fields(shown):
    _, before, result, _ = shown
    listed = kernels(result["list"].json())
    wrong = differences(listed, before)
    assert not wrong, "\n".join(wrong)
    modes = {
        (each["mode"], each.get("map"), each.get("align"), each.get("sector_size"))
        for region in listed.values()
        for each in region["namespaces"].values()
    }
    assert len(modes) >= 2 + 7 + 2 * 6 + 6


def test_what_the_kernel_wrote_is_read_through_pmemkit(guest, shown, tmp_path):
    """Through a machine file: names depend on where dimms are plugged, as the kernel's do."""
    names, before, result, _ = shown
    listed = result["list"].json()
    handles = {dimm["dev"]: dimm["handle"] - 1 for dimm in listed["dimms"]}
    slots = {region["dev"]: handles[region["mappings"][0]["dimm"]] for region in listed["regions"]}
    machine = tmp_path / "machine.toml"
    machine.write_text(to_toml(machine_of(names), str(tmp_path)))
    written = [line.split() for line in result["write"].check().text.splitlines()]
    assert len(written) == sum(
        1 for region in before.values() for each in region["namespaces"].values() if each["size"]
    )
    for dev, kind, _ in written:
        region, number = dev.removeprefix("namespace").split(".")
        place = f"{machine}:namespace{slots[f'region{region}']}.{number}"
        expected = (dev.encode() + b"\n" + PATTERN)[:65536]
        with open_region(place, read_only=True) as opened:
            device = opened.device(read_only=True)
            if kind == "char" and "daxcopy" not in guest.programs:
                continue
            assert device.read(0, 65536) == expected, dev
            if kind == "block":
                end = (device.size - 65536) // 4096 * 4096
                assert device.read(end, 65536) == expected, dev


def test_use_changes_no_label(shown):
    names, before, result, _ = shown
    assert differences(kernels(result["list again"].json()), before) == []
    assert ours(names) == before


def test_file_systems_live_on_fsdax(guest: Guest, tmp_path):
    """ext4 and xfs with ``-o dax``, map in DRAM and on media, labelled and label-less."""
    labelled, bare = tmp_path / "labelled.img", tmp_path / "bare.img"
    with labelled.open("wb") as image:
        image.truncate(GIB + LABEL_SIZE)
    with bare.open("wb") as image:
        image.truncate(512 * MIB)
    make(
        labelled,
        (1, 2),
        0,
        [Wish(mode="fsdax", size=512 * MIB, map=where) for where in ("mem", "dev")],
    )
    with open_images(machine_of([bare], slot=1)) as images:
        create(images, None, Wish(mode="fsdax"))
    result = guest.run(
        [Dimm(labelled, label_size_bytes=LABEL_SIZE), Dimm(bare)],
        {"use": MKFS},
        timeout_seconds=180,
        files={"pattern": PATTERN, "ext4": b"pmem0 pmem1", "xfs": b"pmem0.1"},
    )
    sums = dict(line.split() for line in result["use"].check().text.splitlines())
    assert set(sums) == {"pmem0", "pmem0.1", "pmem1"}
    places = {
        "pmem0": f"{labelled}:namespace0.0",
        "pmem0.1": f"{labelled}:namespace0.1",
        "pmem1": f"{bare}:namespace0.0",
    }
    for name, place in places.items():
        with open_region(place, read_only=True) as region:
            read = hashlib.sha256(region.medium.read(0, region.size)).hexdigest()
        assert read == sums[name], name


def test_a_moved_image_works_after_recookie(guest: Guest, tmp_path):
    """Labelled for slot 0 and plugged into slot 1 the kernel skips the labels; then not."""
    path = tmp_path / "moved.img"
    with path.open("wb") as image:
        image.truncate(256 * MIB + LABEL_SIZE)
    make(path, (1, 2), 0, [Wish(mode="fsdax", size=64 * MIB), Wish(mode="raw", size=32 * MIB)])
    dimm = Dimm(path, label_size_bytes=LABEL_SIZE, slot=1)
    before = guest.run([dimm], {"list": "ndctl list -N"})["list"].json()
    assert before == []
    machine = Machine.of([DimmSpec(path=str(path), label_size=LABEL_SIZE, slot=1)])
    assert len(observe(machine).regions[0].namespaces) == 0
    with open_images(machine) as images:
        assert len(recookie(images, 0)) == 2
    after = guest.run([dimm], {"list": "ndctl list -N"})["list"].json()
    assert sorted(each["mode"] for each in after) == ["fsdax", "raw"]
