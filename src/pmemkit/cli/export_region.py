"""``pmem export-region``: regions for other processes, until SIGTERM or Ctrl-C.

Standard output has one address a line, for ``pmem copy``, ``pmem info`` and :func:`pmemkit.open`.

What this does not do: serve block devices; that is ``pmem serve``.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.parse import quote

from pmemkit.cli._common import add_open_options, make_parser, print_json, typed
from pmemkit.errors import InvalidArgument

if TYPE_CHECKING:
    from pmemkit.serve import Listener
    from pmemkit.serve.region_server import RegionExport

__all__ = ["run"]

_EXAMPLES = """\
  pmem export-region pool.img --unix /run/pool.sock
  pmem copy model.bin remote+unix:///run/pool.sock
  pmem export-region a=one.img b=two.img:namespace0.0 --unix /run/pool.sock --read-only
  pmem export-region memfd:4G --tcp 127.0.0.1:7500"""

_NOTES = """\
Clients copy bytes in and out; a commit makes them durable here. A Unix socket lets in the user of
this process, root, and those named with --user. TCP lets everybody in who reaches the port, and
encrypts nothing.
"""


def run(arguments: Sequence[str]) -> int:
    """Serves until told to stop."""
    options = _parser().parse_args(arguments)
    if not options.unix and not options.tcp:
        raise InvalidArgument("say where to listen: --unix SOCK or --tcp HOST:PORT")
    from pmemkit.serve.region_server import RegionServer

    stopped = threading.Event()
    with ExitStack() as stack:
        exports = _exports(options, stack)
        listeners = _listeners(options, stack)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        stack.enter_context(
            RegionServer(
                exports, listeners, users=options.user, say=_say if options.verbose else _say_not
            )
        )
        _announce(options, exports, listeners)
        stopped.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("export-region", "Serve regions to other processes.", _EXAMPLES, _NOTES)
    parser.add_argument(
        "paths",
        metavar="[NAME=]REGION",
        nargs="+",
        help="files, devices, IMAGE:namespaceR.N or memory specs; without a name it is the default",
    )
    parser.add_argument("--unix", metavar="SOCK", action="append", default=[], help="a socket")
    parser.add_argument(
        "--tcp", metavar="HOST:PORT", action="append", default=[], help="port 0 picks a free one"
    )
    parser.add_argument(
        "--user",
        metavar="UID",
        type=typed(_user),
        action="append",
        default=[],
        help="a user that may connect to a Unix socket, which is opened to all for that",
    )
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="connections, on standard error")
    parser.add_argument("--json", action="store_true", help="print one object instead of addresses")
    add_open_options(parser)
    return parser


def _user(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11):
        raise InvalidArgument(f"{text!r} is not the number of a user")
    return int(text)


def _exports(options: argparse.Namespace, stack: ExitStack) -> "list[RegionExport]":
    from pmemkit.serve.region_server import RegionExport
    from pmemkit.storage import open_region

    exports: list[RegionExport] = []
    for text in options.paths:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = "", text
        if any(export.name == name for export in exports):
            raise InvalidArgument(f"two exports of the name {name!r}: write NAME=REGION")
        region = stack.enter_context(
            open_region(
                path,
                read_only=options.read_only,
                granularity=options.granularity,
                locking=options.locking,
                ordering=options.ordering,
            )
        )
        exports.append(RegionExport(name, region, options.read_only))
    return exports


def _listeners(options: argparse.Namespace, stack: ExitStack) -> "list[Listener]":
    from pmemkit.serve import listen_tcp, listen_unix
    from pmemkit.serve.listeners import parse_endpoint

    listeners: list[Listener] = []
    for path in options.unix:
        listeners.append(listen_unix(path, mode=0o666 if options.user else 0o600))
        stack.callback(listeners[-1].close)
    for text in options.tcp:
        for listener in listen_tcp(*parse_endpoint(text)):
            stack.callback(listener.close)
            listeners.append(listener)
    return listeners


def _announce(
    options: argparse.Namespace, exports: "list[RegionExport]", listeners: "list[Listener]"
) -> None:
    addresses = [_address(listener, each.name) for listener in listeners for each in exports]
    if options.json:
        rows = [{"name": each.name, "size": each.region.size} for each in exports]
        print_json({"addresses": addresses, "exports": rows})
    else:
        print("\n".join(addresses))
    sys.stdout.flush()


def _address(listener: "Listener", export: str) -> str:
    query = f"?export={quote(export)}" if export else ""
    if listener.path is not None:
        return f"remote+unix://{quote(str(listener.path))}{query}"
    host, port = listener.address[0], listener.address[1]
    shown = f"[{host}]" if ":" in host else host
    return f"remote+tcp://{shown}:{port}{query}"


def _say(text: str) -> None:
    print(f"pmem export-region: {text}", file=sys.stderr, flush=True)


def _say_not(text: str) -> None:
    """Of connections nobody wants to hear."""
