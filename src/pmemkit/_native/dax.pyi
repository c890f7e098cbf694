"""Direct mappings: bytes of a region with the verbs of libpmem2, dirty tracking, snapshots, a log.

Offsets and lengths are bytes from the start of the mapping. Every call may be made from any thread;
it releases the GIL where it moves more than a page or may wait. :mod:`pmemkit.dax` has what programs
use.
"""

from collections.abc import Sequence
from typing import Self, final

from typing_extensions import Buffer, disjoint_base

from pmemkit._native.media import Medium

@disjoint_base
class Mapping:
    """A range of a medium. As a buffer it is all of its bytes."""

    def __new__(
        cls,
        medium: Medium,
        *,
        offset: int = 0,
        length: int,
        read_only: bool = False,
        tracker: str = "automatic",
        private: bool = False,
    ) -> Self:
        """``tracker`` is ``automatic``, ``kernel``, ``explicit``, ``write-protect`` or
        ``write-protect-async``; what this kernel or backing has not got is ``NotSupported``.
        ``private`` says that no file is behind the memory."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...
    @property
    def granularity(self) -> str:
        """``byte``, ``cacheline`` or ``page``: what a store needs to be durable."""

    @property
    def read_only(self) -> bool:
        """True when it refuses every store."""

    @property
    def closed(self) -> bool: ...
    @property
    def unit(self) -> int:
        """Bytes of its pages."""

    @property
    def tracker(self) -> str:
        """Who knows what is dirty: ``fence`` (nobody needs to), ``kernel``, ``explicit``,
        ``write-protect-async`` or ``write-protect``."""

    @property
    def snapshot_sees_stores(self) -> bool:
        """True when a snapshot sees every store; false when only those of these methods."""

    @property
    def view_count(self) -> int:
        """How many views are alive."""

    def read(self, offset: int, length: int) -> bytes:
        """A copy of a range. A fault is an error here, while in a view it ends the process."""

    def write(self, offset: int, data: Buffer) -> None:
        """Stores through the cache: visible at return, durable after :meth:`persist` or
        :meth:`sync`, on whichever thread."""

    def copy_persist(self, offset: int, data: Buffer) -> None:
        """Stores, around the cache where that is faster; durable at return."""

    def set_persist(self, offset: int, length: int, value: int) -> None:
        """Fills a range with a byte; durable at return."""

    def flush(self, offset: int, length: int) -> None:
        """Begins to write a range back; durable after :meth:`drain` on the same thread. Of
        granularity ``page`` it is durable at return."""

    def drain(self) -> None:
        """Waits for what this thread flushed."""

    def persist(self, offset: int, length: int) -> None:
        """Makes a range durable: :meth:`flush` and :meth:`drain`."""

    def mark_dirty(self, offset: int, length: int) -> None:
        """Counts a range as dirty for the next :meth:`sync`."""

    def sync(self) -> int:
        """Makes everything durable that was stored before; gives the bytes that were to be written
        back for that. With the tracker ``kernel`` this is the whole length, of which the kernel
        writes what is dirty."""

    def kernel_sync(self, offset: int, length: int) -> None:
        """Has the file system make a range durable, whatever the granularity."""

    def snapshot_into(self, target: Medium) -> None:
        """Copies the mapping, as it is at one moment of this call, into a medium of zeroes."""

    def advise_huge(self, wanted: bool) -> None:
        """Says whether huge pages are wanted; ``NotSupported`` where there are none to be had."""

    def close(self) -> None:
        """Lets the medium go; ``Busy`` while there are views or a snapshot is being made."""

@final
class View:
    """A range of a mapping as a buffer: what a ``memoryview`` is made of."""

    def __new__(
        cls, mapping: Mapping, offset: int, length: int, *, read_only: bool = False
    ) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...

@final
class Log:
    """A redo log in an area of a mapping. Opening it carries out what a crash left undone."""

    def __new__(cls, mapping: Mapping, offset: int, length: int, *, create: bool = False) -> Self:
        """An area whose first word is zero is laid out; anything else that is no log is
        ``Corrupt``, unless ``create`` lays it out anew."""

    @property
    def recovered(self) -> int:
        """How many ranges were stored again when it was opened."""

    @property
    def capacity(self) -> int:
        """Bytes that the changes of one transaction may have, 16 of them a range."""

    def commit(self, changes: Sequence[tuple[int, bytes]]) -> None:
        """Changes ranges, all or none of them; durable at return."""
