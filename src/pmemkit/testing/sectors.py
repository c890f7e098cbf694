"""Small arenas of mode sector for tests: the format as it is, with fewer sectors and lanes than
Linux would make, so that a whole one fits into a recording.

What this does not do: make what a kernel would open; :func:`pmemkit.formats.btt.fresh_layout` does.
"""

from dataclasses import dataclass
from uuid import UUID

from pmemkit._native import btt as core
from pmemkit._native import media
from pmemkit.formats.btt import LOG_GROUP_SIZE, SIGNATURE, BttInfo, LogEntry

__all__ = ["SmallArena"]

_LINE = 64


@dataclass(frozen=True)
class SmallArena:
    """The geometry of an arena at byte 0 of a medium."""

    sector_size: int = 512
    """With metadata: one of :data:`pmemkit.formats.btt.SECTOR_SIZES`."""
    sectors: int = 64
    lanes: int = 4

    @property
    def block_size(self) -> int:
        """Bytes of a block (internal_lbasize)."""
        return -(-self.sector_size // _LINE) * _LINE

    @property
    def mapoff(self) -> int:
        """Where the map begins."""
        return _LINE + (self.sectors + self.lanes) * self.block_size

    @property
    def logoff(self) -> int:
        """Where the log begins."""
        return self.mapoff + -(-4 * self.sectors // _LINE) * _LINE

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.logoff + self.lanes * LOG_GROUP_SIZE

    def fresh(self) -> bytes:
        """An arena that was never written."""
        groups = []
        for lane in range(self.lanes):
            block = self.sectors + lane
            entry = LogEntry(lba=lane % self.sectors, old_map=block, new_map=block, seq=1)
            groups.append(entry.pack().ljust(LOG_GROUP_SIZE, b"\0"))
        return bytes(self.logoff) + b"".join(groups)

    def info(self) -> BttInfo:
        """The numbers, as an info block would have them; there is none on the medium."""
        nobody = UUID(int=0)
        return BttInfo(
            signature=SIGNATURE,
            uuid=nobody,
            parent_uuid=nobody,
            major=2,
            minor=0,
            external_lbasize=self.sector_size,
            external_nlba=self.sectors,
            internal_lbasize=self.block_size,
            internal_nlba=self.sectors + self.lanes,
            nfree=self.lanes,
            nextoff=0,
            dataoff=_LINE,
            mapoff=self.mapoff,
            logoff=self.logoff,
            info2off=self.size,
            padding=b"",
            checksum=0,
        )

    def open(
        self, medium: media.Medium, *, read_only: bool = False, strict: bool = False
    ) -> core.Engine:
        """The engine over a medium that holds it."""
        numbers = (
            *(0, self.sector_size, self.sectors, self.block_size),
            *(self.sectors + self.lanes, self.lanes, _LINE, self.mapoff, self.logoff, False),
        )
        return core.Engine(medium, [numbers], read_only=read_only, strict=strict)
