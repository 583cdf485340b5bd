"""What an integer can become: bounds of codes and of 32-bit accumulators, from the codes of the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.errors import LoweringError

Array = NDArray[Any]
INT32_MAX = 2**31 - 1
FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53


@dataclass(frozen=True)
class Interval:
    """Integers ``lo <= v <= hi`` that a tensor can hold.

    ``sizes``: the largest length of each of its dimensions, None where nothing bounds it. ``values``: the integers
    themselves where the tensor is a constant.
    """

    lo: int
    hi: int
    sizes: tuple[int | None, ...] = ()
    values: Array | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Bound:
    """Something inside a primitive that lies in ``low..high`` and must lie in ``least..limit``.

    ``least`` None stands for ``-limit``: an accumulator or an intermediate. With ``least`` it is a condition on a
    constant, an index or a count.
    """

    name: str
    low: int
    high: int
    limit: int
    least: int | None = None

    @property
    def fits(self) -> bool:
        least = -self.limit if self.least is None else self.least
        return least <= self.low and self.high <= self.limit

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Bounds:
    """What an op's rule says: its result lies in ``lo..hi`` if all that is inside it fits."""

    lo: int
    hi: int
    inside: tuple[Bound, ...] = ()


def magnitude(lo: int, hi: int, zero_point: int = 0) -> int:
    """Largest ``|code - zero_point|`` for codes in ``lo..hi``."""
    return max(abs(lo - zero_point), abs(hi - zero_point))


def dot_bound(weight: NDArray[Any], x_max: int, bias: NDArray[Any] | None = None) -> int:
    """Bound on any partial sum of ``sum_k x[k] * weight[row, ...] + bias[row]`` for ``|x[k]| <= x_max``, in any order.

    ``weight``: integer codes, first axis the outputs; ``bias``: ``[rows]`` integers. The sum of magnitudes is a bound
    whatever the order of the additions, so it also covers blocked, vectorised and fused accumulation.
    """
    rows = np.abs(weight.astype(np.int64)).reshape(weight.shape[0], -1).sum(axis=1) * x_max
    if bias is not None:
        rows = rows + np.abs(bias.astype(np.int64))
    return int(rows.max(initial=0))


def product_bound(length: int, a_max: int, b_max: int) -> int:
    """Bound on any partial sum of an inner product of ``length`` terms with ``|a| <= a_max``, ``|b| <= b_max``."""
    return length * a_max * b_max


def demand_int32(bound: int, site: str) -> int:
    """``bound`` itself; LoweringError naming the site and the bound when it does not fit a 32-bit accumulator."""
    if bound > INT32_MAX:
        raise LoweringError(
            f"the 32-bit accumulator can overflow: its bound is {bound}, the largest int32 is {INT32_MAX}",
            where=site,
            do="use fewer bits for the weights or the activations of this site, or leave it in float by a rule",
        )
    return bound


def gemm_dtype(bound: int) -> str:
    """The float dtype in which products and sums of integers up to ``bound`` are exact: ``float32`` or ``float64``."""
    if bound >= FLOAT64_EXACT:
        raise ValueError(f"sums up to {bound} are exact in no float dtype")
    return "float32" if bound < FLOAT32_EXACT else "float64"


def largest_size(size: int | torch.SymInt, fallback: int) -> int:
    """Upper bound of a dimension: itself, the largest value capture allowed for it, or ``fallback`` if unbounded."""
    if isinstance(size, int):
        return size
    try:
        upper = size.node.shape_env.bound_sympy(size.node.expr).upper
        return min(int(upper), fallback)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return fallback
