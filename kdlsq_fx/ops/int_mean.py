"""Mean over the tokens that are there, in integers.

docs/integer_primitives.md is the specification; both forms follow it step by step. Proved: :func:`mean_constants` keeps
both operands of the division below 2**61. Sampled against Python's integers, with codes that reach that.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.errors import InputError
from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_nonlinear import mean_bounds
from kdlsq_fx.ops.emit_integer_curves import emit_mean
from kdlsq_fx.ops.fixed_point import MULTIPLIER_BITS, dyadic, numpy_round_divide, random_codes, round_divide
from kdlsq_fx.ops.qdq import container, torch_container

Array = NDArray[Any]
PRODUCT_BITS = 61
FEWEST_BITS = 12
LONGEST = 2**20


def mean_constants(scale_x: float, scale_out: float, length: int, magnitude: int) -> tuple[int, int]:
    """``(multiplier, shift)`` of :func:`int_mean` for up to ``length`` tokens, ``|x - x_zero_point| <= magnitude``.

    ``length * magnitude * multiplier < 2**61`` and ``length << shift < 2**61``. ValueError where fewer than 12 bits are
    left for the multiplier, or the ratio of the steps is no positive number that fits.
    """
    bits = min(MULTIPLIER_BITS, PRODUCT_BITS - (length * magnitude).bit_length())
    if bits < FEWEST_BITS:
        raise ValueError(f"a mean over {length} codes of up to {magnitude} leaves {bits} bits for its multiplier")
    return dyadic(scale_x / scale_out, bits=bits, max_shift=PRODUCT_BITS - length.bit_length())


def int_mean(
    x: torch.Tensor,
    keep: torch.Tensor,
    x_zero_point: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Codes ``[batch, length, width]`` to codes ``[batch, width]``: the mean over tokens where ``keep`` is True.

    ``keep``: bool ``[batch, length]``. A text without a kept token gives ``zero_point``. InputError for more than
    2**20 tokens.
    """
    _demand_length(x.shape[1])
    kept = keep[:, :, None]
    total = ((x.to(torch.int64) - x_zero_point) * kept).sum(1)
    count = kept.sum(1).clamp_(min=1)
    q = round_divide(total * multiplier, count << shift)
    return q.add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def numpy_int_mean(
    x: Array, keep: Array, x_zero_point: int, multiplier: int, shift: int, zero_point: int, qmin: int, qmax: int
) -> Array:
    """:func:`int_mean` in NumPy: the zero point is taken off the sum, not off each code."""
    _demand_length(x.shape[1])
    count = np.count_nonzero(keep, axis=1)[:, None].astype(np.int64)
    total = np.sum(x, axis=1, dtype=np.int64, where=keep[:, :, None]) - count * x_zero_point
    q = numpy_round_divide(total * np.int64(multiplier), np.maximum(count, 1) << shift) + zero_point
    return np.clip(q, qmin, qmax).astype(container(qmin, qmax))


def _sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    keep = torch.tensor([[True] * 5, [True, True, False, True, False], [False] * 5])
    return (random_codes(3, 5, 7), keep, -4, *mean_constants(0.02, 0.01, 5, 132), 1, -128, 127), {}


def _demand_length(length: int) -> None:
    if length > LONGEST:
        raise InputError(f"a mean over {length} tokens can overflow", do=f"use at most {LONGEST} tokens")


INT_MEAN = declare(
    Op(
        name="int_mean",
        target=int_mean,
        sig="code, mask -> code",
        numpy=numpy_int_mean,
        onnx=emit_mean,
        bounds=functools.partial(mean_bounds, longest=LONGEST),
        sample=_sample,
    )
)
