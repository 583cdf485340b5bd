"""Layer normalisation, with and without bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare

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
