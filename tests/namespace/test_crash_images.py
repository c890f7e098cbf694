"""Every change of labels and namespaces under every power failure: the old set or the new one."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from small_images import (
    KIB,
    MEDIA,
    MIB,
    VERSIONS,
    dirty,
    labelled,
    spec_of,
    uuid_of,
    with_namespaces,
)

from pmemkit.bus.machine import DimmSpec
from pmemkit.errors import PmemError
from pmemkit.formats import btt
from pmemkit.formats import labels as formats
from pmemkit.namespace import advice
from pmemkit.namespace import create as verbs
from pmemkit.namespace.create import MODES, Wish, create, destroy, reconfigure
from pmemkit.namespace.images import Images
from pmemkit.namespace.label_verbs import init_labels, recookie, write_labels, zero_labels
from pmemkit.testing.images import CrashError, Judged, Seen, SeenNamespace, check_change, look

SPEC = spec_of()
LATE = spec_of(address=(4 << 30) - 16 * KIB)
"""Its byte 16384 lies at a multiple of 2 MiB, where a page map may begin."""
PAIRS = list(itertools.product(VERSIONS, VERSIONS))
medium = pytest.mark.parametrize(("granularity", "torn_pages"), MEDIA)
version = pytest.mark.parametrize("version", VERSIONS)


def none(before: Seen, seen: Seen) -> bool:
    """No labels at all, and nothing that looks like damage."""
    return not seen.labels and not seen.damage


def raw_meanwhile(name: str) -> Callable[[Seen, Seen], bool]:
    """As before, but the namespace of this name is raw; of the same size and at the same place."""

    def allowed(before: Seen, seen: Seen) -> bool:
        def rest(each: Seen) -> list[object]:
            return [space for space in each.namespaces if space.name != name]

        def place(each: Seen) -> list[object]:
            return [(s.offset, s.size, s.dev) for s in each.namespaces if s.name == name]

        now = [space for space in seen.namespaces if space.name == name]
        return (
            (seen.version, rest(seen), place(seen)) == (before.version, rest(before), place(before))
            and not seen.damage
            and all((space.mode, space.damaged) == ("raw", False) for space in now)
        )

    return allowed


def named(seen: Seen, name: str) -> SeenNamespace:
    """The namespace of this name."""
    return next(each for each in seen.namespaces if each.name == name)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Namespaces with info blocks from 1 MiB on, so that images stay small."""
    monkeypatch.setattr(advice, "SIZE_MIN", MIB)
    monkeypatch.setattr(btt, "ARENA_SIZE_MIN", MIB // 2)


# --- labels --------------------------------------------------------------------------------------


@medium
@version
@pytest.mark.parametrize("label_size", [KIB, 4 * KIB, 256 * KIB])
def test_init_of_a_blank_area(granularity, torn_pages, version, label_size, scale) -> None:
    judged = check_change(
        spec_of(label_size),
        dirty(16 * KIB, label_size),
        lambda images: init_labels(images, 0, version=version),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(8, 100),
    )
    assert judged.before.version is None
    assert judged.after == Seen(version, (), ())
    assert judged.images > 5


@medium
@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("label_size", [2 * KIB, 256 * KIB])
def test_init_of_a_labelled_area(granularity, torn_pages, before, after, label_size, scale) -> None:
    judged = check_change(
        spec_of(label_size),
        with_namespaces(before, label_size),
        lambda images: init_labels(images, 0, version=after, force=True),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(8, 100),
        between=none,
    )
    assert len(judged.before.labels) == 3
    assert judged.after == Seen(after, (), ())


@medium
@version
def test_zeroing_a_labelled_area(granularity, torn_pages, version, scale) -> None:
    judged = check_change(
        SPEC,
        with_namespaces(version),
        lambda images: zero_labels(images, 0),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(8, 100),
        between=none,
    )
    assert judged.after.version is None
    assert judged.image[-SPEC.label_size :] == bytes(SPEC.label_size)


@medium
@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("updates", [0, 1, 2])
def test_putting_a_dump_back(granularity, torn_pages, before, after, updates, scale) -> None:
    """Whichever block of the dump is current: the other one holds an older set of labels."""
    dump = with_namespaces(after)
    for number in range(updates):
        wish = Wish(mode="raw", size=4 * KIB, uuid=uuid_of(100 + number))
        dump = check_change(SPEC, dump, lambda images, w=wish: create(images, None, w)).image
    area = dump[-SPEC.label_size :]
    other = with_namespaces(before)
    gone = check_change(SPEC, other, lambda images: destroy(images, "namespace0.0")).image
    judged = check_change(
        SPEC,
        gone,
        lambda images: write_labels(images, 0, area),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(8, 100),
        between=none,
    )
    assert len(judged.before.labels) == 2
    assert len(judged.after.labels) == 3 + updates
    assert judged.image[-SPEC.label_size :] == area


@medium
@version
def test_adopting_the_labels_of_another_slot(granularity, torn_pages, version, scale) -> None:
    moved = replace(SPEC, slot=3, handle=4)
    judged = check_change(
        moved,
        with_namespaces(version),
        lambda images: recookie(images, 0),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(8, 100),
    )
    assert judged.before.namespaces == ()
    was = look(SPEC, with_namespaces(version))
    assert judged.after == was


# --- namespaces ----------------------------------------------------------------------------------


def wish_of(mode: str, **more: object) -> Wish:
    size = 8 * KIB if mode == "raw" else 4 * MIB
    return Wish(mode=mode, size=size, name="new", uuid=uuid_of(99), **more)


@cache
def roomy(version: tuple[int, int]) -> bytes:
    """An image with room for a namespace with an info block, full of old data."""
    image = labelled(version, 4 * MIB + 32 * KIB)
    wish = Wish(mode="raw", size=16 * KIB, name="end", uuid=uuid_of(1))
    return check_change(SPEC, image, lambda images: create(images, None, wish)).image


@cache
def roomy_with(version: tuple[int, int], mode: str) -> bytes:
    """The same with a namespace of this mode in it, called new."""
    wish = replace(wish_of(mode, force=True), size=4 * MIB)
    start = roomy(version)
    return check_change(LATE, start, lambda images: create(images, None, wish), limit=1).image


def limit_of(mode: str, scale: Callable[[int, int], int]) -> int:
    return scale(16, 200) if mode == "raw" else scale(3, 24)


@pytest.mark.usefixtures("small")
@medium
@version
@pytest.mark.parametrize("mode", MODES)
def test_create(granularity, torn_pages, version, mode, scale) -> None:
    judged = check_change(
        LATE,
        roomy(version),
        lambda images: create(images, None, replace(wish_of(mode), force=True)),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=limit_of(mode, scale),
    )
    new, end = named(judged.after, "new"), named(judged.after, "end")
    assert (new.mode, new.enabled, new.damaged) == (mode, True, False)
    assert [replace(end, dev="namespace0.0")] == list(judged.before.namespaces)


@pytest.mark.usefixtures("small")
@medium
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "raw"])
def test_create_on_a_label_less_image(granularity, torn_pages, mode, scale) -> None:
    wish = Wish(mode=mode, uuid=uuid_of(99))

    def raw(before: Seen, seen: Seen) -> bool:
        (only,) = seen.namespaces
        return (only.mode, only.enabled, only.damaged) == ("raw", True, False)

    spec = spec_of(0)
    for what, start in (("blank", bytes(4 * MIB)), ("old data", dirty(4 * MIB, 0)))[scale(1, 0) :]:
        judged = check_change(
            spec,
            start,
            lambda images: create(images, None, wish),
            granularity=granularity,
            torn_pages=torn_pages,
            limit=scale(3, 24),
            between=raw,
        )
        assert judged.after.namespaces[0].mode == mode, what
    gone = check_change(
        spec,
        judged.image,
        lambda images: destroy(images, "namespace0.0"),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=scale(3, 24),
        between=raw,
    )
    assert gone.after.namespaces[0].mode == "raw"


@pytest.mark.usefixtures("small")
@medium
@version
@pytest.mark.parametrize("mode", MODES)
def test_destroy(granularity, torn_pages, version, mode, scale) -> None:
    judged = check_change(
        LATE,
        roomy_with(version, mode),
        lambda images: destroy(images, "new"),
        granularity=granularity,
        torn_pages=torn_pages,
        limit=limit_of(mode, scale),
    )
    assert len(judged.before.labels) == 2
    assert len(judged.after.labels) == 1


CHANGES_OF_MODE = [(a, b) for a in MODES for b in MODES]


@pytest.mark.usefixtures("small")
@version
@pytest.mark.parametrize(("before", "after"), CHANGES_OF_MODE)
def test_reconfigure(version, before, after, scale) -> None:
    wish = Wish(mode=after, force=True)
    some = [MEDIA[(MODES.index(before) + MODES.index(after)) % len(MEDIA)]]
    for granularity, torn_pages in MEDIA if scale(0, 1) else some:
        judged = check_change(
            LATE,
            roomy_with(version, before),
            lambda images: reconfigure(images, "new", wish),
            granularity=granularity,
            torn_pages=torn_pages,
            limit=scale(2, 24),
            between=raw_meanwhile("new"),
        )
        assert named(judged.after, "new").mode == after
        assert named(judged.after, "new").uuid != uuid_of(99)


@pytest.mark.parametrize("mode", ["sector", "fsdax", "devdax"])
@pytest.mark.soak
def test_create_at_the_real_least_size(mode) -> None:
    for its_version, (granularity, torn_pages) in itertools.product(VERSIONS, MEDIA):
        judged = check_change(
            SPEC,
            labelled(its_version, 32 * MIB),
            lambda images: create(images, None, Wish(mode=mode)),
            granularity=granularity,
            torn_pages=torn_pages,
            limit=3,
        )
        assert judged.after.namespaces[0].mode == mode


# --- sequences -----------------------------------------------------------------------------------


def one_step(choose: random.Random, spec: DimmSpec, image: bytes, **options: object) -> Judged:
    """A change chosen by chance, judged. What is refused leaves the image as it was."""
    here = look(spec, image)
    names = [each.dev for each in here.labels]
    verb = choose.choice(["create", "create", "create", "destroy", "reconfigure", "relabel"])
    between = none
    if verb == "create" or not names:
        wish = Wish(mode="raw", size=choose.randint(1, 4) * 4 * KIB, name=f"n{choose.random()}")
        change = lambda images: create(images, None, wish)  # noqa: E731
        between = lambda before, seen: False  # noqa: E731
    elif verb == "destroy":
        name = choose.choice(names)
        change = lambda images: destroy(images, name)  # noqa: E731
        between = lambda before, seen: False  # noqa: E731
    elif verb == "reconfigure":
        target = choose.choice(here.labels)
        change = lambda images: reconfigure(images, target.dev, Wish(mode="raw"))  # noqa: E731
        between = raw_meanwhile(target.name)
    elif choose.random() < 0.3:
        change = lambda images: init_labels(images, 0, version=(1, 2), force=True)  # noqa: E731
    else:
        area = image[-spec.label_size :]
        change = lambda images: write_labels(images, 0, area)  # noqa: E731
    return check_change(spec, image, change, between=between, **options)


@pytest.mark.parametrize("label_size", [KIB, 2 * KIB, 4 * KIB])
@medium
def test_sequences_that_go_on_after_a_power_failure(label_size, granularity, torn_pages, scale):
    """Every third change is cut off at a random point, and the next one begins there."""
    images = 0
    for seed in range(scale(2, 40)):
        choose = random.Random(f"{label_size} {granularity} {seed}")
        spec = spec_of(label_size)
        image = labelled(choose.choice(VERSIONS), label_size=label_size)
        for step in range(12):
            try:
                judged = one_step(
                    choose, spec, image, granularity=granularity, torn_pages=torn_pages,
                    limit=scale(8, 16), seed=1000 * seed + step,
                )  # fmt: skip
            except PmemError:
                continue
            images += judged.images
            image = judged.crashed if choose.random() < 0.33 else judged.image
            seen = look(spec, image)
            assert not seen.damage
            if seen.version is None:
                image = image[:-label_size] + labelled((1, 2), label_size=label_size)[-label_size:]
    assert images > 200


def prove_change_after_torn_change(count: int = 6) -> None:
    """A torn index block must not be completed by the next change of another kind: its first lines
    and the torn rest could make up the block of the change that never happened."""
    for its_version, (granularity, torn_pages) in itertools.product(VERSIONS, MEDIA):
        for seed in range(count):
            options = {"granularity": granularity, "torn_pages": torn_pages, "seed": seed}
            torn = check_change(
                SPEC, with_namespaces(its_version), lambda images: destroy(images, "n2"), **options
            )
            check_change(SPEC, torn.crashed, lambda images: destroy(images, "n0"), **options)


def test_a_change_after_a_torn_one_does_not_complete_it(scale) -> None:
    prove_change_after_torn_change(scale(4, 100))


# --- planted faults ------------------------------------------------------------------------------


def index_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index block is written before the label that it makes count."""
    update = formats.LabelArea.update
    monkeypatch.setattr(
        formats.LabelArea, "update", lambda *args, **more: update(*args, **more)[::-1]
    )


def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current index block is overwritten, not the other one."""
    update = formats.LabelArea.update

    def planted(self, **more):
        *labels, [(_, block)] = update(self, **more)
        size, number = self.sizing.index_size, self.current.number
        kept = self.current.header.pack()
        return [*labels, [(number * size, formats.IndexHeader.seal(kept + block[72:]))]]

    monkeypatch.setattr(formats.LabelArea, "update", planted)


def without_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is durable before the next write begins."""
    carry_out = Images.carry_out

    def planted(self, dimm, groups, **more):
        carry_out(self, dimm, [[each for group in groups for each in group]], **more)

    monkeypatch.setattr(Images, "carry_out", planted)


def label_before_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace has its label before its info block."""
    content, labels = verbs._write_content, Images.write_labels
    later: list[tuple[object, ...]] = []

    def planted(self, dimm, groups):
        labels(self, dimm, groups)
        while later:
            content(*later.pop())

    monkeypatch.setattr(verbs, "_write_content", lambda *args: later.append(args))
    monkeypatch.setattr(Images, "write_labels", planted)


def content_before_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace that is destroyed loses its info block before its label."""
    forget, labels = verbs._forget, Images.write_labels
    later: list[tuple[object, ...]] = []

    def planted(*args):
        forget(*args)
        labels(*later.pop())

    monkeypatch.setattr(verbs, "_forget", planted)
    monkeypatch.setattr(Images, "write_labels", lambda *args: later.append(args))


def never_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last write is never made durable."""

    def planted(self, dimm, groups, *, base=0, progress=None):
        for group in groups:
            for each in group:
                if isinstance(each, tuple):
                    self.medium(dimm).write(base + each[0], each[1])

    monkeypatch.setattr(Images, "carry_out", planted)


def no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are not freed before the index blocks are made anew."""
    monkeypatch.setattr(formats, "_release", lambda area: [])


def no_scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn index block is written over without being zeroed first, as Linux does."""
    update = formats.LabelArea.update

    def planted(self, **more):
        groups = [[each for each in group if any(each[1])] for group in update(self, **more)]
        return [group for group in groups if group]

    monkeypatch.setattr(formats.LabelArea, "update", planted)


def prove_create() -> None:
    wish = Wish(mode="fsdax", size=4 * MIB, name="new", force=True)
    for its_version, (granularity, torn_pages) in itertools.product(VERSIONS, MEDIA):
        check_change(
            LATE, roomy(its_version), lambda images: create(images, None, wish),
            granularity=granularity, torn_pages=torn_pages, limit=4,
        )  # fmt: skip


def prove_destroy() -> None:
    for granularity, torn_pages in MEDIA:
        check_change(
            LATE, roomy_with((1, 2), "fsdax"), lambda images: destroy(images, "new"),
            granularity=granularity, torn_pages=torn_pages,
        )  # fmt: skip


def prove_init() -> None:
    image = with_namespaces((1, 2))
    for number in range(3):
        wish = Wish(mode="raw", size=4 * KIB, uuid=uuid_of(200 + number))
        for granularity, torn_pages in MEDIA:
            check_change(
                SPEC, image, lambda images: init_labels(images, 0, version=(1, 2), force=True),
                granularity=granularity, torn_pages=torn_pages, between=none,
            )  # fmt: skip
        image = check_change(SPEC, image, lambda images, w=wish: create(images, None, w)).image


def prove_recookie() -> None:
    moved = replace(SPEC, slot=3, handle=4)
    for granularity, torn_pages in MEDIA:
        check_change(
            moved, with_namespaces((1, 2)), lambda images: recookie(images, 0),
            granularity=granularity, torn_pages=torn_pages,
        )  # fmt: skip


def prove_write_labels() -> None:
    area = with_namespaces((1, 2))[-SPEC.label_size :]
    for granularity, torn_pages in MEDIA:
        check_change(
            SPEC, labelled((1, 2)), lambda images: write_labels(images, 0, area),
            granularity=granularity, torn_pages=torn_pages, between=none,
        )  # fmt: skip


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("plant", "prove"),
    [
        (index_first, prove_create),
        (index_first, prove_recookie),
        (in_place, prove_create),
        (without_barriers, prove_create),
        (without_barriers, prove_recookie),
        (without_barriers, prove_write_labels),
        (without_barriers, prove_init),
        (label_before_content, prove_create),
        (content_before_label, prove_destroy),
        (never_durable, prove_recookie),
        (no_release, prove_init),
        (no_scrub, prove_change_after_torn_change),
    ],
    ids=lambda each: each.__name__,
)
def test_planted_faults_are_found(plant, prove, monkeypatch) -> None:
    prove()
    plant(monkeypatch)
    with pytest.raises(CrashError):
        prove()
