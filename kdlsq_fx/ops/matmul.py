"""Products of two computed values: attention scores and attention-weighted sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..op import Op, declare
from .lower_products import lower_matmul

aten = torch.ops.aten


def _sample(*leading: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (torch.randn(*leading, 4, 8), torch.randn(*leading, 8, 6)), {}


MATMUL = declare(
    Op(
        name="matmul",
        target=aten.matmul.default,
        sig="act, act -> wide",
        numpy=np.matmul,
        onnx=lambda g, a, b: g.MatMul(a, b),
        lower=lower_matmul,
        sample=lambda: _sample(2, 3),
        why_float="no rule quantizes both operands",
    )
)
BMM = declare(
    Op(
        name="bmm",
        target=aten.bmm.default,
        sig="act, act -> wide",
        numpy=np.matmul,
        onnx=lambda g, a, b: g.MatMul(a, b),
        lower=lower_matmul,
        sample=lambda: _sample(3),
        why_float="no rule quantizes both operands",
    )
)
