"""An image that was levelled while it was written is any image: Linux reads what was written, in
arenas of the size that Linux makes and in smaller ones, and finds nothing to repair."""

import hashlib
import random

from tools.guest import Dimm, Guest

from pmemkit.bus import machine_of, observe
from pmemkit.namespace.check_btt import check_btt
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.storage.region import open_region

MIB = 1 << 20
LABEL_SIZE = 128 << 10
PERIOD = 4
HOT = 20

READ = """
for each in $(cd /dev; ls pmem*s); do
    echo "$each $(md5sum < /dev/$each | cut -d ' ' -f 1)"
done
"""
CHECK = """
for dev in $(ndctl list -N -m sector | grep -o 'namespace[0-9.]*'); do
    ndctl disable-namespace $dev > /dev/null 2>&1
    ndctl check-namespace $dev 2>&1 && echo "$dev clean"
    ndctl enable-namespace $dev > /dev/null 2>&1
done
"""


def write_hot(place, victim, writes):
    """Fills all of a namespace, holes among it, and then writes some sectors very often."""
    choose = random.Random(place)
    options = {"levelling": victim, "levelling_period": PERIOD}
    with open_region(place, **options) as region, region.device() as device:
        size = device.channel().block_size_min
        for offset in range(0, device.size, MIB):
            device.write(offset, choose.randbytes(min(MIB, device.size - offset)))
        device.zero(4 * MIB, MIB)
        for _ in range(writes):
            device.write(choose.randrange(HOT) * size, choose.randbytes(size))
        assert region.relocations > writes // PERIOD // 2
        assert region.validate() == []
        whole = hashlib.md5(usedforsecurity=False)
        for offset in range(0, device.size, MIB):
            whole.update(device.read(offset, min(MIB, device.size - offset)))
        return whole.hexdigest()


def test_linux_reads_a_levelled_image(guest: Guest, tmp_path):
    image = tmp_path / "levelled.img"
    with image.open("wb") as file:
        file.truncate(80 * MIB + LABEL_SIZE)
    wishes = [
        Wish(mode="sector", size=16 * MIB, sector_size=4096),
        Wish(mode="sector", size=16 * MIB, sector_size=512),
        Wish(mode="sector", size=32 * MIB, sector_size=4096, arena_size=16 * MIB),
    ]
    with open_images(machine_of([image], label_size=LABEL_SIZE, slot=0)) as images:
        init_labels(images, 0, version=(1, 2))
        for wish in wishes:
            create(images, None, wish)
    victims = ("least-worn", "random", "least-worn")
    held = [
        write_hot(f"{image}:namespace0.{number}", victim, 12_000)
        for number, victim in enumerate(victims)
    ]
    for namespace in observe(machine_of([image])).regions[0].namespaces:
        with open_images(machine_of([image])) as images:
            where = (namespace.offset, namespace.size)
            report = check_btt(images.medium(0), *where, parent_uuid=namespace.uuid, version="2.0")
        assert report.findings == [], namespace.dev
    result = guest.run([Dimm(image, label_size_bytes=LABEL_SIZE)], {"read": READ, "check": CHECK})
    found = result["read"].check().text.split()
    assert sorted(found[1::2]) == sorted(held)
    said = result["check"].check().text
    assert said.count(" clean") == len(wishes), said
