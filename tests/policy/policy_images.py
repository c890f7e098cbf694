"""Small machines of images for the tests of policy: namespaces put on them, and what is there."""

import hashlib
import os
from pathlib import Path

import pmemkit
from pmemkit.bus.image import machine_of
from pmemkit.bus.machine import load_machine
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.policy.image_actions import ImageActions

MIB = 1 << 20


def add(machine: Path, region: str = "region0", **wish: object) -> str:
    """A namespace, in a region that gets labels if it has none; its dev."""
    with open_images(machine_of([machine])) as images:
        here = images.bus().region(region)
        if not here.labelled:
            init_labels(images, images.number_of(here), version=(1, 2))
        return create(images, region, Wish(**wish)).dev


def put_on(machine: Path, dev: str, data: bytes) -> None:
    """Writes data to the namespace as a user would."""
    with pmemkit.open(f"{machine}:{dev}") as region, region.device() as device:
        for offset in range(0, len(data), MIB):
            part = data[offset : offset + MIB]
            if part.count(0) != len(part):
                device.write(offset, part.ljust(4096, b"\0"))
        device.flush()


def read_from(machine: Path, dev: str, length: int) -> bytes:
    """What a user of the namespace reads."""
    with pmemkit.open(f"{machine}:{dev}", read_only=True) as region, region.device() as device:
        return b"".join(device.read(at, min(MIB, length - at)) for at in range(0, length, MIB))


def namespaces_of(machine: Path) -> list[tuple[object, ...]]:
    """Region, dev, mode, size, uuid and name of each."""
    return [
        (region.dev, each.dev, each.mode, each.size, each.uuid, each.name)
        for region in ImageActions([machine]).observe().regions
        for each in region.namespaces
    ]


def digest_of_images(machine: Path) -> str:
    """Of all bytes of all images; holes and zeroes are the same."""
    found = hashlib.blake2b()
    for dimm in load_machine(machine).dimms:
        with Path(dimm.path).open("rb") as image:
            fd = image.fileno()
            size, at = os.fstat(fd).st_size, 0
            found.update(size.to_bytes(8, "little"))
            while at < size:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:
                    break
                at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
                for place in range(start, at, 4096):
                    data = os.pread(fd, min(4096, at - place), place)
                    if data.count(0) != len(data):
                        found.update(place.to_bytes(8, "little") + data)
    return found.hexdigest()
