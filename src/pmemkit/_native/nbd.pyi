"""NBD transmission: requests from a connected socket, without the GIL."""

from typing import Self, final

from typing_extensions import Buffer

from .block import Channel

@final
class ServeResult:
    """Frozen totals of one connection."""

    requests: int
    bytes_read: int
    bytes_written: int
    errors: int
    direct_bytes: int
    """Payload that went straight from or to mapped bytes."""
    cpu_seconds: float
    """CPU time of the connection's threads, user and system."""
    reason: str
    """``disconnect`` (the client said DISC), ``eof``, ``stopped``, ``protocol: ...``, ``system: ...``."""

@final
class Connection:
    """One connection in the transmission phase. The descriptor is duplicated."""

    def __new__(
        cls,
        fd: int,
        channel: Channel,
        *,
        leftover: Buffer = ...,
        structured: bool = False,
        allocation_context: int | None = None,
        transmission_flags: int,
        map: bool = True,
        workers: int = 4,
        poll_us: int = 50,
    ) -> Self:
        """``leftover``: bytes the client sent right behind the handshake. ``transmission_flags``:
        the 16 bits that were advertised; anything else is refused. ``allocation_context``: the id
        given to ``base:allocation``, or ``None`` when it was not selected. ``map=False`` forces
        transfers through a buffer. ``poll_us``: the longest time to poll before blocking; 0 never
        polls."""

    def serve(self) -> ServeResult:
        """Serves until the connection ends. Run it in a thread: the GIL is released throughout."""

    def stop(self) -> None:
        """Asks ``serve`` to finish what was received, answer it and return. Any thread, any time."""

    def abort(self) -> None:
        """Cuts the connection: nothing more is received or sent."""
