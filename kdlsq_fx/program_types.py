"""What a program says of its values: dtypes, shapes, inputs, outputs, and whether it is integer-only."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from .graph import fetch
from .integer_only import dtype_of, float_nodes
from .op import op_of
from .run_int import OPS

AXES = ("batch", "length")
MEANINGS = {
    "input_ids": "ids of the tokens; 0 <= id < size of the vocabulary",
    "attention_mask": "1 where a token is there, 0 where there is padding",
    "token_type_ids": "0 for the first text of a pair, 1 for the second",
    "position_ids": "positions of the tokens, from 0",
}
REAL = "(codes - zero_point) * scale, in float32"


class Symbols:
    """Names for the sizes that only a batch decides: ``batch``, ``length``, else the name in the input's own axis.

    torch numbers its symbols anew at every export; these names stay the same.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.names: dict[str, str] = {}
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if not isinstance(size, int):
                    self.names.setdefault(str(size), AXES[axis] if axis < len(AXES) else f"axis_{axis}")

    def size(self, size: Any) -> int | str:
        """A size as an int, or as an expression of the names."""
        if isinstance(size, int):
            return size
        return re.sub(r"\b[su]\d+\b", lambda m: self.names.setdefault(m[0], f"n{len(self.names)}"), str(size))

    def describe(self, value: Any) -> dict[str, Any]:
        """``dtype`` and ``shape`` of a tensor, ``parts`` of a list, dtype ``size`` for a size; {} if unknown."""
        if isinstance(value, torch.Tensor):
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": [self.size(s) for s in value.shape]}
        if isinstance(value, (list, tuple)):
            return {"parts": [self.describe(v) for v in value]}
        return {"dtype": "size"} if isinstance(value, (int, torch.SymInt)) else {}


def type_of(gm: fx.GraphModule, node: fx.Node, symbols: Symbols) -> dict[str, Any]:
    """What :meth:`Symbols.describe` says of a node; for a loaded program, what its file says."""
    if "type" in node.meta:
        return dict(node.meta["type"])
    return symbols.describe(fetch(gm, str(node.target)) if node.op == "get_attr" else node.meta.get("val"))


def input_row(node: fx.Node, symbols: Symbols) -> dict[str, Any]:
    """An input as the program's reader must pass it."""
    kind = node.meta.get("type") or symbols.describe(node.meta.get("val"))
    return {"name": str(node.target), "node": node.name, **kind, "meaning": MEANINGS.get(str(node.target), "")}


def output_row(gm: fx.GraphModule, name: str, node: Any, symbols: Symbols) -> dict[str, Any]:
    """A result: the node, and, behind a ``dequantize``, the codes it is made of with their scale and zero point."""
    value = {"node": node.name}
    row = {"name": name, "value": value, **type_of(gm, node, symbols)}
    op = op_of(node)
    if op is None or op.name != "dequantize":
        return {**row, "codes": value, "scale": None, "zero_point": 0, "axis": None, "meaning": "as it is"}
    given: list[Any] = [*node.args, *(0, None)[len(node.args) - 2 :]]
    codes, scale, zero_point, axis = given
    constant = fetch(gm, str(scale.target)).tolist() if scale.op == "get_attr" else {"node": scale.name}
    codes = {"node": codes.name}
    return {**row, "codes": codes, "scale": constant, "zero_point": zero_point, "axis": axis, "meaning": REAL}


def is_integer_only(gm: fx.GraphModule) -> bool:
    """True where run_int.py runs the program: integers all the way but for the ``dequantize`` of the results, ops that
    it has, and a type known for every row."""
    rows = [n for n in gm.graph.nodes if n.op not in ("get_attr", "output")]
    ops = [op.name for n in rows if (op := op_of(n)) is not None]
    return not float_nodes(gm) and all(dtype_of(n) is not None for n in rows) and set(ops) <= OPS.keys()
