"""What this machine says of a file: MAP_SYNC, persistence domains, and what forgets.

Every answer comes from the kernel: a probing mapping, sysfs, and the mount table. The roots of
sysfs and proc can be replaced by trees of a test.

What this does not do: decide (:mod:`pmemkit.media.granularity` does), write anything.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

__all__ = ["LinuxPlatform"]

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_MEMORY_DISKS = re.compile(r"(ram|zram)\d+")
_REGION = re.compile(r"region\d+")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


class LinuxPlatform:
    """The running machine, or what two directories say of one."""

    def __init__(self, sysfs: str | Path = "/sys", proc: str | Path = "/proc") -> None:
        self._sysfs = Path(sysfs)
        self._proc = Path(proc)

    def map_sync_granted(self, fd: int) -> bool:
        """Whether the kernel grants a ``MAP_SYNC`` mapping of this file."""
        from pmemkit._native import media

        return media.map_sync_granted(fd)

    def persistence_domains(self) -> Mapping[str, str]:
        """The persistence domain of every region the kernel knows; empty for what does not say."""
        devices = self._sysfs / "bus" / "nd" / "devices"
        try:
            names = sorted(os.listdir(devices))  # noqa: PTH208 - names, not paths
        except OSError:
            return {}
        return {
            name: _text(devices / name / "persistence_domain") or ""
            for name in names
            if _REGION.fullmatch(name)
        }

    def volatile_because(self, fd: int) -> str | None:
        """Why the content of this file does not outlive a restart, if it does not."""
        device = self._device_directory(fd)
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            if device is not None and _MEMORY_DISKS.fullmatch(device.name):
                return f"{device.name} is a disk in memory"
            return None
        if stat.S_ISCHR(status.st_mode):
            if device is None or "ndbus" in str(device):
                return None
            return f"{device.name} is memory and not on an nvdimm bus"
        kind = self._file_system(fd)
        return f"the file is on {kind}, which is memory" if kind in _MEMORY_FILE_SYSTEMS else None

    def persistence_domain_of(self, fd: int) -> str | None:
        """The persistence domain of the nvdimm region under this file or device, if any."""
        device = self._device_directory(fd)
        if device is None or "ndbus" not in str(device):
            return None
        region = self._region_directory(device)
        return (region and _text(region / "persistence_domain")) or "unknown"

    def deep_flush_control(self, fd: int) -> Path | None:
        """The file that flushes the memory controllers of the nvdimm region under this file."""
        device = self._device_directory(fd)
        region = self._region_directory(device) if device is not None else None
        control = region / "deep_flush" if region is not None else None
        return control if control is not None and control.exists() else None

    @staticmethod
    def _region_directory(device: Path) -> Path | None:
        places = (device, *device.parents)
        return next((place for place in places if _REGION.fullmatch(place.name)), None)

    def device_dax_size(self, fd: int) -> int | None:
        """Bytes of a device DAX; ``None`` for any other character device."""
        device = self._device_directory(fd)
        if device is None or _text(device / "align") is None:
            return None
        text = _text(device / "size") or ""
        return int(text) if text.isdigit() else None

    def _device_directory(self, fd: int) -> Path | None:
        """Where sysfs has the device itself, or the disk that the file is on."""
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode):
            kind, number = "char", status.st_rdev
        else:
            kind = "block"
            number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        link = self._sysfs / "dev" / kind / f"{os.major(number)}:{os.minor(number)}"
        return link.resolve() if link.exists() else None

    def _file_system(self, fd: int) -> str | None:
        """The type of the file system, from the mount the descriptor was opened through."""
        described = _text(self._proc / "self" / "fdinfo" / str(fd)) or ""
        mount = re.search(r"^mnt_id:\s*(\d+)$", described, re.MULTILINE)
        if mount is None:
            return None
        for line in (_text(self._proc / "self" / "mountinfo") or "").splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split(" ", 1)[0] == mount.group(1):
                return rest.split(" ", 1)[0]
        return None
