"""``pmem info``: what a region is, what it promises and what it costs."""

import argparse
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.media import OpenedMedium
    from pmemkit.storage import Region

__all__ = ["page_tables_bytes", "run"]

_EXAMPLES = """\
  pmem info disk.img
  pmem info /dev/pmem0 --json
  PMEMKIT_GRANULARITY=cacheline pmem info disk.img"""

_PROMISES = {
    "byte": "a write is durable once it is visible: FLUSH is a fence",
    "cacheline": "a write is durable when it is acknowledged: lines are written back and fenced",
    "page": "a write is durable after FLUSH, or at once with FUA: both are fdatasync or msync",
}
_ENTRY_SIZE = 8
_WINDOW_SIZE = 1 << 36


def run(arguments: Sequence[str]) -> int:
    """Prints what is known of a region. It is opened read-only and not locked."""
    parser = make_parser(
        "info",
        "Show what a region is, what it promises and what it costs. It may be in use.",
        _EXAMPLES,
    )
    parser.add_argument("path", metavar="PATH", help="file, block device or device DAX")
    parser.add_argument("--granularity", choices=("byte", "cacheline", "page"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    facts = _facts(options)
    if options.json:
        print_json(facts)
    else:
        print("\n".join(_lines(facts)))
    return 0


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    from pmemkit._native import media
    from pmemkit.storage import open_region

    with open_region(
        options.path, read_only=True, granularity=options.granularity, locking="off"
    ) as region:
        opened = region.opened
        data, holes = _data_and_holes(region)
        port = media.port()
        leaf = _leaf_size(opened)
        return {
            "path": region.path,
            "kind": opened.backing,
            "size": region.size,
            "nature": "unknown",
            "personality": "storage",
            "mode": "raw",
            "granularity": region.granularity,
            "granularity_found": opened.decision.found,
            "why": list(opened.decision.why),
            "volatile": region.volatile,
            "volatile_because": opened.volatile_because,
            "persistence_domain": region.persistence_domain,
            "durability": _durability(region),
            "atomicity": "8 aligned bytes; sectors may be torn by a power failure",
            "sharing": "private" if opened.file is None else "shared",
            "map_sync": opened.decision.map_sync,
            "page_size": leaf,
            "page_tables_bytes": page_tables_bytes(region.size, leaf),
            "page_map": "none",
            "page_map_bytes": 0,
            "data_bytes": data,
            "hole_bytes": holes,
            "allocated_bytes": _allocated(opened),
            "cpu_flush": port.flush,
            "cpu_copy": port.copy,
            "nontemporal_threshold": port.movnt_threshold,
            "cacheline_size": port.cacheline_size,
        }


def _durability(region: "Region") -> str:
    volatile = region.opened.volatile_because
    if volatile is not None:
        return f"none: {volatile}; FLUSH only orders"
    return _PROMISES[region.granularity]


def _data_and_holes(region: "Region") -> tuple[int, int]:
    data = holes = 0
    for offset in range(0, region.size, _WINDOW_SIZE):
        length = min(_WINDOW_SIZE, region.size - offset)
        for run_length, hole in region.medium.extents(offset, length):
            if hole:
                holes += run_length
            else:
                data += run_length
    return data, holes


def _allocated(opened: "OpenedMedium") -> int | None:
    """Bytes that the file takes on its file system."""
    if opened.file is None:
        return None
    status = os.fstat(opened.file.fileno())
    return status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else None


def _leaf_size(opened: "OpenedMedium") -> int:
    """What one entry of the page tables maps at least."""
    if opened.backing == "hugetlb" and opened.file is not None:
        return os.fstat(opened.file.fileno()).st_blksize
    return os.sysconf("SC_PAGE_SIZE")


def page_tables_bytes(size: int, leaf: int) -> int:
    """Bytes of page tables when all of ``size`` bytes are mapped by entries of ``leaf`` bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, covered = 0, leaf * (page // _ENTRY_SIZE)
    while size:
        tables = -(-size // covered)
        total += tables * page
        if tables == 1:
            break
        covered *= page // _ENTRY_SIZE
    return total


def _lines(facts: dict[str, Any]) -> list[str]:
    allocated = facts["allocated_bytes"]
    room = "" if allocated is None else f", {format_size(allocated)} allocated"
    tables = format_size(facts["page_tables_bytes"])
    mapping = "MAP_SYNC" if facts["map_sync"] else "no MAP_SYNC"
    rows = [
        ("kind", facts["kind"]),
        ("size", f"{format_size(facts['size'])} ({facts['size']} bytes)"),
        (
            "content",
            f"{format_size(facts['data_bytes'])} data, "
            f"{format_size(facts['hole_bytes'])} holes{room}",
        ),
        ("nature", "unknown, so it is taken for storage; mode raw"),
        ("granularity", facts["granularity"]),
        *(("why", sentence) for sentence in facts["why"]),
        ("durability", facts["durability"]),
        ("atomicity", facts["atomicity"]),
        ("power failure", f"persistence domain {facts['persistence_domain']}"),
        ("mapping", f"{facts['sharing']}, {mapping}, entries of {format_size(facts['page_size'])}"),
        ("page tables", f"{tables} when all of it is mapped"),
        ("page map", "none; storage never has one"),
        (
            "CPU",
            f"{facts['cpu_flush']}, {facts['cpu_copy']}, non-temporal copies from "
            f"{facts['nontemporal_threshold']} bytes",
        ),
    ]
    return [facts["path"], *(f"  {name + ':':15} {text}" for name, text in rows)]
