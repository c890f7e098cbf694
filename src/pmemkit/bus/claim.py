"""What claims a namespace: the info block on it, as the kernel probes for one.

The order is BTT, PFN, DAX, raw. The label's abstraction GUID lets only one of them through; none at
all, as under version 1.1 or without a label, lets all. A block that is there but cannot be used
leaves the namespace disabled; one that is damaged, or made for another namespace, counts for blank.

What this does not do: open arenas; :mod:`pmemkit.storage.btt_reader` does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from pmemkit.bus.model import Map, Mode
from pmemkit.formats import btt, guids
from pmemkit.formats.infoblock import INFO_OFFSET, DaxInfo, Info, PfnInfo, probe
from pmemkit.formats.labels import LabelV2
from pmemkit.formats.layout import Fault

__all__ = ["Claim", "probe_claim"]

_ANY = (None, guids.NULL)
_BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """How a namespace is used. Sizes and offsets are bytes."""

    mode: Mode
    enabled: bool = True
    """False where the kernel would leave the namespace disabled."""
    size: int | None = None
    """What a user gets: data sectors, or data pages. ``None``: all of the namespace."""
    offset: int = 0
    """Where the data begin in the namespace (fsdax and devdax)."""
    uuid: UUID | None = None
    """Of the info block."""
    map: Map | None = None
    align: int | None = None
    sector_size: int | None = None
    version: tuple[int, int] | None = None
    """Of the BTT layout."""
    info: Info | btt.BttInfo | None = field(default=None, repr=False)
    faults: tuple[Fault, ...] = ()
    """Why a block that looks like one is not used."""

    @classmethod
    def of_label(cls, abstraction: UUID | None) -> "Claim":
        """What the label alone tells, where the namespace cannot be read."""
        modes: dict[UUID | None, Mode] = {
            guids.BTT: "sector",
            guids.BTT2: "sector",
            guids.PFN: "fsdax",
            guids.DAX: "devdax",
            guids.NULL: "raw",
        }
        return cls(mode=modes.get(abstraction, "unknown"))


def probe_claim(
    read: Callable[[int, int], bytes],
    *,
    size: int,
    start: int,
    parent: UUID,
    abstraction: UUID | None,
) -> Claim:
    """Finds what claims ``size`` bytes at physical address ``start``, which ``read`` reads."""
    faults: list[Fault] = []
    if abstraction is not None and abstraction not in guids.ABSTRACTIONS:
        text = f"is {abstraction}, none of {', '.join(guids.ABSTRACTIONS.values())}"
        return Claim(mode="raw", faults=(LabelV2.fault("abstraction_guid", text),))
    named = abstraction not in _ANY
    if abstraction in (*_ANY, guids.BTT, guids.BTT2):
        version: Literal["1.1", "2.0"] = "2.0" if abstraction == guids.BTT2 else "1.1"
        found = btt.probe(read, size=size, version=version, parent=parent)
        if found.verdict != "absent" and found.info is not None:
            return Claim(
                mode="sector" if found.verdict == "valid" else "raw",
                enabled=found.verdict == "valid",
                size=found.size,
                uuid=found.info.uuid,
                sector_size=found.sector_size,
                version=(found.info.major, found.info.minor),
                info=found.info,
                faults=found.faults,
            )
        faults += _telling(found.faults, named)
    block = read(INFO_OFFSET, _BLOCK) if size >= INFO_OFFSET + _BLOCK else b""
    kinds: tuple[tuple[UUID, Mode, type[PfnInfo] | type[DaxInfo]], ...] = (
        (guids.PFN, "fsdax", PfnInfo),
        (guids.DAX, "devdax", DaxInfo),
    )
    for guid, mode, layout in kinds:
        if abstraction not in (*_ANY, guid) or len(block) < _BLOCK:
            continue
        judged = probe(block, layout, size=size, start=start, parent=parent)
        if judged.info is None:
            faults += _telling(judged.faults, named)
            continue
        if judged.verdict == "unusable":
            return Claim(mode="raw", enabled=False, info=judged.info, faults=judged.faults)
        offset, length = judged.info.data_range(size)
        where = judged.info.map
        return Claim(
            mode=mode,
            size=length,
            offset=offset,
            uuid=judged.info.uuid,
            map=where if where != "unknown" else None,
            align=judged.info.alignment,
            info=judged.info,
        )
    return Claim(mode="raw", faults=tuple(faults))


def _telling(faults: Iterable[Fault], named: bool) -> list[Fault]:
    """Faults of what is more than a blank place: a wrong signature alone tells nothing, unless the
    label named the kind of block that must be there."""
    return [fault for fault in faults if named or fault.field != "signature"]
