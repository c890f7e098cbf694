"""Providers of bytes: every backing this machine has, and who may open it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pmemkit.errors import Busy, InvalidArgument, NoSpace, NotSupported, ReadOnly, SystemFailure
from pmemkit.media import LinuxPlatform, open_medium
from pmemkit.media.lock import holder_of

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("PMEMKIT_GRANULARITY", raising=False)
    monkeypatch.delenv("PMEM2_FORCE_GRANULARITY", raising=False)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, MIB)
    return path


@pytest.fixture
def shared_memory_image():
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK):
        pytest.skip("/dev/shm cannot be written to")
    path = place / f"pmemkit-test-{os.getpid()}"
    path.touch()
    os.truncate(path, MIB)
    yield path
    path.unlink()


def roundtrip(opened):
    opened.medium.write(4090, b"0123456789")
    opened.medium.sync()
    assert opened.medium.read(4088, 14) == b"\0\x000123456789\0\0"


def test_a_file(image):
    opened = open_medium(image)
    assert (opened.backing, len(opened.medium), opened.read_only) == ("file", MIB, False)
    assert opened.decision.granularity == opened.medium.granularity
    assert opened.locked
    roundtrip(opened)
    opened.close()
    assert image.read_bytes()[4090:4100] == b"0123456789"


@pytest.mark.parametrize("granularity", ["byte", "cacheline", "page"])
def test_an_override_reaches_the_medium(image, granularity, monkeypatch):
    opened = open_medium(image, granularity=granularity)
    assert opened.medium.granularity == granularity
    roundtrip(opened)
    opened.close()
    del opened
    monkeypatch.setenv("PMEMKIT_GRANULARITY", granularity)
    opened = open_medium(image)
    assert opened.medium.granularity == granularity
    opened.close()


def test_map_sync_is_asked_for_where_it_was_granted(image):
    """A platform that lies shows it: this file's mapping is refused, and not made without."""

    class Lying(LinuxPlatform):
        def map_sync_granted(self, fd):
            return True

    with image.open("rb") as file:
        if LinuxPlatform().map_sync_granted(file.fileno()):
            pytest.skip("this file is on a DAX mount")
    with pytest.raises(NotSupported) as refused:
        open_medium(image, platform=Lying())
    assert refused.value.path == str(image)
    open_medium(image, platform=Lying(), granularity="page").close()


def test_what_is_required_and_not_there_is_refused_and_nothing_stays_locked(image):
    with pytest.raises(NotSupported, match="byte is required") as refused:
        open_medium(image, granularity="page", required_granularity="byte")
    assert refused.value.path == str(image)
    open_medium(image).close()


@pytest.mark.parametrize(
    ("spec", "backing", "granularity"),
    [("anonymous:1M", "anonymous", "byte"), ("memfd:1M", "memfd", "page")],
)
def test_memory(spec, backing, granularity):
    opened = open_medium(spec)
    assert (opened.backing, len(opened.medium)) == (backing, MIB)
    assert opened.medium.granularity == granularity
    assert opened.persistence_domain == "none"
    assert "memory of this process" in opened.volatile_because
    roundtrip(opened)
    opened.close()


def test_memfd_takes_an_override():
    opened = open_medium("memfd:1M", granularity="cacheline")
    assert opened.medium.granularity == "cacheline"
    opened.close()


@pytest.fixture
def huge_pages():
    """At least two huge pages in the pool, as long as the test runs."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text() if pool.exists() else None
    if before is None or not os.access(pool, os.W_OK):
        pytest.skip("the pool of huge pages is not ours to fill: not root, or no such kernel")
    pool.write_text(str(int(before) + 2))
    try:
        if int(pool.read_text()) < int(before) + 2:
            pytest.skip("this machine's memory is too fragmented for two huge pages")
        yield
    finally:
        pool.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages():
    opened = open_medium("hugetlb:2M")
    try:
        assert (opened.backing, len(opened.medium)) == ("hugetlb", 2 * MIB)
        assert "memory of this process" in opened.volatile_because
        roundtrip(opened)
    finally:
        opened.close()


def test_an_empty_pool_of_huge_pages_is_no_space():
    with pytest.raises(NoSpace):
        opened = open_medium("hugetlb:1T")
        try:
            roundtrip(opened)
        finally:
            opened.close()


def test_huge_pages_come_in_whole_ones():
    with pytest.raises((InvalidArgument, NotSupported, SystemFailure), match="hugetlb:5000"):
        open_medium("hugetlb:5000")


def test_a_path_may_look_like_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("memfd:1M").write_bytes(bytes(4096))
    opened = open_medium("./memfd:1M")
    assert (opened.backing, len(opened.medium)) == ("file", 4096)
    opened.close()


def test_a_file_on_tmpfs_is_volatile(shared_memory_image):
    opened = open_medium(shared_memory_image)
    assert "tmpfs" in opened.volatile_because
    assert opened.persistence_domain == "none"
    opened.close()


@pytest.fixture
def loop_device(image):
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root")
    done = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_a_block_device(loop_device, image):
    opened = open_medium(loop_device)
    assert (opened.backing, len(opened.medium)) == ("block device", MIB)
    assert opened.medium.granularity == "page"
    assert not opened.resizable
    roundtrip(opened)
    opened.close()
    del opened
    subprocess.run(["blockdev", "--flushbufs", loop_device], check=True)
    assert image.read_bytes()[4090:4100] == b"0123456789"


def test_a_block_device_in_use_is_busy(loop_device):
    holder = os.open(loop_device, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(Busy) as refused:
            open_medium(loop_device)
        assert refused.value.path == loop_device
        open_medium(loop_device, read_only=True).close()
    finally:
        os.close(holder)


@pytest.mark.parametrize(
    ("path", "cls", "sentence"),
    [
        ("/nowhere/at/all", SystemFailure, "No such file"),
        ("/dev/null", NotSupported, "no device DAX"),
        ("anonymous:1Z", InvalidArgument, "is not a size"),
    ],
)
def test_what_cannot_be_opened(path, cls, sentence):
    with pytest.raises(cls, match=sentence) as refused:
        open_medium(path)
    assert refused.value.path == path


def test_a_directory_is_no_medium(tmp_path):
    with pytest.raises((NotSupported, SystemFailure)):
        open_medium(tmp_path)
    with pytest.raises(NotSupported, match="is not a file"):
        open_medium(tmp_path, read_only=True)


def test_read_only_refuses_stores(image):
    opened = open_medium(image, read_only=True)
    with pytest.raises(ReadOnly):
        opened.medium.write(0, b"x")
    opened.close()


def test_a_file_that_became_longer_is_mapped_again(image):
    opened = open_medium(image)
    os.truncate(image, 2 * MIB)
    assert opened.current_size() == 2 * MIB
    opened.remap()
    opened.medium.write(2 * MIB - 1, b"x")
    opened.close()


# --- two writers ----------------------------------------------------------------------------------


def test_two_writers_are_refused_with_the_holders_pid(image):
    opened = open_medium(image)
    with pytest.raises(Busy, match=rf"this process \({os.getpid()}\)") as refused:
        open_medium(image)
    assert refused.value.path == str(image)
    assert "locking off" in refused.value.message
    opened.close()


def test_a_reader_beside_a_writer_is_refused_and_readers_share(image):
    first, second = open_medium(image, read_only=True), open_medium(image, read_only=True)
    with pytest.raises(Busy, match="writing"):
        open_medium(image)
    first.close()
    second.close()
    del first, second
    writer = open_medium(image)
    with pytest.raises(Busy, match="reading beside a writer"):
        open_medium(image, read_only=True)
    writer.close()


def test_locking_off_opens_all_the_same(image):
    writer = open_medium(image)
    other = open_medium(image, locking="off")
    assert not other.locked
    other.close()
    writer.close()
    with pytest.raises(InvalidArgument, match="on or off"):
        open_medium(image, locking="maybe")


def test_the_lock_lasts_as_long_as_the_mapping(image):
    opened = open_medium(image)
    medium = opened.medium
    opened.close()
    del opened
    with pytest.raises(Busy):
        open_medium(image)
    del medium
    open_medium(image).close()


def test_another_process_holds_it_and_its_death_lets_it_go(image):
    program = textwrap.dedent(
        """
        import sys
        from pmemkit.media import LinuxPlatform, open_medium
        opened = open_medium(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.read()
        """
    )
    source = Path(__file__).resolve().parents[2] / "src"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(source)},
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(Busy, match=f"process {child.pid} has it open"):
            open_medium(image)
    finally:
        child.kill()
        child.communicate()
    open_medium(image).close()


def test_the_holder_is_found_among_the_open_files(tmp_path):
    """Of the locks in ``/proc/PID/fdinfo``, the one on this file that covers the range counts."""
    path = tmp_path / "image"
    path.write_bytes(b"")
    base = 1 << 62
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for pid, place, start, end in (
            (11, "08:01:5", base, "EOF"),
            (12, number, 100, 200),
            (13, number, base + 4096, base + 8191),
            (14, number, base + 8192, "EOF"),
        ):
            (tmp_path / "proc" / str(pid) / "fdinfo").mkdir(parents=True)
            (tmp_path / "proc" / str(pid) / "fdinfo" / "3").write_text(
                f"pos:\t0\nlock:\t1: OFDLCK ADVISORY  WRITE -1 {place} {start} {end}\n"
            )
        processes = str(tmp_path / "proc")
        assert holder_of(file.fileno(), 0, 4096, processes) is None
        assert holder_of(file.fileno(), 4096, 4096, processes) == 13
        assert holder_of(file.fileno(), 8192, None, processes) == 14
        assert holder_of(file.fileno(), 0, 4096, str(tmp_path / "none")) is None
