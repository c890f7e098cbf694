"""An opened region: a medium, what is known of it, and the devices made of it.

Invariants:
1. All devices of a region share one latch: after a failed write through one of them, none writes
   until the region is reopened.
2. A device keeps the size the region had when it was made; :meth:`Region.resize` and
   :meth:`Region.refresh` concern devices made later.
3. Closing the region closes its devices and mappings, all of them, whatever one of them says. A
   mapping with views says that it is busy, and stays until they are gone.
4. Opened as ``IMAGE:namespaceR.N`` it is the bytes that a user of that namespace sees. An image
   that holds several namespaces, or an info block, is not taken for one raw namespace.
5. There is one cache or none, below every device: two would not see each other's writes.
6. Closing waits for scatter-gather copies that touch the region to notice and end.

What this does not do: change labels and info blocks (:mod:`pmemkit.namespace`).
"""

import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from pmemkit.bus.locate import Place, locate, require_whole, split_namespace
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    Latched,
    NotSupported,
    PmemError,
    ReadOnly,
)
from pmemkit.files import sync_directory
from pmemkit.media.granularity import Granularity
from pmemkit.media.provider import (
    Locking,
    OpenedMedium,
    failure_of,
    is_remote,
    names_no_file,
    open_medium,
)
from pmemkit.media.wear import Counting
from pmemkit.storage.caching import CacheMode, add_cache
from pmemkit.storage.device import BlockDevice
from pmemkit.storage.layers import Layer, parse_layer
from pmemkit.storage.levelling import LEVELLING_PERIOD, Levelling, check_levelling
from pmemkit.storage.sector import ORDERINGS, Ordering, Sectors, open_sectors
from pmemkit.units import parse_size

if TYPE_CHECKING:
    from pmemkit._native.block import Cache, Device
    from pmemkit._native.media import Medium
    from pmemkit.dax import Mapping

__all__ = ["Region", "create_file", "open_region"]


def open_region(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    create_size: int | str | None = None,
    granularity: str | None = None,
    required_granularity: str | None = None,
    locking: Locking = "on",
    ordering: Ordering = "default",
    levelling: Levelling = "off",
    levelling_period: int = LEVELLING_PERIOD,
    backup_info_block: bool = False,
    wear: Counting = "sampled",
) -> "Region":
    """Opens a file, a block device, a device DAX, or memory (``anonymous:1G``, ``memfd:1G``,
    ``hugetlb:1G``) as a region; ``IMAGE:namespace0.0`` opens one namespace of an image or of a
    machine file (``machine.toml:namespace0.0``); ``remote+unix:///run/pool.sock`` or
    ``remote+tcp://HOST:PORT`` one that another process serves.

    With ``create_size`` a file that does not exist is made, sparse; one that exists stays as it is.
    ``granularity`` overrides what the platform says a store needs to be durable (``byte``,
    ``cacheline``, ``page``); ``required_granularity`` refuses a coarser one.

    ``ordering="strict"`` makes mode sector keep its promise on media of granularity ``page`` too,
    at a price; see :data:`pmemkit.storage.sector.ORDERINGS`.

    ``levelling`` spreads the writes to a namespace of mode sector over its blocks; ``random`` or
    ``least-worn``, with at most one more write for ``levelling_period`` of them; see
    :data:`pmemkit.storage.levelling.LEVELLINGS`.

    A namespace of mode sector whose info block is bad is :class:`Corrupt`, and never laid out anew
    or taken for a raw one. With ``read_only`` and ``backup_info_block`` it is read by the copy of
    that block.

    What is stored to an image is counted, in bytes by cause and in lines by block, and noted beside
    it in ``IMAGE.wear`` (:mod:`pmemkit.media.wear`). ``wear`` is how blocks are counted:
    ``sampled``, ``exact`` or ``off``.

    A region open for writing is locked: opening it once more is :class:`Busy`, because two writers
    destroy an image. ``locking="off"`` opens it all the same.
    """
    if is_remote(os.fspath(path)):
        create_size = None
    if create_size is not None and split_namespace(os.fspath(path)) is None:
        size = parse_size(create_size) if isinstance(create_size, str) else create_size
        try:
            create_file(path, size)
        except FileExistsError:
            pass
        except OSError as cause:
            raise failure_of(cause, "create", os.fspath(path)) from cause
    if ordering not in ORDERINGS:
        choices = ", ".join(ORDERINGS)
        raise InvalidArgument(f"ordering {ordering!r} is none of {choices}", path=os.fspath(path))
    check_levelling(levelling, levelling_period)
    if backup_info_block and not read_only:
        text = "a backup info block is for reading: open it read-only"
        raise InvalidArgument(text, op="open", path=os.fspath(path))
    place = _place_of(os.fspath(path), backup_info_block=backup_info_block)
    opened = open_medium(
        path if place is None else place.path,
        granularity=granularity,
        required_granularity=required_granularity,
        read_only=read_only,
        locking=locking,
        part=None if place is None else (place.offset, place.length),
        wear=wear,
    )
    return Region(opened, place, ordering, levelling=levelling, levelling_period=levelling_period)


def _place_of(path: str, *, backup_info_block: bool) -> Place | None:
    """The namespace that a path names; ``None`` for a file or device taken as it is."""
    named = None if is_remote(path) else split_namespace(path)
    if named is not None and not os.path.lexists(path):
        return locate(*named, backup_info_block=backup_info_block)
    if backup_info_block:
        text = "a backup info block is that of a namespace: say PATH:namespaceR.N"
        raise InvalidArgument(text, op="open", path=path)
    if not names_no_file(path) and os.path.isfile(path):  # noqa: PTH113 - the same
        require_whole(path)
    return None


def create_file(path: str | os.PathLike[str], size: int) -> None:
    """Makes a new sparse file whose name and size are durable."""
    if size < 0:
        raise InvalidArgument(f"{size} bytes are not a size", op="create", path=os.fspath(path))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError:
        os.unlink(path)  # noqa: PTH108
        raise
    finally:
        os.close(fd)
    sync_directory(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH120


class Region:
    """A range of bytes that a device, a file or memory lends. Made by :func:`pmemkit.open`."""

    def __init__(
        self,
        opened: OpenedMedium,
        place: Place | None = None,
        ordering: Ordering = "default",
        *,
        levelling: Levelling = "off",
        levelling_period: int = LEVELLING_PERIOD,
    ) -> None:
        self._opened: OpenedMedium | None = opened
        self._place = place
        self._path = opened.path if place is None else f"{opened.path}:{place.namespace.dev}"
        self._ordering: Ordering = ordering
        self._levelling: Levelling = levelling
        self._levelling_period = levelling_period
        self._bottom: Device | None = None
        self._cache: Cache | None = None
        self._sectors: Sectors | None = None
        self._lent: int | None = None
        self._devices: weakref.WeakSet[BlockDevice] = weakref.WeakSet()
        self._mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()

    def __enter__(self) -> "Region":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._opened is None else f"{self.size} bytes, {self.granularity}"
        return f"<Region {self._path}: {state}>"

    @property
    def path(self) -> str:
        """The path or spec it was opened with."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes, as of opening, :meth:`resize` or :meth:`refresh`."""
        return len(self._open("size").medium)

    @property
    def read_only(self) -> bool:
        """True when it was opened read-only."""
        return self._open("read_only").read_only

    @property
    def read_only_because(self) -> str | None:
        """Why arenas of a namespace of mode sector are not written although it was opened for
        writing; known as soon as there is a device of it."""
        self._open("read_only_because")
        return None if self._sectors is None else self._sectors.read_only_because

    @property
    def granularity(self) -> Granularity:
        """What a store needs to be durable: ``byte``, ``cacheline`` or ``page``."""
        return self._open("granularity").decision.granularity

    @property
    def persistence_domain(self) -> str:
        """What keeps the content when power fails: ``cpu_cache`` or ``memory_controller`` as the
        kernel says of the region (``unknown`` if it does not), ``file_system`` for a file,
        ``none`` for what is volatile."""
        return self._open("persistence_domain").persistence_domain

    @property
    def volatile(self) -> bool:
        """True when the content does not outlive the process or a restart of the machine."""
        return self._open("volatile").volatile_because is not None

    @property
    def place(self) -> Place | None:
        """The namespace of an image that it is; ``None`` for a file or device taken as it is."""
        return self._place

    @property
    def mode(self) -> str:
        """``raw`` for what is taken as it is, otherwise the namespace's mode."""
        return "raw" if self._place is None else self._place.mode

    @property
    def ordering(self) -> Ordering:
        """What mode sector promises on media of granularity ``page``: ``default``, ``strict``."""
        return self._ordering

    @property
    def opened(self) -> OpenedMedium:
        """What was found out when it was opened."""
        return self._open("opened")

    @property
    def medium(self) -> "Medium":
        """The mapped bytes."""
        return self._open("medium").medium

    def lend(self, op: str, *, write: bool) -> int:
        """The number that scatter-gather lists name its bytes by, until it is closed.

        Refused where bytes have to go another way: mode sector (:class:`NotSupported`), through a
        cache (:class:`Busy`), or not at all (:class:`ReadOnly`, :class:`Latched`).
        """
        from pmemkit._native import sg

        opened = self._open(op)
        if self.mode == "sector":
            text = "mode sector writes sectors through its map: copy by way of a device"
            raise NotSupported(text, op=op, path=self._path)
        self._check_uncached(op)
        if write:
            self._check_latch(op)
            if opened.read_only:
                raise ReadOnly("the region is open for reading", op=op, path=self._path)
        if self._lent is None:
            self._lent = sg.add(opened.medium, write=not opened.read_only)
        return self._lent

    def _take_back(self) -> None:
        if self._lent is not None:
            from pmemkit._native import sg

            lent, self._lent = self._lent, None
            sg.remove(lent)

    def resize(self, size: int) -> None:
        """Grows or shrinks the region and its backing."""
        opened = self._open("resize")
        self._check_latch("resize")
        self._check_uncached("resize")
        try:
            opened.medium.resize(size)
        except PmemError as error:
            raise failure_of(error, "resize", self._path) from None
        self._bottom = None

    def refresh(self) -> int:
        """Picks up a size that somebody else gave the backing; gives the size."""
        opened = self._open("refresh")
        self._check_latch("refresh")
        self._check_uncached("refresh")
        if opened.current_size() != len(opened.medium):
            self._take_back()
            opened.remap()
            self._bottom = None
        return self.size

    def device(
        self,
        *,
        layers: Sequence[str | Layer] = (),
        read_only: bool = False,
        cache: CacheMode | None = None,
        cache_size: int | str | None = None,
        levelling: Levelling | None = None,
    ) -> BlockDevice:
        """A block device over the whole region.

        ``layers``: as text (``fault=ops=read,nth=3``; see :mod:`pmemkit.storage.layers`); the first
        is nearest the client.

        ``cache``: a double buffer in RAM below the layers, ``writeback`` or ``writethrough``, of
        ``cache_size`` bytes (by default a share of the memory that is free). The first device of a
        region decides, and the others have the same; ``None`` is whatever there is.

        ``levelling``: in place of what the region was opened with; again the first device decides.
        """
        opened = self._open("device")
        self._choose_levelling(levelling)
        parsed = [parse_layer(each) if isinstance(each, str) else each for each in layers]
        if self._bottom is None:
            self._bottom = self._make_bottom(opened)
        if cache not in (None, "off") and self._cache is None:
            if any(not mapping.closed for mapping in self._mappings):
                raise Busy(
                    "a mapping is open: it would not see a cache", op="device", path=self._path
                )
            if any(not device.closed for device in self._devices):
                text = "a device without a cache is open: the first device decides"
                raise Busy(text, op="device", path=self._path)
            self._cache = add_cache(self._bottom, cache, cache_size)
            self._bottom = self._cache.device
        elif cache == "off" and self._cache is not None:
            raise Busy("a device with a cache is open", op="device", path=self._path)
        read_only = read_only or opened.read_only
        device = BlockDevice(
            self._bottom,
            self._path,
            layers=parsed,
            read_only=read_only,
            read_only_because=self.read_only_because,
            cache=self._cache,
        )
        self._devices.add(device)
        return device

    def _choose_levelling(self, levelling: Levelling | None) -> None:
        if levelling in (None, self._levelling):
            return
        if self._bottom is not None:
            text = f"a device with levelling {self._levelling} was made: the first one decides"
            raise Busy(text, op="device", path=self._path)
        check_levelling(levelling, self._levelling_period)
        self._levelling = levelling

    def _make_bottom(self, opened: OpenedMedium) -> "Device":
        from pmemkit._native import block

        if self._place is None or self._place.mode != "sector":
            return block.raw(opened.medium, read_only=opened.read_only)
        return self._engine(opened, self._place).device()

    def _engine(self, opened: OpenedMedium, place: Place) -> Sectors:
        """The engine of mode sector; its lanes live in it, so there is one."""
        if self._sectors is None:
            try:
                self._sectors = open_sectors(
                    opened.medium,
                    version=place.btt_version,
                    backup_info_block=place.backup_version is not None,
                    parent_uuid=place.namespace.uuid,
                    read_only=opened.read_only,
                    ordering=self._ordering,
                    levelling=self._levelling,
                    levelling_period=self._levelling_period,
                )
            except PmemError as error:
                error.path = error.path or self._path
                raise
        return self._sectors

    def map(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        read_only: bool = False,
        granularity: str | None = None,
        huge: bool | None = None,
        tracker: str = "automatic",
    ) -> "Mapping":
        """Maps a range of the bytes, by default all of them, for direct loads and stores.

        ``offset`` is a multiple of the page size; of a device DAX or of huge pages the length is
        one too. ``granularity`` is what is required: what would be coarser is
        :class:`NotSupported`, with the reasons. ``huge`` asks for huge pages, or for none.
        ``tracker`` says who is to know what is dirty; see ``docs/dax.md``.

        Mode sector is not mapped: its sectors move, and what stores past the engine tears them.
        """
        from pmemkit.dax import map_medium

        opened = self._open("map")
        self._check_latch("map")
        if self.mode == "sector":
            text = (
                "is of mode sector, whose sectors move with every write: a mapping of the bytes "
                "below would show them in no order and tear them; reconfigure it to raw, fsdax or "
                "devdax"
            )
            raise NotSupported(text, op="map", path=self._path)
        if self._cache is not None:
            text = "the region has a cache, whose writes a mapping would not see"
            raise Busy(text, op="map", path=self._path)
        mapping = map_medium(
            opened,
            self._path,
            offset=offset,
            length=length,
            read_only=read_only,
            granularity=granularity,
            huge=huge,
            tracker=tracker,
        )
        self._mappings.add(mapping)
        return mapping

    def let_go(self, mapping: "Mapping") -> None:
        """Closing the region leaves this mapping open."""
        self._mappings.discard(mapping)

    @property
    def relocations(self) -> int:
        """Sectors that wear levelling has moved since the region was opened."""
        self._open("relocations")
        return 0 if self._sectors is None else self._sectors.relocations()

    def validate(self) -> list[str]:
        """Walks all the metadata of a namespace of mode sector; what is wrong, in sentences. Writes
        wait meanwhile. Of other modes there is nothing to walk."""
        opened = self._open("validate")
        if self._place is None or self._place.mode != "sector":
            return []
        return self._engine(opened, self._place).validate()

    def close(self) -> None:
        """Closes devices and mappings and lets the backing and its lock go. May be called again."""
        if self._opened is None:
            return
        with ExitStack() as stack:
            # Run in reverse: what devices still have to write goes out before the backing is gone.
            stack.callback(self._let_go)
            stack.callback(self._drain)
            for mapping in list(self._mappings):
                stack.callback(mapping.close)
            for device in list(self._devices):
                stack.callback(device.close)

    def note_wear(self) -> None:
        """Adds what was written since the last time to the file beside the image, as closing
        does. Of what is no image, or is not written, there is nothing to note."""
        wear = self._open("note_wear").wear
        if wear is not None:
            wear.note()

    def _drain(self) -> None:
        """A method of ours: what fails keeps what was called, which must not keep the medium."""
        if self._cache is not None:
            self._cache.drain()

    def _let_go(self) -> None:
        self._take_back()
        self._bottom = self._sectors = self._cache = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self, op: str) -> OpenedMedium:
        if self._opened is None:
            raise Closed("the region is closed", op=op, path=self._path)
        return self._opened

    def _check_uncached(self, op: str) -> None:
        if self._cache is not None:
            text = "the region has a cache, which keeps its size: close the region first"
            raise Busy(text, op=op, path=self._path)

    def _check_latch(self, op: str) -> None:
        reason = self._bottom.latched() if self._bottom is not None else None
        if reason is not None:
            text = f"read-only until reopened, after: {reason}"
            raise Latched(text, op=op, path=self._path)
