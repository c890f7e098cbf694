"""The block translation table: what runs per sector."""

from collections.abc import Sequence
from typing import final

from .block import Device
from .media import Medium

@final
class Engine:
    """The arenas of a namespace of mode ``sector``: opening it does what recovery has to do.

    Each arena is ``(start, external_lbasize, external_nlba, internal_lbasize, internal_nlba, nfree,
    dataoff, mapoff, logoff, in_error)``: the info block's numbers, offsets in bytes from ``start``,
    which counts from the medium. A sector is old or new after a power failure. A write is durable
    when it returns; on media of granularity ``page`` only with ``strict``, which pays for a sync at
    each ordering point. Raises ``Corrupt`` for a log that cannot be trusted.

    ``levelling`` is ``(victim, period, seed)``: now and then, at most once in ``period`` writes of a
    lane, the content of a sector goes to a worn block, and its fresh one to those that are written.
    ``victim`` is ``random`` or ``least-worn``, which counts the writes of each block in 4 bytes.
    """

    def __new__(
        cls,
        medium: Medium,
        arenas: Sequence[tuple[int, int, int, int, int, int, int, int, int, bool]],
        *,
        read_only: bool = False,
        strict: bool = False,
        levelling: tuple[str, int, int] | None = None,
    ) -> Engine: ...
    def device(self) -> Device:
        """The sectors as a block device."""

    def relocations(self) -> int:
        """Sectors that levelling has moved since this was opened."""

    def validate(self) -> list[str]:
        """Walks every arena: each block must belong to one sector or one lane. What is wrong, in
        sentences. Writes wait meanwhile."""

@final
class MapScan:
    """A scan of the map of an arena: each block belongs to one sector or to one lane.

    ``blocks`` is internal_nlba; ``finished`` are ``(sector, block)`` of writes that are in the log
    and not in the map (none by default). Memory is one bit a block.
    """

    def __new__(cls, blocks: int, finished: Sequence[tuple[int, int]] = ...) -> MapScan: ...
    def feed(self, medium: Medium, offset: int, first: int, count: int) -> None:
        """Scans ``count`` entries at ``offset`` of the medium; the first is that of sector
        ``first``."""

    def claim(self, block: int) -> bool:
        """Takes a block for a lane; False where it had an owner, or there is no such block."""

    def findings(self) -> list[tuple[str, int, int]]:
        """``(wrong, sector, block)`` of the first wrong entries; ``wrong`` is ``duplicate`` (an
        earlier sector has the block) or ``out_of_range``."""

    def counts(self) -> dict[str, int]:
        """Entries by state (``initial``, ``error``, ``zero``, ``normal``) and wrong ones
        (``duplicate``, ``out_of_range``)."""

    def unclaimed(self, limit: int) -> tuple[int, list[int]]:
        """How many blocks have no owner, and the first ``limit`` of them."""
