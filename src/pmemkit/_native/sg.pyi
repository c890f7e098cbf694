"""Scatter-gather: the regions of this process by number, and copies between lists of segments."""

from collections.abc import Sequence

from typing_extensions import Buffer

from .media import Medium

def add(medium: Medium, *, read: bool = True, write: bool = True) -> int:
    """Makes a medium known and gives its number. One that is known stays as it is."""

def remove(region: int) -> bool:
    """Forgets a region. Returns when no copy touches it any more; false where it was not known."""

def copy(
    sources: Sequence[tuple[int | Buffer, int, int]],
    targets: Sequence[tuple[int | Buffer, int, int]],
    *,
    durable: bool = False,
) -> int:
    """Copies ``(region or buffer, offset, length)`` to others of the same length in sum; gives the
    bytes copied. An error's ``moved`` says how many were; ``None`` where nothing was begun."""
