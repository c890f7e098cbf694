"""Arrays that survive: a region's directory of names, and the arrays behind them.

:class:`DirectoryStore` changes the directory on a medium, crash-safe; :class:`NamedArrays` is that
of a pool's member; :func:`open_arrays` is what another process opens.

The protocol between processes:

- One process has the region in a pool. It alone creates and deletes; the lock of the image keeps
  every other pool out.
- Any process may open arrays with :func:`open_arrays`, to read or to write. It holds a shared lock
  on the bytes of each array it has open. Deleting takes an exclusive one and is :class:`Busy` while
  anybody has the array open: the bytes under an open array never become another's.
- The directory itself is read without a lock; a reader finds it before a change or after it.
- Bytes of an array are shared memory. Who writes while others read arranges that with them.

What this does not do: order or lock stores to an array, grow one.
"""

import contextlib
import json
import mmap
import os
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace, NotSupported
from pmemkit.formats.pool import (
    DIMENSIONS_MAX,
    FRAME_SIZE,
    NAME_MAX,
    SIGNATURE,
    SLOT_SIZE,
    Directory,
    PoolEntry,
    PoolHeader,
    entries_max,
    pack_directory,
    read_directory,
)
from pmemkit.media.lock import lock
from pmemkit.memory.regions import Opened, RegionSpec, open_region_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

    from pmemkit._native.media import Medium
    from pmemkit._native.memory import Buffer, Pool

__all__ = ["DirectoryStore", "NamedArrays", "SharedArrays", "make_entry", "open_arrays"]

_ARRAY_LOCKS = 1 << 61
"""Where the locks of arrays stand, behind those of images."""
_SIGNED = SIGNATURE.ljust(16, b"\0")
_MAP_UNIT = 2 << 20
"""Mappings of a device DAX start at multiples of this."""

_Order = Literal["C", "F"]


def _blank(medium: "Medium", size: int, slot_size: int) -> bool:
    """True where no directory was ever complete: nothing there, or one that was never finished.

    The first array goes to slot 1, so an empty slot 1 says that there was none."""
    page = medium.read(0, min(FRAME_SIZE, size))
    # A failure leaves words of 8 bytes: each of the signature's is there or not.
    begun = all(page[at : at + 8] in (bytes(8), _SIGNED[at : at + 8]) for at in (0, 8))
    second = medium.read(slot_size, FRAME_SIZE) if size >= slot_size + FRAME_SIZE else b""
    return begun and not any(page[PoolHeader.SIZE :]) and not any(second)


class DirectoryStore:
    """A directory on a medium, and changes of it that a power failure leaves done or not done."""

    def __init__(self, medium: "Medium", directory: Directory) -> None:
        self._medium = medium
        self.directory = directory

    @classmethod
    def open(
        cls,
        medium: "Medium",
        size: int,
        *,
        path: str,
        may_format: bool = True,
        slot_size: int = SLOT_SIZE,
    ) -> Self:
        """Finds the directory; makes an empty one where there was never any."""
        directory, faults = read_directory(medium.read, size)
        if directory is not None:
            return cls(medium, directory)
        if not _blank(medium, size, slot_size):
            text = f"there is no directory of named arrays and other data: {faults[0]}"
            raise Corrupt(text, op="open", path=path)
        if not may_format:
            raise InvalidArgument("there are no named arrays yet", op="open", path=path)
        frames = (size - 2 * slot_size) // FRAME_SIZE
        if frames < 1:
            text = f"{size} bytes are too few for a directory of {2 * slot_size} and a frame"
            raise InvalidArgument(text, op="open", path=path)
        empty = Directory(uuid.uuid4(), 0, 1, slot_size, frames, ())
        store = cls(medium, empty)
        store._commit(())
        return store

    def refresh(self, size: int, *, path: str) -> None:
        """Looks again: another process may have changed it."""
        for _ in range(100):
            directory, faults = read_directory(self._medium.read, size)
            if directory is not None:
                self.directory = directory
                return
        raise Corrupt(f"there is no directory any more: {faults[0]}", op="open", path=path)

    def _commit(self, entries: tuple[PoolEntry, ...]) -> None:
        now = self.directory
        changed = replace(now, sequence=now.sequence + 1, slot=1 - now.slot, entries=entries)
        raw = pack_directory(changed)
        base = changed.slot * changed.slot_size
        self._medium.write(base, raw)
        self._medium.persist(base, len(raw))
        self.directory = changed

    def require_room(self, path: str) -> None:
        """Refuses one entry more than a slot holds."""
        most = entries_max(self.directory.slot_size)
        if len(self.directory.entries) >= most:
            raise NoSpace(f"the directory is full: it holds {most} arrays", op="create", path=path)

    def insert(self, entry: PoolEntry) -> None:
        """Makes the array's bytes durable zeroes, then its entry durable."""
        start, length = self.place_of(entry)
        self._medium.zero(start, length)
        self._medium.persist(start, length)
        self._commit((*self.directory.entries, entry))

    def delete(self, entry: PoolEntry) -> None:
        """Takes an entry out, durably."""
        self._commit(tuple(each for each in self.directory.entries if each.name != entry.name))

    def place_of(self, entry: PoolEntry) -> tuple[int, int]:
        """Offset and length of an array's frames on the medium. Bytes."""
        return self.directory.data_offset + entry.first * FRAME_SIZE, entry.frames * FRAME_SIZE

    def persist(self, entry: PoolEntry) -> None:
        """Makes what an array holds durable."""
        start, _ = self.place_of(entry)
        self._medium.persist(start, entry.nbytes)

    def find(self, name: str) -> PoolEntry:
        """The entry of a name; ``KeyError`` where there is none."""
        for entry in self.directory.entries:
            if entry.text == name:
                return entry
        raise KeyError(name)


def make_entry(
    name: str, shape: tuple[int, ...], dtype: "np.dtype[Any]", order: _Order, first: int
) -> PoolEntry:
    """The entry of a new array."""
    encoded = name.encode()
    if not encoded or len(encoded) > NAME_MAX or "\0" in name:
        text = f"{name!r} is no name: it has 1 to {NAME_MAX} bytes of UTF-8 and no zero"
        raise InvalidArgument(text, op="create")
    described = json.dumps(_plain(dtype.descr if dtype.names else dtype.str)).encode("ascii")
    if dtype.hasobject or len(described) > PoolEntry.field("dtype").width:
        text = f"dtype {dtype} cannot be kept: no Python objects, and a description of 128 bytes"
        raise InvalidArgument(text, op="create")
    if len(shape) > DIMENSIONS_MAX or any(length < 0 for length in shape):
        text = f"{shape} is no shape of at most {DIMENSIONS_MAX} dimensions"
        raise InvalidArgument(text, op="create")
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    return PoolEntry(
        name=encoded,
        uuid=uuid.uuid4(),
        first=first,
        frames=max(1, -(-nbytes // FRAME_SIZE)),
        nbytes=nbytes,
        ndim=len(shape),
        order=order.encode(),
        shape=struct.pack("<8Q", *shape, *([0] * (DIMENSIONS_MAX - len(shape)))),
        dtype=described,
    )


def _plain(described: Any) -> Any:
    """A dtype's description as JSON has it."""
    if isinstance(described, tuple | list):
        return [_plain(each) for each in described]
    return described


def _tuples(described: Any) -> Any:
    """The reverse: fields are tuples in NumPy's eyes."""
    if isinstance(described, str):
        return described
    return [(each[0], _tuples(each[1]), *(tuple(part) for part in each[2:])) for each in described]


def _view(entry: PoolEntry, memory: Any, offset: int = 0) -> "np.ndarray[Any, Any]":
    """The array of an entry over its bytes."""
    import numpy as np

    try:
        dtype = np.dtype(_tuples(json.loads(entry.dtype.rstrip(b"\0"))))
        count = entry.nbytes // dtype.itemsize if dtype.itemsize else 0
        if not count:
            return np.empty(entry.lengths, dtype)
        flat = np.frombuffer(memory, dtype, count, offset)
        order: _Order = "F" if entry.order == b"F" else "C"
        return flat.reshape(entry.lengths, order=order)
    except (TypeError, ValueError, IndexError) as cause:
        raise Corrupt(f"array {entry.text!r} does not read: {cause}", op="open") from cause


class NamedArrays(Mapping[str, Any]):
    """The named arrays of a member of a pool."""

    def __init__(self, member: Opened, store: DirectoryStore) -> None:
        self._member = member
        self._store = store
        self._core: Pool | None = None
        self._buffers: dict[str, Buffer] = {}
        self._lock = threading.RLock()
        self._leaving = False

    @classmethod
    def open(cls, member: Opened, *, block_size: int) -> Self:
        """Reads the directory of a member that is about to join."""
        found = DirectoryStore.open(member.medium, member.size, path=member.name)
        if found.directory.data_offset + block_size > member.size:
            text = (
                f"region {member.name} has {member.size} bytes, which is less than its directory "
                f"and a block of {block_size}"
            )
            raise InvalidArgument(text, op="add", path=member.name)
        return cls(member, found)

    @property
    def data_offset(self) -> int:
        """Where frames start in the region. Bytes."""
        return self._store.directory.data_offset

    def claimed(self) -> list[tuple[int, int]]:
        """Runs of frames that arrays have."""
        return [(entry.first, entry.frames) for entry in self._store.directory.entries]

    def join(self, core: "Pool", region: int) -> None:
        """The member is in the pool: its arrays get their memory."""
        self._core = core
        window = next(each["window"] for each in core.regions() if each["id"] == region)
        for entry in self._store.directory.entries:
            address = window + entry.first * FRAME_SIZE
            self._buffers[entry.text] = core.adopt(address, entry.frames * FRAME_SIZE)

    def addresses(self) -> list[int]:
        """Where the arrays are."""
        return [buffer.address for buffer in self._buffers.values()]

    def leave(self) -> None:
        """The member is about to be removed: nothing is opened any more. Refused while arrays are
        in use: their bytes would be elsewhere than their names."""
        with self._lock:
            used = [name for name, buffer in self._buffers.items() if buffer.exports]
            if used:
                text = f"named arrays of region {self._member.name} are in use: {', '.join(used)}"
                raise Busy(text, op="remove", path=self._member.name)
            self._leaving = True

    def stay(self) -> None:
        """It was not removed after all."""
        self._leaving = False

    def close(self) -> None:
        """Forgets the memory without giving its frames to anybody."""
        with self._lock:
            self._leaving = True
            for buffer in self._buffers.values():
                buffer.detach()
            self._buffers.clear()

    def create(
        self, name: str, shape: int | tuple[int, ...], dtype: "DTypeLike", order: _Order
    ) -> "np.ndarray[Any, Any]":
        """A new array of zeroes, durable as such."""
        import numpy as np

        with self._lock:
            self._require_here()
            lengths = (shape,) if isinstance(shape, int) else tuple(shape)
            entry = make_entry(name, lengths, np.dtype(dtype), order, 0)
            self._store.require_room(self._member.name)
            assert self._core is not None
            buffer = self._core.allocate(
                entry.frames * FRAME_SIZE, region=self._member.id, fixed=True, whole=True
            )
            place = buffer.place
            assert place is not None
            start = place[1] - self._member.start - self.data_offset
            self._store.insert(replace(entry, first=start // FRAME_SIZE))
            self._buffers[name] = buffer
            return _view(entry, buffer)

    def __getitem__(self, name: str) -> "np.ndarray[Any, Any]":
        with self._lock:
            self._require_here()
            return _view(self._store.find(name), self._buffers[name])

    def __delitem__(self, name: str) -> None:
        with self._lock:
            self._require_here()
            entry = self._store.find(name)
            if self._buffers[name].exports:
                raise Busy(f"array {name!r} is in use in this process", op="delete")
            with self._sole(entry):
                self._store.delete(entry)
                del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter([entry.text for entry in self._store.directory.entries])

    def __len__(self) -> int:
        return len(self._store.directory.entries)

    def persist(self, name: str) -> None:
        """Makes what an array holds durable."""
        self._store.persist(self._store.find(name))

    def _require_here(self) -> None:
        if self._leaving:
            text = f"region {self._member.name} is leaving the pool"
            raise Busy(text, op="open", path=self._member.name)

    @contextlib.contextmanager
    def _sole(self, entry: PoolEntry) -> Iterator[None]:
        """Holds the exclusive lock of an array: nobody has it open."""
        fd = os.open(f"/proc/self/fd/{self._member.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            start, length = self._store.place_of(entry)
            _lock_array(fd, entry, self._member, start, length, exclusive=True)
            yield
        finally:
            os.close(fd)


def _lock_array(
    fd: int, entry: PoolEntry, member: Opened, start: int, length: int, *, exclusive: bool
) -> None:
    at = _ARRAY_LOCKS + member.start + start
    try:
        lock(fd, member.name, exclusive=exclusive, offset=at, length=length)
    except Busy as cause:
        holder = str(cause.message).partition(" has it open")[0]
        text = f"{holder} has array {entry.text!r} open"
        raise Busy(text, op="open", path=member.name) from cause


class SharedArrays(Mapping[str, Any]):
    """The named arrays of a region that another process may have in a pool."""

    def __init__(self, member: Opened, store: DirectoryStore, *, writable: bool) -> None:
        self._member = member
        self._store = store
        self._writable = writable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the region; arrays that are open live on, with their locks."""
        self._member.close()

    def __getitem__(self, name: str) -> "np.ndarray[Any, Any]":
        """The array, read-only unless opened to write; locked as long as the object lives."""
        self._refresh()
        entry = self._store.find(name)
        flags = os.O_RDWR if self._writable else os.O_RDONLY
        fd = os.open(f"/proc/self/fd/{self._member.fd}", flags | os.O_CLOEXEC)
        try:
            start, length = self._store.place_of(entry)
            _lock_array(fd, entry, self._member, start, length, exclusive=False)
            self._refresh()
            if self._store.find(name).uuid != entry.uuid:
                raise Busy(f"array {name!r} was replaced meanwhile", op="open")
            begin = self._member.start + start
            base = begin // _MAP_UNIT * _MAP_UNIT
            access = mmap.ACCESS_WRITE if self._writable else mmap.ACCESS_READ
            # The mapping keeps a descriptor of the open file, and with it the lock.
            mapped = mmap.mmap(fd, begin + length - base, access=access, offset=base)
        finally:
            os.close(fd)
        return _view(entry, mapped, begin - base)

    def persist(self, name: str) -> None:
        """Makes what an array holds durable."""
        if not self._writable:
            raise NotSupported("the arrays are open to read", op="persist")
        self._store.persist(self._store.find(name))

    def __iter__(self) -> Iterator[str]:
        self._refresh()
        return iter([entry.text for entry in self._store.directory.entries])

    def __len__(self) -> int:
        self._refresh()
        return len(self._store.directory.entries)

    def _refresh(self) -> None:
        self._store.refresh(self._member.size, path=self._member.name)


def open_arrays(path: str | os.PathLike[str], *, writable: bool = False) -> SharedArrays:
    """Opens the named arrays of a region, whether or not a pool of any process has it."""
    member = open_region_of(RegionSpec(path), read_only=not writable, locking=False)
    try:
        medium = member.medium
        store = DirectoryStore.open(medium, member.size, path=member.name, may_format=False)
    except BaseException:
        member.close()
        raise
    return SharedArrays(member, store, writable=writable)
