"""``pmem read-labels`` and ``check-labels``: label areas looked at."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._namespaces import add_machine_options, chosen_dimms, the_machine
from pmemkit.errors import Corrupt, InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageDimm

__all__ = ["run_check", "run_read"]

_HUMAN = ("isetcookie", "dpa", "flags")


def _dimms(options: argparse.Namespace) -> "list[ImageDimm]":
    from pmemkit.bus.image import observe

    bus = observe(the_machine(options, [options.path]))
    return [bus.dimms[number] for number in chosen_dimms(bus, options.dimms)]


def run_read(arguments: Sequence[str]) -> int:
    """Prints label areas as JSON, or dumps them."""
    parser = make_parser(
        "read-labels",
        "Read the label area of a dimm: its bytes, or with --json what they say.",
        "  pmem read-labels disk.img --json\n"
        "  pmem read-labels disk.img -o labels.bin     for write-labels",
        "Dumps of several dimms stand one after the other. Freed labels are listed too, as ndctl\n"
        "does; the index block says which are in use.",
    )
    add_machine_options(parser, paths="path")
    parser.add_argument("dimms", metavar="DIMM", nargs="*", help="nmemN, or all (the default)")
    parser.add_argument("-j", "--json", action="store_true")
    parser.add_argument("-I", "--index", action="store_true", help="index blocks only")
    parser.add_argument("-u", "--human", action="store_true", help="JSON, numbers for people")
    parser.add_argument("-o", "--output", help="file; standard output if not said")
    parser.add_argument("-s", "--size", type=size, help="bytes; all of the area if 0 or not said")
    parser.add_argument("-O", "--offset", type=size, default=0, help="in the area")
    options = parser.parse_args(arguments)
    if options.index and (options.size is not None or options.offset):
        parser.error("--index says which part is read; --size and --offset do, too")
    dimms = [dimm for dimm in _dimms(options) if dimm.spec.label_size]
    if not dimms:
        text = "there is no label area: the image is label-less (pmem init-labels makes one)"
        raise InvalidArgument(text, op="read-labels", path=options.path)
    if options.json or options.human:
        _print(options, dimms)
    else:
        _dump(options, dimms)
    print(f"read {len(dimms)} nmem{'s' if len(dimms) > 1 else ''}", file=sys.stderr)
    return 0


def _print(options: argparse.Namespace, dimms: "list[ImageDimm]") -> None:
    from pmemkit.bus.report import human_hex, human_size
    from pmemkit.namespace.label_verbs import labels_listing

    found: list[Any] = labels_listing(dimms)
    for each in found:
        if options.index:
            del each["label"]
        elif options.human:
            for label in each["label"]:
                label |= {key: human_hex(label[key]) for key in _HUMAN}
                label["rawsize"] = human_size(label["rawsize"])
    print_json(found)


def _dump(options: argparse.Namespace, dimms: "list[ImageDimm]") -> None:
    """The areas of all dimms one after the other, as ndctl has them."""
    if not options.output and sys.stdout.isatty():
        raise InvalidArgument("a dump is for -o FILE or a pipe; --json is for people")
    data = b"".join(_part(options, dimm) for dimm in dimms)
    if options.output:
        Path(options.output).write_bytes(data)
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _part(options: argparse.Namespace, dimm: "ImageDimm") -> bytes:
    room = dimm.spec.label_size - options.offset
    length: int = options.size or room
    area = dimm.span.area
    if options.index and area is not None:
        length = 2 * area.sizing.index_size
    if not 0 <= length <= room:
        text = f"{length} bytes at {options.offset} end behind the {dimm.spec.label_size} there are"
        raise InvalidArgument(text, op="read-labels", path=dimm.spec.path)
    return _area(dimm)[options.offset : options.offset + length]


def _area(dimm: "ImageDimm") -> bytes:
    with Path(dimm.spec.path).open("rb") as image:
        image.seek(dimm.label_offset)
        return image.read(dimm.spec.label_size)


def run_check(arguments: Sequence[str]) -> int:
    """Says what label areas are worth; 12 where one is damaged or not initialised."""
    parser = make_parser(
        "check-labels",
        "Check the label area of a dimm without changing it.",
        "  pmem check-labels disk.img\n  pmem check-labels vm.toml nmem0 --json",
    )
    add_machine_options(parser, paths="path")
    parser.add_argument("dimms", metavar="DIMM", nargs="*", help="nmemN, or all (the default)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    from pmemkit.namespace.label_verbs import check_labels

    checked = [check_labels(dimm) for dimm in _dimms(options)]
    if options.json:
        keys = ("dev", "labelled", "used", "free", "findings")
        print_json([{key: getattr(each, key) for key in keys} for each in checked])
    bad = [each for each in checked if each.findings]
    for each in checked:
        state = f"{each.used} slots in use, {each.free} free"
        lines = [*each.findings] if each.findings else [state]
        if not options.json:
            print("\n".join(f"{each.dev}: {line}" for line in lines))
    good = len(checked) - len(bad)
    print(f"successfully verified {good} nmem label{'s' if good > 1 else ''}", file=sys.stderr)
    return Corrupt.exit_code if bad else 0
