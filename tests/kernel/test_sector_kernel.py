"""The engine and Linux take turns on the same sectors, and each of them is killed in its turn."""

import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sector_load import PAGE, Load
from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.namespace.check_btt import check_btt
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.region import open_region

MIB = 1 << 20
LABEL_SIZE = 128 << 10
SECTOR_SIZES = (4096, 512)
LOAD, POISONED = (Path(__file__).with_name(name) for name in ("sector_load.py", "poisoned.py"))
WORD = 8
PATIENCE_SECONDS = 60
BUDGET_SECONDS = 1200
STEPS_LEAST = 16  # of which some zero

# Names that do not depend on how the kernel numbers regions.
NAMES = """
for each in /sys/block/pmem*; do
    name=${each##*/}
    case $name in
        *s) ln -s /dev/$name /dev/sectors$(cat $each/queue/logical_block_size) ;;
        *) ln -s /dev/$name /dev/acks ;;
    esac
done
ls /dev/sectors4096 /dev/sectors512 /dev/acks
"""
READ = "dd if=/dev/sectors{size} bs={bytes} count={count} iflag=direct 2> /dev/null"
CHECK = """
for dev in $(ndctl list -N -m sector | grep -o 'namespace[0-9.]*'); do
    ndctl disable-namespace $dev > /dev/null 2>&1
    ndctl check-namespace $dev 2>&1 && echo "$dev clean"
    ndctl enable-namespace $dev > /dev/null 2>&1
done
"""

FAILED_MEMORY = """\
poisoned
raw MediaError bad media
raw beside b'\\x00'
poisoned
sector MediaError bad media
again MediaError sector 5 of the arena is in error
beside b'\\x00'
write 4096
healed b'x'
written b'y'
validate []
"""


class Turns:
    """An image with a namespace of each sector size, and what their sectors hold."""

    def __init__(self, directory: Path) -> None:
        self.image, self.acks = directory / "sectors.img", directory / "acks.img"
        for path, size in ((self.image, 96 * MIB + LABEL_SIZE), (self.acks, 16 * MIB)):
            with path.open("wb") as file:
                file.truncate(size)
        with open_images(machine_of([self.image], label_size=LABEL_SIZE, slot=0)) as images:
            init_labels(images, 0, version=(1, 2))
            for size in SECTOR_SIZES:
                create(images, None, Wish(mode="sector", size=32 * MIB, sector_size=size))
        count = Load(0, 512).count
        self.held = {size: [bytes(size)] * count for size in SECTOR_SIZES}

    def place(self, number: int) -> str:
        return f"{self.image}:namespace0.{number}"

    def loads(self, seed: int, **options) -> list[Load]:
        """What is written in one turn; the words of all threads are nought again."""
        with self.acks.open("r+b") as file:
            file.write(bytes(16 * PAGE))
        return [Load(seed, size, **options) for size in SECTOR_SIZES]

    def acknowledged(self, loads: list[Load], step: int) -> list[list[int]]:
        """How many steps of each thread were acknowledged, a list a load."""
        data = self.acks.read_bytes()[: 16 * PAGE]
        words, found = iter(range(0, len(data), step)), []
        for load in loads:
            at = [next(words) for _ in range(load.threads)]
            found.append([int.from_bytes(data[each : each + WORD], "little") for each in at])
        return found

    def settle(
        self, loads: list[Load], acknowledged: list[list[int]], data: dict[int, bytes]
    ) -> None:
        """Judges what was found after a kill, and takes it for what is held now."""
        for load, done in zip(loads, acknowledged, strict=True):
            found = load.sectors_of(data[load.sector_size])
            assert len(found) == load.count
            wrong = load.judge(done, self.held[load.sector_size], found)
            assert not wrong, f"{load}, {done} acknowledged: {wrong}"
            self.held[load.sector_size] = found

    def read(self, *, read_only: bool = False) -> dict[int, bytes]:
        """What all sectors hold, as we see it."""
        found, count = {}, Load(0, 512).count
        for number, size in enumerate(SECTOR_SIZES):
            with open_region(self.place(number), read_only=read_only) as region:
                assert region.validate() == []
                found[size] = region.device().read(0, count * size)
        return found

    def zero_sectors(self) -> int:
        """How many sectors have a zero entry in their map."""
        load = Load(0, 4096)
        with open_region(self.place(0), read_only=True) as region:
            extents = region.device().extents(0, load.count * load.sector_size)
        return sum(each.length // load.sector_size for each in extents if each.kind == "hole")

    def check_here(self) -> None:
        for namespace in observe(machine_of([self.image])).regions[0].namespaces:
            with open_images(machine_of([self.image])) as images:
                report = check_btt(
                    images.medium(0),
                    namespace.offset,
                    namespace.size,
                    parent_uuid=namespace.uuid,
                    version="2.0",
                )
            assert report.findings == [], namespace.dev


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, "the writer ended"
        time.sleep(0.01)


def write_and_be_killed(turns: Turns, loads: list[Load], wait_seconds: float) -> None:
    words = [str(word) for number, load in enumerate(loads) for word in (load, turns.place(number))]
    process = subprocess.Popen([sys.executable, str(LOAD), "engine", str(turns.acks), *words])
    try:
        wait_for(lambda: min(map(min, turns.acknowledged(loads, WORD))) >= STEPS_LEAST, process)
        time.sleep(wait_seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


class PowerFailure:
    """Says so some time after every thread in the guest has written."""

    def __init__(self, turns: Turns, loads: list[Load], wait_seconds: float) -> None:
        self.turns, self.loads, self.wait_seconds = turns, loads, wait_seconds
        self.since: float | None = None

    def __call__(self) -> bool:
        if self.since is None and all(map(all, self.turns.acknowledged(self.loads, PAGE))):
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() > self.since + self.wait_seconds


def guest_steps(loads: list[Load], kernel_loads: list[Load]) -> dict[str, str]:
    steps = {"names": NAMES}
    for load in loads:
        size, whole = load.sector_size, load.sector_size * load.count
        steps[f"read {size}"] = READ.format(size=size, bytes=size, count=load.count)
        steps[f"read {size} at once"] = READ.format(size=size, bytes=whole, count=1)
    words = " ".join(f"'{load}' /dev/sectors{load.sector_size}" for load in kernel_loads)
    return {
        **steps,
        "check": CHECK,
        "poisoned": "python3 /in/poisoned.py",
        "write": f"python3 /in/sector_load.py kernel /dev/acks {words}",
    }


@pytest.mark.timeout(BUDGET_SECONDS)
def test_killed_in_turns_and_no_sector_is_torn(guest: Guest, python_layers, scale, tmp_path):
    """Each round: our writer is killed, Linux reads and checks; then Linux writes, its power fails,
    and we read and check. What we zeroed Linux reads in one request with what we wrote, too. And
    where memory fails under an image (``poisoned.py``), requests fail and nobody dies."""
    choose = random.Random("turns")
    turns = Turns(tmp_path)
    dimms = [Dimm(turns.image, label_size_bytes=LABEL_SIZE), Dimm(turns.acks)]
    zeroed: list[int] = []
    for number in range(scale(2, 20)):
        loads = turns.loads(2 * number, zeroes=True)
        write_and_be_killed(turns, loads, choose.uniform(0, 0.8))
        acknowledged = turns.acknowledged(loads, WORD)
        mine = turns.read(read_only=True)
        zeroed.append(turns.zero_sectors())
        assert zeroed[-1] < loads[0].count
        kernel_loads = turns.loads(2 * number + 1)
        result = guest.run(
            dimms,
            guest_steps(loads, kernel_loads),
            timeout_seconds=240,
            python=True,
            cpus=2,
            files={each.name: each.read_bytes() for each in (LOAD, POISONED)},
            power_fails=PowerFailure(turns, kernel_loads, choose.uniform(0, 2)),
        )
        assert result.running == "write"
        result["names"].check()
        for size, data in mine.items():
            assert result[f"read {size}"].check().stdout == data, size
            assert result[f"read {size} at once"].check().stdout == data, size
        turns.settle(loads, acknowledged, mine)
        said = result["check"].check().text
        assert said.count(" clean") == len(SECTOR_SIZES), said
        assert result["poisoned"].check().text == FAILED_MEMORY
        turns.settle(kernel_loads, turns.acknowledged(kernel_loads, PAGE), turns.read())
        turns.check_here()
    assert any(zeroed), zeroed


def test_the_judge_sees_what_is_torn_stale_or_lost():
    load = Load(5, 512, threads=1, sectors=24)
    before = [bytes(512)] * load.count
    found, done = list(before), 40
    steps = list(itertools.islice(load.steps(0), done + 1))
    for step in steps[:-1]:
        for lba in range(step.first, step.first + step.count):
            found[lba] = load.content(lba, step)
    assert load.judge([done], before, found) == []
    last = steps[-1]
    found[last.first] = load.content(last.first, last)
    assert load.judge([done], before, found) == [], "under way"
    stale = next(step for step in steps if last.first in step)
    new, old = load.content(last.first, last), load.content(last.first, stale)
    for bad in (new[:256] + old[256:], old, bytes(512), load.content(last.first + 1, last)):
        found[last.first] = bad
        assert len(load.judge([done], before, found)) == 1
