"""``pmem create-image``, ``pmem list``, ``pmem info``."""

import json
import os

import pytest
from cli_run import pmem, refused

import pmemkit
from pmemkit.cli.show_info import page_tables_bytes

MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    assert pmem("create-image", path, "--size", "16M").returncode == 0
    return path


# --- create-image ---------------------------------------------------------------------------------


def test_an_image_is_sparse(tmp_path):
    path = tmp_path / "big.img"
    done = pmem("create-image", path, "--size", "1G")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path) in done.stdout
    assert path.stat().st_size == 1 << 30
    assert path.stat().st_blocks * 512 < MIB


def test_creating_prints_what_list_prints(tmp_path):
    path = tmp_path / "disk.img"
    created = pmem("create-image", path, "--size", "1.5M", "--json")
    assert json.loads(created.stdout) == json.loads(pmem("list", path).stdout)
    assert json.loads(created.stdout)[0]["size"] == 3 * MIB // 2


def test_an_existing_file_is_not_overwritten(image):
    image.write_bytes(b"precious")
    refused(pmem("create-image", image, "--size", "1M"), 11, image, "exists", "--force")
    assert image.read_bytes() == b"precious"


def test_force_empties_it(image):
    image.write_bytes(b"precious")
    assert pmem("create-image", image, "--size", "1M", "--force").returncode == 0
    assert image.stat().st_size == MIB
    assert image.stat().st_blocks == 0
    assert image.read_bytes() == bytes(MIB)


def test_force_does_not_empty_what_is_in_use(image):
    with pmemkit.open(image) as region, region.device() as device:
        device.write(0, b"precious")
        done = pmem("create-image", image, "--size", "1M", "--force")
        refused(done, 9, image, f"process {os.getpid()} has it open")
        assert device.read(0, 8) == b"precious"
    assert image.stat().st_size == 16 * MIB


def test_force_empties_no_device():
    done = pmem("create-image", "/dev/null", "--size", "1M", "--force")
    refused(done, 3, "/dev/null")


@pytest.mark.parametrize("size", ["0", "1000", "4097"])
def test_sizes_that_are_no_whole_pages_are_refused(tmp_path, size):
    done = pmem("create-image", tmp_path / "x", "--size", size)
    refused(done, 2, tmp_path / "x", size, "multiple of 4096")
    assert not (tmp_path / "x").exists()


def test_a_size_the_file_system_cannot_have_leaves_nothing(tmp_path):
    done = pmem("create-image", tmp_path / "x", "--size", str(2**63 - 4096))
    refused(done, 11, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("words", "slots"), [([], 510), (["--label-version", "1.1"], 1020)])
def test_a_label_area_lies_behind_the_region(tmp_path, words, slots):
    path = tmp_path / "disk.img"
    done = pmem("create-image", path, "--size", "64M", "--label-size", "128K", *words, "--json")
    (region,) = json.loads(done.stdout)
    assert (region["size"], region["available_size"]) == (64 * MIB, 64 * MIB)
    assert path.stat().st_size == 64 * MIB + 128 * 1024
    assert f"{slots} free" in pmem("check-labels", path).stdout
    assert json.loads(pmem("list", path).stdout) == []


def test_a_labelled_image_can_be_emptied(tmp_path):
    path = tmp_path / "disk.img"
    pmem("create-image", path, "--size", "64M", "--label-size", "128K")
    pmem("create-namespace", path, "-m", "raw")
    assert pmem("create-image", path, "--size", "16M", "--force").returncode == 0
    assert path.read_bytes() == bytes(16 * MIB)


@pytest.mark.parametrize("size", ["512", "3K", "129K", "128M"])
def test_a_label_area_that_would_not_be_found_again_is_refused(tmp_path, size):
    done = pmem("create-image", tmp_path / "x", "--size", "64M", "--label-size", size)
    refused(done, 2, tmp_path / "x", "a label area of", "128 KiB")
    assert not (tmp_path / "x").exists()


def test_a_directory_that_is_not_there(tmp_path):
    refused(pmem("create-image", tmp_path / "no" / "x", "--size", "1M"), 11, "No such file")


# --- list -----------------------------------------------------------------------------------------


def test_list_has_ndctls_fields(image):
    (namespace,) = json.loads(pmem("list", image).stdout)
    assert namespace["dev"] == "namespace0.0"
    assert (namespace["mode"], namespace["size"]) == ("raw", 16 * MIB)
    assert namespace["sector_size"] == 512


def test_list_regions_and_namespaces(image, tmp_path):
    other = tmp_path / "other.img"
    pmem("create-image", other, "--size", "1M")
    found = json.loads(pmem("list", "-R", "-N", image, other).stdout)
    assert [each["dev"] for each in found["regions"]] == ["region0", "region1"]
    devs = [each["namespaces"][0]["dev"] for each in found["regions"]]
    assert devs == ["namespace0.0", "namespace1.0"]


def test_list_for_people_has_one_object(image):
    assert json.loads(pmem("list", "-u", image).stdout)["size"] == "16.00 MiB (16.78 MB)"


def test_list_without_images_is_the_machine():
    done = pmem("list")
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), list)


def test_list_works_while_an_image_is_served(image):
    with pmemkit.open(image):
        assert pmem("list", image).returncode == 0


def test_list_refuses_what_is_not_there(tmp_path):
    refused(pmem("list", tmp_path / "no"), 11, tmp_path / "no", "No such file")


# --- info -----------------------------------------------------------------------------------------


def info(*words, **options):
    done = pmem("info", *words, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_info_says_what_it_is_and_what_it_promises(image):
    facts = info(image)
    assert (facts["path"], facts["size"], facts["kind"]) == (str(image), 16 * MIB, "file")
    assert (facts["nature"], facts["personality"]) == ("unknown", "storage")
    assert facts["granularity"] in ("byte", "cacheline", "page")
    assert facts["why"]
    assert facts["durability"]
    assert facts["cache"]["mount"]["cache"] == "off"
    assert facts["cache"]["serve"]["cache_because"]
    assert (facts["page_map"], facts["page_map_bytes"]) == ("none", 0)
    assert facts["cpu_flush"]


def test_info_counts_data_and_holes(image):
    with pmemkit.open(image) as region, region.device() as device:
        device.write(MIB, b"x" * MIB)
    facts = info(image)
    assert (facts["data_bytes"], facts["hole_bytes"]) == (MIB, 15 * MIB)
    assert facts["allocated_bytes"] >= MIB


def test_info_works_while_the_image_is_in_use_and_locks_nothing(image):
    with pmemkit.open(image):
        assert info(image)["size"] == 16 * MIB


def test_info_for_people(image):
    done = pmem("info", image)
    assert done.returncode == 0
    for word in ("granularity:", "why:", "durability:", "page tables:", "page map:", "CPU:"):
        assert word in done.stdout
    assert "storage never has one" in done.stdout


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, ["--granularity", "cacheline"], "cacheline"),
        ({"PMEMKIT_GRANULARITY": "byte"}, [], "byte"),
        ({"PMEM2_FORCE_GRANULARITY": "CACHE_LINE"}, [], "cacheline"),
        ({"PMEMKIT_GRANULARITY": "byte"}, ["--granularity", "page"], "page"),
    ],
)
def test_info_shows_overrides(image, environment, options, expected):
    facts = info(image, *options, env=environment)
    assert facts["granularity"] == expected
    assert any(f"says {expected}" in sentence for sentence in facts["why"])


def test_info_refuses_a_word_that_is_no_granularity(image):
    done = pmem("info", image, env={"PMEMKIT_GRANULARITY": "fine"})
    refused(done, 2, image, "PMEMKIT_GRANULARITY", "'fine'")


def test_info_takes_a_namespace_of_a_machine_file_and_no_options_for_it(tmp_path):
    machine = tmp_path / "vm.toml"
    words = ["--create", "--size", "16M", "--nature", "memory"]
    assert pmem("init-machine", machine, tmp_path / "a.img", *words).returncode == 0
    facts = info(f"{machine}:namespace0.0")
    assert (facts["nature"], facts["namespace"]["labelled"]) == ("memory", False)
    done = pmem("info", f"{machine}:namespace0.0", "--slot", "1")
    refused(done, 2, "machine file")


def test_info_of_memory():
    facts = info("anonymous:1M")
    assert facts["volatile"]
    assert facts["durability"].startswith("none")
    assert facts["sharing"] == "private"


@pytest.mark.parametrize(
    ("size", "leaf", "expected"),
    [
        (0, 4096, 0),
        (4096, 4096, 4096),
        (2 * MIB, 4096, 4096),
        (2 * MIB + 1, 4096, 3 * 4096),
        (1 << 30, 4096, 513 * 4096),
        (1 << 40, 4096, (2**19 + 2**10 + 2 + 1) * 4096),
        (1 << 30, 2 * MIB, 4096),
    ],
)
def test_the_bill_of_page_tables(size, leaf, expected):
    if os.sysconf("SC_PAGE_SIZE") != 4096:
        pytest.skip("the expected numbers are those of 4 KiB pages")
    assert page_tables_bytes(size, leaf) == expected
