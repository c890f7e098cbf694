"""A sector namespace whose info block is bad, served and copied by its backup."""

import subprocess
from pathlib import Path

import pytest
from cli_run import PATIENCE_SECONDS, done_well, pmem, refused, serving

import pmemkit
from pmemkit.formats.btt import BttInfo

MIB = 1 << 20
DATA = bytes(range(256)) * 64


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", "32M", "--label-size", "128K")
    done_well("create-namespace", path, "-m", "sector")
    with pmemkit.open(f"{path}:namespace0.0") as region, region.device() as device:
        device.write(0, DATA)
    with path.open("r+b") as file:
        file.write(bytes(4096))
    return f"{path}:namespace0.0"


def test_it_is_copied_and_served_by_the_backup(place, tmp_path, need):
    copy, socket, served = (tmp_path / name for name in ("copy", "socket", "served"))
    refused(pmem("copy", place, copy), 12, "info block is bad", "--repair")
    refused(pmem("serve", place, "--unix", socket), 12, "info block is bad", "--repair")
    refused(pmem("serve", place, "--unix", socket, "--backup-info-block"), 2, "open it read-only")
    done_well("copy", place, copy, "--backup-info-block")
    assert copy.read_bytes()[: len(DATA)] == DATA
    words = (place, "--unix", socket, "--read-only", "--backup-info-block")
    with serving(*words) as process:
        uri = process.stdout.readline().strip()
        subprocess.run([need("nbdcopy"), uri, served], check=True, timeout=PATIENCE_SECONDS)
    assert served.read_bytes() == copy.read_bytes()


def test_the_error_flag_is_said_when_it_is_served(place, tmp_path):
    """The flag stands in both info blocks; here the copy is put back with it."""
    path = place.partition(":")[0]
    done_well("check-namespace", path, "namespace0.0", "--repair")
    with Path(path).open("r+b") as file:
        block = bytearray(file.read(4096))
        block[48] |= 1
        file.seek(0)
        file.write(BttInfo.seal(bytes(block)))
    with serving(place, "--unix", tmp_path / "socket") as process:
        process.stdout.readline()
        assert "read-only: arena 0 carries the error flag" in process.stderr.readline()
