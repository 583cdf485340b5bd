"""A graph as the matcher sees it: quantizers and dropout looked through, operands by port."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .graph import fetch, output_args, site_of
from .op import op_of

COMMON = {"masked_softmax": 1, "masked_mean": 1, "integer_layer_norm": 3}  # operands the float op at this site has too
TRANSPARENT = ("lsq", "bias_grid", "dropout", "quantize", "dequantize")


@dataclass
class View:
    """A graph without quantizers, dropout and the turns around a softmax: nodes in order, their operands by port.

    Equal calls on equal operands are one node: insertion of a quantizer copies the data movers behind a value.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    operands: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    users: dict[fx.Node, list[tuple[int, fx.Node]]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def key(node: fx.Node) -> str:
        """Site of a call; name of an input or constant."""
        return str(node.target) if node.op in ("placeholder", "get_attr") else site_of(node)

    @staticmethod
    def name(node: fx.Node) -> str:
        """The key, with a slash before the op of a call outside all modules: ``/add``, as in ``bert/add``."""
        key = View.key(node)
        return key if "/" in key or node.op in ("placeholder", "get_attr") else f"/{key}"

    @staticmethod
    def label(node: fx.Node) -> str:
        """The op as the site tells it: it stays the same through all stages."""
        if node.op in ("placeholder", "get_attr"):
            return node.op
        return re.sub(r":\d+$", "", site_of(node).rpartition("/")[2])


def view_of(gm: fx.GraphModule) -> View:
    """The view of a graph of any stage, without what no output needs."""
    stands_for: dict[fx.Node, fx.Node] = {}
    first: dict[Any, fx.Node] = {}
    operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in gm.graph.nodes:
        if node.op == "output" or (node.op == "get_attr" and not _is_tensor(gm, node)):
            continue
        inputs = [stands_for[a] for a in _node_args(node) if a in stands_for]
        op = op_of(node)
        if op is not None:
            inputs = inputs[: COMMON.get(op.name)]
        if inputs and (node.meta.get("turn") or (op is not None and op.name in TRANSPARENT)):
            stands_for[node] = inputs[0]
            continue
        frozen = _frozen((node.args, dict(node.kwargs)), stands_for)
        key = (node.op, node.target, frozen) if node.op != "placeholder" else node
        stands_for[node] = first.setdefault(key, node)
        operands[stands_for[node]] = tuple(inputs)
    live = _reach((stands_for[v] for v in output_args(gm.graph) if isinstance(v, fx.Node)), operands)
    view = View()
    for node, inputs_of in operands.items():
        if node in live:
            view.nodes.append(node)
            view.operands[node] = inputs_of
            for port, operand in enumerate(inputs_of):
                view.users[operand].append((port, node))
    return view


def _is_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(fetch(gm, str(node.target)), torch.Tensor)


def _node_args(node: fx.Node) -> Iterator[fx.Node]:
    """Node-valued arguments in schema order, each as often as it stands there (``x * x`` has two)."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    yield from found


def _frozen(value: Any, stands_for: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return stands_for.get(value, value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v, stands_for)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, stands_for) for v in value)
    return (type(value).__name__, str(value))


def _reach(start: Iterable[fx.Node], operands: dict[fx.Node, tuple[fx.Node, ...]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += operands[node]
    return seen
