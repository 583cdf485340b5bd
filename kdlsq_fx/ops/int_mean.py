"""Mean over the tokens that are there, in integers.

docs/integer_primitives.md is the specification; both forms follow it step by step. Proved: :func:`mean_constants` keeps
both operands of the division below 2**61. Sampled against Python's integers, with codes that reach that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from kdlsq_fx.errors import InputError, LoweringError
from kdlsq_fx.graph import site_of
from kdlsq_fx.lowering import Grid, Lowering, QValue
from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_nonlinear import mean_bounds
from kdlsq_fx.ops.emit_integer_curves import emit_mean
from kdlsq_fx.ops.fixed_point import MULTIPLIER_BITS, dyadic, numpy_round_divide, random_codes, round_divide
from kdlsq_fx.ops.lower_rules import on_grid
from kdlsq_fx.ops.qdq import container, torch_container
from kdlsq_fx.ranges import largest_size, magnitude

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


def masked_mean(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Float ``[batch, length, width]`` to ``[batch, width]``: the mean over tokens where ``keep`` is True.

    What :func:`int_mean` computes before its rounding; a text without a kept token gives 0.
    """
    kept = keep[:, :, None].to(x.dtype)
    return (x * kept).sum(1) / kept.sum(1).clamp(min=1)


def numpy_masked_mean(x: Array, keep: Array) -> Array:
    """:func:`masked_mean` in NumPy."""
    kept = keep[:, :, None].astype(x.dtype)
    out: Array = (x * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), x.dtype.type(1))
    return out


def emit_masked_mean(g: Any, x: Any, keep: Any) -> Any:
    """:func:`masked_mean` in ONNX."""
    kept = g.Unsqueeze(g.cast(keep, torch.float32), g.vector([-1]))
    count = g.Max(g.ReduceSum(kept, g.vector([1]), keepdims=0), g.constant(np.float32(1)))
    return g.Div(g.ReduceSum(g.Mul(x, kept), g.vector([1]), keepdims=0), count)


@dataclass(frozen=True)
class Mean:
    """A masked mean of codes, on the grid of the quantizer behind it."""

    x: QValue
    keep: fx.Node
    length: int

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        x = self.x
        try:
            constants = mean_constants(float(x.scale), grid.scale, self.length, magnitude(x.lo, x.hi, x.zero_point))
        except ValueError as err:
            raise LoweringError(
                str(err), where=site_of(node), do="give its input fewer bits, or calibrate again"
            ) from None
        ends = (grid.zero_point, grid.qmin, grid.qmax)
        dtype = torch_container(grid.qmin, grid.qmax)
        made = lowering.call(node, int_mean, x.node, self.keep, x.zero_point, *constants, *ends, dtype=dtype)
        return on_grid(made, grid)


def lower_masked_mean(lowering: Lowering, node: fx.Node) -> Mean:
    """masked_mean(x, keep) -> int_mean(x, keep), divided and rounded once"""
    x, keep = node.args[:2]
    value = lowering.per_tensor(x)
    length = largest_size(x.meta["val"].shape[1], LONGEST)  # type: ignore[union-attr]
    return Mean(value, keep, length)  # type: ignore[arg-type]


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
MASKED_MEAN = declare(
    Op(
        name="masked_mean",
        target=masked_mean,
        sig="act, mask -> act",
        numpy=numpy_masked_mean,
        onnx=emit_masked_mean,
        sample=lambda: ((_sample()[0][0].float() / 8, _sample()[0][1]), {}),
        lower=lower_masked_mean,
        why_float="a division by the number of tokens",
    )
)
