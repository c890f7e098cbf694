"""Providers: bytes a pool lends whether or not this CPU has an address for them.

A provider allocates blocks and copies into, out of and between them. A region of a pool is one
whose blocks have addresses here (``cpu_addressable``); :class:`ProcessProvider` keeps its bytes in
another process, as a GPU keeps them in its own memory, and everything but copying is refused.

What this does not do: move blocks, map what has no address.
"""

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final, Protocol, Self, runtime_checkable

from pmemkit.errors import Closed, InvalidArgument, NoSpace, NotSupported, OutOfRange
from pmemkit.memory.remote import OPS, REPLY, REQUEST, receive

if TYPE_CHECKING:
    from typing_extensions import Buffer as Readable

    from pmemkit._native.memory import Buffer, Pool

__all__ = ["Block", "ProcessProvider", "Provider", "RegionProvider"]

_STAGE: Final = 1 << 20
"""Bytes on the way from one provider to another at a time."""
_KINDS: Final = {1: NoSpace, 2: InvalidArgument}


@runtime_checkable
class Provider(Protocol):
    """Who has bytes. Handles are the provider's; ranges are checked before it is asked."""

    name: str
    cpu_addressable: bool
    """The blocks have addresses in this process."""

    def allocate(self, nbytes: int) -> int:
        """A handle of so many bytes with any content; :class:`NoSpace` where there is no room."""

    def release(self, handle: int) -> None:
        """Takes them back."""

    def write(self, handle: int, offset: int, data: "Readable") -> None:
        """Copies into a block."""

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """Copies out of a block."""

    def view(self, handle: int) -> memoryview:
        """The bytes themselves; :class:`NotSupported` where they have no address here."""

    def used(self) -> int:
        """Bytes in blocks."""

    def close(self) -> None:
        """Ends it; blocks are gone."""


class Block:
    """Bytes of a provider; released when nobody has it any more, or by :meth:`release`."""

    def __init__(self, provider: Provider, nbytes: int) -> None:
        if nbytes <= 0:
            raise InvalidArgument(f"a block has at least one byte, not {nbytes}", op="allocate")
        self.provider = provider
        self.nbytes = nbytes
        self._handle: int | None = provider.allocate(nbytes)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the bytes back; once is enough."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            self.provider.release(handle)

    def copy_in(self, data: "Readable", offset: int = 0) -> None:
        """Copies bytes into the block."""
        view = memoryview(data).cast("B")
        self.provider.write(self._checked("copy_in", offset, len(view)), offset, view)

    def copy_out(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copies bytes out of the block, by default all from there on."""
        count = self.nbytes - offset if length is None else length
        return self.provider.read(self._checked("copy_out", offset, count), offset, count)

    def copy_to(
        self, peer: "Block", *, offset: int = 0, peer_offset: int = 0, length: int | None = None
    ) -> None:
        """Copies to a block of any provider."""
        count = self.nbytes - offset if length is None else length
        self._checked("copy_to", offset, count)
        peer._checked("copy_to", peer_offset, count)
        for done in range(0, count, _STAGE):
            part = min(_STAGE, count - done)
            peer.copy_in(self.copy_out(offset + done, part), peer_offset + done)

    def view(self) -> memoryview:
        """The bytes themselves, writable; :class:`NotSupported` where they have no address."""
        return self.provider.view(self._checked("view", 0, self.nbytes))

    def _checked(self, op: str, offset: int, length: int) -> int:
        if self._handle is None:
            raise Closed("the block was released", op=op)
        if offset < 0 or length < 0 or offset + length > self.nbytes:
            text = f"{length} bytes at {offset} are outside a block of {self.nbytes}"
            raise OutOfRange(text, op=op)
        return self._handle


class RegionProvider:
    """A region of a pool, seen as a provider."""

    cpu_addressable = True

    def __init__(self, core: "Pool", region: int, name: str) -> None:
        self._core = core
        self._region = region
        self.name = name
        self._buffers: dict[int, Buffer] = {}

    def allocate(self, nbytes: int) -> int:
        """As :class:`Provider` says; the handle is the address."""
        buffer = self._core.allocate(nbytes, region=self._region)
        self._buffers[buffer.address] = buffer
        return buffer.address

    def release(self, handle: int) -> None:
        """As :class:`Provider` says; views live on."""
        self._buffers.pop(handle, None)

    def write(self, handle: int, offset: int, data: "Readable") -> None:
        """As :class:`Provider` says."""
        view = memoryview(data).cast("B")
        memoryview(self._buffers[handle])[offset : offset + len(view)] = view

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """As :class:`Provider` says."""
        return bytes(memoryview(self._buffers[handle])[offset : offset + length])

    def view(self, handle: int) -> memoryview:
        """As :class:`Provider` says."""
        return memoryview(self._buffers[handle])

    def used(self) -> int:
        """As :class:`Provider` says."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def close(self) -> None:
        """As :class:`Provider` says."""
        self._buffers.clear()


class ProcessProvider:
    """Bytes in a child process, reached through a socket."""

    cpu_addressable = False

    def __init__(self, size: int, name: str = "process") -> None:
        self.name = name
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                "-m",
                "pmemkit.memory.remote",
                str(theirs.fileno()),
                str(size),
            ]
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._socket: socket.socket | None = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allocate(self, nbytes: int) -> int:
        """As :class:`Provider` says."""
        return self._ask("allocate", 0, 0, nbytes)[0]

    def release(self, handle: int) -> None:
        """As :class:`Provider` says; nothing is left to release once it is closed."""
        if self._socket is not None:
            self._ask("release", handle, 0, 0)

    def write(self, handle: int, offset: int, data: "Readable") -> None:
        """As :class:`Provider` says."""
        view = memoryview(data).cast("B")
        self._ask("write", handle, offset, len(view), view)

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """As :class:`Provider` says."""
        return self._ask("read", handle, offset, length)[1]

    def view(self, handle: int) -> memoryview:
        """Refused."""
        text = f"region {self.name} has no address in this process: use copy_in and copy_out"
        raise NotSupported(text, op="view", path=self.name)

    def used(self) -> int:
        """As :class:`Provider` says."""
        return self._ask("used", 0, 0, 0)[0]

    def close(self) -> None:
        """As :class:`Provider` says."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
                self._child.wait()

    def _ask(
        self, op: str, handle: int, offset: int, length: int, data: memoryview | None = None
    ) -> tuple[int, bytes]:
        with self._lock:
            if self._socket is None:
                raise Closed(f"provider {self.name} is closed", op=op)
            try:
                self._socket.sendall(REQUEST.pack(OPS.index(op), handle, offset, length))
                if data is not None:
                    self._socket.sendall(data)
                status, value, count = REPLY.unpack(receive(self._socket, REPLY.size))
                payload = receive(self._socket, count)
            except (OSError, struct.error) as cause:
                text = f"the process of provider {self.name} ended: its bytes are gone"
                raise Closed(text, op=op, path=self.name) from cause
        if status:
            raise _KINDS[status](payload.decode(), op=op, path=self.name)
        return value, payload
