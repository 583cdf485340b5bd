"""The native kernels of attention as functions on torch tensors; conventions as in native_kernels.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..ops.int_softmax import TABLE_LAST
from . import native_structs as c
from .native_kernels import I64, INT, CodeGrid, Fixed, P, Run, kernel

NO_MASK, ADDED, KEPT = range(3)


def product(a_dtype: torch.dtype, b_dtype: torch.dtype, a_zero_point: int, b_zero_point: int) -> Run:
    """``f(a, b)``: ``(a - zero) @ (b - zero)``, codes ``[..., n, k]``, ``[..., k, m]`` -> int32 ``[..., n, m]``."""
    call = kernel("product", [P, P, P, P, P, I64, P, INT])
    fixed = {
        "a_signed": a_dtype == torch.int8,
        "b_signed": b_dtype == torch.int8,
        "a_zero": a_zero_point,
        "b_zero": b_zero_point,
    }

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (n, k), m = a.shape[-2:], b.shape[-1]
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = a.expand(*lead, n, k), b.expand(*lead, k, m)
        if a.stride(-1) != 1:
            a = a.contiguous()
        in_columns = b.stride(-2) == 1 and k % 4 == 0
        if not in_columns and b.stride(-1) != 1:
            b = b.contiguous()
        out = torch.empty((*lead, n, m), dtype=torch.int32)
        p = c.Product(
            n=n,
            k=k,
            m=m,
            b_in_columns=in_columns,
            a_stride=a.stride(-2),
            b_stride=b.stride(-1) if in_columns else b.stride(-2),
            **fixed,
        )
        a_offsets, b_offsets = _offsets(a), _offsets(b)
        call(
            ctypes.byref(p),
            a.data_ptr(),
            a_offsets.data_ptr(),
            b.data_ptr(),
            b_offsets.data_ptr(),
            a_offsets.numel(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    return product


def _offsets(x: torch.Tensor) -> torch.Tensor:
    """Where each matrix of a batch begins, in elements."""
    total = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(x.shape[:-2], x.stride()[:-2]):
        total = total.unsqueeze(-1) + torch.arange(size) * stride
    return total.reshape(-1)


def softmax(grid: CodeGrid) -> Run:
    """``f(x)``: floats ``[..., n]`` to the codes of their softmax over the last dimension."""
    call, struct = kernel("softmax", [P, I64, I64, P, P, INT]), grid.struct()
    ref, dtype = ctypes.byref(struct), grid.dtype

    def softmax(x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        out, n = torch.empty(x.shape, dtype=dtype), x.shape[-1]
        call(x.data_ptr(), x.numel() // n, n, ref, out.data_ptr(), torch.get_num_threads())
        return out

    return softmax


@dataclass(frozen=True)
class Whole:
    """The integers of an ``int_softmax`` with its table of exponentials."""

    table: torch.Tensor
    multiplier: int
    shift: int
    limit: int
    divider: int

    def struct(self) -> c.IntSoftmax:
        return c.IntSoftmax(self.table.data_ptr(), self.multiplier, self.shift, self.limit, self.divider, TABLE_LAST)


def int_softmax(whole: Whole, grid: CodeGrid) -> Run:
    """``f(scores, keep=None)``: int32 ``[..., n]`` and a bool that broadcasts to it, to codes."""
    call = kernel("int_softmax", [P, P, I64, I64, P, P, P, INT])
    structs = whole.struct(), grid.struct()
    dtype = grid.dtype

    def int_softmax(x: torch.Tensor, keep: torch.Tensor | None = None, kept: Any = whole) -> torch.Tensor:
        x = x.to(torch.int32).contiguous()
        out, n = torch.empty(x.shape, dtype=dtype), x.shape[-1]
        if keep is not None:
            keep = keep.bool().expand(x.shape).contiguous()
        call(
            x.data_ptr(),
            None if keep is None else keep.data_ptr(),
            x.numel() // n,
            n,
            ctypes.byref(structs[0]),
            ctypes.byref(structs[1]),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    return int_softmax


@dataclass(frozen=True)
class Side:
    """An operand of attention: dtype and zero point of its codes."""

    dtype: torch.dtype
    zero_point: int


def attention(
    q: Side, k: Side, v: Side, probs: CodeGrid, out: Fixed, *, scale: float = 1.0, whole: Whole | None = None
) -> Run:
    """``f(q, k_t, v, mask=None)``: codes of ``softmax(q @ k_t + mask) @ v``, requantized.

    ``[batch, heads, rows, dim]``, ``[batch, heads, dim, keys]``, ``[batch, heads, keys, dim]`` (or without ``batch``)
    -> ``[batch, heads, rows, dim]``, a transposed view of ``[batch, rows, heads, dim]``. The mask broadcasts to the
    scores: float32 that is added to them, or (with ``whole``) bool, true where a key is there.
    """
    call = kernel("attention", [P, P, P, INT])
    fixed, alive = out.struct()
    sides: dict[str, Any] = {}
    for name, side in (("q", q), ("k", k), ("v", v)):
        sides |= {f"{name}_signed": side.dtype == torch.int8, f"{name}_zero": side.zero_point}
    p = c.Attention(scale=scale, probs=probs.struct(), out=fixed, **sides)
    if whole is not None:
        p.whole = whole.struct()
    ref, dtype, kind = ctypes.byref(p), out.dtype, ADDED if whole is None else KEPT
    q_zero, k_zero = q.zero_point, k.zero_point
    mask_dtype = torch.float32 if whole is None else torch.bool

    def attention(
        q: torch.Tensor,
        k_t: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        kept: Any = (alive, whole),
    ) -> torch.Tensor:
        if q.dim() == 3:
            made = attention(q[None], k_t[None], v[None], mask if mask is None or mask.dim() < 3 else mask[None])
            return made[0]
        k, width = k_t.transpose(2, 3), v.shape[-1]
        if q.shape[-1] % 4:
            more = (0, -q.shape[-1] % 4)
            q, k, v = F.pad(q, more, value=q_zero), F.pad(k, more, value=k_zero), F.pad(v, more)
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, rows, dim = q.shape
        keys = k.shape[2]
        t = c.Tokens(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), batch=batch, heads=heads, rows=rows, keys=keys)
        t.dim = dim
        t.q_strides, t.k_strides, t.v_strides = q.stride()[:3], k.stride()[:3], v.stride()[:3]
        if mask is not None:
            mask = mask.to(mask_dtype).expand(batch, heads, rows, keys)
            if mask.stride(3) > 1:
                mask = mask.contiguous()
            t.mask_strides, t.mask_step = mask.stride()[:3], mask.stride(3)
            t.mask, t.mask_kind = mask.data_ptr(), kind
        made = torch.empty(batch, rows, heads, dim, dtype=dtype)
        call(ref, ctypes.byref(t), made.data_ptr(), torch.get_num_threads())
        return made[..., :width].transpose(1, 2)

    return attention
