"""The repeated blocks of an encoder by its data flow alone, for graphs whose module paths say nothing.

Between two blocks everything that depends on the tokens passes through one value: a dominator of the outputs in the
graph of token-dependent floats. The last such value before a block's attention enters the block. Where the last block
ends its inside tells: it is isomorphic to the inside of the block before it, operand ports included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx

from .graph import output_args
from .op import op_of
from .views import View, view_of

SOURCE, SINK = "tokens", "outputs"
SHAPE_ONLY = ("arange", "full", "full_like", "new_ones", "new_zeros", "ones", "ones_like", "zeros", "zeros_like")


def states_between_blocks(gm: fx.GraphModule, attention: Iterable[fx.Node]) -> list[fx.Node]:
    """What enters the first block, then what leaves each block; ``attention``: a softmax of each. [] where the flow
    has no such values."""
    view = view_of(gm)
    flow = token_flow(gm, view)
    inside = [n for n in attention if n in flow]
    if not inside or SINK not in flow:
        return []
    above = nx.immediate_dominators(flow, SOURCE)
    chain = _upwards(above, SINK)[::-1]
    spine = {n: i for i, n in enumerate(chain)}
    entries = list(dict.fromkeys(next(n for n in _upwards(above, a) if n in spine) for a in inside))
    if SOURCE in entries:
        return []
    last = _end_of_last(view, flow, entries, chain[spine[entries[-1]] + 1 :])
    return [_behind_dropout(n) for n in (entries if last is None else [*entries, last])]


def token_flow(gm: fx.GraphModule, view: View) -> nx.DiGraph:
    """The float values that depend on the tokens, from SOURCE to SINK. Tables of positions, masks and weights are no
    part of it, even where every layer reads them. The operand's ports stand on the edge: ``x * x`` has one edge."""
    flow = nx.DiGraph()
    ids = _of_tokens(view)
    for node in view.nodes:
        if not _is_float(node) or node.meta.get("plumbing"):
            continue
        ports: dict[fx.Node, list[int]] = {}
        for port, operand in enumerate(view.operands[node]):
            if operand in flow:
                ports.setdefault(operand, []).append(port)
        for operand, at in ports.items():
            flow.add_edge(operand, node, ports=tuple(at))
        if not ports and (node in ids or any(o in ids for o in view.operands[node])):
            flow.add_edge(SOURCE, node, ports=())
    for value in output_args(gm.graph):
        known = _in_view(value, flow)
        if known is not None:
            flow.add_edge(known, SINK, ports=())
    return flow


def _of_tokens(view: View) -> set[fx.Node]:
    """Inputs that hold tokens (``input_ids``, or every float input), and the ids computed from them."""
    inputs = [n for n in view.nodes if n.op == "placeholder"]
    named = [n for n in inputs if str(n.target) in ("input_ids", "inputs_embeds")]
    found = set(named or [n for n in inputs if _is_float(n)])
    for node in view.nodes:
        whole = isinstance(node.meta.get("val"), torch.Tensor) and not _is_float(node)
        if whole and view.label(node) not in SHAPE_ONLY and any(o in found for o in view.operands[node]):
            found.add(node)
    return found


def _is_float(node: fx.Node) -> bool:
    """A float tensor, or several (the parts of a split)."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else [value]
    return bool(parts) and all(isinstance(p, torch.Tensor) and p.is_floating_point() for p in parts)


def _in_view(value: Any, flow: nx.DiGraph) -> fx.Node | None:
    """The node of the flow that an output stands for: quantizers and dropout are looked through."""
    while isinstance(value, fx.Node) and value not in flow:
        value = next((a for a in value.all_input_nodes if _is_float(a) and a.op != "get_attr"), None)
    return value


def _upwards(above: dict[Any, Any], node: Any) -> list[Any]:
    """The node and its dominators, innermost first."""
    found = [node]
    while (up := above.get(found[-1])) is not None and up is not found[-1]:
        found.append(up)
    return found


def _end_of_last(view: View, flow: nx.DiGraph, entries: list[fx.Node], below: list[Any]) -> fx.Node | None:
    """Where the last block ends: at the first value below it that closes the same inside as the block before has; of
    equal shape where there is no block before, or the two differ (ModernBERT's first block has no norm)."""
    candidates = [n for n in below if isinstance(n, fx.Node) and isinstance(n.meta["val"], torch.Tensor)]
    if len(entries) > 1:
        model = inside_of(view, flow, entries[-2], entries[-1])
        for end in candidates:
            if is_same_inside(model, inside_of(view, flow, entries[-1], end)):
                return end
    shape = [str(s) for s in entries[-1].meta["val"].shape]
    label = view.label(entries[-1]) if len(entries) > 1 else ""
    alike = [n for n in candidates if [str(s) for s in n.meta["val"].shape] == shape]
    return next((n for n in reversed(alike) if not label or view.label(n) == label), None)


def inside_of(view: View, flow: nx.DiGraph, start: fx.Node, end: fx.Node) -> nx.DiGraph:
    """The semantic graph of what lies between two values: ops on nodes, operand ports on edges."""
    between = nx.descendants(flow, start) & (nx.ancestors(flow, end) | {end})
    inside = nx.DiGraph(flow.subgraph(between | {start}))
    for node in inside:
        inside.nodes[node]["op"] = "start" if node is start else view.label(node)
    return inside


def is_same_inside(a: nx.DiGraph, b: nx.DiGraph) -> bool:
    """Isomorphic in ops and ports."""
    if len(a) != len(b) or a.number_of_edges() != b.number_of_edges():
        return False
    matcher = nx.algorithms.isomorphism.DiGraphMatcher(
        a, b, node_match=lambda x, y: x["op"] == y["op"], edge_match=lambda x, y: x["ports"] == y["ports"]
    )
    return bool(matcher.is_isomorphic())


def _behind_dropout(node: fx.Node) -> fx.Node:
    """The value as it is read: with dropout, where nothing reads it without."""
    users = list(node.users)
    op = op_of(users[0]) if len(users) == 1 else None
    return users[0] if op is not None and op.name == "dropout" else node
