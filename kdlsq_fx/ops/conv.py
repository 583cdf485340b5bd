"""Convolution along a sequence, and the unfolding of windows (ConvBERT, SqueezeBERT)."""

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


def numpy_im2col(
    x: Array, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Array:
    """Every window of ``x`` [n, c, h, w] as a column: [n, c * kh * kw, windows] (torch.nn.Unfold)."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    span = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation))
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    columns = windows.transpose(0, 1, 4, 5, 2, 3)
    n, c, kh, kw, h, w = columns.shape
    return np.ascontiguousarray(columns).reshape(n, c * kh * kw, h * w)


def emit_im2col(g: Any, x: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """ONNX has no such op: pad, then gather the positions of each tap along height and along width."""
    pads = [0, 0, padding[0], padding[1]] * 2
    columns = g.Pad(x, g.vector(pads)) if any(pads) else x
    for axis, i in ((2, 0), (4, 1)):  # the first gather adds a dimension in front of the width
        reach = (kernel[i] - 1) * dilation[i] + 1
        last = g.size_op("Add", g.size(x, 2 + i), 2 * padding[i] - reach)
        count = g.size_op("Add", g.size_op("Div", last, stride[i]), 1)
        starts = g.Mul(g.Range(g.scalar(0), g.scalar(count), g.scalar(1)), g.scalar(stride[i]))
        taps = g.constant(np.arange(kernel[i], dtype=np.int64)[:, None] * dilation[i])
        columns = g.Gather(columns, g.Add(taps, starts), axis=axis)  # [n, c, kh, h'(, kw, w')]
    columns = g.Transpose(columns, perm=[0, 1, 2, 4, 3, 5])
    rows = g.size_op("Mul", g.size(x, 1), kernel[0] * kernel[1])
    return g.Reshape(columns, g.vector([g.size(x, 0), rows, -1]))


def _conv_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(2, 6, 9), torch.randn(4, 3, 3), torch.randn(4), [2], [1], [1], 2), {}


def _im2col_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(2, 3, 9, 4), [3, 2], [2, 1], [2, 1], [1, 2]), {}


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
IM2COL = declare(
    Op(
        name="im2col",
        target=aten.im2col.default,
        sig="float -> float",  # pads with zeros: not all codes pass through untouched
        numpy=numpy_im2col,
        onnx=emit_im2col,
        sample=_im2col_sample,
        why_float="moves data and pads with zeros",
    )
)
