"""Tables of what the compiler did: sites, islands, sizes. Text only; the command line prints them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx

from .graph import moves_data, plumbing, site_of
from .op import op_of


def columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table with aligned columns; numbers to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    numeric = [all(isinstance(r[i], (int, float)) for r in rows) and bool(rows) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def site_rows(gm: fx.GraphModule) -> list[tuple[str, str, str, str]]:
    """(site, op, what it got, why) for every site that computes on the model's values."""
    hidden = plumbing(gm.graph)
    rows = []
    for node in gm.graph.nodes:
        op = op_of(node)
        if op is None or node in hidden or moves_data(node) or "decision" not in node.meta:
            continue
        rows.append((site_of(node), op.name, *node.meta["decision"]))
    return rows


def site_table(gm: fx.GraphModule) -> str:
    """Every site of a qat graph: what it got and by which rule. Sites without a quantizer say why.

    ``float``: computed in floats. ``integer``: on the integers that come in, nothing is rounded there. ``none``: not
    there at inference.
    """
    rows = site_rows(gm)
    count = Counter(got if got in ("float", "integer", "none") else "quantized" for *_, got, _ in rows)
    text = f"{count['quantized']} of {len(rows)} sites have quantizers, {count['integer']} compute on integers without "
    text += f"one, {count['float']} stay float, {count['none']} are gone at inference"
    return columns(("site", "op", "got", "why"), rows) + "\n" + text
