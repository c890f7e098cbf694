"""A namespace of mode sector, opened: its info blocks are judged here, the engine does the rest.

Invariants:
1. A namespace whose first info block is bad is not opened, and never laid out anew as Linux does:
   the error says what is wrong and what repairs it.
2. Of several arenas all are opened or none.
3. From the copy of an info block nothing is opened for writing: what is read there was not checked.
4. An arena whose info block carries the error flag is not written, recovery included.

What this does not do: repair (:mod:`pmemkit.namespace.check_btt`), or read and write sectors (the
core does).
"""

import secrets
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID

from pmemkit.errors import Corrupt, InvalidArgument, MediaError
from pmemkit.formats import btt
from pmemkit.storage.btt_reader import read_infos
from pmemkit.storage.levelling import LEVELLING_PERIOD, Levelling

if TYPE_CHECKING:
    from pmemkit._native.block import Device
    from pmemkit._native.btt import Engine
    from pmemkit._native.media import Medium

__all__ = ["ORDERINGS", "Ordering", "Sectors", "open_sectors"]

Ordering = Literal["default", "strict"]
ORDERINGS: tuple[Ordering, ...] = ("default", "strict")
"""On media of granularity ``page``: ``strict`` pays for ``fdatasync`` at each ordering point, so
that sectors are old or new after a power failure too; the default promises that of a process that
dies, and of a power failure only what a flush made durable. Elsewhere both are the same."""


class Sectors(NamedTuple):
    """A namespace of mode sector, opened."""

    engine: "Engine"
    read_only_because: str | None
    """Why arenas of it are not written although nobody asked for that."""

    def device(self) -> "Device":
        """The sectors as a block device."""
        return self.engine.device()

    def relocations(self) -> int:
        """Sectors that levelling has moved."""
        return self.engine.relocations()

    def validate(self) -> list[str]:
        """Walks every arena; what is wrong, in sentences."""
        return self.engine.validate()


def open_sectors(
    medium: "Medium",
    *,
    version: tuple[int, int] | None,
    parent_uuid: UUID,
    read_only: bool = False,
    ordering: Ordering = "default",
    levelling: Levelling = "off",
    levelling_period: int = LEVELLING_PERIOD,
    backup_info_block: bool = False,
) -> Sectors:
    """The engine over a medium that is the whole namespace. Raises :class:`Corrupt` where an info
    block or the log cannot be trusted; ``backup_info_block`` takes the copy of a bad info block,
    for reading only."""
    from pmemkit._native import btt as core

    if backup_info_block and not read_only:
        raise InvalidArgument("the copy of an info block is for reading only", op="open")
    try:
        infos = read_infos(
            medium.read,
            len(medium),
            version=version,
            parent_uuid=parent_uuid,
            backup=backup_info_block,
        )
        arenas = [_numbers(start, info) for start, info in infos]
        flagged = [number for number, (_, info) in enumerate(infos) if info.flags & 1]
        read_only = read_only or len(flagged) == len(infos)
        # Another seed each time: who opens it often does not begin with the same blocks.
        level = (levelling, levelling_period, secrets.randbits(64)) if levelling != "off" else None
        engine = core.Engine(
            medium, arenas, read_only=read_only, strict=ordering == "strict", levelling=level
        )
        return Sectors(engine, _because(flagged))
    except (Corrupt, MediaError) as error:
        error.message += "; pmem check-namespace says more, and repairs it with --repair"
        raise


def _because(flagged: list[int]) -> str | None:
    if not flagged:
        return None
    numbers = ", ".join(map(str, flagged))
    who = f"arena {numbers} carries" if len(flagged) == 1 else f"arenas {numbers} carry"
    return f"{who} the error flag: a write failed there"


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
