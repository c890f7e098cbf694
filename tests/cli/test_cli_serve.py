"""``pmem serve``, with clients that were not written here."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cli_run import PATIENCE_SECONDS, PMEM, environment, pmem, refused, serving

import pmemkit

MIB = 1 << 20


@pytest.fixture
def place():
    """A directory whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pmem-") as directory:
        yield Path(directory)


@pytest.fixture
def image(place):
    path = place / "disk.img"
    pmemkit.open(path, create_size=16 * MIB).close()
    return path


def uri_of(process):
    line = process.stdout.readline().strip()
    assert line.startswith("nbd"), (line, process.poll(), process.stderr.read())
    return line


def ended(process):
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE_SECONDS)


def assert_quiet(process):
    """Nothing was said but which cache there is."""
    (said,) = process.stderr.read().splitlines()
    assert ": cache off: " in said


def nbdinfo(need, uri, *options):
    command = [need("nbdinfo"), "--json", *options, uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def run(*command):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.peer("nbdinfo", "nbdcopy")
def test_a_file_is_served_until_sigterm_and_then_0(image, place, need):
    data = os.urandom(16 * MIB)
    (place / "data").write_bytes(data)
    with serving(image, "--unix", place / "s") as process:
        uri = uri_of(process)
        (export,) = nbdinfo(need, uri)["exports"]
        assert export["export-size"] == 16 * MIB
        assert not export["is_read_only"]
        assert run("nbdcopy", "--flush", place / "data", uri).returncode == 0
        assert ended(process) == 0
        assert_quiet(process)
    assert image.read_bytes() == data
    assert not (place / "s").exists()


@pytest.mark.peer("nbdinfo")
def test_name_description_and_read_only(image, place, need):
    options = ["--name", "disk one", "--description", "a disk", "--read-only"]
    with serving(image, "--unix", place / "s", *options) as process:
        uri = uri_of(process)
        assert "disk%20one" in uri
        (export,) = nbdinfo(need, uri)["exports"]
        assert (export["export-name"], export["description"]) == ("disk one", "a disk")
        assert export["is_read_only"]


@pytest.mark.peer("nbdinfo")
def test_several_exports_and_the_first_is_the_default(image, place, need):
    pmemkit.open(place / "other.img", create_size=MIB).close()
    paths = [f"boot={place / 'other.img'}", f"data={image}"]
    with serving(*paths, "--unix", place / "s") as process:
        uris = [uri_of(process), uri_of(process)]
        assert [uri.split("///")[1].split("?")[0] for uri in uris] == ["boot", "data"]
        names = {each["export-name"] for each in nbdinfo(need, uris[0], "--list")["exports"]}
        assert names == {"boot", "data"}
        (default,) = nbdinfo(need, uris[0].replace("boot", ""))["exports"]
        assert default["export-size"] == MIB


def test_two_paths_without_names_are_named_after_their_files(image, place):
    pmemkit.open(place / "other.img", create_size=MIB).close()
    with serving(image, place / "other.img", "--unix", place / "s", "--json") as process:
        told = json.loads(_until_brace(process))
        assert [each["name"] for each in told["exports"]] == ["disk.img", "other.img"]
        assert told["pid"] == process.pid


def _until_brace(process):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "}\n":
            break
    return "".join(lines)


@pytest.mark.peer("nbdinfo")
def test_tcp_on_a_free_port(image, need):
    with serving(image, "--tcp", "127.0.0.1:0") as process:
        uri = uri_of(process)
        assert uri.startswith("nbd://127.0.0.1:")
        (export,) = nbdinfo(need, uri)["exports"]
        assert export["export-size"] == 16 * MIB


@pytest.mark.peer("qemu-io")
def test_memory(place):
    with serving("-", "--size", "8M", "--unix", place / "s", "--no-map") as process:
        uri = uri_of(process)
        done = run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "read -P 7 0 1M", uri)
        assert done.returncode == 0, done.stdout
        assert ended(process) == 0


@pytest.mark.peer("nbdinfo")
def test_without_anything_an_image_of_ones_own_is_made_and_kept(place, need):
    env = {"XDG_DATA_HOME": str(place / "data"), "XDG_RUNTIME_DIR": str(place)}
    image = place / "data" / "pmemkit" / "default.img"
    for _ in range(2):
        with serving(env=env) as process:
            uri = uri_of(process)
            assert str(place / "pmemkit" / "nbd.sock") in uri
            (export,) = nbdinfo(need, uri)["exports"]
            assert export["export-size"] == 1 << 30
            assert ended(process) == 0
        assert image.stat().st_size == 1 << 30
        assert image.stat().st_blocks * 512 < MIB


@pytest.mark.peer("qemu-io")
def test_layers_reach_the_client(image, place):
    options = ["--layer", f"trace=file={place / 'trace'}", "--layer", "bounce"]
    with serving(image, "--unix", place / "s", *options) as process:
        uri = uri_of(process)
        done = run("qemu-io", "-r", "-f", "raw", "-c", "read 4M 4k", uri)
        assert "read 4096/4096" in done.stdout
        assert ended(process) == 0
    entries = (place / "trace").read_text()
    assert "offset=4194304 length=4096" in entries


@pytest.mark.peer("qemu-io")
def test_a_planted_fault_is_an_input_output_error(image, place):
    layer = "fault=ops=read,offset=1M,length=4K,count=0"
    with serving(image, "--unix", place / "s", "--layer", layer) as process:
        uri = uri_of(process)
        bad = run("qemu-io", "-r", "-f", "raw", "-c", "read 1M 4k", uri)
        assert "Input/output error" in bad.stdout + bad.stderr
        good = run("qemu-io", "-r", "-f", "raw", "-c", "read 2M 4k", uri)
        assert "read 4096/4096" in good.stdout
        assert ended(process) == 0


def test_systemds_sockets_are_taken(image, place):
    """As systemd does it: the socket is descriptor 3, and the variables name the process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(place / "activated"))
    listener.listen(4)
    start = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.executable, [sys.executable, '-m', 'pmemkit', 'serve', sys.argv[2]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, str(listener.fileno()), str(image)],
        pass_fds=[listener.fileno()],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert str(place / "activated") in process.stdout.readline()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.connect(str(place / "activated"))
            assert client.recv(8) == b"NBDMAGIC"
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
        listener.close()


@pytest.mark.peer("nbdinfo")
def test_verbose_tells_of_connections(image, place, need):
    with serving(image, "--unix", place / "s", "--name", "x", "--verbose") as process:
        nbdinfo(need, uri_of(process))
        assert ended(process) == 0
        told = process.stderr.read()
    assert "export 'x': 16 MiB" in told
    assert "connect 'x'" in told
    assert "requests" in told


def test_a_slow_handshake_and_too_many_connections_are_cut(image, place):
    options = ["--handshake-timeout", "0.2", "--max-connections", "1"]
    with serving(image, "--unix", place / "s", *options) as process:
        uri_of(process)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for client in (first, second):
                client.settimeout(PATIENCE_SECONDS)
            first.connect(str(place / "s"))
            assert first.recv(8) == b"NBDMAGIC"
            second.connect(str(place / "s"))
            assert second.recv(1) == b""
            while first.recv(64):
                pass
        assert ended(process) == 0


def test_ctrl_c_ends_it_cleanly(image, place):
    with serving(image, "--unix", place / "s") as process:
        uri_of(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert_quiet(process)


# --- what is refused ------------------------------------------------------------------------------


def test_an_image_is_served_by_one_server_only(image, place):
    with serving(image, "--unix", place / "s") as process:
        uri_of(process)
        done = pmem("serve", image, "--unix", place / "t")
        refused(done, 9, image, f"process {process.pid} has it open")
        assert not (place / "t").exists()
        process.kill()
        process.wait(PATIENCE_SECONDS)
    with serving(image, "--unix", place / "s") as process:
        uri_of(process)
        assert ended(process) == 0


def test_readers_share(image, place):
    with (
        serving(image, "--read-only", "--unix", place / "s") as first,
        serving(image, "--read-only", "--unix", place / "t") as second,
    ):
        uri_of(first)
        uri_of(second)
        refused(pmem("serve", image, "--unix", place / "u"), 9, image)


def test_locking_off_serves_all_the_same(image, place):
    with pmemkit.open(image), serving(image, "--unix", place / "s", "--locking", "off") as process:
        uri_of(process)


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["{place}/no.img"], 11, ["no.img", "No such file"]),
        (["{image}", "--unix", "{place}/disk.img"], 2, ["disk.img", "not a socket"]),
        (["{image}", "--unix", "/" + "x" * 200], 2, ["too many"]),
        (["{image}", "--tcp", "127.0.0.1:port"], 2, ["'port' is not a port"]),
        (["{image}", "--name", "n" * 5000], 2, ["name"]),
        (["a={image}", "a={place}/other.img"], 2, ["two exports are named 'a'"]),
        (["a={image}", "b={place}/other.img", "--name", "x"], 2, ["--name is for a single"]),
        (["{image}", "--size", "1G"], 2, ["--size is for memory"]),
        (["-", "--granularity", "page"], 3, ["always byte, not page"]),
        (["anonymous:1Z"], 2, ["anonymous:1Z", "not a size"]),
    ],
)
def test_what_cannot_be_served(image, place, words, code, parts):
    pmemkit.open(place / "other.img", create_size=MIB).close()
    filled = [word.format(image=image, place=place) for word in words]
    refused(pmem("serve", *filled), code, *parts)


def test_a_runtime_directory_of_somebody_else_is_not_used(image, place):
    (place / "pmemkit").mkdir()
    (place / "pmemkit").chmod(0o777)
    done = pmem("serve", image, env={"XDG_RUNTIME_DIR": str(place)})
    refused(done, 11, place / "pmemkit", "--unix")


def test_an_equals_sign_in_a_path_is_no_name(place):
    path = place / "a=b.img"
    pmemkit.open(path, create_size=MIB).close()
    process = subprocess.Popen(
        [*PMEM, "serve", "a=b.img", "--unix", "s"],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert uri_of(process).startswith("nbd+unix:///?socket=")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.peer("nbdcopy")
@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
def test_a_cache_is_written_back_at_the_end_and_tells_what_it_did(image, place, need, mode):
    data = os.urandom(4 * MIB)
    (place / "data").write_bytes(data)
    options = ("--unix", place / "s", "--cache", mode, "--cache-size", "1M", "--verbose")
    with serving(image, *options) as process:
        uri = uri_of(process)
        assert run(need("nbdcopy"), place / "data", uri).returncode == 0
        assert run(need("nbdcopy"), uri, place / "back").returncode == 0
        assert ended(process) == 0
        told = process.stderr.read()
    assert image.read_bytes()[: 4 * MIB] == data == (place / "back").read_bytes()[: 4 * MIB]
    # Where room was short for a moment, some went around it.
    assert "1024 block writes, " in told
    assert "4194304 bytes stored to media" in told
    assert "export '': 4194304 bytes stored to media" in told


@pytest.mark.parametrize(
    ("words", "cache", "because"),
    [
        ([], "off", "the kernel's page cache is below it"),
        (["--granularity", "cacheline"], "writeback", "clients may have no cache of their own"),
        (["--granularity", "byte"], "off", "durable at once"),
        (["--granularity", "cacheline", "--cache", "off"], "off", "as asked for"),
        (["--cache", "writethrough"], "writethrough", "as asked for"),
        (["--granularity", "cacheline", "--read-only"], "off", "nothing is written to it"),
    ],
)
def test_which_cache_there_is_and_why_is_printed(image, place, words, cache, because):
    with pmemkit.open(image) as region:
        if region.volatile and "as asked for" not in because:
            pytest.skip("files of tests are in memory here")
    with serving(image, "--unix", place / "s", "--json", *words) as process:
        (export,) = json.loads(_until_brace(process))["exports"]
        assert (export["cache"], because in export["cache_because"]) == (cache, True)
        assert ended(process) == 0
        assert process.stderr.read() == (
            f"pmem serve: export '': cache {cache}: {export['cache_because']}\n"
        )
