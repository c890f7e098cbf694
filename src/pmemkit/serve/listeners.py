"""Where clients come in: Unix sockets, TCP, and sockets that systemd opened.

A listener is bound before the server starts, so that its address is known, and clients may already
queue on it. What this does not do: accept.
"""

import errno
import os
import socket
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pmemkit.errors import Busy, InvalidArgument, NotSupported, SystemFailure
from pmemkit.serve.nbd_protocol import DEFAULT_PORT

__all__ = ["Listener", "listen_activated", "listen_tcp", "listen_unix", "parse_endpoint"]

_ACTIVATED_FD_FIRST = 3
_ACTIVATED_LIMIT = 1024
_BACKLOG = 128
_PROBE_SECONDS = 1.0
_UNIX_PATH_SIZE_MAX = 107
"""Bytes of a socket path that the kernel's ``sockaddr_un`` holds beside the closing NUL."""


@dataclass(slots=True)
class Listener:
    """A bound, listening, non-blocking socket."""

    sock: socket.socket
    path: Path | None = None
    """The socket file to remove at the end, if it is ours."""
    inode: tuple[int, int] = (0, 0)
    """Device and inode of ``path``, so that nobody else's file is removed."""
    address: Any = field(init=False)
    """The bound address; it outlives the socket."""

    def __post_init__(self) -> None:
        self.address = self.sock.getsockname()

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export behind this listener; the default export without a name."""
        name = quote(export, safe="")
        address = self.address
        if self.sock.family == socket.AF_UNIX:
            raw = address if isinstance(address, bytes) else os.fsencode(address)
            return f"nbd+unix:///{name}?socket={quote(raw, safe='/')}"
        host, port = address[0], address[1]
        shown = f"[{host}]" if self.sock.family == socket.AF_INET6 else host
        return f"nbd://{shown}:{port}/{name}"

    def close(self) -> None:
        """Stops listening and removes the socket file unless somebody replaced it."""
        self.sock.close()
        if self.path is None:
            return
        try:
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self.inode:
                self.path.unlink()
        except FileNotFoundError:
            return


def listen_unix(path: str | os.PathLike[str], *, mode: int = 0o600) -> Listener:
    """Listens on a socket file with these permissions.

    A socket file that nobody listens on is replaced. :class:`Busy` where somebody does, and
    :class:`InvalidArgument` for a file that is no socket.
    """
    place = Path(path).absolute()
    size = len(os.fsencode(place))
    if size > _UNIX_PATH_SIZE_MAX:
        text = f"{size} bytes are too many for a socket's path, {_UNIX_PATH_SIZE_MAX} fit"
        raise InvalidArgument(text, op="listen", path=str(place))
    _clear_stale(place)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(place))
        status = place.lstat()
        # Nobody gets in before listen(), so there is no moment with wider permissions.
        place.chmod(mode)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as cause:
        sock.close()
        raise _failure(cause, str(place)) from cause
    return Listener(sock, place, (status.st_dev, status.st_ino))


def _clear_stale(place: Path) -> None:
    """Removes a socket file that nobody listens on."""
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as cause:
        raise _failure(cause, str(place)) from cause
    if not stat.S_ISSOCK(mode):
        text = "exists and is not a socket"
        raise InvalidArgument(text, errno=errno.EEXIST, op="listen", path=str(place))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(os.fspath(place))
        except ConnectionRefusedError:
            place.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as cause:
            # A full queue, for one, is somebody's.
            text = f"is a socket that may be in use: {cause.strerror or cause}"
            raise Busy(text, op="listen", path=str(place)) from cause
    raise Busy("another server listens here", op="listen", path=str(place))


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``[V6]:PORT``, ``HOST``, ``:PORT`` (all addresses)."""
    host, colon, port_text = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port_text = text, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InvalidArgument(f"{text!r}: write an IPv6 address as [ADDRESS]:PORT")
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 0xFFFF:
        raise InvalidArgument(f"{text!r}: {port_text!r} is not a port")
    return host, int(port_text)


def listen_tcp(host: str = "", port: int = DEFAULT_PORT) -> list[Listener]:
    """Listens on every address of ``host`` (all addresses when empty). Port 0 picks a free one,
    the same for all; :meth:`Listener.uri` tells which."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as cause:
        raise InvalidArgument(f"{host!r}: {cause.strerror}", op="listen") from cause
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            # The host's family decides the address's shape: host and port come first in both.
            endpoint = (address[0], port, *address[2:])
            sock = _bind_tcp(family, endpoint, optional=bool(listeners) or len(found) > 1)
            if sock is not None:
                listeners.append(Listener(sock))
                port = sock.getsockname()[1]
    except OSError as cause:
        for listener in listeners:
            listener.close()
        raise _failure(cause, f"{host}:{port}") from cause
    if not listeners:
        raise NotSupported(f"{host!r} has no address to listen on", op="listen")
    return listeners


def _bind_tcp(family: int, endpoint: tuple[object, ...], *, optional: bool) -> socket.socket | None:
    """A listening socket; ``None`` for an optional one whose address family the machine lacks."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as cause:
        if optional and cause.errno == errno.EAFNOSUPPORT:
            return None
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(endpoint)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as cause:
        sock.close()
        if optional and cause.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    return sock


def listen_activated(environment: MutableMapping[str, str] | None = None) -> list[Listener]:
    """The sockets systemd (or anyone who speaks its way) opened for this process.

    Empty when there are none, or they were meant for another process. The variables are removed:
    children must not take the sockets for theirs.
    """
    variables = os.environ if environment is None else environment
    owner, count_text = variables.get("LISTEN_PID"), variables.get("LISTEN_FDS")
    if owner is None or count_text is None or owner != str(os.getpid()):
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        variables.pop(name, None)
    if not (count_text.isascii() and count_text.isdigit()):
        raise InvalidArgument(f"LISTEN_FDS={count_text!r} is not a number", op="listen")
    count = int(count_text)
    if not 0 < count <= _ACTIVATED_LIMIT:
        raise InvalidArgument(f"LISTEN_FDS={count} is out of range", op="listen")
    return [_adopt(_ACTIVATED_FD_FIRST + index) for index in range(count)]


def _adopt(fd: int) -> Listener:
    """A listener on a descriptor that was handed to this process."""
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as cause:
        raise _failure(cause, f"descriptor {fd}") from cause
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    if not listening or sock.type != socket.SOCK_STREAM or sock.family not in families:
        sock.detach()
        raise InvalidArgument(f"descriptor {fd} is not a listening stream socket", op="listen")
    sock.setblocking(False)
    return Listener(sock)


def _failure(cause: OSError, path: str) -> SystemFailure | Busy:
    text = cause.strerror or str(cause)
    if cause.errno == errno.EADDRINUSE:
        return Busy(text, errno=cause.errno, op="listen", path=path)
    return SystemFailure(text, errno=cause.errno, op="listen", path=path)
