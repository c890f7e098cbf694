"""``pmem copy`` past the page cache and past buffers: every pair of ends, all that daxio does, bad
blocks, and copies that are interrupted."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from cli_run import PMEM, call, environment, pmem, refused

import pmemkit
from pmemkit.errors import Busy, MediaError, NotSupported
from pmemkit.media.badblocks import BadRun, note, read_bad_blocks
from pmemkit.storage.copying import DeviceSource, DeviceTarget, ZeroSource, copy
from pmemkit.storage.direct import Between, FromFile, IntoFile, carrier_for, copy_carried

MIB = 1 << 20
SIZE = 3 * MIB + 12_345


def blob(size, seed=1):
    return random.Random(seed).randbytes(size)


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def source(tmp_path):
    """A file with data, a hole of 1 MiB, and data."""
    path = tmp_path / "source.bin"
    data = bytearray(blob(SIZE))
    data[MIB : 2 * MIB] = bytes(MIB)
    with path.open("wb") as file:
        file.write(data[:MIB])
        file.seek(2 * MIB)
        file.write(data[2 * MIB :])
        os.fsync(file.fileno())
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.bin"


def in_process(*words):
    done = call(*words)
    return done.returncode, done.stdout, done.stderr


def copied(*words):
    """A copy in this process: what it says as JSON."""
    code, out, err = in_process("copy", *words, "--json")
    assert code == 0, err
    return json.loads(out)


# --- carriers -------------------------------------------------------------------------------------

RANGES = [(0, 0, None), (0, 0, 1), (100, 100, 2 * MIB), (4096, 8192, 70_000), (7, 0, SIZE - 7)]


@pytest.mark.parametrize("ring", [True, False], ids=["io_uring", "threads"])
@pytest.mark.parametrize("around", ["auto", "on", "off"])
@pytest.mark.parametrize("kind", ["memory", "lines", "file", "out"])
def test_every_pair_of_ends_carries_the_same_bytes(source, target, kind, around, ring):
    data = source.read_bytes()
    before = blob(SIZE + MIB, 2)
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    shared = directory / "shared"
    places = {"memory": f"memfd:{SIZE + MIB}", "lines": shared, "file": target, "out": target}
    where = places[kind]
    try:
        for start, offset, length in RANGES:
            count = SIZE - start if length is None else length
            first = source
            if kind == "out":
                # From memory into a file.
                first = shared
                first.write_bytes(data)
            if kind != "memory":
                where.write_bytes(before)
            force = {"granularity": "cacheline"} if kind == "lines" else {}
            with (
                pmemkit.open(first, read_only=True) as one,
                pmemkit.open(where, **force) as two,
            ):
                if kind == "memory":
                    two.device().write(0, before)
                carrier = carrier_for(one, two, around=around, ring=ring)
                assert isinstance(carrier, IntoFile if kind == "out" else FromFile)
                report = copy_carried(
                    DeviceSource(one.device(), start, length),
                    DeviceTarget(two.device(), start=offset),
                    carrier,
                )
                assert report.size == count
                expected = before[:offset] + data[start : start + count]
                expected += before[len(expected) :]
                assert digest(two.device().read(0, SIZE + MIB)) == digest(expected)
                done = carrier.describe()
                assert done["engine"] == ("io_uring" if ring else "threads")
                assert done["direct_bytes"] == 0 or around != "off"
                # A file behind a page cache takes bytes out of a buffer, a mapping does not.
                assert (done["buffered_bytes"] > 0) == (kind == "file")
    finally:
        # With whatever stands beside an image.
        shutil.rmtree(directory)


def test_mappings_are_copied_from_one_to_the_other():
    data = blob(SIZE)
    with pmemkit.open(f"memfd:{SIZE}") as one, pmemkit.open(f"memfd:{SIZE}") as two:
        one.device().write(0, data)
        carrier = carrier_for(one, two)
        assert isinstance(carrier, Between)
        report = copy_carried(DeviceSource(one.device()), DeviceTarget(two.device()), carrier)
        assert (report.size, two.device().read(0, SIZE)) == (SIZE, data)


def test_what_has_a_write_path_of_its_own_has_no_carrier(source, tmp_path):
    image = tmp_path / "sector.img"
    for words in (("create-image", image, "--size", "64M"), ("create-namespace", image)):
        more = ("--mode", "sector") if words[0] == "create-namespace" else ()
        assert in_process(*words, *more)[0] == 0
    name = f"{image}:namespace0.0"
    with (
        pmemkit.open(source, read_only=True) as one,
        pmemkit.open(name) as two,
        pytest.raises(NotSupported, match="mode sector"),
    ):
        carrier_for(one, two)
    with pmemkit.open(source, read_only=True) as one, pmemkit.open("memfd:4M") as two:
        two.device(cache="writeback", cache_size="1M")
        with pytest.raises(Busy):
            carrier_for(one, two)
    report = copied(source, name)
    assert (report["engine"], "mode sector" in report["notice"]) == ("buffer", True)
    assert copied(name, tmp_path / "back", "--len", SIZE)["copied"] == SIZE
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


# --- what daxio does ------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", ["on", "off"])
def test_len_skip_and_seek_in_every_combination(source, target, direct):
    data = source.read_bytes()
    for skip in (0, 1000):
        for seek in (8192, 77):
            for length in (None, 5000):
                before = blob(SIZE + 2 * MIB, 3)
                target.write_bytes(before)
                words = ["-i", source, "-o", target, "-k", skip, "-s", seek, "--direct", direct]
                words += [] if length is None else ["-l", length]
                part = data[skip:] if length is None else data[skip : skip + length]
                assert copied(*words)["copied"] == len(part)
                expected = before[:seek] + part + before[seek + len(part) :]
                assert digest(target.read_bytes()) == digest(expected)


def test_a_new_file_is_as_long_as_it_must_be(source, target):
    data = source.read_bytes()
    copied(source, target, "--seek", 5000, "--len", 10_000)
    assert target.read_bytes() == bytes(5000) + data[:10_000]


def test_streams_skip_and_end_too(source, target):
    data = source.read_bytes()
    done = pmem("copy", "--output", target, "--skip", 100, "--len", "2M", "--seek", 50,
                stdin=data, text=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert target.read_bytes() == bytes(50) + data[100 : 100 + 2 * MIB]
    done = pmem("copy", "--input", source, "--skip", 12, "--len", 5000, text=False)
    assert (done.returncode, done.stdout) == (0, data[12:5012])
    done = pmem("copy", "-", target, "--skip", 50, stdin=b"short", text=False)
    assert done.returncode == 0
    assert target.read_bytes() == bytes(50) + data[100 : 100 + 2 * MIB]


def test_zero_zeroes_what_it_is_told_to(target):
    data = blob(SIZE)
    target.write_bytes(data)
    assert copied("--zero", target, "--seek", 100, "--len", MIB)["zero_bytes"] == MIB
    assert target.read_bytes() == data[:100] + bytes(MIB) + data[100 + MIB :]
    assert copied("--zero", "--output", target)["zero_bytes"] == SIZE
    assert target.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--zero", "a", "b"), "too many"),
        (("--zero", "--input", "a", "b"), "no source"),
        (("--zero", "-"), "with a size"),
        (("--zero", "b", "--verify"), "compare"),
        (("a",), "required: TARGET"),
        (("a", "b", "c"), "too many"),
        (("a", "b", "--direct", "yes"), "invalid choice"),
    ],
)
def test_words_that_make_no_copy_are_refused(words, part, capsys):
    code, _, err = in_process("copy", *words)
    assert code == 2
    assert part in err


def test_ranges_that_are_not_there_are_refused_first(source, target):
    for words in (("--skip", SIZE + 1), ("--len", SIZE + 1), ("--skip", SIZE, "--len", 1)):
        code, _, err = in_process("copy", source, target, *words)
        assert code == 2 and "behind the end" in err, err
        assert not target.exists()
    target.write_bytes(bytes(SIZE))
    code, _, err = in_process("copy", source, target, "--seek", 1)
    assert code == 5 and "nothing was written" in err
    code, _, err = in_process("copy", source, "-", "--seek", 1)
    assert code == 2 and "--seek" in err
    assert target.read_bytes() == bytes(SIZE)


def test_holes_stay_holes_on_the_direct_way(source, target):
    report = copied(source, target, "--direct", "on")
    assert report["zero_bytes"] == MIB
    assert target.stat().st_blocks * 512 <= SIZE - MIB + 65536
    assert digest(target.read_bytes()) == digest(source.read_bytes())


def test_a_copy_that_cannot_be_direct_says_so_where_that_was_asked_for(source, target):
    code, _, err = in_process("copy", source, target, "--direct", "on", "--verify")
    assert code == 0
    assert "not all of it is direct: bytes are looked at" in err
    code, _, err = in_process("copy", source, target, "--verify")
    assert (code, err) == (0, "")
    code, _, err = in_process("copy", source, "memfd:8M", "--direct", "on", "--seek", 1)
    assert code == 0
    assert "not in step" in err or "direct I/O" in err


# --- bad blocks -----------------------------------------------------------------------------------


def test_bad_blocks_of_the_target_are_written_anew_or_refused(source, target):
    target.write_bytes(bytes(4 * MIB))
    note(str(target), "inject", BadRun(0, 3))
    note(str(target), "inject", BadRun(100, 2))
    code, _, err = in_process("copy", source, target, "--clear-bad-blocks", "no")
    assert code == 6 and "5 bad blocks" in err and "nothing was written" in err
    assert target.read_bytes() == bytes(4 * MIB)
    assert copied(source, target, "--seek", 700, "--clear-bad-blocks", "yes")["copied"] == SIZE
    # Block 0 lies before the range; block 1 is its ragged edge, and was zeroed before it.
    assert read_bad_blocks(str(target)) == (BadRun(0, 1),)
    assert target.read_bytes()[700 : 700 + SIZE] == source.read_bytes()
    code, _, err = in_process("copy", source, target, "-b", "no", "--seek", 512, "--len", 4096)
    assert (code, err) == (0, "")
    copied("--zero", target, "--len", 512)
    assert read_bad_blocks(str(target)) == ()


def test_bad_blocks_of_the_source_end_the_copy_and_nothing_is_made_up(source, target):
    note(str(source), "inject", BadRun(300, 1))
    code, _, err = in_process("copy", source, target)
    assert code == 6 and "bad media" in err and "bytes were copied" in err
    with pytest.raises(MediaError), pmemkit.open(source, read_only=True) as one:
        one.device().read(300 * 512, 1)
    assert copied(source, target, "--skip", 301 * 512, "--seek", 301 * 512)["copied"] > 0


# --- stopped in the middle ------------------------------------------------------------------------


def test_an_interrupted_copy_says_what_is_left_and_that_can_be_done(tmp_path, target):
    source = tmp_path / "large.bin"
    size = 96 * MIB
    with source.open("wb") as file:
        file.write(blob(MIB) * 96)
    # A layer that waits makes room for the signal.
    command = [*PMEM, "copy", source, target, "--target-layer", "delay=ops=write,seconds=0.2"]
    process = subprocess.Popen(
        list(map(str, command)), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not target.exists() or target.stat().st_blocks * 512 < 8 * MIB:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    told = [line for line in said.splitlines() if "the rest: " in line]
    rest = told[0].partition("the rest: ")[2].split()
    assert f"of {size} bytes were copied" in told[0]
    assert copied(source, target, *rest)["copied"] == int(rest[-1]) < size
    assert digest(target.read_bytes()) == digest(source.read_bytes())


def test_a_file_that_shrinks_meanwhile_is_an_error_with_the_bytes_moved(source):
    with pmemkit.open(source, read_only=True) as one, pmemkit.open("memfd:8M") as two:
        carrier = carrier_for(one, two)
        device = DeviceSource(one.device(), 2 * MIB)
        os.truncate(source, 2 * MIB + 70_000)
        with pytest.raises(Exception, match="ends") as failed:
            copy_carried(device, DeviceTarget(two.device()), carrier)
        assert failed.value.report.size <= 70_000


def test_zeroes_are_a_source_of_holes():
    with pmemkit.open("memfd:1M") as region:
        region.device().write(0, blob(MIB))
        report = copy(ZeroSource(MIB), DeviceTarget(region.device()))
        assert (report.zero_bytes, region.device().read(0, MIB)) == (MIB, bytes(MIB))


def test_a_wrong_place_is_refused_by_the_process_too(tmp_path):
    refused(pmem("copy", tmp_path / "no", "memfd:1M"), 11, tmp_path / "no")
