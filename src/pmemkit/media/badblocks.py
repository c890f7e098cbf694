"""Bad media of an image, in a file beside it: ``IMAGE.badblocks``.

An image stands in for a device, but its bytes never fail. This list says which of them do, as Linux
keeps its list of a device: blocks of 512 bytes that cannot be read until they are written.

The file is a journal, a line of JSON an event, offsets counted from the start of the image:

    {"inject": {"offset": 8, "length": 2}}
    {"uninject": {"offset": 9, "length": 1}}
    {"clear": {"offset": 8, "length": 1}}

Invariants:
1. Lines are only ever appended, each of them durable before its author goes on: whoever serves one
   namespace of an image loses nothing that the server of another one writes down.
2. A line that does not end with its brace is what a crash tore, and counts for nothing. Whatever
   else is no event is an error that names the line.
3. A block is cleared by writing it: the core writes the line (``rust/pmemkit-core``, badblocks).

What this does not do: devices, whose bad blocks the kernel keeps.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pmemkit.errors import Corrupt, InvalidArgument
from pmemkit.files import sync_directory

if TYPE_CHECKING:
    from pmemkit._native.media import Medium

__all__ = [
    "BAD_BLOCK_SIZE",
    "BadRun",
    "clip",
    "journal_path",
    "note",
    "read_bad_blocks",
    "with_bad_blocks",
]

BAD_BLOCK_SIZE = 512
_EVENTS = ("inject", "uninject", "clear")
_JOURNAL_SIZE_MOST = 16 << 20


class BadRun(NamedTuple):
    """Bad blocks that follow each other, in blocks of :data:`BAD_BLOCK_SIZE` bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The block behind it."""
        return self.offset + self.length


def journal_path(image: str) -> str:
    """Where the list of an image is, whatever link it was reached by."""
    return os.path.realpath(image) + ".badblocks"


def read_bad_blocks(image: str) -> tuple[BadRun, ...]:
    """What is bad in an image, in order and without overlap. Raises :class:`Corrupt`."""
    path = journal_path(image)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the same
            data = file.read(_JOURNAL_SIZE_MOST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    if len(data) > _JOURNAL_SIZE_MOST:
        raise Corrupt(f"has more than {_JOURNAL_SIZE_MOST} bytes", op="open", path=path)
    runs: list[BadRun] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip().endswith(b"}"):
            event, run = _event_of(line, number, path)
            if not run.length:
                continue
            runs = _without(runs, run)
            if event == "inject":
                runs = _joined([*runs, run])
    return tuple(runs)


def note(image: str, event: Literal["inject", "uninject", "clear"], run: BadRun) -> None:
    """Writes an event down, durably."""
    line = json.dumps({event: run._asdict()})
    with _opened_journal(image) as journal:
        new = os.fstat(journal.fileno()).st_size == 0
        os.write(journal.fileno(), f"\n{line}\n".encode())
        os.fsync(journal.fileno())
        if new:
            sync_directory(Path(journal_path(image)).parent)


def clip(runs: Iterable[BadRun], start: int, size: int) -> tuple[BadRun, ...]:
    """What of the runs lies in ``size`` bytes from byte ``start``, counted from there."""
    first, end = start // BAD_BLOCK_SIZE, -(-(start + size) // BAD_BLOCK_SIZE)
    cut = ((max(run.offset, first), min(run.end, end)) for run in runs)
    return tuple(BadRun(low - first, high - low) for low, high in cut if low < high)


def with_bad_blocks(
    medium: "Medium", image: str, *, start: int = 0, read_only: bool = False
) -> "Medium":
    """A medium over an image from byte ``start`` on that fails where the list says so."""
    found = clip(read_bad_blocks(image), start, len(medium))
    if not found:
        return medium
    if start % BAD_BLOCK_SIZE:
        text = f"byte {start} is inside a block of {BAD_BLOCK_SIZE}, and there are bad ones"
        raise InvalidArgument(text, op="open", path=image)
    from pmemkit._native import media

    if read_only:
        return media.bad_blocks(medium, found)
    with _opened_journal(image) as journal:
        base = start // BAD_BLOCK_SIZE
        return media.bad_blocks(medium, found, record=journal.fileno(), base=base)


def _opened_journal(image: str) -> Any:
    return open(journal_path(image), "ab", buffering=0)  # noqa: PTH123 - the caller closes


def _event_of(line: bytes, number: int, path: str) -> tuple[str, BadRun]:
    """What a line says."""
    try:
        found = json.loads(line)
        ((event, fields),) = found.items()
        run = BadRun(**fields)
    except (ValueError, TypeError, AttributeError, RecursionError):
        event, run = "", BadRun(-1, 0)
    numbers = all(type(each) is int and 0 <= each < 1 << 63 for each in run)
    if event not in _EVENTS or not numbers:
        text = f"line {number} is none of {', '.join(_EVENTS)} with an offset and a length"
        raise Corrupt(text, op="open", path=path)
    return event, run


def _without(runs: Iterable[BadRun], gone: BadRun) -> list[BadRun]:
    """The runs less the blocks of one."""
    left = []
    for run in runs:
        before = BadRun(run.offset, min(run.end, gone.offset) - run.offset)
        behind = max(run.offset, gone.end)
        left += [each for each in (before, BadRun(behind, run.end - behind)) if each.length > 0]
    return left


def _joined(runs: Iterable[BadRun]) -> list[BadRun]:
    """In order, with neighbours made one."""
    joined: list[BadRun] = []
    for run in sorted(runs):
        if joined and joined[-1].end >= run.offset:
            last = joined.pop()
            run = BadRun(last.offset, max(last.end, run.end) - last.offset)
        joined.append(run)
    return joined
