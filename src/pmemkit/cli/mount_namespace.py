"""``pmem mount``: a file system of the kernel on a namespace, mounted.

A server stays behind, in a process of its own: it reports once through a pipe, when all is mounted
or nothing is left of it.

What this does not do: put the chain up and take it down (:mod:`pmemkit.serve.mounting`).
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmemkit.cli._cache import add_cache_options, open_device
from pmemkit.cli._common import (
    add_levelling_options,
    add_open_options,
    make_parser,
    print_json,
    typed,
)
from pmemkit.errors import InvalidArgument, PmemError, SystemFailure
from pmemkit.media.wear import keep_noting
from pmemkit.storage.layers import Layer, layer_help, parse_layer

if TYPE_CHECKING:
    from pmemkit.serve.mounting import Served, Wanted
    from pmemkit.serve.mounts import Mounted

__all__ = ["run"]

_EXAMPLES = """\
  pmem mount disk.img /mnt --mkfs ext4          a new file system; refused where something is
  pmem mount vm.img:namespace0.1 /mnt           one namespace, as its mode has it
  pmem mount disk.img /mnt -o noatime,discard
  pmem mount vm.img:namespace0.1 /mnt --cache writeback
  pmem mount --list
  pmem umount /mnt"""

_NOTES = """\
Needs root, FUSE and a loop device. A server stays in the background until the file system is
unmounted, by pmem umount or anybody else; the image is locked meanwhile. SIGTERM makes it unmount.

layers, the first nearest the client, as NAME or NAME=OPTION=VALUE,OPTION=VALUE:
"""


def run(arguments: Sequence[str]) -> int:
    """Mounts, or lists what is mounted."""
    options = _parser().parse_intermixed_args(arguments)
    if options.list:
        return _list(options)
    if options.namespace is None or options.directory is None:
        raise InvalidArgument("NAMESPACE and DIR are needed; --list shows what is mounted")
    from pmemkit.serve.mounting import Wanted, check_machine

    wanted = Wanted(
        namespace=_absolute(options.namespace),
        directory=os.path.realpath(options.directory),
        mkfs=options.mkfs,
        force=options.force,
        options=options.options,
        read_only=options.read_only,
    )
    check_machine(wanted)
    if options.foreground:
        _serve(wanted, options, lambda record: _announce(record.record(), options))
        return 0
    _announce(_in_background(wanted, options), options)
    return 0


def _absolute(namespace: str) -> str:
    """As somebody in another directory would name it."""
    from pmemkit.media.provider import memory_spec

    return namespace if memory_spec(namespace) is not None else str(Path(namespace).absolute())


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "mount", "Mount a file system on a namespace.", _EXAMPLES, _NOTES + layer_help()
    )
    parser.add_argument(
        "namespace",
        metavar="NAMESPACE",
        nargs="?",
        help="a file, a device, IMAGE:namespaceR.N, or a memory spec",
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where it is mounted")
    parser.add_argument("--list", action="store_true", help="what is mounted, and by whom")
    parser.add_argument("--mkfs", choices=("ext4", "xfs"), help="make a file system first")
    parser.add_argument(
        "--force", action="store_true", help="with --mkfs: whatever is there, it is lost"
    )
    parser.add_argument("-o", "--options", metavar="OPTIONS", help="as mount takes them")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument(
        "--layer", metavar="LAYER", type=typed(parse_layer), action="append", default=[]
    )
    add_cache_options(parser)
    add_open_options(parser)
    add_levelling_options(parser)
    parser.add_argument("--foreground", action="store_true", help="do not go into the background")
    parser.add_argument("--json", action="store_true")
    return parser


def _list(options: argparse.Namespace) -> int:
    from pmemkit.serve.mounts import records

    found = records()
    if options.json:
        print_json([each.record() | {"alive": each.alive} for each in found])
        return 0
    for each in found:
        state = f"process {each.pid}" if each.alive else "its server died; pmem umount cleans up"
        print(f"{each.directory}: {each.namespace} on {each.loop or 'nothing yet'}, {state}")
    return 0


def _open_device(options: argparse.Namespace, stack: ExitStack) -> "Served":
    from pmemkit.serve.mounting import Served
    from pmemkit.storage import open_region

    region = stack.enter_context(
        open_region(
            options.namespace,
            read_only=options.read_only,
            granularity=options.granularity,
            locking=options.locking,
            ordering=options.ordering,
            wear=options.wear,
            levelling_period=options.levelling_period,
        )
    )
    stack.enter_context(keep_noting([region.note_wear]))
    layers = [_anchored(layer) for layer in options.layer]
    opened = open_device(region, "mount", options, layers)
    stack.enter_context(opened.device)
    for each in opened.defaults.notes:
        _say(each)
    return Served(*opened)


def _anchored(layer: Layer) -> Layer:
    """A server in the background has another working directory when it writes a trace out."""
    file = layer.options.get("file")
    if file is None:
        return layer
    return replace(layer, options={**layer.options, "file": str(Path(file).absolute())})


def _serve(
    wanted: "Wanted", options: argparse.Namespace, announce: "Callable[[Mounted], None]"
) -> None:
    from pmemkit.serve.mounting import Stopped, serve_mount

    def open_it(stack: ExitStack) -> "Served":
        served = _open_device(options, stack)
        # Whatever directory it was started in must not be held.
        os.chdir("/")
        return served

    try:
        serve_mount(wanted, open_it, announce, _say)
    except Stopped:
        raise SystemFailure("stopped before it was mounted", errno=4, op="mount") from None


# --- in the background ----------------------------------------------------------------------------


def _in_background(wanted: "Wanted", options: argparse.Namespace) -> dict[str, Any]:
    """Starts the server and waits for its report."""
    receiver, sender = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _be_server(wanted, options, sender)
    os.close(sender)
    try:
        return _report(receiver, wanted)
    except KeyboardInterrupt:
        # It takes down what it has put up, and says so by closing the pipe.
        os.kill(child, signal.SIGTERM)
        _receive(receiver)
        raise
    finally:
        os.close(receiver)


def _receive(receiver: int) -> bytes:
    parts = []
    while part := os.read(receiver, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def _report(receiver: int, wanted: "Wanted") -> dict[str, Any]:
    told = _receive(receiver)
    if not told:
        raise SystemFailure("its server ended without a word", op="mount", path=wanted.directory)
    report: dict[str, Any] = json.loads(told)
    if "failure" in report:
        from pmemkit.serve.mounts import failure_of

        raise failure_of(report["failure"]["kind"], report["failure"]["message"])
    return report


def _be_server(wanted: "Wanted", options: argparse.Namespace, sender: int) -> None:
    """The child's whole life."""
    os.setsid()
    code = 1
    try:
        reporter = _Reporter(sender)
        try:
            _serve(wanted, options, reporter.mounted)
            code = 0
        except OSError as failure:
            code = getattr(failure, "exit_code", SystemFailure.exit_code)
            reporter.failed(failure)
        except Exception as failure:
            reporter.failed(SystemFailure(f"{type(failure).__name__}: {failure}"))
            raise
    finally:
        # Nothing of the parent's is flushed, closed or called on the way out.
        os._exit(code)


class _Reporter:
    """The server's one word to who started it."""

    def __init__(self, sender: int) -> None:
        self._sender: int | None = sender

    def mounted(self, record: "Mounted") -> None:
        """All is well; from now on what is said goes to the log."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log = os.open(Path(record.place) / "log", flags, 0o600)
        for source, target in ((nowhere, 0), (nowhere, 1), (log, 2)):
            os.dup2(source, target)
        os.close(nowhere)
        os.close(log)
        self._tell(record.record())

    def failed(self, failure: OSError) -> None:
        """It did not come to anything, or came to a bad end, which the log has."""
        kind = failure.kind if isinstance(failure, PmemError) else SystemFailure.kind
        path = f"{failure.filename}: " if failure.filename else ""
        text = str(failure) if isinstance(failure, PmemError) else f"{path}{failure.strerror}"
        if self._sender is None:
            _say(text)
        else:
            self._tell({"failure": {"kind": kind, "message": text}})

    def _tell(self, what: dict[str, Any]) -> None:
        if self._sender is not None:
            os.write(self._sender, json.dumps(what).encode())
            os.close(self._sender)
            self._sender = None


# --- what is said ---------------------------------------------------------------------------------


def _announce(told: dict[str, Any], options: argparse.Namespace) -> None:
    for what in ("cache", "levelling"):
        if told[f"{what}_because"] is not None:
            _say(f"{told['directory']}: {what} {told[what]}: {told[f'{what}_because']}")
    if options.json:
        print_json(told)
    else:
        made = "a new " if told["made"] else ""
        state = ", read-only" if told["read_only"] else ""
        print(
            f"{told['directory']}: {made}{told['filesystem'] or 'file system'} on {told['loop']}"
            f" over {told['fuse_file']}, {told['sector_size']}-byte sectors{state},"
            f" served by process {told['pid']}"
        )
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"pmem mount: {text}", file=sys.stderr, flush=True)
