"""The journal: what it remembers, what a torn line costs, what damage is, and who may write."""

import io
import json
import multiprocessing
import os
import random
import stat
import zlib
from pathlib import Path

import pytest

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NoSpace, PmemError
from pmemkit.policy.journal import Journal
from pmemkit.policy.model import PageMap, Plan, Refusal, Step

STEP = Step(
    number=1,
    verb="create-namespace",
    target="region0",
    region="region0",
    why="there is none",
    params={"mode": "fsdax", "size": 1 << 30, "members": ["mem0"]},
    destroys=("an ext4 file system",),
    page_map=PageMap(size=1 << 24, place="dev"),
    seconds=1.5,
)
PLAN = Plan(steps=(STEP,), refused=(Refusal(region="region1", why="a guard"),), notes=("a note",))


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "vm.toml.journal")


def begun(journal: Journal):
    """A run that has begun; the directory is there."""
    journal.directory.mkdir(mode=0o700, exist_ok=True)
    return journal.begin(bus="image", machine="vm.toml", policy="abc", plan=PLAN, command="pmem x")


def file_of(journal: Journal, number: int = 1) -> Path:
    return journal.directory / f"{number:06}.jsonl"


def test_a_run_as_it_was_written(journal) -> None:
    small, large = b"\0\xff" * 10, random.Random(1).randbytes(100_000)
    with journal.lock("pmem apply"):
        writer = begun(journal)
        entry = writer.started(STEP)
        writer.kept(entry, {"labels": small, "blocks": [[0, large], [4096, small]]})
        writer.kept(entry, {"later": 1})
        writer.done(entry, {"dev": "namespace0.0", "digest": small})
        other = writer.started(STEP)
        writer.failed(other, "no room")
        writer.plan(Plan())
        writer.end("failed")
    (run,) = journal.runs()
    assert (run.number, run.bus, run.machine, run.policy) == (1, "image", "vm.toml", "abc")
    assert (run.command, run.ended, run.plans) == ("pmem x", "failed", [PLAN, Plan()])
    first = run.entries[1]
    assert (first.step, first.state) == (STEP, "done")
    assert first.kept["labels"] == small
    assert first.kept["blocks"] == [[0, large], [4096, small]]
    assert first.kept["later"] == 1
    assert first.made == {"dev": "namespace0.0", "digest": small}
    assert (run.entries[2].state, run.errors) == ("started", {2: "no room"})
    assert (run.standing, run.unsettled) == ([2, 1], 2)


def test_states_of_an_entry(journal) -> None:
    writer = begun(journal)
    entry = writer.started(STEP)
    assert journal.run(1).unsettled == entry
    writer.done(entry, {})
    assert journal.run(1).unsettled is None
    writer.end("converged")
    again = journal.again(journal.run(1))
    again.undoing(entry)
    assert (journal.run(1).unsettled, journal.run(1).ended) == (entry, None)
    again.undone(entry, "it is gone")
    again.end("undone")
    run = journal.run(1)
    assert (run.standing, run.unsettled, run.ended) == ([], None, "undone")
    assert again.started(STEP) == entry + 1


def test_runs_are_numbered_on(journal) -> None:
    assert journal.runs() == []
    assert [begun(journal).number for _ in range(3)] == [1, 2, 3]
    file_of(journal, 2).unlink()
    assert begun(journal).number == 4
    assert [run.number for run in journal.runs()] == [1, 3, 4]
    with pytest.raises(InvalidArgument, match="no run 2; there is 1, 3, 4"):
        journal.run(2)


def test_nobody_else_may_read(journal) -> None:
    old = os.umask(0)
    try:
        with journal.lock():
            writer = begun(journal)
            writer.kept(writer.started(STEP), {"data": bytes(1 << 17)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(journal.directory.stat().st_mode) == 0o700
    files = list(journal.directory.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}


def test_every_record_is_durable_before_it_counts(journal, monkeypatch) -> None:
    """Each record ends with an fsync of its file; a new file also with one of the directory; a
    blob is durable before the record that names it."""
    synced = []
    whole = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        whole(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = begun(journal)
    assert synced == ["000001.jsonl", journal.directory.name]
    synced.clear()
    entry = writer.started(STEP)
    assert synced == ["000001.jsonl"]
    synced.clear()
    writer.kept(entry, {"data": bytes(1 << 17)})
    assert len(synced) == 3
    assert synced[0].endswith(".draft")
    assert synced[1:] == [journal.directory.name, "000001.jsonl"]


@pytest.mark.parametrize("tail", [b"", b"\0" * 40, b"{", b"\0" * 40 + b"}\n"])
def test_a_torn_last_line_does_not_count(journal, tail) -> None:
    """At every byte, and with zeroes where the file system had not written yet."""
    writer = begun(journal)
    writer.done(writer.started(STEP), {"dev": "x"})
    whole = file_of(journal).read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole) - 1, 7):
        file_of(journal).write_bytes(whole[:cut] + tail)
        run = journal.run(1)
        assert run.entries[1].state == "started"
        journal.again(run).done(1, {"dev": "y"})
        assert journal.run(1).entries[1].made == {"dev": "y"}
    file_of(journal).write_bytes(whole[: whole.find(b"\n")])
    assert journal.runs() == []
    assert begun(journal).number == 2


def test_damage_names_file_and_line(journal) -> None:
    """Any byte of any line but a torn last one."""
    writer = begun(journal)
    entry = writer.started(STEP)
    writer.kept(entry, {"data": b"precious"})
    writer.done(entry, {})
    whole = file_of(journal).read_bytes()
    choose = random.Random(2)
    for _ in range(300):
        place = choose.randrange(len(whole) - 1)
        broken = bytearray(whole)
        broken[place] ^= 1 << choose.randrange(7)
        if broken[place] in (0, 10) or whole[place] == 10:
            continue
        line = whole.count(b"\n", 0, place) + 1
        file_of(journal).write_bytes(broken)
        with pytest.raises(Corrupt, match=f"line {line} is") as caught:
            journal.runs()
        assert caught.value.path == str(file_of(journal))


def record(**body: object) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "crc": f"{zlib.crc32(text.encode()):08x}"}).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        record(record="nonsense", entry=1),
        record(record="done", entry=7, made={}),
        record(record="done"),
        record(record="started", entry=1, step={"number": 1}),
        record(record="kept", entry=1, what={"data": {"$blob": "../../etc/passwd"}}),
        record(record="kept", entry=1, what={"data": {"$bytes": "%"}}),
        record(),
        b"[]\n",
        b"7\n",
        b"[" * 5000 + b"\n",
    ],
)
def test_records_that_make_no_sense(journal, line) -> None:
    begun(journal).started(STEP)
    with file_of(journal).open("ab") as file:
        file.write(line)
    with pytest.raises(Corrupt, match="line 3"):
        journal.runs()


def test_a_blob_that_is_damaged_or_gone(journal) -> None:
    writer = begun(journal)
    writer.kept(writer.started(STEP), {"data": bytes(1 << 17)})
    (blob,) = (each for each in journal.directory.iterdir() if len(each.name) == 64)
    blob.write_bytes(b"x" * (1 << 17))
    with pytest.raises(Corrupt, match="digest"):
        journal.runs()
    blob.unlink()
    with pytest.raises(PmemError, match=blob.name):
        journal.runs()


def test_no_room(journal, monkeypatch) -> None:
    """A record that is written in part is an error, and the next one has a line of its own."""
    writer = begun(journal)

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:40])

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda fd, mode, **_: Full(fd, mode))
        with pytest.raises(NoSpace, match="in part"):
            writer.started(STEP)
    writer.started(STEP)
    assert journal.run(1).entries[2].step == STEP


def hold(directory: Path, held, done) -> None:
    with Journal(directory).lock("pmem apply --yes policy.toml"):
        held.set()
        done.wait(30)


def test_two_at_once(journal) -> None:
    """The second one is refused and told who has it; the lock goes with its holder."""
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(journal.directory, held, done))
    other.start()
    assert held.wait(30)
    named = rf"process {other.pid} .*pmem apply --yes policy.toml"
    with pytest.raises(Busy, match=named), journal.lock():
        pytest.fail("two at once")
    other.kill()
    other.join()
    again = Journal(journal.directory)
    with journal.lock(), pytest.raises(Busy, match=str(os.getpid())), again.lock():
        pytest.fail("two at once")
    with journal.lock():
        pass


def test_a_directory_that_others_can_write_to(journal) -> None:
    journal.directory.mkdir()
    journal.directory.chmod(0o777)
    with pytest.raises(InvalidArgument, match="mode 0777"), journal.lock():
        pytest.fail("trusted")
    assert journal.numbers() == []


def test_without_contents(journal) -> None:
    """What is not looked at may be damaged or gone."""
    writer = begun(journal)
    writer.kept(writer.started(STEP), {"data": bytes(1 << 17)})
    next(each for each in journal.directory.iterdir() if len(each.name) == 64).unlink()
    (run,) = journal.runs(contents=False)
    assert (run.entries[1].step, run.entries[1].kept) == (STEP, {})
    with pytest.raises(PmemError):
        journal.run(1)


def test_a_link_in_the_place_of_the_lock(journal, tmp_path) -> None:
    journal.directory.mkdir()
    (journal.directory / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(PmemError, match="lock"), journal.lock():
        pytest.fail("followed a link")
    assert not (tmp_path / "victim").exists()
