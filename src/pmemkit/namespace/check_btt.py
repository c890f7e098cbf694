"""Checking and repairing a namespace of mode sector, as ``ndctl check-namespace`` does.

The check looks at everything first and writes nothing. A repair begins only when all that was found
can be repaired; otherwise the medium stays as it is.

Rules by which something is repaired:
1. An info block that is bad is restored from its copy, and a copy that differs from its block.
2. A write that is in the log and not in the map is finished, as the kernel does when it opens.
3. A lane whose log group is damaged gets a block that nobody owns. Blocks without an owner are
   alike, so this is right when there are exactly as many of them as damaged lanes: a write that was
   under way there was never acknowledged, and its sector keeps the block that the map says.
4. Nothing else. Two sectors with one block, or a sector whose block does not exist, mean that data
   are lost; which ones, nobody can tell.

Each repair may be interrupted anywhere: what is left is repaired by the next run.

What this does not do: look at the data of sectors.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pmemkit.errors import Corrupt
from pmemkit.formats import btt
from pmemkit.namespace.images import Progress

if TYPE_CHECKING:
    from pmemkit._native.btt import MapScan
    from pmemkit._native.media import Medium

__all__ = ["CheckReport", "Finding", "check_btt"]

_STEP_ENTRIES: Final = 1 << 22
"""Map entries between two calls of the progress function."""
_SHOWN: Final = 8
_SEQUENCE: Final = {1: 2, 2: 3, 3: 1}


@dataclass(slots=True)
class Finding:
    """One thing that is wrong."""

    where: str
    """The structure: ``info``, ``info2``, ``log``, ``map`` or ``bitmap``."""
    offset: int
    """Bytes from the start of the namespace."""
    message: str
    repairable: bool
    repaired: bool = False


@dataclass(slots=True)
class CheckReport:
    """What a check found, and what became of it."""

    version: str
    arenas: int = 0
    sectors: int = 0
    findings: list[Finding] = field(default_factory=list)
    log_rewritten: bool = False
    states: dict[str, int] = field(
        default_factory=lambda: {"normal": 0, "initial": 0, "zero": 0, "error": 0}
    )
    """Sectors by the state of their map entry; one in error is no damage of the table."""

    @property
    def clean(self) -> bool:
        """True when nothing is wrong, or not any more."""
        return all(each.repaired for each in self.findings)

    @property
    def repairable(self) -> bool:
        """True when a repair would leave it clean."""
        return all(each.repairable for each in self.findings)


@dataclass(slots=True)
class _Arena:
    """An arena under check; ``start`` in bytes of the namespace."""

    start: int
    info: btt.BttInfo
    block: bytes
    """The info block as it should be, in both places."""
    pair: tuple[int, int] = (0, 1)
    lanes: dict[int, btt.Lane] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    finished: dict[int, int] = field(default_factory=dict)
    spare: list[int] = field(default_factory=list)
    """Blocks for the damaged lanes."""
    restore: list[int] = field(default_factory=list)
    """Where :attr:`block` has to be written, in bytes of the namespace."""


def check_btt(
    medium: "Medium",
    base: int,
    size: int,
    *,
    parent_uuid: UUID,
    version: btt.Version | None = None,
    repair: bool = False,
    rewrite_log: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Checks ``size`` bytes at ``base`` of the medium; with ``repair`` also repairs them.

    ``version`` is what the label demands; ``None`` tries 1.1, then 2.0. ``rewrite_log`` leaves one
    entry a lane, which every kernel reads alike; only with ``repair``. ``progress`` is called with
    the bytes of maps that were scanned, and of all maps. Raises :class:`Corrupt` when there is no
    info block and no copy of one. What was repaired is durable when this returns.
    """
    view = _View(medium, base, size, parent_uuid)
    found = version or _find_version(view)
    report = CheckReport(found)
    arenas = _find_arenas(view, found, report)
    report.arenas = len(arenas)
    report.sectors = sum(arena.info.external_nlba for arena in arenas)
    total = 4 * report.sectors
    done = 0
    for arena in arenas:
        _check_log(view, arena, report)
        done = _check_map(view, arena, report, done, total, progress)
    if repair and report.repairable:
        for arena in arenas:
            _repair(view, arena, rewrite_log)
        report.log_rewritten = rewrite_log
        for each in report.findings:
            each.repaired = True
    return report


@dataclass(frozen=True, slots=True)
class _View:
    """The bytes of the namespace on its medium."""

    medium: "Medium"
    base: int
    size: int
    parent: UUID

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        return self.medium.read(self.base + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.medium.write(self.base + offset, data)

    def persist(self, offset: int, length: int) -> None:
        self.medium.persist(self.base + offset, length)


# --- info blocks ---------------------------------------------------------------------------------


def _find_version(view: _View) -> btt.Version:
    versions: tuple[btt.Version, ...] = ("1.1", "2.0")
    for version in versions:
        start = btt.INITIAL_OFFSET[version]
        if _good_info(view, start, version) or _find_copy(view, start, version):
            return version
    raise Corrupt("there is no BTT info block, and no copy of one at the end", op="check")


def _good_info(view: _View, start: int, version: btt.Version) -> btt.BttInfo | None:
    return btt.good_info(
        view.read, start, start=start, size=view.size, version=version, parent=view.parent
    )


def _find_copy(view: _View, start: int, version: btt.Version) -> tuple[int, btt.BttInfo] | None:
    return btt.find_copy(
        view.read, start=start, size=view.size, version=version, parent=view.parent
    )


def _find_arenas(view: _View, version: btt.Version, report: CheckReport) -> list[_Arena]:
    arenas: list[_Arena] = []
    start = btt.INITIAL_OFFSET[version]
    while True:
        info = _good_info(view, start, version)
        restore = []
        if info is None:
            copy = _find_copy(view, start, version)
            if copy is None:
                text = f"no info block at {start} and no copy of one: the arena is lost"
                if not arenas:
                    raise Corrupt(text, op="check", offset=start)
                report.findings.append(Finding("info", start, text, repairable=False))
                return arenas
            at, info = copy
            text = f"info block at {start} needs to be restored from its copy at {at}"
            report.findings.append(Finding("info", start, text, repairable=True))
            restore.append(start)
        block = info.sealed()
        at = start + info.info2off
        if btt.readable(view.read, at, view.size) != block:
            text = f"info2 block at {at} needs to be restored: it differs from the info block"
            report.findings.append(Finding("info2", at, text, repairable=True))
            restore.append(at)
        if arenas and info.external_lbasize != arenas[0].info.external_lbasize:
            first = arenas[0].info.external_lbasize
            text = f"sectors have {info.external_lbasize} bytes, those of the first arena {first}"
            report.findings.append(Finding("info", start, text, repairable=False))
        if info.flags & 1:
            text = "the arena carries the error flag: a write failed there"
            report.findings.append(Finding("info", start, text, repairable=False))
        arenas.append(_Arena(start, info, block, restore=restore))
        if not info.nextoff:
            return arenas
        start += info.nextoff


# --- log -----------------------------------------------------------------------------------------


def _check_log(view: _View, arena: _Arena, report: CheckReport) -> None:
    log_at = arena.start + arena.info.logoff
    groups = btt.log_groups(view.read(log_at, btt.LANES * btt.LOG_GROUP_SIZE))
    arena.pair, faults = btt.log_pair(groups)
    odd = {fault.offset // btt.LOG_GROUP_SIZE: fault.message for fault in faults}
    for number, group in enumerate(groups):
        lane = btt.lane_of(number, group, arena.pair)
        why = odd.get(number)
        if why is None and not isinstance(lane, btt.Lane):
            why = f"{lane.field} {lane.message}"
        elif why is None and isinstance(lane, btt.Lane):
            why = _entry_fault(lane, arena.info)
        if why is None and isinstance(lane, btt.Lane):
            arena.lanes[number] = lane
            continue
        arena.damaged.append(number)
        at = log_at + number * btt.LOG_GROUP_SIZE
        text = f"log entries of lane {number} are damaged: {why}"
        report.findings.append(Finding("log", at, text, repairable=True))
    _check_finished(view, arena, report)


def _entry_fault(lane: btt.Lane, info: btt.BttInfo) -> str | None:
    entry = lane.entry
    if entry.lba >= info.external_nlba:
        return f"lba is {entry.lba}, the arena has {info.external_nlba} sectors"
    for name in ("old_map", "new_map"):
        block = getattr(entry, name) & btt.MAP_MASK
        if block >= info.internal_nlba:
            return f"{name} is {block}, the arena has {info.internal_nlba} blocks"
    return None


def _check_finished(view: _View, arena: _Arena, report: CheckReport) -> None:
    """Finds writes that are in the log and not in the map."""
    map_at = arena.start + arena.info.mapoff

    def entry_of(lba: int) -> int:
        return int.from_bytes(view.read(map_at + 4 * lba, 4), "little")

    for lba, lanes in btt.follow_log(arena.lanes.values(), entry_of).items():
        arena.finished[lba] = lanes[-1].entry.new_map & btt.MAP_MASK
        listed = ", ".join(str(lane.number) for lane in lanes)
        text = f"map entry of sector {lba} lacks the write of lane {listed}"
        report.findings.append(Finding("map", map_at + 4 * lba, text, repairable=True))


# --- map -----------------------------------------------------------------------------------------


def _check_map(
    view: _View,
    arena: _Arena,
    report: CheckReport,
    done: int,
    total: int,
    progress: Progress | None,
) -> int:
    from pmemkit._native import btt as native

    info = arena.info
    scan = native.MapScan(info.internal_nlba, sorted(arena.finished.items()))
    map_at = arena.start + info.mapoff
    for first in range(0, info.external_nlba, _STEP_ENTRIES):
        count = min(_STEP_ENTRIES, info.external_nlba - first)
        scan.feed(view.medium, view.base + map_at + 4 * first, first, count)
        done += 4 * count
        if progress is not None:
            progress(done, total)
    for wrong, lba, block in scan.findings()[:_SHOWN]:
        text = (
            f"map entry of sector {lba} names block {block} of {info.internal_nlba}"
            if wrong == "out_of_range"
            else f"map entry of sector {lba} names block {block}, which another sector has"
        )
        report.findings.append(Finding("map", map_at + 4 * lba, text, repairable=False))
    counts = scan.counts()
    for state in report.states:
        report.states[state] += counts[state]
    more = counts["duplicate"] + counts["out_of_range"] - _SHOWN
    if more > 0:
        text = f"{more} more map entries are wrong"
        report.findings.append(Finding("map", map_at, text, repairable=False))
    _check_blocks(arena, scan, report)
    return done


def _check_blocks(arena: _Arena, scan: "MapScan", report: CheckReport) -> None:
    """Gives each lane its free block, and sees that all blocks have one owner."""
    log_at = arena.start + arena.info.logoff
    for lane in arena.lanes.values():
        if not scan.claim(lane.free_block):
            text = (
                f"bitmap error: block {lane.free_block}, free in lane {lane.number}, has an owner"
            )
            at = log_at + lane.number * btt.LOG_GROUP_SIZE
            report.findings.append(Finding("bitmap", at, text, repairable=False))
    count, blocks = scan.unclaimed(max(len(arena.damaged), _SHOWN))
    if count == len(arena.damaged):
        arena.spare = blocks
        return
    listed = ", ".join(str(block) for block in blocks[:_SHOWN]) or "none"
    text = (
        f"bitmap error: {count} blocks have no owner ({listed}), "
        f"{len(arena.damaged)} lanes have no block"
    )
    report.findings.append(Finding("bitmap", arena.start, text, repairable=False))


# --- repair --------------------------------------------------------------------------------------


def _repair(view: _View, arena: _Arena, rewrite_log: bool) -> None:
    """Everything of one arena; the info blocks come last and their copies before them."""
    info = arena.info
    for lba, block in arena.finished.items():
        at = arena.start + info.mapoff + 4 * lba
        view.write(at, (block | btt.NORMAL).to_bytes(4, "little"))
        view.persist(at, 4)
    for number, block in zip(arena.damaged, arena.spare, strict=True):
        arena.lanes[number] = _write_lane(view, arena, number, block)
    if rewrite_log:
        _rewrite_log(view, arena)
    for at in sorted(arena.restore, reverse=True):
        view.write(at, arena.block)
        view.persist(at, len(arena.block))


def _write_lane(view: _View, arena: _Arena, number: int, block: int) -> btt.Lane:
    """A fresh group for a lane whose group is damaged, one word at a time.

    The first entry loses its sequence number before anything else and gets it back last, so at any
    moment in between the group is damaged and not some other, sound one. The places that the log
    does not use are cleared before its second place: which two it uses must stay told.
    """
    entry = btt.LogEntry(lba=number, old_map=block, new_map=block, seq=1)
    words = entry.pack()[:8], entry.pack()[8:]
    second = arena.pair[1]
    unused = [place for place in (1, 2, 3) if place != second]
    steps = [(8, bytes(8))]
    for place in (*unused, second):
        steps += [(16 * place + 8, bytes(8)), (16 * place, bytes(8))]
    steps += [(0, words[0]), (8, words[1])]
    at = arena.start + arena.info.logoff + number * btt.LOG_GROUP_SIZE
    for offset, word in steps:
        view.write(at + offset, word)
        view.persist(at + offset, len(word))
    return btt.Lane(number, entry, arena.pair[0], arena.pair[1])


def _rewrite_log(view: _View, arena: _Arena) -> None:
    """Leaves each lane its newest entry alone, in place 0 with sequence number 1.

    Every step is one that a lane could have taken: the newest entry is written once more into the
    other place with the next number, until it stands in place 0 with number 1; then the other place
    is zeroed, number first. So any crash leaves a log that reads the same.
    """
    log_at = arena.start + arena.info.logoff
    size = btt.LANES * btt.LOG_GROUP_SIZE
    lanes = dict(arena.lanes)
    first = arena.pair[0]
    while True:
        moving = [each for each in lanes.values() if (each.slot, each.entry.seq) != (first, 1)]
        if not moving:
            break
        moved = {lane.number: _moved(lane) for lane in moving}
        for half in (slice(0, 8), slice(8, 16)):
            for number, lane in moved.items():
                at = log_at + number * btt.LOG_GROUP_SIZE + 16 * lane.slot
                view.write(at + half.start, lane.entry.pack()[half])
            view.persist(log_at, size)
        lanes |= moved
    for half in (slice(8, 16), slice(0, 8)):
        for lane in lanes.values():
            at = log_at + lane.number * btt.LOG_GROUP_SIZE + 16 * lane.other
            view.write(at + half.start, bytes(8))
        view.persist(log_at, size)


def _moved(lane: btt.Lane) -> btt.Lane:
    entry = lane.entry
    again = btt.LogEntry(
        lba=entry.lba,
        old_map=entry.old_map,
        new_map=entry.new_map,
        seq=_SEQUENCE[entry.seq],
    )
    return btt.Lane(lane.number, again, lane.other, lane.slot)
