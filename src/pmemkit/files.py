"""What the standard library has no words for about files.

What this does not do: decide when names must be durable; whoever makes or replaces them does.
"""

import os
from contextlib import suppress

__all__ = ["sync_directory"]


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Makes the names in a directory durable. Raises :class:`OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(InterruptedError):
            os.fsync(fd)
    finally:
        os.close(fd)
