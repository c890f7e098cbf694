"""Steps on images, carried out and taken back: byte for byte, at every crash, and when somebody
wrote in between."""

import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_images import add, put_on, read_from
from policy_images import digest_of_images as digest

from pmemkit._native import media
from pmemkit.bus.image import machine_of
from pmemkit.bus.machine import DimmSpec, Machine
from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, PmemError
from pmemkit.formats.layout import Clear
from pmemkit.namespace.create import Wish, create
from pmemkit.namespace.images import Images, open_images
from pmemkit.namespace.label_verbs import init_labels
from pmemkit.policy import image_actions, image_changes
from pmemkit.policy.image_actions import ImageActions
from pmemkit.policy.image_changes import Changes, Rehearsal
from pmemkit.policy.model import Entry, Step
from pmemkit.storage.region import create_file

MIB = 1 << 20
SIZE = 128 * MIB
LABELS = 128 << 10


def make_image(path: Path, *, label_size: int = LABELS, labelled: bool = True) -> Path:
    """An image of 128 MiB behind a machine file of one dimm."""
    create_file(path.with_suffix(".img"), SIZE + label_size)
    path.write_text(f'[[dimm]]\npath = "{path.stem}.img"\nlabel_size = {label_size}\n')
    if labelled:
        with open_images(machine_of([path])) as images:
            init_labels(images, 0, version=(1, 2))
    return path


@pytest.fixture
def machine(tmp_path):
    """A labelled image without a namespace."""
    return make_image(tmp_path / "vm.toml")


@pytest.fixture
def bare(tmp_path):
    """An image without a label area."""
    return make_image(tmp_path / "vm.toml", label_size=0, labelled=False)


def step(verb, target="region0", *, number=1, destroys=(), **params) -> Step:
    return Step(
        number=number,
        verb=verb,
        target=target,
        region="region0",
        why="",
        params=params,
        destroys=destroys,
    )


def carried_out(actions, the_step, made=None) -> Entry:
    """Performs a step and gives its entry, as the journal would have it."""
    kept: dict[str, object] = {}
    result = actions.perform(the_step, kept.update, made or {})
    return Entry(step=the_step, state="done", kept=kept, made=result)


def the_namespaces(machine: Path) -> list[tuple[object, ...]]:
    (region,) = ImageActions([machine]).observe().regions
    return [(n.dev, n.mode, n.size, n.uuid, n.name, n.map, n.align) for n in region.namespaces]


def ext4_bytes(need, tmp_path: Path, size: int) -> bytes:
    """A real ext4 with a file in it."""
    need("mkfs.ext4")
    path = tmp_path / "ext4.img"
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "file").write_bytes(random.Random(7).randbytes(300_000))
    create_file(path, size)
    words = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-d", payload, "-L", "precious", path]
    subprocess.run(words, check=True, capture_output=True)
    return path.read_bytes()


# --- looking --------------------------------------------------------------------------------------


def test_an_image_is_described_for_the_planner(machine) -> None:
    add(machine, mode="sector", size=32 * MIB, name="log")
    add(machine, mode="devdax", size=32 * MIB)
    state = ImageActions([machine]).observe()
    assert (state.bus, state.name) == ("image", str(machine))
    assert "mkfs" not in state.verbs
    (region,) = state.regions
    assert (region.size, region.labelled, region.label_room) == (SIZE, True, True)
    assert (region.available, region.largest, region.align) == (64 * MIB, 64 * MIB, 16 * MIB)
    assert (region.nature, region.wears, region.fixed) == ("storage", False, None)
    sector, devdax = region.namespaces
    assert (sector.mode, sector.size, sector.name) == ("sector", 32 * MIB, "log")
    assert sector.sector_size == 4096
    assert sector.capacity < sector.size
    assert sector.blockdev == "pmem0s"
    assert devdax.dax is not None
    assert (devdax.dax.dev, devdax.dax.mode, devdax.blockdev) == ("dax0.1", "devdax", None)
    assert region.dimms[0].serial == 0x123456


def test_what_the_owner_declares_counts(tmp_path) -> None:
    machine = make_image(tmp_path / "vm.toml")
    with machine.open("a") as file:
        file.write('nature = "storage"\nendurance = "20P"\nnuma_node = 3\n')
    (region,) = ImageActions([machine]).observe().regions
    assert (region.wears, region.endurance) == (True, 20 << 50)
    assert (region.node, region.target_node) == (3, 3)


def test_contents_and_damage_are_seen(machine, need, tmp_path) -> None:
    dev = add(machine, mode="sector", size=64 * MIB)
    put_on(machine, dev, ext4_bytes(need, tmp_path, 32 * MIB))
    add(machine, mode="fsdax", size=32 * MIB)
    with machine.with_suffix(".img").open("r+b") as image:
        image.seek(64 * MIB + 4096 + 100)
        image.write(b"x")
    (region,) = ImageActions([machine]).observe().regions
    sector, fsdax = region.namespaces
    assert sector.content is not None
    assert (sector.content.kind, sector.content.name) == ("filesystem", "ext4")
    assert sector.content.label == "precious"
    assert fsdax.damaged is not None
    assert "checksum" in fsdax.damaged


def test_who_serves_an_image_holds_it(machine) -> None:
    first, second = (add(machine, mode="raw", size=32 * MIB) for _ in range(2))
    script = (
        "import sys, pmemkit\n"
        f"region = pmemkit.open({f'{machine}:{first}'!r})\n"
        "print(flush=True)\nsys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (region,) = ImageActions([machine]).observe().regions
        held = {each.dev: each.holders for each in region.namespaces}
        with pytest.raises(Busy, match=str(other.pid)):
            carried_out(ImageActions([machine]), step("destroy-namespace", first))
        other.communicate()
    assert held[second] == ()
    (holder,) = held[first]
    assert str(other.pid) in holder
    (region,) = ImageActions([machine]).observe().regions
    assert region.namespaces[0].holders == ()


@pytest.mark.parametrize("verb", ["mkfs", "mount", "online-memory", "create-cxl-region"])
def test_what_needs_a_kernel_is_refused(machine, verb) -> None:
    with pytest.raises(NotSupported, match="running machine"):
        carried_out(ImageActions([machine]), step(verb))


# --- forth and back -------------------------------------------------------------------------------

CREATES = [
    {"mode": "raw", "size": 32 * MIB, "name": "plain"},
    {"mode": "sector", "size": 32 * MIB, "sector_size": 512},
    {"mode": "fsdax", "size": 32 * MIB, "map": "mem", "align": 2 * MIB},
    {"mode": "devdax", "size": 32 * MIB, "map": "dev"},
]


@pytest.mark.parametrize("params", CREATES, ids=lambda each: each["mode"])
def test_create_and_back(machine, params) -> None:
    with machine.with_suffix(".img").open("r+b") as image:
        image.write(random.Random(1).randbytes(3 * MIB))
    before = digest(machine)
    actions = ImageActions([machine])
    entry = carried_out(actions, step("create-namespace", **params))
    (made,) = actions.observe().regions[0].namespaces
    assert (made.mode, made.size, made.uuid) == (params["mode"], params["size"], entry.made["uuid"])
    assert "gone" in actions.reverse(entry)
    assert digest(machine) == before
    assert actions.reverse(entry) == "nothing is left of it"


@pytest.mark.parametrize("mode", ["raw", "sector", "fsdax", "devdax"])
def test_destroy_and_back(machine, mode) -> None:
    dev = add(machine, mode=mode, size=64 * MIB, name="mine")
    before, seen = digest(machine), the_namespaces(machine)
    actions = ImageActions([machine])
    uuid = seen[0][3]
    entry = carried_out(actions, step("destroy-namespace", dev, uuid=uuid, destroys=("all",)))
    assert the_namespaces(machine) == []
    assert "with what was in it" in actions.reverse(entry)
    assert digest(machine) == before
    assert the_namespaces(machine) == seen


MODES = ["raw", "sector", "fsdax", "devdax"]
PAIRS = [pair for pair in itertools.product(MODES, MODES) if pair[0] != pair[1]]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_reconfigure_and_back_with_contents(machine, before, after, need, tmp_path) -> None:
    """A real file system on the namespace comes back byte for byte."""
    dev = add(machine, mode=before, size=96 * MIB, name="mine")
    contents = ext4_bytes(need, tmp_path, 64 * MIB)
    if before == "devdax":
        contents = random.Random(5).randbytes(8 * MIB)
    put_on(machine, dev, contents)
    was, seen = digest(machine), the_namespaces(machine)
    actions = ImageActions([machine])
    uuid = seen[0][3]
    entry = carried_out(actions, step("reconfigure-namespace", dev, uuid=uuid, mode=after))
    assert [each[1] for each in the_namespaces(machine)] == [after]
    actions.reverse(entry)
    assert the_namespaces(machine) == seen
    assert digest(machine) == was
    assert read_from(machine, dev, len(contents)) == contents


@pytest.mark.parametrize("mode", ["raw", "sector", "fsdax"])
def test_what_lay_there_before_is_not_found_in_a_new_namespace(machine, mode, need, tmp_path):
    """A kernel that boots with it would mount the old files. Undo puts them back."""
    dev = add(machine, mode=mode, size=96 * MIB, name="old")
    put_on(machine, dev, ext4_bytes(need, tmp_path, 64 * MIB))
    was, seen = digest(machine), the_namespaces(machine)
    actions = ImageActions([machine])
    destroyed = carried_out(actions, step("destroy-namespace", dev, uuid=seen[0][3]))
    made = carried_out(actions, step("create-namespace", mode=mode, size=96 * MIB, name="new"))
    (region,) = actions.observe().regions
    assert [(each.name, each.content) for each in region.namespaces] == [("new", None)]
    actions.reverse(made)
    actions.reverse(destroyed)
    assert the_namespaces(machine) == seen
    assert digest(machine) == was


@pytest.mark.parametrize(("before", "after"), [("sector", "fsdax"), ("raw", "sector")])
def test_written_since(machine, before, after, need, tmp_path) -> None:
    """Refused; forced, the state comes back."""
    dev = add(machine, mode=before, size=96 * MIB, name="mine")
    put_on(machine, dev, ext4_bytes(need, tmp_path, 64 * MIB))
    seen = the_namespaces(machine)
    actions = ImageActions([machine])
    entry = carried_out(actions, step("reconfigure-namespace", dev, uuid=seen[0][3], mode=after))
    put_on(machine, dev, random.Random(3).randbytes(MIB))
    written = digest(machine)
    with pytest.raises(Corrupt, match=r"namespace0\.0.*since.*--force"):
        actions.reverse(entry)
    assert digest(machine) == written
    assert "without its contents" in actions.reverse(entry, force=True)
    assert the_namespaces(machine) == seen
    actions.reverse(entry, force=True)
    assert the_namespaces(machine) == seen


def test_a_namespace_that_was_written_to_is_not_undone_away(machine) -> None:
    actions = ImageActions([machine])
    entry = carried_out(actions, step("create-namespace", mode="raw", size=32 * MIB))
    put_on(machine, "namespace0.0", b"important")
    with pytest.raises(Corrupt, match="written"):
        actions.reverse(entry)
    actions.reverse(entry, force=True)
    assert the_namespaces(machine) == []


def test_labels_that_others_changed_since_are_kept(machine) -> None:
    """The bytes that the step wrote to still stand there; they count no more."""
    add(machine, mode="raw", size=16 * MIB, name="old")
    actions = ImageActions([machine])
    entry = carried_out(actions, step("create-namespace", mode="fsdax", size=32 * MIB, name="new"))
    add(machine, mode="raw", size=16 * MIB, name="theirs")
    with pytest.raises(Corrupt, match="labels"):
        actions.reverse(entry)
    actions.reverse(entry, force=True)
    assert {each[4] for each in the_namespaces(machine)} == {"old", "theirs"}


def test_destroyed_and_its_place_taken_by_others(machine) -> None:
    dev = add(machine, mode="sector", size=64 * MIB, name="mine")
    seen = the_namespaces(machine)
    actions = ImageActions([machine])
    entry = carried_out(actions, step("destroy-namespace", dev, uuid=seen[0][3]))
    add(machine, mode="raw", size=SIZE, name="theirs")
    with pytest.raises(PmemError, match="free"):
        actions.reverse(entry, force=True)
    assert [each[4] for each in the_namespaces(machine)] == ["theirs"]
    carried_out(actions, step("destroy-namespace", "namespace0.0"))
    assert "without its contents" in actions.reverse(entry, force=True)
    assert [each[1:5] for each in the_namespaces(machine)] == [each[1:5] for each in seen]


def test_labels_for_an_image_that_has_none_yet(tmp_path, need) -> None:
    machine = make_image(tmp_path / "vm.toml", labelled=False)
    data = ext4_bytes(need, tmp_path, 64 * MIB)
    put_on(machine, "namespace0.0", data)
    before = digest(machine)
    actions = ImageActions([machine])
    assert actions.observe().regions[0].namespaces[0].content is not None
    labels = carried_out(actions, step("init-labels", destroys=("ext4",)))
    assert actions.observe().regions[0].labelled
    made = carried_out(actions, step("create-namespace", number=2, mode="sector", size=64 * MIB))
    actions.reverse(made)
    assert actions.reverse(labels) == "region0 is label-less again"
    assert digest(machine) == before
    again = carried_out(actions, step("init-labels", destroys=("ext4",)))
    add(machine, mode="raw", size=16 * MIB)
    with pytest.raises(Busy, match=r"namespace0\.0"):
        actions.reverse(again, force=True)


def test_a_label_less_image(bare, need, tmp_path) -> None:
    """Its one namespace becomes fsdax, and raw with its file system again."""
    data = ext4_bytes(need, tmp_path, 64 * MIB)
    put_on(bare, "namespace0.0", data)
    before = digest(bare)
    actions = ImageActions([bare])
    to_fsdax = step("reconfigure-namespace", "namespace0.0", mode="fsdax", destroys=("ext4",))
    entry = carried_out(actions, to_fsdax)
    assert actions.observe().regions[0].namespaces[0].mode == "fsdax"
    actions.reverse(entry)
    assert digest(bare) == before
    entry = carried_out(actions, to_fsdax)
    put_on(bare, "namespace0.0", b"new")
    actions.reverse(entry, force=True)
    assert actions.observe().regions[0].namespaces[0].mode == "raw"


def test_targets_of_earlier_steps(machine) -> None:
    actions = ImageActions([machine])
    first = carried_out(actions, step("create-namespace", mode="raw", size=32 * MIB))
    second = step("reconfigure-namespace", "@1", number=2, mode="devdax")
    carried_out(actions, second, {1: first.made})
    assert [each[1] for each in the_namespaces(machine)] == ["devdax"]


def test_what_is_there_already_changes_nothing(machine) -> None:
    actions = ImageActions([machine])
    wish = {"mode": "sector", "size": 32 * MIB, "name": "mine"}
    first = carried_out(actions, step("create-namespace", **wish))
    before = digest(machine)
    for again in (
        step("create-namespace", **wish),
        step("init-labels"),
        step("reconfigure-namespace", "namespace0.0", mode="sector", sector_size=4096),
        step("destroy-namespace", "namespace0.7", uuid="6830f039-7914-423e-bad6-22bda8fde8d6"),
    ):
        entry = carried_out(actions, again)
        assert entry.kept == {}
        assert actions.reverse(entry) == "nothing had been changed"
    assert carried_out(actions, step("create-namespace", **wish)).made == first.made
    assert digest(machine) == before


def test_another_image_under_the_same_name(machine) -> None:
    actions = ImageActions([machine])
    entry = carried_out(actions, step("create-namespace", mode="raw", size=32 * MIB))
    os.truncate(machine.with_suffix(".img"), SIZE * 2 + LABELS)
    with pytest.raises(Corrupt, match="bytes"):
        actions.reverse(entry, force=True)


def test_more_than_is_kept(machine, monkeypatch, need, tmp_path) -> None:
    """What must be cleared and is too much: forced only. What need not be is left where it is."""
    monkeypatch.setattr(image_changes, "KEEP_SIZE", 0)
    dev = add(machine, mode="raw", size=96 * MIB, name="mine")
    put_on(machine, dev, random.Random(2).randbytes(96 * MIB))
    seen, data = the_namespaces(machine), read_from(machine, dev, MIB)
    actions = ImageActions([machine])
    entry = carried_out(actions, step("reconfigure-namespace", dev, mode="fsdax"))
    with pytest.raises(Corrupt, match="more than the journal keeps"):
        actions.reverse(entry)
    actions.reverse(entry, force=True)
    assert the_namespaces(machine) == seen
    assert read_from(machine, dev, MIB)[8192:] == data[8192:]


# --- crashes --------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here."""


def crash_after(monkeypatch, count: int, torn: bool, choose: random.Random) -> None:
    """Lets ``count`` writes through; of the one that follows, a part if ``torn``."""
    left = [count]
    whole = Images.carry_out

    def counted(self, dimm, groups, *, base=0, **more):
        if isinstance(self, Rehearsal):
            return whole(self, dimm, groups, base=base, **more)
        for group in groups:
            for each in choose.sample(list(group), len(group)):
                if left[0] == 0:
                    if torn and not isinstance(each, Clear) and len(each[1]) > 8:
                        cut = choose.randrange(8, len(each[1]), 8)
                        whole(self, dimm, [[(each[0], each[1][:cut])]], base=base)
                    raise Crash
                left[0] -= 1
                whole(self, dimm, [[each]], base=base)
        return None

    monkeypatch.setattr(Images, "carry_out", counted)


STEPS = {
    "create": ("raw", step("create-namespace", mode="sector", size=16 * MIB)),
    "destroy": ("sector", step("destroy-namespace", "namespace0.0")),
    "to sector": ("fsdax", step("reconfigure-namespace", "namespace0.0", mode="sector")),
    "to devdax": ("sector", step("reconfigure-namespace", "namespace0.0", mode="devdax")),
    "to raw": ("sector", step("reconfigure-namespace", "namespace0.0", mode="raw")),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_anywhere_is_taken_back(machine, name, torn, monkeypatch) -> None:
    """Forth to every write, and from there back with a crash at every write of the way back."""
    mode, the_step = STEPS[name]
    dev = add(machine, mode=mode, size=64 * MIB, name="mine")
    put_on(machine, dev, random.Random(4).randbytes(2 * MIB))
    before, actions = digest(machine), ImageActions([machine])
    choose = random.Random(name)
    crashes = 0
    for count in itertools.count():
        kept: dict[str, object] = {}
        with monkeypatch.context() as patch:
            crash_after(patch, count, torn, choose)
            try:
                actions.perform(the_step, kept.update, {})
                died = False
            except Crash:
                died = True
        entry = Entry(step=the_step, state="started", kept=kept)
        with monkeypatch.context() as patch:
            crash_after(patch, choose.randrange(3), torn, choose)
            try:
                actions.reverse(entry)
            except Crash:
                crashes += 1
        actions.reverse(entry)
        assert digest(machine) == before, count
        if not died:
            break
    assert count > 3
    assert crashes > 1


GROUPS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.data())
def test_every_mixture_of_writes_is_taken_back(groups, data) -> None:
    """Groups that overlap as they like, on a medium that is cut off in any of them."""
    size = 80 * 4096
    initial = random.Random(1).randbytes(size // 2) + bytes(size // 2)
    recording = media.Recording(size, initial=initial)
    opened = {0: recording.medium()}
    machine = Machine.of([DimmSpec(path="image")])
    images = Images(machine, opened)
    paper = Rehearsal(images, 0)
    choose = random.Random(data.draw(st.integers(0, 1000)))
    for group in groups:
        writes, taken = [], []
        for start, length, clears in group:
            offset, count = start * 4096, length * 64
            if any(offset < e and offset + count > s for s, e in taken):
                continue
            taken.append((offset, offset + count))
            blank = Clear(offset, count)
            writes.append(blank if clears else (offset, choose.randbytes(count)))
        paper.carry_out(0, [writes])
    changes = Changes.of_plain(paper.changes.plain())
    place = data.draw(st.integers(0, len(changes.groups)))
    for number, group in enumerate(changes.groups[:place]):
        for each in group if number < place - 1 else group[: choose.randint(0, len(group))]:
            after = bytes(each.length) if each.after is None else each.after
            images.carry_out(0, [[(each.offset, after)]])
    found = changes.place(images)
    assert found is not None
    changes.take_back(images, found)
    assert opened[0].read(0, size) == initial
    opened.clear()


def test_the_way_back_survives_power_failures(monkeypatch) -> None:
    """On a recording medium: whatever a crash on the way back leaves, going back again ends at the
    start."""
    from pmemkit.formats import btt
    from pmemkit.namespace import advice

    monkeypatch.setattr(advice, "SIZE_MIN", MIB)
    monkeypatch.setattr(btt, "ARENA_SIZE_MIN", MIB // 2)
    spec = DimmSpec(path="image", label_size=4096, slot=0, handle=1)
    machine = Machine.of([spec])
    size = 2 * MIB + 4096
    blank = media.Recording(size, initial=random.Random(1).randbytes(2 * MIB) + bytes(4096))
    opened = {0: blank.medium()}
    images = Images(machine, opened)
    init_labels(images, 0, version=(1, 2))
    create(images, None, Wish(mode="raw", name="mine", size=2 * MIB))
    start = opened[0].read(0, size)
    paper = Rehearsal(images, 0)
    dev = images.bus().namespace("mine").dev
    image_actions.reconfigure(paper, dev, Wish(mode="sector"))
    changes = paper.changes
    changes.carry_out(images)
    final = opened[0].read(0, size)
    opened.clear()
    back = media.Recording(size, initial=final)
    opened = {0: back.medium()}
    changes.take_back(Images(machine, opened), len(changes.groups))
    assert opened[0].read(0, size) == start
    opened.clear()
    looked = 0
    for event in range(1, back.event_count() + 1, 3):
        for crashed in back.crash_images(event, limit=4, seed=event):
            again = media.Recording(size, initial=crashed)
            opened = {0: again.medium()}
            images = Images(machine, opened)
            place = changes.place(images)
            assert place is not None, event
            changes.take_back(images, place)
            assert opened[0].read(0, size) == start
            looked += 1
            opened.clear()
    assert looked > 20


def test_damage_of_what_was_kept(machine) -> None:
    actions = ImageActions([machine])
    entry = carried_out(actions, step("create-namespace", mode="raw", size=32 * MIB))
    broken = replace(entry, kept={**entry.kept, "changes": {"dimm": 0, "groups": [[[1]]]}})
    with pytest.raises(Corrupt, match="kept"):
        actions.reverse(broken)
    with pytest.raises(InvalidArgument, match=r"namespace0\.4"):
        carried_out(actions, step("reconfigure-namespace", "namespace0.4", mode="raw"))
