"""PFN and DAX info blocks: against ndctl's, against the fact sheet's table, and damaged."""

import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.errors import InvalidArgument
from pmemkit.formats.infoblock import (
    ALIGNMENTS,
    INFO_OFFSET,
    PAGE_SIZE,
    SUBSECTION_SIZE,
    DaxInfo,
    Info,
    PfnInfo,
    probe,
    shape,
)
from pmemkit.formats.layout import corruptions

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UUID_1, PARENT = UUID(int=1 << 100), UUID(int=7 << 90)
LAYOUTS = {"fsdax": PfnInfo, "devdax": DaxInfo}
START = 4 * GIB


def made(mode: str, size: int, map: str, align: int, start: int = 0, pad: bool = False) -> bytes:
    layout = LAYOUTS[mode]
    divided = shape(size, map=map, align=align, start=start, pad=pad)
    return layout(
        signature=layout.SIGNATURE,
        uuid=UUID_1,
        parent_uuid=PARENT,
        dataoff=divided.dataoff,
        npfns=divided.npfns,
        mode={"mem": 1, "dev": 2}[map],
        start_pad=divided.start_pad,
        end_trunc=divided.end_trunc,
        align=align,
    ).sealed()


# --- the division --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "map", "align", "dataoff", "npfns", "end_trunc"),
    [
        (64 * MIB, "dev", 2 * MIB, 2097152, 15872, 0),
        (64 * MIB, "mem", 2 * MIB, 2097152, 15872, 0),
        (128 * MIB, "dev", 2 * MIB, 4194304, 31744, 0),
        (128 * MIB - 128 * KIB, "dev", 2 * MIB, 4194304, 31232, 1966080),
        (GIB, "dev", 2 * MIB, 18874368, 257536, 0),
        (GIB, "mem", 2 * MIB, 2097152, 261632, 0),
        (GIB, "dev", 4 * KIB, 18874368, 257536, 0),
        (4 * GIB, "dev", 2 * MIB, 69206016, 1031680, 0),
        (1 << 40, "dev", 2 * MIB, 17181966336, 264240640, 0),
    ],
)
def test_the_division_of_the_fact_sheet(size, map, align, dataoff, npfns, end_trunc) -> None:
    divided = shape(size, map=map, align=align)
    assert (divided.dataoff, divided.npfns, divided.end_trunc) == (dataoff, npfns, end_trunc)
    assert divided.start_pad == 0


def test_a_start_that_is_skipped_to_the_next_2_mib_as_ndctl_does() -> None:
    divided = shape(GIB, map="dev", align=4 * KIB, start=8 * KIB, pad=True)
    assert (divided.dataoff, divided.npfns) == (18866176, 257026)
    assert (divided.start_pad, divided.end_trunc) == (2088960, 8192)


def test_what_leaves_no_room_or_is_misaligned_is_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidArgument, match=r"1 GiB at 0x0 leave no room.*aligned to 1 GiB"):
        shape(GIB, map="dev", align=GIB)
    with pytest.raises(InvalidArgument, match="0x2000, which is no multiple of 2 MiB; 0x200000"):
        shape(GIB, map="dev", align=4 * KIB, start=8 * KIB)
    with pytest.raises(InvalidArgument, match="8192 bytes is not one of 4 KiB, 2 MiB, 1 GiB"):
        shape(GIB, map="dev", align=8192)


SIZES = st.integers(1, 1 << 21).map(lambda pages: pages * PAGE_SIZE) | st.integers(1, 1 << 12).map(
    lambda count: count * 2 * MIB
)


@given(
    SIZES,
    st.sampled_from(["mem", "dev"]),
    st.sampled_from(ALIGNMENTS),
    st.integers(0, 1 << 12).map(lambda n: n * 2 * MIB),
    st.sampled_from(["fsdax", "devdax"]),
)
def test_whatever_is_made_is_valid_where_it_was_made(size, map, align, start, mode) -> None:
    try:
        block = made(mode, size, map, align, start)
    except InvalidArgument as refusal:
        assert "leave no room" in refusal.message
        return
    judged = probe(block, LAYOUTS[mode], size=size, start=start, parent=PARENT)
    assert judged.verdict == "valid", judged.faults
    assert judged.info is not None
    offset, length = judged.info.data_range(size)
    assert (start + offset) % max(align, SUBSECTION_SIZE) == 0
    assert length == judged.info.npfns * PAGE_SIZE
    assert 0 < length <= size - offset
    pages = (size - 8192) // PAGE_SIZE
    assert offset >= 8192 + (64 * pages if map == "dev" else 0)


# --- against ndctl -------------------------------------------------------------------------------


def theirs(ndctl: str, *options: str) -> bytes | None:
    """Both pages that ndctl writes; ``None`` where it refuses."""
    told = subprocess.run(
        [ndctl, "write-infoblock", "--stdout", *options], capture_output=True, check=False
    )
    return told.stdout if told.returncode == 0 and len(told.stdout) == 8192 else None


NDCTL_SIZES = (
    16 * MIB, 32 * MIB, 64 * MIB, 128 * MIB - 128 * KIB, 128 * MIB, 516 * MIB, GIB - 4 * KIB,
    GIB, 3 * GIB + 2 * MIB, 1 << 40,
)  # fmt: skip


@pytest.mark.peer("ndctl")
@pytest.mark.parametrize("mode", ["fsdax", "devdax"])
@pytest.mark.parametrize("map", ["mem", "dev"])
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_blocks_are_those_of_ndctl_byte_for_byte(need, mode, map, align) -> None:
    ndctl = need("ndctl")
    compared = 0
    for size in NDCTL_SIZES:
        told = theirs(
            ndctl, "-s", str(size), "-m", mode, "-M", map, "-a", str(align),
            "-u", str(UUID_1), "-p", str(PARENT),
        )  # fmt: skip
        try:
            block = made(mode, size, map, align, pad=True)
        except InvalidArgument:
            # ndctl writes some blocks that no kernel takes; one that a kernel takes, we make too.
            if told is not None:
                judged = probe(told[INFO_OFFSET:], LAYOUTS[mode], size=size, start=0, parent=PARENT)
                assert judged.verdict != "valid", size
            continue
        assert told is not None, size
        assert told[:INFO_OFFSET] == bytes(INFO_OFFSET)
        assert told[INFO_OFFSET:] == block, f"{mode} {map} {align} {size}"
        compared += 1
    assert compared >= (2 if align == GIB else 8)


@pytest.mark.peer("ndctl")
@pytest.mark.parametrize("start", [2 * MIB, 8 * KIB, 4 * GIB, 4 * GIB + 128 * KIB, 16 * MIB - 4096])
@pytest.mark.parametrize("map", ["mem", "dev"])
def test_blocks_for_another_start_are_those_of_ndctl(need, start, map) -> None:
    size = GIB
    told = theirs(
        need("ndctl"), "-s", str(size), "-m", "fsdax", "-M", map, "-a", "4096",
        "-u", str(UUID_1), "-p", str(PARENT), "-O", str(start),
    )  # fmt: skip
    assert told is not None
    assert told[INFO_OFFSET:] == made("fsdax", size, map, 4096, start, pad=True)


# --- validity ------------------------------------------------------------------------------------

SIZE = 128 * MIB


def judge(info: Info, *, size: int = SIZE, start: int = START, parent: UUID = PARENT):
    return probe(info.sealed(), type(info), size=size, start=start, parent=parent)


def good(mode: str = "fsdax", map: str = "dev", size: int = SIZE, start: int = START) -> Info:
    return LAYOUTS[mode].unpack(made(mode, size, map, 2 * MIB, start))


@pytest.mark.parametrize("mode", ["fsdax", "devdax"])
@pytest.mark.parametrize("map", ["mem", "dev"])
def test_a_block_is_valid_for_its_own_parent_only(mode, map) -> None:
    """Trap: a null parent is no wildcard here, as it is for a BTT."""
    info = good(mode, map)
    assert judge(info).verdict == "valid"
    for own, given_parent in ((PARENT, UUID(int=0)), (UUID(int=0), PARENT)):
        judged = judge(replace(info, parent_uuid=own), parent=given_parent)
        assert judged.verdict == "absent"
        assert judged.info is None
        assert judged.faults[0].field == "parent_uuid"
        assert f"is {own}, the namespace has {given_parent}" in judged.faults[0].message
    assert judge(replace(info, parent_uuid=UUID(int=0)), parent=UUID(int=0)).verdict == "valid"


def test_a_block_of_one_kind_is_none_of_the_other() -> None:
    block = good("fsdax").sealed()
    judged = probe(block, DaxInfo, size=SIZE, start=START, parent=PARENT)
    assert judged.verdict == "absent"
    assert [fault.field for fault in judged.faults] == ["signature"]


def test_a_blank_place_is_no_damage() -> None:
    judged = probe(bytes(4096), PfnInfo, size=SIZE, start=START, parent=PARENT)
    assert judged.verdict == "absent"
    assert [fault.field for fault in judged.faults] == ["signature"]


@pytest.mark.parametrize(
    ("start", "field"), [(START + 4096, "dataoff"), (START + MIB, "dataoff"), (START + GIB, None)]
)
def test_an_image_is_valid_only_relative_to_where_it_is_plugged(start, field) -> None:
    judged = judge(good(), start=start)
    if field is None:
        assert judged.verdict == "valid"
    else:
        assert judged.verdict == "unusable"
        assert field in {fault.field for fault in judged.faults}


@pytest.mark.parametrize("minor", range(5))
def test_older_versions_have_fewer_fields_and_their_rubbish_is_not_read(minor) -> None:
    """Before 1.1 there were no pads, before 1.2 no align, before 1.4 no sizes of pages."""
    info = replace(good(size=SIZE), minor=minor)
    rubbish: dict[str, int] = {}
    if minor < 1:
        rubbish |= {"start_pad": 4096, "end_trunc": 1}
    if minor < 2:
        rubbish |= {"align": 3}
    if minor < 4:
        rubbish |= {"page_size": 1 << 30, "page_struct_size": 1}
    judged = judge(replace(info, **rubbish))
    assert judged.verdict == "valid", judged.faults
    assert judged.info is not None
    assert judged.info.alignment == (4 * MIB if minor < 2 else 2 * MIB)
    assert judged.info.data_range(SIZE) == (4 * MIB, 124 * MIB)


@pytest.mark.parametrize("size", [8 * MIB, 4 * MIB + 4096, 4 * MIB, 4096, 0])
def test_a_namespace_that_was_cut_has_no_room_for_the_data(size) -> None:
    judged = judge(good(), size=size)
    assert judged.verdict == "unusable"
    assert {fault.field for fault in judged.faults} & {"dataoff", "npfns"}


# --- every corruption ----------------------------------------------------------------------------


def every_corruption() -> Iterator[tuple[str, str, str, bytes]]:
    for mode, map in itertools.product(LAYOUTS, ("mem", "dev")):
        info = good(mode, map)
        for what, block in corruptions(type(info), info.sealed()):
            yield mode, map, what, block


CORRUPTIONS = list(every_corruption())
ABSENT = {"signature", "parent_uuid", "checksum"}


@pytest.mark.parametrize(
    ("mode", "map", "what", "block"), CORRUPTIONS, ids=[" ".join(row[:3]) for row in CORRUPTIONS]
)
def test_every_corruption_is_refused_with_its_own_fault(mode, map, what, block) -> None:
    field, _, value = what.partition(": ")
    judged = probe(block, LAYOUTS[mode], size=SIZE, start=START, parent=PARENT)
    for_dev_only = field in ("page_size", "page_struct_size") and value != "one bit flipped"
    if for_dev_only and map == "mem":
        # Nothing of such a page map is on media, so the kernel does not look.
        assert judged.verdict == "valid"
        return
    first, flipped = judged.faults[0], value == "one bit flipped"
    assert first.structure == LAYOUTS[mode].TITLE
    if flipped and field != "signature":
        assert first.field == "checksum"
    else:
        assert first.field == field, [str(fault) for fault in judged.faults]
        if not flipped and field not in ABSENT:
            assert f"is {value}" in first.message
    expected = "absent" if flipped or field in ABSENT else "unusable"
    assert judged.verdict == expected


def test_the_faults_of_different_corruptions_differ() -> None:
    for mode, map in itertools.product(LAYOUTS, ("mem", "dev")):
        told: dict[str, str] = {}
        for its_mode, its_map, what, block in CORRUPTIONS:
            if (its_mode, its_map) != (mode, map) or "flipped" in what:
                continue
            judged = probe(block, LAYOUTS[mode], size=SIZE, start=START, parent=PARENT)
            if judged.faults:
                told[what] = str(judged.faults[0])
        assert len(told) > 20
        assert len(set(told.values())) == len(told)


@given(st.dictionaries(st.integers(0, 4087), st.integers(0, 255), max_size=8), st.booleans())
def test_any_bytes_are_judged(changes, sealed) -> None:
    block = bytearray(good().sealed())
    for at, value in changes.items():
        block[at] = value
    data = PfnInfo.seal(bytes(block)) if sealed else bytes(block)
    judged = probe(data, PfnInfo, size=SIZE, start=START, parent=PARENT)
    assert (judged.verdict == "valid") == (not judged.faults)
    if judged.verdict == "valid":
        assert judged.info is not None
        offset, length = judged.info.data_range(SIZE)
        assert 8192 <= offset < offset + length <= SIZE
        assert judged.info.mode in (1, 2)
