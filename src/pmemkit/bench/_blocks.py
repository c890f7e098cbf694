"""Traces of block uses: a recorded one cut into blocks, and synthetic ones, as NumPy records.

What this does not do: ship a trace. The recorded one is the CSV of libCacheSim's sample of
CloudPhysics (``version,time,op,size,lbn``, sectors of 512 bytes, op ``2a`` a write), found by
whoever has it.
"""

import argparse
import csv
import os
from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "add_trace_option", "read_csv", "synthetic"]

BLOCK = 4096
_SECTOR = 512
_WRITE = "2a"
_FIELDS = [("block", "<u8"), ("second", "<u4"), ("write", "<u4")]
"""A use, as the core's simulation reads it."""


def read_csv(path: Path) -> Any:
    """Each block that each request touches, in order."""
    import numpy as np

    with path.open(encoding="ascii", newline="") as file:
        rows = [
            (int(row["time"]), row["op"] == _WRITE, int(row["size"]), int(row["lbn"]))
            for row in csv.DictReader(file)
        ]
    second, write, length, sector = (np.array(column) for column in zip(*rows, strict=True))
    first = sector * _SECTOR // BLOCK
    count = (sector * _SECTOR + length - 1) // BLOCK - first + 1
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    trace = np.zeros(count.sum(), _FIELDS)
    trace["block"] = np.repeat(first, count) + within
    trace["second"] = np.repeat(second - second[0], count)
    trace["write"] = np.repeat(write, count)
    return trace


def synthetic(name: str, blocks: int, uses: int, seed: int = 1) -> Any:
    """``zipf``: skewed reads and writes; ``scan``: the same with long scans between; ``loop``: the
    same with a loop over an eighth of the blocks, again and again."""
    import numpy as np

    choose = np.random.default_rng(seed)
    ranks = np.arange(1, blocks + 1, dtype=float) ** -0.9
    place = choose.permutation(blocks)
    trace = np.zeros(uses, _FIELDS)
    drawn = np.searchsorted(np.cumsum(ranks) / ranks.sum(), choose.random(uses))
    trace["block"] = place[np.minimum(drawn, blocks - 1)]
    trace["write"] = choose.random(uses) < 0.5
    stride = blocks // 8
    for number, start in enumerate(range(stride, uses - stride, 3 * stride)):
        run = np.arange(stride)
        if name == "scan":
            # Blocks that nobody else uses, and each of them once.
            trace["block"][start : start + stride] = blocks + number * stride + run
        elif name == "loop":
            trace["block"][start : start + stride] = blocks + run
    return trace


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    """Where the recorded trace is."""
    named = os.environ.get("PMEMKIT_TRACE")
    parser.add_argument(
        "--trace",
        type=Path,
        default=Path(named) if named else None,
        metavar="FILE",
        help="cloudPhysicsIO.csv of libCacheSim ($PMEMKIT_TRACE)",
    )
