"""``quantize`` and ``dequantize``: the one meaning of a grid, ``real = (code - zero_point) * scale``.

``code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)`` with the division in the precision of ``x``
(float32 in a model). torch.round, numpy.rint and ONNX QuantizeLinear all round half to even; nothing here may differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx.op import Op, declare
from kdlsq_fx.ops.bounds_integer import quantize_bounds

CONTAINERS = (("int8", -(2**7), 2**7 - 1), ("uint8", 0, 2**8 - 1), ("int16", -(2**15), 2**15 - 1))
FLOAT32_INTEGERS = 2**24


def container(qmin: int, qmax: int) -> str:
    """Name of the smallest integer dtype that holds ``qmin..qmax`` (int8, uint8, int16, int32), int8 before uint8."""
    if not -(2**31) <= qmin <= qmax < 2**31:
        raise ValueError(f"no 32-bit container holds {qmin}..{qmax}")
    return next((name for name, low, high in CONTAINERS if low <= qmin and qmax <= high), "int32")


def torch_container(qmin: int, qmax: int) -> torch.dtype:
    """:func:`container` as a torch dtype."""
    dtype: torch.dtype = getattr(torch, container(qmin, qmax))
    return dtype


def along(scale: Any, rank: int, axis: int | None) -> Any:
    """A 1-d scale (torch or numpy), reshaped to run along ``axis`` of a value of ``rank`` dimensions."""
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: int, qmin: int, qmax: int, axis: int | None = None
) -> torch.Tensor:
    """Float ``x`` of any shape to codes of the same shape; ``scale`` is 0-d, or ``[x.shape[axis]]``."""
    q = torch.round(x / along(scale, x.ndim, axis))
    if max(-qmin, qmax) > FLOAT32_INTEGERS:
        q = q.double()  # float32 cannot hold the ends of such a range: 2**31 - 1 would become 2**31 and wrap
    return (q + zero_point).clamp(qmin, qmax).to(torch_container(qmin, qmax))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: int = 0, axis: int | None = None) -> torch.Tensor:
    """Codes or accumulators of any shape to floats of ``scale``'s dtype; a scale of more dimensions broadcasts."""
    return (codes.to(scale.dtype) - zero_point) * along(scale, codes.ndim, axis)


def numpy_quantize(
    x: NDArray[Any], scale: NDArray[Any], zero_point: int, qmin: int, qmax: int, axis: int | None = None
) -> NDArray[Any]:
    """:func:`quantize` in NumPy."""
    q = np.rint(np.divide(x, along(scale, np.ndim(x), axis)))
    if max(-qmin, qmax) > FLOAT32_INTEGERS:
        q = q.astype(np.float64)
    return np.minimum(np.maximum(q + zero_point, qmin), qmax).astype(container(qmin, qmax))


def numpy_dequantize(
    codes: NDArray[Any], scale: NDArray[Any], zero_point: int = 0, axis: int | None = None
) -> NDArray[Any]:
    """:func:`dequantize` in NumPy."""
    real: NDArray[Any] = np.multiply(codes.astype(scale.dtype) - zero_point, along(scale, codes.ndim, axis))
    return real


def _grid_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.linspace(-3, 3, 61).reshape(1, 61), torch.tensor(0.04), 3, -128, 127), {}


def _codes_sample() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4), torch.tensor([0.1, 0.2, 0.3, 0.4]), 0, 1), {}


QUANTIZE = declare(
    Op(
        name="quantize",
        target=quantize,
        sig="float, float -> code",
        numpy=numpy_quantize,
        bounds=quantize_bounds,
        sample=_grid_sample,
    )
)
DEQUANTIZE = declare(
    Op(name="dequantize", target=dequantize, sig="code, float -> float", numpy=numpy_dequantize, sample=_codes_sample)
)
