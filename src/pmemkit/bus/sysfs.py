"""Devices in sysfs: attributes as text and numbers, every one of them possibly missing or odd.

What this does not do: trust a value. What cannot be read, or is no number, is ``None``.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Node", "by_number", "devices"]

_NUMBER = re.compile(r"\d+")
_TEXT_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Node:
    """One device directory."""

    name: str
    place: Path

    def text(self, attribute: str) -> str | None:
        """The attribute without white space around it; ``None`` where there is nothing."""
        try:
            with (self.place / attribute).open("rb") as file:
                return file.read(_TEXT_SIZE).decode("utf-8").strip() or None
        except (OSError, ValueError):
            return None

    def number(self, attribute: str, base: int = 0) -> int | None:
        """A number that is not negative, or the -1 and -2 of the kernel; ``base`` as `int` has
        it."""
        text = self.text(attribute)
        try:
            return None if text is None or len(text) > 40 else int(text, base)
        except ValueError:
            return None

    def size(self, attribute: str, base: int = 0) -> int:
        """A count of bytes; 0 where there is none, or a senseless one."""
        return max(0, self.number(attribute, base) or 0)

    def chosen(self, attribute: str) -> int | None:
        """The number in brackets of a list of choices, or the only number."""
        text = self.text(attribute) or ""
        found = re.search(r"\[(\d{1,19})\]", text) or re.fullmatch(r"(\d{1,19})", text)
        return int(found[1]) if found else None

    def node(self, attribute: str = "numa_node") -> int | None:
        """A NUMA node; the kernel's -1 is none."""
        number = self.number(attribute)
        return number if number is not None and number >= 0 else None

    def state(self) -> Literal["disabled"] | None:
        """Whether no driver has it."""
        return None if (self.place / "driver").exists() else "disabled"

    def driver(self) -> str | None:
        """The driver that has it."""
        link = self.place / "driver"
        return link.resolve().name if link.exists() else None

    def below(self, pattern: str) -> list["Node"]:
        """Directories in it whose whole names match, in the order of their numbers."""
        try:
            places = [place for place in self.place.iterdir() if re.fullmatch(pattern, place.name)]
        except OSError:
            return []
        nodes = [Node(place.name, place.resolve()) for place in places if place.is_dir()]
        return sorted(nodes, key=by_number)

    def above(self, pattern: str) -> "Node | None":
        """The nearest directory that it is in whose whole name matches."""
        for place in self.place.parents:
            if re.fullmatch(pattern, place.name):
                return Node(place.name, place)
        return None


def by_number(node: Node) -> list[int]:
    """A sort key: the numbers in its name, as numbers."""
    return [int(number) for number in _NUMBER.findall(node.name)]


def devices(sysfs: str | Path, bus: str, pattern: str = ".*") -> list[Node]:
    """The devices of a bus whose whole names match, in the order of their numbers."""
    try:
        places = [
            place
            for place in (Path(sysfs) / "bus" / bus / "devices").iterdir()
            if re.fullmatch(pattern, place.name)
        ]
    except OSError:
        return []
    return sorted((Node(place.name, place.resolve()) for place in places), key=by_number)
