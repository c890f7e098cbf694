"""``pmem explain``: what a region physically is, and how that is known."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import make_parser, print_json
from pmemkit.cli._namespaces import note
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.nature import Verdict

__all__ = ["run"]

_EXAMPLES = """\
  pmem explain                      every region of this machine
  pmem explain region0              one of them; CXL regions and dax1.0, too
  pmem explain region0 --declare my-machine.toml
  pmem explain vm.toml              every region of a machine file
  pmem explain vm.toml region1"""

_OF_MACHINE = re.compile(r"(region|dax_region|hmem(_platform)?)[\d.]*|dax\d+\.\d+")
_COLUMNS = ("strength", "speaks for", "source", "value")


def run(arguments: Sequence[str]) -> int:
    """Prints evidence, verdict, and what would change it."""
    parser = make_parser(
        "explain",
        "Say whether a region is storage or memory by its nature, and how that is known.",
        _EXAMPLES,
        "What is not known to be memory is storage: using memory as storage loses nothing.\n"
        "Strengths, strongest first: declared, wear, firmware; a hint decides nothing.",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="image or machine file")
    parser.add_argument("region", metavar="REGION", nargs="?", help="all of them if not said")
    parser.add_argument(
        "--declare",
        metavar="FILE",
        help="what you declare of this machine's dimms and regions, in place of "
        "/etc/pmemkit/machine.toml",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    path, region = options.path, options.region
    if path is not None and region is None and _names_region(path):
        path, region = None, path
    if path is None:
        verdicts = _of_machine(region, options.declare)
    elif options.declare is not None:
        text = "--declare is for this machine; what images are stands in their machine file"
        raise InvalidArgument(text, op="explain", path=path)
    else:
        verdicts = _of_images(path, region)
    if options.json:
        print_json([{"dev": dev} | _plain(verdict) for dev, verdict in verdicts.items()])
    else:
        parts = ("\n".join(_lines(dev, each)) for dev, each in verdicts.items())
        print("\n\n".join(parts))
    return 0


def _names_region(word: str) -> bool:
    """True for the name of a region of this machine, where no file is called so."""
    return _OF_MACHINE.fullmatch(word) is not None and not os.path.lexists(word)


def _of_images(path: str, region: str | None) -> "dict[str, Verdict]":
    from pmemkit.bus.image import machine_of, observe
    from pmemkit.bus.nature import image_evidence, judge

    bus = observe(machine_of([path]))
    chosen = bus.regions if region is None else (bus.region(region),)
    where = "a machine file" if bus.machine.path is None else bus.machine.path
    return {each.dev: judge(image_evidence(each), declare=where) for each in chosen}


def _of_machine(region: str | None, declare: str | None) -> "dict[str, Verdict]":
    from pmemkit.bus.declarations import load_declarations
    from pmemkit.bus.verdicts import machine_verdicts

    names = None if region is None else [region]
    verdicts, notes = machine_verdicts(names, declarations=load_declarations(declare))
    if not verdicts:
        raise InvalidArgument("this machine has no region", op="explain")
    for each in notes:
        note(each)
    return verdicts


def _plain(verdict: "Verdict") -> dict[str, Any]:
    """For JSON; of a piece of evidence, what it does not have is left out."""
    record = asdict(verdict)
    optional = ("otherwise", "endurance", "life_used")
    for each in record["evidence"]:
        for name in optional:
            if each[name] is None:
                del each[name]
    return record


def _lines(dev: str, verdict: "Verdict") -> list[str]:
    other = "memory" if verdict.nature == "storage" else "storage"
    lines = [f"{dev}: {verdict.nature}: {verdict.because}"]
    if verdict.evidence:
        rows = [_COLUMNS]
        rows += [
            (each.strength, each.says or "nothing", each.source, each.value)
            for each in verdict.evidence
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [
            "  " + "  ".join([*(f"{row[c]:{widths[c]}}" for c in range(3)), row[3]]) for row in rows
        ]
    if verdict.wears:
        known = [] if verdict.life_used is None else [f"{verdict.life_used} % of its life is used"]
        if verdict.endurance is not None:
            from pmemkit.units import format_size

            known.append(f"{format_size(verdict.endurance)} may be written to it in its life")
        lines.append(f"  it wears: {', '.join(known) or 'how far is not known'}")
    return lines + [f"  would be {other} with {each}" for each in verdict.would_change]
