"""File systems on the live machine: made, mounted and unmounted by the programs of each.

Invariants:
1. No file system is made where something else is.
2. A mount point that was made for a step goes away with it.

What this does not do: write ``/etc/fstab``. The policy itself says what is mounted.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from pmemkit.bus.holders import Holders
from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, PmemError
from pmemkit.policy.kernel_live import Live, Made
from pmemkit.policy.kernel_namespaces import facts_of
from pmemkit.policy.model import Entry, Keep, Step
from pmemkit.storage.signatures import identify

__all__ = ["make_filesystem", "mount", "reverse_make", "reverse_mount", "reverse_umount", "umount"]

_OPTIONS: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=,.:+%/@-]{0,500}")
_HEAD_SIZE: Final = 1 << 20
_EMPTY: Final = frozenset({"lost+found"})


def _disk(live: Live, step: Step, made: Made) -> tuple[str, str]:
    """The namespace of a step and its block device."""
    dev = step.target
    if dev.startswith("@"):
        facts = made.get(int(dev[1:])) if dev[1:].isdecimal() else None
        dev = str(facts.get("dev")) if facts is not None else dev
    here = live.namespace(dev)
    if here.blockdev is None or here.state is not None:
        raise InvalidArgument(f"{dev} has no block device", op=step.verb)
    return here.dev, here.blockdev


def make_filesystem(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """``mkfs`` on a namespace on which nothing is."""
    dev, disk = _disk(live, step, made)
    kind = step.params["filesystem"]
    device = live.dev / disk
    found = _identify(device)
    if found is not None and (found.kind, found.name) == ("filesystem", kind):
        return {**facts_of(live, dev), "filesystem": kind}
    if found is not None and not step.destroys:
        raise InvalidArgument(f"{dev} carries {found}; nothing is made over it", op="mkfs")
    live.require_unused(live.namespace(dev), "formatted")
    uuid = str(uuid4())
    keep({"dev": dev, "blockdev": disk, "head": _head(device), "uuid": uuid})
    live.run(_mkfs_words(kind, uuid, str(device)), timeout_seconds=600, given=b"")
    return {**facts_of(live, dev), "filesystem": kind, "filesystem_uuid": uuid}


def _mkfs_words(kind: str, uuid: str, device: str) -> list[str]:
    if kind == "ext4":
        # Blocks of a page, without which there is no DAX.
        return ["mkfs.ext4", "-q", "-F", "-b", "4096", "-U", uuid, device]
    if kind == "xfs":
        # Kernels before 6.0 have no DAX together with reflink.
        return ["mkfs.xfs", "-q", "-f", "-m", f"reflink=0,uuid={uuid}", device]
    raise NotSupported(f"{kind!r} is no file system that is made: ext4 or xfs", op="mkfs")


def _identify(device: Path) -> Any:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        return identify(lambda offset, length: os.pread(descriptor, length, offset), size)
    finally:
        os.close(descriptor)


def _head(device: Path) -> bytes:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, _HEAD_SIZE, 0)
    finally:
        os.close(descriptor)


def reverse_make(live: Live, entry: Entry, force: bool) -> str:
    """Puts the start of the namespace back, so that there is no file system."""
    kept = entry.kept
    if "head" not in kept:
        return "no file system was made"
    here = live.namespace(str(kept["dev"]))
    if here.blockdev is None:
        raise Busy(f"{here.dev} has no block device now", op="undo")
    device = live.dev / here.blockdev
    found = _identify(device)
    if found is None or found.uuid != kept["uuid"]:
        if entry.state == "started":
            _write_head(device, kept["head"])
            return f"{here.dev} has no file system, as before"
        return f"the file system that was made on {here.dev} is gone already"
    live.require_unused(here, "wiped")
    if not force:
        files = _files_in(live, str(device), str(entry.step.params["filesystem"]))
        if files:
            text = f"there are files in the file system on {here.dev}: {', '.join(files[:5])}"
            raise Corrupt(text, op="undo")
    _write_head(device, kept["head"])
    return f"{here.dev} has no file system, as before"


def _write_head(device: Path, head: bytes) -> None:
    descriptor = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, head, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files_in(live: Live, device: str, kind: str) -> list[str]:
    """What is in the root of a file system that nobody has mounted."""
    place = live.runtime / "look"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = "ro,noload" if kind == "ext4" else "ro,norecovery"
    words = ["mount", "-t", kind, "-o", f"{options},nosuid,nodev,noexec", device, str(place)]
    live.run(words, timeout_seconds=60, given=b"")
    try:
        return sorted({each.name for each in place.iterdir()} - _EMPTY)
    finally:
        live.run(["umount", str(place)], timeout_seconds=60, given=b"")


# --- mounting ------------------------------------------------------------------------------------


def _path_of(params: Mapping[str, Any]) -> Path:
    text = str(params["path"])
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts or not text.isprintable() or text == "/":
        raise InvalidArgument(f"{text[:200]!r} is no mount point: an absolute path without ..")
    return path


def mount(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """``mount``, in a directory that is made where there is none."""
    path = _path_of(step.params)
    dev, disk = _disk(live, step, made)
    device = f"/dev/{disk}"
    holders = Holders.look([], live.sysfs, live.proc)
    if str(path) in holders.mounts(disk):
        return {"dev": dev, "path": str(path)}
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InvalidArgument(f"{path} is no directory", op="mount")
    created = [str(each) for each in (path, *path.parents) if not each.exists()]
    keep({"path": str(path), "created": created, "blockdev": disk, "dev": dev})
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        live.run(_mount_words(step.params, device, path), timeout_seconds=120, given=b"")
    except PmemError:
        _remove_directories(created)
        raise
    return {"dev": dev, "path": str(path)}


def _mount_words(params: Mapping[str, Any], device: str, path: Path) -> list[str]:
    options = params.get("options")
    words = ["mount", "-t", _known(str(params["filesystem"]))]
    if options:
        if _OPTIONS.fullmatch(str(options)) is None:
            raise InvalidArgument(f"{str(options)[:200]!r} are no mount options", op="mount")
        words += ["-o", str(options)]
    return [*words, device, str(path)]


def _known(filesystem: str) -> str:
    if re.fullmatch(r"[a-z0-9]{2,16}", filesystem) is None:
        raise InvalidArgument(f"{filesystem[:80]!r} is no file system", op="mount")
    return filesystem


def _remove_directories(created: list[str]) -> None:
    for each in created:
        try:
            Path(each).rmdir()
        except OSError:
            return


def reverse_mount(live: Live, entry: Entry, _force: bool) -> str:
    """Unmounts it."""
    path = str(entry.step.params["path"])
    if "path" not in entry.kept:
        return f"nothing was mounted on {path}"
    if path in Holders.look([], live.sysfs, live.proc).mounts(str(entry.kept["blockdev"])):
        _umount(live, path)
    _remove_directories(list(entry.kept.get("created", ())))
    return f"{path} is unmounted again"


def umount(live: Live, step: Step, keep: Keep, made: Made) -> dict[str, Any]:
    """``umount``, and nothing that forces it."""
    path = _path_of(step.params)
    dev, disk = _disk(live, step, made)
    if str(path) not in Holders.look([], live.sysfs, live.proc).mounts(disk):
        return {"dev": dev}
    keep({"path": str(path), "dev": dev, "blockdev": disk, **_mounted_as(live, str(path))})
    _umount(live, str(path))
    return {"dev": dev}


def _mounted_as(live: Live, path: str) -> dict[str, str]:
    """File system and options of a mount."""
    text = (live.proc / "self" / "mountinfo").read_text("utf-8", "replace")
    for line in reversed(text.splitlines()):
        words, _, rest = line.partition(" - ")
        fields, tail = words.split(), rest.split()
        if len(fields) > 5 and len(tail) > 2 and fields[4] == path:
            return {"filesystem": tail[0], "options": fields[5]}
    return {}


def _umount(live: Live, path: str) -> None:
    try:
        live.run(["umount", path], timeout_seconds=60, given=b"")
    except PmemError as failure:
        users = _users_below(live, path)
        if not users:
            raise
        text = f"{path} cannot be unmounted, because it is in use by {', '.join(users)}"
        raise Busy(text, op="umount") from failure


def _users_below(live: Live, path: str) -> list[str]:
    """Processes that have something below a mount point open, or are in it."""
    found = []
    for place in sorted(live.proc.glob("[0-9]*")):
        links = [place / "cwd", place / "root"]
        try:
            links += list((place / "fd").iterdir())
            targets = {str(each.readlink()) for each in links if each.is_symlink()}
            name = (place / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue
        if any(each == path or each.startswith(f"{path}/") for each in targets):
            found.append(f"{name} ({place.name})")
    return found


def reverse_umount(live: Live, entry: Entry, _force: bool) -> str:
    """Mounts it again, where and as it was."""
    kept = entry.kept
    if "path" not in kept:
        return "nothing was unmounted"
    path, disk = Path(str(kept["path"])), str(live.namespace(str(kept["dev"])).blockdev)
    if str(path) not in Holders.look([], live.sysfs, live.proc).mounts(disk):
        filesystem = kept.get("filesystem") or entry.step.params["filesystem"]
        params = {"filesystem": filesystem, "options": kept.get("options")}
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        live.run(_mount_words(params, f"/dev/{disk}", path), timeout_seconds=120, given=b"")
    return f"{path} is mounted again"
