"""What `pmemkit.testing` exports is documented and is what its modules define."""

import subprocess
import sys

from pmemkit import testing
from pmemkit._native import media


def test_every_export_is_there_and_documented():
    assert testing.__all__ == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__doc__, name
    assert testing.Recording is media.Recording


def test_the_recording_medium_needs_neither_pytest_nor_hypothesis():
    code = (
        "import sys; from pmemkit.testing import Recording; "
        "print([name for name in ('pytest', 'hypothesis') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
