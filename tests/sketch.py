"""Small qdq graphs written by hand, with values and sites filled in by running them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from kdlsq_fx.op import op_of
from kdlsq_fx.ops.qdq import dequantize, quantize


class Sketch:
    """Writes a small qdq graph by hand; values and sites are filled in by running it."""

    def __init__(self, **inputs: torch.Tensor) -> None:
        self.root, self.graph, self.inputs = nn.Module(), fx.Graph(), inputs
        self.nodes = {k: self.graph.placeholder(k) for k in inputs}

    def const(self, name: str, value: torch.Tensor) -> fx.Node:
        self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def act(self, x: fx.Node, name: str, scale: float, zero_point: int, low: int, high: int) -> fx.Node:
        s = self.const(f"{name}_scale", torch.tensor(scale))
        return self.call(dequantize, self.call(quantize, x, s, zero_point, low, high, None), s, zero_point, None)

    def weight(self, name: str, codes: torch.Tensor, scale: torch.Tensor) -> fx.Node:
        s = self.const(f"{name}_scale", scale)
        return self.call(dequantize, self.const(name, codes), s, 0, 0 if scale.ndim else None)

    def done(self, *results: fx.Node, stage: str = "qdq") -> fx.GraphModule:
        self.graph.output(results)
        gm = fx.GraphModule(self.root, self.graph)
        gm.meta["stage"] = stage
        values = Values(gm)
        values.run(*self.inputs.values())
        for i, node in enumerate(gm.graph.nodes):
            node.meta["val"] = values.seen.get(node)
            if node.op == "call_function":
                node.meta["site"] = f"net.part{i}/{op_of(node).name}"  # type: ignore[union-attr]
        return gm


class Values(fx.Interpreter):
    """Keeps the value of every node, and x / scale of every quantizer."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]

    def steps(self) -> dict[str, np.ndarray]:
        found = {n: v for n, v in self.seen.items() if n.target is quantize}
        return {n.meta["site"]: (self.seen[n.args[0]] / self.seen[n.args[1]]).numpy() for n in found}  # type: ignore[index]
