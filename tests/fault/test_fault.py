"""Lazily filled mappings from Python: clones, loading on demand, assembled regions, providers."""

import gc
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pmemkit
from pmemkit import fault
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    MediaError,
    NotSupported,
    OutOfRange,
    ReadOnly,
)
from pmemkit.media.badblocks import BadRun, note

PAGE = 4096
SIZE = 1 << 20

ABILITIES = dict(fault.probe())
pytestmark = pytest.mark.skipif(
    ABILITIES["missing, private"] is not None,
    reason=f"userfaultfd: {ABILITIES['missing, private']}",
)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "source.img"
    path.write_bytes(random.Random("source").randbytes(SIZE))
    return path


def pmem(*words):
    command = [sys.executable, "-m", "pmemkit", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Numbers:
    """Pages full of their own number; page 3 fails until it is repaired."""

    def __init__(self):
        self.broken = {3}
        self.asked = []

    def provide(self, first, count):
        self.asked.append((first, count))
        if self.broken & set(range(first, first + count)):
            raise ValueError("the disk is on fire")
        if count == 1 and first == 7:
            return None
        return b"".join(bytes([page % 256]) * PAGE for page in range(first, first + count))


# --- clones ---------------------------------------------------------------------------------------


def test_a_clone_changes_nothing_until_it_is_committed(image, tmp_path):
    before = image.read_bytes()
    target = tmp_path / "target.img"
    shutil.copy(image, target)
    with fault.clone(image) as copy:
        assert copy.read(0, SIZE) == before
        copy.write(5000, b"one")
        memoryview(copy)[200_000:200_003] = b"two"
        assert copy.dirty() == [(PAGE, PAGE), (200_000 // PAGE * PAGE, PAGE)]
        assert image.read_bytes() == before
        assert copy.commit(target) == 2 * PAGE
        assert copy.commit(target) == 0
        copy.write(0, b"gone")
        copy.discard_dirty()
        assert copy.read(0, 4) == before[:4]
    expected = bytearray(before)
    expected[5000:5003], expected[200_000:200_003] = b"one", b"two"
    assert target.read_bytes() == expected
    assert image.read_bytes() == before


def test_a_commit_that_fails_keeps_what_it_did_not_write(image, tmp_path):
    small = tmp_path / "small.img"
    small.write_bytes(bytes(PAGE))
    with fault.clone(image) as copy:
        copy.write(0, b"x")
        with pytest.raises(OutOfRange):
            copy.commit(small)
        assert copy.dirty() == [(0, PAGE)]
    with fault.load(image) as data, pytest.raises(NotSupported, match="track_writes"):
        data.commit(small)


def test_what_is_closed_is_closed_and_lets_the_source_go(image):
    copy = fault.clone(image)
    view = memoryview(copy)
    with pytest.raises(Busy, match="1 views"):
        copy.close()
    view.release()
    copy.close()
    copy.close()
    assert copy.closed
    with pytest.raises(Closed):
        copy.read(0, 1)
    with pmemkit.open(image) as region:
        region.device().write(0, bytes(4096))
    # Nobody closes this one.
    numbers = Numbers()
    fault.lazy(numbers, PAGE).read(0, 1)
    gc.collect()
    assert sys.getrefcount(numbers) == 2


def test_a_namespace_of_mode_sector_is_read_through_its_map(tmp_path):
    image = tmp_path / "sector.img"
    pmem("create-image", image, "--size", "32M", "--label-size", "128K")
    pmem("create-namespace", image, "--mode", "sector")
    name = f"{image}:namespace0.0"
    with pmemkit.open(name) as region, region.device() as device:
        device.write(8 * PAGE, b"sector" * 1024)
        device.flush()
    with fault.load(name) as data:
        assert data.read(8 * PAGE, 6144) == b"sector" * 1024
    with pytest.raises(NotSupported, match="mode sector"):
        fault.assemble([name])


# --- providers in Python --------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "fault_around"), [(1, 1), (2, 1), (2, 4)])
def test_pages_that_an_object_says(threads, fault_around):
    numbers = Numbers()
    with fault.lazy(numbers, 16 * PAGE, threads=threads, fault_around=fault_around) as data:
        for page in (0, 1, 2, 7, 15):
            expected = 0 if page == 7 and fault_around == 1 else page
            assert data.read(page * PAGE, 2) == bytes([expected] * 2)
        with pytest.raises(MediaError, match="the disk is on fire") as caught:
            data.read(2 * PAGE, 2 * PAGE)
        assert caught.value.offset == 3 * PAGE
        numbers.broken.clear()
        with pytest.raises(MediaError):
            data.read(3 * PAGE, 1)
        assert data.retry(0, 16 * PAGE) == 1
        assert data.read(3 * PAGE, 1) == b"\3"
        with pytest.raises(NotSupported, match="use read and write"):
            memoryview(data)
        assert data.stats()["failures"] == 1
        with pytest.raises(OutOfRange):
            data.read(16 * PAGE - 1, 2)


def test_answers_that_make_no_sense_fail_the_page():
    class Short:
        def provide(self, first, count):
            return b"x" if first else "no bytes"

    with fault.lazy(Short(), 2 * PAGE) as data:
        for page, words in ((0, "not a buffer"), (1, "1 bytes for 1 pages")):
            with pytest.raises(MediaError, match=words):
                data.read(page * PAGE, 1)
    with pytest.raises(InvalidArgument, match=r"provide\(first, count\)"):
        fault.lazy(object(), PAGE)
    for options in ({"page_size": 3000}, {"fault_around": 3}, {"threads": 0}):
        with pytest.raises(InvalidArgument):
            fault.lazy(Numbers(), PAGE, **options)


def test_a_provider_says_what_may_be_written_to():
    class Guarded(Numbers):
        def may_write(self, page):
            return page != 2

    with fault.lazy(Guarded(), 8 * PAGE) as data:
        data.write(PAGE, b"x")
        with pytest.raises(ReadOnly, match="page 2"):
            data.write(2 * PAGE, b"x")
        assert data.read(2 * PAGE, 1) == b"\2"
        assert data.dirty() == [(PAGE, PAGE)]


def test_huge_pages_come_when_they_are_touched(huge_pages):
    huge_pages(8)
    huge = 2 << 20

    class Huge:
        def provide(self, first, count):
            return b"".join(bytes([page]) * huge for page in range(first, first + count))

    with fault.lazy(Huge(), 8 * huge, page_size=huge, huge=True, track_writes=True) as data:
        assert data.read(3 * huge - 1, 2) == b"\2\3"
        data.write(5 * huge + 9, b"x")
        assert data.dirty() == [(5 * huge, huge)]
        assert data.stats()["faults"] == 3


def test_threads_that_read_and_write_with_a_slow_provider():
    numbers = Numbers()
    numbers.broken.clear()
    with fault.lazy(numbers, 256 * PAGE, threads=2, track_writes=True) as data:
        wrong = []

        def work(own):
            rng = random.Random(own)
            for _ in range(300):
                page = rng.randrange(256)
                if page == 7:
                    continue
                if data.read(page * PAGE + 8, 1) != bytes([page]):
                    wrong.append(page)
                data.write(page * PAGE + 16 + own, bytes([own]))

        threads = [threading.Thread(target=work, args=(own,)) for own in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(numbers.asked) <= 256


def test_closing_wakes_who_waits(image):
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        def provide(self, first, count):
            begun.set()
            go_on.wait(30)
            return bytes(PAGE * count)

    data = fault.lazy(Slow(), 4 * PAGE)
    told = []

    def read():
        try:
            data.read(0, 1)
        except Closed as error:
            told.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    closer = threading.Thread(target=data.close)
    closer.start()
    reader.join(30)
    assert len(told) == 1, "before the provider has answered"
    go_on.set()
    closer.join(30)
    assert data.closed


# --- extents side by side -------------------------------------------------------------------------


def test_assembled_extents_are_the_regions_themselves(image, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(b"o" * 4 * PAGE)
    source = image.read_bytes()
    with fault.assemble([(image, 8 * PAGE, 2 * PAGE), other, (image, 0, PAGE)]) as data:
        assert len(data) == 7 * PAGE
        whole = source[8 * PAGE : 10 * PAGE] + b"o" * 4 * PAGE + source[:PAGE]
        assert data.read(0, len(data)) == whole
        data.write(2 * PAGE - 2, b"over")
        data.persist()
        with pytest.raises(NotSupported, match="track_writes"):
            data.commit(other)
    assert image.read_bytes()[10 * PAGE - 2 : 10 * PAGE] == b"ov"
    assert other.read_bytes()[:2] == b"er"


def test_bad_blocks_are_left_out(image):
    note(str(image), "inject", BadRun(17, 1))
    with fault.assemble([image]) as data:
        assert data.read(PAGE, PAGE) == image.read_bytes()[PAGE : 2 * PAGE]
        with pytest.raises(MediaError, match="page 2 has bad blocks"):
            data.read(2 * PAGE, 1)
        assert data.read(3 * PAGE, 8) == image.read_bytes()[3 * PAGE : 3 * PAGE + 8]


def test_extents_that_cannot_be_assembled(image):
    for extent in ((image, 0, SIZE + PAGE), (image, -PAGE, PAGE)):
        with pytest.raises(OutOfRange):
            fault.assemble([extent])
    with pytest.raises(InvalidArgument, match="100"):
        fault.assemble([(image, 0, 100)])
    with pytest.raises(NotSupported):
        fault.assemble(["anonymous:1M"])


# --- from afar ------------------------------------------------------------------------------------


@pytest.fixture
def libnbd(monkeypatch):
    """Debian's binding, which an interpreter that is not Debian's does not find by itself."""
    monkeypatch.setattr(sys, "path", [*sys.path, "/usr/lib/python3/dist-packages"])
    assert importlib.import_module("nbd")


def test_without_libnbd_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbd", None)
    with pytest.raises(NotSupported, match="python3-libnbd"):
        fault.load("nbd://localhost/")


@pytest.mark.peer("module:nbd")
@pytest.mark.parametrize("server", ["nbdkit", "pmem serve"])
def test_an_export_is_fetched_as_it_is_touched(image, need, libnbd, server):
    socket = image.with_name("socket")
    if server == "nbdkit":
        command = [need("nbdkit"), "--foreground", "--unix", socket, "--readonly", "file", image]
    else:
        command = [sys.executable, "-m", "pmemkit", "serve", "--unix", socket, image]
    server = subprocess.Popen(command)
    try:
        for _ in range(500):
            if socket.exists():
                break
            threading.Event().wait(0.02)
        uri = f"nbd+unix://?socket={socket}"
        whole = image.read_bytes()
        with fault.load(uri, offset=PAGE, threads=2) as data:
            assert len(data) == SIZE - PAGE
            assert data.read(300_000, 10) == whole[300_000 + PAGE : 300_010 + PAGE]
            assert data.stats()["bytes_placed"] < SIZE
            assert data.read(0, len(data)) == whole[PAGE:]
        with pytest.raises(InvalidArgument, match="begin elsewhere"):
            fault.load(uri, offset=100)
        data = fault.load(uri)
        server.kill()
        server.wait()
        with pytest.raises(MediaError, match="provider"):
            data.read(SIZE // 2, 1)
        data.close()
    finally:
        server.kill()
        server.wait()


@pytest.mark.peer("module:nbd")
def test_a_server_that_is_not_there(tmp_path, libnbd):
    with pytest.raises(MediaError, match="nosuch"):
        fault.load(f"nbd+unix://?socket={tmp_path}/nosuch")


# --- who may what ---------------------------------------------------------------------------------

CHILD = """
import json, os
from pmemkit import fault
os.setgroups([]); os.setgid(65534); os.setuid(65534)
class Pages:
    def provide(self, first, count):
        return bytes([first]) * (4096 * count)
found = {"user": os.geteuid(), "device": os.access("/dev/userfaultfd", os.R_OK | os.W_OK)}
try:
    with fault.lazy(Pages(), 1 << 20) as data:
        found["reach"] = data.reach
        found["read"] = list(data.read(3 * 4096, 2))
except Exception as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
def test_nobody_in_particular_has_faults_of_the_program():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    knob = Path("/proc/sys/vm/unprivileged_userfaultfd")
    anybody = knob.exists() and knob.read_text().strip() == "1"
    assert found == {
        "user": 65534,
        "device": found["device"],
        "reach": "kernel" if anybody or found["device"] else "user",
        "read": [3, 3],
    }
    with fault.lazy(Numbers(), PAGE, user_only=True) as data:
        assert data.reach == "user"
        assert data.read(0, 1) == b"\0"


def test_a_system_call_waits_for_a_page_where_the_kernel_may(image):
    with fault.load(image) as data:
        if data.reach != "kernel":
            pytest.skip(f"this user's mappings reach: {data.reach}")
        view = memoryview(data)
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, view[5 * PAGE : 5 * PAGE + 100])
            assert os.read(read_end, 100) == image.read_bytes()[5 * PAGE : 5 * PAGE + 100]
        finally:
            os.close(read_end)
            os.close(write_end)
            view.release()
