"""Suite ``wear``: what counting what is written costs.

What this does not do: measure media.
"""

import sys
from collections.abc import Sequence

from pmemkit.bench._counting import counting_cases
from pmemkit.bench._runner import Options, Report, parse_options, refuse_debug_build
from pmemkit.errors import PmemError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; the exit status is that of the first error."""
    options, _ = parse_options("wear", arguments, runs=11, seconds=0.5)
    if options.quick:
        options = Options(options.json_path, options.only, True, options.runs, 0.05)
    try:
        refuse_debug_build()
        report = Report(options)
        counting_cases(report)
        report.write([])
    except PmemError as failure:
        print(f"pmem bench: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
