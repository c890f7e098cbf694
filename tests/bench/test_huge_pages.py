"""Huge pages that a measurement sets aside are the machine's again after it."""

import pytest

from pmemkit.bench import _pool_arrays


@pytest.fixture
def reserved(tmp_path, monkeypatch):
    place = tmp_path / "nr_hugepages"
    place.write_text("3\n")
    monkeypatch.setattr(_pool_arrays, "_NR_HUGE_PAGES", place)
    return place


def test_as_many_more_are_there_inside_and_not_after_it(reserved):
    with pytest.raises(ZeroDivisionError), _pool_arrays._huge_pages(7):
        assert reserved.read_text() == "10\n"
        raise ZeroDivisionError
    assert reserved.read_text() == "3\n"


def test_what_is_not_there_is_not_promised(reserved):
    with _pool_arrays._huge_pages(1 << 30) as there:
        assert not there
    reserved.unlink()
    with _pool_arrays._huge_pages(1) as there:
        assert not there
    assert not reserved.exists()
