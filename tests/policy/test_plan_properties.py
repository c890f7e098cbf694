"""The planner on random machines and policies, carried out on a machine of records.

The planner decides, ``apply`` and ``undo`` carry out, and nothing here asks the planner whether the
result is right: :func:`machines.is_reached` and :func:`machines.guarded` are written apart from it.
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from machines import SCARCE, guarded, is_reached, machines, policies

from pmemkit.errors import InvalidArgument, SystemFailure
from pmemkit.policy.apply import apply, undo
from pmemkit.policy.journal import Journal
from pmemkit.policy.match import rule_finder
from pmemkit.policy.model import MachineState, Plan, Policy, as_plain
from pmemkit.policy.plain import from_plain
from pmemkit.policy.plan import plan
from pmemkit.testing.simulated_bus import SimulatedBus

many = settings(
    max_examples=5000 if os.environ.get("PMEMKIT_SOAK") == "1" else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Dies(BaseException):
    """The process ends here, without another word."""


@pytest.fixture(scope="module", autouse=True)
def _quick_disk():
    """Journals of examples by the hundred, where syncing them costs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _fd: None)
        yield


def journals():
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    return tempfile.TemporaryDirectory(dir=place)


def converge(bus: SimulatedBus, policy: Policy, directory: str):
    return apply(bus, policy, Journal(Path(directory) / "journal"))


def essence(machine: MachineState):
    """A machine without the names and uuids that chance gave."""

    def plain(thing):
        if isinstance(thing, dict):
            names = ("dev", "uuid", "blockdev")
            return {k: plain(v) for k, v in thing.items() if k not in names}
        return [plain(each) for each in thing] if isinstance(thing, list) else thing

    return plain(as_plain(machine.regions)), as_plain(machine.memdevs)


@many
@given(machines(), policies())
def test_apply_reaches_what_is_wanted_and_undo_goes_back(machine, policy):
    bus = SimulatedBus(machine)
    start = bus.observe()
    protected = guarded(start, policy)
    with journals() as directory:
        outcome = converge(bus, policy, directory)
        note(f"{outcome}")
        assert outcome.error is None
        end = bus.observe()
        left = plan(end, policy)
        assert left.steps == ()
        refused = {each.region for each in left.refused}
        for region in end.regions:
            rule = rule_finder(policy)(region)
            if rule is not None and region.dev not in refused:
                assert is_reached(region, rule) == []
        after = {each.uuid: each for region in end.regions for each in region.namespaces}
        for uuid, was in protected.items():
            # A filesystem may be mounted, a namespace enabled; nothing else happens to it.
            now = after[uuid]
            same = replace(now, mounts=was.mounts, enabled=was.enabled, dax=was.dax)
            if not was.enabled or (was.content is None and was.damaged is None):
                same = replace(same, content=was.content, damaged=was.damaged)
            assert same == was
        back = undo(bus, Journal(Path(directory) / "journal"))
        assert back.error is None
        assert essence(bus.observe()) == essence(start)


def contested(outcome):
    return any("is the mount point of" in each.why for each in outcome.plan.refused)


@many
@given(machines(), policies(), st.data())
def test_interrupted_anywhere_it_converges_all_the_same(machine, policy, data):
    straight = SimulatedBus(machine)
    with journals() as directory:
        undisturbed = converge(straight, policy, directory)
    assume(straight.points)
    bus = SimulatedBus(machine)
    bus.stop_at = data.draw(st.integers(1, straight.points))
    how = data.draw(st.sampled_from([Dies, lambda: SystemFailure("it failed", errno=5)]))
    bus.stop = how
    with journals() as directory:
        try:
            outcome = converge(bus, policy, directory)
            assert outcome.error is not None
        except Dies:
            pass
        again = data.draw(st.sampled_from(["apply", "undo"]))
        if again == "undo":
            back = undo(bus, Journal(Path(directory) / "journal"))
            note(f"{back}")
            assert back.error is None
            assert essence(bus.observe()) == essence(SimulatedBus(machine).observe())
        outcome = converge(bus, policy, directory)
        note(f"{outcome}")
        assert outcome.error is None
        # Which page map still goes into scarce DRAM depends on what is there already, and so does
        # which region gets a mount point that several want.
        if machine.dram != SCARCE and not contested(undisturbed) and not contested(outcome):
            assert essence(bus.observe()) == essence(straight.observe())
        assert plan(bus.observe(), policy).steps == ()


@many
@given(machines(), policies(), st.data())
def test_a_region_that_goes_away_before_apply(machine, policy, data):
    bus = SimulatedBus(machine)
    planned = plan(bus.observe(), policy)
    concerned = sorted({each.region for each in planned.steps} & {r.dev for r in machine.regions})
    assume(concerned)
    gone = data.draw(st.sampled_from(concerned))
    bus.remove_region(gone)
    before = bus.observe()
    with journals() as directory, pytest.raises(InvalidArgument, match=gone):
        apply(bus, policy, Journal(Path(directory) / "journal"), planned=planned)
    assert bus.observe() == before


@many
@given(machines(), policies(), st.randoms())
def test_the_order_in_which_regions_are_found_changes_nothing(machine, policy, random):
    # What regions share, room for page maps and mount points, goes to the first; so nothing shared.
    machine = replace(SimulatedBus(machine).observe(), dram=None)
    paths = [s.want.mount for r in policy.rules for s in r.shares if s.want.mount]
    assume(not paths)
    shuffled = list(machine.regions)
    random.shuffle(shuffled)

    def steps_of(found: Plan):
        """Each region's steps, counted from its first."""
        chains: dict[str, list[object]] = {}
        numbers = {}
        for each in found.steps:
            chain = chains.setdefault(each.region, [])
            chain.append(replace(each, number=0, target=numbers.get(each.target, each.target)))
            numbers[f"@{each.number}"] = f"@{len(chain)}"
        return chains, {each.region: each for each in found.refused}

    assert steps_of(plan(machine, policy)) == steps_of(
        plan(replace(machine, regions=tuple(shuffled)), policy)
    )


@many
@given(machines(), policies())
def test_records_survive_json(machine, policy):
    machine = SimulatedBus(machine).observe()
    found = plan(machine, policy)
    for record in (machine, policy, found):
        text = json.dumps(as_plain(record))
        assert from_plain(type(record), json.loads(text)) == record
