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
    """Values, nodes and constants of one ONNX graph, and what is known of each value (dtype, dimensions).

    ``site`` and ``dtype`` are those of the fx node being written; ops read ``dtype`` to promote their operands.
    Dimensions are ints, or names of sizes that differ from call to call; equal names mean equal sizes.
    """

    def __init__(self) -> None:
        self.site = ""
        self.dtype = torch.float32
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.types: dict[ir.Value, torch.dtype] = {}
        self._dims: dict[ir.Value, Dims] = {}
        self._vectors: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[tuple[ir.Value, int], ir.Value] = {}
        self._small: dict[tuple[Any, ...], ir.Value] = {}
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
