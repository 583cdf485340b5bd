"""How float ops become integer ones. An op names its rule in ``lower=``; passes/lower.py calls it, node by node.

A rule gets the walk's state and the float node and returns the integers that stand for its result: a QValue, or a
Deferred that a quantizer behind it completes, or None where it replaced the node itself. It raises StaysFloat with
the reason where an operand is not quantized, and LoweringError where an accumulator could overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import LoweringError
from ..graph import site_of
from ..lowering import Array, Grid, Lowering, QValue, StaysFloat, Value, array
from ..ranges import INT32_MAX, demand_int32, dot_bound, largest_size, magnitude, product_bound
from .fixed_point import MAX_SHIFT, dyadic, int_add, requantize
from .integer import int_conv1d, int_embedding, int_linear, int_matmul, lookup
from .qdq import quantize, torch_container


@dataclass(frozen=True)
class Sum:
    """Terms to be added in one fixed point and rounded once, by the quantizer behind the sum."""

    terms: tuple[QValue, ...]

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        ratios = [t.scale / grid.scale for t in self.terms]
        shift = _shift(self.terms, ratios, site_of(node))
        factors = [np.rint(r * 2.0**shift).astype(np.int64) for r in ratios]
        multipliers = [_multiplier(lowering, node, t, f, i) for i, (t, f) in enumerate(zip(self.terms, factors))]
        terms, zeros = [t.node for t in self.terms], [t.zero_point for t in self.terms]
        ends = (grid.zero_point, grid.qmin, grid.qmax)
        dtype = torch_container(grid.qmin, grid.qmax)
        made = lowering.call(node, int_add, terms, multipliers, zeros, shift, *ends, dtype=dtype)
        return on_grid(made, grid)


@dataclass(frozen=True)
class Curve:
    """An elementwise function of one code: a table of all its values, on the grid of the quantizer behind it.

    ``function`` takes the real values of the codes, float32, and computes in float32 as the float graph does.
    """

    operand: QValue
    function: Callable[[torch.Tensor], torch.Tensor]

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        x = self.operand
        codes = torch.arange(x.lo, x.hi + 1, dtype=torch.float32)
        reals = (codes - x.zero_point) * torch.tensor(float(x.scale), dtype=torch.float32)
        scale = torch.tensor(grid.scale, dtype=torch.float32)
        table = quantize(self.function(reals), scale, grid.zero_point, grid.qmin, grid.qmax)
        stored = lowering.store(node, "table", table)
        return on_grid(lowering.call(node, lookup, x.node, stored, x.lo, dtype=table.dtype), grid)


def requantized(lowering: Lowering, node: fx.Node, value: QValue, grid: Grid) -> QValue:
    """A QValue on another grid: a multiplier and a shift per scale (papers 4.6)."""
    if value.zero_point or value.rows is not None:
        return Sum((value,)).quantized(lowering, node, grid)
    try:
        pairs = [dyadic(float(r)) for r in np.atleast_1d(value.scale / grid.scale)]
    except ValueError as err:
        raise LoweringError(
            str(err), where=site_of(node), do="calibrate again: this scale is out of all range"
        ) from None
    multiplier: Any = pairs[0][0]
    shift: Any = pairs[0][1]
    if not value.is_per_tensor:
        multiplier, shift = (
            lowering.store(node, what, torch.tensor([p[i] for p in pairs]))
            for i, what in enumerate(("multiplier", "shift"))
        )
    args = (
        value.node,
        multiplier,
        shift,
        grid.zero_point,
        grid.qmin,
        grid.qmax,
        -1 if value.axis is None else value.axis,
    )
    return on_grid(lowering.call(node, requantize, *args, dtype=torch_container(grid.qmin, grid.qmax)), grid)


def on_grid(node: fx.Node, grid: Grid) -> QValue:
    """The codes a grid asked for."""
    return QValue(node, np.asarray(grid.scale, dtype=np.float64), grid.qmin, grid.qmax, grid.zero_point)


def _shift(terms: tuple[QValue, ...], ratios: list[Array], site: str) -> int:
    """The finest fixed point in which the sum of the terms stays below 2**62."""
    if not all(np.isfinite(r).all() and (r > 0).all() for r in ratios):
        raise LoweringError("a scale is not finite and positive", where=site)
    largest = sum(magnitude(t.lo, t.hi, t.zero_point) * float(r.max()) for t, r in zip(terms, ratios))
    shift = min(MAX_SHIFT - 1, MAX_SHIFT - 1 - int(np.ceil(np.log2(max(largest, 1e-300)))))
    if shift < 1:
        raise LoweringError(
            f"the terms of this sum reach {largest:.3g} steps of its quantizer, too many for 62 bits",
            where=site,
            do="calibrate again: the scale of the sum is far too small",
        )
    ceiling = int(MAX_SHIFT - np.ceil(np.log2(max(float(r.max()) for r in ratios))) - 1)
    return max(1, min(shift, ceiling))


def _multiplier(lowering: Lowering, node: fx.Node, term: QValue, factor: Array, index: int) -> Any:
    if term.rows is not None:
        table = lowering.store(node, f"multiplier_{index}", torch.from_numpy(factor)[:, None])
        site = f"{site_of(node)}/rows_{index}"
        made = lowering.call(node, int_embedding, table, term.rows, dtype=torch.int64, site=site)
        made.meta["val"] = term.rows.meta["val"].unsqueeze(-1).to(torch.int64)  # one number a row
        return made
    if term.is_per_tensor:
        return int(factor)
    if term.axis not in (-1, None):
        raise LoweringError("a sum with scales along a dimension that is not its last", where=site_of(node))
    return lowering.store(node, f"multiplier_{index}", torch.from_numpy(factor))


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


def lower_add(lowering: Lowering, node: fx.Node) -> Sum:
    """add(a, b) -> the terms of a and b, to be rounded once by the quantizer behind"""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise StaysFloat("its second operand is scaled")
    terms: list[QValue] = []
    for operand in node.args:
        value = lowering.values.get(operand) if isinstance(operand, fx.Node) else None
        terms += value.terms if isinstance(value, Sum) else [lowering.codes(operand)]
    if any(t.axis not in (None, -1) for t in terms):
        raise StaysFloat("an operand has scales along a dimension that is not its last")
    return Sum(tuple(terms))


def lower_scaled(lowering: Lowering, node: fx.Node) -> QValue:
    """mul(x, number), div(x, number) -> x with another scale: no operation at all"""
    left, right = node.args
    is_div = "div" in str(node.target)
    if not is_div and not isinstance(left, fx.Node):
        left, right = right, left
    value, factor = lowering.codes(left), lowering.number(right)
    if not (np.isfinite(factor) and factor > 0):
        raise StaysFloat(f"it scales by {factor}")
    return replace(value, scale=value.scale / factor if is_div else value.scale * factor, codes=None)


def lower_table(lowering: Lowering, node: fx.Node) -> Value:
    """f(x) -> a table of f on all codes of x; exact, as the float op itself fills it"""
    x = _few_codes(lowering.per_tensor(node.args[0]))
    rest, kwargs, target = node.args[1:], dict(node.kwargs), node.target
    if any(isinstance(a, fx.Node) for a in (*rest, *kwargs.values())):
        raise StaysFloat("it has a second operand")
    return Curve(x, lambda reals: target(reals, *rest, **kwargs))  # type: ignore[operator]


def _few_codes(x: QValue) -> QValue:
    """The value itself; StaysFloat where a table of it would be too long."""
    if x.node.meta["val"].dtype == torch.int32:
        raise StaysFloat("its input has too many codes for a table: no quantizer of 16 bits or fewer stands before it")
    return x


def lower_curve(lowering: Lowering, node: fx.Node) -> Curve:
    """One op of a region (kdlsq_fx/regions.py): the function of the codes so far, with this op behind it"""
    source: QValue | None = None
    functions: dict[fx.Node, Callable[[torch.Tensor], torch.Tensor]] = {}
    for operand in node.all_input_nodes:
        value = lowering.values.get(operand)
        tensor = lowering.constant(operand)
        if isinstance(value, Curve):
            source, functions[operand] = value.operand, value.function
        elif tensor is not None and value is None:
            functions[operand] = lambda reals, t=tensor: t  # type: ignore[misc]
        else:
            source = _few_codes(lowering.per_tensor(operand))
            functions[operand] = lambda reals: reals
    if source is None:
        raise StaysFloat("it reads no codes")

    def function(reals: torch.Tensor) -> torch.Tensor:
        at = lambda n: functions[n](reals)  # noqa: E731
        made: torch.Tensor = node.target(*fx.node.map_arg(node.args, at), **fx.node.map_arg(node.kwargs, at))  # type: ignore[operator]
        return made

    return Curve(source, function)
