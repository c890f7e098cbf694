"""Regions of other processes: headers of the protocol, and both ends of it after the handshake."""

from typing import Self, final

from .media import Medium

HEADER_SIZE: int
VERSION: int
TEXT_MAX: int

@final
class Client:
    """A region at the other end of a socket, which is duplicated."""

    def __new__(
        cls, fd: int, size: int, *, read_only: bool, punches: bool, patience: float
    ) -> Self:
        """``patience``: seconds to wait for a byte, then the connection is lost."""

    @property
    def medium(self) -> Medium:
        """Its bytes, of granularity ``page``: durable after a commit."""

    def close(self) -> None:
        """Ends the connection; calls in flight fail."""

@final
class Server:
    """One connection of a client, whose socket is duplicated."""

    def __new__(cls, fd: int, medium: Medium, *, read_only: bool = False) -> Self: ...
    def serve(self) -> tuple[int, int, int, int, str]:
        """Answers until the client goes or :meth:`stop`: requests, bytes out, bytes in, errors,
        and why it ended."""

    def stop(self) -> None: ...

def hello(payload: int, *, reply: bool = False, status: int = 0) -> bytes:
    """The header of a hello, or of the answer to one."""

def parse(data: bytes) -> tuple[int, int, bool, int, int, int, int]:
    """Version, op, reply, status, byte, payload and length of a header; :class:`ProtocolError`
    names the field that is wrong."""

def status_of(kind: str) -> int:
    """The number of a kind of error."""
