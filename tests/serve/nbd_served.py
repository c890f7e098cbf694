"""Real exports for tests: a file behind the core's stack, served in a thread or in a process."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nbd_wire as wire
import pytest

from pmemkit.serve import Export, RunningServer, serve_in_thread

ROOT = Path(__file__).resolve().parent.parent.parent
SERVE_FILE = Path(__file__).with_name("nbd_serve_file.py")
DIST_PACKAGES = "/usr/lib/python3/dist-packages"
PATIENCE_SECONDS = 60.0

MIB = 1 << 20


def file_device(image: Path, size: int, *, read_only: bool = False) -> Any:
    """A device over a file, which is made sparse and ``size`` bytes long if it does not exist."""
    from pmemkit._native import block, media

    if not image.exists():
        image.touch()
        os.truncate(image, size)
    fd = os.open(image, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        medium = media.map_file(fd, size, granularity="page", read_only=read_only)
    finally:
        os.close(fd)
    return block.raw(medium, read_only=read_only)


@dataclass
class Served:
    """A running server with one file behind it."""

    running: RunningServer
    socket: str
    image: Path
    events: list[Any]

    @property
    def uri(self) -> str:
        return self.running.uri

    def uri_of(self, export: str) -> str:
        return self.running.uri_of(export)

    def client(self) -> wire.RawClient:
        return wire.RawClient(self.socket)


@contextmanager
def serve_image(
    directory: Path,
    *,
    size: int = 16 * MIB,
    layer: Callable[[Any], Any] | None = None,
    more: Iterable[Export] = (),
    **options: Any,
) -> Iterator[Served]:
    """Exports ``disk``, ``frozen`` (the same device, read-only), and ``more`` at a Unix socket."""
    image, place = directory / "image", directory / "nbd.sock"
    device = file_device(image, size)
    device = device if layer is None else layer(device)
    exports = [
        Export("disk", device, description="a disk of the tests"),
        Export("frozen", device, read_only=True),
        *more,
    ]
    events: list[Any] = []
    with serve_in_thread(exports, unix=place, on_event=events.append, **options) as running:
        yield Served(running, str(place), image, events)


@dataclass
class ServerProcess:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    socket: str

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert self.process.poll() is None, f"the server ended: {self.process.returncode}"
            try:
                with wire.RawClient(self.socket) as client:
                    # Clients may queue before the server serves, and before it minds signals.
                    client.receive(wire.GREETING_SIZE)
                return
            except OSError:
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.005)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=PATIENCE_SECONDS)


def environment() -> dict[str, str]:
    """For a child that imports pmemkit from this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


@contextmanager
def server_process(image: Path, place: Path, *arguments: str) -> Iterator[ServerProcess]:
    """Serves an existing file; killed at the end if it still runs."""
    command = [sys.executable, str(SERVE_FILE), str(image), "--unix", str(place), *arguments]
    server = ServerProcess(subprocess.Popen(command, env=environment()), str(place))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def libnbd() -> ModuleType:
    """Debian's binding of libnbd, for tests marked ``peer("module:nbd")``."""
    sys.path.append(DIST_PACKAGES)
    try:
        return importlib.import_module("nbd")
    finally:
        sys.path.remove(DIST_PACKAGES)


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program's output; its complaint is shown when it fails."""
    options = {"timeout": PATIENCE_SECONDS, "capture_output": True, "text": True} | options
    done = subprocess.run(command, check=False, **options)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
