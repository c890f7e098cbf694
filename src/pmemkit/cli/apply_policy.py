"""``pmem apply``: a machine made what its policy wants."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._policy import (
    Follower,
    add_offline_option,
    add_policy_arguments,
    command_line,
    losses,
    read_plan,
    the_actions,
    the_journal,
    the_plan,
    the_policy,
    wants_yes,
)

if TYPE_CHECKING:
    from pmemkit.policy.apply import Outcome
    from pmemkit.policy.model import Plan

__all__ = ["run"]

_EXAMPLES = """\
  pmem apply policy.toml                         shows the plan and asks
  pmem apply --yes /etc/pmemkit/policy.toml      at boot
  pmem apply --machine vm.toml policy.toml       of images, before it touches a machine
  pmem plan policy.toml --out p.json && pmem apply --plan p.json policy.toml"""
_NOTES = """\
Every step is in a journal before it begins, with what it replaces: pmem undo takes a run back, and
an interrupted run is settled by the next one. A step that fails is taken back and ends the run; the
ones before it stay.
Exit code 0: as the policy wants it. 1: but for what a guard refused, or the answer was no. 2: the
plan is another one by now, or nobody can be asked. Otherwise that of the error."""


def run(arguments: Sequence[str]) -> int:
    """Plans, asks, carries out and reports."""
    from pmemkit.policy.apply import apply

    parser = make_parser("apply", "Make a machine what its policy wants.", _EXAMPLES, _NOTES)
    add_policy_arguments(parser)
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")
    parser.add_argument("--plan", metavar="FILE", help="only this plan, from pmem plan --out")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_offline_option(parser)
    parser.add_argument("--journal", metavar="DIR", help="instead of the machine's own")
    options = parser.parse_args(arguments)
    policy = the_policy(options)
    follower = Follower()
    actions = the_actions(options, follower.say)
    if options.dry_run:
        return _dry_run(options, the_plan(actions, policy))
    planned = read_plan(options.plan, policy) if options.plan is not None else None
    outcome = apply(
        actions,
        policy,
        the_journal(options),
        planned=planned,
        confirm=_confirm(options),
        on_step=follower,
        command=command_line("apply", list(arguments)),
    )
    if options.json:
        print_json(_as_json(outcome))
    for line in _report(outcome):
        print(line, file=sys.stderr)
    return _exit_code(outcome)


def _dry_run(options: argparse.Namespace, plan: "Plan") -> int:
    from pmemkit.policy.report import plan_json, plan_table

    if options.json:
        print_json(plan_json(plan))
    else:
        print(plan_table(plan))
    return 0


def _confirm(options: argparse.Namespace) -> "Callable[[Plan], bool]":
    """Shows a plan and asks; once more for each round that destroys data."""
    rounds = 0

    def confirm(plan: "Plan") -> bool:
        nonlocal rounds
        from pmemkit.policy.report import plan_table

        rounds += 1
        if not options.json:
            print(plan_table(plan), flush=True)
        lost = losses(plan)
        for line in lost:
            print(f"pmem: data are lost: {line}", file=sys.stderr)
        if options.yes or (rounds > 1 and not lost):
            return True
        count = len(plan.steps)
        steps = "this step" if count == 1 else f"these {count} steps"
        return wants_yes(f"Carry {steps} out{' and lose these data' if lost else ''}?")

    return confirm


def _report(outcome: "Outcome") -> list[str]:
    """What came of it, in sentences."""
    lines = [f"pmem: {each}" for each in outcome.settled]
    lines += [f"pmem: {each.region}: refused: {each.why}" for each in outcome.left.refused]
    lines += [f"pmem: deferred: {each}" for each in outcome.left.deferred]
    count = len(outcome.done)
    done = f"{count} step{'' if count == 1 else 's'} done"
    if outcome.error is not None:
        where = f" in {outcome.failed.verb} {outcome.failed.target}" if outcome.failed else ""
        lines.append(f"pmem: stopped{where}: {' '.join(str(outcome.error).split())}")
        if outcome.failed is not None:
            lines.append(
                f"pmem: that step is taken back: {outcome.rolled_back}"
                if outcome.rolled_back is not None
                else "pmem: that step could not be taken back; the next pmem apply or undo tries"
            )
        lines.append(
            f"pmem: {done}, {len(outcome.left.steps)} to be done; pmem apply goes on, pmem undo "
            f"takes run {outcome.run} back"
        )
    elif outcome.declined:
        lines.append(f"pmem: {done}; nothing else was changed")
    elif outcome.run is None:
        lines.append("pmem: nothing is to be done")
    else:
        lines.append(f"pmem: {done}; pmem undo takes them back (run {outcome.run})")
    return lines


def _as_json(outcome: "Outcome") -> dict[str, Any]:
    from pmemkit.policy.model import as_plain

    error = outcome.error
    return {
        "run": outcome.run,
        "converged": outcome.converged,
        "settled": outcome.settled,
        "done": [as_plain(each.step) | {"made": as_plain(each.made)} for each in outcome.done],
        "left": as_plain(outcome.left),
        "declined": outcome.declined,
        "error": None if error is None else {"kind": error.kind, "message": str(error)},
        "failed": None if outcome.failed is None else as_plain(outcome.failed),
        "rolled_back": outcome.rolled_back,
    }


def _exit_code(outcome: "Outcome") -> int:
    if outcome.error is not None:
        return outcome.error.exit_code
    return int(outcome.declined or bool(outcome.left.refused))
