"""One pass over the nodes of a graph, each written by its own op (``Op.onnx``); quantizers by the dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx

from ..errors import ConfigError, LoweringError
from ..graph import fetch, moves_data, output_args, site_of
from ..op import Op, op_of
from .onnx_builder import Dims, Grid
from .onnx_dialects import Container, Dialect, container, emit_dequantize, emit_quantize
from .onnx_grids import GridBuilder, is_subbyte


@dataclass(frozen=True)
class Cut:
    """One quantizer of a file that shows its codes: they leave by ``output``, plus ``offset``, and where the file is
    cut they come in again by ``input`` ("" where it is not)."""

    site: str
    input: str
    output: str
    offset: int
    dtype: str


def op_name(node: fx.Node) -> str:
    """Name of the declared op of a node, "" for others."""
    op = op_of(node)
    return op.name if op is not None else ""


QUANTIZE = ("x", "scale", "zero_point", "qmin", "qmax", "axis")
DEQUANTIZE = ("codes", "scale", "zero_point", "axis")


def arguments_of(node: fx.Node) -> list[Any]:
    """The arguments of a quantize or dequantize node, all of them, in schema order."""
    names = QUANTIZE if op_name(node) == "quantize" else DEQUANTIZE
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    return [given.get(n, 0 if n == "zero_point" else None) for n in names]


@dataclass
class Emitter:
    """Walks the graph once; ``env`` holds the ONNX value (or size, or list of values) of every fx node."""

    gm: fx.GraphModule
    dialect: Dialect
    shown: bool
    cut: bool
    g: GridBuilder
    env: dict[fx.Node, Any] = field(default_factory=dict)
    codes: dict[ir.Value, Grid] = field(default_factory=dict)
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    folded: set[fx.Node] = field(default_factory=set)  # products by a number that the product before them holds

    def run(self, input_names: list[str], output_names: list[str]) -> None:
        holders = self.gm.graph.find_nodes(op="placeholder")
        names = input_names or [str(n.target) for n in holders]
        if len(names) != len(holders):
            raise ConfigError(f"{len(names)} input names for {len(holders)} inputs", do="name every input once")
        results = output_args(self.gm.graph)
        labels = output_names or [f"output_{i}" for i in range(len(results))]
        if len(labels) != len(results):
            raise ConfigError(f"{len(labels)} output names for {len(results)} outputs", do="name every output once")
        for label in (*names, *labels):
            self.g.unique(label)
        self._place_inputs(holders, names)
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = self._constant(str(node.target))
            elif node.op in ("call_function", "call_module"):
                self._call(node)
        for label, result in zip(labels, results):
            self._output(label, result)

    def _place_inputs(self, holders: Sequence[fx.Node], names: list[str]) -> None:
        for node, name in zip(holders, names):
            value = node.meta["val"]
            shape = [s if isinstance(s, int) else DYNAMIC.get(i, f"size_{i}") for i, s in enumerate(value.shape)]
            self.env[node] = self._input(name, value.dtype, _dims(value), shape)

    def _input(self, name: str, dtype: torch.dtype, dims: Dims, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, ir.DataType.from_numpy(self.g.numpy_dtype(dtype)), list(shape))
        self.inputs.append(value)
        self.g.describe(value, dtype, dims)
        return value

    def _constant(self, target: str) -> ir.Value:
        known = self.g.initializers.get(target)
        if known is not None:
            return known
        return self.g.constant(fetch(self.gm, target).detach().cpu().contiguous().numpy(), target)

    def _call(self, node: fx.Node) -> None:
        op = op_of(node)
        self.g.site = site_of(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.g.dtype = value.dtype
        readers = [op_name(u) for u in node.users]
        self.g.shared_with_quantizer = "quantize" in readers and set(readers) != {"quantize"}
        self.g.clamped_next = len(readers) == 1 and readers[0] in ("relu", "clamp")
        before = len(self.g.nodes)
        if op is not None and op.name == "quantize":
            result = self._quantize(node)
        elif op is not None and op.name == "dequantize":
            result = self._dequantize(node)
        elif op is None or op.onnx is None:
            raise LoweringError(f"op {op.name if op else node.target} has no ONNX form", where=self.g.site)
        elif node in self.folded:
            result = self.env[node.args[0]]  # type: ignore[index]
        else:
            result = self._plain(node, op)
        self._name_results(result, {id(n) for n in self.g.nodes[before:]})
        self.env[node] = result

    def _plain(self, node: fx.Node, op: Op) -> Any:
        if op.onnx is None:
            raise ConfigError(f"op {op.name} has no ONNX form", where=site_of(node), do="declare its onnx= meaning")
        args: Any = fx.node.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.env.__getitem__)
        if op.name == "matmul" and self.dialect.fused_dense:
            args = (self._scaled(node, args[0]), *args[1:])
        grid = self.g.grids.get(args[0]) if args and isinstance(args[0], ir.Value) else None
        codes = grid.codes if grid is not None and grid.axis is None else None
        if grid is not None and codes is not None and moves_data(node) and self._may_move(codes):
            return self._move_codes(node, op, args, kwargs, grid, codes)
        held = self._held_codes(node, args)
        if held is not None:
            self.g.dtype = self.g.types[held]
        result = op.onnx(self.g, *args, **kwargs)
        self._describe(result, node.meta.get("val"), None if held is None else self.g.types[held])
        if held is not None:
            self.codes |= dict.fromkeys(result if isinstance(result, list) else [result], self.codes[held])
        return result

    def _scaled(self, node: fx.Node, x: ir.Value) -> ir.Value:
        """The first operand of a product, dequantized with a scale that also holds the number which multiplies the
        product (attention scores): one pass over the scores less, the same values up to the rounding of a float."""
        (user,) = node.users if len(node.users) == 1 else (None,)
        grid = self.g.grids.get(x)
        if user is None or op_name(user) not in ("mul", "div") or user.args[0] is not node or grid is None:
            return x
        number = user.args[1]
        if grid.codes is None or isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
            return x
        self.folded.add(user)
        scale = grid.scale * np.float32(number if op_name(user) == "mul" else 1 / number)
        return self.g.dequantize(grid.codes, Grid(scale, grid.zero_point, grid.axis, None, grid.offset))

    def _held_codes(self, node: fx.Node, args: Any) -> ir.Value | None:
        """Codes that the node moves or joins between a quantize and its dequantize.

        The dialect chose how they are held, not the graph; what comes out is held so too.
        """
        if not (moves_data(node) or op_name(node) == "cat"):
            return None
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        return first if isinstance(first, ir.Value) and first in self.codes else None

    def _may_move(self, codes: ir.Value) -> bool:
        return not self.dialect.adjacent and not is_subbyte(self.g.types[codes])

    def _move_codes(self, node: fx.Node, op: Op, args: Any, kwargs: Any, grid: Grid, codes: ir.Value) -> Any:
        """A data mover moves the codes, and its result is dequantized: a quarter of the bytes, the same values."""
        emit: Any = op.onnx
        moved = emit(self.g, codes, *args[1:], **kwargs)
        if moved is codes:
            return args[0]
        self._describe(moved, node.meta.get("val"), self.g.types[codes])
        if isinstance(moved, list):
            return [self.g.dequantize(m, grid) for m in moved]
        return self.g.dequantize(moved, grid)

    def _describe(self, result: Any, value: Any, dtype: torch.dtype | None = None) -> None:
        """Note dtype, dimensions or the name of a size, as export found them."""
        if isinstance(result, ir.Value) and isinstance(value, torch.Tensor):
            self.g.describe(result, dtype or value.dtype, _dims(value))
        elif isinstance(result, ir.Value) and isinstance(value, torch.SymInt):
            self.g.name_size(result, str(value.node.expr))
        elif isinstance(result, list) and isinstance(value, (list, tuple)):
            for part, known in zip(result, value):
                self._describe(part, known, dtype)

    def _scale(self, scale: Any) -> NDArray[Any]:
        if isinstance(scale, fx.Node):
            return self.env[scale].const_value.numpy()
        return np.asarray(torch.as_tensor(scale).detach().cpu(), np.float32)

    def _quantize(self, node: fx.Node) -> ir.Value:
        source, scale, zero_point, qmin, qmax, axis = arguments_of(node)
        x = self.env[source]
        codes, grid = emit_quantize(self.g, self.dialect, x, self._scale(scale), zero_point, qmin, qmax, axis)
        holds = container(self.dialect, zero_point, qmin, qmax)
        dtype = getattr(torch, holds.dtype) if holds.dtype else torch.float32
        self.g.describe(codes, dtype, self.g.dims(x))
        if self.cut or self.shown:
            codes = self._show(codes, holds, dtype)
        if self.cut:
            grid = Grid(grid.scale, grid.zero_point, axis, codes if holds.dtype else None, grid.offset)
        self.codes[codes] = grid
        return codes

    def _show(self, codes: ir.Value, holds: Container, dtype: torch.dtype) -> ir.Value:
        """The codes become an output; in a cut file a new input takes their place."""
        site, dims = self.g.site, self.g.dims(codes)
        codes.name = self.g.unique(site)
        shape: list[int | str] = [d if isinstance(d, int) else f"{site}/{i}" for i, d in enumerate(dims)]
        self._typed_output(codes, dtype, shape)
        entry = self._input(self.g.unique(f"{site}/in"), dtype, dims, shape) if self.cut else codes
        name = str(entry.name) if self.cut else ""
        self.cuts.append(Cut(site, name, str(codes.name), holds.offset, holds.dtype or "float32"))
        return entry

    def _typed_output(self, value: ir.Value, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        value.type = ir.TensorType(ir.DataType.from_numpy(self.g.numpy_dtype(dtype)))
        value.shape = ir.Shape(list(shape))
        self.outputs.append(value)

    def _dequantize(self, node: fx.Node) -> ir.Value:
        source, scale, zero_point, axis = arguments_of(node)
        codes = self.g.narrowed(self.env[source])
        known = self.codes.get(codes)
        offset = known.offset if known is not None else 0
        in_floats = known is not None and known.codes is None
        grid = Grid(self._scale(scale), zero_point + offset, axis, None if in_floats else codes, offset)
        value = emit_dequantize(self.g, codes, grid)
        self.g.describe(value, torch.float32, self.g.dims(codes))
        return value

    def _name_results(self, result: Any, fresh: set[int]) -> None:
        """What a node computes carries its site as its name."""
        parts = result if isinstance(result, (list, tuple)) else [result]
        for i, value in enumerate(parts):
            producer = value.producer() if isinstance(value, ir.Value) else None
            if producer is not None and id(producer) in fresh and value not in self.outputs:
                value.name = self.g.unique(self.g.site if len(parts) == 1 else f"{self.g.site}.{i}")
                self._declare(value)

    def _declare(self, value: ir.Value) -> None:
        """Write the shape into the file: runtimes fuse residual adds with LayerNorm only where they can see it."""
        dtype, dims = self.g.types.get(value), self.g.known_dims(value)
        if dtype is None or dims is None:
            return
        shape = [d if isinstance(d, int) else self._public(d) or None for d in dims]
        value.type = ir.TensorType(ir.DataType.from_numpy(self.g.numpy_dtype(dtype)))
        value.shape = ir.Shape(shape)

    def _output(self, label: str, result: Any) -> None:
        value = self.env[result] if isinstance(result, fx.Node) else self.g.constant(result)
        dtype = self.g.types[value]
        shape: list[int | str] = []
        for i, d in enumerate(self.g.dims(value)):
            shape.append(d if isinstance(d, int) else self._public(d) or f"{label}_{i}")
        if value.producer() is None or value in self.outputs:
            self.g.site = f"output/{label}"
            value = self.g.Identity(value)
        value.name = label
        self._typed_output(value, dtype, shape)

    def _public(self, size: str) -> str:
        """The name in the file of a size that an input has, "" for others."""
        for value in self.inputs:
            for i, known in enumerate(self.g.dims(value)):
                if known == size:
                    return str(value.shape[i]) if value.shape is not None else ""
        return ""


DYNAMIC = {0: "batch_size", 1: "sequence_length"}


def _dims(value: torch.Tensor) -> Dims:
    """Sizes as ints where they are known, else as the text of export's expression: equal text, equal size."""
    return [s if isinstance(s, int) else str(s.node.expr) for s in value.shape]
