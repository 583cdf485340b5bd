"""GELU, exact and by tanh; the polynomial one that training sees where a rule asks for it.

``polynomial_gelu`` is the float twin of :func:`kdlsq_fx.ops.int_gelu.int_gelu`, and is lowered to it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.autograd.function import once_differentiable

from ..errors import LoweringError
from ..graph import site_of
from ..lowering import Grid, Lowering, QValue, StaysFloat
from ..op import Op, declare
from .elementwise import WHY_TABLE, erf
from .emit_integer_twins import emit_polynomial_gelu
from .fixed_point import round_shift
from .int_gelu import ERF_A, FRACTION, B, C, gelu_constants, int_gelu, numpy_half_erf, one_plus_erf
from .lower_rules import lower_table, on_grid
from .qdq import torch_container

aten = torch.ops.aten
Array = NDArray[Any]


def numpy_gelu(x: Array, approximate: str = "none") -> Array:
    """``x * Phi(x)``; ``approximate="tanh"`` is the form of GPT-2."""
    if approximate == "tanh":
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
        out: Array = 0.5 * x * (1.0 + np.tanh(inner))
    else:
        out = 0.5 * x * (1.0 + erf(x * x.dtype.type(math.sqrt(0.5))))
    return out


class _PolynomialGelu(torch.autograd.Function):
    """Forward is i-GELU, backward exact GELU's; keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        # int32 holds every step up to 2 C < 2**27, and beyond B nothing changes; float32 would not be exact
        t = (x * (2**FRACTION / math.sqrt(2))).round_().clamp_(-B, B).to(torch.int32)
        w = round_shift(one_plus_erf(t), FRACTION)
        return w.to(x.dtype).mul_(ERF_A / 2 * 2.0**-FRACTION).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return aten.gelu_backward(grad, x)


def polynomial_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of float ``x``, any shape, as :func:`int_gelu` has it before its last rounding; gradient of exact GELU."""
    return _PolynomialGelu.apply(x)


def numpy_polynomial_gelu(x: Array) -> Array:
    """:func:`polynomial_gelu` in NumPy."""
    t = np.rint(np.clip(x * x.dtype.type(2**FRACTION / math.sqrt(2)), -B, B))
    half = numpy_half_erf(np.nan_to_num(t).astype(np.int64))
    return x * (half * (ERF_A / 2 / 2**FRACTION)).astype(x.dtype)


@dataclass(frozen=True)
class PolynomialGelu:
    """i-GELU of codes, on the grid of the quantizer behind it."""

    x: QValue

    def quantized(self, lowering: Lowering, node: fx.Node, grid: Grid) -> QValue:
        try:
            constants = gelu_constants(float(self.x.scale), grid.scale)
        except ValueError as err:
            raise LoweringError(str(err), where=site_of(node), do="calibrate again: a scale is out of range") from None
        ends = (grid.zero_point, grid.qmin, grid.qmax)
        dtype = torch_container(grid.qmin, grid.qmax)
        made = lowering.call(node, int_gelu, self.x.node, self.x.zero_point, *constants, *ends, dtype=dtype)
        return on_grid(made, grid)


def lower_polynomial_gelu(lowering: Lowering, node: fx.Node) -> PolynomialGelu:
    """polynomial_gelu(x) -> int_gelu(x)"""
    x = lowering.per_tensor(node.args[0])
    if max(abs(x.lo), abs(x.hi)) > 2**21:
        raise StaysFloat("its input has more than 22 bits: no quantizer stands before it")
    return PolynomialGelu(x)


GELU = declare(
    Op(
        name="gelu",
        target=aten.gelu.default,
        sig="act -> act",
        numpy=numpy_gelu,
        onnx=lambda g, x, approximate="none": g.Gelu(x, approximate=approximate),
        lower=lower_table,
        sample=lambda: ((torch.linspace(-6, 6, 64),), {"approximate": "tanh"}),
        why_float=WHY_TABLE,
    )
)
POLYNOMIAL_GELU = declare(
    Op(
        name="polynomial_gelu",
        target=polynomial_gelu,
        sig="act -> act",
        numpy=numpy_polynomial_gelu,
        onnx=functools.partial(emit_polynomial_gelu, knee=B, height=C, fraction=FRACTION, erf_a=ERF_A),
        sample=lambda: ((torch.linspace(-6, 6, 97),), {}),
        lower=lower_polynomial_gelu,
        why_float="its polynomial runs in floats",
    )
)
