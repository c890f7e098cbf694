"""Small images of one dimm, so that thousands of power failures can be looked at."""

import random
from functools import cache
from uuid import UUID

from pmemkit.bus.machine import DimmSpec
from pmemkit.formats.labels import apply, initialise, read_area
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import Images
from pmemkit.testing.images import check_change

KIB, MIB = 1 << 10, 1 << 20
VERSIONS = [(1, 1), (1, 2)]
MEDIA = [("byte", False), ("cacheline", False), ("page", False), ("page", True)]
"""Granularity, and whether a page may be torn."""


def spec_of(label_size: int = 4 * KIB, **more: object) -> DimmSpec:
    return DimmSpec(path="image", label_size=label_size, slot=0, handle=1, **more)


def uuid_of(number: int) -> UUID:
    return UUID(int=0x1234 << 96 | number)


@cache
def dirty(region_size: int, label_size: int = 4 * KIB, seed: int = 1) -> bytes:
    """An image whose region holds old data and whose label area is blank."""
    return random.Random(seed).randbytes(region_size) + bytes(label_size)


@cache
def labelled(
    version: tuple[int, int], region_size: int = 64 * KIB, label_size: int = 4 * KIB
) -> bytes:
    """The same with a label area that holds no labels yet."""
    area = apply(bytes(label_size), initialise(bytes(label_size), *version))
    return dirty(region_size, label_size)[:region_size] + area


@cache
def with_namespaces(version: tuple[int, int], label_size: int = 4 * KIB) -> bytes:
    """An image with three raw namespaces of 8 KiB, a gap behind the first one, and a history."""
    image, spec = labelled(version, label_size=label_size), spec_of(label_size)
    for number in range(3):
        wish = Wish(mode="raw", size=8 * KIB, name=f"n{number}", uuid=uuid_of(number))
        image = changed(image, spec, wish)
    return image


def changed(image: bytes, spec: DimmSpec, wish: Wish) -> bytes:
    return check_change(spec, image, lambda images: create(images, None, wish), limit=1).image


def labels_in(image: bytes, spec: DimmSpec) -> list[UUID]:
    return [label.uuid for label in read_area(image[-spec.label_size :]).labels]


def area_bytes(images: Images) -> bytes:
    return images.label_area(0)[1]
