"""``pmem create-namespace``, ``list``, ``destroy-namespace``, ``reconfigure``, ``enable-namespace``
and ``disable-namespace``; ``info``, ``copy`` and ``serve`` on what they make."""

import hashlib
import json
import os
import pty
import random
import re
import struct
import subprocess
from itertools import pairwise

import pytest
from cli_run import PATIENCE_SECONDS, PMEM, call, complaint, done_well, environment, pmem, serving

import pmemkit

MIB = 1 << 20
UUID = "6830f039-7914-423e-bad6-22bda8fde8d6"


@pytest.fixture
def image(tmp_path):
    """128 MiB with labels and no namespace."""
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", "128M", "--label-size", "128K")
    return path


@pytest.fixture
def bare(tmp_path):
    """128 MiB without a label area."""
    path = tmp_path / "bare.img"
    done_well("create-image", path, "--size", "128M")
    return path


@pytest.fixture
def machine(tmp_path):
    """Two dimms of 64 MiB whose label areas are blank."""
    path = tmp_path / "vm.toml"
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    done_well("init-machine", path, *images, "--create", "--size", "64M")
    return path


def create(path, *words):
    return done_well("create-namespace", path, *words).json()


def digest(path):
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def put(path, offset, data):
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(data)


# --- create-namespace -----------------------------------------------------------------------------


def test_defaults_are_ndctls(image):
    made = create(image)
    assert (made["dev"], made["mode"], made["map"]) == ("namespace0.0", "fsdax", "dev")
    assert (made["size"], made["align"], made["sector_size"]) == (124 * MIB, 2 * MIB, 512)
    assert made["blockdev"] == "pmem0"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "raw"], {"mode": "raw", "size": 32 * MIB, "sector_size": 512}),
        (["-m", "raw", "-l", "4096"], {"mode": "raw", "sector_size": 4096}),
        (["-m", "sector"], {"mode": "sector", "sector_size": 4096, "blockdev": "pmem0s"}),
        (["-m", "sector", "-l", "520"], {"mode": "sector", "sector_size": 520}),
        (["-m", "safe", "-l", "512"], {"mode": "sector", "sector_size": 512}),
        (["-m", "fsdax", "-M", "mem"], {"map": "mem", "size": 30 * MIB}),
        (["-m", "memory", "-a", "4K"], {"mode": "fsdax", "align": 4096}),
        (["-m", "devdax"], {"mode": "devdax", "chardev": "dax0.0", "align": 2 * MIB}),
        (["-m", "dax", "-M", "mem", "-a", "4K"], {"mode": "devdax", "map": "mem"}),
        (["-m", "raw", "-n", "my disk", "-u", UUID], {"name": "my disk", "uuid": UUID}),
        (["-m", "raw", "-t", "pmem", "--no-autolabel"], {"mode": "raw"}),
    ],
)
def test_options_are_ndctls_and_list_says_the_same(image, words, expected):
    made = create(image, "-s", "32M", *words)
    assert made | expected == made
    assert done_well("list", image).json() == [made]


def test_verbose_has_the_uuid_of_the_label_and_the_node(image):
    made = create(image, "-s", "32M", "-u", UUID, "-v")
    assert made["raw_uuid"] == UUID
    assert made["uuid"] != UUID
    assert made["numa_node"] == 0


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["-s", "17M"], 2, ["17825792", "16777216 (16 MiB) or 33554432 (32 MiB)"]),
        (["-s", "256M"], 5, ["256 MiB", "largest free extent of region0, 128 MiB"]),
        (["-s", "128M", "-a", "1G"], 2, ["134217728", "1 GiB"]),
        (["-m", "sector", "-l", "1000"], 2, ["1000", "520"]),
        (["-m", "raw", "-a", "2M"], 2, ["raw", "alignment"]),
        (["-a", "3M"], 2, ["3145728"]),
        (["-n", "x" * 64], 2, ["64 bytes", "63"]),
        (["-r", "region7"], 2, ["'region7'", "region0"]),
    ],
)
def test_refusals_name_the_value_and_what_is_legal(image, words, code, parts):
    before = digest(image)
    complaint(call("create-namespace", image, *words), code, *parts)
    assert digest(image) == before


@pytest.mark.parametrize("words", [["-m", "ext4"], ["-M", "none"], ["-u", "1234"], ["-s", "x"]])
def test_wrong_words_are_wrong_usage(image, words):
    done = call("create-namespace", image, *words)
    assert done.returncode == 2
    assert "usage: pmem create-namespace" in done.stderr


def test_a_blank_label_area_is_initialised_and_that_is_said(machine):
    done = done_well("create-namespace", machine, "-m", "raw", "-s", "16M")
    assert done.json()["dev"] == "namespace0.0"
    assert "nmem0: the label area was blank and is initialised, version 1.2" in done.stderr
    found = done_well("list", machine, "-RN").json()["regions"]
    assert [len(each.get("namespaces", [])) for each in found] == [1, 1]
    assert found[1]["namespaces"][0]["size"] == 64 * MIB


def test_without_autolabel_the_label_area_stays_blank(machine, tmp_path):
    done_well("create-namespace", machine, "-m", "sector", "--no-autolabel")
    assert not any((tmp_path / "a.img").read_bytes()[-(128 << 10) :])


def test_the_first_region_with_room_is_taken_and_others_are_not_locked(machine, tmp_path):
    assert create(machine, "-m", "raw", "-s", "48M")["dev"] == "namespace0.0"
    with pmemkit.open(f"{machine}:namespace0.0"):
        assert create(machine, "-m", "raw", "-s", "32M")["dev"] == "namespace1.0"
    assert create(machine, "-m", "raw", "-s", "16M", "-r", "1")["dev"] == "namespace1.1"
    with pmemkit.open(f"{machine}:namespace0.0"):
        done = call("create-namespace", machine, "-m", "raw", "-r", "region0")
        complaint(done, 9, tmp_path / "a.img", f"this process ({os.getpid()}) has it open")


def test_as_many_as_fit(image):
    made = done_well("create-namespace", image, "-c", "-m", "raw", "-s", "32M").json()
    assert [each["dev"] for each in made] == [f"namespace0.{n}" for n in range(4)]
    assert len({each["uuid"] for each in made}) == 4
    complaint(call("create-namespace", image, "-c", "-m", "raw"), 5, "no free extent")


def test_a_label_less_image_gets_an_info_block_and_boots_without_ndctl(bare):
    made = create(bare, "-m", "fsdax")
    assert (made["mode"], made["size"]) == ("fsdax", 124 * MIB)
    block = bare.read_bytes()[4096:8192]
    assert block[:16] == b"NVDIMM_PFN_INFO\0"
    assert not any(block[32:48])
    done = call("create-namespace", bare, "-m", "fsdax")
    complaint(done, 2, bare, "namespace0.0 carries a PFN info block")


@pytest.mark.parametrize("words", [["-s", "16M"], ["-n", "x"], ["-m", "raw"]])
def test_what_a_label_less_image_cannot_have(bare, words):
    complaint(call("create-namespace", bare, *words), 2, bare, "label-less")


@pytest.mark.parametrize(
    ("offset", "magic", "what"),
    [
        (0x438, b"\x53\xef", "ext4"),
        (0, b"XFSB", "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (100, b"anything", "data in its first bytes"),
    ],
)
def test_data_on_a_label_less_image_are_kept_without_force(bare, offset, magic, what):
    put(bare, offset, magic)
    before = digest(bare)
    complaint(call("create-namespace", bare), 2, bare, "label-less", what, "-f")
    assert digest(bare) == before
    assert create(bare, "-f")["mode"] == "fsdax"


def test_data_under_a_blank_label_area_are_kept_without_force(machine, tmp_path):
    put(tmp_path / "a.img", 0, b"LUKS\xba\xbe")
    before = digest(tmp_path / "a.img")
    # The next region is blank, and is taken.
    assert create(machine, "-s", "16M")["dev"] == "namespace1.0"
    complaint(call("create-namespace", machine, "-r", "0"), 2, "region0", "a LUKS volume", "-f")
    assert digest(tmp_path / "a.img") == before
    assert create(machine, "-s", "16M", "-r", "0", "-f")["dev"] == "namespace0.0"


# --- list -----------------------------------------------------------------------------------------


def shape(value):
    """Which keys stand inside which."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items() if isinstance(each, (dict, list))}
    return [shape(each) for each in value[:1]]


@pytest.fixture
def filled(machine):
    create(machine, "-r", "0", "-m", "raw", "-s", "16M", "-n", "one")
    create(machine, "-r", "0", "-m", "fsdax", "-s", "32M", "-n", "two")
    create(machine, "-r", "1", "-m", "sector", "-s", "16M", "-n", "three", "-u", UUID)
    return machine


def listed(*words):
    return done_well("list", *words).json()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-N", [{}]),
        ("-R", [{}]),
        ("-D", [{}]),
        ("-RN", {"regions": [{"namespaces": [{}]}]}),
        ("-RD", {"dimms": [{}], "regions": [{"mappings": [{}]}]}),
        ("-DN", {"dimms": [{}], "namespaces": [{}]}),
        ("-B", [{}]),
        (
            "-BDRN",
            [{"dimms": [{}], "regions": [{"mappings": [{}], "namespaces": [{}]}]}],
        ),
    ],
)
def test_how_things_stand_inside_each_other(filled, words, expected):
    assert shape(listed(filled, words)) == expected


def test_idle_ones_are_the_seeds(filled):
    devs = [each["dev"] for each in listed(filled, "-Ni")]
    assert devs == ["namespace0.0", "namespace0.1", "namespace0.2", "namespace1.0", "namespace1.1"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["-m", "fsdax"], ["two"]),
        (["-r", "region1"], ["three"]),
        (["-r", "0"], ["one", "two"]),
        (["-d", "nmem1"], ["three"]),
        (["-d", "0", "-m", "raw"], ["one"]),
        (["-n", "namespace0.1"], ["two"]),
        (["-n", "0.1"], ["two"]),
        (["-n", "three"], ["three"]),
        (["-n", "all"], ["one", "two", "three"]),
        (["-n", "nonsense"], []),
    ],
)
def test_filters(filled, words, names):
    assert [each["name"] for each in listed(filled, *words)] == names


def test_regions_are_filtered_by_what_is_in_them(filled):
    assert [each["dev"] for each in listed(filled, "-R", "-m", "sector")] == ["region1"]
    assert [each["dev"] for each in listed(filled, "-D", "-r", "1")] == ["nmem1"]


def test_a_mode_that_there_is_not(filled):
    complaint(call("list", filled, "-m", "turbo"), 2, "'turbo'", "fsdax")


def test_numbers_for_people_are_those_of_ndctl(image):
    create(image, "-m", "raw", "-s", "32M", "-u", UUID)
    # What ndctl 76.1 printed for such a region, up to its sizes.
    assert listed(image, "-Ru") == {
        "dev": "region0",
        "size": "128.00 MiB (134.22 MB)",
        "align": "16.00 MiB (16.78 MB)",
        "available_size": "96.00 MiB (100.66 MB)",
        "max_available_extent": "96.00 MiB (100.66 MB)",
        "type": "pmem",
        "iset_id": "0xba90120012b4dc",
        "persistence_domain": "unknown",
        "path": str(image),
    }
    assert listed(image, "-Du")["phys_id"] == "0"
    assert listed(image, "-Nu")["size"] == "32.00 MiB (33.55 MB)"


# --- destroy-namespace ----------------------------------------------------------------------------


def test_destroying_one_by_name_number_uuid_or_path(image):
    for number in range(4):
        create(image, "-m", "raw", "-s", "16M", "-n", f"n{number}", "-u", f"{number}" + UUID[1:])
    for words in ([image, "n0"], [image, "0.0"], [image, "2" + UUID[1:]]):
        done = done_well("destroy-namespace", *words)
        assert (done.stdout, done.stderr) == ("", "destroyed 1 namespace\n")
    assert [each["name"] for each in listed(image)] == ["n3"]
    gone = done_well("destroy-namespace", f"{image}:namespace0.0", "--json").json()
    assert [each["name"] for each in gone] == ["n3"]
    assert listed(image) == []


def test_a_name_that_two_have_destroys_neither(image):
    first, second = (create(image, "-m", "fsdax", "-s", "16M", "-n", "twin") for _ in range(2))
    complaint(call("destroy-namespace", image, "twin"), 2, image, "several", "0.0, namespace0.1")
    # The uuid that list shows is that of the info block.
    done_well("destroy-namespace", image, second["uuid"].upper())
    assert listed(image) == [first]


def test_destroying_all_of_them_or_those_of_a_region(filled):
    done = done_well("destroy-namespace", filled, "all", "-r", "0")
    assert done.stderr.splitlines()[-1] == "destroyed 2 namespaces"
    assert [each["name"] for each in listed(filled)] == ["three"]
    done_well("destroy-namespace", filled, "all", "-f")
    assert listed(filled) == []


def test_a_label_less_namespace_is_raw_again_and_that_is_said(bare):
    create(bare, "-m", "sector")
    done = done_well("destroy-namespace", bare, "namespace0.0")
    assert "namespace0.0 is label-less" in done.stderr
    assert "raw now" in done.stderr
    assert listed(bare)[0]["mode"] == "raw"
    complaint(
        call("destroy-namespace", bare, "namespace0.0"), 2, bare, "label-less", "nothing to destroy"
    )


def test_what_could_be_repaired_goes_with_force_only(image):
    create(image, "-m", "sector", "-s", "32M")
    put(image, 100, b"\xff")
    done = call("destroy-namespace", image, "namespace0.0")
    complaint(done, 12, "namespace0.0 is damaged", "--force")
    assert len(listed(image)) == 1
    done_well("destroy-namespace", image, "namespace0.0", "-f")
    assert listed(image) == []


@pytest.mark.parametrize("command", ["destroy-namespace", "enable-namespace", "check-namespace"])
def test_the_namespace_has_to_be_named_and_to_exist(image, command):
    create(image, "-m", "sector", "-s", "32M")
    complaint(call(command, image), 2, "say which namespace")
    complaint(call(command, image, "namespace0.7"), 2, "'namespace0.7'", "namespace0.0")


def test_an_interleaved_set_is_shown_and_not_changed(machine):
    machine.write_text(machine.read_text() + "\n[[region]]\ndimms = [0, 1]\n")
    done_well("init-labels", machine, "-V", "1.2")
    complaint(call("create-namespace", machine, "-m", "raw"), 3, "interleaved over 2 dimms")


# --- reconfigure ----------------------------------------------------------------------------------


def test_without_a_yes_nothing_is_changed(image):
    create(image, "-m", "raw", "-s", "64M", "-n", "data")
    put(image, 0x438, b"\x53\xef")
    before = digest(image)
    for words in (
        ["reconfigure", image, "namespace0.0", "-m", "fsdax"],
        ["create-namespace", image, "-e", "namespace0.0", "-m", "fsdax"],
    ):
        done = call(*words)
        complaint(done, 2, "namespace0.0 would lose its data", "--yes")
        assert "namespace0.0 'data': raw, 64 MiB of data, becomes fsdax" in done.stderr
        assert "lost: an ext2, ext3 or ext4 file system" in done.stderr
        assert done.stdout == ""
    assert digest(image) == before


@pytest.mark.parametrize("first", ["raw", "sector", "fsdax", "devdax"])
@pytest.mark.parametrize("second", ["raw", "sector", "fsdax", "devdax"])
def test_from_each_mode_to_each(image, bare, first, second):
    create(image, "-m", first, "-s", "32M", "-n", "data")
    done = done_well("reconfigure", image, "namespace0.0", "-m", second, "--yes")
    (found,) = listed(image)
    assert done.json() == found
    assert (found["mode"], found["name"]) == (second, "data")
    if first != "raw":
        create(bare, "-m", first)
    done = done_well("create-namespace", bare, "-f", "-e", "namespace0.0", "-m", second)
    assert done.json()["mode"] == second
    assert listed(bare) == [done.json()]


def test_mode_and_name_stay_where_nothing_is_said(image):
    create(image, "-m", "devdax", "-s", "32M", "-n", "data")
    made = done_well("create-namespace", image, "-e", "0.0", "-f", "-M", "mem").json()
    assert (made["mode"], made["map"], made["name"]) == ("devdax", "mem", "data")


def typed_in(answer, *words):
    """Runs a command on a terminal that somebody types at."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [*PMEM, *map(str, words)],
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    os.close(inside)
    try:
        os.write(terminal, answer.encode())
        out, error = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
        os.close(terminal)
    return process.returncode, out, error


def test_on_a_terminal_it_asks(image):
    create(image, "-m", "raw", "-s", "32M")
    before = digest(image)
    words = ["reconfigure", image, "namespace0.0", "-m", "sector"]
    code, out, error = typed_in("yes\n", *words)
    assert (code, out) == (2, "")
    assert "not confirmed, nothing was changed" in error
    assert digest(image) == before
    code, out, error = typed_in("namespace0.0\n", *words)
    assert code == 0, error
    assert json.loads(out)["mode"] == "sector"


def test_signatures_behind_a_btt_and_an_info_block_are_seen(image):
    create(image, "-m", "fsdax", "-s", "32M")
    with pmemkit.open(f"{image}:namespace0.0") as region, region.device() as device:
        device.write(0, b"XFSB")
    done = call("reconfigure", image, "namespace0.0", "-m", "raw")
    assert "an XFS file system" in done.stderr


# --- enable-namespace, disable-namespace ----------------------------------------------------------


def test_enable_says_in_which_mode(filled):
    done = done_well("enable-namespace", filled, "all")
    assert re.findall(r"enables it as (\w+)", done.stdout) == ["raw", "fsdax", "sector"]
    assert done.stderr.splitlines()[-1] == "enabled 3 namespaces"
    assert [each["name"] for each in done_well("enable-namespace", filled, "two", "--json").json()]


def test_enable_says_why_not(bare):
    create(bare, "-m", "fsdax")
    # Version 1.4 of the block, map on media, with page descriptors that no kernel has.
    block = bytearray(bare.read_bytes()[4096:8192])
    struct.pack_into("<H", block, 92, 8)
    from pmemkit.formats.infoblock import PfnInfo

    put(bare, 4096, PfnInfo.seal(bytes(block)))
    done = call("enable-namespace", bare, "namespace0.0")
    complaint(done, 3, bare, "namespace0.0 would stay disabled", "page_struct_size")


def test_disable_names_who_has_it_open(filled):
    with pmemkit.open(f"{filled}:namespace0.0"):
        done = call("disable-namespace", filled, "all")
        complaint(done, 9, "namespace0.0", f"this process ({os.getpid()}) has it open")
        done_well("disable-namespace", filled, "namespace0.1")
    done = done_well("disable-namespace", filled, "all")
    assert done.stderr.splitlines()[-1] == "disabled 3 namespaces"


# --- info, copy, serve ----------------------------------------------------------------------------


def test_the_map_of_a_region(image):
    create(image, "-m", "raw", "-s", "32M", "-n", "one")
    create(image, "-m", "fsdax", "-s", "32M")
    done_well("destroy-namespace", image, "one")
    facts = done_well("info", image, "--json").json()
    (dimm,), (region,) = facts["dimms"], facts["regions"]
    assert (dimm["label_version"], dimm["slots"], dimm["labels"]) == ("1.2", 510, 1)
    assert (dimm["slot"], region["cookie"]) == (0, 0x00BA90120012B4DC)
    assert [(each["offset"], each["size"]) for each in region["free"]] == [
        (0, 32 * MIB),
        (64 * MIB, 64 * MIB),
    ]
    (namespace,) = region["namespaces"]
    assert (namespace["offset"], namespace["data_size"]) == (32 * MIB, 30 * MIB)
    text = done_well("info", image).stdout
    (bar,) = re.findall(r"\[(.*)\]", text)
    assert [set(part) for part in bar.split("|")] == [{"."}, {"0"}, {"."}]
    assert "labelled" in text
    assert "509 of 510" not in text
    assert "namespace0.0, fsdax, 30 MiB of data" in text


def test_the_map_says_label_less_and_notes_what_is_odd(bare, filled):
    create(bare, "-m", "fsdax")
    text = done_well("info", bare).stdout
    assert "label-less" in text
    assert "no label area" in text
    text = done_well("info", filled).stdout
    assert text.count("region") >= 2
    assert "note: region0 and region1 share the 128 MiB memory section" in text


def test_the_map_of_a_region_accounts_for_every_byte(image):
    create(image, "-m", "raw", "-s", "48M")
    done_well("init-labels", image, "--label-size", "2M", "-f")
    create(image, "-m", "raw", "-s", "16M")
    rows = re.findall(r"(0x[0-9a-f]+) -\s+(0x[0-9a-f]+)", done_well("info", image).stdout)
    places = [(int(start, 16), int(end, 16)) for start, end in rows]
    assert places[0][0] == 0
    assert all(one[1] == two[0] for one, two in pairwise(places))
    assert places[-1][1] == done_well("list", image, "-R").json()[0]["size"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "raw"], {"mode": "raw", "page_map": "none", "page_map_bytes": 0}),
        (["-m", "fsdax"], {"page_map": "dev", "page_map_bytes": 7680 * 64}),
        (["-m", "devdax", "-M", "mem"], {"page_map": "mem", "page_map_bytes": 7680 * 64}),
        (["-m", "sector", "-l", "512"], {"mode": "sector", "page_map": "none"}),
    ],
)
def test_info_of_a_namespace(image, words, expected):
    made = create(image, "-s", "32M", *words)
    facts = done_well("info", f"{image}:namespace0.0", "--json").json()
    assert facts | expected == facts
    assert facts["namespace"]["size"] == 32 * MIB
    assert facts["namespace"]["data_size"] == made["size"]
    text = done_well("info", f"{image}:namespace0.0").stdout
    assert "namespace0.0, labelled, uuid" in text
    assert ("sectors of 512 bytes are old or new" in text) == (made["mode"] == "sector")


def test_an_image_with_labels_is_not_one_namespace(image):
    create(image, "-m", "raw", "-s", "32M")
    for words in (["copy", image, "x"], ["serve", image]):
        complaint(call(*words), 2, image, "has labels", "namespace0.0 (raw)")


def test_bytes_go_into_a_namespace_and_come_back(image, tmp_path):
    create(image, "-m", "raw", "-s", "16M")
    create(image, "-m", "fsdax", "-s", "32M")
    data, back = tmp_path / "data", tmp_path / "back"
    data.write_bytes(os.urandom(MIB))
    before = image.read_bytes()
    done_well("copy", data, f"{image}:namespace0.1", "--verify", "--quiet")
    after = image.read_bytes()
    start = 16 * MIB + 2 * MIB
    assert after[start : start + MIB] == data.read_bytes()
    assert after[:start] + before[start : start + MIB] + after[start + MIB :] == before
    done_well("copy", f"{image}:namespace0.1", back, "--quiet")
    assert back.read_bytes()[:MIB] == data.read_bytes()
    assert len(back.read_bytes()) == 30 * MIB


def test_a_namespace_that_is_not_there_is_not_made_by_a_copy(image, tmp_path):
    data = tmp_path / "data"
    data.write_bytes(bytes(4096))
    complaint(call("copy", data, f"{image}:namespace0.0"), 2, image, "'namespace0.0'", "none")
    complaint(call("copy", data, f"{tmp_path}/no.img:namespace0.0"), 11, "No such file")
    assert {each.name for each in tmp_path.iterdir()} - {"disk.img.wear"} == {"data", "disk.img"}


def test_a_sector_namespace_is_copied_to_and_from(image, tmp_path):
    create(image, "-m", "sector", "-s", "32M")
    data, back = tmp_path / "data", tmp_path / "back"
    data.write_bytes(random.Random(1).randbytes(100_001))
    assert call("copy", "--verify", data, f"{image}:namespace0.0").returncode == 0
    assert call("copy", f"{image}:namespace0.0", back).returncode == 0
    assert back.read_bytes()[:100_001] == data.read_bytes()
    assert call("check-namespace", image, "namespace0.0").returncode == 0


@pytest.mark.peer("nbdinfo")
@pytest.mark.parametrize("mode", ["raw", "sector"])
def test_a_namespace_is_served(image, need, mode):
    made = create(image, "-m", mode, "-s", "32M")
    with serving(f"{image}:namespace0.0", "--tcp", "127.0.0.1:0") as server:
        uri = server.stdout.readline().strip()
        found = subprocess.run(
            [need("nbdinfo"), "--json", uri],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
        (export,) = json.loads(found.stdout)["exports"]
        assert (export["export-size"], export["is_read_only"]) == (made["size"], False)
        done = pmem("create-namespace", image, "-m", "raw", "-s", "16M")
        # What only reads the image leaves it open to readers, not to writers.
        assert done.returncode == 9
        assert f"process {server.pid} has it open" in done.stderr
        server.terminate()
        server.communicate(timeout=PATIENCE_SECONDS)
