"""``pmem plan`` and ``pmem diff``: what a policy would change, and whether a machine drifted."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._policy import (
    add_policy_arguments,
    step_text,
    the_actions,
    the_plan,
    the_policy,
    write_plan,
)

if TYPE_CHECKING:
    from pmemkit.policy.model import Plan

__all__ = ["run", "run_diff"]

_EXAMPLES = """\
  pmem plan policy.toml                          of this machine
  pmem plan --machine vm.toml policy.toml        of images
  pmem plan -m a.img -m b.img policy.toml --json
  pmem plan policy.toml --out plan.json && pmem apply --plan plan.json policy.toml"""
_NOTES = """\
Nothing is changed. Exit code 0; with --exit-code 1 where something would be done, or is refused."""
_DIFF_EXAMPLES = """\
  pmem diff policy.toml || echo "the machine is not as its policy wants it"
  pmem diff --machine vm.toml policy.toml"""
_DIFF_NOTES = "Exit code 0: no drift. 1: there is some, a line each."


def run(arguments: Sequence[str]) -> int:
    """Prints the plan."""
    from pmemkit.policy.report import plan_json, plan_table

    what = "Show what has to be done to make a machine what its policy wants."
    parser = make_parser("plan", what, _EXAMPLES, _NOTES)
    add_policy_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--exit-code", action="store_true", help="1 where the plan is not empty")
    parser.add_argument("--out", metavar="FILE", help="put it into a file, for apply --plan")
    options = parser.parse_args(arguments)
    policy = the_policy(options)
    actions = the_actions(options)
    machine = actions.observe()
    from pmemkit.policy.plan import plan

    found = plan(machine, policy)
    if options.out is not None:
        write_plan(options.out, found, machine.name, policy)
    if options.json:
        print_json(plan_json(found))
    else:
        print(plan_table(found))
    return int(options.exit_code and bool(found.steps or found.refused))


def run_diff(arguments: Sequence[str]) -> int:
    """Says in what a machine is not as its policy wants it."""

    what = "Say in what a machine is not as its policy wants it."
    parser = make_parser("diff", what, _DIFF_EXAMPLES, _DIFF_NOTES)
    add_policy_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a list of differences")
    options = parser.parse_args(arguments)
    policy = the_policy(options)
    found = the_plan(the_actions(options), policy)
    drift = _drift(found)
    if options.json:
        print_json([{"region": region, "what": text} for region, text in drift])
    for region, text in drift if not options.json else ():
        print(f"{region}: {text}")
    if not drift:
        print("no drift", file=sys.stderr)
    return int(bool(drift))


def _drift(plan: "Plan") -> list[tuple[str, str]]:
    """Regions and what is wrong with them, in the order of regions."""
    found = [(step.region, f"{step.why} ({step_text(step)})") for step in plan.steps]
    found += [(each.region, f"stays as it is: {each.why}") for each in plan.refused]
    return sorted(found, key=lambda each: each[0])
