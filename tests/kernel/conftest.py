"""The guest: one build for the whole session, or one reason why there is none."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools.guest import Guest, GuestUnavailableError

HERE = Path(__file__).resolve().parent
_TIMEOUT_SECONDS = 600
"""Of one test: its boots, and the download of a kernel where it is the first one."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "guest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.peer("qemu-system-x86_64"))
        if HERE in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_SECONDS))


@pytest.fixture(scope="session")
def guest(need: Callable[[str], str]) -> Guest:
    """The guest with the default kernel; skips with what is missing."""
    for program in ("qemu-system-x86_64", "ndctl", "daxctl", "busybox", "depmod", "mkfs.xfs"):
        need(program)
    try:
        return Guest.build()
    except GuestUnavailableError as missing:
        pytest.skip(f"no guest: {missing}")


@pytest.fixture
def blank(tmp_path: Path) -> Callable[..., Path]:
    """``blank("a.img", 256 << 20)``: a sparse image file."""

    def make(name: str, size_bytes: int) -> Path:
        path = tmp_path / name
        with path.open("wb") as image:
            image.truncate(size_bytes)
        return path

    return make
