"""Fixed point: how a 32-bit accumulator, or a sum of several, becomes codes. Rounded once, half to even.

The multiplier-and-shift of I-BERT and HAWQ-V3 (papers 4.6), but with an exact tie rule: adding half and shifting would
round half up, and differ from ``quantize`` and ONNX QuantizeLinear at every tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_integer import add_bounds, requantize_bounds
from kdlsq_fx.ops.emit_integer import emit_add, emit_requantize
from kdlsq_fx.ops.qdq import along, container, torch_container

Array = NDArray[Any]
MULTIPLIER_BITS = 31
MAX_SHIFT = 62


def dyadic(ratio: float, bits: int = MULTIPLIER_BITS, max_shift: int = MAX_SHIFT) -> tuple[int, int]:
    """``ratio`` as ``(multiplier, shift)``: ``multiplier / 2**shift`` with 31 significant bits (I-BERT 4.6, HAWQ-V3).

    ``0 <= multiplier < 2**bits``, ``1 <= shift <= max_shift``; relative error at most 2**-bits, or absolute
    2**-(max_shift + 1) where the shift is at its end (at 62 such a ratio takes every int32 to 0). ValueError for ratios
    that are not finite, positive, < 2**(bits - 1).
    """
    if not (math.isfinite(ratio) and 0 < ratio < 2.0 ** (bits - 1)):
        raise ValueError(f"a ratio of scales must be finite, above 0 and below 2**{bits - 1}, not {ratio}")
    mantissa, exponent = math.frexp(ratio)
    shift = min(bits - exponent, max_shift)
    multiplier = round(math.ldexp(mantissa, exponent + shift))
    if multiplier == 2**bits:  # 0.11...1 rounded up to the next power of two
        multiplier, shift = multiplier // 2, shift - 1
    if shift < 1:
        raise ValueError(f"a ratio of scales must be below 2**{bits - 1}, not {ratio}")
    return multiplier, shift


def round_shift(value: torch.Tensor, shift: int | torch.Tensor) -> torch.Tensor:
    """``value / 2**shift`` rounded half to even; int64 with ``|value| <= 2**62``, ``1 <= shift <= 62``."""
    half = (1 << shift) // 2 if isinstance(shift, int) else torch.bitwise_left_shift(torch.ones_like(shift), shift - 1)
    # Adding half - 1, and 1 more when the floor is odd, carries exactly where half-to-even rounds up.
    odd = (value >> shift).bitwise_and_(1)
    return odd.add_(half - 1).add_(value).bitwise_right_shift_(shift)


def numpy_round_shift(value: Array, shift: int | Array) -> Array:
    """:func:`round_shift` in NumPy, by floor and remainder."""
    floor = np.right_shift(value, shift)
    twice_rest = (value - np.left_shift(floor, shift)) << 1
    unit = np.left_shift(np.int64(1), shift)
    rounds_up = (twice_rest > unit) | ((twice_rest == unit) & (floor % 2 == 1))
    return floor + rounds_up


def round_divide(n: torch.Tensor, d: int | torch.Tensor) -> torch.Tensor:
    """``n / d`` rounded half to even; int64 with ``|n| < 2**61``, ``0 < d < 2**61``; ``d`` an int or broadcasts."""
    floor = torch.div(n, d, rounding_mode="floor")
    twice_rest = (n - floor * d) * 2
    # An even floor takes a tie, an odd one gives it away: both in one comparison of integers.
    return floor + (twice_rest + (floor & 1) > d)


def numpy_round_divide(n: Array, d: int | Array) -> Array:
    """:func:`round_divide` in NumPy: half up, then back by one where that was a tie and came out odd."""
    half_up, rest = np.divmod(2 * n + d, 2 * np.asarray(d, dtype=np.int64))
    fixed: Array = half_up - ((rest == 0) & (half_up % 2 == 1))
    return fixed


def requantize(
    acc: torch.Tensor,
    multiplier: int | torch.Tensor,
    shift: int | torch.Tensor,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> torch.Tensor:
    """int32 accumulators to codes: ``clamp(round_half_even(acc * multiplier / 2**shift) + zero_point, qmin, qmax)``.

    ``multiplier`` and ``shift`` from :func:`dyadic`: ints, or int64 ``[channels]`` along ``axis``.
    """
    m = multiplier if isinstance(multiplier, int) else along(multiplier, acc.ndim, axis)
    s = shift if isinstance(shift, int) else along(shift, acc.ndim, axis)
    q = round_shift(acc.to(torch.int64) * m, s)
    return q.add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def numpy_requantize(
    acc: Array, multiplier: Any, shift: Any, zero_point: int, qmin: int, qmax: int, axis: int = -1
) -> Array:
    """:func:`requantize` in NumPy."""
    m, s = (v if isinstance(v, int) else along(v, acc.ndim, axis) for v in (multiplier, shift))
    q = numpy_round_shift(np.multiply(acc, m, dtype=np.int64), s)
    return np.clip(q + zero_point, qmin, qmax).astype(container(qmin, qmax))


def int_add(
    terms: Sequence[torch.Tensor],
    multipliers: Sequence[int | torch.Tensor],
    zero_points: Sequence[int],
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> torch.Tensor:
    """Codes or accumulators brought to one fixed point, added, and rounded once.

    ``clamp(round_half_even(sum_i (terms[i] - zero_points[i]) * multipliers[i] / 2**shift) + zero_point, qmin, qmax)``.
    A multiplier is an int, int64 ``[channels]`` along ``axis``, or a tensor that broadcasts. The lowering chooses the
    shift so that the sum stays below 2**62.
    """
    total: Any = 0
    for term, multiplier, term_zero in zip(terms, multipliers, zero_points, strict=True):
        m = along(multiplier, term.ndim, axis) if _is_vector(multiplier) else multiplier
        total = total + (term.to(torch.int64) - term_zero) * m
    return round_shift(total, shift).add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def numpy_int_add(
    terms: Sequence[Array],
    multipliers: Sequence[Any],
    zero_points: Sequence[int],
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int = -1,
) -> Array:
    """:func:`int_add` in NumPy."""
    scaled = [
        np.multiply(np.subtract(t, z, dtype=np.int64), along(m, t.ndim, axis) if _is_vector(m) else m, dtype=np.int64)
        for t, m, z in zip(terms, multipliers, zero_points, strict=True)
    ]
    total = scaled[0]
    for value in scaled[1:]:
        total = np.add(total, value)
    return np.clip(numpy_round_shift(total, shift) + zero_point, qmin, qmax).astype(container(qmin, qmax))


def _is_vector(multiplier: Any) -> bool:
    return getattr(multiplier, "ndim", 0) == 1


def random_codes(*shape: int, low: int = -128, high: int = 128, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)


def random_acc(*shape: int) -> torch.Tensor:
    return random_codes(*shape, low=-(2**31), high=2**31, dtype=torch.int32)


REQUANTIZE = declare(
    Op(
        name="requantize",
        target=requantize,
        sig="int, int, int -> code",
        numpy=numpy_requantize,
        onnx=emit_requantize,
        bounds=requantize_bounds,
        sample=lambda: ((random_acc(3, 8), torch.arange(2**30, 2**30 + 8), torch.arange(50, 58), 3, -128, 127), {}),
    )
)
INT_ADD = declare(
    Op(
        name="int_add",
        target=int_add,
        sig="int, int -> code",
        numpy=numpy_int_add,
        onnx=emit_add,
        bounds=add_bounds,
        sample=lambda: (
            ([random_acc(3, 8), random_codes(3, 8)], [2**20, 2**29], [0, 5], 30, 0, -(2**21), 2**21 - 1),
            {},
        ),
    )
)
