"""The conformance suite of block devices: subclass it, say how to make one, run it with pytest.

    class TestMine(DeviceSuite):
        def make_device(self):
            mine = MyDevice(size=1 << 16)
            return mine, Backdoor or None

The device must be writable, hold zeroes, and have at least 64 KiB; it must not be shared with
anybody. Files and the like go into ``self.resources``, which is closed after each test. What the
device does not offer is expected to be refused, so one suite fits every device.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange, ReadOnly
from pmemkit.testing.protocols import Backdoor, BlockChannel
from pmemkit.testing.reference import CAPS
from pmemkit.testing.state_machine import device_state_machine

__all__ = ["DeviceSuite"]

_OFFSETS = (0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 8191, 12345, 40001)
_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 17, 63, 64, 65, 255, 256, 257, 511, 513, 4095, 4096, 4097, 9999)

_KNOWN_CAPS = CAPS | {"map", "map_write"}


def _pattern(length: int, seed: int) -> bytes:
    """Bytes that tell where they belong: random, but the same for the same seed."""
    return random.Random(seed).randbytes(length)


class DeviceSuite:
    """Everything that a block device promises, one test a promise."""

    lock_step_examples: ClassVar[int] = 15
    """How many random programs run in lock step with the reference device."""

    resources: ExitStack
    """Closed after each test."""

    def make_device(self) -> tuple[BlockChannel, Backdoor | None]:
        """A fresh device full of zeroes, and a way to its bytes around it, if there is one."""
        raise NotImplementedError

    def make_read_only(self) -> BlockChannel | None:
        """The same device opened read-only, or ``None`` where there is no such thing."""
        return None

    @pytest.fixture(autouse=True)
    def _close_resources(self) -> Iterator[None]:
        with ExitStack() as self.resources:
            yield

    @pytest.fixture
    def device(self) -> BlockChannel:
        """A fresh device."""
        return self.make_device()[0]

    @staticmethod
    def align(device: BlockChannel, number: int) -> int:
        """``number`` rounded up to the device's unit."""
        unit = device.block_size_min
        return -(-number // unit) * unit

    # --- what it is ---------------------------------------------------------------------------

    def test_it_says_what_it_is(self, device: BlockChannel) -> None:
        """Sizes are powers of two that fit each other, and capabilities are known words."""
        smallest, preferred = device.block_size_min, device.block_size_preferred
        assert device.size >= 1 << 16
        assert smallest > 0 and smallest & (smallest - 1) == 0
        assert preferred >= smallest and preferred & (preferred - 1) == 0
        assert device.size % smallest == 0
        assert device.payload_size_max >= smallest
        assert device.caps <= _KNOWN_CAPS
        assert {"write", "flush"} <= device.caps

    def test_what_it_is_does_not_change(self, device: BlockChannel) -> None:
        """Size and capabilities are frozen."""
        before = (device.size, device.caps, device.block_size_min, device.payload_size_max)
        device.write(0, bytes(self.align(device, 5000)))
        device.flush()
        after = (device.size, device.caps, device.block_size_min, device.payload_size_max)
        assert before == after

    # --- read and write -----------------------------------------------------------------------

    def test_a_fresh_device_reads_as_zeroes(self, device: BlockChannel) -> None:
        """From the first byte to the last."""
        assert device.read(0, device.size) == bytes(device.size)

    def test_odd_sizes_at_odd_offsets(self, device: BlockChannel) -> None:
        """Every combination is read back, and nothing beside it changes."""
        expected = bytearray(device.size)
        for seed, offset in enumerate(_OFFSETS):
            for length in _LENGTHS:
                at, count = self.align(device, offset), self.align(device, length)
                data = _pattern(count, seed + length)
                assert device.write(at, data) == count
                expected[at : at + count] = data
                around = max(0, at - device.block_size_min)
                end = self.align(device, min(device.size, at + count + 1))
                assert device.read(around, end - around) == expected[around:end]
        assert device.read(0, device.size) == expected

    def test_the_whole_device_at_once(self, device: BlockChannel) -> None:
        """One write, one read."""
        data = _pattern(device.size, 1)
        assert device.write(0, data) == device.size
        assert device.read(0, device.size) == data

    def test_later_writes_win(self, device: BlockChannel) -> None:
        """Overlapping writes leave what the last one wrote."""
        unit = device.block_size_min
        expected = bytearray(device.size)
        choose = random.Random(5)
        for seed in range(200):
            at = choose.randrange(8192 // unit) * unit
            data = _pattern(choose.randrange(1, max(2, 600 // unit)) * unit, seed)
            device.write(at, data)
            expected[at : at + len(data)] = data
        assert device.read(0, device.size) == expected

    def test_the_backdoor_shows_what_was_written(self) -> None:
        """And the interface shows what came in by the back door."""
        device, backdoor = self.make_device()
        if backdoor is None:
            pytest.skip("this device has no back door")
        at, data = self.align(device, 4000), _pattern(self.align(device, 3000), 2)
        device.write(at, data, fua="fua" in device.caps)
        device.flush()
        assert backdoor.peek(at, len(data)) == data
        assert backdoor.peek(0, at) == bytes(at)
        other = _pattern(self.align(device, 700), 3)
        backdoor.poke(at, other)
        assert device.read(at, len(data)) == other + data[len(other) :]

    def test_the_callers_buffer_is_its_own(self, device: BlockChannel) -> None:
        """A write does not change its source, and does not look at it again."""
        source = bytearray(_pattern(self.align(device, 5000), 4))
        kept = bytes(source)
        device.write(0, source)
        assert source == kept
        source[:] = bytes(len(source))
        assert device.read(0, len(kept)) == kept

    @pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "slice", "mmap"])
    def test_writes_take_any_buffer(self, device: BlockChannel, kind: str) -> None:
        """Bytes, views of bytes, and mapped memory."""
        data = _pattern(self.align(device, 4096), 6)
        source = self._buffer(kind, data)
        assert device.write(self.align(device, 100), source) == len(data)
        assert device.read(self.align(device, 100), len(data)) == data

    @pytest.mark.parametrize("kind", ["bytearray", "memoryview", "slice", "mmap"])
    def test_readinto_fills_any_buffer(self, device: BlockChannel, kind: str) -> None:
        """All of it, and not a byte beside it."""
        data = _pattern(self.align(device, 4096), 7)
        device.write(self.align(device, 200), data)
        target = self._buffer(kind, bytes(len(data)))
        assert device.readinto(self.align(device, 200), target) == len(data)
        assert bytes(target) == data
        if kind == "slice":
            whole = bytes(memoryview(target).obj)
            assert whole[:16] == whole[-16:] == b"\xee" * 16

    def _buffer(self, kind: str, data: bytes) -> bytes | bytearray | memoryview | mmap.mmap:
        match kind:
            case "bytes":
                return data
            case "bytearray":
                return bytearray(data)
            case "memoryview":
                return memoryview(bytearray(data))
            case "slice":
                whole = bytearray(b"\xee" * 16 + data + b"\xee" * 16)
                return memoryview(whole)[16:-16]
        mapped = self.resources.enter_context(mmap.mmap(-1, len(data)))
        mapped[:] = data
        return mapped

    def test_buffers_that_will_not_do_are_refused(self, device: BlockChannel) -> None:
        """Read-only targets, gaps in a view, and things that are no buffers."""
        unit = max(8, device.block_size_min)
        with pytest.raises(InvalidArgument):
            device.readinto(0, bytes(unit))
        with pytest.raises(InvalidArgument):
            device.readinto(0, memoryview(bytearray(2 * unit))[::2])
        with pytest.raises(InvalidArgument):
            device.write(0, memoryview(bytes(2 * unit))[::2])
        with pytest.raises((InvalidArgument, TypeError)):
            device.write(0, "text")  # type: ignore[arg-type]

    # --- where it ends ------------------------------------------------------------------------

    def test_nothing_is_a_request_too(self, device: BlockChannel) -> None:
        """Zero bytes fit everywhere up to the end, and change nothing."""
        unit = device.block_size_min
        for at in (0, unit, device.size // 2 // unit * unit, device.size):
            assert device.read(at, 0) == b""
            assert device.readinto(at, bytearray()) == 0
            assert device.write(at, b"") == 0
            for call in self._ranged(device):
                call(at, 0)
        assert device.extents(device.size, 0) in ([], [(0, False)])
        assert device.read(0, device.size) == bytes(device.size)

    def test_the_last_byte_belongs_to_the_device(self, device: BlockChannel) -> None:
        """Requests may end exactly at the end."""
        unit = device.block_size_min
        for count in (unit, self.align(device, 7), self.align(device, 5000)):
            data = _pattern(count, count)
            device.write(device.size - count, data)
            assert device.read(device.size - count, count) == data
            for call in self._ranged(device):
                call(device.size - count, count)

    @pytest.mark.parametrize("where", ["one too many", "past the end", "2^63", "wraps"])
    def test_past_the_end_is_refused(self, device: BlockChannel, where: str) -> None:
        """With ``OutOfRange``, and without touching a byte."""
        unit = device.block_size_min
        count = self.align(device, 64)
        at = {
            "one too many": device.size - count + unit,
            "past the end": device.size + unit,
            "2^63": 1 << 63,
            "wraps": (1 << 64) - unit,
        }[where]
        data = _pattern(device.size, 8)
        device.write(0, data)
        target = bytearray(b"\xee" * count)
        calls: list[Callable[[], object]] = [
            lambda: device.read(at, count),
            lambda: device.readinto(at, target),
            lambda: device.write(at, bytes(count)),
            lambda: device.extents(at, count),
        ]
        calls += [partial(call, at, count) for call in self._ranged(device)]
        for refused in calls:
            with pytest.raises(OutOfRange):
                refused()
        assert target == b"\xee" * count
        assert device.read(0, device.size) == data

    def test_lengths_that_wrap_are_refused(self, device: BlockChannel) -> None:
        """A length near 2^64 does not become a small one."""
        unit = device.block_size_min
        data = _pattern(device.size, 9)
        device.write(0, data)
        for at, count in ((unit, (1 << 64) - unit), (0, (1 << 64) - unit), (unit, 1 << 63)):
            with pytest.raises(OutOfRange):
                device.read(at, count)
            with pytest.raises(OutOfRange):
                device.extents(at, count)
            for call in self._ranged(device):
                with pytest.raises(OutOfRange):
                    call(at, count)
        assert device.read(0, device.size) == data

    def test_numbers_that_are_no_offsets_are_refused(self, device: BlockChannel) -> None:
        """Negative ones and those of 2^64 and more."""
        for number in (-1, -device.size, 1 << 64, 1 << 80):
            with pytest.raises(OutOfRange):
                device.read(number, 1)
            with pytest.raises(OutOfRange):
                device.read(0, number)
            with pytest.raises(OutOfRange):
                device.write(number, b"x")
            for call in self._ranged(device):
                with pytest.raises(OutOfRange):
                    call(number, 1)
        assert device.read(0, device.size) == bytes(device.size)

    def test_parts_of_blocks_are_refused(self, device: BlockChannel) -> None:
        """Where the smallest block is larger than a byte."""
        unit = device.block_size_min
        if unit == 1:
            pytest.skip("this device takes single bytes")
        for at, count in ((1, unit), (0, unit - 1), (unit // 2, unit // 2)):
            with pytest.raises(InvalidArgument):
                device.read(at, count)
            with pytest.raises(InvalidArgument):
                device.write(at, bytes(count))
            for call in self._ranged(device):
                with pytest.raises(InvalidArgument):
                    call(at, count)

    def _ranged(self, device: BlockChannel) -> list[Callable[[int, int], None]]:
        """The ops without payload that the device offers."""
        offered = {"discard": device.discard, "zero": device.zero, "cache": device.cache}
        calls: list[Callable[[int, int], None]] = []
        for cap, call in offered.items():
            if cap in device.caps:
                calls.append(call)
        return calls

    # --- what it does not offer ---------------------------------------------------------------

    def test_what_is_not_offered_is_refused(self, device: BlockChannel) -> None:
        """With ``NotSupported``, and before anything changes."""
        unit = device.block_size_min
        data = _pattern(self.align(device, 4096), 10)
        device.write(0, data)
        calls: dict[str, list[Callable[[], object]]] = {
            "fua": [
                lambda: device.write(0, bytes(unit), fua=True),
                lambda: device.zero(0, unit, fua=True),
                lambda: device.discard(0, unit, fua=True),
            ],
            "discard": [lambda: device.discard(0, unit)],
            "zero": [lambda: device.zero(0, unit), lambda: device.zero(0, unit, no_hole=True)],
            "fast_zero": [lambda: device.zero(0, unit, fast=True)],
            "cache": [lambda: device.cache(0, unit)],
        }
        for cap, refused in calls.items():
            if cap in device.caps:
                continue
            for call in refused:
                with pytest.raises(NotSupported):
                    call()
        assert device.read(0, len(data)) == data

    def test_read_only_means_it(self) -> None:
        """Every change is refused; reading goes on."""
        device = self.make_read_only()
        if device is None:
            pytest.skip("this device cannot be opened read-only")
        assert not device.caps & {"write", "fua", "discard", "zero", "fast_zero"}
        unit = device.block_size_min
        before = device.read(0, device.size)
        calls: list[Callable[[], object]] = [
            lambda: device.write(0, b"\xff" * unit),
            lambda: device.write(0, b"\xff" * unit, fua=True),
            lambda: device.discard(0, unit),
            lambda: device.zero(0, unit),
            lambda: device.zero(0, unit, no_hole=True, fua=True),
        ]
        for call in calls:
            with pytest.raises(ReadOnly):
                call()
        assert device.read(0, device.size) == before
        assert sum(length for length, _ in device.extents(0, device.size)) == device.size

    # --- flush, FUA, zero, discard, cache, extents -------------------------------------------

    def test_flush_and_fua_change_nothing_that_is_read(self, device: BlockChannel) -> None:
        """They are accepted, in any number and order."""
        device.flush()
        data = _pattern(self.align(device, 6000), 11)
        device.write(0, data, fua="fua" in device.caps)
        device.flush()
        device.flush()
        if "fua" in device.caps:
            device.write(self.align(device, 8192), b"", fua=True)
        assert device.read(0, len(data)) == data

    @pytest.mark.parametrize("no_hole", [False, True])
    @pytest.mark.parametrize("fua", [False, True])
    def test_zeroed_ranges_read_as_zeroes(
        self, device: BlockChannel, no_hole: bool, fua: bool
    ) -> None:
        """Whatever the flags, and nothing beside them changes."""
        if "zero" not in device.caps or (fua and "fua" not in device.caps):
            pytest.skip("this device does not zero with these flags")
        expected = bytearray(_pattern(device.size, 12))
        device.write(0, expected)
        for offset, length in ((0, 4096), (5000, 1), (9000, 8000), (20000, 16384), (4095, 2)):
            at, count = self.align(device, offset), self.align(device, length)
            device.zero(at, count, no_hole=no_hole, fua=fua)
            expected[at : at + count] = bytes(count)
            assert device.read(0, device.size) == expected
        self._check_extents(device, 0, device.size)

    def test_fast_zero_zeroes_or_is_refused(self, device: BlockChannel) -> None:
        """A refusal leaves the bytes alone."""
        if "fast_zero" not in device.caps:
            pytest.skip("this device does not offer fast_zero")
        data = _pattern(device.size, 13)
        for no_hole in (False, True):
            device.write(0, data)
            at, count = self.align(device, 4096), self.align(device, 10000)
            try:
                device.zero(at, count, fast=True, no_hole=no_hole)
                expected = data[:at] + bytes(count) + data[at + count :]
            except NotSupported:
                expected = data
            assert device.read(0, device.size) == expected

    @pytest.mark.parametrize("fua", [False, True])
    def test_discard_touches_its_range_only(self, device: BlockChannel, fua: bool) -> None:
        """Its content is undefined afterwards; it can be read, and written again."""
        if "discard" not in device.caps or (fua and "fua" not in device.caps):
            pytest.skip("this device does not discard with these flags")
        data = _pattern(device.size, 14)
        device.write(0, data)
        at, count = self.align(device, 4000), self.align(device, 12345)
        device.discard(at, count, fua=fua)
        assert len(device.read(at, count)) == count
        assert device.read(0, at) == data[:at]
        assert device.read(at + count, device.size - at - count) == data[at + count :]
        self._check_extents(device, 0, device.size)
        device.write(at, data[:count])
        assert device.read(at, count) == data[:count]

    def test_cache_is_harmless(self, device: BlockChannel) -> None:
        """It is a hint."""
        if "cache" not in device.caps:
            pytest.skip("this device does not offer cache")
        data = _pattern(device.size, 15)
        device.write(0, data)
        for offset, length in ((0, 1), (4095, 2), (100, 9000)):
            device.cache(self.align(device, offset), self.align(device, length))
        device.cache(0, device.size)
        assert device.read(0, device.size) == data

    def test_extents_add_up_and_holes_read_as_zeroes(self, device: BlockChannel) -> None:
        """For any range, before and after writing and zeroing."""
        self._check_extents(device, 0, device.size)
        device.write(self.align(device, 16384), _pattern(self.align(device, 4096), 16))
        if "zero" in device.caps:
            device.zero(self.align(device, 32768), self.align(device, 8192))
        for offset, length in ((0, 1), (1, 4095), (16383, 4100), (16384, 4096), (30000, 9999)):
            at, count = self.align(device, offset), self.align(device, length)
            self._check_extents(device, at, count)
        self._check_extents(device, 0, device.size)

    @staticmethod
    def _check_extents(device: BlockChannel, offset: int, length: int) -> None:
        runs = device.extents(offset, length)
        assert sum(count for count, _ in runs) == length
        assert all(count > 0 for count, _ in runs)
        for count, hole in runs:
            if hole:
                assert device.read(offset, count) == bytes(count), f"hole at byte {offset}"
            offset += count

    # --- many threads -------------------------------------------------------------------------

    def test_threads_on_ranges_of_their_own(self, device: BlockChannel) -> None:
        """Neighbours that share cache lines and pages do not disturb each other."""
        unit = device.block_size_min
        stripe = self.align(device, 1000)
        count = min(8, device.size // stripe)

        def hammer(thread: int) -> bytes:
            choose = random.Random(thread)
            start = thread * stripe
            mine = bytearray(stripe)
            for round_number in range(60):
                at = choose.randrange(stripe // unit) * unit
                room = (stripe - at) // unit
                length = choose.randint(1, room) * unit
                match round_number % 6:
                    case 0 if "zero" in device.caps:
                        device.zero(start + at, length, no_hole=bool(round_number % 4))
                        mine[at : at + length] = bytes(length)
                    case 1:
                        device.flush()
                    case _:
                        data = choose.randbytes(length)
                        device.write(start + at, data, fua="fua" in device.caps and at % 3 == 0)
                        mine[at : at + length] = data
                assert device.read(start, stripe) == mine
            return bytes(mine)

        with ThreadPoolExecutor(count) as pool:
            stripes = list(pool.map(hammer, range(count)))
        assert device.read(0, count * stripe) == b"".join(stripes)

    def test_readers_see_what_was_written(self, device: BlockChannel) -> None:
        """While another thread rewrites a range, each byte read is one that some write left."""
        span = self.align(device, 4096)
        device.write(0, b"a" * span)
        with ThreadPoolExecutor(1) as pool:
            writes = pool.submit(
                lambda: [device.write(0, b"ab"[turn % 2 :][:1] * span) for turn in range(200)]
            )
            while not writes.done():
                assert set(device.read(0, span)) <= set(b"ab")
            writes.result()
        assert device.read(0, span) == b"b" * span

    # --- against the reference ----------------------------------------------------------------

    def test_lock_step_with_the_reference(self) -> None:
        """Random programs under Hypothesis, compared step by step."""
        machine = device_state_machine(lambda: self.make_device()[0])
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.lock_step_examples,
                stateful_step_count=30,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
