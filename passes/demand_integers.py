"""int: refuse a graph in which floats are left, where integers only were promised."""

from __future__ import annotations

from torch import fx

from ..integer_only import islands_left, refuse
from ..pipeline import graph_pass


@graph_pass("int")
def demand_integers(gm: fx.GraphModule) -> None:
    """int -> the same graph; LoweringError with the float ops (site, op, reason) where there are any

    A float input, which a ``quantize`` reads, is none.
    """
    refuse(
        islands_left(gm, inputs=False),
        "this qconfig promises integers only",
        "pass allow_islands=True (kdlsq-fx convert --allow-islands) to keep them in float, or give them a rule",
    )
