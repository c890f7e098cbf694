"""What is on a namespace, compared with ``blkid -p`` on real and on hand-made contents."""

import struct
import subprocess
import zlib
from pathlib import Path
from uuid import UUID

import pytest

from pmemkit.storage.region import create_file
from pmemkit.storage.signatures import Signature, identify, signature_in

MIB = 1 << 20
ID = UUID("6830f039-7914-423e-bad6-22bda8fde8d6")
SIZE = 512 * MIB


def found_in(path: Path) -> Signature | None:
    """What our own probe says of a file."""
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return identify(read, path.stat().st_size)


def blkid(path: Path) -> dict[str, str]:
    """What ``blkid -p`` says of it."""
    done = subprocess.run(
        ["blkid", "-p", "-o", "export", path], capture_output=True, text=True, check=False
    )
    lines = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value.replace("\\ ", " ") for name, _, value in lines}


def agrees(path: Path) -> Signature:
    """Ours, after it was compared."""
    ours, theirs = found_in(path), blkid(path)
    assert ours is not None, theirs
    assert ours.name == theirs.get("TYPE", theirs.get("PTTYPE"))
    assert ours.uuid == theirs.get("UUID", theirs.get("PTUUID"))
    assert ours.label == theirs.get("LABEL")
    return ours


@pytest.fixture
def blank(tmp_path) -> Path:
    path = tmp_path / "image"
    create_file(path, SIZE)
    return path


MAKERS = [
    ("ext4", ["mkfs.ext4", "-q", "-F", "-L", "four"]),
    ("ext3", ["mkfs.ext4", "-q", "-F", "-t", "ext3"]),
    ("ext2", ["mkfs.ext4", "-q", "-F", "-t", "ext2", "-L", "two"]),
    ("xfs", ["mkfs.xfs", "-q", "-f", "-L", "x"]),
    ("swap", ["mkswap", "-L", "swapped"]),
]


@pytest.mark.peer("blkid")
@pytest.mark.parametrize(("name", "words"), MAKERS, ids=[name for name, _ in MAKERS])
def test_what_the_makers_make(blank, name, words, need) -> None:
    program = need(words[0])
    subprocess.run([program, *words[1:], blank], check=True, capture_output=True)
    found = agrees(blank)
    assert found.name == name
    assert found.kind == ("swap" if name == "swap" else "filesystem")
    assert found.uuid


def put(path: Path, *pieces: tuple[int, bytes]) -> None:
    with path.open("r+b") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


def luks(version: int) -> bytes:
    head = bytearray(4096)
    head[:8] = b"LUKS\xba\xbe" + version.to_bytes(2, "big")
    if version == 1:
        head[8:40] = b"aes".ljust(32, b"\0")
        head[104:108] = (4096).to_bytes(4, "big")
    else:
        head[8:16] = (16384).to_bytes(8, "big")
        head[24:72] = b"locked".ljust(48, b"\0")
    head[168:208] = str(ID).encode().ljust(40, b"\0")
    return bytes(head)


def lvm2() -> bytes:
    """A label in the second sector; its checksum is a CRC-32 of their own seed."""
    head = bytearray(512)
    head[:8] = b"LABELONE"
    head[8:16] = (1).to_bytes(8, "little")
    head[20:24] = (32).to_bytes(4, "little")
    head[24:32] = b"LVM2 001"
    head[32:64] = b"abcdefGHIJKLmnopQRSTuvwxYZ012345"
    crc = zlib.crc32(bytes(head[20:512]), 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    head[16:20] = (crc & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(head)


def md_1(offset: int) -> bytes:
    head = bytearray(256)
    head[:8] = struct.pack("<II", 0xA92B4EFC, 1)
    head[16:32] = ID.bytes
    head[32:64] = b"host:array".ljust(32, b"\0")
    head[144:152] = (offset // 512).to_bytes(8, "little")
    words = struct.unpack("<64I", head)
    total = sum(words)
    head[216:220] = ((total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(head)


def md_0() -> bytes:
    head = bytearray(4096)
    words = struct.unpack(">4I", ID.bytes)
    struct.pack_into("<6I", head, 0, 0xA92B4EFC, 0, 90, 0, 0, words[0])
    struct.pack_into("<3I", head, 52, *words[1:])
    return bytes(head)


def gpt(sectors: int) -> list[tuple[int, bytes]]:
    entries = bytes(128 * 128)

    def header(own: int, other: int, table: int) -> bytes:
        head = bytearray(92)
        struct.pack_into(
            "<8sIIIIQQQQ", head, 0, b"EFI PART", 0x10000, 92, 0, 0, own, other, 34, sectors - 34
        )
        head[56:72] = ID.bytes_le
        struct.pack_into("<QIII", head, 72, table, 128, 128, zlib.crc32(entries))
        struct.pack_into("<I", head, 16, zlib.crc32(head))
        return bytes(head)

    protective = bytearray(512)
    struct.pack_into("<8BII", protective, 446, 0, 0, 2, 0, 0xEE, 255, 255, 255, 1, sectors - 1)
    protective[510:] = b"\x55\xaa"
    last = (sectors - 1) * 512
    return [
        (0, bytes(protective)),
        (512, header(1, sectors - 1, 2)),
        (last, header(sectors - 1, 1, sectors - 33)),
    ]


def dos() -> bytes:
    head = bytearray(512)
    head[440:444] = (0x12345678).to_bytes(4, "little")
    struct.pack_into("<8BII", head, 446, 0, 0, 2, 0, 0x83, 255, 255, 255, 2048, 4096)
    head[510:] = b"\x55\xaa"
    return bytes(head)


MADE = {
    "luks1": ([(0, luks(1))], "crypto", "crypto_LUKS"),
    "luks2": ([(0, luks(2))], "crypto", "crypto_LUKS"),
    "lvm2": ([(512, lvm2())], "volume", "LVM2_member"),
    "md 1.1": ([(0, md_1(0))], "raid", "linux_raid_member"),
    "md 1.2": ([(4096, md_1(4096))], "raid", "linux_raid_member"),
    "md 1.0": ([(SIZE - 8192, md_1(SIZE - 8192))], "raid", "linux_raid_member"),
    "md 0.90": ([(SIZE - 65536, md_0())], "raid", "linux_raid_member"),
    "gpt": (gpt(SIZE // 512), "partition table", "gpt"),
    "dos": ([(0, dos())], "partition table", "dos"),
}


@pytest.mark.peer("blkid")
@pytest.mark.parametrize("name", MADE)
def test_what_hands_made(blank, name) -> None:
    pieces, kind, wanted = MADE[name]
    put(blank, *pieces)
    found = agrees(blank)
    assert (found.kind, found.name) == (kind, wanted)


@pytest.mark.peer("blkid")
def test_a_zfs_member(blank) -> None:
    """Uberblocks in all four labels; blkid wants some of them whole."""
    uberblock = struct.pack("<QQQQ", 0x00BAB10C, 5000, 1, 0)
    labels = (0, 256 << 10, SIZE - (512 << 10), SIZE - (256 << 10))
    rings = [(at + (128 << 10) + (n << 10), uberblock) for at in labels for n in range(8)]
    put(blank, *rings)
    found = found_in(blank)
    assert found is not None
    assert (found.kind, found.name) == ("pool", "zfs_member")
    assert blkid(blank).get("TYPE") == "zfs_member"


@pytest.mark.parametrize(
    ("magic", "name"),
    [(b"PMEMOBJ", "pmemobj"), (b"PMEMBLK", "pmemblk"), (b"PMEMLOG", "pmemlog")],
)
def test_pools_that_blkid_does_not_know(magic, name) -> None:
    head = bytearray(4096)
    head[: len(magic)] = magic
    head[24:40] = ID.bytes
    found = identify(lambda at, length: bytes(head[at : at + length]), 4096)
    assert found == Signature(kind="pool", name=name, uuid=str(ID))


def test_nothing_and_too_little() -> None:
    for size in (0, 1, 511, 4096, 1 << 30):
        assert identify(lambda at, length: bytes(length), size) is None
        assert identify(lambda at, length: b"", size) is None
    assert signature_in(lambda at, length: b"XFSB"[at : at + length], 4) == "an XFS file system"
