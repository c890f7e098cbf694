"""What NBD promises of flush, FUA and several connections holds with a cache: killed servers."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbd_wire as wire
import pytest
from nbd_served import MIB, ServerProcess, environment

SIZE = 16 * MIB
BLOCK = 4096
CAN_MULTI_CONN = 1 << 8


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    return image


@contextmanager
def cached(image: Path, *words: str) -> Iterator[ServerProcess]:
    """``pmem serve`` with a cache; killed at the end, so that what was not flushed is gone."""
    place = image.with_suffix(".sock")
    command = [sys.executable, "-m", "pmemkit", "serve", str(image), "--unix", str(place)]
    options = ["--cache", "writeback", "--cache-size", "4M", *words]
    process = subprocess.Popen([*command, *options], env=environment(), stdout=subprocess.PIPE)
    server = ServerProcess(process, str(place))
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"nbd+unix")
        yield server
    finally:
        server.kill()
        assert process.stdout is not None
        process.stdout.close()


def test_a_flush_covers_the_writes_of_all_connections(image: Path) -> None:
    """That several connections may share an export is told, so it has to hold."""
    rng = random.Random(6)
    places = rng.sample(range(SIZE // BLOCK), 400)
    content = {place: rng.randbytes(BLOCK) for place in places}
    with cached(image) as server:
        writers = [wire.RawClient(server.socket) for _ in range(4)]
        with wire.RawClient(server.socket) as other:
            assert all(each.start() & CAN_MULTI_CONN for each in [*writers, other])

            def write(number: int) -> None:
                for place in places[number::4]:
                    request = wire.write_request(place * BLOCK, content[place])
                    assert writers[number].ask(request) == (0, b"")

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(write, range(4)))
            late = wire.write_request(0, b"\x77" * 512)
            before = image.read_bytes()
            assert other.ask(wire.request(wire.FLUSH)) == (0, b"")
            assert writers[0].ask(late) == (0, b"")
            server.kill()
        for each in writers:
            each.sock.close()
    after = image.read_bytes()
    written = [after[place * BLOCK :][:BLOCK] == content[place] for place in places]
    assert all(written)
    # It was the flush: before it some of it was in RAM alone, and so is what came after it.
    assert any(before[place * BLOCK :][:BLOCK] != content[place] for place in places)
    assert after[:512] != b"\x77" * 512


@pytest.mark.parametrize("by", ["fua", "write-through"])
def test_what_is_written_through_needs_no_flush(image: Path, by: str) -> None:
    words, flags = ([], wire.FUA) if by == "fua" else (["--cache", "writethrough"], 0)
    with cached(image, *words) as server, wire.RawClient(server.socket) as client:
        client.start()
        for place in (0, 5, 6, 4000):
            request = wire.write_request(place * BLOCK + 512, b"\x11" * 1024, flags=flags)
            assert client.ask(request) == (0, b"")
        server.kill()
    content = image.read_bytes()
    for place in (0, 5, 6, 4000):
        expected = bytes(512) + b"\x11" * 1024 + bytes(BLOCK - 1536)
        assert content[place * BLOCK :][:BLOCK] == expected


def test_sigterm_writes_back_what_nobody_flushed(image: Path) -> None:
    with cached(image) as server:
        with wire.RawClient(server.socket) as client:
            client.start()
            assert client.ask(wire.write_request(8 * BLOCK, b"\x22" * BLOCK)) == (0, b"")
            assert image.read_bytes()[8 * BLOCK :][:BLOCK] == bytes(BLOCK)
        assert server.terminate() == 0
    assert image.read_bytes()[8 * BLOCK :][:BLOCK] == b"\x22" * BLOCK
