"""qat -> qdq: learned quantizers become ``quantize`` and ``dequantize`` with constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..errors import CalibrationError
from ..folding import fold_constants, tabulate_positions
from ..graph import EXACT, drop_unused, fetch, module_path, op_label, pads_zeros, put, root, site_of, unused_name
from ..lsq import BiasGrid, Lsq
from ..masks import tokens_there
from ..op import is_float, op_of, tensor_args
from ..ops.norm import integer_layer_norm
from ..ops.qat import bias_grid, norm_on_grid
from ..ops.qdq import dequantize, quantize, torch_container
from ..pipeline import graph_pass

aten = torch.ops.aten


@graph_pass("qat->qdq")
def freeze(gm: fx.GraphModule) -> None:
    """lsq(x) -> dequantize(quantize(x)); lsq(w), bias_grid(b) -> dequantize(codes); norm_on_grid -> integer_layer_norm

    With the integer placement what constants alone decide is computed here, and buckets of positions become tables
    (kdlsq_fx/folding.py). The graph computes what qat computes in eval mode, bit for bit. Raises CalibrationError for
    a quantizer without a scale, and for a weight or scale that is not finite.
    """
    if gm.meta["qconfig"].placement == "integer":
        fold_constants(gm)
        tabulate_positions(gm)
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        if (op := op_of(node)) is not None and op.name == "lsq":
            _refresh(gm, node)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is bias_grid:
            _freeze_bias(gm, node, names)
        elif node.op == "call_function" and node.target is norm_on_grid:
            _freeze_norm(gm, node, names)
    for node in list(gm.graph.nodes):
        if (op := op_of(node)) is not None and op.name == "lsq":
            _freeze_quantizer(gm, node, names)
    if gm.meta["qconfig"].placement == "integer":
        for node in gm.graph.find_nodes(op="call_function", target=quantize):
            _mask_behind(node)
            _round_early(node)
    gm.graph.eliminate_dead_code()
    drop_unused(gm)


def _refresh(gm: fx.GraphModule, node: fx.Node) -> None:
    """Scales that baselines recompute from a weight: an optimizer may have moved it since the last forward."""
    weight = _parameter(gm, node.args[0])
    if isinstance(weight, nn.Parameter):
        fetch(gm, str(node.target)).refresh(weight.detach())


def _freeze_quantizer(gm: fx.GraphModule, node: fx.Node, names: dict[str, str]) -> None:
    lsq, source = fetch(gm, str(node.target)), node.args[0]
    _demand_ready(lsq, node)
    zero_point, axis = int(lsq.zero_point), lsq.spec.axis
    scale = _scale(gm, node, str(node.target), names)
    if source.op == "get_attr":  # type: ignore[union-attr]
        codes = _codes(gm, node, source, lsq, names)
    elif _gathers(gm, source):
        codes = _rows(gm, node, source, lsq, names)
    else:
        args = (source, scale, zero_point, int(lsq.qmin), int(lsq.qmax), axis)
        codes = _call(gm, node, quantize, args, site_of(node), torch_container(int(lsq.qmin), int(lsq.qmax)))
    new = _call(gm, node, dequantize, (codes, scale, zero_point, axis), _undone(site_of(node)), torch.float32)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _mask_behind(node: fx.Node) -> None:
    """dequantize(quantize(x * mask)) -> dequantize(quantize(x)) * mask: the same for zeros and ones

    DeBERTa zeroes what its LayerNorm makes of padding; the integers of the LayerNorm wait for the quantizer.
    """
    masked: fx.Node = node.args[0]  # type: ignore[assignment]
    if op_label(masked) != "mul" or tokens_there(masked.args[1]) is None or masked.op != "call_function":
        return
    x: fx.Node = masked.args[0]  # type: ignore[assignment]
    node.replace_input_with(masked, x)
    for back in [u for u in node.users if u.target is dequantize]:
        with node.graph.inserting_after(back):
            again = node.graph.call_function(masked.target, (x, *masked.args[1:]))  # type: ignore[arg-type]
        again.meta = {k: v for k, v in masked.meta.items() if k != "site"}
        back.replace_all_uses_with(again)
        again.replace_input_with(x, back)
    if not masked.users:
        node.graph.erase_node(masked)


def _round_early(node: fx.Node) -> None:
    """quantize(cat(x, y)) -> cat(quantize(x), quantize(y)): rounding commutes with joining

    Each part is then rounded where it is made: accumulators with scales of their own have no common code before that.
    """
    waiting = [node]
    while waiting:
        late = _hoist(waiting.pop())
        joined: Any = late.args[0]
        if joined.target is not aten.cat.default or late.args[5] is not None:
            continue
        if all(is_float(x) and x.op != "get_attr" for x in joined.args[0]):
            waiting += _before(late, joined)


def _before(late: fx.Node, joined: fx.Node) -> list[fx.Node]:
    """Quantizers of what ``joined`` joins in place of the one behind it; the first keeps its site."""
    graph, parts = late.graph, []
    sources: Any = joined.args[0]
    for i, x in enumerate(sources):
        with graph.inserting_before(late):
            part = graph.call_function(quantize, (x, *late.args[1:]))
        part.meta = {**late.meta, "val": x.meta["val"].detach().to(late.meta["val"].dtype)}
        part.meta["site"] = f"{site_of(late)}:{i}" if i else site_of(late)
        parts.append(part)
    with graph.inserting_before(late):
        again = graph.call_function(joined.target, (parts, *joined.args[1:]))  # type: ignore[arg-type]
    again.meta = {**joined.meta, "val": joined.meta["val"].detach().to(late.meta["val"].dtype)}
    again.meta["site"] = f"{site_of(joined)}/codes"
    late.replace_all_uses_with(again)
    graph.erase_node(late)
    return parts


def _hoist(node: fx.Node) -> fx.Node:
    """quantize(view(x)) -> view(quantize(x)): a function of codes is completed by the quantizer right behind it.

    RoBERTa's head selects the first token, drops out and quantizes; LayerNorm's integers wait for that quantizer.
    Returns the quantizer, wherever it then stands.
    """
    moved: fx.Node = node.args[0]  # type: ignore[assignment]
    base = root(moved)
    if base is moved or base.op != "call_function" or op_label(base) in EXACT or node.args[5] is not None:
        return node
    with node.graph.inserting_after(base):
        early = node.graph.call_function(quantize, (base, *node.args[1:]))
    early.meta = dict(node.meta) | {"val": base.meta["val"].detach().to(node.meta["val"].dtype)}
    for constant in (a for a in node.args[1:] if isinstance(a, fx.Node)):
        if early < constant:  # the scale was read in front of ``node``
            early.prepend(constant)
    node.replace_all_uses_with(_moved(node, moved, base, early))
    node.graph.erase_node(node)
    return early


def _moved(node: fx.Node, moved: fx.Node, base: fx.Node, codes: fx.Node) -> fx.Node:
    """The movers between ``base`` and ``moved``, copied in front of ``node`` to move ``codes``."""
    if moved is base:
        return codes
    source = tensor_args(moved)[0]
    below = _moved(node, source, base, codes)
    with node.graph.inserting_before(node):
        copy = node.graph.node_copy(moved, lambda n: below if n is source else n)
    if pads_zeros(moved):
        copy.args = (below, moved.args[1], "constant", node.args[2])  # the code of zero
    copy.meta = {k: v for k, v in moved.meta.items() if k != "site"}
    copy.meta["val"] = moved.meta["val"].detach().to(codes.meta["val"].dtype)
    return copy


def _demand_ready(lsq: Lsq, node: fx.Node) -> None:
    if not bool(lsq.ready):
        raise CalibrationError("this quantizer has no scale", where=site_of(node), do="calibrate first")
    scale = lsq.scale.detach()
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise CalibrationError("a scale is not finite and positive", where=site_of(node), do="look for NaN in training")


def _undone(site: str) -> str:
    """Site of the dequantize that undoes a quantizer: ``x/q`` -> ``x/dq``, ``x/w`` -> ``x/dw``."""
    head, _, kind = site.rpartition("/")
    return f"{head}/d{kind}"


def _gathers(gm: fx.GraphModule, node: Any) -> bool:
    """An embedding straight from a parameter: its codes are gathered in place of its floats."""
    op = op_of(node)
    return op is not None and op.name == "embedding" and isinstance(_parameter(gm, node.args[0]), nn.Parameter)


def _parameter(gm: fx.GraphModule, node: Any) -> Any:
    return fetch(gm, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _codes(gm: fx.GraphModule, node: fx.Node, source: Any, lsq: Lsq, names: dict[str, str]) -> fx.Node:
    """The integers of a parameter as a constant; one copy however many nodes read them."""

    def make() -> torch.Tensor:
        weight = fetch(gm, str(source.target)).detach()
        if not bool(torch.isfinite(weight).all()):
            raise CalibrationError("a weight is NaN or infinite", where=str(source.target), do="look at the training")
        return lsq.codes(weight).to(torch_container(int(lsq.qmin), int(lsq.qmax)))

    return _constant(gm, node, f"{node.target}_codes", make, names)


def _rows(gm: fx.GraphModule, node: fx.Node, source: Any, lsq: Lsq, names: dict[str, str]) -> fx.Node:
    codes = _codes(gm, node, source.args[0], lsq, names)
    dtype = torch_container(int(lsq.qmin), int(lsq.qmax))
    return _call(gm, node, source.target, (codes, *source.args[1:]), site_of(source), dtype, dict(source.kwargs))


def _freeze_bias(gm: fx.GraphModule, node: fx.Node, names: dict[str, str]) -> None:
    """The bias as int32 codes on the grid ``s_x * s_w``, with the float32 scale that training rounded it with.

    ``meta["scale_product"]`` names the two scales: whoever computes in float64 wants their product unrounded.
    """
    bias = fetch(gm, str(node.args[0].target)).detach()  # type: ignore[union-attr]
    x_lsq, w_lsq = (fetch(gm, str(a.target)) for a in node.args[1:3])  # type: ignore[union-attr]
    for lsq in (x_lsq, w_lsq):
        _demand_ready(lsq, node)
    scales = (x_lsq.scale.detach(), w_lsq.scale.detach())
    name = f"{node.args[0].target}_grid"  # type: ignore[union-attr]
    codes = _store(gm, node, f"{name}_codes", BiasGrid().codes(bias, *scales))
    scale = _store(gm, node, f"{name}_scale", scales[0] * scales[1])
    axis = 0 if scale.meta["val"].ndim else None
    new = _call(gm, node, dequantize, (codes, scale, 0, axis), f"{site_of(node)}/dq", torch.float32)
    new.meta["scale_product"] = tuple(_scale(gm, node, str(a.target), names).target for a in node.args[1:3])  # type: ignore[union-attr]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _freeze_norm(gm: fx.GraphModule, node: fx.Node, names: dict[str, str]) -> None:
    """The quantizer that a LayerNorm asks for its grid becomes its scale and range."""
    *args, source = node.args
    target = str(source.target)  # type: ignore[union-attr]
    lsq = fetch(gm, target)
    _demand_ready(lsq, node)
    grid = (_scale(gm, node, target, names), int(lsq.qmin), int(lsq.qmax))
    new = _call(gm, node, integer_layer_norm, (*args, *grid), site_of(node), torch.float32)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _scale(gm: fx.GraphModule, node: fx.Node, target: str, names: dict[str, str]) -> fx.Node:
    return _constant(gm, node, f"{target}_scale", lambda: fetch(gm, target).scale.detach().clone(), names)


def _constant(gm: fx.GraphModule, node: fx.Node, name: str, make: Any, names: dict[str, str]) -> fx.Node:
    """A constant made once per name: a shared quantizer keeps one scale and one set of codes."""
    if name not in names:
        names[name] = unused_name(gm, name.replace("_lsq_", "_"))
        put(gm, names[name], make())
    return _read(gm, node, names[name])


def _store(gm: fx.GraphModule, node: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
    stored = unused_name(gm, name)
    put(gm, stored, tensor)
    return _read(gm, node, stored)


def _read(gm: fx.GraphModule, node: fx.Node, name: str) -> fx.Node:
    tensor = fetch(gm, name)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(name)
    new.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return new


def _call(
    gm: fx.GraphModule,
    node: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    site: str,
    dtype: torch.dtype,
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, args, kwargs or {})
    new.meta = {"site": site, "path": module_path(node), "val": node.meta["val"].detach().to(dtype)}
    return new
