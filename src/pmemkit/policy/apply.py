"""Carrying plans out: one step after the other, journalled, taken back where one fails, resumed.

    apply    lock ─▶ settle what was interrupted ─▶ observe, plan, compare, confirm
                 ─▶ step, step, … ─▶ observe, plan: empty? done. Otherwise one more round
    undo     lock ─▶ the entries of a run that are not undone, newest first

Invariants:
1. One at a time: the journal is locked from the first look to the last record.
2. What is carried out is the plan that was confirmed. The machine is looked at again after the
   answer; if the plan is another one by then, nothing is done.
3. A step is journalled before it begins, and what it replaces before it is replaced. So whenever
   this process dies, the next one knows what may have been begun.
4. At the end of each step the machine is in a state that a plan may start from. A step that fails
   is taken back; those before it stay, and both ways are open: apply goes on, undo goes back.
5. Steps are taken back newest first, because each of them was made for what the ones before left.

What this does not do: plan (:mod:`pmemkit.policy.plan`), look at or change a machine
(:class:`~pmemkit.policy.model.Actions`), ask or print (the command line).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, PmemError
from pmemkit.policy.journal import Journal, Run, Writer
from pmemkit.policy.model import Actions, Entry, Plan, Policy, Step, as_plain

__all__ = ["Event", "Outcome", "Undone", "apply", "digest_of", "resume", "undo"]

_ROUNDS: Final = 8
"""How often a plan may lead to another one: a CXL region that comes up is planned for next."""

Event = Callable[[Literal["begin", "done", "failed", "undone"], Step, str], None]
"""Called with what happens to a step, and a sentence where there is one."""
_Planner = Callable[[Any, Policy], Plan]
_Confirm = Callable[[Plan], bool]


@dataclass(slots=True)
class Outcome:
    """What came of :func:`apply`."""

    run: int | None = None
    """``None``: there was nothing to do, or nobody wanted it."""
    plan: Plan = field(default_factory=Plan)
    """The first one."""
    done: list[Entry] = field(default_factory=list)
    left: Plan = field(default_factory=Plan)
    """The plan for the machine as it is at the end."""
    settled: list[str] = field(default_factory=list)
    """What an interrupted run had left, and what became of it."""
    declined: bool = False
    failed: Step | None = None
    error: PmemError | None = None
    """Why it stopped."""
    rolled_back: str | None = None
    """What became of the step that failed; ``None``: it could not be taken back."""

    @property
    def converged(self) -> bool:
        """True when the machine is as the policy wants it, but for what guards refuse."""
        return self.error is None and not self.declined and not self.left.steps


@dataclass(slots=True)
class Undone:
    """What came of :func:`undo`."""

    run: int | None = None
    """``None``: there was nothing to undo."""
    steps: list[tuple[Step, str]] = field(default_factory=list)
    """Those that were taken back, and what came back."""
    skipped: list[tuple[Step, str]] = field(default_factory=list)
    """Those that have no reverse."""
    left: int = 0
    """Entries of the run that are still standing."""
    declined: bool = False
    failed: Step | None = None
    error: PmemError | None = None


def _silent(_what: str, _step: Step, _text: str) -> None:
    """Nobody listens."""


def _the_planner() -> _Planner:
    from pmemkit.policy.plan import plan

    return plan


def digest_of(policy: Policy) -> str:
    """A digest of what a policy says."""
    text = json.dumps(as_plain(policy), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- apply ----------------------------------------------------------------------------------------


def apply(
    actions: Actions,
    policy: Policy,
    journal: Journal,
    *,
    planned: Plan | None = None,
    confirm: _Confirm | None = None,
    on_step: Event = _silent,
    command: str = "pmem apply",
    planner: _Planner | None = None,
) -> Outcome:
    """Makes the machine what the policy wants.

    ``planned`` is a plan made earlier: another one by now is :class:`InvalidArgument`, and nothing
    is done. ``confirm`` gets each plan before its first step; without it every plan is carried out.
    Raises :class:`Busy` where somebody else is at it. A step that fails does not raise: it is in
    the outcome, with what was done before it.
    """
    make = planner or _the_planner()
    outcome = Outcome()
    with journal.lock(command):
        outcome.settled = _settle(actions, journal, on_step=on_step)
        machine = actions.observe()
        first = outcome.plan = outcome.left = make(machine, policy)
        if planned is not None:
            _require_same(planned, first, {region.dev for region in machine.regions})
        if not first.steps:
            return outcome
        if not _confirmed(actions, policy, make, confirm, first):
            outcome.declined = True
            return outcome
        writer = journal.begin(
            bus=machine.bus,
            machine=machine.name,
            policy=digest_of(policy),
            plan=first,
            command=command,
        )
        outcome.run = writer.number
        _rounds(actions, policy, make, confirm, writer, outcome, on_step)
        writer.end(_how(outcome))
    return outcome


def _confirmed(
    actions: Actions, policy: Policy, make: _Planner, confirm: _Confirm | None, plan: Plan
) -> bool:
    """Asks, and looks again after the answer: people take their time."""
    if confirm is None:
        return True
    if not confirm(plan):
        return False
    machine = actions.observe()
    _require_same(plan, make(machine, policy), {region.dev for region in machine.regions})
    return True


def _rounds(
    actions: Actions,
    policy: Policy,
    make: _Planner,
    confirm: _Confirm | None,
    writer: Writer,
    outcome: Outcome,
    on_step: Event,
) -> None:
    plan = outcome.plan
    for _ in range(_ROUNDS):
        _carry_out(actions, plan, writer, outcome, on_step)
        if outcome.error is not None:
            # What stopped a step may keep the machine from being looked at, too.
            with suppress(PmemError):
                outcome.left = make(actions.observe(), policy)
            return
        before, plan = plan, make(actions.observe(), policy)
        outcome.left = plan
        if not plan.steps:
            return
        if _essence(plan) == _essence(before):
            text = "the same steps are to be done again: what they did does not last"
            outcome.error = Corrupt(text, op="apply")
            return
        if not _confirmed(actions, policy, make, confirm, plan):
            outcome.declined = True
            return
        writer.plan(plan)
    text = f"after {_ROUNDS} rounds there are still {len(plan.steps)} steps to be done"
    outcome.error = Corrupt(text, op="apply")


def _carry_out(
    actions: Actions, plan: Plan, writer: Writer, outcome: Outcome, on_step: Event
) -> None:
    """The steps of one plan, until one fails."""
    made: dict[int, Mapping[str, Any]] = {}
    for step in plan.steps:
        number = writer.started(step)
        kept: dict[str, Any] = {}

        def keep(
            what: Mapping[str, Any], number: int = number, kept: dict[str, Any] = kept
        ) -> None:
            writer.kept(number, what)
            kept.update(what)

        on_step("begin", step, "")
        try:
            made[step.number] = actions.perform(step, keep, made)
        except (OSError, KeyboardInterrupt) as cause:
            entry = Entry(step=step, state="started", kept=kept)
            outcome.failed = step
            outcome.rolled_back = _roll_back(actions, writer, number, entry, cause, on_step)
            if isinstance(cause, KeyboardInterrupt):
                writer.end("interrupted")
                raise
            outcome.error = _as_ours(cause)
            return
        writer.done(number, made[step.number])
        outcome.done.append(Entry(step=step, state="done", kept=kept, made=made[step.number]))
        on_step("done", step, "")


def _roll_back(
    actions: Actions,
    writer: Writer,
    number: int,
    entry: Entry,
    cause: BaseException,
    on_step: Event,
) -> str | None:
    """Takes the step back that failed. Gives what came back, ``None`` where that failed too: then
    the entry stays as it is for whoever comes next."""
    reason = str(cause) or "interrupted"
    writer.failed(number, reason)
    on_step("failed", entry.step, reason)
    try:
        writer.undoing(number)
        text = actions.reverse(entry)
    except OSError as failure:
        writer.failed(number, f"{reason}; taking it back: {failure}")
        return None
    writer.undone(number, text)
    on_step("undone", entry.step, text)
    return text


def _as_ours(cause: BaseException) -> PmemError:
    from pmemkit.media.provider import failure_of

    assert isinstance(cause, OSError)
    return failure_of(cause, "apply", cause.filename or "")


def _how(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "failed"
    return "declined" if outcome.declined else "converged"


# --- a plan made earlier --------------------------------------------------------------------------


def _essence(plan: Plan) -> list[Any]:
    """What makes two plans the same: the steps, but for estimates."""
    return [
        as_plain(replace(step, seconds=0.0, why="", wear=None, page_map=None))
        for step in plan.steps
    ]


def _require_same(planned: Plan, now: Plan, regions: set[str]) -> None:
    """Refuses a plan that is not the one for the machine as it is."""
    if _essence(planned) == _essence(now):
        return
    gone = sorted({s.region for s in planned.steps} - regions - _made_here(planned))
    if gone:
        text = f"{', '.join(gone)} went away since the plan was made; nothing was changed"
        raise InvalidArgument(text, op="apply")
    was, found = _essence(planned), _essence(now)
    place = next(
        (n for n, pair in enumerate(zip(was, found, strict=False)) if pair[0] != pair[1]),
        min(len(was), len(found)),
    )
    wanted = _brief(planned.steps[place]) if place < len(was) else "nothing more"
    instead = _brief(now.steps[place]) if place < len(found) else "nothing more"
    text = (
        f"the machine or the policy changed since the plan was made: step {place + 1} was "
        f"{wanted} and would be {instead} now; nothing was changed. Plan again"
    )
    raise InvalidArgument(text, op="apply")


def _made_here(plan: Plan) -> set[str]:
    """Regions that a plan makes itself."""
    made = {step.region for step in plan.steps if step.verb == "create-cxl-region"}
    return made | {step.region for step in plan.steps if step.region.startswith("@")}


def _brief(step: Step) -> str:
    mode = f" {step.params['mode']}" if "mode" in step.params else ""
    return f"{step.verb} {step.target}{mode}"


# --- settling what was interrupted ----------------------------------------------------------------


def resume(
    actions: Actions, journal: Journal, *, on_step: Event = _silent, command: str = "pmem"
) -> list[str]:
    """Settles what was interrupted, and nothing else; :func:`apply` begins with the same."""
    with journal.lock(command):
        return _settle(actions, journal, on_step=on_step)


def _settle(actions: Actions, journal: Journal, *, on_step: Event = _silent) -> list[str]:
    """Brings runs that were interrupted to the end of a step; hold the lock. Says what it did.

    A step that was begun and not finished is taken back, so that the machine is as it was before
    it; one of which the taking back was interrupted is taken back to the end. Where contents cannot
    come back (:class:`Corrupt`) or there is no reverse, what is there is left to the next plan, and
    the entry to a later undo.
    """
    found = []
    for each in journal.runs(contents=False):
        if each.ended is not None:
            continue
        run = journal.run(each.number)
        writer = journal.again(run)
        number = run.unsettled
        if number is not None:
            found.append(_settle_entry(actions, writer, run, number, on_step))
        else:
            found.append(f"run {run.number} was interrupted between two steps")
        writer.end("interrupted")
    return found


def _settle_entry(actions: Actions, writer: Writer, run: Run, number: int, on_step: Event) -> str:
    entry = run.entries[number]
    name = f"run {run.number} was interrupted in step {_brief(entry.step)}"
    try:
        writer.undoing(number)
        text = actions.reverse(entry)
    except (Corrupt, NotSupported) as refusal:
        writer.failed(number, str(refusal))
        return f"{name}, which stays as it is: {refusal}"
    writer.undone(number, text)
    on_step("undone", entry.step, text)
    return f"{name}, which is taken back: {text}"


# --- undo -----------------------------------------------------------------------------------------


def undo(
    actions: Actions,
    journal: Journal,
    *,
    run: int | None = None,
    steps: int | None = None,
    force: bool = False,
    confirm: Callable[[Run], bool] | None = None,
    on_step: Event = _silent,
    command: str = "pmem undo",
) -> Undone:
    """Takes a run back, by default the last one that is not undone: its newest ``steps`` entries,
    or all of them.

    ``force`` brings states back where contents cannot come back. It stops at the first step that
    cannot be taken back now, which is in the outcome; undoing again goes on there.
    """
    outcome = Undone()
    with journal.lock(command):
        chosen = _choose(journal, run, force=force)
        if chosen is None:
            return outcome
        if confirm is not None and not confirm(chosen):
            outcome.declined = True
            return outcome
        outcome.run = chosen.number
        writer = journal.again(chosen)
        standing = chosen.standing
        for number in standing[:steps]:
            entry = _as_overwritten(journal, chosen, number)
            outcome.left = len(chosen.standing) - len(outcome.steps) - len(outcome.skipped)
            on_step("begin", entry.step, "")
            writer.undoing(number)
            try:
                text = actions.reverse(entry, force=force)
            except NotSupported as refusal:
                if entry.step.reverse != "none" and not force:
                    return _stopped(outcome, writer, number, entry.step, refusal, on_step)
                text = f"has no reverse: {refusal.message}"
                outcome.skipped.append((entry.step, text))
            except OSError as cause:
                return _stopped(outcome, writer, number, entry.step, cause, on_step)
            else:
                outcome.steps.append((entry.step, text))
            writer.undone(number, text)
            on_step("undone", entry.step, text)
        outcome.left = len(standing) - len(outcome.steps) - len(outcome.skipped)
        writer.end("undone" if not outcome.left else "undone in part")
    return outcome


_WRITING: Final = frozenset(("mkfs", "reconfigure-device", "online-memory"))
"""Steps after which bytes are not what they were, though the step is taken back."""


def _as_overwritten(journal: Journal, chosen: Run, number: int) -> Entry:
    """An entry with what later steps have done to the contents that it would bring back: they made
    a file system there, or memory. ``range`` in what was kept and made tells where that was."""
    entry = chosen.entries[number]
    where = entry.kept.get("range")
    if entry.step.reverse != "contents" or not where:
        return entry
    later = [each for at, each in chosen.entries.items() if at > number]
    for run in journal.runs(contents=False):
        later += run.entries.values() if run.number > chosen.number else ()
    for each in later:
        there = each.made.get("range")
        if each.step.verb in _WRITING and there and _overlap(where, there):
            what = each.step.params.get("filesystem") or "system RAM"
            text = f"{what} was there since"
            return replace(entry, kept={**entry.kept, "overwritten": text})
    return entry


def _overlap(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Both are what they are in, the first byte, and the one behind the last."""
    return bool(one[0] == other[0] and one[1] < other[2] and other[1] < one[2])


def _stopped(
    outcome: Undone, writer: Writer, number: int, step: Step, cause: OSError, on_step: Event
) -> Undone:
    outcome.failed, outcome.error = step, _as_ours(cause)
    writer.failed(number, str(cause))
    writer.end("undone in part")
    on_step("failed", step, str(cause))
    return outcome


def _choose(journal: Journal, number: int | None, *, force: bool) -> Run | None:
    """The run to take back."""
    standing = [run for run in journal.runs(contents=False) if run.standing]
    if number is None:
        return journal.run(standing[-1].number) if standing else None
    chosen = journal.run(number)
    later = [run.number for run in standing if run.number > number]
    if chosen.standing and later and not force:
        text = (
            f"run {later[-1]} came after run {number} and stands on it; undo that one first, or "
            "force it"
        )
        raise Busy(text, op="undo", path=str(journal.directory))
    return chosen if chosen.standing else None
