"""Creating and destroying by chance, against a model that keeps a list of extents."""

from dataclasses import dataclass
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from small_images import KIB, MIB, VERSIONS, labelled, spec_of

from pmemkit._native import media
from pmemkit.bus.machine import Machine
from pmemkit.errors import InvalidArgument, NoSpace
from pmemkit.formats import btt
from pmemkit.formats.labels import read_area
from pmemkit.namespace import advice
from pmemkit.namespace.create import MODES, Wish, create, destroy, reconfigure
from pmemkit.namespace.images import Images
from pmemkit.testing.images import Seen, look

REGION = 10 * MIB
UNIT = 4 * KIB
PAGED = 2 * MIB


@dataclass
class Expected:
    """What the model knows of a namespace. Bytes."""

    name: str
    offset: int
    size: int
    mode: str


class Namespaces(RuleBasedStateMachine):
    """One labelled region. Everything that is refused must be refused by the model's reasons."""

    @initialize(
        version=st.sampled_from(VERSIONS), label_size=st.sampled_from([KIB, 2 * KIB, 4 * KIB])
    )
    def begin(self, version: tuple[int, int], label_size: int) -> None:
        self.spec = spec_of(label_size)
        image = labelled(version, REGION, label_size)
        self.medium = media.map_anonymous(len(image))
        self.medium.write(0, image)
        self.images = Images(Machine.of([self.spec]), {0: self.medium})
        self.version = version
        self.slots = read_area(image[-label_size:]).sizing.slot_count
        self.model: dict[UUID, Expected] = {}

    def gaps(self) -> list[tuple[int, int]]:
        found, behind = [], 0
        taken = sorted((each.offset, each.size) for each in self.model.values())
        for offset, size in [*taken, (REGION, 0)]:
            if offset > behind:
                found.append((behind, offset - behind))
            behind = offset + size
        return found

    def largest(self) -> int:
        return max((length for _, length in self.gaps()), default=0)

    @rule(
        mode=st.sampled_from(MODES),
        size=st.none() | st.integers(0, 12).map(lambda n: n * PAGED // 4) | st.integers(1, 64).map(
            lambda n: n * UNIT
        ) | st.integers(1, 100_000),
        name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    )  # fmt: skip
    def create(self, mode: str, size: int | None, name: str) -> None:
        unit = PAGED if mode in ("fsdax", "devdax") else UNIT
        asked = self.largest() // unit * unit if size is None else size
        wish = Wish(mode=mode, size=size, name=name, force=True)
        if len(self.model) == self.slots:
            with pytest.raises((NoSpace, InvalidArgument)):
                create(self.images, None, wish)
            return
        if asked <= 0 or asked % unit or asked > self.largest():
            with pytest.raises((NoSpace, InvalidArgument)):
                create(self.images, None, wish)
            return
        offset = next(start for start, length in self.gaps() if length >= asked)
        # A page map needs 2 MiB, and data behind it; a BTT needs an arena.
        too_small = asked < PAGED and mode != "raw"
        if too_small or (unit == PAGED and (asked < 2 * PAGED or offset % PAGED)):
            with pytest.raises(InvalidArgument):
                create(self.images, None, wish)
            return
        made = create(self.images, "region0", wish)
        assert (made.offset, made.size, made.name) == (offset, asked, name)
        assert made.uuid not in self.model
        self.model[made.uuid] = Expected(name, offset, asked, mode)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), by_uuid=st.booleans())
    def destroy(self, data: st.DataObject, by_uuid: bool) -> None:
        uuid = data.draw(st.sampled_from(sorted(self.model, key=str)))
        here = next(each for each in self.images.bus().regions[0].namespaces if each.uuid == uuid)
        gone = destroy(self.images, str(uuid) if by_uuid else here.dev)
        assert gone.uuid == uuid
        del self.model[uuid]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), mode=st.sampled_from(MODES))
    def reconfigure(self, data: st.DataObject, mode: str) -> None:
        uuid = data.draw(st.sampled_from(sorted(self.model, key=str)))
        old = self.model[uuid]
        wish = Wish(mode=mode, force=True)
        paged = mode in ("fsdax", "devdax")
        legal = mode == "raw" or (
            (old.size >= 2 * PAGED and old.offset % PAGED == 0 and old.size % PAGED == 0)
            if paged
            else old.size >= PAGED
        )
        if len(self.model) == self.slots:
            with pytest.raises((NoSpace, InvalidArgument)):
                reconfigure(self.images, str(uuid), wish)
        elif legal:
            made = reconfigure(self.images, str(uuid), wish)
            del self.model[uuid]
            self.model[made.uuid] = Expected(old.name, old.offset, old.size, mode)
        elif not paged or old.offset % PAGED or old.size < 2 * PAGED:
            with pytest.raises(InvalidArgument):
                reconfigure(self.images, str(uuid), wish)

    def seen(self) -> Seen:
        return look(self.spec, self.medium.read(0, len(self.medium)))

    @invariant()
    def a_reader_finds_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        seen = self.seen()
        assert not seen.damage
        assert seen.version == self.version
        found = {
            each.uuid: Expected(each.name, each.offset, each.size, each.mode)
            for each in seen.namespaces
        }
        assert found == self.model
        assert all(each.enabled and not each.damaged for each in seen.namespaces)
        region = self.images.bus().regions[0]
        assert region.free() == self.gaps()
        area = region.dimms[0].span.area
        assert area is not None
        assert area.current is not None
        assert area.current.free_count == self.slots - len(self.model)
        assert area.faults == ()


def test_random_creation_and_destruction_agree_with_the_model(
    monkeypatch: pytest.MonkeyPatch, scale
) -> None:
    """pmem/ndctl#91: no slot, extent or name is lost, however often namespaces come and go."""
    monkeypatch.setattr(advice, "SIZE_MIN", PAGED)
    monkeypatch.setattr(btt, "ARENA_SIZE_MIN", PAGED - 4 * KIB)
    run_state_machine_as_test(
        Namespaces,
        settings=settings(
            max_examples=scale(15, 120),
            stateful_step_count=scale(20, 40),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
