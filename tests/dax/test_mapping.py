"""Mappings: what can be mapped and how, views that pin, the verbs of libpmem2, refusals."""

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

import pmemkit
from pmemkit._native import dax as native
from pmemkit.bus import machine_of
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    MediaError,
    NotSupported,
    OutOfRange,
    ReadOnly,
    Truncated,
)
from pmemkit.media.badblocks import BadRun, note
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels

PAGE = mmap.PAGESIZE
MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "pool.img"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


# --- what can be mapped ---------------------------------------------------------------------------


def test_a_whole_image_is_mapped_and_its_file_has_the_bytes(image):
    with pmemkit.map(image) as mapping:
        assert (len(mapping), mapping.granularity, mapping.map_sync) == (4 * MIB, "page", False)
        assert (mapping.tracker, mapping.persistence_domain) == ("kernel", "file_system")
        mapping.copy_persist(10, b"hello")
        mapping.set_persist(PAGE - 1, 3, 7)
        with mapping.view(2 * PAGE, 5) as view:
            view[:] = b"plain"
        mapping.sync()
    data = image.read_bytes()
    assert (data[10:15], data[PAGE - 1 : PAGE + 2]) == (b"hello", b"\7\7\7")
    assert data[2 * PAGE : 2 * PAGE + 5] == b"plain"


def test_a_part_of_a_region_is_mapped(image):
    with pmemkit.open(image) as region, region.map(PAGE, 100) as mapping:
        assert len(mapping) == 100
        mapping.write(98, b"ab")
        mapping.persist(0, 100)
        assert region.medium.read(PAGE + 98, 2) == b"ab"
        with pytest.raises(OutOfRange):
            mapping.write(99, b"ab")


def namespace(path, mode):
    """A labelled image with one namespace of a mode; what it is opened by."""
    with path.open("wb") as file:
        file.truncate(64 * MIB + (128 << 10))
    with open_images(machine_of([path], label_size=128 << 10)) as images:
        init_labels(images, 0, version=(1, 2))
        return f"{path}:{create(images, None, Wish(mode=mode)).dev}"


@pytest.mark.parametrize("mode", ["raw", "fsdax", "devdax"])
def test_a_namespace_of_an_image_is_mapped_where_its_data_are(tmp_path, mode):
    name = namespace(tmp_path / "a.img", mode)
    with pmemkit.open(name) as region, region.map() as mapping:
        assert (len(mapping), mapping.path) == (region.size, name)
        mapping.copy_persist(5, b"data")
        offset = region.place.offset
    assert (offset > 0) == (mode != "raw")
    with (tmp_path / "a.img").open("rb") as file:
        file.seek(offset + 5)
        assert file.read(4) == b"data"


def test_mode_sector_is_refused_and_says_why(tmp_path):
    with (
        pmemkit.open(namespace(tmp_path / "a.img", "sector")) as region,
        pytest.raises(NotSupported, match="sectors move with every write"),
    ):
        region.map()


@pytest.mark.parametrize("spec", ["anonymous:1M", "memfd:1M"])
def test_memory_is_mapped(spec):
    with pmemkit.open(spec) as region, region.map(PAGE) as mapping:
        mapping.copy_persist(3, b"x")
        assert region.medium.read(PAGE + 3, 1) == b"x"
        assert mapping.persistence_domain == "none"
        with pytest.raises(NotSupported, match="outlives nothing"):
            mapping.deep_flush()


def test_offsets_are_pages_and_of_strict_backings_lengths_too(image, monkeypatch):
    with pmemkit.open(image) as region:
        with pytest.raises(InvalidArgument, match=f"multiples of {PAGE}"):
            region.map(100)
        for offset, length in ((0, 0), (0, 5 * MIB), (4 * MIB, None), (-PAGE, None)):
            with pytest.raises(InvalidArgument):
                region.map(offset, length)
        monkeypatch.setattr(region.opened, "backing", "hugetlb")
        with pytest.raises(InvalidArgument, match="offset and length of a hugetlb"):
            region.map(0, PAGE + 1)


def test_what_is_coarser_than_required_is_refused(image):
    with pmemkit.open(image) as region:
        with pytest.raises(NotSupported, match="granularity cacheline is required and page is"):
            region.map(granularity="cacheline")
        with pytest.raises(InvalidArgument, match="not a granularity"):
            region.map(granularity="fine")
        region.map(granularity="page").close()
    with pmemkit.map("anonymous:1M", granularity="byte") as mapping:
        assert mapping.granularity == "byte"


def test_a_cache_and_a_mapping_exclude_each_other(image):
    with pmemkit.open(image) as region:
        with region.map(), pytest.raises(Busy, match="a mapping is open"):
            region.device(cache="writeback")
        region.device(cache="writeback")
        with pytest.raises(Busy, match="has a cache"):
            region.map()


def test_an_image_with_bad_media_has_no_views_and_fails_where_it_is_bad(image):
    note(str(image), "inject", BadRun(16, 1))
    with pmemkit.map(image) as mapping:
        assert mapping.read(0, 512) == bytes(512)
        with pytest.raises(MediaError):
            mapping.read(8192, 1)
        with pytest.raises(NotSupported, match="bad media"):
            mapping.view(0, 10)
        mapping.copy_persist(8192, bytes(512))


def test_huge_pages_are_asked_for_or_refused():
    with pmemkit.map("anonymous:4M", huge=False) as mapping:
        assert len(mapping) == 4 * MIB


# --- views ----------------------------------------------------------------------------------------


def test_a_live_view_pins_the_mapping(image):
    mapping = pmemkit.map(image)
    views = [memoryview(mapping), mapping.view(10, 20), mapping.array("<u4", (2, 3), 64)]
    assert mapping.view_count == 3
    with pytest.raises(Busy, match=r"pool\.img: close: 3 views of the mapping are alive") as caught:
        mapping.close()
    assert caught.value.errno == 16
    views[0].release()
    views[1].release()
    del views
    mapping.close()
    mapping.close()
    for call in (lambda: mapping.read(0, 1), lambda: memoryview(mapping), mapping.sync):
        with pytest.raises(Closed):
            call()


def test_a_view_keeps_the_mapping_that_nobody_else_has():
    array = pmemkit.map("memfd:1M").array("<u8", 4)
    array[:] = range(4)
    assert array.sum() == 6


def test_closing_the_region_tells_of_views(image):
    region = pmemkit.open(image)
    mapping = region.map()
    view = mapping.view(0, 10)
    with pytest.raises(Busy, match="1 views"):
        region.close()
    view.release()
    mapping.close()
    pmemkit.open(image).close()


def test_an_exception_in_the_block_is_not_hidden_by_its_views(image):
    with pytest.raises(ZeroDivisionError), pmemkit.map(image) as mapping:
        view = mapping.view()
        view[0] = 1 // 0


def test_structured_arrays_stand_on_the_bytes(image):
    kind = np.dtype([("key", "<u8"), ("name", "S8"), ("place", "<f4", (2,))])
    with pmemkit.map(image) as mapping:
        records = mapping.array(kind, 10, offset=128)
        records[3] = (7, b"seven", (1.5, 2.5))
        mapping.persist(128, records.nbytes)
        again = mapping.array(kind, (5, 2), offset=128, read_only=True)
        assert again[1, 1]["name"] == b"seven" and not again.flags.writeable
        pairs = mapping.array(("<f4", (2,)), 3, offset=1024)
        assert (pairs.shape, mapping.array(offset=4 * MIB - 5).shape) == ((3, 2), (5,))
        assert mapping.array("<u8", 0).shape == (0,)
        del records, again, pairs
    with pmemkit.map(image, read_only=True) as mapping:
        assert mapping.array(kind, 10, 128)[3]["key"] == 7


def test_arrays_that_do_not_fit_are_refused(image):
    with pmemkit.map(image) as mapping:
        for arguments in (("<u8", 1 << 20), ("u1", 1, 4 * MIB), ("u1", 1 << 62)):
            with pytest.raises(OutOfRange):
                mapping.array(*arguments)
        with pytest.raises(InvalidArgument, match="cannot stand on media"):
            mapping.array(object, 1)
        with pytest.raises(InvalidArgument, match="not a shape"):
            mapping.array("u1", (-1, -1))


def test_a_read_only_mapping_refuses_every_change(image):
    with pmemkit.map(image, read_only=True) as mapping:
        assert mapping.read_only and memoryview(mapping).readonly
        for call in (
            lambda: mapping.write(0, b"x"),
            lambda: mapping.copy_persist(0, b"x"),
            lambda: mapping.set_persist(0, 1, 1),
        ):
            with pytest.raises(ReadOnly):
                call()
        with pytest.raises(TypeError):
            mapping.view()[0] = 1


def test_a_file_cut_short_is_an_error_of_the_methods(image):
    with pmemkit.map(image) as mapping:
        os.truncate(image, MIB)
        with pytest.raises(Truncated):
            mapping.read(2 * MIB, 10)
        with pytest.raises(Truncated):
            mapping.write(2 * MIB, b"x")


# --- dirty tracking -------------------------------------------------------------------------------


def test_trackers_of_each_backing(image, tmp_path, monkeypatch):
    def tracker(path, granularity=None):
        monkeypatch.setenv("PMEMKIT_GRANULARITY", granularity or "")
        with pmemkit.map(path) as mapping:
            return mapping.tracker

    assert tracker("anonymous:1M") == tracker("memfd:1M", "byte") == "fence"
    assert tracker("memfd:1M") == tracker(image) == "kernel"
    best = {"write-protect-async", "write-protect", "explicit"}
    assert {tracker("memfd:1M", "cacheline"), tracker(image, "cacheline")} <= best
    with pytest.raises(InvalidArgument, match='"soft" is no tracker'):
        pmemkit.map("memfd:1M", tracker="soft")


@pytest.mark.parametrize("tracker", ["explicit", "write-protect", "write-protect-async"])
def test_sync_writes_back_what_was_stored(tracker, monkeypatch):
    monkeypatch.setenv("PMEMKIT_GRANULARITY", "cacheline")
    try:
        mapping = pmemkit.map("memfd:4M", tracker=tracker)
    except NotSupported as missing:
        pytest.skip(str(missing))
    with mapping:
        mapping.sync()
        mapping.write(5 * PAGE, b"12345678")
        array = mapping.array("u1", 100, offset=9 * PAGE)
        array[7] = 1
        written = 64 + 128 if tracker == "explicit" else 2 * PAGE
        assert mapping.sync() == written
        assert mapping.sync() == (128 if tracker == "explicit" else 0)
        del array
        mapping.sync()
        assert mapping.sync() == 0
        mapping.mark_dirty(0, 10)
        assert mapping.sync() == 64


@pytest.mark.parametrize("tracker", ["write-protect", "write-protect-async"])
def test_huge_pages_are_tracked_and_copied_as_such(huge_pages, tracker, monkeypatch):
    huge_pages(8)
    monkeypatch.setenv("PMEMKIT_GRANULARITY", "cacheline")
    try:
        mapping = pmemkit.map("hugetlb:8M", tracker=tracker)
    except NotSupported as missing:
        pytest.skip(str(missing))
    with mapping:
        assert mapping.unit == 2 * MIB
        mapping.sync()
        array = mapping.array("u1", 8 * MIB)
        array[5 * MIB] = 1
        assert mapping.sync() == 2 * MIB
        assert mapping.sync() == 0
        assert mapping.snapshot_sees_stores
        with mapping.snapshot() as copy:
            array[5 * MIB] = 2
            assert copy.read(5 * MIB, 1) == b"\1"
        assert mapping.sync() >= 2 * MIB
        del array


# --- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_is_a_copy_that_goes_its_own_way(image, tmp_path):
    with pmemkit.map(image) as mapping:
        mapping.copy_persist(5000, b"old")
        copy = mapping.snapshot()
        mapping.snapshot(tmp_path / "copy.img")
        mapping.copy_persist(5000, b"new")
        assert copy.read(5000, 3) == b"old"
        view = mapping.view()
        if not mapping.snapshot_sees_stores:
            with pytest.raises(Busy, match="1 writable views"):
                mapping.snapshot()
        view.release()
    data = (tmp_path / "copy.img").read_bytes()
    assert len(data) == 4 * MIB and data[5000:5003] == b"old" and not any(data[5003:])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy.img", "pool.img"]


def test_a_snapshot_of_a_sparse_image_is_sparse(tmp_path):
    path = tmp_path / "large.img"
    with pmemkit.map(path, create_size="1G") as mapping:
        mapping.copy_persist(777 * MIB, b"here")
        mapping.snapshot(tmp_path / "copy.img")
    assert (tmp_path / "copy.img").stat().st_blocks * 512 < 4 * MIB
    with pmemkit.map(tmp_path / "copy.img", read_only=True) as copy:
        assert copy.read(777 * MIB, 4) == b"here"


PAIRS = """
import sys, threading, pmemkit
pages = 64
with pmemkit.map(f"memfd:{pages * 4096}") as mapping:
    assert mapping.snapshot_sees_stores
    view, stop = mapping.view().cast("Q"), threading.Event()
    def store():
        number = 0
        while not stop.is_set():
            number += 1
            view[0] = number
            view[(pages - 1) * 512] = number
    thread = threading.Thread(target=store)
    thread.start()
    for _ in range(20):
        with mapping.snapshot() as copy:
            first = int.from_bytes(copy.read(0, 8), "little")
            last = int.from_bytes(copy.read((pages - 1) * 4096, 8), "little")
            assert first - last in (0, 1), (first, last)
    stop.set()
    thread.join()
    view.release()
print("of one moment", first > 0)
"""


def test_a_snapshot_of_memory_sees_plain_stores_of_python_threads():
    with pmemkit.map("memfd:1M") as mapping:
        if not mapping.snapshot_sees_stores:
            pytest.skip("this system does not let us handle write faults")
    done = subprocess.run(
        [sys.executable, "-c", PAIRS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "of one moment True\n"), done.stderr


# --- the recording medium, from Python ------------------------------------------------------------


def test_a_mapping_of_the_recording_medium_promises_and_keeps():
    from pmemkit.testing import Recording

    recording = Recording(2 * PAGE)
    mapping = native.Mapping(recording.medium(), length=2 * PAGE, tracker="explicit")
    mapping.write(0, b"lost")
    mapping.copy_persist(128, b"kept")
    view = memoryview(mapping)
    view[PAGE : PAGE + 4] = b"view"
    view.release()
    before = recording.event_count()
    mapping.sync()
    images = recording.crash_images(before)
    assert {image[128:132] for image in images} == {b"kept"}
    assert {image[:4] for image in images} == {b"lost", bytes(4)}
    (image,) = recording.crash_images(recording.event_count())
    assert (image[:4], image[PAGE : PAGE + 4]) == (b"lost", b"view")
