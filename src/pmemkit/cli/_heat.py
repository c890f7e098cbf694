"""Counts of blocks as pictures: a heat map for the terminal, and an SVG.

What this does not do: count.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

__all__ = ["fold", "heat_lines", "heat_svg"]

_SHADES = " ░▒▓█"
_ASCII = " .:*#"
_CELL = 10
_MARGIN = 40


def fold(counts: Sequence[int], most: int) -> list[float]:
    """The means of at most ``most`` runs of blocks of one length; the last one may be shorter."""
    run = max(1, -(-len(counts) // most))
    parts = (counts[at : at + run] for at in range(0, len(counts), run))
    return [sum(part) / len(part) for part in parts]


def _level(value: float, top: float, levels: int) -> int:
    """0 for nothing, and from 1 on by the share of the hottest."""
    if value <= 0:
        return 0
    return min(levels - 1, 1 + int(value / top * (levels - 1)))


def heat_lines(counts: Sequence[int], width: int, *, rows: int = 16, ascii_only: bool) -> list[str]:
    """Rows of shades, blocks from left to right and down."""
    shades = _ASCII if ascii_only else _SHADES
    cells = fold(counts, width * rows)
    top = max(cells, default=0.0)
    text = "".join(shades[_level(each, top, len(shades))] for each in cells)
    return [text[at : at + width] for at in range(0, len(text), width)]


def heat_svg(counts: Sequence[int], title: str, *, columns: int = 64) -> str:
    """A picture of the same, one square a run of blocks; white is nothing, red the hottest."""
    cells = fold(counts, columns * columns)
    top = max(cells, default=0.0)
    rows = -(-len(cells) // columns)
    width, height = columns * _CELL + 2 * _MARGIN, rows * _CELL + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN // 2}" font-family="sans-serif">{escape(title)}</text>',
    ]
    for number, value in enumerate(cells):
        x, y = number % columns * _CELL + _MARGIN, number // columns * _CELL + _MARGIN
        shade = 255 - round(255 * value / top) if top else 255
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" '
            f'fill="rgb(255,{shade},{shade})" stroke="#ddd"/>'
        )
    return "\n".join([*parts, "</svg>", ""])
