"""The harness itself: what goes in comes out as data, and nothing a guest does breaks that."""

import hashlib
import json
import lzma
import struct
import subprocess
from pathlib import Path

import pytest
from tools.guest import Dimm, Guest, GuestError, GuestFailedError, Result, StepResult

from tools import guest as command
from tools import guest_image

MIB = 1 << 20
LABEL_SIZE = 128 << 10

CREATE_MODES = """
create() { ndctl create-namespace -r region0 "$@"; }
create -m raw -s 32M -n plain
create -m sector -s 64M -l 4096 -n blocks
create -m fsdax -s 64M -M dev -n files
create -m devdax -s 64M -M mem -a 4K -n pages
"""
INIT_LABELS = """
ndctl disable-region all
ndctl init-labels -V 1.2 nmem0
ndctl enable-region all
"""
USE_MODES = """
echo raw > /tmp/text; dd if=/tmp/text of=/dev/pmem0 conv=notrunc 2> /dev/null
dd if=/in/pattern of=/dev/pmem0.1s bs=4096 2> /dev/null
mkfs.ext4 -q -b 4096 /dev/pmem0.2
mount -o dax -t ext4 /dev/pmem0.2 /mnt
grep -q 'dax=always' /proc/mounts
cp /in/pattern /mnt/pattern
"""
XFS = """
ndctl create-namespace -r region1 -m fsdax -s 320M -n big
mkfs.xfs -q -m reflink=0 /dev/pmem1
mkdir /tmp/xfs; mount -o dax -t xfs /dev/pmem1 /tmp/xfs
grep -q 'xfs.*dax=always' /proc/mounts
cp /in/pattern /tmp/xfs/pattern
"""
PATTERN = bytes(range(256)) * 1024 + b"an odd end"
PATTERN_SUM = hashlib.sha256(PATTERN).hexdigest()

FIRST_STEPS = {
    "dimms": "ndctl list -D",
    "size": "for region in 0 1; do cat /sys/bus/nd/devices/region$region/size; done",
    "iomem": "grep -i persistent /proc/iomem",
    "both": "echo out; echo err >&2; exit 7",
    "first failure": "false\necho never",
    "killed": "kill -9 $$",
    "bytes": "cat /in/pattern",
    "noise": "echo '<1>end of the world' > /dev/kmsg; echo; echo end; printf 'step 0 0 9 9'",
    "nothing": "",
    "labels": INIT_LABELS.replace("nmem0", "all"),
    "create": CREATE_MODES,
    "use": USE_MODES,
    "dax": "daxcopy write /dev/dax0.3 4090 < /in/pattern",
    "xfs": XFS,
    "no json": "echo '{'",
    "empty json": "ndctl list -i -N -b none 2> /dev/null || true",
}
SECOND_STEPS = {
    "list": "ndctl list -RN",
    "labels": "ndctl read-labels -j nmem0",
    "raw": "head -c 3 /dev/pmem0",
    "sector": f"head -c {len(PATTERN)} /dev/pmem0.1s | sha256sum",
    "fsck": "e2fsck -f -n /dev/pmem0.2 >&2; xfs_repair -n /dev/pmem1",
    "fsdax": "mount -o dax /dev/pmem0.2 /mnt; sha256sum < /mnt/pattern",
    "xfs": "mkdir /tmp/x; mount -o dax /dev/pmem1 /tmp/x; sha256sum < /tmp/x/pattern",
    "dax": f"daxcopy read /dev/dax0.3 4090 {len(PATTERN)} | sha256sum",
    "dax end": "daxcopy read /dev/dax0.3 0 1000000000 > /dev/null",
    "loop": "truncate -s 1M /tmp/l; losetup /dev/loop0 /tmp/l; blkid -p /dev/loop0 || echo blank",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for name, size_mib in (("first,with comma.img", 386), ("second.img", 514)):
        path = tmp_path_factory.mktemp("images") / name
        with path.open("wb") as image:
            image.truncate(size_mib * MIB)
        paths.append(path)
    return paths


def _dimms(images: list[Path]) -> list[Dimm]:
    return [Dimm(path, label_size_bytes=LABEL_SIZE) for path in images]


@pytest.fixture(scope="module")
def first(guest: Guest, images: list[Path]) -> Result:
    return guest.run(_dimms(images), FIRST_STEPS, files={"pattern": PATTERN})


@pytest.fixture(scope="module")
def second(guest: Guest, images: list[Path], first: Result) -> Result:
    return guest.run(_dimms(images), SECOND_STEPS)


def test_status_stdout_and_stderr_come_out_apart(first):
    both = first["both"]
    assert (both.status, both.stdout, both.stderr) == (7, b"out\n", b"err\n")
    with pytest.raises(GuestError, match=r"step both ended with 7\nout\nerr"):
        both.check()


def test_a_step_stops_at_its_first_failure_and_the_others_run(first):
    assert (first["first failure"].status, first["first failure"].stdout) == (1, b"")
    assert first["killed"].status == 128 + 9
    assert first["nothing"].check().stdout == b""
    assert first.powered_off and first.running is None


def test_output_is_binary_safe_and_nothing_passes_for_a_frame(first):
    assert first["bytes"].check().stdout == PATTERN
    assert first["noise"].check().stdout == b"\nend\nstep 0 0 9 9"
    assert "end of the world" in first.messages
    assert "end of the world" in first.console


def test_json_of_a_step(first):
    assert first["empty json"].json() == []
    with pytest.raises(GuestError, match="step no json: no JSON"):
        first["no json"].json()


def test_dimms_come_in_the_order_they_were_given(first):
    handles = {dimm["dev"]: dimm["handle"] for dimm in first["dimms"].json()}
    assert handles == {"nmem0": 1, "nmem1": 2}
    assert first["size"].text.split() == [str(384 * MIB), str(512 * MIB)]
    starts = [int(line.split("-")[0], 16) for line in first["iomem"].check().text.splitlines()]
    assert starts == [1 << 32, (1 << 32) + 384 * MIB]


def test_every_mode_can_be_made_and_used(first):
    for step in ("labels", "create", "use", "xfs"):
        first[step].check()


def test_what_was_made_is_there_in_the_next_boot(second):
    regions = {region["dev"]: region for region in second["list"].json()["regions"]}
    found = {
        (space["dev"], space["mode"], space["name"])
        for region in regions.values()
        for space in region["namespaces"]
    }
    assert found == {
        ("namespace0.0", "raw", "plain"),
        ("namespace0.1", "sector", "blocks"),
        ("namespace0.2", "fsdax", "files"),
        ("namespace0.3", "devdax", "pages"),
        ("namespace1.0", "fsdax", "big"),
    }
    (dimm,) = second["labels"].json()
    assert {index["minor"] for index in dimm["index"]} == {2}
    assert second["raw"].check().stdout == b"raw"
    second["fsck"].check()
    for step in ("sector", "fsdax", "xfs"):
        assert second[step].check().text.split()[0] == PATTERN_SUM, step
    assert second["loop"].check().text == "blank\n"


def test_devdax_is_written_and_read_through_mappings(guest, first, second):
    if "daxcopy" not in guest.programs:
        pytest.skip("no C compiler when the guest was built")
    first["dax"].check()
    assert second["dax"].check().text.split()[0] == PATTERN_SUM
    assert second["dax end"].status == 1
    assert "beyond the end" in second["dax end"].errors


def test_labels_lie_at_the_end_of_the_image(images, second):
    for path in images:
        assert command.guess_label_size(path) == LABEL_SIZE
    assert command.guess_label_size(images[0], 64 * MIB) is None


def test_a_hanging_step_is_ended_and_shown(guest):
    steps = {
        "before": "echo done",
        "hang": "echo '<1>I am stuck' > /dev/kmsg; sleep 1000",
        "after": "echo no",
    }
    with pytest.raises(GuestFailedError, match="during step hang") as caught:
        guest.run([], steps, step_timeout_seconds=2)
    assert "I am stuck" in str(caught.value)
    result = caught.value.result
    assert result["before"].check().text == "done\n"
    assert result["hang"].status is None and result["after"].status is None
    assert not result.powered_off


def test_a_whole_run_has_its_timeout_too(guest):
    with pytest.raises(GuestFailedError, match=r"did not end within 0\.5 seconds"):
        guest.run([], {"step": "true"}, timeout_seconds=0.5)


def test_e820_memory_and_a_kernel_that_dies(guest):
    steps = {
        "list": "ndctl list -BRNi",
        "fsdax": "ndctl create-namespace -f -e namespace0.0 -m fsdax",
        "die": "echo c > /proc/sysrq-trigger",
    }
    with pytest.raises(GuestFailedError, match="the guest died during step die") as caught:
        guest.run([], steps, memory="3G", kernel_arguments="memmap=64M!2G")
    result = caught.value.result
    (bus,) = result["list"].json()
    assert bus["provider"] == "e820"
    (region,) = bus["regions"]
    # This memory has a page map by itself, so ndctl calls even the whole of it fsdax.
    assert (region["size"], region["namespaces"][0]["mode"]) == (64 * MIB, "fsdax")
    assert result["fsdax"].json()["mode"] == "fsdax"
    assert "Kernel panic" in str(caught.value)


def test_the_command_line_as_json_with_a_read_only_dimm(guest, blank, tmp_path, capfd):
    image = blank("r.img", 64 * MIB)
    scripts = []
    for name, text in (("write", "echo x > /dev/pmem0"), ("never", "echo no")):
        scripts += ["--script", str(tmp_path / name)]
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = image.stat().st_mtime_ns
    words = ["run", "--dimm", f"{image},slot=1,readonly", "--json", "--stop-on-failure", *scripts]
    assert command.main(words) == 1
    result = json.loads(capfd.readouterr().out)
    assert [step["status"] for step in result["steps"].values()] == [1, None]
    assert "not permitted" in result["steps"][str(tmp_path / "write")]["stderr"]
    assert result["powered_off"] and image.stat().st_mtime_ns == before


def test_a_machine_that_qemu_refuses_is_said_so(guest, blank):
    with pytest.raises(GuestFailedError, match=r"QEMU ended with 1: .*label-size"):
        guest.run([Dimm(blank("l.img", 64 * MIB), label_size_bytes=65536)], {"step": "true"})


# --- without a boot ------------------------------------------------------------------------------


def test_frames_that_are_not_whole_did_not_end():
    whole = b"begin 0\nstep 0 3 2 1\nab!begin 1\nstep 1 0 0 0\ndmesg 2\nhiend\n"
    for cut in range(len(whole) + 1):
        result = command.parse_frames(whole[:cut], ["a", "b"])
        assert result["a"].status == (3 if cut >= whole.index(b"begin 1") else None)
        assert result["b"].status == (0 if cut >= whole.index(b"dmesg") else None)
        assert result.powered_off == (cut == len(whole))
    assert (result["a"].stdout, result["a"].stderr, result.messages) == (b"ab", b"!", "hi")


def test_dimm_options_are_those_of_qemu(tmp_path):
    image = tmp_path / "a,b.img"
    image.write_bytes(bytes(MIB))
    dimm = Dimm(image, label_size_bytes=LABEL_SIZE, slot=2, align=None, unarmed=True)
    backend, device = dimm.arguments(0)[1::2]
    path = str(image).replace(",", ",,")
    assert (
        backend == f"memory-backend-file,id=mem0,share=on,mem-path={path},size={MIB}"
        and device == "nvdimm,id=nv0,memdev=mem0,label-size=131072,slot=2,unarmed=on"
    )


def test_dimms_of_the_command_line(tmp_path):
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    assert Dimm.parse(str(image)) == Dimm(str(image))
    assert Dimm.parse(f"{image},label-size=128K,align=none,slot=3,size=512K,readonly") == Dimm(
        str(image), MIB // 2, LABEL_SIZE, None, 3, readonly=True
    )
    for wrong, message in (
        ("/no/such.img", "there is no image"),
        (f"{image},colour=red", "no option colour"),
        (f"{image},label-size=12Q", "is not a size"),
    ):
        with pytest.raises(GuestError, match=message):
            Dimm.parse(wrong)


def test_the_archive_is_one_that_cpio_reads(tmp_path, need):
    archive = command.Archive()
    archive.file("deep/down/file", b"content", 0o755)
    archive.file("deep/other", b"12345")
    archive.link("deep/link", "other")
    done = subprocess.run(
        [need("busybox"), "cpio", "-id"],
        input=archive.bytes(),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deep/down/file").read_bytes() == b"content"
    assert (tmp_path / "deep/down/file").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "deep/link").read_bytes() == b"12345"


def test_a_kernel_that_cannot_be_unpacked_here_is_booted_as_it_is():
    payload = lzma.compress(b"\x7fELF and no note")
    head = bytearray(1024)
    head[0x1F1] = 1
    for packed in (payload, b"packed in another way"):
        struct.pack_into("<II", head, 0x248, 0, len(packed))
        image = bytes(head) + packed + b"more"
        assert guest_image.bootable(image) == image


def test_a_damaged_directory_of_the_cache_is_not_used(tmp_path):
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initramfs.cpio").write_bytes(b"programs")
    assert guest_image.whole(tmp_path) is None
    manifest = {"sums": guest_image.sums(tmp_path)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert guest_image.whole(tmp_path) == manifest
    (tmp_path / "initramfs.cpio").write_bytes(b"program")
    assert guest_image.whole(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    assert guest_image.whole(tmp_path) is None


def test_the_command_line_gives_output_and_status(monkeypatch, guest, capfd):
    step = StepResult("command", 9, b"out\n", b"err\n")
    monkeypatch.setattr(Guest, "run", lambda *_, **__: Result({"command": step}, powered_off=True))
    assert command.main(["run", "--", "anything"]) == 9
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err\n")
    assert command.main(["build"]) == 0
    assert capfd.readouterr().out.strip() == str(guest.directory)


def test_the_command_line_says_what_is_wrong(capfd, guest):
    assert command.main(["run", "--dimm", "/no/such.img", "--", "true"]) == 125
    assert "there is no image /no/such.img" in capfd.readouterr().err


def test_a_missing_kernel_is_a_reason_to_skip(monkeypatch, tmp_path):
    monkeypatch.setenv("PMEMKIT_GUEST_KERNEL", str(tmp_path / "none.deb"))
    with pytest.raises(command.GuestUnavailableError, match=r"no kernel package .*none\.deb"):
        Guest.build()
