"""A range of a region in this process's address space, with what makes stores to it durable.

The vocabulary is libpmem2's: granularity, persist, flush, drain, deep flush. Loads and stores go
straight to the media, through a ``memoryview`` or a NumPy array over it, or through the methods,
which turn a fault into an exception and cost a copy.

Invariants:
1. A mapping is one of its own: resizing the region or closing it leaves it alone. It keeps the lock
   on the file.
2. A live view pins it: :meth:`Mapping.close` is :class:`Busy` and says how many there are.
3. What has an engine of its own is not mapped: mode sector, and a region with a cache.

What this does not do: keep an image and its list of bad blocks apart (a view of it is refused),
translate faults in views (a file cut short under a view ends the process, as everywhere).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pmemkit._native import dax as native
from pmemkit.dax.transactions import Log, Transaction
from pmemkit.errors import Busy, InvalidArgument, NotSupported, PmemError
from pmemkit.media.granularity import GRANULARITIES, Backing, Decision, parse_granularity
from pmemkit.media.provider import OpenedMedium, failure_of, open_medium

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pmemkit._native.media import Medium

__all__ = ["Mapping", "map_medium"]


class Mapping(native.Mapping):
    """Mapped bytes of a region. Made by ``region.map`` and ``pmemkit.map``."""

    _path: str
    _decision: Decision
    _domain: str
    _backing: Backing
    _deep_flush_control: Path | None
    _log: Log | None

    @classmethod
    def _make(
        cls,
        medium: Medium,
        opened: OpenedMedium,
        path: str,
        *,
        offset: int,
        length: int,
        read_only: bool,
        tracker: str,
    ) -> Mapping:
        private = opened.backing == "anonymous"
        made = cls(
            medium,
            offset=offset,
            length=length,
            read_only=read_only,
            tracker=tracker,
            private=private,
        )
        made._path, made._decision, made._log = path, opened.decision, None
        made._domain, made._backing = opened.persistence_domain, opened.backing
        made._deep_flush_control = opened.deep_flush_control()
        return made

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Busy:
            # The frames of an exception hold views: it is the one to be told of.
            if kind is None:
                raise

    def __repr__(self) -> str:
        return f"<Mapping of {len(self)} bytes of {self._path}: {self.granularity}>"

    @property
    def path(self) -> str:
        """What it is a mapping of."""
        return self._path

    @property
    def map_sync(self) -> bool:
        """True when the kernel granted ``MAP_SYNC``: the file system keeps nothing back."""
        return self._decision.map_sync

    @property
    def persistence_domain(self) -> str:
        """What keeps the content when power fails; see :attr:`Region.persistence_domain`."""
        return self._domain

    @property
    def why(self) -> tuple[str, ...]:
        """The sentences that led to the granularity."""
        return self._decision.why

    def view(
        self, offset: int = 0, length: int | None = None, *, read_only: bool = False
    ) -> memoryview:
        """A range of the bytes themselves. It pins the mapping until it is released."""
        length = len(self) - offset if length is None else length
        return memoryview(native.View(self, offset, length, read_only=read_only))

    def array(
        self,
        dtype: npt.DTypeLike = "u1",
        shape: int | Sequence[int] | None = None,
        offset: int = 0,
        *,
        read_only: bool = False,
    ) -> np.ndarray[Any, Any]:
        """A NumPy array over the bytes themselves, structured dtypes too; by default as many
        elements as fit behind ``offset``. It pins the mapping as long as it lives."""
        import numpy as np

        kind = np.dtype(dtype)
        if kind.hasobject or kind.itemsize == 0:
            raise InvalidArgument(f"dtype {kind} cannot stand on media", op="array")
        if shape is None:
            shape = max(len(self) - offset, 0) // kind.itemsize
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(each < 0 for each in shape):
            raise InvalidArgument(f"{shape} is not a shape", op="array")
        size = kind.itemsize
        for each in shape:
            size *= each
        if size == 0:
            return np.empty(shape, kind)
        # Not np.ndarray(buffer=…), which lets the buffer go at once and keeps the address.
        view = self.view(offset, size, read_only=read_only)
        found: np.ndarray[Any, Any] = np.frombuffer(view, kind).reshape(shape + kind.shape)
        return found

    def deep_flush(self, offset: int = 0, length: int | None = None) -> None:
        """Makes a range durable as deep as the platform can: past the caches of the memory
        controller, where the kernel lets us ask for that. Of memory: :class:`NotSupported`."""
        length = len(self) - offset if length is None else length
        if self._backing in ("anonymous", "memfd", "hugetlb"):
            text = f"{self._backing} memory outlives nothing"
            raise NotSupported(text, op="deep_flush", path=self._path)
        self.persist(offset, length)
        if self.granularity == "page":
            return
        if self._backing == "file":
            # The file system flushes the device when asked to sync.
            self.kernel_sync(offset, length)
        elif self._deep_flush_control is not None:
            _ask_deep_flush(self._deep_flush_control)

    def log(self, offset: int, length: int, *, create: bool = False) -> Log:
        """The redo log in an area of the mapping that the caller sets aside, whole lines of 64
        bytes. Where a crash left a transaction, it is carried out now. A blank area is laid out;
        one that holds something else is :class:`Corrupt`, unless ``create``."""
        self._log = Log(self, offset, length, create=create)
        return self._log

    def transaction(self) -> Transaction:
        """A transaction through the log that :meth:`log` opened last."""
        if self._log is None:
            text = "there is no log yet: say mapping.log(offset, length) first"
            raise InvalidArgument(text, op="transaction", path=self._path)
        return self._log.transaction()

    def snapshot(self, path: str | os.PathLike[str] | None = None) -> Mapping | None:
        """A copy of the mapping as it is at one moment of this call, while others write.

        Without a path it is a mapping of private memory. With one it is a new file of that name,
        which appears when the copy is complete and durable.

        Where :attr:`snapshot_sees_stores` is false it sees what these methods store and nothing
        else; then it is :class:`Busy` while there is a writable view.
        """
        if path is None:
            opened = open_medium(f"anonymous:{len(self)}")
            self.snapshot_into(opened.medium)
            return Mapping._make(
                opened.medium,
                opened,
                f"snapshot of {self._path}",
                offset=0,
                length=len(self),
                read_only=False,
                tracker="automatic",
            )
        self._snapshot_file(Path(path))
        return None

    def _snapshot_file(self, path: Path) -> None:
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with fresh.open("xb") as file:
                file.truncate(len(self))
            opened = open_medium(fresh)
            # What is written to the copy is counted from its first user on.
            opened.wear = None
            try:
                self.snapshot_into(opened.medium)
                opened.sync_file()
            finally:
                opened.close()
            fresh.rename(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as cause:
            fresh.unlink(missing_ok=True)
            raise failure_of(cause, "snapshot", str(path)) from cause

    def close(self) -> None:
        """Unmaps. :class:`Busy` while there are views, or a snapshot is being made. May be called
        again."""
        try:
            super().close()
        except PmemError as error:
            error.path = error.path or self._path
            raise
        self._log = None


def _ask_deep_flush(control: Path) -> None:
    try:
        if control.read_text(encoding="ascii").strip() != "0":
            control.write_text("1", encoding="ascii")
    except OSError as cause:
        raise failure_of(cause, "deep_flush", str(control)) from cause


def map_medium(
    opened: OpenedMedium,
    path: str,
    *,
    offset: int = 0,
    length: int | None = None,
    read_only: bool = False,
    granularity: str | None = None,
    huge: bool | None = None,
    tracker: str = "automatic",
) -> Mapping:
    """Maps a range of an opened medium; the arguments are those of :meth:`Region.map`."""
    size = opened.current_size()
    length = size - offset if length is None else length
    unit = opened.medium.map_unit
    if offset < 0 or length <= 0 or offset + length > size:
        text = f"{length} bytes at {offset} are not in the {size} bytes there are"
        raise InvalidArgument(text, op="map", path=path)
    strict = opened.backing in ("device dax", "hugetlb")
    if offset % unit or (strict and length % unit):
        what = "offset and length" if strict else "the offset"
        text = f"{what} of a {opened.backing} must be multiples of {unit}: not {length} at {offset}"
        raise InvalidArgument(text, op="map", path=path)
    _require(opened.decision, granularity, path)
    read_only = read_only or opened.read_only
    if opened.backing == "file" and opened.decision.map_sync and tracker == "automatic":
        # The file system of a DAX mount notes every page that is stored to.
        tracker = "kernel"
    elif opened.backing == "device dax" and tracker == "automatic":
        tracker = "explicit"
    try:
        # Memory without a file is mapped once; everything else anew.
        shared = opened.file is None
        medium = opened.medium if shared else opened.map_part(offset, length, read_only)
        mapping = Mapping._make(
            medium,
            opened,
            path,
            offset=offset if shared else 0,
            length=length,
            read_only=read_only,
            tracker=tracker,
        )
        if huge is not None:
            mapping.advise_huge(huge)
    except OSError as cause:
        raise failure_of(cause, "map", path) from cause
    return mapping


def _require(decision: Decision, required: str | None, path: str) -> None:
    """As libpmem2: what is coarser than required is refused."""
    if required is None:
        return
    found = GRANULARITIES.index(decision.granularity)
    if found > GRANULARITIES.index(parse_granularity(required)):
        text = f"granularity {required} is required and {decision.granularity} is what there is"
        raise NotSupported(f"{text}. {' '.join(decision.why)}", op="map", path=path)
