"""A provider that fetches pages from an NBD server, through libnbd.

Invariants:
1. Each thread has a connection of its own: a handle of libnbd is one conversation.

What this does not do: write, or keep what it fetched.
"""

import importlib
import threading
from typing import Any

from pmemkit.errors import MediaError, NotSupported

__all__ = ["NbdSource"]

_PIECE = 32 << 20
"""What servers take at once."""


class NbdSource:
    """An export of an NBD server."""

    def __init__(self, uri: str, page_size: int) -> None:
        """Connects. Raises :class:`NotSupported` without libnbd, :class:`MediaError` with what it
        says where it cannot connect."""
        try:
            self._nbd: Any = importlib.import_module("nbd")
        except ImportError:
            text = "loading from an NBD server needs libnbd for Python (python3-libnbd)"
            raise NotSupported(text, op="load", path=uri) from None
        self._uri, self._page_size = uri, page_size
        self._own = threading.local()
        self.size: int = self._handle().get_size()

    def _handle(self) -> Any:
        handle = getattr(self._own, "handle", None)
        if handle is None:
            handle = self._nbd.NBD()
            try:
                handle.connect_uri(self._uri)
            except self._nbd.Error as cause:
                raise MediaError(str(cause), op="load", path=self._uri) from cause
            self._own.handle = handle
        return handle

    def provide(self, first: int, count: int) -> bytes:
        """The bytes of pages; behind the end of the export they are zeroes."""
        at, wanted = first * self._page_size, count * self._page_size
        end = min(at + wanted, self.size)
        try:
            handle = self._handle()
            pieces = [
                bytes(handle.pread(min(_PIECE, end - start), start))
                for start in range(at, end, _PIECE)
            ]
        except self._nbd.Error as cause:
            # A conversation that broke off is not taken up again.
            self._own.handle = None
            raise MediaError(str(cause), op="read", path=self._uri) from cause
        return b"".join(pieces).ljust(wanted, b"\0")
