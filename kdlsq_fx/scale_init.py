"""First scales: LSQ's mean, KDLSQ's quantile rule, a search for the least squared error, the maximum.

Every function takes ``values`` [C, K], one row per scale, and gives steps [C]. docs/decisions/0001-scale-init.md has
the figures behind the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlsq_fx.observer import CAPACITY, TAIL

GAMMA = 0.05
_ROW_SAMPLE = 256
_COARSE = tuple(2 ** (-k / 6) for k in range(45))  # clip as a share of the maximum: 1 down to 1/160
_FINE = tuple(2 ** (k / 24) for k in (-3, -2, -1, 1, 2, 3))
_ROW_TAIL = 32
_HALVES = tuple(2.0**-k for k in range(7))
_BETWEEN = tuple(2 ** (k / 6) for k in range(-3, 4))


@dataclass(frozen=True)
class Summary:
    """What a step is made of: ``values`` [C, K] and per row exact ``mean_abs, low, high`` [C].

    Where ``values`` is a random sample of ``count`` values, ``tail`` [C, T] holds the T largest of all.
    """

    values: Tensor
    mean_abs: Tensor
    low: Tensor
    high: Tensor
    tail: Tensor | None = None
    count: int = 0

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

    Of long rows a :class:`Sample` is looked at: their largest values and a random part of the rest.
    """
    sample = Sample.of(summary)
    widest = minmax_step(summary, qmin, qmax)
    best, error = widest.clone(), torch.full_like(widest, torch.inf)
    for shares in (_COARSE, _FINE):
        center = widest if shares is _COARSE else best.clone()
        for share in shares:
            step = center * share
            missed = sample.squared_error(step, qmin, qmax)
            better = missed < error
            best, error = torch.where(better, step, best), torch.where(better, missed, error)
    return best


@dataclass(frozen=True)
class Sample:
    """Rows [C, n] that stand for longer ones in a sum of squares, each value with its weight [C, n].

    The largest values of a row are all there: a few outliers hold most of the error of a narrow range, and a plain
    random sample misses them (it chose steps with 40 times the error of min-max at 8 bits; decision 0001).
    """

    rows: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, summary: Summary) -> Sample:
        rows = summary.values
        if summary.tail is not None:
            return cls._joined(summary.tail, rows, summary.count)
        many, tail = (CAPACITY, TAIL) if rows.shape[0] == 1 else (_ROW_SAMPLE, _ROW_TAIL)
        if rows.shape[1] <= many + tail:
            return cls(rows, None)
        index = torch.randint(rows.shape[1], (many,), generator=torch.Generator().manual_seed(0)).to(rows.device)
        top = torch.topk(rows.abs(), tail, dim=1, sorted=False).indices
        return cls._joined(rows.gather(1, top), rows[:, index], rows.shape[1])

    @classmethod
    def _joined(cls, largest: Tensor, sample: Tensor, count: int) -> Sample:
        """The sampled values below the largest ones stand for all the ``count`` that are no part of those."""
        small = (sample.abs() < largest.abs().amin(1, keepdim=True)).to(sample.dtype)
        weights = small * ((count - largest.shape[1]) / small.sum(1, keepdim=True).clamp(min=1))
        return cls(torch.cat([largest, sample], 1), torch.cat([torch.ones_like(largest), weights], 1))

    def squared_error(self, step: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
        """[C] for steps [C]; a step of zero (a row of zeros) has no error worth a number and gives NaN."""
        by = step[:, None]
        q = torch.div(self.rows, by).round_().clamp_(qmin, qmax)  # type: ignore[arg-type]
        missed = q.mul_(by).sub_(self.rows).square_()
        return (missed if self.weights is None else missed.mul_(self.weights)).sum(1)


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
    if init == "quantile":
        ends = torch.tensor([GAMMA / 2, 1 - GAMMA / 2], dtype=low.dtype)
        cut = torch.quantile(summary.values, ends.to(low.device), dim=1)
        low, high = cut[0].clamp(max=0), cut[1].clamp(min=0)
    if init == "mse":
        low, high = _least_error_ends(Sample.of(summary), low, high, qmin, qmax)
    step, zero = _affine(low, high, qmin, qmax)
    return step, -zero * step


def _least_error_ends(sample: Sample, low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Each end on its own from 1 to 1/64 of the widest, first by halves, then around the best pair."""
    best, least = (1.0, 1.0), torch.inf
    for shares in (_HALVES, _BETWEEN):
        left, right = best
        for a in shares:
            for b in shares:
                ends = (min(left * a, 1.0), min(right * b, 1.0))
                step, zero = _affine(low * ends[0], high * ends[1], qmin, qmax)
                missed = float(sample.squared_error(step, qmin - zero, qmax - zero))
                if missed < least:
                    best, least = ends, missed
    return low * best[0], high * best[1]


def _affine(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    step = (high - low) / (qmax - qmin)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (qmin - torch.round(low / step)).clamp(qmin, qmax)
