"""The server around the handshake, with a transmission that only echoes."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbd_wire as wire
import pytest
from nbd_fakes import FakeSource, FakeTransmission, StubbornTransmission, fake_export

from pmemkit.errors import Busy, InvalidArgument, PmemError
from pmemkit.serve.export import Export
from pmemkit.serve.listeners import (
    Listener,
    listen_activated,
    listen_tcp,
    listen_unix,
    parse_endpoint,
)
from pmemkit.serve.nbd_server import Event, NbdServer, RunningServer, serve_in_thread

PATIENCE_SECONDS = 20.0


class Events(list[Event]):
    """Collects events; another thread may wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._more:
            self.append(event)
            self._more.notify_all()

    def wait_for(self, kind: str, count: int = 1) -> list[Event]:
        def found() -> list[Event]:
            return [event for event in self if event.kind == kind]

        with self._more:
            assert self._more.wait_for(lambda: len(found()) >= count, PATIENCE_SECONDS), list(self)
            return found()


@contextmanager
def serving(
    path: Path, *exports: Export, **options: object
) -> Iterator[tuple[RunningServer, Events]]:
    events = Events()
    options.setdefault("transmission", FakeTransmission)
    offered = exports or (fake_export(),)
    with serve_in_thread(offered, unix=path, on_event=events, **options) as running:
        yield running, events


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "nbd.sock"


def echo(client: wire.RawClient, data: bytes) -> None:
    client.send(data)
    assert client.receive(len(data)) == data


# --- connections -------------------------------------------------------------------------------


def test_a_connection_from_accept_to_end(place: Path) -> None:
    with serving(place) as (running, events):
        with wire.RawClient(str(place)) as client:
            client.start()
            echo(client, b"hello")
            (connected,) = events.wait_for("connect")
            assert connected.export == "disk"
            assert connected.peer == f"pid {os.getpid()}"
            assert running.server.connection_count == 1
        (ended,) = events.wait_for("disconnect")
        assert ended.result.reason == "eof"
        assert ended.number == connected.number
    assert not place.exists()


def test_bytes_behind_go_reach_the_transmission(place: Path) -> None:
    with serving(place) as _, wire.RawClient(str(place)) as client:
        behind = os.urandom(9000)
        client.send(wire.CLIENT_FLAGS + wire.go() + behind)
        client.receive(wire.GREETING_SIZE)
        assert client.replies()[-1].kind == wire.REP_ACK
        assert client.receive(len(behind)) == behind


def test_a_client_that_says_nothing_is_cut_off(place: Path) -> None:
    with serving(place, handshake_timeout_seconds=0.2) as (_, events):
        with wire.RawClient(str(place)) as silent, wire.RawClient(str(place)) as dripping:
            dripping.hello()
            with pytest.raises(ConnectionError):
                while True:
                    dripping.send(wire.option(99))
                    time.sleep(0.05)
            silent.receive(wire.GREETING_SIZE)
            assert silent.closed()
        reasons = [event.reason for event in events.wait_for("reject", 2)]
        assert reasons == ["no agreement after 0.2 seconds"] * 2


def test_a_client_that_does_not_read_is_cut_off(place: Path) -> None:
    exports = [fake_export(f"{n:04}" + "d" * 4000, description="x" * 4000) for n in range(100)]
    options = {"handshake_timeout_seconds": 0.3}
    with serving(place, *exports, **options) as (_, events), wire.RawClient(str(place)) as client:
        client.hello()
        client.send(wire.option(wire.OPT_LIST) * 20)
        events.wait_for("reject")


def test_the_deadline_does_not_touch_transmission(place: Path) -> None:
    with serving(place, handshake_timeout_seconds=0.2) as _, wire.RawClient(str(place)) as client:
        client.start()
        time.sleep(0.4)
        echo(client, b"still here")


def test_connections_over_the_limit_are_closed_at_once(place: Path) -> None:
    with serving(place, connections_limit=2) as (_, events):
        with wire.RawClient(str(place)) as one, wire.RawClient(str(place)) as two:
            one.start()
            two.hello()
            with wire.RawClient(str(place)) as three:
                assert three.closed()
            (event,) = events.wait_for("reject")
            assert "2 connections" in str(event.reason)
            echo(one, b"undisturbed")
        events.wait_for("disconnect")
        events.wait_for("leave")
        with wire.RawClient(str(place)) as later:
            later.start()


def test_garbage_disturbs_nobody(place: Path) -> None:
    with serving(place) as (_, events), wire.RawClient(str(place)) as good:
        good.start()
        for number in range(20):
            with wire.RawClient(str(place)) as bad:
                bad.send(os.urandom(100 * number + 4) + wire.go())
                with pytest.raises((EOFError, ConnectionError)):
                    bad.receive(1 << 20)
            echo(good, b"undisturbed %d" % number)
        assert len(events.wait_for("reject", 20)) == 20


def test_a_transmission_that_cannot_start_disturbs_nobody(place: Path) -> None:
    def factory(sock: socket.socket, negotiated: object) -> FakeTransmission:
        if negotiated.export.name == "broken":
            raise RuntimeError("no such luck")
        return FakeTransmission(sock, negotiated)

    exports = [fake_export("disk"), fake_export("broken")]
    with serving(place, *exports, transmission=factory) as (_, events):
        with wire.RawClient(str(place)) as good, wire.RawClient(str(place)) as bad:
            good.start("disk")
            bad.start("broken")
            assert bad.closed()
            echo(good, b"undisturbed")
        (event,) = events.wait_for("reject")
        assert "no such luck" in str(event.reason)


def test_a_transmission_that_fails_disturbs_nobody(place: Path) -> None:
    class Failing(FakeTransmission):
        def serve(self) -> SimpleNamespace:
            with self.sock:
                raise OSError("the media went away")

    with serving(place, transmission=Failing) as (_, events):
        for count in (1, 2):
            with wire.RawClient(str(place)) as client:
                client.start()
                assert client.closed()
            assert events.wait_for("disconnect", count)[-1].reason == "the media went away"


def test_a_callback_that_fails_disturbs_nobody(place: Path) -> None:
    def callback(event: Event) -> None:
        raise ValueError(event.kind)

    options = {"on_event": callback, "transmission": FakeTransmission}
    with serve_in_thread([fake_export()], unix=place, **options):
        for _ in range(2):
            with wire.RawClient(str(place)) as client:
                client.start()
                echo(client, b"served")


def test_a_channel_is_opened_after_go_and_once_a_connection(place: Path) -> None:
    source = FakeSource()
    export = Export("disk", source)
    frozen = source.opened
    with serving(place, export) as (_, events):
        with wire.RawClient(str(place)) as client:
            client.hello()
            client.send(wire.option(wire.OPT_LIST) + wire.info("disk"))
            client.replies()
            client.replies()
            assert source.opened == frozen
        events.wait_for("leave")
        for count in (1, 2):
            with wire.RawClient(str(place)) as client:
                client.start()
                echo(client, b"x")
                assert source.opened == frozen + count


def test_exports_come_and_go_while_serving(place: Path) -> None:
    with serving(place, fake_export("a")) as (running, _), wire.RawClient(str(place)) as early:
        early.start("a")
        running.server.add_export(fake_export("b"))
        with pytest.raises(InvalidArgument):
            running.server.add_export(fake_export("b"))
        running.server.remove_export("a")
        with wire.RawClient(str(place)) as client:
            client.hello()
            client.send(wire.go("a"))
            assert client.option_reply().kind == wire.ERR_UNKNOWN
            client.send(wire.go(""))
            assert client.replies()[-1].kind == wire.REP_ACK
        echo(early, b"let in already")


def test_many_connections_at_once(place: Path) -> None:
    clients = []
    try:
        with serving(place, connections_limit=64) as (running, _):
            for _ in range(64):
                clients.append(wire.RawClient(str(place)))
            for client in clients:
                client.start()
            for number, client in enumerate(clients):
                echo(client, b"%d" % number)
            assert running.server.connection_count == 64
    finally:
        for client in clients:
            client.sock.close()


# --- stopping ----------------------------------------------------------------------------------


def test_stopping_ends_idle_sockets_handshakes_and_transmissions(place: Path) -> None:
    with serving(place) as (_, events):
        silent, haggling = wire.RawClient(str(place)), wire.RawClient(str(place))
        served = wire.RawClient(str(place))
        haggling.hello()
        served.start()
        silent.receive(wire.GREETING_SIZE)
        echo(served, b"x")
    for client in (silent, haggling, served):
        assert client.closed()
        client.sock.close()
    assert [event.reason for event in events.wait_for("reject")] == ["the server stopped"] * 2
    (ended,) = events.wait_for("disconnect")
    assert ended.result.reason == "stopped"


def test_a_connection_that_will_not_stop_is_cut(place: Path) -> None:
    options = {"transmission": StubbornTransmission, "drain_seconds": 0.2}
    with serving(place, **options) as (running, events), wire.RawClient(str(place)) as client:
        client.start()
        echo(client, b"x")
        running.server.stop()
        events.wait_for("disconnect")
        assert client.closed()


def test_stopping_before_serving_and_twice(place: Path) -> None:
    server = NbdServer([fake_export()], transmission=FakeTransmission)
    server.stop()
    asyncio.run(server.serve([listen_unix(place)]))
    server.stop()
    assert not place.exists()


def test_several_listeners(place: Path) -> None:
    exports = [fake_export()]
    options = {"transmission": FakeTransmission}
    with serve_in_thread(exports, unix=place, tcp="127.0.0.1:0", **options) as running:
        scheme, _, rest = running.uri.partition("://")
        assert scheme == "nbd"
        port = int(rest.rstrip("/").rpartition(":")[2])
        for address in (str(place), ("127.0.0.1", port)):
            with wire.RawClient(address) as client:
                client.start()
                echo(client, b"x")


def test_a_limit_that_serves_nobody_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="0 connections"):
        NbdServer([fake_export()], connections_limit=0)


# --- listeners ---------------------------------------------------------------------------------


def test_a_socket_file_has_the_mode_asked_for(place: Path) -> None:
    for mode in (0o600, 0o666):
        listener = listen_unix(place, mode=mode)
        assert place.stat().st_mode & 0o777 == mode
        listener.close()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(place: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(place))
    stale.close()
    listener = listen_unix(place)
    with pytest.raises(Busy, match="another server"):
        listen_unix(place)
    assert place.exists()
    listener.close()


def test_a_file_that_is_no_socket_is_left_alone(place: Path) -> None:
    place.write_text("precious")
    with pytest.raises(InvalidArgument, match="not a socket"):
        listen_unix(place)
    assert place.read_text() == "precious"
    link = place.with_name("link")
    link.symlink_to(place)
    with pytest.raises(InvalidArgument, match="not a socket"):
        listen_unix(link)


def test_only_the_own_socket_file_is_removed(place: Path) -> None:
    listener = listen_unix(place)
    place.unlink()
    place.write_text("somebody else's")
    listener.close()
    assert place.read_text() == "somebody else's"
    place.unlink()
    gone = listen_unix(place)
    place.unlink()
    gone.close()


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too many"):
        listen_unix(tmp_path / ("x" * 108))
    with pytest.raises(PmemError, match="No such file"):
        listen_unix(tmp_path / "none" / "nbd.sock")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("localhost:1234", ("localhost", 1234)),
        ("[::1]:1234", ("::1", 1234)),
        ("[::1]", ("::1", 10809)),
        ("example.org", ("example.org", 10809)),
        (":0", ("", 0)),
    ],
)
def test_endpoints(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize("text", ["a:b", "a:-1", "a:65536", "::1", "a:", "::1:10809", "a:\u0661"])
def test_wrong_endpoints(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_endpoint(text)


def test_tcp_listeners(tmp_path: Path) -> None:
    listeners = listen_tcp("127.0.0.1", 0)
    try:
        port = listeners[0].address[1]
        assert port > 0
        assert listeners[0].uri("a b/c") == f"nbd://127.0.0.1:{port}/a%20b%2Fc"
        with pytest.raises(Busy):
            listen_tcp("127.0.0.1", port)
    finally:
        for listener in listeners:
            listener.close()
    everywhere = listen_tcp("", 0)
    assert len({listener.address[1] for listener in everywhere}) == 1
    for listener in everywhere:
        listener.close()
    with pytest.raises(InvalidArgument):
        listen_tcp("host.invalid", 0)


def test_unix_uris(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "a b&c.sock")
    quoted = str(tmp_path) + "/a%20b%26c.sock"
    assert listener.uri() == f"nbd+unix:///?socket={quoted}"
    listener.close()
    assert listener.uri("x") == f"nbd+unix:///x?socket={quoted}"


def test_activation_is_for_the_process_it_names() -> None:
    for environment in (
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"},
    ):
        before = dict(environment)
        assert listen_activated(environment) == []
        assert environment == before


@pytest.mark.parametrize("count", ["0", "-1", "x", "100000", "²", ""])
def test_activation_with_a_wrong_count(count: str) -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "a"}
    with pytest.raises(InvalidArgument):
        listen_activated(environment)
    assert environment == {}


def test_listeners_know_their_address_after_they_closed(place: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(place))
    sock.listen()
    listener = Listener(sock)
    listener.close()
    assert listener.uri().endswith(str(place))
    assert place.exists(), "a socket somebody else made is not ours to remove"
