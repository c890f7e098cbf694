"""What was written to an image in its life, in a file beside it: ``IMAGE.wear``.

Whoever has an image open for writing counts what it stores by cause, and by block; what was counted
is added to the file when the image is closed, and from time to time meanwhile. The file is JSON:

    version, since, updated      1; when counting began and when it was last added to, in seconds
                                 since 1970
    size                         bytes of the image
    written                      {cause: {"bytes": …, "lines": …}}; a line has 64 bytes
    block_size, blocks           lines written to each block: u32, little-endian, zlib, base64
    sampled                      true: one store in 13 was counted by block, for all of them
    checksum                     CRC-32 of all that, as sorted JSON without spaces

Invariants:
1. The file changes as a whole (written beside, then renamed), under a lock of its own: openings of
   several namespaces of one image add up.
2. Nothing depends on it. One that is missing, or that cannot be written, costs what it would say;
   one that cannot be read is refused by whoever wants to see it and begun anew by whoever adds.

What this does not do: judge (:mod:`pmemkit.storage.endurance`), or know what other programs wrote.
"""

import base64
import contextlib
import fcntl
import json
import os
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pmemkit.errors import Corrupt, InvalidArgument

if TYPE_CHECKING:
    from pmemkit._native.media import Medium

__all__ = [
    "CAUSES",
    "EVERY_STORES",
    "LINE_SIZE",
    "Counting",
    "Ledger",
    "Tracker",
    "caused_by",
    "keep_noting",
    "reset",
    "sidecar_path",
]

Counting = Literal["off", "sampled", "exact"]
"""How blocks are counted; bytes and lines by cause always are."""

CAUSES = ("data", "map", "log", "info", "zeroing", "write_back", "levelling")
LINE_SIZE = 64
_VERSION = 1
EVERY_STORES = 13
"""Sampling takes one store in so many; a prime, so that it keeps step with no protocol."""
_BLOCKS_MOST = {"sampled": 1 << 14, "exact": 1 << 24}
_BLOCK_LEAST = 4096
_FILE_MOST = 128 << 20
_COUNT_MOST = (1 << 32) - 1
_COMPARED = 1024
"""Counts that are compared at once."""
_NOTED_EVERY_SECONDS = 60.0


@contextlib.contextmanager
def caused_by(cause: str) -> Iterator[None]:
    """What this thread stores meanwhile is counted for ``cause``."""
    from pmemkit._native import media

    before = media.exchange_cause(cause)
    try:
        yield
    finally:
        media.exchange_cause(before)


def sidecar_path(image: str) -> str:
    """Where the counts of an image are, whatever link it was reached by."""
    return os.path.realpath(image) + ".wear"


@dataclass(slots=True)
class Ledger:
    """All that is known of what was written to an image."""

    size: int
    since: float
    updated: float
    written: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes and lines of each cause."""
    block_size: int = 0
    blocks: "array[int]" = field(default_factory=lambda: array("I"))
    sampled: bool = False

    @property
    def lines(self) -> int:
        """Lines of all causes."""
        return sum(lines for _, lines in self.written.values())

    @classmethod
    def load(cls, image: str) -> "Ledger | None":
        """What stands beside an image; ``None`` where nothing does. Raises :class:`Corrupt`."""
        path = sidecar_path(image)
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - bytes of a str path
                data = file.read(_FILE_MOST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls._parse(data, path) if data else None

    @classmethod
    def _parse(cls, data: bytes, path: str) -> "Ledger":
        def refuse(text: str) -> Corrupt:
            return Corrupt(f"{text}; --reset begins anew", op="wear", path=path)

        if len(data) > _FILE_MOST:
            raise refuse(f"has more than {_FILE_MOST} bytes")
        try:
            record = json.loads(data)
            checksum = record.pop("checksum")
            if record["version"] != _VERSION or checksum != _checksum(record):
                raise refuse("is of another version, or its checksum is wrong")
            # No more than the size asks for comes out of the compressed bytes.
            size, block_size = int(record["size"]), int(record["block_size"])
            most = 4 * -(-size // block_size) if block_size > 0 else 0
            packed = base64.b64decode(record["blocks"], validate=True)
            blocks = array("I", zlib.decompressobj().decompress(packed, most + 4)[:most])
            written = {
                cause: (int(each["bytes"]), int(each["lines"]))
                for cause, each in record["written"].items()
                if cause in CAUSES
            }
            since, updated = float(record["since"]), float(record["updated"])
            sampled = bool(record["sampled"])
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError):
            raise refuse("is no list of what was written") from None
        return cls(size, since, updated, written, block_size, blocks, sampled)

    def _record(self) -> dict[str, Any]:
        written = {
            cause: {"bytes": size, "lines": lines} for cause, (size, lines) in self.written.items()
        }
        record = {
            "version": _VERSION,
            "since": self.since,
            "updated": self.updated,
            "size": self.size,
            "written": written,
            "block_size": self.block_size,
            "sampled": self.sampled,
            "blocks": base64.b64encode(zlib.compress(self.blocks.tobytes(), 1)).decode(),
        }
        return {**record, "checksum": _checksum(record)}

    def add(
        self,
        written: dict[str, tuple[int, int]],
        block_size: int,
        counts: dict[int, int],
        start: int,
    ) -> None:
        """Adds what was counted by block; block 0 begins at byte ``start`` of the image."""
        for cause, (size, lines) in written.items():
            before = self.written.get(cause, (0, 0))
            self.written[cause] = (before[0] + size, before[1] + lines)
        if not block_size:
            return
        self.block_size = self.block_size or block_size
        count = -(-self.size // self.block_size)
        missing = max(0, count - len(self.blocks))
        self.blocks = self.blocks[:count] + array("I", bytes(4 * missing))
        for number, added in counts.items():
            place = (start + number * block_size) // self.block_size
            self.blocks[place] = min(self.blocks[place] + added, _COUNT_MOST)


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def _grown(counts: "array[int]", before: "array[int]") -> dict[int, int]:
    """How much each count has grown, where it has; ``before`` is of the same blocks, or empty."""
    fresh = {}
    for first in range(0, len(counts), _COMPARED):
        part = counts[first : first + _COMPARED]
        known = before[first : first + _COMPARED] or array("I", bytes(4 * len(part)))
        # Most of a large image was not written to: equal parts are told apart at once.
        if part != known:
            for number, (new, old) in enumerate(zip(part, known, strict=True), first):
                if new != old:
                    fresh[number] = (new - old) & _COUNT_MOST
    return fresh


def reset(image: str) -> None:
    """Forgets what was counted, also where it cannot be read. Raises :class:`OSError`."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sidecar_path(image))  # noqa: PTH108 - bytes of a str path


def _change(image: str, edit: Callable[[Ledger | None], Ledger]) -> None:
    """Replaces the ledger of an image by what ``edit`` makes of it. Raises :class:`OSError`. One
    that cannot be read is ``None`` to ``edit``."""
    path = sidecar_path(image)
    with _locked(path):
        try:
            ledger = edit(Ledger.load(image))
        except Corrupt:
            ledger = edit(None)
        draft = f"{path}.{os.getpid()}"
        try:
            with open(draft, "x", encoding="ascii") as file:  # noqa: PTH123 - the same
                json.dump(ledger._record(), file)
            os.rename(draft, path)  # noqa: PTH104 - the same
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)  # noqa: PTH108 - the same
            raise


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """The file of this name, locked; it is made where it is missing."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Whoever had the lock may have put another file in its place.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # noqa: PTH116 - the same
                    yield
                    return
        finally:
            os.close(fd)


def _block_size_for(size: int, start: int, counting: Counting) -> int:
    """Bytes of a block of a medium that begins at byte ``start`` of an image of ``size`` bytes."""
    block_size = _BLOCK_LEAST
    while size > block_size * _BLOCKS_MOST[counting]:
        block_size *= 2
    # Blocks of the medium lie within blocks of the image.
    while start % block_size and block_size > _BLOCK_LEAST:
        block_size //= 2
    return block_size


class Tracker:
    """Counts what is written through one medium, and adds it to the ledger of its image."""

    def __init__(
        self, image: str, size: int, start: int, medium: "Medium", counting: Counting
    ) -> None:
        """``size`` is that of the image, in which the medium begins at byte ``start``."""
        if counting not in ("off", "sampled", "exact"):
            text = f"wear is off, sampled or exact, not {counting!r}"
            raise InvalidArgument(text, op="open", path=image)
        self._image, self._start, self._counting = image, start, counting
        self._lock = threading.Lock()
        self.follow(medium, size)

    def follow(self, medium: "Medium", size: int) -> None:
        """Goes on with another medium of the same image, which has this size now. What was counted
        before is noted first. Blocks that a resize of the medium itself adds are not counted."""
        with self._lock:
            self._medium, self._size = medium, size
            self._noted = dict.fromkeys(CAUSES, (0, 0))
            self._counted = array("I")
            if self._counting != "off":
                block_size = _block_size_for(self._size, self._start, self._counting)
                every = 1 if self._counting == "exact" else EVERY_STORES
                medium.count_blocks(block_size, every=every)

    def note(self) -> None:
        """Adds what was counted since the last time. Where the file cannot be written, that is
        kept for the next time; nothing is raised."""
        with self._lock, contextlib.suppress(OSError):
            self._note()

    def _note(self) -> None:
        written = self._medium.written()
        if written == self._noted:
            return
        more = {
            cause: (size - self._noted[cause][0], lines - self._noted[cause][1])
            for cause, (size, lines) in written.items()
            if (size, lines) != self._noted[cause]
        }
        block_size, data = self._medium.block_counts() or (0, b"")
        counts = array("I", data)
        fresh = _grown(counts, self._counted)
        now = time.time()

        def edit(ledger: Ledger | None) -> Ledger:
            ledger = ledger or Ledger(self._size, now, now)
            ledger.size, ledger.updated = max(self._size, ledger.size), now
            ledger.sampled |= self._counting == "sampled"
            if not ledger.block_size and block_size:
                ledger.block_size = _block_size_for(self._size, 0, self._counting)
            ledger.add(more, block_size, fresh, self._start)
            return ledger

        _change(self._image, edit)
        self._noted, self._counted = written, counts


@contextlib.contextmanager
def keep_noting(notes: Iterable[Callable[[], None]]) -> Iterator[None]:
    """Calls each every minute meanwhile, so that whoever is killed loses no more than that."""
    wanted, ended = list(notes), threading.Event()

    def loop() -> None:
        while not ended.wait(_NOTED_EVERY_SECONDS):
            for note in wanted:
                note()

    thread = threading.Thread(target=loop, name="pmemkit-wear", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
