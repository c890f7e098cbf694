"""The guest: one build for the whole session, or one reason why there is none."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools.guest import Guest, GuestUnavailableError
from tools.guest_python import layers

HERE = Path(__file__).resolve().parent
_TIMEOUT_SECONDS = 600
"""Of one test: its boots, and the download of a kernel where it is the first one."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"guest", "cxl_guest"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.peer("qemu-system-x86_64"))
        if HERE in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_SECONDS))


def _build(need: Callable[[str], str], cxl: bool) -> Guest:
    for program in ("qemu-system-x86_64", "ndctl", "daxctl", "busybox", "depmod", "mkfs.xfs"):
        need(program)
    try:
        return Guest.build(cxl=cxl)
    except GuestUnavailableError as missing:
        pytest.skip(f"no guest: {missing}")


@pytest.fixture(scope="session")
def guest(need: Callable[[str], str]) -> Guest:
    """The guest with the default kernel; skips with what is missing."""
    return _build(need, cxl=False)


@pytest.fixture(scope="session")
def cxl_guest(need: Callable[[str], str]) -> Guest:
    """The guest with a kernel and a QEMU that know CXL memory; skips with what is missing."""
    need("cxl")
    return _build(need, cxl=True)


@pytest.fixture(scope="session")
def python_layers() -> None:
    """What ``run(…, python=True)`` needs is there; skips where pmemkit's native part is not."""
    try:
        layers()
    except GuestUnavailableError as missing:
        pytest.skip(f"no Python in the guest: {missing}")


@pytest.fixture
def blank(tmp_path: Path) -> Callable[..., Path]:
    """``blank("a.img", 256 << 20)``: a sparse image file."""

    def make(name: str, size_bytes: int) -> Path:
        path = tmp_path / name
        with path.open("wb") as image:
            image.truncate(size_bytes)
        return path

    return make
