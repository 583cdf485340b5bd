"""The native backend: an integer graph on int8 kernels (backends/kernels), the rest as torch runs it.

native_rules.py says for each op which kernel computes it; native_fusions.py joins neighbours into one kernel first.
Products, requantization, tables, integer softmax and LayerNorm give the reference's integers bit for bit. Float islands
run in float32 (the reference's in float64), so what is rounded behind one can be one code away where it lies at a tie.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..comparison import CodeHook
from ..errors import InputError
from ..graph import site_of
from ..op import op_of
from ..report import columns
from . import native_kernels as kernels
from . import native_onednn
from .native_fusions import FUSIONS, OPEN, Fusion, fuse_all, fuse_linear, fuse_open_linear
from .native_library import available
from .native_rules import RULES, Builder, Keep, native_linear, rounds

FREE = ("view", "reshape", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze", "contiguous")


@dataclass(frozen=True)
class Row:
    """One line of the report: the kernel (or torch op) at a site, and why it is not native."""

    site: str
    kernel: str
    why: str = ""


class NativeModel:
    """An int GraphModule on native kernels: called with the graph's inputs in order, CPU tensors; returns its outputs.

    ``rows``: what runs at each site. ``missing``: why the kernels are not there ("" where they are): the linears then
    run in oneDNN, all else in torch.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.source = gm
        self.missing = available()
        if self.missing:
            self._warn()
        self.inputs = tuple(str(n.target) for n in gm.graph.find_nodes(op="placeholder"))
        own = not self.missing
        self.gm, self.rows = translate(gm, FUSIONS if own else (fuse_linear,), own=own)
        self._open: fx.GraphModule | None = None

    def _warn(self) -> None:
        text = f"the native kernels cannot run: {self.missing}. Linears run in oneDNN, all else in torch"
        if native_onednn.saturates():
            text += "; this CPU's int8 products saturate at 16 bits: use 7-bit weights, or backend='torch'"
        warnings.warn(text, stacklevel=5)

    def __call__(self, *args: torch.Tensor) -> Any:
        for name, value in zip(self.inputs, args):
            if value.device.type != "cpu":
                raise InputError(f"{name} is on {value.device}", do="the native backend runs on the CPU: pass .cpu()")
        return self.gm(*args)

    def run(self, inputs: Mapping[str, Any], hook: CodeHook) -> Any:
        """Execute with every rounding op apart; ``hook(site, codes)`` returns what to go on with."""
        if self._open is None:
            own = not self.missing
            self._open, _ = translate(self.source, OPEN if own else (fuse_open_linear,), own=own)
        with torch.no_grad():
            return _Hooked(self._open, hook).run(*(torch.as_tensor(inputs[name]) for name in self.inputs))

    def __deepcopy__(self, memo: Any) -> NativeModel:
        return NativeModel(self.source)

    def report(self) -> str:
        """What runs where, as text: kernels counted, and each op that torch runs with its reason."""
        count = Counter(r.kernel for r in self.rows if not r.why)
        native = ", ".join(f"{n} {name}" for name, n in sorted(count.items(), key=lambda item: -item[1]))
        left = [(r.site, r.kernel, r.why) for r in self.rows if r.why]
        head = f"native: {native or 'nothing'}"
        return "\n".join([head, columns(("site", "op", "run by torch, because"), left)] if left else [head])


class _Hooked(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, hook: CodeHook) -> None:
        super().__init__(gm)
        self.hook = hook

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return self.hook(site_of(n), result) if n.meta.get("rounds") or rounds(n) else result


def translate(gm: fx.GraphModule, fusions: Sequence[Fusion], *, own: bool) -> tuple[fx.GraphModule, list[Row]]:
    """int -> native: kernels where there are any. ``own``: the kernels of backends/kernels, else products alone, in
    oneDNN."""
    build, why = Builder(gm, kernels.linear if own else native_onednn.linear), dict[fx.Node, str]()
    fuse_all(build, fusions)
    for node in list(build.graph.nodes):
        op = op_of(node)
        rule = RULES.get(op) if op is not None and node.users else None
        if rule is None or not (own or rule is native_linear):
            continue
        try:
            rule(build, node)
        except Keep as reason:
            why[node] = str(reason)
    build.graph.eliminate_dead_code()
    build.gm.recompile()
    return build.gm, _rows(build, why)


def _rows(build: Builder, why: dict[fx.Node, str]) -> list[Row]:
    rows = []
    for node in build.graph.nodes:
        op = op_of(node)
        if node in build.kernels:
            rows.append(Row(site_of(node), build.kernels[node]))
        elif node in why:
            rows.append(Row(site_of(node), op.name if op else "", why[node]))
        elif op is not None and op.name not in FREE and "float" in (*op.signature.operands, op.signature.result):
            rows.append(Row(site_of(node), op.name, op.why_float or "it is a float op"))
    return rows
