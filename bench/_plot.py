"""Lines over time as an SVG, written by hand: what a report can link without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 840, 170, 90, 34, 50
COLOURS = ("#1f6fb4", "#c2571a", "#3a8a3a", "#7a4fa3")
TICKS = 4


@dataclass(frozen=True)
class Panel:
    """One quantity over time."""

    title: str
    values: Sequence[float]


def draw(path: Path, title: str, seconds: Sequence[float], panels: Sequence[Panel]) -> None:
    """Write the panels below each other, one scale each, beginning at zero."""
    total = TOP + len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEFT + 30}" height="{total}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        top = TOP + number * (HEIGHT + GAP) + 14
        parts += _panel(panel, seconds, top, COLOURS[number % len(COLOURS)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _panel(panel: Panel, seconds: Sequence[float], top: float, colour: str) -> list[str]:
    highest = max([*panel.values, 1e-9]) * 1.1
    longest = max([*seconds, 1e-9])

    def across(second: float) -> float:
        return LEFT + WIDTH * second / longest

    def down(value: float) -> float:
        return top + HEIGHT * (1 - value / highest)

    parts = [f'<text x="{LEFT}" y="{top - 6}">{escape(panel.title)}</text>']
    for tick in range(TICKS + 1):
        value, second = highest * tick / TICKS, longest * tick / TICKS
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{down(value):.1f}" y2="{down(value):.1f}" '
            'stroke="#dddddd"/>'
            f'<text x="{LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            f'<text x="{across(second):.1f}" y="{top + HEIGHT + 15:.1f}" text-anchor="middle">'
            f"{second:.0f} s</text>"
        )
    points = " ".join(
        f"{across(second):.1f},{down(value):.1f}"
        for second, value in zip(seconds, panel.values, strict=True)
    )
    parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts
