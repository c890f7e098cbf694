"""Block devices: layers of one shape over a medium, and the channel that enforces what they offer."""

from collections.abc import Callable
from typing import Self, final

from typing_extensions import Buffer

from .media import Medium

@final
class Device:
    """A stack of layers: the control handle. Frozen; layers are added on top."""

    @property
    def size(self) -> int: ...
    @property
    def block_size_min(self) -> int: ...
    @property
    def block_size_preferred(self) -> int: ...
    @property
    def payload_size_max(self) -> int: ...
    @property
    def caps(self) -> frozenset[str]:
        """Of ``write flush fua discard zero fast_zero cache extents map map_write multi_conn``."""

    def channel(self, *, read_only: bool = False) -> Channel:
        """A handle for I/O only. Channels of one device share its latch."""

    def latched(self) -> str | None:
        """Why the device is read-only until reopened, or ``None``."""

@final
class Channel:
    """The door: every request is checked against the device's frozen capabilities first."""

    @property
    def size(self) -> int: ...
    @property
    def caps(self) -> frozenset[str]: ...
    @property
    def block_size_min(self) -> int: ...
    @property
    def block_size_preferred(self) -> int: ...
    @property
    def payload_size_max(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def readinto(self, offset: int, target: Buffer) -> int: ...
    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> int: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int, *, fua: bool = False) -> None: ...
    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None: ...
    def cache(self, offset: int, length: int) -> None: ...
    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]: ...

def raw(medium: Medium, *, read_only: bool = False) -> Device:
    """The bottom layer of mode ``raw``: the medium as it is; 8 bytes are power-fail atomic."""

def python_reader(size: int, sector_size: int, read: Callable[[int, int], bytes]) -> Device:
    """A read-only bottom layer that calls ``read(offset, length)`` for every request, on a thread
    of the server's pool. For readers that need no speed."""

def noop(below: Device) -> Device:
    """A layer that changes nothing."""

def bounce(below: Device) -> Device:
    """A layer that hides ``map``: transfers go through a buffer."""

@final
class Cache:
    """A double buffer in RAM. Closing is dropping it and every channel of its device: that writes
    back and flushes, and what fails then nobody hears; :meth:`drain` before does tell."""

    @property
    def device(self) -> Device:
        """The stack with the cache on top."""

    def drain(self) -> None:
        """Writes back what is dirty and flushes the device below."""

    def stats(self) -> dict[str, int]:
        """Since it was made: ``read_hits read_misses write_hits write_misses evictions``, what went
        to media (``blocks_written bytes_written writes``) and came from there (``blocks_read reads
        blocks_ahead``), ``bypassed`` pieces of requests; now: ``blocks dirty memory`` (bytes)."""

    def validate(self) -> list[str]:
        """Walks everything; what is wrong, in sentences. Nobody may use the device meanwhile."""

def cache(
    below: Device,
    *,
    size: int,
    mode: str = "writeback",
    read_ahead: int = 32,
    dirty_background: int = 85,
    dirty_most: int = 95,
    flush_age: float | None = ...,
    heed_pressure: bool = True,
) -> Cache:
    """A cache of ``size`` bytes in blocks of 4096 over a device whose unit divides that. ``mode`` is
    ``writeback`` or ``writethrough``. ``read_ahead`` is in blocks. The flusher begins when
    ``dirty_background`` percent of the blocks are dirty, and who writes helps from ``dirty_most``
    on; no block stays dirty longer than ``flush_age`` seconds. Two caches over one device do not
    see each other's writes."""

@final
class Trace:
    """What a trace layer saw, at most ``capacity`` entries, oldest first."""

    def __new__(cls, capacity: int = 65536) -> Self: ...
    def entries(self) -> list[tuple[str, int, int, int, str]]:
        """``(op, offset, length, flags, outcome)``; ``outcome`` is ``ok`` or the error kind. Ops are
        those of the stack plus ``map``, ``commit`` and ``extents``."""

    def dropped(self) -> int:
        """Entries that were pushed out."""

def trace(below: Device, sink: Trace) -> Device: ...
def fault(
    below: Device,
    *,
    ops: str = "read,write",
    nth: int = 1,
    count: int = 1,
    offset: int = 0,
    length: int | None = None,
    errno: int = 5,
) -> Device:
    """Fails matching requests: the ``nth`` op of ``ops`` that touches ``offset .. offset + length``
    and the ``count - 1`` matching ones after it (``count=0``: all of them from then on)."""

def delay(below: Device, *, ops: str = "read,write", seconds: float) -> Device:
    """Waits before each matching op and declares these ops blocking."""
