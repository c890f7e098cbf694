"""The file that a device is to FUSE, asked with plain system calls."""

import ctypes
import errno
import mmap
import os
import subprocess
import threading
from pathlib import Path

import pytest

import pmemkit
from pmemkit.serve.fuse_export import FuseExport

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10


def why_not():
    if os.geteuid() != 0:
        return "mounting needs root"
    return None if Path("/dev/fuse").exists() else "/dev/fuse is missing"


pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.peer("mount"),
]


class Served:
    """A device as a mounted file; unmounted at the end."""

    def __init__(self, directory, *, layers=(), read_only=False):
        self.directory = directory / "fuse"
        self.directory.mkdir()
        self.region = pmemkit.open(directory / "image", create_size=SIZE, read_only=read_only)
        self.device = self.region.device(layers=layers)
        self.export = FuseExport(self.device, self.directory, "disk")
        self.file = self.export.file

    def close(self):
        subprocess.run(["umount", self.directory], check=True)
        assert self.export.join(60)
        self.region.close()


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture
def fd(served):
    fd = os.open(served.file, os.O_RDWR)
    yield fd
    os.close(fd)


def fallocate(fd, mode, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    long = ctypes.c_longlong
    if libc.fallocate(fd, mode, long(offset), long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def test_it_is_one_file_of_the_devices_size(served):
    assert [each.name for each in served.directory.iterdir()] == ["disk"]
    status = served.file.stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_nlink) == (SIZE, 0o600, 1)
    space = os.statvfs(served.directory)
    assert (space.f_bsize * space.f_blocks, space.f_bfree) == (SIZE, 0)


def test_bytes_go_through_at_any_offset(served, fd):
    data = os.urandom(3 * MIB + 17)
    assert os.pwrite(fd, data, 12345) == len(data)
    assert os.pread(fd, len(data), 12345) == data
    assert served.device.read(12345, len(data)) == data
    served.device.write(0, b"from below")
    assert os.pread(fd, 10, 0) == b"from below"


def test_past_the_end(fd):
    assert os.pread(fd, 100, SIZE - 10) == bytes(10)
    assert os.pread(fd, 100, SIZE) == b""
    for offset in (SIZE - 10, SIZE, 1 << 50):
        with pytest.raises(OSError, match="No space"):
            os.pwrite(fd, b"x" * 100, offset)
    assert os.fstat(fd).st_size == SIZE


def test_past_the_page_cache(served):
    fd = os.open(served.file, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, MIB) as buffer:
            buffer[:] = os.urandom(MIB)
            assert os.pwrite(fd, buffer, 4 * KIB) == MIB
            assert served.device.read(4 * KIB, MIB) == buffer[:]
    finally:
        os.close(fd)


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_holes_and_zeroes(fd, mode):
    os.pwrite(fd, b"\xaa" * 64 * KIB, 0)
    fallocate(fd, mode, 8 * KIB, 16 * KIB)
    assert os.pread(fd, 16 * KIB, 8 * KIB) == bytes(16 * KIB)
    assert os.pread(fd, 8 * KIB, 0) == b"\xaa" * 8 * KIB
    assert os.pread(fd, 40 * KIB, 24 * KIB) == b"\xaa" * 40 * KIB


def test_what_it_is_not_good_for(served, fd):
    refusals = [
        (errno.EPERM, lambda: os.ftruncate(fd, SIZE - 1)),
        (errno.EPERM, lambda: os.ftruncate(fd, SIZE + 1)),
        (errno.EPERM, lambda: served.file.chmod(0o644)),
        (errno.EPERM, lambda: (served.directory / "other").touch()),
        (errno.ENOENT, lambda: (served.directory / "other").stat()),
        (errno.ENOSYS, lambda: served.file.unlink()),
        (errno.EOPNOTSUPP, lambda: fallocate(fd, 0, 0, 4 * KIB)),
        (errno.EOPNOTSUPP, lambda: fallocate(fd, KEEP_SIZE, 0, 4 * KIB)),
        (errno.EOPNOTSUPP, lambda: fallocate(fd, 0x08, 0, 4 * KIB)),
        (errno.EINVAL, lambda: fallocate(fd, PUNCH_HOLE | KEEP_SIZE, SIZE, 4 * KIB)),
    ]
    for number, act in refusals:
        with pytest.raises(OSError) as refused:
            act()
        assert refused.value.errno == number
    os.ftruncate(fd, SIZE)


def test_a_flush_for_each_fsync(tmp_path):
    served = Served(tmp_path, layers=["trace=file=/dev/null"])
    try:
        fd = os.open(served.file, os.O_RDWR)
        for _ in range(3):
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
        (trace,) = served.device.traces
        ops = [entry[0] for entry in trace.entries()]
        assert ops == ["write", "flush"] * 3 + ["flush"]
    finally:
        served.close()


def test_errors_of_the_device_arrive_and_the_rest_goes_on(tmp_path):
    served = Served(tmp_path, layers=["fault=ops=read,offset=1M,length=4K,count=0,errno=EIO"])
    try:
        fd = os.open(served.file, os.O_RDWR)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(fd, 100, MIB)
        assert os.pread(fd, 100, 2 * MIB) == bytes(100)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
    finally:
        served.close()


def test_read_only(tmp_path):
    pmemkit.open(tmp_path / "image", create_size=SIZE).close()
    served = Served(tmp_path, read_only=True)
    try:
        with pytest.raises(OSError, match="Read-only"):
            os.open(served.file, os.O_RDWR)
        fd = os.open(served.file, os.O_RDONLY)
        assert os.pread(fd, 10, 0) == bytes(10)
        os.fsync(fd)
        os.close(fd)
    finally:
        served.close()


def test_many_at_once(served):
    """Each thread has a stretch of its own; a slow request of one holds up none of the others."""
    failures = []

    def work(number):
        fd = os.open(served.file, os.O_RDWR)
        try:
            for turn in range(40):
                data = bytes([number, turn]) * 32 * KIB
                os.pwrite(fd, data, number * MIB + turn * KIB)
                if os.pread(fd, len(data), number * MIB + turn * KIB) != data:
                    failures.append((number, turn))
                if turn % 10 == 0:
                    os.fsync(fd)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_last_close_is_noticed(served):
    unused = threading.Event()
    first, second = (os.open(served.file, os.O_RDWR) for _ in range(2))
    served.export.when_unused(unused.set)
    os.close(first)
    assert not unused.wait(0.2)
    os.close(second)
    assert unused.wait(60)
