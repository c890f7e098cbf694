"""What a real kernel and ndctl wrote and printed, read back by pmemkit without a boot."""

import json
from pathlib import Path

import pytest
from agreement import kernels, ours

from pmemkit.bus import machine_of, observe
from pmemkit.namespace.label_verbs import labels_listing

GOLDEN = Path(__file__).parent / "golden"
LABEL_SIZE = 128 << 10
CASES = sorted(
    each.parent.name
    for each in GOLDEN.glob("*/list-BDRNi-v.json")
    # Ranges that firmware reserves have no dimms; no image stands for them.
    if each.parent.name != "e820"
)


def rebuild(case: Path, directory: Path) -> list[str]:
    """The images of a case: their label areas and the heads of their namespaces, and holes."""
    (bus,) = json.loads((case / "list-BDRNi-v.json").read_text())
    starts = {}
    for line in (case / "resources.txt").read_text().splitlines():
        name, start, region = line.split()
        starts[name] = int(start, 16) - int(region, 16)
    paths = {}
    for region in bus["regions"]:
        dimm = region["mappings"][0]["dimm"]
        labels = case / f"{dimm}.labels.bin"
        size = region["size"] + (LABEL_SIZE if labels.exists() else 0)
        path = directory / f"{dimm}.img"
        with path.open("wb") as image:
            image.truncate(size)
            if labels.exists():
                image.seek(size - LABEL_SIZE)
                image.write(labels.read_bytes())
            for each in region.get("namespaces", []):
                head = case / f"{each['dev']}.head.bin"
                if head.exists():
                    image.seek(starts[each["dev"]])
                    image.write(head.read_bytes())
        paths[dimm] = str(path)
    handles = {dimm["dev"]: dimm["handle"] for dimm in bus["dimms"]}
    return [paths[name] for name in sorted(paths, key=lambda name: handles[name])]


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernel_wrote_is_listed_as_ndctl_lists_it(case, tmp_path):
    paths = rebuild(GOLDEN / case, tmp_path)
    listed = json.loads((GOLDEN / case / "list-BDRNi-v.json").read_text())[0]
    quiet = json.loads((GOLDEN / case / "list-RNi.json").read_text())
    quiet["dimms"] = listed["dimms"]
    for region in quiet["regions"]:
        full = next(each for each in listed["regions"] if each["dev"] == region["dev"])
        region["mappings"] = full["mappings"]
    labels = GOLDEN / case / "nmem0.labels.bin"
    options = {"label_size": LABEL_SIZE} if labels.exists() else {}
    assert ours(paths, **options) == kernels(quiet)


@pytest.mark.parametrize(
    "case", [each for each in CASES if (GOLDEN / each / "read-labels.json").exists()]
)
def test_labels_are_read_as_ndctl_reads_them(case, tmp_path):
    paths = rebuild(GOLDEN / case, tmp_path)
    expected = json.loads((GOLDEN / case / "read-labels.json").read_text() or "[]")
    bus = observe(machine_of(paths, label_size=LABEL_SIZE))
    assert labels_listing(bus.dimms) == sorted(expected, key=lambda each: each["dev"])
