"""Storage works in a build in which making a page map ends the process.

``tools/build-native --no-page-map`` makes that build, and the suites of storage run with its
directory as ``PYTHONPATH``; what is here shows that the build does what it says.
"""

import subprocess
import sys

import pytest

from pmemkit import _native


@pytest.mark.skipif(not _native.NO_PAGE_MAP, reason="a build of tools/build-native --no-page-map")
@pytest.mark.parametrize(
    "expression",
    [
        "frames.Allocator(8)",
        "frames.Allocator.over(media.map_anonymous(8192), 0, 8192, 8, persistent=False)",
    ],
)
def test_a_page_map_ends_the_process(expression):
    program = f"from pmemkit._native import frames, media; {expression}"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == -6, done.stderr


def test_a_plain_build_says_so():
    assert isinstance(_native.NO_PAGE_MAP, bool)
