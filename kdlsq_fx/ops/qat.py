"""What stands in a qat graph only: the quantizer module, the grid of a bias, a LayerNorm that knows its codes."""

from __future__ import annotations

import torch

from ..errors import TrainingError
from ..lsq import BiasGrid, Lsq
from ..op import Op, declare
from .norm import integer_layer_norm

LSQ = declare(Op(name="lsq", target=Lsq, sig="float -> act"))

_GRID = BiasGrid()


def bias_grid(bias: torch.Tensor, x_lsq: Lsq, w_lsq: Lsq) -> torch.Tensor:
    """The float ``bias`` [C] rounded to multiples of ``s_x * s_w`` (32 bits), straight-through for the gradient.

    An integer product has that scale, so its bias is an integer on that grid; training sees the rounding.
    """
    if x_lsq.observing:
        return bias  # its scale is what calibration is about to find
    return _GRID.between(bias, x_lsq, w_lsq)


BIAS_GRID = declare(Op(name="bias_grid", target=bias_grid, sig="bias, float, float -> bias"))


def norm_on_grid(
    x: torch.Tensor,
    shape: list[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    lsq: Lsq,
) -> torch.Tensor:
    """LayerNorm of ``x`` [..., N] with the mean and deviation that the integers give (docs/integer_primitives.md).

    ``lsq`` is the quantizer that ``x`` came out of; while it observes, ``x`` has no codes yet and this is layer_norm.
    """
    if lsq.observing:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    try:
        out: torch.Tensor = integer_layer_norm(x, shape, weight, bias, eps, lsq.scale.detach(), lsq.qmin, lsq.qmax)
    except ValueError as err:  # its scale drifted out of all range
        raise TrainingError(str(err), where=lsq.site, do="lower the learning rate of the scales") from None
    return out


NORM_ON_GRID = declare(Op(name="norm_on_grid", target=norm_on_grid, sig="wide, float, float, float -> act"))
