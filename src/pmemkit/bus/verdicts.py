"""The nature of the regions of this machine, with all that can be asked: declarations, sysfs, and
what devices report of their health.

What this does not do: anything where there is no region; then no program runs.
"""

from collections.abc import Iterable
from pathlib import Path

from pmemkit.bus.declarations import Declaration, load_declarations
from pmemkit.bus.evidence_health import health_of_machine
from pmemkit.bus.evidence_kernel import find_region, region_names, region_of_device, verdict_of
from pmemkit.bus.image import ImageNamespace
from pmemkit.bus.nature import Verdict, image_evidence, judge
from pmemkit.bus.programs import Run, run_program
from pmemkit.errors import InvalidArgument

__all__ = ["machine_verdicts", "verdict_at"]


def machine_verdicts(
    names: Iterable[str] | None = None,
    *,
    declarations: Iterable[Declaration] | None = None,
    sysfs: str | Path = "/sys",
    proc: str | Path = "/proc",
    run: Run = run_program,
) -> tuple[dict[str, Verdict], list[str]]:
    """Verdicts by region, of these or of all of them, and notes on what could not be asked.

    ``declarations``: those of the machine where they are not given. Raises
    :class:`InvalidArgument` for a name that is no region, and for declarations that are wrong.
    """
    declared = tuple(load_declarations() if declarations is None else declarations)
    found = {}
    for name in region_names(sysfs) if names is None else names:
        try:
            region = find_region(name, sysfs)
        except InvalidArgument:
            if names is not None:
                raise
            continue  # It went away after the names were read.
        found[region.dev] = region
    devices = [each.dev for region in found.values() for each in region.dimms]
    devices += [each.dev for region in found.values() for each in region.memdevs]
    health, notes = health_of_machine(dict.fromkeys(devices), run)
    verdicts = {
        dev: verdict_of(region, sysfs, proc, declared, health) for dev, region in found.items()
    }
    return verdicts, notes


def verdict_at(path: str, here: ImageNamespace | None) -> tuple[Verdict | None, list[str]]:
    """What is at a path by nature, with notes: a namespace of a machine file or image, or a device
    of this machine; ``None`` for a file that is neither."""
    if here is not None:
        return judge(image_evidence(here.region)), []
    region = region_of_device(path)
    if region is None:
        return None, []
    verdicts, notes = machine_verdicts([region])
    return next(iter(verdicts.values())), notes
