"""A machine on paper: which dimms there are, what the firmware would say of them, and their images.

A machine file is TOML. Every key but ``path`` has the value QEMU would give it:

    [[dimm]]
    path = "nvdimm0.img"     # relative to the machine file
    label_size = "128K"      # at the end of the image; 0: none
    align = "2M"             # of the backend; the region is cut to a multiple of it
    slot = 0                 # QEMU's slot: handle slot + 1, serial 0x123456 + slot
    nature = "storage"       # what the device is: storage, memory or unknown
    numa_node = 0
    endurance = "20P"        # bytes that may be written to it in its life
    latency_ns = 300         # of a load
    bandwidth = "10G"        # bytes a second
    distance = 17            # as the SLIT has it: 10 is local

    [[region]]               # only for interleaved sets; otherwise each dimm is a region
    dimms = [0, 1]

Invariants:
1. The region of an image is its first ``align_down(size - label_size, align)`` bytes, and the label
   area its last ``label_size`` bytes, as QEMU has it.
2. Physical addresses follow QEMU: the first dimm at 4 GiB, each next one behind it, rounded up to
   its own alignment. They matter for alignment only.
3. A key that is not known is refused with the place where it stands.

What this does not do: read images (:mod:`pmemkit.bus.image`), except for the size of their files.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from pmemkit.errors import InvalidArgument
from pmemkit.formats.cookie import DimmIdentity
from pmemkit.units import format_size, parse_size

__all__ = [
    "DEFAULT_LABEL_SIZE",
    "FIRST_ADDRESS",
    "NATURES",
    "DimmSpec",
    "Machine",
    "checked",
    "load_machine",
    "to_toml",
]

DEFAULT_LABEL_SIZE: Final = 128 << 10
"""The least QEMU accepts."""
FIRST_ADDRESS: Final = 1 << 32
"""Where QEMU's pc machine plugs the first nvdimm when all RAM lies below 4 GiB."""
_FIRST_SERIAL: Final = 0x123456
_PAGE: Final = 4096
NATURES: Final = ("storage", "memory", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class DimmSpec:
    """One dimm of a machine. Sizes and addresses are bytes; ``None`` means "as QEMU has it"."""

    path: str
    label_size: int = 0
    align: int = _PAGE
    slot: int | None = None
    handle: int | None = None
    serial: int | None = None
    vendor_id: int = 0x8086
    device_id: int = 1
    manufacturing_date: int = 0
    manufacturing_location: int = 0
    nature: str = "unknown"
    numa_node: int = 0
    endurance: int | None = None
    latency_ns: int | None = None
    bandwidth: int | None = None
    distance: int | None = None
    unarmed: bool = False
    address: int | None = None
    region_offset: int = 0
    dpa: int = 0
    uuid: str | None = None

    def identity(self) -> DimmIdentity:
        """What goes into the interleave-set cookie."""
        return DimmIdentity(
            self.region_offset,
            self.serial_number,
            self.vendor_id,
            self.manufacturing_date,
            self.manufacturing_location,
        )

    @property
    def serial_number(self) -> int:
        """The serial number: that of the slot unless the file names one."""
        return _FIRST_SERIAL + (self.slot or 0) if self.serial is None else self.serial

    @property
    def id(self) -> str:
        """The dimm's id as the kernel prints it: vendor and serial number, bytes swapped."""
        vendor = self.vendor_id.to_bytes(2, "little").hex()
        serial = self.serial_number.to_bytes(4, "little").hex()
        if self.manufacturing_date or self.manufacturing_location:
            place = self.manufacturing_location.to_bytes(1, "little").hex()
            date = self.manufacturing_date.to_bytes(2, "little").hex()
            return f"{vendor}-{place}-{date}-{serial}"
        return f"{vendor}-{serial}"

    def region_size(self, file_size: int) -> int:
        """Bytes that the region of this dimm has when its image has ``file_size``."""
        return max(0, file_size - self.label_size) // self.align * self.align


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Dimms and how regions take their bytes from them."""

    dimms: tuple[DimmSpec, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    """Numbers of dimms. Empty: each dimm is a region of its own."""
    path: str | None = None
    sets: tuple[tuple[int, ...], ...] = field(init=False)
    """:attr:`regions` with the default filled in."""

    def __post_init__(self) -> None:
        named = [number for each in self.regions for number in each]
        for number in named:
            if not 0 <= number < len(self.dimms) or named.count(number) > 1:
                text = f"dimm {number} of a region is not there, or is in two regions"
                raise InvalidArgument(text, op="machine", path=self.path)
        alone = [(number,) for number in range(len(self.dimms)) if number not in named]
        object.__setattr__(self, "sets", tuple(sorted([*self.regions, *alone])))
        handles = [each.handle for each in self.dimms]
        if len(set(handles)) != len(handles):
            raise InvalidArgument(
                f"two dimms have the same handle: {handles}", op="machine", path=self.path
            )

    @classmethod
    def of(cls, dimms: Iterable[DimmSpec], **more: Any) -> "Machine":
        """A machine whose dimms without a slot get the numbers of their places."""
        numbered = []
        for place, dimm in enumerate(dimms):
            slot = place if dimm.slot is None else dimm.slot
            handle = slot + 1 if dimm.handle is None else dimm.handle
            numbered.append(replace(dimm, slot=slot, handle=handle))
        return cls(dimms=tuple(numbered), **more)

    def addresses(self, file_sizes: Iterable[int]) -> list[int]:
        """Where each dimm would be plugged, given the sizes of the images."""
        found, behind = [], FIRST_ADDRESS
        for dimm, file_size in zip(self.dimms, file_sizes, strict=True):
            unit = max(dimm.align, _PAGE)
            start = -(-behind // unit) * unit if dimm.address is None else dimm.address
            found.append(start)
            behind = start + dimm.region_size(file_size)
        return found


_SIZES = frozenset(
    {"label_size", "align", "endurance", "bandwidth", "address", "region_offset", "dpa"}
)
_KEYS = {each.name for each in fields(DimmSpec)}


def load_machine(path: str | os.PathLike[str]) -> Machine:
    """Reads a machine file. Raises :class:`InvalidArgument` that names what is wrong in it."""
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise InvalidArgument(f"is no TOML: {cause}", op="machine", path=name) from None
    unknown = sorted(set(document) - {"dimm", "region"})
    if unknown:
        raise _refusal(name, f"{unknown[0]!r} is not known; there are [[dimm]] and [[region]]")
    rows = document.get("dimm", [])
    if not isinstance(rows, list) or not rows:
        raise _refusal(name, "there is no [[dimm]]")
    dimms = [_dimm(name, number, row) for number, row in enumerate(rows)]
    regions = tuple(_region(name, row) for row in document.get("region", []))
    return Machine.of(dimms, regions=regions, path=name)


def _refusal(path: str, text: str) -> InvalidArgument:
    return InvalidArgument(text, op="machine", path=path)


def _region(path: str, row: Any) -> tuple[int, ...]:
    numbers = row.get("dimms") if isinstance(row, dict) and set(row) == {"dimms"} else None
    if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
        raise _refusal(path, f"[[region]] has dimms = [numbers] and nothing else, not {row!r}")
    return tuple(numbers)


def _dimm(machine: str, number: int, row: Mapping[str, Any]) -> DimmSpec:
    """One ``[[dimm]]``."""
    where = f"dimm {number}"
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise _refusal(machine, f"{where} has no path")
    values: dict[str, Any] = {"align": 2 << 20}
    for key, value in row.items():
        if key not in _KEYS:
            raise _refusal(machine, f"{where}: {key!r} is not one of {', '.join(sorted(_KEYS))}")
        values[key] = _value(machine, where, key, value)
    image = os.path.join(os.path.dirname(machine), values["path"])  # noqa: PTH118, PTH120
    return checked(replace(DimmSpec(**values), path=image), f"{machine}: {where}")


def _value(machine: str, where: str, key: str, value: Any) -> Any:
    """A value of the type that the key has."""
    wanted = {"path": str, "nature": str, "uuid": str, "unarmed": bool}.get(key, int)
    if key in _SIZES and isinstance(value, str):
        return parse_size(value)
    if type(value) is not wanted:
        raise _refusal(machine, f"{where}: {key} = {value!r} is no {wanted.__name__}")
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        raise _refusal(machine, f"{where}: {key} = {value} is out of range")
    return value


def checked(dimm: DimmSpec, where: str) -> DimmSpec:
    """The dimm, if its values make sense together."""
    limits = (
        ("slot", dimm.slot or 0, 255),
        ("handle", dimm.handle or 0, 0xFFFFFFFF),
        ("serial", dimm.serial_number, 0xFFFFFFFF),
        ("vendor_id", dimm.vendor_id, 0xFFFF),
        ("device_id", dimm.device_id, 0xFFFF),
        ("manufacturing_date", dimm.manufacturing_date, 0xFFFF),
        ("manufacturing_location", dimm.manufacturing_location, 0xFF),
    )
    for key, value, most in limits:
        if not 0 <= value <= most:
            raise InvalidArgument(f"{where}: {key} = {value} is more than {most}", op="machine")
    for key in ("latency_ns", "bandwidth", "distance"):
        if getattr(dimm, key) == 0:
            raise InvalidArgument(f"{where}: {key} = 0 is none that a dimm has", op="machine")
    if dimm.nature not in NATURES:
        choices = ", ".join(NATURES)
        raise InvalidArgument(f"{where}: nature {dimm.nature!r} is none of {choices}", op="machine")
    if dimm.align < _PAGE or dimm.align & (dimm.align - 1):
        text = f"{where}: align {dimm.align} is no power of two from {_PAGE} on"
        raise InvalidArgument(text, op="machine")
    if dimm.label_size % 4:
        text = f"{where}: a label area of {dimm.label_size} bytes is no multiple of 4"
        raise InvalidArgument(text, op="machine")
    return dimm


def to_toml(machine: Machine, directory: str) -> str:
    """The machine file, with image paths relative to ``directory`` where they lie below it."""
    lines = ["# Dimms and what the firmware says of them; pmem qemu-args attaches exactly these."]
    for dimm in machine.dimms:
        path = os.path.relpath(dimm.path, directory)
        path = os.path.abspath(dimm.path) if path.startswith("..") else path  # noqa: PTH100
        lines += ["", "[[dimm]]", f"path = {_quoted(path)}"]
        for each in fields(DimmSpec):
            value = getattr(dimm, each.name)
            always = each.name in ("label_size", "align", "slot", "nature", "numa_node")
            if each.name == "path" or value is None or (value == each.default and not always):
                continue
            lines.append(f"{each.name} = {_literal(each.name, value)}")
    for region in machine.regions:
        lines += ["", "[[region]]", f"dimms = {list(region)}"]
    return "\n".join(lines) + "\n"


def _literal(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if key in ("serial", "vendor_id", "address"):
        return hex(value)
    if key in _SIZES and value >= 1024:
        return _quoted(format_size(value).replace(" ", "")) if _is_round(value) else str(value)
    return str(value)


def _is_round(value: int) -> bool:
    try:
        return parse_size(format_size(value)) == value
    except InvalidArgument:
        return False


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
