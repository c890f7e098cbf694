"""What the verbs of the kernel bus share: where things are, how programs run, what to wait for.

A test puts another tree in the place of ``/sys`` and other functions in the place of those that
change something.

What this does not do: know a verb.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pmemkit.bus.holders import Holders
from pmemkit.bus.kernel import kernel_bus
from pmemkit.bus.model import Namespace
from pmemkit.bus.programs import Run, json_of, run_program, write_attribute
from pmemkit.bus.sysfs import Node
from pmemkit.errors import Busy, InvalidArgument, PmemError, SystemFailure

__all__ = ["NAMES", "OFFLINE_SECONDS", "Live", "Made", "failure_of_write"]

Made = Mapping[int, Mapping[str, Any]]

OFFLINE_SECONDS: Final = 60.0
"""How long all blocks of a device together may take to go offline."""

NAMES: Final = {
    "region": re.compile(r"region\d{1,9}"),
    "namespace": re.compile(r"namespace\d{1,9}\.\d{1,9}"),
    "dax": re.compile(r"dax\d{1,9}\.\d{1,9}"),
    "memdev": re.compile(r"mem\d{1,9}"),
    "decoder": re.compile(r"decoder\d{1,9}\.\d{1,9}"),
    "nmem": re.compile(r"nmem\d{1,9}"),
}
_POLL_SECONDS: Final = 0.05


def _silent(_text: str) -> None:
    """Nobody listens."""


@dataclass
class Live:
    """The machine, as the verbs reach it."""

    sysfs: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    runtime: Path = Path("/run/pmemkit")
    """What has to be forgotten at the next boot."""
    run: Run = run_program
    write: Callable[[Path, str, float], None] = write_attribute
    progress: Callable[[str], None] = _silent
    offline_seconds: float = OFFLINE_SECONDS
    clock: Callable[[], float] = field(default=time.monotonic)
    sleep: Callable[[float], None] = field(default=time.sleep)

    # --- programs ----------------------------------------------------------------------------

    def tool(
        self, *argv: str, timeout_seconds: float = 120, given: bytes = b""
    ) -> list[dict[str, Any]]:
        """Runs a program that prints JSON."""
        printed = self.run(argv, timeout_seconds=timeout_seconds, given=given)
        return json_of(printed, argv[0])

    def put(self, path: Path, text: str, what: str, timeout_seconds: float = 60) -> None:
        """Writes an attribute; the error says what was wanted."""
        try:
            self.write(path, text, timeout_seconds)
        except PmemError:
            raise
        except OSError as failure:
            raise failure_of_write(failure, what) from failure

    # --- finding -----------------------------------------------------------------------------

    def name_of(self, kind: str, text: object) -> str:
        """A name of this kind; raises :class:`InvalidArgument` for any other text."""
        if not isinstance(text, str) or NAMES[kind].fullmatch(text) is None:
            raise InvalidArgument(f"{str(text)[:80]!r} is no name of a {kind}")
        return text

    def region(self, dev: str) -> Node:
        """A region of the nvdimm bus."""
        return self._device("nd", self.name_of("region", dev), "region")

    def namespace_node(self, dev: str) -> Node:
        """A namespace's device."""
        return self._device("nd", self.name_of("namespace", dev), "namespace")

    def cxl(self, kind: str, dev: str) -> Node:
        """A device of the CXL bus."""
        return self._device("cxl", self.name_of(kind, dev), f"CXL {kind}")

    def _device(self, bus: str, dev: str, what: str) -> Node:
        place = self.sysfs / "bus" / bus / "devices" / dev
        if not place.exists():
            raise InvalidArgument(f"{dev} is no {what} of this machine, or no longer")
        return Node(dev, place.resolve())

    def namespaces(self, region: str) -> dict[str, Namespace]:
        """The namespaces of a region, by name."""
        found = (each for bus in kernel_bus(self.sysfs) for each in bus.regions)
        here = next((each for each in found if each.dev == region), None)
        if here is None:
            raise InvalidArgument(f"{region} is no region of this machine, or no longer")
        return {each.dev: each for each in here.namespaces}

    def namespace(self, dev: str) -> Namespace:
        """A namespace; raises :class:`InvalidArgument` where there is none, or an empty one."""
        number = self.name_of("namespace", dev).removeprefix("namespace").split(".")[0]
        found = self.namespaces(f"region{number}").get(dev)
        if found is None:
            raise InvalidArgument(f"{dev} is no namespace of this machine, or no longer")
        return found

    def wait_for(self, found: Callable[[], Any], seconds: float = 5.0) -> Any:
        """What ``found`` gives once it is true, or at the end of the time: devices come up a moment
        after what makes them."""
        deadline = self.clock() + seconds
        while not (result := found()) and self.clock() < deadline:
            self.sleep(_POLL_SECONDS)
        return result

    # --- who is in the way -------------------------------------------------------------------

    def require_unused(self, namespace: Namespace, what: str) -> None:
        """Raises :class:`Busy` with whoever uses a namespace."""
        names = [each for each in (namespace.blockdev, namespace.chardev) if each is not None]
        holders = Holders.look([f"/dev/{each}" for each in names], self.sysfs, self.proc)
        users = []
        if namespace.blockdev is not None:
            users += [f"mounted on {each}" for each in holders.mounts(namespace.blockdev)]
            users += holders.of_disk(namespace.blockdev)
        if namespace.chardev is not None:
            users += holders.of_path(f"/dev/{namespace.chardev}")
            driver = Node(
                namespace.chardev, self.sysfs / "bus" / "dax" / "devices" / namespace.chardev
            ).driver()
            users += [f"{namespace.chardev}, which is system RAM"] if driver == "kmem" else []
        if users:
            text = f"{namespace.dev} cannot be {what}, because it is in use: {', '.join(users)}"
            raise Busy(text, op=what)


def failure_of_write(failure: OSError, what: str) -> PmemError:
    """The error for a write that the kernel refused."""
    reason = failure.strerror or str(failure)
    kind = Busy if failure.errno in (11, 16) else SystemFailure
    return kind(f"{what}: {reason}", errno=failure.errno, op="sysfs")
