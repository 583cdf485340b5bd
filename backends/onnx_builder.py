"""Builds an ONNX graph value by value; ``g.Gelu(x, approximate="none")`` adds a node named by the site at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ..errors import LoweringError

Dims = list[int | str]


@dataclass(frozen=True)
class Grid:
    """How codes stand for reals in the file: ``real = (code - zero_point) * scale``.

    ``codes`` is None where the codes are floats (ranges that no ONNX integer type of this opset holds).
    ``offset`` was added to the codes of the graph (and is in ``zero_point``) to make them unsigned.
    """

    scale: NDArray[Any]
    zero_point: int
    axis: int | None
    codes: ir.Value | None = None
    offset: int = 0


class Builder:
    """Values, nodes and constants of one ONNX graph, and what is known of each value (dtype, dimensions, grid).

    ``site`` and ``dtype`` are those of the fx node being written; ops read ``dtype`` to promote their operands.
    Dimensions are ints, or names of sizes that differ from call to call; equal names mean equal sizes.
    """

    def __init__(self, *, for_onnxruntime: bool = False) -> None:
        self.site = ""
        self.dtype = torch.float32
        self.for_onnxruntime = for_onnxruntime
        self.shared_with_quantizer = False  # a quantizer and another op read the node being written
        self.clamped_next = False  # a Relu alone reads it
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.grids: dict[ir.Value, Grid] = {}  # of values that are dequantized codes
        self.types: dict[ir.Value, torch.dtype] = {}
        self._dims: dict[ir.Value, Dims] = {}
        self._vectors: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[tuple[ir.Value, int], ir.Value] = {}
        self._small: dict[tuple[Any, ...], ir.Value] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._names: set[str] = set()

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        if not kind[:1].isupper():
            raise AttributeError(kind)
        return partial(self.emit, kind)

    # nodes and constants

    def unique(self, name: str) -> str:
        """``name``, or ``name_k`` where it is taken."""
        free, k = name, 0
        while free in self._names:
            k += 1
            free = f"{name}_{k}"
        self._names.add(free)
        return free

    def emit(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns its output, or a tuple of ``outputs`` of them."""
        name = self.unique(f"{self.site}/{kind}")
        node = ir.node(kind, list(inputs), attributes or None, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = self.unique(f"{name}_output_{i}" if outputs > 1 else f"{name}_output")
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, array: Any, name: str = "") -> ir.Value:
        """An initializer; small ones without a name are shared."""
        data = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (data.dtype.str, data.shape, data.tobytes()) if not name and data.size < 64 else None
        if key is not None and key in self._small:
            return self._small[key]
        label = self.unique(name or f"{self.site}/constant")
        tensor = ir.tensor(data, name=label)
        value = ir.val(label, tensor.dtype, list(data.shape), const_value=tensor)
        self.initializers[label] = value
        self.describe(value, getattr(torch, str(data.dtype)), list(data.shape))
        if key is not None:
            self._small[key] = value
        return value

    def describe(self, value: ir.Value, dtype: torch.dtype, dims: Sequence[int | str]) -> None:
        """Note what is known of a value."""
        self.types[value] = dtype
        self._dims[value] = list(dims)

    def refuse(self, what: str) -> None:
        raise LoweringError(f"no ONNX form for {what}", where=self.site, do="replace the op in the model")

    # sizes

    def dims(self, x: ir.Value) -> Dims:
        return self._dims[x]

    def known_dims(self, x: ir.Value) -> Dims | None:
        return self._dims.get(x)

    def rank(self, x: ir.Value) -> int:
        return len(self._dims[x])

    def known(self, x: ir.Value, dim: int) -> int:
        """A size that must be known when the file is written."""
        size = self._dims[x][dim]
        if not isinstance(size, int):
            self.refuse(f"a part count that depends on the dynamic size {size}")
        return int(size)

    def size(self, x: ir.Value, dim: int) -> int | ir.Value:
        """Size of one dimension: an int where it is known, else an int64 scalar."""
        dim %= self.rank(x)
        size = self._dims[x][dim]
        if isinstance(size, int):
            return size
        if (x, dim) not in self._sizes:
            vector = self.Shape(x, start=dim, end=dim + 1)
            scalar: ir.Value = self.Squeeze(vector, self.vector([0]))
            self._sizes[x, dim], self._vectors[scalar] = scalar, vector
            self.describe(scalar, torch.int64, [])
            self.name_size(scalar, size)
        return self._sizes[x, dim]

    def name_size(self, scalar: ir.Value, name: str) -> None:
        """Two scalars of one name are the same size."""
        scalar.metadata_props["size"] = name

    def size_op(self, kind: str, a: int | ir.Value, b: int | ir.Value) -> int | ir.Value:
        """Arithmetic on sizes; an int where both are ints."""
        if isinstance(a, int) and isinstance(b, int):
            return {"Add": a + b, "Sub": a - b, "Mul": a * b, "Div": a // b if b else 0, "Mod": a % b if b else 0}[kind]
        value: ir.Value = self.emit(kind, self.scalar(a), self.scalar(b))
        self.describe(value, torch.int64, [])
        return value

    def scalar(self, value: int | ir.Value) -> ir.Value:
        return value if isinstance(value, ir.Value) else self.constant(np.asarray(value, np.int64))

    def vector(self, sizes: Iterable[int | ir.Value]) -> ir.Value:
        """int64 [n] of ints and scalars."""
        parts = list(sizes)
        if all(not isinstance(p, ir.Value) for p in parts):
            return self.constant(np.asarray(parts, np.int64))
        pieces = [self._vectors.get(p) or self._as_vector(p) for p in map(self.scalar, parts)]
        return pieces[0] if len(pieces) == 1 else self.Concat(*pieces, axis=0)

    def _as_vector(self, scalar: ir.Value) -> ir.Value:
        if scalar.const_value is not None:
            return self.constant(scalar.const_value.numpy().reshape(1))
        return self.Unsqueeze(scalar, self.vector([0]))

    def reshape(self, x: ir.Value, sizes: Sequence[int | ir.Value]) -> ir.Value:
        """Reshape; 0 (keep) and -1 (the rest) stand for dynamic sizes wherever they can: runtimes fuse that better."""
        dims = self._dims.get(x, [])
        wanted: list[int | ir.Value] = []
        for i, size in enumerate(sizes):
            name = size.metadata_props.get("size") if isinstance(size, ir.Value) else None
            wanted.append(0 if name is not None and i < len(dims) and dims[i] == name else size)
        dynamic = [i for i, s in enumerate(wanted) if isinstance(s, ir.Value)]
        if len(dynamic) == 1 and not any(isinstance(s, int) and s == -1 for s in wanted):
            wanted[dynamic[0]] = -1
        return self.Reshape(x, self.vector(wanted))

    # dtypes

    @staticmethod
    def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
        return np.dtype(str(dtype).removeprefix("torch."))

    def cast(self, x: ir.Value, dtype: torch.dtype, source: torch.dtype | None = None) -> ir.Value:
        """``x`` as ``dtype``; the value itself where it has it already."""
        if (source or self.types.get(x)) == dtype:
            return x
        value: ir.Value = self.Cast(x, to=int(ir.DataType.from_numpy(self.numpy_dtype(dtype))))
        self.describe(value, dtype, self._dims.get(x, []))
        return value

    def typed(self, x: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A value or Python number as ``dtype``, by default the dtype of the result."""
        dtype = dtype or self.dtype
        if isinstance(x, ir.Value):
            return self.cast(x, dtype)
        return self.constant(np.asarray(x, self.numpy_dtype(dtype)))

    def arithmetic(self, kind: str, a: Any, b: Any) -> Any:
        """A binary op whose operands take the dtype of the result."""
        return self.emit(kind, self.typed(a), self.typed(b))

    def compare(self, kind: str, a: Any, b: Any) -> Any:
        """A comparison in the dtype that both sides promote to; ``Different`` is the negation of Equal."""
        dtypes = [self.types[v] if isinstance(v, ir.Value) else None for v in (a, b)]
        known = [d for d in dtypes if d is not None]
        dtype = torch.promote_types(known[0], known[-1])
        fraction = any(isinstance(v, float) and not v.is_integer() for v in (a, b))
        if dtype == torch.bool or (fraction and not dtype.is_floating_point):
            dtype = torch.float32 if fraction else torch.int64
        operands = self.typed(a, dtype), self.typed(b, dtype)
        return self.Not(self.Equal(*operands)) if kind == "Different" else self.emit(kind, *operands)

    def clip(self, x: ir.Value, low: Any = None, high: Any = None) -> Any:
        return self.Clip(self.typed(x), *(None if v is None else self.typed(v) for v in (low, high)))

    # constants on a grid

    def dequantize(self, codes: ir.Value, grid: Grid) -> ir.Value:
        """DequantizeLinear; int32 constants (biases) become floats at once, runtimes want them so."""
        array = codes.const_value.numpy() if codes.const_value is not None else None
        if array is not None and array.dtype == np.int32:
            value = self.constant(_real(array, grid), f"{codes.name}/real")
        else:
            zero = np.full(grid.scale.shape, grid.zero_point, self.numpy_dtype(self.types[codes]))
            axis = {} if grid.axis is None else {"axis": grid.axis}
            value = self.DequantizeLinear(codes, self.constant(grid.scale), self.constant(zero), **axis)
        self.describe(value, torch.float32, self._dims[codes])
        self.grids[value] = Grid(grid.scale, grid.zero_point, grid.axis, codes, grid.offset)
        return value

    def transposed(self, w: ir.Value) -> ir.Value:
        """A weight [out, in] as [in, out]: stored so, unless other ops read the constant as it is."""
        if w in self._transposed:
            return self._transposed[w]
        grid = self.grids.get(w)
        source = grid.codes if grid is not None and grid.codes is not None else w
        others = [u for u in source.uses() if u.node.op_type != "DequantizeLinear"]
        if source.const_value is None or others:
            turned = self.Transpose(source, perm=[1, 0])
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
        if None in grids or not self.for_onnxruntime or real is None or not (static or self.rank(x) == 2):
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
            return self.Gather(table, ids, axis=0)
        codes = self.Gather(grid.codes, ids, axis=0)
        self.describe(codes, self.types[grid.codes], [*self._dims[ids], *self._dims[grid.codes][1:]])
        if grid.axis is None:
            return self.dequantize(codes, grid)
        if grid.axis != 0:
            return self.Gather(table, ids, axis=0)
        scales = self.Unsqueeze(self.Gather(self.constant(grid.scale), ids, axis=0), self.vector([-1]))
        shifted = self.Sub(self.cast(codes, torch.float32), self.constant(np.float32(grid.zero_point)))
        return self.Mul(shifted, scales)


def _real(codes: NDArray[Any], grid: Grid) -> NDArray[Any]:
    shape = [1] * codes.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale = grid.scale if grid.axis is None else grid.scale.reshape(shape)
    return (codes.astype(np.float32) - np.float32(grid.zero_point)) * scale.astype(np.float32)
