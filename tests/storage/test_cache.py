"""The cache over devices of both modes: the conformance suite, failures below, memory, threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_conformance import Native, Sectors

import pmemkit
from pmemkit._native import block, media
from pmemkit.bus import machine_of
from pmemkit.errors import Busy, InvalidArgument, Latched, MediaError, PmemError
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.caching import default_size


class Cached:
    """Sizes so small that blocks are evicted all the time."""

    size = 5 * 4096
    mode = "writeback"

    def wrap(self, below):
        cache = block.cache(below, size=self.size, mode=self.mode, flush_age=0.05)
        self.resources.callback(lambda: self.check(cache))
        return cache.device

    def check(self, cache):
        assert cache.validate() == []

    def make_device(self):
        # What comes in by a back door the cache cannot see.
        return super().make_device()[0], None


class TestOverRaw(Cached, Native):
    pass


class TestOneBlockOverRaw(Cached, Native):
    size = 4096


class TestLargerThanTheDevice(Cached, Native):
    size = 1 << 20


class TestWriteThroughOverRaw(Cached, Native):
    mode = "writethrough"


class TestOverSectors(Cached, Sectors):
    pass


class TestOverSlowMedia(Cached, Native):
    lock_step_examples = 4

    def wrap(self, below):
        return super().wrap(block.delay(below, ops="write,flush", seconds=0.0002))


class TestWriteThroughOverSectors(Cached, Sectors):
    mode = "writethrough"
    size = 2 * 4096


# --- failures below, memory, slow media -----------------------------------------------------------


def quiet(below, blocks=64, **options):
    return block.cache(
        below, size=blocks * 4096, **({"flush_age": None, "read_ahead": 0} | options)
    )


def raw(size=1 << 20):
    medium = media.map_anonymous(size)
    return medium, block.raw(medium)


def test_what_is_dirty_stays_readable_when_media_fail():
    medium, bottom = raw()
    cache = quiet(block.fault(bottom, ops="write", offset=8192, length=4096, count=0))
    channel = cache.device.channel()
    channel.write(0, b"a" * 4096)
    channel.write(8192, b"b" * 4096)
    with pytest.raises(MediaError, match="planted fault"):
        channel.flush()
    for refused in (channel.flush, lambda: channel.write(0, b"c"), lambda: channel.zero(0, 1)):
        with pytest.raises(Latched):
            refused()
    with pytest.raises(MediaError):
        cache.drain()
    assert "planted fault" in cache.device.latched()
    assert channel.read(8192, 4096) == b"b" * 4096
    assert medium.read(8192, 4096) == bytes(4096)
    assert cache.stats()["dirty"] >= 1 and cache.validate() == []


def test_a_write_back_that_fails_by_itself_is_told_by_the_next_flush():
    _, bottom = raw()
    cache = quiet(block.fault(bottom, ops="write", count=0), flush_age=0.01)
    channel = cache.device.channel()
    channel.write(0, b"a" * 4096)
    with pytest.raises(MediaError, match="planted fault"):
        while True:
            channel.flush()
    assert channel.read(0, 1) == b"a"


def test_reopened_after_a_failure_it_writes_again():
    """What was flushed before is there; what was dirty when media failed is told to be lost."""
    medium, bottom = raw()
    below = block.fault(bottom, ops="write", nth=2, count=1)
    cache = quiet(below)
    channel = cache.device.channel()
    channel.write(0, b"a" * 4096)
    channel.flush()
    channel.write(4096, b"b" * 4096)
    channel.write(0, b"c" * 4096)
    with pytest.raises(MediaError):
        channel.flush()
    assert channel.read(0, 8192) == b"c" * 4096 + b"b" * 4096
    del channel, cache
    assert medium.read(0, 8192) == b"a" * 4096 + bytes(4096)
    channel = quiet(block.raw(medium)).device.channel()
    assert channel.read(0, 8192) == b"a" * 4096 + bytes(4096)
    channel.write(4096, b"d" * 4096)
    channel.flush()
    assert medium.read(0, 8192) == b"a" * 4096 + b"d" * 4096


def test_a_read_that_media_refuse_fails_alone():
    _, bottom = raw()
    below = block.fault(bottom, ops="read", offset=4096, length=4096, count=0)
    channel = quiet(below, read_ahead=32).device.channel()
    assert channel.read(0, 4096) == bytes(4096)
    with pytest.raises(MediaError):
        channel.read(4096, 8192)
    assert channel.read(8192, 8192) == bytes(8192)
    # A part of the bad block can be written all the same; it goes around the cache.
    channel.write(4096, b"x" * 512)
    channel.write(4096, b"y" * 4096)
    assert channel.read(4096, 4096) == b"y" * 4096


def test_slow_media_are_asked_once_for_what_many_want():
    _, bottom = raw()
    sink = block.Trace()
    cache = quiet(block.trace(block.delay(bottom, ops="read", seconds=0.02), sink))
    channel = cache.device.channel()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: channel.read(0, 4096), range(6)))
    assert found == [bytes(4096)] * 6
    assert [entry[0] for entry in sink.entries()] == ["read"]


def test_writes_are_merged_and_in_order():
    _, bottom = raw()
    sink = block.Trace()
    channel = quiet(block.trace(bottom, sink)).device.channel()
    for at in (40960, 4096, 8192, 0):
        channel.write(at, b"z" * 4096)
    channel.flush()
    seen = [entry[:3] for entry in sink.entries()]
    assert seen == [("write", 0, 12288), ("write", 40960, 4096), ("flush", 0, 0)]


@pytest.mark.parametrize("below", ["python reader", "read-only"])
def test_over_a_device_that_is_only_read(below):
    content = bytes(range(256)) * 64
    if below == "python reader":
        bottom = block.python_reader(
            len(content), 512, lambda at, length: content[at : at + length]
        )
    else:
        medium, _ = raw(len(content))
        medium.write(0, content)
        bottom = block.raw(medium, read_only=True)
    cache = quiet(bottom, blocks=2)
    channel = cache.device.channel()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda at: channel.read(at, 5000), [0, 3000, 7000, 11000] * 5))
    assert found == [content[at : at + 5000] for at in [0, 3000, 7000, 11000] * 5]
    with pytest.raises(PmemError):
        channel.write(0, b"x")
    cache.drain()


OUT_OF_MEMORY = """
import resource
from pmemkit._native import block, media
fd = media.memfd("small")
import os
os.ftruncate(fd, 64 << 20)
medium = media.map_file(fd, 64 << 20, granularity="byte")
cache = block.cache(block.raw(medium), size=1 << 30, flush_age=None, heed_pressure=False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
channel = cache.device.channel()
for number in range(8192):
    channel.write(number * 4096, number.to_bytes(8, "little") * 512)
channel.flush()
for number in range(8192):
    assert channel.read(number * 4096, 4096) == number.to_bytes(8, "little") * 512, number
stats = cache.stats()
assert stats["memory"] <= 16 << 20, stats
assert stats["bypassed"] + stats["evictions"] > 0, stats
assert cache.validate() == []
print("went on with", stats["memory"])
"""


def test_without_memory_it_goes_on():
    # An arena of a thread of the cache's is addresses that glibc took before the limit was set.
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "went on with" in done.stdout


def test_senseless_options_are_refused():
    _, bottom = raw()
    for options in ({"size": 100}, {"size": 4096, "mode": "sideways"}):
        with pytest.raises(InvalidArgument):
            block.cache(bottom, **options)


# --- as part of a region --------------------------------------------------------------------------


def test_a_region_has_one_cache_and_closing_writes_back(tmp_path):
    path = tmp_path / "a.img"
    with pmemkit.open(path, create_size="1M") as region:
        device = region.device(cache="writeback", cache_size="64K")
        again = region.device()
        device.write(5, b"hello")
        assert again.read(5, 5) == b"hello"
        assert device.cache_stats["dirty"] == 1
        assert path.read_bytes()[5:10] == bytes(5)
        for refused in (lambda: region.device(cache="off"), lambda: region.resize(1 << 21)):
            with pytest.raises(Busy):
                refused()
        device.close()
        assert path.read_bytes()[5:10] == b"hello"
        assert device.cache_stats["dirty"] == 0
        again.write(5, b"HELLO")
    assert path.read_bytes()[5:10] == b"HELLO"
    with pmemkit.open(path) as region:
        region.device(cache="off").read(5, 5)
        with region.device(), pytest.raises(Busy):
            region.device(cache="writethrough")


def test_a_region_whose_media_fail_is_read_only_until_it_is_reopened(tmp_path):
    """The file ends before what is to be written back: a failure of media as a real one is."""
    path = tmp_path / "a.img"
    region = pmemkit.open(path, create_size="1M")
    device = region.device(cache="writeback", cache_size="64K")
    device.write(4096, b"kept")
    device.flush()
    device.write(65536, b"lost")
    os.truncate(path, 8192)
    with pytest.raises(MediaError):
        device.flush()
    with pytest.raises(Latched):
        device.write(0, b"x")
    assert device.read(65536, 4) == b"lost"
    with pytest.raises(MediaError):
        device.close()
    with pytest.raises(MediaError):
        region.close()
    os.truncate(path, 1 << 20)
    with pmemkit.open(path) as region, region.device(cache="writeback") as device:
        assert (device.read(4096, 4), device.read(65536, 4)) == (b"kept", bytes(4))
        device.write(65536, b"here")
    assert path.read_bytes()[65536:][:4] == b"here"


def test_sectors_have_a_cache_too(tmp_path):
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate((64 << 20) + (128 << 10))
    with open_images(machine_of([path], label_size=128 << 10)) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="sector", size=32 << 20))
    with pmemkit.open(f"{path}:namespace0.0") as region:
        device = region.device(cache="writeback", cache_size="1M")
        device.write(10_000, b"across sectors" * 1000)
        assert device.read(10_000, 14_000) == b"across sectors" * 1000
    with pmemkit.open(f"{path}:namespace0.0") as region:
        assert region.device().read(10_000, 14_000) == b"across sectors" * 1000
        assert region.validate() == []


def test_the_default_size_is_a_share_of_what_is_free(tmp_path):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 99 kB\nMemAvailable:   80000 kB\n")
    assert default_size(1 << 30, info) == 10_240_000
    assert default_size(5000, info) == 8192
    assert default_size(1 << 30, tmp_path / "missing") == 1 << 20
