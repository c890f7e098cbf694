"""``pmem mount`` at work: the same bytes as in a plain directory, clean, and what media were given.

With ``PMEMKIT_SOAK=1`` it is much work, on all combinations; ``-s`` shows the table of media bytes.
"""

import json
import os
from pathlib import Path

import pytest
from mount_run import MIB, Place, hashes, require_clean, wait_until, why_not
from workload import FULL, SMALL, make_tarball, work

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.peer("mount", "losetup", "mkfs.ext4", "mkfs.xfs", "e2fsck", "xfs_repair"),
]

SLACK = 1.1
"""Two runs differ by when the kernel writes back."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path, monkeypatch)
    try:
        yield place
        wait_until(lambda: not place.leftovers())
    finally:
        place.clean_up()


@pytest.fixture(scope="module")
def task(tmp_path_factory, scale):
    """Tarball, amount, and the hashes of what becomes of them in a plain directory."""
    path = tmp_path_factory.mktemp("plain")
    amount = scale(SMALL, FULL)
    make_tarball(path / "sources.tar.gz", amount)
    (path / "done").mkdir()
    work(path / "done", path / "sources.tar.gz", amount)
    return path / "sources.tar.gz", amount, hashes(path / "done")


def written_to(loop):
    """Bytes that the kernel has written to a loop device, for earlier users of it too."""
    return int((Path("/sys/block") / Path(loop).name / "stat").read_text().split()[6]) * 512


def media_bytes(place, task, filesystem, mode, cache):
    """Works on a new file system, checks everything, and gives what the kernel wrote to the device
    and what was stored to media for it."""
    tarball, amount, expected = task
    size_mib = 1024 if amount is FULL else 320 if filesystem == "xfs" else 64
    place.image.unlink(missing_ok=True)
    namespace = place.make_image(mode, size_mib)
    # As on media of this kind: a flush writes lines back, and waits for no disk.
    words = [namespace, "--granularity", "cacheline"]
    place.mount(*words, "--mkfs", filesystem)
    place.umount()
    told = place.mount(*words, "--cache", cache)
    assert (told["cache"], told["cache_because"]) == (cache, "as asked for")
    before = written_to(told["loop"])
    work(place.target, tarball, amount)
    assert hashes(place.target) == expected
    os.sync()
    asked = written_to(told["loop"]) - before
    (gone,) = json.loads(place.umount("--json"))
    require_clean(place, namespace, filesystem)
    place.mount(*words)
    assert hashes(place.target) == expected
    place.umount()
    assert ("cache" in gone) == (cache != "off")
    if cache != "off":
        assert gone["cache"]["dirty"] == 0
    return asked, gone["media"]["bytes_stored"]


CASES = [("raw", "off"), ("sector-4096", "off"), ("sector-4096", "writeback")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("filesystem", "cases"),
    [
        ("ext4", CASES),
        ("xfs", CASES[2:]),
        pytest.param("xfs", CASES, marks=pytest.mark.soak),
        pytest.param(
            "ext4",
            [("sector-512", "off"), ("sector-512", "writeback"), ("raw", "writeback")],
            marks=pytest.mark.soak,
        ),
    ],
    ids=["ext4", "xfs cached", "xfs", "ext4 more"],
)
def test_a_real_workload(place, task, filesystem, cases):
    stored = {}
    for mode, cache in cases:
        asked, stored[mode, cache] = media_bytes(place, task, filesystem, mode, cache)
        row = [filesystem, mode, cache, asked, stored[mode, cache]]
        print("| " + " | ".join(map(str, row)) + " |")
        if cache == "off":
            # What the kernel wrote went there: holes cost less, sectors a little more.
            assert 0.9 * asked <= stored[mode, cache] <= 1.25 * asked + 8 * MIB
    for mode, cache in stored:
        if cache != "off" and (mode, "off") in stored:
            assert stored[mode, cache] <= stored[mode, "off"] * SLACK
