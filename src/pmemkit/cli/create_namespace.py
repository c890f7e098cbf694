"""``pmem create-namespace``: a namespace on an image, as ndctl makes one on a machine."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from pmemkit.cli._common import make_parser, print_json, size, typed
from pmemkit.cli._namespaces import (
    add_machine_options,
    data_on,
    looked,
    namespace_json,
    note,
    opened,
    print_namespace,
    progress_bar,
    region_name,
    split_target,
)
from pmemkit.errors import InvalidArgument, NoSpace

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageNamespace, ImageRegion
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
_GREEDY_HELP = "go on until the region is full; prints a list"


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
        type=lambda mode: _OLD_NAMES.get(mode, mode),
        choices=("raw", "sector", "fsdax", "devdax"),
        required=mode_required,
        help="fsdax if not said; old names (safe, memory, dax) are taken, too",
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
        "--arena-size",
        type=size,
        help="sector: 16M to 512G, a multiple of 4K (512G); smaller ones have more logs "
        "and level less; Linux reads them, too",
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
        mode=options.mode or "fsdax",
        size=getattr(options, "size", None),
        name=options.name,
        uuid=options.uuid,
        sector_size=options.sector_size,
        arena_size=options.arena_size,
        map=options.map,
        align=options.align,
        force=options.force,
    )


def run(arguments: Sequence[str]) -> int:
    """Makes the namespace and prints it as JSON."""
    parser = make_parser("create-namespace", "Make a namespace.", _EXAMPLES, _NOTES)
    add_machine_options(parser, paths="path")
    parser.add_argument("-r", "--region", help="the first one with room if not said")
    parser.add_argument(
        "-e", "--reconfig", metavar="NAMESPACE", help="convert this one; its mode stays without -m"
    )
    parser.add_argument("-s", "--size", type=size, help="a multiple of the region's alignment")
    add_wish_options(parser)
    parser.add_argument("-c", "--continue", dest="greedy", action="store_true", help=_GREEDY_HELP)
    parser.add_argument("-f", "--force", action="store_true", help="data may be lost")
    parser.add_argument(
        "-L",
        "--autolabel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="initialise a label area that is blank; --no-autolabel leaves it",
    )
    parser.add_argument("-t", "--type", choices=("pmem",), help=argparse.SUPPRESS)
    parser.add_argument("-v", "--verbose", action="store_true", help="print more fields")
    parser.add_argument("--json", action="store_true", help="JSON is what is printed anyway")
    options = parser.parse_args(arguments)
    if options.reconfig:
        from pmemkit.cli.reconfigure_namespace import reconfigure

        return reconfigure(options, options.path, options.reconfig, options.force)
    path, named = split_target(options)
    if named is not None:
        raise InvalidArgument(f"{named} is there already: -e converts it", op="create", path=path)
    wish = wish_of(options).checked()
    with looked(options, [path], placement=True) as bus:
        region = _choose(bus.regions, region_name(options.region), wish, force=options.force)
    with opened(options, path, bus.machine.sets[region.span.index]) as images:
        made = _make(options, images, region.dev, wish)
    if options.greedy:
        print_json([namespace_json(each, verbose=options.verbose) for each in made])
    else:
        print_namespace(made[0], verbose=options.verbose)
    return 0


def _make(
    options: argparse.Namespace, images: "Images", name: str, wish: "Wish"
) -> "list[ImageNamespace]":
    """The namespace, or with ``--continue`` as many as fit."""
    from pmemkit.namespace.create import create

    # It may have changed before it was locked.
    region = _choose(images.bus().regions, name, wish, force=options.force)
    if options.autolabel:
        _autolabel(images, region)
    made = []
    with progress_bar("clearing") as progress:
        while True:
            try:
                made.append(create(images, name, wish, progress=progress))
            except NoSpace:
                if not made:
                    raise
                return made
            if not options.greedy or not made[-1].region.labelled:
                return made
            wish = replace(wish, uuid=None)


def _choose(
    regions: "Iterable[ImageRegion]", name: str | None, wish: "Wish", *, force: bool
) -> "ImageRegion":
    """The region that is named, or the first one with room. One that is label-less must be blank,
    unless ``force`` gives up what is there."""
    every = [each for each in regions if name in (None, each.dev)]
    if not every:
        text = f"{name!r} is no region here; there are {', '.join(each.dev for each in regions)}"
        raise InvalidArgument(text, op="create")
    refusals = []
    for region in every:
        if region.labelled:
            if any(length >= (wish.size or 1) for _, length in region.free()):
                return region
            continue
        if region.namespaces[0].claim.info is not None:
            continue
        refusal = None if force else _data_refusal(region)
        if refusal is None:
            return region
        refusals.append(refusal)
    if refusals:
        raise refusals[0]
    # None has room: the verb itself says why.
    return every[0]


def _data_refusal(region: "ImageRegion") -> InvalidArgument | None:
    held = data_on(region)
    if held is None:
        return None
    text = (
        f"{region.dev} is label-less and its one namespace holds {held}, which would be lost; "
        "-f makes the namespace all the same"
    )
    return InvalidArgument(text, op="create", path=region.path)


def _autolabel(images: "Images", region: "ImageRegion") -> None:
    from pmemkit.namespace.label_verbs import init_labels

    if region.labelled or region.span.ways > 1 or region.namespaces[0].claim.info is not None:
        return
    number = images.number_of(region)
    if not images.machine.dimms[number].label_size or any(images.label_area(number)[1]):
        return
    init_labels(images, number, version=(1, 2))
    note(f"{region.dimms[0].name}: the label area was blank and is initialised, version 1.2")
