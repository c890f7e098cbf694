"""What must be equal between ``ndctl list`` in a guest and ``pmem list`` on the same images.

The normalisation, all of it:
1. Lists have no order: ndctl prints things as it finds them.
2. With several dimms the kernel numbers dimms and regions as the firmware lists them, which QEMU
   does in no fixed order. Dimms are matched by their handles (slot + 1), and R in ``namespaceR.N``,
   ``pmemR.N``, ``daxR.N`` and ``nmemR`` is rewritten to the number that pmemkit uses.
3. pmemkit adds ``path`` to whatever comes from an image, and its bus is called otherwise.
"""

import re
from typing import Any

from pmemkit.bus import bus_record, listing, machine_of, observe

_NUMBERED = re.compile(r"(namespace|pmem|dax|region|nmem)(\d+)(.*)")
_NAMES = ("dev", "blockdev", "chardev", "dimm")


def ours(paths: list[str], **options: Any) -> Any:
    """Regions by name, with mappings and namespaces, as pmemkit sees them."""
    found = listing(
        [bus_record(observe(machine_of(paths, **options)), idle=True)],
        dimms=True,
        regions=True,
        namespaces=True,
    )
    return _by_name([_plain(region) for region in found["regions"]])


def kernels(listed: Any) -> Any:
    """The same of ``ndctl list -DRNi``, renumbered by dimm."""
    slots = {dimm["dev"]: dimm["handle"] - 1 for dimm in listed["dimms"]}
    return _by_name(
        [
            _renumbered(region, str(slots[region["mappings"][0]["dimm"]]))
            for region in listed["regions"]
        ]
    )


def _by_name(regions: list[Any]) -> Any:
    found = {}
    for region in regions:
        named = {each["dev"]: each for each in region.pop("namespaces", [])}
        found[region["dev"]] = {**region, "namespaces": named}
    return found


def _plain(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _plain(value) for key, value in record.items() if key != "path"}
    return [_plain(each) for each in record] if isinstance(record, list) else record


def _renumbered(record: Any, number: str) -> Any:
    if isinstance(record, list):
        return [_renumbered(each, number) for each in record]
    if not isinstance(record, dict):
        return record
    found = {}
    for key, value in record.items():
        match = _NUMBERED.fullmatch(value) if key in _NAMES else None
        found[key] = f"{match[1]}{number}{match[3]}" if match else _renumbered(value, number)
    return found


def differences(kernel: Any, mine: Any) -> list[str]:
    """What is not equal, a line each: for the assertion that there is nothing."""
    found = []
    for name in sorted(kernel.keys() | mine.keys()):
        theirs, own = dict(kernel.get(name, {})), dict(mine.get(name, {}))
        below, beside = theirs.pop("namespaces", {}), own.pop("namespaces", {})
        found += [
            f"{name}.{key}: ndctl {theirs.get(key)!r}, pmem {own.get(key)!r}"
            for key in sorted(theirs.keys() | own.keys())
            if theirs.get(key) != own.get(key)
        ]
        found += [
            f"{each}: ndctl {below.get(each)}, pmem {beside.get(each)}"
            for each in sorted(below.keys() | beside.keys())
            if below.get(each) != beside.get(each)
        ]
    return found
