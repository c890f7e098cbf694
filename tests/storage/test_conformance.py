"""Every device and every wrapper runs the one conformance suite."""

import os
import tempfile

import pytest

from pmemkit._native import block, media
from pmemkit.errors import InvalidArgument, MediaError
from pmemkit.testing import DeviceSuite, Recording, ReferenceDevice, noop_stack, traced_stack
from pmemkit.testing.sectors import SmallArena

SIZE = (1 << 16) + 4096
SOAK = os.environ.get("PMEMKIT_SOAK") == "1"


class MediumDoor:
    """The bytes below a device."""

    def __init__(self, medium):
        self.medium = medium

    def peek(self, offset, length):
        return self.medium.read(offset, length)

    def poke(self, offset, data):
        self.medium.write(offset, data)


class FileDoor:
    """A file that a device maps, through the kernel."""

    def __init__(self, fd):
        self.fd = fd

    def peek(self, offset, length):
        return os.pread(self.fd, length, offset)

    def poke(self, offset, data):
        assert os.pwrite(self.fd, data, offset) == len(data)


class Native(DeviceSuite):
    """A stack over a medium: subclasses say which."""

    lock_step_examples = 100 if SOAK else 12

    def make_medium(self):
        return media.map_anonymous(SIZE), None

    def wrap(self, below):
        return below

    def make_device(self):
        medium, door = self.make_medium()
        return self.wrap(block.raw(medium)).channel(), door or MediumDoor(medium)

    def make_read_only(self):
        return self.wrap(block.raw(self.make_medium()[0])).channel(read_only=True)


class OnFile(Native):
    granularity = "page"

    def open(self):
        return os.dup(self.resources.enter_context(tempfile.TemporaryFile()).fileno())

    def make_medium(self):
        fd = self.open()
        self.resources.callback(os.close, fd)
        os.ftruncate(fd, SIZE)
        return media.map_file(fd, SIZE, granularity=self.granularity), FileDoor(fd)


class TestReference(DeviceSuite):
    lock_step_examples = 12

    def make_device(self):
        device = ReferenceDevice(SIZE)
        return device, device

    def make_read_only(self):
        return ReferenceDevice(SIZE, read_only=True)


class TestReferenceOfSectors(DeviceSuite):
    """Blocks of 512 bytes and no more than the least: the suite fits such devices too."""

    lock_step_examples = 12

    def make_device(self):
        device = ReferenceDevice(SIZE, block_size_min=512, caps={"write", "flush", "zero"})
        return device, device


class TestAnonymous(Native):
    pass


class TestMemfd(OnFile):
    granularity = "byte"

    def open(self):
        return media.memfd("conformance")


class TestMemfdByCacheline(TestMemfd):
    granularity = "cacheline"


class TestFile(OnFile):
    def make_read_only(self):
        fd = self.open()
        self.resources.callback(os.close, fd)
        os.ftruncate(fd, SIZE)
        medium = media.map_file(fd, SIZE, granularity="page", read_only=True)
        return block.raw(medium, read_only=True).channel()


class TestRecording(Native):
    granularity = "cacheline"

    def make_medium(self):
        return Recording(SIZE, granularity=self.granularity).medium(), None


class TestRecordingOfPages(TestRecording):
    granularity = "page"


class TestRecordingOfBytes(TestRecording):
    granularity = "byte"


class Sectors(Native):
    """Mode sector: arenas with fewer lanes than Linux makes, so that they are soon used up."""

    arena = SmallArena(sector_size=512, sectors=SIZE // 512, lanes=3)
    strict = False

    def make_medium(self):
        medium = media.map_anonymous(self.arena.size)
        return medium, None

    def engine(self):
        medium, _ = self.make_medium()
        medium.write(0, self.arena.fresh())
        return self.arena.open(medium, strict=self.strict)

    def make_device(self):
        return self.wrap(self.engine().device()).channel(), None

    def make_read_only(self):
        return self.wrap(self.engine().device()).channel(read_only=True)


class TestSectors(Sectors):
    pass


class TestSectorsWithMetadata(Sectors):
    arena = SmallArena(sector_size=528, sectors=SIZE // 512, lanes=2)


class TestSectorsOfPages(Sectors):
    arena = SmallArena(sector_size=4096, sectors=SIZE // 4096, lanes=5)


class TestSectorsOfPagesWithMetadata(Sectors):
    arena = SmallArena(sector_size=4224, sectors=SIZE // 4096, lanes=1)


class TestSectorsOnARecording(Sectors):
    granularity = "cacheline"

    def make_medium(self):
        recording = Recording(self.arena.size, granularity=self.granularity)
        return recording.medium(), None


class TestSectorsOnAFileInStrictOrder(Sectors):
    strict = True

    def make_medium(self):
        file = self.resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        file.truncate(self.arena.size)
        return media.map_file(file.fileno(), self.arena.size, granularity="page"), None


class TestSectorsUnderLayers(Sectors):
    def wrap(self, below):
        return traced_stack(block.bounce(below), 2).device


class TestNoop(Native):
    def wrap(self, below):
        return noop_stack(below, 7)


class TestTrace(Native):
    def wrap(self, below):
        return traced_stack(below, 3).device


class TestDelayOfNothing(Native):
    def wrap(self, below):
        return block.delay(below, ops="read,write,flush,discard,zero,cache", seconds=0)


class TestFaultThatNeverMatches(Native):
    def wrap(self, below):
        ops = "read,write,flush,discard,zero,cache"
        return block.fault(below, ops=ops, nth=1 << 62)


class TestBounce(Native):
    def wrap(self, below):
        return block.bounce(below)

    def test_it_does_not_offer_map(self):
        device, _ = self.make_device()
        assert "map" not in device.caps
        assert "map" in block.raw(self.make_medium()[0]).caps


class TestEverythingStacked(OnFile):
    def wrap(self, below):
        below = block.fault(noop_stack(below, 2), ops="read", nth=1 << 62)
        return traced_stack(block.delay(block.bounce(below), ops="flush", seconds=0), 2).device


# --- what a stack of layers must do beyond the suite ----------------------------------------------


def every_call(channel):
    channel.write(10, b"abc", fua=True)
    channel.read(10, 3)
    channel.readinto(0, bytearray(5))
    channel.zero(20, 30, no_hole=True)
    channel.discard(4096, 4096)
    channel.cache(1, 2)
    channel.extents(0, 100)
    channel.flush()


EVERY_CALL = [
    ("write", 10, 3, 1, "ok"),
    ("read", 10, 3, 0, "ok"),
    ("read", 0, 5, 0, "ok"),
    ("zero", 20, 30, 2, "ok"),
    ("discard", 4096, 4096, 0, "ok"),
    ("cache", 1, 2, 0, "ok"),
    ("extents", 0, 100, 0, "ok"),
    ("flush", 0, 0, 0, "ok"),
]


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_each_layer_sees_the_same_calls_in_order(layers):
    stack = traced_stack(block.raw(media.map_anonymous(SIZE)), layers)
    assert len(stack.sinks) == layers
    every_call(stack.device.channel())
    assert stack.calls() == EVERY_CALL


def test_a_call_goes_down_through_the_layers_to_the_one_that_fails_it():
    lower = traced_stack(block.raw(media.map_anonymous(SIZE)), 2)
    failing = block.fault(lower.device, ops="write", nth=2)
    upper = traced_stack(failing, 2)
    channel = upper.device.channel()
    channel.write(0, b"one")
    with pytest.raises(MediaError):
        channel.write(0, b"two")
    assert [entry[4] for entry in upper.calls()] == ["ok", "media"]
    assert [entry[4] for entry in lower.calls()] == ["ok"]
    assert channel.read(0, 3) == b"one"


def test_the_door_stops_what_no_layer_should_see():
    stack = traced_stack(block.raw(media.map_anonymous(SIZE)), 2)
    channel = stack.device.channel(read_only=True)
    with pytest.raises(OSError):
        channel.write(0, b"x")
    with pytest.raises(OSError):
        channel.read(SIZE, 1)
    assert stack.calls() == []


def test_different_traces_are_told_apart():
    stack = traced_stack(block.raw(media.map_anonymous(SIZE)), 2)
    stack.device.channel().flush()
    block.trace(block.raw(media.map_anonymous(SIZE)), stack.sinks[1]).channel().flush()
    with pytest.raises(AssertionError, match="layer 1 below the top"):
        stack.calls()


def test_the_suite_notices_a_device_that_is_wrong():
    class Forgetful(ReferenceDevice):
        def write(self, offset, data, *, fua=False):
            count = super().write(offset, data, fua=fua)
            self.poke(offset + count - 1, b"\0" * bool(count))
            return count

    suite = TestReference()
    with pytest.raises(AssertionError):
        suite.test_the_whole_device_at_once(Forgetful(SIZE))
    with pytest.raises(InvalidArgument):
        suite.test_the_whole_device_at_once(ReferenceDevice(SIZE + 1, block_size_min=512))
    suite.make_device = lambda: (Forgetful(SIZE), None)
    with pytest.raises(AssertionError):
        suite.test_lock_step_with_the_reference()
