"""Random programs for a block device and the reference device, in lock step, under Hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pmemkit.errors import NotSupported, PmemError
from pmemkit.testing.protocols import BlockChannel
from pmemkit.testing.reference import ReferenceDevice

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["device_state_machine"]


@st.composite
def _ranges(draw: DrawFn) -> tuple[int, int]:
    """A range as two shares of a device: boundaries, small pieces and anything."""
    near = draw(st.sampled_from([0, 8, 64, 512, 4096, 8192, 1 << 15, (1 << 16) - 1, 1 << 16]))
    offset = max(0, near + draw(st.integers(-9, 9)))
    length = draw(
        st.one_of(
            st.integers(0, 9),
            st.sampled_from([63, 64, 65, 255, 256, 257, 4095, 4096, 4097]),
            st.integers(0, 20000),
        )
    )
    return offset, length


def device_state_machine(
    make_device: Callable[[], BlockChannel],
) -> type[RuleBasedStateMachine]:
    """A state machine class that runs fresh devices of ``make_device`` against the reference.

    A device must hold zeroes at first. What it does, returns and raises is compared after each
    step; what a discard leaves is undefined, so there the reference adopts what the device shows.
    """

    class DeviceMachine(_DeviceMachine):
        def _make(self) -> BlockChannel:
            return make_device()

    return DeviceMachine


class _DeviceMachine(RuleBasedStateMachine):
    """The rules; a subclass says how a device is made."""

    def __init__(self) -> None:
        super().__init__()
        self.device = self._make()
        unit = self.device.block_size_min
        self.reference = ReferenceDevice(
            self.device.size, caps=self.device.caps, block_size_min=unit
        )

    def _make(self) -> BlockChannel:
        raise NotImplementedError

    def _both(self, call: Callable[[BlockChannel], object]) -> bool:
        """Runs a call on both and compares the outcome; true when it was carried out."""
        outcomes = []
        for channel in (self.reference, self.device):
            try:
                outcomes.append(call(channel))
            except PmemError as error:
                outcomes.append((type(error), error.errno))
        expected, actual = outcomes
        assert actual == expected, f"the reference answers {expected!r}, the device {actual!r}"
        return not (isinstance(expected, tuple) and isinstance(expected[0], type))

    def _units(self, where: tuple[int, int], aligned: bool) -> tuple[int, int]:
        unit = self.device.block_size_min
        offset, length = where
        return (offset // unit * unit, -(-length // unit) * unit) if aligned else where

    @rule(where=_ranges(), aligned=st.booleans())
    def read(self, where: tuple[int, int], aligned: bool) -> None:
        """Any range, also such that do not fit."""
        offset, length = self._units(where, aligned)
        self._both(lambda channel: channel.read(offset, length))

    @rule(where=_ranges(), aligned=st.booleans())
    def readinto(self, where: tuple[int, int], aligned: bool) -> None:
        """The same bytes arrive in a buffer."""
        offset, length = self._units(where, aligned)
        targets = [bytearray(length), bytearray(length)]
        pick = {id(self.reference): targets[0], id(self.device): targets[1]}
        self._both(lambda channel: channel.readinto(offset, pick[id(channel)]))
        assert targets[0] == targets[1]

    @rule(where=_ranges(), aligned=st.booleans(), fill=st.integers(0, 1 << 32), fua=st.booleans())
    def write(self, where: tuple[int, int], aligned: bool, fill: int, fua: bool) -> None:
        """Any bytes, with and without FUA."""
        offset, length = self._units(where, aligned)
        data = random.Random(fill).randbytes(length)
        self._both(lambda channel: channel.write(offset, data, fua=fua))

    @rule(
        where=_ranges(),
        aligned=st.booleans(),
        fua=st.booleans(),
        no_hole=st.booleans(),
        fast=st.sampled_from([False, False, False, True]),
    )
    def zero(
        self, where: tuple[int, int], aligned: bool, fua: bool, no_hole: bool, fast: bool
    ) -> None:
        """A device may refuse to be fast after all; then nothing has changed."""
        offset, length = self._units(where, aligned)
        if fast and "fast_zero" in self.device.caps:
            try:
                self.device.zero(offset, length, fua=fua, no_hole=no_hole, fast=True)
            except NotSupported:
                return
            except PmemError:
                pass  # The reference has to agree, below.
        self._both(
            lambda channel: channel.zero(offset, length, fua=fua, no_hole=no_hole, fast=fast)
        )

    @precondition(lambda self: "discard" in self.device.caps)
    @rule(where=_ranges(), aligned=st.booleans(), fua=st.booleans())
    def discard(self, where: tuple[int, int], aligned: bool, fua: bool) -> None:
        """Afterwards the reference adopts what the device shows."""
        offset, length = self._units(where, aligned)
        if self._both(lambda channel: channel.discard(offset, length, fua=fua)):
            self.reference.poke(offset, self.device.read(offset, length))

    @rule(where=_ranges(), aligned=st.booleans())
    def cache(self, where: tuple[int, int], aligned: bool) -> None:
        """A hint: refused alike, without effect."""
        offset, length = self._units(where, aligned)
        self._both(lambda channel: channel.cache(offset, length))

    @rule()
    def flush(self) -> None:
        """Always accepted."""
        self._both(lambda channel: channel.flush())

    @rule(where=_ranges())
    def extents(self, where: tuple[int, int]) -> None:
        """Where holes are is the device's affair; that they add up and read as zeroes is not."""
        offset, length = where
        refused: list[type[PmemError]] = []
        for channel in (self.reference, self.device):
            try:
                runs = channel.extents(offset, length)
            except PmemError as error:
                refused.append(type(error))
                continue
            assert sum(count for count, _ in runs) == length
            at = offset
            for count, hole in runs:
                if hole:
                    assert self.reference.peek(at, count) == bytes(count)
                at += count
        assert len(refused) != 1 and len(set(refused)) <= 1, f"only one of them says {refused}"

    @invariant()
    def same_content(self) -> None:
        """The whole device, after every step."""
        assert self.device.read(0, self.device.size) == self.reference.read(0, self.device.size)
