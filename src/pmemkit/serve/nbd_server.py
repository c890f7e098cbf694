"""The NBD server: listeners, handshakes under a deadline, one thread for each client's requests.

The event loop accepts and negotiates; the Rust core then serves the connection in a thread of its
own, without the GIL, until it ends.

States of a connection: accepted -> negotiating -> serving -> ended; negotiating -> ended when the
client gives up, breaks the rules or is too slow. Stopping cancels those that negotiate, asks those
that serve to finish what they received, and cuts them after ``drain_seconds``.

Invariants:
1. What happens to one connection never reaches another, nor the listeners.
2. ``connections_limit`` counts from accept to end.
3. A device's channel is opened after the client chose it, once for each connection.
4. When :meth:`NbdServer.serve` returns, its listeners are closed and every connection has ended or
   was cut.

What this does not do: speak the protocol (:mod:`pmemkit.serve.nbd_handshake` and the core do), log
(events go to a callback).
"""

import asyncio
import errno
import logging
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pmemkit.errors import InvalidArgument
from pmemkit.serve.channel import SocketChannel
from pmemkit.serve.export import Export, Exports
from pmemkit.serve.listeners import Listener, listen_tcp, listen_unix, parse_endpoint
from pmemkit.serve.nbd_handshake import Negotiated, negotiate

__all__ = [
    "Event",
    "NativeTransmission",
    "NbdServer",
    "RunningServer",
    "Transmission",
    "TransmissionFactory",
    "serve_in_thread",
]

_log = logging.getLogger(__name__)

_ABORT_SECONDS = 5.0
"""How long a cut connection may take to end before it is left alone."""
_ACCEPT_PAUSE_SECONDS = 0.1
_LISTENER_GONE = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}
_PEER_CREDENTIALS = struct.Struct("3i")


class Transmission(Protocol):
    """The second phase of one connection: :class:`pmemkit._native.nbd.Connection` or its like."""

    def serve(self) -> Any:
        """Serves until the end, in the calling thread; gives totals with a ``reason``."""

    def stop(self) -> None:
        """Asks :meth:`serve` to finish what was received and return."""

    def abort(self) -> None:
        """Cuts the connection."""


class TransmissionFactory(Protocol):
    """Makes the second phase from the first. It duplicates the socket's descriptor."""

    def __call__(self, sock: socket.socket, negotiated: Negotiated) -> Transmission:
        """Opens the export and takes the connection over."""


@dataclass(frozen=True, slots=True)
class NativeTransmission:
    """Transmission in the Rust core. See :class:`pmemkit._native.nbd.Connection` for the fields."""

    map: bool = True
    workers: int = 4
    poll_us: int = 50

    def __call__(self, sock: socket.socket, negotiated: Negotiated) -> Transmission:
        """Opens the export and takes the connection over."""
        # Late: whoever only negotiates, or brings another transmission, does without the core.
        from pmemkit._native import nbd

        return nbd.Connection(
            sock.fileno(),
            negotiated.export.open(),
            leftover=negotiated.leftover,
            structured=negotiated.structured,
            allocation_context=negotiated.allocation_context,
            transmission_flags=int(negotiated.flags),
            map=self.map,
            workers=self.workers,
            poll_us=self.poll_us,
        )


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to connection ``number``.

    ``connect``: it serves ``export`` now. ``disconnect``: it ended with ``result``, the totals, or
    with ``reason`` if it failed. ``leave``: the client asked and left without choosing an export.
    ``reject``: it never got that far, for ``reason``.
    """

    kind: Literal["connect", "disconnect", "leave", "reject"]
    number: int
    peer: str
    export: str | None = None
    result: Any = None
    reason: str | None = None


class _Connection:
    def __init__(self, number: int, peer: str) -> None:
        self.number = number
        self.peer = peer
        self.task: asyncio.Task[None] | None = None
        self.transmission: Transmission | None = None


class NbdServer:
    """Serves exports to NBD clients. Made once, served once.

    ``on_event`` is called in the event loop's thread and should return soon.
    """

    def __init__(
        self,
        exports: Iterable[Export],
        *,
        default_export: str | None = None,
        handshake_timeout_seconds: float = 10.0,
        connections_limit: int = 100,
        drain_seconds: float = 10.0,
        on_event: Callable[[Event], None] | None = None,
        transmission: TransmissionFactory | None = None,
    ) -> None:
        if connections_limit < 1:
            raise InvalidArgument(f"a limit of {connections_limit} connections serves nobody")
        self.exports = Exports(exports, default_export)
        self._handshake_timeout_seconds = handshake_timeout_seconds
        self._connections_limit = connections_limit
        self._drain_seconds = drain_seconds
        self._on_event = on_event
        self._transmission = NativeTransmission() if transmission is None else transmission
        self._connections: set[_Connection] = set()
        self._connections_seen = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self._stop_requested = False

    @property
    def connection_count(self) -> int:
        """Connections between accept and end."""
        return len(self._connections)

    def add_export(self, export: Export) -> None:
        """Offers one more export to clients that negotiate from now on."""
        self.exports = self.exports.with_export(export)

    def remove_export(self, name: str) -> None:
        """Withdraws an export; clients that were let in already stay."""
        self.exports = self.exports.without(name)

    def run(self, listeners: Sequence[Listener]) -> None:
        """Serves until SIGTERM, SIGINT or :meth:`stop`; the blocking form for a main thread. A
        second signal cuts what is still open."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal)
            await self.serve(listeners)

        asyncio.run(main())

    def stop(self) -> None:
        """Asks :meth:`serve` to drain and return. Any thread, any time, more than once."""
        self._stop_requested = True
        if self._loop is not None:
            # The loop may be gone already.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def serve(self, listeners: Sequence[Listener]) -> None:
        """Serves until :meth:`stop`, then drains. The listeners are closed in every case."""
        self._loop = asyncio.get_running_loop()
        if self._stop_requested:
            self._stopping.set()
        accepts = [asyncio.create_task(self._accept(listener)) for listener in listeners]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([stopping, *accepts], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, *accepts):
                task.cancel()
            ends = await asyncio.gather(*accepts, return_exceptions=True)
            for listener in listeners:
                listener.close()
            await self._drain()
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _accept(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener.sock)
            except OSError as cause:
                if cause.errno in _LISTENER_GONE:
                    raise
                # The error is of one client, or descriptors ran out: others may still get in.
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._connections_seen += 1
            connection = _Connection(self._connections_seen, _peer_of(sock))
            if len(self._connections) >= self._connections_limit:
                sock.close()
                self._reject(connection, f"{self._connections_limit} connections are open already")
                continue
            self._connections.add(connection)
            connection.task = loop.create_task(self._connection(connection, sock))

    async def _connection(self, connection: _Connection, sock: socket.socket) -> None:
        """One client from accept to end; nothing but cancellation leaves it."""
        try:
            with sock:
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                negotiated = await self._negotiate(connection, sock)
                if negotiated is None:
                    return
                transmission = self._transmission(sock, negotiated)
            await self._transmit(connection, negotiated.export.name, transmission)
        except asyncio.CancelledError:
            if connection.transmission is None:
                self._reject(connection, "the server stopped")
            raise
        except OSError as cause:
            self._reject(connection, str(cause))
        except Exception as cause:
            _log.exception("connection %d failed", connection.number)
            self._reject(connection, f"{type(cause).__name__}: {cause}")
        finally:
            self._connections.discard(connection)

    async def _negotiate(self, connection: _Connection, sock: socket.socket) -> Negotiated | None:
        try:
            async with asyncio.timeout(self._handshake_timeout_seconds):
                negotiated = await negotiate(SocketChannel(sock), self.exports)
        except TimeoutError:
            seconds = self._handshake_timeout_seconds
            self._reject(connection, f"no agreement after {seconds:g} seconds")
            return None
        if negotiated is None:
            self._tell(Event("leave", connection.number, connection.peer))
        return negotiated

    async def _transmit(
        self, connection: _Connection, export: str, transmission: Transmission
    ) -> None:
        """Serves in a thread of its own. The default executor has too few."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Any] = loop.create_future()
        connection.transmission = transmission

        def deliver(result: Any, error: BaseException | None) -> None:
            if ended.cancelled():
                return
            if error is None:
                ended.set_result(result)
            else:
                ended.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = transmission.serve()
            except BaseException as cause:
                error = cause
            # A loop that stopped waiting for a stuck thread may be closed.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(deliver, result, error)

        name = f"nbd-{connection.number}"
        threading.Thread(target=work, name=name, daemon=True).start()
        self._tell(Event("connect", connection.number, connection.peer, export))
        result, reason = None, None
        try:
            result = await ended
        except Exception as cause:
            reason = str(cause)
        number, peer = connection.number, connection.peer
        self._tell(Event("disconnect", number, peer, export, result, reason))

    async def _drain(self) -> None:
        for connection in list(self._connections):
            if connection.transmission is not None:
                # One that ended by itself meanwhile may refuse.
                with suppress(OSError):
                    connection.transmission.stop()
            elif connection.task is not None:
                connection.task.cancel()
        if not await self._ended_within(self._drain_seconds):
            for connection in list(self._connections):
                if connection.transmission is not None:
                    with suppress(OSError):
                        connection.transmission.abort()
            self._hurrying.clear()
            await self._ended_within(_ABORT_SECONDS)
        for connection in list(self._connections):
            _log.error("connection %d did not end and is left alone", connection.number)
            if connection.task is not None:
                connection.task.cancel()

    async def _ended_within(self, seconds: float) -> bool:
        """Waits for every connection to end; not longer than this, nor when told to hurry."""
        tasks = {each.task for each in self._connections if each.task is not None}
        if not tasks:
            return True
        ended = asyncio.create_task(asyncio.wait(tasks))
        hurrying = asyncio.create_task(self._hurrying.wait())
        watched: set[asyncio.Task[Any]] = {ended, hurrying}
        await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        hurrying.cancel()
        return ended.done()

    def _reject(self, connection: _Connection, reason: str) -> None:
        self._tell(Event("reject", connection.number, connection.peer, reason=reason))

    def _tell(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            _log.exception("the event callback failed")


def _peer_of(sock: socket.socket) -> str:
    """The client as people know it: an address, or a process on this machine."""
    try:
        if sock.family == socket.AF_UNIX:
            size = _PEER_CREDENTIALS.size
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            return f"pid {_PEER_CREDENTIALS.unpack(raw)[0]}"
        host, port = sock.getpeername()[:2]
    except OSError:
        return "unknown"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class RunningServer:
    """A server in a thread. ``uri`` is the default export at the first listener."""

    def __init__(self, server: NbdServer, listeners: Sequence[Listener]) -> None:
        self.server = server
        self._listeners = listeners

    @property
    def uri(self) -> str:
        """The default export."""
        return self.uri_of("")

    def uri_of(self, export: str) -> str:
        """An export by name."""
        return self._listeners[0].uri(export)


@contextmanager
def serve_in_thread(
    exports: Iterable[Export],
    *,
    unix: str | Path | None = None,
    tcp: str | None = None,
    **options: Any,
) -> Iterator[RunningServer]:
    """Serves in a thread while the ``with`` block runs; gives the URI.

    Without ``unix`` (a path) and ``tcp`` (``HOST:PORT``) it listens on a socket in a temporary
    directory. ``options`` are those of :class:`NbdServer`.
    """
    server = NbdServer(exports, **options)
    with tempfile.TemporaryDirectory(prefix="pmemkit-") as directory:
        listeners: list[Listener] = []
        if tcp is not None:
            listeners += listen_tcp(*parse_endpoint(tcp))
        if unix is not None or not listeners:
            listeners.append(listen_unix(Path(directory, "nbd.sock") if unix is None else unix))
        failures: list[BaseException] = []

        def work() -> None:
            try:
                asyncio.run(server.serve(listeners))
            except BaseException as cause:
                failures.append(cause)

        thread = threading.Thread(target=work, name="nbd-server", daemon=True)
        running = RunningServer(server, listeners)
        thread.start()
        try:
            yield running
        finally:
            server.stop()
            thread.join()
        if failures:
            raise failures[0]
