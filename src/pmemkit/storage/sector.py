"""A namespace of mode sector, opened: its info blocks are judged here, the engine does the rest.

Invariants:
1. A namespace whose first info block is bad is not opened, and never laid out anew as Linux does:
   the error says what is wrong and what repairs it.
2. Of several arenas all are opened or none.

What this does not do: repair (:mod:`pmemkit.namespace.check_btt`), or read and write sectors (the
core does).
"""

from typing import TYPE_CHECKING, Literal
from uuid import UUID

from pmemkit.errors import Corrupt
from pmemkit.formats import btt
from pmemkit.storage.btt_reader import read_infos

if TYPE_CHECKING:
    from pmemkit._native.btt import Engine
    from pmemkit._native.media import Medium

__all__ = ["ORDERINGS", "Ordering", "open_sectors"]

Ordering = Literal["default", "strict"]
ORDERINGS: tuple[Ordering, ...] = ("default", "strict")
"""On media of granularity ``page``: ``strict`` pays for ``fdatasync`` at each ordering point, so
that sectors are old or new after a power failure too; the default promises that of a process that
dies, and of a power failure only what a flush made durable. Elsewhere both are the same."""


def open_sectors(
    medium: "Medium",
    *,
    version: tuple[int, int] | None,
    parent_uuid: UUID,
    read_only: bool = False,
    ordering: Ordering = "default",
) -> "Engine":
    """The engine over a medium that is the whole namespace. Raises :class:`Corrupt` where an info
    block or the log cannot be trusted."""
    from pmemkit._native import btt as core

    try:
        infos = read_infos(medium.read, len(medium), version=version, parent_uuid=parent_uuid)
        arenas = [_numbers(start, info) for start, info in infos]
        return core.Engine(medium, arenas, read_only=read_only, strict=ordering == "strict")
    except Corrupt as error:
        error.message += "; pmem check-namespace says more, and repairs it with --repair"
        raise


def _numbers(
    start: int, info: btt.BttInfo
) -> tuple[int, int, int, int, int, int, int, int, int, bool]:
    return (
        start,
        info.external_lbasize,
        info.external_nlba,
        info.internal_lbasize,
        info.internal_nlba,
        info.nfree,
        info.dataoff,
        info.mapoff,
        info.logoff,
        bool(info.flags & 1),
    )
