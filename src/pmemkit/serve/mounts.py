"""What ``pmem mount`` left in the kernel, and how it is taken down again.

A mount is a chain: server, FUSE file, loop device, file system. Its record is a directory in the
runtime directory::

    /run/pmemkit/mounts/NAME/       NAME is made of the mount point
        state.json                  who serves what, where
        disk/                       the FUSE mount, with one file
        log                         what the server said
        traffic.json                what went to media, written when all is unmounted
        failure.json                why it ended, if it did not end well

Invariants:
1. A record exists before anything else of its mount does, and is removed after all of it is gone;
   making it is atomic, so that a mount point has one server.
2. What is there to be taken down is asked of the kernel, never taken from the record: that of a
   server that was killed at any moment is enough.
3. Nothing is unmounted that is not of the record.

What this does not do: mount (:mod:`pmemkit.serve.mounting`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import pmemkit.errors as errors
from pmemkit.bus.programs import run_program
from pmemkit.errors import Busy, InvalidArgument, PmemError, SystemFailure

__all__ = [
    "Mounted",
    "Unmounted",
    "attach_loop",
    "attribute_of",
    "device_at",
    "dismantle",
    "failure_of",
    "find",
    "mount_points",
    "place_of",
    "records",
    "release_loop",
    "require_known",
    "start_of",
    "umount",
    "unmount",
]

_PROGRAM_SECONDS = 60.0
"""How long ``mount``, ``umount`` or ``losetup`` may take."""
_DETACH_SECONDS = 10.0
_LAZY_SECONDS = 0.3
"""How long an unused file system may take to go before it counts as used."""
_POLL_SECONDS = 0.01
_STATE, _FAILURE, _TRAFFIC, _DISK = "state.json", "failure.json", "traffic.json", "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """A record. ``started`` tells a process from a later one of the same number."""

    directory: str
    namespace: str
    name: str
    pid: int
    started: int
    place: str
    loop: str | None = None
    filesystem: str | None = None
    sector_size: int = 512
    read_only: bool = False
    made: bool = False
    mounted: bool = False
    cache: str = "off"
    cache_because: str = ""
    levelling: str = "off"
    levelling_because: str | None = None

    @property
    def fuse_directory(self) -> Path:
        """Where the FUSE file system is mounted."""
        return Path(self.place) / _DISK

    @property
    def fuse_file(self) -> str:
        """The file under the loop device."""
        return str(self.fuse_directory / self.name)

    @property
    def alive(self) -> bool:
        """True while its server runs."""
        return start_of(self.pid) == self.started

    def record(self) -> dict[str, Any]:
        """What a user is told."""
        told = asdict(self) | {"fuse_file": self.fuse_file}
        for own in ("started", "place", "name", "mounted"):
            del told[own]
        return told

    def claim(self) -> "Mounted":
        """Makes the record; :class:`Busy` where the mount point has one."""
        final = Path(self.place)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=final.parent))
        try:
            (temporary / _DISK).mkdir(mode=0o700)
            (temporary / _STATE).write_text(json.dumps(asdict(self)), encoding="utf-8")
            (temporary / _TRAFFIC).touch()
            # A directory takes the place of an empty one only.
            temporary.rename(final)
        except OSError as failure:
            shutil.rmtree(temporary, ignore_errors=True)
            there = find(self.directory)
            if there is None:
                raise SystemFailure(str(failure), errno=failure.errno, path=str(final)) from failure
            text = f"process {there.pid} serves {there.namespace} there"
            if not there.alive:
                text = "its server died; pmem umount cleans up what it left"
            raise Busy(text, op="mount", path=self.directory) from None
        return self

    def save(self, **changes: Any) -> "Mounted":
        """The record with these changes, written."""
        changed = replace(self, **changes)
        text = json.dumps(asdict(changed))
        temporary = Path(self.place) / f"{_STATE}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(Path(self.place) / _STATE)
        return changed

    def remove(self) -> None:
        """The end of the record."""
        shutil.rmtree(self.place, ignore_errors=True)

    def save_traffic(self, traffic: dict[str, Any]) -> None:
        """Leaves what went to media for whoever unmounts, who has the file open by then."""
        with contextlib.suppress(OSError):  # There is no room for it; nothing else is lost.
            (Path(self.place) / _TRAFFIC).write_text(json.dumps(traffic), encoding="utf-8")

    def open_traffic(self) -> IO[str]:
        """What :meth:`save_traffic` writes can be read from it, also after the record's end."""
        return (Path(self.place) / _TRAFFIC).open(encoding="utf-8")

    def save_failure(self, failure: PmemError) -> None:
        """Keeps why the server ended for whoever unmounts."""
        text = json.dumps({"kind": failure.kind, "message": str(failure)})
        (Path(self.place) / _FAILURE).write_text(text, encoding="utf-8")

    def failure(self) -> PmemError | None:
        """Why the server ended, if it did not end well."""
        try:
            told = json.loads((Path(self.place) / _FAILURE).read_text(encoding="utf-8"))
            return failure_of(told["kind"], told["message"])
        except (OSError, ValueError, KeyError):
            return None


def failure_of(kind: str, message: str) -> PmemError:
    """The error of another process."""
    for name in errors.__all__:
        each: type[PmemError] = getattr(errors, name)
        if each.kind == kind:
            return each(message)
    return SystemFailure(message)


# --- records --------------------------------------------------------------------------------------


def _runtime_directory() -> Path:
    """Where the records are: a directory that root alone can enter, or change."""
    parent = Path(os.environ.get("PMEMKIT_RUNTIME_DIR", "/run/pmemkit"))
    place = parent / "mounts"
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    for each in (parent, place):
        status = each.lstat()
        if each.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
            text = "is not a directory that root alone can change"
            raise SystemFailure(text, op="mount", path=str(each))
    return place


def place_of(directory: str) -> Path:
    """The record of a mount point."""
    return _runtime_directory() / hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]


def records() -> list[Mounted]:
    """Every record, in the order of the mount points."""
    found = []
    for place in _runtime_directory().glob("[0-9a-f]*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            told = json.loads((place / _STATE).read_text(encoding="utf-8"))
            found.append(Mounted(**told | {"place": str(place)}))
    return sorted(found, key=lambda each: each.directory)


def find(directory: str) -> Mounted | None:
    """The record of a mount point."""
    return next((each for each in records() if each.directory == directory), None)


def start_of(pid: int) -> int | None:
    """When a process started, in ticks since boot; ``None`` for one that does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name is in brackets and may have brackets of its own.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


# --- the kernel's side ----------------------------------------------------------------------------


def _mount_table() -> list[tuple[str, str]]:
    """``(device, mount point)`` of every mount, the latest last; the device as ``7:0``."""
    table = []
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in lines.splitlines():
        fields = line.split()
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        table.append((fields[2], point))
    return table


def attribute_of(loop: str | None, name: str) -> str | None:
    """What sysfs says of a loop device; ``dev`` is its number as the mount table has it."""
    try:
        path = Path(f"/sys/block/{Path(loop or '').name}/{name}")
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None


def mount_points(loop: str | None) -> list[str]:
    """Where a loop device is mounted, the latest last."""
    number = attribute_of(loop, "dev")
    return [point for device, point in _mount_table() if device == number]


def device_at(directory: str) -> str | None:
    """The device number of what is mounted at a directory, on top of all; ``None``: nothing is."""
    return next((device for device, point in _mount_table()[::-1] if point == directory), None)


def _loops_of(file: str) -> list[str]:
    """The loop devices over a file."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if entry.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n") == file:
                found.append(f"/dev/{entry.parts[-3]}")
    return found


def attach_loop(file: str, *, sector_size: int, read_only: bool) -> str:
    """A new loop device with direct I/O over a file."""
    words = ["losetup", "--find", "--show", "--direct-io=on", f"--sector-size={sector_size}"]
    words += ["--read-only"] if read_only else []
    return run_program([*words, "--", file], timeout_seconds=_PROGRAM_SECONDS).decode().strip()


def release_loop(loop: str) -> None:
    """Detaches a loop device: at once, or when its last user closes it."""
    run_program(["losetup", "--detach", loop], timeout_seconds=_PROGRAM_SECONDS)


def umount(directory: str, *, lazily: bool = False) -> None:
    """Unmounts what is on top of a directory; :class:`Busy` while somebody uses it."""
    words = ["umount", "--no-canonicalize", *(["--lazy"] if lazily else []), "--", directory]
    run_program(words, timeout_seconds=_PROGRAM_SECONDS)


def _umount_somehow(directory: str) -> bool:
    """Unmounts, lazily if it must; false then."""
    try:
        umount(directory)
    except PmemError:
        umount(directory, lazily=True)
        return False
    return True


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


# --- taking down ----------------------------------------------------------------------------------


def dismantle(record: Mounted) -> None:
    """Takes down all that there is of a mount, lazily where it is in use. The record stays."""
    for loop in _loops_of(record.fuse_file):
        lazily = [point for point in mount_points(loop)[::-1] if not _umount_somehow(point)]
        with contextlib.suppress(SystemFailure):
            release_loop(loop)
        if not lazily:
            # Somebody may be looking at it for a moment, as udev does.
            _wait(lambda: not _loops_of(record.fuse_file), _DETACH_SECONDS)
    place = str(record.fuse_directory)
    while device_at(place) is not None:
        _umount_somehow(place)


@dataclass(frozen=True, slots=True)
class Unmounted:
    """What came of unmounting."""

    gone: bool
    """False: lazily unmounted, it is served until its last user is gone."""
    traffic: dict[str, Any] | None = None
    """What went to media since it was mounted; ``None`` where its server did not come to say."""


def unmount(
    record: Mounted, *, lazily: bool = False, force: bool = False, seconds: float = 60.0
) -> Unmounted:
    """Unmounts a file system; its server flushes, ends and takes its record with it.

    A server that died is cleaned up after. ``force`` kills one that does not answer: what was not
    flushed is lost. Raises :class:`Busy` where the file system is in use, and what the server
    ended with.
    """
    with contextlib.ExitStack() as stack:
        told = None
        with contextlib.suppress(FileNotFoundError):
            told = stack.enter_context(record.open_traffic())
        if force and record.alive:
            os.kill(record.pid, signal.SIGKILL)
            _wait(lambda: not record.alive, seconds)
        if record.alive:
            _ask(record, lazily)
            if not _wait(lambda: not record.alive, _LAZY_SECONDS if lazily else seconds):
                if lazily:
                    return Unmounted(gone=False)
                raise _still(record, seconds)
        failure = record.failure()
        dismantle(record)
        record.remove()
        if failure is not None and not force:
            raise failure
        return Unmounted(gone=True, traffic=_traffic_in(told))


def _traffic_in(told: IO[str] | None) -> dict[str, Any] | None:
    try:
        traffic: dict[str, Any] | None = json.loads(told.read()) if told is not None else None
    except ValueError:
        return None  # Its server did not come to write it, or not all of it.
    return traffic


def _ask(record: Mounted, lazily: bool) -> None:
    """Unmounts the file system: with it goes the loop device, and with that the server."""
    if not record.mounted:
        # It is still being set up, and takes that down again.
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        return
    if record.directory not in mount_points(record.loop):
        # Somebody else unmounted it: the server is about to end, or waits for the last user.
        return
    if device_at(record.directory) != attribute_of(record.loop, "dev"):
        text = "something else is mounted on top of it"
        raise Busy(text, op="umount", path=record.directory)
    try:
        umount(record.directory, lazily=lazily)
    except Busy as refusal:
        users = _users_of(record.directory)
        if users:
            text = f"in use by {', '.join(users)}"
            raise Busy(text, op="umount", path=record.directory) from refusal
        raise


def _still(record: Mounted, seconds: float) -> Busy:
    points = mount_points(record.loop)
    if points:
        text = f"it is mounted at {', '.join(points)}, too"
    else:
        text = f"process {record.pid} still serves it after {seconds:g} seconds; --force kills it"
    return Busy(text, op="umount", path=record.directory)


def _users_of(directory: str, limit: int = 3) -> list[str]:
    """Some processes that have something open below a directory, or work there."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        places = [process / "cwd", process / "root", process / "exe"]
        try:
            places += list((process / "fd").iterdir())
            name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
        for place in places:
            with contextlib.suppress(OSError):
                target = str(place.readlink())
                if target == directory or target.startswith(directory + "/"):
                    found.append(f"{name} ({process.name})")
                    break
        if len(found) == limit:
            break
    return found


def require_known(directory: str) -> Mounted:
    """The record of a mount point; :class:`InvalidArgument` where there is none."""
    found = find(directory)
    if found is None:
        text = "pmem mount mounted nothing there; pmem mount --list shows what it did"
        raise InvalidArgument(text, op="umount", path=directory)
    return found
