"""Convolution along a sequence, and the windows that a kernel made at run time is applied to (dynamic convolution)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..op import Op, declare
from .lower_products import lower_conv1d

aten = torch.ops.aten
Array = NDArray[Any]


def numpy_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Array:
    """``x`` [n, in, length], ``weight`` [out, in/groups, k] -> [n, out, length']: windows, then a product a group."""
    (n, channels, _), (out, per_group, k) = x.shape, weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0], padding[0])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k - 1) * dilation[0] + 1, axis=2)
    windows = windows[:, :, :: stride[0], :: dilation[0]]
    length = windows.shape[2]
    columns = windows.reshape(n, groups, channels // groups, length, k).transpose(0, 1, 3, 2, 4)
    kernel = weight.reshape(groups, out // groups, per_group * k).transpose(0, 2, 1)
    product = np.matmul(columns.reshape(n, groups, length, per_group * k), kernel[None])
    result: Array = product.transpose(0, 1, 3, 2).reshape(n, out, length)
    return result if bias is None else result + bias[:, None]


def emit_conv1d(
    g: Any,
    x: Any,
    w: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    inputs = (x, w) if bias is None else (x, w, bias)
    pads = [int(padding[0])] * 2
    return g.Conv(*inputs, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def numpy_unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Every window of ``size`` elements along ``dim``, ``step`` apart, as a new last dimension."""
    dim %= x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=dim)
    return windows[(slice(None),) * dim + (slice(None, None, step),)]


def _emit_unfold(g: Any, x: Any, dim: int, size: int, step: int) -> Any:
    """ONNX has no such op: gather the positions of each window, and bring the elements of a window to the end."""
    rank = g.rank(x)
    dim %= rank
    count = g.size_op("Add", g.size_op("Div", g.size_op("Add", g.size(x, dim), -size), step), 1)
    starts = g.Mul(g.Range(g.scalar(0), g.scalar(count), g.scalar(1)), g.scalar(step))
    places = g.Add(g.Unsqueeze(starts, g.vector([1])), g.constant(np.arange(size, dtype=np.int64)[None]))
    windows = g.Gather(x, places, axis=dim)  # [..., windows, size, ...]
    return g.Transpose(windows, perm=[*range(dim + 1), *range(dim + 2, rank + 1), dim + 1])


def _conv_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(2, 6, 9), torch.randn(4, 3, 3), torch.randn(4), [2], [1], [1], 2), {}


CONV1D = declare(
    Op(
        name="conv1d",
        target=aten.conv1d.default,
        sig="act, weight, bias -> act",
        numpy=numpy_conv1d,
        onnx=emit_conv1d,
        lower=lower_conv1d,
        sample=_conv_sample,
        why_float="no rule quantizes both operands",
    )
)
UNFOLD = declare(
    Op(
        name="unfold",
        target=aten.unfold.default,
        sig="same -> same",
        numpy=numpy_unfold,
        onnx=_emit_unfold,
        sample=lambda: ((torch.arange(54, dtype=torch.float32).reshape(2, 9, 3), 1, 4, 2), {}),
        why_float="makes no numbers",
    )
)
