"""Comparisons, logic on masks, and choices by mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..op import Op, declare
from ..ranges import Bounds

aten = torch.ops.aten

WHY = "chooses by a mask"


def _numbers() -> torch.Tensor:
    return torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]])


def _mask() -> torch.Tensor:
    return torch.tensor([[True, False, True], [False, False, True]])


def _compare(name: str, overloads: Any, numpy: Callable[..., Any], onnx: str) -> None:
    """Declare both overloads: against a number (``name``) and against a tensor (``name_tensor``)."""

    def emit(g: Any, a: Any, b: Any) -> Any:
        return g.compare(onnx, a, b)

    scalar = Op(
        name=name,
        target=overloads.Scalar,
        sig="float -> mask",
        numpy=numpy,
        onnx=emit,
        sample=lambda: ((torch.arange(-3, 4), 1), {}),
    )
    tensor = Op(
        name=f"{name}_tensor",
        target=overloads.Tensor,
        sig="float, float -> mask",
        numpy=numpy,
        onnx=emit,
        sample=lambda: ((_numbers(), torch.tensor([0.0, -1.0, 3.0])), {}),
    )
    declare(scalar)
    declare(tensor)


_compare("eq", aten.eq, np.equal, "Equal")
_compare("ne", aten.ne, np.not_equal, "Different")
_compare("lt", aten.lt, np.less, "Less")
_compare("le", aten.le, np.less_equal, "LessOrEqual")
_compare("gt", aten.gt, np.greater, "Greater")
_compare("ge", aten.ge, np.greater_equal, "GreaterOrEqual")


def _emit_logic(kind: str) -> Callable[..., Any]:
    def emit(g: Any, a: Any, b: Any) -> Any:
        if g.dtype == torch.bool:
            return getattr(g, kind)(g.cast(a, torch.bool), g.cast(b, torch.bool))
        return g.arithmetic(f"Bitwise{kind}", a, b)

    return emit


def _bitwise_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_mask(), torch.tensor([True, True, False])), {}


def _logical_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_mask(), torch.tensor([[0], [2]])), {}


LOGIC: list[tuple[str, Any, Any, str]] = [
    ("and", aten.__and__.Tensor, np.bitwise_and, "And"),
    ("or", aten.__or__.Tensor, np.bitwise_or, "Or"),
    ("bitwise_and", aten.bitwise_and.Tensor, np.bitwise_and, "And"),
    ("bitwise_or", aten.bitwise_or.Tensor, np.bitwise_or, "Or"),
    ("logical_and", aten.logical_and.default, np.logical_and, "And"),
    ("logical_or", aten.logical_or.default, np.logical_or, "Or"),
]
for _name, _target, _numpy, _onnx in LOGIC:
    declare(
        Op(
            name=_name,
            target=_target,
            sig="mask, mask -> mask",
            numpy=_numpy,
            onnx=_emit_logic(_onnx),
            sample=_logical_sample if _name.startswith("logical") else _bitwise_sample,
        )
    )
LOGICAL_NOT = declare(
    Op(
        name="logical_not",
        target=aten.logical_not.default,
        sig="mask -> mask",
        numpy=np.logical_not,
        onnx=lambda g, x: g.Not(g.cast(x, torch.bool)),
        sample=lambda: ((torch.arange(-1, 3),), {}),
    )
)
BITWISE_NOT = declare(
    Op(
        name="bitwise_not",
        target=aten.bitwise_not.default,
        sig="mask -> mask",
        numpy=np.bitwise_not,
        onnx=lambda g, x: g.Not(x) if g.dtype == torch.bool else g.BitwiseNot(x),
        sample=lambda: ((_mask(),), {}),
    )
)


def numpy_where(mask: Any, a: Any, b: Any) -> Any:
    """``a`` where ``mask``, else ``b``; a Python number takes the dtype of the array beside it."""
    if isinstance(a, (bool, int, float)) and hasattr(b, "dtype"):
        a = np.asarray(a, b.dtype if np.issubdtype(b.dtype, np.floating) or not isinstance(a, float) else np.float32)
    if isinstance(b, (bool, int, float)) and hasattr(a, "dtype"):
        b = np.asarray(b, a.dtype if np.issubdtype(a.dtype, np.floating) or not isinstance(b, float) else np.float32)
    return np.where(mask, a, b)


def numpy_where_numbers(mask: Any, a: Any, b: Any) -> Any:
    """Two Python numbers: torch's default dtypes are float32 and int64."""
    dtype = np.float32 if isinstance(a, float) or isinstance(b, float) else np.int64
    return np.where(mask, np.asarray(a, dtype), np.asarray(b, dtype))


def _emit_where(g: Any, mask: Any, a: Any, b: Any) -> Any:
    return g.Where(g.cast(mask, torch.bool), g.typed(a), g.typed(b))


def _with_mask(args: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda: ((_mask(), *args()), {})


LOWEST = float(torch.finfo(torch.float32).min)
CHOICES: list[tuple[str, Any, str, Any, Callable[[], tuple[Any, ...]]]] = [
    ("where", aten.where.self, "mask, float, float -> float", numpy_where, lambda: (_numbers(), torch.tensor(-7.5))),
    ("where_scalar_other", aten.where.ScalarOther, "mask, float -> float", numpy_where, lambda: (_numbers(), LOWEST)),
    ("where_scalar_self", aten.where.ScalarSelf, "mask, float -> float", numpy_where, lambda: (0, torch.arange(3))),
    ("where_scalars", aten.where.Scalar, "mask -> float", numpy_where_numbers, lambda: (0.0, LOWEST)),
]
for _name, _target, _sig, _values, _args in CHOICES:
    declare(
        Op(
            name=_name,
            target=_target,
            sig=_sig,
            numpy=_values,
            onnx=_emit_where,
            sample=_with_mask(_args),
            why_float=WHY,
        )
    )
MASKED_FILL = declare(
    Op(
        name="masked_fill",
        target=aten.masked_fill.Scalar,
        sig="float, mask -> float",
        numpy=lambda x, mask, value: np.where(mask, np.asarray(value, x.dtype), x),
        bounds=lambda x, mask, value: Bounds(min(x.lo, int(value)), max(x.hi, int(value))),
        onnx=lambda g, x, mask, value: g.Where(mask, g.typed(value), x),
        sample=lambda: ((_numbers(), _mask()[:1], LOWEST), {}),
        why_float=WHY,
    )
)
MASKED_FILL_TENSOR = declare(
    Op(
        name="masked_fill_tensor",
        target=aten.masked_fill.Tensor,
        sig="float, mask, float -> float",
        numpy=lambda x, mask, value: np.where(mask, np.asarray(value, x.dtype), x),
        onnx=lambda g, x, mask, value: g.Where(mask, g.typed(value), x),
        sample=lambda: ((_numbers(), _mask(), torch.tensor(4.0)), {}),
        why_float=WHY,
    )
)
