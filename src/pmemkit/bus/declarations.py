"""What the owner of a running machine declares of its dimms and regions.

The file is a machine file whose dimms need no image: what is matched is the hardware. Every
``[[dimm]]`` names it by one or several of ``serial``, ``handle``, ``id`` and ``region``, all of
which have to fit, and says what sysfs cannot:

    [[dimm]]
    serial = 0x123456        # as in the NFIT, or as the kernel prints it (its bytes swapped)
    nature = "memory"
    endurance = "20P"        # bytes that may be written to this dimm in its life
    latency_ns = 300         # of a load from it
    bandwidth = "10G"        # bytes a second, of loads
    distance = 17            # as the SLIT has it: 10 is local

    [[dimm]]
    region = "region1"       # a whole region, also of CXL or DAX; its number may change at a boot
    nature = "storage"

A ``[[dimm]]`` with a ``path`` is one of a virtual machine; inside it, it is found by the serial
number and the handle that QEMU gives it, so that a machine file describes its images and, copied
into the guest, its dimms.

Invariants:
1. A declaration that fits nothing declares nothing; one that cannot be understood is refused with
   the line where it stands.
2. What root follows can be written by root alone (:mod:`pmemkit.trust`).

What this does not do: weigh declarations against what devices say (:mod:`pmemkit.bus.nature`).
"""

import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pmemkit.bus.machine import NATURES, DimmSpec
from pmemkit.bus.nature import Evidence, Nature, Statement, stated_evidence
from pmemkit.errors import InvalidArgument
from pmemkit.trust import read_trusted
from pmemkit.units import parse_size

__all__ = [
    "DECLARATIONS",
    "Declaration",
    "DimmIdentity",
    "RegionIdentity",
    "declared_evidence",
    "load_declarations",
    "parse_declarations",
]

DECLARATIONS: Final = "/etc/pmemkit/machine.toml"
"""Where the declarations of a machine are."""

_SIZE_MOST: Final = 1 << 20
_MATCHING: Final = ("serial", "handle", "id", "region")
_SPEED: Final = ("latency_ns", "bandwidth", "distance")
_SAYING: Final = ("nature", "endurance", *_SPEED)
_LIMITS: Final = {"serial": 1 << 64, "handle": 1 << 32, "slot": 256}
_LIMITS_SPEED: Final = {"latency_ns": 1 << 32, "distance": 256}
_OF_IMAGES: Final = frozenset(DimmSpec.__dataclass_fields__)


class DimmIdentity(Protocol):
    """How a dimm, or CXL memory device, is told from others."""

    @property
    def dev(self) -> str:
        """Its name."""

    @property
    def id(self) -> str | None:
        """As the kernel prints it."""

    @property
    def serial(self) -> int | None:
        """As the kernel prints it."""

    @property
    def handle(self) -> int | None:
        """Of the NFIT."""


class RegionIdentity(Protocol):
    """A region with the dimms that it takes its bytes from."""

    @property
    def dev(self) -> str:
        """Its name."""

    @property
    def dimms(self) -> Sequence[DimmIdentity]:
        """In any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """One ``[[dimm]]``. What is ``None`` is not said."""

    source: str
    """The file and the line."""
    serial: int | None = None
    handle: int | None = None
    id: str | None = None
    region: str | None = None
    nature: Nature | None = None
    endurance: int | None = None
    latency_ns: int | None = None
    bandwidth: int | None = None
    distance: int | None = None

    @property
    def of_dimms(self) -> bool:
        """True where it names dimms, False where it is of a whole region."""
        return (self.serial, self.handle, self.id) != (None, None, None)

    def fits(self, region: RegionIdentity, dimm: DimmIdentity | None) -> bool:
        """True where all that it names is so."""
        if self.region is not None and self.region != region.dev:
            return False
        if dimm is None:
            return not self.of_dimms
        return (
            self.of_dimms
            and self.serial in (None, *_both_orders(dimm.serial))
            and self.handle in (None, dimm.handle)
            and (self.id is None or self.id.lower() == (dimm.id or "").lower())
        )

    @property
    def statement(self) -> Statement:
        """What it says."""
        return Statement(self.source, self.nature, self.endurance)


def _both_orders(serial: int | None) -> tuple[int, ...]:
    """A serial number of the NFIT, which the kernel prints with its bytes swapped."""
    if serial is None:
        return ()
    if not 0 <= serial < 1 << 32:
        return (serial,)
    return serial, int.from_bytes(serial.to_bytes(4, "little"), "big")


def declared_evidence(
    declarations: Iterable[Declaration], region: RegionIdentity
) -> list[Evidence]:
    """What is declared of a region and of its dimms."""
    declared = tuple(declarations)
    by_dimm = [
        [each.statement for each in declared if each.fits(region, dimm)] for dimm in region.dimms
    ]
    whole = [each.statement for each in declared if each.fits(region, None)]
    return stated_evidence(by_dimm) + (stated_evidence([whole]) if whole else [])


# --- the file ------------------------------------------------------------------------------------


def load_declarations(path: str | None = None) -> tuple[Declaration, ...]:
    """The declarations of a file; without ``path`` those of the machine, which may have none.

    Raises :class:`InvalidArgument` that names the line, and where root reads a file that others can
    write; ``SystemFailure`` where a file that was named is not there.
    """
    if path is None and not os.path.lexists(DECLARATIONS):
        return ()
    name = DECLARATIONS if path is None else path
    check = os.geteuid() == 0
    data = read_trusted(name, _SIZE_MOST, check=check, op="declare", what="a machine file")
    if len(data) > _SIZE_MOST:
        raise _refusal(name, f"is longer than {_SIZE_MOST} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise _refusal(name, f"is no UTF-8: {cause.reason} at byte {cause.start}") from None
    return parse_declarations(text, name)


def parse_declarations(text: str, path: str) -> tuple[Declaration, ...]:
    """The declarations in the text of a machine file."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as cause:
        raise _refusal(path, f"is no TOML: {cause}") from None
    unknown = sorted(set(document) - {"dimm", "region"})
    if unknown:
        raise _refusal(path, f"{unknown[0]!r} is not known; there are [[dimm]] and [[region]]")
    rows = document.get("dimm", [])
    if not isinstance(rows, list) or not rows:
        raise _refusal(path, "there is no [[dimm]]")
    heads = [
        number
        for number, line in enumerate(text.splitlines(), 1)
        if re.match(r"\s*\[\[\s*dimm\s*\]\]", line)
    ]
    # Dimms that are written otherwise, as a list of tables, are called by their numbers.
    lines = heads if len(heads) == len(rows) else []
    found = []
    for number, row in enumerate(rows):
        where = f"{path}:{lines[number]}" if lines else f"{path}, dimm {number}"
        found.append(_declaration(where, number, row))
    return tuple(found)


def _refusal(where: str, text: str) -> InvalidArgument:
    return InvalidArgument(text, op="declare", path=where)


def _declaration(where: str, number: int, row: Any) -> Declaration:
    """One ``[[dimm]]``, checked."""
    if not isinstance(row, dict):
        raise _refusal(where, f"dimm {number} is no table")
    image = "path" in row
    known = _OF_IMAGES if image else frozenset((*_MATCHING, *_SAYING))
    for key in row:
        if key not in known:
            which = "with a path" if image else "without a path"
            choices = ", ".join(sorted(known))
            raise _refusal(where, f"{key!r} is none of a dimm {which}: {choices}")
    values = {key: _value(where, key, row[key]) for key in (*_MATCHING, *_SAYING) if key in row}
    if image:
        slot = _value(where, "slot", row.get("slot", number))
        spec = DimmSpec(path="", slot=slot, serial=values.get("serial"))
        values = {"serial": spec.serial_number, "handle": slot + 1} | values
    elif not set(_MATCHING) & set(row):
        raise _refusal(where, f"names nothing that it is of: {', '.join(_MATCHING)}")
    elif not set(_SAYING) & set(row):
        raise _refusal(where, f"says nothing: {', '.join(_SAYING)}")
    if values.get("nature") == "unknown":
        values["nature"] = None
    return Declaration(source=where, **values)


def _value(where: str, key: str, value: Any) -> Any:
    """A value of the type that the key has."""
    if key in ("nature", "id", "region"):
        if not isinstance(value, str) or not value:
            raise _refusal(where, f"{key} = {value!r} is no text")
        if key == "nature" and value not in NATURES:
            raise _refusal(where, f"nature {value!r} is none of {', '.join(NATURES)}")
        if key == "region" and re.fullmatch(r"[A-Za-z_]+[\d.]+", value) is None:
            raise _refusal(where, f"region {value!r} is no name of a region, such as region0")
        return value
    if key in ("endurance", "bandwidth"):
        return _count(where, key, value)
    if key in _SPEED:
        if type(value) is not int or not 0 < value < _LIMITS_SPEED[key]:
            text = f"{key} = {value!r} is no number from 1 to {_LIMITS_SPEED[key] - 1}"
            raise _refusal(where, text)
        return value
    if type(value) is not int:
        raise _refusal(where, f"{key} = {value!r} is no whole number")
    if not 0 <= value < _LIMITS[key]:
        raise _refusal(where, f"{key} = {value} is not between 0 and {_LIMITS[key] - 1}")
    return value


def _count(where: str, key: str, value: Any) -> int:
    if isinstance(value, str):
        try:
            value = parse_size(value)
        except InvalidArgument as cause:
            raise _refusal(where, f"{key}: {cause.message}") from None
    if type(value) is not int or not 0 < value < 1 << 63:
        raise _refusal(where, f'{key} = {value!r} is no count of bytes, such as "20P"')
    return value
