"""The interleave-set cookie: a number made of the dimms of a region, stored in each label.

A label whose cookie differs from its region's belongs to another set of dimms, and the kernel skips
it. There are two recipes, by the version of the index block, and one old bug that is still read:

- cookie 1 (index 1.1): Fletcher-64 over a 16-byte record for each dimm, sorted by region offset;
- cookie 2 (index 1.2): the same over 48-byte records, which add vendor, date and place of making;
- the alternative cookie: the records of cookie 1 sorted as byte strings, accepted when reading.

Source: the kernel's ``acpi_nfit_init_interleave_set`` (read, not copied).

What this does not do: find dimms.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pmemkit.formats.checksum import fletcher64

__all__ = ["Cookies", "DimmIdentity", "cookies"]


@dataclass(frozen=True, slots=True)
class DimmIdentity:
    """What the firmware says of one dimm of a set. Date and place count only where they are valid;
    QEMU gives vendor 0x8086, no date, and serial 0x123456 + slot."""

    region_offset: int
    serial: int
    vendor_id: int = 0x8086
    manufacturing_date: int = 0
    manufacturing_location: int = 0


@dataclass(frozen=True, slots=True)
class Cookies:
    """The three cookies of one interleave set."""

    v1: int
    v2: int
    alternative: int

    def of_version(self, major: int, minor: int) -> int:
        """The cookie that labels under an index block of this version carry."""
        return self.v1 if (major, minor) == (1, 1) else self.v2

    def accepts(self, cookie: int, major: int, minor: int) -> bool:
        """True when the kernel takes a label with this cookie for one of this set."""
        return cookie in (self.of_version(major, minor), self.alternative)


def cookies(dimms: Sequence[DimmIdentity]) -> Cookies:
    """The cookies of a set of dimms, given in any order."""
    ordered = sorted(dimms, key=lambda dimm: dimm.region_offset)
    short = [struct.pack("<QII", dimm.region_offset, dimm.serial, 0) for dimm in ordered]
    long = [
        struct.pack(
            "<QIHHB31x",
            dimm.region_offset,
            dimm.serial,
            dimm.vendor_id,
            dimm.manufacturing_date,
            dimm.manufacturing_location,
        )
        for dimm in ordered
    ]
    return Cookies(
        fletcher64(b"".join(short)),
        fletcher64(b"".join(long)),
        fletcher64(b"".join(sorted(short))),
    )
