"""What a fused kernel needs to know about a learned quantizer besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """``qmin, qmax``  the codes. ``low, high``: the gradient passes where ``low < x / step (+ zero) < high``.

    ``alpha``   raw is a clip value, ``qmax`` steps of it (KDLSQ); else it is the step, and the gradient of the step is
                multiplied by ``1 / sqrt(features * qmax)`` (LSQ).
    ``clip``    the gradient of x is cut outside; else it passes everywhere.
    ``rows``    number of scales along the first dimension; 0 for one scale in all.
    ``project`` the forward also lifts raw to its floor.
    """

    qmin: int
    qmax: int
    low: float
    high: float
    alpha: bool
    clip: bool
    rows: int
    project: bool = True


def dense(x: Tensor) -> bool:
    """Whether ``x`` fills its memory without gaps or overlaps, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(x.stride(), x.shape) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def step_of(clip: Tensor, n: int) -> Tensor:
    """``clip / n`` rounded once, as the CPU does; CUDA multiplies by 1/n where n is a Python number, an ulp off."""
    return clip / clip.new_full((), n) if clip.is_cuda else clip / n
