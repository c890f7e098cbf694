"""What a region gets where nobody said: a cache, levelling; and why.

The first of these that holds is the reason for the cache to be off; otherwise it is on:

1. it is read-only;
2. it is volatile, memory by nature, or durable at once (granularity ``byte``), and no
   finite endurance is known: there is nothing to spare;
3. a file system is mounted on it: the kernel's page cache is above it;
4. granularity is ``page``: the kernel's page cache is below it. But with strict ordering, mode
   sector pays for each write with orderings that a cache saves.

Levelling (least-worn) is on in mode sector where a finite endurance is known. The figures behind
these rules are in ``docs/evidence/issue-6-measurements.md``.

Invariants:
1. :func:`decide` reads nothing but its arguments.
2. What was asked for is what there is.

What this does not do: cache, or level.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pmemkit.errors import PmemError
from pmemkit.media.granularity import Granularity
from pmemkit.storage.caching import CacheMode
from pmemkit.storage.levelling import Levelling
from pmemkit.storage.sector import Ordering

if TYPE_CHECKING:
    from pmemkit.bus.nature import Nature, Verdict
    from pmemkit.storage.region import Region

__all__ = ["Client", "Defaults", "Facts", "choose", "decide", "facts_of"]

Client = Literal["nbd", "mount"]
"""Who uses it: NBD clients, of which nothing is known, or a file system of this kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a region is, as far as it matters here."""

    mode: str = "raw"
    ordering: Ordering = "default"
    nature: "Nature" = "storage"
    granularity: Granularity = "page"
    endurance: int | None = None
    """Bytes that may be written to it in its life, where that is stated."""
    wears: bool = False
    """Its device reports wear, or its endurance is stated."""
    read_only: bool = False
    volatile_because: str | None = None

    @property
    def finite(self) -> bool:
        """Whether writes are known to wear it. Where a store is durable at once, what wears may be
        the flash that a battery saves to: only a stated endurance counts there."""
        return self.endurance is not None or (self.wears and self.granularity != "byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a region gets."""

    cache: CacheMode
    because: str
    """Of the cache."""
    levelling: Levelling = "off"
    """For the engine of mode sector."""
    levelling_because: str | None
    """``None`` where there is nothing to level: in other modes."""
    notes: tuple[str, ...] = ()
    """What could not be found out."""

    def record(self) -> dict[str, Any]:
        """What a script is told."""
        return {
            "cache": self.cache,
            "cache_because": self.because,
            "levelling": self.levelling,
            "levelling_because": self.levelling_because,
        }

    def __str__(self) -> str:
        cache = f"cache {self.cache}: {self.because}"
        if self.levelling_because is None:
            return cache
        return f"{cache}; levelling {self.levelling}: {self.levelling_because}"


def decide(facts: Facts, client: Client) -> Defaults:
    """What a region of these facts gets."""
    levelling, why = _levelling(facts)
    against = _against(facts, client)
    if against is not None:
        return Defaults(cache="off", because=against, levelling=levelling, levelling_because=why)
    spared = "each write wears it" if facts.finite else "it is taken for storage, which may wear"
    if facts.granularity == "page":
        spared = "strict ordering makes each write that reaches media dear"
    because = f"clients may have no cache of their own, and {spared}"
    return Defaults(cache="writeback", because=because, levelling=levelling, levelling_because=why)


def _levelling(facts: Facts) -> tuple[Levelling, str | None]:
    """Whether sectors are moved about, and why."""
    if facts.mode != "sector":
        return "off", None
    if facts.read_only:
        return "off", "nothing is written to it"
    if not facts.finite:
        return "off", "nothing says that it wears"
    return "least-worn", "each write wears it"


def _against(facts: Facts, client: Client) -> str | None:
    """The first reason against a cache."""
    if facts.read_only:
        return "nothing is written to it"
    if facts.volatile_because is not None and not facts.finite:
        return f"it is in RAM already: {facts.volatile_because}"
    if facts.nature == "memory" and not facts.finite:
        return "memory may be written without end"
    if client == "mount":
        return "the kernel's page cache is above it and leaves little to save"
    if facts.granularity == "byte" and not facts.finite:
        return "what is stored is durable at once, and nothing says that it wears"
    if facts.granularity == "page" and (facts.mode, facts.ordering) != ("sector", "strict"):
        return "the kernel's page cache is below it"
    return None


def choose(
    region: "Region",
    client: Client,
    cache: CacheMode | None = None,
    levelling: Levelling | None = None,
) -> Defaults:
    """What an opened region gets, and what somebody asked for in place of that."""
    verdict, notes = _verdict(region)
    chosen = replace(decide(facts_of(region, verdict), client), notes=tuple(notes))
    asked = "as asked for"
    if cache is not None:
        chosen = replace(chosen, cache=cache, because=asked)
    if levelling is not None:
        chosen = replace(chosen, levelling=levelling, levelling_because=asked)
    return chosen


def facts_of(region: "Region", verdict: "Verdict | None") -> Facts:
    """What matters of an opened region; the verdict on its nature where there is one."""
    return Facts(
        mode=region.mode,
        ordering=region.ordering,
        nature="storage" if verdict is None else verdict.nature,
        granularity=region.granularity,
        endurance=None if verdict is None else verdict.endurance,
        wears=verdict is not None and verdict.wears,
        read_only=region.read_only,
        volatile_because=region.opened.volatile_because,
    )


def _verdict(region: "Region") -> "tuple[Verdict | None, list[str]]":
    """The nature of a region; where that cannot be found out it is served all the same."""
    from pmemkit.bus.verdicts import verdict_at

    try:
        return verdict_at(region.path, None if region.place is None else region.place.namespace)
    except PmemError as failure:
        return None, [f"its nature is not known: {failure}"]
