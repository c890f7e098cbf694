"""What a step costs: the page map, the wear, the time.

The page map is Linux's: 64 bytes for each 4 KiB page. Times are guesses from what each step has to
write, on media that take 1 GB/s; they tell seconds from minutes and nothing finer. The forecast of
wear knows the endurance that the owner or the device states, and assumes a rate that it names.

What this does not do: measure.
"""

from typing import Final

from pmemkit.policy.model import RegionState, Verb
from pmemkit.units import format_size

__all__ = ["map_size", "step_seconds", "wear_forecast"]

_DESCRIPTOR_SIZE: Final = 64
_PAGE: Final = 4096
_BYTES_A_SECOND: Final = 1_000_000_000
_BLOCK_SECONDS: Final = 0.1
"""To take a memory block online or offline; one that is full of pages takes longer."""
_SECONDS: Final[dict[Verb, float]] = {
    "create-cxl-region": 1.0,
    "destroy-cxl-region": 1.0,
    "init-labels": 0.5,
    "create-namespace": 0.5,
    "destroy-namespace": 0.5,
    "reconfigure-namespace": 1.0,
    "enable-namespace": 0.5,
    "reconfigure-device": 1.0,
    "online-memory": 0.5,
    "offline-memory": 1.0,
    "mkfs": 2.0,
    "mount": 0.2,
    "umount": 0.5,
}


def map_size(size: int) -> int:
    """Bytes of Linux's page map for ``size`` bytes."""
    return -(-size // _PAGE) * _DESCRIPTOR_SIZE


def step_seconds(verb: Verb, size: int, *, mode: str | None = None, block_size: int = 0) -> float:
    """About how long a step takes. ``size``: of what it concerns."""
    seconds = _SECONDS[verb]
    if verb in ("create-namespace", "reconfigure-namespace"):
        # Mode sector zeroes its map, four bytes a sector; the others write a page map.
        written = size // 1024 if mode == "sector" else map_size(size) if mode != "raw" else 0
        seconds += written / _BYTES_A_SECOND
    if verb in ("reconfigure-device", "online-memory", "offline-memory") and block_size:
        seconds += size / block_size * _BLOCK_SECONDS
    return round(seconds, 1)


def wear_forecast(region: RegionState) -> str:
    """What using a region that wears as memory comes to."""
    used = "" if region.life_used is None else f"; {region.life_used} % of its life are used"
    if region.endurance is None:
        return f"its endurance is not known, so nothing can be forecast{used}"
    fills = region.endurance / region.size if region.size else 0.0
    rated = f"rated for {format_size(region.endurance)}, {fills:,.0f} times its size{used}"
    left = 100 - (region.life_used or 0)
    if left <= 0:
        return f"{rated}: nothing is left of the life that it was rated for"
    days = fills * left / 100 / (24 * 60)
    return (
        f"{rated}; written "
        f"once over every minute it lasts about {days:,.0f} days, once every hour {days * 60:,.0f}"
    )
