"""``pmem copy``: between regions, files, standard input and output.

A target that does not exist is made: as large as the source, or growing with what arrives. One that
exists keeps what lies behind the last byte copied.

A place that is given with an option (``--input``, ``--output``) does as well as one without; of two
with options the one that is missing is standard input or output, as with daxio.

What this does not do: resume by itself; what is left after an interrupt is said in words.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pmemkit.cli._common import add_open_options, make_parser, print_json, size, typed
from pmemkit.errors import InvalidArgument, PmemError
from pmemkit.storage.layers import Layer, layer_help, parse_layer
from pmemkit.units import format_size

if TYPE_CHECKING:
    from pmemkit.storage.copying import CopyFailed, CopyReport, Source, Target
    from pmemkit.storage.device import BlockDevice
    from pmemkit.storage.direct import Carrier
    from pmemkit.storage.region import Region

__all__ = ["run"]

_EXAMPLES = """\
  pmem copy disk.img backup.img --verify
  pmem copy disk.img /dev/pmem0
  pmem copy rootfs.ext4 vm.img:namespace0.0
  zcat disk.img.gz | pmem copy - disk.img --detect-zeroes
  pmem copy disk.img - | sha256sum
  pmem copy model.bin /dev/dax0.0 --direct on
  pmem copy --input /dev/dax0.0 --skip 1G --len 4K --output page.bin
  pmem copy --zero disk.img --seek 1M --len 64K"""

_NOTES = """\
Holes of the source are not read and become holes of the target where it can have them. A target
that is too small is refused before anything is written. Bytes of files go straight into the mapping
of a region and out of it, around the page cache unless that has them already.

layers, as NAME or NAME=OPTION=VALUE,OPTION=VALUE:
"""


@dataclass(slots=True)
class _Ends:
    """Where bytes come from and go to, and the regions under that where there are any."""

    source: "Source"
    target: "Target"
    source_region: "Region | None" = None
    target_region: "Region | None" = None
    carrier: "Carrier | None" = None
    notice: str | None = None
    """Why there is no carrier."""
    start: int = 0
    """Byte of the target that the first one goes to."""
    layers: list[Layer] = field(default_factory=list)


def run(arguments: Sequence[str]) -> int:
    """Copies, flushes, and verifies if asked to."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _name_places(options, parser)
    if options.verify and options.target == "-":
        raise InvalidArgument("--verify reads the target back, which standard output cannot do")
    if options.json and options.target == "-":
        raise InvalidArgument("--json prints to standard output, where the copy goes")
    if options.seek and options.target == "-":
        raise InvalidArgument("--seek needs a target with offsets, not standard output")
    with ExitStack() as stack:
        source, region = _open_source(options, stack)
        ends = _open_target(options, source, stack)
        ends.source_region = region
        _clear_bad_blocks(options, ends)
        _choose_carrier(options, ends)
        return _copy(options, ends)


def _name_places(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Sets ``source`` and ``target`` from the places on the command line."""
    words = list(options.places)
    named = options.input is not None or options.output is not None
    options.source, options.target = options.input, options.output
    if options.zero:
        if options.source is not None:
            parser.error("--zero has no source")
    elif options.source is None and words:
        options.source = words.pop(0)
    if options.target is None and words:
        options.target = words.pop(0)
    if words:
        parser.error(f"one place too many: {words[0]}")
    if options.target is None and (options.zero or not named):
        parser.error("the following arguments are required: TARGET")
    options.source = options.source or "-"
    options.target = options.target or "-"
    if options.zero and (options.verify or options.skip):
        parser.error("--zero has no source to skip or compare with")
    if options.zero and options.target == "-":
        parser.error("--zero needs a target with a size")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "copy", "Copy bytes, sparse and durable at the end.", _EXAMPLES, _NOTES + layer_help()
    )
    parser.add_argument(
        "places",
        nargs="*",
        metavar="SOURCE TARGET",
        help="file, device, IMAGE:namespaceR.N, or - for standard input and output",
    )
    parser.add_argument("-i", "--input", metavar="SOURCE", help="the source")
    parser.add_argument("-o", "--output", metavar="TARGET", help="the target")
    parser.add_argument("-l", "--len", type=size, metavar="SIZE", help="bytes to copy (all)")
    parser.add_argument(
        "-k",
        "--skip",
        type=size,
        default=0,
        metavar="SIZE",
        help="bytes of the source to leave out",
    )
    parser.add_argument(
        "-s", "--seek", type=size, default=0, metavar="SIZE", help="byte of the target to start at"
    )
    parser.add_argument("-z", "--zero", action="store_true", help="zero the target; no source")
    parser.add_argument(
        "-b",
        "--clear-bad-blocks",
        choices=("yes", "no"),
        default="yes",
        help="no: refuse a target range with bad blocks instead of writing them anew (yes)",
    )
    parser.add_argument(
        "--direct",
        choices=("auto", "on", "off"),
        default="auto",
        help="around the page cache; auto: unless it has half of the bytes already",
    )
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


def _open_source(
    options: argparse.Namespace, stack: ExitStack
) -> "tuple[Source | None, Region | None]":
    """``None`` for zeroes, whose number depends on the target."""
    from pmemkit.storage import open_region
    from pmemkit.storage.copying import DeviceSource, StreamSource

    layers: list[Layer] = options.source_layer
    if options.source == "-":
        if layers:
            raise InvalidArgument("--source-layer needs a region, not standard input")
        if options.zero:
            return None, None
        return StreamSource(sys.stdin.fileno(), options.skip, options.len), None
    region = stack.enter_context(
        open_region(
            options.source,
            read_only=True,
            locking=options.locking,
            backup_info_block=options.backup_info_block,
        )
    )
    device = stack.enter_context(region.device(layers=layers))
    left = device.size - options.skip
    if left < (options.len or 0) or left < 0:
        wanted = "--skip" if options.len is None else f"{options.len} bytes from"
        text = f"{wanted} byte {options.skip} is behind the end of {device.size} bytes"
        raise InvalidArgument(text, op="copy", path=options.source)
    return DeviceSource(device, options.skip, options.len), region


def _open_target(options: argparse.Namespace, source: "Source | None", stack: ExitStack) -> _Ends:
    from pmemkit.bus.locate import split_namespace
    from pmemkit.media.provider import names_no_file
    from pmemkit.storage import open_region
    from pmemkit.storage.copying import DeviceTarget, GrowingTarget, StreamTarget, ZeroSource

    layers: list[Layer] = options.target_layer
    if options.target == "-":
        if layers:
            raise InvalidArgument("--target-layer needs a region, not standard output")
        return _Ends(source or ZeroSource(0), StreamTarget(sys.stdout.fileno()))
    if options.source != "-" and _same_file(options.source, options.target):
        raise InvalidArgument("the source and the target are one file", path=options.target)
    # A namespace is never made by copying to it.
    named = names_no_file(options.target) or split_namespace(options.target) is not None
    missing = not os.path.lexists(options.target) and not named
    length = (options.len or 0) if source is None else source.size
    region = stack.enter_context(
        open_region(
            options.target,
            create_size=options.seek + (length or 0) if missing else None,
            granularity=options.granularity,
            locking=options.locking,
            ordering=options.ordering,
        )
    )
    if missing and length is None and source is not None:
        growing = stack.enter_context(GrowingTarget(region, layers, start=options.seek))
        return _Ends(source, growing, start=options.seek)
    device = stack.enter_context(region.device(layers=layers))
    target = DeviceTarget(device, fresh=missing, start=options.seek)
    if source is None:
        source = ZeroSource(target.size if options.len is None else options.len)
    return _Ends(source, target, target_region=region, start=options.seek, layers=layers)


def _clear_bad_blocks(options: argparse.Namespace, ends: _Ends) -> None:
    """Bad blocks under the target's range: refused, or those at its edges made good."""
    from pmemkit.storage.clearing import clear_edges, refuse_bad_blocks
    from pmemkit.storage.copying import DeviceTarget

    region, target = ends.target_region, ends.target
    if region is None or region.mode == "sector" or not isinstance(target, DeviceTarget):
        return
    length = target.size if ends.source.size is None else ends.source.size
    if length > target.size:
        return  # The copy refuses it.
    if options.clear_bad_blocks == "no":
        refuse_bad_blocks(region, target.start, length)
    elif ends.source.size is not None and not ends.layers:
        clear_edges(region, target.device, target.start, length)


def _choose_carrier(options: argparse.Namespace, ends: _Ends) -> None:
    from pmemkit.errors import Busy, NotSupported
    from pmemkit.storage.direct import carrier_for

    if ends.source_region is None or ends.target_region is None:
        ends.notice = "one side is a stream"
    elif options.source_layer or options.target_layer:
        ends.notice = "layers see bytes in a buffer"
    elif options.verify or options.detect_zeroes:
        ends.notice = "bytes are looked at in a buffer on their way"
    else:
        try:
            ends.carrier = carrier_for(
                ends.source_region, ends.target_region, around=options.direct
            )
        except (NotSupported, Busy) as refusal:
            ends.notice = refusal.message


def _same_file(source: str, target: str) -> bool:
    try:
        return os.path.samefile(source, target)  # noqa: PTH121
    except OSError:
        return False


def _carry_out(
    options: argparse.Namespace, ends: _Ends, progress: Callable[[int], None]
) -> "CopyReport":
    from pmemkit.storage.copying import DeviceSource, DeviceTarget, copy
    from pmemkit.storage.direct import copy_carried

    source, target = ends.source, ends.target
    if ends.carrier is None:
        return copy(
            source,
            target,
            detect_zeroes=options.detect_zeroes,
            digests=options.verify,
            progress=progress,
        )
    assert isinstance(source, DeviceSource) and isinstance(target, DeviceTarget)
    return copy_carried(source, target, ends.carrier, progress=progress)


def _copy(options: argparse.Namespace, ends: _Ends) -> int:
    from pmemkit.storage.copying import CopyFailed, verify

    began = time.monotonic()
    with _progress(options, ends.source.size) as show:
        try:
            report = _carry_out(options, ends, show("copy"))
        except CopyFailed as failure:
            raise _explain(failure, options, ends) from None
        except PmemError as refusal:
            refusal.path = refusal.path or options.target
            raise
        if options.verify:
            device: BlockDevice = ends.target.device  # type: ignore[attr-defined]
            verify(report, device, start=ends.start, progress=show("verify"))
    _tell(options, ends, report, time.monotonic() - began)
    return 0


def _tell(options: argparse.Namespace, ends: _Ends, report: "CopyReport", seconds: float) -> None:
    """What was done: JSON, a line on a terminal, and why not direct where that was asked for."""
    how: dict[str, Any] = {
        "engine": "buffer",
        "direct_bytes": 0,
        "buffered_bytes": report.data_bytes,
        "notice": ends.notice,
    }
    if ends.carrier is not None:
        how = ends.carrier.describe()
    if options.direct == "on" and how["notice"] is not None:
        print(f"pmem copy: not all of it is direct: {how['notice']}", file=sys.stderr)
    if options.json:
        print_json(
            {
                "copied": report.size,
                "data_bytes": report.data_bytes,
                "zero_bytes": report.zero_bytes,
                "verified": options.verify,
                "seconds": round(seconds, 3),
                **how,
            }
        )
    elif sys.stderr.isatty() and not options.quiet:
        verified = ", verified" if options.verify else ""
        parts = f"{format_size(report.data_bytes)} data, {format_size(report.zero_bytes)} zeroes"
        print(f"{format_size(report.size)} copied ({parts}){verified}", file=sys.stderr)


def _explain(failure: "CopyFailed", options: argparse.Namespace, ends: _Ends) -> BaseException:
    """The cause, with how far the copy came."""
    cause = failure.cause
    if isinstance(cause, BrokenPipeError):
        return cause
    copied, size, target = failure.report.size, ends.source.size, options.target
    whole = "" if size is None else f" of {size}"
    text = f"{copied}{whole} bytes were copied"
    if isinstance(cause, KeyboardInterrupt):
        if size is not None and not options.zero:
            rest = f"--skip {options.skip + copied} --seek {options.seek + copied}"
            text = f"{text}; the rest: {rest} --len {size - copied}"
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
