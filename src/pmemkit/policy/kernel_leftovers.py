"""What lies where a namespace is made: signatures of something older, which are not its contents.

ndctl leaves the bytes of free space as they are. If a file system that was destroyed began at the
same place, it would be found in the new namespace, taken for what the policy wants, and mounted. So
a namespace is wiped of signatures when it is made, as ``wipefs`` does.

Invariants:
1. Nothing is wiped before it is kept.
2. It is put back only where there are still the zeros that it was wiped with.

What this does not do: erase data. What has no signature stays, unseen by those who look for one.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pmemkit.bus.model import Namespace
from pmemkit.media import open_medium
from pmemkit.policy.kernel_live import Live
from pmemkit.policy.model import Keep
from pmemkit.storage.signatures import identify

__all__ = ["put_back", "wipe", "wipe_again"]

_PIECE: Final = 1 << 20
"""Bytes at the start, and at the end, that have the magic bytes of all formats."""
_KEY: Final = "wiped"


class _Block:
    """The bytes of a block device."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.lseek(self.descriptor, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self.descriptor, data, offset)
        os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


class _Dax:
    """The bytes of device DAX."""

    def __init__(self, path: Path) -> None:
        self.opened = open_medium(path)
        self.size = len(self.opened.medium)

    def read(self, offset: int, length: int) -> bytes:
        return self.opened.medium.read(offset, max(0, min(length, self.size - offset)))

    def write(self, offset: int, data: bytes) -> None:
        self.opened.medium.write(offset, data)
        self.opened.medium.persist(offset, len(data))

    def close(self) -> None:
        self.opened.close()


@contextmanager
def _bytes_of(live: Live, here: Namespace) -> Iterator[_Block | _Dax | None]:
    """The bytes that a user of a namespace sees; ``None`` where there is no device."""
    found: _Block | _Dax | None = None
    if here.blockdev is not None:
        found = _Block(live.dev / here.blockdev)
    elif here.chardev is not None and live.wait_for((live.dev / here.chardev).exists):
        found = _Dax(live.dev / here.chardev)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def wipe(live: Live, dev: str, keep: Keep) -> None:
    """Wipes a new namespace of signatures."""
    with _bytes_of(live, live.namespace(dev)) as device:
        if device is None:
            return
        pieces: dict[str, bytes] = {}
        for offset in (0, max(0, device.size - _PIECE)):
            if identify(device.read, device.size) is None:
                return
            pieces[str(offset)] = device.read(offset, min(_PIECE, device.size))
            keep({_KEY: dict(pieces)})
            device.write(offset, bytes(len(pieces[str(offset)])))


def put_back(live: Live, here: Namespace, kept: Mapping[str, Any]) -> bool:
    """Writes what was wiped, before the namespace goes. False: nothing was written."""
    pieces: Mapping[str, bytes] = kept.get(_KEY) or {}
    if not pieces or here.state is not None:
        return False
    with _bytes_of(live, here) as device:
        if device is None or any(
            any(device.read(int(offset), len(data))) for offset, data in pieces.items()
        ):
            return False
        for offset, data in pieces.items():
            device.write(int(offset), data)
    return True


def wipe_again(live: Live, here: Namespace, kept: Mapping[str, Any]) -> None:
    """After :func:`put_back`, where the namespace stays all the same."""
    pieces: Mapping[str, bytes] = kept.get(_KEY) or {}
    with _bytes_of(live, here) as device:
        for offset, data in pieces.items() if device is not None else ():
            assert device is not None
            device.write(int(offset), bytes(len(data)))
