"""One writer an image: an advisory lock on the open file.

Two writers of one image destroy it: each would take what the other wrote for free space. So a file
opened for writing is locked exclusively and one opened for reading is locked shared; what conflicts
is :class:`Busy`, which names the holder where ``/proc/locks`` does. The lock is ``flock``'s: it is
held by the open file and goes with its last descriptor, so it outlives neither a killed process nor
the mapping it protects.

What this does not do: keep out programs that do not ask (QEMU, ``dd``, the kernel's loop driver).
"""

import errno
import fcntl
import os
from pathlib import Path

from pmemkit.errors import Busy

__all__ = ["holder_of", "lock"]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def lock(fd: int, path: str, *, exclusive: bool) -> bool:
    """Locks an open file until its last descriptor is closed.

    False where the file system has no locks. Raises :class:`Busy` where somebody else holds one.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as cause:
        if cause.errno in _UNSUPPORTED:
            return False
        if cause.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise
        pid = holder_of(fd)
        holder = "another process" if pid is None else f"process {pid}"
        if pid == os.getpid():
            holder = f"this process ({pid})"
        wanted = "writing" if exclusive else "reading beside a writer"
        text = f"{holder} has it open; {wanted} needs locking off"
        raise Busy(text, op="open", path=path) from cause
    return True


def holder_of(fd: int, locks: str = "/proc/locks") -> int | None:
    """The process that locked the file, as the kernel's table has it."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path(locks).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        # A process that waits for the lock has an arrow before the kind.
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == place:
            return int(fields[4]) if int(fields[4]) > 0 else None
    return None
