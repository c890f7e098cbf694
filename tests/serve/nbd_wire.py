"""A raw NBD client for tests: it says exactly what it is told to, right or wrong.

Its numbers are written down here again, from the protocol text, so that a wrong number in the
server is not repeated by its tests.
"""

import socket
import struct
from dataclasses import dataclass

NBD_MAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS = 1, 2, 3, 5
OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META = 6, 7, 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = 2**31 + 1, 2**31 + 3, 2**31 + 6, 2**31 + 9
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95

CLIENT_FLAGS = struct.pack(">I", 3)
GREETING_SIZE = 18


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(raw)) + raw


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">QII", IHAVEOPT, number, size) + data


def info_data(name: str | bytes = "", types: tuple[int, ...] = ()) -> bytes:
    return text(name) + struct.pack(f">H{len(types)}H", len(types), *types)


def go(name: str | bytes = "", types: tuple[int, ...] = ()) -> bytes:
    return option(OPT_GO, info_data(name, types))


def info(name: str | bytes = "", types: tuple[int, ...] = ()) -> bytes:
    return option(OPT_INFO, info_data(name, types))


def meta(number: int, name: str = "", queries: tuple[str, ...] = ()) -> bytes:
    data = text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))
    return option(number, data)


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
    magic: int = REQUEST_MAGIC,
) -> bytes:
    head = struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)
    return head + payload


def write_request(offset: int, payload: bytes, *, flags: int = 0, cookie: int = 1) -> bytes:
    return request(WRITE, offset, len(payload), flags=flags, cookie=cookie, payload=payload)


@dataclass(frozen=True)
class OptionReply:
    option: int
    kind: int
    data: bytes


@dataclass(frozen=True)
class Chunk:
    flags: int
    kind: int
    cookie: int
    data: bytes


def parse_option_replies(stream: bytes) -> tuple[list[OptionReply], bytes]:
    """Whole reply frames at the front of a stream, and the rest."""
    replies = []
    while len(stream) >= 20 and stream[:8] == struct.pack(">Q", REPLY_MAGIC):
        _, number, kind, size = struct.unpack_from(">QIII", stream)
        replies.append(OptionReply(number, kind, stream[20 : 20 + size]))
        assert len(replies[-1].data) == size, "a reply was cut"
        stream = stream[20 + size :]
    return replies, stream


class RawClient:
    """A blocking client with a timeout on everything."""

    def __init__(self, address: str | tuple[str, int], timeout_seconds: float = 20.0) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_seconds)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.sock.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError(f"closed after {len(parts)} of {size} bytes")
            parts += part
        return bytes(parts)

    def closed(self) -> bool:
        """True when the server closed and nothing more comes."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def hello(self, flags: int = 3) -> None:
        magic, opt, offered = struct.unpack(">QQH", self.receive(GREETING_SIZE))
        assert (magic, opt, offered) == (NBD_MAGIC, IHAVEOPT, 3)
        self.send(struct.pack(">I", flags))

    def option_reply(self) -> OptionReply:
        magic, number, kind, size = struct.unpack(">QIII", self.receive(20))
        assert magic == REPLY_MAGIC
        return OptionReply(number, kind, self.receive(size))

    def replies(self) -> list[OptionReply]:
        """Replies up to the final one of an option."""
        found = [self.option_reply()]
        while found[-1].kind != REP_ACK and found[-1].kind < 2**31:
            found.append(self.option_reply())
        return found

    def start(self, name: str = "", *, structured: bool = False, context: bool = False) -> int:
        """The usual handshake; gives the transmission flags."""
        self.hello()
        if structured:
            self.send(option(OPT_STRUCTURED))
            assert self.option_reply().kind == REP_ACK
        if context:
            self.send(meta(OPT_SET_META, name, ("base:allocation",)))
            assert [reply.kind for reply in self.replies()] == [REP_META, REP_ACK]
        self.send(go(name))
        replies = self.replies()
        assert replies[-1].kind == REP_ACK, replies
        _, _, flags = struct.unpack(">HQH", replies[0].data)
        return int(flags)

    def simple(self, size: int = 0) -> tuple[int, int, bytes]:
        """Error, cookie and, where there was none, ``size`` bytes of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == SIMPLE_MAGIC, hex(magic)
        return error, cookie, b"" if error else self.receive(size)

    def chunk(self) -> Chunk:
        magic, flags, kind, cookie, size = struct.unpack(">IHHQI", self.receive(20))
        assert magic == STRUCTURED_MAGIC, hex(magic)
        return Chunk(flags, kind, cookie, self.receive(size))

    def ask(self, data: bytes, size: int = 0) -> tuple[int, bytes]:
        """One request, one simple reply: error and payload."""
        self.send(data)
        error, _, payload = self.simple(size)
        return error, payload

    def disconnect(self) -> None:
        self.send(request(DISC))
        assert self.closed()
