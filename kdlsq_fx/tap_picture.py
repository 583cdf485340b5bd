"""A tap plan as a picture: both networks side by side, inputs at the bottom, and the taps between them. Plain SVG."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

from .errors import ConfigError
from .files import make_folder, write_text
from .tap_plan import Side, TapPlan, counted
from .taps import Tap

WIDE, BOX, ROW, GAP, TOP, EDGE = 200, 24, 46, 320, 92, 24  # pixels
LETTER = 8  # the widest that a letter of a title is on average, in the fonts that stand in for Helvetica
COLOURS = {"hidden": "#1f6fb4", "attention": "#d9731a", "pooled": "#2a8f4a", "logits": "#6b4fa0"}
DASHES = {"hidden": "", "attention": "6 4", "pooled": "2 4", "logits": "10 4"}
SHIFT = {"hidden": -5, "attention": 5, "pooled": 0, "logits": 0}  # so that two taps of one layer are two lines
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"
 font-family="Helvetica, Arial, sans-serif" font-size="13">
<rect width="{w}" height="{h}" fill="#ffffff"/>"""


def draw(plan: TapPlan, path: Path) -> Path:
    """Write the picture; CheckpointError where it cannot be written, ConfigError for a name of another format."""
    if path.suffix.lower() != ".svg":
        raise ConfigError("a plan is drawn as SVG", where=str(path), do="give a name that ends in .svg")
    make_folder(path.parent)
    write_text(path, picture(plan))
    return path


def picture(plan: TapPlan) -> str:
    """The SVG. Layer l of a network stands at l / (number of its layers) of the height, so the uniform map is level."""
    tall = ROW * max(plan.student.layers, plan.teacher.layers, 1)
    columns = [
        Column(side, [(t.student, t.teacher)[k] for t in plan.taps], EDGE + k * (WIDE + GAP), tall)
        for k, side in enumerate((plan.student, plan.teacher))
    ]
    legend = _legend(plan)
    foot = max(c.bottom for c in columns) + 34
    titles = [(c.left, f"{name}: {c.side.name or 'a module'}") for name, c in _named(columns)]
    ends = [x + LETTER * len(text) for x, text in (*titles, *((EDGE + 50, line) for _, line in legend))]
    width, height = EDGE + max(columns[1].right, *ends), foot + 20 * len(legend)
    parts = [HEAD.format(w=width, h=height)]
    parts += [_text(x, 22, title, bold=True) for x, title in titles]
    parts += [_text(c.left, 40, c.side.size()) for c in columns]
    parts += [line for tap in plan.taps for line in _tap(tap, *columns)]
    if plan.outputs:
        y = columns[0].head
        parts.append(_line(columns[0].right, y, columns[1].left, y, "logits"))
    for column in columns:
        parts += column.boxes(", ".join(plan.outputs or ()))
    for i, (kind, line) in enumerate(legend):
        y = foot + 20 * i
        if kind:
            parts.append(_line(EDGE, y - 4, EDGE + 40, y - 4, kind))
        parts.append(_text(EDGE + (50 if kind else 0), y, line))
    return "\n".join([*parts, "</svg>\n"])


class Column:
    """One network: where its boxes stand. Sites outside the layers get boxes of their own below the inputs."""

    def __init__(self, side: Side, sites: list[str], left: int, tall: int) -> None:
        self.side, self.left, self.right, self.tall = side, left, left + WIDE, tall
        self.tapped = {side.layer_of(s) for s in sites}
        self.others = sorted({s for s in sites if side.layer_of(s) is None})
        self.head = TOP - 22
        self.bottom = TOP + tall + BOX + (BOX + 10) * len(self.others)

    def y(self, layer: int) -> float:
        return TOP + BOX + self.tall * (1 - layer / max(self.side.layers, 1))

    def y_of(self, site: str) -> float:
        layer = self.side.layer_of(site)
        return self.y(layer) if layer is not None else TOP + self.tall + 2 * BOX + (BOX + 10) * self.others.index(site)

    def boxes(self, outputs: str) -> list[str]:
        found = [self._box(self.y(n), f"layer {n}" if n else "embeddings", n in self.tapped) for n in self._layers()]
        found += [self._box(self.y_of(s), s, True) for s in self.others]
        if outputs:
            found.append(self._box(self.head, outputs, True))
        return [part for box in found for part in box]

    def _layers(self) -> range:
        return range(self.side.layers + 1 if self.side.hidden or self.side.attention else 0)

    def _box(self, y: float, label: str, tapped: bool) -> list[str]:
        fill, ink = ("#e4edf6", "#33475b") if tapped else ("#ffffff", "#b8c0c8")
        rect = (
            f'<rect x="{self.left}" y="{y - BOX / 2:.1f}" width="{WIDE}" height="{BOX}" rx="4" fill="{fill}" '
            f'stroke="{ink}"/>'
        )
        short = label if len(label) < 30 else "…" + label[-28:]
        return [rect, _text(self.left + WIDE / 2, y + 4.5, short, middle=True, ink=ink)]


def _named(columns: list[Column]) -> list[tuple[str, Column]]:
    return list(zip(("student", "teacher"), columns))


def _tap(tap: Tap, student: Column, teacher: Column) -> list[str]:
    a, b = student.y_of(tap.student) + SHIFT[tap.loss], teacher.y_of(tap.teacher) + SHIFT[tap.loss]
    line = _line(student.right, a, teacher.left, b, tap.loss, title=f"{tap.student} <- {tap.teacher}")
    if not tap.projection:
        return [line]
    x, y = student.right + 24, a + (b - a) * 24 / GAP
    square = f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{COLOURS[tap.loss]}"/>'
    return [line, square]


def _legend(plan: TapPlan) -> list[tuple[str, str]]:
    """(kind of line, text) rows: the losses, the projections, the layers, the notes."""
    told = {
        "hidden": "hidden states", "attention": "attention scores", "pooled": "pooled states", "logits": "logits",
    }  # fmt: skip
    counts = Counter[str](t.loss for t in plan.taps)
    rows = [(kind, f"{text}: {counted(counts[kind], 'tap')}") for kind, text in told.items() if counts[kind]]
    if plan.outputs:
        rows.append(("logits", f"outputs: {', '.join(plan.outputs)}"))
    for name, (a, b) in plan.projections.items():
        count = sum(t.projection == name for t in plan.taps)
        rows.append(("", f"■ projection {name}: {a} → {b}, trained with the student, for {counted(count, 'tap')}"))
    if plan.layers():
        rows.append(("", f"layers: {plan.pairs()}"))
    if plan.teacher_inputs == "own":
        rows.append(("", "each side reads tokens of its own"))
    return [*rows, *(("", note) for note in plan.notes)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> str:
    dash = f' stroke-dasharray="{DASHES[kind]}"' if DASHES[kind] else ""
    told = f"<title>{escape(title)}</title>" if title else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{COLOURS[kind]}" stroke-width="2"{dash}>{told}</line>'


def _text(x: float, y: float, text: str, *, bold: bool = False, middle: bool = False, ink: str = "#22303c") -> str:
    style = (' font-weight="bold"' if bold else "") + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}"{style}>{escape(text)}</text>'
