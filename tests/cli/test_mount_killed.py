"""``pmem mount`` whose server is killed under load, and a load that verifies itself."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from cli_run import PATIENCE_SECONDS
from mount_run import Place, require_clean, run, wait_until, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.peer("mount", "losetup", "mkfs.ext4", "mkfs.xfs", "e2fsck", "xfs_repair"),
]

GONE = r"Input/output|Read-only|No such device|Transport"
"""What a program hears whose file system lost its device."""

WRITER = """
import os, random, sys
directory, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
folder = os.path.join(directory, str(seed))
os.mkdir(folder)
number = 0
while True:
    # A new file, made as programs that care make one: written, synced, renamed, synced.
    data = random.Random(f"{seed} {number}").randbytes(rng.choice([10, 5000, 200_000]))
    name = os.path.join(folder, str(number))
    fd = os.open(name + ".new", os.O_WRONLY | os.O_CREAT)
    if os.write(fd, data) != len(data):
        sys.exit("there was no room for it")
    os.fsync(fd)
    os.close(fd)
    os.rename(name + ".new", name)
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    print(number, len(data), flush=True)
    number += 1
    if number % 40 == 0:
        for old in range(number - 40, number - 20):
            os.unlink(os.path.join(folder, str(old)))
            print("gone", old, flush=True)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path, monkeypatch)
    try:
        yield place
        wait_until(lambda: not place.leftovers())
    finally:
        place.clean_up()


def acknowledged(said):
    """``{number: length}`` of the files whose sync was acknowledged and that were not removed."""
    files = {}
    for line in said.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        first, second = line.split()
        if first == "gone":
            files.pop(int(second), None)
        else:
            files[int(first)] = int(second)
    # The next batch of removals may have begun without a word of it.
    if files and (max(files) + 1) % 40 == 0:
        doomed = range(max(files) - 39, max(files) - 19)
        files = {number: length for number, length in files.items() if number not in doomed}
    return files


def require_synced(folder, seed, files):
    for number, length in files.items():
        expected = random.Random(f"{seed} {number}").randbytes(length)
        assert (folder / str(number)).read_bytes() == expected, f"file {number} of {seed}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("filesystem", "mode", "cache"),
    [
        ("ext4", "raw", "off"),
        ("xfs", "sector-4096", "off"),
        ("ext4", "sector-4096", "writeback"),
        pytest.param("ext4", "sector-4096", "off", marks=pytest.mark.soak),
        pytest.param("xfs", "raw", "off", marks=pytest.mark.soak),
        pytest.param("xfs", "raw", "writeback", marks=pytest.mark.soak),
        pytest.param("xfs", "sector-4096", "writeback", marks=pytest.mark.soak),
    ],
)
def test_what_was_synced_survives_a_killed_server(place, scale, filesystem, mode, cache):
    rounds = scale(1, 20)
    # Room for what all rounds leave.
    namespace = place.make_image(mode, scale(320 if filesystem == "xfs" else 128, 2048))
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    told = place.mount(namespace, "--mkfs", filesystem, "--cache", cache)
    count, earlier = 0, {}
    for turn in range(rounds):
        words = [sys.executable, "-c", WRITER, place.target, str(seed + turn)]
        with subprocess.Popen(
            [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as writer:
            time.sleep(rng.uniform(0.3, 1.0))
            os.kill(told["pid"], signal.SIGKILL)
            said, complaint = writer.communicate(timeout=PATIENCE_SECONDS)
        assert re.search(GONE, complaint), complaint
        place.umount()
        assert not place.leftovers()
        told = place.mount(namespace)
        earlier[seed + turn] = acknowledged(said)
        count += len(earlier[seed + turn])
        for each, files in earlier.items():
            require_synced(place.target / str(each), each, files)
        place.umount()
        require_clean(place, namespace, filesystem)
        if turn + 1 < rounds:
            told = place.mount(namespace, "--cache", cache)
    assert count > 0


def test_the_check_notices_a_lost_file(tmp_path):
    said = "".join(f"{number} 10\n" for number in range(41)) + "gone 0\ngone 1\n41 50"
    files = acknowledged(said)
    assert sorted(files) == list(range(2, 41))
    assert sorted(acknowledged("".join(f"{n} 1\n" for n in range(40)))) == list(range(20, 40))
    for number, length in files.items():
        (tmp_path / str(number)).write_bytes(random.Random(f"7 {number}").randbytes(length))
    require_synced(tmp_path, 7, files)
    (tmp_path / "5").write_bytes(bytes(10))
    with pytest.raises(AssertionError, match="file 5 of 7"):
        require_synced(tmp_path, 7, files)


@pytest.mark.peer("fio")
@pytest.mark.parametrize(("direct", "cache"), [(0, "off"), (1, "writeback")])
def test_verified_random_load(place, need, scale, direct, cache):
    cached = ("--cache", cache, "--cache-size", "4M")
    place.mount(place.make_image("sector-4096", 128), "--mkfs", "ext4", *cached)
    words = ["--name=load", f"--filename={place.target / 'file'}", "--size=12M", "--rw=randrw"]
    words += ["--bsrange=4k-128k", "--ioengine=libaio", "--iodepth=16", f"--direct={direct}"]
    words += ["--verify=crc32c", "--fsync=64", f"--loops={scale(1, 20)}", "--verify_fatal=1"]
    run(need("fio"), *words, cwd=place.path)
    place.umount()
