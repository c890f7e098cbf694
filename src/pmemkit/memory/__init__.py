"""Memory: pools over regions that are RAM by nature, arrays that survive, hot add and remove.

Start with :class:`MemoryPool`; docs/memory-pools.md is for users, docs/internals/memory.md for
those who change it.
"""

from pmemkit.memory.named import SharedArrays, open_arrays
from pmemkit.memory.pool import BLOCK_SIZE, MemoryPool, Migration
from pmemkit.memory.provider import Block, ProcessProvider, Provider, RegionProvider
from pmemkit.memory.regions import RegionSpec
from pmemkit.memory.tiering import Tiering

__all__ = [
    "BLOCK_SIZE",
    "Block",
    "MemoryPool",
    "Migration",
    "ProcessProvider",
    "Provider",
    "RegionProvider",
    "RegionSpec",
    "SharedArrays",
    "Tiering",
    "open_arrays",
]
