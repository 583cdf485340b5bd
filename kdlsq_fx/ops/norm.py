"""Layer normalisation, with and without bias; the one that training sees where the integers will take it.

``integer_layer_norm`` is the float twin of :func:`kdlsq_fx.ops.int_norm.int_layer_norm`, and is lowered to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.autograd.function import once_differentiable

from ..errors import LoweringError
from ..graph import site_of
from ..lowering import Grid, Lowering, QValue, StaysFloat, array
from ..op import Op, declare
from .emit_integer_twins import emit_integer_norm
from .fixed_point import random_codes
from .int_norm import SQRT_STEPS, centred, int_layer_norm, inverse_root, norm_constants, numpy_rows, row_grid
from .lower_rules import on_grid
from .qdq import torch_container

aten = torch.ops.aten
Array = NDArray[Any]


def numpy_layer_norm(
    x: Array,
    shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last ``len(shape)`` dimensions; biased variance."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    out: Array = centred / np.sqrt(variance + x.dtype.type(eps))
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def emit_layer_norm(
    g: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Any:
    """LayerNormalization; its scale is not optional in ONNX."""
    scale = g.constant(np.ones(tuple(shape), np.float32)) if weight is None else weight
    inputs = (x, scale) if bias is None else (x, scale, bias)
    return g.LayerNormalization(*inputs, axis=-len(shape), epsilon=float(eps))


def _sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16) * 3 + 5
    x[0, 0] = 0.0  # a row without variance: eps decides
    return (x, [16], torch.randn(16), torch.randn(16), 1e-12, False), {}


LAYER_NORM = declare(
    Op(
        name="layer_norm",
        target=aten.layer_norm.default,
        sig="wide, float, float -> act",
        numpy=numpy_layer_norm,
        onnx=emit_layer_norm,
        sample=_sample,
        why_float="mean, variance and square root run in floats",
    )
)


class _IntegerLayerNorm(torch.autograd.Function):
    """Forward from integers; backward is layer norm's, from the input (its mean and deviation are made again)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        scale: torch.Tensor,
        qmin: int,
        qmax: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        n = x.shape[-1]
        fraction, eps_codes = row_grid(n, float(scale), eps, qmin, qmax)
        y = centred(torch.round(x / scale).to(torch.int32), fraction)
        factor, h = inverse_root(y, eps_codes)
        if x.dtype == torch.float64:  # the rounding to 2**-24 is below what float32 can see
            t = torch.ldexp(y.double() * factor, -22 - h).round_()
            out = t.mul_(math.sqrt(n) * 2.0**-24)
        else:
            per_row = torch.ldexp(factor.double() * math.sqrt(n), -46 - h)
            out = y.to(x.dtype).mul_(per_row.to(x.dtype))
        if weight is not None:
            out.mul_(weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        shape = [x.shape[-1]]
        _, mean, rstd = aten.native_layer_norm(x, shape, None, None, ctx.eps)
        wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
        grads = aten.native_layer_norm_backward(grad.contiguous(), x, shape, mean, rstd, weight, bias, wanted)
        return *grads, None, None, None, None


def integer_layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Layer norm of float ``x`` that lies on a grid, with mean and deviation as :func:`int_layer_norm` makes them.

    ``x``: ``[..., N]``, multiples of the 0-d ``scale`` (which gets no gradient), from codes ``qmin..qmax``; ``shape``:
    ``[N]``; ``weight``, ``bias``: ``[N]`` or None.
    What the integer op gives before its rounding to codes (in float64 with its rounding to 2**-24, which float32 cannot
    see); the gradient is layer norm's. ValueError for more than one dimension, and where no integer form fits.
    """
    _demand_one_dimension(shape)
    return _IntegerLayerNorm.apply(x, weight, bias, eps, scale, qmin, qmax)


def numpy_integer_layer_norm(
    x: Array,
    shape: Sequence[int],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    scale: Array,
    qmin: int,
    qmax: int,
) -> Array:
    """:func:`integer_layer_norm` in NumPy."""
    _demand_one_dimension(shape)
    n = x.shape[-1]
    fraction, eps_codes = row_grid(n, float(scale), eps, qmin, qmax)
    y, factor, h = numpy_rows(np.rint(x / scale).astype(np.int32), fraction, eps_codes)
    if x.dtype == np.float64:
        out = np.rint(y * (factor / np.exp2(22 + h))) * (math.sqrt(n) * 2.0**-24)
    else:
        out = (y * (factor * math.sqrt(n) / np.exp2(46 + h))).astype(x.dtype)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def _demand_one_dimension(shape: Sequence[int]) -> None:
    if len(shape) != 1:
        raise ValueError(f"an integer layer norm runs over one dimension, not over {list(shape)}")


@dataclass(frozen=True)
class Normalized:
    """LayerNorm of codes, on the grid of the quantizer behind it."""

    x: QValue
    gamma: Array | None
    beta: Array | None
    length: int
    eps: float

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        x = self.x
        try:
            made = norm_constants(self.gamma, self.beta, self.length, float(x.scale), grid.scale, self.eps, x.lo, x.hi)
        except ValueError as err:
            do = "give its input 22 bits or fewer, or calibrate again"
            raise LoweringError(str(err), where=site_of(node), do=do) from None
        gain, offset = (
            lowering.store(node, what, torch.from_numpy(np.ascontiguousarray(v)))
            for what, v in (("gain", made.gain), ("offset", made.offset))
        )
        args = (x.node, gain, offset, made.fraction, made.eps, made.shift)
        ends = (grid.zero_point, grid.qmin, grid.qmax)
        dtype = torch_container(grid.qmin, grid.qmax)
        return on_grid(lowering.call(node, int_layer_norm, *args, *ends, dtype=dtype), grid)


def lower_integer_norm(lowering: Lowering, node: fx.Node) -> Normalized:
    """integer_layer_norm(x, ...) -> int_layer_norm(x, gain, offset), rounded once by the quantizer behind"""
    operand, shape, weight, bias, eps = node.args[:5]
    x = lowering.per_tensor(operand)
    gamma, beta = (None if p is None else lowering.constant(p) for p in (weight, bias))
    if (weight is not None and gamma is None) or (bias is not None and beta is None):
        raise StaysFloat("its weight or bias is not a constant")
    reals = (None if t is None else array(t).astype(np.float64) for t in (gamma, beta))
    return Normalized(x, *reals, int(shape[-1]), float(eps))  # type: ignore[arg-type, index, call-arg]


def _grid_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = random_codes(2, 3, 16, low=-(2**21), high=2**21, dtype=torch.int32).float() * 2.0**-17
    weight, bias = torch.linspace(-2, 2, 16), torch.linspace(1, -1, 16)
    return (x, [16], weight, bias, 1e-12, torch.tensor(2.0**-17), -(2**21), 2**21 - 1), {}


INTEGER_LAYER_NORM = declare(
    Op(
        name="integer_layer_norm",
        target=integer_layer_norm,
        sig="wide, float, float, float -> act",
        numpy=numpy_integer_layer_norm,
        onnx=functools.partial(emit_integer_norm, row_grid=row_grid, sqrt_steps=SQRT_STEPS),
        sample=_grid_sample,
        lower=lower_integer_norm,
        why_float="mean, variance and square root run in floats",
    )
)
