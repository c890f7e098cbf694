"""Bad media and a truncated image under a running server: errors of requests, and no dead process.

The server is `pmem serve` with namespaces of modes raw and sector, and a file of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbd_wire as wire
import pytest
from nbd_served import MIB, PATIENCE_SECONDS, environment

from pmemkit.bus import machine_of, observe
from pmemkit.media.badblocks import BadRun, note
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels

LABEL_SIZE = 128 << 10
EXPORTS = ("raw", "sector")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate(80 * MIB + LABEL_SIZE)
    with open_images(machine_of([path], label_size=LABEL_SIZE)) as images:
        init_labels(images, 0, version=(1, 2))
        create(images, None, Wish(mode="raw", size=16 * MIB))
        create(images, None, Wish(mode="sector", size=32 * MIB))
    return path


class Server:
    """A process that serves the namespaces and one more file."""

    def __init__(self, image: Path) -> None:
        self.socket, other = str(image.with_name("nbd.sock")), image.with_name("other.img")
        with other.open("wb") as file:
            file.truncate(MIB)
        exports = [f"{name}={image}:namespace0.{n}" for n, name in enumerate(EXPORTS)]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pmemkit", "serve", "--unix", self.socket),
                *(*exports, f"other={other}"),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert b"nbd" in self.process.stdout.readline()

    def ask(self, export: str, data: bytes, size: int = 0) -> tuple[int, bytes]:
        """One request on a connection of its own: the error and the data."""
        with wire.RawClient(self.socket, PATIENCE_SECONDS) as client:
            client.start(export)
            return client.ask(data, size)

    def read(self, export: str, offset: int, size: int = 4096) -> tuple[int, bytes]:
        return self.ask(export, wire.request(wire.READ, offset, size), size)


@pytest.fixture
def serve(image: Path) -> Iterator[list[Server]]:
    """Servers that a test starts; all of them live until its end."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        ended = server.process.poll()
        server.process.kill()
        server.process.communicate()
        assert ended is None, f"the server ended with {ended}"


def test_a_bad_block_is_eio_until_it_is_written(image: Path, serve: list[Server]) -> None:
    raw, sector = observe(machine_of([image])).regions[0].namespaces
    first = raw.offset // 512 + 8
    # A sector that was never written lies in the block of its own number.
    data = (sector.offset + sector.claim.info.dataoff) // 512 + 8  # type: ignore[union-attr]
    note(str(image), "inject", BadRun(first, 1))
    note(str(image), "inject", BadRun(data, 1))
    serve.append(Server(image))
    (server,) = serve
    for export in EXPORTS:
        assert server.read(export, 0) == (0, bytes(4096))
        assert server.read(export, 4096)[0] == wire.EIO
        assert server.read(export, 0, 16384)[0] == wire.EIO
        assert server.ask(export, wire.write_request(4096, b"x" * 4096)) == (0, b"")
        assert server.read(export, 0, 8192) == (0, bytes(4096) + b"x" * 4096)


def test_an_image_that_is_truncated_is_eio(image: Path, serve: list[Server]) -> None:
    serve.append(Server(image))
    (server,) = serve
    for export in EXPORTS:
        assert server.ask(export, wire.write_request(0, b"x" * 65536)) == (0, b"")
    os.truncate(image, 4096)
    for export in EXPORTS:
        for offset in (4096, MIB):
            assert server.read(export, offset)[0] == wire.EIO
            assert server.read(export, offset, MIB)[0] == wire.EIO
        assert server.ask(export, wire.write_request(4096, b"y" * 8192))[0] == wire.EIO
        assert server.ask(export, wire.write_request(4096, b"y" * 8192))[0] == wire.EPERM
    assert server.read("other", 0) == (0, bytes(4096))
