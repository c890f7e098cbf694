#!/usr/bin/env python3
"""A real Linux kernel with its nvdimm stack, booted under QEMU on image files to run scripts.

    tools/guest.py run --dimm IMAGE[,label-size=128K][,align=2M][,slot=N] … -- ndctl list -RNi
    tools/guest.py build                       only builds the guest and prints where it is

The kernel is a Debian package, downloaded and unpacked, never installed; the programs are those of
this machine with the libraries they need. Both are put together once for each combination of
inputs, under ``build/guest``. Steps go in as a second initramfs; exit statuses, stdout and stderr
come out as counted bytes on a port of their own, so kernel messages cannot be mistaken for results.

`Guest.run` is for tests, the command line for people and for scripts (``--json``).

Invariants:
1. A directory of the cache is complete: it is made elsewhere, renamed, and its sums are checked.
2. A result is what the guest wrote, byte for byte. A step without a complete frame did not end.
3. A guest outlives its call under no circumstances.
4. An image file holds everything that the steps wrote when `Guest.run` returns: the guest has
   unmounted, synced and switched itself off. Otherwise it raises `GuestFailedError`.

What this does not do: install anything, use KVM, or know what pmemkit is. It is the referee.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Dimm",
    "Guest",
    "GuestError",
    "GuestFailedError",
    "GuestUnavailableError",
    "Result",
    "StepResult",
    "main",
]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "guest"
SOURCES = ROOT / "tests" / "kernel" / "image"

KERNEL_VARIABLE = "PMEMKIT_GUEST_KERNEL"
"""Names another kernel package, or a ``.deb`` file."""
QEMU_VARIABLE = "PMEMKIT_GUEST_QEMU"
"""Names another qemu-system-x86_64."""

REQUIRED = ("busybox", "ndctl", "daxctl", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "blkid")
MODULES = (
    # In the order they are loaded: what nfit finds must have its driver already.
    *("virtio_pci", "virtio_console", "loop", "ext4", "xfs"),
    *("libnvdimm", "nd_pmem", "nd_btt", "dax_pmem", "device_dax", "nd_e820", "nfit"),
)
ON_DEMAND = ("kmem", "cxl_acpi", "cxl_pci", "cxl_mem", "cxl_pmem", "dax_hmem", "crc32c_generic")
"""In the guest for ``modprobe``, not loaded at boot."""

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_SHORT_SECONDS = 120
_DOWNLOAD_SECONDS = 600
_TAIL_LINES = 25
_MIB = 1 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LABEL_SIZE = 128 << 10
_INDEX_SIGNATURE = b"NAMESPACE_INDEX\0"


class GuestError(Exception):
    """Something about a guest did not work."""


class GuestUnavailableError(GuestError):
    """There can be no guest on this machine; a test skips with this reason."""


class GuestFailedError(GuestError):
    """A guest was started and did not end as it should have."""

    def __init__(self, why: str, result: Result) -> None:
        lines = result.console.rstrip().splitlines()[-_TAIL_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines)
        super().__init__(f"{why}; the last lines of the console:\n{shown}")
        self.result = result
        """What had come out until then."""


def parse_size(text: str) -> int:
    """Bytes of ``64M``, ``1G``, ``4096``, as QEMU reads them."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise GuestError(f"{text!r} is not a size such as 4096, 128K, 64M or 1G")
    return int(match[1]) * _UNITS[match[2]]


# --- programs and packages -----------------------------------------------------------------------


def _program(name: str) -> Path:
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + _SYSTEM_PATH)
    if path is None:
        raise GuestUnavailableError(f"{name} is missing (tools/peers.py list names its package)")
    return Path(path)


def _output(command: Sequence[str | Path], timeout_seconds: float = _SHORT_SECONDS, **more: Any) -> str:
    """Stdout of a program that must succeed."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_seconds, check=False, **more
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise GuestUnavailableError(f"{' '.join(words)}: {failure}") from failure
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise GuestUnavailableError(f"{' '.join(words)}: {said[-1] if said else done.returncode}")
    return done.stdout


def _candidate(package: str) -> str:
    """The version that apt would take, such as ``6.1.192-2``."""
    match = re.search(r"^Version: (.+)$", _output(["apt-cache", "show", "--no-all-versions", package]), re.MULTILINE)
    if match is None:
        raise GuestUnavailableError(f"apt knows no package {package}")
    return match[1]


def _default_kernel() -> str:
    depends = _output(["apt-cache", "depends", "linux-image-amd64"])
    match = re.search(r"^\s*Depends: (linux-image-\S+)", depends, re.MULTILINE)
    if match is None:
        raise GuestUnavailableError("apt knows no package linux-image-amd64")
    return match[1]


def _download(package: str, version: str, packages: Path) -> Path:
    """The package file; downloaded where it is not yet, and never seen half-written."""
    kept = packages / f"{package}_{version.replace(':', '%3a')}_amd64.deb"
    if kept.exists():
        return kept
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages) as scratch:
        command = ["apt-get", "-q", "download", f"{package}={version}"]
        _output(command, _DOWNLOAD_SECONDS, cwd=scratch)
        (found,) = Path(scratch).glob("*.deb")
        found.rename(kept)
    return kept


def kernel_package(wanted: str | None = None, packages: Path | None = None) -> Path:
    """The ``.deb`` of the kernel: a file, a package by name, or what linux-image-amd64 needs."""
    packages = packages or CACHE / "packages"
    wanted = wanted or os.environ.get(KERNEL_VARIABLE) or None
    if wanted and wanted.endswith(".deb"):
        if not Path(wanted).is_file():
            raise GuestUnavailableError(f"there is no kernel package {wanted}")
        return Path(wanted)
    try:
        package = wanted or _default_kernel()
        return _download(package, _candidate(package), packages)
    except GuestUnavailableError:
        # Without apt's lists, what was downloaded before still boots.
        kept = sorted(packages.glob(f"{wanted or 'linux-image-'}*.deb"))
        if not kept:
            raise
        return kept[-1]


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries of programs, with the loader; nothing for a static one."""
    found: set[Path] = set()
    for program in programs:
        done = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False
        )
        found.update(Path(name) for name in re.findall(r"(/\S+) \(0x", done.stdout))
    return found


# --- the initramfs -------------------------------------------------------------------------------


class Archive:
    """A cpio archive in the ``newc`` format, which the kernel unpacks into its first file system."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
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
        if name not in self._names:
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a file."""
        self.directory(str(Path(name).parent)) if "/" in name else None
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        self.directory(str(Path(name).parent)) if "/" in name else None
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
        programs = {name: _program(name) for name in REQUIRED}
        for name in ("qemu-system-x86_64", "depmod", "dpkg-deb", "ldd"):
            _program(name)
        compiler = shutil.which("cc")
        libraries = {str(path): path for path in _libraries(programs.values())}
        return cls(kernel, programs, libraries, Path(compiler) if compiler else None)

    def key(self) -> str:
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
    base = next(path for path in (unpacked / "lib/modules", unpacked / "usr/lib/modules") if path.is_dir())
    (source,) = base.iterdir()
    release = source.name
    _output(["depmod", "-b", base.parent.parent, release])
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
    _output(["depmod", "-b", scratch, release])
    return release, target


def _initramfs(inputs: _Inputs, unpacked: Path, scratch: Path) -> bytes:
    archive = Archive()
    for name in ("bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "usr", "steps"):
        archive.directory(name)
    for name in ("sbin", "usr/bin", "usr/sbin"):
        archive.link(name, "/bin")
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (SOURCES / "init").read_bytes(), 0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    archive.file("etc/modules", "\n".join(MODULES).encode() + b"\n")
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
        _output([inputs.compiler, "-static", "-O2", "-o", program, SOURCES / "daxcopy.c"])
        archive.file("bin/daxcopy", program.read_bytes(), 0o755)
    release, modules = _modules(unpacked, scratch)
    for path in sorted(modules.rglob("*")):
        if path.is_file():
            archive.file(f"lib/modules/{release}/{path.relative_to(modules)}", path.read_bytes())
    return archive.bytes()


def _sums(directory: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("vmlinuz", "initramfs.cpio")
    }


def _whole(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete directory of the cache; ``None`` where there is none."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
        return manifest if manifest["sums"] == _sums(directory) else None
    except (OSError, ValueError, KeyError):
        return None


def _make(inputs: _Inputs, target: Path) -> None:
    """Builds into a directory of its own, then gives it its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as name:
        scratch, finished = Path(name), Path(name) / "finished"
        finished.mkdir()
        _output(["dpkg-deb", "-x", inputs.kernel, scratch / "deb"])
        (kernel,) = (scratch / "deb" / "boot").glob("vmlinuz-*")
        shutil.copy(kernel, finished / "vmlinuz")
        (finished / "initramfs.cpio").write_bytes(_initramfs(inputs, scratch / "deb", scratch))
        manifest = {
            "kernel": inputs.kernel.name,
            "release": kernel.name.removeprefix("vmlinuz-"),
            "programs": sorted([*inputs.programs, *(["daxcopy"] if inputs.compiler else [])]),
            "sums": _sums(finished),
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (finished / "manifest.json").write_text(text, encoding="utf-8")
        if target.exists() and _whole(target) is None:
            shutil.rmtree(target)
        try:
            finished.rename(target)
        except OSError:
            if _whole(target) is None:  # Otherwise someone else was quicker.
                raise


# --- running -------------------------------------------------------------------------------------


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

    def arguments(self, index: int) -> list[str]:
        """The QEMU options that attach it."""
        backend = {
            "id": f"mem{index}",
            "share": "on",
            "mem-path": str(self.path).replace(",", ",,"),
            "size": str(self.backend_bytes),
            **({"align": self.align} if self.align else {}),
            **({"readonly": "on"} if self.readonly else {}),
        }
        device = {
            "id": f"nv{index}",
            "memdev": f"mem{index}",
            **({"label-size": str(self.label_size_bytes)} if self.label_size_bytes else {}),
            **({"slot": str(self.slot)} if self.slot is not None else {}),
            **({"uuid": self.uuid} if self.uuid else {}),
            **({"unarmed": "on"} if self.unarmed or self.readonly else {}),
        }
        return [
            *("-object", "memory-backend-file," + ",".join(f"{k}={v}" for k, v in backend.items())),
            *("-device", "nvdimm," + ",".join(f"{k}={v}" for k, v in device.items())),
        ]

    @property
    def backend_bytes(self) -> int:
        """Size of the memory backend."""
        return Path(self.path).stat().st_size if self.size_bytes is None else self.size_bytes

    @classmethod
    def parse(cls, text: str) -> Dimm:
        """Reads ``PATH[,size=S][,label-size=S|auto][,align=S|none][,slot=N][,unarmed][,readonly]``."""
        path, *options = text.split(",")
        values = dict(option.partition("=")[::2] for option in options)
        known = {"size", "label-size", "align", "slot", "uuid", "unarmed", "readonly"}
        if unknown := values.keys() - known:
            raise GuestError(f"a dimm has no option {', '.join(sorted(unknown))}")
        if not Path(path).is_file():
            raise GuestError(f"there is no image {path}")
        size = parse_size(values["size"]) if "size" in values else None
        label = values.get("label-size", "auto")
        return cls(
            path,
            size_bytes=size,
            label_size_bytes=guess_label_size(Path(path), size) if label == "auto" else parse_size(label),
            align=None if values.get("align") == "none" else values.get("align", "2M"),
            slot=int(values["slot"]) if "slot" in values else None,
            uuid=values.get("uuid"),
            unarmed="unarmed" in values,
            readonly="readonly" in values,
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


@dataclass(frozen=True)
class StepResult:
    """What one script did."""

    name: str
    status: int | None
    """Exit status; ``None`` when it did not end, or was never begun."""
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Stdout as text."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def errors(self) -> str:
        """Stderr as text."""
        return self.stderr.decode("utf-8", "replace")

    def json(self) -> Any:
        """Stdout as JSON, of a step that succeeded; ndctl prints nothing for an empty list."""
        self.check()
        try:
            return json.loads(self.stdout) if self.stdout.strip() else []
        except ValueError as failure:
            raise GuestError(f"step {self.name}: no JSON: {failure}\n{self.text}") from failure

    def check(self) -> StepResult:
        """Itself; raises `GuestError` with all output unless the exit status is 0."""
        if self.status != 0:
            ended = "did not end" if self.status is None else f"ended with {self.status}"
            raise GuestError(f"step {self.name} {ended}\n{self.text}{self.errors}".rstrip())
        return self


@dataclass
class Result:
    """What one boot left behind."""

    steps: dict[str, StepResult]
    powered_off: bool = False
    """The guest itself said that everything is on the media."""
    console: str = ""
    messages: str = ""
    """The kernel's messages, from ``dmesg``."""
    running: str | None = field(default=None)
    """The step that was running when the guest was ended."""

    def __getitem__(self, name: str) -> StepResult:
        return self.steps[name]

    def check(self) -> Result:
        """Itself; raises `GuestError` for the first step that failed."""
        for step in self.steps.values():
            step.check()
        return self


def parse_frames(data: bytes, names: Sequence[str]) -> Result:
    """Reads the frames that ``tests/kernel/image/init`` writes; an incomplete one is left out."""
    result = Result({name: StepResult(name, None) for name in names})
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        word, *numbers = data[at:end].split()
        values = [int(number) for number in numbers]
        at = end + 1
        if word == b"begin":
            result.running = names[values[0]]
        elif word == b"step" and at + values[2] + values[3] <= len(data):
            index, status, out_bytes, error_bytes = values
            middle, last = at + out_bytes, at + out_bytes + error_bytes
            step = StepResult(names[index], status, data[at:middle], data[middle:last])
            result.steps[step.name], result.running, at = step, None, last
        elif word == b"dmesg" and at + values[0] <= len(data):
            result.messages = data[at : at + values[0]].decode("utf-8", "replace")
            at += values[0]
        elif word == b"end":
            result.powered_off = True
        else:
            break
    return result


def _steps_archive(steps: Mapping[str, str], files: Mapping[str, bytes], stop: bool) -> bytes:
    archive = Archive()
    archive.directory("steps")
    archive.directory("in")
    for index, script in enumerate(steps.values()):
        archive.file(f"steps/{index:04d}", script.encode() + b"\n", 0o755)
    for name, data in files.items():
        archive.file(f"in/{name}", data)
    if stop:
        archive.file("stop-on-failure", b"")
    return archive.bytes()


class Guest:
    """A built guest, ready to be booted any number of times."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], qemu: Path) -> None:
        self.directory = directory
        self.kernel_release: str = manifest["release"]
        self.programs = frozenset[str](manifest["programs"])
        """Those that are not busybox's; ``daxcopy`` is missing where there was no C compiler."""
        self._qemu = qemu

    @classmethod
    def build(cls, kernel: str | None = None, cache: Path | None = None) -> Guest:
        """Builds the guest unless the cache has it; `GuestUnavailableError` says what is missing."""
        cache = cache or CACHE
        inputs = _Inputs.collect(kernel_package(kernel, cache / "packages"))
        directory = cache / inputs.key()
        manifest = _whole(directory)
        if manifest is None:
            _make(inputs, directory)
            manifest = _whole(directory)
        if manifest is None:
            raise GuestError(f"{directory} was built and is damaged already")
        qemu = _program(os.environ.get(QEMU_VARIABLE) or "qemu-system-x86_64")
        return cls(directory, manifest, qemu)

    def run(
        self,
        dimms: Sequence[Dimm],
        steps: Mapping[str, str],
        *,
        timeout_seconds: float = 90,
        memory: str = "1G",
        cpus: int = 1,
        kernel_arguments: str = "",
        qemu_arguments: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        stop_on_failure: bool = False,
    ) -> Result:
        """Boots on the dimms, runs each script (``sh -e``), and switches the guest off.

        A step that fails does not keep the others from running unless ``stop_on_failure``. ``files``
        are found under ``/in``. ``qemu_arguments`` attach what `Dimm` cannot describe. A hanging
        guest is killed after ``timeout_seconds``; that and a guest that dies raise
        `GuestFailedError` with whatever had come out.
        """
        with tempfile.TemporaryDirectory(prefix="pmemkit-guest-") as name:
            scratch = Path(name)
            with (scratch / "initramfs").open("wb") as initramfs:
                initramfs.write((self.directory / "initramfs.cpio").read_bytes())
                initramfs.write(_steps_archive(steps, files or {}, stop_on_failure))
            command = [
                *self._machine(scratch, memory, cpus, dimms),
                *("-append", f"console=ttyS0 loglevel=5 panic=-1 oops=panic {kernel_arguments}"),
                *(word for index, dimm in enumerate(dimms) for word in dimm.arguments(index)),
                *qemu_arguments,
            ]
            why = self._boot(command, timeout_seconds)
            result = parse_frames(_read(scratch / "results"), list(steps))
            result.console = _read(scratch / "console").decode("utf-8", "replace").replace("\r", "")
        if why is None and not result.powered_off:
            why = "the guest died"
        if why is not None:
            during = f" during step {result.running}" if result.running else ""
            raise GuestFailedError(why + during, result)
        return result

    def _machine(
        self, scratch: Path, memory: str, cpus: int, dimms: Sequence[Dimm]
    ) -> list[str]:
        # A dimm may be moved up to the next GiB; QEMU wants addresses for that, not memory.
        room = sum(-(-dimm.backend_bytes // _UNITS["G"]) + 1 for dimm in dimms) * _UNITS["G"]
        most = (parse_size(memory) + room) // _MIB
        slots = max([len(dimms), *(dimm.slot + 1 for dimm in dimms if dimm.slot is not None)])
        plugged = f",slots={slots},maxmem={most}M" if dimms else ""
        return [
            *(str(self._qemu), "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-machine", "pc,nvdimm=on,accel=tcg", "-cpu", "max", "-smp", str(cpus)),
            *("-m", memory + plugged, "-display", "none"),
            *("-kernel", str(self.directory / "vmlinuz"), "-initrd", str(scratch / "initramfs")),
            *("-serial", f"file:{scratch / 'console'}", "-device", "virtio-serial-pci"),
            *("-chardev", f"file,id=results,path={scratch / 'results'}"),
            *("-device", "virtserialport,chardev=results,name=results"),
        ]

    def _boot(self, command: Sequence[str], timeout_seconds: float) -> str | None:
        """Runs QEMU to its end; why that was not a good one, or ``None``."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"the guest did not end within {timeout_seconds:g} seconds"
        except OSError as failure:
            raise GuestUnavailableError(str(failure)) from failure
        if done.returncode != 0:
            return f"QEMU ended with {done.returncode}: {done.stderr.strip()}"
        return None


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


# --- the command line ----------------------------------------------------------------------------


def _as_json(result: Result) -> str:
    def step(value: StepResult) -> dict[str, Any]:
        return {**asdict(value), "stdout": value.text, "stderr": value.errors}

    plain = {
        "powered_off": result.powered_off,
        "steps": {name: step(value) for name, value in result.steps.items()},
        "messages": result.messages,
        "console": result.console,
    }
    return json.dumps(plain, indent=2)


def _print(result: Result, as_json: bool, with_console: bool) -> int:
    if as_json:
        print(_as_json(result))
    else:
        if with_console:
            print(result.console, file=sys.stderr)
        for step in result.steps.values():
            sys.stdout.flush()
            sys.stdout.buffer.write(step.stdout)
            sys.stdout.buffer.flush()
            sys.stderr.buffer.write(step.stderr)
    statuses = [step.status for step in result.steps.values() if step.status != 0]
    return (statuses[0] or 1) if statuses else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A Linux guest with NVDIMMs made of image files.")
    parser.add_argument("--kernel", help=f"kernel package or .deb (also {KERNEL_VARIABLE})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the guest unless it is there, and print where")
    run = commands.add_parser("run", help="boot on images, run a command, print its output")
    run.add_argument(
        "--dimm",
        action="append",
        default=[],
        metavar="IMAGE[,OPTION=VALUE]…",
        help="size, label-size (a size, 0 or auto), align (a size or none), slot, uuid, "
        "unarmed, readonly",
    )
    run.add_argument("--memory", default="1G")
    run.add_argument("--cpus", type=int, default=1)
    run.add_argument("--append", default="", help="more kernel arguments")
    run.add_argument("--timeout", type=float, default=90, metavar="SECONDS")
    run.add_argument("--script", type=Path, action="append", default=[], help="run a file's content")
    run.add_argument("--json", action="store_true", help="everything that came out, as JSON")
    run.add_argument("--console", action="store_true", help="show the console on stderr")
    run.add_argument("words", nargs="*", metavar="COMMAND", help="a shell command, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands of the module's head; the exit status is the step's."""
    options = _options(arguments)
    try:
        guest = Guest.build(options.kernel)
        if options.command == "build":
            print(guest.directory)
            return 0
        steps = {str(path): path.read_text(encoding="utf-8") for path in options.script}
        if options.words:
            steps["command"] = " ".join(options.words)
        result = guest.run(
            [Dimm.parse(text) for text in options.dimm],
            steps,
            timeout_seconds=options.timeout,
            memory=options.memory,
            cpus=options.cpus,
            kernel_arguments=options.append,
        )
        return _print(result, options.json, options.console)
    except GuestFailedError as failure:
        _print(failure.result, options.json, False)
        print(f"guest: {failure}", file=sys.stderr)
    except (GuestError, OSError, ValueError) as failure:
        print(f"guest: {failure}", file=sys.stderr)
    return 125


if __name__ == "__main__":
    sys.exit(main())
