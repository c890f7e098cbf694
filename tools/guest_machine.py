"""What the guest's machine is made of: memory, NUMA nodes, NVDIMMs, CXL devices; QEMU's options.

Without NUMA nodes and CXL devices it is QEMU's ``pc``, which boots fastest. A CXL machine is a
``q35`` with one host bridge, a root port for each device, and one window of addresses that holds
all of them; regions are made in it by the guest.

What this does not do: look into images, apart from a label area's size that is to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.guest_packages import GuestError

__all__ = ["CxlDevice", "Dimm", "Machine", "guess_label_size", "parse_size"]

CXL_UNIT = 256 << 20
"""CXL devices and windows come in multiples of it."""

_MIB, _GIB = 1 << 20, 1 << 30
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LABEL_SIZE = 128 << 10
_INDEX_SIGNATURE = b"NAMESPACE_INDEX\0"


def parse_size(text: str) -> int:
    """Bytes of ``64M``, ``1G``, ``4096``, as QEMU reads them."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise GuestError(f"{text!r} is not a size such as 4096, 128K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2]]


def _option(kind: str, values: Mapping[str, object]) -> str:
    """``kind,key=value,…`` without the values that are ``None``; commas in them are doubled."""
    given = ((key, str(value)) for key, value in values.items() if value is not None)
    return ",".join([kind, *(f"{key}={value.replace(',', ',,')}" for key, value in given)])


def _options(text: str, what: str, known: set[str]) -> dict[str, str]:
    values = dict(option.partition("=")[::2] for option in text.split(",")) if text else {}
    if unknown := values.keys() - known:
        raise GuestError(f"{what} has no option {', '.join(sorted(unknown))}")
    return values


def _file_backend(name: str, path: Path | str, size_bytes: int, **more: object) -> list[str]:
    values = {"id": name, "share": "on", "mem-path": path, "size": size_bytes, **more}
    return ["-object", _option("memory-backend-file", values)]


# --- NVDIMMs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dimm:
    """One NVDIMM of the guest, kept in an image file."""

    path: Path | str
    size_bytes: int | None = None
    """Of the memory backend; the whole file by default."""
    label_size_bytes: int | None = None
    """Of the label area at the end of the backend; without it the dimm has none."""
    align: str | None = "2M"
    """Alignment of the backend's mapping; ``None`` leaves it to QEMU (one page)."""
    slot: int | None = None
    uuid: str | None = None
    unarmed: bool = False
    readonly: bool = False
    node: int | None = None
    """Its NUMA node, which may be one of its own: nothing else need be on it."""

    def arguments(self, index: int) -> list[str]:
        """The QEMU options that attach it."""
        device = {
            "id": f"nv{index}",
            "memdev": f"mem{index}",
            "node": self.node,
            "label-size": self.label_size_bytes or None,
            "slot": self.slot,
            "uuid": self.uuid,
            "unarmed": "on" if self.unarmed or self.readonly else None,
        }
        backend = _file_backend(
            f"mem{index}",
            self.path,
            self.backend_bytes,
            align=self.align or None,
            readonly="on" if self.readonly else None,
        )
        return [*backend, "-device", _option("nvdimm", device)]

    @property
    def backend_bytes(self) -> int:
        """Size of the memory backend."""
        return Path(self.path).stat().st_size if self.size_bytes is None else self.size_bytes

    @classmethod
    def parse(cls, text: str) -> Dimm:
        """Reads ``PATH[,size=S][,label-size=S|auto][,align=S|none][,slot=N][,unarmed]…``."""
        path, _, rest = text.partition(",")
        known = {"size", "label-size", "align", "slot", "uuid", "unarmed", "readonly", "node"}
        values = _options(rest, "a dimm", known)
        if not Path(path).is_file():
            raise GuestError(f"there is no image {path}")
        size = parse_size(values["size"]) if "size" in values else None
        label = values.get("label-size", "auto")
        return cls(
            path,
            size_bytes=size,
            label_size_bytes=guess_label_size(Path(path), size)
            if label == "auto"
            else parse_size(label),
            align=None if values.get("align") == "none" else values.get("align", "2M"),
            slot=int(values["slot"]) if "slot" in values else None,
            uuid=values.get("uuid"),
            unarmed="unarmed" in values,
            readonly="readonly" in values,
            node=int(values["node"]) if "node" in values else None,
        )


def guess_label_size(path: Path, size_bytes: int | None = None) -> int | None:
    """128 KiB where an index block stands that far from the end, otherwise no label area."""
    size = path.stat().st_size if size_bytes is None else size_bytes
    if size <= _LABEL_SIZE:
        return None
    with path.open("rb") as image:
        for index_offset in (0, 256):
            image.seek(size - _LABEL_SIZE + index_offset)
            if image.read(len(_INDEX_SIGNATURE)) == _INDEX_SIGNATURE:
                return _LABEL_SIZE
    return None


# --- CXL devices ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CxlDevice:
    """One CXL memory device (type 3): a volatile part, a persistent part, or both."""

    volatile: Path | int | None = None
    """An image file, or the size in bytes of memory that is forgotten when the guest ends."""
    persistent: Path | None = None
    lsa: Path | None = None
    """The label storage area; a persistent part must have one."""
    serial: int | None = None
    """``None`` numbers the devices from 1."""

    def arguments(self, index: int) -> list[str]:
        """The QEMU options that attach it to a root port of its own."""
        name = f"cxl{index}"
        serial = index + 1 if self.serial is None else self.serial
        objects, device = [], {"bus": f"{name}-port", "id": name, "sn": serial}
        if isinstance(self.volatile, int):
            values = {"id": f"{name}-ram", "size": self.volatile}
            objects += ["-object", _option("memory-backend-ram", values)]
        for part, path in (("ram", self.volatile), ("pmem", self.persistent), ("lsa", self.lsa)):
            if path is not None and not isinstance(path, int):
                objects += _file_backend(f"{name}-{part}", path, path.stat().st_size)
        for key, part, given in (
            ("volatile-memdev", "ram", self.volatile),
            ("persistent-memdev", "pmem", self.persistent),
            ("lsa", "lsa", self.lsa),
        ):
            device |= {key: f"{name}-{part}"} if given is not None else {}
        port = {"port": index, "bus": "cxl-bridge", "id": f"{name}-port", "chassis": 0}
        return [
            *objects,
            *("-device", _option("cxl-rp", {**port, "slot": index + 2})),
            *("-device", _option("cxl-type3", device)),
        ]

    @property
    def size_bytes(self) -> int:
        """Of both parts."""
        parts = (each for each in (self.volatile, self.persistent) if each is not None)
        return sum(each if isinstance(each, int) else each.stat().st_size for each in parts)

    def check(self) -> None:
        """Raises `GuestError` for what QEMU or the kernel would refuse with less to say."""
        if self.size_bytes == 0 or self.size_bytes % CXL_UNIT:
            raise GuestError("a CXL device's size is not a multiple of 256 MiB")
        if (self.persistent is None) != (self.lsa is None):
            raise GuestError("a CXL device has persistent memory with a label area, or neither")

    @classmethod
    def parse(cls, text: str) -> CxlDevice:
        """Reads ``[volatile=PATH|SIZE][,persistent=PATH,lsa=PATH][,serial=N]``."""
        known = {"volatile", "persistent", "lsa", "serial"}
        values = _options(text, "a CXL device", known)
        paths = {name: Path(value) for name, value in values.items() if name != "serial"}
        for name, path in paths.items():
            if name != "volatile" and not path.is_file():
                raise GuestError(f"there is no image {path}")
        volatile: Path | int | None = paths.get("volatile")
        if isinstance(volatile, Path) and not volatile.is_file():
            volatile = parse_size(values["volatile"])
        serial = int(values["serial"], 0) if "serial" in values else None
        return cls(volatile, paths.get("persistent"), paths.get("lsa"), serial)


# --- the machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Everything of it but the kernel and the ports through which steps and results go."""

    dimms: Sequence[Dimm] = ()
    cxl: Sequence[CxlDevice] = ()
    memory: str = "1G"
    cpus: int = 1
    nodes: Sequence[str] = ()
    """Ordinary memory of each NUMA node, which adds up to ``memory``; ``"0"`` is one without.

    If it is empty, all memory is on node 0, and there are nodes for the dimms that name one. A CXL
    machine has a node 0 always: only then does Linux give the CXL window a node of its own.
    """

    def arguments(self) -> list[str]:
        """The QEMU options."""
        kind = "q35,cxl=on" if self.cxl else "pc"
        # Linux makes no CXL region where it sees a hypervisor: it could not flush the caches then.
        processor = "max,hypervisor=off" if self.cxl else "max"
        return [
            *("-machine", f"{kind},nvdimm=on,accel=tcg", "-cpu", processor),
            *("-smp", str(self.cpus)),
            *("-m", self._memory()),
            *self._numa(),
            *(word for index, dimm in enumerate(self.dimms) for word in dimm.arguments(index)),
            *self._cxl(),
        ]

    def _nodes(self) -> Sequence[str]:
        named = [dimm.node for dimm in self.dimms if dimm.node is not None]
        if self.nodes or not (named or self.cxl):
            return self.nodes
        return [self.memory, *["0"] * max(named, default=0)]

    def _memory(self) -> str:
        size = sum(map(parse_size, self._nodes())) or parse_size(self.memory)
        if not self.dimms:
            return f"{size // _MIB}M"
        # A dimm may be moved up to the next GiB; QEMU wants addresses for that, not memory.
        room = sum(-(-dimm.backend_bytes // _GIB) + 1 for dimm in self.dimms) * _GIB
        named = (dimm.slot + 1 for dimm in self.dimms if dimm.slot is not None)
        slots = max([len(self.dimms), *named])
        return f"{size // _MIB}M,slots={slots},maxmem={(size + room) // _MIB}M"

    def _numa(self) -> list[str]:
        words = []
        for number, size in enumerate(self._nodes()):
            node: dict[str, object] = {"nodeid": number}
            if number == 0:
                node["cpus"] = f"0-{self.cpus - 1}"
            if parse_size(size):
                node["memdev"] = f"node{number}"
                values = {"id": f"node{number}", "size": parse_size(size)}
                words += ["-object", _option("memory-backend-ram", values)]
            words += ["-numa", _option("node", node)]
        return words

    def _cxl(self) -> list[str]:
        if not self.cxl:
            return []
        for device in self.cxl:
            device.check()
        # The guest chooses what goes where; twice the sum leaves it room to fail to be tidy.
        gibs = 2 * -(-sum(device.size_bytes for device in self.cxl) // _GIB)
        window = {"targets.0": "cxl-bridge", "size": f"{gibs}G"}
        settings = ",".join(f"cxl-fmw.0.{key}={value}" for key, value in window.items())
        bridge = {"bus_nr": 12, "bus": "pcie.0", "id": "cxl-bridge"}
        return [
            *("-machine", settings, "-device", _option("pxb-cxl", bridge)),
            *(word for index, device in enumerate(self.cxl) for word in device.arguments(index)),
        ]
