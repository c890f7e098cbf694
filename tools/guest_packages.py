"""Where the guest's programs, kernel and QEMU come from: this machine, and Debian packages.

Packages are downloaded and unpacked, never installed. The CXL machine needs a newer kernel and
QEMU than Debian 12 has; both are in its backports, which most machines do not list. apt asks for
them with lists of its own under ``build/guest``, from the mirror and with the keys that the machine
uses already, so that neither root nor a change of the machine is needed.

Invariants:
1. A package file and an unpacked QEMU in the cache are complete: they are made elsewhere, renamed.
2. The machine's own apt lists, sources and packages stay as they are.

What this does not do: install anything. What cannot be had here is a `GuestUnavailableError`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CACHE",
    "KERNEL_VARIABLE",
    "QEMU_VARIABLE",
    "ROOT",
    "GuestError",
    "GuestUnavailableError",
    "Qemu",
    "find_program",
    "kernel_package",
    "libraries",
    "output",
]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "guest"

KERNEL_VARIABLE = "PMEMKIT_GUEST_KERNEL"
"""Names another kernel package, or a ``.deb`` file."""
QEMU_VARIABLE = "PMEMKIT_GUEST_QEMU"
"""Names another qemu-system-x86_64."""

CXL_QEMU = (8, 1)
"""The first QEMU with CXL devices that have volatile memory."""
CXL_KERNEL = (6, 12)
"""The first of Debian's kernels after 6.1, which knows no CXL regions of RAM."""

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_SHORT_SECONDS = 120
_DOWNLOAD_SECONDS = 600
_DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_QEMU_DATA = ("usr/share/qemu", "usr/share/seabios")


class GuestError(Exception):
    """Something about a guest did not work."""


class GuestUnavailableError(GuestError):
    """There can be no guest on this machine; a test skips with this reason."""


# --- programs ------------------------------------------------------------------------------------


def find_program(name: str) -> Path:
    """Where a program is, also one for administrators."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + _SYSTEM_PATH)
    if path is None:
        raise GuestUnavailableError(f"{name} is missing (tools/peers.py list names its package)")
    return Path(path)


def output(
    command: Sequence[str | Path], timeout_seconds: float = _SHORT_SECONDS, **more: Any
) -> str:
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
    stdout: str = done.stdout
    return stdout


def libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries of programs, with the loader; nothing for a static one."""
    found: set[Path] = set()
    for program in programs:
        done = subprocess.run(
            ["ldd", str(program)], capture_output=True, text=True, timeout=30, check=False
        )
        found.update(Path(name) for name in re.findall(r"(/\S+) \(0x", done.stdout))
    return found


# --- packages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Apt:
    """apt as this machine has it set up, or with other options."""

    options: tuple[str, ...] = ()

    def candidate(self, package: str) -> str:
        """The version that it would take, such as ``6.1.192-2``."""
        command = ["apt-cache", *self.options, "show", "--no-all-versions", package]
        match = re.search(r"^Version: (.+)$", output(command), re.MULTILINE)
        if match is None:
            raise GuestUnavailableError(f"apt knows no package {package}")
        return match[1]

    def default_kernel(self) -> str:
        """The package that linux-image-amd64 depends on."""
        depends = output(["apt-cache", *self.options, "depends", "linux-image-amd64"])
        match = re.search(r"^\s*Depends: (linux-image-\S+)", depends, re.MULTILINE)
        if match is None:
            raise GuestUnavailableError("apt knows no package linux-image-amd64")
        return match[1]

    def download(self, package: str, version: str, packages: Path) -> Path:
        """The package file; downloaded where it is not yet, and never seen half-written."""
        stem = f"{package}_{version.replace(':', '%3a')}"
        for kept in packages.glob(f"{stem}_*.deb"):
            return kept
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages) as scratch:
            command = ["apt-get", "-q", *self.options, "download", f"{package}={version}"]
            output(command, _DOWNLOAD_SECONDS, cwd=scratch)
            (found,) = Path(scratch).glob("*.deb")
            return found.rename(packages / found.name)


def _codename() -> str:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r"^VERSION_CODENAME=\"?(\w+)", text, re.MULTILINE)
    if match is None or "ID=debian" not in text.splitlines():
        raise GuestUnavailableError("this machine is not Debian, whose backports are asked for")
    return match[1]


def _backports_line() -> str:
    """The line of sources.list: the mirror and the keys of this machine, another suite."""
    codename = _codename()
    form = "$(RELEASE) $(REPO_URI) $(SOURCESENTRY)"
    for line in output(["apt-get", "indextargets", "--format", form]).splitlines():
        release, uri, entry = line.split(maxsplit=2)
        if release == codename:
            source = Path(entry.rpartition(":")[0])
            text = source.read_text(encoding="utf-8") if source.is_file() else ""
            found = re.search(r"signed-by[:=]\s*(/[^\s\]]+)", text, re.IGNORECASE)
            keys = found[1] if found else _DEBIAN_KEYS
            return f"deb [signed-by={keys}] {uri} {codename}-backports main\n"
    raise GuestUnavailableError(f"apt has no source of {codename} to find its backports beside")


def _backports(cache: Path, fresh: bool = False) -> _Apt:
    """apt with the lists of the backports, which are downloaded once or if asked for anew."""
    top = cache / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (top / name).mkdir(parents=True, exist_ok=True)
    sources = top / "sources.list"
    line = _backports_line()
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": top / "lists",
        "Dir::Cache": top / "cache",
        "APT::Sandbox::User": "",  # apt's own user may not be able to write here.
    }
    options = tuple(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))
    known = sources.exists() and sources.read_text(encoding="utf-8") == line
    if fresh or not known or not any((top / "lists").glob("*Packages*")):
        sources.write_text(line, encoding="utf-8")
        output(["apt-get", "-q", *options, "update", "--error-on=any"], _DOWNLOAD_SECONDS)
    return _Apt(options)


def _downloaded(cache: Path, wanted: Sequence[str]) -> list[Path]:
    """Packages of the backports; the lists are renewed where they name what is gone."""
    apt = _backports(cache)
    try:
        return [apt.download(each, apt.candidate(each), cache / "packages") for each in wanted]
    except GuestUnavailableError:
        apt = _backports(cache, fresh=True)
        return [apt.download(each, apt.candidate(each), cache / "packages") for each in wanted]


# --- the kernel ----------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    """``(6, 12)`` of ``linux-image-6.12.95+deb12-amd64``, ``(10, 0)`` of ``10.0.2``."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else ()


def kernel_package(
    wanted: str | None = None, packages: Path | None = None, cxl: bool = False
) -> Path:
    """The ``.deb`` of the kernel: a file, a package by name, or what linux-image-amd64 needs.

    With ``cxl``, if that is too old, what it needs in the backports.
    """
    packages = packages or CACHE / "packages"
    wanted = wanted or os.environ.get(KERNEL_VARIABLE) or None
    if wanted and wanted.endswith(".deb"):
        if not Path(wanted).is_file():
            raise GuestUnavailableError(f"there is no kernel package {wanted}")
        return Path(wanted)
    try:
        apt = _Apt()
        package = wanted or apt.default_kernel()
        if cxl and not wanted and _numbers(package) < CXL_KERNEL:
            package = _backports(packages.parent).default_kernel()
            return _downloaded(packages.parent, [package])[0]
        return apt.download(package, apt.candidate(package), packages)
    except GuestUnavailableError:
        # Without apt's lists, what was downloaded before still boots.
        kept = sorted(packages.glob(f"{wanted or 'linux-image-'}*.deb"))
        series = {_numbers(path.name) for path in kept}
        if not kept or (cxl and not wanted and max(series) < CXL_KERNEL):
            raise
        chosen = max(series) if cxl else min(series)
        return [path for path in kept if _numbers(path.name) == chosen][-1]


# --- QEMU ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qemu:
    """A QEMU that runs here."""

    command: tuple[str, ...]
    version: tuple[int, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """What it needs beside this process's environment."""

    @classmethod
    def of(cls, program: Path, *options: str, **environment: str) -> Qemu:
        """Asks a program which version it is; it must start, with all its libraries."""
        words = [str(program), "--version"]
        version = _numbers(output(words, env={**os.environ, **environment}))
        return cls((str(program), *options), version, environment)

    @classmethod
    def find(cls, cache: Path | None = None, cxl: bool = False) -> Qemu:
        """This machine's; with ``cxl``, if that is too old, the one of the backports."""
        named = os.environ.get(QEMU_VARIABLE)
        found = cls.of(find_program(named or "qemu-system-x86_64"))
        if not cxl or found.version >= CXL_QEMU:
            return found
        if named:
            raise GuestUnavailableError(f"{named} is older than QEMU 8.1, the first with CXL RAM")
        return cls._unpacked(_qemu_directory(cache or CACHE))

    @classmethod
    def _unpacked(cls, directory: Path) -> Qemu:
        shared = directory / "usr/lib/x86_64-linux-gnu"
        data = [word for name in _QEMU_DATA for word in ("-L", str(directory / name))]
        return cls.of(directory / "usr/bin/qemu-system-x86_64", *data, LD_LIBRARY_PATH=str(shared))


def _qemu_directory(cache: Path) -> Path:
    """The backports' QEMU, unpacked; one that was unpacked before serves without a network."""
    kept = sorted(cache.glob("qemu-*/usr/bin/qemu-system-x86_64"))
    if kept:
        return kept[-1].parents[2]
    apt = _backports(cache)
    version = re.sub(r"[^\w.+~-]", "-", apt.candidate(_QEMU_PACKAGES[0]).partition(":")[2])
    target = cache / f"qemu-{version}"
    with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as name:
        unpacked = Path(name) / "unpacked"
        for package in _downloaded(cache, _QEMU_PACKAGES):
            output(["dpkg-deb", "-x", package, unpacked])
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # Otherwise someone else was quicker.
                raise
    return target
