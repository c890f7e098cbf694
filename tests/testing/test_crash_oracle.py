"""The durability oracle on images made by hand, and the streams it judges."""

import pytest

from pmemkit.testing import DurabilityOracle, RecordedDevice, Request, random_requests

OLD, A, B = b"\0" * 8, b"A" * 8, b"B" * 8
REST = bytes(16)


def write(data, offset=0, **flags):
    return Request("write", offset, data, **flags)


def oracle_of(*steps):
    """Steps are requests, begun and acknowledged, or ``(request,)``: begun only."""
    oracle = DurabilityOracle(bytes(24))
    for number, step in enumerate(steps):
        request = step[0] if isinstance(step, tuple) else step
        oracle.begin(number, request)
        if request is step:
            oracle.acknowledge(number, request)
    return oracle


def allowed(oracle):
    return [word for word in (OLD, A, B) if oracle.check(word + REST) is None]


FLUSH = Request("flush")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], [OLD]),
        ([(write(A),)], [OLD, A]),
        ([write(A)], [OLD, A]),
        ([write(A), (FLUSH,)], [OLD, A]),
        ([write(A), FLUSH], [A]),
        ([write(A, fua=True)], [A]),
        ([(write(A, fua=True),)], [OLD, A]),
        ([write(A), write(B)], [OLD, A, B]),
        ([write(A), FLUSH, write(B)], [A, B]),
        ([write(A), write(B, fua=True)], [B]),
        ([write(A), FLUSH, Request("zero", 0, OLD)], [OLD, A]),
        ([write(A), Request("zero", 0, OLD), FLUSH], [OLD]),
        ([write(A, 8, fua=True)], []),
        ([Request("discard", 0, OLD)], [OLD, A, B]),
        ([Request("discard", 0, OLD), write(A), FLUSH], [A]),
        ([Request("discard", 0, OLD), write(b"x"), FLUSH], [OLD, A, B]),
        ([write(B), FLUSH, write(b"AAAA"), write(b"AAAA", 4), FLUSH], [A]),
    ],
)
def test_what_a_word_may_hold(steps, words):
    assert allowed(oracle_of(*steps)) == words


def test_a_flush_covers_what_was_acknowledged_when_it_began():
    oracle = DurabilityOracle(bytes(24))
    oracle.begin(0, write(A))
    oracle.begin(1, FLUSH)
    oracle.acknowledge(0, write(A))
    oracle.acknowledge(1, FLUSH)
    assert allowed(oracle) == [OLD, A]
    oracle.begin(2, FLUSH)
    oracle.acknowledge(2, FLUSH)
    assert allowed(oracle) == [A]


def test_a_torn_word_is_never_allowed():
    oracle = oracle_of(write(A))
    assert oracle.check(b"AAAA\0\0\0\0" + REST) == (
        "the word at byte 0 holds 4141414100000000, allowed is 0000000000000000, 4141414141414141"
    )


def test_each_word_is_judged_on_its_own():
    oracle = oracle_of(write(A + B + A))
    for image in (OLD + OLD + A, A + OLD + A, OLD + B + OLD):
        assert oracle.check(image) is None
    assert oracle.check(A + A + A) is not None


def test_bytes_that_nobody_wrote_must_stay():
    assert "the word at byte 16" in (oracle_of(write(A)).check(A + OLD + B) or "")


def test_a_partly_covered_word_keeps_its_other_bytes():
    oracle = oracle_of(write(A + A + A), FLUSH, write(b"xy", 7))
    assert oracle.check(b"AAAAAAAx" + b"yAAAAAAA" + A) is None
    assert oracle.check(b"AAAAAAAx" + A + A) is None
    assert oracle.check(b"xAAAAAAA" + A + A) is not None


def test_streams_are_the_same_for_the_same_seed():
    assert random_requests(5, 4096, 50) == random_requests(5, 4096, 50)
    assert random_requests(5, 4096, 50) != random_requests(6, 4096, 50)


def test_streams_fit_and_hold_every_kind_of_request():
    requests = random_requests(1, 16384, 400, lengths=(10000,))
    assert {request.op for request in requests} == {"write", "zero", "discard", "flush"}
    assert {request.fua for request in requests} == {True, False}
    assert any(len(request.data) == 10000 for request in requests)
    assert any(request.offset % 8 for request in requests)
    assert all(request.offset + len(request.data) <= 16384 for request in requests)


def test_marks_frame_each_request():
    recorded = RecordedDevice("page", size=8192)
    recorded.run([write(A), FLUSH])
    events = recorded.recording.events()
    assert [offset for kind, offset, _ in events if kind == "mark"] == [0, 1, 2, 3]
    assert ("sync", 0, 0) in events
    assert recorded.channel.read(0, 8) == A
    with pytest.raises(ValueError, match="'trim' is not an op"):
        recorded.submit(Request("trim"))
