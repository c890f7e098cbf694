"""Traps of the block translation table that the format itself can be held to."""

from uuid import UUID

from pmemkit.formats import btt
from pmemkit.formats.btt import BttInfo, LogEntry
from pmemkit.formats.layout import Clear
from pmemkit.storage.btt_reader import BttReader

SIZE = 32 << 20


def steps() -> list[list[object]]:
    made = btt.fresh_layout(SIZE, 4096, version="2.0", uuid=UUID(int=1), parent_uuid=UUID(int=2))
    return [list(step) for step in made]


def test_bit_30_is_error_and_bit_31_is_zero() -> None:
    assert (btt.ERROR, btt.ZERO) == (1 << 30, 1 << 31)
    assert btt.NORMAL == btt.ERROR | btt.ZERO
    assert btt.MAP_MASK == (1 << 30) - 1
    # 512 GiB of 512-byte sectors, the most that an arena has, stay below bit 30.
    (arena, *_) = btt.arenas(1 << 40, 512, "2.0")
    assert arena.internal_nlba == 1065418188 <= btt.MAP_MASK


def test_a_fresh_map_is_initial_and_the_data_area_is_cleared_where_that_is_cheap() -> None:
    (arena,) = btt.arenas(SIZE, 4096, "2.0")
    clears = [each for step in steps() for each in step if isinstance(each, Clear)]
    data, entries = clears
    assert (entries.offset, entries.length) == (arena.mapoff, arena.logoff - arena.mapoff)
    assert entries.required
    assert (data.offset, data.length, data.required) == (0, arena.mapoff, False)


def test_a_log_group_is_four_entries_and_a_fresh_one_uses_the_first() -> None:
    log = btt.initial_log(1000)
    assert len(log) == btt.LANES * 64
    for lane in range(btt.LANES):
        group = log[64 * lane : 64 * lane + 64]
        first = LogEntry.unpack(group)
        block = 1000 + lane
        assert (first.lba, first.old_map, first.new_map, first.seq) == (lane, block, block, 1)
        assert group[16:] == bytes(48)


def test_both_places_of_the_second_entry_of_a_log_group_are_read() -> None:
    def log(second: int) -> list[tuple[LogEntry, ...]]:
        groups = []
        for lane in range(btt.LANES):
            entries = [LogEntry(lba=0, old_map=0, new_map=0, seq=0)] * 4
            entries[0] = LogEntry(lba=lane, old_map=1000 + lane, new_map=2000, seq=2)
            entries[second] = LogEntry(lba=lane, old_map=7, new_map=1000 + lane, seq=3)
            groups.append(tuple(entries))
        return groups

    for second in (1, 2):
        pair, faults = btt.log_pair(log(second))
        assert (pair, faults) == ((0, second), [])
        lane = btt.lane_of(5, log(second)[5], pair)
        assert isinstance(lane, btt.Lane)
        assert (lane.slot, lane.other, lane.free_block) == (second, 0, 7)
    assert btt.log_pair(log(3))[1], "no other pair ever existed"


def test_a_read_over_a_zero_entry_goes_on_behind_it() -> None:
    """Normal, zero, normal in one request: Linux as read returns at the zero entry."""
    namespace = bytearray(SIZE)
    (arena,) = btt.arenas(SIZE, 4096, "2.0")
    for step in steps():
        for each in step:
            if not isinstance(each, Clear):
                namespace[each[0] : each[0] + len(each[1])] = each[1]
    for lba, entry in enumerate((btt.NORMAL | 5, btt.ZERO | 6, btt.NORMAL | 7, 0)):
        at = arena.mapoff + 4 * lba
        namespace[at : at + 4] = entry.to_bytes(4, "little")
    for block in range(8):
        at = arena.dataoff + block * 4096
        namespace[at : at + 4096] = bytes([block + 1]) * 4096
    reader = BttReader(
        lambda offset, length: bytes(namespace[offset : offset + length]),
        SIZE,
        version=(2, 0),
        parent_uuid=UUID(int=2),
    )
    expected = b"".join(bytes([value]) * 4096 for value in (6, 0, 8, 4))
    assert reader.read(0, 4 * 4096) == expected, "the initial entry reads its own block"


def test_the_half_of_a_log_entry_that_commits_it_is_the_second() -> None:
    assert LogEntry.SIZE == 16
    places = {row.name: row.offset for row in LogEntry.fields()}
    assert places == {"lba": 0, "old_map": 4, "new_map": 8, "seq": 12}


def test_the_info_block_of_the_first_arena_is_written_last() -> None:
    *_, copy, last = steps()
    (arena,) = btt.arenas(SIZE, 4096, "2.0")
    ((copy_offset, copied),) = copy
    ((offset, block),) = last
    assert (copy_offset, offset) == (arena.info2off, 0)
    assert copied == block
    assert BttInfo.basic_faults(block) == []
