"""Block devices for others: exports over NBD."""

from pmemkit.serve.export import Export
from pmemkit.serve.listeners import Listener, listen_activated, listen_tcp, listen_unix
from pmemkit.serve.nbd_server import (
    Event,
    NativeTransmission,
    NbdServer,
    RunningServer,
    serve_in_thread,
)

__all__ = [
    "Event",
    "Export",
    "Listener",
    "NativeTransmission",
    "NbdServer",
    "RunningServer",
    "listen_activated",
    "listen_tcp",
    "listen_unix",
    "serve_in_thread",
]
