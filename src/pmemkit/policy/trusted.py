"""Reading a file that decides what root does.

Whoever can write a policy that root applies can have data destroyed. So root reads one only where
nobody else can write it: a regular file of root's, in a directory of root's, neither writable by
group or others (in a sticky directory such as that of temporary files others cannot replace it).

Invariants:
1. The file is opened once. Owner, mode and type are those of the open file and of the open
   directory that it was found in, so that nothing can be put in its place after the check.
2. A symbolic link is followed first: what is checked is where the bytes are.
3. Opening never waits: a FIFO or a device is refused, not read.

What this does not do: check the directories above. Whoever owns one of them can only put another
file there that root wrote, in a directory that root made.
"""

import errno
import os
import stat
from pathlib import Path

from pmemkit.errors import InvalidArgument
from pmemkit.media.provider import failure_of

__all__ = ["read_trusted"]

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# A POSIX ACL that lets anyone write shows in the bits of the group, which are its mask.
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def read_trusted(path: str, size_most: int, *, check: bool) -> bytes:
    """The bytes of a regular file, at most ``size_most + 1`` of them.

    With ``check``, of one that only root can write. Raises :class:`InvalidArgument` with owner,
    mode and what would make it right, or what the system says.
    """
    if "\0" in path:
        raise InvalidArgument(f"{path!r} is no path: it has a NUL byte", op="policy")
    try:
        real = Path(os.path.realpath(path, strict=True))
        directory = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Looked at before it is opened, because to open a device may be to do something to it.
            name = real.name or "."
            _require_regular(path, os.stat(name, dir_fd=directory, follow_symlinks=False))
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=directory)
            with os.fdopen(file, "rb") as opened:
                status = os.fstat(file)
                _require_regular(path, status)
                if check:
                    _require_roots(path, real, status, os.fstat(directory))
                return opened.read(size_most + 1)
        finally:
            os.close(directory)
    except OSError as cause:
        raise failure_of(cause, "policy", path) from None


def _require_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise InvalidArgument(f"is {kind}; a policy is a regular file", op="policy", path=path)


def _require_roots(path: str, real: Path, file: os.stat_result, directory: os.stat_result) -> None:
    """Refuses what others than root can write, with all that is to be put right."""
    wrong = _lapses(real, file, sticky_helps=False)
    wrong += _lapses(real.parent, directory, sticky_helps=True)
    if wrong:
        text = "others than root can write it, so root does not apply it: " + "; ".join(wrong)
        raise InvalidArgument(text, errno=errno.EPERM, op="policy", path=path)


def _lapses(place: Path, status: os.stat_result, *, sticky_helps: bool) -> list[str]:
    mode = stat.S_IMODE(status.st_mode)
    wrong = []
    if status.st_uid != 0:
        wrong.append(f"{place} belongs to user {status.st_uid}: chown root {place}")
    if mode & _OTHERS and not (sticky_helps and mode & stat.S_ISVTX):
        wrong.append(f"{place} has mode {mode:04o}: chmod go-w {place}")
    return wrong
