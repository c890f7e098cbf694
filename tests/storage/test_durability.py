"""FLUSH, FUA and persist of the shipped stacks, at every power failure of random request streams.

`PMEMKIT_SOAK=1` runs the full counts.
"""

import pytest

from pmemkit._native import PLANTED_FAULTS, block
from pmemkit.testing import (
    DurabilityError,
    RecordedDevice,
    Request,
    TransmissionClient,
    check_streams,
    noop_stack,
)

pytestmark = pytest.mark.skipif(
    PLANTED_FAULTS, reason="this build loses data on purpose; test_planted.py is about it"
)

GRANULARITIES = ["byte", "cacheline", "page"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_acknowledged_survives(granularity, scale):
    seeds = range(scale(4, 60))
    assert check_streams(granularity, seeds) > 100 * len(seeds)


def test_torn_pages_change_nothing(scale):
    assert check_streams("page", range(100, 100 + scale(2, 40)), torn_pages=True) > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layers", [block.bounce, lambda below: noop_stack(below, 3)])
def test_layers_pass_it_on(granularity, layers, scale):
    assert check_streams(granularity, range(200, 200 + scale(1, 10)), layers=layers) > 0


@pytest.mark.parametrize("map", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_servers_own_path_survives(granularity, map, scale):
    """Payload of 16 KiB and more goes straight into the mapping."""
    direct_bytes = []

    class Client(TransmissionClient):
        def close(self):
            direct_bytes.append(super().close().direct_bytes)

    judged = check_streams(
        granularity,
        range(300, 300 + scale(1, 30)),
        size=1 << 16,
        count=30,
        limit=8,
        lengths=(16384, 20001, 40000),
        connect=lambda channel: Client(channel, map=map),
    )
    assert judged > 0
    assert all(direct_bytes) if map else not any(direct_bytes)


@pytest.mark.parametrize("map", [True, False])
def test_the_server_really_uses_the_mapping(map):
    recorded = RecordedDevice("cacheline", size=1 << 16)
    with TransmissionClient(recorded.channel, map=map) as client:
        client.write(64, b"x" * 32768, fua=True)
        assert client.read(64, 32768) == b"x" * 32768
        result = client.close()
    assert result.errors == 0
    assert result.direct_bytes == (2 * 32768 if map else 0)
    kinds = {kind for kind, _, _ in recorded.recording.events()}
    assert ("store_nt" in kinds) != map


@pytest.mark.parametrize("op", ["write", "zero", "discard"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fua_covers_whole_pages_too(granularity, op):
    """Zeroes over whole pages may become a hole, which needs more than a fence."""
    recorded = RecordedDevice(granularity, size=4 * 4096)
    recorded.submit(Request(op, 4096, bytes(2 * 4096), fua=True))
    recorded.submit(Request("write", 4096, b"A" * 4096, fua=True))
    recorded.submit(Request(op, 0, bytes(3 * 4096)))
    recorded.submit(Request("flush"))
    assert recorded.check() > 0


def test_without_an_acknowledgement_nothing_is_promised():
    recorded = RecordedDevice("cacheline", size=4096)
    recorded.submit(Request("write", 0, b"A" * 8))
    last = recorded.recording.event_count()
    unfenced = recorded.recording.events().index(("fence", 0, 0))
    words = {image[:8] for image in recorded.recording.crash_images(unfenced)}
    assert words == {recorded.initial[:8], b"A" * 8}
    # The raw layer fences every write: after its acknowledgement nothing is open any more.
    assert recorded.recording.crash_count(last) == 1


def test_a_device_that_forgets_is_caught():
    """The oracle itself, on a server that answers without doing anything durable."""

    class Careless:
        def __init__(self, recorded):
            self.medium = recorded.recording.medium()

        def write(self, offset, data, *, fua=False):
            self.medium.write(offset, data, how="cached")

        def flush(self):
            self.medium.fence()

    for request in (Request("write", 0, b"A" * 64, fua=True), Request("flush")):
        recorded = RecordedDevice("cacheline", size=4096, seed=5)
        recorded.submit(Request("write", 0, b"A" * 64), Careless(recorded))
        recorded.submit(request, Careless(recorded))
        with pytest.raises(DurabilityError, match=r"seed 5, after \d+ events .* the word at byte"):
            recorded.check()
