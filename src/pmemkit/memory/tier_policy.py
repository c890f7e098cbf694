"""Which chunks are to change between a fast and a slow tier, given how hot each is.

What this does not do: measure heat, move anything, know what a region is.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Chunk", "Move", "plan"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of addresses as the policy sees it."""

    address: int
    size: int
    """Bytes in use there."""
    score: float
    """How often it is used, in any unit."""
    fast: bool
    """Where it is."""
    movable: bool = True
    """False for what is pinned, fixed or named: it stays."""

    @property
    def heat(self) -> float:
        """Score a byte."""
        return self.score / self.size


@dataclass(frozen=True, slots=True)
class Move:
    """One chunk to the fast tier, or out of it."""

    address: int
    size: int
    """Bytes."""
    to_fast: bool


def plan(
    chunks: Iterable[Chunk],
    *,
    free_fast: int,
    free_slow: int,
    budget: int,
    hysteresis: float = 0.5,
) -> list[Move]:
    """Moves to carry out in order, of at most ``budget`` bytes in both directions together.

    The hottest chunks of the slow tier go up, into free room first. Colder ones go down for them,
    only where each is colder by the share ``hysteresis``, so that equals do not change places. No
    move is planned that does not have its room when its turn comes, and nothing goes down unless
    the chunk that it makes room for goes up.
    """
    known = [each for each in chunks if each.movable and each.size > 0]
    slow = [each for each in known if not each.fast and each.score > 0]
    fast = [each for each in known if each.fast]
    # Chunks are much of a size: no more of them than this can move for the budget.
    most = 1 + budget // max(1, min((each.size for each in known), default=1))
    rising = heapq.nsmallest(most, slow, key=lambda each: (-each.heat, each.address))
    falling = heapq.nsmallest(most, fast, key=lambda each: (each.heat, each.address))
    moves: list[Move] = []
    for hot in rising:
        victims = _room_for(hot, falling, free_fast, hysteresis)
        if victims is None:
            continue
        out = sum(each.size for each in victims)
        if out > free_slow or out + hot.size > budget:
            continue
        moves += [Move(each.address, each.size, to_fast=False) for each in victims]
        moves.append(Move(hot.address, hot.size, to_fast=True))
        del falling[: len(victims)]
        free_fast += out - hot.size
        free_slow += hot.size - out
        budget -= out + hot.size
    return moves


def _room_for(hot: Chunk, falling: list[Chunk], free: int, hysteresis: float) -> list[Chunk] | None:
    """The coldest chunks that make room for a hot one; ``None`` where they are not cold enough."""
    victims: list[Chunk] = []
    for each in falling:
        if free >= hot.size:
            break
        if each.heat * (1 + hysteresis) >= hot.heat:
            return None
        victims.append(each)
        free += each.size
    return victims if free >= hot.size else None
