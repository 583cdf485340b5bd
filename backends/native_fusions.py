"""Neighbours of an integer graph that one native kernel computes. Each fusion: ``before -> after`` in its first line.

``FUSIONS`` hide some codes from view; ``OPEN`` hide none, for whoever wants to see all of them (``compare``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..integer_only import dtype_of
from ..op import op_of
from . import native_attention as attending
from . import native_kernels as kernels
from .native_rules import Builder, Keep, args_of, fixed_of, grid_of, linear_of, norm_of, sides_of, sum_of, whole_of

Fusion = Callable[[Builder, fx.Node], None]


def name_of(node: Any) -> str:
    """The name of a node's op; "" for anything else."""
    op = op_of(node) if isinstance(node, fx.Node) else None
    return op.name if op else ""


def only_user(node: fx.Node, name: str) -> fx.Node | None:
    """The one reader of a node, if it is this op and reads it first."""
    users = list(node.users)
    if len(users) != 1 or name_of(users[0]) != name:
        return None
    return users[0] if users[0].args and users[0].args[0] is node else None


def fuse_all(build: Builder, fusions: Sequence[Fusion]) -> None:
    """Every fusion at every node; what a fusion refuses stays as it is, for the rules."""
    for fuse in fusions:
        for node in list(build.graph.nodes):
            if not node.users:
                continue
            try:
                fuse(build, node)
            except Keep:
                continue


def fuse_linear(build: Builder, node: fx.Node, hide: bool = True) -> None:
    """int_linear, requantize [, lookup] | dequantize [, add] | dequantize, gelu, quantize -> one kernel"""
    if name_of(node) != "int_linear":
        return
    if (codes := only_user(node, "requantize")) is not None:
        table = only_user(codes, "lookup") if hide else None
        entries = None if table is None else _table_of(build, table, codes)
        run = linear_of(build, node, fixed=fixed_of(build, codes), table=entries)
        if table is None or entries is None:
            build.call(codes, run, (node.args[0],), codes, "linear + requantize")
        else:
            build.call(table, run, (node.args[0],), table, "linear + requantize + lookup")
    elif (real := only_user(node, "dequantize")) is not None:
        _fuse_real(build, node, real)


def _table_of(build: Builder, node: fx.Node, codes: fx.Node) -> torch.Tensor | None:
    """The table of a ``lookup`` by the byte of the code; None where it has no entry for every code, or wider ones."""
    table, first = build.constant(node.args[1]), int(args_of(node)[2])
    qmin, qmax = args_of(codes)[4:6]
    if table.dtype not in kernels.BYTES or qmin < first or qmax >= first + table.numel():
        return None
    whole = torch.zeros(256, dtype=table.dtype)
    whole[(torch.arange(first, first + table.numel())) % 256] = table
    return whole


def scale_of(build: Builder, node: fx.Node) -> torch.Tensor:
    """The scale of a ``dequantize`` of sums: 0-d, or along the last dimension."""
    _, scale, zero_point, axis = args_of(node, 0, None, size=4)
    tensor = build.constant(scale, "its scale")
    if zero_point or tensor.dim() > 1 or (tensor.dim() == 1 and axis != -1):
        raise Keep("its scales do not run along the last dimension")
    return tensor


def _fuse_real(build: Builder, node: fx.Node, real: fx.Node) -> None:
    scale, x = scale_of(build, real), node.args[0]
    for curve in ("gelu", "relu"):
        between = only_user(real, curve)
        last = (
            None
            if between is None or between.kwargs.get("approximate", "none") != "none"
            else only_user(between, "quantize")
        )
        if last is not None:
            run = linear_of(build, node, scale=scale, curve=curve, grid=grid_of(build, last))
            build.call(last, run, (x,), last, f"linear + {curve} + quantize")
            return
    if (last := only_user(real, "quantize")) is not None:
        run = linear_of(build, node, scale=scale, curve="none", grid=grid_of(build, last))
        build.call(last, run, (x,), last, "linear + quantize")
        return
    run = linear_of(build, node, scale=scale)
    users = list(real.users)
    if len(users) == 1 and name_of(users[0]) == "add" and not users[0].kwargs and len(users[0].args) == 2:
        other = users[0].args[1] if users[0].args[0] is real else users[0].args[0]
        if isinstance(other, fx.Node) and other is not real and _is_float(other):
            build.call(users[0], run, (x, other), users[0], "linear + add")
            return
    build.call(real, run, (x,), real, "linear + dequantize")


def _is_float(node: fx.Node) -> bool:
    return dtype_of(node) == torch.float32


def fuse_norm(build: Builder, node: fx.Node) -> None:
    """layer_norm [, quantize] -> floats, codes, or both in one kernel"""
    if name_of(node) != "layer_norm":
        return
    x, shape, gain, offset, eps = args_of(node, None, None, 1e-5, size=5)[:5]
    if len(shape) != 1:
        raise Keep("it normalises several dimensions")
    vectors = [None if v is None else build.constant(v, "its weight") for v in (gain, offset)]
    users = list(node.users)
    rounded = next((u for u in users if name_of(u) == "quantize" and u.args[0] is node), None)
    grid = None if rounded is None else grid_of(build, rounded)
    real = rounded is None or len(users) > 1
    run = kernels.layer_norm(int(shape[0]), vectors[0], vectors[1], float(eps), grid, real)
    if rounded is None:
        build.call(node, run, (x,), node, "layer_norm")
    elif not real:
        build.call(rounded, run, (x,), rounded, "layer_norm + quantize")
    else:
        _both(build, node, rounded, run)


def _both(build: Builder, node: fx.Node, rounded: fx.Node, run: Any) -> None:
    """A kernel with two results: the floats for ``node``, the codes for ``rounded``."""
    with build.graph.inserting_before(node):
        both = build.graph.call_function(run, (node.args[0],))
        real = build.graph.call_function(operator.getitem, (both, 0))
        codes = build.graph.call_function(operator.getitem, (both, 1))
    both.meta = {"site": f"{node.meta.get('site', node.name)}/both"}
    for made, old in ((real, node), (codes, rounded)):
        made.meta = {k: v for k, v in old.meta.items() if k in ("site", "val", "type")}
        old.replace_all_uses_with(made)
    codes.meta["rounds"] = True
    build.kernels[both] = "layer_norm + quantize"


def fuse_softmax(build: Builder, node: fx.Node) -> None:
    """softmax over the last dimension, quantize -> one kernel"""
    last = only_user(node, "quantize") if name_of(node) == "softmax" else None
    if last is None or node.args[1] not in (-1,):
        return
    build.call(last, attending.softmax(grid_of(build, last)), (node.args[0],), last, "softmax + quantize")


def fuse_sum_norm(build: Builder, node: fx.Node) -> None:
    """int_add, int_layer_norm -> one kernel"""
    last = only_user(node, "int_layer_norm") if name_of(node) == "int_add" else None
    if last is not None:
        run = sum_of(build, node, norm_of(build, last))
        build.call(last, run, tuple(args_of(node)[0]), last, "int_add + int_layer_norm")


def fuse_attention(build: Builder, node: fx.Node) -> None:
    """int_matmul, [dequantize, add,] softmax, [quantize,] int_matmul, requantize -> one kernel"""
    scores, scale, mask, whole = node, 1.0, None, None
    if name_of(node) != "int_matmul":
        return
    if (probs := only_user(node, "int_softmax")) is not None:
        whole, grid = whole_of(build, probs)
        mask = probs.args[1]
    else:
        found = _float_softmax(build, node)
        if found is None:
            return
        probs, scale, mask = found
        grid = grid_of(build, probs)
    product = only_user(probs, "int_matmul")
    last = None if product is None else only_user(product, "requantize")
    if last is None or grid.qmin < 0:
        return
    assert product is not None
    (q, k), (p, v) = sides_of(build, scores), sides_of(build, product)
    fixed = fixed_of(build, last)
    if p.zero_point != grid.zero_point or isinstance(fixed.multiplier, torch.Tensor):
        raise Keep("its probabilities are shifted, or its results have several scales")
    run = attending.attention(q, k, v, grid, fixed, scale=scale, whole=whole)
    args = (*scores.args[:2], product.args[1], *(() if mask is None else (mask,)))
    build.call(last, run, args, last, "attention")


def _float_softmax(build: Builder, node: fx.Node) -> tuple[fx.Node, float, Any] | None:
    """dequantize [, add a mask], softmax, quantize behind a product: (the quantize, scale, mask)."""
    real = only_user(node, "dequantize")
    if real is None:
        return None
    scale = scale_of(build, real)
    if scale.dim():
        return None
    after, mask = next(iter(real.users)), None
    if len(real.users) == 1 and name_of(after) == "add" and len(after.args) == 2 and not after.kwargs:
        mask = after.args[1] if after.args[0] is real else after.args[0]
        if not isinstance(mask, fx.Node) or not _is_float(mask):
            return None
        real = after
    soft = only_user(real, "softmax")
    if soft is None or soft.args[1] != -1:
        return None
    last = only_user(soft, "quantize")
    return None if last is None else (last, float(scale), mask)


fuse_open_linear = functools.partial(fuse_linear, hide=False)
OPEN: tuple[Fusion, ...] = (fuse_open_linear, fuse_norm, fuse_softmax)
FUSIONS: tuple[Fusion, ...] = (fuse_attention, fuse_sum_norm, fuse_linear, fuse_norm, fuse_softmax)
