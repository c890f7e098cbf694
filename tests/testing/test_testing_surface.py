"""What `pmemkit.testing` exports is documented and is what its modules define."""

from pmemkit import testing
from pmemkit._native import media


def test_every_export_is_there_and_documented():
    assert testing.__all__ == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name
    assert testing.Recording is media.Recording
