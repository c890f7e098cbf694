"""The tables themselves, and Fletcher-64 under them."""

import random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.errors import Corrupt
from pmemkit.formats.btt import BttInfo, LogEntry
from pmemkit.formats.checksum import fletcher64
from pmemkit.formats.infoblock import DaxInfo, PfnInfo
from pmemkit.formats.labels import IndexHeader, LabelV1, LabelV2
from pmemkit.formats.layout import Field, Layout, corruptions, require

LAYOUTS: list[type[Layout]] = [IndexHeader, LabelV1, LabelV2, BttInfo, LogEntry, PfnInfo, DaxInfo]


def values_of(row: Field) -> st.SearchStrategy[object]:
    """Whatever a field can hold."""
    match row.kind:
        case "int" | "checksum":
            return st.integers(0, (1 << 8 * row.width) - 1)
        case "uuid" | "guid":
            return st.uuids(allow_nil=True)
        case "zero":
            return st.just(bytes(row.width))
        case _:
            return st.binary(min_size=row.width, max_size=row.width)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_fields_cover_the_structure_without_gap_or_overlap(layout: type[Layout]) -> None:
    at = 0
    for row in layout.fields():
        assert row.offset == at, row.name
        assert row.width > 0, row.name
        at = row.end
    assert at == layout.SIZE


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_pack_and_unpack_are_inverse(layout: type[Layout]) -> None:
    @given(st.fixed_dictionaries({row.name: values_of(row) for row in layout.fields()}))
    def check(values: dict[str, object]) -> None:
        made = layout(**values)
        block = made.pack()
        assert len(block) == layout.SIZE
        assert layout.unpack(block) == made
        assert layout.unpack(block + b"more") == made

    @given(st.integers(0, (1 << 64) - 1))
    def check_bytes(seed: int) -> None:
        block = random.Random(seed).randbytes(layout.SIZE)
        assert layout.unpack(block).pack() == block

    check()
    check_bytes()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_block_that_is_cut_short_is_named(layout: type[Layout]) -> None:
    with pytest.raises(Corrupt, match=f"{layout.TITLE}: {layout.SIZE - 1} bytes are there"):
        layout.unpack(bytes(layout.SIZE - 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_sealing_makes_the_checksum_fit_and_any_flipped_bit_breaks_it(layout: type[Layout]) -> None:
    if layout.checksum_field() is None:
        assert layout.seal(bytes(layout.SIZE)) == bytes(layout.SIZE)
        return
    block = layout.seal(bytes(range(256)) * (layout.SIZE // 256) + bytes(layout.SIZE % 256))
    assert layout.basic_faults(block) == []
    assert layout.seal(block) == block
    for bit in range(0, 8 * layout.SIZE, 61):
        wrong = bytearray(block)
        wrong[bit // 8] ^= 1 << bit % 8
        (fault,) = layout.basic_faults(bytes(wrong))
        assert fault.field == "checksum"
        with pytest.raises(Corrupt, match=f"{layout.TITLE}: checksum at byte"):
            require([fault])


def test_uuids_and_guids_have_their_own_byte_orders() -> None:
    text = UUID("00112233-4455-6677-8899-aabbccddeeff")
    label = LabelV2(
        uuid=text, nlabel=1, position=0, isetcookie=0, dpa=0, rawsize=0, slot=0,
        type_guid=text, abstraction_guid=text,
    ).pack()  # fmt: skip
    assert label[:16].hex() == "00112233445566778899aabbccddeeff"
    assert label[128:144].hex() == "33221100554477668899aabbccddeeff"


def test_a_value_that_does_not_fit_is_refused_and_not_cut() -> None:
    with pytest.raises(OverflowError):
        LogEntry(lba=1 << 32, old_map=0, new_map=0, seq=0).pack()
    with pytest.raises(ValueError, match="name: 65 bytes do not fit into 64"):
        LabelV1(
            uuid=UUID(int=0), name=b"x" * 65, nlabel=1, position=0, isetcookie=0, dpa=0,
            rawsize=0, slot=0,
        ).pack()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_corruptions_change_one_field_and_the_checksum_at_most(layout: type[Layout]) -> None:
    block = layout.seal(bytes(layout.SIZE))
    row_of = {row.name: row for row in layout.fields()}
    summed = layout.checksum_field()
    for what, corrupted in corruptions(layout, block):
        row = row_of[what.partition(":")[0]]
        assert len(corrupted) == layout.SIZE
        kept = [row] if summed is None else [row, summed]
        at = {each for field in kept for each in range(field.offset, field.end)}
        assert all(a == b or n in at for n, (a, b) in enumerate(zip(block, corrupted, strict=True)))
        if "flipped" in what:
            assert layout.basic_faults(corrupted), what


# --- Fletcher-64 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"\1\0\0\0", 0x0000000100000001),
        (b"\1\0\0\0\2\0\0\0", 0x0000000400000003),
        (b"\xff\xff\xff\xff\1\0\0\0", 0xFFFFFFFF00000000),
    ],
)
def test_fletcher64_of_small_inputs(data: bytes, expected: int) -> None:
    assert fletcher64(data) == expected


@given(st.binary(max_size=400).map(lambda data: data[: len(data) // 4 * 4]))
def test_fletcher64_is_the_sum_and_the_sum_of_sums(data: bytes) -> None:
    low = high = 0
    for at in range(0, len(data), 4):
        low = (low + int.from_bytes(data[at : at + 4], "little")) % (1 << 32)
        high = (high + low) % (1 << 32)
    assert fletcher64(data) == high << 32 | low


@pytest.mark.parametrize("length", [1, 2, 3, 4097])
def test_fletcher64_refuses_what_is_not_whole_words(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes are not whole"):
        fletcher64(bytes(length))
