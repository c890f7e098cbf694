"""Durability of a block device, judged at every power failure that its medium could suffer.

A random stream of requests runs on a device over :class:`pmemkit._native.media.Recording`. Marks in
the log say when each request was begun and acknowledged. Then, for every point of the log, every
image that a power failure could leave (or a seeded sample) goes to the oracle:

1. an aligned 8-byte word holds a value that some write left there, whole;
2. once a flush that began after a write's acknowledgement was itself acknowledged, nothing older
   than that write is left; the same holds once a write with FUA was acknowledged;
3. a write that is in flight, or acknowledged but not flushed, may be there or not, word by word;
4. a discarded word holds anything until a later write of the whole word is durable.

What this does not do: judge larger units than words (a sector engine has its own oracle), or order
between words, which mode ``raw`` does not promise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pmemkit._native import block, media

__all__ = [
    "DurabilityError",
    "DurabilityOracle",
    "RecordedDevice",
    "Request",
    "RequestTarget",
    "check_streams",
    "random_requests",
]

_WORD = 8
"""Bytes that power failure cannot tear."""

_CHUNK = 256
"""Bytes that are compared at once with the newest values, which are always allowed."""

_STORES = ("store", "store_nt", "punch")


class DurabilityError(AssertionError):
    """A power failure could have left what the device had promised away."""


@dataclass(frozen=True)
class Request:
    """One request of a stream."""

    op: str
    """``write``, ``zero``, ``discard`` or ``flush``."""
    offset: int = 0
    data: bytes = b""
    """What a write writes; for the other ops only its length counts."""
    fua: bool = False
    no_hole: bool = False


class RequestTarget(Protocol):
    """What requests are sent to: the part of a channel that changes the device."""

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> object:
        """Writes, and returns when the write is acknowledged."""

    def flush(self) -> None:
        """Makes acknowledged writes durable."""

    def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Gives a range back."""

    def zero(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False) -> None:
        """Makes a range read as zeroes."""


def random_requests(
    seed: int,
    size: int,
    count: int,
    *,
    ops: Sequence[str] = ("write", "zero", "discard", "flush"),
    lengths: Sequence[int] = (),
) -> list[Request]:
    """A stream that is the same for the same seed: mostly writes, of all sizes, crowded together.

    ``lengths`` are further lengths that half of the changes have, beside those from 1 to 8192.
    A quarter of the changes ask for FUA, so that both ways to durability are exercised.
    """
    choose = random.Random(seed)
    weights = {"write": 12, "zero": 2, "discard": 1, "flush": 4}
    names = choose.choices(ops, [weights[op] for op in ops], k=count)
    requests = []
    for op in names:
        if op == "flush":
            requests.append(Request(op))
            continue
        if lengths and choose.random() < 0.5:
            length = choose.choice(lengths)
        else:
            small = (choose.randint(1, 24), choose.randint(1, 600))
            length = choose.choice((8, 64, 256, 512, 4096, 2 * 4096, *small))
        length = min(length, size)
        grain = choose.choice((1, 8, 64, 512, 4096))
        offset = choose.randint(0, size - length) // grain * grain
        data = choose.randbytes(length) if op == "write" else bytes(length)
        fua, no_hole = choose.random() < 0.25, choose.random() < 0.5
        requests.append(Request(op, offset, data, fua, op == "zero" and no_hole))
    return requests


@dataclass
class _Word:
    """What one word may hold: the value that is certain to be there at least, and newer ones."""

    values: list[tuple[int, bytes | None]]
    """``(request, value)``, oldest first; ``None`` is "anything"; the first one is the base."""

    def allowed(self) -> list[bytes | None]:
        """The values alone."""
        return [value for _, value in self.values]

    def settle(self, covered: Callable[[int], bool]) -> None:
        """Drops what is older than the newest value of a covered request."""
        for index in range(len(self.values) - 1, 0, -1):
            if covered(self.values[index][0]):
                del self.values[:index]
                return


class DurabilityOracle:
    """Knows, from the requests begun and acknowledged so far, what each word may hold.

    Requests are numbered. Several may be in flight as long as they touch different words.
    """

    def __init__(self, initial: bytes) -> None:
        if len(initial) % _WORD:
            raise ValueError(f"{len(initial)} bytes are not whole words")
        self._newest = bytearray(initial)
        self._open: dict[int, _Word] = {}
        self._acknowledged: set[int] = set()
        self._flushes: dict[int, frozenset[int]] = {}

    def begin(self, number: int, request: Request) -> None:
        """The request was sent: from now on its effect may be there."""
        if request.op == "flush":
            self._flushes[number] = frozenset(self._acknowledged)
            return
        for word, start, piece in _pieces(request):
            opened = self._open.get(word)
            if opened is None:
                opened = self._open[word] = _Word([(-1, self._at(word))])
            last = opened.values[-1][1]
            if request.op == "discard" or (last is None and len(piece) < _WORD):
                value = None
            else:
                value = (last or b"")[:start] + piece + (last or b"")[start + len(piece) :]
            opened.values.append((number, value))
            if value is not None:
                self._newest[word * _WORD : (word + 1) * _WORD] = value

    def acknowledge(self, number: int, request: Request) -> None:
        """The request was answered: what it promised holds from now on."""
        self._acknowledged.add(number)
        if request.op == "flush":
            covered = self._flushes.pop(number)
            for word in list(self._open):
                self._settle(word, covered.__contains__)
        elif request.fua:
            for word, _, _ in _pieces(request):
                self._settle(word, number.__eq__)

    def check(self, image: bytes) -> str | None:
        """What is wrong with an image, or ``None``."""
        newest = bytes(self._newest)
        for start in range(0, len(image), _CHUNK):
            if image[start : start + _CHUNK] == newest[start : start + _CHUNK]:
                continue
            for at in range(start, min(start + _CHUNK, len(image)), _WORD):
                found = image[at : at + _WORD]
                if found == newest[at : at + _WORD]:
                    continue
                opened = self._open.get(at // _WORD)
                allowed: list[bytes | None] = [newest[at : at + _WORD]]
                if opened is not None:
                    allowed = opened.allowed()
                if found not in allowed and None not in allowed:
                    return self._describe(at, found, allowed)
        return None

    @staticmethod
    def _describe(at: int, found: bytes, allowed: list[bytes | None]) -> str:
        listed = ", ".join(value.hex() for value in allowed if value is not None)
        return f"the word at byte {at} holds {found.hex()}, allowed is {listed}"

    def _at(self, word: int) -> bytes:
        return bytes(self._newest[word * _WORD : (word + 1) * _WORD])

    def _settle(self, word: int, covered: Callable[[int], bool]) -> None:
        opened = self._open.get(word)
        if opened is None:
            return
        opened.settle(covered)
        if len(opened.values) == 1 and opened.values[0][1] is not None:
            del self._open[word]


def _pieces(request: Request) -> Iterator[tuple[int, int, bytes]]:
    """``(word, first byte in it, bytes)`` of a request."""
    done = 0
    while done < len(request.data):
        word, start = divmod(request.offset + done, _WORD)
        count = min(_WORD - start, len(request.data) - done)
        yield word, start, request.data[done : done + count]
        done += count


@dataclass
class RecordedDevice:
    """A device over a recording medium, its stream of requests, and the judgement on it."""

    granularity: str = "cacheline"
    size: int = 16384
    seed: int = 0
    """Of the initial content and of the sample of images; named in every failure."""
    layers: Callable[[block.Device], block.Device] = lambda device: device
    """Puts layers on top of the raw device."""
    requests: list[Request] = field(default_factory=list)
    """What was submitted so far; the marks count it."""

    def __post_init__(self) -> None:
        self.initial = random.Random(self.seed).randbytes(self.size)
        self.recording = media.Recording(
            self.size, granularity=self.granularity, initial=self.initial
        )
        self.device = self.layers(block.raw(self.recording.medium()))
        self.channel = self.device.channel()

    def submit(self, request: Request, target: RequestTarget | None = None) -> None:
        """Carries one request out on ``target`` (the device's channel) between its two marks."""
        number = len(self.requests)
        self.requests.append(request)
        self.recording.mark(2 * number)
        channel: RequestTarget = self.channel if target is None else target
        match request.op:
            case "write":
                channel.write(request.offset, request.data, fua=request.fua)
            case "zero":
                length = len(request.data)
                channel.zero(request.offset, length, fua=request.fua, no_hole=request.no_hole)
            case "discard":
                channel.discard(request.offset, len(request.data), fua=request.fua)
            case "flush":
                channel.flush()
            case other:
                raise ValueError(f"{other!r} is not an op of a stream")
        self.recording.mark(2 * number + 1)

    def run(self, requests: Iterable[Request], target: RequestTarget | None = None) -> None:
        """Carries a stream out."""
        for request in requests:
            self.submit(request, target)

    def check(self, *, limit: int = 24, torn_pages: bool = False) -> int:
        """Judges the images of every point where one more may exist or less is allowed: after each
        store and each acknowledgement. Returns how many it judged; raises `DurabilityError`."""
        oracle = DurabilityOracle(self.initial)
        judged = 0
        for event, (kind, offset, _) in enumerate(self.recording.events()):
            if kind == "mark":
                number, acknowledged = divmod(offset, 2)
                request = self.requests[number]
                if not acknowledged:
                    oracle.begin(number, request)
                    continue
                oracle.acknowledge(number, request)
            elif kind not in _STORES:
                continue
            images = self.recording.crash_images(
                event + 1, limit=limit, seed=self.seed + event, torn_pages=torn_pages
            )
            for image in images:
                if wrong := oracle.check(image):
                    raise DurabilityError(
                        f"{self.granularity} medium, seed {self.seed}, after {event + 1} events "
                        f"(the last one: {kind}): {wrong}"
                    )
            judged += len(images)
        return judged


def check_streams(
    granularity: str,
    seeds: Iterable[int],
    *,
    count: int = 40,
    size: int = 16384,
    limit: int = 24,
    torn_pages: bool = False,
    lengths: Sequence[int] = (),
    layers: Callable[[block.Device], block.Device] = lambda device: device,
    connect: Callable[[block.Channel], RequestTarget] = lambda channel: channel,
) -> int:
    """Runs and judges one random stream a seed; returns how many images were judged.

    ``connect`` makes what the requests are sent to from the device's channel: the channel itself,
    or a client of a server for it. Where it has a ``close``, that is called after the stream.
    """
    judged = 0
    for seed in seeds:
        recorded = RecordedDevice(granularity, size, seed, layers)
        target = connect(recorded.channel)
        try:
            recorded.run(random_requests(seed, size, count, lengths=lengths), target)
        finally:
            close = getattr(target, "close", None)
            if close is not None:
                close()
        judged += recorded.check(limit=limit, torn_pages=torn_pages)
    return judged
