"""Rows of a table by id."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from ..op import Op, declare
from .lower_products import lower_embedding

aten = torch.ops.aten


def numpy_embedding(
    table: NDArray[Any],
    ids: NDArray[Any],
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> NDArray[Any]:
    """``table`` [rows, width], ``ids`` of any shape -> [*ids.shape, width]; IndexError for an id outside."""
    if ids.size and int(ids.min()) < 0:
        raise IndexError(f"id {int(ids.min())} is negative")
    rows: NDArray[Any] = table[ids]
    return rows


EMBEDDING = declare(
    Op(
        name="embedding",
        target=aten.embedding.default,
        sig="weight, ids -> act",
        numpy=numpy_embedding,
        onnx=lambda g, table, ids, padding_idx=-1, scale_grad_by_freq=False, sparse=False: g.rows(table, ids),
        lower=lower_embedding,
        sample=lambda: ((torch.linspace(-1, 1, 44).reshape(11, 4), torch.tensor([[0, 10, 3], [3, 3, 1]]), 0), {}),
        why_float="no rule quantizes the table",
    )
)
