"""``pmem memory`` and ``pmem top`` on the pool of a running program."""

import json
import socket
import stat
import threading
from pathlib import Path

import pytest

from pmemkit import MemoryPool
from pmemkit.cli import main
from pmemkit.errors import Busy, Closed, InvalidArgument
from pmemkit.memory import ProcessProvider
from pmemkit.memory.control import ask

MIB = 1 << 20


@pytest.fixture
def served(tmp_path):
    path = tmp_path / "pool.sock"
    with MemoryPool(["anonymous:16M"], block_size="8M") as pool:
        pool.publish(path)
        yield pool, str(path)
    assert not path.exists()


def pmem(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_stat_and_map(served, capsys):
    pool, path = served
    pool.add(ProcessProvider(MIB, "gpu"))
    kept = pool.full(5 * MIB, 1, "u1")
    told = pmem(capsys, "memory", "stat", path)
    assert "5 MiB of 16 MiB in use" in told
    assert "[7.]" in told
    assert "gpu: 0 B in blocks, no address here" in told
    found = json.loads(pmem(capsys, "memory", "stat", path, "--json"))
    assert found["regions"][0]["blocks"][0] == {"state": "online", "used": 5 * MIB}
    assert f"{kept.ctypes.data:#x}" in pmem(capsys, "memory", "map", path)
    assert "5 MiB of 16 MiB in use" in pmem(capsys, "top", path, "--count", "2", "--interval", "0")


def test_regions_come_and_go(served, capsys, tmp_path):
    pool, path = served
    kept = pool.full(5 * MIB, 1, "u1")
    assert pmem(capsys, "memory", "add", path, "memfd:16M", "--name", "more") == "added more\n"
    told = pmem(capsys, "memory", "remove", path, "anonymous:16M", "--timeout", "30")
    assert told.startswith("remove: 5 MiB of 1 extents moved")
    assert pool.regions() == ["more"]
    assert "offline: 5 MiB" in pmem(capsys, "memory", "offline", path, "more")
    assert "[-7]" in pmem(capsys, "memory", "stat", path)
    assert pmem(capsys, "memory", "online", path, "more") == "online\n"
    assert (kept == 1).all()


def test_errors_keep_their_kind_and_exit_code(served, capsys):
    _, path = served
    with pytest.raises(InvalidArgument, match="'nothing' is not in this pool"):
        ask(path, {"op": "remove", "region": "nothing"})
    assert main(["memory", "remove", path, "nothing"]) == InvalidArgument.exit_code
    assert "not in this pool" in capsys.readouterr().err
    with pytest.raises(InvalidArgument, match="no operation"):
        ask(path, {"op": "format"})
    assert main(["memory", "stat", path + ".none"]) == Closed.exit_code


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"op": "offline"}\n'])
def test_what_is_no_request_is_answered(served, line):
    _, path = served
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(line + b'{"op": "map"}\n')
        with connection.makefile("rb") as stream:
            assert json.loads(stream.readline())["error"]["kind"] == "protocol"
            assert json.loads(stream.readline()) == {"result": []}


def test_one_that_hangs_up_cancels(tmp_path):
    path = str(tmp_path / "pool.sock")
    with MemoryPool(["anonymous:16M"], block_size="8M", progress_every=0) as pool:
        pool.publish(path)
        pool.add("memfd:16M")
        kept = pool.full(8 * MIB, 3, "u1", region="anonymous:16M")
        held, done = threading.Event(), threading.Event()

        def writer() -> None:
            with pool.writing():
                held.set()
                done.wait(20)

        thread = threading.Thread(target=writer)
        thread.start()
        held.wait(20)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(b'{"op": "remove", "region": "anonymous:16M"}\n')
            with connection.makefile("rb") as stream:
                assert "progress" in json.loads(stream.readline())
        done.set()
        thread.join()
        while pool.migrations():
            pass
        assert "anonymous:16M" in pool.regions()
        assert (kept == 3).all()
        assert pool.validate() == []


def test_the_socket_is_the_users_own_and_taken_once(served):
    pool, path = served
    with pytest.raises(Busy, match="another pool answers"):
        pool.publish(path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_what_a_killed_process_left_is_taken(tmp_path):
    path = tmp_path / "pool.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with MemoryPool(["anonymous:8M"], block_size="8M") as pool, pool.publish(path):
        assert ask(path, {"op": "map"}) == []
