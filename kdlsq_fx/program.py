"""An integer graph as a file: a JSON program of declared ops and a safetensors file of its constants.

Loading needs no capture and no transformers: op names are looked up in the op table. Nothing is ever unpickled.
docs/integer_format.md describes the folder for those who read it without this package; run_int.py is such a reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .errors import CheckpointError
from .files import CONSTANTS, checksum, make_folder, read_json, read_tensors, write_tensors, write_text
from .graph import fetch, output_args, put, site_of
from .lowering import Island
from .op import BY_NAME, op_of
from .program_types import Symbols, input_row, is_integer_only, output_row, type_of
from .run_int import FORMAT

PROGRAM = "program.json"
DAMAGED = "copy the folder again"


def save_program(gm: fx.GraphModule, path: str | Path, output_names: Sequence[str] = ()) -> Path:
    """Write ``program.json`` and ``constants.safetensors`` into the folder ``path``; each file is replaced as a whole.

    ``output_names``: one a result of the graph, else they are numbered. Only call_function nodes of declared ops can
    be written: CheckpointError names any other. The program holds the hash of its constants, so that a folder half
    overwritten is found out when it is read.
    """
    symbols = Symbols(gm.graph)
    nodes = [_written(gm, n, symbols) for n in gm.graph.nodes if n.op != "output"]
    results = output_args(gm.graph)
    names = output_names if len(output_names) == len(results) else [f"output_{i}" for i in range(len(results))]
    folder = make_folder(path)
    targets = [str(n.target) for n in gm.graph.find_nodes(op="get_attr")]
    write_tensors(folder / CONSTANTS, {t: fetch(gm, t) for t in dict.fromkeys(targets)}, packed=True)
    program = {
        "format": FORMAT,
        "stage": gm.meta.get("stage", "int"),
        "integer_only": is_integer_only(gm),
        "constants": {"file": CONSTANTS, "sha256": checksum(folder / CONSTANTS)},
        "inputs": [input_row(n, symbols) for n in gm.graph.find_nodes(op="placeholder")],
        "outputs": [output_row(gm, name, n, symbols) for name, n in zip(names, results)],
        "nodes": nodes,
        "islands": [[i.site, i.op, i.reason] for i in gm.meta.get("islands", ())],
    }
    write_text(folder / PROGRAM, _text(program))
    return folder


def _text(program: dict[str, Any]) -> str:
    """JSON with one row (a node, an input) a line, so that it can be read and compared by lines."""
    parts = []
    for key, value in program.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) and value else ""
        parts.append(f'"{key}": ' + (f"[\n{rows}\n ]" if rows else json.dumps(value)))
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def load_program(path: str | Path) -> fx.GraphModule:
    """The GraphModule that :func:`save_program` wrote, with its sites and islands.

    CheckpointError for files that are absent, truncated, of another format, of another program, or that name an op
    this version does not know.
    """
    from . import ops  # noqa: F401  (fills the op table)

    folder = Path(path)
    program = read_json(folder / PROGRAM, newest=FORMAT)
    if program.get("format") != FORMAT:
        what = f"{folder / PROGRAM} has format {program.get('format')}, this version of kdlsq_fx reads {FORMAT} only"
        raise CheckpointError(what, do="convert the model again, from its qat folder")
    try:
        name, wanted = program["constants"]["file"], program["constants"]["sha256"]
        if Path(name).name != name:  # a file of this folder and no other
            raise ValueError(f"{name!r} is no plain file name")
        tensors = read_tensors(folder / name)
        if wanted != checksum(folder / name):
            raise CheckpointError(f"{folder / name} is not the file that {PROGRAM} was written with", do=DAMAGED)
        return _build(program, tensors, str(folder / PROGRAM))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as err:
        raise CheckpointError(f"{folder / PROGRAM} is damaged: {type(err).__name__}: {err}", do=DAMAGED) from None


def _written(gm: fx.GraphModule, node: fx.Node, symbols: Symbols) -> dict[str, Any]:
    kind = type_of(gm, node, symbols)
    if node.op == "placeholder":
        return {"name": node.name, "input": str(node.target), **kind}
    if node.op == "get_attr":
        return {"name": node.name, "constant": str(node.target), **kind}
    op, site = op_of(node), site_of(node)
    if node.op != "call_function" or op is None:
        raise CheckpointError(f"{node.op} {node.target} cannot be written", where=site, do="convert the model first")
    written = {"name": node.name, "op": op.name, "site": site, "args": encode(node.args, site)}
    kwargs = {"kwargs": encode(node.kwargs, site)} if node.kwargs else {}
    return {**written, **kwargs, **kind}


def encode(value: Any, where: str) -> Any:
    """An argument of a node as JSON: lists for tuples and lists, a tagged object for what JSON has no word for."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [encode(v, where) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: encode(v, where) for k, v in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"an argument of type {type(value).__name__} cannot be written", where=where)


def decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """The argument that :func:`encode` wrote; KeyError for a node that is not there yet."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    return DECODERS[tag](inner, nodes)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name}")
    return dtype


DECODERS: dict[str, Callable[[Any, dict[str, fx.Node]], Any]] = {
    "node": lambda inner, nodes: nodes[inner],
    "dict": lambda inner, nodes: {k: decode(v, nodes) for k, v in inner.items()},
    "dtype": lambda inner, nodes: _dtype(inner),
    "slice": lambda inner, nodes: slice(*decode(inner, nodes)),
    "ellipsis": lambda inner, nodes: Ellipsis,
    "float": lambda inner, nodes: float(inner),
}


def _build(program: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> fx.GraphModule:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    root = fx.GraphModule(nn.Module(), fx.Graph())
    for name, tensor in tensors.items():
        put(root, name, tensor)
    for row in program["nodes"]:
        nodes[row["name"]] = _read(graph, row, nodes, tensors, where)
    graph.output(tuple(decode([row["value"] for row in program["outputs"]], nodes)))
    gm = fx.GraphModule(root, graph)
    gm.meta["stage"] = program["stage"]
    gm.meta["islands"] = tuple(Island(*row) for row in program["islands"])
    gm.meta["integer_only"] = is_integer_only(gm)
    return gm.eval()


def _read(
    graph: fx.Graph, row: dict[str, Any], nodes: dict[str, fx.Node], tensors: dict[str, torch.Tensor], where: str
) -> fx.Node:
    name = row["name"]
    if "input" in row:
        node = graph.create_node("placeholder", row["input"], name=name)
    elif "constant" in row:
        if row["constant"] not in tensors:
            raise CheckpointError(f"{where} reads the constant {row['constant']}, which is missing", do=DAMAGED)
        node = graph.create_node("get_attr", row["constant"], name=name)
    else:
        op = BY_NAME.get(row["op"])
        if op is None:
            raise CheckpointError(
                f"{where} uses the op {row['op']!r}", where=row.get("site", ""), do="upgrade kdlsq_fx"
            )
        args, kwargs = decode(row["args"], nodes), decode(row.get("kwargs", {"dict": {}}), nodes)
        node = graph.create_node("call_function", op.target, tuple(args), kwargs, name=name)
        node.meta["site"] = row["site"]
    node.meta["type"] = {key: row[key] for key in ("dtype", "shape", "parts") if key in row}
    return node


def program_text(gm: fx.GraphModule) -> str:
    """The program's nodes as JSON text, for golden files and reading."""
    symbols = Symbols(gm.graph)
    return "\n".join(json.dumps(_written(gm, n, symbols)) for n in gm.graph.nodes if n.op != "output") + "\n"
