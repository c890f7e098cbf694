"""The handshake on socket pairs: every option in right and wrong shape, order and delivery."""

import asyncio
import os
import socket
import struct
from dataclasses import dataclass

import nbd_wire as wire
import pytest
from nbd_fakes import ALL_CAPS, READ_CAPS, FakeSource, fake_export
from nbd_wire import OptionReply

from pmemkit.errors import InvalidArgument, ProtocolError
from pmemkit.serve import nbd_protocol as nbd
from pmemkit.serve.channel import SocketChannel
from pmemkit.serve.export import DeviceInfo, Export, Exports
from pmemkit.serve.nbd_handshake import Negotiated, negotiate

SIZE = 1 << 20
FULL_FLAGS = 0b1101_0110_1101  # everything but READ_ONLY, ROTATIONAL and DF
DF_FLAG = 1 << 7


@dataclass
class Outcome:
    negotiated: Negotiated | None
    error: ProtocolError | None
    replies: list[OptionReply]
    rest: bytes

    @property
    def kinds(self) -> list[int]:
        return [reply.kind for reply in self.replies]


def two_exports() -> Exports:
    return Exports(
        [
            fake_export("disk", description="a disk"),
            Export("frozen", FakeSource(4096), read_only=True),
        ]
    )


async def _converse(exports: Exports, said: bytes, step: int | None) -> Outcome:
    server_end, client_end = socket.socketpair()
    client_end.setblocking(False)
    loop = asyncio.get_running_loop()

    async def speak() -> None:
        try:
            for at in range(0, len(said), step or len(said) or 1):
                await loop.sock_sendall(client_end, said[at : at + (step or len(said))])
                if step:
                    await asyncio.sleep(0)
            client_end.shutdown(socket.SHUT_WR)
        except OSError:
            return

    async def listen() -> bytes:
        heard = bytearray()
        try:
            while part := await loop.sock_recv(client_end, 1 << 16):
                heard += part
        except ConnectionResetError:
            # The server closed without reading everything.
            pass
        return bytes(heard)

    speaking, listening = asyncio.create_task(speak()), asyncio.create_task(listen())
    negotiated, error = None, None
    with client_end:
        try:
            async with asyncio.timeout(20):
                negotiated = await negotiate(SocketChannel(server_end), exports)
        except ProtocolError as cause:
            error = cause
        finally:
            server_end.close()
        heard = await listening
        await speaking
    assert heard[: wire.GREETING_SIZE] == struct.pack(">QQH", wire.NBD_MAGIC, wire.IHAVEOPT, 3)
    replies, rest = wire.parse_option_replies(heard[wire.GREETING_SIZE :])
    return Outcome(negotiated, error, replies, rest)


def converse(said: bytes, exports: Exports | None = None, step: int | None = None) -> Outcome:
    """What comes of a client that says ``said`` (behind its flags) and then stops talking."""
    exports = two_exports() if exports is None else exports
    return asyncio.run(_converse(exports, wire.CLIENT_FLAGS + said, step))


def converse_raw(said: bytes) -> Outcome:
    return asyncio.run(_converse(two_exports(), said, None))


def export_of(reply: OptionReply) -> tuple[int, int]:
    kind, size, flags = struct.unpack(">HQH", reply.data)
    assert kind == wire.INFO_EXPORT
    return size, flags


# --- client flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_taken(flags: int) -> None:
    outcome = converse_raw(struct.pack(">I", flags) + wire.go("disk"))
    assert outcome.negotiated is not None


@pytest.mark.parametrize("flags", [4, 7, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    outcome = converse_raw(struct.pack(">I", flags) + wire.go("disk"))
    assert outcome.error is not None
    assert hex(flags & ~3) in str(outcome.error)
    assert outcome.replies == []


# --- EXPORT_NAME --------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (2, 0), (1, 124), (0, 124)])
def test_export_name_pads_unless_agreed_otherwise(flags: int, padding: int) -> None:
    said = struct.pack(">I", flags) + wire.option(wire.OPT_EXPORT_NAME, b"disk")
    outcome = converse_raw(said)
    assert outcome.rest == struct.pack(">QH", SIZE, FULL_FLAGS) + bytes(padding)
    assert outcome.negotiated is not None
    assert outcome.negotiated.export.name == "disk"


def test_export_name_empty_is_the_default_export() -> None:
    said = wire.option(wire.OPT_EXPORT_NAME)
    exports = Exports(two_exports(), "frozen")
    outcome = converse(said, exports)
    assert outcome.negotiated is not None
    assert outcome.negotiated.export.name == "frozen"
    first = converse(said)
    assert first.negotiated is not None
    assert first.negotiated.export.name == "disk"


@pytest.mark.parametrize(
    "name", [b"nothing", b"\xff\xfe", b"disk\0", b"d" * 4096, b"d" * 4097, b"d" * 100_000]
)
def test_export_name_that_is_refused_closes(name: bytes) -> None:
    outcome = converse(wire.option(wire.OPT_EXPORT_NAME, name))
    assert outcome.error is not None
    assert (outcome.replies, outcome.rest) == ([], b"")
    assert len(str(outcome.error)) < 500


# --- ABORT and leaving --------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"stray", bytes(100_000)])
def test_abort_is_acknowledged_and_ends(data: bytes) -> None:
    outcome = converse(wire.option(wire.OPT_ABORT, data) + wire.go("disk"))
    assert outcome.negotiated is None
    assert outcome.error is None
    assert outcome.replies == [OptionReply(wire.OPT_ABORT, wire.REP_ACK, b"")]


def test_abort_with_less_data_than_announced_is_still_an_orderly_end() -> None:
    outcome = converse(wire.option(wire.OPT_ABORT, b"abc", length=1000))
    assert (outcome.negotiated, outcome.error) == (None, None)


def test_abort_of_a_client_that_does_not_read() -> None:
    async def run() -> Negotiated | None:
        server_end, client_end = socket.socketpair()
        client_end.sendall(wire.CLIENT_FLAGS + wire.option(wire.OPT_ABORT))
        channel = SocketChannel(server_end)
        task = asyncio.create_task(negotiate(channel, two_exports()))
        await asyncio.sleep(0)
        client_end.close()
        try:
            return await task
        finally:
            server_end.close()

    assert asyncio.run(run()) is None


def test_leaving_between_options_is_orderly() -> None:
    outcome = converse(wire.option(wire.OPT_LIST))
    assert (outcome.negotiated, outcome.error) == (None, None)


# --- LIST ---------------------------------------------------------------------------------------


def test_list_gives_names_and_descriptions() -> None:
    outcome = converse(wire.option(wire.OPT_LIST))
    assert outcome.replies == [
        OptionReply(wire.OPT_LIST, wire.REP_SERVER, wire.text("disk") + b"a disk"),
        OptionReply(wire.OPT_LIST, wire.REP_SERVER, wire.text("frozen")),
        OptionReply(wire.OPT_LIST, wire.REP_ACK, b""),
    ]


def test_list_of_nothing_is_an_ack() -> None:
    assert converse(wire.option(wire.OPT_LIST), Exports([])).kinds == [wire.REP_ACK]


def test_list_with_data_is_invalid_and_the_session_goes_on() -> None:
    outcome = converse(wire.option(wire.OPT_LIST, b"x") + wire.go("disk"))
    assert outcome.kinds == [wire.ERR_INVALID, wire.REP_INFO, wire.REP_ACK]
    assert outcome.negotiated is not None


# --- INFO and GO --------------------------------------------------------------------------------

ALL_INFO = (wire.INFO_EXPORT, wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE)


def test_go_without_requests_tells_size_and_flags() -> None:
    outcome = converse(wire.go("disk"))
    assert outcome.kinds == [wire.REP_INFO, wire.REP_ACK]
    assert export_of(outcome.replies[0]) == (SIZE, FULL_FLAGS)
    assert outcome.rest == b"", "GO has no padding"
    assert outcome.negotiated is not None
    assert outcome.negotiated.flags == FULL_FLAGS
    assert outcome.negotiated.leftover == b""


def test_info_tells_all_that_is_asked_and_does_not_end_the_haggling() -> None:
    outcome = converse(wire.info("disk", ALL_INFO))
    assert outcome.negotiated is None
    assert [reply.data for reply in outcome.replies[1:4]] == [
        struct.pack(">H", 1) + b"disk",
        struct.pack(">H", 2) + b"a disk",
        struct.pack(">HIII", 3, 1, 4096, 32 << 20),
    ]


@pytest.mark.parametrize("types", [(), ALL_INFO, (7, 3, 3, 65535), tuple(range(1000))])
def test_info_then_go_get_the_same_answer(types: tuple[int, ...]) -> None:
    outcome = converse(wire.info("disk", types) + wire.go("disk", types))
    half = len(outcome.replies) // 2
    asked, gone = outcome.replies[:half], outcome.replies[half:]
    assert [(r.kind, r.data) for r in asked] == [(r.kind, r.data) for r in gone]
    assert {r.option for r in asked} == {wire.OPT_INFO}
    assert {r.option for r in gone} == {wire.OPT_GO}


def test_the_default_export_is_told_by_its_name() -> None:
    outcome = converse(wire.info("", (wire.INFO_NAME,)))
    assert outcome.replies[1].data == struct.pack(">H", 1) + b"disk"


def test_no_description_no_reply() -> None:
    outcome = converse(wire.info("frozen", (wire.INFO_DESCRIPTION,)))
    assert outcome.kinds == [wire.REP_INFO, wire.REP_ACK]


@pytest.mark.parametrize("number", [wire.OPT_INFO, wire.OPT_GO])
def test_an_unknown_export_is_refused_and_another_may_be_asked_for(number: int) -> None:
    outcome = converse(wire.option(number, wire.info_data("nothing")) + wire.go("frozen"))
    assert outcome.kinds == [wire.ERR_UNKNOWN, wire.REP_INFO, wire.REP_ACK]
    assert b"nothing" in outcome.replies[0].data
    assert outcome.negotiated is not None
    assert outcome.negotiated.export.name == "frozen"


def test_names_up_to_the_limit_are_understood_and_not_echoed_whole() -> None:
    name = "é" * 2048
    outcome = converse(wire.info(name))
    assert outcome.kinds == [wire.ERR_UNKNOWN]
    assert len(outcome.replies[0].data) <= 1024
    exports = Exports([fake_export(name)])
    served = converse(wire.go(name, (wire.INFO_NAME,)), exports)
    assert served.replies[1].data[2:].decode() == name


MALFORMED_INFO = {
    "empty": b"",
    "cut in the name's length": b"\0\0",
    "a name longer than the option": struct.pack(">I", 10) + b"disk",
    "a name of 4097 bytes": wire.info_data("d" * 4097),
    "a name of 2^32 - 1 bytes": struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
    "no request count": wire.text("disk"),
    "half a request count": wire.text("disk") + b"\0",
    "fewer requests than announced": wire.text("disk") + struct.pack(">HH", 2, 3),
    "65535 requests announced": wire.text("disk") + struct.pack(">H", 65535),
    "a byte too many": wire.info_data("disk") + b"\0",
    "a request too many": wire.info_data("disk", (3,)) + struct.pack(">H", 3),
    "not UTF-8": wire.info_data(b"\xc3\x28"),
    "a NUL": wire.info_data(b"di\0sk"),
}


@pytest.mark.parametrize("number", [wire.OPT_INFO, wire.OPT_GO])
@pytest.mark.parametrize("data", MALFORMED_INFO.values(), ids=MALFORMED_INFO.keys())
def test_malformed_info_is_invalid_and_the_session_goes_on(number: int, data: bytes) -> None:
    outcome = converse(wire.option(number, data) + wire.go("disk"))
    assert outcome.kinds == [wire.ERR_INVALID, wire.REP_INFO, wire.REP_ACK]
    assert outcome.replies[0].data.decode(), "a refusal says why"
    assert outcome.negotiated is not None


# --- STRUCTURED_REPLY ---------------------------------------------------------------------------

STRUCTURED = wire.option(wire.OPT_STRUCTURED)


def test_structured_replies_are_agreed_and_offer_df() -> None:
    outcome = converse(STRUCTURED + STRUCTURED + wire.go("disk"))
    assert outcome.kinds == [wire.REP_ACK, wire.REP_ACK, wire.REP_INFO, wire.REP_ACK]
    assert export_of(outcome.replies[2]) == (SIZE, FULL_FLAGS | DF_FLAG)
    assert outcome.negotiated is not None
    assert outcome.negotiated.structured
    assert outcome.negotiated.allocation_context is None


def test_structured_reply_with_data_is_not_agreed() -> None:
    outcome = converse(wire.option(wire.OPT_STRUCTURED, b"\0") + wire.go("disk"))
    assert outcome.kinds == [wire.ERR_INVALID, wire.REP_INFO, wire.REP_ACK]
    assert outcome.negotiated is not None
    assert not outcome.negotiated.structured
    assert not outcome.negotiated.flags & DF_FLAG


# --- metadata contexts --------------------------------------------------------------------------

ALLOCATION = "base:allocation"


def set_meta(name: str = "disk", *queries: str) -> bytes:
    return wire.meta(wire.OPT_SET_META, name, queries)


def context(number: int) -> bytes:
    return struct.pack(">I", number) + ALLOCATION.encode()


@pytest.mark.parametrize("number", [wire.OPT_LIST_META, wire.OPT_SET_META])
def test_contexts_need_structured_replies(number: int) -> None:
    outcome = converse(wire.meta(number, "disk", (ALLOCATION,)) + STRUCTURED + wire.go("disk"))
    assert outcome.kinds[0] == wire.ERR_INVALID
    assert outcome.negotiated is not None
    assert outcome.negotiated.allocation_context is None


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        ((ALLOCATION,), True),
        (("x-else:", ALLOCATION, "base:"), True),
        (("base:nothing",), False),
        (("x-else:thing", "qemu:"), False),
        (("",), False),
        (("base",), False),
    ],
)
def test_listing_contexts(queries: tuple[str, ...], found: bool) -> None:
    said = STRUCTURED + wire.meta(wire.OPT_LIST_META, "disk", queries) + wire.go("disk")
    outcome = converse(said)
    expected = [OptionReply(wire.OPT_LIST_META, wire.REP_META, context(0))] if found else []
    expected.append(OptionReply(wire.OPT_LIST_META, wire.REP_ACK, b""))
    assert outcome.replies[1:-2] == expected
    assert outcome.negotiated is not None
    assert outcome.negotiated.allocation_context is None, "listing selects nothing"


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ((), False),
        (("base:",), False),
        ((ALLOCATION,), True),
        ((ALLOCATION, ALLOCATION), True),
        (("qemu:dirty-bitmap:x", ALLOCATION), True),
        (("x-else:thing",), False),
    ],
)
def test_selecting_contexts(queries: tuple[str, ...], selected: bool) -> None:
    outcome = converse(STRUCTURED + set_meta("disk", *queries) + wire.go("disk"))
    assert outcome.negotiated is not None
    number = outcome.negotiated.allocation_context
    expected = []
    if selected:
        assert number is not None
        expected = [OptionReply(wire.OPT_SET_META, wire.REP_META, context(number))]
    else:
        assert number is None
    expected.append(OptionReply(wire.OPT_SET_META, wire.REP_ACK, b""))
    assert outcome.replies[1:-2] == expected


@pytest.mark.parametrize(
    "later",
    [
        set_meta("disk"),
        set_meta("nothing", ALLOCATION),
        set_meta("frozen", ALLOCATION),
        wire.option(wire.OPT_SET_META, b"malformed"),
        wire.option(wire.OPT_SET_META, bytes(nbd.OPTION_SIZE_MAX + 1)),
    ],
)
def test_a_later_selection_replaces_the_earlier_one_even_if_it_fails(later: bytes) -> None:
    outcome = converse(STRUCTURED + set_meta("disk", ALLOCATION) + later + wire.go("disk"))
    assert outcome.negotiated is not None
    assert outcome.negotiated.allocation_context is None


def test_a_listing_leaves_the_selection_alone() -> None:
    listing = wire.meta(wire.OPT_LIST_META, "nothing", ())
    outcome = converse(STRUCTURED + set_meta("disk", ALLOCATION) + listing + wire.go("disk"))
    assert wire.ERR_UNKNOWN in outcome.kinds
    assert outcome.negotiated is not None
    assert outcome.negotiated.allocation_context is not None


def test_a_selection_counts_for_its_own_export_only() -> None:
    said = STRUCTURED + set_meta("disk", ALLOCATION)
    other = converse(said + wire.go("frozen"))
    assert other.negotiated is not None
    assert other.negotiated.allocation_context is None
    default = converse(STRUCTURED + set_meta("", ALLOCATION) + wire.go("disk"))
    assert default.negotiated is not None
    assert default.negotiated.allocation_context is not None


MALFORMED_META = {
    "empty": b"",
    "no query count": wire.text("disk"),
    "a query fewer than announced": wire.text("disk") + struct.pack(">I", 1),
    "2^32 - 1 queries": wire.text("disk") + struct.pack(">I", 0xFFFFFFFF) + wire.text(ALLOCATION),
    "a query longer than the option": wire.text("disk") + struct.pack(">II", 1, 5) + b"base",
    "a query of 4097 bytes": wire.text("disk") + struct.pack(">I", 1) + wire.text("b" * 4097),
    "a byte too many": wire.text("disk") + struct.pack(">I", 0) + b"\0",
    "a query that is not UTF-8": wire.text("disk") + struct.pack(">I", 1) + wire.text(b"\x80"),
    "a name of 2^32 - 1 bytes": struct.pack(">I", 0xFFFFFFFF) + struct.pack(">I", 0),
}


@pytest.mark.parametrize("number", [wire.OPT_LIST_META, wire.OPT_SET_META])
@pytest.mark.parametrize("data", MALFORMED_META.values(), ids=MALFORMED_META.keys())
def test_malformed_context_options_are_invalid(number: int, data: bytes) -> None:
    outcome = converse(STRUCTURED + wire.option(number, data) + wire.go("disk"))
    assert outcome.kinds == [wire.REP_ACK, wire.ERR_INVALID, wire.REP_INFO, wire.REP_ACK]


# --- options that are not offered ---------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 4, wire.OPT_STARTTLS, 11, 99, 2**31, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"data", bytes(nbd.OPTION_SIZE_MAX)])
def test_unknown_options_are_unsupported_and_the_session_goes_on(number: int, data: bytes) -> None:
    outcome = converse(wire.option(number, data) + wire.go("disk"))
    assert outcome.kinds == [wire.ERR_UNSUP, wire.REP_INFO, wire.REP_ACK]
    assert outcome.replies[0].option == number
    assert outcome.negotiated is not None


@pytest.mark.parametrize("number", [wire.OPT_LIST, wire.OPT_GO, wire.OPT_SET_META, 99])
@pytest.mark.parametrize("size", [nbd.OPTION_SIZE_MAX + 1, nbd.SKIP_SIZE_MAX])
def test_long_options_are_skipped(number: int, size: int) -> None:
    outcome = converse(wire.option(number, os.urandom(size)) + wire.go("disk"))
    assert outcome.kinds == [wire.ERR_TOO_BIG, wire.REP_INFO, wire.REP_ACK]
    assert outcome.negotiated is not None


@pytest.mark.parametrize("size", [nbd.SKIP_SIZE_MAX + 1, 2**31, 2**32 - 1])
def test_longer_options_end_the_connection(size: int) -> None:
    outcome = converse(wire.option(99, bytes(1000), length=size))
    assert outcome.error is not None
    assert str(size) in str(outcome.error)


def test_a_wrong_magic_ends_the_connection() -> None:
    outcome = converse(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert outcome.error is not None
    assert hex(struct.unpack(">Q", b"GET / HT")[0]) in str(outcome.error)


def test_the_number_of_options_is_limited() -> None:
    most = nbd.OPTIONS_BASE + 2 * nbd.OPTIONS_PER_EXPORT
    unknown = wire.option(99)
    fits = converse(unknown * (most - 1) + wire.go("disk"))
    assert fits.negotiated is not None
    assert fits.kinds == [wire.ERR_UNSUP] * (most - 1) + [wire.REP_INFO, wire.REP_ACK]
    over = converse(unknown * most + wire.go("disk"))
    assert over.error is not None
    assert over.kinds == [wire.ERR_UNSUP] * most


# --- delivery -----------------------------------------------------------------------------------

SESSION = b"".join(
    (
        wire.option(99, b"unknown"),
        wire.option(wire.OPT_LIST),
        STRUCTURED,
        wire.meta(wire.OPT_LIST_META, "disk"),
        set_meta("disk", ALLOCATION),
        wire.info("disk", ALL_INFO),
        wire.go("disk", ALL_INFO),
    )
)


@pytest.mark.parametrize("step", [1, 7, 16, 17])
def test_delivery_in_pieces_changes_nothing(step: int) -> None:
    whole, pieces = converse(SESSION), converse(SESSION, step=step)
    assert whole.negotiated is not None
    assert pieces.negotiated is not None
    assert whole.replies == pieces.replies
    assert whole.negotiated.flags == pieces.negotiated.flags


def test_a_session_cut_at_any_byte_ends() -> None:
    said = wire.CLIENT_FLAGS + SESSION
    boundaries = set()
    for cut in range(len(said)):
        outcome = converse_raw(said[:cut])
        assert outcome.negotiated is None
        if outcome.error is None:
            boundaries.add(cut)
    assert len(boundaries) == 7, "orderly exactly before an option"


def test_requests_behind_go_are_handed_over() -> None:
    requests = wire.request(wire.READ, 0, 4096) + wire.write_request(0, os.urandom(5000))
    outcome = converse(wire.go("disk") + requests)
    assert outcome.negotiated is not None
    assert outcome.negotiated.leftover == requests
    older = converse(wire.option(wire.OPT_EXPORT_NAME, b"disk") + requests)
    assert older.negotiated is not None
    assert older.negotiated.leftover == requests


def test_detaching_gives_socket_and_leftover_once() -> None:
    async def run() -> None:
        server_end, client_end = socket.socketpair()
        with server_end, client_end:
            client_end.sendall(b"abcdef")
            channel = SocketChannel(server_end)
            assert await channel.read_exactly(2) == b"ab"
            assert channel.leftover() == b"cdef"
            assert channel.detach() == (server_end, b"cdef")
            assert channel.detach()[1] == b""

    asyncio.run(run())


# --- exports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caps", "read_only", "flags"),
    [
        (ALL_CAPS, False, FULL_FLAGS),
        (ALL_CAPS, True, 0b0101_0000_0011),
        (READ_CAPS, False, 0b0101_0000_0011),
        (frozenset({"write"}), False, 0b1),
        (frozenset({"write", "fast_zero"}), False, 0b1),
        (frozenset({"write", "zero"}), False, 0b100_0001),
        (frozenset({"write", "flush", "fua"}), False, 0b1101),
        (frozenset({"write", "discard"}), False, 0b10_0001),
        (frozenset({"write", "cache"}), False, 0b100_0000_0001),
        (frozenset(), False, 0b11),
    ],
)
def test_flags_say_what_the_device_offers(
    caps: frozenset[str], read_only: bool, flags: int
) -> None:
    export = Export("disk", FakeSource(caps=caps), read_only=read_only)
    assert export.transmission_flags(structured=False) == flags
    assert export.transmission_flags(structured=True) == flags | DF_FLAG


def test_nothing_is_opened_by_a_handshake() -> None:
    source = FakeSource()
    exports = Exports([Export("disk", source)])
    before = source.opened
    assert converse(SESSION, exports).negotiated is not None
    assert source.opened == before


@pytest.mark.parametrize("name", ["d" * 4097, "a\0b", "\ud800", "é" * 2049])
def test_names_the_protocol_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        fake_export(name)
    with pytest.raises(InvalidArgument):
        fake_export("disk", description=name)


def test_wrong_sets_of_exports_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="two exports"):
        Exports([fake_export("a"), fake_export("a")])
    with pytest.raises(InvalidArgument, match="default"):
        Exports([fake_export("a")], "b")
    with pytest.raises(InvalidArgument, match="no export"):
        Exports([fake_export("a")]).without("b")


def test_the_empty_name() -> None:
    a, b, unnamed = fake_export("a"), fake_export("b"), fake_export("")
    assert Exports([]).find("") is None
    assert Exports([a, b]).find("") is a
    assert Exports([a, b], "b").find("") is b
    assert Exports([a, unnamed], "a").find("") is unnamed
    assert Exports([a, b], "b").without("b").find("") is a
    assert Exports([a]).with_export(b).find("b") is b


@pytest.mark.parametrize(("least", "preferred"), [(0, 4096), (3, 4096), (1 << 17, 1 << 17)])
def test_block_sizes_the_protocol_cannot_carry_are_refused(least: int, preferred: int) -> None:
    source = FakeSource()
    source.block_size_min, source.block_size_preferred = least, preferred
    with pytest.raises(InvalidArgument, match=str(least)):
        DeviceInfo.of(source)
    source.block_size_min, source.block_size_preferred = 512, 256
    with pytest.raises(InvalidArgument, match="256"):
        DeviceInfo.of(source)


def test_refusals_are_cut_between_characters() -> None:
    replies, _ = wire.parse_option_replies(nbd.error_reply(7, nbd.ErrorReply.INVALID, "é" * 5000))
    assert replies[0].data.decode() == "é" * (nbd.ERROR_TEXT_SIZE_MAX // 2)
    replies, _ = wire.parse_option_replies(nbd.error_reply(7, nbd.ErrorReply.INVALID, "a\0\ud800"))
    assert replies[0].data == b"a??"
