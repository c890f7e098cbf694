"""A block device as one regular file of a FUSE mount, for the kernel's loop device."""

from os import PathLike
from typing import Self, final

from .block import Channel

@final
class Session:
    """A mounted file. Requests wait until :meth:`serve` runs."""

    def __new__(
        cls,
        channel: Channel,
        directory: str | PathLike[str],
        *,
        name: str,
        source: str,
        threads: int = 4,
    ) -> Self:
        """Mounts a directory with one file, ``name``, over ``directory``. ``source``: what the mount
        table shows. The file is open to every user who can reach it: the directories above it
        decide who that is."""

    def serve(self) -> None:
        """Answers requests until somebody unmounts it, or the kernel aborts the connection. Run it
        in a thread, once: the GIL is released throughout."""

    def wait_unused(self, seconds: float) -> bool:
        """Waits until nobody has the file open, or ``serve`` has ended; ``False`` after so many
        seconds."""

def allocate_without_write_back() -> None:
    """Marks this thread, and those it starts from now on, as ones that the write-back of others
    waits for: memory they ask for is not won by write-back that would wait for them."""
