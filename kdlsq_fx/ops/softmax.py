"""Softmax and log-softmax over one dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare

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
