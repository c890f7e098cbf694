"""Page frames as Python sees them: against a simple model, from several threads, and on media."""

import random
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from pmemkit import _native
from pmemkit._native import frames, media
from pmemkit.errors import Busy, InvalidArgument, NoSpace, NotSupported, OutOfRange, PmemError
from pmemkit.formats.infoblock import RESERVED_SIZE, shape

AREA = 512
GIGANTIC = 18

pytestmark = pytest.mark.skipif(_native.NO_PAGE_MAP, reason="this build has no page map")


def on_media(count, *, persistent, medium=None):
    size = frames.Allocator.map_size(count)
    medium = medium or media.map_anonymous(size)
    return frames.Allocator.over(medium, 0, size, count, persistent=persistent)


class Frames(RuleBasedStateMachine):
    """The model is a list of owners, one a frame."""

    live = Bundle("live")

    @initialize(
        count=st.sampled_from([1, 5, 512, 1100, 3000]),
        kind=st.sampled_from(["dram", "plain", "device", "persistent"]),
    )
    def make(self, count, kind):
        self.count = count
        self.owner = [None] * count
        self.closed = set()
        if kind in ("dram", "plain"):
            self.made = frames.Allocator(count, magazines=kind == "dram")
        else:
            self.made = on_media(count, persistent=kind == "persistent")

    def taken(self, first, length):
        assert self.owner[first : first + length] == [None] * length
        assert not self.closed & set(range(first // AREA, (first + length - 1) // AREA + 1))
        self.owner[first : first + length] = [first] * length
        return first, length

    def has_room(self, length, align):
        free = [o is None and f // AREA not in self.closed for f, o in enumerate(self.owner)]
        starts = range(0, self.count - length + 1, align)
        return any(all(free[first : first + length]) for first in starts)

    @rule(target=live, order=st.integers(0, 10))
    def get(self, order):
        try:
            first = self.made.get(order)
        except NoSpace:
            assert not self.has_room(1 << order, 1 << order)
            return multiple()
        assert first % (1 << order) == 0
        return self.taken(first, 1 << order)

    @rule(target=live, length=st.integers(1, 700))
    def get_run(self, length):
        align = length if length & (length - 1) == 0 else 1
        try:
            first = self.made.get_run(length)
        except (NoSpace, OutOfRange):
            assert not self.has_room(length, align)
            return multiple()
        return self.taken(first, length)

    @rule(run=consumes(live))
    def put(self, run):
        first, length = run
        self.made.put_run(first, length)
        self.owner[first : first + length] = [None] * length
        with pytest.raises(InvalidArgument, match=str(first)):
            self.made.put_run(first, length)

    @rule(run=live, wrong=st.integers(1, 1024))
    def put_wrongly(self, run, wrong):
        first, length = run
        if wrong != length:
            with pytest.raises((InvalidArgument, OutOfRange)):
                self.made.put_run(first, wrong)

    @rule(area=st.integers(0, 5), online=st.booleans())
    def switch(self, area, online):
        first = area * AREA
        if first >= self.count:
            return
        length = min(AREA, self.count - first)
        if online:
            self.made.online(first, length)
            self.closed.discard(area)
        else:
            empty = self.made.offline(first, length)
            assert empty == (self.owner[first : first + length] == [None] * length)
            self.closed.add(area)

    @invariant()
    def agrees(self):
        if not hasattr(self, "made"):
            return
        assert self.made.validate() == []
        heads = sorted({owner for owner in self.owner if owner is not None})
        assert self.made.allocated(0, self.count) == [(h, self.owner.count(h)) for h in heads]
        free = [f for f, o in enumerate(self.owner) if o is None and f // AREA not in self.closed]
        assert self.made.free_frames == len(free)


Frames.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFrames = Frames.TestCase


def test_a_descriptor_says_what_its_owner_said():
    made = frames.Allocator(4096)
    first = made.get(3)
    made.set_flags(first, pinned=True, movable=False, tag=2)
    found = made.descriptor(first + 7)
    assert (found.allocated, found.first, found.frames) == (True, first, 8)
    assert (found.pinned, found.movable, found.tag, found.online) == (True, False, 2, True)
    with pytest.raises(Busy, match=f"frame {first} is pinned"):
        made.put(first, 3)
    made.set_flags(first, pinned=False)
    made.put(first, 3)
    assert not made.descriptor(first).allocated
    with pytest.raises(OutOfRange, match="4096"):
        made.descriptor(4096)


def test_a_terabyte_costs_what_is_used_of_it():
    made = frames.Allocator(1 << 28)
    assert made.bytes_a_frame == 1
    assert made.metadata_bytes < 1.2 * made.frames
    first = made.get(GIGANTIC)
    assert first % (1 << GIGANTIC) == 0
    stats = made.stats()
    assert stats["runs"][GIGANTIC] == 1023
    assert stats["fragmentation"] == 0
    made.get(0)
    assert made.stats()["fragmentation"] > 0


def test_retain_leaves_what_is_wanted_and_counts_the_rest():
    made = frames.Allocator(2000)
    kept, lost = made.get_run(700), made.get(0)
    assert made.retain([(kept, 700), (1900, 5)]) == 1
    assert made.allocated(0, 2000) == sorted([(kept, 700), (1900, 5)])
    assert not made.descriptor(lost).allocated
    with pytest.raises(PmemError, match="overlap"):
        made.retain([(0, 10), (9, 2)])


def test_a_persistent_map_is_found_again_as_of_the_flush():
    count = 3000
    medium = media.map_anonymous(frames.Allocator.map_size(count))
    made = on_media(count, persistent=True, medium=medium)
    flushed = [(made.get_run(length), length) for length in (1, 8, 300, 1500)]
    made.flush()
    made.get(0)
    del made
    again = on_media(count, persistent=True, medium=medium)
    assert again.allocated(0, count) == sorted(flushed)
    assert again.validate() == []
    with pytest.raises(InvalidArgument, match="3000 frames, not of 2999"):
        on_media(count - 1, persistent=True, medium=medium)


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [(4096, 8192, OutOfRange), (0, 4096, InvalidArgument), (1, 8192, OutOfRange)],
)
def test_a_place_without_room_is_refused(offset, length, error):
    medium = media.map_anonymous(8192)
    with pytest.raises(error):
        frames.Allocator.over(medium, offset, length, 4096, persistent=False)


@pytest.mark.parametrize("size", [32 << 20, 1 << 30, (5 << 30) + (2 << 20)])
def test_the_map_fits_where_the_kernel_keeps_its_own(size):
    found = shape(size, map="dev", align=2 << 20)
    room = found.dataoff - RESERVED_SIZE
    assert frames.Allocator.map_size(found.npfns) <= room
    medium = media.map_anonymous(found.dataoff)
    made = frames.Allocator.over(medium, RESERVED_SIZE, room, found.npfns, persistent=False)
    taken = [made.get(9) for _ in range(4)]
    assert made.allocated(0, found.npfns) == [(first, 512) for first in sorted(taken)]
    assert medium.read(0, RESERVED_SIZE) == bytes(RESERVED_SIZE)


def test_a_map_of_another_version_is_refused():
    count = 100
    medium = media.map_anonymous(frames.Allocator.map_size(count))
    on_media(count, persistent=True, medium=medium).flush()
    medium.write(4096 + 7, b"\xff")
    with pytest.raises(PmemError, match="frame 7"):
        on_media(count, persistent=True, medium=medium)
    medium.write(16, b"\x02")
    with pytest.raises((NotSupported, PmemError), match="checksum"):
        on_media(count, persistent=True, medium=medium)


def test_threads_of_python_own_every_frame_once(scale):
    count, rounds = 2000, scale(300, 20_000)
    made = frames.Allocator(count)
    owned = [0] * count
    wrong = []

    def work(seed):
        choose, mine = random.Random(seed), []
        for _ in range(rounds):
            if mine and choose.random() < 0.5:
                first, order = mine.pop(choose.randrange(len(mine)))
                owned[first] = 0
                made.put(first, order)
            else:
                order = choose.choice([0, 0, 0, 2, 5])
                try:
                    first = made.get(order)
                except NoSpace:
                    continue
                if owned[first]:
                    wrong.append(first)
                owned[first] = seed
                mine.append((first, order))
        for first, order in mine:
            owned[first] = 0
            made.put(first, order)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert made.free_frames == count
    assert made.validate() == []
