"""``pmem mount`` for tests: what it needs, what it may not leave behind, and what fsck says."""

import hashlib
import json
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from cli_run import PATIENCE_SECONDS, PMEM, call, environment, pmem

import pmemkit

MIB = 1 << 20
SYS_ADMIN = 1 << 21


def why_not():
    """Why nothing can be mounted here; ``None`` where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"{device} is missing"
    status = Path("/proc/self/status").read_text()
    (effective,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return None if int(effective, 16) & SYS_ADMIN else "mounting needs CAP_SYS_ADMIN"


class Place:
    """A directory with an image, a mount point, and records of its own."""

    def __init__(self, path, monkeypatch):
        self.path = path
        self.image = path / "disk.img"
        self.target = path / "target"
        self.target.mkdir()
        self.runtime = path / "run"
        self.env = {"PMEMKIT_RUNTIME_DIR": str(self.runtime)}
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)

    def make_image(self, mode, size_mib=32):
        """An image as ``pmem mount`` takes it: ``raw``, or ``sector-512`` and such."""
        if mode == "raw":
            pmemkit.open(self.image, create_size=size_mib * MIB).close()
            return str(self.image)
        self.done("create-image", self.image, "--size", f"{size_mib}M", "--label-size", "128K")
        sector_size = mode.removeprefix("sector-")
        self.done("create-namespace", self.image, "-m", "sector", "-l", sector_size)
        return f"{self.image}:namespace0.0"

    def pmem(self, *words):
        """Runs a command; one that leaves a server behind in a process of its own."""
        stays = words[0] == "mount" and "--list" not in words
        return pmem(*words, env=self.env) if stays else call(*words)

    def done(self, *words):
        done = self.pmem(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def mount(self, *words):
        """Mounts, and gives what it said."""
        return json.loads(self.done("mount", *words, self.target, "--json"))

    def start(self, *words):
        """A mount in a process that the caller waits for."""
        return subprocess.Popen(
            [*PMEM, "mount", *map(str, words)],
            env=environment(**self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def umount(self, *words):
        return self.done("umount", self.target, *words)

    def listed(self):
        return json.loads(self.done("mount", "--list", "--json"))

    def loops(self):
        """The loop devices over files of this place."""
        found = []
        for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                file = entry.read_text().strip()
            except OSError:
                continue
            found += [f"{entry.parts[3]}: {file}"] if str(self.path) in file else []
        return found

    def leftovers(self):
        """What is left of mounts of this place: records, mounts, loop devices, servers."""
        found = [str(each) for each in (self.runtime / "mounts").glob("*")]
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            found += [line] if str(self.path) in line else []
        found += self.loops()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"mount" in words and str(self.target).encode() in words:
                found.append(f"process {process.name}")
        return found

    def clean_up(self):
        """For a test that failed: nothing of it is left to the next one."""
        if self.leftovers():
            self.pmem("umount", "--all", "--force")
            subprocess.run(["umount", "--lazy", self.target], capture_output=True, check=False)


def wait_until(done):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def run(*words, check=True, **options):
    done = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        **options,
    )
    if check:
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
    return done


@contextmanager
def contents(place, namespace):
    """The bytes of the block device, as a file."""
    from pmemkit.serve.fuse_export import FuseExport

    directory = place.path / "contents"
    directory.mkdir()
    with pmemkit.open(namespace, read_only=True) as region, region.device() as device:
        export = FuseExport(device, directory, "device")
        try:
            yield export.file
        finally:
            run("umount", directory)
            assert export.join(PATIENCE_SECONDS)
            directory.rmdir()


def require_clean(place, namespace, filesystem):
    """What the file system's own check says of the device, which is mounted nowhere."""
    with contents(place, namespace) as file:
        if filesystem == "ext4":
            said = run("e2fsck", "-f", "-n", file, check=False)
        else:
            said = run("xfs_repair", "-n", "-f", file, check=False)
        assert said.returncode == 0, said.stdout + said.stderr


def hashes(directory):
    """The hash of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_direct(path, data):
    """Writes past the page cache, a block at a time."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    import mmap

    with mmap.mmap(-1, MIB) as buffer:
        for at in range(0, len(data), MIB):
            part = data[at : at + MIB]
            buffer[: len(part)] = part
            with memoryview(buffer)[: len(part)] as view:
                assert os.write(fd, view) == len(part)
    os.close(fd)


def read_direct(path):
    """Reads past the page cache."""
    import mmap

    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    parts = []
    with mmap.mmap(-1, MIB) as buffer:
        while count := os.readv(fd, [buffer]):
            parts.append(buffer[:count])
    os.close(fd)
    return b"".join(parts)
