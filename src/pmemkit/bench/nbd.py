"""Suite ``nbd``: our server against nbdkit's and QEMU's, with the same fio over a Unix socket.

Every case is measured in turns on all servers, which idle meanwhile. ``memory`` and ``qemu-nbd``
hold the same populated gigabyte; ``null`` holds nothing and shows the client's own ceiling. Server
CPU is read from ``/proc/PID/stat`` around each run and reported a million operations.

What this does not do: measure latency percentiles, TCP, or TLS.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pmemkit.bench._runner import (
    Options,
    Report,
    alternate,
    parse_options,
    suite,
)
from pmemkit.errors import NotSupported, SystemFailure
from pmemkit.units import format_size, parse_size

__all__ = ["Case", "Sample", "Server", "main"]

_START_SECONDS = 20.0
_STOP_SECONDS = 20.0
_MEGA = 1_000_000


@dataclass(frozen=True)
class Case:
    """One load: fio's words for it."""

    name: str
    pattern: str
    block: str
    depth: int
    jobs: int = 1
    fsync: int = 0

    @property
    def counts_operations(self) -> bool:
        """Small blocks are reported as operations a second, large ones as MiB a second."""
        return self.block == "4k"


@dataclass(frozen=True)
class Sample:
    """What one run came to."""

    speed: float
    cpu_seconds_per_million: float


_RANDOM = tuple(
    Case(f"4k {pattern} qd{depth}" + (f" x{jobs}" if jobs > 1 else ""), pattern, "4k", depth, jobs)
    for depth, jobs in ((1, 1), (16, 1), (64, 1), (16, 2))
    for pattern in ("randread", "randwrite")
)
_SEQUENTIAL = tuple(Case(f"256k {name} qd8", name, "256k", 8) for name in ("read", "write"))
_SECTORS = tuple(
    Case(f"4k {pattern} qd{depth}", pattern, "4k", depth)
    for depth in (16, 64)
    for pattern in ("randread", "randwrite")
)
_FSYNC = (Case("4k randwrite fsync32", "randwrite", "4k", 16, 1, 32),)


class Server:
    """A server process on a Unix socket in a directory of its own."""

    def __init__(self, name: str, command: Sequence[str], place: Path) -> None:
        self.name = name
        self.socket = place / f"{name.replace(' ', '-')}.sock"
        self._log = place / f"{name.replace(' ', '-')}.log"
        # Not every server removes its socket, and a name may be used again.
        self.socket.unlink(missing_ok=True)
        words = [word.replace("SOCKET", str(self.socket)) for word in command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def uri(self) -> str:
        """Where clients find it."""
        return f"nbd+unix:///?socket={self.socket}"

    def wait_until_ready(self) -> None:
        """Returns when the socket accepts connections."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.socket))
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemFailure(f"{self.name} does not serve on {self.socket}: {self.state()}")

    def state(self) -> str:
        """Whether it runs, and the end of what it said: for messages."""
        status = self._process.poll()
        state = "running" if status is None else f"ended with status {status}"
        return f"{state}; {self._log.read_text(encoding='utf-8', errors='replace')[-2000:]}"

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _fio(server: Server, *words: str, timeout_seconds: float) -> dict[str, float]:
    """Runs one fio job group and returns its JSON, summed over reads and writes."""
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", "--group_reporting",
        "--output-format=json", "--gtod_reduce=1", "--norandommap", "--randrepeat=0", *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    if done.returncode != 0 or "{" not in done.stdout:
        said = done.stderr[-1000:].strip() or done.stdout[:1000].strip()
        raise SystemFailure(f"fio on {server.name} failed: {said}; the server: {server.state()}")
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    if job["error"]:
        raise SystemFailure(f"fio on {server.name} failed with error {job['error']}")
    both = (job["read"], job["write"])
    return {
        "iops": sum(side["iops"] for side in both),
        "mib": sum(side["bw_bytes"] for side in both) / (1 << 20),
        "operations": sum(side["total_ios"] for side in both),
    }


def _populate(server: Server, size: int) -> None:
    # Flushed, so that writing it back does not fall into the runs.
    words = ("--rw=write", "--bs=1m", "--iodepth=4", f"--size={size}", "--end_fsync=1")
    _fio(server, *words, timeout_seconds=600)


def _measure(case: Case, server: Server, size: int, seconds: float) -> Sample:
    words = [
        f"--rw={case.pattern}", f"--bs={case.block}", f"--iodepth={case.depth}",
        f"--numjobs={case.jobs}", f"--size={size}", "--time_based", f"--runtime={seconds}",
    ]  # fmt: skip
    if case.fsync:
        words.append(f"--fsync={case.fsync}")
    before = server.cpu_seconds()
    found = _fio(server, *words, timeout_seconds=seconds + 120)
    spent = server.cpu_seconds() - before
    speed = found["iops"] if case.counts_operations else found["mib"]
    return Sample(speed, spent * _MEGA / max(1.0, found["operations"]))


@contextlib.contextmanager
def _servers(
    commands: Mapping[str, Sequence[str]], place: Path, size: int, unpopulated: Sequence[str] = ()
) -> Iterator[list[Server]]:
    """The named servers, populated and stopped at the end whatever happens."""
    running: list[Server] = []
    try:
        for name, command in commands.items():
            server = Server(name, command, place)
            running.append(server)
            server.wait_until_ready()
            if name not in unpopulated:
                _populate(server, size)
        yield running
    finally:
        for server in running:
            server.stop()


def _compare(
    cases: Sequence[Case], servers: Sequence[Server], report: Report, suffix: str, size: int
) -> None:
    """Measures the cases on all servers; the first one is ours."""
    options = report.options
    for case in cases:
        name = case.name + suffix
        if not options.wanted(name):
            continue
        sides = [partial(_measure, case, server, size, options.seconds) for server in servers]
        ours, *peers = alternate(sides, options.runs)
        unit = "operations/s" if case.counts_operations else "MiB/s"
        for server, samples in zip(servers[1:], peers, strict=True):
            speeds = [sample.speed for sample in samples]
            report.add(name, unit, [sample.speed for sample in ours], speeds, server.name)
            report.add(
                f"{name} cpu",
                "CPU s/10^6 operations",
                [sample.cpu_seconds_per_million for sample in ours],
                [sample.cpu_seconds_per_million for sample in samples],
                server.name,
                less_is_better=True,
            )


def _ours(source: str, size: int, *more: str) -> list[str]:
    words = [sys.executable, "-m", "pmemkit", "serve", source]
    if source == "-":
        words += ["--size", str(size)]
    return [*words, "--unix", "SOCKET", *more]


def _nbdkit(*plugin: str) -> list[str]:
    return ["nbdkit", "--foreground", "--exit-with-parent", "--unix", "SOCKET", *plugin]


def _fresh_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _qemu(path: Path) -> list[str]:
    words = ["qemu-nbd", "--format=raw", "--persistent", "--shared=8", "--cache=writeback"]
    return [*words, "--socket=SOCKET", str(path)]


def _wanted(options: Options, cases: Sequence[Case], suffix: str = "") -> bool:
    return any(options.wanted(case.name + suffix) for case in cases)


def _in_memory(report: Report, place: Path, size: int, peers: Sequence[str]) -> None:
    """Everything that is served from memory, ours with segments of media handed to the kernel."""
    if not _wanted(report.options, _RANDOM + _SEQUENTIAL):
        return
    with contextlib.ExitStack() as stack:
        commands = {"ours": _ours("-", size), "nbdkit memory": _nbdkit("memory", str(size))}
        if "null" in peers:
            commands["nbdkit null"] = _nbdkit("null", str(size))
        if "qemu" in peers and shutil.which("qemu-nbd"):
            memory = Path("/dev/shm")
            where = stack.enter_context(
                tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
            )
            commands["qemu-nbd"] = _qemu(_fresh_file(Path(where) / "image", size))
        elif "qemu" in peers:
            print("left out: the comparison with qemu-nbd: qemu-nbd is missing")
        servers = stack.enter_context(_servers(commands, place, size, ("nbdkit null",)))
        _compare(_RANDOM + _SEQUENTIAL, servers, report, "", size)


def _through_a_buffer(report: Report, place: Path, size: int) -> None:
    """Sequential transfers again, ours copying through a buffer a connection."""
    suffix = " no-map"
    if not _wanted(report.options, _SEQUENTIAL, suffix):
        return
    commands = {
        "ours": _ours("-", size, "--no-map"),
        "nbdkit memory": _nbdkit("memory", str(size)),
    }
    with _servers(commands, place, size) as servers:
        _compare(_SEQUENTIAL, servers, report, suffix, size)


def _sectors(report: Report, place: Path, size: int) -> None:
    """Mode sector, whose writes are atomic and durable, against memory that is neither."""
    suffix = " sector"
    if not _wanted(report.options, _SECTORS, suffix):
        return
    from pmemkit.bus import machine_of
    from pmemkit.namespace.create import Wish, create
    from pmemkit.namespace.images import open_images

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as where:
        # Room for the map, the log and the spare blocks beside the sectors.
        image = _fresh_file(Path(where) / "image", size + size // 64 + (32 << 20))
        with open_images(machine_of([str(image)])) as images:
            region = images.bus().regions[0]
            create(images, region.dev, Wish(mode="sector", sector_size=4096))
        commands = {
            "ours": _ours(f"{image}:namespace0.0", size),
            "nbdkit memory": _nbdkit("memory", str(size)),
        }
        with _servers(commands, place, size) as servers:
            _compare(_SECTORS, servers, report, suffix, size)


def _on_disk(report: Report, place: Path, size: int, disk: Path) -> None:
    """Random writes with a flush after every 32nd, on files of one file system."""
    suffix = " file"
    if not _wanted(report.options, _FSYNC, suffix):
        return
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=disk) as where:
        our_file = _fresh_file(Path(where) / "ours.img", size)
        peer_file = _fresh_file(Path(where) / "peer.img", size)
        commands = {
            "ours": _ours(str(our_file), size),
            "nbdkit file": _nbdkit("file", str(peer_file)),
        }
        with _servers(commands, place, size) as servers:
            _compare(_FSYNC, servers, report, suffix, size)


def _check_programs() -> list[str]:
    """Versions of what is measured with; raises :class:`NotSupported` without it."""
    versions = []
    for name in ("fio", "nbdkit", "qemu-nbd"):
        if name == "qemu-nbd" and shutil.which(name) is None:
            continue
        if shutil.which(name) is None:
            raise NotSupported(f"{name} is not installed; this suite measures with it")
        done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
        versions.append(f"{name}: {done.stdout.partition(chr(10))[0]}")
    return versions


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="of every export (1G)")
    parser.add_argument(
        "--peers", default="null,qemu", metavar="LIST", help="beside nbdkit memory (null,qemu)"
    )
    parser.add_argument(
        "--disk", type=Path, default=Path("build/bench"), help="directory of the fsync case"
    )


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, found = parse_options("nbd", arguments, runs=3, seconds=3.0, more=_more)
    peers = () if options.quick else tuple(found.peers.split(","))
    report = Report(options)
    versions = _check_programs()
    print(f"{format_size(found.size)} populated, {options.runs} runs of {options.seconds:g} s")
    with tempfile.TemporaryDirectory(prefix="pmemkit-bench-") as place:
        _in_memory(report, Path(place), found.size, peers)
        _through_a_buffer(report, Path(place), found.size)
        _sectors(report, Path(place), found.size)
        _on_disk(report, Path(place), found.size, found.disk)
    report.write(versions)


if __name__ == "__main__":
    sys.exit(main())
