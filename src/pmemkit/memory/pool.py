"""Pools: memory of several regions handed to programs, behind addresses that never change.

    pool = MemoryPool(["anonymous:1G", "/dev/dax0.0"])
    table = pool.zeros((1000, 1000), dtype="f8")
    with pool.numpy():
        total = table + 1                     # NumPy's own memory is the pool's as well
    pool.remove("anonymous:1G")               # both arrays go on, in the other region

Memory goes back when the last object that uses it is gone, in whatever order objects die, and at
the end of the process by itself. A region may be added and removed at any time; what is in it moves
while threads go on using it.

Invariants:
1. An address that was handed out stays valid and holds the same bytes until its last user is gone.
2. :meth:`MemoryPool.remove` completes, or the pool is as it was and the error says why.
3. All methods may be called from any thread. In a forked child the memory is that of the parent,
   and whatever changes the pool is :class:`NotSupported`.

What this does not do: make bytes durable, except those of named arrays where a program says so.
"""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pmemkit.errors import Busy, Closed, InvalidArgument, NoSpace, NotSupported, PmemError
from pmemkit.memory import attributes, tiers
from pmemkit.memory.control import ControlServer
from pmemkit.memory.local import Nearness
from pmemkit.memory.named import NamedArrays
from pmemkit.memory.page_map import bill_of, open_map
from pmemkit.memory.provider import Block, Provider, RegionProvider
from pmemkit.memory.regions import Opened, RegionSpec, open_region_of
from pmemkit.memory.tiering import Tiering
from pmemkit.units import parse_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike

    from pmemkit._native.memory import Buffer, Pool

__all__ = ["BLOCK_SIZE", "MemoryPool", "Migration", "Placement", "Zeroing"]

BLOCK_SIZE = 128 << 20
"""Bytes of a memory block, unless the pool is made with others: Linux's own on most machines."""

Placement = Literal["local", "preferred", "interleave"]
Zeroing = Literal["asked", "allocate", "free"]
_Progress = Callable[[int, int], object]
_Shape = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Migration:
    """What moving extents took."""

    bytes: int
    extents: int
    elapsed_ns: int
    hold_ns_peak: int
    """The longest that a store had to wait for one chunk."""

    @property
    def bytes_per_second(self) -> float:
        """The rate, zero where nothing moved."""
        return self.bytes / self.elapsed_ns * 1e9 if self.elapsed_ns else 0.0


class MemoryPool:
    """Memory of several regions."""

    def __init__(
        self,
        regions: Iterable[RegionSpec | str | os.PathLike[str] | Provider] = (),
        *,
        placement: Placement = "local",
        block_size: int | str = BLOCK_SIZE,
        zeroing: Zeroing = "asked",
        limit: int | str | None = None,
        share_with_children: bool = True,
        granule: int | str = 2 << 20,
        catch_with: Literal["best", "signal"] = "best",
        progress_every: float = 0.1,
    ) -> None:
        """``placement``: ``preferred`` fills regions by rank, ``local`` by the rank that the
        calling thread's node sees, ``interleave`` spreads large extents over all in granules.
        ``zeroing``: bytes are zeroes only where they are ``asked`` for, whenever they are handed
        out (``allocate``), or cleared when they are given back (``free``). ``limit``: bytes that
        may be in use. ``catch_with``: how writers are made to wait while their memory moves; see
        docs/memory-pools.md. ``progress_every``: seconds between two calls of a progress callback.
        """
        from pmemkit._native import memory

        if placement not in ("local", "preferred", "interleave"):
            text = f"placement {placement!r} is none of local, preferred, interleave"
            raise InvalidArgument(text)
        self._open_core: Pool | None = memory.Pool(
            block_size=_bytes(block_size),
            placement="interleave" if placement == "interleave" else "preferred",
            granule=_bytes(granule),
            zeroing=zeroing,
            limit=None if limit is None else _bytes(limit),
            share_with_children=share_with_children,
            userfault=catch_with == "best",
            report_every=progress_every,
        )
        self.block_size = _bytes(block_size)
        self.placement = placement
        self._members: dict[str, Opened] = {}
        self._providers: dict[str, Provider] = {}
        self._servers: list[ControlServer] = []
        self._tiering: Tiering | None = None
        self._named: dict[str, NamedArrays] = {}
        self._near = Nearness(())
        self._passed_over = 0
        self._lock = threading.RLock()
        self._pressure: tuple[float, Callable[[int], object]] | None = None
        self._pressed = False
        self._progress: dict[str, tuple[int, int]] = {}
        self._cancelled: set[str] = set()
        weakref.finalize(self, _close_all, self._members, self._named)
        try:
            for each in regions:
                self.add(each)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hands nothing out any more and closes its files; memory in use lives on."""
        if self._tiering is not None:
            self._tiering.stop()
        with self._lock:
            while self._servers:
                self._servers.pop().close()
            _close_all(self._members, self._named)
            for provider in self._providers.values():
                provider.close()
            self._providers.clear()
            # Whoever has memory of it keeps the rest alive.
            self._open_core = None

    # --- regions ----------------------------------------------------------------------------------

    def add(self, region: RegionSpec | str | os.PathLike[str] | Provider) -> str:
        """Adds a region, or a provider of bytes that have no address here; gives its name.

        Raises :class:`InvalidArgument` for one smaller than a block, and :class:`Busy` for one that
        is in the pool already, overlaps one, or is open for writing elsewhere.
        """
        with self._lock:
            if isinstance(region, Provider):
                if region.name in self.regions():
                    raise Busy(f"region {region.name} is in the pool already", op="add")
                self._providers[region.name] = region
                return region.name
            member = open_region_of(region, locking=not self._holds(region))
            try:
                member.name = self._name_of(member)
                self._join(member)
            except BaseException:
                member.close()
                raise
            self._members[member.name] = member
            self._near = Nearness(self._members.values())
            if not member.spec.names:
                # The core has the file and its lock.
                member.close()
            return member.name

    def _name_of(self, member: Opened) -> str:
        """Its name; memory of the process, of which there may be more of a size, is counted."""
        name, count = member.name, 1
        while name in self._members:
            if not member.sealed or member.spec.name is not None:
                text = f"region {name} is in the pool already"
                raise Busy(text, op="add", path=name)
            count += 1
            name = f"{member.name}#{count}"
        return name

    def _holds(self, region: RegionSpec | str | os.PathLike[str]) -> bool:
        """True for a file of which the pool has a part: its own lock must not stand in the way of
        the error that says so."""
        path = os.fspath(region.path if isinstance(region, RegionSpec) else region)
        return any(os.fspath(each.spec.path) == path for each in self._members.values())

    def _join(self, member: Opened) -> None:
        tiers.require_sound(member.spec)
        attributes.complete(member)
        named = None
        start, size = member.start, member.size
        claimed: list[tuple[int, int]] = []
        if member.spec.names:
            named = NamedArrays.open(member, block_size=self.block_size)
            start, size = start + named.data_offset, size - named.data_offset
            claimed = named.claimed()
        member.id = self._core.add(
            member.fd,
            member.name,
            offset=start,
            length=size,
            rank=tiers.rank_of(member.spec),
            weight=tiers.weight_of(member.spec),
            sealed=member.sealed,
            large_pages=member.spec.large_pages,
            claimed=claimed,
            map=open_map(member, size, self.block_size),
        )
        if named is not None:
            named.join(self._core, member.id)
            self._named[member.name] = named

    def remove(
        self, region: str, *, timeout: float | None = None, progress: _Progress | None = None
    ) -> Migration:
        """Moves everything out of a region and lets it go.

        ``progress(moved, total)`` is called now and then and cancels by returning ``False``, as
        :meth:`cancel` does from elsewhere. Raises :class:`NoSpace` where the other regions have no
        room, and :class:`Busy` for pinned or fixed extents, named arrays in use, a forked child
        that shares the memory, a timeout or a cancellation. The pool is then as it was.
        """
        with self._lock:
            if region in self._providers:
                # Its blocks are the provider's, and go with it.
                self._providers.pop(region).close()
                return Migration(0, 0, 0, 0)
            member = self._member(region)
            named = self._named.get(region)
            if named is not None:
                named.leave()
        try:
            abandoned = named.addresses() if named is not None else []
            core = functools.partial(self._core.remove, abandoned=abandoned)
            done = self._migrate(region, timeout, progress, core, member.id)
        except BaseException:
            if named is not None:
                named.stay()
            raise
        with self._lock:
            self._members.pop(region, None)
            self._near = Nearness(self._members.values())
            self._named.pop(region, None)
            if named is not None:
                named.close()
            member.close()
        return done

    def offline(
        self,
        region: str,
        first: int = 0,
        count: int = 1,
        *,
        timeout: float | None = None,
        progress: _Progress | None = None,
    ) -> Migration:
        """Moves everything out of blocks, as :meth:`remove`; nothing new is put there."""
        member = self._member(region)
        core = self._core.offline
        return self._migrate(region, timeout, progress, core, member.id, first, count)

    def online(self, region: str, first: int = 0, count: int = 1) -> None:
        """Makes blocks usable again."""
        self._core.online(self._member(region).id, first, count)

    def migrate(
        self,
        objects: Iterable[Any],
        region: str,
        *,
        timeout: float | None = None,
        progress: _Progress | None = None,
    ) -> Migration:
        """Moves arrays or buffers of the pool into a region. As :meth:`remove`."""
        member = self._member(region)
        addresses = [_address_of(each) for each in objects]
        core = self._core.migrate
        return self._migrate(region, timeout, progress, core, addresses, member.id)

    def tiering(self, **options: Any) -> Tiering:
        """What moves chunks that are used much to the regions of a smaller rank, and others out of
        their way; see :class:`Tiering` for its options. It does nothing before it is started:
        ``with pool.tiering():``. A pool has one; another takes its place.

        Raises :class:`InvalidArgument` where all regions have one rank.
        """
        made = Tiering(self, **options)
        before, self._tiering = self._tiering, made
        if before is not None:
            before.stop()
        return made

    def _move_ranges(self, ranges: list[tuple[int, int]], region: int) -> Migration:
        """Moves what lies at some addresses, as far as it can move; for :class:`Tiering`."""
        return Migration(**self._core.migrate_ranges(ranges, region))

    def cancel(self, region: str) -> None:
        """Stops a migration that was begun for this region, from any thread."""
        self._cancelled.add(region)

    def migrations(self) -> dict[str, tuple[int, int]]:
        """Bytes moved and to be moved of every migration that is under way, by region."""
        return dict(self._progress)

    def _migrate(
        self,
        region: str,
        timeout: float | None,
        progress: _Progress | None,
        core: Callable[..., dict[str, int]],
        *arguments: object,
    ) -> Migration:
        def report(moved: int, total: int) -> bool:
            self._progress[region] = moved, total
            if region in self._cancelled:
                return False
            return progress is None or progress(moved, total) is not False

        self._cancelled.discard(region)
        tiering = contextlib.nullcontext() if self._tiering is None else self._tiering.paused()
        try:
            with tiering:
                return Migration(**core(*arguments, timeout=timeout, progress=report))
        except PmemError as error:
            error.path = error.path or region
            raise
        finally:
            self._progress.pop(region, None)
            self._cancelled.discard(region)

    def provider(self, region: str) -> Provider:
        """A region as a provider of blocks."""
        if region in self._providers:
            return self._providers[region]
        return RegionProvider(self._core, self._member(region).id, region)

    def block(self, nbytes: int, region: str | None = None) -> Block:
        """Bytes to copy into, out of and between, of any region; those of this CPU by default."""
        return Block(self.provider(region or next(iter(self._members))), nbytes)

    def _member(self, region: str) -> Opened:
        member = self._members.get(region)
        if region in self._providers:
            text = f"region {region} has no address in this process: use block() and copy"
            raise NotSupported(text, op="pool", path=region)
        if member is None:
            there = ", ".join(self.regions()) or "none"
            text = f"region {region!r} is not in this pool; there is {there}"
            raise InvalidArgument(text, op="pool")
        return member

    @property
    def _core(self) -> "Pool":
        if self._open_core is None:
            raise Closed("the pool is closed", op="pool")
        return self._open_core

    # --- memory -----------------------------------------------------------------------------------

    def alloc(
        self,
        nbytes: int,
        *,
        region: str | None = None,
        movable: bool = True,
        zero: bool = False,
    ) -> "Buffer":
        """Memory as an object with the buffer protocol (``memoryview(buffer)``)."""
        number = None if region is None else self._member(region).id
        try:
            buffer = self._placed(nbytes, number, fixed=not movable, zero=zero)
        except NoSpace:
            if self._pressure is None:
                raise
            self._pressure[1](nbytes)
            buffer = self._placed(nbytes, number, fixed=not movable, zero=zero)
        if self._pressure is not None:
            self._watch_pressure(nbytes)
        return buffer

    def _placed(self, nbytes: int, region: int | None, *, fixed: bool, zero: bool) -> "Buffer":
        """Memory of one region, or by the placement."""
        if region is None and self.placement == "local":
            for near in self._near.order(nbytes):
                try:
                    return self._core.allocate(nbytes, region=near, fixed=fixed, zero=zero)
                except NoSpace:
                    with self._lock:
                        self._passed_over += 1
                except PmemError:
                    # It left, or was cut; the core knows what to do.
                    break
        return self._core.allocate(nbytes, region=region, fixed=fixed, zero=zero)

    def on_pressure(self, fraction: float, callback: Callable[[int], object] | None) -> None:
        """Calls ``callback(nbytes)`` when an allocation of so many bytes takes the share of memory
        in use past ``fraction`` (once until it falls below again), and before one fails, which is
        then tried once more. ``None`` ends it."""
        if not 0 < fraction <= 1:
            raise InvalidArgument(f"{fraction} is no share of the memory", op="pool")
        self._pressure = None if callback is None else (fraction, callback)
        self._pressed = False

    def _watch_pressure(self, nbytes: int) -> None:
        assert self._pressure is not None
        size = sum(region["size"] for region in self._core.regions())
        pressed = self._core.stats()["used"] > self._pressure[0] * size
        was, self._pressed = self._pressed, pressed
        if pressed and not was:
            self._pressure[1](nbytes)

    def empty(
        self,
        shape: _Shape,
        dtype: "DTypeLike" = float,
        *,
        order: Literal["C", "F"] = "C",
        region: str | None = None,
        movable: bool = True,
    ) -> "np.ndarray[Any, Any]":
        """An array of the pool whose content is whatever was there, or zeroes by the policy."""
        return self._array(shape, dtype, order, region=region, movable=movable)

    def zeros(
        self,
        shape: _Shape,
        dtype: "DTypeLike" = float,
        *,
        order: Literal["C", "F"] = "C",
        region: str | None = None,
        movable: bool = True,
    ) -> "np.ndarray[Any, Any]":
        """An array of zeroes."""
        return self._array(shape, dtype, order, region=region, movable=movable, zero=True)

    def full(
        self, shape: _Shape, value: Any, dtype: "DTypeLike | None" = None, **options: Any
    ) -> "np.ndarray[Any, Any]":
        """An array of one value; options as for :meth:`empty`."""
        import numpy as np

        made = self.empty(shape, np.asarray(value).dtype if dtype is None else dtype, **options)
        made[...] = value
        return made

    def array(
        self, data: "ArrayLike", dtype: "DTypeLike | None" = None, **options: Any
    ) -> "np.ndarray[Any, Any]":
        """A copy of an array or of nested sequences; options as for :meth:`empty`."""
        import numpy as np

        source = np.asarray(data, dtype=dtype)
        made = self.empty(source.shape, source.dtype, **options)
        made[...] = source
        return made

    def _array(
        self, shape: _Shape, dtype: "DTypeLike", order: Literal["C", "F"], **options: Any
    ) -> "np.ndarray[Any, Any]":
        import numpy as np

        kind = np.dtype(dtype)
        if kind.hasobject:
            text = f"dtype {kind} holds references to Python objects; a pool holds bytes"
            raise InvalidArgument(text, op="allocate")
        lengths = (shape,) if isinstance(shape, int) else tuple(shape)
        count = 1
        for length in lengths:
            if length < 0:
                raise InvalidArgument(f"{lengths} is not a shape", op="allocate")
            count *= length
        buffer = self.alloc(count * kind.itemsize, **options)
        if count * kind.itemsize == 0:
            return np.empty(lengths, kind, order)
        flat = np.frombuffer(memoryview(buffer), kind)
        return flat.reshape(lengths, order=order)

    @contextlib.contextmanager
    def numpy(self) -> Iterator[None]:
        """Inside, what NumPy allocates by itself is the pool's (NEP 49): of this thread or task.

        Memory that such arrays have goes back to the pool whenever they die. Where the pool has no
        room, NumPy raises ``MemoryError``.
        """
        from pmemkit._native import memory

        before = memory.set_numpy_handler(self._core.numpy_handler())
        try:
            yield
        finally:
            memory.set_numpy_handler(before)

    @contextlib.contextmanager
    def pin(self, *objects: Any) -> Iterator[None]:
        """Inside, arrays or buffers stay at their frames: for devices and other processes that
        reach them past their addresses (direct I/O, RDMA, a GPU). Waits for a migration."""
        addresses = [_address_of(each) for each in objects]
        held: list[int] = []
        try:
            for address in addresses:
                self._core.pin(address)
                held.append(address)
            yield
        finally:
            for address in held:
                self._core.unpin(address)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, no migration holds memory from its writers: for system calls that store into the
        pool where the kernel's stores are not caught (:meth:`stat` says where)."""
        self._core.enter()
        try:
            yield
        finally:
            self._core.leave()

    def forget_children(self) -> None:
        """Says that no forked child uses the pool's memory any more; migration is allowed again."""
        self._core.forget_children()

    def publish(self, path: str | os.PathLike[str]) -> ControlServer:
        """Answers ``pmem memory`` and ``pmem top`` on a Unix socket until the pool, or what this
        gives, is closed."""
        server = ControlServer(self, path)
        self._servers.append(server)
        return server

    # --- what is there ----------------------------------------------------------------------------

    def stat(self) -> dict[str, Any]:
        """Regions with their blocks, and what happened so far; plain data. Bytes."""
        regions = self._core.regions()
        for region in regions:
            region["window"] = hex(region["window"])
            region["blocks"] = [{"state": state, "used": used} for state, used in region["blocks"]]
            region["names"] = region["name"] in self._named
            region |= attributes.shown(self._members.get(region["name"]))
            region["page_map"] = bill_of(region)
        limit = {"placement": self.placement, "block_size": self.block_size}
        providers = [
            {"name": each.name, "cpu_addressable": each.cpu_addressable, "used": each.used()}
            for each in self._providers.values()
        ]
        stats = self._core.stats()
        # The core counts a region without room that was only the first to be asked.
        stats["refused"] -= self._passed_over
        tiering = None if self._tiering is None else self._tiering.stat()
        more = {"providers": providers, "tiering": tiering, **stats}
        return {**limit, "regions": regions, **more}

    def map(self) -> list[dict[str, Any]]:
        """Every extent: address, length, where its bytes are."""
        names = {region["id"]: region["name"] for region in self._core.regions()}
        return [
            {
                "address": address,
                "length": length,
                "pieces": [
                    {"region": names.get(region, "?"), "frame": first, "frames": frames}
                    for region, first, frames in pieces
                ],
                "pins": pins,
                "fixed": fixed,
                "slab": slab,
            }
            for address, length, pieces, pins, fixed, slab in self._core.extents()
        ]

    def regions(self) -> list[str]:
        """Names of the regions."""
        return [*self._members, *self._providers]

    def owns(self, thing: Any) -> bool:
        """True for an array or buffer whose bytes are at an address of this pool."""
        return self._core.owns(_address_of(thing))

    def validate(self) -> list[str]:
        """What is inconsistent; nothing is, unless there is a bug."""
        return self._core.validate()

    # --- named arrays -----------------------------------------------------------------------------

    def create(
        self,
        name: str,
        shape: _Shape,
        dtype: "DTypeLike" = float,
        *,
        order: Literal["C", "F"] = "C",
        region: str | None = None,
    ) -> "np.ndarray[Any, Any]":
        """A new array of zeroes that is found again under its name after a restart."""
        with self._lock:
            if name in self:
                raise InvalidArgument(f"there is an array {name!r} already", op="create")
            return self._named_in(region).create(name, shape, dtype, order)

    def _named_in(self, region: str | None) -> NamedArrays:
        if region is not None and region not in self._named:
            raise InvalidArgument(f"region {region!r} has no named arrays", op="create")
        if not self._named:
            text = "no region of this pool has named arrays; add one with names=True"
            raise InvalidArgument(text, op="create")
        return self._named[region] if region is not None else next(iter(self._named.values()))

    def persist(self, name: str) -> None:
        """Makes what a named array holds now durable."""
        self._of(name).persist(name)

    def __getitem__(self, name: str) -> "np.ndarray[Any, Any]":
        return self._of(name)[name]

    def __delitem__(self, name: str) -> None:
        with self._lock:
            del self._of(name)[name]

    def __contains__(self, name: object) -> bool:
        return any(name in named for named in self._named.values())

    def __iter__(self) -> Iterator[str]:
        return iter([name for named in self._named.values() for name in named])

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return sum(len(named) for named in self._named.values())

    def _of(self, name: str) -> NamedArrays:
        for named in self._named.values():
            if name in named:
                return named
        raise KeyError(name)


def _close_all(members: dict[str, Opened], named: dict[str, NamedArrays]) -> None:
    for arrays in named.values():
        arrays.close()
    named.clear()
    for member in members.values():
        member.close()
    members.clear()


def _bytes(size: int | str) -> int:
    return parse_size(size) if isinstance(size, str) else size


def _address_of(thing: Any) -> int:
    """The address of an array, or of an object with the buffer protocol."""
    known = getattr(thing, "address", None)
    if isinstance(known, int):
        return known
    described = getattr(thing, "__array_interface__", None)
    if described is not None:
        return int(described["data"][0])
    raise InvalidArgument(f"{type(thing).__name__} is no array and no buffer of a pool", op="pool")
