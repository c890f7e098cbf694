"""What is written is counted: by cause, by block, exactly, and kept beside the image."""

import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import numpy as np
import pytest

from pmemkit._native import block, media
from pmemkit.bus import machine_of
from pmemkit.formats import btt as layout
from pmemkit.media import wear
from pmemkit.media.wear import CAUSES, Ledger, caused_by, keep_noting, sidecar_path
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage import open_region
from pmemkit.storage.device import BlockDevice
from pmemkit.storage.region import create_file
from pmemkit.storage.sector import open_sectors

MIB = 1 << 20
SIZE = 16 * MIB
LINE = 64


def formatted(medium, sector_size):
    """An empty arena all over a medium."""
    fresh = layout.fresh_layout(
        SIZE, sector_size, version="2.0", uuid=UUID(int=1), parent_uuid=UUID(int=0)
    )
    for group in fresh:
        for each in group:
            if isinstance(each, tuple):
                medium.write(*each)
    (arena,) = layout.arenas(SIZE, sector_size, "2.0")
    return arena


def engine_on(medium):
    return open_sectors(
        medium,
        version="2.0",
        backup_info_block=False,
        parent_uuid=UUID(int=0),
        read_only=False,
        ordering="default",
    )


def over(bottom):
    return BlockDevice(bottom, "test")


def work(device, sector_size, seed):
    """Writes, overwrites and zeroes."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        lba, count = int(rng.integers(0, 1000)), int(rng.integers(1, 20))
        if rng.random() < 0.2:
            device.zero(lba * sector_size, count * sector_size)
        else:
            device.write(lba * sector_size, rng.bytes(count * sector_size))
    device.flush()


def place_of(arena, at):
    """What is at a byte of an arena, by the layout alone."""
    if arena.logoff <= at < arena.info2off:
        return "log"
    if arena.mapoff <= at < arena.logoff:
        return "map"
    return "data" if arena.dataoff <= at < arena.mapoff else "info"


@pytest.mark.parametrize("sector_size", [512, 520, 4096])
def test_causes_agree_with_where_a_recording_medium_saw_the_stores(sector_size):
    recording = media.Recording(SIZE)
    medium = recording.medium()
    arena = formatted(medium, sector_size)
    before = len(recording.events())
    device = over(engine_on(medium).device())
    size = sector_size // 512 * 512
    work(device, size, 1)
    seen = dict.fromkeys(("data", "map", "log", "info"), (0, 0))
    for kind, at, length in recording.events()[before:]:
        if kind.startswith("store") and length:
            place = place_of(arena, at)
            lines = (at + length - 1) // LINE - at // LINE + 1
            seen[place] = (seen[place][0] + length, seen[place][1] + lines)

    counted = media.map_anonymous(SIZE)
    formatted(counted, sector_size)
    start = counted.written()
    work(over(engine_on(counted).device()), size, 1)
    found = {
        cause: tuple(np.subtract(counted.written()[cause], start[cause]).tolist())
        for cause in CAUSES
    }
    assert found["map"] == seen["map"]
    assert found["log"] == seen["log"]
    assert found["data"][0] + found["zeroing"][0] == seen["data"][0]
    assert found["data"][1] + found["zeroing"][1] == seen["data"][1]
    assert found["info"] == seen["info"] == (0, 0)
    assert min(found["map"][0], found["log"][0], found["data"][0]) > 0


def test_the_sum_of_all_causes_is_what_was_stored():
    medium = media.map_anonymous(SIZE)
    device = over(block.raw(medium))
    work(device, 512, 2)
    with caused_by("info"):
        medium.write(0, bytes(100))
        medium.zero(0, 7)
    assert medium.written()["info"] == (107, 3)
    assert medium.written()["zeroing"][0] > 0
    stored = sum(size for size, _ in medium.written().values())
    assert stored == medium.stats()["bytes_stored"]


def test_causes_belong_to_threads_and_an_unknown_one_is_refused():
    medium = media.map_anonymous(SIZE)
    with caused_by("log"):
        thread = threading.Thread(target=medium.write, args=(0, bytes(64)))
        thread.start()
        thread.join()
    assert medium.written()["data"] == (64, 1)
    with pytest.raises(ValueError, match="no cause"):
        media.exchange_cause("weather")


def test_what_a_cache_writes_back_is_told_from_what_is_written_through():
    medium = media.map_anonymous(SIZE)
    cache = block.cache(block.raw(medium), size=MIB, mode="writeback")
    device = over(cache.device)
    device.write(0, bytes(4096))
    assert medium.written()["write_back"] == (0, 0)
    device.flush()
    assert medium.written()["write_back"] == (4096, 64)
    assert medium.written()["data"] == (0, 0)


@pytest.mark.parametrize("threads", [1, 4])
def test_block_counts_are_exact_over_threads(threads):
    medium = media.map_anonymous(MIB)
    medium.count_blocks(4096)
    device = over(block.raw(medium))
    plans = [np.random.default_rng(seed).integers(0, MIB - 9000, 500) for seed in range(threads)]

    def run(plan):
        for number, at in enumerate(plan):
            device.write(int(at), bytes(1 + number * 17 % 9000))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, plans))
    expected = np.zeros(MIB // 4096, np.uint32)
    for plan in plans:
        for number, at in enumerate(plan):
            first, end = int(at) // LINE, (int(at) + number * 17 % 9000) // LINE + 1
            np.add.at(expected, np.arange(first, end) // (4096 // LINE), 1)
    block_size, data = medium.block_counts()
    assert block_size == 4096
    assert np.array_equal(np.frombuffer(data, np.uint32), expected)
    assert expected.sum() == medium.written()["data"][1]


def test_sampling_is_near_the_truth():
    medium = media.map_anonymous(MIB)
    medium.count_blocks(65536, every=13)
    device = over(block.raw(medium))
    for number in range(13000):
        device.write(number % 16 * 65536, bytes(64))
    counts = np.frombuffer(medium.block_counts()[1], np.uint32)
    assert counts.sum() == 13000
    assert counts.min() > 0


# --- beside the image -----------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    create_file(path, SIZE)
    return path


def written(image):
    ledger = Ledger.load(str(image))
    return {} if ledger is None else ledger.written


def test_nothing_is_noted_of_what_was_only_read(image):
    with open_region(image) as region:
        region.device().read(0, 4096)
    with open_region(image, read_only=True) as region:
        region.device().read(0, 4096)
    assert not (image.parent / "disk.img.wear").exists()


def test_openings_add_up(image):
    for _ in range(3):
        with open_region(image, wear="exact") as region:
            device = region.device()
            device.write(8192, bytes(4096))
            region.note_wear()
            device.write(8192, bytes(4096))
    ledger = Ledger.load(str(image))
    assert ledger.written == {"data": (6 * 4096, 6 * 64)}
    assert list(ledger.blocks)[:4] == [0, 0, 6 * 64, 0]
    assert not ledger.sampled
    assert ledger.since <= ledger.updated


def test_blocks_of_a_namespace_are_those_of_the_image(tmp_path):
    path = tmp_path / "machine.img"
    create_file(path, 64 * MIB)
    with open_images(machine_of([path], label_size=128 << 10, slot=0)) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="raw", size=16 * MIB))
        create(images, None, Wish(mode="sector", size=32 * MIB))
    assert set(written(path)) <= {"info", "map", "log", "data"}
    assert written(path)["info"][0] > 0
    wear.reset(str(path))
    with open_region(f"{path}:namespace0.1", wear="exact") as region:
        start = region.place.offset
        region.device().write(0, bytes(4096))
    ledger = Ledger.load(str(path))
    assert set(ledger.written) == {"data", "map", "log"}
    touched = [number for number, count in enumerate(ledger.blocks) if count]
    assert min(touched) * ledger.block_size >= start > 0
    assert sum(ledger.blocks) == ledger.lines


def test_two_openings_of_one_image_lose_nothing(tmp_path):
    path = tmp_path / "machine.img"
    create_file(path, 64 * MIB)
    with open_images(machine_of([path], label_size=128 << 10, slot=0)) as images:
        init_labels(images, 0, version=(1, 2))
        for _ in range(2):
            create(images, None, Wish(mode="raw", size=16 * MIB))
    wear.reset(str(path))

    def run(number):
        with open_region(f"{path}:namespace0.{number}") as region:
            device = region.device()
            for at in range(50):
                device.write(at * 4096, bytes(4096))
                region.note_wear()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert written(path) == {"data": (100 * 4096, 100 * 64)}
    assert [each.name for each in tmp_path.iterdir() if "wear" in each.name] == ["machine.img.wear"]


def test_off_counts_causes_alone_and_nonsense_is_refused(image):
    with open_region(image, wear="off") as region:
        region.device().write(0, bytes(4096))
    ledger = Ledger.load(str(image))
    assert ledger.written == {"data": (4096, 64)}
    assert (ledger.block_size, list(ledger.blocks)) == (0, [])
    with pytest.raises(OSError, match="sampled"):
        open_region(image, wear="some")


def test_an_image_that_grew_goes_on(image):
    with open_region(image, wear="exact") as region:
        region.device().write(0, bytes(4096))
        region.resize(2 * SIZE)
        region.device().write(SIZE, bytes(4096))
    with open_region(image, wear="exact") as region:
        region.device().write(SIZE, bytes(4096))
    ledger = Ledger.load(str(image))
    assert ledger.size == 2 * SIZE
    assert ledger.blocks[SIZE // 4096] >= 64


def test_numpy_is_not_needed(image, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    for _ in range(2):
        with open_region(image, wear="exact") as region:
            region.device().write(0, bytes(8192))
    assert list(Ledger.load(str(image)).blocks[:3]) == [128, 128, 0]


def test_where_nothing_can_be_noted_nothing_fails(image):
    target = image.parent / "elsewhere"
    target.write_text("mine")
    (image.parent / "disk.img.wear").symlink_to(target)
    with open_region(image) as region:
        region.device().write(0, bytes(4096))
    assert target.read_text() == "mine"


def test_a_ledger_survives_its_own_round_trip(image):
    ledger = Ledger(
        SIZE, 1.25, 2.5, {"data": (1, 1)}, 4096, array("I", [3, 0, (1 << 32) - 1]), True
    )
    wear._change(str(image), lambda _: ledger)
    assert Ledger.load(str(image)) == ledger


def test_a_bomb_does_not_unfold(image):
    ledger = Ledger(SIZE, 1.0, 2.0, {}, 4096, array("I", bytes(64 << 20)))
    wear._change(str(image), lambda _: ledger)
    assert len(Ledger.load(str(image)).blocks) == SIZE // 4096


def test_whoever_serves_notes_from_time_to_time(monkeypatch):
    monkeypatch.setattr(wear, "_NOTED_EVERY_SECONDS", 0.01)
    noted = threading.Event()
    with keep_noting([noted.set]):
        assert noted.wait(10)


def test_the_sidecar_is_that_of_the_file_behind_a_link(image):
    link = image.parent / "link.img"
    link.symlink_to(image)
    assert sidecar_path(str(link)) == sidecar_path(str(image))
