"""int8 products in oneDNN, through torch alone: what the native backend uses where its own kernels cannot be built.

oneDNN requantizes with a float32 factor, so ``requantize`` can be one code away at near-ties; sums alone are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .native_kernels import CodeGrid, Fixed

onednn = torch.ops.onednn
POST = {"": "none", "none": "none", "gelu": "gelu", "relu": "relu"}


def linear(
    dtype: torch.dtype,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: int,
    *,
    fixed: Fixed | None = None,
    table: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    curve: str = "",
    grid: CodeGrid | None = None,
) -> Callable[..., Any]:
    """As native_kernels.linear, by ``onednn.qlinear_pointwise``; on uint8: int8 activations are 1000 times slower."""
    n, k = weight.shape
    if fixed is None and scale is None:
        return _accumulator(dtype, weight, bias, x_zero_point)
    packed = onednn.qlinear_prepack(weight, None)
    zeros, zero = torch.zeros(n, dtype=torch.int32), x_zero_point + (128 if dtype == torch.int8 else 0)
    if fixed is not None:
        factor = torch.ldexp(torch.as_tensor(fixed.multiplier).double(), -torch.as_tensor(fixed.shift)).float()
        out: tuple[Any, ...] = (1.0, fixed.zero_point, fixed.dtype)
    else:
        factor = scale.float()  # type: ignore[union-attr]
        out = (1.0, 0, torch.float32) if grid is None else (grid.step, grid.zero_point, grid.dtype)
    factor = factor.reshape(-1).expand(n).contiguous()
    start = None if bias is None else bias.float() * factor
    clip = _clip(fixed or grid)

    def linear(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        codes = _unsigned(x).reshape(-1, k)
        made = onednn.qlinear_pointwise(codes, 1.0, zero, packed, factor, zeros, start, *out, POST[curve], [], "none")
        if clip is not None:
            made.clamp_(*clip)
        if table is not None:
            made = table[made.view(torch.uint8).int()]
        made = made.view(*x.shape[:-1], n)
        return made if residual is None else made + residual

    return linear


def _unsigned(x: torch.Tensor) -> torch.Tensor:
    """int8 codes as uint8, 128 higher."""
    x = x.contiguous()
    return x.view(torch.uint8) ^ 128 if x.dtype == torch.int8 else x


def _clip(ends: Fixed | CodeGrid | None) -> tuple[int, int] | None:
    """The range of the codes, where it is not that of their container."""
    if ends is None:
        return None
    info = torch.iinfo(ends.dtype)
    return None if (ends.qmin, ends.qmax) == (info.min, info.max) else (ends.qmin, ends.qmax)


def _accumulator(
    dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None, x_zero_point: int
) -> Callable[..., Any]:
    """int32 sums, exactly."""
    across, k = weight.t(), weight.shape[1]
    offset = x_zero_point - (128 if dtype == torch.uint8 else 0)
    start = (-offset * weight.sum(1, dtype=torch.int64) + (0 if bias is None else bias.to(torch.int64))).to(torch.int32)

    def linear(x: torch.Tensor) -> torch.Tensor:
        codes = x.contiguous()
        signed = (codes ^ 128).view(torch.int8) if dtype == torch.uint8 else codes
        return (torch._int_mm(signed.reshape(-1, k), across) + start).view(*x.shape[:-1], -1)

    return linear


@functools.cache
def saturates() -> bool:
    """True where oneDNN's uint8 x int8 products lose large sums on this CPU (no VNNI: pairs are added in 16 bits)."""
    x, w = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((32, 64), 127, dtype=torch.int8)
    one, zero = torch.ones(32), torch.zeros(32, dtype=torch.int32)
    packed = onednn.qlinear_prepack(w, None)
    found = onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return not bool((found == 255 * 127 * 64).all())
