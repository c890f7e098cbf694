"""Whole programs of others as clients: libnbd's tools, QEMU's, the kernel's, fio."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_served import MIB, Served, run, serve_image

SIZE = 64 * MIB


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_image(tmp_path, size=SIZE) as served:
        yield served


def scattered_file(path: Path, seed: int) -> Path:
    """A sparse file with data of odd sizes at odd places."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(40):
            file.seek(rng.randrange(SIZE - MIB))
            file.write(rng.randbytes(rng.randrange(1, MIB)))
        file.truncate(SIZE)
    return path


# --- libnbd ------------------------------------------------------------------------------------


@pytest.mark.peer("nbdinfo")
def test_nbdinfo_json(served: Served) -> None:
    (told,) = json.loads(run("nbdinfo", "--json", served.uri).stdout)["exports"]
    expected = {
        "export-size": SIZE,
        "description": "a disk of the tests",
        "is_read_only": False,
        "is_rotational": False,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
        "contexts": ["base:allocation"],
    }
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        expected[f"can_{ability}"] = True
    assert {name: told.get(name) for name in expected} == expected


@pytest.mark.peer("nbdinfo")
def test_nbdinfo_list(served: Served) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", served.uri).stdout)
    assert [export["export-name"] for export in told["exports"]] == ["disk", "frozen"]
    assert [export["is_read_only"] for export in told["exports"]] == [False, True]


@pytest.mark.peer("nbdinfo")
def test_nbdinfo_size_and_abilities(served: Served) -> None:
    assert int(run("nbdinfo", "--size", served.uri).stdout) == SIZE
    abilities = "connect cache df fast-zero flush fua multi-conn read structured trim write zero"
    for ability in abilities.split():
        run("nbdinfo", "--can", ability, served.uri)
    frozen = served.uri_of("frozen")
    run("nbdinfo", "--is", "read-only", frozen)
    for ability in ("trim", "write", "zero", "fast-zero"):
        assert run("nbdinfo", "--can", ability, frozen, check=False).returncode == 2, ability
    assert run("nbdinfo", served.uri_of("nothing"), check=False).returncode == 1


@pytest.mark.peer("nbdinfo", "qemu-io")
def test_nbdinfo_map(served: Served) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 1 4M 2M", "-c", "flush", served.uri)
    told = json.loads(run("nbdinfo", "--map", "--json", served.uri).stdout)
    runs = [(part["offset"], part["length"], part["type"]) for part in told]
    assert runs == [(0, 4 * MIB, 3), (4 * MIB, 2 * MIB, 0), (6 * MIB, SIZE - 6 * MIB, 3)]


@pytest.mark.peer("nbdcopy")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--connections=1", "--requests=1"),
        ("--connections=4", "--requests=64", "--threads=4"),
        ("--synchronous",),
        ("--no-extents", "--request-size=33554432"),
        ("--allocated", "--destination-is-zero"),
    ],
)
def test_nbdcopy_there_and_back(served: Served, tmp_path: Path, options: tuple[str, ...]) -> None:
    source = scattered_file(tmp_path / "source", 1)
    target = tmp_path / "target"
    if "--destination-is-zero" not in options:
        served.image.write_bytes(os.urandom(SIZE))
    run("nbdcopy", "--flush", *options, str(source), served.uri)
    assert served.image.read_bytes() == source.read_bytes()
    back = [option for option in options if option != "--destination-is-zero"]
    run("nbdcopy", *back, served.uri, str(target))
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.peer("nbdcopy")
def test_nbdcopy_from_one_export_to_another(served: Served, tmp_path: Path) -> None:
    source = scattered_file(tmp_path / "source", 2)
    other = tmp_path / "other"
    other.mkdir()
    with serve_image(other, size=SIZE) as second:
        run("nbdcopy", str(source), served.uri)
        run("nbdcopy", "--flush", served.uri_of("frozen"), second.uri)
        assert second.image.read_bytes() == source.read_bytes()


@pytest.mark.peer("nbdcopy")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nbdcopy_over_tcp(tmp_path: Path, host: str) -> None:
    if host == "[::1]" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    source, target = scattered_file(tmp_path / "source", 6), tmp_path / "target"
    with serve_image(tmp_path, size=SIZE, tcp=f"{host}:0") as served:
        assert served.uri.startswith(f"nbd://{host}:")
        run("nbdcopy", "--flush", str(source), served.uri)
        run("nbdcopy", served.uri, str(target))
    assert target.read_bytes() == source.read_bytes()


# --- QEMU --------------------------------------------------------------------------------------


@pytest.mark.peer("qemu-img")
def test_qemu_img(served: Served, tmp_path: Path) -> None:
    source = scattered_file(tmp_path / "source", 3)
    flags = ("-n", "-f", "raw", "-O", "raw")
    run("qemu-img", "convert", *flags, str(source), served.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), served.uri)
    told = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", served.uri).stdout)
    assert told["virtual-size"] == SIZE
    parts = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", served.uri).stdout)
    assert sum(part["length"] for part in parts) == SIZE
    assert {part["data"] for part in parts} == {True, False}


@pytest.mark.peer("qemu-nbd")
def test_qemu_nbd_list(served: Served) -> None:
    told = run("qemu-nbd", "--list", "-k", served.socket).stdout
    for line in (
        "exports available: 2",
        "export: 'disk'",
        "description: a disk of the tests",
        f"size:  {SIZE}",
        "base:allocation",
    ):
        assert line in told


@pytest.mark.peer("qemu-io")
def test_qemu_io(served: Served) -> None:
    commands = [
        "write -P 0x5a 0 1M",
        "write -f -P 0xa5 1M 64k",
        "write -P 0x11 3000001 4097",
        "flush",
        "read -P 0x5a 0 1M",
        "read -P 0xa5 1M 64k",
        "read -P 0x11 3000001 4097",
        "write -z 4k 8k",
        "read -P 0 4k 8k",
        "write -z -u 16k 8k",
        "read -P 0 16k 8k",
        "read -P 0x5a 24k 8k",
        "discard 512k 256k",
        "aio_write -P 0x77 8M 4M",
        "aio_read 0 4M",
        "aio_flush",
        "read -P 0x77 8M 4M",
        "writev -P 0x33 16M 4k 8k 512",
        "read -P 0x33 16M 12800",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    told = run("qemu-io", "-f", "raw", *arguments, served.uri).stdout
    assert "verification failed" not in told
    assert "rror" not in told
    frozen = served.uri_of("frozen")
    done = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x33 16M 12800", frozen)
    assert "verification failed" not in done.stdout
    assert run("qemu-io", "-f", "raw", "-c", "write 0 4k", frozen, check=False).returncode


# --- the kernel's client -----------------------------------------------------------------------


@pytest.mark.peer("nbd-client")
def test_nbd_client_lists(served: Served, need: Callable[[str], str]) -> None:
    told = run(need("nbd-client"), "-l", "-unix", served.socket).stdout
    assert "disk" in told
    assert "frozen" in told


# --- fio ---------------------------------------------------------------------------------------

FIO = ["fio", "--name=t", "--ioengine=nbd", "--group_reporting", "--output-format=json"]


def fio_job(told: str) -> dict[str, Any]:
    """The summary of the jobs, behind whatever the engine had to say."""
    (job,) = json.loads(told[told.index("{\n") :])["jobs"]
    return dict(job)


@pytest.mark.peer("fio")
def test_fio_verifies_mixed_sizes_of_four_jobs(
    served: Served, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    jobs = [
        f"--uri={served.uri}",
        "--rw=randrw",
        "--bsrange=512-4m",
        "--blockalign=512",
        "--iodepth=16",
        "--numjobs=4",
        "--size=16m",
        "--offset_increment=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=16",
    ]
    # Not with --loops: fio 3.33 then looks for the stamps of the wrong round in mixed loads.
    for seed in range(scale(3, 100)):
        job = fio_job(run(*FIO, *jobs, f"--randseed={seed}", cwd=tmp_path).stdout)
        assert job["error"] == 0
        assert job["write"]["total_ios"] > 0
        assert job["read"]["total_ios"] > 0


@pytest.mark.peer("fio")
def test_fio_trims(served: Served, tmp_path: Path) -> None:
    jobs = [f"--uri={served.uri}", "--rw=randtrim", "--bs=64k", "--iodepth=8", "--size=16m"]
    done = run(*FIO, *jobs, cwd=tmp_path)
    assert fio_job(done.stdout)["error"] == 0


@pytest.mark.peer("fio", "nbdcopy", "qemu-img")
def test_several_programs_at_once(served: Served, tmp_path: Path) -> None:
    """Each on its own part of one export or reading only; nobody's data is disturbed."""
    source = scattered_file(tmp_path / "source", 5)
    jobs = [f"--uri={served.uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16"]
    jobs += ["--size=8m", f"--offset={SIZE - 8 * MIB}", "--verify=crc32c", "--verify_fatal=1"]
    head = tmp_path / "head"
    with source.open("rb") as file:
        head.write_bytes(file.read(SIZE - 8 * MIB))
    commands = [
        [*FIO, *jobs],
        ["nbdcopy", "--flush", str(head), served.uri],
        ["nbdcopy", served.uri_of("frozen"), "null:"],
        ["qemu-img", "map", "-f", "raw", served.uri_of("frozen")],
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": tmp_path}
    programs = [subprocess.Popen(command, **quiet) for command in commands]
    for program in programs:
        _, complaint = program.communicate(timeout=60)
        assert program.returncode == 0, complaint
    assert served.image.read_bytes()[: SIZE - 8 * MIB] == head.read_bytes()
