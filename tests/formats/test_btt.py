"""The BTT format: geometry, map entries, both log layouts, and the traps."""

import pytest
from btt_images import OWN, PARENT, Image

from pmemkit.errors import InvalidArgument
from pmemkit.formats import btt
from pmemkit.formats.layout import corruptions

MIB = 1 << 20


@pytest.mark.parametrize(
    ("mib", "version", "size"),
    [
        (18, "2.0", 0x11B5400),
        (18, "1.1", 0x11B4400),
        (20, "2.0", 0x13B1400),
        (20, "1.1", 0x13B0400),
        (27, "2.0", 0x1AA3600),
        (27, "1.1", 0x1AA2600),
    ],
)
def test_sizes_are_those_of_the_kernel(mib, version, size):
    (arena,) = btt.arenas(mib * MIB, 512, version)
    assert arena.data_size == size


def test_offsets_are_those_of_ndctls_old_image():
    (arena,) = btt.arenas(64 * MIB, 4096, "2.0")
    assert (arena.external_nlba, arena.internal_nlba) == (0x3EE9, 0x3FE9)
    assert (arena.mapoff, arena.logoff, arena.info2off) == (0x3FEB000, 0x3FFB000, 0x3FFF000)


def test_thirty_bits_suffice_for_the_largest_arena():
    (arena,) = btt.arenas(btt.ARENA_SIZE_MAX, 512, "2.0")
    assert arena.internal_nlba == 1065418188 <= btt.MAP_MASK


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_arenas_follow_each_other_and_a_short_tail_is_dropped(version):
    start = btt.INITIAL_OFFSET[version]
    size = start + 2 * btt.ARENA_SIZE_MAX + 15 * MIB
    first, second = btt.arenas(size, 4096, version)
    assert (first.start, second.start) == (start, start + btt.ARENA_SIZE_MAX)
    assert (first.nextoff, second.nextoff) == (btt.ARENA_SIZE_MAX, 0)


def test_arenas_may_be_smaller_than_linux_makes_them():
    first, second = btt.arenas(40 * MIB, 4096, "2.0", 17 * MIB)
    assert (first.size, first.nextoff, second.size, second.nextoff) == (
        *(17 * MIB, 17 * MIB),
        *(17 * MIB, 0),
    )
    for wrong in (16 * MIB - 4096, 17 * MIB + 512, 2 * btt.ARENA_SIZE_MAX):
        with pytest.raises(InvalidArgument, match=f"an arena size of {wrong}"):
            btt.arenas(40 * MIB, 4096, "2.0", wrong)


@pytest.mark.parametrize(
    ("size", "sector_size", "said"),
    [(16 * MIB - 1, 512, "16777215 bytes are too small"), (32 * MIB, 513, "513 is none of 512")],
)
def test_what_cannot_be_laid_out_is_refused_with_the_number(size, sector_size, said):
    with pytest.raises(InvalidArgument, match=said):
        btt.arenas(size, sector_size, "2.0")


@pytest.mark.parametrize("sector_size", btt.SECTOR_SIZES)
@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_a_fresh_layout_is_valid(sector_size, version):
    image = Image(sector_size=sector_size, version=version)
    found = btt.probe(image.medium.read, size=image.size, version=version, parent=PARENT)
    assert found.verdict == "valid"
    assert (found.info.uuid, found.sector_size) == (OWN, sector_size)
    assert found.size == sum(arena.data_size for arena in image.arenas)


def test_the_info_block_is_written_last_and_its_copy_before_it():
    steps = btt.fresh_layout(17 * MIB, 512, version="2.0", uuid=OWN, parent_uuid=PARENT)
    last = [group[0][0] for group in list(steps)[-2:]]
    (arena,) = btt.arenas(17 * MIB, 512, "2.0")
    assert last == [arena.info2off, 0]


def _block():
    image = Image()
    return image, image.medium.read(0, btt.INFO_SIZE)


CORRUPTIONS = [(what, block) for what, block in corruptions(btt.BttInfo, _block()[1])]


@pytest.mark.parametrize(("what", "block"), CORRUPTIONS, ids=[what for what, _ in CORRUPTIONS])
def test_every_corrupted_field_has_an_error_of_its_own(what, block):
    image, _ = _block()
    image.medium.write(0, block)
    found = btt.probe(image.medium.read, size=image.size, version="2.0", parent=PARENT)
    assert found.verdict != "valid"
    field = what.split(":")[0]
    named = {fault.field for fault in found.faults}
    if "bit flipped" in what:
        assert named & {"checksum", "signature"}, named
    else:
        assert field in named
        row = btt.BttInfo.field(field)
        if row.kind == "int":
            value = int.from_bytes(block[row.offset : row.end], "little")
            told = " ".join(fault.message for fault in found.faults)
            assert str(value) in told or hex(value) in told


def test_a_namespace_that_ends_in_an_arena_is_unusable():
    image = Image()
    image.set_info(nextoff=17 * MIB)
    found = btt.probe(image.medium.read, size=image.size, version="2.0", parent=PARENT)
    assert (found.verdict, found.faults[0].field) == ("unusable", "nextoff")


def test_pmdks_alignment_is_accepted():
    """Trap: geometry is taken from media. PMDK aligns blocks to 256 bytes, Linux to 64."""
    image = Image(sector_size=512)
    nlba = (image.arena.mapoff - image.arena.dataoff) // 768
    image.set_info(internal_lbasize=768, internal_nlba=nlba, external_nlba=nlba - btt.LANES)
    found = btt.probe(image.medium.read, size=image.size, version="2.0", parent=PARENT)
    assert found.verdict == "valid"


# --- the log -------------------------------------------------------------------------------------


def _entry(seq, lba=1):
    return btt.LogEntry(lba=lba, old_map=2, new_map=3, seq=seq)


EMPTY = btt.LogEntry(lba=0, old_map=0, new_map=0, seq=0)


@pytest.mark.parametrize(
    ("seqs", "newest"),
    [((1, 0), 0), ((1, 2), 1), ((2, 3), 1), ((3, 1), 1), ((2, 1), 0), ((3, 2), 0), ((1, 3), 0)],
)
@pytest.mark.parametrize("pair", [(0, 1), (0, 2)])
def test_the_newest_entry_follows_the_cycle(seqs, newest, pair):
    group = [EMPTY] * 4
    group[pair[0]] = _entry(seqs[0])
    group[pair[1]] = _entry(seqs[1]) if seqs[1] else EMPTY
    lane = btt.lane_of(7, tuple(group), pair)
    assert isinstance(lane, btt.Lane)
    assert (lane.slot, lane.other) == (pair[newest], pair[1 - newest])


@pytest.mark.parametrize("seqs", [(0, 0), (0, 1), (1, 1), (2, 2), (2, 0), (3, 0), (4, 1), (1, 4)])
def test_stray_sequence_numbers_are_damage(seqs):
    """Trap: the kernel takes (2, 0) and (3, 0) for valid and then owns block 0."""
    group = (_entry(seqs[0]), _entry(seqs[1]), EMPTY, EMPTY)
    lane = btt.lane_of(7, group, (0, 1))
    assert not isinstance(lane, btt.Lane)
    assert "lane 7" in str(lane)


def test_both_log_layouts_are_told_apart():
    """Trap: before Linux 4.15 padding stood between the entries: 0 and 2 are in use."""
    groups = [(_entry(1), EMPTY, EMPTY, EMPTY)] * btt.LANES
    assert btt.log_pair(groups) == ((0, 1), [])
    groups[9] = (_entry(1), EMPTY, _entry(2), EMPTY)
    assert btt.log_pair(groups) == ((0, 2), [])
    groups[9] = (_entry(1), _entry(2), EMPTY, EMPTY)
    assert btt.log_pair(groups) == ((0, 1), [])


def test_a_group_that_breaks_the_layout_is_named():
    groups = [(_entry(1), _entry(2), EMPTY, EMPTY)] * btt.LANES
    groups[5] = (_entry(1), EMPTY, EMPTY, _entry(2))
    pair, faults = btt.log_pair(groups)
    assert pair == (0, 1)
    assert [fault.offset for fault in faults] == [5 * btt.LOG_GROUP_SIZE]
    assert "lane 5" in faults[0].message
