"""``pmem list``: what there is, as JSON in ndctl's shape."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._namespaces import note, the_machine
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus import Bus, ImageBus

__all__ = ["run"]

_EXAMPLES = """\
  pmem list                     namespaces of this machine
  pmem list -R -N               regions with their namespaces
  pmem list disk.img            an image: its namespaces, or the one it is
  pmem list vm.toml -BDRNi      everything on the images of a machine file
  pmem list disk.img -N -m fsdax"""


def run(arguments: Sequence[str]) -> int:
    """Prints the listing."""
    parser = make_parser(
        "list",
        "List namespaces, regions and dimms of images, or of this machine without a PATH.",
        _EXAMPLES,
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="images, or a machine file")
    parser.add_argument("-N", "--namespaces", action="store_true", help="namespaces (the default)")
    parser.add_argument("-R", "--regions", action="store_true", help="regions")
    parser.add_argument("-D", "--dimms", action="store_true", help="dimms")
    parser.add_argument("-B", "--buses", action="store_true", help="buses, everything inside them")
    parser.add_argument("-i", "--idle", action="store_true", help="disabled and empty ones, too")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="more fields; of regions also nature"
    )
    parser.add_argument(
        "-M", "--media-errors", action="store_true", help="where bad blocks are, and not only count"
    )
    parser.add_argument("-u", "--human", action="store_true", help="sizes for people")
    parser.add_argument("-d", "--dimm", help="only what this dimm is part of: nmem0, or 0")
    parser.add_argument("-r", "--region", help="only this one: region0, or 0")
    parser.add_argument("-n", "--namespace", help="only this one: namespace0.1, 0.1, uuid or name")
    parser.add_argument("-m", "--mode", help="only namespaces of this mode")
    parser.add_argument("--json", action="store_true", help="JSON is what is printed anyway")
    parser.add_argument("--label-size", type=size, metavar="SIZE", help="of a bare image")
    parser.add_argument("--slot", type=int, metavar="N", help="of a bare image")
    parser.add_argument("--backend-align", type=size, metavar="SIZE", help="of a bare image")
    options = parser.parse_args(arguments)
    from pmemkit.bus import kernel_bus, listing

    if options.mode and options.mode not in _MODES:
        text = f"mode {options.mode!r} is none of {', '.join(_MODES)}"
        raise InvalidArgument(text, op="list")
    options.media_errors |= options.verbose
    seen = _images(options) if options.paths else None
    buses = (
        list(kernel_bus(media_errors=options.media_errors))
        if seen is None
        else [_record(seen, options)]
    )
    found = listing(
        [_filtered(bus, options) for bus in buses],
        buses=options.buses,
        regions=options.regions,
        namespaces=options.namespaces,
        dimms=options.dimms,
        human=options.human,
    )
    if options.verbose and options.regions:
        _add_natures(found, _natures(seen))
    if options.human and isinstance(found, list) and len(found) == 1:
        found = found[0]
    print_json(found)
    return 0


def _natures(seen: "ImageBus | None") -> dict[str, str]:
    """The nature of each region."""
    if seen is not None:
        from pmemkit.bus.nature import image_evidence, judge

        return {each.dev: judge(image_evidence(each)).nature for each in seen.regions}
    from pmemkit.bus.verdicts import machine_verdicts

    verdicts, notes = machine_verdicts()
    for each in notes:
        note(each)
    return {dev: verdict.nature for dev, verdict in verdicts.items()}


def _add_natures(found: Any, natures: Mapping[str, str]) -> None:
    """Adds to regions what ndctl does not know; a listing without -v stays as ndctl prints it."""
    if isinstance(found, list):
        for each in found:
            _add_natures(each, natures)
    elif isinstance(found, dict):
        if found.get("dev") in natures:
            found["nature"] = natures[found["dev"]]
        _add_natures(found.get("regions"), natures)


_MODES = ("raw", "sector", "fsdax", "devdax", "system-ram")


def _images(options: argparse.Namespace) -> "ImageBus":
    from pmemkit.bus import observe
    from pmemkit.namespace.advice import notes

    seen = observe(the_machine(options, options.paths))
    for each in notes(seen):
        note(each)
    return seen


def _record(seen: "ImageBus", options: argparse.Namespace) -> "Bus":
    from pmemkit.bus import bus_record

    return bus_record(
        seen, idle=options.idle, verbose=options.verbose, media_errors=options.media_errors
    )


def _filtered(bus: "Bus", options: argparse.Namespace) -> "Bus":
    """What the filters leave. A namespace or a mode leaves the regions that have such a one."""
    regions = []
    narrow = options.mode is not None or options.namespace not in (None, "all")
    for region in bus.regions:
        on = [mapping.dimm for mapping in region.mappings]
        if not _names(options.region, region.dev) or not _names(options.dimm, *on):
            continue
        chosen = tuple(
            each
            for each in region.namespaces
            if _names(options.namespace, each.dev, each.uuid, each.raw_uuid, each.name)
            and options.mode in (None, each.mode)
        )
        if chosen or not narrow:
            regions.append(replace(region, namespaces=chosen))
    used = {mapping.dimm for region in regions for mapping in region.mappings}
    filtered = narrow or options.region not in (None, "all")
    dimms = tuple(
        each
        for each in bus.dimms
        if _names(options.dimm, each.dev) and (not filtered or each.dev in used)
    )
    return replace(bus, dimms=dimms, regions=tuple(regions))


def _names(wanted: str | None, *names: str | None) -> bool:
    """True when a filter is off or names one of these, as a whole or a device by its number."""
    if wanted in (None, "all"):
        return True
    devices = {f"{kind}{wanted}" for kind in ("namespace", "nmem", "region")}
    return bool({wanted, *devices} & {*names})
