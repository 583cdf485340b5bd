"""Where floats are left in an int graph. An integer-only graph has none but those of its results."""

from __future__ import annotations

import torch
from torch import fx

from .errors import LoweringError
from .graph import site_of
from .lowering import Island
from .op import op_of

SHOWN = 5


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node (of its first part, where it has several); int64 for a size; None where nothing says it.

    Nodes of a loaded program say it in their ``type`` (program_types.py), others in ``val``.
    """
    value = node.meta.get("val")
    if value is None:
        kind = node.meta.get("type", {})
        name = (kind.get("parts") or [kind])[0].get("dtype")
        return torch.int64 if name == "size" else getattr(torch, name) if name else None
    first = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(first, torch.Tensor):
        return first.dtype
    return torch.int64 if isinstance(first, (int, torch.SymInt)) else None


def float_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Inputs and calls with a float value, in graph order, but for a ``dequantize`` that only the output reads.

    Of constants only the scales of these ``dequantize`` may be floats; any other float constant has a float reader.
    """
    return [n for n in gm.graph.nodes if n.op not in ("get_attr", "output") and _makes_floats(n)]


def _makes_floats(node: fx.Node) -> bool:
    op, dtype = op_of(node), dtype_of(node)
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
        return False
    ends = op is not None and op.name == "dequantize" and all(u.op == "output" for u in node.users)
    return not ends


def islands_left(gm: fx.GraphModule, *, inputs: bool) -> list[Island]:
    """The listed islands and whatever else makes floats; float inputs count where ``inputs`` says so."""
    found = list(gm.meta.get("islands", ()))
    listed = {i.site for i in found}
    for node in float_nodes(gm):
        if site_of(node) not in listed and (inputs or node.op != "placeholder"):
            op = op_of(node)
            why = "positions or masks are made with floats" if op else "it comes in as floats"
            if op and op.name == "dequantize":
                why = "what reads it stays float"
            found.append(Island(site_of(node), op.name if op else node.op, why))
    return found


def refuse(islands: list[Island], what: str, do: str) -> None:
    """LoweringError that lists the first islands (site, op, reason) and counts the rest; nothing without any."""
    if not islands:
        return
    lines = [f"\n  {i.site} ({i.op}): {i.reason}" for i in islands[:SHOWN]]
    more = f"\n  and {len(islands) - SHOWN} more" if len(islands) > SHOWN else ""
    raise LoweringError(
        f"{len(islands)} ops stay in floats, and {what}:{''.join(lines)}{more}\n", where=islands[0].site, do=do
    )
