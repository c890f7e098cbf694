"""Trees like ``/sys`` and ``/proc`` in a directory, for tests of what reads them.

What this does not do: behave. A test that wants an effect writes it.
"""

from pathlib import Path

__all__ = ["Tree"]


class Tree:
    """Devices below ``devices``, with links to them on their buses."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sysfs = root / "sys"
        self.proc = root / "proc"
        self.dev = root / "dev"
        for place in (self.sysfs, self.proc / "self", self.dev):
            place.mkdir(parents=True)
        self.put(self.proc / "self" / "mountinfo", "")

    def put(self, path: Path, text: object) -> Path:
        """A file with a line, and the directories above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
        return path

    def device(
        self, bus: str, place: str, *, driver: str | None = None, **attributes: object
    ) -> Path:
        """A device at ``devices/PLACE`` with a link on its bus. In the names of attributes ``__``
        stands for a slash."""
        path = self.sysfs / "devices" / place
        path.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            self.put(path / name.replace("__", "/"), value)
        link = self.sysfs / "bus" / bus / "devices" / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)
        self.bind(bus, path, driver)
        return path

    def bind(self, bus: str, device: Path, driver: str | None) -> None:
        """Gives a device to a driver, or to none."""
        link = device / "driver"
        link.unlink(missing_ok=True)
        if driver is not None:
            target = self.sysfs / "bus" / bus / "drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

    def block(self, number: int, state: str, zones: str, node: int | None = None) -> Path:
        """A memory block."""
        place = self.sysfs / "devices" / "system" / "memory" / f"memory{number}"
        self.put(place / "state", state)
        self.put(place / "valid_zones", zones)
        if node is not None:
            nodes = self.node(node)
            if not (nodes / place.name).is_symlink():
                (nodes / place.name).symlink_to(place)
        return place

    def node(self, number: int, **kib: int) -> Path:
        """A NUMA node with lines of its ``meminfo``."""
        place = self.sysfs / "devices" / "system" / "node" / f"node{number}"
        place.mkdir(parents=True, exist_ok=True)
        if kib:
            lines = (f"Node {number} {name}: {value:>10} kB" for name, value in kib.items())
            self.put(place / "meminfo", "\n".join(lines))
        return place

    def disk(self, name: str, number: str = "259:0") -> Path:
        """A block device."""
        place = self.sysfs / "devices" / "virtual" / "block" / name
        self.put(place / "dev", number)
        (place / "holders").mkdir(exist_ok=True)
        for link in (self.sysfs / "block" / name, self.sysfs / "class" / "block" / name):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place)
        return place

    def process(self, pid: int, name: str, **files: str) -> Path:
        """A process with files such as ``numa_maps``; ``opened`` is a path that it has open."""
        place = self.proc / str(pid)
        self.put(place / "comm", name)
        opened = files.pop("opened", None)
        (place / "fd").mkdir(exist_ok=True)
        if opened is not None:
            (place / "fd" / "3").symlink_to(opened)
        for each, text in files.items():
            self.put(place / each, text)
        return place
