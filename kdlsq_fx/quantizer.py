"""Lsq: the module that stands for one quantized value; base of the learned quantizers and of the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdlsq_fx import fused, recompute
from kdlsq_fx.errors import CalibrationError, ConfigError
from kdlsq_fx.fused_grid import Grid
from kdlsq_fx.observer import Observer
from kdlsq_fx.qconfig import QSpec
from kdlsq_fx.scale_init import Summary, initial_step

Role = Literal["weight", "act"]
FLOOR = 2.0**-10


def along(scale: Tensor, rank: int) -> Tensor:
    """A scale [C] shaped to run along the first of ``rank`` dimensions; a 0-d scale as it is."""
    return scale.reshape(-1, *[1] * (rank - 1)) if scale.ndim else scale


def round_codes(x: Tensor, scale: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """``clamp(round_half_even(x / s) + zp, qmin, qmax)`` as floats: the one rounding rule of the whole project."""
    q = torch.div(x, scale).round_()
    if isinstance(zero_point, Tensor) or zero_point:
        q.add_(zero_point)
    return q.clamp_(qmin, qmax)


def to_real(q: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """``(q - zp) * s``, in place on ``q``."""
    if isinstance(zero_point, Tensor) or zero_point:
        q.sub_(zero_point)
    return q.mul_(scale)


class AtLeast(torch.autograd.Function):
    """``max(raw, floor)``; the gradient passes as it is.

    A plain maximum has gradient zero below the floor, and a scale that once fell there would never come back. Nor is
    only a gradient that raises ``raw`` let through: parts of a batch, over accumulated steps or processes, have to add
    up to the gradient of the whole, whatever their signs. What falls below the floor is put back at the next forward.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, floor: Tensor) -> Tensor:
        return torch.maximum(raw, floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Lsq(nn.Module):
    """One quantized value. ``forward`` rounds to the grid and stays float; ``codes`` gives the integers.

    ``spec, role``   how it is quantized; "weight" or "act".
    ``raw``          the number behind the scale, 0-d or [C]: LSQ's step s, or a clip value alpha = qmax * s. The
                     papers' own quantity, so that their learning rates keep their meaning.
    ``floor``        2**-10 of the first ``raw``: the scale is made from ``max(raw, floor)`` and so is positive; a
                     training forward also moves ``raw`` back up to it. See :class:`AtLeast` for the gradient.
    ``ready``        0 until a scale was set by :meth:`init_from` or :meth:`finish`, then the number of codes that it is
                     for; saved in the state dict, which a quantizer of another range refuses.
    ``features``     elements per sample (act) or of the layer's weight: the N of LSQ's gradient scale.
    ``site``         where it stands, for errors.
    Works in float32 and float64; an input of another float type is computed in the type of ``raw``.
    """

    learned = True  # raw is a Parameter
    default_init = {"weight": "mse", "act": "mse"}
    raw: Tensor
    floor: Tensor
    ready: Tensor
    features: Tensor

    def __init__(self, spec: QSpec, *, role: Role, channels: int | None = None, numel: int = 0, site: str = "") -> None:
        super().__init__()
        if role not in ("weight", "act"):
            raise ConfigError(f"role={role!r} is unknown", where=site, do="use 'weight' or 'act'")
        if spec.axis is not None and (role == "act" or channels is None):
            why = "an activation has one scale (its product could not be factored)" if role == "act" else "no channels"
            raise ConfigError(f"axis={spec.axis} cannot be used: {why}", where=site, do="leave axis out of the spec")
        self.spec, self.role, self.site = spec.for_kind("act"), role, site
        self.qmin, self.qmax = self.spec.qmin, self.spec.qmax
        raw = torch.ones(() if spec.axis is None else (int(channels or 0),))
        if self.learned:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw)
        self.register_buffer("floor", torch.zeros_like(raw))
        self.register_buffer("ready", torch.tensor(0))
        self.register_buffer("features", torch.tensor(float(numel)))
        self.clipped = float("nan")  # share of the calibration sample, or of the weight, that was cut off
        self._observer: Observer | None = None
        self._known_ready = False

    # what the rest of the compiler reads

    @property
    def scale(self) -> Tensor:
        """The step of the grid, 0-d or [C], positive, detached: exactly the one ``forward`` uses."""
        with torch.no_grad():
            return self._step(torch.maximum(self.raw, self.floor)).detach()

    @property
    def zero_point(self) -> int:
        return 0

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """``x`` of any shape to int32 codes of the same shape."""
        self.check_ready()
        self.refresh(x)
        q = round_codes(x.to(self.raw.dtype), along(self.scale, x.ndim), self.zero_point, self.qmin, self.qmax)
        return q.to(torch.int32)

    def refresh(self, x: Tensor) -> None:
        """Baselines that recompute a weight's scale at each forward do it here; nothing to do where it is learned."""

    # first scales

    @property
    def init(self) -> str:
        return self.spec.init or self.default_init[self.role]

    @property
    def observing(self) -> bool:
        """While True, forward records what passes and changes nothing. Setting it starts over or drops the record."""
        return self._observer is not None

    @observing.setter
    def observing(self, on: bool) -> None:
        self._observer = Observer() if on else None

    def init_from(self, tensor: Tensor, *, where: str = "") -> None:
        """Set the scale from one tensor: the weight, or a batch of activations. CalibrationError for NaN, infinity."""
        self.site = self.site or where
        if self.role == "act":
            self.observing = True
            self.observed.add(tensor.detach(), where=self.site)
            self.finish()
            return
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            what = "a weight holds NaN or infinity" if tensor.numel() else "a weight has no elements"
            raise CalibrationError(what, where=self.site, do="load weights that are whole")
        if not float(self.features):
            self.features.fill_(tensor.numel())
        self._set_from(Summary.of(tensor.to(self.raw.dtype), self.spec.axis))

    def finish(self) -> None:
        """End observing and set the scale from what was seen; CalibrationError if nothing was."""
        seen = self.observed
        if not seen.count:
            what = "no activation reached this quantizer during calibration"
            raise CalibrationError(what, where=self.site, do="calibrate with batches that use this part of the model")
        self.features.fill_(seen.features)
        mean_abs, low, high = (self.raw.new_tensor([v]) for v in (seen.mean_abs, seen.low, seen.high))
        tail = seen.tail.to(self.raw)[None] if seen.is_sampled else None
        self._set_from(Summary(seen.values().to(self.raw)[None], mean_abs, low, high, tail, seen.count))
        self._observer = None

    @property
    def observed(self) -> Observer:
        """What was recorded so far; CalibrationError while not observing."""
        if self._observer is None:
            raise CalibrationError("not observing", where=self.site, do="set observing = True and run batches first")
        return self._observer

    @torch.no_grad()
    def _set_from(self, summary: Summary) -> None:
        self._set_raw(self._raw_of(initial_step(summary, self.qmin, self.qmax, self.init)))
        self._note_clipped(summary)

    def _note_clipped(self, summary: Summary) -> None:
        rows = summary.values
        q = torch.div(rows, self.scale.reshape(-1, 1)).round_().add_(self.zero_point)
        self.clipped = float(((q < self.qmin) | (q > self.qmax)).float().mean())

    @torch.no_grad()
    def _set_raw(self, value: Tensor) -> None:
        self.raw.copy_(value.reshape(self.raw.shape))
        self.floor.copy_(self.raw * FLOOR)
        self.ready.fill_(self._codes_of_range)

    @property
    def _codes_of_range(self) -> int:
        return self.qmax - self.qmin + 1

    def fits(self, state: Mapping[str, Any], prefix: str = "") -> bool:
        """Whether a scale in a state dict is for this range; True where it holds none."""
        known = int(state.get(f"{prefix}ready", 0))
        return known in (0, self._codes_of_range)

    def check_ready(self) -> None:
        """CalibrationError unless a scale was set."""
        if not self._known_ready:  # the buffer may live on a GPU: look once
            if not bool(self.ready):
                what = f"this {'activation' if self.role == 'act' else 'weight'} has no scale yet"
                raise CalibrationError(what, where=self.site, do="calibrate first: kdlsq_fx.calibrate(qat, batches)")
            self._known_ready = True

    # forward

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape (rows first where there is one scale per row) to the nearest points of the grid."""
        if self._observer is not None:
            self._observer.add(x, where=self.site)
            return x
        self.check_ready()
        if not self.training:
            return self._fake_quantize(x.to(self.raw.dtype))
        out = self._trained(x)
        if self.grid is not None:  # others follow running statistics, and would not give the same again
            recompute.note(out, partial(self._trained, x.detach()))
        return out

    def _trained(self, x: Tensor) -> Tensor:
        """The forward of training, by a fused kernel where one serves."""
        out = self._fused(x)
        if out is None:
            self._project()
            out = self._fake_quantize(x.to(self.raw.dtype))
        return out

    def _fused(self, x: Tensor) -> Tensor | None:
        """:meth:`_project` and :meth:`_fake_quantize` in one pass over ``x``, or None where no kernel serves."""
        if self.grid is None:
            return None
        return fused.fake_quantize(x, self.raw, self.floor, self._offset(), self.features, self.grid)

    @property
    def grid(self) -> Grid | None:
        """What a fused kernel needs to know; None where there is none for this quantizer."""
        return None

    def _offset(self) -> Tensor | None:
        return None

    @property
    def parts(self) -> fused.Parts:
        """What the scale is made of: raw, floor, and qmax where raw is a clip value, else 0."""
        return self.raw, self.floor, 0

    @torch.no_grad()
    def _project(self) -> None:
        if self.learned:
            # .data: what a backward pass reads of raw is max(raw, floor), which this leaves as it is. A kernel may have
            # saved raw at an earlier forward of the same step, of a layout that it serves
            self.raw.data.clamp_(min=self.floor)

    def _effective(self) -> Tensor:
        effective: Tensor = AtLeast.apply(self.raw, self.floor)
        return effective

    def _step(self, raw: Tensor) -> Tensor:
        """The step from a positive ``raw``."""
        return raw

    def _raw_of(self, step: Tensor) -> Tensor:
        """Inverse of :meth:`_step`."""
        return step

    def _fake_quantize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        if not self.fits(state, prefix):
            _, _, _, _, errors = others
            errors.append(
                f"{prefix[:-1]}: the state's scale is for {int(state[f'{prefix}ready'])} codes, this quantizer has "
                f"{self._codes_of_range}: prepare the model with the qconfig that the state is from"
            )
            return
        self._known_ready = False
        super()._load_from_state_dict(state, prefix, *others)

    def extra_repr(self) -> str:
        axis = "" if self.spec.axis is None else f", axis={self.spec.axis}"
        return f"{self.role}, {self.spec.quantizer}{self.spec.bits} {self.qmin}..{self.qmax}{axis}"
