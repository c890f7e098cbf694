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

_HUMAN = ("isetcookie", "dpa", "rawsize", "flags")


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
        "Freed labels are listed too, as ndctl does; the index block says which are in use.",
    )
    add_machine_options(parser, paths="path")
    parser.add_argument("dimms", metavar="DIMM", nargs="*", help="nmemN, or all (the default)")
    parser.add_argument("-j", "--json", action="store_true")
    parser.add_argument("-I", "--index", action="store_true", help="index blocks only")
    parser.add_argument("-u", "--human", action="store_true", help="hexadecimal numbers")
    parser.add_argument("-o", "--output", help="file; standard output if not said")
    parser.add_argument("-s", "--size", type=size, help="bytes; all of the area if not said")
    parser.add_argument("-O", "--offset", type=size, default=0, help="in the area")
    options = parser.parse_args(arguments)
    dimms = [dimm for dimm in _dimms(options) if dimm.spec.label_size]
    if not dimms:
        text = "there is no label area: the image is label-less (pmem init-labels makes one)"
        raise InvalidArgument(text, op="read-labels", path=options.path)
    if options.json or options.index or options.human:
        _print(options, dimms)
    else:
        _dump(options, dimms)
    print(f"read {len(dimms)} nmem{'' if len(dimms) == 1 else 's'}", file=sys.stderr)
    return 0


def _print(options: argparse.Namespace, dimms: "list[ImageDimm]") -> None:
    from pmemkit.namespace.label_verbs import labels_listing

    found: list[Any] = labels_listing(dimms)
    for each in found:
        if options.index:
            del each["label"]
        elif options.human:
            each["label"] = [
                {key: hex(value) if key in _HUMAN else value for key, value in label.items()}
                for label in each["label"]
            ]
    print_json(found)


def _dump(options: argparse.Namespace, dimms: "list[ImageDimm]") -> None:
    if len(dimms) != 1:
        text = f"a dump is of one dimm, and there are {len(dimms)}: say which, or --json"
        raise InvalidArgument(text, op="read-labels", path=options.path)
    (dimm,) = dimms
    room = dimm.spec.label_size - options.offset
    length = room if options.size is None else options.size
    if options.offset < 0 or not 0 <= length <= room:
        text = f"{length} bytes at {options.offset} end behind the {dimm.spec.label_size} there are"
        raise InvalidArgument(text, op="read-labels", path=options.path)
    data = _area(dimm)[options.offset : options.offset + length]
    if options.output:
        Path(options.output).write_bytes(data)
    elif sys.stdout.isatty():
        raise InvalidArgument("a dump is for -o FILE or a pipe; --json is for people")
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


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
        state = f"{each.used} labels in use, {each.free} slots free"
        lines = [*each.findings] if each.findings else [state]
        if not options.json:
            print("\n".join(f"{each.dev}: {line}" for line in lines))
    print(f"successfully verified {len(checked) - len(bad)} nmem labels", file=sys.stderr)
    return Corrupt.exit_code if bad else 0
