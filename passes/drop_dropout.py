"""qat: dropout out; what follows is inference only."""

from __future__ import annotations

from torch import fx

from ..op import op_of, tensor_args
from ..pipeline import graph_pass


@graph_pass("qat")
def drop_dropout(gm: fx.GraphModule) -> None:
    """dropout(x) -> x"""
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is not None and op.name == "dropout":
            node.replace_all_uses_with(tensor_args(node)[0])
            gm.graph.erase_node(node)
