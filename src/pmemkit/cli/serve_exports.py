"""``pmem serve``: regions as NBD exports, until SIGTERM or Ctrl-C.

The exports are opened and the sockets are bound before anything is printed, so whoever reads a URI
can connect to it. Standard output
has the URIs (or one JSON object) and nothing else.

What this does not do: speak NBD (:mod:`pmemkit.serve` and the core do), daemonise.
"""

import argparse
import os
import signal
import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pmemkit.cli._cache import Opened, add_cache_options, open_device
from pmemkit.cli._common import (
    add_levelling_options,
    add_open_options,
    make_parser,
    print_json,
    size,
    typed,
)
from pmemkit.errors import InvalidArgument, SystemFailure
from pmemkit.media.wear import keep_noting
from pmemkit.storage.layers import layer_help, parse_layer
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.serve import Event, Export, Listener
    from pmemkit.storage.defaults import Defaults

__all__ = ["default_image", "default_socket", "run"]

_EXAMPLES = """\
  pmem serve                            an image of your own, made at the first use
  pmem serve disk.img --unix /run/disk.sock
  pmem serve boot=boot.img data=/dev/pmem0 --tcp 127.0.0.1:10809
  pmem serve disk.img:namespace0.0      one namespace, as its mode has it
  pmem serve disk.img:namespace0.0 --read-only --backup-info-block
  pmem serve - --size 4G                memory; nothing outlives the server
  pmem serve disk.img --layer delay=ops=flush,seconds=0.01 --layer trace=file=trace.txt
  pmem serve disk.img --cache writeback --cache-size 256M
  pmem serve disk.img:namespace0.0 --levelling least-worn
  pmem serve disk.img --json | jq -r '.uris[0]' | xargs nbdinfo"""

_NOTES = """\
Without --unix and --tcp it listens on the sockets systemd handed over, or else on a socket of its
own in the runtime directory. An image is locked while it is served: two writers would destroy it.
SIGTERM and Ctrl-C finish what was received, and a second one cuts what is left.

layers, the first nearest the client, as NAME or NAME=OPTION=VALUE,OPTION=VALUE:
"""

_DEFAULT_SIZE = 1 << 30


def run(arguments: Sequence[str]) -> int:
    """Serves until told to stop."""
    options = _parser().parse_args(arguments)
    from pmemkit.serve import NativeTransmission, NbdServer

    with ExitStack() as stack:
        opened = _open_all(options, stack)
        exports = [_export(name, each, options) for name, each in opened]
        listeners = _listeners(options, stack)
        server = NbdServer(
            exports,
            handshake_timeout_seconds=options.handshake_timeout,
            connections_limit=options.max_connections,
            drain_seconds=options.drain_timeout,
            on_event=_print_event if options.verbose else None,
            transmission=NativeTransmission(map=not options.no_map, poll_us=options.poll_us),
        )
        # From the first URI on, being told to stop is no accident; the server's own handlers come a
        # moment later.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        _announce(options, exports, [each.defaults for _, each in opened], listeners)
        server.run(listeners)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("serve", "Serve regions over NBD.", _EXAMPLES, _NOTES + layer_help())
    parser.add_argument(
        "paths",
        metavar="[NAME=]PATH",
        nargs="*",
        help="files, devices, IMAGE:namespaceR.N, memory specs, or - for memory; the first is "
        "the default export",
    )
    listening = parser.add_argument_group("listening")
    listening.add_argument("--unix", metavar="SOCK", action="append", default=[], help="a socket")
    listening.add_argument(
        "--tcp", metavar="HOST:PORT", action="append", default=[], help="port 0 picks a free one"
    )
    listening.add_argument("--max-connections", type=typed(_count), default=100, metavar="N")
    listening.add_argument(
        "--handshake-timeout", type=typed(_seconds), default=10.0, metavar="SECONDS"
    )
    listening.add_argument(
        "--drain-timeout",
        type=typed(_seconds),
        default=10.0,
        metavar="SECONDS",
        help="how long connections may take to finish after SIGTERM",
    )
    exporting = parser.add_argument_group("exports")
    exporting.add_argument("--name", default=None, help="of the export of a single PATH")
    exporting.add_argument("--description", default="", help="shown to clients that list")
    exporting.add_argument("--read-only", action="store_true")
    exporting.add_argument(
        "--backup-info-block",
        action="store_true",
        help="with --read-only: of mode sector, read by the copy of an info block that is bad",
    )
    exporting.add_argument("--size", type=size, help="of memory and of a new default image (1G)")
    exporting.add_argument(
        "--layer", metavar="LAYER", type=typed(parse_layer), action="append", default=[]
    )
    add_cache_options(exporting)
    add_open_options(exporting)
    add_levelling_options(exporting)
    transmission = parser.add_argument_group("transmission")
    transmission.add_argument(
        "--no-map", action="store_true", help="copy through a buffer instead of the mapped bytes"
    )
    transmission.add_argument(
        "--poll-us",
        type=typed(_count_or_zero),
        default=_default_poll_us(),
        metavar="N",
        help="poll a socket at most so long before blocking; 0 never does (%(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="connections, on standard error")
    parser.add_argument("--json", action="store_true", help="print one object instead of URIs")
    return parser


def _default_poll_us() -> int:
    from pmemkit.serve.nbd_server import NativeTransmission

    return NativeTransmission().poll_us


def _count_or_zero(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"{text!r} is not a count")
    return int(text)


def _count(text: str) -> int:
    if not _count_or_zero(text):
        raise InvalidArgument("0 is too few")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidArgument(f"{text!r} is not a time in seconds")
    return seconds


# --- exports --------------------------------------------------------------------------------------


def default_image() -> Path:
    """The image that is served when none is named."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "pmemkit" / "default.img"


def _open_all(options: argparse.Namespace, stack: ExitStack) -> list[tuple[str, Opened]]:
    """Every region that is served, with the name of its export."""
    from pmemkit.storage import open_region

    if options.name is not None and len(options.paths) > 1:
        raise InvalidArgument("--name is for a single PATH; write NAME=PATH for each of several")
    found, notes = [], []
    for name, path, create_size in _named_paths(options):
        # What a client of a read-only export must not do, this process cannot do either.
        region = stack.enter_context(
            open_region(
                path,
                read_only=options.read_only,
                create_size=create_size,
                granularity=options.granularity,
                locking=options.locking,
                ordering=options.ordering,
                levelling_period=options.levelling_period,
                backup_info_block=options.backup_info_block,
                wear=options.wear,
            )
        )
        notes.append(region.note_wear)
        opened = open_device(region, "nbd", options, options.layer)
        if options.verbose:
            stack.callback(_say_traffic, name, opened)
        stack.enter_context(opened.device)
        if region.read_only_because is not None and not options.read_only:
            _say(f"export {name!r} is read-only: {region.read_only_because}")
        found.append((name, opened))
    stack.enter_context(keep_noting(notes))
    return found


def _export(name: str, opened: Opened, options: argparse.Namespace) -> "Export":
    from pmemkit.serve import Export

    return Export(name, opened.device, options.description, options.read_only)


def _named_paths(options: argparse.Namespace) -> list[tuple[str, str, int | None]]:
    """Export name, path, and the size to make it with if it is missing."""
    size_bytes = _DEFAULT_SIZE if options.size is None else options.size
    if not options.paths:
        image = default_image()
        image.parent.mkdir(parents=True, exist_ok=True)
        return [(options.name or "", str(image), size_bytes)]
    named: list[tuple[str, str, int | None]] = []
    for text in options.paths:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or os.path.exists(text):  # noqa: PTH110
            name, path = "", text
            if len(options.paths) > 1:
                name = os.path.basename(text)  # noqa: PTH119
        if options.name is not None:
            name = options.name
        named.append((name, f"anonymous:{size_bytes}" if path == "-" else path, None))
    if options.size is not None and not any(path == "-" for path in options.paths):
        raise InvalidArgument("--size is for memory (-) and the default image; PATH has a size")
    return named


# --- listeners ------------------------------------------------------------------------------------


def default_socket() -> Path:
    """A socket in a directory that is this user's alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    place = Path(runtime) / "pmemkit" if runtime else Path(f"/tmp/pmemkit-{os.getuid()}")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        text = "is not a directory of yours alone; name a socket with --unix"
        raise SystemFailure(text, op="listen", path=str(place))
    return place / "nbd.sock"


def _listeners(options: argparse.Namespace, stack: ExitStack) -> "list[Listener]":
    from pmemkit.serve import listen_activated, listen_tcp, listen_unix
    from pmemkit.serve.listeners import parse_endpoint

    listeners = listen_activated()
    for path in options.unix:
        listeners.append(listen_unix(path))
        stack.callback(listeners[-1].close)
    for text in options.tcp:
        for listener in listen_tcp(*parse_endpoint(text)):
            stack.callback(listener.close)
            listeners.append(listener)
    if not listeners:
        listeners.append(listen_unix(default_socket()))
        stack.callback(listeners[-1].close)
    return listeners


# --- what is said ---------------------------------------------------------------------------------


def _announce(
    options: argparse.Namespace,
    exports: "list[Export]",
    defaults: "list[Defaults]",
    listeners: "list[Listener]",
) -> None:
    for export, chosen in zip(exports, defaults, strict=True):
        _say(f"export {export.name!r}: {chosen}")
        for each in chosen.notes:
            _say(each)
    uris = [listener.uri(export.name) for listener in listeners for export in exports]
    if options.json:
        rows = [
            {"name": each.name, "size": each.info.size} | chosen.record()
            for each, chosen in zip(exports, defaults, strict=True)
        ]
        print_json({"pid": os.getpid(), "uris": uris, "exports": rows})
    else:
        print("\n".join(uris))
    sys.stdout.flush()
    if options.verbose:
        for export in exports:
            state = " read-only" if export.read_only else ""
            _say(f"export {export.name!r}: {format_size(export.info.size)}{state}")


def _print_event(event: "Event") -> None:
    what = f"connection {event.number} ({event.peer}): {event.kind}"
    if event.export is not None:
        what += f" {event.export!r}"
    if event.result is not None:
        totals = event.result
        read, written = format_size(totals.bytes_read), format_size(totals.bytes_written)
        what += f", {totals.requests} requests, {read} read, {written} written"
        what += f", {totals.errors} errors, {totals.reason}"
    if event.reason is not None:
        what += f": {event.reason}"
    _say(what)


def _say_traffic(name: str, opened: Opened) -> None:
    _say(f"export {name!r}: {opened.traffic()}")


def _say(text: str) -> None:
    print(f"pmem serve: {text}", file=sys.stderr, flush=True)
