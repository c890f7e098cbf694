"""The images of a machine, opened for change.

Invariants:
1. Every store goes through the medium, so the recording medium can prove what a crash leaves.
2. Writes come in groups; each group is durable before the next begins. Who orders the groups well
   needs no journal.
3. A dimm that is changed is locked from before it is looked at until the end.

What this does not do: decide what to write.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pmemkit.bus.image import ImageBus, ImageRegion, Reader, observe_with, open_reader
from pmemkit.bus.machine import Machine
from pmemkit.errors import Closed
from pmemkit.formats.labels import Write
from pmemkit.formats.layout import Clear
from pmemkit.media.provider import Locking, failure_of, open_medium
from pmemkit.media.wear import caused_by

if TYPE_CHECKING:
    from pmemkit._native.media import Medium

__all__ = ["Images", "Progress", "Step", "open_images"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_CHUNK = 64 << 20


Step = Sequence[Write | Clear]
"""Writes and ranges to clear that may become durable in any order."""


def _silent(_done: int, _total: int) -> None:
    """No progress is shown."""


class Images:
    """Dimms whose images are open. Made by :func:`open_images`, or from media by tests."""

    def __init__(
        self,
        machine: Machine,
        media: "dict[int, Medium]",
        readers: Sequence[tuple[Reader, int]] = (),
    ) -> None:
        self.machine = machine
        self._media = media
        self._opened = readers or [(_reader(media, n), len(media[n])) for n in sorted(media)]

    def bus(self) -> ImageBus:
        """What is on the images now."""
        return observe_with(self.machine, self._opened)

    def number_of(self, region: ImageRegion) -> int:
        """The dimm of a region that has one."""
        return self.machine.sets[region.span.index][0]

    def medium(self, dimm: int) -> "Medium":
        """The medium of a dimm that was opened for change."""
        return self._media[dimm]

    def label_area(self, dimm: int) -> tuple[int, bytes]:
        """Where the label area of a dimm begins, and what is in it."""
        medium, size = self._media[dimm], self.machine.dimms[dimm].label_size
        start = len(medium) - size
        return start, medium.read(start, size)

    def write_labels(self, dimm: int, groups: Iterable[Sequence[Write]]) -> None:
        """Carries groups of writes out; offsets count from the start of the label area."""
        start = len(self._media[dimm]) - self.machine.dimms[dimm].label_size
        self.carry_out(dimm, groups, base=start)

    def carry_out(
        self, dimm: int, groups: Iterable[Step], *, base: int = 0, progress: Progress = _silent
    ) -> None:
        """Carries groups out, one durable after the other; offsets count from ``base``."""
        medium = self._media[dimm]
        try:
            for group in groups:
                for each in group:
                    if isinstance(each, Clear):
                        _clear(medium, base + each.offset, each, progress)
                    else:
                        medium.write(base + each[0], each[1])
                for each in group:
                    if isinstance(each, Clear):
                        medium.persist(base + each.offset, each.length)
                    else:
                        medium.persist(base + each[0], len(each[1]))
        except OSError as cause:
            raise failure_of(cause, "write", self.machine.dimms[dimm].path) from cause


def _clear(medium: "Medium", offset: int, clear: Clear, progress: Progress) -> None:
    """Makes a range read as zeroes: holes stay holes, data are given back or overwritten."""
    done = 0
    for run, hole in medium.extents(offset, clear.length):
        end = done + run
        while not hole and done < end:
            part = min(_CHUNK, end - done)
            if not medium.punch(offset + done, part):
                if not clear.required:
                    return
                medium.zero(offset + done, part)
            done += part
            progress(done, clear.length)
        done = end
    progress(clear.length, clear.length)


@contextmanager
def open_images(
    machine: Machine,
    dimms: Iterable[int] | None = None,
    *,
    granularity: str | None = None,
    locking: Locking = "on",
) -> Iterator[Images]:
    """Opens the images of a machine; ``dimms`` (all of them by default) are locked for change."""
    chosen = set(range(len(machine.dimms)) if dimms is None else dimms)
    with ExitStack() as stack:
        media: dict[int, Medium] = {}
        readers: list[tuple[Reader, int]] = []
        for number, spec in enumerate(machine.dimms):
            if number in chosen:
                opened = open_medium(
                    spec.path, granularity=granularity, locking=locking, wear="off"
                )
                stack.callback(opened.close)
                media[number] = opened.medium
                readers.append((_reader(media, number), len(opened.medium)))
            else:
                read, size, close = open_reader(spec.path)
                stack.callback(close)
                readers.append((read, size))
        # What was found keeps its readers; they must not keep the medium, and so the lock, alive.
        stack.callback(media.clear)
        stack.enter_context(caused_by("info"))
        yield Images(machine, media, readers)


def _reader(media: "dict[int, Medium]", number: int) -> Reader:
    """Reads a medium as a file is read: less where it ends."""

    def read(offset: int, length: int) -> bytes:
        medium = media.get(number)
        if medium is None:
            raise Closed("the image is closed", op="read")
        return medium.read(offset, max(0, min(length, len(medium) - offset)))

    return read
