"""Makes the files beside it again: what the kernel and ndctl write and print, case by case.

    python tests/kernel/golden/make.py [CASE…]

Each case is a set of blank images, a script that prepares them in one boot, and the commands below
in a second boot, so that numbers and names are those after a restart and not those of creation.
UUIDs differ each time it is run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tools.guest import Dimm, Guest, Result

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
LABEL_SIZE = 128 << 10
LABEL_BYTES = 16384
PAGE_BYTES = 4096
HEAD_BYTES = 8192


ALL_MODES = """
create() { ndctl create-namespace -r region0 "$@"; }
create -m raw -s 32M -n plain
create -m sector -s 64M -l 4096 -n sector4k
create -m sector -s 64M -l 512
create -m fsdax -s 64M -M dev -n fsdev
create -m fsdax -s 64M -M mem -a 4K -l 4096
create -m devdax -s 64M -M dev -a 2M -n dax2m
create -m devdax -s 64M -M mem -a 4K
create -m devdax -s 64M -M dev -a 4K
"""
INIT = "ndctl disable-region all\nndctl init-labels {version} nmem0\nndctl enable-region all\n"
SECTORS = "".join(
    f"ndctl create-namespace -r region0 -m sector -s 32M -l {size}\n"
    for size in (512, 520, 528, 4096, 4104, 4160, 4224)
)

COMMANDS = {
    "list-BDRNi-v": "ndctl list -BDRNi -v",
    "list-RNi": "ndctl list -RNi",
    "list-RN": "ndctl list -RN",
    "list-N": "ndctl list -N",
    "list-Ni-v": "ndctl list -Ni -v",
    "list-R-v": "ndctl list -R -v",
    "list-D": "ndctl list -D",
    "list-D-v": "ndctl list -D -v",
    "read-labels": "ndctl read-labels -j all",
    "daxctl-list": "daxctl list",
}


@dataclass(frozen=True)
class Case:
    """Blank images and what is done to them."""

    prepare: str = ""
    size_mib: int = 640
    label_size: int | None = LABEL_SIZE
    align: str | None = "2M"
    dimms: int = 1
    kernel_arguments: str = ""
    memory: str = "1G"


CASES = {
    "labelless": Case(label_size=None, size_mib=256),
    "labelless-modes": Case(
        "ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem\n"
        "ndctl create-namespace -f -e namespace1.0 -m fsdax -M dev\n"
        "ndctl create-namespace -f -e namespace2.0 -m devdax -M dev -a 4K\n"
        "ndctl create-namespace -f -e namespace3.0 -m sector -l 4096\n",
        label_size=None,
        size_mib=128,
        dimms=4,
    ),
    "uninitialised": Case(size_mib=256),
    "initialised-v1.1": Case(INIT.format(version=""), size_mib=256),
    "initialised-v1.2": Case(INIT.format(version="-V 1.2"), size_mib=256),
    "modes-v1.1": Case(INIT.format(version="") + ALL_MODES),
    "modes-v1.2": Case(INIT.format(version="-V 1.2") + ALL_MODES),
    "sectors-v1.1": Case(INIT.format(version="") + SECTORS, size_mib=256),
    "sectors-v1.2": Case(INIT.format(version="-V 1.2") + SECTORS, size_mib=256),
    "by-kernel": Case("ndctl create-namespace -f -e namespace0.0 -m fsdax\n", size_mib=258),
    "destroyed-v1.2": Case(
        INIT.format(version="-V 1.2")
        + ALL_MODES
        + "ndctl destroy-namespace -f namespace0.1\nndctl destroy-namespace -f namespace0.3\n"
    ),
    "two-dimms-unaligned": Case(size_mib=64, dimms=2, align=None),
    "two-dimms-aligned": Case(size_mib=64, dimms=2),
    "e820": Case(dimms=0, kernel_arguments="memmap=64M!2G", memory="3G"),
}


def _heads(addresses: dict[str, tuple[int, int]], images: list[Path], target: Path) -> None:
    for name, (slot, offset) in addresses.items():
        with images[slot].open("rb") as image:
            image.seek(offset)
            (target / f"{name}.head.bin").write_bytes(image.read(HEAD_BYTES))


def _offsets(steps: Result, images: list[Path]) -> dict[str, tuple[int, int]]:
    """Where each namespace starts, from the kernel's own ``resource`` attributes."""
    (bus,) = steps["list-BDRNi-v"].json()
    handles = {dimm["dev"]: dimm["handle"] for dimm in bus.get("dimms", [])}
    # The kernel numbers regions in an order of its own; the handle of the dimm tells the image.
    slots = {
        region["dev"].removeprefix("region"): handles[region["mappings"][0]["dimm"]] - 1
        for region in bus["regions"]
        if "mappings" in region
    }
    found = {}
    for line in steps["resources"].text.splitlines():
        name, start, region_start = line.split()
        slot = slots.get(name.removeprefix("namespace").split(".")[0])
        if slot is not None and slot < len(images):
            found[name] = (slot, int(start, 0) - int(region_start, 0))
    return found


RESOURCES = """
cd /sys/bus/nd/devices
for namespace in namespace*; do
    [ "$(cat $namespace/size)" = 0 ] && continue
    region=region${namespace#namespace}
    echo $namespace $(cat $namespace/resource) $(cat ${region%%.*}/resource)
done
"""


def make(guest: Guest, name: str, case: Case) -> None:
    """Writes the directory of one case."""
    target = HERE / name
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        images = [Path(scratch) / f"{index}.img" for index in range(case.dimms)]
        dimms = []
        for image in images:
            with image.open("wb") as file:
                file.truncate(case.size_mib * MIB)
            dimms.append(Dimm(image, label_size_bytes=case.label_size, align=case.align))

        def boot(steps: dict[str, str]) -> Result:
            return guest.run(
                dimms, steps, memory=case.memory, kernel_arguments=case.kernel_arguments
            )

        if case.prepare:
            first = boot({"prepare": case.prepare}).check()
            (target / "prepare.txt").write_text(first["prepare"].text, encoding="utf-8")
        steps = {
            **COMMANDS,
            "resources": RESOURCES,
            "iomem": "grep -i persistent /proc/iomem",
        }
        second = boot(steps)
        for step in COMMANDS:
            text = second[step].text
            if text.strip():
                json.loads(text)
                (target / f"{step}.json").write_text(text, encoding="utf-8")
            if second[step].status != 0:
                print(f"{name}: {step}: status {second[step].status}: {second[step].errors}")
        for step in ("resources", "iomem"):
            (target / f"{step}.txt").write_text(second[step].check().text, encoding="utf-8")
        _heads(_offsets(second, images), images, target)
        if case.label_size is not None:
            for index, image in enumerate(images):
                with image.open("rb") as file:
                    file.seek(case.size_mib * MIB - LABEL_SIZE)
                    data = file.read(LABEL_BYTES).rstrip(b"\0")
                padding = bytes(-len(data) % PAGE_BYTES) or bytes(0 if data else PAGE_BYTES)
                (target / f"nmem{index}.labels.bin").write_bytes(data + padding)


def main() -> int:
    """Makes the cases that are named, or all."""
    guest = Guest.build()
    for name in sys.argv[1:] or CASES:
        make(guest, name, CASES[name])
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
