"""GUIDs of the nvdimm world: what claims a namespace and what kind of range it lies in.

Sources: the kernel's ``drivers/nvdimm/label.h`` and ``include/acpi/acuuid.h``, the UEFI namespace
label chapter as EDK2 has it.

What this does not do: byte order; on media these stand in EFI order, see the ``guid`` kind of
:mod:`pmemkit.formats.layout`.
"""

from typing import Final
from uuid import UUID

__all__ = ["ABSTRACTIONS", "BTT", "BTT2", "DAX", "NULL", "PERSISTENT_MEMORY", "PFN", "efi_text"]

NULL: Final = UUID(int=0)
"""No claim: raw, or found out by probing the info blocks."""
BTT: Final = UUID("8aed63a2-29a2-4c66-8b12-f05d15d3922a")
"""Sector mode, layout 1.1."""
BTT2: Final = UUID("18633bfc-1735-4217-8ac9-17239282d3f8")
"""Sector mode, layout 2.0."""
PFN: Final = UUID("266400ba-fb9f-4677-bcb0-968f11d0d225")
"""fsdax."""
DAX: Final = UUID("97a86d9c-3cdd-4eda-986f-5068b4f80088")
"""devdax."""

ABSTRACTIONS: Final = {NULL: "none", BTT: "btt", BTT2: "btt2", PFN: "pfn", DAX: "dax"}

PERSISTENT_MEMORY: Final = UUID("66f0d379-b4f3-4074-ac43-0d3318b78cdb")
"""The range type of a persistent region; the only one whose labels we write."""


def efi_text(guid: UUID) -> str:
    """The GUID as ``ndctl read-labels -j`` prints it: its media bytes read in text order."""
    return str(UUID(bytes=guid.bytes_le))
