"""First scales: LSQ's mean, KDLSQ's quantile rule, a search for the least squared error, the maximum.

Every function takes ``values`` [C, K], one row per scale, and gives steps [C]. docs/decisions/0001-scale-init.md has
the figures behind the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlsq_fx.observer import CAPACITY

GAMMA = 0.05
_ROW_SAMPLE = 256
_COARSE = tuple(2 ** (-k / 6) for k in range(45))  # clip as a share of the maximum: 1 down to 1/160
_FINE = tuple(2 ** (k / 24) for k in (-3, -2, -1, 1, 2, 3))
_OFFSET_SAMPLE = 2**14
_OFFSET_SHARES = tuple(2 ** (-k / 3) for k in range(13))


@dataclass(frozen=True)
class Summary:
    """What a step is made of: ``values`` [C, K] (all, or a sample) and per row exact ``mean_abs, low, high`` [C]."""

    values: Tensor
    mean_abs: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, tensor: Tensor, axis: int | None) -> Summary:
        """Of a weight: rows are output channels when ``axis`` is 0, else the tensor is one row."""
        rows = tensor.detach().reshape(tensor.shape[0], -1) if axis == 0 else tensor.detach().reshape(1, -1)
        low, high = torch.aminmax(rows, dim=1)
        return cls(rows, rows.abs().mean(1), low, high)


def mean_step(summary: Summary, qmin: int, qmax: int) -> Tensor:
    """``2 * mean|v| / sqrt(Q_P)`` (LSQ, arXiv 1902.08153, section 2.1)."""
    return 2 * summary.mean_abs / qmax**0.5


def minmax_step(summary: Summary, qmin: int, qmax: int) -> Tensor:
    """The smallest step that clips nothing; an unsigned range ignores what is negative."""
    step = summary.high.clamp(min=0) / qmax
    return torch.maximum(step, summary.low.clamp(max=0) / qmin) if qmin else step


def quantile_step(summary: Summary, qmin: int, qmax: int, gamma: float = GAMMA) -> Tensor:
    """KDLSQ's rule: sort, drop ``gamma/2`` of the values on each side, the larger end is the clip ``qmax * s``.

    The released code's upper index is n for tiny tensors, one behind the end; it is held at n - 1 here.
    """
    rows = summary.values
    n = rows.shape[1]
    i_min = round(gamma * n / 2)
    i_max = min(n - i_min, n - 1)
    ends = [torch.kthvalue(rows, i + 1, dim=1).values.abs() for i in (min(i_min, n - 1), i_max)]
    return torch.maximum(*ends) / qmax


def mse_step(summary: Summary, qmin: int, qmax: int) -> Tensor:
    """The step of least ``sum (x^ - x)**2`` among 45 clips 12 % apart and 6 around the best of them.

    At most 2**17 values in all, or 256 of each row, are looked at: a random choice with a fixed seed.
    """
    rows = _subsample(summary.values)
    widest = minmax_step(summary, qmin, qmax)
    best, error = widest.clone(), torch.full_like(widest, torch.inf)
    for shares in (_COARSE, _FINE):
        center = widest if shares is _COARSE else best.clone()
        for share in shares:
            step = center * share
            missed = _squared_error(rows, step, qmin, qmax)
            better = missed < error
            best, error = torch.where(better, step, best), torch.where(better, missed, error)
    return best


INITS = {"mean": mean_step, "quantile": quantile_step, "mse": mse_step, "minmax": minmax_step}


def initial_step(summary: Summary, qmin: int, qmax: int, init: str) -> Tensor:
    """Steps [C], all finite and > 0: a row of zeros takes the mean of the other rows' steps, or 1."""
    step = INITS[init](summary, qmin, qmax)
    good = torch.isfinite(step) & (step > 0)
    if bool(good.all()):
        return step
    other = step[good].mean() if bool(good.any()) else step.new_ones(())
    return torch.where(good, step, other)


def initial_offset(summary: Summary, qmin: int, qmax: int, init: str) -> tuple[Tensor, Tensor]:
    """LSQ+ (arXiv 2004.09576): step and offset, both [1], so that ``[low, high]`` spans ``qmin..qmax``.

    ``mse`` shrinks both ends on their own and keeps the pair of least squared error, ``quantile`` drops 2.5 % on each
    side, ``minmax`` keeps all, ``mean`` is LSQ's step without an offset. Zero stays inside the range, so that the
    offset is an integer number of steps between ``-qmax`` and ``-qmin``.
    """
    if init == "mean":
        step = initial_step(summary, qmin, qmax, "mean")
        return step, torch.zeros_like(step)
    low, high = summary.low.clamp(max=0), summary.high.clamp(min=0)
    rows = _subsample(summary.values, limit=_OFFSET_SAMPLE)
    if init == "quantile":
        cut = torch.quantile(rows, torch.tensor([GAMMA / 2, 1 - GAMMA / 2], dtype=rows.dtype), dim=1)
        low, high = cut[0].clamp(max=0), cut[1].clamp(min=0)
    shares = _OFFSET_SHARES if init == "mse" else (1.0,)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.inf
    for left in shares:
        for right in shares:
            step, zero = _affine(low * left, high * right, qmin, qmax)
            missed = float(_squared_error(rows, step, qmin - zero, qmax - zero))
            if best is None or missed < least:
                best, least = (step, -zero * step), missed
    assert best is not None
    return best


def _affine(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    step = (high - low) / (qmax - qmin)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (qmin - torch.round(low / step)).clamp(qmin, qmax)


def _squared_error(rows: Tensor, step: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """[C]; a step of zero (a row of zeros) has no error worth a number and gives NaN."""
    by = step[:, None]
    q = torch.div(rows, by).round_().clamp_(qmin, qmax)  # type: ignore[arg-type]
    return q.mul_(by).sub_(rows).square_().sum(1)


def _subsample(rows: Tensor, limit: int = CAPACITY) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    limit = limit if rows.shape[0] == 1 else _ROW_SAMPLE
    if rows.shape[1] <= limit:
        return rows
    return rows[:, torch.randint(rows.shape[1], (limit,), generator=rng).to(rows.device)]
