"""Ops that work on every element alone: arithmetic with broadcasting, activation functions, dropout."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..op import Op, declare
from ..ranges import Bounds, Interval
from .lower_rules import lower_add, lower_scaled, lower_table

aten = torch.ops.aten
Array = NDArray[Any]


def erf(x: Array) -> Array:
    """The error function, in the precision of ``x``."""
    from scipy.special import erf as scipy_erf

    out: Array = scipy_erf(x)
    return out


def numpy_sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without overflow."""
    small = np.exp(-np.abs(x))
    out: Array = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
    return out


def _is_float(x: Any) -> bool:
    return isinstance(x, float) or np.issubdtype(getattr(x, "dtype", np.int64), np.floating)


def _promoted(a: Any, b: Any) -> tuple[Any, Any]:
    """Integers that meet floats become float32, as in torch (NumPy makes float64 of int64 and float32)."""
    if not (_is_float(a) or _is_float(b)):
        return a, b
    a, b = (x.astype(np.float32) if hasattr(x, "astype") and not _is_float(x) else x for x in (a, b))
    return a, b


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(a, alpha * b)`` of torch's add and sub."""

    def run(a: Any, b: Any, alpha: float = 1) -> Any:
        a, b = _promoted(a, b)
        return function(a, b if alpha == 1 else b * alpha)

    return run


def _emit_scaled(kind: str) -> Callable[..., Any]:
    def emit(g: Any, a: Any, b: Any, alpha: float = 1) -> Any:
        return g.arithmetic(kind, a, b if alpha == 1 else g.arithmetic("Mul", b, alpha))

    return emit


def numpy_div(a: Any, b: Any) -> Any:
    """True division; two integers give float32."""
    a, b = _promoted(a, b)
    return np.divide(a, b) if _is_float(a) or _is_float(b) else np.divide(a, b, dtype=np.float32)


def numpy_div_mode(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    """Division rounded by ``rounding_mode``: None, "floor" or "trunc"; integers stay integers."""
    if rounding_mode is None:
        return numpy_div(a, b)
    a, b = _promoted(a, b)
    if rounding_mode == "floor":
        return np.floor_divide(a, b)
    quotient = np.trunc(np.divide(a, b))
    return quotient if _is_float(a) or _is_float(b) else quotient.astype(np.result_type(a, b))


def emit_div_mode(g: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    """ONNX Div truncates integers; the floor of integers is exact by way of the remainder."""
    if rounding_mode is None or (rounding_mode == "trunc" and not g.dtype.is_floating_point):
        return g.arithmetic("Div", a, b)
    if g.dtype.is_floating_point:
        quotient = g.arithmetic("Div", a, b)
        if rounding_mode == "floor":
            return g.Floor(quotient)
        return g.Mul(g.Sign(quotient), g.Floor(g.Abs(quotient)))
    rest = g.arithmetic("Mod", a, b)  # takes the sign of the divisor
    return g.arithmetic("Div", g.arithmetic("Sub", a, rest), b)


def numpy_pow(x: Any, exponent: Any) -> Any:
    return np.power(*_promoted(x, exponent))


def _clamp_bounds(x: Interval, min: int | None = None, max: int | None = None) -> Bounds:  # noqa: A002
    """Of integers: both ends are clamped too."""
    low, high = (v if min is None else builtins.max(v, min) for v in (x.lo, x.hi))
    return Bounds(low, high) if max is None else Bounds(builtins.min(low, max), builtins.min(high, max))


def _signed() -> torch.Tensor:
    return torch.tensor([-3.5, -2.5, -1.0, -0.3, 0.0, 0.5, 1.0, 1.5, 2.0, 7.25]).reshape(2, 5)


def _positive() -> torch.Tensor:
    return torch.tensor([1e-6, 0.1, 0.5, 1.0, 1.5, 2.0, 9.0, 1e4])


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return _signed(), torch.tensor([[2.0], [-0.75]])


def _one(make: Callable[[], torch.Tensor]) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda: ((make(),), {})


WHY_TABLE = "lowered where its input and its output are quantized"
WHY_FLOAT = "no integer form"


def _unary(
    name: str,
    target: Any,
    numpy: Callable[..., Any],
    onnx: str | Callable[..., Any],
    make: Callable[[], torch.Tensor] = _signed,
    sig: str = "float -> float",
    why: str = WHY_FLOAT,
) -> Op:
    emit = onnx if callable(onnx) else lambda g, x, kind=onnx: getattr(g, kind)(g.typed(x))
    lower = lower_table if why == WHY_TABLE else None
    sample = _one(make)
    return declare(
        Op(name=name, target=target, sig=sig, numpy=numpy, onnx=emit, lower=lower, sample=sample, why_float=why)
    )


_unary("tanh", aten.tanh.default, np.tanh, "Tanh", sig="act -> act", why=WHY_TABLE)
_unary("relu", aten.relu.default, lambda x: np.maximum(x, 0), "Relu", sig="act -> act", why=WHY_TABLE)
_unary("sigmoid", aten.sigmoid.default, numpy_sigmoid, "Sigmoid", sig="act -> act", why=WHY_TABLE)
_unary(
    "silu",
    aten.silu.default,
    lambda x: x * numpy_sigmoid(x),
    lambda g, x: g.Mul(x, g.Sigmoid(x)),
    sig="act -> act",
    why=WHY_TABLE,
)
_unary("erf", aten.erf.default, erf, "Erf")
_unary("exp", aten.exp.default, np.exp, "Exp")
_unary("log", aten.log.default, np.log, "Log", _positive)
_unary("sqrt", aten.sqrt.default, np.sqrt, "Sqrt", _positive)
_unary("rsqrt", aten.rsqrt.default, lambda x: 1 / np.sqrt(x), lambda g, x: g.Reciprocal(g.Sqrt(x)), _positive)
_unary("reciprocal", aten.reciprocal.default, lambda x: 1 / x, "Reciprocal", _positive)
_unary("sin", aten.sin.default, np.sin, "Sin")
_unary("cos", aten.cos.default, np.cos, "Cos")
_unary("abs", aten.abs.default, np.abs, "Abs")
_unary("neg", aten.neg.default, np.negative, "Neg")
_unary("sign", aten.sign.default, np.sign, "Sign")
_unary("ceil", aten.ceil.default, np.ceil, "Ceil")
_unary("floor", aten.floor.default, np.floor, "Floor")
_unary("round", aten.round.default, np.rint, "Round")

ADD = declare(
    Op(
        name="add",
        target=aten.add.Tensor,
        sig="wide, wide -> wide",
        numpy=_scaled(np.add),
        onnx=_emit_scaled("Add"),
        lower=lower_add,
        sample=lambda: (_pair(), {}),
        why_float="its operands have no fixed point",
    )
)
SUB = declare(
    Op(
        name="sub",
        target=aten.sub.Tensor,
        sig="float, float -> float",
        numpy=_scaled(np.subtract),
        onnx=_emit_scaled("Sub"),
        sample=lambda: (_pair(), {"alpha": 3}),
        why_float=WHY_FLOAT,
    )
)
RSUB = declare(
    Op(
        name="rsub",
        target=aten.rsub.Scalar,
        sig="float -> float",
        numpy=lambda x, other, alpha=1: _scaled(np.subtract)(other, x, alpha),
        onnx=lambda g, x, other, alpha=1: _emit_scaled("Sub")(g, other, x, alpha),
        sample=lambda: ((_signed(), 1.0), {}),
        why_float=WHY_FLOAT,
    )
)
MUL = declare(
    Op(
        name="mul",
        target=aten.mul.Tensor,
        sig="act, act -> wide",  # where both are computed (kdlsq_fx/graph.py, is_product)
        numpy=lambda a, b: np.multiply(*_promoted(a, b)),
        onnx=lambda g, a, b: g.arithmetic("Mul", a, b),
        lower=lower_scaled,
        sample=lambda: ((_signed(), torch.tensor([[2], [-1]])), {}),
        why_float=WHY_FLOAT,
    )
)
DIV = declare(
    Op(
        name="div",
        target=aten.div.Tensor,
        sig="float, float -> float",
        numpy=numpy_div,
        onnx=lambda g, a, b: g.arithmetic("Div", a, b),
        lower=lower_scaled,
        sample=lambda: ((torch.arange(-4, 4), 3), {}),
        why_float=WHY_FLOAT,
    )
)
DIV_MODE = declare(
    Op(
        name="div_mode",
        target=aten.div.Tensor_mode,
        sig="float, float -> float",
        numpy=numpy_div_mode,
        onnx=emit_div_mode,
        sample=lambda: ((torch.arange(-7, 8), 3), {"rounding_mode": "floor"}),
        why_float=WHY_FLOAT,
    )
)
POW = declare(
    Op(
        name="pow",
        target=aten.pow.Tensor_Scalar,
        sig="float -> float",
        numpy=numpy_pow,
        onnx=lambda g, x, exponent: g.arithmetic("Pow", x, exponent),
        sample=lambda: ((_signed(), 3.0), {}),
        why_float=WHY_FLOAT,
    )
)
CLAMP = declare(
    Op(
        name="clamp",
        target=aten.clamp.default,
        sig="float -> float",
        numpy=lambda x, min=None, max=None: np.clip(x, min, max),
        onnx=lambda g, x, min=None, max=None: g.clip(x, min, max),
        bounds=_clamp_bounds,
        sample=lambda: ((torch.arange(-5, 9), 0, 6), {}),
        why_float=WHY_FLOAT,
    )
)
DROPOUT = declare(
    Op(
        name="dropout",
        target=nn.Dropout,
        sig="act -> act",  # draws anew at every call: a quantizer of its result stands behind it
        numpy=lambda x: x,
        onnx=lambda g, x: x,
        sample=_one(_signed),
        why_float="gone at inference",
    )
)
for _name, _target, _numpy, _onnx in (
    ("min", aten.min.other, np.minimum, "Min"),
    ("minimum", aten.minimum.default, np.minimum, "Min"),
    ("max", aten.max.other, np.maximum, "Max"),
    ("maximum", aten.maximum.default, np.maximum, "Max"),
):
    declare(
        Op(
            name=_name,
            target=_target,
            sig="float, float -> float",
            numpy=_numpy,
            onnx=lambda g, a, b, kind=_onnx: g.arithmetic(kind, a, b),
            sample=lambda: ((torch.arange(-5, 5), torch.tensor(2)), {}),
            why_float=WHY_FLOAT,
        )
    )
