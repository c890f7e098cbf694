"""A slow, obvious engine of mode sector: what the one in Rust is compared with.

It writes one sector at a time, one store after the other, in the order that the format demands:

1. data, and zeroes for metadata, into the free block of a lane;
2. the first half of the lane's older log entry: which sector, and the block it leaves;
3. the second half: its new block, and the sequence number. The write is done;
4. the map entry. The block that was left is the lane's.

Invariants:
1. Cut between any two stores, every sector is old or new: recovery finishes what step 3 began.
2. A sector in error is healed by a write; the block it leaves is zeroed before its next use.
3. A sector is zeroed in the map alone where it fills a page, and written otherwise.

What this does not do: threads, flushes, batches; arenas whose error flag is set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pmemkit.bus.image import Reader
from pmemkit.errors import Corrupt
from pmemkit.formats import btt
from pmemkit.storage.btt_reader import Arena, BttReader

__all__ = ["ReferenceSectors"]

_PAGE = 4096
_NEXT = {1: 2, 2: 3, 3: 1}


@dataclass(slots=True)
class _Lane:
    """A lane between two writes."""

    number: int
    free: int
    bad: bool
    """The free block has bad media."""
    place: int
    """Of the four entries of its group, the one that the next write goes to."""
    other: int
    seq: int


class ReferenceSectors:
    """The sectors of arenas whose places and info blocks are known.

    ``read`` gives bytes of the medium and ``store`` puts some there. Opening it recovers. Raises
    :class:`Corrupt` for a log that cannot be trusted.
    """

    def __init__(
        self,
        read: Reader,
        store: Callable[[int, bytes], None],
        infos: Iterable[tuple[int, btt.BttInfo]],
    ) -> None:
        self._read, self._store = read, store
        self._reader = BttReader.of_infos(read, infos)
        self.sector_size = self._reader.sector_size
        self._lanes = [_lanes_of(arena) for arena in self._reader.arenas]
        for arena in self._reader.arenas:
            for lba, block in arena.finished.items():
                self._store_entry(arena, lba, btt.NORMAL | block)
            arena.finished.clear()

    @property
    def size(self) -> int:
        """Bytes of all sectors."""
        return self._reader.size

    def read(self, offset: int, length: int) -> bytes:
        """Any bytes. Raises what :meth:`BttReader.read` does."""
        return self._reader.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Whole sectors, one after the other."""
        for at in range(0, len(data), self.sector_size):
            sector = (offset + at) // self.sector_size
            self.write_sector(sector, data[at : at + self.sector_size])

    def zero(self, offset: int, length: int) -> None:
        """Makes whole sectors read as zeroes."""
        for at in range(offset, offset + length, self.sector_size):
            self.zero_sector(at // self.sector_size)

    def write_sector(self, sector: int, data: bytes) -> None:
        """One sector, durable when this returns."""
        number, arena, lba = self._locate(sector)
        state, old = self._entry(arena, lba)
        lane = self._lanes[number].pop(0)
        self._lanes[number].append(lane)
        self._fill(arena, lane, data)
        entry = btt.LogEntry(
            lba=lba,
            old_map=old | (btt.ERROR if state == btt.ERROR else 0),
            new_map=lane.free,
            seq=lane.seq,
        )
        at = arena.start + arena.info.logoff + lane.number * btt.LOG_GROUP_SIZE + 16 * lane.place
        for half in (slice(0, 8), slice(8, 16)):
            self._store(at + half.start, entry.pack()[half])
        self._store_entry(arena, lba, btt.NORMAL | lane.free)
        lane.free, lane.bad = old, state == btt.ERROR
        lane.place, lane.other, lane.seq = lane.other, lane.place, _NEXT[lane.seq]

    def zero_sector(self, sector: int) -> None:
        """One sector, with its block left where it is, or written."""
        _, arena, lba = self._locate(sector)
        state, block = self._entry(arena, lba)
        if self.sector_size < _PAGE or state == btt.ERROR:
            self.write_sector(sector, bytes(self.sector_size))
        else:
            self._store_entry(arena, lba, btt.ZERO | block)

    def validate(self) -> list[str]:
        """Each block belongs to one sector or to one lane; what is wrong, in sentences."""
        wrong = []
        for arena, lanes in zip(self._reader.arenas, self._lanes, strict=True):
            owners = Counter(lane.free for lane in lanes)
            owners.update(self._owned(arena, lba) for lba in range(arena.info.external_nlba))
            for block in range(arena.info.internal_nlba):
                if owners.pop(block, 0) != 1:
                    wrong.append(f"block {block} has not one owner")
            wrong += [f"there is no block {block}" for block in owners]
        return wrong

    # --- one arena --------------------------------------------------------------------------------

    def _locate(self, sector: int) -> tuple[int, Arena, int]:
        found = [
            (number, arena, sector - arena.first_lba)
            for number, arena in enumerate(self._reader.arenas)
            if arena.first_lba <= sector
        ]
        return found[-1]

    def _owned(self, arena: Arena, lba: int) -> int:
        """The block that a sector's map entry names."""
        raw = self._read(arena.start + arena.info.mapoff + 4 * lba, 4)
        entry = int.from_bytes(raw, "little")
        return entry & btt.MAP_MASK if entry & btt.NORMAL else lba

    def _entry(self, arena: Arena, lba: int) -> tuple[int, int]:
        """State and block of a sector. Raises :class:`Corrupt` for a block that is not there."""
        raw = self._read(arena.start + arena.info.mapoff + 4 * lba, 4)
        block = self._owned(arena, lba)
        if block >= arena.info.internal_nlba:
            raise Corrupt(f"the map sends sector {lba} to block {block}", op="write")
        return int.from_bytes(raw, "little") & btt.NORMAL, block

    def _store_entry(self, arena: Arena, lba: int, entry: int) -> None:
        at = arena.start + arena.info.mapoff + 4 * lba
        self._store(at, entry.to_bytes(4, "little"))

    def _fill(self, arena: Arena, lane: _Lane, data: bytes) -> None:
        info = arena.info
        at = arena.start + info.dataoff + lane.free * info.internal_lbasize
        if lane.bad:
            self._store(at, bytes(info.internal_lbasize))
        self._store(at, data.ljust(info.external_lbasize, b"\0"))


def _lanes_of(arena: Arena) -> list[_Lane]:
    """The lanes as the log leaves them. Two with one free block would give it to two sectors."""
    lanes = [
        _Lane(
            lane.number,
            lane.free_block,
            lane.entry.old_map & btt.NORMAL == btt.ERROR,
            lane.other,
            lane.slot,
            _NEXT[lane.entry.seq],
        )
        for lane in arena.lanes
    ]
    for block, count in Counter(lane.free for lane in lanes).items():
        if count > 1:
            raise Corrupt(f"block {block} is the free block of {count} lanes", op="open")
    return lanes
