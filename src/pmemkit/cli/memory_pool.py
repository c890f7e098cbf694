"""``pmem memory`` and ``pmem top``: the pool of a running program, through its control socket.

What this does not do: make pools; programs do, and publish them with ``pool.publish(path)``.
"""

import argparse
import sys
import time
from typing import Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.memory.control import ask
from pmemkit.units import format_size

__all__ = ["run", "run_top"]

_MEMORY_EXAMPLES = """\
  pmem memory stat /run/app.pool
  pmem memory add /run/app.pool /dev/dax1.0 --rank 1
  pmem memory remove /run/app.pool /dev/dax1.0 --timeout 30
  pmem memory offline /run/app.pool anonymous:1G --first 2 --count 4"""
_TOP_EXAMPLES = """\
  pmem top /run/app.pool
  pmem top /run/app.pool --count 1"""
_MARKS = {"online": "#", "offline": "-", "leaving": ">"}
_BLOCKS_SHOWN = 64


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "memory", "What a running program's pool has, and changes of it.", _MEMORY_EXAMPLES
    )
    parser.add_argument(
        "verb",
        choices=("stat", "map", "add", "remove", "online", "offline"),
        metavar="VERB",
        help="stat, map, add, remove, online, offline",
    )
    parser.add_argument("socket", metavar="SOCKET", help="where the program published its pool")
    parser.add_argument("region", metavar="REGION", nargs="?", help="a region, or its path for add")
    parser.add_argument("--first", type=int, default=0, help="first block (0)")
    parser.add_argument("--count", type=int, default=1, help="blocks (1)")
    parser.add_argument("--timeout", type=float, help="seconds, after which all is put back")
    parser.add_argument("--name", help="what an added region is called")
    parser.add_argument("--rank", type=int, help="regions of a smaller rank are filled first")
    parser.add_argument("--weight", type=int, help="share of what is interleaved")
    parser.add_argument("--names", action="store_true", help="it has named arrays")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    return parser


def run(arguments: list[str]) -> int:
    """Carries out ``pmem memory``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verb not in ("stat", "map") and options.region is None:
        parser.error(f"{options.verb} needs a region")
    request: dict[str, Any] = {"op": options.verb, "region": options.region}
    if options.verb == "add":
        request |= {"name": options.name, "rank": options.rank, "weight": options.weight}
        request["names"] = options.names or None
    else:
        request["timeout"] = options.timeout
        request |= {"first": options.first, "count": options.count}
    told = sys.stderr.isatty()
    answer = ask(options.socket, request, _tell if told else None)
    if options.json:
        print_json(answer)
    else:
        print("\n".join(_lines(options.verb, answer)))
    return 0


def _tell(moved: int, total: int) -> None:
    print(f"\r{format_size(moved)} of {format_size(total)} ", end="", file=sys.stderr, flush=True)


def _lines(verb: str, answer: Any) -> list[str]:
    match verb:
        case "stat":
            return _stat_lines(answer)
        case "map":
            return [_extent_line(each) for each in answer]
        case "add":
            return [f"added {answer}"]
        case "online":
            return ["online"]
    rate = answer["bytes"] / answer["elapsed_ns"] * 1e9 if answer["elapsed_ns"] else 0
    return [
        f"{verb}: {format_size(answer['bytes'])} of {answer['extents']} extents moved, "
        f"{format_size(int(rate))}/s; a store waited {answer['hold_ns_peak'] / 1e6:.2f} ms at most"
    ]


def _extent_line(each: dict[str, Any]) -> str:
    pieces = ", ".join(
        f"{piece['region']} {piece['frame']}+{piece['frames']}" for piece in each["pieces"]
    )
    flags = [name for name in ("fixed", "slab") if each[name]]
    flags += [f"{each['pins']} pins"] if each["pins"] else []
    return f"{each['address']:#x} {format_size(each['length']):>11}  {pieces}  {' '.join(flags)}"


def _stat_lines(stat: dict[str, Any]) -> list[str]:
    lines = [
        f"pool of process {stat['pid']}: {format_size(stat['used'])} in use, "
        f"{format_size(stat['used_peak'])} at most; blocks of {format_size(stat['block_size'])}, "
        f"placement {stat['placement']}",
        f"  {stat['allocations']} extents handed out, {stat['frees']} given back, "
        f"{stat['refused']} refused; {stat['small_objects']} objects in {stat['slabs']} slabs",
        f"  {format_size(stat['migrated'])} migrated; a store waited "
        f"{stat['hold_ns_peak'] / 1e6:.2f} ms at most",
    ]
    for region in stat["regions"]:
        lines += _region_lines(region, stat["block_size"])
    for each in stat["providers"]:
        lines.append(f"  {each['name']}: {format_size(each['used'])} in blocks, no address here")
    lines += _tiering_lines(stat["tiering"])
    for name, (moved, total) in stat["migrations"].items():
        lines.append(f"  moving {name}: {format_size(moved)} of {format_size(total)}")
    return lines


def _tiering_lines(tiering: dict[str, Any] | None) -> list[str]:
    if tiering is None:
        return []
    state = "on" if tiering["running"] else "off"
    lines = [
        f"  tiering by {tiering['heat']} {state}: {format_size(tiering['promoted'])} promoted, "
        f"{format_size(tiering['demoted'])} demoted; {tiering['samples']} samples of "
        f"{tiering['chunks_known']} chunks took {tiering['sampling_ns'] / 1e6:.1f} ms"
    ]
    return lines + ([f"    held up: {tiering['reason']}"] if tiering["reason"] else [])


def _region_lines(region: dict[str, Any], block_size: int) -> list[str]:
    used = sum(block["used"] for block in region["blocks"])
    notes = [f"rank {region['rank']}", f"weight {region['weight']}"]
    notes += [f"writers by {region['writers']}"]
    notes += ["named arrays"] if region["names"] else []
    notes += ["TRUNCATED"] if region["truncated"] else []
    shown = "".join(_block_mark(block, block_size) for block in region["blocks"][:_BLOCKS_SHOWN])
    more = len(region["blocks"]) - _BLOCKS_SHOWN
    return [
        f"  {region['name']}: {format_size(used)} of {format_size(region['size'])} in use, "
        f"{format_size(region['free'])} free; {', '.join(notes)}",
        f"    [{shown}]" + (f" and {more} blocks more" if more > 0 else ""),
        *_attribute_lines(region),
    ]


def _attribute_lines(region: dict[str, Any]) -> list[str]:
    """What is known of its speed, and who says so."""
    shapes = {"latency_ns": "{:g} ns", "bandwidth": "{}/s", "distance": "distance {:g}"}
    told = []
    for name, shape in shapes.items():
        value, origin = region[name], region["attributes_from"][name]
        if value is not None:
            size = format_size(round(value)) if name == "bandwidth" else value
            told.append(f"{shape.format(size)} ({origin})")
    told += [f"node {region['node']}"] if region["node"] is not None else []
    return [f"    {', '.join(told)}"] if told else []


def _block_mark(block: dict[str, Any], block_size: int) -> str:
    """How full an online block is, in tenths; other states by their mark."""
    if block["state"] != "online":
        return _MARKS[block["state"]]
    tenths = -(-10 * block["used"] // block_size)
    return "." if tenths == 0 else _MARKS["online"] if tenths >= 10 else str(tenths)


def run_top(arguments: list[str]) -> int:
    """Carries out ``pmem top``."""
    parser = make_parser(
        "top",
        "A pool's regions and blocks, live.",
        _TOP_EXAMPLES,
        "Blocks: . empty, 1 to 9 tenths in use, # full, - offline, > being emptied.",
    )
    parser.add_argument("socket", metavar="SOCKET", help="where the program published its pool")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between looks (1)")
    parser.add_argument("--count", type=int, help="looks; as many as you like without it")
    options = parser.parse_args(arguments)
    left = options.count
    while left is None or left > 0:
        lines = _stat_lines(ask(options.socket, {"op": "stat"}))
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
        print(clear + "\n".join(lines), flush=True)
        left = None if left is None else left - 1
        if left != 0:
            time.sleep(options.interval)
    return 0
