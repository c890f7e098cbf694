"""``pmem read-infoblock`` and ``write-infoblock``, with ndctl as the referee for both."""

import json
import subprocess

import pytest
from cli_run import PATIENCE_SECONDS, call, complaint, done_well, pmem

MIB = 1 << 20
UUIDS = [
    *("-u", "6830f039-7914-423e-bad6-22bda8fde8d6"),
    *("-p", "ef83e49c-4c4a-4fae-b908-72e94675b1b7"),
]
SHAPES = [
    ["-m", mode, "-M", where, "-a", align, "-s", size, "-O", offset]
    for mode in ("fsdax", "devdax")
    for where in ("mem", "dev")
    for align, size, offset in (
        *((align, size, "0") for align in ("4K", "2M") for size in ("16M", "134086656", "1T")),
        *(("1G", size, "0") for size in ("4G", "1T")),
        ("4K", "1G", "8K"),
        ("2M", "64M", "1M"),
        ("1G", "4G", "16M"),
    )
]


def ndctl(*words, stdin=None):
    return subprocess.run(
        ["ndctl", *map(str, words)],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )


@pytest.fixture
def image(tmp_path):
    """A raw, a sector, an fsdax and a devdax namespace of 16 MiB each."""
    path = tmp_path / "disk.img"
    done_well("create-image", path, "--size", "64M", "--label-size", "128K")
    for mode in ("raw", "sector", "fsdax", "devdax"):
        done_well("create-namespace", path, "-m", mode, "-s", "16M", "-n", mode)
    return path


def head_of(path, place):
    with path.open("rb") as image:
        image.seek(place * 16 * MIB)
        return image.read(8192)


# --- against ndctl --------------------------------------------------------------------------------


@pytest.mark.peer("ndctl")
@pytest.mark.parametrize("words", SHAPES, ids=" ".join)
def test_what_is_written_is_what_ndctl_writes(words, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    done = done_well("write-infoblock", "-o", ours, *words, *UUIDS)
    assert done.stderr == ndctl("write-infoblock", "-o", theirs, *words, *UUIDS).stderr.decode()
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.peer("ndctl")
@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("words", [["-j"], ["-u"]])
def test_what_is_read_is_what_ndctl_reads(image, tmp_path, place, words):
    head = tmp_path / "head"
    head.write_bytes(head_of(image, place))
    theirs = json.loads(ndctl("read-infoblock", "-i", head, *words).stdout)
    ours = done_well("read-infoblock", "-i", head, *words).json()
    assert ours == theirs
    assert [list(each) for each in ours] == [list(each) for each in theirs]
    (named,) = done_well("read-infoblock", image, f"namespace0.{place}", *words).json()
    assert named == {"dev": f"namespace0.{place}"} | {
        key: value for key, value in theirs[0].items() if key != "file"
    }


@pytest.mark.peer("ndctl")
def test_a_btt_of_a_label_less_image_is_read_as_ndctl_reads_it(tmp_path):
    image, head = tmp_path / "bare.img", tmp_path / "head"
    done_well("create-image", image, "--size", "32M")
    done_well("create-namespace", image, "-m", "sector", "-l", "520")
    head.write_bytes(head_of(image, 0))
    (ours,) = done_well("read-infoblock", "-i", head, "-j").json()
    assert [ours] == json.loads(ndctl("read-infoblock", "-i", head, "-j").stdout)
    assert (ours["version"], ours["external_lbasize"]) == ("1.1", 520)


@pytest.mark.peer("ndctl")
def test_pipes_fit_together():
    ours = pmem("write-infoblock", "-c", "-s", "1G", text=False)
    assert json.loads(ndctl("read-infoblock", "-j", stdin=ours.stdout).stdout)[0]["npfns"] == 257536
    theirs = ndctl("write-infoblock", "-c", "-s", "1G").stdout
    done = pmem("read-infoblock", "-j", stdin=theirs, text=False)
    (record,) = json.loads(done.stdout)
    assert (record["file"], record["npfns"]) == ("<stdin>", 257536)
    assert done.stderr == b"read 1 infoblock\n"


# --- reading --------------------------------------------------------------------------------------


def test_a_dump_is_the_first_8_kib(image, tmp_path):
    done_well("read-infoblock", f"{image}:namespace0.2", "-o", tmp_path / "head")
    assert (tmp_path / "head").read_bytes() == head_of(image, 2)
    done = pmem("read-infoblock", image, "namespace0.2", text=False)
    assert done.stdout == head_of(image, 2)
    done = pmem("read-infoblock", image, "all", text=False)
    assert done.stdout == b"".join(head_of(image, place) for place in range(4))


def test_namespaces_without_a_block_are_named_and_left_out(image):
    done = done_well("read-infoblock", image, "-j")
    assert [each["dev"] for each in done.json()] == [f"namespace0.{n}" for n in (1, 2, 3)]
    assert "namespace0.0: there is no info block" in done.stderr
    done = call("read-infoblock", image, "namespace0.0", "-j")
    complaint(done, 12, "namespace0.0", "no info block in the first 8 KiB")


def test_a_damaged_block_is_named(image, tmp_path):
    with image.open("r+b") as file:
        file.seek(2 * 16 * MIB + 4096 + 64)
        file.write(b"\xff")
    done = call("read-infoblock", image, "namespace0.2", "-j")
    complaint(done, 12, "namespace0.2", "checksum")
    complaint(call("read-infoblock", image, "namespace0.2", "-V", "-o", tmp_path / "x"), 12)
    assert not (tmp_path / "x").exists()


def test_verify_refuses_the_block_of_another_namespace(image):
    block = head_of(image, 2)
    with image.open("r+b") as file:
        file.seek(2 * 16 * MIB)
        file.write(bytes(8192))
    done_well("create-namespace", image, "-e", "fsdax", "-f")
    with image.open("r+b") as file:
        file.seek(2 * 16 * MIB)
        file.write(block)
    done_well("read-infoblock", image, "fsdax", "-j")
    complaint(call("read-infoblock", image, "fsdax", "-j", "--verify"), 12, "parent_uuid")


def test_files_that_are_too_short_or_not_there(tmp_path):
    short = tmp_path / "short"
    short.write_bytes(bytes(4096))
    complaint(call("read-infoblock", "-i", short, "-j"), 2, short, "4096 bytes", "8192")
    complaint(call("read-infoblock", "-i", tmp_path / "no", "-j"), 11, "No such file")


# --- writing --------------------------------------------------------------------------------------


def test_the_size_is_that_of_the_file_which_is_there(tmp_path):
    path = tmp_path / "rootfs.img"
    path.write_bytes(b"\1" * (32 * MIB))
    done_well("write-infoblock", "-o", path, "-m", "fsdax")
    data = path.read_bytes()
    assert len(data) == 32 * MIB
    assert set(data[8192:]) == {1}
    (whole,) = done_well("list", path).json()
    assert (whole["mode"], whole["size"]) == ("fsdax", 30 * MIB)


def test_a_file_that_is_not_there_needs_a_size(tmp_path):
    complaint(call("write-infoblock", "-o", tmp_path / "x"), 2, "-s")
    assert not (tmp_path / "x").exists()
    complaint(call("write-infoblock"), 2, "PATH NAMESPACE")


def test_a_block_is_written_onto_a_namespace(image):
    done_well("destroy-namespace", image, "fsdax")
    done_well("create-namespace", image, "-m", "raw", "-s", "16M", "-n", "again")
    done_well("write-infoblock", f"{image}:namespace0.2", "-m", "devdax", "-M", "mem")
    (record,) = done_well("read-infoblock", image, "namespace0.2", "-j").json()
    # A label that names no abstraction lets every info block claim the namespace.
    (listed,) = done_well("list", image, "-n", "0.2", "-v").json()
    assert (listed["mode"], listed["map"]) == ("devdax", "mem")
    assert (record["uuid"], record["parent_uuid"]) == (listed["uuid"], listed["raw_uuid"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-s", "1M"], ["1 MiB", "no room"]),
        (["-s", "1G", "-a", "3M"], ["3145728"]),
        (["-s", "1G", "-a", "1G"], ["no room"]),
    ],
)
def test_shapes_that_cannot_be(words, parts):
    complaint(call("write-infoblock", "-c", *words), 2, *parts)
