"""Requests that are wrong, and sessions that are mutated, against a live server."""

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd_wire as wire
import pytest
from nbd_served import MIB, Served, file_device, serve_image

from pmemkit.serve import Export

SIZE = 4 * MIB
PAYLOAD_MAX = 32 * MIB
TOP = 2**64


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_image(tmp_path, size=SIZE) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[wire.RawClient]:
    with served.client() as client:
        client.start("disk")
        yield client


def still_works(client: wire.RawClient) -> None:
    data = os.urandom(4096)
    assert client.ask(wire.write_request(8192, data, cookie=77)) == (0, b"")
    assert client.ask(wire.request(wire.READ, 8192, 4096), 4096) == (0, data)


# --- single requests ---------------------------------------------------------------------------

OUTSIDE = [
    (SIZE, 1),
    (SIZE - 1, 2),
    (SIZE - 4096, 4097),
    (2**63, 4096),
    (TOP - 1, 1),
    (TOP - 4096, 4096),
    (TOP - 4096, 8192),
    (0, SIZE + 1),
]


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
def test_ranges_that_do_not_fit(client: wire.RawClient, offset: int, length: int) -> None:
    for command in (wire.READ, wire.TRIM, wire.CACHE):
        error, _ = client.ask(wire.request(command, offset, length))
        assert error == wire.EINVAL, command
    error, _ = client.ask(wire.request(wire.ZERO, offset, length))
    assert error == wire.ENOSPC
    error, _ = client.ask(wire.write_request(offset, bytes(length)))
    assert error == wire.ENOSPC
    still_works(client)


@pytest.mark.parametrize("length", [PAYLOAD_MAX + 1, 2**31, 2**32 - 1])
def test_a_read_longer_than_any_payload(client: wire.RawClient, length: int) -> None:
    assert client.ask(wire.request(wire.READ, 0, length))[0] == wire.EINVAL
    still_works(client)


@pytest.mark.parametrize("length", [PAYLOAD_MAX, PAYLOAD_MAX + 1, 64 * MIB])
def test_a_refused_write_is_consumed(client: wire.RawClient, length: int) -> None:
    client.send(wire.request(wire.WRITE, 0, length, cookie=9))
    piece = wire.request(wire.TRIM, 0, SIZE)
    body = piece * (MIB // len(piece) + 1)
    for at in range(0, length, MIB):
        client.send(body[: min(MIB, length - at)])
    error, cookie, _ = client.simple()
    assert cookie == 9
    assert error in (wire.EINVAL, wire.ENOSPC)
    still_works(client)


@pytest.mark.parametrize("length", [2**31, 2**32 - 1])
def test_an_absurd_write_is_cut_off(served: Served, client: wire.RawClient, length: int) -> None:
    client.send(wire.request(wire.WRITE, 0, length))
    assert client.closed()
    with served.client() as other:
        other.start()
        still_works(other)


@pytest.mark.parametrize("command", [8, 9, 255, 0x8000, 0xFFFF])
def test_unknown_commands(client: wire.RawClient, command: int) -> None:
    assert client.ask(wire.request(command, 0, 4096))[0] == wire.EINVAL
    still_works(client)


@pytest.mark.parametrize("bit", range(16))
def test_flags_are_taken_where_they_belong_only(client: wire.RawClient, bit: int) -> None:
    flags = 1 << bit
    welcome = {
        wire.READ: wire.FUA,
        wire.WRITE: wire.FUA,
        wire.FLUSH: wire.FUA,
        wire.TRIM: wire.FUA,
        wire.CACHE: wire.FUA,
        wire.ZERO: wire.FUA | wire.NO_HOLE | wire.FAST_ZERO,
    }
    for command, taken in welcome.items():
        length = 0 if command == wire.FLUSH else 512
        said = wire.request(command, 0, length, flags=flags)
        said += bytes(512) if command == wire.WRITE else b""
        error, _ = client.ask(said, 512 if command == wire.READ else 0)
        assert error == (0 if flags & taken else wire.EINVAL), command
    still_works(client)


def test_block_status_that_was_not_negotiated(client: wire.RawClient) -> None:
    assert client.ask(wire.request(wire.STATUS, 0, 4096))[0] == wire.EINVAL
    still_works(client)


def test_a_flush_with_a_range(client: wire.RawClient) -> None:
    assert client.ask(wire.request(wire.FLUSH, 0, 512))[0] == wire.EINVAL
    assert client.ask(wire.request(wire.FLUSH, 512, 0))[0] == wire.EINVAL
    assert client.ask(wire.request(wire.FLUSH))[0] == 0


@pytest.mark.parametrize("offset", [0, 1, SIZE])
def test_requests_for_nothing_do_not_end_the_connection(
    client: wire.RawClient, offset: int
) -> None:
    for command in (wire.READ, wire.WRITE, wire.TRIM, wire.CACHE, wire.ZERO):
        error, _ = client.ask(wire.request(command, offset, 0))
        assert error in (0, wire.EINVAL)
    still_works(client)


def test_structured_errors(served: Served) -> None:
    with served.client() as client:
        client.start("disk", structured=True, context=True)
        for said, errno in (
            (wire.request(wire.READ, SIZE, 1, cookie=5), wire.EINVAL),
            (wire.request(wire.READ, 0, 1, flags=0x8000, cookie=5), wire.EINVAL),
            (wire.write_request(SIZE, b"x", cookie=5), wire.ENOSPC),
            (wire.request(wire.STATUS, SIZE, 1, cookie=5), wire.EINVAL),
            (wire.request(wire.STATUS, 0, 0, cookie=5), wire.EINVAL),
            (wire.request(99, cookie=5), wire.EINVAL),
        ):
            client.send(said)
            chunk = client.chunk()
            assert (chunk.flags, chunk.kind, chunk.cookie) == (1, 2**15 + 1, 5)
            assert struct.unpack_from(">IH", chunk.data)[0] == errno
        client.disconnect()


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698, 0x21E41C71, 0xFFFFFFFF])
def test_a_wrong_request_magic_ends_the_connection(
    served: Served, client: wire.RawClient, magic: int
) -> None:
    client.send(wire.request(wire.READ, 0, 512, magic=magic))
    assert client.closed()
    with served.client() as other:
        other.start()
        still_works(other)


def test_a_request_cut_at_any_byte(served: Served) -> None:
    said = wire.write_request(0, b"\xee" * 20, flags=wire.FUA)
    for cut in range(1, len(said)):
        with served.client() as client:
            client.start()
            client.send(said[:cut])
            client.sock.shutdown(socket.SHUT_WR)
            assert client.closed()
    with served.client() as client:
        client.start()
        still_works(client)


def test_a_client_that_never_reads_its_replies(served: Served) -> None:
    with served.client() as greedy, served.client() as other:
        greedy.start()
        other.start()
        greedy.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            for _ in range(10_000):
                greedy.send(wire.request(wire.READ, 0, MIB))
        still_works(other)


def test_go_and_requests_in_one_write(served: Served) -> None:
    data = os.urandom(300_000)
    with served.client() as client:
        behind = wire.write_request(4096, data, cookie=1)
        behind += wire.request(wire.FLUSH, cookie=2)
        client.send(wire.CLIENT_FLAGS + wire.go("disk") + behind)
        client.receive(wire.GREETING_SIZE)
        assert client.replies()[-1].kind == wire.REP_ACK
        answered = {client.simple()[1] for _ in range(2)}
        assert answered == {1, 2}
        assert client.ask(wire.request(wire.READ, 4096, len(data)), len(data)) == (0, data)
        client.disconnect()


@pytest.mark.parametrize("structured", [False, True])
def test_a_file_that_is_truncated_under_the_server(served: Served, structured: bool) -> None:
    """Errors for what is gone, no lies, and everything else goes on."""
    with served.client() as client, served.client() as bystander:
        bystander.start("frozen")
        client.start("disk", structured=structured)
        os.truncate(served.image, MIB)
        for command, length in ((wire.READ, 4096), (wire.READ, 2 * MIB)):
            client.send(wire.request(command, MIB, length, cookie=3))
            if structured:
                chunk = client.chunk()
                assert (chunk.kind, chunk.data[:4]) == (2**15 + 1, struct.pack(">I", wire.EIO))
            else:
                assert client.simple(length)[:2] == (wire.EIO, 3)
        with served.client() as writer:
            writer.start("disk")
            for length in (4096, 2 * MIB):
                error, _ = writer.ask(wire.write_request(MIB, bytes(length)))
                assert error in (wire.EIO, wire.EPERM), "an error, or latched by an earlier one"
        got = bystander.ask(wire.request(wire.READ, 0, 4096), 4096)
        assert got == (0, bytes(4096))


# --- mutated sessions --------------------------------------------------------------------------


def session(rng: random.Random) -> bytes:
    """What a client says in one session."""

    def place() -> int:
        return rng.randrange(SIZE // 512 - 64) * 512

    options = [
        wire.option(wire.OPT_LIST),
        wire.option(wire.OPT_STRUCTURED),
        wire.meta(wire.OPT_LIST_META, "disk"),
        wire.meta(wire.OPT_SET_META, "disk", ("base:allocation",)),
        wire.info("disk", (1, 2, 3)),
    ]
    requests = [
        wire.write_request(place(), rng.randbytes(4096), flags=wire.FUA, cookie=1),
        wire.write_request(place(), rng.randbytes(512), cookie=2),
        wire.request(wire.READ, place(), 8192, cookie=3),
        wire.request(wire.READ, place(), 4096, flags=wire.DF, cookie=4),
        wire.request(wire.TRIM, place(), 4096, cookie=5),
        wire.request(wire.ZERO, place(), 8192, flags=wire.NO_HOLE, cookie=6),
        wire.request(wire.CACHE, place(), 8192, cookie=7),
        wire.request(wire.STATUS, place(), 8192, flags=wire.REQ_ONE, cookie=8),
        wire.request(wire.FLUSH, cookie=9),
    ]
    rng.shuffle(requests)
    end = [wire.go("disk", (3,)), *requests, wire.request(wire.DISC)]
    return wire.CLIENT_FLAGS + b"".join([*options, *end])


def mutate(rng: random.Random, said: bytes) -> bytes:
    body = bytearray(said)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(body))
        match rng.randrange(6):
            case 0:
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                body[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del body[at : at + rng.randrange(1, 29)]
            case 3:
                body[at:at] = rng.randbytes(rng.randrange(1, 29))
            case 4:
                other = rng.randrange(len(body))
                body[at:at] = body[other : other + rng.randrange(1, 64)]
            case _:
                del body[at:]
        if not body:
            break
    return bytes(body)


def play(served: Served, said: bytes) -> None:
    """Says it all, reads whatever comes, until the server closes; a hang is a timeout."""
    with served.client() as client:
        try:
            client.send(said)
            client.sock.shutdown(socket.SHUT_WR)
            while client.sock.recv(1 << 20):
                pass
        except ConnectionError:
            # The server is free to cut off one who breaks the rules.
            return


def test_mutated_sessions(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    batch, total = 50, scale(500, 10_000)
    precious = rng.randbytes(MIB)
    kept = Export("witness", file_device(tmp_path / "kept", MIB))
    with serve_image(tmp_path, size=SIZE, more=[kept]) as served:
        with served.client() as witness:
            witness.start("witness")
            assert witness.ask(wire.write_request(0, precious)) == (0, b"")
            for done in range(0, total, batch):
                for _ in range(batch):
                    play(served, mutate(rng, session(rng)))
                got = witness.ask(wire.request(wire.READ, 0, MIB), MIB)
                assert got == (0, precious), f"seed {seed}, session {done} to {done + batch}"
            witness.disconnect()
        with served.client() as client:
            client.start("disk")
            still_works(client)
        assert served.running.server.connection_count <= 1


def test_the_session_that_is_mutated_is_a_good_one(served: Served) -> None:
    """Otherwise its mutations would not get far."""
    with served.client() as client:
        client.send(session(random.Random(1)))
        assert client.receive(wire.GREETING_SIZE)
        heard = bytearray()
        while part := client.sock.recv(1 << 20):
            heard += part
    replies, rest = wire.parse_option_replies(bytes(heard))
    assert all(reply.kind < 2**31 for reply in replies)
    cookies = set()
    while rest:
        magic, _, kind, cookie, size = struct.unpack_from(">IHHQI", rest)
        assert magic == wire.STRUCTURED_MAGIC
        assert kind < 2**15, f"request {cookie} failed"
        cookies.add(cookie)
        rest = rest[20 + size :]
    assert cookies == set(range(1, 10))
