"""One writer a range: advisory locks on the open file.

Two writers of one image destroy it: each would take what the other wrote for free space. So what is
opened for writing is locked exclusively and what is opened for reading is locked shared, the whole
image or the range of one namespace; what conflicts is :class:`Busy`, which names the holder. The
lock belongs to the open file and goes with its last descriptor, so it outlives neither a killed
process nor the mapping it protects.

The locks stand at bytes from 2^62 on, where no image has data and no other program locks: QEMU has
locks of its own at the start of the images that it serves.

What this does not do: keep out programs that do not ask (QEMU, ``dd``, the kernel's loop driver).
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pmemkit.errors import Busy

__all__ = ["holder_of", "lock"]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_CONFLICT = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_BASE = 1 << 62
_FLOCK = "hhqqi4x"
"""``struct flock``: type, whence, start, length (0: to the end), pid."""


def lock(
    fd: int, path: str, *, exclusive: bool, offset: int = 0, length: int | None = None
) -> bool:
    """Locks a range of an open file, by default all of it, until its last descriptor is closed.

    False where the file system has no locks. Raises :class:`Busy` where somebody else holds one.
    """
    if length == 0:
        return False
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    record = struct.pack(_FLOCK, kind, os.SEEK_SET, _BASE + offset, length or 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, record)
    except OSError as cause:
        if cause.errno in _UNSUPPORTED:
            return False
        if cause.errno not in _CONFLICT:
            raise
        pid = holder_of(fd, offset, length)
        holder = "another process" if pid is None else f"process {pid}"
        if pid == os.getpid():
            holder = f"this process ({pid})"
        wanted = "writing" if exclusive else "reading beside a writer"
        text = f"{holder} has it open; {wanted} needs locking off"
        raise Busy(text, op="open", path=path) from cause
    return True


def holder_of(
    fd: int, offset: int = 0, length: int | None = None, processes: str = "/proc"
) -> int | None:
    """A process that locked part of this range of the file, as far as the kernel lets us see."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for pid, number, fields in _locks(Path(processes)):
        if fields[5] != place or (pid, number) == (os.getpid(), str(fd)):
            continue
        start = int(fields[6]) - _BASE
        end = None if fields[7] == "EOF" else int(fields[7]) - _BASE
        behind = length is not None and start >= offset + length
        if start >= 0 and not behind and (end is None or end >= offset):
            return pid
    return None


def _locks(processes: Path) -> Iterator[tuple[int, str, list[str]]]:
    """``(pid, descriptor, fields)`` of every lock that open files hold, where we may look."""
    for process in processes.glob("[0-9]*"):
        try:
            entries = list((process / "fdinfo").iterdir())
        except OSError:
            continue
        for entry in entries:
            try:
                lines = entry.read_text(encoding="ascii").splitlines()
            except OSError:
                continue
            for line in lines:
                # lock:  1: OFDLCK ADVISORY  WRITE -1 fe:01:131 4611686018427387904 EOF
                fields = line.removeprefix("lock:").split()
                if line.startswith("lock:") and len(fields) > 7 and fields[1] == "OFDLCK":
                    yield int(process.name), entry.name, fields
