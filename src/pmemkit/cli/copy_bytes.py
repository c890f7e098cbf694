"""``pmem copy``: between regions, files, standard input and output.

A target that does not exist is made: as large as the source, or growing with what arrives. One that
exists keeps what lies behind the last byte copied.

What this does not do: copy in parallel, resume.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import add_open_options, make_parser, print_json, typed
from pmemkit.errors import InvalidArgument, PmemError
from pmemkit.storage.layers import Layer, layer_help, parse_layer
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.storage.copying import CopyFailed, Source, Target
    from pmemkit.storage.device import BlockDevice

__all__ = ["run"]

_EXAMPLES = """\
  pmem copy disk.img backup.img --verify
  pmem copy disk.img /dev/pmem0
  pmem copy rootfs.ext4 vm.img:namespace0.0
  zcat disk.img.gz | pmem copy - disk.img --detect-zeroes
  pmem copy disk.img - | sha256sum"""

_NOTES = """\
Holes of the source are not read and become holes of the target where it can have them. A target
that is too small is refused before anything is written.

layers, as NAME or NAME=OPTION=VALUE,OPTION=VALUE:
"""


def run(arguments: Sequence[str]) -> int:
    """Copies, flushes, and verifies if asked to."""
    options = _parser().parse_args(arguments)
    if options.verify and options.target == "-":
        raise InvalidArgument("--verify reads the target back, which standard output cannot do")
    if options.json and options.target == "-":
        raise InvalidArgument("--json prints to standard output, where the copy goes")
    with ExitStack() as stack:
        source, size = _open_source(options, stack)
        target = _open_target(options, size, stack)
        return _copy(options, source, target)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "copy", "Copy bytes, sparse and durable at the end.", _EXAMPLES, _NOTES + layer_help()
    )
    parser.add_argument("source", metavar="SOURCE", help="file, device, IMAGE:namespaceR.N, or -")
    parser.add_argument("target", metavar="TARGET", help="the same; - is standard output")
    parser.add_argument("--verify", action="store_true", help="read the target back and compare")
    parser.add_argument(
        "--detect-zeroes", action="store_true", help="make holes of blocks that hold only zeroes"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, on a terminal too")
    parser.add_argument("--json", action="store_true", help="say what was copied, as JSON")
    parser.add_argument(
        "--backup-info-block",
        action="store_true",
        help="of a source of mode sector: read by the copy of an info block that is bad",
    )
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-layer",
            metavar="LAYER",
            type=typed(parse_layer),
            action="append",
            default=[],
            help=f"put a layer on the {side}",
        )
    add_open_options(parser)
    return parser


def _open_source(options: argparse.Namespace, stack: ExitStack) -> "tuple[Source, int | None]":
    from pmemkit.storage import open_region
    from pmemkit.storage.copying import DeviceSource, StreamSource

    layers: list[Layer] = options.source_layer
    if options.source == "-":
        if layers:
            raise InvalidArgument("--source-layer needs a region, not standard input")
        return StreamSource(sys.stdin.fileno()), None
    region = stack.enter_context(
        open_region(
            options.source,
            read_only=True,
            locking=options.locking,
            backup_info_block=options.backup_info_block,
        )
    )
    device = stack.enter_context(region.device(layers=layers))
    return DeviceSource(device), device.size


def _open_target(
    options: argparse.Namespace, source_size: int | None, stack: ExitStack
) -> "Target":
    from pmemkit.bus.locate import split_namespace
    from pmemkit.media.provider import memory_spec
    from pmemkit.storage import open_region
    from pmemkit.storage.copying import DeviceTarget, GrowingTarget, StreamTarget

    layers: list[Layer] = options.target_layer
    if options.target == "-":
        if layers:
            raise InvalidArgument("--target-layer needs a region, not standard output")
        return StreamTarget(sys.stdout.fileno())
    if options.source != "-" and _same_file(options.source, options.target):
        raise InvalidArgument("the source and the target are one file", path=options.target)
    # A namespace is never made by copying to it.
    named = memory_spec(options.target) is not None or split_namespace(options.target) is not None
    missing = not os.path.lexists(options.target) and not named
    region = stack.enter_context(
        open_region(
            options.target,
            create_size=(source_size or 0) if missing else None,
            granularity=options.granularity,
            locking=options.locking,
            ordering=options.ordering,
        )
    )
    if missing and source_size is None:
        return stack.enter_context(GrowingTarget(region, layers))
    device = stack.enter_context(region.device(layers=layers))
    return DeviceTarget(device, fresh=missing)


def _same_file(source: str, target: str) -> bool:
    try:
        return os.path.samefile(source, target)  # noqa: PTH121
    except OSError:
        return False


def _copy(options: argparse.Namespace, source: "Source", target: "Target") -> int:
    from pmemkit.storage.copying import CopyFailed, copy, verify

    began = time.monotonic()
    with _progress(options, source.size) as show:
        try:
            report = copy(
                source,
                target,
                detect_zeroes=options.detect_zeroes,
                digests=options.verify,
                progress=show("copy"),
            )
        except CopyFailed as failure:
            raise _explain(failure, source.size, options.target) from None
        except PmemError as refusal:
            refusal.path = refusal.path or options.target
            raise
        if options.verify:
            device: BlockDevice = target.device  # type: ignore[attr-defined]
            verify(report, device, progress=show("verify"))
    seconds = time.monotonic() - began
    if options.json:
        print_json(
            {
                "copied": report.size,
                "data_bytes": report.data_bytes,
                "zero_bytes": report.zero_bytes,
                "verified": options.verify,
                "seconds": round(seconds, 3),
            }
        )
    elif sys.stderr.isatty() and not options.quiet:
        verified = ", verified" if options.verify else ""
        parts = f"{format_size(report.data_bytes)} data, {format_size(report.zero_bytes)} zeroes"
        print(f"{format_size(report.size)} copied ({parts}){verified}", file=sys.stderr)
    return 0


def _explain(failure: "CopyFailed", size: int | None, target: str) -> BaseException:
    """The cause, with how far the copy came."""
    cause = failure.cause
    if isinstance(cause, BrokenPipeError):
        return cause
    copied = failure.report.size
    whole = "" if size is None else f" of {size}"
    text = f"{copied}{whole} bytes were copied"
    if isinstance(cause, KeyboardInterrupt):
        print(f"pmem copy: {target}: {text}", file=sys.stderr)
        return cause
    if isinstance(cause, PmemError):
        cause.path = cause.path or target
        cause.message = f"{cause.message}; {text}"
        return cause
    from pmemkit.media.provider import failure_of

    error = failure_of(cause, "copy", target) if isinstance(cause, OSError) else None
    if error is None:
        return cause
    error.message = f"{error.message}; {text}"
    return error


@contextmanager
def _progress(
    options: argparse.Namespace, size: int | None
) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """A bar on a terminal and nothing elsewhere; gives a callback for each phase."""
    if options.quiet or not sys.stderr.isatty():
        yield lambda phase: lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description:6}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def phase(name: str) -> Callable[[int], None]:
            task = bar.add_task(name, total=size)
            return lambda done: bar.update(task, completed=done)

        yield phase
