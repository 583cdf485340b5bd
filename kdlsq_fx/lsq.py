"""The learned quantizers: LSQ, LSQ+, KDLSQ; the table of all by name; the grid of a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdlsq_fx import fused
from kdlsq_fx.baselines import Ema, MinMax, Twn
from kdlsq_fx.fused_grid import Grid, step_of
from kdlsq_fx.qconfig import DEFAULT_QUANTIZER, QSpec
from kdlsq_fx.quantizer import Lsq, Role, along, round_codes, to_real
from kdlsq_fx.scale_init import Summary, initial_offset

__all__ = ["QUANTIZERS", "BiasGrid", "Ema", "Kdlsq", "Lsq", "LsqPlus", "LsqStep", "MinMax", "Twn", "make_quantizer"]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 128  # the largest float32 below 2**31


def _total(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``a * b`` summed to the shape of the scale: everything, or everything but the first dimension. Changes ``a``."""
    if scale.ndim == 0:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return a.mul_(b).reshape(a.shape[0], -1).sum(1)


def _inside(values: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    """``values`` where ``low < ratio < high``, else 0: one pass (masks of bools take three and cost ten times that)."""
    return torch.ops.aten.hardtanh_backward(values, ratio, low, high)


class _LsqFunction(torch.autograd.Function):
    """LSQ, and LSQ+ where ``beta`` is given; papers.md 2.1 and 2.3. Only x and two small tensors are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, beta: Tensor | None, zero: Tensor | int, qmin: int, qmax: int, g: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, step, g, *([zero] if isinstance(zero, Tensor) else []))
        ctx.qmin, ctx.qmax = qmin, qmax
        by = along(step, x.ndim)
        return to_real(round_codes(x, by, zero, qmin, qmax), by, zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, g, *rest = ctx.saved_tensors
        ratio = torch.div(x, along(step, x.ndim))
        slope = torch.round(ratio)
        for zero in rest:
            ratio.add_(zero)
            slope.add_(zero)
        grad_x = _inside(grad, ratio, ctx.qmin, ctx.qmax)
        grad_step = grad_beta = None
        if ctx.needs_input_grad[1]:
            slope.clamp_(ctx.qmin, ctx.qmax).sub_(_inside(ratio, ratio, ctx.qmin, ctx.qmax))
            grad_step = _total(slope, grad, step) * g
        if rest and ctx.needs_input_grad[2]:
            grad_beta = (grad - grad_x).sum() * g
        return grad_x, grad_step, grad_beta, None, None, None, None


def _ends(qmin: int, qmax: int, dtype: torch.dtype) -> tuple[float, float]:
    """|x| <= alpha with its ends: |x| = alpha may come out an ulp beyond qmax."""
    low, high = (v * (1 + 4 * torch.finfo(dtype).eps) for v in (qmin or -1e-30, qmax))
    return low, high


class _KdlsqFunction(torch.autograd.Function):
    """The released KDLSQ code's quantizer; papers.md 1.3. No gradient scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, qmin: int, qmax: int, clip_gradient: bool) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.qmin, ctx.qmax, ctx.clip_gradient = qmin, qmax, clip_gradient
        by = along(step_of(alpha, qmax), x.ndim)
        return to_real(round_codes(x, by, 0, qmin, qmax), by, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        ratio = torch.div(x, along(step_of(alpha, ctx.qmax), x.ndim))
        low, high = _ends(ctx.qmin, ctx.qmax, x.dtype)
        grad_x = _inside(grad, ratio, low, high) if ctx.clip_gradient else grad
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            within = _inside(ratio, ratio, low, high)
            slope = ratio.round_().clamp_(ctx.qmin, ctx.qmax).sub_(within)  # outside +-qmax: sign(x), divided below
            grad_alpha = _total(slope, grad, alpha) / ctx.qmax
        return grad_x, grad_alpha, None, None, None


class LsqStep(Lsq):
    """LSQ (arXiv 1902.08153): learned step s, ``x^ = clamp(round(x/s), qmin, qmax) * s``.

    d x^/d s: round(x/s) - x/s inside, qmin at and below the range, qmax at and above; d x^/d x: 1 inside, else 0.
    The step's gradient is multiplied by ``1 / sqrt(N * qmax)``; N is the number of weights in the layer (also with a
    scale per channel), or the mean number of features per sample that calibration saw, the batch left out: fixed from
    then on, so that a gradient does not depend on how a batch is split or padded.
    """

    @property
    def grid(self) -> Grid:
        low, high = self.qmin, self.qmax
        return Grid(low, high, low, high, alpha=False, clip=True, rows=self.raw.numel() if self.raw.ndim else 0)

    def _gradient_scale(self) -> Tensor:
        return (self.features.clamp(min=1) * self.qmax).rsqrt()

    def _fake_quantize(self, x: Tensor) -> Tensor:
        g = self._gradient_scale()
        out: Tensor = _LsqFunction.apply(x, self._effective(), None, 0, self.qmin, self.qmax, g)
        return out


class LsqPlus(LsqStep):
    """LSQ+ (arXiv 2004.09576): on activations also a learned offset beta, ``x^ = (q - zp) * s``; weights as in LSQ.

    The paper's x^ = round(clamp((x - beta)/s)) * s + beta with a real beta has no integer form. Here beta is rounded
    to ``zp = clamp(round(-beta/s), qmin, qmax)`` steps in the forward, straight-through: the gradients are the
    paper's with beta = -zp*s (d x^/d beta: 0 inside, 1 outside; d x^/d s outside: qmin or qmax). Zero is always a
    point of the grid. The gradient scale applies to both, as in the public implementation (papers.md 2.3).
    """

    def __init__(self, spec: QSpec, *, role: Role, channels: int | None = None, numel: int = 0, site: str = "") -> None:
        super().__init__(spec, role=role, channels=channels, numel=numel, site=site)
        self.offset = nn.Parameter(torch.zeros(())) if role == "act" else None

    def _offset(self) -> Tensor | None:
        return self.offset

    def _zero(self, step: Tensor) -> Tensor | int:
        """The zero point as a 0-d float tensor (no transfer from a GPU), or 0 for weights."""
        if self.offset is None:
            return 0
        return torch.round(-self.offset.detach() / step.detach()).clamp_(self.qmin, self.qmax)

    @property
    def zero_point(self) -> int:
        return int(self._zero(self.scale))

    def _fake_quantize(self, x: Tensor) -> Tensor:
        step = self._effective()
        g = self._gradient_scale()
        out: Tensor = _LsqFunction.apply(x, step, self.offset, self._zero(step), self.qmin, self.qmax, g)
        return out

    def _trained(self, x: Tensor) -> Tensor:
        if self.offset is not None:  # back to where the zero point stands still; the fused kernels lift raw alone
            step = self.scale
            self.offset.data.clamp_(min=-self.qmax * step, max=-self.qmin * step)
        return super()._trained(x)

    @torch.no_grad()
    def _set_from(self, summary: Summary) -> None:
        if self.offset is None:
            super()._set_from(summary)
            return
        step, offset = initial_offset(summary, self.qmin, self.qmax, self.init)
        self.offset.copy_(offset.reshape(()))
        self._set_raw(step)
        self._note_clipped(summary)


class Kdlsq(Lsq):
    """KDLSQ as released (papers.md 1.3): learned clip alpha, ``s = alpha / qmax``, no gradient scale; 2 bits: ternary.

    d x^/d alpha: sign(x) where |x| > alpha, else (x^ - x)/alpha. d x^/d x: on activations 1 where |x| <= alpha, else
    0; on weights 1 everywhere. Unsigned (probabilities; the released code wastes half its range there): the same on
    [0, alpha], with no gradient below.
    """

    @property
    def grid(self) -> Grid:
        low, high = _ends(self.qmin, self.qmax, self.raw.dtype)
        rows = self.raw.numel() if self.raw.ndim else 0
        return Grid(self.qmin, self.qmax, low, high, alpha=True, clip=self.role == "act", rows=rows)

    @property
    def parts(self) -> fused.Parts:
        return self.raw, self.floor, self.qmax

    def _step(self, raw: Tensor) -> Tensor:
        return step_of(raw, self.qmax)

    def _raw_of(self, step: Tensor) -> Tensor:
        return step * self.qmax

    def _fake_quantize(self, x: Tensor) -> Tensor:
        alpha = self._effective()
        out: Tensor = _KdlsqFunction.apply(x, alpha, self.qmin, self.qmax, self.role == "act")
        return out


QUANTIZERS: dict[str, type[Lsq]] = {
    "kdlsq": Kdlsq,
    "lsq": LsqStep,
    "lsq+": LsqPlus,
    "minmax": MinMax,
    "ema": Ema,
    "twn": Twn,
}


def make_quantizer(spec: QSpec, *, channels: int | None = None, numel: int = 0, role: Role, site: str = "") -> Lsq:
    """The quantizer a spec names. ``channels``: length of the scale where ``spec.axis`` is 0; ``numel``: of the weight.

    ConfigError for an axis without channels or on an activation, and for twn on an activation.
    """
    return QUANTIZERS[spec.quantizer or DEFAULT_QUANTIZER](spec, role=role, channels=channels, numel=numel, site=site)


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, grid: Tensor) -> Tensor:
        return round_codes(bias, grid, 0, INT32_MIN, INT32_MAX).mul_(grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FusedGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class BiasGrid(nn.Module):
    """A bias [C] on the grid of its product, ``s = s_x * s_w`` (0-d or [C]): int32 codes, straight-through gradient."""

    def between(self, bias: Tensor, x: Lsq, w: Lsq) -> Tensor:
        """:meth:`forward` with the scales of two quantizers; one kernel in training on a GPU."""
        rounded = fused.bias_grid(bias.detach(), x.parts, w.parts) if x.training else None
        if rounded is None:
            return self(bias, x.scale.detach(), w.scale.detach())
        out: Tensor = _FusedGrid.apply(bias, rounded)
        return out

    def forward(self, bias: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
        out: Tensor = _RoundToGrid.apply(bias, (x_scale * w_scale).detach())
        return out

    @torch.no_grad()
    def codes(self, bias: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
        """int32 [C]; ``codes * (x_scale * w_scale)`` equals :meth:`forward` bit for bit."""
        return round_codes(bias, x_scale * w_scale, 0, INT32_MIN, INT32_MAX).to(torch.int32)
