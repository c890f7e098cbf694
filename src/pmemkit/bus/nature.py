"""What a region physically is: storage or memory, with the evidence for it.

Invariants:
1. Nothing is guessed: what is not known to be memory is storage, because using memory as storage
   loses nothing and using storage as memory wears it out.
2. The verdict follows from the strongest evidence alone; every other piece is kept and shown.
3. It is a pure function of the evidence.

Strength, strongest first: what the owner declares in a machine file; wear that the device reports
or the owner states; what the firmware calls the range. Latency and bandwidth decide nothing.

What this does not do: decide how a region is used; policy leans on the verdict.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pmemkit.bus.image import ImageRegion
from pmemkit.units import format_size

__all__ = ["Evidence", "Nature", "Strength", "Verdict", "image_evidence", "judge"]

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """The nature of a region, and why."""

    nature: Nature
    because: str
    evidence: tuple[Evidence, ...]
    would_change: tuple[str, ...]
    """What would lead to the other verdict."""


def judge(evidence: Iterable[Evidence]) -> Verdict:
    """The verdict that the evidence allows. Of equals that disagree, storage wins."""
    found = tuple(sorted(evidence, key=lambda each: _ORDER.index(each.strength)))
    for strength in _ORDER[:-1]:
        here = [each for each in found if each.strength == strength and each.says is not None]
        if not here:
            continue
        telling = next((each for each in here if each.says == "storage"), here[0])
        nature: Nature = "memory" if telling.says == "memory" else "storage"
        because = f"{telling.source} says {telling.value}"
        return Verdict(nature, because, found, _changes(strength, nature))
    because = "nothing is known of it, so it is taken for storage"
    return Verdict("storage", because, found, _changes("hint", "storage"))


def _changes(strength: Strength, nature: Nature) -> tuple[str, ...]:
    other = "memory" if nature == "storage" else "storage"
    if strength == "declared":
        return (f'nature = "{other}" in the machine file',)
    changes = [f'nature = "{other}" in a machine file']
    if strength == "firmware" and nature == "memory":
        changes.append("endurance in a machine file, or a device that reports wear")
    if strength == "hint":
        changes.append("firmware that describes the range as volatile, or as CXL ram")
    return tuple(changes)


def image_evidence(region: ImageRegion) -> Sequence[Evidence]:
    """What a machine file says of the dimms of a region."""
    found = []
    for dimm in region.dimms:
        spec, place = dimm.spec, f"machine file, {dimm.name}"
        declared: Nature | None = None
        if spec.nature in ("storage", "memory"):
            declared = "memory" if spec.nature == "memory" else "storage"
            found.append(Evidence(place, f"nature {spec.nature}", declared, "declared"))
        if spec.endurance is not None:
            text = f"endurance {format_size(spec.endurance)}"
            found.append(Evidence(place, text, "storage", "wear"))
        if spec.label_size:
            text = f"a label area of {format_size(spec.label_size)}"
            found.append(Evidence(f"image of {dimm.name}", text, None, "hint"))
    return found
