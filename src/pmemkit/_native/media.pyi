"""Media: mapped bytes with a store, a flush and a fence.

Offsets and lengths are bytes. Every call may be made from any thread and releases the GIL where it
copies more than a page or may wait. Errors are the classes of :mod:`pmemkit.errors`.
"""

from collections.abc import Sequence
from typing import Self, final

from typing_extensions import Buffer

@final
class Port:
    """What the CPU offers and what was chosen from it, once, at the first use.

    ``flush`` is ``clwb``, ``clflushopt``, ``clflush``, ``dc cvap``, ``dc cvac``; ``copy`` is
    ``avx512f``, ``avx2``, ``sse2`` or ``generic``.
    """

    flush: str
    copy: str
    movnt_threshold: int
    cacheline_size: int

def port() -> Port:
    """The CPU port in use, after ``PMEMKIT_NO_CLWB``, ``PMEMKIT_NO_CLFLUSHOPT``,
    ``PMEMKIT_NO_MOVNT``, ``PMEMKIT_MOVNT_THRESHOLD``, ``PMEMKIT_AVX512F=0`` and ``PMEMKIT_AVX=0``
    (libpmem2's ``PMEM_*`` variables, with our prefix)."""

@final
class Medium:
    """Mapped bytes. Made by the functions below; closed when the last user drops it."""

    @property
    def region(self) -> int: ...
    @property
    def granularity(self) -> str:
        """``byte``, ``cacheline`` or ``page``."""

    @property
    def map_unit(self) -> int:
        """Bytes of the pages it is mapped in."""

    @property
    def loads_by_mapping(self) -> bool:
        """True when the kernel may be handed the mapping to send from."""

    @property
    def stores_by_mapping(self) -> bool:
        """True when the kernel may be handed the mapping to receive into."""

    def __len__(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def readinto(self, offset: int, target: Buffer) -> int: ...
    def write(self, offset: int, data: Buffer, how: str = "auto") -> None:
        """Stores bytes; ``how`` is ``auto``, ``cached`` or ``nontemporal``. Visible at return,
        durable after :meth:`persist` or :meth:`sync`."""

    def zero(self, offset: int, length: int) -> None: ...
    def load_u64(self, offset: int) -> int: ...
    def store_u64(self, offset: int, value: int) -> None:
        """One aligned 8-byte store that power failure cannot tear. Not flushed."""

    def flush(self, offset: int, length: int) -> None: ...
    def fence(self) -> None: ...
    def persist(self, offset: int, length: int) -> None: ...
    def sync(self) -> None: ...
    def punch(self, offset: int, length: int) -> bool: ...
    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """``(length, hole)`` runs that add up to exactly ``length``."""

    def resize(self, length: int) -> None: ...
    def stats(self) -> dict[str, int]:
        """``bytes_stored``, ``flushes``, ``fences``, ``syncs`` since the medium was made."""

    def written(self) -> dict[str, tuple[int, int]]:
        """Bytes stored since the medium was made, and the lines of 64 bytes that they touched, by
        cause: ``data``, ``map``, ``log``, ``info``, ``zeroing``, ``write_back``, ``levelling``."""

    def set_counting(self, on: bool) -> None:
        """Counts what is stored, or does not: for whoever measures what counting costs."""

    def count_blocks(self, block_size: int, *, every: int = 1) -> None:
        """From now on counts the lines written to each block of ``block_size`` bytes, a power of
        two, for one in ``every`` stores of a thread, which stands for all. Once for a medium, which
        has at most 2^24 blocks; ``NotSupported`` where nobody counts."""

    def block_counts(self) -> tuple[int, bytes] | None:
        """The size of a block and a little-endian u32 for each, which stays at its end once it is
        there; ``None`` where blocks are not counted."""

def map_file(
    fd: int,
    length: int,
    *,
    offset: int = 0,
    granularity: str,
    map_sync: bool = False,
    read_only: bool = False,
    resizable: bool = True,
) -> Medium:
    """Maps ``length`` bytes of an open file, device DAX, memfd or block device at ``offset``,
    shared. The descriptor is duplicated. With ``map_sync`` the mapping asks for ``MAP_SYNC`` and
    fails with ``NotSupported`` where it is not granted."""

def bad_blocks(
    medium: Medium,
    runs: Sequence[tuple[int, int]],
    *,
    record: int | None = None,
    base: int = 0,
) -> Medium:
    """The same medium with bad media on it: ``(offset, length)`` in sectors of 512 bytes.

    Reading one is :class:`pmemkit.errors.MediaError`; a write that covers it clears it, and one
    that covers a part of it is refused. What was cleared goes to the file behind the descriptor
    ``record``, which is duplicated, as a line of JSON; ``base`` is added to the offset there.
    """

def exchange_cause(cause: str) -> str:
    """What this thread stores has this cause from now on; gives the one before. See
    :func:`pmemkit.media.wear.caused_by`."""

def map_sync_granted(fd: int) -> bool:
    """True when the kernel grants a ``MAP_SYNC`` mapping of this file."""

def map_anonymous(length: int, *, hugetlb: bool = False) -> Medium:
    """Private anonymous memory (``byte``: nothing outlives the process). With ``hugetlb`` from the
    2 MiB pool; ``NoSpace`` where that is empty."""

def memfd(name: str, *, hugetlb: bool = False) -> int:
    """A new memfd, close-on-exec; the caller owns the descriptor."""

@final
class Recording:
    """A medium that records every store, flush, fence and sync, and yields every image that a power
    failure could leave. See :mod:`pmemkit.testing`."""

    def __new__(
        cls, length: int, *, granularity: str = "cacheline", initial: Buffer | None = None
    ) -> Self: ...
    def medium(self) -> Medium: ...
    def event_count(self) -> int: ...
    def events(self) -> list[tuple[str, int, int]]:
        """``(kind, offset, length)``: ``store``, ``store_nt``, ``flush``, ``fence``, ``sync``,
        ``persist``, ``punch``, ``mark`` (its number in ``offset``)."""

    def mark(self, number: int) -> int:
        """Puts a mark into the log and returns its event index."""

    def crash_images(
        self,
        event: int,
        *,
        limit: int = 64,
        seed: int = 0,
        torn_pages: bool = False,
        only: Sequence[tuple[int, int]] | None = None,
    ) -> list[bytes]:
        """Images a power failure right after the first ``event`` events could leave, without
        duplicates: all of them where there are at most ``limit`` choices, otherwise ``limit`` of
        them: the extremes (nothing, everything pending), images one and two units away from those
        for up to three quarters (in seeded order where they do not all fit), and a seeded sample.
        ``only`` limits the choice to lines touching these ``(offset, length)`` ranges; lines
        elsewhere keep their durable state."""

    def crash_count(self, event: int) -> int:
        """How many choices there are at this point, before equal images are merged, saturating at
        2^64 - 1."""

    def durable_image(self, event: int) -> bytes:
        """What is certainly on media after the first ``event`` events."""

    def visible_image(self, event: int) -> bytes:
        """What a reader of the running machine saw after the first ``event`` events."""
