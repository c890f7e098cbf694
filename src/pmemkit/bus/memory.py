"""Memory blocks: what the kernel onlines and offlines, where they are, and whose they are.

What this does not do: change their state, or know what is in them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmemkit.bus.sysfs import Node, by_number

__all__ = [
    "Block",
    "Range",
    "Zone",
    "auto_online",
    "block_size",
    "blocks_of",
    "dram_of",
    "node_bytes",
    "zone_of",
]

Zone = Literal["movable", "kernel", "mixed"]
Range = tuple[int, int]
"""Physical addresses: the first byte, and the one after the last."""

_DEFAULT_BLOCK_SIZE = 128 << 20
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Block:
    """A memory block."""

    number: int
    place: Path
    online: bool
    zones: tuple[str, ...]
    """In the kernel's words: where it is, or, while offline, where it may go."""

    @property
    def zone(self) -> Literal["movable", "kernel"] | None:
        """Where an online block is."""
        if not self.online or not self.zones:
            return None
        return "movable" if self.zones == ("Movable",) else "kernel"


def _memory(sysfs: str | Path) -> Node:
    return Node("memory", Path(sysfs) / "devices" / "system" / "memory")


def block_size(sysfs: str | Path = "/sys") -> int:
    """Bytes of a memory block; x86's usual 128 MiB where the kernel does not say."""
    size = _memory(sysfs).size("block_size_bytes", 16)
    return size if size else _DEFAULT_BLOCK_SIZE


def auto_online(sysfs: str | Path = "/sys") -> str | None:
    """What the kernel does with new blocks: offline, online, online_kernel, online_movable."""
    text = _memory(sysfs).text("auto_online_blocks")
    return text if text is not None and re.fullmatch(r"[a-z_]{1,32}", text) else None


def blocks_of(ranges: Iterable[Range], sysfs: str | Path = "/sys") -> list[Block]:
    """The blocks that lie wholly in one of the ranges, in the order of their addresses. A driver
    that makes memory of a range leaves out what is no whole block at its ends."""
    size = block_size(sysfs)
    spans = [(-(-start // size), end // size) for start, end in ranges]
    if not spans:
        return []
    # Of the blocks that exist those are taken: a range may be senselessly long.
    numbers = (by_number(node)[0] for node in _memory(sysfs).below(r"memory\d+"))
    inside = [number for number in numbers if any(a <= number < b for a, b in spans)]
    return [block for number in inside if (block := _block(number, sysfs)) is not None]


def _block(number: int, sysfs: str | Path) -> Block | None:
    node = Node(f"memory{number}", _memory(sysfs).place / f"memory{number}")
    state = node.text("state")
    if state is None:
        return None
    zones = tuple((node.text("valid_zones") or "").split())
    return Block(number, node.place, state != "offline", zones)


def zone_of(blocks: Iterable[Block]) -> Zone | None:
    """The zone of those that are online."""
    zones = {block.zone for block in blocks if block.zone is not None}
    if len(zones) > 1:
        return "mixed"
    return next(iter(zones)) if zones else None


def node_bytes(node: int, sysfs: str | Path = "/sys") -> dict[str, int]:
    """``meminfo`` of a node: bytes by name."""
    text = Node(f"node{node}", _nodes(sysfs) / f"node{node}").text("meminfo") or ""
    found = re.finditer(r"^Node \d+ ([\w()]+):\s+(\d{1,15}) kB$", text, re.MULTILINE)
    return {each[1]: int(each[2]) * _KIB for each in found}


def dram_of(lent: Iterable[Range], sysfs: str | Path = "/sys") -> tuple[int | None, int | None]:
    """Bytes of ordinary memory, and how many of them are free or clean file cache. What was lent by
    DAX devices is no ordinary memory. ``None``: the kernel does not say."""
    numbers = {block.number for block in blocks_of(lent, sysfs)}
    size = block_size(sysfs)
    total = free = 0
    known = False
    nodes = Node("node", _nodes(sysfs)).below(r"node\d+")
    for node in sorted(nodes, key=by_number):
        bytes_of = node_bytes(by_number(node)[0], sysfs)
        if "MemTotal" not in bytes_of:
            continue
        known = True
        blocks = {by_number(each)[0] for each in node.below(r"memory\d+")}
        if blocks and blocks <= numbers:
            continue
        online = sum(1 for number in blocks & numbers if _is_online(number, sysfs))
        here = max(0, bytes_of["MemTotal"] - online * size)
        cache = bytes_of.get("Active(file)", 0) + bytes_of.get("Inactive(file)", 0)
        total += here
        free += min(here, bytes_of.get("MemFree", 0) + cache)
    return (total, free) if known else (None, None)


def _is_online(number: int, sysfs: str | Path) -> bool:
    block = _block(number, sysfs)
    return block is not None and block.online


def _nodes(sysfs: str | Path) -> Path:
    return Path(sysfs) / "devices" / "system" / "node"
