"""Label areas: division, sequence numbers, bitmaps, and what the kernel and ndctl wrote."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.errors import InvalidArgument, NoSpace
from pmemkit.formats import guids
from pmemkit.formats.labels import (
    LABELS,
    SIGNATURE,
    IndexHeader,
    Label,
    LabelArea,
    LabelFlag,
    LabelV2,
    apply,
    erase,
    initialise,
    next_sequence,
    read_area,
    sizing,
)
from pmemkit.formats.layout import corruptions

GOLDEN = Path(__file__).parent / "golden"
KIB = 1024
AREA_SIZES = [KIB, 2 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, KIB * KIB]
VERSIONS = sorted(LABELS)
_NUMBERS = count(1)


def a_label(version: tuple[int, int], slot: int = 0, **more: object) -> Label:
    values = {
        "uuid": UUID(int=next(_NUMBERS)),
        "name": b"a name",
        "nlabel": 1,
        "position": 0,
        "isetcookie": 52512752653219036,
        "lbasize": 512,
        "dpa": slot << 24,
        "rawsize": 16 << 20,
        "slot": slot,
    }
    if LABELS[version] is LabelV2:
        values |= {"type_guid": guids.PERSISTENT_MEMORY, "abstraction_guid": guids.NULL}
    return LABELS[version](**(values | more))


def fresh(version: tuple[int, int], size: int = 4 * KIB) -> bytes:
    return apply(bytes(size), initialise(bytes(size), *version))


def golden(version: str) -> bytes:
    area = bytearray(128 * KIB)
    for line in (GOLDEN / f"labels-{version}.hex").read_text().splitlines():
        if not line.startswith("#"):
            offset, _, data = line.partition(" ")
            raw = bytes.fromhex(data)
            area[int(offset, 16) : int(offset, 16) + len(raw)] = raw
    return bytes(area)


# --- division ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("area_size", "small", "large"),
    [
        (KIB, (4, 256), (2, 256)),
        (2 * KIB, (12, 256), (6, 256)),
        (4 * KIB, (28, 256), (14, 256)),
        (16 * KIB, (124, 256), (62, 256)),
        (64 * KIB, (508, 256), (254, 256)),
        (128 * KIB, (1020, 256), (510, 256)),
        (256 * KIB, (2040, 512), (1022, 256)),
        (KIB * KIB, (8172, 1280), (4090, 768)),
    ],
)
def test_the_division_is_that_of_kernel_and_ndctl(area_size, small, large) -> None:
    for label_size, expected in ((128, small), (256, large)):
        division = sizing(area_size, label_size)
        assert (division.slot_count, division.index_size) == expected


@given(st.integers(0, 1 << 21), st.sampled_from([128, 256]))
def test_every_division_fits_into_its_area_and_its_bitmap_into_its_block(size, label_size) -> None:
    try:
        division = sizing(size, label_size)
    except InvalidArgument as refusal:
        assert str(size) in refusal.message
        assert size < 1024
        return
    assert division.slot_count >= 2
    assert division.slot_offset(division.slot_count) <= size
    assert 72 + division.slot_count / 8 <= division.index_size


def test_an_area_too_small_is_named_with_the_least_size() -> None:
    with pytest.raises(InvalidArgument, match=r"area of 512 bytes is too small.*1024 bytes"):
        read_area(bytes(512))


# --- sequence numbers ----------------------------------------------------------------------------


def with_sequences(first: int, second: int) -> LabelArea:
    area = fresh((1, 2))
    for number, seq in enumerate((first, second)):
        block = area[256 * number : 256 * number + 256]
        changed = replace(IndexHeader.unpack(block), seq=seq).pack() + block[72:]
        area = apply(area, [[(256 * number, IndexHeader.seal(changed))]])
    return read_area(area)


@pytest.mark.parametrize(
    ("first", "second", "current"),
    [
        (1, 1, 1), (1, 2, 1), (1, 3, 0),
        (2, 1, 0), (2, 2, 1), (2, 3, 1),
        (3, 1, 1), (3, 2, 0), (3, 3, 1),
        (7, 2, 0), (5, 0xFFFFFFFE, 1), (0, 3, 1), (2, 4, 0),
    ],
)  # fmt: skip
def test_of_two_blocks_the_later_in_the_cycle_is_current(first, second, current) -> None:
    area = with_sequences(first, second)
    assert area.current is not None
    assert area.current.number == current


def test_two_blocks_without_a_sequence_number_are_no_labels() -> None:
    area = with_sequences(4, 0)
    assert area.current is None
    assert [fault.field for fault in area.faults] == ["seq", "seq"]
    assert "is 4, whose low two bits are 0" in area.faults[0].message


def test_the_sequence_is_a_cycle_of_three() -> None:
    assert [next_sequence(seq) for seq in (1, 2, 3, 7, 0)] == [2, 3, 1, 1, 0]


def test_the_first_update_of_a_kernel_that_made_the_area_itself_counts() -> None:
    """Trap: that kernel takes the number after block 1's for its first update of block 1, so both
    blocks have number 3. Who breaks the tie towards block 0 loses the first label."""
    area = fresh((1, 2))
    found = read_area(area)
    assert [index.header.seq for index in found.indexes] == [3, 2]
    label = a_label((1, 2))
    groups = found.update(add=[label])
    offset, block = groups[-1][0]
    assert offset == 256, "block 1 is written"
    tied = replace(IndexHeader.unpack(block), seq=3).pack() + block[72:]
    after = read_area(apply(area, [groups[0], [(offset, IndexHeader.seal(tied))]]))
    assert [index.header.seq for index in after.indexes] == [3, 3]
    assert [each.uuid for each in after.labels] == [label.uuid]
    once_more = read_area(apply(apply(area, groups), after.update(add=[a_label((1, 2), 1)])))
    assert once_more.current is not None


# --- init, zero, update --------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("area_size", AREA_SIZES)
def test_a_fresh_area_has_no_labels_and_block_0_is_current(version, area_size) -> None:
    found = read_area(fresh(version, area_size))
    assert found.current is not None
    assert found.current.number == 0
    assert (found.current.header.major, found.current.header.minor) == version
    assert [index.header.seq for index in found.indexes] == [3, 2]
    assert found.current.free_count == found.sizing.slot_count
    assert found.faults == ()
    assert found.labels == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_bits_behind_the_last_slot_are_clear_when_written_and_ignored_when_read(version) -> None:
    """Trap: ndctl leaves them set, the kernel clears them; the checksums differ, both are legal."""
    area = fresh(version, 128 * KIB)
    found = read_area(area)
    slots = found.sizing.slot_count
    assert slots % 8
    assert area[72 + slots // 8] == (1 << slots % 8) - 1
    for number in (0, 1):
        block = bytearray(area[256 * number : 256 * number + 256])
        block[72 + slots // 8] = 0xFF
        area = apply(area, [[(256 * number, IndexHeader.seal(bytes(block)))]])
    as_ndctl = read_area(area)
    assert as_ndctl.faults == ()
    assert as_ndctl.current is not None
    assert as_ndctl.current.free_count == slots
    full = as_ndctl.update(add=[a_label(version, slot) for slot in range(slots)])
    with pytest.raises(NoSpace, match=f"0 of {slots} label slots are free, 1 are needed"):
        read_area(apply(area, full)).update(add=[a_label(version)])


@pytest.mark.parametrize("before", VERSIONS)
@pytest.mark.parametrize("after", VERSIONS)
@pytest.mark.parametrize("area_size", AREA_SIZES)
def test_init_of_one_version_over_the_other_leaves_nothing_of_it(before, after, area_size) -> None:
    area = fresh(before, area_size)
    area = apply(area, read_area(area).update(add=[a_label(before)]))
    assert read_area(area).labels
    area = apply(area, initialise(area, *after))
    found = read_area(area)
    assert found.current is not None
    assert (found.current.header.major, found.current.header.minor) == after
    assert found.labels == ()
    assert found.faults == ()
    places = [at for at in range(0, area_size, 256) if area[at : at + 16] == SIGNATURE]
    assert places == [0, found.sizing.index_size]


def test_init_knows_two_versions() -> None:
    for version in ((1, 0), (1, 3), (2, 1)):
        with pytest.raises(InvalidArgument, match=f"{version[0]}.{version[1]} is neither"):
            initialise(bytes(4096), *version)


@pytest.mark.parametrize("version", VERSIONS)
def test_erase_leaves_zeroes_and_a_part_of_it_only_there(version) -> None:
    area = fresh(version)
    assert apply(area, erase(area)) == bytes(len(area))
    assert apply(area, erase(area, 16, 8)) == area[:16] + bytes(8) + area[24:]
    assert erase(area, 5, 0) == []
    for start, length in ((-1, 4), (0, 4097), (4096, 1), (0, -1)):
        with pytest.raises(InvalidArgument, match="not within the label area of 4096"):
            erase(area, start, length)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_update_writes_free_slots_and_then_the_other_block_whole(version) -> None:
    area = fresh(version)
    first = read_area(area).update(add=[a_label(version)])
    area = apply(area, first)
    kept = read_area(area)
    second = kept.update(add=[a_label(version), a_label(version)], remove=[0])
    assert [len(group) for group in second] == [2, 1]
    assert kept.current is not None
    assert kept.current.number == 1
    offsets = [offset for offset, _ in second[0]]
    assert offsets == [kept.sizing.slot_offset(1), kept.sizing.slot_offset(2)]
    assert second[1][0][0] == 0
    assert len(second[1][0][1]) == 256
    after = read_area(apply(area, second))
    assert [label.slot for label in after.labels] == [1, 2]
    assert after.current is not None
    assert after.current.is_free(0)
    assert [label.slot for label in after.stored][:3] == [0, 1, 2], "freed labels are not erased"


def test_a_label_less_area_cannot_be_updated() -> None:
    with pytest.raises(InvalidArgument, match="is not initialised"):
        read_area(bytes(4096)).update(remove=[0])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 13)), max_size=40), st.data())
def test_updates_keep_the_set_of_labels(steps, data) -> None:
    """pmem/ndctl#91: create and destroy again and again must not lose track of slots."""
    version = data.draw(st.sampled_from(VERSIONS))
    area, model = fresh(version, 2 * KIB), {}
    for adding, choice in steps:
        found = read_area(area)
        if adding:
            label = a_label(version, name=b"%d" % choice)
            if len(model) == found.sizing.slot_count:
                with pytest.raises(NoSpace):
                    found.update(add=[label])
                continue
            area = apply(area, found.update(add=[label]))
            model[label.uuid] = label
        elif model:
            gone = sorted(model, key=str)[choice % len(model)]
            slots = [label.slot for label in found.labels if label.uuid == gone]
            assert len(slots) == 1
            area = apply(area, found.update(remove=slots))
            del model[gone]
        now = read_area(area)
        assert {label.uuid for label in now.labels} == set(model)
        for label in now.labels:
            assert replace(model[label.uuid], slot=label.slot).sealed() == label.pack()
        assert now.current is not None
        assert now.current.free_count == now.sizing.slot_count - len(model)
        assert now.faults == ()


# --- what others wrote ---------------------------------------------------------------------------


def test_an_area_of_older_kernels_with_fewer_slots_is_read_by_its_own_number() -> None:
    """Trap: kernels up to about 4.12 counted 1016 slots in 128 KiB and wrote the first block 0 as
    invalid; they also left the flag UPDATING for good. So do the areas in ndctl's label-compat."""
    area = bytearray(128 * KIB)
    header = IndexHeader(
        sig=SIGNATURE, labelsize=0, seq=3, myoff=256, mysize=256, otheroff=0, labeloff=512,
        nslot=1016, major=1, minor=1,
    )  # fmt: skip
    bitmap = ((1 << 1016) - 2).to_bytes(127, "little")
    area[256:512] = IndexHeader.seal((header.pack() + bitmap).ljust(256, b"\0"))
    area[:256] = IndexHeader.seal(replace(header, seq=0, myoff=0, otheroff=256).pack() + bytes(184))
    label = a_label((1, 1), flags=LabelFlag.UPDATING, nlabel=4, isetcookie=0x0803F6D70100FEFB)
    area[512:640] = label.pack()
    found = read_area(bytes(area))
    assert found.current is not None
    assert found.current.number == 1
    assert [each.pack() for each in found.labels] == [label.pack()]
    assert found.current.free_count == 1015
    assert [str(fault).partition(" at")[0] for fault in found.faults] == [
        "namespace index block 0: seq"
    ]


@pytest.mark.parametrize(("version", "in_use", "stored"), [("1.1", 3, 5), ("1.2", 7, 8)])
def test_areas_that_linux_wrote(version: str, in_use: int, stored: int) -> None:
    area = golden(version)
    found = read_area(area)
    assert found.faults == ()
    assert found.current is not None
    assert f"{found.current.header.major}.{found.current.header.minor}" == version
    assert (len(found.labels), len(found.stored)) == (in_use, stored)
    assert found.sizing.slot_count == found.current.header.nslot
    for label in found.labels:
        assert label.sealed() == area[found.sizing.slot_offset(label.slot) :][: label.SIZE]
        assert label.flags == 0
    if version == "1.2":
        kinds = {guids.ABSTRACTIONS[label.abstraction_guid] for label in found.labels}
        assert kinds == {"none", "btt2", "pfn", "dax"}
        assert {label.type_guid for label in found.labels} == {guids.PERSISTENT_MEMORY}
        shown = guids.efi_text(guids.PERSISTENT_MEMORY)
        assert shown == "79d3f066-f3b4-7440-ac43-0d3318b78cdb", "as ndctl prints it"


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_a_label_of_linux_is_made_again_byte_for_byte(version: str) -> None:
    """What we would write for the same namespace, and the whole block for the same set of slots."""
    area = golden(version)
    found = read_area(area)
    assert found.current is not None
    groups = found.update()
    ((offset, block),) = groups[-1]
    assert offset == 256 * (1 - found.current.number)
    theirs = area[256 * found.current.number :][:256]
    slots = found.sizing.slot_count
    bitmap = 72 + slots // 8
    assert block[72:bitmap] == theirs[72:bitmap]
    assert block[bitmap] == theirs[bitmap] & ((1 << slots % 8) - 1), "ndctl's stray bits"
    assert block[:20] == theirs[:20]
    assert block[48:64] == theirs[48:64]
    assert block[bitmap + 1 :] == theirs[bitmap + 1 :]


# --- damage --------------------------------------------------------------------------------------


def labelled(version: tuple[int, int], size: int = 4 * KIB) -> bytes:
    """An area that has seen several updates and holds three labels."""
    area = fresh(version, size)
    for slot in range(4):
        area = apply(area, read_area(area).update(add=[a_label(version, slot)]))
    return apply(area, read_area(area).update(remove=[1]))


def header_corruptions() -> Iterator[tuple[tuple[int, int], str, bytes, int]]:
    for version in VERSIONS:
        area = labelled(version)
        size = read_area(area).sizing.index_size
        for number in (0, 1):
            block = area[number * size : (number + 1) * size]
            for what, corrupted in corruptions(IndexHeader, block):
                yield version, what, corrupted, number


HEADER_CORRUPTIONS = list(header_corruptions())


@pytest.mark.parametrize("version", VERSIONS)
def test_each_corruption_of_an_index_block_has_its_own_fault(version: tuple[int, int]) -> None:
    area = labelled(version)
    whole = read_area(area)
    messages: dict[str, str] = {}
    for its_version, what, block, number in HEADER_CORRUPTIONS:
        if its_version != version:
            continue
        field, _, value = what.partition(": ")
        found = read_area(apply(area, [[(number * len(block), block)]]))
        assert found.indexes[number] is None, what
        assert found.current is not None, "the other block is current"
        assert found.current.number == 1 - number
        first = found.faults[0]
        assert first.structure == f"namespace index block {number}"
        expected = "checksum" if value == "one bit flipped" else field
        named = [fault.field for fault in found.faults]
        # What makes a block unreadable is told even where the checksum is wrong too.
        assert expected in named or named in (["sig"], ["major"], ["minor"], ["labelsize"]), what
        if value != "one bit flipped":
            assert first.field == field, what
            messages[what + str(number)] = str(first)
            number_in_it = value.removeprefix("-")
            assert number_in_it in first.message or field == "checksum" or field == "sig", what
    assert len(set(messages.values())) == len(messages)
    assert read_area(area) == whole


@pytest.mark.parametrize(
    ("version", "what", "block", "number"),
    HEADER_CORRUPTIONS,
    ids=[f"1.{each[0][1]} block {each[3]} {each[1]}" for each in HEADER_CORRUPTIONS],
)
def test_both_blocks_corrupted_alike_make_the_area_label_less(version, what, block, number) -> None:
    area = labelled(version)
    size = len(block)
    other = dict(corruptions(IndexHeader, area[(1 - number) * size :][:size]))[what]
    found = read_area(apply(area, [[(number * size, block), ((1 - number) * size, other)]]))
    assert found.current is None
    assert found.labels == ()
    structures = {fault.structure for fault in found.faults}
    assert structures == {"namespace index block 0", "namespace index block 1"}, what


@pytest.mark.parametrize("version", VERSIONS)
def test_each_corruption_of_a_label_that_the_kernel_ignores_it_for_has_its_own_fault(
    version,
) -> None:
    area = labelled(version)
    whole = read_area(area)
    label = whole.labels[1]
    place = whole.sizing.slot_offset(label.slot)
    told = {}
    for what, block in corruptions(type(label), area[place : place + label.SIZE]):
        found = read_area(apply(area, [[(place, block)]]))
        field, _, value = what.partition(": ")
        judged_here = value == "one bit flipped" or field in ("slot", "checksum")
        assert (len(found.labels) == 2) is judged_here, what
        if not judged_here:
            # The region that the label claims to belong to judges it, see test_scan.
            assert found.faults == ()
            continue
        (fault, *_) = found.faults
        assert fault.structure == label.TITLE
        assert fault.field == ("checksum" if value == "one bit flipped" else field) or (
            what == "slot: one bit flipped" and fault.field == "slot"
        )
        assert f"slot {label.slot}" in fault.message
        told[what] = str(fault)
    assert told
    assert len(set(told.values())) == len(told)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_slot_that_is_in_use_and_empty_is_told(version) -> None:
    area = labelled(version)
    whole = read_area(area)
    assert whole.current is not None
    number = whole.current.number
    block = bytearray(area[256 * number : 256 * number + 256])
    block[72 + 1] &= 0xFE
    found = read_area(apply(area, [[(256 * number, IndexHeader.seal(bytes(block)))]]))
    assert {fault.field for fault in found.faults} <= {"slot", "checksum"}
    assert any("is 0 in slot 8" in fault.message for fault in found.faults)
    assert found.labels == whole.labels


@given(st.data())
def test_any_bytes_are_an_area_or_are_not_and_say_why(data) -> None:
    version = data.draw(st.sampled_from(VERSIONS))
    area = bytearray(labelled(version, 1 * KIB * data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(area) - 1))
        area[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        size = sizing(len(area), LABELS[version].SIZE).index_size
        for number in (0, 1):
            sealed = IndexHeader.seal(bytes(area[number * size : (number + 1) * size]))
            area[number * size : (number + 1) * size] = sealed
    found = read_area(bytes(area))
    if found.current is None:
        assert len(found.faults) >= 1
        assert found.labels == ()
    else:
        assert found.current.header.nslot <= sizing(len(area), 128).slot_count + 4
        assert len({label.slot for label in found.labels}) == len(found.labels)
    for fault in found.faults:
        assert str(fault)


def test_uuid_order_and_guid_order_stand_in_one_label() -> None:
    """Trap: the namespace's uuid is in text order and the two guids in EFI order."""
    uuid = UUID("40c0dc4c-ec90-4400-8808-5d8e3bfc72a9")
    area = golden("1.2")
    label = next(each for each in read_area(area).labels if each.uuid == uuid)
    place = read_area(area).sizing.slot_offset(label.slot)
    assert area[place : place + 16] == uuid.bytes
    efi = bytes.fromhex("79d3f066f3b47440ac430d3318b78cdb")
    assert area[place + 128 : place + 144] == efi
