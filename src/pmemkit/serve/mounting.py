"""The server of ``pmem mount``: a chain from a device to a mounted file system, kept up.

    device ── FUSE file ── loop device, direct I/O ── file system ── mount point

States: setting up -> mounted -> taking down. Once it is mounted, the loop device is told to go with
its last user: so whoever unmounts the mount point, and be it the machine's shutdown, lets the
loop device go, and with it the FUSE file, and with that this server.

Invariants:
1. Whatever fails, or stops it, while it is set up, all that was put up is taken down again. A
   signal is minded between steps, and while a file system is made.
2. The server ends only when nobody has the FUSE file open, or when it is told to stop twice.
3. Before it ends, the device is flushed; what failed then, and what went to media meanwhile, is
   kept for whoever unmounts.

What this does not do: daemonise, talk to the user (:mod:`pmemkit.cli.mount_namespace`).
"""

import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pmemkit.bus.programs import run_program
from pmemkit.errors import Busy, InvalidArgument, NotSupported, PmemError, SystemFailure
from pmemkit.serve import mounts
from pmemkit.serve.fuse_export import FuseExport
from pmemkit.serve.mounts import Mounted
from pmemkit.storage import BlockDevice, Region
from pmemkit.storage.defaults import Defaults
from pmemkit.storage.signatures import Signature, identify

__all__ = ["Served", "Stopped", "Wanted", "check_machine", "serve_mount"]

_MKFS = {"ext4": (["mkfs.ext4", "-q"], "-F"), "xfs": (["mkfs.xfs", "-q"], "-f")}
_MKFS_SECONDS = 600.0
_MOUNT_SECONDS = 600.0
"""A journal may take its time to be replayed."""
_JOIN_SECONDS = 10.0
_SECTOR_SIZES = (512, 4096)
_FUSE, _LOOP = Path("/dev/fuse"), Path("/dev/loop-control")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be mounted where."""

    namespace: str
    directory: str
    mkfs: str | None = None
    force: bool = False
    options: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What is under the file system."""

    region: Region
    device: BlockDevice
    defaults: Defaults

    def traffic(self) -> dict[str, Any]:
        """What media were given, and what the cache did if there is one."""
        stats = self.device.cache_stats
        media = {"media": self.region.medium.stats()}
        return media if stats is None else media | {"cache": stats}


class Stopped(BaseException):
    """Told to stop while setting up."""


def check_machine(wanted: Wanted) -> None:
    """Raises the error for what is missing here: root, FUSE, loop devices, the mount point."""
    if os.geteuid() != 0:
        raise SystemFailure("mounting needs root", errno=1, op="mount")
    for device, module in ((_FUSE, "fuse"), (_LOOP, "loop")):
        if not device.exists():
            text = f"{device} is missing; modprobe {module} makes it where the kernel has it"
            raise NotSupported(text, op="mount")
    if not Path(wanted.directory).is_dir():
        os.stat(wanted.directory)  # noqa: PTH116 - its error says what is wrong
        raise InvalidArgument("is not a directory", op="mount", path=wanted.directory)
    there = mounts.find(wanted.directory)
    if there is None and mounts.device_at(wanted.directory) is not None:
        raise Busy("something is mounted there", op="mount", path=wanted.directory)
    if wanted.read_only and wanted.mkfs:
        raise InvalidArgument("a file system cannot be made read-only", op="mount")


def serve_mount(
    wanted: Wanted,
    open_device: Callable[[ExitStack], Served],
    announce: Callable[[Mounted], None],
    say: Callable[[str], None],
) -> None:
    """Mounts, announces it, and serves until it is unmounted. For the main thread of a process of
    its own: SIGTERM and SIGINT unmount it, and a second one cuts what is left."""
    from pmemkit._native import fuse

    stop = _Stop()
    _on_stop(stop)
    # Before there is a cache, whose thread writes back what the mounted file system waits for.
    fuse.allocate_without_write_back()
    with ExitStack() as stack:
        served = open_device(stack)
        found = identify(served.device.read, served.device.size)
        _check_contents(wanted, found)
        server: _Server | None = None
        try:
            with stop.later():
                server = _Server(wanted, served, _record(wanted, served).claim(), stop)
            server.set_up(found)
            server.listen()
            announce(server.record)
            server.wait(say)
        finally:
            _on_stop(lambda *_: None)
            if server is not None:
                server.take_down()


def _on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


class _Stop:
    """The handler of signals while it is set up: raises :class:`Stopped`, once; not in the middle
    of a step that would then be done without anybody who knows of it."""

    def __init__(self) -> None:
        self._waits = self._told = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self._waits:
            self._told = True
        else:
            self._waits = True
            raise Stopped

    @contextmanager
    def later(self) -> Iterator[None]:
        """A step that is done whole: what comes meanwhile is raised at its end."""
        self._waits = True
        yield
        self._waits = False
        if self._told:
            self._waits = True
            raise Stopped


def _record(wanted: Wanted, served: Served) -> Mounted:
    device = served.device
    unit = device.channel().block_size_min
    sector_size = max(unit, _SECTOR_SIZES[0])
    if sector_size not in _SECTOR_SIZES:
        raise NotSupported(f"a loop device has no sectors of {sector_size} bytes", op="mount")
    pid = os.getpid()
    return Mounted(
        directory=wanted.directory,
        namespace=wanted.namespace,
        name=Path(wanted.namespace).name,
        pid=pid,
        started=mounts.start_of(pid) or 0,
        place=str(mounts.place_of(wanted.directory)),
        sector_size=sector_size,
        read_only=wanted.read_only or "write" not in device.capabilities,
        **served.defaults.record(),
    )


def _check_contents(wanted: Wanted, found: Signature | None) -> None:
    """No file system is made where something is, unless forced."""
    if wanted.mkfs is None or found is None or wanted.force:
        return
    text = f"there is {found}; --force makes a new {wanted.mkfs} in its place"
    if found.kind == "filesystem":
        text += ", and without --mkfs it is mounted as it is"
    raise InvalidArgument(text, op="mkfs", path=wanted.namespace)


class _Server:
    """One mount, from its record on."""

    def __init__(self, wanted: Wanted, served: Served, record: Mounted, stop: _Stop) -> None:
        self.record = record
        self._stop = stop
        self._wanted = wanted
        self._served = served
        self._device = served.device
        self._export: FuseExport | None = None
        self._events: queue.SimpleQueue[Literal["unused", "stop"]] = queue.SimpleQueue()

    def set_up(self, found: Signature | None) -> None:
        """FUSE file, loop device, file system; the record says how far it came."""
        wanted, record = self._wanted, self.record
        size, read_only = record.sector_size, record.read_only
        with self._stop.later():
            self._export = FuseExport(self._device, record.fuse_directory, record.name)
            loop = mounts.attach_loop(record.fuse_file, sector_size=size, read_only=read_only)
            record = self.record = record.save(loop=loop)
        if mounts.attribute_of(loop, "loop/dio") != "1":
            raise NotSupported(f"{loop} does no direct I/O on a FUSE file here", op="mount")
        if wanted.mkfs is not None:
            words, force = _MKFS[wanted.mkfs]
            words = [*words, *([force] if wanted.force else []), loop]
            run_program(words, timeout_seconds=_MKFS_SECONDS)
        with self._stop.later():
            self._mount(loop, found)
        # From here on it goes with its last user.
        mounts.release_loop(loop)
        filesystem = wanted.mkfs or (found.name if found is not None else None)
        made = wanted.mkfs is not None
        self.record = record.save(filesystem=filesystem, made=made, mounted=True)

    def _mount(self, loop: str, found: Signature | None) -> None:
        wanted = self._wanted
        options = [wanted.options] if wanted.options else []
        options += ["ro"] if self.record.read_only else []
        words = ["mount", *(["-o", ",".join(options)] if options else [])]
        try:
            run_program([*words, "--", loop, wanted.directory], timeout_seconds=_MOUNT_SECONDS)
        except SystemFailure as failure:
            if found is None and wanted.mkfs is None:
                failure.message += "; no file system is known to be there, --mkfs ext4 makes one"
            raise

    def listen(self) -> None:
        """From now on a signal is an event: before anybody hears that it is mounted."""
        assert self._export is not None
        _on_stop(lambda *_: self._events.put("stop"))
        self._export.when_unused(lambda: self._events.put("unused"))

    def wait(self, say: Callable[[str], None]) -> None:
        """Until nobody has the FUSE file open. Told to stop, it unmounts; a second time, it
        goes."""
        stops = 0
        while self._events.get() != "unused":
            stops += 1
            if stops > 1:
                return
            try:
                for point in mounts.mount_points(self.record.loop)[::-1]:
                    mounts.umount(point)
            except PmemError as refusal:
                say(f"{self.record.directory} stays mounted: {refusal}")

    def take_down(self) -> None:
        """Takes down what there is and flushes. What fails then, after it was mounted, stays in the
        record for whoever unmounts."""
        try:
            mounts.dismantle(self.record)
            ended = self._export is None or self._export.join(_JOIN_SECONDS)
            if "flush" in self._device.capabilities:
                self._device.flush()
            self.record.save_traffic(self._served.traffic())
            if not ended:
                text = "cut while it was in use: what programs had not synced is lost"
                raise Busy(text, op="umount", path=self.record.directory)
        except PmemError as failure:
            if self.record.mounted:
                self.record.save_failure(failure)
            else:
                self.record.remove()
            raise
        self.record.remove()
