"""``pmem reconfigure``: a namespace turned into another mode, after saying what is lost."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser
from pmemkit.cli._namespaces import (
    add_machine_options,
    opened,
    print_namespace,
    progress_bar,
    seen_bus,
    split_target,
)
from pmemkit.cli.create_namespace import add_wish_options, wish_of
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageNamespace
    from pmemkit.bus.machine import Machine

__all__ = ["reconfigure", "run"]

_EXAMPLES = """\
  pmem reconfigure disk.img namespace0.0 -m sector -l 4096
  pmem reconfigure disk.img:namespace0.0 -m fsdax -M mem --yes"""


def run(arguments: Sequence[str]) -> int:
    """Converts after a confirmation."""
    parser = make_parser(
        "reconfigure",
        "Turn a namespace into another mode. Its data are lost; place and size stay.",
        _EXAMPLES,
    )
    add_machine_options(parser, paths="path")
    parser.add_argument("namespace", nargs="?", help="name or uuid")
    add_wish_options(parser, mode_required=True)
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("-f", "--force", action="store_true", help="the same as --yes")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--json", action="store_true", help="JSON is what is printed anyway")
    options = parser.parse_args(arguments)
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace", op="reconfigure", path=path)
    return reconfigure(options, path, name, options.yes or options.force)


def reconfigure(options: argparse.Namespace, path: str, name: str, confirmed: bool) -> int:
    """Says what is lost, asks unless ``confirmed``, converts, prints the result."""
    from pmemkit.namespace.create import reconfigure as convert

    bus = seen_bus(options, [path])
    here = bus.namespace(name)
    options.mode = options.mode or here.claim.mode
    print("\n".join(_losses(bus.machine, here, options.mode)), file=sys.stderr)
    if not confirmed:
        _confirm(here.dev)
    numbers = bus.machine.sets[here.region.span.index]
    with opened(options, path, numbers) as images, progress_bar("clearing") as progress:
        made = convert(images, here.dev, wish_of(options), progress=progress)
    print_namespace(made, verbose=options.verbose)
    return 0


def _losses(machine: "Machine", here: "ImageNamespace", mode: str) -> list[str]:
    from pmemkit.storage.signatures import find_signature

    found = find_signature(machine, here.dev)
    size = here.claim.size if here.claim.size is not None else here.size
    named = f" {here.name!r}" if here.name else ""
    lines = [f"{here.dev}{named}: {here.claim.mode}, {format_size(size)} of data, becomes {mode}"]
    lines.append(f"  lost: {found}" if found else "  lost: whatever data it holds")
    return lines


def _confirm(name: str) -> None:
    if not sys.stdin.isatty():
        text = f"{name} would lose its data: --yes confirms that"
        raise InvalidArgument(text, op="reconfigure")
    print(f"Type the name {name} to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != name:
        raise InvalidArgument("not confirmed, nothing was changed", op="reconfigure")
