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
    looked,
    note,
    opened,
    seen_bus,
    split_target,
)
from pmemkit.cli.create_namespace import uuid_of
from pmemkit.errors import Corrupt, InvalidArgument, NotSupported

__all__ = ["run_read", "run_write"]

_HEAD = 8192
_DECIMAL = (
    "mode",
    "external_lbasize",
    "external_nlba",
    "internal_lbasize",
    "internal_nlba",
    "nfree",
    "infosize",
)
"""Numbers that ndctl prints in decimal for people, too."""


def _optional_path(parser: argparse.ArgumentParser) -> None:
    add_machine_options(parser, paths="path")
    for action in parser._actions:
        if action.dest == "path":
            action.nargs = "?"
    parser.add_argument("namespace", nargs="?", help="name, uuid, or all")


def run_read(arguments: Sequence[str]) -> int:
    """Prints info blocks as JSON, or dumps them."""
    parser = make_parser(
        "read-infoblock",
        "Read the info block of a namespace, or of a plain file.",
        "  pmem read-infoblock disk.img namespace0.0 -j\n"
        "  pmem read-infoblock -j -i head.bin\n"
        "  pmem read-infoblock disk.img:namespace0.0 -o head.bin\n"
        "  pmem write-infoblock -c -s 1T | pmem read-infoblock -j",
        "Without -j, -u and -o the first 8 KiB go to standard output as they are; a terminal gets "
        "JSON.",
    )
    _optional_path(parser)
    parser.add_argument(
        "-i", "--input", help="a file that holds the start of a namespace; - is standard input"
    )
    parser.add_argument("-o", "--output", help="dump the first 8 KiB of each into this file")
    parser.add_argument("-V", "--verify", action="store_true", help="fail unless a kernel takes it")
    parser.add_argument("-j", "--json", action="store_true")
    parser.add_argument("-u", "--human", action="store_true", help="JSON, numbers in hexadecimal")
    options = parser.parse_args(arguments)
    heads = _heads(options)
    as_json = options.json or options.human or (not options.output and sys.stdout.isatty())
    if as_json:
        records = _records(options, heads)
        print_json(records)
    elif options.output:
        Path(options.output).write_bytes(b"".join(data for *_, data in heads))
    else:
        sys.stdout.buffer.write(b"".join(data for *_, data in heads))
        sys.stdout.buffer.flush()
    count = len(records) if as_json else len(heads)
    print(f"read {count} infoblock{'' if count == 1 else 's'}", file=sys.stderr)
    return 0


def _records(
    options: argparse.Namespace, heads: list[tuple[str, str, bytes]]
) -> list[dict[str, Any]]:
    """What the blocks say; namespaces without one are left out unless there is nothing else."""
    from pmemkit.bus.report import human_hex
    from pmemkit.namespace.infoblock_verbs import find_infoblock, infoblock_record

    records: list[dict[str, Any]] = []
    for kind, name, data in heads:
        try:
            _, info = find_infoblock(data)
        except Corrupt as cause:
            if len(heads) == 1:
                raise Corrupt(f"{name}: {cause.message}", op=cause.op) from None
            note(f"{name}: {cause.message}")
            continue
        record = infoblock_record(info)
        if options.human:
            record |= {
                key: human_hex(value)
                for key, value in record.items()
                if isinstance(value, int) and key not in _DECIMAL
            }
        records.append({kind: name} | record)
    return records


def _heads(options: argparse.Namespace) -> list[tuple[str, str, bytes]]:
    """What is read: ``dev`` or ``file``, its name, its first bytes."""
    if options.input is not None or options.path is None:
        name = options.input or "-"
        if name == "-":
            return [("file", "<stdin>", _whole(name, sys.stdin.buffer.read(_HEAD)))]
        with Path(name).open("rb") as file:
            return [("file", name, _whole(name, file.read(_HEAD)))]
    path, name = split_target(options)
    with looked(options, [path]) as bus:
        every = [each for region in bus.regions for each in region.namespaces]
        found = every if name in (None, "all") else [bus.namespace(str(name))]
        for each in found:
            if each.region.span.ways > 1:
                text = f"{each.dev} spans several dimms and cannot be read"
                raise NotSupported(text, op="read-infoblock", path=path)
            if options.verify and (each.claim.info is None or not each.claim.enabled):
                why = "; ".join(map(str, each.claim.faults)) or "there is no info block"
                raise Corrupt(f"{each.dev}: {why}", op="read-infoblock", path=path)
        return [("dev", each.dev, each.region.read(each.offset, _HEAD)) for each in found]


def _whole(name: str, data: bytes) -> bytes:
    if len(data) < _HEAD:
        text = f"{len(data)} bytes are there; info blocks stand in the first {_HEAD}"
        raise InvalidArgument(text, op="read-infoblock", path=name)
    return data


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
    parser.add_argument(
        "-s", "--size", type=size, help="of the namespace; of the file if -o is there"
    )
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
        data = infoblock_image(
            _size_of(options),
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


def _size_of(options: argparse.Namespace) -> int:
    """The size that is said, or that of the file which is there."""
    if options.size is not None:
        return int(options.size)
    if options.output and Path(options.output).is_file():
        return Path(options.output).stat().st_size
    raise InvalidArgument("-s says how large the namespace is", op="write-infoblock")


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
