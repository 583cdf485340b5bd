"""ONNX forms of the float twins of the integer softmax, layer norm and GELU, for QDQ files of the integer placement.

The same integers inside as the twins have, so a QDQ file rounds where training did; runtimes fuse none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .emit_integer import Array, known
from .emit_integer_curves import HALF_BITS, emit_half_erf, emit_rows


def emit_masked_softmax(
    g: Any, x: Any, keep: Any, dim: int, exp: str = "table", *, grids: dict[str, tuple[int, int]], table: Any
) -> Any:
    """``grids``: bits of fraction and last step by ``exp``; ``table(exp)``: the exponential of every step, float32."""
    fraction, last_step = grids[exp]
    axis, lowest = g.vector([dim]), g.constant(np.float32(np.finfo(np.float32).min))
    kept = x if keep is None else g.Where(g.cast(keep, torch.bool), x, lowest)
    below = g.Mul(g.Sub(g.ReduceMax(kept, axis, keepdims=1), kept), g.constant(np.float32(2**fraction)))
    d = g.Round(g.Min(below, g.constant(np.float32(last_step))))
    e = g.Gather(_shared(g, f"exp_{exp}", table(exp)), g.cast(d, torch.int64), axis=0)
    if keep is not None:
        e = g.Mul(e, g.cast(keep, torch.float32))
    return g.Div(e, g.Max(g.ReduceSum(e, axis, keepdims=1), g.constant(np.float32(1))))


def _shared(g: Any, name: str, array: Array) -> Any:
    """One constant, however many nodes read it."""
    return g.initializers.get(name) or g.constant(array, name)


def emit_integer_norm(
    g: Any,
    x: Any,
    shape: Sequence[int],
    weight: Any,
    bias: Any,
    eps: float,
    scale: Any,
    qmin: int,
    qmax: int,
    *,
    row_grid: Callable[[int, float, float, int, int], tuple[int, int]],
    sqrt_steps: int,
) -> Any:
    """``row_grid``: fraction and eps in codes of a row, from its length, step, eps and ends."""
    n = int(shape[0])
    step = known(g, scale, "the step of a layer norm's input").astype(np.float32)
    fraction, eps_codes = row_grid(n, float(step), eps, qmin, qmax)
    codes = g.cast(g.Round(g.Div(x, g.constant(step))), torch.int64)
    y, factor, per_row = emit_rows(g, codes, n, fraction, eps_codes, sqrt_steps)
    unit = per_row(np.ldexp(math.sqrt(n), -46 - HALF_BITS))
    out = g.Mul(g.cast(y, torch.float32), g.cast(g.Mul(g.cast(factor, torch.float64), unit), torch.float32))
    out = out if weight is None else g.Mul(out, weight)
    return out if bias is None else g.Add(out, bias)


def emit_polynomial_gelu(g: Any, x: Any, *, knee: int, height: int, fraction: int, erf_a: float) -> Any:
    steps = g.Round(g.Mul(x, g.constant(np.float32(2**fraction / math.sqrt(2)))))
    steps = g.Clip(steps, g.constant(np.float32(-knee)), g.constant(np.float32(knee)))
    half = g.cast(emit_half_erf(g, g.cast(steps, torch.int64), knee, height, fraction), torch.float32)
    return g.Mul(g.Mul(half, g.constant(np.float32(erf_a / 2 * 2.0**-fraction))), x)
