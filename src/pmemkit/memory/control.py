"""A pool's control socket: what ``pmem memory`` and ``pmem top`` talk to.

The pool's process listens on a Unix socket that only its user may open. A request is one line of
JSON, ``{"op": "remove", "region": "a", "timeout": 5}``; answers are lines as well: any number of
``{"progress": [moved, total]}``, then one ``{"result": …}`` or ``{"error": {"kind", "message"}}``.
One that hangs up while regions move cancels that.

What this does not do: anything that the pool's own methods do not.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pmemkit import errors
from pmemkit.errors import Busy, Closed, InvalidArgument, PmemError, ProtocolError

if TYPE_CHECKING:
    from pmemkit.memory.pool import MemoryPool, Migration

__all__ = ["ControlServer", "ask"]

_LINE_MAX = 1 << 16
_KINDS = {
    each.kind: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, PmemError)
}


class ControlServer:
    """Answers on a socket until it is closed."""

    def __init__(self, pool: "MemoryPool", path: str | os.PathLike[str]) -> None:
        self._pool = pool
        self.path = Path(path)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            _bind(self._listener, self.path)
            self._listener.listen(8)
        except OSError as cause:
            self._listener.close()
            raise Busy(f"cannot listen: {cause.strerror}", path=str(path)) from cause
        threading.Thread(target=self._accept, daemon=True, name="pmemkit control").start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listens no more; requests that are being answered are."""
        if self._listener.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
            while line := stream.readline(_LINE_MAX):
                _send(stream, self._carry_out(line, stream))

    def _carry_out(self, line: bytes, stream: Any) -> dict[str, Any]:
        def progress(moved: int, total: int) -> bool:
            try:
                _send(stream, {"progress": [moved, total]})
            except OSError:
                return False
            return True

        try:
            request = json.loads(line)
            return {"result": self._do(request, progress)}
        except PmemError as error:
            return {"error": {"kind": error.kind, "message": error.message}}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": {"kind": "protocol", "message": f"not a request: {error!r}"}}

    def _do(self, request: dict[str, Any], progress: Callable[[int, int], bool]) -> Any:
        pool, op = self._pool, request["op"]
        options: dict[str, Any] = {"timeout": request.get("timeout"), "progress": progress}
        match op:
            case "stat":
                return {**pool.stat(), "migrations": pool.migrations(), "pid": os.getpid()}
            case "map":
                return pool.map()
            case "add":
                from pmemkit.memory.regions import RegionSpec

                known = ("name", "rank", "weight", "names")
                more = {each: request[each] for each in known if request.get(each) is not None}
                return pool.add(RegionSpec(str(request["region"]), **more))
            case "remove":
                return _plain(pool.remove(str(request["region"]), **options))
            case "offline":
                span = int(request["first"]), int(request["count"])
                return _plain(pool.offline(str(request["region"]), *span, **options))
            case "online":
                span = int(request["first"]), int(request["count"])
                return pool.online(str(request["region"]), *span)
            case _:
                raise InvalidArgument(f"{op!r} is no operation of a pool", op="control")


def _plain(done: "Migration") -> dict[str, int]:
    return {
        "bytes": done.bytes,
        "extents": done.extents,
        "elapsed_ns": done.elapsed_ns,
        "hold_ns_peak": done.hold_ns_peak,
    }


def _send(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _bind(listener: socket.socket, path: Path) -> None:
    """Takes a path that nobody answers on; what a killed process left is in the way of nobody."""
    with (
        contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
        socket.socket(socket.AF_UNIX) as tried,
    ):
        tried.connect(str(path))
        raise Busy("another pool answers on this socket", op="control", path=str(path))
    with contextlib.suppress(FileNotFoundError):
        if path.is_socket():
            path.unlink()
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)


def ask(
    path: str | os.PathLike[str],
    request: dict[str, Any],
    progress: Callable[[int, int], object] | None = None,
) -> Any:
    """One request to a pool's socket; its answer, or the error it says."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.fspath(path))
        except OSError as cause:
            text = f"no pool answers: {cause.strerror}"
            raise Closed(text, op="control", path=os.fspath(path)) from cause
        with connection.makefile("rwb") as stream:
            _send(stream, request)
            for line in stream:
                answer = json.loads(line)
                if "progress" in answer:
                    if progress is not None:
                        progress(*answer["progress"])
                elif "error" in answer:
                    error = answer["error"]
                    raise _KINDS.get(error["kind"], ProtocolError)(error["message"], op="control")
                else:
                    return answer["result"]
    raise Closed("the pool is gone", op="control", path=os.fspath(path))
