"""The cache of a region: which modes there are, and how much RAM it gets.

What this does not do: cache; the core does (``rust/pmemkit-core/src/cache``).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pmemkit.errors import InvalidArgument
from pmemkit.units import parse_size

if TYPE_CHECKING:
    from pmemkit._native.block import Cache, Device

__all__ = ["CACHE_MODES", "CacheMode", "add_cache", "default_size", "describe"]

CacheMode = Literal["off", "writeback", "writethrough"]
CACHE_MODES: tuple[CacheMode, ...] = ("off", "writeback", "writethrough")
"""``writeback``: media get what is old, much or flushed; ``writethrough``: before the answer."""

_BLOCK = 4096
_FREE_SHARE = 8
"""One in so many bytes of the memory that is free."""
_LEAST = 1 << 20


def default_size(device_size: int, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes for a device of this size: an eighth of the memory that is available, and no more than
    the device has."""
    available = 0
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                available = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # Then it is the least.
    wanted = min(max(available // _FREE_SHARE, _LEAST), device_size)
    return max(-(-wanted // _BLOCK), 1) * _BLOCK


def add_cache(below: "Device", mode: str, size: int | str | None) -> "Cache":
    """A cache over a stack."""
    from pmemkit._native import block

    if mode not in CACHE_MODES[1:]:
        raise InvalidArgument(f"cache {mode!r} is none of {', '.join(CACHE_MODES)}", op="cache")
    if size is None:
        size = default_size(below.size)
    return block.cache(below, mode=mode, size=parse_size(size) if isinstance(size, str) else size)


def describe(stats: dict[str, int]) -> str:
    """What a cache did, on one line."""
    reads = stats["read_hits"] + stats["read_misses"]
    writes = stats["write_hits"] + stats["write_misses"]
    share = 100 * stats["read_hits"] / reads if reads else 0.0
    return (
        f"{reads} block reads, {share:.1f} % of them hits; {writes} block writes, "
        f"{stats['blocks_written']} written to media ({stats['bytes_written']} bytes)"
    )
