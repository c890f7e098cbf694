"""``pmem init-machine`` and ``pmem qemu-args``: dimms on paper, and QEMU attaching them."""

import json
import shlex
import subprocess
import tomllib
from itertools import pairwise

import pytest
from cli_run import PATIENCE_SECONDS, call, complaint, done_well

MIB = 1 << 20
LABELS = 128 << 10


@pytest.fixture
def machine(tmp_path):
    """A machine file with two dimms that were made with it."""
    path = tmp_path / "vm.toml"
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    done_well("init-machine", path, *images, "--create", "--size", "64M")
    return path


# --- init-machine ---------------------------------------------------------------------------------


def test_new_images_have_the_label_area_behind_their_region(machine, tmp_path):
    for name in ("a.img", "b.img"):
        assert (tmp_path / name).stat().st_size == 64 * MIB + LABELS
        assert (tmp_path / name).stat().st_blocks == 0
    regions = done_well("list", machine, "-R").json()
    assert [each["size"] for each in regions] == [64 * MIB, 64 * MIB]


def test_the_file_says_what_was_asked_for(tmp_path):
    path, image = tmp_path / "vm.toml", tmp_path / "a.img"
    options = ["--nature", "storage", "--numa-node", "1", "--endurance", "20P"]
    done_well("init-machine", path, image, "--create", "--size", "16M", *options)
    (dimm,) = tomllib.loads(path.read_text())["dimm"]
    assert dimm["path"] == "a.img"
    assert (dimm["nature"], dimm["numa_node"]) == ("storage", 1)
    assert (dimm["label_size"], dimm["endurance"]) == ("128KiB", "20PiB")


def test_an_existing_machine_file_stays_without_force(machine, tmp_path):
    before = machine.read_bytes()
    complaint(call("init-machine", machine, tmp_path / "a.img"), 2, machine, "exists", "--force")
    assert machine.read_bytes() == before
    done_well("init-machine", machine, tmp_path / "a.img", "--force")
    assert len(tomllib.loads(machine.read_text())["dimm"]) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.img", "b.img", "vm.toml"]


def test_existing_images_are_never_made_anew(tmp_path):
    image = tmp_path / "a.img"
    image.write_bytes(b"precious".ljust(16 * MIB + LABELS, b"\0"))
    done_well("init-machine", tmp_path / "vm.toml", image, "--create", "--size", "64M")
    assert image.stat().st_size == 16 * MIB + LABELS
    assert image.read_bytes()[:8] == b"precious"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["vm.toml", "new.img"], ["new.img"]),
        (["vm.toml", "new.img", "--create"], ["new.img", "--size"]),
        (["vm.toml", "new.img", "--create", "--size", "3M"], ["3145728", "2 MiB"]),
        (["machine", "new.img", "--create", "--size", "16M"], ["machine", ".toml"]),
        (["no/vm.toml", "new.img", "--create", "--size", "16M"], ["no"]),
        (["vm.toml", "new.img", "--create", "--size", "16M", "--align", "3M"], ["align"]),
        (["vm.toml", "new.img", "--create", "--size", "16M", "--label-size", "512"], ["512"]),
        (["vm.toml", "new.img", "--create", "--size", "16M", "--label-size", "4097"], ["4097"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, words, parts
):
    monkeypatch.chdir(tmp_path)
    done = call("init-machine", *words)
    assert done.returncode in (2, 11)
    complaint(done, done.returncode, *parts)
    assert not any(tmp_path.iterdir())


# --- qemu-args ------------------------------------------------------------------------------------


def values(words, option):
    return [value for name, value in pairwise(words) if name == option]


def plugged(words):
    """The dimms that a QEMU with these options has."""
    questions = [
        {"execute": "qmp_capabilities"},
        {"execute": "query-memory-devices"},
        {"execute": "quit"},
    ]
    command = ["qemu-system-x86_64", *words, "-display", "none", "-S", "-qmp", "stdio"]
    done = subprocess.run(
        command,
        input="".join(json.dumps(each) for each in questions),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    return next(each["return"] for each in replies if each.get("return"))


def test_each_dimm_is_a_backend_and_a_device(machine, tmp_path):
    words = done_well("qemu-args", machine, "--json").json()
    assert values(words, "-machine") == ["pc,nvdimm=on"]
    first, second = values(words, "-object")
    assert first.startswith("memory-backend-file,id=mem0,share=on,")
    assert f"mem-path={tmp_path / 'a.img'},size={64 * MIB + LABELS},align=" in first
    assert f"mem-path={tmp_path / 'b.img'}" in second
    assert values(words, "-device") == [
        f"nvdimm,id=nvdimm{n},memdev=mem{n},slot={n},label-size={LABELS}" for n in (0, 1)
    ]


def test_the_text_is_the_same_words_quoted_for_a_shell(machine):
    done = done_well("qemu-args", machine)
    assert shlex.split(done.stdout) == done_well("qemu-args", machine, "--json").json()


def test_an_image_without_a_machine_file_and_without_labels(tmp_path):
    done_well("create-image", tmp_path / "a.img", "--size", "16M")
    words = done_well("qemu-args", tmp_path / "a.img", "--json").json()
    (device,) = values(words, "-device")
    assert "label-size" not in device


def test_align_is_named_only_where_the_region_stays_as_large(tmp_path):
    good, odd = tmp_path / "good.img", tmp_path / "odd.img"
    done_well("create-image", good, "--size", "16M")
    done_well("create-image", odd, "--size", str(16 * MIB + 4096))
    (backend,) = values(done_well("qemu-args", good, "--json").json(), "-object")
    assert "align=2M" in backend or f"align={2 * MIB}" in backend
    done = done_well("qemu-args", odd, "--json")
    (backend,) = values(done.json(), "-object")
    assert ",align=" not in backend
    assert "multiple of 2 MiB" in done.stderr


def test_read_only_images_are_attached_unarmed(tmp_path, monkeypatch):
    done_well("create-image", tmp_path / "a.img", "--size", "16M")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    words = done_well("qemu-args", tmp_path / "a.img", "--json").json()
    assert "readonly=on" in values(words, "-object")[0]
    assert "unarmed=on" in values(words, "-device")[0]


def test_a_label_area_that_qemu_refuses_is_refused(tmp_path):
    image = tmp_path / "a.img"
    done_well("create-image", image, "--size", "16M")
    done = call("qemu-args", image, "--label-size", "64K")
    complaint(done, 2, image, "65536", "128 KiB")


def test_a_serial_number_that_qemu_cannot_give_is_refused(machine):
    machine.write_text(machine.read_text() + "serial = 7\n")
    complaint(call("qemu-args", machine), 2, "serial")


@pytest.mark.peer("qemu-system-x86_64")
def test_qemu_plugs_regions_of_the_sizes_and_addresses_that_are_listed(tmp_path):
    # The path has a comma, which separates properties, and a blank, which separates words.
    place = tmp_path / "x, y=z"
    place.mkdir()
    machine = place / "vm.toml"
    images = [place / f"{number}.img" for number in range(3)]
    done_well("init-machine", machine, *images, "--create", "--size", "32M")
    dimms = plugged(done_well("qemu-args", machine, "--json").json())
    from pmemkit.bus import machine_of, observe

    bus = observe(machine_of([machine]))
    assert len(dimms) == 3
    for device, dimm, region in zip(dimms, bus.dimms, bus.regions, strict=True):
        assert device["data"]["slot"] == dimm.spec.slot
        assert device["data"]["size"] == region.size
        assert device["data"]["addr"] == region.start


@pytest.mark.peer("qemu-system-x86_64")
def test_qemu_plugs_bare_images_of_any_size(tmp_path):
    images = []
    for number, size in enumerate((16 * MIB, 17 * MIB + 4096, 32 * MIB + LABELS)):
        images.append(tmp_path / f"{number}.img")
        done_well("create-image", images[-1], "--size", size)
    done = done_well("qemu-args", *images, "--json")
    from pmemkit.bus import machine_of, observe

    bus = observe(machine_of(images))
    dimms = plugged(done.json())
    assert [each["data"]["size"] for each in dimms] == [each.size for each in bus.regions]


@pytest.mark.peer("qemu-system-x86_64")
def test_qemu_takes_a_dimm_on_another_node_and_in_another_slot(tmp_path):
    machine = tmp_path / "vm.toml"
    done_well(
        *("init-machine", machine, tmp_path / "a.img", "--create", "--size", "16M"),
        *("--numa-node", "1"),
    )
    machine.write_text(machine.read_text().replace("slot = 0", "slot = 3"))
    (dimm,) = plugged(done_well("qemu-args", machine, "--memory", "512M", "--json").json())
    assert (dimm["data"]["slot"], dimm["data"]["node"]) == (3, 1)


# --- explain --------------------------------------------------------------------------------------


def test_explain_says_what_a_machine_file_declares(tmp_path):
    path = tmp_path / "vm.toml"
    done_well(
        *("init-machine", path, tmp_path / "a.img", "--create", "--size", "16M"),
        *("--nature", "memory"),
    )
    text = done_well("explain", path).stdout
    assert text.startswith("region0: memory: machine file, nmem0 says nature memory\n")
    assert 'would be storage with nature = "storage"' in text
    (verdict,) = done_well("explain", path, "region0", "--json").json()
    assert (verdict["dev"], verdict["nature"]) == ("region0", "memory")
    complaint(call("explain", path, "region7"), 2, "region7", "region0")


def test_explain_takes_what_is_not_known_for_storage(tmp_path):
    image = tmp_path / "a.img"
    done_well("create-image", image, "--size", "16M")
    assert (
        "its nature is not known, so it is taken for storage" in done_well("explain", image).stdout
    )
