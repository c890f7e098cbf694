"""Reading a file that decides what root does.

Whoever can write a policy or a declaration that root follows can have data destroyed. So root reads
one only where nobody else can write it: a regular file of root's, in a directory of root's, neither
writable by group or others (in a sticky directory such as that of temporary files others cannot
replace it).

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

from pmemkit.errors import InvalidArgument, SystemFailure

__all__ = ["read_trusted"]

# A POSIX ACL that lets anyone write shows in the bits of the group, which are its mask.
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def read_trusted(
    path: str, size_most: int, *, check: bool, op: str = "policy", what: str = "a policy"
) -> bytes:
    """The bytes of a regular file, at most ``size_most + 1`` of them.

    With ``check``, of one that only root can write. ``what`` the file is goes into the messages.
    Raises :class:`InvalidArgument` with owner, mode and what would make it right, or
    :class:`SystemFailure` with what the system says.
    """
    if "\0" in path:
        raise InvalidArgument(f"{path!r} is no path: it has a NUL byte", op=op)
    try:
        real = Path(os.path.realpath(path, strict=True))
        directory = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Looked at before it is opened, because to open a device may be to do something to it.
            name = real.name or "."
            kind = _not_regular(os.stat(name, dir_fd=directory, follow_symlinks=False))
            if kind is None:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as opened:
                    status = os.fstat(opened.fileno())
                    kind = _not_regular(status)
                    wrong = _others_can_write(real, status, os.fstat(directory)) if check else []
                    if kind is None and not wrong:
                        return opened.read(size_most + 1)
        finally:
            os.close(directory)
    except OSError as cause:
        raise SystemFailure(
            cause.strerror or str(cause), errno=cause.errno, op=op, path=path
        ) from None
    if kind is not None:
        raise InvalidArgument(f"is {kind}; {what} is a regular file", op=op, path=path)
    text = "others than root can write it, so root does not apply it: " + "; ".join(wrong)
    raise InvalidArgument(text, errno=errno.EPERM, op=op, path=path)


def _not_regular(status: os.stat_result) -> str | None:
    """What it is where it is no regular file."""
    if stat.S_ISREG(status.st_mode):
        return None
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")


def _others_can_write(real: Path, file: os.stat_result, directory: os.stat_result) -> list[str]:
    """All that is to be put right before others than root cannot."""
    wrong = _lapses(real, file, sticky_helps=False)
    return wrong + _lapses(real.parent, directory, sticky_helps=True)


def _lapses(place: Path, status: os.stat_result, *, sticky_helps: bool) -> list[str]:
    mode = stat.S_IMODE(status.st_mode)
    wrong = []
    if status.st_uid != 0:
        wrong.append(f"{place} belongs to user {status.st_uid}: chown root {place}")
    if mode & _OTHERS and not (sticky_helps and mode & stat.S_ISVTX):
        wrong.append(f"{place} has mode {mode:04o}: chmod go-w {place}")
    return wrong
