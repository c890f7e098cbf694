"""The plainest NBD client: one request at a time to a server thread over a socket pair.

It begins after the handshake, so it is a way to drive the server's own path to the media (bytes
received straight into the mapping where the stack offers ``map``) from a test. For anything else
use a real client. The header of a write goes ahead of its payload, so that a server which has a
direct way to the media for payload that has not arrived yet takes it.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
import time
from types import TracebackType
from typing import Self

from pmemkit._native import block, constants, nbd
from pmemkit.errors import ProtocolError, SystemFailure

__all__ = ["TransmissionClient"]

_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
_FUA, _NO_HOLE = 1, 2
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class TransmissionClient:
    """A connection to a server of ``channel`` in this process; close it, or use ``with``."""

    def __init__(self, channel: block.Channel, *, map: bool = True) -> None:
        known = constants()
        self._magics = (known["NBD_REQUEST_MAGIC"], known["NBD_SIMPLE_REPLY_MAGIC"])
        names = ("SEND_FLUSH", "SEND_FUA", "SEND_TRIM", "SEND_WRITE_ZEROES")
        flags = 1 | sum(known[f"NBD_FLAG_{name}"] for name in names)
        self._socket, served = socket.socketpair()
        with served:
            self._connection = nbd.Connection(
                served.fileno(), channel, transmission_flags=flags, map=map
            )
        self._result: nbd.ServeResult | None = None
        self._thread = threading.Thread(target=self._serve, name="nbd-server")
        self._thread.start()
        self._cookie = 0

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        return self._ask(_READ, offset, length, receive=length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> int:
        """Writes, and returns when the server has answered."""
        self._ask(_WRITE, offset, len(data), _FUA * fua, data)
        return len(data)

    def flush(self) -> None:
        """Sends a flush and waits for the answer."""
        self._ask(_FLUSH, 0, 0)

    def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Sends a trim and waits for the answer."""
        self._ask(_TRIM, offset, length, _FUA * fua)

    def zero(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> None:
        """Sends a write of zeroes and waits for the answer."""
        self._ask(_ZEROES, offset, length, _FUA * fua | _NO_HOLE * no_hole)

    def close(self) -> nbd.ServeResult | None:
        """Disconnects, and returns the server's totals."""
        if self._socket.fileno() >= 0:
            with self._socket:
                header = (self._magics[0], 0, _DISCONNECT, 0, 0, 0)
                self._socket.sendall(_REQUEST.pack(*header))
                self._thread.join()
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        self._result = self._connection.serve()

    def _ask(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        payload: bytes = b"",
        receive: int = 0,
    ) -> bytes:
        self._cookie += 1
        header = (self._magics[0], flags, command, self._cookie, offset, length)
        self._socket.sendall(_REQUEST.pack(*header))
        if payload:
            self._let_the_header_go()
            self._socket.sendall(payload)
        magic, errno, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if (magic, cookie) != (self._magics[1], self._cookie):
            text = f"reply {magic:#x} to {cookie}, expected {self._magics[1]:#x} to {self._cookie}"
            raise ProtocolError(text, op="receive")
        if errno:
            raise SystemFailure(f"command {command} failed", errno=errno, offset=offset)
        return self._receive(receive)

    def _let_the_header_go(self) -> None:
        """Waits until the server has taken all that was sent, or has gone."""
        while self._thread.is_alive():
            waiting = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))
            if int.from_bytes(waiting, "little") == 0:
                return
            time.sleep(0)

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise ProtocolError("the server closed the connection", op="receive")
            received += part
        return received
