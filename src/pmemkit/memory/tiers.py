"""Tiers: what the speed of a region says about its place in a pool.

What this does not do: find out how fast a region is (:mod:`pmemkit.memory.attributes`), move
anything, look at who uses what.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.attributes import Attribute
    from pmemkit.memory.regions import Opened, RegionSpec

__all__ = ["rank_of", "rank_seen_from", "require_sound", "weight_of"]

_LOCAL_NS = 100
"""What local memory takes, about: the SLIT's distance of 10."""
_NS_PER_DISTANCE = 10
_LOCAL, _NO_WAY = 10, 255
"""Of the SLIT."""
_WEIGHT_UNIT = 10**9
_RANK_MAX = (1 << 32) - 1


def require_sound(spec: "RegionSpec") -> None:
    """Refuses attributes that say nothing."""
    for name in ("latency_ns", "bandwidth", "distance"):
        value = getattr(spec, name)
        if value is not None and not 0 < value <= _RANK_MAX * _WEIGHT_UNIT:
            raise InvalidArgument(f"{name}={value} is none that a region has", op="add")


def rank_of(spec: "RegionSpec") -> int:
    """The rank that was given, or the nanoseconds a region takes longer than local memory.

    A distance counts where no latency is known; a region of which neither is known ranks as local
    memory, so regions without attributes are equal.
    """
    if spec.rank is not None:
        return spec.rank
    if spec.latency_ns is not None:
        latency = spec.latency_ns
    elif spec.distance is not None:
        latency = spec.distance * _NS_PER_DISTANCE
    else:
        return 0
    return min(_RANK_MAX, max(0, round(latency - _LOCAL_NS)))


def rank_seen_from(member: "Opened", distances: Mapping[int, int]) -> tuple[int, int]:
    """The rank of a region for a thread whose node has these distances, and what comes before what
    else is equal.

    The way to another node counts where it is more than the region's rank; what the user gave is
    not changed.
    """
    rank = rank_of(member.spec)
    given = any(each.origin == "user" for each in _of_latency(member))
    if member.node is None or member.spec.rank is not None or given:
        return rank, _LOCAL
    distance = distances.get(member.node, _NO_WAY)
    return max(rank, (distance - _LOCAL) * _NS_PER_DISTANCE), distance


def _of_latency(member: "Opened") -> list["Attribute"]:
    known = member.attributes
    return [known[name] for name in ("latency_ns", "distance") if name in known]


def weight_of(spec: "RegionSpec") -> int:
    """The weight that was given, or one for each 1 GB/s; one where nothing is known."""
    if spec.weight is not None:
        return spec.weight
    if spec.bandwidth is None:
        return 1
    return min(_RANK_MAX, max(1, round(spec.bandwidth / _WEIGHT_UNIT)))
