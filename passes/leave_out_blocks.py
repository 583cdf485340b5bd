"""float: blocks that the qconfig leaves out go."""

from __future__ import annotations

from torch import fx

from ..depth import leave_out
from ..graph import drop_unused
from ..pipeline import graph_pass


@graph_pass("float")
def leave_out_blocks(gm: fx.GraphModule) -> None:
    """block(x) -> x for the blocks of ``qconfig.left_out``; their parameters go too"""
    leave_out(gm, gm.meta["qconfig"].left_out)
    drop_unused(gm)
