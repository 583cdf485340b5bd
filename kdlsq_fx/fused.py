"""Learned quantizers in one pass over the data each way: a small C++ library on the CPU, Triton kernels on CUDA.

lsq.py's plain version is the meaning and the oracle; what stands here gives the same values bit for bit, and gradients
that differ in the order of float sums only. Used by training forwards. ``KDLSQ_FUSED=0`` in the environment or
``use(False)`` turns it off; where it cannot be had (no C++ compiler, no Triton, another device) training goes on with
the plain version, and a warning says so once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdlsq_fx.fused_grid import Grid, step_of

Parts = tuple[Tensor, Tensor, int]  # raw, floor, and qmax where raw is a clip value, else 0

_switch = {"on": os.environ.get("KDLSQ_FUSED", "1") != "0"}
_kernels: dict[str, Any] = {}  # by device type; None where there are none
warm_up_seconds: dict[str, float] = {}  # by device type: what building (or finding) and checking them took


def use(on: bool) -> None:
    """Turn the fused kernels on (the default) or off, for every model of this process."""
    _switch["on"] = on


def kernels(device: torch.device) -> Any:
    """The kernels for a device, or None. The first call builds and checks them: seconds."""
    if not _switch["on"] or torch.compiler.is_compiling():
        return None
    if device.type not in _kernels:
        began = time.perf_counter()
        _kernels[device.type] = _made(device)
        warm_up_seconds[device.type] = time.perf_counter() - began
    return _kernels[device.type]


def _made(device: torch.device) -> Any:
    makers: dict[str, Callable[[], Any]] = {"cpu": _cpu, "cuda": _cuda}
    if device.type not in makers:
        return None
    try:
        made = makers[device.type]()
        _check(made, device)
    except Exception as err:  # a compiler or driver may fail in any way; the plain version always runs
        text = str(err).strip().splitlines() or [type(err).__name__]
        warnings.warn(
            f"training on {device.type} without fused quantizer kernels, which costs time and memory: {text[0][:300]}; "
            "KDLSQ_FUSED=0 says that this is wanted",
            stacklevel=4,
        )
        return None
    return made


def _cpu() -> Any:
    from kdlsq_fx.fused_cpu import Cpu

    return Cpu()


def _cuda() -> Any:
    from kdlsq_fx.fused_cuda import Cuda

    return Cuda()


def _check(made: Any, device: torch.device) -> None:
    """RuntimeError where the kernels round otherwise than torch does here."""
    x = torch.linspace(-3, 3, 5000, device=device)
    raw, floor, features = (torch.tensor(v, device=device) for v in (1.37, 1e-3, 10.0))
    grid = Grid(-7, 7, -7.0, 7.0, True, True, 0)
    step = step_of(raw, grid.qmax)
    ratio = x / step
    want = torch.round(ratio).clamp(-7, 7)
    passed = (ratio.abs() < 7).float()
    grad_x, grad_raw, _ = made.backward(x, torch.ones_like(x), raw, floor, None, features, grid)
    slope = (want - ratio * passed).sum() / 7
    right = torch.equal(made.forward(x, raw, floor, None, grid), want * step) and torch.equal(grad_x, passed)
    if hasattr(made, "bias"):
        w_step = torch.tensor(0.031, device=device)
        on_grid = made.bias(x, (raw, floor, 7), (w_step, floor, 0))
        right &= torch.equal(on_grid, torch.round(x / (step * w_step)) * (step * w_step))
    if not right or not torch.allclose(grad_raw, slope, rtol=1e-3, atol=1e-2):
        raise RuntimeError("the kernels fail their check against torch")


class _FakeQuantize(torch.autograd.Function):
    """Forward and backward by kernels. Only x and four small tensors are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, raw: Tensor, floor: Tensor, offset: Tensor | None, features: Tensor, grid: Grid, made: Any
    ) -> Tensor:
        out: Tensor = made.forward(x, raw, floor, offset, grid)
        ctx.save_for_backward(x, raw, floor, features, *([] if offset is None else [offset]))
        ctx.grid, ctx.made = grid, made
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, floor, features, *offset = ctx.saved_tensors
        grad_x, grad_raw, grad_offset = ctx.made.backward(x, grad, raw, floor, *(offset or [None]), features, ctx.grid)
        return (grad.to(x.dtype) if grad_x is None else grad_x), grad_raw, None, grad_offset, None, None, None


def fake_quantize(
    x: Tensor, raw: Tensor, floor: Tensor, offset: Tensor | None, features: Tensor, grid: Grid
) -> Tensor | None:
    """``x`` on its grid as :mod:`kdlsq_fx.lsq` has it, or None where the kernels do not serve."""
    if type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.device != raw.device or not raw.requires_grad:
        return None
    if x.dtype != raw.dtype and not (raw.dtype == torch.float32 and x.dtype == torch.bfloat16):
        return None
    made = kernels(x.device)
    if made is None or not made.takes(x, raw, grid):
        return None
    out: Tensor = _FakeQuantize.apply(x, raw, floor, offset, features, grid, made)
    return out


def bias_grid(bias: Tensor, x: Parts, w: Parts) -> Tensor | None:
    """The bias [C] on the grid ``s_x * s_w``, no gradient; None where no kernel serves (the CPU needs none)."""
    tensors = (bias, *x[:2], *w[:2])
    if not bias.is_cuda or any(t.dtype != torch.float32 or t.device != bias.device for t in tensors):
        return None
    made = kernels(bias.device)
    if made is None or type(bias) not in (Tensor, nn.Parameter) or not bias.is_contiguous():
        return None
    return made.bias(bias, x, w) if bias.device.index == torch.cuda.current_device() else None


def squares_fit(student: Tensor, teacher: Tensor, keep: Tensor | None) -> bool:
    """Whether a kernel serves for the masked squares of these."""
    if student.shape != teacher.shape:
        return False
    tensors = [t for t in (student, teacher, keep) if t is not None]
    if any(type(t) is not Tensor or t.device != student.device for t in tensors) or student.numel() == 0:
        return False
    made = kernels(student.device)
    return made is not None and made.takes_squares(student, teacher, keep)
