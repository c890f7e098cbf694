"""``pmem mount`` and ``pmem umount``: the kernel's file systems on our devices."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from cli_run import PATIENCE_SECONDS, call, complaint, refused, serving
from mount_run import (
    MIB,
    Place,
    hashes,
    read_direct,
    require_clean,
    run,
    wait_until,
    why_not,
    write_direct,
)

from pmemkit.errors import Busy

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.peer("mount", "losetup", "mkfs.ext4", "mkfs.xfs", "e2fsck", "xfs_repair"),
]


GONE = r"Input/output|Read-only"
"""What a file system says whose device is gone."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path, monkeypatch)
    try:
        yield place
        wait_until(lambda: not place.leftovers())
    finally:
        place.clean_up()


def fill(directory, seed):
    """Files large and small, buffered and direct; gives their hashes."""
    rng = random.Random(seed)
    (directory / "tree").mkdir()
    for number in range(200):
        data = rng.randbytes(rng.choice([0, 1, 100, 4096, 5000, 70_000]))
        (directory / "tree" / f"{number}").write_bytes(data)
    (directory / "large").write_bytes(rng.randbytes(9 * MIB + 123))
    write_direct(directory / "direct", rng.randbytes(8 * MIB))
    return hashes(directory)


@pytest.mark.parametrize(
    ("filesystem", "mode"),
    [
        ("ext4", "raw"),
        ("xfs", "sector-4096"),
        pytest.param("ext4", "sector-512", marks=pytest.mark.soak),
        pytest.param("xfs", "raw", marks=pytest.mark.soak),
    ],
)
def test_what_is_written_is_there_after_a_remount(place, filesystem, mode):
    namespace = place.make_image(mode, 320 if filesystem == "xfs" else 64)
    told = place.mount(namespace, "--mkfs", filesystem)
    assert told["filesystem"] == filesystem
    assert told["made"]
    loop = Path("/sys/block") / Path(told["loop"]).name
    size = 4096 if mode == "sector-4096" else 512
    assert (loop / "queue" / "logical_block_size").read_text() == f"{size}\n"
    assert (loop / "loop" / "dio").read_text() == "1\n"
    (listed,) = place.listed()
    assert listed == told | {"alive": True}
    written = fill(place.target, f"{filesystem} {mode}")
    place.umount()
    assert not place.leftovers()
    require_clean(place, namespace, filesystem)
    again = place.mount(namespace)
    assert (again["filesystem"], again["made"]) == (filesystem, False)
    assert hashes(place.target) == written
    assert read_direct(place.target / "large") == (place.target / "large").read_bytes()
    place.umount()


def entries(trace):
    """``(op, length)`` of every call that succeeded."""
    for line in trace.read_text().splitlines():
        op, _, length, *_, outcome = line.split()
        if outcome == "ok":
            yield op, int(length.removeprefix("length="))


@pytest.mark.peer("fstrim")
def test_fsync_and_fstrim_reach_the_device(place):
    namespace = place.make_image("raw", 128)
    trace = place.path / "trace"
    place.mount(namespace, "--mkfs", "ext4", "--layer", f"trace=capacity=1000000,file={trace}")
    place.done("umount", place.target)
    quiet = sum(op == "flush" for op, _ in entries(trace))
    place.mount(namespace, "--layer", f"trace=capacity=1000000,file={trace}")
    with (place.target / "log").open("wb") as file:
        for _ in range(40):
            file.write(b"x" * 1000)
            file.flush()
            os.fsync(file.fileno())
    (place.target / "large").write_bytes(os.urandom(64 * MIB))
    os.sync()
    filled = place.image.stat().st_blocks
    (place.target / "large").unlink()
    os.sync()
    run("fstrim", place.target)
    assert filled - place.image.stat().st_blocks >= 60 * MIB // 512
    place.umount()
    seen = list(entries(trace))
    assert sum(op == "flush" for op, _ in seen) >= 40 > quiet
    assert sum(length for op, length in seen if op == "zero") >= 64 * MIB
    assert sum(length for op, length in seen if op == "write") >= 64 * MIB


@pytest.mark.peer("fstrim")
def test_a_device_without_quick_zeroing_is_not_written_to_by_a_discard(place):
    namespace = place.make_image("sector-512")
    place.mount(namespace, "--mkfs", "ext4")
    assert "not supported" in run("fstrim", place.target, check=False).stderr
    (place.target / "file").write_bytes(b"x" * 100_000)
    place.umount()
    require_clean(place, namespace, "ext4")


# --- who ends it, and how -------------------------------------------------------------------------


def test_a_plain_umount_ends_it_all(place):
    place.mount(place.make_image("raw"), "--mkfs", "ext4")
    run("umount", place.target)
    wait_until(lambda: not place.leftovers())


def test_sigterm_unmounts_and_waits_for_who_uses_it(place):
    told = place.mount(place.make_image("raw"), "--mkfs", "ext4")
    log = Path(told["fuse_file"]).parents[1] / "log"
    with (place.target / "file").open("wb") as file:
        os.kill(told["pid"], signal.SIGTERM)
        wait_until(lambda: "stays mounted" in log.read_text())
        file.write(b"still there")
        file.flush()
        os.fsync(file.fileno())
    run("umount", place.target)
    wait_until(lambda: not place.leftovers())
    told = place.mount(place.image)
    assert (place.target / "file").read_bytes() == b"still there"
    os.kill(told["pid"], signal.SIGTERM)
    wait_until(lambda: not place.leftovers())


def test_a_busy_file_system_is_not_unmounted_but_lazily(place):
    told = place.mount(place.make_image("raw"), "--mkfs", "ext4")
    with (place.target / "file").open("wb") as file:
        refused(place.pmem("umount", place.target), 9, place.target, f"({os.getpid()})")
        assert place.listed()[0]["alive"]
        (state,) = json.loads(place.umount("--lazy", "--json"))
        assert state == {"directory": str(place.target), "state": "in use"}
        assert Path("/proc", str(told["pid"])).exists()
        file.write(b"later")
        file.flush()
        os.fsync(file.fileno())
    wait_until(lambda: not place.leftovers())
    place.mount(place.image)
    assert (place.target / "file").read_bytes() == b"later"
    place.umount()


def test_in_the_foreground_until_sigint(place):
    process = place.start(place.make_image("raw"), place.target, "--mkfs", "ext4")
    assert process.wait(PATIENCE_SECONDS) == 0
    process.communicate()
    place.umount()
    process = place.start(place.image, place.target, "--foreground")
    try:
        assert f"served by process {process.pid}" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0
        (said,) = process.stderr.read().splitlines()
        assert "cache off: the kernel's page cache is above it" in said
    finally:
        process.kill()
        process.communicate()


def test_all_of_them(place):
    other = place.path / "other"
    other.mkdir()
    place.mount("anonymous:32M", "--mkfs", "ext4")
    place.done("mount", place.make_image("raw"), other, "--mkfs", "ext4", "-o", "noatime")
    assert [each["directory"] for each in place.listed()] == [str(other), str(place.target)]
    assert len(place.done("umount", "--all").splitlines()) == 2
    assert place.listed() == []


def test_readers_only_read(place):
    namespace = place.make_image("raw")
    place.mount(namespace, "--mkfs", "ext4")
    (place.target / "file").write_bytes(b"x")
    place.umount()
    told = place.mount(namespace, "--read-only")
    assert told["read_only"]
    assert (place.target / "file").read_bytes() == b"x"
    with pytest.raises(OSError, match="Read-only"):
        (place.target / "file").write_bytes(b"y")
    place.umount()


# --- failing --------------------------------------------------------------------------------------


def test_a_server_that_was_killed_is_cleaned_up_after(place):
    namespace = place.make_image("raw")
    told = place.mount(namespace, "--mkfs", "ext4")
    held = os.open(place.target / "held", os.O_CREAT | os.O_WRONLY)
    try:
        os.write(held, b"never synced")
        os.kill(told["pid"], signal.SIGKILL)
        wait_until(lambda: not place.listed()[0]["alive"])
        refused(place.pmem("mount", namespace, place.target), 9, "pmem umount cleans up")
        with pytest.raises(OSError, match=GONE):
            os.fsync(held)
        # It is in use, and there is nobody left who could be asked to stop.
        place.umount()
        with pytest.raises(OSError, match=GONE):
            os.pwrite(held, b"x", 1 << 20)
            os.fsync(held)
    finally:
        os.close(held)
    place.mount(namespace)
    place.umount()
    require_clean(place, namespace, "ext4")


def test_a_server_that_hangs_is_killed_by_force(place):
    told = place.mount(place.make_image("raw"), "--mkfs", "ext4")
    os.kill(told["pid"], signal.SIGSTOP)
    place.umount("--force")


def test_a_last_flush_that_fails_is_told(place):
    namespace = place.make_image("raw")
    place.mount(namespace, "--mkfs", "ext4")
    place.umount()
    place.mount(namespace, "--layer", "fault=ops=flush,nth=5,count=0")
    with pytest.raises(OSError, match=GONE):
        for number in range(100):
            fd = os.open(place.target / f"{number}", os.O_CREAT | os.O_WRONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    refused(place.pmem("umount", place.target), 7, place.target, "flush")


def test_killed_while_it_is_set_up(place):
    process = place.start(
        place.make_image("raw"),
        *(place.target, "--mkfs", "ext4", "--layer", "delay=ops=write,seconds=0.5"),
    )
    wait_until(place.loops)
    (listed,) = place.listed()
    os.kill(listed["pid"], signal.SIGKILL)
    out, error = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, out) == (11, "")
    assert "ended without a word" in error
    place.umount()


@pytest.mark.timeout(600)
def test_interrupted_at_any_moment(place, scale):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    image = place.make_image("raw")
    outcomes = set()
    for turn in range(scale(2, 60)):
        layer = "delay=ops=write,seconds=0.02"
        words = [image, place.target, "--mkfs", "ext4", "--force", "--layer", layer]
        process = place.start(*words)
        if turn == 0:
            wait_until(place.loops)
        else:
            time.sleep(rng.uniform(0.4, 0.9))
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=PATIENCE_SECONDS)
        outcomes.add(process.returncode)
        if process.returncode == 0:
            assert str(place.target) in out
            place.umount()
        # A program that is just starting, and has imported no more than a part, dies of the signal.
        if process.returncode == -signal.SIGINT:
            assert ", in main" not in error
        else:
            assert "Traceback" not in error
        wait_until(lambda: not place.leftovers())
    assert outcomes <= {0, 130, -signal.SIGINT}
    assert 130 in outcomes


def test_a_signal_waits_for_the_step_that_it_comes_in():
    from pmemkit.serve.mounting import Stopped, _Stop

    stop, done = _Stop(), []
    with stop.later():
        done.append("undisturbed")
    with pytest.raises(Stopped), stop.later():
        stop(signal.SIGTERM, None)
        done.append("to its end")
    # What takes it all down is not stopped by the next one.
    stop(signal.SIGTERM, None)
    assert done == ["undisturbed", "to its end"]
    with pytest.raises(Stopped):
        _Stop()(signal.SIGINT, None)


def test_a_process_of_the_same_number_is_left_alone(place):
    from pmemkit.serve import mounts

    target = str(place.target)
    record = mounts.Mounted(
        directory=target,
        namespace="gone.img",
        name="gone.img",
        pid=os.getpid(),
        started=(mounts.start_of(os.getpid()) or 0) + 1,
        place=str(mounts.place_of(target)),
        mounted=True,
    ).claim()
    assert not record.alive
    with pytest.raises(Busy, match="its server died"):
        record.claim()
    place.umount("--force")
    assert mounts.find(target) is None


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["{image}", "{place}/nowhere"], 11, ["nowhere", "No such file"]),
        (["{image}", "{image}"], 2, ["is not a directory"]),
        (["{place}/no.img", "{target}"], 11, ["no.img", "No such file"]),
        (["{image}", "{target}"], 11, ["mount failed", "--mkfs ext4 makes one"]),
        (["{image}", "{target}", "--mkfs", "xfs"], 11, ["mkfs.xfs failed"]),
        (["{image}", "{target}", "--mkfs", "ext4", "-o", "nonsense"], 11, ["mount failed"]),
        (["{image}", "{target}", "--mkfs", "ext4", "--read-only"], 2, ["read-only"]),
        (["{image}"], 2, ["NAMESPACE and DIR"]),
        (["{image}:namespace0.7", "{target}"], 2, ["namespace0.7"]),
        (["{image}", "{target}", "--layer", "fault=ops=read,count=0"], 6, []),
    ],
)
def test_what_cannot_be_mounted_leaves_nothing(place, words, code, parts):
    image = place.make_image("raw")
    filled = [word.format(image=image, place=place.path, target=place.target) for word in words]
    done = place.pmem("mount", *filled)
    refused(done, code, *parts)
    assert not place.leftovers()


def test_a_file_system_is_not_overwritten_without_force(place):
    namespace = place.make_image("raw")
    place.mount(namespace, "--mkfs", "ext4", "-o", "noatime")
    (place.target / "file").write_bytes(b"x")
    place.umount()
    done = place.pmem("mount", namespace, place.target, "--mkfs", "ext4")
    refused(done, 2, "ext4 file system", "--force")
    place.mount(namespace)
    assert (place.target / "file").exists()
    place.umount()
    assert place.mount(namespace, "--mkfs", "ext4", "--force")["made"]
    assert not (place.target / "file").exists()
    place.umount()


def test_what_is_busy(place):
    namespace = place.make_image("raw")
    with serving(namespace, "--unix", place.path / "s") as server:
        server.stdout.readline()
        done = place.pmem("mount", namespace, place.target, "--mkfs", "ext4")
        refused(done, 9, f"process {server.pid} has it open")
    run("mount", "-t", "tmpfs", "none", place.target)
    done = place.pmem("mount", namespace, place.target, "--mkfs", "ext4")
    refused(done, 9, "something is mounted there")
    run("umount", place.target)
    told = place.mount(namespace, "--mkfs", "ext4")
    refused(place.pmem("mount", "anonymous:16M", place.target), 9, f"process {told['pid']} serves")
    refused(place.pmem("serve", namespace), 9, f"process {told['pid']} has it open")
    run("mount", "-t", "tmpfs", "none", place.target)
    refused(place.pmem("umount", place.target), 9, "something else is mounted on top")
    run("umount", place.target)
    place.umount()
    refused(place.pmem("umount", place.target), 2, "mounted nothing there")


@pytest.mark.parametrize(
    ("what", "code", "parts"),
    [
        ("root", 11, ["needs root"]),
        ("fuse", 3, ["no-fuse is missing", "modprobe fuse"]),
        ("loop", 3, ["no-loop is missing", "modprobe loop"]),
    ],
)
def test_what_a_machine_may_lack(place, monkeypatch, what, code, parts):
    from pmemkit.serve import mounting

    if what == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    else:
        monkeypatch.setattr(mounting, f"_{what.upper()}", Path(f"/dev/no-{what}"))
    image = place.make_image("raw")
    complaint(call("mount", image, place.target, "--mkfs", "ext4"), code, *parts)


def test_records_that_others_could_change_are_not_used(place):
    run("mkdir", "-m", "777", place.runtime)
    done = place.pmem("mount", "anonymous:16M", place.target, "--mkfs", "ext4")
    refused(done, 11, "root alone")
