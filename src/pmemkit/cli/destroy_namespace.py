"""``pmem destroy-namespace``: a namespace, or all of them, removed from an image."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._namespaces import (
    add_machine_options,
    dimms_of_namespace,
    namespace_json,
    note,
    opened,
    region_name,
    seen_bus,
    split_target,
)
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageNamespace
    from pmemkit.namespace.images import Images

__all__ = ["run"]

_EXAMPLES = """\
  pmem destroy-namespace disk.img namespace0.1
  pmem destroy-namespace disk.img:namespace0.1
  pmem destroy-namespace vm.toml all -r region1"""
_NOTES = """\
Its space is free at once. The first 8 KiB, where info blocks live, are zeroed; the rest stays until
somebody writes there. A label-less namespace loses its info block and is raw again."""


def run(arguments: Sequence[str]) -> int:
    """Removes namespaces and says how many."""
    parser = make_parser("destroy-namespace", "Remove a namespace.", _EXAMPLES, _NOTES)
    add_machine_options(parser, paths="path")
    parser.add_argument("namespace", nargs="?", help="name, uuid, or all")
    parser.add_argument("-r", "--region", help="with all: only those of this region")
    parser.add_argument(
        "-f", "--force", action="store_true", help="also what is damaged and could be repaired"
    )
    parser.add_argument("--json", action="store_true", help="print what was destroyed")
    options = parser.parse_args(arguments)
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace, or all", op="destroy", path=path)
    from pmemkit.namespace.create import destroy

    gone = []
    if name == "all":
        bus = seen_bus(options, [path])
        wanted = region_name(options.region)
        regions = [bus.region(wanted)] if wanted is not None else list(bus.regions)
        numbers = [number for each in regions for number in bus.machine.sets[each.span.index]]
        with opened(options, path, numbers) as images:
            for region in regions:
                gone += _all_of(images, region.dev, force=options.force)
    else:
        numbers = list(dimms_of_namespace(options, path, name))
        with opened(options, path, numbers) as images:
            gone.append(destroy(images, name, force=options.force))
    for each in gone:
        if each.found is None:
            note(f"{each.dev} is label-less: it has lost its info block, stays, and is raw now")
    if options.json:
        print_json([namespace_json(each) for each in gone])
    plural = "" if len(gone) == 1 else "s"
    print(f"destroyed {len(gone)} namespace{plural}", file=sys.stderr)
    return 0


def _all_of(images: "Images", region: str, *, force: bool) -> "list[ImageNamespace]":
    """By uuid: the numbers of the others change with each one that goes."""
    from pmemkit.namespace.create import destroy

    gone = []
    for each in images.bus().region(region).namespaces:
        if each.found is not None:
            gone.append(destroy(images, str(each.uuid), force=force))
        elif each.claim.info is not None or each.claim.faults:
            gone.append(destroy(images, each.dev, force=force))
    return gone
