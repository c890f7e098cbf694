"""The NBD handshake as data: numbers, frames, and options taken apart. No I/O.

Numbers and rules: the NBD protocol text (``doc/proto.md`` of the NBD project). Integers on the wire
are big-endian. What a client sent is hostile: every length is compared with a limit before it is
used for anything.

Two errors leave this module. :class:`~pmemkit.errors.ProtocolError`: the stream makes no sense any
more and the connection has to go. :class:`~pmemkit.errors.InvalidArgument`: this option is
malformed, but framed well; it is answered with an error and the next one is read.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from pmemkit.errors import InvalidArgument, ProtocolError

__all__ = [
    "ALLOCATION_CONTEXT_ID",
    "ALLOCATION_CONTEXT_NAME",
    "CLIENT_FLAGS_SIZE",
    "DEFAULT_PORT",
    "ERROR_TEXT_SIZE_MAX",
    "EXPORT_NAME_PAD_SIZE",
    "NAME_SIZE_MAX",
    "NBD_MAGIC",
    "OPTIONS_BASE",
    "OPTIONS_PER_EXPORT",
    "OPTION_HEADER_SIZE",
    "OPTION_MAGIC",
    "OPTION_REPLY_MAGIC",
    "OPTION_SIZE_MAX",
    "SKIP_SIZE_MAX",
    "ClientFlag",
    "ErrorReply",
    "HandshakeFlag",
    "InfoRequest",
    "InfoType",
    "MetaContextRequest",
    "Option",
    "OptionHeader",
    "Reply",
    "TransmissionFlag",
    "check_name",
    "error_reply",
    "export_name_reply",
    "greeting",
    "option_reply",
    "parse_client_flags",
    "parse_export_name",
    "parse_info_request",
    "parse_meta_context_request",
    "parse_option_header",
    "reply_info_block_size",
    "reply_info_export",
    "reply_info_text",
    "reply_meta_context",
    "reply_server",
]

DEFAULT_PORT = 10809
NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9

NAME_SIZE_MAX = 4096
"""Bytes of a string: the protocol's own limit."""
OPTION_SIZE_MAX = 64 << 10
"""Bytes of an option's data that are looked at."""
SKIP_SIZE_MAX = 1 << 20
"""Bytes of an option's data that are skipped and answered with ``ERR_TOO_BIG``; past it the client
is cut off."""
OPTIONS_BASE = 32
OPTIONS_PER_EXPORT = 32
"""A session may have ``OPTIONS_BASE + OPTIONS_PER_EXPORT * exports`` options."""
ERROR_TEXT_SIZE_MAX = 1024
"""Bytes of the sentence in an error reply; the protocol allows 4096."""

ALLOCATION_CONTEXT_NAME = "base:allocation"
ALLOCATION_CONTEXT_ID = 1

EXPORT_NAME_PAD_SIZE = 124
"""Zero bytes behind the answer to ``EXPORT_NAME`` unless both sides agreed to leave them out."""

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION_HEADER = struct.Struct(">QII")
_REPLY_HEADER = struct.Struct(">QIII")
_EXPORT = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

CLIENT_FLAGS_SIZE = _CLIENT_FLAGS.size
OPTION_HEADER_SIZE = _OPTION_HEADER.size


class HandshakeFlag(IntFlag):
    """What the server says of itself first."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client answers."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export offers to one connection."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """Options that have a meaning here; any other number is answered with ``ERR_UNSUP``."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Kinds of option reply."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4


class ErrorReply(IntEnum):
    """Kinds of option reply that refuse."""

    UNSUP = 0x8000_0001
    POLICY = 0x8000_0002
    INVALID = 0x8000_0003
    PLATFORM = 0x8000_0004
    TLS_REQD = 0x8000_0005
    UNKNOWN = 0x8000_0006
    SHUTDOWN = 0x8000_0007
    BLOCK_SIZE_REQD = 0x8000_0008
    TOO_BIG = 0x8000_0009


class InfoType(IntEnum):
    """What ``INFO`` and ``GO`` can tell."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


@dataclass(frozen=True, slots=True)
class OptionHeader:
    """The frame of an option. ``option`` is a plain number: it may be one nobody knows."""

    option: int
    length: int


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """Data of ``INFO`` and ``GO``; unknown information types are kept, and ignored later."""

    name: str
    types: frozenset[int]


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """Data of ``LIST_META_CONTEXT`` and ``SET_META_CONTEXT``."""

    name: str
    queries: tuple[str, ...]


class _Fields:
    """Walks over an option's data; what does not fit is :class:`InvalidArgument`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int, what: str) -> bytes:
        left = len(self._data) - self._at
        if size > left:
            raise InvalidArgument(f"{what} needs {size} bytes and {left} are left of the option")
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def u16(self, what: str) -> int:
        value: int = _U16.unpack(self.take(_U16.size, what))[0]
        return value

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(_U32.size, what))[0]
        return value

    def string(self, what: str) -> str:
        size = self.u32(f"the length of {what}")
        if size > NAME_SIZE_MAX:
            raise InvalidArgument(f"{what} of {size} bytes is longer than {NAME_SIZE_MAX}")
        return _decode(self.take(size, what), what)

    def end(self) -> None:
        left = len(self._data) - self._at
        if left:
            raise InvalidArgument(f"{left} bytes too many behind byte {self._at} of the option")


def _decode(raw: bytes, what: str) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as cause:
        raise InvalidArgument(f"{what} is not UTF-8 at byte {cause.start}") from cause
    if "\0" in text:
        raise InvalidArgument(f"{what} has a NUL at byte {raw.index(0)}")
    return text


def check_name(text: str, what: str) -> str:
    """``text`` if the protocol can carry it; used for names and descriptions of exports."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as cause:
        raise InvalidArgument(f"{what} is not UTF-8 at character {cause.start}") from cause
    if len(raw) > NAME_SIZE_MAX:
        raise InvalidArgument(f"{what} of {len(raw)} bytes is longer than {NAME_SIZE_MAX}")
    return _decode(raw, what)


def greeting(flags: HandshakeFlag) -> bytes:
    """The first bytes of a connection."""
    return _GREETING.pack(NBD_MAGIC, OPTION_MAGIC, flags)


def parse_client_flags(data: bytes) -> ClientFlag:
    """The client's flags; any bit that was not offered is :class:`ProtocolError`."""
    (bits,) = _CLIENT_FLAGS.unpack(data)
    known = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
    if bits & ~known:
        raise ProtocolError(f"client flags {bits:#x}: {bits & ~known:#x} was not offered")
    return ClientFlag(bits)


def parse_option_header(data: bytes) -> OptionHeader:
    """The frame of an option; a wrong magic, or more data than is skipped, ends the connection."""
    magic, option, length = _OPTION_HEADER.unpack(data)
    if magic != OPTION_MAGIC:
        raise ProtocolError(f"option magic {magic:#018x}")
    if length > SKIP_SIZE_MAX:
        raise ProtocolError(f"option {option} with {length} bytes of data")
    if option == Option.EXPORT_NAME and length > NAME_SIZE_MAX:
        raise ProtocolError(f"an export name of {length} bytes is longer than {NAME_SIZE_MAX}")
    return OptionHeader(option, length)


def parse_export_name(data: bytes) -> str:
    """Data of ``EXPORT_NAME``: the bare name."""
    return _decode(data, "the export name")


def parse_info_request(data: bytes) -> InfoRequest:
    """Data of ``INFO`` and ``GO``."""
    fields = _Fields(data)
    name = fields.string("the export name")
    count = fields.u16("the number of information requests")
    raw = fields.take(count * _U16.size, f"the list of {count} information requests")
    fields.end()
    return InfoRequest(name, frozenset(kind for (kind,) in _U16.iter_unpack(raw)))


def parse_meta_context_request(data: bytes) -> MetaContextRequest:
    """Data of ``LIST_META_CONTEXT`` and ``SET_META_CONTEXT``."""
    fields = _Fields(data)
    name = fields.string("the export name")
    count = fields.u32("the number of queries")
    most = len(data) // _U32.size
    if count > most:
        raise InvalidArgument(f"{count} queries do not fit into an option of {len(data)} bytes")
    queries = tuple(fields.string(f"query {index}") for index in range(count))
    fields.end()
    return MetaContextRequest(name, queries)


def option_reply(option: int, kind: Reply | ErrorReply, data: bytes = b"") -> bytes:
    """One reply frame."""
    return _REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def error_reply(option: int, kind: ErrorReply, text: str) -> bytes:
    """A refusal with a sentence for people, cut where it would be too long."""
    raw = text.encode(errors="replace")[:ERROR_TEXT_SIZE_MAX]
    whole = raw.decode(errors="ignore").replace("\0", "?")
    return option_reply(option, kind, whole.encode())


def reply_server(name: str, description: str) -> bytes:
    """One export in the answer to ``LIST``."""
    raw = name.encode()
    data = _U32.pack(len(raw)) + raw + description.encode()
    return option_reply(Option.LIST, Reply.SERVER, data)


def reply_info_export(option: int, size: int, flags: TransmissionFlag) -> bytes:
    """Size and flags, in the answer to ``INFO`` and ``GO``."""
    return option_reply(option, Reply.INFO, _INFO_EXPORT.pack(InfoType.EXPORT, size, flags))


def reply_info_block_size(option: int, least: int, preferred: int, payload_most: int) -> bytes:
    """Block sizes in bytes, in the answer to ``INFO`` and ``GO``."""
    data = _INFO_BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, least, preferred, payload_most)
    return option_reply(option, Reply.INFO, data)


def reply_info_text(option: int, kind: InfoType, text: str) -> bytes:
    """Name or description, in the answer to ``INFO`` and ``GO``."""
    return option_reply(option, Reply.INFO, _U16.pack(kind) + text.encode())


def reply_meta_context(option: int, context_id: int, name: str) -> bytes:
    """One context, in the answer to ``LIST_META_CONTEXT`` and ``SET_META_CONTEXT``."""
    return option_reply(option, Reply.META_CONTEXT, _U32.pack(context_id) + name.encode())


def export_name_reply(size: int, flags: TransmissionFlag, *, padded: bool) -> bytes:
    """The answer to ``EXPORT_NAME``, which has no frame."""
    return _EXPORT.pack(size, flags) + bytes(EXPORT_NAME_PAD_SIZE if padded else 0)
