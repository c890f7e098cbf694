"""What `pmemkit.testing` exports is what it says."""

import pmemkit.testing
from pmemkit import testing
from pmemkit._native import media


def test_every_export_is_there_and_documented():
    assert testing.__all__ == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name
    assert testing.Recording is media.Recording


def test_nothing_else_is_public():
    modules = {"crash", "device_suite", "media", "protocols", "reference", "stacks"}
    modules |= {"state_machine", "transmission"}
    public = {name for name in vars(pmemkit.testing) if not name.startswith("_")}
    assert public - modules == set(testing.__all__)
