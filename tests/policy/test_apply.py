"""The engine: what it does in which order, what it refuses, and what every interruption leaves."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace, NotSupported, PmemError
from pmemkit.policy import apply as engine
from pmemkit.policy.apply import apply, undo
from pmemkit.policy.journal import Journal
from pmemkit.policy.model import (
    Entry,
    Guards,
    Keep,
    MachineState,
    Plan,
    Policy,
    Refusal,
    RegionState,
    Step,
)


class Dies(BaseException):
    """The process ends here, without another word."""


@dataclass
class Toy:
    """A bus whose regions hold a word each. A step makes a word of a region another one."""

    words: dict[str, str]
    kills: set[str] = field(default_factory=set)
    """Places at which the process dies, such as ``2 kept`` in step 2."""
    fails: dict[str, OSError] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    """Regions that somebody wrote to since."""
    looks: int = 0

    def observe(self) -> MachineState:
        self.looks += 1
        regions = tuple(
            RegionState(dev=dev, size=1, because=word) for dev, word in self.words.items()
        )
        return MachineState(bus="image", name="toy", regions=regions)

    def _at(self, place: str) -> None:
        self.log.append(place)
        if place in self.kills:
            self.kills.discard(place)
            raise Dies
        if place in self.fails:
            raise self.fails.pop(place)

    def perform(self, step: Step, keep: Keep, made: Mapping[int, Mapping[str, Any]]):
        name = f"{step.region} {step.params['mode']}"
        self._at(f"{name} begin")
        keep({"was": self.words[step.region].encode()})
        self._at(f"{name} kept")
        self.words[step.region] = "half"
        self._at(f"{name} half")
        self.words[step.region] = step.params["mode"]
        self._at(f"{name} whole")
        return {"dev": step.region, "seen": sorted(made)}

    def reverse(self, entry: Entry, *, force: bool = False) -> str:
        region, name = entry.step.region, f"back {entry.step.region} {entry.step.params['mode']}"
        self._at(f"{name} begin")
        if "was" not in entry.kept:
            return "nothing had been changed"
        if entry.step.verb == "mkfs":
            raise NotSupported("a file system cannot be taken back")
        if region in self.written and not force:
            raise Corrupt(f"{region} was written to since")
        self.words[region] = "half"
        self._at(f"{name} half")
        self.words[region] = entry.kept["was"].decode()
        self._at(f"{name} whole")
        return f"{region} is {self.words[region]} again"


def planner(machine: MachineState, policy: Policy) -> Plan:
    """Each glob is ``region=word``; ``region=!word`` is refused; a region that is not there counts
    only once it is."""
    steps, refused = [], []
    for wish in policy.guards.protect:
        dev, word = wish.split("=")
        region = machine.region(dev)
        if region is None or region.because == word:
            continue
        if word.startswith("!"):
            refused.append(Refusal(region=dev, why="a guard"))
            continue
        steps.append(
            Step(
                number=len(steps) + 1,
                verb="mkfs" if word == "fs" else "reconfigure-namespace",
                reverse="none" if word == "fs" else "contents",
                target=dev,
                region=dev,
                why=f"it is {region.because}",
                params={"mode": word},
                seconds=random.random(),
            )
        )
    return Plan(steps=tuple(steps), refused=tuple(refused))


def policy(*wishes: str) -> Policy:
    return Policy(guards=Guards(protect=wishes))


WANTED = ("region0=sector", "region1=fsdax", "region2=devdax")


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def toy() -> Toy:
    return Toy({"region0": "raw", "region1": "raw", "region2": "raw"})


def run(toy, journal, wishes=WANTED, **more):
    return apply(toy, policy(*wishes), journal, planner=planner, **more)


START = {"region0": "raw", "region1": "raw", "region2": "raw"}
END = {"region0": "sector", "region1": "fsdax", "region2": "devdax"}


# --- the straight way -----------------------------------------------------------------------------


def test_forth_again_and_back(toy, journal) -> None:
    events = []
    outcome = run(toy, journal, on_step=lambda what, step, text: events.append((what, step.number)))
    assert toy.words == END
    assert outcome.converged
    assert (outcome.run, len(outcome.done)) == (1, 3)
    assert events == [(what, n) for n in (1, 2, 3) for what in ("begin", "done")]
    assert [each.made["seen"] for each in outcome.done] == [[], [1], [1, 2]]
    again = run(toy, journal)
    assert (again.run, again.plan.steps, again.converged) == (None, (), True)
    assert journal.numbers() == [1]
    undone = undo(toy, journal)
    assert toy.words == START
    assert [step.region for step, _ in undone.steps] == ["region2", "region1", "region0"]
    assert (undone.left, undone.error) == (0, None)
    nothing = undo(toy, journal)
    assert (nothing.run, nothing.steps) == (None, [])


def test_what_is_journalled_is_there_before_it_happens(toy, journal) -> None:
    class Nosy(Toy):
        def _at(self, place: str) -> None:
            super()._at(place)
            newest = journal.runs()[-1].entries
            entry = newest[max(newest)]
            if not place.startswith("back"):
                assert entry.state == "started"
                assert place.split()[0] == entry.step.region
                assert ("was" in entry.kept) == (not place.endswith("begin"))
            else:
                assert journal.runs()[-1].undoing is not None

    nosy = Nosy(dict(START))
    run(nosy, journal)
    assert undo(nosy, journal).left == 0


def test_a_plan_that_leads_to_another(toy, journal) -> None:
    """Region 3 appears when region 0 is done, and is planned for in a round of its own."""

    class Growing(Toy):
        def perform(self, step, keep, made):
            if step.region == "region0":
                self.words["region3"] = "new"
            return super().perform(step, keep, made)

    growing = Growing(dict(START))
    asked = []
    outcome = run(
        growing,
        journal,
        (*WANTED, "region3=raw"),
        confirm=lambda plan: asked.append([step.region for step in plan.steps]) or True,
    )
    assert outcome.converged
    assert asked == [["region0", "region1", "region2"], ["region3"]]
    assert growing.words == END | {"region3": "raw"}
    assert [len(plan.steps) for plan in journal.run(1).plans] == [3, 1]
    undo(growing, journal)
    assert growing.words == START | {"region3": "new"}


def test_a_second_round_that_nobody_wants(toy, journal) -> None:
    class Growing(Toy):
        def perform(self, step, keep, made):
            self.words["region3"] = "new"
            return super().perform(step, keep, made)

    answers = iter([True, False])
    growing = Growing(dict(START))
    wishes = (*WANTED, "region3=raw")
    outcome = run(growing, journal, wishes, confirm=lambda plan: next(answers))
    assert (outcome.declined, outcome.converged) == (True, False)
    assert growing.words == END | {"region3": "new"}
    assert journal.run(1).ended == "declined"


def test_what_does_not_last_is_an_error(journal) -> None:
    class Forgetful(Toy):
        def perform(self, step, keep, made):
            made_of_it = super().perform(step, keep, made)
            self.words[step.region] = "raw"
            return made_of_it

    outcome = run(Forgetful({"region0": "raw"}), journal)
    assert isinstance(outcome.error, Corrupt)
    assert "does not last" in str(outcome.error)


def test_rounds_have_a_bound(journal) -> None:
    class Restless(Toy):
        def perform(self, step, keep, made):
            self.words[step.region] = f"raw{self.looks}"
            return {}

    def restless(machine, wanted):
        (region,) = machine.regions
        return planner(machine, policy(f"region0={region.because}x"))

    outcome = apply(Restless({"region0": "raw"}), Policy(), journal, planner=restless)
    assert isinstance(outcome.error, Corrupt)
    assert f"after {engine._ROUNDS} rounds" in str(outcome.error)
    assert len(outcome.done) == engine._ROUNDS


def test_refused_is_reported(toy, journal) -> None:
    outcome = run(toy, journal, ("region0=sector", "region1=!fsdax"))
    assert outcome.converged
    assert [each.region for each in outcome.left.refused] == ["region1"]


# --- what was planned is what is done -------------------------------------------------------------


def test_a_plan_made_earlier(toy, journal) -> None:
    planned = planner(toy.observe(), policy(*WANTED))
    assert run(toy, journal, planned=planned).converged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"region1": "fsdax"}, "step 2 was reconfigure-namespace region1 fsdax"),
        ({"region2": "devdax"}, "would be nothing more now"),
        ({"region0": None}, "region0 went away"),
    ],
)
def test_a_plan_that_fits_no_more(toy, journal, change, said) -> None:
    planned = planner(toy.observe(), policy(*WANTED))
    for dev, word in change.items():
        toy.words.pop(dev)
        if word is not None:
            toy.words[dev] = word
    before = dict(toy.words)
    with pytest.raises(InvalidArgument, match=f"{said}.*nothing was changed"):
        run(toy, journal, planned=planned)
    assert toy.words == before
    assert journal.numbers() == []


def test_what_changes_while_somebody_thinks(toy, journal) -> None:
    """The region disappears between question and answer."""

    def confirm(plan: Plan) -> bool:
        del toy.words["region1"]
        return True

    with pytest.raises(InvalidArgument, match=r"region1 went away.*nothing was changed"):
        run(toy, journal, confirm=confirm)
    assert toy.words == {"region0": "raw", "region2": "raw"}
    assert journal.numbers() == []


def test_no_is_no(toy, journal) -> None:
    outcome = run(toy, journal, confirm=lambda plan: False)
    assert (outcome.declined, outcome.run, toy.words) == (True, None, START)
    assert journal.numbers() == []


def test_two_at_once(toy, journal) -> None:
    def confirm(plan: Plan) -> bool:
        with pytest.raises(Busy, match="pmem apply one"):
            run(toy, Journal(journal.directory), command="pmem apply two")
        with pytest.raises(Busy, match="pmem apply one"):
            undo(toy, Journal(journal.directory))
        return True

    assert run(toy, journal, confirm=confirm, command="pmem apply one").converged


# --- failures -------------------------------------------------------------------------------------

FAILURES = [f"region1 fsdax {at}" for at in ("begin", "kept", "half", "whole")]


@pytest.mark.parametrize("place", FAILURES)
@pytest.mark.parametrize("error", [NoSpace("no room"), OSError(5, "broken")])
def test_a_step_that_fails_is_taken_back(toy, journal, place, error) -> None:
    """Those before it stay; apply goes on and undo goes back."""
    toy.fails[place] = error
    outcome = run(toy, journal)
    assert toy.words == {"region0": "sector", "region1": "raw", "region2": "raw"}
    assert outcome.failed is not None
    assert (outcome.failed.number, len(outcome.done)) == (2, 1)
    assert outcome.rolled_back is not None
    assert isinstance(outcome.error, PmemError)
    assert [step.region for step in outcome.left.steps] == ["region1", "region2"]
    assert journal.run(1).ended == "failed"
    assert str(error) in journal.run(1).errors[2]
    assert run(toy, journal).converged
    assert toy.words == END
    undo(toy, journal)
    undo(toy, journal)
    assert toy.words == START


def test_a_step_that_cannot_even_be_taken_back(toy, journal) -> None:
    toy.fails["region1 fsdax half"] = NoSpace("no room")
    toy.fails["back region1 fsdax begin"] = Busy("a process holds it")
    outcome = run(toy, journal)
    assert outcome.rolled_back is None
    assert toy.words["region1"] == "half"
    assert "a process holds it" in journal.run(1).errors[2]
    undo(toy, journal)
    assert toy.words == START


def test_ctrl_c_takes_the_step_back(toy, journal) -> None:
    class Interrupted(Toy):
        def _at(self, place: str) -> None:
            super()._at(place)
            if place == "region1 fsdax half":
                raise KeyboardInterrupt

    here = Interrupted(dict(START))
    with pytest.raises(KeyboardInterrupt):
        run(here, journal)
    assert here.words == {"region0": "sector", "region1": "raw", "region2": "raw"}
    assert journal.run(1).ended == "interrupted"


# --- interruptions --------------------------------------------------------------------------------


def places() -> list[str]:
    """Every place at which a whole run can die."""
    toy = Toy(dict(START))
    for number, wish in enumerate(WANTED):
        step = planner(toy.observe(), policy(wish)).steps[0]
        toy.perform(replace(step, number=number + 1), {}.update, {})
    return toy.log


@pytest.mark.parametrize("place", places())
@pytest.mark.parametrize("then", ["apply", "undo"])
def test_dead_at_every_place(toy, journal, place, then) -> None:
    """The next apply converges, and undo goes back to the start."""
    toy.kills.add(place)
    with pytest.raises(Dies):
        run(toy, journal)
    assert journal.run(1).ended is None
    if then == "apply":
        outcome = run(toy, journal)
        assert outcome.converged
        assert "interrupted" in outcome.settled[0]
        assert toy.words == END
    while undo(toy, journal).run is not None:
        pass
    assert toy.words == START


class Mortal(Journal):
    """A journal whose process dies after so many records, or in the middle of one."""

    def __init__(self, directory, lives: int, torn: bool) -> None:
        super().__init__(directory)
        self.lives, self.torn = lives, torn

    def _freeze(self, value):
        if isinstance(value, dict) and "record" in value:
            if self.lives == 0:
                if self.torn and value["record"] != "begin":
                    file = sorted(self.directory.glob("*.jsonl"))[-1]
                    with file.open("ab") as opened:
                        opened.write(b'{"record":"don')
                raise Dies
            self.lives -= 1
        return super()._freeze(value)


@pytest.mark.parametrize("torn", [False, True])
def test_dead_before_every_record(tmp_path, torn) -> None:
    """Of apply and of undo: whatever dies before whichever record, the next one goes on."""
    for lives in itertools.count():
        toy, directory = Toy(dict(START)), tmp_path / str(lives)
        mortal = Mortal(directory, lives, torn)
        died = 0
        try:
            run(toy, mortal)
            undo(toy, mortal)
        except Dies:
            died += 1
        journal = Journal(directory)
        if lives % 2:
            assert run(toy, journal).converged
            assert toy.words == END
        while undo(toy, journal).run is not None:
            pass
        assert toy.words == START
        if not died:
            break
    assert lives > 15


@pytest.mark.parametrize("seed", range(40))
def test_dead_again_and_again(tmp_path, seed) -> None:
    """Apply and undo in turns, each of them dying anywhere."""
    choose = random.Random(seed)
    toy, directory = Toy(dict(START)), tmp_path / "journal"
    for _ in range(12):
        mortal = Mortal(directory, choose.randrange(20), choose.random() < 0.5)
        if choose.random() < 0.5:
            toy.kills = {choose.choice(places())}
        try:
            run(toy, mortal) if choose.random() < 0.6 else undo(toy, mortal)
        except Dies:
            toy.kills.clear()
    toy.kills.clear()
    journal = Journal(directory)
    assert run(toy, journal).converged
    assert toy.words == END
    while undo(toy, journal).run is not None:
        pass
    assert toy.words == START


# --- undo -----------------------------------------------------------------------------------------


def test_in_parts(toy, journal) -> None:
    run(toy, journal)
    first = undo(toy, journal, steps=1)
    assert (first.left, toy.words["region2"], toy.words["region1"]) == (2, "raw", "fsdax")
    assert journal.run(1).ended == "undone in part"
    assert undo(toy, journal).left == 0
    assert toy.words == START


def test_written_since(toy, journal) -> None:
    run(toy, journal)
    toy.written.add("region1")
    stopped = undo(toy, journal)
    assert isinstance(stopped.error, Corrupt)
    assert stopped.failed is not None
    assert (stopped.failed.region, stopped.left) == ("region1", 2)
    assert toy.words == {"region0": "sector", "region1": "fsdax", "region2": "raw"}
    forced = undo(toy, journal, force=True)
    assert (forced.left, forced.error) == (0, None)
    assert toy.words == START


class Placed(Toy):
    """Its regions are parts of one dimm; undo is told what was there meanwhile."""

    places: ClassVar = {"region0": (0, 10), "region1": (5, 15), "region2": (15, 20)}

    def perform(self, step, keep, made):
        place = ["dimm 1", *self.places[step.region]]
        keep({"range": place})
        return super().perform(step, keep, made) | {"range": place}

    def reverse(self, entry, *, force=False):
        if "overwritten" in entry.kept and not force:
            raise Corrupt(entry.kept["overwritten"])
        return super().reverse(entry, force=force)


@pytest.mark.parametrize("runs", [1, 2])
def test_contents_are_not_said_to_be_back_where_a_file_system_was_made(journal, runs) -> None:
    toy = Placed({"region0": "raw", "region1": "raw", "region2": "raw"})
    wishes = ("region0=sector", "region2=sector", "region1=fs")
    for part in [wishes] if runs == 1 else [wishes[:2], wishes]:
        run(toy, journal, part)
    undo(toy, journal, steps=1)
    stopped = undo(toy, journal)
    assert [step.region for step, _ in stopped.steps] == ["region2"]
    assert stopped.failed is not None and stopped.failed.region == "region0"
    assert "was there since" in str(stopped.error)
    assert undo(toy, journal, force=True).left == 0


def test_what_has_no_reverse_is_passed_over(toy, journal) -> None:
    run(toy, journal, ("region0=sector", "region1=fs"))
    undone = undo(toy, journal)
    assert [step.region for step, _ in undone.skipped] == ["region1"]
    assert (undone.left, undone.error) == (0, None)
    assert toy.words == START | {"region1": "fs"}


def test_runs_that_stand_on_each_other(toy, journal) -> None:
    run(toy, journal, ("region0=sector",))
    run(toy, journal, ("region0=fsdax",))
    with pytest.raises(Busy, match="run 2 came after run 1"):
        undo(toy, journal, run=1)
    with pytest.raises(InvalidArgument, match="no run 7"):
        undo(toy, journal, run=7)
    assert undo(toy, journal).run == 2
    assert undo(toy, journal, run=1).run == 1
    assert undo(toy, journal, run=1).run is None
    assert toy.words == START


def test_the_answer_is_no(toy, journal) -> None:
    run(toy, journal)
    declined = undo(toy, journal, confirm=lambda chosen: False)
    assert (declined.declined, declined.run, toy.words) == (True, None, END)
