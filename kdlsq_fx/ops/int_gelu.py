"""GELU in integers for codes of many bits: I-BERT's i-GELU, a polynomial for erf (papers 4.3). Few bits take a table.

docs/integer_primitives.md is the specification; both forms of the integer op follow it step by step. Proved: codes
of 22 bits, with any zero point of theirs, keep the last product below 2**62: 2**22 * 28366 * 2**24. Enumerated against
Python's integers: all 8-bit codes on sampled grids, all 16-bit codes on two. Its error: docs/integer_errors.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_nonlinear import gelu_bounds
from kdlsq_fx.ops.emit_integer_curves import emit_gelu
from kdlsq_fx.ops.fixed_point import dyadic, numpy_round_shift, random_codes, round_shift
from kdlsq_fx.ops.qdq import container, torch_container

Array = NDArray[Any]

FRACTION = 12  # x / sqrt(2) in steps of 2**-12
ERF_A, ERF_B = 0.2888, 1.769  # erf(x) is about sign(x) * (1 - ERF_A * (min(|x|, ERF_B) - ERF_B)**2)
B = round(ERF_B * 2**FRACTION)
C = round(2 ** (2 * FRACTION) / ERF_A)
OUT_BITS = 24  # codes of 23 bits times 1 + erf in 15 bits times this stay below 2**62


def gelu_constants(scale_x: float, scale_out: float) -> tuple[int, int, int, int]:
    """``(multiplier, shift, out_multiplier, out_shift)`` of :func:`int_gelu`, from the steps of input and result.

    ValueError for steps that are not positive, or so far apart that no multiplier holds their ratio.
    """
    to_erf = dyadic(scale_x / math.sqrt(2) * 2**FRACTION)
    to_out = dyadic(scale_x / 2 * ERF_A * 2.0**-FRACTION / scale_out, bits=OUT_BITS)
    return *to_erf, *to_out


def int_gelu(
    x: torch.Tensor,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    out_multiplier: int,
    out_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Codes of up to 22 bits, any shape, to codes of ``gelu`` of what they stand for; constants: gelu_constants."""
    real = x.to(torch.int64) - x_zero_point
    w = one_plus_erf(round_shift(real * multiplier, shift))
    q = round_shift(real * round_shift(w, FRACTION) * out_multiplier, out_shift)
    return q.add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def one_plus_erf(t: torch.Tensor) -> torch.Tensor:
    """``(1 + erf(t / 2**12)) * C``, 0 to 2 C, in integers."""
    s = t.abs().clamp_(max=B).sub_(B)
    return t.sign().mul_(C - s * s).add_(C)


def numpy_int_gelu(
    x: Array,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    out_multiplier: int,
    out_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Array:
    """:func:`int_gelu` in NumPy."""
    real = np.subtract(x, x_zero_point, dtype=np.int64)
    half = numpy_half_erf(numpy_round_shift(real * np.int64(multiplier), shift))
    q = numpy_round_shift(real * half * np.int64(out_multiplier), out_shift) + zero_point
    return np.clip(q, qmin, qmax).astype(container(qmin, qmax))


def numpy_half_erf(t: Array) -> Array:
    """``round((1 + erf) * C / 2**12)`` in NumPy: one branch for each sign of ``t``."""
    gap = np.maximum(B - np.abs(t), 0)
    tail = C - np.square(gap)
    w = np.where(t > 0, C + tail, np.where(t < 0, C - tail, C))
    return numpy_round_shift(w, FRACTION)


def _int_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = random_codes(3, 50, low=-(2**15), high=2**15, dtype=torch.int16)
    return (x, 5, *gelu_constants(2e-4, 0.03), -100, -128, 127), {}


INT_GELU = declare(
    Op(
        name="int_gelu",
        target=int_gelu,
        sig="code -> code",
        numpy=numpy_int_gelu,
        onnx=functools.partial(emit_gelu, knee=B, height=C, fraction=FRACTION),
        bounds=functools.partial(gelu_bounds, knee=B, height=C, fraction=FRACTION),
        sample=_int_sample,
    )
)
