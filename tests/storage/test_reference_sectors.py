"""The engine and the slow reference in lock step: the same answers, and each reads what the other
one wrote, also where either was cut between two of its stores."""

import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pmemkit.errors import PmemError
from pmemkit.formats import btt
from pmemkit.testing import Recording
from pmemkit.testing.reference_sectors import ReferenceSectors
from pmemkit.testing.sectors import SmallArena

ARENAS = [
    SmallArena(sector_size=512, sectors=37, lanes=3),
    SmallArena(sector_size=528, sectors=20, lanes=1),
    SmallArena(sector_size=4096, sectors=18, lanes=5),
    SmallArena(sector_size=4224, sectors=6, lanes=2),
]


def outcome(call):
    """What a call gives or raises."""
    try:
        return call()
    except PmemError as error:
        return type(error), error.errno


class Reference:
    """The slow engine on bytes of its own, with every store it made."""

    def __init__(self, arena, media):
        self.media, self.stores = bytearray(media), []
        self.sectors = ReferenceSectors(self._read, self._store, [(0, arena.info())])

    def _read(self, offset, length):
        return bytes(self.media[offset : offset + length])

    def _store(self, offset, data):
        self.stores.append((offset, data))
        self.media[offset : offset + len(data)] = data

    def image(self):
        return bytes(self.media)

    def cuts(self, call):
        """What the media hold before, between and after the stores of a call."""
        images, self.stores = [self.image()], []
        call(self.sectors)
        for offset, data in self.stores:
            image = bytearray(images[-1])
            image[offset : offset + len(data)] = data
            images.append(bytes(image))
        assert images[-1] == self.media
        return images


class Engine:
    """The engine in Rust on a recording."""

    def __init__(self, arena, media):
        self.recording = Recording(arena.size, initial=media)
        self.engine = arena.open(self.recording.medium())
        self.sectors = self.engine.device().channel()

    def image(self):
        return self.recording.visible_image(self.recording.event_count())

    def cuts(self, call):
        first = self.recording.event_count()
        call(self.sectors)
        last = self.recording.event_count()
        stores = ("store", "store_nt")
        events = list(enumerate(self.recording.events()))[first:last]
        ends = [number + 1 for number, (kind, _, _) in events if kind in stores]
        return [self.recording.visible_image(number) for number in (first, *ends)]


class LockStep(RuleBasedStateMachine):
    """Both engines, the same requests. A subclass has the arena."""

    arena = ARENAS[0]

    def __init__(self):
        super().__init__()
        self.unit = 4096 if self.arena.sector_size >= 4096 else 512
        self.start(self.arena.fresh())

    def start(self, media, other=None):
        """Opens the slow engine on an image, and the other one on the same or another."""
        self.slow = Reference(self.arena, media)
        self.fast = Engine(self.arena, media if other is None else other)

    def both(self, call):
        """The same call on both; what it raised, if it did."""
        slow = outcome(lambda: call(self.slow.sectors))
        assert outcome(lambda: call(self.fast.sectors)) == slow
        return slow if isinstance(slow, tuple) else None

    def settle(self, failed):
        """After a change that failed some sectors may be old on one side and new on the other, and
        the engine takes no more changes: it goes on from what the engine left."""
        if failed is not None:
            self.start(self.fast.image())

    def seen(self, side):
        """What reading each sector gives."""
        size = self.unit
        return [outcome(lambda at=at: side.sectors.read(at * size, size)) for at in self.lbas()]

    def lbas(self):
        return range(self.arena.sectors)

    def range_of(self, first, count):
        first %= self.arena.sectors
        count = min(1 + count, self.arena.sectors - first)
        return first * self.unit, count * self.unit

    places = st.tuples(st.integers(0, 40), st.sampled_from([0, 0, 1, 2, 17, 36]))
    fills = st.integers(0, 1 << 32)

    @rule(place=places, fill=fills)
    def write(self, place, fill):
        offset, length = self.range_of(*place)
        data = random.Random(fill).randbytes(length)
        self.settle(self.both(lambda sectors: sectors.write(offset, data) and None))

    @rule(place=places)
    def zero(self, place):
        offset, length = self.range_of(*place)
        self.settle(self.both(lambda sectors: sectors.zero(offset, length)))

    @rule(place=places)
    def read(self, place):
        offset, length = self.range_of(*place)
        self.both(lambda sectors: sectors.read(offset, length))

    @rule(lba=st.integers(0, 40), state=st.sampled_from([btt.ERROR, btt.ERROR, btt.ZERO, None]))
    def damage(self, lba, state):
        """A map entry as the kernel, or bad luck, would leave it; ``None``: out of range."""
        lba %= self.arena.sectors
        at = self.arena.mapoff + 4 * lba
        media = self.slow.image(), self.fast.image()
        changed = []
        for image in media:
            entry = int.from_bytes(image[at : at + 4], "little")
            block = entry & btt.MAP_MASK if entry & btt.NORMAL else lba
            new = btt.NORMAL | (self.arena.sectors + 99) if state is None else state | block
            changed.append(image[:at] + new.to_bytes(4, "little") + image[at + 4 :])
        self.start(*changed)

    @rule()
    def reopen(self):
        self.start(self.slow.image(), self.fast.image())

    @rule()
    def swap(self):
        """Each goes on with the media of the other."""
        expected = self.seen(self.slow)
        self.start(self.fast.image(), self.slow.image())
        assert self.seen(self.slow) == expected

    @rule(place=places, fill=st.one_of(st.none(), fills), share=st.floats(0, 1), fast=st.booleans())
    def cut(self, place, fill, share, fast):
        """One of them is cut between two stores of a request; both go on from what it left."""
        offset, length = self.range_of(*place)
        side = self.fast if fast else self.slow
        before = self.seen(side)

        def call(sectors):
            if fill is None:
                sectors.zero(offset, length)
            else:
                sectors.write(offset, random.Random(fill).randbytes(length))

        images = outcome(lambda: side.cuts(call))
        if isinstance(images, tuple):
            self.start(self.fast.image())
            return
        after = self.seen(side)
        self.start(images[round(share * (len(images) - 1))])
        for lba, found in enumerate(self.seen(self.slow)):
            assert found in (before[lba], after[lba]), f"sector {lba} is neither old nor new"

    @invariant()
    def same_content(self):
        assert self.seen(self.fast) == self.seen(self.slow)

    @invariant()
    def both_are_sound_or_neither(self):
        assert bool(self.fast.engine.validate()) == bool(self.slow.sectors.validate())


def machine_of(arena):
    return type("Machine", (LockStep,), {"arena": arena})


def run(machine, examples, **more):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.mark.parametrize("arena", ARENAS, ids=lambda arena: str(arena.sector_size))
def test_lock_step(arena, scale):
    run(machine_of(arena), scale(60, 1500))


FAULTS = ("map first", "second half first", "lane keeps its block", "no recovery")


class Wrong(ReferenceSectors):
    """The slow engine with a fault, to see that the machine finds it."""

    fault = ""

    def __init__(self, read, store, infos):
        if self.fault == "no recovery":
            infos = list(infos)
            super().__init__(read, lambda offset, data: None, infos)
            self._store = store
        else:
            super().__init__(read, store, infos)

    def write_sector(self, sector, data):
        real, held = self._store, []
        self._store = lambda offset, data: held.append((offset, data))
        lane = self._lanes[0][0]
        free = lane.free
        super().write_sector(sector, data)
        self._store = real
        if self.fault == "map first":
            held.insert(0, held.pop())
        elif self.fault == "second half first":
            held[-3], held[-2] = held[-2], held[-3]
        elif self.fault == "lane keeps its block":
            lane.free = free
        for offset, data in held:
            real(offset, data)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds_a_wrong_reference(fault, monkeypatch):
    monkeypatch.setattr("test_reference_sectors.ReferenceSectors", Wrong)
    monkeypatch.setattr(Wrong, "fault", fault)
    with pytest.raises((AssertionError, PmemError)):
        run(machine_of(ARENAS[0]), 400, phases=[Phase.generate], derandomize=True)
