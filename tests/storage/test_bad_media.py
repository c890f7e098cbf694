"""Bad media of an image: what cannot be read until it is written, raw and through mode sector."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pmemkit.bus import machine_of, observe
from pmemkit.errors import Corrupt, Latched, MediaError, PmemError
from pmemkit.formats import btt
from pmemkit.media import badblocks
from pmemkit.media.badblocks import BadRun, clip, journal_path, note, read_bad_blocks
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.region import open_region

MIB = 1 << 20
BLOCK = badblocks.BAD_BLOCK_SIZE
RAW, LARGE, SMALL = "namespace0.0", "namespace0.1", "namespace0.2"


@pytest.fixture
def image(tmp_path):
    """Namespaces: raw, and of mode sector with 4096 and 520 bytes a sector."""
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate(96 * MIB + (128 << 10))
    with open_images(machine_of([path], label_size=128 << 10)) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="raw", size=16 * MIB))
        create(images, None, Wish(mode="sector", size=32 * MIB))
        create(images, None, Wish(mode="sector", size=32 * MIB, sector_size=520))
    return path


def opened(image, name, **options):
    return open_region(f"{image}:{name}", **options)


def spoil(image, name, offset, length=BLOCK):
    """Makes bytes of a namespace bad; offsets count from its start."""
    here = observe(machine_of([image])).namespace(name)
    start = here.offset + offset
    first, end = start // BLOCK, -(-(start + length) // BLOCK)
    note(str(image), "inject", BadRun(first, end - first))


class Arena:
    """Where things are in the one arena of a namespace, as its file has them."""

    def __init__(self, image, name):
        self.image = image
        self.here = observe(machine_of([image])).namespace(name)
        self.info = self.here.claim.info

    def read(self, offset, length):
        with self.image.open("rb") as file:
            file.seek(self.here.offset + offset)
            return file.read(length)

    def entry(self, lba):
        return int.from_bytes(self.read(self.info.mapoff + 4 * lba, 4), "little")

    def block(self, lba):
        """Where the block of a sector begins."""
        entry = self.entry(lba)
        number = entry & btt.MAP_MASK if entry & btt.NORMAL else lba
        return self.info.dataoff + number * self.info.internal_lbasize

    def newest(self):
        log = self.read(self.info.logoff, btt.LANES * btt.LOG_GROUP_SIZE)
        return [
            btt.lane_of(number, group, (0, 1)) for number, group in enumerate(btt.log_groups(log))
        ]


# --- the list ------------------------------------------------------------------------------------


def test_events_leave_what_a_set_of_blocks_would_hold(tmp_path):
    choose, path, model = random.Random(3), str(tmp_path / "x.img"), set()
    for _ in range(300):
        event = choose.choice(("inject", "inject", "uninject", "clear"))
        run = BadRun(choose.randrange(60), choose.randrange(9))
        note(path, event, run)
        blocks = set(range(run.offset, run.end))
        model = model | blocks if event == "inject" else model - blocks
        runs = read_bad_blocks(path)
        assert [each for run in runs for each in range(run.offset, run.end)] == sorted(model)
        assert all(left.end < right.offset for left, right in itertools.pairwise(runs))
        start, size = choose.randrange(40) * BLOCK, choose.randrange(30) * BLOCK
        inside = {each - start // BLOCK for each in model if 0 <= each * BLOCK - start < size}
        assert {b for run in clip(runs, start, size) for b in range(run.offset, run.end)} == inside


def test_a_torn_line_counts_for_nothing_and_the_next_one_does(tmp_path):
    path = str(tmp_path / "x.img")
    note(path, "inject", BadRun(1, 2))
    with Path(journal_path(path)).open("a") as journal:
        journal.write('\n{"inject": {"offset": 8, "len')
    assert read_bad_blocks(path) == ((1, 2),)
    note(path, "inject", BadRun(5, 1))
    assert read_bad_blocks(path) == ((1, 2), (5, 1))


@pytest.mark.parametrize(
    "line",
    [
        '{"inject": {"offset": -1, "length": 1}}',
        '{"inject": {"offset": 1, "length": 18446744073709551616}}',
        '{"inject": {"offset": 1.5, "length": 1}}',
        '{"inject": {"offset": true, "length": 1}}',
        '{"inject": {"offset": 1}}',
        '{"inject": [1, 2], "x": {}}',
        '{"eject": {"offset": 1, "length": 1}}',
        "{}",
        "no json}",
        '{"a":' * 100000 + "}",
    ],
)
def test_a_line_that_is_no_event_is_refused_with_its_number(image, line):
    Path(journal_path(str(image))).write_text(f'{{"clear": {{"offset": 1, "length": 1}}}}\n{line}')
    with pytest.raises(Corrupt, match="line 2 is none of inject, uninject, clear"):
        opened(image, RAW)
    with pytest.raises(Corrupt):
        observe(machine_of([image]))


def test_it_is_found_through_a_link(image, tmp_path):
    spoil(image, RAW, 0)
    link = tmp_path / "link.img"
    link.symlink_to(image)
    with opened(link, RAW) as region, pytest.raises(MediaError, match="bad media"):
        region.device().read(0, 1)


# --- raw -----------------------------------------------------------------------------------------


def test_raw_reads_fail_until_a_write_covers_the_block(image):
    spoil(image, RAW, 8 * BLOCK, 3 * BLOCK)
    with opened(image, RAW) as region:
        device = region.device()
        assert not {"map", "map_write"} & device.capabilities
        for at, bad in ((7, False), (8, True), (10, True), (11, False)):
            if bad:
                with pytest.raises(MediaError, match="3 blocks of 512 bytes from block 8"):
                    device.read(at * BLOCK, 1)
            else:
                device.read(at * BLOCK, BLOCK)
        device.write(8 * BLOCK, b"x" * BLOCK)
        device.zero(9 * BLOCK, BLOCK)
        assert device.read(8 * BLOCK, 2 * BLOCK) == b"x" * BLOCK + bytes(BLOCK)
        with pytest.raises(MediaError):
            device.read(10 * BLOCK, 1)
    with opened(image, RAW, read_only=True) as region:
        assert region.device().read(8 * BLOCK, 1) == b"x"
        with pytest.raises(MediaError):
            region.device().read(10 * BLOCK, 1)
    base = observe(machine_of([image])).namespace(RAW).offset // BLOCK
    assert read_bad_blocks(str(image)) == ((base + 10, 1),)


def test_a_raw_write_of_half_a_bad_block_fails_and_latches(image):
    spoil(image, RAW, 0)
    with opened(image, RAW) as region:
        device = region.device()
        with pytest.raises(MediaError):
            device.write(0, b"half")
        with pytest.raises(Latched):
            device.write(MIB, b"x")


def test_servers_of_two_namespaces_lose_nothing_of_each_other(image):
    spoil(image, RAW, 0)
    spoil(image, LARGE, 16 * MIB)
    with opened(image, RAW) as one, opened(image, LARGE) as other:
        note(str(image), "inject", BadRun(7, 1))
        other.device().write(0, bytes(4096))
        one.device().write(0, bytes(BLOCK))
    assert len(read_bad_blocks(str(image))) == 2


# --- sector --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LARGE, SMALL])
def test_a_bad_sector_fails_alone_and_a_write_heals_it(image, name):
    with opened(image, name) as region:
        device = region.device()
        size = 4096 if name == LARGE else 512
        for lba in range(64):
            device.write(lba * size, bytes([lba]) * size)
    arena = Arena(image, name)
    spoil(image, name, arena.block(5) + 100, 1)
    with opened(image, name) as region:
        device = region.device()
        bad = []
        for lba in range(64):
            try:
                assert device.read(lba * size, size) == bytes([lba]) * size
            except MediaError:
                bad.append(lba)
        # A block of 576 bytes shares the blocks of 512 that it lies in with its neighbours.
        assert 5 in bad
        assert len(bad) <= (1 if name == LARGE else 2)
        for lba in bad:
            assert arena.entry(lba) & btt.NORMAL == btt.ERROR, "as the kernel marks it"
            with pytest.raises(MediaError, match="in error"):
                device.read(lba * size, size)
            device.write(lba * size, bytes([lba + 100]) * size)
            assert device.read(lba * size, size) == bytes([lba + 100]) * size
            assert arena.entry(lba) & btt.NORMAL == btt.NORMAL
        left = [lane for lane in arena.newest() if lane.entry.old_map & btt.NORMAL == btt.ERROR]
        assert len(left) == len(bad), "the log says that the free block of the lane is bad"
        assert region.validate() == []
    with opened(image, name) as region:
        device = region.device()
        for step in range(3 * btt.LANES):
            device.write((step % 64) * size, bytes([step % 251]) * size)
        assert device.latched is None
        assert region.validate() == []
    # Whole blocks of 512 are zeroed before the free block is used again; others are given up.
    assert (read_bad_blocks(str(image)) == ()) == (name == LARGE)


def test_a_free_block_that_cannot_be_cleared_ends_its_lane_and_no_request(image):
    """Blocks of 576 bytes begin and end inside blocks of 512."""
    arena = Arena(image, SMALL)
    before = arena.newest()
    for lane in before[:-20]:
        block = (lane.entry.old_map & btt.MAP_MASK) * arena.info.internal_lbasize
        spoil(image, SMALL, arena.info.dataoff + block + 64, 1)
    with opened(image, SMALL) as region:
        device = region.device()
        data = random.Random(1).randbytes(600 * 512)
        device.write(0, data)
        assert device.read(0, len(data)) == data
        assert region.validate() == []
    after = arena.newest()
    assert after[:-20] == before[:-20]
    assert after[-15:] != before[-15:]


def test_a_bad_page_of_the_map_fails_its_sectors_and_no_others(image):
    info = Arena(image, LARGE).info
    spoil(image, LARGE, info.mapoff, BLOCK)
    entries = BLOCK // 4
    with opened(image, LARGE) as region:
        device = region.device()
        for lba in (0, 1, entries - 1):
            with pytest.raises(MediaError):
                device.read(lba * 4096, 4096)
        assert device.read(entries * 4096, 4096) == bytes(4096)
        device.write(entries * 4096, b"x" * 4096)
        with pytest.raises(MediaError):
            device.write(0, b"x" * 4096)


@pytest.mark.parametrize("where", ["info", "log"])
def test_bad_metadata_keep_it_from_being_opened(image, where):
    info = Arena(image, LARGE).info
    spoil(image, LARGE, 0 if where == "info" else info.logoff + 4096)
    with pytest.raises(PmemError, match="bad media") as caught, opened(image, LARGE) as region:
        region.device()
    assert isinstance(caught.value, MediaError)


# --- the command ---------------------------------------------------------------------------------


def pmem(*words):
    source = str(Path(badblocks.__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-m", "pmemkit", *map(str, words)],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_inject_status_list_and_uninject_as_ndctl_shows_them(image):
    done = pmem("inject-error", image, RAW, "--block=12", "--count=2")
    shown = json.loads(done.stdout)
    assert shown["dev"] == RAW
    assert shown["badblock_count"] == 2
    assert shown["badblocks"] == [{"offset": 12, "length": 2, "dimms": ["nmem0"]}]
    assert pmem("inject-error", f"{image}:{LARGE}", "-B", 8, "-n", 1).returncode == 0
    status = json.loads(pmem("inject-error", image, RAW, "--status").stdout)
    assert status == {"badblocks": [{"block": 12, "count": 2}]}
    plain = json.loads(pmem("list", image).stdout)
    assert [each.get("badblock_count") for each in plain] == [2, 1, None]
    assert not any("badblocks" in each for each in plain)
    regions = json.loads(pmem("list", image, "-RN", "--media-errors").stdout)["regions"]
    assert regions[0]["badblock_count"] == 3
    assert [each["length"] for each in regions[0]["badblocks"]] == [2, 1]
    listed = ["badblocks" in each for each in regions[0]["namespaces"]]
    assert listed == [True, False, False], "of mode sector only the count"
    assert pmem("inject-error", image, RAW, "-d", "-B", 13, "-n", 1).returncode == 0
    status = json.loads(pmem("inject-error", image, RAW, "-t").stdout)
    assert status == {"badblocks": [{"block": 12, "count": 1}]}


def test_what_does_not_fit_or_is_open_is_refused(image):
    last = 16 * MIB // BLOCK
    assert pmem("inject-error", image, RAW, "-B", last - 1, "-n", 1).returncode == 0
    for words, said in (
        (("-B", last - 1, "-n", 2), "do not fit"),
        (("-B", 0), "say --block and --count"),
        (("-B", 0, "-n", 0), "say --block and --count"),
    ):
        done = pmem("inject-error", image, RAW, *words)
        assert done.returncode == 2, done
        assert said in done.stderr
    with opened(image, RAW, read_only=True):
        assert pmem("inject-error", image, RAW, "-B", 0, "-n", 1).returncode == 9
    assert len(read_bad_blocks(str(image))) == 1
