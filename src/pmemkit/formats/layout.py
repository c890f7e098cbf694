"""On-media structures as tables: one class a format, one attribute a field.

A format is a frozen dataclass derived from :class:`Layout`; each attribute is declared with
:func:`at`, which says where the field lies, how wide it is, what kind of value it holds and which
rule it obeys. Everything else is made from this one table: packing and unpacking, the checksum, the
documents under ``docs/formats``, the comparison with the Rust core's structures, and the list of
single-field corruptions that tests and fuzzers apply.

All integers are little endian. ``uuid`` fields are in text order (RFC 4122), ``guid`` fields in EFI
order (first three groups byte-swapped).

What this does not do: I/O; judge values (each format module has a function that returns
:class:`Fault` records).
"""

import dataclasses
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pmemkit.errors import Corrupt
from pmemkit.formats.checksum import fletcher64

__all__ = ["Clear", "Fault", "Field", "Kind", "Layout", "at", "corruptions", "require"]

Kind = Literal["int", "bytes", "text", "uuid", "guid", "zero", "checksum"]


class Field(NamedTuple):
    """Where a field lies and what it may hold. Offsets and widths are bytes."""

    name: str
    offset: int
    width: int
    kind: Kind
    rule: str
    """What a reader demands of it, as the documents print it; empty: any value."""
    wrong: tuple[Any, ...]
    """Values that break the rule wherever the structure lies."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.width


def at(
    offset: int,
    width: int,
    kind: Kind = "int",
    *,
    rule: str = "",
    wrong: tuple[Any, ...] = (),
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declares a field of a :class:`Layout`. ``zero`` and ``checksum`` fields need no value."""
    if default is dataclasses.MISSING and kind in ("zero", "checksum"):
        default = 0 if kind == "checksum" else bytes(width)
    metadata = {"layout": (offset, width, kind, rule, wrong)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Clear:
    """A range of a layout that reads as zeroes. Bytes."""

    offset: int
    length: int
    required: bool = True
    """False: only where the medium can do it without writing as much."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a structure."""

    structure: str
    """The name of the format, as ``BTT info block``."""
    field: str
    offset: int
    """Of the field, in bytes from the start of the structure."""
    message: str
    """A sentence with the value in it."""

    def __str__(self) -> str:
        return f"{self.structure}: {self.field} at byte {self.offset} {self.message}"


def require(faults: list[Fault], *, path: str | None = None, offset: int | None = None) -> None:
    """Raises :class:`Corrupt` for the first fault, if there is one."""
    if faults:
        raise Corrupt(str(faults[0]), op="read", path=path, offset=offset)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Base of all structures."""

    TITLE: ClassVar[str] = ""
    """What it is called in messages and documents."""
    SIZE: ClassVar[int] = 0
    """Bytes."""

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        """The table, in the order of offsets."""
        rows = [Field(each.name, *each.metadata["layout"]) for each in dataclasses.fields(cls)]
        return tuple(sorted(rows, key=lambda row: row.offset))

    @classmethod
    def field(cls, name: str) -> Field:
        """One row of the table."""
        return next(row for row in cls.fields() if row.name == name)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The fields of the first :attr:`SIZE` bytes. Judges nothing but the length."""
        if len(data) < cls.SIZE:
            text = f"{cls.TITLE}: {len(data)} bytes are there, {cls.SIZE} are needed"
            raise Corrupt(text, op="read")
        return cls(**{row.name: _decode(row, data[row.offset : row.end]) for row in cls.fields()})

    def pack(self) -> bytes:
        """:attr:`SIZE` bytes with every field as it is, the checksum included."""
        block = bytearray(self.SIZE)
        for row in self.fields():
            block[row.offset : row.end] = _encode(row, getattr(self, row.name))
        return bytes(block)

    def sealed(self) -> bytes:
        """:attr:`SIZE` bytes with the checksum made anew."""
        return self.seal(self.pack())

    @classmethod
    def seal(cls, block: bytes) -> bytes:
        """The block with its checksum made anew; as it is where the format has none."""
        row = cls.checksum_field()
        if row is None:
            return bytes(block)
        total = cls.checksum_of(block)
        return block[: row.offset] + total.to_bytes(row.width, "little") + block[row.end :]

    @classmethod
    def checksum_field(cls) -> Field | None:
        """Where the checksum lies."""
        return next((row for row in cls.fields() if row.kind == "checksum"), None)

    @classmethod
    def checksum_of(cls, block: bytes) -> int:
        """Fletcher-64 of the whole block, its checksum field taken as zero."""
        row = cls.checksum_field()
        if row is None:
            return 0
        return fletcher64(block[: row.offset] + bytes(row.width) + block[row.end :])

    @classmethod
    def fault(cls, name: str, message: str) -> Fault:
        """A fault of one field."""
        return Fault(cls.TITLE, name, cls.field(name).offset, message)

    @classmethod
    def basic_faults(cls, block: bytes) -> list[Fault]:
        """What any structure can be judged by: a wrong checksum."""
        row = cls.checksum_field()
        if row is None:
            return []
        stored = int.from_bytes(block[row.offset : row.end], "little")
        expected = cls.checksum_of(block)
        if stored == expected:
            return []
        return [cls.fault(row.name, f"is {stored:#018x}, the content gives {expected:#018x}")]


def _decode(row: Field, raw: bytes) -> Any:
    match row.kind:
        case "int" | "checksum":
            return int.from_bytes(raw, "little")
        case "uuid":
            return uuid.UUID(bytes=raw)
        case "guid":
            return uuid.UUID(bytes_le=raw)
        case _:
            return raw


def _encode(row: Field, value: Any) -> bytes:
    match row.kind:
        case "int" | "checksum":
            encoded: bytes = value.to_bytes(row.width, "little")
        case "uuid":
            encoded = value.bytes
        case "guid":
            encoded = value.bytes_le
        case _:
            encoded = value
    if len(encoded) > row.width:
        raise ValueError(f"{row.name}: {len(encoded)} bytes do not fit into {row.width}")
    return encoded.ljust(row.width, b"\0")


def corruptions(layout: type[Layout], block: bytes) -> Iterator[tuple[str, bytes]]:
    """Every single-field corruption of a valid block: ``(what was done, block)``.

    Each field gets one flipped bit that the checksum notices (where there is one), and each wrong
    value of the table under a checksum that fits, so that the field's own rule must notice.
    """
    summed = layout.checksum_field() is not None
    for row in layout.fields():
        if summed:
            flipped = bytearray(block)
            flipped[row.offset + row.width // 2] ^= 0x10
            yield f"{row.name}: one bit flipped", bytes(flipped)
        for value in row.wrong:
            changed = bytearray(block)
            changed[row.offset : row.end] = _encode(row, value)
            if row.kind != "checksum":
                changed = bytearray(layout.seal(bytes(changed)))
            yield f"{row.name}: {value!r}", bytes(changed)
