"""DAX devices as system RAM and back: order, bounds, roll-back, and the kernel's own policy."""

import errno
import itertools

import pytest
from fake_kernel import FakeKernel, Session, refused

from pmemkit.errors import Busy, InvalidArgument, NotSupported, SystemFailure


@pytest.fixture
def kernel(tmp_path):
    kernel = FakeKernel(tmp_path)
    kernel.add_dax()
    return kernel


@pytest.fixture
def session(kernel):
    return Session(kernel)


@pytest.fixture
def clock(session):
    return session.clock


# --- to memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("online", "states"),
    [("movable", "Movable"), ("kernel", "Normal"), ("no", "offline")],
)
def test_memory_in_the_zone_that_is_wanted(kernel, session, online, states):
    made = session.do("reconfigure-device", "dax1.0", mode="system-ram", online=online)
    assert made["chardev"] == "dax1.0"
    assert kernel.mode() == "kmem"
    assert kernel.states() == [states] * 3
    assert kernel.ran[0] == "daxctl reconfigure-device --mode system-ram --no-online dax1.0"


@pytest.mark.parametrize("policy", ["online", "online_movable", "online_kernel"])
def test_a_kernel_that_onlines_by_itself_is_stopped_and_started_again(kernel, session, policy):
    kernel.tree.put(kernel.memory / "auto_online_blocks", policy)
    session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    assert kernel.states() == ["Movable"] * 3
    assert kernel.policy() == policy
    names = [each.split("/")[-1] for each in kernel.writes()]
    assert names[0] == "auto_online_blocks offline"
    assert names[-1] == f"auto_online_blocks {policy}"
    assert not (session.runtime / "auto_online_blocks").exists()


POINTS = (
    r"write memory/auto_online_blocks offline",
    r"daxctl reconfigure-device --mode system-ram .*",
    r"write memory32/state online_movable",
    r"write memory33/state online_movable",
    r"write memory34/state online_movable",
)


@pytest.mark.parametrize("point", POINTS)
def test_a_failure_at_any_point_leaves_device_dax_and_the_policy(kernel, session, point):
    kernel.tree.put(kernel.memory / "auto_online_blocks", "online")
    program = point.startswith("daxctl")
    kernel.failing[point] = SystemFailure("no") if program else refused(errno.ENOMEM)
    with pytest.raises(SystemFailure):
        session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    kernel.failing.clear()
    assert kernel.mode() == "device_dax"
    assert kernel.policy() == "online"
    assert "as it was" in session.undo()
    assert kernel.mode() == "device_dax"


def test_whoever_comes_after_a_process_that_died_restores_the_policy(kernel, session):
    kernel.tree.put(kernel.memory / "auto_online_blocks", "online_movable")
    kernel.failing[r"write memory33/state online_movable"] = KeyboardInterrupt()
    kernel.failing[r"write memory/auto_online_blocks online_movable"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    assert kernel.policy() == "offline"
    assert kernel.states() == ["Movable", "offline", "offline"]
    kernel.failing.clear()
    assert "device DAX again" in session.undo()
    assert kernel.policy() == "online_movable"
    assert kernel.mode() == "device_dax"
    assert session.undo() == "dax1.0 is devdax, as it was"


def test_somebody_who_changed_the_policy_meanwhile_keeps_his(kernel, session):
    session.runtime.mkdir()
    (session.runtime / "auto_online_blocks").write_text("online")
    kernel.tree.put(kernel.memory / "auto_online_blocks", "online_kernel")
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.policy() == "online_kernel"
    assert not (session.runtime / "auto_online_blocks").exists()


@pytest.mark.parametrize("rubbish", ["", "zebra", "../../etc", "\x00"])
def test_a_damaged_note_of_the_policy_is_dropped(kernel, session, rubbish):
    session.runtime.mkdir()
    (session.runtime / "auto_online_blocks").write_text(rubbish)
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.policy() == "offline"
    assert kernel.writes() == []


def test_what_is_open_does_not_become_memory(kernel, session):
    kernel.tree.process(77, "database", opened="/dev/dax1.0")
    with pytest.raises(Busy, match=r"dax1\.0 is in use by process database \(77\)"):
        session.do("reconfigure-device", "dax1.0", mode="system-ram")
    assert kernel.ran == []


def test_a_device_without_a_node_cannot_be_memory(tmp_path):
    kernel = FakeKernel(tmp_path)
    kernel.add_dax(node=-1)
    with pytest.raises(NotSupported, match="has no NUMA node of its own"):
        Session(kernel).do("reconfigure-device", "dax1.0", mode="system-ram")
    assert kernel.ran == []


def test_a_device_smaller_than_a_block_is_device_dax_again(kernel, session):
    kernel.tree.put(kernel.dax / "mapping0" / "end", hex(32 * (128 << 20) + 5))
    with pytest.raises(NotSupported, match="smaller than a memory block"):
        session.do("reconfigure-device", "dax1.0", mode="system-ram")
    assert kernel.mode() == "device_dax"


def test_done_already_is_done(kernel, session):
    kernel.become_memory()
    session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    assert kernel.ran == []
    session.do("online-memory", "dax1.0", zone="movable")
    assert kernel.ran == []


def test_memory_in_the_wrong_zone_changes_it(kernel, session):
    kernel.become_memory(zone="Normal")
    session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    assert kernel.states() == ["Movable"] * 3
    session.undo()
    assert kernel.states() == ["Normal"] * 3


# --- and back ------------------------------------------------------------------------------------


def test_back_to_device_dax_block_by_block(kernel, session):
    kernel.become_memory()
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.writes() == [f"memory{n}/state offline" for n in (34, 33, 32)]
    assert kernel.ran[-1] == "daxctl reconfigure-device --mode devdax dax1.0"
    assert kernel.said[-1] == "dax1.0: 3 of 3 memory blocks offline"
    assert "system RAM again, movable" in session.undo()
    assert kernel.states() == ["Movable"] * 3


def test_undo_onlines_each_block_where_it_was(kernel, session):
    kernel.become_memory()
    kernel.tree.block(33, "online", "Normal")
    kernel.tree.block(34, "offline", "Normal Movable")
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert session.undo().startswith("dax1.0 is system RAM again, ")
    assert kernel.states() == ["Movable", "Normal", "offline"]


@pytest.mark.parametrize("busy", [32, 33, 34])
@pytest.mark.parametrize("zone", ["Movable", "Normal"])
def test_a_busy_block_is_tried_again_and_then_all_is_as_it_was(kernel, session, clock, busy, zone):
    kernel.become_memory(zone=zone)
    kernel.failing[rf"write memory{busy}/state offline"] = refused(errno.EBUSY)
    with pytest.raises(Busy) as caught:
        session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.states() == [zone] * 3
    assert kernel.mode() == "kmem"
    assert f"1 of 3 memory blocks of dax1.0 did not go offline in 8 seconds ({busy})" in str(
        caught.value
    )
    assert ("zone of the kernel (Normal)" in str(caught.value)) == (zone == "Normal")
    assert len(clock.slept) == 5
    assert kernel.writes().count(f"memory{busy}/state offline") == 6
    session.undo()
    assert kernel.states() == [zone] * 3


def test_a_block_that_becomes_free_goes_at_the_next_attempt(kernel, session, clock):
    kernel.become_memory()
    kernel.failing[r"write memory33/state offline"] = refused(errno.EAGAIN)
    session.actions._live.sleep = lambda seconds: kernel.failing.clear()
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.mode() == "device_dax"


def test_attempts_that_hang_have_an_end_together(kernel, session, clock):
    kernel.become_memory()
    given = []

    def hang(path, text, seconds):
        if text != "offline":
            return kernel.change_block(path.parent, text)
        given.append(seconds)
        clock.now += seconds
        raise Busy("it had not ended", op="write")

    session.actions._live.write = hang
    session.actions._live.offline_seconds = 40
    with pytest.raises(Busy, match="3 of 3 memory blocks"):
        session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert given == [15, 15, 10]
    assert clock.now == 40
    assert kernel.states() == ["Movable"] * 3


def test_a_block_that_went_offline_a_moment_late_counts(kernel, session):
    kernel.become_memory()

    def late(path, text, seconds):
        kernel.change_block(path.parent, text)
        raise Busy("it had not ended", op="write")

    session.actions._live.write = late
    session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.mode() == "device_dax"


def test_candidates_are_named_those_that_locked_first(kernel, session):
    kernel.become_memory()
    kernel.failing[r"write memory34/state offline"] = refused(errno.EBUSY)
    line = "7f00 bind:2 anon={0} N2={0} kernelpagesize_kB=4"
    kernel.tree.process(50, "cache", numa_maps=line.format(4096))
    kernel.tree.process(51, "rdma", numa_maps=line.format(16), status="VmPin:\t  64 kB")
    kernel.tree.put(kernel.tree.node(2) / "hugepages/hugepages-2048kB/nr_hugepages", "2")
    mounts = "40 1 0:50 / /fast rw - tmpfs tmpfs rw,mpol=bind:1-2\n41 1 0:51 / /x rw - tmpfs t rw"
    kernel.tree.put(kernel.tree.proc / "self/mountinfo", mounts)
    with pytest.raises(Busy) as caught:
        session.do("offline-memory", "dax1.0")
    assert str(caught.value).endswith(
        "Who may hold them: process rdma (51): 64 KiB, locked; process cache (50): 16 MiB; "
        "4 MiB of huge pages on node 2; the tmpfs on /fast"
    )


def test_nobody_to_name(kernel, session):
    kernel.become_memory()
    kernel.failing[r"write memory34/state offline"] = refused(errno.EBUSY)
    with pytest.raises(Busy, match="the kernel itself holds them"):
        session.do("offline-memory", "dax1.0")


def test_daxctl_refusing_at_the_end_onlines_all_again(kernel, session):
    kernel.become_memory()
    kernel.failing[r"daxctl .*"] = Busy("Device or resource busy")
    with pytest.raises(Busy):
        session.do("reconfigure-device", "dax1.0", mode="devdax")
    assert kernel.states() == ["Movable"] * 3


# --- online and offline --------------------------------------------------------------------------


def test_offline_and_online_memory_with_their_reverses(kernel, session):
    kernel.become_memory()
    session.do("offline-memory", "dax1.0")
    assert kernel.states() == ["offline"] * 3
    session.do("online-memory", "dax1.0", zone="kernel")
    assert kernel.states() == ["Normal"] * 3
    session.undo(1)
    assert kernel.states() == ["offline"] * 3
    session.undo(0)
    assert kernel.states() == ["Movable"] * 3
    assert "as they were" in session.undo(0)


@pytest.mark.parametrize("verb", ["online-memory", "offline-memory"])
def test_device_dax_has_no_memory_to_online(kernel, session, verb):
    with pytest.raises(InvalidArgument, match=r"dax1\.0 is devdax, not system-ram"):
        session.do(verb, "dax1.0")
    assert "was not touched" in session.undo()


# --- targets -------------------------------------------------------------------------------------


def test_the_device_of_an_earlier_step(kernel, session):
    session.made[7] = {"dev": "namespace1.0", "chardev": "dax1.0"}
    session.do("reconfigure-device", "@7", mode="system-ram", online="movable")
    assert kernel.mode() == "kmem"


@pytest.mark.parametrize("target", ["@9", "dax7.0", "../x", "namespace1.0", "dax1.0 dax2.0", "@"])
def test_targets_that_are_not_there(kernel, session, target):
    with pytest.raises(InvalidArgument):
        session.do("reconfigure-device", target, mode="system-ram")
    assert kernel.ran == []


def test_a_device_that_went_away_needs_no_reverse(kernel, session):
    session.do("reconfigure-device", "dax1.0", mode="system-ram", online="movable")
    (kernel.tree.sysfs / "bus/dax/devices/dax1.0").unlink()
    assert session.undo() == "dax1.0 is gone already"


@pytest.mark.parametrize(
    "params", [{"mode": "fsdax"}, {"mode": "system-ram", "online": "maybe"}], ids=str
)
def test_modes_and_zones_that_there_are_not(kernel, session, params):
    with pytest.raises(InvalidArgument):
        session.do("reconfigure-device", "dax1.0", **params)
    assert kernel.ran == []


def test_every_order_of_steps_ends_as_it_began(kernel, session):
    """Whatever is done in whatever order, taking it back newest first leads to the start."""
    steps = (
        ("reconfigure-device", {"mode": "system-ram", "online": "movable"}),
        ("reconfigure-device", {"mode": "system-ram", "online": "kernel"}),
        ("reconfigure-device", {"mode": "system-ram", "online": "no"}),
        ("reconfigure-device", {"mode": "devdax"}),
    )
    for order in itertools.permutations(steps):
        session.entries.clear()
        for verb, params in order:
            session.do(verb, "dax1.0", **params)
        for number in reversed(range(len(order))):
            session.undo(number)
        assert kernel.mode() == "device_dax"
        assert kernel.states() == []
