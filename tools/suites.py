#!/usr/bin/env python3
"""Runs suites of checks one after the other, each under a timeout, and prints what each one cost.

A suite is a name, a budget in seconds and a shell command: ``name:budget_seconds:command``. A suite
that passes its budget is reported as over, not failed; one that reaches its timeout (``--patience``
times the budget, at least a minute) is killed with everything it started and has failed. All suites
are run; the exit status is 1 when any failed. The last line is ``N passed, N failed``, which counts
single tests where the output names them and the suite itself where it does not.

What this does not do: run suites side by side. They share two cores and measure each other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import IO

__all__ = ["Outcome", "Suite", "main", "run"]

_CARGO = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")
_PYTEST = re.compile(r"^(=+ )?\d+ \w+.*\bin [\d.]+s\b")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed)\b")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Suite:
    """One command with its budget."""

    name: str
    budget_seconds: float
    command: str

    @classmethod
    def parse(cls, text: str) -> Suite:
        """Reads ``name:budget_seconds:command``."""
        name, budget, command = text.split(":", 2)
        return cls(name, float(budget), command)


@dataclass
class Outcome:
    """What a suite did."""

    suite: Suite
    seconds: float = 0.0
    status: int | None = None
    """Exit status; ``None`` when it was killed at its timeout."""
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.status is None:
            return "TIMEOUT"
        if self.status:
            return "FAILED"
        return "ok" if self.seconds <= self.suite.budget_seconds else "ok, over budget"

    def totals(self) -> tuple[int, int, int]:
        """Passed, failed and skipped tests; the suite counts as one where it named none."""
        passed, failed = self.counts.get("passed", 0), self.counts.get("failed", 0)
        if self.status != 0 and failed == 0:
            failed = 1
        if passed + failed == 0:
            passed = 1
        return passed, failed, self.counts.get("skipped", 0)


def count_line(line: str, counts: dict[str, int]) -> None:
    """Adds what a closing line of pytest or of cargo's test harness says."""
    line = _COLOUR.sub("", line.rstrip())
    if match := _CARGO.match(line):
        found = list(zip(match.groups(), ("passed", "failed", "skipped"), strict=True))
    elif _PYTEST.match(line):
        found = _COUNT.findall(line)
    else:
        return
    for number, word in found:
        key = {"error": "failed", "errors": "failed", "xfailed": "passed"}.get(word, word)
        counts[key] = counts.get(key, 0) + int(number)


def _relay(stream: IO[str], counts: dict[str, int]) -> None:
    for line in stream:
        sys.stdout.write(line)
        sys.stdout.flush()
        count_line(line, counts)


def run(suite: Suite, patience: float) -> Outcome:
    """Runs one suite, showing its output as it comes."""
    print(f"\n== {suite.name}: {suite.command}", flush=True)
    outcome = Outcome(suite)
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", suite.command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    relay = threading.Thread(target=_relay, args=(process.stdout, outcome.counts), daemon=True)
    relay.start()
    try:
        outcome.status = process.wait(timeout=max(60.0, patience * suite.budget_seconds))
    except subprocess.TimeoutExpired:
        pass
    finally:
        # The group is this suite's own; what it left behind must not disturb the next one.
        _kill_group(process.pid)
        process.wait()
    relay.join(timeout=5)
    outcome.seconds = time.monotonic() - started
    return outcome


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _print_table(outcomes: list[Outcome]) -> None:
    head = f"{'suite':22} {'seconds':>9} {'budget':>8}  {'passed':>6} {'failed':>6} {'skipped':>7}"
    print("\n" + head)
    for outcome in outcomes:
        passed, failed, skipped = outcome.totals()
        print(
            f"{outcome.suite.name:22} {outcome.seconds:9.1f} {outcome.suite.budget_seconds:8.0f}"
            f"  {passed:6} {failed:6} {skipped:7}  {outcome.verdict}"
        )
    seconds = sum(outcome.seconds for outcome in outcomes)
    budget = sum(outcome.suite.budget_seconds for outcome in outcomes)
    skipped = sum(outcome.totals()[2] for outcome in outcomes)
    print(f"{'total':22} {seconds:9.1f} {budget:8.0f}  {'':6} {'':6} {skipped:7}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites named on the command line."""
    parser = argparse.ArgumentParser(description="Run suites under budgets.")
    parser.add_argument("--patience", type=float, default=3.0, help="timeout in budgets")
    parser.add_argument("suites", nargs="+", type=Suite.parse, metavar="NAME:SECONDS:COMMAND")
    options = parser.parse_args(arguments)
    outcomes = [run(suite, options.patience) for suite in options.suites]
    _print_table(outcomes)
    passed = sum(outcome.totals()[0] for outcome in outcomes)
    failed = sum(outcome.totals()[1] for outcome in outcomes)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
