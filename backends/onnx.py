"""Writes a float or qdq graph as ONNX: one pass over its nodes, each written by its own op (``Op.onnx``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from ..errors import CheckpointError, ConfigError, LoweringError
from ..files import make_folder, write_atomic
from ..graph import fetch, moves_data, output_args, site_of
from ..op import Op, op_of
from .onnx_builder import Builder, Dims, Grid
from .onnx_dialects import Container, Dialect, container, dialect_of, emit_dequantize, emit_quantize, opset_for

IR_VERSION = 10
LIMIT = 2**31 - 1  # bytes of one protobuf message


@dataclass(frozen=True)
class Cut:
    """One quantizer of a file that shows its codes: they leave by ``output``, plus ``offset``, and where the file is
    cut they come in again by ``input`` ("" where it is not)."""

    site: str
    input: str
    output: str
    offset: int
    dtype: str


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``cuts`` is empty unless the file shows its codes."""

    path: Path
    target: str
    opset: int
    nodes: int
    quantizers: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB"
        return (
            f"{self.path}: {self.target}, opset {self.opset}, {self.nodes} nodes, {self.quantizers} quantizers, {size}"
        )


def export(
    gm: fx.GraphModule,
    path: str | Path,
    *,
    target: str = "ort-cpu",
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    shown: bool = False,
    cut: bool = False,
) -> ExportReport:
    """Write ``gm`` (stage float or qdq) to ``path``, checked by ``onnx.checker``; the old file stays until then.

    Args:
        target: a name of ``onnx_dialects.DIALECTS``.
        input_names, output_names: names in the file, in the order of the graph's; the graph's own by default.
        metadata: text for the file's ``metadata_props``.
        shown: let every quantizer's codes be an output too.
        cut: let every quantizer's codes leave the graph and come in again by an input of their own, so that each
            piece between quantizers can be fed codes from elsewhere (see ``ExportReport.cuts``).

    Raises:
        ConfigError: the stage or target has no ONNX form, or the names do not fit the graph.
        LoweringError: an op has no ONNX form; names the site.
        CheckpointError: ``path`` cannot be written.
    """
    stage = gm.meta.get("stage")
    if stage not in ("float", "qdq"):
        raise ConfigError(f"a {stage} graph has no ONNX form", do="export a float or qdq graph")
    dialect = dialect_of(target)
    emitter = _Emitter(gm, dialect, shown, cut, Builder(for_onnxruntime=dialect.unsigned))
    emitter.run(list(input_names), list(output_names))
    opset = opset_for(emitter.g.nodes, emitter.g.types)
    model = _model(emitter, opset, {"target": target, **(metadata or {})})
    data = model.SerializeToString()
    file = Path(path)
    _write(file, model, data)
    return ExportReport(
        path=file,
        target=target,
        opset=opset,
        nodes=len(model.graph.node),
        quantizers=sum(_name(n) == "quantize" for n in gm.graph.nodes),
        bytes=len(data),
        inputs=tuple(v.name for v in model.graph.input),
        outputs=tuple(v.name for v in model.graph.output),
        cuts=tuple(emitter.cuts),
    )


def _write(file: Path, model: onnx.ModelProto, data: bytes) -> None:
    if len(data) > LIMIT:
        raise CheckpointError(
            f"{file} would take {len(data)} bytes, an ONNX file holds {LIMIT}", do="quantize more of it"
        )
    onnx.checker.check_model(model, full_check=True)
    make_folder(file.parent)
    if file.is_dir():
        raise CheckpointError(f"cannot write {file}: it is a folder", do="give the name of a file")
    write_atomic(file, lambda name: Path(name).write_bytes(data) and None)


def _name(node: fx.Node) -> str:
    op = op_of(node)
    return op.name if op is not None else ""


QUANTIZE = ("x", "scale", "zero_point", "qmin", "qmax", "axis")
DEQUANTIZE = ("codes", "scale", "zero_point", "axis")


def _arguments(node: fx.Node) -> list[Any]:
    """The arguments of a quantize or dequantize node, all of them, in schema order."""
    names = QUANTIZE if _name(node) == "quantize" else DEQUANTIZE
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    return [given.get(n, 0 if n == "zero_point" else None) for n in names]


def _model(emitter: _Emitter, opset: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    g = emitter.g
    graph = ir.Graph(
        emitter.inputs,
        emitter.outputs,
        nodes=g.nodes,
        initializers=list(g.initializers.values()),
        opset_imports={"": opset},
        name="kdlsq_fx",
    )
    props = {"stage": str(emitter.gm.meta["stage"]), **{k: str(v) for k, v in metadata.items()}}
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="kdlsq_fx", metadata_props=props)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


@dataclass
class _Emitter:
    """Walks the graph once; ``env`` holds the ONNX value (or size, or list of values) of every fx node."""

    gm: fx.GraphModule
    dialect: Dialect
    shown: bool
    cut: bool
    g: Builder
    env: dict[fx.Node, Any] = field(default_factory=dict)
    codes: dict[ir.Value, Grid] = field(default_factory=dict)
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

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
        readers = [_name(u) for u in node.users]
        self.g.shared_with_quantizer = "quantize" in readers and set(readers) != {"quantize"}
        self.g.clamped_next = len(readers) == 1 and readers[0] in ("relu", "clamp")
        before = len(self.g.nodes)
        if op is not None and op.name == "quantize":
            result = self._quantize(node)
        elif op is not None and op.name == "dequantize":
            result = self._dequantize(node)
        elif op is None or op.onnx is None:
            raise LoweringError(f"op {op.name if op else node.target} has no ONNX form", where=self.g.site)
        else:
            result = self._plain(node, op)
        self._name_results(result, {id(n) for n in self.g.nodes[before:]})
        self.env[node] = result

    def _plain(self, node: fx.Node, op: Op) -> Any:
        args = fx.node.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.env.__getitem__)
        grid = self.g.grids.get(args[0]) if args and isinstance(args[0], ir.Value) else None
        codes = grid.codes if grid is not None and grid.axis is None else None
        if grid is not None and codes is not None and moves_data(node):
            return self._move_codes(node, op, args, kwargs, grid, codes)
        result = op.onnx(self.g, *args, **kwargs)
        self._describe(result, node.meta.get("val"))
        return result

    def _move_codes(self, node: fx.Node, op: Op, args: Any, kwargs: Any, grid: Grid, codes: ir.Value) -> Any:
        """A data mover moves the codes, and its result is dequantized: a quarter of the bytes, the same values."""
        moved = op.onnx(self.g, codes, *args[1:], **kwargs)
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
        source, scale, zero_point, qmin, qmax, axis = _arguments(node)
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
        source, scale, zero_point, axis = _arguments(node)
        codes = self.env[source]
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


def metadata_of(path: str | Path) -> dict[str, str]:
    """The ``metadata_props`` of a file; CheckpointError where it is no ONNX file."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as err:
        raise CheckpointError(f"{path} is no ONNX file: {err}", do="export it again") from None
    return {p.key: p.value for p in model.metadata_props}


def qconfig_of(path: str | Path) -> Any:
    """The qconfig a file was trained with, as written by ``export_onnx``; None for other files."""
    text = metadata_of(path).get("qconfig")
    return json.loads(text) if text else None
