"""Who uses a device or a node's memory: mounts, dm and md, loop devices, swap, processes.

Everything is found by looking; what another user's process has may stay unseen without root.

What this does not do: stop anyone.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pmemkit.bus.sysfs import Node
from pmemkit.units import format_size

__all__ = ["Holder", "Holders", "holders_of_node", "hugetlb_of_node"]

_MAPS_SIZE = 64 << 20


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A process with pages on a node."""

    bytes_held: int
    pid: int
    name: str
    locked: bool = False
    """It has locked or pinned some of its memory."""

    def __str__(self) -> str:
        locked = ", locked" if self.locked else ""
        return f"{self.name} ({self.pid}): {format_size(self.bytes_held)}{locked}"


@dataclass
class Holders:
    """The users of block and character devices, looked up together: every process is visited
    once."""

    sysfs: Path = Path("/sys")
    proc: Path = Path("/proc")
    opened: dict[str, list[str]] = field(default_factory=dict)
    """Processes by the path that they have open or mapped, ``fio (123)``."""

    @classmethod
    def look(
        cls, devices: Iterable[str], sysfs: str | Path = "/sys", proc: str | Path = "/proc"
    ) -> "Holders":
        """Looks who has these paths (``/dev/pmem0``) open, or mapped."""
        found = cls(Path(sysfs), Path(proc))
        wanted = frozenset(devices)
        for pid in _pids(found.proc) if wanted else ():
            for path in _paths_of(found.proc / str(pid), wanted):
                name = f"{_name(found.proc, pid)} ({pid})"
                found.opened.setdefault(path, []).append(name)
        return found

    def mounts(self, disk: str) -> tuple[str, ...]:
        """Mount points of a disk and its partitions."""
        numbers = {node.text("dev") for node in self._parts(disk)}
        paths = {f"/dev/{node.name}" for node in self._parts(disk)}
        found = []
        for line in _lines(self.proc / "self" / "mountinfo"):
            words, _, rest = line.partition(" - ")
            fields, source = words.split(), rest.split()
            if len(fields) < 5:
                continue
            # A file system on several devices has a number of its own, so its source counts too.
            if fields[2] in numbers or (len(source) > 1 and source[1] in paths):
                found.append(_unescaped(fields[4]))
        return tuple(dict.fromkeys(found))

    def of_disk(self, disk: str) -> tuple[str, ...]:
        """What uses a disk and its partitions, but mounts: ``dm-0``, ``loop3``, ``swap``,
        ``process fio (123)``."""
        parts = self._parts(disk)
        paths = {f"/dev/{node.name}" for node in parts}
        found = []
        for node in parts:
            holders = node.place / "holders"
            found += sorted(each.name for each in holders.iterdir()) if holders.is_dir() else []
        for loop in Node("block", self.sysfs / "block").below(r"loop\d+"):
            if (loop.text("loop/backing_file") or "") in paths:
                found.append(loop.name)
        for line in _lines(self.proc / "swaps")[1:]:
            if _unescaped(line.split(" ")[0].split("\t")[0]) in paths:
                found.append("swap")
        for path in sorted(paths):
            found += self.of_path(path)
        return tuple(dict.fromkeys(found))

    def of_path(self, path: str) -> tuple[str, ...]:
        """Processes that have a device open, or mapped."""
        return tuple(f"process {each}" for each in self.opened.get(path, ()))

    def _parts(self, disk: str) -> list[Node]:
        place = self.sysfs / "class" / "block" / disk
        if not place.exists():
            place = self.sysfs / "block" / disk
        whole = Node(disk, place.resolve())
        return [whole, *whole.below(re.escape(disk) + r"p\d+")]


def holders_of_node(node: int, proc: str | Path = "/proc") -> list[Holder]:
    """Processes with pages on a NUMA node, those with the most first."""
    found = []
    for pid in _pids(Path(proc)):
        held, locked = 0, False
        page = re.compile(rf"\bN{node}=(\d{{1,15}})\b")
        for line in _lines(Path(proc) / str(pid) / "numa_maps"):
            pages = page.search(line)
            if pages is None:
                continue
            size = re.search(r"\bkernelpagesize_kB=(\d{1,9})\b", line)
            held += int(pages[1]) * (int(size[1]) if size else 4) << 10
        if held:
            status = "\n".join(_lines(Path(proc) / str(pid) / "status"))
            words = re.search(r"^Vm(?:Lck|Pin):\s+[1-9]", status, re.MULTILINE)
            locked = words is not None
            found.append(Holder(held, pid, _name(Path(proc), pid), locked))
    return sorted(found, reverse=True)


def hugetlb_of_node(node: int, sysfs: str | Path = "/sys") -> int:
    """Bytes of the pool of huge pages on a node."""
    place = Path(sysfs) / "devices" / "system" / "node" / f"node{node}" / "hugepages"
    total = 0
    for size in Node("hugepages", place).below(r"hugepages-\d+kB"):
        kib = re.findall(r"\d+", size.name)
        total += size.size("nr_hugepages", 10) * (int(kib[0]) << 10)
    return total


def _pids(proc: Path) -> list[int]:
    try:
        numbers = [int(each.name) for each in proc.iterdir() if each.name.isdecimal()]
    except OSError:
        return []
    return sorted(number for number in numbers if number != os.getpid())


def _name(proc: Path, pid: int) -> str:
    lines = _lines(proc / str(pid) / "comm")
    return "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else "?"


def _paths_of(process: Path, wanted: frozenset[str]) -> set[str]:
    """Those of the wanted paths that a process has open or mapped. It may end meanwhile."""
    found = set()
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target in wanted:
                found.add(target)
    except OSError:
        pass
    for line in _lines(process / "maps"):
        words = line.split(None, 5)
        if len(words) == 6 and words[5] in wanted:
            found.add(words[5])
    return found


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            return file.read(_MAPS_SIZE).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    """A path of mountinfo or swaps, whose blanks and such are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
