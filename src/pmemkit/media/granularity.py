"""Which granularity holds: what a store needs to be durable, decided from what the platform says.

The rules are libpmem2's. Anonymous memory is ``byte``. Elsewhere the kernel is asked for a
``MAP_SYNC`` mapping: refused means ``page``; granted means ``cacheline``, and ``byte`` where the
caches themselves survive a power failure (eADR: every region of the machine says ``cpu_cache``, and
there is at least one). An option or the environment may override what was found; the decision keeps
both, and the sentences that led to it.

Invariants:
1. :func:`decide` reads nothing but its arguments and touches the platform through its protocol.
2. The decision is never coarser than what the caller requires: that is :class:`NotSupported`.
3. ``MAP_SYNC`` is used only where it was granted.

What this does not do: map anything, look at files, remember.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from pmemkit.errors import InvalidArgument, NotSupported

__all__ = [
    "ENVIRONMENT",
    "ENVIRONMENT_LIBPMEM2",
    "GRANULARITIES",
    "Backing",
    "Decision",
    "Granularity",
    "Platform",
    "decide",
    "parse_granularity",
]

Granularity = Literal["byte", "cacheline", "page"]
Backing = Literal["file", "block device", "device dax", "memfd", "hugetlb", "anonymous", "remote"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
"""The finest first."""

ENVIRONMENT = "PMEMKIT_GRANULARITY"
ENVIRONMENT_LIBPMEM2 = "PMEM2_FORCE_GRANULARITY"
_WORDS_LIBPMEM2: dict[str, Granularity] = {
    "BYTE": "byte",
    "CACHE_LINE": "cacheline",
    "CACHELINE": "cacheline",
    "PAGE": "page",
}


class Platform(Protocol):
    """What must be asked of the machine. The real one is :class:`LinuxPlatform`."""

    def map_sync_granted(self, fd: int) -> bool:
        """Whether the kernel grants a ``MAP_SYNC`` mapping of this file."""

    def persistence_domains(self) -> Mapping[str, str]:
        """The persistence domain of every region the kernel knows, by the region's name."""

    def volatile_because(self, fd: int) -> str | None:
        """Why the content of this file does not outlive a restart, if it does not."""

    def persistence_domain_of(self, fd: int) -> str | None:
        """The persistence domain of the region under this file, where there is one."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The granularity in force, the one the platform offers, and how that was found out."""

    granularity: Granularity
    found: Granularity
    map_sync: bool
    why: tuple[str, ...]


def parse_granularity(text: str) -> Granularity:
    """The granularity of this name."""
    if text not in GRANULARITIES:
        raise InvalidArgument(f"{text!r} is not a granularity; say byte, cacheline or page")
    return text


def decide(
    backing: Backing,
    fd: int | None,
    platform: Platform,
    *,
    override: str | None = None,
    environment: Mapping[str, str],
    required: str | None = None,
) -> Decision:
    """The granularity of a backing, with its reasons.

    ``override`` beats ``PMEMKIT_GRANULARITY`` in ``environment``, which beats libpmem2's
    ``PMEM2_FORCE_GRANULARITY``. Where the outcome is coarser than ``required`` it is
    :class:`NotSupported`.
    """
    if backing == "remote":
        found, granted, why = _of_remote(override)
        forced, forced_by = None, ""
    elif fd is None:
        found, granted, why = _of_memory(override)
        forced, forced_by = None, ""
    else:
        found, granted, why = _of_file(backing, fd, platform)
        forced, forced_by = _override(override, environment)
    granularity = forced or found
    if forced is not None:
        why.append(f"{forced_by} says {forced}; the platform alone offers {found}.")
    if GRANULARITIES.index(granularity) < GRANULARITIES.index(found):
        why.append("If that promise is wrong, a power failure loses what was acknowledged.")
    decision = Decision(granularity, found, granted and granularity != "page", tuple(why))
    if required is not None:
        _check_required(decision, parse_granularity(required))
    return decision


def _of_memory(override: str | None) -> tuple[Granularity, bool, list[str]]:
    """Private memory: the environment does not matter, as in libpmem2."""
    if override is not None and parse_granularity(override) != "byte":
        text = f"anonymous memory is always byte, not {override}; memfd:SIZE takes an override"
        raise NotSupported(text)
    return "byte", False, ["Anonymous memory: nothing outlives the process, so nothing is flushed."]


def _of_remote(override: str | None) -> tuple[Granularity, bool, list[str]]:
    """A region of another process."""
    if override is not None and parse_granularity(override) != "page":
        text = f"a remote region is always page, not {override}: a commit makes it durable"
        raise NotSupported(text)
    return "page", False, ["A region of another process: a store is durable after a commit there."]


def _of_file(backing: Backing, fd: int, platform: Platform) -> tuple[Granularity, bool, list[str]]:
    if not platform.map_sync_granted(fd):
        text = f"The kernel does not grant MAP_SYNC for this {backing}, so a store is durable"
        return "page", False, [f"{text} only after fdatasync or msync."]
    why = ["The kernel grants MAP_SYNC, so cache lines written back are durable."]
    domains = platform.persistence_domains()
    others = sorted(name for name, domain in domains.items() if domain != "cpu_cache")
    if domains and not others:
        regions = f"{len(domains)} of {len(domains)} regions"
        why.append(f"CPU caches survive a power failure (eADR): {regions} say cpu_cache.")
        return "byte", True, why
    if others:
        why.append(f"No eADR: {others[0]} says {domains[others[0]] or 'nothing'}, not cpu_cache.")
    else:
        why.append("No eADR: the kernel knows no region that would say cpu_cache.")
    return "cacheline", True, why


def _override(option: str | None, environment: Mapping[str, str]) -> tuple[Granularity | None, str]:
    """The forced granularity and who forces it."""
    if option is not None:
        return parse_granularity(option), "The granularity option"
    text = environment.get(ENVIRONMENT)
    if text:
        try:
            return parse_granularity(text), ENVIRONMENT
        except InvalidArgument as refusal:
            raise InvalidArgument(f"{ENVIRONMENT}: {refusal.message}") from None
    text = environment.get(ENVIRONMENT_LIBPMEM2)
    if text:
        word = _WORDS_LIBPMEM2.get(text.upper())
        if word is None:
            words = "BYTE, CACHE_LINE or PAGE"
            raise InvalidArgument(f"{ENVIRONMENT_LIBPMEM2}: {text!r} is not one of {words}")
        return word, ENVIRONMENT_LIBPMEM2
    return None, ""


def _check_required(decision: Decision, required: Granularity) -> None:
    if GRANULARITIES.index(decision.granularity) > GRANULARITIES.index(required):
        text = f"granularity {required} is required and {decision.granularity} is what there is"
        raise NotSupported(f"{text}. {' '.join(decision.why)}", op="open")
