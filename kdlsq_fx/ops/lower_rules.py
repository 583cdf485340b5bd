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
from ..graph import is_product, site_of
from ..lowering import Array, Grid, Lowering, QValue, StaysFloat, Value, array
from ..masks import tokens_there
from ..ranges import INT32_MAX, magnitude
from .bounds_integer import times
from .fixed_point import MAX_SHIFT, dyadic, int_add, requantize
from .integer import int_embedding, int_mul, lookup
from .qdq import quantize, torch_container

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """Terms to be added in one fixed point and rounded once, by the quantizer behind the sum.

    Scales of channels run along one dimension, counted from the end, in all terms that have any. Such a scale may be 0
    or negative here: its sign goes into the multiplier.
    """

    terms: tuple[QValue, ...]

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        ratios = [t.scale / grid.scale for t in self.terms]
        shift = _shift(self.terms, ratios, site_of(node))
        factors = [np.rint(r * 2.0**shift).astype(np.int64) for r in ratios]
        multipliers = [_multiplier(lowering, node, t, f, i) for i, (t, f) in enumerate(zip(self.terms, factors))]
        terms, zeros = [t.node for t in self.terms], [t.zero_point for t in self.terms]
        axis = next((t.axis for t in self.terms if t.axis is not None), -1)
        ends = (grid.zero_point, grid.qmin, grid.qmax, *(() if axis == -1 else (axis,)))
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
    if value.zero_point or value.rows is not None or (value.scale <= 0).any():
        return Sum((_from_end(value),)).quantized(lowering, node, grid)
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
    if not all(np.isfinite(r).all() for r in ratios):
        raise LoweringError("a scale is not finite", where=site, do="look for NaN in training")
    factors = [float(np.abs(r).max()) for r in ratios]
    largest = sum(magnitude(t.lo, t.hi, t.zero_point) * f for t, f in zip(terms, factors))
    shift = min(MAX_SHIFT - 1, MAX_SHIFT - 1 - int(np.ceil(np.log2(max(largest, 1e-300)))))
    if shift < 1:
        raise LoweringError(
            f"the terms of this sum reach {largest:.3g} steps of its quantizer, too many for 62 bits",
            where=site,
            do="calibrate again: the scale of the sum is far too small",
        )
    ceiling = int(MAX_SHIFT - np.ceil(np.log2(max(*factors, 1e-300))) - 1)
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
    return lowering.store(node, f"multiplier_{index}", torch.from_numpy(factor))


def lower_add(lowering: Lowering, node: fx.Node) -> Sum:
    """add(a, b) -> the terms of a and b, to be rounded once by the quantizer behind; b may be a constant vector"""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise StaysFloat("its second operand is scaled")
    terms = [t for operand in node.args for t in _terms(lowering, node, operand)]
    if all(lowering.constant(operand) is not None for operand in node.args if isinstance(operand, fx.Node)):
        raise StaysFloat("it reads no codes")
    if len({t.axis for t in terms} - {None}) > 1:
        raise StaysFloat("its operands have scales along different dimensions")
    return Sum(tuple(terms))


def _terms(lowering: Lowering, node: fx.Node, operand: Any) -> tuple[QValue, ...]:
    """What an operand adds to a sum; a constant ``c`` is the code 1 with the scale ``c``, so it is rounded once too."""
    value = lowering.values.get(operand) if isinstance(operand, fx.Node) else None
    if isinstance(value, Sum):
        return value.terms
    if value is None and (constant := _vector(lowering, node, operand)) is not None:
        numbers, axis = constant
        if not numbers.any():
            return ()
        one = lowering.store(node, "one", torch.ones([1] * -(axis or -1), dtype=torch.int8))
        return (QValue(one, numbers, 1, 1, axis=axis),)
    return (_from_end(lowering.codes(operand)),)


def _from_end(value: QValue) -> QValue:
    """The value with its axis counted from the end, so that terms of several ranks agree about it."""
    return value if value.axis is None or value.axis < 0 else replace(value, axis=value.axis - _rank(value))


def _rank(value: QValue) -> int:
    return int(value.node.meta["val"].ndim)


def _vector(lowering: Lowering, node: fx.Node, operand: Any) -> tuple[Array, int | None] | None:
    """A constant operand in float64 and the dimension that it runs along: 0-d and None, or 1-d and a number below 0.

    None where the operand is neither a number nor one number a channel.
    """
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return np.asarray(float(operand)), None
    tensor = lowering.constant(operand)
    if tensor is None or not tensor.is_floating_point():
        return None
    numbers = array(tensor).astype(np.float64)
    long = [i - tensor.ndim for i, size in enumerate(tensor.shape) if size != 1]
    if not long:
        return numbers.reshape(()), None
    fits = len(long) == 1 and str(node.meta["val"].shape[long[0]]) == str(numbers.size)
    return (numbers.reshape(-1), long[0]) if fits else None


def lower_scaled(lowering: Lowering, node: fx.Node) -> QValue | Sum:
    """mul(x, number or one a channel), div(x, ...) -> x with other scales: no operation at all

    mul(x, mask) with a mask of zeros and ones -> the codes of x, and that of zero where nothing is there.
    mul(x, y) of two computed values -> int_mul.
    """
    left, right = node.args[:2]
    is_div = "div" in str(node.target)
    if not is_div and (there := tokens_there(right)) is not None:
        return _masked(lowering, node, lowering.per_tensor(left), there)
    if not is_div and _vector(lowering, node, left) is not None:
        left, right = right, left
    if is_product(node):
        return _product(lowering, node)
    constant = _vector(lowering, node, right)
    if constant is None:
        raise StaysFloat(_why_not_scaled(lowering, right))
    factor, axis = constant
    if not np.isfinite(factor).all() or (factor.ndim == 0 and factor <= 0) or (is_div and not factor.all()):
        raise StaysFloat(f"it scales by {factor}")
    value = lowering.values.get(left) if isinstance(left, fx.Node) else None
    if isinstance(value, Sum):
        return Sum(tuple(_scaled(term, factor, axis, is_div) for term in value.terms))
    return _scaled(lowering.codes(left), factor, axis, is_div)


def _product(lowering: Lowering, node: fx.Node) -> QValue:
    """mul(x, y), both computed -> int_mul(x, y) with the scale ``s_x * s_y``: exact, in 32 bits"""
    a, b = (lowering.per_tensor(operand) for operand in node.args[:2])
    low, high = times((a.lo - a.zero_point, a.hi - a.zero_point), (b.lo - b.zero_point, b.hi - b.zero_point))
    if max(-low, high) > INT32_MAX:
        raise StaysFloat(
            "the product of its operands can leave 32 bits: a rule must quantize both, at 16 bits or fewer"
        )
    made = lowering.call(node, int_mul, a.node, b.node, a.zero_point, b.zero_point, dtype=torch.int32)
    return QValue(made, a.scale * b.scale, low, high)


def _why_not_scaled(lowering: Lowering, factor: Any) -> str:
    if factor in lowering.hidden and lowering.constant(factor) is None:
        return "it scales by floats that are made from positions or masks"
    if lowering.constant(factor) is not None:
        return "it scales by a constant that is neither a number nor one number a channel"
    return "it divides by a computed value: no primitive does that element by element"


def _masked(lowering: Lowering, node: fx.Node, value: QValue, there: fx.Node) -> QValue:
    absent = lowering.call(node, aten.eq.Scalar, there, 0, dtype=torch.bool, site=f"{site_of(node)}/absent")
    absent.meta["val"] = there.meta["val"].detach().to(torch.bool)
    dtype = value.node.meta["val"].dtype
    made = lowering.call(node, aten.masked_fill.Scalar, value.node, absent, value.zero_point, dtype=dtype)
    low, high = min(value.lo, value.zero_point), max(value.hi, value.zero_point)
    return replace(value, node=made, lo=low, hi=high, codes=None)


def _scaled(value: QValue, factor: Array, axis: int | None, is_div: bool) -> QValue:
    if factor.ndim and (value.rows is not None or _from_end(value).axis not in (None, axis)):
        raise StaysFloat("it scales every channel of an operand whose scales belong to another dimension")
    scale = value.scale / factor if is_div else value.scale * factor
    if factor.ndim == 0:
        return replace(value, scale=scale, codes=None)
    return replace(value, scale=scale, axis=axis, codes=None)


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
