"""A device as one file of a FUSE mount, served by threads of this process.

What this does not do: unmount. :mod:`pmemkit.serve.mounts` does, also for a server that was
killed.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from pmemkit.errors import PmemError
from pmemkit.storage import BlockDevice

__all__ = ["FuseExport"]

_THREADS = 4
_WAIT_SECONDS = 3600.0


class FuseExport:
    """The file ``directory/name`` over a device, from construction until it is unmounted."""

    def __init__(self, device: BlockDevice, directory: Path, name: str) -> None:
        from pmemkit._native import fuse

        self.file = directory / name
        channel = device.channel()
        self._session = fuse.Session(channel, directory, name=name, source=name, threads=_THREADS)
        self._failure: PmemError | None = None
        self._server = threading.Thread(target=self._serve, name="fuse", daemon=True)
        self._server.start()

    def _serve(self) -> None:
        try:
            self._session.serve()
        except PmemError as failure:
            self._failure = failure

    def when_unused(self, call: Callable[[], None]) -> None:
        """Has ``call`` called, once, by a thread, when nobody has the file open any more."""

        def wait() -> None:
            while not self._session.wait_unused(_WAIT_SECONDS):
                pass
            call()

        threading.Thread(target=wait, name="unused", daemon=True).start()

    def join(self, seconds: float) -> bool:
        """Waits until every request is answered after it was unmounted; false if it took longer.
        Raises what ended it before that."""
        self._server.join(seconds)
        if self._failure is not None:
            raise self._failure
        return not self._server.is_alive()
