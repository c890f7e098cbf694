#!/usr/bin/env python3
"""The main job, on real input: a file system of this machine's files through a served image.

    tools/demo.py [--size 300M] [--directory DIR]

Makes an image and serves it; formats a file as ext4 holding some directories of /usr; pushes it to
the export with nbdcopy and pulls it back; compares with qemu-img; checks it with fsck; reads every
file out of it with debugfs and compares hashes with /usr. As root with FUSE and loop devices it
also mounts the export and compares the mounted tree. Programs that are missing are installed where
that is possible; what cannot be shown is named.

What this does not do: leave anything behind, need a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pmemkit.units import parse_size
from tools import peers

__all__ = ["Demo", "Failed", "Tree", "choose_tree", "main"]

ROOT = Path(__file__).resolve().parents[1]
COPIES = 4
"""How often the tree's bytes may lie in the work directory at the same moment."""

_PATIENCE_SECONDS = 60.0
_COMMAND_SECONDS = 600
_BLOCK = 4096


class Failed(Exception):
    """Something did not come out as it must."""


class _Unavailable(Exception):
    """This machine cannot do it."""


# --- the tree -------------------------------------------------------------------------------------


@dataclass
class Tree:
    """Directories of this machine and the files in them that can be read."""

    files: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    directories: list[Path] = field(default_factory=list)
    tops: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    blocks_bytes: int = 0

    def add(self, top: Path) -> None:
        """Takes a directory with everything below it, but for what is neither file nor link."""
        self.tops.append(top)
        for place, names, others in os.walk(top):
            here = Path(place)
            self.directories.append(here)
            for name in sorted(others + names):
                path = here / name
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    self.links.append(path)
                elif stat.S_ISREG(mode) and os.access(path, os.R_OK):
                    size = path.lstat().st_size
                    self.files.append(path)
                    self.size_bytes += size
                    self.blocks_bytes += -(-size // _BLOCK) * _BLOCK

    def copy_to(self, target: Path) -> None:
        """The tree under another root, with the same paths below it."""
        for directory in self.directories:
            _below(target, directory).mkdir(parents=True, exist_ok=True)
        for path in self.files:
            shutil.copyfile(path, _below(target, path))
        for path in self.links:
            _below(target, path).symlink_to(path.readlink())

    def differences(self, root: Path) -> list[str]:
        """What a copy under ``root`` does not have as the original has it."""
        found = []
        for path in self.files:
            copied = _below(root, path)
            if not copied.is_file() or copied.is_symlink():
                found.append(f"{path} is missing")
            elif _hash(copied) != _hash(path):
                found.append(f"{path} has other bytes")
        for path in self.links:
            copied = _below(root, path)
            if not copied.is_symlink() or copied.readlink() != path.readlink():
                found.append(f"{path} points elsewhere")
        return found


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sizes(top: Path) -> dict[Path, int]:
    """Bytes of the files under every directory below ``top``."""
    sizes: dict[Path, int] = {}
    for place, names, others in os.walk(top, topdown=False):
        here = Path(place)
        total = sum((here / name).lstat().st_size for name in others)
        sizes[here] = total + sum(sizes.get(here / name, 0) for name in names)
    return sizes


def choose_tree(top: Path, limit: int) -> Tree:
    """Directories below ``top`` that add up to at most ``limit`` bytes, and to most of it."""
    sizes = _sizes(top)
    tree = Tree()
    room = limit

    def take(directory: Path) -> None:
        nonlocal room
        children = [each for each in directory.iterdir() if each in sizes and not each.is_symlink()]
        for child in sorted(children):
            if room < limit // 4:
                return
            if sizes[child] <= room:
                room -= sizes[child]
                tree.add(child)
            else:
                take(child)

    take(top)
    return tree


# --- the job --------------------------------------------------------------------------------------


class Demo:
    """The steps, in order. Each prints what happened."""

    def __init__(self, place: Path, limit: int) -> None:
        self.place = place
        self.limit = limit
        self.tree = Tree()
        self.left_out: list[str] = []
        self.formatted = place / "ext4.img"
        self.image = place / "image.img"
        self.pulled = place / "pulled.img"

    def run(self) -> None:
        """Everything."""
        if not self._have("mkfs.ext4", "nbdcopy"):
            return
        self._make_file_system()
        pmem = [sys.executable, "-m", "pmemkit"]
        size = str(self.formatted.stat().st_size)
        self._run("make an image", *pmem, "create-image", str(self.image), "--size", size)
        with self._serve(pmem) as uri:
            if self._have("nbdinfo"):
                print(_indent(self._run("ask who is there", "nbdinfo", uri)))
            self._copy("push with nbdcopy", str(self.formatted), uri)
            self._copy("pull with nbdcopy", uri, str(self.pulled))
            self._compare(uri)
            self._mounted(uri)
        print(_indent(self._run("what the image is now", *pmem, "info", str(self.image))))
        self._check_file_system()
        self._read_out()

    def _make_file_system(self) -> None:
        self._say(f"choose directories of /usr, {self.limit >> 20} MiB at most")
        self.tree = tree = choose_tree(Path("/usr"), self.limit)
        for top in tree.tops:
            print(f"    {top}")
        print(f"    {len(tree.files)} files, {len(tree.links)} links, {tree.size_bytes >> 20} MiB")
        staging = self.place / "staging"
        tree.copy_to(staging)
        inodes = len(tree.files) + len(tree.links) + len(tree.directories) + 1024
        size_mib = (tree.blocks_bytes * 23 // 20 + inodes * 512 >> 20) + 64
        self._run(
            "format a file as ext4 with these files in it",
            *("mkfs.ext4", "-q", "-F", "-b", str(_BLOCK), "-N", str(inodes)),
            *("-d", str(staging), str(self.formatted), f"{size_mib}M"),
        )
        shutil.rmtree(staging)

    def _copy(self, what: str, source: str, target: str) -> None:
        began = time.monotonic()
        self._run(what, "nbdcopy", "--flush", source, target)
        seconds = time.monotonic() - began
        size = self.formatted.stat().st_size
        data = self.formatted.stat().st_blocks * 512
        rate = size / seconds / 1e6
        print(f"    {size >> 20} MiB ({data >> 20} MiB data) in {seconds:.2f} s: {rate:.0f} MB/s")

    def _compare(self, uri: str) -> None:
        if not self._have("qemu-img"):
            return
        raw = ("qemu-img", "compare", "-f", "raw", "-F", "raw", str(self.formatted))
        print(_indent(self._run("compare what was pulled", *raw, str(self.pulled))))
        print(_indent(self._run("compare what is served", *raw, uri)))

    def _check_file_system(self) -> None:
        if self._have("fsck.ext4"):
            output = self._run("check it", "fsck.ext4", "-fn", str(self.pulled))
            print(_indent(output.splitlines()[-1]))

    def _read_out(self) -> None:
        if not self._have("debugfs"):
            return
        top = self.tree.tops[0]
        command = ("debugfs", "-R", f'ls -p "{top}"', str(self.pulled))
        names = [
            line.split("/")[5]
            for line in self._run("list with debugfs", *command).split("\n")
            if line.count("/") > 5
        ]
        expected = {".", "..", *(each.name for each in top.iterdir())}
        if set(names) - expected:
            raise Failed(f"debugfs lists {sorted(set(names) - expected)} in {top}")
        print(f"    {len(names)} entries in {top}, as the machine has them")
        target = self.place / "read-out"
        target.mkdir()
        self._run("read all of it out", "debugfs", "-R", f"rdump /usr {target}", str(self.pulled))
        self._same(target, "read out by debugfs")

    def _same(self, root: Path, how: str) -> None:
        began = time.monotonic()
        differences = self.tree.differences(root)
        if differences:
            raise Failed(f"{len(differences)} differences {how}: {'; '.join(differences[:5])}")
        count = len(self.tree.files)
        seconds = time.monotonic() - began
        print(f"    {count} files {how} have the hashes they have in /usr ({seconds:.1f} s)")

    # --- the server -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _serve(self, pmem: list[str]) -> Iterator[str]:
        """The image as an export, until the block ends; SIGTERM must then give exit status 0."""
        place = self.place / "nbd.sock"
        command = [*pmem, "serve", str(self.image), "--name", "demo", "--unix", str(place)]
        self._say("serve the image: " + " ".join(command[1:]))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        try:
            assert server.stdout is not None
            uri = server.stdout.readline().strip()
            if not uri:
                raise Failed(f"the server ended with {server.wait()}")
            print(f"    {uri}")
            yield uri
            self._say("stop the server with SIGTERM")
            server.terminate()
            status = server.wait(_PATIENCE_SECONDS)
            if status:
                raise Failed(f"the server's exit status is {status}")
            print("    its exit status is 0")
        finally:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()

    # --- mounting ---------------------------------------------------------------------------------

    def _mounted(self, uri: str) -> None:
        """Mounts the export through nbdfuse and a loop device and compares the tree."""
        obstacle = _mount_obstacle()
        if obstacle is not None:
            self._leave_out(f"mounting the export: {obstacle}")
            return
        if not self._have("nbdfuse", "fusermount3"):
            return
        self._say("mount the export through nbdfuse and a loop device")
        try:
            with self._fuse(uri) as file, self._loop(file) as root:
                self._same(root, "in the mounted export")
        except _Unavailable as cause:
            self._leave_out(f"mounting the export: {cause}")

    @contextlib.contextmanager
    def _fuse(self, uri: str) -> Iterator[Path]:
        directory = self.place / "fuse"
        directory.mkdir()
        file = directory / "disk"
        process = subprocess.Popen(["nbdfuse", "-r", str(file), uri], env=_environment())
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _Unavailable(f"nbdfuse does not mount (status {process.poll()})")
                time.sleep(0.02)
            yield file
        finally:
            subprocess.run(["fusermount3", "-q", "-u", str(directory)], check=False)
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def _loop(self, file: Path) -> Iterator[Path]:
        root = self.place / "mounted"
        root.mkdir()
        command = ["mount", "-t", "ext4", "-o", "loop,ro,noload", str(file), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _Unavailable(f"mount: {' '.join(done.stderr.split())}")
        try:
            yield root
        finally:
            subprocess.run(["umount", str(root)], check=True)

    # --- what is said and run ---------------------------------------------------------------------

    def _say(self, text: str) -> None:
        print(f"-- {text}", flush=True)

    def _leave_out(self, text: str) -> None:
        self.left_out.append(text)
        print(f"-- left out: {text}", flush=True)

    def _have(self, *programs: str) -> bool:
        """Whether these programs are there; what is lost without them is told."""
        missing = [name for name in programs if peers.find(name) is None]
        for name in missing:
            self._leave_out(peers.reason(name))
        return not missing

    def _run(self, what: str, *command: str) -> str:
        """A program's output; it must succeed."""
        self._say(what)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(),
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            text = (done.stderr or done.stdout).strip()
            raise Failed(f"{command[0]} ended with {done.returncode}: {text}")
        return done.stdout.strip()


def _environment() -> dict[str, str]:
    """For children: this checkout, and the programs of an administrator."""
    path = os.environ.get("PATH", os.defpath)
    return os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
    }


def _mount_obstacle() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"there is no {device}"
    return None


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# --- where ----------------------------------------------------------------------------------------


def _place_with_room(wanted: Path | None, needed: int) -> Path:
    """A directory with room for the job."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    places = [wanted] if wanted is not None else places
    for place in places:
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free > needed:
            return place
    names = ", ".join(str(place) for place in places)
    raise Failed(f"{needed >> 20} MiB of room are needed and none of these has it: {names}")


def _on_signal(number: int, frame: object) -> None:
    """Ends the program by an exception, so that everything is cleaned up."""
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 1 where anything came out wrong."""
    parser = argparse.ArgumentParser(description="A file system through a served image.")
    parser.add_argument("--size", type=parse_size, default="300M", help="of the files taken")
    parser.add_argument("--directory", type=Path, help="where to work; needs 5 times the size")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _on_signal)
    peers.install("demo")
    began = time.monotonic()
    try:
        place = _place_with_room(options.directory, (COPIES + 1) * options.size)
        with tempfile.TemporaryDirectory(prefix="pmemkit-demo-", dir=place) as directory:
            demo = Demo(Path(directory), options.size)
            demo.run()
    except (Failed, OSError, subprocess.TimeoutExpired) as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    left = f"; left out: {len(demo.left_out)}" if demo.left_out else ""
    print(f"demo: everything compared equal in {time.monotonic() - began:.0f} s{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
