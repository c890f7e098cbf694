"""Page frames of memory: the page map, one descriptor a frame, and the allocator of runs.

Frames are 4 KiB and numbered from 0 in their region; an area is 512 of them. Every call may be made
from any thread. What a caller says wrongly (a frame that is not allocated, another length, a number
past the end) raises ``InvalidArgument`` or ``OutOfRange`` with the number and changes nothing;
where no free run is long enough, ``NoSpace``.
"""

from collections.abc import Sequence
from typing import Self, TypedDict, final

from .media import Medium

class _Stats(TypedDict):
    free: int
    offline: int
    fragmentation: float
    runs: dict[int, int]

@final
class Descriptor:
    """What the page map knows of a frame: of its allocation, or of itself where it is free."""

    allocated: bool
    first: int
    frames: int
    pinned: bool
    movable: bool
    tag: int
    online: bool

@final
class Allocator:
    """Hands out frames. Its page map is in DRAM."""

    def __new__(cls, frames: int, *, magazines: bool = True, online: bool = True) -> Self: ...
    @staticmethod
    def over(
        medium: Medium,
        offset: int,
        length: int,
        frames: int,
        *,
        persistent: bool,
        magazines: bool = True,
        online: bool = True,
    ) -> Allocator:
        """An allocator whose page map is in a range of the region (``map=dev``), which has room for
        :meth:`map_size` bytes. With ``persistent`` the map survives a power failure as of the last
        :meth:`flush`, and opening it again finds what was allocated; without, the range is zeroed.
        """

    @staticmethod
    def map_size(frames: int) -> int:
        """Bytes that :meth:`over` takes for so many frames."""

    def get(self, order: int) -> int:
        """The first frame of a run of ``2**order`` at a multiple of its length; orders 0 to 10 and
        18 (1 GiB). It is movable, not pinned, and has tag 0."""

    def put(self, frame: int, order: int) -> None:
        """Puts an allocation of ``2**order`` frames back; ``Busy`` where it is pinned."""

    def get_run(self, frames: int) -> int:
        """The first frame of a run of any length; of a power of two it is aligned as by
        :meth:`get`."""

    def put_run(self, frame: int, frames: int) -> None:
        """Puts an allocation of this length back, whichever call made it."""

    def claim(self, frame: int, frames: int) -> None:
        """Takes these very frames, online or not; ``Busy`` where one of them is allocated."""

    def retain(self, live: Sequence[tuple[int, int]]) -> int:
        """Makes the allocations exactly these ``(frame, frames)``, for recovery: what is allocated
        and not among them is put back, what is among them and not allocated is claimed. Returns how
        many were put back. Nobody else may use the allocator meanwhile."""

    def offline(self, first: int, count: int) -> bool:
        """Hands nothing out of these frames any more, which are whole areas (the last one of the
        region may be short). Allocations stay until they are put; True where there are none."""

    def online(self, first: int, count: int) -> None:
        """Hands these frames out again."""

    def allocated(self, first: int, count: int) -> list[tuple[int, int]]:
        """``(frame, frames)`` of the allocations that touch a range, in order."""

    def descriptor(self, frame: int) -> Descriptor: ...
    def set_flags(
        self,
        frame: int,
        *,
        pinned: bool | None = None,
        movable: bool | None = None,
        tag: int | None = None,
    ) -> None:
        """Sets what the owner of the allocation that starts at ``frame`` says of it; ``tag`` is 0
        to 3. ``None`` leaves a flag as it is."""

    @property
    def free_frames(self) -> int:
        """Frames that can be handed out; those offline are not counted."""

    @property
    def frames(self) -> int: ...
    @property
    def bytes_a_frame(self) -> int:
        """Bytes of one descriptor of the page map."""

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the page map and of what the allocator keeps beside it."""

    @property
    def dram_bytes(self) -> int:
        """Those of them that are in DRAM: all but the map in a region. A persistent map is in both
        places."""

    def stats(self) -> _Stats:
        """``free`` and ``offline`` frames; ``runs``, for each order how many runs of it the free
        frames hold; ``fragmentation``, the share of the free frames outside free areas."""

    def validate(self) -> list[str]:
        """Walks everything. What is wrong, in sentences. Nobody else may use the allocator
        meanwhile."""

    def flush(self) -> None:
        """Makes a persistent map durable: every get and put that returned before. Nothing to do for
        another."""
