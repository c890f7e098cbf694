"""Runs the durability oracle on this process's native module and says what it found.

Exit code: 0 nothing found, 10 a promise was broken, 2 the build has no planted faults. With a
planted build the environment's ``PMEMKIT_PLANT`` says which step does nothing: ``flush``, ``fua``,
``fence`` or ``commit``, or which mistake a cache makes: ``cache-flush``, ``cache-eviction``,
``cache-fua``. Without it the build must behave.
"""

import os
import sys

from pmemkit._native import PLANTED_FAULTS, block
from pmemkit.testing import DurabilityError, TransmissionClient, check_streams

SEEDS = range(3)
PLANT = os.environ.get("PMEMKIT_PLANT", "")


def cached(below: block.Device) -> block.Device:
    """The stack with a cache on top that holds two blocks; who uses it writes back alone."""
    return block.cache(below, size=8192, flush_age=None).device


def main() -> int:
    if not PLANTED_FAULTS:
        print("this build has no planted faults")
        return 2
    judged = 0
    try:
        if not PLANT or PLANT.startswith("cache-"):
            judged += check_streams("page", SEEDS, limit=8, layers=cached)
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
