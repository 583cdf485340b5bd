"""Matrix products and look-ups of rows as integers, with 32-bit accumulators proved from the codes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph import site_of
from ..lowering import Array, Lowering, QValue, StaysFloat, array
from ..ranges import INT32_MAX, demand_int32, dot_bound, largest_size, magnitude, product_bound
from .integer import int_conv1d, int_embedding, int_linear, int_matmul


def _weight(lowering: Lowering, operand: Any) -> tuple[QValue, Array]:
    weight = lowering.codes(operand)
    if weight.codes is None:
        raise StaysFloat("its weight is not a constant")
    if weight.zero_point or weight.rows is not None or weight.axis not in (None, 0):
        raise StaysFloat("its weight has a zero point, or scales along its inputs")
    return weight, weight.codes


def _bias(lowering: Lowering, operand: Any, scale: Array) -> Array | None:
    """Codes at the scale of the accumulator; exact where the bias stands on that grid already, as training left it."""
    if operand is None:
        return None
    value = lowering.values.get(operand)
    if isinstance(value, QValue) and value.codes is not None:
        real = value.codes.astype(np.float64) * value.scale
    elif (tensor := lowering.constant(operand)) is not None:
        real = array(tensor).astype(np.float64)
    else:
        raise StaysFloat("its bias is not a constant")
    codes: Array = np.rint(real / scale)
    if not np.isfinite(codes).all() or np.abs(codes).max(initial=0) > INT32_MAX:
        codes = np.full_like(codes, 2.0**40)  # the proof of the accumulator then fails, and names the site
    return codes.astype(np.int64)


def _product(
    lowering: Lowering, node: fx.Node, target: Callable[..., Any], axis: int, extra: tuple[Any, ...]
) -> QValue:
    args = node.args
    x = lowering.per_tensor(args[0])
    weight, codes = _weight(lowering, args[1])
    scale = x.scale * weight.scale
    bias = _bias(lowering, args[2] if len(args) > 2 else node.kwargs.get("bias"), scale)
    bound = demand_int32(dot_bound(codes, magnitude(x.lo, x.hi, x.zero_point), bias), site_of(node))
    stored = None
    if bias is not None:
        stored = lowering.store(node, "bias", torch.from_numpy(bias.astype(np.int32)))
    made = lowering.call(
        node, target, x.node, weight.node, stored, *extra, x_zero_point=x.zero_point, bound=bound, dtype=torch.int32
    )
    return QValue(made, scale, -bound, bound, axis=axis if scale.ndim else None)


def lower_linear(lowering: Lowering, node: fx.Node) -> QValue:
    """linear(x, w, b) -> int_linear(x, w, b) with the scale ``s_x * s_w``"""
    return _product(lowering, node, int_linear, -1, ())


def lower_conv1d(lowering: Lowering, node: fx.Node) -> QValue:
    """conv1d(x, w, b, ...) -> int_conv1d(x, w, b, ...) with the scale ``s_x * s_w``"""
    defaults: tuple[Any, ...] = ((1,), (0,), (1,), 1)
    given = tuple(node.args[3:])
    return _product(lowering, node, int_conv1d, 1, (*given, *defaults[len(given) :]))


def lower_matmul(lowering: Lowering, node: fx.Node) -> QValue:
    """matmul(a, b) -> int_matmul(a, b) with the scale ``s_a * s_b``; the longest inner product proves the bound"""
    a, b = (lowering.per_tensor(arg) for arg in node.args[:2])
    a_max, b_max = (max(magnitude(v.lo, v.hi, v.zero_point), 1) for v in (a, b))
    longest = max(INT32_MAX // (a_max * b_max), 1)  # a length unknown here is checked when the op runs
    length = largest_size(node.args[0].meta["val"].shape[-1], longest)  # type: ignore[union-attr]
    bound = demand_int32(product_bound(length, a_max, b_max), site_of(node))
    made = lowering.call(
        node,
        int_matmul,
        a.node,
        b.node,
        a_zero_point=a.zero_point,
        b_zero_point=b.zero_point,
        a_max=a_max,
        b_max=b_max,
        dtype=torch.int32,
    )
    return QValue(made, a.scale * b.scale, -bound, bound)


def lower_embedding(lowering: Lowering, node: fx.Node) -> QValue | None:
    """embedding(table, ids) -> int_embedding(table, ids); scales of rows are picked by the same ids"""
    table, ids = node.args[:2]
    raw = lowering.constant(table)
    if raw is not None and not raw.is_floating_point():  # gathered first, dequantized after
        made = lowering.call(node, int_embedding, table, ids, dtype=raw.dtype)
        lowering.ranges[made] = lowering.range_of(table)  # type: ignore[arg-type]
        node.replace_all_uses_with(made)
        return None
    try:
        value = lowering.codes(table)
    except StaysFloat:
        raise StaysFloat("its table is not quantized") from None
    if value.axis not in (None, 0):
        raise StaysFloat("its table has scales along its columns")
    made = lowering.call(node, int_embedding, value.node, ids, dtype=value.node.meta["val"].dtype)
    rows = None if value.is_per_tensor else ids
    return replace(value, node=made, codes=None, axis=None, rows=rows)  # type: ignore[arg-type]
