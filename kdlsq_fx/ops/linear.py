"""The dense layer: ``x @ weight.T + bias``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare
from .lower_products import lower_linear

aten = torch.ops.aten
Array = NDArray[Any]


def numpy_linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x`` [..., in], ``weight`` [out, in], ``bias`` [out] -> [..., out]."""
    rows = np.matmul(x.reshape(-1, x.shape[-1]), weight.T)  # one large product; NumPy loops over leading dimensions
    out: Array = rows.reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def emit_linear(g: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """A product with the weight stored as [in, out], and the bias (see ``g.dense``)."""
    return g.dense(x, weight, bias)


def _sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(2, 3, 16), torch.randn(5, 16), torch.randn(5)), {}


LINEAR = declare(
    Op(
        name="linear",
        target=aten.linear.default,
        sig="act, weight, bias -> act",
        numpy=numpy_linear,
        onnx=emit_linear,
        lower=lower_linear,
        sample=_sample,
        why_float="no rule quantizes both operands",
    )
)
