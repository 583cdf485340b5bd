"""The terms of the KDLSQ loss on tensors. Sources: KDLSQ-BERT (arXiv 2101.05938) and its release; TernaryBERT 2020.

Every term is a scalar. ``weight`` masks are None (everything counts) or (batch, length) floats, 1 for a real token:
then each row's mean runs over its own tokens and the result is the mean over rows. So the value depends neither on
how much padding a batch has nor on how it is split over steps or processes (equal splits: mean of the parts).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kdlsq_fx import fused

from .compression import Kept

MASKED = -100.0  # scores at or below are masked keys: 0 on both sides (TernaryBERT's and KDLSQ's code)


class _RowSquares(torch.autograd.Function):
    """Sum of squares of ``student - teacher`` for each row: one saved tensor, one product per row.

    With ``floor`` entries <= floor count as 0 on their side first. ``keep`` multiplies the difference.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None, floor: float | None
    ) -> torch.Tensor:
        a, b = student.float(), teacher.float()
        if floor is not None:
            a, b = F.threshold(a, floor, 0.0), F.threshold(b, floor, 0.0)
        difference = a - b
        if keep is not None:
            difference.mul_(keep)
        flat = difference.flatten(1)
        with torch.autocast(flat.device.type, enabled=False):  # a sum of squares keeps its float32
            total = torch.bmm(flat.unsqueeze(1), flat.unsqueeze(2)).flatten()
        if floor is not None:
            difference.mul_(student > floor)
        ctx.save_for_backward(difference)
        ctx.dtype = student.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        scale = (2 * grad).view(-1, *[1] * (difference.dim() - 1))
        return (difference * scale).to(ctx.dtype), None, None, None


class _FusedRowSquares(torch.autograd.Function):
    """The same in one pass each way; nothing is kept but the two values themselves."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None, floor: float | None
    ) -> torch.Tensor:
        ctx.save_for_backward(student, teacher, keep)
        ctx.floor, ctx.made = floor, fused.kernels(student.device)
        total: torch.Tensor = ctx.made.squares(student, teacher, keep, floor)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.made.squares_backward(*ctx.saved_tensors, ctx.floor, grad), None, None, None


def row_squares(
    student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None = None, floor: float | None = None
) -> torch.Tensor:
    """(batch,) sums of squared differences of two tensors (batch, ...); see :class:`_RowSquares`."""
    fits = fused.squares_fit(student, teacher, keep)
    return (_FusedRowSquares if fits else _RowSquares).apply(student, teacher, keep, floor)


def mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None = None,
    axes: tuple[int, ...] = (),
    floor: float | None = None,
) -> torch.Tensor:
    """Mean squared error of two tensors (batch, ...); ``axes`` are the dimensions that run over tokens.

    With ``weight`` only entries whose position is real on every one of the axes count.
    """
    if weight is None or not axes:
        return row_squares(student, teacher, None, floor).sum() / student.numel()
    keep: torch.Tensor | None = None
    for axis in axes:
        shape = [1] * student.dim()
        shape[0], shape[axis] = weight.shape
        keep = weight.view(shape) if keep is None else keep * weight.view(shape)
    tokens = weight.sum(1).clamp(min=1)
    others = student[0].numel() / weight.shape[1] ** len(axes)
    return (row_squares(student, teacher, keep, floor) / (tokens ** len(axes) * others)).mean()


def kept_mse(student: torch.Tensor, kept: Kept, *, both: bool) -> torch.Tensor:
    """Mean squared error of hidden states (batch, length, width) to what was kept of the teacher's.

    Each row is averaged over its kept tokens x all features, then the rows are averaged. ``both``: dropped features
    leave the mean on both sides; else the student is drawn to 0 there.
    """
    assert kept.positions is not None and kept.real is not None
    width = student.shape[-1]
    here = student.gather(1, kept.positions.unsqueeze(-1).expand(-1, -1, width))
    keep = kept.real.unsqueeze(-1)
    count = kept.real.sum(1) * width
    if both and kept.features is not None:
        keep = keep * kept.features
        count = keep.sum((1, 2))
    return (row_squares(here, kept.values, keep) / count.clamp(min=1)).mean()


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """``-sum(softmax(t/T) * log_softmax(s/T)) * T**2``, divided by the number of classes, mean over the rest.

    (batch, classes), or (batch, length, classes) where ``weight`` says which positions count. The mean over batch x
    classes is the released code's; it is 1/classes of the usual sum (papers 9, trap 2).
    """
    target = torch.softmax(teacher.float() / temperature, -1)
    each = -(target * torch.log_softmax(student.float() / temperature, -1)).mean(-1) * temperature**2
    if weight is None or each.dim() == 1:
        return each.mean()
    return ((each * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def span_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """:func:`soft_cross_entropy` of (batch, length) logits over positions; with ``weight`` over real ones only."""
    if weight is None:
        return soft_cross_entropy(student, teacher, None, temperature)
    gone = weight == 0
    low = torch.finfo(torch.float32).min
    target = torch.softmax((teacher.float() / temperature).masked_fill(gone, low), -1)
    logs = torch.log_softmax((student.float() / temperature).masked_fill(gone, low), -1).masked_fill(gone, 0.0)
    return (-(target * logs).sum(1) / weight.sum(1).clamp(min=1)).mean() * temperature**2


def soft_binary(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Binary cross-entropy to the teacher's probabilities, for several labels at once; mean over batch x labels."""
    target = torch.sigmoid(teacher.float() / temperature)
    return F.binary_cross_entropy_with_logits(student.float() / temperature, target) * temperature**2


def sentence_vectors(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the mean over real tokens, as sentence encoders pool."""
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def pooled(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``1 - cosine`` of two sentence vectors (batch, width), mean over rows."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
