"""The other end of :class:`pmemkit.memory.provider.ProcessProvider`: a process that keeps blocks.

    request: op (1 byte), handle, offset, length (8 bytes each, little endian); a write's bytes
    reply:   status (1 byte: 0 done, 1 no room, 2 wrong), value, count (8 bytes each); count bytes

What this does not do: serve anybody but the process that started it.
"""

import contextlib
import itertools
import socket
import struct
import sys
from collections.abc import Sequence

__all__ = ["OPS", "REPLY", "REQUEST", "main", "receive"]

OPS: tuple[str, ...] = ("allocate", "release", "write", "read", "used")
REQUEST = struct.Struct("<BQQQ")
REPLY = struct.Struct("<BQQ")


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes; ``EOFError``, an ``OSError`` here, where the other end is gone."""
    parts = bytearray(count)
    view = memoryview(parts)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the other end is gone")
        view = view[got:]
    return bytes(parts)


class _Blocks:
    """The blocks of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: dict[int, bytearray] = {}
        self._handles = itertools.count(1)

    def used(self) -> int:
        return sum(map(len, self.blocks.values()))

    def allocate(self, length: int) -> int:
        if length > self.size - self.used():
            text = f"{length} bytes: {self.size - self.used()} of {self.size} bytes are free"
            raise MemoryError(text)
        handle = next(self._handles)
        self.blocks[handle] = bytearray(length)
        return handle

    def part(self, handle: int, offset: int, length: int) -> memoryview:
        block = self.blocks[handle]
        if offset + length > len(block):
            raise KeyError(handle)
        return memoryview(block)[offset : offset + length]


def _serve(connection: socket.socket, blocks: _Blocks) -> None:
    while True:
        code, handle, offset, length = REQUEST.unpack(receive(connection, REQUEST.size))
        op = OPS[code]
        data = receive(connection, length) if op == "write" else b""
        status, value, payload = 0, 0, b""
        try:
            match op:
                case "allocate":
                    value = blocks.allocate(length)
                case "release":
                    del blocks.blocks[handle]
                case "write":
                    blocks.part(handle, offset, length)[:] = data
                case "read":
                    payload = bytes(blocks.part(handle, offset, length))
                case "used":
                    value = blocks.used()
        except MemoryError as cause:
            status, payload = 1, str(cause).encode()
        except KeyError:
            status, payload = 2, f"there is no block {handle} of this length".encode()
        connection.sendall(REPLY.pack(status, value, len(payload)) + payload)


def main(arguments: Sequence[str]) -> None:
    """Serves the descriptor that is named until the other end is gone."""
    with (
        socket.socket(fileno=int(arguments[0])) as connection,
        contextlib.suppress(ConnectionError, KeyboardInterrupt),
    ):
        _serve(connection, _Blocks(int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
