"""``pmem check-namespace``: findings, repairs, exit codes, and what is no sector namespace."""

import hashlib
import json
import os
import struct

import pytest
from cli_run import call, complaint, done_well

import pmemkit
from pmemkit.formats.btt import BttInfo

MIB = 1 << 20


@pytest.fixture(params=["1.1", "1.2", "label-less"])
def image(request, tmp_path):
    """A sector namespace of 16 MiB or more, made of labels of either version, or of none."""
    path = tmp_path / "disk.img"
    if request.param == "label-less":
        done_well("create-image", path, "--size", "17M")
        done_well("create-namespace", path, "-m", "sector", "-l", "512")
    else:
        words = ["--label-size", "128K", "--label-version", request.param]
        done_well("create-image", path, "--size", "64M", *words)
        done_well("create-namespace", path, "-m", "sector", "-s", "32M", "-l", "512")
    return path


def start_of(path):
    """Where the arena begins in the image, and its info block."""
    with path.open("rb") as image:
        for start in (0, 4096):
            image.seek(start)
            block = image.read(4096)
            if block.startswith(b"BTT_ARENA_INFO"):
                return start, BttInfo.unpack(block)
    raise AssertionError("there is no BTT")


def put(path, offset, data):
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(data)


def digest(path):
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def test_a_good_one(image):
    before = digest(image)
    done = done_well("check-namespace", image, "namespace0.0")
    assert "namespace0.0: clean (1 arena" in done.stdout
    assert done.stderr == "checked 1 namespace\n"
    for words in (["all"], ["namespace0.0", "-R"], ["namespace0.0", "-R", "-L"]):
        done_well("check-namespace", image, *words)
    assert digest(image) == before


def test_json(image):
    (record,) = done_well("check-namespace", f"{image}:namespace0.0", "--json").json()
    assert (record["dev"], record["clean"], record["findings"]) == ("namespace0.0", True, [])
    assert record["sectors"] == start_of(image)[1].external_nlba


@pytest.mark.parametrize("damage", ["info", "info2", "log"])
def test_what_can_be_repaired(image, damage):
    start, info = start_of(image)
    put(
        image,
        {"info": start, "info2": start + info.info2off, "log": start + info.logoff}[damage],
        b"\xff" * 64,
    )
    before = digest(image)
    done = call("check-namespace", image, "namespace0.0")
    assert done.returncode == 12
    assert "can be repaired" in done.stdout
    assert "--repair repairs it" in done.stdout
    assert digest(image) == before
    done = done_well("check-namespace", image, "namespace0.0", "--repair")
    assert "(repaired)" in done.stdout
    done_well("check-namespace", image, "namespace0.0")
    assert done_well("list", image).json()[0]["mode"] == "sector"


def test_what_cannot_be_repaired_is_left_as_it_is(image):
    start, info = start_of(image)
    put(image, start + info.mapoff + 40, struct.pack("<I", 0xC0000000 | info.internal_nlba))
    before = digest(image)
    for words in ([], ["--repair"], ["-R", "-L"]):
        done = call("check-namespace", image, "namespace0.0", *words, "--json")
        assert done.returncode == 12
        (record,) = json.loads(done.stdout)
        assert not record["clean"]
        assert any("sector 10" in each["message"] for each in record["findings"])
    assert "beyond repair" in call("check-namespace", image, "namespace0.0", "-R").stdout
    assert digest(image) == before


def test_rewriting_the_log_goes_with_a_repair(image):
    done = call("check-namespace", image, "namespace0.0", "--rewrite-log")
    complaint(done, 2, "--repair")


def test_one_in_use_is_checked_with_force_and_never_repaired(image):
    # A reader shares; what holds it alone is a writer, as a repair would be.
    from pmemkit.media import open_medium

    opened = open_medium(image)
    try:
        for words in ([], ["-R"], ["-R", "-f"]):
            done = call("check-namespace", image, "namespace0.0", *words)
            complaint(done, 9, image, f"this process ({os.getpid()}) has it open")
        done_well("check-namespace", image, "namespace0.0", "-f")
    finally:
        opened.close()


@pytest.mark.parametrize("mode", ["raw", "fsdax", "devdax"])
def test_what_is_no_sector_namespace_is_told_so(tmp_path, mode):
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", "64M", "--label-size", "128K")
    done_well("create-namespace", path, "-m", mode, "-s", "32M")
    done = call("check-namespace", path, "namespace0.0")
    complaint(done, 3, path, "namespace0.0 is", mode)
    assert done_well("check-namespace", path, "all").stderr.endswith("checked 0 namespaces\n")


def test_a_destroyed_one_is_not_there(image):
    done_well("destroy-namespace", image, "namespace0.0")
    done = call("check-namespace", image, "namespace0.0")
    if done.returncode == 12:
        # A label-less one stays, and the copy of its info block with it; what is raw is checked
        # when it is named, and not repaired over what was put there since.
        assert "needs to be restored from its copy" in done.stdout
        assert done_well("check-namespace", image, "all", "-R").stdout == ""
        put(image, 0, b"XFSB")
        done = call("check-namespace", image, "namespace0.0", "-R")
        complaint(done, 2, image, "namespace0.0 is raw and holds an XFS file system")
    else:
        complaint(done, 2, image, "'namespace0.0' is no namespace here")


def test_data_survive_a_repair(tmp_path):
    """Sectors that the reader sees before and after are the same."""
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", "17M")
    done_well("create-namespace", path, "-m", "sector", "-l", "512")
    start, info = start_of(path)
    put(path, start + info.dataoff, b"first sector")
    put(path, start + info.info2off, bytes(4096))
    done_well("check-namespace", path, "namespace0.0", "-R")
    with pmemkit.open(f"{path}:namespace0.0") as region, region.device() as device:
        assert device.read(0, 12) == b"first sector"
