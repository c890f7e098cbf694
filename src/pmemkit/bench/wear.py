"""Suite ``wear``: how long media last with levelling and without, and what counting writes costs.

The trace is ``--trace FILE`` or ``PMEMKIT_TRACE``: cloudPhysicsIO.csv of libCacheSim. Without it,
the cases that replay one are left out.

What this does not do: measure media.
"""

import sys
from collections.abc import Sequence

from pmemkit.bench._blocks import add_trace_option
from pmemkit.bench._counting import counting_cases
from pmemkit.bench._levelling import levelling_cases
from pmemkit.bench._runner import Report, parse_options, suite

__all__ = ["main"]


@suite
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the suite."""
    options, found = parse_options(
        "wear", arguments, runs=15, seconds=0.3, quick_seconds=0.05, more=add_trace_option
    )
    report = Report(options)
    levelling_cases(report, found.trace)
    counting_cases(report)
    report.write()


if __name__ == "__main__":
    sys.exit(main())
