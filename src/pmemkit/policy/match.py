"""Which rule is for a region.

The first rule that matches wins. What a match does not name matches everything.

What this does not do: decide what becomes of the region.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import lru_cache

from pmemkit.policy.model import Match, MemdevState, Policy, RegionState, Rule

__all__ = ["any_glob", "members_of", "rule_finder"]

_Test = Callable[[RegionState], bool]


@lru_cache(maxsize=4096)
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """What any of the globs matches."""
    return re.compile("|".join(map(translate, globs)))


def any_glob(globs: Iterable[str], names: Iterable[str | None]) -> bool:
    """True when one of the globs matches one of the names."""
    wanted = tuple(globs)
    if not wanted:
        return False
    match = _pattern(wanted).match
    return any(name and match(name) for name in names)


def _tests(match: Match) -> list[_Test]:
    """What a region has to pass, of what the match names. The cheap ones come first."""
    tests: list[_Test] = []
    if match.nature is not None:
        tests.append(lambda region: region.nature == match.nature)
    if match.type is not None:
        tests.append(lambda region: region.type == match.type)
    if match.size_least is not None:
        least = match.size_least
        tests.append(lambda region: region.size >= least)
    if match.size_most is not None:
        most = match.size_most
        tests.append(lambda region: region.size <= most)
    if match.node is not None:
        nodes = frozenset(match.node)
        tests.append(lambda region: _node_of(region) in nodes)
    if match.persistence is not None:
        words = frozenset(match.persistence)
        tests.append(lambda region: region.persistence in words)
    if match.serial is not None:
        serials = frozenset(match.serial)
        tests.append(lambda region: any(each.serial in serials for each in region.dimms))
    for globs, names in (
        (match.name, lambda region: (region.dev,)),
        (match.dimm, lambda region: [n for dimm in region.dimms for n in (dimm.dev, dimm.id)]),
        (match.tier, lambda region: (region.tier,)),
    ):
        if globs is not None:
            tests.append(_glob_test(globs, names))
    return tests


def _glob_test(
    globs: tuple[str, ...], names: Callable[[RegionState], Iterable[str | None]]
) -> _Test:
    fits = _pattern(globs).match

    def test(region: RegionState) -> bool:
        return any(name and fits(name) for name in names(region))

    return test


def _node_of(region: RegionState) -> int | None:
    return region.target_node if region.target_node is not None else region.node


def rule_finder(policy: Policy) -> Callable[[RegionState], Rule | None]:
    """Which rule is for a region: a function of the region, made once for all of them."""
    rules = [(rule, _tests(rule.match)) for rule in policy.rules]

    def find(region: RegionState) -> Rule | None:
        for rule, tests in rules:
            for passes in tests:
                if not passes(region):
                    break
            else:
                return rule
        return None

    return find


def members_of(globs: Iterable[str], memdevs: Iterable[MemdevState]) -> tuple[MemdevState, ...]:
    """The CXL memory devices that names or serial numbers (``0x…``) mean, in their own order."""
    wanted = tuple(globs)
    return tuple(
        each
        for each in memdevs
        if any_glob(wanted, (each.dev, None if each.serial is None else hex(each.serial)))
    )
