"""Softmax and log-softmax over one dimension; the softmax that training sees where the integers will take it.

``masked_softmax`` is the float twin of :func:`kdlsq_fx.ops.int_softmax.int_softmax`, and is lowered to it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.autograd.function import once_differentiable

from ..errors import LoweringError
from ..graph import site_of
from ..lowering import Grid, Lowering, QValue
from ..masks import masked_scores
from ..op import Op, declare
from .emit_integer_twins import emit_masked_softmax
from .fixed_point import random_acc
from .int_softmax import (
    POLYNOMIAL_FRACTION,
    POLYNOMIAL_LAST,
    TABLE_FRACTION,
    TABLE_LAST,
    TABLE_NAME,
    exp_table,
    i_exp,
    int_softmax,
    keep_sample,
    numpy_i_exp,
    prob_divider,
    score_grid,
)
from .lower_rules import on_grid
from .qdq import torch_container

aten = torch.ops.aten
Array = NDArray[Any]


def numpy_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    """Probabilities along ``dim``; a row of -inf alone gives NaN, as torch does."""
    x = x if dtype is None else x.astype(dtype)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        exp = np.exp(x - x.max(axis=dim, keepdims=True))
    out: Array = exp / exp.sum(axis=dim, keepdims=True)
    return out


def numpy_log_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    """Logarithms of :func:`numpy_softmax`, without its underflow."""
    x = x if dtype is None else x.astype(dtype)
    shifted = x - x.max(axis=dim, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return out


def _sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7) * 4
    x[0, :, :, 4:] += torch.finfo(torch.float32).min  # padded keys
    return (x, -1), {}


SOFTMAX = declare(
    Op(
        name="softmax",
        target=aten.softmax.int,
        sig="wide -> prob",
        numpy=numpy_softmax,
        onnx=lambda g, x, dim, dtype=None: g.Softmax(g.cast(x, dtype or g.dtype), axis=dim),
        sample=_sample,
        why_float="the exponential and the division run in floats",
    )
)
LOG_SOFTMAX = declare(
    Op(
        name="log_softmax",
        target=aten.log_softmax.int,
        sig="float -> float",
        numpy=numpy_log_softmax,
        onnx=lambda g, x, dim, dtype=None: g.LogSoftmax(g.cast(x, dtype or g.dtype), axis=dim),
        sample=lambda: ((torch.linspace(-9, 9, 24).reshape(2, 3, 4), 1), {}),
        why_float="a logarithm of sums of exponentials",
    )
)


@functools.cache
def _float_table(exp: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The integers the op takes for ``exp(-d / 2**F) * 2**15``, for every ``d``."""
    steps = exp_table() if exp == "table" else i_exp(torch.arange(POLYNOMIAL_LAST + 1))
    return steps.to(device, dtype)


class _MaskedSoftmax(torch.autograd.Function):
    """Keeps the probabilities only: softmax's gradient is ``p * (g - sum(g * p))``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor | None, dim: int, exp: str) -> torch.Tensor:
        fraction, last = (TABLE_FRACTION, TABLE_LAST) if exp == "table" else (POLYNOMIAL_FRACTION, POLYNOMIAL_LAST)
        # the lowest float, not -inf: a row without a key must give 0, and inf - inf is NaN
        kept = x if keep is None else torch.where(keep, x, torch.finfo(x.dtype).min)
        top = kept.amax(dim, keepdim=True)
        d = (top - kept).mul_(2.0**fraction).clamp_(max=last).round_()
        index = d.to(torch.int32).clamp_(0, last)  # NaN becomes some integer here, and NaN again below
        e = _float_table(exp, x.dtype, x.device).index_select(0, index.reshape(-1)).reshape(x.shape)
        if keep is not None:
            e.mul_(keep)
        total = e.sum(dim, keepdim=True).clamp_(min=1.0).add_(top - top)
        p = e.div_(total)
        ctx.save_for_backward(p)
        ctx.dim = dim
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        return aten._softmax_backward_data(grad, p, ctx.dim, p.dtype), None, None, None


def masked_softmax(x: torch.Tensor, keep: torch.Tensor | None, dim: int, exp: str = "table") -> torch.Tensor:
    """Softmax of float scores ``x`` with the exponentials of :func:`int_softmax`: what training sees of it.

    ``keep``: bool that broadcasts to ``x``, or None. ``exp``: ``"table"`` or ``"polynomial"``. Masked keys, and rows
    without a kept key, get exactly 0. The gradient is softmax's at these probabilities. ValueError for another ``exp``.
    """
    _demand_form(exp)
    return _MaskedSoftmax.apply(x, keep, dim, exp)


def numpy_masked_softmax(x: Array, keep: Array | None, dim: int, exp: str = "table") -> Array:
    """:func:`masked_softmax` in NumPy."""
    _demand_form(exp)
    there = np.True_ if keep is None else keep
    top = np.max(x, axis=dim, keepdims=True, initial=np.finfo(x.dtype).min, where=there)
    with np.errstate(invalid="ignore", over="ignore"):
        below = np.where(there, np.subtract(top, x), 0)
    if exp == "table":
        d = np.rint(np.minimum(below * x.dtype.type(2**TABLE_FRACTION), TABLE_LAST)).astype(np.int64)
        e = np.rint(np.exp(d / -(2.0**TABLE_FRACTION)) * 2**15)
    else:
        d = np.rint(np.minimum(below * x.dtype.type(2**POLYNOMIAL_FRACTION), POLYNOMIAL_LAST)).astype(np.int64)
        e = numpy_i_exp(d)
    e = np.where(there, e, 0).astype(x.dtype)
    p: Array = e / np.maximum(e.sum(axis=dim, keepdims=True), 1)
    return p


def _demand_form(exp: str) -> None:
    if exp not in ("table", "polynomial"):
        raise ValueError(f"masked_softmax takes exponentials from a 'table' or a 'polynomial', not {exp!r}")


@dataclass(frozen=True)
class Probabilities:
    """Softmax of scores, on the grid of the quantizer behind it."""

    scores: QValue
    keep: fx.Node | None
    form: str

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        try:
            multiplier, shift, limit = score_grid(float(self.scores.scale), table=self.form == "table")
            divider = prob_divider(grid.scale)
        except ValueError as err:
            raise LoweringError(str(err), where=site_of(node), do="calibrate again: a scale is out of range") from None
        table = lowering.store(node, "", exp_table(), exact=TABLE_NAME) if self.form == "table" else None
        args = (self.scores.node, self.keep, table, multiplier, shift, limit, divider)
        ends = (grid.zero_point, grid.qmin, grid.qmax)
        made = lowering.call(node, int_softmax, *args, *ends, dtype=torch_container(grid.qmin, grid.qmax))
        return on_grid(made, grid)


def lower_masked_softmax(lowering: Lowering, node: fx.Node) -> Probabilities:
    """masked_softmax(x + mask, keep) -> int_softmax(x, keep): the mask is no number any more"""
    scores, keep, _, form = (*node.args, "table")[:4]
    if isinstance(scores, fx.Node) and (masked := masked_scores(scores)) is not None:
        scores = masked[0]
    return Probabilities(lowering.per_tensor(scores), keep, str(form))  # type: ignore[arg-type]


def _masked_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((random_acc(2, 3, 4, 9) >> 19).float() / 1024, keep_sample(), -1), {}


MASKED_SOFTMAX = declare(
    Op(
        name="masked_softmax",
        target=masked_softmax,
        sig="wide, mask -> prob",
        numpy=numpy_masked_softmax,
        onnx=functools.partial(
            emit_masked_softmax,
            grids={
                "table": (TABLE_FRACTION, TABLE_LAST),
                "polynomial": (POLYNOMIAL_FRACTION, POLYNOMIAL_LAST),
            },
            table=lambda exp: _float_table(exp, torch.float32, torch.device("cpu")).numpy(),
        ),
        sample=_masked_sample,
        lower=lower_masked_softmax,
        why_float="the exponential and the division run in floats",
    )
)
