"""From labels to namespaces: the kernel's rules, on label areas made for each of them."""

from dataclasses import replace
from uuid import UUID

import pytest

from pmemkit.bus.image import ImageRegion
from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.formats import guids
from pmemkit.formats.cookie import cookies
from pmemkit.formats.labels import (
    LABELS,
    Label,
    LabelFlag,
    LabelV1,
    LabelV2,
    apply,
    initialise,
    read_area,
)
from pmemkit.formats.layout import corruptions
from pmemkit.testing.images import observe_bytes

KIB = 1 << 10
AREA = 4 * KIB
REGION = 64 * KIB
VERSIONS = sorted(LABELS)
SPEC = DimmSpec(path="image", label_size=AREA, slot=0, handle=1)


def machine(ways: int) -> Machine:
    """Dimms whose places in the set and serial numbers differ in their bytes' order."""
    dimms = [
        DimmSpec(path=f"image{n}", label_size=AREA, slot=n, region_offset=n << 8 * n)
        for n in range(ways)
    ]
    return Machine.of(dimms, regions=(tuple(range(ways)),) if ways > 1 else ())


def label(version: tuple[int, int] = (1, 2), number: int = 1, **more: object) -> Label:
    values: dict[str, object] = {
        "uuid": UUID(int=number << 64 | 5),
        "name": b"name%d" % number,
        "nlabel": 1,
        "position": 0,
        "isetcookie": cookies([SPEC.identity()]).of_version(*version),
        "lbasize": 512,
        "dpa": (number - 1) * 16 * KIB,
        "rawsize": 16 * KIB,
        "slot": 0,
    }
    if version == (1, 2):
        values |= {"type_guid": guids.PERSISTENT_MEMORY, "abstraction_guid": guids.NULL}
    return LABELS[version](**(values | more))


def area_of(*labels: Label, version: tuple[int, int] = (1, 2)) -> bytes:
    area = apply(bytes(AREA), initialise(bytes(AREA), *version))
    for each in labels:
        area = apply(area, read_area(area).update(add=[each]))
    return area


def region_of(*areas: bytes) -> ImageRegion:
    found = observe_bytes(machine(len(areas)), *(bytes(REGION) + area for area in areas))
    (region,) = found.regions
    return region


def scanned(*labels: Label, version: tuple[int, int] = (1, 2)) -> ImageRegion:
    region = region_of(area_of(*labels, version=version))
    assert region.scan is not None
    return region


@pytest.mark.parametrize("version", VERSIONS)
def test_labels_that_obey_the_rules_are_namespaces(version) -> None:
    region = scanned(label(version, 2), label(version, 1), version=version)
    assert region.scan.faults == ()
    found = {each.name: (each.offset, each.size) for each in region.namespaces}
    assert found == {"name1": (0, 16 * KIB), "name2": (16 * KIB, 16 * KIB)}
    assert region.free() == [(32 * KIB, 32 * KIB)]


def test_namespaces_are_numbered_by_their_start_lowest_byte_first() -> None:
    """As the kernel sorts them: 0x100010000 before 0x100004000, whose third byte is larger."""
    low, high = label(number=2), label(number=3, dpa=0, rawsize=4 * KIB)
    region = scanned(low, high)
    assert [each.dev for each in region.namespaces] == ["namespace0.0", "namespace0.1"]
    starts = [each.start.to_bytes(8, "little") for each in region.namespaces]
    assert starts == sorted(starts)


CASES = [
    ("isetcookie", {"isetcookie": 5}, "isetcookie is 0x0000000000000005, that of other dimms"),
    ("isetcookie of zero", {"isetcookie": 0}, "isetcookie is 0x0000000000000000, that of other"),
    ("nlabel", {"nlabel": 2}, "nlabel is 2, the region has 1 dimms"),
    ("position", {"position": 1}, "position is 1 of 1"),
    ("dpa", {"dpa": 512, "rawsize": 4096}, "dpa is 0x200, no multiple of 4096"),
    ("dpa behind", {"dpa": REGION}, "dpa is 0x10000, expected 0x0 to 0x10000 (excluded)"),
    ("rawsize", {"rawsize": 512}, "rawsize is 0x200, no positive multiple of 4096"),
    ("rawsize of zero", {"rawsize": 0}, "rawsize is 0x0, no positive multiple of 4096"),
    ("end", {"dpa": 32768, "rawsize": REGION}, "rawsize is 0x10000: from 0x8000 on it ends"),
    ("type_guid", {"type_guid": guids.DAX}, "type_guid is 97a86d9c-3cdd-4eda-986f-5068b4f80088"),
]


@pytest.mark.parametrize(("more", "message"), [row[1:] for row in CASES], ids=[r[0] for r in CASES])
def test_a_label_that_breaks_a_rule_is_skipped_and_the_next_is_tried(more, message) -> None:
    region = scanned(label(number=1, **more), label(number=2))
    assert [each.name for each in region.namespaces] == ["name2"]
    assert len(region.scan.faults) == 1
    assert message in region.scan.faults[0]
    assert region.scan.faults[0].startswith("nmem0: slot 0: ")
    foreign = "isetcookie" in more
    assert bool(region.scan.foreign) is foreign
    assert bool(region.scan.damage) is not foreign


def test_space_that_a_skipped_label_reserves_is_not_free() -> None:
    """The kernel reserves it too; and what a damaged label owns must not be given away."""
    region = scanned(label(number=2, isetcookie=1), label(number=3, rawsize=1 << 63))
    assert region.namespaces == ()
    assert region.free() == [(0, 16 * KIB)]


def test_overlapping_labels_make_the_kernel_refuse_the_dimm() -> None:
    region = scanned(label(number=1, rawsize=20 * KIB), label(number=2), label(number=4))
    assert region.scan.blocked
    assert region.namespaces == ()
    assert "slots 0 and 1 overlap: 0x0+0x5000 and 0x4000+0x4000" in region.scan.faults[0]


def test_the_same_uuid_twice_stops_the_scan() -> None:
    region = scanned(label(number=1), label(number=2, uuid=label(number=1).uuid))
    assert region.scan.blocked
    assert region.namespaces == ()
    assert f"slot 1: uuid {label(number=1).uuid} is there twice" in region.scan.faults[0]


def test_flags_that_old_kernels_left_do_not_matter() -> None:
    region = scanned(label(flags=LabelFlag.UPDATING | LabelFlag.LOCAL))
    assert len(region.namespaces) == 1
    assert region.scan.faults == ()


def test_an_unknown_abstraction_is_shown_raw_and_told() -> None:
    region = scanned(label(abstraction_guid=UUID(int=9)))
    (only,) = region.namespaces
    assert only.claim.mode == "raw"
    (fault,) = only.claim.faults
    assert fault.field == "abstraction_guid"
    assert str(UUID(int=9)) in fault.message


# --- every field of a label ----------------------------------------------------------------------

JUDGED_BY = {
    "nlabel": "nlabel is",
    "position": "position is",
    "isetcookie": "isetcookie is",
    "dpa": "dpa is",
    "rawsize": "rawsize is",
    "slot": "slot at byte 120 is",
    "type_guid": "type_guid is",
    "abstraction_guid": "abstraction_guid at byte 144 is",
    "checksum": "checksum at byte 248 is",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_single_field_corruption_of_a_label_has_its_own_error(version) -> None:
    whole = area_of(label(version, 3), label(version, 1), version=version)
    sound = region_of(whole)
    first = read_area(whole).labels[0]
    place = read_area(whole).sizing.slot_offset(first.slot)
    told = {}
    for what, block in corruptions(type(first), whole[place : place + first.SIZE]):
        region = region_of(apply(whole, [[(place, block)]]))
        field, _, value = what.partition(": ")
        area = region.dimms[0].span.area
        faults = [str(fault) for fault in area.faults] + list(region.scan.faults)
        faults += [str(fault) for each in region.namespaces for fault in each.claim.faults]
        expected = "checksum" if "flipped" in value and field != "slot" else field
        assert any(JUDGED_BY[expected] in fault for fault in faults), (what, faults)
        names = sorted(each.name for each in region.namespaces)
        if what == "dpa: 1":
            # It overlaps the other label then, and the kernel refuses the whole dimm.
            assert names == []
        elif field == "abstraction_guid" and "flipped" not in what:
            assert names == ["name1", "name3"]
        else:
            assert names == ["name1"], what
        told[what] = next(fault for fault in faults if JUDGED_BY[expected] in fault)
    assert sound.scan.faults == ()
    assert len(set(told.values())) == len(told)


def test_every_rule_of_a_label_table_has_a_check() -> None:
    """A row with wrong values has a judge, and a judge stands for a row with wrong values."""
    rows = {row.name for layout in (LabelV1, LabelV2) for row in layout.fields() if row.wrong}
    assert rows == set(JUDGED_BY)


# --- sets of several dimms -----------------------------------------------------------------------


def interleaved(ways: int, cookie: int, version: tuple[int, int] = (1, 1)) -> list[bytes]:
    return [
        area_of(label(version, 1, nlabel=ways, position=n, isetcookie=cookie), version=version)
        for n in range(ways)
    ]


@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("old", [False, True])
def test_a_set_is_one_namespace_under_the_cookie_and_the_old_one(ways, version, old) -> None:
    made = cookies([each.identity() for each in machine(ways).dimms])
    cookie = made.alternative if old else made.of_version(*version)
    region = region_of(*interleaved(ways, cookie, version))
    assert region.scan.faults == ()
    (only,) = region.namespaces
    assert (only.size, only.offset, only.name) == (ways * 16 * KIB, 0, "name1")
    assert len(only.found.labels) == ways
    assert region.size == ways * REGION


def test_a_set_that_lacks_a_position_stops_the_scan() -> None:
    made = cookies([each.identity() for each in machine(3).dimms])
    areas = interleaved(3, made.v1)
    areas[1] = area_of(version=(1, 1))
    region = region_of(*areas)
    assert region.scan.blocked
    assert region.namespaces == ()
    assert f"namespace {label().uuid} has no label for position 1" in region.scan.faults


def test_two_labels_for_one_position_stop_the_scan() -> None:
    made = cookies([each.identity() for each in machine(2).dimms])
    areas = interleaved(2, made.v1)
    areas[1] = areas[0]
    region = region_of(*areas)
    assert region.scan.blocked
    assert any("has two labels for 0" in fault for fault in region.scan.faults)


def test_a_set_whose_dimms_have_different_versions_or_no_labels() -> None:
    made = cookies([each.identity() for each in machine(2).dimms])
    one, _ = interleaved(2, made.v1)
    other = area_of(version=(1, 2))
    assert region_of(one, other).span.version is None
    assert not region_of(one, bytes(AREA)).labelled


def test_an_area_that_the_kernel_has_not_seen_yet() -> None:
    region = region_of(bytes(AREA))
    assert not region.labelled
    (only,) = region.namespaces
    assert (only.size, only.claim.mode, only.found) == (REGION, "raw", None)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cookie_that_is_shown(version) -> None:
    made = cookies([SPEC.identity()])
    assert region_of(area_of(version=version)).span.cookie == made.of_version(*version)
    assert region_of(bytes(AREA)).span.cookie == made.v2
    plain = observe_bytes(Machine.of([replace(SPEC, label_size=0)]), bytes(REGION))
    assert plain.regions[0].span.cookie == made.v1
