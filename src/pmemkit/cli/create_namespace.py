"""``pmem create-namespace``: a namespace on an image, as ndctl makes one on a machine."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from pmemkit.cli._common import make_parser, size, typed
from pmemkit.cli._namespaces import (
    add_machine_options,
    note,
    opened,
    print_namespace,
    progress_bar,
    seen_bus,
    split_target,
)
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageRegion
    from pmemkit.namespace.create import Wish
    from pmemkit.namespace.images import Images

__all__ = ["add_wish_options", "run", "uuid_of", "wish_of"]

_EXAMPLES = """\
  pmem create-namespace disk.img -m fsdax                     all free space, map on media
  pmem create-namespace disk.img -m sector -s 4G -l 4096 -n journal
  pmem create-namespace vm.toml -r region1 -m devdax -a 1G -M mem
  pmem create-namespace rootfs.img -m fsdax                   label-less: boots without ndctl
  pmem create-namespace disk.img -e namespace0.0 -m raw -f    the same as pmem reconfigure"""
_NOTES = """\
A label-less image is one namespace: it gets an info block and no label. Where a label area is there
and blank, it is initialised first (version 1.2)."""


def uuid_of(text: str) -> UUID:
    """A uuid as people write one."""
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no uuid") from None


def add_wish_options(parser: argparse.ArgumentParser, *, mode_required: bool = False) -> None:
    """What the namespace is to be."""
    parser.add_argument(
        "-m",
        "--mode",
        choices=("raw", "sector", "fsdax", "devdax", "safe", "memory", "dax"),
        default=None if mode_required else "fsdax",
        required=mode_required,
        help="(safe, memory and dax are old names of sector, fsdax and devdax)",
    )
    parser.add_argument("-n", "--name", default="", help="up to 63 bytes")
    parser.add_argument(
        "-u", "--uuid", type=typed(uuid_of), help="of the label; random if not said"
    )
    parser.add_argument(
        "-l",
        "--sector-size",
        type=size,
        help="sector: 512, 520, 528, 4096, 4104, 4160 or 4224 (4096); others: 512 or 4096 (512)",
    )
    parser.add_argument(
        "-M", "--map", choices=("mem", "dev"), default="dev", help="where the page map lives (dev)"
    )
    parser.add_argument("-a", "--align", type=size, help="fsdax and devdax: 4K, 2M or 1G (2M)")


_OLD_NAMES = {"safe": "sector", "memory": "fsdax", "dax": "devdax"}


def wish_of(options: argparse.Namespace) -> "Wish":
    """The options as the verbs take them."""
    from pmemkit.namespace.create import Wish

    return Wish(
        mode=_OLD_NAMES.get(options.mode, options.mode),
        size=getattr(options, "size", None),
        name=options.name,
        uuid=options.uuid,
        sector_size=options.sector_size,
        map=options.map,
        align=options.align,
        force=options.force,
    )


def run(arguments: Sequence[str]) -> int:
    """Makes the namespace and prints it as JSON."""
    parser = make_parser("create-namespace", "Make a namespace.", _EXAMPLES, _NOTES)
    add_machine_options(parser, paths="path")
    parser.add_argument("-r", "--region", help="the first one with room if not said")
    parser.add_argument("-e", "--reconfig", metavar="NAMESPACE", help="convert an existing one")
    parser.add_argument("-s", "--size", type=size, help="a multiple of the region's alignment")
    add_wish_options(parser)
    parser.add_argument("-f", "--force", action="store_true", help="data may be lost")
    parser.add_argument("-L", "--autolabel", action="store_true", help="is the default")
    parser.add_argument(
        "--no-autolabel", action="store_true", help="leave a blank label area as it is"
    )
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--json", action="store_true", help="JSON is what is printed anyway")
    options = parser.parse_args(arguments)
    if options.reconfig:
        from pmemkit.cli.reconfigure_namespace import reconfigure

        return reconfigure(options, options.path, options.reconfig, options.force)
    path, named = split_target(options)
    if named is not None:
        raise InvalidArgument(f"{named} is there already: -e converts it", op="create", path=path)
    wish = wish_of(options)
    from pmemkit.namespace.create import create

    bus = seen_bus(options, [path])
    numbers = _dimms(bus, options.region)
    with opened(options, path, numbers) as images, progress_bar("clearing") as progress:
        if not options.no_autolabel:
            for region in images.bus().regions:
                if options.region in (None, region.dev):
                    _autolabel(images, region)
        if not options.force:
            _refuse_data(images, options.region)
        made = create(images, options.region, wish, progress=progress)
    print_namespace(made, verbose=options.verbose)
    return 0


def _dimms(bus: "ImageBus", region: str | None) -> tuple[int, ...] | None:
    """The dimms to lock: those of the region, or all where any may be chosen."""
    return None if region is None else bus.machine.sets[bus.region(region).span.index]


def _autolabel(images: "Images", region: "ImageRegion") -> None:
    from pmemkit.namespace.label_verbs import init_labels

    if region.labelled or region.span.ways > 1 or region.namespaces[0].claim.info is not None:
        return
    number = images.number_of(region)
    if not images.machine.dimms[number].label_size or any(images.label_area(number)[1]):
        return
    init_labels(images, number, version=(1, 2))
    note(f"{region.dimms[0].name}: the label area was blank and is initialised, version 1.2")


def _refuse_data(images: "Images", region: str | None) -> None:
    """A label-less image that is not blank would lose what is there."""
    for each in images.bus().regions:
        whole = not each.labelled and region in (None, each.dev)
        if whole and each.namespaces[0].claim.info is None and any(each.read(0, 8192)):
            text = (
                f"{each.dev} is label-less and its first bytes are not blank: what is there would "
                "be lost; -f makes the namespace all the same"
            )
            raise InvalidArgument(text, op="create", path=each.path)
