"""What is on a namespace, by the magic bytes that ``blkid`` knows: a warning before data are lost.

Offsets are those of the formats: ext's superblock at 1 KiB, LVM's label in one of the first four
sectors, md's at 0 or 4 KiB for versions 1.1 and 1.2 and at the end for 0.90 and 1.0, a GPT behind
the first sector. Names and uuids are those that ``blkid -p`` prints; PMDK's pools, which it does
not know, have the names that ``pmempool info`` has.

What this does not do: prove that there is nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final
from uuid import UUID

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageNamespace
    from pmemkit.bus.machine import Machine

__all__ = ["Signature", "contents_of", "find_signature", "identify", "signature_in"]

_Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Something that magic bytes tell."""

    kind: str
    """``filesystem``, ``crypto``, ``raid``, ``volume``, ``partition table``, ``swap``, ``pool``."""
    name: str
    """As ``blkid`` has it in TYPE or PTTYPE."""
    label: str | None = None
    uuid: str | None = None

    def __str__(self) -> str:
        words = _SPOKEN.get(self.name) or f"{_article(self.name)} {self.name} {self.kind}"
        return f"{words} labelled {self.label!r}" if self.label else words


_SPOKEN: Final = {
    "xfs": "an XFS file system",
    "ext2": "an ext2, ext3 or ext4 file system",
    "ext3": "an ext2, ext3 or ext4 file system",
    "ext4": "an ext2, ext3 or ext4 file system",
    "btrfs": "a btrfs file system",
    "crypto_LUKS": "a LUKS volume",
    "swap": "swap space",
    "linux_raid_member": "a member of an md array",
    "LVM2_member": "an LVM physical volume",
    "gpt": "a GPT partition table",
    "dos": "a boot sector, maybe with partitions",
    "bcache": "a bcache device",
    "zfs_member": "a member of a ZFS pool",
    "pmempool": "a PMDK pool set",
    "pmemobj": "a PMDK object pool",
    "pmemblk": "a PMDK block pool",
    "pmemlog": "a PMDK log pool",
    "vfat": "a FAT file system",
    "iso9660": "an ISO 9660 file system",
}


def _article(name: str) -> str:
    return "an" if name[:1].lower() in "aeiou" else "a"


def identify(read: _Read, size: int) -> Signature | None:
    """What the bytes say is there; ``None`` where nothing is known. ``read`` gives what there is
    of a range."""
    return next(_found(read, size), None)


def _found(read: _Read, size: int) -> Iterator[Signature]:
    """In the order in which one hides another: a container before what it holds."""

    def at(offset: int, length: int) -> bytes:
        data = read(offset, min(length, size - offset)) if 0 <= offset < size else b""
        return data.ljust(length, b"\0")

    for probe in _PROBES:
        found = probe(at, size)
        if found is not None:
            yield found


def _uuid(data: bytes) -> str | None:
    return str(UUID(bytes=data)) if any(data) else None


def _text(data: bytes) -> str | None:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace").rstrip() or None


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _luks(at: _Read, size: int) -> Signature | None:
    head = at(0, 512)
    if head[:6] != b"LUKS\xba\xbe":
        return None
    version = int.from_bytes(head[6:8], "big")
    label = _text(head[24:72]) if version == 2 else None
    return Signature(kind="crypto", name="crypto_LUKS", label=label, uuid=_text(head[168:208]))


def _md(at: _Read, size: int) -> Signature | None:
    for offset in (0, 4096, _aligned(size // 512 - 16, 8) * 512):
        head = at(offset, 256)
        if head[:8] == b"\xfc\x4e\x2b\xa9\x01\0\0\0":
            return Signature(
                kind="raid",
                name="linux_raid_member",
                label=_text(head[32:64]),
                uuid=_uuid(head[16:32]),
            )
    old = at(_aligned(size, 64 << 10) - (64 << 10), 64)
    for magic, order in ((b"\xfc\x4e\x2b\xa9", -1), (b"\xa9\x2b\x4e\xfc", 1)):
        if size >= 128 << 10 and old[:4] == magic:
            words = (old[20:24], old[52:56], old[56:60], old[60:64])
            raw = b"".join(word[::order] for word in words)
            return Signature(kind="raid", name="linux_raid_member", uuid=_uuid(raw))
    return None


def _aligned(value: int, unit: int) -> int:
    return max(0, value) // unit * unit


def _lvm(at: _Read, size: int) -> Signature | None:
    for sector in range(4):
        head = at(sector * 512, 512)
        if head[:8] == b"LABELONE" and head[24:32] == b"LVM2 001":
            raw = head[_little(head[20:24]) :][:32].decode("ascii", "replace")
            uuid = "-".join(raw[a:b] for a, b in pairwise((0, 6, 10, 14, 18, 22, 26, 32)))
            return Signature(kind="volume", name="LVM2_member", uuid=uuid if raw else None)
    return None


def _bcache(at: _Read, size: int) -> Signature | None:
    head = at(4096, 104)
    if head[24:40] != bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"):
        return None
    return Signature(
        kind="volume", name="bcache", label=_text(head[72:104]), uuid=_uuid(head[40:56])
    )


def _zfs(at: _Read, size: int) -> Signature | None:
    """A member has four labels, two at each end, with an array of uberblocks in each."""
    end = _aligned(size, 256 << 10)
    for label in (0, 256 << 10, end - (512 << 10), end - (256 << 10)):
        if label < 0 or end < 1 << 20:
            continue
        ring = at(label + (128 << 10), 128 << 10)
        magics = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
        count = sum(ring[place : place + 8] in magics for place in range(0, len(ring), 1024))
        if count >= 4:
            return Signature(kind="pool", name="zfs_member")
    return None


def _pmdk(at: _Read, size: int) -> Signature | None:
    head = at(0, 4096)
    names = {
        b"PMEMPOOLSET": "pmempool",
        b"PMEMOBJ\0": "pmemobj",
        b"PMEMBLK\0": "pmemblk",
        b"PMEMLOG\0": "pmemlog",
    }
    for magic, name in names.items():
        if head.startswith(magic):
            uuid = None if name == "pmempool" else _uuid(head[24:40])
            return Signature(kind="pool", name=name, uuid=uuid)
    return None


def _swap(at: _Read, size: int) -> Signature | None:
    for page in (4096, 8192, 16384, 65536):
        if at(page - 10, 10) in (b"SWAPSPACE2", b"SWAP-SPACE"):
            head = at(1024, 44)
            return Signature(
                kind="swap", name="swap", label=_text(head[28:44]), uuid=_uuid(head[12:28])
            )
    return None


def _ext(at: _Read, size: int) -> Signature | None:
    head = at(1024, 1024)
    if head[0x38:0x3A] != b"\x53\xef":
        return None
    compat, incompat, ro_compat = (_little(head[o : o + 4]) for o in (0x5C, 0x60, 0x64))
    # What ext2 and ext3 know: anything else is ext4's.
    name = "ext4"
    if not incompat & ~0x16 and not ro_compat & ~0x7:
        name = "ext3" if compat & 0x4 else "ext2"
    if incompat & 0x8:
        name = "jbd"
    label, uuid = _text(head[0x78:0x88]), _uuid(head[0x68:0x78])
    return Signature(kind="filesystem", name=name, label=label, uuid=uuid)


def _xfs(at: _Read, size: int) -> Signature | None:
    head = at(0, 128)
    if head[:4] != b"XFSB":
        return None
    return Signature(
        kind="filesystem", name="xfs", label=_text(head[108:120]), uuid=_uuid(head[32:48])
    )


def _btrfs(at: _Read, size: int) -> Signature | None:
    head = at(0x10000, 0x300)
    if head[0x40:0x48] != b"_BHRfS_M":
        return None
    label, uuid = _text(head[0x12B:0x22B]), _uuid(head[0x20:0x30])
    return Signature(kind="filesystem", name="btrfs", label=label, uuid=uuid)


def _others(at: _Read, size: int) -> Signature | None:
    """File systems of which the name is enough."""
    magics = (
        ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
        ("squashfs", 0, b"hsqs"),
        ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
        ("ntfs", 3, b"NTFS    "),
        ("exfat", 3, b"EXFAT   "),
        ("iso9660", 32769, b"CD001"),
    )
    for name, offset, magic in magics:
        if at(offset, len(magic)) == magic:
            return Signature(kind="filesystem", name=name)
    return None


def _fat(at: _Read, size: int) -> Signature | None:
    head = at(0, 512)
    if head[510:512] != b"\x55\xaa":
        return None
    for magic, serial, label in ((b"FAT32   ", 67, 71), (b"FAT1", 39, 43)):
        place = label + 11
        if head[place : place + len(magic)] == magic:
            number = _little(head[serial : serial + 4])
            text = head[label : label + 11].decode("ascii", "replace").rstrip()
            return Signature(
                kind="filesystem",
                name="vfat",
                label=None if text in ("", "NO NAME") else text,
                uuid=f"{number >> 16:04X}-{number & 0xFFFF:04X}",
            )
    return None


def _gpt(at: _Read, size: int) -> Signature | None:
    for sector in (512, 4096):
        head = at(sector, 72)
        if head[:8] == b"EFI PART":
            return Signature(
                kind="partition table", name="gpt", uuid=str(UUID(bytes_le=head[56:72]))
            )
    return None


def _dos(at: _Read, size: int) -> Signature | None:
    head = at(0, 512)
    if head[510:512] != b"\x55\xaa":
        return None
    number = _little(head[440:444])
    return Signature(kind="partition table", name="dos", uuid=f"{number:08x}" if number else None)


_PROBES: Final = (
    _luks,
    _lvm,
    _bcache,
    _pmdk,
    _xfs,
    _ext,
    _btrfs,
    _swap,
    _md,
    _others,
    _fat,
    _gpt,
    _dos,
    _zfs,
)


def signature_in(read: _Read, size: int) -> str | None:
    """What the bytes say is there, in words; ``None`` where nothing is known."""
    found = identify(read, size)
    return None if found is None else str(found)


def contents_of(here: "ImageNamespace") -> Signature | None:
    """What is on a namespace of an image that is open, as far as it can be read."""
    from pmemkit.errors import PmemError
    from pmemkit.storage.btt_reader import BttReader

    region = here.region
    if region.span.ways > 1:
        return None

    def read(offset: int, length: int) -> bytes:
        return region.read(here.offset + offset, length)

    try:
        if here.claim.mode == "sector":
            reader = BttReader(read, here.size, version=here.claim.version, parent_uuid=here.uuid)
            return identify(reader.read, reader.size)
        size = here.claim.size if here.claim.size is not None else here.size
        return identify(lambda offset, length: read(here.claim.offset + offset, length), size)
    except PmemError:
        # A namespace that cannot be read may be converted all the same.
        return None


def find_signature(machine: "Machine", name: str) -> str | None:
    """What is on a namespace of a machine, in words, as far as it can be read."""
    from pmemkit.bus.image import observe_with, open_reader

    opened = [open_reader(dimm.path) for dimm in machine.dimms]
    try:
        bus = observe_with(machine, [(read, size) for read, size, _ in opened])
        found = contents_of(bus.namespace(name))
        return None if found is None else str(found)
    finally:
        for _, _, close in opened:
            close()
