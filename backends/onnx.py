"""Writes a float or qdq graph as ONNX: one pass over its nodes, each written by its own op (``Op.onnx``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from ..errors import CheckpointError, ConfigError
from ..files import make_folder, write_atomic
from ..graph import site_of
from ..summary import Summary
from .onnx_dialects import dialect_of, opset_for
from .onnx_emitter import Cut, Emitter, op_name
from .onnx_grids import GridBuilder
from .onnx_kernels import KernelReport

IR_VERSIONS = {18: 10, 20: 10, 21: 10, 25: 13}  # by opset
LIMIT = 2**31 - 1  # bytes of one protobuf message


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``cuts`` is empty unless the file shows its codes; ``kernels`` is what the target's runtime
    chose for the matrix products, None where it was not asked; ``folded``: sites whose number a scale of the file
    holds; ``summary``: sizes, what runs in int8, what does not."""

    path: Path
    target: str
    opset: int
    nodes: int
    quantizers: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cuts: tuple[Cut, ...] = ()
    folded: frozenset[str] = frozenset()
    kernels: KernelReport | None = None
    summary: Summary | None = None

    def __str__(self) -> str:
        size = f"{self.bytes / 1e6:.1f} MB"
        made = f"{self.target}, opset {self.opset}, {self.nodes} nodes, {self.quantizers} quantizers, {size}"
        return f"{self.path}: {made}" + (f"\n{self.summary}" if self.summary is not None else "")


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
    builder = GridBuilder(fused_dense=dialect.fused_dense, subbyte=dialect.subbyte, packed=dialect.packed)
    emitter = Emitter(gm, dialect, shown, cut, builder)
    emitter.run(list(input_names), list(output_names))
    opset = opset_for(dialect, emitter.g.nodes, emitter.g.types)
    model = model_of(emitter, opset, {"target": target, **(metadata or {})})
    file = Path(path)
    size = write_checked(file, model)
    return ExportReport(
        path=file,
        target=target,
        opset=opset,
        nodes=len(model.graph.node),
        quantizers=sum(op_name(n) == "quantize" for n in gm.graph.nodes),
        bytes=size,
        inputs=tuple(v.name for v in model.graph.input),
        outputs=tuple(v.name for v in model.graph.output),
        cuts=tuple(emitter.cuts),
        folded=frozenset(map(site_of, emitter.folded)),
    )


def write_checked(file: Path, model: onnx.ModelProto) -> int:
    """Write a model that ``onnx.checker`` accepts; returns its bytes. The old file stays until then."""
    data = model.SerializeToString()
    if len(data) > LIMIT:
        raise CheckpointError(
            f"{file} would take {len(data)} bytes, an ONNX file holds {LIMIT}", do="quantize more of it"
        )
    onnx.checker.check_model(data, full_check=True)
    make_folder(file.parent)
    if file.is_dir():
        raise CheckpointError(f"cannot write {file}: it is a folder", do="give the name of a file")
    write_atomic(file, lambda name: Path(name).write_bytes(data))
    return len(data)


def model_of(emitter: Emitter, opset: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The ONNX model of a finished walk, without what nobody reads."""
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
    model = ir.Model(graph, ir_version=IR_VERSIONS[opset], producer_name="kdlsq_fx", metadata_props=props)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


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
