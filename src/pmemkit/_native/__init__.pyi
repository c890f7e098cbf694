"""Typed surface of the Rust core. The documentation of the core's Python side lives here.

Submodules are attributes: write ``from pmemkit._native import block``.
"""

from . import bench as bench
from . import block as block
from . import btt as btt
from . import dax as dax
from . import direct as direct
from . import fault as fault
from . import formats as formats
from . import frames as frames
from . import fuse as fuse
from . import media as media
from . import memory as memory
from . import nbd as nbd
from . import remote as remote
from . import sg as sg

BUILD_PROFILE: str
"""``"debug"`` or ``"release"``; benchmarks refuse anything but the latter."""

PLANTED_FAULTS: bool
"""True for a build that carries planted durability faults (a test's build, never a user's)."""

NO_PAGE_MAP: bool
"""True for a build in which making a page map ends the process (a test's build, never a user's)."""

def version() -> str:
    """Version of the core, equal to the package's."""

def error_kinds() -> list[tuple[str, int]]:
    """Every error kind of the core with its default errno."""

def constants() -> dict[str, int]:
    """Constants that both sides know, for the agreement test."""

def nothing() -> None:
    """An empty call: the floor that the cost of every other call is measured against."""
