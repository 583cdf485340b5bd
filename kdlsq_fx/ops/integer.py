"""Integer products, look-ups and tables, with 32-bit accumulators. Rounding is in fixed_point.py and qdq.py only.

Each op has a torch form and a NumPy form that was written apart from it. Products of matrices run in a float GEMM:
exact, as all partial sums are integers below 2**24 (float32) or 2**53 (float64) by the bound the lowering proved;
neither NumPy nor torch has a fast integer GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from kdlsq_fx.errors import InputError
from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_integer import (
    conv1d_bounds,
    embedding_bounds,
    linear_bounds,
    lookup_bounds,
    matmul_bounds,
    mul_bounds,
)
from kdlsq_fx.ops.emit_integer import emit_conv1d, emit_embedding, emit_linear, emit_lookup, emit_matmul, emit_mul
from kdlsq_fx.ops.fixed_point import dyadic, int_add, random_acc, random_codes, requantize, round_shift
from kdlsq_fx.ranges import INT32_MAX, gemm_dtype, product_bound

__all__ = [
    "dyadic",
    "int_add",
    "int_conv1d",
    "int_embedding",
    "int_linear",
    "int_matmul",
    "int_mul",
    "lookup",
    "requantize",
    "round_shift",
]
Array = NDArray[Any]


def int_linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, x_zero_point: int = 0, bound: int = INT32_MAX
) -> torch.Tensor:
    """``(x - x_zero_point) @ w.T + bias``: codes ``[..., in]``, ``[out, in]``, int32 ``[out]`` -> int32 ``[..., out]``.

    ``bound``: proved bound of every partial sum; it chooses the float dtype of the exact GEMM.
    """
    dtype = getattr(torch, gemm_dtype(bound))
    acc = F.linear(x.to(dtype) - x_zero_point, w.to(dtype)).to(torch.int32)
    return acc if bias is None else acc + bias


def numpy_int_linear(
    x: Array, w: Array, bias: Array | None = None, x_zero_point: int = 0, bound: int = INT32_MAX
) -> Array:
    """:func:`int_linear` in NumPy; ``w`` may come in already cast to the GEMM's dtype."""
    dtype = gemm_dtype(bound)
    rows = np.subtract(x, x_zero_point, dtype=dtype).reshape(-1, x.shape[-1])
    acc = np.dot(rows, w.astype(dtype, copy=False).T).astype(np.int32)
    acc = acc.reshape(*x.shape[:-1], w.shape[0])
    return acc if bias is None else acc + bias


def int_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    a_max: int = 255,
    b_max: int = 255,
) -> torch.Tensor:
    """``(a - a_zero_point) @ (b - b_zero_point)``: codes ``[..., n, k]``, ``[..., k, m]`` -> int32 ``[..., n, m]``.

    ``a_max``, ``b_max``: largest magnitudes after the zero points. InputError when ``k`` is so long that 32 bits may
    overflow (above the length the lowering proved the bound for).
    """
    dtype = getattr(torch, gemm_dtype(_demand_length(a.shape[-1], a_max, b_max)))
    return torch.matmul(a.to(dtype) - a_zero_point, b.to(dtype) - b_zero_point).to(torch.int32)


def numpy_int_matmul(
    a: Array, b: Array, a_zero_point: int = 0, b_zero_point: int = 0, a_max: int = 255, b_max: int = 255
) -> Array:
    """:func:`int_matmul` in NumPy."""
    dtype = gemm_dtype(_demand_length(a.shape[-1], a_max, b_max))
    left, right = np.subtract(a, a_zero_point, dtype=dtype), np.subtract(b, b_zero_point, dtype=dtype)
    return np.matmul(left, right).astype(np.int32)


def _demand_length(length: int, a_max: int, b_max: int) -> int:
    bound = product_bound(int(length), a_max, b_max)
    if bound > INT32_MAX:
        longest = INT32_MAX // (a_max * b_max)
        raise InputError(
            f"an inner product of {length} codes can overflow 32 bits", do=f"use sequences of at most {longest}"
        )
    return bound


def int_conv1d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    x_zero_point: int = 0,
    bound: int = INT32_MAX,
) -> torch.Tensor:
    """Convolution of codes ``[n, c, l]`` with ``[out, c/groups, k]`` -> int32 ``[n, out, l']``; padding is real zero.

    float64 whatever the bound: torch then takes its plain kernel, no transform with fractions in it.
    """
    args = (None, list(stride), list(padding), list(dilation), groups)
    acc = F.conv1d(x.double() - x_zero_point, w.double(), *args).to(torch.int32)
    return acc if bias is None else acc + bias[:, None]


def numpy_int_conv1d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    x_zero_point: int = 0,
    bound: int = INT32_MAX,
) -> Array:
    """:func:`int_conv1d` in NumPy: windows, then one product of matrices per group."""
    dtype, (n, channels, _), (out, per_group, k) = gemm_dtype(bound), x.shape, w.shape
    padded = np.pad(np.subtract(x, x_zero_point, dtype=dtype), ((0, 0), (0, 0), (padding[0], padding[0])))
    span = (k - 1) * dilation[0] + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=2)[:, :, :: stride[0], :: dilation[0]]
    length = windows.shape[2]
    columns = windows.reshape(n, groups, channels // groups, length, k).transpose(0, 1, 3, 2, 4)
    columns = columns.reshape(n, groups, length, per_group * k)
    kernel = w.astype(dtype, copy=False).reshape(groups, out // groups, per_group * k).transpose(0, 2, 1)
    acc = np.matmul(columns, kernel[None]).transpose(0, 1, 3, 2).reshape(n, out, length).astype(np.int32)
    return acc if bias is None else acc + bias[:, None]


def int_mul(a: torch.Tensor, b: torch.Tensor, a_zero_point: int = 0, b_zero_point: int = 0) -> torch.Tensor:
    """``(a - a_zero_point) * (b - b_zero_point)`` element by element: codes that broadcast -> int32.

    Exact: the lowering proved that the product fits.
    """
    return (a.to(torch.int32) - a_zero_point) * (b.to(torch.int32) - b_zero_point)


def numpy_int_mul(a: Array, b: Array, a_zero_point: int = 0, b_zero_point: int = 0) -> Array:
    """:func:`int_mul` in NumPy."""
    left, right = np.subtract(a, a_zero_point, dtype=np.int64), np.subtract(b, b_zero_point, dtype=np.int64)
    return np.multiply(left, right).astype(np.int32)


def int_embedding(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of integers: ``[rows, width]``, ids of any shape -> ``[*ids.shape, width]`` of the table's dtype."""
    return torch.embedding(table, ids)


def numpy_int_embedding(table: Array, ids: Array) -> Array:
    """:func:`int_embedding` in NumPy; InputError for an id outside the table (NumPy alone would count from the end)."""
    if ids.size and not (ids.min() >= 0 and ids.max() < table.shape[0]):
        raise InputError(f"ids run from {ids.min()} to {ids.max()}, the table has {table.shape[0]} rows")
    rows: Array = table[ids]
    return rows


def lookup(codes: torch.Tensor, table: torch.Tensor, first: int) -> torch.Tensor:
    """An elementwise function of a code as a table: ``table[codes - first]``; ``[2**bits]`` codes for ``first...``."""
    return table[codes.to(torch.int64) - first]


def numpy_lookup(codes: Array, table: Array, first: int) -> Array:
    """:func:`lookup` in NumPy."""
    return np.take(table, np.subtract(codes, first, dtype=np.int64))


INT_LINEAR = declare(
    Op(
        name="int_linear",
        target=int_linear,
        sig="code, code, int -> int",
        numpy=numpy_int_linear,
        onnx=emit_linear,
        bounds=linear_bounds,
        sample=lambda: ((random_codes(2, 3, 16), random_codes(5, 16), random_acc(5) // 4, -3), {}),
    )
)
INT_MATMUL = declare(
    Op(
        name="int_matmul",
        target=int_matmul,
        sig="code, code -> int",
        numpy=numpy_int_matmul,
        onnx=emit_matmul,
        bounds=matmul_bounds,
        sample=lambda: ((random_codes(2, 3, 4, 16), random_codes(2, 3, 16, 5), 7, -7), {}),
    )
)
INT_CONV1D = declare(
    Op(
        name="int_conv1d",
        target=int_conv1d,
        sig="code, code, int -> int",
        numpy=numpy_int_conv1d,
        onnx=emit_conv1d,
        bounds=conv1d_bounds,
        sample=lambda: ((random_codes(2, 6, 9), random_codes(4, 3, 3), random_acc(4) // 4, [2], [1], [1], 2, 5), {}),
    )
)
INT_MUL = declare(
    Op(
        name="int_mul",
        target=int_mul,
        sig="code, code -> int",
        numpy=numpy_int_mul,
        onnx=emit_mul,
        bounds=mul_bounds,
        sample=lambda: ((random_codes(2, 3, 8), random_codes(3, 1, low=0, high=256, dtype=torch.uint8), 5, 128), {}),
    )
)
INT_EMBEDDING = declare(
    Op(
        name="int_embedding",
        target=int_embedding,
        sig="code, ids -> code",
        numpy=numpy_int_embedding,
        onnx=emit_embedding,
        bounds=embedding_bounds,
        sample=lambda: ((random_codes(11, 4), torch.tensor([[0, 10, 3]])), {}),
    )
)
LOOKUP = declare(
    Op(
        name="lookup",
        target=lookup,
        sig="code, code -> code",
        numpy=numpy_lookup,
        onnx=emit_lookup,
        bounds=lookup_bounds,
        sample=lambda: ((random_codes(3, 5), random_codes(256), -128), {}),
    )
)
