"""Builds what `tools/guest.py` boots: a Debian kernel and an initramfs with the nvdimm programs.

The kernel is a Debian package, which `tools/guest_packages.py` finds; the programs are those of
this machine with the libraries they need. Both are put together once for each combination of
inputs, under ``build/guest``.

Invariants:
1. A directory of the cache is complete: it is made elsewhere, renamed, and its sums are checked.
2. Its name is a digest of everything that went into it.

What this does not do: install anything, or boot.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.guest_packages import (
    CACHE,
    ROOT,
    GuestError,
    GuestUnavailableError,
    find_program,
    kernel_package,
    libraries,
    output,
)

__all__ = ["Archive", "bootable", "build", "sums", "whole"]

SOURCES = ROOT / "tests" / "kernel" / "image"

REQUIRED = ("busybox", "ndctl", "daxctl", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "blkid")
OPTIONAL = ("numactl", "cxl")
"""In the guest if they are here: few scripts want them."""
MODULES = (
    # In the order they are loaded: what nfit finds must have its driver already.
    *("virtio_pci", "virtio_console", "loop"),
    *("libnvdimm", "nd_pmem", "nd_btt", "dax_pmem", "device_dax", "nd_e820", "nfit"),
)
ON_DEMAND = (
    *("ext4", "xfs", "crc32c_generic"),
    *("kmem", "cxl_acpi", "cxl_pci", "cxl_mem", "cxl_pmem", "dax_cxl", "dax_hmem"),
    *("virtio_blk", "virtio_pmem", "squashfs", "dm_mod", "dm_crypt", "raid1"),
)
"""In the guest for ``mount`` and ``modprobe``, not loaded at boot: that takes a second."""

# From the kernel's boot protocol: fields of the bzImage's header.
_SETUP_SECTORS, _SETUP_SECTORS_DEFAULT, _PAYLOAD = 0x1F1, 4, 0x248
_SECTOR_BYTES = 512
_XZ_SIGNATURE = b"\xfd7zXZ\0"
_PVH_NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\0"
"""Head of the ELF note XEN_ELFNOTE_PHYS32_ENTRY: lengths of name and value, type, name."""


# --- the initramfs -------------------------------------------------------------------------------


class Archive:
    """A cpio archive in the ``newc`` format, of which the kernel makes its first file system."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _entry(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        encoded = name.encode() + b"\0"
        fields = (
            *(len(self._names) + 1, mode, 0, 0, 1, 0, len(data)),
            *(0, 0, *device, len(encoded), 0),
        )
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
        self._names.add(name)

    def directory(self, name: str) -> None:
        """Adds a directory and those above it, once."""
        for parent in reversed([path for path in Path(name).parents if path.name]):
            self.directory(str(parent))
        if name != "." and name not in self._names:
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a file."""
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Adds a device node."""
        self.directory(str(Path(name).parent))
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def bytes(self) -> bytes:
        """The archive. Several, one after the other, are one file system."""
        self._entry("TRAILER!!!", 0)
        whole = b"".join(self._parts)
        return whole + bytes(-len(whole) % 512)


@dataclass(frozen=True)
class _Inputs:
    """Everything that decides what is in a guest."""

    kernel: Path
    programs: dict[str, Path]
    libraries: dict[str, Path]
    compiler: Path | None

    @classmethod
    def collect(cls, kernel: Path) -> _Inputs:
        """What this machine has; `GuestUnavailableError` for what it has not."""
        programs = {name: find_program(name) for name in REQUIRED}
        for name in OPTIONAL:
            with suppress(GuestUnavailableError):
                programs[name] = find_program(name)
        for name in ("qemu-system-x86_64", "depmod", "dpkg-deb", "ldd"):
            find_program(name)
        compiler = shutil.which("cc")
        needed = {str(path): path for path in libraries(programs.values())}
        return cls(kernel, programs, needed, Path(compiler) if compiler else None)

    def key(self) -> str:
        """The name of the directory with these inputs."""
        digest = hashlib.sha256()
        for path in (Path(__file__), *sorted(SOURCES.iterdir()), *sorted(self.programs.values())):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        for name, path in sorted(self.libraries.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        digest.update(f"{self.kernel.name} {self.kernel.stat().st_size} {self.compiler}".encode())
        return digest.hexdigest()[:16]


def _stem(module: str) -> str:
    return re.sub(r"\.ko(\.xz)?$", "", Path(module).name).replace("-", "_")


def _closure(dependencies: Mapping[str, list[str]], wanted: Iterable[str]) -> set[str]:
    by_name = {_stem(path): path for path in dependencies}
    found: set[str] = set()
    for name in wanted:
        if name in by_name:  # The rest is built into this kernel, or not part of it.
            found.update((by_name[name], *dependencies[by_name[name]]))
    return found


def _modules(unpacked: Path, scratch: Path) -> tuple[str, Path]:
    """The few modules a guest needs, with their indexes, as ``lib/modules`` under the result."""
    base = next(
        path for path in (unpacked / "lib/modules", unpacked / "usr/lib/modules") if path.is_dir()
    )
    (source,) = base.iterdir()
    release = source.name
    output(["depmod", "-b", base.parent.parent, release])
    text = (source / "modules.dep").read_text(encoding="utf-8")
    pairs = (line.split(":") for line in text.splitlines())
    dependencies = {path: rest.split() for path, rest in pairs}
    target = scratch / "lib/modules" / release
    for module in _closure(dependencies, (*MODULES, *ON_DEMAND)):
        place = target / module.removesuffix(".xz")
        place.parent.mkdir(parents=True, exist_ok=True)
        data = (source / module).read_bytes()
        place.write_bytes(lzma.decompress(data) if module.endswith(".xz") else data)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    output(["depmod", "-b", scratch, release])
    return release, target


def _initramfs(inputs: _Inputs, unpacked: Path, scratch: Path) -> bytes:
    archive = Archive()
    for name in ("bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "usr", "steps"):
        archive.directory(name)
    for name in ("sbin", "usr/bin", "usr/sbin"):
        archive.link(name, "/bin")
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (SOURCES / "init").read_bytes(), 0o755)
    helper = "cxl-create-ram-region"
    archive.file(f"bin/{helper}", (SOURCES / helper).read_bytes(), 0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    archive.file("etc/modules", "\n".join(MODULES).encode() + b"\n")
    archive.file("etc/filesystems", b"ext4\nxfs\n")
    archive.link("etc/mtab", "/proc/mounts")
    for name, path in inputs.programs.items():
        archive.file(f"bin/{name}", path.read_bytes(), 0o755)
    for name, path in inputs.libraries.items():
        archive.file(name.lstrip("/"), path.read_bytes(), 0o755)
    for directory in (Path("/etc/ndctl.conf.d"), Path("/etc/ndctl"), Path("/etc/daxctl.conf.d")):
        for path in sorted(directory.glob("*.conf")):
            archive.file(str(path).lstrip("/"), path.read_bytes())
    if inputs.compiler is not None:
        program = scratch / "daxcopy"
        output([inputs.compiler, "-static", "-O2", "-o", program, SOURCES / "daxcopy.c"])
        archive.file("bin/daxcopy", program.read_bytes(), 0o755)
    release, modules = _modules(unpacked, scratch)
    for path in sorted(modules.rglob("*")):
        if path.is_file():
            archive.file(f"lib/modules/{release}/{path.relative_to(modules)}", path.read_bytes())
    return archive.bytes()


def bootable(image: bytes) -> bytes:
    """The ELF file inside a bzImage, where it can be had: under TCG it saves seconds a boot.

    QEMU starts it through the entry that Xen's PVH guests use, which Debian's kernels have. A
    bzImage packed in another way than with xz is returned as it is, and unpacks itself.
    """
    setup_sectors = image[_SETUP_SECTORS] or _SETUP_SECTORS_DEFAULT
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (setup_sectors + 1) * _SECTOR_BYTES + offset
    payload = image[start : start + length]
    if not payload.startswith(_XZ_SIGNATURE):
        return image
    kernel = lzma.LZMADecompressor().decompress(payload)
    return kernel if _PVH_NOTE in kernel else image


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that are booted."""
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("kernel", "initramfs.cpio")
    }


def whole(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete directory of the cache; ``None`` where there is none."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
        return manifest if manifest["sums"] == sums(directory) else None
    except (OSError, ValueError, KeyError):
        return None


def _make(inputs: _Inputs, target: Path) -> None:
    """Builds into a directory of its own, then gives it its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as name:
        scratch, finished = Path(name), Path(name) / "finished"
        finished.mkdir()
        output(["dpkg-deb", "-x", inputs.kernel, scratch / "deb"])
        (kernel,) = (scratch / "deb" / "boot").glob("vmlinuz-*")
        (finished / "kernel").write_bytes(bootable(kernel.read_bytes()))
        (finished / "initramfs.cpio").write_bytes(_initramfs(inputs, scratch / "deb", scratch))
        manifest = {
            "kernel": inputs.kernel.name,
            "release": kernel.name.removeprefix("vmlinuz-"),
            "programs": sorted([*inputs.programs, *(["daxcopy"] if inputs.compiler else [])]),
            "sums": sums(finished),
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (finished / "manifest.json").write_text(text, encoding="utf-8")
        if target.exists() and whole(target) is None:
            shutil.rmtree(target)
        try:
            finished.rename(target)
        except OSError:
            if whole(target) is None:  # Otherwise someone else was quicker.
                raise


def build(
    kernel: str | None = None, cache: Path | None = None, cxl: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The directory of a guest and its manifest; made unless the cache has it.

    `GuestUnavailableError` says what is missing here.
    """
    cache = cache or CACHE
    inputs = _Inputs.collect(kernel_package(kernel, cache / "packages", cxl))
    directory = cache / inputs.key()
    manifest = whole(directory)
    if manifest is None:
        _make(inputs, directory)
        manifest = whole(directory)
    if manifest is None:
        raise GuestError(f"{directory} was built and is damaged already")
    return directory, manifest
