"""Pools: memory of several regions behind addresses that never change.

Sizes, offsets and addresses are bytes. Every call may be made from any thread; those that may wait
release the GIL. In a forked child of the process that made a pool, what changes the pool is
``NotSupported``. Errors are the classes of :mod:`pmemkit.errors`.
"""

from collections.abc import Callable
from typing import Any, Self, final

from typing_extensions import Buffer as _Buffer

from pmemkit._native.media import Medium

SMALL_MAX: int
"""Objects up to this many bytes lie in slabs."""

SAMPLE_CHUNK: int
"""Bytes of a chunk that is sampled, and what its address is a multiple of."""

def mapping_counts() -> tuple[int, int]:
    """How many mappings this process has, and how many it may have (``vm.max_map_count``)."""

def set_numpy_handler(handler: object | None) -> object:
    """Makes a capsule of :meth:`Pool.numpy_handler` NumPy's allocator in this context (NEP 49);
    ``None`` is NumPy's own. Gives the one that was there before."""

@final
class Buffer(_Buffer):
    """Memory of a pool, given back when the last view of it is gone."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def place(self) -> tuple[int, int] | None:
        """Region and byte of its file, where all of it is one run."""

    @property
    def exports(self) -> int:
        """Views of it that are still held, as far as the buffer protocol knows."""

    def detach(self) -> None:
        """Its memory is not given back when it dies."""

    def __len__(self) -> int: ...

@final
class Pool:
    """Memory of several regions."""

    def __new__(
        cls,
        *,
        block_size: int,
        placement: str = "preferred",
        granule: int = 2097152,
        zeroing: str = "asked",
        limit: int | None = None,
        share_with_children: bool = True,
        chunk: int = 2097152,
        userfault: bool = True,
        report_every: float = 0.1,
    ) -> Self: ...
    def add(
        self,
        fd: int,
        name: str,
        *,
        offset: int,
        length: int,
        rank: int = 0,
        weight: int = 1,
        sealed: bool = False,
        large_pages: bool = True,
        claimed: list[tuple[int, int]] = ...,
        map: tuple[Medium, int] | None = None,
    ) -> int:
        """Adds a range of an open file; the descriptor is duplicated. ``sealed``: its length cannot
        change. ``claimed`` are runs of frames that are fixed extents from the start. ``map`` are
        the bytes of the file that the page map goes to, and where they end in it."""

    def allocate(
        self,
        nbytes: int,
        *,
        region: int | None = None,
        fixed: bool = False,
        zero: bool = False,
        whole: bool = False,
    ) -> Buffer:
        """Memory; ``fixed``: never migrated; ``whole``: one run of frames."""

    def adopt(self, address: int, nbytes: int) -> Buffer:
        """The buffer of an extent that has none: one that was claimed."""

    def remove(
        self,
        region: int,
        *,
        abandoned: list[int] = ...,
        timeout: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, int]:
        """Migrates everything but the abandoned extents out of a region and lets it go, or leaves all as it was.
        ``progress(moved, total)`` returns ``False`` to cancel. The answer has ``bytes``,
        ``extents``, ``elapsed_ns`` and ``hold_ns_peak``."""

    def offline(
        self,
        region: int,
        first: int,
        count: int,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, int]:
        """Migrates everything out of ``count`` blocks; nothing new goes there."""

    def migrate(
        self,
        addresses: list[int],
        region: int,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, int]:
        """Migrates the extents at these addresses into a region."""

    def migrate_ranges(
        self,
        ranges: list[tuple[int, int]],
        region: int,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, int]:
        """Migrates what lies between these addresses into a region, but for what is held."""

    def sample_begin(self, after: int, count: int, heat: str) -> tuple[int, int]:
        """Begins to look at up to ``count`` chunks from an address on: at their ``accesses``, or at
        ``writes`` only. Gives how many they are, and where to go on the next time."""

    def sample_end(self) -> list[tuple[int, int, int, list[tuple[int, int]], bool]]:
        """``(address, frames, frames that were used, [(region, frames)], held)`` of each chunk."""

    def online(self, region: int, first: int, count: int) -> None: ...
    def regions(self) -> list[dict[str, Any]]:
        """``id``, ``name``, ``size``, ``free``, ``unit``, ``window``, ``writers`` (how they are
        caught: ``userfaultfd``, ``userfaultfd-user``, ``signal``), ``rank``, ``weight``,
        ``truncated``, ``blocks`` (state, bytes in use)."""

    def extents(self) -> list[tuple[int, int, list[tuple[int, int, int]], int, bool, bool]]:
        """``(address, length, [(region, first frame, frames)], pins, fixed, slab)``."""

    def stats(self) -> dict[str, int]: ...
    def validate(self) -> list[str]:
        """What is inconsistent; nothing is, unless there is a bug."""

    def owns(self, address: int) -> bool: ...
    def pin(self, address: int) -> None:
        """Keeps the extent that an address lies in at its frames until :meth:`unpin`; waits for a
        migration that works on it."""

    def unpin(self, address: int) -> None: ...
    def enter(self) -> None:
        """Enters the gate: no chunk is held from its writers until :meth:`leave`."""

    def leave(self) -> None: ...
    def forget_children(self) -> None:
        """Says that no forked child uses the memory any more."""

    def numpy_handler(self) -> object:
        """A capsule for :func:`set_numpy_handler`."""
