"""Power failures under a cache: what was flushed is there, and sectors are old or new.

`PMEMKIT_SOAK=1` runs the full counts.
"""

import random
import subprocess
import sys

import pytest

from pmemkit._native import PLANTED_FAULTS, block, media
from pmemkit.errors import PmemError
from pmemkit.testing import RecordedDevice, check_streams, random_requests
from pmemkit.testing.sectors import SmallArena

pytestmark = pytest.mark.skipif(
    PLANTED_FAULTS, reason="this build loses data on purpose; test_planted.py is about it"
)

GRANULARITIES = ["byte", "cacheline", "page"]


def cached(below, **options):
    """The stack with a cache on top that holds two blocks and writes back by itself, too."""
    return block.cache(below, **({"size": 8192, "flush_age": 0.02} | options)).device


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_flushed_survives(granularity, mode, scale):
    seeds = range(scale(2, 40))
    layers = lambda below: cached(below, mode=mode)  # noqa: E731
    assert check_streams(granularity, seeds, layers=layers, limit=12) > 40 * len(seeds)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_is_written_before_it_has_to_be(granularity):
    """In a cache with room for all of it, media change at flushes and FUA only."""
    recorded = RecordedDevice(
        granularity, layers=lambda below: cached(below, size=1 << 20, flush_age=None)
    )
    requests = random_requests(5, recorded.size, 30, ops=("write",))
    recorded.run(request for request in requests if not request.fua)
    kinds = {kind for kind, _, _ in recorded.recording.events()}
    assert kinds == {"mark"}


def test_what_is_dirty_is_flushed_when_the_cache_is_dropped():
    recorded = RecordedDevice("page", layers=lambda below: cached(below, flush_age=None))
    recorded.channel.write(100, b"kept")
    del recorded.channel, recorded.device
    (image,) = recorded.recording.crash_images(recorded.recording.event_count())
    assert image[100:104] == b"kept"


# --- media that fail, media that take their time, a machine without memory -----------------------


def survivors(recorded, requests):
    """Carries a stream out over media that fail at some point, and checks that all that was
    acknowledged can still be read. How many requests were refused."""
    known, unsure, refused = bytearray(recorded.initial), set(), 0
    for request in requests:
        touched = range(request.offset, request.offset + len(request.data))
        try:
            recorded.submit(request)
        except PmemError:
            refused += 1
            unsure.update(touched)
            continue
        known[touched.start : touched.stop] = request.data
        if request.op == "discard":
            unsure.update(touched)
        else:
            unsure.difference_update(touched)
    found = recorded.channel.read(0, recorded.size)
    wrong = [at for at in range(recorded.size) if found[at] != known[at] and at not in unsure]
    assert not wrong, f"seed {recorded.seed}: {len(wrong)} bytes, the first at {wrong[0]}"
    return refused


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("ops", ["write", "flush", "write,flush,zero,discard"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_flushed_before_media_failed_survives(granularity, ops, mode, scale):
    """And what was acknowledged is read as it was written, flushed or not."""
    refused = judged = 0
    for seed in range(scale(2, 60)):
        nth = random.Random(seed).randint(1, 8)
        recorded = RecordedDevice(
            granularity,
            seed=seed,
            layers=lambda below, nth=nth: cached(
                block.fault(below, ops=ops, nth=nth, count=0), mode=mode, read_ahead=0
            ),
        )
        failed = survivors(recorded, random_requests(seed, recorded.size, 30))
        refused += failed
        events = len(recorded.recording.events())
        recorded.channel = recorded.device = None
        # Dropped after a failure, it has nothing more to say to media.
        assert not failed or len(recorded.recording.events()) == events
        judged += recorded.check(limit=6)
    assert refused > 0 and judged > 10


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_slow_media_change_nothing(granularity, scale):
    """While they take their time, the flusher and the client meet at the same blocks."""
    layers = lambda below: cached(  # noqa: E731
        block.delay(below, ops="write,flush", seconds=0.003), flush_age=0.01
    )
    seeds = range(scale(1, 20))
    assert check_streams(granularity, seeds, layers=layers, limit=6) > 40 * len(seeds)


WITHOUT_MEMORY = """
import random, resource, sys
from pmemkit._native import block
from pmemkit.testing import RecordedDevice, random_requests

def layers(below):
    global cache
    cache = block.cache(below, size=64 << 20, flush_age=0.02, heed_pressure=False)
    return cache.device

judged = bypassed = 0
for seed in range(int(sys.argv[1])):
    recorded = RecordedDevice(sys.argv[2], seed=seed, layers=layers)
    requests = random_requests(seed, recorded.size, 40)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    # Less than one chunk of blocks.
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
    recorded.run(requests)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    stats = cache.stats()
    assert stats["blocks"] == stats["memory"] == 0, stats
    bypassed += stats["bypassed"]
    judged += recorded.check(limit=8)
assert bypassed > 0
print("judged", judged)
"""


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_any_memory_it_is_as_durable(granularity, scale):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, str(scale(2, 40)), granularity],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 80


# --- sectors below --------------------------------------------------------------------------------


def stamp(sector, version, size):
    """Content of a sector that tells which version of which sector it is, in every 16 bytes."""
    word = sector.to_bytes(8, "little") + version.to_bytes(8, "little")
    return word * (size // 16)


class SectorOracle:
    """Which versions each sector may have: those since the newest that is certain to be durable."""

    def __init__(self, arena):
        self.arena = arena
        self.allowed = {sector: [0] for sector in range(arena.sectors)}
        self.acknowledged = dict.fromkeys(range(arena.sectors), 0)

    def durable(self, versions):
        for sector, version in versions.items():
            self.allowed[sector] = [each for each in self.allowed[sector] if each >= version]

    def check(self, image):
        medium = media.map_anonymous(self.arena.size)
        medium.write(0, image)
        engine = self.arena.open(medium)
        assert engine.validate() == []
        channel, size = engine.device().channel(), self.arena.sector_size
        for sector, versions in self.allowed.items():
            found = channel.read(sector * size, size)
            good = [stamp(sector, each, size) if each else bytes(size) for each in versions]
            assert found in good, f"sector {sector}: {found[:16].hex()}, versions {versions}"


def sector_stream(arena, seed, steps):
    """``(first sector, versions, fua)`` of a write, or ``None`` for a flush."""
    choose = random.Random(seed)
    version = 0
    for _ in range(steps):
        if choose.random() < 0.2:
            yield None
            continue
        count = min(choose.choice((1, 1, 2, 3, 9)), arena.sectors)
        first = choose.randrange(arena.sectors - count + 1)
        versions = {sector: version + sector - first + 1 for sector in range(first, first + count)}
        version += count
        yield versions, choose.random() < 0.2


def explore_sectors(arena, granularity, mode, seed, steps, limit):
    """Runs a stream over sectors on a recording medium and judges what power failures leave."""
    recording = media.Recording(arena.size, granularity=granularity, initial=arena.fresh())
    strict = granularity == "page"
    device = arena.open(recording.medium(), strict=strict).device()
    channel = cached(device, mode=mode).channel()
    stream, size = list(sector_stream(arena, seed, steps)), arena.sector_size
    for number, step in enumerate(stream):
        recording.mark(2 * number)
        if step is None:
            channel.flush()
        else:
            versions, fua = step
            data = b"".join(stamp(*each, size) for each in versions.items())
            channel.write(min(versions) * size, data, fua=fua)
        recording.mark(2 * number + 1)
    oracle = SectorOracle(arena)
    pending, judged = {}, 0
    for event, (kind, where, _) in enumerate(recording.events()):
        if kind == "mark":
            step, acknowledged = stream[where // 2], where % 2
            if step is None and not acknowledged:
                pending = dict(oracle.acknowledged)
            elif step is None:
                oracle.durable(pending)
            elif not acknowledged:
                for sector, version in step[0].items():
                    oracle.allowed[sector].append(version)
            else:
                oracle.acknowledged.update(step[0])
                if step[1]:
                    oracle.durable(step[0])
        images = recording.crash_images(event + 1, limit=limit, seed=seed + event)
        for image in images:
            oracle.check(image)
        judged += len(images)
    return judged


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "arena",
    [SmallArena(512, sectors=40, lanes=2), SmallArena(4096, sectors=6, lanes=2)],
    ids=["512", "4096"],
)
def test_sectors_stay_whole_and_flushed_ones_stay(arena, granularity, mode, scale):
    judged = 0
    for seed in range(scale(1, 12)):
        judged += explore_sectors(arena, granularity, mode, seed, scale(14, 40), scale(2, 6))
    assert judged > 50


def test_a_flush_that_does_not_reach_the_device_is_caught():
    """The oracle itself: sectors that were acknowledged by a flush and are not there."""
    arena = SmallArena(512, sectors=8, lanes=2)
    oracle = SectorOracle(arena)
    oracle.check(arena.fresh())
    oracle.allowed[3].append(1)
    oracle.check(arena.fresh())
    oracle.durable({3: 1})
    with pytest.raises(AssertionError, match="sector 3"):
        oracle.check(arena.fresh())
