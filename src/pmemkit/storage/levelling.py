"""Wear levelling of mode sector: which ways there are, and how much it may write.

What this does not do: level; the engine does (``rust/pmemkit-core/src/btt/levelling.rs``).
"""

from typing import Literal

from pmemkit.errors import InvalidArgument

__all__ = ["LEVELLINGS", "LEVELLING_PERIOD", "Levelling", "check_levelling"]

Levelling = Literal["off", "random", "least-worn"]
LEVELLINGS: tuple[Levelling, ...] = ("off", "random", "least-worn")
"""Who gives a fresh block for a worn one: any sector, or one whose block was hardly written since
the namespace was opened, which takes 4 bytes of RAM a block."""

LEVELLING_PERIOD = 100
"""Writes for one that levelling adds, at most: the psi of Start-Gap."""


def check_levelling(levelling: str, period: int) -> None:
    """Raises :class:`InvalidArgument` for what the engine would not take."""
    if levelling not in LEVELLINGS:
        raise InvalidArgument(f"levelling {levelling!r} is none of {', '.join(LEVELLINGS)}")
    if not 1 <= period <= 1 << 20:
        raise InvalidArgument(f"a levelling period of {period} writes is not 1 to {1 << 20}")
