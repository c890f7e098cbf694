"""``pmem list``: what there is, as JSON in ndctl's shape."""

from collections.abc import Sequence

from pmemkit.cli._common import make_parser, print_json

__all__ = ["run"]

_EXAMPLES = """\
  pmem list                     namespaces of this machine
  pmem list -R -N               regions with their namespaces
  pmem list disk.img            an image: one region, one raw namespace"""


def run(arguments: Sequence[str]) -> int:
    """Prints the listing."""
    parser = make_parser(
        "list",
        "List namespaces, regions and dimms of images, or of this machine without a PATH.",
        _EXAMPLES,
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="images or block devices")
    parser.add_argument("-N", "--namespaces", action="store_true", help="namespaces (the default)")
    parser.add_argument("-R", "--regions", action="store_true", help="regions")
    parser.add_argument("-D", "--dimms", action="store_true", help="dimms")
    parser.add_argument("-u", "--human", action="store_true", help="sizes for people")
    parser.add_argument("--json", action="store_true", help="JSON is what is printed anyway")
    options = parser.parse_args(arguments)
    from pmemkit.bus import image_bus, kernel_bus, listing

    buses = [image_bus(options.paths)] if options.paths else list(kernel_bus())
    found = listing(
        buses,
        regions=options.regions,
        namespaces=options.namespaces,
        dimms=options.dimms,
        human=options.human,
    )
    if options.human and isinstance(found, list) and len(found) == 1:
        found = found[0]
    print_json(found)
    return 0
