"""What a region physically is: storage or memory, with the evidence for it.

Invariants:
1. Nothing is guessed: what is not known to be memory is storage, because using memory as storage
   loses nothing and using storage as memory wears it out.
2. The verdict follows from the strongest evidence alone; every other piece is kept and shown. Of
   equals that disagree, storage wins.
3. It is a pure function of the evidence, in whatever order that comes.
4. A region is memory by declaration only where every dimm of it is declared memory.

Strength, strongest first: what the owner declares in a machine file; wear that the device reports
or the owner states; what the firmware calls the range. Latency and bandwidth decide nothing.

What this does not do: decide how a region is used; policy leans on the verdict.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pmemkit.bus.image import ImageRegion
from pmemkit.units import format_size

__all__ = [
    "Evidence",
    "Nature",
    "Statement",
    "Strength",
    "Verdict",
    "image_evidence",
    "judge",
    "stated_evidence",
]

Nature = Literal["storage", "memory"]
Strength = Literal["declared", "wear", "firmware", "hint"]

_ORDER: Final[tuple[Strength, ...]] = ("declared", "wear", "firmware", "hint")


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation."""

    source: str
    """Where it was read: a file, a table of the firmware, a command."""
    value: str
    says: Nature | None
    """What it speaks for; ``None``: nothing, it is only shown."""
    strength: Strength
    otherwise: str | None = None
    """What would have this piece speak for the other nature, where anything would."""
    endurance: int | None = None
    """Bytes that may be written to the whole region, as far as this piece goes."""
    life_used: int | None = None
    """Percent of the life of the device; above 100: past the life that it was rated for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The nature of a region, and why."""

    nature: Nature
    because: str
    evidence: tuple[Evidence, ...]
    """Strongest first."""
    would_change: tuple[str, ...]
    """What would lead to the other verdict."""
    endurance: int | None = None
    """Bytes that may be written to it in its life; ``None``: not known, or without end."""
    wears: bool = False
    """True where wear is known to matter, from the owner or from the device."""
    life_used: int | None = None
    """Percent, of the dimm that used most."""


def judge(evidence: Iterable[Evidence], *, declare: str = "a machine file") -> Verdict:
    """The verdict that the evidence allows. ``declare``: where the owner would declare it."""
    found = tuple(sorted(evidence, key=_key))
    nature, because, changes = _decide(found, declare)
    endurance = [each.endurance for each in found if each.endurance is not None]
    life = [each.life_used for each in found if each.life_used is not None]
    return Verdict(
        nature,
        because,
        found,
        changes,
        endurance=min(endurance, default=None),
        wears=any(each.strength == "wear" and each.says == "storage" for each in found),
        life_used=max(life, default=None),
    )


def _key(each: Evidence) -> tuple[int, str, str, str]:
    """Of all that is in it, so that only equal pieces may change places."""
    return _ORDER.index(each.strength), each.source, each.value, repr(each)


def _decide(
    found: Sequence[Evidence], declare: str, deep: bool = True
) -> tuple[Nature, str, tuple[str, ...]]:
    """Nature, reason, and what would change it; ``deep``: also what would be without the piece
    that decides."""
    for strength in _ORDER[:-1]:
        here = [each for each in found if each.strength == strength and each.says is not None]
        if not here:
            continue
        nature: Nature = "storage" if any(each.says == "storage" for each in here) else "memory"
        telling = [each for each in here if each.says == nature]
        against = [each.source for each in here if each.says != nature]
        because = _said(telling)
        if against:
            because += f" ({' and '.join(against)}: memory, but of equals storage wins)"
        return nature, because, tuple(_changes(found, telling, declare) if deep else ())
    because = "its nature is not known, so it is taken for storage"
    ways = [each.otherwise for each in found if each.otherwise is not None]
    declared = f'nature = "memory" in {declare}'
    return "storage", because, (declared, *dict.fromkeys(ways), *_volatile(ways))


def _volatile(ways: Sequence[str]) -> list[str]:
    """For a region of which nothing says what would have it memory."""
    return [] if ways else ["firmware that describes the range as volatile, or as CXL ram"]


def _said(telling: Sequence[Evidence]) -> str:
    """What decides, in words; of many the first two."""
    said = [f"{each.source} says {each.value}" for each in telling]
    more = f", and {len(said) - 2} more" if len(said) > 2 else ""
    return " and ".join(said[:2]) + more


def _changes(found: Sequence[Evidence], telling: Sequence[Evidence], declare: str) -> list[str]:
    """What would lead to the other verdict, where ``telling`` decided."""
    strength, nature = telling[0].strength, telling[0].says
    other: Nature = "memory" if nature == "storage" else "storage"
    sources = list(dict.fromkeys(each.source for each in telling))
    where = " and ".join(sources) if strength == "declared" else declare
    changes = [f'nature = "{other}" in {where}']
    changes += dict.fromkeys(each.otherwise for each in telling if each.otherwise)
    if strength in ("declared", "wear"):
        rest = [each for each in found if each.source not in sources]
        instead, because, _ = _decide(rest, declare, deep=False)
        if instead == other:
            changes.append(f"no word of it from {' and '.join(sources)} (then {because})")
    elif nature == "memory":
        changes.append(f"endurance in {declare}, or a device that reports wear")
    return changes


# --- what owners state ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statement:
    """What an owner says of a dimm, or of a whole region."""

    source: str
    nature: Nature | None = None
    endurance: int | None = None
    """Bytes that may be written to the dimm, or region, in its life."""


def stated_evidence(dimms: Sequence[Sequence[Statement]]) -> list[Evidence]:
    """What is stated of the dimms of a region: for each dimm, what is said of it.

    Writes spread evenly over the dimms of a set, so the region lasts as many times what its weakest
    dimm lasts as there are dimms.
    """
    silent = [number for number, said in enumerate(dimms) if not any(each.nature for each in said)]
    found = []
    for each in (each for said in dimms for each in said):
        if each.nature is not None:
            partly = each.nature == "memory" and silent
            value = f"nature {each.nature}"
            if partly:
                value += f", but nothing is said of {len(silent)} of {len(dimms)} dimms"
            says = None if partly else each.nature
            found.append(Evidence(each.source, value, says, "declared"))
        if each.endurance is not None:
            text = f"endurance {format_size(each.endurance)}"
            whole = each.endurance * len(dimms)
            found.append(Evidence(each.source, text, "storage", "wear", endurance=whole))
    return found


def image_evidence(region: ImageRegion) -> Sequence[Evidence]:
    """What a machine file says of the dimms of a region."""
    statements, hints = [], []
    for dimm in region.dimms:
        spec, place = dimm.spec, f"machine file, {dimm.name}"
        nature: Nature | None = None
        if spec.nature in ("storage", "memory"):
            nature = "memory" if spec.nature == "memory" else "storage"
        statements.append([Statement(place, nature, spec.endurance)])
        if spec.label_size:
            text = f"a label area of {format_size(spec.label_size)}"
            hints.append(Evidence(f"image of {dimm.name}", text, None, "hint"))
        if spec.unarmed:
            hints.append(Evidence(place, "unarmed: a kernel has it read-only", None, "hint"))
    return [*stated_evidence(statements), *hints]
