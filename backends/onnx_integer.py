"""Writes an int graph as ONNX of integer operators: no QuantizeLinear, no float but the scales of the results.

Opset 18 is the lowest of the standard that has all of it: BitwiseAnd, BitwiseXor, and ReduceMax with axes as an input.
Constants of 2 and 4 bits are stored so, behind a Cast that runtimes compute when they load the file; it takes opset 21
(4 bits) or 25 (2 bits).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import fx

from ..errors import CheckpointError, ConfigError, LoweringError
from ..graph import site_of
from ..integer_only import islands_left, refuse
from ..op import Op
from ..run_int import ROUNDING
from .onnx import ExportReport, model_of, write_checked
from .onnx_codes import Hook
from .onnx_dialects import Container, along, dialect_of, opset_of_casts
from .onnx_emitter import Emitter, arguments_of, op_name
from .onnx_grids import GridBuilder
from .onnx_runtime import OnnxModel

Array = NDArray[Any]
TARGET = "integer"
OPSET = 18
FLOATS = frozenset(
    onnx.TensorProto.DataType.Value(t) for t in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "COMPLEX64", "COMPLEX128")
)
OF_RESULTS = ("Cast", "Sub", "Mul", "Identity")  # what a result is made real with


class IntegerEmitter(Emitter):
    """The walk of :class:`Emitter` over an int graph. ``shown``: every rounding op's codes are an output too."""

    def _plain(self, node: fx.Node, op: Op) -> Any:
        result = super()._plain(node, op)
        if self.shown and op.name in ROUNDING:
            dtype = self.g.types[result]
            self._show(result, Container(str(dtype).removeprefix("torch.")), dtype)
        return result

    def _quantize(self, node: fx.Node) -> ir.Value:
        raise LoweringError("a float is quantized here", where=site_of(node), do="give the model integer inputs")

    def _dequantize(self, node: fx.Node) -> ir.Value:
        """``(codes - zero_point) * scale`` in float32, as the reference computes it."""
        codes, scale, zero_point, axis = arguments_of(node)
        constant = self.env[scale]
        if constant.const_value is None:
            raise LoweringError("the scale of a result is no constant", where=site_of(node), do="quantize the result")
        source = self.env[codes]
        real = self.g.cast(source, torch.float32)
        if zero_point:
            real = self.g.Sub(real, self.g.constant(np.float32(zero_point)))
        value: ir.Value = self.g.Mul(real, along(self.g, source, constant.const_value.numpy(), axis))
        self.g.describe(value, torch.float32, self.g.dims(source))
        return value


def export_integer(
    gm: fx.GraphModule,
    path: str | Path,
    *,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    shown: bool = False,
) -> ExportReport:
    """Write ``gm`` (stage int) to ``path``: equal to the reference backend bit for bit; checked before it is there.

    Args:
        input_names, output_names: names in the file, in the order of the graph's; the graph's own by default.
        metadata: text for the file's ``metadata_props``.
        shown: let the codes of every rounding op be an output too (``ExportReport.cuts`` names them).

    Raises:
        ConfigError: another stage, or names that do not fit the graph.
        LoweringError: a float island, or an op without an ONNX form; names the sites.
        CheckpointError: ``path`` cannot be written.
    """
    if gm.meta.get("stage") != "int":
        raise ConfigError(f"a {gm.meta.get('stage')} graph holds floats", do="export an int graph: convert(qat)")
    if any("val" not in n.meta for n in gm.graph.find_nodes(op="placeholder")):
        raise ConfigError(
            "a program that was read from a folder lacks the sizes", do="export the qat folder it is from"
        )
    refuse(
        islands_left(gm, inputs=True),
        "an integer file holds none",
        "train with an -int preset, such as W8E8A8-int, or export for another target",
    )
    emitter = IntegerEmitter(gm, dialect_of("spec"), shown, False, GridBuilder())
    emitter.run(list(input_names), list(output_names))
    emitter.g.pack_constants(2)
    opset = max(OPSET, opset_of_casts(emitter.g.nodes, emitter.g.types))
    model = model_of(emitter, opset, {"target": TARGET, **(metadata or {})})
    left = floats_of(model)
    if left:
        raise LoweringError(f"{len(left)} nodes of the file would compute floats", where=left[0], do="report it")
    file = Path(path)
    size = write_checked(file, model)
    return ExportReport(
        path=file,
        target=TARGET,
        opset=opset,
        nodes=len(model.graph.node),
        quantizers=sum(op_name(n) in ROUNDING for n in gm.graph.nodes),
        bytes=size,
        inputs=tuple(v.name for v in model.graph.input),
        outputs=tuple(v.name for v in model.graph.output),
        cuts=tuple(emitter.cuts),
    )


def integer_only(path: str | Path) -> list[str]:
    """The nodes of an ONNX file with a float operand or result, but for those that make the file's results real.

    Empty for a file of target ``integer``. CheckpointError where the file cannot be read, or a dtype is unknown.
    """
    try:
        model = onnx.load(str(path))
    except Exception as err:  # protobuf's own exceptions share no base class
        raise CheckpointError(f"{path} is no ONNX file: {err}", do="export it again") from None
    return floats_of(model)


def floats_of(model: onnx.ModelProto) -> list[str]:
    """:func:`integer_only` of a model in memory."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    dtypes = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    dtypes.update({t.name: t.data_type for t in graph.initializer})
    harmless = {v.name for v in graph.output if dtypes[v.name] in FLOATS}  # floats that only a result is made of
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in reversed(graph.node):
        names = [n for n in (*node.input, *node.output) if n]
        unknown = [n for n in names if n not in dtypes]
        if unknown:
            raise CheckpointError(f"the dtype of {unknown[0]} is unknown", where=node.name, do="export it again")
        if not any(dtypes[n] in FLOATS for n in names):
            continue
        if node.op_type in OF_RESULTS and all(o in harmless for o in node.output):
            ends = [n for n in node.input if all(set(r.output) <= harmless for r in readers[n])]
            harmless.update(ends)
        else:
            found.append(node.name)
    return found[::-1]


class OnnxIntegerCodes:
    """An int model as an integer ONNX file with its codes in sight: ``compare(model, OnnxIntegerCodes(model), batch)``.

    The file cannot be fed codes from elsewhere, so what ``compare`` calls "same codes" is end to end here; the two are
    the same where nothing differs, which is what this is for.
    """

    def __init__(self, model: Any, *, optimize: bool = True, threads: int = 0) -> None:
        gm = model if isinstance(model, fx.GraphModule) else model.gm
        self._split = None if gm is model else model.split
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        with tempfile.TemporaryDirectory() as folder:
            report = export_integer(gm, f"{folder}/shown.onnx", input_names=names, shown=True)
            self.model = OnnxModel(report.path, optimize=optimize, threads=threads)
        self.cuts = report.cuts
        self.results = [n for n in report.outputs if n not in {c.output for c in self.cuts}]

    def free(self, batch: Mapping[str, Any]) -> tuple[list[Array], dict[str, Array]]:
        """(outputs, codes by site)."""
        given = batch if self._split is None else self._split(**batch)[1]
        arrays = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in given.items()}
        found = self.model(arrays)
        return [found[n] for n in self.results], {c.site: found[c.output] for c in self.cuts}

    def run(self, batch: Mapping[str, Any], hook: Hook) -> list[Array]:
        """The form that ``compare`` calls; what ``hook`` returns is not fed in."""
        outputs, codes = self.free(batch)
        for site, found in codes.items():
            hook(site, found)
        return outputs
