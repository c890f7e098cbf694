"""``pmem wear``: what it shows of what was counted; ``test_wear.py`` has the counting."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from pmemkit.storage import open_region
from pmemkit.storage.region import create_file

MIB = 1 << 20
LINES = 16 * 64


def pmem(*words, **options):
    command = [sys.executable, "-m", "pmemkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def image(tmp_path):
    """An image whose second 64 KiB was written once."""
    path = tmp_path / "disk.img"
    create_file(path, 16 * MIB)
    with open_region(path, wear="exact") as region:
        region.device().write(65536, bytes(65536))
    return path


def test_the_table_names_causes_and_amplification(image):
    ran = pmem("wear", image)
    assert ran.returncode == 0, ran.stderr
    rows = {line.split()[0]: line.split()[1:3] for line in ran.stdout.splitlines() if line}
    assert rows["data"] == ["65,536", "1,024"] == rows["all"]
    assert "for each byte of data: 1.00" in ran.stdout


def test_json_has_everything(image):
    told = json.loads(pmem("wear", image, "--json", "--rated-writes", "4").stdout)
    assert told["written"]["data"] == {"bytes": 65536, "lines": LINES}
    assert (told["bytes"], told["lines"], told["size"]) == (65536, LINES, 16 * MIB)
    assert (told["block_size"], told["block_lines_hottest"]) == (4096, 64)
    assert not told["blocks_sampled"]
    assert told["life_used_percentage"] == pytest.approx(100 * 65536 / (4 * 16 * MIB))
    assert told["life_used_percentage_hottest"] == pytest.approx(25)


def test_a_rating_in_bytes_is_the_same_as_one_in_writes(image):
    writes = json.loads(pmem("wear", image, "--json", "--rated-writes", "4").stdout)
    size = json.loads(pmem("wear", image, "--json", "--rated-bytes", "64M").stdout)
    assert writes == size


def test_what_was_never_written_and_what_is_not_there(tmp_path):
    create_file(tmp_path / "new.img", MIB)
    ran = pmem("wear", tmp_path / "new.img")
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}/new.img: nothing was counted yet\n")
    ran = pmem("wear", tmp_path / "none.img")
    assert ran.returncode not in (0, 2)
    assert "none.img" in ran.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_heat_map_shows_where(image, encoding):
    environment = {"COLUMNS": "64", "PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    ran = pmem("wear", image, "--heatmap", env=environment)
    assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stdout.splitlines() if len(line) == 64]
    # 4096 blocks of 4 KiB in 1024 cells: the written ones are in cells 4 to 7.
    hot = "#" if encoding == "ascii" else "█"
    assert "".join(rows) == "    " + 4 * hot + " " * 1016


def test_pictures(image, tmp_path):
    assert pmem("wear", image, "--plot", tmp_path / "wear.svg").returncode == 0
    root = ElementTree.parse(tmp_path / "wear.svg").getroot()
    fills = [each.get("fill") for each in root if each.get("fill", "").startswith("rgb")]
    # A square a block.
    assert len(fills) == 4096
    assert [number for number, fill in enumerate(fills) if fill == "rgb(255,0,0)"] == [
        *range(16, 32)
    ]
    ran = pmem("wear", image, "--plot", tmp_path / "wear.gif")
    assert ran.returncode != 0
    assert ".svg or .png" in ran.stderr


def test_a_png_where_matplotlib_is(image, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert pmem("wear", image, "--plot", tmp_path / "wear.png").returncode == 0
    assert (tmp_path / "wear.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b"\xff", b'{"version": 1, "checksum": 0}'])
def test_what_cannot_be_read_is_refused_and_can_be_forgotten(image, data):
    sidecar = image.with_name("disk.img.wear")
    sidecar.write_bytes(data)
    ran = pmem("wear", image)
    assert ran.returncode not in (0, 2)
    assert "--reset" in ran.stderr
    assert pmem("wear", image, "--reset").returncode == 0
    assert "nothing was counted" in pmem("wear", image).stdout
    sidecar.write_bytes(data)
    with open_region(image) as region:
        region.device().write(0, bytes(4096))
    assert json.loads(pmem("wear", image, "--json").stdout)["bytes"] == 4096


def test_a_device_of_this_machine_or_why_not():
    ran = pmem("wear", "nmem77")
    assert ran.returncode not in (0, 2)
    assert ran.stderr.startswith("pmem wear: ")


@pytest.mark.parametrize("rating", [("--rated-writes", "0"), ("--rated-bytes", "x")])
def test_senseless_ratings_are_refused(image, rating):
    assert pmem("wear", image, *rating).returncode != 0
