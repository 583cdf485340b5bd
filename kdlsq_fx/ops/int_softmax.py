"""Softmax in integers, over keys that are there: a table of exponentials, or I-BERT's polynomial (papers 4.4).

docs/integer_primitives.md is the specification; both forms of the integer op follow it step by step. Proved: products
stay below 2**60 (:func:`score_grid`), ``e * divider`` below 2**61, ``sum(e) * 2**22`` below 2**58. Enumerated: the
table against 30-digit exponentials, and both forms at every step d. Sampled against Python's integers: rows of 1 to
512 keys, with the ends of 32 bits. How far it is from softmax: docs/integer_errors.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.errors import InputError
from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_nonlinear import softmax_bounds
from kdlsq_fx.ops.emit_integer_curves import emit_softmax
from kdlsq_fx.ops.fixed_point import (
    dyadic,
    numpy_round_divide,
    numpy_round_shift,
    random_acc,
    round_divide,
    round_shift,
)
from kdlsq_fx.ops.qdq import container, torch_container

Array = NDArray[Any]

TABLE_FRACTION, TABLE_LAST = 10, 2**14 - 1  # scores in steps of 2**-10, down to 16 below the largest: exp gives 0 there
POLYNOMIAL_FRACTION, POLYNOMIAL_LAST = 14, 2**18 - 1
TABLE_MAX_SHIFT, POLYNOMIAL_MAX_SHIFT = 44, 41  # (last + 1) * 2**shift + 2**31 stays below 2**60
LONGEST = 2**20
TABLE_NAME = "exp_table"  # one constant in the program, whatever the number of layers
INT32_MIN = -(2**31)

A0, A1 = 0.35815147, 0.96963238  # exp(p) is about A0 p**2 + A1 p + 1 on (-ln 2, 0]; I-BERT's code, not its paper
LN2 = round(math.log(2) * 2**POLYNOMIAL_FRACTION)
B = round(A1 / A0 * 2**POLYNOMIAL_FRACTION)
C = round(1 / A0 * 2 ** (2 * POLYNOMIAL_FRACTION))
A = round(A0 * 2**15)


@functools.cache
def exp_table() -> torch.Tensor:
    """int32 ``[2**14]``: ``rint(exp(-d / 2**10) * 2**15)``. One tensor for all callers: do not write to it."""
    entries = [round(math.exp(-d / 2**TABLE_FRACTION) * 2**15) for d in range(TABLE_LAST + 1)]
    return torch.tensor(entries, dtype=torch.int32)


def score_grid(scale_x: float, *, table: bool) -> tuple[int, int, int]:
    """``(multiplier, shift, limit)`` of :func:`int_softmax` for scores in steps of ``scale_x``.

    ``limit * multiplier < 2**60``: a difference of scores above ``limit`` has the exponential of the last step anyway.
    ValueError where ``scale_x`` is not positive, or so large that no multiplier of 31 bits holds it.
    """
    fraction, last, max_shift = (
        (TABLE_FRACTION, TABLE_LAST, TABLE_MAX_SHIFT)
        if table
        else (POLYNOMIAL_FRACTION, POLYNOMIAL_LAST, POLYNOMIAL_MAX_SHIFT)
    )
    multiplier, shift = dyadic(scale_x * 2**fraction, max_shift=max_shift)
    if multiplier == 0:  # all int32 differences are less than half a step
        return 0, shift, 2**32
    return multiplier, shift, min(2**32, -(-((last + 1) << shift) // multiplier))


def prob_divider(scale_p: float) -> int:
    """``round(2**22 / scale_p)``, the number of codes in probability 1 with 22 bits of fraction.

    ValueError outside ``1 <= divider < 2**46``.
    """
    divider = round(2**22 / scale_p) if math.isfinite(scale_p) and scale_p > 2.0**-30 else 0
    if not 1 <= divider < 2**46:
        raise ValueError(f"the step of probabilities must lie between 2**-24 and 2**22, not {scale_p}")
    return divider


def int_softmax(
    x: torch.Tensor,
    keep: torch.Tensor | None,
    table: torch.Tensor | None,
    multiplier: int,
    shift: int,
    limit: int,
    divider: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Scores int32 ``[..., n]`` to codes of probabilities ``[..., n]`` over the last dimension.

    ``keep``: bool that broadcasts to ``x``, True where a key is there; None keeps all. ``table``: :func:`exp_table`, or
    None for the polynomial. The integers come from :func:`score_grid` and :func:`prob_divider`. A row without a kept
    key gives ``zero_point`` everywhere. InputError for rows longer than 2**20.
    """
    _demand_length(x.shape[-1])
    scores = x.to(torch.int64)
    kept = scores if keep is None else torch.where(keep, scores, INT32_MIN)
    below = (kept.amax(-1, keepdim=True) - scores).clamp_(0, limit)
    last = POLYNOMIAL_LAST if table is None else TABLE_LAST
    d = round_shift(below * multiplier, shift).clamp_(max=last)
    e = i_exp(d) if table is None else table[d].to(torch.int64)
    if keep is not None:
        e = e * keep
    total = e.sum(-1, keepdim=True).clamp_(min=1)  # 0 in a row without a key: 0 / 1
    p = round_divide(e * divider, total * 2**22)
    return p.add_(zero_point).clamp_(qmin, qmax).to(torch_container(qmin, qmax))


def i_exp(d: torch.Tensor) -> torch.Tensor:
    """About ``exp(-d / 2**14) * 2**15``, int64 ``0 <= d < 2**18``: I-BERT's i-exp, algorithm 3."""
    z = torch.div(d, LN2, rounding_mode="floor")
    p = z * LN2 - d
    return (((p * (p + B) + C) >> z) * A) >> 28


def numpy_int_softmax(
    x: Array,
    keep: Array | None,
    table: Array | None,
    multiplier: int,
    shift: int,
    limit: int,
    divider: int,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Array:
    """:func:`int_softmax` in NumPy."""
    _demand_length(x.shape[-1])
    there = np.True_ if keep is None else keep
    top = np.max(x, axis=-1, keepdims=True, initial=np.iinfo(x.dtype).min, where=there)
    below = np.maximum(np.subtract(top, x, dtype=np.int64), 0)  # below 0 only where a key is masked
    d = numpy_round_shift(np.minimum(below, limit) * np.int64(multiplier), shift)
    if table is None:
        e = numpy_i_exp(np.minimum(d, POLYNOMIAL_LAST))
    else:
        e = np.take(table, np.minimum(d, TABLE_LAST)).astype(np.int64)
    e = np.where(there, e, 0)
    total = np.maximum(np.sum(e, axis=-1, keepdims=True), 1) << 22
    return np.clip(numpy_round_divide(e * divider, total) + zero_point, qmin, qmax).astype(container(qmin, qmax))


def numpy_i_exp(d: Array) -> Array:
    """:func:`i_exp` in NumPy."""
    z, rest = np.divmod(d, LN2)
    square = rest * (rest - B) + C  # p = -rest
    return np.right_shift(np.right_shift(square, z) * A, 28)


def _demand_length(length: int) -> None:
    if length > LONGEST:
        raise InputError(f"a softmax over {length} keys can overflow", do=f"use at most {LONGEST} keys")


def keep_sample() -> torch.Tensor:
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[0, ..., 5:] = False
    return keep


def _int_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    multiplier, shift, limit = score_grid(1e-3, table=True)
    scores = random_acc(2, 3, 4, 9) >> 19  # +-4096 steps
    return (scores, keep_sample(), exp_table(), multiplier, shift, limit, prob_divider(1 / 255), 0, 0, 255), {}


INT_SOFTMAX = declare(
    Op(
        name="int_softmax",
        target=int_softmax,
        sig="int, mask, int -> code",
        numpy=numpy_int_softmax,
        onnx=functools.partial(emit_softmax, last_step=(TABLE_LAST, POLYNOMIAL_LAST), exponential=(LN2, A, B, C)),
        bounds=functools.partial(
            softmax_bounds, i_exp=numpy_i_exp, lasts=(TABLE_LAST, POLYNOMIAL_LAST), longest=LONGEST
        ),
        sample=_int_sample,
    )
)
