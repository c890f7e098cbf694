"""What is on a namespace, by the magic bytes that ``blkid`` knows: a warning before data are lost.

Offsets are those of the formats: ext's superblock at 1 KiB, LVM's label in one of the first four
sectors, md's at 0 or 4 KiB for versions 1.1 and 1.2, a GPT behind the first sector.

What this does not do: prove that there is nothing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pmemkit.bus.machine import Machine

__all__ = ["find_signature", "signature_in"]

_PROBE_SIZE: Final = 68 << 10
_MAGICS: Final[tuple[tuple[str, int, bytes], ...]] = (
    ("an XFS file system", 0, b"XFSB"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("a btrfs file system", 0x10040, b"_BHRfS_M"),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("a member of an md array", 0, b"\xfc\x4e\x2b\xa9"),
    ("a member of an md array", 4096, b"\xfc\x4e\x2b\xa9"),
    ("an LVM physical volume", 512, b"LABELONE"),
    ("an LVM physical volume", 0, b"LABELONE"),
    ("an LVM physical volume", 1024, b"LABELONE"),
    ("an LVM physical volume", 1536, b"LABELONE"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("a PMDK pool", 0, b"PMEMPOOLSET"),
    ("a PMDK object pool", 0, b"PMEMOBJ"),
    ("a PMDK block pool", 0, b"PMEMBLK"),
    ("a PMDK log pool", 0, b"PMEMLOG"),
    ("a boot sector, maybe with partitions", 510, b"\x55\xaa"),
)


def signature_in(read: Callable[[int, int], bytes], size: int) -> str | None:
    """What the first bytes say is there; ``None`` where nothing is known."""
    data = read(0, min(_PROBE_SIZE, size))
    for what, offset, magic in _MAGICS:
        if data[offset : offset + len(magic)] == magic:
            return what
    return None


def find_signature(machine: "Machine", name: str) -> str | None:
    """What is on a namespace of a machine, as far as it can be read."""
    from pmemkit.bus.image import observe_with, open_reader
    from pmemkit.errors import PmemError
    from pmemkit.storage.btt_reader import BttReader

    opened = [open_reader(dimm.path) for dimm in machine.dimms]
    try:
        bus = observe_with(machine, [(read, size) for read, size, _ in opened])
        here = bus.namespace(name)
        region = here.region
        if region.span.ways > 1:
            return None

        def read(offset: int, length: int) -> bytes:
            return region.read(here.offset + offset, length)

        if here.claim.mode == "sector":
            reader = BttReader(read, here.size, version=here.claim.version, parent_uuid=here.uuid)
            return signature_in(reader.read, reader.size)
        data_size = here.claim.size if here.claim.size is not None else here.size
        return signature_in(
            lambda offset, length: read(here.claim.offset + offset, length), data_size
        )
    except PmemError:
        # A namespace that cannot be read may be converted all the same.
        return None
    finally:
        for _, _, close in opened:
            close()
