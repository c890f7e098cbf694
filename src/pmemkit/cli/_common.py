"""What the commands share: parsers with examples, sizes as arguments, JSON on standard output."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from pmemkit.errors import PmemError
from pmemkit.units import parse_size

__all__ = [
    "add_levelling_options",
    "add_open_options",
    "make_parser",
    "print_json",
    "size",
    "typed",
]

T = TypeVar("T")


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose refusal argparse shows as it is."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except PmemError as refusal:
            raise argparse.ArgumentTypeError(refusal.message) from None

    return parse_argument


size = typed(parse_size)


def make_parser(command: str, what: str, examples: str, notes: str = "") -> argparse.ArgumentParser:
    """A parser that shows examples below its options."""
    notes = f"{notes}\n\n" if notes else ""
    return argparse.ArgumentParser(
        prog=f"pmem {command}",
        description=what,
        epilog=f"{notes}examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_open_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of every command that opens regions."""
    parser.add_argument(
        "--granularity",
        choices=("byte", "cacheline", "page"),
        help="override what the platform says a store needs to be durable",
    )
    parser.add_argument(
        "--locking",
        choices=("on", "off"),
        default="on",
        help="off: open an image that something else has open (two writers destroy it)",
    )
    parser.add_argument(
        "--ordering",
        choices=("default", "strict"),
        default="default",
        help="strict: mode sector on a plain file pays for fdatasync at each ordering point: "
        "sectors are old or new after a power failure of the host too",
    )
    parser.add_argument(
        "--wear",
        choices=("sampled", "exact", "off"),
        default="sampled",
        help="how what is written is counted by block, for pmem wear",
    )


def add_levelling_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of every command that serves regions."""
    from pmemkit.storage.levelling import LEVELLING_PERIOD, LEVELLINGS

    parser.add_argument(
        "--levelling",
        choices=LEVELLINGS,
        help="of mode sector: spread the wear of what is written often; worn blocks go to sectors "
        "at random, or to those whose blocks are least worn (4 bytes of RAM a block); without this "
        "option it depends on the region, and the choice is printed",
    )
    parser.add_argument(
        "--levelling-period",
        type=int,
        default=LEVELLING_PERIOD,
        metavar="N",
        help="writes for one that levelling adds, at most: the psi of Start-Gap (%(default)s)",
    )


def print_json(value: Any) -> None:
    """Prints JSON that people can read too."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
