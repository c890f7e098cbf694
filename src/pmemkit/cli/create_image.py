"""``pmem create-image``: a sparse file that stands in for a device."""

import os
from collections.abc import Sequence

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.errors import InvalidArgument, SystemFailure
from pmemkit.units import format_size

__all__ = ["run"]

_EXAMPLES = """\
  pmem create-image disk.img --size 1G
  pmem create-image disk.img --size 512M --force    an existing image loses its content"""

_UNIT = 4096


def run(arguments: Sequence[str]) -> int:
    """Makes the image."""
    parser = make_parser(
        "create-image",
        "Make an image: a sparse file that takes room only where it is written.",
        _EXAMPLES,
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--size", type=size, required=True, help="as 1G; a multiple of 4096 bytes")
    parser.add_argument("--force", action="store_true", help="empty an existing image")
    parser.add_argument("--json", action="store_true", help="print the namespace as pmem list does")
    options = parser.parse_args(arguments)
    if options.size == 0 or options.size % _UNIT:
        text = f"{options.size} bytes are not a positive multiple of {_UNIT}"
        raise InvalidArgument(text, path=options.path)
    _create(options.path, options.size, options.force)
    if options.json:
        from pmemkit.bus import image_bus, listing

        print_json(listing([image_bus([options.path])]))
    else:
        print(f"{options.path}: {format_size(options.size)}, sparse")
    return 0


def _create(path: str, size_bytes: int, force: bool) -> None:
    from pmemkit.media.provider import failure_of
    from pmemkit.storage.region import create_file, open_region

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
    with open_region(path) as region:
        if not os.path.isfile(path):  # noqa: PTH113 - a path as the user wrote it
            raise InvalidArgument("is not a regular file", op="create", path=path)
        region.resize(0)
        region.resize(size_bytes)
        region.medium.sync()
