"""Every command and option, asked by libnbd."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_served import MIB, SERVE_FILE, Served, environment, libnbd, serve_image

pytestmark = pytest.mark.peer("module:nbd")

SIZE = 16 * MIB


@pytest.fixture(scope="module")
def nbd() -> Any:
    return libnbd()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_image(tmp_path, size=SIZE) as served:
        yield served


Connect = Callable[..., Any]


@pytest.fixture
def connect(nbd: Any, served: Served) -> Iterator[Connect]:
    handles = []

    def connect(name: str = "disk", *, context: bool = True, **settings: Any) -> Any:
        handle = nbd.NBD()
        handle.set_export_name(name)
        if context:
            handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        for setting, value in settings.items():
            getattr(handle, f"set_{setting}")(value)
        handle.connect_unix(served.socket)
        handles.append(handle)
        return handle

    yield connect
    for handle in handles:
        if handle.aio_is_ready():
            handle.shutdown()


def errno_of(nbd: Any, call: Callable[[], Any]) -> str:
    with pytest.raises(nbd.Error) as raised:
        call()
    return str(raised.value.errno)


# --- what is offered ---------------------------------------------------------------------------


def test_what_a_writable_export_offers(nbd: Any, connect: Connect) -> None:
    handle = connect()
    assert handle.get_protocol() == "newstyle-fixed"
    assert handle.get_size() == SIZE
    assert not handle.is_read_only()
    assert not handle.is_rotational()
    for ability in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
        assert getattr(handle, f"can_{ability}")(), ability
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert handle.get_structured_replies_negotiated()
    sizes = [handle.get_block_size(n) for n in range(nbd.SIZE_MINIMUM, nbd.SIZE_MAXIMUM + 1)]
    assert sizes == [1, 4096, 32 * MIB]


def test_what_a_read_only_export_offers(connect: Connect) -> None:
    handle = connect("frozen")
    assert handle.is_read_only()
    assert not handle.can_trim()
    assert not handle.can_zero()
    assert handle.pread(16, 0) == bytes(16)


def test_simple_replies(connect: Connect) -> None:
    handle = connect(context=False, request_structured_replies=False)
    assert not handle.get_structured_replies_negotiated()
    assert not handle.can_df()
    data = os.urandom(100_000)
    handle.pwrite(data, 4000)
    assert handle.pread(len(data), 4000) == data


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_older_handshakes(connect: Connect, flags: int) -> None:
    handle = connect(context=False, handshake_flags=flags)
    assert handle.get_size() == SIZE
    handle.pwrite(b"older", 7)
    assert handle.pread(5, 7) == b"older"


def test_options(nbd: Any, served: Served) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.connect_unix(served.socket)
    listed = []
    assert handle.opt_list(lambda name, text: listed.append((name, text))) == 2
    assert listed == [("disk", "a disk of the tests"), ("frozen", "")]
    contexts: list[str] = []
    assert handle.opt_list_meta_context(contexts.append) == 1
    assert contexts == ["base:allocation"]
    handle.set_export_name("frozen")
    handle.opt_info()
    assert handle.is_read_only()
    assert handle.get_size() == SIZE
    handle.set_export_name("nothing")
    assert errno_of(nbd, handle.opt_info) == "ENOENT"
    assert errno_of(nbd, handle.opt_go) == "ENOENT"
    handle.set_export_name("")
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.opt_go()
    assert handle.get_canonical_export_name() == "disk"
    assert handle.get_export_description() == "a disk of the tests"
    assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.shutdown()


def test_aborting_the_options(nbd: Any, served: Served) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(served.socket)
    handle.opt_abort()
    assert handle.aio_is_closed()


# --- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 511, 512, 4096, 65537, 4 * MIB + 3])
@pytest.mark.parametrize("fua", [False, True])
def test_writing_and_reading(
    nbd: Any, served: Served, connect: Connect, size: int, fua: bool
) -> None:
    handle = connect()
    data = os.urandom(size)
    handle.pwrite(data, 12_345, nbd.CMD_FLAG_FUA if fua else 0)
    assert handle.pread(size, 12_345) == data
    handle.flush()
    image = served.image.read_bytes()
    assert image[12_345 : 12_345 + size] == data
    assert not any(image[:12_345])


def test_reading_with_df_and_in_chunks(nbd: Any, connect: Connect) -> None:
    handle = connect()
    data = os.urandom(MIB)
    handle.pwrite(data, MIB)
    for flags in (0, nbd.CMD_FLAG_DF):
        chunks: list[tuple[int, bytes, int]] = []

        def chunk(buffer: bytes, offset: int, status: int, error: Any) -> None:
            chunks.append((offset, bytes(buffer), status))  # noqa: B023

        got = handle.pread_structured(MIB, MIB, chunk, flags)
        assert got == data
        assert {status for _, _, status in chunks} == {nbd.READ_DATA}
        if flags:
            assert len(chunks) == 1
        joined = b"".join(part for _, part, _ in sorted(chunks))
        assert joined == data


@pytest.mark.parametrize("flags", ["", "FUA", "NO_HOLE", "FAST_ZERO", "FUA NO_HOLE"])
def test_writing_zeroes(nbd: Any, connect: Connect, flags: str) -> None:
    handle = connect()
    bits = 0
    for name in flags.split():
        bits |= getattr(nbd, f"CMD_FLAG_{name}")
    handle.pwrite(b"\xaa" * MIB, 0)
    handle.zero(MIB - 3 * 4096, 4096, bits)
    expected = b"\xaa" * 4096 + bytes(MIB - 3 * 4096) + b"\xaa" * 8192
    assert handle.pread(MIB, 0) == expected


def test_writing_zeroes_fast_or_not_at_all(nbd: Any, connect: Connect) -> None:
    """``FAST_ZERO`` may be refused, and then nothing changed."""
    handle = connect()
    handle.pwrite(b"\xaa" * MIB, 0)
    both = nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE
    try:
        handle.zero(MIB, 0, both)
    except nbd.Error as error:
        assert error.errno == "ENOTSUP"
        assert handle.pread(MIB, 0) == b"\xaa" * MIB
    else:
        assert handle.pread(MIB, 0) == bytes(MIB)


def test_trim_cache_and_flush(nbd: Any, served: Served, connect: Connect) -> None:
    handle = connect()
    handle.pwrite(b"\xaa" * (4 * MIB), 0)
    handle.flush()
    before = served.image.stat().st_blocks
    handle.trim(2 * MIB, MIB)
    handle.trim(4096, 0, nbd.CMD_FLAG_FUA)
    handle.flush()
    assert served.image.stat().st_blocks < before, "trim gives space back"
    assert handle.pread(MIB, 3 * MIB) == b"\xaa" * MIB
    handle.cache(4 * MIB, 0)
    handle.cache(SIZE, 0)


def test_whole_device_ranges(connect: Connect) -> None:
    """Ranges without payload may be longer than any payload."""
    handle = connect()
    handle.pwrite(b"\xaa", SIZE - 1)
    handle.trim(SIZE, 0)
    handle.zero(SIZE, 0)
    assert handle.pread(1, SIZE - 1) == b"\0"


def extents_of(nbd: Any, handle: Any, count: int, offset: int, flags: int = 0) -> list[Any]:
    found: list[tuple[int, int]] = []

    def status(context: str, offset: int, entries: list[int], error: Any) -> None:
        assert context == nbd.CONTEXT_BASE_ALLOCATION
        found.extend(zip(entries[::2], entries[1::2], strict=True))

    handle.block_status(count, offset, status, flags)
    return found


def test_block_status(nbd: Any, connect: Connect) -> None:
    handle = connect()
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    handle.pwrite(b"\xaa" * MIB, 2 * MIB)
    handle.flush()
    whole = [(2 * MIB, hole), (MIB, 0), (13 * MIB, hole)]
    assert extents_of(nbd, handle, SIZE, 0) == whole
    assert extents_of(nbd, handle, SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == whole[:1]
    (one,) = extents_of(nbd, handle, 4096, 2 * MIB, nbd.CMD_FLAG_REQ_ONE)
    assert one == (4096, 0), "not longer than asked for"
    total = sum(length for length, _ in extents_of(nbd, handle, 3 * MIB, MIB + 1))
    assert total >= 1


def test_many_requests_in_flight(nbd: Any, connect: Connect) -> None:
    handle = connect()
    blocks = [os.urandom(4096) for _ in range(256)]
    pending = []
    for number, data in enumerate(blocks):
        pending.append(handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), number * 4096))
    while pending:
        handle.poll(-1)
        pending = [cookie for cookie in pending if not handle.aio_command_completed(cookie)]
    for number, data in enumerate(blocks):
        assert handle.pread(4096, number * 4096) == data


def test_connections_see_each_others_writes_after_flush(connect: Connect) -> None:
    one, two = connect(), connect()
    for number in range(20):
        data = os.urandom(4096)
        one.pwrite(data, number * 4096)
        one.flush()
        assert two.pread(4096, number * 4096) == data


# --- refusals ----------------------------------------------------------------------------------


def test_ranges_past_the_end(nbd: Any, connect: Connect) -> None:
    handle = connect(strict_mode=0)
    for offset in (SIZE, SIZE - 4095, 2**62):
        assert errno_of(nbd, lambda o=offset: handle.pread(4096, o)) == "EINVAL"
        assert errno_of(nbd, lambda o=offset: handle.trim(4096, o)) == "EINVAL"
        assert errno_of(nbd, lambda o=offset: handle.cache(4096, o)) == "EINVAL"
        assert errno_of(nbd, lambda o=offset: extents_of(nbd, handle, 4096, o)) == "EINVAL"
        assert errno_of(nbd, lambda o=offset: handle.pwrite(bytes(4096), o)) == "ENOSPC"
        assert errno_of(nbd, lambda o=offset: handle.zero(4096, o)) == "ENOSPC"
    assert handle.pread(4096, SIZE - 4096) == bytes(4096)


def test_misplaced_flags(nbd: Any, connect: Connect) -> None:
    handle = connect(strict_mode=0)
    handle.pwrite(b"kept", 0)
    for flags in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO):
        assert errno_of(nbd, lambda f=flags: handle.pread(4, 0, f)) == "EINVAL"
        assert errno_of(nbd, lambda f=flags: handle.trim(4, 0, f)) == "EINVAL"
        assert errno_of(nbd, lambda f=flags: handle.pwrite(b"lost", 0, f)) == "EINVAL"
    assert errno_of(nbd, lambda: handle.zero(4, 0, nbd.CMD_FLAG_DF)) == "EINVAL"
    assert errno_of(nbd, lambda: handle.cache(4, 0, nbd.CMD_FLAG_DF)) == "EINVAL"
    assert handle.pread(4, 0) == b"kept"


def test_fua_is_taken_on_every_command(nbd: Any, connect: Connect) -> None:
    handle = connect(strict_mode=0)
    fua = nbd.CMD_FLAG_FUA
    handle.pwrite(b"kept", 0, fua)
    assert handle.pread(4, 0, fua) == b"kept"
    handle.flush(fua)
    handle.cache(4, 0, fua)
    assert extents_of(nbd, handle, 4096, 0, fua)


def test_changing_a_read_only_export(nbd: Any, connect: Connect) -> None:
    handle = connect("frozen", strict_mode=0)
    assert errno_of(nbd, lambda: handle.pwrite(b"x", 0)) == "EPERM"
    assert errno_of(nbd, lambda: handle.zero(1, 0)) == "EPERM"
    assert errno_of(nbd, lambda: handle.trim(1, 0)) == "EPERM"
    assert handle.pread(1, 0) == b"\0"


def test_flags_that_were_not_negotiated(nbd: Any, connect: Connect) -> None:
    handle = connect(context=False, request_structured_replies=False, strict_mode=0)
    assert errno_of(nbd, lambda: handle.pread(4, 0, nbd.CMD_FLAG_DF)) == "EINVAL"
    assert handle.pread(4, 0) == bytes(4)


# --- a client that starts the server -----------------------------------------------------------


def test_socket_activation(nbd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, MIB)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    handle = nbd.NBD()
    handle.connect_systemd_socket_activation([sys.executable, str(SERVE_FILE), str(image)])
    assert handle.get_size() == MIB
    handle.pwrite(b"activated", 0, nbd.CMD_FLAG_FUA)
    handle.shutdown()
    handle.kill_subprocess(15)
    del handle
    assert image.read_bytes()[:9] == b"activated"
