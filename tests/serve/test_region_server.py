"""Regions of other processes: the suite of devices, permissions, peers that die or misbehave."""

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pmemkit
from pmemkit import sg
from pmemkit._native import remote
from pmemkit.errors import (
    Closed,
    InvalidArgument,
    MediaError,
    NotSupported,
    OutOfRange,
    PmemError,
    ProtocolError,
    ReadOnly,
    SystemFailure,
)
from pmemkit.media.badblocks import BadRun, note
from pmemkit.media.remote import parse_address, read_hello
from pmemkit.serve import listen_tcp, listen_unix
from pmemkit.serve.region_server import RegionExport, RegionServer
from pmemkit.testing import DeviceSuite

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
SIZE = (1 << 16) + 4096


@contextmanager
def served(*exports, tcp=False, **more):
    """A server in this process, and its address."""
    directory = tempfile.mkdtemp()
    try:
        if tcp:
            listeners = listen_tcp("127.0.0.1", 0)
            address = f"remote+tcp://127.0.0.1:{listeners[0].address[1]}"
        else:
            listeners = [listen_unix(f"{directory}/sock")]
            address = f"remote+unix://{directory}/sock"
        with RegionServer(exports, listeners, **more):
            yield address
    finally:
        shutil.rmtree(directory)


class Door:
    """The bytes of the target."""

    def __init__(self, medium):
        self.medium = medium

    def peek(self, offset, length):
        return self.medium.read(offset, length)

    def poke(self, offset, data):
        self.medium.write(offset, data)


class Remote(DeviceSuite):
    lock_step_examples = 6
    tcp = False

    def make_device(self):
        below = self.resources.enter_context(pmemkit.open(f"memfd:{SIZE}"))
        export = RegionExport("", below)
        address = self.resources.enter_context(served(export, tcp=self.tcp))
        region = self.resources.enter_context(pmemkit.open(address))
        return region.device().channel(), Door(below.medium)

    def make_read_only(self):
        below = self.resources.enter_context(pmemkit.open(f"memfd:{SIZE}"))
        address = self.resources.enter_context(served(RegionExport("", below, True)))
        region = self.resources.enter_context(pmemkit.open(address, read_only=True))
        return region.device().channel()


class TestOverUnix(Remote):
    pass


class TestOverTcp(Remote):
    tcp = True


# --- what it is, and who may ----------------------------------------------------------------------


def test_it_says_what_the_target_is():
    with (
        pmemkit.open("memfd:1M") as below,
        served(RegionExport("", below)) as address,
        pmemkit.open(address) as region,
    ):
        assert (region.size, region.granularity, region.volatile) == (MIB, "page", True)
        assert region.persistence_domain == "none"
        assert (region.mode, region.path, region.opened.backing) == ("raw", address, "remote")
        for refused in ({"granularity": "byte"}, {"required_granularity": "cacheline"}):
            with pytest.raises(NotSupported):
                pmemkit.open(address, **refused)
        with pytest.raises(NotSupported):
            region.resize(2 * MIB)
        assert region.refresh() == MIB


def test_segments_go_to_a_remote_region_and_back():
    data = random.Random(4).randbytes(3 * MIB)
    with (
        pmemkit.open("memfd:4M") as below,
        served(RegionExport("", below)) as address,
        pmemkit.open(address) as there,
        pmemkit.open("memfd:4M") as here,
    ):
        here.device().write(0, data)
        assert sg.copy([(here, 0, 3 * MIB)], [(there, 77, 3 * MIB)], durable=True) == 3 * MIB
        assert below.device().read(77, 3 * MIB) == data
        back = bytearray(3 * MIB)
        sg.copy([(there, 77, 3 * MIB)], [(back, 0, 3 * MIB)])
        assert back == data
        before = below.medium.stats()["syncs"]
        there.device().flush()
        assert below.medium.stats()["syncs"] == before + 1


def test_an_export_for_reading_is_not_written():
    with pmemkit.open("memfd:1M") as below, served(RegionExport("", below, True)) as address:
        with pytest.raises(ReadOnly, match="read-only"):
            pmemkit.open(address)
        with pmemkit.open(address, read_only=True) as region:
            assert region.device().read(0, 8) == bytes(8)
            with pytest.raises(ReadOnly):
                region.device().write(0, b"x")
        # A client that does not keep to what it was told is refused by the server itself.
        with raw_connection(address, write=False) as sock:
            client = remote.Client(sock.fileno(), MIB, read_only=False, punches=True, patience=5.0)
            for change in (
                lambda: client.medium.write(0, b"x"),
                lambda: client.medium.zero(0, 8),
                lambda: client.medium.punch(0, 4096),
            ):
                with pytest.raises(ReadOnly):
                    change()
        assert below.device().read(0, MIB) == bytes(MIB)


def test_names_choose_an_export():
    with ExitStack() as stack:
        one, two = (stack.enter_context(pmemkit.open("memfd:1M")) for _ in range(2))
        exports = (RegionExport("a", one), RegionExport("b", two))
        address = stack.enter_context(served(*exports))
        with pmemkit.open(f"{address}?export=b") as region:
            region.device().write(0, b"for b")
        assert two.device().read(0, 5) == b"for b"
        for name in ("", "?export=c"):
            with pytest.raises(InvalidArgument, match="no export"):
                pmemkit.open(address + name)


def test_a_user_that_is_not_allowed_is_turned_away(monkeypatch):
    import pmemkit.serve.region_server as module

    # The kernel's answer for this very process, with a user that is nobody's here.
    stranger = module._CREDENTIALS.pack(os.getpid(), 54321, 54321)
    with pmemkit.open("memfd:1M") as below:
        for users, allowed in (((), False), ((54321,), True)):
            with served(RegionExport("", below), users=users) as address:
                fake = lambda sock, *_: stranger  # noqa: E731
                monkeypatch.setattr(module.socket.socket, "getsockopt", fake)
                if allowed:
                    pmemkit.open(address).close()
                else:
                    with pytest.raises(SystemFailure, match=r"user 54321 .* is not allowed"):
                        pmemkit.open(address)
                monkeypatch.undo()


def test_the_kernel_turns_strangers_away_too(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    program = (
        "import os, socket, sys\n"
        "os.setgid(54321); os.setuid(54321)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "try:\n    s.connect(sys.argv[1])\n"
        "except PermissionError:\n    sys.exit(7)\n"
    )
    with pmemkit.open("memfd:1M") as below, served(RegionExport("", below)) as address:
        path = parse_address(address).unix
        Path(path).parent.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", program, path], check=False)
        assert done.returncode == 7


def test_bad_media_there_are_bad_media_here(tmp_path):
    image = tmp_path / "bad.img"
    image.write_bytes(b"x" * MIB)
    note(str(image), "inject", BadRun(16, 1))
    with (
        pmemkit.open(image) as below,
        served(RegionExport("", below)) as address,
        pmemkit.open(address) as region,
    ):
        with pytest.raises(MediaError, match="bad media"):
            region.device().read(8000, 1000)
        assert region.device().read(0, 8) == b"x" * 8
        region.device().write(8192, b"y" * 512)
        assert region.device().read(8192, 2) == b"yy"


@pytest.mark.parametrize(
    "text",
    [
        "remote+unix://host/path",
        "remote+unix:relative",
        "remote+tcp://host",
        "remote+tcp://:7500",
        "remote+tcp://host:99999",
        "remote+tcp://host:7500/path",
        "remote+udp://host:7500",
        "remote+unix:///s?patience=0",
        "remote+unix:///s?patience=soon",
        "remote+unix:///s?speed=9",
        "remote+unix:///s?export=" + "x" * 300,
    ],
)
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(InvalidArgument):
        pmemkit.open(text)


def test_nobody_there_is_an_error_with_the_address(tmp_path):
    address = f"remote+unix://{tmp_path}/none"
    with pytest.raises(SystemFailure, match="nobody serves") as refused:
        pmemkit.open(address)
    assert refused.value.path == address


# --- hostile and dead peers -----------------------------------------------------------------------


def connect_raw(address):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(parse_address(address).unix)
    return sock


@contextmanager
def raw_connection(address, *, write=True):
    """A socket behind the handshake."""
    with connect_raw(address) as sock:
        hello = struct.pack("<HHIQ", 1, 1, 1 if write else 0, 0)
        sock.sendall(remote.hello(len(hello)) + hello)
        answer = sock.recv(64, socket.MSG_WAITALL)
        sock.recv(remote.parse(answer)[5], socket.MSG_WAITALL)
        yield sock


def drained(sock):
    found = bytearray()
    try:
        while part := sock.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return bytes(found)


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        bytes(64),
        remote.hello(3) + b"abc",
        remote.hello(16) + struct.pack("<HHIQ", 2, 1, 0, 0),
        remote.hello(16) + struct.pack("<HHIQ", 1, 1, 0, 1),
        remote.hello(16) + struct.pack("<HHIQ", 1, 1, 8, 0),
        remote.hello(18) + struct.pack("<HHIQ", 1, 1, 0, 0) + b"\xff\xfe",
        remote.hello(16, reply=True) + struct.pack("<HHIQ", 1, 1, 0, 0),
    ],
)
def test_a_hello_that_is_none_ends_the_connection_and_no_other(hello):
    with (
        pmemkit.open("memfd:1M") as below,
        served(RegionExport("", below)) as address,
        pmemkit.open(address) as other,
    ):
        with connect_raw(address) as sock:
            sock.sendall(hello)
            sock.shutdown(socket.SHUT_WR)
            said = drained(sock)
        assert not said or remote.parse(said[:64])[3] != 0
        assert other.device().read(0, 4) == bytes(4)


def test_a_version_from_the_future_is_refused_in_words():
    with pmemkit.open("memfd:1M") as below, served(RegionExport("", below)) as address:
        with connect_raw(address) as sock:
            hello = struct.pack("<HHIQ", 2, 9, 0, 0)
            sock.sendall(remote.hello(len(hello)) + hello)
            said = drained(sock)
        assert remote.parse(said[:64])[3] == remote.status_of("not_supported")
        assert b"version 1 is spoken here" in said


def test_whatever_follows_the_handshake_the_server_lives():
    choose = random.Random(11)
    with pmemkit.open("memfd:1M") as below, served(RegionExport("", below)) as address:
        for _ in range(40):
            with raw_connection(address) as sock:
                sock.sendall(choose.randbytes(choose.randrange(200)))
                sock.shutdown(socket.SHUT_WR)
                assert drained(sock) == b""
        with pmemkit.open(address) as region:
            assert region.device().read(0, MIB) == bytes(MIB)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=64) | st.tuples(st.integers(0, 1024), st.integers(0, 511)))
def test_headers_are_parsed_or_refused_as_broken(header):
    if isinstance(header, tuple):
        length, bit = header
        good = bytearray(remote.hello(length))
        assert remote.parse(bytes(good))[5] == length
        good[bit // 8] ^= 1 << bit % 8
        header = bytes(good)
    with pytest.raises(ProtocolError):
        remote.parse(header)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_hellos_are_read_or_refused_as_broken(payload):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        ours.sendall(remote.hello(len(payload)) + payload)
        ours.shutdown(socket.SHUT_WR)
        try:
            found = read_hello(theirs)
        except ProtocolError:
            return
        assert found.version_first <= found.version_last and len(found.export) <= 255


ANSWER = struct.Struct("<HHIQIIQ")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        bytes(64),
        remote.hello(16) + bytes(16),
        remote.hello(4, reply=True) + bytes(4),
        remote.hello(32, reply=True) + ANSWER.pack(2, 0, 1, MIB, 1 << 20, 4096, 0),
        remote.hello(32, reply=True) + ANSWER.pack(1, 0, 1, 1 << 63, 1 << 20, 4096, 0),
        remote.hello(32, reply=True) + ANSWER.pack(1, 0, 1, MIB, 1, 4096, 0),
        remote.hello(32, reply=True) + ANSWER.pack(1, 0, 1, MIB, 1 << 20, 512, 0),
        remote.hello(32, reply=True) + ANSWER.pack(1, 0, 64, MIB, 1 << 20, 4096, 0),
        remote.hello(32, reply=True) + ANSWER.pack(1, 0, 1, MIB, 1 << 20, 4096, 0)[:20],
        remote.hello(3, reply=True, status=6) + b"bad",
    ],
)
def test_a_server_that_is_none_is_refused(tmp_path, answer):
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def play():
            sock, _ = listener.accept()
            with sock:
                sock.recv(80, socket.MSG_WAITALL)
                sock.sendall(answer)

        peer = threading.Thread(target=play)
        peer.start()
        with pytest.raises((ProtocolError, MediaError)):
            pmemkit.open(f"remote+unix://{path}?patience=5")
        peer.join()


def test_a_server_that_says_nothing_is_given_up(tmp_path):
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(SystemFailure, match="did not answer"):
            pmemkit.open(f"remote+unix://{path}?patience=0.3")


@contextmanager
def exporting(*words):
    """``pmem export-region`` in a process of its own, and its address."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pmemkit", "export-region", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_in_the_middle_of_a_copy(tmp_path, number, way):
    with exporting("memfd:64M", "--unix", tmp_path / "s") as (process, address):
        there = pmemkit.open(f"{address}?patience=1")
        with there, pmemkit.open("memfd:64M") as here:
            source, target = (here, there) if way == "in" else (there, here)
            sg.copy([(source, 0, MIB)], [(target, 0, MIB)])
            began = []

            def kill():
                time.sleep(0.05)
                began.append(time.monotonic())
                process.send_signal(number)

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(PmemError, match="bytes were copied") as failed:
                while True:
                    sg.copy([(source, 0, 64 * MIB)], [(target, 0, 64 * MIB)], durable=True)
            killer.join()
            assert time.monotonic() - began[0] < 10
            assert failed.value.moved is not None and failed.value.moved <= 64 * MIB
            # Nothing is made up afterwards.
            for late in (lambda: there.device().read(0, 1), lambda: there.device().flush()):
                with pytest.raises(Closed, match="lost"):
                    late()
        process.send_signal(signal.SIGCONT)


def test_a_client_that_dies_leaves_whole_messages_or_nothing():
    with pmemkit.open("memfd:1M") as below, served(RegionExport("", below)) as address:
        with raw_connection(address) as sock:
            client = remote.Client(sock.fileno(), MIB, read_only=False, punches=True, patience=5.0)
            client.medium.write(0, b"whole")
            # A copy-in of 8 KiB that ends after 100 bytes.
            sock.sendall(copy_in_header(8192) + bytes([7]) * 100)
        with pmemkit.open(address) as region:
            assert region.device().read(0, 9000) == b"whole" + bytes(8995)


def copy_in_header(length):
    """A header of the protocol, made by hand: the document's table and nothing else."""
    fields = struct.pack("<4sHHIIQQIIQQ", b"PMRG", 1, 3, 0, 0, 99, 0, 0, length, length, 0)
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    total = 0xFFFFFFFF
    for byte in fields:
        total = table[(total ^ byte) & 0xFF] ^ total >> 8
    return fields + struct.pack("<II", total ^ 0xFFFFFFFF, 0)


def test_the_header_made_by_hand_is_the_core_s():
    version, op, reply, status, at, payload, length = remote.parse(copy_in_header(8192))
    assert (version, op, reply, status, at, payload, length) == (1, 3, False, 0, 0, 8192, 8192)


def test_ranges_that_are_not_there_are_refused_by_the_server():
    with (
        pmemkit.open("memfd:1M") as below,
        served(RegionExport("", below)) as address,
        raw_connection(address) as sock,
    ):
        client = remote.Client(sock.fileno(), 1 << 40, read_only=False, punches=True, patience=5.0)
        for call in (
            lambda: client.medium.read(MIB - 1, 2),
            lambda: client.medium.write(1 << 39, b"x"),
            lambda: client.medium.zero(0, MIB + 1),
            lambda: client.medium.extents(MIB, 1),
            lambda: client.medium.persist(MIB, 1),
        ):
            with pytest.raises(OutOfRange):
                call()


def test_closing_the_server_ends_its_clients_in_time():
    with pmemkit.open("memfd:1M") as below:
        with served(RegionExport("", below)) as address:
            region = pmemkit.open(address)
        with pytest.raises(PmemError):
            region.device().read(0, 1)
        region.close()


# --- the command ----------------------------------------------------------------------------------


def test_the_command_serves_an_image_and_copy_uses_it(tmp_path):
    from pmemkit.cli import main

    image, source, back = (tmp_path / name for name in ("pool.img", "in", "out"))
    image.write_bytes(bytes(2 * MIB))
    source.write_bytes(random.Random(8).randbytes(2 * MIB))
    with exporting(image, "--unix", tmp_path / "s", "--tcp", "127.0.0.1:0") as (process, address):
        tcp = process.stdout.readline().strip()
        assert main(["copy", str(source), address]) == 0
        assert image.read_bytes() == source.read_bytes()
        assert main(["copy", tcp, str(back), "--verify"]) == 0
        assert back.read_bytes() == source.read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["memfd:1M"], "where to listen"),
        (["memfd:1M", "memfd:2M", "--unix", "s"], "two exports"),
        (["memfd:1M", "--unix", "s", "--user", "me"], "number of a user"),
    ],
)
def test_words_that_serve_nothing_are_refused(words, part, capsys, monkeypatch, tmp_path):
    from pmemkit.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export-region", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert part in capsys.readouterr().err
