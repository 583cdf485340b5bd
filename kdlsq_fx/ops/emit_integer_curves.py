"""ONNX forms of the integer softmax, layer norm, GELU and mean; see emit_integer.py and docs/integer_primitives.md.

The constants of the polynomials are keywords, bound where an op is declared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .emit_integer import BIT64, Array, Constant, round_divide, round_shift, shift_right, to_codes, whole, wide

WIDE_BITS = 62  # every wide value stays below 2**62
HALF_BITS = (np.arange(WIDE_BITS + 1) - 31) >> 1  # h = ceil((bits - 32) / 2) of the layer norm, for every bits


def emit_softmax(
    g: Any,
    x: Any,
    keep: Any,
    table: Any,
    multiplier: int,
    shift: int,
    limit: int,
    divider: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    last_step: tuple[int, int],
    exponential: tuple[int, int, int, int],
) -> Any:
    """``last_step`` with and without a table; ``exponential``: LN2, A, B, C of the polynomial."""
    last = g.vector([-1])
    scores = wide(g, x)
    kept = scores if keep is None else g.Where(g.cast(keep, torch.bool), scores, whole(g, -(2**31)))
    below = g.Sub(g.ReduceMax(kept, last, keepdims=1), scores)
    below = g.Clip(below, whole(g, 0), whole(g, limit))  # below 0 only where a key is masked
    d = round_shift(g, g.Mul(below, whole(g, multiplier)), np.asarray(shift), g.constant)
    d = g.Min(d, whole(g, last_step[table is None]))
    e = _i_exp(g, d, *exponential) if table is None else g.cast(g.Gather(table, d, axis=0), torch.int64)
    if keep is not None:
        e = g.Mul(e, wide(g, keep))
    total = g.Max(g.ReduceSum(e, last, keepdims=1), whole(g, 1))  # 0 in a row without a key: 0 / 1
    p = round_divide(g, g.Mul(e, whole(g, divider)), g.Mul(total, whole(g, 2**22)))
    return to_codes(g, p, zero_point, qmin, qmax)


def _i_exp(g: Any, d: Any, ln2: int, a: int, b: int, c: int) -> Any:
    """I-BERT's i-exp: nothing in it but ``p`` is negative."""
    z = g.Div(d, whole(g, ln2))
    p = g.Sub(g.Mul(z, whole(g, ln2)), d)
    square = g.Add(g.Mul(p, g.Add(p, whole(g, b))), whole(g, c))
    e = g.Mul(shift_right(g, square, g.cast(z, BIT64)), whole(g, a))
    return shift_right(g, e, g.constant(np.asarray(28, np.uint64)))


def emit_layer_norm(
    g: Any,
    x: Any,
    gain: Any,
    offset: Any,
    fraction: int,
    eps: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    sqrt_steps: int,
) -> Any:
    """``sqrt_steps``: steps of i_sqrt."""
    y, factor, per_row = emit_rows(g, wide(g, x), g.known(x, -1), fraction, eps, sqrt_steps)
    t = round_shift(g, g.Mul(y, factor), 46 + HALF_BITS - 24, per_row)
    q = round_shift(g, g.Add(g.Mul(t, gain), offset), np.asarray(shift), g.constant)
    return to_codes(g, q, zero_point, qmin, qmax)


def emit_rows(g: Any, x: Any, n: int, fraction: int, eps: int, sqrt_steps: int) -> tuple[Any, Any, Constant]:
    """``y``, ``f`` of the layer norm of int64 ``x`` [..., n], and what picks from a table over ``bits(v)``, row by row.

    All that hangs on the size of v is such a table; that of h is HALF_BITS.
    """
    last = g.vector([-1])
    fine = g.Mul(x, whole(g, 1 << fraction)) if fraction else x
    y = g.Sub(fine, round_divide(g, g.ReduceSum(fine, last, keepdims=1), whole(g, n)))
    v = g.Add(g.ReduceSum(g.Mul(y, y), last, keepdims=1), whole(g, eps))
    bits = _bits(g, v)

    def per_row(array: Array) -> Any:
        return g.Gather(g.constant(array), bits, axis=0)

    return y, g.Div(whole(g, 2**46), _root(g, v, per_row, sqrt_steps)), per_row


def _bits(g: Any, v: Any) -> Any:
    """``bit_length`` of ``v`` [..., 1] below 2**62: how many powers of two it reaches."""
    powers = np.left_shift(np.int64(1), np.arange(WIDE_BITS))
    reached = g.cast(g.GreaterOrEqual(v, g.constant(powers)), torch.int64)
    return g.ReduceSum(reached, g.vector([-1]), keepdims=1)


def _root(g: Any, v: Any, per_row: Constant, steps: int) -> Any:
    """``i_sqrt(v / 4**h)``. The number has 31 or 32 bits, so Newton starts from ``2**16`` and never divides by 0."""
    enlarged = g.Mul(v, per_row(np.left_shift(np.int64(1), 2 * np.maximum(-HALF_BITS, 0))))
    n = shift_right(g, enlarged, per_row((2 * np.maximum(HALF_BITS, 0)).astype(np.uint64)))
    x = whole(g, 2**16)
    for _ in range(steps):
        x = g.Min(x, g.Div(g.Add(x, g.Div(n, x)), whole(g, 2)))
    return x


def emit_gelu(
    g: Any,
    x: Any,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    out_multiplier: int,
    out_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    knee: int,
    height: int,
    fraction: int,
) -> Any:
    """``knee``, ``height``, ``fraction``: B and C of i-GELU, and the bits that 1 + erf is cut by."""
    real = g.Sub(wide(g, x), whole(g, x_zero_point)) if x_zero_point else wide(g, x)
    t = round_shift(g, g.Mul(real, whole(g, multiplier)), np.asarray(shift), g.constant)
    half = emit_half_erf(g, t, knee, height, fraction)
    product = g.Mul(g.Mul(real, half), whole(g, out_multiplier))
    return to_codes(g, round_shift(g, product, np.asarray(out_shift), g.constant), zero_point, qmin, qmax)


def emit_half_erf(g: Any, t: Any, knee: int, height: int, fraction: int) -> Any:
    """``round((1 + erf) * height / 2**fraction)`` of int64 ``t``."""
    s = g.Sub(g.Min(g.Abs(t), whole(g, knee)), whole(g, knee))
    w = g.Add(g.Mul(g.Sign(t), g.Sub(whole(g, height), g.Mul(s, s))), whole(g, height))
    return round_shift(g, w, np.asarray(fraction), g.constant)


def emit_mean(
    g: Any, x: Any, keep: Any, x_zero_point: int, multiplier: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Any:
    tokens = g.vector([1])
    kept = g.Unsqueeze(wide(g, keep), g.vector([2]))
    real = g.Sub(wide(g, x), whole(g, x_zero_point)) if x_zero_point else wide(g, x)
    total = g.ReduceSum(g.Mul(real, kept), tokens, keepdims=0)
    count = g.Max(g.ReduceSum(kept, tokens, keepdims=0), whole(g, 1))
    q = round_divide(g, g.Mul(total, whole(g, multiplier)), g.Mul(count, whole(g, 1 << shift)))
    return to_codes(g, q, zero_point, qmin, qmax)
