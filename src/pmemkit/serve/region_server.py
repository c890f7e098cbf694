"""Regions for other processes: the server behind ``remote+unix://`` and ``remote+tcp://``.

A thread waits for clients, and each client has one of its own, in which the core answers it.

States of a connection: accepted -> (credentials, hello) -> served -> gone. A hello has ten seconds.

Invariants:
1. On a Unix socket only users that are allowed get an answer to a hello: the owner of the process,
   root, and those that were named. The kernel says who they are, not the client.
2. A read-only export is opened so that this process could not write it either, or the core refuses
   each write.
3. :meth:`RegionServer.close` returns when no client touches a region any more.

What this does not do: encrypt, authenticate on TCP, reconnect clients.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from pmemkit.errors import InvalidArgument, NotSupported, PmemError, ReadOnly, SystemFailure
from pmemkit.media.remote import Answer, Hello, encode_answer, encode_refusal, read_hello
from pmemkit.serve.listeners import Listener
from pmemkit.storage.region import Region

if TYPE_CHECKING:
    from pmemkit._native.remote import Server

__all__ = ["RegionExport", "RegionServer"]

_HELLO_SECONDS = 10.0
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of a peer."""


@dataclass(frozen=True, slots=True)
class RegionExport:
    """A region under a name; the empty name is the default one."""

    name: str
    region: Region
    read_only: bool = False

    def answer(self) -> Answer:
        """What clients are told of it."""
        region = self.region
        writable = not self.read_only and not region.read_only
        medium = region.medium
        punches = writable and medium.punch(0, 0)
        domain = region.persistence_domain
        return Answer(region.size, writable, punches, region.volatile, domain)


class RegionServer:
    """Serves regions on listeners until it is closed."""

    def __init__(
        self,
        exports: Iterable[RegionExport],
        listeners: Iterable[Listener],
        *,
        users: Iterable[int] = (),
        connections_limit: int = 64,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``users``: who may connect to a Unix socket beside the user of this process."""
        self._exports = {export.name: export for export in exports}
        for export in self._exports.values():
            # Refuses mode sector and the like now.
            export.region.lend("serve", write=False)
        self._listeners = list(listeners)
        self._users = {os.getuid(), *users}
        self._limit = connections_limit
        self._say = say
        self._lock = threading.Lock()
        self._closing = False
        self._servers: set[Server] = set()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        for listener in self._listeners:
            listener.sock.setblocking(True)
            self._start(self._accept, listener)

    def __enter__(self) -> "RegionServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections and stops listening. May be called again."""
        with self._lock:
            self._closing = True
            servers, sockets = list(self._servers), list(self._sockets)
        for listener in self._listeners:
            _shut_down(listener.sock)
        for sock in sockets:
            _shut_down(sock)
        for server in servers:
            server.stop()
        for thread in list(self._threads):
            thread.join()
        for listener in self._listeners:
            listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                sock, _ = listener.sock.accept()
            except OSError:
                if self._closing:
                    return
                # Out of descriptors, or a client that went away: others will come.
                threading.Event().wait(0.05)
                continue
            with self._lock:
                if self._closing or len(self._sockets) >= self._limit:
                    sock.close()
                    continue
                self._sockets.add(sock)
                self._start(self._connection, sock)

    def _connection(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._serve(sock)
        except OSError as cause:
            self._say(f"a client was turned away: {cause}")
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def _serve(self, sock: socket.socket) -> None:
        from pmemkit._native import remote

        sock.settimeout(_HELLO_SECONDS)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            hello = read_hello(sock)
            self._check_peer(sock)
            export = self._asked_for(hello)
        except PmemError as error:
            sock.sendall(encode_refusal(error))
            raise
        answer = export.answer()
        server = remote.Server(sock.fileno(), export.region.medium, read_only=not answer.writable)
        with self._lock:
            if self._closing:
                return
            self._servers.add(server)
        try:
            # What the core set on the socket has no effect on this one call.
            sock.sendall(encode_answer(answer))
            requests, out, into, failed, reason = server.serve()
        finally:
            with self._lock:
                self._servers.discard(server)
        self._say(
            f"export {export.name!r}: {requests} requests, {out} bytes out, {into} bytes in, "
            f"{failed} errors, {reason}"
        )

    def _check_peer(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            return
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(raw)
        if user not in self._users and user != 0:
            text = f"user {user} (process {process}) is not allowed to use this server"
            raise SystemFailure(text, op="serve")

    def _asked_for(self, hello: Hello) -> RegionExport:
        from pmemkit._native import remote

        if not hello.version_first <= remote.VERSION <= hello.version_last:
            text = f"version {remote.VERSION} is spoken here, not {hello.version_last}"
            raise NotSupported(text, op="serve")
        export = self._exports.get(hello.export)
        if export is None:
            raise InvalidArgument(f"there is no export {hello.export!r}", op="serve")
        if hello.write and (export.read_only or export.region.read_only):
            raise ReadOnly("the export is read-only: open it for reading", op="serve")
        return export


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # It is gone, which is what was wanted.
