"""``pmem inject-error``: makes blocks of a namespace on an image unreadable, as ndctl does it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.bus.report import as_json, human_hex
from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._namespaces import add_machine_options, seen_bus, split_target
from pmemkit.errors import InvalidArgument, NotSupported, OutOfRange
from pmemkit.media.badblocks import BAD_BLOCK_SIZE, BadRun, clip, note, read_bad_blocks

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageNamespace

__all__ = ["run"]

_EXAMPLES = """\
  pmem inject-error disk.img namespace0.0 --block=12 --count=2
  pmem inject-error disk.img namespace0.0 --status
  pmem inject-error disk.img:namespace0.0 --block=12 --count=2 --uninject"""
_NOTES = """\
Blocks have 512 bytes and count from the start of the namespace; of modes fsdax and devdax from the
start of the data. A read that touches one fails with EIO; a write that covers it clears it. The
list is a file beside the image, IMAGE.badblocks; it concerns whatever opens the image through pmem,
from the next opening on, and nobody else."""


def run(arguments: Sequence[str]) -> int:
    """Changes the list of bad blocks, or shows it."""
    parser = make_parser("inject-error", "Make blocks unreadable.", _EXAMPLES, _NOTES)
    add_machine_options(parser, paths="path")
    parser.add_argument("namespace", nargs="?", help="name or uuid")
    parser.add_argument("-B", "--block", type=size, metavar="N", help="the first one")
    parser.add_argument("-n", "--count", type=size, metavar="N", help="how many")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "-d", "--uninject", action="store_true", help="make them readable, with what they held"
    )
    what.add_argument("-t", "--status", action="store_true", help="show what is bad")
    parser.add_argument("-N", "--no-notify", action="store_true", help="taken, as in ndctl")
    parser.add_argument("-S", "--saturate", action="store_true", help="taken, as in ndctl")
    parser.add_argument("-u", "--human", action="store_true", help="numbers for people")
    options = parser.parse_args(arguments)
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace", op="inject-error", path=path)
    here = seen_bus(options, [path]).namespace(name)
    if here.region.span.ways > 1:
        text = f"{here.dev} spans several dimms"
        raise NotSupported(text, op="inject-error", path=path)
    if options.status:
        _show_status(here, human=options.human)
        return 0
    _change(options, here)
    _show(options, path, here.dev)
    return 0


def _extent(here: "ImageNamespace") -> tuple[int, int]:
    """Where block 0 is in the image, and the bytes from there on."""
    start, claim = here.region.dimms[0].spec.dpa + here.offset, here.claim
    if claim.enabled and claim.mode in ("fsdax", "devdax") and claim.size is not None:
        return start + claim.offset, claim.size
    return start, here.size


def _change(options: argparse.Namespace, here: "ImageNamespace") -> None:
    from pmemkit.media.provider import open_medium

    image = here.region.path
    if options.block is None or not options.count:
        raise InvalidArgument("say --block and --count", op="inject-error", path=image)
    start, length = _extent(here)
    blocks = length // BAD_BLOCK_SIZE
    if options.block + options.count > blocks:
        text = f"{options.count} blocks do not fit: {here.dev} has {blocks}"
        raise OutOfRange(text, op="inject-error", path=image, offset=options.block * BAD_BLOCK_SIZE)
    base = here.region.dimms[0].spec.dpa + here.offset
    # Who has it open would not see the change: its lock keeps us out.
    opened = open_medium(image, part=(base, here.size))
    try:
        place = BadRun(start // BAD_BLOCK_SIZE + options.block, options.count)
        note(image, "uninject" if options.uninject else "inject", place)
    finally:
        opened.close()


def _show(options: argparse.Namespace, path: str, name: str) -> None:
    from pmemkit.bus import observe
    from pmemkit.bus.records import namespace_record
    from pmemkit.cli._namespaces import the_machine

    here = observe(the_machine(options, [path])).namespace(name)
    print_json(as_json(namespace_record(here, media_errors=True), options.human))


def _show_status(here: "ImageNamespace", *, human: bool) -> None:
    def shown(number: int) -> int | str:
        return human_hex(number) if human else number

    runs = clip(read_bad_blocks(here.region.path), *_extent(here))
    rows = [{"block": shown(each.offset), "count": shown(each.length)} for each in runs]
    print_json({"badblocks": rows})
