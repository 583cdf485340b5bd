"""Values on a grid: constants stored as codes, dense layers, and look-ups in tables of codes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from .onnx_builder import Builder, Grid

WORTH = 64  # elements of a constant that is worth a Cast


def is_subbyte(dtype: torch.dtype) -> bool:
    """2- and 4-bit types: Reshape, Transpose and Cast take them, other ops do not."""
    return str(dtype) in ("torch.int2", "torch.int4")


class GridBuilder(Builder):
    """A Builder that knows which values are dequantized codes, and how a runtime wants products of them written."""

    def __init__(self, *, fused_dense: bool = False, subbyte: bool = False, packed: int = 0) -> None:
        super().__init__()
        self.fused_dense = fused_dense
        self.subbyte = subbyte
        self.packed = packed
        self.shared_with_quantizer = False  # a quantizer and another op read the node being written
        self.clamped_next = False  # a Relu alone reads it
        self.grids: dict[ir.Value, Grid] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._stored: dict[ir.Value, ir.Value] = {}
        self._narrowed: dict[ir.Value, ir.Value] = {}

    def dequantize(self, codes: ir.Value, grid: Grid) -> ir.Value:
        """DequantizeLinear; int32 constants (biases) become floats at once, runtimes want them so."""
        array = codes.const_value.numpy() if codes.const_value is not None else None
        if array is not None and array.dtype == np.int32:
            value = self.constant(_real(array, grid), f"{codes.name}/real")
        else:
            zero = np.full(grid.scale.shape, grid.zero_point, self.numpy_dtype(self.types[codes]))
            axis = {} if grid.axis is None else {"axis": grid.axis}
            # A weight has a zero point of its own: ONNX Runtime fails when it turns two weights that share one into
            # uint8, as it does on request for CPUs that saturate.
            own = f"{codes.name}/zero_point" if array is not None else ""
            stored = self.stored(codes)
            value = self.DequantizeLinear(stored, self.constant(grid.scale), self.constant(zero, own), **axis)
        self.describe(value, torch.float32, self._dims[codes])
        self.grids[value] = Grid(grid.scale, grid.zero_point, grid.axis, codes, grid.offset)
        return value

    def stored(self, codes: ir.Value) -> ir.Value:
        """Constant 8-bit codes that fit 2 or 4 bits: stored so, and a Cast back, where the dialect wants that.

        Runtimes compute such a Cast once, when they load the file, and then see 8-bit weights: int8 kernels.
        DequantizeLinear of the narrow type itself would run in fp32, and again at each call.
        """
        array = codes.const_value.numpy() if (self.packed or self.subbyte) and codes.const_value is not None else None
        narrow = None if array is None else narrowest(array, self.packed)
        if array is None or narrow is None:
            return codes
        if codes not in self._stored:
            packed = self.constant(array.astype(narrow), f"{codes.name}/{narrow}")
            self._stored[codes] = self.Cast(packed, to=int(ir.DataType.from_numpy(array.dtype)))
        return self._stored[codes]

    def pack_constants(self, least: int) -> None:
        """:meth:`stored` for every constant, with types of ``least`` bits and more: once all nodes are there."""
        self.packed, self.nodes, before = least, [], self.nodes
        for name, codes in list(self.initializers.items()):
            if codes.const_value is None or codes.const_value.size < WORTH:
                continue
            self.site = name
            wide = self.stored(codes)
            if wide is not codes:
                self.describe(wide, self.types[codes], self._dims[codes])
                codes.replace_all_uses_with(wide)
                del self.initializers[name]
        self.nodes += before

    def narrowed(self, codes: ir.Value) -> ir.Value:
        """With ``subbyte``: constant 8-bit codes in the narrowest type that holds them; anything else as it is."""
        array = codes.const_value.numpy() if self.subbyte and codes.const_value is not None else None
        narrow = None if array is None else narrowest(array)
        if array is None or narrow is None:
            return codes
        if codes not in self._narrowed:
            self._narrowed[codes] = self.constant(array.astype(narrow), f"{codes.name}/{narrow}")
        return self._narrowed[codes]

    def transposed(self, w: ir.Value) -> ir.Value:
        """A weight [out, in] as [in, out]: stored so, unless other ops read the constant as it is."""
        if w in self._transposed:
            return self._transposed[w]
        grid = self.grids.get(w)
        source = grid.codes if grid is not None and grid.codes is not None else w
        uses = [u for value in (source, self.stored(source)) for u in value.uses()]
        if source.const_value is None or any(u.node.op_type != "DequantizeLinear" for u in uses):
            turned = self.Transpose(self.stored(source), perm=[1, 0])
            self.describe(turned, self.types[source], self._dims[source][::-1])
        else:
            turned = self.constant(source.const_value.numpy().T, f"{source.name}/transposed")
        if grid is not None and source is not w:
            axis = None if grid.axis is None else 1 - grid.axis
            turned = self.dequantize(turned, Grid(grid.scale, grid.zero_point, axis, None, grid.offset))
        self._transposed[w] = turned
        return turned

    def dense(self, x: ir.Value, w: ir.Value, bias: ir.Value | None) -> Any:
        """``x @ w.T + bias`` as MatMul and Add, in the form that ONNX Runtime turns into an int8 kernel.

        What was seen of it: where the rank is 2 or all sizes are known, MatMul + Add becomes Gemm first, and that runs
        in int8 only with a bias of int32 codes and no Relu behind it. A bias of more than two dimensions and a
        subtraction are left alone. A product that QuantizeLinear and another op read stays float; one whose bias they
        read does not, so a missing bias is then written as zeros.
        """
        product = self.MatMul(x, self.transposed(w))
        grids = self.grids.get(x), self.grids.get(w)
        if bias is None and None not in grids and self.shared_with_quantizer:
            bias = self.constant(np.zeros(self._dims[w][0], np.float32))
        if bias is None:
            return product
        static = all(isinstance(d, int) for d in self._dims[x])
        real = None if bias.const_value is None else bias.const_value.numpy()
        if None in grids or not self.fused_dense or real is None or not (static or self.rank(x) == 2):
            return self.Add(product, bias)
        if self.rank(x) > 2:
            return self.Add(product, self.constant(real.reshape(*[1] * (self.rank(x) - 1), -1)))
        if self.clamped_next:
            return self.Sub(product, self.constant(-real))
        return self.Add(product, self._bias_codes(x, w, bias))

    def _bias_codes(self, x: ir.Value, w: ir.Value, bias: ir.Value) -> ir.Value:
        """The float bias as int32 codes and DequantizeLinear, where it lies on the grid of both operands."""
        gx, gw = self.grids.get(x), self.grids.get(w)
        if gx is None or gw is None or gx.axis is not None or bias.const_value is None:
            return bias
        real = bias.const_value.numpy()
        scale = np.asarray(gx.scale * gw.scale, np.float32)
        codes = np.rint(real.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) >= 2**31 or not np.allclose(codes * scale, real, rtol=1e-6, atol=1e-12):
            return bias
        axis: dict[str, int] = {"axis": 0} if scale.ndim else {}
        stored = self.constant(codes.astype(np.int32), f"{bias.name}/codes")
        return self.DequantizeLinear(
            stored, self.constant(scale), self.constant(np.zeros(scale.shape, np.int32)), **axis
        )

    def rows(self, table: ir.Value, ids: ir.Value) -> Any:
        """Rows of a table; of a dequantized one the codes are gathered, then dequantized."""
        grid = self.grids.get(table)
        if grid is None or grid.codes is None:
            return self.Gather(self.stored(table), ids, axis=0)
        dtype = torch.int8 if is_subbyte(self.types[grid.codes]) else self.types[grid.codes]
        codes = self.Gather(self.cast(self.stored(grid.codes), dtype, self.types[grid.codes]), ids, axis=0)
        self.describe(codes, dtype, [*self._dims[ids], *self._dims[grid.codes][1:]])
        if grid.axis is None:
            return self.dequantize(codes, grid)
        if grid.axis != 0:
            return self.Gather(table, ids, axis=0)
        scales = self.Unsqueeze(self.Gather(self.constant(grid.scale), ids, axis=0), self.vector([-1]))
        shifted = self.Sub(self.cast(codes, torch.float32), self.constant(np.float32(grid.zero_point)))
        return self.Mul(shifted, scales)


def narrowest(codes: NDArray[Any], least: int = 0) -> np.dtype[Any] | None:
    """ONNX's type of 2 or 4 bits, of ``least`` and more, that holds these 8-bit codes, with their sign; None where
    there is none."""
    if codes.dtype not in (np.int8, np.uint8) or not codes.size:
        return None
    types = (ml_dtypes.int2, ml_dtypes.int4) if codes.dtype == np.int8 else (ml_dtypes.uint2, ml_dtypes.uint4)
    low, high = int(codes.min()), int(codes.max())
    known = ((t, ml_dtypes.iinfo(t)) for t in types)
    return next((np.dtype(t) for t, i in known if i.bits >= least and i.min <= low and high <= i.max), None)


def _real(codes: NDArray[Any], grid: Grid) -> NDArray[Any]:
    shape = [1] * codes.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale = grid.scale if grid.axis is None else grid.scale.reshape(shape)
    return (codes.astype(np.float32) - np.float32(grid.zero_point)) * scale.astype(np.float32)
