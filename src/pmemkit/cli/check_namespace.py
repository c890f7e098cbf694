"""``pmem check-namespace``: a namespace of mode sector checked, and repaired where it can be."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._namespaces import (
    add_machine_options,
    progress_bar,
    seen_bus,
    split_target,
)
from pmemkit.errors import Corrupt, InvalidArgument, NotSupported

if TYPE_CHECKING:
    from pmemkit._native.media import Medium
    from pmemkit.bus.image import ImageNamespace
    from pmemkit.namespace.check_btt import CheckReport

__all__ = ["run"]

_EXAMPLES = """\
  pmem check-namespace disk.img namespace0.0
  pmem check-namespace disk.img:namespace0.0 --repair
  pmem check-namespace disk.img namespace0.0 --repair --rewrite-log"""
_NOTES = """\
Nothing is written without --repair, and nothing at all where something cannot be repaired.
Exit code 0: clean, or everything repaired; 12: damaged."""


def run(arguments: Sequence[str]) -> int:
    """Checks and reports."""
    parser = make_parser("check-namespace", "Check a sector namespace.", _EXAMPLES, _NOTES)
    add_machine_options(parser, paths="path")
    parser.add_argument("namespace", nargs="?", help="name, uuid, or all of mode sector")
    parser.add_argument("-R", "--repair", action="store_true", help="repair what can be")
    parser.add_argument(
        "-L", "--rewrite-log", action="store_true", help="with --repair: one log entry a lane"
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="check one that is in use (without --repair)"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="layout and states of sectors, too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    path, name = split_target(options)
    if name is None:
        raise InvalidArgument("say which namespace, or all", op="check", path=path)
    if options.rewrite_log and not options.repair:
        raise InvalidArgument("--rewrite-log goes with --repair", op="check", path=path)
    bus = seen_bus(options, [path])
    if name == "all":
        every = [each for region in bus.regions for each in region.namespaces]
        found = [each for each in every if _version(each)]
    else:
        found = [bus.namespace(name)]
    reports = {each.dev: _check(options, path, each) for each in found}
    if options.json:
        print_json([_record(dev, report) for dev, report in reports.items()])
    else:
        for dev, report in reports.items():
            print("\n".join(_lines(dev, report, options.verbose)))
    clean = all(report.clean for report in reports.values())
    print(f"checked {len(reports)} namespace{'' if len(reports) == 1 else 's'}", file=sys.stderr)
    return 0 if clean else Corrupt.exit_code


def _version(here: "ImageNamespace") -> str | None:
    """What the label, or a valid info block, says of the layout; empty where it is to be found."""
    from pmemkit.formats import guids

    claim = here.found.claim if here.found is not None else None
    if claim == guids.BTT2:
        return "2.0"
    if claim == guids.BTT:
        return "1.1"
    if here.claim.mode == "sector" or here.claim.version is not None:
        return "1.1"
    if claim in (guids.PFN, guids.DAX) or here.claim.mode in ("fsdax", "devdax"):
        return None
    return ""


def _check(options: argparse.Namespace, path: str, here: "ImageNamespace") -> "CheckReport":
    from pmemkit.media.provider import open_medium
    from pmemkit.namespace.check_btt import check_btt

    version = _version(here)
    if version is None:
        text = f"{here.dev} is of mode {here.claim.mode}: only sector namespaces can be checked"
        raise NotSupported(text, op="check", path=path)
    if here.region.span.ways > 1:
        raise NotSupported(f"{here.dev} spans several dimms", op="check", path=path)
    start = here.region.dimms[0].spec.dpa + here.offset
    in_use = options.force and not options.repair
    medium = open_medium(
        here.region.path,
        part=(start, here.size),
        read_only=not options.repair,
        locking="off" if in_use else "on",
    )
    try:
        if version == "" and options.repair:
            _refuse_data(here, path, medium.medium)
        with progress_bar(f"checking {here.dev}") as progress:
            return check_btt(
                medium.medium,
                0,
                here.size,
                parent_uuid=here.uuid,
                version="1.1" if version == "1.1" else "2.0" if version else None,
                repair=options.repair,
                rewrite_log=options.rewrite_log,
                progress=progress,
            )
    except Corrupt as cause:
        if version == "":
            text = f"{here.dev} is raw and carries no BTT: there is nothing to check"
            raise NotSupported(text, op="check", path=path) from cause
        raise
    finally:
        medium.close()


def _refuse_data(here: "ImageNamespace", path: str, medium: "Medium") -> None:
    """A raw namespace may have been of mode sector once, and something else since."""
    from pmemkit.storage.signatures import signature_in

    found = signature_in(medium.read, here.size)
    if found is not None:
        text = f"{here.dev} is raw and holds {found}, which a repair to mode sector would destroy"
        raise InvalidArgument(text, op="check", path=path)


def _record(dev: str, report: "CheckReport") -> dict[str, object]:
    return {
        "dev": dev,
        "clean": report.clean,
        "version": report.version,
        "arenas": report.arenas,
        "sectors": report.sectors,
        "states": report.states,
        "log_rewritten": report.log_rewritten,
        "findings": [asdict(each) for each in report.findings],
    }


def _lines(dev: str, report: "CheckReport", verbose: bool) -> list[str]:
    lines = []
    for each in report.findings:
        state = (
            "repaired"
            if each.repaired
            else "can be repaired"
            if each.repairable
            else "cannot be repaired"
        )
        lines.append(f"{dev}: {each.message} ({state})")
    if report.clean:
        verdict = "repaired" if report.findings else "clean"
    elif report.repairable:
        verdict = "damaged; --repair repairs it"
    else:
        verdict = "damaged beyond repair; nothing was written"
    more = ", log rewritten" if report.log_rewritten else ""
    arenas = f"{report.arenas} arena{'' if report.arenas == 1 else 's'}"
    if report.states["error"]:
        more += f", {report.states['error']} of them in error"
    lines.append(f"{dev}: {verdict} ({arenas}, {report.sectors} sectors{more})")
    if verbose:
        states = ", ".join(f"{count} {state}" for state, count in report.states.items())
        lines.append(f"{dev}: layout {report.version}; sectors by state: {states}")
    return lines
