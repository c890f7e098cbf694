"""Namespaces that ndctl made in a guest, as pmemkit sees them after it was switched off."""

import hashlib
import json

import pytest
from agreement import differences, kernels, ours
from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.namespace.label_verbs import labels_listing
from pmemkit.storage.region import open_region

MIB = 1 << 20
LABEL_SIZE = 128 << 10

MAKE = """
ndctl disable-region all
ndctl init-labels -V 1.2 nmem0
ndctl init-labels -V 1.1 nmem1
ndctl enable-region all
for dimm in nmem0 nmem1; do
    region=$(ndctl list -R -d $dimm | grep -o 'region[0-9]*' | head -n 1)
    ndctl create-namespace -r $region -m raw -s 32M -n plain
    for size in 512 520 528 4096 4104 4160 4224; do
        ndctl create-namespace -r $region -m sector -s 32M -l $size -n s$size
    done
    for mode in fsdax devdax; do
        for map in mem dev; do
            for align in 4096 2097152; do
                ndctl create-namespace -r $region -m $mode -s 32M -M $map -a $align
            done
        done
    done
done
"""

SUMS = """
for name in $(cd /dev; ls pmem*); do
    head -c 100000 /dev/urandom > /tmp/noise
    dd if=/tmp/noise of=/dev/$name bs=4096 seek=7 conv=fsync 2> /dev/null
    echo "$name $(sha256sum < /dev/$name | cut -d ' ' -f 1)"
done
"""


@pytest.fixture(scope="module")
def made(guest: Guest, tmp_path_factory):
    """Two boots: ndctl makes everything; then it lists, and every block device is written."""
    directory = tmp_path_factory.mktemp("ndctl")
    paths = [directory / "a.img", directory / "b.img", directory / "kernel.img"]
    for path in paths:
        with path.open("wb") as image:
            image.truncate(640 * MIB + LABEL_SIZE)
    dimms = [Dimm(path, label_size_bytes=LABEL_SIZE) for path in paths]
    # The third area is initialised by the kernel itself: ndctl reconfigures its one namespace.
    whole = (
        "ndctl create-namespace -f -m fsdax -e $(ndctl list -N -d nmem2 | grep -o 'names[^\"]*')"
    )
    first = guest.run(dimms, {"make": MAKE, "by kernel": whole}, timeout_seconds=240)
    first.check()
    second = guest.run(
        dimms,
        {"list": "ndctl list -DRNi", "labels": "ndctl read-labels -j all", "sums": SUMS},
        timeout_seconds=240,
    )
    return [str(path) for path in paths], first, second


def test_every_field_is_equal(made):
    paths, _, result = made
    listed = kernels(result["list"].json())
    wrong = differences(listed, ours(paths, label_size=LABEL_SIZE))
    assert not wrong, "\n".join(wrong)
    assert len(listed["region0"]["namespaces"]) == 1 + 7 + 8 + 1


def test_labels_are_equal(made):
    paths, _, result = made
    bus = observe(machine_of(paths, label_size=LABEL_SIZE))
    handles = {each["dev"]: each["handle"] - 1 for each in result["list"].json()["dimms"]}
    theirs = {f"nmem{handles[each['dev']]}": each for each in result["labels"].json()}
    for mine in labels_listing(bus.dimms):
        expected = {**theirs[mine["dev"]], "dev": mine["dev"]}
        assert json.loads(json.dumps(mine)) == expected


def test_the_data_are_equal(made):
    paths, _, result = made
    listed = result["list"].json()
    handles = {each["dev"]: each["handle"] - 1 for each in listed["dimms"]}
    places = {
        each["blockdev"]: (handles[region["mappings"][0]["dimm"]], each["uuid"])
        for region in listed["regions"]
        for each in region["namespaces"]
        if "blockdev" in each
    }
    sums = dict(line.split() for line in result["sums"].check().text.splitlines())
    assert sums.keys() == places.keys()
    for name, (slot, uuid) in places.items():
        (mine,) = [
            each
            for each in ours([paths[slot]], slot=slot)["region0"]["namespaces"].values()
            if each.get("uuid") == uuid
        ]
        with open_region(f"{paths[slot]}:{mine['dev']}", read_only=True) as region:
            device = region.device(read_only=True)
            digest = hashlib.sha256()
            for start in range(0, device.size, MIB):
                digest.update(device.read(start, min(MIB, device.size - start)))
        assert digest.hexdigest() == sums[name], (name, mine["mode"], mine.get("sector_size"))
