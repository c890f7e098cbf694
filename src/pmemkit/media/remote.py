"""A region that another process serves: its address, the handshake of both sides, the connection.

    remote+unix:///run/pool.sock            a Unix socket
    remote+unix:///run/pool.sock?export=b   one export of several
    remote+tcp://10.0.0.7:7500              TCP; trusted networks only, nothing is encrypted

``docs/remote-regions.md`` has the protocol. After the handshake the core speaks.

Invariants:
1. What comes from the peer is checked before it is used: the core checks headers, this module the
   hello and its answer, and a message that breaks the protocol is :class:`ProtocolError`.
2. Every wait has an end: ``patience`` seconds without a byte and the connection is given up.

What this does not do: reconnect, encrypt.
"""

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from pmemkit import errors
from pmemkit.errors import InvalidArgument, PmemError, ProtocolError, SystemFailure

if TYPE_CHECKING:
    from pmemkit._native.remote import Client

__all__ = [
    "PATIENCE_SECONDS",
    "Address",
    "Answer",
    "Connected",
    "Hello",
    "connect",
    "encode_answer",
    "encode_refusal",
    "parse_address",
    "read_hello",
]

PATIENCE_SECONDS = 30.0
_NAME_SIZE_MAX = 255
_FRAME_SIZE = 4096

_HELLO = struct.Struct("<HHIQ")
"""The lowest and the highest version, flags, and zeroes; the name of the export follows."""
_ANSWER = struct.Struct("<HHIQIIQ")
"""Version, zero, flags, bytes of the region, most payload, bytes of a frame, zeroes; what keeps the
content follows, as text."""
_WANTS_WRITE = 1
_WRITABLE, _PUNCHES, _VOLATILE = 1, 2, 4
_OP_HELLO = 1


@dataclass(frozen=True, slots=True)
class Address:
    """Where a region is served."""

    unix: str | None
    host: str
    port: int
    export: str
    patience: float


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client asks for."""

    version_first: int
    version_last: int
    write: bool
    export: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says of an export."""

    size: int
    writable: bool
    punches: bool
    volatile: bool
    domain: str


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection whose handshake is over."""

    client: "Client"
    answer: Answer


def parse_address(text: str) -> Address:
    """The parts of an address. :class:`InvalidArgument` says what is wrong with it."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as cause:
        raise InvalidArgument(f"{text!r}: {cause}", op="open") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    export = options.pop("export", "")
    patience = _patience(text, options.pop("patience", str(PATIENCE_SECONDS)))
    if options:
        raise InvalidArgument(f"{text!r}: {next(iter(options))} is no option", op="open")
    if len(export.encode()) > _NAME_SIZE_MAX:
        raise InvalidArgument(f"{text!r}: the name of the export is too long", op="open")
    if parts.scheme == "remote+unix" and not parts.netloc and parts.path.startswith("/"):
        return Address(unquote(parts.path), "", 0, export, patience)
    if parts.scheme == "remote+tcp" and host and port and parts.path in ("", "/"):
        return Address(None, host, port, export, patience)
    wanted = "remote+unix:///PATH or remote+tcp://HOST:PORT"
    raise InvalidArgument(f"{text!r} is not {wanted}", op="open")


def _patience(text: str, word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InvalidArgument(f"{text!r}: {word!r} is not a time in seconds", op="open")
    return seconds


def connect(text: str, *, read_only: bool) -> Connected:
    """Connects and shakes hands."""
    from pmemkit._native import remote

    address = parse_address(text)
    try:
        sock = _connected(address)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        text_of = f"nobody serves a region there: {reason}"
        raise SystemFailure(text_of, errno=cause.errno, op="open", path=text) from cause
    with sock:
        try:
            answer = _shake_hands(sock, address.export, write=not read_only)
        except PmemError as error:
            error.path = error.path or text
            raise
        except OSError as cause:
            reason = cause.strerror or str(cause)
            text_of = f"the peer did not answer: {reason}"
            raise SystemFailure(text_of, errno=cause.errno, op="open", path=text) from cause
        client = remote.Client(
            sock.fileno(),
            answer.size,
            read_only=read_only or not answer.writable,
            punches=answer.punches,
            patience=address.patience,
        )
    return Connected(client, answer)


def _connected(address: Address) -> socket.socket:
    if address.unix is None:
        place = (address.host, address.port)
        sock = socket.create_connection(place, timeout=address.patience)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(address.patience)
        sock.connect(address.unix)
    except OSError:
        sock.close()
        raise
    return sock


def _shake_hands(sock: socket.socket, export: str, *, write: bool) -> Answer:
    from pmemkit._native import remote

    name = export.encode()
    flags = _WANTS_WRITE if write else 0
    payload = _HELLO.pack(remote.VERSION, remote.VERSION, flags, 0) + name
    sock.sendall(remote.hello(len(payload)) + payload)
    version, op, reply, status, _, length, _ = remote.parse(_receive(sock, remote.HEADER_SIZE))
    if op != _OP_HELLO or not reply:
        raise ProtocolError(f"op {op} is no answer to a hello", op="open")
    said = _receive(sock, length)
    if status:
        raise _refusal(status, said.decode(errors="replace"))
    if length < _ANSWER.size or version != remote.VERSION:
        raise ProtocolError(f"{length} bytes, version {version}: no answer to a hello", op="open")
    agreed, zero, flags, size, payload_most, frame, zeroes = _ANSWER.unpack_from(said)
    if (agreed, zero, zeroes, frame) != (remote.VERSION, 0, 0, _FRAME_SIZE) or size >= 1 << 63:
        text = f"version {agreed}, {size} bytes in frames of {frame}: not what can be used here"
        raise ProtocolError(text, op="open")
    if payload_most < 1 << 20 or flags & ~(_WRITABLE | _PUNCHES | _VOLATILE):
        raise ProtocolError(f"payload {payload_most}, flags {flags:#x}", op="open")
    domain = said[_ANSWER.size :].decode(errors="replace")
    return Answer(
        size, bool(flags & _WRITABLE), bool(flags & _PUNCHES), bool(flags & _VOLATILE), domain
    )


def _refusal(status: int, text: str) -> PmemError:
    from pmemkit._native import remote

    classes = (vars(errors)[name] for name in errors.__all__)
    for each in classes:
        if each.kind and remote.status_of(each.kind) == status:
            error: PmemError = each(f"the peer: {text}", op="open")
            return error
    return ProtocolError(f"the peer: {text}", op="open")


def _receive(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes; headers limit how many that are."""
    found = bytearray()
    while len(found) < length:
        part = sock.recv(length - len(found))
        if not part:
            raise ProtocolError("the peer ended the connection in the handshake", op="open")
        found += part
    return bytes(found)


# --- the other side -------------------------------------------------------------------------------


def read_hello(sock: socket.socket) -> Hello:
    """Receives a hello. :class:`ProtocolError` where it is none."""
    from pmemkit._native import remote

    _, op, reply, _, _, length, _ = remote.parse(_receive(sock, remote.HEADER_SIZE))
    if op != _OP_HELLO or reply or not _HELLO.size <= length <= _HELLO.size + _NAME_SIZE_MAX:
        raise ProtocolError(f"op {op} with {length} bytes is no hello", op="serve")
    said = _receive(sock, length)
    first, last, flags, zeroes = _HELLO.unpack_from(said)
    if flags & ~_WANTS_WRITE or zeroes or first > last:
        raise ProtocolError(f"versions {first} to {last}, flags {flags:#x}", op="serve")
    try:
        export = said[_HELLO.size :].decode()
    except UnicodeDecodeError as cause:
        raise ProtocolError(f"the name of an export: {cause.reason}", op="serve") from None
    return Hello(first, last, bool(flags & _WANTS_WRITE), export)


def encode_answer(answer: Answer) -> bytes:
    """The message that accepts a hello."""
    from pmemkit._native import remote

    flags = _WRITABLE * answer.writable | _PUNCHES * answer.punches | _VOLATILE * answer.volatile
    fixed = _ANSWER.pack(remote.VERSION, 0, flags, answer.size, 1 << 20, _FRAME_SIZE, 0)
    payload = fixed + answer.domain.encode()[:_NAME_SIZE_MAX]
    return remote.hello(len(payload), reply=True) + payload


def encode_refusal(error: PmemError) -> bytes:
    """The message that refuses one."""
    from pmemkit._native import remote

    text = error.message.encode()[: remote.TEXT_MAX]
    status = remote.status_of(error.kind)
    return remote.hello(len(text), reply=True, status=status) + text
