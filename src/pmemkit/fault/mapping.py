"""Lazily filled mappings: what they are filled from, and where their changes go.

Invariants:
1. Whatever a mapping is filled from stays open, and locked against writers where it would be by
   :func:`pmemkit.open`, until the mapping is closed.

What this does not do: handle faults; the Rust core does.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol, Self

from pmemkit._native import fault as native
from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange
from pmemkit.fault.remote import NbdSource
from pmemkit.media.badblocks import BAD_BLOCK_SIZE, clip, read_bad_blocks
from pmemkit.storage.region import Region, open_region

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pmemkit._native.media import Medium

__all__ = ["LazyMapping", "Provides", "assemble", "clone", "lazy", "load"]

_Extent = str | os.PathLike[str] | tuple[str | os.PathLike[str], int, int]
_NBD = ("nbd:", "nbds:", "nbd+unix:", "nbds+unix:")
_FETCHED = 256 << 10
"""Bytes that are fetched at once from what is far away."""


class LazyMapping(native.LazyMapping):
    """Memory that fills itself; as a buffer, all of its bytes. Made by :func:`clone`, :func:`load`,
    :func:`assemble` and :func:`lazy`."""

    _held: ExitStack
    _parts: "list[tuple[Medium, int, int]]"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commit(self, target: str | os.PathLike[str] | Region, offset: int = 0) -> int:
        """Writes the pages that were stored to into a region, from its byte ``offset`` on, and
        makes them durable; gives how many bytes that were.

        A write that fails leaves dirty whatever was not written, and everything where the flush
        failed. It is not one atomic step: a power failure may leave a part written. Raises
        :class:`NotSupported` where writes are not tracked.
        """
        if not self.tracked:
            text = "writes to this mapping are not tracked: make it with track_writes"
            raise NotSupported(text, op="commit")
        with ExitStack() as stack:
            region = target
            if not isinstance(region, Region):
                region = stack.enter_context(open_region(region))
            device = stack.enter_context(region.device())
            return self.commit_to(device.channel(), offset)

    def persist(self) -> None:
        """Makes what was stored to an assembled mapping durable on its regions. Raises
        :class:`NotSupported` for copies: :meth:`commit` writes those."""
        if not self._parts:
            raise NotSupported("is a copy: commit writes what was stored", op="persist")
        for medium, offset, length in self._parts:
            medium.persist(offset, length)

    def close(self) -> None:
        """Gives the memory back; what was stored and not committed is gone. :class:`Busy` while
        there are views. May be called again."""
        super().close()
        self._held.close()


def _made(provider: native.Provider, length: int, held: ExitStack, **options: Any) -> LazyMapping:
    """Takes over what is held, also when it fails."""
    with held:
        mapping = LazyMapping(provider, length, **options)
        mapping._parts = []
        mapping._held = held.pop_all()
        return mapping


class Provides(Protocol):
    """Says what pages are."""

    def provide(self, first: int, count: int, /) -> "Buffer | None":
        """The bytes of so many pages; ``None`` where all of them are zeroes."""


def lazy(provider: Provides, length: int, **options: Any) -> LazyMapping:
    """Memory whose pages an object says. It is asked from handler threads, and must not touch the
    mapping. An exception fails the page: reads of it raise, until :meth:`LazyMapping.retry`. Where
    it has ``may_write(page)``, that says whether a page may be written to.

    Options: ``page_size`` (a power of two, 4096), ``fault_around`` (pages asked for at once, 1),
    ``threads`` (1), ``read_only``, ``track_writes``, ``huge``, ``fd`` (a file in shared memory to
    fill), ``user_only``. Such a mapping has no views: use ``read`` and ``write``.
    """
    return _made(native.Provider.of_object(provider), length, ExitStack(), **options)


def load(
    source: str | os.PathLike[str],
    offset: int = 0,
    length: int | None = None,
    **options: Any,
) -> LazyMapping:
    """Memory that is loaded from a region, a namespace or an NBD server when it is touched.

    ``source`` is what :func:`pmemkit.open` takes, or an NBD URI (``nbd://``, ``nbd+unix://``; needs
    libnbd). Options are those of :func:`lazy`.
    """
    name = os.fspath(source)
    with ExitStack() as held:
        if name.startswith(_NBD):
            page_size = int(options.get("page_size") or 4096)
            if offset % page_size:
                text = f"byte {offset} of an NBD export: pages of {page_size} begin elsewhere"
                raise InvalidArgument(text, op="load", path=name)
            far = NbdSource(name, page_size)
            length = _length(name, offset, length, far.size)
            options.setdefault("fault_around", max(1, _FETCHED // page_size))
            provider = native.Provider.of_object(_From(far, offset // page_size))
        else:
            region = held.enter_context(open_region(source, read_only=True))
            if region.mode == "sector":
                device = held.enter_context(region.device(read_only=True))
                length = _length(name, offset, length, device.size)
                provider = native.Provider.of_channel(device.channel(), offset, length)
            else:
                length = _length(name, offset, length, region.size)
                provider = native.Provider.of_medium(region.medium, offset, length)
        return _made(provider, length, held.pop_all(), **options)


def clone(
    source: str | os.PathLike[str],
    offset: int = 0,
    length: int | None = None,
    **options: Any,
) -> LazyMapping:
    """A copy on write: as :func:`load`, with what is stored to it tracked, so that
    :meth:`LazyMapping.commit` can write it somewhere."""
    return load(source, offset, length, **{**options, "track_writes": True})


def assemble(extents: Iterable[_Extent], *, page_size: int = 4096, **options: Any) -> LazyMapping:
    """Ranges of several regions side by side in one range of addresses.

    An extent is a region, or ``(region, offset, length)``, in multiples of ``page_size``. Nothing
    is copied: what is stored is on the regions, and durable after :meth:`LazyMapping.persist`.
    Pages with bad blocks are left out: they fail when they are touched.
    """
    with ExitStack() as held:
        parts = []
        regions: dict[str, Region] = {}
        for extent in extents:
            path, offset, length = extent if isinstance(extent, tuple) else (extent, 0, None)
            name, read_only = os.fspath(path), bool(options.get("read_only"))
            # Opened once: a second opening would find it locked.
            region = regions.get(name) or open_region(path, read_only=read_only)
            if name not in regions:
                regions[name] = held.enter_context(region)
            if region.mode == "sector":
                text = "is of mode sector, whose sectors move with every write"
                raise NotSupported(text, op="assemble", path=name)
            length = _length(name, offset, length, region.size)
            parts.append((region.medium, offset, length, _bad(region)))
        provider, length = native.Provider.assembled(parts, page_size)
        mapping = _made(provider, length, held.pop_all(), page_size=page_size, **options)
        mapping._parts = [part[:3] for part in parts]
        return mapping


class _From:
    """A provider from one of its pages on."""

    def __init__(self, provider: NbdSource, first: int) -> None:
        self._provider, self._first = provider, first

    def provide(self, first: int, count: int) -> bytes:
        return self._provider.provide(self._first + first, count)


def _length(name: str, offset: int, length: int | None, size: int) -> int:
    if length is None:
        length = size - offset
    if offset < 0 or length <= 0 or offset + length > size:
        text = f"{length} bytes at {offset} are not in the {size} bytes there are"
        raise OutOfRange(text, op="map", path=name)
    return length


def _bad(region: Region) -> list[tuple[int, int]]:
    """The bad ranges of a region, in bytes of its medium."""
    opened = region.opened
    if opened.backing != "file":
        return []
    start = opened.part[0] if opened.part else 0
    runs = clip(read_bad_blocks(opened.path), start, region.size)
    return [(run.offset * BAD_BLOCK_SIZE, run.length * BAD_BLOCK_SIZE) for run in runs]
