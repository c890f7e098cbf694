#!/usr/bin/env python3
"""Fuzzes whatever reads label areas, BTT metadata and PFN and DAX info blocks.

    fuzz/formats_fuzz.py --target labels|btt|infoblock --seconds 20 [--seed N]

An input is a small program: which valid image to begin with, and what to change in it, by fields of
the format's table or anywhere; half of them with the checksums made right again, so that the rules
behind the checksums are reached. With atheris installed it is coverage-guided; otherwise programs
are mixed at random from a printed seed.

A finding is any exception but those of the package, a changing verb that stores anything before it
refuses, or one that changes a damaged image or a namespace that it was not asked to change.

What this does not do: damage the data of a namespace, which no rule is about.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from uuid import UUID

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from pmemkit.bus import bus_record, listing  # noqa: E402
from pmemkit.bus.image import ImageBus, ImageNamespace, find_label_size  # noqa: E402
from pmemkit.bus.machine import DimmSpec, Machine  # noqa: E402
from pmemkit.errors import PmemError  # noqa: E402
from pmemkit.formats import btt  # noqa: E402
from pmemkit.formats.btt import BttInfo  # noqa: E402
from pmemkit.formats.infoblock import DaxInfo, PfnInfo  # noqa: E402
from pmemkit.formats.labels import (  # noqa: E402
    LABELS,
    IndexHeader,
    apply,
    initialise,
    sizing,
)
from pmemkit.formats.layout import Field, Layout  # noqa: E402
from pmemkit.namespace import advice  # noqa: E402
from pmemkit.namespace.create import Wish, create, destroy, reconfigure  # noqa: E402
from pmemkit.namespace.images import Images  # noqa: E402
from pmemkit.namespace.infoblock_verbs import find_infoblock, infoblock_record  # noqa: E402
from pmemkit.namespace.label_verbs import (  # noqa: E402
    check_labels,
    init_labels,
    labels_listing,
    recookie,
)
from pmemkit.storage.btt_reader import BttReader  # noqa: E402
from pmemkit.testing import Recording  # noqa: E402
from pmemkit.testing.images import Seen, look, observe_bytes  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
TARGETS = ("labels", "btt", "infoblock")
STEP = 6
"""Bytes of one change: what, two places of two bytes, a value."""
STEPS_MOST = 16
INTERESTING = (
    0, 1, 2, 3, 4, 8, 63, 64, 72, 255, 256, 511, 512, 520, 4095, 4096, 8192, 65535, 65536,
    1 << 20, 1 << 21, 1 << 24, 1 << 30, 1 << 31, (1 << 32) - 1, 1 << 39, 1 << 62, 1 << 63,
    (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a structure lies in a base image."""

    layout: type[Layout]
    offset: int
    size: int
    """Bytes that its checksum covers."""


@dataclass(frozen=True)
class Base:
    """A valid image and what may be changed in it."""

    spec: DimmSpec
    image: bytes
    places: tuple[Place, ...]

    @property
    def rows(self) -> tuple[tuple[Place, Field], ...]:
        """Every field of every structure."""
        return tuple((place, row) for place in self.places for row in place.layout.fields())


def _spec(label_size: int) -> DimmSpec:
    return DimmSpec(path="image", label_size=label_size, slot=0, handle=1)


def _carried_out(spec: DimmSpec, image: bytes, change: Callable[[Images], object]) -> bytes:
    recording = Recording(len(image), initial=image)
    opened = {0: recording.medium()}
    change(Images(Machine.of([spec]), opened))
    opened.clear()
    return recording.visible_image(recording.event_count())


def _blank(version: tuple[int, int], region_size: int, label_size: int) -> bytes:
    data = random.Random(1).randbytes(64) * (region_size // 64)
    return data + apply(bytes(label_size), initialise(bytes(label_size), *version))


def _label_base(version: tuple[int, int], label_size: int) -> Base:
    spec, image = _spec(label_size), _blank(version, 64 * KIB, label_size)
    division = sizing(label_size, LABELS[version].SIZE)
    for number in range(min(3, division.slot_count - 1)):
        wish = Wish(mode="raw", size=8 * KIB, name=f"n{number}", uuid=UUID(int=number + 1))
        image = _carried_out(spec, image, lambda images, w=wish: create(images, None, w))
    image = _carried_out(spec, image, lambda images: destroy(images, "n0"))
    start = len(image) - label_size
    places = [
        Place(IndexHeader, start + n * division.index_size, division.index_size) for n in (0, 1)
    ]
    places += [
        Place(LABELS[version], start + division.slot_offset(slot), LABELS[version].SIZE)
        for slot in range(min(division.slot_count, 6))
    ]
    return Base(spec, image, tuple(places))


def _mode_base(mode: str, version: tuple[int, int] | None) -> Base:
    spec = _spec(0 if version is None else 4 * KIB)
    size = MIB if mode == "sector" else 4 * MIB
    image = bytes(size) if version is None else _blank(version, size, 4 * KIB)
    wish = Wish(mode=mode, uuid=UUID(int=9), sector_size=512)
    image = _carried_out(spec, image, lambda images: create(images, None, wish))
    layouts: dict[str, type[Layout]] = {"sector": BttInfo, "fsdax": PfnInfo, "devdax": DaxInfo}
    at = 0 if mode == "sector" and version == (1, 2) else 4096
    places = [Place(layouts[mode], at, 4096)]
    if mode == "sector":
        info = BttInfo.unpack(image[at:])
        places += [Place(BttInfo, at + info.info2off, 4096)]
        places += [Place(btt.LogEntry, at + info.logoff + 64 * lane, 16) for lane in range(4)]
        places += [Place(btt.LogEntry, at + info.mapoff, 16)]
    return Base(spec, image, tuple(places))


def _small() -> None:
    """Namespaces with info blocks from 1 MiB on: a hundred times as many inputs a second."""
    advice.SIZE_MIN = MIB  # type: ignore[misc]
    btt.ARENA_SIZE_MIN = MIB // 2  # type: ignore[misc]


@cache
def bases(target: str) -> tuple[Base, ...]:
    """The images that programs of a target begin with."""
    _small()
    versions: tuple[tuple[int, int] | None, ...] = (None, (1, 1), (1, 2))
    match target:
        case "labels":
            return tuple(_label_base(v, s) for v in LABELS for s in (KIB, 2 * KIB, 4 * KIB))
        case "btt":
            return tuple(_mode_base("sector", version) for version in versions)
        case _:
            return tuple(_mode_base(m, v) for m in ("fsdax", "devdax") for v in versions)


def build(target: str, program: bytes) -> tuple[DimmSpec, bytes, bool]:
    """The image that a program makes, its dimm, and whether changing verbs are tried on it too."""
    head = program[:2].ljust(2, b"\0")
    base = bases(target)[head[0] % len(bases(target))]
    image, rows = bytearray(base.image), base.rows
    steps = [program[at : at + STEP] for at in range(2, len(program) - STEP + 1, STEP)]
    for step in steps[:STEPS_MOST]:
        op, value = step[0] % 5, INTERESTING[step[5] % len(INTERESTING)]
        first, second = int.from_bytes(step[1:3], "little"), int.from_bytes(step[3:5], "little")
        place, row = rows[first % len(rows)]
        at = place.offset + row.offset
        match op:
            case 0 | 1:
                raw = value & ((1 << 8 * row.width) - 1)
                image[at : at + row.width] = raw.to_bytes(row.width, "little")
            case 2:
                image[at + second % row.width] ^= 1 << step[5] % 8
            case 3:
                image[place.offset + second % place.size] = step[5]
            case _:
                other = base.places[second % len(base.places)]
                size = min(place.size, other.size)
                image[other.offset : other.offset + size] = image[place.offset :][:size]
    if head[1] & 1:
        for place in base.places:
            block = bytes(image[place.offset : place.offset + place.size])
            image[place.offset : place.offset + place.size] = place.layout.seal(block)
    return base.spec, bytes(image), not head[1] & 6


# --- what must hold ------------------------------------------------------------------------------


def check(target: str, program: bytes) -> str:
    """One input: what it came to, or an exception that is a finding."""
    spec, image, with_verbs = build(target, program)
    bus = _observe(spec, image)
    if not with_verbs:
        return "looked"
    before = look(spec, image)
    damaged = bool(_label_damage(bus))
    outcomes = [_try(spec, image, before, damaged, *each) for each in _changes(bus)]
    return "damaged" if damaged else "changed" if any(outcomes) else "refused"


def _observe(spec: DimmSpec, image: bytes) -> ImageBus:
    """Everything that only looks. What it refuses, it refuses as the package does."""
    bus = observe_bytes(Machine.of([spec]), image)
    listing([bus_record(bus, idle=True)], dimms=True, regions=True, namespaces=True)
    advice.notes(bus)
    for dimm in bus.dimms:
        checked = check_labels(dimm)
        assert checked.used + checked.free >= 0
    find_label_size(lambda at, length: image[at : at + length], len(image))
    with contextlib.suppress(PmemError):
        labels_listing(bus.dimms)
    with contextlib.suppress(PmemError):
        infoblock_record(find_infoblock(image[:8192])[1])
    for region in bus.regions:
        gaps = region.free()
        assert all(0 <= at < at + length <= region.size for at, length in gaps)
        for each in region.namespaces:
            claim = each.claim
            assert 0 <= each.offset < each.offset + each.size <= region.size
            assert claim.size is None or 0 < claim.offset + claim.size <= each.size or claim.faults
            if claim.mode == "sector":
                _read_sectors(each)
    return bus


def _read_sectors(namespace: ImageNamespace) -> None:
    """Opens the arenas and reads where maps and logs are changed."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= namespace.size, "a read outside of the namespace"
        return namespace.region.read(namespace.offset + offset, length)

    try:
        reader = BttReader(
            read, namespace.size, version=namespace.claim.version, parent_uuid=namespace.uuid
        )
    except PmemError as refusal:
        assert refusal.message
        return
    assert reader.size == namespace.claim.size
    for lba in (0, 1, 2, 3, reader.sector_count - 1):
        with contextlib.suppress(PmemError):
            assert len(reader.read_sector(lba)) == reader.sector_size


def _label_damage(bus: ImageBus) -> list[str]:
    """What stops every change: labels whose space is not known."""
    try:
        for region in bus.regions:
            advice.require_sound(region, "fuzz")
    except PmemError as refusal:
        return [str(refusal)]
    return []


def _changes(bus: ImageBus) -> Iterator[tuple[str, Callable[[Images], object], UUID | None, bool]]:
    """``(verb, change, the one namespace that it may change, whether that one is damaged)``."""
    for mode in ("raw", "sector", "fsdax"):
        size = 4096 if mode == "raw" and bus.dimms[0].spec.label_size else None
        wish = Wish(mode=mode, size=size, sector_size=512)
        whole = bus.regions[0].namespaces[0] if not bus.regions[0].labelled else None
        faulty = whole is not None and bool(whole.claim.faults)
        yield (
            "create", lambda images, w=wish: create(images, "region0", w),
            whole.uuid if whole is not None else None, faulty,
        )  # fmt: skip
    for each in bus.regions[0].namespaces:
        stale = each.found is not None and all(
            fault.field == "parent_uuid" for fault in each.claim.faults
        )
        faulty = bool(each.claim.faults) and not stale
        yield "destroy", lambda images, n=each.dev: destroy(images, n), each.uuid, faulty
        yield "reconfigure", lambda images, n=each.dev: _to_raw(images, n), each.uuid, faulty
    yield "recookie", lambda images: recookie(images, 0), None, False
    yield "init-labels", lambda images: init_labels(images, 0), None, False


def _to_raw(images: Images, name: str) -> None:
    reconfigure(images, name, Wish(mode="raw"))


def _try(
    spec: DimmSpec, image: bytes, before: Seen, damaged: bool, verb: str,
    change: Callable[[Images], object], uuid: UUID | None, faulty: bool,
) -> bool:  # fmt: skip
    """True when the verb was carried out."""
    recording = Recording(len(image), initial=image)
    opened = {0: recording.medium()}
    try:
        change(Images(Machine.of([spec]), opened))
    except PmemError as refusal:
        assert refusal.message
        assert not recording.event_count(), f"{verb} stored something and then refused: {refusal}"
        return False
    finally:
        opened.clear()
    if not recording.event_count():
        return False
    assert not damaged, f"{verb} changed an image with damaged labels"
    assert not faulty, f"{verb} changed a namespace with a damaged info block"
    if verb == "init-labels":
        return True
    after = look(spec, recording.visible_image(recording.event_count()))
    now = {each.uuid: replace(each, dev="") for each in after.namespaces}
    for each in before.namespaces:
        if each.uuid != uuid:
            assert now[each.uuid] == replace(each, dev=""), f"{verb} changed {each}"
    return True


# --- programs ------------------------------------------------------------------------------------


def make_input(rng: random.Random) -> bytes:
    """A program: mostly few changes, half of them sealed, a quarter with changing verbs."""
    steps = rng.choice([0, 1, 1, 1, 2, 2, 3, 5, STEPS_MOST])
    return rng.randbytes(2 + STEP * steps)


def run_random(target: str, seconds: float, seed: int) -> dict[str, int]:
    """Fuzzes until time is up; gives how often each outcome came up."""
    outcomes: dict[str, int] = {}
    stop_at = time.monotonic() + seconds
    number = 0
    while time.monotonic() < stop_at:
        program = make_input(random.Random(f"{seed}/{number}"))
        try:
            outcome = check(target, program)
        except BaseException:
            print(f"finding: {target} seed {seed} input {number}: {program.hex()}", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        number += 1
    return outcomes


def run_atheris(target: str, seconds: float, seed: int) -> None:
    """Coverage-guided, where atheris is installed. It ends the process itself."""
    import atheris

    atheris.instrument_all()
    corpus = str(Path(__file__).parent / "corpus" / f"formats_{target}")
    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", f"-seed={seed}", corpus]
    atheris.Setup(arguments, lambda data: check(target, data))
    atheris.Fuzz()


def main() -> int:
    """Runs for the time asked for."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of on-media formats.")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    if importlib.util.find_spec("atheris"):
        run_atheris(options.target, options.seconds, seed)
        return 0
    print(f"no atheris here: random programs from seed {seed}", flush=True)
    for path in sorted((Path(__file__).parent / "corpus" / f"formats_{options.target}").iterdir()):
        check(options.target, path.read_bytes())
    outcomes = run_random(options.target, options.seconds, seed)
    print(f"{sum(outcomes.values())} inputs: {outcomes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
