"""``pmem init-labels``, ``zero-labels``, ``write-labels`` and ``recookie``: label areas changed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._namespaces import add_machine_options, chosen_dimms, data_on, note, opened
from pmemkit.errors import InvalidArgument
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.namespace.images import Images

__all__ = ["run_init", "run_recookie", "run_write", "run_zero"]

_DEFAULT_LABEL_SIZE = 128 << 10


def _parser(command: str, what: str, examples: str, notes: str = "") -> argparse.ArgumentParser:
    parser = make_parser(command, what, examples, notes)
    add_machine_options(parser, paths="path")
    parser.add_argument("dimms", metavar="DIMM", nargs="*", help="nmemN, or all (the default)")
    return parser


def _chosen(options: argparse.Namespace) -> list[int]:
    from pmemkit.bus.image import observe
    from pmemkit.cli._namespaces import the_machine

    return chosen_dimms(observe(the_machine(options, [options.path])), options.dimms)


def _count(verb: str, count: int) -> int:
    print(f"{verb} {count} nmem{'s' if count > 1 else ''}", file=sys.stderr)
    return 0


def run_init(arguments: Sequence[str]) -> int:
    """Makes label areas hold no labels."""
    parser = _parser(
        "init-labels",
        "Make the label area of a dimm ready for namespaces.",
        "  pmem init-labels disk.img -V 1.2\n"
        "  pmem init-labels disk.img --label-size 2M     the last 2 MiB become the label area\n"
        "  pmem init-labels vm.toml nmem1 -f             drops the labels that are there",
        "An image without a label area gets one: its last 128 KiB, or --label-size. The region\n"
        "loses them; they must be blank. What is label-less and holds data stays so without -f.",
    )
    parser.add_argument("-V", "--label-version", choices=("1.1", "1.2"), default="1.1")
    parser.add_argument("-f", "--force", action="store_true", help="drop labels, or data")
    parser.add_argument("--json", action="store_true", help="print the label areas")
    options = parser.parse_args(arguments)
    if not options.path.endswith(".toml") and options.label_size is None:
        _default_label_size(options)
    from pmemkit.namespace.advice import placement_notes
    from pmemkit.namespace.label_verbs import init_labels, labels_listing

    chosen = _chosen(options)
    version = (1, 1) if options.label_version == "1.1" else (1, 2)
    with opened(options, options.path, chosen) as images:
        if not options.force:
            _refuse_data(images, chosen)
        for number in chosen:
            area = init_labels(images, number, version=version, force=options.force)
            note(
                f"nmem{number}: {area.sizing.slot_count} label slots in the last "
                f"{format_size(area.sizing.area_size)} of {images.machine.dimms[number].path}"
            )
        bus = images.bus()
        for each in placement_notes(bus):
            note(each)
        if options.json:
            print_json(labels_listing([bus.dimms[number] for number in chosen]))
    return _count("initialized", len(chosen))


def _refuse_data(images: "Images", chosen: Sequence[int]) -> None:
    """With labels there are no namespaces but those of labels: the one that was there is gone."""
    for region in images.bus().regions:
        held = data_on(region)
        if held is not None and images.number_of(region) in chosen:
            text = (
                f"{region.dev} is label-less and its one namespace holds {held}; with labels that "
                "space is free for new namespaces; --force gives it up"
            )
            raise InvalidArgument(text, op="init-labels", path=region.path)


def _default_label_size(options: argparse.Namespace) -> None:
    """What an image without labels gets."""
    from pmemkit.bus.image import machine_of

    if not machine_of([options.path]).dimms[0].label_size:
        options.label_size = _DEFAULT_LABEL_SIZE


def run_zero(arguments: Sequence[str]) -> int:
    """Zeroes label areas."""
    parser = _parser(
        "zero-labels",
        "Zero the label area of a dimm, or a part of it: the dimm is label-less then.",
        "  pmem zero-labels disk.img\n  pmem zero-labels vm.toml nmem0 -s 4K -O 0",
    )
    parser.add_argument("-s", "--size", type=size, help="bytes; all of the area if 0 or not said")
    parser.add_argument("-O", "--offset", type=size, default=0, help="in the area")
    parser.add_argument("--json", action="store_true", help="print the bytes zeroed of each dimm")
    options = parser.parse_args(arguments)
    from pmemkit.namespace.label_verbs import zero_labels

    chosen = _chosen(options)
    zeroed = {}
    with opened(options, options.path, chosen) as images:
        for number in chosen:
            length = zero_labels(images, number, offset=options.offset, length=options.size or None)
            zeroed[f"nmem{number}"] = length
    if options.json:
        print_json(zeroed)
    return _count("zeroed", len(chosen))


def run_write(arguments: Sequence[str]) -> int:
    """Puts a dump of read-labels back."""
    parser = _parser(
        "write-labels",
        "Write a label area from a dump that read-labels made.",
        "  pmem write-labels disk.img -i labels.bin\n  pmem write-labels disk.img < labels.bin",
    )
    parser.add_argument("-i", "--input", help="file; standard input if not said")
    parser.add_argument("-s", "--size", type=size, default=0, help="bytes of the dump to write")
    parser.add_argument("-O", "--offset", type=size, default=0, help="in the area")
    options = parser.parse_args(arguments)
    from pmemkit.namespace.label_verbs import write_labels

    chosen = _chosen(options)
    if len(chosen) != 1:
        text = f"a dump is of one dimm, and there are {len(chosen)}: say which"
        raise InvalidArgument(text, op="write-labels", path=options.path)
    data = Path(options.input).read_bytes() if options.input else sys.stdin.buffer.read()
    if options.size > len(data) or not data:
        text = f"{options.size} bytes are to be written and the dump has {len(data)}"
        raise InvalidArgument(text, op="write-labels")
    with opened(options, options.path, chosen) as images:
        write_labels(images, chosen[0], data[: options.size or None], offset=options.offset)
    return _count("wrote", 1)


def run_recookie(arguments: Sequence[str]) -> int:
    """Adopts the labels of an image that was moved."""
    parser = _parser(
        "recookie",
        "Give the labels of an image that was moved to another slot the cookie of that slot.",
        "  pmem recookie disk.img --slot 1     labelled in slot 0, plugged into slot 1 now\n"
        "  pmem recookie vm.toml nmem1",
        "A kernel skips labels whose cookie was made of other dimms. All labels change at once.",
    )
    parser.add_argument("--json", action="store_true", help="print the labels that were changed")
    options = parser.parse_args(arguments)
    if not options.path.endswith(".toml") and options.slot is None:
        text = "--slot says which QEMU slot the image is plugged into now"
        raise InvalidArgument(text, op="recookie", path=options.path)
    from pmemkit.namespace.label_verbs import label_record, recookie

    chosen = _chosen(options)
    changed = {}
    with opened(options, options.path, chosen) as images:
        for number in chosen:
            changed[f"nmem{number}"] = recookie(images, number)
    if options.json:
        print_json({name: [label_record(each) for each in them] for name, them in changed.items()})
    count = sum(len(each) for each in changed.values())
    print(f"adopted {count} label{'' if count == 1 else 's'}", file=sys.stderr)
    return 0
