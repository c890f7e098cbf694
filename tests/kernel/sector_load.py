"""Sectors that say what they are, written by several threads until somebody kills the process.

What each thread writes follows from a seed, so whoever knows how many of its steps were
acknowledged knows what every sector may hold. It runs here (``engine``), through the engine, and in
the guest (``kernel``), through a block device, where it needs nothing but Python:

    sector_load.py engine|kernel ACKS LOAD PATH…       LOAD as JSON, and what it writes to

What this does not do: kill, or read the sectors; :func:`Load.judge` is given what they hold.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = 4096
_WORD = struct.Struct("<Q")
_UNIT = struct.Struct("<QQQQ")
_COUNTS = (1, 1, 2, 5, 16, 24)
"""Sectors of a request: one, some, a batch of the engine and more than that."""


@dataclass(frozen=True)
class Step:
    """One request of a thread; the first one has number 1."""

    number: int
    first: int
    count: int
    zero: bool

    def __contains__(self, lba: int) -> bool:
        return self.first <= lba < self.first + self.count


@dataclass(frozen=True)
class Load:
    """Who writes what. Threads have neighbouring ranges, whose ends share lines of the map."""

    seed: int
    sector_size: int
    zeroes: bool = False
    """Some requests zero instead of writing."""
    threads: int = 3
    sectors: int = 57
    """Of one thread."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @property
    def count(self) -> int:
        """Sectors of all threads."""
        return self.threads * self.sectors

    def steps(self, thread: int) -> Iterator[Step]:
        """Without end."""
        choose = random.Random(f"{self.seed} {thread}")
        for number in itertools.count(1):
            count = choose.choice(_COUNTS)
            first = thread * self.sectors + choose.randrange(self.sectors - count + 1)
            yield Step(number, first, count, self.zeroes and choose.random() < 0.2)

    def content(self, lba: int, step: Step) -> bytes:
        """A sector after a step: its number, the step's and the seed, with a checksum, over and
        over, so that a mixture of two contents is neither."""
        if step.zero:
            return bytes(self.sector_size)
        head = struct.pack("<QQQ", lba, step.number, self.seed)
        unit = head + _WORD.pack(zlib.crc32(head))
        return unit * (self.sector_size // len(unit))

    def request(self, step: Step) -> bytes:
        """All sectors of a step."""
        lbas = range(step.first, step.first + step.count)
        return b"".join(self.content(lba, step) for lba in lbas)

    def judge(
        self, acknowledged: Sequence[int], before: Sequence[bytes], found: Sequence[bytes]
    ) -> list[str]:
        """What is wrong with the sectors: each is as its last acknowledged step left it, or as the
        step after that, which was under way, would have."""
        wrong = []
        for thread, done in enumerate(acknowledged):
            last: dict[int, Step] = {}
            for step in itertools.islice(self.steps(thread), done):
                last.update(dict.fromkeys(range(step.first, step.first + step.count), step))
            under_way = next(itertools.islice(self.steps(thread), done, None))
            for lba in range(thread * self.sectors, (thread + 1) * self.sectors):
                step = last.get(lba)
                allowed = [before[lba] if step is None else self.content(lba, step)]
                if lba in under_way:
                    allowed.append(self.content(lba, under_way))
                if found[lba] not in allowed:
                    number = 0 if step is None else step.number
                    wrong.append(
                        f"sector {lba}, last written by step {number}: {_said(found[lba])}"
                    )
        return wrong

    def sectors_of(self, data: bytes) -> list[bytes]:
        """Bytes cut into sectors."""
        size = self.sector_size
        return [data[at : at + size] for at in range(0, len(data), size)]


def _said(sector: bytes) -> str:
    """What a sector says of itself, first and last."""
    ends = (_UNIT.unpack_from(sector, 0), _UNIT.unpack_from(sector, len(sector) - _UNIT.size))
    said = [f"sector {lba} step {number} seed {seed}" for lba, number, seed, _ in ends]
    return f"it begins as {said[0]} and ends as {said[1]}"


# --- writing -------------------------------------------------------------------------------------

Write = Callable[[Step, bytes], None]
Acknowledge = Callable[[int, int], None]


def _work(load: Load, thread: int, write: Write, acknowledge: Acknowledge) -> None:
    for step in load.steps(thread):
        write(step, load.request(step))
        acknowledge(thread, step.number)


def _engine(load: Load, path: str, acks: str, base: int) -> tuple[Write, Acknowledge]:
    """Through the engine; a word a thread in a file that is mapped."""
    from pmemkit.storage import open_region

    device = open_region(path).device()
    with Path(acks).open("r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def write(step: Step, data: bytes) -> None:
        if step.zero:
            device.zero(step.first * load.sector_size, len(data))
        else:
            device.write(step.first * load.sector_size, data)

    def acknowledge(thread: int, number: int) -> None:
        words[base + thread] = number

    return write, acknowledge


def _kernel(load: Load, path: str, acks: str, base: int) -> tuple[Write, Acknowledge]:
    """Through block devices, past the page cache; a page a thread on another device."""
    target, log = (os.open(each, os.O_RDWR | os.O_DIRECT) for each in (path, acks))
    local = threading.local()

    def put(fd: int, data: bytes, offset: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, max(_COUNTS) * PAGE)
        local.buffer[: len(data)] = data
        view = memoryview(local.buffer)[: len(data)]
        if os.pwrite(fd, view, offset) != len(data):
            raise OSError(f"a short write at {offset}")

    def write(step: Step, data: bytes) -> None:
        put(target, data, step.first * load.sector_size)

    def acknowledge(thread: int, number: int) -> None:
        put(log, _WORD.pack(number).ljust(PAGE, b"\0"), (base + thread) * PAGE)

    return write, acknowledge


def main() -> None:
    """Writes until it is killed."""
    how, acks, *pairs = sys.argv[1:]
    make, threads = {"engine": _engine, "kernel": _kernel}[how], []
    for text, path in zip(pairs[::2], pairs[1::2], strict=True):
        load = Load(**json.loads(text))
        calls = make(load, path, acks, len(threads))
        threads += [
            threading.Thread(target=_work, args=(load, number, *calls), daemon=True)
            for number in range(load.threads)
        ]
    for thread in threads:
        thread.start()
    threads[0].join()
    sys.exit("a writer ended")


if __name__ == "__main__":
    main()
