"""Quantizers that learn nothing, for comparison: min-max PTQ, Q8BERT's running maximum, TernaryBERT's TWN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlsq_fx.errors import ConfigError
from kdlsq_fx.processes import largest
from kdlsq_fx.qconfig import QSpec
from kdlsq_fx.quantizer import Lsq, Role, along, round_codes, to_real
from kdlsq_fx.scale_init import Summary

DECAY = 0.9999
TWN_SHARE = 0.7


class _StraightThrough(torch.autograd.Function):
    """The grid forward, the identity backward (Q8BERT, TernaryBERT)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
        return to_real(round_codes(x, step, 0, qmin, qmax), step, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


class MinMax(Lsq):
    """Post-training quantization: the scale from the largest magnitude of the weight or of the calibration data."""

    learned = False
    default_init = {"weight": "minmax", "act": "minmax"}

    def _fake_quantize(self, x: Tensor) -> Tensor:
        out: Tensor = _StraightThrough.apply(x, along(self.scale, x.ndim), self.qmin, self.qmax)
        return out


class Ema(MinMax):
    """Q8BERT: weights by their own maximum at each forward, activations by a running mean of batch maxima.

    The decay is 0.9999, but a plain mean until that many batches were seen, calibration included: what a
    bias-corrected start amounts to. Only a training forward moves it.
    """

    batches: Tensor

    def __init__(self, spec: QSpec, *, role: Role, channels: int | None = None, numel: int = 0, site: str = "") -> None:
        super().__init__(spec, role=role, channels=channels, numel=numel, site=site)
        self.register_buffer("batches", torch.tensor(0, dtype=torch.int64))

    @torch.no_grad()
    def _set_from(self, summary: Summary) -> None:
        if self.role == "act":
            self.batches.fill_(self.observed.batches)
        if self.role == "act" and not self.spec.init:
            peak = summary.high.new_full((1,), self.observed.peak_sum / self.observed.batches)
            summary = Summary(summary.values, summary.mean_abs, -peak, peak)
        super()._set_from(summary)

    @torch.no_grad()
    def refresh(self, x: Tensor) -> None:
        if self.role == "weight":
            peak = (x.reshape(x.shape[0], -1).abs().amax(1) if self.spec.axis == 0 else x.abs().max()) / self.qmax
            self.raw.copy_(torch.where(peak > 0, peak, self.raw))

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp(min=1 - DECAY).to(self.raw.dtype)
        peak = largest(x.abs().max()) / self.qmax  # of the whole batch, whatever part of it this process holds
        self.raw.copy_(torch.where(torch.isfinite(peak), self.raw + (peak - self.raw) * share, self.raw))

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if self.role == "weight":
            self.refresh(x)
        elif self.training:
            self._follow(x)
        return super()._fake_quantize(x)


class Twn(Lsq):
    """TernaryBERT's weights (papers.md 3.2): ``w^ = alpha * sign(w)`` where ``|w| > D``, else 0.

    ``D = 0.7 * mean|w|``, ``alpha`` the mean of the ``|w|`` above it; both anew at each forward, per tensor or row.
    The gradient passes everywhere. The released code's clip of weights at +-2.5 is left out. Codes are -1, 0, 1;
    ``scale`` is alpha of the last weight seen, 1 for a row of zeros.
    """

    learned = False
    default_init = {"weight": "minmax", "act": "minmax"}

    def __init__(self, spec: QSpec, *, role: Role, channels: int | None = None, numel: int = 0, site: str = "") -> None:
        if role != "weight":
            raise ConfigError("quantizer 'twn' is for weights only", where=site, do="use 'ema' for activations")
        super().__init__(spec, role=role, channels=channels, numel=numel, site=site)

    @torch.no_grad()
    def _ternary(self, x: Tensor) -> Tensor:
        """Codes as floats; sets the scale."""
        rows = x.reshape(x.shape[0], -1) if self.spec.axis == 0 else x.reshape(1, -1)
        size = rows.abs()
        large = size > TWN_SHARE * size.mean(1, keepdim=True)
        number = large.sum(1)
        alpha = size.mul_(large).sum(1) / number.clamp(min=1)
        self.raw.copy_(torch.where(number > 0, alpha, 1.0).reshape(self.raw.shape))
        return rows.sign().mul_(large).reshape(x.shape)

    def refresh(self, x: Tensor) -> None:
        self._ternary(x.to(self.raw.dtype))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        self.check_ready()
        return self._ternary(x.to(self.raw.dtype)).to(torch.int32)

    @torch.no_grad()
    def _set_from(self, summary: Summary) -> None:
        rows = summary.values
        self._ternary(rows if self.spec.axis == 0 else rows.reshape(-1))
        self._set_raw(self.raw.clone())
        self.floor.zero_()
        self.clipped = 0.0

    def _fake_quantize(self, x: Tensor) -> Tensor:
        out: Tensor = _TwnFunction.apply(x, self)
        return out


class _TwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, twn: Twn) -> Tensor:
        codes = twn._ternary(x)
        return codes.mul_(along(twn.scale, x.ndim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
