"""float -> qat: one quantizer per ruled value, biases on the grid of their product."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph import constants, fetch, module_path, put, root, site_of
from ..lsq import Lsq, make_quantizer
from ..op import op_of, tensor_args
from ..ops.qat import bias_grid, norm_on_grid
from ..pipeline import graph_pass
from ..placement import Demand, fetch_parameter, find_demands, table_of

GATHER_FIRST = ("lsq", "lsq+", "kdlsq")  # their scale does not depend on the rows that are not read


@graph_pass("float->qat")
def insert_quantizers(gm: fx.GraphModule) -> None:
    """op(x, w, b) -> op(lsq(x), lsq(w), bias_grid(b)); an embedding is gathered first, then quantized

    A LayerNorm that reads a quantized value becomes ``norm_on_grid``: its statistics are those of the integers.
    """
    demands, fuel = find_demands(gm, gm.meta["qconfig"]), gm.meta.get("fuel")
    for demand in demands[len(demands) if fuel is None else fuel :]:
        _leave_out(demand)
    for demand in demands[:fuel]:
        _insert(gm, demand)
    _name_copies(gm)
    for node in list(gm.graph.nodes):
        _ground_bias(gm, node)
        _ground_norm(gm, node)


def _leave_out(demand: Demand) -> None:
    """The table of sites says of the readers what they did not get."""
    for user, _ in demand.uses:
        got, why = user.meta.get("decision", ("", ""))
        if demand.text in (kept := got.split(", ")):
            kept.remove(demand.text)
            user.meta["decision"] = (", ".join(kept) or "float", f"{why}; fuel ended before {demand.text}")


def _insert(gm: fx.GraphModule, demand: Demand) -> None:
    if demand.value.op == "get_attr":
        _insert_weight(gm, demand)
    else:
        name = f"{_attribute(site_of(demand.value))}_{'wide_' if demand.kind == 'wide' else ''}lsq"
        quantizer = make_quantizer(demand.spec, role="act", site=site_of(demand.value))
        node = _call(
            gm, name, quantizer, demand.value, site_of(demand.value) + ("/w" if demand.kind == "wide" else "/q")
        )
        for user, operand in demand.uses:
            _reread(user, operand, demand.value, node)


def _insert_weight(gm: fx.GraphModule, demand: Demand) -> None:
    weight = fetch_parameter(demand.value)
    channels = weight.shape[0] if demand.spec.axis == 0 else None
    quantizer = make_quantizer(
        demand.spec, channels=channels, numel=weight.numel(), role="weight", site=str(demand.value.target)
    )
    quantizer.init_from(weight.detach())
    name = f"{demand.value.target}_lsq"
    gathered = demand.spec.axis is None and demand.spec.quantizer in GATHER_FIRST
    whole: fx.Node | None = None
    for user, operand in demand.uses:
        if gathered and table_of(user) is not None:
            node = _call(gm, name, quantizer, user, site_of(user) + "/q")
            for reader in [r for r in user.users if r is not node]:
                reader.replace_input_with(user, node)
            user.meta["ruled"] = (0,)
        else:
            if whole is None:
                whole = _call(gm, name, quantizer, demand.value, f"{demand.value.target}/q")
            _reread(user, operand, demand.value, whole)


def _call(gm: fx.GraphModule, name: str, quantizer: Lsq, value: fx.Node, site: str) -> fx.Node:
    put(gm, name, quantizer)
    if value.op == "get_attr":  # right before the first reader, behind every constant and input
        point = min(value.users, key={n: i for i, n in enumerate(gm.graph.nodes)}.__getitem__)
        with gm.graph.inserting_before(point):
            node = gm.graph.call_module(name, (value,))
    else:
        with gm.graph.inserting_after(value):
            node = gm.graph.call_module(name, (value,))
    node.meta = {"val": value.meta["val"], "path": module_path(value), "site": site}
    return node


def _attribute(site: str) -> str:
    """A site as the dotted name of an attribute: ``a.b/op:1`` -> ``a.b.op_1``."""
    return site.replace("/", ".").replace(":", "_")


def _reread(user: fx.Node, operand: fx.Node, value: fx.Node, quantized: fx.Node) -> None:
    """Let ``user`` read ``operand`` made from ``quantized`` in place of ``value``, copying the movers between.

    ``user.meta["ruled"]`` lists the operands that a rule names, for the verifier.
    """
    if op_of(user) is not None:
        here = tuple(i for i, a in enumerate(tensor_args(user)) if a is operand)
        user.meta["ruled"] = user.meta.get("ruled", ()) + here
    user.replace_input_with(operand, _moved_copy(operand, value, quantized))


def _moved_copy(operand: fx.Node, value: fx.Node, quantized: fx.Node) -> fx.Node:
    if operand is value:
        return quantized
    source = tensor_args(operand)[0]
    base = _moved_copy(source, value, quantized)
    for sibling in base.users:  # one copy serves all readers
        if sibling.meta.get("copy_of") is operand:
            return sibling
    copies: dict[fx.Node, fx.Node] = {source: base}
    with operand.graph.inserting_after(operand):
        new = operand.graph.node_copy(operand, lambda n: copies.get(n, n))
    new.meta = {k: v for k, v in operand.meta.items() if k != "site"} | {"copy_of": operand}
    return new


def _name_copies(gm: fx.GraphModule) -> None:
    """A copied mover whose original nobody reads any more takes its site."""
    for node in reversed(list(gm.graph.nodes)):
        original = node.meta.pop("copy_of", None)
        if original is not None and not original.users:
            node.meta["site"] = site_of(original)
            gm.graph.erase_node(original)


def _ground_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """bias -> bias_grid(bias, x_lsq, w_lsq) where both factors of the product are quantized."""
    op = op_of(node)
    if op is None or op.signature.operands != ("act", "weight", "bias"):
        return
    operands = tensor_args(node)
    if len(operands) < 3 or operands[2].op != "get_attr":
        return
    factors = [root(o) for o in operands[:2]]
    if not all(f.op == "call_module" and isinstance(fetch(gm, str(f.target)), Lsq) for f in factors):
        return
    known = constants(gm.graph)
    with gm.graph.inserting_before(node):
        modules = [known.get(str(f.target)) or gm.graph.get_attr(str(f.target)) for f in factors]
        grid = gm.graph.call_function(bias_grid, (operands[2], *modules))
    grid.meta = {"val": operands[2].meta["val"], "path": module_path(node)}
    node.replace_input_with(operands[2], grid)


def _ground_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    """layer_norm(lsq(x), ...) -> norm_on_grid(lsq(x), ..., lsq) with the integer placement."""
    op = op_of(node)
    if op is None or op.name != "layer_norm" or gm.meta["qconfig"].placement != "integer":
        return
    x, shape, weight, bias, eps = _norm_args(node)
    source = root(node.args[0])  # type: ignore[arg-type]
    if source.op != "call_module" or not isinstance(fetch(gm, str(source.target)), Lsq) or len(shape) != 1:
        return
    known = constants(gm.graph)
    with gm.graph.inserting_before(node):
        lsq = known.get(str(source.target)) or gm.graph.get_attr(str(source.target))
        new = gm.graph.call_function(norm_on_grid, (x, shape, weight, bias, eps, lsq))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _norm_args(node: fx.Node) -> tuple[Any, ...]:
    """x, shape, weight, bias and eps of a layer_norm, defaults filled in."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args)) | dict(node.kwargs)
    return (given["input"], given["normalized_shape"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
