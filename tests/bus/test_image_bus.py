"""The image bus: what a reader finds on files, whole and damaged, without writing anything."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from pmemkit.bus import bus_record, listing
from pmemkit.bus.image import find_label_size, machine_of, observe
from pmemkit.bus.machine import DimmSpec, Machine, to_toml
from pmemkit.errors import InvalidArgument, NotSupported, PmemError
from pmemkit.formats.infoblock import DaxInfo, PfnInfo
from pmemkit.formats.labels import LABELS, IndexHeader, apply, initialise, read_area, sizing
from pmemkit.formats.layout import corruptions
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.infoblock_verbs import infoblock_image
from pmemkit.namespace.label_verbs import check_labels, init_labels, labels_listing
from pmemkit.testing.images import check_change, observe_bytes

KIB, MIB = 1 << 10, 1 << 20
AREA = 16 * KIB


def labelled_file(path: Path, version: tuple[int, int] = (1, 2), size: int = 64 * MIB) -> Path:
    """A sparse image with a label area and an fsdax and a raw namespace of 16 MiB."""
    with path.open("wb") as file:
        file.truncate(size + AREA)
    machine = machine_of([path], label_size=AREA)
    with open_images(machine) as images:
        init_labels(images, 0, version=version)
        create(images, None, Wish(mode="fsdax", size=16 * MIB, name="fs", uuid=UUID(int=1)))
        create(images, None, Wish(mode="raw", size=16 * MIB, name="raw", uuid=UUID(int=2)))
    return path


def digest(path: Path) -> tuple[str, int]:
    return hashlib.blake2b(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns


def everything(path: Path) -> None:
    """Every verb that only looks; what they refuse, they refuse as the package does."""
    for look in (
        lambda: bus_record(observe(machine_of([path])), idle=True),
        lambda: listing(
            [bus_record(observe(machine_of([path], label_size=AREA)), idle=True)],
            dimms=True,
            regions=True,
            namespaces=True,
        ),
        lambda: [check_labels(dimm) for dimm in observe(machine_of([path])).dimms],
        lambda: labels_listing(observe(machine_of([path], label_size=AREA)).dimms),
    ):
        try:
            look()
        except PmemError as refusal:
            assert refusal.message


# --- whole images --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", sorted(LABELS))
def test_a_single_path_needs_no_machine_file(tmp_path, version) -> None:
    path = labelled_file(tmp_path / "a.img", version)
    bus = observe(machine_of([path]))
    (dimm,) = bus.dimms
    assert (dimm.spec.label_size, dimm.spec.slot, dimm.address) == (AREA, 0, 1 << 32)
    names = {each.name: (each.claim.mode, each.size) for each in bus.regions[0].namespaces}
    assert names == {"fs": ("fsdax", 16 * MIB), "raw": ("raw", 16 * MIB)}
    assert bus.namespace("fs").uuid == UUID(int=1)
    assert bus.namespace(str(UUID(int=2))).name == "raw"
    with pytest.raises(InvalidArgument, match="'nothing' is no namespace here; there is"):
        bus.namespace("nothing")
    with pytest.raises(InvalidArgument, match="'region7' is no region here"):
        bus.region("region7")


def test_the_slot_is_found_by_the_cookie_of_the_labels(tmp_path) -> None:
    path = labelled_file(tmp_path / "a.img")
    machine = Machine.of([DimmSpec(path=str(path), label_size=AREA, slot=5)])
    assert observe(machine).regions[0].namespaces == ()
    with open_images(machine) as images:
        init_labels(images, 0, version=(1, 2), force=True)
        create(images, None, Wish(mode="raw", size=16 * MIB))
    assert machine_of([path]).dimms[0].slot == 5
    assert machine_of([path], slot=2).dimms[0].slot == 2


def test_a_machine_file_and_several_paths(tmp_path) -> None:
    first, second = labelled_file(tmp_path / "a.img"), labelled_file(tmp_path / "b.img")
    both = machine_of([first, second])
    assert [dimm.slot for dimm in both.dimms] == [0, 1], "both were labelled for slot 0"
    toml = tmp_path / "m.toml"
    toml.write_text(to_toml(both, str(tmp_path)))
    assert [each.path for each in machine_of([toml]).dimms] == [str(first), str(second)]
    with pytest.raises(InvalidArgument, match="stands alone"):
        machine_of([toml, first])


@pytest.mark.parametrize("size", [1 << shift for shift in range(10, 21)] + [384 * KIB, 640 * KIB])
def test_label_areas_of_many_sizes_are_found(size) -> None:
    version = (1, 2) if size % 3 else (1, 1)
    image = bytes(256 * KIB) + apply(bytes(size), initialise(bytes(size), *version))
    found = find_label_size(lambda at, length: image[at : at + length], len(image))
    assert found == size


def test_what_is_no_image_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(PmemError, match=r"missing\.img"):
        machine_of([tmp_path / "missing.img"])
    with pytest.raises(PmemError):
        machine_of([tmp_path])
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(NotSupported, match="neither a file nor a block device"):
        machine_of([fifo])


def test_a_label_area_that_leaves_nothing_of_the_image(tmp_path) -> None:
    path = tmp_path / "tiny.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(InvalidArgument, match="label area of 4096 bytes leaves nothing of 4096"):
        observe(Machine.of([DimmSpec(path=str(path), label_size=4096)]))
    path.write_bytes(b"")
    bus = observe(Machine.of([DimmSpec(path=str(path))]))
    assert bus.regions[0].size == 0


# --- damage --------------------------------------------------------------------------------------


def test_an_area_whose_blocks_are_all_damaged_is_not_taken_for_label_less(tmp_path) -> None:
    """Who takes it for a label-less image would offer to put an info block over a namespace."""
    path = labelled_file(tmp_path / "a.img")
    data = bytearray(path.read_bytes())
    for number in (0, 1):
        data[64 * MIB + 256 * number + 20] ^= 3
    path.write_bytes(data)
    machine = machine_of([path])
    assert machine.dimms[0].label_size == AREA
    checked = check_labels(observe(machine).dimms[0])
    assert not checked.labelled
    assert checked.findings[0] == "has no valid index block"
    assert "namespace index block 0: checksum" in checked.findings[1]
    assert "namespace index block 1: checksum" in checked.findings[2]
    with open_images(machine) as images, pytest.raises(PmemError, match="no valid index block"):
        create(images, None, Wish(mode="fsdax"))
    assert path.read_bytes() == data


def test_looking_at_every_corrupted_index_block_writes_nothing(tmp_path) -> None:
    path = labelled_file(tmp_path / "a.img", size=48 * MIB)
    whole = path.read_bytes()
    area = whole[-AREA:]
    size = sizing(AREA, 256).index_size
    files = [
        (f"{number} {what}", [(number * size, block)])
        for number in (0, 1)
        for what, block in corruptions(IndexHeader, area[number * size :][:size])
    ]
    pairs = zip(files[: len(files) // 2], files[len(files) // 2 :], strict=True)
    files += [(f"both {first[0]}", first[1] + second[1]) for first, second in pairs]
    for what, writes in files:
        with path.open("r+b") as file:
            file.seek(len(whole) - AREA)
            file.write(apply(area, [writes]))
        before = path.stat().st_mtime_ns
        everything(path)
        assert path.stat().st_mtime_ns == before, what
        bus = observe(machine_of([path], label_size=AREA))
        dimm = bus.dimms[0]
        assert dimm.span.area.faults, what
        if not what.startswith("both"):
            assert [each.name for each in bus.regions[0].namespaces] != []
        assert check_labels(dimm).findings, what
    assert path.read_bytes()[:-AREA] == whole[:-AREA]


@pytest.mark.parametrize("mode", ["fsdax", "devdax"])
@pytest.mark.parametrize("version", [None, (1, 1), (1, 2)])
def test_every_corrupted_info_block_is_shown_and_told(mode, version) -> None:
    layout = PfnInfo if mode == "fsdax" else DaxInfo
    image, spec, start = sample(mode, version)
    place = start + 4096
    for what, block in corruptions(layout, image[place : place + 4096]):
        damaged = image[:place] + block + image[place + 4096 :]
        bus = observe_bytes(Machine.of([spec]), damaged)
        (only,) = bus.regions[0].namespaces
        field, _, value = what.partition(": ")
        if value != "one bit flipped" and field == "signature" and version != (1, 2):
            # Nothing but the signature says that there was a block.
            assert only.claim.mode == "raw"
            assert only.claim.faults == ()
            continue
        told = [fault.field for fault in only.claim.faults]
        expected = "checksum" if value == "one bit flipped" else field
        assert told, what
        assert expected in told, what
        assert only.claim.mode == "raw"
        assert listing([bus_record(bus, idle=True)], dimms=True, regions=True, namespaces=True)


def sample(mode: str, version: tuple[int, int] | None) -> tuple[bytes, DimmSpec, int]:
    """A 16 MiB namespace in memory, the dimm it is on, and where it begins."""
    spec = DimmSpec(path="image", label_size=0 if version is None else 4 * KIB)
    if version is None:
        head = infoblock_image(16 * MIB, mode=mode, map="dev", align=2 * MIB)
        return head + bytes(16 * MIB - len(head)), spec, 0
    image = bytes(16 * MIB + spec.label_size)
    spec = replace(spec, slot=0, handle=1)
    image = check_change(
        spec, image, lambda images: init_labels(images, 0, version=version), limit=1
    ).image
    wish = Wish(mode=mode, size=16 * MIB)
    return check_change(spec, image, lambda i: create(i, None, wish), limit=1).image, spec, 0


def test_a_damaged_label_is_told_and_the_others_are_shown(tmp_path) -> None:
    path = labelled_file(tmp_path / "a.img")
    data = bytearray(path.read_bytes())
    area = read_area(bytes(data[-AREA:]))
    place = len(data) - AREA + area.sizing.slot_offset(area.labels[0].slot)
    data[place + 30] ^= 1
    path.write_bytes(data)
    before = digest(path)
    everything(path)
    bus = observe(machine_of([path]))
    assert [each.name for each in bus.regions[0].namespaces] == ["raw"]
    findings = check_labels(bus.dimms[0]).findings
    assert len(findings) == 1
    assert "namespace label 1.2: checksum" in findings[0]
    assert f"(slot {area.labels[0].slot})" in findings[0]
    assert digest(path) == before
