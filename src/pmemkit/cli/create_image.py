"""``pmem create-image``: a sparse file that stands in for a device."""

import os
from collections.abc import Sequence

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.errors import InvalidArgument, SystemFailure
from pmemkit.units import format_size

__all__ = ["run"]

_EXAMPLES = """\
  pmem create-image disk.img --size 1G
  pmem create-image disk.img --size 1G --label-size 128K    ready for several namespaces
  pmem create-image disk.img --size 512M --force    an existing image loses its content"""
_NOTES = """\
With --label-size the label area lies behind the region, so the file is larger than --size by that
much; QEMU wants 128K at least. Without it the image is label-less: one namespace, all of it."""

_UNIT = 4096


def run(arguments: Sequence[str]) -> int:
    """Makes the image."""
    parser = make_parser(
        "create-image",
        "Make an image: a sparse file that takes room only where it is written.",
        _EXAMPLES,
        _NOTES,
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--size", type=size, required=True, help="of the region, as 1G; a multiple of 4096 bytes"
    )
    parser.add_argument("--label-size", type=size, default=0, help="of a label area behind it")
    parser.add_argument(
        "--label-version", choices=("1.1", "1.2"), default="1.2", help="of the labels (1.2)"
    )
    parser.add_argument("--force", action="store_true", help="empty an existing image")
    parser.add_argument("--json", action="store_true", help="print the namespace as pmem list does")
    options = parser.parse_args(arguments)
    if options.size == 0 or options.size % _UNIT:
        text = f"{options.size} bytes are not a positive multiple of {_UNIT}"
        raise InvalidArgument(text, path=options.path)
    if options.label_size:
        _check_label_size(options.path, options.label_size)
    _create(options.path, options.size + options.label_size, options.force)
    if options.label_size:
        _initialise(options.path, options.label_size, options.label_version)
    if options.json:
        from pmemkit.bus import image_bus, listing

        bus = image_bus([options.path])
        print_json(listing([bus], regions=options.label_size > 0))
    else:
        area = format_size(options.label_size)
        labels = f", and {area} of labels {options.label_version}" if options.label_size else ""
        print(f"{options.path}: {format_size(options.size)}{labels}, sparse")
    return 0


def _check_label_size(path: str, label_size: int) -> None:
    from pmemkit.bus.image import LABEL_SIZES

    if label_size not in LABEL_SIZES:
        text = (
            f"a label area of {label_size} bytes is neither a power of two from 1 KiB to 64 MiB "
            "nor a multiple of 128 KiB up to 4 MiB; it would not be found again"
        )
        raise InvalidArgument(text, op="create", path=path)


def _initialise(path: str, label_size: int, version: str) -> None:
    from pmemkit.bus.image import machine_of
    from pmemkit.namespace.images import open_images
    from pmemkit.namespace.label_verbs import init_labels

    with open_images(machine_of([path], label_size=label_size)) as images:
        init_labels(images, 0, version=(1, 1) if version == "1.1" else (1, 2))


def _create(path: str, size_bytes: int, force: bool) -> None:
    from pmemkit.media.provider import failure_of, open_medium
    from pmemkit.storage.region import create_file

    try:
        create_file(path, size_bytes)
    except FileExistsError as cause:
        if not force:
            text = "exists; --force empties it"
            raise SystemFailure(text, errno=cause.errno, op="create", path=path) from None
    except OSError as cause:
        raise failure_of(cause, "create", path) from cause
    else:
        return
    # Opened as any writer does: an image in use is locked, and stays as it is.
    opened = open_medium(path)
    try:
        if not os.path.isfile(path):  # noqa: PTH113 - a path as the user wrote it
            raise InvalidArgument("is not a regular file", op="create", path=path)
        opened.medium.resize(0)
        opened.medium.resize(size_bytes)
        opened.medium.sync()
    except OSError as cause:
        raise failure_of(cause, "create", path) from cause
    finally:
        opened.close()
