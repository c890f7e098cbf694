"""Opening a medium: a path or a spec becomes mapped bytes, with the granularity that holds.

A path may be a regular file (on a DAX mount too), a block device or a device DAX. A spec is
memory: ``anonymous:SIZE``, ``memfd:SIZE`` or ``hugetlb:SIZE``; write ``./memfd:1G`` for a file that
has such a name. ``remote+unix://`` and ``remote+tcp://`` name a region of another process.

Invariants:
1. A file that is open for writing here is locked against every other opening through this module,
   until the medium and its descriptor are gone (``locking="off"`` skips it; see
   :mod:`pmemkit.media.lock`).
2. A block device is opened exclusively for writing, so one that is mounted is :class:`Busy`.
3. Every failure is a class of :mod:`pmemkit.errors` with the path in it.
4. An image fails where its list of bad blocks says so (:mod:`pmemkit.media.badblocks`).
5. What is stored to an image is counted, and noted beside it (:mod:`pmemkit.media.wear`).

What this does not do: create files, read what is on the media.
"""

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pmemkit.errors import Busy, InvalidArgument, NoSpace, NotSupported, PmemError, ReadOnly
from pmemkit.errors import SystemFailure as _SystemFailure
from pmemkit.media.badblocks import with_bad_blocks
from pmemkit.media.granularity import Backing, Decision, Platform, decide
from pmemkit.media.lock import lock
from pmemkit.media.platform import LinuxPlatform
from pmemkit.media.wear import Counting, Tracker
from pmemkit.units import format_size, parse_size

if TYPE_CHECKING:
    from pmemkit._native.media import Medium
    from pmemkit._native.remote import Client

__all__ = [
    "Locking",
    "OpenedMedium",
    "failure_of",
    "is_remote",
    "memory_spec",
    "names_no_file",
    "open_medium",
]

Locking = Literal["on", "off"]

_MEMORY_SPECS: dict[str, Backing] = {
    "anonymous": "anonymous",
    "memfd": "memfd",
    "hugetlb": "hugetlb",
}
_KINDS: dict[int, Backing] = {
    stat.S_IFREG: "file",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "device dax",
}
_CLASSES: dict[int, type[PmemError]] = {
    errno.EBUSY: Busy,
    errno.ETXTBSY: Busy,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EROFS: ReadOnly,
}


def memory_spec(path: str) -> tuple[Backing, str] | None:
    """Kind and size of a memory spec such as ``memfd:1G``; ``None`` for a path."""
    scheme, _, size = path.partition(":")
    backing = _MEMORY_SPECS.get(scheme)
    return (backing, size) if backing is not None and size else None


def is_remote(path: str) -> bool:
    """True for the address of a region that another process serves."""
    return path.startswith("remote+")


def names_no_file(path: str) -> bool:
    """True for a spec: memory, or a region of another process."""
    return memory_spec(path) is not None or is_remote(path)


def failure_of(cause: OSError, op: str, path: str) -> PmemError:
    """A failed system call as one of our errors, with the path in it."""
    if isinstance(cause, PmemError):
        cause.path = cause.path or path
        return cause
    cls = _CLASSES.get(cause.errno or 0, _SystemFailure)
    return cls(cause.strerror or str(cause), errno=cause.errno, op=op, path=path)


@dataclass(slots=True)
class OpenedMedium:
    """A medium with what was found out when it was opened. Closing it lets the lock go as soon as
    nobody uses the medium any more."""

    medium: "Medium"
    path: str
    backing: Backing
    read_only: bool
    decision: Decision
    volatile_because: str | None
    persistence_domain: str
    """``cpu_cache``, ``memory_controller`` or ``unknown`` for an nvdimm region as the kernel says;
    ``file_system`` where durability is asked of a file system; ``none`` for what is volatile."""
    locked: bool
    file: io.FileIO | None
    part: tuple[int, int] | None = None
    """Offset and length of the range that was opened; ``None`` for all of it."""
    wear: Tracker | None = None
    """Counts what is stored; ``None`` for what is not an image, or is not written."""
    client: "Client | None" = None
    """The connection to a region of another process."""

    @property
    def resizable(self) -> bool:
        """True for what has a length that can be changed."""
        whole = self.part is None and not self.read_only
        return whole and self.backing in ("file", "memfd", "hugetlb")

    def current_size(self) -> int:
        """Bytes the backing has now; the medium may have been made when it had others."""
        if self.file is None or self.part is not None:
            return len(self.medium)
        return _size_of(self.file.fileno(), self.backing, self.path)

    def remap(self) -> None:
        """Maps the backing again, as long as it is now. Whoever holds the old medium keeps it."""
        if self.file is None or self.part is not None:
            return
        size = self.current_size()
        try:
            medium = _map(self.file.fileno(), size, self.decision, self.read_only)
            self.medium = _judged(medium, self.backing, self.path, self.part, self.read_only)
            if self.wear is not None:
                self.wear.note()
                self.wear.follow(self.medium, size)
        except OSError as cause:
            raise failure_of(cause, "refresh", self.path) from cause

    def map_part(self, offset: int, length: int, read_only: bool) -> "Medium":
        """Maps a range of a file or device once more, on its own."""
        if self.file is None:
            raise NotSupported("is memory that is mapped once", op="map", path=self.path)
        start = (self.part[0] if self.part is not None else 0) + offset
        part = (start, length)
        medium = _map(self.file.fileno(), length, self.decision, read_only, part)
        return _judged(medium, self.backing, self.path, part, read_only)

    def sync_file(self) -> None:
        """Waits until the file's data and length are durable."""
        if self.file is not None:
            os.fdatasync(self.file.fileno())

    def deep_flush_control(self) -> Path | None:
        """The file of sysfs that flushes the memory controllers of its region, where it is a device
        DAX or a disk of one."""
        return None if self.file is None else LinuxPlatform().deep_flush_control(self.file.fileno())

    def close(self) -> None:
        """Notes what was written, and closes the descriptor or the connection."""
        if self.wear is not None:
            self.wear.note()
        if self.client is not None:
            self.client.close()
        if self.file is not None:
            self.file.close()


def open_medium(
    path_or_spec: str | os.PathLike[str],
    *,
    granularity: str | None = None,
    required_granularity: str | None = None,
    read_only: bool = False,
    locking: Locking = "on",
    platform: Platform | None = None,
    part: tuple[int, int] | None = None,
    wear: Counting = "sampled",
) -> OpenedMedium:
    """Opens and maps a file, a device or memory; with ``part`` only ``(offset, length)`` of it.
    ``wear`` says how what is stored to an image is counted by block.

    ``granularity`` overrides what the platform says (so do ``PMEMKIT_GRANULARITY`` and libpmem2's
    ``PMEM2_FORCE_GRANULARITY``); ``required_granularity`` refuses what would be coarser.
    """
    path = os.fspath(path_or_spec)
    if locking not in ("on", "off"):
        raise InvalidArgument(f"locking is on or off, not {locking!r}", op="open", path=path)
    if is_remote(path):
        return _open_remote(path, granularity, required_granularity, read_only)
    memory = memory_spec(path)
    file: io.FileIO | None = None
    try:
        if memory is not None:
            backing, size = memory[0], parse_size(memory[1])
            file = _memory_file(backing, size)
            locked = False
        else:
            file, backing = _open_file(path, read_only)
            start, length = part or (0, None)
            locked = locking == "on" and lock(
                file.fileno(), path, exclusive=not read_only, offset=start, length=length
            )
            size = _part_of(part, _size_of(file.fileno(), backing, path), path)
        asked = LinuxPlatform() if platform is None else platform
        fd = None if file is None else file.fileno()
        decision = decide(
            backing,
            fd,
            asked,
            override=granularity,
            environment=os.environ,
            required=required_granularity,
        )
        medium = _map(fd, size, decision, read_only, part)
        medium = _judged(medium, backing, path, part, read_only)
        volatile, domain = _persistence(backing, fd, asked)
        tracker = None
        if file is not None and backing == "file" and not read_only:
            whole = _size_of(file.fileno(), backing, path)
            tracker = Tracker(path, whole, part[0] if part else 0, medium, wear)
    except BaseException as cause:
        if file is not None:
            file.close()
        if isinstance(cause, OSError):
            raise failure_of(cause, "open", path) from cause
        raise
    return OpenedMedium(
        medium, path, backing, read_only, decision, volatile, domain, locked, file, part, tracker
    )


def _open_remote(
    path: str, granularity: str | None, required: str | None, read_only: bool
) -> OpenedMedium:
    """A region of another process: whatever it is there, here only a commit makes it durable."""
    # Not before it is needed: sockets take their time to load.
    from pmemkit.media.remote import connect

    decision = decide(
        "remote",
        None,
        LinuxPlatform(),
        override=granularity,
        environment={},
        required=required,
    )
    connected = connect(path, read_only=read_only)
    answer = connected.answer
    return OpenedMedium(
        connected.client.medium,
        path,
        "remote",
        read_only,
        decision,
        "its server says that it is" if answer.volatile else None,
        answer.domain,
        False,
        None,
        client=connected.client,
    )


def _open_file(path: str, read_only: bool) -> tuple[io.FileIO, Backing]:
    """The open file and what it is."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
    if not read_only and stat.S_ISBLK(os.stat(path).st_mode):  # noqa: PTH116 - bytes of a str path
        flags |= os.O_EXCL
    fd = os.open(path, flags)
    backing = _KINDS.get(stat.S_IFMT(os.fstat(fd).st_mode))
    if backing is None:
        os.close(fd)
        raise NotSupported("is not a file, a block device or a device DAX", op="open", path=path)
    return io.FileIO(fd, "rb" if read_only else "r+b"), backing


def _memory_file(backing: Backing, size: int) -> io.FileIO | None:
    """A memfd of this size; anonymous memory has no file."""
    if backing == "anonymous":
        return None
    from pmemkit._native import media

    file = io.FileIO(media.memfd("pmemkit", hugetlb=backing == "hugetlb"), "r+b")
    unit = os.fstat(file.fileno()).st_blksize if backing == "hugetlb" else 1
    if size % unit:
        file.close()
        text = f"{size} bytes are not a multiple of the huge page size, {format_size(unit)}"
        raise InvalidArgument(text, op="open")
    file.truncate(size)
    return file


def _size_of(fd: int, backing: Backing, path: str) -> int:
    if backing == "block device":
        return os.lseek(fd, 0, os.SEEK_END)
    if backing != "device dax":
        return os.fstat(fd).st_size
    size = LinuxPlatform().device_dax_size(fd)
    if size is None:
        raise NotSupported("is a character device and no device DAX", op="open", path=path)
    return size


def _part_of(part: tuple[int, int] | None, size: int, path: str) -> int:
    """The length to map."""
    if part is None:
        return size
    offset, length = part
    if offset + length > size:
        text = f"{length} bytes at {offset} end behind the {size} bytes there are"
        raise InvalidArgument(text, op="open", path=path)
    return length


def _map(
    fd: int | None,
    size: int,
    decision: Decision,
    read_only: bool,
    part: tuple[int, int] | None = None,
) -> "Medium":
    from pmemkit._native import media

    if fd is None:
        return media.map_anonymous(size)
    return media.map_file(
        fd,
        size,
        offset=part[0] if part is not None else 0,
        granularity=decision.granularity,
        map_sync=decision.map_sync,
        read_only=read_only,
        resizable=part is None,
    )


def _judged(
    medium: "Medium", backing: Backing, path: str, part: tuple[int, int] | None, read_only: bool
) -> "Medium":
    """An image fails where its list of bad blocks says so; a device does so by itself."""
    if backing != "file":
        return medium
    return with_bad_blocks(medium, path, start=part[0] if part else 0, read_only=read_only)


def _persistence(backing: Backing, fd: int | None, platform: Platform) -> tuple[str | None, str]:
    """Why it is volatile, if it is, and the persistence domain."""
    if fd is None or backing in ("memfd", "hugetlb"):
        return "it is memory of this process", "none"
    volatile = platform.volatile_because(fd)
    if volatile is not None:
        return volatile, "none"
    return None, platform.persistence_domain_of(fd) or "file_system"
