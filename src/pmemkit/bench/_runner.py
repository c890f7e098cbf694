"""What every suite of benchmarks shares: alternating runs, medians, records, the report.

Invariants:
1. Sides are measured in turns, in an order that is reversed every round, so that a machine that
   gets slower is unkind to all of them alike; the first round warms up and is thrown away.
2. A figure is the median of its runs. ``ratio`` says how many times better we are, whether more or
   less of the unit is better: above 1 we win.
3. Nothing is measured with a debug build or a build with planted faults.

What this does not do: judge. Aims stand in the documentation, not here.
"""

import argparse
import fnmatch
import functools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from pmemkit import _native
from pmemkit.errors import InvalidArgument, PmemError

__all__ = ["Options", "Record", "Report", "alternate", "parse_options", "suite"]

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Options:
    """What a suite is asked for on the command line."""

    json_path: Path
    only: str
    quick: bool
    runs: int
    seconds: float

    def wanted(self, name: str) -> bool:
        """True when ``--only`` lets a case of this name run."""
        return fnmatch.fnmatch(name, self.only) or self.only in name


def _refuse_debug_build() -> None:
    """Raises :class:`InvalidArgument` unless the core was built to be measured."""
    if _native.BUILD_PROFILE != "release":
        raise InvalidArgument(
            f"this is a {_native.BUILD_PROFILE} build of the core: measure a release build"
        )
    if _native.PLANTED_FAULTS:
        raise InvalidArgument("this build of the core has planted faults: measure a plain one")
    if _native.NO_PAGE_MAP:
        raise InvalidArgument("this build of the core has no page map: measure a plain one")


def suite(main: Callable[P, None]) -> Callable[P, int]:
    """What runs a suite: gives the exit status, that of the first error, which it prints."""

    @functools.wraps(main)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            main(*arguments, **options)
        except PmemError as failure:
            print(f"pmem bench: {failure}", file=sys.stderr)
            return failure.exit_code
        return 0

    return run


def parse_options(
    suite: str,
    arguments: Sequence[str] | None,
    *,
    runs: int,
    seconds: float,
    quick_seconds: float = 1.0,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Options, argparse.Namespace]:
    """Reads a suite's command line; ``--quick`` is one run of ``quick_seconds``."""
    parser = argparse.ArgumentParser(prog=f"pmem bench {suite}")
    parser.add_argument("--quick", action="store_true", help="one short run of every case")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases by name")
    parser.add_argument("--runs", type=int, help=f"timed runs of each side ({runs})")
    parser.add_argument("--seconds", type=float, help=f"seconds of each run ({seconds:g})")
    parser.add_argument("--json", type=Path, default=Path("build/bench") / f"{suite}.json")
    if more:
        more(parser)
    found = parser.parse_args(arguments)
    options = Options(
        json_path=found.json,
        only=found.only,
        quick=found.quick,
        runs=found.runs or (1 if found.quick else runs),
        seconds=found.seconds or (quick_seconds if found.quick else seconds),
    )
    return options, found


@dataclass(frozen=True)
class Record:
    """One line of the report: our median, the peer's, and how many times better ours is."""

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    runs: int


def alternate(sides: Sequence[Callable[[], T]], runs: int) -> list[list[T]]:
    """Measures every side ``runs`` times in turns, after one round that does not count."""
    samples: list[list[T]] = [[] for _ in sides]
    order = list(range(len(sides)))
    for turn in range(runs + 1):
        for side in order:
            sample = sides[side]()
            if turn:
                samples[side].append(sample)
        order.reverse()
    return samples


@dataclass
class Report:
    """The records of one suite, shown as they come and written at the end. Making one raises
    :class:`InvalidArgument` unless this build of the core is one to be measured."""

    options: Options
    records: list[Record] = field(default_factory=list)
    samples: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _refuse_debug_build()

    def add(
        self,
        name: str,
        unit: str,
        ours: Sequence[float],
        peer: Sequence[float],
        peer_name: str,
        *,
        less_is_better: bool = False,
    ) -> Record:
        """Adds a record from the samples of both sides and prints its line."""
        our_median, peer_median = statistics.median(ours), statistics.median(peer)
        above, below = (peer_median, our_median) if less_is_better else (our_median, peer_median)
        ratio = above / below if below else 0.0
        record = Record(name, our_median, peer_median, peer_name, unit, ratio, len(ours))
        if not self.records:
            print(f"{'case':38} {'ours':>12} {'peer':>12} {'ratio':>6}  unit, peer")
        print(
            f"{name:38} {our_median:12,.2f} {peer_median:12,.2f} {ratio:6.2f}  {unit}, {peer_name}",
            flush=True,
        )
        self.records.append(record)
        raw: dict[str, object] = {
            "name": name,
            "peer_name": peer_name,
            "ours": list(ours),
            "peer": list(peer),
        }
        self.samples.append(raw)
        return record

    def write(self, versions: Iterable[str] = ()) -> None:
        """Writes the records, and beside them what they were measured on and with."""
        path = self.options.json_path
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, [asdict(record) for record in self.records])
        about = {**_machine(), "peers": list(versions), "samples": self.samples}
        about_path = path.with_suffix(".about.json")
        _write_json(about_path, about)
        print(f"{len(self.records)} records in {path}, the machine and all runs in {about_path}")


def _write_json(path: Path, value: object) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _machine() -> dict[str, object]:
    port = _native.media.port()
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "core": _native.version(),
        "build": _native.BUILD_PROFILE,
        "flush": port.flush,
        "copy": port.copy,
        "movnt_threshold": port.movnt_threshold,
    }
