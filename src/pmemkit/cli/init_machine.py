"""``pmem init-machine``: a file that says which dimms a machine has."""

import os
from collections.abc import Sequence
from pathlib import Path

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size

__all__ = ["run"]

_EXAMPLES = """\
  pmem init-machine vm.toml nv0.img nv1.img --create --size 4G
  pmem init-machine vm.toml nv0.img --nature storage --numa-node 1 --endurance 20P
  pmem qemu-args vm.toml        the options that attach exactly these dimms"""
_UNIT = 2 << 20


def run(arguments: Sequence[str]) -> int:
    """Writes the machine file, and the images if that is asked for."""
    parser = make_parser(
        "init-machine",
        "Write a machine file: dimms, their images, and what the firmware would say of them.",
        _EXAMPLES,
        "With --create, --size is that of the pmem region; the label area is added behind it, so "
        "that\nthe next dimm stays aligned.",
    )
    parser.add_argument("machine", metavar="MACHINE.toml")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="one dimm each, in this order")
    parser.add_argument("--create", action="store_true", help="make images that are not there")
    parser.add_argument("--size", type=size, help="of the region of a new image, as 4G")
    parser.add_argument("--label-size", type=size, default=128 << 10, help="128K; 0 for none")
    parser.add_argument("--align", type=size, default=_UNIT, help="of the QEMU backend (2M)")
    parser.add_argument("--nature", choices=("storage", "memory", "unknown"), default="unknown")
    parser.add_argument("--numa-node", type=int, default=0, metavar="N")
    parser.add_argument(
        "--endurance", type=size, metavar="BYTES", help="that may be written in its life"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing machine file")
    parser.add_argument("--json", action="store_true", help="print the dimms as pmem list does")
    options = parser.parse_args(arguments)
    from pmemkit.bus.machine import DimmSpec, Machine, checked, to_toml
    from pmemkit.formats.labels import LabelV1, sizing

    path = options.machine
    if not path.endswith(".toml"):
        raise InvalidArgument("a machine file is called *.toml", op="machine", path=path)
    if os.path.lexists(path) and not options.force:
        raise InvalidArgument("exists; --force replaces it", op="machine", path=path)
    if options.label_size:
        sizing(options.label_size, LabelV1.SIZE)
    dimms = [
        checked(
            DimmSpec(
                path=image,
                label_size=options.label_size,
                align=options.align,
                nature=options.nature,
                numa_node=options.numa_node,
                endurance=options.endurance,
            ),
            image,
        )
        for image in options.images
    ]
    machine = Machine.of(dimms, path=path)
    directory = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120
    if not os.path.isdir(directory):  # noqa: PTH112
        raise InvalidArgument("there is no such directory", op="machine", path=directory)
    if options.create:
        _create(options.images, options.size, options.label_size)
    from pmemkit.bus import bus_record, listing, observe

    bus = observe(machine)
    _write(Path(path), to_toml(machine, directory))
    if options.json:
        print_json(listing([bus_record(bus)], dimms=True, regions=True))
    else:
        for region in bus.regions:
            print(f"{region.dev}: {format_size(region.size)} of {region.path}")
    return 0


def _create(images: Sequence[str], region_size: int | None, label_size: int) -> None:
    from pmemkit.storage.region import create_file

    missing = [image for image in images if not os.path.lexists(image)]
    if missing and not region_size:
        text = "is not there: --create needs --size"
        raise InvalidArgument(text, op="create", path=missing[0])
    if region_size and region_size % _UNIT:
        text = f"{region_size} bytes are no multiple of 2 MiB: the next dimm would be misaligned"
        raise InvalidArgument(text, op="create")
    for image in missing:
        create_file(image, (region_size or 0) + label_size)


def _write(path: Path, text: str) -> None:
    """Puts the file in place at once, or not at all."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
