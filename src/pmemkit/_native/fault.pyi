"""Ranges of addresses whose pages appear when they are touched: userfaultfd with a provider behind
it. Users take :mod:`pmemkit.fault`.

A page that fails raises the error of its provider from :meth:`LazyMapping.read` and ``write``; who
touches it through a view gets a SIGBUS.
"""

from collections.abc import Sequence
from typing import Protocol, Self, TypedDict, final

from typing_extensions import Buffer, disjoint_base

from .block import Channel
from .media import Medium

class _Stats(TypedDict):
    faults: int
    write_faults: int
    minor_faults: int
    asked: int
    bytes_placed: int
    failures: int

class _Provides(Protocol):
    def provide(self, first: int, count: int, /) -> Buffer | None: ...

@final
class Provider:
    """Knows what pages are."""

    @staticmethod
    def of_object(object: _Provides) -> Provider:
        """``object.provide(first, count)`` gives the bytes of so many pages, or ``None`` where all
        of them are zeroes; it is called from handler threads. An exception fails the page. Where
        there is ``may_write(page)``, it says whether a page may be written to."""

    @staticmethod
    def of_medium(medium: Medium, offset: int, length: int) -> Provider:
        """Copies of what a medium has."""

    @staticmethod
    def of_channel(channel: Channel, offset: int, length: int) -> Provider:
        """Copies of what a block device has; ``offset`` is a multiple of its sectors."""

    @staticmethod
    def assembled(
        parts: Sequence[tuple[Medium, int, int, Sequence[tuple[int, int]]]], page_size: int
    ) -> tuple[Provider, int]:
        """Ranges of media side by side, ``(medium, offset, length, bad ranges)``, and how long they
        are together. The very bytes, no copies."""

@disjoint_base
class LazyMapping:
    """Memory that fills itself. As a buffer it is all of its bytes, unless its provider is an
    object of Python: whoever touches a view keeps the interpreter, which the provider needs."""

    def __new__(
        cls,
        provider: Provider,
        length: int,
        *,
        page_size: int | None = None,
        huge: bool = False,
        fd: int | None = None,
        threads: int = 1,
        fault_around: int = 1,
        read_only: bool = False,
        track_writes: bool = False,
        user_only: bool = False,
    ) -> Self:
        """``fd`` is a file in shared memory whose pages are filled; ``huge`` takes huge pages of
        this process. ``NotSupported`` where this kernel, or this user, has no such faults."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def reach(self) -> str:
        """``kernel``: system calls given an address wait for its page, too; ``user``: they fail
        with ``EFAULT``."""

    @property
    def read_only(self) -> bool: ...
    @property
    def tracked(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def view_count(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: Buffer) -> None: ...
    def populate(self, offset: int, length: int) -> None:
        """Brings a range in."""

    def retry(self, offset: int, length: int) -> int:
        """Asks once more for the pages of a range that failed; how many there were."""

    def dirty(self) -> list[tuple[int, int]]:
        """The ranges that were stored to: ``(offset, length)``, whole pages."""

    def take_dirty(self) -> list[tuple[int, int]]:
        """The same; they count as clean from now on."""

    def discard_dirty(self) -> None:
        """Throws away what was stored: the provider is asked again. Not in shared memory."""

    def commit_to(self, channel: Channel, offset: int) -> int:
        """Writes what is dirty to a device, flushes it, and gives how many bytes that were."""

    def shrink(self, length: int) -> None:
        """What lies behind is gone, and who waits there gets an error. Busy while viewed."""

    def stats(self) -> _Stats: ...
    def close(self) -> None:
        """Busy while viewed. May be called again."""

def probe() -> list[tuple[str, str | None]]:
    """What faults can be handled here, each tried once; and why not."""
