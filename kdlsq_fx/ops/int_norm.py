"""Layer normalisation in integers: mean, sum of squares, I-BERT's integer square root (papers 4.5), one rounding.

docs/integer_primitives.md is the specification; both forms of the integer op follow it step by step. Proved: the bounds
of the sum of squares (:func:`squares_bound`), of t (below), of the last product (:func:`norm_constants`). Enumerated:
the root around every square, from which all n < 2**32 follow (tests/test_nonlinear.py). Sampled against Python's
integers: rows of 1 to 1024 codes, and the rows that reach those bounds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_nonlinear import layer_norm_bounds
from kdlsq_fx.ops.emit_integer_curves import emit_layer_norm
from kdlsq_fx.ops.fixed_point import (
    numpy_round_divide,
    numpy_round_shift,
    random_codes,
    round_divide,
    round_shift,
)
from kdlsq_fx.ops.qdq import container, torch_container

Array = NDArray[Any]
SQRT_STEPS = 6
T_MAX = 2**24 + 2**10  # |y| / sqrt(v) <= 1, and the two floors (i_sqrt, 2**46 // r) add less than 2**-14 of that
SUM_LIMIT, V_LIMIT = 2**61, 2**62


def i_sqrt(n: torch.Tensor) -> torch.Tensor:
    """``floor(sqrt(n))`` for int64 ``0 <= n < 2**32``: Newton's steps from above, each kept only if it is smaller."""
    x = torch.bitwise_left_shift(torch.ones_like(n), (_bits(n) + 1) >> 1)
    for _ in range(SQRT_STEPS):
        x = torch.minimum(x, (x + torch.div(n, x.clamp(min=1), rounding_mode="floor")) >> 1)
    return x


def _bits(n: torch.Tensor) -> torch.Tensor:
    """Python's ``bit_length`` of int64 ``0 <= n < 2**62``; in two halves, each exact in float64."""
    high = n >> 31
    _, exponent = torch.frexp(torch.where(high > 0, high, n).double())
    return exponent.to(torch.int64) + (high > 0) * 31


def numpy_i_sqrt(n: Array) -> Array:
    """:func:`i_sqrt` in NumPy."""
    x = np.int64(1) << ((numpy_bits(n) + 1) // 2)
    for _ in range(SQRT_STEPS):
        x = np.minimum(x, (x + n // np.maximum(x, 1)) // 2)
    return x


def numpy_bits(n: Array) -> Array:
    """``bit_length`` in NumPy: how far the number can still be halved, by bisection."""
    bits, rest = np.zeros_like(n), n
    for step in (32, 16, 8, 4, 2, 1):
        large = (rest >> step) > 0
        bits = bits + large * step
        rest = np.where(large, rest >> step, rest)
    return bits + (rest > 0)


@dataclass(frozen=True)
class NormConstants:
    """What :func:`int_layer_norm` needs besides its input: ``gain`` and ``offset`` int64 ``[N]``, the rest ints."""

    gain: torch.Tensor
    offset: torch.Tensor
    fraction: int
    eps: int
    shift: int


def norm_constants(
    gamma: Any, beta: Any, n: int, scale_x: float, scale_out: float, eps: float, x_lo: int, x_hi: int
) -> NormConstants:
    """Constants of :func:`int_layer_norm` for rows of ``n`` codes ``x_lo..x_hi`` in steps of ``scale_x``.

    ``gamma``, ``beta``: float64 ``[n]`` (torch or NumPy) or None, for 1 and 0. ``scale_out``: step of the result.
    ValueError, with the reason, where no form keeps every intermediate below 2**62.
    """
    gamma64 = np.ones(n) if gamma is None else np.asarray(gamma, dtype=np.float64)
    beta64 = np.zeros(n) if beta is None else np.asarray(beta, dtype=np.float64)
    if not (np.isfinite(gamma64).all() and np.isfinite(beta64).all()):
        raise ValueError("the weight or the bias of a layer norm holds NaN or infinity")
    if not (math.isfinite(scale_out) and scale_out > 0):
        raise ValueError(f"the step of a layer norm's result must be finite and above 0, not {scale_out}")
    fraction, eps_codes = row_grid(n, scale_x, eps, x_lo, x_hi)
    with np.errstate(over="ignore"):  # an infinity is refused in _affine
        gain, offset, shift = _affine(gamma64 * math.sqrt(n) / scale_out / 2**24, beta64 / scale_out)
    return NormConstants(torch.from_numpy(gain), torch.from_numpy(offset), fraction, eps_codes, shift)


def row_grid(n: int, scale_x: float, eps: float, x_lo: int, x_hi: int) -> tuple[int, int]:
    """``(fraction, eps)``: the most bits of fraction for the mean with which a row provably fits, and eps in codes."""
    if not (math.isfinite(scale_x) and scale_x > 0):
        raise ValueError(f"the step of a layer norm's input must be finite and above 0, not {scale_x}")
    for fraction in range(8, -1, -1):
        eps_codes = eps * n * 4**fraction / scale_x / scale_x
        if not eps_codes < V_LIMIT:
            continue
        eps_int = max(1, round(eps_codes))
        sum_fits = (n * max(abs(x_lo), abs(x_hi))) << fraction < SUM_LIMIT
        if sum_fits and squares_bound(n, x_lo, x_hi, fraction) + eps_int < V_LIMIT:
            return fraction, eps_int
    raise ValueError(
        f"a layer norm over {n} codes {x_lo}..{x_hi} with eps {eps} in steps of {scale_x} does not fit 62 bits"
    )


def squares_bound(n: int, x_lo: int, x_hi: int, fraction: int) -> int:
    """Bound of ``sum(y * y)`` over ``n`` codes ``x_lo..x_hi``, ``y`` their distance from the mean in ``2**-fraction``.

    About its exact mean a row has at most ``n * (range / 2)**2`` (Popoviciu); the rounded mean, at most half a step
    off, adds at most ``n / 4``.
    """
    span = (x_hi - x_lo) << fraction
    return -(-n * (span * span + 1) // 4)


def _affine(gain: Array, offset: Array) -> tuple[Array, Array, int]:
    """``gain`` per step of t and ``offset``, both in codes, as integers with the largest shift that fits."""
    worst = float((np.abs(gain) * T_MAX + np.abs(offset)).max(initial=0.0))
    exponent = math.frexp(worst)[1] if math.isfinite(worst) else 2000
    for shift in range(min(56, 62 - exponent), 0, -1):  # a larger one surely does not fit
        whole = [np.rint(np.ldexp(v, shift)).astype(np.int64) for v in (gain, offset)]
        if all(T_MAX * abs(g) + abs(o) < SUM_LIMIT for g, o in zip(whole[0].tolist(), whole[1].tolist())):
            return whole[0], whole[1], shift
    raise ValueError(f"a layer norm's result would reach {worst:.3g} codes, which leaves no fraction in 61 bits")


def int_layer_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    fraction: int,
    eps: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Codes ``[..., N]`` to codes ``[..., N]``, normalised over the last dimension; constants: :func:`norm_constants`.

    A zero point of ``x`` drops out. A row of equal codes gives exactly its ``offset``.
    """
    y = centred(x, fraction)
    factor, h = inverse_root(y, eps)
    t = round_shift(y * factor, h + 22)
    q = round_shift(t * gain + offset, shift)
    return q.add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def centred(x: torch.Tensor, fraction: int) -> torch.Tensor:
    """Integers ``[..., N]`` less their mean, int64 in steps of ``2**-fraction``."""
    wide = x.to(torch.int64, copy=True).bitwise_left_shift_(fraction)
    return wide.sub_(round_divide(wide.sum(-1, keepdim=True), x.shape[-1]))


def inverse_root(y: torch.Tensor, eps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(f, h)`` int64 ``[..., 1]`` with ``f / 2**(46 + h)`` about ``1 / sqrt(sum(y * y) + eps)``."""
    v = (y * y).sum(-1, keepdim=True).add_(eps)
    h = (_bits(v) - 31) >> 1
    r = i_sqrt(torch.where(h < 0, v << (-2 * h).clamp(min=0), v >> (2 * h).clamp(min=0)))
    return torch.div(2**46, r, rounding_mode="floor"), h


def numpy_int_layer_norm(
    x: Array,
    gain: Array,
    offset: Array,
    fraction: int,
    eps: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Array:
    """:func:`int_layer_norm` in NumPy."""
    y, factor, h = numpy_rows(x, fraction, eps)
    t = numpy_round_shift(y * factor, 46 + h - 24)
    q = numpy_round_shift(t * gain + offset, shift) + zero_point
    return np.clip(q, qmin, qmax).astype(container(qmin, qmax))


def numpy_rows(x: Array, fraction: int, eps: int) -> tuple[Array, Array, Array]:
    """The centred row, f and h of :func:`int_layer_norm` in NumPy."""
    wide = x.astype(np.int64) << fraction
    y = wide - numpy_round_divide(np.asarray(wide.sum(axis=-1, keepdims=True)), x.shape[-1])
    v = np.sum(np.square(y), axis=-1, keepdims=True) + eps
    h = -((32 - numpy_bits(v)) // 2)  # ceil((bits - 32) / 2)
    scaled = np.where(h >= 0, v >> np.maximum(2 * h, 0), v << np.maximum(-2 * h, 0))
    return y, 2**46 // numpy_i_sqrt(scaled), h


def _int_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = random_codes(2, 3, 16, low=-(2**21), high=2**21, dtype=torch.int32)
    x[0, 0] = 5  # a row without variance
    gamma, beta = torch.linspace(-2, 2, 16).double(), torch.linspace(1, -1, 16).double()
    c = norm_constants(gamma, beta, 16, 1e-5, 0.02, 1e-12, -(2**21), 2**21 - 1)
    return (x, c.gain, c.offset, c.fraction, c.eps, c.shift, 3, -128, 127), {}


INT_LAYER_NORM = declare(
    Op(
        name="int_layer_norm",
        target=int_layer_norm,
        sig="code, int, int -> code",
        numpy=numpy_int_layer_norm,
        onnx=functools.partial(emit_layer_norm, sqrt_steps=SQRT_STEPS),
        bounds=functools.partial(layer_norm_bounds, t_max=T_MAX, squares=squares_bound),
        sample=_int_sample,
    )
)
