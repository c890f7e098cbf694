"""The tables of formats in Python and the structures of the Rust core are the same."""

import pytest

from pmemkit._native import formats
from pmemkit.formats.btt import BttInfo, LogEntry
from pmemkit.formats.infoblock import DaxInfo, PfnInfo
from pmemkit.formats.labels import IndexHeader, LabelV1, LabelV2

# Both info blocks with a page map are one structure; only their signatures differ.
SHARED = {"DaxInfo": "PfnInfo"}
LAYOUTS = (IndexHeader, LabelV1, LabelV2, BttInfo, LogEntry, PfnInfo, DaxInfo)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_offsets_and_widths_are_those_of_the_compiler(layout):
    size, rows = formats.tables()[SHARED.get(layout.__name__, layout.__name__)]
    assert size == layout.SIZE
    assert [(row.name, row.offset, row.width) for row in layout.fields()] == rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_fields_cover_the_structure_without_gap_or_overlap(layout):
    end = 0
    for row in layout.fields():
        assert row.offset == end, row.name
        end = row.end
    assert end == layout.SIZE


def test_every_structure_has_its_table():
    assert set(formats.tables()) == {layout.__name__ for layout in LAYOUTS} - set(SHARED)
