"""``pmem init-labels``, ``zero-labels``, ``read-labels``, ``write-labels``, ``check-labels`` and
``recookie``."""

import json
from pathlib import Path

import pytest
from cli_run import call, complaint, done_well, pmem

import pmemkit
from pmemkit.formats.labels import read_area

MIB = 1 << 20
AREA = 128 << 10
GOLDEN = Path(__file__).resolve().parents[1] / "kernel" / "golden"


@pytest.fixture
def blank(tmp_path):
    """64 MiB and a label area that nobody initialised."""
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", 64 * MIB + AREA)
    return path


@pytest.fixture
def labelled(tmp_path):
    """64 MiB with two raw namespaces."""
    path = tmp_path / "labelled.img"
    done_well("create-image", path, "--size", "64M", "--label-size", "128K")
    for name in ("one", "two"):
        done_well("create-namespace", path, "-m", "raw", "-s", "16M", "-n", name)
    return path


def area_of(path, size=AREA):
    return path.read_bytes()[-size:]


def names(path, *more):
    return [each["name"] for each in done_well("list", path, *more).json()]


# --- init-labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "minor", "slots"), [([], 1, 1020), (["-V", "1.2"], 2, 510)])
def test_init_labels_says_what_ndctl_says(blank, words, minor, slots):
    done = done_well("init-labels", blank, *words)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "initialized 1 nmem"
    found = read_area(area_of(blank))
    assert (found.current.header.minor, found.current.header.nslot) == (minor, slots)
    assert done_well("list", blank).json() == []


def test_init_labels_of_another_size(blank):
    done_well("init-labels", blank, "--label-size", "1M")
    assert read_area(area_of(blank, MIB)).current is not None
    assert done_well("list", blank, "-R").json()[0]["size"] == 63 * MIB + AREA


def test_labels_that_are_there_are_kept_without_force(labelled):
    before = labelled.read_bytes()
    complaint(call("init-labels", labelled), 2, labelled, "labelled already", "2 labels", "--force")
    assert labelled.read_bytes() == before
    done_well("init-labels", labelled, "-f")
    assert done_well("list", labelled).json() == []


def test_data_at_the_end_are_kept_without_force(blank):
    with blank.open("r+b") as image:
        image.seek(-4096, 2)
        image.write(b"precious")
    complaint(call("init-labels", blank), 2, blank, "131072 bytes hold data", "--force")
    assert area_of(blank, 4096)[:8] == b"precious"
    done_well("init-labels", blank, "-f")


def test_a_label_less_namespace_with_data_is_kept_without_force(blank):
    with blank.open("r+b") as image:
        image.write(b"XFSB")
    complaint(call("init-labels", blank), 2, blank, "label-less", "an XFS file system", "--force")
    done_well("create-namespace", blank, "-f", "-m", "sector")
    complaint(call("init-labels", blank), 2, blank, "131072 bytes hold data", "--force")
    assert read_area(area_of(blank)).current is None
    done_well("init-labels", blank, "-f")


def test_a_region_that_becomes_misaligned_is_noted(tmp_path):
    image = tmp_path / "disk.img"
    done_well("create-image", image, "--size", "64M")
    done = done_well("init-labels", image)
    assert f"Grow the file by {AREA} bytes" in done.stderr


def test_dimms_of_a_machine_are_chosen_by_name_or_number(tmp_path):
    machine = tmp_path / "vm.toml"
    images = [tmp_path / f"{n}.img" for n in range(3)]
    done_well("init-machine", machine, *images, "--create", "--size", "16M")
    assert "initialized 2 nmems" in done_well("init-labels", machine, "nmem0", "2").stderr
    states = [read_area(area_of(each)).current is not None for each in images]
    assert states == [True, False, True]
    done = call("check-labels", machine, "--json")
    assert done.returncode == 12
    assert [each["labelled"] for each in json.loads(done.stdout)] == states
    assert "successfully verified 2 nmem labels" in done.stderr
    complaint(call("init-labels", machine, "nmem3"), 2, "'nmem3'", "nmem0, nmem1, nmem2")


def test_an_image_in_use_is_left_alone(labelled):
    with pmemkit.open(f"{labelled}:namespace0.0"):
        complaint(call("init-labels", labelled, "-f"), 9, labelled, "has it open")
    assert names(labelled) == ["one", "two"]


# --- read-labels ----------------------------------------------------------------------------------


def golden_image(case, path, region=256 * MIB):
    """An image with the label area that a kernel left, as far as it was kept."""
    head = (GOLDEN / case / "nmem0.labels.bin").read_bytes()
    with path.open("wb") as image:
        image.truncate(region + AREA)
        image.seek(region)
        image.write(head)
    return path


@pytest.mark.parametrize(
    "case", ["initialised-v1.1", "initialised-v1.2", "modes-v1.1", "modes-v1.2", "destroyed-v1.2"]
)
def test_read_labels_is_what_ndctl_printed_for_the_same_area(tmp_path, case):
    image = golden_image(case, tmp_path / "disk.img")
    expected = json.loads((GOLDEN / case / "read-labels.json").read_text())
    done = done_well("read-labels", image, "-j")
    assert done.json() == expected
    assert list(done.json()[0]["label"][0] if done.json()[0]["label"] else {}) == list(
        expected[0]["label"][0] if expected[0]["label"] else {}
    )
    assert done.stderr == "read 1 nmem\n"


def test_index_blocks_only(labelled):
    (record,) = done_well("read-labels", labelled, "-I", "-j").json()
    assert list(record) == ["dev", "index"]
    assert [each["nslot"] for each in record["index"]] == [510, 510]


def test_numbers_for_people_are_ndctls(labelled):
    (record,) = done_well("read-labels", labelled, "-u").json()
    two = next(each for each in record["label"] if each["name"] == "two")
    assert (two["dpa"], two["rawsize"]) == ("0x1000000", "16.00 MiB (16.78 MB)")
    assert two["isetcookie"] == "0xba90120012b4dc"


def test_a_dump_is_the_area_byte_for_byte(labelled, tmp_path):
    dump = tmp_path / "dump"
    done_well("read-labels", labelled, "-o", dump)
    assert dump.read_bytes() == area_of(labelled)
    assert pmem("read-labels", labelled, text=False).stdout == area_of(labelled)
    assert pmem("read-labels", labelled, "-I", text=False).stdout == area_of(labelled)[:512]
    part = pmem("read-labels", labelled, "-s", 256, "-O", 512, text=False).stdout
    assert part == area_of(labelled)[512:768]


def test_dumps_of_several_dimms_are_joined(labelled, tmp_path):
    other = tmp_path / "other.img"
    done_well("create-image", other, "--size", "64M", "--label-size", "128K")
    machine, dump = tmp_path / "vm.toml", tmp_path / "dump"
    done_well("init-machine", machine, labelled, other)
    done_well("read-labels", machine, "-o", dump)
    assert dump.read_bytes() == area_of(labelled) + area_of(other)


def test_parts_that_are_not_there_are_refused(labelled):
    complaint(call("read-labels", labelled, "-s", "1", "-O", "128K"), 2, "1 bytes at 131072")
    complaint(call("read-labels", labelled, "-O", "1M"), 2, "at 1048576")
    assert call("read-labels", labelled, "-I", "-s", "256").returncode == 2


def test_an_image_without_labels_is_told_so(blank):
    complaint(call("read-labels", blank), 2, blank, "label-less", "pmem init-labels")


# --- write-labels, zero-labels --------------------------------------------------------------------


def test_a_dump_brings_namespaces_back(labelled, tmp_path):
    dump = tmp_path / "dump"
    done_well("read-labels", labelled, "-o", dump)
    before = labelled.read_bytes()
    done_well("destroy-namespace", labelled, "all")
    assert done_well("list", labelled).json() == []
    done = done_well("write-labels", labelled, "-i", dump)
    assert done.stderr == "wrote 1 nmem\n"
    assert names(labelled) == ["one", "two"]
    assert labelled.read_bytes() == before
    written = pmem("write-labels", labelled, stdin=dump.read_bytes(), text=False)
    assert written.returncode == 0
    assert labelled.read_bytes() == before


def test_dumps_that_do_not_fit_are_refused(labelled, tmp_path):
    before = labelled.read_bytes()
    dump = tmp_path / "dump"
    dump.write_bytes(bytes(AREA + 1))
    complaint(call("write-labels", labelled, "-i", dump), 2, labelled, AREA + 1)
    complaint(call("write-labels", labelled, "-i", dump, "-s", AREA + 2), 2, AREA + 2, AREA + 1)
    dump.write_bytes(b"")
    complaint(call("write-labels", labelled, "-i", dump), 2, "dump has 0")
    complaint(call("write-labels", labelled, "-i", tmp_path / "no"), 11, "No such file")
    assert labelled.read_bytes() == before


def test_zeroed_labels_leave_a_label_less_image(labelled):
    assert done_well("zero-labels", labelled).stderr == "zeroed 1 nmem\n"
    assert not any(area_of(labelled))
    (whole,) = done_well("list", labelled).json()
    assert whole["size"] == 64 * MIB + AREA
    complaint(call("check-labels", labelled), 12, "successfully verified 0 nmem label")
    complaint(call("zero-labels", labelled), 2, labelled, "no label area", "--label-size")


def test_a_part_can_be_zeroed(labelled):
    done = done_well("zero-labels", labelled, "-s", "256", "-O", "256", "--json")
    assert done.json() == {"nmem0": 256}
    assert not any(area_of(labelled)[256:512])
    complaint(call("zero-labels", labelled, "-s", "256", "-O", "128K"), 2, "256 bytes at 131072")


# --- check-labels ---------------------------------------------------------------------------------


def test_a_good_area(labelled):
    done = done_well("check-labels", labelled)
    assert "2 slots in use, 508 free" in done.stdout
    assert done.stderr == "successfully verified 1 nmem label\n"


def test_a_damaged_area_is_named_and_exits_12(labelled):
    with labelled.open("r+b") as image:
        image.seek(-AREA + 60, 2)
        image.write(b"\xff")
    done = call("check-labels", labelled)
    assert done.returncode == 12
    assert "index block" in done.stdout
    done = call("check-labels", labelled, "--json")
    (record,) = json.loads(done.stdout)
    assert (record["labelled"], len(record["findings"]) > 0) == (True, True)


# --- recookie -------------------------------------------------------------------------------------


def test_an_image_that_moved_to_another_slot_is_adopted(labelled):
    assert done_well("list", labelled, "--slot", "1").json() == []
    done = call("list", labelled, "--slot", "1")
    assert "isetcookie" in done.stderr
    assert "pmem recookie" in done.stderr
    done = done_well("recookie", labelled, "--slot", "1", "--json")
    assert done.stderr == "adopted 2 labels\n"
    assert {each["isetcookie"] for each in done.json()["nmem0"]} == {0x00BA901C0012B4DD}
    assert names(labelled, "--slot", "1") == ["one", "two"]
    assert names(labelled) == ["one", "two"]
    assert done_well("recookie", labelled, "--slot", "1").stderr == "adopted 0 labels\n"


def test_recookie_of_a_bare_image_needs_the_slot(labelled):
    complaint(call("recookie", labelled), 2, "--slot")


def test_recookie_of_a_machine_file_takes_its_slots(labelled, tmp_path):
    machine = tmp_path / "vm.toml"
    done_well("init-machine", machine, labelled)
    machine.write_text(machine.read_text().replace("slot = 0", "slot = 5"))
    assert done_well("list", machine).json() == []
    done_well("recookie", machine)
    assert names(machine) == ["one", "two"]


def test_recookie_of_an_image_without_labels(blank):
    complaint(call("recookie", blank, "--slot", "1"), 2, blank, "label")
