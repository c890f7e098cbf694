"""Which rule is for a region.

The first rule that matches wins. What a match does not name matches everything.

What this does not do: decide what becomes of the region.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from functools import lru_cache

from pmemkit.policy.model import Match, MemdevState, Policy, RegionState, Rule

__all__ = ["any_glob", "first_rule", "matches", "members_of"]


@lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def any_glob(globs: Iterable[str], names: Iterable[str | None]) -> bool:
    """True when one of the globs matches one of the names."""
    known = [name for name in names if name]
    return any(_pattern(glob).match(name) for glob in globs for name in known)


def matches(match: Match, region: RegionState) -> bool:
    """True when the rule is for this region."""
    node = region.target_node if region.target_node is not None else region.node
    exact = (
        (match.nature, region.nature),
        (match.type, region.type),
    )
    if any(wanted is not None and wanted != is_ for wanted, is_ in exact):
        return False
    if match.size_least is not None and region.size < match.size_least:
        return False
    if match.size_most is not None and region.size > match.size_most:
        return False
    if match.node is not None and node not in match.node:
        return False
    if match.persistence is not None and region.persistence not in match.persistence:
        return False
    if match.serial is not None and not any(d.serial in match.serial for d in region.dimms):
        return False
    dimms = [name for dimm in region.dimms for name in (dimm.dev, dimm.id)]
    globs: tuple[tuple[tuple[str, ...] | None, Sequence[str | None]], ...] = (
        (match.name, (region.dev,)),
        (match.dimm, dimms),
        (match.tier, (region.tier,)),
    )
    return all(wanted is None or any_glob(wanted, names) for wanted, names in globs)


def first_rule(policy: Policy, region: RegionState) -> Rule | None:
    """The rule of a region."""
    return next((rule for rule in policy.rules if matches(rule.match, region)), None)


def members_of(globs: Iterable[str], memdevs: Iterable[MemdevState]) -> tuple[MemdevState, ...]:
    """The CXL memory devices that names or serial numbers (``0x…``) mean, in their own order."""
    wanted = tuple(globs)
    return tuple(
        each
        for each in memdevs
        if any_glob(wanted, (each.dev, None if each.serial is None else hex(each.serial)))
    )
