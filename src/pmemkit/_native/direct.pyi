"""Direct I/O between a file and a medium: around the page cache, several pieces in flight."""

from typing import Self, final

from .media import Medium

@final
class Copier:
    """A file, opened for transfers one way: ``in`` (into a medium) or ``out``."""

    def __new__(
        cls,
        fd: int,
        way: str,
        *,
        around: str = "auto",
        depth: int = 8,
        piece: int = 1 << 20,
        ring: bool = True,
    ) -> Self:
        """``around`` the page cache: ``on``, ``off``, or ``auto``, which is on unless it has half of
        a range already. ``depth`` pieces of ``piece`` bytes are in flight, kept there by io_uring,
        or by threads where the kernel does not allow it or ``ring`` is false."""

    def transfer(self, medium: Medium, file_offset: int, offset: int, length: int) -> None:
        """Moves a range; flushed and fenced, not synced. An error's ``moved`` says how far it came."""

    @property
    def engine(self) -> str:
        """``io_uring`` or ``threads``."""

    @property
    def notice(self) -> str | None:
        """Why bytes went through the page cache that were to go around it."""

    def totals(self) -> dict[str, int]:
        """Bytes so far: ``direct`` around the page cache and ``cached`` through it; ``buffered``, of
        those, by way of a buffer."""
