"""NUMA nodes: how far they are from each other, and where the calling thread runs.

What this does not do: bind anything to a node.
"""

import ctypes
from pathlib import Path

from pmemkit.bus.sysfs import Node, by_number

__all__ = [
    "distance_to_processors",
    "is_online",
    "node_distances",
    "node_of_cpu",
    "this_cpu",
    "thread_node",
]

_NEAREST, _FARTHEST = 10, 254
"""What the SLIT may say: 10 is the node itself, 255 that there is no way."""


def _nodes(sysfs: str | Path) -> list[Node]:
    system = Path(sysfs) / "devices" / "system" / "node"
    return sorted(Node("node", system).below(r"node\d+"), key=by_number)


def is_online(number: int | None, sysfs: str | Path = "/sys") -> bool:
    """True for a node that has memory or processors now."""
    return any(by_number(each) == [number] for each in _nodes(sysfs))


def node_distances(number: int, sysfs: str | Path = "/sys") -> dict[int, int]:
    """The distance of every node that is online from this one; nothing of those without any."""
    nodes = _nodes(sysfs)
    # A row has a column for each node that is online.
    columns = [by_number(each)[0] for each in nodes]
    here = next((each for each in nodes if by_number(each) == [number]), None)
    row = (here.text("distance") or "").split() if here is not None else []
    if len(row) != len(columns):
        return {}
    told = zip(columns, row, strict=True)
    found = {node: int(text) for node, text in told if text.isascii() and text.isdecimal()}
    return {node: each for node, each in found.items() if _NEAREST <= each <= _FARTHEST}


def distance_to_processors(number: int, sysfs: str | Path = "/sys") -> int | None:
    """The distance of a node from the nearest that has processors."""
    distances = node_distances(number, sysfs)
    busy = {by_number(each)[0] for each in _nodes(sysfs) if each.text("cpulist")}
    return min((far for node, far in distances.items() if node in busy), default=None)


_sched_getcpu = ctypes.CDLL(None).sched_getcpu


def this_cpu() -> int:
    """The processor that the calling thread runs on; the scheduler may move it."""
    return int(_sched_getcpu())


def thread_node(sysfs: str | Path = "/sys") -> int | None:
    """The node of the processor that the calling thread runs on."""
    return node_of_cpu(this_cpu(), sysfs)


def node_of_cpu(cpu: int, sysfs: str | Path = "/sys") -> int | None:
    """The node of a processor."""
    place = Path(sysfs) / "devices" / "system" / "cpu" / f"cpu{cpu}"
    found = Node(place.name, place).below(r"node\d+") if cpu >= 0 else []
    return by_number(found[0])[0] if found else None
