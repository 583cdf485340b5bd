"""Shapes of a graph's values, computed anew: what a user's pass must keep, and what its own nodes get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .errors import VerifyError
from .graph import fetch, site_of
from .hushed import hushed


@dataclass(frozen=True)
class Typed:
    """``value``: a fake tensor of a node's shape and type, or its size.

    ``operands``: what it reads, where the value was not computed from that but is the one written down: modules and our
    own functions are not run on fake tensors, since some keep tables between calls.
    """

    value: Any
    operands: tuple[Any, ...] = ()


def infer_types(gm: fx.GraphModule, *, after_pass: str = "") -> dict[fx.Node, Typed]:
    """Node -> its type; nothing is computed and no memory is taken. Empty where the inputs carry no shapes.

    VerifyError names the node whose operands do not fit.
    """
    known = {n: Typed(n.meta.get("val")) for n in gm.graph.find_nodes(op="placeholder")}
    mode = next((t.value.fake_mode for t in known.values() if hasattr(t.value, "fake_mode")), None)
    if mode is None:
        return {}
    with hushed(), mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                known[node] = Typed(_constant(mode, fetch(gm, str(node.target))))
            elif node.op in ("call_function", "call_module"):
                known[node] = _called(node, known, after_pass)
    return known


def _constant(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, torch.Tensor) else value


def _called(node: fx.Node, known: dict[fx.Node, Typed], after_pass: str) -> Typed:
    operands = tuple(known[n].value for n in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) and getattr(node.target, "__module__", "") != "_operator":
        return Typed(node.meta.get("val", operands[0] if operands else None), operands)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n].value)
    try:
        return Typed(node.target(*args, **kwargs))  # type: ignore[operator]
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        what = f"its operands do not fit: {lines[0][:200]}"
        raise VerifyError(what, where=site_of(node), do=f"look at pass {after_pass}") from error


def check_kept(before: dict[fx.Node, Typed], after: dict[fx.Node, Typed], *, after_pass: str) -> None:
    """VerifyError for the first value whose shape is another one than before the pass; nodes it made get theirs."""
    for node, new in after.items():
        old = before.get(node, new)
        pairs = [(old.value, new.value), *zip(old.operands, new.operands)]
        changed = next((i for i, (a, b) in enumerate(pairs) if not _same(a, b)), None)
        if changed is not None:
            whose, (was, is_now) = "an operand" if changed else "this value", pairs[changed]
            what = f"the shape of {whose} was {_shape(was)}, it is {_shape(is_now)} now"
            do = f"pass {after_pass} must keep the shapes of values that it did not make"
            raise VerifyError(what, where=site_of(node), do=do)
        if "val" not in node.meta and not isinstance(new.value, nn.Module):
            node.meta["val"] = new.value


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return True
    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape))


def _shape(value: Any) -> str:
    return str(tuple(value.shape))
