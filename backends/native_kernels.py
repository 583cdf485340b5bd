"""The native kernels as functions on torch tensors: dense layers, norms, sums (attention: native_attention.py). Each
maker packs constants once and returns a function.

Operands of another dtype or layout than a kernel reads are converted first, and shapes are checked where memory safety
hangs on them. Results are new, contiguous tensors. Threads: ``torch.get_num_threads()`` at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import InputError
from ..ops.qdq import torch_container
from . import native_structs as c
from .native_library import library

Run = Callable[..., Any]
PANEL = 64  # columns of packed weights, backends/kernels/tile.h
BYTES = (torch.int8, torch.uint8)
ACCUMULATOR, CODES, REAL, CURVE = range(4)
CURVES = {"none": 0, "gelu": 1, "relu": 2}
P, I64, F32, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


def kernel(name: str, arguments: Sequence[Any]) -> Any:
    """A function of the library, with the C types of its arguments."""
    call = getattr(library(), f"kdlsq_{name}")
    call.argtypes = arguments
    return call


class Codes:
    """Codes ``qmin`` to ``qmax``: what a kernel rounds to."""

    qmin: int
    qmax: int

    @property
    def dtype(self) -> torch.dtype:
        return torch_container(self.qmin, self.qmax)


@dataclass(frozen=True)
class CodeGrid(Codes):
    """What a ``quantize`` rounds to: ``real = (code - zero_point) * step``, codes of one byte."""

    step: float
    zero_point: int
    qmin: int
    qmax: int

    def struct(self) -> c.Grid:
        inverse = float(1 / torch.tensor(self.step, dtype=torch.float32))
        return c.Grid(self.step, inverse, self.zero_point, self.qmin, self.qmax)


@dataclass(frozen=True)
class Fixed(Codes):
    """What a ``requantize`` does; ``multiplier`` and ``shift`` ints, or int64 ``[channels]``."""

    multiplier: int | torch.Tensor
    shift: int | torch.Tensor
    zero_point: int
    qmin: int
    qmax: int

    def struct(self) -> tuple[c.Requantize, list[torch.Tensor]]:
        """The struct, and the tensors that must live as long as it."""
        m, s = (torch.as_tensor(v, dtype=torch.int64).reshape(-1) for v in (self.multiplier, self.shift))
        ratio = torch.ldexp(m.double(), -s).float()
        per_channel = m.numel() > 1
        m, s, ratio = (_padded(v, 1 if v is s else 0) if per_channel else v for v in (m, s, ratio))
        made = c.Requantize(
            m.data_ptr(), s.data_ptr(), ratio.data_ptr(), per_channel, self.zero_point, self.qmin, self.qmax
        )
        return made, [m, s, ratio]


def _padded(vector: torch.Tensor, value: float = 0) -> torch.Tensor:
    return F.pad(vector, (0, -vector.numel() % PANEL), value=value).contiguous()


def pack_weight(codes: torch.Tensor) -> torch.Tensor:
    """int8 ``[out, in]`` -> ``[out / 64, in / 4, 64, 4]``, both padded with zeros."""
    n, k = codes.shape
    whole = F.pad(codes, (0, -k % 4, 0, -n % PANEL))
    return whole.view(-1, PANEL, whole.shape[1] // 4, 4).permute(0, 2, 1, 3).contiguous()


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
) -> Run:
    """``f(x, residual=None)``: codes ``[..., in]`` of ``dtype`` by int8 ``[out, in]``, and what is behind the sums.

    Nothing: int32. ``fixed`` (and a ``table`` of 256 bytes by the byte of the code): codes. ``scale`` 0-d or
    ``[out]``: floats, plus a residual. ``scale``, ``curve`` and ``grid``: codes of the curve of the floats.
    """
    call, (n, k) = kernel("linear", [P, P, I64, I64, P, P, INT]), weight.shape
    offset = x_zero_point + (128 if dtype == torch.int8 else 0)
    start = -offset * weight.sum(1, dtype=torch.int64) + (0 if bias is None else bias.to(torch.int64))
    packed, start = pack_weight(weight), _padded(start.to(torch.int32))
    p = c.Linear(weight=packed.data_ptr(), bias=start.data_ptr(), n=n, k=-(-k // 4) * 4, flip=dtype == torch.int8)
    kept: list[Any] = [packed, start]
    out_dtype, p.behind = torch.int32, ACCUMULATOR
    if fixed is not None:
        p.requantize, alive = fixed.struct()
        kept += alive
        out_dtype, p.behind = fixed.dtype, CODES
        if table is not None:
            out_dtype = table.dtype
            kept.append(table := table.contiguous())
            p.table = table.data_ptr()
    elif scale is not None:
        vector = _padded(scale.float().expand(n).contiguous())
        kept.append(vector)
        p.scale = vector.data_ptr()
        out_dtype, p.behind = torch.float32, REAL
        if grid is not None:
            p.grid, p.curve = grid.struct(), CURVES[curve]
            out_dtype, p.behind = grid.dtype, CURVE
    ref, wide = ctypes.byref(p), int(p.k)

    def linear(x: torch.Tensor, residual: torch.Tensor | None = None, kept: Any = kept) -> torch.Tensor:
        if x.shape[-1] != k:
            raise InputError(f"rows of {x.shape[-1]} codes meet a weight of {k}")
        if wide != k:
            x = F.pad(x, (0, wide - k))
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        rows = x.numel() // wide
        out = torch.empty((*x.shape[:-1], n), dtype=out_dtype)
        later = None
        if residual is not None and residual.shape != out.shape:
            residual, later = None, residual
        if residual is not None:
            residual = residual.float().contiguous()
        call(
            ref,
            x.data_ptr(),
            rows,
            x.stride(0) if x.dim() == 2 else wide,
            out.data_ptr(),
            None if residual is None else residual.data_ptr(),
            torch.get_num_threads(),
        )
        return out if later is None else out + later

    return linear


def layer_norm(
    n: int,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    eps: float,
    grid: CodeGrid | None,
    real: bool,
) -> Run:
    """``f(x)``: float32 ``[..., n]`` to the normalised floats (``real``), to their codes (``grid``), or to both."""
    call = kernel("norm", [P, I64, I64, P, P, F32, P, P, P, INT])
    gain, offset = (None if v is None else v.float().contiguous() for v in (gain, offset))
    g_ptr, o_ptr = (None if v is None else v.data_ptr() for v in (gain, offset))
    struct = None if grid is None else grid.struct()
    ref = None if struct is None else ctypes.byref(struct)
    dtype = None if grid is None else grid.dtype

    def layer_norm(x: torch.Tensor, kept: Any = (gain, offset)) -> Any:
        x = x.float().contiguous()
        floats = torch.empty_like(x) if real else None
        codes = torch.empty(x.shape, dtype=dtype) if dtype is not None else None
        call(
            x.data_ptr(),
            x.numel() // n,
            n,
            g_ptr,
            o_ptr,
            eps,
            ref,
            None if floats is None else floats.data_ptr(),
            None if codes is None else codes.data_ptr(),
            torch.get_num_threads(),
        )
        return (floats, codes) if real and codes is not None else floats if real else codes

    return layer_norm


def quantize(grid: CodeGrid) -> Run:
    """``f(x)``: float32 of any shape to codes."""
    call, struct = kernel("quantize", [P, P, I64, I64, P, INT]), grid.struct()
    ref, dtype = ctypes.byref(struct), grid.dtype

    def quantize(x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        out = torch.empty(x.shape, dtype=dtype)
        n = x.shape[-1] if x.dim() else 1
        call(x.data_ptr(), ref, x.numel() // max(n, 1), n, out.data_ptr(), torch.get_num_threads())
        return out

    return quantize


def requantize(fixed: Fixed) -> Run:
    """``f(acc)``: int32 of any shape to codes; several multipliers run along the last dimension."""
    call = kernel("requantize", [P, P, I64, I64, P, INT])
    struct, alive = fixed.struct()
    ref, dtype = ctypes.byref(struct), fixed.dtype

    def requantize(acc: torch.Tensor, kept: Any = alive) -> torch.Tensor:
        acc = acc.to(torch.int32).contiguous()
        out = torch.empty(acc.shape, dtype=dtype)
        n = acc.shape[-1] if acc.dim() else 1
        call(acc.data_ptr(), ref, acc.numel() // max(n, 1), n, out.data_ptr(), torch.get_num_threads())
        return out

    return requantize


@dataclass(frozen=True)
class NormCodes(Codes):
    """The integers of an ``int_layer_norm``."""

    gain: torch.Tensor
    offset: torch.Tensor
    fraction: int
    eps: int
    shift: int
    zero_point: int
    qmin: int
    qmax: int

    def struct(self) -> c.IntNorm:
        n = self.gain.numel()
        ends = (self.fraction, self.eps, self.shift, self.zero_point, self.qmin, self.qmax)
        return c.IntNorm(self.gain.data_ptr(), self.offset.data_ptr(), n, *ends)


def int_layer_norm(norm: NormCodes) -> Run:
    """``f(x)``: integers of up to 32 bits ``[..., n]`` to codes."""
    call, struct, n = kernel("int_norm", [P, P, I64, P, INT]), norm.struct(), norm.gain.numel()

    def int_layer_norm(x: torch.Tensor, kept: Any = norm) -> torch.Tensor:
        x = x.to(torch.int32).contiguous()
        out = torch.empty(x.shape, dtype=norm.dtype)
        call(x.data_ptr(), ctypes.byref(struct), x.numel() // n, out.data_ptr(), torch.get_num_threads())
        return out

    return int_layer_norm


MOST_TERMS = 3


def int_add(
    multipliers: Sequence[int | torch.Tensor],
    zero_points: Sequence[int],
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    norm: NormCodes | None = None,
) -> Run:
    """``f(*terms)``: up to 3 integer tensors that broadcast to ``[..., n]``, added in fixed point, rounded once; with
    ``norm`` their ``int_layer_norm``. ``multipliers``: ints, or int64 ``[n]``."""
    call = kernel("sum", [P, P, I64, P, INT])
    factors = [torch.as_tensor(m, dtype=torch.int64).reshape(-1).contiguous() for m in multipliers]
    struct = None if norm is None else norm.struct()
    ref = None if struct is None else ctypes.byref(struct)
    out_dtype = dtype if norm is None else norm.dtype

    def int_add(*terms: torch.Tensor, kept: Any = norm) -> torch.Tensor:
        shape = torch.broadcast_shapes(*(t.shape for t in terms))
        n = shape[-1]
        s = c.Sum(count=len(terms), n=n, shift=shift, zero_point=zero_point, qmin=qmin, qmax=qmax)
        s.out_bytes = out_dtype.itemsize
        whole = []
        for i, (t, m, zero) in enumerate(zip(terms, factors, zero_points)):
            is_row = t.dim() == 1 and t.shape[0] == n
            t = t.contiguous() if is_row else t.expand(shape).contiguous()  # noqa: PLW2901
            whole.append(t)
            size, unsigned = t.element_size(), t.dtype == torch.uint8
            s.terms[i] = c.Term(t.data_ptr(), m.data_ptr(), size, unsigned, zero, m.numel() > 1, is_row)
        out = torch.empty(shape, dtype=out_dtype)
        call(ctypes.byref(s), ref, out.numel() // n, out.data_ptr(), torch.get_num_threads())
        return out

    return int_add
