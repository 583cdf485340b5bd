"""Pictures of a family as plain SVG: what each weight loses at fewer bits, and what members cost and are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from .files import make_folder, write_text

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"
 font-family="Helvetica, Arial, sans-serif" font-size="12">
<rect width="{w}" height="{h}" fill="#ffffff"/>"""
INK, COLOURS = "#22303c", ("#1f6fb4", "#d9731a", "#2a8f4a", "#6b4fa0")
CELL, ROW, EDGE = 76, 18, 20  # pixels
PLOT = (560, 340, 70, 36)  # width, height, left, top


@dataclass(frozen=True)
class Points:
    """One series: ``at`` (x, y, half an error bar), ``labels`` of the points. ``joined``: a line goes through them."""

    name: str
    at: Sequence[tuple[float, float, float]]
    labels: Sequence[str] = ()
    joined: bool = True


def write(text: str, path: Path) -> Path:
    make_folder(path.parent)
    write_text(path, text)
    return path


def sensitivity(names: Sequence[str], widths: Sequence[int], values: Sequence[Sequence[float]], title: str) -> str:
    """A row for each weight, a cell for each width, darker where more is lost (logarithmic); ``values`` [S, W]."""
    left = EDGE + max(len(n) for n in names) * 6.6
    wide, high = left + CELL * len(widths) + EDGE, 66 + ROW * len(names) + EDGE
    top = max((v for row in values for v in row), default=0.0)
    parts = [HEAD.format(w=int(wide), h=high), _text(EDGE, 24, title, bold=True)]
    parts += [_text(left + CELL * (k + 0.5), 52, f"{b} bits", middle=True) for k, b in enumerate(widths)]
    for i, (name, row) in enumerate(zip(names, values)):
        y = 60 + ROW * i
        parts.append(_text(EDGE, y + 13, name))
        for k, value in enumerate(row):
            shade = _shade(value, top)
            ink = "#ffffff" if shade > 0.6 else INK
            size = f'width="{CELL - 2}" height="{ROW - 2}"'
            parts.append(f'<rect x="{left + CELL * k:.1f}" y="{y}" {size} fill="{_blend(shade)}"/>')
            parts.append(_text(left + CELL * (k + 0.5) - 1, y + 13, _short(value), middle=True, ink=ink))
    return "\n".join([*parts, "</svg>\n"])


def _shade(value: float, top: float) -> float:
    """0 for nothing (or a gain), 1 for the most; three decades in between."""
    return max(0.0, 1 + math.log10(value / top) / 3) if value > 0 and top > 0 else 0.0


def _blend(shade: float) -> str:
    low, high = (247, 250, 253), (165, 45, 20)
    return "#" + "".join(f"{round(a + (b - a) * shade):02x}" for a, b in zip(low, high))


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.2f}"


def scatter(series: Sequence[Points], *, title: str, x: str, y: str) -> str:
    """Points with error bars over linear axes, a legend below."""
    wide, high, left, top = PLOT
    flat = [p for s in series for p in s.at]
    xs = _range([p[0] for p in flat], low=0.0)
    ys = _range([v for p in flat for v in (p[1] - p[2], p[1] + p[2])])
    parts = [HEAD.format(w=left + wide + EDGE, h=top + high + 60 + 18 * len(series)), _text(left, 22, title, bold=True)]

    def place(a: float, b: float) -> tuple[float, float]:
        return left + wide * (a - xs[0]) / (xs[1] - xs[0]), top + high * (1 - (b - ys[0]) / (ys[1] - ys[0]))

    for value in _ticks(*xs):
        at, _ = place(value, ys[0])
        parts += [_line(at, top, at, top + high, "#e3e8ee"), _text(at, top + high + 16, f"{value:g}", middle=True)]
    for value in _ticks(*ys):
        _, at = place(xs[0], value)
        parts += [_line(left, at, left + wide, at, "#e3e8ee"), _text(left - 40, at + 4, f"{value:g}")]
    parts += [_text(left + wide / 2, top + high + 34, x, middle=True), _text(EDGE, top - 6, y)]
    for i, one in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        spots = [place(a, b) for a, b, _ in one.at]
        if one.joined:
            parts += [_line(*p, *q, colour) for p, q in zip(spots, spots[1:])]
        for k, ((a, b, error), (px, py)) in enumerate(zip(one.at, spots)):
            if error:
                parts.append(_line(px, place(a, b - error)[1], px, place(a, b + error)[1], colour))
            label = one.labels[k] if k < len(one.labels) else ""
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
            parts.append(_text(px + 6, py - 6, label))
        at = top + high + 54 + 18 * i
        parts += [f'<circle cx="{left + 6}" cy="{at - 4}" r="4" fill="{colour}"/>', _text(left + 16, at, one.name)]
    return "\n".join([*parts, "</svg>\n"])


def _range(values: Sequence[float], low: float | None = None) -> tuple[float, float]:
    a, b = min(values) if low is None else low, max(values)
    room = (b - a) * 0.06 or 1.0
    return (a - room if low is None else a), b + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, four to nine of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) < 9)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, *, bold: bool = False, middle: bool = False, ink: str = INK) -> str:
    style = (' font-weight="bold"' if bold else "") + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}"{style}>{escape(text)}</text>'
