"""What a change of images will write, found out before it is made; and the way back.

A verb runs on a :class:`Rehearsal`: it reads the images and what it has written itself, and nothing
reaches the media. What comes of it is a :class:`Changes`: the groups of writes in their order, with
what each of them replaces. These groups are then kept, carried out, and maybe taken back.

Invariants:
1. Groups go back in the reverse order, each durable before the next, to what was there before each.
   So the way back visits the states that the way forth visited, torn groups included, and whoever
   ordered the groups well for a crash on the way forth did so for the way back.
2. :meth:`Changes.place` says how far a change came, or how far it is taken back, from what is on
   the media alone. Where no point on the way explains them, somebody else wrote.
3. What was there is kept up to ``KEEP_SIZE`` bytes. Beyond that, clearing that a verb only wishes
   is not done; where it must be done, the change has no way back and says so.

What this does not do: decide whether to take back (:mod:`pmemkit.policy.image_actions`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from pmemkit.errors import Corrupt
from pmemkit.formats.layout import Clear
from pmemkit.namespace.images import Images, Progress, Step

__all__ = ["KEEP_SIZE", "Change", "Changes", "Rehearsal", "fingerprint"]

KEEP_SIZE: Final = 64 << 20
"""Bytes of what a change clears that are kept."""
_CHUNK: Final = 1 << 20
_GRAIN: Final = 4096

_Data = list[tuple[int, bytes]]
"""Bytes and their offsets, in order and without overlaps; what lies between is zero."""


@dataclass(slots=True)
class Change:
    """A range that a group writes. Bytes."""

    offset: int
    length: int
    after: bytes | None
    """``None``: it is cleared."""
    before: _Data | None
    """``None``: it was too much to keep."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length

    def written(self, start: int, end: int) -> bytes:
        """A part of what it writes."""
        if self.after is None:
            return bytes(end - start)
        return self.after[start - self.offset : end - self.offset]


@dataclass(slots=True)
class Changes:
    """The groups of a change of one dimm, in their order."""

    dimm: int
    groups: list[list[Change]] = field(default_factory=list)

    def kept(self, place: int) -> bool:
        """True when all that the first ``place`` groups replace is kept."""
        return all(each.before is not None for group in self.groups[:place] for each in group)

    def ranges(self) -> list[tuple[int, int]]:
        """``(start, end)`` of what is written, in order and without overlaps."""
        found: list[tuple[int, int]] = []
        for start, end in sorted((c.offset, c.end) for group in self.groups for c in group):
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], end))
            else:
                found.append((start, end))
        return found

    def plain(self) -> dict[str, Any]:
        """Plain values and bytes, for the journal."""
        groups = [
            [[each.offset, each.length, each.after, each.before] for each in group]
            for group in self.groups
        ]
        return {"dimm": self.dimm, "groups": groups}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Changes":
        """The reverse of :meth:`plain`. Raises :class:`Corrupt`."""
        try:
            groups = [
                [
                    Change(at, length, after, None if b is None else [(o, d) for o, d in b])
                    for at, length, after, b in group
                ]
                for group in plain["groups"]
            ]
            return cls(int(plain["dimm"]), groups)
        except (KeyError, TypeError, ValueError) as cause:
            text = f"what the journal kept of a change is none: {cause!r}"
            raise Corrupt(text, op="undo") from None

    def carry_out(self, images: Images, progress: Progress | None = None) -> None:
        """Makes the change."""
        groups: list[Step] = [
            [Clear(c.offset, c.length) if c.after is None else (c.offset, c.after) for c in group]
            for group in self.groups
        ]
        if progress is None:
            images.carry_out(self.dimm, groups)
        else:
            images.carry_out(self.dimm, groups, progress=progress)

    def place(self, images: Images) -> int | None:
        """How many groups are on the media; of the last of them maybe not all writes. ``None``:
        other bytes than this change wrote or found."""
        # A first group of which nothing is written looks like a torn one, and like none.
        places = (0, *range(len(self.groups), 0, -1))
        return next((place for place in places if self._stands_at(images, place)), None)

    def _stands_at(self, images: Images, place: int) -> bool:
        """True when the media hold what they hold when ``place`` groups are there, with the last of
        them in any part."""
        torn = self.groups[place - 1] if place else []
        for start, end in self.ranges():
            for at in self._telling(images, start, end):
                length = min(_CHUNK, end - at)
                now = images.medium(self.dimm).read(at, length)
                after = self._expected(at, length, place)
                if after is None or now == after:
                    continue
                before = self._expected(at, length, place - 1) if torn else None
                if before is None or not _mixed(now, before, after):
                    return False
        return True

    def _telling(self, images: Images, start: int, end: int) -> Iterator[int]:
        """Where to look: what is a hole, and should hold no data either, is right."""
        data = list(_data_ranges(images, self.dimm, start, end))
        for each in (c for group in self.groups for c in group):
            if each.after is not None:
                data.append((each.offset, each.end))
            data += [(o, o + len(d)) for o, d in each.before or []]
        chunks: set[int] = set()
        for first, behind in data:
            first, behind = max(first, start) - start, min(behind, end) - start
            if first < behind:
                chunks.update(range(first // _CHUNK, -(-behind // _CHUNK)))
        return iter(start + chunk * _CHUNK for chunk in sorted(chunks))

    def _expected(self, offset: int, length: int, place: int) -> bytes | None:
        """What a range holds when ``place`` groups are there; ``None``: it is not known."""
        found = bytearray(length)
        for group in self.groups:
            for each in group:
                start, end = max(offset, each.offset), min(offset + length, each.end)
                if start < end:
                    found[start - offset : end - offset] = each.written(start, end)
        for group in reversed(self.groups[place:]):
            for each in group:
                start, end = max(offset, each.offset), min(offset + length, each.end)
                if start >= end:
                    continue
                if each.before is None:
                    return None
                found[start - offset : end - offset] = _part_of(each.before, start, end)
        return bytes(found)

    def take_back(self, images: Images, place: int) -> None:
        """Takes the first ``place`` groups back, the last one first; each is durable before the
        next. Raises :class:`Corrupt` before anything is written, where something was not kept."""
        if not self.kept(place):
            text = "what was there is more than the journal keeps, and is gone"
            raise Corrupt(text, op="undo")
        for group in reversed(self.groups[:place]):
            # What a range to be cleared has between its data was zero, and is.
            images.carry_out(self.dimm, [[piece for each in group for piece in each.before or []]])


def _mixed(now: bytes, before: bytes, after: bytes) -> bool:
    """True when every byte is that of one of two."""
    if now in (before, after):
        return True
    return all(each in pair for each, *pair in zip(now, before, after, strict=True))


def _part_of(data: _Data, start: int, end: int) -> bytes:
    found = bytearray(end - start)
    for offset, each in data:
        first, behind = max(start, offset), min(end, offset + len(each))
        if first < behind:
            found[first - start : behind - start] = each[first - offset : behind - offset]
    return bytes(found)


# --- rehearsal ------------------------------------------------------------------------------------


class _Shadow:
    """A dimm with writes that are not on its medium. Only what :class:`Images` calls."""

    def __init__(self, images: Images, dimm: int) -> None:
        self._images, self._dimm = images, dimm
        self._size = len(images.medium(dimm))
        self._written: list[Change] = []

    def __len__(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """The medium with the writes over it."""
        found = bytearray(self._images.medium(self._dimm).read(offset, length))
        for each in self._written:
            start, end = max(offset, each.offset), min(offset + length, each.end)
            if start < end:
                found[start - offset : end - offset] = each.written(start, end)
        return bytes(found)

    def put(self, group: Iterable[Change]) -> None:
        """Takes writes in."""
        self._written += group

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """``(start, end)`` of where there may be something else than zeroes."""
        found = list(_data_ranges(self._images, self._dimm, start, end))
        for each in self._written:
            first, behind = max(start, each.offset), min(end, each.end)
            if each.after is not None and first < behind:
                found.append((first, behind))
        merged: list[tuple[int, int]] = []
        for first, behind in sorted(found):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], behind))
            else:
                merged.append((first, behind))
        return merged


class Rehearsal(Images):
    """Images that a verb changes on paper; :attr:`changes` has what it would write to ``dimm``."""

    def __init__(self, images: Images, dimm: int) -> None:
        self._shadow = _Shadow(images, dimm)
        shadows = {dimm: cast("Any", self._shadow)}
        readers = list(images._opened)
        readers[dimm] = (self._read, len(self._shadow))
        super().__init__(images.machine, shadows, readers)
        self.changes = Changes(dimm)
        self._room = KEEP_SIZE

    def _read(self, offset: int, length: int) -> bytes:
        return self._shadow.read(offset, max(0, min(length, len(self._shadow) - offset)))

    def carry_out(
        self,
        dimm: int,
        groups: Iterable[Step],
        *,
        base: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Takes the groups in, with what they would replace."""
        assert dimm == self.changes.dimm, "a change concerns one dimm"
        for group in groups:
            taken = [found for each in group if (found := self._change(base, each)) is not None]
            self._shadow.put(taken)
            if taken:
                self.changes.groups.append(taken)

    def _change(self, base: int, write: tuple[int, bytes] | Clear) -> Change | None:
        if not isinstance(write, Clear):
            offset, data = base + write[0], bytes(write[1])
            return Change(offset, len(data), data, [(offset, self._shadow.read(offset, len(data)))])
        offset, length = base + write.offset, write.length
        before = self._data(offset, offset + length)
        if before is None and not write.required:
            return None
        return Change(offset, length, None, before)

    def _data(self, start: int, end: int) -> _Data | None:
        """What is not zero in a range; ``None`` where it is more than there is room for."""
        found: _Data = []
        size = 0
        for first, behind in self._shadow.data_ranges(start, end):
            for at in range(first, behind, _CHUNK):
                chunk = self._shadow.read(at, min(_CHUNK, behind - at))
                for offset, data in _without_zeroes(at, chunk):
                    size += len(data)
                    found.append((offset, data))
                if size > self._room:
                    return None
        self._room -= size
        return found


def _without_zeroes(offset: int, chunk: bytes) -> Iterator[tuple[int, bytes]]:
    """Runs of a chunk between grains of zeroes."""
    if not chunk.count(0):
        yield offset, chunk
        return
    start = None
    for at in range(0, len(chunk) + _GRAIN, _GRAIN):
        grain = chunk[at : at + _GRAIN]
        blank = grain.count(0) == len(grain)
        if not blank and start is None:
            start = at
        if blank and start is not None:
            yield offset + start, chunk[start:at]
            start = None


def _data_ranges(images: Images, dimm: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    at = start
    for run, hole in images.medium(dimm).extents(start, end - start):
        if not hole:
            yield at, at + run
        at += run


def fingerprint(
    images: Images, dimm: int, start: int, end: int, without: Sequence[tuple[int, int]]
) -> str:
    """A digest of a range of a dimm, without the ranges that are left out. Holes and zeroes are the
    same."""
    digest = hashlib.blake2b(digest_size=32)
    chunks: set[int] = set()
    for first, behind in _data_ranges(images, dimm, start, end):
        chunks.update(range(first // _CHUNK, -(-behind // _CHUNK)))
    medium = images.medium(dimm)
    for chunk in sorted(chunks):
        first, behind = max(start, chunk * _CHUNK), min(end, (chunk + 1) * _CHUNK)
        data = medium.read(first, behind - first)
        if any(s < behind and e > first for s, e in without):
            changed = bytearray(data)
            for s, e in without:
                s, e = max(s, first), min(e, behind)
                if s < e:
                    changed[s - first : e - first] = bytes(e - s)
            data = bytes(changed)
        if data.count(0) != len(data):
            digest.update(first.to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
