"""The server as a process: signals, activation, sudden death; and slow requests."""

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd_wire as wire
import pytest
from nbd_served import (
    MIB,
    PATIENCE_SECONDS,
    SERVE_FILE,
    ServerProcess,
    environment,
    run,
    serve_image,
    server_process,
)

SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    return image


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server(image: Path, tmp_path: Path, number: int) -> None:
    place = tmp_path / "nbd.sock"
    with server_process(image, place) as server:
        server.process.send_signal(number)
        assert server.process.wait(timeout=PATIENCE_SECONDS) == 0
        assert not place.exists()


def test_sigterm_answers_what_was_received(image: Path, tmp_path: Path) -> None:
    options = ("--delay-reads", "0.5")
    with server_process(image, tmp_path / "nbd.sock", *options) as server:
        silent, haggling = wire.RawClient(server.socket), wire.RawClient(server.socket)
        haggling.hello()
        with silent, haggling, wire.RawClient(server.socket) as client:
            client.start()
            assert client.ask(wire.write_request(0, b"\x42" * 4096)) == (0, b"")
            client.send(wire.request(wire.READ, 0, 4096, cookie=8))
            # The read was received once a later request was answered.
            client.send(wire.request(wire.FLUSH, cookie=9))
            assert client.simple()[:2] == (0, 9)
            server.process.send_signal(signal.SIGTERM)
            assert client.simple(4096) == (0, 8, b"\x42" * 4096)
            assert client.closed()
            assert silent.receive(wire.GREETING_SIZE)
            assert silent.closed()
            assert haggling.closed()
        assert server.process.wait(timeout=PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_cuts_who_takes_too_long(image: Path, tmp_path: Path, signals: int) -> None:
    """After ``drain_seconds``, or at once when it is asked twice."""
    drain = "0.3" if signals == 1 else "1000"
    place = tmp_path / "nbd.sock"
    with server_process(image, place, "--drain-seconds", drain) as server:
        greedy = wire.RawClient(server.socket)
        greedy.start()
        greedy.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                greedy.send(wire.request(wire.READ, 0, MIB))
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert server.process.wait(timeout=PATIENCE_SECONDS) == 0
        greedy.sock.close()


def test_a_second_server_leaves_the_first_ones_socket(image: Path, tmp_path: Path) -> None:
    place = tmp_path / "nbd.sock"
    with server_process(image, place) as server:
        command = [sys.executable, str(SERVE_FILE), str(image), "--unix", str(place)]
        second = run(*command, check=False, env=environment())
        assert second.returncode
        assert "another server" in second.stderr
        with wire.RawClient(server.socket) as client:
            client.start()
            client.disconnect()
        assert server.terminate() == 0


# --- socket activation -------------------------------------------------------------------------

ACTIVATE = """
import os, sys
count = int(sys.argv[1])
for index in range(count):
    os.set_inheritable(3 + index, True)
os.environ["LISTEN_FDS"] = str(count)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def test_socket_activation_with_two_sockets(image: Path, tmp_path: Path) -> None:
    places = [tmp_path / "one.sock", tmp_path / "two.sock"]
    listeners = [socket.socket(socket.AF_UNIX) for _ in places]
    for listener, place in zip(listeners, places, strict=True):
        listener.bind(str(place))
        listener.listen()
    fds = [os.dup(listener.fileno()) for listener in listeners]
    # Out of the way first: 3 and 4 may be somebody's here, but not in the child.
    high = [os.dup(fd) for fd in fds]

    def place_descriptors() -> None:
        for index, fd in enumerate(high):
            os.dup2(fd, 100 + index)
        for index in range(len(high)):
            os.dup2(100 + index, 3 + index)

    command = [sys.executable, "-c", ACTIVATE, "2", str(SERVE_FILE), str(image)]
    process = subprocess.Popen(
        command,
        env=environment(),
        close_fds=False,
        preexec_fn=place_descriptors,
    )
    server = ServerProcess(process, str(places[0]))
    try:
        for place in places:
            # The sockets listen already; the server comes when it comes.
            with wire.RawClient(str(place), timeout_seconds=PATIENCE_SECONDS) as client:
                client.start()
                assert client.ask(wire.write_request(0, b"x")) == (0, b"")
                client.disconnect()
        assert server.terminate() == 0
        assert all(place.exists() for place in places), "they are not the server's to remove"
    finally:
        server.kill()
        for fd in (*fds, *high):
            os.close(fd)
        for listener in listeners:
            listener.close()


# --- slow requests -----------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_a_slow_request_holds_nobody_up(tmp_path: Path, structured: bool) -> None:
    """Replies come out of order: those of quick requests first."""
    from pmemkit._native import block

    def slow_reads(device: object) -> object:
        return block.delay(device, ops="read", seconds=1.0)

    with serve_image(tmp_path, layer=slow_reads) as served, served.client() as client:
        client.start("disk", structured=structured)
        client.send(wire.request(wire.READ, 0, 512, cookie=1000))
        for cookie in range(50):
            client.send(wire.write_request(cookie * 512, b"\xaa" * 512, cookie=cookie))
        order = []
        for _ in range(51):
            if structured:
                order.append(client.chunk().cookie)
            else:
                magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
                assert (magic, error) == (wire.SIMPLE_MAGIC, 0)
                client.receive(512 if cookie == 1000 else 0)
                order.append(cookie)
        assert order[-1] == 1000
        assert sorted(order[:-1]) == list(range(50))
        client.disconnect()


def test_a_failing_request_fails_alone(tmp_path: Path) -> None:
    from pmemkit._native import block

    def failing(device: object) -> object:
        return block.fault(device, ops="read", nth=2, count=1, offset=4096, length=4096)

    with serve_image(tmp_path, layer=failing) as served, served.client() as client:
        client.start("disk")
        read = wire.request(wire.READ, 4096, 512)
        assert client.ask(read, 512)[0] == 0
        assert client.ask(read, 512)[0] == wire.EIO
        assert client.ask(read, 512)[0] == 0
        assert client.ask(wire.write_request(0, b"x"))[0] == 0
        client.disconnect()


# --- sudden death ------------------------------------------------------------------------------

BLOCK = 4096
DEPTH = 16


class Writer(threading.Thread):
    """Writes numbered blocks with several requests in flight, and keeps count until cut off."""

    def __init__(self, address: str, seed: int, first_stamp: int) -> None:
        super().__init__(daemon=True)
        self.client = wire.RawClient(address)
        self.client.start("disk")
        self.rng = random.Random(seed)
        self.stamp = first_stamp
        self.sent: dict[int, list[int]] = {}
        self.acknowledged: dict[int, int] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with self.client:
                self._write()
        except (ConnectionError, EOFError):
            return
        except BaseException as cause:
            self.failure = cause

    def _write(self) -> None:
        flying: dict[int, int] = {}
        while True:
            while len(flying) < DEPTH:
                index = self.rng.randrange(SIZE // BLOCK)
                if index in flying.values():
                    continue
                self.stamp += 1
                flying[self.stamp] = index
                self.sent.setdefault(index, []).append(self.stamp)
                fua = wire.FUA if self.rng.random() < 0.05 else 0
                payload = content(index, self.stamp)
                said = wire.write_request(index * BLOCK, payload, flags=fua, cookie=self.stamp)
                self.client.send(said)
            error, cookie, _ = self.client.simple()
            assert error == 0
            index = flying.pop(cookie)
            self.acknowledged[index] = cookie


def content(index: int, stamp: int) -> bytes:
    return struct.pack("<QQ", index, stamp) * (BLOCK // 16)


def check_acknowledged(image: bytes, writer: Writer) -> None:
    """A block holds its last acknowledged content, or one that was on its way after it."""
    for index, stamp in writer.acknowledged.items():
        allowed = {content(index, later) for later in writer.sent[index] if later >= stamp}
        found = image[index * BLOCK : (index + 1) * BLOCK]
        if found in allowed:
            continue
        # A write that was cut off may stand there in part, on top of what came before.
        mixed = zip(found, *allowed, strict=True)
        lost = f"block {index}: an acknowledged write (stamp {stamp}) is lost"
        assert all(byte in choices for byte, *choices in mixed), lost


@pytest.mark.peer("fio")
def test_killing_the_server_loses_nothing_acknowledged(
    image: Path, tmp_path: Path, need: Callable[[str], str], scale: Callable[[int, int], int]
) -> None:
    """fio keeps the server busy behind SIZE while a client that keeps count writes before it."""
    os.truncate(image, 2 * SIZE)
    fio = need("fio")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    place = tmp_path / "nbd.sock"
    acknowledged = 0
    for number in range(scale(5, 50)):
        with server_process(image, place) as server, load(fio, place) as noise:
            writer = Writer(server.socket, rng.randrange(2**32), number << 32)
            writer.start()
            time.sleep(rng.uniform(0.1, 0.5))
            assert noise.poll() is None, "fio ended before the server did"
            server.kill()
            writer.join(PATIENCE_SECONDS)
            assert not writer.is_alive()
            assert writer.failure is None, writer.failure
        assert place.exists(), "a killed server leaves its socket file"
        check_acknowledged(image.read_bytes()[:SIZE], writer)
        acknowledged += len(writer.acknowledged)
        with server_process(image, place) as server:
            with wire.RawClient(server.socket) as client:
                client.start()
                got = client.ask(wire.request(wire.READ, 0, 2 * SIZE), 2 * SIZE)
                assert got == (0, image.read_bytes())
                client.disconnect()
            assert server.terminate() == 0
    assert acknowledged > 0


@contextmanager
def load(fio: str, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """fio writing and reading behind SIZE with flushes, until the server goes away."""
    words = ["--name=noise", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={place}"]
    words += ["--rw=randrw", "--bsrange=512-256k", "--iodepth=16", "--fsync=64"]
    words += [f"--offset={SIZE}", f"--size={SIZE}", "--time_based", "--runtime=60"]
    silent = subprocess.DEVNULL
    with subprocess.Popen([fio, *words], stdout=silent, stderr=silent) as process:
        try:
            yield process
            assert process.wait(PATIENCE_SECONDS) != 0, "fio did not notice the dead server"
        finally:
            process.kill()


def test_the_check_notices_a_lost_write() -> None:
    writer = Writer.__new__(Writer)
    writer.sent, writer.acknowledged = {0: [1, 2, 3]}, {0: 2}
    pad = bytes(SIZE - BLOCK)
    torn = content(0, 3)[:1000] + content(0, 2)[1000:]
    for fine in (content(0, 2), content(0, 3), torn):
        check_acknowledged(fine + pad, writer)
    stale = content(0, 2)[:1000] + content(0, 1)[1000:]
    for lost in (content(0, 1), bytes(BLOCK), stale):
        with pytest.raises(AssertionError, match="block 0"):
            check_acknowledged(lost + pad, writer)
