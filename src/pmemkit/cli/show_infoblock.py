"""``pmem read-infoblock`` and ``write-infoblock``: as ndctl's, on images and plain files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmemkit.cli._common import make_parser, print_json, size, typed
from pmemkit.cli._namespaces import (
    add_machine_options,
    dimms_of_namespace,
    opened,
    seen_bus,
    split_target,
)
from pmemkit.cli.create_namespace import uuid_of
from pmemkit.errors import InvalidArgument

__all__ = ["run_read", "run_write"]

_HEAD = 8192


def _optional_path(parser: argparse.ArgumentParser) -> None:
    add_machine_options(parser, paths="path")
    for action in parser._actions:
        if action.dest == "path":
            action.nargs = "?"
    parser.add_argument("namespace", nargs="?", help="name, uuid, or all")


def run_read(arguments: Sequence[str]) -> int:
    """Prints info blocks as JSON, or dumps one."""
    parser = make_parser(
        "read-infoblock",
        "Read the info block of a namespace, or of a plain file.",
        "  pmem read-infoblock disk.img namespace0.0\n"
        "  pmem read-infoblock -i namespace.bin\n"
        "  pmem read-infoblock disk.img namespace0.0 -o block.bin",
    )
    _optional_path(parser)
    parser.add_argument(
        "-i", "--input", help="a file that holds the start of a namespace; - is standard input"
    )
    parser.add_argument("-o", "--output", help="dump the first 8 KiB instead of printing JSON")
    parser.add_argument("-V", "--verify", action="store_true", help="fail unless a kernel takes it")
    parser.add_argument("-j", "--json", action="store_true", help="JSON is what is printed anyway")
    options = parser.parse_args(arguments)
    from pmemkit.namespace.infoblock_verbs import find_infoblock, infoblock_record

    records: list[dict[str, Any]] = []
    for label, name, data in _heads(options):
        if options.output:
            Path(options.output).write_bytes(data)
        _, info = find_infoblock(data)
        records.append({label: name} | infoblock_record(info))
    if not options.output:
        print_json(records)
    print(f"read {len(records)} infoblock{'' if len(records) == 1 else 's'}", file=sys.stderr)
    return 0


def _heads(options: argparse.Namespace) -> list[tuple[str, str, bytes]]:
    """What is read: ``dev`` or ``file``, its name, its first bytes."""
    if options.input is not None or options.path is None:
        name = options.input or "-"
        if name == "-":
            return [("file", "stdin", sys.stdin.buffer.read(_HEAD))]
        with Path(name).open("rb") as file:
            return [("file", name, file.read(_HEAD))]
    path, name = split_target(options)
    from pmemkit.bus.image import observe_with, open_reader
    from pmemkit.cli._namespaces import the_machine

    machine = the_machine(options, [path])
    opened_images = [open_reader(dimm.path) for dimm in machine.dimms]
    try:
        bus = observe_with(machine, [(read, length) for read, length, _ in opened_images])
        every = [each for region in bus.regions for each in region.namespaces]
        found = every if name in (None, "all") else [bus.namespace(str(name))]
        if options.verify:
            for each in found:
                if each.claim.info is None or not each.claim.enabled:
                    why = "; ".join(map(str, each.claim.faults)) or "there is no info block"
                    raise InvalidArgument(f"{each.dev}: {why}", op="read-infoblock", path=path)
        return [("dev", each.dev, each.region.read(each.offset, _HEAD)) for each in found]
    finally:
        for _, _, close in opened_images:
            close()


def run_write(arguments: Sequence[str]) -> int:
    """Makes an info block and writes it to a file, standard output or a namespace."""
    parser = make_parser(
        "write-infoblock",
        "Make a PFN or DAX info block and write it to a file, or to a namespace of an image.",
        "  pmem write-infoblock -o head.bin -s 1G -m fsdax -M dev\n"
        "  pmem write-infoblock -c -s 64M -m devdax | xxd\n"
        "  pmem write-infoblock disk.img namespace0.0 -m fsdax",
    )
    _optional_path(parser)
    parser.add_argument("-o", "--output", help="file that gets the first 8 KiB")
    parser.add_argument("-c", "--stdout", action="store_true", help="write to standard output")
    parser.add_argument("-s", "--size", type=size, help="of the namespace, with -o and -c")
    parser.add_argument("-m", "--mode", choices=("fsdax", "devdax"), default="fsdax")
    parser.add_argument("-M", "--map", choices=("mem", "dev"), default="dev")
    parser.add_argument("-a", "--align", type=size, default=2 << 20)
    parser.add_argument("-u", "--uuid", type=typed(uuid_of))
    parser.add_argument("-p", "--parent-uuid", type=typed(uuid_of))
    parser.add_argument(
        "-O", "--offset", type=size, default=0, help="physical start to reckon with, -o and -c"
    )
    options = parser.parse_args(arguments)
    from pmemkit.namespace.infoblock_verbs import infoblock_image

    values = {"mode": options.mode, "map": options.map, "align": options.align}
    if options.output or options.stdout:
        if options.size is None:
            raise InvalidArgument("-s says how large the namespace is", op="write-infoblock")
        data = infoblock_image(
            options.size,
            start=options.offset,
            uuid=options.uuid,
            parent_uuid=options.parent_uuid,
            **values,
        )
        if options.stdout:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            _write_head(Path(options.output), data)
    else:
        _write_namespace(options, values)
    print("wrote 1 infoblock", file=sys.stderr)
    return 0


def _write_head(path: Path, data: bytes) -> None:
    """Only the first bytes of a file that is there are replaced."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(data)


def _write_namespace(options: argparse.Namespace, values: dict[str, Any]) -> None:
    from pmemkit.namespace.infoblock_verbs import infoblock_image

    if options.path is None:
        raise InvalidArgument("say PATH NAMESPACE, -o FILE or -c", op="write-infoblock")
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace", op="write-infoblock", path=path)
    seen_bus(options, [path])
    numbers = dimms_of_namespace(options, path, name)
    with opened(options, path, numbers) as images:
        here = images.bus().namespace(name)
        if here.region.span.ways > 1:
            raise InvalidArgument(f"{here.dev} spans several dimms", op="write-infoblock")
        data = infoblock_image(
            here.size,
            start=here.start,
            uuid=options.uuid,
            parent_uuid=here.uuid if options.parent_uuid is None else options.parent_uuid,
            **values,
        )
        base = here.region.dimms[0].spec.dpa + here.offset
        images.carry_out(images.number_of(here.region), [[(4096, data[4096:])]], base=base)
