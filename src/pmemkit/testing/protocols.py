"""What the suites ask of the thing they test: a channel, and a back door past it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Backdoor", "BlockChannel"]


class BlockChannel(Protocol):
    """The I/O surface of a block device, as :class:`pmemkit._native.block.Channel` has it."""

    @property
    def size(self) -> int:
        """Bytes of the device."""

    @property
    def caps(self) -> frozenset[str]:
        """What the device offers."""

    @property
    def block_size_min(self) -> int:
        """Offsets and lengths are multiples of this many bytes."""

    @property
    def block_size_preferred(self) -> int:
        """The quickest unit, in bytes."""

    @property
    def payload_size_max(self) -> int:
        """The most bytes that one request below the channel carries."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""

    def readinto(self, offset: int, target: Buffer) -> int:
        """Fills ``target`` and returns its length in bytes."""

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> int:
        """Writes all of ``data`` and returns its length in bytes."""

    def flush(self) -> None:
        """Makes every write that was acknowledged before durable."""

    def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Gives a range back; its content is undefined afterwards."""

    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Makes a range read as zeroes."""

    def cache(self, offset: int, length: int) -> None:
        """Says that a range will be read soon."""

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """``(length, hole)`` runs that add up to exactly ``length``."""


class Backdoor(Protocol):
    """A way to the bytes that goes around the interface under test."""

    def peek(self, offset: int, length: int) -> bytes:
        """What is stored there."""

    def poke(self, offset: int, data: bytes) -> None:
        """Stores bytes there."""
