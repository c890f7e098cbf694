"""Placement ``local``: regions in the order in which the calling thread's extents try them.

A region's rank is as its nearest processors see it; a thread on another node is farther from it,
by what the SLIT says. Regions whose user gave a rank, a latency or a distance keep their rank.

Invariants:
1. An order has every region once, and is the same for all threads of a node.
2. Where no region has a node there is no order: the core's, by rank, is the same and costs nothing.

What this does not do: place objects that share slabs, or what NumPy allocates by itself; those go
by rank.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pmemkit._native import memory as core
from pmemkit.bus.nodes import node_distances, node_of_cpu, this_cpu
from pmemkit.memory import attributes
from pmemkit.memory.tiers import rank_seen_from

if TYPE_CHECKING:
    from pmemkit.memory.regions import Opened

__all__ = ["Nearness"]


class Nearness:
    """The orders of the regions of a pool; made anew when one comes or goes."""

    def __init__(self, members: Iterable["Opened"]) -> None:
        self._members = tuple(members)
        self._matters = any(each.node is not None for each in self._members)
        self._nodes: dict[int, int | None] = {}
        self._orders: dict[int | None, tuple[int, ...]] = {}

    def order(self, nbytes: int) -> tuple[int, ...]:
        """The numbers of the regions for an extent of the calling thread, the nearest first;
        nothing where it is all the same."""
        if not self._matters or nbytes <= core.SMALL_MAX:
            return ()
        cpu = this_cpu()
        if cpu not in self._nodes:
            self._nodes[cpu] = node_of_cpu(cpu, attributes.SYSFS)
        node = self._nodes[cpu]
        if node not in self._orders:
            self._orders[node] = self._from(node)
        return self._orders[node]

    def _from(self, node: int | None) -> tuple[int, ...]:
        distances = node_distances(node, attributes.SYSFS) if node is not None else {}
        if not distances:
            return ()
        seen = [(rank_seen_from(each, distances), each.id) for each in self._members]
        return tuple(number for _, number in sorted(seen))
