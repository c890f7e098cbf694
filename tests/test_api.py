"""The Python API: regions and devices as a program uses them."""

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
import tomllib
from pathlib import Path

import pytest

import pmemkit
from pmemkit.errors import (
    Busy,
    Closed,
    InvalidArgument,
    Latched,
    MediaError,
    NoSpace,
    NotSupported,
    OutOfRange,
    PmemError,
    ReadOnly,
    SystemFailure,
    Truncated,
)

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk.img"


@pytest.fixture
def region(path):
    with pmemkit.open(path, create_size=16 * MIB) as region:
        yield region


def child(program, *arguments):
    """Runs a program of a few lines in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- the package ----------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    done = child(
        """
        import sys
        before = set(sys.modules)
        import pmemkit
        print(*sorted(set(sys.modules) - before))
        """
    )
    assert done.stdout.split() == ["pmemkit"], done.stderr


def test_reading_and_writing_loads_neither_asyncio_nor_rich():
    done = child(
        """
        import sys
        import pmemkit
        with pmemkit.open("anonymous:1M") as region, region.device() as device:
            device.write(0, b"x")
        print(*({"asyncio", "rich", "socket", "argparse"} & set(sys.modules)))
        """
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_every_name_of_the_package_is_there_and_no_other():
    assert set(pmemkit.__all__) <= set(dir(pmemkit))
    for name in pmemkit.__all__:
        assert getattr(pmemkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pmemkit.nothing


def test_the_version_is_that_of_the_workspace():
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    assert pmemkit.__version__ == workspace["workspace"]["package"]["version"]


# --- regions --------------------------------------------------------------------------------------


def test_a_region_is_created_once_and_kept(path):
    with pmemkit.open(path, create_size="1M") as region:
        assert region.size == MIB
        with region.device() as device:
            device.write(100, b"kept")
            device.flush()
    assert path.stat().st_blocks * 512 < MIB
    with pmemkit.open(path, create_size="64M") as region, region.device() as device:
        assert region.size == MIB
        assert device.read(100, 4) == b"kept"


def test_without_create_size_a_missing_file_is_an_error(path):
    with pytest.raises(SystemFailure) as refused:
        pmemkit.open(path)
    assert (refused.value.errno, refused.value.path) == (errno.ENOENT, str(path))
    assert not path.exists()
    with pytest.raises(InvalidArgument):
        pmemkit.open(path, create_size=-1)


def test_what_a_region_says_of_itself(region, path):
    assert region.path == str(path)
    assert region.size == 16 * MIB
    assert region.granularity in ("byte", "cacheline", "page")
    assert region.persistence_domain
    assert region.volatile in (True, False)
    assert not region.read_only
    assert str(path) in repr(region)


def test_memory_is_volatile():
    with pmemkit.open("anonymous:1M") as region:
        assert region.volatile
        assert region.granularity == "byte"
        assert region.persistence_domain == "none"


def test_a_closed_region_says_so(path):
    region = pmemkit.open(path, create_size=MIB)
    device = region.device()
    region.close()
    region.close()
    assert device.closed
    for use in (
        lambda: region.size,
        lambda: region.granularity,
        lambda: region.resize(4096),
        lambda: region.refresh(),
        lambda: region.device(),
    ):
        with pytest.raises(Closed) as refused:
            use()
        assert (refused.value.errno, refused.value.path) == (errno.EBADF, str(path))
    assert "closed" in repr(region)


def test_growing_and_shrinking(region, path):
    old = region.device()
    region.resize(32 * MIB)
    assert (region.size, path.stat().st_size) == (32 * MIB, 32 * MIB)
    assert old.size == 16 * MIB
    with region.device() as device:
        device.write(32 * MIB - 1, b"x")
        assert device.read(32 * MIB - 1, 1) == b"x"
    old.write(0, b"y")
    region.resize(MIB)
    assert path.stat().st_size == MIB
    assert region.device().size == MIB
    with pytest.raises(PmemError):
        old.read(2 * MIB, 1)
    assert old.read(0, 1) == b"y"


def test_what_has_a_fixed_size_cannot_be_resized():
    with pmemkit.open("anonymous:1M") as region, pytest.raises(NotSupported):
        region.resize(2 * MIB)


@pytest.mark.parametrize("read_only", [False, True])
def test_refresh_picks_up_a_size_that_somebody_else_gave_it(path, read_only):
    pmemkit.open(path, create_size=MIB).close()
    with pmemkit.open(path, read_only=read_only) as region:
        old = region.device()
        os.truncate(path, 3 * MIB)
        assert region.size == MIB
        assert region.refresh() == region.size == 3 * MIB
        with region.device() as device:
            assert device.read(3 * MIB - 1, 1) == b"\0"
        assert (old.size, old.read(0, 1)) == (MIB, b"\0")
        os.truncate(path, 4096)
        assert region.refresh() == 4096
        assert path.stat().st_size == 4096


def test_a_file_truncated_under_a_live_region_is_an_error_and_no_dead_process(path):
    done = child(
        """
        import os, sys
        import pmemkit
        from pmemkit.errors import Truncated
        path = sys.argv[1]
        with pmemkit.open(path, create_size="4M") as region, region.device() as device:
            device.write(0, b"kept")
            os.truncate(path, 4096)
            try:
                device.read(2 << 20, 4096)
            except Truncated as error:
                print(error.errno, error.path == path, "4096" in str(error))
            try:
                device.write(2 << 20, b"lost")
            except Truncated as error:
                print(error.errno, device.latched is not None)
            print(device.read(0, 4))
        """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [
        f"{errno.EIO} True True",
        f"{errno.EIO} True",
        "b'kept'",
    ]
    assert issubclass(Truncated, MediaError)


def test_two_writers_are_refused(region, path):
    with pytest.raises(Busy) as refused:
        pmemkit.open(path)
    assert str(os.getpid()) in refused.value.message
    with pmemkit.open(path, locking="off") as other:
        assert other.size == region.size


def test_no_file_is_left_open():
    gc.collect()
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with pmemkit.open("memfd:1M") as region:
            region.device().write(0, b"x")
        with pytest.raises(SystemFailure):
            pmemkit.open("/nowhere/at/all")
    gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) == before


# --- devices --------------------------------------------------------------------------------------


@pytest.fixture
def device(region):
    with region.device() as device:
        yield device


def test_bytes_at_offsets(device):
    assert device.size == 16 * MIB
    assert device.write(4090, b"0123456789") == 10
    assert device.read(4088, 14) == b"\0\x000123456789\0\0"
    buffer = bytearray(b"x" * 4)
    assert device.readinto(4092, memoryview(buffer)[1:3]) == 2
    assert buffer == b"x23x"
    assert device.read(16 * MIB, 0) == b""


@pytest.mark.parametrize("data", [bytes, bytearray, memoryview])
def test_any_buffer_is_written(device, data):
    device.write(7, data(b"abc"), fua=True)
    assert device.read(7, 3) == b"abc"


def test_more_than_one_request_may_carry(tmp_path):
    length = 70 * MIB
    with pmemkit.open(tmp_path / "big", create_size=length) as region, region.device() as device:
        data = os.urandom(MIB) * (length // MIB)
        assert device.write(0, data) == length
        assert device.read(0, length) == data


def test_flush_discard_zero_and_extents(device):
    assert device.extents() == [(0, 16 * MIB, "hole")]
    device.write(4 * MIB, b"x" * MIB)
    device.flush()
    assert device.extents() == [
        (0, 4 * MIB, "hole"),
        (4 * MIB, MIB, "data"),
        (5 * MIB, 11 * MIB, "hole"),
    ]
    assert device.extents(4 * MIB + 1, 10) == [(4 * MIB + 1, 10, "data")]
    device.zero(4 * MIB, 4096)
    assert device.read(4 * MIB, 4097) == bytes(4096) + b"x"
    device.discard(4 * MIB, MIB)
    assert [extent.kind for extent in device.extents()] == ["hole"]
    device.zero(0, 8192, no_hole=True)
    assert device.extents(0, 8192)[0].kind == "data"


def test_what_does_not_fit_is_refused_with_the_path(device, path):
    for use in (
        lambda: device.read(16 * MIB - 1, 2),
        lambda: device.readinto(16 * MIB, bytearray(1)),
        lambda: device.write(16 * MIB, b"x"),
        lambda: device.zero(2**63, 2**63),
        lambda: device.discard(16 * MIB, 1),
        lambda: device.extents(17 * MIB, 1),
    ):
        with pytest.raises(OutOfRange) as refused:
            use()
        assert (refused.value.errno, refused.value.path) == (errno.EINVAL, str(path))
        assert str(path) in str(refused.value)


def test_capabilities(region):
    assert {"write", "flush", "fua", "extents", "map"} <= region.device().capabilities
    assert "write" not in region.device(read_only=True).capabilities
    assert "map" not in region.device(layers=["bounce"]).capabilities


def test_read_only_devices_and_regions_refuse_writes(region, path):
    with region.device(read_only=True) as device:
        for use in (lambda: device.write(0, b"x"), lambda: device.discard(0, 1)):
            with pytest.raises((ReadOnly, NotSupported)):
                use()
        assert "write" not in device.channel().caps
    region.close()
    with pmemkit.open(path, read_only=True) as frozen, frozen.device() as device:
        assert device.read(0, 1) == b"\0"
        with pytest.raises((ReadOnly, NotSupported)):
            device.write(0, b"x")
        with pytest.raises(ReadOnly):
            frozen.resize(4096)


def test_a_closed_device_says_so(region, path):
    device = region.device()
    device.close()
    device.close()
    assert device.closed
    for use in (
        lambda: device.read(0, 1),
        lambda: device.readinto(0, bytearray(1)),
        lambda: device.write(0, b"x"),
        lambda: device.flush(),
        lambda: device.discard(0, 1),
        lambda: device.zero(0, 1),
        lambda: device.extents(),
        lambda: device.channel(),
        lambda: device.latched,
    ):
        with pytest.raises(Closed) as refused:
            use()
        assert refused.value.path == str(path)
    assert device.size == 16 * MIB


def test_threads(device):
    block = 64 << 10
    failures = []

    def work(number):
        try:
            for turn in range(20):
                offset = (turn * 8 + number) * block
                data = bytes([number * 20 + turn]) * block
                device.write(offset, data)
                device.flush()
                if device.read(offset, block) != data:
                    failures.append((number, turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- layers ---------------------------------------------------------------------------------------


def test_a_fault_hits_the_request_that_was_meant(region):
    with region.device(layers=["fault=ops=read,nth=2,offset=1M,length=4K,errno=EILSEQ"]) as device:
        device.read(0, MIB)
        device.read(MIB, 4096)
        with pytest.raises(PmemError) as failed:
            device.read(MIB + 100, 1)
        assert failed.value.errno == errno.EILSEQ
        device.read(MIB, 4096)
        assert device.latched is None


def test_a_failed_write_latches_every_device_of_the_region(region):
    with region.device() as other, region.device(layers=["fault=ops=write"]) as device:
        with pytest.raises(MediaError):
            device.write(0, b"x")
        assert "write" in device.latched
        for use in (lambda: other.write(0, b"x"), lambda: region.resize(MIB), region.refresh):
            with pytest.raises(Latched):
                use()
        assert other.read(0, 1) == b"\0"


def test_no_space_is_told_apart(region):
    with (
        region.device(layers=["fault=ops=write,errno=ENOSPC"]) as device,
        pytest.raises(NoSpace),
    ):
        device.write(0, b"x")


def test_the_first_layer_is_nearest_the_client(region):
    with region.device(layers=["trace", "fault=ops=read"]) as outside:
        with pytest.raises(MediaError):
            outside.read(0, 1)
        assert [entry[4] for entry in outside.traces[0].entries()] == ["media"]
    with region.device(layers=["fault=ops=read", "trace"]) as inside:
        with pytest.raises(MediaError):
            inside.read(0, 1)
        assert inside.traces[0].entries() == []


def test_a_trace_is_written_when_the_device_is_closed(region, tmp_path, capsys):
    place = tmp_path / "trace"
    with region.device(layers=[f"trace=file={place},capacity=2"]) as device:
        for offset in (0, 10, 20):
            device.read(offset, 5)
    lines = place.read_text().splitlines()
    assert lines[0] == "(1 older entries were dropped)"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["read", "offset=10", "length=5"],
        ["read", "offset=20", "length=5"],
    ]
    with region.device(layers=["trace"]) as device:
        device.flush()
    assert capsys.readouterr().err.startswith("flush offset=0 length=0")


def test_a_delay_waits(region):
    import time

    with region.device(layers=["delay=ops=read,seconds=0.05"]) as device:
        began = time.monotonic()
        device.read(0, 1)
        assert time.monotonic() - began >= 0.05
