"""Changing verbs on damaged images: refused with the damage named, and nothing written; or, where
one index block of two is damaged, carried out as after a power failure."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from uuid import UUID

import pytest
from small_images import KIB, MIB, VERSIONS, dirty, labelled, spec_of, uuid_of, with_namespaces

from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.errors import Corrupt, InvalidArgument, NoSpace, PmemError
from pmemkit.formats import btt
from pmemkit.formats.btt import BttInfo
from pmemkit.formats.infoblock import DaxInfo, PfnInfo
from pmemkit.formats.labels import IndexHeader, apply, read_area
from pmemkit.formats.layout import Layout, corruptions
from pmemkit.namespace import advice
from pmemkit.namespace.create import Wish, create, destroy, reconfigure
from pmemkit.namespace.images import Images
from pmemkit.namespace.label_verbs import init_labels, recookie, write_labels
from pmemkit.testing import Recording
from pmemkit.testing.images import check_change, look

SPEC = spec_of()
Change = Callable[[Images], object]

CHANGES: dict[str, Change] = {
    "create": lambda images: create(images, "region0", Wish(mode="raw", size=4 * KIB)),
    "destroy": lambda images: destroy(images, "n1"),
    "reconfigure": lambda images: reconfigure(images, "n1", Wish(mode="raw")),
    "recookie": lambda images: recookie(images, 0),
}


def refused(spec: DimmSpec, image: bytes, change: Change) -> PmemError:
    """The refusal, after which not a single store was made."""
    recording = Recording(len(image), initial=image)
    with pytest.raises(PmemError) as caught:
        change(Images(Machine.of([spec]), {0: recording.medium()}))
    assert recording.event_count() == 0, recording.events()
    return caught.value


def carried_out(spec: DimmSpec, image: bytes, change: Change) -> bytes:
    """The image after a change that is judged elsewhere."""
    return check_change(spec, image, change, limit=1, between=lambda before, seen: True).image


def with_area(image: bytes, *writes: tuple[int, bytes], label_size: int = 4 * KIB) -> bytes:
    area = apply(image[-label_size:], [writes])
    return image[:-label_size] + area


# --- labels --------------------------------------------------------------------------------------


def damaged_labels() -> Iterator[tuple[str, bytes]]:
    """A label in use that cannot be believed: its space is not known, so none is given away."""
    for version in VERSIONS:
        image = with_namespaces(version)
        area = read_area(image[-4 * KIB :])
        victim = next(label for label in area.labels if label.uuid == uuid_of(2))
        place = area.sizing.slot_offset(victim.slot)
        for what, block in corruptions(type(victim), victim.pack()):
            if what.startswith(("isetcookie", "abstraction_guid")) and "flipped" not in what:
                continue
            yield f"1.{version[1]} {what}", with_area(image, (place, block))


DAMAGED_LABELS = list(damaged_labels())


@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize(
    ("what", "image"), DAMAGED_LABELS, ids=[what for what, _ in DAMAGED_LABELS]
)
def test_a_damaged_label_stops_every_change(verb, what, image) -> None:
    refusal = refused(SPEC, image, CHANGES[verb])
    blocked = "nothing" if look(SPEC, image).namespaces else "is no namespace here"
    assert isinstance(refusal, Corrupt) or blocked in str(refusal)


@pytest.mark.parametrize("version", VERSIONS)
def test_labels_of_other_dimms_keep_their_space(version) -> None:
    moved = replace(SPEC, slot=7, handle=8)
    image = with_namespaces(version)
    made = carried_out(moved, image, lambda images: create(images, None, Wish(mode="raw")))
    (only,) = look(moved, made).namespaces
    assert only.offset == 24 * KIB, "behind the three that are there"
    assert [each.content for each in look(SPEC, made).namespaces] == [
        each.content for each in look(SPEC, image).namespaces
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("verb", ["create", "destroy", "reconfigure"])
def test_one_damaged_index_block_is_what_a_power_failure_leaves(version, verb) -> None:
    """The other one holds. Nothing that it names is touched, and both are whole afterwards."""
    image = with_namespaces(version)
    area = read_area(image[-4 * KIB :])
    for number in (0, 1):
        block = image[-4 * KIB + 256 * number :][:256]
        for _, corrupted in corruptions(IndexHeader, block):
            damaged = with_area(image, (256 * number, corrupted))
            before = look(SPEC, damaged)
            after = look(SPEC, carried_out(SPEC, damaged, CHANGES[verb]))
            kept = {each.uuid: replace(each, dev="") for each in after.namespaces}
            for each in before.namespaces:
                if each.name != "n1" or verb == "create":
                    assert kept[each.uuid] == replace(each, dev="")
            found = read_area(carried_out(SPEC, damaged, CHANGES[verb])[-4 * KIB :])
            assert found.faults == ()
    assert area.current is not None


@pytest.mark.parametrize("version", VERSIONS)
def test_two_damaged_index_blocks_stop_every_change(version) -> None:
    image = with_namespaces(version)
    blocks = [image[-4 * KIB + 256 * number :][:256] for number in (0, 1)]
    pairs = zip(*(list(corruptions(IndexHeader, block)) for block in blocks), strict=True)
    for (what, first), (_, second) in pairs:
        damaged = with_area(image, (0, first), (256, second))
        for verb, change in CHANGES.items():
            refusal = refused(SPEC, damaged, change)
            assert isinstance(refusal, (Corrupt, InvalidArgument)), (what, verb)
        create_refusal = refused(SPEC, damaged, CHANGES["create"])
        assert isinstance(create_refusal, Corrupt)
        assert "zero-labels or init-labels --force drops what is there" in str(create_refusal)
        without_force = refused(SPEC, damaged, lambda images: init_labels(images, 0))
        assert "--force" in str(without_force)
        carried_out(SPEC, damaged, lambda images: init_labels(images, 0, force=True))


def test_rubbish_in_the_label_area_is_not_a_label_less_image() -> None:
    image = dirty(64 * KIB)[:-64] + b"\1" * 64
    for change in (CHANGES["create"], lambda images: init_labels(images, 0)):
        assert refused(SPEC, image, change)


def test_overlapping_labels_stop_every_change() -> None:
    image = with_namespaces((1, 2))
    area = read_area(image[-4 * KIB :])
    label = replace(area.labels[0], uuid=UUID(int=77), dpa=area.labels[0].dpa + 4 * KIB)
    groups = area.update(add=[label])
    image = image[: -4 * KIB] + apply(image[-4 * KIB :], groups)
    for change in CHANGES.values():
        refusal = refused(SPEC, image, change)
        assert "overlap" in str(refusal) or "is no namespace here" in str(refusal)


# --- refusals that come before the first write ----------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("label_size", [KIB, 2 * KIB])
def test_a_label_area_without_a_free_slot(version, label_size) -> None:
    spec, image = spec_of(label_size), labelled(version, label_size=label_size)
    slots = read_area(image[-label_size:]).sizing.slot_count
    wish = Wish(mode="raw", size=4 * KIB)
    for _ in range(slots):
        image = carried_out(spec, image, lambda images: create(images, None, wish))
    seen = look(spec, image)
    assert len(seen.namespaces) == slots
    text = str(refused(spec, image, lambda images: create(images, None, wish)))
    assert f"0 of {slots} label slots are free, 1 are needed" in text
    dev = seen.namespaces[0].dev
    again = refused(spec, image, lambda images: reconfigure(images, dev, Wish(mode="raw")))
    assert isinstance(again, NoSpace)
    moved = replace(spec, slot=4, handle=5)
    assert isinstance(refused(moved, image, lambda images: recookie(images, 0)), NoSpace)
    image = carried_out(spec, image, lambda images: destroy(images, dev))
    image = carried_out(spec, image, lambda images: create(images, None, wish))
    assert len(look(spec, image).namespaces) == slots


@pytest.mark.parametrize("version", VERSIONS)
def test_wishes_that_nothing_could_fulfil_write_nothing(version) -> None:
    image = with_namespaces(version)
    wishes = [
        Wish(mode="raw", size=5000),
        Wish(mode="raw", size=0),
        Wish(mode="raw", size=1 << 40),
        Wish(mode="raw", uuid=uuid_of(1)),
        Wish(mode="raw", name="x" * 64),
        Wish(mode="raw", align=2 * MIB),
        Wish(mode="raw", sector_size=520),
        Wish(mode="sector", size=8 * KIB),
        Wish(mode="fsdax", size=8 * KIB),
        Wish(mode="fsdax", align=8192),
        Wish(mode="system-ram"),
    ]
    for wish in wishes:
        refused(SPEC, image, lambda images, w=wish: create(images, None, w))
    for wish in [
        Wish(mode="raw", uuid=uuid_of(1)),
        Wish(mode="raw", size=4 * KIB),
        Wish(mode="sector"),
        Wish(mode="fsdax"),
        Wish(mode="raw", sector_size=1),
    ]:
        refused(SPEC, image, lambda images, w=wish: reconfigure(images, "n1", w))
    refused(SPEC, image, lambda images: destroy(images, "no such"))
    refused(SPEC, image, lambda images: init_labels(images, 0))
    refused(SPEC, image, lambda images: write_labels(images, 0, bytes(4097)))
    refused(spec_of(0), image, lambda images: init_labels(images, 0))


# --- info blocks ---------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "SIZE_MIN", MIB)
    monkeypatch.setattr(btt, "ARENA_SIZE_MIN", MIB // 2)


INFO: dict[str, type[Layout]] = {"sector": BttInfo, "fsdax": PfnInfo, "devdax": DaxInfo}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", INFO)
@pytest.mark.parametrize("version", [None, (1, 1), (1, 2)])
def test_a_damaged_info_block_is_dropped_with_force_only(mode, version) -> None:
    spec = spec_of(0 if version is None else 4 * KIB)
    image = dirty(4 * MIB, 0) if version is None else labelled(version, 4 * MIB)
    image = carried_out(spec, image, lambda images: create(images, None, Wish(mode=mode)))
    place = 0 if mode == "sector" and version == (1, 2) else 4096
    refusals = 0
    for what, block in corruptions(INFO[mode], image[place : place + 4096]):
        field = what.partition(":")[0]
        damaged = image[:place] + block + image[place + 4096 :]
        if not look(spec, damaged).namespaces[0].damaged:
            # No info block any more: a bare signature, or the block of another namespace.
            assert field in ("signature", "parent_uuid"), what
            continue
        refusal = refused(spec, damaged, lambda images: destroy(images, "namespace0.0"))
        assert isinstance(refusal, Corrupt), what
        assert "--force drops what is there" in str(refusal)
        assert refused(spec, damaged, lambda i: reconfigure(i, "namespace0.0", Wish(mode="raw")))
        if version is None:
            assert refused(spec, damaged, lambda i: create(i, None, Wish(mode="fsdax")))
        refusals += 1
    assert refusals > 20
    gone = carried_out(spec, damaged, lambda i: destroy(i, "namespace0.0", force=True))
    seen = look(spec, gone)
    assert [each.mode for each in seen.namespaces] == (["raw"] if version is None else [])


@pytest.mark.parametrize("mode", ["fsdax", "devdax"])
def test_an_info_block_that_is_there_is_not_overwritten(mode) -> None:
    spec, image = spec_of(0), bytes(16 * MIB)
    image = carried_out(spec, image, lambda images: create(images, None, Wish(mode=mode)))
    text = str(refused(spec, image, lambda images: create(images, None, Wish(mode="fsdax"))))
    assert "destroy it or reconfigure the namespace" in text
    for wish in (Wish(mode="fsdax", name="a name"), Wish(mode="fsdax", sector_size=4096),
                 Wish(mode="fsdax", size=4 * MIB)):  # fmt: skip
        refused(spec, image, lambda images, w=wish: create(images, None, w))
        refused(spec, image, lambda images, w=wish: reconfigure(images, "namespace0.0", w))
    raw = carried_out(spec, image, lambda i: reconfigure(i, "namespace0.0", Wish(mode="raw")))
    assert look(spec, raw).namespaces[0].mode == "raw"
    refused(spec, raw, lambda images: destroy(images, "namespace0.0"))
