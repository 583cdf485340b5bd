"""The learned quantizers as Triton kernels: one launch forward, two backward (the data; the sums of its parts).

The arithmetic is quantizer.py's and lsq.py's in float32, with correctly rounded division; sums run in a fixed order, so
a run repeats itself bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdlsq_fx.fused_grid import Grid, dense

BLOCK = 4096
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _nearest(v):
    """Round half to even: adding 2**23 leaves no room for a fraction; what is larger has none."""
    size = tl.abs(v)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(v < 0, -whole, whole), v)


@triton.jit
def _clamped(v, low, high):
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _step(raw, floor, qmax, ALPHA: tl.constexpr):
    least = tl.where(raw < floor, floor, raw)
    if ALPHA:
        least = tl.div_rn(least, qmax)
    return least


@triton.jit
def _zero(step, offset, qmin, qmax, OFFSET: tl.constexpr):
    zero = step * 0.0
    if OFFSET:
        zero = _clamped(_nearest(tl.div_rn(-tl.load(offset), step)), qmin, qmax)
    return zero


@triton.jit
def _forward(
    x, out, raw, floor, offset, n, inner, qmin, qmax,
    ALPHA: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, PROJECT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < n
    if ROWS:
        row = at // inner
        step = _step(tl.load(raw + row, there, 1.0), tl.load(floor + row, there, 1.0), qmax, ALPHA)
    else:
        first, least = tl.load(raw), tl.load(floor)
        if PROJECT:  # a program finds the same step whether it reads before or after
            tl.store(raw, tl.where(first < least, least, first), tl.program_id(0) == 0)
        step = _step(first, least, qmax, ALPHA)
    zero = _zero(step, offset, qmin, qmax, OFFSET)
    ratio = tl.div_rn(tl.load(x + at, there, 0.0).to(tl.float32), step)
    code = _clamped(_nearest(ratio) + zero, qmin, qmax)
    tl.store(out + at, (code - zero) * step, there)


@triton.jit
def _backward(
    x, grad, grad_x, slopes, outside, raw, floor, offset, n, span, qmin, qmax, low, high,
    ALPHA: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, CLIP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program p takes elements p * span ... : a row where there is a scale for each, else one block."""
    p = tl.program_id(0)
    scale_at = p if ROWS else 0
    step = _step(tl.load(raw + scale_at), tl.load(floor + scale_at), qmax, ALPHA)
    zero = _zero(step, offset, qmin, qmax, OFFSET)
    slope = tl.zeros((SIZE,), tl.float32)
    beyond = tl.zeros((SIZE,), tl.float32)
    for start in range(0, span, SIZE):
        within = start + tl.arange(0, SIZE)
        at = p.to(tl.int64) * span + within
        there = (within < span) & (at < n)
        ratio = tl.div_rn(tl.load(x + at, there, 0.0).to(tl.float32), step)
        code = _clamped(_nearest(ratio) + zero, qmin, qmax)
        ratio += zero
        up = tl.load(grad + at, there, 0.0).to(tl.float32)
        cut = (ratio <= low) | (ratio >= high)
        passed = tl.where(cut, 0.0, up)
        slope += (code - tl.where(cut, 0.0, ratio)) * up
        if OFFSET:
            beyond += up - passed
        if CLIP:
            tl.store(grad_x + at, passed.to(grad_x.dtype.element_ty), there)
    tl.store(slopes + p, tl.sum(slope, 0))
    if OFFSET:
        tl.store(outside + p, tl.sum(beyond, 0))


@triton.jit
def _finish(
    slopes, outside, features, grad_raw, grad_offset, count, qmax,
    ALPHA: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    if ALPHA:
        share = 1.0 / qmax
    else:
        least = tl.load(features)
        least = tl.where(least < 1.0, 1.0, least)
        share = 1.0 / tl.sqrt(least * qmax)
    if ROWS:
        at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        there = at < count
        tl.store(grad_raw + at, tl.load(slopes + at, there, 0.0) * share, there)
    else:
        total = tl.zeros((SIZE,), tl.float32)
        beyond = tl.zeros((SIZE,), tl.float32)
        for start in range(0, count, SIZE):
            at = start + tl.arange(0, SIZE)
            total += tl.load(slopes + at, at < count, 0.0)
            if OFFSET:
                beyond += tl.load(outside + at, at < count, 0.0)
        tl.store(grad_raw, tl.sum(total, 0) * share)
        if OFFSET:
            tl.store(grad_offset, tl.sum(beyond, 0) * share)


@triton.jit
def _bias(
    bias, out, raw_x, floor_x, raw_w, floor_w, n, qmax_x, qmax_w,
    ALPHA_X: tl.constexpr, ALPHA_W: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = at < n
    step = _step(tl.load(raw_x), tl.load(floor_x), qmax_x, ALPHA_X)
    if ROWS:
        other = _step(tl.load(raw_w + at, there, 1.0), tl.load(floor_w + at, there, 1.0), qmax_w, ALPHA_W)
    else:
        other = _step(tl.load(raw_w), tl.load(floor_w), qmax_w, ALPHA_W)
    step = step * other
    code = _clamped(_nearest(tl.div_rn(tl.load(bias + at, there, 0.0), step)), -2147483648.0, 2147483520.0)
    tl.store(out + at, code * step, there)


class Cuda:
    """The kernels on a GPU. Scales are float32; the input may be float32, bfloat16 or float16."""

    def takes(self, x: Tensor, raw: Tensor, grid: Grid) -> bool:
        here = not x.is_cuda or x.device.index == torch.cuda.current_device()  # Triton launches on the current one
        return here and x.dtype in TYPES and raw.dtype == torch.float32 and (not grid.rows or x.is_contiguous())

    def forward(self, x: Tensor, raw: Tensor, floor: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
        x = x if dense(x) else x.contiguous()
        out = torch.empty_like(x, dtype=raw.dtype)  # permuted inputs are taken in the order of their memory
        n = x.numel()
        size = 1024
        if grid.rows and grid.project:
            raw.clamp_(min=floor)
        _forward[(triton.cdiv(n, size),)](
            x, out, raw, floor, raw if offset is None else offset, n, n // max(grid.rows, 1),
            float(grid.qmin), float(grid.qmax),
            ALPHA=grid.alpha, OFFSET=offset is not None, ROWS=bool(grid.rows), PROJECT=grid.project, SIZE=size,
        )  # fmt: skip
        return out

    def backward(
        self,
        x: Tensor,
        grad: Tensor,
        raw: Tensor,
        floor: Tensor,
        offset: Tensor | None,
        features: Tensor,
        grid: Grid,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(gradient of x or None where it is ``grad`` itself, of raw, of the offset)."""
        if not dense(x):
            x = x.contiguous()
        grad_x = torch.empty_like(x) if grid.clip else grad
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        n = x.numel()
        span = n // grid.rows if grid.rows else BLOCK
        count = grid.rows or triton.cdiv(n, BLOCK)
        parts = torch.empty(2 if offset is not None else 1, count, dtype=torch.float32, device=x.device)
        outside = parts[-1]
        grad_raw, grad_offset = torch.empty_like(raw), None if offset is None else torch.empty_like(offset)
        other = raw if offset is None else offset
        flags = {"ALPHA": grid.alpha, "OFFSET": offset is not None, "ROWS": bool(grid.rows)}
        _backward[(count,)](
            x, grad, grad_x, parts, outside, raw, floor, other, n, span,
            float(grid.qmin), float(grid.qmax), float(grid.low), float(grid.high),
            CLIP=grid.clip, SIZE=1024, **flags,
        )  # fmt: skip
        size = 256
        _finish[(triton.cdiv(count, size) if grid.rows else 1,)](
            parts, outside, features, grad_raw, grad_raw if grad_offset is None else grad_offset,
            count, float(grid.qmax), SIZE=size, **flags,
        )  # fmt: skip
        return (grad_x if grid.clip else None), grad_raw, grad_offset

    def takes_squares(self, student: Tensor, teacher: Tensor, keep: Tensor | None) -> bool:
        return False  # torch's own kernels serve

    def bias(self, bias: Tensor, x: tuple[Tensor, Tensor, int], w: tuple[Tensor, Tensor, int]) -> Tensor:
        """The bias on the grid of a product; ``x``, ``w``: (raw, floor, qmax where raw is a clip value, else 0)."""
        out = torch.empty_like(bias)
        size = 1024
        _bias[(triton.cdiv(bias.numel(), size),)](
            bias, out, x[0], x[1], w[0], w[1], bias.numel(), float(x[2] or 1), float(w[2] or 1),
            ALPHA_X=bool(x[2]), ALPHA_W=bool(w[2]), ROWS=w[0].dim() > 0, SIZE=size,
        )  # fmt: skip
        return out
