"""Namespaces of mode sector in memory, and the writes of a driver that a test can stop anywhere."""

from dataclasses import replace
from uuid import UUID

from pmemkit._native import media
from pmemkit.formats import btt
from pmemkit.formats.layout import Clear

MIB = 1 << 20
PARENT = UUID("11111111-2222-3333-4444-555555555555")
OWN = UUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")


class Image:
    """A fresh BTT on a medium. ``version`` as the label would demand."""

    def __init__(self, size=17 * MIB, sector_size=4096, version="2.0", medium=None):
        self.size, self.sector_size, self.version = size, sector_size, version
        self.medium = media.map_anonymous(size) if medium is None else medium
        steps = btt.fresh_layout(size, sector_size, version=version, uuid=OWN, parent_uuid=PARENT)
        for group in steps:
            for each in group:
                if not isinstance(each, Clear):
                    self.medium.write(*each)
        self.arenas = btt.arenas(size, sector_size, version)

    @property
    def arena(self) -> btt.Arena:
        return self.arenas[0]

    def info(self, arena=0) -> btt.BttInfo:
        start = self.arenas[arena].start
        return btt.BttInfo.unpack(self.medium.read(start, btt.INFO_SIZE))

    def set_info(self, arena=0, *, copy=True, **changes) -> None:
        """Changes fields of an info block, with a checksum that fits."""
        block = replace(self.info(arena), **changes).sealed()
        start = self.arenas[arena].start
        self.medium.write(start, block)
        if copy:
            self.medium.write(start + self.arenas[arena].info2off, block)

    def entry(self, lba, arena=0) -> int:
        here = self.arenas[arena]
        raw = self.medium.read(here.start + here.mapoff + 4 * lba, 4)
        return int.from_bytes(raw, "little")

    def set_entry(self, lba, value, arena=0) -> None:
        here = self.arenas[arena]
        self.medium.write(here.start + here.mapoff + 4 * lba, value.to_bytes(4, "little"))

    def group_at(self, lane, arena=0) -> int:
        here = self.arenas[arena]
        return here.start + here.logoff + lane * btt.LOG_GROUP_SIZE

    def group(self, lane, arena=0) -> tuple[btt.LogEntry, ...]:
        raw = self.medium.read(self.group_at(lane, arena), btt.LOG_GROUP_SIZE)
        return tuple(btt.LogEntry.unpack(raw[at : at + 16]) for at in range(0, 64, 16))

    def set_log(self, lane, place, entry, arena=0) -> None:
        self.medium.write(self.group_at(lane, arena) + 16 * place, entry.pack())

    def write(self, lane, lba, data, *, pair=(0, 1), steps=3, arena=0) -> None:
        """One write of a driver: data, log, map; ``steps`` of the three are done."""
        here = self.arenas[arena]
        group = self.group(lane, arena)
        found = btt.lane_of(lane, group, pair)
        assert isinstance(found, btt.Lane)
        new = found.free_block
        old = self.entry(lba, arena)
        old = old & btt.MAP_MASK if old & btt.NORMAL else lba
        if steps >= 1:
            at = here.start + here.dataoff + new * here.internal_lbasize
            self.medium.write(at, data)
        if steps >= 2:
            seq = {1: 2, 2: 3, 3: 1}[found.entry.seq]
            entry = btt.LogEntry(lba=lba, old_map=old, new_map=new, seq=seq)
            self.set_log(lane, found.other, entry, arena)
        if steps >= 3:
            self.set_entry(lba, new | btt.NORMAL, arena)

    def whole(self) -> bytes:
        return self.medium.read(0, self.size)
