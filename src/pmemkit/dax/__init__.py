"""Direct mappings, for programs that do their own caching: arrays, stores, databases.

    with pmemkit.map("pool.img", granularity="page") as mapping:
        array = mapping.array("<f8", (1000, 1000))

See ``docs/dax.md``.
"""

from pmemkit.dax.mapping import Mapping, map_medium
from pmemkit.dax.transactions import Log, Transaction

__all__ = ["Log", "Mapping", "Transaction", "map_medium"]
