"""``pmem explain``: what a region physically is, and how that is known."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pmemkit.cli._common import make_parser, print_json
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.bus.nature import Verdict

__all__ = ["run"]

_EXAMPLES = """\
  pmem explain vm.toml              every region of a machine file
  pmem explain vm.toml region1
  pmem explain region0              of this machine"""


def run(arguments: Sequence[str]) -> int:
    """Prints evidence, verdict, and what would change it."""
    parser = make_parser(
        "explain",
        "Say whether a region is storage or memory by its nature, and how that is known.",
        _EXAMPLES,
        "What is not known to be memory is storage: using memory as storage loses nothing.",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="image or machine file")
    parser.add_argument("region", metavar="REGION", nargs="?", help="all of them if not said")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    path, region = options.path, options.region
    if path is not None and region is None and path.startswith("region"):
        path, region = None, path
    verdicts = _of_machine(region) if path is None else _of_images(path, region)
    if options.json:
        print_json([{"dev": dev} | asdict(verdict) for dev, verdict in verdicts.items()])
    else:
        print("\n".join(line for dev, each in verdicts.items() for line in _lines(dev, each)))
    return 0


def _of_images(path: str, region: str | None) -> "dict[str, Verdict]":
    from pmemkit.bus.image import machine_of, observe
    from pmemkit.bus.nature import image_evidence, judge

    bus = observe(machine_of([path]))
    chosen = bus.regions if region is None else (bus.region(region),)
    return {each.dev: judge(image_evidence(each)) for each in chosen}


def _of_machine(region: str | None) -> "dict[str, Verdict]":
    from pmemkit.bus.kernel import kernel_bus, kernel_evidence
    from pmemkit.bus.nature import judge

    known = [each.dev for bus in kernel_bus() for each in bus.regions]
    if region is None and not known:
        raise InvalidArgument("this machine has no region", op="explain")
    chosen = known if region is None else [region]
    return {each: judge(kernel_evidence(each)) for each in chosen}


def _lines(dev: str, verdict: "Verdict") -> list[str]:
    lines = [f"{dev}: {verdict.nature}: {verdict.because}"]
    for each in verdict.evidence:
        speaks = f"speaks for {each.says}" if each.says is not None else "decides nothing"
        lines.append(f"  {each.source}: {each.value} ({each.strength}, {speaks})")
    lines += [f"  would be otherwise with {each}" for each in verdict.would_change]
    return lines
