"""``pmem copy``, and the engine under it."""

import io
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from cli_run import PATIENCE_SECONDS, PMEM, environment, pmem, refused

import pmemkit
from pmemkit.errors import InvalidArgument, MediaError, NoSpace
from pmemkit.storage.copying import (
    ZERO_BLOCK_SIZE,
    CopyFailed,
    DeviceSource,
    DeviceTarget,
    StreamSource,
    StreamTarget,
    copy,
    verify,
)

MIB = 1 << 20


@pytest.fixture
def source(tmp_path):
    """8 MiB: data at 1 MiB and at the end, holes elsewhere."""
    path = tmp_path / "source.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(os.urandom(MIB))
        file.seek(8 * MIB - 5000)
        file.write(os.urandom(5000))
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.img"


def copied(*words, **options):
    done = pmem("copy", *words, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def allocated(path):
    return path.stat().st_blocks * 512


# --- between all kinds ----------------------------------------------------------------------------


def test_a_file_to_a_new_file_stays_sparse(source, target):
    report = copied(source, target, "--verify")
    assert target.read_bytes() == source.read_bytes()
    assert allocated(target) <= allocated(source) + 64 * 1024
    assert report["verified"]
    assert report["copied"] == 8 * MIB == report["data_bytes"] + report["zero_bytes"]
    assert report["data_bytes"] < 2 * MIB


def test_success_is_silent_in_a_pipe(source, target):
    done = pmem("copy", source, target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_holes_are_punched_into_an_existing_target(source, target):
    target.write_bytes(os.urandom(9 * MIB))
    end = target.read_bytes()[8 * MIB :]
    copied(source, target, "--verify")
    assert target.read_bytes() == source.read_bytes() + end
    # ext4 with large folios fills up to 2 MiB around a page that is stored to.
    assert allocated(target) < 6 * MIB


def test_standard_input_to_a_new_file(source, target):
    data = source.read_bytes()[:-123]
    done = pmem("copy", "-", target, "--verify", stdin=data, text=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert target.read_bytes() == data


def test_zeroes_are_found_in_a_stream(source, target):
    done = pmem("copy", "-", target, "--detect-zeroes", stdin=source.read_bytes(), text=False)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == source.read_bytes()
    assert allocated(target) < 3 * MIB


def test_nothing_at_all(tmp_path, target):
    (tmp_path / "empty").touch()
    assert copied(tmp_path / "empty", target)["copied"] == 0
    assert target.read_bytes() == b""
    done = pmem("copy", "-", tmp_path / "new", stdin=b"", text=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new").read_bytes() == b""


def test_a_stream_that_outgrows_its_file_many_times(target):
    data = os.urandom(MIB) * 150
    done = pmem("copy", "-", target, "--verify", stdin=data, text=False)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == data


def test_to_standard_output(source):
    done = pmem("copy", source, "-", text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == source.read_bytes()


def test_to_standard_output_that_is_a_file(source, target):
    with target.open("wb") as file:
        subprocess.run([*PMEM, "copy", source, "-"], stdout=file, env=environment(), check=True)
    assert target.read_bytes() == source.read_bytes()


def test_from_standard_input_to_standard_output(source):
    data = source.read_bytes()
    done = pmem("copy", "-", "-", stdin=data, text=False)
    assert (done.returncode, done.stdout) == (0, data)


def test_to_a_block_device(source, tmp_path):
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root")
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(8 * MIB))
    attach = ["losetup", "--find", "--show", backing]
    done = subprocess.run(attach, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    loop = done.stdout.strip()
    try:
        assert copied(source, loop, "--verify")["copied"] == 8 * MIB
        assert pmem("copy", loop, "-", text=False).stdout == source.read_bytes()
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert backing.read_bytes() == source.read_bytes()


def test_a_source_that_changes_later_is_no_mismatch_but_a_target_that_does_is(source, target):
    with pmemkit.open(source) as one, pmemkit.open(target, create_size=8 * MIB) as two:
        report = copy(DeviceSource(one.device()), DeviceTarget(two.device()), digests=True)
        one.device().write(MIB, b"changed")
        verify(report, two.device())
        two.device().write(MIB + 100, b"changed")
        with pytest.raises(MediaError, match="are not what was written") as differing:
            verify(report, two.device())
        assert differing.value.offset == MIB
        assert differing.value.path == str(target)


# --- what is refused ------------------------------------------------------------------------------


def test_a_target_that_is_too_small_is_not_touched(source, target):
    before = os.urandom(4 * MIB)
    target.write_bytes(before)
    done = pmem("copy", source, target)
    refused(done, 5, target, "room for 4194304 bytes", "8388608", "nothing was")
    assert target.read_bytes() == before


def test_a_stream_that_does_not_fit_says_how_much_was_copied(target):
    target.write_bytes(bytes(5 * MIB))
    data = os.urandom(6 * MIB)
    done = pmem("copy", "-", target, stdin=data, text=False)
    refused(done, 5, target, "behind the target's 5242880 bytes", "4194304 bytes were copied")
    assert target.read_bytes()[: 4 * MIB] == data[: 4 * MIB]


def test_a_source_is_not_copied_onto_itself(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    for other in (source, tmp_path / "link"):
        refused(pmem("copy", source, other), 2, other, "one file")
    assert source.read_bytes() == before


def test_an_image_in_use_is_refused_unless_locking_is_off(source, target):
    with pmemkit.open(source):
        refused(pmem("copy", source, target), 9, source, str(os.getpid()), "locking off")
        assert not target.exists()
        assert pmem("copy", source, target, "--locking", "off").returncode == 0
    with pmemkit.open(target):
        refused(pmem("copy", source, target), 9, target, "writing")


def test_standard_output_cannot_be_verified(source):
    refused(pmem("copy", source, "-", "--verify"), 2, "--verify")
    refused(pmem("copy", source, "-", "--json"), 2, "--json")


def test_a_missing_source_makes_no_target(tmp_path, target):
    refused(pmem("copy", tmp_path / "no", target), 11, tmp_path / "no")
    assert not target.exists()


# --- what fails -----------------------------------------------------------------------------------


def test_a_failed_read_says_how_far_it_came(source, target):
    layer = "fault=ops=read,offset=8380000"
    done = pmem("copy", source, target, "--source-layer", layer)
    refused(done, 6, source, "of 8388608 bytes were copied")
    assert target.stat().st_size == 8 * MIB


@pytest.mark.parametrize(
    ("layer", "code"),
    [("fault=ops=write", 6), ("fault=ops=write,errno=ENOSPC", 5), ("fault=ops=flush", 6)],
)
def test_a_failed_write_or_flush_is_a_failed_copy(source, target, layer, code):
    done = pmem("copy", source, target, "--target-layer", layer)
    refused(done, code, target, "bytes were copied")


def test_a_failed_read_while_verifying_is_a_failure(source, target):
    done = pmem("copy", source, target, "--verify", "--target-layer", "fault=ops=read")
    refused(done, 6, target)


def test_layers_need_a_region(source):
    refused(pmem("copy", "-", source, "--source-layer", "noop", stdin=""), 2, "--source-layer")
    refused(pmem("copy", source, "-", "--target-layer", "noop"), 2, "--target-layer")


class Corrupting:
    """A device that stores one wrong byte and says that all is well."""

    def __init__(self, device, offset):
        self.device, self.offset = device, offset
        self.size = device.size

    def write(self, offset, data):
        stored = bytearray(data)
        if offset <= self.offset < offset + len(stored):
            stored[self.offset - offset] ^= 1
        self.device.write(offset, stored)

    def zero(self, offset, length):
        self.device.write(offset, b"\1")

    def flush(self):
        self.device.flush()


@pytest.mark.parametrize("offset", [MIB, 8 * MIB - 1])
def test_a_device_that_corrupts_a_byte_is_found_out(source, target, offset):
    with pmemkit.open(source) as one, pmemkit.open(target, create_size=8 * MIB) as two:
        bad = Corrupting(two.device(), offset)
        report = copy(DeviceSource(one.device()), DeviceTarget(bad, fresh=True), digests=True)
        with pytest.raises(MediaError) as found:
            verify(report, two.device())
        assert found.value.offset <= offset


def test_zeroes_that_were_not_made_are_found_out(source, target):
    with pmemkit.open(source) as one, pmemkit.open(target, create_size=8 * MIB) as two:
        bad = Corrupting(two.device(), 1 << 40)
        report = copy(DeviceSource(one.device()), DeviceTarget(bad), digests=True)
        with pytest.raises(MediaError) as found:
            verify(report, two.device())
        assert found.value.offset == 0


def test_a_failure_keeps_its_cause_and_what_was_done(source, target):
    with pmemkit.open(source) as one, pmemkit.open(target, create_size=8 * MIB) as two:
        device = two.device(layers=["fault=ops=write,nth=2"])
        with pytest.raises(CopyFailed) as failed:
            copy(DeviceSource(one.device()), DeviceTarget(device), buffer_size=MIB // 2)
        assert isinstance(failed.value.cause, MediaError)
        assert failed.value.report.size == MIB + MIB // 2
        assert failed.value.report.data_bytes == MIB // 2


def test_a_small_target_is_refused_by_the_engine_too(source):
    with pmemkit.open(source) as one, pmemkit.open("memfd:1M") as two:
        with pytest.raises(NoSpace):
            copy(DeviceSource(one.device()), DeviceTarget(two.device()))
        assert two.device().extents() == [(0, MIB, "hole")]
        with pytest.raises(InvalidArgument):
            copy(DeviceSource(two.device()), DeviceTarget(one.device()), buffer_size=0)


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_size", [1, 4096, 100_001, 64 * MIB])
def test_any_buffer_size_copies_the_same(source, buffer_size, tmp_path):
    if buffer_size == 1:
        source.write_bytes(os.urandom(300))
    with pmemkit.open(source) as one, (tmp_path / "out").open("w+b") as out:
        report = copy(
            DeviceSource(one.device()), StreamTarget(out.fileno()), buffer_size=buffer_size
        )
        assert report.size == one.size
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


def test_blocks_of_zeroes_become_holes_and_others_do_not(tmp_path):
    pattern = [b"x", b"\0", b"\0", b"y", b"\0"]
    data = b"".join(each * ZERO_BLOCK_SIZE for each in pattern) + b"\0" * 10
    path = tmp_path / "in"
    path.write_bytes(data)
    with path.open("rb") as file, pmemkit.open("memfd:1M") as region:
        report = copy(
            StreamSource(file.fileno()),
            DeviceTarget(region.device(), fresh=True),
            detect_zeroes=True,
            digests=True,
        )
        assert (report.data_bytes, report.zero_bytes) == (
            2 * ZERO_BLOCK_SIZE,
            3 * ZERO_BLOCK_SIZE + 10,
        )
        verify(report, region.device())
        assert region.device().read(0, len(data)) == data


def test_a_stream_in_small_pieces_fills_the_buffer():
    read_end, write_end = os.pipe()
    try:
        for _ in range(10):
            os.write(write_end, b"abc")
        os.close(write_end)
        buffer = bytearray(8)
        lengths = [piece.length for piece in StreamSource(read_end).pieces(buffer)]
        assert lengths == [8, 8, 8, 6]
    finally:
        os.close(read_end)


def test_progress_grows_to_the_end(source):
    with pmemkit.open(source) as one, pmemkit.open("memfd:8M") as two:
        seen = []
        copy(DeviceSource(one.device()), DeviceTarget(two.device()), progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == 8 * MIB


# --- on a terminal --------------------------------------------------------------------------------


def on_a_terminal(*words):
    """What a command shows on a terminal as its standard error."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*PMEM, *map(str, words)], stderr=theirs, env=environment(TERM="xterm")
        )
        os.close(theirs)
        shown = io.BytesIO()
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown.write(part)
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        os.close(ours)
    return shown.getvalue().decode()


def test_a_terminal_gets_a_bar_and_a_summary(source, target):
    shown = on_a_terminal("copy", source, target, "--verify")
    assert "MB/s" in shown or "MiB" in shown
    assert "8 MiB copied" in shown
    assert "verified" in shown


def test_quiet_is_quiet_on_a_terminal_too(source, target):
    assert on_a_terminal("copy", source, target, "--quiet") == ""
