"""Interleave-set cookies: what QEMU's slots have, what the kernel's test module has."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemkit.formats.checksum import fletcher64
from pmemkit.formats.cookie import DimmIdentity, cookies

IDENTITIES = st.lists(
    st.builds(DimmIdentity, st.integers(0, 1 << 50), st.integers(0, 0xFFFFFFFF)),
    min_size=1,
    max_size=8,
    unique_by=lambda dimm: dimm.region_offset,
)


@pytest.mark.parametrize(
    ("slot", "first", "second"),
    [
        (0, 10248187106440278, 52512752653219036),
        (1, 0x002468AE00123457, 0x00BA901C0012B4DD),
        (2, 0x002468B000123458, 0x00BA90260012B4DE),
    ],
)
def test_the_slots_of_qemu(slot: int, first: int, second: int) -> None:
    made = cookies([DimmIdentity(0, 0x123456 + slot)])
    assert (made.v1, made.v2, made.alternative) == (first, second, first)


@pytest.mark.parametrize("slot", range(256))
def test_one_dimm_has_the_closed_form(slot: int) -> None:
    serial = 0x123456 + slot
    made = cookies([DimmIdentity(0, serial)])
    assert made.v1 == (2 * serial & 0xFFFFFFFF) << 32 | serial
    record = struct.pack("<QIH", 0, serial, 0x8086).ljust(48, b"\0")
    assert made.v2 == fletcher64(record)


def test_the_four_dimms_of_the_kernels_test_module_in_the_old_order() -> None:
    """ndctl's label-compat test has labels with this cookie, made when records were sorted as byte
    strings: the first byte of the little-endian offset decided."""
    handles = (0x000, 0x001, 0x100, 0x101)
    dimms = [
        DimmIdentity(1 << 16 + 8 * place, ~handle & 0xFFFFFFFF)
        for place, handle in enumerate(handles)
    ]
    made = cookies(dimms)
    assert made.alternative == 0x0803F6D70100FEFB
    assert made.v1 != made.alternative
    assert made.accepts(0x0803F6D70100FEFB, 1, 1)
    assert made.accepts(made.v1, 1, 1)
    assert not made.accepts(made.v2, 1, 1)


@given(IDENTITIES, st.randoms())
def test_the_order_in_which_dimms_are_named_does_not_matter(dimms, random) -> None:
    shuffled = list(dimms)
    random.shuffle(shuffled)
    assert cookies(shuffled) == cookies(dimms)


@given(IDENTITIES)
def test_the_recipes_are_chosen_by_the_version_of_the_index(dimms) -> None:
    made = cookies(dimms)
    assert made.of_version(1, 1) == made.v1
    assert made.of_version(1, 2) == made.of_version(2, 0) == made.v2
    assert made.accepts(made.v1, 1, 1)
    assert made.accepts(made.v2, 1, 2)
    assert made.accepts(made.alternative, 1, 2)
    rows = sorted((dimm.region_offset, dimm.serial) for dimm in dimms)
    assert made.v1 == fletcher64(b"".join(struct.pack("<QQ", *row) for row in rows))


@given(IDENTITIES, st.data())
def test_another_serial_number_makes_another_cookie(dimms, data) -> None:
    place = data.draw(st.integers(0, len(dimms) - 1))
    serial = data.draw(st.integers(0, 0xFFFFFFFF))
    changed = list(dimms)
    changed[place] = DimmIdentity(dimms[place].region_offset, serial)
    same = serial == dimms[place].serial
    assert (cookies(changed).v1 == cookies(dimms).v1) is same
    assert (cookies(changed).v2 == cookies(dimms).v2) is same


def test_date_and_place_of_making_count_in_the_second_recipe_only() -> None:
    plain, dated = DimmIdentity(0, 7), DimmIdentity(0, 7, 0x8086, 0x1234, 0x56)
    assert cookies([plain]).v1 == cookies([dated]).v1
    assert cookies([plain]).v2 != cookies([dated]).v2
