"""How much of the life of media is used, from what was written to them.

Media are rated for writes of each cell, or for bytes in their life (vendors: TBW); one is the other
times the capacity. "Used" is what NVMe and ndctl call the percentage used: what was written over
what the media are rated for, so it may pass 100. What was written is counted in lines of 64 bytes,
because media write no less.

What this does not do: know what the media add by themselves (their own write amplification, lines
of 256 bytes), or what was written by programs that do not count.
"""

from dataclasses import dataclass
from fractions import Fraction

from pmemkit.errors import InvalidArgument
from pmemkit.media.wear import LINE_SIZE, Ledger

__all__ = ["Rating", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Rating:
    """What media are rated for: writes of every byte of them."""

    writes: Fraction

    @classmethod
    def of(cls, *, writes: int | None, lifetime_bytes: int | None, size: int) -> "Rating | None":
        """The rating of media of ``size`` bytes; ``None`` where none is given."""
        for value in (writes, lifetime_bytes):
            if value is not None and value <= 0:
                raise InvalidArgument(f"a rating of {value}", op="wear")
        if writes is not None and lifetime_bytes is not None:
            raise InvalidArgument("a rating is in writes or in bytes, not both", op="wear")
        if writes is not None:
            return cls(Fraction(writes))
        if lifetime_bytes is None or size == 0:
            return None
        return cls(Fraction(lifetime_bytes, size))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How worn media are. Shares of the life: 1.0 is what they are rated for."""

    used: float
    """If wear were spread evenly."""
    used_hottest: float | None
    """Of the block that was written most; ``None`` where blocks were not counted."""
    seconds_left: float | None
    """Until the mean reaches the rating, at the rate since counting began; ``None`` where that is
    not known, negative when it is past."""
    seconds_left_hottest: float | None
    """The same for the block that was written most."""


def judge(ledger: Ledger, rating: Rating) -> Verdict:
    """What a ledger means for media of a rating."""
    seconds = ledger.updated - ledger.since
    used = float(ledger.lines * LINE_SIZE / (rating.writes * ledger.size)) if ledger.size else 0.0
    hottest = None
    if ledger.block_size and ledger.blocks:
        hottest = float(max(ledger.blocks) * LINE_SIZE / (rating.writes * ledger.block_size))

    def left(share: float | None) -> float | None:
        return (1 - share) * seconds / share if share and seconds > 0 else None

    return Verdict(used, hottest, left(used), left(hottest))
