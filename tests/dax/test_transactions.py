"""Transactions: staged, committed, aborted, recovered after every power failure."""

import pytest

import pmemkit
from pmemkit._native import dax as native
from pmemkit.errors import Corrupt, InvalidArgument, NoSpace, OutOfRange
from pmemkit.testing import Recording

PAGE = 4096


@pytest.fixture
def mapping():
    with pmemkit.map("memfd:64K") as mapped:
        mapped.log(8 * PAGE, 2 * PAGE)
        yield mapped


def test_changes_are_seen_inside_and_made_at_the_end(mapping):
    with mapping.transaction() as tx:
        tx[10:15] = b"hello"
        tx[12:13] = b"L"
        assert tx[8:17] == b"\0\0heLlo\0\0"
        assert mapping.read(10, 5) == bytes(5)
    assert mapping.read(10, 5) == b"heLlo"


def test_an_exception_or_an_abort_changes_nothing(mapping):
    with pytest.raises(ZeroDivisionError), mapping.transaction() as tx:
        tx[0:4] = b"half"
        1 // 0  # noqa: B018
    with mapping.transaction() as tx:
        tx[0:4] = b"half"
        tx.abort()
    assert mapping.read(0, 4) == bytes(4)
    for use in (lambda: tx.commit(), lambda: tx.write(0, b"x"), lambda: tx[0:1]):
        with pytest.raises(InvalidArgument, match="has ended"):
            use()


def test_what_does_not_fit_is_refused_before_anything_changes(mapping):
    with pytest.raises(NoSpace), mapping.transaction() as tx:
        tx[0:4] = b"half"
        tx.write(PAGE, bytes(2 * PAGE))
    with pytest.raises(InvalidArgument, match="in the log itself"), mapping.transaction() as tx:
        tx[0:4] = b"half"
        tx.write(8 * PAGE - 1, b"xx")
    assert mapping.read(0, 4) == bytes(4)
    tx = mapping.transaction()
    with pytest.raises(OutOfRange):
        tx.write(16 * PAGE - 1, b"xx")
    for where, data in ((slice(0, 4), b"123"), (slice(0, 4, 2), b"12"), (3, b"1")):
        with pytest.raises(InvalidArgument):
            tx[where] = data


def test_a_log_is_opened_before_transactions_and_not_over_data(mapping):
    with pmemkit.map("memfd:64K") as other:
        with pytest.raises(InvalidArgument, match="there is no log yet"):
            other.transaction()
        other.write(0, b"precious")
        with pytest.raises(Corrupt, match="the first word is 0x73756f6963657270"):
            other.log(0, PAGE)
        with pytest.raises(InvalidArgument, match="whole lines of 64 bytes"):
            other.log(PAGE, 100)
        assert other.log(0, PAGE, create=True).capacity == PAGE - 192


@pytest.mark.parametrize("granularity", ["byte", "cacheline", "page"])
def test_every_power_failure_leaves_all_or_nothing(granularity, scale):
    """The exhaustive exploration is in Rust; this is the same promise through the Python class."""
    recording = Recording(4 * PAGE, granularity=granularity)
    mapping = native.Mapping(recording.medium(), length=4 * PAGE, tracker="explicit")
    log = native.Log(mapping, 3 * PAGE, PAGE)
    log.commit([(8, b"11111111"), (PAGE + 60, b"11111111")])
    first = recording.event_count()
    log.commit([(8, b"22222222"), (PAGE + 60, b"22222222")])
    last = recording.event_count()
    seen = set()
    for event in range(first, last + 1):
        for image in recording.crash_images(event, limit=scale(12, 200)):
            found = _recovered(image, granularity)
            assert found[0] == found[1], event
            seen.add(found[0])
            if event == last:
                assert found[0] == b"22222222"
    assert seen == {b"11111111", b"22222222"}


def _recovered(image, granularity):
    recording = Recording(len(image), granularity=granularity, initial=image)
    mapping = native.Mapping(recording.medium(), length=len(image), tracker="explicit")
    native.Log(mapping, 3 * PAGE, PAGE)
    return mapping.read(8, 8), mapping.read(PAGE + 60, 8)


def test_recovery_is_told_of(tmp_path):
    recording = Recording(4 * PAGE)
    mapping = native.Mapping(recording.medium(), length=4 * PAGE, tracker="explicit")
    native.Log(mapping, 0, PAGE).commit([(PAGE, b"12345678"), (2 * PAGE, b"12345678")])
    path = tmp_path / "crashed.img"
    # Just before the record is retired: its number is the last word that is stored.
    stores = [n for n, (kind, *_) in enumerate(recording.events()) if kind == "store"]
    path.write_bytes(recording.durable_image(stores[-1]))
    with pmemkit.map(path) as crashed:
        assert crashed.log(0, PAGE).recovered == 2
        assert crashed.log(0, PAGE).recovered == 0
        assert crashed.read(2 * PAGE, 8) == b"12345678"
