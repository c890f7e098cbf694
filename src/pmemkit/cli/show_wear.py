"""``pmem wear``: what was written to an image, by cause and by block, and what life that used."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmemkit.bus.locate import split_namespace
from pmemkit.cli._common import make_parser, print_json, size
from pmemkit.cli._heat import heat_lines, heat_svg
from pmemkit.errors import InvalidArgument, NotSupported
from pmemkit.media.wear import CAUSES, LINE_SIZE, Ledger, reset
from pmemkit.storage.endurance import Rating, Verdict, judge
from pmemkit.units import format_size

__all__ = ["run"]

_EXAMPLES = """\
  pmem wear disk.img
  pmem wear disk.img --rated-writes 1M         writes that every cell is rated for
  pmem wear disk.img --rated-bytes 20P --json  bytes that the whole is rated for (TBW)
  pmem wear disk.img --heatmap                 blocks in the terminal
  pmem wear disk.img --plot wear.svg           the same as a picture; .png needs matplotlib
  pmem wear nmem0                              what a device of this machine reports of itself"""
_NOTES = """\
What pmem writes to an image is counted and noted beside it, in IMAGE.wear, when it is closed and
every minute while it is served. The file may be deleted; only the history is lost. Lines have 64
bytes: a store of 8 bytes wears one. --wear exact of serve and mount counts every store by block,
sampled one in 13."""
_DAY_SECONDS = 86400
_YEAR_DAYS = 365.25


def run(arguments: Sequence[str]) -> int:
    """Shows, draws or forgets what was written."""
    options = _parser().parse_args(arguments)
    if not os.path.lexists(options.target) and _is_device(options.target):
        return _show_device(options)
    named = split_namespace(options.target)
    image = options.target if named is None else named[0]
    if options.reset:
        reset(image)
        return 0
    os.stat(image)  # noqa: PTH116 - its error says what is wrong
    ledger = Ledger.load(image)
    if ledger is None:
        empty = os.path.getsize(image)  # noqa: PTH202 - bytes of a str path
        ledger = Ledger(empty, 0.0, 0.0)
    rating = Rating.of(
        writes=options.rated_writes, lifetime_bytes=options.rated_bytes, size=ledger.size
    )
    verdict = None if rating is None else judge(ledger, rating)
    if options.plot is not None:
        _plot(options.plot, image, ledger)
    if options.json:
        print_json(_facts(image, ledger, verdict))
    else:
        print("\n".join(_lines(image, ledger, verdict, heatmap=options.heatmap)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("wear", "Show what was written to an image.", _EXAMPLES, _NOTES)
    parser.add_argument("target", metavar="IMAGE|DEVICE")
    rating = parser.add_mutually_exclusive_group()
    rating.add_argument("--rated-writes", type=size, metavar="N", help="of every cell")
    rating.add_argument(
        "--rated-bytes", type=size, metavar="SIZE", help="of the whole, in its life"
    )
    parser.add_argument("--heatmap", action="store_true", help="draw the blocks")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into .svg or .png")
    parser.add_argument("--reset", action="store_true", help="forget what was counted")
    parser.add_argument("--json", action="store_true")
    return parser


# --- an image -------------------------------------------------------------------------------------


def _facts(image: str, ledger: Ledger, verdict: Verdict | None) -> dict[str, Any]:
    hottest = max(ledger.blocks, default=0)
    facts: dict[str, Any] = {
        "path": image,
        "size": ledger.size,
        "since": _moment(ledger.since),
        "updated": _moment(ledger.updated),
        "written": {
            cause: dict(zip(("bytes", "lines"), ledger.written.get(cause, (0, 0)), strict=True))
            for cause in CAUSES
        },
        "bytes": sum(count for count, _ in ledger.written.values()),
        "lines": ledger.lines,
        "write_amplification": _amplification(ledger),
        "block_size": ledger.block_size or None,
        "blocks_sampled": ledger.sampled,
        "block_lines_hottest": hottest if ledger.block_size else None,
    }
    if verdict is not None:
        facts |= {
            "life_used_percentage": 100 * verdict.used,
            "life_used_percentage_hottest": _percent(verdict.used_hottest),
            "seconds_left": verdict.seconds_left,
            "seconds_left_hottest": verdict.seconds_left_hottest,
        }
    return facts


def _moment(seconds: float) -> str | None:
    if not seconds:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _amplification(ledger: Ledger) -> float | None:
    """Bytes that media wrote, in lines, for each byte that somebody wanted written."""
    wanted = sum(ledger.written.get(cause, (0, 0))[0] for cause in ("data", "write_back"))
    return ledger.lines * LINE_SIZE / wanted if wanted else None


def _lines(image: str, ledger: Ledger, verdict: Verdict | None, *, heatmap: bool) -> list[str]:
    if not ledger.lines:
        return [f"{image}: nothing was counted yet"]
    found = [f"{image}: {format_size(ledger.size)}, counted since {_moment(ledger.since)}", ""]
    found.append(f"{'cause':12} {'bytes':>16} {'lines':>14} {'share':>7}")
    for cause in CAUSES:
        count, lines = ledger.written.get(cause, (0, 0))
        if lines:
            share = 100 * lines / ledger.lines
            found.append(f"{cause:12} {count:16,} {lines:14,} {share:6.1f} %")
    total = sum(count for count, _ in ledger.written.values())
    found.append(f"{'all':12} {total:16,} {ledger.lines:14,} {100:6.1f} %")
    amplification = _amplification(ledger)
    if amplification is not None:
        found += ["", f"bytes written in lines, for each byte of data: {amplification:.2f}"]
    if verdict is not None:
        found += ["", *_life(verdict)]
    if heatmap:
        found += ["", *_heatmap(ledger)]
    return found


def _life(verdict: Verdict) -> list[str]:
    found = [f"life used, spread evenly: {100 * verdict.used:.4g} %{_left(verdict.seconds_left)}"]
    if verdict.used_hottest is not None:
        left = _left(verdict.seconds_left_hottest)
        found.append(f"life used, hottest block: {100 * verdict.used_hottest:.4g} %{left}")
    return found


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 0:
        return ", past its rating"
    days = seconds / _DAY_SECONDS
    span = f"{days:.3g} days" if days < _YEAR_DAYS else f"{days / _YEAR_DAYS:.3g} years"
    return f", {span} left at this rate"


def _heatmap(ledger: Ledger) -> list[str]:
    if not ledger.block_size:
        return ["blocks were not counted"]
    width = max(8, min(shutil.get_terminal_size().columns, 128))
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    how = "one store in 13 counted for all" if ledger.sampled else "all stores counted"
    hottest = max(ledger.blocks, default=0)
    return [
        *heat_lines(ledger.blocks, width, ascii_only=plain),
        f"blocks of {format_size(ledger.block_size)}, {how}; "
        f"the hottest took {hottest * LINE_SIZE / ledger.block_size:.4g} writes of all of it",
    ]


def _plot(file: Path, image: str, ledger: Ledger) -> None:
    title = f"{Path(image).name}: lines written, blocks of {format_size(ledger.block_size or 0)}"
    if file.suffix == ".svg":
        file.write_text(heat_svg(ledger.blocks, title), encoding="utf-8")
    elif file.suffix == ".png":
        _plot_png(file, title, ledger)
    else:
        raise InvalidArgument("a picture is .svg or .png", op="wear", path=str(file))


def _plot_png(file: Path, title: str, ledger: Ledger) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        text = "a .png needs matplotlib; .svg needs nothing"
        raise NotSupported(text, op="wear", path=str(file)) from None
    import numpy as np

    columns = 64
    counts = np.frombuffer(ledger.blocks, np.uint32) if ledger.blocks else np.zeros(1, np.uint32)
    grid = np.zeros(-(-len(counts) // columns) * columns)
    grid[: len(counts)] = counts
    figure = Figure()
    axes = figure.add_subplot()
    image = axes.imshow(grid.reshape(-1, columns), cmap="Reds", aspect="auto")
    axes.set_title(title)
    figure.colorbar(image, label="lines of 64 bytes")
    figure.savefig(file)


# --- a device of this machine ---------------------------------------------------------------------


def _is_device(name: str) -> bool:
    return name.rstrip("0123456789") in ("nmem", "mem") and name[-1:].isdigit()


def _show_device(options: argparse.Namespace) -> int:
    """What ``ndctl`` or ``cxl`` say of a device."""
    from pmemkit.bus.evidence_health import health_of_machine

    if options.reset or options.heatmap or options.plot:
        text = "a device reports one figure: nothing to reset or to draw"
        raise InvalidArgument(text, op="wear", path=options.target)
    found, notes = health_of_machine([options.target])
    health = found.get(options.target)
    if health is None:
        because = "; ".join(notes) or "it reports no health"
        raise NotSupported(because, op="wear", path=options.target)
    if options.json:
        used = health.life_used
        print_json({"dev": health.dev, "life_used_percentage": used, "source": health.source})
    elif health.life_used is None:
        print(f"{health.dev}: does not say how much of its life is used ({health.source})")
    else:
        print(f"{health.dev}: {health.life_used} % of its life is used ({health.source})")
    return 0
