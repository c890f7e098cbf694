"""``pmem info``: what a region is, what it promises and what it costs."""

import argparse
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._namespaces import add_machine_options, note, the_machine
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageNamespace
    from pmemkit.bus.nature import Verdict
    from pmemkit.media import OpenedMedium
    from pmemkit.storage import Region

__all__ = ["page_tables_bytes", "run"]

_EXAMPLES = """\
  pmem info disk.img                 with labels: the map of its region
  pmem info disk.img:namespace0.0    one namespace
  pmem info vm.toml                  all dimms of a machine file
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
        "Show what a region or namespace is, what it promises and what it costs. It may be in use.",
        _EXAMPLES,
    )
    add_machine_options(
        parser,
        paths="path",
        help="file, block device, device DAX, machine file, or IMAGE:namespaceR.N",
    )
    parser.add_argument("--granularity", choices=("byte", "cacheline", "page"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    bus = _mapped_bus(options)
    if bus is not None:
        from pmemkit.cli.show_map import map_facts, map_lines

        facts = map_facts(bus, options.path)
        lines = map_lines(facts)
    else:
        facts = _facts(options)
        lines = _lines(facts)
    if options.json:
        print_json(facts)
    else:
        print("\n".join(lines))
    return 0


def _mapped_bus(options: argparse.Namespace) -> "ImageBus | None":
    """What is on an image that is more than one raw namespace; ``None`` for anything else."""
    from pmemkit.bus.image import observe
    from pmemkit.bus.locate import split_namespace
    from pmemkit.media.provider import memory_spec

    path = options.path
    said = [options.label_size, options.slot, options.backend_align] != [None] * 3
    if split_namespace(path) is not None and not os.path.lexists(path):
        if said:
            text = "the options of a bare image go into a machine file (pmem init-machine)"
            raise InvalidArgument(text, op="info", path=path)
        return None
    if memory_spec(path) is not None or not os.path.isfile(path):  # noqa: PTH113
        return None
    bus = observe(the_machine(options, [path]))
    every = [each for region in bus.regions for each in region.namespaces]
    plain = not said and bus.machine.path is None and not bus.dimms[0].spec.label_size
    return None if plain and every[0].claim.info is None else bus


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
        here = None if region.place is None else region.place.namespace
        mapped = here is not None and here.claim.mode in ("fsdax", "devdax")
        verdict = _verdict(options.path, here)
        return {
            "path": region.path,
            "kind": opened.backing,
            "size": region.size,
            "nature": "unknown" if verdict is None else verdict.nature,
            "nature_because": None if verdict is None else verdict.because,
            "personality": "storage",
            "mode": region.mode,
            "cache": _caches(region, verdict),
            "granularity": region.granularity,
            "granularity_found": opened.decision.found,
            "why": list(opened.decision.why),
            "volatile": region.volatile,
            "volatile_because": opened.volatile_because,
            "persistence_domain": region.persistence_domain,
            "durability": _durability(region),
            "atomicity": _atomicity(here, region.granularity),
            "sharing": "private" if opened.file is None else "shared",
            "map_sync": opened.decision.map_sync,
            "page_size": leaf,
            "page_tables_bytes": page_tables_bytes(region.size, leaf),
            "page_map": here.claim.map if here is not None and mapped else "none",
            "page_map_bytes": _page_map_bytes(here) if here is not None and mapped else 0,
            "pool_map": _pool_map(here) if here is not None and mapped else None,
            "data_bytes": data,
            "hole_bytes": holes,
            "allocated_bytes": _allocated(opened),
            "cpu_flush": port.flush,
            "cpu_copy": port.copy,
            "nontemporal_threshold": port.movnt_threshold,
            "cacheline_size": port.cacheline_size,
            **({} if here is None else {"namespace": _namespace_facts(here)}),
        }


def _verdict(path: str, here: "ImageNamespace | None") -> "Verdict | None":
    """What the region is by nature; ``None`` for a file that is no namespace of a machine."""
    from pmemkit.bus.verdicts import verdict_at

    verdict, notes = verdict_at(path, here)
    for each in notes:
        note(each)
    return verdict


def _caches(region: "Region", verdict: "Verdict | None") -> dict[str, dict[str, str]]:
    """Which cache each kind of client gets where nobody asks for another."""
    from pmemkit.storage.defaults import decide, facts_of

    # It is opened read-only only to be shown.
    facts = replace(facts_of(region, verdict), read_only=False)
    nbd, mount = decide(facts, "nbd"), decide(facts, "mount")
    return {"serve": nbd.record(), "mount": mount.record()}


def _atomicity(here: "ImageNamespace | None", granularity: str) -> str:
    if here is None or here.claim.mode != "sector":
        return "8 aligned bytes; sectors may be torn by a power failure"
    if here.claim.info is not None and here.claim.info.flags & 1:
        return "the first arena carries the error flag, because a write failed there: read-only"
    promise = f"sectors of {here.claim.sector_size} bytes are old or new"
    if granularity != "page":
        return f"{promise}, never torn"
    return (
        f"{promise} when the process dies; when the host does, only with --ordering=strict (a file "
        "system writes pages back in any order)"
    )


def _page_map_bytes(here: "ImageNamespace") -> int:
    """What the kernel's page map of the namespace takes, in DRAM or in the namespace."""
    from pmemkit.formats.btt import BttInfo
    from pmemkit.formats.infoblock import DESCRIPTOR_SIZE

    info = here.claim.info
    return 0 if info is None or isinstance(info, BttInfo) else info.npfns * DESCRIPTOR_SIZE


def _pool_map(here: "ImageNamespace") -> dict[str, Any]:
    """What the page map of a pool over the namespace takes beside that of Linux."""
    from pmemkit.memory.page_map import bill

    return bill(here.claim.size or 0, "dev" if here.claim.map == "dev" else "mem")


def _namespace_facts(here: "ImageNamespace") -> dict[str, Any]:
    """What labels and info block say. Offsets are bytes: of the namespace in its region, of the
    data in the namespace."""
    from pmemkit.namespace.infoblock_verbs import infoblock_record

    claim = here.claim
    data_size = here.size if claim.size is None else claim.size
    return {
        "dev": here.dev,
        "labelled": here.found is not None,
        "name": here.name,
        "uuid": str(here.uuid),
        "offset": here.offset,
        "size": here.size,
        "address": here.start,
        "data_offset": claim.offset,
        "data_size": data_size,
        "sector_size": claim.sector_size,
        "align": claim.align,
        "infoblock": None if claim.info is None else infoblock_record(claim.info),
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
    nature, because = facts["nature"], facts["nature_because"]
    taken = "unknown, so it is taken for storage" if because is None else f"{nature}: {because}"
    rows = [
        ("kind", facts["kind"]),
        ("size", f"{format_size(facts['size'])} ({facts['size']} bytes)"),
        *_namespace_rows(facts),
        (
            "content",
            f"{format_size(facts['data_bytes'])} data, "
            f"{format_size(facts['hole_bytes'])} holes{room}",
        ),
        ("nature", f"{taken}; mode {facts['mode']}"),
        ("granularity", facts["granularity"]),
        *(("why", sentence) for sentence in facts["why"]),
        ("durability", facts["durability"]),
        ("atomicity", facts["atomicity"]),
        ("power failure", f"persistence domain {facts['persistence_domain']}"),
        ("mapping", f"{facts['sharing']}, {mapping}, entries of {format_size(facts['page_size'])}"),
        *(
            ("cache", f"{each['cache']} with pmem {command}: {each['cache_because']}")
            for command, each in facts["cache"].items()
        ),
        ("page tables", f"{tables} when all of it is mapped"),
        ("page map", _page_map_line(facts)),
        *(("", each) for each in _pool_map_lines(facts["pool_map"])),
        (
            "CPU",
            f"{facts['cpu_flush']}, {facts['cpu_copy']}, non-temporal copies from "
            f"{facts['nontemporal_threshold']} bytes",
        ),
    ]
    return [facts["path"], *(f"  {name and name + ':':15} {text}" for name, text in rows)]


def _page_map_line(facts: dict[str, Any]) -> str:
    if facts["page_map"] == "none":
        return "none; storage never has one"
    where = "in the namespace, before its data" if facts["page_map"] == "dev" else "in DRAM"
    return f"{facts['page_map']}: Linux {format_size(facts['page_map_bytes'])} {where}"


def _pool_map_lines(bill: dict[str, Any] | None) -> list[str]:
    if bill is None:
        return []
    ours, linux = bill["frame_bytes"], bill["linux_frame_bytes"]
    lines = [
        f"a pool {bill['bytes']} bytes, {bill['percent']:.3f} % of the data ({ours} a frame); "
        f"Linux {bill['linux_bytes']}, {bill['linux_percent']:.2f} % ({linux} a frame)"
    ]
    if bill["placement"] == "mem":
        return [*lines, "it writes nothing to the media"]
    return [
        *lines,
        f"it writes {bill['media_bytes_at_open']} bytes to the media at open, then a byte or more "
        "for each run of frames that is taken or given back, and never flushes",
    ]


def _namespace_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    here = facts.get("namespace")
    if here is None:
        return []
    label = f"labelled, uuid {here['uuid']}" if here["labelled"] else "label-less"
    named = f" {here['name']!r}" if here["name"] else ""
    rows = [
        ("namespace", f"{here['dev']}{named}, {label}"),
        (
            "place",
            f"{format_size(here['size'])} at {here['offset']:#x} of the region, physical "
            f"{here['address']:#x}",
        ),
    ]
    sectors = f", sectors of {here['sector_size']} bytes" if here["sector_size"] else ""
    aligned = f", aligned to {format_size(here['align'])}" if here["align"] else ""
    where = f" at {here['data_offset']:#x}" if here["data_offset"] else ""
    rows.append(("data", f"{format_size(here['data_size'])}{where}{sectors}{aligned}"))
    info = here["infoblock"]
    if info is not None:
        rows.append(("info block", f"{info['signature']} {info['version']}, uuid {info['uuid']}"))
    return rows
