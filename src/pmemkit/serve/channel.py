"""What a handshake talks through: exactly so many bytes in, bytes out, and the rest handed over.

A client may send its first requests right behind the last option. They are read together with it
and belong to whoever serves the transmission: :meth:`Channel.detach` gives them away together with
the socket.

This is the place for TLS: an implementation that encrypts has the same shape, and its ``detach``
gives a plain socket whose other end it serves, or one that the kernel encrypts.

What this does not do: know the protocol, limit time.
"""

import asyncio
import socket
from typing import Protocol

__all__ = ["Channel", "EndOfStream", "SocketChannel"]

_RECEIVE_SIZE = 16 << 10


class EndOfStream(EOFError):
    """The client left. ``received`` bytes of what was waited for had arrived."""

    def __init__(self, received: int, wanted: int) -> None:
        super().__init__(f"the client left {received} bytes into {wanted}")
        self.received = received


class Channel(Protocol):
    """What a handshake needs of a connection."""

    async def read_exactly(self, size: int) -> bytes:
        """``size`` bytes; :class:`EndOfStream` when the client leaves before."""

    async def skip(self, size: int) -> None:
        """Drops ``size`` bytes without holding them."""

    async def write(self, data: bytes) -> None:
        """Sends everything."""

    def leftover(self) -> bytes:
        """What was received and not read yet; it stays."""

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket and the leftover, both the caller's from now on."""


class SocketChannel:
    """A plain socket under asyncio. It is put into non-blocking mode and owned until detached."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._buffer = bytearray()

    async def read_exactly(self, size: int) -> bytes:
        """``size`` bytes; :class:`EndOfStream` when the client leaves before."""
        loop = asyncio.get_running_loop()
        while len(self._buffer) < size:
            received = await loop.sock_recv(self._socket, _RECEIVE_SIZE)
            if not received:
                raise EndOfStream(len(self._buffer), size)
            self._buffer += received
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def skip(self, size: int) -> None:
        """Drops ``size`` bytes without holding them."""
        while size:
            size -= len(await self.read_exactly(min(size, _RECEIVE_SIZE)))

    async def write(self, data: bytes) -> None:
        """Sends everything."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def leftover(self) -> bytes:
        """What was received and not read yet; it stays."""
        return bytes(self._buffer)

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket and the leftover, both the caller's from now on."""
        leftover = bytes(self._buffer)
        self._buffer.clear()
        return self._socket, leftover
