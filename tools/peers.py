#!/usr/bin/env python3
"""Programs of other people that the tests, the demo and the benchmarks talk to.

One table says for each program which Debian package has it and what is left out without it. The
Makefile installs from the table, the tests take their skip reasons from it.

    tools/peers.py list                        what there is and what it is for
    tools/peers.py install --for test          install what is missing, or say what is left out

What this does not do: fail when something cannot be installed. The reader is told what is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["PEERS", "Peer", "find", "install", "main", "reason"]

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_DIST_PACKAGES = "/usr/lib/python3/dist-packages"
_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Peer:
    """A program, library (``lib….so.N``) or Python module (``module:name``) not written here."""

    name: str
    package: str
    users: frozenset[str]
    """Of ``demo``, ``test``, ``bench`` and ``guest``."""
    without: str
    """What is left out when it is missing."""


def _peer(name: str, package: str, users: str, without: str) -> Peer:
    return Peer(name, package, frozenset(users.split()), without)


PEERS = (
    _peer("nbdkit", "nbdkit", "bench test", "the comparison with nbdkit's plugins"),
    _peer("nbdinfo", "libnbd-bin", "demo test", "what an independent client sees of an export"),
    _peer("nbdcopy", "libnbd-bin", "demo test", "copies through an independent client"),
    _peer("nbdfuse", "libnbd-bin", "demo test", "mounting an export through FUSE"),
    _peer("module:nbd", "python3-libnbd", "test", "single NBD requests from libnbd"),
    _peer("fio", "fio", "bench test", "verified random load and every NBD timing"),
    _peer("qemu-img", "qemu-utils", "demo test", "comparing images with QEMU's NBD client"),
    _peer("qemu-io", "qemu-utils", "test", "single requests from QEMU's NBD client"),
    _peer("qemu-nbd", "qemu-utils", "bench test", "the comparison with qemu-nbd"),
    _peer("nbd-client", "nbd-client", "test", "listing exports with the kernel's own client"),
    _peer("ndctl", "ndctl", "guest test", "info blocks compared with ndctl's, byte for byte"),
    _peer("mkfs.ext4", "e2fsprogs", "demo guest test", "making a file system on an export"),
    _peer("fsck.ext4", "e2fsprogs", "demo test", "checking the file system that came back"),
    _peer("debugfs", "e2fsprogs", "demo test", "reading files out of the image"),
    _peer("mkfs.xfs", "xfsprogs", "guest test", "a second file system on our devices"),
    _peer("e2fsck", "e2fsprogs", "guest test", "checking ext4, in the guest and on pmem mount"),
    _peer("xfs_repair", "xfsprogs", "guest test", "checking xfs, in the guest and on pmem mount"),
    _peer("mount", "mount", "test", "mounting the kernel's file systems with pmem mount"),
    _peer("losetup", "mount", "test", "the loop device under pmem mount"),
    _peer("fstrim", "util-linux", "test", "discards of a mounted file system"),
    _peer("fusermount3", "fuse3", "demo test", "unmounting what nbdfuse mounted"),
    _peer("libpmem.so.1", "libpmem1", "bench test", "the comparison with libpmem"),
    _peer("libjemalloc.so.2", "libjemalloc2", "bench", "frames compared with jemalloc"),
    _peer("libmimalloc.so.2", "libmimalloc2.0", "bench", "frames compared with mimalloc"),
    _peer("aarch64-linux-gnu-as", "binutils-aarch64-linux-gnu", "test", "assembling aarch64 code"),
    _peer("qemu-system-x86_64", "qemu-system-x86", "guest test", "a real Linux kernel as referee"),
    _peer("daxctl", "daxctl", "guest test", "devdax as the kernel's own tool sees it"),
    _peer("cxl", "ndctl", "guest test", "CXL regions made by the kernel's own tool"),
    _peer("numactl", "numactl", "guest test", "programs on the memory of one NUMA node"),
    _peer("busybox", "busybox-static", "guest test", "the guest's shell"),
    _peer("depmod", "kmod", "guest test", "the guest's kernel modules"),
    _peer("blkid", "util-linux", "guest test", "what the guest finds on a block device"),
    _peer("cc", "gcc", "guest test", "reading and writing devdax in the guest"),
    _peer("g++", "g++", "test", "building libFuzzer for the request parser"),
)


def find(name: str) -> str | None:
    """Where a peer of the table is, or ``None``. Administration programs are found without root."""
    if name.startswith("module:"):
        path = [*sys.path, _DIST_PACKAGES]
        spec = importlib.machinery.PathFinder.find_spec(name.removeprefix("module:"), path)
        return spec.origin if spec else None
    if ".so." in name:
        try:
            ctypes.CDLL(name)
        except OSError as refused:
            # It is there and wants to be loaded with the program.
            return name if "static TLS" in str(refused) else None
        return name
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + _SYSTEM_PATH)


def reason(name: str) -> str:
    """The sentence a test is skipped with when this peer is missing."""
    for peer in PEERS:
        if peer.name == name:
            return f"{peer.name} is missing (Debian package {peer.package}): {peer.without}"
    raise KeyError(f"{name} is not in the table of tools/peers.py")


def _missing(user: str) -> list[Peer]:
    return [peer for peer in PEERS if user in peer.users and find(peer.name) is None]


def _apt(arguments: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-y", "-q", "--no-install-recommends", *arguments]
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, env=environment, timeout=_INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        print(f"apt-get: {failure}", flush=True)
        return False
    return done.returncode == 0


def install(user: str) -> list[Peer]:
    """Installs what a user of the table lacks and returns what is still missing."""
    missing = _missing(user)
    if not missing:
        return []
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        why = "not root" if shutil.which("apt-get") else "no apt-get here"
        print(f"{len(missing)} programs are missing and are not installed ({why}).")
    else:
        packages = sorted({peer.package for peer in missing})
        _apt(["update"])
        if not _apt(["install", *packages]):
            # One package that cannot be had must not keep the others away.
            for package in packages:
                _apt(["install", package])
    return _missing(user)


def _print_table() -> None:
    for peer in PEERS:
        state = find(peer.name) or "missing"
        users = ",".join(sorted(peer.users))
        print(f"{peer.name:22} {peer.package:28} {users:15} {state:34} {peer.without}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one of the commands of the module's head."""
    parser = argparse.ArgumentParser(description="Programs the tests, demo and benchmarks talk to.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the whole table and what is installed")
    for_user = commands.add_parser("install", help="install what is missing (root with apt)")
    users = ("demo", "test", "bench", "guest")
    for_user.add_argument("--for", dest="user", choices=users, default="test")
    options = parser.parse_args(arguments)
    if options.command == "list":
        _print_table()
        return 0
    for peer in install(options.user):
        print(f"left out: {peer.without}: {peer.name} is missing (package {peer.package})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
