"""qdq -> int: ``dequantize, op, quantize`` collapse into integer primitives; what cannot is a float island."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph import computes_floats, drop_unused, fetch, moves_data, pads_zeros, plumbing, site_of
from ..integer_only import float_nodes
from ..lowering import Grid, Island, Lowering, QValue, StaysFloat, array, float64
from ..op import is_float, op_of, tensor_args
from ..ops.lower_rules import lower_curve, requantized
from ..ops.qdq import dequantize, quantize
from ..pipeline import graph_pass
from ..placement import MOVES_CODES


@graph_pass("qdq->int")
def lower(gm: fx.GraphModule) -> None:
    """dequantize, op, quantize -> an integer op and one requantization; float islands go to ``gm.meta["islands"]``

    Raises LoweringError, with the site and the bound, where a 32-bit accumulator could overflow.
    """
    state = Lowering(gm, frozenset(plumbing(gm.graph)))
    hidden = frozenset(site_of(n) for n in state.hidden if n.op == "call_function")
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            _visit(state, node)
    _reconnect(state)
    gm.graph.eliminate_dead_code()
    drop_unused(gm)
    islands = _islands(state, hidden)
    gm.meta["islands"], gm.meta["may_be_float"] = islands, hidden | {i.site for i in islands}
    gm.meta["integer_only"] = not float_nodes(gm)


def _visit(state: Lowering, node: fx.Node) -> None:
    op = op_of(node)
    if node.target is dequantize:
        state.values[node] = _started(state, node)
    elif node.target is quantize:
        _finish(state, node)
    elif op is None:
        return
    elif node.meta.get("curve") or op.lower is not None:
        try:
            value = lower_curve(state, node) if node.meta.get("curve") else op.lower(state, node)  # type: ignore[misc]
            if value is not None:
                state.values[node] = value
        except StaysFloat as why:
            state.reasons[node] = str(why)
    elif moves_data(node) or op.name in MOVES_CODES:
        _move(state, node)


def _started(state: Lowering, node: fx.Node) -> QValue:
    """dequantize(codes, scale, zero_point, axis): here integers begin."""
    given: list[Any] = list(node.args)
    source, scale, zero_point, axis = given + [0, None][len(given) - 2 :]
    constant = state.constant(source)
    low, high = state.range_of(source)
    real = float64(fetch(state.gm, str(scale.target)))
    codes = None if constant is None else array(constant)
    return QValue(source, real, low, high, zero_point, axis, codes=codes)


def _finish(state: Lowering, node: fx.Node) -> None:
    """quantize(x, ...): the integers of x on this grid, or, for a float x, the quantize that stands there already."""
    args: list[Any] = list(node.args)
    x, scale, zero_point, qmin, qmax = args[:5]
    state.ranges[node] = (qmin, qmax)
    value = state.values.get(x)
    tensor = fetch(state.gm, str(scale.target))
    if value is None or tensor.ndim:
        return
    grid = Grid(float(tensor), zero_point, qmin, qmax)
    codes = requantized(state, node, value, grid) if isinstance(value, QValue) else value.quantized(state, node, grid)
    state.ranges[codes.node] = (codes.lo, codes.hi)
    node.replace_all_uses_with(codes.node)


def _move(state: Lowering, node: fx.Node) -> None:
    """view(x) and its like move the codes of x; cat joins codes of one grid; pad adds the code of zero.

    Values with several scales, and floats, are moved as floats.
    """
    sources = tensor_args(node)[:1] if moves_data(node) else [a for a in tensor_args(node) if is_float(a)]
    values = [state.values.get(a) for a in sources]
    first = values[0] if values else None
    if not isinstance(first, QValue) or not first.is_per_tensor:
        if not moves_data(node):
            state.reasons[node] = "what it moves is float, or has several scales"
        return
    if not all(isinstance(v, QValue) and _same_grid(v, first) for v in values[1:]):
        state.reasons[node] = "its operands have different scales"
        return
    made = {a: v.node for a, v in zip(sources, values) if isinstance(v, QValue)}
    with node.graph.inserting_before(node):
        moved = node.graph.node_copy(node, lambda n: made.get(n, n))
    if op_of(node).name == "pad" and not _pad_codes(moved, first.zero_point):  # type: ignore[union-attr]
        state.reasons[node] = "it pads with something else than zeros"
        node.graph.erase_node(moved)
        return
    moved.meta = dict(node.meta)
    moved.meta["val"] = _as_codes(node.meta["val"], first.node.meta["val"])
    low, high = min(v.lo for v in values), max(v.hi for v in values)  # type: ignore[union-attr]
    state.values[node] = QValue(moved, first.scale, low, high, first.zero_point)


def _same_grid(a: QValue, b: QValue) -> bool:
    alike = a.node.meta["val"].dtype == b.node.meta["val"].dtype
    return a.is_per_tensor and float(a.scale) == float(b.scale) and a.zero_point == b.zero_point and alike


def _pad_codes(node: fx.Node, zero_point: int) -> bool:
    """Let a pad of zeros add the code of zero; False where it adds something else."""
    if not pads_zeros(node):
        return False
    node.args = (*node.args[:2], "constant", zero_point)
    return True


def _as_codes(val: Any, codes: Any) -> Any:
    """The shapes of ``val`` (a tensor, or the list a split returns) with the dtype of ``codes``."""
    dtype = (codes[0] if isinstance(codes, (list, tuple)) else codes).dtype
    return [v.detach().to(dtype) for v in val] if isinstance(val, (list, tuple)) else val.detach().to(dtype)


def _reconnect(state: Lowering) -> None:
    """Backwards: drop what nobody reads any more; let what stays float read dequantized integers."""
    made: dict[fx.Node, fx.Node] = {}
    graph = state.gm.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            continue
        for operand in list(node.all_input_nodes):
            value = state.values.get(operand)
            if not isinstance(value, QValue) or operand.target is dequantize or node is made.get(operand):
                continue
            if operand not in made:
                made[operand] = state.real(value, operand)
            node.replace_input_with(operand, made[operand])


def _islands(state: Lowering, hidden: frozenset[str]) -> tuple[Island, ...]:
    found = []
    for node in state.gm.graph.nodes:
        op = op_of(node)
        if op is None or not computes_floats(node) or site_of(node) in hidden:
            continue
        reason = state.reasons.get(node) or node.meta.get("why_float") or op.why_float or "it has no integer form"
        if node in state.values:  # a sum or a function of codes that nobody rounds
            reason = "no quantizer stands behind it"
        found.append(Island(site_of(node), op.name, reason))
    return tuple(found)
