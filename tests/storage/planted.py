"""Runs the durability oracle on this process's native module and says what it found.

Exit code: 0 nothing found, 10 a promise was broken, 2 the build has no planted faults. With a
planted build the environment's ``PMEMKIT_PLANT`` says which step does nothing: ``flush``, ``fua``,
``fence`` or ``commit``; without it the build must behave.
"""

import sys

from pmemkit._native import PLANTED_FAULTS
from pmemkit.testing import DurabilityError, TransmissionClient, check_streams

SEEDS = range(3)


def main() -> int:
    if not PLANTED_FAULTS:
        print("this build has no planted faults")
        return 2
    judged = 0
    try:
        for granularity in ("byte", "cacheline", "page"):
            judged += check_streams(granularity, SEEDS, count=25, limit=8)
            judged += check_streams(
                granularity,
                SEEDS,
                count=25,
                size=1 << 16,
                limit=4,
                lengths=(20000,),
                connect=TransmissionClient,
            )
    except DurabilityError as error:
        print(f"violation: {error}")
        return 10
    print(f"nothing found in {judged} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
