"""Shared by all tests: programs of others come from one table, and so do the reasons to skip."""

import contextlib
import fcntl
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOAK = os.environ.get("PMEMKIT_SOAK") == "1"

# A shell starts what runs in the background with SIGINT ignored, and children inherit that: those
# of tests are to be interrupted all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _load_peers():
    spec = importlib.util.spec_from_file_location("peers", ROOT / "tools" / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


peers = _load_peers()


def need_program(name: str) -> str:
    """Where a program, library or module of `tools/peers.py` is; skips the test without it."""
    found = peers.find(name)
    if found is None:
        pytest.skip(peers.reason(name))
    return found


@pytest.fixture(scope="session")
def need() -> Callable[[str], str]:
    """``need("fio")`` gives the path of a peer or skips the test with the table's reason."""
    return need_program


@pytest.fixture(scope="session")
def scale() -> Callable[[int, int], int]:
    """``scale(reduced, full)``: how often to repeat; ``full`` under ``PMEMKIT_SOAK=1``."""
    return lambda reduced, full: full if SOAK else reduced


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """``huge_pages(count)``: so many huge pages are free until the test ends, or it is skipped.
    Tests that ask take turns, in all processes: the count is the machine's."""
    knob = Path("/proc/sys/vm/nr_hugepages")
    with contextlib.ExitStack() as held:

        def reserve(count: int) -> None:
            lock = held.enter_context(Path(tempfile.gettempdir(), "pmemkit-huge-pages").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                before = int(knob.read_text())
                knob.write_text(f"{before + count}\n")
            except OSError as error:
                pytest.skip(f"no huge pages can be reserved: {error}")
            held.callback(knob.write_text, f"{before}\n")
            if int(knob.read_text()) < before + count:
                pytest.skip(f"the kernel has no {count} huge pages of memory left")

        yield reserve


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``peer("fio", …)`` needs these programs; ``soak`` needs ``PMEMKIT_SOAK=1``."""
    if item.get_closest_marker("soak") and not SOAK:
        pytest.skip("full counts: run make soak")
    for mark in item.iter_markers("peer"):
        for name in mark.args:
            need_program(name)
