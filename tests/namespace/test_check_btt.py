"""check-namespace: each kind of damage, what is repaired, and what is said and left alone."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "formats"))

from btt_images import MIB, PARENT, Image

from pmemkit._native import media
from pmemkit.errors import Corrupt, MediaError
from pmemkit.formats import btt
from pmemkit.formats.layout import corruptions
from pmemkit.namespace.check_btt import check_btt
from pmemkit.storage.btt_reader import BttReader


def run(image, **options):
    options.setdefault("version", image.version)
    return check_btt(image.medium, 0, image.size, parent_uuid=PARENT, **options)


def reader(image) -> BttReader:
    version = {"1.1": (1, 1), "2.0": (2, 0)}[image.version]
    return BttReader(image.medium.read, image.size, version=version, parent_uuid=PARENT)


def data(number, size=4096) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


@pytest.fixture
def used():
    """An image on which several lanes wrote, some sectors twice."""
    image = Image()
    choose = random.Random(3)
    for number in range(120):
        image.write(choose.randrange(40), choose.randrange(60), data(number + 1))
    return image


def content(image) -> list[bytes]:
    opened = reader(image)
    return [opened.read_sector(lba) for lba in range(64)]


def refused(image, **options):
    """Checks that damage which cannot be repaired is said and nothing is written."""
    before = image.whole()
    report = run(image, repair=True, **options)
    assert not report.clean
    assert not report.repairable
    assert image.whole() == before
    return report


def repaired(image, **options):
    """A check alone writes nothing, a repair repairs, and a second check finds nothing."""
    before = image.whole()
    found = run(image)
    assert found.findings
    assert found.repairable
    assert not found.clean
    assert image.whole() == before
    report = run(image, repair=True, **options)
    assert report.clean
    assert [each.message for each in report.findings] == [each.message for each in found.findings]
    assert run(image).findings == []
    return report


@pytest.mark.parametrize("version", ["1.1", "2.0"])
@pytest.mark.parametrize("sector_size", btt.SECTOR_SIZES)
def test_a_fresh_namespace_is_clean(version, sector_size):
    image = Image(sector_size=sector_size, version=version)
    before = image.whole()
    report = run(image, version=None, repair=True)
    assert (report.findings, report.version, report.arenas) == ([], version, 1)
    assert report.sectors == image.arena.external_nlba
    assert image.whole() == before


def test_a_used_namespace_is_clean(used):
    assert run(used).findings == []


def test_a_lost_info_block_comes_back_from_its_copy(used):
    expected, block = content(used), used.medium.read(0, 4096)
    used.medium.zero(0, 8192 - 4096)
    report = repaired(used)
    assert "info block at 0 needs to be restored" in report.findings[0].message
    assert used.medium.read(0, 4096) == block
    assert content(used) == expected


def test_a_lost_info_block_of_layout_1_1_too():
    image = Image(version="1.1")
    image.medium.zero(0, 8192)
    assert "info block at 4096" in repaired(image, version=None).findings[0].message


def test_a_lost_copy_is_made_again(used):
    used.medium.zero(used.arena.info2off, 4096)
    assert "info2 block" in repaired(used).findings[0].message


def test_both_info_blocks_lost_is_the_end(used):
    used.medium.zero(0, 4096)
    used.medium.zero(used.arena.info2off, 4096)
    before = used.whole()
    with pytest.raises(Corrupt, match="no copy of one"):
        run(used, repair=True)
    assert used.whole() == before


@pytest.mark.parametrize("steps", [1, 2])
def test_an_interrupted_write_is_finished_or_never_was(used, steps):
    used.write(50, 7, data(999), steps=steps)
    expected = data(999) if steps == 2 else content(used)[7]
    assert reader(used).read_sector(7) == expected
    if steps == 1:
        assert run(used).findings == []
    else:
        assert "sector 7 lacks the write of lane 50" in repaired(used).findings[0].message
    assert content(used)[7] == expected


def test_two_writes_of_a_sector_that_the_map_lacks_are_finished_in_their_order(used):
    """A host that keeps the log and loses the map's page: the kernel would finish only one."""
    before = used.entry(7)
    used.write(50, 7, data(998))
    used.write(49, 7, data(999))
    used.set_entry(7, before)
    assert reader(used).read_sector(7) == data(999)
    assert "lacks the write of lane 50, 49" in repaired(used).findings[0].message
    assert content(used)[7] == data(999)


def test_a_scribbled_map_cannot_be_repaired(used):
    """ndctl's btt-check writes noise over the map."""
    used.medium.write(used.arena.mapoff, random.Random(5).randbytes(4096))
    report = refused(used)
    assert any("bitmap error" in each.message for each in report.findings)


def test_two_sectors_with_one_block(used):
    used.set_entry(3, btt.NORMAL | 200)
    report = refused(used)
    messages = [each.message for each in report.findings]
    assert "map entry of sector 200 names block 200, which another sector has" in messages


def test_a_block_that_does_not_exist(used):
    used.set_entry(3, btt.NORMAL | used.arena.internal_nlba)
    wrong = f"map entry of sector 3 names block {used.arena.internal_nlba}"
    report = refused(used)
    assert any(each.message.startswith(wrong) for each in report.findings)
    with pytest.raises(Corrupt, match=f"sector 3 to block {used.arena.internal_nlba}"):
        reader(used).read_sector(3)


def test_more_wrong_entries_than_are_listed_are_counted(used):
    for lba in range(100, 130):
        used.set_entry(lba, btt.NORMAL | 1)
    report = refused(used)
    assert any("more map entries are wrong" in each.message for each in report.findings)


def test_the_error_flag_is_said(used):
    used.set_info(flags=1)
    assert "error flag" in refused(used).findings[0].message


def damage_seq_equal(image):
    group = image.group(5)
    for place in (0, 1):
        image.set_log(5, place, btt.LogEntry(lba=5, old_map=9, new_map=9, seq=2))
    return group


def damage_lba(image):
    image.set_log(5, 0, btt.LogEntry(lba=1 << 31, old_map=9, new_map=9, seq=1))
    image.set_log(5, 1, btt.LogEntry(lba=0, old_map=0, new_map=0, seq=0))


def damage_block(image):
    image.set_log(5, 0, btt.LogEntry(lba=1, old_map=(1 << 30) - 1, new_map=9, seq=1))
    image.set_log(5, 1, btt.LogEntry(lba=0, old_map=0, new_map=0, seq=0))


def damage_zeroed(image):
    image.medium.zero(image.group_at(5), 64)


def damage_noise(image):
    image.medium.write(image.group_at(5), random.Random(1).randbytes(64))


def damage_layout(image):
    image.set_log(5, 3, btt.LogEntry(lba=1, old_map=2, new_map=3, seq=1))


def damage_whole_log(image):
    image.medium.write(image.arena.logoff, random.Random(1).randbytes(btt.LOG_SIZE))


@pytest.mark.parametrize(
    "damage",
    [
        damage_seq_equal,
        damage_lba,
        damage_block,
        damage_zeroed,
        damage_noise,
        damage_layout,
        damage_whole_log,
    ],
)
def test_log_damage_is_repaired_because_free_blocks_are_alike(used, damage):
    expected = content(used)
    damage(used)
    with pytest.raises(Corrupt):
        reader(used)
    report = repaired(used)
    assert "log entries of lane" in report.findings[0].message
    assert content(used) == expected


def test_log_damage_with_a_hole_in_the_map_is_not_repaired(used):
    damage_zeroed(used)
    used.set_entry(3, btt.NORMAL | 200)
    refused(used)


def test_a_lane_that_owns_a_sectors_block(used):
    free = btt.lane_of(9, used.group(9), (0, 1)).free_block
    used.set_entry(300, btt.NORMAL | free)
    report = refused(used)
    assert any(f"block {free}, free in lane 9" in each.message for each in report.findings)


@pytest.mark.parametrize("writes", range(7))
def test_rewriting_the_log_leaves_one_entry_a_lane(writes):
    image = Image()
    for number in range(writes):
        image.write(3, number, data(number + 1))
    expected = content(image)
    report = run(image, repair=True, rewrite_log=True)
    assert report.log_rewritten
    group = image.group(3)
    assert group[0].seq == 1
    assert all(entry == btt.LogEntry(lba=0, old_map=0, new_map=0, seq=0) for entry in group[1:])
    assert content(image) == expected
    assert run(image).findings == []


def test_the_old_log_layout_is_read_and_rewritten():
    image = Image()
    for lane in range(4):
        for number in range(lane + 1):
            image.write(lane, 10 * lane + number, data(100 * lane + number + 1), pair=(0, 2))
    expected = content(image)
    assert run(image).findings == []
    assert reader(image).arenas[0].pair == (0, 2)
    run(image, repair=True, rewrite_log=True)
    assert reader(image).arenas[0].pair == (0, 1)
    assert content(image) == expected


def test_rewriting_without_repair_writes_nothing(used):
    before = used.whole()
    run(used, rewrite_log=True)
    assert used.whole() == before


def test_progress_counts_to_the_end(used):
    seen = []
    run(used, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4 * used.arena.external_nlba,) * 2


def corrupted():
    return list(corruptions(btt.BttInfo, Image().medium.read(0, 4096)))


@pytest.mark.parametrize(("what", "block"), corrupted(), ids=[what for what, _ in corrupted()])
def test_any_corrupted_info_block_comes_back(what, block):
    image = Image()
    good = image.medium.read(0, 4096)
    image.medium.write(0, block)
    repaired(image)
    assert image.medium.read(0, 4096) == good


# --- two arenas, on a sparse file ----------------------------------------------------------------


def test_two_arenas_are_checked_and_the_second_ones_info_restored(tmp_path):
    size = btt.ARENA_SIZE_MAX + 32 * MIB
    with (tmp_path / "big.img").open("w+b") as file:
        file.truncate(size)
        medium = media.map_file(file.fileno(), size, granularity="page")
        image = Image(size=size, medium=medium)
        first, second = image.arenas
        image.write(1, 5, data(5), arena=1)
        opened = reader(image)
        assert opened.read_sector(first.external_nlba + 5) == data(5)
        assert opened.size == first.data_size + second.data_size
        medium.zero(second.start, 4096)
        arena = check_btt(medium, 0, size, parent_uuid=PARENT, version="2.0", repair=True)
        assert (arena.arenas, arena.clean) == (2, True)
        assert f"info block at {second.start}" in arena.findings[0].message
        assert reader(image).read_sector(first.external_nlba + 5) == data(5)


def test_arenas_that_disagree_on_the_sector_size_are_said(tmp_path):
    """Each is sound for itself; no reader can take both for one device."""
    size = btt.ARENA_SIZE_MAX + 32 * MIB
    with (tmp_path / "big.img").open("w+b") as file:
        file.truncate(size)
        image = Image(size=size, medium=media.map_file(file.fileno(), size, granularity="page"))
        other, start = Image(size=32 * MIB, sector_size=512), image.arenas[1].start
        image.medium.write(start, other.whole())
        report = run(image, repair=True)
        assert not report.repairable
        assert "sectors have 512 bytes, those of the first arena 4096" in report.findings[0].message
        found = btt.probe(image.medium.read, size=size, version="2.0", parent=PARENT)
        assert (found.verdict, found.faults[0].field) == ("unusable", "external_lbasize")


# --- states of map entries -----------------------------------------------------------------------


def test_bit_30_is_error_and_bit_31_is_zero():
    """Trap: the kernel's own document has the columns the other way round."""
    image = Image()
    image.write(0, 1, data(1))
    image.set_entry(2, btt.ERROR | 2)
    image.set_entry(3, btt.ZERO | 3)
    image.medium.write(image.arena.dataoff + 3 * 4096, data(7))
    opened = reader(image)
    with pytest.raises(MediaError, match="sector 2 is in error"):
        opened.read_sector(2)
    assert opened.read_sector(3) == bytes(4096)
    assert run(image).findings == []


def test_an_initial_entry_reads_what_the_media_hold():
    """Trap: UEFI and Linux read the block of the same number, PMDK reads zeroes."""
    image = Image()
    image.medium.write(image.arena.dataoff + 5 * 4096, data(42))
    assert reader(image).read_sector(5) == data(42)


def test_a_zero_entry_inside_a_larger_read_is_no_end():
    """Trap: the kernel's read path returns at the first zero entry of a page."""
    image = Image(sector_size=512)
    for lba in (0, 2):
        image.write(lba, lba, data(lba + 1, 512))
    image.set_entry(1, btt.ZERO | 1)
    assert reader(image).read(0, 1536) == data(1, 512) + bytes(512) + data(3, 512)


# --- power failure during a repair ---------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["cacheline", "page"])
@pytest.mark.parametrize("damage", ["write", "lanes", "info", "rewrite"])
def test_a_repair_that_is_interrupted_anywhere_is_completed_by_the_next(damage, granularity, scale):
    """At any point of a repair, whatever of its stores reached the media, another one succeeds and
    every sector reads as after the first."""
    source = Image()
    for number in range(40):
        source.write(number % 7, number % 9, data(number + 1))
    if damage == "write":
        source.write(9, 3, data(999), steps=2)
    elif damage == "lanes":
        damage_noise(source)
        source.medium.zero(source.group_at(6), 64)
    elif damage == "info":
        source.medium.zero(0, 4096)
    recording = media.Recording(source.size, granularity=granularity, initial=source.whole())
    source.medium = recording.medium()
    options = {"rewrite_log": damage == "rewrite"}
    assert run(source, repair=True, **options).clean
    expected = content(source)
    ranges = [(0, 4096), (source.arena.mapoff, 4096), (source.arena.logoff, 24576)]
    choose = random.Random(f"{damage} {granularity}")
    count = recording.event_count()
    chosen = set(choose.sample(range(1, count + 1), min(count, scale(12, 200)))) | {count}
    judged = 0
    for event in sorted(chosen):
        images = recording.crash_images(event, limit=scale(4, 24), seed=event, only=ranges)
        for image in images:
            left = Image.__new__(Image)
            left.__dict__.update(source.__dict__)
            left.medium = media.map_anonymous(source.size)
            left.medium.write(0, image)
            assert run(left, repair=True).clean, event
            assert content(left) == expected, event
            judged += 1
    assert judged >= len(chosen)


LANE = 3
LANE_DAMAGE = {
    "number of the newest": lambda first, second: (1, replace(second, seq=77)),
    "number of the older": lambda first, second: (0, replace(first, seq=77)),
    "equal numbers": lambda first, second: (1, replace(second, seq=first.seq)),
    "sector": lambda first, second: (1, replace(second, lba=1 << 31)),
    "old block": lambda first, second: (1, replace(second, old_map=btt.MAP_MASK)),
    "new block": lambda first, second: (1, replace(second, new_map=btt.MAP_MASK)),
    "third entry": lambda first, second: (3, second),
}


def crashed(image, content_of) -> Image:
    """The same namespace on a medium that holds other bytes."""
    left = Image.__new__(Image)
    left.__dict__.update(image.__dict__)
    left.medium = media.map_anonymous(image.size)
    left.medium.write(0, content_of)
    return left


@pytest.mark.parametrize("granularity", ["cacheline", "page"])
@pytest.mark.parametrize("pair", [(0, 1), (0, 2)])
@pytest.mark.parametrize("damage", LANE_DAMAGE)
def test_no_half_repaired_lane_is_taken_for_a_sound_one(damage, pair, granularity, monkeypatch):
    """Both entries of a lane are in use and one is damaged. The other one, or a mixture, must not
    pass for the lane's newest entry meanwhile: it would own a block that a sector has."""
    monkeypatch.setattr(btt, "ARENA_SIZE_MIN", MIB)
    source = Image(size=4 * MIB)
    for number in range(24):
        source.write(number % 6, number % 5, data(number + 1), pair=pair)
    while tuple(source.group(LANE)[place].seq for place in pair) != (1, 2):
        source.write(LANE, 9, data(source.entry(9)), pair=pair)
    expected = content(source)
    first, second = (source.group(LANE)[place] for place in pair)
    place, entry = LANE_DAMAGE[damage](first, second)
    source.set_log(LANE, pair[1] if place == 1 else place, entry)
    recording = media.Recording(source.size, granularity=granularity, initial=source.whole())
    source.medium = recording.medium()
    assert run(source, repair=True).clean
    assert content(source) == expected
    start = source.group_at(LANE)
    judged = set()
    for event in range(recording.event_count() + 1):
        only = [(start, btt.LOG_GROUP_SIZE)]
        for image in recording.crash_images(event, limit=512, only=only):
            group = image[start : start + btt.LOG_GROUP_SIZE]
            if group in judged:
                continue
            judged.add(group)
            left = crashed(source, image)
            assert run(left, repair=True).clean, event
            assert run(left).findings == []
            assert content(left) == expected, event
    assert len(judged) > len(("damaged", "repaired"))
