"""``pmem undo``: what a run of ``pmem apply`` changed, taken back."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._policy import (
    Follower,
    add_machine_option,
    add_offline_option,
    command_line,
    step_text,
    the_actions,
    the_journal,
    wants_yes,
)

if TYPE_CHECKING:
    from pmemkit.policy.apply import Undone
    from pmemkit.policy.journal import Run

__all__ = ["run"]

_EXAMPLES = """\
  pmem undo                            the last run on this machine
  pmem undo --machine vm.toml --yes
  pmem undo --list                     which runs there are
  pmem undo --run 3 --force            without contents where something was written since"""
_NOTES = """\
Steps are taken back newest first. Contents come back where nothing was written since; where
something was, undo stops, and --force brings the state back without them. What has no reverse is
named and passed over. Stopped or interrupted, pmem undo goes on where it was."""


def run(arguments: Sequence[str]) -> int:
    """Asks, takes back and reports."""
    from pmemkit.policy.apply import undo

    parser = make_parser("undo", "Take back what pmem apply changed.", _EXAMPLES, _NOTES)
    add_machine_option(parser)
    parser.add_argument("--run", type=int, metavar="N", help="this run; the last one if not said")
    parser.add_argument("--steps", type=_count, metavar="N", help="only its newest N steps")
    parser.add_argument("--list", action="store_true", help="show the runs and change nothing")
    parser.add_argument("-f", "--force", action="store_true", help="states, where not contents")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_offline_option(parser)
    parser.add_argument("--journal", metavar="DIR", help="instead of the machine's own")
    options = parser.parse_args(arguments)
    journal = the_journal(options)
    if options.list:
        runs = journal.runs(contents=False)
        _list(options, [each for each in runs if options.run in (None, each.number)])
        return 0
    follower = Follower(("undo ", "taken back"))
    outcome = undo(
        the_actions(options, follower.say),
        journal,
        run=options.run,
        steps=options.steps,
        force=options.force,
        confirm=None if options.yes else _confirm(options),
        on_step=follower,
        command=command_line("undo", list(arguments)),
    )
    if options.json:
        print_json(_as_json(outcome))
    for line in _report(outcome):
        print(line, file=sys.stderr)
    return int(outcome.declined) if outcome.error is None else outcome.error.exit_code


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} steps cannot be taken back")
    return number


def _confirm(options: argparse.Namespace) -> "Callable[[Run], bool]":
    def confirm(chosen: "Run") -> bool:
        numbers = chosen.standing[: options.steps]
        for number in numbers:
            print(f"  {step_text(chosen.entries[number].step)}", file=sys.stderr)
        count = f"{len(numbers)} step{'' if len(numbers) == 1 else 's'}"
        return wants_yes(f"Take {count} of run {chosen.number} back, in this order?")

    return confirm


def _list(options: argparse.Namespace, runs: "Sequence[Run]") -> None:
    if options.json:
        print_json([_run_json(each) for each in runs])
        return
    for each in runs:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.begun))
        standing = len(each.standing)
        state = f"{len(each.entries)} steps, {standing} standing, {each.ended or 'not ended'}"
        print(f"{each.number:4}  {when}  {state}  {each.command}")
        for number, entry in each.entries.items():
            error = each.errors.get(number)
            why = f": {error}" if error is not None and entry.state == "started" else ""
            print(f"        {entry.state:8}{step_text(entry.step)}{why}")


def _run_json(each: "Run") -> dict[str, Any]:
    from pmemkit.policy.model import as_plain

    return {
        "run": each.number,
        "begun": each.begun,
        "machine": each.machine,
        "policy": each.policy,
        "command": each.command,
        "ended": each.ended,
        "steps": [
            {"state": entry.state, "error": each.errors.get(number)} | as_plain(entry.step)
            for number, entry in each.entries.items()
        ],
    }


def _report(outcome: "Undone") -> list[str]:
    if outcome.run is None:
        return ["pmem: nothing was taken back"]
    lines = [f"pmem: {step_text(step)} {text}" for step, text in outcome.skipped]
    count = len(outcome.steps)
    done = f"{count} step{'' if count == 1 else 's'} of run {outcome.run} taken back"
    if outcome.error is not None and outcome.failed is not None:
        text = " ".join(str(outcome.error).split())
        lines.append(f"pmem: stopped at {step_text(outcome.failed)}: {text}")
    lines.append(f"pmem: {done}" + (f", {outcome.left} left" if outcome.left else ""))
    return lines


def _as_json(outcome: "Undone") -> dict[str, Any]:
    from pmemkit.policy.model import as_plain

    error = outcome.error
    return {
        "run": outcome.run,
        "undone": [as_plain(step) | {"came_back": text} for step, text in outcome.steps],
        "skipped": [as_plain(step) | {"because": text} for step, text in outcome.skipped],
        "left": outcome.left,
        "error": None if error is None else {"kind": error.kind, "message": str(error)},
    }
