"""Elementwise functions of one value that a model spells out in several ops: one table of codes serves them all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .graph import behind_dropout, root
from .op import is_float, op_of, tensor_args

AFFINE = frozenset({"add", "sub", "mul", "div", "neg"})
CURVED = frozenset({"pow", "tanh", "sigmoid", "relu", "erf", "exp", "gelu", "silu", "sqrt", "rsqrt", "square"})


@dataclass(frozen=True)
class Region:
    """Nodes that together are an elementwise function of ``source``: two or more, and no straight line.

    ``last`` is the one whose result the rest of the graph reads. ALBERT's GELU, ``0.5 * x * (1 + tanh(...))``, is one.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    last: fx.Node


def find_regions(graph: fx.Graph) -> list[Region]:
    """Every region of a float graph, in graph order; only those with a single result."""
    source: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        base = _source(node, source)
        if base is not None:
            source[node] = base
            members.setdefault(base, []).append(node)
    return [r for base, nodes in members.items() if (r := _region(base, nodes)) is not None]


def _source(node: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The one value an elementwise node is a function of; None where there are two, or none."""
    op = op_of(node)
    if op is None or op.name not in AFFINE | CURVED or not is_float(node) or node.meta.get("plumbing"):
        return None
    found = {known.get(o, o) for o in tensor_args(node) if not _is_number(o)}
    if len(found) != 1:
        return None
    (base,) = found
    return base if is_float(base) and base.op != "get_attr" and root(base) is base else None


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and value is not None and value.dim() == 0


def _region(base: fx.Node, nodes: list[fx.Node]) -> Region | None:
    """The part of the functions of ``base`` that ends in its last curved node and what scales it."""
    names = [op_of(n).name for n in nodes]  # type: ignore[union-attr]
    inside = set(nodes)
    last = [n for n in nodes if not n.users or any(u not in inside for u in n.users)]
    if len(nodes) < 2 or not CURVED & set(names) or len(last) != 1 or behind_dropout(base) is not base:
        return None
    return Region(base, tuple(nodes), last[0])
