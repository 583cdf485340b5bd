"""The exported graph made ours: devices, guards and in-place ops taken out, dropout put back as a module."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from .errors import CaptureError
from .graph import assign_sites, fetch, mark_plumbing, module_path, put, unused_name
from .op import BY_TARGET
from .ops.shape import LAST, arange, full

aten = torch.ops.aten

SAME = {aten.alias.default, aten.detach.default, aten.detach_.default}
COPIES = {aten.clone.default, aten.lift_fresh_copy.default}
CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
RENAMED = {aten.multiply.Tensor: aten.mul.Tensor, aten.divide.Tensor: aten.div.Tensor}
CASTS = {
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.to.other,
}


def normalize(gm: fx.GraphModule) -> None:
    """Rewrite a fresh export in place until every call is a declared op, then name the sites."""
    _inline_no_grad(gm)
    _functionalize(gm.graph)  # before copies go: what is written into a copy stays there
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and "_guards_fn" in str(node.target):
            gm.graph.erase_node(node)
        elif node.op == "call_function":
            _rewrite(gm, node)
    gm.graph.eliminate_dead_code()
    assign_sites(gm.graph)
    mark_plumbing(gm)
    gm.graph.lint()
    gm.recompile()


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    target = node.target
    if target in CHECKS:
        gm.graph.erase_node(node)
    elif target in COPIES:
        _replace(node, node.args[0])
    elif target in CASTS:
        _cast(node)
    elif target in RENAMED:
        node.target = RENAMED[target]
    elif target in (aten.dropout.default, aten.feature_dropout.default):
        _restore_dropout(gm, node)
    elif target is aten.conv1d.padding:
        _named_padding(node)
    elif target is aten.im2col.default:
        _unfold(node)
    elif target in FACTORIES:
        _factory(node)


def _replace(node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _cast(node: fx.Node) -> None:
    """``to(device, dtype)`` names the device it was captured on; what stays is the change of dtype."""
    source = node.args[0]
    if node.meta["val"].dtype == source.meta["val"].dtype:  # type: ignore[union-attr]
        _replace(node, source)
        return
    node.target, node.args, node.kwargs = aten.to.dtype, (source, node.meta["val"].dtype), {}


class FeatureDropout(nn.Dropout):
    """Whole features [n, c, ...] at once, as ``nn.Dropout1d`` and ``nn.Dropout2d`` do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.feature_dropout(x, self.p, self.training)


def _restore_dropout(gm: fx.GraphModule, node: fx.Node) -> None:
    source, p = node.args[0], float(node.args[1])  # type: ignore[arg-type]
    if p == 0.0:
        _replace(node, source)
        return
    path = module_path(node)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    named = bool(path) and "dropout" in str(stack[-1][1]).lower()
    name = unused_name(gm, path if named and not _taken(gm, path) else (f"{path}.dropout" if path else "dropout"))
    put(gm, name, nn.Dropout(p) if node.target is aten.dropout.default else FeatureDropout(p))
    with node.graph.inserting_before(node):
        new = node.graph.call_module(name, (source,))
    new.meta = {**node.meta, "path": path}
    _replace(node, new)


def _taken(gm: fx.GraphModule, path: str) -> bool:
    try:
        return isinstance(fetch(gm, path), nn.Dropout)
    except AttributeError:
        return False


def _named_padding(node: fx.Node) -> None:
    """``conv1d(padding="same")`` and ``"valid"`` with numbers; what "same" has more behind than in front is a pad."""
    given: Any = [*node.args, *[None, [1], "valid", [1], 1][len(node.args) - 2 :]]
    x, weight, bias, stride, named, dilation, groups = given
    over = dilation[0] * (weight.meta["val"].shape[-1] - 1) if named == "same" else 0
    if over % 2:
        with node.graph.inserting_before(node), enable_python_dispatcher():
            padded = node.graph.call_function(aten.pad.default, (x, [over // 2, over - over // 2]))
            padded.meta = {**node.meta, "val": aten.pad.default(x.meta["val"], [over // 2, over - over // 2])}
        x, over = padded, 0
    node.target, node.args = aten.conv1d.default, (x, weight, bias, stride, [over // 2], dilation, groups)


def _unfold(node: fx.Node) -> None:
    """``im2col(x)`` [n, c, h, w] -> [n, c * kernel, windows], out of a pad with zeros and ops that only move elements.

    A quantizer is then looked up through the windows: it sees each element once, not once a tap.
    """
    args: Any = node.args
    x, kernel, dilation, padding, stride = args
    chain: list[tuple[Any, tuple[Any, ...]]] = []
    if any(padding):
        chain.append((aten.pad.default, ([padding[1], padding[1], padding[0], padding[0]],)))
    for dim, size, apart, step in zip((2, 3), kernel, dilation, stride):
        chain.append((aten.unfold.default, (dim, (size - 1) * apart + 1, step)))
        if apart > 1:
            chain.append((aten.slice.Tensor, (-1, 0, LAST, apart)))
    chain.append((aten.permute.default, ([0, 1, 4, 5, 2, 3],)))  # [n, c, kh, kw, h', w']
    chain += [(aten.flatten.using_ints, (4, 5)), (aten.flatten.using_ints, (1, 3))]
    value: Any = x
    with node.graph.inserting_before(node):
        for target, rest in chain:
            source, value = value, node.graph.call_function(target, (value, *rest))
            value.meta = {k: v for k, v in node.meta.items() if k != "site"}
            with enable_python_dispatcher():  # as torch.export has it: elsewhere a pad would fix free sizes
                value.meta["val"] = target(source.meta["val"], *rest)
    _replace(node, value)


def _functionalize(graph: fx.Graph) -> None:
    """``x.add_(y)`` to ``add(x, y)``: whatever reads x afterwards reads the result.

    CaptureError where x is read afterwards under another name, or is a buffer: the functional form says nothing there.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if target in SAME:
            _replace(node, node.args[0])
            continue
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        _refuse_shared(node, order)
        name = target._schema.name.split("::")[1][:-1]
        found = getattr(getattr(aten, name), target._overloadname)
        source: Any = node.args[0]
        node.target = RENAMED.get(found, found)
        for user in list(source.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(source, node)


def _refuse_shared(node: fx.Node, order: dict[fx.Node, int]) -> None:
    source: Any = node.args[0]
    base = source
    while (below := _shares(base)) is not None:
        base = below
    names = [base]
    for name in names:
        names += [u for u in name.users if _shares(u) is name and order[u] < order[node]]
    others = [n for n in names if n is not source and any(order[u] > order[node] for u in n.users)]
    what, where = f"{node.target} writes in place into", f"{module_path(node) or 'forward'}/{node.name}"
    if base.op == "get_attr":
        do = "a captured model keeps nothing from call to call: take that out, or replace the module (batch norm)"
        raise CaptureError(f"{what} {base.target}", where=where, do=do)
    if others:
        do = "make a new tensor: x = x + y for x += y, torch.where or torch.cat for x[:, 0] = y"
        raise CaptureError(f"{what} memory that is read under another name", where=where, do=do)


def _shares(node: fx.Node) -> Any:
    """The operand whose memory a result shares (a view of it, a part of several); None for a tensor of its own."""
    if node.target is operator.getitem:
        return node.args[0]
    if node.target in CASTS and node.meta["val"].dtype != node.args[0].meta["val"].dtype:  # type: ignore[union-attr]
        return None
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.args[0] if any(r.alias_info and not r.alias_info.is_write for r in returns) else None


def _like(node: fx.Node) -> fx.Node:
    """A tensor whose device a new tensor takes: the first input of the graph."""
    return next(n for n in node.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor))


def _to_arange(node: fx.Node) -> tuple[Any, ...]:
    bounds = list(node.args)
    start: Any = 0
    end: Any = bounds[0]
    step: Any = 1
    if node.target is not aten.arange.default:
        start, end = bounds[:2]
        step = bounds[2] if len(bounds) > 2 else 1
    return (_like(node), start, end, step, node.meta["val"].dtype)


def _to_full(value: float | bool | None, shape_at: int | None) -> Callable[[fx.Node], tuple[Any, ...]]:
    def rewrite(node: fx.Node) -> tuple[Any, ...]:
        dtype = node.meta["val"].dtype
        if shape_at is None:  # *_like
            shape: Any = _sizes(node, node.args[0])
            fill = value if value is not None else node.args[1]
        else:
            shape = node.args[shape_at]
            fill = value if value is not None else node.args[shape_at + 1]
        return (_like(node), shape, fill, dtype)

    return rewrite


def _sizes(node: fx.Node, source: Any) -> list[Any]:
    sizes: list[Any] = []
    with node.graph.inserting_before(node):
        for i, s in enumerate(source.meta["val"].shape):
            if isinstance(s, int):
                sizes.append(s)
                continue
            size = node.graph.call_function(aten.sym_size.int, (source, i))
            size.meta = {k: v for k, v in node.meta.items() if k != "site"} | {"val": s}
            sizes.append(size)
    return sizes


FACTORIES: dict[Any, tuple[Any, Callable[[fx.Node], tuple[Any, ...]]]] = {
    aten.arange.default: (arange, _to_arange),
    aten.arange.start: (arange, _to_arange),
    aten.arange.start_step: (arange, _to_arange),
    aten.zeros.default: (full, _to_full(0, 0)),
    aten.ones.default: (full, _to_full(1, 0)),
    aten.full.default: (full, _to_full(None, 0)),
    aten.new_zeros.default: (full, _to_full(0, 1)),
    aten.new_ones.default: (full, _to_full(1, 1)),
    aten.new_full.default: (full, _to_full(None, 1)),
    aten.zeros_like.default: (full, _to_full(0, None)),
    aten.ones_like.default: (full, _to_full(1, None)),
    aten.full_like.default: (full, _to_full(None, None)),
    aten.scalar_tensor.default: (full, lambda n: (_like(n), [], n.args[0], n.meta["val"].dtype)),
}


def _factory(node: fx.Node) -> None:
    """Constants made at run time take the device of the input, not the one they were captured on."""
    function, arguments = FACTORIES[node.target]
    args = arguments(node)
    node.target, node.args, node.kwargs = function, args, {}


def _inline_no_grad(gm: fx.GraphModule) -> None:
    """``wrap_with_set_grad_enabled(False, sub, *args)`` becomes the nodes of ``sub``; the values are the same."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or "set_grad_enabled" not in str(node.target):
            continue
        _, sub_node, *args = node.args
        _unpack(node, _inlined(gm, node, fetch(gm, str(sub_node.target)), args))


def _inlined(gm: fx.GraphModule, node: fx.Node, sub: fx.GraphModule, args: list[Any]) -> Any:
    """Copies of the nodes of ``sub`` in front of ``node``; returns what ``sub`` returns, in terms of the copies."""
    env: dict[fx.Node, Any] = dict(zip(sub.graph.find_nodes(op="placeholder"), args))
    for inner in sub.graph.nodes:
        if inner.op == "output":
            return fx.node.map_arg(inner.args[0], env.__getitem__)
        if inner.op == "placeholder":
            continue
        with gm.graph.inserting_before(node):
            env[inner] = gm.graph.node_copy(inner, env.__getitem__)
        if inner.op == "get_attr":
            name = unused_name(gm, str(inner.target))
            put(gm, name, fetch(sub, str(inner.target)))
            env[inner].target = name
    return None


def _unpack(node: fx.Node, result: Any) -> None:
    for user in list(node.users):
        index: Any = user.args[1] if len(user.args) > 1 else 0
        _replace(user, result[index] if isinstance(result, (tuple, list)) else result)
    node.graph.erase_node(node)


def undeclared(gm: fx.GraphModule) -> list[fx.Node]:
    """Call nodes whose target has no declared meaning."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target not in BY_TARGET]
