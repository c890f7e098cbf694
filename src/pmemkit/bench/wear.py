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
from pmemkit.bench._runner import Options, Report, parse_options, refuse_debug_build
from pmemkit.errors import PmemError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; the exit status is that of the first error."""
    options, found = parse_options("wear", arguments, runs=15, seconds=0.3, more=add_trace_option)
    if options.quick:
        options = Options(options.json_path, options.only, True, options.runs, 0.05)
    try:
        refuse_debug_build()
        report = Report(options)
        levelling_cases(report, found.trace)
        counting_cases(report)
        report.write()
    except PmemError as failure:
        print(f"pmem bench: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
