"""What stands in a qat graph only: the quantizer module, and the grid of a bias."""

from __future__ import annotations

import torch

from ..lsq import BiasGrid, Lsq
from ..op import Op, declare

LSQ = declare(Op(name="lsq", target=Lsq, sig="float -> act"))

_GRID = BiasGrid()


def bias_grid(bias: torch.Tensor, x_lsq: Lsq, w_lsq: Lsq) -> torch.Tensor:
    """The float ``bias`` [C] rounded to multiples of ``s_x * s_w`` (32 bits), straight-through for the gradient.

    An integer product has that scale, so its bias is an integer on that grid; training sees the rounding.
    """
    if x_lsq.observing:
        return bias  # its scale is what calibration is about to find
    return _GRID(bias, x_lsq.scale.detach(), w_lsq.scale.detach())


BIAS_GRID = declare(Op(name="bias_grid", target=bias_grid, sig="bias, float, float -> bias"))
