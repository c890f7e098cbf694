"""A slow, obvious, read-only reader of mode sector: what the kernel would read after a restart.

It is the reference that a faster engine is compared with, so each step is the plain one:

1. every arena's info block is checked; all of them, or the reader is not made;
2. each lane's newest log entry is found; an exchange that the map does not show yet is put into
   :attr:`Arena.finished`, which goes before the map: that is the kernel's recovery, in memory only;
3. a sector's map entry says where its block is, that it reads as zeroes, or that it is in error.

Invariants:
1. Nothing is ever written.
2. A map entry, block number or offset that does not fit is an error that names it.
3. An entry that was never written reads what the media hold in the block of its own number, as in
   Linux (docs/decisions/0006).

What this does not do: cache. The map is read again for each sector: a reader beside a writer sees
no stale entry, but may see a block that was given to somebody else meanwhile.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import UUID

from pmemkit.bus.image import Reader
from pmemkit.errors import Corrupt, MediaError, OutOfRange
from pmemkit.formats import btt
from pmemkit.formats.layout import require

__all__ = ["Arena", "BttReader", "open_arenas", "read_arenas", "read_infos"]


@dataclass(slots=True)
class Arena:
    """One arena; ``start`` in bytes from the namespace, ``first_lba`` in sectors from its start."""

    start: int
    first_lba: int
    info: btt.BttInfo
    lanes: list[btt.Lane]
    pair: tuple[int, int]
    finished: dict[int, int] = field(default_factory=dict)
    """Sectors whose last write is in the log and not in the map: sector and its block."""


def read_infos(
    read: Reader,
    size: int,
    *,
    version: tuple[int, int] | None,
    parent_uuid: UUID,
    backup: bool = False,
) -> list[tuple[int, btt.BttInfo]]:
    """Where each arena of a namespace begins, and its info block; with ``backup`` the copy of a
    block that is bad. Raises :class:`Corrupt`."""
    wanted: btt.Version = "1.1" if version == (1, 1) else "2.0"
    if not backup:
        found = btt.probe(read, size=size, version=wanted, parent=parent_uuid)
        if found.verdict != "valid":
            require(list(found.faults))
            raise Corrupt(f"there is no BTT of version {wanted}", op="open")
    infos: list[tuple[int, btt.BttInfo]] = []
    start = btt.INITIAL_OFFSET[wanted]
    while True:
        where: Any = {"start": start, "size": size, "version": wanted, "parent": parent_uuid}
        info = btt.good_info(read, start, **where)
        if info is None and (copy := btt.find_copy(read, **where)) is not None:
            info = copy[1]
        if info is None:
            text = f"neither the info block at {start} nor a copy of it can be used"
            raise Corrupt(text, op="open", offset=start)
        infos.append((start, info))
        if not info.nextoff:
            return infos
        start += info.nextoff


def read_arenas(
    read: Reader, size: int, *, version: tuple[int, int] | None, parent_uuid: UUID
) -> list[Arena]:
    """Opens every arena of a namespace of ``size`` bytes. Raises :class:`Corrupt`."""
    return open_arenas(read, read_infos(read, size, version=version, parent_uuid=parent_uuid))


def open_arenas(read: Reader, infos: Iterable[tuple[int, btt.BttInfo]]) -> list[Arena]:
    """The same, of arenas whose places and info blocks are known."""
    arenas: list[Arena] = []
    first_lba = 0
    for start, info in infos:
        lanes, pair = _read_log(read, start, info)
        arena = Arena(start, first_lba, info, lanes, pair)
        _recover(read, arena)
        arenas.append(arena)
        first_lba += info.external_nlba
    return arenas


def _read_log(
    read: Reader, start: int, info: btt.BttInfo
) -> tuple[list[btt.Lane], tuple[int, int]]:
    log = read(start + info.logoff, info.nfree * btt.LOG_GROUP_SIZE)
    groups = btt.log_groups(log)
    pair, faults = btt.log_pair(groups)
    require(faults)
    lanes = []
    for number, group in enumerate(groups):
        lane = btt.lane_of(number, group, pair)
        if not isinstance(lane, btt.Lane):
            raise Corrupt(str(lane), op="open", offset=start + info.logoff + lane.offset)
        _check_entry(lane, info)
        lanes.append(lane)
    return lanes, pair


def _check_entry(lane: btt.Lane, info: btt.BttInfo) -> None:
    limits = (
        ("lba", lane.entry.lba, info.external_nlba),
        ("old_map", lane.entry.old_map & btt.MAP_MASK, info.internal_nlba),
        ("new_map", lane.entry.new_map & btt.MAP_MASK, info.internal_nlba),
    )
    for name, value, limit in limits:
        if value >= limit:
            text = f"BTT log: {name} of lane {lane.number} is {value}, there are {limit}"
            raise Corrupt(text, op="open")


def _recover(read: Reader, arena: Arena) -> None:
    found = btt.follow_log(arena.lanes, lambda lba: _map_entry(read, arena, lba))
    for lba, lanes in found.items():
        arena.finished[lba] = lanes[-1].entry.new_map & btt.MAP_MASK


def _map_entry(read: Reader, arena: Arena, lba: int) -> int:
    raw = read(arena.start + arena.info.mapoff + 4 * lba, 4)
    return int.from_bytes(raw, "little")


class BttReader:
    """The sectors of a namespace of mode sector, read-only.

    ``read`` gives the bytes of the namespace, ``size`` of them. Raises :class:`Corrupt` where it
    cannot be opened.
    """

    def __init__(
        self, read: Reader, size: int, *, version: tuple[int, int] | None, parent_uuid: UUID
    ) -> None:
        self._take(read, read_arenas(read, size, version=version, parent_uuid=parent_uuid))

    @classmethod
    def of_infos(cls, read: Reader, infos: Iterable[tuple[int, btt.BttInfo]]) -> Self:
        """A reader of arenas whose places and info blocks are known."""
        reader = cls.__new__(cls)
        reader._take(read, open_arenas(read, infos))
        return reader

    def _take(self, read: Reader, arenas: list[Arena]) -> None:
        self._read = read
        self.arenas = arenas
        lbasize = self.arenas[0].info.external_lbasize
        self.sector_size = 4096 if lbasize >= 4096 else 512
        """Bytes of a sector's data. Metadata of sector sizes such as 520 stand behind them."""
        self.sector_count = sum(arena.info.external_nlba for arena in self.arenas)

    @property
    def size(self) -> int:
        """Bytes of all sectors."""
        return self.sector_count * self.sector_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes, at any offset and of any length within :attr:`size`.

        Raises :class:`OutOfRange`; :class:`MediaError` for a sector in the error state;
        :class:`Corrupt` for a map entry that points nowhere.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            text = f"{length} bytes do not fit: the end is at byte {self.size}"
            raise OutOfRange(text, op="read", offset=offset)
        if not length:
            return b""
        first, last = offset // self.sector_size, (offset + length - 1) // self.sector_size
        sectors = b"".join(self.read_sector(lba) for lba in range(first, last + 1))
        start = offset - first * self.sector_size
        return sectors[start : start + length]

    def read_sector(self, lba: int) -> bytes:
        """One sector."""
        arena = next(each for each in reversed(self.arenas) if each.first_lba <= lba)
        number = lba - arena.first_lba
        entry = _map_entry(self._read, arena, number)
        state, block = entry & btt.NORMAL, entry & btt.MAP_MASK
        if number in arena.finished:
            block = arena.finished[number]
        elif state == btt.ERROR:
            raise MediaError(f"sector {lba} is in error", op="read", offset=lba * self.sector_size)
        elif state == btt.ZERO:
            return bytes(self.sector_size)
        elif state == 0:
            block = number
        if block >= arena.info.internal_nlba:
            text = f"the map sends sector {lba} to block {block} of {arena.info.internal_nlba}"
            raise Corrupt(text, op="read", offset=lba * self.sector_size)
        start = arena.start + arena.info.dataoff + block * arena.info.internal_lbasize
        return self._read(start, self.sector_size)
