"""Runs in the guest: memory under an image fails, and what was reading it goes on.

``madvise(MADV_HWPOISON)`` makes the kernel treat pages of a file in tmpfs as failed memory: whoever
touches them gets the SIGBUS of a machine check. Prints a line a step, for the test to compare.

What this does not do: judge.
"""

import ctypes
import mmap
import os
from pathlib import Path

from pmemkit.bus import machine_of, observe
from pmemkit.errors import PmemError
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import open_images
from pmemkit.storage.region import open_region

IMAGE = "/dev/shm/image"
SIZE = 17 << 20
PAGE = 4096
MADV_HWPOISON = 100
WRITES = 600
"""More than there are lanes."""


def poison(offset):
    fd = os.open(IMAGE, os.O_RDWR)
    mapped = mmap.mmap(fd, SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + offset
    assert mapped[offset] is not None, "the page has to be there"
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), PAGE, MADV_HWPOISON)
    print("poisoned" if not failed else os.strerror(ctypes.get_errno()))


def outcome(what, call):
    try:
        print(what, call())
    except PmemError as error:
        print(what, type(error).__name__, error.message.rpartition(": ")[2])


def main():
    Path(IMAGE).write_bytes(bytes(SIZE))
    with open_region(IMAGE) as region:
        device = region.device()
        poison(8 * PAGE)
        outcome("raw", lambda: device.read(8 * PAGE, 1))
        outcome("raw beside", lambda: device.read(9 * PAGE, 1))
    Path(IMAGE).unlink()
    Path(IMAGE).write_bytes(bytes(SIZE))
    with open_images(machine_of([IMAGE])) as images:
        create(images, None, Wish(mode="sector"))
    here = observe(machine_of([IMAGE])).namespace("namespace0.0")
    data = here.offset + 4096 + here.claim.info.dataoff
    with open_region(f"{IMAGE}:namespace0.0") as region:
        device = region.device()
        # Sectors that were never written lie in the blocks of their own numbers.
        poison(data + 5 * PAGE)
        outcome("sector", lambda: device.read(5 * PAGE, 1))
        outcome("again", lambda: device.read(5 * PAGE, 1))
        outcome("beside", lambda: device.read(6 * PAGE, 1))
        outcome("write", lambda: device.write(5 * PAGE, b"x" * PAGE))
        outcome("healed", lambda: device.read(5 * PAGE, 1))
        for step in range(WRITES):
            device.write((step % 64) * PAGE, b"y" * PAGE)
        outcome("written", lambda: device.read(5 * PAGE, 1))
        outcome("validate", region.validate)


main()
