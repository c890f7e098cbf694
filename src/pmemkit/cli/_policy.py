"""What ``pmem plan``, ``apply``, ``undo`` and ``diff`` share: the machine, the journal, plans as
files, and how steps are shown while they are carried out."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.policy.journal import Journal
    from pmemkit.policy.model import Actions, Plan, Policy, Step

__all__ = [
    "Follower",
    "add_machine_option",
    "add_offline_option",
    "add_policy_arguments",
    "command_line",
    "losses",
    "read_plan",
    "step_text",
    "the_actions",
    "the_journal",
    "the_plan",
    "the_policy",
    "wants_yes",
    "write_plan",
]

_SYSTEM_JOURNAL: Final = "/var/lib/pmemkit/policy"
_MARK: Final = "pmemkit_plan"
_MACHINE_HELP = (
    "a machine file (*.toml), or an image, several times for several; this machine if not said"
)


def add_machine_option(parser: argparse.ArgumentParser) -> None:
    """Images instead of the running machine."""
    parser.add_argument(
        "-m", "--machine", metavar="PATH", action="append", default=[], help=_MACHINE_HELP
    )


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """A policy and the machine that it is for."""
    parser.add_argument("policy", metavar="POLICY", help="the policy file")
    add_machine_option(parser)
    parser.add_argument(
        "--trust-policy",
        action="store_true",
        help="as root, take a policy that others than root can write, too",
    )


def the_policy(options: argparse.Namespace) -> "Policy":
    """The policy that the options name."""
    from pmemkit.policy.schema import load_policy

    return load_policy(options.policy, trusted=True if options.trust_policy else None)


def add_offline_option(parser: argparse.ArgumentParser) -> None:
    """How long memory may take to go offline."""
    parser.add_argument(
        "--offline-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long all memory blocks of a device may take to go offline; 60 if not said",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400 seconds")
    return seconds


def the_actions(options: argparse.Namespace, say: Callable[[str], None] | None = None) -> "Actions":
    """The bus that the options name; ``say`` gets sentences while a long step is carried out."""
    if options.machine:
        from pmemkit.policy.image_actions import ImageActions

        return ImageActions(options.machine)
    from pmemkit.policy.kernel_actions import KernelActions
    from pmemkit.policy.kernel_live import OFFLINE_SECONDS

    seconds = getattr(options, "offline_timeout", None)
    return KernelActions(progress=say, offline_seconds=seconds or OFFLINE_SECONDS)


def the_journal(options: argparse.Namespace) -> "Journal":
    """The journal of that bus, unless the options name another."""
    from pmemkit.policy.journal import Journal

    if options.journal is not None:
        return Journal(options.journal)
    if options.machine:
        return Journal(Path(options.machine[0]).absolute().as_posix() + ".journal")
    return Journal(_SYSTEM_JOURNAL)


def the_plan(actions: "Actions", policy: "Policy") -> "Plan":
    """What would be done now."""
    from pmemkit.policy.plan import plan

    return plan(actions.observe(), policy)


def command_line(command: str, arguments: "list[str]") -> str:
    """What was typed, for the journal and for whoever finds the machine locked."""
    return shlex.join(["pmem", command, *arguments])


# --- plans as files -------------------------------------------------------------------------------


def write_plan(path: str, plan: "Plan", machine: str, policy: "Policy") -> None:
    """Puts a plan into a file for ``pmem apply --plan``."""
    from pmemkit.policy.apply import digest_of
    from pmemkit.policy.model import as_plain

    document = {
        _MARK: 1,
        "machine": machine,
        "policy": digest_of(policy),
        "plan": as_plain(plan),
    }
    Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_plan(path: str, policy: "Policy") -> "Plan":
    """The plan of a file. One for another policy is :class:`InvalidArgument`."""
    from pmemkit.policy.apply import digest_of
    from pmemkit.policy.model import Plan
    from pmemkit.policy.plain import from_plain

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get(_MARK) != 1:
            raise ValueError("pmem plan --out makes one")
        plan = from_plain(Plan, document.get("plan"))
    except (InvalidArgument, ValueError, RecursionError) as cause:
        raise InvalidArgument(f"is no plan: {cause}", op="apply", path=path) from None
    if document.get("policy") != digest_of(policy):
        text = f"was made for another policy than {policy.path}; plan again"
        raise InvalidArgument(text, op="apply", path=path)
    return plan


# --- for people -----------------------------------------------------------------------------------


def step_text(step: "Step") -> str:
    """A step in a line."""
    params: Mapping[str, Any] = step.params
    words = [step.verb, step.target]
    words += [str(params[key]) for key in ("mode", "filesystem", "path") if params.get(key)]
    if params.get("name"):
        words.append(f"({params['name']})")
    return " ".join(words)


def losses(plan: "Plan") -> list[str]:
    """Which data a plan destroys, a line each."""
    return [
        f"step {step.number}, {step.verb} {step.target}, destroys {what}"
        + ("" if step.reverse == "contents" else " for good")
        for step in plan.steps
        for what in step.destroys
    ]


def wants_yes(question: str) -> bool:
    """Asks on the terminal. Where nobody can be asked: :class:`InvalidArgument`."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        text = "nobody can be asked here: --yes says yes, --dry-run only shows the plan"
        raise InvalidArgument(text, op="apply")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Follower:
    """Shows steps on standard error while they are carried out or taken back."""

    def __init__(self, words: tuple[str, str] = ("", "done")) -> None:
        self.begins, self.ends = words
        self._live = sys.stderr.isatty()
        self._line = ""

    def say(self, text: str) -> None:
        """What a step is at."""
        if self._live:
            print(f"\r\033[K  … {self._line}: {text}", end="", file=sys.stderr, flush=True)

    def __call__(
        self, what: Literal["begin", "done", "failed", "undone"], step: "Step", text: str
    ) -> None:
        """Takes an event of :mod:`pmemkit.policy.apply`."""
        self._line = line = f"{self.begins}{step_text(step)}"
        if what == "begin":
            if self._live:
                print(f"\r\033[K  … {line}", end="", file=sys.stderr, flush=True)
            return
        word = {"done": self.ends, "undone": "taken back", "failed": "failed"}[what]
        start = "\r\033[K" if self._live else ""
        print(f"{start}  {line}: {text or word}", file=sys.stderr, flush=True)
