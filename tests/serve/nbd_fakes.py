"""Stand-ins for what is below the server: a device and a transmission."""

import os
import socket
import threading
from types import SimpleNamespace

from pmemkit.serve.export import Export
from pmemkit.serve.nbd_handshake import Negotiated

READ_CAPS = frozenset({"cache", "extents", "map", "multi_conn"})
ALL_CAPS = READ_CAPS | {"write", "flush", "fua", "discard", "zero", "fast_zero"}


class FakeSource:
    """Counts how often it is opened."""

    def __init__(self, size: int = 1 << 20, caps: frozenset[str] = ALL_CAPS) -> None:
        self.size = size
        self.caps = caps
        self.block_size_min = 1
        self.block_size_preferred = 4096
        self.payload_size_max = 32 << 20
        self.opened = 0

    def channel(self, *, read_only: bool = False) -> SimpleNamespace:
        self.opened += 1
        return SimpleNamespace(
            size=self.size,
            caps=self.caps & READ_CAPS if read_only else self.caps,
            block_size_min=self.block_size_min,
            block_size_preferred=self.block_size_preferred,
            payload_size_max=self.payload_size_max,
        )


def fake_export(name: str = "disk", **options: object) -> Export:
    return Export(name, FakeSource(), **options)


class FakeTransmission:
    """Echoes what it receives until the stream ends or it is stopped."""

    def __init__(self, sock: socket.socket, negotiated: Negotiated) -> None:
        self.sock = socket.socket(fileno=os.dup(sock.fileno()))
        self.sock.setblocking(True)
        self.negotiated = negotiated
        self.channel = negotiated.export.open()
        self.stopped = threading.Event()
        self.aborted = threading.Event()

    def serve(self) -> SimpleNamespace:
        with self.sock:
            if self.negotiated.leftover:
                self.sock.sendall(self.negotiated.leftover)
            while data := self.sock.recv(4096):
                self.sock.sendall(data)
        return SimpleNamespace(reason="stopped" if self.stopped.is_set() else "eof")

    def stop(self) -> None:
        self.stopped.set()
        self.sock.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        self.aborted.set()
        self.sock.shutdown(socket.SHUT_RDWR)


class StubbornTransmission(FakeTransmission):
    """Takes no notice of being asked to stop."""

    def stop(self) -> None:
        self.stopped.set()
