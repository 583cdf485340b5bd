"""How each runtime wants ``quantize`` and ``dequantize`` written: integer types, offsets, ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, LoweringError
from .onnx_builder import Grid
from .onnx_grids import GridBuilder


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a runtime wants; docs/targets.md has the reasons. All dialects write the quantizers that were trained.

    ``unsigned``     signed 8-bit activations are shifted by 128 into uint8, which is lossless.
    ``symmetric``    int8 codes with zero point 0 alone; what does not fit is refused.
    ``adjacent``     every QuantizeLinear is followed by its DequantizeLinear: data movers move floats, narrow ranges
                     are clipped as floats, codes have 8 bits or are floats. Else codes are moved and clipped, which
                     touches a quarter of the bytes.
    ``fused_dense``  dense layers in the forms that ONNX Runtime turns into int8 kernels (``GridBuilder.dense``).
    ``subbyte``      weights in the narrowest integer type of ONNX: int2, int4, int8.
    ``packed``       the least bits of a type in which weights and tables stand behind a Cast, 0 for bytes
                     (``GridBuilder.stored``).
    ``opset``        the least opset of a file.
    """

    name: str
    why: str
    unsigned: bool = False
    symmetric: bool = False
    adjacent: bool = False
    fused_dense: bool = False
    subbyte: bool = False
    packed: int = 0
    opset: int = 20


DIALECTS = {
    d.name: d
    for d in (
        Dialect(
            name="ort-cpu",
            unsigned=True,
            fused_dense=True,
            packed=2,
            why="ONNX Runtime on x86: uint8 activations (int8 ones that several ops read fall back to floats)",
        ),
        Dialect(
            name="openvino",
            adjacent=True,
            packed=4,  # it has no int2
            why="OpenVINO on x86: QuantizeLinear and DequantizeLinear side by side become one FakeQuantize",
        ),
        Dialect(
            name="tensorrt",
            symmetric=True,
            adjacent=True,
            why="TensorRT: int8 with zero point 0, float biases",
        ),
        Dialect(
            name="spec",
            subbyte=True,
            opset=25,
            why="plain ONNX: int2 and int4 weights as such, int8 for signed ranges, uint8 for unsigned ones",
        ),
    )
}


TARGETS = (*DIALECTS, "integer")  # the last writes an int graph: onnx_integer.py


def dialect_of(target: str) -> Dialect:
    """ConfigError names the known targets."""
    if target not in DIALECTS:
        raise ConfigError(f"unknown export target {target!r}", do=f"use one of {', '.join(TARGETS)}")
    return DIALECTS[target]


@dataclass(frozen=True)
class Container:
    """The integer type of the codes in the file (None: floats that hold integers) and the offset added to them."""

    dtype: str | None
    offset: int = 0

    @property
    def is_byte(self) -> bool:
        return self.dtype in ("int8", "uint8")

    @property
    def limits(self) -> tuple[int, int]:
        info = np.iinfo(self.dtype or "int32")
        return int(info.min), int(info.max)


def container(dialect: Dialect, zero_point: int, qmin: int, qmax: int) -> Container:
    """The type that holds ``qmin..qmax`` and the zero point; QuantizeLinear knows 8 bits, and 16 from opset 21 on."""
    signed = Container("uint8", 128) if dialect.unsigned else Container("int8")
    # OpenVINO drops 16-bit pairs (its qdq_stripping), TensorRT has none: both get arithmetic on floats
    words = () if dialect.adjacent else (Container("int16"), Container("uint16"))
    for choice in (Container("int8"),) if dialect.symmetric else (Container("uint8"), signed, *words):
        low, high = (v - choice.offset for v in choice.limits)
        if low <= qmin and qmax <= high and low <= zero_point <= high:
            return choice
    return Container(None)


def _demand_symmetric(site: str, zero_point: int, qmin: int, qmax: int) -> None:
    """LoweringError for 8-bit codes that TensorRT has no type for; wider ones are arithmetic on floats."""
    if qmax - qmin > 255 or (zero_point == 0 and qmin >= -128 and qmax <= 127):
        return
    what = f"codes {qmin} to {qmax} with zero point {zero_point}: TensorRT has int8 with zero point 0 alone"
    do = "train with signed codes: put Rule(site='**', op='matmul', act=QSpec(bits=8, signed=True)) in front"
    raise LoweringError(what, where=site, do=do if zero_point == 0 else "train without an offset (no lsq+)")


def opset_for(dialect: Dialect, nodes: Iterable[ir.Node], dtypes: Mapping[ir.Value, torch.dtype]) -> int:
    """20 has Gelu; QuantizeLinear and DequantizeLinear know 16-bit codes from 21 on."""
    nodes = list(nodes)
    if stored := opset_of_casts(nodes, dtypes):
        return max(dialect.opset, stored)
    codes = [v for n in nodes if n.op_type.endswith("QuantizeLinear") for v in n.outputs]
    codes += [v for n in nodes if n.op_type == "DequantizeLinear" for v in n.inputs[:1] if v is not None]
    return max(dialect.opset, 21 if any(dtypes.get(v) in (torch.int16, torch.uint16) for v in codes) else 20)


def opset_of_casts(nodes: Iterable[ir.Node], dtypes: Mapping[ir.Value, torch.dtype]) -> int:
    """Cast knows 4-bit integers from 21 on, 2-bit ones from 25 on; 0 where there is none of them."""
    stored = {str(dtypes.get(v)) for n in nodes if n.op_type == "Cast" for v in n.inputs if v is not None}
    return 25 if stored & {"torch.int2", "torch.uint2"} else 21 if stored & {"torch.int4", "torch.uint4"} else 0


def emit_quantize(
    g: GridBuilder,
    dialect: Dialect,
    x: ir.Value,
    scale: NDArray[Any],
    zero_point: int,
    qmin: int,
    qmax: int,
    axis: int | None,
) -> tuple[ir.Value, Grid]:
    """``clamp(round_half_even(x / scale) + zero_point, qmin, qmax)`` -> codes and their grid.

    QuantizeLinear saturates at the ends of its type only, so narrower ranges are clipped. 8-bit codes are clipped as
    codes: exact, a quarter of the bytes, and the product in front still fuses with QuantizeLinear. ONNX Runtime clips
    no 16-bit integers: there the floats are clipped, which is exact too, as a bound divided by the scale is within an
    ulp of an integer. So it is where the dialect wants both nodes side by side.
    """
    if dialect.symmetric:
        _demand_symmetric(g.site, zero_point, qmin, qmax)
    holds = container(dialect, zero_point, qmin, qmax)
    if holds.dtype is None:
        return _quantize_in_floats(g, x, scale, zero_point, qmin, qmax, axis)
    low, high = holds.limits
    narrow = low - holds.offset < qmin or qmax < high - holds.offset
    as_codes = holds.is_byte and not dialect.adjacent
    if narrow and not as_codes:
        x = _clipped(g, x, scale, qmin - zero_point, qmax - zero_point, axis)
    zero = np.full(scale.shape, zero_point + holds.offset, holds.dtype)
    attributes = {} if axis is None else {"axis": axis}
    codes = g.QuantizeLinear(x, g.constant(scale), g.constant(zero), **attributes)
    if narrow and as_codes:
        bounds = (np.asarray(v + holds.offset, holds.dtype) for v in (qmin, qmax))
        codes = g.Clip(codes, *map(g.constant, bounds))
    return codes, Grid(scale, zero_point + holds.offset, axis, codes, holds.offset)


def along(g: GridBuilder, x: ir.Value, values: NDArray[Any], axis: int | None) -> ir.Value:
    """A constant that runs along ``axis`` of ``x``."""
    if axis is None or values.ndim == 0:
        return g.constant(values)
    shape = [1] * g.rank(x)
    shape[axis] = -1
    return g.constant(values.reshape(shape))


def _clipped(g: GridBuilder, x: ir.Value, scale: NDArray[Any], low: int, high: int, axis: int | None) -> ir.Value:
    bounds = [np.asarray(np.float32(v) * scale, np.float32) for v in (low, high)]
    if scale.ndim == 0:
        return g.Clip(x, *map(g.constant, bounds))
    dims = g.dims(x)
    least, most = (along(g, x, b, axis) for b in bounds)
    clipped: ir.Value = g.Min(g.Max(x, least), most)  # Clip takes scalars only
    g.describe(clipped, torch.float32, dims)
    return clipped


def _quantize_in_floats(
    g: GridBuilder, x: ir.Value, scale: NDArray[Any], zero_point: int, qmin: int, qmax: int, axis: int | None
) -> tuple[ir.Value, Grid]:
    """Codes of 17 to 32 bits stay floats that hold integers (ONNX Round is half to even); exact below 2**24."""
    codes = g.Round(g.Div(x, along(g, x, scale, axis)))
    if zero_point:
        codes = g.Add(codes, g.constant(np.float32(zero_point)))
    codes = g.Clip(codes, g.constant(np.float32(qmin)), g.constant(np.float32(qmax)))
    return codes, Grid(scale, zero_point, axis)


def emit_dequantize(g: GridBuilder, codes: ir.Value, grid: Grid) -> ir.Value:
    """``(codes - zero_point) * scale``."""
    if grid.codes is not None or codes.const_value is not None:
        return g.dequantize(codes, grid)
    shifted = g.Sub(codes, g.constant(np.float32(grid.zero_point))) if grid.zero_point else codes
    return g.Mul(shifted, along(g, codes, grid.scale, grid.axis))
