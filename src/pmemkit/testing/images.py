"""Changes of images, judged at every power failure that their medium could suffer.

A change runs on images over :class:`pmemkit._native.media.Recording`. Then a reader looks at every
image that a power failure could leave at every store (or a seeded sample), and must find what was
there before the change or what is there after it: the same namespaces with the same content.

What this does not do: I/O of a user of the namespace (:mod:`pmemkit.testing.crash`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from pmemkit._native import media
from pmemkit.bus.image import ImageBus, ImageNamespace, observe_with
from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.namespace.images import Images

__all__ = ["CrashError", "Judged", "Seen", "SeenNamespace", "check_change", "look", "observe_bytes"]

_STORES = ("store", "store_nt", "punch")


class CrashError(AssertionError):
    """A power failure could have left what nobody asked for."""


@dataclass(frozen=True)
class SeenNamespace:
    """A namespace as a reader finds it. Bytes."""

    dev: str
    uuid: UUID
    name: str
    offset: int
    size: int
    mode: str
    enabled: bool
    data_size: int | None
    damaged: bool
    """True when an info block is there and cannot be used."""
    content: int
    """A checksum of all of its bytes."""


@dataclass(frozen=True)
class Seen:
    """What a reader finds on an image."""

    version: tuple[int, int] | None
    """Of the index blocks; ``None``: label-less."""
    namespaces: tuple[SeenNamespace, ...]
    damage: tuple[str, ...]
    """What is wrong with labels. A single index block may be: that is what a change tears."""

    @property
    def labels(self) -> tuple[SeenNamespace, ...]:
        """The namespaces that labels name."""
        return self.namespaces if self.version is not None else ()


@dataclass(frozen=True)
class Judged:
    """What :func:`check_change` found."""

    image: bytes
    """After the change."""
    before: Seen
    after: Seen
    crashed: bytes
    """One of the images that a power failure could leave, chosen by the seed."""
    images: int
    """Different images that were looked at."""


def observe_bytes(machine: Machine, *images: bytes) -> ImageBus:
    """What is on images that lie in memory."""

    def reader(image: bytes) -> Callable[[int, int], bytes]:
        return lambda offset, length: image[offset : offset + length]

    return observe_with(machine, [(reader(image), len(image)) for image in images])


def look(spec: DimmSpec, image: bytes) -> Seen:
    """What a reader finds on the image of one dimm."""
    # Regions and namespaces refer to each other: what they read from must not live on with them.
    shelf = [image]
    bus = observe_with(
        Machine.of([spec]), [(lambda at, length: shelf[0][at : at + length], len(image))]
    )
    (region,) = bus.regions
    area = region.dimms[0].span.area
    damage = () if region.scan is None else region.scan.damage
    if area is not None and area.current is not None:
        labels = [fault for fault in area.faults if fault.structure.startswith("namespace label")]
        damage += tuple(map(str, labels))
    namespaces = tuple(_seen(each, image) for each in region.namespaces)
    shelf.clear()
    return Seen(region.span.version if region.labelled else None, namespaces, damage)


def _seen(namespace: ImageNamespace, image: bytes) -> SeenNamespace:
    claim = namespace.claim
    start = namespace.region.dimms[0].spec.dpa + namespace.offset
    return SeenNamespace(
        namespace.dev,
        namespace.uuid,
        namespace.name,
        namespace.offset,
        namespace.size,
        claim.mode,
        claim.enabled,
        claim.size,
        # A block of another parent is what an earlier namespace left.
        any(fault.field != "parent_uuid" for fault in claim.faults),
        zlib.crc32(memoryview(image)[start : start + namespace.size]),
    )


def check_change(
    spec: DimmSpec,
    initial: bytes,
    change: Callable[[Images], object],
    *,
    granularity: str = "cacheline",
    between: Callable[[Seen, Seen], bool] = lambda before, seen: False,
    limit: int = 24,
    torn_pages: bool = False,
    seed: int = 0,
) -> Judged:
    """Carries a change out on an image of one dimm and judges every power failure in it.

    ``between`` allows more than what was there before and what is there after: it gets what was
    there before and what a reader finds. Raises :class:`CrashError`, which names the seed, and
    whatever the change raises.
    """
    recording = media.Recording(len(initial), granularity=granularity, initial=initial)
    opened = {0: recording.medium()}
    try:
        change(Images(Machine.of([spec]), opened))
    finally:
        opened.clear()
    count = recording.event_count()
    final = recording.visible_image(count)
    before, after = look(spec, initial), look(spec, final)
    choose, crashed = random.Random(seed), initial
    known: set[int] = set()
    for event, (kind, _, _) in enumerate(recording.events()):
        if kind not in _STORES:
            continue
        images = recording.crash_images(
            event + 1, limit=limit, seed=seed + event, torn_pages=torn_pages
        )
        for image in images:
            if hash(image) in known:
                continue
            known.add(hash(image))
            if choose.randrange(len(known)) == 0:
                crashed = image
            seen = look(spec, image)
            if seen not in (before, after) and not between(before, seen):
                raise CrashError(
                    f"{granularity} medium, seed {seed}, after {event + 1} events (the last one: "
                    f"{kind}) a reader finds {seen}, neither {before} nor {after}"
                )
    if look(spec, recording.durable_image(count)) != after:
        raise CrashError(f"{granularity} medium: the change returned before it was durable")
    return Judged(final, before, after, crashed, len(known))
