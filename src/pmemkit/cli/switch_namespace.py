"""``pmem enable-namespace`` and ``pmem disable-namespace``: what they can mean without a driver.

On an image there is no driver to bind. Enabling asks whether a kernel would enable the namespace;
disabling asks whether nobody has it open.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._namespaces import add_machine_options, namespace_json, seen_bus, split_target
from pmemkit.errors import Corrupt, InvalidArgument, NotSupported, PmemError

if TYPE_CHECKING:
    from pmemkit.bus.image import ImageBus, ImageNamespace

__all__ = ["run_disable", "run_enable"]


def _asked(
    verb: str, what: str, arguments: Sequence[str]
) -> "tuple[argparse.Namespace, ImageBus, list[ImageNamespace]]":
    parser = make_parser(
        f"{verb}-namespace", what, f"  pmem {verb}-namespace disk.img namespace0.0", __doc__ or ""
    )
    add_machine_options(parser, paths="path")
    parser.add_argument("namespace", nargs="?", help="name, uuid, or all")
    parser.add_argument("--json", action="store_true", help="print the namespaces")
    options = parser.parse_args(arguments)
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace, or all", op=verb, path=path)
    bus = seen_bus(options, [path])
    if name == "all":
        found = [each for region in bus.regions for each in region.namespaces]
    else:
        found = [bus.namespace(name)]
    return options, bus, found


def _report(options: argparse.Namespace, verb: str, found: "list[ImageNamespace]") -> int:
    if options.json:
        print_json([namespace_json(each) for each in found])
    count = len(found)
    print(f"{verb} {count} namespace{'' if count == 1 else 's'}", file=sys.stderr)
    return 0


def run_enable(arguments: Sequence[str]) -> int:
    """Says whether a kernel would enable them."""
    what = "Check that a kernel would enable a namespace."
    options, bus, found = _asked("enable", what, arguments)
    for region in bus.regions:
        if region.scan is not None and region.scan.blocked:
            text = f"a kernel gives up on {region.dev}: {'; '.join(region.scan.damage)}"
            raise Corrupt(text, op="enable", path=region.path)
    for each in found:
        if not each.claim.enabled:
            why = "; ".join(str(fault) for fault in each.claim.faults)
            text = f"{each.dev} would stay disabled: {why}"
            raise NotSupported(text, op="enable", path=each.region.path)
        if not options.json:
            print(f"{each.dev}: a kernel enables it as {each.claim.mode}")
    return _report(options, "enabled", found)


def run_disable(arguments: Sequence[str]) -> int:
    """Says whether anybody has them open."""
    what = "Check that nobody has a namespace open."
    options, _, found = _asked("disable", what, arguments)
    from pmemkit.media.provider import open_medium

    for each in found:
        if each.region.span.ways > 1:
            text = f"{each.dev} spans several dimms, whose locks are not asked for"
            raise NotSupported(text, op="disable", path=each.region.path)
        start = each.region.dimms[0].spec.dpa + each.offset
        try:
            open_medium(each.region.path, part=(start, each.size)).close()
        except PmemError as busy:
            busy.message = f"{each.dev}: {busy.message}"
            raise
    return _report(options, "disabled", found)
