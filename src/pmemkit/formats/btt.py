"""The block translation table: mode sector. Sectors that a power failure cannot tear.

A namespace is cut into arenas of at most 512 GiB, each with its own table:

    info | data blocks | map | log (flog) | info copy

The map says for each sector (pre-map) which block (post-map) holds it; 256 blocks more than there
are sectors are always free, one a lane. A write fills the lane's free block, notes the exchange in
the lane's log, and changes the map. Layout 2.0 begins at byte 0 of the namespace, 1.1 at byte 4096.

Invariants, and traps others fell into:
1. Bit 30 of a map entry is *error*, bit 31 *zero*; both set is a normal entry. The kernel's own
   ``btt.rst`` prints the columns the other way round; its code, UEFI and PMDK agree with this.
2. An entry of which neither bit is set is initial: the sector lies in the block of its own number,
   and reads return what the media hold there.
3. A log group has four entries and uses two: 0 and 1, or 0 and 2 in layouts older than Linux 4.15.
4. The info block is written last and its copy before it: a crash leaves no BTT, or a whole one.
5. A reader takes sizes and offsets from the info block: PMDK aligns blocks to 256, Linux to 64.

Sources: the kernel's ``drivers/nvdimm/btt.[ch]``, EDK2's ``Btt.h``, PMDK's ``btt_layout.h`` (read,
not copied).

What this does not do: I/O; the engine that reads and writes sectors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal
from uuid import UUID

from pmemkit.errors import InvalidArgument, MediaError
from pmemkit.formats.layout import Clear, Fault, Layout, at

__all__ = [
    "ARENA_SIZE_MAX",
    "ARENA_SIZE_MIN",
    "ERROR",
    "INFO_SIZE",
    "INITIAL_OFFSET",
    "LANES",
    "LOG_GROUP_SIZE",
    "LOG_SIZE",
    "MAP_MASK",
    "NORMAL",
    "SECTOR_SIZES",
    "SIGNATURE",
    "ZERO",
    "Arena",
    "BttInfo",
    "BttProbe",
    "Lane",
    "LogEntry",
    "Version",
    "arenas",
    "find_copy",
    "follow_log",
    "fresh_layout",
    "good_info",
    "info_faults",
    "initial_log",
    "lane_of",
    "log_groups",
    "log_pair",
    "probe",
    "readable",
]

Version = Literal["1.1", "2.0"]

SECTOR_SIZES: Final = (512, 520, 528, 4096, 4104, 4160, 4224)
LANES: Final = 256
"""Free blocks, and groups of the log."""
ARENA_SIZE_MAX: Final = 1 << 39
ARENA_SIZE_MIN: Final = 1 << 24
INITIAL_OFFSET: Final[dict[Version, int]] = {"1.1": 4096, "2.0": 0}
"""Where the first arena begins in the namespace."""
INFO_SIZE: Final = 4096
LOG_GROUP_SIZE: Final = 64
LOG_SIZE: Final = 16384
_PAGE: Final = 4096
_INTERNAL_ALIGN: Final = 64

MAP_MASK: Final = 0x3FFFFFFF
"""The block number in a map entry."""
ERROR: Final = 0x40000000
ZERO: Final = 0x80000000
NORMAL: Final = 0xC0000000

SIGNATURE: Final = b"BTT_ARENA_INFO\0\0"


@dataclass(frozen=True, kw_only=True)
class BttInfo(Layout):
    """The info block of an arena; the same bytes stand at its end. Offsets count from the arena."""

    TITLE: ClassVar[str] = "BTT info block"
    SIZE: ClassVar[int] = INFO_SIZE
    SIGNATURE: ClassVar[bytes] = SIGNATURE

    signature: bytes = at(0, 16, "bytes", rule="BTT_ARENA_INFO", wrong=(b"BTT_ARENA_INFP\0\0", b""))
    uuid: UUID = at(16, 16, "uuid")
    parent_uuid: UUID = at(
        32, 16, "uuid", rule="zero, or the uuid of the label", wrong=(UUID(int=1),)
    )
    flags: int = at(48, 4, default=0, rule="bit 0: the arena is in error and read-only")
    major: int = at(52, 2, rule="1 or 2, as the place of the block demands", wrong=(0, 3))
    minor: int = at(54, 2, rule="1 under major 1, 0 under major 2", wrong=(2, 65535))
    external_lbasize: int = at(
        56, 4, rule="one of the sector sizes", wrong=(0, 511, 8192, (1 << 32) - 1)
    )
    external_nlba: int = at(60, 4, rule="internal_nlba - nfree", wrong=(0, 1, (1 << 32) - 1))
    internal_lbasize: int = at(64, 4, rule="holds a sector", wrong=(0, 63, (1 << 32) - 64))
    internal_nlba: int = at(
        68, 4, rule="blocks that fit between dataoff and mapoff", wrong=(0, 1, (1 << 32) - 1)
    )
    nfree: int = at(72, 4, default=LANES, rule="256", wrong=(0, 1, 1 << 20, (1 << 32) - 1))
    infosize: int = at(76, 4, default=INFO_SIZE, rule="4096", wrong=(0, 512, 8192))
    nextoff: int = at(
        80, 8, rule="0, or where the next arena begins", wrong=(1, 1 << 62, (1 << 64) - 1)
    )
    dataoff: int = at(88, 8, rule="at least infosize", wrong=(0, 1, 1 << 62, (1 << 64) - 1))
    mapoff: int = at(96, 8, rule="behind the data blocks", wrong=(0, 1 << 62, (1 << 64) - 4096))
    logoff: int = at(104, 8, rule="behind the map", wrong=(0, 1 << 62, (1 << 64) - 4096))
    info2off: int = at(112, 8, rule="behind the log", wrong=(0, 1 << 62, (1 << 64) - 4096))
    padding: bytes = at(120, 3968, "zero")
    checksum: int = at(4088, 8, "checksum", rule="fletcher64 over the block", wrong=(0,))


@dataclass(frozen=True, kw_only=True)
class LogEntry(Layout):
    """One exchange: the sector ``lba`` moved from block ``old_map`` to ``new_map``."""

    TITLE: ClassVar[str] = "BTT log entry"
    SIZE: ClassVar[int] = 16

    lba: int = at(0, 4, rule="below external_nlba")
    old_map: int = at(4, 4, rule="below internal_nlba without its flag bits")
    new_map: int = at(8, 4, rule="below internal_nlba without its flag bits")
    seq: int = at(12, 4, rule="1, 2, 3, 1, …; 0 in an entry never used")


@dataclass(frozen=True, slots=True)
class Arena:
    """How one arena is divided. Bytes; offsets from the arena, ``start`` in the namespace."""

    start: int
    size: int
    sector_size: int
    internal_lbasize: int
    external_nlba: int
    internal_nlba: int
    nextoff: int
    dataoff: int
    mapoff: int
    logoff: int
    info2off: int

    @property
    def data_size(self) -> int:
        """Bytes of sectors that a user sees, without metadata."""
        return self.external_nlba * (4096 if self.sector_size >= 4096 else 512)


def arenas(
    size: int, sector_size: int, version: Version, arena_size: int = ARENA_SIZE_MAX
) -> tuple[Arena, ...]:
    """The division that Linux makes of a namespace of ``size`` bytes. With smaller arenas it reads
    it as well: each info block says where the next arena begins.

    Raises :class:`InvalidArgument` for a sector or arena size it has not, or a namespace below
    16 MiB.
    """
    if not ARENA_SIZE_MIN <= arena_size <= ARENA_SIZE_MAX or arena_size % _PAGE:
        text = f"an arena size of {arena_size} is no multiple of 4096 from 16 MiB to 512 GiB"
        raise InvalidArgument(text, op="create")
    if sector_size not in SECTOR_SIZES:
        choices = ", ".join(str(each) for each in SECTOR_SIZES)
        raise InvalidArgument(f"a sector size of {sector_size} is none of {choices}", op="create")
    start = INITIAL_OFFSET[version]
    rest = size - start
    if rest < ARENA_SIZE_MIN:
        text = (
            f"{size} bytes are too small for mode sector: layout {version} needs "
            f"{start + ARENA_SIZE_MIN} bytes"
        )
        raise InvalidArgument(text, op="create")
    found = []
    while rest >= ARENA_SIZE_MIN:
        part = min(arena_size, rest)
        rest -= part
        found.append(_arena(start, part, sector_size, rest >= ARENA_SIZE_MIN))
        start += part
    return tuple(found)


def _arena(start: int, size: int, sector_size: int, more: bool) -> Arena:
    available = size // _PAGE * _PAGE - 2 * INFO_SIZE - LOG_SIZE
    internal_lbasize = -(-sector_size // _INTERNAL_ALIGN) * _INTERNAL_ALIGN
    internal_nlba = (available - _PAGE) // (internal_lbasize + 4)
    external_nlba = internal_nlba - LANES
    map_size = -(-4 * external_nlba // _PAGE) * _PAGE
    mapoff = INFO_SIZE + available - map_size
    logoff = mapoff + map_size
    return Arena(
        start,
        size,
        sector_size,
        internal_lbasize,
        external_nlba,
        internal_nlba,
        size if more else 0,
        INFO_SIZE,
        mapoff,
        logoff,
        logoff + LOG_SIZE,
    )


def fresh_layout(
    size: int,
    sector_size: int,
    *,
    version: Version,
    uuid: UUID,
    parent_uuid: UUID,
    arena_size: int = ARENA_SIZE_MAX,
) -> Iterator[Sequence[tuple[int, bytes] | Clear]]:
    """Groups of writes that make an empty BTT, offsets from the namespace. Each group is durable
    before the next begins; the info block of the first arena is the last write of all, so that a
    crash leaves no BTT.

    The data area is cleared too where that is cheap: sectors that were never written read what
    lies there.
    """
    divided = arenas(size, sector_size, version, arena_size)
    for arena in reversed(divided):
        info = BttInfo(
            signature=SIGNATURE,
            uuid=uuid,
            parent_uuid=parent_uuid,
            major=2 if version == "2.0" else 1,
            minor=0 if version == "2.0" else 1,
            external_lbasize=arena.sector_size,
            external_nlba=arena.external_nlba,
            internal_lbasize=arena.internal_lbasize,
            internal_nlba=arena.internal_nlba,
            nextoff=arena.nextoff,
            dataoff=arena.dataoff,
            mapoff=arena.mapoff,
            logoff=arena.logoff,
            info2off=arena.info2off,
        ).sealed()
        data = Clear(arena.start, arena.mapoff, required=False)
        yield [data, Clear(arena.start + arena.mapoff, arena.logoff - arena.mapoff)]
        yield [(arena.start + arena.logoff, initial_log(arena.external_nlba))]
        yield [(arena.start + arena.info2off, info)]
        yield [(arena.start, info)]


def initial_log(external_nlba: int) -> bytes:
    """The log of an arena that was never written: each lane owns one of the spare blocks."""
    groups = []
    for lane in range(LANES):
        block = external_nlba + lane
        entry = LogEntry(lba=lane, old_map=block, new_map=block, seq=1)
        groups.append(entry.pack().ljust(LOG_GROUP_SIZE, b"\0"))
    return b"".join(groups)


def info_faults(info: BttInfo, block: bytes, *, room: int, parent: UUID) -> list[Fault]:
    """Everything that is wrong with an info block of an arena that has ``room`` bytes, in a
    namespace whose label has the uuid ``parent``."""
    if info.signature != SIGNATURE:
        return [info.fault("signature", f"is {info.signature!r}, expected {SIGNATURE!r}")]
    faults = info.basic_faults(block)
    if info.parent_uuid not in (UUID(int=0), parent):
        faults.append(
            info.fault("parent_uuid", f"is {info.parent_uuid}, the namespace has {parent}")
        )
    return faults + list(_geometry_faults(info, room))


def _geometry_faults(info: BttInfo, room: int) -> Iterator[Fault]:
    fault = info.fault
    if info.major not in (1, 2):
        yield fault("major", f"is {info.major}, expected 1 or 2")
    elif info.minor != 2 - info.major:
        yield fault("minor", f"is {info.minor} under major {info.major}")
    if info.external_lbasize not in SECTOR_SIZES:
        yield fault("external_lbasize", f"is {info.external_lbasize}, none of {SECTOR_SIZES}")
    if info.infosize != INFO_SIZE:
        yield fault("infosize", f"is {info.infosize}, expected {INFO_SIZE}")
    if info.nfree != LANES:
        yield fault("nfree", f"is {info.nfree}, expected {LANES}")
    spare = info.internal_lbasize - info.external_lbasize
    if not 0 <= spare < _PAGE or info.internal_lbasize % _INTERNAL_ALIGN:
        text = f"is {info.internal_lbasize}: no multiple of 64 that just holds a sector"
        yield fault("internal_lbasize", text)
    if info.internal_nlba <= info.nfree or info.internal_nlba > MAP_MASK:
        yield fault("internal_nlba", f"is {info.internal_nlba}, expected {info.nfree + 1} or more")
    if info.external_nlba != info.internal_nlba - info.nfree:
        text = f"is {info.external_nlba}: {info.internal_nlba} blocks less {info.nfree} spare ones"
        yield fault("external_nlba", text)
    if not info.infosize <= info.dataoff < room or info.dataoff % _PAGE:
        text = f"is {info.dataoff}, expected a multiple of 4096 from 4096 on, below {room}"
        yield fault("dataoff", text)
    places = (
        ("mapoff", info.dataoff + info.internal_nlba * info.internal_lbasize, "the data blocks"),
        ("logoff", info.mapoff + 4 * info.external_nlba, "the map"),
        ("info2off", info.logoff + info.nfree * LOG_GROUP_SIZE, "the log"),
    )
    for name, behind, what in places:
        value = getattr(info, name)
        if value >= room:
            yield fault(name, f"is {value}: the arena ends at {room}")
        elif value < behind or value % _PAGE:
            text = f"is {value}: no multiple of 4096 behind {what}, which end at {behind}"
            yield fault(name, text)
    if info.info2off < room < info.info2off + INFO_SIZE:
        yield fault("info2off", f"is {info.info2off}: the arena ends at {room}")
    if info.nextoff and not info.info2off + INFO_SIZE <= info.nextoff <= room - ARENA_SIZE_MIN:
        yield fault("nextoff", f"is {info.nextoff}; an arena of 16 MiB does not fit there")


@dataclass(frozen=True, slots=True)
class BttProbe:
    """What an info block makes of a namespace.

    ``absent``: there is none, the kernel goes on as if the place was blank; ``valid``: the kernel
    takes it; ``unusable``: the first info block is good and something behind it is not.
    """

    verdict: Literal["absent", "valid", "unusable"]
    info: BttInfo | None
    faults: tuple[Fault, ...]
    size: int = 0
    """Bytes of sectors that a user sees."""
    sector_size: int = 0
    """With the metadata that may follow the data of a sector."""


_PRESENCE: Final = ("signature", "checksum", "parent_uuid", "major", "minor")


def probe(
    read: Callable[[int, int], bytes], *, size: int, version: Version, parent: UUID
) -> BttProbe:
    """Looks for a BTT of this version in a namespace of ``size`` bytes."""
    start, total = INITIAL_OFFSET[version], 0
    first: BttInfo | None = None
    while True:
        block = read(start, INFO_SIZE) if start + INFO_SIZE <= size else b""
        if len(block) < INFO_SIZE:
            text = f"an arena at {start} does not fit into {size} bytes"
            fault = BttInfo.fault("signature" if first is None else "nextoff", text)
            return BttProbe("absent" if first is None else "unusable", first, (fault,))
        info = BttInfo.unpack(block)
        faults = info_faults(info, block, room=size - start, parent=parent)
        if not faults and f"{info.major}.{info.minor}" != version:
            text = f"makes version {info.major}.{info.minor} in the place of {version}"
            faults = [info.fault("major", text)]
        if faults:
            absent = first is None and any(each.field in _PRESENCE for each in faults)
            verdict: Literal["absent", "unusable"] = "absent" if absent else "unusable"
            return BttProbe(verdict, first or (None if absent else info), tuple(faults))
        if first is not None and info.external_lbasize != first.external_lbasize:
            text = f"is {info.external_lbasize}, the first arena has {first.external_lbasize}"
            return BttProbe("unusable", first, (info.fault("external_lbasize", text),))
        first = first or info
        total += info.external_nlba
        if not info.nextoff:
            unit = 4096 if first.external_lbasize >= 4096 else 512
            return BttProbe("valid", first, (), total * unit, first.external_lbasize)
        start += info.nextoff


def readable(read: Callable[[int, int], bytes], offset: int, size: int) -> bytes:
    """The info block at an offset of a namespace of ``size`` bytes; nothing where it does not fit,
    or lies on bad media."""
    if offset < 0 or offset + INFO_SIZE > size:
        return b""
    try:
        return read(offset, INFO_SIZE)
    except MediaError:
        return b""


def good_info(
    read: Callable[[int, int], bytes],
    at: int,
    *,
    start: int,
    size: int,
    version: Version,
    parent: UUID,
) -> BttInfo | None:
    """The info block at ``at`` if it is one of an arena that begins at ``start``, in a namespace of
    ``size`` bytes. On bad media there is none."""
    block = readable(read, at, size)
    if len(block) < INFO_SIZE:
        return None
    info = BttInfo.unpack(block)
    if info_faults(info, block, room=size - start, parent=parent):
        return None
    if at not in (start, start + info.info2off):
        return None
    return info if f"{info.major}.{info.minor}" == version else None


def find_copy(
    read: Callable[[int, int], bytes], *, start: int, size: int, version: Version, parent: UUID
) -> tuple[int, BttInfo] | None:
    """The copy of the info block of the arena at ``start``, and where it lies."""
    rest = size - start
    own = BttInfo.unpack(readable(read, start, size).ljust(INFO_SIZE, b"\0"))
    ends = (min(rest, ARENA_SIZE_MAX) // _PAGE * _PAGE, rest // _PAGE * _PAGE)
    for offset in (*(end - INFO_SIZE for end in ends), own.info2off):
        place = start + offset
        if 0 < offset <= rest - INFO_SIZE:
            info = good_info(read, place, start=start, size=size, version=version, parent=parent)
            if info is not None:
                return place, info
    return None


@dataclass(frozen=True, slots=True)
class Lane:
    """The newest exchange of a lane and where it stands."""

    number: int
    entry: LogEntry
    slot: int
    """Which of the four entries of the group holds it."""
    other: int
    """Where the next exchange goes."""

    @property
    def free_block(self) -> int:
        """The block that belongs to nobody."""
        return self.entry.old_map & MAP_MASK

    @property
    def finished(self) -> bool:
        """True for an entry of a fresh layout, which moved nothing."""
        return self.entry.old_map & MAP_MASK == self.entry.new_map & MAP_MASK


def log_groups(log: bytes) -> list[tuple[LogEntry, ...]]:
    """The entries of each lane's group, four a lane."""
    return [
        tuple(
            LogEntry.unpack(log[at : at + LogEntry.SIZE])
            for at in range(start, start + LOG_GROUP_SIZE, LogEntry.SIZE)
        )
        for start in range(0, len(log), LOG_GROUP_SIZE)
    ]


def log_pair(groups: Sequence[tuple[LogEntry, ...]]) -> tuple[tuple[int, int], list[Fault]]:
    """Which two of the four entries are in use, and which groups do not keep to it.

    The kernel lets the first group with two entries decide; where no group breaks the rule, that is
    what this gives, too. A log that was never written has the pair (0, 1).
    """
    judged = [(_pair_faults(groups, pair), pair) for pair in ((0, 1), (0, 2))]
    faults, pair = min(judged, key=lambda each: len(each[0]))
    return pair, faults


def _pair_faults(groups: Sequence[tuple[LogEntry, ...]], pair: tuple[int, int]) -> list[Fault]:
    faults = []
    for lane, group in enumerate(groups):
        used = tuple(place for place, entry in enumerate(group) if entry != _EMPTY)
        if pair[0] not in used or not set(used) <= set(pair):
            text = f"of lane {lane} are in use at {used}, the log uses {pair}"
            faults.append(Fault("BTT log", "entries", lane * LOG_GROUP_SIZE, text))
    return faults


_EMPTY: Final = LogEntry(lba=0, old_map=0, new_map=0, seq=0)


def lane_of(number: int, group: tuple[LogEntry, ...], pair: tuple[int, int]) -> Lane | Fault:
    """The newest entry of a group, or why there is none that can be trusted."""
    first, second = (group[place].seq for place in pair)
    ordered = {(1, 2), (2, 3), (3, 1)}
    if first == 0 or first > 3 or second > 3 or first == second:
        why = f"of lane {number} are {first} and {second}"
        return Fault("BTT log", "seq", number * LOG_GROUP_SIZE, why)
    if second == 0 and first != 1:
        why = f"of lane {number} are {first} and 0; an entry that is alone has 1"
        return Fault("BTT log", "seq", number * LOG_GROUP_SIZE, why)
    newest = 1 if (first, second) in ordered else 0
    slot, other = pair[newest], pair[1 - newest]
    return Lane(number, group[slot], slot, other)


def follow_log(lanes: Iterable[Lane], entry_of: Callable[[int], int]) -> dict[int, list[Lane]]:
    """The writes that are in the log and not in the map: for each such sector its lanes, in the
    order of the writes. ``entry_of`` gives the map entry of a sector.

    A log that kept more than the map did, as a host that writes pages back in any order may leave,
    can have several for one sector: each takes up the block that the one before it left.
    """
    moves = {(lane.entry.lba, lane.free_block): lane for lane in lanes if not lane.finished}
    found: dict[int, list[Lane]] = {}
    for lba in sorted({lba for lba, _ in moves}):
        entry = entry_of(lba)
        block = entry & MAP_MASK if entry & NORMAL else lba
        while (lane := moves.pop((lba, block), None)) is not None:
            found.setdefault(lba, []).append(lane)
            block = lane.entry.new_map & MAP_MASK
    return found
