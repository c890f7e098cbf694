"""The exceptions of pmemkit, raised by Python and by the Rust core alike.

    PmemError (OSError)             errno       exit code
    ├── InvalidArgument             EINVAL      2
    ├── OutOfRange                  EINVAL      2
    ├── NotSupported                EOPNOTSUPP  3
    ├── ReadOnly                    EROFS       4
    ├── NoSpace                     ENOSPC      5
    ├── MediaError                  EIO         6
    │   └── Truncated               EIO         6
    ├── Corrupt                     EUCLEAN     12
    ├── Latched                     EROFS       7
    ├── Closed                      EBADF       8
    ├── Busy                        EBUSY       9
    ├── ProtocolError               EPROTO      10
    └── SystemFailure               of the call 11

Every class has a stable ``kind``, an ``errno`` and an ``exit_code`` for the command line. A new
cause does not add a class: it is a new message. This module imports nothing of the package.
"""

import errno as _errno
from typing import ClassVar

__all__ = [
    "Busy",
    "Closed",
    "Corrupt",
    "InvalidArgument",
    "Latched",
    "MediaError",
    "NoSpace",
    "NotSupported",
    "OutOfRange",
    "PmemError",
    "ProtocolError",
    "ReadOnly",
    "SystemFailure",
    "Truncated",
]


class PmemError(OSError):
    """Base of every error. ``op``, ``offset`` (bytes) and ``path`` say what it concerned;
    ``moved`` is how many bytes a long transfer moved from its start before it failed.

    The message is a sentence with the offending numbers in it; ``errno`` is always set.
    """

    kind: ClassVar[str] = ""
    default_errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        op: str | None = None,
        offset: int | None = None,
        path: str | None = None,
        moved: int | None = None,
    ) -> None:
        super().__init__(self.default_errno if errno is None else errno, message)
        self.message = message
        self.op = op
        self.offset = offset
        self.path = path
        self.moved = moved

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidArgument(PmemError):
    """An argument, option or combination is not acceptable."""

    kind = "invalid"
    default_errno = _errno.EINVAL
    exit_code = 2


class OutOfRange(PmemError):
    """A range ends past the end of the device or wraps around 2^64."""

    kind = "out_of_range"
    default_errno = _errno.EINVAL
    exit_code = 2


class NotSupported(PmemError):
    """The device, layer or backing cannot do this at all."""

    kind = "not_supported"
    default_errno = _errno.EOPNOTSUPP
    exit_code = 3


class ReadOnly(PmemError):
    """A write to something opened read-only."""

    kind = "read_only"
    default_errno = _errno.EROFS
    exit_code = 4


class NoSpace(PmemError):
    """The backing has no room."""

    kind = "no_space"
    default_errno = _errno.ENOSPC
    exit_code = 5


class MediaError(PmemError):
    """The media failed: poison, an I/O error, a failed write-back."""

    kind = "media"
    default_errno = _errno.EIO
    exit_code = 6


class Truncated(MediaError):
    """The backing file became shorter than the mapping."""

    kind = "truncated"


class Corrupt(PmemError):
    """What is on media breaks its format: a signature, a checksum, a value out of its range."""

    kind = "corrupt"
    default_errno = _errno.EUCLEAN
    exit_code = 12


class Latched(PmemError):
    """An earlier write or flush failed; the device is read-only until it is reopened."""

    kind = "latched"
    default_errno = _errno.EROFS
    exit_code = 7


class Closed(PmemError):
    """Use after close."""

    kind = "closed"
    default_errno = _errno.EBADF
    exit_code = 8


class Busy(PmemError):
    """Something else holds what is needed; the message names the holder where it is known."""

    kind = "busy"
    default_errno = _errno.EBUSY
    exit_code = 9


class ProtocolError(PmemError):
    """The other side of a connection broke the protocol."""

    kind = "protocol"
    default_errno = _errno.EPROTO
    exit_code = 10


class SystemFailure(PmemError):
    """A system call failed for a reason of its own; ``errno`` tells which."""

    kind = "system"
    default_errno = _errno.EIO
    exit_code = 11
