"""Builds fused_cpu.cpp with the machine's own C++ compiler, once, and calls it: one pass over the data each way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdlsq_fx.compiled import compiled
from kdlsq_fx.fused_grid import Grid, dense

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-fno-math-errno", "-fno-trapping-math")
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}


class _Layout(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64 * 4), ("x", ctypes.c_int64 * 3), ("y", ctypes.c_int64 * 3)]


class _Grid(ctypes.Structure):
    _fields_ = [
        *((k, ctypes.c_double) for k in ("qmin", "qmax", "low", "high")),
        *((k, ctypes.c_int64) for k in ("alpha", "per_row", "threads")),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [
        *((k, ctypes.c_int64 * 4) for k in ("n", "k")),
        *((k, ctypes.c_int64) for k in ("floored", "threads")),
        ("floor", ctypes.c_float),
    ]


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def strides(x: Tensor) -> tuple[list[int], list[int]] | None:
    """Sizes and strides of ``x`` as four dimensions, the last with stride 1; None where it has no such form: a view
    with gaps, or one that is permuted in the last dimension."""
    if x.is_contiguous():
        return [1, 1, 1, x.numel()], [0, 0, 0, 1]
    if x.dim() > 4 or x.stride(-1) != 1 or x.shape[-1] < 8 or not dense(x):
        return None
    fill = 4 - x.dim()
    return [1] * fill + list(x.shape), [0] * fill + list(x.stride())


def contiguous_strides(n: Sequence[int]) -> list[int]:
    return [n[1] * n[2] * n[3], n[2] * n[3], n[3], 1]


class Cpu:
    """The kernels on the CPU. Scales and gradients are float32 or float64, the input may be bfloat16 beside float32."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(compiled("fused", [SOURCE], FLAGS)))

    def takes(self, x: Tensor, raw: Tensor, grid: Grid) -> bool:
        if raw.dtype not in (torch.float32, torch.float64):
            return False
        return x.is_contiguous() if grid.rows else strides(x) is not None

    def _plan(self, x: Tensor, grid: Grid) -> tuple[_Layout, _Grid, str]:
        if grid.rows:
            n, by = [grid.rows, 1, 1, x.numel() // grid.rows], [x.numel() // grid.rows, 0, 0, 1]
        else:
            n, by = strides(x) or ([], [])
        layout = _Layout((ctypes.c_int64 * 4)(*n), (ctypes.c_int64 * 3)(*by[:3]), (ctypes.c_int64 * 3)())
        layout.y[:] = contiguous_strides(n)[:3]
        numbers = _Grid(grid.qmin, grid.qmax, grid.low, grid.high, grid.alpha, bool(grid.rows), torch.get_num_threads())
        return layout, numbers, TYPES[x.dtype]

    def forward(self, x: Tensor, raw: Tensor, floor: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
        layout, numbers, name = self._plan(x, grid)
        out = torch.empty(x.shape, dtype=raw.dtype)
        getattr(self.lib, f"forward_{name}")(
            ctypes.byref(layout), ctypes.byref(numbers), *map(_pointer, (x, out, raw, floor, offset)), int(grid.project)
        )
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
        layout, numbers, name = self._plan(x, grid)
        grad_x = torch.empty_like(x) if grid.clip else None
        grad_raw = torch.empty_like(raw)
        grad_offset = None if offset is None else torch.empty_like(offset)
        grad = grad.contiguous()
        pointers = map(_pointer, (x, grad, grad_x, raw, floor, offset, features, grad_raw, grad_offset))
        getattr(self.lib, f"backward_{name}")(ctypes.byref(layout), ctypes.byref(numbers), *pointers)
        return grad_x, grad_raw, grad_offset

    def takes_squares(self, student: Tensor, teacher: Tensor, keep: Tensor | None) -> bool:
        tensors = [t for t in (student, teacher, keep) if t is not None]
        whole = student.is_contiguous() and teacher.is_contiguous()
        whole &= keep is None or keep.expand(student.shape).stride(-1) in (0, 1)
        return whole and 2 <= student.dim() <= 4 and all(t.dtype == torch.float32 for t in tensors)

    def _squares(self, x: Tensor, keep: Tensor | None, floor: float | None) -> _Squares:
        fill = 4 - x.dim()
        n = [x.shape[0], *[1] * fill, *x.shape[1:]]
        by = [0] * x.dim() if keep is None else keep.expand(x.shape).stride()
        k = [by[0], *[0] * fill, *by[1:]]
        ints = ctypes.c_int64 * 4
        return _Squares(ints(*n), ints(*k), floor is not None, torch.get_num_threads(), floor or 0.0)

    def squares(self, student: Tensor, teacher: Tensor, keep: Tensor | None, floor: float | None) -> Tensor:
        """(batch,) sums of ``((student - teacher) * keep)**2``; with ``floor`` entries <= floor count as 0."""
        out = student.new_empty(student.shape[0])
        spec = self._squares(student, keep, floor)
        self.lib.squares_float(ctypes.byref(spec), *map(_pointer, (student, teacher, keep, out)))
        return out

    def squares_backward(
        self, student: Tensor, teacher: Tensor, keep: Tensor | None, floor: float | None, grad: Tensor
    ) -> Tensor:
        """Gradient of the student for a gradient (batch,) of the sums."""
        out = torch.empty_like(student)
        spec = self._squares(student, keep, floor)
        up = grad.contiguous()
        self.lib.squares_back_float(ctypes.byref(spec), *map(_pointer, (student, teacher, keep, up, out)))
        return out
