"""Every op the compiler knows, one file a family; importing this package fills the table in ``kdlsq_fx.op``."""

from . import (
    compare,
    conv,
    elementwise,
    embedding,
    fixed_point,
    indexing,
    integer,
    linear,
    matmul,
    norm,
    qdq,
    shape,
    softmax,
)

__all__ = [
    "compare",
    "conv",
    "elementwise",
    "embedding",
    "fixed_point",
    "indexing",
    "integer",
    "linear",
    "matmul",
    "norm",
    "qdq",
    "shape",
    "softmax",
]
