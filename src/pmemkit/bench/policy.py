"""Planning against parsing: 1,000 regions and 100 rules.

The peer of planning is reading the very same machine and policy: the machine as JSON into records,
and the policy file into its rules. A second row has bare ``json`` and ``tomllib`` as the peer;
these check nothing. Only the last rules match most regions, so that most rules are tried on each.

What this does not do: look at a machine; that is a matter of sysfs, and of reading label areas.
"""

import json
import time
import tomllib
from collections.abc import Callable, Sequence
from typing import Final

from pmemkit.bench._runner import Report as BenchReport
from pmemkit.bench._runner import alternate, parse_options, suite
from pmemkit.policy.model import (
    VERBS,
    Content,
    DimmState,
    MachineState,
    NamespaceState,
    Plan,
    RegionState,
    as_plain,
)
from pmemkit.policy.plain import from_plain
from pmemkit.policy.plan import plan
from pmemkit.policy.schema import parse_policy

__all__ = ["main"]

_REGIONS: Final = 1000
_RULES: Final = 100
_GIB: Final = 1 << 30
_MODES: Final = ("raw", "sector", "fsdax", "devdax")


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, _ = parse_options("policy", arguments, runs=9, seconds=1.0)
    report = BenchReport(options)
    machine, text = _machine(), _policy()
    described = json.dumps(as_plain(machine))
    policy = parse_policy(text)
    found = plan(machine, policy)
    _require_work(found)

    def planning() -> Plan:
        return plan(machine, policy)

    def parsing() -> None:
        from_plain(MachineState, json.loads(described))
        parse_policy(text)

    def bare() -> None:
        json.loads(described)
        tomllib.loads(text)

    for name, peer, peer_name in (
        ("plan 1000 regions x 100 rules", parsing, "parsing machine and policy into records"),
        ("plan 1000 regions x 100 rules, bare", bare, "json and tomllib alone"),
    ):
        if options.wanted(name):
            ours, theirs = alternate([_timed(planning), _timed(peer)], options.runs)
            report.add(name, "ms", ours, theirs, peer_name, less_is_better=True)
    report.write()


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    return run


def _require_work(found: Plan) -> None:
    """A plan that has nothing to say would be no measure."""
    concerned = {each.region for each in found.steps} | {each.region for each in found.refused}
    assert len(concerned) > _REGIONS // 2, f"only {len(concerned)} regions are concerned"
    assert len(found.steps) > _REGIONS, f"only {len(found.steps)} steps"


def _machine() -> MachineState:
    """Regions of 64 GiB: some free, some in use as wanted, some otherwise."""
    return MachineState(
        bus="kernel",
        name="a rack",
        regions=tuple(_region(number) for number in range(_REGIONS)),
        dram=4096 * _GIB,
        verbs=frozenset(VERBS),
    )


def _region(number: int) -> RegionState:
    size = 64 * _GIB
    here = []
    if number % 3:
        half = size // 2
        content = Content(kind="filesystem", name="ext4") if number % 7 == 0 else None
        here = [
            NamespaceState(
                dev=f"namespace{number}.{place}",
                mode=_MODES[(number + place) % 3],
                size=half,
                offset=place * half,
                capacity=half,
                uuid=f"00000000-0000-0000-0000-{number:08x}{place:04x}",
                content=content,
            )
            for place in range(2)
        ]
    free = size - sum(each.size for each in here)
    return RegionState(
        dev=f"region{number}",
        size=size,
        nature="memory" if number % 5 == 0 else "storage",
        available=free,
        largest=free,
        node=number % 8,
        target_node=8 + number % 8,
        dimms=(DimmState(dev=f"nmem{number}", id=f"8680-{number:08x}", serial=number),),
        namespaces=tuple(here),
    )


def _policy() -> str:
    """Rules for single dimms, by serial or glob, then rules for many."""
    rules = [
        f'[[rule]]\nname = "single {number}"\n'
        + (
            f'match = {{ serial = {number * 7} }}\nwant = {{ mode = "raw" }}\n'
            if number % 2
            else f'match = {{ dimm = "8680-{number * 11:06x}0?" }}\nwant = {{ mode = "devdax" }}\n'
        )
        for number in range(_RULES - 2)
    ]
    rules.append(
        '[[rule]]\nname = "memory"\nmatch = { nature = "memory" }\n'
        'want = { personality = "memory" }\n'
    )
    rules.append(
        '[[rule]]\nname = "the rest"\n'
        '[[rule.share]]\nsize = "60%"\nmode = "sector"\nfilesystem = "ext4"\n'
        '[[rule.share]]\nsize = "rest"\nmode = "fsdax"\n'
    )
    return "version = 1\n" + "\n".join(rules)


if __name__ == "__main__":
    raise SystemExit(main())
