"""int: refuse a graph in which floats are left, where integers only were promised."""

from __future__ import annotations

from torch import fx

from ..errors import LoweringError
from ..graph import site_of
from ..integer_only import float_nodes
from ..lowering import Island
from ..op import op_of
from ..pipeline import graph_pass

SHOWN = 5


@graph_pass("int")
def demand_integers(gm: fx.GraphModule) -> None:
    """int -> the same graph; LoweringError with the float ops (site, op, reason) where there are any

    A float input, which a ``quantize`` reads, is none.
    """
    islands = list(gm.meta["islands"])
    listed = {i.site for i in islands}
    rest = [n for n in float_nodes(gm) if n.op != "placeholder" and site_of(n) not in listed]
    islands += [
        Island(site_of(n), op.name, "positions or masks are made with floats")
        for n in rest
        if (op := op_of(n)) is not None
    ]
    if not islands:
        return
    lines = [f"\n  {i.site} ({i.op}): {i.reason}" for i in islands[:SHOWN]]
    more = f"\n  and {len(islands) - SHOWN} more" if len(islands) > SHOWN else ""
    raise LoweringError(
        f"{len(islands)} ops stay in floats, and this qconfig promises integers only:{''.join(lines)}{more}\n",
        where=islands[0].site,
        do="pass allow_islands=True (kdlsq-fx convert --allow-islands) to keep them in float, or give them a rule",
    )
