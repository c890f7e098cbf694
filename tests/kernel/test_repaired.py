"""What check-namespace repaired, a real kernel accepts and reads as it was."""

import random

import pytest
from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.formats import btt
from pmemkit.namespace.check_btt import check_btt
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels

MIB = 1 << 20
LABEL_SIZE = 128 << 10

WRITE = """
for name in $(cd /dev; ls pmem*s); do
    size=$(blockdev --getsize64 /dev/$name)
    for at in 0 1 2 3 0 1 7 9; do
        head -c 65536 /dev/urandom > /tmp/noise
        dd if=/tmp/noise of=/dev/$name bs=65536 seek=$at conv=fsync 2> /dev/null
    done
    sync
    echo "$name $(sha256sum < /dev/$name | cut -d ' ' -f 1)"
done
"""
READ = """
for name in $(cd /dev; ls pmem*s); do
    echo "$name $(sha256sum < /dev/$name | cut -d ' ' -f 1)"
done
"""
CHECK = """
for dev in $(ndctl list -N | grep -o 'namespace[0-9.]*'); do
    ndctl disable-namespace $dev > /dev/null 2>&1
    ndctl check-namespace $dev 2>&1 && echo "$dev clean" || echo "$dev damaged"
done
"""


class Namespace:
    """The bytes of one namespace on the medium of its image, for damaging it."""

    def __init__(self, medium, found):
        self.medium, self.base, self.size = medium, found.offset, found.size
        self.uuid, self.info = found.uuid, found.claim.info
        self.start = 0 if self.info.major == 2 else 4096
        self.version = "2.0" if self.info.major == 2 else "1.1"

    def at(self, offset):
        return self.base + self.start + offset

    def groups(self):
        size = btt.LANES * btt.LOG_GROUP_SIZE
        return btt.log_groups(self.medium.read(self.at(self.info.logoff), size))

    def write_group(self, lane, entries):
        raw = b"".join(entry.pack() for entry in entries)
        self.medium.write(self.at(self.info.logoff) + lane * btt.LOG_GROUP_SIZE, raw)

    def check(self, **options):
        return check_btt(
            self.medium,
            self.base,
            self.size,
            parent_uuid=self.uuid,
            version=self.version,
            **options,
        )


def lose_info(namespace):
    namespace.medium.zero(namespace.at(0), 4096)


def lose_copy(namespace):
    namespace.medium.zero(namespace.at(namespace.info.info2off), 4096)


def scribble_on_lanes(namespace):
    noise = random.Random(1).randbytes(3 * btt.LOG_GROUP_SIZE)
    namespace.medium.write(namespace.at(namespace.info.logoff), noise)


def undo_a_map_entry(namespace):
    """As if power had failed between log and map: the newest write of a lane is taken back."""
    for lane, group in enumerate(namespace.groups()):
        found = btt.lane_of(lane, group, (0, 1))
        assert isinstance(found, btt.Lane)
        at = namespace.at(namespace.info.mapoff) + 4 * found.entry.lba
        entry = int.from_bytes(namespace.medium.read(at, 4), "little")
        if not found.finished and entry & btt.MAP_MASK == found.entry.new_map & btt.MAP_MASK:
            old = found.free_block | btt.NORMAL
            namespace.medium.write(at, old.to_bytes(4, "little"))
            return
    raise AssertionError("no lane wrote")


def old_log_layout(namespace):
    """The layout of kernels before 4.15: the second entry at place 2."""
    for lane, (first, second, _, pad) in enumerate(namespace.groups()):
        namespace.write_group(lane, (first, pad, second, pad))


def nothing(_namespace):
    pass


DAMAGES = {
    "nothing": (nothing, {}),
    "info": (lose_info, {}),
    "copy": (lose_copy, {}),
    "lanes": (scribble_on_lanes, {}),
    "write": (undo_a_map_entry, {}),
    "old layout": (old_log_layout, {"rewrite_log": True}),
    "rewritten": (nothing, {"rewrite_log": True}),
}


@pytest.mark.parametrize("version", [(1, 2), (1, 1)], ids=["v1.2", "v1.1"])
def test_the_kernel_reads_what_was_repaired(guest: Guest, blank, version):
    path = blank("sector.img", 512 * MIB + LABEL_SIZE)
    with open_images(machine_of([path], label_size=LABEL_SIZE, slot=0)) as images:
        init_labels(images, 0, version=version)
        for number, name in enumerate(DAMAGES):
            sector_size = (4096, 512)[number % 2]
            create(
                images, None, Wish(mode="sector", size=32 * MIB, name=name, sector_size=sector_size)
            )
    dimm = Dimm(path, label_size_bytes=LABEL_SIZE)
    before = guest.run([dimm], {"write": WRITE}, timeout_seconds=180)["write"].check().text
    assert len(before.splitlines()) == len(DAMAGES)
    every = observe(machine_of([path])).regions[0].namespaces
    with open_images(machine_of([path])) as images:
        for found in every:
            namespace = Namespace(images.medium(0), found)
            damage, options = DAMAGES[found.name]
            damage(namespace)
            report = namespace.check(repair=True, **options)
            assert report.clean, (found.name, report.findings)
            assert bool(report.findings) == (damage not in (nothing, old_log_layout)), found.name
            assert namespace.check().findings == []
    result = guest.run([dimm], {"read": READ, "check": CHECK}, timeout_seconds=180)
    assert result["read"].check().text == before
    said = result["check"].text
    clean = [line for line in said.splitlines() if line.endswith(" clean")]
    assert len(clean) == len(DAMAGES), said


def test_ndctl_and_we_agree_on_damage(guest: Guest, blank):
    """What ndctl's own test does: a scribbled map is a bitmap error for both; neither repairs."""
    path = blank("sector.img", 256 * MIB + LABEL_SIZE)
    with open_images(machine_of([path], label_size=LABEL_SIZE, slot=0)) as images:
        init_labels(images, 0, version=(1, 2))
        for name in ("scribbled", "good"):
            create(images, None, Wish(mode="sector", size=32 * MIB, name=name))
    dimm = Dimm(path, label_size_bytes=LABEL_SIZE)
    guest.run([dimm], {"write": WRITE})["write"].check()
    every = observe(machine_of([path])).regions[0].namespaces
    with open_images(machine_of([path])) as images:
        scribbled, good = (Namespace(images.medium(0), found) for found in every)
        noise = random.Random(1).randbytes(4096)
        scribbled.medium.write(scribbled.at(scribbled.info.mapoff), noise)
        content = scribbled.medium.read(scribbled.base, scribbled.size)
        report = scribbled.check(repair=True)
        assert not report.clean
        assert not report.repairable
        assert scribbled.medium.read(scribbled.base, scribbled.size) == content
        assert good.check().findings == []
    said = guest.run([dimm], {"check": CHECK})["check"].text
    assert "bitmap error" in said or "map entry that is out of bounds" in said
    assert "namespace0.0 damaged" in said
    assert "namespace0.1 clean" in said
